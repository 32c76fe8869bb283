"""Recorded responses of three servers, read by the provider, with errors and faults.

The recorded requests are not those of the provider, so any request gets the recorded response. `cassettes/recordings`
has a folder for each server, and a file for each case.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from recorded import Answering

from graftage.exceptions import (
    AuthenticationFailed,
    CapabilityUnsupported,
    ContextOverflow,
    InferenceFailed,
    ModelNotFound,
    Overloaded,
    ProviderError,
    RequestRejected,
    StreamInterrupted,
)
from graftage.http.transport import ReadResponse
from graftage.types import Usage

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from graftage.http import Clock, Request, Response

SERVERS = {"mlx": "mlx-lm-0.32.2", "llama-server": "llama-server-b11549", "ollama-v1": "ollama-0.9.3"}
WEATHER = {"name": "get_weather"}


class Serving(Answering):
    """Also says that the server has no adapters."""

    async def send(self, request: Request, clock: Clock) -> Response:
        if request.url.endswith("/lora-adapters"):
            return ReadResponse(200, "OK", (), b"[]")
        return await super().send(request, clock)


class Recorded:
    """Makes clients that get recorded responses."""

    def __init__(self, connect: Callable[..., Any], claim: Callable[[str], Path]) -> None:
        self._connect = connect
        self._claim = claim

    def __call__(self, server: str, *cases: str, **settings: Any) -> Any:
        self.transport = Serving(*(self._claim(f"recordings/{SERVERS[server]}/{case}.yaml") for case in cases))
        given = {"host": "http://127.0.0.1:8081/v1", "model": "smollm2:135m", "attempts": 1, "profile": server}
        return self._connect("openai", transport=self.transport, **{**given, **settings})

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events of the first response, read without the provider."""
        lines = b"".join(self.transport.interactions[0].chunks).splitlines()
        return [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]

    @property
    def text(self) -> str:
        """The text in these events."""
        choices = [choice for each in self.events for choice in each.get("choices", ())]
        return "".join(each.get("delta", {}).get("content") or "" for each in choices)


@pytest.fixture
def recorded(both: Any, claim_cassette: Any) -> Recorded:
    return Recorded(both.connect, claim_cassette)


class TestChat:
    @pytest.mark.parametrize(
        ("profile", "case", "usage"),
        [
            ("mlx", "11-chat-stream-usage", Usage(input_tokens=27, output_tokens=4, cached_tokens=26)),
            ("llama-server", "11-chat-stream-usage", Usage(input_tokens=27, output_tokens=8, cached_tokens=26)),
            ("llama-server", "11-chat-stream-progress", Usage(cached_tokens=24)),
            ("ollama-v1", "11-chat-stream-usage", Usage(input_tokens=27, output_tokens=8)),
        ],
    )
    def test_stream_is_read(self, recorded: Recorded, profile: str, case: str, usage: Usage) -> None:
        llm = recorded(profile, case)
        with llm.chat("Hi", stream=True) as stream:
            assert "".join(chunk.text for chunk in stream) == recorded.text
        assert stream.reply.text == recorded.text != ""
        assert stream.reply.usage == usage
        assert stream.reply.finish_reason in ("stop", "length")
        assert stream.reply.model == recorded.events[0]["model"]

    @pytest.mark.parametrize(
        ("profile", "case"),
        [
            ("mlx", "21-tools-call-stream"),
            ("llama-server", "21-tools-call-required-stream"),
            ("ollama-v1", "21-tools-call-stream"),
        ],
    )
    def test_tool_is_called(self, recorded: Recorded, profile: str, case: str) -> None:
        llm = recorded(profile, case)
        reply = llm.chat("Weather?", tools=[WEATHER])
        (call,) = reply.tool_calls
        assert (call.name, call.arguments, reply.finish_reason) == ("get_weather", {"city": "Paris"}, "tool_calls")
        assert json.dumps(call.id) in json.dumps(recorded.events)

    def test_cut_call_was_dropped_by_the_server(self, recorded: Recorded) -> None:
        reply = recorded("mlx", "21-tools-call-cut-stream").chat("Weather?", tools=[WEATHER])
        assert (reply.text, reply.tool_calls, reply.finish_reason) == ("", (), "length")

    def test_thought_is_apart(self, recorded: Recorded) -> None:
        reply = recorded("llama-server", "23-reasoning-stream").chat("Even?")
        assert (reply.thinking, reply.text) == ("5 is odd.\n", "No.")

    @pytest.mark.parametrize(("profile", "case"), [("mlx", "14-logprobs"), ("llama-server", "14-logprobs-stream")])
    def test_logprobs_are_read(self, recorded: Recorded, profile: str, case: str) -> None:
        reply = recorded(profile, case).chat("Hi", options={"logprobs": True, "top_logprobs": 2})
        assert [len(each.top) for each in reply.logprobs] == [2, 2]
        assert all(each.logprob <= 0 for each in reply.logprobs)

    def test_second_choice_is_left_out(self, recorded: Recorded) -> None:
        llm = recorded("llama-server", "15-n-2-stream")
        assert recorded.text == "TheThe capital capital"
        assert llm.chat("Hi").text == "The capital"

    @pytest.mark.parametrize("profile", ["mlx", "llama-server"])
    def test_prompt_is_continued(self, recorded: Recorded, profile: str) -> None:
        llm = recorded(profile, "40-completions-stream")
        reply = llm.generate("The capital of France is", raw=True)
        assert reply.text.strip() == "Paris."
        assert (reply.usage.input_tokens, reply.usage.output_tokens) == (5, 2)


class TestOtherOperations:
    @pytest.mark.parametrize("profile", ["llama-server", "ollama-v1"])
    def test_vectors_are_read(self, recorded: Recorded, profile: str) -> None:
        found = recorded(profile, "42-embeddings-base64").embed("hello")
        assert [len(vector) for vector in found.vectors] == [576]
        assert sum(each * each for each in found.vectors[0]) == pytest.approx(1, abs=0.01)
        assert found.usage.input_tokens == 1

    @pytest.mark.parametrize("case", ["02-v1-models", "02-v1-models-without-a-cache-folder"])
    def test_default_model_is_listed(self, recorded: Recorded, case: str) -> None:
        names = [model.name for model in recorded("mlx", case).models()]
        assert names[0] == "default_model"
        assert len(names) == (2 if case == "02-v1-models" else 1)

    @pytest.mark.parametrize("profile", [None, "mlx"])
    def test_dead_engine_is_unhealthy(self, recorded: Recorded, profile: Any) -> None:
        health = recorded("mlx", "02-v1-models", "82-health-after-thread-died", profile=profile).health()
        assert (health.reachable, health.api, health.server) == (True, False, "mlx_lm.server")
        assert isinstance(health.error, InferenceFailed)


REFUSALS: dict[tuple[str, str], tuple[type[ProviderError], int | None, bool, str]] = {
    ("mlx", "24-image-to-text-model"): (CapabilityUnsupported, 404, False, "images"),
    ("mlx", "30-unknown-model-stream"): (ModelNotFound, 404, False, "does not have"),
    ("mlx", "31-messages-empty"): (RequestRejected, 404, False, "empty conversation"),
    ("mlx", "82-chat-stream-after-thread-died"): (InferenceFailed, 404, False, "Restart the server"),
    ("llama-server", "01-loading-chat"): (Overloaded, 503, True, "loading"),
    ("llama-server", "20-tools-malformed"): (RequestRejected, 500, False, "Missing tool type"),
    ("llama-server", "21-tools-call-parallel-stream"): (InferenceFailed, 500, False, "call of a tool"),
    ("llama-server", "33-no-key-stream"): (AuthenticationFailed, 401, False, "api_key"),
    ("llama-server", "34-overflow-stream"): (ContextOverflow, 400, False, "931 tokens"),
    ("ollama-v1", "20-tools-stream"): (CapabilityUnsupported, 400, False, "does not support tools"),
    ("ollama-v1", "30-unknown-model-stream"): (ModelNotFound, 404, False, "does not have"),
    ("ollama-v1", "33-forbidden-host"): (AuthenticationFailed, 403, False, "host name"),
    ("ollama-v1", "80-runner-killed-mid-plain"): (InferenceFailed, 500, True, "has ended"),
}


class TestFailures:
    @pytest.mark.parametrize(("profile", "case"), REFUSALS)
    def test_refusal_is_typed(self, recorded: Recorded, profile: str, case: str) -> None:
        kind, status, retryable, words = REFUSALS[profile, case]
        with pytest.raises(ProviderError, match=words) as caught:
            recorded(profile, case).chat("Hi")
        error = caught.value
        assert (type(error), error.status, error.retryable) == (kind, status, retryable)
        assert (error.provider, error.partial, bool(error.hint)) == ("openai", None, True)

    @pytest.mark.parametrize(
        ("profile", "case", "kind"),
        [
            ("mlx", "85-server-killed-mid-stream", StreamInterrupted),
            ("llama-server", "85-server-killed-mid-stream", StreamInterrupted),
            ("ollama-v1", "85-server-killed-mid-stream", StreamInterrupted),
            ("ollama-v1", "80-runner-killed-mid-stream", InferenceFailed),
        ],
    )
    @pytest.mark.parametrize("stream", [True, False])
    def test_cut_stream_leaves_partial(
        self, recorded: Recorded, profile: str, case: str, kind: Any, *, stream: bool
    ) -> None:
        llm = recorded(profile, case, attempts=3)
        with pytest.raises(kind) as caught:
            list(llm.chat("Hi", stream=True)) if stream else llm.chat("Hi")
        assert caught.value.partial is not None
        assert caught.value.partial.text == recorded.text != ""
        assert "A provider" not in str(caught.value), "the advice is for users"
        assert len(recorded.transport.requests) == 1, "a reply that has begun is not retried"

    def test_cut_call_is_an_error(self, recorded: Recorded) -> None:
        with pytest.raises(InferenceFailed, match="max_tokens"):
            recorded("llama-server", "21-tools-call-cut-stream").chat("Weather?", tools=[WEATHER])

    def test_figures_of_the_window_are_kept(self, recorded: Recorded) -> None:
        with pytest.raises(ContextOverflow) as caught:
            recorded("llama-server", "34-overflow-stream").chat("Hi")
        assert (caught.value.details["n_prompt_tokens"], caught.value.details["n_ctx"]) == (931, 512)
