"""Call the hooks of a connection, which are plain or async, under a client that is sync or async."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from graftage._engine.threads import submit
from graftage._engine.waiting import GRACE, IO, Source, ThreadSource

if TYPE_CHECKING:
    from graftage._engine.plugins import Hook
    from graftage.calls import Call

__all__ = ["call_hook", "open_hook"]


async def call_hook(io: IO, hook: Hook, request: object, call: Call) -> Any:
    """Call a hook of a connection that returns once: in a thread, on a loop, or here."""
    if not hook.is_async:
        return await _result(io, submit(hook.plain, request), call)
    if hook.needs_event_loop:
        from graftage._engine.awaiting import in_background

        return await _result(io, in_background(hook.once(request)), call)
    return await io.await_hook(hook.once(request), call)


def open_hook(io: IO, hook: Hook, request: object, call: Call) -> Source:
    """Call a hook of a connection that returns an iterator: in a thread, on a loop, or here."""
    if not hook.is_async:
        return ThreadSource(io, hook, request, call)
    if hook.needs_event_loop:
        from graftage._engine.awaiting import BackgroundSource

        return BackgroundSource(io, hook, request, call)
    return io.source(hook, request, call)


async def _result(io: IO, future: Future[Any], call: Call) -> Any:
    """Wait for work on a thread or a loop, and abandon it if it outlasts the call."""
    try:
        await io.wait(future, call.deadline + GRACE)
    except TimeoutError as error:
        raise call.timed_out() from error
    finally:
        future.cancel()  # Has no effect if it is done.
    return future.result()
