"""Two ways to wait, so that the logic of a client is written once; here the one that blocks.

The engine is written as coroutines against `IO`. `AsyncClient` awaits them, by `awaiting`. `Client` drives them with
`BlockingIO`, whose methods block instead of suspending, so that `drive` gets the result from a single step.
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
"""Seconds past the deadline after which the core stops waiting for a provider that should have."""


class Source(Protocol):
    """The chunks of a provider, pulled one by one."""

    @property
    def pull(self) -> Callable[[], Awaitable[Any]]:
        """Gives the next chunk, or None at the end."""
        ...

    async def close(self) -> None:
        """Stop the provider's work, a pending `pull` of another task too. Safe to call twice."""
        ...


class IO(Protocol):
    """How to wait."""

    colour: Colour

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run blocking code."""
        ...

    async def finish(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do what gives back what hooks have opened, where they have opened it."""
        ...

    async def wait(self, future: Future[Any], deadline: float) -> None:
        """Wait until a future is done, whatever came of it.

        Raises:
            TimeoutError: the deadline passed first.
        """
        ...

    async def await_hook(self, work: Coroutine[Any, Any, T], call: Call) -> T:
        """Await a hook that needs no event loop but the caller's."""
        ...

    def source(self, hook: Hook, request: Any, call: Call) -> Source:
        """The chunks of such a hook."""
        ...

    async def ask(self, plugin: str, function: Callable[..., T], question: Any, call: Call) -> T:
        """Ask a policy or a resolver, whose code may block; one that hangs is left to itself at the call's deadline.

        Raises:
            ProviderTimeout: it was not done by then.
        """
        ...

    def from_thread(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What comes of a coroutine of the engine, for a plugin's blocking code that `ask` runs."""
        ...


# --- Sync ------------------------------------------------------------------------------------------------------------


class BlockingIO(Blocking):
    """Waits by blocking the thread."""

    colour: Colour = "sync"

    async def await_hook(self, work: Coroutine[Any, Any, T], call: Call) -> T:  # noqa: ARG002 - the toolkit times it
        return await work

    def source(self, hook: Hook, request: Any, call: Call) -> Source:  # noqa: ARG002
        return _DrivenSource(hook, request)

    async def ask(self, plugin: str, function: Callable[..., T], question: Any, call: Call) -> T:
        return await await_plugin(self, plugin, submit(function, question), call)

    def from_thread(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return drive(work())


class _DrivenSource:
    """An async iterator that never suspends."""

    def __init__(self, hook: Hook, request: Any) -> None:
        self._chunks = hook(request)
        self.pull = partial(anext, self._chunks, None)

    async def close(self) -> None:
        await self._chunks.aclose()


# --- TimedSource: in a thread -------------------------------------------------------------------------------------------


async def await_plugin(io: IO, plugin: str, future: Future[T], call: Call) -> T:
    """What a plugin answers, which is left to itself where it hangs.

    Raises:
        ProviderTimeout: it did not answer by the call's deadline.
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
    """A source whose work is done elsewhere: the core keeps the limits of the call."""

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
    """An iterator that one thread goes through."""

    def __init__(self, io: IO, hook: Hook, request: Any, call: Call) -> None:
        super().__init__(io, call)
        self._items: Items[Any] = Items(lambda: hook.items(request), hook.contained)

    async def _next(self, until: float) -> Any:
        while True:
            await self._io.wait(self._items.available(), until)
            with contextlib.suppress(Empty):
                return self._items.take()

    async def close(self) -> None:
        self._items.stop()
        # A provider that is still at work is left to itself.
        with contextlib.suppress(TimeoutError):
            await self._io.wait(self._items.ended, time.monotonic() + GRACE)
