"""The toolkit's connections as transports for httpx, so that SDKs get the toolkit's guarantees.

Errors are those of httpx, which SDKs catch, each with the typed error as its cause.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import urlsplit

import httpx

from graftage._engine.driving import drive
from graftage.exceptions import ConnectionFailed, ProviderError, ProviderTimeout, RequestRejected
from graftage.http.address import place
from graftage.http.transport import Headers, Request, Response

__all__ = ["AsyncTransport", "BlockingTransport"]

Send: TypeAlias = Callable[[Request], Awaitable[Response]]
OURS: Final = frozenset({"accept-encoding", "connection", "content-length", "host", "transfer-encoding"})
"""Headers about the transfer, which the network sets itself."""


class _Guarded:
    """What sync and async share."""

    def __init__(self, base_url: str, send: Send) -> None:
        self._base = base_url
        self._send = send

    async def _exchange(self, request: httpx.Request) -> Response:
        url = httpx.URL(self._base)
        if (request.url.scheme, request.url.host, request.url.port) != (url.scheme, url.host, url.port):
            raise RequestRejected(
                f"A request to {place(str(request.url))} was refused: this client is only for {place(self._base)}.",
                hint="Use another client for other servers.",
            )
        if isinstance(request.stream, httpx.ByteStream):
            return await self._send(self._request(request, body=b"".join([piece async for piece in request.stream])))
        with tempfile.TemporaryDirectory() as folder:  # It may be a model's file, too large for memory.
            file = Path(folder) / "body"
            with file.open("wb") as kept:
                async for piece in _pieces(request.stream):
                    kept.write(piece)
            return await self._send(self._request(request, file=file))

    def _request(self, request: httpx.Request, *, body: bytes = b"", file: Path | None = None) -> Request:
        parts = urlsplit(self._base)
        return Request(
            method=request.method,
            # Without a user and password that an SDK may have added.
            url=f"{parts.scheme}://{parts.netloc}{request.url.raw_path.decode('ascii')}",
            headers=tuple(pair for pair in _headers(request) if pair[0] not in OURS),
            body=body,
            file=file,
        )


class BlockingTransport(_Guarded, httpx.BaseTransport):
    """For sync clients of SDKs."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, and wait for the head of its response."""
        with _as_httpx():
            response = drive(self._exchange(request))
        return httpx.Response(response.status, headers=response.headers, stream=_Body(response))


class AsyncTransport(_Guarded, httpx.AsyncBaseTransport):
    """For async clients of SDKs."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, and wait for the head of its response."""
        with _as_httpx():
            response = await self._exchange(request)
        return httpx.Response(response.status, headers=response.headers, stream=_AsyncBody(response))


class _Body(httpx.SyncByteStream):
    def __init__(self, response: Response) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        with _as_httpx():
            while piece := drive(self._response.read()):
                yield piece

    def close(self) -> None:
        drive(self._response.close())


class _AsyncBody(httpx.AsyncByteStream):
    def __init__(self, response: Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx():
            while piece := await self._response.read():
                yield piece

    async def aclose(self) -> None:
        await self._response.close()


def _headers(request: httpx.Request) -> Headers:
    return tuple((name.lower(), value) for name, value in request.headers.multi_items())


async def _pieces(stream: httpx.SyncByteStream | httpx.AsyncByteStream) -> AsyncIterator[bytes]:
    if isinstance(stream, httpx.AsyncByteStream):
        async for piece in stream:
            yield piece
    else:
        for piece in stream:
            yield piece


@contextlib.contextmanager
def _as_httpx() -> Iterator[None]:
    """Turn typed errors in a block into those of httpx."""
    try:
        yield
    except ProviderError as error:
        raise _kind(error)(str(error)) from error


def _kind(error: ProviderError) -> type[httpx.TransportError]:
    if isinstance(error, ProviderTimeout):
        return httpx.ConnectTimeout if error.phase == "connect" else httpx.ReadTimeout
    if isinstance(error, ConnectionFailed):
        return httpx.ConnectError
    return httpx.LocalProtocolError if isinstance(error, RequestRejected) else httpx.RemoteProtocolError
