"""The network of sync clients: sockets whose reads and writes end at the limits of the request."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from graftage._engine.threads import submit
from graftage.exceptions import ProviderTimeout
from graftage.http import _patched
from graftage.http._framing import BLOCK, BUFFER_LIMIT, OK, Framing, ParserError, block_of, head_of, size_of
from graftage.http._network import (
    IDLE_SECONDS,
    MAX_IDLE,
    Addresses,
    closed_error,
    connect_error,
    has_response,
    is_stale,
    known_addresses,
    no_response_error,
    tls_context,
    tunnel_error,
)
from graftage.http._server import Server, server_of

if TYPE_CHECKING:
    from graftage.http.clock import Clock
    from graftage.http.transport import Colour, Headers, Request, Response

__all__ = ["BlockingNetwork"]

PEEK_AFTER = 0.2
"""Seconds for which a server takes no bytes, before we look whether it has answered early."""


class BlockingNetwork:
    """Connections for sync clients; its coroutines block and never suspend."""

    colour: Colour | None = "sync"

    def __init__(self) -> None:
        self._servers: dict[str, Server] = {}
        self._closed = False
        self._idle: list[_Wire] = []
        self._reset()

    def _reset(self) -> None:
        idle, self._idle = self._idle, []
        self._lock = threading.Lock()  # At the fork another thread may have held the old one.
        self._busy: WeakSet[_Wire] = WeakSet()
        self._process = os.getpid()
        for wire in idle:
            wire.close()

    async def send(self, request: Request, clock: Clock) -> Response:
        """Send a request and wait for the head of its response."""
        if self._process != os.getpid():
            self._reset()  # Two processes on one socket would get each other's responses.
        origin = request.origin
        server = self._servers.get(origin) or self._servers.setdefault(origin, server_of(origin))
        if _patched.is_patched(server):
            return _patched.exchange(request, server, clock)
        size = size_of(request)
        head = head_of(request, server, size)
        kept, begun = self._take_idle(server), time.monotonic()
        while True:
            wire = kept or self._new_connection(server, clock)
            framing = Framing(bodiless=request.method == "HEAD")
            try:
                _send(wire, head, request, size, clock)
                while not framing.head and framing.fault is None:
                    _receive(wire, framing, clock)
            except BaseException:
                self.give_back(wire, usable=False)
                raise
            if has_response(framing, server):
                return _Response(self, wire, framing, clock)
            self.give_back(wire, usable=False)
            if kept is None or self._closed or not is_stale(framing, begun):
                raise no_response_error(framing, clock, server)
            kept = None

    def _take_idle(self, server: Server) -> _Wire | None:
        """Return an idle connection to a server, or None."""
        while True:
            with self._lock:
                wire = next((each for each in reversed(self._idle) if each.server is server), None)
                if wire is None:
                    return None
                self._idle.remove(wire)
                self._busy.add(wire)
            try:
                wire.socket.settimeout(0)
                wire.socket.recv(1)  # Any byte, or the end, means that the connection is of no use.
            except wire.empty_error:
                if wire.since + IDLE_SECONDS > time.monotonic():
                    return wire
            except OSError:
                pass
            self.give_back(wire, usable=False)

    def _new_connection(self, server: Server, clock: Clock) -> _Wire:
        """Return a new connection."""
        clock.enter("connect")
        wire = _Wire(server)
        with self._lock:
            self._busy.add(wire)  # First, so that `close` can wake this call while it connects.
        try:
            _connect(wire, clock)
            if self._closed:
                raise closed_error()
        except BaseException as error:
            self.give_back(wire, usable=False)
            if not isinstance(error, (OSError, ProviderTimeout)):
                raise
            failure = closed_error() if self._closed else connect_error(error, clock, server)
            if failure is error:
                raise
            raise failure from error
        return wire

    def give_back(self, wire: _Wire, *, usable: bool) -> None:
        """Keep a connection for the next request if it can take one, else close it."""
        wire.since = time.monotonic()
        spare: _Wire | None = wire
        with self._lock:
            self._busy.discard(wire)
            if usable and not self._closed:
                self._idle.append(wire)
                spare = self._idle.pop(0) if len(self._idle) > MAX_IDLE else None
        if spare is not None:
            spare.close()

    async def close(self) -> None:
        """Close every connection and wake the calls that wait for one."""
        with self._lock:
            self._closed = True
            idle, self._idle, busy = self._idle, [], list(self._busy)
        for wire in idle:
            wire.close()
        for wire in busy:
            wire.wake()


class _Wire:
    """One connection."""

    __slots__ = ("__weakref__", "empty_error", "server", "since", "socket")

    def __init__(self, server: Server) -> None:
        self.socket: Any = None
        """None until the connection is being made."""
        self.empty_error: type[Exception] = BlockingIOError
        """What it raises if there is nothing to read."""
        self.server = server
        self.since = 0.0

    def answered(self) -> bool:
        """Whether the server has sent something. With TLS, the bytes may be about TLS alone, so this is False."""
        if self.empty_error is not BlockingIOError:
            return False
        self.socket.settimeout(0)
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:  # Reading will raise it again.
            pass
        return True

    def wake(self) -> None:
        """End a wait in another thread."""
        # The socket may be closed already, or not exist yet. `SSLSocket.shutdown` would first remove TLS, and another
        # thread might then send in clear text.
        with contextlib.suppress(OSError, TypeError):
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()

    __del__ = close  # For a response that is dropped, or a client that is open when the program ends.


def _send(wire: _Wire, head: bytes, request: Request, size: int, clock: Clock) -> None:
    clock.sent()
    file = request.file
    first = (head + request.body,) if file is None else (head,)
    more = () if file is None else (block_of(file, start, size) for start in range(0, size, BLOCK))
    for block in chain(first, more):
        rest = memoryview(block)
        while rest:  # Not `sendall`: with TLS it would restart the limit for each record.
            try:
                wire.socket.settimeout(min(clock.left(), PEEK_AFTER))
                rest = rest[wire.socket.send(rest) :]
            except TimeoutError:
                if wire.answered():
                    return
            except OSError:  # The server may have answered early; reading shows it, or raises the error again.
                return
        if file is not None:
            clock.enter("first_token")  # The time counts from the last block sent.


def _receive(wire: _Wire, framing: Framing, clock: Clock) -> None:
    left = min(clock.until, clock.deadline) - time.monotonic()
    if left <= 0:
        raise clock.expired()
    try:
        wire.socket.settimeout(left)
        data = wire.socket.recv(BLOCK)
    except TimeoutError as error:
        raise clock.expired() from error
    except OSError as error:
        framing.end(error)
    else:
        if not data:
            framing.end()
            return
        try:
            framing.feed(data)
        except ParserError as error:
            framing.failed(error)
        framing.size += len(data)
        if framing.size > BUFFER_LIMIT and not framing.head:
            framing.is_full()


def _connect(wire: _Wire, clock: Clock) -> None:
    server = wire.server
    _dial(wire, clock)
    if server.tls:
        _begin_tls(wire, server.first[0], clock)
    if server.tunnel is not None:
        _through_proxy(wire, server.tunnel, clock)
        _begin_tls(wire, server.host, clock)


def _dial(wire: _Wire, clock: Clock) -> None:
    """Try each address of the host; each gets its share of the remaining time."""
    failure: OSError = OSError("the host has no address")
    found = known_addresses(wire.server) or _look_up(wire.server.first, clock)
    for position, (family, kind, protocol, _, address) in enumerate(found):
        wire.socket = socket.socket(family, kind, protocol)
        try:
            wire.socket.settimeout(clock.left() / (len(found) - position))
            wire.socket.connect(address)
            if wire.server.path is None:
                wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            wire.socket.close()
            failure = error
        else:
            return
    raise failure


def _look_up(first: tuple[str, int], clock: Clock) -> Addresses:
    """Look up a name in a thread, since the system's lookup has no time limit."""
    look = partial(socket.getaddrinfo, first[0].encode(), first[1], type=socket.SOCK_STREAM)
    return submit(look).result(clock.left())


def _begin_tls(wire: _Wire, host: str, clock: Clock) -> None:
    import ssl

    wire.socket.settimeout(clock.left())
    wire.socket = secured = tls_context().wrap_socket(wire.socket, server_hostname=host, do_handshake_on_connect=False)
    wire.empty_error = ssl.SSLWantReadError
    secured.do_handshake()


def _through_proxy(wire: _Wire, tunnel: bytes, clock: Clock) -> None:
    framing = Framing(bodiless=True)
    wire.socket.settimeout(clock.left())
    wire.socket.sendall(tunnel)
    while not framing.head and framing.fault is None:
        _receive(wire, framing, clock)
    framing.release()
    if framing.status != OK:
        raise tunnel_error(framing, wire.server)


class _Response:
    """A response whose pieces are read by blocking."""

    def __init__(self, network: BlockingNetwork, wire: _Wire, framing: Framing, clock: Clock) -> None:
        self.status, self.reason = framing.status, framing.reason
        self.headers: Headers = tuple(framing.headers)
        self._network = network
        self._wire: _Wire | None = wire
        self._framing = framing
        self._clock = clock
        self._reading = False

    async def read(self) -> bytes:
        framing, clock, wire = self._framing, self._clock, self._wire
        pieces = framing.pieces
        if not clock.patient:
            clock.read()
        self._reading = True
        try:
            while not pieces:
                if framing.complete or wire is None:
                    return b""
                if framing.fault is not None:
                    self._give_back()
                    raise framing.interrupted()
                _receive(wire, framing, clock)
        finally:
            self._reading = False
        if not clock.patient:
            clock.phase = "idle"
        data = b"".join(pieces)
        pieces.clear()
        return data

    async def close(self) -> None:
        if self._reading and self._wire is not None:  # Another thread reads; it will give the connection back.
            self._wire.wake()
        else:
            self._give_back()

    def _give_back(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            if self._framing.complete:
                self._framing.release()
            self._network.give_back(wire, usable=self._framing.usable)
