"""Remembers how well a provider is, for a little while, and lets callers at one time share one check."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from graftage.types import Health

__all__ = ["Flight", "HealthCache"]

FRESH = 5.0
"""Seconds that a good answer is believed."""
FRESH_FAILURE = 1.0
"""Seconds that a bad one is: long enough for callers at one time not to queue up, short enough to see a restart."""
Key = tuple[str, str | None]


@dataclass(slots=True)
class Flight:
    """A check under way."""

    key: Key
    cache: HealthCache
    generation: int
    mine: bool = True
    """Whether this caller makes the check; the others wait for `result`."""
    result: Future[Health | None] = field(default_factory=Future)

    def land(self, health: Health | None) -> None:
        """Give the answer to everybody who waits, and remember it; None where the check was given up."""
        self.cache.land(self, health)


class HealthCache:
    """Answers by level and model, on the monotonic clock. A call that failed drops them all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Key, tuple[float, Health]] = {}
        self._flights: dict[Key, Flight] = {}
        self._generation = 0

    def look(self, key: Key, max_age: float | None) -> Health | Flight:
        """A fresh answer, or a flight: one's own to make, or another caller's to wait for."""
        with self._lock:
            known = self._known.get(key)
            if known is not None:
                measured, health = known
                age = time.monotonic() - measured
                if age <= (max_age if max_age is not None else FRESH if health.ok else FRESH_FAILURE):
                    return replace(health, cached=True, age=age)
            flight = self._flights.get(key)
            if flight is not None:
                return replace(flight, mine=False)
            flight = self._flights[key] = Flight(key, self, self._generation)
            return flight

    def land(self, flight: Flight, health: Health | None) -> None:
        """End a flight."""
        with self._lock:
            self._flights.pop(flight.key, None)
            # A call that failed in the meantime knows better than a check that began before it.
            if health is not None and flight.generation == self._generation:
                self._known[flight.key] = (time.monotonic(), health)
        flight.result.set_result(health)

    def drop(self) -> None:
        """Forget everything: a call has failed, or the models have changed."""
        with self._lock:
            self._known.clear()
            self._generation += 1
