"""Adapters on a server: models derived once, read back, verified, and deleted if they are wrong.

The adapters are stand-ins, since only the resolver knows their content. The server is `FakeOllama`; `test_ollama.py`
has tests with a real one.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import graftage
import graftage_ollama
from graftage._engine.clients import Clients
from graftage._engine.driving import drive
from graftage.calls import Call, LoadAdapterRequest
from graftage.exceptions import (
    AdapterError,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterUnsupported,
    ConnectionFailed,
    GraftageError,
    InferenceFailed,
    ModelLoadFailed,
    ModelNotFound,
    Overloaded,
    ProtocolError,
    ProviderError,
    ProviderTimeout,
)
from graftage.hookspecs import ConnectRequest, hookimpl
from graftage.types import Verdict
from graftage_ollama import OllamaSettings
from graftage_ollama._adapters import _key, _name
from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from graftage.calls import ResolveRequest
    from graftage.types import ModelInfo

MODEL = "smollm2:135m"
MARK = "graftage.adapter.digest"
DERIVED = re.compile(r"graftage-lora/smollm2-135m:ahoy-[0-9a-f]{12}")
PANIC = "llama runner process has terminated: panic: unable to load lora"


def gguf(**texts: str) -> bytes:
    """The smallest GGUF file: version 3, no tensors, and keys with texts."""
    out = b"GGUF" + struct.pack("<IQQ", 3, 0, len(texts))
    for name, value in texts.items():
        out += struct.pack("<Q", len(name)) + name.encode()
        out += struct.pack("<IQ", 8, len(value)) + value.encode()
    return out


@dataclass
class Ahoy:
    """An adapter as a resolver returns it."""

    file: Path
    name: str = "ahoy"
    digest: str = "sha256:" + "a" * 64
    scale: float = 2.0
    verdict: Verdict = field(default_factory=lambda: Verdict(status="compatible"))
    served_as: str | None = None
    mark: bool = True
    fails: Exception | None = None
    merged: list[Path] = field(default_factory=list)

    def gguf(self, base: ModelInfo) -> Path:
        assert base.architecture == "llama"
        assert base.tensors
        if self.fails:
            raise self.fails
        return self.file

    def mix(self, weight: float, others: Sequence[tuple[Any, float]]) -> Ahoy:
        words = " ".join(f"{each.digest} {factor}" for each, factor in ((self, weight), *others))
        digest = hashlib.sha256(words.encode()).hexdigest()
        file = self.file.with_name(f"{digest[:9]}.gguf")
        file.write_bytes(gguf(**{"general.type": "adapter", "mix": words}))
        return Ahoy(file, name=f"mix of {len(others) + 1}", digest=f"sha256:{digest}")

    def merge(self, base_file: Path, out: Path, on_progress: Callable[[int, int], None] = print) -> Path:
        self.merged.append(base_file)
        on_progress(1, 2)
        marks = {MARK: self.digest} if self.mark else {}
        out.write_bytes(gguf(**marks, **{"general.architecture": "llama"}))
        on_progress(2, 2)
        return out


class Resolver:
    """A plugin that knows some adapters by name."""

    def __init__(self, *adapters: Ahoy) -> None:
        self.name = f"resolver of {adapters[0].name}"
        self._adapters = {adapter.name: adapter for adapter in adapters}

    @hookimpl
    def resolve_adapter(self, request: ResolveRequest) -> Any:
        return self._adapters.get(request.reference)


@pytest.fixture
def adapter(tmp_path: Path) -> Ahoy:
    file = tmp_path / "ahoy.gguf"
    file.write_bytes(gguf(**{"general.type": "adapter", "adapter.type": "lora"}))
    return Ahoy(file)


@pytest.fixture
def base_file(tmp_path: Path) -> Path:
    file = tmp_path / "base.gguf"
    file.write_bytes(gguf(**{"general.architecture": "llama"}))
    return file


@pytest.fixture
def connect(both: Any, fake: FakeOllama, adapter: Ahoy) -> Callable[..., Any]:
    """Connect a client that knows the adapter."""

    def connected(*others: Any, **settings: Any) -> Any:
        given = {"model": MODEL, "host": fake.url, "attempts": 1, **settings}
        return both.connect("ollama", plugins=[Resolver(adapter), *others], **given)

    return connected


def steps(fake: FakeOllama) -> list[str]:
    """Return the requests to the server, in short."""
    return [f"{seen.method} {seen.path.removeprefix('/api/').partition('/')[0]}" for seen in fake.requests]


def asked(fake: FakeOllama) -> list[str]:
    """Return the models of the chats."""
    return [seen.body["model"] for seen in fake.requests if seen.path == "/api/chat"]


def replace(fake: FakeOllama, model: str) -> None:
    """Put something else under the name of a derived model, as another process may."""
    fake.derived[model] = {"from": MODEL, "adapters": {"other.gguf": "sha256:" + "f" * 64}}
    fake.models = [*(each for each in fake.models if each != model), model]


def made(fake: FakeOllama) -> list[str]:
    """Return the derived models of the server."""
    return [name for name in fake.models if name.startswith("graftage-lora/")]


class Fleeting(Ahoy):
    """An adapter in a cache that is emptied each time, up to `times`, after its file was made."""

    content: bytes = b""
    times: int = 1

    def gguf(self, base: ModelInfo) -> Path:
        if not self.content:
            self.content = self.file.read_bytes()
        self.file.write_bytes(self.content)
        if self.times:
            self.times -= 1
            self.file.unlink()
        return self.file


def blob_path(adapter: Ahoy) -> str:
    return f"/api/blobs/sha256:{hashlib.sha256(adapter.file.read_bytes()).hexdigest()}"


class TestNative:
    """Derived models that the server makes from the base and the adapter's file."""

    def test_model_is_created_verified_and_tried(self, connect: Any, fake: FakeOllama, adapter: Ahoy) -> None:
        llm = connect()
        loaded = llm.use_adapter("ahoy")
        assert loaded.digest == adapter.digest
        assert (loaded.name, loaded.strategy, loaded.scale, loaded.slot) == ("ahoy", "native", 2.0, None)
        assert DERIVED.fullmatch(loaded.model)
        assert made(fake) == [loaded.model]
        ways = ["POST show", "GET tags", "GET version", "HEAD blobs", "POST blobs"]
        assert steps(fake) == [*ways, "POST create", "GET tags", "POST show", "POST generate"]
        created = next(seen.body for seen in fake.requests if seen.path == "/api/create")
        assert created["from"] == MODEL
        assert list(created["adapters"].values()) == list(fake.blobs)
        reply = llm.chat("Hi")
        assert asked(fake)[-1] == loaded.model
        assert reply.adapter == "ahoy"

    def test_adapter_of_one_call(self, connect: Any, fake: FakeOllama) -> None:
        llm = connect()
        assert llm.chat("Hi", adapter="ahoy").adapter == "ahoy"
        assert llm.chat("Hi").adapter is None
        assert asked(fake) == [*made(fake), MODEL]

    def test_existing_model_is_reused(self, connect: Any, fake: FakeOllama) -> None:
        first = connect().use_adapter("ahoy")
        before = len(fake.requests)
        assert connect().use_adapter("ahoy") == first
        assert steps(fake)[before:] == ["POST show", "GET tags", "POST show", "POST generate"]

    def test_known_file_is_not_uploaded(self, connect: Any, fake: FakeOllama, adapter: Ahoy) -> None:
        connect().use_adapter("ahoy")
        fake.models = [MODEL]
        before = len(fake.requests)
        connect().use_adapter("ahoy")
        assert "POST blobs" not in steps(fake)[before:]
        assert len(made(fake)) == 1

    def test_file_is_uploaded_unchanged(self, connect: Any, fake: FakeOllama, adapter: Ahoy) -> None:
        adapter.file.write_bytes(gguf(**{"general.type": "adapter", "filler": "x" * 1_000_000}))
        connect().use_adapter("ahoy")
        assert list(fake.blobs.values()) == [adapter.file.read_bytes()]

    def test_file_deleted_before_reading_is_remade(self, connect: Any, fake: FakeOllama, adapter: Ahoy) -> None:
        llm = connect(Resolver(Fleeting(adapter.file, name="fleeting")))
        assert [llm.use_adapter("fleeting").model] == made(fake)

    def test_file_always_deleted_raises(self, connect: Any, adapter: Ahoy) -> None:
        fleeting = Fleeting(adapter.file, name="fleeting")
        fleeting.times = 99
        with pytest.raises(
            AdapterError, match=r"deleted right after it was made\. Does another program empty"
        ) as caught:
            connect(Resolver(fleeting)).use_adapter("fleeting")
        assert "bug in the plugin" not in str(caught.value)

    @pytest.mark.parametrize("times", [1, 99])
    def test_file_deleted_before_upload_is_remade_once(
        self, connect: Any, fake: FakeOllama, adapter: Ahoy, monkeypatch: pytest.MonkeyPatch, times: int
    ) -> None:
        content = adapter.file.read_bytes()
        answer = fake._blob
        deleted: list[str] = []

        def deletes(seen: Any) -> Answer:
            if seen.method == "HEAD" and len(deleted) < times:
                deleted.append(seen.path)
                adapter.file.unlink()
            return answer(seen)

        class Renewed(Ahoy):
            def gguf(self, base: ModelInfo) -> Path:
                self.file.write_bytes(content)
                return self.file

        monkeypatch.setattr(fake, "_blob", deletes)
        llm = connect(Resolver(Renewed(adapter.file, name="renewed")))
        if times == 1:
            assert [llm.use_adapter("renewed").model] == made(fake)
            assert list(fake.blobs.values()) == [content]
        else:
            with pytest.raises(AdapterError, match="deleted right after it was made"):
                llm.use_adapter("renewed")
        assert len(deleted) == min(times, 2)

    def test_reset_upload_that_arrived(self, connect: Any, fake: FakeOllama, adapter: Ahoy) -> None:
        path = blob_path(adapter)
        fake.blobs[path.rpartition("/")[2]] = adapter.file.read_bytes()
        missing, reset = Answer(framing="length", status=404), Answer(raw=b"", ending="reset")
        fake.script(path, missing, reset, reset, Answer(framing="length"))
        assert connect().use_adapter("ahoy").strategy == "native"
        # The kept connection may have been closed before the file came, so it is sent once more.
        assert steps(fake)[3:7] == ["HEAD blobs", "POST blobs", "POST blobs", "HEAD blobs"]

    def test_reset_upload_that_did_not_arrive(self, connect: Any, fake: FakeOllama, adapter: Ahoy) -> None:
        missing, reset = Answer(framing="length", status=404), Answer(raw=b"", ending="reset")
        fake.script(blob_path(adapter), missing, reset, reset, missing)
        with pytest.raises(ConnectionFailed):
            connect().use_adapter("ahoy")
        assert made(fake) == []

    def test_missing_base_is_never_pulled(self, connect: Any, fake: FakeOllama) -> None:
        with pytest.raises(ModelNotFound) as caught:
            connect(model="smollm2:136m").use_adapter("ahoy")
        assert caught.value.suggestions == (MODEL,)
        assert "POST create" not in steps(fake)

    def test_other_models_are_never_overwritten(self, connect: Any, fake: FakeOllama) -> None:
        name = connect().use_adapter("ahoy").model
        replace(fake, name)
        longer = connect().use_adapter("ahoy").model
        assert longer.startswith(name)
        assert made(fake) == [name, longer]
        replace(fake, longer)
        before = dict(fake.derived)
        with pytest.raises(AdapterError, match=r"not overwritten: give the adapter another name\.$") as caught:
            connect().use_adapter("ahoy")
        assert type(caught.value) is AdapterError
        assert name not in str(caught.value), "nobody is advised to delete it"
        assert fake.derived == before

    @pytest.mark.parametrize("answer", ["adapters", "from"])
    def test_proof_needs_adapter_and_base(self, connect: Any, fake: FakeOllama, answer: str) -> None:
        """Either alone is not enough."""
        shown = fake._facts(MODEL, verbose=False)
        wrong = {"adapters": shown, "from": {**shown, "modelfile": "FROM /models/blobs/sha256-00\n"}}[answer]
        fake.script("/api/show", Answer([shown]), Answer([wrong]))
        with pytest.raises(AdapterUnsupported, match="does not contain the adapter"):
            connect().use_adapter("ahoy")
        assert made(fake) == []

    def test_activated_adapter_is_refused(self, connect: Any, fake: FakeOllama, adapter: Ahoy) -> None:
        adapter.file.write_bytes(gguf(**{"general.type": "adapter", "adapter.alora.invocation_tokens": "a"}))
        with pytest.raises(AdapterUnsupported, match=r"only after its invocation tokens.* Use the embedded provider"):
            connect(merge_adapters=True).chat("Hi", adapter="ahoy")
        assert steps(fake) == ["POST show"]


class TestServersWithoutAdapters:
    @pytest.mark.parametrize("adapters", ["refuses", "ignores"])
    def test_no_plain_copy_is_left(self, connect: Any, fake: FakeOllama, adapters: Any) -> None:
        fake.adapters = adapters
        with pytest.raises(AdapterUnsupported) as caught:
            connect().use_adapter("ahoy")
        assert made(fake) == []
        assert "POST generate" not in steps(fake)
        served, native, merged = caught.value.reasons
        assert served.startswith("served: ")
        assert {"refuses": "refused to create", "ignores": "does not contain the adapter"}[adapters] in native
        assert "`merge_adapters`" in merged
        for reason in caught.value.reasons:
            assert reason in str(caught.value)

    @pytest.mark.parametrize("adapters", ["refuses", "ignores"])
    def test_refusal_is_remembered_per_version(self, connect: Any, fake: FakeOllama, adapters: Any) -> None:
        fake.adapters = adapters
        for _ in range(2):
            with pytest.raises(AdapterUnsupported):
                connect().use_adapter("ahoy")
        assert steps(fake).count("POST create") == 1
        fake.version, fake.adapters = "0.99.0", "accepts"
        assert connect().use_adapter("ahoy").strategy == "native"

    def test_failed_adapter_is_not_remembered(self, connect: Any, fake: FakeOllama) -> None:
        fake.script("/api/create", Answer([{"error": "open /home/bob/.ollama/blobs/sha256-1: no such file"}]))
        with pytest.raises(AdapterUnsupported) as caught:
            connect().use_adapter("ahoy")
        assert "sha256-1: no such file" in str(caught.value)
        assert "bob" not in str(caught.value)
        assert connect().use_adapter("ahoy").strategy == "native"

    def test_lost_connection_tries_no_merge(self, connect: Any, fake: FakeOllama) -> None:
        fake.script("/api/create", *[Answer(raw=b"", ending="reset")] * 2)
        with pytest.raises(ConnectionFailed):
            connect(merge_adapters=True).use_adapter("ahoy")


@pytest.fixture
def merging(connect: Any, fake: FakeOllama, base_file: Path) -> Callable[..., Any]:
    fake.adapters = "refuses"
    settings = {"merge_adapters": True, "adapter_base_file": base_file}
    return lambda *others, **given: connect(*others, **{**settings, **given})


class Disk(NamedTuple):
    total: int = 0
    used: int = 0
    free: int = 0


class TestMerged:
    def test_adapter_is_merged_if_allowed(
        self, merging: Any, fake: FakeOllama, adapter: Ahoy, base_file: Path, watcher: Any
    ) -> None:
        llm = merging(watcher)
        loaded = llm.use_adapter("ahoy")
        assert (loaded.strategy, made(fake)) == ("merged", [loaded.model])
        assert DERIVED.fullmatch(loaded.model)
        assert adapter.merged == [base_file]
        reported = [event.progress for event in watcher.events if event.kind == "progress"]
        assert [(step.status, step.completed, step.total) for step in reported] == [
            ("merging", 1, 2),
            ("merging", 2, 2),
        ]
        assert llm.chat("Hi").adapter == "ahoy"
        assert asked(fake)[-1] == loaded.model

    def test_base_parameters_are_carried_over(self, merging: Any, fake: FakeOllama) -> None:
        fake.derived[MODEL] = {
            "system": "Be brief.",
            "license": "Apache-2.0",
            "parameters": {"num_ctx": 512, "temperature": 0.5, "stop": ["<|im_end|>", "a b"], "use_mmap": True},
            "messages": [{"role": "user", "content": "Hello"}],
        }
        template = fake._facts(MODEL, verbose=False)["template"]
        merging().use_adapter("ahoy")
        asked = next(seen.body for seen in fake.requests if seen.path == "/api/create" and "files" in seen.body)
        assert {name: asked[name] for name in fake.derived[MODEL]} == fake.derived[MODEL]
        assert asked["template"] == template

    def test_merged_model_is_reused(self, merging: Any, fake: FakeOllama, adapter: Ahoy) -> None:
        first = merging().use_adapter("ahoy")
        assert merging(merge_adapters=False).use_adapter("ahoy") == first
        assert len(adapter.merged) == 1

    def test_unmarked_model_is_deleted(self, merging: Any, fake: FakeOllama, adapter: Ahoy) -> None:
        adapter.mark = False
        with pytest.raises(AdapterUnsupported, match=r"merged: .*does not contain the adapter"):
            merging().use_adapter("ahoy")
        assert made(fake) == []

    def test_no_file_is_left(self, merging: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(temporary))
        merging().use_adapter("ahoy")
        assert list(temporary.iterdir()) == []

    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"merge_adapters": False}, "not allowed (`merge_adapters`)"),
            ({"merge_adapters": "10B"}, "more than `merge_adapters` allows (10)"),
            ({"adapter_base_file": None}, "cannot be read from here (`adapter_base_file` can name it)"),
            ({"adapter_base_file": "no-such-file"}, "cannot be read: No such file"),
        ],
    )
    def test_impossible_merge_gives_reason(
        self, merging: Any, adapter: Ahoy, settings: dict[str, Any], reason: str
    ) -> None:
        with pytest.raises(AdapterUnsupported) as caught:
            merging(**settings).use_adapter("ahoy")
        assert reason in caught.value.reasons[2]
        assert adapter.merged == []

    def test_unusable_temporary_folder_is_named(
        self, merging: Any, adapter: Ahoy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
        with pytest.raises(AdapterUnsupported) as caught:
            merging().use_adapter("ahoy")
        assert "temporary files (TMPDIR) cannot be used: No such file" in caught.value.reasons[2]
        assert adapter.merged == []

    def test_size_limit_allows_smaller_base(self, merging: Any) -> None:
        assert merging(merge_adapters="1MB").use_adapter("ahoy").strategy == "merged"

    def test_full_disk_prevents_merge(self, merging: Any, adapter: Ahoy, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(free=1))
        with pytest.raises(AdapterUnsupported, match="the disk has 1 bytes free"):
            merging().use_adapter("ahoy")
        assert adapter.merged == []

    def test_merge_ends_at_timeout(self, both: Any, merging: Any, adapter: Ahoy, fake: FakeOllama) -> None:
        class Slow(Ahoy):
            def merge(self, base_file: Path, out: Path, on_progress: Callable[[int, int], None] = print) -> Path:
                while True:
                    time.sleep(0.01)
                    on_progress(1, 2)

        llm = merging(Resolver(Slow(adapter.file, name="slow")))
        with pytest.raises(ProviderTimeout) as caught:
            both.start(llm.use_adapter, "slow", timeout=0.3).result(20)
        assert caught.value.phase == "total"
        assert made(fake) == []

    def test_cancelled_merge_leaves_nothing(
        self, adapter: Ahoy, base_file: Path, fake: FakeOllama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(temporary))
        fake.adapters = "refuses"
        begun, ended = threading.Event(), threading.Event()

        class Endless(Ahoy):
            def merge(self, base_file: Path, out: Path, on_progress: Callable[[int, int], None] = print) -> Path:
                try:
                    while True:
                        begun.set()
                        time.sleep(0.01)
                        on_progress(1, 2)
                finally:
                    ended.set()

        async def main() -> None:
            settings: Any = {"merge_adapters": True, "adapter_base_file": base_file}
            plugins = [Resolver(Endless(adapter.file))]
            async with graftage.connect_async("ollama", model=MODEL, host=fake.url, plugins=plugins, **settings) as llm:
                task = asyncio.create_task(llm.use_adapter("ahoy"))
                await asyncio.to_thread(begun.wait, 20)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

        asyncio.run(main())
        assert ended.wait(20)
        assert list(temporary.iterdir()) == []


def fails(fake: FakeOllama, words: str, status: int = 500) -> None:
    """Let the next trial of a model fail."""
    fake.script("/api/generate", Answer([{"error": words}], status=status, framing="length"))


PROOFS = [
    PANIC,
    "llama runner process has terminated: panic:",
    "unable to load model: /models/blobs/sha256-1",
]
GAVE_UP = ["llama runner process has terminated: exit status 2", "llama-server process has terminated: exit status 1"]


TRANSIENT: list[tuple[str, int, type[GraftageError]]] = [
    ("llama-server reported out-of-memory during startup", 500, ModelLoadFailed),
    ("model failed to load, this may be due to resource limitations or an internal error", 500, ModelLoadFailed),
    ("llama-server process has terminated: signal: killed", 500, ModelLoadFailed),
    ("llama runner process has terminated with exit code -1", 500, ModelLoadFailed),
    ("llama runner process has terminated: cudaMalloc failed: out of memory", 500, ModelLoadFailed),
    ("unknown model architecture: 'odd'", 500, ModelLoadFailed),
    ("timed out waiting for llama runner to start - progress 0.00 - ", 500, ModelLoadFailed),
    ("model runner has unexpectedly stopped, this may be due to resource limitations", 500, InferenceFailed),
    ("an error was encountered while running the model: unexpected EOF", 500, InferenceFailed),
    ("unexpected server status: llm server loading model", 500, Overloaded),
    ("server busy, please try again.  maximum pending requests exceeded", 503, Overloaded),
    ("EOF", 500, InferenceFailed),
    ("context canceled", 499, InferenceFailed),
    ("something odd", 500, InferenceFailed),
]


class TestTrial:
    """The first use of a derived model, which shows whether the adapter fits."""

    @pytest.mark.parametrize("words", PROOFS + GAVE_UP)
    def test_crashing_adapter_is_incompatible(self, connect: Any, fake: FakeOllama, words: str) -> None:
        fails(fake, words)
        with pytest.raises(AdapterIncompatible) as caught:
            connect(attempts=3).use_adapter("ahoy")
        assert made(fake) == []
        assert steps(fake).count("POST generate") == 1, "a retry would crash it again"
        assert len(caught.value.reasons) == 1
        assert "/models" not in str(caught.value)
        assert caught.value.hint

    @pytest.mark.parametrize("is_new", [True, False])
    @pytest.mark.parametrize(("words", "status", "kind"), TRANSIENT)
    def test_server_fault_keeps_the_model(
        self, connect: Any, fake: FakeOllama, words: str, status: int, kind: type[GraftageError], *, is_new: bool
    ) -> None:
        if not is_new:
            connect().use_adapter("ahoy")
        fails(fake, words, status)
        with pytest.raises(kind):
            connect().use_adapter("ahoy")
        assert len(made(fake)) == 1
        assert connect().use_adapter("ahoy").model == made(fake)[0]

    @pytest.mark.parametrize("words", PROOFS + GAVE_UP)
    def test_existing_model_is_never_deleted(self, connect: Any, fake: FakeOllama, words: str) -> None:
        model = connect().use_adapter("ahoy").model
        fails(fake, words)
        with pytest.raises(ModelLoadFailed if words in GAVE_UP else AdapterIncompatible) as caught:
            connect().use_adapter("ahoy")
        assert made(fake) == [model]
        assert "was deleted" not in str(caught.value)

    @pytest.mark.parametrize(
        "words",
        ["unexpected server status: llm server loading model", "llama-server process has terminated: signal: killed"],
    )
    def test_passing_fault_is_retried(self, connect: Any, fake: FakeOllama, words: str) -> None:
        fails(fake, words)
        llm = connect(attempts=2)
        assert [llm.use_adapter("ahoy").model] == made(fake)
        assert llm.stats().retries == 1

    @pytest.mark.parametrize(
        "words",
        [
            "llama-server reported out-of-memory during startup",
            "model failed to load, this may be due to resource limitations or an internal error",
        ],
    )
    def test_server_short_of_memory(self, connect: Any, fake: FakeOllama, words: str) -> None:
        fails(fake, words)
        with pytest.raises(ModelLoadFailed) as caught:
            connect().use_adapter("ahoy")
        assert caught.value.reason == "memory"

    def test_loading_server_is_retried(self, connect: Any, fake: FakeOllama) -> None:
        busy = Answer([{"error": "unexpected server status: llm server loading model"}], status=500, framing="length")
        fake.script("/api/chat", busy, busy)
        llm = connect(attempts=3)
        assert llm.chat("Hi").text == fake.reply
        assert llm.stats().retries == 2

    def test_secret_is_hidden_before_truncation(self, fake: FakeOllama) -> None:
        secret = "sk-0123456789abcdef"
        with graftage.connect("ollama", model=MODEL, host=fake.url, api_key=secret, attempts=1) as llm:
            for length in range(460, 520):
                words = "x" * length + secret + "y" * 3000
                fake.script("/api/chat", Answer([{"error": words}], status=500, framing="length"))
                with pytest.raises(ProviderError) as caught:
                    llm.chat("x")
                assert "sk-" not in f"{caught.value} {caught.value.details}", length

    def test_engine_without_adapters_falls_to_merge(self, merging: Any, fake: FakeOllama) -> None:
        fake.adapters = "accepts"
        words = "llama runner process has terminated: loras are not yet implemented"
        fake.script("/api/generate", Answer([{"error": words}], status=500, framing="length"))
        loaded = merging().use_adapter("ahoy")
        assert (loaded.strategy, made(fake)) == ("merged", [loaded.model])

    def test_model_larger_than_memory(self, connect: Any, fake: FakeOllama) -> None:
        words = "model requires more system memory (9 GiB) than is available (1 GiB)"
        fake.script("/api/generate", Answer([{"error": words}], status=500, framing="length"))
        with pytest.raises(ModelLoadFailed) as caught:
            connect().use_adapter("ahoy")
        assert caught.value.reason == "memory"
        assert len(made(fake)) == 1


class TestMixes:
    def test_mix_is_one_model_that_is_pruned(self, connect: Any, fake: FakeOllama, adapter: Ahoy) -> None:
        other = Ahoy(adapter.file, name="other", digest="sha256:" + "b" * 64)
        llm = connect(Resolver(other))
        choices = (["ahoy", ("other", 0.6)], [("ahoy", 0.6), "other"], ("ahoy", 0.6), "ahoy")
        replies = [llm.chat("Hi", adapter=each) for each in (*choices, *choices)]
        assert [each.adapter for each in replies[:4]] == ["ahoy + 0.6 other", "0.6 ahoy + other", "0.6 ahoy", "ahoy"]
        assert len(made(fake)) == 4
        assert [each.model for each in replies] == made(fake) * 2
        assert len(llm.prune_adapters(dry_run=False)) == 4
        assert made(fake) == []

    def test_lost_mix_is_made_again(self, connect: Any, fake: FakeOllama) -> None:
        llm = connect()
        name = llm.chat("Hi", adapter=("ahoy", 0.5)).model
        replace(fake, name)
        assert llm.chat("Hi", adapter=("ahoy", 0.5)).model == made(fake)[1]


class TestServed:
    """Models that carry the adapter already."""

    def test_model_is_used_unchanged(self, connect: Any, fake: FakeOllama, adapter: Ahoy) -> None:
        fake.models.append("pirate:latest")
        fake.derived["pirate:latest"] = {"from": MODEL, "adapters": {"a.gguf": adapter.digest}}
        adapter.served_as = "pirate:latest"
        loaded = connect().use_adapter("ahoy")
        assert (loaded.model, loaded.strategy) == ("pirate:latest", "served")
        assert "POST create" not in steps(fake)

    def test_other_base_is_refused(self, connect: Any, fake: FakeOllama, adapter: Ahoy) -> None:
        fake.models += ["pirate:latest", "other:1b"]
        fake.derived["pirate:latest"] = {"from": "other:1b", "adapters": {"a.gguf": adapter.digest}}
        adapter.served_as = "pirate:latest"
        with pytest.raises(AdapterIncompatible, match="a model other than"):
            connect().use_adapter("ahoy")
        assert connect().use_adapter("ahoy", force=True).model == "pirate:latest"

    @pytest.mark.parametrize("there", [True, False])
    def test_model_without_adapter_is_not_used(
        self, connect: Any, fake: FakeOllama, adapter: Ahoy, there: bool
    ) -> None:
        if there:
            fake.models.append("pirate:latest")
        adapter.served_as = "pirate:latest"
        adapter.fails = AdapterUnsupported("Its file is not known.")
        with pytest.raises(AdapterUnsupported) as caught:
            connect().use_adapter("ahoy")
        assert "`pirate:latest`" in caught.value.reasons[0]
        assert "Its file is not known" in caught.value.reasons[1]


class TestResolverFaults:
    @pytest.mark.parametrize("error", [KeyError("x"), OSError("disk"), RuntimeError()])
    def test_foreign_exception_is_wrapped(self, connect: Any, adapter: Ahoy, error: Exception) -> None:
        adapter.fails = error
        with pytest.raises(AdapterError, match=type(error).__name__) as caught:
            connect().use_adapter("ahoy")
        assert caught.value.__cause__ is error

    def test_invalid_adapter_is_never_uploaded(self, connect: Any, fake: FakeOllama, adapter: Ahoy) -> None:
        adapter.fails = AdapterInvalid("It is broken.")
        with pytest.raises(AdapterInvalid):
            connect().use_adapter("ahoy")
        assert steps(fake) == ["POST show"]


PROCESS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import graftage
from test_ollama_adapters import MODEL, Ahoy, Resolver
plugins = [Resolver(Ahoy(Path(sys.argv[3])))]
with graftage.connect("ollama", model=MODEL, host=sys.argv[2], plugins=plugins) as llm:
    print(llm.use_adapter("ahoy").model)
"""


class TestConcurrentCallers:
    def test_clients_make_one_model(self, both: Any, connect: Any, fake: FakeOllama) -> None:
        clients = [connect() for _ in range(16)]
        found = both.together([lambda llm=llm: llm.use_adapter("ahoy") for llm in clients])
        assert {each.model for each in found} == set(made(fake))
        assert len(made(fake)) == 1

    def test_connections_make_one_model(self, fake: FakeOllama, adapter: Ahoy) -> None:
        """Connections without the core, which would serialize its clients, but not those of other processes."""
        settings = OllamaSettings(host=fake.url)
        clients = Clients(settings, "sync")
        asked = ConnectRequest(name="ollama", settings=settings, http=clients.make)
        connections: list[Any] = [graftage_ollama.connect(asked) for _ in range(16)]
        request = LoadAdapterRequest(call=Call(attempts=1), adapter=adapter, model=MODEL)
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda connection: drive(connection.load_adapter(request)), connections))
        drive(clients.close())
        assert found == [found[0]] * 16
        assert made(fake) == [found[0].model]

    def test_processes_make_one_model(self, fake: FakeOllama, adapter: Ahoy) -> None:
        command = [sys.executable, "-c", PROCESS, str(Path(__file__).parent), fake.url, str(adapter.file)]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        printed = [process.communicate(timeout=60)[0].strip() for process in both]
        assert printed == made(fake) * 2


class TestNames:
    @pytest.mark.parametrize("base", [MODEL, "x" * 200, "hf.co/Org/Repo.Name:Q4_K_M", "ü:ö", "-_-"])
    @pytest.mark.parametrize("adapter", ["ahoy", "My Project! (v2)", "a" * 200, "日本", "../../etc"])
    def test_server_accepts_every_name(self, base: str, adapter: str) -> None:
        name = _name(base, adapter, "0123456789ab")
        part = "[a-z0-9_][a-z0-9_-]{0,79}"
        assert re.fullmatch(f"graftage-lora/{part}:{part}", name)

    @pytest.mark.parametrize("strategy", ["native", "merged"])
    def test_new_content_makes_another_model(
        self, connect: Any, request: pytest.FixtureRequest, fake: FakeOllama, adapter: Ahoy, strategy: str
    ) -> None:
        llm = connect() if strategy == "native" else request.getfixturevalue("merging")()
        first = llm.use_adapter("ahoy")
        adapter.digest = "sha256:" + "b" * 64
        adapter.file.write_bytes(gguf(**{"general.type": "adapter", "adapter.type": "lora", "version": "2"}))
        second = llm.use_adapter("ahoy")
        assert [(each.name, each.strategy) for each in (first, second)] == [("ahoy", strategy)] * 2
        assert [each.digest[-1] for each in (first, second)] == ["a", "b"]
        assert first.model != second.model
        llm.chat("Hi")
        assert asked(fake)[-1] == second.model

    def test_name_depends_on_content(self) -> None:
        names = {
            _name(MODEL, "ahoy", _key(strategy, digest, weights)[:12])
            for strategy in ("native", "merged")
            for digest in ("sha256:1", "sha256:2")
            for weights in (["sha256:1"], ["sha256:2"])
        }
        assert len(names) == 8


class TestHealing:
    """Derived models that other processes delete or replace."""

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("operation", ["chat", "generate"])
    def test_deleted_model_is_made_again(
        self, both: Any, connect: Any, fake: FakeOllama, operation: str, stream: bool
    ) -> None:
        llm = connect()
        ask = getattr(llm, operation)
        ask("Hi", adapter="ahoy")
        (name,) = made(fake)
        fake.models = [MODEL]
        if stream:
            with ask("Hi", adapter="ahoy", stream=True) as chunks:
                assert "".join(chunk.text for chunk in chunks) == fake.reply
        else:
            assert ask("Hi", adapter="ahoy").text == fake.reply
        assert made(fake) == [name]

    @pytest.mark.parametrize("operation", ["chat", "generate", "count_tokens"])
    def test_replaced_model_never_answers(self, connect: Any, fake: FakeOllama, operation: str) -> None:
        llm = connect()
        ask = getattr(llm, operation)
        ask("Hi", adapter="ahoy")
        (name,) = made(fake)
        replace(fake, name)
        foreign = dict(fake.derived[name])
        ask("Hi", adapter="ahoy")
        other, longer = made(fake)
        assert (other, fake.derived[other]) == (name, foreign)
        assert longer.startswith(name)
        before = len(fake.requests)
        ask("Hi", adapter="ahoy")
        assert steps(fake)[before:] == [f"POST {operation.replace('count_tokens', 'chat')}", "GET tags"]
        assert fake.requests[before].body["model"] == longer

    def test_active_adapter_is_mended(self, connect: Any, fake: FakeOllama) -> None:
        llm = connect()
        name = llm.use_adapter("ahoy").model
        replace(fake, name)
        reply = llm.chat("Hi")
        assert (reply.adapter, reply.model) == ("ahoy", made(fake)[1])

    def test_customized_model_stays_in_use(self, connect: Any, fake: FakeOllama) -> None:
        llm = connect()
        name = llm.use_adapter("ahoy").model
        fake.derived[name] = {**fake.derived[name], **OWN}
        assert llm.chat("Hi").model == name
        assert made(fake) == [name]

    def test_second_loss_in_one_call_raises(self, connect: Any, fake: FakeOllama) -> None:
        llm = connect()
        llm.use_adapter("ahoy")
        gone = Answer([{"error": "model not found, try pulling it first"}], status=404, framing="length")
        fake.script("/api/chat", gone, gone)
        with pytest.raises(AdapterError, match=r"deleted or replaced.*Try again"):
            llm.chat("Hi")
        assert llm.chat("Hi").text == fake.reply

    @pytest.mark.parametrize("replaced", [True, False])
    def test_refusal_of_a_replaced_model_is_mended(self, connect: Any, fake: FakeOllama, replaced: bool) -> None:
        llm = connect()
        name = llm.use_adapter("ahoy").model
        if replaced:
            replace(fake, name)
        fake.script("/api/chat", Answer([{"error": f'"{name}" does not support chat'}], status=400, framing="length"))
        if replaced:
            assert llm.chat("Hi").model == made(fake)[1]
        else:
            with pytest.raises(ProviderError, match="does not support chat"):
                llm.chat("Hi")

    def test_base_alone_is_never_checked(self, connect: Any, fake: FakeOllama) -> None:
        connect().chat("Hi")
        assert steps(fake) == ["POST chat"]

    def test_served_model_without_it_is_replaced(self, connect: Any, fake: FakeOllama, adapter: Ahoy) -> None:
        fake.models.append("pirate:latest")
        fake.derived["pirate:latest"] = {"from": MODEL, "adapters": {"a.gguf": adapter.digest}}
        adapter.served_as = "pirate"
        llm = connect()
        assert llm.chat("Hi", adapter="ahoy").model == "pirate"
        replace(fake, "pirate:latest")
        assert llm.chat("Hi", adapter="ahoy").model in made(fake)

    def test_model_deleted_while_loading(self, connect: Any, fake: FakeOllama) -> None:
        gone = Answer([{"error": "model 'x' not found"}], status=404, framing="length")
        fake.script("/api/generate", *[gone] * 3)
        with pytest.raises(AdapterError, match="deletes the server's models with the adapter `ahoy`"):
            connect().use_adapter("ahoy")
        assert connect().use_adapter("ahoy").model in made(fake)
        assert steps(fake).count("POST generate") == 4

    def test_longer_name_is_pruned(self, connect: Any, fake: FakeOllama) -> None:
        llm = connect()
        name = llm.use_adapter("ahoy").model
        replace(fake, name)
        llm.chat("Hi")
        _, longer = made(fake)
        assert [each.name for each in llm.prune_adapters(dry_run=False)] == [longer]
        assert made(fake) == [name]


class TestUnload:
    def test_unload_deletes_nothing(self, connect: Any, fake: FakeOllama) -> None:
        llm = connect()
        model = llm.use_adapter("ahoy").model
        assert model in fake.loaded
        llm.unload_adapter("ahoy")
        assert model not in fake.loaded
        assert made(fake) == [model]

    def test_unload_of_deleted_model_passes(self, connect: Any, fake: FakeOllama) -> None:
        llm = connect()
        llm.use_adapter("ahoy")
        fake.models = [MODEL]
        assert llm.unload_adapter("ahoy") is None


OWN: dict[str, Any] = {
    "system": "You are a pirate.",
    "license": "Mine alone.",
    "template": "{{ .Prompt }}",
    "parameters": {"num_ctx": 99},
    "messages": [{"role": "user", "content": "Hello"}],
}


class TestPrune:
    def test_dry_run_deletes_nothing(self, connect: Any, fake: FakeOllama) -> None:
        llm = connect()
        model = llm.use_adapter("ahoy").model
        (listed,) = llm.prune_adapters()
        assert (listed.name, listed.adapters) == (model, tuple(fake.blobs))
        assert made(fake) == [model]
        assert [each.name for each in llm.prune_adapters(dry_run=False)] == [model]
        assert made(fake) == []
        assert llm.prune_adapters(dry_run=False) == ()
        assert llm.use_adapter("ahoy").model == model, "it is created again if needed"
        assert made(fake) == [model]

    def test_merged_models_are_pruned(self, merging: Any, fake: FakeOllama, adapter: Ahoy) -> None:
        llm = merging()
        model = llm.use_adapter("ahoy").model
        (gone,) = llm.prune_adapters(dry_run=False)
        assert (gone.name, gone.adapters) == (model, (adapter.digest,))
        assert made(fake) == []

    @pytest.mark.parametrize(
        ("name", "body"),
        [
            ("graftage-lora/mine:latest", {"from": MODEL}),
            ("graftage-lora/smollm2-135m:ahoy-0123456789ab", {"from": MODEL}),
            ("graftage-lora/smollm2-135m:ahoy-0123456789ab", {"from": MODEL, "adapters": {"a": "sha256:" + "1" * 64}}),
            ("bob/graftage-lora:ahoy-0123456789ab", {"from": MODEL}),
            ("graftage-lora:latest", {"from": MODEL}),
            ("pirate:latest", {"from": MODEL, "adapters": {"a": "sha256:" + "1" * 64}}),
        ],
    )
    def test_unproven_models_stay(self, connect: Any, fake: FakeOllama, name: str, body: dict[str, Any]) -> None:
        fake.models.append(name)
        fake.derived[name] = body
        assert connect().prune_adapters(dry_run=False) == ()
        assert fake.models == [MODEL, name]

    def test_merged_copy_under_other_key_stays(self, merging: Any, fake: FakeOllama, adapter: Ahoy) -> None:
        llm = merging()
        model = llm.use_adapter("ahoy").model
        copy = model[:-12] + "abcdef012345"
        fake.models.append(copy)
        fake.derived[copy] = fake.derived[model]
        assert [each.name for each in llm.prune_adapters(dry_run=False)] == [model]
        assert made(fake) == [copy]

    def test_copy_under_custom_name_stays(self, connect: Any, fake: FakeOllama) -> None:
        llm = connect()
        model = llm.use_adapter("ahoy").model
        fake.models.append("mine:latest")
        fake.derived["mine:latest"] = fake.derived[model]
        llm.prune_adapters(dry_run=False)
        assert fake.models == [MODEL, "mine:latest"]

    @pytest.mark.parametrize("what", list(OWN))
    def test_customized_model_stays(self, connect: Any, fake: FakeOllama, what: str) -> None:
        llm = connect()
        model = llm.use_adapter("ahoy").model
        fake.derived[model] = {**fake.derived[model], what: OWN[what]}
        assert llm.prune_adapters(dry_run=False) == ()
        assert made(fake) == [model]

    def test_copies_of_derived_models_stay(self, connect: Any, fake: FakeOllama) -> None:
        llm = connect()
        model = llm.use_adapter("ahoy").model
        copies = ["graftage-lora/mine:ahoy-" + model[-12:], model[:-12] + "abcdef012345"]
        fake.models += copies
        fake.derived.update(dict.fromkeys(copies, fake.derived[model]))
        assert [each.name for each in llm.prune_adapters(dry_run=False)] == [model]
        assert made(fake) == copies

    def test_model_without_base_stays(self, connect: Any, fake: FakeOllama) -> None:
        llm = connect()
        model = llm.use_adapter("ahoy").model
        fake.models.remove(MODEL)
        assert llm.prune_adapters(dry_run=False) == ()
        assert fake.models == [model]

    def test_keep(self, connect: Any, fake: FakeOllama) -> None:
        llm = connect()
        model = llm.use_adapter("ahoy").model
        assert llm.prune_adapters(keep=[model.upper()], dry_run=False) == ()
        assert made(fake) == [model]

    def test_older_than(self, connect: Any) -> None:
        llm = connect()
        model = llm.use_adapter("ahoy").model  # The fake's models are dated January 1, 2026.
        assert llm.prune_adapters(older_than=1e9) == ()
        assert [each.name for each in llm.prune_adapters(older_than=60)] == [model]


ODD = [b'{"models":7}', b'{"models":[7]}', b"{}", b"[]", b'{"models":[{"name":7,"model":7}]}']


class TestMalformedResponses:
    @pytest.mark.parametrize("body", ODD)
    def test_malformed_list_raises(self, connect: Any, fake: FakeOllama, body: bytes) -> None:
        fake.script("/api/tags", Answer([body], framing="length"))
        with pytest.raises(ProtocolError) as caught:
            connect().prune_adapters()
        assert caught.value.operation == "prune_adapters"

    @pytest.mark.parametrize("body", [b"[]", b'{"modelfile":7,"model_info":[]}', b'{"tensors":[7]}'])
    def test_malformed_model_raises(self, connect: Any, fake: FakeOllama, body: bytes) -> None:
        fake.script("/api/show", Answer([body], framing="length"))
        with pytest.raises(ProtocolError) as caught:
            connect().use_adapter("ahoy")
        assert caught.value.hint
