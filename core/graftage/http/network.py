"""The network: httpx's transports, each read and write of which keeps to a clock, in two colours.

httpx's own timeouts restart with every read, so that a server which drips bytes can hold a call for ever; it follows
proxies to loopback and builds a TLS context for plain http.
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import ssl
import threading
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

import anyio
import httpcore
import httpx

from graftage.exceptions import ConnectionFailed, ProtocolError, ProviderError, StreamInterrupted
from graftage.http.address import place, proxy_for

if TYPE_CHECKING:
    from pathlib import Path

    from graftage.http.clock import Clock
    from graftage.http.transport import Colour, Headers, Request

__all__ = ["AsyncNetwork", "BlockingNetwork"]

KEEPALIVE: Final = 20
"""Idle connections that are kept."""
KEEPALIVE_EXPIRY: Final = 30.0
BLOCK: Final = 1 << 18
"""Bytes of a file that are sent at once."""

_clock: ContextVar[Clock] = ContextVar("graftage_http_clock")
"""The clock of what is read or written now."""


def _to_httpx(request: Request, content: Any, **extensions: Any) -> httpx.Request:
    # httpx itself takes ASCII only of a text, and shows the whole value in its error.
    headers = [(name.encode(), value.encode()) for name, value in request.headers]
    if request.file is not None:
        headers.append((b"content-length", b"%d" % request.file.stat().st_size))
    return httpx.Request(request.method, request.url, headers=headers, content=content, extensions=extensions)


def _headers(response: httpx.Response) -> Headers:
    return tuple((name.lower(), value) for name, value in response.headers.multi_items())


# --- Blocking --------------------------------------------------------------------------------------------------------


class BlockingNetwork:
    """Connections to one server for sync clients; its coroutines block and never suspend."""

    colour: Colour | None = "sync"

    def __init__(self, url: str) -> None:
        self._url = url
        self._transport = _Transport(url)
        self._process = os.getpid()
        self._inherited: list[Any] = []

    async def send(self, request: Request, clock: Clock) -> _BlockingResponse:
        """Send a request and wait for the head of its answer."""
        if self._process != os.getpid():
            # Two processes that read from one socket get each other's answers. The parent's pool is kept, not closed:
            # another thread may have held its lock at the fork.
            self._inherited.append(self._transport)
            self._transport, self._process = _Transport(self._url), os.getpid()
        content = _blocks(request.file, clock) if request.file else request.body
        token = _clock.set(clock)
        try:
            response = self._transport.handle_request(_to_httpx(request, content))
        except httpx.TransportError as error:
            raise _before_answer(error, clock, request.url) from error
        finally:
            _clock.reset(token)
        clock.sent()  # A transport that somebody has patched does not tell when it was.
        return _BlockingResponse(response, clock)

    async def close(self) -> None:
        """Close every connection."""
        self._transport.close()


def _blocks(file: Path, clock: Clock) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            clock.enter("first_token")  # It counts from the last block that went out.
            yield block


class _BlockingResponse:
    """An answer whose pieces are read by blocking."""

    def __init__(self, response: httpx.Response, clock: Clock) -> None:
        stream = response.stream
        if not isinstance(stream, httpx.SyncByteStream):  # pragma: no cover - a transport that somebody broke
            raise TypeError("the transport of a sync client must answer with a sync stream")
        self.status, self.reason, self.headers = response.status_code, response.reason_phrase, _headers(response)
        self._stream = stream
        self._pieces = iter(stream)
        self._clock = clock

    async def read(self) -> bytes:
        clock = self._clock
        token = _clock.set(clock)
        try:
            piece = next(self._pieces, b"")
        except httpx.TransportError as error:
            raise _within_answer(error, clock) from error
        finally:
            _clock.reset(token)
        now = time.monotonic()
        if piece and (now >= clock.until or now >= clock.deadline):
            raise clock.expired()
        if not clock.patient:
            clock.phase, clock.until = "idle", now + clock.idle
        return piece

    async def close(self) -> None:
        self._stream.close()


# --- Asyncio ---------------------------------------------------------------------------------------------------------


class AsyncNetwork:
    """Pools of connections to one server, one for each event loop.

    A cancel at one step of httpcore's opening loses a slot of its pool for ever, with the socket (httpcore issues 1093
    and 1099). So a pool in which an opening was cancelled takes no new requests, and is closed when its last one ends.
    """

    colour: Colour | None = "async"

    def __init__(self, url: str) -> None:
        self._url = url
        self._pools: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _AsyncPool] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    async def send(self, request: Request, clock: Clock) -> _AsyncResponse:
        """Send a request through the pool of the running loop, and wait for the head of its answer."""
        pool = self._pool()
        pool.users += 1
        content = _ablocks(request.file, clock) if request.file else request.body
        limits = {"connect": max(clock.left(), 0.001)}
        # httpcore bounds the first part of this by itself, and tells when it is over; other transports do not.
        clock.until += clock.first_token
        try:
            async with asyncio.timeout(max(clock.left(), 0)) as clock.timer:
                await pool.open()
                sent = _to_httpx(request, content, timeout=limits, trace=_connected(clock))
                response = await pool.transport.handle_async_request(sent)
        except BaseException as error:
            if not isinstance(error, Exception):
                self._retire(pool)
            await pool.leave()
            if isinstance(error, TimeoutError):
                clock.phase = "first_token"
                raise clock.expired() from error
            if isinstance(error, httpx.TransportError):
                raise _before_answer(error, clock, request.url) from error
            raise
        finally:
            clock.timer = None
        clock.phase = "first_token"  # Its limit goes on: headers are no token.
        return _AsyncResponse(response, clock, pool)

    def _pool(self) -> _AsyncPool:
        loop = asyncio.get_running_loop()
        with self._lock:
            pool = self._pools.get(loop)
            if pool is None:
                pool = self._pools[loop] = _AsyncPool(self._url)
            return pool

    def _retire(self, pool: _AsyncPool) -> None:
        pool.retired = True
        with self._lock:
            for loop, each in list(self._pools.items()):
                if each is pool:
                    del self._pools[loop]

    async def close(self) -> None:
        """Close the pools of all loops that still run."""
        with self._lock:
            pools = list(self._pools.items())
            self._pools.clear()
        for loop, pool in pools:
            if loop is asyncio.get_running_loop():
                await pool.close()
            elif loop.is_running():
                asyncio.run_coroutine_threadsafe(pool.close(), loop)


def _connected(clock: Clock) -> Callable[[str, Mapping[str, Any]], Awaitable[None]]:
    """For httpcore's `trace`: the time for the first token begins when the request is being sent."""

    async def trace(event: str, _facts: Mapping[str, Any]) -> None:
        if event.endswith("send_request_headers.started"):
            clock.enter("first_token")

    return trace


async def _ablocks(file: Path, clock: Clock) -> AsyncIterator[bytes]:
    with await asyncio.to_thread(file.open, "rb") as stream:
        while block := await asyncio.to_thread(stream.read, BLOCK):
            clock.enter("first_token")
            yield block


class _AsyncResponse:
    """An answer whose pieces are awaited."""

    def __init__(self, response: httpx.Response, clock: Clock, pool: _AsyncPool) -> None:
        stream = response.stream
        if not isinstance(stream, httpx.AsyncByteStream):  # pragma: no cover - a transport that somebody broke
            raise TypeError("the transport of an async client must answer with an async stream")
        self.status, self.reason, self.headers = response.status_code, response.reason_phrase, _headers(response)
        self._stream = stream
        self._pieces = aiter(stream)
        self._clock = clock
        self._pool: _AsyncPool | None = pool

    async def read(self) -> bytes:
        clock = self._clock
        try:
            async with asyncio.timeout(max(min(clock.until, clock.deadline) - time.monotonic(), 0)):
                piece = await anext(self._pieces, b"")
        except TimeoutError as error:
            raise clock.expired() from error
        except httpx.TransportError as error:
            raise _within_answer(error, clock) from error
        now = time.monotonic()
        if piece and (now >= clock.until or now >= clock.deadline):
            raise clock.expired()
        if not clock.patient:
            clock.phase, clock.until = "idle", now + clock.idle
        return piece

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            with anyio.CancelScope(shield=True):  # A caller that is cancelled here would leave the connection open.
                try:
                    await self._stream.aclose()
                finally:
                    await pool.leave()


# --- What a failure means --------------------------------------------------------------------------------------------


def _before_answer(error: httpx.TransportError, clock: Clock, url: str) -> ProviderError:
    """The typed error for what went wrong before the status line was there."""
    if isinstance(error, httpx.ConnectTimeout):
        clock.phase = "connect"
        clock.until = 0.0
        return clock.expired()
    if isinstance(error, httpx.TimeoutException):
        return clock.expired()
    if isinstance(error, httpx.RemoteProtocolError) and "disconnected" not in str(error):
        return ProtocolError(
            f"What answers at {place(url)} does not speak HTTP: {error}.", hint="Check `host` and its port."
        )
    return connection_failed(error, url)


def _within_answer(error: httpx.TransportError, clock: Clock) -> ProviderError:
    """The typed error for what went wrong while the body was read."""
    if isinstance(error, httpx.TimeoutException):
        return clock.expired()
    return StreamInterrupted(
        f"The connection broke before the answer was complete: {error}.",
        retryable=True,
        hint="Was the server stopped, or a proxy's limit reached?",
    )


def connection_failed(error: BaseException, url: str) -> ConnectionFailed:
    """The typed error for a connection that could not be made or broke, with the cause in `details["cause"]`."""
    where = place(url)
    causes = list(_chain(error))
    if any(isinstance(each, socket.gaierror) for each in causes):
        return _failed(f"The host name in {where} is not known.", "dns", "Check the spelling of `host`.")
    if any(isinstance(each, ssl.SSLError) for each in causes):
        found = next(each for each in causes if isinstance(each, ssl.SSLError))
        return _failed(
            f"TLS with {where} failed: {found.reason or found}.",
            "tls",
            "Check the scheme, the certificate and the clock.",
        )
    if any(isinstance(each, ConnectionRefusedError) for each in causes):
        return _failed(
            f"Nothing listens at {where}.", "refused", "Is the server running, and is the port right?", retryable=True
        )
    if isinstance(error, httpx.ConnectError):
        return _failed(
            f"{where} cannot be reached: {_innermost(causes)}.",
            "unreachable",
            "Check `host` and the network.",
            retryable=True,
        )
    if isinstance(error, httpx.ProxyError):
        return _failed(
            f"The proxy on the way to {where} refused: {error}.", "proxy", "Check the proxy variables, or set NO_PROXY."
        )
    return _failed(
        f"The connection to {where} broke before an answer came: {_innermost(causes)}.",
        "broken",
        "Was the server stopped?",
        retryable=True,
    )


def _failed(message: str, cause: str, hint: str, *, retryable: bool = False) -> ConnectionFailed:
    return ConnectionFailed(message, hint=hint, retryable=retryable, details={"cause": cause})


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _innermost(causes: list[BaseException]) -> str:
    texts = [str(each) for each in causes if str(each)]
    return texts[-1].rstrip(".") if texts else type(causes[0]).__name__


def _proxy_options(proxy: str) -> dict[str, Any]:
    """A proxy's address, and the user and password in it, as httpcore takes them.

    Raises:
        ConnectionFailed: it is none that can be used. The address is not repeated: it may hold a password.
    """
    hint = "Set an http proxy, or name the host in NO_PROXY."
    try:
        url = httpx.URL(proxy)
    except httpx.InvalidURL as error:
        raise _failed("The proxy that the environment names is no address.", "proxy", hint) from error
    if url.scheme not in ("http", "https") or not url.host:
        raise _failed(f"The environment names a proxy of a kind that cannot be used: {url.scheme}.", "proxy", hint)
    address = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=b"/")
    return {"proxy_url": address, "proxy_auth": (url.username, url.password) if url.userinfo else None}


# --- Pools -----------------------------------------------------------------------------------------------------------


@functools.cache
def tls_context() -> ssl.SSLContext:
    """The one TLS context of the process: building one costs some 50 ms, and no plain-http host needs it.

    Raises:
        ConnectionFailed: the certificates cannot be read.
    """
    try:
        return httpx.create_ssl_context()
    except OSError as error:  # ssl.SSLError is one
        raise _failed(
            f"The certificates for TLS cannot be read: {error}.", "tls", "Check SSL_CERT_FILE and SSL_CERT_DIR."
        ) from error


def _pool_options(url: str) -> dict[str, Any]:
    return {
        "ssl_context": tls_context() if url.startswith("https:") else None,
        "max_connections": None,
        "max_keepalive_connections": KEEPALIVE,
        "keepalive_expiry": KEEPALIVE_EXPIRY,
    }


class _Transport(httpx.HTTPTransport):
    """A pool of connections to one server, each read and write of which keeps to the clock of the running request."""

    def __init__(self, url: str) -> None:
        # httpx's own constructor builds a TLS context and takes no network backend, so the pool is built here; the
        # methods inherited from it use nothing but `_pool`.
        options = {**_pool_options(url), "network_backend": _ClockedBackend(httpcore.SyncBackend())}
        proxy = proxy_for(url)
        self._pool = (
            httpcore.HTTPProxy(**_proxy_options(proxy), **options) if proxy else httpcore.ConnectionPool(**options)
        )


class _ClockedBackend(httpcore.NetworkBackend):
    def __init__(self, inner: httpcore.NetworkBackend) -> None:
        self._inner = inner

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, *args: Any, **options: Any) -> Any:  # noqa: ARG002 - the clock replaces it
        return _ClockedStream(self._inner.connect_tcp(host, port, _left(httpcore.ConnectTimeout), *args, **options))


class _ClockedStream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002 - the clock replaces it
        clock = _clock.get()
        left = min(clock.until, clock.deadline) - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("the limit has passed")
        return self._inner.read(max_bytes, left)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002 - the clock replaces it
        clock = _clock.get()
        if clock.phase == "connect":
            clock.enter("first_token")
        left = min(clock.until, clock.deadline) - time.monotonic()
        if left <= 0:
            raise httpcore.WriteTimeout("the limit has passed")
        self._inner.write(buffer, left)

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002 - the clock replaces it
    ) -> Any:
        return _ClockedStream(self._inner.start_tls(ssl_context, server_hostname, _left(httpcore.ConnectTimeout)))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)

    def close(self) -> None:
        self._inner.close()


def _left(late: type[Exception]) -> float:
    left = _clock.get().left()
    if left <= 0:
        raise late("the limit has passed")
    return left


class _AsyncTransport(httpx.AsyncHTTPTransport):
    def __init__(self, url: str) -> None:
        options = _pool_options(url)  # Built here for the same reason as in `Network`.
        proxy = proxy_for(url)
        self._pool = (
            httpcore.AsyncHTTPProxy(**_proxy_options(proxy), **options)
            if proxy
            else httpcore.AsyncConnectionPool(**options)
        )


class _AsyncPool:
    """The connections of one event loop. They are closed with it, even where nobody closes the client."""

    def __init__(self, url: str) -> None:
        self.transport = _AsyncTransport(url)
        self.users = 0
        self.retired = False
        self._keeper: AsyncGenerator[None, None] | None = None

    async def open(self) -> None:
        """Let the loop know: at its end it finishes the async generators that began in it."""
        if self._keeper is None:
            self._keeper = self._kept()
            await anext(self._keeper)

    async def close(self) -> None:
        if self._keeper is not None:
            await self._keeper.aclose()

    async def leave(self) -> None:
        self.users -= 1
        if self.retired and self.users == 0:
            await self.close()

    async def _kept(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            with anyio.CancelScope(shield=True):
                await self.transport.aclose()
