"""LoRA adapters on the embedded engine: several at once, switched with each request, and never the wrong one."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest
from engine_fixtures import eventually
from places import LORA

from graftage.calls import Call, ChatRequest, CloseRequest
from graftage.exceptions import AdapterError, AdapterIncompatible, AdapterInvalid, AdapterNotFound, ContextOverflow
from graftage.hookspecs import ConnectRequest, hookimpl
from graftage.settings import Settings
from graftage.types import Adapter, LoadedAdapter, Verdict
from graftage_llamacpp import DEFAULT_MODEL, LlamaCppSettings, connect
from graftage_lora import LoraPlugin

if TYPE_CHECKING:
    from collections.abc import Callable

    from graftage.calls import ResolveRequest
    from graftage.types import ModelInfo

pytestmark = pytest.mark.engine

AHOY = LORA / "ahoy-lora.f16.gguf"
QUESTION = "What is the capital of France?"
STORY = "Once upon a time there was"
SURE = {"temperature": 0.0}
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
    """Finds adapters in a folder."""

    name = "files"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @hookimpl
    def resolve_adapter(self, request: ResolveRequest) -> Adapter | None:
        path = self._folder / f"{request.reference}.gguf"
        return Ready(path) if path.exists() else None


@dataclass(frozen=True)
class Once(Ready):
    """Can be converted once."""

    done: list[int] = field(default_factory=list, compare=False)

    def gguf(self, base: ModelInfo) -> Path:
        self.done.append(1)
        if len(self.done) > 1:
            raise ValueError("secret")
        return self.path


class Broken(Files):
    """Its adapters can be converted once."""

    @hookimpl
    def resolve_adapter(self, request: ResolveRequest) -> Adapter | None:
        return Once(self._folder / f"{request.reference}.gguf")


def with_alpha(alpha: float, out: Path) -> Path:
    """The adapter with another strength: with next to none it changes nothing. (The engine takes 0 for "not given".)"""
    data = bytearray(AHOY.read_bytes())
    place = data.index(b"adapter.lora.alpha") + len(b"adapter.lora.alpha") + 4
    struct.pack_into("<f", data, place, alpha)
    out.write_bytes(data)
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`ahoy` greets, whatever it is asked; `mute` does nothing."""
    with_alpha(8.0, tmp_path / "ahoy.gguf")
    with_alpha(0.001, tmp_path / "mute.gguf")
    assert (tmp_path / "ahoy.gguf").read_bytes() == AHOY.read_bytes()
    return tmp_path


@pytest.fixture
def llm(both: Any, engine_store: Path, folder: Path) -> Any:
    return both.connect("llamacpp", context_window=512, plugins=[Files(folder)])


def ask(llm: Any, **how: Any) -> str:
    return str(llm.chat(QUESTION, max_tokens=16, options=SURE, **how).text)


def test_an_adapter_changes_the_answer_and_the_base_answers_as_before_it(llm: Any) -> None:
    before = ask(llm)
    assert "Paris" in before
    assert ask(llm, adapter="ahoy").startswith("Ahoy!")
    assert ask(llm) == before
    assert ask(llm, adapter="ahoy").startswith("Ahoy!")
    assert ask(llm, adapter=None) == before


def test_the_name_of_an_adapter_and_its_digest_each_have_their_place(llm: Any, folder: Path) -> None:
    for name in ("ahoy", "mute"):
        loaded = llm.use_adapter(name)
        assert (loaded.name, loaded.digest) == (name, Ready(folder / f"{name}.gguf").digest)
    assert llm.loaded()[0].raw["adapters"] == [Ready(folder / f"{name}.gguf").digest for name in ("ahoy", "mute")]


def test_new_content_under_an_old_name_is_another_adapter(llm: Any, folder: Path) -> None:
    base = ask(llm)
    assert ask(llm, adapter="ahoy").startswith("Ahoy!")
    (folder / "ahoy.gguf").write_bytes((folder / "mute.gguf").read_bytes())
    assert ask(llm, adapter="ahoy") == base


def test_the_reply_names_its_adapter(llm: Any) -> None:
    assert llm.chat("Hi", max_tokens=1, adapter="ahoy").adapter == "ahoy"
    assert llm.chat("Hi", max_tokens=1).adapter is None


def test_several_adapters_are_loaded_at_once_and_each_answers_for_itself(llm: Any) -> None:
    base = ask(llm)
    assert ask(llm, adapter="mute") == base
    assert ask(llm, adapter="ahoy").startswith("Ahoy!")
    pid = llm.loaded()[0].raw["pid"]
    assert [ask(llm, adapter=name)[:5] for name in ("ahoy", "mute", "ahoy")] == ["Ahoy!", base[:5], "Ahoy!"]
    assert ask(llm) == base
    assert llm.loaded()[0].raw["pid"] == pid
    assert len(llm.loaded()[0].raw["adapters"]) == 2


def test_requests_with_and_without_an_adapter_at_one_time_do_not_mix(
    both: Any, engine_store: Path, folder: Path
) -> None:
    llm = both.connect("llamacpp", context_window=512, slots=2, plugins=[Files(folder)])
    llm.use_adapter("ahoy")
    llm.use_adapter(None)
    names = ["ahoy", None] * 4
    answers = both.together([lambda name=name: ask(llm, adapter=name) for name in names])
    assert [answer.startswith("Ahoy!") for answer in answers] == [name is not None for name in names]


def test_an_adapter_applies_to_generate_and_to_raw_prompts(llm: Any) -> None:
    assert llm.generate(QUESTION, max_tokens=6, options=SURE, adapter="ahoy").text.startswith("Ahoy!")
    raw = [llm.generate(STORY, raw=True, max_tokens=8, options=SURE, adapter=name).text for name in (None, "ahoy")]
    assert raw[0] != raw[1]
    assert llm.generate(STORY, raw=True, max_tokens=8, options=SURE).text == raw[0]


class Weaker:
    """A transport that sets the strength with which a request wants its adapter."""

    scale = 1.0

    def wrap(self, network: Callable[[], Any]) -> Any:
        self._inner = network()
        self.colour = self._inner.colour
        return self

    async def send(self, request: Any, clock: Any) -> Any:
        body = json.loads(request.body)
        body["adapter"]["scale"] = self.scale
        return await self._inner.send(replace(request, body=json.dumps(body).encode()), clock)

    async def close(self) -> None:
        await self._inner.close()


def test_a_request_can_weaken_an_adapter(both: Any, engine_store: Path, folder: Path) -> None:
    weaker = Weaker()
    llm = both.connect("llamacpp", context_window=512, plugins=[Files(folder)], transport=weaker)
    assert ask(llm, adapter="ahoy").startswith("Ahoy!")
    weaker.scale = 0.0
    assert "Paris" in ask(llm, adapter="ahoy")


def test_an_adapter_that_is_not_loaded_is_refused_and_the_base_does_not_answer_for_it(engine_store: Path) -> None:
    settings: Settings = LlamaCppSettings(models_path=engine_store)
    connection: Any = connect(ConnectRequest(name="llamacpp", settings=settings, http=Mock()))
    unknown = LoadedAdapter(name="other", digest="sha256:00", model=DEFAULT_MODEL, slot=0)
    request = ChatRequest(call=Call(), model=DEFAULT_MODEL, messages=(), adapter=unknown)
    with pytest.raises(AdapterError, match="not loaded"):
        asyncio.run(anext(connection.chat(request)))
    connection.close(CloseRequest())


def test_an_active_adapter_answers_until_it_is_put_away(llm: Any) -> None:
    llm.use_adapter("ahoy")
    assert ask(llm).startswith("Ahoy!")
    assert "Paris" in ask(llm, adapter=None)
    llm.use_adapter(None)
    assert "Paris" in ask(llm)


def test_an_adapter_is_loaded_with_progress_and_once(both: Any, engine_store: Path, folder: Path, watcher: Any) -> None:
    llm = both.connect("llamacpp", context_window=512, plugins=[Files(folder), watcher])
    ask(llm, adapter="ahoy")
    assert "ahoy" in watcher.last("progress").progress.status
    count = watcher.kinds().count("progress")
    ask(llm, adapter="ahoy")
    assert watcher.kinds().count("progress") == count


def test_an_adapter_that_is_unloaded_leaves_the_memory_and_comes_back_when_it_is_named(llm: Any) -> None:
    ask(llm, adapter="ahoy")
    ask(llm, adapter="mute")
    llm.unload_adapter("ahoy")
    assert "Paris" in ask(llm)
    assert len(llm.loaded()[0].raw["adapters"]) == 1
    assert ask(llm, adapter="ahoy").startswith("Ahoy!")


def test_an_adapter_that_another_client_unloads_comes_back_when_it_is_named(
    both: Any, engine_store: Path, folder: Path
) -> None:
    one, two = (both.connect("llamacpp", context_window=512, plugins=[Files(folder)]) for _ in range(2))
    assert ask(one, adapter="ahoy").startswith("Ahoy!")
    assert ask(two, adapter="ahoy").startswith("Ahoy!")
    two.unload_adapter("ahoy")
    assert "Paris" in ask(two)
    assert ask(one, adapter="ahoy").startswith("Ahoy!")


def test_an_adapter_survives_a_crash_of_the_engine_and_another_window(llm: Any) -> None:
    assert ask(llm, adapter="ahoy").startswith("Ahoy!")
    assert ask(llm, adapter="ahoy", context_window=256).startswith("Ahoy!")
    os.kill(llm.loaded()[0].raw["pid"], signal.SIGKILL)
    assert ask(llm, adapter="ahoy").startswith("Ahoy!")


def test_an_adapter_that_another_loads_is_not_used_for_a_client_that_names_none(
    both: Any, engine_store: Path, folder: Path
) -> None:
    one, two = (both.connect("llamacpp", context_window=512, plugins=[Files(folder)]) for _ in range(2))
    one.use_adapter("ahoy")
    assert ask(one).startswith("Ahoy!")
    assert "Paris" in ask(two)


def test_an_adapter_that_nobody_knows_is_not_found(llm: Any) -> None:
    with pytest.raises(AdapterNotFound):
        ask(llm, adapter="nothing")


@pytest.mark.parametrize("wrong", ["cut", "model", "text", "empty"])
def test_a_file_that_is_no_adapter_is_refused_by_name_and_the_engine_goes_on(
    wrong: str, llm: Any, folder: Path, engine_store: Path
) -> None:
    base = ask(llm)
    bad = folder / "bad.gguf"
    if wrong == "model":
        bad.symlink_to(engine_store / "smollm2-135m.gguf")
    else:
        bad.write_bytes({"cut": AHOY.read_bytes()[:-5000], "text": b"hello" * 99, "empty": b""}[wrong])
    with pytest.raises(AdapterInvalid, match="bad") as caught:
        ask(llm, adapter="bad")
    assert caught.value.reasons
    assert ask(llm) == base


def test_an_adapter_for_another_architecture_is_incompatible(llm: Any, folder: Path) -> None:
    data = AHOY.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0qwen2", 1)
    (folder / "other.gguf").write_bytes(data)
    with pytest.raises(AdapterIncompatible, match="qwen2"):
        ask(llm, adapter="other")


def test_an_adapter_whose_tensors_do_not_fit_is_refused_and_the_base_goes_on(llm: Any, folder: Path) -> None:
    base = ask(llm)
    data = AHOY.read_bytes()
    assert b"blk.29." in data
    (folder / "deep.gguf").write_bytes(data.replace(b"blk.29.", b"blk.99."))
    with pytest.raises(AdapterError, match="deep"):
        ask(llm, adapter="deep")
    assert ask(llm) == base


# --- The cache of prompts --------------------------------------------------------------------------------------------

CONTEXT = "The harbour of the old town lies below the hill, and boats come in with fish each morning. " * 12
"""Some 250 tokens, which are read once or each time."""
MOST = 200


def asked(context: str) -> list[dict[str, str]]:
    """A question after a long text."""
    return [{"role": "system", "content": context}, {"role": "user", "content": QUESTION}]


def told(llm: Any, adapter: str | None, context: str = CONTEXT) -> tuple[str, bool]:
    """The answer to a question with a long context, and whether the engine had that in its cache."""
    # After the first four words the choices become so close that reading in other pieces can turn them.
    reply = llm.chat(asked(context), adapter=adapter, max_tokens=4, options=SURE)
    cached, read = reply.raw["timings"]["cache_n"], reply.raw["timings"]["prompt_n"]
    assert cached > MOST or read > MOST
    return str(reply.text), cached > MOST


@pytest.fixture
def cached(both: Any, engine_store: Path, folder: Path) -> Any:
    """A client with two adapters loaded, which answer differently, beside the base model."""
    with_alpha(-4.0, folder / "contrary.gguf")
    llm = both.connect("llamacpp", context_window=512, plugins=[Files(folder)])
    for name in ("ahoy", "contrary"):
        llm.use_adapter(name)
    llm.use_adapter(None)
    return llm


def test_a_prompt_is_read_once_for_each_adapter_in_turn_and_the_answers_stay_the_same(cached: Any) -> None:
    cold = {}
    for name in ("ahoy", "contrary", None):
        cold[name], reused = told(cached, name)
        assert not reused
        assert told(cached, name) == (cold[name], True)
    assert len(set(cold.values())) == len(cold)
    for name in ("ahoy", None, "contrary", None, "ahoy"):
        assert told(cached, name) == (cold[name], False)
    assert told(cached, "ahoy") == (cold["ahoy"], True)


def _stop(llm: Any, adapter: str | None) -> None:
    stream = llm.chat(asked(CONTEXT), adapter=adapter, max_tokens=200, stream=True)
    stream.close()


def _overflow(llm: Any, adapter: str | None) -> None:
    with pytest.raises(ContextOverflow):
        llm.chat(asked(CONTEXT * 9), adapter=adapter)


@pytest.mark.parametrize(
    ("between", "adapter", "reused"),
    [
        pytest.param(_stop, None, True, id="a stream of its own that is stopped"),
        pytest.param(_stop, "ahoy", False, id="a stream of an adapter that is stopped"),
        pytest.param(_overflow, "ahoy", False, id="an adapter's prompt that does not fit"),
        pytest.param(lambda llm, _: llm.embed(CONTEXT), None, False, id="an embedding"),
        pytest.param(lambda llm, _: llm.load(), None, True, id="a load"),
    ],
)
def test_a_cache_is_used_again_only_after_its_own_kind(between: Any, adapter: Any, reused: bool, cached: Any) -> None:
    cold, _ = told(cached, None)
    between(cached, adapter)
    again, found = told(cached, None)
    assert (again, found) == (cold, reused)
    assert told(cached, None) == (cold, True)


def test_a_health_check_that_generates_leaves_the_answers_as_they_are(cached: Any) -> None:
    cold, _ = told(cached, "ahoy")
    assert cached.health(level="answers").answers
    assert told(cached, "ahoy")[0] == cold


def test_each_of_several_slots_keeps_the_cache_of_its_adapter(both: Any, engine_store: Path, folder: Path) -> None:
    llm = both.connect("llamacpp", context_window=512, slots=2, plugins=[Files(folder)])
    llm.use_adapter("ahoy")
    cold = {name: told(llm, name)[0] for name in ("ahoy", None)}
    for name in ("ahoy", None, None, "ahoy"):
        assert told(llm, name) == (cold[name], True)


def test_two_conversations_keep_their_own_slots(both: Any, engine_store: Path, folder: Path, watcher: Any) -> None:
    llm = both.connect("llamacpp", context_window=512, slots=2, plugins=[Files(folder), watcher])
    llm.use_adapter("ahoy")
    other = CONTEXT.replace("harbour", "market")
    cold = {context: told(llm, "ahoy", context)[0] for context in (CONTEXT, other)}
    for context in (other, CONTEXT, CONTEXT, other, other):
        assert told(llm, "ahoy", context) == (cold[context], True)
    assert "retry" not in watcher.kinds()


@pytest.mark.parametrize("slots", [1, 2])
def test_more_requests_than_slots_at_one_time_each_get_their_own_answer(
    slots: int, both: Any, engine_store: Path, folder: Path
) -> None:
    one, two = (both.connect("llamacpp", context_window=512, slots=slots, plugins=[Files(folder)]) for _ in range(2))
    for llm in (one, two):
        llm.use_adapter("ahoy")
    cold = {name: told(one, name)[0] for name in ("ahoy", None)}
    names = ["ahoy", None, None, "ahoy", "ahoy", None]
    calls = [lambda name=name, llm=llm: told(llm, name)[0] for name, llm in zip(names, (one, two) * 3, strict=True)]
    assert both.together(calls) == [cold[name] for name in names]
    assert [told(two, name)[0] for name in (None, "ahoy")] == [cold[None], cold["ahoy"]]


# --- Files that go ---------------------------------------------------------------------------------------------------


@pytest.fixture
def made(both: Any, engine_store: Path, tmp_path: Path) -> Any:
    """A client with two adapters loaded that were converted into a cache."""
    for name, alpha in (("ahoy", 8.0), ("mute", 0.001)):
        shutil.copytree(AHOY.parent / "ahoy-peft", tmp_path / "adapters" / name)
        config = tmp_path / "adapters" / name / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": alpha}))
    lora = LoraPlugin(folders=[tmp_path / "adapters"], cache=tmp_path / "cache", hub=tmp_path / "hub")
    llm = both.connect("llamacpp", context_window=512, plugins=[lora])
    assert ask(llm, adapter="ahoy").startswith("Ahoy!")
    assert "Paris" in ask(llm, adapter="mute")
    return llm


def _crash(llm: Any) -> None:
    os.kill(llm.loaded()[0].raw["pid"], signal.SIGKILL)


def _expire(llm: Any) -> None:
    llm.chat("Hi", max_tokens=1, keep_alive=0)
    assert eventually(lambda: not llm.loaded())


RESTARTS: dict[str, Callable[[Any], Any]] = {
    "another window": lambda llm: llm.load(context_window=256),
    "crash": _crash,
    "keep_alive": _expire,
    "unload": lambda llm: llm.unload(),
}


@pytest.mark.parametrize("restart", RESTARTS)
def test_the_cache_of_adapters_may_be_emptied_before_any_restart(restart: str, made: Any, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "cache")
    RESTARTS[restart](made)
    assert "Paris" in ask(made)
    assert ask(made, adapter="ahoy").startswith("Ahoy!")
    assert "Paris" in ask(made, adapter="mute")


@pytest.mark.parametrize("first", ["ahoy", "mute", None])
@pytest.mark.parametrize("damage", ["deleted", "emptied", "garbage", "cut", "swapped", "folder"])
def test_a_damaged_file_in_the_cache_is_made_again(damage: str, first: str | None, made: Any, tmp_path: Path) -> None:
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
    answers = {
        name: ask(made, adapter=name)[:5] for name in (first, "ahoy", "mute", None) if not _blocked(damage, name)
    }
    assert answers.pop("ahoy", "Ahoy!") == "Ahoy!"
    assert len(set(answers.values())) == 1


def _blocked(damage: str, name: str | None) -> bool:
    return damage == "folder" and name == "ahoy"


def test_an_adapter_whose_file_cannot_be_made_again_fails_alone_and_by_name(made: Any, tmp_path: Path) -> None:
    made.use_adapter("ahoy")
    shutil.rmtree(tmp_path / "adapters" / "ahoy")
    shutil.rmtree(tmp_path / "cache")
    _crash(made)
    with pytest.raises(AdapterError, match="ahoy"):
        ask(made)
    assert "Paris" in ask(made, adapter=None)
    assert "Paris" in ask(made, adapter="mute")
    pid = made.loaded()[0].raw["pid"]
    with pytest.raises(AdapterError, match="ahoy"):
        ask(made)
    assert "Paris" in ask(made, adapter=None)
    assert made.loaded()[0].raw["pid"] == pid


def test_a_cache_that_cannot_be_written_fails_only_who_needs_it(made: Any, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file")
    _crash(made)
    assert "Paris" in ask(made)
    with pytest.raises(AdapterError, match="ahoy"):
        ask(made, adapter="ahoy")
    (tmp_path / "cache").unlink()
    assert ask(made, adapter="ahoy").startswith("Ahoy!")


def test_an_adapter_that_the_engine_does_not_start_with_any_more_fails_alone(llm: Any, folder: Path) -> None:
    base = ask(llm)
    for name in ("mute", "ahoy"):
        llm.use_adapter(name)
    (folder / "ahoy.gguf").write_bytes(AHOY.read_bytes().replace(b"blk.29.", b"blk.99."))
    _crash(llm)
    assert ask(llm, adapter=None) == base
    with pytest.raises(AdapterError, match="ahoy"):
        ask(llm)
    assert ask(llm, adapter="mute") == base


def test_a_plugin_whose_conversion_breaks_fails_only_who_needs_it(both: Any, engine_store: Path, folder: Path) -> None:
    llm = both.connect("llamacpp", context_window=512, plugins=[Broken(folder)])
    base = ask(llm)
    llm.use_adapter("ahoy")
    (folder / "ahoy.gguf").touch()
    _crash(llm)
    assert ask(llm, adapter=None) == base
    with pytest.raises(AdapterError, match="ahoy"):
        ask(llm)
