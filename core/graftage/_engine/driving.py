"""How a sync client runs the engine's coroutines: to their end, in one step."""

from __future__ import annotations

import sys
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from graftage.exceptions import PluginError

__all__ = ["drive"]

T = TypeVar("T")
NO_HOOKS: Final = (None, None)
MAX_CLEANUP_AWAITS: Final = 100
"""Suspensions in what a hook does to tidy up, each of which is refused."""


def drive(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends, because whatever it awaits blocks instead.

    A loop that runs in this thread, Jupyter's for one, must not adopt the generators that are begun here: it would end
    them by itself.
    """
    hooks = sys.get_asyncgen_hooks()
    if hooks != NO_HOOKS:
        sys.set_asyncgen_hooks(None, None)
    try:
        work.send(None)
        suspended = PluginError(
            "A hook of the provider awaits something outside the toolkit, and a sync client has no event loop.",
            hint="Its connection must set `needs_event_loop = True`; nothing is sent again. Report it to its authors.",
        )
        # Thrown, not closed: what the coroutine holds is given back. Code that tidies up may suspend as well.
        for _ in range(MAX_CLEANUP_AWAITS):
            work.throw(suspended)
    except StopIteration as done:
        result: T = done.value
        return result
    finally:
        if hooks != NO_HOOKS:
            sys.set_asyncgen_hooks(*hooks)
        work.close()
    raise suspended
