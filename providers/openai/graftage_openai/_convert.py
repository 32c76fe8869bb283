"""Requests to the JSON of OpenAI's API, and its responses to Graftage's types, from many servers."""

from __future__ import annotations

import base64
import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from graftage import gguf
from graftage.calls import ChatRequest, EmbedRequest, GenerateRequest
from graftage.exceptions import (
    CapabilityUnsupported,
    ContextOverflow,
    InferenceFailed,
    ModelNotFound,
    Overloaded,
    ProviderError,
    RequestRejected,
)
from graftage.footprint import footprint, read_shape
from graftage.http import (
    Answer,
    Document,
    Event,
    Headers,
    Rules,
    by_words,
    read_count,
    read_entries,
    read_logprobs,
    read_moment,
    read_object,
    read_records,
    read_seconds,
    read_text,
    read_tool_call,
    read_vectors,
    read_word,
    says,
)
from graftage.http.transport import header
from graftage.types import Chunk, Embeddings, LoadedModel, Logprob, Message, ModelInfo, Reply, Timings, Tool, Usage

if TYPE_CHECKING:
    from graftage_openai._profiles import Profile

__all__ = ["Learned", "Reader", "as_chat", "chat_body", "completion_body", "embed_body", "embeddings", "loaded_models"]

LONGEST: Final = 2**31 - 1
"""Tokens: llama-server takes a larger limit for a small one."""
ANY_OBJECT: Final = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}
LIMITS: Final = ("max_tokens", "max_completion_tokens")
UNWANTED: Final = re.compile(
    r"unsupported|not supported|not permitted|unknown|unrecognized|unexpected|extra", re.IGNORECASE
)


class Learned:
    """What the refusals and replies of a server have shown about it."""

    def __init__(self) -> None:
        self.limit: str | None = None
        self.thought: str | None = None
        self._usage = True

    def extras(self) -> dict[str, Any]:
        """Return the fields that make a reply a stream."""
        return {"stream": True, **({"stream_options": {"include_usage": True}} if self._usage else {})}

    def adjust(self, body: dict[str, Any], error: ProviderError) -> bool:
        """Change the field of a body that a refusal names. Return False if the error must be raised."""
        said = str(error.details.get("server_message", ""))
        if error.status not in (400, 422):
            return False
        if "response_format" in said and body.get("response_format") == {"type": "json_object"}:
            body["response_format"] = ANY_OBJECT
            return True
        if "stream_options" in said and UNWANTED.search(said) and body.pop("stream_options", None):
            self._usage = False
            return True
        sent = next((each for each in LIMITS if each in body), "")
        if not sent or self.limit or not re.search(rf"\b{sent}\b", said) or not UNWANTED.search(said):
            return False
        self.limit = LIMITS[sent == LIMITS[0]]
        body[self.limit] = body.pop(sent)
        return True


# --- Requests --------------------------------------------------------------------------------------------------------


def as_chat(request: GenerateRequest) -> ChatRequest:
    """Return the chat with one message that a prompt is for a model with a template."""
    names = ("call", "model", "format", "think", "options", "max_tokens", "context_window", "keep_alive", "adapter")
    system = (Message(role="system", content=request.system),) if request.system is not None else ()
    user = Message(role="user", content=request.prompt, images=request.images)
    return ChatRequest(messages=(*system, user), **{name: getattr(request, name) for name in names})


def chat_body(request: ChatRequest, profile: Profile, learned: Learned) -> dict[str, Any]:
    """Return the JSON of a chat.

    Raises:
        CapabilityUnsupported: the server does not support a part of the request.
    """
    body = _shared_body(request, profile, learned)
    if body.get("logprobs"):
        body["top_logprobs"] = body.get("top_logprobs") or 1  # Without it, some servers omit the tokens.
    if request.max_tokens is not None:
        body[learned.limit or profile.limit] = min(request.max_tokens, LONGEST)
    thought = profile.thought or learned.thought
    body["messages"] = [_message(each, thought) for each in request.messages]
    if request.tools:
        body |= _tools(request.tools, request.tool_choice, profile)
    if request.format is not None:
        body["response_format"] = _response_format(request.format, profile)
    return body | _thinking(request.think, profile, body.get("chat_template_kwargs"))


def completion_body(request: GenerateRequest, profile: Profile, learned: Learned) -> dict[str, Any]:
    """Return the JSON of a completion without the model's template.

    Raises:
        CapabilityUnsupported: the server does not support a part of the request.
        RequestRejected: parts of the request contradict each other.
    """
    if request.system is not None or request.images:
        raise RequestRejected(
            "`raw` and `suffix` cannot be combined with a system prompt or images.",
            hint="Write it into the prompt, or leave `raw` and `suffix` out.",
        )
    if request.raw and not profile.raw:
        raise unsupported("raw", profile)
    if request.format is not None or request.think:
        raise unsupported("structured_output` and `thinking` with `raw` or `suffix", profile)
    body = _shared_body(request, profile, learned) | {"prompt": request.prompt}
    if body.pop("logprobs", False):
        body["logprobs"] = body.pop("top_logprobs", 0) or 1  # Here, this is the number.
    if request.max_tokens is not None:
        body["max_tokens"] = min(request.max_tokens, LONGEST)
    return body if request.suffix is None else {**body, "suffix": request.suffix}


def _shared_body(request: ChatRequest | GenerateRequest, profile: Profile, learned: Learned) -> dict[str, Any]:
    options = {profile.names.get(name, name): value for name, value in request.options.items()}
    if not options.get("logprobs"):
        for name in ("logprobs", "top_logprobs"):
            options.pop(name, None)
    return {**options, "model": request.model, **learned.extras()}


def _message(message: Message, thought: str | None) -> dict[str, Any]:
    content: Any = message.content
    if message.images:
        content = [{"type": "text", "text": message.content}] if message.content else []
        for each in message.images:
            data = base64.b64encode(each.data).decode("ascii")
            url = f"data:{each.media_type or 'image/png'};base64,{data}"
            content.append({"type": "image_url", "image_url": {"url": url}})
    out: dict[str, Any] = {"role": message.role, "content": content}
    # DeepSeek refuses turns with calls that lack the field, even if it is empty.
    if thought and (message.thinking or message.tool_calls):
        out[thought] = message.thinking or ""
    if message.tool_calls:
        out["tool_calls"] = [
            {"id": each.id, "type": "function", "function": {"name": each.name, "arguments": _json(each.arguments)}}
            for each in message.tool_calls
        ]
    for name in ("name", "tool_call_id"):
        if value := getattr(message, name):
            out[name] = value
    return out


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(dict(value), ensure_ascii=False)


def _tools(tools: tuple[Tool, ...], choice: str | None, profile: Profile) -> dict[str, Any]:
    named = choice is not None and choice != "required"
    if named and not profile.named_tool:
        tools, choice, named = tuple(each for each in tools if each.name == choice), "required", False
    body: dict[str, Any] = {
        "tools": [
            {
                "type": "function",
                "function": {"name": each.name, "description": each.description, "parameters": dict(each.parameters)},
            }
            for each in tools
        ]
    }
    if choice is not None:
        body["tool_choice"] = {"type": "function", "function": {"name": choice}} if named else "required"
    return body


def _response_format(wanted: Mapping[str, Any] | str, profile: Profile) -> Mapping[str, Any]:
    if isinstance(wanted, str):
        return {"type": "json_object"} if profile.json_object else ANY_OBJECT
    schema: dict[str, Any] = {"name": "answer", "schema": wanted}
    if _is_strict(wanted):
        schema["strict"] = True
    return {"type": "json_schema", "json_schema": schema}


def _is_strict(schema: object) -> bool:
    """Return whether a schema requires all its properties and no others: OpenAI enforces only such schemas."""
    if isinstance(schema, list):
        return all(map(_is_strict, schema))
    if not isinstance(schema, Mapping):
        return True
    if schema.get("type") == "object" and (
        schema.get("additionalProperties") is not False
        or set(schema.get("required", ())) != set(schema.get("properties", ()))
    ):
        return False
    return all(map(_is_strict, schema.values()))


def _thinking(think: bool | str | None, profile: Profile, passed_on: object) -> dict[str, Any]:
    if think is None:
        return {}
    if profile.think is None:
        raise unsupported("thinking", profile)
    level = think if isinstance(think, str) else "medium" if think else "none"
    if profile.think == "template":
        arguments: dict[str, Any] = {**read_object(passed_on), "enable_thinking": level != "none"}
        return {"chat_template_kwargs": {**arguments, **({"reasoning_effort": think} if think == level else {})}}
    return {"reasoning_effort": level} if profile.think == "effort" else {"reasoning": {"effort": level}}


def embed_body(request: EmbedRequest, profile: Profile) -> dict[str, Any]:
    """Return the JSON of an embedding.

    Raises:
        CapabilityUnsupported: the server does not support a part of the request.
    """
    if profile.embeds is None:
        raise unsupported("embed", profile)
    if profile.cuts_inputs and not request.truncate:
        raise unsupported("truncate=False", profile)
    body: dict[str, Any] = {**request.options, "model": request.model, "input": list(request.inputs)}
    if request.dimensions is not None:
        body["dimensions"] = request.dimensions
    return {**body, "encoding_format": "base64"} if profile.embeds == "base64" else body


def unsupported(what: str, profile: Profile) -> CapabilityUnsupported:
    """Return the error for what the server cannot do."""
    hint = "Leave it out, or use another server. If this is another one, name it in the setting `profile`."
    return CapabilityUnsupported(f"{profile.name or 'This server'} does not support `{what}`.", hint=hint)


# --- Responses -------------------------------------------------------------------------------------------------------


class Thoughts:
    """Takes a thought in `<think>` tags from the start of a text that comes in pieces."""

    OPEN: Final = "<think>"
    CLOSE: Final = "</think>"

    def __init__(self) -> None:
        self._held = ""
        self._inside = self._over = self._gap = False

    def split(self, piece: str, *, last: bool = False) -> tuple[str, str]:
        """Return the text and the thought of a piece, as far as it is clear which is which."""
        if self._over:
            if self._gap:
                piece = piece.lstrip()
                self._gap = not piece
            return piece, ""
        held, self._held = self._held + piece, ""
        if not self._inside:
            start = held.lstrip()
            if not last and len(start) < len(self.OPEN) and self.OPEN.startswith(start):
                self._held = held
                return "", ""
            if not start.startswith(self.OPEN):
                self._over = True
                return held, ""
            self._inside, held = True, start.removeprefix(self.OPEN)
        thought, closed, text = held.partition(self.CLOSE)
        if closed:
            self._over = True
            text = text.lstrip()
            self._gap = not text
            return text, thought
        # The end may be the begin of the closing tag.
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
        function = read_object(part.get("function"))
        index, call_id, name = part.get("index"), read_word(part.get("id")), read_word(function.get("name"))
        key = ("id", call_id) if index is None and call_id else index
        call = self._places.get(key) if key is not None else None
        if call is None and key is None and not name and self._calls:
            call = self._calls[-1]
        if call is None or (call_id and name and call["id"] not in ("", call_id)):  # Some servers count all as 0.
            call = {"id": "", "name": "", "arguments": ""}
            self._calls.append(call)
        if key is not None:
            self._places[key] = call
        call["id"] = call["id"] or call_id or ""
        call["name"] = call["name"] or name or ""
        arguments = function.get("arguments")
        call["arguments"] += arguments if isinstance(arguments, str) else _json(arguments) if arguments else ""

    def read(self, *, cut: bool) -> tuple[Any, ...]:
        """Return the calls.

        Raises:
            InferenceFailed: a call is malformed, or `cut` by the limit of the reply.
        """
        if cut and self._calls and not self._calls[-1]["arguments"].rstrip().endswith("}"):
            raise InferenceFailed(
                f"The reply reached its limit in the middle of a call of the tool `{self._calls[-1]['name'][:80]}`.",
                hint="Raise `max_tokens`.",
                partial=Reply(text="", raw=self._calls[-1]),
            )
        return tuple(read_tool_call(each["name"], each["arguments"], each["id"]) for each in self._calls)


class Reader:
    """Turns the events of one response into chunks, and holds its end until the usage has come."""

    def __init__(self, request: ChatRequest | GenerateRequest, profile: Profile, learned: Learned) -> None:
        self._request = request
        self._profile = profile
        self._learned = learned
        self._thoughts = Thoughts()
        self._calls = Calls()
        self._last: dict[str, Any] = {}
        self._model = ""
        self._told = self._logprobs = False
        self.finish: str | None = None
        """The server's reason for the end, once it has given one. Without one, the reply is not complete."""

    def read(self, event: Event) -> Chunk | None:
        """Return the chunk of an event, if it has one."""
        return self.take(event.json())

    def take(self, found: Mapping[str, Any]) -> Chunk | None:
        """Return the chunk of an event or a whole response, if it has one."""
        choices = found.get("choices")
        choice = read_object(choices[0]) if isinstance(choices, list) and choices else {}
        delta = read_object(choice.get("delta") or choice.get("message")) or {"content": choice.get("text")}
        text, thinking = self._words(delta)
        calls = delta.get("tool_calls") or ()
        for each in [calls] if isinstance(calls, Mapping) else calls:
            self._calls.add(read_object(each))
        logprobs = _logprobs(read_object(choice.get("logprobs")), top=bool(self._request.options.get("top_logprobs")))
        self._logprobs = self._logprobs or bool(logprobs)
        self.finish = ("refusal" if delta.get("refusal") else read_word(choice.get("finish_reason"))) or self.finish
        model = found.get("model")
        if self.finish or found.get("usage") or found.get("timings"):
            self._last |= {name: value for name, value in found.items() if value or name not in self._last}
        elif model == "" and self._model and not (text or thinking or calls):
            raise InferenceFailed("The model stopped working in the middle of its reply.", hint="See the server's log.")
        self._model = read_word(model) or self._model
        return Chunk(text=text, thinking=thinking, logprobs=logprobs) if text or thinking or logprobs else None

    def _words(self, delta: Mapping[str, Any]) -> tuple[str, str]:
        """Return the text and the thinking of a message, which come in several forms, sometimes in two at once."""
        text, thinking = _blocks(delta.get("content") or delta.get("refusal"))
        for name in ("reasoning_content", "reasoning"):
            if found := read_word(delta.get(name)):
                self._learned.thought, thinking = name, found
                break
        self._told = self._told or bool(thinking)
        if not text or not isinstance(self._request, ChatRequest):
            return text, thinking
        text, tagged = self._thoughts.split(text)
        return text, thinking or ("" if self._told else tagged)

    def last(self, headers: Headers) -> Chunk:
        """Return the last chunk: what was held back, and what else is known.

        Raises:
            InferenceFailed: a tool call cannot be read.
        """
        text, thinking = self._thoughts.split("", last=True)
        timings = read_object(self._last.get("timings"))
        return Chunk(
            text=text,
            thinking="" if self._told else thinking,
            tool_calls=self._calls.read(cut=self.finish in ("length", "max_tokens")),
            finish_reason=self.finish,
            usage=_usage(self._last),
            timings=Timings(
                prompt=read_seconds(timings.get("prompt_ms"), per_second=1e3),
                generation=read_seconds(timings.get("predicted_ms"), per_second=1e3),
            ),
            model=self._model or None,
            warnings=tuple(self._warnings()),
            request_id=next(filter(None, (header(headers, each) for each in REQUEST_IDS)), None),
            rate_limits={name: value for name, value in headers if "ratelimit" in name} or None,
            raw=self._last,
        )

    def _warnings(self) -> list[str]:
        notes = []
        if self._profile.keeps_name and self._model not in ("", self._request.model):
            notes.append(f"The server has only the model `{self._model}`, which replied instead.")
        if self._request.options.get("logprobs") and not self._logprobs:
            notes.append("The server sent no log-probabilities.")
        return notes


REQUEST_IDS: Final = ("x-request-id", "request-id", "x-generation-id", "apim-request-id")


def _blocks(content: object) -> tuple[str, str]:
    """Return the text and the thinking of a content that is a text or, as Mistral sends it, a list of blocks."""
    if not isinstance(content, list):
        return read_text(content), ""
    blocks = [read_object(each) for each in content]
    text = "".join(read_text(each.get("text")) for each in blocks)
    return text, "".join(_blocks(each.get("thinking"))[0] for each in blocks)


def _logprobs(found: Mapping[str, Any], *, top: bool) -> tuple[Logprob, ...]:
    if not isinstance(found.get("tokens"), list):
        return read_logprobs(found.get("content"), top=top)
    # The form of completions.
    pairs = zip(found["tokens"], found.get("token_logprobs") or (), strict=False)
    return read_logprobs([{"token": token, "logprob": logprob} for token, logprob in pairs])


def _usage(found: Mapping[str, Any]) -> Usage | None:
    usage = read_object(found.get("usage"))
    cached = read_object(usage.get("prompt_tokens_details")).get("cached_tokens")
    told = Usage(
        input_tokens=usage.get("prompt_tokens"),
        output_tokens=usage.get("completion_tokens"),
        cached_tokens=read_object(found.get("timings")).get("cache_n") if cached is None else cached,
        reasoning_tokens=read_object(usage.get("completion_tokens_details")).get("reasoning_tokens"),
    )
    return None if told == Usage() else told


def embeddings(request: EmbedRequest, found: Mapping[str, Any]) -> Embeddings:
    """Read the vectors of a response, as numbers or as base64 of little-endian 32-bit floats.

    Raises:
        CapabilityUnsupported: the server ignored `dimensions`.
    """
    vectors = [_vector(each) for each in read_vectors(found["data"])]
    if request.dimensions is not None and vectors and len(vectors[0]) != request.dimensions:
        raise CapabilityUnsupported(
            f"The vectors of `{request.model}` have {len(vectors[0])} numbers, not {request.dimensions}.",
            hint="Leave `dimensions` out, or choose a model that can shorten its vectors.",
        )
    return Embeddings(vectors=vectors, model=read_word(found.get("model")) or "", usage=_usage(found) or Usage())


def _vector(found: Any) -> Any:
    if not isinstance(found, str):
        return found
    data = base64.b64decode(found, validate=True)
    return struct.unpack(f"<{len(data) // 4}f", data)


# --- Models ----------------------------------------------------------------------------------------------------------

WINDOWS: Final = ("max_model_len", "context_length", "context_window", "max_context_length", "n_ctx")


def models(found: Mapping[str, Any]) -> tuple[ModelInfo, ...]:
    """Read a list of models. An empty body is an empty list: mlx_lm.server sends it if it has no cache."""
    return read_records(found["data"], _model) if found else ()


def _model(found: Mapping[str, Any]) -> ModelInfo:
    meta = read_object(found.get("meta"))
    facts = {**found, **meta}
    count = read_count(meta.get("n_params"))
    return ModelInfo(
        name=found["id"],
        size=read_count(meta.get("size")) or None,
        parameters=str(count) if count else None,
        quantization=read_word(meta.get("ftype")),
        context_window=next(filter(None, (read_count(facts.get(name)) for name in WINDOWS)), None),
        parent=read_word(found.get("parent")),
        metadata=meta,
        raw=found,
    )


def described(model: ModelInfo, found: Mapping[str, Any]) -> ModelInfo:
    """Add what `/props` of llama-server, `/api/show` of Ollama or `/api/v1/models` of LM Studio says about a model."""
    if isinstance(found.get("models"), list):
        return next((_lmstudio(model, each) for each in map(read_object, found["models"]) if _has(each, model)), model)
    words = found.get("capabilities")
    if isinstance(words, list):
        features = frozenset(feature for each in words for feature in OLLAMA_FEATURES.get(str(each), ()))
        return replace(model, features=features, template=read_word(found.get("template")))
    template = read_word(found.get("chat_template")) or ""
    features = frozenset({"chat", "generate", "structured_output", "logprobs", "embed"})
    able = {
        "images": bool(read_object(found.get("modalities")).get("vision")),
        "tools": re.search(r"\btools\b", template),
        "thinking": re.search(r"enable_thinking|reasoning_content|reasoning_effort|<think>", template),
    }
    features = features.union(each for each in able if able[each])
    return replace(model, features=features, template=template or None, raw={**model.raw, **found})


def _has(found: Mapping[str, Any], model: ModelInfo) -> bool:
    return model.name in (found.get("key"), *(each.get("id") for each in _instances(found)))


def _instances(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [read_object(each) for each in found.get("loaded_instances") or ()]


def _lmstudio(model: ModelInfo, found: Mapping[str, Any]) -> ModelInfo:
    # Both names of the format are those of Ollama, which the estimate of a model's memory knows.
    details = {"format": "safetensors" if found.get("format") == "mlx" else found.get("format")}
    return replace(
        model,
        size=read_count(found.get("size_bytes")),
        architecture=read_word(found.get("architecture")),
        parameters=read_word(found.get("params_string")),
        quantization=read_word(read_object(found.get("quantization")).get("name")),
        context_window=read_count(found.get("max_context_length")),
        raw={**found, "details": details},
    )


def with_files(model: ModelInfo) -> ModelInfo:
    """Add what a model's own files say, if they are on this machine: a GGUF file, or a folder as mlx_lm reads it."""
    try:
        place = Path(read_word(model.raw.get("model_path")) or read_word(model.raw.get("root")) or model.name)
        if place.suffix == ".gguf" and place.is_file():
            return _with_gguf(model, place)
        folder = place if place.is_dir() else _downloaded(model.name)
        return _with_folder(model, folder, read_object(json.loads((folder / "config.json").read_bytes())))
    except (OSError, ValueError, RecursionError):
        return model


def _downloaded(name: str) -> Path:
    """Return the folder of a model that mlx_lm has downloaded by its repository's name."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    repository = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{name.replace('/', '--')}"
    return repository / "snapshots" / (repository / "refs" / "main").read_text().strip()


def _with_gguf(model: ModelInfo, file: Path) -> ModelInfo:
    header = gguf.read_file(file)
    return replace(
        model,
        path=file,
        size=header.size,
        architecture=header.architecture,
        metadata={**model.metadata, **header.metadata},
        tensors={name: each.shape for name, each in header.tensors.items()},
    )


def _with_folder(model: ModelInfo, folder: Path, config: Mapping[str, Any]) -> ModelInfo:
    config = {**config, **read_object(config.get("text_config"))}
    kind = read_word(config.get("model_type")) or ""
    kind = GGUF_ARCHITECTURES.get(kind, kind)
    keys = {f"{kind}.{key}": config[name] for name, key in GGUF_KEYS if config.get(name) is not None}
    bits = read_count(read_object(config.get("quantization")).get("bits"))
    return replace(
        model,
        path=folder,
        size=sum(each.stat().st_size for each in folder.glob("*.safetensors")) or None,
        architecture=kind or None,
        quantization=f"{bits}-bit" if bits else None,
        context_window=read_count(config.get("max_position_embeddings")),
        metadata={"general.architecture": kind, **keys},
        raw={**model.raw, "details": {"format": "safetensors"}},
    )


GGUF_ARCHITECTURES: Final = {"mistral": "llama", "gemma3_text": "gemma3"}
GGUF_KEYS: Final = (
    ("num_hidden_layers", "block_count"),
    ("hidden_size", "embedding_length"),
    ("intermediate_size", "feed_forward_length"),
    ("num_attention_heads", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("head_dim", "attention.key_length"),
    ("head_dim", "attention.value_length"),
    ("sliding_window", "attention.sliding_window"),
    ("sliding_window_pattern", "attention.sliding_window_pattern"),
    ("max_position_embeddings", "context_length"),
    ("vocab_size", "vocab_size"),
    ("num_experts", "expert_count"),
    ("num_local_experts", "expert_count"),
    ("num_experts_per_tok", "expert_used_count"),
)
"""Names in a `config.json`, and the GGUF keys that mean the same."""


OLLAMA_FEATURES: Final = {
    "completion": ("chat", "generate", "structured_output", "logprobs"),
    "tools": ("tools",),
    "vision": ("images",),
    "thinking": ("thinking",),
    "insert": ("suffix",),
    "embedding": ("embed",),
}


def loaded_models(found: Mapping[str, Any]) -> tuple[LoadedModel, ...]:
    """Read the models in memory, from the list of llama-server or vLLM, of Ollama, or of LM Studio.

    llama-server and LM Studio tell the size of the weights; the cache for the window is estimated.
    """
    if isinstance(found.get("data"), list):
        return tuple(_estimated(each, each.context_window) for each in models(found) if not each.parent)
    loaded: list[LoadedModel] = []
    for each in map(read_object, found["models"] or ()):
        if "loaded_instances" not in each:
            loaded += read_records([each], _ollama)
        for one in _instances(each):
            window = read_count(read_object(one.get("config")).get("context_length"))
            loaded.append(_estimated(_lmstudio(ModelInfo(name=read_text(one.get("id"))), each), window))
    return tuple(loaded)


def _estimated(model: ModelInfo, window: int | None) -> LoadedModel:
    shape = read_shape(model)
    cache = footprint(shape, window).cache if shape is not None and window else 0
    size = model.size + cache if model.size else None
    return LoadedModel(name=model.name, size=size, context_window=window, raw=model.raw)


def _ollama(found: Mapping[str, Any]) -> LoadedModel:
    return LoadedModel(
        name=found["name"],
        digest=read_word(found.get("digest")),
        size=read_count(found.get("size")),
        accelerator_size=read_count(found.get("size_vram")),
        expires_at=read_moment(found.get("expires_at")),
        context_window=read_count(found.get("context_length")),
        raw=found,
    )


# --- Refusals --------------------------------------------------------------------------------------------------------

RULES: Final[Rules] = (
    (
        ("generation thread died",),
        says(
            InferenceFailed,
            "The engine of the server has died: it will answer nothing more.",
            "Restart the server.",
        ),
    ),
    (("loading model",), says(Overloaded, "The server is still loading {model}.", "Try again in a few seconds.")),
    (
        (
            "cached snapshot folder",
            "not a valid model identifier",
            "repository not found",
            "'config.json'",
            "model_not_found",
            "no models loaded",
            "try pulling it first",
        ),
        says(ModelNotFound, "The server does not have {model}.", "Choose one that it lists, or load it there first."),
    ),
    (
        ("exceed_context_size_error", "context_length_exceeded", "maximum context length"),
        says(
            ContextOverflow,
            "The prompt does not fit into the context window.",
            "Send less, or start the server with a larger window.",
        ),
    ),
    (
        ("image input is not supported", "only 'text' content type", "does not support image"),
        says(
            CapabilityUnsupported,
            "{model} cannot read images.",
            "Choose one that can; llama-server needs its `--mmproj` file, too.",
        ),
    ),
    (
        ("does not support", "not_supported_error", "--enable-auto-tool-choice", "support reranking"),
        says(CapabilityUnsupported, "", "Choose another model, or start the server with the option for it."),
    ),
    (
        ("failed to parse tool", "failed to parse messages", "invalid json schema", "unable to generate parser"),
        says(RequestRejected, "", "Correct the request."),
    ),
    (
        ("does not match the expected", "tool_use_failed", "failed to parse generated"),
        says(InferenceFailed, "The model's call of a tool cannot be read.", "Ask again, or choose a larger model."),
    ),
)
"""Words and codes of these servers, whatever the status: some call a wrong request 404 or 500."""


def refusal(answer: Answer) -> ProviderError | None:
    """Return the typed error for a refusal, or None if the toolkit's tables decide."""
    if error := by_words(answer, RULES):
        return error
    if answer.words.strip().lower() in ("not found", "file not found") and answer.status == 404:
        return CapabilityUnsupported(
            "The server has no such endpoint.", hint="Check the path in `host`: it is usually `/v1`."
        )
    # mlx_lm.server says 404 to whatever fails before the first token.
    flat = answer.status == 404 and b'"message"' not in answer.body and answer.known
    if flat and (header(answer.headers, "server") or "").startswith("BaseHTTP"):
        return RequestRejected(answer.said, hint="Correct the request.")
    return None
