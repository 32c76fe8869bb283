"""The four time limits of a call, for reads and writes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graftage.calls import Call
    from graftage.exceptions import ProviderTimeout
    from graftage.types import Phase

__all__ = ["Clock"]


class Clock:
    """The time limit of a call that runs now."""

    __slots__ = ("_call", "deadline", "idle", "patient", "phase", "until")

    def __init__(self, call: Call, *, patient: bool = False) -> None:
        self._call = call
        self.deadline = call.deadline
        self.idle = call.timeouts.idle
        """Seconds between two items."""
        self.patient = patient
        """Whether the idle limit restarts with each whole item, not with each piece."""
        self.enter("connect")

    def enter(self, phase: Phase) -> None:
        """Start the limit of a phase."""
        self.phase = phase
        self.until = time.monotonic() + float(getattr(self._call.timeouts, phase))

    def sent(self) -> None:
        """Start the limit for the first token when the request is sent, unless it runs already."""
        if self.phase == "connect":
            self.enter("first_token")

    def read(self) -> None:
        """Restart the idle limit at each read, so that a slow reader is not late."""
        if self.phase == "idle":
            self.until = time.monotonic() + self.idle

    def left(self) -> float:
        """Return the seconds until the nearest limit.

        Raises:
            ProviderTimeout: it has passed.
        """
        left = min(self.until, self.deadline) - time.monotonic()
        if left <= 0:
            raise self.expired()
        return left

    def expired(self) -> ProviderTimeout:
        """Return the error for the limit that passed, or passes next."""
        return self._call.timed_out("total" if self.deadline <= self.until else self.phase)
