"""What a refusal of Ollama means: by status and message together, across server versions.

A status alone does not tell: a bad option, a bad format and an incompatible model all come as 500, and errors inside a
stream have no status of their own. The words are those of Ollama 0.6 to 0.32 and of the runners inside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from graftage.exceptions import (
    AuthenticationFailed,
    CapabilityUnsupported,
    ConnectionFailed,
    ContextOverflow,
    InferenceFailed,
    ModelLoadFailed,
    ModelNotFound,
    Overloaded,
    ProtocolError,
    ProviderError,
    ProviderTimeout,
    RequestRejected,
    StreamInterrupted,
)

__all__ = ["refusal"]

MAX_WORDS = 500
"""Characters of the server's words that go into a message."""
MEMORY = (
    "requires more system memory",
    "out of memory",
    "out of device memory",
    "outofdevicememory",
    "cudamalloc failed",
    "hipmalloc failed",
    "failed to allocate",
    "allocation failed",
    "not enough memory",
    "insufficient memory",
    "vk_error_out_of_device_memory",
    "erroroutofmemory",
    "unable to load full model on gpu",
)
INCOMPATIBLE = (
    "may be incompatible with your version",
    "unable to load lora",
    "loras are not yet implemented",
    "unknown model architecture",
    "unsupported model architecture",
    "unable to load model",
    "invalid file magic",
)
OVERFLOW = ("exceeds the available context size", "exceeds the context length", "exceeds maximum context length")
UNSUPPORTED = ("does not support", "not support multimodal", "this model is missing data required for image input")
REJECTED = (
    "must be of type",
    "invalid format",
    "invalid json schema",
    "invalid duration",
    "invalid model name",
    "model is required",
    "missing request body",
    "invalid options",
    "template:",
    "invalid think value",
    "raw mode does not support",
)
STATUS_GATEWAY = (502, 521, 522, 523)
STATUS_TIMEOUT = (408, 425, 504)


def refusal(
    status: int, headers: Mapping[str, str], body: bytes, *, model: str | None, operation: str
) -> ProviderError:
    """The typed error for an answer that refuses: a status from 400 on, or an error line under status 200."""
    words, facts, known = _read(body)
    error = _by_words(words, status, facts, model, operation) if known else None
    error = error or _by_status(status, headers, words, known)
    # A line inside a stream has no status of its own: 200 would be a lie.
    error.status = status if status >= 400 else None  # noqa: PLR2004 - where errors begin
    error.model = model
    error.operation = operation
    error.details.setdefault("server_message", words[:MAX_WORDS])
    error.details.update(facts)
    return error


def _read(body: bytes) -> tuple[str, dict[str, Any], bool]:
    """The server's words, the figures beside them, and whether the body was an error in Ollama's form."""
    text = body.decode("utf-8", "replace").strip()
    facts: dict[str, Any] = {}
    known = False
    value: Any = text
    # A runner's answer is passed on as a text inside the server's own: unwrap it, but not for ever.
    for _ in range(4):
        if isinstance(value, str):
            if not value.lstrip().startswith("{"):
                break
            try:
                value = json.loads(value.splitlines()[0] if "\n" in value else value)
            except (ValueError, RecursionError):
                break
        if not isinstance(value, Mapping):
            break
        for key in ("n_prompt_tokens", "n_ctx", "code", "type"):
            if isinstance(value.get(key), (str, int)):
                facts[key] = value[key]
        inner = value.get("error", value.get("message"))
        if inner is None:
            break
        known, value = True, inner
    return (value if isinstance(value, str) else text)[: 4 * MAX_WORDS], facts, known


def _by_words(
    words: str, status: int, facts: Mapping[str, Any], model: str | None, operation: str
) -> ProviderError | None:
    lower = words.lower()

    def has(*phrases: str) -> bool:
        return any(phrase in lower for phrase in phrases)

    name = f"`{model}`" if model else "the model"
    said = f"Ollama says: {words[:MAX_WORDS]}"
    if operation == "pull_model" and (found := _pull_failure(lower, name, said)):
        return found
    if has("server busy"):
        return Overloaded("The server's queue is full.", hint="Ask again later, or send less at one time.")
    if has(*MEMORY):
        return ModelLoadFailed(
            f"There is not enough memory for {name}. {_full(said)}",
            reason="memory",
            hint="Use a smaller model, a smaller `context_window`, or unload others.",
        )
    if has(*OVERFLOW):
        return ContextOverflow(
            f"The prompt does not fit into the context window. {_full(said)}",
            hint="Send less, or raise `context_window`.",
        )
    if has(*REJECTED):
        return RequestRejected(_full(said), hint="Mend the request.")
    if has(*UNSUPPORTED):
        return CapabilityUnsupported(f"{_full(said)}", hint="`graftage models show` tells what a model can do.")
    if has("timed out waiting for llama"):
        return ModelLoadFailed(
            f"{name[0].upper()}{name[1:]} was not loaded in time. {_full(said)}",
            reason="timeout",
            hint="Is the disk slow, or the model too large? OLLAMA_LOAD_TIMEOUT sets the server's limit.",
        )
    if has(*INCOMPATIBLE):
        return ModelLoadFailed(
            f"This server cannot run {name}. {_full(said)}",
            reason="incompatible",
            hint="Update Ollama, or check the adapter inside the model.",
        )
    if has("process has terminated"):
        return ModelLoadFailed(
            f"The runner of {name} ended. {_full(said)}",
            reason="crashed",
            hint="If it goes on, look into the server's log: an adapter may not fit, or memory be short.",
        )
    if has(
        "model runner has unexpectedly stopped",
        "error was encountered while running the model",
        "error reading llama-server",
    ):
        return InferenceFailed(
            f"The runner stopped while {name} was answering. {_full(said)}",
            retryable=True,
            hint="Ask again: the server starts a new runner.",
        )
    if has("context canceled", "request canceled"):
        return InferenceFailed(_full(said), retryable=True, hint="Another party ended the request: ask again.")
    if re.search(r"model .*not found|not found, try pulling it", lower):
        return ModelNotFound(
            f"The server does not have {name}.", hint=f"Pull it: `graftage models pull {model or 'NAME'}`."
        )
    if has("nan or inf"):
        return InferenceFailed(_full(said), hint="The model's weights or the input are broken.")
    if status == 200:  # noqa: PLR2004 - an error line that says nothing we know
        return InferenceFailed(_full(said), hint="The server's log may tell more.")
    return None


def _pull_failure(lower: str, name: str, said: str) -> ProviderError | None:
    if "file does not exist" in lower or "manifest unknown" in lower:
        return ModelNotFound(f"The registry does not have {name}.", hint="Check the name and its tag.")
    if "digest mismatch" in lower:
        return StreamInterrupted(f"A part of {name} came damaged. {_full(said)}", retryable=True, hint="Pull again.")
    if "no space left" in lower:
        return InferenceFailed(f"The server's disk is full. {_full(said)}", hint="Free some space, then pull again.")
    if re.search(r"dial tcp|no such host|connection refused|i/o timeout|tls:|max retries exceeded", lower):
        return ConnectionFailed(
            f"The server could not reach the registry that has {name}. {_full(said)}",
            retryable=False,
            hint="Check the server's network and proxy, then pull again: it goes on.",
            details={"cause": "registry"},
        )
    if "invalid model name" in lower:
        return RequestRejected(_full(said), hint="A name looks like `llama3.2:3b`.")
    return None


def _by_status(status: int, headers: Mapping[str, str], words: str, known: bool) -> ProviderError:
    said = _full(f"Ollama says: {words[:MAX_WORDS]}") if known and words else f"The status is {status}."
    if status == 401:  # noqa: PLR2004
        return AuthenticationFailed(
            f"The server wants a sign-in. {said}",
            hint="Set `api_key` (sent only over https or to loopback), or sign in with `ollama signin`.",
        )
    if status == 403:  # noqa: PLR2004
        return AuthenticationFailed(
            f"The server refuses this host name or origin. {said}",
            hint="Use an address that it knows, or set OLLAMA_HOST and OLLAMA_ORIGINS for the server.",
        )
    if status == 429:  # noqa: PLR2004
        return Overloaded(f"Too many requests. {said}", retry_after=_retry_after(headers), hint="Ask again later.")
    if status == 503:  # noqa: PLR2004
        return Overloaded(f"The server is busy. {said}", retry_after=_retry_after(headers), hint="Ask again later.")
    if status in STATUS_GATEWAY:
        return ConnectionFailed(
            f"A proxy on the way could not reach the server. {said}",
            hint="Is the server running?",
            details={"cause": "gateway"},
        )
    if status in STATUS_TIMEOUT:
        return ProviderTimeout(
            f"A proxy or the server gave up waiting. {said}",
            phase="first_token",
            retryable=status != 504,  # noqa: PLR2004 - behind a gateway the server may still be at work
            hint="Raise the proxy's limit.",
        )
    if not known:
        return ProtocolError(
            f"The answer is not one of Ollama's: status {status}.",
            hint="Is it another service, an older server, or a proxy's page? Check `host`.",
        )
    if status == 404:  # noqa: PLR2004
        return ModelNotFound(f"The server does not have it. {said}", hint="Check the name.")
    if status == 499:  # noqa: PLR2004
        return InferenceFailed(f"The request was ended by another party. {said}", retryable=True, hint="Ask again.")
    if status == 501:  # noqa: PLR2004
        return CapabilityUnsupported(said, hint="Another model or server may.")
    if status < 500:  # noqa: PLR2004
        return RequestRejected(said, hint="Mend the request.")
    return InferenceFailed(f"The server failed. {said}", hint="The server's log may tell more.")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from a `Retry-After` header; a date in it is not worth a clock comparison."""
    try:
        seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None


def _full(text: str) -> str:
    text = text.rstrip()
    return text if text.endswith((".", "!", "?")) else f"{text}."


Refuse = Callable[[int, Mapping[str, str], bytes], ProviderError]
