"""Read tools and formats, which have a JSON schema, in the forms that callers use."""

from __future__ import annotations

import inspect
import json
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from graftage._engine.inputs import Parse, as_mapping, copy_json_object, is_model_object, items, rejected, suggest, text
from graftage.exceptions import RequestRejected
from graftage.types import Tool

if TYPE_CHECKING:
    from types import UnionType
    from typing import TypeGuard

    from pydantic import BaseModel, TypeAdapter

ToolLike: TypeAlias = "Tool | Callable[..., Any] | Mapping[str, Any] | type | BaseModel"
Tools: TypeAlias = "Sequence[ToolLike] | ToolList | None"
Format: TypeAlias = "Literal['json', ''] | Mapping[str, Any] | type | UnionType | TypeAdapter[Any] | None"


class ToolList(Protocol):
    """The result of `list_tools` of an MCP client."""

    tools: Any


SCHEMA_KEYS = ("parameters", "inputSchema", "input_schema")
"""The names of a tool's schema: here and in OpenAI's API, in MCP, in Anthropic's API."""
TOOL_KEYS = ("name", "description", *SCHEMA_KEYS)
IGNORED_TOOL_KEYS = frozenset(
    {
        "type",
        "strict",
        "cache_control",
        # Anthropic's
        "input_examples",
        "defer_loading",
        "allowed_callers",
        "eager_input_streaming",
        # MCP's
        "title",
        "annotations",
        "outputSchema",
        "icons",
        "execution",
        "_meta",
        "meta",
    }
)
"""Other keys of real tools, which no model needs."""
OUTER_TOOL_KEYS = ("type", "function", "strict", "cache_control")
RUNS_HERE = ("function", "custom")
"""The types of tools that the caller runs, of OpenAI and Anthropic. Other tools run on servers of the vendor."""
WRAPPER_KEYS = frozenset({"type", "name", "description", "strict", "schema"})
"""The keys of the mapping around the schema in the formats of OpenAI and Anthropic."""
TYPES = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})
KEYWORDS = frozenset(
    {"$ref", "additionalProperties", "allOf", "anyOf", "const", "enum", "items", "oneOf", "pattern", "prefixItems"}
    | {"properties", "type"}
)
"""The keywords that restrict something: a mapping without any of them would allow anything."""
WANTED = "a pydantic model or another type, a JSON schema, or 'json'"


# --- Tools -----------------------------------------------------------------------------------------------------------


def tool_items(values: Tools) -> tuple[ToolLike, ...]:
    """Return the tools one by one, as they were given.

    Raises:
        RequestRejected: they are neither a sequence nor the result of `list_tools` of an MCP client.
    """
    return items(getattr(values, "tools", values), "`tools`", "a sequence of tools")


def read_tools(values: Tools) -> tuple[Tool, ...]:
    """Return tools from functions, pydantic models, `Tool`s, or mappings in the form of OpenAI, Anthropic or MCP.

    Raises:
        RequestRejected: a tool cannot be read.
    """
    return tuple(_read_tool(each) for each in tool_items(values))


def _read_tool(value: ToolLike) -> Tool:
    tool = value if isinstance(value, Tool) else _make_tool(value)
    name = text(tool.name, "the name of a tool")
    return Tool(
        name=name,
        description=text(tool.description, f"the description of the tool `{name}`"),
        parameters=copy_json_object(tool.parameters, f"the `parameters` of the tool `{name}`", "a JSON schema"),
    )


def _make_tool(value: object) -> Tool:
    if isinstance(value, Mapping):
        return _tool_from_mapping(value)
    if _has_schema(value):
        return Tool(name=value.__name__, description=_docstring(value), parameters=_schema_and_parse(value)[0])
    if callable(value):
        return _tool_from_function(value)
    if is_model_object(value):
        return _tool_from_mapping(_dump_tool(value))
    raise rejected("a tool", "a function, a mapping, a pydantic model or a `Tool`", value)


def _dump_tool(tool: BaseModel) -> Mapping[str, Any]:
    try:
        return tool.model_dump(by_alias=True, exclude_none=True)
    except Exception:  # noqa: BLE001 - the caller's serializers may raise anything, and repeat the values
        raise rejected("a tool", "a tool whose fields are valid JSON", tool) from None


def _tool_from_mapping(value: Mapping[str, object]) -> Tool:
    """Read a tool from a mapping. Refuse unknown keys: a misspelt one may hold the schema."""
    body = value.get("function", value)
    if not isinstance(body, Mapping) or not body.get("name"):
        raise RequestRejected("A tool has no name.", hint="Give a mapping with `name`, `description` and `parameters`.")
    if body is not value:
        _check_keys(value, OUTER_TOOL_KEYS)
    _check_keys(body, TOOL_KEYS, IGNORED_TOOL_KEYS)
    for kind in (value.get("type"), body.get("type")):
        if kind is not None and kind not in RUNS_HERE:
            raise RequestRejected(
                f"A tool of the type {str(kind)[:40]!r} runs on a server of its vendor.",
                hint="Give your own tool with a schema; its type is `function`.",
            )
    schemas = [body[key] for key in SCHEMA_KEYS if body.get(key) is not None]
    if any(each != schemas[0] for each in schemas[1:]):
        raise RequestRejected(
            f"The tool `{str(body['name'])[:80]}` has different schemas.",
            hint=f"Give only one of {', '.join(f'`{key}`' for key in SCHEMA_KEYS)}.",
        )
    empty: dict[str, Any] = {"type": "object", "properties": {}}
    return Tool(
        name=body["name"],
        description=body.get("description") or "",
        parameters=schemas[0] if schemas and schemas[0] != {} else empty,
    )


def _check_keys(value: Mapping[str, object], known: tuple[str, ...], ignored: frozenset[str] = frozenset()) -> None:
    for key in value:
        if key not in known and key not in ignored:
            raise RequestRejected(f"A tool has the unknown key `{key}`.", hint=suggest(str(key), known))


def _tool_from_function(function: Callable[..., Any]) -> Tool:
    """Make a tool from a function's signature and docstring."""
    called = getattr(function, "__name__", "<lambda>")
    if called == "<lambda>":
        raise _cannot_offer(function, "it has no name", "Give it a name with `def`, or give a `Tool`.")
    try:
        schema = type_adapter(function).json_schema()
    except Exception as error:  # The caller's types may raise anything.
        raise _cannot_offer(function, _first_sentence(error)) from error
    if schema.get("type") != "object":  # Positional-only parameters make an array.
        raise _cannot_offer(function, "its parameters cannot be passed by name")
    summary, arguments = _read_docstring(_docstring(function))
    for name, words in arguments.items():
        if name in schema.get("properties", {}):
            schema["properties"][name].setdefault("description", words)
    return Tool(name=called, description=summary, parameters=schema)


def _cannot_offer(
    function: Callable[..., Any],
    why: str,
    hint: str = "Give a function whose parameters have names and types with a JSON schema, or a `Tool`.",
) -> RequestRejected:
    name = getattr(function, "__name__", type(function).__name__)
    return RequestRejected(f"`{name}` cannot be offered as a tool: {why}.", hint=hint)


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return the text before `Args:`, and the description of each argument, from a docstring in Google's style."""
    summary, _, rest = text.partition("Args:\n")
    arguments: dict[str, str] = {}
    indent, last = len(rest) - len(rest.lstrip(" ")), ""
    for line in rest.splitlines():
        if line and not line.startswith(" "):
            break
        name, colon, words = line.strip().partition(":")
        if last and line.startswith(" " * (indent + 1)):  # The last description continues.
            arguments[last] += f" {line.strip()}"
        elif colon:
            last = name.split("(")[0].strip()
            arguments[last] = words.strip()
    return summary.split("\n\nReturns:")[0].strip(), arguments


def _docstring(value: object) -> str:
    """Return the docstring that the author wrote: not an inherited one, and not one that Python generated."""
    written = value.__doc__ if inspect.isroutine(value) else getattr(value, "__dict__", {}).get("__doc__")
    # `dataclass` and `NamedTuple` write the signature.
    generated = inspect.isclass(value) and str(written).startswith(f"{value.__name__}(")
    return inspect.cleandoc(written) if isinstance(written, str) and not generated else ""


def _first_sentence(error: Exception) -> str:
    """Return the first sentence of pydantic's message, without advice and links."""
    return re.split(r"\n|\. ", str(error), maxsplit=1)[0].rstrip(".")[:200]


# --- Formats ---------------------------------------------------------------------------------------------------------


def read_format(value: Format) -> tuple[Mapping[str, Any] | Literal["json"] | None, Parse | None]:
    """Return the JSON schema to send, and the function that reads a reply into `Reply.parsed`.

    Args:
        value: a pydantic model or another type that pydantic knows, a `TypeAdapter`, a JSON schema, OpenAI's
            `response_format`, or `"json"`. None means no format, and so does `""`, as in Ollama's client.

    Raises:
        RequestRejected: the value is something else.
    """
    given: Any = _unwrap(value) if isinstance(value, Mapping) else value
    if given is None or (isinstance(given, str) and not given):
        return None, None
    if isinstance(given, str) and given == "json":
        return "json", json.loads
    if isinstance(given, Mapping):
        return copy_json_object(given, "`format`", WANTED), json.loads
    schema, parse = _schema_and_parse(given)
    if not schema:
        raise RequestRejected("The type given as `format` allows anything.", hint=f"Give {WANTED}.")
    return copy_json_object(schema, "`format`", WANTED), parse


def _unwrap(value: Mapping[str, object]) -> Any:
    """Return the schema in a mapping: the mapping itself, or the schema inside OpenAI's `response_format`."""
    kind = value.get("type")
    schema: object = value
    if kind == "text":
        return None
    if kind in ("json_schema", "json_object") or ("schema" in value and value.keys() <= WRAPPER_KEYS):
        inner = as_mapping(value.get("json_schema", value))
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if schema is None and kind == "json_object":
            return "json"
    if not isinstance(schema, Mapping) or not _is_schema(schema):
        raise RequestRejected("The `format` has no schema.", hint=f"Give {WANTED}.")
    return schema


def _is_schema(value: Mapping[str, object]) -> bool:
    kind = value.get("type")
    return not KEYWORDS.isdisjoint(value) and (not isinstance(kind, str) or kind in TYPES)


# --- What pydantic makes of types ------------------------------------------------------------------------------------


def _has_schema(value: object) -> TypeGuard[type[BaseModel]]:
    return inspect.isclass(value) and hasattr(value, "model_json_schema")


def _schema_and_parse(kind: object) -> tuple[dict[str, Any], Parse]:
    """Return the JSON schema of a type, and the function that makes an instance from JSON."""
    try:
        if _has_schema(kind):
            return kind.model_json_schema(), kind.model_validate_json
        adapter = kind if _is_adapter(kind) else type_adapter(kind) if _is_type(kind) else None
        if adapter is not None:
            return adapter.json_schema(), adapter.validate_json
    except Exception as error:  # The types of the caller may raise anything.
        name = kind.__name__ if inspect.isclass(kind) else str(kind)
        raise RequestRejected(
            f"`{name[:80]}` has no JSON schema: {_first_sentence(error)}.",
            hint="Give a type whose fields all have a JSON schema, or write the schema yourself.",
        ) from error
    raise rejected("`format`", WANTED, kind)


def _is_adapter(value: object) -> TypeGuard[TypeAdapter[Any]]:
    return hasattr(value, "validate_json") and not inspect.isclass(value)


def _is_type(value: object) -> bool:
    """Return whether a value is a type. A function is not: pydantic would call it with the reply."""
    alias = hasattr(value, "__supertype__") or hasattr(value, "__value__")  # From `NewType`, or from `type X = …`.
    return inspect.isclass(value) or typing.get_origin(value) is not None or alias


def type_adapter(kind: Any) -> TypeAdapter[Any]:
    """Return what checks and reads values of a type, or the arguments of a function."""
    from pydantic import TypeAdapter  # Tools and formats are rare, and pydantic is slow to import

    if sys.version_info < (3, 12) and typing.is_typeddict(kind):
        kind = _convert_typed_dict(kind)
    return TypeAdapter(kind)


def _convert_typed_dict(kind: Any) -> Any:
    """Return a `TypedDict` as one of `typing_extensions`: before Python 3.12 pydantic reads no other."""
    import typing_extensions  # A requirement of pydantic, so it is installed

    required, optional = typing_extensions.Required, typing_extensions.NotRequired
    keys = {}
    for name, hint in typing_extensions.get_type_hints(kind, include_extras=True).items():
        marker: Any = typing.get_origin(hint)
        bare = typing.get_args(hint)[0] if marker in (required, optional) else hint
        keys[name] = (
            bare if marker is required or (marker is None and name in kind.__required_keys__) else optional[bare]
        )
    made: Any = typing_extensions.TypedDict
    return made(kind.__name__, keys)
