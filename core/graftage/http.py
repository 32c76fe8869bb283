"""HTTP for providers: httpx with real deadlines, bounded answers, whole lines and typed errors.

httpx's own timeouts restart with every read, so a server that drips bytes can hold a call for ever; its line splitting
breaks JSON at U+0085; it follows proxies to loopback and builds a TLS context for plain http. `Guard` and `AsyncGuard`
are transports that mend this for whatever client is put on top of them, the official `ollama` one for example:

    guard = Guard(network)                    # or a recorder's transport
    client = SomeClient(transport=guard, follow_redirects=False)
    with exchange(Exchange(call=request.call, refuse=to_typed_error)):
        client.chat(...)                      # each part of the work that reads must run inside such a block

Needs the extra `graftage[http]`.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import json
import os
import re
import socket
import ssl
import threading
import time
import urllib.request
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpcore
import httpx

from graftage._messages import read_tool_call
from graftage._stream import Phase, too_late
from graftage.exceptions import ConnectionFailed, ProtocolError, ProviderError, ProviderTimeout, StreamInterrupted
from graftage.types import Call

__all__ = [
    "AsyncGuard",
    "AsyncNetwork",
    "Exchange",
    "Guard",
    "Network",
    "connection_failed",
    "exchange",
    "is_loopback",
    "mend_line",
    "proxy_for",
    "read_tool_call",
    "reason",
]

MAX_LINE = 8 * 1024 * 1024
"""Bytes of one line of a stream: what Ollama's own client takes (`api/client.go`, `maxBufferSize`)."""
MAX_ERROR_BODY = 64 * 1024
REFUSED_STATUS = 400
REDIRECT_STATUS = 300
KEEPALIVE = 20
KEEPALIVE_EXPIRY = 30.0


class Clock:
    """Which limit of a call runs now, and when it ends."""

    __slots__ = ("_call", "deadline", "phase", "scope", "timeouts", "until")

    def __init__(self, call: Call) -> None:
        self._call = call
        self.timeouts = call.timeouts
        self.deadline = call.deadline
        self.scope: anyio.CancelScope | None = None
        """Where async code waits for this clock: its end moves with the limit."""
        self.enter("connect")

    def enter(self, phase: Phase) -> None:
        """Start the limit of a phase afresh."""
        self.phase = phase
        self.until = time.monotonic() + float(getattr(self.timeouts, phase))
        if self.scope is not None:
            self.scope.deadline = anyio.current_time() + max(self.left(), 0)

    def left(self) -> float:
        """Seconds until the nearest limit; 0 or less when it has passed."""
        return min(self.until, self.deadline) - time.monotonic()

    def expired(self) -> ProviderTimeout:
        """The error for the limit that has passed, or that is the next to pass."""
        return too_late(self._call, "total" if self.deadline <= self.until else self.phase)


@dataclass(slots=True, kw_only=True)
class Exchange:
    """One call as the transports see it: its limits, and what its refusals and lines mean."""

    call: Call
    refuse: Callable[[int, Mapping[str, str], bytes], ProviderError]
    """Makes the typed error of a refusal from status, headers and body."""
    line: Callable[[bytes, bool], bytes | None] = lambda line, _whole: line
    """Reads a line of a stream: gives it back, perhaps changed; None skips it; raising ends the stream. The second
    argument is False for a last line that no line break ended."""
    lines: bool = False
    """Whether the answer is read line by line."""
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(self.call)


_current: ContextVar[Exchange | None] = ContextVar("graftage_http_exchange", default=None)


class exchange:  # noqa: N801 - reads as a word in a `with`
    """Makes `of` the exchange of all HTTP in a block. A generator must not yield inside it."""

    __slots__ = ("_of", "_token")

    def __init__(self, of: Exchange) -> None:
        self._of = of

    def __enter__(self) -> Exchange:
        self._token = _current.set(self._of)
        return self._of

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)


def current() -> Exchange:
    """The exchange of the running block."""
    of = _current.get()
    if of is None:
        raise RuntimeError("graftage.http transports work only inside `with exchange(...)`")
    return of


# --- Guards: what every answer passes through ------------------------------------------------------------------------


class Guard(httpx.BaseTransport):
    """Bounds and types every answer of the transport inside it.

    `headers` are sent instead of what the client above set under those names; None leaves a header out.
    """

    def __init__(self, inner: httpx.BaseTransport, headers: Mapping[str, str | None] | None = None) -> None:
        self._inner = inner
        self._headers = headers or {}

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and hand its answer on, once it is known to be none that refuses."""
        of = current()
        of.clock.enter("connect")
        _prepare(request, self._headers)
        try:
            response = self._inner.handle_request(request)
        except httpx.TransportError as error:
            raise _before_answer(error, of, request) from error
        if of.clock.phase == "connect":  # A transport that is not `Network` does not tell when it was connected.
            of.clock.enter("first_token")
        stream = response.stream
        if not isinstance(stream, httpx.SyncByteStream):  # pragma: no cover - a broken inner transport
            raise TypeError("the transport of a sync client must answer with a sync stream")
        try:
            if response.status_code >= REDIRECT_STATUS:
                body = b"".join(_capped(_bounded(stream, of), MAX_ERROR_BODY))
                raise _refusal(of, response, body)
            _check_encoding(response)
        except BaseException:
            stream.close()
            raise
        return _guarded(response, _Body(stream, of))

    def close(self) -> None:
        """Close the transport inside."""
        self._inner.close()


class AsyncGuard(httpx.AsyncBaseTransport):
    """`Guard` for async clients."""

    def __init__(self, inner: httpx.AsyncBaseTransport, headers: Mapping[str, str | None] | None = None) -> None:
        self._inner = inner
        self._headers = headers or {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and hand its answer on, once it is known to be none that refuses."""
        of = current()
        of.clock.enter("connect")
        _prepare(request, self._headers)
        limits = {"connect": max(of.clock.left(), 0.001)}
        request.extensions = {**request.extensions, "timeout": limits, "trace": _connected(of.clock)}
        # httpcore bounds the first part of this by itself, and tells when it is over; other transports do not.
        of.clock.until += of.call.timeouts.first_token
        try:
            with anyio.fail_after(max(of.clock.left(), 0)) as of.clock.scope:
                response = await self._inner.handle_async_request(request)
        except TimeoutError as error:
            of.clock.phase = "first_token"
            raise of.clock.expired() from error
        except httpx.TransportError as error:
            raise _before_answer(error, of, request) from error
        finally:
            of.clock.scope = None
        stream = response.stream
        if not isinstance(stream, httpx.AsyncByteStream):  # pragma: no cover - a broken inner transport
            raise TypeError("the transport of an async client must answer with an async stream")
        of.clock.phase = "first_token"  # Its limit goes on: headers are no token.
        try:
            if response.status_code >= REDIRECT_STATUS:
                body = await _acapped(_abounded(stream, of), MAX_ERROR_BODY)
                raise _refusal(of, response, body)
            _check_encoding(response)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await stream.aclose()
            raise
        return _guarded(response, _AsyncBody(stream, of))

    async def aclose(self) -> None:
        """Close the transport inside."""
        await self._inner.aclose()


def _connected(clock: Clock) -> Callable[[str, Mapping[str, Any]], Awaitable[None]]:
    """For httpcore's `trace`: the time for the first token begins when the request is being sent."""

    async def trace(event: str, _facts: Mapping[str, Any]) -> None:
        if event.endswith("send_request_headers.started"):
            clock.enter("first_token")

    return trace


def _prepare(request: httpx.Request, headers: Mapping[str, str | None]) -> None:
    # Compressed answers could be bombs, and nothing on a local line is won by them.
    for name, value in {"accept-encoding": "identity", **headers}.items():
        if value is None:
            request.headers.pop(name, None)
        else:
            request.headers[name] = value


def _guarded(response: httpx.Response, stream: httpx.SyncByteStream | httpx.AsyncByteStream) -> httpx.Response:
    # Length and encoding described the bytes before they were mended.
    headers = [(name, value) for name, value in response.headers.items() if name in ("date", "retry-after")]
    headers.append(("content-type", "application/json"))
    return httpx.Response(response.status_code, headers=headers, stream=stream, extensions=response.extensions)


def _check_encoding(response: httpx.Response) -> None:
    encoding = response.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise ProtocolError(
            f"The answer is compressed ({encoding[:40]}), which was not asked for.",
            hint="Is a proxy between here and the server?",
        )
    if "text/html" in response.headers.get("content-type", "").lower():
        raise ProtocolError(
            "The address answers with a web page: it is another service, or a proxy's page.",
            status=response.status_code,
            hint="Check `host` and its port.",
        )


def _refusal(of: Exchange, response: httpx.Response, body: bytes) -> ProviderError:
    status = response.status_code
    if status < REFUSED_STATUS:
        # Followed, a redirect would send the prompt to whatever it names.
        return ProtocolError(
            f"The server redirects (status {status}); redirects are not followed.",
            status=status,
            hint="Put the final address into `host`.",
        )
    return of.refuse(status, response.headers, body)


class _Body(httpx.SyncByteStream):
    """The body as it is read: bounded in time and size, and in whole lines where it is a stream."""

    def __init__(self, inner: httpx.SyncByteStream, of: Exchange) -> None:
        self._inner = inner
        self._of = of

    def __iter__(self) -> Iterator[bytes]:
        pieces = _capped(_bounded(self._inner, self._of), self._of.call.max_reply_bytes, strict=True)
        if not self._of.lines:
            yield from pieces
            return
        reader = _LineReader(self._of)
        for piece in pieces:
            yield from reader.feed(piece)
        yield from reader.end()

    def close(self) -> None:
        self._inner.close()


class _AsyncBody(httpx.AsyncByteStream):
    def __init__(self, inner: httpx.AsyncByteStream, of: Exchange) -> None:
        self._inner = inner
        self._of = of

    async def __aiter__(self) -> AsyncIterator[bytes]:
        reader = _LineReader(self._of) if self._of.lines else None
        size = 0
        async for piece in _abounded(self._inner, self._of):
            size += len(piece)
            if size > self._of.call.max_reply_bytes:
                raise _too_large(self._of.call.max_reply_bytes)
            if reader is None:
                yield piece
            else:
                for line in reader.feed(piece):
                    yield line
        if reader is not None:
            for line in reader.end():
                yield line

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._inner.aclose()


def _bounded(stream: httpx.SyncByteStream, of: Exchange) -> Iterator[bytes]:
    """The pieces of a stream, with the errors of reading typed. The time is kept by the sockets of `Network`."""
    pieces = iter(stream)
    while True:
        try:
            piece = next(pieces, None)
        except httpx.TransportError as error:
            raise _within_answer(error, of) from error
        if piece is None:
            return
        _count(of)
        yield piece


async def _abounded(stream: httpx.AsyncByteStream, of: Exchange) -> AsyncIterator[bytes]:
    pieces = aiter(stream)
    while True:
        try:
            with anyio.fail_after(max(of.clock.left(), 0)):
                piece = await anext(pieces, None)
        except TimeoutError as error:
            raise of.clock.expired() from error
        except httpx.TransportError as error:
            raise _within_answer(error, of) from error
        if piece is None:
            return
        _count(of)
        yield piece


def _count(of: Exchange) -> None:
    """Keep the clock after a read. A stream's limit starts afresh with each whole line, not with each byte."""
    if of.clock.left() <= 0:
        raise of.clock.expired()
    if not of.lines:
        of.clock.enter("idle")


def _capped(pieces: Iterable[bytes], limit: int, *, strict: bool = False) -> Iterator[bytes]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > limit and strict:
            raise _too_large(limit)
        yield piece
        if size > limit:
            return


async def _acapped(pieces: AsyncIterator[bytes], limit: int) -> bytes:
    parts: list[bytes] = []
    async for piece in pieces:
        parts.append(piece)
        if sum(map(len, parts)) > limit:
            break
    return b"".join(parts)


def _too_large(limit: int) -> ProtocolError:
    return ProtocolError(f"The answer is larger than {limit} bytes.", hint="Raise `max_reply_bytes`.")


class _LineReader:
    """Cuts bytes into lines at the byte for a new line and nowhere else."""

    def __init__(self, of: Exchange) -> None:
        self._of = of
        self._rest: list[bytes] = []
        self._size = 0

    def feed(self, piece: bytes) -> list[bytes]:
        """The whole lines that this piece completes, read."""
        *whole, rest = piece.split(b"\n")
        lines: list[bytes] = []
        if whole:
            if self._rest:
                whole[0] = b"".join((*self._rest, whole[0]))
                self._rest, self._size = [], 0
            for line in whole:
                self._read(line, True, lines)
            self._of.clock.enter("idle")
        if rest:
            self._rest.append(rest)
            self._size += len(rest)
            if self._size > MAX_LINE:
                raise ProtocolError(
                    f"A line of the answer is longer than {MAX_LINE} bytes.",
                    hint="No model writes so much at once: is it the right service?",
                )
        return lines

    def end(self) -> list[bytes]:
        """The last line, where no line break ended it."""
        lines: list[bytes] = []
        if self._rest:
            self._read(b"".join(self._rest), False, lines)
        return lines

    def _read(self, line: bytes, whole: bool, into: list[bytes]) -> None:
        if line and not line.isspace():
            read = self._of.line(mend_line(line), whole)
            if read is not None:
                into.append(read + b"\n")


_BREAKS = re.compile(rb"[\x0b\x0c\x1c-\x1e]|\xc2\x85|\xe2\x80[\xa8\xa9]")


def mend_line(line: bytes) -> bytes:
    """Escape what readers of text lines take for a line break: inside a JSON line it can only stand in a string."""
    if line.isascii() and not _BREAKS.search(line):
        return line
    return _BREAKS.sub(lambda found: json.dumps(found[0].decode()).strip('"').encode(), line)


# --- What a failure means --------------------------------------------------------------------------------------------


def _before_answer(error: httpx.TransportError, of: Exchange, request: httpx.Request) -> ProviderError:
    """The typed error for what went wrong before the status line was there."""
    if isinstance(error, httpx.ConnectTimeout):
        of.clock.phase = "connect"
        of.clock.until = time.monotonic()
        return of.clock.expired()
    if isinstance(error, httpx.TimeoutException):
        return of.clock.expired()
    if isinstance(error, httpx.RemoteProtocolError) and "disconnected" not in str(error):
        return ProtocolError(
            f"What answers at {_place(request.url)} does not speak HTTP: {error}.", hint="Check `host` and its port."
        )
    return connection_failed(error, request.url)


def _within_answer(error: httpx.TransportError, of: Exchange) -> ProviderError:
    """The typed error for what went wrong while the body was read."""
    if isinstance(error, httpx.TimeoutException):
        return of.clock.expired()
    return StreamInterrupted(
        f"The connection broke before the answer was complete: {error}.",
        retryable=True,
        hint="Was the server stopped, or a proxy's limit reached?",
    )


def reason(error: Exception) -> str:
    """What was wrong with an answer, without a word of the answer, which may hold what nobody may log."""
    found = getattr(error, "errors", None)
    if callable(found):  # pydantic's
        places = [f"{'.'.join(map(str, each['loc']))} ({each['type']})" for each in found(include_input=False)]
        return f"{type(error).__name__}: {', '.join(places)}"[:500]
    return f"{type(error).__name__}: {error.args[0]!r}"[:200] if isinstance(error, KeyError) else type(error).__name__


def connection_failed(error: BaseException, url: httpx.URL) -> ConnectionFailed:
    """The typed error for a connection that could not be made or broke, with the cause in `details["cause"]`."""
    place = _place(url)
    causes = list(_chain(error))
    if any(isinstance(each, socket.gaierror) for each in causes):
        return _failed(f"The host name in {place} is not known.", "dns", "Check the spelling of `host`.")
    if any(isinstance(each, ssl.SSLError) for each in causes):
        found = next(each for each in causes if isinstance(each, ssl.SSLError))
        return _failed(
            f"TLS with {place} failed: {found.reason or found}.",
            "tls",
            "Check the scheme, the certificate and the clock.",
        )
    if any(isinstance(each, ConnectionRefusedError) for each in causes):
        return _failed(
            f"Nothing listens at {place}.", "refused", "Is the server running, and is the port right?", retryable=True
        )
    if isinstance(error, httpx.ConnectError):
        return _failed(
            f"{place} cannot be reached: {_innermost(causes)}.",
            "unreachable",
            "Check `host` and the network.",
            retryable=True,
        )
    if isinstance(error, httpx.ProxyError):
        return _failed(
            f"The proxy on the way to {place} refused: {error}.", "proxy", "Check the proxy variables, or set NO_PROXY."
        )
    return _failed(
        f"The connection to {place} broke before an answer came: {_innermost(causes)}.",
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
    return texts[-1] if texts else type(causes[0]).__name__


def _place(url: httpx.URL) -> str:
    """The address without user, password, path and query."""
    host = f"[{url.host}]" if ":" in url.host else url.host
    port = f":{url.port}" if url.port else ""
    return f"{url.scheme}://{host}{port}"


# --- The network -----------------------------------------------------------------------------------------------------


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    # Python before 3.13 does not look into `::ffff:127.0.0.1`.
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def proxy_for(url: httpx.URL) -> str | None:
    """The proxy that the environment names for `url`. Loopback never has one: a prompt would leave the machine."""
    if is_loopback(url.host):
        return None
    proxies = urllib.request.getproxies()
    if urllib.request.proxy_bypass(url.host):
        return None
    proxy = proxies.get(url.scheme) or proxies.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


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


def _pool_options(url: httpx.URL) -> dict[str, Any]:
    return {
        "ssl_context": tls_context() if url.scheme == "https" else None,
        "max_connections": None,
        "max_keepalive_connections": KEEPALIVE,
        "keepalive_expiry": KEEPALIVE_EXPIRY,
    }


class Network(httpx.HTTPTransport):
    """A pool of connections to one server, each read and write of which keeps to the clock of the current exchange."""

    def __init__(self, url: httpx.URL) -> None:
        self._url = url
        self._inherited: list[Any] = []
        self._open()

    def _open(self) -> None:
        # httpx's own constructor builds a TLS context and takes no network backend, so the pool is built here; the
        # methods inherited from it use nothing but `_pool`.
        options = {**_pool_options(self._url), "network_backend": _ClockedBackend(httpcore.SyncBackend())}
        proxy = proxy_for(self._url)
        self._pool = (
            httpcore.HTTPProxy(**_proxy_options(proxy), **options) if proxy else httpcore.ConnectionPool(**options)
        )
        self._process = os.getpid()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; in a process that was forked off, over connections of its own."""
        if self._process != os.getpid():
            # Two processes that read from one socket get each other's answers. The parent's pool is kept, not closed:
            # another thread may have held its lock at the fork.
            self._inherited.append(self._pool)
            self._open()
        return super().handle_request(request)


class _ClockedBackend(httpcore.NetworkBackend):
    def __init__(self, inner: httpcore.NetworkBackend) -> None:
        self._inner = inner

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, *args: Any, **options: Any) -> Any:  # noqa: ARG002 - the clock replaces it
        return _ClockedStream(self._inner.connect_tcp(host, port, _left(httpcore.ConnectTimeout), *args, **options))


class _ClockedStream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002 - the clock replaces it
        return self._inner.read(max_bytes, _left(httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002 - the clock replaces it
        clock = current().clock
        if clock.phase == "connect":
            clock.enter("first_token")
        self._inner.write(buffer, _left(httpcore.WriteTimeout))

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
    left = current().clock.left()
    if left <= 0:
        raise late("the limit has passed")
    return left


class AsyncNetwork(httpx.AsyncBaseTransport):
    """Pools of connections to one server, one for each event loop.

    A cancel at one step of httpcore's opening loses a slot of its pool for ever, with the socket (httpcore issues 1093
    and 1099). So a pool in which an opening was cancelled takes no new requests, and is closed when its last one ends.
    """

    def __init__(self, url: httpx.URL) -> None:
        self._url = url
        self._pools: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _AsyncPool] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request through the pool of the running loop."""
        pool = self._pool()
        pool.users += 1
        try:
            await pool.open()
            response = await pool.transport.handle_async_request(request)
        except BaseException as error:
            if not isinstance(error, Exception):
                self._retire(pool)
            await pool.leave()
            raise
        if isinstance(response.stream, httpx.AsyncByteStream):
            response.stream = _Leaving(response.stream, pool)
        return response

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

    async def aclose(self) -> None:
        """Close the pools of all loops that still run."""
        with self._lock:
            pools = list(self._pools.items())
            self._pools.clear()
        for loop, pool in pools:
            if loop is asyncio.get_running_loop():
                await pool.close()
            elif loop.is_running():
                asyncio.run_coroutine_threadsafe(pool.close(), loop)


class _AsyncTransport(httpx.AsyncHTTPTransport):
    def __init__(self, url: httpx.URL) -> None:
        options = _pool_options(url)  # Built here for the same reason as in `Network`.
        proxy = proxy_for(url)
        self._pool = (
            httpcore.AsyncHTTPProxy(**_proxy_options(proxy), **options)
            if proxy
            else httpcore.AsyncConnectionPool(**options)
        )


class _AsyncPool:
    """The connections of one event loop. They are closed with it, even where nobody closes the client."""

    def __init__(self, url: httpx.URL) -> None:
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


class _Leaving(httpx.AsyncByteStream):
    """A body that tells its pool when it is done."""

    def __init__(self, inner: httpx.AsyncByteStream, pool: _AsyncPool) -> None:
        self._inner = inner
        self._pool: _AsyncPool | None = pool

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._inner:
            yield piece

    async def aclose(self) -> None:
        pool, self._pool = self._pool, None
        try:
            await self._inner.aclose()
        finally:
            if pool is not None:
                await pool.leave()
