"""The network of sync clients: sockets, each read and write of which ends at the limit of the running request."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from typing import TYPE_CHECKING
from weakref import WeakSet

from graftage.http import _patched
from graftage.http._framing import BLOCK, ENOUGH, OK, Framing, ParserError, head_of
from graftage.http._network import (
    KEEPALIVE,
    KEEPALIVE_EXPIRY,
    failed_before_answer,
    tls_context,
    tunnel_failed,
    unanswered,
)
from graftage.http._server import Server, server_of

if TYPE_CHECKING:
    from graftage.http.clock import Clock
    from graftage.http.transport import Colour, Headers, Request, Response

__all__ = ["BlockingNetwork"]


class BlockingNetwork:
    """Connections for sync clients; its coroutines block and never suspend."""

    colour: Colour | None = "sync"

    def __init__(self) -> None:
        self._servers: dict[str, Server] = {}
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._idle: list[_Wire] = []
        self._busy: WeakSet[_Wire] = WeakSet()

    async def send(self, request: Request, clock: Clock) -> Response:
        """Send a request and wait for the head of its answer."""
        if _patched.is_patched():
            return _patched.exchange(request, clock)
        if self._process != os.getpid():
            self._begin()  # Two processes that read from one socket get each other's answers.
        origin = request.origin
        server = self._servers.get(origin)
        if server is None:
            server = self._servers[origin] = server_of(origin)
        head = head_of(request, server)
        wire = self._taken(server) or self._connected(server, clock)
        answer = Framing(bodiless=request.method == "HEAD")
        try:
            _send(wire, head, request, clock)
            while not answer.head and answer.fault is None:
                _receive(wire, answer, clock)
            if not answer.head:
                raise unanswered(answer, clock, request.url)
        except BaseException:
            self._drop(wire)
            raise
        return _Response(self, wire, answer, clock)

    def _taken(self, server: Server) -> _Wire | None:
        """An idle connection to a server that is still good."""
        while True:
            with self._lock:
                wire = next((each for each in reversed(self._idle) if each.server is server), None)
                if wire is None:
                    return None
                self._idle.remove(wire)
                self._busy.add(wire)
            try:
                wire.socket.settimeout(0)
                wire.socket.recv(1)  # What is there, the end or an answer that nobody asked for, belongs to no request.
            except wire.quiet:
                if wire.since + KEEPALIVE_EXPIRY > time.monotonic():
                    return wire
            except OSError:
                pass
            self._drop(wire)

    def _connected(self, server: Server, clock: Clock) -> _Wire:
        wire = _connect(server, clock)
        with self._lock:
            self._busy.add(wire)
        return wire

    def give_back(self, wire: _Wire, *, usable: bool) -> None:
        """Keep a connection for the next request, where it can take one."""
        if not usable:
            self._drop(wire)
            return
        wire.since = time.monotonic()
        with self._lock:
            self._busy.discard(wire)
            self._idle.append(wire)
            spare = self._idle.pop(0) if len(self._idle) > KEEPALIVE else None
        if spare is not None:
            spare.close()

    def _drop(self, wire: _Wire) -> None:
        with self._lock:
            self._busy.discard(wire)
        wire.close()

    async def close(self) -> None:
        """Close every connection; who waits at one of them is woken."""
        with self._lock:
            idle, self._idle, busy = self._idle, [], list(self._busy)
        for wire in idle:
            wire.close()
        for wire in busy:
            wire.wake()


class _Wire:
    """One connection."""

    __slots__ = ("__weakref__", "quiet", "server", "since", "socket")

    def __init__(self, connection: socket.socket, server: Server, quiet: type[Exception]) -> None:
        self.socket = connection
        self.quiet = quiet
        """What it raises where nothing has come."""
        self.server = server
        self.since = 0.0

    def wake(self) -> None:
        """Let another thread that waits for more have the end."""
        with contextlib.suppress(OSError):  # It is closed already.
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.socket.close()


def _send(wire: _Wire, head: bytes, request: Request, clock: Clock) -> None:
    clock.sent()
    connection = wire.socket
    try:
        connection.settimeout(clock.left())
        connection.sendall(head + request.body)
        if request.file is None:
            return
        with request.file.open("rb") as stream:
            while block := stream.read(BLOCK):
                connection.settimeout(clock.left())
                connection.sendall(block)
                clock.enter("first_token")  # It counts from the last block that went out.
    except TimeoutError as error:
        raise clock.expired() from error
    except ConnectionError:
        pass  # It may have answered before it had read all.


def _receive(wire: _Wire, answer: Framing, clock: Clock) -> None:
    left = min(clock.until, clock.deadline) - time.monotonic()
    if left <= 0:
        raise clock.expired()
    try:
        wire.socket.settimeout(left)
        data = wire.socket.recv(BLOCK)
    except TimeoutError as error:
        raise clock.expired() from error
    except OSError as error:
        answer.end(error)
    else:
        if not data:
            answer.end()
            return
        try:
            answer.feed(data)
        except ParserError as error:
            answer.failed(error)
        answer.size += len(data)
        if answer.size > ENOUGH and not answer.head:
            answer.crowded()


def _connect(server: Server, clock: Clock) -> _Wire:
    """A connection: each address of the host is tried within what is left of the limit."""
    try:
        wire = _dialled(server, clock)
        if server.first_tls:
            wire = _with_tls(wire, clock)
        if server.tunnel is not None:
            wire = _through_proxy(wire, server.tunnel, clock)
    except OSError as error:
        raise failed_before_answer(error, clock, server.origin) from error
    return wire


def _dialled(server: Server, clock: Clock) -> _Wire:
    failure: OSError = OSError("the host has no address")
    host, port = server.first[0].encode(), server.first[1]  # For a text, Python would look into IDNA.
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(clock.left())
            connection.connect(address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            connection.close()
            failure = error
        except BaseException:
            connection.close()
            raise
        else:
            return _Wire(connection, server, BlockingIOError)
    raise failure


def _with_tls(wire: _Wire, clock: Clock) -> _Wire:
    import ssl  # noqa: PLC0415 - only TLS needs it

    plain = wire.socket
    host = wire.server.host if wire.server.tls else wire.server.first[0]
    try:
        plain.settimeout(clock.left())
        secured = tls_context().wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise
    return _Wire(secured, wire.server, ssl.SSLWantReadError)


def _through_proxy(wire: _Wire, tunnel: bytes, clock: Clock) -> _Wire:
    answer = Framing(bodiless=True)
    try:
        wire.socket.settimeout(clock.left())
        wire.socket.sendall(tunnel)
        while not answer.head and answer.fault is None:
            _receive(wire, answer, clock)
        if answer.status != OK:
            raise tunnel_failed(answer, wire.server.origin)
    except BaseException:
        wire.close()
        raise
    return _with_tls(wire, clock)


class _Response:
    """An answer whose pieces are read by blocking."""

    def __init__(self, network: BlockingNetwork, wire: _Wire, answer: Framing, clock: Clock) -> None:
        self.status, self.reason = answer.status, answer.reason
        self.headers: Headers = tuple(answer.headers)
        self._network = network
        self._wire: _Wire | None = wire
        self._answer = answer
        self._clock = clock
        self._reading = False

    async def read(self) -> bytes:
        answer, clock, wire = self._answer, self._clock, self._wire
        pieces = answer.pieces
        self._reading = True
        try:
            while not pieces:
                if answer.complete or wire is None:
                    return b""
                if answer.fault is not None:
                    self._give_back()
                    raise answer.interrupted()
                _receive(wire, answer, clock)
        finally:
            self._reading = False
        if not clock.patient:
            clock.phase, clock.until = "idle", time.monotonic() + clock.idle
        data = b"".join(pieces)
        pieces.clear()
        return data

    async def close(self) -> None:
        if self._reading and self._wire is not None:  # In another thread, which then comes here itself.
            self._wire.wake()
        else:
            self._give_back()

    def _give_back(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            if self._answer.complete:
                self._answer.let_go()
            self._network.give_back(wire, usable=self._answer.usable)

    def __del__(self) -> None:
        if self._wire is not None:  # The collector may come here while its thread holds the lock of the network.
            self._wire.close()
