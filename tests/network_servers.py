"""Servers, proxies and certificates for tests of the network, all local; `openssl` makes the certificates."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from giving import Giving
from test_colours import WHOLE, OnToolkit

from graftage.hookspecs import hookimpl
from graftage.http._network import tls_context
from graftage.types import Timeouts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = "127.0.0.1"
SECRET = "s3cr3t-key"
SHORT = Timeouts(connect=0.5, first_token=0.5, idle=0.5, total=1.5)
CALLS = int(os.environ.get("GRAFTAGE_TEST_CALLS", "300"))
SLACK = 3.0
"""Seconds after its limit by which a call must have ended, also on a slow machine."""
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux lists descriptors")
OBJECT = b"HTTP/1.1 200 OK\r\ncontent-length: 17\r\n\r\n" + b'{"models": ["a"]}'
CHUNKS = b"".join(b"%x\r\n%s\r\n" % (len(each), each) for each in WHOLE)
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n" + CHUNKS
STREAM += b"0\r\n\r\n"


def read_request(connection: socket.socket) -> bytes:
    """Read a request with its body; return nothing if the connection has ended."""
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
    """Send what `OnToolkit` requests."""
    connection.sendall(STREAM if b"/chat " in request.split(b"\r\n", 1)[0] else OBJECT)


class Server:
    """A server that calls a function for each connection, in a thread, and keeps `requests`."""

    def __init__(
        self, serve: Callable[[Server, socket.socket], None] | None = None, *, path: Path | None = None
    ) -> None:
        self.requests: list[bytes] = []
        self.accepted = 0
        self.open = 0
        self.stopping = threading.Event()
        self._serve = serve
        self.connections: list[socket.socket] = []
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
                self.connections.append(connection)
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
        for each in (self.listener, *self.connections):
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
        """Return the context of a server with a certificate for some names."""
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
    """Return a function that serves with TLS."""

    def begin(server: Server, connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as wrapped:
            server.connections.append(wrapped)  # It took the socket over, and it is the one to shut down.
            (serve or Server.keep)(server, wrapped)

    return begin


class Proxy(Server):
    """A proxy and its tunnels to one host."""

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
    """A connection with a key."""

    def __init__(self, request: Any, url: str) -> None:
        super().__init__(request, url)
        self.http = request.http(url, headers={"authorization": f"Bearer {SECRET}"})


class Uploading(OnToolkit):
    """A connection that sends a file."""

    def __init__(self, request: Any, url: str, file: Path) -> None:
        super().__init__(request, url)
        self.file = file

    @hookimpl
    async def list_models(self, request: Any) -> Any:
        await self.http.upload("/file", self.file, call=request.call)
        return ()


def stalled_handshake(server: Server, connection: socket.socket) -> None:
    connection.recv(65536)
    server.stopping.wait(20)
