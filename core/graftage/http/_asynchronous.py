"""The network of async clients: asyncio transports, with one timer for each connection."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
import weakref
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from graftage.exceptions import ProviderTimeout
from graftage.http import _patched
from graftage.http._framing import BLOCK, BUFFER_LIMIT, OK, Framing, ParserError, block_of, head_of, size_of
from graftage.http._network import (
    IDLE_SECONDS,
    MAX_IDLE,
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

__all__ = ["AsyncNetwork"]

KEEP_ALIVE_INTERVAL = 86_400.0
"""Seconds after which the timer that keeps a pool alive is renewed."""
TIMER_SLACK = 0.001
"""Reset a timer only if the new limit ends this many seconds earlier."""


class AsyncNetwork:
    """Connections for async clients, in one pool for each event loop."""

    colour: Colour | None = "async"

    def __init__(self) -> None:
        self._servers: dict[str, Server] = {}
        self._pools: weakref.WeakValueDictionary[int, _Pool] = weakref.WeakValueDictionary()
        """By the id of the loop, which stays unique while the pool refers to the loop."""
        self._lock = threading.Lock()

    async def send(self, request: Request, clock: Clock) -> Response:
        """Send a request and wait for the head of its response."""
        origin = request.origin
        server = self._servers.get(origin) or self._servers.setdefault(origin, server_of(origin))
        if _patched.is_patched(server):
            return await asyncio.to_thread(_patched.exchange, request, server, clock)
        size = size_of(request)
        head = head_of(request, server, size)
        pool = await self._pool()
        kept, begun = pool.take_idle(server), time.monotonic()
        while True:
            wire = kept or await pool.connect(server, clock)
            wire.framing = framing = Framing(bodiless=request.method == "HEAD")
            try:
                await _send(wire, head, request, size, clock)
                while not framing.head and framing.fault is None:
                    await wire.wait(clock)
            except BaseException:
                pool.drop(wire)
                raise
            if has_response(framing, server):
                return _Response(pool, wire, framing, clock)
            pool.drop(wire)
            if kept is None or pool.closed or not is_stale(framing, begun):
                raise no_response_error(framing, clock, server)
            kept = None

    async def _pool(self) -> _Pool:
        loop = asyncio.get_running_loop()
        with self._lock:
            pool = self._pools.get(id(loop))
            if pool is None or pool.closed:
                self._close_dead_pools()
                pool = self._pools[id(loop)] = _Pool(loop)
        if pool.keeper is None:
            pool.keeper = pool.until_shutdown()
            await anext(pool.keeper)
        return pool

    async def close(self) -> None:
        """Close the connections of all running loops."""
        with self._lock:
            self._close_dead_pools()
            pools = list(self._pools.values())
            self._pools.clear()
        for pool in pools:
            if pool.loop is asyncio.get_running_loop():
                if pool.keeper is not None:
                    await pool.keeper.aclose()
            elif pool.loop.is_running():
                with contextlib.suppress(RuntimeError):  # The loop has just ended and closed them.
                    pool.loop.call_soon_threadsafe(pool.close)

    def _close_dead_pools(self) -> None:
        """Close the pools of closed loops now, instead of at garbage collection."""
        for pool in list(self._pools.values()):
            if pool.loop.is_closed():
                pool.close()


class _Pool:
    """The connections of one event loop. Only the loop refers to its pool, so both end together."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._keep_alive()
        self._idle: list[_Wire] = []
        self._busy: set[_Wire] = set()
        self._limits: set[asyncio.Timeout] = set()
        self.closed = False
        self.keeper: AsyncGenerator[None, None] | None = None

    def _keep_alive(self) -> None:
        self._keep_alive_timer = self.loop.call_later(KEEP_ALIVE_INTERVAL, self._keep_alive)

    async def until_shutdown(self) -> AsyncGenerator[None, None]:
        """Close the pool when `loop.shutdown_asyncgens` ends this generator."""
        try:
            yield
        finally:
            self.close()
            await asyncio.sleep(0)  # Transports close in the next step of the loop.

    def take_idle(self, server: Server) -> _Wire | None:
        """Return an idle connection to a server, or None."""
        now = time.monotonic()
        for wire in [each for each in reversed(self._idle) if each.server is server]:
            self._idle.remove(wire)
            if wire.since + IDLE_SECONDS > now and not wire.lost:
                self._busy.add(wire)
                return wire
            wire.close()
        return None

    async def connect(self, server: Server, clock: Clock) -> _Wire:
        """Return a new connection."""
        clock.enter("connect")
        limit = asyncio.timeout(clock.left())
        self._limits.add(limit)
        try:
            async with limit:
                wire = await _connect(server, clock)
        except (OSError, ProviderTimeout) as error:
            failure = closed_error() if self.closed else connect_error(error, clock, server)
            if failure is error:
                raise
            raise failure from error
        finally:
            self._limits.discard(limit)
        self._busy.add(wire)
        return wire

    def give_back(self, wire: _Wire, framing: Framing) -> None:
        """Keep a connection for the next request if it can take one, else close it."""
        if self.closed or not framing.usable or wire.lost or wire.transport.get_write_buffer_size():
            self.drop(wire)
            return
        self._busy.discard(wire)
        wire.rest()
        self._idle.append(wire)
        if len(self._idle) > MAX_IDLE:
            self._idle.pop(0).close()

    def drop(self, wire: _Wire) -> None:
        """Close a connection."""
        self._busy.discard(wire)
        wire.close()

    def close(self) -> None:
        """Close every connection and wake the calls that wait for one."""
        self.closed = True
        self._keep_alive_timer.cancel()
        for wire in (*self._idle, *self._busy):
            wire.close()
        self._idle.clear()
        self._busy.clear()
        for limit in self._limits:
            if not limit.expired() and not self.loop.is_closed():
                limit.reschedule(0)


class _Wire(asyncio.Protocol):
    """One connection, which feeds the received bytes to the current response."""

    def __init__(self, loop: asyncio.AbstractEventLoop, server: Server, connection: socket.socket) -> None:
        self._socket = connection
        self.transport: Any = None
        """None until the connection, with its TLS if any, is made."""
        self.loop = loop
        self.server = server
        self.since = 0.0
        self.framing: Framing | None = None
        self.lost = False
        self._waiter: asyncio.Future[None] | None = None
        self._clock: Clock | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._reading = True
        self.writable = True

    # --- What asyncio calls ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        framing = self.framing
        if framing is None or framing.complete:  # No request is waiting for these bytes.
            self.close()
            return
        try:
            framing.feed(data)
        except ParserError as error:
            framing.failed(error)
        framing.size += len(data)
        if framing.size > BUFFER_LIMIT and framing.is_full() and self._reading:
            self._reading = False
            self.transport.pause_reading()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def eof_received(self) -> None:
        self.connection_lost(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = self.writable = True
        if self.framing is not None:
            self.framing.end(error)
        self._wake()

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        self._wake()

    # --- What a request calls ----------------------------------------------------------------------------------------

    def answered(self) -> bool:
        """Whether the head of the response has come, or will never come."""
        return self.lost or self.framing is None or self.framing.head or self.framing.fault is not None

    async def wait(self, clock: Clock) -> None:
        """Wait until something happens.

        Raises:
            ProviderTimeout: a limit passed first.
        """
        self._clock = clock
        limit = min(clock.until, clock.deadline)
        if self._timer is None or self._due > limit + TIMER_SLACK:
            self._arm(clock.left())
        if not self._reading:
            self._reading = True
            self.transport.resume_reading()
        self._waiter = self.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, left: float) -> None:
        self._disarm()
        self._due = time.monotonic() + left
        self._timer = self.loop.call_later(left, self._on_timer)

    def _on_timer(self) -> None:
        """Time out, or set the timer again if the limit has moved since."""
        self._timer = None
        if self._waiter is None or self._waiter.done() or self._clock is None:
            return
        try:
            self._arm(self._clock.left())
        except ProviderTimeout as error:
            self._waiter.set_exception(error)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def rest(self) -> None:
        """Wait for the next request."""
        self.framing = self._clock = None
        self.since = time.monotonic()
        self._disarm()

    def close(self) -> None:
        """End the connection at once."""
        self.lost = True
        self._disarm()
        if self.transport is not None:
            try:
                self.transport.abort()
            except RuntimeError:  # The loop is closed and cannot do it.
                self._socket.close()


async def _connect(server: Server, clock: Clock) -> _Wire:
    loop = asyncio.get_running_loop()
    connection = await _dial(loop, server, clock)
    wire = _Wire(loop, server, connection)
    try:
        tls: dict[str, Any] = {"ssl": tls_context(), "server_hostname": server.first[0]} if server.tls else {}
        await loop.create_connection(lambda: wire, sock=connection, **tls)
        if server.tunnel is not None:
            await _through_proxy(loop, wire, server.tunnel, clock)
    except BaseException:
        wire.close()
        connection.close()
        raise
    return wire


async def _dial(loop: asyncio.AbstractEventLoop, server: Server, clock: Clock) -> socket.socket:
    """Try each address of the host; each gets its share of the remaining time."""
    failure: OSError = OSError("the host has no address")
    host, port = server.first
    found = known_addresses(server) or await loop.getaddrinfo(host.encode(), port, type=socket.SOCK_STREAM)
    for position, (family, kind, protocol, _, address) in enumerate(found):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.setblocking(False)
            async with asyncio.timeout(clock.left() / (len(found) - position)):
                await loop.sock_connect(connection, address)
        except OSError as error:
            connection.close()
            failure = error
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise failure


async def _through_proxy(loop: asyncio.AbstractEventLoop, wire: _Wire, tunnel: bytes, clock: Clock) -> None:
    wire.framing = framing = Framing(bodiless=True)
    wire.transport.write(tunnel)
    while not framing.head and framing.fault is None:
        await wire.wait(clock)
    framing.release()
    if framing.status != OK:
        raise tunnel_error(framing, wire.server)
    wire.framing = None
    secured = await loop.start_tls(wire.transport, wire, tls_context(), server_hostname=wire.server.host)
    if secured is None:
        raise ConnectionResetError("the proxy closed the connection")
    wire.transport = secured


async def _send(wire: _Wire, head: bytes, request: Request, size: int, clock: Clock) -> None:
    clock.sent()
    if request.file is None:
        wire.transport.write(head + request.body)
        return
    wire.transport.write(head)
    for start in range(0, size, BLOCK):
        block = await asyncio.to_thread(block_of, request.file, start, size)
        while not (wire.writable or wire.answered()):
            await wire.wait(clock)
        if wire.answered():
            return  # The server answered before it had read everything.
        wire.transport.write(block)
        clock.enter("first_token")  # The time counts from the last block sent.


class _Response:
    """A response whose pieces are awaited."""

    def __init__(self, pool: _Pool, wire: _Wire, framing: Framing, clock: Clock) -> None:
        self.status, self.reason = framing.status, framing.reason
        self.headers: Headers = tuple(framing.headers)
        self._pool = pool
        self._wire: _Wire | None = wire
        self._framing = framing
        self._clock = clock

    async def read(self) -> bytes:
        framing, clock, wire = self._framing, self._clock, self._wire
        pieces = framing.pieces
        if not clock.patient:
            clock.read()
        while not pieces:
            if framing.complete or wire is None:
                return b""
            if framing.fault is not None:
                raise framing.interrupted()
            await wire.wait(clock)
        if not clock.patient:
            clock.phase = "idle"
        data = b"".join(pieces)
        pieces.clear()
        framing.size = 0
        return data

    async def close(self) -> None:
        self._give_back()

    def _give_back(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.framing = None
            self._framing.release()
            self._pool.give_back(wire, self._framing)

    def __del__(self) -> None:
        # The garbage collector may run in any thread, also after the end of the loop.
        if self._wire is not None:
            with contextlib.suppress(RuntimeError):
                self._wire.loop.call_soon_threadsafe(self._give_back)
