"""Requests to the JSON of llama.cpp's server, and its responses to Graftage's types.

The bodies name adapters by their digests, with their weights, under `adapter`. The transport replaces that by the
engine's numbers, which change with each start.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal

from graftage.calls import ChatRequest, GenerateRequest
from graftage.exceptions import (
    AuthenticationFailed,
    CapabilityUnsupported,
    ProviderError,
    RequestRejected,
)
from graftage.gguf import Header
from graftage.http import Answer, read_object, read_records
from graftage.http.completions import (
    as_chat,
    read_template,
    write_format,
    write_message,
    write_options,
    write_thinking,
    write_tools,
)
from graftage.types import Message, ModelInfo, Ranked, Ranking, Usage

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from graftage_llamacpp._store import Stored

__all__ = [
    "FEATURES",
    "OPTIONS",
    "chat_body",
    "continuations",
    "features",
    "generate_body",
    "model_info",
    "pooling",
    "ranking",
    "refusal",
    "require",
    "shared_body",
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
FEATURES: Final = frozenset({"tools", "tool_choice", "structured_output", "thinking", "logprobs", "adapter_weights"})
"""Features of the engine that its hooks do not show."""
SYSTEM_PROMPT: Final = "You are a helpful assistant."
"""Sent if the caller gives none: with their built-in prompts, small models answer nonsense."""
NO_SYSTEM_ROLE: Final = re.compile(r"system role not supported", re.IGNORECASE)
ANY_OBJECT: Final = {"type": "object"}
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
    return read_template(header.template) | {"chat", "generate", "embed", "structured_output", "logprobs"}


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
    body = shared_body(request)
    body["messages"] = _with_system([_message(each) for each in request.messages], header)
    # The engine treats the name of a tool as a choice of its own.
    body |= write_tools(request.tools, request.tool_choice, by_name=False)
    if request.format is not None:
        # The engine's `json_object` does not force the model to write JSON.
        body["response_format"] = write_format(request.format, json_object=False)
    if request.think is not None:
        if request.think not in (False, "none"):
            require("thinking", able, request.model)
        body["chat_template_kwargs"] = write_thinking(request.think, body.get("chat_template_kwargs"))
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
        return chat_body(as_chat(request), header)
    if request.system is not None:
        raise RequestRejected(
            "`raw` cannot be combined with a system prompt.", hint="Write it into the prompt, or leave `raw` out."
        )
    if not request.prompt:
        raise RequestRejected("The prompt is empty.", hint="A raw prompt must have text to continue.")
    body = shared_body(request)
    body["prompt"] = request.prompt
    if request.format is not None:
        body["json_schema"] = ANY_OBJECT if request.format == "json" else request.format
    if request.think:
        require("thinking", frozenset(), request.model)
    return body


def shared_body(request: ChatRequest | GenerateRequest) -> dict[str, Any]:
    """Return what a chat and a raw completion have in common."""
    body = write_options(request.options, chat=isinstance(request, ChatRequest))
    if request.max_tokens is not None:
        body["max_tokens"] = request.max_tokens
    if request.adapter is not None:
        # The file contains the adapter's own scale, so the engine's is the weight alone.
        body["adapter"] = [[part.digest, weight] for part, weight in request.adapter.weights]
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


def continuations(messages: tuple[Message, ...]) -> Iterator[tuple[Message, ...]]:
    """Return two continuations of messages that have nothing in common."""
    for text in ("x", "\n1"):
        *before, last = messages or (Message(role="user", content=""),)
        if last.role == "user":
            yield (*before, replace(last, content=last.content + text))
        else:
            yield (*messages, Message(role="user", content=text))


def _with_system(messages: list[dict[str, Any]], header: Header) -> list[dict[str, Any]]:
    if any(each["role"] == "system" for each in messages) or NO_SYSTEM_ROLE.search(header.template):
        return messages
    return [{"role": "system", "content": SYSTEM_PROMPT}, *messages]


def _message(message: Message) -> dict[str, Any]:
    body = write_message(message, "reasoning_content" if message.thinking else None)
    return {**body, "name": message.tool_name} if message.tool_name else body


# --- Responses -------------------------------------------------------------------------------------------------------


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


def refusal(answer: Answer) -> ProviderError | None:
    """Return the typed error for a refusal that means something else than from a server, or None."""
    if answer.inner_status == STATUS_UNAUTHORISED:
        return AuthenticationFailed("The engine did not accept its key.", hint="Close the client and open another.")
    return None
