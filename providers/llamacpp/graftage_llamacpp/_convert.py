"""Graftage's types to the JSON of llama.cpp's server, and its answers back.

The bodies name an adapter by its digest, under `adapter`; the transport puts the engine's own numbers in its place, for
they change with each start.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final, Literal

from graftage.calls import ChatRequest, GenerateRequest
from graftage.exceptions import (
    AuthenticationFailed,
    CapabilityUnsupported,
    ContextOverflow,
    ProviderError,
    RequestRejected,
)
from graftage.gguf import Header
from graftage.http import (
    Answer,
    Event,
    read_logprobs,
    read_object,
    read_records,
    read_seconds,
    read_text,
    read_tool_call,
    read_vectors,
)
from graftage.types import Chunk, Embeddings, Message, ModelInfo, Ranked, Ranking, Timings, Tool, Usage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from graftage_llamacpp._store import Stored

__all__ = [
    "FEATURES",
    "OPTIONS",
    "ChunkReader",
    "chat_body",
    "features",
    "generate_body",
    "model_info",
    "pooling",
    "ranking",
    "refusal",
    "require",
    "token_count",
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
        "server",
        "stop",
        "temperature",
        "top_k",
        "top_logprobs",
        "top_p",
        "typical_p",
    }
)
FEATURES: Final = frozenset({"tools", "structured_output", "thinking", "logprobs"})
"""Of the engine, besides what its hooks show."""
SYSTEM_PROMPT: Final = "You are a helpful assistant."
"""Sent where the caller gives none: with what small models have built in, they answer nonsense."""
NO_SYSTEM_ROLE: Final = re.compile(r"system role not supported", re.IGNORECASE)
ANY_OBJECT: Final = {"type": "object"}
"""The engine's own `json_object` does not hold the model to JSON."""
STATUS_UNAUTHORISED: Final = 401
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
RANKS: Final = 4
"""The kind of pooling, in a model's file, of one that scores documents (llama.h, llama_pooling_type)."""


# --- Models ----------------------------------------------------------------------------------------------------------


def features(header: Header) -> frozenset[str]:
    """What a model can do, as its architecture and its chat template show."""
    if header.figure("pooling_type") == RANKS:
        return frozenset({"rerank"})
    if header.architecture in EMBEDDERS:
        return frozenset({"embed"})
    found = {"chat", "generate", "embed", "structured_output", "logprobs"}
    if re.search(r"\btools\b", header.template):
        found.add("tools")
    if re.search(r"enable_thinking|reasoning_content|reasoning_effort|<think>", header.template):
        found.add("thinking")
    return frozenset(found)


def pooling(header: Header) -> Literal["MEAN", "RANK"] | None:
    """How the engine must be told to make one result of all tokens: over the average, where the file says nothing."""
    found = header.figure("pooling_type")
    return "MEAN" if found is None else "RANK" if found == RANKS else None


def model_info(stored: Stored, *, full: bool) -> ModelInfo:
    """What the file says of its model; the arrays, such as the vocabulary, and the tensors where it is `full`."""
    header = stored.header
    metadata = dict(header.metadata)
    if not full:
        metadata = {key: value for key, value in metadata.items() if isinstance(value, str | int | float)}
    return ModelInfo(
        name=stored.name,
        digest=stored.digest,
        size=header.size,
        modified_at=stored.modified_at,
        family=header.architecture,
        architecture=header.architecture,
        parameters=_count(header),
        quantization=header.quantization,
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
            return f"{total / unit:.2f}{name}" if unit < 1e9 else f"{total / unit:.1f}{name}"
    return str(total)


# --- Requests --------------------------------------------------------------------------------------------------------


def chat_body(request: ChatRequest, header: Header) -> dict[str, Any]:
    """The JSON of a chat.

    Raises:
        CapabilityUnsupported: the model's template has no place for what is asked.
    """
    able = features(header)
    require("chat", able, request.model)
    if request.tools:
        require("tools", able, request.model)
    if any(each.images for each in request.messages):
        require("images", able, request.model)
    body = _shared_body(request)
    body["messages"] = _with_system([_message(each) for each in request.messages], header)
    if request.tools:
        body["tools"] = [_tool(each) for each in request.tools]
    if request.format is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": _schema(request.format)}}
    _set_thinking(body, request.think, header, request.model)
    return body


def generate_body(request: GenerateRequest, header: Header) -> dict[str, Any]:
    """The JSON of a completion; through the template it is a chat of one message.

    Raises:
        CapabilityUnsupported: the model or the engine cannot do what is asked.
        RequestRejected: what is asked contradicts itself.
    """
    able = features(header)
    require("generate", able, request.model)
    if request.suffix is not None:
        require("suffix", able, request.model)
    if request.images:
        require("images", able, request.model)
    if not request.raw:
        system = (Message(role="system", content=request.system),) if request.system is not None else ()
        names = ("call", "model", "format", "think", "options", "max_tokens", "context_window", "adapter")
        same = {name: getattr(request, name) for name in names}
        return chat_body(ChatRequest(messages=(*system, Message(role="user", content=request.prompt)), **same), header)
    if request.system is not None:
        raise RequestRejected(
            "`raw` cannot be combined with a system prompt.", hint="Write it into the prompt, or leave `raw` out."
        )
    if not request.prompt:
        raise RequestRejected("The prompt is empty.", hint="A raw prompt must have text to continue.")
    body = _shared_body(request)
    body["prompt"] = request.prompt
    if body.pop("logprobs", False):
        body["logprobs"] = body.pop("top_logprobs", 1)  # This endpoint takes the number.
    if request.format is not None:
        body["json_schema"] = _schema(request.format)
    if request.think:
        require("thinking", frozenset(), request.model)
    return body


def _shared_body(request: ChatRequest | GenerateRequest) -> dict[str, Any]:
    body: dict[str, Any] = {
        **request.options,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
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


def require(feature: str, able: frozenset[str], model: str) -> None:
    """Refuse what a model cannot do.

    Raises:
        CapabilityUnsupported: it cannot.
    """
    if feature not in able:
        raise CapabilityUnsupported(
            f"The model `{model}` does not support `{feature}` here.",
            model=model,
            hint="Choose another model: `show` lists the features of each.",
        )


def _schema(wanted: Mapping[str, Any] | str) -> Mapping[str, Any]:
    return ANY_OBJECT if isinstance(wanted, str) else wanted


def _set_thinking(body: dict[str, Any], think: bool | str | None, header: Header, model: str) -> None:
    if think is None:
        return
    on = think not in (False, "none")
    if on:
        require("thinking", features(header), model)
    arguments: dict[str, Any] = {"enable_thinking": on}
    if isinstance(think, str):
        arguments["reasoning_effort"] = think
    passed_on = body.get("chat_template_kwargs")
    body["chat_template_kwargs"] = {**passed_on, **arguments} if isinstance(passed_on, dict) else arguments


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
    if name := message.tool_name or message.name:
        out["name"] = name
    if message.tool_call_id:
        out["tool_call_id"] = message.tool_call_id
    return out


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


# --- Answers ---------------------------------------------------------------------------------------------------------


class ChunkReader:
    """Makes the chunks of one answer from its events."""

    def __init__(self, model: str, *, top: bool) -> None:
        self._model = model
        self._top = top
        self._calls: dict[int, dict[str, str]] = {}
        self._last: dict[str, Any] = {}
        self.finish: str | None = None
        """The engine's own word for why it ended, once it has."""

    def read(self, event: Event) -> Chunk | None:
        """The chunk an event makes, if it makes one."""
        found = event.json()
        if found.get("usage") or found.get("timings"):
            self._last = found
        choices = found.get("choices") or ()
        if not choices:
            return None
        choice = choices[0]
        self.finish = choice.get("finish_reason") or self.finish
        delta = choice.get("delta") or {"content": choice.get("text")}
        for call in delta.get("tool_calls") or ():
            self._add_call(call)
        text, thinking = read_text(delta.get("content")), read_text(delta.get("reasoning_content"))
        logprobs = read_logprobs(read_object(choice.get("logprobs")).get("content"), top=self._top)
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

    def last(self, load: float | None, notes: tuple[str, ...]) -> Chunk:
        """The last chunk, with the seconds that the engine took to start, and warnings."""
        usage, timings = read_object(self._last.get("usage")), read_object(self._last.get("timings"))
        return Chunk(
            tool_calls=tuple(
                read_tool_call(call["name"], call["arguments"], call["id"]) for _, call in sorted(self._calls.items())
            ),
            finish_reason=self.finish or "",
            usage=Usage(input_tokens=usage.get("prompt_tokens"), output_tokens=usage.get("completion_tokens")),
            timings=Timings(
                load=load,
                prompt=read_seconds(timings.get("prompt_ms"), per_second=1e3),
                generation=read_seconds(timings.get("predicted_ms"), per_second=1e3),
            ),
            model=self._model,
            warnings=notes,
            raw=self._last,
        )


def token_count(found: Mapping[str, Any]) -> int:
    """The tokens of a prompt."""
    return int(found["input_tokens"])


def ranking(found: Mapping[str, Any], model: str, warnings: tuple[str, ...]) -> Ranking:
    """The scores of documents."""
    return Ranking(
        results=read_records(found["results"], lambda each: Ranked(index=each["index"], score=each["relevance_score"])),
        model=model,
        usage=Usage(input_tokens=read_object(found.get("usage")).get("prompt_tokens")),
        warnings=warnings,
    )


def embeddings(found: Mapping[str, Any], model: str, warnings: tuple[str, ...]) -> Embeddings:
    """The vectors of an answer, in the order of the inputs."""
    return Embeddings(
        vectors=read_vectors(found["data"]),
        model=model,
        usage=Usage(input_tokens=read_object(found.get("usage")).get("prompt_tokens")),
        warnings=warnings,
    )


def refusal(it: Answer) -> ProviderError | None:
    """What the engine refuses for reasons of its own."""
    kind = it.facts.get("type")
    if kind == "exceed_context_size_error" or "exceeds the available context size" in it.words:
        return ContextOverflow(
            f"The prompt of {it.facts.get('n_prompt_tokens', 'too many')} tokens does not fit into the context window"
            f" ({it.facts.get('n_ctx', 'fewer')} tokens).",
            hint="Raise `context_window`, or send less.",
        )
    if it.inner_status == STATUS_UNAUTHORISED:
        return AuthenticationFailed("The engine did not accept its key.", hint="Close the client and open another.")
    if kind == "not_supported_error":
        return CapabilityUnsupported(it.said, hint="Choose another model.")
    return None
