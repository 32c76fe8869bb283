"""Graftage's types to the JSON of llama.cpp's server, and its answers back.

The bodies name an adapter by its digest, under `adapter`; the transport puts the engine's own numbers in its place, for
they change with each start.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

from graftage.exceptions import (
    AuthenticationFailed,
    CapabilityUnsupported,
    ContextOverflow,
    InferenceFailed,
    Overloaded,
    ProtocolError,
    ProviderError,
    RequestRejected,
    StreamInterrupted,
)
from graftage.http import read_tool_call
from graftage.types import (
    ChatRequest,
    Chunk,
    FinishReason,
    GenerateRequest,
    Logprob,
    Message,
    ModelInfo,
    Timings,
    Tool,
    Usage,
)
from graftage_llamacpp._gguf import FILE_TYPES, Header

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from graftage_llamacpp._store import Stored

__all__ = [
    "FEATURES",
    "OPTIONS",
    "Answer",
    "chat_body",
    "features",
    "generate_body",
    "model_info",
    "read_line",
    "refusal",
    "scales",
    "vocabulary",
]

OPTIONS: Final = frozenset(
    {
        "frequency_penalty",
        "logprobs",
        "min_p",
        "mirostat",
        "mirostat_eta",
        "mirostat_tau",
        "presence_penalty",
        "repeat_last_n",
        "repeat_penalty",
        "seed",
        "stop",
        "temperature",
        "top_k",
        "top_logprobs",
        "top_p",
        "typical_p",
    }
)
FEATURES: Final = frozenset(
    {
        "chat",
        "generate",
        "embed",
        "tools",
        "structured_output",
        "thinking",
        "logprobs",
        "list_models",
        "show_model",
        "loaded_models",
        "pull_model",
        "load_model",
        "unload_model",
        "load_adapter",
        "unload_adapter",
    }
)
SYSTEM_PROMPT: Final = "You are a helpful assistant."
"""Sent where the caller gives none: with what small models have built in, they answer nonsense."""
NO_SYSTEM_ROLE: Final = re.compile(r"system role not supported", re.IGNORECASE)
FINISH: Final[Mapping[str, FinishReason]] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "content_filter": "content_filter",
}
ANY_OBJECT: Final = {"type": "object"}
"""The engine's own `json_object` does not hold the model to JSON."""
DONE: Final = b"[DONE]"
MAX_WORDS: Final = 500
STATUS_REJECTED: Final = 400
STATUS_UNAUTHORISED: Final = 401
STATUS_UNSUPPORTED: Final = 501
STATUS_BUSY: Final = 503
STATUS_FAULT: Final = 500
EMBEDDERS: Final = frozenset(
    {"bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "modern-bert"}
) | {
    "neo-bert",
    "eurobert",
    "gemma-embedding",
    "gemma-embedding2",
    "llama-embed",
    "t5encoder",
}
"""Architectures that give vectors and nothing else."""


# --- Models ----------------------------------------------------------------------------------------------------------


def features(header: Header) -> frozenset[str]:
    """What a model can do, as its architecture and its chat template show."""
    if header.architecture in EMBEDDERS:
        return frozenset({"embed"})
    found = {"chat", "generate", "embed", "structured_output", "logprobs"}
    if re.search(r"\btools\b", header.template):
        found.add("tools")
    if re.search(r"enable_thinking|reasoning_content|reasoning_effort|<think>", header.template):
        found.add("thinking")
    return frozenset(found)


def model_info(stored: Stored, *, full: bool) -> ModelInfo:
    """What the file says of its model; the arrays, such as the vocabulary, and the tensors where it is `full`."""
    header = stored.header
    metadata = dict(header.metadata)
    if not full:
        metadata = {key: value for key, value in metadata.items() if not isinstance(value, list)}
    file_type = header.metadata.get("general.file_type")
    return ModelInfo(
        name=stored.name,
        digest=stored.digest,
        size=header.size,
        modified_at=stored.modified_at,
        family=header.architecture,
        architecture=header.architecture,
        parameters=_count(header),
        quantization=FILE_TYPES.get(file_type) if isinstance(file_type, int) else None,
        context_window=header.figure("context_length"),
        features=features(header),
        template=header.template or None,
        licence=stored.licence,
        path=stored.path,
        metadata=metadata,
        tensors={name: each.shape for name, each in header.tensors.items()} if full else None,
    )


def _count(header: Header) -> str:
    """The number of parameters, as Ollama writes it."""
    total = 0
    for tensor in header.tensors.values():
        entries = 1
        for size in tensor.shape:
            entries *= size
        total += entries
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if total >= unit:
            return f"{total / unit:.2f}{name}" if unit < 1e9 else f"{total / unit:.1f}{name}"  # noqa: PLR2004
    return str(total)


def vocabulary(header: Header) -> int:
    """How many tokens the model knows."""
    table = header.tensors.get("token_embd.weight")
    return table.shape[-1] if table else header.figure("vocab_size") or 0


def cache_bytes(header: Header, window: int) -> int:
    """Bytes of the engine's cache of keys and values for a window."""
    heads = header.figure("attention.head_count") or 1
    shared = header.figure("attention.head_count_kv") or heads
    size = (header.figure("embedding_length") or 0) // heads
    key = header.figure("attention.key_length") or size
    value = header.figure("attention.value_length") or size
    return (header.figure("block_count") or 0) * shared * (key + value) * 2 * window


# --- Requests --------------------------------------------------------------------------------------------------------


def chat_body(request: ChatRequest, header: Header) -> dict[str, Any]:
    """The JSON of a chat.

    Raises:
        CapabilityUnsupported: the model's template has no place for what is asked.
    """
    able = features(header)
    _require("chat", able, request.model)
    if request.tools:
        _require("tools", able, request.model)
    if any(each.images for each in request.messages):
        _require("images", able, request.model)
    body = _shared_body(request)
    body["messages"] = _with_system([_message(each) for each in request.messages], header)
    if request.tools:
        body["tools"] = [_tool(each) for each in request.tools]
    if request.format is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": _schema(request.format)}}
    _think(body, request.think, header, request.model)
    return body


def generate_body(request: GenerateRequest, header: Header) -> dict[str, Any]:
    """The JSON of a completion; through the template it is a chat of one message.

    Raises:
        CapabilityUnsupported: the model or the engine cannot do what is asked.
        RequestRejected: what is asked contradicts itself.
    """
    able = features(header)
    _require("generate", able, request.model)
    if request.suffix is not None:
        _require("suffix", able, request.model)
    if request.images:
        _require("images", able, request.model)
    if not request.raw:
        system = (Message(role="system", content=request.system),) if request.system is not None else ()
        names = ("call", "model", "format", "think", "options", "max_tokens", "context_window", "adapter")
        same = {name: getattr(request, name) for name in names}
        return chat_body(ChatRequest(messages=(*system, Message(role="user", content=request.prompt)), **same), header)
    if request.system is not None:
        raise RequestRejected(
            "A raw prompt has no place for a system prompt.", hint="Write it into the prompt, or leave `raw` out."
        )
    if not request.prompt:
        raise RequestRejected("The prompt is empty.", hint="A raw prompt needs a text to go on from.")
    body = _shared_body(request)
    body["prompt"] = request.prompt
    if body.pop("logprobs", False):
        body["logprobs"] = body.pop("top_logprobs", 1)  # This endpoint takes the number.
    if request.format is not None:
        body["json_schema"] = _schema(request.format)
    if request.think:
        _require("thinking", frozenset(), request.model)
    return body


def _shared_body(request: ChatRequest | GenerateRequest) -> dict[str, Any]:
    body: dict[str, Any] = {
        "stream": True,
        "stream_options": {"include_usage": True},
        **{name: value for name, value in request.options.items() if name in OPTIONS},
    }
    if isinstance(body.get("stop"), str):
        body["stop"] = [body["stop"]]
    if body.get("logprobs"):
        body["top_logprobs"] = body.get("top_logprobs") or 1  # The engine gives none where none are asked for.
        body["logprobs"] = True
    else:
        body.pop("logprobs", None)
        body.pop("top_logprobs", None)
    if request.max_tokens is not None:
        body["max_tokens"] = request.max_tokens
    if request.adapter is not None:
        body["adapter"] = {"digest": request.adapter.digest, "scale": request.adapter.scale}
    return body


def _require(feature: str, able: frozenset[str], model: str) -> None:
    if feature not in able:
        raise CapabilityUnsupported(
            f"The model `{model}` cannot do `{feature}` here.",
            model=model,
            hint="Choose another model: `show` lists the features of each.",
        )


def _schema(wanted: Mapping[str, Any] | str) -> Mapping[str, Any]:
    return ANY_OBJECT if isinstance(wanted, str) else wanted


def _think(body: dict[str, Any], think: bool | str | None, header: Header, model: str) -> None:
    if think is None:
        return
    if think:
        _require("thinking", features(header), model)
    arguments: dict[str, Any] = {"enable_thinking": bool(think)}
    if isinstance(think, str):
        arguments["reasoning_effort"] = think
    body["chat_template_kwargs"] = arguments


def _with_system(messages: list[dict[str, Any]], header: Header) -> list[dict[str, Any]]:
    if any(each["role"] == "system" for each in messages) or NO_SYSTEM_ROLE.search(header.template):
        return messages
    return [{"role": "system", "content": SYSTEM_PROMPT}, *messages]


def _message(message: Message) -> dict[str, Any]:
    out: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking:
        out["reasoning_content"] = message.thinking
    if message.tool_calls:
        out["tool_calls"] = [
            {
                "id": each.id,
                "type": "function",
                "function": {"name": each.name, "arguments": json.dumps(dict(each.arguments))},
            }
            for each in message.tool_calls
        ]
    if message.tool_name:
        out["name"] = message.tool_name
    if message.tool_call_id:
        out["tool_call_id"] = message.tool_call_id
    return out


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def scales(body: Mapping[str, Any], loaded: Sequence[str]) -> tuple[float, ...]:
    """The scale of every adapter that an engine has loaded, as a request's body wants them."""
    wanted = body.get("adapter") or {"digest": None}
    return tuple(wanted["scale"] if digest == wanted["digest"] else 0.0 for digest in loaded)


# --- Answers ---------------------------------------------------------------------------------------------------------


def read_line(line: bytes, whole: bool) -> bytes | None:
    """The JSON of one line of a stream of events; None for lines without.

    Raises:
        ProviderError: the line is an error, or none of the stream's.
    """
    line = line.strip()
    if not line or line.startswith((b":", b"event:", b"id:", b"retry:")):
        return None
    name, colon, data = line.partition(b":")
    if not colon or name not in (b"data", b"error"):
        raise ProtocolError("The engine sent a line that is no event.")
    data = data.strip()
    if not whole and data != DONE:
        raise StreamInterrupted("The answer ended in the middle of a line.", hint="Ask again.")
    if name == b"error" or b'"error"' in data:
        found = _object(data)
        if "error" in found:
            raise refusal(STATUS_FAULT, data)
    return data


class Answer:
    """One answer as it comes: events to chunks."""

    def __init__(self, model: str, *, top: bool = False, notes: tuple[str, ...] = ()) -> None:
        self._model = model
        self._top = top
        self._calls: dict[int, dict[str, str]] = {}
        self._finish: str | None = None
        self._last: dict[str, Any] = {}
        self.load: float | None = None
        """Seconds the engine took to start for it."""
        self.notes = notes
        """Warnings to put onto the last chunk."""

    def read(self, data: bytes) -> Chunk | None:
        """The chunk an event makes, if it makes one. The last event is `[DONE]`, and it makes the last chunk.

        Raises:
            ProtocolError: it is not what the server promises.
        """
        if data == DONE:
            return self._end()
        event = _object(data)
        if event.get("usage") or event.get("timings"):
            self._last = event
        choices = event.get("choices") or ()
        if not choices:
            return None
        choice = choices[0]
        self._finish = choice.get("finish_reason") or self._finish
        delta = choice.get("delta") or {"content": choice.get("text")}
        for call in delta.get("tool_calls") or ():
            self._add_call(call)
        text, thinking = delta.get("content") or "", delta.get("reasoning_content") or ""
        logprobs = _logprobs(choice.get("logprobs"), top=self._top)
        if not (text or thinking or logprobs):
            return None
        return Chunk(text=text, thinking=thinking, logprobs=logprobs)

    def _add_call(self, part: Mapping[str, Any]) -> None:
        """Take a piece of a tool call: its name comes first, then its arguments in pieces."""
        call = self._calls.setdefault(int(part.get("index") or 0), {"id": "", "name": "", "arguments": ""})
        function = part.get("function") or {}
        call["id"] = part.get("id") or call["id"]
        call["name"] += function.get("name") or ""
        piece = function.get("arguments")
        if piece is not None:
            call["arguments"] += piece if isinstance(piece, str) else json.dumps(piece)

    def _end(self) -> Chunk:
        if self._finish is None:
            raise ProtocolError("The engine ended its answer without a reason.")
        usage = self._last.get("usage") or {}
        timings = self._last.get("timings") or {}
        return Chunk(
            tool_calls=tuple(
                read_tool_call(call["name"], call["arguments"], call["id"] or f"call_{place}")
                for place, call in sorted(self._calls.items())
            ),
            finish_reason=FINISH.get(self._finish, "other"),
            usage=Usage(input_tokens=usage.get("prompt_tokens"), output_tokens=usage.get("completion_tokens")),
            timings=Timings(
                load=self.load,
                prompt=_seconds(timings.get("prompt_ms")),
                generation=_seconds(timings.get("predicted_ms")),
            ),
            model=self._model,
            warnings=self.notes,
            raw=self._last,
        )


def _logprobs(found: Any, *, top: bool) -> tuple[Logprob, ...]:
    return tuple(
        Logprob(
            token=each["token"],
            logprob=each["logprob"],
            top=tuple(_top(each)) if top else (),
        )
        for each in (found or {}).get("content") or ()
    )


def _top(token: Mapping[str, Any]) -> Iterator[Logprob]:
    for each in token.get("top_logprobs") or ():
        yield Logprob(token=each["token"], logprob=each["logprob"])


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("The engine sent what is no JSON.") from error
    if not isinstance(found, dict):
        raise ProtocolError("The engine sent what is no JSON object.")
    return found


def refusal(status: int, body: bytes) -> ProviderError:
    """The typed error for an answer that refuses, or for an error inside a stream."""
    try:
        found = _object(body).get("error")
    except ProtocolError:
        found = None
    facts = found if isinstance(found, dict) else {"message": str(found or body[:MAX_WORDS].decode(errors="replace"))}
    words = str(facts.get("message", ""))[:MAX_WORDS]
    code, kind = facts.get("code"), facts.get("type")
    status = code if isinstance(code, int) else status
    details = {"server_message": words}
    if kind == "exceed_context_size_error" or "exceeds the available context size" in words:
        figures = {name: facts[name] for name in ("n_prompt_tokens", "n_ctx") if name in facts}
        return ContextOverflow(
            f"The prompt of {figures.get('n_prompt_tokens', 'too many')} tokens does not fit into the context window"
            f" of {figures.get('n_ctx', 'the engine')} tokens.",
            status=status,
            hint="Raise `context_window`, or send less.",
            details={**details, **figures},
        )
    if status == STATUS_UNAUTHORISED:
        return AuthenticationFailed("The engine did not accept its key.", status=status, details=details)
    if kind == "not_supported_error" or status == STATUS_UNSUPPORTED:
        return CapabilityUnsupported(f"The engine cannot do that: {words}.", status=status, details=details)
    if status == STATUS_BUSY:
        return Overloaded(f"The engine is not ready: {words}.", status=status, details=details)
    if status == STATUS_REJECTED:
        return RequestRejected(f"The engine refused the request: {words.rstrip('.')}.", status=status, details=details)
    if status >= STATUS_FAULT:
        return InferenceFailed(f"The engine failed: {words.rstrip('.')}.", status=status, details=details)
    return ProtocolError(f"The engine answered {status}: {words.rstrip('.')}.", status=status, details=details)
