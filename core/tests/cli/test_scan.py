"""`graftage providers --scan`."""

from __future__ import annotations

import json
import socket
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cli.conftest import Shell

SERVERS = """
import sys
from graftage_ollama import connect, settings_model

@hookimpl
def local_addresses():
    return {addresses!r}

it = sys.modules[__name__]
"""
"""A provider of Ollama servers at other addresses."""


KNOWING = """
class It(Echo):
    @hookimpl
    def local_addresses(self):
        return ("{url}",)

"""
"""A provider that finds itself at an address."""


@pytest.fixture(autouse=True)
def _alone(shell: Shell) -> None:
    """Disable the providers that are really installed: they could ask a real server."""
    shell.environment["GRAFTAGE_DISABLED_PLUGINS"] = "ollama,llamacpp,openai"


@pytest.fixture
def fake() -> Iterator[FakeOllama]:
    with FakeOllama(models=["a:1b", "b:1b"]) as server:
        yield server


class Page(BaseHTTPRequestHandler):
    """A web page, which is no model server."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<html>Hello</html>")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def page() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def scanned(shell: Shell, *arguments: str, **environment: str) -> dict[str, dict[str, Any]]:
    done = shell.run("providers", "--scan", "--json", *arguments, **environment)
    assert done.code == 0, done
    return {each["address"]: each for each in json.loads(done.out)}


def test_server_is_found_with_its_models(shell: Shell, fake: FakeOllama, closed: str) -> None:
    shell.install(SERVERS.format(addresses=(fake.url, closed)))
    found = scanned(shell)
    there = found[fake.url]
    assert (there["state"], there["provider"], there["version"]) == ("server", "fake", "0.9.3")
    assert there["models"] == ["a:1b", "b:1b"]
    assert (found[closed]["state"], found[closed]["problem"]) == ("closed", None)


def test_what_it_prints_is_a_settings_file(shell: Shell, fake: FakeOllama) -> None:
    shell.install(SERVERS.format(addresses=(fake.url,)))
    out = shell.run("providers", "--scan").out
    assert str(shell.folder / "config.toml") in out
    table, _, piece = out.partition("[instances.")
    assert "a:1b, b:1b" in table
    ((name, instance),) = tomllib.loads(f"[instances.{piece}")["instances"].items()
    assert instance == {"provider": "fake", "host": fake.url, "model": "a:1b"}
    (shell.folder / "config.toml").write_text(f"[instances.{piece}".replace("127.0.0.1", "localhost"))
    assert shell.run("chat", "-p", name, "Hi", GRAFTAGE_MODEL="") == (0, "Hello from the fake.\n", "")
    assert scanned(shell)[fake.url]["instance"] is None
    assert scanned(shell)[fake.url]["name"] == name


def test_other_services_are_named_as_such(shell: Shell, page: str, silent: str) -> None:
    shell.install(SERVERS.format(addresses=(page, silent)))
    found = scanned(shell, "--timeout", "0.5")
    assert {each["state"] for each in found.values()} == {"other"}
    assert all(each["problem"] for each in found.values())
    out = shell.run("providers", "--scan", "--timeout", "0.5").out
    assert f"{page} listens, but `fake` cannot use it: " in out
    assert "[instances." not in out


def test_server_that_wants_a_key_says_so(shell: Shell, fake: FakeOllama) -> None:
    shell.install(SERVERS.format(addresses=(fake.url,)))
    fake.script("/api/version", Answer([{"error": "unauthorized"}], status=401))
    there = scanned(shell)[fake.url]
    assert there["state"] == "other"
    assert there["problem"].endswith("add it to the settings file as an instance.")


def test_no_key_is_sent(shell: Shell, fake: FakeOllama) -> None:
    shell.install(SERVERS.format(addresses=(fake.url,)))
    keys = {"GRAFTAGE_API_KEY": "secret", "OLLAMA_API_KEY": "secret", "GRAFTAGE_FAKE_API_KEY": "secret"}
    headers = {"GRAFTAGE_HEADERS": '{"x-key": "secret"}', "GRAFTAGE_FAKE_HEADERS": '{"x-key": "secret"}'}
    assert scanned(shell, **keys, **headers)[fake.url]["state"] == "server"
    assert fake.requests
    assert not [seen for seen in fake.requests if "secret" in str(seen.headers)]


def test_provider_that_can_do_more_is_shown(shell: Shell) -> None:
    source = KNOWING + "it = It({without})"
    with FakeOllama() as fake:
        shell.install(source.format(url=f"{fake.url}/v1", without="without=['embed']"), name="a")
        shell.install(source.format(url=fake.url, without=""), name="b")
        found = scanned(shell)
    assert [each["provider"] for each in found.values()] == ["b"]


def test_nothing_found_names_the_ports(shell: Shell, closed: str) -> None:
    shell.install("it = Echo()")
    assert "`pip install graftage-openai`" in shell.run("providers", "--scan").out
    shell.install(SERVERS.format(addresses=(closed,)), name="more")
    out = shell.run("providers", "--scan").out
    assert f"Tried: {closed.removeprefix('http://')}." in out
    assert "--host" in out


def test_other_machines_are_never_asked(shell: Shell, fake: FakeOllama) -> None:
    shell.install(SERVERS.format(addresses=("http://192.0.2.1:11434", fake.url)))
    assert list(scanned(shell)) == [fake.url]


def test_broken_provider_hides_no_server(shell: Shell, fake: FakeOllama) -> None:
    shell.install(SERVERS.format(addresses=(fake.url,)))
    shell.install("raise RuntimeError('out of order')", name="bad")
    shell.install(SERVERS.format(addresses=7), name="odd")
    done = shell.run("providers", "--scan", "--json")
    assert [each["state"] for each in json.loads(done.out)] == ["server"]
    assert "out of order" in done.err
    assert "int" in done.err


def test_names_cannot_control_the_terminal(shell: Shell, fake: FakeOllama) -> None:
    shell.install(KNOWING.format(url=fake.url) + 'it = It(models=["\\x1b[0m\\nb:1"])')
    out = shell.run("providers", "--scan").out
    assert "\x1b" not in out
    (instance,) = tomllib.loads(out[out.index("[instances.") :])["instances"].values()
    assert instance["model"] == "\x1b[0m\nb:1"


def test_invalid_settings_are_wrong_usage(shell: Shell, fake: FakeOllama) -> None:
    shell.install(SERVERS.format(addresses=(fake.url,)))
    (shell.folder / "config.toml").write_text('[instances.work]\nprovider = "nothing"\n')
    done = shell.run("providers", "--scan")
    assert done.code == 2
    assert "There is no provider `nothing`" in done.err


def test_own_address_of_a_provider_has_its_name(shell: Shell, fake: FakeOllama) -> None:
    shell.install(SERVERS.format(addresses=(fake.url,)))
    there = scanned(shell, GRAFTAGE_FAKE_HOST=fake.url)[fake.url]
    assert (there["name"], there["instance"]) == ("fake", None)
