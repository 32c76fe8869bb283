"""Common behaviour of all providers: one set of tests for `echo`, Ollama and the embedded engine.

Differences are declared capabilities, never skipped tests: what a provider does not declare it must refuse by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from graftage.exceptions import CapabilityUnsupported, ModelNotFound, RequestRejected
from graftage.testing import Echo
from graftage_ollama.testing import FakeOllama


@dataclass
class Subject:
    """A provider under test."""

    provider: Any
    model: str
    settings: dict[str, Any] = field(default_factory=dict)

    def connect(self, both: Any) -> Any:
        llm = both.connect(self.provider, model=self.model, **self.settings)
        llm.health()  # Opens an async client, which then knows its capabilities.
        return llm


def _echo() -> Iterator[Subject]:
    yield Subject(Echo(strict=True), "echo:latest")


def _ollama() -> Iterator[Subject]:
    with FakeOllama(reply='{"n": 1}') as fake:
        yield Subject("ollama", "smollm2:135m", {"host": fake.url})


def _llamacpp() -> Iterator[Subject]:
    yield Subject("llamacpp", "small", {"context_window": 2048})


KINDS: dict[str, Callable[[], Iterator[Subject]]] = {"echo": _echo, "ollama": _ollama, "llamacpp": _llamacpp}


@pytest.fixture(params=["echo", "ollama", pytest.param("llamacpp", marks=pytest.mark.engine)])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    if request.param == "llamacpp":
        request.getfixturevalue("small_store")
    yield from KINDS[request.param]()


class TestChat:
    def test_gives_text_reason_and_usage(self, subject: Subject, both: Any) -> None:
        reply = subject.connect(both).chat("Say hello.", max_tokens=8)
        assert reply.text
        assert reply.finish_reason in ("stop", "length")
        assert reply.usage.input_tokens
        assert reply.usage.output_tokens
        assert reply.model
        assert reply.message.role == "assistant"

    def test_stream_equals_the_plain_reply(self, subject: Subject, both: Any) -> None:
        llm = subject.connect(both)
        options = {"temperature": 0.0, "seed": 1}
        plain = llm.chat("Say hello.", max_tokens=8, options=options)
        with llm.chat("Say hello.", max_tokens=8, options=options, stream=True) as stream:
            chunks = list(stream)
        assert "".join(chunk.text for chunk in chunks) == plain.text == stream.reply.text
        assert [chunk.finish_reason is not None for chunk in chunks].count(True) == 1
        assert chunks[-1].finish_reason == plain.finish_reason

    def test_reply_names_its_provider(self, subject: Subject, both: Any) -> None:
        llm = subject.connect(both)
        reply = llm.chat("Say hello.", max_tokens=4)
        assert reply.provider == llm.provider
        assert reply.adapter is None

    def test_several_turns(self, subject: Subject, both: Any) -> None:
        messages = [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "My name is Ada."},
            {"role": "assistant", "content": "Hello Ada."},
            {"role": "user", "content": "Say hello."},
        ]
        assert subject.connect(both).chat(messages, max_tokens=8).text

    def test_early_close_leaves_nothing_running(self, subject: Subject, both: Any) -> None:
        llm = subject.connect(both)
        stream = llm.chat("Tell me a very long story.", stream=True)
        next(stream)
        stream.close()
        assert llm.stats().running == 0
        assert llm.chat("Say hello.", max_tokens=4).text

    def test_unknown_model_is_not_found(self, subject: Subject, both: Any) -> None:
        with pytest.raises(ModelNotFound) as caught:
            subject.connect(both).chat("Hello", model="no-such-model:1b")
        assert caught.value.operation == "chat"
        assert caught.value.model == "no-such-model:1b"
        assert caught.value.provider

    def test_unknown_option_is_refused(self, subject: Subject, both: Any) -> None:
        with pytest.raises(RequestRejected, match="temperatur"):
            subject.connect(both).chat("Hello", options={"temperatur": 1.0})


class TestModels:
    def test_health_reaches_the_model(self, subject: Subject, both: Any) -> None:
        llm = subject.connect(both)
        assert llm.health("api").ok
        assert llm.health("model_present").ok
        assert llm.health("answers").ok
        assert llm.health("model_loaded").ok
        missing = llm.health("model_present", model="no-such-model:1b")
        assert not missing.ok
        assert missing.model_present is False

    def test_listed_and_shown(self, subject: Subject, both: Any) -> None:
        llm = subject.connect(both)
        assert subject.model in [model.name for model in llm.models()]
        assert llm.show().name == subject.model

    def test_loaded_one_is_listed_as_loaded(self, subject: Subject, both: Any) -> None:
        llm = subject.connect(both)
        llm.load()
        assert subject.model in [model.name for model in llm.loaded()]

    def test_present_one_is_pulled_at_once(self, subject: Subject, both: Any) -> None:
        steps: list[Any] = []
        assert subject.connect(both).pull(on_progress=steps.append).status == "success"
        assert steps


def _embeds(llm: Any) -> None:
    vectors = llm.embed(["one", "two"]).vectors
    assert len(vectors) == 2
    assert len(vectors[0]) == len(vectors[1]) > 0


def _generates(llm: Any) -> None:
    assert llm.generate("Once upon a time", max_tokens=8).text


def _answers_or_says_why(call: Callable[[], Any]) -> bool:
    """Return whether a declared feature works, or is refused with a hint if the model lacks it."""
    try:
        return call().finish_reason is not None
    except CapabilityUnsupported as error:
        return bool(error.hint)


class TestFeatures:
    def test_each_input_has_a_vector(self, subject: Subject, both: Any) -> None:
        llm = subject.connect(both)
        _or_refuses(llm, "embed", lambda: _embeds(llm))

    def test_prompt_is_continued(self, subject: Subject, both: Any) -> None:
        llm = subject.connect(both)
        _or_refuses(llm, "generate", lambda: _generates(llm))

    @pytest.mark.parametrize("feature", ["tools", "thinking", "images", "suffix", "logprobs"])
    def test_undeclared_ones_are_refused(self, feature: str, subject: Subject, both: Any) -> None:
        llm = subject.connect(both)
        calls: dict[str, Callable[[], Any]] = {
            "tools": lambda: llm.chat("Hello", tools=[{"name": "now"}], max_tokens=2),
            "thinking": lambda: llm.chat("Hello", think=True, max_tokens=2),
            "images": lambda: llm.chat("Hello", images=[b"\x89PNG"], max_tokens=2),
            "suffix": lambda: llm.generate("Hello", suffix="end", max_tokens=2),
            "logprobs": lambda: llm.chat("Hello", options={"logprobs": True}, max_tokens=2),
        }
        if feature in llm.capabilities().features:
            assert _answers_or_says_why(calls[feature])
        else:
            with pytest.raises((CapabilityUnsupported, RequestRejected)):
                calls[feature]()

    def test_schema_gives_parsed_data(self, subject: Subject, both: Any) -> None:
        llm = subject.connect(both)
        schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
        _or_refuses(llm, "structured_output", lambda: _parses(llm, schema))


def _parses(llm: Any, schema: Any) -> None:
    # `echo` and the fake return the text; a model follows the schema.
    assert isinstance(llm.chat('{"n": 1}', format=schema, max_tokens=80).parsed["n"], int)


def test_closed_client_raises(subject: Subject, both: Any) -> None:
    llm = subject.connect(both)
    llm.chat("Say hello.", max_tokens=2)
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.chat("Hello")


def _or_refuses(llm: Any, feature: str, behaves: Callable[[], None]) -> None:
    if feature in llm.capabilities().features:
        behaves()
    else:
        with pytest.raises(CapabilityUnsupported):
            behaves()
