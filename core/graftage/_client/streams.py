"""The two streams: the chunks of a reply as they come."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from graftage._engine.call import raise_translated
from graftage._engine.driving import drive
from graftage.exceptions import GraftageError

if TYPE_CHECKING:
    import asyncio
    from typing import Self

    from graftage._engine.call import Run, Translate
    from graftage.types import Chunk, Reply

__all__ = ["AsyncStream", "Stream"]

Begun: TypeAlias = "tuple[Run, Chunk | None]"
"""A call that has begun, with its first chunk."""


class Stream:
    """The chunks of a reply as they come: iterate over it.

    Close it, or use it as a context manager, to stop the reply early. It holds a slot of its server until it is read
    to the end, closed, or dropped. Threads may share it: each chunk goes to one of them.
    """

    def __init__(self, begun: Begun, translate: Translate) -> None:
        self._run, self._first = begun
        self._translate = translate
        self._lock = threading.Lock()
        self._closed = False

    @property
    def reply(self) -> Reply:
        """The whole reply, after the last chunk.

        Raises:
            RuntimeError: the last chunk has not come yet.
        """
        return _reply(self._run)

    @property
    def partial(self) -> Reply:
        """What has come so far."""
        return self._run.reply or self._run.so_far()

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        with self._lock:
            chunk, self._first = self._first, None
            if chunk is None and not self._closed:
                try:
                    chunk = drive(self._run.pull())
                except GraftageError as error:
                    raise_translated(error, self._translate)
            if self._closed:
                drive(self._run.give_up())
                raise StopIteration
        if chunk is None:
            raise StopIteration
        return chunk

    def close(self) -> None:
        """Stop the reply and release its slot. Safe to call twice.

        A read of another thread that is pending ends at once if the provider reads by the toolkit, or else when it
        returns.
        """
        self._stop(self._run.give_up)

    def _stop(self, stop: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._closed = True
        if self._lock.acquire(blocking=False):
            try:
                drive(stop())
            finally:
                self._lock.release()
        else:
            self._run.stopped = True
            drive(self._run.call.release())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A `break` in a loop drops the stream, and its slot must not stay taken. Observers hear nothing of it: a log
        # sink of the host may hold a lock at the very step at which the garbage collector runs this.
        if not self._run.ended:
            self._stop(self._run.abandon)


class AsyncStream:
    """The chunks of a reply as they come: await it, enter it with `async with`, or iterate over it with `async for`.

    Whichever comes first sends the request, and raises what is wrong with it. Close it, or leave `async with`, to stop
    the reply early. It holds a slot of its server until it is read to the end, closed, or dropped. Tasks may share
    it once it is open: each chunk goes to one of them.
    """

    def __init__(self, begin: Callable[[], Coroutine[Any, Any, Begun]], translate: Translate) -> None:
        self._begin: Callable[[], Coroutine[Any, Any, Begun]] | None = begin
        self._translate = translate
        self._run: Run | None = None
        self._first: Chunk | None = None
        self._loop: asyncio.AbstractEventLoop

    @property
    def reply(self) -> Reply:
        """The whole reply, after the last chunk.

        Raises:
            RuntimeError: the last chunk has not come yet.
        """
        return _reply(self._run)

    @property
    def partial(self) -> Reply:
        """What has come so far.

        Raises:
            RuntimeError: the stream is not open yet.
        """
        if self._run is None:
            raise RuntimeError("the stream is not open: await it, or read it first")
        return self._run.reply or self._run.so_far()

    def __await__(self) -> Generator[Any, None, Self]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> Self:
        if self._run is None:
            import asyncio

            # Taken away first: two tasks that both open it must not send the request twice.
            begin, self._begin = self._begin, None
            if begin is None:
                raise RuntimeError("the stream is closed, or another task is opening it")
            try:
                self._run, self._first = await begin()
            except GraftageError as error:
                raise_translated(error, self._translate)
            self._loop = asyncio.get_running_loop()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        if self._run is None:
            await self.__aenter__()
        chunk, self._first = self._first, None
        if chunk is None and self._run is not None:
            try:
                chunk = await self._run.pull()
            except GraftageError as error:
                raise_translated(error, self._translate)
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        """Stop the reply and release its slot; a task that waits for a chunk gets none. Safe to call twice."""
        self._begin = self._first = None
        if self._run is not None:
            await self._run.give_up()

    close = aclose

    def __del__(self) -> None:
        # A `break` in a loop drops the stream: its work must end, and its slot must not stay taken.
        run = self._run
        if run is None or run.ended:
            return
        run.end()
        try:
            self._loop.call_soon_threadsafe(_give_up, self._loop, run)
        except RuntimeError:  # The event loop is closed, and with it all that it ran.
            return


def _reply(run: Run | None) -> Reply:
    if run is None or run.reply is None:
        raise RuntimeError("the stream has not been read to its end; `partial` has what came so far")
    return run.reply


def _give_up(loop: asyncio.AbstractEventLoop, run: Run) -> None:
    loop.create_task(run.give_up())
