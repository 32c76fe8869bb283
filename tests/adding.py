"""A tool for a small model, and a conversation from which it learns to call it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import graftage
from graftage.types import Message, Reply, ToolCall

if TYPE_CHECKING:
    from concurrent.futures import Future

    from graftage.testing.both import Both

PATIENCE = 60.0
EXACT = {"temperature": 0.0, "seed": 1, "repeat_penalty": 1.0}
"""Options for a model that repeats what it has learned."""


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def subtract(a: int, b: int) -> int:
    """Subtract a number from another."""
    return a - b


def _example(a: int, b: int) -> list[Message]:
    call = ToolCall(name="add", arguments={"a": a, "b": b}, id=f"call_{a}")
    return [
        Message(role="user", content=f"What is {a} + {b}?"),
        Message(role="assistant", tool_calls=(call,)),
        Message(role="tool", content=str(a + b), tool_call_id=call.id),
        Message(role="assistant", content=f"The result is {a + b}."),
    ]


SUMS = ((5, 6), (10, 20), (7, 1), (3, 4), (8, 2), (30, 12))
LESSON: list[Any] = [message for pair in SUMS for message in _example(*pair)]
"""A conversation with calls of `add`. A small model goes on in the same way."""


def begin(both: Both, llm: Any, *given: Any, **arguments: Any) -> Future[Reply]:
    """Start `run_tools` of the client's kind."""
    if both.mode == "sync":
        return both.start(graftage.run_tools, llm, *given, **arguments)
    assert both._loop is not None
    return asyncio.run_coroutine_threadsafe(graftage.run_tools_async(llm._inner, *given, **arguments), both._loop)


def run(both: Both, llm: Any, *given: Any, **arguments: Any) -> Reply:
    """Do a whole run."""
    return begin(both, llm, *given, **arguments).result(PATIENCE)
