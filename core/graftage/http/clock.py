"""The four limits of a call, as what reads and writes keeps them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graftage.calls import Call
    from graftage.exceptions import ProviderTimeout
    from graftage.types import Phase

__all__ = ["Clock"]


class Clock:
    """Which limit of a call runs now, and when it ends."""

    __slots__ = ("_call", "deadline", "idle", "patient", "phase", "until")

    def __init__(self, call: Call, *, patient: bool = False) -> None:
        self._call = call
        self.deadline = call.deadline
        self.idle = call.timeouts.idle
        """Seconds between two items."""
        self.patient = patient
        """Whether the body comes in items: its limit starts afresh with each whole one, not with each byte."""
        self.enter("connect")

    def enter(self, phase: Phase) -> None:
        """Start the limit of a phase afresh."""
        self.phase = phase
        self.until = time.monotonic() + float(getattr(self._call.timeouts, phase))

    def sent(self) -> None:
        """The request goes out: the time for the first token begins, unless it has."""
        if self.phase == "connect":
            self.enter("first_token")

    def read(self) -> None:
        """More of the body is asked for. The limit between two pieces counts from here: a reader may take its time."""
        if self.phase == "idle":
            self.until = time.monotonic() + self.idle

    def left(self) -> float:
        """Seconds until the nearest limit.

        Raises:
            ProviderTimeout: it has passed.
        """
        left = min(self.until, self.deadline) - time.monotonic()
        if left <= 0:
            raise self.expired()
        return left

    def expired(self) -> ProviderTimeout:
        """The error for the limit that has passed, or that is the next to pass."""
        return self._call.timed_out("total" if self.deadline <= self.until else self.phase)
