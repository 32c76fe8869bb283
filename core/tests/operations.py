"""A call of each operation, by the hook that serves it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "chat": lambda llm: llm.chat("x"),
    "generate": lambda llm: llm.generate("x"),
    "embed": lambda llm: llm.embed("x"),
    "list_models": lambda llm: llm.models(),
    "show_model": lambda llm: llm.show(),
    "loaded_models": lambda llm: llm.loaded(),
    "pull_model": lambda llm: llm.pull(),
    "load_model": lambda llm: llm.load(),
    "unload_model": lambda llm: llm.unload(),
}
