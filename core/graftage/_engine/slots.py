"""Slots: how many requests of a server run at once, and which wait, over all clients of the process."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass

from graftage.exceptions import Overloaded, RequestRejected
from graftage.types import canonical_name

__all__ = ["Slots", "any_of", "holding", "slots_for"]


@dataclass(slots=True)
class _Waiter:
    granted: Future[None]
    limit: int | None


GRANTED: Future[None] = Future()
"""The future of all requests that need not wait: making one is slow."""
GRANTED.set_result(None)


class _Move(Future[None]):
    """Is done when some request stops using its model."""


class _Locked:
    """A block that holds the lock, and afterwards counts what was given back in the meantime."""

    __slots__ = ("_slots",)

    def __init__(self, slots: Slots) -> None:
        self._slots = slots

    def __enter__(self) -> None:
        self._slots.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._slots.lock.release()
        self._slots.settle()


class Slots:
    """The slots of one server, its models in use, and the policies' lock, shared by all clients of the process.

    Threads and tasks wait in one fair queue.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._waiting: deque[_Waiter] = deque()
        self._models: Counter[str] = Counter()
        self._movers: list[_Move] = []
        self._policy_lock: Slots | None = None
        self.running = 0
        self._returns: deque[str | None] = deque()
        """Slots (None) and models that were given back and are not counted yet. `__del__` of a stream may run while its
        own thread holds the lock, so giving back never waits for the lock: the next holder counts it."""

    @property
    def policy_lock(self) -> Slots:
        """Policies decide about one request at a time: two requests must not both get the last free gigabyte."""
        with self.lock:
            if self._policy_lock is None:
                self._policy_lock = Slots()
            return self._policy_lock

    def locked(self) -> _Locked:
        """Return a block that holds the lock."""
        return _Locked(self)

    def settle(self) -> None:
        while self._returns and self.lock.acquire(blocking=False):
            movers: list[_Move] = []
            try:
                while self._returns:
                    model = self._returns.popleft()
                    if model is None:
                        self.running -= 1
                    else:
                        self._models[model] -= 1
                        movers += self._movers
                        self._movers = []
                self._grant()
            finally:
                self.lock.release()
            for moved in movers:
                if moved.set_running_or_notify_cancel():
                    moved.set_result(None)

    def enter(self, limit: int | None, queued: int | None = None) -> Future[None]:
        """Ask for a slot; the future is done when it is granted.

        A caller that stops waiting must call `withdraw`; one that was granted a slot must call `leave`.

        Raises:
            Overloaded: more than `queued` are waiting already.
        """
        with self.locked():
            if not (self._waiting or self._full(limit)):
                self.running += 1
                return GRANTED
            waiter = _Waiter(Future(), limit)
            if queued is not None and self._full(limit) and len(self._waiting) >= queued:
                raise Overloaded(
                    f"{self.running} requests are running and {len(self._waiting)} are waiting; no more may wait.",
                    hint="Ask again later, or raise the policy's `queued_requests`.",
                )
            self._waiting.append(waiter)
            self._grant()
        return waiter.granted

    def withdraw(self, granted: Future[None]) -> None:
        """Stop waiting; a slot that was granted in the meantime is given back."""
        if isinstance(granted, _Move):
            with self.locked(), contextlib.suppress(ValueError):
                self._movers.remove(granted)
        elif not granted.cancel():
            self.leave()
        else:
            with self.locked():
                self._waiting = deque(each for each in self._waiting if each.granted is not granted)
                self._grant()

    def leave(self) -> None:
        """Give a slot back."""
        self._returns.append(None)
        self.settle()

    def use(self, model: str, change: int) -> None:
        """Note that a request starts (1) or stops (-1) using a model."""
        if change < 0:
            self._returns.append(model)
            self.settle()
        else:
            with self.locked():
                self._models[model] += change

    def in_use(self) -> dict[str, int]:
        """Return the models that requests use or will use, with the number of requests."""
        with self.locked():
            return {model: count for model, count in self._models.items() if count > 0}

    def busy(self, models: Iterable[str]) -> bool:
        """Whether requests use one of these models, in any spelling."""
        return any_of(models, self.in_use())

    def moved(self) -> Future[None]:
        """Return a future that is done when some request stops using its model; `withdraw` it when done with it."""
        moved = _Move()
        with self.locked():
            self._movers.append(moved)
        return moved

    def _full(self, limit: int | None) -> bool:
        return limit is not None and self.running >= max(limit, 1)

    def _grant(self) -> None:
        while self._waiting and not self._full(self._waiting[0].limit):
            waiter = self._waiting.popleft()
            if waiter.granted.set_running_or_notify_cancel():
                self.running += 1
                waiter.granted.set_result(None)


def any_of(models: Iterable[str], among: Iterable[str]) -> bool:
    """Whether one of these models is among others, in any spelling."""
    others = {canonical_name(each) for each in among}
    return any(canonical_name(each) in others for each in models)


_held: ContextVar[tuple[Slots, ...]] = ContextVar("graftage_held", default=())
"""The locks that this piece of code holds: to wait for one of them again would never end."""


@contextlib.contextmanager
def holding(lock: Slots, problem: str) -> Iterator[None]:
    """Run a block of a plugin's or host's code while its caller holds a lock.

    Raises:
        RequestRejected: the block tries to take the lock again.
    """
    if lock in _held.get():
        raise RequestRejected(problem, hint="Do it after the current call has returned.")
    token = _held.set((*_held.get(), lock))
    try:
        yield
    finally:
        _held.reset(token)


_LOOPBACK = re.compile(r"(?<=//)(localhost|\[::1\])(?=[:/]|$)")
"""Other names of this machine."""
_slots: dict[tuple[str, str], Slots] = {}
_slots_lock = threading.Lock()


def slots_for(provider: str, address: str) -> Slots:
    """Return the slots of a server, which all clients of the process share."""
    slots = _slots.get((provider, address))
    if slots is None:
        with _slots_lock:
            slots = _slots.setdefault((provider, _LOOPBACK.sub("127.0.0.1", address)), Slots())
            _slots[provider, address] = slots
    return slots


def _forget_all() -> None:
    """After a fork: the running calls are the parent's."""
    global _slots_lock  # noqa: PLW0603 - another thread may have held it at the fork
    _slots_lock = threading.Lock()
    _slots.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
