"""The arguments of both clients, and how to read them into the `CallOptions` of a session."""

from __future__ import annotations

import inspect
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, replace
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

from graftage._engine import inputs as reading
from graftage._engine import schemas
from graftage._engine.options import PARAMETERS, word_for
from graftage._records import dataclass
from graftage._values import LARGEST_COUNT, SMALLEST_WINDOW, close, keep_alive_seconds
from graftage.calls import ChatRequest, EmbedRequest, GenerateRequest, RerankRequest
from graftage.exceptions import RequestRejected
from graftage.types import ACTIVE, AdapterChoice, Message, Reply, Timeouts, Tool

if TYPE_CHECKING:
    from pydantic import BaseModel

    from graftage._engine.purposes import Purpose
    from graftage.types import _Unset

Timeout: TypeAlias = "float | Timeouts | None"
Choice: TypeAlias = "tuple[tuple[str, float], ...]"
"""The adapters of a call, each with its weight."""
MOST_RETRIES = 10
MOST_ADAPTERS = 8
"""How many adapters may act at once."""
LARGEST_WEIGHT = 1e6
"""Weights beyond it, or below its inverse, are mistakes, and their products might not fit the numbers of an engine."""


class Settled(TypedDict, total=False):
    """The arguments that `chat` and `generate` share, and that may be the same for many calls."""

    format: schemas.Format | None
    """A pydantic model or another type that pydantic knows, a JSON schema, OpenAI's `response_format`, or `"json"`. The
    result is in `Reply.parsed`."""
    think: bool | str | None
    """Whether to think first, or how hard: `low`, `medium`, `high`, or another level that the server knows."""
    options: Mapping[str, Any] | BaseModel | None
    """`temperature`, `seed` and so on; `capabilities().options` lists the names. If `server` is one of them, options
    that only the server knows go into `{"server": {...}}`."""
    keep_alive: float | str | None
    """How long the model stays loaded: seconds, `"5m"`, -1 for ever."""
    context_window: int | None
    """Tokens of prompt and reply together."""
    max_tokens: int | None
    """Tokens of the reply."""
    force: bool | None
    """Ignore the limits of policies and an adapter that does not fit; the reply then has a warning."""
    timeout: Timeout
    """Seconds for the whole call, or `Timeouts`."""


class Arguments(Settled, total=False):
    """The arguments that `chat` and `generate` share."""

    model: str | None
    """The model, if it is not the client's."""
    adapter: AdapterChoice
    """An adapter for this call, `(adapter, weight)`, or a list of these for several at once; None for the base model;
    leave it out for the active adapter."""
    images: Sequence[reading.ImageLike] | None
    """Images for the user's last message, each at most 64 MB: bytes, `Path`, `Image`, or a string with a `data:` URI or
    a path. Inside a message, a string is a `data:` URI or base64, never a path."""


class _Run(TypedDict, total=False):
    tool_choice: str | None
    """Whether the model may call tools: `auto`, the default; `none`; `required`, at least one; or the name of the one
    that it must call. A reply without that call is an `InferenceFailed`."""
    retries: int | None
    """How often to ask again if the reply does not match the `format`, with the error as a message; not for a stream.
    `timeout` applies to all attempts together."""


class _Tools(TypedDict, total=False):
    tools: schemas.Tools
    """The tools that the model may call: Python functions, pydantic models, mappings, `Tool`s, or the result of
    `list_tools` of an MCP client."""


class RunArguments(Arguments, _Run, total=False):
    """The arguments of `run_tools` that are those of `chat`."""


class ChatArguments(Arguments, _Run, _Tools, total=False):
    """The arguments of `chat` besides the messages."""


class DefaultArguments(Settled, _Run, _Tools, total=False):
    """The arguments of `chat` that `bind` and `warm` take besides the model and the adapter."""


class GenerateArguments(Arguments, total=False):
    """The arguments of `generate` besides the prompt."""

    system: str | None
    """A system prompt, if the template has a place for one."""
    suffix: str | None
    """The text after the gap that the model fills."""
    raw: bool | None
    """Send the prompt without the model's template."""


class EmbedArguments(TypedDict, total=False):
    """The arguments of `embed` besides the inputs."""

    model: str | None
    dimensions: int | None
    """Cut the vectors to this length, if the model allows it."""
    truncate: bool | None
    """Cut an input that does not fit, which is the default; if False, raise `ContextOverflow`."""
    purpose: Purpose | None
    """`"query"` or `"document"`: put the prefix before each input that the model was trained with."""
    options: Mapping[str, Any] | BaseModel | None
    keep_alive: float | str | None
    context_window: int | None
    force: bool | None
    timeout: Timeout


class RerankArguments(TypedDict, total=False):
    """The arguments of `rerank` besides the query and the documents."""

    model: str | None
    options: Mapping[str, Any] | BaseModel | None
    keep_alive: float | str | None
    context_window: int | None
    force: bool | None
    timeout: Timeout


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """A call's arguments, read, and checked as far as possible without a model."""

    model: str | None = None
    adapter: Choice | Literal[_Unset.ACTIVE] | None = ACTIVE
    timeout: float | Timeouts | None = None
    keep_alive: float | str | None = None
    context_window: int | None = None
    max_tokens: int | None = None
    force: bool = False
    options: Mapping[str, Any] | BaseModel | None = None
    parse: reading.Parse | None = None
    prompt_characters: int | None = None
    needs: tuple[str, ...] = ()
    """The features that the provider and the model must have."""
    retries: int = 0
    purpose: Purpose | None = None
    build: Callable[..., Any] | None = None
    """Build the request from what is known later: call, model, adapter, options and limits."""
    reload: bool = False
    """Whether the provider must bring the adapter into memory even if it was loaded before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What a view has of its own, or what `bind` gives it."""

    model: str | None = None
    adapter: Choice | Literal[_Unset.ACTIVE] | None = ACTIVE
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of calls that do not give them."""

    def over(self, before: Bound) -> Bound:
        """Return this on top of what the client already has of its own; the defaults are merged already."""
        adapter = before.adapter if self.adapter is ACTIVE else self.adapter
        return replace(self, model=self.model or before.model, adapter=adapter)


def may_read_files(subject: object, arguments: Mapping[str, object]) -> bool:
    """Return whether reading the arguments of a call may read files: images may be paths.

    A generator of messages may do anything, so it counts too.
    """
    if arguments.get("images"):
        return True
    parts = subject if isinstance(subject, (list, tuple)) else (subject,)
    return any(_has_images(each) for each in parts)


def _has_images(part: object) -> bool:
    if isinstance(part, Mapping):
        return bool(part.get("images")) or not isinstance(part.get("content"), (str, NoneType))
    return bool(part.images) if isinstance(part, Message) else not isinstance(part, (str, Reply))


def read_chat(messages: reading.Messages, arguments: Mapping[str, object]) -> CallOptions:
    """Read the arguments of `chat`."""
    arguments = _given_arguments("chat", arguments, ChatArguments)
    read = reading.read_messages(messages, arguments.get("images"))
    tools, tool_choice = _read_tools(arguments)
    schema, parse = schemas.read_format(arguments.get("format"))
    think = _read_think(arguments.get("think"))

    def build(**settled: Any) -> ChatRequest:
        return ChatRequest(messages=read, tools=tools, tool_choice=tool_choice, format=schema, think=think, **settled)

    has_images = any(each.images for each in read)
    return CallOptions(
        build=build,
        parse=parse,
        retries=_read_retries(arguments),
        prompt_characters=sum(len(each.content) for each in read),
        needs=_needs(
            arguments,
            tools=tools,
            tool_choice=tool_choice,
            images=has_images,
            structured_output=schema,
            thinking=think,
        ),
        **_common(arguments),
    )


def _read_tools(arguments: Mapping[str, Any]) -> tuple[tuple[Tool, ...], str | None]:
    """Return the tools to send, and what the model must call: `required`, the name of a tool, or None."""
    tools = schemas.read_tools(arguments.get("tools"))
    choice = arguments.get("tool_choice", "auto")
    if not isinstance(choice, str):
        raise reading.rejected("`tool_choice`", "'auto', 'none', 'required' or the name of a tool", choice)
    if choice in ("auto", "none"):
        return tools if choice == "auto" else (), None
    names = [each.name for each in tools]
    if not names:
        raise RequestRejected(
            "`tool_choice` needs `tools`.", hint="Give the tools that the model may call, or leave it out."
        )
    if choice != "required" and choice not in names:
        raise RequestRejected(
            f"`tool_choice` names {choice[:80]!r}, which is not one of the `tools`.",
            hint=reading.suggest(choice, [*names, "auto", "none", "required"]),
        )
    return tools, choice


def read_bound(
    model: str | None, adapter: AdapterChoice, before: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Bound:
    """Read the arguments of `bind`; `before` are the defaults of the client that it is called on.

    Raises:
        RequestRejected: one of them is invalid, as far as this shows without a provider.
        TypeError: an argument is unknown.
    """
    given = _given_arguments("bind", defaults, DefaultArguments)
    merged = with_defaults("chat", before, given)
    asked = read_chat("-", {"model": model, "adapter": adapter, **merged})
    read_timeouts(asked.timeout, Timeouts())
    return Bound(model=model, adapter=asked.adapter, defaults=merged)


def with_defaults(
    operation: Literal["chat", "generate", "run_tools"], defaults: Mapping[str, Any], arguments: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the arguments of a call with the defaults of its view. Options are merged name by name."""
    known = {"chat": ChatArguments, "generate": GenerateArguments, "run_tools": RunArguments}[operation]
    merged = {name: value for name, value in defaults.items() if name in known.__annotations__}
    for name, value in arguments.items():
        if name == "options" and isinstance(own := reading.as_mapping(value), Mapping):
            merged["options"] = {**(reading.as_mapping(merged.get("options")) or {}), **own}
        elif value is not None or name == "adapter":
            merged[name] = value
    return merged


def read_warm(messages: reading.Messages, arguments: Mapping[str, object]) -> CallOptions:
    """Read the arguments of `warm`. Without messages there is nothing to build."""
    given = _given_arguments("warm", arguments, ChatArguments)
    if given.get("tool_choice") != "none":  # The reply is cut off after a token: it cannot be a call.
        given.pop("tool_choice", None)
    asked = read_chat(messages or "-", {**given, "max_tokens": 1})
    return replace(asked, parse=None, retries=0, build=asked.build if messages else None)


def read_generate(prompt: str, arguments: Mapping[str, object]) -> CallOptions:
    """Read the arguments of `generate`."""
    arguments = _given_arguments("generate", arguments, GenerateArguments)
    prompt = reading.text(prompt, "`prompt`")
    images = reading.read_images(arguments.get("images"), paths=True)
    schema, parse = schemas.read_format(arguments.get("format"))
    think = _read_think(arguments.get("think"))
    own: dict[str, Any] = {
        "system": reading.optional_text(arguments.get("system"), "`system`"),
        "suffix": reading.optional_text(arguments.get("suffix"), "`suffix`"),
        "raw": read_flag("raw", arguments.get("raw")),
    }

    def build(**settled: Any) -> GenerateRequest:
        return GenerateRequest(prompt=prompt, images=images, format=schema, think=think, **own, **settled)

    return CallOptions(
        build=build,
        parse=parse,
        prompt_characters=len(prompt),
        needs=_needs(arguments, images=images, structured_output=schema, thinking=think, suffix=own["suffix"]),
        **_common(arguments),
    )


def read_embed(inputs: str | Iterable[str], arguments: Mapping[str, object]) -> CallOptions:
    """Read the arguments of `embed`."""
    arguments = _given_arguments("embed", arguments, EmbedArguments)
    given = (
        (inputs,) if isinstance(inputs, str) else reading.items(inputs, "`inputs`", "a string or a sequence of strings")
    )
    if not given:
        raise RequestRejected("There are no `inputs`.", hint="Give a string, or a sequence of at least one.")
    texts = tuple(reading.text(each, "one of the `inputs`") for each in given)
    options = arguments.get("options") and reading.as_mapping(arguments["options"])
    if isinstance(options, Mapping) and options.get("truncate") is not None:
        raise RequestRejected("`truncate` is not an option of `embed`.", hint="Use the parameter `truncate`.")
    dimensions = arguments.get("dimensions")
    check_count("dimensions", dimensions, "numbers")
    truncate = read_flag("truncate", arguments.get("truncate"), default=True)
    purpose = arguments.get("purpose")
    if purpose is not None and purpose not in ("query", "document"):
        raise RequestRejected("`purpose` is invalid.", hint='Give "query" or "document", or leave it out.')

    def build(prefix: str | None = None, **settled: Any) -> EmbedRequest:
        prefixed = tuple(f"{prefix}{each}" for each in texts) if prefix else texts
        return EmbedRequest(inputs=prefixed, dimensions=dimensions, truncate=truncate, **settled)

    return CallOptions(build=build, purpose=purpose, prompt_characters=sum(map(len, texts)), **_common(arguments))


def read_rerank(query: str, documents: Iterable[str], arguments: Mapping[str, object]) -> CallOptions:
    """Read the arguments of `rerank`."""
    arguments = _given_arguments("rerank", arguments, RerankArguments)
    query = reading.text(query, "`query`")
    given = reading.items(documents, "`documents`", "a sequence of strings")
    if not given:
        raise RequestRejected("There are no `documents`.", hint="Give a sequence of at least one string.")
    texts = tuple(reading.text(each, "one of the `documents`") for each in given)

    def build(**settled: Any) -> RerankRequest:
        return RerankRequest(query=query, documents=texts, **settled)

    return CallOptions(build=build, prompt_characters=sum(map(len, (query, *texts))), **_common(arguments))


COMMON = ("model", "adapter", "timeout", "keep_alive", "context_window", "max_tokens", "force", "options")


def _common(arguments: Mapping[str, object]) -> dict[str, Any]:
    common = {name: arguments[name] for name in COMMON if name in arguments}
    for name in ("context_window", "max_tokens"):
        check_tokens(name, common.get(name))
    read_flag("force", common.get("force"))
    read_keep_alive(common.get("keep_alive"))
    if common.get("model") is not None:
        check_model(common["model"])
    if common.get("adapter", ACTIVE) not in (ACTIVE, None):
        common["adapter"] = read_adapter(common["adapter"])
    return common


def read_keep_alive(value: object) -> float | None:
    """Return the seconds that a model stays loaded, or None.

    Raises:
        RequestRejected: it is neither a number nor a string such as `5m`.
    """
    try:
        return keep_alive_seconds(value)
    except ValueError as error:
        raise RequestRejected(f"An argument is invalid: {error}.", hint="Write it as `300` or `5m`.") from error


def check_tokens(name: str, value: object) -> None:
    """Check a number of tokens.

    Raises:
        RequestRejected: it is neither None nor an integer that engines accept.
    """
    check_count(name, value, "tokens")


def check_count(name: str, value: object, unit: str) -> None:
    """Check a number of something.

    Raises:
        RequestRejected: it is neither None nor a whole number from 1 on, within the range of engines.
    """
    if value is None:
        return
    least = SMALLEST_WINDOW if name == "context_window" else 1
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LARGEST_COUNT:
        raise RequestRejected(
            f"`{name}` is invalid.",
            hint=f"Give a whole number of {unit} from {least} to {LARGEST_COUNT}, or leave it out.",
        )


def check_model(model: object) -> None:
    """Check the name of a model.

    Raises:
        RequestRejected: it is not a string, is empty, or cannot be sent.
    """
    if not reading.text(model, "`model`").strip():
        raise RequestRejected("`model` is empty.", hint="Name a model, or leave it out to use the client's.")


def read_flag(name: str, value: object, *, default: bool = False) -> bool:
    """Return a boolean; None means the default. Other types are refused: the string `"no"` would be true.

    Raises:
        RequestRejected: it is neither True nor False.
    """
    if value is None:
        return default
    if not isinstance(value, bool):
        raise reading.rejected(f"`{name}`", "True or False", value)
    return value


def read_timeouts(given: float | Timeouts | None, own: Timeouts) -> Timeouts:
    """Return the limits of a call, by default those of the client; a number means the total.

    Raises:
        RequestRejected: it is not a length of time.
    """
    if given is None:
        return own
    if isinstance(given, Timeouts):
        return given
    try:
        return replace(own, total=given)
    except ValueError as error:
        hint = "Give seconds above 0, or `Timeouts`."
        raise RequestRejected(f"`timeout` is invalid: {error}.", hint=hint) from error


def _read_retries(arguments: Mapping[str, object]) -> int:
    retries = arguments.get("retries", 0)
    if not isinstance(retries, int) or isinstance(retries, bool) or not 0 <= retries <= MOST_RETRIES:
        raise RequestRejected("`retries` is invalid.", hint=f"Give a whole number from 0 to {MOST_RETRIES}.")
    if retries and arguments.get("format") is None:
        raise RequestRejected(
            "`retries` needs a `format`: it asks again if the reply does not match.",
            hint="Give a `format`, or set `attempts` to send a failed request again.",
        )
    return retries


def read_seconds(name: str, value: object) -> float | None:
    """Return a length of time, or None.

    Raises:
        RequestRejected: it is not a number of at least 0.
    """
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0):
        return value
    raise RequestRejected(f"`{name}` is invalid.", hint="Give a number of seconds from 0 on, or leave it out.")


def check_callback(name: str, callback: object) -> None:
    """Check the function to call with each step of an operation, before it begins.

    Raises:
        RequestRejected: it is neither None nor a plain function.
    """
    if callback is None:
        return
    if not callable(callback) or any(map(inspect.iscoroutinefunction, (callback, type(callback).__call__))):
        raise reading.rejected(f"`{name}`", "a plain function to call with each step", callback)


def read_adapter(value: object) -> Choice:
    """Return the adapters of an argument, each with its weight. What it returns may be read again.

    Raises:
        RequestRejected: a reference or a weight is invalid, an adapter comes twice, or there are none or too many.
    """
    several = isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and not _has_weight(value)
    choice = tuple(_read_weighted(each) for each in (value if several else (value,)))  # type: ignore[attr-defined] # it is a sequence
    names = [name for name, _ in choice]
    if not choice:
        raise RequestRejected("`adapter` is empty.", hint="Give None for the base model.")
    if len(choice) > MOST_ADAPTERS:
        hint = f"Give at most {MOST_ADAPTERS}."
        raise RequestRejected(f"{len(choice)} adapters are too many at once.", hint=hint)
    for twice in (name for name in names if names.count(name) > 1):
        raise RequestRejected(f"The adapter `{twice}` comes twice.", hint=f"Give it once, as `({twice!r}, 2.0)`.")
    return choice


def _has_weight(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], numbers.Real)


def _read_weighted(value: Any) -> tuple[str, float]:
    reference, given = value if _has_weight(value) else (value, 1.0)
    name = read_reference(reference)
    try:
        weight = 0.0 if isinstance(given, bool) else float(given)
    except OverflowError:
        weight = 0.0
    if not 1 / LARGEST_WEIGHT <= abs(weight) <= LARGEST_WEIGHT:
        hint = (
            f"Give a number other than 0, such as 0.5: from {1 / LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}, or below 0."
        )
        raise RequestRejected(f"The weight of the adapter `{name}` is invalid: {given!r}.", hint=hint)
    return name, weight


def read_reference(reference: object) -> str:
    """Return a reference to an adapter as a string.

    Raises:
        RequestRejected: it is neither a string nor a path, or is empty.
    """
    name = os.fspath(reference) if isinstance(reference, (str, os.PathLike)) else None
    if not isinstance(name, str) or not name.strip():
        hint = "Give its name as a string, or the path of its file or folder; with a weight, `(name, 0.5)`."
        raise RequestRejected(f"An adapter cannot be {reference!r}.", hint=hint)
    return reading.text(name, "the name of the adapter")


def _read_think(value: object) -> bool | str | None:
    """Check how to think. Only the server knows its levels."""
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, str) or not value.strip():
        raise reading.rejected("`think`", "True, False, or a level such as 'low', 'medium', 'high'", value)
    return reading.text(value, "`think`")


def _needs(arguments: Mapping[str, object], **wanted: object) -> tuple[str, ...]:
    options = reading.as_mapping(arguments.get("options"))
    logprobs = isinstance(options, Mapping) and options.get("logprobs")
    return tuple(feature for feature, value in (*wanted.items(), ("logprobs", logprobs)) if value)


def _given_arguments(operation: str, arguments: Mapping[str, object], known: type) -> dict[str, Any]:
    """Return the arguments that are given: None means "not given", except for `adapter`, where it is the base model.

    Raises:
        TypeError: an argument is unknown. Like Python's, the message names a similar one.
    """
    names = known.__annotations__
    for name in arguments:
        if name not in names:
            raise TypeError(f"{operation}() has no argument `{name}`{_similar_name(name, names)}")
    return {name: value for name, value in arguments.items() if value is not None or name == "adapter"}


def _similar_name(name: str, names: Mapping[str, object]) -> str:
    word = word_for(name)
    if word and word not in PARAMETERS:
        return f"; give it in `options`, as `{word}`"
    right = word if word in names else next(iter(close(name, names)), None)
    return f"; did you mean `{right}`?" if right else ""
