"""Read prompts on disk: a later engine continues from them, never with another model, adapter, weight or window."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import time
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import gguf
import numpy as np
import pytest
from engine_fixtures import eventually
from lora_files import add, close, write_peft
from small_engine import ADAPTERS, END, MODEL, NAME, START, TOKENS, add_vocabulary

from graftage.exceptions import ConnectionFailed, ProviderTimeout
from graftage.types import Timeouts
from graftage_llamacpp._engine import engines
from graftage_llamacpp._process import LoadedFile, file_state
from graftage_llamacpp._states import STALE, Place, States, key_of
from graftage_lora import LoraPlugin

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from graftage_llamacpp._process import Process

pytestmark = [pytest.mark.engine, pytest.mark.by_turns]

STORY = "The harbour of the old town lies below the hill, and boats come in with fish each morning. " * 7
FIXED = [{"role": "system", "content": STORY}]
QUESTION = [*FIXED, {"role": "user", "content": "What is sold there?"}]
SURE = {"temperature": 0.0, "logprobs": True}
CHOICES: list[Any] = [None, "ahoy", "contrary", ("ahoy", 0.5), ["ahoy", ("contrary", 0.5)]]
TOLERANCE = 0.05
"""Log-probabilities depend that much on how the engine divides a prompt."""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> LoraPlugin:
    """A resolver of two adapters that change every reply."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("ahoy", "contrary"):
        write_peft(folder / "files" / name, ADAPTERS[name])
    return LoraPlugin(folders=[folder / "files"], cache=folder / "cache", hub=folder / "hub")


@pytest.fixture
def start(both: Any, small_store: Path, tmp_path: Path, plugin: LoraPlugin) -> Callable[..., Any]:
    """Return a function that starts an engine, as another process would, and ends the one before."""
    clients: list[Any] = []

    def connect(folder: str = "prompts", **settings: Any) -> Any:
        for client in clients:
            client.close()
        given = {"context_window": 1024, "plugins": [plugin], **settings}
        clients.append(both.connect("llamacpp", prompts_path=tmp_path / folder, **given))
        return clients[-1]

    return connect


def ask(llm: Any, adapter: Any = None, messages: Any = QUESTION) -> tuple[str, list[float], int]:
    """Ask a question; return the reply, its log-probabilities, and how many tokens were not read again."""
    reply = llm.chat(messages, adapter=adapter, max_tokens=4, options=SURE)
    return reply.text, [each.logprob for each in reply.logprobs], reply.usage.cached_tokens


def same(one: tuple[str, list[float], int], other: tuple[str, list[float], int]) -> bool:
    """Whether two replies have the same text and about the same log-probabilities."""
    return one[0] == other[0] and one[1] == pytest.approx(other[1], abs=TOLERANCE)


def saved(folder: Path) -> list[Path]:
    return sorted((folder / "prompts").glob("*.state"))


class TestContinuing:
    def test_later_engines_continue_each_choice(self, start: Any, tmp_path: Path) -> None:
        llm = start("none")
        cold = {str(choice): ask(llm, choice) for choice in CHOICES}
        assert [each[2] for each in cold.values()] == [0] * len(CHOICES)
        llm = start()
        for choice in CHOICES:
            warmed = llm.warm(choice, FIXED)
            assert (warmed.cached_tokens, warmed.saved) == (0, saved(tmp_path)[0].stat().st_size)
        for choice in CHOICES:
            reply = ask(start(), choice)
            assert reply[2] == warmed.tokens
            assert same(reply, cold[str(choice)])

    def test_projects_take_turns_in_one_slot(self, start: Any) -> None:
        llm = start()
        other = [{"role": "system", "content": STORY.replace("harbour", "market")}]
        for messages in (FIXED, other):
            llm.warm("ahoy", messages)
        llm.warm(None, FIXED)
        for choice, messages in (("ahoy", FIXED), (None, FIXED), ("ahoy", other), ("ahoy", FIXED), (None, FIXED)):
            assert ask(llm, choice, [*messages, QUESTION[-1]])[2] > len(STORY) - 50

    def test_prompt_is_saved_once(self, start: Any, tmp_path: Path) -> None:
        first = start().warm(None, FIXED)
        (path,) = saved(tmp_path)
        before = path.stat()
        llm = start()
        for _ in range(2):
            again = llm.warm(None, FIXED)
            assert (again.tokens, again.saved, again.warnings) == (first.tokens, first.saved, ())
            assert again.cached_tokens == first.tokens - 1
        assert saved(tmp_path)[0].stat().st_ino == before.st_ino

    def test_conversation_in_slot_is_kept(self, start: Any) -> None:
        llm = start()
        warmed = llm.warm(None, FIXED)
        first = ask(llm)
        longer = [*QUESTION, {"role": "assistant", "content": first[0]}, {"role": "user", "content": "And then?"}]
        assert ask(llm, None, longer)[2] > warmed.tokens + len(QUESTION[-1]["content"])

    @pytest.mark.parametrize("question", ["What?", "\n\nWhat?", " What?", "<", "~"])
    def test_any_question_continues(self, question: str, start: Any) -> None:
        warmed = start().warm(None, FIXED)
        assert ask(start(), None, [*FIXED, {"role": "user", "content": question}])[2] == warmed.tokens

    def test_common_beginning_is_enough(self, start: Any) -> None:
        start().warm(None, [{"role": "user", "content": STORY}])
        assert ask(start(), None, [{"role": "user", "content": f"{STORY} And who?"}])[2] > len(STORY)
        shorter = STORY[:-40]
        assert ask(start(), None, [{"role": "user", "content": f"{shorter} And who?"}])[2] > len(shorter)
        assert ask(start(), None, [{"role": "user", "content": f"Once. {STORY}"}])[2] == 0

    def test_raw_prompt_continues(self, start: Any) -> None:
        warmed = start().warm(None, FIXED)
        raw = f"{START}system\n{STORY}{END}\n{START}user\nYes"
        assert start().generate(raw, raw=True, max_tokens=1).usage.cached_tokens == warmed.tokens

    def test_crashed_engine_is_continued(self, start: Any) -> None:
        llm = start()
        warmed = llm.warm("ahoy", FIXED)
        os.kill(llm.loaded()[0].raw["pid"], signal.SIGKILL)
        assert ask(llm, "ahoy")[2] == warmed.tokens

    def test_nothing_to_read(self, start: Any, tmp_path: Path) -> None:
        assert start().warm(None, ()).tokens == 0
        assert not saved(tmp_path)


class TestKey:
    """A state is used only with what computed it."""

    def test_other_numbers_read_everything(self, start: Any, small_store: Path, tmp_path: Path) -> None:
        llm = start()
        for choice in (None, "ahoy"):
            assert llm.warm(choice, FIXED).saved
        llm.close()
        other = tmp_path / "other.gguf"
        replace(MODEL, seed=7).write_for_engine(other)
        cases: list[tuple[list[Any], dict[str, Any]]] = [
            (["contrary", ("ahoy", 0.5), ("ahoy", 1.001), ["ahoy", ("contrary", 0.5)]], {}),
            (["ahoy", None], {"context_window": 2048}),
            ([None], {"slots": 2}),
            ([None], {"model": str(other)}),
        ]
        for choices, settings in cases:
            llm = start("none", **settings)
            fresh = [ask(llm, choice) for choice in choices]
            llm = start(**settings)
            for choice, expected in zip(choices, fresh, strict=True):
                reply = ask(llm, choice)
                assert (reply[0], reply[2]) == (expected[0], 0)
                assert reply[1] == pytest.approx(expected[1], abs=1e-4)
        assert len(saved(tmp_path)) == 2

    def test_changed_model_file(self, both: Any, start: Any, tmp_path: Path) -> None:
        path = tmp_path / "own.gguf"
        MODEL.write_for_engine(path)
        assert start(model=str(path)).warm(None, FIXED).saved
        status = path.stat()
        replace(MODEL, seed=7).write_for_engine(path)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert path.stat().st_size == status.st_size
        fresh = ask(start("none", model=str(path)))
        assert ask(start(model=str(path))) == (*fresh[:2], 0)

    def test_retrained_adapter(self, both: Any, start: Any, tmp_path: Path) -> None:
        folder = tmp_path / "adapters"
        write_peft(folder / "mine", ADAPTERS["ahoy"])
        mine = LoraPlugin(folders=[folder], cache=tmp_path / "cache", hub=tmp_path / "hub")
        assert start(plugins=[mine]).warm("mine", FIXED).saved
        write_peft(folder / "mine", ADAPTERS["contrary"])
        fresh = ask(start("none"), "contrary")
        assert ask(start(plugins=[mine]), "mine") == (*fresh[:2], 0)

    def test_files_and_facts_change_the_key(self, tmp_path: Path) -> None:
        path = tmp_path / "adapter.gguf"

        def made(content: bytes = b"one", weight: float = 1.0, digest: str | None = "sha256:00", **facts: Any) -> Any:
            path.write_bytes(content)
            launch = SimpleNamespace(slots=facts.pop("slots", 1), gpu_layers=facts.pop("gpu_layers", None))
            process = {"version": "1", "window": 512, "state": (1, 2, 3, 4, 5), "launch": launch, **facts}
            adapters = {"a": LoadedFile(path, file_state(path), activated=False)}
            return key_of(cast("Process", SimpleNamespace(adapters=adapters, **process)), digest, (weight,))

        changes: list[Mapping[str, Any]] = [
            {},
            {"content": b"two"},
            {"weight": 0.5},
            {"weight": -1.0},
            {"digest": "sha256:01"},
            {"digest": None},
            {"version": "2"},
            {"window": 513},
            {"state": (1, 2, 4, 4, 5)},
            {"state": (1, 2, 3, 5, 5)},
            {"slots": 2},
            {"gpu_layers": 0},
        ]
        keys = [made(**each) for each in changes]
        assert len(set(keys)) == len(changes)
        assert made() == keys[0]

    def test_file_changed_after_load_has_no_key(self, tmp_path: Path) -> None:
        path = tmp_path / "adapter.gguf"
        path.write_bytes(b"one")
        files = [LoadedFile(path, file_state(path), activated=False), LoadedFile(tmp_path / "gone", (1,), False)]
        path.write_bytes(b"longer")
        process = cast("Process", SimpleNamespace(adapters=dict(enumerate(files))))
        assert [key_of(process, None, scales) for scales in ((1.0, 0.0), (0.0, 1.0))] == [None, None]

    def test_activated_adapter_is_not_saved(self, start: Any, tmp_path: Path) -> None:
        write_peft(tmp_path / "adapters" / "late", ADAPTERS["ahoy"], alora_invocation_tokens=[TOKENS.index("~")])
        late = LoraPlugin(folders=[tmp_path / "adapters"], cache=tmp_path / "cache", hub=tmp_path / "hub")
        warmed = start(plugins=[late]).warm("late", FIXED)
        assert warmed.saved is None
        assert "invocation" in warmed.warnings[-1]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _flip(path: Path, at: int = 5000) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _renote(path: Path, **fields: Any) -> None:
    note = path.with_name(f"{path.name}.json")
    note.write_text(json.dumps(json.loads(note.read_text()) | fields))


def _cut_and_note(path: Path, keep: int = -1000) -> None:
    data = path.read_bytes()[:keep]
    path.write_bytes(data)
    _renote(path, size=len(data), digest=sha256(data).hexdigest())


def _text(path: Path, text: str) -> None:
    path.with_name(f"{path.name}.json").write_text(text)


def _swap(path: Path, *, notes: bool) -> None:
    """Put the state of another adapter in the place of this one."""
    (other,) = [each for each in path.parent.glob("*.state") if each != path]
    shutil.copy(other, path)
    if notes:
        shutil.copy(f"{other}.json", f"{path}.json")


def _open_to_others(path: Path) -> None:
    path.chmod(0o666)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut": _cut,
    "emptied": lambda path: path.write_bytes(b""),
    "flipped in the middle": _flip,
    "flipped in the head": lambda path: _flip(path, 9),
    "flipped at the end": lambda path: _flip(path, -1),
    "deleted": Path.unlink,
    "folder": _folder,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "cut, with a fitting note": _cut_and_note,
    "head alone, with a fitting note": lambda path: _cut_and_note(path, 40),
    "text of another state": lambda path: _swap(path, notes=False),
    "state and note of another key": lambda path: _swap(path, notes=True),
    "writable by others": _open_to_others,
    "other token count": lambda path: _renote(path, tokens=3),
    "negative size": lambda path: _renote(path, size=-1),
    "number as text": lambda path: _renote(path, tokens="600"),
    "huge length": lambda path: _renote(path, length=10**30, digest="00"),
    "other digest": lambda path: _renote(path, digest="00" * 32),
    "foreign field": lambda path: _renote(path, name="../../etc/passwd"),
    "no marks": lambda path: _renote(path, marks=[]),
    "marks of another kind": lambda path: _renote(path, marks={"a": 1}),
    "list": lambda path: _text(path, "[]"),
    "null": lambda path: _text(path, "null"),
    "no JSON": lambda path: _text(path, "hello"),
    "empty note": lambda path: _text(path, ""),
    "nested": lambda path: _text(path, "[" * 100_000),
}


class TestDamage:
    def test_damaged_files_are_never_used(self, start: Any, tmp_path: Path) -> None:
        llm = start()
        llm.warm(None, FIXED)
        (path,) = saved(tmp_path)
        llm.warm("ahoy", FIXED)
        whole = tmp_path / "whole"
        shutil.copytree(path.parent, whole)
        fresh = ask(start("none"))
        llm = start()
        for name, damage in DAMAGES.items():
            shutil.rmtree(path.parent)
            shutil.copytree(whole, path.parent)
            damage(path)
            assert ask(llm, "contrary")[2] == 0
            assert (name, *ask(llm)) == (name, *fresh[:2], 0)
        shutil.rmtree(path.parent)
        shutil.copytree(whole, path.parent)
        assert ask(llm, "contrary")[2] == 0
        assert ask(llm)[2] > len(STORY)

    def test_damaged_state_is_saved_again(self, start: Any, tmp_path: Path) -> None:
        warmed = start().warm(None, FIXED)
        for name in ("cut", "cut, with a fitting note", "no JSON", "deleted"):
            DAMAGES[name](saved(tmp_path)[0])
            again = start().warm(None, FIXED)
            assert (again.cached_tokens, again.saved) == (0, warmed.saved)
            assert ask(start())[2] == warmed.tokens

    def test_state_that_ends_the_engine_is_deleted(self, start: Any, tmp_path: Path) -> None:
        start().warm(None, FIXED)
        (path,) = saved(tmp_path)
        states, key = States(path.parent, 10**9), path.name.partition("-")[0]

        async def post(path: str, body: object) -> Mapping[str, Any]:
            raise ConnectionFailed("The engine ended.")

        async def run(function: Callable[..., Any], *arguments: Any) -> Any:
            return function(*arguments)

        text = f"{START}system\n{STORY}{END}\n{START}user\nWhat"
        use: Any = SimpleNamespace(rendered=text, alone=True, number=0, has=lambda _: False)
        place = Place(states=states, key=key, use=use, keep=0, post=post, run=run)
        with pytest.raises(ConnectionFailed):
            place.restore([]).send(None)
        assert not saved(tmp_path)


class TestFolder:
    def test_files_are_private(self, start: Any, tmp_path: Path) -> None:
        start().warm(None, FIXED)
        folder = tmp_path / "prompts"
        modes = {stat.S_IMODE(each.stat().st_mode) for each in folder.iterdir()}
        assert (stat.S_IMODE(folder.stat().st_mode), modes) == (0o700, {0o600})
        assert STORY[:20] not in "".join(each.read_text() for each in folder.glob("*.json"))

    def test_least_recently_used_goes_first(self, start: Any, tmp_path: Path) -> None:
        llm = start()
        size = llm.warm(None, FIXED).saved
        llm.warm("ahoy", FIXED)
        first, second = sorted(saved(tmp_path), key=lambda each: each.stat().st_mtime_ns)
        for age, path in ((20, second), (30, first)):
            os.utime(f"{path}.json", (time.time() - age,) * 2)
        assert ask(llm, None)[2] > 0  # It is used now.
        start(prompts_bytes=size * 2 + 100).warm("contrary", FIXED)
        assert first in saved(tmp_path)
        assert second not in saved(tmp_path)
        assert len([*first.parent.iterdir()]) == 2 * len(saved(tmp_path)) == 4

    def test_unfinished_files_are_removed(self, start: Any, tmp_path: Path) -> None:
        folder = tmp_path / "prompts"
        folder.mkdir(mode=0o700)
        for name, age in (("old.part", 2 * STALE), ("old.part.json", 2 * STALE), ("new.part", 1)):
            (folder / name).write_text("x")
            os.utime(folder / name, (time.time() - age,) * 2)
        start().warm(None, FIXED)
        assert [each.name for each in sorted(folder.glob("*.part*"))] == ["new.part"]

    def test_unsaved_prompt_says_why(self, start: Any, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        for words, settings in (
            ("prompts_bytes", {"prompts_bytes": 1000}),
            ("cannot be written", {"folder": "file/prompts"}),
        ):
            llm = start(**settings)
            warmed = llm.warm("ahoy", FIXED)
            assert (warmed.saved, words in warmed.warnings[-1]) == (None, True)
            assert ask(llm, "ahoy")[2] == warmed.tokens
        assert not saved(tmp_path)

    @pytest.mark.parametrize("path", ["/" + "x" * 300, "~nobody-here/prompts"])
    def test_impossible_folder_stops_no_chat(self, path: str, both: Any, small_store: Path) -> None:
        llm = both.connect("llamacpp", models_path=small_store, context_window=1024, prompts_path=path)
        assert llm.chat(QUESTION, max_tokens=1).finish_reason == "length"

    def test_zero_turns_saving_off(self, start: Any, tmp_path: Path) -> None:
        assert start().warm(None, FIXED).saved
        llm = start(prompts_bytes=0)
        assert ask(llm)[2] == 0
        warmed = llm.warm("ahoy", FIXED)
        assert (warmed.saved, "saved" in str(warmed.warnings)) == (None, False)
        assert len(saved(tmp_path)) == 1


class TestContention:
    @pytest.mark.parametrize("slots", [1, 2])
    def test_concurrent_projects_do_not_mix(self, slots: int, both: Any, start: Any) -> None:
        llm = start("none")
        expected = {str(choice): ask(llm, choice) for choice in CHOICES}
        llm = start(slots=slots)

        def chat(choice: Any) -> Any:
            return choice, ask(llm, choice)

        def read(choice: Any) -> None:
            llm.warm(choice, FIXED)
            llm.embed("hello")

        tasks: list[Callable[[], Any]] = []
        for number in range(4):
            tasks += [partial(chat, choice) for choice in CHOICES]
            tasks.append(partial(read, CHOICES[number]))
        results = [each for each in both.together(tasks) if isinstance(each, tuple)]
        assert len(results) == 4 * len(CHOICES)
        assert [choice for choice, reply in results if not same(reply, expected[str(choice)])] == []

    def test_waiting_for_a_slot_ends_in_time(self, both: Any, start: Any) -> None:
        llm = start()
        llm.load()
        pid = llm.loaded()[0].raw["pid"]
        (engine,) = engines()
        os.kill(pid, signal.SIGSTOP)
        try:
            first = both.start(llm.chat, "Hi", max_tokens=1)
            assert eventually(lambda: len(engine._leases) == 1)
            with pytest.raises(ProviderTimeout, match="slot"):
                llm.chat("Hi", max_tokens=1, timeout=Timeouts(first_token=0.2))
        finally:
            os.kill(pid, signal.SIGCONT)
        assert first.result().text
        assert llm.chat("Hi", max_tokens=1).text


# --- Models whose cache is not one row for each token ----------------------------------------------------------------


def write_model(path: Path, architecture: str, keys: Mapping[str, int], tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Write a small random model with the tokens of the small engine."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {"context_length": 2048, "embedding_length": 32, "block_count": 2, **keys}.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_uint32("tokenizer.ggml.eos_token_id", TOKENS.index(END))
    add_vocabulary(writer)
    rng = np.random.default_rng(3)
    for name, shape in {"token_embd.weight": (len(TOKENS), 32), "output_norm.weight": (32,), **tensors}.items():
        data = np.ones(shape) if "norm" in name else rng.normal(0, 0.25, shape)
        add(writer, name, -np.exp(data) if name.endswith("ssm_a") else data, "F32")
    close(writer)


def write_recurrent(path: Path) -> None:
    """Write a small Mamba, which keeps only its last state."""
    keys = {"feed_forward_length": 0, "attention.head_count": 0, "ssm.conv_kernel": 4, "ssm.inner_size": 64}
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (32,),
        "ssm_in.weight": (128, 32),
        "ssm_conv1d.weight": (64, 4),
        "ssm_conv1d.bias": (64,),
        "ssm_x.weight": (20, 64),
        "ssm_dt.weight": (64, 4),
        "ssm_dt.bias": (64,),
        "ssm_a": (64, 8),
        "ssm_d": (64,),
        "ssm_out.weight": (32, 64),
    }
    tensors = {f"blk.{layer}.{name}": shape for layer in (0, 1) for name, shape in shapes.items()}
    write_model(path, "mamba", {**keys, "ssm.state_size": 8, "ssm.time_step_rank": 4}, tensors)


def write_sliding(path: Path) -> None:
    """Write a small Gemma 3, of which most layers keep only a window of 64 tokens."""
    attention = {"head_count": 2, "head_count_kv": 1, "key_length": 16, "value_length": 16, "sliding_window": 64}
    keys = {f"attention.{name}": value for name, value in attention.items()}
    shapes: dict[str, tuple[int, ...]] = {
        "attn_q.weight": (32, 32),
        "attn_k.weight": (16, 32),
        "attn_v.weight": (16, 32),
        "attn_output.weight": (32, 32),
        "ffn_gate.weight": (64, 32),
        "ffn_up.weight": (64, 32),
        "ffn_down.weight": (32, 64),
        **{f"attn_{each}_norm.weight": (16,) for each in "qk"},
        **{f"{each}_norm.weight": (32,) for each in ("attn", "post_attention", "ffn", "post_ffw")},
    }
    shapes["post_ffw_norm.weight"] = (32,)
    tensors = {f"blk.{layer}.{name}": shape for layer in range(6) for name, shape in shapes.items()}
    write_model(path, "gemma3", {**keys, "block_count": 6, "feed_forward_length": 64}, tensors)


class TestOtherCaches:
    @pytest.mark.parametrize("write", [write_recurrent, write_sliding], ids=["recurrent", "sliding window"])
    def test_later_engine_continues(self, write: Callable[[Path], None], start: Any, tmp_path: Path) -> None:
        write(tmp_path / f"{NAME}.gguf")
        model = {"model": str(tmp_path / f"{NAME}.gguf")}
        fresh = ask(start("none", **model))
        warmed = start(**model).warm(None, FIXED)
        assert warmed.saved
        reply = ask(start(**model))
        assert reply[2] > warmed.tokens - 10  # It may go back to its last checkpoint.
        assert same(reply, fresh)
