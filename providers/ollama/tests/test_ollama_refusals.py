"""The typed errors for Ollama's messages: of pulls and of other calls."""

from __future__ import annotations

import json

import pytest

from graftage.calls import Call
from graftage.exceptions import (
    AuthenticationFailed,
    CapabilityUnsupported,
    ConnectionFailed,
    InferenceFailed,
    ModelLoadFailed,
    ModelNotFound,
    Overloaded,
    ProviderError,
    QuotaExceeded,
    RequestRejected,
    StreamInterrupted,
)
from graftage.http import Answer
from graftage.http.errors import refused
from graftage_ollama._errors import refusal

Kind = type[ProviderError]
GET = 'Get "https://registry.ollama.ai/v2/library/x/manifests/1b": '


def error_of(operation: str, status: int, words: str) -> ProviderError:
    call = Call(operation=operation, model="x:1b")
    body = json.dumps({"error": words}).encode()
    return refused(Answer(status=status, headers=(), body=body, call=call, server="Ollama"), refusal)


PULLS: list[tuple[str, Kind, bool, str]] = [
    (
        "pull model manifest: 412: \n\nThe model you are attempting to pull requires a newer version of Ollama.\n\n",
        ModelLoadFailed,
        False,
        "Update Ollama",
    ),
    ("pull model manifest: file does not exist", ModelNotFound, False, "name"),
    ("pull model manifest: 404: manifest unknown", ModelNotFound, False, "name"),
    ('pull model manifest: 400: {"error":"The tag is not available in the repository."}', ModelNotFound, False, "tag"),
    ('pull model manifest: 401: {"error":"Invalid username or password."}', AuthenticationFailed, False, "signin"),
    ("pull model manifest: 403: access to the model is gated", AuthenticationFailed, False, "signin"),
    ("unauthorized: authentication required", AuthenticationFailed, False, "signin"),
    ('pull model manifest: 429: {"error":"We had to rate limit your IP"}', Overloaded, True, "later"),
    ("toomanyrequests: slow down", Overloaded, True, "later"),
    (f"pull model manifest: {GET}EOF", ConnectionFailed, True, "again"),
    ("max retries exceeded: unexpected EOF", ConnectionFailed, True, "again"),
    (f"pull model manifest: {GET}dial tcp 1.2.3.4:443: i/o timeout", ConnectionFailed, True, "again"),
    (f"{GET}net/http: TLS handshake timeout", ConnectionFailed, True, "again"),
    (f"{GET}context deadline exceeded (while awaiting headers)", ConnectionFailed, True, "again"),
    ("max retries exceeded: read: connection reset by peer", ConnectionFailed, True, "again"),
    ("pull model manifest: 503: upstream connect error", ConnectionFailed, True, "again"),
    ("stream error: stream ID 3; INTERNAL_ERROR", ConnectionFailed, True, "again"),
    (f"{GET}dial tcp: lookup registry.ollama.ai: no such host", ConnectionFailed, False, "network"),
    (f"{GET}dial tcp 127.0.0.1:9: connect: connection refused", ConnectionFailed, False, "network"),
    (f"{GET}dial tcp 1.2.3.4:443: connect: network is unreachable", ConnectionFailed, False, "network"),
    (f"{GET}proxyconnect tcp: dial tcp 1.2.3.4:3128: no route to host", ConnectionFailed, False, "network"),
    (f"{GET}tls: x509: certificate signed by unknown authority", ConnectionFailed, False, "proxy"),
    (f"{GET}x509: certificate has expired or is not yet valid", ConnectionFailed, False, "proxy"),
    ("open /usr/share/ollama/models/sha256-1: permission denied", InferenceFailed, False, "OLLAMA_MODELS"),
    ("open C:\\Users\\bob\\.ollama\\x: Access is denied.", InferenceFailed, False, "OLLAMA_MODELS"),
    ("mkdir /models/blobs: read-only file system", InferenceFailed, False, "OLLAMA_MODELS"),
    ("write /models/blobs/sha256-1: no space left on device", InferenceFailed, False, "space"),
    ("write C:\\models\\x: There is not enough space on the disk.", InferenceFailed, False, "space"),
    ("write /models/x: disk quota exceeded", InferenceFailed, False, "space"),
    ("digest mismatch, file must be downloaded again: want sha256:1, got sha256:2", StreamInterrupted, True, "again"),
    ("invalid model name", RequestRejected, False, "llama3.2:3b"),
    ("insecure protocol http", RequestRejected, False, "insecure=True"),
    ("http: server gave HTTP response to HTTPS client", RequestRejected, False, "insecure=True"),
    (
        'pull model manifest: 400: {"error":"The specified tag is a sharded GGUF. Ollama does not support this yet."}',
        CapabilityUnsupported,
        False,
        "model",
    ),
    ('pull model manifest: 404: {"error":"The specified repository does not exist"}', ModelNotFound, False, "name"),
    ("registry responded with status 401: Invalid credentials", AuthenticationFailed, False, "signin"),
    ("registry responded with status 412: x", ModelLoadFailed, False, "Update Ollama"),
    ("registry responded with status 429: x", Overloaded, True, "later"),
    ("max retries exceeded: 503: ", ConnectionFailed, True, "again"),
    ("pull model manifest: 520: ", ConnectionFailed, True, "again"),
    ("max retries exceeded: wsarecv: An existing connection was forcibly closed", ConnectionFailed, True, "again"),
    ("wsasend: An established connection was aborted by the software", ConnectionFailed, True, "again"),
    ("read tcp 1.2.3.4:443: use of closed network connection", ConnectionFailed, True, "again"),
    ("http: server closed idle connection", ConnectionFailed, True, "again"),
    ("read tcp 1.2.3.4:443: read: connection timed out", ConnectionFailed, True, "again"),
    (f"{GET}Proxy Authentication Required", ConnectionFailed, False, "HTTPS_PROXY"),
    (
        'pull model manifest: realm host "huggingface.co" does not match original host "hf.co"',
        ConnectionFailed,
        False,
        "huggingface.co",
    ),
    (
        'pull model manifest: 400: {"error":"Repository is not GGUF or is not compatible with llama.cpp"}',
        CapabilityUnsupported,
        False,
        "GGUF",
    ),
    ("you have reached your weekly usage limit", QuotaExceeded, False, "plan"),
]  # fmt: skip


@pytest.mark.parametrize("status", [200, 500], ids=["line", "status"])
@pytest.mark.parametrize(
    ("words", "kind", "retryable", "way_out"), PULLS, ids=[each[0][-30:].strip() for each in PULLS]
)
def test_failed_pull_is_typed_with_hint(words: str, kind: Kind, way_out: str, status: int, *, retryable: bool) -> None:
    error = error_of("pull_model", status, words)
    assert (type(error), error.retryable) == (kind, retryable)
    assert way_out in (error.hint or "")
    assert not any(each in str(error) for each in ("/usr/share", "bob", "/models/"))


CALLS: list[tuple[int, str, Kind, bool]] = [
    (429, "you (bob) have reached your weekly usage limit, upgrade for higher limits", QuotaExceeded, False),
    (200, "you (bob) have reached your weekly usage limit, upgrade for higher limits", QuotaExceeded, False),
    (403, "this model requires a subscription, upgrade for access: https://ollama.com/upgrade", QuotaExceeded, False),
    (403, "remote inference is disabled", AuthenticationFailed, False),
    (410, "model 'x:1b' has been retired", ModelNotFound, False),
    (200, "unauthorized", AuthenticationFailed, False),
    (412, "this model requires a newer version of Ollama", ModelLoadFailed, False),
    (400, 'do embedding request: Post "http://127.0.0.1:61135/embedding": EOF', InferenceFailed, True),
    (500, 'Post "http://127.0.0.1:61135/completion": write tcp: write: broken pipe', InferenceFailed, True),
    (500, "dial tcp 127.0.0.1:61135: connect: connection refused", InferenceFailed, True),
    (400, "llama runner process no longer running: -1", ModelLoadFailed, True),
    (500, "an error was encountered while running the model: CUDA error: out of memory", ModelLoadFailed, False),
    (500, "unexpected server status: llm server not responding", InferenceFailed, True),
    (500, "process has terminated: error loading model: unable to allocate CUDA0 buffer", ModelLoadFailed, False),
    (500, 'invalid format: "{": unexpected EOF', RequestRejected, False),
    (500, "invalid image type: image/webp", RequestRejected, False),
    (500, "invalid JPEG format: short Huffman data", RequestRejected, False),
    (500, "vision model only supports a single image per message", RequestRejected, False),
    (502, 'Post "https://ollama.com/api/chat": dial tcp: lookup ollama.com: no such host', ConnectionFailed, True),
]


@pytest.mark.parametrize(("status", "words", "kind", "retryable"), CALLS, ids=[f"{s}-{w[:30]}" for s, w, *_ in CALLS])
def test_refused_call_is_typed(status: int, words: str, kind: Kind, *, retryable: bool) -> None:
    error = error_of("chat", status, words)
    assert (type(error), error.retryable) == (kind, retryable)
    assert error.hint


def test_cut_adapter_file_is_not_retried() -> None:
    assert error_of("load_adapter", 200, "unexpected EOF").retryable is False
    assert error_of("chat", 200, "unexpected EOF").retryable is True


def test_unknown_origin_is_named() -> None:
    answer = Answer(status=403, headers=(), body=b"", call=Call(operation="chat"), server="Ollama")
    assert "OLLAMA_ORIGINS" in str(refused(answer, refusal))
