"""Recorded responses of newer servers, 0.24.0 and 0.32.15, read by the provider, with errors and faults.

The recorded requests are not those of the provider, so any request gets the recorded response. `cassettes/recordings`
has a folder for each version, and a file for each case.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from recorded import Answering

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
    RequestRejected,
    StreamInterrupted,
)
from graftage.types import Message, ToolCall

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


OLD, NEW = "0.24.0", "0.32.15"
VERSIONS = (OLD, NEW)
MODEL = "smollm2:135m"


@dataclass
class Recorded:
    """Makes clients that get recorded responses."""

    connect: Callable[..., Any]
    claim: Callable[[str], Path]
    version: str
    transport: Answering = field(init=False)

    def __call__(self, *cases: str, **settings: Any) -> Any:
        self.transport = Answering(*(self.claim(f"recordings/ollama-{self.version}/{case}.yaml") for case in cases))
        return self.connect("ollama", model=MODEL, transport=self.transport, **{"attempts": 1, **settings})


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def recorded(both: Any, version: str, claim_cassette: Any) -> Recorded:
    return Recorded(both.connect, claim_cassette, version)


CHATS = [
    "11-chat-stream",
    "12-chat-nostream",
    "13-chat-format-json",
    "13-chat-schema-nostream",
    "13-chat-schema-stream",
    "14-chat-length",
    "14-chat-stop",
    "21-tools-nostream",
    "21-tools-stream",
    "22-tools-roundtrip",
    "23-think-false",
    "23x-fc-free-nostream",
    "23x-fc-roundtrip",
    "32-option-unknown",
    "32-role-unknown",
    "34-ctx-shift-false",
    "80-next-request-after-kill-nostream",
    "80-next-request-after-kill-stream",
    "80-next-request-after-term-nostream",
    "80-next-request-after-term-stream",
]
PROMPTS = [
    "40-generate-nostream",
    "40-generate-raw",
    "40-generate-stream",
    "40-generate-system",
    "70-unload-with-prompt",
]


def check(reply: Any, lines: list[dict[str, Any]], texts: list[str]) -> None:
    """Compare a reply with the recorded lines."""
    last = lines[-1]
    assert reply.text == "".join(texts)
    assert reply.finish_reason == last["done_reason"]
    assert reply.usage.input_tokens == last["prompt_eval_count"]
    assert reply.usage.output_tokens == last["eval_count"]
    assert reply.timings.total == pytest.approx(last["total_duration"] / 1e9)
    assert reply.timings.load == pytest.approx(last["load_duration"] / 1e9)
    assert reply.timings.generation == pytest.approx(last["eval_duration"] / 1e9)
    assert reply.model == last["model"]
    assert reply.warnings == ()
    assert reply.raw == last


class TestTools:
    @pytest.mark.parametrize("case", ["23x-fc-forced-nostream", "23x-fc-forced-stream"])
    def test_call_keeps_its_id(self, recorded: Recorded, case: str) -> None:
        reply = recorded(case).chat("Weather?", tools=[{"name": "get_weather"}], format={"type": "object"})
        (call,) = reply.tool_calls
        found = next(line["message"]["tool_calls"] for line in recorded.transport.lines)
        assert (call.name, call.arguments) == ("get_weather", {"city": "Paris"})
        assert call.id == found[0]["id"] != ""
        assert reply.finish_reason == "tool_calls"
        assert reply.raw["done_reason"] == "stop"
        assert reply.parsed is None

    def test_result_returns_under_same_id(self, recorded: Recorded) -> None:
        llm = recorded("23x-fc-forced-stream", "23x-fc-roundtrip")
        asked = llm.chat("Weather?", tools=[{"name": "get_weather"}])
        (call,) = asked.tool_calls
        result = Message(role="tool", content="11 degrees, rain", tool_name=call.name, tool_call_id=call.id)
        answer = llm.chat(["Weather?", asked, result], tools=[{"name": "get_weather"}])
        body = json.loads(recorded.transport.requests[1].body)
        assert body["messages"][1] == {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": call.id, "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}],
        }
        assert body["messages"][2] == {
            "role": "tool",
            "content": "11 degrees, rain",
            "tool_name": "get_weather",
            "tool_call_id": call.id,
        }
        assert answer.text
        assert isinstance(call, ToolCall)

    def test_schema_keeps_nested_types(self, recorded: Recorded) -> None:
        def plan(stops: list[dict[str, int]], mode: str = "car") -> str:
            """Plan a trip.

            Args:
                stops: where to go
                mode: how to go
            """
            return mode

        recorded("21-tools-stream").chat("Go", tools=[plan])
        (tool,) = json.loads(recorded.transport.requests[0].body)["tools"]
        assert tool["type"] == "function"
        assert tool["function"]["name"] == "plan"
        stops = tool["function"]["parameters"]["properties"]["stops"]
        assert stops["items"] == {"additionalProperties": {"type": "integer"}, "type": "object"}
        assert stops["description"] == "where to go"


class TestReplies:
    @pytest.mark.parametrize("case", CHATS)
    def test_chat_matches_recording(self, recorded: Recorded, case: str) -> None:
        reply = recorded(case).chat("Hi")
        lines = recorded.transport.lines
        check(reply, lines, [line["message"]["content"] for line in lines])

    @pytest.mark.parametrize("case", PROMPTS)
    def test_generate_matches_recording(self, recorded: Recorded, case: str) -> None:
        reply = recorded(case).generate("Hi")
        lines = recorded.transport.lines
        check(reply, lines, [line["response"] for line in lines])

    def test_each_line_is_a_chunk(self, recorded: Recorded) -> None:
        with recorded("11-chat-stream").chat("Hi", stream=True) as stream:
            texts = [chunk.text for chunk in stream]
        assert texts == [line["message"]["content"] for line in recorded.transport.lines]

    @pytest.mark.parametrize("case", ["13-chat-schema-nostream", "13-chat-schema-stream"])
    def test_schema_reply_is_parsed(self, recorded: Recorded, case: str) -> None:
        reply = recorded(case).chat("Describe Bob", format={"type": "object"})
        assert reply.parsed["name"] == "Bob"

    @pytest.mark.parametrize("version", [OLD], indirect=True)
    def test_json_reply_is_parsed(self, recorded: Recorded) -> None:
        assert isinstance(recorded("13-chat-format-json").chat("Capital?", format="json").parsed, dict)

    @pytest.mark.parametrize("version", [NEW], indirect=True)
    def test_cut_json_raises_with_partial(self, recorded: Recorded) -> None:
        with pytest.raises(InferenceFailed, match="cut before its JSON was complete") as caught:
            recorded("13-chat-format-json").chat("Capital?", format="json")
        assert caught.value.partial is not None
        assert caught.value.partial.finish_reason == "length"

    @pytest.mark.parametrize("case", ["14-chat-logprobs", "14-chat-logprobs-stream"])
    def test_logprobs_have_alternatives(self, recorded: Recorded, case: str) -> None:
        reply = recorded(case).chat("Hi", options={"logprobs": True, "top_logprobs": 2})
        assert [each.token for each in reply.logprobs] == ["I", "'m", " so"]
        assert all(each.logprob < 0 for each in reply.logprobs)
        assert [len(each.top) for each in reply.logprobs] == [2, 2, 2]
        assert reply.logprobs[0].top[0].logprob == reply.logprobs[0].logprob
        assert reply.text == "I'm so"

    @pytest.mark.parametrize("version", [OLD], indirect=True)
    @pytest.mark.parametrize("case", ["24-images-unsupported", "24-images-generate-unsupported"])
    def test_older_servers_ignore_images(self, recorded: Recorded, case: str) -> None:
        llm = recorded(case)
        ask = llm.generate if "generate" in case else llm.chat
        assert ask("What is this?", images=[b"\x89PNG"]).text == "This is a"

    def test_cut_prompt_warns(self, recorded: Recorded) -> None:
        reply = recorded("34-ctx-truncate-default").chat("word " * 3000, context_window=256)
        (warning,) = reply.warnings
        assert "probably cut to fit the context window of 256 tokens" in warning

    def test_empty_conversation_only_loads(self, recorded: Recorded) -> None:
        reply = recorded("10-chat-load-empty").chat("Hi")
        assert (reply.text, reply.finish_reason) == ("", "load")

    @pytest.mark.parametrize("case", ["70-unload-keepalive0-chat", "70-unload-keepalive0-generate"])
    def test_unload_is_the_finish_reason(self, recorded: Recorded, case: str) -> None:
        llm = recorded(case)
        reply = llm.generate("Hi") if "generate" in case else llm.chat("Hi")
        assert (reply.text, reply.finish_reason) == ("", "unload")


class TestEmbed:
    def test_order_and_dimensions(self, recorded: Recorded) -> None:
        found = recorded("42-embedmodel-embed-list").embed(["hello world", "good bye", "hello world"], dimensions=4)
        assert [len(vector) for vector in found.vectors] == [4, 4, 4]
        assert found.vectors[0] == found.vectors[2] != found.vectors[1]
        assert found.usage.input_tokens == 7
        assert found.model == "smollm2-embed:135m"
        assert found.warnings == ()

    def test_one_text_gives_one_vector(self, recorded: Recorded) -> None:
        found = recorded("42-embedmodel-embed").embed("hello world", dimensions=4)
        assert len(found.vectors) == 1
        assert found.usage.input_tokens == 2
        assert found.timings.total > 0

    @pytest.mark.parametrize("version", [OLD], indirect=True)
    @pytest.mark.parametrize(
        ("case", "inputs", "length"), [("41-embed", ["hello world"], 576), ("41-embed-list", ["hello", "world"], 8)]
    )
    def test_any_model_embeds_on_older_servers(
        self, recorded: Recorded, case: str, inputs: list[str], length: int
    ) -> None:
        found = recorded(case).embed(inputs)
        assert [len(vector) for vector in found.vectors] == [length] * len(inputs)

    def test_empty_embeddings_raise(self, recorded: Recorded) -> None:
        with pytest.raises(ProtocolError, match="0 for 1"):
            recorded("41-embed-empty").embed("x")


class TestModels:
    def test_health_reads_version(self, recorded: Recorded) -> None:
        found = recorded("01-version").health()
        assert found.ok
        assert found.version == recorded.version

    def test_list_has_server_facts(self, recorded: Recorded) -> None:
        models = recorded("02-tags").models()
        names = [model.name for model in models]
        assert len(names) == len(set(names)) >= 2
        found = models[names.index(MODEL)]
        assert (found.family, found.parameters, found.quantization) == ("llama", "134.52M", "Q4_1")
        if recorded.version == NEW:
            assert found.context_window == 8192
            assert found.features == {"chat", "generate", "structured_output", "logprobs"}
            assert "tools" in models[names.index("smollm2-tools:135m")].features
        else:
            assert (found.context_window, found.features) == (None, None)

    @pytest.mark.parametrize(
        ("case", "features"),
        [
            ("03-show", {"chat", "generate", "structured_output", "logprobs"}),
            ("03-show-tools-model", {"chat", "generate", "structured_output", "logprobs", "tools"}),
            ("23x-fc-show", {"chat", "generate", "structured_output", "logprobs", "tools"}),
            ("42-embedmodel-show", {"embed"}),
        ],
    )
    def test_show_has_features(self, recorded: Recorded, case: str, features: set[str]) -> None:
        info = recorded(case).show("SmolLM2")
        assert info.name == "smollm2:latest"
        assert info.features == features
        assert info.architecture == "llama"
        assert info.context_window == 8192
        assert (info.parameters, info.quantization) == ("134.52M", "Q4_1")
        assert info.tensors["token_embd.weight"] == (576, 49152)
        assert info.metadata["llama.block_count"] == 30
        assert info.modified_at.year == 2026
        assert (info.path, info.adapters) == (None, ())
        assert json.loads(recorded.transport.requests[0].body) == {"model": "SmolLM2", "verbose": True}

    @pytest.mark.parametrize("case", ["02-ps-idle", "11-ps-loaded", "71-ps-10m"])
    def test_loaded_has_window_and_expiry(self, recorded: Recorded, case: str) -> None:
        (model,) = recorded(case).loaded()
        assert model.name.startswith("smollm2")
        assert model.context_window == 4096
        assert model.expires_at.year == 2026
        assert model.size > 190_000_000
        assert model.accelerator_size == 0
        assert len(model.digest) == 64

    def test_negative_keep_alive_never_expires(self, recorded: Recorded) -> None:
        (model,) = recorded("71-ps-minus1").loaded()
        assert "2319" in recorded.transport.lines[0]["models"][0]["expires_at"]
        assert model.expires_at is None

    @pytest.mark.parametrize("case", ["70-ps-after-unload", "70-ps-after-unload-prompt"])
    def test_unloaded_models_are_not_listed(self, recorded: Recorded, case: str) -> None:
        assert MODEL not in [model.name for model in recorded(case).loaded()]

    @pytest.mark.parametrize("case", ["40-generate-load", "71-keepalive-5m", "71-keepalive-minus1"])
    def test_load_sends_keep_alive(self, recorded: Recorded, case: str) -> None:
        seconds = {"71-keepalive-5m": "5m", "71-keepalive-minus1": -1}.get(case)
        assert recorded(case).load(keep_alive=seconds, context_window=2048) is None
        body = json.loads(recorded.transport.requests[0].body)
        assert body.pop("keep_alive", None) == {"5m": 300, -1: -1}.get(seconds)
        assert body == {"model": MODEL, "stream": False, "options": {"num_ctx": 2048}}

    def test_unload_sends_zero_keep_alive(self, recorded: Recorded) -> None:
        assert recorded("70-unload-keepalive0-generate").unload() is None
        body = json.loads(recorded.transport.requests[0].body)
        assert body == {"model": MODEL, "stream": False, "keep_alive": 0}


@dataclass(frozen=True)
class Refusal:
    """The error for a case; a dictionary by version if they differ."""

    case: str
    kind: Any
    status: Any
    operation: str = "chat"
    retryable: bool = False
    words: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    versions: tuple[str, ...] = VERSIONS

    def of(self, version: str, name: str) -> Any:
        value = getattr(self, name)
        return value[version] if isinstance(value, dict) and set(value) == set(VERSIONS) else value


REFUSALS = [
    Refusal("03-show-empty", RequestRejected, 400, "show", words="model is required"),
    Refusal("03-show-unknown", ModelNotFound, 404, "show"),
    Refusal("13-chat-format-bad", RequestRejected, 500, words="invalid format"),
    Refusal("13-chat-format-number", RequestRejected, 500, words="invalid format"),
    Refusal("13-chat-format-badschema", RequestRejected, {OLD: 500, NEW: 400}, words="schema"),
    Refusal("20-tools-unsupported", CapabilityUnsupported, 400, words="does not support tools"),
    Refusal("20-tools-unsupported-stream", CapabilityUnsupported, 400, words="does not support tools"),
    Refusal("22-tools-bad-args-string", RequestRejected, 400, words="can't find closing"),
    Refusal("23-think-level-bad", RequestRejected, 400, words="invalid think value"),
    Refusal("23-think-unsupported", CapabilityUnsupported, 400, words="does not support thinking"),
    Refusal("24-images-bad-base64", RequestRejected, 400, words="illegal base64"),
    Refusal("24-images-unsupported", CapabilityUnsupported, 400, words="multimodal", versions=(NEW,)),
    Refusal("24-images-generate-unsupported", CapabilityUnsupported, 400, "generate", versions=(NEW,)),
    Refusal("25-suffix-unsupported", CapabilityUnsupported, 400, "generate", words="does not support insert"),
    Refusal("30-chat-bad-model-name", RequestRejected, 400, words="invalid model name"),
    Refusal("30-chat-no-model", RequestRejected, 400, words="model is required"),
    Refusal("30-chat-unknown-model", ModelNotFound, 404),
    Refusal("30-chat-unknown-model-nostream", ModelNotFound, 404),
    Refusal("30-embed-unknown-model", ModelNotFound, 404, "embed"),
    Refusal("30-generate-unknown-model", ModelNotFound, 404, "generate"),
    Refusal("32-keepalive-bad", RequestRejected, 400, words="invalid duration"),
    Refusal("32-option-wrong-type", RequestRejected, 500, words="must be of type float32"),
    Refusal("33-forbidden-host", AuthenticationFailed, 403, "models"),
    Refusal("33-forbidden-origin", AuthenticationFailed, 403),
    Refusal("33-get-chat", ProtocolError, 405),
    Refusal("33-unknown-path", ProtocolError, 404, "loaded"),
    Refusal("33-unknown-path", ProtocolError, 404, "embed"),
    Refusal(
        "34-ctx-truncate-false", ContextOverflow, 400, facts={OLD: {}, NEW: {"n_prompt_tokens": 3010, "n_ctx": 256}}
    ),
    Refusal(
        "34-ctx-truncate-false-stream",
        ContextOverflow,
        400,
        facts={OLD: {}, NEW: {"n_prompt_tokens": 3010, "n_ctx": 256}},
    ),
    Refusal("40-generate-raw-context-bad", RequestRejected, 400, "generate", words="raw mode"),
    Refusal("41-embed", CapabilityUnsupported, 501, "embed", words="--embeddings", versions=(NEW,)),
    Refusal("41-embed-list", CapabilityUnsupported, 501, "embed", versions=(NEW,)),
    Refusal("41-embed-badtype", RequestRejected, 400, "embed", words="invalid input type"),
    Refusal("41-embed-truncate-false", ContextOverflow, 400, "embed"),
    Refusal("42-embedmodel-embed-long-truncate-false", ContextOverflow, 400, "embed"),
    Refusal("42-embedmodel-chat", CapabilityUnsupported, 400, words="does not support chat"),
    Refusal("42-embedmodel-chat-nostream", CapabilityUnsupported, 400, words="does not support chat"),
    Refusal("42-embedmodel-generate", CapabilityUnsupported, 400, "generate", words="does not support generate"),
    Refusal("66-pull-offline", ConnectionFailed, None, "pull", words="connection refused"),
    Refusal("66-pull-offline-nostream", ConnectionFailed, 500, "pull", words="connection refused"),
    Refusal("80-runner-kill-mid-nostream", InferenceFailed, 500, retryable=True, words="unexpected EOF"),
    Refusal("80-runner-term-mid-nostream", InferenceFailed, 500, retryable=True, words="unexpected EOF"),
    Refusal("82-runner-killed-before-first-token-stream", InferenceFailed, 500, retryable=True),
    Refusal("82-runner-killed-before-first-token-nostream", InferenceFailed, 500, retryable=True),
    Refusal("82-runner-killed-while-loading", ModelLoadFailed, 500, retryable=True, facts={"reason": "crashed"}),
    Refusal("82-runner-killed-while-loading", ModelLoadFailed, 500, "load", retryable=True),
    Refusal("90-q3-other-model-stream", Overloaded, 503, retryable=True, facts={"retry_after": None}),
    Refusal("92-cold-burst-2", Overloaded, 503, retryable=True, facts={"retry_after": None}),
]
ADAPTERS = {
    "83-chat-lora-not-adapter": ("incompatible", None),
    "83-chat-lora-unknown-tensor": ("crashed", "crashed"),
    "83-chat-lora-wrong-arch": ("crashed", "crashed"),
    "83-chat-lora-wrong-shape": ("incompatible", "crashed"),
}
"""Adapters that do not fit: the reason of the load failure by version; None if the model was not created."""
REFUSALS += [
    Refusal(
        f"{case}-{mode}",
        ModelLoadFailed if reason else ModelNotFound,
        500 if reason else 404,
        retryable=reason == "crashed",
        facts={"reason": reason} if reason else {},
        versions=(version,),
    )
    for case, reasons in ADAPTERS.items()
    for version, reason in zip(VERSIONS, reasons, strict=True)
    for mode in ("stream", "nostream")
]
TABLE = [
    pytest.param(version, each, id=f"{version}-{each.case}-{each.operation}")
    for each in REFUSALS
    for version in each.versions
]


class TestFailures:
    @pytest.mark.parametrize(("version", "expected"), TABLE, indirect=["version"])
    def test_refusal_is_typed(self, recorded: Recorded, expected: Refusal) -> None:
        llm = recorded(expected.case)
        inputs = ["Hi"] if expected.operation in ("chat", "generate", "embed") else []
        with pytest.raises(ProviderError) as caught:
            getattr(llm, expected.operation)(*inputs)
        error: Any = caught.value
        assert type(error) is expected.kind
        assert error.status == expected.of(recorded.version, "status")
        assert error.retryable is expected.retryable
        assert error.partial is None
        assert (error.provider, error.attempts) == ("ollama", 1)
        assert error.hint
        assert expected.words.lower() in error.details["server_message"].lower()
        for name, value in expected.of(recorded.version, "facts").items():
            assert (getattr(error, name) if hasattr(error, name) else error.details[name]) == value
        # After "not found", the client lists the models, once.
        assert len(recorded.transport.requests) == (2 if expected.kind is ModelNotFound else 1)

    @pytest.mark.parametrize("case", ["33-forbidden-host", "33-unknown-path"])
    def test_refusing_server_is_reachable_but_unhealthy(self, recorded: Recorded, case: str) -> None:
        found = recorded(case).health()
        assert (found.reachable, found.api, found.ok) == (True, False, False)

    @pytest.mark.parametrize("case", ["80-runner-kill-mid-stream", "80-runner-term-mid-stream"])
    @pytest.mark.parametrize("stream", [True, False])
    def test_dead_runner_leaves_partial(self, recorded: Recorded, case: str, *, stream: bool) -> None:
        llm = recorded(case, attempts=3)
        ask = (lambda: list(llm.chat("A story", stream=True))) if stream else (lambda: llm.chat("A story"))
        with pytest.raises(InferenceFailed) as caught:
            ask()
        *said, error = recorded.transport.lines
        partial = caught.value.partial
        assert partial is not None
        assert partial.text == "".join(line["message"]["content"] for line in said) != ""
        assert partial.finish_reason is None
        assert caught.value.status is None
        assert caught.value.details["server_message"] == error["error"]
        assert len(recorded.transport.requests) == 1, "a reply that has begun is not retried"

    @pytest.mark.parametrize("case", ["81-client-disconnect-mid-stream", "85-server-killed-mid-stream"])
    def test_cut_connection_leaves_partial(self, recorded: Recorded, case: str) -> None:
        with pytest.raises(StreamInterrupted) as caught:
            recorded(case, attempts=3).chat("A story")
        partial = caught.value.partial
        assert partial is not None
        assert partial.text == "".join(line["message"]["content"] for line in recorded.transport.lines) != ""
        assert len(recorded.transport.requests) == 1

    @pytest.mark.parametrize(
        "fault",
        [
            "82-runner-killed-before-first-token-stream",
            "82-runner-killed-while-loading",
            "90-q3-other-model-stream",
            "92-cold-burst-2",
        ],
    )
    def test_failure_before_first_token_is_retried(self, recorded: Recorded, fault: str) -> None:
        llm = recorded(fault, "80-next-request-after-kill-stream", attempts=2)
        assert llm.chat("Hi").text == "I'm so"
        assert llm.stats().retries == 1
        first, second = recorded.transport.requests
        assert first.body == second.body

    def test_failed_pull_reports_progress_first(self, recorded: Recorded) -> None:
        steps: list[str] = []
        with pytest.raises(ConnectionFailed):
            recorded("66-pull-offline").pull(on_progress=lambda step: steps.append(step.status))
        assert steps == ["pulling manifest"]
