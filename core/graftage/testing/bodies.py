"""What recorded bodies say: JSON documents, the lines of a stream, and the events of a server."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from graftage.testing.interactions import Interaction

END: Final = "[DONE]"
"""The data of the last event in OpenAI's API."""


def documents(body: bytes) -> list[Any]:
    """Return the JSON values of a body: one, or one for each line or event. Other text has none."""
    text = body.decode("utf-8", "replace")
    whole = _parsed(text)
    return whole or [value for line in text.split("\n") for value in _parsed(line.strip().removeprefix("data:"))]


def objects(body: bytes) -> list[dict[str, Any]]:
    """Return the JSON objects of a body."""
    return [each for each in documents(body) if isinstance(each, dict)]


def is_unended(interaction: Interaction) -> bool:
    """Return whether a stream in Ollama's or OpenAI's form lacks its end."""
    found = objects(interaction.body)
    if not found or "error" in found[-1]:
        return False
    kind = content_type(interaction)
    if "ndjson" in kind:
        return _lacks(found, "done", True) or _lacks(found, "status", "success")
    return "event-stream" in kind and "choices" in found[-1] and f"data: {END}".encode() not in interaction.body


def content_type(interaction: Interaction) -> str:
    """Return the type of a response's body, without its parameters."""
    values = (
        value for name, values in interaction.headers.items() if name.lower() == "content-type" for value in values
    )
    return next(values, "").partition(";")[0].strip().lower()


def _lacks(found: list[dict[str, Any]], name: str, last: object) -> bool:
    return name in found[0] and found[-1].get(name) != last


def _parsed(text: str) -> list[Any]:
    try:
        return [json.loads(text)]
    except (ValueError, RecursionError):
        return []


def shape(values: list[Any]) -> dict[str, set[str]]:
    """Return the types of all fields of JSON values by their paths: `{"message.content": {"text"}}`.

    The items of a list are one field, `models[]`. A field that is null has no type.
    """
    found: dict[str, set[str]] = {}
    for value in values:
        for path, kind in _typed(value, ""):
            found.setdefault(path, set()).update({kind} - {"null"})
    return found


def _typed(value: object, path: str) -> Iterator[tuple[str, str]]:
    if path:
        yield path, _kind(value)
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _typed(each, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for each in value:
            yield from _typed(each, f"{path}[]")


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, float)):
        return "number"
    names = {str: "text", dict: "object", list: "list", type(None): "null"}
    return names[type(value)]


# --- Replies ---------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Reply:
    """What a model said, joined from a body in the form of Ollama, of OpenAI or of Graftage."""

    text: str = ""
    thinking: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)
    """The name and the arguments of each call of a tool."""
    input_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None


def reply_of(body: bytes) -> Reply:
    """Join the reply of a body; it is empty if nobody said anything."""
    reply = Reply()
    for each in objects(body):
        choice = _first(each.get("choices"))
        part = _dict(choice.get("delta") or choice.get("message") or each.get("message")) or each
        reply.text += _text(part, "content") or _text(each, "response") or _text(choice or each, "text")
        reply.thinking += _text(part, "thinking") or _text(part, "reasoning_content")
        for call in part.get("tool_calls") or ():
            _add_call(reply.calls, _dict(call))
        usage = _dict(each.get("usage"))
        counts = {**each, **usage}
        reply.input_tokens = _number(counts, "prompt_tokens", "input_tokens", "prompt_eval_count") or reply.input_tokens
        reply.output_tokens = _number(counts, "completion_tokens", "output_tokens", "eval_count") or reply.output_tokens
        ended = choice.get("finish_reason") or each.get("finish_reason") or each.get("done_reason")
        reply.finish_reason = str(ended) if ended else reply.finish_reason
        if error := each.get("error") or each.get("raised"):
            reply.error = _text(_dict(error), "message") or str(error)
    return reply


def _add_call(calls: dict[int, list[str]], call: dict[str, Any]) -> None:
    """Add a call, or a piece of one: OpenAI sends arguments in pieces with the call's index."""
    function = _dict(call.get("function")) or call
    index = call.get("index")
    found = calls.setdefault(index if isinstance(index, int) else len(calls), ["", ""])
    arguments = function.get("arguments")
    found[0] += _text(function, "name")
    found[1] += arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)


def _first(value: Any) -> dict[str, Any]:
    return _dict(value[0]) if isinstance(value, list) and value else {}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: dict[str, Any], name: str) -> str:
    found = value.get(name)
    return found if isinstance(found, str) else ""


def _number(value: dict[str, Any], *names: str) -> int | None:
    return next((value[name] for name in names if isinstance(value.get(name), int)), None)
