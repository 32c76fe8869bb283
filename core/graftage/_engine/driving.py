"""Run the engine's coroutines for a sync client: to their end, in one step."""

from __future__ import annotations

import sys
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from graftage.exceptions import PluginError

__all__ = ["drive"]

T = TypeVar("T")
NO_HOOKS: Final = (None, None)
MAX_CLEANUP_AWAITS: Final = 100
"""How often a hook that cleans up may try to suspend before it is abandoned."""


def drive(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends, because all that it awaits blocks instead.

    An event loop that runs in this thread, as Jupyter's, must not adopt the generators that start here: it would close
    them.
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
        # Throw, so that the coroutine releases what it holds. Code that cleans up may suspend, too.
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
