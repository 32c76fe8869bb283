"""Graftage's types to Ollama's JSON, and its answers back.

Neither uses the types of the official package: they drop what they do not know (nested tool schemas, the ids of tool
calls, `verbose`), and importing it costs more than a chat.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from graftage.calls import ChatRequest, EmbedRequest, GenerateRequest
from graftage.exceptions import CapabilityUnsupported, ContextOverflow
from graftage.gguf import BLOCKS, bytes_of
from graftage.http import read_tool_call
from graftage.types import (
    Chunk,
    Embeddings,
    FinishReason,
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
    canonical_name,
)

__all__ = [
    "OPTIONS",
    "UNCUT",
    "ChatReader",
    "chat_body",
    "chat_words",
    "counted",
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
    "residency",
    "server_options",
]

REQUEST_OPTIONS: Final = frozenset({"logprobs", "shift", "top_logprobs", "truncate"})
"""Options of ours that stand beside `options` in Ollama's request. Before 0.12.6 a server takes no notice of `shift`
and `truncate`."""
UNCUT: Final = {"shift": False, "truncate": False}
"""So a prompt that does not fit is refused, and not cut."""
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

FINISH: Final[Mapping[str, FinishReason]] = {"stop": "stop", "length": "length", "load": "load", "unload": "unload"}
FEATURES: Final = {
    "completion": ("chat", "generate", "structured_output", "logprobs"),
    "tools": ("tools",),
    "vision": ("images",),
    "thinking": ("thinking",),
    "insert": ("suffix",),
    "embedding": ("embed",),
}
HEAD_ENDS: Final = frozenset({"TEMPLATE", "SYSTEM", "RENDERER", "PARSER", "PARAMETER", "LICENSE", "MESSAGE"})
NEVER_YEAR = 2300
"""Ollama writes "for ever" as some date in that century."""
CHARACTERS_PER_TOKEN = 12
"""More characters than this for each token counted: no tokenizer packs prose or code so tightly."""
SLACK_CHARACTERS = 400


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
    if message.name:
        out["name"] = message.name
    return out


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _image(image: Image) -> str:
    return base64.b64encode(image.data).decode("ascii")


# --- Answers ---------------------------------------------------------------------------------------------------------


class _Said(msgspec.Struct):
    content: str
    thinking: str = ""
    tool_calls: None = None


class _ChatLine(msgspec.Struct):
    """A line of a chat that holds nothing but words: what is declared None must not be there."""

    message: _Said
    done: bool
    logprobs: None = None
    error: None = None


_chat_line = msgspec.json.Decoder(_ChatLine).decode


def chat_words(line: bytes) -> tuple[str, str] | None:
    """The text and the thinking of a line that holds nothing else."""
    try:
        found = _chat_line(line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return None if found.done else (found.message.content, found.message.thinking)


class ChatReader:
    """Reads the lines of one chat."""

    __slots__ = ("_calls", "_request")

    def __init__(self, request: ChatRequest) -> None:
        self._request = request
        self._calls = 0

    def chunk(self, part: Mapping[str, Any]) -> Chunk:
        """A line as a chunk."""
        message = part["message"]
        text, thinking = message.get("content") or "", message.get("thinking") or ""
        if not (isinstance(text, str) and isinstance(thinking, str)):
            raise TypeError("a text is wanted")
        found = message.get("tool_calls")
        calls = self._tool_calls(found) if found else ()
        if part.get("done"):
            last = _last(part, self._request, text=text, thinking=thinking, tool_calls=calls)
            # Ollama says `stop` after tool calls too; its own word stays in `raw`.
            return replace(last, finish_reason="tool_calls") if self._calls and last.finish_reason == "stop" else last
        if not calls and part.get("logprobs") is None:
            return Chunk(text=text, thinking=thinking)
        return Chunk(text=text, thinking=thinking, tool_calls=calls, logprobs=_logprobs(part))

    def _tool_calls(self, found: Sequence[Mapping[str, Any]]) -> tuple[ToolCall, ...]:
        """The tool calls of a line; older servers give them no ids."""
        calls = tuple(
            read_tool_call(
                each["function"].get("name"), each["function"].get("arguments"), str(each.get("id") or f"call_{place}")
            )
            for place, each in enumerate(found, self._calls)
        )
        self._calls += len(calls)
        return calls


def generate_chunk(request: GenerateRequest, part: Mapping[str, Any]) -> Chunk:
    """A line of a generate."""
    text, thinking = _text(part["response"]), _text(part.get("thinking"))
    if not part.get("done"):
        return Chunk(text=text, thinking=thinking, logprobs=_logprobs(part))
    return _last(part, request, text=text, thinking=thinking)


def _last(part: Mapping[str, Any], request: ChatRequest | GenerateRequest, **content: Any) -> Chunk:
    usage = Usage(input_tokens=_count(part.get("prompt_eval_count")), output_tokens=_count(part.get("eval_count")))
    return Chunk(
        **content,
        logprobs=_logprobs(part),
        finish_reason=FINISH.get(str(part.get("done_reason")), "other"),
        usage=usage,
        timings=Timings(
            total=_seconds(part.get("total_duration")),
            load=_seconds(part.get("load_duration")),
            prompt=_seconds(part.get("prompt_eval_duration")),
            generation=_seconds(part.get("eval_duration")),
        ),
        model=_text(part.get("model")) or None,
        warnings=_cut_warning(request, usage),
        raw=part,
    )


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError("a text is wanted")
    return value


def _count(value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise TypeError("a whole number is wanted")
    return value


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


def _logprobs(part: Mapping[str, Any]) -> tuple[Logprob, ...]:
    return tuple(
        Logprob(
            token=each["token"],
            logprob=each["logprob"],
            top=tuple(Logprob(token=top["token"], logprob=top["logprob"]) for top in each.get("top_logprobs") or ()),
        )
        for each in part.get("logprobs") or ()
    )


def _seconds(nanoseconds: Any) -> float | None:
    found = _count(nanoseconds)
    return None if found is None else found / 1e9


def counted(last: Chunk) -> int:
    """The tokens of the prompt, from the answer to it.

    Raises:
        ContextOverflow: the prompt was cut before it was counted.
        CapabilityUnsupported: the server has not counted.
    """
    if last.warnings:
        raise ContextOverflow(last.warnings[0])  # It says the way out.
    if last.usage is None or last.usage.input_tokens is None:
        raise CapabilityUnsupported("This server does not count a prompt that it has in its cache.", hint="Update it.")
    return last.usage.input_tokens


def embeddings(answer: Mapping[str, Any], dimensions: int | None) -> Embeddings:
    """The vectors of an answer."""
    vectors = answer["embeddings"]  # As they came: the core checks them.
    length = len(vectors[0]) if vectors else dimensions
    ignored = f"`dimensions` had no effect: the vectors have {length} numbers. Another model or server may heed it."
    return Embeddings(
        vectors=vectors,
        model=_text(answer.get("model")),
        usage=Usage(input_tokens=_count(answer.get("prompt_eval_count"))),
        timings=Timings(total=_seconds(answer.get("total_duration")), load=_seconds(answer.get("load_duration"))),
        warnings=(ignored,) if dimensions is not None and length != dimensions else (),
    )


def progress(part: Mapping[str, Any]) -> PullProgress:
    """A step of a pull."""
    total, completed = _count(part.get("total")), _count(part.get("completed"))
    # The server leaves a nought out: a step with a total has begun.
    begun = 0 if completed is None and total is not None else completed
    return PullProgress(
        status=_text(part.get("status")), digest=_text(part.get("digest")) or None, total=total, completed=begun
    )


def loaded_models(answer: Mapping[str, Any]) -> tuple[LoadedModel, ...]:
    """The models in memory."""
    return tuple(_loaded_model(found) for found in answer["models"] or ())


def _loaded_model(found: Mapping[str, Any]) -> LoadedModel:
    expires = _time(found.get("expires_at"))
    return LoadedModel(
        name=_name(found),
        digest=_text(found.get("digest")) or None,
        size=_count(found.get("size")),
        accelerator_size=_count(found.get("size_vram")),
        expires_at=None if expires is None or expires.year >= NEVER_YEAR else expires,
        context_window=_count(found.get("context_length")),
        raw=found,
    )


def _name(found: Mapping[str, Any]) -> str:
    name = _text(found.get("model")) or _text(found.get("name"))  # The oldest servers have only one of them.
    if not name:
        raise ValueError("a model has a name")
    return name


def listed_models(answer: Mapping[str, Any]) -> tuple[ModelInfo, ...]:
    """The models of a list."""
    return tuple(_listed_model(found) for found in answer["models"] or ())


def _listed_model(found: Mapping[str, Any]) -> ModelInfo:
    details = found.get("details") or {}
    return ModelInfo(
        name=_name(found),
        digest=_text(found.get("digest")) or None,
        size=_count(found.get("size")),
        modified_at=_time(found.get("modified_at")),
        family=details.get("family") or None,
        parameters=details.get("parameter_size") or None,
        quantization=details.get("quantization_level") or None,
        context_window=details.get("context_length"),  # From Ollama 0.3x on.
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
        name=canonical_name(name),
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
        # Of a safetensors model Ollama tells the shapes without the scales, and the blocks count them in.
        kind = str(each.get("type")).upper()
        if kind not in BLOCKS:
            return None
        size += bytes_of(kind, math.prod(each.get("shape") or ()))
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
    try:
        return datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return None


def residency(model: str, keep_alive_: float | None, context_window: int | None) -> dict[str, Any]:
    """An empty prompt loads a model, or with a `keep_alive` of 0 unloads it."""
    body: dict[str, Any] = {"model": model, "stream": False}
    if keep_alive_ is not None:
        body["keep_alive"] = keep_alive(keep_alive_)
    if context_window is not None:
        body["options"] = {"num_ctx": context_window}
    return body
