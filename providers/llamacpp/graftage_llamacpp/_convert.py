"""Requests to the JSON of llama.cpp's server, and its responses to Graftage's types.

The bodies name an adapter by its digest, under `adapter`. The transport replaces that by the engine's numbers, which
change with each start.
"""

from __future__ import annotations

import json
import math
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
    "tokens",
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
FEATURES: Final = frozenset({"tools", "tool_choice", "structured_output", "thinking", "logprobs"})
"""Features of the engine that its hooks do not show."""
SYSTEM_PROMPT: Final = "You are a helpful assistant."
"""Sent if the caller gives none: with their built-in prompts, small models answer nonsense."""
NO_SYSTEM_ROLE: Final = re.compile(r"system role not supported", re.IGNORECASE)
ANY_OBJECT: Final = {"type": "object"}
"""A schema for any object: the engine's `json_object` does not force the model to write JSON."""
STATUS_UNAUTHORISED: Final = 401
EMBEDDERS: Final = frozenset(
    {
        "bert",
        "eurobert",
        "gemma-embedding",
        "gemma-embedding2",
        "jina-bert-v2",
        "jina-bert-v3",
        "llama-embed",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "t5encoder",
    }
)
"""Architectures that can only embed."""
RANKS: Final = 4
"""The pooling type of models that score documents (llama.h, llama_pooling_type)."""


# --- Models ----------------------------------------------------------------------------------------------------------


def features(header: Header) -> frozenset[str]:
    """Return what a model can do, by its architecture and its chat template."""
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
    """Return the pooling type to set, or None to use the file's; the mean if the file has none."""
    found = header.figure("pooling_type")
    return "MEAN" if found is None else "RANK" if found == RANKS else None


def model_info(stored: Stored, *, full: bool) -> ModelInfo:
    """Describe a model by its file; if `full`, with its tensors and arrays, such as the vocabulary."""
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
    """Return the number of parameters, as Ollama writes it."""
    total = sum(math.prod(tensor.shape) for tensor in header.tensors.values())
    for unit, name, digits in ((1e9, "B", 1), (1e6, "M", 2), (1e3, "K", 2)):
        if total >= unit:
            return f"{total / unit:.{digits}f}{name}"
    return str(total)


# --- Requests --------------------------------------------------------------------------------------------------------


def chat_body(request: ChatRequest, header: Header) -> dict[str, Any]:
    """Return the JSON of a chat.

    Raises:
        CapabilityUnsupported: the model's template does not support a part of the request.
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
        choice = request.tool_choice
        # The engine treats a name as a choice of its own; if only this tool is there, `required` means the same.
        named = [each for each in request.tools if each.name == choice]
        body["tools"] = [_tool(each) for each in named or request.tools]
        if choice is not None:
            body["tool_choice"] = "required"
    if request.format is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": _schema(request.format)}}
    _set_thinking(body, request.think, header, request.model)
    return body


def generate_body(request: GenerateRequest, header: Header) -> dict[str, Any]:
    """Return the JSON of a raw completion, or of a chat with one message.

    Raises:
        CapabilityUnsupported: the model or the engine does not support a part of the request.
        RequestRejected: parts of the request contradict each other.
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
        body["logprobs"] = body.pop("top_logprobs", 1)  # Here, this is the number.
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
        body["top_logprobs"] = body.get("top_logprobs") or 1  # With 0, the engine sends no logprobs at all.
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
    """Check that a model has a feature.

    Raises:
        CapabilityUnsupported: it does not.
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


# --- Responses -------------------------------------------------------------------------------------------------------


class ChunkReader:
    """Turns the events of one response into chunks."""

    def __init__(self, model: str, *, top: bool) -> None:
        self._model = model
        self._top = top
        self._calls: dict[int, dict[str, str]] = {}
        self._last: dict[str, Any] = {}
        self.finish: str | None = None
        """The engine's reason for the end, once it has ended."""

    def read(self, event: Event) -> Chunk | None:
        """Return the chunk of an event, if it has one."""
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
        """Add a part of a tool call: first comes its name, then its arguments in pieces."""
        call = self._calls.setdefault(int(part.get("index") or 0), {"id": "", "name": "", "arguments": ""})
        function = part.get("function") or {}
        call["id"] = part.get("id") or call["id"]
        call["name"] += function.get("name") or ""
        piece = function.get("arguments")
        if piece is not None:
            call["arguments"] += piece if isinstance(piece, str) else json.dumps(piece)

    def last(self, load: float | None, notes: tuple[str, ...]) -> Chunk:
        """Return the last chunk, with the seconds that the engine took to start, and warnings."""
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


def tokens(found: Mapping[str, Any]) -> list[int]:
    """Read the tokens of a text."""
    return list(found["tokens"])


def token_count(found: Mapping[str, Any]) -> int:
    """Read the number of tokens of a prompt."""
    return int(found["input_tokens"])


def ranking(found: Mapping[str, Any], model: str, warnings: tuple[str, ...]) -> Ranking:
    """Read the scores of documents."""
    return Ranking(
        results=read_records(found["results"], lambda each: Ranked(index=each["index"], score=each["relevance_score"])),
        model=model,
        usage=Usage(input_tokens=read_object(found.get("usage")).get("prompt_tokens")),
        warnings=warnings,
    )


def embeddings(found: Mapping[str, object], model: str, warnings: tuple[str, ...]) -> Embeddings:
    """Read the vectors of a response, in the order of the inputs."""
    return Embeddings(
        vectors=read_vectors(found["data"]),
        model=model,
        usage=Usage(input_tokens=read_object(found.get("usage")).get("prompt_tokens")),
        warnings=warnings,
    )


def refusal(answer: Answer) -> ProviderError | None:
    """Return the typed error for a refusal of the engine, or None if only its status can decide."""
    kind = answer.facts.get("type")
    if kind == "exceed_context_size_error" or "exceeds the available context size" in answer.words:
        return ContextOverflow(
            f"The prompt of {answer.facts.get('n_prompt_tokens', 'too many')} tokens does not fit into the context"
            f" window ({answer.facts.get('n_ctx', 'fewer')} tokens).",
            hint="Raise `context_window`, or send less.",
        )
    if answer.inner_status == STATUS_UNAUTHORISED:
        return AuthenticationFailed("The engine did not accept its key.", hint="Close the client and open another.")
    if kind == "not_supported_error":
        return CapabilityUnsupported(answer.said, hint="Choose another model.")
    return None
