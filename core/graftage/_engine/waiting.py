"""Two ways to wait, so that the logic of a client is written once.

`graftage._session` is written as coroutines against `IO`. `AsyncClient` awaits them. `Client` drives them with
`Blocking`, whose methods block instead of suspending, so that `drive` gets the result from a single step.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextvars import ContextVar
from queue import Empty
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from graftage._stream import Contained, Source, too_late
from graftage._threads import Items, submit
from graftage.exceptions import CapabilityUnsupported, ProviderTimeout
from graftage.types import Call

if TYPE_CHECKING:
    from graftage._plugins import Relay

T = TypeVar("T")
GRACE = 0.5
"""Seconds past the deadline after which the core stops waiting for a provider that should have."""


class IO(Protocol):
    """How to wait."""

    async def call(self, relay: Relay, hook: str, request: Any, call: Call) -> Any:
        """Call a hook of the connection that answers once."""
        ...

    async def open(self, relay: Relay, hook: str, request: Any, call: Call) -> Source:
        """Call a hook of the connection that answers with an iterator."""
        ...

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run blocking code."""
        ...

    async def ask(self, plugin: str, function: Callable[..., T], question: Any, call: Call) -> T:
        """Ask a policy or a resolver, whose code may block; one that hangs is left to itself at the call's deadline.

        Raises:
            ProviderTimeout: it was not done by then.
        """
        ...

    async def wait(self, future: Future[Any], deadline: float) -> None:
        """Wait until a future is done, whatever came of it.

        Raises:
            TimeoutError: the deadline passed first.
        """
        ...

    def from_thread(self, relay: Relay, hook: str, request: Any) -> Any:
        """Call a hook of the connection from a plugin's blocking code."""
        ...

    def can(self, relay: Relay, hook: str) -> bool:
        """Whether this way of waiting can call a hook of the connection."""
        ...


def has(relay: Relay, hook: str) -> bool:
    """Whether the connection implements a hook or its async twin."""
    return hook in relay.hooks or f"a{hook}" in relay.hooks


# --- Code that may block ---------------------------------------------------------------------------------------------


async def _answered(io: IO, plugin: str, future: Future[T], call: Call) -> T:
    try:
        await io.wait(future, call.deadline)
    except TimeoutError as error:
        raise ProviderTimeout(
            f"The plugin `{plugin}` did not answer within {call.timeouts.total:g} s.",
            phase="total",
            hint="Raise `timeout`; where it hangs, tell its authors, or disable it with GRAFTAGE_DISABLED_PLUGINS.",
        ) from error
    return future.result()


async def _called(io: IO, relay: Relay, hook: str, request: Any, call: Call) -> Any:
    """Call a plain hook in a thread, which is left behind where it outlasts the call."""
    future = submit(relay.call, hook, request)
    try:
        await io.wait(future, call.deadline + GRACE)
    except TimeoutError as error:
        raise too_late(call) from error
    return future.result()


class _Threaded:
    """An iterator that a thread of its own goes through, as a source that keeps the limits of the call."""

    def __init__(self, io: IO, relay: Relay, hook: str, request: Any, call: Call) -> None:
        self._io = io
        self._call = call
        self._items: Items[Any] = Items(lambda: relay.call(hook, request), relay.contained)
        self._phase: Literal["first_token", "idle"] = "idle" if call.deadline == math.inf else "first_token"

    async def pull(self) -> Any:
        limit = time.monotonic() + float(getattr(self._call.timeouts, self._phase))
        try:
            item = await self._next(min(limit, self._call.deadline) + GRACE)
        except TimeoutError as error:
            self._items.stop()
            raise too_late(self._call, "total" if self._call.deadline <= limit else self._phase) from error
        self._phase = "idle"
        return item

    async def _next(self, until: float) -> Any:
        while True:
            await self._io.wait(self._items.news(), until)
            with contextlib.suppress(Empty):
                return self._items.take()

    def gone(self) -> bool:
        return False

    async def close(self) -> None:
        self._items.stop()
        # A provider that is still at work is left to itself.
        with contextlib.suppress(TimeoutError):
            await self._io.wait(self._items.ended, time.monotonic() + GRACE)


# --- Sync ------------------------------------------------------------------------------------------------------------


class Blocking:
    """Waits by blocking the thread; plain hooks of a provider that keeps no time run in threads of ours."""

    async def call(self, relay: Relay, hook: str, request: Any, call: Call) -> Any:
        _require_sync(relay, hook)
        return relay.call(hook, request) if relay.keeps_time else await _called(self, relay, hook, request, call)

    async def open(self, relay: Relay, hook: str, request: Any, call: Call) -> Source:
        _require_sync(relay, hook)
        return (
            _Pulled(relay.call(hook, request), relay.contained)
            if relay.keeps_time
            else _Threaded(self, relay, hook, request, call)
        )

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        return function(*arguments)

    async def ask(self, plugin: str, function: Callable[..., T], question: Any, call: Call) -> T:
        return await _answered(self, plugin, submit(function, question), call)

    async def wait(self, future: Future[Any], deadline: float) -> None:
        try:
            future.exception(None if deadline == math.inf else max(deadline - time.monotonic(), 0))
        except _FutureTimeout as error:
            raise TimeoutError from error

    def from_thread(self, relay: Relay, hook: str, request: Any) -> Any:
        return relay.call(hook, request) if hook in relay.hooks else None

    def can(self, relay: Relay, hook: str) -> bool:
        return hook in relay.hooks


def _require_sync(relay: Relay, hook: str) -> None:
    if hook not in relay.hooks:
        raise CapabilityUnsupported(f"The provider answers `{hook}` only asynchronously.", hint="Use `connect_async`.")


class _Pulled:
    """A sync iterator as a source."""

    def __init__(self, chunks: Iterator[Any], contained: Contained) -> None:
        self.chunks = chunks
        self.contained = contained

    async def pull(self) -> Any:
        with self.contained:
            return next(self.chunks, None)

    def gone(self) -> bool:
        return False

    async def close(self) -> None:
        with self.contained:
            close = getattr(self.chunks, "close", None)
            if close is not None:
                close()


# `concurrent.futures.TimeoutError` is the built-in one only since Python 3.11, and so is asyncio's.
if sys.version_info >= (3, 11):
    _FutureTimeout: type[Exception] = TimeoutError
    _AsyncTimeout: type[Exception] = TimeoutError
else:
    from concurrent.futures import TimeoutError as _FutureTimeout

    _AsyncTimeout = asyncio.TimeoutError


# --- Async -----------------------------------------------------------------------------------------------------------


class Awaiting:
    """Waits by awaiting; plain hooks run in threads of ours."""

    async def call(self, relay: Relay, hook: str, request: Any, call: Call) -> Any:
        if f"a{hook}" in relay.hooks:
            return await _until(relay.call(f"a{hook}", request), call)
        return await _called(self, relay, hook, request, call)

    async def open(self, relay: Relay, hook: str, request: Any, call: Call) -> Source:
        if f"a{hook}" in relay.hooks:
            return _Awaited(relay.call(f"a{hook}", request), call, relay.contained)
        return _Threaded(self, relay, hook, request, call)

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        future = submit(function, *arguments)
        await self.wait(future, math.inf)
        return future.result()

    async def ask(self, plugin: str, function: Callable[..., T], question: Any, call: Call) -> T:
        token = _loop.set(asyncio.get_running_loop())
        try:
            future = submit(function, question)
        finally:
            _loop.reset(token)
        return await _answered(self, plugin, future, call)

    async def wait(self, future: Future[Any], deadline: float) -> None:
        timeout = None if deadline == math.inf else max(deadline - time.monotonic(), 0)
        done = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda _: _tell(done))
        try:
            # Not `wrap_future`, which cancels what it wraps: others may wait for it, or this caller again.
            await asyncio.wait_for(done, timeout)
        except _AsyncTimeout as error:
            raise TimeoutError from error

    def from_thread(self, relay: Relay, hook: str, request: Any) -> Any:
        if hook in relay.hooks:
            return relay.call(hook, request)
        if f"a{hook}" not in relay.hooks:
            return None
        return asyncio.run_coroutine_threadsafe(relay.call(f"a{hook}", request), _loop.get()).result()

    def can(self, relay: Relay, hook: str) -> bool:
        return has(relay, hook)


_loop: ContextVar[asyncio.AbstractEventLoop] = ContextVar("graftage_loop")
"""The loop whose worker thread runs a plugin's code."""


def _tell(done: asyncio.Future[None]) -> None:
    """Let a task go on, from any thread."""

    def tell() -> None:
        if not done.done():
            done.set_result(None)

    with contextlib.suppress(RuntimeError):  # Its event loop is closed, and it with it.
        done.get_loop().call_soon_threadsafe(tell)


async def _until(work: Coroutine[Any, Any, T], call: Call) -> T:
    if call.deadline == math.inf:
        return await work
    try:
        return await asyncio.wait_for(work, max(call.deadline + GRACE - time.monotonic(), 0))
    except _AsyncTimeout as error:
        raise too_late(call) from error


class _Awaited:
    """An async iterator as a source, with one timer for the whole stream as a backstop for its deadline.

    The timer, and `close` from another task, cancel whoever waits for a chunk. So no task and no timer is made for a
    chunk.
    """

    def __init__(self, chunks: AsyncIterator[Any], call: Call, contained: Contained) -> None:
        self._chunks = chunks
        self._contained = contained
        self._call = call
        self._reader: asyncio.Task[Any] | None = None
        self._read = asyncio.Event()
        self._over: Literal["late", "closed"] | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        if call.deadline != math.inf:
            delay = max(call.deadline + GRACE - time.monotonic(), 0)
            self._timer = self._loop.call_later(delay, self._end, "late")

    def _end(self, why: Literal["late", "closed"]) -> None:
        self._over = self._over or why
        if self._reader is not None:
            self._reader.cancel()

    async def pull(self) -> Any:
        if self._over is not None:
            return self._at_the_end()
        if self._reader is not None:
            await self._read.wait()  # Another task reads: each chunk goes to one of them, and none is lost.
            return await self.pull()
        self._reader = asyncio.current_task()
        self._read.clear()
        cancels = _cancels(self._reader)
        try:
            with self._contained:
                return await anext(self._chunks, None)
        except asyncio.CancelledError:
            if not self._was_ended(cancels):
                raise
            return self._at_the_end()
        finally:
            self._reader = None
            self._read.set()

    def gone(self) -> bool:
        return self._loop.is_closed()

    def _was_ended(self, cancels: int) -> bool:
        """Whether the cancellation that arrived is ours alone; then it is taken back."""
        if self._over is None:
            return False
        if sys.version_info >= (3, 11) and self._reader is not None:
            return self._reader.uncancel() <= cancels
        return True

    def _at_the_end(self) -> None:
        if self._over == "late":
            raise too_late(self._call)

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._reader is not None and self._reader is not asyncio.current_task():
            self._end("closed")
            with contextlib.suppress(_AsyncTimeout):  # A provider that will not be cancelled is left to itself.
                await asyncio.wait_for(self._read.wait(), GRACE)
        self._over = self._over or "closed"
        with self._contained:
            close = getattr(self._chunks, "aclose", None)
            if close is not None:
                await close()


def _cancels(task: asyncio.Task[Any] | None) -> int:
    """How often a task has been asked to end."""
    if sys.version_info >= (3, 11) and task is not None:
        return task.cancelling()
    return 0
