"""Requests to the JSON of OpenAI's API, and its responses to Graftage's types, as far as servers differ."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from graftage import http
from graftage.calls import ChatRequest, EmbedRequest, GenerateRequest
from graftage.exceptions import CapabilityUnsupported, ProviderError, RequestRejected
from graftage.footprint import footprint, read_shape
from graftage.http.completions import (
    ChatReader,
    read_embeddings,
    read_template,
    write_format,
    write_message,
    write_options,
    write_thinking,
    write_tools,
)
from graftage.http.transport import header
from graftage.types import Embeddings, Feature, LoadedModel, ModelInfo
from graftage_openai._profiles import OWNERS, PROFILES, Profile

__all__ = [
    "Learned",
    "chat_body",
    "completion_body",
    "embed_body",
    "embeddings",
    "features",
    "lmstudio_models",
    "loaded_models",
    "models",
    "recognise",
    "unsupported",
    "warnings",
]

LONGEST: Final = 2**31 - 1
"""Tokens: llama-server takes a larger limit for a small one."""
LIMITS: Final = ("max_tokens", "max_completion_tokens")
_UNWANTED: Final = "unsupported|not supported|not permitted|unknown|unrecognized|unexpected|extra"
UNWANTED: Final = re.compile(_UNWANTED, re.IGNORECASE)
UNWANTED_FIELD: Final = rf"(?i)(?:{_UNWANTED})\W+(?:\w+\W+){{{{0,3}}}}{{0}}\b|\b{{0}}\W+(?:is )?(?:{_UNWANTED})"
"""The words for an unknown field stand beside its name; farther away they may be about its value."""


@dataclass
class Learned:
    """What the refusals and replies of a server have shown about it."""

    limit: str | None = None
    thought: str | None = None
    counts: bool = True
    """Whether it can be asked for the usage in a stream."""

    def adjust(self, body: dict[str, Any], error: ProviderError) -> bool:
        """Change the field of a body that a refusal names. Return False if nothing can be changed."""
        said = str(error.details.get("server_message", "")) if error.status in (400, 422) else ""
        sent = next((each for each in LIMITS if each in body), "")
        other = LIMITS[sent == LIMITS[0]]
        if "response_format" in said and body.get("response_format") == {"type": "json_object"}:
            body["response_format"] = write_format("json", json_object=False)
        elif not UNWANTED.search(said):
            return False
        elif "stream_options" in said and "stream_options" in body:
            self.counts = False
            del body["stream_options"]
        elif sent and self.limit in (None, other) and (other in said or re.search(UNWANTED_FIELD.format(sent), said)):
            self.limit = other  # Calls that began before this was known may be changed, too.
            body[other] = body.pop(sent)
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
    thought = profile.thought or learned.thought
    body = _shared_body(request, profile, learned, learned.limit or profile.limit)
    body["messages"] = [write_message(each, thought) for each in request.messages]
    body |= write_tools(request.tools, request.tool_choice, by_name=profile.named_tool)
    if request.format is not None:
        body["response_format"] = write_format(request.format, json_object=profile.json_object)
    if request.think is None:
        return body
    if profile.think is None:
        raise unsupported("thinking", profile)
    if profile.think == "template":
        return {**body, "chat_template_kwargs": write_thinking(request.think, body.get("chat_template_kwargs"))}
    level = request.think if isinstance(request.think, str) else "medium" if request.think else "none"
    return body | ({"reasoning_effort": level} if profile.think == "effort" else {"reasoning": {"effort": level}})


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
    body = {**_shared_body(request, profile, learned, "max_tokens"), "prompt": request.prompt}
    return body if request.suffix is None else {**body, "suffix": request.suffix}


def _shared_body(
    request: ChatRequest | GenerateRequest, profile: Profile, learned: Learned, limit: str
) -> dict[str, Any]:
    written = write_options(request.options, chat=isinstance(request, ChatRequest))
    body = {profile.names.get(name, name): value for name, value in written.items()}
    if not learned.counts:
        del body["stream_options"]
    if request.max_tokens is not None:
        body[limit] = min(request.max_tokens, LONGEST)
    return {**body, "model": request.model}


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


def warnings(request: ChatRequest | GenerateRequest, profile: Profile, reader: ChatReader) -> Iterator[str]:
    """Yield what a server has ignored, as far as its reply shows."""
    if profile.keeps_name and reader.model not in ("", request.model):
        yield f"The server has only the model `{reader.model}`, which replied instead."
    if request.options.get("logprobs") and not reader.has_logprobs:
        yield "The server sent no log-probabilities."
    if profile.cuts and isinstance(request, ChatRequest) and any(each.images for each in request.messages):
        yield f"{profile.name} ignores images here if the model cannot read them."


def embeddings(request: EmbedRequest, found: Mapping[str, Any]) -> Embeddings:
    """Read the vectors of a response.

    Raises:
        CapabilityUnsupported: the server ignored `dimensions`.
    """
    read = read_embeddings(found)
    size = len(read.vectors[0]) if read.vectors else request.dimensions
    if request.dimensions not in (None, size):
        problem = f"The vectors of `{request.model}` have {size} numbers, not {request.dimensions}."
        hint = "Leave `dimensions` out, or choose a model that can shorten its vectors."
        raise CapabilityUnsupported(problem, hint=hint)
    return read


# --- Models ----------------------------------------------------------------------------------------------------------


def recognise(listed: http.Document) -> Profile | None:
    """Return the profile of the server that sent a list of models; None if it is none of the known ones."""
    software = header(listed.headers, "server") or ""
    owners = http.read_entries(listed.get("data"), lambda each: http.read_word(each.get("owned_by")))
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
    if not (name := http.read_word(found["id"])):
        raise ValueError("it has no name")
    meta = http.read_object(found.get("meta"))
    facts = {**found, **meta}
    return ModelInfo(
        name=name,
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
    able: set[Feature] = {"chat", "generate", "embed", "count_tokens"}
    missing = {"tools", "tool_choice", "thinking", "images"} - read_template(template)
    if http.read_object(props.get("modalities")).get("vision"):
        missing -= {"images"}
    return profile.features.union(able) - missing


def loaded_models(profile: Profile, found: Mapping[str, Any]) -> tuple[LoadedModel, ...]:
    """Read the models in memory, from a list of models or from LM Studio's own.

    Both state the size of the weights; the cache is estimated from that size and the window.
    """
    loaded = models(profile, found) if "data" in found else lmstudio_models(found)
    return tuple(
        LoadedModel(name=each.name, size=_in_memory(each), context_window=each.context_window, raw=each.raw)
        for each in loaded
    )


def _in_memory(model: ModelInfo) -> int | None:
    shape = read_shape(ModelInfo(name=model.name, size=model.size))
    cache = footprint(shape, model.context_window).cache if shape is not None and model.context_window else 0
    return model.size + cache if model.size else None


def lmstudio_models(found: Mapping[str, Any], *, loaded: bool = True) -> list[ModelInfo]:
    """Read LM Studio's own list: each loaded instance, and each model under its key if those count, too."""
    listed = []
    for each in found["models"]:
        unloaded = {"id": each["key"], "config": {"context_length": each.get("max_context_length")}}
        for one in [*each["loaded_instances"], *([] if loaded else [unloaded])]:
            model = ModelInfo(
                name=str(one["id"]),
                size=http.read_count(each.get("size_bytes")),
                architecture=http.read_word(each.get("architecture")),
                parameters=http.read_word(each.get("params_string")),
                quantization=http.read_word(http.read_object(each.get("quantization")).get("name")),
                context_window=http.read_count(one["config"]["context_length"]),
                # In the words of Ollama, which `graftage.footprint` knows.
                raw={**each, "details": {"format": "safetensors" if each.get("format") == "mlx" else "gguf"}},
            )
            listed.append(model)
    return listed
