"""Keys and prompts reach only their server: no key in clear text elsewhere, no local prompt through a proxy."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from giving import Giving

from graftage.exceptions import GraftageError
from graftage.hookspecs import hookimpl
from graftage.types import Chunk, Verdict
from graftage_ollama.testing import FakeOllama

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from graftage.http import Clock, Request, Response, Transport

MODEL = "smollm2:135m"
KEY = "opaque-key-1"


class Detour:
    """A transport that sends every request to the fake server, in place of a remote host."""

    def __init__(self, fake: FakeOllama) -> None:
        self._url = fake.url

    def wrap(self, network: Callable[[], Transport]) -> Led:
        return Led(self._url, network())


class Led:
    def __init__(self, url: str, network: Transport) -> None:
        self.colour = network.colour
        self._url, self._network = url, network

    async def send(self, request: Request, clock: Clock) -> Response:
        return await self._network.send(replace(request, url=self._url + request.target), clock)

    async def close(self) -> None:
        await self._network.close()


REMOTE = [
    "http://models.example",
    "models.example:11434",
    "192.168.1.20",
    "http://10.0.0.1",
    "[2001:db8::7]",
    "[::ffff:192.0.2.1]",
    "localhost.example",
    "127.0.0.1.example",
    "notlocalhost",
]
TRUSTED = [
    "https://models.example",
    "HTTPS://192.168.1.20:8443",
    "https://127.0.0.1",
    None,
    "localhost",
    "LOCALHOST:8080",
    "localhost.",
    "127.0.0.1",
    "127.1.2.3:11434",
    "0.0.0.0",
    "[::1]",
    "[::ffff:127.0.0.1]",
]
SECRETS = [
    "Authorization",
    "Proxy-Authorization",
    "Cookie",
    "X-Api-Key",
    "api-key",
    "apikey",
    "X-Goog-Api-Key",
    "Ocp-Apim-Subscription-Key",
    "X-Auth-Token",
    "X-Access-Token",
    "CF-Access-Client-Secret",
    "X-Amz-Credential",
    "X-Password",
    "X-Session-Id",
]


def carried(fake: FakeOllama) -> set[str]:
    """Return the names of all headers with a key."""
    return {name for seen in fake.requests for name, value in seen.headers.items() if KEY in value}


def ask_everything(llm: Any, adapter: str) -> None:
    llm.chat("Hi")
    list(llm.chat("Hi", stream=True))
    llm.generate("Hi")
    llm.embed("Hi")
    llm.health("answers")
    llm.models()
    llm.show()
    llm.loaded()
    llm.load()
    llm.unload()
    llm.pull("other:1b")
    llm.use_adapter(adapter)


class Ahoy:
    """An adapter, and the plugin that finds it."""

    name, digest, scale, served_as = "ahoy", "sha256:" + "a" * 64, 1.0, None
    verdict = Verdict(status="compatible")

    def __init__(self, file: Path) -> None:
        self._file = file
        key, value = b"general.type", b"adapter"
        text = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value
        file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text)

    @hookimpl
    def resolve_adapter(self, request: Any) -> Any:
        return self

    def gguf(self, base: Any) -> Path:
        return self._file

    def merge(self, base_file: Path, out: Path, on_progress: Any = None) -> Path:
        raise NotImplementedError


class TestKey:
    """A key is sent over HTTPS, or in plain HTTP to this machine alone."""

    @pytest.mark.parametrize("given", ["argument", "OLLAMA_API_KEY", "GRAFTAGE_API_KEY"])
    def test_of_the_settings(self, both: Any, fake: FakeOllama, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
        settings = {"api_key": KEY} if given == "argument" else {}
        if not settings:
            monkeypatch.setenv(given, KEY)
        for host in (*REMOTE, *TRUSTED):
            llm = both.connect("ollama", model=MODEL, host=host, transport=Detour(fake), **settings)
            llm.chat("Hi")
            llm.pull("other:1b")
            sent = [f"Bearer {KEY}" if host in TRUSTED else None] * 2
            assert (host, [seen.headers.get("authorization") for seen in fake.requests]) == (host, sent)
            assert carried(fake) == ({"authorization"} if host in TRUSTED else set())
            fake.requests.clear()

    @pytest.mark.parametrize("host", ["http://models.example", "https://models.example", "localhost"])
    def test_in_every_kind_of_request(
        self, both: Any, fake: FakeOllama, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str
    ) -> None:
        monkeypatch.setenv("OLLAMA_API_KEY", KEY)
        plugin = Ahoy(tmp_path / "ahoy.gguf")
        settings = {"model": MODEL, "host": host, "headers": {"X-Api-Key": KEY, "X-Team": "green"}, "plugins": [plugin]}
        ask_everything(both.connect("ollama", transport=Detour(fake), **settings), "ahoy")
        paths = {seen.path.rpartition("/sha256")[0] or seen.path for seen in fake.requests}
        asked = {"chat", "generate", "embed", "version", "tags", "show", "ps", "pull", "create", "blobs"}
        assert {f"/api/{each}" for each in asked} <= paths
        sent = set() if host.startswith("http:") else {"authorization", "x-api-key"}
        for seen in fake.requests:
            assert {name for name, value in seen.headers.items() if KEY in value} == sent, seen.path
            assert seen.headers["x-team"] == "green"

    @pytest.mark.parametrize("own", [{}, {"api_key": "another-key"}])
    def test_in_the_official_client(
        self, both: Any, fake: FakeOllama, monkeypatch: pytest.MonkeyPatch, own: dict[str, str]
    ) -> None:
        monkeypatch.setenv("OLLAMA_API_KEY", KEY)
        for host in (*REMOTE, *TRUSTED):
            llm = both.connect("ollama", host=host, transport=Detour(fake), **own)
            official = both.native(llm)
            official.list()
            list(official.chat(MODEL, [{"role": "user", "content": "Hi"}], stream=True))
            sent = [f"Bearer {own.get('api_key', KEY)}" if host in TRUSTED else None] * 2
            assert (host, [seen.headers.get("authorization") for seen in fake.requests]) == (host, sent)
            fake.requests.clear()


class Own:
    """A connection that passes its own headers to the toolkit."""

    def __init__(self, url: str, headers: dict[str, str], request: Any) -> None:
        self._http = request.http(url, headers=headers)

    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        await self._http.json("GET", "/api/version", call=request.call)
        yield Chunk(finish_reason="stop")


class TestSecretHeaders:
    """A header with the name of a secret is sent as a key is."""

    @pytest.mark.parametrize("name", SECRETS)
    def test_from_the_settings(self, both: Any, fake: FakeOllama, name: str) -> None:
        for host, sent in [("http://models.example", set()), ("https://models.example", {name.lower()})]:
            llm = both.connect("ollama", model=MODEL, host=host, transport=Detour(fake), headers={name: KEY})
            llm.chat("Hi")
            llm.pull("other:1b")
            assert (host, carried(fake)) == (host, sent)
            fake.requests.clear()

    @pytest.mark.parametrize("name", SECRETS)
    def test_from_a_provider_in_any_spelling(self, both: Any, fake: FakeOllama, name: str) -> None:
        for spelt in (name, name.upper(), name.lower()):
            for host, sent in [("http://models.example", set()), ("https://models.example", {name.lower()})]:
                provider = Giving(partial(Own, host, {spelt: KEY}))
                both.connect(provider, model=MODEL, transport=Detour(fake)).chat("Hi")
                assert (spelt, host, carried(fake)) == (spelt, host, sent)
                fake.requests.clear()


def test_header_may_hold_other_than_ascii(both: Any, fake: FakeOllama) -> None:
    both.connect("ollama", model=MODEL, host=fake.url, headers={"X-Team": "grün"}).chat("Hi")
    assert fake.requests[0].headers["x-team"].encode("latin-1").decode() == "grün"


VARIABLES = ["HTTP_PROXY", "http_proxy", "Http_Proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY", "https_proxy"]


def schemes(variable: str) -> list[str]:
    return {"http_proxy": ["http"], "https_proxy": ["https"]}.get(variable.lower(), ["http", "https"])


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[FakeOllama]:
    with FakeOllama() as server:
        monkeypatch.setenv(request.param, server.url)
        yield server


class TestProxies:
    @pytest.mark.parametrize(
        ("variable", "proxy"), [(each, each) for each in VARIABLES], indirect=["proxy"], ids=VARIABLES
    )
    def test_are_not_used_for_this_machine(self, both: Any, fake: FakeOllama, proxy: FakeOllama, variable: str) -> None:
        port = urlsplit(fake.url).port
        hosts = [
            "127.0.0.1",
            "localhost",
            "LocalHost",
            "localhost.",
            "127.1.2.3",
            "0.0.0.0",
            "[::1]",
            "[::ffff:127.0.0.1]",
        ]
        for scheme in schemes(variable):
            for host in hosts:
                llm = both.connect("ollama", model=MODEL, host=f"{scheme}://{host}:{port}", attempts=1)
                # The fake has no TLS and listens only at 127.0.0.1, so some calls fail, but none may use the proxy.
                with contextlib.suppress(GraftageError):
                    llm.chat("Hi")
                assert (host, proxy.accepted) == (host, 0)
        if "http" in schemes(variable):
            assert [seen.path for seen in fake.requests][:1] == ["/api/chat"]
            both.native(both.connect("ollama", host=fake.url)).list()
            assert proxy.accepted == 0

    @pytest.mark.parametrize(
        ("variable", "proxy"), [(each, each) for each in VARIABLES], indirect=["proxy"], ids=VARIABLES
    )
    def test_are_used_for_other_machines(self, both: Any, proxy: FakeOllama, variable: str) -> None:
        for scheme in schemes(variable):
            before = proxy.accepted
            # The fake is not a real proxy.
            with pytest.raises(GraftageError):
                both.connect("ollama", model=MODEL, host=f"{scheme}://models.example", attempts=1).chat("Hi")
            assert proxy.accepted > before
