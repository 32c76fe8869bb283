"""Calling the hooks of a connection, each in its own colour."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from graftage._engine.threads import submit
from graftage._engine.waiting import GRACE, IO, Source, ThreadSource

if TYPE_CHECKING:
    from graftage._engine.plugins import Hook
    from graftage.calls import Call

__all__ = ["call_hook", "open_hook"]


async def call_hook(io: IO, hook: Hook, request: Any, call: Call) -> Any:
    """Call a hook of a connection that answers once, in its own colour."""
    if not hook.is_async:
        return await _result(io, submit(hook.plain, request), call)
    if hook.needs_event_loop:
        from graftage._engine.awaiting import in_background

        return await _result(io, in_background(hook.once(request)), call)
    return await io.await_hook(hook.once(request), call)


def open_hook(io: IO, hook: Hook, request: Any, call: Call) -> Source:
    """Call a hook of a connection that answers with an iterator, in its own colour."""
    if not hook.is_async:
        return ThreadSource(io, hook, request, call)
    if hook.needs_event_loop:
        from graftage._engine.awaiting import BackgroundSource

        return BackgroundSource(io, hook, request, call)
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
