"""What a cassette holds: requests and their responses, and the errors about them."""

from __future__ import annotations

import urllib.parse
from collections import UserDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from graftage.exceptions import GraftageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from graftage.types import Phase

__all__ = ["CassetteError", "CassetteMiss", "Fault", "Interaction", "Recorded", "RecordedRequest", "address_of"]


class CassetteError(GraftageError):
    """A cassette cannot be read, or must not be written."""


class CassetteMiss(CassetteError):
    """The cassette does not hold a request, or has already replayed it."""


class HeaderDict(UserDict[str, str]):
    """Headers by their names, which are compared without case."""

    def __setitem__(self, name: str, value: str) -> None:
        super().__setitem__(name.lower(), value)

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name.lower())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and super().__contains__(name.lower())


@dataclass(kw_only=True)
class RecordedRequest:
    """A request, with the attributes of vcrpy's, so that matchers and scrubbers written for vcrpy work on it."""

    method: str
    uri: str
    """The address as it is sent, without a user, a password and a fragment."""
    headers: HeaderDict = field(default_factory=HeaderDict)
    body: bytes = b""

    @property
    def parsed_uri(self) -> urllib.parse.SplitResult:
        """The parts of the address."""
        return urllib.parse.urlsplit(self.uri)

    @property
    def scheme(self) -> str:
        """`http` or `https`; `graftage` for a request to a provider."""
        return self.parsed_uri.scheme

    @property
    def host(self) -> str:
        """The host's name or address."""
        return self.parsed_uri.hostname or ""

    @property
    def port(self) -> int | None:
        """The port, also if it is the scheme's own."""
        return self.parsed_uri.port or {"http": 80, "https": 443}.get(self.scheme)

    @property
    def path(self) -> str:
        """The path, without the query."""
        return self.parsed_uri.path

    @property
    def query(self) -> list[tuple[str, str]]:
        """Names and values of the query, sorted."""
        return sorted(urllib.parse.parse_qsl(self.parsed_uri.query, keep_blank_values=True))

    @property
    def target(self) -> str:
        """Path and query."""
        parts = self.parsed_uri
        return f"{parts.path}?{parts.query}" if parts.query else parts.path


FaultKind: TypeAlias = Literal["refused", "reset", "timeout", "cut", "invalid"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """How an exchange failed."""

    kind: FaultKind
    """`refused`: no connection; `reset`: it broke before a response; `cut`: it broke in the body; `timeout`: a limit
    passed; `invalid`: what came is not HTTP."""
    message: str
    retryable: bool
    phase: Phase | None = None
    """Which limit passed, if the kind is `timeout`."""
    cause: str | None = None
    """`details["cause"]` of the error, such as `dns`."""
    answered: bool = False
    """Whether a response had begun."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """When and from what an interaction was recorded, as far as that is known."""

    date: str | None = None
    """The day, such as `2026-11-28`."""
    client: str | None = None
    """Such as `graftage 0.2.0`."""
    server: str | None = None
    """Such as `Ollama 0.9.3`."""
    model: str | None = None
    digest: str | None = None
    """The model's digest."""


@dataclass(frozen=True, kw_only=True)
class Interaction:
    """A request and its response."""

    request: RecordedRequest
    status: int
    """The status; 0 if no response came."""
    reason: str = ""
    headers: Mapping[str, list[str]] = field(default_factory=dict)
    chunks: tuple[bytes, ...] = ()
    """The body in the pieces in which it arrived."""
    times: tuple[float, ...] = ()
    """Seconds from the request to each chunk; empty if they are unknown."""
    fault: Fault | None = None
    """How the exchange failed, after the chunks."""
    stopped: bool = False
    """Whether the reader stopped before the end. Replayed as a whole response."""
    recorded: Recorded = Recorded()
    allow: tuple[Mapping[str, str], ...] = ()
    """What may be in the whole file although it looks like a secret: `why`, and `sha256` or `place`."""

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(self.chunks)


_UNQUOTED: Final = "/?%:@!$&'()*+,;=~"
"""Characters that are not quoted in paths and queries, besides letters, digits and `-._`."""


def address_of(uri: str) -> str:
    """Return a URL as it is sent, without a user, a password and a fragment.

    Raises:
        ValueError: it is not a URL.
    """
    parts = urllib.parse.urlsplit(uri)
    query = f"?{parts.query}" if parts.query else ""
    target = urllib.parse.quote((parts.path or "/") + query, safe=_UNQUOTED)
    origin = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.scheme else ""
    return origin + target
