"""Read what callers pass - messages, images, tool calls - into the types of the contract."""

from __future__ import annotations

import base64
import contextlib
import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast, get_args
from urllib.parse import unquote_to_bytes

from graftage._engine.answers import read_arguments
from graftage._values import close, read_file, user_path
from graftage.exceptions import CapabilityUnsupported, RequestRejected
from graftage.types import Image, Message, Reply, Role, ToolCall

if TYPE_CHECKING:
    from typing import TypeGuard

    from pydantic import BaseModel

MessageLike: TypeAlias = "str | Message | Reply | Mapping[str, Any] | BaseModel"
Messages: TypeAlias = "MessageLike | Sequence[MessageLike]"
ImageLike: TypeAlias = "str | Path | bytes | bytearray | memoryview | Image | BaseModel"
Parse: TypeAlias = Callable[[str], Any]

ROLES: tuple[str, ...] = get_args(Role)
SAME_ROLES: Mapping[str, Role] = {"developer": "system", "function": "tool"}
MESSAGE_KEYS = ("role", "content", "images", "tool_calls", "tool_name", "tool_call_id", "thinking", "name")
THINKING_KEYS = ("thinking", "reasoning_content", "reasoning")
TEXT_KEYS = ("tool_name", "tool_call_id", "name", "refusal", *THINKING_KEYS)
KNOWN_KEYS = frozenset(
    {
        *MESSAGE_KEYS,
        *TEXT_KEYS,
        "function_call",
        # Other keys of real messages, which no model reads:
        "annotations",
        "cache_control",
        "id",
        "model",
        "parsed",
        "provider_specific_fields",
        "reasoning_details",
        "status",
        "stop_reason",
        "stop_sequence",
        "thinking_blocks",
        "type",
        "usage",
    }
)
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
THINKING_PARTS = {"thinking": "thinking", "reasoning": "text"}
"""The types of parts that are text, each with the key of the text."""
IMAGE_PARTS = ("image_url", "input_image", "image")
"""The types of parts that are images: OpenAI's, and the one of Anthropic and MCP."""
LARGEST_IMAGE = 64 * 1024 * 1024
"""Bytes of an image: more than any model accepts."""
IMAGE_STARTS = (
    (re.compile(rb"\x89PNG"), "image/png"),
    (re.compile(rb"\xff\xd8\xff"), "image/jpeg"),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), "image/webp"),
    (re.compile(rb"GIF8[79]a"), "image/gif"),
    (re.compile(rb"BM.{4}\0{4}", re.DOTALL), "image/bmp"),
    (re.compile(rb"II\*\0|MM\0\*"), "image/tiff"),
    (re.compile(rb".{4}ftypavi[fs]", re.DOTALL), "image/avif"),
    (re.compile(rb".{4}ftyp(?:hei[cx]|mif1)", re.DOTALL), "image/heic"),
)
"""The first bytes of image files."""
CALL_KEYS = ("id", "type", "index", "function", "name", "arguments")
DEEPEST = 64
"""Levels of nesting in schemas, options and arguments: with many more, servers refuse or crash."""


def read_messages(value: Messages, images: Iterable[ImageLike] | None = None) -> tuple[Message, ...]:
    """Return a conversation from a string, a message, or a sequence of messages and mappings.

    `images` go to the last message of the user.

    Raises:
        RequestRejected: the value cannot be read as messages.
    """
    value = as_mapping(value)
    if isinstance(value, (str, Message, Reply, Mapping)):
        value = (value,)
    given = items(value, "`messages`", "a string, a message, or a sequence of them")
    messages = [message for each in given for message in read_message(each)]
    if not messages:
        raise RequestRejected("There are no messages.", hint="Send at least one.")
    if attached := read_images(images, paths=True):
        _attach_images(messages, attached)
    return _pair_results(messages)


def read_message(value: MessageLike) -> tuple[Message, ...]:
    """Return the messages that one stands for: Anthropic puts tool results inside a message of the user."""
    if isinstance(value, str):
        return (Message(role="user", content=text(value, "the text of a message")),)
    if isinstance(value, Reply):
        return tuple(message for each in value.messages for message in read_message(each))
    given = _message_fields(as_mapping(value))
    role = given.get("role")
    role = SAME_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise RequestRejected(f"The role of a message is {repr(role)[:40]}.", hint=f"Use one of {', '.join(ROLES)}.")
    found = _read_content(given.get("content"))
    texts = {key: text(given[key], f"the `{key}` of a message") for key in TEXT_KEYS if given.get(key) is not None}
    calls = [*found.calls, *items(given.get("tool_calls"), "the `tool_calls` of a message", "a sequence of tool calls")]
    if given.get("function_call") is not None:
        calls.append(given["function_call"])
    name = texts.get("name")
    message = Message(
        role=cast("Role", role),
        content="\n".join(found.texts) or texts.get("refusal", ""),
        images=(*found.images, *read_images(given.get("images"))),
        tool_calls=tuple(map(_read_sent_tool_call, calls)),
        tool_name=texts.get("tool_name") or (name if role == "tool" else None),
        tool_call_id=texts.get("tool_call_id"),
        thinking=next(filter(None, map(texts.get, THINKING_KEYS)), None) or "\n".join(found.thoughts) or None,
        name=None if role == "tool" else name,
    )
    rest = message.content or message.images or message.tool_calls or not found.results
    return (*found.results, *((message,) if rest else ()))


def _message_fields(value: Message | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(value, Message):
        return {name: getattr(value, name) for name in MESSAGE_KEYS}
    if not isinstance(value, Mapping):
        raise rejected("a message", "a string, a `Message` or a mapping", value)
    for key in value.keys() - KNOWN_KEYS:
        if value[key] is not None:
            raise RequestRejected(f"A message has the unknown key `{key}`.", hint=suggest(str(key), MESSAGE_KEYS))
    return value


class _Content:
    """The content of one message, sorted by kind."""

    __slots__ = ("calls", "images", "results", "texts", "thoughts")

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.thoughts: list[str] = []
        self.images: list[Image] = []
        self.calls: list[Any] = []
        self.results: list[Message] = []


def _read_content(value: object, *, of_result: bool = False) -> _Content:
    """Read a string, a part, or a list of parts as OpenAI, Anthropic or MCP write it; a result has text and images."""
    found, what = _Content(), "the `content` of a message"
    if isinstance(value, str):
        found.texts.append(text(value, what))
        return found
    value = as_mapping(value)
    if isinstance(value, Mapping):
        value = (value,)
    for part in items(value, what, "a string, or a list of parts"):
        _read_part(
            {"type": "text", "text": part} if isinstance(part, str) else as_mapping(part), found, of_result=of_result
        )
    return found


def _read_part(part: Any, found: _Content, *, of_result: bool) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    kind = kind if isinstance(kind, str) else ""
    if kind in TEXT_PARTS:
        found.texts.append(text(part.get(TEXT_PARTS[kind]), f"the `{kind}` part of a `content`"))
    elif kind in IMAGE_PARTS:
        found.images.append(_read_image_part(part))
    elif kind in THINKING_PARTS and not of_result:
        found.thoughts.append(text(part.get(THINKING_PARTS[kind]), f"the `{kind}` part of a `content`"))
    elif kind == "tool_use" and not of_result:
        found.calls.append({"name": part.get("name"), "arguments": part.get("input"), "id": part.get("id")})
    elif kind == "tool_result" and not of_result:
        inner = _read_content(part.get("content"), of_result=True)
        call_id = text(part.get("tool_use_id"), "the `tool_use_id` of a result")
        result = Message(role="tool", content="\n".join(inner.texts), images=tuple(inner.images), tool_call_id=call_id)
        found.results.append(result)
    else:
        what = f"of the type `{kind[:40]}`" if kind else "without a type"
        raise RequestRejected(
            f"The `content` of a message has a part {what}, which cannot be read.",
            hint="Give text and images. Convert anything else to text, such as data with `json.dumps`.",
        )


def _read_image_part(part: Mapping[str, Any]) -> Image:
    """Read the image in a part: `image_url` of OpenAI, `source` of Anthropic, or `data` of MCP."""
    found = as_mapping(part.get("image_url") or part.get("source") or part)
    if not isinstance(found, Mapping):
        return _read_image(found, paths=False)
    data = found.get("url") or found.get("data")
    media_type = found.get("media_type") or found.get("mimeType")
    if data is None:
        raise RequestRejected(
            "The `content` of a message has an image without its bytes.", hint="Give the bytes in base64."
        )
    if isinstance(data, str) and isinstance(media_type, str):
        data = f"data:{media_type};base64,{data}"
    return _read_image(data, paths=False)


def as_mapping(value: object) -> Any:
    """Return the fields that are set in a pydantic object, such as `ollama.Message`; return any other value unchanged.

    This does not use `model_dump`: that of `ollama.Image` reads a file, whose name may come from outside.
    """
    if not is_model_object(value):
        return value
    return {name: each for name, each in value if each is not None}


def is_model_object(value: object) -> TypeGuard[BaseModel]:
    """Return whether a value is a pydantic object."""
    return hasattr(value, "model_dump") and not inspect.isclass(value)


def read_images(values: Iterable[ImageLike] | None, *, paths: bool = False) -> tuple[Image, ...]:
    """Return images, each with its bytes in `data`.

    Args:
        values: bytes, paths, images, or strings: `data:` URIs and base64.
        paths: whether a string other than a `data:` URI is a path. Never inside a message, which may come from
            outside: its sender would choose a file of this machine to read and send.

    Raises:
        RequestRejected: a value is not an image, or its file cannot be read.
    """
    wanted = "a sequence of paths, bytes or images"
    return tuple(_read_image(each, paths=paths) for each in items(values, "`images`", wanted))


def _read_image(value: ImageLike, *, paths: bool) -> Image:
    if is_model_object(value):  # Such as `ollama.Image`; a string in it is read like any other.
        value = as_mapping(value).get("value")
    if isinstance(value, str):
        image = _read_image_string(value, paths=paths)
    elif isinstance(value, Path):
        image = Image(path=value)
    else:
        image = value if isinstance(value, Image) else Image(data=cast("bytes", value))
    if image.path is not None and image.data:
        raise RequestRejected("An image has both `data` and a `path`.", hint="Give only one of them.")
    data = image.data if image.path is None else _read_image_file(image.path)
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise rejected("an image", "bytes, a path or a `graftage.Image`", data)
    data = bytes(data)
    if not data:
        raise RequestRejected("An image is empty.", hint="Give the bytes of its file.")
    if len(data) > LARGEST_IMAGE:
        raise RequestRejected(f"An image is larger than {LARGEST_IMAGE} bytes.", hint="Make it smaller.")
    data = _undo_base64(data)
    return Image(
        data=data, media_type=optional_text(image.media_type, "the media type of an image") or _media_type(data)
    )


def _media_type(data: bytes) -> str | None:
    """Return the media type of an image, by its first bytes."""
    return next((name for begins, name in IMAGE_STARTS if begins.match(data)), None)


def _read_image_string(value: str, *, paths: bool) -> Image:
    """Read an image from a string. No error repeats the string."""
    scheme = value.lstrip()[:8].lower()
    if scheme.startswith(("http://", "https://")):
        raise RequestRejected("An image is a web address.", hint="Download it, and give its bytes.")
    if scheme.startswith("data:"):
        return _read_data_uri(value.strip())
    if paths:
        with contextlib.suppress(OSError):  # It names the file, so it must not become the cause of the error below.
            return Image(data=read_file(user_path(value), LARGEST_IMAGE))
        raise RequestRejected(
            "A string given as an image is neither a `data:` URI nor the path of a readable file.",
            hint="Check the path, or give base64 as `data:image/png;base64,…`.",
        )
    data = _decode_base64(_to_bytes(value))
    if data is None or _media_type(data) is None:  # Many words and paths are valid base64.
        raise RequestRejected(
            "A string given as an image in a message is neither base64 of an image nor a `data:` URI.",
            hint="A string in a message is never a path: give a `pathlib.Path`, a `graftage.Image`, or bytes.",
        )
    return Image(data=data)


def _read_data_uri(value: str) -> Image:
    head, _, body = value.partition(",")
    media_type, *parameters = (each.strip() for each in head.lower().removeprefix("data:").split(";"))
    raw = unquote_to_bytes(_to_bytes(body))
    data = _decode_base64(raw) if "base64" in parameters else raw
    if not data or not media_type.startswith("image/"):
        raise RequestRejected(
            "An image cannot be read from its `data:` URI.", hint="Give `data:image/png;base64,…`, or its bytes."
        )
    return Image(data=data, media_type=media_type)


def _decode_base64(value: bytes) -> bytes | None:
    """Decode base64 of either alphabet, on one line or several, with or without padding; None if it is invalid."""
    value = b"".join(value.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    with contextlib.suppress(ValueError):
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    return None


def _undo_base64(data: bytes) -> bytes:
    """Return the image, decoded if it was base64 in bytes."""
    inner = None if _media_type(data) else _decode_base64(data)
    return inner if inner is not None and _media_type(inner) else data


def _to_bytes(value: str) -> bytes:
    return value.encode("utf-8", "surrogatepass")


def _read_image_file(path: str | Path) -> bytes:
    if not isinstance(path, (str, Path)):
        raise rejected("the `path` of an image", "a string or a `pathlib.Path`", path)
    try:
        return read_file(user_path(path), LARGEST_IMAGE)
    except OSError as error:
        raise RequestRejected(
            f"The image {str(path)[:200]!r} cannot be read: {error.strerror}.",
            hint="Check the path, or give its bytes.",
        ) from error


def _attach_images(messages: list[Message], images: tuple[Image, ...]) -> None:
    for place in range(len(messages) - 1, -1, -1):
        if messages[place].role == "user":
            messages[place] = replace(messages[place], images=(*messages[place].images, *images))
            return
    raise RequestRejected("The `images` need a message of the user.", hint="Add a message with the role `user`.")


# --- Tool calls ------------------------------------------------------------------------------------------------------


def _pair_results(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Tie each tool result to its call: by its id, else by its name, or to the next call if it has neither.

    A call without an id gets a unique one, which is the same each time the conversation is sent.
    """
    if not any(each.tool_calls or each.role == "tool" for each in messages):
        return tuple(messages)
    given = {call.id for each in messages for call in each.tool_calls}
    free = (name for name in map("call_{}".format, itertools.count()) if name not in given)
    called: dict[str, str] = {}
    waiting: dict[str, str] = {}
    paired = []
    for each in messages:
        calls = tuple(call if call.id else replace(call, id=next(free)) for call in each.tool_calls)
        names = {call.id: call.name for call in calls}
        called |= names
        waiting |= names
        if each.role != "tool":
            paired.append(replace(each, tool_calls=calls) if calls else each)
            continue
        found = each.tool_call_id or next((it for it, name in waiting.items() if each.tool_name in (None, name)), None)
        waiting.pop(found or "", None)
        paired.append(replace(each, tool_call_id=found, tool_name=each.tool_name or called.get(found or "")))
    return tuple(paired)


def _read_sent_tool_call(value: Any) -> ToolCall:
    """Read a tool call of an earlier reply, on its way back to the model; without an id, its id is empty."""
    if isinstance(value, ToolCall):
        value = {"name": value.name, "arguments": value.arguments, "id": value.id}
    value = as_mapping(value)
    body = as_mapping(value.get("function") or value) if isinstance(value, Mapping) else None
    if not isinstance(body, Mapping) or not isinstance(body.get("name"), str) or not body["name"]:
        raise RequestRejected(
            "A tool call has no name.", hint="Give a `ToolCall`, or a mapping with `name` and `arguments`."
        )
    name = text(body["name"], "the name of a tool call")
    unknown = [key for key in body if key not in CALL_KEYS]
    if unknown and "arguments" not in body:
        raise RequestRejected(
            f"A tool call has the unknown key `{unknown[0]}`.", hint="Give its arguments as `arguments`."
        )
    arguments = read_arguments(body.get("arguments", value.get("arguments")))
    if arguments is None:
        raise RequestRejected(
            f"The call of the tool `{name}` is malformed: its arguments are not a JSON object.",
            hint="Give an object or its JSON, or leave out a message whose tool call the model wrote incorrectly.",
        )
    return ToolCall(
        name=name,
        arguments=copy_json_object(arguments, f"the arguments of the tool call `{name}`", "an object"),
        id=text(str(value.get("id") or ""), "the id of a tool call"),
    )


def require(feature: str, has: bool, provider: str, what: str | None = None) -> None:
    """Refuse a feature that a provider does not have, before anything is sent.

    Raises:
        CapabilityUnsupported: `has` is False.
    """
    if not has:
        raise CapabilityUnsupported(
            f"The provider `{provider}` does not support `{what or feature}`.",
            provider=provider,
            hint="Choose another provider.",
        )


def close_names(wanted: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names that were probably meant: of similar spelling or the same family."""
    near = close(wanted.lower(), names, most=3, cutoff=0.5)
    family = wanted.partition(":")[0].lower()
    return tuple(dict.fromkeys([*near, *(name for name in names if name.partition(":")[0] == family)]))


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a hint with the name that was probably meant, or with all known names."""
    names = sorted(known)
    near = close(name, names)
    return f"Did you mean `{near[0]}`?" if near else f"Known names: {', '.join(names) or 'none'}."


# --- What can be sent ------------------------------------------------------------------------------------------------


def items(value: object, what: str, wanted: str) -> tuple[Any, ...]:
    """Return the items of a sequence or a generator in their order; an error of the generator passes unchanged.

    Raises:
        RequestRejected: the value is a string, has no order, or cannot be iterated over.
    """
    if value is None:
        return ()
    if isinstance(value, (str, bytes, bytearray, Mapping, AbstractSet)) or not isinstance(value, Iterable):
        raise rejected(what, wanted, value)
    return tuple(value)


def text(value: object, what: str) -> str:
    """Check that a value is a string that can be sent.

    Raises:
        RequestRejected: it is not a string, or UTF-8 cannot encode it.
    """
    if not isinstance(value, str):
        raise rejected(what, "a string", value)
    if not value.isascii() and not _is_utf8(value):
        raise RequestRejected(
            f"{_capitalized(what)} has half of a surrogate pair, which is not a character.",
            hint='Replace it: `text.encode("utf-8", "replace").decode()` puts a `?` in its place.',
        )
    return value


def optional_text(value: object, what: str) -> str | None:
    """Check that a value is None or a string that can be sent."""
    return None if value is None else text(value, what)


def _is_utf8(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # It holds the text, so it must not become the cause of an error.
        return False
    return True


def copy_json(value: object, what: str, depth: int = DEEPEST) -> Any:
    """Return a copy of JSON data in plain dictionaries and lists.

    Raises:
        RequestRejected: it has a type that JSON lacks, an infinite number or NaN, too many levels, or a cycle.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return text(value, what)
    if isinstance(value, (int, float)):
        return _finite(value, what)
    if not isinstance(value, (Mapping, list, tuple)):
        raise rejected(what, "JSON data: objects, lists, strings, numbers, true, false, null", value)
    if not depth:
        raise RequestRejected(
            f"{_capitalized(what)} has too many levels.", hint=f"Nest at most {DEEPEST} levels, without cycles."
        )
    if isinstance(value, Mapping):
        return {text(key, f"a key in {what}"): copy_json(each, what, depth - 1) for key, each in value.items()}
    return [copy_json(each, what, depth - 1) for each in value]


def copy_json_object(value: object, what: str, wanted: str) -> dict[str, Any]:
    """Return a copy of a JSON object.

    Raises:
        RequestRejected: it is not a JSON object.
    """
    if not isinstance(value, Mapping):
        raise rejected(what, wanted, value)
    return cast("dict[str, Any]", copy_json(value, what))


def _finite(value: float, what: str) -> float:
    try:
        finite = math.isfinite(value)
    except OverflowError:  # An integer may be larger than any float.
        finite = False
    if not finite:
        raise RequestRejected(
            f"{_capitalized(what)} has a number that JSON cannot hold.",
            hint="Give a finite number in the range of a double.",
        )
    return value


def rejected(what: str, wanted: str, value: object) -> RequestRejected:
    """Return the error for an argument of a wrong type. It omits the value, which may be a prompt."""
    return RequestRejected(f"{_capitalized(what)} is invalid.", hint=f"Give {wanted}, not {type(value).__name__}.")


def _capitalized(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}"
