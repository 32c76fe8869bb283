"""A provider for a connection of the test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graftage.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable


class Giving:
    """A provider that calls a function to make its connection."""

    def __init__(self, make: Callable[[Any], Any], name: str = "giving") -> None:
        self.make = make
        self.name = name

    @hookimpl
    def connect(self, request: Any) -> Any:
        return self.make(request)
