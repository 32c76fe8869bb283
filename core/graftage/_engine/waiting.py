"""How sync clients wait: by blocking.

The engine is written once, as coroutines that wait by an `IO`. `AsyncClient` awaits them, with that of `awaiting`.
`Client` uses `BlockingIO`, whose methods block instead of suspending, so that `drive` has the result in one step.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from functools import partial
from queue import Empty
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeVar

from graftage._engine.driving import drive
from graftage._engine.threads import Items, submit
from graftage.calls import Blocking, Call
from graftage.exceptions import ProviderTimeout

if TYPE_CHECKING:
    from graftage._engine.plugins import Hook
    from graftage.http import Colour

__all__ = ["GRACE", "IO", "BlockingIO", "Source", "ThreadSource", "TimedSource", "await_plugin"]

T = TypeVar("T")
GRACE: Final = 0.5
"""Seconds past a deadline after which the core abandons a provider that did not end by itself."""


class Source(Protocol):
    """The chunks of a provider, pulled one by one."""

    @property
    def pull(self) -> Callable[[], Awaitable[Any]]:
        """Return the next chunk, or None at the end."""
        ...

    async def close(self) -> None:
        """Stop the provider's work, and a pending `pull` of another task. May be called twice."""
        ...


class IO(Protocol):
    """How the coroutines of the engine wait."""

    colour: Colour

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run blocking code."""
        ...

    async def finish(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Close what hooks have opened, on the event loop where they opened it."""
        ...

    async def wait(self, future: Future[Any], deadline: float) -> None:
        """Wait until a future is done, has failed or is cancelled.

        Raises:
            TimeoutError: the deadline passed first.
        """
        ...

    async def await_hook(self, work: Coroutine[Any, Any, T], call: Call) -> T:
        """Await a hook that runs where its caller runs."""
        ...

    def source(self, hook: Hook, request: object, call: Call) -> Source:
        """Return the chunks of such a hook."""
        ...

    async def ask(self, plugin: str, function: Callable[..., T], question: object, call: Call) -> T:
        """Call a policy or a resolver in a thread, and abandon it at the call's deadline.

        Raises:
            ProviderTimeout: it was not done by then.
        """
        ...

    def in_thread(self, function: Callable[..., T]) -> Callable[..., T]:
        """Return a function for any thread, in which `from_thread` works as in those that `ask` calls."""
        ...

    def from_thread(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine of the engine, for a plugin's blocking code that `ask` runs."""
        ...


# --- Sync ------------------------------------------------------------------------------------------------------------


class BlockingIO(Blocking):
    """Waits by blocking the thread."""

    colour: Colour = "sync"

    async def await_hook(self, work: Coroutine[Any, Any, T], call: Call) -> T:  # noqa: ARG002 - the toolkit times it
        return await work

    def source(self, hook: Hook, request: object, call: Call) -> Source:  # noqa: ARG002
        return _DrivenSource(hook, request)

    async def ask(self, plugin: str, function: Callable[..., T], question: object, call: Call) -> T:
        return await await_plugin(self, plugin, submit(function, question), call)

    def in_thread(self, function: Callable[..., T]) -> Callable[..., T]:
        return function

    def from_thread(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return drive(work())


class _DrivenSource:
    """An async iterator that blocks instead of suspending."""

    def __init__(self, hook: Hook, request: object) -> None:
        self._chunks = hook(request)
        self.pull = partial(anext, self._chunks, None)

    async def close(self) -> None:
        await self._chunks.aclose()


# --- In a thread -----------------------------------------------------------------------------------------------------


async def await_plugin(io: IO, plugin: str, future: Future[T], call: Call) -> T:
    """Wait for the result of a plugin, and abandon it if it hangs.

    Raises:
        ProviderTimeout: it was not done by the call's deadline.
    """
    try:
        await io.wait(future, call.deadline)
    except TimeoutError as error:
        raise ProviderTimeout(
            f"The plugin `{plugin}` did not answer within {call.timeouts.total:g} s.",
            phase="total",
            hint="Raise `timeout`. If it hangs, report that to its authors, or disable it with "
            "GRAFTAGE_DISABLED_PLUGINS.",
        ) from error
    return future.result()


class TimedSource:
    """A source on another thread or event loop, for which the core enforces the limits of the call."""

    def __init__(self, io: IO, call: Call) -> None:
        self._io = io
        self._call = call
        self._phase: Literal["first_token", "idle"] = "idle" if call.deadline == math.inf else "first_token"

    async def pull(self) -> Any:
        limit = time.monotonic() + float(getattr(self._call.timeouts, self._phase))
        try:
            item = await self._next(min(limit, self._call.deadline) + GRACE)
        except TimeoutError as error:
            raise self._call.timed_out("total" if self._call.deadline <= limit else self._phase) from error
        self._phase = "idle"
        return item

    async def _next(self, until: float) -> Any:
        raise NotImplementedError


class ThreadSource(TimedSource):
    """An iterator that a thread reads."""

    def __init__(self, io: IO, hook: Hook, request: object, call: Call) -> None:
        super().__init__(io, call)
        self._items: Items[Any] = Items(lambda: hook.items(request), hook.contained)

    async def _next(self, until: float) -> Any:
        while True:
            await self._io.wait(self._items.available, until)
            with contextlib.suppress(Empty):
                return self._items.take()

    async def close(self) -> None:
        self._items.stop()
        # A provider that still works is abandoned.
        with contextlib.suppress(TimeoutError):
            await self._io.wait(self._items.ended, time.monotonic() + GRACE)
