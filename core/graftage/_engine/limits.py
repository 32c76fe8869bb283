"""Limits: merged from policies, clamped into requests, and held as slots until a call has ended."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from typing import Any

from graftage.exceptions import Overloaded, RequestRejected
from graftage.types import Limits, canonical_name

__all__ = ["Gate", "clamp", "gate_for", "merge"]

FIGURES = tuple(
    each.name
    for each in fields(Limits)
    if each.name not in ("keep_window", "unload", "wait_for", "reasons", "warnings")
)
"""The fields of which the smallest value wins."""


def merge(answers: Iterable[tuple[str, Limits]]) -> Limits | None:
    """The tightest value of each field, with its reason; None where nobody limits anything."""
    merged: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    unload: dict[str, None] = {}
    wait_for: dict[str, None] = {}
    warnings: list[str] = []
    answered = False
    for policy, limits in answers:
        answered = True
        unload.update(dict.fromkeys(limits.unload))
        wait_for.update(dict.fromkeys(limits.wait_for))
        warnings += limits.warnings
        for name in FIGURES:
            value = getattr(limits, name)
            if value is not None and (name not in merged or value < merged[name]):
                merged[name] = value
                if name == "context_window":
                    merged["keep_window"] = limits.keep_window
                reasons[name] = f"{policy}: {limits.reasons.get(name, 'no reason given')}"
    if not answered:
        return None
    return Limits(**merged, unload=tuple(unload), wait_for=tuple(wait_for), reasons=reasons, warnings=tuple(warnings))


def clamp(wanted: Mapping[str, Any], limits: Limits | None, *, force: bool = False) -> tuple[dict[str, Any], list[str]]:
    """What a request may have of what it wants, and what to say of the difference.

    A field that was left unset takes the limit; one that was set is lowered to it, or with `force` left as it is; the
    warning says which.
    """
    clamped = dict(wanted)
    warnings = list(limits.warnings) if limits else []
    for name, value in wanted.items():
        limit = getattr(limits, name, None)
        if limits is None or limit is None:
            continue
        if value is None:
            clamped[name] = limit
        elif name == "context_window" and limits.keep_window and value < limit and not force:
            clamped[name] = limit
            warnings.append(f"`{name}` was raised from {value:g} to {limit:g}: the model is loaded with it.")
        elif value > limit:
            reason = limits.reasons.get(name, "")
            what = f"stays at {value:g} by `force`, above" if force else f"was lowered from {value:g} to"
            warnings.append(f"`{name}` {what} {limit:g} ({reason}).")
            clamped[name] = value if force else limit
    return clamped, warnings


@dataclass(slots=True)
class _Waiter:
    granted: Future[None]
    limit: int | None


GRANTED: Future[None] = Future()
"""What who need not wait is given: a future is dear to make."""
GRANTED.set_result(None)


class _Move(Future[None]):
    """Waits for some request to stop using its model."""


class _Locked:
    """A block that holds a gate's lock, and books afterwards what was given back meanwhile."""

    __slots__ = ("_gate",)

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __enter__(self) -> None:
        self._gate.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._gate.lock.release()
        self._gate.settle()


class Gate:
    """Slots, models in use and the policies' lock of one server, shared by all clients of the process.

    Threads and tasks wait in one fair line.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._waiting: deque[_Waiter] = deque()
        self._models: Counter[str] = Counter()
        self._movers: list[_Move] = []
        self._policy_lock: Gate | None = None
        self.running = 0
        self._returns: deque[str | None] = deque()
        """Slots (None) and models given back and not yet booked. `__del__` of a stream may run within `with
        self.lock` of its own thread, so giving back never waits for the lock: whoever has it books it."""

    @property
    def policy_lock(self) -> Gate:
        """Policies are asked one request at a time, or two requests might each get the last free gigabyte."""
        with self.lock:
            if self._policy_lock is None:
                self._policy_lock = Gate()
            return self._policy_lock

    def locked(self) -> _Locked:
        """A block that holds the lock."""
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
        """Ask for a slot: the future is done when it is granted.

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
        """Stop waiting. A slot that was granted in the meantime is given back."""
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
        """Models that requests are using or will use, and how many requests."""
        with self.locked():
            return {model: count for model, count in self._models.items() if count > 0}

    def busy(self, models: Iterable[str]) -> bool:
        """Whether requests use one of these models, however it is spelt."""
        return named(models, self.in_use())

    def moved(self) -> Future[None]:
        """Is done when some request has stopped using its model; give it to `withdraw` when it is not needed."""
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


def named(models: Iterable[str], among: Iterable[str]) -> bool:
    """Whether one of these models is among others, however they are spelt."""
    others = {canonical_name(each) for each in among}
    return any(canonical_name(each) in others for each in models)


_inside: ContextVar[tuple[Gate, ...]] = ContextVar("graftage_inside", default=())
"""Gates of one place that this piece of code is within: whoever waits for one of them again waits for himself."""


@contextlib.contextmanager
def inside(gate: Gate, problem: str) -> Iterator[None]:
    """A block of a plugin's or host's code that runs while its caller holds the one place of a gate.

    Raises:
        RequestRejected: on entering it again from within, instead of waiting for ever.
    """
    if gate in _inside.get():
        raise RequestRejected(problem, hint="Ask when it is done, or from somewhere else.")
    token = _inside.set((*_inside.get(), gate))
    try:
        yield
    finally:
        _inside.reset(token)


_LOOPBACK = re.compile(r"(?<=//)(localhost|\[::1\])(?=[:/]|$)")
"""This machine by its other names."""
_gates: dict[tuple[str, str], Gate] = {}
_gates_lock = threading.Lock()


def gate_for(provider: str, address: str) -> Gate:
    """The gate of a server: one for the whole process, since the server is one for the whole process."""
    gate = _gates.get((provider, address))
    if gate is None:
        with _gates_lock:
            gate = _gates.setdefault((provider, _LOOPBACK.sub("127.0.0.1", address)), Gate())
            _gates[provider, address] = gate
    return gate


def _forget_all() -> None:
    """After a fork: what runs, runs in the parent."""
    global _gates_lock  # noqa: PLW0603 - another thread may have held it at the fork
    _gates_lock = threading.Lock()
    _gates.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def with_concurrency(limits: Limits | None, concurrency: int | None) -> Limits | None:
    """The limits with the client's own `concurrency` setting counted as one more policy."""
    if concurrency is None:
        return limits
    if limits is not None and limits.concurrent_requests is not None and limits.concurrent_requests <= concurrency:
        return limits
    reasons = {**(limits.reasons if limits else {}), "concurrent_requests": "settings: `concurrency`"}
    return replace(limits or Limits(), concurrent_requests=concurrency, reasons=reasons)
