"""A provider for OpenAI's chat API that uses only the contract, on cassettes from Ollama's `/v1`.

Record them again, from any server that has `smollm2:135m`:

    GRAFTAGE_LIVE_OLLAMA=http://127.0.0.1:11434 pytest tests/test_outside_openai.py --record-mode=rewrite
"""

from __future__ import annotations

import importlib.util
import json
import os
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from places import ROOT

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
    SettingsError,
    StreamInterrupted,
)
from graftage.types import Timeouts
from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from collections.abc import Callable

    from graftage.testing import Cassette
    from graftage.testing.both import Both

SOURCE = ROOT / "core" / "graftage" / "_cli" / "templates" / "openai" / "provider.py"
"""What `graftage new provider` writes."""
LIVE = os.environ.get("GRAFTAGE_LIVE_OLLAMA", "")
MODEL = "smollm2:135m"
CHAT = "/v1/chat/completions"
CALM: dict[str, Any] = {"temperature": 0, "seed": 7}
"""Options for the same reply on each run."""
TOOL = {
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOL_MODEL = "smollm2-tools:135m"
TOOL_TEMPLATE = """\
{{- if .Tools }}<|im_start|>system
Tools: {{ range .Tools }}{{ . }}{{ end }}<|im_end|>
{{ end }}{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}{{ range .ToolCalls }}{"name": "{{ .Function.Name }}", "parameters": {{ .Function.Arguments }}}{{ end }}\
<|im_end|>
{{ end }}<|im_start|>assistant
"""
"""Makes Ollama accept tools for the model; a schema then forces a call."""


def create_tool_model(live: str) -> None:
    """Create the model with tools on a live server."""
    made = {"model": TOOL_MODEL, "from": MODEL, "template": TOOL_TEMPLATE, "stream": False}
    httpx.post(f"{live}/api/create", json=made, trust_env=False, timeout=60).raise_for_status()


@pytest.fixture(scope="module")
def wire() -> Any:
    """The provider's module, as a host passes it."""
    spec = importlib.util.spec_from_file_location("graftage_openai_wire", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cassette_facts() -> dict[str, str]:
    """What the server says about itself; the model with tools is made there."""
    if not LIVE:
        pytest.fail("Name the server to record from in GRAFTAGE_LIVE_OLLAMA.", pytrace=False)
    create_tool_model(LIVE)
    return {"server": f"Ollama {httpx.get(f'{LIVE}/api/version', trust_env=False).json()['version']}"}


@pytest.fixture
def llm(both: Both, wire: Any, cassette: Cassette) -> Any:
    """A client that replays or records the test's cassette."""
    return both.connect(wire, model=MODEL, host=f"{LIVE or 'http://127.0.0.1:11434'}/v1", transport=cassette)


class TestRecorded:
    """Replies of a real server, from cassettes."""

    def test_chat_gives_text_usage_and_reason(self, llm: Any) -> None:
        reply = llm.chat("What is the capital of France? Answer with one word.", options=CALM, max_tokens=40)
        assert "Paris" in reply.text
        assert reply.finish_reason == "stop"
        assert reply.usage.input_tokens > 5
        assert 0 < reply.usage.output_tokens <= 40
        assert (reply.model, reply.provider) == (MODEL, "graftage_openai_wire")
        assert reply.warnings == ()
        assert reply.raw["choices"][0]["finish_reason"] == "stop"

    def test_stream_gives_pieces(self, llm: Any) -> None:
        with llm.chat("Count to three.", stream=True, options=CALM, max_tokens=8) as stream:
            chunks = list(stream)
        assert len(chunks) == 9
        assert all(chunk.text and chunk.finish_reason is None for chunk in chunks[:-1])
        assert stream.reply.text == "".join(chunk.text for chunk in chunks)
        assert stream.reply.finish_reason == "length"
        assert stream.reply.usage.output_tokens == 8

    def test_tool_call_and_its_result(self, llm: Any) -> None:
        city = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Paris"]}}, "required": ["city"]}
        call = {"name": {"type": "string", "enum": ["get_weather"]}, "parameters": city}
        schema = {"type": "object", "properties": call, "required": ["name", "parameters"]}
        messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Paris?"}]
        asked: dict[str, Any] = {"model": TOOL_MODEL, "options": CALM, "tools": [TOOL], "max_tokens": 60}
        reply = llm.chat(messages, format=schema, **asked)
        assert reply.finish_reason == "tool_calls"
        (found,) = reply.tool_calls
        assert (found.name, found.arguments) == ("get_weather", {"city": "Paris"})
        # The server makes up an id. A constant one keeps the second request the same when the first is recorded again.
        messages += [
            {"role": "assistant", "tool_calls": [{"id": "call_1", "name": found.name, "arguments": found.arguments}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ]
        assert llm.chat(messages, **asked).text

    def test_schema_gives_parsed_data(self, llm: Any) -> None:
        schema = {"type": "object", "properties": {"capital": {"type": "string"}}, "required": ["capital"]}
        reply = llm.chat("The capital of France, as JSON.", format=schema, options=CALM, max_tokens=40)
        assert list(reply.parsed) == ["capital"]

    def test_vectors_follow_the_order_of_inputs(self, llm: Any) -> None:
        both, one = llm.embed(["The sky", "A cat"]), llm.embed("A cat")
        assert len(both.vectors) == 2
        assert both.vectors[1] == pytest.approx(one.vectors[0], abs=0.01)
        assert both.usage.input_tokens > 0

    def test_models_are_listed(self, llm: Any) -> None:
        assert {MODEL, TOOL_MODEL} <= {model.name for model in llm.models()}

    def test_health_needs_no_hook(self, llm: Any) -> None:
        health = llm.health(level="answers")
        assert health.ok
        assert health.model_present

    def test_missing_model_gets_suggestions(self, llm: Any) -> None:
        with pytest.raises(ModelNotFound) as caught:
            llm.chat("Hi", model="smolm2:135m")
        assert MODEL in caught.value.suggestions
        assert str(caught.value).endswith(f"Did you mean `{MODEL}`?")
        assert (caught.value.status, caught.value.model) == (404, "smolm2:135m")

    def test_refusal_is_typed(self, llm: Any) -> None:
        with pytest.raises(RequestRejected, match="does not support tools"):
            llm.chat("Hi", tools=[TOOL])


@pytest.fixture
def connect(both: Both, wire: Any, fake: FakeOllama) -> Callable[..., Any]:
    return lambda **given: both.connect(wire, **{"model": MODEL, "host": f"{fake.url}/v1", "attempts": 1, **given})


def event(delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': choices, **more})}\n\n".encode()


def piece(index: int, **function: str) -> bytes:
    """A part of a tool call."""
    more = {"id": function.pop("id")} if "id" in function else {}
    return event({"tool_calls": [{"index": index, **more, "function": function}]})


def events(*chunks: bytes, **more: Any) -> Answer:
    return Answer(chunks, headers={"content-type": "text/event-stream"}, **more)


HELLO = event({"role": "assistant", "content": "Hello"})
STOP = event({}, "stop")
USAGE = event(usage={"prompt_tokens": 3, "completion_tokens": 1})
DONE = b"data: [DONE]\n\n"


class TestRequest:
    def test_has_the_form_of_the_api(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(CHAT, events(HELLO, STOP, USAGE, DONE))
        connect(api_key="sesame").chat(
            [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}],
            tools=[TOOL],
            options={"stop": ["."]},
            max_tokens=9,
        )
        (seen,) = fake.requests
        assert seen.headers["authorization"] == "Bearer sesame"
        assert seen.body == {
            "model": MODEL,
            "messages": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}],
            "tools": [{"type": "function", "function": TOOL}],
            "stop": ["."],
            "max_tokens": 9,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def test_forms_of_other_clients_are_translated(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(CHAT, events(event({"content": '"Hello"'}), STOP, USAGE, DONE))
        parts = [{"type": "text", "text": "Hi"}]
        connect().chat(
            [{"role": "developer", "content": "Be brief"}, {"role": "user", "content": parts, "name": "bob"}],
            format={"type": "json_schema", "json_schema": {"name": "A", "schema": {"type": "string"}}},
            options={"seed": 1, "server": {"top_k": 5, "parallel_tool_calls": False}},
        )
        body: Any = fake.requests[0].body
        assert body["messages"] == [
            {"role": "system", "content": "Be brief"},
            {"role": "user", "content": "Hi", "name": "bob"},
        ]
        assert body["response_format"]["json_schema"] == {"name": "answer", "schema": {"type": "string"}}
        assert (body["seed"], body["top_k"], body["parallel_tool_calls"]) == (1, 5, False)

    @pytest.mark.parametrize(
        "options",
        [{"temperature": "hot"}, {"stop": 5}, {"server": {"Max_Tokens": 9}}, {"server": {"stream": False}}],
        ids=str,
    )
    def test_invalid_option_is_not_sent(self, connect: Any, fake: FakeOllama, options: Any) -> None:
        with pytest.raises(RequestRejected):
            connect().chat("Hi", options=options)
        assert fake.requests == []

    def test_misfit_is_asked_for_again(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(CHAT, *(events(event({"content": each}), STOP, DONE) for each in ("Well", "{}")))
        reply = connect().chat("Hi", format="json", retries=1)
        assert (reply.parsed, reply.attempts) == ({}, 2)
        *_, reply, request = fake.requests[-1].body["messages"]
        assert (reply["role"], reply["content"], request["role"]) == ("assistant", "Well", "user")

    def test_missing_operations_are_refused(self, connect: Any, fake: FakeOllama) -> None:
        llm = connect()
        for act, given in (llm.count_tokens, ["Hi"]), (llm.rerank, ["Hi", ["x"]]), (llm.delete, ["x"]):
            with pytest.raises(CapabilityUnsupported):
                act(*given)
        assert fake.requests == []


class TestReply:
    def test_comments_and_late_events_are_skipped(self, connect: Any, fake: FakeOllama) -> None:
        alive = b": keepalive\n\n"
        fake.script(CHAT, events(alive, alive, HELLO, alive, STOP, alive, USAGE, DONE, HELLO))
        with connect().chat("Hi", stream=True) as stream:
            assert [(chunk.text, chunk.finish_reason) for chunk in stream] == [("Hello", None), ("", "stop")]
        assert (stream.reply.usage.input_tokens, stream.reply.usage.output_tokens) == (3, 1)

    @pytest.mark.parametrize("rest", [(DONE,), (), (USAGE,)], ids=["done", "nothing", "usage"])
    def test_is_complete_with_its_reason(self, connect: Any, fake: FakeOllama, rest: tuple[bytes, ...]) -> None:
        fake.script(CHAT, events(HELLO, STOP, *rest))
        reply = connect().chat("Hi")
        assert (reply.text, reply.finish_reason) == ("Hello", "stop")
        assert (reply.usage.input_tokens is not None) == (USAGE in rest)

    def test_tool_calls_are_assembled(self, connect: Any, fake: FakeOllama) -> None:
        pieces = [
            piece(0, id="call_a", name="get_weather", arguments=""),
            piece(0, arguments='{"ci'),
            piece(1, id="call_b", name="get_weather", arguments='{"city": "Rome"}'),
            piece(0, arguments='ty": "Paris"}'),
        ]
        fake.script(CHAT, events(*pieces, event({}, "tool_calls"), USAGE, DONE))
        reply = connect().chat("Hi", tools=[TOOL])
        assert [(each.id, each.arguments) for each in reply.tool_calls] == [
            ("call_a", {"city": "Paris"}),
            ("call_b", {"city": "Rome"}),
        ]
        assert reply.finish_reason == "tool_calls"

    def test_truncated_tool_arguments_are_an_error(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(
            CHAT, events(HELLO, piece(0, id="a", name="get_weather", arguments='{"ci'), event({}, "length"), DONE)
        )
        with pytest.raises(InferenceFailed, match="get_weather"):
            connect().chat("Hi", tools=[TOOL])

    @pytest.mark.parametrize("reason", ["length", "content_filter", "banana"])
    def test_known_finish_reason_is_kept(self, connect: Any, fake: FakeOllama, reason: str) -> None:
        fake.script(CHAT, events(HELLO, event({}, reason), DONE))
        assert connect().chat("Hi").finish_reason == ("other" if reason == "banana" else reason)

    def test_tool_calls_get_ids_and_reason(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(CHAT, *[events(piece(0, name="get_weather"), event({}, "stop"), DONE)] * 2)
        llm = connect()
        replies = [llm.chat("Hi", tools=[TOOL]) for _ in range(2)]
        assert [reply.finish_reason for reply in replies] == ["tool_calls"] * 2
        assert len({call.id for reply in replies for call in reply.tool_calls}) == 2

    @pytest.mark.parametrize(
        "usage",
        [
            {"prompt_tokens": None},
            {"prompt_tokens": -1, "completion_tokens": 1.5},
            {"completion_tokens": "many"},
            7,
            [],
        ],
        ids=str,
    )
    def test_invalid_counts_are_unknown(self, connect: Any, fake: FakeOllama, usage: Any) -> None:
        fake.script(CHAT, events(HELLO, STOP, event(usage=usage), DONE))
        reply = connect().chat("Hi")
        assert (reply.text, reply.usage.input_tokens, reply.usage.output_tokens) == ("Hello", None, None)

    def test_truncated_prompt_is_a_warning(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(CHAT, events(HELLO, STOP, event(usage={"prompt_tokens": 2048}), DONE))
        (warning,) = connect().chat("word " * 9000).warnings
        assert "probably cut" in warning

    @pytest.mark.parametrize("places", [(0,), (0, 0), (0, 2), (0, 1, 2)], ids=str)
    def test_wrong_vectors_are_an_error(self, connect: Any, fake: FakeOllama, places: tuple[int, ...]) -> None:
        data = [{"index": place, "embedding": [1.0]} for place in places]
        fake.script("/v1/embeddings", Answer([{"data": data}]))
        with pytest.raises(ProtocolError, match="vectors"):
            connect().embed(["a", "b"])

    def test_invalid_models_are_skipped(self, connect: Any, fake: FakeOllama) -> None:
        fake.script("/v1/models", Answer([{"data": [{"id": "a"}, {}, None, {"id": "b"}]}]))
        assert [each.name for each in connect().models()] == ["a", "b"]

    def test_json_in_a_fence_is_parsed(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(CHAT, events(event({"content": '```json\n{"a": 1}\n```'}), STOP, DONE))
        assert connect().chat("Hi", format="json").parsed == {"a": 1}


class TestCutStream:
    @pytest.mark.parametrize("ending", ["end", "close", "reset"])
    def test_keeps_its_text(self, connect: Any, fake: FakeOllama, ending: Any) -> None:
        fake.script(CHAT, events(HELLO, event({"content": " you"}), b'data: {"cho', ending=ending))
        with pytest.raises(StreamInterrupted) as caught, connect(attempts=3).chat("Hi", stream=True) as stream:
            for _ in stream:
                pass
        assert caught.value.partial is not None
        assert caught.value.partial.text == "Hello you"
        assert len(fake.requests) == 1

    def test_missing_reason_is_an_error(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(CHAT, events(HELLO, DONE))
        with pytest.raises(StreamInterrupted):
            connect().chat("Hi")

    def test_idle_stream_times_out(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(CHAT, events(HELLO, ending="stall"))
        with pytest.raises(ProviderTimeout) as caught:
            connect(timeouts=Timeouts(idle=0.2)).chat("Hi")
        assert caught.value.phase == "idle"
        assert caught.value.partial is not None
        assert caught.value.partial.text == "Hello"

    @pytest.mark.parametrize(
        "bad",
        [
            b'data: {"error": {"message": "The model crashed", "type": "server_error", "code": null}}\n\n',
            b'event: error\ndata: {"message": "The model crashed"}\n\n',
        ],
    )
    def test_error_event_ends_the_stream(self, connect: Any, fake: FakeOllama, bad: bytes) -> None:
        fake.script(CHAT, events(HELLO, bad))
        with pytest.raises(InferenceFailed, match="The model crashed") as caught:
            connect().chat("Hi")
        assert caught.value.partial is not None
        assert caught.value.partial.text == "Hello"


class TestErrors:
    @pytest.mark.parametrize(
        "bad",
        [
            b"data: half a word\n\n",
            b"data: [1]\n\n",
            b'data: {"choices": 5}\n\n',
            b'data: {"choices": [{"delta": null}]}\n\n',
            b'data: {"choices": [{"delta": {"content": 5}}]}\n\n',
        ],
    )
    def test_invalid_event_is_a_protocol_error(self, connect: Any, fake: FakeOllama, bad: bytes) -> None:
        fake.script(CHAT, events(HELLO, bad, STOP, DONE))
        with pytest.raises(ProviderError) as caught:
            connect().chat("Hi")
        assert caught.value.__class__ is ProtocolError

    @pytest.mark.parametrize(
        ("status", "error", "kind"),
        [
            (400, {"message": "Too long", "code": "context_length_exceeded"}, ContextOverflow),
            (400, {"message": "No such role", "code": None}, RequestRejected),
            (401, {"message": "Incorrect API key", "code": "invalid_api_key"}, AuthenticationFailed),
            (429, {"message": "Slow down", "code": "rate_limit_exceeded"}, Overloaded),
            (429, {"message": "Pay first", "code": "insufficient_quota"}, QuotaExceeded),
            (429, {"message": "You have reached your usage limit", "code": None}, QuotaExceeded),
            (402, {"message": "Insufficient Balance", "code": "invalid_request_error"}, QuotaExceeded),
            (403, {"message": "This model requires a subscription", "code": None}, QuotaExceeded),
            (410, {"message": "It is gone", "code": None}, ModelNotFound),
            (500, {"message": "input is too large to process", "code": None}, ContextOverflow),
            (500, {"message": "Oh", "code": None}, InferenceFailed),
            (500, {"message": "rpc error: connection refused", "code": None}, InferenceFailed),
            (524, {"message": "Late", "code": None}, ProviderTimeout),
        ],
    )
    def test_type_follows_status_and_body(
        self, connect: Any, fake: FakeOllama, status: int, error: Any, kind: type[ProviderError]
    ) -> None:
        fake.script(CHAT, Answer([json.dumps({"error": error}).encode()], status=status))
        with pytest.raises(kind, match=error["message"]) as caught:
            connect().chat("Hi")
        assert caught.value.status == status

    @pytest.mark.parametrize(
        ("error", "kind"),
        [
            ({"message": "Pay first", "code": "insufficient_quota"}, QuotaExceeded),
            ({"message": "You have reached your usage limit"}, QuotaExceeded),
            ({"message": "The model `m` has been retired"}, ModelNotFound),
            ({"message": "Slow down", "type": "rate_limit_error"}, Overloaded),
            ({"message": "This model's maximum context length is 5"}, ContextOverflow),
            ({"message": "unexpected EOF"}, InferenceFailed),
        ],
    )
    @pytest.mark.parametrize("before", [(), (HELLO,)], ids=["first", "mid"])
    def test_error_event_is_typed_by_words(
        self, connect: Any, fake: FakeOllama, before: tuple[bytes, ...], error: Any, kind: type[ProviderError]
    ) -> None:
        fake.script(CHAT, events(*before, b"data: " + json.dumps({"error": error}).encode() + b"\n\n"))
        with pytest.raises(kind) as caught:
            connect().chat("Hi")
        assert (caught.value.partial is not None) == bool(before)
        assert not (before and caught.value.retryable)

    @pytest.mark.parametrize(
        ("headers", "seconds"), [({"retry-after": "3600"}, 3600), ({"x-ratelimit-reset-tokens": "6m0s"}, 360)]
    )
    def test_retry_after_an_hour_ends_the_call(
        self, connect: Any, fake: FakeOllama, headers: dict[str, str], seconds: float
    ) -> None:
        fake.script(CHAT, *[Answer([{"error": {"message": "Slow down"}}], status=429, headers=headers)] * 3)
        with pytest.raises(Overloaded, match=f"{seconds} s") as caught:
            connect(attempts=3).chat("Hi")
        assert (caught.value.retry_after, caught.value.attempts, len(fake.requests)) == (seconds, 1, 1)

    @pytest.mark.parametrize(
        ("body", "kind", "said"),
        [
            ({"error": {"message": "The model crashed"}}, InferenceFailed, "The model crashed"),
            ({"choices": [{"message": {"content": "Hello"}}]}, ProtocolError, "not a stream of events"),
        ],
    )
    def test_object_instead_of_events_is_reported(
        self, connect: Any, fake: FakeOllama, body: Any, kind: type[ProviderError], said: str
    ) -> None:
        fake.script(CHAT, Answer([json.dumps(body).encode()], headers={"content-type": "application/json"}))
        with pytest.raises(kind, match=said):
            connect(attempts=3).chat("Hi")
        assert len(fake.requests) == 1


LISTED = Answer([{"data": [{"id": MODEL}]}])


class TestHealth:
    def test_refusing_server_is_reachable(self, connect: Any, fake: FakeOllama) -> None:
        fake.script("/v1/models", Answer([{"error": {"message": "Incorrect API key"}}], status=401))
        health = connect().health()
        assert (health.reachable, health.api, type(health.error)) == (True, False, AuthenticationFailed)

    def test_missing_model_has_its_reason(self, connect: Any, fake: FakeOllama) -> None:
        fake.script("/v1/models", LISTED)
        health = connect(model="smolm2:135m").health(level="model_present")
        assert (health.api, health.model_present) == (True, False)
        with pytest.raises(ModelNotFound) as caught:
            health.raise_for_error()
        assert caught.value.suggestions == (MODEL,)

    def test_loaded_models_are_unknown(self, connect: Any, fake: FakeOllama) -> None:
        fake.script("/v1/models", LISTED)
        health = connect().health(level="model_loaded")
        assert (health.model_present, type(health.error)) == (True, CapabilityUnsupported)

    def test_failing_model_keeps_lower_levels(self, connect: Any, fake: FakeOllama) -> None:
        fake.script("/v1/models", LISTED)
        fake.script(CHAT, Answer([{"error": {"message": "Oh"}}], status=500))
        health = connect().health(level="answers")
        assert (health.model_present, health.model_loaded, health.answers) == (True, None, False)
        assert isinstance(health.error, InferenceFailed)

    @pytest.mark.parametrize("status", [400, 404, 501])
    def test_embedding_model_is_healthy(self, connect: Any, fake: FakeOllama, status: int) -> None:
        fake.script("/v1/models", LISTED)
        fake.script(
            CHAT, Answer([{"error": {"message": "The model does not support Chat Completions"}}], status=status)
        )
        fake.script("/v1/embeddings", Answer([{"data": [{"index": 0, "embedding": [1.0]}]}]))
        health = connect().health(level="answers")
        assert (health.model_present, health.answers, health.error) == (True, True, None)

    def test_dead_port_is_reported(self, both: Both, wire: Any) -> None:
        llm = both.connect(wire, model=MODEL, host="http://127.0.0.1:9/v1", attempts=1)
        with pytest.raises(ConnectionFailed, match=r"Nothing listens at http://127\.0\.0\.1:9"):
            llm.chat("Hi")
        assert not llm.health().reachable


class TestRefusals:
    @pytest.mark.parametrize(
        "host",
        [
            "127.0.0.1:9/v1",
            "ftp://h",
            "http://",
            "http://h:x",
            "http://h:99999",
            "http://u:sesame@h",
            "http://h?key=sesame",
        ],
    )
    def test_invalid_host(self, both: Both, wire: Any, host: str) -> None:
        with pytest.raises(SettingsError, match="must be an http or https URL") as caught:
            both.connect(wire, model=MODEL, host=host).chat("Hi")
        assert caught.value.key == "host"
        assert "sesame" not in str(caught.value)

    def test_missing_features(self, connect: Any, fake: FakeOllama) -> None:
        llm = connect()
        for operation, given in ("generate", {}), ("chat", {"think": True}):
            with pytest.raises(CapabilityUnsupported):
                getattr(llm, operation)("Hi", **given)
        assert fake.requests == []

    def test_unsupported_parameter_is_a_warning(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(CHAT, events(HELLO, STOP, DONE))
        (warning,) = connect().chat("Hi", keep_alive=60).warnings
        assert "`keep_alive` has no effect" in warning


def test_provider_has_at_most_120_lines() -> None:
    assert len(SOURCE.read_text(encoding="utf-8").splitlines()) <= 120
