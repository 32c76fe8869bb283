"""Recorded responses for requests that are not those of the recording."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from graftage.testing import Cassette
from graftage.testing.cassettes import Replayed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from graftage.http import Clock, Request, Response, Transport


class Answering:
    """A transport that gives recorded responses in turn to any request, and repeats the last one."""

    colour = None

    def __init__(self, *paths: Path) -> None:
        self.interactions = [interaction for path in paths for interaction in Cassette(path).interactions]
        self.requests: list[Request] = []

    def wrap(self, network: Callable[[], Transport]) -> Answering:
        return self

    async def send(self, request: Request, clock: Clock) -> Response:
        self.requests.append(request)
        clock.sent()
        return Replayed(self.interactions[min(len(self.requests), len(self.interactions)) - 1])

    async def close(self) -> None:
        pass

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The lines of the first response, read without the provider."""
        return [json.loads(line) for line in b"".join(self.interactions[0].chunks).splitlines()]
