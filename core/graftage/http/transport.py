"""The interface below the toolkit: send a request, get status, headers and pieces of bytes.

Implementations are the network, a cassette, and what a host passes as the setting `transport`. The methods are always
coroutines; those for a sync client block and never suspend.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    from pathlib import Path

    from graftage.http.clock import Clock

__all__ = ["Colour", "Headers", "Request", "Response", "Transport", "Wrapper"]

_END: Final = re.compile("[/?#]")
Colour: TypeAlias = Literal["sync", "async"]
Headers: TypeAlias = tuple[tuple[str, str], ...]
"""Pairs of names in lower case and values, in order; a name may occur several times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One HTTP request."""

    method: str
    url: str
    headers: Headers = ()
    body: bytes = b""
    file: Path | None = None
    """Sent instead of `body`, in pieces."""
    context: Mapping[str, object] = field(default_factory=dict, repr=False)
    """For a provider's own transport; it is not sent."""

    @property
    def target(self) -> str:
        """Path and query, without the fragment, which is not sent."""
        found = self.url[len(self.origin) :].partition("#")[0]
        return found if found.startswith("/") else f"/{found}"

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        begin = self.url.find("://") + 3
        found = _END.search(self.url, begin)
        return self.url[: found.start()] if found else self.url


class Response(Protocol):
    """A response whose head has come."""

    status: int
    reason: str
    headers: Headers

    async def read(self) -> bytes:
        """Return the next piece of the body; empty at its end.

        Raises:
            ProviderTimeout: a limit passed.
            StreamInterrupted: the connection broke.
        """
        ...

    async def close(self) -> None:
        """Give the connection back if the body was read to its end, else drop it. Safe to call twice."""
        ...


class Transport(Protocol):
    """A sender of requests."""

    colour: Colour | None
    """The clients it serves; None for both."""

    async def send(self, request: Request, clock: Clock) -> Response:
        """Send a request and wait for the head of its response.

        Raises:
            ConnectionFailed: the server could not be reached, or the connection broke before the head came.
            ProviderTimeout: a limit passed.
            ProtocolError: the response is not HTTP.
        """
        ...

    async def close(self) -> None:
        """Close every connection."""
        ...


class Wrapper(Protocol):
    """A value for the setting `transport`, between a provider and the network."""

    def wrap(self, network: Callable[[], Transport]) -> Transport:
        """Return the transport to use. A replay never calls `network`, so it makes no connection."""
        ...


def header(headers: Iterable[tuple[str, str]], name: str) -> str | None:
    """Return the first value of a header, or None."""
    return next((value for each, value in headers if each == name), None)


class ReadResponse:
    """A response that has been read."""

    def __init__(self, status: int, reason: str, headers: Headers, body: bytes) -> None:
        self.status, self.reason, self.headers = status, reason, headers
        self._body = body

    async def read(self) -> bytes:
        """Return the whole body, then nothing."""
        body, self._body = self._body, b""
        return body

    async def close(self) -> None:
        """Do nothing: the connection is given back already."""


async def read_all(response: Response, limit: int) -> tuple[bytes, bool]:
    """Return the body, and whether it is within the limit. Reading stops beyond it."""
    pieces: list[bytes] = []
    size = 0
    while piece := await response.read():
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            return b"".join(pieces), False
    return b"".join(pieces), True
