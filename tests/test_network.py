"""The network of the toolkit: TLS, proxies, sockets of the file system, forks, cancels, uploads, odd requests.

Every server here is on this machine, certificates are made by `openssl`, and both clients have to do the same.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any, Self

import pytest
import vcr  # type: ignore[import-untyped] # it has no types
from giving import Giving
from test_colours import MODEL, WHOLE, OnToolkit, needs_fork, run, soon

import graftage
from graftage.exceptions import (
    ConnectionFailed,
    GraftageError,
    ProtocolError,
    ProviderError,
    ProviderTimeout,
    RequestRejected,
    SettingsError,
)
from graftage.hookspecs import hookimpl
from graftage.http import is_private, place, proxy_for
from graftage.http._network import tls_context
from graftage.http._server import server_of
from graftage.types import Timeouts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = "127.0.0.1"
SECRET = "s3cr3t-key"
SHORT = Timeouts(connect=0.5, first_token=0.5, idle=0.5, total=1.5)
CALLS = int(os.environ.get("GRAFTAGE_TEST_CALLS", "300"))
SLACK = 3.0
"""Seconds above its limit within which a call must have ended, on a slow machine too."""
OBJECT = b"HTTP/1.1 200 OK\r\ncontent-length: 17\r\n\r\n" + b'{"models": ["a"]}'
CHUNKS = b"".join(b"%x\r\n%s\r\n" % (len(each), each) for each in WHOLE)
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n" + CHUNKS
STREAM += b"0\r\n\r\n"


# --- Servers ---------------------------------------------------------------------------------------------------------


def read_request(connection: socket.socket) -> bytes:
    """A request with its body; nothing where the connection has ended."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := connection.recv(65536)):
            return b""
        data += more
    found = re.search(rb"content-length: (\d+)", data)
    size = data.index(b"\r\n\r\n") + 4 + (int(found[1]) if found else 0)
    pieces = [data]
    got = len(data)
    while got < size and (more := connection.recv(1 << 20)):
        pieces.append(more)
        got += len(more)
    return b"".join(pieces)


def answer(connection: socket.socket, request: bytes) -> None:
    """What `OnToolkit` asks for."""
    connection.sendall(STREAM if b"/chat " in request.split(b"\r\n", 1)[0] else OBJECT)


class Server:
    """Calls a function for each connection, in a thread; what it was asked is in `requests`."""

    def __init__(
        self, serve: Callable[[Server, socket.socket], None] | None = None, *, path: Path | None = None
    ) -> None:
        self.requests: list[bytes] = []
        self.accepted = 0
        self.open = 0
        self.stopping = threading.Event()
        self._serve = serve
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        if path is None:
            self.listener = socket.create_server((HERE, 0))
            self.port = self.listener.getsockname()[1]
        else:
            self.listener = socket.socket(socket.AF_UNIX)
            self.listener.bind(str(path))
            self.listener.listen()

    @property
    def url(self) -> str:
        return f"http://{HERE}:{self.port}"

    def __enter__(self) -> Self:
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()
        return self

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.accepted += 1
                self.open += 1
                self._connections.append(connection)
                thread = threading.Thread(target=self._run, args=(connection,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _run(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            if self._serve is None:
                self.keep(connection)
            else:
                self._serve(self, connection)
        self.open -= 1

    def keep(self, connection: socket.socket) -> None:
        """Answer each request of a connection."""
        while request := read_request(connection):
            self.requests.append(request)
            answer(connection, request)

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for each in (self.listener, *self._connections):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in (self._acceptor, *self._threads):
            thread.join(10)


def on(url: str, connection: type[OnToolkit] = OnToolkit) -> Giving:
    return Giving(lambda request: connection(request, url))


def hang(server: Server, connection: socket.socket) -> None:
    server.stopping.wait(20)


def drip(server: Server, connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\na: ")
    while not server.stopping.wait(0.02):
        connection.sendall(b"0")


def close(server: Server, connection: socket.socket) -> None:
    connection.recv(65536)


def garbage(server: Server, connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"220 mail.test ESMTP\r\n" * 3)


def saying(data: bytes) -> Callable[[Server, socket.socket], None]:
    def serve(server: Server, connection: socket.socket) -> None:
        server.requests.append(read_request(connection))
        connection.sendall(data)
        connection.recv(65536)

    return serve


# --- TLS -------------------------------------------------------------------------------------------------------------


class Authority:
    """A private authority and its certificates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "ca.pem"
        self._openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"
        )
        self._made: dict[tuple[str, str], ssl.SSLContext] = {}

    def _openssl(self, *arguments: str) -> None:
        more = ["-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=Test"] if arguments[0] == "req" else []
        subprocess.run(["openssl", *arguments, *more], cwd=self.folder, check=True, capture_output=True)

    def context(self, name: str = "IP:127.0.0.1,DNS:model.test", days: str = "2") -> ssl.SSLContext:
        """The context of a server with a certificate for some names."""
        if (name, days) not in self._made:
            (self.folder / "san").write_text(f"subjectAltName={name}\n", encoding="utf-8")
            subject = ["-nodes", "-subj", "/CN=x", "-keyout", "k.pem", "-out", "r.pem"]
            curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
            subprocess.run(
                ["openssl", "req", "-new", *curve, *subject], cwd=self.folder, check=True, capture_output=True
            )
            signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "san", "-out", "c.pem"]
            self._openssl("x509", "-req", "-in", "r.pem", *signed, "-days", days)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.folder / "c.pem", self.folder / "k.pem")
            self._made[name, days] = context
        return self._made[name, days]


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def trusted(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[Authority]:
    """The authority, named by SSL_CERT_FILE."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    tls_context.cache_clear()
    yield authority
    tls_context.cache_clear()


def secured(
    context: ssl.SSLContext, serve: Callable[[Server, socket.socket], None] | None = None
) -> Callable[[Server, socket.socket], None]:
    """What serves by TLS."""

    def begin(server: Server, connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as wrapped:
            (serve or Server.keep)(server, wrapped)

    return begin


def test_a_private_authority_serves_both_clients_on_one_connection(both: Any, trusted: Authority) -> None:
    with Server(secured(trusted.context())) as server:
        llm = both.connect(on(f"https://{HERE}:{server.port}"), model=MODEL)
        assert llm.chat("x").text == "Hello world"
        assert "".join(chunk.text for chunk in llm.chat("x", stream=True)) == "Hello world"
        assert [each.name for each in llm.models()] == ["a"]
        assert server.accepted == 1


def tls_failure(both: Any, server: Server) -> ProviderError:
    llm = both.connect(on(f"https://{HERE}:{server.port}"), model=MODEL, attempts=1, timeouts=SHORT)
    begun = time.monotonic()
    with pytest.raises(ProviderError) as caught:
        llm.chat("x")
    assert time.monotonic() - begun < SHORT.total + SLACK
    assert llm.stats().running == 0
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(("name", "days"), [("DNS:other.test", "2"), ("IP:127.0.0.1", "0")], ids=["name", "expired"])
def test_a_wrong_certificate_is_a_connection_that_failed(both: Any, trusted: Authority, name: str, days: str) -> None:
    with Server(secured(trusted.context(name, days))) as server:
        time.sleep(1.1 if days == "0" else 0)
        error = tls_failure(both, server)
    assert isinstance(error, ConnectionFailed)
    assert (error.details["cause"], error.retryable) == ("tls", False)


def test_an_unknown_authority_is_a_connection_that_failed(both: Any, authority: Authority) -> None:
    tls_context.cache_clear()
    with Server(secured(authority.context())) as server:
        error = tls_failure(both, server)
    assert isinstance(error, ConnectionFailed)
    assert error.details["cause"] == "tls"


def test_tls_spoken_to_a_plain_port_is_a_typed_error(both: Any, trusted: Authority) -> None:
    def plain(server: Server, connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")

    with Server(plain) as server:
        error = tls_failure(both, server)
    assert isinstance(error, ConnectionFailed)
    assert error.details["cause"] == "tls"
    assert "scheme" in str(error)


def test_plain_http_to_a_port_of_tls_is_a_typed_error(both: Any, trusted: Authority) -> None:
    def alert(server: Server, connection: socket.socket) -> None:  # As OpenSSL's own servers and Go's answer.
        connection.recv(65536)
        connection.sendall(b"\x15\x03\x01\x00\x02\x02\x46")

    with Server(alert) as server:
        llm = both.connect(on(server.url), model=MODEL, attempts=1)
        with pytest.raises(ProtocolError, match=r"does not speak HTTP.*scheme"):
            llm.chat("x")


def stalled_handshake(server: Server, connection: socket.socket) -> None:
    connection.recv(65536)
    server.stopping.wait(20)


def dripping_handshake(server: Server, connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"\x16\x03\x03\x40\x00")
    while not server.stopping.wait(0.02):
        connection.sendall(b"\x00")


@pytest.mark.parametrize("serve", [stalled_handshake, dripping_handshake])
def test_a_handshake_that_does_not_end_ends_in_time(both: Any, trusted: Authority, serve: Any) -> None:
    with Server(serve) as server:
        error = tls_failure(both, server)
    assert isinstance(error, ProviderTimeout)
    assert error.phase == "connect"


def test_bytes_that_drip_inside_records_end_in_time(both: Any, trusted: Authority) -> None:
    def serve(server: Server, connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while not server.stopping.wait(0.02):
            connection.sendall(b"a")

    with Server(secured(trusted.context(), serve)) as server:
        error = tls_failure(both, server)
    assert isinstance(error, ProviderTimeout)


def test_a_record_that_drips_ends_in_time(both: Any, trusted: Authority) -> None:
    """The bytes on the wire come slowly, and no record is ever whole."""

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
    """Sends a large body."""

    @hookimpl
    async def list_models(self, request: Any) -> Any:
        await self.http.json("POST", "/models", {"text": "x" * (30 << 20)}, call=request.call)
        return ()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_large_body_to_a_slow_server_ends_in_time(both: Any, trusted: Authority, tls: bool) -> None:
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
def test_a_server_that_closes_in_the_middle_of_a_body_is_a_typed_error(
    both: Any, trusted: Authority, tls: bool
) -> None:
    def ending(server: Server, connection: socket.socket) -> None:
        connection.recv(16384)

    with Server(secured(trusted.context(), ending) if tls else ending) as server:
        url = f"https://{HERE}:{server.port}" if tls else server.url
        llm = both.connect(on(url, Sending), model=MODEL, attempts=1)
        with pytest.raises(ConnectionFailed):
            llm.models()


def test_a_body_of_30_mb_arrives_as_it_is(both: Any) -> None:
    with Server() as server:
        both.connect(on(server.url, Sending), model=MODEL).models()
        head, _, body = server.requests[0].partition(b"\r\n\r\n")
        assert f"content-length: {len(body)}".encode() in head
        assert body == b'{"text":"' + b"x" * (30 << 20) + b'"}'


def test_no_context_of_tls_is_built_for_plain_http(both: Any) -> None:
    tls_context.cache_clear()
    with Server() as server:
        assert both.connect(on(server.url), model=MODEL).chat("x").text == "Hello world"
    assert tls_context.cache_info().currsize == 0


# --- Proxies ---------------------------------------------------------------------------------------------------------


class Proxy(Server):
    """A proxy that knows one host, and makes tunnels to it."""

    def __init__(self, target: int, *, secure: ssl.SSLContext | None = None) -> None:
        self.target = target
        super().__init__(secured(secure, self.take) if secure else self.take)

    def take(self, _server: Server, connection: socket.socket) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            if not (more := connection.recv(65536)):
                return
            data += more
        self.requests.append(data)
        with socket.create_connection((HERE, self.target)) as behind:
            if data.startswith(b"CONNECT"):
                connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                behind.sendall(data)
            back = threading.Thread(target=self._pump, args=(behind, connection))
            back.start()
            self._pump(connection, behind, keep=data.startswith(b"CONNECT"))
            back.join()

    def _pump(self, source: socket.socket, sink: socket.socket, *, keep: bool = False) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if keep:
                    self.requests.append(data)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


BASIC = b"proxy-authorization: Basic " + base64.b64encode(b"me:p@ss w\xc3\xb6rd")
WORDS = "me:p%40ss%20w%C3%B6rd"


class WithKey(OnToolkit):
    """Sends a key where it may."""

    def __init__(self, request: Any, url: str) -> None:
        super().__init__(request, url)
        self.http = request.http(url, headers={"authorization": f"Bearer {SECRET}"})


def test_plain_http_goes_through_a_proxy_with_its_whole_url(both: Any, monkeypatch: Any) -> None:
    with Server() as server, Proxy(server.port) as proxy:
        monkeypatch.setenv("http_proxy", f"http://{WORDS}@{HERE}:{proxy.port}")
        llm = both.connect(on("http://model.test", WithKey), model=MODEL)
        assert llm.chat("x").text == "Hello world"
        assert proxy.requests[0].startswith(b"POST http://model.test/chat HTTP/1.1\r\nhost: model.test\r\n")
        assert BASIC in proxy.requests[0]
        assert SECRET.encode() not in proxy.requests[0]


@pytest.mark.parametrize("name", ["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"])
def test_https_goes_through_a_tunnel_and_keeps_the_key_inside(
    both: Any, monkeypatch: Any, trusted: Authority, name: str
) -> None:
    with Server(secured(trusted.context())) as server, Proxy(server.port) as proxy:
        monkeypatch.setenv(name, f"http://{WORDS}@{HERE}:{proxy.port}")
        llm = both.connect(on("https://model.test", WithKey), model=MODEL)
        for _ in range(2):
            assert llm.chat("x").text == "Hello world"
        assert proxy.requests[0].startswith(b"CONNECT model.test:443 HTTP/1.1\r\nhost: model.test:443\r\n")
        assert BASIC in proxy.requests[0]
        assert (proxy.accepted, server.accepted) == (1, 1)
        assert all(SECRET.encode() not in each for each in proxy.requests)
        assert SECRET.encode() in server.requests[0]
        assert b"proxy-authorization" not in server.requests[0]


def test_a_proxy_is_reached_by_tls_for_a_plain_server(both: Any, monkeypatch: Any, trusted: Authority) -> None:
    with Server() as server, Proxy(server.port, secure=trusted.context()) as proxy:
        monkeypatch.setenv("http_proxy", f"https://{HERE}:{proxy.port}")
        assert both.connect(on("http://model.test"), model=MODEL).chat("x").text == "Hello world"
        assert proxy.requests[0].startswith(b"POST http://model.test/chat")


REFUSING: dict[str, tuple[Callable[[Server, socket.socket], None], type[ProviderError]]] = {
    "407": (saying(b"HTTP/1.1 407 Sign in\r\ncontent-length: 0\r\n\r\n"), ConnectionFailed),
    "403": (saying(b"HTTP/1.1 403 No\r\ncontent-length: 2\r\n\r\nno"), ConnectionFailed),
    "502": (saying(b"HTTP/1.1 502 Bad\r\ntransfer-encoding: chunked\r\n\r\n"), ConnectionFailed),
    "hangs": (hang, ProviderTimeout),
    "drips": (drip, ProviderTimeout),
    "closes": (close, ConnectionFailed),
    "garbage": (garbage, ConnectionFailed),
}


@pytest.mark.parametrize(("serve", "kind"), REFUSING.values(), ids=REFUSING)
def test_a_proxy_that_makes_no_tunnel_is_blamed_in_time(
    both: Any, monkeypatch: Any, serve: Any, kind: type[ProviderError]
) -> None:
    with Server(serve) as proxy:
        monkeypatch.setenv("https_proxy", f"http://me:{SECRET}@{HERE}:{proxy.port}")
        llm = both.connect(on("https://model.test"), model=MODEL, attempts=1, timeouts=SHORT)
        begun = time.monotonic()
        with pytest.raises(kind, match=r"(?i)proxy.*model\.test.*NO_PROXY") as caught:
            llm.chat("x")
        assert time.monotonic() - begun < SHORT.total + SLACK
        assert SECRET not in str(caught.value)
        assert "status 0" not in str(caught.value)
        assert soon(lambda: proxy.open == 0 or serve is hang)


@pytest.mark.parametrize("url", ["http://model.test", "https://model.test"])
def test_a_proxy_that_is_not_there_is_blamed(both: Any, monkeypatch: Any, url: str) -> None:
    with socket.create_server((HERE, 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("all_proxy", f"http://me:{SECRET}@{HERE}:{port}")
    llm = both.connect(on(url), model=MODEL, attempts=1)
    with pytest.raises(ConnectionFailed, match=rf"Nothing listens at http://{HERE}:{port}.*NO_PROXY") as caught:
        llm.chat("x")
    assert SECRET not in str(caught.value)


SPARED = [
    ("*", "http://a.test", True),
    ("a.test", "http://a.test", True),
    (".test", "http://a.test", True),
    ("other.test, A.Test", "http://a.test:81", True),
    ("a.test:81", "http://a.test:81", True),
    ("a.test:81", "http://a.test:82", False),
    ("a.test:80", "http://a.test", True),
    ("a.test:443", "https://a.test", True),
    ("b.test", "http://a.test", False),
    ("test", "http://contest", False),
    ("10.0.0.0/8", "http://10.1.2.3:5", True),
    ("10.0.0.0/8", "http://11.1.2.3", False),
    ("fd00::/8", "http://[fd00::1]:80", True),
    ("fd00::1", "http://[fd00::1]", True),
    ("10.0.0.0/8", "http://a.test", False),
    ("", "http://localhost", True),
    ("", "http://127.9.9.9", True),
    ("", "http://[::1]:5", True),
    ("", "http+unix://%2Frun%2Fa.sock", True),
]


@pytest.mark.parametrize(("names", "url", "spared"), SPARED)
def test_no_proxy_is_read_in_every_form(monkeypatch: Any, names: str, url: str, spared: bool) -> None:
    monkeypatch.setenv("all_proxy", "http://proxy.test:1")
    monkeypatch.setenv("http_proxy", "http://proxy.test:1")
    monkeypatch.setenv("no_proxy", names)
    assert (proxy_for(url) is None) is spared


# --- Addresses -------------------------------------------------------------------------------------------------------


def test_a_literal_address_of_ipv6_is_reached(both: Any) -> None:
    if not socket.has_ipv6:
        pytest.skip("this system has no IPv6")
    server = Server()
    server.listener.close()
    try:
        server.listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this system has no IPv6")
    with server:
        port = server.listener.getsockname()[1]
        assert both.connect(on(f"http://[::1]:{port}"), model=MODEL).chat("x").text == "Hello world"
        assert f"host: [::1]:{port}\r\n".encode() in server.requests[0]


def found_as(*addresses: str, port: int) -> Callable[..., Any]:
    real = socket.getaddrinfo

    def look(host: Any, *arguments: Any, **named: Any) -> Any:
        if host in (b"model.test", "model.test"):
            if named.get("flags", 0) & socket.AI_NUMERICHOST:
                raise socket.gaierror
            families = [socket.AF_INET6 if ":" in each else socket.AF_INET for each in addresses]
            return [
                (family, socket.SOCK_STREAM, 6, "", (each, port))
                for family, each in zip(families, addresses, strict=True)
            ]
        return real(host, *arguments, **named)

    return look


def test_the_second_address_is_taken_where_the_first_refuses(both: Any, monkeypatch: Any) -> None:
    with Server() as server:
        monkeypatch.setattr(socket, "getaddrinfo", found_as("127.0.0.2", HERE, port=server.port))
        assert both.connect(on(f"http://model.test:{server.port}"), model=MODEL).chat("x").text == "Hello world"


def full(listener: socket.socket) -> list[socket.socket]:
    """A listener's queue filled up, so that the next one to connect waits for ever."""
    waiting = []
    for _ in range(8):
        each = socket.socket()
        each.setblocking(False)
        each.connect_ex(listener.getsockname())
        waiting.append(each)
    return waiting


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux lets those who connect wait")
def test_the_second_address_is_taken_where_the_first_is_silent(both: Any, monkeypatch: Any) -> None:
    with Server() as server, socket.socket() as silent:
        silent.bind(("127.0.0.2", server.port))
        silent.listen(0)
        waiting = full(silent)
        monkeypatch.setattr(socket, "getaddrinfo", found_as("127.0.0.2", HERE, port=server.port))
        timeouts = Timeouts(connect=1, first_token=5, idle=5, total=10)
        llm = both.connect(on(f"http://model.test:{server.port}"), model=MODEL, attempts=1, timeouts=timeouts)
        assert llm.chat("x").text == "Hello world"
        for each in waiting:
            each.close()


def test_a_name_that_is_nowhere_is_not_asked_for_again(both: Any, monkeypatch: Any) -> None:
    def look(host: Any, *arguments: Any, **named: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look)
    with pytest.raises(ConnectionFailed, match=r"The host name in http://model\.test is not known") as caught:
        both.connect(on("http://model.test"), model=MODEL).chat("x")
    assert (caught.value.details["cause"], caught.value.retryable) == ("dns", False)


def test_a_name_that_is_looked_up_for_ever_ends_in_time(both: Any, monkeypatch: Any) -> None:
    ended = threading.Event()
    real = socket.getaddrinfo

    def look(host: Any, *arguments: Any, **named: Any) -> Any:
        if host != b"model.test":
            return real(host, *arguments, **named)
        if named.get("flags", 0) & socket.AI_NUMERICHOST:
            raise socket.gaierror
        ended.wait(20)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", look)
    begun = time.monotonic()
    llm = both.connect(on("http://model.test"), model=MODEL, attempts=1, timeouts=SHORT)
    with pytest.raises(ProviderTimeout) as caught:
        llm.chat("x")
    assert time.monotonic() - begun < SHORT.total + SLACK
    assert caught.value.phase == "connect"
    ended.set()


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "\u00fc..de", "\u00fc" * 70])
def test_a_host_name_that_is_none_is_a_typed_error(both: Any, monkeypatch: Any, host: str) -> None:
    monkeypatch.undo()  # These are looked up nowhere.
    with pytest.raises(ConnectionFailed) as caught:
        both.connect(on(f"http://{host}"), model=MODEL, attempts=1).chat("x")
    assert caught.value.details["cause"] == "dns"


# --- Sockets of the file system --------------------------------------------------------------------------------------

needs_unix = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="has no sockets of the file system")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose name is short: such a path has at most a hundred characters."""
    path = Path(os.path.realpath("/tmp")) / f"Graft{os.getpid()}-{threading.get_ident()}"
    path.mkdir()
    yield path
    shutil.rmtree(path)


def named(path: Path) -> str:
    return "http+unix://" + str(path).replace("/", "%2F")


@needs_unix
def test_a_socket_of_the_file_system_serves_both_clients(both: Any, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("all_proxy", f"http://{HERE}:1")
    path = folder / "Server.Sock"
    with Server(path=path) as server:
        llm = both.connect(on(f"{named(path)}/v1/", WithKey), model=MODEL)
        assert "".join(chunk.text for chunk in llm.chat("x", stream=True)) == "Hello world"
        assert [each.name for each in llm.models()] == ["a"]
        assert server.requests[0].startswith(b"POST /v1/chat HTTP/1.1\r\nhost: localhost\r\n")
        assert SECRET.encode() in server.requests[0]
        assert server.accepted == 1


@needs_unix
def test_the_setting_host_of_ollama_takes_a_socket(both: Any, folder: Path) -> None:
    lines = b'{"message":{"content":"Hi"},"done":true,"done_reason":"stop"}\n'
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(lines)
    with Server(saying(head + lines), path=folder / "A.sock") as server:
        assert both.connect("ollama", model=MODEL, host=named(folder / "A.sock")).chat("x").text == "Hi"
        assert b"POST /api/chat HTTP/1.1" in server.requests[0]


@needs_unix
def test_a_socket_where_nothing_listens_is_a_typed_error(both: Any, folder: Path) -> None:
    llm = both.connect(on(named(folder / "none")), model=MODEL, attempts=1)
    with pytest.raises(ConnectionFailed, match=r"Nothing listens at http.unix://%2F") as caught:
        llm.chat("x")
    assert caught.value.details["cause"] == "refused"


def test_a_system_without_such_sockets_says_so(both: Any, monkeypatch: Any) -> None:
    monkeypatch.delattr(socket, "AF_UNIX", raising=False)
    with pytest.raises(ConnectionFailed, match="This system has no sockets of the file system") as caught:
        both.connect(on("http+unix://%2Frun%2Fa"), model=MODEL).chat("x")
    assert not caught.value.retryable


@pytest.mark.parametrize("host", ["", "run", "%2F", "%2Fa:80", "me@%2Fa", "%2Fa%00b", "[::1]"])
def test_a_socket_that_is_no_path_is_refused(both: Any, host: str) -> None:
    with pytest.raises(SettingsError):
        both.connect(on(f"http+unix://{host}/v1"), model=MODEL).chat("x")


def test_a_socket_is_private_and_keeps_its_case_in_messages() -> None:
    url = "http+unix://%2Frun%2FServer.sock/v1"
    assert is_private(url)
    assert place(url) == "http+unix://%2Frun%2FServer.sock"
    assert server_of("http+unix://%2Frun%2FServer.sock").path == "/run/Server.sock"


# --- Closing, forks, threads, loops ----------------------------------------------------------------------------------


def silent_body(server: Server, connection: socket.socket) -> None:
    read_request(connection)
    connection.sendall(STREAM[:-60])
    server.stopping.wait(20)


RUNNING: dict[str, Callable[[Server, socket.socket], None]] = {"an answer": hang, "a body": silent_body}


@pytest.mark.parametrize("where", ["an answer", "a body", "a handshake", "a proxy", "a connection"])
def test_closing_wakes_who_waits_at_once(both: Any, monkeypatch: Any, trusted: Authority, where: str) -> None:
    with Server(RUNNING.get(where, stalled_handshake)) as server:
        url, waiting = server.url, []
        if where == "a handshake":
            url = f"https://{HERE}:{server.port}"
        elif where == "a proxy":
            url = "https://model.test"
            monkeypatch.setenv("all_proxy", server.url)
        elif where == "a connection":
            if not Path("/proc/self/fd").exists():
                pytest.skip("only Linux lets those who connect wait")
            silent = socket.socket()
            silent.bind((HERE, 0))
            silent.listen(0)
            waiting = [silent, *full(silent)]
            url = f"http://{HERE}:{silent.getsockname()[1]}"
        llm = both.opened(on(url), model=MODEL)
        call = both.start(llm.chat, "x", timeout=30)
        time.sleep(0.3)
        begun = time.monotonic()
        llm.close()
        with pytest.raises(GraftageError):
            call.result(10)
        assert time.monotonic() - begun < SLACK
        llm.close()
        with pytest.raises(RuntimeError, match="closed"):
            llm.chat("x")
        for each in waiting:
            each.close()


def own_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux lists descriptors")


@needs_proc
def test_a_connection_that_comes_back_after_its_network_has_closed_is_not_kept(both: Any) -> None:
    class Own(OnToolkit):
        @hookimpl
        async def list_models(self, request: Any) -> Any:
            response = await self.http.send(
                self.http._request("GET", "/models", b""), request.call, self.clock(request.call)
            )
            network = self.http._transport
            assert network is not None
            while await response.read():
                pass
            await network.close()
            await response.close()
            return ()

        def clock(self, call: Any) -> Any:
            from graftage.http import Clock

            return Clock(call)

    with Server() as server:
        llm = both.opened(on(server.url, Own), model=MODEL, attempts=1)
        before = own_descriptors()
        llm.models()
        assert soon(lambda: own_descriptors() <= before)


FORKS = """
    import os, sys, graftage
    sys.path[:] = sys.argv[2].split("|")
    from test_network import on, MODEL
    llm = graftage.connect(on(sys.argv[1]), model=MODEL)
    print(llm.chat("x").text)
    sys.stdout.flush()
    children = []
    for number in range(4):
        child = os.fork()
        if not child:
            import threading, gc
            found = []
            threads = [threading.Thread(target=lambda: found.append(llm.chat("x").text)) for _ in range(4)]
            [each.start() for each in threads]
            [each.join() for each in threads]
            gc.collect()
            ok = found == ["Hello world"] * 4
            if number % 2:
                llm.close()
            os._exit(0 if ok else 1)
        children.append(child)
        assert llm.chat("x").text == "Hello world"
    print([os.waitpid(each, 0)[1] for each in children])
    print(llm.chat("x").text)
    llm.close()
"""


def strict(program: str, *arguments: str) -> str:
    """What a program prints, in which a warning is an error."""
    return run(f"import warnings\nwarnings.simplefilter('error', ResourceWarning)\n{dedent(program)}", *arguments)


@needs_fork
def test_a_child_and_its_parent_share_no_connection() -> None:
    with Server() as server:
        found = strict(FORKS, server.url, "|".join(sys.path)).splitlines()
        assert found == ["Hello world", "[0, 0, 0, 0]", "Hello world"]


ENDS = {
    "a sync client": """
        llm = graftage.connect(on(sys.argv[1]), model=MODEL)
        print(llm.chat("x").text)
    """,
    "a sync stream": """
        llm = graftage.connect(on(sys.argv[1]), model=MODEL)
        stream = llm.chat("x", stream=True)
        print(next(stream).text + "world")
    """,
    "an async client": """
        llm = graftage.connect_async(on(sys.argv[1]), model=MODEL)
        async def main():
            print((await llm.chat("x")).text)
        asyncio.run(main())
    """,
    "an async stream": """
        llm = graftage.connect_async(on(sys.argv[1]), model=MODEL)
        async def main():
            global stream
            stream = await llm.chat("x", stream=True)
            print((await anext(stream)).text + "world")
        asyncio.run(main())
    """,
}


@pytest.mark.parametrize("program", ENDS.values(), ids=ENDS)
def test_a_program_may_end_with_its_client_open(program: str) -> None:
    begin = "import asyncio, sys, graftage\nsys.path[:] = sys.argv[2].split('|')\nfrom test_network import on, MODEL\n"
    with Server() as server:
        assert strict(begin + dedent(program), server.url, "|".join(sys.path)) == "Hello world"


@needs_proc
def test_loops_in_turn_and_at_once_share_a_client_and_leave_nothing() -> None:
    async def ask(llm: Any, times: int) -> None:
        for _ in range(times):
            assert (await llm.chat("x")).text == "Hello world"

    with Server() as server:
        llm = graftage.connect_async(on(server.url), model=MODEL)
        asyncio.run(ask(llm, 1))
        before = own_descriptors()
        for _ in range(5):
            asyncio.run(ask(llm, 2))
        faults: list[BaseException] = []

        def work() -> None:
            try:
                for _ in range(5):
                    asyncio.run(ask(llm, 5))
            except BaseException as error:  # noqa: BLE001 - the test fails of it
                faults.append(error)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(60)
        assert faults == []
        assert soon(lambda: server.open == 0)
        asyncio.run(llm.close())
        assert soon(lambda: own_descriptors() <= before)


@pytest.mark.parametrize("repeat", range(3))
def test_32_threads_that_begin_at_once_lose_no_connection(both: Any, repeat: int) -> None:
    with Server() as server:
        llm = both.opened(on(server.url), model=MODEL)
        together = both.together([lambda: llm.chat("x").text] * 32)
        assert together == ["Hello world"] * 32
        assert soon(lambda: server.open <= 20)
        kept, accepted = server.open, server.accepted
        assert both.together([lambda: llm.chat("x").text] * kept) == ["Hello world"] * kept
        assert server.accepted == accepted
        llm.close()
        assert soon(lambda: server.open == 0)


class Foreign:
    """A transport that is none of asyncio's own classes, as those of uvloop are not."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class ForeignLoop(asyncio.SelectorEventLoop):
    async def create_connection(  # type: ignore[override] # it has two kinds of arguments
        self, factory: Any, *arguments: Any, **named: Any
    ) -> Any:
        def make() -> Any:
            protocol = factory()
            made = protocol.connection_made
            protocol.connection_made = lambda transport: made(Foreign(transport))
            return protocol

        return await super().create_connection(make, *arguments, **named)


def test_a_loop_may_have_transports_of_its_own_kind() -> None:
    async def main(url: str) -> None:
        async with graftage.connect_async(on(url), model=MODEL) as llm:
            assert (await llm.chat("x")).text == "Hello world"

    with Server() as server, asyncio.Runner(loop_factory=ForeignLoop) as runner:
        runner.run(main(server.url))


def test_a_loop_that_ended_under_a_stream_is_let_go() -> None:
    async def begin() -> Any:
        stream = await llm.chat("x", stream=True)
        await anext(stream)
        return stream

    with Server(silent_body) as server:
        llm = graftage.connect_async(on(server.url), model=MODEL)
        loops: list[Any] = []
        for _ in range(3):
            loop = asyncio.new_event_loop()
            loops.append(weakref.ref(loop))
            stream = loop.run_until_complete(begin())
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()
            del loop, stream
        assert soon(lambda: sum(each() is not None for each in loops) <= 1)  # A client knows the first one.
        asyncio.run(llm.close())


# --- Cancels, slow readers -------------------------------------------------------------------------------------------


STEPS = {"plain": 150, "tls": 100, "tunnel": 100, "upload": 60}


@needs_proc
@pytest.mark.parametrize("way", STEPS)
def test_a_cancel_at_any_step_leaves_nothing(monkeypatch: Any, trusted: Authority, tmp_path: Path, way: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 200_000)

    async def once(llm: Any) -> None:
        if way == "upload":
            await llm.models()
        async with await llm.chat("x", stream=True) as stream:
            assert "".join([chunk.text async for chunk in stream]) == "Hello world"

    async def main(url: str) -> None:
        provider = Giving(lambda request: Uploading(request, url, file))
        async with graftage.connect_async(provider, model=MODEL, concurrency=1) as llm:
            await once(llm)
            await llm.close()
        before = own_descriptors()
        for step in range(STEPS[way]):
            async with graftage.connect_async(provider, model=MODEL, concurrency=1) as llm:
                for _ in range(2):
                    task = asyncio.create_task(once(llm))
                    for _ in range(step):
                        if task.done():
                            break
                        await asyncio.sleep(0.0005 if step % 3 == 0 else 0)
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task
                    assert llm.stats().running == 0
                if step % 10 == 0:
                    await asyncio.wait_for(once(llm), 10)
        assert await asyncio.to_thread(soon, lambda: own_descriptors() <= before + 1)

    with (
        Server(secured(trusted.context()) if way in ("tls", "tunnel") else None) as server,
        Proxy(server.port) as proxy,
    ):
        if way == "tunnel":
            monkeypatch.setenv("https_proxy", f"http://{HERE}:{proxy.port}")
        url = {"tls": f"https://{HERE}:{server.port}", "tunnel": "https://model.test"}.get(way, server.url)
        complaints: list[Any] = []
        with asyncio.Runner() as runner:
            runner.get_loop().set_exception_handler(lambda _, context: complaints.append(context))
            runner.run(main(url))
        assert complaints == []
        assert soon(lambda: server.open == 0)


class Bytes(OnToolkit):
    """Reads a body as an SDK would, as slowly as it is told."""

    def __init__(self, request: Any, url: str, pause: float) -> None:
        super().__init__(request, url)
        self.pause = pause
        self.size = 0

    @hookimpl
    async def list_models(self, request: Any) -> Any:
        from graftage.http import Request

        response = await self.http._forward(Request(method="GET", url=f"{self.http.base_url}/models"))
        while piece := await response.read():
            if self.size == 0 or self.size < 1 << 20 <= self.size + len(piece):
                await request.call.sleep(self.pause)
            self.size += len(piece)
        await response.close()
        return ()


def test_a_reader_that_is_slow_loses_nothing_and_is_not_late(both: Any) -> None:
    burst = b"x" * (30 << 20)
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(burst)
    made: list[Bytes] = []

    def make(request: Any) -> Bytes:
        made.append(Bytes(request, server.url, 1.0))
        return made[-1]

    with Server(saying(head + burst)) as server:
        timeouts = Timeouts(connect=5, first_token=0.5, idle=0.5, total=60)
        llm = both.opened(Giving(make), model=MODEL, timeouts=timeouts, attempts=1)
        tracemalloc.start()
        llm.models()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert made[0].size == len(burst)
        assert peak < 4 << 20


# --- Uploads ---------------------------------------------------------------------------------------------------------


class Uploading(OnToolkit):
    """Sends a file."""

    def __init__(self, request: Any, url: str, file: Path) -> None:
        super().__init__(request, url)
        self.file = file

    @hookimpl
    async def list_models(self, request: Any) -> Any:
        await self.http.upload("/file", self.file, call=request.call)
        return ()


def uploading(server: Server, file: Path) -> Giving:
    return Giving(lambda request: Uploading(request, server.url, file))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of several MB, no two blocks of which are the same."""
    path = tmp_path / "file"
    path.write_bytes(b"".join(b"%08d" % number for number in range(1 << 20)) + b"end")
    return path


def test_a_file_of_several_mb_arrives_as_it_is(both: Any, file: Path) -> None:
    with Server() as server:
        llm = both.connect(uploading(server, file), model=MODEL)
        llm.models()
        llm.models()
        assert [each.partition(b"\r\n\r\n")[2] == file.read_bytes() for each in server.requests] == [True] * 2
        assert server.accepted == 1


@pytest.mark.parametrize("stays", [False, True], ids=["closes", "stays"])
def test_an_upload_that_is_refused_early_has_the_servers_answer(both: Any, file: Path, stays: bool) -> None:
    def early(server: Server, connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n")
        if stays:
            server.stopping.wait(20)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass

    with Server(early) as server:
        llm = both.connect(
            uploading(server, file),
            model=MODEL,
            attempts=1,
            timeouts=Timeouts(connect=5, first_token=3, idle=3, total=10),
        )
        with pytest.raises(ProviderError) as caught:
            llm.models()
        assert not isinstance(caught.value, ProviderTimeout)
        assert caught.value.status == 413


def test_an_upload_may_take_long_while_it_goes_on(both: Any, tmp_path: Path) -> None:
    def slow(server: Server, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        got = 0
        while got < 8 << 20 and (data := connection.recv(1 << 20)):
            got += len(data)
            time.sleep(0.01)
        connection.sendall(OBJECT)

    path = tmp_path / "file"
    path.write_bytes(b"x" * (8 << 20))
    with Server(slow) as server:
        timeouts = Timeouts(connect=5, first_token=0.7, idle=0.7, total=60)
        begun = time.monotonic()
        both.connect(uploading(server, path), model=MODEL, attempts=1, timeouts=timeouts).models()
        assert time.monotonic() - begun < 60


@needs_proc
def test_a_file_is_closed_at_once_when_its_upload_ends_half_way(both: Any, file: Path) -> None:
    def held() -> list[str]:
        found = []
        for each in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(str(each.readlink()))
        return [each for each in found if each == str(file)]

    with Server(hang) as server:
        llm = both.connect(uploading(server, file), model=MODEL, attempts=1, timeouts=SHORT)
        with pytest.raises(ProviderTimeout) as caught:
            llm.models()
        assert held() == []
        assert caught.value.phase == "first_token"


def test_what_a_file_has_grown_by_is_not_sent(both: Any, file: Path) -> None:
    size = file.stat().st_size

    def growing(server: Server, connection: socket.socket) -> None:
        first = connection.recv(1000)
        with file.open("ab") as more:
            more.write(b"GET /evil HTTP/1.1\r\n\r\n" * 10)
        server.requests.append(first)
        got = len(first) - first.index(b"\r\n\r\n") - 4
        while got < size:
            got += len(connection.recv(65536))
        connection.sendall(OBJECT)
        server.requests.append(b"%d" % (got - size))
        server.keep(connection)

    with Server(growing) as server:
        llm = both.connect(uploading(server, file), model=MODEL, attempts=1)
        llm.models()
        assert llm.chat("x").text == "Hello world"
        assert server.requests[1] == b"0"
        assert b"evil" not in b"".join(server.requests)


def test_a_file_that_shrinks_is_a_typed_error(both: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (16 << 20))

    def shrinking(server: Server, connection: socket.socket) -> None:
        connection.recv(1000)
        os.truncate(path, 100)
        while connection.recv(1 << 20):
            pass

    with Server(shrinking) as server:
        llm = both.connect(uploading(server, path), model=MODEL, attempts=1)
        with pytest.raises(RequestRejected, match="shorter"):
            llm.models()
        assert soon(lambda: server.open == 0)


# --- Requests --------------------------------------------------------------------------------------------------------


class Odd(OnToolkit):
    """Sends what it is told."""

    def __init__(self, request: Any, url: str, headers: dict[str, str], method: str = "GET", path: str = "/m") -> None:
        super().__init__(request, url)
        self.http = request.http(url, headers=headers)
        self.method = method
        self.path = path

    @hookimpl
    async def list_models(self, request: Any) -> Any:
        body = {"text": "\u00e4\u20ac\U0001f600"} if self.method == "POST" else None
        await self.http.json(self.method, self.path, body, call=request.call, empty=True)
        return ()


def odd(server: Server, headers: dict[str, str] | None = None, **how: str) -> Giving:
    return Giving(lambda request: Odd(request, server.url, headers or {}, **how))


@pytest.mark.parametrize("value", [f"{SECRET}\r\nx: y", f"{SECRET}\n", f"{SECRET}\0", f"{SECRET}\ud800"])
@pytest.mark.parametrize("patched", [False, True], ids=["plain", "vcrpy"])
def test_a_header_that_cannot_be_sent_is_refused_without_its_value(
    both: Any, tmp_path: Path, value: str, patched: bool
) -> None:
    cassette = vcr.use_cassette(str(tmp_path / "a.yaml")) if patched else contextlib.nullcontext()
    with Server() as server, cassette:
        llm = both.connect(odd(server, {"x-api-key": value}), model=MODEL)
        with pytest.raises(RequestRejected) as caught:
            llm.models()
        assert SECRET not in str(caught.value)
        assert server.requests == []


def test_a_header_may_hold_any_letter(both: Any) -> None:
    with Server() as server:
        both.connect(odd(server, {"x-name": "J\u00f6rg \u20ac"}), model=MODEL).models()
        assert "x-name: J\u00f6rg \u20ac\r\n".encode() in server.requests[0]


def test_a_host_that_is_given_stands_alone(both: Any) -> None:
    with Server() as server:
        both.connect(odd(server, {"Host": "model.internal"}), model=MODEL).models()
        assert re.findall(rb"(?im)^host: .*$", server.requests[0]) == [b"host: model.internal\r"]


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/a b", "/a%20b"),
        ("/m\u00f6del:1", "/m%C3%B6del:1"),
        ("/a%2Fb", "/a%2Fb"),
        ("/a\r\nx: y", "/a%0D%0Ax:%20y"),
        ("/a?b=c d&e=[1]", "/a?b=c%20d&e=[1]"),
        ("/a\x7f", "/a%7F"),
        ("?a=b", "/?a=b"),
        ("/a#b", "/a"),
    ],
)
def test_odd_characters_of_a_path_are_encoded(both: Any, path: str, target: str) -> None:
    with Server() as server:
        both.connect(odd(server, path=path), model=MODEL).models()
        assert server.requests[0].startswith(f"GET {target} HTTP/1.1\r\n".encode())


@pytest.mark.parametrize("method", ["GET", "DELETE", "HEAD", "POST"])
def test_a_request_says_how_long_its_body_is(both: Any, method: str) -> None:
    def serve(server: Server, connection: socket.socket) -> None:
        while request := read_request(connection):
            server.requests.append(request)
            connection.sendall(OBJECT[:-17] if method == "HEAD" else OBJECT)

    with Server(serve) as server:
        llm = both.connect(odd(server, method=method), model=MODEL)
        llm.models()
        llm.models()
        head, _, body = server.requests[1].partition(b"\r\n\r\n")
        lengths = re.findall(rb"content-length: (\d+)", head)
        assert body == ('{"text":"\u00e4\u20ac\U0001f600"}'.encode() if method == "POST" else b"")
        assert lengths == {"GET": [], "HEAD": [], "DELETE": [b"0"], "POST": [str(len(body)).encode()]}[method]
        assert server.accepted == 1


# --- While vcrpy has patched http.client -----------------------------------------------------------------------------

BROKEN: dict[str, tuple[bytes, type[ProviderError], str]] = {
    "cut": (b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{", ConnectionFailed, "broke"),
    "cut in chunks": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{", ConnectionFailed, "broke"),
    "no HTTP": (b"220 mail.test ESMTP\r\n\r\n", ProtocolError, "does not speak HTTP"),
    "nothing": (b"", ConnectionFailed, "broke"),
}


@pytest.mark.parametrize(("data", "kind", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_answer_is_typed_within_a_cassette(
    both: Any, tmp_path: Path, data: bytes, kind: type[ProviderError], words: str
) -> None:
    def serve(server: Server, connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(data)

    with Server(serve) as server, vcr.use_cassette(str(tmp_path / "a.yaml")), pytest.raises(kind, match=words):
        both.connect(on(server.url), model=MODEL, attempts=1).models()


def test_an_answer_that_hangs_is_late_within_a_cassette(both: Any, tmp_path: Path) -> None:
    with Server(hang) as server, vcr.use_cassette(str(tmp_path / "a.yaml")), pytest.raises(ProviderTimeout):
        both.connect(on(server.url), model=MODEL, attempts=1, timeouts=SHORT).models()


def test_a_cassette_records_https_through_a_tunnel_by_the_servers_name(
    both: Any, tmp_path: Path, monkeypatch: Any, trusted: Authority
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


def test_a_cassette_records_plain_http_through_a_proxy(both: Any, tmp_path: Path, monkeypatch: Any) -> None:
    with Server() as server, Proxy(server.port) as proxy, vcr.use_cassette(str(tmp_path / "a.yaml")) as cassette:
        monkeypatch.setenv("http_proxy", f"http://{HERE}:{proxy.port}")
        assert both.connect(on("http://model.test"), model=MODEL).chat("x").text == "Hello world"
        assert cassette.requests[0].uri == "http://model.test/chat"
        assert proxy.requests[0].startswith(b"POST http://model.test/chat HTTP/1.1")


# --- What is left after many calls -----------------------------------------------------------------------------------


@needs_proc
def test_many_calls_leave_neither_descriptors_nor_memory(both: Any) -> None:
    def some(times: int) -> None:
        for _ in range(times):
            llm.chat("x")

    with Server() as server:
        llm = both.connect(on(server.url), model=MODEL)
        some(100)
        server.requests.clear()
        gc.collect()
        tracemalloc.start()
        some(20)
        server.requests.clear()
        gc.collect()
        before, descriptors = tracemalloc.get_traced_memory()[0], own_descriptors()
        some(CALLS)
        server.requests.clear()
        gc.collect()
        after = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        print(both.mode, "bytes more:", after - before)
        assert own_descriptors() <= descriptors
        assert after - before < 50_000 + CALLS * 5
        assert server.accepted == 1
