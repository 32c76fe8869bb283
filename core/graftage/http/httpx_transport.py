"""The toolkit's connections as transports for httpx and httpx2, so that SDKs get the toolkit's guarantees.

Errors are those of the SDK's library, which it catches, each with the typed error as its cause.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import urlsplit

from graftage._engine.driving import drive
from graftage.exceptions import ConnectionFailed, ProviderError, ProviderTimeout, RequestRejected
from graftage.http.address import place
from graftage.http.transport import Headers, Request, Response

if TYPE_CHECKING:
    from typing import Self

__all__ = ["AsyncTransport", "BlockingTransport"]

Send: TypeAlias = Callable[[Request], Awaitable[Response]]
OURS: Final = frozenset({"accept-encoding", "connection", "content-length", "host", "transfer-encoding"})
"""Headers about the transfer, which the network sets itself."""


class _Guarded:
    """What sync and async share. Requests are those of httpx or of httpx2, and get answers of the same library."""

    def __init__(self, base_url: str, send: Send) -> None:
        self._base = base_url
        self._send = send

    async def _exchange(self, request: Any) -> Response:
        library = _library_of(request)
        url = library.URL(self._base)
        if (request.url.scheme, request.url.host, request.url.port) != (url.scheme, url.host, url.port):
            raise RequestRejected(
                f"A request to {place(str(request.url))} was refused: this client is only for {place(self._base)}.",
                hint="Use another client for other servers.",
            )
        if isinstance(request.stream, library.ByteStream):
            return await self._send(self._request(request, body=b"".join([piece async for piece in request.stream])))
        with tempfile.TemporaryDirectory() as folder:  # It may be a model's file, too large for memory.
            file = Path(folder) / "body"
            with file.open("wb") as kept:
                async for piece in _pieces(request.stream, library):
                    kept.write(piece)
            return await self._send(self._request(request, file=file))

    def _request(self, request: Any, *, body: bytes = b"", file: Path | None = None) -> Request:
        parts = urlsplit(self._base)
        return Request(
            method=request.method,
            # Without a user and password that an SDK may have added.
            url=f"{parts.scheme}://{parts.netloc}{request.url.raw_path.decode('ascii')}",
            headers=tuple(pair for pair in _headers(request) if pair[0] not in OURS),
            body=body,
            file=file,
        )


class BlockingTransport(_Guarded):
    """For sync clients of SDKs."""

    def handle_request(self, request: Any) -> Any:
        """Send a request, and wait for the head of its response."""
        with _as_errors_of(_library_of(request)):
            response = drive(self._exchange(request))
        return _converted(response, request)

    def close(self) -> None:
        """Do nothing: the connections belong to the client of Graftage."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class AsyncTransport(_Guarded):
    """For async clients of SDKs."""

    async def handle_async_request(self, request: Any) -> Any:
        """Send a request, and wait for the head of its response."""
        with _as_errors_of(_library_of(request)):
            response = await self._exchange(request)
        return _converted(response, request)

    async def aclose(self) -> None:
        """Do nothing: the connections belong to the client of Graftage."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


class _Body:
    """The body of a response, in both colours."""

    def __init__(self, response: Response, library: Any) -> None:
        self._response = response
        self._library = library

    def __iter__(self) -> Iterator[bytes]:
        with _as_errors_of(self._library):
            while piece := drive(self._response.read()):
                yield piece

    def close(self) -> None:
        drive(self._response.close())

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_errors_of(self._library):
            while piece := await self._response.read():
                yield piece

    async def aclose(self) -> None:
        await self._response.close()


def _library_of(request: object) -> Any:
    """Return the module `httpx` or `httpx2`."""
    return sys.modules[type(request).__module__.partition(".")[0]]


@functools.cache
def _body_of(library: Any) -> Any:
    """Return `_Body` as a class that the library accepts."""
    return type("Body", (_Body, library.SyncByteStream, library.AsyncByteStream), {})


def _converted(response: Response, request: object) -> Any:
    library = _library_of(request)
    stream = _body_of(library)(response, library)
    return library.Response(response.status, headers=response.headers, stream=stream)


def _headers(request: Any) -> Headers:
    return tuple((name.lower(), value) for name, value in request.headers.multi_items())


async def _pieces(stream: Any, library: Any) -> AsyncIterator[bytes]:
    if isinstance(stream, library.AsyncByteStream):
        async for piece in stream:
            yield piece
    else:
        for piece in stream:
            yield piece


@contextlib.contextmanager
def _as_errors_of(library: Any) -> Iterator[None]:
    """Turn typed errors in a block into those of a library."""
    try:
        yield
    except ProviderError as error:
        raise getattr(library, _kind(error))(str(error)) from error


def _kind(error: ProviderError) -> str:
    if isinstance(error, ProviderTimeout):
        return "ConnectTimeout" if error.phase == "connect" else "ReadTimeout"
    if isinstance(error, ConnectionFailed):
        return "ConnectError"
    return "LocalProtocolError" if isinstance(error, RequestRejected) else "RemoteProtocolError"
