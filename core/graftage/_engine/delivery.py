"""Deliver events to observers, which may block: in a thread of ours, from a queue of limited length."""

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
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from graftage._engine.threads import start

if TYPE_CHECKING:
    from graftage.calls import Event

__all__ = ["Delivery", "flush"]

Report = Callable[["Event"], None]
Wait = Callable[["Future[None]", float], Awaitable[None]]
MAX_QUEUED: Final = 4096
"""The events that a client may queue. A call that begins while the queue is full reports none of its events."""
FLUSH_TIMEOUT: Final = 0.5
"""Seconds that a client's end waits for its observers, counted from when they got the event that they have now."""


class Delivery:
    """Delivers events to the observers of one client, one at a time, in a thread of ours: no call waits for them.

    The thread is one of those that are kept, and is taken only while events are queued.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[_CallEvents, Event] | Future[None]] = deque()
        self._worker_lock = threading.Lock()
        """Held while a thread delivers."""
        self._take_lock = threading.Lock()
        """Held while something is taken from the queue."""
        self._since = 0.0
        """When the observers got the event that they have now."""

    def register(self) -> None:
        """Register to be flushed when the process ends and emptied after a fork."""
        with _all_lock:
            _all.add(self)
        _flush_at_exit()

    def reset(self) -> None:
        """Forget, after a fork, what is queued: the parent delivers it, and the thread is the parent's."""
        self._queue.clear()
        self._worker_lock, self._take_lock = threading.Lock(), threading.Lock()

    @property
    def full(self) -> bool:
        """Whether as many events are queued as may be."""
        return len(self._queue) >= MAX_QUEUED

    def for_call(self, report: Report, drop: Report) -> Report:
        """Return what takes the events of one call: all of them are passed to `report`, or all to `drop`.

        Args:
            report: passes an event to the observers; is called in our thread, and must not raise.
            drop: counts an event that observers do not get.
        """
        return drop if self.full else _CallEvents(self, report, drop)

    def put(self, item: tuple[_CallEvents, Event] | Future[None]) -> None:
        """Queue an event, or a future that is done when all before it are delivered."""
        self._queue.append(item)
        if self._worker_lock.acquire(blocking=False):
            self._since = time.monotonic()
            try:
                start(self._deliver_all)
            except RuntimeError:  # There are no more threads: the next event tries again.
                self._worker_lock.release()

    def _deliver_all(self) -> None:
        while True:
            try:
                with self._take_lock:
                    item = self._queue.popleft()
                    if not isinstance(item, Future):
                        item[0].begun = True
            except IndexError:
                self._worker_lock.release()
                # Something may have been queued before the lock was released.
                if not (self._queue and self._worker_lock.acquire(blocking=False)):
                    return
                continue
            self._since = time.monotonic()
            if isinstance(item, Future):
                item.set_result(None)
            else:
                call, event = item
                call.context.run(call.report, event)

    def delivered(self) -> Future[None]:
        """Return a future that is done when all events so far are delivered."""
        done: Future[None] = Future()
        if self._queue or self._worker_lock.locked():
            self.put(done)
        else:
            done.set_result(None)
        return done

    async def close(self, wait: Wait) -> None:
        """Wait for a short while until everything is delivered, then drop the rest.

        If the observers are slow, but not stuck, a call of which they have an event is delivered to its end.
        """
        done = self.delivered()
        if done.done():
            return
        try:
            await wait(done, self._since + FLUSH_TIMEOUT)
        except TimeoutError:
            self._drop_queued(stuck=time.monotonic() - self._since > FLUSH_TIMEOUT / 2)

    def _drop_queued(self, *, stuck: bool) -> None:
        _all.discard(self)  # The end of the process need not wait once more.
        kept: list[tuple[_CallEvents, Event] | Future[None]] = []
        dropped: list[tuple[_CallEvents, Event]] = []
        with self._take_lock:
            with contextlib.suppress(IndexError):  # There are no more.
                while True:
                    item = self._queue.popleft()
                    if isinstance(item, Future) or (item[0].begun and not stuck):
                        kept.append(item)
                    else:
                        dropped.append(item)
            self._queue.extendleft(reversed(kept))
            for call, event in dropped:
                call.drop(event)


@dataclass(slots=True)
class _CallEvents:
    """Queues the events of one call, to be reported with the context variables of its caller."""

    delivery: Delivery
    report: Report
    count_dropped: Report
    context: Context = field(default_factory=copy_context)
    begun: bool = False
    """Whether the observers have one of them."""
    dropped: bool = False
    """Whether one of them is dropped, and so those that follow."""

    def __call__(self, event: Event) -> None:
        # A pull has any number of steps, and each repeats the state so far: dropping some loses nothing.
        if self.dropped or (event.kind.endswith("progress") and self.delivery.full):
            self.count_dropped(event)
        else:
            self.delivery.put((self, event))

    def drop(self, event: Event) -> None:
        """Count an event instead of reporting it, and do so with those that follow."""
        self.dropped = True
        self.count_dropped(event)


_all: weakref.WeakSet[Delivery] = weakref.WeakSet()
_all_lock = threading.Lock()


def flush(timeout: float = FLUSH_TIMEOUT) -> None:
    """Wait until all observers of this process have all events so far, for at most so many seconds."""
    with _all_lock:
        found = list(_all)
    wait([each.delivered() for each in found], timeout)


@functools.cache
def _flush_at_exit() -> None:
    atexit.register(flush)


def _reset_all() -> None:
    """After a fork: the threads are the parent's, and one of them may have held the lock."""
    global _all_lock  # noqa: PLW0603 - one lock for the process
    _all_lock = threading.Lock()
    for each in _all:
        each.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)
