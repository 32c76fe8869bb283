"""Typed errors for refusals: tables of words and statuses, used after a provider's own table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from graftage.exceptions import (
    AuthenticationFailed,
    CapabilityUnsupported,
    ConnectionFailed,
    ContextOverflow,
    InferenceFailed,
    ModelNotFound,
    Overloaded,
    ProtocolError,
    ProviderError,
    ProviderTimeout,
    QuotaExceeded,
    RequestRejected,
)
from graftage.http.refusal import MAX_WORDS, OK, Answer, Make, Refusal, Rules, by_words, says
from graftage.http.transport import header

__all__ = ["refused"]

SERVER_FAULT: Final = 500
FIX: Final = "Correct the request."
LOG: Final = "See the server's log."
PLAN: Final = "Check the account's plan and usage, or use another model or provider."
_gateway: Final = says(
    ConnectionFailed,
    "A proxy could not reach the server.",
    "Is the server running?",
    details={"cause": "gateway"},
)
_certificate: Final = says(
    ConnectionFailed,
    "A proxy does not trust the server's certificate.",
    "The proxy's administrator must fix it.",
    retryable=False,
    details={"cause": "gateway"},
)
_overloaded: Final = says(Overloaded, "The server is busy.", "Try again later, or send fewer requests at once.")
_quota: Final = says(QuotaExceeded, "The plan does not cover this request, or is used up.", PLAN)
_sign_in: Final = says(
    AuthenticationFailed,
    "The server requires a sign-in.",
    "Set `api_key`, which is sent only over https or to loopback.",
)
_retired: Final = says(ModelNotFound, "The server no longer has {model}.", "Choose one that the server lists.")
_head_too_large: Final = says(
    RequestRejected,
    "The head of the request is too large.",
    "Send fewer or shorter `headers`, or raise the server's limit.",
)
_gave_up: Final = "A proxy or the server gave up waiting."
_timed_out: Final = says(ProviderTimeout, _gave_up, "Try again.", phase="first_token", retryable=True)
# Behind a gateway the server may still be at work.
_timed_out_behind: Final = says(
    ProviderTimeout,
    _gave_up,
    "Raise the proxy's limit, or stream the reply: its first chunk comes sooner.",
    phase="first_token",
)

QUOTA_WORDS: Final = (
    "usage limit",
    "insufficient_quota",
    "insufficient quota",
    "exceeded your current quota",
    "exceeded your quota",
    "quota exceeded",
    "quota_exceeded",
    "out of credits",
    "credit balance",
    "insufficient credit",
    "insufficient_credit",
    "not enough credits",
    "insufficient balance",
    "insufficient_balance",
    "billing hard limit",
    "billing_hard_limit",
    "billing_not_active",
    "spending limit",
    "spend limit",
    "hourly limit",
    "daily limit",
    "weekly limit",
    "monthly limit",
    "payment required",
    "requires a subscription",
    "requires a paid",
    "requires a pro ",
    "subscription required",
    "upgrade your plan",
    "upgrade your account",
    "upgrade for ",
)
RETIRED_WORDS: Final = (
    "has been retired",
    "was retired",
    "is retired",
    "no longer available",
    "has been deprecated",
    "decommissioned",
    "has been discontinued",
    "has been sunset",
    "end of life",
    "end-of-life",
)
OVERFLOW_WORDS: Final = (
    "exceeds the available context size",
    "exceed_context_size",
    "exceeds the context length",
    "exceeds maximum context length",
    "exceeded max context length",
    "maximum context length",
    "context_length_exceeded",
    "exceeds the context window",
    "exceeds context window",
    "context size has been exceeded",
    "prompt is too long",
    "input is too long",
    "exceeds the maximum number of tokens",
    "exceeds maximum allowed token",
    "exceed context limit",
    "longer than the model's context",
    "when context the overflows",  # LM Studio's own words.
    "tokens` must be <=",
    "`inputs` must have less than",
)
GENERAL_WORDS: Final[Rules] = (
    (QUOTA_WORDS, _quota),
    (RETIRED_WORDS, _retired),
    (
        OVERFLOW_WORDS,
        says(ContextOverflow, "The prompt does not fit into the context window.", "Send less, or enlarge the window."),
    ),
    (
        ("too large to process",),
        says(
            ContextOverflow,
            "An input is longer than the server takes at once.",
            "Send shorter inputs, or raise the server's batch size.",
        ),
    ),
    (
        ("no input provided", "input content cannot be empty"),
        says(RequestRejected, "The server refuses empty inputs.", "Leave them out."),
    ),
    (
        ("model_not_found", "no models loaded"),
        says(ModelNotFound, "The server does not have {model}.", "Choose one that it lists, or load it there first."),
    ),
    (
        ("image input is not supported", "does not support image"),
        says(CapabilityUnsupported, "{model} cannot read images here.", "Use another; llama-server needs `--mmproj`."),
    ),
    (
        ("not_supported_error", "does not support tools", "--enable-auto-tool-choice"),
        says(CapabilityUnsupported, "", "Choose another model, or start the server with the option for it."),
    ),
    (
        ("failed to parse tool", "failed to parse messages", "invalid json schema", "unable to generate parser"),
        says(RequestRejected, "", FIX),
    ),
    (
        ("tool_use_failed", "model produced output that does not match"),
        says(InferenceFailed, "The model's call of a tool cannot be read.", "Ask again, or choose a larger model."),
    ),
)
"""What words mean with any status."""
RATE_LIMITS: Final[Rules] = (
    (
        (
            "rate limit",
            "rate_limit",
            "rate-limit",
            "too many requests",
            "too_many_requests",
            "per minute",
            "concurrent request",
            "concurrency limit",
            "overloaded",
            "server busy",
            "server is busy",
        ),
        _overloaded,
    ),
)
"""Limits on speed, even if the text names a plan with a higher one."""
ABOUT_PLANS: Final[Rules] = ((("quota", "subscri", "upgrade", "billing", "credit", " plan", "free tier"), _quota),)
"""If the status means "used up" or "forbidden", these words mean the plan."""
BACKEND: Final[Rules] = (
    ((" eof while parsing",), says(RequestRejected, "", FIX)),
    (
        (
            " eof ",
            "broken pipe",
            "connection reset",
            "connection refused",
            "connection aborted",
            "connection was aborted",
            "connection attempts failed",
            "closed connection",
            "cannot connect to host",
            "server disconnected",
            "actively refused",
            "forcibly closed",
            "closed network connection",
            "server closed",
            "socket hang up",
            "econnreset",
            "econnrefused",
            "transport is closing",
            "segmentation fault",
            "enginedeaderror",
            "enginecore encountered",
            "model has crashed",
            "process has terminated",
            "process no longer running",
            "runner has unexpectedly stopped",
        ),
        says(
            InferenceFailed,
            "The process that runs {model} for the server has ended or cannot be reached.",
            "Try again: the server may restart it.",
            retryable=True,
        ),
    ),
    (
        (
            "no such host",
            "name resolution",
            "name or service not known",
            "network is unreachable",
            "no route to host",
            "i/o timeout",
            "deadline exceeded",
            "tls: ",
            "x509: ",
            "handshake timeout",
        ),
        says(
            ConnectionFailed,
            "The server could not reach another server that it needs for {model}.",
            "Check the server's network and proxy.",
            details={"cause": "upstream"},
        ),
    ),
)
"""Words about sockets mean the server's own runner, or another server, with any status."""
LOADING: Final[Rules] = (
    (("loading model",), says(Overloaded, "The server is still loading {model}.", "Try again in a few seconds.")),
)
WORDS_BY_STATUS: Final[Mapping[int, Rules]] = {
    OK: (
        *RATE_LIMITS,
        *BACKEND,
        (("invalid_api_key", "authentication_error", "unauthorized"), _sign_in),
    ),
    400: BACKEND,
    403: ABOUT_PLANS,
    429: (*RATE_LIMITS, *ABOUT_PLANS),
    500: (*RATE_LIMITS, *BACKEND),
    503: LOADING,
}
"""What words mean with one status."""

BY_STATUS: Final[Mapping[int, Make]] = {
    401: _sign_in,
    402: _quota,
    403: says(
        AuthenticationFailed,
        "The server forbids this.",
        "Check the permissions of the key. If the server gives no reason, it may not accept the host name or origin.",
    ),
    407: says(
        ConnectionFailed,
        "The proxy requires a sign-in.",
        "Put user and password into the proxy's URL, or add the host to NO_PROXY.",
        retryable=False,
        details={"cause": "proxy"},
    ),
    408: _timed_out,
    410: _retired,
    413: says(
        RequestRejected, "The request is too large.", "Send less, or raise the limit of the server or its proxy."
    ),
    414: _head_too_large,
    425: _timed_out,
    429: _overloaded,
    431: _head_too_large,
    451: says(AuthenticationFailed, "The server refuses this for legal reasons.", "Use another provider."),
    499: says(InferenceFailed, "Another party ended the request.", "Try again.", retryable=True),
    502: _gateway,
    503: _overloaded,
    504: _timed_out_behind,
    509: says(QuotaExceeded, "The server's bandwidth is used up.", "Try again later."),
    511: says(
        ConnectionFailed,
        "The network requires a sign-in.",
        "Open a web page in this network and sign in.",
        retryable=False,
        details={"cause": "proxy"},
    ),
    **dict.fromkeys((520, 521, 522, 523, 527, 530), _gateway),
    **dict.fromkeys((525, 526), _certificate),
    524: _timed_out_behind,
    529: _overloaded,
    598: _timed_out_behind,
    599: _gateway,
}
"""What a status means from the server as well as from a proxy."""
BY_STATUS_IN_JSON: Final[Mapping[int, Make]] = {
    404: says(ModelNotFound, "The server does not have {model}.", "Check the model's name, and `host`."),
    501: says(CapabilityUnsupported, "", "Use another model or server."),
}
"""What a status means beside an error in JSON."""


def refused(it: Answer, own: Refusal | None) -> ProviderError:
    """Return the typed error for a refusal: from the provider's own table, else by words and status."""
    error = own(it) if own is not None else None
    error = error or _default_error(it)
    error.model = error.model or it.call.model
    error.operation = error.operation or it.call.operation or None
    # An error inside a stream has no status; 200 would be wrong.
    error.status = None if it.inner_status == OK else it.inner_status
    if (verdict := header(it.headers, "x-should-retry")) in ("true", "false"):  # OpenAI's own client obeys it as well.
        error.retryable = verdict == "true"
    if isinstance(error, (Overloaded, QuotaExceeded)) and error.retry_after is None:
        _add_retry_after(error, it.retry_after)
    error.details.setdefault("server_message", it.words[:MAX_WORDS])
    error.details.update(it.facts)
    return error


def _add_retry_after(error: Overloaded | QuotaExceeded, seconds: float | None) -> None:
    """Add the wait to an error and its message."""
    if seconds is not None:
        error.retry_after = seconds
        error.message = f"{error.message} Retry after {round(seconds, 3):.12g} s."
        error.args = (error.message,)


def _default_error(it: Answer) -> ProviderError:
    """Return the error by words, else by status."""
    status = it.inner_status
    if it.known and (error := by_words(it, (*GENERAL_WORDS, *WORDS_BY_STATUS.get(status, ())))):
        return error
    if status in BY_STATUS:
        return BY_STATUS[status](it)
    if status == OK:
        return InferenceFailed(it.said, hint=LOG)
    if not it.known:
        return ProtocolError(
            f"The response does not come from {it.server}: status {status}.",
            hint="Is it another service, an older server, or the page of a proxy? Check `host`.",
        )
    if status in BY_STATUS_IN_JSON:
        return BY_STATUS_IN_JSON[status](it)
    if status < SERVER_FAULT:
        return RequestRejected(it.said, hint=FIX)
    return InferenceFailed(f"The server failed. {it.said}", hint=LOG)
