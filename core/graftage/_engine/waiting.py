"""Two ways to wait, so that the logic of a client is written once.

The engine is written as coroutines against `IO`. `AsyncClient` awaits them. `Client` drives them with `BlockingIO`,
whose methods block instead of suspending, so that `drive` gets the result from a single step.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextvars import ContextVar
from functools import partial
from queue import Empty
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeVar

from graftage._engine.driving import drive
from graftage._engine.threads import Items, submit
from graftage.calls import Blocking, Call
from graftage.exceptions import ProviderTimeout

if TYPE_CHECKING:
    from graftage._engine.plugins import Hook, Relay
    from graftage.http import Colour

T = TypeVar("T")
GRACE: Final = 0.5
"""Seconds past the deadline after which the core stops waiting for a provider that should have."""


class Source(Protocol):
    """The chunks of a provider, pulled one by one."""

    @property
    def pull(self) -> Callable[[], Awaitable[Any]]:
        """Gives the next chunk, or None at the end."""
        ...

    def gone(self) -> bool:
        """Whether nobody can read on: its event loop is closed."""
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

    async def awaited(self, work: Coroutine[Any, Any, T], call: Call) -> T:
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

    def from_thread(self, relay: Relay, hook: str, request: Any) -> Any:
        """Call a hook of the connection from a plugin's blocking code."""
        ...


async def call_hook(io: IO, hook: Hook, request: Any, call: Call) -> Any:
    """Call a hook of a connection that answers once, in its own colour."""
    if not hook.is_async:
        return await _result(io, submit(hook.plain, request), call)
    if hook.needs_event_loop:
        return await _result(io, asyncio.run_coroutine_threadsafe(hook.once(request), background_loop()), call)
    return await io.awaited(hook.once(request), call)


def open_hook(io: IO, hook: Hook, request: Any, call: Call) -> Source:
    """Call a hook of a connection that answers with an iterator, in its own colour."""
    if not hook.is_async:
        return _Threaded(io, hook, request, call)
    if hook.needs_event_loop:
        return _OnLoop(io, hook, request, call)
    return io.source(hook, request, call)


async def _result(io: IO, future: Future[Any], call: Call) -> Any:
    """What comes of work elsewhere, which is left behind where it outlasts the call."""
    try:
        await io.wait(future, call.deadline + GRACE)
    except TimeoutError as error:
        raise call.timed_out() from error
    finally:
        future.cancel()  # Of no effect once it is done.
    return future.result()


# --- Sync ------------------------------------------------------------------------------------------------------------


class BlockingIO(Blocking):
    """Waits by blocking the thread."""

    colour: Colour = "sync"

    async def awaited(self, work: Coroutine[Any, Any, T], call: Call) -> T:  # noqa: ARG002 - the toolkit keeps the time
        return await work

    def source(self, hook: Hook, request: Any, call: Call) -> Source:  # noqa: ARG002
        return _Pulled(hook, request)

    async def ask(self, plugin: str, function: Callable[..., T], question: Any, call: Call) -> T:
        return await _answered(self, plugin, submit(function, question), call)

    def from_thread(self, relay: Relay, hook: str, request: Any) -> Any:
        found = relay.hooks.get(hook)
        return drive(call_hook(self, found, request, request.call)) if found else None


class _Pulled:
    """An async iterator that never suspends."""

    def __init__(self, hook: Hook, request: Any) -> None:
        self._chunks = hook(request)
        self.pull = partial(anext, self._chunks, None)

    def gone(self) -> bool:
        return False

    async def close(self) -> None:
        await self._chunks.aclose()


# --- Async -----------------------------------------------------------------------------------------------------------


class AwaitingIO:
    """Waits by awaiting."""

    colour: Colour = "async"

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        future = submit(function, *arguments)
        await self.wait(future, math.inf)
        return future.result()

    async def finish(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await work()

    async def awaited(self, work: Coroutine[Any, Any, T], call: Call) -> T:
        if call.deadline == math.inf:
            return await work
        try:
            async with asyncio.timeout(max(call.deadline + GRACE - time.monotonic(), 0)) as limit:
                return await work
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise call.timed_out() from error

    def source(self, hook: Hook, request: Any, call: Call) -> Source:
        return _Awaited(hook, request, call)

    async def ask(self, plugin: str, function: Callable[..., T], question: Any, call: Call) -> T:
        token = _loop.set(asyncio.get_running_loop())
        try:
            future = submit(function, question)
        finally:
            _loop.reset(token)
        return await _answered(self, plugin, future, call)

    async def wait(self, future: Future[Any], deadline: float) -> None:
        done = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda _: _tell(done))
        # Not `wrap_future`, which cancels what it wraps: others may wait for it, or this caller again. Not `wait_for`,
        # which in Python 3.11 loses the cancellation of a caller at the moment the future is done.
        async with asyncio.timeout(None if deadline == math.inf else max(deadline - time.monotonic(), 0)):
            await done

    def from_thread(self, relay: Relay, hook: str, request: Any) -> Any:
        found = relay.hooks.get(hook)
        if found is None:
            return None
        return asyncio.run_coroutine_threadsafe(call_hook(self, found, request, request.call), _loop.get()).result()


_loop: ContextVar[asyncio.AbstractEventLoop] = ContextVar("graftage_loop")
"""The loop whose worker thread runs a plugin's code."""


def _tell(done: asyncio.Future[None]) -> None:
    """Let a task go on, from any thread."""

    def tell() -> None:
        if not done.done():
            done.set_result(None)

    with contextlib.suppress(RuntimeError):  # Its event loop is closed, and it with it.
        done.get_loop().call_soon_threadsafe(tell)


class _Awaited:
    """An async iterator as a source, with one timer for the whole stream as a backstop for its deadline.

    The timer, and `close` from another task, cancel whoever waits for a chunk. So no task and no timer is made for a
    chunk.
    """

    def __init__(self, hook: Hook, request: Any, call: Call) -> None:
        self._chunks = hook(request)
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
        cancels = self._reader.cancelling() if self._reader else 0
        try:
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
        return self._over is not None and self._reader is not None and self._reader.uncancel() <= cancels

    def _at_the_end(self) -> None:
        if self._over == "late":
            raise self._call.timed_out()

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._reader is not None and self._reader is not asyncio.current_task():
            self._end("closed")
            with contextlib.suppress(TimeoutError):  # A provider that will not be cancelled is left to itself.
                async with asyncio.timeout(GRACE):
                    await self._read.wait()
        self._over = self._over or "closed"
        await self._chunks.aclose()


# --- Elsewhere: threads, and the loop in the background --------------------------------------------------------------


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


class _Elsewhere:
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

    def gone(self) -> bool:
        return False


class _Threaded(_Elsewhere):
    """An iterator that one thread goes through."""

    def __init__(self, io: IO, hook: Hook, request: Any, call: Call) -> None:
        super().__init__(io, call)
        self._items: Items[Any] = Items(lambda: hook.plain(request), hook.contained)

    async def _next(self, until: float) -> Any:
        while True:
            await self._io.wait(self._items.news(), until)
            with contextlib.suppress(Empty):
                return self._items.take()

    async def close(self) -> None:
        self._items.stop()
        # A provider that is still at work is left to itself.
        with contextlib.suppress(TimeoutError):
            await self._io.wait(self._items.ended, time.monotonic() + GRACE)


class _OnLoop(_Elsewhere):
    """An async iterator on the loop in the background."""

    def __init__(self, io: IO, hook: Hook, request: Any, call: Call) -> None:
        super().__init__(io, call)
        self._contained = hook.contained
        self._chunks = hook(request)
        self._closed = False
        self._pending: Future[Any] | None = None
        """A chunk on its way: kept where its reader is cancelled, so that none is lost."""

    async def _next(self, until: float) -> Any:
        if self._closed:
            return None
        if self._pending is None:
            self._pending = asyncio.run_coroutine_threadsafe(self._after(), background_loop())
        future = self._pending
        try:
            await self._io.wait(future, until)
        finally:
            if future.done():
                self._pending = None
        return None if future.cancelled() else future.result()

    async def close(self) -> None:
        self._closed = True
        if self._pending is not None:
            self._pending.cancel()
        closing = asyncio.run_coroutine_threadsafe(self._end(), background_loop())
        with contextlib.suppress(TimeoutError):
            await self._io.wait(closing, time.monotonic() + GRACE)

    async def _after(self) -> Any:
        with self._contained:
            return await anext(self._chunks, None)

    async def _end(self) -> None:
        with contextlib.suppress(RuntimeError), self._contained:  # A chunk may be on its way that is not cancelled.
            await self._chunks.aclose()


class BackgroundIO(AwaitingIO):
    """How the hooks of a connection that needs an event loop wait: on the one in the background, for either client."""

    def __init__(self, io: IO) -> None:
        self._io = io

    async def finish(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        done = asyncio.run_coroutine_threadsafe(work(), background_loop())
        with contextlib.suppress(TimeoutError):
            await self._io.wait(done, time.monotonic() + GRACE)


_background: list[asyncio.AbstractEventLoop] = []
_background_lock = threading.Lock()


def background_loop() -> asyncio.AbstractEventLoop:
    """The one event loop of the process for connections that need one under a sync client."""
    with _background_lock:
        if not _background:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="graftage-loop", daemon=True).start()
            _background.append(loop)
        return _background[0]


def _forget_loop() -> None:
    """After a fork: its thread is the parent's."""
    global _background_lock  # noqa: PLW0603 - another thread may have held it at the fork
    _background_lock = threading.Lock()
    _background.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_loop)
