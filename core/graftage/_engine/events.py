"""Events: reported to observers, counted, and logged if the host has enabled it."""

from __future__ import annotations

import copy
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftage._engine.faults import in_words
from graftage.calls import Event
from graftage.exceptions import GraftageError
from graftage.types import Stats

if TYPE_CHECKING:
    from graftage._engine.delivery import Delivery

__all__ = ["Counters", "Emitter", "Observer", "enable_logging"]

Observer = tuple[str, Callable[[Event], None]]
_enabled = False
_ids = itertools.count(1)


def enable_logging() -> None:
    """Let Graftage and its providers log through loguru: one line for each call, retry and failure, never a prompt.

    Sinks, levels and formats are the host's to choose. Without this call loguru is not imported.
    """
    global _enabled  # noqa: PLW0603 - one switch for the process, as documented
    _enabled = True


def log(level: str, message: str, **facts: Any) -> None:
    """Log a line if the host has enabled it."""
    if _enabled:
        from loguru import logger  # Imported only by hosts that log

        logger.bind(**facts).log(level, message)


def new_call_id() -> str:
    """Return a name for one call, unique among the calls of this process."""
    return f"{os.getpid():x}-{next(_ids):x}"


@dataclass(slots=True)
class Counters:
    """What `stats` reports."""

    calls: int = 0
    failures: int = 0
    retries: int = 0
    running: int = 0
    waiting: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    events_dropped: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _changes: deque[dict[str, int]] = field(default_factory=deque, repr=False)

    def add(self, **changes: int) -> None:
        """Change several counters at once."""
        # Never wait: a stream's `__del__` may call this while its own thread holds the lock.
        self._changes.append(changes)
        self._settle()

    def _settle(self) -> None:
        while self._changes and self._lock.acquire(blocking=False):
            try:
                while self._changes:
                    for name, change in self._changes.popleft().items():
                        setattr(self, name, getattr(self, name) + change)
            finally:
                self._lock.release()

    def snapshot(self, active_adapter: str | None) -> Stats:
        """Return the counters as they are now."""
        self._settle()
        with self._lock:
            stats = Stats(
                calls=self.calls,
                failures=self.failures,
                retries=self.retries,
                running=self.running,
                waiting=self.waiting,
                input_tokens=self.input_tokens,
                output_tokens=self.output_tokens,
                events_dropped=self.events_dropped,
                active_adapter=active_adapter,
            )
        self._settle()
        return stats


class Emitter:
    """Counts and logs the events of one connection's calls, and reports them to its observers."""

    def __init__(
        self,
        observers: Sequence[Observer],
        counters: Counters,
        delivery: Delivery,
        hide: Callable[[GraftageError], None],
    ) -> None:
        self._observers = list(observers)
        self._counters = counters
        self._delivery = delivery
        self._hide = hide
        self._drop_logged = False
        if observers:
            delivery.register()

    def for_call(self, **facts: Any) -> Callable[..., None]:
        """Return the `emit` of one call.

        Args:
            **facts: what all its events have in common.
        """
        report = self._delivery.for_call(self._report, self._drop) if self._observers else None

        def emit(kind: str, **more: Any) -> None:
            if kind == "retry":
                self._counters.add(retries=1)
            if not (report or _enabled):
                return
            error = more.get("error")
            if isinstance(error, GraftageError):
                more["error"] = self._harmless(error)
            event = Event(kind=kind, at=time.monotonic(), **{**facts, **more})  # type: ignore[arg-type] # checked by type checkers at the callers' side only
            if report:
                report(event)
            _log_event(event)

        return emit

    def _harmless(self, error: GraftageError) -> GraftageError:
        """Return the error without secrets and without the reply so far."""
        self._hide(error)
        if getattr(error, "partial", None) is None:
            return error
        shown = copy.copy(error)
        shown.partial = None
        return shown

    def _report(self, event: Event) -> None:
        """Pass an event to the observers; log and drop one that raises."""
        for observer in list(self._observers):
            name, function = observer
            try:
                function(event)
            except BaseException as error:  # noqa: BLE001 - nobody interrupts or cancels a thread of ours
                self._observers.remove(observer)
                log("WARNING", f"the observer `{name}` failed and is dropped: {in_words(error)}")

    def _drop(self, _: Event) -> None:
        """Count an event that is not reported; log the first."""
        self._counters.add(events_dropped=1)
        if not self._drop_logged:
            self._drop_logged = True
            names = ", ".join(f"`{name}`" for name, _ in self._observers)
            log("WARNING", f"events are dropped, since the observers are too slow ({names}); `stats` counts them")


def _log_event(event: Event) -> None:
    facts = {"call_id": event.call_id, "provider": event.provider, "model": event.model, "operation": event.operation}
    subject = f"{event.operation} {event.provider}:{event.model or ''}".rstrip(":")
    if event.kind == "retry":
        log(
            "WARNING",
            f"{subject}: attempt {event.attempt} failed, next in {event.delay:.1f} s: {_name(event)}",
            **facts,
        )
    elif event.kind == "error":
        log("ERROR", f"{subject}: {_name(event)}", **facts)
    elif event.kind == "finish":
        log("INFO", f"{subject}: {event.finish_reason or 'done'}", **facts)
    else:
        log("DEBUG", f"{subject}: {event.kind} {event.tool or ''}".rstrip(), **facts)


def _name(event: Event) -> str:
    return f"{type(event.error).__name__}: {event.error}"
