"""One way to use both clients, so that a test is written once."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import graftage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator
    from concurrent.futures import Future
    from typing import Self

__all__ = ["Both"]

PATIENCE: Final = 60.0
"""Seconds after which a hanging test fails."""


class Both:
    """One way to use both clients, so that a test is written once: `llm.chat(...)` in both modes.

    In async mode each method runs as a task of one event loop in a background thread, so calls from several threads of
    a test are several tasks of that loop. Errors that the loop reports fail the test.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.complaints: list[str] = []
        self._clients: list[Any] = []
        self._threads = ThreadPoolExecutor(32, "caller")
        self._loop = asyncio.new_event_loop() if mode == "async" else None
        if self._loop is not None:
            self._loop.set_exception_handler(lambda _, context: self.complaints.append(repr(context)))
            self._thread = threading.Thread(target=self._loop.run_forever, name="event loop", daemon=True)
            self._thread.start()

    def connect(self, *arguments: Any, **settings: Any) -> Any:
        """Return a client whose methods block in both modes."""
        if self._loop is None:
            client: Any = graftage.connect(*arguments, **settings)
        else:
            client = _Waiting(graftage.connect_async(*arguments, **settings), self.run)
        self._clients.append(client)
        return client

    def opened(self, *arguments: Any, **settings: Any) -> Any:
        """Return an open client. An async one opens only when it is entered or called."""
        client = self.connect(*arguments, **settings)
        return client.__enter__()

    def native(self, client: Any) -> Any:
        """Return the native client of one of ours; its methods block, too."""
        found = client.native()
        return found if self._loop is None or isinstance(found, _Waiting) else _Waiting(found, self.run)

    def run(self, work: Any) -> Any:
        """Run a coroutine to its end."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    def start(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Future[Any]:
        """Run a function in its own thread, where it may block."""
        context = contextvars.copy_context()
        return self._threads.submit(lambda: context.run(function, *arguments, **named))

    def task(self, client: Any, method: str, *arguments: Any, **named: Any) -> Future[Any]:
        """Begin a call as a task; to cancel the future cancels the task. Only in async mode."""
        assert self._loop is not None
        work = getattr(client._inner, method)(*arguments, **named)  # noqa: SLF001 - of this module
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def together(self, functions: Iterable[Callable[[], Any]]) -> list[Any]:
        """Run functions at the same time; return their results or errors in order."""
        begun = [self.start(function) for function in functions]
        return [each.exception(PATIENCE) or each.result(PATIENCE) for each in begun]

    def close_clients(self) -> None:
        """Close all clients."""
        while self._clients:
            self._clients.pop().close()

    def close(self) -> None:
        """Close everything, and fail if the event loop reported errors."""
        self.close_clients()
        self._threads.shutdown()
        if self._loop is not None:
            self.run(self._wind_up())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(PATIENCE)
            self._loop.close()
        assert self.complaints == []

    async def _wind_up(self) -> None:
        assert self._loop is not None
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()


class _Waiting:
    """An async client or stream with the interface of a sync one."""

    def __init__(self, inner: Any, run: Callable[[Any], Any]) -> None:
        self._inner = inner
        self._run = run

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **named: Any) -> Any:
            result = value(*arguments, **named)
            if inspect.isawaitable(result):
                result = self._run(_awaited(result))
            waits = hasattr(result, "__anext__") or hasattr(result, "__aenter__")
            return _Waiting(result, self._run) if waits else result

        return call

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return self._run(self._inner.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> Self:
        self._run(self._inner.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def _awaited(work: Awaitable[Any]) -> Any:
    return await work
