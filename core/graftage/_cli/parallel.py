"""Runs jobs at the same time, and leaves behind those that hang."""

import threading
import time
from collections.abc import Callable, Sequence

__all__ = ["run_all"]


def run_all(jobs: Sequence[Callable[[], object]], seconds: float) -> list[bool]:
    """Run each job in a thread of its own; return, for each, whether it ended in time."""
    # Daemon threads: a plugin that hangs must not keep the command from ending.
    threads = [threading.Thread(target=job, daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [not thread.is_alive() for thread in threads]
