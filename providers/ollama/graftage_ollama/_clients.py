"""The clients of a connection, on one guarded transport, and the streams that are read with them."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio
import httpx

from graftage.exceptions import ConnectionFailed, GraftageError, ProtocolError, ProviderError, StreamInterrupted
from graftage.http import AsyncGuard, AsyncNetwork, Exchange, Guard, Network, current, exchange, is_loopback, reason
from graftage_ollama._package import ollama

if TYPE_CHECKING:
    from graftage.settings import Settings

__all__ = ["AsyncClients", "AsyncLines", "Clients", "Lines", "checked_line", "request_headers", "typed"]

T = TypeVar("T")
SECRET_HEADER: Final = re.compile("auth|cookie|credential|key|passw|secret|session|token", re.IGNORECASE)
"""In the name of a header: gateways have many names for a key."""
DRAIN: Final = 0.2
"""Seconds to wait for the end of a body after its last line; then the connection is not used again."""
BLOCK: Final = 1 << 18
"""Bytes of a file that are sent at once."""


class Clients:
    """The official client, and an httpx client beside it, on one transport."""

    def __init__(self, url: httpx.URL, transport: Any, headers: Mapping[str, str | None]) -> None:
        def build() -> httpx.BaseTransport:
            return Network(url)

        guard = Guard(transport.sync_transport(build) if transport is not None else build(), headers)
        self.http = httpx.Client(base_url=url, transport=guard, trust_env=False, timeout=None)  # noqa: S113 - the guard keeps the time
        self.ollama = ollama.Client(host=str(url), transport=guard, trust_env=False, follow_redirects=False)

    def json(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, empty: bool = False
    ) -> dict[str, Any]:
        """Ask for a JSON object; nothing at all is one too where it may be `empty`."""
        return _object(self.http.request(method, path, json=body).content, empty=empty)

    def upload(self, path: str, file: Path) -> None:
        """Send a file, however long that takes while it goes on."""
        self.http.post(path, content=_blocks(file), headers=_length(file))

    def close(self) -> None:
        self.http.close()
        self.ollama.close()  # type: ignore[no-untyped-call] # the package is only partly typed


class AsyncClients:
    """The same for asyncio."""

    def __init__(self, url: httpx.URL, transport: Any, headers: Mapping[str, str | None]) -> None:
        def build() -> httpx.AsyncBaseTransport:
            return AsyncNetwork(url)

        guard = AsyncGuard(transport.async_transport(build) if transport is not None else build(), headers)
        self.http = httpx.AsyncClient(base_url=url, transport=guard, trust_env=False, timeout=None)  # noqa: S113 - the guard keeps the time
        self.ollama = ollama.AsyncClient(host=str(url), transport=guard, trust_env=False, follow_redirects=False)

    async def json(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, empty: bool = False
    ) -> dict[str, Any]:
        """Ask for a JSON object; nothing at all is one too where it may be `empty`."""
        return _object((await self.http.request(method, path, json=body)).content, empty=empty)

    async def upload(self, path: str, file: Path) -> None:
        """Send a file, however long that takes while it goes on."""
        await self.http.post(path, content=_ablocks(file), headers=_length(file))

    async def close(self) -> None:
        await self.http.aclose()
        await self.ollama.close()  # type: ignore[no-untyped-call] # the package is only partly typed


def _length(file: Path) -> dict[str, str]:
    return {"content-length": str(file.stat().st_size)}


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            current().clock.enter("first_token")  # It counts from the last block that went out.
            yield block


async def _ablocks(file: Path) -> AsyncIterator[bytes]:
    async with await anyio.open_file(file, "rb") as stream:
        while block := await stream.read(BLOCK):
            current().clock.enter("first_token")
            yield block


def request_headers(settings: Settings, url: httpx.URL) -> dict[str, str | None]:
    """The headers of every request. A secret goes over https or to loopback, and nowhere else.

    The official client would send `OLLAMA_API_KEY` to any host, so the header is always set or taken out here.
    """
    safe = url.scheme == "https" or is_loopback(url.host)
    headers: dict[str, str | None] = {"authorization": None}
    if settings.api_key is not None and safe:
        headers["authorization"] = f"Bearer {settings.api_key.get_secret_value()}"
    for name, value in settings.headers.items():
        if safe or not SECRET_HEADER.search(name):
            headers[name.lower()] = value.get_secret_value()
    return headers


# --- Streams ---------------------------------------------------------------------------------------------------------


class Lines(Iterator[T]):
    """The parts of a streamed answer, each read inside its exchange."""

    def __init__(self, of: Exchange, parts: Iterator[T]) -> None:
        self._of = of
        self._parts = parts

    def __next__(self) -> T:
        with exchange(self._of), typed():
            return next(self._parts)

    def first(self) -> T:
        """The first part, or an error that says there is none; whatever fails, the connection is given back."""
        try:
            part = self.next()
            if part is None:
                raise _empty()
        except BaseException:
            self.close()
            raise
        return part

    def next(self) -> T | None:
        """The next part; None at the end."""
        return next(self, None)

    def drain(self) -> None:
        """Read the end of the body, so that the connection can be used again; whatever is there is not wanted."""
        self._of.clock.deadline = time.monotonic() + DRAIN
        with contextlib.suppress(GraftageError):
            self.next()

    def close(self) -> None:
        close = getattr(self._parts, "close", None)
        if close is not None:
            close()


class AsyncLines(AsyncIterator[T]):
    """The same for asyncio."""

    def __init__(self, of: Exchange, parts: AsyncIterator[T]) -> None:
        self._of = of
        self._parts = parts

    async def __anext__(self) -> T:
        with exchange(self._of), typed():
            return await anext(self._parts)

    async def first(self) -> T:
        try:
            part = await self.next()
            if part is None:
                raise _empty()
        except BaseException:
            await self.close()
            raise
        return part

    async def next(self) -> T | None:
        return await anext(self, None)

    async def drain(self) -> None:
        self._of.clock.deadline = time.monotonic() + DRAIN
        with contextlib.suppress(GraftageError):
            await self.next()

    async def close(self) -> None:
        close = getattr(self._parts, "aclose", None)
        if close is not None:
            await close()


def _empty() -> StreamInterrupted:
    return StreamInterrupted("The server sent an empty answer.", retryable=True, hint="Ask again.")


def checked_line(line: bytes, whole: bool, refuse: Callable[[int, Mapping[str, str], bytes], ProviderError]) -> bytes:
    """A line of a stream: an object, and not an error."""
    if not line.lstrip().startswith(b"{"):
        raise ProtocolError(
            "The stream holds a line that is no JSON object.", hint="Is it another service? Check `host`."
        )
    if b'"error"' in line:
        found = _parsed(line)
        if isinstance(found, dict) and "error" in found:
            raise refuse(200, {}, line)
        if found is None and line.rstrip().endswith(b'"}'):
            # Some paths of the server write the error right after an unfinished object.
            raise refuse(200, {}, line[line.rindex(b"{") :])
    if not whole and not _is_json(line):
        raise StreamInterrupted("The stream ended in the middle of a line.", retryable=True, hint="Ask again.")
    return line


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _is_json(data: bytes) -> bool:
    return _parsed(data) is not None


def _object(data: bytes, *, empty: bool = False) -> dict[str, Any]:
    if empty and not data:
        return {}
    found = _parsed(data)
    if not isinstance(found, dict):
        raise ProtocolError("The answer is no JSON object.", hint="Is it another service? Check `host`.")
    if "error" in found:
        # Some proxies, and old servers once they had begun, say 200 to that too.
        raise current().refuse(200, {}, data)
    return found


class typed:  # noqa: N801 - reads as a word in a `with`
    """Lets no foreign error out: what the transport has not typed is an answer that cannot be read."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, (GraftageError, StopIteration, StopAsyncIteration)):
            raise _foreign(error) from error


def _foreign(error: Exception) -> ProviderError:
    if isinstance(error, httpx.InvalidURL):
        return ConnectionFailed(f"The address cannot be used: {error}.", retryable=False, hint="Check `host`.")
    return ProtocolError(
        f"The answer is not what Ollama's API promises ({type(error).__name__}).",
        hint="Is it another service, or a proxy's page? Check `host`.",
        details={"reason": reason(error)},
    )
