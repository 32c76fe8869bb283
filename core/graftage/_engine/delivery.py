"""Brings events to observers, which may block: in a thread of ours, from a queue that has an end."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, wait
from typing import Final, Protocol

from graftage._engine.threads import start

__all__ = ["Delivery", "flush"]

Wait = Callable[["Future[None]", float], Awaitable[None]]
MOST: Final = 4096
"""Events that may wait for a client's observers: of a call that begins behind so many, none is told."""
FLUSH: Final = 0.5
"""Seconds that an end waits until observers know everything, from when the event was begun that they are told now."""


class Told(Protocol):
    """What waits to be told."""

    @property
    def begun(self) -> bool:
        """Whether one of its call has been told, so that this one should be, too."""
        ...

    def begin(self) -> None:
        """Note that it is taken to be told."""
        ...

    def tell(self) -> None:
        """Tell it; must not raise."""
        ...

    def drop(self) -> None:
        """Count it instead, and those of its call that are still to come."""
        ...


class Delivery:
    """Tells the observers of one client, one event after the other, in a thread of ours: no call waits for them.

    The thread is one of those that are kept, and is taken only as long as there is something to tell.
    """

    def __init__(self) -> None:
        self._waiting: deque[Told | Future[None]] = deque()
        self._turn = threading.Lock()
        """Is held for the thread that tells."""
        self._taking = threading.Lock()
        """Is held while something is taken from what waits."""
        self._began = 0.0
        """When it began to tell what it tells now."""

    def begin(self) -> None:
        """Be flushed at the end of the process, and empty after a fork."""
        with _all_lock:
            _all.add(self)
        _flush_at_exit()

    def renew(self) -> None:
        """After a fork: what waits is told by the parent, whose thread it is."""
        self._waiting.clear()
        self._turn, self._taking = threading.Lock(), threading.Lock()

    @property
    def full(self) -> bool:
        """Whether more waits already than should."""
        return len(self._waiting) >= MOST

    def put(self, item: Told | Future[None]) -> None:
        """Tell an event after those that wait already, or note that they are told."""
        self._waiting.append(item)
        if self._turn.acquire(blocking=False):
            self._began = time.monotonic()
            try:
                start(self._tell_all)
            except RuntimeError:  # There are no more threads: the next event tries again.
                self._turn.release()

    def _tell_all(self) -> None:
        while True:
            try:
                with self._taking:
                    item = self._waiting.popleft()
                    if not isinstance(item, Future):
                        item.begin()
            except IndexError:
                self._turn.release()
                # Something may have been put there before the turn was given back.
                if not (self._waiting and self._turn.acquire(blocking=False)):
                    return
                continue
            self._began = time.monotonic()
            if isinstance(item, Future):
                item.set_result(None)
            else:
                item.tell()

    def told(self) -> Future[None]:
        """Is done when all that has happened so far is told."""
        done: Future[None] = Future()
        if self._waiting or self._turn.locked():
            self.put(done)
        else:
            done.set_result(None)
        return done

    async def close(self, wait: Wait) -> None:
        """Wait for a short while until everything is told; what is not told then is dropped.

        A call of which something has been told is told to its end where the observers are slow, and not stuck.
        """
        done = self.told()
        if done.done():
            return
        try:
            await wait(done, self._began + FLUSH)
        except TimeoutError:
            self._drop_waiting(stuck=time.monotonic() - self._began > FLUSH / 2)

    def _drop_waiting(self, *, stuck: bool) -> None:
        _all.discard(self)  # The end of the process need not wait once more.
        kept: list[Told | Future[None]] = []
        dropped: list[Told] = []
        with self._taking:
            with contextlib.suppress(IndexError):  # There are no more.
                while True:
                    item = self._waiting.popleft()
                    if isinstance(item, Future) or (item.begun and not stuck):
                        kept.append(item)
                    else:
                        dropped.append(item)
            self._waiting.extendleft(reversed(kept))
            for each in dropped:
                each.drop()


_all: weakref.WeakSet[Delivery] = weakref.WeakSet()
_all_lock = threading.Lock()


def flush(limit: float = FLUSH) -> None:
    """Wait until all observers of this process know what has happened so far, for so many seconds at most."""
    with _all_lock:
        found = list(_all)
    wait([each.told() for each in found], limit)


@functools.cache
def _flush_at_exit() -> None:
    atexit.register(flush)


def _renew() -> None:
    """After a fork: the threads are the parent's, and one of them may have held the lock."""
    global _all_lock  # noqa: PLW0603 - one lock for the process
    _all_lock = threading.Lock()
    for each in _all:
        each.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
