"""LoRA adapters on the embedded engine: several at once, chosen by each request, never the wrong one."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest
from engine_fixtures import eventually
from lora_files import pairs, write_gguf, write_peft
from small_engine import ADAPTERS, AHOY, BASE, MODEL, NAME, QUESTION, TOKENS, answer, first_letters, place_of

from graftage.calls import Call, ChatRequest, CloseRequest
from graftage.exceptions import (
    AdapterError,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterNotFound,
    AdapterUnsupported,
    ConnectionFailed,
    ContextOverflow,
    ProtocolError,
    StreamInterrupted,
)
from graftage.hookspecs import ConnectRequest, hookimpl
from graftage.settings import Settings
from graftage.types import Adapter, LoadedAdapter, Verdict
from graftage_llamacpp import LlamaCppSettings, connect
from graftage_llamacpp._convert import SYSTEM_PROMPT
from graftage_llamacpp._process import Slots
from graftage_lora import LoraPlugin

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from graftage.calls import ResolveRequest
    from graftage.types import ModelInfo

pytestmark = [pytest.mark.engine, pytest.mark.by_turns]

STORY = "Once upon a time there was"
SURE = {"temperature": 0.0}
TOP_LETTERS = range(20)
PROBABILITIES = {**SURE, "logprobs": True, "top_logprobs": len(TOP_LETTERS)}
FITS = Verdict(status="compatible")


@dataclass(frozen=True)
class Ready:
    """An adapter that is a GGUF file already."""

    path: Path
    scale: float = 2.0
    verdict: Verdict = FITS
    served_as: str | None = None

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def digest(self) -> str:
        return f"sha256:{hashlib.sha256(self.path.read_bytes()).hexdigest()}"

    def gguf(self, base: ModelInfo) -> Path:
        assert base.tensors
        assert base.metadata["tokenizer.ggml.tokens"]
        return self.path

    def merge(self, base_file: Path, out: Path, on_progress: Callable[[int, int], None] = print) -> Path:
        raise NotImplementedError


class Files:
    """A resolver of the adapters in a folder."""

    name = "files"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @hookimpl
    def resolve_adapter(self, request: ResolveRequest) -> Adapter | None:
        path = self._folder / f"{request.reference}.gguf"
        return Ready(path) if path.exists() else None


@dataclass(frozen=True)
class Once(Ready):
    """An adapter that can be converted once."""

    done: list[int] = field(default_factory=list, compare=False)

    def gguf(self, base: ModelInfo) -> Path:
        self.done.append(1)
        if len(self.done) > 1:
            raise ValueError("secret")
        return self.path


class Broken(Files):
    """A resolver whose adapters can be converted once."""

    @hookimpl
    def resolve_adapter(self, request: ResolveRequest) -> Adapter | None:
        return Once(self._folder / f"{request.reference}.gguf")


def damaged(folder: Path, name: str, old: bytes, new: bytes) -> None:
    """Write the adapter `ahoy` under another name with some bytes replaced."""
    data = (folder / "ahoy.gguf").read_bytes()
    assert old in data
    (folder / f"{name}.gguf").write_bytes(data.replace(old, new))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder of adapters: `ahoy` and `contrary` change every reply, `mute` changes nothing."""
    for name, adapter in ADAPTERS.items():
        write_gguf(tmp_path / f"{name}.gguf", MODEL, adapter)
    return tmp_path


@pytest.fixture
def llm(both: Any, small_store: Path, folder: Path) -> Any:
    return both.connect("llamacpp", context_window=1024, plugins=[Files(folder)])


def ask(llm: Any, **how: Any) -> str:
    return str(llm.chat(QUESTION, max_tokens=len(BASE), options=SURE, **how).text)


def test_expected_replies_match_an_independent_forward_pass() -> None:
    assert [answer(QUESTION, adapter, len(BASE)) for adapter in (None, "ahoy")] == [BASE, AHOY]


class Weaker:
    """A transport that sets the scale of each request's adapter."""

    scale = 1.0

    def wrap(self, network: Callable[[], Any]) -> Any:
        self._inner = network()
        self.colour = self._inner.colour
        return self

    async def send(self, request: Any, clock: Any) -> Any:
        body = json.loads(request.body)
        body["adapter"] = [[digest, self.scale] for digest, _ in body["adapter"]]
        return await self._inner.send(replace(request, body=json.dumps(body).encode()), clock)

    async def close(self) -> None:
        await self._inner.close()


class TestLoad:
    def test_loaded_adapter_has_name_and_digest(self, llm: Any, folder: Path) -> None:
        for name in ("ahoy", "mute"):
            loaded = llm.use_adapter(name)
            assert (loaded.name, loaded.digest) == (name, Ready(folder / f"{name}.gguf").digest)
        assert llm.loaded()[0].raw["adapters"] == [Ready(folder / f"{name}.gguf").digest for name in ("ahoy", "mute")]

    def test_progress_is_reported_once(self, both: Any, small_store: Path, folder: Path, watcher: Any) -> None:
        llm = both.connect("llamacpp", context_window=1024, plugins=[Files(folder), watcher])
        ask(llm, adapter="ahoy")
        assert "ahoy" in watcher.last("progress").progress.status
        count = watcher.kinds().count("progress")
        ask(llm, adapter="ahoy")
        assert watcher.kinds().count("progress") == count

    def test_unloaded_adapter_is_reloaded_when_named(self, llm: Any) -> None:
        ask(llm, adapter="ahoy")
        ask(llm, adapter="mute")
        llm.unload_adapter("ahoy")
        assert ask(llm) == BASE
        assert len(llm.loaded()[0].raw["adapters"]) == 1
        assert ask(llm, adapter="ahoy") == AHOY

    def test_adapter_unloaded_by_other_client(self, both: Any, small_store: Path, folder: Path) -> None:
        one, two = (both.connect("llamacpp", context_window=1024, plugins=[Files(folder)]) for _ in range(2))
        assert ask(one, adapter="ahoy") == AHOY
        assert ask(two, adapter="ahoy") == AHOY
        two.unload_adapter("ahoy")
        assert ask(two) == BASE
        assert ask(one, adapter="ahoy") == AHOY

    def test_adapter_survives_engine_restarts(self, llm: Any) -> None:
        assert ask(llm, adapter="ahoy") == AHOY
        assert ask(llm, adapter="ahoy", context_window=512) == AHOY
        os.kill(llm.loaded()[0].raw["pid"], signal.SIGKILL)
        assert ask(llm, adapter="ahoy") == AHOY


class TestChoice:
    """Which adapter answers a request."""

    def test_adapter_and_base_take_turns(self, llm: Any) -> None:
        adapters: list[Any] = [{}, {"adapter": "ahoy"}, {}, {"adapter": "ahoy"}, {"adapter": None}]
        assert [ask(llm, **each) for each in adapters] == [BASE, AHOY, BASE, AHOY, BASE]

    def test_new_content_is_another_adapter(self, llm: Any, folder: Path) -> None:
        assert ask(llm, adapter="ahoy") == AHOY
        (folder / "ahoy.gguf").write_bytes((folder / "mute.gguf").read_bytes())
        assert ask(llm, adapter="ahoy") == BASE

    def test_reply_names_its_adapter(self, llm: Any) -> None:
        assert llm.chat("Hi", max_tokens=1, adapter="ahoy").adapter == "ahoy"
        assert llm.chat("Hi", max_tokens=1).adapter is None

    def test_several_loaded_adapters(self, llm: Any) -> None:
        assert ask(llm, adapter="mute") == BASE
        assert ask(llm, adapter="ahoy") == AHOY
        pid = llm.loaded()[0].raw["pid"]
        assert [ask(llm, adapter=name) for name in ("ahoy", "mute", "ahoy", None)] == [AHOY, BASE, AHOY, BASE]
        assert llm.loaded()[0].raw["pid"] == pid
        assert len(llm.loaded()[0].raw["adapters"]) == 2

    def test_concurrent_requests_do_not_mix(self, both: Any, small_store: Path, folder: Path) -> None:
        llm = both.connect("llamacpp", context_window=1024, slots=2, plugins=[Files(folder)])
        llm.use_adapter("ahoy")
        llm.use_adapter(None)
        names = ["ahoy", None] * 4
        answers = both.together([lambda name=name: ask(llm, adapter=name) for name in names])
        assert answers == [AHOY if name else BASE for name in names]

    def test_generate_and_raw_prompts(self, llm: Any) -> None:
        assert llm.generate(QUESTION, max_tokens=len(AHOY), options=SURE, adapter="ahoy").text == AHOY
        raw = [llm.generate(STORY, raw=True, max_tokens=8, options=SURE, adapter=name).text for name in (None, "ahoy")]
        assert raw[0] != raw[1]
        assert llm.generate(STORY, raw=True, max_tokens=8, options=SURE).text == raw[0]

    def test_request_can_weaken_an_adapter(self, both: Any, small_store: Path, folder: Path) -> None:
        weaker = Weaker()
        llm = both.connect("llamacpp", context_window=1024, plugins=[Files(folder)], transport=weaker)
        assert ask(llm, adapter="ahoy") == AHOY
        weaker.scale = 0.0
        assert ask(llm, adapter="ahoy") == BASE

    def test_use_adapter_until_none(self, llm: Any) -> None:
        llm.use_adapter("ahoy")
        assert ask(llm) == AHOY
        assert ask(llm, adapter=None) == BASE
        llm.use_adapter(None)
        assert ask(llm) == BASE

    def test_other_client_keeps_its_base(self, both: Any, small_store: Path, folder: Path) -> None:
        one, two = (both.connect("llamacpp", context_window=1024, plugins=[Files(folder)]) for _ in range(2))
        one.use_adapter("ahoy")
        assert ask(one) == AHOY
        assert ask(two) == BASE


Choice = Any
"""An adapter, one with its weight, or several."""
MIXES: tuple[Choice, ...] = (
    None,
    "ahoy",
    ("ahoy", 0.5),
    ["ahoy", ("contrary", 0.6)],
    [("ahoy", 0.6), "contrary"],
    [("contrary", 1.3), ("ahoy", -0.4), "mute"],
)
CLOSE = 0.02
"""The engine keeps keys and values in F16."""


@cache
def expected_letters(number: int, system: str = SYSTEM_PROMPT) -> Mapping[str, float]:
    """Return the log-probability of each first letter with one of the choices, merged by hand."""
    choice = MIXES[number]
    parts = choice if isinstance(choice, list) else [choice] if choice else []
    return first_letters(dict(each if isinstance(each, tuple) else (each, 1.0) for each in parts), system)


def error_of(reply: Any, expected: Mapping[str, float]) -> float:
    """Return the largest difference of the log-probabilities of a reply's first letter."""
    top = reply.logprobs[0].top
    assert len(top) == len(TOP_LETTERS)
    return float(max(abs(each.logprob - expected[each.token]) for each in top))


class Elsewhere(Weaker):
    """A transport that asks for an adapter that the engine has not loaded."""

    async def send(self, request: Any, clock: Any) -> Any:
        body = json.loads(request.body)
        if "messages" in body and "adapter" in body:
            body["adapter"] = [["sha256:00", 1.0]]
        return await self._inner.send(replace(request, body=json.dumps(body).encode()), clock)


class TestWeights:
    def test_mixes_match_merges_by_hand(self, llm: Any) -> None:
        for number, choice in enumerate(MIXES):
            reply = llm.chat(QUESTION, adapter=choice, max_tokens=1, options=PROBABILITIES)
            assert error_of(reply, expected_letters(number)) < CLOSE, choice

    def test_mixes_have_names_and_digests(self, llm: Any) -> None:
        replies = [llm.chat("Hi", adapter=choice, max_tokens=1) for choice in MIXES]
        assert [each.adapter for each in replies[3:5]] == ["ahoy + 0.6 contrary", "0.6 ahoy + contrary"]
        assert len({each.adapter_digest for each in replies}) == len(MIXES)

    def test_all_at_once_need_one_engine(self, llm: Any) -> None:
        for choice in MIXES:
            ask(llm, adapter=choice)
        pid = llm.loaded()[0].raw["pid"]
        for choice in MIXES:
            ask(llm, adapter=choice)
        assert llm.loaded()[0].raw["pid"] == pid

    @pytest.mark.slow
    def test_hundreds_of_switches_do_not_mix(self, both: Any, small_store: Path, folder: Path) -> None:
        llm = both.connect("llamacpp", context_window=1024, slots=2, plugins=[Files(folder)])
        expected = [ask(llm, adapter=choice) for choice in MIXES]
        assert len(set(expected)) == len(MIXES)

        def switch(number: int) -> str:
            if number % 10 == 3:
                _stop(llm, MIXES[number % 7 % len(MIXES)])
            if number % 25 == 4:
                llm.embed("Hi")
            return ask(llm, adapter=MIXES[number % len(MIXES)])

        replies = both.together([lambda number=number: switch(number) for number in range(300)])
        assert replies == [expected[number % len(MIXES)] for number in range(300)]

    def test_killed_engine_never_answers_wrongly(self, both: Any, small_store: Path, folder: Path) -> None:
        one, two = (both.connect("llamacpp", context_window=1024, slots=2, plugins=[Files(folder)]) for _ in range(2))
        cold = [ask(one, adapter=choice) for choice in MIXES]

        def switch(number: int) -> str | None:
            if number in (5, 11):
                _crash(two)
            try:
                return ask((one, two)[number % 2], adapter=MIXES[number % len(MIXES)])
            except (ConnectionFailed, StreamInterrupted):
                return None

        for number, reply in enumerate(both.together([lambda each=each: switch(each) for each in range(18)])):
            assert reply in (None, cold[number % len(MIXES)])
        assert [ask(two, adapter=choice) for choice in MIXES] == cold

    @pytest.mark.parametrize("before", [(), ("ahoy",)])
    def test_unknown_digest_never_means_base(
        self, before: tuple[str, ...], both: Any, small_store: Path, folder: Path
    ) -> None:
        llm = both.connect("llamacpp", context_window=1024, plugins=[Files(folder)], transport=Elsewhere())
        with pytest.raises(AdapterError, match="not loaded"):
            ask(llm, adapter=[*before, "mute"])
        assert ask(llm) == BASE


class TestRefusals:
    def test_unloaded_adapter_raises(self, small_store: Path) -> None:
        settings: Settings = LlamaCppSettings(models_path=small_store)
        connection: Any = connect(ConnectRequest(name="llamacpp", settings=settings, http=Mock()))
        unknown = LoadedAdapter(name="other", digest="sha256:00", model=NAME, slot=0)
        request = ChatRequest(call=Call(), model=NAME, messages=(), adapter=unknown)
        with pytest.raises(AdapterError, match="not loaded") as caught:
            asyncio.run(anext(connection.chat(request)))
        assert caught.value.retryable
        connection.close(CloseRequest())

    def test_unknown_adapter_is_not_found(self, llm: Any) -> None:
        with pytest.raises(AdapterNotFound):
            ask(llm, adapter="nothing")

    @pytest.mark.parametrize("wrong", ["cut", "model", "text", "empty"])
    def test_invalid_file_leaves_engine_running(self, wrong: str, llm: Any, folder: Path, small_store: Path) -> None:
        bad = folder / "bad.gguf"
        if wrong == "model":
            bad.symlink_to(small_store / "small.gguf")
        else:
            bad.write_bytes(
                {"cut": (folder / "ahoy.gguf").read_bytes()[:-5000], "text": b"hello" * 99, "empty": b""}[wrong]
            )
        with pytest.raises(AdapterInvalid, match="bad") as caught:
            ask(llm, adapter="bad")
        assert caught.value.reasons
        assert ask(llm) == BASE

    def test_other_architecture_is_incompatible(self, llm: Any, folder: Path) -> None:
        damaged(folder, "other", b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0qwen2")
        with pytest.raises(AdapterIncompatible, match="qwen2"):
            ask(llm, adapter="other")

    def test_mismatched_tensors_leave_engine_running(self, llm: Any, folder: Path) -> None:
        damaged(folder, "deep", b"blk.1.", b"blk.9.")
        with pytest.raises(AdapterError, match="deep"):
            ask(llm, adapter="deep")
        assert ask(llm) == BASE


CONTEXT = "The harbour of the old town lies below the hill, and boats come in with fish each morning. " * 3
"""About 280 tokens."""
MOST = 200


def question_after(context: str) -> list[dict[str, str]]:
    """Return the messages of a question after a long text."""
    return [{"role": "system", "content": context}, {"role": "user", "content": QUESTION}]


def ask_with_context(llm: Any, adapter: str | None, context: str = CONTEXT) -> tuple[str, bool]:
    """Ask a question with a long context; return the reply, and whether the engine had that in its cache."""
    reply = llm.chat(question_after(context), adapter=adapter, max_tokens=4, options=SURE)
    cached, read = reply.raw["timings"]["cache_n"], reply.raw["timings"]["prompt_n"]
    assert cached > MOST or read > MOST
    return str(reply.text), cached > MOST


class Doubtful(Weaker):
    """A transport whose engine says that it has used its cache."""

    cached = 0

    async def send(self, request: Any, clock: Any) -> Any:
        response = await self._inner.send(request, clock)
        read = response.read

        async def changed() -> bytes:
            piece: bytes = await read()
            return piece.replace(b'"cached_tokens":0', f'"cached_tokens":{self.cached}'.encode())

        response.read = changed
        return response


@pytest.fixture
def cached(both: Any, small_store: Path, folder: Path) -> Any:
    """Return a client with two loaded adapters, which reply differently."""
    llm = both.connect("llamacpp", context_window=1024, plugins=[Files(folder)])
    for name in ("ahoy", "contrary"):
        llm.use_adapter(name)
    llm.use_adapter(None)
    return llm


def _embed(llm: Any, _: Choice) -> None:
    llm.embed(CONTEXT)


def _stop(llm: Any, adapter: Choice) -> None:
    stream = llm.chat(question_after(CONTEXT), adapter=adapter, max_tokens=200, stream=True)
    stream.close()


def _overflow(llm: Any, adapter: str | None) -> None:
    with pytest.raises(ContextOverflow):
        llm.chat(question_after(CONTEXT * 9), adapter=adapter)


class TestPromptCache:
    def test_each_adapter_reads_the_prompt_once(self, cached: Any) -> None:
        cold = {}
        for name in ("ahoy", "contrary", None):
            cold[name], reused = ask_with_context(cached, name)
            assert not reused
            assert ask_with_context(cached, name) == (cold[name], True)
        assert len(set(cold.values())) == len(cold)
        for name in ("ahoy", None, "contrary", None, "ahoy"):
            assert ask_with_context(cached, name) == (cold[name], False)
        assert ask_with_context(cached, "ahoy") == (cold["ahoy"], True)

    @pytest.mark.parametrize(
        ("between", "adapter", "reused"),
        [
            pytest.param(_stop, None, True, id="stopped stream of the base"),
            pytest.param(_stop, "ahoy", False, id="stopped stream of an adapter"),
            pytest.param(_overflow, "ahoy", False, id="overflow of an adapter"),
            pytest.param(lambda llm, _: llm.embed(CONTEXT), None, False, id="embedding"),
            pytest.param(lambda llm, _: llm.load(), None, True, id="load"),
        ],
    )
    def test_cache_is_reused_only_within_one_adapter(
        self, between: Any, adapter: Any, reused: bool, cached: Any
    ) -> None:
        cold, _ = ask_with_context(cached, None)
        between(cached, adapter)
        again, found = ask_with_context(cached, None)
        assert (again, found) == (cold, reused)
        assert ask_with_context(cached, None) == (cold, True)

    @pytest.mark.parametrize("slots", [1, 2])
    def test_reuse_follows_adapters_and_weights(self, slots: int, both: Any, small_store: Path, folder: Path) -> None:
        llm = both.connect("llamacpp", context_window=1024, slots=slots, plugins=[Files(folder)])
        ask(llm, adapter=MIXES[-1])
        held: list[int] = []
        # Which choice, what happens before, and whether all slots have forgotten their caches then.
        for number, between in [
            *((each, None) for each in (0, 0, 1, 2, 2, 1, 3, 4, 3, 5, 5, 0, 1, 0)),
            *((each, _embed) for each in (0, 2)),
            *((each, _stop) for each in (2, 2, 3, 3)),
        ]:
            if between is not None:
                between(llm, MIXES[number])
                held = [] if between is _embed else [*held, number]
            reply = llm.chat(question_after(CONTEXT), adapter=MIXES[number], max_tokens=1, options=PROBABILITIES)
            assert error_of(reply, expected_letters(number, CONTEXT)) < CLOSE
            if between is not _stop:  # A stream that is closed at once may not have read its prompt.
                assert (reply.usage.cached_tokens > MOST) == (number in held[-slots:])
            held = [*(each for each in held if each != number), number]

    def test_unexpected_reuse_is_an_error(self, both: Any, small_store: Path, folder: Path) -> None:
        doubtful = Doubtful()
        llm = both.connect("llamacpp", context_window=1024, plugins=[Files(folder)], transport=doubtful)
        ask_with_context(llm, "ahoy")
        assert ask_with_context(llm, "ahoy")[1]
        doubtful.cached = 7
        with pytest.raises(ProtocolError, match="7 tokens") as caught:
            ask_with_context(llm, "contrary")
        assert caught.value.hint
        doubtful.cached = 0
        assert not ask_with_context(llm, "contrary")[1]

    def test_cache_is_unknown_during_embedding(self) -> None:
        slots = Slots(1)
        for before in (slots.take_any(), None):
            use = slots.take((1.0,), "x")
            use.answered()
            use.end()
            if before is not None:
                before.end()
            assert slots.take((1.0,), "x").reuse == (before is None)

    def test_health_check_leaves_replies_unchanged(self, cached: Any) -> None:
        cold, _ = ask_with_context(cached, "ahoy")
        assert cached.health(level="answers").answers
        assert ask_with_context(cached, "ahoy")[0] == cold

    def test_slot_keeps_cache_of_its_adapter(self, both: Any, small_store: Path, folder: Path) -> None:
        llm = both.connect("llamacpp", context_window=1024, slots=2, plugins=[Files(folder)])
        llm.use_adapter("ahoy")
        cold = {name: ask_with_context(llm, name)[0] for name in ("ahoy", None)}
        for name in ("ahoy", None, None, "ahoy"):
            assert ask_with_context(llm, name) == (cold[name], True)

    def test_conversations_keep_their_slots(self, both: Any, small_store: Path, folder: Path, watcher: Any) -> None:
        llm = both.connect("llamacpp", context_window=1024, slots=2, plugins=[Files(folder), watcher])
        llm.use_adapter("ahoy")
        other = CONTEXT.replace("harbour", "market")
        cold = {context: ask_with_context(llm, "ahoy", context)[0] for context in (CONTEXT, other)}
        for context in (other, CONTEXT, CONTEXT, other, other):
            assert ask_with_context(llm, "ahoy", context) == (cold[context], True)
        assert "retry" not in watcher.kinds()

    @pytest.mark.parametrize("slots", [1, 2, 3])
    def test_more_requests_than_slots(self, slots: int, both: Any, small_store: Path, folder: Path) -> None:
        one, two = (
            both.connect("llamacpp", context_window=1024, slots=slots, plugins=[Files(folder)]) for _ in range(2)
        )
        for llm in (one, two):
            llm.use_adapter("ahoy")
        cold = {name: ask_with_context(one, name)[0] for name in ("ahoy", None)}
        names = ["ahoy", None, None, "ahoy", "ahoy", None]
        calls = [
            lambda name=name, llm=llm: ask_with_context(llm, name)[0]
            for name, llm in zip(names, (one, two) * 3, strict=True)
        ]
        assert both.together(calls) == [cold[name] for name in names]
        assert [ask_with_context(two, name)[0] for name in (None, "ahoy")] == [cold[None], cold["ahoy"]]


class TestRoom:
    """How many adapters stay in the engine."""

    def test_least_recently_used_goes_first(self, both: Any, small_store: Path, folder: Path) -> None:
        llm = both.connect("llamacpp", context_window=1024, adapter_count=2, plugins=[Files(folder)])
        for name in ("ahoy", "contrary", "ahoy"):
            ask(llm, adapter=name)
        reply = llm.chat("Hi", adapter="mute", max_tokens=1)
        assert "to load the adapter `mute`, and dropped 1" in reply.warnings[0]
        assert "adapter_count" in reply.warnings[0]
        assert _loaded(llm, folder) == {"ahoy", "mute"}
        assert llm.chat("Hi", adapter="mute", max_tokens=1).warnings == ()
        assert ask(llm, adapter="ahoy") == AHOY
        ask(llm, adapter="contrary")
        assert _loaded(llm, folder) == {"ahoy", "contrary"}

    @pytest.mark.parametrize("room", [1024, 40_000])
    def test_needed_adapters_may_exceed_limits(self, room: int, both: Any, small_store: Path, folder: Path) -> None:
        llm = both.connect(
            "llamacpp", adapter_count=1, adapter_bytes=room, context_window=1024, plugins=[Files(folder)]
        )
        assert ask(llm, adapter="ahoy") == AHOY
        reply = llm.chat(QUESTION, adapter=MIXES[-1], max_tokens=1, options=PROBABILITIES)
        assert error_of(reply, expected_letters(len(MIXES) - 1)) < CLOSE
        assert _loaded(llm, folder) == set(ADAPTERS)
        assert ask(llm, adapter="ahoy", context_window=512) == AHOY
        assert _loaded(llm, folder) == {"ahoy"}

    def test_bytes_are_limited(self, both: Any, small_store: Path, folder: Path) -> None:
        size = (folder / "ahoy.gguf").stat().st_size
        llm = both.connect("llamacpp", context_window=1024, adapter_bytes=2 * size + size // 2, plugins=[Files(folder)])
        for name in ADAPTERS:
            ask(llm, adapter=name)
        assert _loaded(llm, folder) == {"contrary", "mute"}

    def test_clients_with_little_room_take_turns(self, both: Any, small_store: Path, folder: Path) -> None:
        one, two = (
            both.connect("llamacpp", context_window=1024, slots=2, adapter_count=1, plugins=[Files(folder)])
            for _ in range(2)
        )
        asked = [(one, "ahoy"), (two, "contrary"), (one, None), (two, "ahoy")]
        cold = [ask(llm, adapter=name) for llm, name in asked]
        assert cold == [AHOY, cold[1], BASE, AHOY]
        assert cold[1] not in (AHOY, BASE)
        assert both.together([lambda llm=llm, name=name: ask(llm, adapter=name) for llm, name in asked * 2]) == cold * 2


def _loaded(llm: Any, folder: Path) -> set[str]:
    """Return the names of the adapters in the engine."""
    loaded = llm.loaded()[0].raw["adapters"]
    return {name for name in ADAPTERS if Ready(folder / f"{name}.gguf").digest in loaded}


class TestOthers:
    """The other adapters of a folder, which are loaded ahead."""

    @pytest.fixture
    def llm(self, both: Any, small_store: Path, tmp_path: Path) -> Any:
        for number in range(6):
            write_peft(tmp_path / "adapters" / f"a{number}", pairs(MODEL, seed=number))
        (tmp_path / "adapters" / "broken").mkdir()
        (tmp_path / "adapters" / "broken" / "adapter_config.json").write_text("{}")
        lora = LoraPlugin(folders=[tmp_path / "adapters"], cache=tmp_path / "cache", hub=tmp_path / "hub")
        return both.connect("llamacpp", context_window=1024, adapter_count=5, plugins=[lora])

    def test_folder_needs_one_start(self, llm: Any) -> None:
        replies = [ask(llm, adapter=f"a{number}") for number in (0, 1, 2, 3, 4, 0, 1, 2, 3, 4)]
        assert len(set(replies)) == 5
        engine = llm.loaded()[0].raw
        assert (engine["starts"], len(engine["adapters"])) == (1, 5)
        assert ask(llm, adapter="a5") not in replies
        engine = llm.loaded()[0].raw
        assert (engine["starts"], len(engine["adapters"])) == (2, 5)

    def test_plain_chat_loads_none(self, llm: Any) -> None:
        assert ask(llm) == BASE
        assert llm.loaded()[0].raw["adapters"] == []
        reply = llm.chat("Hi", adapter="a0", max_tokens=1)
        assert reply.warnings == ("The engine was restarted to load the adapter `a0`.",)
        engine = llm.loaded()[0].raw
        assert (engine["starts"], len(engine["adapters"])) == (2, 5)


class TestActivated:
    """Adapters that act only after their invocation tokens."""

    @pytest.fixture
    def lora(self, small_store: Path, tmp_path: Path) -> LoraPlugin:
        invocation = [TOKENS.index(letter) for letter in "@go"]
        write_peft(tmp_path / "adapters" / "late", ADAPTERS["ahoy"], alora_invocation_tokens=invocation)
        for name in ("ahoy", "contrary"):
            write_peft(tmp_path / "adapters" / name, ADAPTERS[name])
        return LoraPlugin(folders=[tmp_path / "adapters"], cache=tmp_path / "cache", hub=tmp_path / "hub")

    @pytest.fixture
    def llm(self, both: Any, lora: LoraPlugin) -> Any:
        return both.connect("llamacpp", context_window=1024, plugins=[lora])

    def test_uninvoked_adapter_means_base(self, llm: Any) -> None:
        for choice in ("contrary", "late", None, "late", ("late", 0.5)):
            assert (ask(llm, adapter=choice) == BASE) == (choice != "contrary")

    def test_invoked_adapter_acts(self, llm: Any) -> None:
        replies = {}
        for choice in (None, "late", "ahoy", ("late", 0.5), "contrary"):
            replies[choice] = llm.chat(f"{QUESTION}@go", adapter=choice, max_tokens=8, options=SURE).text
        assert len(set(replies.values())) == len(replies)
        for choice in ("late", None, ("late", 0.5), "late", "contrary", "late"):
            reply = llm.chat(f"{QUESTION}@go", adapter=choice, max_tokens=8, options=SURE)
            assert reply.text == replies[choice]

    def test_invoked_adapter_acts_one_token_early(self, llm: Any) -> None:
        question = f"{QUESTION}@go now"
        place = place_of("@go", question)
        for weight in (1.0, 0.5):
            reply = llm.chat(question, adapter=("late", weight), max_tokens=1, options=PROBABILITIES)
            early, exact = (
                first_letters({"ahoy": weight}, question=question, until=each) for each in (place - 1, place)
            )
            assert error_of(reply, early) < CLOSE < error_of(reply, exact)

    def test_several_slots_are_refused(self, both: Any, lora: LoraPlugin) -> None:
        llm = both.connect("llamacpp", context_window=1024, slots=2, plugins=[lora])
        with pytest.raises(AdapterUnsupported, match="one slot"):
            ask(llm, adapter="late")
        assert ask(llm, adapter="ahoy") == AHOY

    def test_concurrent_requests_do_not_mix(self, both: Any, llm: Any) -> None:
        asked = [(choice, text) for choice in ("late", None, "contrary") for text in ("@go", f"{CONTEXT}@go", "Hi")]

        def reply(choice: Choice, text: str) -> str:
            return str(llm.chat(text, adapter=choice, max_tokens=4, options=SURE).text)

        cold = [reply(*each) for each in asked]
        assert both.together([lambda each=each: reply(*each) for each in asked * 3]) == cold * 3

    def test_reply_warns_of_early_start(self, llm: Any) -> None:
        for _ in range(2):
            (warning,) = llm.chat("Hi", adapter="late", max_tokens=1).warnings
            assert "from the token before its invocation tokens" in warning

    @pytest.mark.parametrize("choice", [["late", "contrary"], ["contrary", ("late", 0.1)], ("late", -1.0)])
    def test_mix_is_refused(self, choice: Choice, llm: Any) -> None:
        with pytest.raises(AdapterUnsupported, match="late") as caught:
            ask(llm, adapter=choice)
        assert "alone" in str(caught.value.hint)
        assert ask(llm) == BASE


@pytest.fixture
def made(both: Any, small_store: Path, tmp_path: Path) -> Any:
    """Return a client with two loaded adapters, converted into a cache."""
    for name in ("ahoy", "mute"):
        write_peft(tmp_path / "adapters" / name, ADAPTERS[name])
    lora = LoraPlugin(folders=[tmp_path / "adapters"], cache=tmp_path / "cache", hub=tmp_path / "hub")
    llm = both.connect("llamacpp", context_window=1024, plugins=[lora])
    assert ask(llm, adapter="ahoy") == AHOY
    assert ask(llm, adapter="mute") == BASE
    return llm


def _crash(llm: Any) -> None:
    for model in llm.loaded():
        with suppress(ProcessLookupError):
            os.kill(model.raw["pid"], signal.SIGKILL)


def _expire(llm: Any) -> None:
    llm.chat("Hi", max_tokens=1, keep_alive=0)
    assert eventually(lambda: not llm.loaded())


RESTARTS: dict[str, Callable[[Any], Any]] = {
    "another window": lambda llm: llm.load(context_window=512),
    "crash": _crash,
    "keep_alive": _expire,
    "unload": lambda llm: llm.unload(),
}


def _blocked(damage: str, name: str | None) -> bool:
    return damage == "folder" and name == "ahoy"


class TestLostFiles:
    @pytest.mark.parametrize("restart", RESTARTS)
    def test_emptied_cache_before_restart(self, restart: str, made: Any, tmp_path: Path) -> None:
        shutil.rmtree(tmp_path / "cache")
        RESTARTS[restart](made)
        assert ask(made) == BASE
        assert ask(made, adapter="ahoy") == AHOY
        assert ask(made, adapter="mute") == BASE

    @pytest.mark.parametrize("first", ["ahoy", "mute", None])
    @pytest.mark.parametrize("damage", ["deleted", "emptied", "garbage", "cut", "swapped", "folder"])
    def test_damaged_file_is_remade(self, damage: str, first: str | None, made: Any, tmp_path: Path) -> None:
        one, other = sorted((tmp_path / "cache").glob("*.gguf"))
        if damage in ("deleted", "folder"):
            one.unlink()
        else:
            whole = one.read_bytes()
            one.write_bytes(
                {"emptied": b"", "garbage": b"hello" * 99, "cut": whole[:-5000], "swapped": other.read_bytes()}[damage]
            )
        if damage == "folder":
            one.mkdir()
        _crash(made)
        for name in (first, "ahoy", "mute", None):
            if not _blocked(damage, name):
                assert ask(made, adapter=name) == (AHOY if name == "ahoy" else BASE)

    def test_unavailable_adapter_fails_alone(self, made: Any, tmp_path: Path) -> None:
        made.use_adapter("ahoy")
        shutil.rmtree(tmp_path / "adapters" / "ahoy")
        shutil.rmtree(tmp_path / "cache")
        _crash(made)
        with pytest.raises(AdapterError, match="ahoy"):
            ask(made)
        assert ask(made, adapter=None) == BASE
        assert ask(made, adapter="mute") == BASE
        pid = made.loaded()[0].raw["pid"]
        with pytest.raises(AdapterError, match="ahoy"):
            ask(made)
        assert ask(made, adapter=None) == BASE
        assert made.loaded()[0].raw["pid"] == pid

    def test_unwritable_cache_spares_other_adapters(self, made: Any, tmp_path: Path) -> None:
        shutil.rmtree(tmp_path / "cache")
        (tmp_path / "cache").write_text("a file")
        _crash(made)
        assert ask(made) == BASE
        with pytest.raises(AdapterError, match="ahoy"):
            ask(made, adapter="ahoy")
        (tmp_path / "cache").unlink()
        assert ask(made, adapter="ahoy") == AHOY

    def test_adapter_that_prevents_start_fails_alone(self, llm: Any, folder: Path) -> None:
        for name in ("mute", "ahoy"):
            llm.use_adapter(name)
        damaged(folder, "ahoy", b"blk.1.", b"blk.9.")
        _crash(llm)
        assert ask(llm, adapter=None) == BASE
        with pytest.raises(AdapterError, match="ahoy"):
            ask(llm)
        assert ask(llm, adapter="mute") == BASE

    def test_failing_conversion_fails_alone(self, both: Any, small_store: Path, folder: Path) -> None:
        llm = both.connect("llamacpp", context_window=1024, plugins=[Broken(folder)])
        llm.use_adapter("ahoy")
        (folder / "ahoy.gguf").touch()
        _crash(llm)
        assert ask(llm, adapter=None) == BASE
        with pytest.raises(AdapterError, match="ahoy"):
            ask(llm)
