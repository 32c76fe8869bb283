"""A host's own vcrpy cassettes record and replay calls through Graftage."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import vcr  # type: ignore[import-untyped] # it has no types
from network_servers import (
    BASIC,
    HERE,
    SHORT,
    WORDS,
    Authority,
    Proxy,
    Server,
    hang,
    on,
    read_request,
    secured,
)
from test_colours import MODEL

from graftage.exceptions import (
    ConnectionFailed,
    GraftageError,
    ModelNotFound,
    ProtocolError,
    ProviderError,
    ProviderTimeout,
)
from graftage_ollama.testing import FakeOllama

NAME = "smollm2:135m"


def asked(llm: Any) -> tuple[str, list[str], int, int]:
    """Return the results of a chat, a stream, vectors and a list."""
    text = llm.chat("Hello").text
    with llm.chat("Tell me more", stream=True) as stream:
        pieces = [chunk.text for chunk in stream]
    return text, pieces, len(llm.embed(["one", "two"]).vectors), len(llm.models())


class TestRecordAndReplay:
    def test_calls(self, both: Any, tmp_path: Path) -> None:
        path = tmp_path / "a.yaml"
        with FakeOllama() as fake, vcr.use_cassette(str(path), match_on=["method", "uri", "body"]) as cassette:
            url = fake.url
            live = asked(both.connect("ollama", model=NAME, host=url))
        assert len(cassette) == len(fake.requests) == 4
        with vcr.use_cassette(str(path), record_mode=vcr.mode.NONE, match_on=["method", "uri", "body"]) as cassette:
            assert asked(both.connect("ollama", model=NAME, host=url)) == live
            assert cassette.all_played

    def test_open_client_enters_and_leaves(self, both: Any, fake: FakeOllama, tmp_path: Path) -> None:
        llm = both.connect("ollama", model=NAME, host=fake.url)
        before = llm.chat("Hello").text
        for _ in range(2):
            with vcr.use_cassette(str(tmp_path / "a.yaml"), match_on=["method", "uri", "body"]):
                assert llm.chat("Hello").text == before
        assert len(fake.requests) == 2
        assert llm.chat("Hello").text == before
        assert len(fake.requests) == 3

    def test_unknown_request_reaches_no_server(self, both: Any, fake: FakeOllama, tmp_path: Path) -> None:
        llm = both.connect("ollama", model=NAME, host=fake.url, attempts=1)
        with vcr.use_cassette(str(tmp_path / "a.yaml"), record_mode=vcr.mode.NONE), pytest.raises(GraftageError):
            llm.chat("Hello")
        assert fake.requests == []

    def test_refusal(self, both: Any, fake: FakeOllama, tmp_path: Path) -> None:
        for _ in range(2):
            llm = both.connect("ollama", model="nosuch", host=fake.url)
            with vcr.use_cassette(str(tmp_path / "a.yaml")), pytest.raises(ModelNotFound):
                llm.show()
        assert len(fake.requests) == 2  # The refusal, and the list for suggestions.


BROKEN: dict[str, tuple[bytes, type[ProviderError], str]] = {
    "cut": (b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{", ConnectionFailed, "broke"),
    "cut in chunks": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{", ConnectionFailed, "broke"),
    "no HTTP": (b"220 mail.test ESMTP\r\n\r\n", ProtocolError, "does not speak HTTP"),
    "nothing": (b"", ConnectionFailed, "broke"),
}


class TestNetwork:
    @pytest.mark.parametrize(("data", "kind", "words"), BROKEN.values(), ids=BROKEN)
    def test_broken_response_is_typed(
        self, both: Any, tmp_path: Path, data: bytes, kind: type[ProviderError], words: str
    ) -> None:
        def serve(server: Server, connection: socket.socket) -> None:
            read_request(connection)
            connection.sendall(data)

        with Server(serve) as server, vcr.use_cassette(str(tmp_path / "a.yaml")), pytest.raises(kind, match=words):
            both.connect(on(server.url), model=MODEL, attempts=1).models()

    def test_hanging_response_times_out(self, both: Any, tmp_path: Path) -> None:
        with Server(hang) as server, vcr.use_cassette(str(tmp_path / "a.yaml")), pytest.raises(ProviderTimeout):
            both.connect(on(server.url), model=MODEL, attempts=1, timeouts=SHORT).models()

    def test_tunnel_is_recorded_by_server_name(
        self, both: Any, tmp_path: Path, monkeypatch: Any, trusted: Authority
    ) -> None:
        path = str(tmp_path / "a.yaml")
        with Server(secured(trusted.context())) as server, Proxy(server.port) as proxy:
            monkeypatch.setenv("https_proxy", f"http://{WORDS}@{HERE}:{proxy.port}")
            with vcr.use_cassette(path) as cassette:
                assert both.connect(on("https://model.test"), model=MODEL).chat("x").text == "Hello world"
                assert cassette.requests[0].uri == "https://model.test/chat"
            assert BASIC.lower() in proxy.requests[0].lower()
            assert b"proxy-authorization" not in server.requests[0].lower()
        monkeypatch.delenv("https_proxy")
        with vcr.use_cassette(path, record_mode=vcr.mode.NONE):
            assert both.connect(on("https://model.test"), model=MODEL).chat("x").text == "Hello world"
        assert BASIC.decode().partition(" ")[2] not in Path(path).read_text(encoding="utf-8")

    def test_proxied_http_is_recorded(self, both: Any, tmp_path: Path, monkeypatch: Any) -> None:
        with Server() as server, Proxy(server.port) as proxy, vcr.use_cassette(str(tmp_path / "a.yaml")) as cassette:
            monkeypatch.setenv("http_proxy", f"http://{HERE}:{proxy.port}")
            assert both.connect(on("http://model.test"), model=MODEL).chat("x").text == "Hello world"
            assert cassette.requests[0].uri == "http://model.test/chat"
            assert proxy.requests[0].startswith(b"POST http://model.test/chat HTTP/1.1")
