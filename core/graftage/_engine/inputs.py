"""Reads what callers write - messages, pictures, tools, formats, options - into the contract's types."""

from __future__ import annotations

import base64
import contextlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args
from urllib.parse import unquote_to_bytes

from graftage._values import close, read_file, user_path
from graftage.exceptions import CapabilityUnsupported, ProtocolError, RequestRejected
from graftage.types import Image, Message, Reply, Role, Tool, ToolCall

if TYPE_CHECKING:
    from typing import TypeGuard

    from pydantic import BaseModel

MessageLike: TypeAlias = "str | Message | Reply | Mapping[str, Any] | BaseModel"
Messages: TypeAlias = "MessageLike | Sequence[MessageLike]"
ImageLike: TypeAlias = "str | Path | bytes | bytearray | memoryview | Image | BaseModel"
ToolLike: TypeAlias = "Tool | Callable[..., Any] | Mapping[str, Any] | type | BaseModel"
Format: TypeAlias = "Literal['json'] | Mapping[str, Any] | type | None"
Parse: TypeAlias = Callable[[str], Any]

ROLES: tuple[str, ...] = get_args(Role)
MESSAGE_KEYS = ("role", "content", "images", "tool_calls", "tool_name", "tool_call_id", "thinking")
LARGEST_IMAGE = 64 * 1024 * 1024
"""Bytes of a picture: more than any model takes."""
PICTURES = (
    (re.compile(rb"\x89PNG"), "image/png"),
    (re.compile(rb"\xff\xd8\xff"), "image/jpeg"),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), "image/webp"),
    (re.compile(rb"GIF8[79]a"), "image/gif"),
    (re.compile(rb"BM.{4}\0{4}", re.DOTALL), "image/bmp"),
    (re.compile(rb"II\*\0|MM\0\*"), "image/tiff"),
    (re.compile(rb".{4}ftypavi[fs]", re.DOTALL), "image/avif"),
    (re.compile(rb".{4}ftyp(?:hei[cx]|mif1)", re.DOTALL), "image/heic"),
)
"""How the files of pictures begin."""
CALL_KEYS = ("id", "type", "index", "function", "name", "arguments")
SCHEMA_KEYS = ("parameters", "inputSchema", "input_schema")
"""What the schema of a tool is called: here and by OpenAI, by MCP, by Anthropic."""
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
"""What else real tools have, and no model needs."""
OUTER_TOOL_KEYS = ("type", "function", "strict", "cache_control")
MOST_WORDS = 4000
"""Characters of what is wrong with an answer: each of many fields may be."""
DEEPEST = 64
"""Levels of nesting in schemas, options and arguments: servers refuse, or fall over, where there are many more."""
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


def read_messages(value: Messages, images: Iterable[ImageLike] | None = None) -> tuple[Message, ...]:
    """A conversation from a string, a message, or a sequence of messages and mappings.

    `images` go to the last message of the user.

    Raises:
        RequestRejected: it cannot be read as messages.
    """
    value = fields(value)
    if isinstance(value, (str, Message, Reply, Mapping)):
        value = (value,)
    messages = [read_message(each) for each in items(value, "`messages`", "a text, a message, or a sequence of them")]
    if not messages:
        raise RequestRejected("There are no messages.", hint="Send at least one.")
    if pictures := read_images(images, paths=True):
        _attach(messages, pictures)
    return tuple(messages)


def read_message(value: MessageLike) -> Message:
    """One message."""
    if isinstance(value, str):
        return Message(role="user", content=text(value, "the text of a message"))
    given = _parts(fields(value))
    role = given.get("role")
    if role not in ROLES:
        raise RequestRejected(f"A message has the role {repr(role)[:40]}.", hint=f"Use one of {', '.join(ROLES)}.")
    calls = items(given.get("tool_calls"), "the `tool_calls` of a message", "a sequence of tool calls")
    return Message(
        role=cast("Role", role),
        content=optional_text(given.get("content"), "the `content` of a message") or "",
        images=read_images(given.get("images")),
        tool_calls=tuple(_read_sent_tool_call(each, place) for place, each in enumerate(calls)),
        tool_name=optional_text(given.get("tool_name"), "the `tool_name` of a message"),
        tool_call_id=optional_text(given.get("tool_call_id"), "the `tool_call_id` of a message"),
        thinking=optional_text(given.get("thinking"), "the `thinking` of a message"),
    )


def _parts(value: Message | Reply | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(value, Reply):
        value = value.message
    if isinstance(value, Message):
        return {name: getattr(value, name) for name in MESSAGE_KEYS}
    if not isinstance(value, Mapping):
        raise rejected("a message", "a text, a `Message` or a mapping", value)
    for key in value:
        if key not in MESSAGE_KEYS:
            raise RequestRejected(f"A message has no key `{key}`.", hint=_nearest(str(key), MESSAGE_KEYS))
    return value


def fields(value: Any) -> Any:
    """What is set in an object of pydantic's, such as `ollama.Message`, as a mapping; anything else as it is.

    It is not dumped: one of `ollama.Image` reads a file by its name then, and the name may have come from outside.
    """
    if not _is_model_object(value):
        return value
    return {name: each for name, each in value if each is not None}


def _is_model_object(value: object) -> TypeGuard[BaseModel]:
    return hasattr(value, "model_dump") and not inspect.isclass(value)


def read_images(values: Iterable[ImageLike] | None, *, paths: bool = False) -> tuple[Image, ...]:
    """Pictures, each with its bytes in `data`.

    Args:
        values: bytes, paths, images, or texts: `data:` URIs and base64.
        paths: a text that is no `data:` URI is a path. Never inside a message, which may have come from outside: the
            sender would choose a file of this machine to be read and sent.

    Raises:
        RequestRejected: one of them is no picture, or its file cannot be read.
    """
    wanted = "a sequence of paths, bytes or images"
    return tuple(_read_image(each, paths=paths) for each in items(values, "`images`", wanted))


def _read_image(value: ImageLike, *, paths: bool) -> Image:
    if _is_model_object(value):  # As `ollama.Image`; a text in it is read as any other.
        value = fields(value).get("value")
    if isinstance(value, str):
        image = _read_picture(value, paths=paths)
    elif isinstance(value, Path):
        image = Image(path=value)
    else:
        image = value if isinstance(value, Image) else Image(data=cast("bytes", value))
    if image.path is not None and image.data:
        raise RequestRejected("An image has both `data` and a `path`.", hint="Give one of them.")
    data = image.data if image.path is None else _read_image_file(image.path)
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise rejected("an image", "bytes, a path or a `graftage.Image`", data)
    data = bytes(data)
    if not data:
        raise RequestRejected("An image is empty.", hint="Give the bytes of its file.")
    if len(data) > LARGEST_IMAGE:
        raise RequestRejected(f"An image is larger than {LARGEST_IMAGE} bytes.", hint="Make it smaller.")
    return Image(data=data, media_type=optional_text(image.media_type, "the media type of an image") or _kind(data))


def _kind(data: bytes) -> str | None:
    """The media type of a picture, by its first bytes."""
    return next((name for begins, name in PICTURES if begins.match(data)), None)


def _read_picture(value: str, *, paths: bool) -> Image:
    """A picture from a text, of which nothing is repeated in an error."""
    scheme = value.lstrip()[:8].lower()
    if scheme.startswith(("http://", "https://")):
        raise RequestRejected("An image is given by its address.", hint="Download it, and give its bytes.")
    if scheme.startswith("data:"):
        return _read_data_uri(value.strip())
    if paths:
        with contextlib.suppress(OSError):  # It names the file: it must be no cause of what is raised.
            return Image(data=read_file(user_path(value), LARGEST_IMAGE))
        raise RequestRejected(
            "A text given as an image is neither a `data:` URI nor the path of a file that can be read.",
            hint="Check the path; give base64 text as `data:image/png;base64,…`.",
        )
    data = _from_base64(_bytes(value))
    if data is None or _kind(data) is None:  # Many words and paths are valid base64, too.
        raise RequestRejected(
            "A text given as an image of a message is neither base64 of a picture nor a `data:` URI.",
            hint="A text in a message is never a path: give a `pathlib.Path`, a `graftage.Image`, or bytes.",
        )
    return Image(data=data)


def _read_data_uri(value: str) -> Image:
    head, _, body = value.partition(",")
    media_type, *parameters = (each.strip() for each in head.lower().removeprefix("data:").split(";"))
    raw = unquote_to_bytes(_bytes(body))
    data = _from_base64(raw) if "base64" in parameters else raw
    if not data or not media_type.startswith("image/"):
        raise RequestRejected(
            "An image cannot be read from its `data:` URI.", hint="Give `data:image/png;base64,…`, or its bytes."
        )
    return Image(data=data, media_type=media_type)


def _from_base64(value: bytes) -> bytes | None:
    """What a text in base64 stands for: in either alphabet, in one line or several, with its padding or without."""
    value = b"".join(value.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    with contextlib.suppress(ValueError):
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    return None


def _bytes(value: str) -> bytes:
    return value.encode("utf-8", "surrogatepass")


def _read_image_file(path: str | Path) -> bytes:
    if not isinstance(path, (str, Path)):
        raise rejected("the `path` of an image", "a text or a `pathlib.Path`", path)
    try:
        return read_file(user_path(path), LARGEST_IMAGE)
    except OSError as error:
        raise RequestRejected(
            f"The image {str(path)[:200]!r} cannot be read: {error.strerror}.",
            hint="Check the path, or give its bytes.",
        ) from error


def _attach(messages: list[Message], images: tuple[Image, ...]) -> None:
    for place in range(len(messages) - 1, -1, -1):
        if messages[place].role == "user":
            messages[place] = replace(messages[place], images=(*messages[place].images, *images))
            return
    raise RequestRejected(
        "There is no message of the user that the images could go with.", hint="Add one with the role `user`."
    )


# --- Tool calls ------------------------------------------------------------------------------------------------------


def read_tool_call(name: Any, arguments: Any, call_id: str) -> ToolCall:
    """A call of a tool as a model has written it, for providers.

    Args:
        name: the name of the tool.
        arguments: an object, or JSON of one in a text; None, `null` and an empty text are an object without entries.
        call_id: names the call when its result is sent back.

    Raises:
        ProtocolError: it has no name, or arguments that are no object; what the model wrote is in `partial.raw`.
    """
    found = _read_arguments(arguments)
    if isinstance(name, str) and name and found is not None:
        return ToolCall(name=name, arguments=found, id=call_id)
    of = f" of the tool `{name[:80]}`" if isinstance(name, str) and name else ""
    raise ProtocolError(
        f"The model's call{of} is malformed: {'its arguments are no JSON object' if of else 'it names no tool'}.",
        hint="Ask again, raise `max_tokens`, or choose a larger model.",
        partial=Reply(text="", raw={"name": name, "arguments": arguments}),
    )


def _read_arguments(value: Any) -> dict[str, Any] | None:
    """The arguments of a tool call; None where they cannot be read as an object."""
    with contextlib.suppress(ValueError, RecursionError):
        while isinstance(value, str):  # Some servers write the JSON of a text that is JSON.
            value = json.loads(value) if value.strip() else None
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else None


def _read_sent_tool_call(value: Any, place: int) -> ToolCall:
    """A tool call of an earlier answer, on its way back to the model."""
    if isinstance(value, ToolCall):
        value = {"name": value.name, "arguments": value.arguments, "id": value.id}
    value = fields(value)
    body = fields(value.get("function", value)) if isinstance(value, Mapping) else None
    if not isinstance(body, Mapping) or not isinstance(body.get("name"), str):
        raise RequestRejected(
            "A tool call has no name.", hint="Give a `ToolCall`, or a mapping with `name` and `arguments`."
        )
    name = text(body["name"], "the name of a tool call")
    unknown = [key for key in body if key not in CALL_KEYS]
    if unknown and "arguments" not in body:
        raise RequestRejected(f"A tool call has no key `{unknown[0]}`.", hint="Give its arguments as `arguments`.")
    arguments = _read_arguments(body.get("arguments", value.get("arguments")))
    if arguments is None:
        raise RequestRejected(
            f"The call of the tool `{name}` is malformed: its arguments are no JSON object.",
            hint="Give an object, or JSON of one; leave out a message whose call a model has written wrongly.",
        )
    return ToolCall(
        name=name,
        arguments=plain_object(arguments, f"the arguments of the tool call `{name}`", "an object"),
        id=text(str(value.get("id") or f"call_{place}"), "the id of a tool call"),
    )


# --- Tools -----------------------------------------------------------------------------------------------------------


def read_tools(values: Iterable[ToolLike] | None) -> tuple[Tool, ...]:
    """Tools from functions, pydantic models, `Tool`, or mappings in OpenAI's, Anthropic's or MCP's form.

    Raises:
        RequestRejected: one of them cannot be read.
    """
    return tuple(_read_tool(each) for each in items(values, "`tools`", "a sequence of tools"))


def _read_tool(value: ToolLike) -> Tool:
    tool = value if isinstance(value, Tool) else _made_tool(value)
    name = text(tool.name, "the name of a tool")
    return Tool(
        name=name,
        description=text(tool.description, f"the description of the tool `{name}`"),
        parameters=plain_object(tool.parameters, f"the `parameters` of the tool `{name}`", "a JSON schema"),
    )


def _made_tool(value: Callable[..., Any] | Mapping[str, Any] | type | BaseModel) -> Tool:
    if isinstance(value, Mapping):
        return _tool_from(value)
    if _has_schema(value):
        return Tool(name=value.__name__, description=inspect.getdoc(value) or "", parameters=_schema_of(value))
    if callable(value):
        return _tool_of(value)
    if _is_model_object(value):
        return _tool_from(_dumped_tool(value))
    raise rejected("a tool", "a function, a mapping, a pydantic model or a `Tool`", value)


def _dumped_tool(tool: BaseModel) -> Mapping[str, Any]:
    try:
        return tool.model_dump(by_alias=True, exclude_none=True)
    except Exception:  # noqa: BLE001 - serializers of the caller's own types run in there, and may repeat what they got
        raise rejected("a tool", "one whose fields JSON has", tool) from None


def _tool_from(value: Mapping[str, Any]) -> Tool:
    """A tool from a mapping; a key that is not known may be a misspelt one, and the schema with it lost."""
    body = value.get("function", value)
    if not isinstance(body, Mapping) or not body.get("name"):
        raise RequestRejected("A tool has no name.", hint="Give a mapping with `name`, `description` and `parameters`.")
    if body is not value:
        _check_keys(value, OUTER_TOOL_KEYS)
    _check_keys(body, TOOL_KEYS, IGNORED_TOOL_KEYS)
    schemas = [body[key] for key in SCHEMA_KEYS if body.get(key) is not None]
    if any(each != schemas[0] for each in schemas[1:]):
        raise RequestRejected(
            f"The tool `{str(body['name'])[:80]}` has several schemas that are not the same.",
            hint=f"Give one of {', '.join(f'`{key}`' for key in SCHEMA_KEYS)}.",
        )
    empty: dict[str, Any] = {"type": "object", "properties": {}}
    return Tool(
        name=body["name"],
        description=body.get("description") or "",
        parameters=schemas[0] if schemas and schemas[0] != {} else empty,
    )


def _check_keys(value: Mapping[str, Any], known: tuple[str, ...], ignored: frozenset[str] = frozenset()) -> None:
    for key in value:
        if key not in known and key not in ignored:
            raise RequestRejected(f"A tool has no key `{key}`.", hint=_nearest(str(key), known))


def _tool_of(function: Callable[..., Any]) -> Tool:
    """A tool from a function's signature and docstring."""
    from pydantic import TypeAdapter  # noqa: PLC0415 - tools are rare, and pydantic is slow to import

    called = getattr(function, "__name__", "<lambda>")
    if called == "<lambda>":
        raise _no_tool(function, "it has no name", "Give it a name with `def`, or give a `Tool`.")
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(cast("Any", function))
        schema = adapter.json_schema()
    except Exception as error:  # Signatures and schemas of the caller's own types are made in there.
        raise _no_tool(function, _first_sentence(error)) from error
    if schema.get("type") != "object":  # Positional parameters make an array, which a model cannot call by name.
        raise _no_tool(function, "its parameters have no names to call them by")
    summary, arguments = _read_docstring(inspect.getdoc(function) or "")
    for name, words in arguments.items():
        if name in schema.get("properties", {}):
            schema["properties"][name].setdefault("description", words)
    return Tool(name=called, description=summary, parameters=schema)


def _no_tool(
    function: Callable[..., Any],
    why: str,
    hint: str = "Give a function whose parameters have names and types with a JSON schema, or a `Tool`.",
) -> RequestRejected:
    name = getattr(function, "__name__", type(function).__name__)
    return RequestRejected(f"`{name}` cannot be offered as a tool: {why}.", hint=hint)


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


def _has_schema(value: object) -> TypeGuard[type[BaseModel]]:
    return inspect.isclass(value) and hasattr(value, "model_json_schema")


def _schema_of(model: type[BaseModel]) -> dict[str, Any]:
    try:
        return model.model_json_schema()
    except Exception as error:  # Schemas of the caller's own types are made in there.
        raise RequestRejected(
            f"`{model.__name__}` has no JSON schema: {_first_sentence(error)}.",
            hint="Give a model all of whose fields have types with a JSON schema, or a schema of your own.",
        ) from error


def _first_sentence(error: Exception) -> str:
    """What pydantic says, without its advice and its links."""
    return re.split(r"\n|\. ", str(error), maxsplit=1)[0].rstrip(".")[:200]


# --- Formats ---------------------------------------------------------------------------------------------------------


def read_format(value: Format) -> tuple[Mapping[str, Any] | Literal["json"] | None, Parse | None]:
    """The JSON schema to send, and how to read the answer into `Reply.parsed`.

    Raises:
        RequestRejected: it is neither a pydantic model, a schema, nor `"json"`.
    """
    if value is None:
        return None, None
    if isinstance(value, str) and value == "json":
        return "json", json.loads
    wanted = "a pydantic model, a JSON schema or 'json'"
    if _has_schema(value):
        return plain_object(_schema_of(value), "`format`", wanted), value.model_validate_json
    if not value:
        raise rejected("`format`", wanted, value)
    return plain_object(value, "`format`", wanted), json.loads


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


def reason_of(error: ProtocolError) -> str:
    """Why an answer did not fit its format, in the words of what read it, for the model."""
    words = re.sub(r"\n *For further information visit \S+", "", str(error.__cause__ or error.message))
    return words[:MOST_WORDS]


# --- Options ---------------------------------------------------------------------------------------------------------


def read_options(options: Mapping[str, Any] | BaseModel | None, known: frozenset[str]) -> dict[str, Any]:
    """The options of a call, once every name is known.

    Raises:
        RequestRejected: a name is unknown, or belongs to a parameter of the call; a value is not JSON.
    """
    options = fields(options)
    if options is not None and not isinstance(options, Mapping):
        raise rejected("`options`", "a mapping", options)
    for name in options or {}:
        if name in known:
            continue
        if name in SYNONYMS:
            raise RequestRejected(f"`{name}` is not an option.", hint=f"Use the parameter `{SYNONYMS[name]}`.")
        raise RequestRejected(f"There is no option `{name}`.", hint=_nearest(str(name), known))
    given = (options or {}).items()
    return {name: plain(value, f"the option `{name}`") for name, value in given if value is not None}


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


def close_names(wanted: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names that were probably meant: spelt alike, or of the same family."""
    near = close(wanted.lower(), names, most=3, cutoff=0.5)
    family = wanted.partition(":")[0].lower()
    return tuple(dict.fromkeys([*near, *(name for name in names if name.partition(":")[0] == family)]))


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = close(name, names)
    return f"Did you mean `{near[0]}`?" if near else f"Known are {', '.join(names) or 'none'}."


# --- What can be sent ------------------------------------------------------------------------------------------------


def items(value: Any, what: str, wanted: str) -> tuple[Any, ...]:
    """What is in a sequence or comes from a generator, in its order; an error of that generator is the caller's own.

    Raises:
        RequestRejected: it is a text, has no order, or cannot be iterated over.
    """
    if value is None:
        return ()
    if isinstance(value, (str, bytes, bytearray, Mapping, AbstractSet)) or not isinstance(value, Iterable):
        raise rejected(what, wanted, value)
    return tuple(value)


def text(value: Any, what: str) -> str:
    """A text that can be sent.

    Raises:
        RequestRejected: it is none, or UTF-8 has no bytes for it.
    """
    if not isinstance(value, str):
        raise rejected(what, "a text", value)
    if not value.isascii() and not _is_utf8(value):
        raise RequestRejected(
            f"There is half of a surrogate pair in {what}, which is no character.",
            hint='Take it out: `text.encode("utf-8", "replace").decode()` puts a `?` in its place.',
        )
    return value


def optional_text(value: Any, what: str) -> str | None:
    """A text that can be sent, or None."""
    return None if value is None else text(value, what)


def _is_utf8(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # It holds the text: it must be no cause of what is raised.
        return False
    return True


def plain(value: Any, what: str, depth: int = DEEPEST) -> Any:
    """A copy of JSON data, of plain dictionaries and lists.

    Raises:
        RequestRejected: it is not JSON: another type, a number that is not finite, nested too deeply or in a circle.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return text(value, what)
    if isinstance(value, (int, float)):
        return _finite(value, what)
    if not isinstance(value, (Mapping, list, tuple)):
        raise rejected(what, "data that JSON has: objects, lists, texts, numbers, true, false, null", value)
    if not depth:
        raise RequestRejected(
            f"There are too many levels in {what}.", hint=f"Nest {DEEPEST} at most, and in no circle."
        )
    if isinstance(value, Mapping):
        return {text(key, f"a key in {what}"): plain(each, what, depth - 1) for key, each in value.items()}
    return [plain(each, what, depth - 1) for each in value]


def plain_object(value: Any, what: str, wanted: str) -> dict[str, Any]:
    """A copy of a JSON object.

    Raises:
        RequestRejected: it is none.
    """
    if not isinstance(value, Mapping):
        raise rejected(what, wanted, value)
    return cast("dict[str, Any]", plain(value, what))


def _finite(value: float, what: str) -> float:
    try:
        finite = math.isfinite(value)
    except OverflowError:  # A whole number may be larger than any float.
        finite = False
    if not finite:
        raise RequestRejected(
            f"There is a number in {what} that JSON does not have.", hint="Give a finite one, within a double's range."
        )
    return value


def rejected(what: str, wanted: str, value: object) -> RequestRejected:
    """The error for an argument of the wrong kind; the value itself may be a prompt, and is not told."""
    return RequestRejected(f"{_capital(what)} cannot be read.", hint=f"Give {wanted}, not {type(value).__name__}.")


def _capital(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}"
