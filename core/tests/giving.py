"""A provider whose connection the test brings along."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graftage.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable


class Giving:
    """A provider whose connection is made by a function of the request."""

    def __init__(self, make: Callable[[Any], Any], name: str = "giving") -> None:
        self.make = make
        self.name = name

    @hookimpl
    def connect(self, request: Any) -> Any:
        return self.make(request)
