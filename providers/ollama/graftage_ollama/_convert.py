"""Requests to Ollama's JSON, and its responses to Graftage's types.

The types of the official package are not used: they drop unknown fields (nested tool schemas, the ids of tool calls,
`verbose`), and importing it takes longer than a chat.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from graftage.calls import ChatRequest, EmbedRequest, GenerateRequest
from graftage.exceptions import CapabilityUnsupported
from graftage.gguf import bytes_of
from graftage.http import (
    read_count,
    read_entries,
    read_logprobs,
    read_moment,
    read_object,
    read_records,
    read_seconds,
    read_text,
    read_tool_calls,
    read_word,
)
from graftage.types import (
    Chunk,
    Embeddings,
    Image,
    LoadedModel,
    Message,
    ModelInfo,
    PullProgress,
    Timings,
    Tool,
    ToolCall,
    Usage,
    canonical_name,
)

__all__ = [
    "NO_TRUNCATION",
    "OPTIONS",
    "blob_digests",
    "chat_body",
    "chat_chunk",
    "chat_text",
    "embed_body",
    "embeddings",
    "generate_body",
    "generate_chunk",
    "keep_alive",
    "listed_models",
    "load_body",
    "loaded_models",
    "model_info",
    "parameters",
    "progress",
    "prompt_tokens",
    "server_options",
]

REQUEST_OPTIONS: Final = frozenset({"logprobs", "shift", "top_logprobs", "truncate"})
"""Options that are top-level fields of Ollama's request. Servers before 0.12.6 ignore `shift` and `truncate`."""
NO_TRUNCATION: Final = {"shift": False, "truncate": False}
"""Options by which a prompt that does not fit is refused, not cut."""
OPTIONS: Final = REQUEST_OPTIONS | {
    "frequency_penalty",
    "main_gpu",
    "min_p",
    "mirostat",
    "mirostat_eta",
    "mirostat_tau",
    "num_batch",
    "num_gpu",
    "num_keep",
    "num_thread",
    "penalize_newline",
    "presence_penalty",
    "repeat_last_n",
    "repeat_penalty",
    "seed",
    "server",
    "stop",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "use_mmap",
}

FEATURES: Final = {
    "completion": ("chat", "generate", "structured_output", "logprobs"),
    "tools": ("tools",),
    "vision": ("images",),
    "thinking": ("thinking",),
    "insert": ("suffix",),
    "embedding": ("embed",),
}
HEADER_ENDS: Final = frozenset({"TEMPLATE", "SYSTEM", "RENDERER", "PARSER", "PARAMETER", "LICENSE", "MESSAGE"})
NEVER_YEAR = 2300
"""Ollama writes "for ever" as a date after this year."""


def keep_alive(seconds: float | None) -> float | int | None:
    """Convert seconds to what Ollama expects: negative means for ever."""
    if seconds is None:
        return None
    if seconds == math.inf:
        return -1
    return int(seconds) if seconds.is_integer() else seconds


def server_options(
    options: Mapping[str, object], context_window: int | None = None, max_tokens: int | None = None
) -> dict[str, Any]:
    """Return the `options` of a request."""
    out = {name: value for name, value in options.items() if name not in REQUEST_OPTIONS}
    if context_window is not None:
        out["num_ctx"] = context_window
    if max_tokens is not None:
        out["num_predict"] = max_tokens
    return out


def _shared_body(request: ChatRequest | GenerateRequest) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": request.model,
        "stream": True,
        "format": request.format,
        "think": request.think,
        "options": server_options(request.options, request.context_window, request.max_tokens) or None,
        "keep_alive": keep_alive(request.keep_alive),
        **{name: request.options.get(name) for name in REQUEST_OPTIONS},
    }
    return {name: value for name, value in body.items() if value is not None}


def chat_body(request: ChatRequest) -> dict[str, Any]:
    """Return the JSON of a chat request."""
    body = _shared_body(request)
    body["messages"] = [_message(each) for each in request.messages]
    if request.tools:
        body["tools"] = [_tool(each) for each in request.tools]
    return body


def generate_body(request: GenerateRequest) -> dict[str, Any]:
    """Return the JSON of a generate request."""
    body = _shared_body(request)
    body["prompt"] = request.prompt
    for name in ("suffix", "system"):
        if (value := getattr(request, name)) is not None:
            body[name] = value
    if request.raw:
        body["raw"] = True
    if request.images:
        body["images"] = [_image(each) for each in request.images]
    return body


def embed_body(request: EmbedRequest) -> dict[str, Any]:
    """Return the JSON of an embed request."""
    body: dict[str, Any] = {
        "model": request.model,
        "input": list(request.inputs),
        "truncate": request.truncate,
        "dimensions": request.dimensions,
        "options": server_options(request.options, request.context_window) or None,
        "keep_alive": keep_alive(request.keep_alive),
    }
    return {name: value for name, value in body.items() if value is not None}


def _message(message: Message) -> dict[str, Any]:
    out: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking:
        out["thinking"] = message.thinking
    if message.images:
        out["images"] = [_image(each) for each in message.images]
    if message.tool_calls:
        out["tool_calls"] = [
            {"id": each.id, "function": {"name": each.name, "arguments": dict(each.arguments)}}
            for each in message.tool_calls
        ]
    if message.tool_name:
        out["tool_name"] = message.tool_name
    if message.tool_call_id:
        out["tool_call_id"] = message.tool_call_id
    if message.name:
        out["name"] = message.name
    return out


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _image(image: Image) -> str:
    return base64.b64encode(image.data).decode("ascii")


# --- Responses -------------------------------------------------------------------------------------------------------


class _TextMessage(msgspec.Struct):
    content: str
    thinking: str = ""
    tool_calls: None = None


class _TextLine(msgspec.Struct):
    """A line of a chat with text only. Fields of type None must be absent."""

    message: _TextMessage
    done: bool
    logprobs: None = None
    error: None = None


_text_line = msgspec.json.Decoder(_TextLine).decode


def chat_text(line: bytes) -> tuple[str, str] | None:
    """Return the text and the thinking of a line, or None if it holds anything else."""
    try:
        found = _text_line(line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return None if found.done else (found.message.content, found.message.thinking)


def chat_chunk(part: Mapping[str, object]) -> Chunk:
    """Read a line of a chat."""
    message = _content(part, "message") or {}
    text, thinking = read_text(message.get("content")), read_text(message.get("thinking"))
    return _chunk(part, text, thinking, read_tool_calls(message.get("tool_calls")))


def generate_chunk(part: Mapping[str, object]) -> Chunk:
    """Read a line of a generate."""
    return _chunk(part, read_text(_content(part, "response")), read_text(part.get("thinking")))


def _content(part: Mapping[str, object], name: str) -> Any:
    """Return the content of a line. It may be missing only beside `done`, which lines of other services lack."""
    return part.get(name) if "done" in part else part[name]


def _chunk(part: Mapping[str, Any], text: str, thinking: str, calls: tuple[ToolCall, ...] = ()) -> Chunk:
    logprobs = read_logprobs(part.get("logprobs"))
    if not part.get("done"):
        return Chunk(text=text, thinking=thinking, tool_calls=calls, logprobs=logprobs)
    return Chunk(
        text=text,
        thinking=thinking,
        tool_calls=calls,
        logprobs=logprobs,
        finish_reason=part.get("done_reason") or "",  # Servers before May 2024 gave none.
        usage=Usage(input_tokens=part.get("prompt_eval_count"), output_tokens=part.get("eval_count")),
        timings=Timings(
            total=_seconds(part.get("total_duration")),
            load=_seconds(part.get("load_duration")),
            prompt=_seconds(part.get("prompt_eval_duration")),
            generation=_seconds(part.get("eval_duration")),
        ),
        model=read_word(part.get("model")),
        raw=part,
    )


_seconds = partial(read_seconds, per_second=1e9)


def prompt_tokens(last: Chunk) -> int:
    """Return the tokens of the prompt, from the last chunk.

    Raises:
        CapabilityUnsupported: the server did not count them.
    """
    count = read_count(last.usage.input_tokens) if last.usage else None
    if count is None:
        raise CapabilityUnsupported("This server does not count a prompt that is in its cache.", hint="Update Ollama.")
    return count


def embeddings(response: Mapping[str, Any]) -> Embeddings:
    """Read the vectors of a response."""
    return Embeddings(
        vectors=response["embeddings"],  # The core checks them.
        model=read_word(response.get("model")) or "",
        usage=Usage(input_tokens=response.get("prompt_eval_count")),
        timings=Timings(total=_seconds(response.get("total_duration")), load=_seconds(response.get("load_duration"))),
    )


def progress(part: Mapping[str, object]) -> PullProgress:
    """Read a step of a pull."""
    total, completed = read_count(part.get("total")), read_count(part.get("completed"))
    # The server leaves a zero out: a step with a total has begun.
    begun = 0 if completed is None and total is not None else completed
    return PullProgress(
        status=read_text(part.get("status")), digest=read_word(part.get("digest")), total=total, completed=begun
    )


def loaded_models(response: Mapping[str, object]) -> tuple[LoadedModel, ...]:
    """Read the models in memory."""
    return read_records(response["models"], _loaded_model)


def _loaded_model(found: Mapping[str, object]) -> LoadedModel:
    expires = read_moment(found.get("expires_at"))
    return LoadedModel(
        name=_name(found),
        digest=read_word(found.get("digest")),
        size=read_count(found.get("size")),
        accelerator_size=read_count(found.get("size_vram")),
        expires_at=None if expires is None or expires.year >= NEVER_YEAR else expires,
        context_window=read_count(found.get("context_length")),
        raw=found,
    )


def _name(found: Mapping[str, object]) -> str:
    name = read_word(found.get("model")) or read_word(found.get("name"))  # Old servers have only one.
    if not name:
        raise ValueError("a model must have a name")
    return name


def listed_models(response: Mapping[str, object]) -> tuple[ModelInfo, ...]:
    """Read a list of models."""
    return read_records(response["models"], _listed_model)


def _listed_model(found: Mapping[str, object]) -> ModelInfo:
    details = read_object(found.get("details"))
    return ModelInfo(
        name=_name(found),
        digest=read_word(found.get("digest")),
        size=read_count(found.get("size")),
        modified_at=read_moment(found.get("modified_at")),
        family=read_word(details.get("family")),
        parameters=read_word(details.get("parameter_size")),
        quantization=read_word(details.get("quantization_level")),
        context_window=read_count(details.get("context_length")),  # From Ollama 0.3x on.
        features=_features(found.get("capabilities")),
        parent=read_word(details.get("parent_model")),
        raw=found,
    )


def model_info(name: str, response: Mapping[str, object]) -> ModelInfo:
    """Read the response of `/api/show` to a verbose request."""
    details = read_object(response["details"])  # Every version sends them: without, this is another service.
    metadata = read_object(response.get("model_info"))
    architecture = read_word(metadata.get("general.architecture"))
    modelfile = read_word(response.get("modelfile")) or ""
    return ModelInfo(
        name=canonical_name(name),
        size=_weights_size(response.get("tensors")),
        modified_at=read_moment(response.get("modified_at")),
        family=read_word(details.get("family")),
        architecture=architecture,
        parameters=read_word(details.get("parameter_size")),
        quantization=read_word(details.get("quantization_level")),
        context_window=read_count(metadata.get(f"{architecture}.context_length")),
        features=_features(response.get("capabilities")),
        parent=read_word(details.get("parent_model")),
        adapters=blob_digests(modelfile, "ADAPTER"),
        template=read_word(response.get("template")),
        system=read_word(response.get("system")),
        licence=read_word(response.get("license")),
        path=_weights_file(modelfile),
        metadata=metadata,
        tensors=_tensors(response.get("tensors")),
        raw={key: value for key, value in response.items() if key not in ("model_info", "tensors")},
    )


def _features(capabilities: object) -> frozenset[str] | None:
    if not isinstance(capabilities, list):
        return None
    words = filter(None, map(read_word, capabilities))
    return frozenset(feature for each in words for feature in FEATURES.get(each, (each,)))


def _weights_size(found: object) -> int | None:
    """Return the bytes of the tensors, which are nearly all of a file; None if one has an unknown type or shape."""
    if not isinstance(found, list) or not found:
        return None
    # Ollama's shapes of safetensors models lack the scales; the size of a block includes them.
    sizes = read_entries(found, lambda each: bytes_of(str(each["type"]).upper(), math.prod(_shape(each))))
    return sum(sizes) if len(sizes) == len(found) else None


def _tensors(found: object) -> dict[str, tuple[int, ...]] | None:
    return dict(read_entries(found, lambda each: (each["name"], _shape(each)))) if isinstance(found, list) else None


def _shape(tensor: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(each) for each in tensor["shape"])


def _modelfile_values(modelfile: str, word: str) -> Iterator[str]:
    """Return what follows a word in the head of a Modelfile.

    The head ends at the template: after that, a line may begin with any text of the model's author.
    """
    for line in modelfile.splitlines():
        first, _, rest = line.partition(" ")
        if first in HEADER_ENDS:
            return
        if first == word and rest.strip():
            yield rest.strip()


def blob_digests(modelfile: str, word: str) -> tuple[str, ...]:
    """Return the digests of the blobs that a Modelfile names after `FROM` or `ADAPTER`."""
    return tuple(
        f"sha256:{path.rpartition('sha256-')[2]}" for path in _modelfile_values(modelfile, word) if "sha256-" in path
    )


def parameters(text: str) -> dict[str, Any]:
    """Convert the `name value` lines of `/api/show` to the form of `/api/create`."""
    found: dict[str, list[Any]] = {}
    for line in text.splitlines():
        name, _, value = line.strip().partition(" ")
        if value.strip():
            found.setdefault(name, []).append(_value(value.strip()))
    return {name: each if name == "stop" or len(each) > 1 else each[0] for name, each in found.items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.strip('"')


def _weights_file(modelfile: str) -> Path | None:
    """Return the file of the weights, if it is on this machine and readable."""
    for line in _modelfile_values(modelfile, "FROM"):
        path = Path(line)
        if not path.is_absolute():
            continue
        try:
            with path.open("rb"):
                return path
        except OSError:
            continue
    return None


def load_body(model: str, keep_alive_: float | None, context_window: int | None) -> dict[str, Any]:
    """Return the JSON that loads a model, or unloads it with a `keep_alive` of 0: a request without a prompt."""
    body: dict[str, Any] = {"model": model, "stream": False}
    if keep_alive_ is not None:
        body["keep_alive"] = keep_alive(keep_alive_)
    if context_window is not None:
        body["options"] = {"num_ctx": context_window}
    return body
