"""What a refusal of Ollama means: by status and message together, across server versions.

A status alone does not tell: a bad option, a bad format and an incompatible model all come as 500, and errors inside a
stream have no status of their own. The words are those of Ollama 0.6 to 0.32 and of the runners inside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from graftage.exceptions import (
    AuthenticationFailed,
    CapabilityUnsupported,
    ConnectionFailed,
    ContextOverflow,
    InferenceFailed,
    ModelLoadFailed,
    ModelNotFound,
    Overloaded,
    ProviderError,
    RequestRejected,
    StreamInterrupted,
)
from graftage.http import Answer

__all__ = ["refusal"]

MEMORY = (
    "requires more system memory",
    "out of memory",
    "out-of-memory",  # "llama-server reported out-of-memory during startup", WaitUntilRunning since 0.30
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
    # llm/server.go, where a runner does not answer the request to load. What goes on so after "model runner has
    # unexpectedly stopped" is another thing: that is said of one that was killed, too, and the next request mends it.
    "model failed to load, this may be due to resource limitations",
)
LOADING = ("llm server loading model", "llm server launched")
"""The runner is not ready: Completion in llm/server.go answers "unexpected server status: …", and it will be soon. Seen
where a request was ended while its model was loaded, and the next one came before that was done."""
INCOMPATIBLE = (
    "may be incompatible with your version",
    "unable to load lora",
    "loras are not yet implemented",
    "unknown model architecture",
    "unsupported model architecture",
    "unable to load model",
    "invalid file magic",
)
ENDED_ITSELF = re.compile(r"terminated: (?:panic|exit status)")
"""A runner that gave up while it loaded; one that was killed says "signal: killed" or "exit code -1"."""
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
STOPPED = (
    "model runner has unexpectedly stopped",
    "error was encountered while running the model",
    "error reading llama-server",
)
OK = 200
UNAUTHORIZED = 401
FORBIDDEN = 403


def refusal(it: Answer) -> ProviderError | None:
    """The typed error for an answer that refuses; None where the server's words do not tell, and its status must."""
    if not it.known:
        return None
    error = _by_words(it)
    if it.call.operation == "load_adapter" and error is not None and ENDED_ITSELF.search(it.words):
        error.retryable = False  # It would end again: that is how an adapter that does not fit shows itself.
    return error


Make: TypeAlias = Callable[[Answer], ProviderError]


def _load_failed(sentence: str, reason: Any, hint: str) -> Make:
    return lambda it: ModelLoadFailed(f"{sentence.format(it.model)} {it.said}", reason=reason, hint=hint)


def _rejected(it: Answer) -> ProviderError:
    return RequestRejected(it.said, hint="Mend the request.")


def _unsupported(it: Answer) -> ProviderError:
    return CapabilityUnsupported(it.said, hint="`graftage models show` tells what a model can do.")


def _unauthorized(it: Answer) -> ProviderError:
    return AuthenticationFailed(
        f"The server wants a sign-in. {it.said}",
        hint="Set `api_key` (sent only over https or to loopback), or sign in with `ollama signin`.",
    )


def _forbidden(it: Answer) -> ProviderError:
    return AuthenticationFailed(
        f"The server forbids this. {it.said}",
        hint="Where it says no more, it does not know the host name or origin: use an address that it knows, or set "
        "OLLAMA_HOST and OLLAMA_ORIGINS for the server.",
    )


def _overloaded(it: Answer) -> ProviderError:
    return Overloaded(
        f"The server is busy. {it.said}",
        retry_after=it.retry_after,
        hint="Ask again later, or send less at one time.",
    )


def _loading(it: Answer) -> ProviderError:
    return Overloaded(f"The server is still loading {it.model}. {it.said}", hint="Ask again in some seconds.")


def _not_found(it: Answer) -> ProviderError:
    name = it.model.strip("`") if it.model.startswith("`") else "NAME"
    return ModelNotFound(f"The server does not have {it.model}.", hint=f"Pull it: `graftage models pull {name}`.")


def _stopped(it: Answer) -> ProviderError:
    return InferenceFailed(
        f"The runner stopped while {it.model} was answering. {it.said}",
        retryable=True,
        hint="Ask again: the server starts a new runner.",
    )


def _canceled(it: Answer) -> ProviderError:
    return InferenceFailed(it.said, retryable=True, hint="Another party ended the request: ask again.")


RULES: Final[tuple[tuple[tuple[str, ...], Make], ...]] = (
    (("server busy",), _overloaded),
    (LOADING, _loading),
    (
        MEMORY,
        _load_failed(
            "There is not enough memory for {}.",
            "memory",
            "Use a smaller model, a smaller `context_window`, or unload others.",
        ),
    ),
    (
        OVERFLOW,
        lambda it: ContextOverflow(
            f"The prompt does not fit into the context window. {it.said}", hint="Send less, or raise `context_window`."
        ),
    ),
    (REJECTED, _rejected),
    (UNSUPPORTED, _unsupported),
    (
        ("timed out waiting for llama",),
        _load_failed(
            "The server did not load {} in time.",
            "timeout",
            "Is the disk slow, or the model too large? OLLAMA_LOAD_TIMEOUT sets the server's limit.",
        ),
    ),
    (
        INCOMPATIBLE,
        _load_failed(
            "This server cannot run {}.", "incompatible", "Update Ollama, or check the adapter inside the model."
        ),
    ),
    (
        ("process has terminated", "process no longer running"),
        _load_failed(
            "The runner of {} ended.",
            "crashed",
            "If it goes on, look into the server's log: an adapter may not fit, or memory be short.",
        ),
    ),
    (STOPPED, _stopped),
    (("context canceled", "request canceled"), _canceled),
    (
        ("nan or inf",),
        lambda it: InferenceFailed(it.said, hint="The model's weights or the input are broken."),
    ),
)
"""The first rule of which one phrase is among the server's words, in lower case, decides."""


def _by_words(it: Answer) -> ProviderError | None:
    lower = it.words.lower()
    if it.call.operation == "pull_model" and (found := _pull_failure(lower, it)):
        return found
    for phrases, make in RULES:
        if any(phrase in lower for phrase in phrases):
            return make(it)
    if re.search(r"model .*not found|not found, try pulling it", lower):
        return _not_found(it)
    if (it.inner_status in (OK, UNAUTHORIZED) and "unauthorized" in lower) or it.inner_status == UNAUTHORIZED:
        return _unauthorized(it)  # Inside a stream there is no status to say so.
    if it.inner_status == FORBIDDEN:
        return _forbidden(it)
    return None


def _pull_failure(lower: str, it: Answer) -> ProviderError | None:
    if "file does not exist" in lower or "manifest unknown" in lower:
        return ModelNotFound(f"The registry does not have {it.model}.", hint="Check the name and its tag.")
    if "digest mismatch" in lower:
        return StreamInterrupted(f"A part of {it.model} came damaged. {it.said}", retryable=True, hint="Pull again.")
    if "no space left" in lower:
        return InferenceFailed(f"The server's disk is full. {it.said}", hint="Free some space, then pull again.")
    if re.search(r"dial tcp|no such host|connection refused|i/o timeout|tls:|max retries exceeded", lower):
        return ConnectionFailed(
            f"The server could not reach the registry that has {it.model}. {it.said}",
            retryable=False,
            hint="Check the server's network and proxy, then pull again: it goes on.",
            details={"cause": "registry"},
        )
    if "invalid model name" in lower:
        return RequestRejected(it.said, hint="A name looks like `llama3.2:3b`.")
    return None
