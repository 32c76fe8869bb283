"""Remembers for a few seconds how well a provider is."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

from graftage.types import Health

__all__ = ["HealthCache"]

FRESH = 5.0
"""Seconds for which a good result is used again."""
FRESH_FAILURE = 1.0
"""Seconds for which a bad one is: a restart must show soon."""
Key = tuple[str, str | None]


class HealthCache:
    """Results by level and model. A call that fails drops them all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Key, tuple[float, Health]] = {}
        self.generation = 0
        """How often everything was forgotten."""

    def get(self, key: Key, max_age: float | None) -> Health | None:
        """Return a result that is fresh enough, in seconds; by default 5, and 1 for a failure."""
        known = self._known.get(key)
        if known is None:
            return None
        measured, health = known
        age = time.monotonic() - measured
        limit = max_age if max_age is not None else FRESH if health.ok else FRESH_FAILURE
        return replace(health, cached=True, age=age) if age <= limit else None

    def put(self, key: Key, health: Health, generation: int) -> None:
        """Remember a result, unless a call has failed since the check began: that call knows better."""
        with self._lock:
            if generation == self.generation:
                self._known[key] = (time.monotonic(), health)

    def drop(self) -> None:
        """Forget everything: a call has failed, or the models have changed."""
        with self._lock:
            self._known.clear()
            self.generation += 1
