"""Requests to the JSON of OpenAI's API, and its responses to Graftage's types."""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from graftage import http
from graftage.calls import ChatRequest, EmbedRequest, GenerateRequest
from graftage.exceptions import CapabilityUnsupported, InferenceFailed, ProviderError, RequestRejected
from graftage.footprint import footprint, read_shape
from graftage.http.transport import header
from graftage.types import (
    Chunk,
    Embeddings,
    Feature,
    LoadedModel,
    Logprob,
    Message,
    ModelInfo,
    Reply,
    Timings,
    ToolCall,
    Usage,
)

if TYPE_CHECKING:
    from graftage_openai._profiles import Profile

__all__ = [
    "Learned",
    "Reader",
    "as_chat",
    "chat_body",
    "completion_body",
    "embed_body",
    "embeddings",
    "features",
    "loaded_models",
    "models",
    "unsupported",
]

LONGEST: Final = 2**31 - 1
"""Tokens: llama-server takes a larger limit for a small one."""
ANY_OBJECT: Final = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}
LIMITS: Final = ("max_tokens", "max_completion_tokens")
UNWANTED: Final = re.compile(
    "unsupported|not (supported|permitted)|unknown|unrecognized|unexpected|extra", re.IGNORECASE
)


class Learned:
    """What the refusals and replies of a server have shown about it."""

    def __init__(self) -> None:
        self.limit: str | None = None
        self.thought: str | None = None
        self.usage: Mapping[str, Any] = {"stream_options": {"include_usage": True}}

    def adjust(self, body: dict[str, Any], error: ProviderError) -> bool:
        """Change the field of a body that a refusal names. Return False if nothing can be changed."""
        said = str(error.details.get("server_message", "")) if error.status in (400, 422) else ""
        sent = next((each for each in LIMITS if each in body), "")
        if "response_format" in said and body.get("response_format") == {"type": "json_object"}:
            body["response_format"] = ANY_OBJECT
        elif not UNWANTED.search(said):
            return False
        elif "stream_options" in said and "stream_options" in body:
            self.usage = {}
            del body["stream_options"]
        elif sent and not self.limit and re.search(rf"\b{sent}\b", said):
            self.limit = LIMITS[sent == LIMITS[0]]
            body[self.limit] = body.pop(sent)
        else:
            return False
        return True


# --- Requests --------------------------------------------------------------------------------------------------------


def unsupported(what: str, profile: Profile) -> CapabilityUnsupported:
    """Return the error for what the server cannot do."""
    hint = "Leave it out, or use another server. If it is another one, name it in the setting `profile`."
    return CapabilityUnsupported(f"{profile.name or 'This server'} does not support `{what}`.", hint=hint)


def as_chat(request: GenerateRequest) -> ChatRequest:
    """Return the chat that a prompt is for a model with a template."""
    names = ("call", "model", "format", "think", "options", "max_tokens", "context_window", "keep_alive", "adapter")
    system = (Message(role="system", content=request.system),) if request.system is not None else ()
    user = Message(role="user", content=request.prompt, images=request.images)
    return ChatRequest(messages=(*system, user), **{name: getattr(request, name) for name in names})


def chat_body(request: ChatRequest, profile: Profile, learned: Learned) -> dict[str, Any]:
    """Return the JSON of a chat.

    Raises:
        CapabilityUnsupported: the server does not support `think`.
    """
    body = _shared_body(request, profile, learned)
    if body.get("logprobs"):
        body["top_logprobs"] = body.get("top_logprobs") or 1  # Without it, some servers omit the tokens.
    if request.max_tokens is not None:
        body[learned.limit or profile.limit] = min(request.max_tokens, LONGEST)
    body["messages"] = [_message(each, profile.thought or learned.thought) for each in request.messages]
    if request.tools:
        body |= _tools(request, profile)
    if request.format == "json":
        body["response_format"] = {"type": "json_object"} if profile.json_object else ANY_OBJECT
    elif request.format is not None:
        strict = {"strict": True} if _is_strict(request.format) else {}
        schema = {"name": "answer", "schema": request.format, **strict}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body if request.think is None else {**body, **_thinking(request.think, profile, body)}


def completion_body(request: GenerateRequest, profile: Profile, learned: Learned) -> dict[str, Any]:
    """Return the JSON of a completion without the model's template.

    Raises:
        CapabilityUnsupported: the server does not support a part of the request.
        RequestRejected: parts of the request contradict each other.
    """
    if request.system is not None or request.images:
        problem = "`raw` and `suffix` cannot be combined with a system prompt or images."
        raise RequestRejected(problem, hint="Write it into the prompt, or leave `raw` and `suffix` out.")
    if request.format is not None or request.think or (request.raw and not profile.raw):
        raise unsupported("raw" if request.raw else "suffix", profile)
    body = {**_shared_body(request, profile, learned), "prompt": request.prompt}
    if body.pop("logprobs", False):
        body["logprobs"] = body.pop("top_logprobs", 0) or 1  # Here, this is the number.
    given = {"suffix": request.suffix, "max_tokens": request.max_tokens and min(request.max_tokens, LONGEST)}
    return body | {name: value for name, value in given.items() if value is not None}


def _shared_body(request: ChatRequest | GenerateRequest, profile: Profile, learned: Learned) -> dict[str, Any]:
    unused = () if request.options.get("logprobs") else ("logprobs", "top_logprobs")
    options = {profile.names.get(name, name): value for name, value in request.options.items() if name not in unused}
    return {**options, "model": request.model, "stream": True, **learned.usage}


def _message(message: Message, thought: str | None) -> dict[str, Any]:
    body: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.images:
        kinds = [(each.media_type or "image/png", base64.b64encode(each.data).decode()) for each in message.images]
        images = [{"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}} for kind, data in kinds]
        body["content"] = [{"type": "text", "text": message.content}, *images] if message.content else images
    # DeepSeek refuses turns with calls that lack the field, even if it is empty.
    if thought and (message.thinking or message.tool_calls):
        body[thought] = message.thinking or ""
    if message.tool_calls:
        body["tool_calls"] = [
            {"id": each.id, "type": "function", "function": {"name": each.name, "arguments": _json(each.arguments)}}
            for each in message.tool_calls
        ]
    named = {"name": message.name, "tool_call_id": message.tool_call_id}
    return body | {name: value for name, value in named.items() if value}


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(dict(value), ensure_ascii=False)


def _tools(request: ChatRequest, profile: Profile) -> dict[str, Any]:
    choice: Any = request.tool_choice
    tools = request.tools
    if choice not in (None, "required"):
        if profile.named_tool:
            choice = {"type": "function", "function": {"name": choice}}
        else:
            tools, choice = tuple(each for each in tools if each.name == choice), "required"
    functions = [{"name": it.name, "description": it.description, "parameters": dict(it.parameters)} for it in tools]
    body = {"tools": [{"type": "function", "function": each} for each in functions]}
    return body if choice is None else {**body, "tool_choice": choice}


def _is_strict(schema: object) -> bool:
    """Return whether a schema requires all its properties and no others: OpenAI keeps only such schemas."""
    if isinstance(schema, Mapping):
        names = set(schema.get("properties", ()))
        whole = schema.get("additionalProperties") is False and names == set(schema.get("required", ()))
        return (whole or schema.get("type") != "object") and all(map(_is_strict, schema.values()))
    return not isinstance(schema, list) or all(map(_is_strict, schema))


def _thinking(think: bool | str, profile: Profile, body: Mapping[str, Any]) -> dict[str, Any]:
    if profile.think is None:
        raise unsupported("thinking", profile)
    level = think if isinstance(think, str) else "medium" if think else "none"
    if profile.think == "template":
        effort = {"reasoning_effort": think} if isinstance(think, str) else {}
        given = http.read_object(body.get("chat_template_kwargs"))
        return {"chat_template_kwargs": {**given, "enable_thinking": level != "none", **effort}}
    return {"reasoning_effort": level} if profile.think == "effort" else {"reasoning": {"effort": level}}


def embed_body(request: EmbedRequest, profile: Profile) -> dict[str, Any]:
    """Return the JSON of an embedding.

    Raises:
        CapabilityUnsupported: the server does not support a part of the request.
    """
    if profile.embeds is None or (profile.cuts and not request.truncate):
        raise unsupported("embed" if request.truncate else "truncate=False", profile)
    sizes = {} if request.dimensions is None else {"dimensions": request.dimensions}
    form = {"encoding_format": "base64"} if profile.embeds == "base64" else {}
    return {**request.options, "model": request.model, "input": list(request.inputs), **sizes, **form}


# --- Replies ---------------------------------------------------------------------------------------------------------


class Thoughts:
    """Takes a thought in `<think>` tags from the start of a text that comes in pieces."""

    OPEN: Final = "<think>"
    CLOSE: Final = "</think>"

    def __init__(self) -> None:
        self._held = ""
        self._inside = self._gap = self.over = False

    def split(self, piece: str, *, last: bool = False) -> tuple[str, str]:
        """Return the text and the thought of a piece, and hold back what may be the begin of a tag."""
        if self.over and not self._gap:
            return piece, ""
        held, self._held = self._held + piece, ""
        if not self._inside and not self.over:
            start = held.lstrip()
            if self.OPEN.startswith(start) and start != self.OPEN and not last:
                self._held = held
                return "", ""
            self._inside = start.startswith(self.OPEN)
            self.over = not self._inside
            if self.over:
                return held, ""
            held = start.removeprefix(self.OPEN)
        thought, closed, text = ("", "", held) if self.over else held.partition(self.CLOSE)
        if closed or self.over:
            self.over, text = True, text.lstrip()
            self._gap = not text
            return text, thought
        keep = 0 if last else next(n for n in range(len(self.CLOSE) - 1, -1, -1) if held.endswith(self.CLOSE[:n]))
        self._held = held[len(held) - keep :]
        return "", held[: len(held) - keep]


class Calls:
    """Joins the fragments of tool calls."""

    def __init__(self) -> None:
        self._calls: list[dict[str, str]] = []
        self._places: dict[object, dict[str, str]] = {}

    def add(self, part: Mapping[str, Any]) -> None:
        """Add a fragment: to the call with its index or id; else to a new call if it has a name, or to the last one."""
        function = http.read_object(part.get("function"))
        place, call_id, name = (part.get("index"), *map(http.read_word, (part.get("id"), function.get("name"))))
        place = call_id if place is None else place
        call = self._places.get(place)
        if place is None and not name and self._calls:
            call = self._calls[-1]
        if call is None or (call_id and name and call["id"] not in ("", call_id)):  # Some servers count all as 0.
            call = {"id": "", "name": "", "arguments": ""}
            self._calls.append(call)
        if place is not None:
            self._places[place] = call
        arguments = function.get("arguments")
        call["id"], call["name"] = call["id"] or call_id or "", call["name"] or name or ""
        call["arguments"] += arguments if isinstance(arguments, str) else _json(arguments) if arguments else ""

    def read(self, *, cut: bool) -> tuple[ToolCall, ...]:
        """Return the calls.

        Raises:
            InferenceFailed: a call is malformed, or `cut` by the limit of the reply.
        """
        if cut and self._calls and not (last := self._calls[-1])["arguments"].rstrip().endswith("}"):
            problem = f"The reply reached its limit in the middle of a call of the tool `{last['name'][:80]}`."
            raise InferenceFailed(problem, hint="Raise `max_tokens`.", partial=Reply(text="", raw=last))
        return tuple(http.read_tool_call(each["name"], each["arguments"], each["id"]) for each in self._calls)


class _Delta(msgspec.Struct):
    content: str
    reasoning: None = None
    reasoning_content: None = None
    refusal: None = None
    tool_calls: None = None


class _Choice(msgspec.Struct):
    delta: _Delta
    index: Literal[0] = 0
    finish_reason: None = None
    logprobs: None = None


class _TextEvent(msgspec.Struct):
    """An event with text only. Fields of type None must be absent."""

    choices: tuple[_Choice]
    model: str
    error: None = None
    usage: None = None
    timings: None = None


_text_event = msgspec.json.Decoder(_TextEvent).decode


class Reader:
    """Turns the events of one response into chunks, and holds its end until the usage has come."""

    def __init__(self, request: ChatRequest | GenerateRequest, profile: Profile, learned: Learned) -> None:
        self._request = request
        self._profile = profile
        self._learned = learned
        self._thoughts = Thoughts()
        self._thoughts.over = isinstance(request, GenerateRequest)
        self._calls = Calls()
        self._last: dict[str, Any] = {}
        self._model = ""
        self._field = self._logprobs = self._refused = False
        self.headers: http.Headers = ()
        self.finish: str | None = None
        """The server's reason for the end. Without one, the reply is not complete."""

    def words(self, data: bytes) -> tuple[str, str] | None:
        """Return the text of an event that has nothing else."""
        if self._model and self._thoughts.over:
            try:
                found = _text_event(data)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                return None
            if found.model == self._model and (text := found.choices[0].delta.content):
                return self._thoughts.split(text)
        return None

    def read(self, event: http.Event) -> Chunk | None:
        """Return the chunk of an event, if it has one."""
        return self.take(event.json())

    def take(self, found: Mapping[str, Any]) -> Chunk | None:
        """Return the chunk of an event or of a whole response, if it has one."""
        choices, model = http.read_entries(found.get("choices"), http.read_object), found.get("model")
        choice = next((each for each in choices if not each.get("index")), {})  # With `n`, there are others.
        delta = http.read_object(choice.get("delta") or choice.get("message")) or {"content": choice.get("text")}
        calls = delta.get("tool_calls") or ()
        for each in [calls] if isinstance(calls, Mapping) else calls:
            self._calls.add(http.read_object(each))
        text, thinking = self._words(delta)
        logprobs = _logprobs(http.read_object(choice.get("logprobs")), top="top_logprobs" in self._request.options)
        self._logprobs = self._logprobs or bool(logprobs)
        self._refused = self._refused or bool(delta.get("refusal"))
        self.finish = http.read_word(choice.get("finish_reason")) or self.finish
        if self.finish or found.get("usage") or found.get("timings"):
            self._last |= {name: value for name, value in found.items() if value or name not in self._last}
        elif model == "" and self._model and not (text or thinking or calls):  # Ollama sends no other sign.
            raise InferenceFailed("The model stopped working in the middle of its reply.", hint="See the server's log.")
        self._model = http.read_word(model) or self._model
        return Chunk(text=text, thinking=thinking, logprobs=logprobs) if text or thinking or logprobs else None

    def _words(self, delta: Mapping[str, Any]) -> tuple[str, str]:
        """Return the text and the thinking of a message, which come in several forms, sometimes in two at once."""
        text, thinking = _blocks(delta.get("content") or delta.get("refusal"))
        fields = ((name, http.read_word(delta.get(name))) for name in ("reasoning_content", "reasoning"))
        if found := next(filter(lambda pair: pair[1], fields), None):
            self._learned.thought, thinking = found[0], found[1] or ""
        self._field = self._field or bool(thinking)
        text, tagged = self._thoughts.split(text) if text else ("", "")
        return text, thinking or ("" if self._field else tagged)

    def last(self) -> Chunk:
        """Return the last chunk: what was held back, and what else is known.

        Raises:
            InferenceFailed: a tool call cannot be read.
        """
        text, thinking = self._thoughts.split("", last=True)
        timings = http.read_object(self._last.get("timings"))
        prompt, generation = (
            http.read_seconds(timings.get(each), per_second=1e3) for each in ("prompt_ms", "predicted_ms")
        )
        return Chunk(
            text=text,
            thinking="" if self._field else thinking,
            tool_calls=self._calls.read(cut=self.finish in ("length", "max_tokens")),
            finish_reason="refusal" if self._refused else self.finish,
            usage=_usage(self._last),
            timings=Timings(prompt=prompt, generation=generation),
            model=self._model or None,
            warnings=tuple(self._warnings()),
            request_id=next(filter(None, (header(self.headers, each) for each in REQUEST_IDS)), None),
            rate_limits={name: value for name, value in self.headers if "ratelimit" in name} or None,
            raw=self._last,
        )

    def _warnings(self) -> Iterator[str]:
        request = self._request
        if self._profile.keeps_name and self._model not in ("", request.model):
            yield f"The server has only the model `{self._model}`, which replied instead."
        if request.options.get("logprobs") and not self._logprobs:
            yield "The server sent no log-probabilities."
        if self._profile.cuts and isinstance(request, ChatRequest) and any(each.images for each in request.messages):
            yield f"{self._profile.name} ignores images here if the model cannot read them."


REQUEST_IDS: Final = ("x-request-id", "request-id", "x-generation-id", "apim-request-id")


def _blocks(content: object) -> tuple[str, str]:
    """Return the text and the thinking of a content that is a text or, as Mistral sends it, a list of blocks."""
    if not isinstance(content, list):
        return http.read_text(content), ""
    blocks = [http.read_object(each) for each in content]
    text = "".join(http.read_text(each.get("text")) for each in blocks)
    return text, "".join(_blocks(each.get("thinking"))[0] for each in blocks)


def _logprobs(found: Mapping[str, Any], *, top: bool) -> tuple[Logprob, ...]:
    entries = found.get("content")
    if isinstance(found.get("tokens"), list):  # The form of completions.
        pairs = zip(found["tokens"], found.get("token_logprobs") or (), strict=False)
        entries = [{"token": token, "logprob": logprob} for token, logprob in pairs]
    return http.read_logprobs(entries, top=top)


def _usage(found: Mapping[str, Any]) -> Usage | None:
    usage, timings = http.read_object(found.get("usage")), http.read_object(found.get("timings"))
    read, written = (http.read_object(usage.get(f"{each}_tokens_details")) for each in ("prompt", "completion"))
    counts = Usage(
        input_tokens=usage.get("prompt_tokens"),
        output_tokens=usage.get("completion_tokens"),
        cached_tokens=read.get("cached_tokens", timings.get("cache_n")),
        reasoning_tokens=written.get("reasoning_tokens"),
    )
    return None if counts == Usage() else counts


# --- Vectors and models ----------------------------------------------------------------------------------------------


def embeddings(request: EmbedRequest, found: Mapping[str, Any]) -> Embeddings:
    """Read the vectors of a response, as numbers or as base64 of little-endian 32-bit floats.

    Raises:
        CapabilityUnsupported: the server ignored `dimensions`.
    """
    vectors = [_vector(each) for each in http.read_vectors(found["data"])]
    if request.dimensions is not None and vectors and len(vectors[0]) != request.dimensions:
        problem = f"The vectors of `{request.model}` have {len(vectors[0])} numbers, not {request.dimensions}."
        hint = "Leave `dimensions` out, or choose a model that can shorten its vectors."
        raise CapabilityUnsupported(problem, hint=hint)
    return Embeddings(vectors=vectors, model=http.read_word(found.get("model")) or "", usage=_usage(found) or Usage())


def _vector(found: Any) -> Any:
    if not isinstance(found, str):
        return found
    data = base64.b64decode(found, validate=True)
    return struct.unpack(f"<{len(data) // 4}f", data)


WINDOWS: Final = ("n_ctx", "max_model_len", "context_length", "max_context_length", "context_window")


def models(profile: Profile, found: Mapping[str, Any]) -> tuple[ModelInfo, ...]:
    """Read a list of models. An empty body is an empty list: mlx_lm.server sends it if it has no cache."""
    own = [{"id": profile.default_model}] if profile.default_model else []
    return http.read_records([*own, *((found["data"] or ()) if found else ())], _model)


def _model(found: Mapping[str, Any]) -> ModelInfo:
    meta = http.read_object(found.get("meta"))
    facts = {**found, **meta}
    return ModelInfo(
        name=str(found["id"]),
        size=http.read_count(meta.get("size")) or None,
        parameters=str(meta["n_params"]) if meta.get("n_params") else None,
        quantization=http.read_word(meta.get("ftype")),
        context_window=next(filter(None, (http.read_count(facts.get(each)) for each in WINDOWS)), None),
        metadata=meta,
        raw=found,
    )


def features(profile: Profile, props: Mapping[str, Any]) -> frozenset[Feature] | None:
    """Return what a model can do by its template, which may drop tools without a word; None if there is none."""
    template = http.read_word(props.get("chat_template"))
    if template is None:
        return None
    missing: set[Feature] = set() if http.read_object(props.get("modalities")).get("vision") else {"images"}
    if not re.search(r"\btools\b", template):
        missing |= {"tools", "tool_choice"}
    if not re.search(r"enable_thinking|reasoning_content|reasoning_effort|<think>", template):
        missing |= {"thinking"}
    shown: set[Feature] = {"chat", "generate", "embed", "count_tokens"}
    return profile.features.union(shown) - missing


def loaded_models(profile: Profile, found: Mapping[str, Any]) -> tuple[LoadedModel, ...]:
    """Read the models in memory, from a list of models or from LM Studio's own.

    Both state the size of the weights; the cache is estimated from that size and the window.
    """
    loaded = models(profile, found) if "data" in found else [each for _, each in _instances(found)]
    return tuple(
        LoadedModel(name=each.name, size=_in_memory(each), context_window=each.context_window, raw=each.raw)
        for each in loaded
    )


def _in_memory(model: ModelInfo) -> int | None:
    shape = read_shape(ModelInfo(name=model.name, size=model.size))
    cache = footprint(shape, model.context_window).cache if shape is not None and model.context_window else 0
    return model.size + cache if model.size else None


def from_lmstudio(model: ModelInfo, found: Mapping[str, Any]) -> ModelInfo:
    """Add what LM Studio's own list says about a model, or about a loaded instance of it."""
    for key, each in _instances(found, loaded=False):
        if model.name in (key, each.name):
            return replace(each, name=model.name, context_window=model.context_window or each.context_window)
    return model


def _instances(found: Mapping[str, Any], *, loaded: bool = True) -> Iterator[tuple[str, ModelInfo]]:
    """Yield each loaded instance with its model's key, and models that are not loaded if those count, too."""
    for each in found["models"]:
        unloaded = {"id": each["key"], "config": {"context_length": each.get("max_context_length")}}
        for one in [*each["loaded_instances"], *([] if loaded else [unloaded])]:
            yield (
                each["key"],
                ModelInfo(
                    name=str(one["id"]),
                    size=http.read_count(each.get("size_bytes")),
                    architecture=http.read_word(each.get("architecture")),
                    parameters=http.read_word(each.get("params_string")),
                    quantization=http.read_word(http.read_object(each.get("quantization")).get("name")),
                    context_window=http.read_count(one["config"]["context_length"]),
                    # In the words of Ollama, which `graftage.footprint` knows.
                    raw={**each, "details": {"format": "safetensors" if each.get("format") == "mlx" else "gguf"}},
                ),
            )
