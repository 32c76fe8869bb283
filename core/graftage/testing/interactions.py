"""What a cassette holds: requests and their responses, and the errors about them."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from graftage.exceptions import GraftageError
from graftage.testing.matching import Key, canonical

if TYPE_CHECKING:
    from collections.abc import Mapping


class CassetteError(GraftageError):
    """A cassette cannot be read, or must not be written."""


class CassetteMiss(CassetteError):
    """The cassette does not hold a request, or has already replayed it."""


@dataclass
class Interaction:
    """A request and its response."""

    method: str
    target: str
    """Path and query."""
    request_headers: Mapping[str, list[str]]
    request_body: bytes
    status: int
    reason: str
    headers: Mapping[str, list[str]]
    chunks: list[bytes] = field(default_factory=list)
    cut_short: bool = False

    @property
    def key(self) -> Key:
        """What the request is matched by."""
        return self.method, self.target, canonical(self.request_body)


_UNQUOTED: Final = "/?%:@!$&'()*+,;=~"
"""Characters that are not quoted in paths and queries, besides letters, digits and `-._`."""


def target_of(uri: str) -> str:
    """Return the path and query of a URL as they are sent."""
    parts = urllib.parse.urlsplit(uri)
    query = f"?{parts.query}" if parts.query else ""
    return urllib.parse.quote((parts.path or "/") + query, safe=_UNQUOTED)
