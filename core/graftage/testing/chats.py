"""Chats by their meaning: the same conversation is equal in the JSON of OpenAI, of Ollama and of Graftage."""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any, Final

__all__ = ["to_chat"]

_OPTIONS: Final = {
    "num_predict": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "num_ctx": "context_window",
    "repeat_penalty": "repetition_penalty",
    "reasoning_effort": "think",
    "response_format": "format",
}
"""Options with several names."""
_ROLES: Final = {"developer": "system"}
_NOT_SAID: Final = frozenset(
    {"messages", "tools", "options", "keep_alive", "stream_options", "user", "metadata", "store"}
)
"""Fields that are read apart, or do not change the reply."""


def to_chat(body: Any) -> dict[str, Any] | None:
    """Return the messages by role and content, the tools by name and schema, the options by meaning.

    None if a body is not a chat.
    """
    messages = body.get("messages") if isinstance(body, dict) else None
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        return None
    more = body.get("options")
    options = {name: each for name, each in body.items() if name not in _NOT_SAID}
    options |= more if isinstance(more, dict) else {}
    tools = body.get("tools")
    return {
        "messages": [_message(each) for each in messages],
        "tools": sorted(map(_tool, tools), key=json.dumps) if isinstance(tools, list) else [],
        "options": dict(_option(name, each) for name, each in options.items()),
    }


def _message(message: dict[str, Any]) -> dict[str, Any]:
    texts, images = _content(message.get("content"))
    given, calls = message.get("images"), message.get("tool_calls")
    images += map(_digest, given) if isinstance(given, list) else []
    role = message.get("role")
    return {
        "role": _ROLES.get(str(role), role),
        "content": "".join(texts),
        "images": images,
        "tool_calls": list(map(_call, calls)) if isinstance(calls, list) else [],
        "thinking": message.get("thinking") or message.get("reasoning_content") or "",
    }


def _content(content: Any) -> tuple[list[str], list[str]]:
    """Return the texts and the digests of the images of a message."""
    texts: list[str] = []
    images: list[str] = []
    for part in content if isinstance(content, list) else [{"text": content or ""}]:
        picture = part.get("image_url") if isinstance(part, dict) else None
        if picture is not None:
            images.append(_digest(picture.get("url") if isinstance(picture, dict) else picture))
        else:
            text = part.get("text") if isinstance(part, dict) else part
            texts.append(text if isinstance(text, str) else json.dumps(part, sort_keys=True))
    return texts, images


def _digest(image: Any) -> str:
    data = str(image).rpartition("base64,")[2]
    return hashlib.sha256(data.encode()).hexdigest()


def _call(call: Any) -> Any:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    return [function.get("name"), arguments or {}]


def _tool(tool: Any) -> Any:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict):
        return tool
    return [function.get("name"), function.get("parameters") or function.get("input_schema") or {}]


def _option(name: str, value: Any) -> tuple[str, Any]:
    name = _OPTIONS.get(name, name)
    if name == "stop" and isinstance(value, str):
        value = [value]
    if name == "format" and isinstance(value, dict) and value.get("type") == "json_schema":
        schema = value.get("json_schema")
        value = schema.get("schema") if isinstance(schema, dict) else schema
    if name == "format" and value == {"type": "json_object"}:
        value = "json"
    return name, value
