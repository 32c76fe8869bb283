"""The one seam below the toolkit: send a request, get a status, headers and pieces of bytes.

Three things implement it: the network, a cassette, and whatever a host hands in as the setting `transport`. Its methods
are coroutines in both colours: one of a sync client blocks and never suspends.
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
"""Names in lower case and values, in their order; a name may come several times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One HTTP request."""

    method: str
    url: str
    headers: Headers = ()
    body: bytes = b""
    file: Path | None = None
    """Is sent instead of `body`, in pieces."""
    context: Mapping[str, object] = field(default_factory=dict, repr=False)
    """What a provider's own transport needs to know; it is not sent."""

    @property
    def target(self) -> str:
        """Path and query, without a fragment, which is not sent."""
        found = self.url[len(self.origin) :].partition("#")[0]
        return found if found.startswith("/") else f"/{found}"

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        begin = self.url.find("://") + 3
        found = _END.search(self.url, begin)
        return self.url[: found.start()] if found else self.url


class Response(Protocol):
    """An answer whose head has come."""

    status: int
    reason: str
    headers: Headers

    async def read(self) -> bytes:
        """The next piece of the body; empty at its end.

        Raises:
            ProviderTimeout: a limit of the clock passed.
            StreamInterrupted: the connection broke.
        """
        ...

    async def close(self) -> None:
        """Give the connection back where the body was read to its end, else drop it. Safe to call twice."""
        ...


class Transport(Protocol):
    """Sends requests."""

    colour: Colour | None
    """Which clients it serves; None for both."""

    async def send(self, request: Request, clock: Clock) -> Response:
        """Send a request and wait for the head of its answer.

        Raises:
            ConnectionFailed: it could not be reached, or the connection broke before the head was there.
            ProviderTimeout: a limit of the clock passed.
            ProtocolError: what answers does not speak HTTP.
        """
        ...

    async def close(self) -> None:
        """Close every connection."""
        ...


class Wrapper(Protocol):
    """What the setting `transport` takes: something that stands between a provider and the network."""

    def wrap(self, network: Callable[[], Transport]) -> Transport:
        """The transport to use; a replay never calls `network`, so that no connection is ever made."""
        ...


def header(headers: Iterable[tuple[str, str]], name: str) -> str | None:
    """The first value of a header."""
    return next((value for each, value in headers if each == name), None)


async def read_all(response: Response, limit: int) -> tuple[bytes, bool]:
    """The whole body, and whether it is within the limit; reading stops beyond it."""
    pieces: list[bytes] = []
    size = 0
    while piece := await response.read():
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            return b"".join(pieces), False
    return b"".join(pieces), True
