"""Requests to the JSON of OpenAI's API, and its responses to Graftage's types."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from graftage import http
from graftage.calls import ChatRequest, EmbedRequest, GenerateRequest
from graftage.exceptions import CapabilityUnsupported, ProviderError, RequestRejected
from graftage.footprint import footprint, read_shape
from graftage.http.chat import ChatReader, message_body, read_tokens, tool_bodies
from graftage.http.transport import header
from graftage.types import Chunk, Embeddings, Feature, LoadedModel, ModelInfo, Usage
from graftage_openai._profiles import OWNERS, PROFILES, Profile

__all__ = [
    "Learned",
    "chat_body",
    "completion_body",
    "embed_body",
    "embeddings",
    "features",
    "last_chunk",
    "loaded_models",
    "models",
    "recognise",
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
    hint = "Leave it out, or use another server. If the server was taken for another one, set `profile`."
    return CapabilityUnsupported(f"{profile.name or 'This server'} does not support `{what}`.", hint=hint)


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
    body["messages"] = [message_body(each, profile.thought or learned.thought) for each in request.messages]
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


def _tools(request: ChatRequest, profile: Profile) -> dict[str, Any]:
    choice: Any = request.tool_choice
    tools = request.tools
    if choice not in (None, "required"):
        if profile.named_tool:
            choice = {"type": "function", "function": {"name": choice}}
        else:
            tools, choice = tuple(each for each in tools if each.name == choice), "required"
    body = {"tools": tool_bodies(tools)}
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


def last_chunk(reader: ChatReader, request: ChatRequest | GenerateRequest, profile: Profile) -> Chunk:
    """Return the last chunk of a reply, with warnings of what the server has ignored.

    Raises:
        InferenceFailed: a tool call cannot be read.
        StreamInterrupted: the reply has no reason for its end, and so may be cut.
    """
    images = isinstance(request, ChatRequest) and any(each.images for each in request.messages)
    notes = (
        (
            profile.keeps_name and reader.model not in ("", request.model),
            f"The server has only the model `{reader.model}`, which replied instead.",
        ),
        (request.options.get("logprobs") and not reader.has_logprobs, "The server sent no log-probabilities."),
        (profile.cuts and images, f"{profile.name} ignores images here if the model cannot read them."),
    )
    return replace(reader.last(), warnings=tuple(note for holds, note in notes if holds))


# --- Vectors and models ----------------------------------------------------------------------------------------------


def embeddings(request: EmbedRequest, found: Mapping[str, Any]) -> Embeddings:
    """Read the vectors of a response.

    Raises:
        CapabilityUnsupported: the server ignored `dimensions`.
    """
    vectors = http.read_vectors(found["data"])
    if request.dimensions is not None and vectors and len(vectors[0]) != request.dimensions:
        problem = f"The vectors of `{request.model}` have {len(vectors[0])} numbers, not {request.dimensions}."
        hint = "Leave `dimensions` out, or choose a model that can shorten its vectors."
        raise CapabilityUnsupported(problem, hint=hint)
    return Embeddings(
        vectors=vectors, model=http.read_word(found.get("model")) or "", usage=read_tokens(found) or Usage()
    )


def recognise(listed: http.Document) -> Profile | None:
    """Return the profile of the server that sent a list of models; None if it is none of the known ones."""
    software = header(listed.headers, "server") or ""
    owners = http.read_entries(listed.get("data"), lambda each: each.get("owned_by"))
    if software == "llama.cpp":
        return PROFILES["llama-server"]
    if software.startswith("BaseHTTP") and (set(owners) == {None} or not listed):
        return PROFILES["mlx"]
    return next((PROFILES[OWNERS[each]] for each in owners if each in OWNERS), None)


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
