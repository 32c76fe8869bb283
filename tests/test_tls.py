"""TLS: certificates, time limits inside records, broken ends."""

from __future__ import annotations

import socket
import ssl
import time
from typing import Any

import pytest
from network_servers import HERE, OBJECT, SHORT, SLACK, Authority, Server, on, read_request, secured, stalled_handshake
from test_colours import MODEL, OnToolkit

from graftage.exceptions import (
    ConnectionFailed,
    ProtocolError,
    ProviderError,
    ProviderTimeout,
)
from graftage.hookspecs import hookimpl
from graftage.http._network import tls_context
from graftage.types import Timeouts

pytestmark = pytest.mark.slow


def tls_failure(both: Any, server: Server) -> ProviderError:
    llm = both.connect(on(f"https://{HERE}:{server.port}"), model=MODEL, attempts=1, timeouts=SHORT)
    begun = time.monotonic()
    with pytest.raises(ProviderError) as caught:
        llm.chat("x")
    assert time.monotonic() - begun < SHORT.total + SLACK
    assert llm.stats().running == 0
    assert caught.value.hint
    return caught.value


class TestCertificates:
    def test_private_authority_serves_both_clients(self, both: Any, trusted: Authority) -> None:
        with Server(secured(trusted.context())) as server:
            llm = both.connect(on(f"https://{HERE}:{server.port}"), model=MODEL)
            assert llm.chat("x").text == "Hello world"
            assert "".join(chunk.text for chunk in llm.chat("x", stream=True)) == "Hello world"
            assert [each.name for each in llm.models()] == ["a"]
            assert server.accepted == 1

    @pytest.mark.parametrize(
        ("name", "days"), [("DNS:other.test", "2"), ("IP:127.0.0.1", "0")], ids=["name", "expired"]
    )
    def test_wrong_one_is_a_failed_connection(self, both: Any, trusted: Authority, name: str, days: str) -> None:
        with Server(secured(trusted.context(name, days))) as server:
            time.sleep(1.1 if days == "0" else 0)
            error = tls_failure(both, server)
        assert isinstance(error, ConnectionFailed)
        assert (error.details["cause"], error.retryable) == ("tls", False)

    def test_unknown_authority_is_a_failed_connection(self, both: Any, authority: Authority) -> None:
        tls_context.cache_clear()
        with Server(secured(authority.context())) as server:
            error = tls_failure(both, server)
        assert isinstance(error, ConnectionFailed)
        assert error.details["cause"] == "tls"


class TestWrongScheme:
    def test_tls_to_a_plain_port(self, both: Any, trusted: Authority) -> None:
        def plain(server: Server, connection: socket.socket) -> None:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")

        with Server(plain) as server:
            error = tls_failure(both, server)
        assert isinstance(error, ConnectionFailed)
        assert error.details["cause"] == "tls"
        assert "scheme" in str(error)

    def test_plain_http_to_a_tls_port(self, both: Any, trusted: Authority) -> None:
        def alert(server: Server, connection: socket.socket) -> None:  # Like servers with OpenSSL or Go.
            connection.recv(65536)
            connection.sendall(b"\x15\x03\x01\x00\x02\x02\x46")

        with Server(alert) as server:
            llm = both.connect(on(server.url), model=MODEL, attempts=1)
            with pytest.raises(ProtocolError, match=r"does not speak HTTP.*scheme"):
                llm.chat("x")


def dripping_handshake(server: Server, connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"\x16\x03\x03\x40\x00")
    while not server.stopping.wait(0.02):
        connection.sendall(b"\x00")


class TestTimeouts:
    @pytest.mark.parametrize("serve", [stalled_handshake, dripping_handshake])
    def test_endless_handshake(self, both: Any, trusted: Authority, serve: Any) -> None:
        with Server(serve) as server:
            error = tls_failure(both, server)
        assert isinstance(error, ProviderTimeout)
        assert error.phase == "connect"

    def test_bytes_drip_inside_records(self, both: Any, trusted: Authority) -> None:
        def serve(server: Server, connection: socket.socket) -> None:
            read_request(connection)
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            while not server.stopping.wait(0.02):
                connection.sendall(b"a")

        with Server(secured(trusted.context(), serve)) as server:
            error = tls_failure(both, server)
        assert isinstance(error, ProviderTimeout)

    def test_record_drips(self, both: Any, trusted: Authority) -> None:
        """The bytes arrive slowly, and no record is ever complete."""

        def serve(server: Server, connection: socket.socket) -> None:
            inner, outer = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = trusted.context().wrap_bio(inner, outer, server_side=True)
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    connection.sendall(outer.read())
                    inner.write(connection.recv(65536))
            connection.sendall(outer.read())
            connection.recv(65536)
            tls.write(OBJECT + b" " * 4000)
            for each in outer.read()[:-1]:
                if server.stopping.wait(0.02):
                    return
                connection.sendall(bytes([each]))

        with Server(serve) as server:
            error = tls_failure(both, server)
        assert isinstance(error, ProviderTimeout)


class Sending(OnToolkit):
    """A connection that sends a large body."""

    @hookimpl
    async def list_models(self, request: Any) -> Any:
        await self.http.json("POST", "/models", {"text": "x" * (30 << 20)}, call=request.call)
        return ()


class TestLargeBodies:
    @pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
    def test_slow_server_times_out(self, both: Any, trusted: Authority, tls: bool) -> None:
        def slow(server: Server, connection: socket.socket) -> None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 15)
            while not server.stopping.wait(0.02) and connection.recv(16384):
                pass

        with Server(secured(trusted.context(), slow) if tls else slow) as server:
            url = f"https://{HERE}:{server.port}" if tls else server.url
            timeouts = Timeouts(connect=2, first_token=1, idle=1, total=1)
            llm = both.connect(on(url, Sending), model=MODEL, attempts=1, timeouts=timeouts)
            begun = time.monotonic()
            with pytest.raises(ProviderTimeout):
                llm.models()
            assert time.monotonic() - begun < 1 + SLACK

    @pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
    def test_early_close_is_a_failed_connection(self, both: Any, trusted: Authority, tls: bool) -> None:
        def ending(server: Server, connection: socket.socket) -> None:
            connection.recv(16384)

        with Server(secured(trusted.context(), ending) if tls else ending) as server:
            url = f"https://{HERE}:{server.port}" if tls else server.url
            llm = both.connect(on(url, Sending), model=MODEL, attempts=1)
            with pytest.raises(ConnectionFailed):
                llm.models()

    def test_30_mb_arrive_unchanged(self, both: Any) -> None:
        with Server() as server:
            both.connect(on(server.url, Sending), model=MODEL).models()
            head, _, body = server.requests[0].partition(b"\r\n\r\n")
            assert f"content-length: {len(body)}".encode() in head
            assert body == b'{"text":"' + b"x" * (30 << 20) + b'"}'


def test_plain_http_builds_no_tls_context(both: Any) -> None:
    tls_context.cache_clear()
    with Server() as server:
        assert both.connect(on(server.url), model=MODEL).chat("x").text == "Hello world"
    assert tls_context.cache_info().currsize == 0
