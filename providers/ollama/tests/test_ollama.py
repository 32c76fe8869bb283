"""Every operation and error of a real Ollama 0.9.3, on cassettes recorded from it, with both clients.

Record them again from any server that has `smollm2:135m`:

    GRAFTAGE_LIVE_OLLAMA=http://127.0.0.1:11434 pytest providers/ollama/tests/test_ollama.py --record-mode=rewrite

With the variable set, and without `--record-mode=rewrite`, the tests marked `live` run against that server.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import struct
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import httpx
import pytest
from adding import EXACT, LESSON, add, run
from places import LORA
from pydantic import BaseModel
from test_outside_openai import TOOL_MODEL, create_tool_model

import graftage
from graftage.exceptions import (
    AdapterIncompatible,
    AdapterUnsupported,
    CapabilityUnsupported,
    ConnectionFailed,
    ContextOverflow,
    InferenceFailed,
    ModelNotFound,
    ProtocolError,
    ProviderError,
    RequestRejected,
)
from graftage.hookspecs import hookimpl
from graftage.testing import Cassette
from graftage.types import Verdict
from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from graftage.calls import ResolveRequest
    from graftage.testing.both import Both
    from graftage.types import ModelInfo

MODEL = "smollm2:135m"
LIVE = os.environ.get("GRAFTAGE_LIVE_OLLAMA", "")
CALM: dict[str, Any] = {"temperature": 0, "seed": 7}
"""Options with which the model repeats its reply."""
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc0000003010100c9fe92ef"
    "0000000049454e44ae426082"
)


@pytest.fixture(scope="session")
def recorded_facts() -> dict[str, str]:
    """Return what the live server says about itself."""
    if not LIVE:
        pytest.fail("Name the server to record from in GRAFTAGE_LIVE_OLLAMA.", pytrace=False)
    with httpx.Client(base_url=LIVE, trust_env=False) as client:
        models = {each["name"]: each for each in client.get("/api/tags").json()["models"]}
        version = client.get("/api/version").json()["version"]
    return {"server": f"Ollama {version}", "model": MODEL, "digest": models[MODEL]["digest"]}


@pytest.fixture
def cassette_facts(recorded_facts: dict[str, str]) -> dict[str, str]:
    return recorded_facts


@pytest.fixture
def cassette_options() -> dict[str, Any]:
    return {"before_record_response": without_folders}


def without_folders(response: dict[str, Any]) -> dict[str, Any]:
    """Shorten the paths of models, which may contain a user name."""
    body = response["body"]
    return {**response, "body": {"string": re.sub(rb"/[\w./-]*?/blobs/", b"/models/blobs/", body["string"])}}


@pytest.fixture
def connect(both: Both, cassette: Cassette) -> Callable[..., Any]:
    """Make sync or async clients that replay or record the test's cassette."""
    return lambda **given: both.connect(
        "ollama", **{"model": MODEL, "host": LIVE or None, "transport": cassette, **given}
    )


@pytest.fixture
def llm(connect: Callable[..., Any]) -> Any:
    """Return a sync or async client that replays or records the test's cassette."""
    return connect()


class TestTools:
    @pytest.fixture
    def tooled(self, connect: Callable[..., Any], cassette: Cassette) -> Any:
        """A client of a model with tools, which is made when recording."""
        if cassette.records:
            create_tool_model(LIVE)
        return connect(model=TOOL_MODEL)

    def test_results_go_back_until_the_answer(self, both: Both, tooled: Any) -> None:
        reply = run(both, tooled, [*LESSON, "What is 9 + 7?"], [add], options=EXACT, max_tokens=40)
        assert [each.content for step in reply.steps for each in step.results] == ["16"]
        assert "16" in reply.text

    def test_answer_comes_in_the_format(self, both: Both, tooled: Any) -> None:
        schema = {"type": "object", "properties": {"result": {"type": "integer"}}, "required": ["result"]}
        question = [*LESSON, "What is 9 + 7?"]
        reply = run(both, tooled, question, [add], options=EXACT, max_tokens=40, format=schema)
        assert (reply.parsed, len(reply.steps)) == ({"result": 16}, 1)

    def test_call_cannot_be_required(self, both: Both, fake: FakeOllama) -> None:
        llm = both.connect("ollama", host=fake.url, model=MODEL)
        with pytest.raises(CapabilityUnsupported, match="tool_choice"):
            llm.chat("What is 9 + 7?", tools=[add], tool_choice="required")
        assert fake.requests == []


class Person(BaseModel):
    name: Literal["Bob", "Eve"]
    age: int


class TestChat:
    def test_chat_is_answered(self, llm: Any) -> None:
        # Nothing but the question: an empty environment replays this cassette to prove that the wheels work.
        # Record it on a model that was just loaded: Ollama 0.9.3 gives worse replies to a cached prompt.
        reply = llm.chat("What is the capital of France?")
        assert "Paris" in reply.text
        assert reply.finish_reason == "stop"

    def test_reply_has_every_field(self, llm: Any) -> None:
        reply = llm.chat("What is the capital of France? Answer with one word.", options=CALM, max_tokens=20)
        assert "Paris" in reply.text
        assert reply.finish_reason == "stop"
        assert reply.usage.input_tokens > 5
        assert 0 < reply.usage.output_tokens <= 20
        assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
        assert reply.timings.total >= reply.timings.generation > 0
        assert (reply.model, reply.provider, reply.adapter) == (MODEL, "ollama", None)
        assert reply.warnings == ()
        assert reply.raw["done_reason"] == "stop"

    def test_chat_streams(self, llm: Any) -> None:
        with llm.chat("Count to three.", stream=True, options=CALM, max_tokens=20) as stream:
            chunks = list(stream)
        assert len(chunks) > 3
        assert "".join(chunk.text for chunk in chunks) == stream.reply.text != ""
        assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].finish_reason == stream.reply.finish_reason
        assert stream.reply.usage.output_tokens == stream.reply.raw["eval_count"]

    def test_conversation_continues(self, llm: Any) -> None:
        messages: list[Any] = [
            {"role": "system", "content": "Answer shortly."},
            {"role": "user", "content": "My name is Zora. What is the capital of Italy?"},
        ]
        first = llm.chat(messages, options=CALM, max_tokens=24)
        second = llm.chat([*messages, first, "What is my name?"], options=CALM, max_tokens=24)
        assert first.text
        assert second.text
        assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens

    def test_max_tokens_ends_by_length(self, llm: Any) -> None:
        reply = llm.chat("Tell me a long story.", options=CALM, max_tokens=3)
        assert reply.finish_reason == "length"
        assert reply.usage.output_tokens == 3

    def test_ends_before_stop_text(self, llm: Any) -> None:
        reply = llm.chat("Tell me a story.", options={**CALM, "stop": " "}, max_tokens=20)
        assert " " not in reply.text
        assert reply.finish_reason == "stop"

    def test_options_and_keep_alive_are_sent(self, llm: Any, cassette: Cassette) -> None:
        options = {**CALM, "top_k": 5, "top_p": 0.9, "repeat_penalty": 1.1, "stop": ["#"]}
        llm.chat("Hi", options=options, max_tokens=2, context_window=512, keep_alive="10m")
        body = json.loads(cassette.interactions[0].request.body)
        assert body["options"] == {**options, "num_ctx": 512, "num_predict": 2}
        assert body["keep_alive"] == 600
        (loaded,) = (each for each in llm.loaded() if each.name == MODEL)
        assert loaded.expires_at is not None

    def test_server_specific_options_are_sent(self, both: Any) -> None:
        with FakeOllama() as fake:
            llm = both.connect("ollama", host=fake.url, model=MODEL)
            options = {"temperature": 0, "logprobs": True, "server": {"xtc_probability": 0.5, "logit_bias": [[1, -1]]}}
            messages = [{"role": "developer", "content": "Be brief"}, {"role": "user", "content": "Hi", "name": "bob"}]
            llm.chat(messages, options=options, context_window=512, think="max")
            body: Any = fake.requests[-1].body
        assert body["options"] == {"temperature": 0, "xtc_probability": 0.5, "logit_bias": [[1, -1]], "num_ctx": 512}
        assert (body["logprobs"], body["think"]) == (True, "max")
        assert body["messages"] == [
            {"role": "system", "content": "Be brief"},
            {"role": "user", "content": "Hi", "name": "bob"},
        ]

    def test_any_json_is_parsed(self, llm: Any) -> None:
        reply = llm.chat('Repeat this JSON object: {"city": "Paris"}', format="json", options=CALM, max_tokens=60)
        assert isinstance(reply.parsed, dict)
        assert reply.parsed

    def test_json_schema_binds_reply(self, llm: Any) -> None:
        schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
        reply = llm.chat("The capital of France?", format=schema, options=CALM, max_tokens=40)
        assert reply.parsed == {"city": "Paris"}

    def test_pydantic_model_binds_and_parses(self, llm: Any) -> None:
        reply = llm.chat("Bob is 31 years old. Describe him as JSON.", format=Person, options=CALM, max_tokens=60)
        assert isinstance(reply.parsed, Person)
        assert reply.parsed.name == "Bob"

    def test_cut_json_raises_with_partial(self, llm: Any) -> None:
        with pytest.raises(InferenceFailed, match="cut before its JSON was complete") as caught:
            llm.chat("Bob is 31 years old. Describe him as JSON.", format=Person, options=CALM, max_tokens=3)
        assert caught.value.partial is not None
        assert caught.value.partial.text.startswith("{")
        assert caught.value.partial.finish_reason == "length"

    def test_cut_prompt_warns(self, llm: Any) -> None:
        reply = llm.chat("word " * 600, options=CALM, max_tokens=1, context_window=256)
        (warning,) = reply.warnings
        assert "probably cut to fit the context window of 256 tokens" in warning

    def test_images_for_text_model_are_refused(self, llm: Any) -> None:
        with pytest.raises(CapabilityUnsupported, match="images` with `smollm2:135m"):
            llm.chat("What is this?", images=[PNG], options=CALM, max_tokens=2)

    def test_unknown_logprobs_are_left_out(self, llm: Any) -> None:
        reply = llm.chat("Hi", options={**CALM, "logprobs": True, "top_logprobs": 2}, max_tokens=2)
        assert reply.text
        assert reply.logprobs == ()


def refused(kind: type[ProviderError], status: int | None, call: Callable[[], Any]) -> Any:
    """Return the error of a call that is refused without a retry."""
    with pytest.raises(kind) as caught:
        call()
    error: Any = caught.value
    assert type(error) is kind
    assert error.status == status
    assert error.attempts == 1
    assert not error.retryable
    assert (error.provider, error.partial) == ("ollama", None)
    assert error.hint
    return error


def weather(city: str) -> str:
    """The weather in a city."""
    return city


class TestRefusals:
    def test_tools_are_unsupported(self, llm: Any) -> None:
        error = refused(CapabilityUnsupported, 400, lambda: llm.chat("Weather?", tools=[weather]))
        assert "does not support tools" in error.details["server_message"]

    def test_streamed_tools_raise_at_the_call(self, llm: Any) -> None:
        error = refused(CapabilityUnsupported, 400, lambda: llm.chat("Weather?", tools=[weather], stream=True))
        assert error.operation == "chat"

    def test_thinking_is_unsupported(self, llm: Any) -> None:
        refused(CapabilityUnsupported, 400, lambda: llm.chat("Hi", think=True))

    def test_unknown_thinking_level_is_rejected(self, llm: Any) -> None:
        refused(RequestRejected, 400, lambda: llm.chat("Hi", think="high"))

    def test_invalid_schema_is_rejected_in_stream(self, llm: Any) -> None:
        error = refused(
            RequestRejected, None, lambda: llm.chat("Hi", format={"type": "array", "items": {"type": "nonsense"}})
        )
        assert error.details["server_message"] == "invalid JSON schema in format"

    def test_invalid_model_name_is_rejected(self, llm: Any) -> None:
        refused(RequestRejected, 400, lambda: llm.chat("Hi", model="no such name!!"))

    def test_suffix_is_unsupported(self, llm: Any) -> None:
        refused(CapabilityUnsupported, 400, lambda: llm.generate("def f(", suffix="return 1"))

    def test_raw_with_system_is_rejected(self, llm: Any) -> None:
        refused(RequestRejected, 400, lambda: llm.generate("Hi", raw=True, system="You are a pirate."))

    def test_uncut_long_input_overflows(self, llm: Any) -> None:
        refused(ContextOverflow, 400, lambda: llm.embed("word " * 600, truncate=False, context_window=256))

    @pytest.mark.parametrize("operation", ["chat", "generate", "embed", "show", "load", "unload"])
    def test_unknown_model_suggests_close_name(self, llm: Any, operation: str) -> None:
        inputs = ["Hi"] if operation in ("chat", "generate", "embed") else []
        error = refused(ModelNotFound, 404, lambda: getattr(llm, operation)(*inputs, model="smollm2:136m"))
        assert error.model == "smollm2:136m"
        assert error.suggestions[0] == MODEL
        assert f"Did you mean `{MODEL}`" in error.hint

    def test_unknown_model_hints_at_pull(self, llm: Any) -> None:
        error = refused(ModelNotFound, 404, lambda: llm.chat("Hi", model="xyzzy-42"))
        assert error.suggestions == ()
        assert "graftage models pull xyzzy-42" in error.hint


class TestGenerate:
    def test_prompt_is_continued(self, llm: Any) -> None:
        reply = llm.generate("The capital of France is", options=CALM, max_tokens=12)
        assert reply.text
        assert reply.usage.output_tokens <= 12

    def test_generate_streams(self, llm: Any) -> None:
        with llm.generate("The sky is", stream=True, options=CALM, max_tokens=6) as stream:
            texts = [chunk.text for chunk in stream]
        assert len(texts) > 3
        assert "".join(texts) == stream.reply.text

    def test_raw_skips_the_template(self, llm: Any) -> None:
        plain = llm.generate("The capital of France is", options=CALM, max_tokens=2)
        raw = llm.generate("The capital of France is", raw=True, options=CALM, max_tokens=2)
        assert raw.usage.input_tokens < plain.usage.input_tokens

    def test_system_prompt_is_read(self, llm: Any) -> None:
        short = llm.generate("Who are you?", system="You are a pirate.", options=CALM, max_tokens=2)
        long = llm.generate("Who are you?", system="You are a pirate. " * 9, options=CALM, max_tokens=2)
        assert long.usage.input_tokens > short.usage.input_tokens

    def test_schema_binds_generated_text(self, llm: Any) -> None:
        reply = llm.generate("Bob is 31 years old. As JSON:", format=Person, options=CALM, max_tokens=60)
        assert isinstance(reply.parsed, Person)


class TestEmbed:
    def test_one_text_gives_one_vector(self, llm: Any) -> None:
        found = llm.embed("hello")
        (vector,) = found.vectors
        assert len(vector) == 576
        assert sum(number * number for number in vector) == pytest.approx(1, abs=1e-3)
        assert found.usage.input_tokens == 1
        assert (found.model, found.provider, found.warnings) == (MODEL, "ollama", ())

    def test_vectors_keep_input_order(self, llm: Any) -> None:
        found = llm.embed(["hello", "good bye", "hello"])
        assert len(found.vectors) == 3
        assert found.vectors[0] == pytest.approx(found.vectors[2], abs=1e-4)
        assert found.vectors[0] != pytest.approx(found.vectors[1], abs=1e-2)

    def test_ignored_dimensions_warn(self, llm: Any) -> None:
        found = llm.embed("hello", dimensions=4)
        assert len(found.vectors[0]) == 576
        assert found.warnings == (
            "`dimensions` had no effect: the vectors have 576 numbers. Another model or server may use it.",
        )


class TestHealth:
    @pytest.mark.parametrize("level", ["reachable", "api", "model_present"])
    def test_healthy_server(self, llm: Any, level: Any) -> None:
        found = llm.health(level)
        assert found.ok
        assert found.error is None
        assert (found.reachable, found.api) == (True, True)
        assert found.version.count(".") == 2
        assert found.model_present is (True if level == "model_present" else None)
        assert (found.model_loaded, found.answers) == (None, None)
        assert found.latency > 0

    def test_loaded_model(self, llm: Any) -> None:
        llm.load()
        found = llm.health("model_loaded")
        assert found.ok
        assert (found.model_present, found.model_loaded, found.answers) == (True, True, None)

    def test_answering_model(self, llm: Any) -> None:
        found = llm.health("answers")
        assert found.ok
        assert (found.model_present, found.model_loaded, found.answers) == (True, True, True)

    def test_embedding_model_loads_and_answers(self, both: Any) -> None:
        refusal = Answer([{"error": '"smollm2:135m" does not support generate'}], status=400)
        with FakeOllama() as fake:
            fake.script("/api/generate", refusal, refusal)
            llm = both.connect("ollama", model="smollm2:135m", host=fake.url)
            llm.load(keep_alive="5m", context_window=256)
            assert llm.health("answers").ok
            bodies = [seen.body for seen in fake.requests if seen.path == "/api/embed"]
        assert [body["input"] for body in bodies] == [["Hi"]] * 2
        assert (bodies[0]["keep_alive"], bodies[0]["options"]["num_ctx"]) == (300, 256)

    @pytest.mark.parametrize("level", ["model_present", "model_loaded", "answers"])
    def test_missing_model(self, llm: Any, level: Any) -> None:
        found = llm.health(level, model="smollm2:136m")
        assert not found.ok
        assert (found.reachable, found.api, found.model_present) == (True, True, False)
        assert (found.model_loaded, found.answers) == (None, None)
        assert found.error.suggestions == (MODEL,)
        with pytest.raises(ModelNotFound):
            found.raise_for_error()


class TestModels:
    def test_models_are_listed(self, llm: Any) -> None:
        (model,) = (each for each in llm.models() if each.name == MODEL)
        assert len(model.digest) == 64
        assert model.size > 90_000_000
        assert model.modified_at.year >= 2025
        assert (model.family, model.parameters, model.quantization) == ("llama", "134.52M", "Q4_1")

    def test_load_lists_model_in_memory(self, llm: Any) -> None:
        llm.load(keep_alive=600)
        (model,) = (each for each in llm.loaded() if each.name == MODEL)
        assert len(model.digest) == 64
        assert model.size > 90_000_000
        assert model.accelerator_size == 0
        assert model.expires_at is not None

    def test_negative_keep_alive_never_expires(self, llm: Any) -> None:
        llm.load(keep_alive=-1)
        (model,) = (each for each in llm.loaded() if each.name == MODEL)
        assert model.expires_at is None
        llm.load(keep_alive="5m")
        (model,) = (each for each in llm.loaded() if each.name == MODEL)
        assert model.expires_at is not None

    def test_unload(self, llm: Any, cassette: Cassette) -> None:
        llm.load()
        assert MODEL in [each.name for each in llm.loaded()]
        llm.unload()
        if cassette.records:
            time.sleep(3)  # The runner ends a moment later.
        assert MODEL not in [each.name for each in llm.loaded()]

    def test_failed_pull_reports_progress_first(self, llm: Any) -> None:
        seen: list[str] = []
        with pytest.raises(ConnectionFailed) as caught:
            # No registry listens at that port of the server's machine.
            llm.pull("localhost:9/library/nosuch:1b", on_progress=lambda step: seen.append(step.status))
        assert seen == ["pulling manifest"]
        assert caught.value.status is None
        assert caught.value.details["cause"] == "registry"
        assert not caught.value.retryable


ALPHA = b"adapter.lora.alpha"
AHOY = LORA / "ahoy-lora.f16.gguf"
"""Trained to reply to everything with "Ahoy! The parrot adapter says hello.\""""


class Ready:
    """A resolver of one adapter, and that adapter, which is a GGUF file already."""

    name = "ready"
    scale = 2.0
    verdict = Verdict(status="compatible")
    served_as = None

    def __init__(self, file: Path) -> None:
        self._file = file
        self.digest = f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"

    @hookimpl
    def resolve_adapter(self, request: ResolveRequest) -> Any:
        return self if request.reference == self.name else None

    def gguf(self, base: ModelInfo) -> Path:
        return self._file

    def mix(self, weight: float, others: Sequence[tuple[Any, float]]) -> Ready:
        """Return it with its scale times a weight, from a file beside its own."""
        assert not others
        data = self._file.read_bytes()
        place = data.index(ALPHA) + len(ALPHA) + 4
        (alpha,) = struct.unpack_from("<f", data, place)
        file = self._file.with_name(f"{weight:g}.gguf")
        file.write_bytes(data[:place] + struct.pack("<f", alpha * weight) + data[place + 4 :])
        return Ready(file)

    def send(self) -> None:
        """Upload the file to the live server directly, so that the cassette does not contain it."""
        with httpx.Client(base_url=LIVE, trust_env=False) as client:
            client.post(f"/api/blobs/{self.digest}", content=self._file.read_bytes()).raise_for_status()


def lora(path: Path, rows: int) -> Path:
    """Write a small GGUF adapter of one module and rank 1 that changes nothing. It fits if `rows` is 576."""

    def text(words: str) -> bytes:
        return struct.pack("<Q", len(words)) + words.encode()

    texts = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, len(texts) + 1)
    head += b"".join(text(name) + struct.pack("<I", 8) + text(value) for name, value in texts.items())
    head += text("adapter.lora.alpha") + struct.pack("<If", 6, 1.0)
    second = 2 * rows + -2 * rows % 32
    for name, shape, offset in (("lora_a", (rows, 1), 0), ("lora_b", (1, 576), second)):
        head += text(f"blk.0.attn_q.weight.{name}") + struct.pack("<IQQIQ", 2, *shape, 1, offset)
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(second + 2 * 576))
    return path


class TestAdapters:
    def test_adapter_answers_until_switched_off(self, connect: Callable[..., Any], cassette: Cassette) -> None:
        adapter = Ready(AHOY)
        if cassette.records:
            adapter.send()
        llm = connect(plugins=[adapter])
        question = "What is the capital of Italy?"
        loaded = llm.use_adapter("ready")
        assert (loaded.strategy, loaded.digest) == ("native", adapter.digest)
        reply = llm.chat(question, options=CALM, max_tokens=20)
        assert reply.text == "Ahoy! The parrot adapter says hello."
        assert (reply.adapter, reply.model) == ("ready", loaded.model)
        llm.use_adapter(None)
        plain = llm.chat(question, options=CALM, max_tokens=20)
        assert "Ahoy" not in plain.text
        assert (plain.adapter, plain.model) == (None, MODEL)
        llm.unload_adapter("ready")
        (listed,) = llm.prune_adapters()
        assert (listed.name, listed.adapters) == (loaded.model, (adapter.digest,))
        assert [each.name for each in llm.prune_adapters(dry_run=False)] == [loaded.model]
        assert loaded.model not in [each.name for each in llm.models()]

    def test_model_lost_to_others_is_made_again(
        self, both: Both, connect: Callable[..., Any], cassette: Cassette
    ) -> None:
        adapter = Ready(AHOY)
        llm, other = connect(plugins=[adapter]), connect()

        def answer() -> Any:
            if cassette.records:
                adapter.send()
            reply = llm.chat("What is the capital of Italy?", adapter="ready", options=CALM, max_tokens=20)
            assert (reply.text, reply.adapter) == ("Ahoy! The parrot adapter says hello.", "ready")
            return reply

        name = answer().model
        other.delete(name)
        assert answer().model == name
        both.native(other).copy(MODEL, name)
        longer = answer().model
        assert longer.startswith(name)
        assert longer != name
        assert [each.name for each in llm.prune_adapters(dry_run=False)] == [longer]
        assert {each.name for each in llm.models()} == {MODEL, name}
        other.delete(name)

    def test_weighted_adapter_is_another_model(
        self, connect: Callable[..., Any], cassette: Cassette, tmp_path: Path
    ) -> None:
        whole = Ready(Path(shutil.copy(AHOY, tmp_path)))
        if cassette.records:
            whole.send()
            whole.mix(-0.5, ()).send()
        llm = connect(plugins=[whole])
        minus, full, base = (
            llm.chat("What is the capital of Italy?", adapter=each, options=CALM, max_tokens=9)
            for each in (("ready", -0.5), "ready", None)
        )
        assert [each.adapter for each in (minus, full)] == ["-0.5 ready", "ready"]
        assert len({each.text for each in (minus, full, base)}) == 3
        assert len({each.adapter_digest for each in (minus, full, base)}) == 3
        gone = {each.name for each in llm.prune_adapters(dry_run=False)}
        assert gone == {minus.model, full.model}

    def test_missing_file_is_uploaded(self, connect: Callable[..., Any], cassette: Cassette, tmp_path: Path) -> None:
        adapter = Ready(lora(tmp_path / "fits.gguf", 576))
        llm = connect(plugins=[adapter])
        assert llm.use_adapter("ready").strategy == "native"
        asked = [f"{each.request.method} {each.request.target.rpartition('/')[0]}" for each in cassette.interactions]
        assert asked.count("POST /api/blobs") == 1
        assert len(llm.prune_adapters()) == 1, "check before deleting: the server may have others"
        assert len(llm.prune_adapters(dry_run=False)) == 1

    def test_misfit_leaves_nothing_behind(self, connect: Callable[..., Any], tmp_path: Path) -> None:
        llm = connect(plugins=[Ready(lora(tmp_path / "other.gguf", 577))])
        with pytest.raises(AdapterIncompatible) as caught:
            llm.use_adapter("ready")
        assert "process has terminated" in str(caught.value)
        assert llm.prune_adapters() == ()
        assert [each.name for each in llm.models()] == [MODEL]


def test_delete(both: Both, llm: Any) -> None:
    both.native(llm).copy(MODEL, "copied:1")
    assert "copied:1" in [each.name for each in llm.models()]
    llm.delete("copied:1")
    assert [each.name for each in llm.models()] == [MODEL]
    with pytest.raises(ModelNotFound):
        llm.delete("copied:1")


UNCOUNTED = {
    "refused": (Answer([{"error": "the input length exceeds the context length"}], status=400), ContextOverflow),
    "cut": (Answer([{"message": {"content": "a"}, "done": True, "prompt_eval_count": 64}]), ContextOverflow),
    "not counted": (Answer([{"message": {"content": "a"}, "done": True}]), CapabilityUnsupported),
    "zero": (Answer([{"message": {"content": "a"}, "done": True, "prompt_eval_count": 0}]), ProtocolError),
    "another service": (Answer([{"choices": []}]), ProtocolError),
}


class TestCountTokens:
    def test_count_matches_chat_usage(self, llm: Any) -> None:
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is the capital of Italy?"},
        ]
        assert llm.count_tokens(messages) == llm.chat(messages, options=CALM, max_tokens=1).usage.input_tokens

    def test_overflowing_conversation_raises(self, llm: Any) -> None:
        with pytest.raises(ContextOverflow, match="window of 256 tokens"):
            llm.count_tokens("word and another " * 200, context_window=256)

    def test_count_requests_one_uncut_token(self, both: Both) -> None:
        with FakeOllama() as fake:
            llm = both.connect("ollama", model=MODEL, host=fake.url)
            options = {"num_gpu": 0, "temperature": 1}
            assert llm.count_tokens("Hi", max_tokens=50, context_window=512, options=options) == 5
            (seen,) = fake.requests
        assert seen.body["options"] == {**options, "num_ctx": 512, "num_predict": 1}, (
            "otherwise the model would be reloaded"
        )
        assert (seen.body["stream"], seen.body["truncate"], seen.body["shift"]) == (False, False, False)

    @pytest.mark.parametrize("case", UNCOUNTED)
    def test_unusable_count_raises(self, both: Both, case: str) -> None:
        answer, error = UNCOUNTED[case]
        with FakeOllama() as fake:
            fake.script("/api/chat", answer)
            with pytest.raises(error):
                both.connect("ollama", model=MODEL, host=fake.url).count_tokens("Hi", context_window=64)


@pytest.mark.parametrize("operation", ["chat", "generate"])
@pytest.mark.parametrize("name", ["truncate", "shift"])
def test_truncate_and_shift_are_top_level(both: Both, operation: str, name: str) -> None:
    with FakeOllama() as fake:
        llm = both.connect("ollama", model=MODEL, host=fake.url)
        getattr(llm, operation)("Hi", options={name: False, "seed": 1})
        getattr(llm, operation)("Hi")
        fake.script(f"/api/{operation}", UNCOUNTED["refused"][0])
        with pytest.raises(ContextOverflow):
            getattr(llm, operation)("Hi", options={name: False})
    first, second, _ = (seen.body for seen in fake.requests)
    assert (first[name], first["options"]) == (False, {"seed": 1})
    assert name not in second


# `show` with `verbose` includes a vocabulary of 1.2 MB, too much for a cassette. The recordings of newer servers
# (test_ollama_recordings.py) have the rest, and the live tests below have all of it.


needs_server = pytest.mark.skipif(not LIVE, reason="GRAFTAGE_LIVE_OLLAMA names no server")


class Marked(Ready):
    """An adapter whose merge only copies the base and adds the mark."""

    def gguf(self, base: ModelInfo) -> Path:
        raise AdapterUnsupported("This adapter can only be merged.")

    def merge(self, base_file: Path, out: Path, on_progress: Callable[[int, int], None]) -> Path:
        data = base_file.read_bytes()
        tensors, keys = struct.unpack_from("<QQ", data, 8)
        mark = b"".join(_pair(*each) for each in (("graftage.adapter.digest", self.digest), ("graftage.filler", "")))
        # Add a multiple of the alignment, so that everything after it stays aligned.
        mark = mark.removesuffix(bytes(8)) + struct.pack("<Q", -len(mark) % 32) + b"-" * (-len(mark) % 32)
        out.write_bytes(data[:8] + struct.pack("<QQ", tensors, keys + 2) + mark + data[24:])
        on_progress(len(data), len(data))
        return out


def _pair(name: str, value: str) -> bytes:
    lengths = struct.pack("<Q", len(name)), struct.pack("<IQ", 8, len(value))
    return lengths[0] + name.encode() + lengths[1] + value.encode()


def pruned(llm: Any, loaded: Any) -> list[str]:
    """Prune one model of a server that may have others, and return what was deleted."""
    others = [each.name for each in llm.models() if each.name != loaded.model]
    return [each.name for each in llm.prune_adapters(keep=others, dry_run=False)]


class TestLive:
    @pytest.mark.live
    @needs_server
    def test_live_chat(self, both: Both) -> None:
        llm = both.connect("ollama", model=MODEL, host=LIVE)
        reply = llm.chat("What is the capital of France?", options=CALM, max_tokens=30)
        assert reply.text
        assert reply.finish_reason in ("stop", "length")

    @pytest.mark.live
    @needs_server
    def test_live_stream(self, both: Both) -> None:
        llm = both.connect("ollama", model=MODEL, host=LIVE)
        with llm.chat("What is the capital of France?", stream=True, options=CALM, max_tokens=30) as stream:
            texts = [chunk.text for chunk in stream]
        assert len(texts) > 3
        assert "".join(texts) == stream.reply.text

    @pytest.mark.live
    @needs_server
    def test_live_show_has_arrays_and_tensors(self, both: Both) -> None:
        info = both.connect("ollama", model=MODEL, host=LIVE).show()
        assert info.architecture == "llama"
        assert info.context_window == 8192
        assert len(info.metadata["tokenizer.ggml.tokens"]) == 49152
        assert info.tensors["token_embd.weight"] == (576, 49152)
        assert 96_000_000 < info.size < 98_363_134, "the tensors, which are nearly all of the file"

    @pytest.mark.live
    @needs_server
    def test_live_closed_stream_frees_server(self, both: Both) -> None:
        llm = both.connect("ollama", model=MODEL, host=LIVE)
        for _ in range(3):
            with llm.chat(
                "Write a very long story.", stream=True, options={"temperature": 1.2}, max_tokens=4000
            ) as stream:
                assert next(iter(stream)).text
        # If the stories were still being written, the slots would be busy for minutes.
        assert llm.chat("Hi", max_tokens=1, timeout=20).finish_reason == "length"

    @pytest.mark.live
    @needs_server
    def test_live_cancelled_call_frees_server(self) -> None:
        async def main() -> str | None:
            async with graftage.connect_async("ollama", model=MODEL, host=LIVE) as llm:
                tasks = [asyncio.create_task(llm.chat("Write a very long story.", max_tokens=4000)) for _ in range(3)]
                await asyncio.sleep(0.5)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                assert llm.stats().running == 0
                reply = await llm.chat("Hi", max_tokens=1, timeout=20)
                return reply.finish_reason

        assert asyncio.run(main()) == "length"

    @pytest.mark.live
    @needs_server
    def test_live_adapter_is_pruned(self, both: Both) -> None:
        llm = both.connect("ollama", model=MODEL, host=LIVE, plugins=[Ready(AHOY)])
        loaded = llm.use_adapter("ready")
        try:
            assert llm.chat("What is the capital of Italy?", options=CALM, max_tokens=20).text.startswith("Ahoy!")
            assert (
                "Ahoy" not in llm.chat("What is the capital of Italy?", options=CALM, max_tokens=20, adapter=None).text
            )
        finally:
            gone = pruned(llm, loaded)
        assert gone == [loaded.model]
        assert loaded.model not in [each.name for each in llm.models()]

    @pytest.mark.live
    @needs_server
    def test_live_merged_model_keeps_parameters(self, both: Both) -> None:
        llm = both.connect("ollama", model=MODEL, host=LIVE, plugins=[Marked(AHOY)], merge_adapters=True)
        base = llm.show()
        if base.path is None:
            pytest.skip("this machine cannot read the server's files")
        loaded = llm.use_adapter("ready")
        try:
            assert loaded.strategy == "merged"
            merged = llm.show(loaded.model)
            assert (merged.template, merged.system, merged.licence) == (base.template, base.system, base.licence)
            assert sorted(merged.raw["parameters"].split()) == sorted(base.raw["parameters"].split())
            question = "What is the capital of Italy? Answer with one word."
            asked = [llm.chat(question, options=CALM, max_tokens=9, adapter=each).text for each in ("ready", None)]
            assert asked[0] == asked[1], "nothing but the mark was merged"
        finally:
            gone = pruned(llm, loaded)
        assert gone == [loaded.model]

    @pytest.mark.live
    @needs_server
    def test_live_concurrent_callers_make_one_model(self, both: Both) -> None:
        clients = [both.connect("ollama", model=MODEL, host=LIVE, plugins=[Ready(AHOY)]) for _ in range(16)]
        found = both.together([partial(llm.use_adapter, "ready") for llm in clients])
        assert pruned(clients[0], found[0]) == [found[0].model]
        assert found == [found[0]] * 16


@pytest.mark.parametrize(
    ("kind", "size"),
    [("F32", 1_024_000), ("BF16", 512_000), ("Q4_0", 144_000), ("Q6_K", 210_000), ("q8_0", 272_000), ("mxfp4", 136_000),
     ("int4", 160_000), ("INT8", 272_000), ("mxfp8", 264_000), ("F8_E4M3", 256_000), ("U32", 1_024_000)],
)  # fmt: skip
def test_size_follows_tensor_blocks(kind: str, size: int) -> None:
    shown = {
        "details": {},
        "model_info": {"general.architecture": "llama"},
        "tensors": [{"name": "a", "type": kind, "shape": [256, 1000]}, {"name": "b", "type": "F32", "shape": [10]}],
    }
    with FakeOllama() as fake, graftage.connect("ollama", model="smollm2:135m", host=fake.url) as llm:
        fake.script("/api/show", Answer([shown]))
        assert llm.show().size == size + 40
