"""Waiting for what other threads, processes and the garbage collector do."""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def soon(truth: Callable[[], Any], seconds: float = 60.0) -> bool:
    """Return whether something becomes true in time. What is not true at once may wait for the garbage collector."""
    begun = time.monotonic()
    pause = 0.002
    while not truth():
        if time.monotonic() - begun > seconds:
            return bool(truth())
        time.sleep(pause)
        if pause > 0.01:
            gc.collect()
        pause = min(2 * pause, 0.05)
    return True
