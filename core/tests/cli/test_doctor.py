"""`graftage doctor`."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from graftage_ollama.testing import FakeOllama

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cli.conftest import Shell


def examined(shell: Shell, *arguments: str, code: int = 0, **environment: str) -> dict[str, Any]:
    """Run `doctor`, and return its report with the checks by name."""
    done = shell.run("doctor", "--json", *arguments, **environment)
    assert done.code == code, done
    report: dict[str, Any] = json.loads(done.out)
    report["checks"] = {each["name"]: each for each in report["checks"]}
    assert report["ok"] is (code == 0)
    return report


def states(report: dict[str, Any]) -> dict[str, str]:
    return {name: each["state"] for name, each in report["checks"].items()}


@pytest.fixture
def port() -> Iterator[int]:
    """An open port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    """A closed port of this machine."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        return int(server.getsockname()[1])


def test_goes_all_the_way_to_the_model(shell: Shell, port: int) -> None:
    shell.install(f"it = Echo(models=['small:1b'], strict=True, address='http://127.0.0.1:{port}')")
    report = examined(shell)
    assert states(report) == dict.fromkeys(
        ("settings file", "provider", "settings", "key", "address", "proxy", "name", "port", "server", "model"), "ok"
    )
    assert "version echo" in report["checks"]["server"]["text"]
    assert "fake" in [each["name"] for each in report["plugins"]]


def test_provider_without_network_needs_none(shell: Shell) -> None:
    shell.install("it = Echo()")
    found = states(examined(shell))
    assert {name for name, state in found.items() if state == "skip"} == {"proxy", "name", "port"}


def test_table_shows_what_json_holds(shell: Shell) -> None:
    shell.install("it = Echo()")
    done = shell.run("doctor")
    assert done.code == 0
    assert re.search(
        r"^ok +provider +`fake` from graftage-fake 1\.0 \(environment GRAFTAGE_PROVIDER\)", done.out, re.MULTILINE
    )
    assert re.search(r"^attempts +3 +default", done.out, re.MULTILINE)
    assert re.search(r"^fake +provider ", done.out, re.MULTILINE)


class TestNetwork:
    def test_stops_at_a_closed_port(self, shell: Shell, closed_port: int) -> None:
        shell.install(f"it = Echo(address='http://127.0.0.1:{closed_port}')")
        report = examined(shell, code=1)
        assert [name for name, state in states(report).items() if state != "ok"] == ["port", "server", "model"]
        assert "Is the server running" in report["checks"]["port"]["hint"]
        assert report["checks"]["server"]["text"] == "not checked"

    def test_shows_the_proxy(self, shell: Shell, closed_port: int) -> None:
        shell.install("it = Echo(address='http://192.0.2.1:11434')")  # A documentation address, never connected to.
        report = examined(shell, code=1, HTTP_PROXY=f"http://user:hidden@127.0.0.1:{closed_port}")
        proxy = report["checks"]["proxy"]
        assert proxy["state"] == "note"
        assert proxy["text"] == f"http://127.0.0.1:{closed_port} is used (HTTP_PROXY)"
        assert proxy["hint"] == "Set NO_PROXY=192.0.2.1 to connect directly."
        assert report["checks"]["port"]["hint"].startswith("This is the proxy.")

    def test_proxy_is_not_for_this_machine(self, shell: Shell, port: int) -> None:
        shell.install(f"it = Echo(address='http://127.0.0.1:{port}')")
        proxy = examined(shell, HTTP_PROXY="http://proxy.invalid:3128")["checks"]["proxy"]
        assert (proxy["state"], proxy["text"]) == ("ok", "none applies, though HTTP_PROXY is set")

    def test_explains_an_address_to_listen_on(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        address = examined(shell, "--host", "0.0.0.0:11434")["checks"]["address"]
        assert address["state"] == "note"
        assert "(command line)" in address["text"]
        assert address["hint"].startswith("`0.0.0.0:11434` is an address to listen on.")


def test_masks_secrets_and_shows_origins(shell: Shell) -> None:
    shell.install("it = Echo()")
    (shell.folder / "config.toml").write_text('attempts = 2\nhost = "http://me:hidden@x"\n[headers]\nauth = "hidden"\n')
    done = shell.run("doctor", "--json", GRAFTAGE_API_KEY="hidden-key")
    assert "hidden" not in done.out + done.err
    settings = {each["name"]: each for each in json.loads(done.out)["settings"]}
    assert settings["api_key"]["origin"] == "environment GRAFTAGE_API_KEY"
    assert settings["attempts"] == {"name": "attempts", "value": "2", "origin": str(shell.folder / "config.toml")}
    assert settings["headers"]["value"] == "auth: **********"
    assert settings["host"]["value"] == "http://x"
    assert settings["keep_alive"]["origin"] == "default"


def test_says_how_to_get_a_model(shell: Shell) -> None:
    shell.install("it = Echo(models=['other:1b'], strict=True)")
    model = examined(shell, "-m", "nope:1b", code=1)["checks"]["model"]
    assert model["state"] == "fail"
    assert "`graftage models pull nope:1b`" in model["hint"]


def test_needs_no_model(shell: Shell) -> None:
    shell.install("it = Echo()")
    assert examined(shell, GRAFTAGE_MODEL="")["checks"]["model"]["state"] == "note"


def test_shows_why_a_server_is_unhealthy(shell: Shell) -> None:
    shell.install(
        "it = Echo(errors={'health': ProtocolError('That is \\x1b another service.', hint='Check the port.')})"
    )
    done = shell.run("doctor")
    assert done.code == 1
    assert re.search(r"^fail server +That is \\x1b another service\. *\n +Check the port\.", done.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("environment", "file", "check"),
    [({"GRAFTAGE_HOTS": "x"}, "", "settings"), ({}, "model = ", "settings file"), ({}, "hots = 1", "settings")],
)
def test_wrong_settings_have_exit_code_2(shell: Shell, environment: dict[str, str], file: str, check: str) -> None:
    shell.install("it = Echo()")
    (shell.folder / "config.toml").write_text(file)
    assert states(examined(shell, code=2, **environment))[check] == "fail"


@pytest.mark.parametrize(
    ("source", "problem"),
    [("raise RuntimeError('out of order')", "out of order"), ("it = object()", "implements no hook")],
)
def test_survives_a_broken_provider(shell: Shell, source: str, problem: str) -> None:
    shell.install(source)
    report = examined(shell, code=1)
    assert problem in report["checks"]["provider"]["text"]
    assert {each["name"]: each["state"] for each in report["plugins"]}["fake"] == "quarantined"


def test_container_is_another_machine(shell: Shell, closed_port: int) -> None:
    shell.install(f"it = Echo(address='http://localhost:{closed_port}')")
    hint = examined(shell, code=1)["checks"]["port"]["hint"]
    inside = Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()
    assert ("`host.docker.internal`" in hint) is inside


DEFAULT = """
class Own(Echo):
    @hookimpl
    def connect(self, request):
        connection = super().connect(request)
        connection.default_model = "own:1b"
        return connection

it = Own(models=["other:1b"], strict=True)
"""


def test_downloadable_model_is_fine(shell: Shell) -> None:
    shell.install(DEFAULT)
    model = examined(shell, GRAFTAGE_MODEL="")["checks"]["model"]
    assert (model["state"], model["text"]) == ("note", "`own:1b` is not downloaded yet")
    assert examined(shell, GRAFTAGE_MODEL="own:1b", code=1)["checks"]["model"]["state"] == "fail"


def test_names_the_origin_of_a_default_model(shell: Shell) -> None:
    shell.install(DEFAULT.replace("other:1b", "own:1b"))
    text = "`own:1b` is available"
    assert examined(shell, GRAFTAGE_MODEL="")["checks"]["model"]["text"] == f"{text} (the provider's own default)"
    named = examined(shell, "-m", "own:1b", GRAFTAGE_MODEL="")["checks"]["model"]
    assert named["text"] == f"{text} (command line)"
    assert examined(shell, GRAFTAGE_MODEL="own:1b")["checks"]["model"]["text"] == f"{text} (environment GRAFTAGE_MODEL)"


def test_checks_the_server_that_would_answer(shell: Shell) -> None:
    with FakeOllama() as server:
        report = examined(shell, GRAFTAGE_PROVIDER="", GRAFTAGE_MODEL="", OLLAMA_HOST=server.url)
    assert report["checks"]["provider"]["text"].startswith("`ollama` ")
    assert report["checks"]["model"]["text"] == "`smollm2:135m` is available (the one in use there)"


def test_checks_embedded_if_no_server_answers(shell: Shell, closed_port: int) -> None:
    auto = {"GRAFTAGE_PROVIDER": "", "GRAFTAGE_MODEL": "", "OLLAMA_HOST": f"127.0.0.1:{closed_port}"}
    report = json.loads(shell.run("doctor", "--json", **auto).out)
    provider = next(each for each in report["checks"] if each["name"] == "provider")
    assert (provider["state"], provider["text"].split()[0]) == ("note", "`llamacpp`")
    assert "`graftage doctor ollama`" in provider["hint"]
    assert states(examined(shell, "-p", "ollama", code=1, **auto))["port"] == "fail"


class TestName:
    FILE = '[instances.work]\nprovider = "fake"\nmodel = "mine:1b"\napi_key_from = "KEY"\n'

    @pytest.fixture(autouse=True)
    def _instance(self, shell: Shell) -> None:
        shell.install("it = Echo(models=['mine:1b', 'other:1b'], strict=True)")
        key = shell.folder / "key"
        key.write_text("hidden")
        key.chmod(0o600)
        (shell.folder / "config.toml").write_text(self.FILE.replace("KEY", str(key)))

    def test_instance_is_examined(self, shell: Shell) -> None:
        report = examined(shell, "work", GRAFTAGE_MODEL="")
        checks = report["checks"]
        assert checks["provider"]["text"].startswith("`work` in ")
        assert "`fake` from graftage-fake 1.0" in checks["provider"]["text"]
        assert str(shell.folder / "key") in checks["key"]["text"]
        assert checks["model"]["text"].startswith("`mine:1b` is available")
        assert "hidden" not in json.dumps(report)

    def test_name_may_have_a_model(self, shell: Shell) -> None:
        for arguments in (["work:other:1b"], ["-m", "work:other:1b"], ["work", "-m", "other:1b"]):
            checks = examined(shell, *arguments)["checks"]
            assert "`other:1b` is available" in checks["model"]["text"]
            assert checks["provider"]["text"].startswith("`work` in ")

    def test_provider_is_examined_by_name(self, shell: Shell) -> None:
        checks = examined(shell, "fake", "-m", "other:1b", GRAFTAGE_PROVIDER="ollama")["checks"]
        assert checks["provider"]["text"] == "`fake` from graftage-fake 1.0 (command line)"
        assert checks["key"]["text"] == "none is set"

    def test_missing_key_is_explained(self, shell: Shell) -> None:
        (shell.folder / "key").unlink()
        report = examined(shell, "work", code=2)
        failed = next(each for each in report["checks"].values() if each["state"] == "fail")
        assert "GRAFTAGE_WORK_API_KEY" in failed["hint"]

    def test_unknown_name_gets_the_nearest(self, shell: Shell) -> None:
        provider = examined(shell, "wrok", code=1)["checks"]["provider"]
        assert (provider["state"], provider["text"]) == ("fail", "There is no provider `wrok`.")
        assert "`work`" in provider["hint"]

    def test_two_names_are_refused(self, shell: Shell) -> None:
        done = shell.run("doctor", "work", "-p", "fake")
        assert (done.code, done.out) == (2, "")
        assert "`work` and `-p fake`" in done.err
