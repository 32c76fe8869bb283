"""Reads what callers write - messages, pictures, tools, formats, options - into the contract's types."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

from graftage.exceptions import CapabilityUnsupported, ProtocolError, RequestRejected
from graftage.types import Image, Message, Reply, Role, Tool, ToolCall

if TYPE_CHECKING:
    from pydantic import BaseModel

MessageLike: TypeAlias = "str | Message | Reply | Mapping[str, Any]"
Messages: TypeAlias = "MessageLike | Sequence[MessageLike]"
ImageLike: TypeAlias = "str | Path | bytes | Image"
ToolLike: TypeAlias = "Tool | Callable[..., Any] | Mapping[str, Any] | type"
Format: TypeAlias = "Literal['json'] | Mapping[str, Any] | type | None"
Parse: TypeAlias = Callable[[str], Any]

ROLES: tuple[str, ...] = get_args(Role)
MESSAGE_KEYS = ("role", "content", "images", "tool_calls", "tool_name", "tool_call_id", "thinking")
SYNONYMS = {
    "num_ctx": "context_window",
    "n_ctx": "context_window",
    "context_length": "context_window",
    "num_predict": "max_tokens",
    "n_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "format": "format",
    "keep_alive": "keep_alive",
    "think": "think",
    "context_window": "context_window",
    "max_tokens": "max_tokens",
}
"""What an option is called here when it is a parameter of the call: as an option it would bypass the limits."""


def read_messages(value: Messages, images: Sequence[ImageLike] | None = None) -> tuple[Message, ...]:
    """A conversation from a string, a message, or a sequence of messages and mappings.

    `images` go to the last message of the user.

    Raises:
        RequestRejected: it cannot be read as messages.
    """
    if isinstance(value, (str, Message, Reply, Mapping)):
        value = (value,)
    if not isinstance(value, Iterable):
        raise _rejected("`messages` must be a text, a message, or a sequence of messages", value)
    messages = [read_message(each) for each in value]
    if not messages:
        raise RequestRejected("There are no messages.", hint="Send at least one.")
    if images:
        _attach(messages, read_images(images))
    return tuple(messages)


def read_message(value: MessageLike) -> Message:
    """One message."""
    if isinstance(value, Message):
        if not isinstance(value.content, str):
            raise _rejected("the `content` of a message must be a text", value.content)
        return value
    if isinstance(value, str):
        return Message(role="user", content=value)
    if isinstance(value, Reply):
        return value.message
    if not isinstance(value, Mapping):
        raise _rejected("a message must be a text, a Message or a mapping", value)
    for key in value:
        if key not in MESSAGE_KEYS:
            raise RequestRejected(f"A message has no key `{key}`.", hint=_nearest(str(key), MESSAGE_KEYS))
    role = value.get("role")
    if role not in ROLES:
        raise RequestRejected(f"A message has the role {role!r}.", hint=f"Use one of {', '.join(ROLES)}.")
    content = value.get("content")
    if not isinstance(content, (str, type(None))):
        raise _rejected("the `content` of a message must be a text", content)
    return Message(
        role=cast("Role", role),
        content=content or "",
        images=read_images(value.get("images") or ()),
        tool_calls=tuple(_read_tool_call(each, place) for place, each in enumerate(value.get("tool_calls") or ())),
        tool_name=value.get("tool_name"),
        tool_call_id=value.get("tool_call_id"),
        thinking=value.get("thinking"),
    )


def read_images(values: Sequence[ImageLike]) -> tuple[Image, ...]:
    """Pictures from paths or bytes."""
    if isinstance(values, (str, bytes)):
        raise _rejected("`images` must be a sequence of paths or bytes", values)
    return tuple(_read_image(each) for each in values)


def _read_image(value: ImageLike) -> Image:
    if isinstance(value, Image):
        return value
    if isinstance(value, bytes):
        return Image(data=value)
    if not isinstance(value, (str, Path)):
        raise _rejected("an image must be a path or bytes", value)
    try:
        return Image(data=Path(value).expanduser().read_bytes())
    except (OSError, ValueError) as error:
        raise RequestRejected(
            f"The image {str(value)[:200]!r} cannot be read: {error}.", hint="Check the path, or give its bytes."
        ) from error


def _attach(messages: list[Message], images: tuple[Image, ...]) -> None:
    from dataclasses import replace  # noqa: PLC0415 - pictures are rare

    for place in range(len(messages) - 1, -1, -1):
        if messages[place].role == "user":
            messages[place] = replace(messages[place], images=(*messages[place].images, *images))
            return
    raise RequestRejected(
        "There is no message of the user that the images could go with.", hint="Add one with the role `user`."
    )


def _read_tool_call(value: Any, place: int) -> ToolCall:
    if isinstance(value, ToolCall):
        return value
    body = value.get("function", value) if isinstance(value, Mapping) else None
    name = body.get("name") if isinstance(body, Mapping) else None
    if not isinstance(body, Mapping) or not isinstance(name, str):
        raise _rejected("a tool call must be a ToolCall or a mapping with `name` and `arguments`", value)
    arguments = body.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RequestRejected(
                f"The arguments of the tool call `{name}` are not JSON.", hint="Give a mapping, or JSON of an object."
            ) from error
    if not isinstance(arguments, Mapping):
        raise _rejected("the arguments of a tool call must be an object", arguments)
    return ToolCall(name=name, arguments=arguments, id=str(value.get("id") or f"call_{place}"))


# --- Tools -----------------------------------------------------------------------------------------------------------


def read_tools(values: Sequence[ToolLike] | None) -> tuple[Tool, ...]:
    """Tools from functions, pydantic models, mappings (also in OpenAI's form), or `Tool`.

    Raises:
        RequestRejected: one of them cannot be read.
    """
    if values is None:
        return ()
    if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
        raise _rejected("`tools` must be a sequence of tools", values)
    return tuple(_read_tool(each) for each in values)


def _read_tool(value: ToolLike) -> Tool:
    if isinstance(value, Tool):
        return value
    if isinstance(value, Mapping):
        body = value.get("function", value)
        if not isinstance(body, Mapping) or not isinstance(body.get("name"), str):
            raise _rejected("a tool needs a `name`", value)
        return Tool(
            name=body["name"],
            description=str(body.get("description") or ""),
            parameters=body.get("parameters") or {"type": "object", "properties": {}},
        )
    if inspect.isclass(value) and hasattr(value, "model_json_schema"):
        return Tool(name=value.__name__, description=inspect.getdoc(value) or "", parameters=value.model_json_schema())
    if callable(value):
        return _tool_of(value)
    raise _rejected("a tool must be a function, a mapping, a pydantic model or a Tool", value)


def _tool_of(function: Callable[..., Any]) -> Tool:
    """A tool from a function's signature and docstring."""
    from pydantic import TypeAdapter  # noqa: PLC0415 - tools are rare, and pydantic is slow to import
    from pydantic.errors import PydanticUserError  # noqa: PLC0415

    try:
        adapter: TypeAdapter[Any] = TypeAdapter(cast("Any", function))
        schema = adapter.json_schema()
        called = function.__name__
    except (PydanticUserError, AttributeError, NameError, TypeError) as error:
        raise _no_tool(function, str(error)) from error
    if schema.get("type") != "object":  # Positional parameters make an array, which a model cannot call by name.
        raise _no_tool(function, "its parameters have no names to call them by")
    summary, arguments = _read_docstring(inspect.getdoc(function) or "")
    for name, text in arguments.items():
        if name in schema.get("properties", {}):
            schema["properties"][name].setdefault("description", text)
    return Tool(name=called, description=summary, parameters=schema)


def _no_tool(function: Callable[..., Any], why: str) -> RequestRejected:
    name = getattr(function, "__name__", type(function).__name__)
    return RequestRejected(
        f"`{name}` cannot be offered as a tool: {why}.",
        hint="Give a function whose parameters have names and types with a JSON schema, or a `Tool`.",
    )


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """The part before `Args:`, and what Google's style says of each argument."""
    summary, _, rest = text.partition("Args:\n")
    arguments: dict[str, str] = {}
    for line in rest.splitlines():
        if line and not line.startswith(" "):
            break
        name, colon, words = line.strip().partition(":")
        if colon:
            arguments[name.split("(")[0].strip()] = words.strip()
    return summary.split("\n\nReturns:")[0].strip(), arguments


# --- Formats ---------------------------------------------------------------------------------------------------------


def read_format(value: Format) -> tuple[Mapping[str, Any] | Literal["json"] | None, Parse | None]:
    """The JSON schema to send, and how to read the answer into `Reply.parsed`.

    Raises:
        RequestRejected: it is neither a pydantic model, a schema, nor `"json"`.
    """
    if value is None:
        return None, None
    if value == "json":
        return "json", json.loads
    if inspect.isclass(value) and hasattr(value, "model_json_schema"):
        model = cast("type[BaseModel]", value)
        return model.model_json_schema(), model.model_validate_json
    if isinstance(value, Mapping) and value:
        return value, json.loads
    raise _rejected("`format` must be a pydantic model, a JSON schema or 'json'", value)


def parsed(reply: Reply, parse: Parse) -> Any:
    """The text of a reply as `format` wanted it.

    Raises:
        ProtocolError: it is not; the reply is in `partial`.
    """
    try:
        return parse(reply.text)
    except (ValueError, RecursionError) as error:  # pydantic's ValidationError is a ValueError
        cut = reply.finish_reason == "length"
        raise ProtocolError(
            "The answer was cut before its JSON was complete." if cut else "The answer does not fit the `format`.",
            hint="Raise `max_tokens`." if cut else "A larger model, or a simpler schema, may do better.",
            partial=reply,
            details={"reason": f"{type(error).__name__} of {getattr(error, 'title', 'JSON')}"},
        ) from error


# --- Options ---------------------------------------------------------------------------------------------------------


def read_options(options: Mapping[str, Any] | None, known: frozenset[str]) -> dict[str, Any]:
    """The options of a call, once every name is known.

    Raises:
        RequestRejected: a name is unknown, or belongs to a parameter of the call.
    """
    if options is not None and not isinstance(options, Mapping):
        raise _rejected("`options` must be a mapping", options)
    for name in options or {}:
        if name in known:
            continue
        if name in SYNONYMS:
            raise RequestRejected(f"`{name}` is not an option.", hint=f"Use the parameter `{SYNONYMS[name]}`.")
        raise RequestRejected(f"There is no option `{name}`.", hint=_nearest(str(name), known))
    return {name: value for name, value in (options or {}).items() if value is not None}


def require(feature: str, has: bool, provider: str, what: str | None = None) -> None:
    """Refuse what a provider cannot do, before anything is sent.

    Raises:
        CapabilityUnsupported: `has` is False.
    """
    if not has:
        raise CapabilityUnsupported(
            f"The provider `{provider}` cannot do `{what or feature}`.",
            provider=provider,
            hint="Choose another provider.",
        )


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"Did you mean `{close[0]}`?" if close else f"Known are {', '.join(names) or 'none'}."


def _rejected(problem: str, value: object) -> RequestRejected:
    return RequestRejected(f"{problem[0].upper()}{problem[1:]}, not {type(value).__name__}.".replace("``", "`"))
