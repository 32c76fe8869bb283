"""How async clients wait: by awaiting. Also the event loop in the background, for connections that need one."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from graftage._engine.threads import submit
from graftage._engine.waiting import GRACE, IO, Source, TimedSource, await_plugin
from graftage.calls import Call

if TYPE_CHECKING:
    from graftage._engine.plugins import Hook
    from graftage.http import Colour

__all__ = ["AwaitingIO", "BackgroundIO", "BackgroundSource", "in_background"]

T = TypeVar("T")


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

    async def await_hook(self, work: Coroutine[Any, Any, T], call: Call) -> T:
        if call.deadline == math.inf:
            return await work
        try:
            async with asyncio.timeout(max(call.deadline + GRACE - time.monotonic(), 0)) as limit:
                return await work
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise call.timed_out() from error

    def source(self, hook: Hook, request: object, call: Call) -> Source:
        return _AwaitedSource(hook, request, call)

    async def ask(self, plugin: str, function: Callable[..., T], question: object, call: Call) -> T:
        return await await_plugin(self, plugin, submit(self.in_thread(function), question), call)

    async def wait(self, future: Future[Any], deadline: float) -> None:
        done = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda _: _wake(done))
        # `wrap_future` would cancel the future, for which others may wait, too. `wait_for` of Python 3.11 loses a
        # cancellation of the caller at the moment the future is done.
        async with asyncio.timeout(None if deadline == math.inf else max(deadline - time.monotonic(), 0)):
            await done

    def in_thread(self, function: Callable[..., T]) -> Callable[..., T]:
        loop = asyncio.get_running_loop()

        def call(*arguments: Any) -> T:
            token = _loop.set(loop)
            try:
                return function(*arguments)
            finally:
                _loop.reset(token)

        return call

    def from_thread(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        loop = _loop.get()
        if asyncio._get_running_loop() is loop:  # noqa: SLF001 - as documented, but without an exception
            raise RuntimeError("this code blocks: call it in a thread, with `request.call.run`")
        return asyncio.run_coroutine_threadsafe(work(), loop).result()


_loop: ContextVar[asyncio.AbstractEventLoop] = ContextVar("graftage_loop")
"""For a plugin's code in a thread: the event loop of its call."""


def _wake(done: asyncio.Future[None]) -> None:
    """Wake the task that awaits the future, from any thread."""

    def wake() -> None:
        if not done.done():
            done.set_result(None)

    with contextlib.suppress(RuntimeError):  # Its event loop is closed.
        done.get_loop().call_soon_threadsafe(wake)


class _AwaitedSource:
    """An async iterator as a source, with one timer for the deadline of the whole stream.

    The timer, and `close` from another task, cancel the task that waits for a chunk. So a chunk needs neither a task
    nor a timer.
    """

    def __init__(self, hook: Hook, request: object, call: Call) -> None:
        self._chunks = hook(request)
        self._call = call
        self._reader: asyncio.Task[Any] | None = None
        self._read_done = asyncio.Event()
        self._ended: Literal["late", "closed"] | None = None
        self._timer: asyncio.TimerHandle | None = None
        if call.deadline != math.inf:
            delay = max(call.deadline + GRACE - time.monotonic(), 0)
            self._timer = asyncio.get_running_loop().call_later(delay, self._end, "late")

    def _end(self, why: Literal["late", "closed"]) -> None:
        self._ended = self._ended or why
        if self._reader is not None:
            self._reader.cancel()

    async def pull(self) -> Any:
        if self._ended is not None:
            return self._raise_if_late()
        if self._reader is not None:
            await self._read_done.wait()  # Another task reads: each chunk goes to one of them.
            return await self.pull()
        self._reader = asyncio.current_task()
        self._read_done.clear()
        cancels = self._reader.cancelling() if self._reader else 0
        try:
            return await anext(self._chunks, None)
        except asyncio.CancelledError:
            if not self._cancelled_by_us(cancels):
                raise
            return self._raise_if_late()
        finally:
            self._reader = None
            self._read_done.set()

    def _cancelled_by_us(self, cancels: int) -> bool:
        """Return whether the cancellation is ours alone; if so, take it back."""
        return self._ended is not None and self._reader is not None and self._reader.uncancel() <= cancels

    def _raise_if_late(self) -> None:
        if self._ended == "late":
            raise self._call.timed_out()

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._reader is not None and self._reader is not asyncio.current_task():
            self._end("closed")
            with contextlib.suppress(TimeoutError):  # A provider that ignores its cancellation is abandoned.
                async with asyncio.timeout(GRACE):
                    await self._read_done.wait()
        self._ended = self._ended or "closed"
        await self._chunks.aclose()


# --- The loop in the background ---------------------------------------------------------------------------------------


class BackgroundSource(TimedSource):
    """An async iterator on the loop in the background."""

    def __init__(self, io: IO, hook: Hook, request: object, call: Call) -> None:
        super().__init__(io, call)
        self._contained = hook.contained
        self._chunks = hook(request)
        self._closed = False
        self._pending: Future[Any] | None = None
        """The next chunk: kept if its reader is cancelled, so that it is not lost."""

    async def _next(self, until: float) -> Any:
        if self._closed:
            return None
        if self._pending is None:
            self._pending = in_background(self._next_chunk())
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
        closing = in_background(self._close_chunks())
        with contextlib.suppress(TimeoutError):
            await self._io.wait(closing, time.monotonic() + GRACE)

    async def _next_chunk(self) -> Any:
        with self._contained:
            return await anext(self._chunks, None)

    async def _close_chunks(self) -> None:
        with contextlib.suppress(RuntimeError), self._contained:  # The generator may still run.
            await self._chunks.aclose()


class BackgroundIO(AwaitingIO):
    """How the hooks of a connection that needs an event loop wait: on the one in the background, under both clients."""

    def __init__(self, io: IO) -> None:
        self._io = io

    async def finish(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        done = in_background(work())
        with contextlib.suppress(TimeoutError):
            await self._io.wait(done, time.monotonic() + GRACE)


_background: list[asyncio.AbstractEventLoop] = []
_background_lock = threading.Lock()


def _background_loop() -> asyncio.AbstractEventLoop:
    """Return the one event loop of the process for connections that need one, and start it if necessary."""
    with _background_lock:
        if not _background:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="graftage-loop", daemon=True).start()
            _background.append(loop)
        return _background[0]


def in_background(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Run a coroutine on the loop in the background."""
    return asyncio.run_coroutine_threadsafe(work, _background_loop())


def _reset() -> None:
    """After a fork: its thread is the parent's."""
    global _background_lock  # noqa: PLW0603 - another thread may have held it at the fork
    _background_lock = threading.Lock()
    _background.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)
