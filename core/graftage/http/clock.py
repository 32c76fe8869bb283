"""The four limits of a call, as what reads and writes keeps them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from graftage.calls import Call
    from graftage.exceptions import ProviderTimeout
    from graftage.types import Phase

__all__ = ["Clock"]


class Clock:
    """Which limit of a call runs now, and when it ends."""

    __slots__ = ("_call", "deadline", "first_token", "idle", "patient", "phase", "timer", "until")

    def __init__(self, call: Call, *, patient: bool = False) -> None:
        self._call = call
        self.deadline = call.deadline
        self.first_token = call.timeouts.first_token
        self.idle = call.timeouts.idle
        """Seconds between two items."""
        self.patient = patient
        """Whether the body comes in lines: its limit starts afresh with each whole one, not with each byte."""
        self.timer: asyncio.Timeout | None = None
        """Where async code waits for this clock: its end moves with the limit."""
        self.enter("connect")

    def enter(self, phase: Phase) -> None:
        """Start the limit of a phase afresh."""
        self.phase = phase
        now = time.monotonic()
        self.until = now + float(getattr(self._call.timeouts, phase))
        if self.timer is not None:
            # An event loop's clock is the monotonic one.
            self.timer.reschedule(max(min(self.until, self.deadline), now))

    def sent(self) -> None:
        """The request goes out: the time for the first token begins, unless it has."""
        if self.phase == "connect":
            self.enter("first_token")

    def left(self) -> float:
        """Seconds until the nearest limit; 0 or less when it has passed."""
        return min(self.until, self.deadline) - time.monotonic()

    def expired(self) -> ProviderTimeout:
        """The error for the limit that has passed, or that is the next to pass."""
        return self._call.timed_out("total" if self.deadline <= self.until else self.phase)
