"""Errors for refusals, by words and by status, and the wait before a retry."""

from __future__ import annotations

import email.utils
import json
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from graftage.calls import Call
from graftage.exceptions import (
    AuthenticationFailed,
    CapabilityUnsupported,
    ConnectionFailed,
    ContextOverflow,
    GraftageError,
    InferenceFailed,
    ModelNotFound,
    Overloaded,
    ProtocolError,
    ProviderTimeout,
    QuotaExceeded,
    RequestRejected,
)
from graftage.http import Answer
from graftage.http.errors import refused

if TYPE_CHECKING:
    from collections.abc import Mapping

Kind = type[GraftageError]


def error_of(status: int, body: Any, headers: Mapping[str, str] | None = None) -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body, indent=1).encode()
    call = Call(operation="chat", model="m")
    answer = Answer(status=status, headers=tuple((headers or {}).items()), body=data, call=call)
    return refused(answer, None)


WORDS: list[tuple[int, str, Kind, bool]] = [
    (429, "you (bob) have reached your weekly usage limit, upgrade for higher limits", QuotaExceeded, False),
    (200, "you (bob) have reached your hourly usage limit, please upgrade to continue", QuotaExceeded, False),
    (429, "You exceeded your current quota, please check your plan and billing details.", QuotaExceeded, False),
    (429, "no quota left for this project", QuotaExceeded, False),
    (429, "Your trial has ended: upgrade to go on", QuotaExceeded, False),
    (402, "Insufficient Balance", QuotaExceeded, False),
    (402, "no", QuotaExceeded, False),
    (400, "Your credit balance is too low to access the API.", QuotaExceeded, False),
    (403, "this model requires a subscription, upgrade for access: https://x/upgrade", QuotaExceeded, False),
    (200, "this model requires a subscription, upgrade for access: https://x/upgrade", QuotaExceeded, False),
    (403, "Only subscribers may use it", QuotaExceeded, False),
    (403, "model not available on your plan", QuotaExceeded, False),
    (403, "The free tier of the model has been exhausted.", QuotaExceeded, False),
    (400, "Bad request:\nModel requires a Pro subscription", QuotaExceeded, False),
    (403, "Country, region, or territory not supported", AuthenticationFailed, False),
    (
        429,
        "Rate limit reached for gpt-4 on requests per min. Add a payment method at /account/billing",
        Overloaded,
        True,
    ),
    (429, "Rate limit reached: tokens per minute, used 5998. Upgrade to the Dev Tier today", Overloaded, True),
    (429, "slow down", Overloaded, True),
    (200, "too many requests", Overloaded, True),
    (200, "timed out waiting for a concurrent request slot", Overloaded, True),
    (500, "model is overloaded", Overloaded, True),
    (410, "gone", ModelNotFound, False),
    (404, "the model `old` has been deprecated", ModelNotFound, False),
    (400, "The model `old` has been decommissioned and is no longer supported.", ModelNotFound, False),
    (200, "model 'old' was retired on 2026-01-01", ModelNotFound, False),
    (400, 'do embedding request: Post "http://127.0.0.1:61135/embedding": EOF', InferenceFailed, True),
    (500, "unexpected EOF", InferenceFailed, True),
    (500, "EOF", InferenceFailed, True),
    (200, "write tcp 127.0.0.1:5->127.0.0.1:6: write: broken pipe", InferenceFailed, True),
    (400, "dial tcp 127.0.0.1:61135: connect: connection refused", InferenceFailed, True),
    (500, "dial tcp 127.0.0.1:61135: connectex: the target machine actively refused it.", InferenceFailed, True),
    (500, "read: connection reset by peer", InferenceFailed, True),
    (500, "wsarecv: An existing connection was forcibly closed by the remote host.", InferenceFailed, True),
    (
        500,
        "wsasend: An established connection was aborted by the software in your host machine.",
        InferenceFailed,
        True,
    ),
    (500, "OllamaException - Server disconnected without sending a response.", InferenceFailed, True),
    (500, "OllamaException - All connection attempts failed", InferenceFailed, True),
    (500, "Cannot connect to host 127.0.0.1:11434 ssl:default", InferenceFailed, True),
    (500, "peer closed connection without sending complete message body", InferenceFailed, True),
    (500, "EngineCore encountered an issue. See stack trace (above).", InferenceFailed, True),
    (400, "The model has crashed without additional information. (Exit code: 1)", InferenceFailed, True),
    (500, "llama runner process has terminated: signal: killed", InferenceFailed, True),
    (500, "model runner has unexpectedly stopped, this may be due to resource limitations", InferenceFailed, True),
    (500, 'Post "https://x/api/chat": context deadline exceeded', ConnectionFailed, True),
    (400, "tool arguments: EOF while parsing a value at line 1 column 0", RequestRejected, False),
    (400, "there is a typeof in the template", RequestRejected, False),
    (500, "dial tcp: lookup ollama.com: no such host", ConnectionFailed, True),
    (200, "net/http: TLS handshake timeout", ConnectionFailed, True),
    (500, "input (9001 tokens) is too large to process. increase the physical batch size", ContextOverflow, False),
    (400, "request (931 tokens) exceeds the available context size (512 tokens)", ContextOverflow, False),
    (400, "the input length exceeds the context length", ContextOverflow, False),
    (400, "This model's maximum context length is 8192 tokens.", ContextOverflow, False),
    (413, "prompt is too long: 210000 tokens > 200000 maximum", ContextOverflow, False),
    (413, "Input validation error: `inputs` must have less than 512 tokens. Given: 600", ContextOverflow, False),
    (422, "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000", ContextOverflow, False),
    (400, "Input length 5000 exceeds maximum allowed token size 4096", ContextOverflow, False),
    (400, "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000", ContextOverflow, False),
    (400, "The input (5000 tokens) is longer than the model's context length (4096 tokens).", ContextOverflow, False),
    (400, "Trying to keep the first 5000 tokens when context the overflows.", ContextOverflow, False),
    (400, "Input content cannot be empty", RequestRejected, False),
    (500, "Failed to create new sequence: no input provided", RequestRejected, False),
    (404, "No models loaded. Please load a model in the developer page", ModelNotFound, False),
    (500, "image input is not supported - hint: provide the mmproj", CapabilityUnsupported, False),
    (400, '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser', CapabilityUnsupported, False),
    (500, "Failed to parse tools: Missing tool type", RequestRejected, False),
    (500, "The model produced output that does not match the expected peg-native format", InferenceFailed, False),
    (503, "Loading model", Overloaded, True),
    (200, "odd", InferenceFailed, False),
    (500, "odd", InferenceFailed, False),
    (400, "odd", RequestRejected, False),
]


class TestErrorInTheBody:
    @pytest.mark.parametrize("nested", [False, True], ids=["text", "object"])
    @pytest.mark.parametrize(
        ("status", "words", "kind", "retryable"), WORDS, ids=[f"{s}-{w[:30]}" for s, w, *_ in WORDS]
    )
    def test_words_decide_the_type(self, status: int, words: str, kind: Kind, *, retryable: bool, nested: bool) -> None:
        error = error_of(status, {"error": {"message": words} if nested else words})
        assert (type(error), error.retryable) == (kind, retryable)
        assert error.hint
        assert words[:40] in error.message

    @pytest.mark.parametrize(
        ("code", "kind"),
        [
            ("insufficient_quota", QuotaExceeded),
            ("rate_limit_exceeded", Overloaded),
            ("overloaded_error", Overloaded),
            ("context_length_exceeded", ContextOverflow),
            ("exceed_context_size_error", ContextOverflow),
            ("invalid_api_key", AuthenticationFailed),
            ("model_not_found", ModelNotFound),
            ("not_supported_error", CapabilityUnsupported),
            ("server_error", InferenceFailed),
        ],
    )
    @pytest.mark.parametrize("key", ["code", "type"])
    def test_code_decides_in_a_stream(self, code: str, kind: Kind, key: str) -> None:
        assert type(error_of(200, {"error": {"message": "no", key: code}})) is kind

    @pytest.mark.parametrize("code", [429, "429"])
    def test_status_in_a_stream_counts(self, code: Any) -> None:
        error = error_of(200, {"error": {"message": "no", "code": code}})
        assert (type(error), error.status) == (Overloaded, 429)

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            ({"error": "no"}, "no"),
            ({"object": "error", "message": "no", "type": "x", "code": 400}, "no"),
            ([{"error": {"message": "no", "status": "INVALID_ARGUMENT"}}], "no"),
            ({"error": {"message": '{"error": {"message": "no", "code": 400}}'}}, "no"),
            ({"message": {"detail": [{"msg": "Wrong", "loc": ["n"], "input": "x"}]}}, "Wrong: n"),
            ({"detail": [{"msg": "Missing", "loc": ["body", 0]}]}, "Missing: body.0"),
            ({"error": {"message": "odd", "metadata": {"raw": '{"error": {"message": "no"}}'}}}, "no"),
            ({"error": {"message": "odd", "metadata": {"raw": "no"}}}, "no"),
            ({"error": {"message": "no", "metadata": {"raw": None}}}, "no"),
        ],
        ids=["text", "flat", "list", "nested", "pydantic", "FastAPI", "quoted", "quoted text", "nothing quoted"],
    )
    def test_words_are_found_in_any_form(self, body: Any, words: str) -> None:
        error = error_of(400, body)
        assert (type(error), error.details["server_message"]) == (RequestRejected, words)

    def test_list_with_an_error_is_read(self) -> None:
        error = error_of(429, [{"error": {"code": 429, "message": "You exceeded your current quota."}}])
        assert type(error) is QuotaExceeded


STATUSES: dict[int, tuple[Kind, bool]] = {
    401: (AuthenticationFailed, False),
    402: (QuotaExceeded, False),
    403: (AuthenticationFailed, False),
    407: (ConnectionFailed, False),
    408: (ProviderTimeout, True),
    410: (ModelNotFound, False),
    413: (RequestRejected, False),
    414: (RequestRejected, False),
    425: (ProviderTimeout, True),
    429: (Overloaded, True),
    431: (RequestRejected, False),
    451: (AuthenticationFailed, False),
    499: (InferenceFailed, True),
    502: (ConnectionFailed, True),
    503: (Overloaded, True),
    504: (ProviderTimeout, False),
    509: (QuotaExceeded, False),
    511: (ConnectionFailed, False),
    520: (ConnectionFailed, True),
    521: (ConnectionFailed, True),
    522: (ConnectionFailed, True),
    523: (ConnectionFailed, True),
    524: (ProviderTimeout, False),
    525: (ConnectionFailed, False),
    526: (ConnectionFailed, False),
    527: (ConnectionFailed, True),
    529: (Overloaded, True),
    530: (ConnectionFailed, True),
    598: (ProviderTimeout, False),
    599: (ConnectionFailed, True),
    404: (ProtocolError, False),
    405: (ProtocolError, False),
    500: (ProtocolError, False),
}


class TestStatus:
    @pytest.mark.parametrize("body", [b"<html>error code: 1</html>", b""], ids=["page", "empty"])
    @pytest.mark.parametrize("status", STATUSES)
    def test_decides_for_a_proxy_page(self, status: int, body: bytes) -> None:
        error = error_of(status, body)
        assert (type(error), error.retryable) == STATUSES[status]
        assert str(status) in error.message
        assert error.hint
        assert b"html" not in str(error).encode()

    def test_words_of_a_page_do_not_count(self) -> None:
        assert type(error_of(403, b"<html>Please upgrade your browser: usage limit</html>")) is AuthenticationFailed

    @pytest.mark.parametrize(
        ("status", "kind"), [(404, ModelNotFound), (422, RequestRejected), (501, CapabilityUnsupported)]
    )
    def test_decides_beside_unclear_json(self, status: int, kind: Kind) -> None:
        assert type(error_of(status, {"error": "no"})) is kind

    @pytest.mark.parametrize(
        ("code", "status"), [(None, None), (503, 503), (400, 400), (599, 599), (7, None), (600, None)]
    )
    def test_200_gives_way_to_the_body(self, code: int | None, status: int | None) -> None:
        assert error_of(200, {"error": {"message": "no", "code": code}}).status == status


@pytest.mark.parametrize(
    ("status", "verdict", "retryable"),
    [(409, "true", True), (409, None, False), (503, "false", False), (503, "maybe", True), (503, None, True)],
)
def test_server_decides_about_retries(status: int, verdict: str | None, *, retryable: bool) -> None:
    headers = {"x-should-retry": verdict} if verdict else {}
    assert error_of(status, {"error": "no"}, headers).retryable is retryable


def test_figures_of_the_server_become_details() -> None:
    details = error_of(400, {"error": {"message": "too long", "type": "size", "n_ctx": 4096}}).details
    assert (details["server_message"], details["type"], details["n_ctx"]) == ("too long", "size", 4096)


NOW = 1_800_000_000.0


def at(form: str) -> str:
    """The time in 90 seconds."""
    return datetime.fromtimestamp(NOW + 90, UTC).strftime(form)


WAITS: list[tuple[str, dict[str, str], float | None]] = [
    ("seconds", {"retry-after": "7"}, 7),
    ("a part of a second", {"retry-after": "0.25"}, 0.25),
    ("now", {"retry-after": "0"}, 0),
    ("an hour", {"retry-after": "3600"}, 3600),
    ("milliseconds", {"retry-after-ms": "1500"}, 1.5),
    ("milliseconds first", {"retry-after": "2", "retry-after-ms": "1500"}, 1.5),
    ("odd milliseconds", {"retry-after": "2", "retry-after-ms": "soon"}, 2),
    ("a date", {"retry-after": email.utils.formatdate(NOW + 90, usegmt=True)}, 90),
    ("a date of RFC 850", {"retry-after": at("%A, %d-%b-%y %H:%M:%S GMT")}, 90),
    ("a date of asctime", {"retry-after": at("%a %b %d %H:%M:%S %Y")}, 90),
    ("a date of ISO 8601", {"retry-after": at("%Y-%m-%dT%H:%M:%SZ")}, 90),
    ("a time of Unix", {"retry-after": f"{NOW + 90:.0f}"}, 90),
    ("a date that has passed", {"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT"}, 0),
    ("a reset", {"x-ratelimit-reset": "30"}, 30),
    ("a reset as a duration", {"x-ratelimit-reset-requests": "1m30s"}, 90),
    ("a reset in milliseconds", {"x-ratelimit-reset-tokens": "6ms"}, 0.006),
    ("a reset in parts", {"x-ratelimit-reset-tokens": "1h2m3.5s"}, 3723.5),
    ("a reset as a time of Unix", {"x-ratelimit-reset": f"{NOW + 90:.0f}"}, 90),
    ("a reset as one in milliseconds", {"x-ratelimit-reset": f"{1000 * (NOW + 90):.0f}"}, 90),
    ("a reset of the draft", {"ratelimit-reset": "12"}, 12),
    ("a reset as a date", {"anthropic-ratelimit-requests-reset": at("%Y-%m-%dT%H:%M:%SZ")}, 90),
    ("the later reset", {"x-ratelimit-reset-requests": "1s", "x-ratelimit-reset-tokens": "6s"}, 6),
    (
        "the reset of what is used up",
        {
            "x-ratelimit-reset-requests": "1s",
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-tokens": "6m0s",
            "x-ratelimit-remaining-tokens": "9000",
        },
        1,
    ),
    ("retry-after before a reset", {"x-ratelimit-reset": "30", "retry-after": "2"}, 2),
    ("a reset beside garbage", {"x-ratelimit-reset": "30", "retry-after": "soon"}, 30),
    *[
        (f"{name}: {value}", {name: value}, None)
        for name in ("retry-after", "retry-after-ms", "x-ratelimit-reset")
        for value in ("", "soon", "-5", "nan", "inf", "-inf", "1e308", "9" * 30, "1m-30s", "5 apples", "12:00")
    ],
    ("none", {}, None),
]


class TestRetryAfter:
    @pytest.mark.parametrize(("headers", "seconds"), [each[1:] for each in WAITS], ids=[each[0] for each in WAITS])
    def test_is_read_from_headers(
        self, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], seconds: float | None
    ) -> None:
        monkeypatch.setattr(time, "time", lambda: NOW)
        error = error_of(429, {"error": "slow down"}, headers)
        if seconds is None:
            assert (error.retry_after, "Retry after" in str(error)) == (None, False)
        else:
            assert error.retry_after == seconds
            assert f"Retry after {seconds} s" in error.message

    @pytest.mark.parametrize(
        ("error", "seconds"),
        [
            ({"message": "wait", "details": [{"@type": "x/RetryInfo", "retryDelay": "34.5s"}]}, 34.5),
            ({"message": "wait", "retry_after": 3}, 3),
            ({"message": "Rate limit reached. Please try again in 1m30s. Visit …"}, 90),
            ({"message": "Please retry after 10 seconds."}, 10),
            ({"message": "Please retry in 34.07s."}, 34.07),
            ({"message": "Please try again in 2 minutes."}, None),
            ({"message": "Please try again in 90 ms."}, None),
            ({"message": "Please try again in 2 days"}, None),
            ({"message": "Please try again."}, None),
            ({"message": "Please try again in an hour."}, None),
        ],
    )
    @pytest.mark.parametrize("status", [429, 200])
    def test_is_read_from_the_body(self, error: dict[str, Any], seconds: float | None, status: int) -> None:
        body = {"error": {**error, "code": "rate_limit_exceeded"}}
        assert error_of(status, body).retry_after == seconds

    def test_stands_in_the_quota_error(self) -> None:
        error = error_of(429, {"error": "weekly usage limit reached"}, {"retry-after": "7200"})
        assert (type(error), error.retry_after) == (QuotaExceeded, 7200)
        assert "7200 s" in str(error)
