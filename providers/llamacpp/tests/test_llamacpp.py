"""The embedded provider with its engine and a model: every operation and refusal."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self, cast

import pydantic
import pytest
from adding import EXACT, LESSON, add, run, subtract
from engine_fixtures import eventually
from gguf_files import figure, flag, gguf, head, number, tensor, word, words_of
from small_engine import LONG, MODEL, WINDOW, write_embedder

import graftage
from graftage._engine.driving import drive
from graftage._engine.schemas import read_tools
from graftage._values import LONGEST_STAY
from graftage.calls import Call, ChatRequest
from graftage.exceptions import (
    CapabilityUnsupported,
    ContextOverflow,
    InferenceFailed,
    ModelLoadFailed,
    ModelNotFound,
    Overloaded,
    ProtocolError,
    ProviderTimeout,
    RequestRejected,
    SettingsError,
    StreamInterrupted,
)
from graftage.gguf import read_file
from graftage.http.completions import read_embeddings
from graftage.testing import Cassette
from graftage.types import Message
from graftage_llamacpp import DEFAULT_MODEL, _convert, _engine

if TYPE_CHECKING:
    from suite import Watcher

    from graftage.testing.both import Both

pytestmark = [pytest.mark.engine, pytest.mark.by_turns]

FRANCE = "What is the capital of France?"
SURE = {"temperature": 0.0}
"""Options that make replies repeatable."""


@pytest.fixture
def llm(both: Any, small_store: Path) -> Any:
    return both.connect("llamacpp", context_window=1024)


@pytest.fixture
def default(both: Any, engine_store: Path) -> Any:
    """Return a client of the default model."""
    return both.connect("llamacpp", context_window=1024)


def patched(source: Path, out: Path, key: str, value: bytes) -> Path:
    """Copy a model with another value of the same length for a key."""
    shutil.copyfile(source, out)
    with out.open("r+b") as file:
        name = len(key).to_bytes(8, "little") + key.encode()
        file.seek(file.read(4 << 20).index(name) + len(name) + 4)  # Its type takes four bytes.
        file.write(value)
    return out


class TestGenerate:
    def test_schema_binds_raw_completion(self, llm: Any) -> None:
        schema = {"enum": ["red", "green"]}
        assert (
            llm.generate("The grass is", raw=True, format=schema, max_tokens=8, options=SURE).parsed in schema["enum"]
        )

    def test_raw_skips_the_template(self, default: Any) -> None:
        raw = default.generate("One two three four", raw=True, max_tokens=1)
        assert raw.usage.input_tokens == 4
        assert default.generate("One two three four", max_tokens=1).usage.input_tokens > 10


class TestChat:
    def test_default_model(self, default: Any) -> None:
        reply = default.chat(FRANCE, max_tokens=8, options=SURE)
        assert "Paris" in reply.text
        assert reply.model == DEFAULT_MODEL
        assert reply.provider == "llamacpp"

    def test_reply_has_usage_and_timings(self, llm: Any) -> None:
        reply = llm.chat(FRANCE, max_tokens=4, options=SURE)
        assert reply.finish_reason == "length"
        assert reply.usage.output_tokens == 4
        assert reply.usage.input_tokens > 10
        assert reply.timings.load > 0
        assert reply.timings.prompt > 0
        assert reply.timings.generation > 0
        assert llm.chat(FRANCE, max_tokens=1).timings.load is None

    def test_stream_gives_same_text(self, llm: Any) -> None:
        plain = llm.chat(FRANCE, max_tokens=16, options=SURE)
        stream = llm.chat(FRANCE, max_tokens=16, options=SURE, stream=True)
        texts = [chunk.text for chunk in stream]
        assert len(texts) > 5
        assert "".join(texts) == plain.text == stream.reply.text
        (first, second) = plain.usage, stream.reply.usage
        assert (first.input_tokens, first.output_tokens) == (second.input_tokens, second.output_tokens)
        assert second.cached_tokens > 0

    def test_default_system_prompt(self, llm: Any) -> None:
        plain = llm.chat("Hi", max_tokens=1).usage.input_tokens
        messages = [{"role": "system", "content": _convert.SYSTEM_PROMPT}, {"role": "user", "content": "Hi"}]
        same = llm.chat(messages, max_tokens=1)
        empty = llm.chat([{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}], max_tokens=1)
        assert same.usage.input_tokens == plain
        assert empty.usage.input_tokens < plain

    def test_defaults_are_deterministic(self, default: Any) -> None:
        assert {default.chat(FRANCE, max_tokens=6).text.strip() for _ in range(3)} == {"The capital of France is Paris"}
        warm = {"temperature": 2.0, "top_p": 1.0, "min_p": 0.0}
        assert len({default.chat(FRANCE, max_tokens=12, options={"seed": seed, **warm}).text for seed in range(3)}) == 3

    def test_seed_repeats_the_reply(self, llm: Any) -> None:
        options = {"seed": 7, "temperature": 1.5}
        first = llm.chat("Invent a word.", max_tokens=12, options=options).text
        assert llm.chat("Invent a word.", max_tokens=12, options=options).text == first
        others = {llm.chat("Invent a word.", max_tokens=12, options={**options, "seed": seed}).text for seed in (8, 9)}
        assert others != {first}

    def test_ends_before_stop_text(self, default: Any) -> None:
        reply = default.chat(FRANCE, max_tokens=40, options={**SURE, "stop": "Paris"})
        assert reply.finish_reason == "stop"
        assert reply.text
        assert "Paris" not in reply.text

    def test_logprobs_have_alternatives(self, llm: Any) -> None:
        for reply in (
            llm.chat(FRANCE, max_tokens=3, options={**SURE, "logprobs": True, "top_logprobs": 2}),
            llm.generate("Once upon", raw=True, max_tokens=3, options={**SURE, "logprobs": True, "top_logprobs": 2}),
        ):
            assert "".join(each.token for each in reply.logprobs) == reply.text
            for each in reply.logprobs:
                assert len(each.top) == 2
                assert each.logprob == max(other.logprob for other in each.top) <= 0

    def test_logprobs_alone(self, llm: Any) -> None:
        reply = llm.chat(FRANCE, max_tokens=2, options={"logprobs": True})
        assert [each.top for each in reply.logprobs] == [(), ()]

    def test_pydantic_model_binds_and_parses(self, default: Any) -> None:
        class City(pydantic.BaseModel):
            name: str = pydantic.Field(max_length=20)
            population: int = pydantic.Field(ge=0, le=99)

        reply = default.chat("Describe Paris.", format=City, max_tokens=80, options=SURE)
        assert isinstance(reply.parsed, City)

    def test_json_format_gives_object(self, default: Any) -> None:
        reply = default.chat('Write {"a": 1}', format="json", max_tokens=60, options={**SURE, "repeat_penalty": 1.0})
        assert isinstance(reply.parsed, dict)

    def test_cut_json_raises_with_partial(self, llm: Any) -> None:
        with pytest.raises(InferenceFailed, match="max_tokens") as caught:
            llm.chat("Count.", format={"type": "array", "items": {"type": "integer"}, "minItems": 100}, max_tokens=10)
        assert caught.value.partial is not None
        assert caught.value.partial.text.startswith("[")

    def test_concurrent_requests_are_answered(self, both: Any, small_store: Path) -> None:
        llm = both.connect("llamacpp", context_window=512, slots=2)
        calls = [lambda: llm.chat(FRANCE, max_tokens=8, options=SURE).text] * 4
        answers = both.together(calls)
        assert len(set(answers)) == 1
        assert isinstance(answers[0], str)


THINKER: Any = SimpleNamespace(architecture="llama", template="{{ enable_thinking }}", figure={}.get)
"""The header of a model that can think."""


@pytest.mark.parametrize(("think", "on"), [("max", True), ("low", True), ("none", False), (True, True), (False, False)])
def test_thinking_and_engine_options_are_sent(think: Any, on: bool) -> None:
    options = {"seed": 1, "dry_multiplier": 0.8, "stream": False, "chat_template_kwargs": {"custom": 1}}
    messages = (Message(role="system", content="Be brief"), Message(role="user", content="Hi", name="bob"))
    request = ChatRequest(call=Call(), model="m", messages=messages, think=think, options=options, max_tokens=3)
    body = _convert.chat_body(request, THINKER)
    effort = {"reasoning_effort": think} if isinstance(think, str) else {}
    assert body == {
        "seed": 1,
        "dry_multiplier": 0.8,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 3,
        "messages": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi", "name": "bob"}],
        "chat_template_kwargs": {"custom": 1, "enable_thinking": on, **effort},
    }


@pytest.mark.parametrize(
    ("choice", "names", "sent"),
    [(None, ["add", "subtract"], None), ("required", ["add", "subtract"], "required"), ("add", ["add"], "required")],
)
def test_tool_choice_is_sent(choice: str | None, names: list[str], sent: str | None) -> None:
    messages, tools = (Message(role="user", content="Hi"),), read_tools([add, subtract])
    request = ChatRequest(call=Call(), model="m", messages=messages, tools=tools, tool_choice=choice)
    body = _convert.chat_body(request, cast("Any", SimpleNamespace(architecture="", template="tools", figure={}.get)))
    assert ([each["function"]["name"] for each in body["tools"]], body.get("tool_choice")) == (names, sent)


TOOL_TEMPLATE = (
    "{{'<|im_start|>system\nYou call add.<|im_end|>\n' if tools}}"
    "{% for m in messages %}{{'<|im_start|>'+m.role+'\n'+(m.content or '')}}{% for c in m.tool_calls or [] %}"
    "{{'<tool_call>{\"name\": \"'+c.function.name+'\", \"arguments\": '+(c.function.arguments|tojson)+'}</tool_call>'}}"
    "{% endfor %}{{'<|im_end|>\n'}}{% endfor %}{{'<|im_start|>assistant\n' if add_generation_prompt}}"
)


@pytest.fixture(scope="module")
def tool_model(engine_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model with that template, which has spaces in its last tag for the same length."""
    source, out = engine_models / "smollm2-135m.gguf", tmp_path_factory.mktemp("tools") / "tools.gguf"
    length = len(read_file(source).template.encode())
    template = TOOL_TEMPLATE[:-2].ljust(length - 2) + "}}"
    return patched(source, out, "tokenizer.chat_template", length.to_bytes(8, "little") + template.encode())


class TestTools:
    """The default model learns from the conversation to call tools."""

    @pytest.fixture
    def tooled(self, both: Both, tool_model: Path) -> Any:
        return both.connect("llamacpp", model=str(tool_model), context_window=1024)

    @pytest.mark.slow
    def test_named_tool_is_called_and_answered(self, both: Both, tooled: Any) -> None:
        question = [*LESSON[-8:], "What is 9 + 7?"]  # The model would call `add`.
        limits = {"options": EXACT, "max_tokens": 40}
        reply = run(both, tooled, question, [add, subtract], tool_choice="subtract", **limits)
        assert [(each.tool_name, each.content) for each in reply.steps[0].results] == [("subtract", "2")]
        assert "2" in reply.text

    def test_cut_before_required_call_is_an_error(self, tooled: Any) -> None:
        with pytest.raises(InferenceFailed, match="was cut before the call") as caught:
            list(tooled.chat(FRANCE, tools=[add], tool_choice="required", max_tokens=3, options=SURE, stream=True))
        assert caught.value.partial is not None
        assert caught.value.partial.text


class TestRefusals:
    def test_tools_without_template_support(self, default: Any) -> None:
        with pytest.raises(CapabilityUnsupported, match="tools") as caught:
            default.chat("What time is it?", tools=[{"name": "now"}])
        assert caught.value.model == DEFAULT_MODEL
        assert "tools" not in default.show().features
        assert "tools" in default.capabilities().features

    def test_tools_with_template_support(self, both: Any, tmp_path: Path) -> None:
        template = (
            "{% if tools %}{{'<|im_start|>system\n'}}{% for t in tools %}{{t|tojson}}{% endfor %}{{'<|im_end|>\n'}}"
            "{% endif %}{% for m in messages %}{{'<|im_start|>'+m['role']+'\n'+(m['content'] or '')+'<|im_end|>\n'}}"
            "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
        )
        path = tmp_path / "tooled.gguf"
        MODEL.write_for_engine(path, template)
        llm = both.connect("llamacpp", model=str(path), context_window=1024)
        assert "tools" in llm.show().features
        without = llm.chat("Hello", max_tokens=4)
        tool = {"name": "now", "description": "Tells the time of day.", "parameters": {"type": "object"}}
        reply = llm.chat("Hello", max_tokens=4, tools=[tool])
        assert reply.finish_reason in ("length", "stop", "tool_calls")
        assert reply.usage.input_tokens > without.usage.input_tokens + 10

    def test_thinking_images_and_suffix(self, llm: Any) -> None:
        with pytest.raises(CapabilityUnsupported, match="thinking"):
            llm.chat("Hello", think=True)
        with pytest.raises(CapabilityUnsupported, match="images"):
            llm.chat("Hello", images=[b"\x89PNG"])
        with pytest.raises(CapabilityUnsupported, match="suffix"):
            llm.generate("Hello", suffix="end")
        assert llm.chat("Hello", think=False, max_tokens=1).text

    def test_invalid_schema(self, llm: Any) -> None:
        with pytest.raises(RequestRejected, match="nonsense"):
            llm.chat("Hello", format={"type": "array", "items": {"type": "nonsense"}})

    def test_raw_with_system_prompt(self, llm: Any) -> None:
        with pytest.raises(RequestRejected, match="system"):
            llm.generate("Hello", raw=True, system="Be kind.")
        with pytest.raises(RequestRejected, match="empty"):
            llm.generate("", raw=True)

    def test_overflow_gives_token_counts(self, llm: Any) -> None:
        with pytest.raises(ContextOverflow, match="1024") as caught:
            llm.chat("word " * 2000)
        assert caught.value.details["n_ctx"] == 1024
        assert caught.value.details["n_prompt_tokens"] > 2000

    def test_model_larger_than_memory(self, both: Any, engine_store: Path, tmp_path: Path) -> None:
        heads = (1 << 22).to_bytes(4, "little")
        path = patched(
            engine_store / "smollm2-135m.gguf", tmp_path / "huge.gguf", "llama.attention.head_count_kv", heads
        )
        with pytest.raises(ModelLoadFailed, match="MB are free") as caught:
            both.connect("llamacpp", model=str(path), context_window=1024).chat("Hello")
        assert caught.value.reason == "memory"
        assert caught.value.details["needed"] > caught.value.details["free"] > 0
        assert "98 MB of weights" in str(caught.value)

    def test_engine_error_without_memory_check(self, both: Any, engine_store: Path, tmp_path: Path) -> None:
        layers = (31).to_bytes(4, "little")
        path = patched(engine_store / "smollm2-135m.gguf", tmp_path / "odd.gguf", "llama.block_count", layers)
        with pytest.raises(ModelLoadFailed, match=r"blk\.30") as caught:
            both.connect("llamacpp", model=str(path), memory_check=False).chat("Hello")
        assert caught.value.reason == "incompatible"


class TestKeepAlive:
    def test_zero_unloads_the_model(self, llm: Any) -> None:
        llm.chat("Hello", max_tokens=1, keep_alive=600)
        (loaded,) = llm.loaded()
        assert loaded.expires_at is not None
        llm.chat("Hello", max_tokens=1, keep_alive=0)
        assert eventually(lambda: llm.loaded() == ())

    @pytest.mark.parametrize("stay", [LONGEST_STAY, math.inf], ids=["a hundred years", "for ever"])
    def test_longest_stay(self, llm: Any, stay: float) -> None:
        llm.chat("Hello", max_tokens=1, keep_alive=stay)
        (loaded,) = llm.loaded()
        assert (loaded.expires_at is None) == (stay == math.inf)


@pytest.mark.parametrize(
    "figures", [{"context_window": 1}, {"threads": 513}, {"gpu_layers": 2**31}, {"batch": 8193}, {"slots": 65}], ids=str
)
def test_numbers_that_crash_the_engine_are_refused(both: Any, small_store: Path, figures: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match=next(iter(figures))):
        both.opened("llamacpp", **figures)


class TestContextWindow:
    def test_larger_than_trained_is_lowered_with_warning(self, both: Any, small_store: Path) -> None:
        llm = both.connect("llamacpp", context_window=WINDOW + 1)
        assert any(str(WINDOW) in each for each in llm.chat("Hello", max_tokens=1).warnings)
        assert llm.loaded()[0].context_window == WINDOW

    def test_change_restarts_engine_with_warning(self, llm: Any) -> None:
        assert llm.chat("Hello", max_tokens=1).warnings == ()
        reply = llm.chat("Hello", max_tokens=1, context_window=512)
        assert any("512" in each for each in reply.warnings)
        assert [each.context_window for each in llm.loaded()] == [512]

    def test_smaller_one_of_another_call_is_not_kept(self, both: Any, small_store: Path) -> None:
        llm = both.connect("llamacpp", models_path=small_store)
        assert llm.chat("Hello", max_tokens=1, context_window=64).finish_reason == "length"
        assert llm.count_tokens("Hello " * 50) > 64
        assert [each.context_window for each in llm.loaded()] == [64]
        assert llm.chat("Hello " * 50, max_tokens=1).finish_reason == "length"

    def test_smallest_window_works(self, llm: Any) -> None:
        assert llm.generate("a", raw=True, max_tokens=1, context_window=2).usage.output_tokens == 1


class TestModels:
    def test_show_includes_vocabulary(self, default: Any, engine_store: Path) -> None:
        shown = default.show()
        assert shown.architecture == "llama"
        assert shown.parameters == "134.52M"
        assert shown.quantization == "Q4_1"
        assert shown.context_window == 8192
        assert shown.licence == "Apache-2.0"
        assert shown.digest.startswith("sha256:b179c952")
        assert shown.size == 98_362_432
        assert shown.path == engine_store / "smollm2-135m.gguf"
        assert len(shown.metadata["tokenizer.ggml.tokens"]) == 49152
        assert shown.tensors["token_embd.weight"] == (576, 49152)
        assert {"chat", "embed", "structured_output", "logprobs"} <= shown.features

    def test_list_leaves_vocabulary_out(self, default: Any) -> None:
        (listed,) = default.models()
        assert listed.name == DEFAULT_MODEL
        assert "tokenizer.ggml.tokens" not in listed.metadata

    def test_loaded_model_has_memory_size(self, default: Any) -> None:
        assert default.loaded() == ()
        default.load()
        (loaded,) = default.loaded()
        assert loaded.name == DEFAULT_MODEL
        assert loaded.context_window == 1024
        assert loaded.expires_at is None
        status = Path(f"/proc/{loaded.raw['pid']}/status").read_text(encoding="ascii")
        resident = int(status.split("VmRSS:")[1].split()[0]) * 1024
        assert loaded.size == pytest.approx(resident, rel=0.1)
        default.unload()
        assert default.loaded() == ()
        default.unload()

    def test_path_names_a_model(self, both: Any, engine_store: Path, tmp_path: Path) -> None:
        path = tmp_path / "mine.gguf"
        path.symlink_to(engine_store / "smollm2-135m.gguf")
        llm = both.connect("llamacpp", model=str(path), models_path=tmp_path / "none", context_window=512)
        assert "Paris" in llm.chat(FRANCE, max_tokens=8, options=SURE).text
        assert llm.show().path == path

    @pytest.mark.parametrize("operation", ["chat", "generate", "embed", "load"])
    def test_unknown_model_suggests_close_name(self, operation: str, default: Any) -> None:
        arguments = () if operation == "load" else ("Hello",)
        with pytest.raises(ModelNotFound, match="smollm2:135m") as caught:
            getattr(default, operation)(*arguments, model="smollm2:1m")
        assert caught.value.suggestions == (DEFAULT_MODEL,)


class TestHealth:
    def test_checks_no_further_than_asked(self, llm: Any) -> None:
        api = llm.health("api")
        assert api.ok
        assert api.version
        assert api.model_present is None
        assert llm.loaded() == ()
        loaded = llm.health("model_loaded")
        assert loaded.model_present
        assert loaded.model_loaded is False
        answers = llm.health("answers")
        assert answers.ok
        assert len(llm.loaded()) == 1

    def test_embedding_model_loads_and_answers(self, both: Any, tmp_path: Path) -> None:
        write_embedder(tmp_path / "embedder.gguf")
        llm = both.connect("llamacpp", model="embedder", models_path=tmp_path)
        llm.load()
        assert llm.health("answers").ok
        with pytest.raises(CapabilityUnsupported, match="chat"):
            llm.chat("Hello")

    def test_missing_model(self, llm: Any) -> None:
        health = llm.health("model_loaded", model="other")
        assert health.api
        assert health.model_present is False
        assert isinstance(health.error, ModelNotFound)


class TestCancellation:
    def test_closed_stream_frees_engine(self, llm: Any) -> None:
        stream = llm.chat("Count.", stream=True, **LONG)
        next(iter(stream))
        stream.close()
        # With one slot, the next reply would wait a minute if the first were still being written.
        assert llm.chat("Hello", max_tokens=1, timeout=10).text
        assert llm.stats().running == 0

    def test_dropped_stream_frees_engine(self, small_store: Path) -> None:
        with graftage.connect("llamacpp", context_window=1024) as llm:
            for _ in llm.chat("Count.", stream=True, **LONG):
                break
            assert llm.chat("Hello", max_tokens=1, timeout=10).text

    def test_cancelled_task_frees_engine(self, small_store: Path) -> None:
        async def work() -> str:
            async with graftage.connect_async("llamacpp", context_window=1024) as llm:
                await llm.load()
                task = asyncio.ensure_future(llm.chat("Count.", **LONG))
                await asyncio.sleep(0.5)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                return str((await llm.chat("Hello", max_tokens=1, timeout=10)).text)

        assert asyncio.run(work())

    def test_cancelled_start_leaves_working_client(self, small_store: Path) -> None:
        async def work() -> str:
            async with graftage.connect_async("llamacpp", context_window=1024) as llm:
                task = asyncio.ensure_future(llm.chat("Hello"))
                await asyncio.sleep(0.05)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                return str((await llm.chat("Hello", max_tokens=1)).text)

        assert asyncio.run(work())

    def test_timeout_frees_engine(self, llm: Any) -> None:
        llm.load(context_window=LONG["context_window"])
        with pytest.raises(ProviderTimeout) as caught:
            llm.chat("Count.", timeout=1, **LONG)
        assert caught.value.phase == "total"
        assert llm.chat("Hello", max_tokens=1, timeout=10).text


def test_recording_has_no_key(both: Any, small_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.yaml"
    tape = Cassette(path, mode="all")
    llm = both.connect("llamacpp", context_window=512, transport=tape)
    recorded = llm.chat(FRANCE, max_tokens=8, options=SURE)
    (engine,) = _engine.engines()
    assert engine.process is not None
    key = engine.process.key
    llm.close()
    tape.save()
    written = path.read_text(encoding="utf-8")
    assert "/v1/chat/completions" in written
    assert key not in written
    again = both.connect("llamacpp", context_window=512, transport=Cassette(path))
    assert again.chat(FRANCE, max_tokens=8, options=SURE).text == recorded.text
    assert again.loaded() == ()


PROGRESS = b'data: {"choices":[{"delta":{}}],"prompt_progress":{"total":9,"cache":1,"processed":%d,"time_ms":0}}\n\n'
TEXT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'


class TestPromptProgress:
    def test_events_count_the_prompt_tokens(self, both: Any, engine_store: Path, watcher: Watcher) -> None:
        llm = both.connect("llamacpp", batch=96, context_window=256, plugins=[watcher])
        prompt = "One word and another. " * 20
        count = llm.count_tokens(prompt)
        assert "prompt_progress" not in watcher.kinds()
        reply = llm.chat(prompt, max_tokens=2, options=SURE)
        assert reply.usage.input_tokens == count > 96
        assert llm.count_tokens(prompt * 4) > 256, "a prompt that does not fit is counted, too"
        kinds = watcher.kinds("chat")
        reported = [event.prompt for event in watcher.events if event.prompt is not None]
        assert (reported[0].processed, reported[-1].processed) == (0, count)
        assert {each.total for each in reported} == {count}
        assert len(reported) > 2
        assert kinds == ["start", "admitted", *["prompt_progress"] * len(reported), "first_chunk", "finish"]
        llm.chat("Hi", max_tokens=1)
        assert watcher.kinds("chat")[len(kinds) :] == ["start", "admitted", "first_chunk", "finish"]

    @pytest.mark.parametrize(
        ("pieces", "passed_on", "reported"),
        [
            ([PROGRESS % 1, PROGRESS % 9, TEXT], [TEXT], [1, 9]),
            ([PROGRESS % 1 + PROGRESS % 9 + TEXT, TEXT], [TEXT, TEXT], [1, 9]),
            ([b":\n\n", PROGRESS % 9 + b":\n\n", TEXT], [b":\n\n", b":\n\n", TEXT], [9]),
            ([PROGRESS % 1, TEXT[:20], TEXT[20:]], [TEXT[:20], TEXT[20:]], [1]),
            ([PROGRESS[:20], (PROGRESS % 1)[20:], TEXT], [PROGRESS[:20], (PROGRESS % 1)[20:], TEXT], []),
            ([PROGRESS % 1], [], [1]),
            ([TEXT, TEXT.replace(b'"a"', b'"\\"prompt_progress\\""')], None, []),
        ],
        ids=["separate", "together", "with comments", "before split text", "split", "alone", "as text"],
    )
    def test_events_are_cut_from_the_response(
        self, pieces: list[bytes], passed_on: list[bytes] | None, reported: list[int]
    ) -> None:
        seen: list[int] = []
        call = Call(emit=lambda kind, prompt: seen.append(prompt.processed))
        leased = _engine._LeasedResponse(cast("Any", Said(*pieces)), cast("Any", SimpleNamespace(use=None)), call)
        found = []
        while piece := drive(leased.read()):
            found.append(piece)
        assert found == (pieces if passed_on is None else passed_on)
        assert seen == reported


def reranker(path: Path) -> Path:
    """Write a model that gives each document the same score."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "\u2581a", "\u2581b"]
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (32, len(words)), "position_embd": (32, 64), "token_types": (32, 2), "token_embd_norm": (32,),
        **{f"blk.0.{name}": (32, 32) for name in ("attn_q", "attn_k", "attn_v", "attn_output")},
        **{f"blk.0.{name}": (32,) for name in ("attn_output_norm", "layer_output_norm")},
        "blk.0.ffn_up": (32, 64), "blk.0.ffn_down": (64, 32), "cls": (32, 32), "cls.output": (32, 1),
    }  # fmt: skip
    sizes = {f"{name}.weight": shape for name, shape in shapes.items()}
    sizes |= {f"{name}.bias": shape[1:] or shape for name, shape in shapes.items() if "embd" not in name}
    sizes["token_embd_norm.bias"] = (32,)
    del sizes["token_types.bias"]
    keys = head(
        "bert", figure("bert.feed_forward_length", 64), figure("bert.attention.head_count", 2),
        figure("bert.pooling_type", 4), number("bert.attention.layer_norm_epsilon", 1e-12),
        flag("bert.attention.causal", False), figure("tokenizer.ggml.token_type_count", 2),
        word("tokenizer.ggml.model", "bert"), words_of("tokenizer.ggml.tokens", words),
        *(figure(f"tokenizer.ggml.{name}_token_id", place) for place, name in enumerate(
            ("padding", "unknown", "cls", "seperator", "mask"))),
        figure("tokenizer.ggml.bos_token_id", 2), figure("tokenizer.ggml.eos_token_id", 3),
    )  # fmt: skip
    tensors, place = [], 0
    for name, shape in sizes.items():
        tensors.append(tensor(name, shape, offset=place))
        place += -(-4 * math.prod(shape) // 32) * 32
    path.write_bytes(gguf(keys, tensors, data=place))
    return path


class TestRerank:
    def test_ranking_model_only_ranks(self, both: Any, tmp_path: Path) -> None:
        reranker(tmp_path / "ranks.gguf")
        llm = both.connect("llamacpp", model="ranks", models_path=tmp_path, context_window=64)
        found = llm.rerank("a", ["b", "a b", "b a b"])
        assert sorted(each.index for each in found.results) == [0, 1, 2]
        assert (found.model, found.usage.input_tokens) == ("ranks", 15)
        assert llm.show().features == {"rerank"}
        for act in (llm.embed, llm.chat, llm.count_tokens):
            with pytest.raises(CapabilityUnsupported, match="`ranks` does not support"):
                act("a")
        with pytest.raises(ContextOverflow):
            llm.rerank("a " * 50, ["b " * 50])

    def test_chat_model_does_not_rank(self, llm: Any) -> None:
        with pytest.raises(CapabilityUnsupported, match="does not support `rerank`"):
            llm.rerank("a", ["b"])


class Saying:
    """A transport that answers each chat with the same events, without an engine."""

    colour = None

    def __init__(self, *events: dict[str, Any], end: str = "data: [DONE]\n\n") -> None:
        self._body = "".join(f"data: {json.dumps(each)}\n\n" for each in events) + end

    def wrap(self, network: Any) -> Self:
        return self

    async def send(self, request: Any, clock: Any) -> Said:
        return Said(self._body.encode())

    async def close(self) -> None:
        pass


class Said:
    """A response in pieces."""

    status, reason, headers = 200, "OK", (("content-type", "text/event-stream"),)

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = iter(pieces)

    async def read(self) -> bytes:
        return next(self._pieces, b"")

    async def close(self) -> None:
        pass


def delta(finish: str | None = None, **what: Any) -> dict[str, Any]:
    """Return an event of a reply."""
    return {"choices": [{"delta": what, "finish_reason": finish}]}


class TestEmbed:
    def test_vectors_have_length_one(self, default: Any) -> None:
        found = default.embed(["The cat sat.", "Stocks fell.", "The cat sat."])
        assert [len(vector) for vector in found.vectors] == [576] * 3
        assert [sum(each * each for each in vector) for vector in found.vectors] == [pytest.approx(1, abs=1e-3)] * 3
        assert found.vectors[0] == pytest.approx(found.vectors[2], abs=1e-3)
        assert found.vectors[0] != pytest.approx(found.vectors[1], abs=1e-2)
        assert found.usage.input_tokens > 3

    def test_long_input_is_cut_or_refused(self, llm: Any) -> None:
        found = llm.embed(["short", "word " * 600])
        assert len(found.vectors) == 2
        assert any("Input 1 was cut" in each for each in found.warnings)
        with pytest.raises(ContextOverflow, match="512"):
            llm.embed("word " * 600, truncate=False)

    def test_other_dimensions_are_unsupported(self, llm: Any) -> None:
        assert len(llm.embed("cat", dimensions=MODEL.hidden).vectors[0]) == MODEL.hidden
        with pytest.raises(CapabilityUnsupported, match=f"{MODEL.hidden}"):
            llm.embed("cat", dimensions=32)

    def test_misnumbered_vectors_raise(self) -> None:
        data = [{"index": 0, "embedding": [1.0]}, {"index": 0, "embedding": [2.0]}]
        with pytest.raises(ProtocolError, match="2 vectors, which are not numbered"):
            read_embeddings({"data": data})


def calling(function: dict[str, Any]) -> Saying:
    """Return a transport whose reply has text and a tool call."""
    call = {"index": 0, "id": "a", "function": function}
    return Saying(delta(content="Let me see."), delta("tool_calls", tool_calls=[call]))


class TestReadingResponses:
    def test_tool_call_in_pieces_is_joined(self, both: Any, small_store: Path) -> None:
        parts = (
            {"index": 0, "id": "a1", "function": {"name": "now", "arguments": ""}},
            {"index": 1, "id": "", "function": {"name": "then", "arguments": "{}"}},
            {"index": 0, "function": {"arguments": '{"zone": '}},
            {"index": 0, "function": {"arguments": '"UTC"}'}},
        )
        events = [*(delta(tool_calls=[part]) for part in parts), delta("tool_calls")]
        reply = both.connect("llamacpp", transport=Saying(*events)).chat("Hello")
        assert reply.finish_reason == "tool_calls"
        assert [(call.name, call.arguments, call.id) for call in reply.tool_calls] == [
            ("now", {"zone": "UTC"}, "a1"),
            ("then", {}, reply.tool_calls[1].id),
        ]
        assert reply.tool_calls[1].id not in ("", "a1")

    def test_odd_fields_are_ignored(self, both: Any, engine_store: Path) -> None:
        entries = [{"token": "a", "logprob": -1}, {"token": "b", "logprob": None}, None]
        events = (
            {"choices": [{"delta": {"content": "a"}, "logprobs": {"content": entries}}]},
            {"choices": [{"delta": {"content": None, "tool_calls": None}, "logprobs": []}]},
            delta("eos"),
            {"choices": None, "usage": {"prompt_tokens": -1, "completion_tokens": 2.0}, "timings": {"prompt_ms": "x"}},
        )
        reply = both.connect("llamacpp", transport=Saying(*events)).chat("Hello", options={"logprobs": True})
        assert (reply.text, reply.finish_reason) == ("a", "stop")
        assert [each.token for each in reply.logprobs] == ["a"]
        assert (reply.usage.input_tokens, reply.usage.output_tokens, reply.timings.prompt) == (None, 2, None)

    @pytest.mark.parametrize(
        ("given", "read"),
        [
            ({"arguments": '{"a": 1}'}, {"a": 1}),
            ({"arguments": {"a": 1}}, {"a": 1}),
            ({}, {}),
            ({"arguments": None}, {}),
            ({"arguments": ""}, {}),
            ({"arguments": "  "}, {}),
            ({"arguments": "null"}, {}),
        ],
        ids=str,
    )
    def test_tool_arguments_in_every_form(
        self, both: Any, small_store: Path, given: dict[str, Any], read: dict[str, Any]
    ) -> None:
        llm = both.connect("llamacpp", transport=calling({"name": "now", **given}))
        reply = llm.chat("Hello")
        assert [(call.name, call.arguments) for call in reply.tool_calls] == [("now", read)]
        assert (reply.text, reply.finish_reason) == ("Let me see.", "tool_calls")

    @pytest.mark.parametrize(
        "function",
        [
            {"name": "now", "arguments": "{canary"},
            {"name": "now", "arguments": '["canary"]'},
            {"name": None, "arguments": '{"a": "canary"}'},
        ],
        ids=str,
    )
    def test_malformed_tool_call_stays_in_partial(self, both: Any, small_store: Path, function: dict[str, Any]) -> None:
        llm = both.connect("llamacpp", transport=calling(function))
        with pytest.raises(InferenceFailed, match=r"model's call.* malformed") as caught:
            llm.chat("Hello")
        error = caught.value
        assert ("`now`" in error.message) == bool(function["name"])
        assert "max_tokens" in str(error.hint)
        assert error.partial is not None
        assert error.partial.raw is not None
        assert (error.partial.text, error.partial.raw["arguments"]) == ("Let me see.", function["arguments"])
        assert "canary" not in f"{error} {error!r} {error.to_dict()} {error.__cause__} {error.__context__}"

    @pytest.mark.parametrize("end", ["data: [DONE]\n\n", "", 'data: {"choi'])
    def test_missing_finish_reason_is_an_interruption(self, end: str, both: Any, small_store: Path) -> None:
        llm = both.connect("llamacpp", transport=Saying(delta(content="Let"), end=end))
        with pytest.raises(StreamInterrupted) as caught:
            llm.chat("Hello")
        assert caught.value.partial is not None
        assert caught.value.partial.text == "Let"

    @pytest.mark.parametrize(
        ("failure", "error"),
        [
            ({"code": 500, "message": "x"}, InferenceFailed),
            ({"code": 503, "message": "x"}, Overloaded),
            ({"code": 400, "type": "exceed_context_size_error", "message": "x"}, ContextOverflow),
            ({"code": 501, "type": "not_supported_error", "message": "x"}, CapabilityUnsupported),
            ("x", InferenceFailed),
        ],
    )
    def test_error_event_is_typed(self, failure: Any, error: type[Exception], both: Any, small_store: Path) -> None:
        llm = both.connect("llamacpp", transport=Saying({"error": failure}))
        with pytest.raises(error, match="x"):
            llm.chat("Hello")
