"""The typed error for each refusal of Ollama, chosen by status and message, across server versions.

The status alone is not enough: a bad option, a bad format and an incompatible model are all a 500, and errors inside a
stream have no status. The messages are those of Ollama 0.6 to 0.32 and of the runners inside it.
"""

from __future__ import annotations

import re
from typing import Final

from graftage.exceptions import (
    AuthenticationFailed,
    CapabilityUnsupported,
    ConnectionFailed,
    InferenceFailed,
    ModelLoadFailed,
    ModelNotFound,
    Overloaded,
    ProviderError,
    RequestRejected,
    StreamInterrupted,
)
from graftage.http import Answer, Rules, by_words, says

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
    "unable to allocate",
    "alloc_failed",
    # llm/server.go, if a runner does not respond to the request to load. The same words after "model runner has
    # unexpectedly stopped" are not about memory: they follow a killed runner, too, and the next request starts another.
    "model failed to load, this may be due to resource limitations",
)
LOADING = ("llm server loading model", "llm server launched")
"""The runner will be ready soon: Completion in llm/server.go responds "unexpected server status: …". Seen if a request
was cancelled while its model was loaded, and the next one came before the model was ready."""
TOO_NEW = ("requires a newer version", "newer version of ollama")
INCOMPATIBLE = (
    *TOO_NEW,
    "may be incompatible with your version",
    "unable to load lora",
    "loras are not yet implemented",
    "unknown model architecture",
    "unsupported model architecture",
    "unable to load model",
    "invalid file magic",
)
CRASHED_ON_LOAD = re.compile(r"terminated: (?:panic|exit status)|^unexpected EOF$")
"""A runner that crashed while it loaded, or a truncated file. A killed runner says "signal: killed" instead."""
UNSUPPORTED = ("does not support", "not support multimodal", "this model is missing data required for image input")
REJECTED = (
    "must be of type",
    "invalid format",
    "invalid duration",
    "invalid model name",
    "model is required",
    "missing request body",
    "invalid options",
    "template:",
    "invalid think value",
    "image: unknown format",
    "invalid image type",
    "invalid jpeg format",
    "single image per message",
    "raw mode does not support",
)
STOPPED = (
    "model runner has unexpectedly stopped",
    "error was encountered while running the model",
    "error reading llama-server",
    "llm server not responding",
    "llm server error",
    " eof ",
)
REGISTRY = {"cause": "registry"}
AGAIN = "Pull again: it resumes where it stopped."
NETWORK = f"Check the server's network and proxy. {AGAIN}"


def _status(*begins: str) -> tuple[str, ...]:
    """Return the forms in which messages name a status of the registry."""
    return tuple(f"{after} {each}" for each in begins for after in ("manifest:", "retries exceeded:", "with status"))


PULLS: Final[Rules] = (
    (
        (*TOO_NEW, *_status("412")),
        says(
            ModelLoadFailed, "This server is too old for {model}.", "Update Ollama, then pull.", reason="incompatible"
        ),
    ),
    (
        (
            "file does not exist",
            "manifest unknown",
            "repository not found",
            "not available in the repository",
            *_status("404"),
        ),
        says(ModelNotFound, "The registry does not have {model}.", "Check the name and its tag."),
    ),
    (
        ("digest mismatch",),
        says(StreamInterrupted, "A part of {model} arrived damaged.", "Pull again.", retryable=True),
    ),
    (
        ("no space left", "not enough space", "disk quota exceeded", "disk is full"),
        says(InferenceFailed, "The server's disk is full.", "Free some space, then pull again."),
    ),
    (
        ("permission denied", "access is denied", "operation not permitted", "read-only file system"),
        says(
            InferenceFailed,
            "The server is not allowed to write to its folder of models.",
            "Give that folder to the user that runs Ollama, or set OLLAMA_MODELS for the server.",
        ),
    ),
    (
        (*_status("429"), "rate limit", "too many requests", "toomanyrequests"),
        says(Overloaded, "The registry is busy.", "Pull again later: it resumes where it stopped."),
    ),
    (
        ("proxy authentication required",),
        says(
            ConnectionFailed,
            "The proxy between the server and the registry requires a sign-in.",
            "Put user and password into HTTPS_PROXY where Ollama runs.",
            retryable=False,
            details=REGISTRY,
        ),
    ),
    (
        ("does not match original host",),
        says(
            ConnectionFailed,
            "The registry sends the server to another host.",
            "Write `huggingface.co/…` instead of `hf.co/…`, or pull later.",
            retryable=False,
            details=REGISTRY,
        ),
    ),
    (
        ("not gguf", "not compatible with llama.cpp"),
        says(CapabilityUnsupported, "Ollama cannot read {model}.", "Pull a GGUF version of it."),
    ),
    (
        (*_status("401", "403"), "unauthorized", "forbidden", "authentication required", "access denied"),
        says(
            AuthenticationFailed,
            "The registry denies this server access to {model}.",
            "Check the name. A private or gated model needs an account: sign the server in with `ollama signin`.",
        ),
    ),
    (
        ("invalid model name", "invalid model path"),
        says(RequestRejected, "", "A name looks like `llama3.2:3b`."),
    ),
    (
        ("insecure protocol http", "http response to https"),
        says(RequestRejected, "The registry has no TLS.", "`llm.native` can pull with `insecure=True`."),
    ),
    (
        ("x509:", "certificate"),
        says(
            ConnectionFailed,
            "The server does not trust the registry's certificate.",
            "A proxy may have replaced it: install the proxy's certificate where Ollama runs, then pull again.",
            retryable=False,
            details=REGISTRY,
        ),
    ),
    (
        (
            "i/o timeout",
            "handshake timeout",
            "deadline exceeded",
            "awaiting headers",
            " eof ",
            "connection reset",
            "broken pipe",
            "stream error",
            "http2:",
            "forcibly closed",
            "was aborted",
            "closed network connection",
            "closed idle connection",
            "timed out",
            *_status("408", "5"),
        ),
        says(ConnectionFailed, "The registry broke off the transfer of {model}.", AGAIN, details=REGISTRY),
    ),
    (
        (
            "dial tcp",
            "no such host",
            "connection refused",
            "tls:",
            "max retries exceeded",
            "unreachable",
            "no route to",
        ),
        says(
            ConnectionFailed,
            "The server could not reach the registry that has {model}.",
            NETWORK,
            retryable=False,
            details=REGISTRY,
        ),
    ),
)
"""Failures of a pull, in messages of the server and of registries. Nearly all come as a line under status 200."""
RULES: Final[Rules] = (
    (LOADING, says(Overloaded, "The server is still loading {model}.", "Try again in a few seconds.")),
    (
        MEMORY,
        says(
            ModelLoadFailed,
            "There is not enough memory for {model}.",
            "Use a smaller model, a smaller `context_window`, or unload others.",
            reason="memory",
        ),
    ),
    (REJECTED, says(RequestRejected, "", "Correct the request.")),
    (UNSUPPORTED, says(CapabilityUnsupported, "", "`graftage models show` lists what a model can do.")),
    (
        ("timed out waiting for llama",),
        says(
            ModelLoadFailed,
            "The server did not load {model} in time.",
            "Is the disk slow, or the model too large? OLLAMA_LOAD_TIMEOUT sets the server's limit.",
            reason="timeout",
        ),
    ),
    (
        INCOMPATIBLE,
        says(
            ModelLoadFailed,
            "This server cannot run {model}.",
            "Update Ollama, or check the adapter inside the model.",
            reason="incompatible",
        ),
    ),
    (
        ("process has terminated", "process no longer running"),
        says(
            ModelLoadFailed,
            "The runner of {model} ended.",
            "If it happens again, read the server's log: an adapter may not fit, or memory may be short.",
            reason="crashed",
        ),
    ),
    (
        STOPPED,
        says(
            InferenceFailed,
            "The runner stopped while {model} was answering.",
            "Try again: the server starts a new runner.",
            retryable=True,
        ),
    ),
    (
        ("context canceled", "request canceled"),
        says(InferenceFailed, "", "The server or a proxy cancelled the request: try again.", retryable=True),
    ),
    (("nan or inf",), says(InferenceFailed, "", "The model's weights or the input are broken.")),
    (
        ("unauthorized",),
        says(
            AuthenticationFailed,
            "The server requires a sign-in.",
            "Set `api_key` (sent only over https or to loopback), or sign in with `ollama signin`.",
        ),
    ),
)
UNAUTHORIZED = 401
FORBIDDEN = 403
_forbidden = says(
    AuthenticationFailed,
    "The server forbids this.",
    "It does not accept the request's host name or origin: use an address that it accepts, or set OLLAMA_HOST and "
    "OLLAMA_ORIGINS for the server.",
)


def refusal(answer: Answer) -> ProviderError | None:
    """Return the typed error for a refusal, or None if only its status can decide."""
    if not answer.known:
        return _forbidden(answer) if answer.status == FORBIDDEN else None
    error = by_words(answer, (*PULLS, *RULES) if answer.call.operation == "pull_model" else RULES)
    if error is None and re.search(r"model .*not found|not found, try pulling it", answer.searched):
        name = answer.call.model or "NAME"
        hint = f"Pull it: `graftage models pull {name}`."
        return ModelNotFound(f"The server does not have {answer.model}.", hint=hint)
    if answer.call.operation == "load_adapter" and error is not None and CRASHED_ON_LOAD.search(answer.words):
        error.retryable = False  # An adapter that does not fit crashes the runner every time.
    return error
