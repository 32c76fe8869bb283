"""Threads for code that may block: plugins, and plain hooks of a provider.

They are daemons, and kept for the next piece of work. One that hangs is left behind: it holds up neither the others nor
the end of the process, as a worker of `asyncio.to_thread` would.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from contextvars import copy_context
from queue import Empty, SimpleQueue
from typing import Any, Final, Generic, TypeVar

__all__ = ["Items", "RaisedInThread", "start", "submit"]

T = TypeVar("T")
MAX_IDLE: Final = 8
"""Idle threads that wait for more work."""
MAX_AHEAD: Final = 16
"""Items that a provider may make before the caller asks for them."""

Work = Callable[[], None]


class RaisedInThread(RuntimeError):
    """What a function raised would end what waits for it. That is the cause."""


class _Threads:
    """Passes each piece of work to an idle thread, or to a new one."""

    def __init__(self) -> None:
        self._idle: list[SimpleQueue[Work]] = []
        self._lock = threading.Lock()

    def start(self, work: Work) -> None:
        """Do the work, which must not raise, in a thread."""
        with self._lock:
            inbox = self._idle.pop() if self._idle else None
        if inbox is None:
            inbox = SimpleQueue()
            threading.Thread(target=self._serve, args=(inbox,), name="graftage", daemon=True).start()
        inbox.put(work)

    def _serve(self, inbox: SimpleQueue[Work]) -> None:
        while True:
            inbox.get()()
            with self._lock:
                if len(self._idle) >= MAX_IDLE:
                    return
                self._idle.append(inbox)


_threads = _Threads()


def _reset() -> None:
    """After a fork: the threads are the parent's."""
    global _threads  # noqa: PLW0603 - one pool for the process
    _threads = _Threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)


def start(work: Work) -> None:
    """Do the work, which must not raise, in a thread.

    Raises:
        RuntimeError: the system has no more threads.
    """
    _threads.start(work)


def submit(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Call a function in a thread, with the context variables of the caller."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # So that `cancel` has no effect.
    context = copy_context()

    def work() -> None:
        try:
            result = context.run(function, *arguments)
        except BaseException as error:  # noqa: BLE001 - raised where the result is awaited
            future.set_exception(_raisable(error))
        else:
            future.set_result(result)

    start(work)
    return future


def _raisable(error: BaseException) -> BaseException:
    """Return the error, or an ordinary one in its place if it would end what waits for it.

    `StopIteration` would, too: a coroutine cannot raise it, and asyncio's futures refuse it.
    """
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    wrapped = RaisedInThread(f"a function raised {type(error).__name__}")
    wrapped.__cause__ = error
    return wrapped


class Items(Generic[T]):
    """The items of an iterator, which one thread reads from start to end into a bounded queue.

    The thread closes the iterator itself, so it is never used by two threads at once.
    """

    def __init__(self, make: Callable[[], Iterator[T]], around: AbstractContextManager[None]) -> None:
        """Start the work.

        Args:
            make: makes the iterator, in the thread.
            around: a context for the iterator's code.
        """
        self._around = around
        self._lock = threading.Lock()
        self._ready: deque[T] = deque()
        self._failure: BaseException | None = None
        self.available: Future[None] = Future()
        """Is done when `take` has a result; replaced when it has taken the last item."""
        self._free_places = threading.Semaphore(MAX_AHEAD)
        self._stopped = False
        self._done = False
        self.ended = submit(self._run, make)
        """Is done when the thread has closed the iterator."""

    def take(self) -> T | None:
        """Return the next item, or None after the last one. Raise what the iterator raised, once.

        Raises:
            queue.Empty: another reader was faster.
        """
        with self._lock:
            if self._ready:
                item = self._ready.popleft()
                if not (self._ready or self._done):
                    self.available = Future()
                self._free_places.release()
                return item
            if not (self._done or self._stopped):
                raise Empty
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return None

    def stop(self) -> None:
        """Make the thread close the iterator after its current item; a pending `take` returns None."""
        self._stopped = True
        self._free_places.release()
        self._wake()

    def _run(self, make: Callable[[], Iterator[T]]) -> None:
        try:
            with self._around:
                self._hand_over(make())
        except BaseException as error:  # noqa: BLE001 - raised where the item is awaited
            self._failure = _raisable(error)
        finally:
            with self._lock:
                self._done = True
            self._wake()

    def _hand_over(self, iterator: Iterator[T]) -> None:
        try:
            for item in iterator:
                self._free_places.acquire()
                if self._stopped:
                    return
                with self._lock:
                    self._ready.append(item)
                self._wake()
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    def _wake(self) -> None:
        with self._lock:
            if not self.available.done():
                self.available.set_result(None)
