"""The tools of `graftage chat`: functions found by their names, whose calls are shown."""

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftage._cli import show
from graftage._cli.errors import Misuse

if TYPE_CHECKING:
    from graftage import Client
    from graftage.types import Reply, Step

__all__ = ["asking_with_tools", "find_tools", "step_data"]

MAX_SHOWN = 200
"""Characters of a call or of a result."""


def find_tools(references: Sequence[str], max_steps: int | None) -> list[Callable[..., Any]]:
    """Import functions, each named as `MODULE:FUNCTION`, from the current folder as well, as `python -m` does.

    Raises:
        Misuse: there is no such function, or `max_steps` is given without one.
    """
    if max_steps and not references:
        raise Misuse("`--max-steps` needs a `--tool`.", hint="Name a function that the model may call.")
    folder = str(Path.cwd())
    if references and folder not in sys.path:
        sys.path.insert(0, folder)
    return [_find_tool(each) for each in references]


def _find_tool(reference: str) -> Callable[..., Any]:
    module, _, name = reference.partition(":")
    if not module.replace(".", "").isidentifier() or not name.isidentifier():
        raise Misuse(f"`--tool` has the invalid value {reference!r}.", hint="Write MODULE:FUNCTION, as `mytools:add`.")
    try:
        found = importlib.import_module(module)
    except Exception as error:
        from graftage._engine.faults import in_words

        raise Misuse(
            f"The module `{module}` cannot be imported: {in_words(error)}.",
            hint="Run the command in the folder of the module, or install it.",
        ) from error
    function: Any = getattr(found, name, None)
    if not _is_plain(function):
        from graftage._engine.inputs import suggest

        known = [each for each, value in vars(found).items() if _is_plain(value) and value.__module__ == module]
        raise Misuse(f"The module `{module}` has no plain function `{name}`.", hint=suggest(name, known))
    return function  # type: ignore[no-any-return]


def _is_plain(value: object) -> bool:
    return inspect.isroutine(value) and not inspect.iscoroutinefunction(value)


def asking_with_tools(client: "Client", tools: Sequence[Callable[..., Any]], max_steps: int | None) -> Any:
    """Return what asks the model, as `Client.chat` does, and runs the tools that it calls, if there are any."""
    return partial(_ask, client, tools, max_steps) if tools else client.chat


def _ask(
    client: "Client",
    tools: Sequence[Callable[..., Any]],
    max_steps: int | None,
    messages: Any,
    *,
    stream: bool,  # noqa: ARG001 - the reply is whole
    **arguments: Any,
) -> "Reply":
    import graftage

    return graftage.run_tools(client, messages, tools, max_steps=max_steps, on_step=_show, **arguments)


def _show(step: "Step") -> None:
    for call, result in zip(step.message.tool_calls, step.results, strict=True):
        arguments = ", ".join(
            f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call.arguments.items()
        )
        show.note(f"{_short(f'{call.name}({arguments})')} -> {_short(result.content)}")


def _short(text: str) -> str:
    line = show.cell(text)
    return line if len(line) <= MAX_SHOWN else f"{line[:MAX_SHOWN]}..."


def step_data(step: "Step") -> dict[str, Any]:
    """Convert a step to plain data."""
    return {
        "text": step.message.content,
        "calls": [
            {
                "name": call.name,
                "arguments": call.arguments,
                "result": result.content,
                "failed": call.id in step.errors,
            }
            for call, result in zip(step.message.tool_calls, step.results, strict=True)
        ],
    }
