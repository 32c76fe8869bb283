"""Graftage's types to Ollama's JSON, and its answers back.

The bodies of chat and generate are built here, because the request types of the official package drop what they do not
know: nested tool schemas, the ids of tool calls, `verbose`. Answers are read with its response types.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from graftage.http import read_tool_call
from graftage.types import (
    ChatRequest,
    Chunk,
    Embeddings,
    EmbedRequest,
    FinishReason,
    GenerateRequest,
    Image,
    LoadedModel,
    Logprob,
    Message,
    ModelInfo,
    PullProgress,
    Timings,
    Tool,
    ToolCall,
    Usage,
)
from graftage_ollama._package import ollama

__all__ = [
    "OPTIONS",
    "ChatReader",
    "canonical",
    "chat_body",
    "digests",
    "embed_body",
    "embeddings",
    "generate_body",
    "generate_chunk",
    "keep_alive",
    "listed_models",
    "loaded_models",
    "model_info",
    "parameters",
    "progress",
    "server_options",
    "without_lone_surrogates",
]

SERVER_OPTIONS: Final = frozenset(
    {
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
        "stop",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "use_mmap",
    }
)
REQUEST_OPTIONS: Final = frozenset({"logprobs", "top_logprobs"})
"""Options of ours that stand beside `options` in Ollama's request."""
OPTIONS: Final = SERVER_OPTIONS | REQUEST_OPTIONS

FINISH: Final[Mapping[str, FinishReason]] = {"stop": "stop", "length": "length", "load": "load", "unload": "unload"}
FEATURES: Final = {
    "completion": ("chat", "generate", "structured_output", "logprobs"),
    "tools": ("tools",),
    "vision": ("images",),
    "thinking": ("thinking",),
    "insert": ("suffix",),
    "embedding": ("embed",),
}
BLOCKS: Final[Mapping[str, tuple[int, int]]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ1_S": (256, 50),
    "IQ1_M": (256, 56),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98),
    "IQ3_S": (256, 110),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
    "Q1_0": (128, 18),
    "MXFP4": (32, 17),
    "NVFP4": (64, 36),
    "I8": (1, 1),
    "I16": (1, 2),
    "I32": (1, 4),
    "I64": (1, 8),
    "F64": (1, 8),
    "INT4": (32, 20),
    "INT8": (64, 68),
    "MXFP8": (32, 33),
    "F8_E4M3": (1, 1),
    "F8_E5M2": (1, 1),
    "U8": (1, 1),
    "U32": (1, 4),
}
"""Numbers in a block of each type, and its bytes: the table in ggml's `ggml.c`, also `gguf.GGML_QUANT_SIZES`.

Below those, the types of safetensors models: Ollama's `x/server/show.go` tells the shapes without the scales, and MLX
keeps a scale and a bias of 16 bits for 32 numbers of `INT4` and for 64 of `INT8`, a scale of 8 bits for 32 of `MXFP8`.
"""
HEAD_ENDS: Final = frozenset({"TEMPLATE", "SYSTEM", "RENDERER", "PARSER", "PARAMETER", "LICENSE", "MESSAGE"})
NEVER_YEAR = 2300
"""Ollama writes "for ever" as some date in that century."""
CHARACTERS_PER_TOKEN = 12
"""More characters than this for each token counted: no tokenizer packs prose or code so tightly."""
SLACK_CHARACTERS = 400


def canonical(name: str) -> str:
    """A model's full name for comparing: `llama3.2` is `llama3.2:latest`, in any case, with or without the registry."""
    name = name.strip().removeprefix("registry.ollama.ai/").removeprefix("library/").lower()
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def keep_alive(seconds: float | None) -> float | int | None:
    """Seconds as Ollama takes them: negative is for ever."""
    if seconds is None:
        return None
    if seconds == math.inf:
        return -1
    return int(seconds) if seconds.is_integer() else seconds


def server_options(
    options: Mapping[str, Any], context_window: int | None = None, max_tokens: int | None = None
) -> dict[str, Any]:
    """The `options` of a request."""
    out = {name: value for name, value in options.items() if name in SERVER_OPTIONS}
    if isinstance(out.get("stop"), str):
        out["stop"] = [out["stop"]]
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
    """The JSON of a chat request."""
    body = _shared_body(request)
    body["messages"] = [_message(each) for each in request.messages]
    if request.tools:
        body["tools"] = [_tool(each) for each in request.tools]
    return body


def generate_body(request: GenerateRequest) -> dict[str, Any]:
    """The JSON of a generate request."""
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
    """The JSON of an embed request."""
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
    return out


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _image(image: Image) -> str:
    return base64.b64encode(image.data).decode("ascii")


# --- Answers ---------------------------------------------------------------------------------------------------------


class ChatReader:
    """Reads the lines of one chat."""

    __slots__ = ("_calls", "_request")

    def __init__(self, request: ChatRequest) -> None:
        self._request = request
        self._calls = 0

    def chunk(self, line: bytes) -> Chunk:
        """A line as a chunk."""
        calls: tuple[ToolCall, ...] = ()
        if b'"tool_calls"' in line:
            calls, part = self._tool_calls(line)
        else:
            part = ollama.ChatResponse.model_validate_json(line)
        message = part.message
        text = message.content or ""
        thinking = message.thinking or ""
        if part.done:
            last = _last(part, line, self._request, text=text, thinking=thinking, tool_calls=calls)
            # Ollama says `stop` after tool calls too; its own word stays in `raw`.
            return replace(last, finish_reason="tool_calls") if self._calls and last.finish_reason == "stop" else last
        if part.logprobs is None and not calls:
            return Chunk(text=text, thinking=thinking)
        return Chunk(text=text, thinking=thinking, tool_calls=calls, logprobs=_logprobs(part))

    def _tool_calls(self, line: bytes) -> tuple[tuple[ToolCall, ...], ollama.ChatResponse]:
        """The tool calls of a line, and the rest of it.

        The official types drop their ids, which older servers do not give, and take only objects for their arguments.
        """
        found = json.loads(without_lone_surrogates(line))
        given = (found.get("message") or {}).pop("tool_calls", None) or ()
        part = ollama.ChatResponse.model_validate(found)
        calls = tuple(
            read_tool_call(
                each["function"].get("name"), each["function"].get("arguments"), str(each.get("id") or f"call_{place}")
            )
            for place, each in enumerate(given, self._calls)
        )
        self._calls += len(calls)
        return calls, part


def generate_chunk(line: bytes, request: GenerateRequest) -> Chunk:
    """A line of a generate."""
    part = ollama.GenerateResponse.model_validate_json(line)
    text = part.response or ""
    if not part.done:
        return Chunk(text=text, thinking=part.thinking or "", logprobs=_logprobs(part))
    return _last(part, line, request, text=text, thinking=part.thinking or "")


def _last(
    part: ollama.ChatResponse | ollama.GenerateResponse,
    line: bytes,
    request: ChatRequest | GenerateRequest,
    **content: Any,
) -> Chunk:
    usage = Usage(input_tokens=part.prompt_eval_count, output_tokens=part.eval_count)
    return Chunk(
        **content,
        logprobs=_logprobs(part),
        finish_reason=FINISH.get(part.done_reason or "", "other"),
        usage=usage,
        timings=Timings(
            total=_seconds(part.total_duration),
            load=_seconds(part.load_duration),
            prompt=_seconds(part.prompt_eval_duration),
            generation=_seconds(part.eval_duration),
        ),
        model=part.model,
        warnings=_cut_warning(request, usage),
        raw=json.loads(line),
    )


def _cut_warning(request: ChatRequest | GenerateRequest, usage: Usage) -> tuple[str, ...]:
    """A warning where the prompt was probably cut: Ollama drops what does not fit and says nothing."""
    read = usage.input_tokens
    if not read:
        return ()
    window = request.context_window
    if isinstance(request, ChatRequest):
        characters = sum(len(each.content) for each in request.messages)
    else:
        characters = len(request.prompt)
    if (window and read >= window) or characters > read * CHARACTERS_PER_TOKEN + SLACK_CHARACTERS:
        size = f" of {window} tokens" if window else ""
        warning = (
            f"The prompt was probably cut to fit the context window{size}: the server read {read} tokens of "
            f"{characters} characters. Raise `context_window`, or send less."
        )
        return (warning,)
    return ()


_ESCAPE: Final = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u([dD][89a-fA-F][0-9a-fA-F]{2})|.)"
)
"""An escape in JSON; the group is half of a pair whose other half is missing."""


def without_lone_surrogates(line: bytes) -> bytes:
    """JSON with the replacement character for each half of a pair that stands alone: no text can hold one."""
    return _ESCAPE.sub(lambda found: b"\\ufffd" if found[1] else found[0], line)


def _logprobs(part: ollama.ChatResponse | ollama.GenerateResponse) -> tuple[Logprob, ...]:
    return tuple(
        Logprob(
            token=each.token,
            logprob=each.logprob,
            top=tuple(Logprob(token=top.token, logprob=top.logprob) for top in each.top_logprobs or ()),
        )
        for each in part.logprobs or ()
    )


def _seconds(nanoseconds: int | None) -> float | None:
    return None if nanoseconds is None else nanoseconds / 1e9


def embeddings(given: Mapping[str, Any], dimensions: int | None) -> Embeddings:
    """The vectors of an answer."""
    answer = ollama.EmbedResponse.model_validate(given)
    length = len(answer.embeddings[0]) if answer.embeddings else dimensions
    ignored = f"`dimensions` had no effect: the vectors have {length} numbers. Another model or server may heed it."
    return Embeddings(
        vectors=given["embeddings"],  # As they came: the official type makes numbers of texts.
        model=answer.model or "",
        usage=Usage(input_tokens=answer.prompt_eval_count),
        timings=Timings(total=_seconds(answer.total_duration), load=_seconds(answer.load_duration)),
        warnings=(ignored,) if dimensions is not None and length != dimensions else (),
    )


def progress(part: ollama.ProgressResponse) -> PullProgress:
    """A step of a pull."""
    # The server leaves a nought out: a step with a total has begun.
    completed = 0 if part.completed is None and part.total is not None else part.completed
    return PullProgress(status=part.status or "", digest=part.digest, total=part.total, completed=completed)


def loaded_models(answer: Mapping[str, Any]) -> tuple[LoadedModel, ...]:
    """The models in memory."""
    return tuple(_loaded_model(found) for found in ollama.ProcessResponse.model_validate(answer).models)


def _loaded_model(found: ollama.ProcessResponse.Model) -> LoadedModel:
    expires = found.expires_at
    return LoadedModel(
        name=found.model or found.name or "",
        digest=found.digest,
        size=found.size,
        accelerator_size=found.size_vram,
        expires_at=None if expires is None or expires.year >= NEVER_YEAR else expires,
        context_window=found.context_length,
        raw=found.model_dump(mode="json"),
    )


def listed_models(answer: Mapping[str, Any]) -> tuple[ModelInfo, ...]:
    """The models of a list."""
    return tuple(_listed_model(found) for found in answer["models"] or ())


def _listed_model(found: Mapping[str, Any]) -> ModelInfo:
    model = ollama.ListResponse.Model.model_validate(found)
    details = found.get("details") or {}
    return ModelInfo(
        name=model.model or str(found.get("name") or ""),  # The oldest servers have only the one, proxies the other.
        digest=model.digest,
        size=model.size,
        modified_at=model.modified_at,
        family=details.get("family") or None,
        parameters=details.get("parameter_size") or None,
        quantization=details.get("quantization_level") or None,
        # From Ollama 0.3x on; the official types drop them.
        context_window=details.get("context_length"),
        features=_features(found.get("capabilities")),
        parent=details.get("parent_model") or None,
        raw=found,
    )


def model_info(name: str, answer: Mapping[str, Any]) -> ModelInfo:
    """What `/api/show` says of a model when it is asked verbosely."""
    details = answer["details"] or {}  # Each version of the server sends them: without, it is another service.
    metadata = answer.get("model_info") or {}
    architecture = metadata.get("general.architecture")
    modelfile = answer.get("modelfile") or ""
    return ModelInfo(
        name=canonical(name),
        size=_weights(answer.get("tensors")),
        modified_at=_time(answer.get("modified_at")),
        family=details.get("family") or None,
        architecture=architecture,
        parameters=details.get("parameter_size") or None,
        quantization=details.get("quantization_level") or None,
        context_window=metadata.get(f"{architecture}.context_length"),
        features=_features(answer.get("capabilities")),
        parent=details.get("parent_model") or None,
        adapters=digests(modelfile, "ADAPTER"),
        template=answer.get("template") or None,
        system=answer.get("system") or None,
        licence=answer.get("license") or None,
        path=_file(modelfile),
        metadata=metadata,
        tensors=_tensors(answer.get("tensors")),
        raw={key: value for key, value in answer.items() if key not in ("model_info", "tensors")},
    )


def _features(capabilities: Any) -> frozenset[str] | None:
    if not isinstance(capabilities, list):
        return None
    return frozenset(feature for each in capabilities for feature in FEATURES.get(str(each), (str(each),)))


def _weights(found: Any) -> int | None:
    """Bytes of the tensors, which are nearly all of a file; None where a type is not known."""
    if not isinstance(found, list) or not found:
        return None
    size = 0
    for each in found:
        block = BLOCKS.get(str(each.get("type")).upper())
        if block is None:
            return None
        size += math.prod(each.get("shape") or ()) // block[0] * block[1]
    return size


def _tensors(found: Any) -> dict[str, tuple[int, ...]] | None:
    if not isinstance(found, list):
        return None
    return {str(each.get("name")): tuple(each.get("shape") or ()) for each in found}


def _lines(modelfile: str, word: str) -> Iterator[str]:
    """What stands after a word in the head of a Modelfile.

    The head ends at the template: from there on a model's author may have put anything at the beginning of a line.
    """
    for line in modelfile.splitlines():
        first, _, rest = line.partition(" ")
        if first in HEAD_ENDS:
            return
        if first == word and rest.strip():
            yield rest.strip()


def digests(modelfile: str, word: str) -> tuple[str, ...]:
    """The digests of the blobs that a Modelfile names after a word: `FROM` or `ADAPTER`."""
    return tuple(f"sha256:{path.rpartition('sha256-')[2]}" for path in _lines(modelfile, word) if "sha256-" in path)


def parameters(text: str) -> dict[str, Any]:
    """What `/api/show` writes as `name value` lines, in the form that `/api/create` takes."""
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


def _file(modelfile: str) -> Path | None:
    """The file of the weights: only where the server is this machine, and this user may read it."""
    for line in _lines(modelfile, "FROM"):
        path = Path(line)
        if not path.is_absolute():
            continue
        try:
            with path.open("rb"):
                return path
        except OSError:
            continue
    return None


def _time(text: Any) -> datetime | None:
    if not isinstance(text, str):
        return None
    try:
        # Python 3.10 reads neither nanoseconds nor a `Z`.
        return datetime.fromisoformat(text.replace("Z", "+00:00") if len(text) < 27 else _micro(text))  # noqa: PLR2004
    except ValueError:
        return None


def _micro(text: str) -> str:
    head, _, rest = text.partition(".")
    digits = "".join(each for each in rest if each.isdigit())[:6]
    zone = rest.lstrip("0123456789")
    return f"{head}.{digits:0<6}{'+00:00' if zone in ('Z', '') else zone}"
