"""What a refusal of Ollama means: by status and message together, across server versions.

A status alone does not tell: a bad option, a bad format and an incompatible model all come as 500, and errors inside a
stream have no status of their own. The words are those of Ollama 0.6 to 0.32 and of the runners inside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

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
SHORTEST_SECRET = 4
"""Characters; what is shorter stands in many words by chance."""
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
REFUSED = 400
SERVER_FAULT = 500


def refusal(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    model: str | None,
    operation: str,
    secrets: Iterable[str] = (),
) -> ProviderError:
    """The typed error for an answer that refuses: a status from 400 on, or an error line under status 200.

    What is in `secrets` is taken out of the server's words before they are cut, so that no part of it is left.
    """
    words, facts, known = _read(body, secrets)
    if status == OK:
        status = _inner_status(facts)
    text = _full(_said(words)) if known and words else f"The status is {status}."
    it = _Said(f"`{model}`" if model else "the model", text, _retry_after(headers))
    error = _by_words(words, it, status, operation) if known else None
    error = error or _by_status(it, status, known=known)
    # A line inside a stream has no status of its own: 200 would be a lie.
    error.status = None if status == OK else status
    error.model = model
    error.operation = operation
    if operation == "load_adapter" and ENDED_ITSELF.search(words):
        error.retryable = False  # It would end again: that is how an adapter that does not fit shows itself.
    error.details.setdefault("server_message", words[:MAX_WORDS])
    error.details.update(facts)
    return error


def _inner_status(facts: Mapping[str, Any]) -> int:
    """The status that some error lines carry in themselves."""
    found: int = facts.get("status", OK)
    return found if REFUSED <= found < 600 else OK  # noqa: PLR2004 - where statuses end


def _read(body: bytes, secrets: Iterable[str]) -> tuple[str, dict[str, Any], bool]:
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
        facts.update(_figures(value))
        inner = value.get("error", value.get("message"))
        if inner is None:
            break
        known, value = True, inner
    words = value if isinstance(value, str) else text
    for secret in secrets:
        if len(secret) >= SHORTEST_SECRET:
            words = words.replace(secret, "***")
    return words[: 4 * MAX_WORDS], facts, known


def _figures(value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What stands beside an error and is worth keeping."""
    for key in ("n_prompt_tokens", "n_ctx", "code", "type"):
        if isinstance(value.get(key), (str, int)):
            yield key, value[key]
    for key in ("status", "StatusCode"):  # Elsewhere `status` is a word.
        if isinstance(value.get(key), int):
            yield "status", value[key]


@dataclass(frozen=True, slots=True)
class _Said:
    """What the server said, for a message."""

    name: str
    """The model, as it stands in a sentence."""
    text: str
    """The words as a sentence, or the status where there are none."""
    retry_after: float | None = None


Make = Callable[[_Said], ProviderError]


def _load_failed(sentence: str, reason: Any, hint: str) -> Make:
    return lambda it: ModelLoadFailed(f"{sentence.format(it.name)} {it.text}", reason=reason, hint=hint)


def _rejected(it: _Said) -> ProviderError:
    return RequestRejected(it.text, hint="Mend the request.")


def _unsupported(it: _Said) -> ProviderError:
    return CapabilityUnsupported(it.text, hint="`graftage models show` tells what a model can do.")


def _unauthorized(it: _Said) -> ProviderError:
    return AuthenticationFailed(
        f"The server wants a sign-in. {it.text}",
        hint="Set `api_key` (sent only over https or to loopback), or sign in with `ollama signin`.",
    )


def _overloaded(it: _Said) -> ProviderError:
    return Overloaded(
        f"The server is busy. {it.text}",
        retry_after=it.retry_after,
        hint="Ask again later, or send less at one time.",
    )


def _loading(it: _Said) -> ProviderError:
    return Overloaded(f"The server is still loading {it.name}. {it.text}", hint="Ask again in some seconds.")


def _not_found(it: _Said) -> ProviderError:
    name = it.name.strip("`") if it.name.startswith("`") else "NAME"
    return ModelNotFound(f"The server does not have {it.name}.", hint=f"Pull it: `graftage models pull {name}`.")


def _stopped(it: _Said) -> ProviderError:
    return InferenceFailed(
        f"The runner stopped while {it.name} was answering. {it.text}",
        retryable=True,
        hint="Ask again: the server starts a new runner.",
    )


def _canceled(it: _Said) -> ProviderError:
    return InferenceFailed(it.text, retryable=True, hint="Another party ended the request: ask again.")


def _gateway(it: _Said) -> ProviderError:
    return ConnectionFailed(
        f"A proxy on the way could not reach the server. {it.text}",
        hint="Is the server running?",
        details={"cause": "gateway"},
    )


def _gave_up(*, retryable: bool) -> Make:
    return lambda it: ProviderTimeout(
        f"A proxy or the server gave up waiting. {it.text}",
        phase="first_token",
        retryable=retryable,
        hint="Raise the proxy's limit.",
    )


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
            f"The prompt does not fit into the context window. {it.text}", hint="Send less, or raise `context_window`."
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
        lambda it: InferenceFailed(it.text, hint="The model's weights or the input are broken."),
    ),
)
"""The first rule of which one phrase is among the server's words, in lower case, decides."""
STATUSES: Final[Mapping[int, Make]] = {
    401: _unauthorized,
    403: lambda it: AuthenticationFailed(
        f"The server forbids this. {it.text}",
        hint="Where it says no more, it does not know the host name or origin: use an address that it knows, or set "
        "OLLAMA_HOST and OLLAMA_ORIGINS for the server.",
    ),
    408: _gave_up(retryable=True),
    425: _gave_up(retryable=True),
    429: _overloaded,
    502: _gateway,
    503: _overloaded,
    504: _gave_up(retryable=False),  # Behind a gateway the server may still be at work.
    521: _gateway,
    522: _gateway,
    523: _gateway,
}
"""What a status means whoever gives it: the server, or a proxy before it."""
OWN_STATUSES: Final[Mapping[int, Make]] = {
    404: lambda it: ModelNotFound(f"The server does not have it. {it.text}", hint="Check the name."),
    499: lambda it: InferenceFailed(
        f"The request was ended by another party. {it.text}", retryable=True, hint="Ask again."
    ),
    501: lambda it: CapabilityUnsupported(it.text, hint="Another model or server may."),
}
"""What a status means beside an error in Ollama's form."""


def _by_words(words: str, it: _Said, status: int, operation: str) -> ProviderError | None:
    lower = words.lower()
    if operation == "pull_model" and (found := _pull_failure(lower, it)):
        return found
    for phrases, make in RULES:
        if any(phrase in lower for phrase in phrases):
            return make(it)
    if re.search(r"model .*not found|not found, try pulling it", lower):
        return _not_found(it)
    if status != OK:
        return None
    if "unauthorized" in lower:  # Inside a stream there is no status to say so.
        return _unauthorized(it)
    return InferenceFailed(it.text, hint="The server's log may tell more.")


def _pull_failure(lower: str, it: _Said) -> ProviderError | None:
    if "file does not exist" in lower or "manifest unknown" in lower:
        return ModelNotFound(f"The registry does not have {it.name}.", hint="Check the name and its tag.")
    if "digest mismatch" in lower:
        return StreamInterrupted(f"A part of {it.name} came damaged. {it.text}", retryable=True, hint="Pull again.")
    if "no space left" in lower:
        return InferenceFailed(f"The server's disk is full. {it.text}", hint="Free some space, then pull again.")
    if re.search(r"dial tcp|no such host|connection refused|i/o timeout|tls:|max retries exceeded", lower):
        return ConnectionFailed(
            f"The server could not reach the registry that has {it.name}. {it.text}",
            retryable=False,
            hint="Check the server's network and proxy, then pull again: it goes on.",
            details={"cause": "registry"},
        )
    if "invalid model name" in lower:
        return RequestRejected(it.text, hint="A name looks like `llama3.2:3b`.")
    return None


def _by_status(it: _Said, status: int, *, known: bool) -> ProviderError:
    if status in STATUSES:
        return STATUSES[status](it)
    if not known:
        return ProtocolError(
            f"The answer is not one of Ollama's: status {status}.",
            hint="Is it another service, an older server, or a proxy's page? Check `host`.",
        )
    if status in OWN_STATUSES:
        return OWN_STATUSES[status](it)
    if status < SERVER_FAULT:
        return _rejected(it)
    return InferenceFailed(f"The server failed. {it.text}", hint="The server's log may tell more.")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from a `Retry-After` header; a date in it is not worth a clock comparison."""
    try:
        seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None


_PATH = re.compile(r"(?<![\w:/\\.])(?:[A-Za-z]:[\\/]|/)[^\s\"':,;()]*[\\/](?=[^\s\"':,;()/\\]+)")


def _said(words: str) -> str:
    """The server's words for a message: cut, and without the folders of its machine, which may name a person."""
    return f"Ollama says: {_PATH.sub('', words[:MAX_WORDS])}"


def _full(text: str) -> str:
    text = text.rstrip()
    return text if text.endswith((".", "!", "?")) else f"{text}."
