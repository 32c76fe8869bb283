"""Adapters pulled from a stand-in for the Hugging Face hub, through its own library."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import unquote

import pytest
from lora_files import Place, bind, pairs, write_gguf, write_mlx, write_peft

from graftage.calls import Call, ListAdaptersRequest, PullAdapterRequest
from graftage.exceptions import (
    AdapterError,
    AdapterInvalid,
    AdapterNotFound,
    AdapterUnsupported,
    ProviderTimeout,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from graftage.types import AdapterInfo

STYLE = "someone/style"
TOKEN = "hf_aVerySecretToken"


class Server(http.server.ThreadingHTTPServer):
    """A server that prints nothing if a client goes away."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Expect it."""


class Hub:
    """A stand-in for the hub, as far as `huggingface_hub` asks it for a model's files."""

    def __init__(self) -> None:
        self.revisions: dict[tuple[str, str], str] = {}
        """The commit of each repository's branch or tag."""
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        """The files of each repository's commit."""
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.status = 200
        self.code = ""
        """The library's word for an error."""
        self.stated: int | None = None
        """The size that the list of files states, if it is wrong."""
        self.moves_to = ""
        """The commit that each file is of, if the branch moves after the list of files."""
        self.pause = 0.0
        self._server = Server(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, folder: Path, *revisions: str, repository: str = STYLE) -> str:
        """Publish the files of a folder as a new commit of some revisions; return the commit."""
        held = {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}
        commit = hashlib.sha1(repr(sorted(held.items())).encode()).hexdigest()
        self.files[repository, commit] = held
        for each in (commit, *revisions):
            self.revisions[repository, each] = commit
        return commit


class Handler(http.server.BaseHTTPRequestHandler):
    """The request handler of a `Hub`."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.hub
        hub.requests.append((self.command, self.path, {key.lower(): each for key, each in self.headers.items()}))
        if hub.status != 200:
            self._send(b"{}", status=hub.status, headers={"X-Error-Code": hub.code} if hub.code else {})
            return
        parts = [unquote(each) for each in self.path.partition("?")[0].strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            self._info("/".join(parts[2:4]), "/".join(parts[5:]) or "main")
        elif parts[2:3] == ["resolve"]:
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._send(b"", status=404)

    def _commit(self, repository: str, revision: str) -> str | None:
        known = {name for name, _ in self.hub.revisions}
        commit = self.hub.revisions.get((repository, revision))
        if commit is None:
            code = "RevisionNotFound" if repository in known else "RepoNotFound"
            self._send(b"{}", status=404, headers={"X-Error-Code": code})
        return commit

    def _info(self, repository: str, revision: str) -> None:
        if commit := self._commit(repository, revision):
            held = self.hub.files[repository, commit]
            siblings = [{"rfilename": name, "size": self.hub.stated or len(data)} for name, data in held.items()]
            body = {"id": repository, "modelId": repository, "sha": commit, "siblings": siblings, "tags": []}
            self._send(json.dumps(body).encode())

    def _file(self, repository: str, revision: str, name: str) -> None:
        if commit := self._commit(repository, self.hub.moves_to or revision):
            data = self.hub.files[repository, commit].get(name)
            if data is None:
                self._send(b"", status=404, headers={"X-Error-Code": "EntryNotFound"})
                return
            etag = hashlib.sha256(data).hexdigest()
            self._send(data, headers={"X-Repo-Commit": commit, "ETag": f'"{etag}"', "X-Linked-Size": str(len(data))})

    def _send(self, data: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            if self.command == "GET":
                time.sleep(self.hub.pause)
                self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "adapters").mkdir()
    return Place(tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one adapter in two versions, and the user's token."""
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        model = Place(tmp_path).model
        hub.add(write_peft(tmp_path / "made" / "1", pairs(model, seed=1)), "v1.2")
        second = write_peft(tmp_path / "made" / "2", pairs(model, seed=2))
        (second / "README.md").write_text("A style.", encoding="utf-8")
        (second / "training.bin").write_bytes(b"x" * 10_000)
        hub.add(second, "main")
        yield hub


def pull(place: Place, reference: str = STYLE, *, settings: dict[str, Any] | None = None, **more: Any) -> AdapterInfo:
    found = place.plugin(**(settings or {})).pull_adapter(PullAdapterRequest(reference=reference, **more))
    assert found is not None
    return found  # type: ignore[no-any-return]


def registry(place: Place) -> dict[str, Any]:
    return tomllib.loads((place.folder / "adapters.toml").read_text("utf-8"))


class TestPull:
    @pytest.mark.parametrize("reference", [STYLE, f"hf://{STYLE}"])
    def test_bound_by_commit_and_digest(self, place: Place, hub: Hub, reference: str) -> None:
        found = pull(place, reference)
        commit = hub.revisions[STYLE, "main"]
        right = place.resolve(place.folder / "made" / "2").digest
        assert registry(place) == {"style": {"path": f"hf://{STYLE}@{commit}", "digest": right}}
        assert (found.name, found.reference, found.digest, found.problem) == ("style", "style", right, None)
        assert (found.rank, found.base_model, found.verdict) == (4, "someone/small-1m", None)
        assert [each.name for each in place.plugin().list_adapters(ListAdaptersRequest())] == ["style"]
        adapter = place.resolve("style")
        assert (adapter.digest, adapter.source) == (right, "registry")
        assert place.resolve(f"hf://{STYLE}").digest == right

    def test_needs_no_network_afterwards(self, place: Place, hub: Hub) -> None:
        pull(place)
        hub.status = 500
        before = len(hub.requests)
        assert place.resolve("style").gguf(place.model.info()).exists()
        assert len(hub.requests) == before

    def test_downloads_only_what_is_needed(self, place: Place, hub: Hub) -> None:
        pull(place)
        fetched = {path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and "resolve" in path}
        assert fetched == {"adapter_config.json", "adapter_model.safetensors"}

    def test_versions_by_tag(self, place: Place, hub: Hub) -> None:
        old, new = pull(place, f"{STYLE}@v1.2"), pull(place)
        assert (old.name, new.name) == ("style@v1.2", "style")
        assert registry(place)["style@v1.2"]["revision"] == "v1.2"
        assert old.digest == place.resolve("style@v1.2").digest == place.resolve(f"hf://{STYLE}@v1.2").digest
        assert new.digest == place.resolve("style").digest != old.digest
        commit = hub.revisions[STYLE, "v1.2"]
        exact = pull(place, f"{STYLE}@{commit}", name="exact")
        assert (exact.digest, "revision" in registry(place)["exact"]) == (old.digest, False)

    def test_name_keeps_meaning_when_branch_moves(self, place: Place, hub: Hub) -> None:
        before = pull(place)
        hub.add(write_peft(place.folder / "made" / "3", pairs(place.model, seed=3)), "main")
        assert place.resolve("style").digest == before.digest
        with pytest.raises(AdapterError, match="means something else already") as caught:
            pull(place)
        assert "overwrite" in str(caught.value)
        assert place.resolve("style").digest == before.digest
        after = pull(place, overwrite=True)
        assert place.resolve("style").digest == after.digest != before.digest

    def test_same_content_may_be_bound_again(self, place: Place, hub: Hub) -> None:
        first = pull(place)
        folder = place.folder / "made" / "2"
        (folder / "README.md").write_text("Another text.", encoding="utf-8")
        commit = hub.add(folder, "main")
        assert pull(place).digest == first.digest
        assert registry(place)["style"]["path"].endswith(commit)

    def test_name_of_folder_is_not_taken_over(self, place: Place, hub: Hub) -> None:
        write_peft(place.folder / "adapters" / "style", pairs(place.model, seed=9))
        with pytest.raises(AdapterError, match="means something else"):
            pull(place)
        assert not (place.folder / "adapters.toml").exists()
        assert pull(place, name="theirs").reference == "theirs"

    def test_emptied_cache_is_filled_again(self, place: Place, hub: Hub) -> None:
        digest = pull(place, name="mine").digest
        shutil.rmtree(place.folder / "hub")
        commit = hub.revisions[STYLE, "main"]
        with pytest.raises(AdapterInvalid, match=f"graftage adapters pull {STYLE}@{commit}"):
            place.resolve("mine")
        hub.add(write_peft(place.folder / "made" / "3", pairs(place.model, seed=3)), "main")
        pull(place, f"{STYLE}@{commit}", name="mine")
        assert place.resolve("mine").digest == digest

    def test_registry_keeps_comments_and_entries(self, place: Place, hub: Hub) -> None:
        path = place.folder / "adapters.toml"
        bind(path, path="made/1", scale=3.0)
        text = path.read_text("utf-8") + "# by hand\n\n[other] # kept\npath = 'elsewhere'\n"
        path.write_text(text, encoding="utf-8")
        pull(place)
        assert path.read_text("utf-8").startswith(text)
        assert list(registry(place)) == ["bound", "other", "style"]

    def test_registry_may_be_link(self, place: Place, hub: Hub) -> None:
        real = place.folder / "dotfiles" / "adapters.toml"
        real.parent.mkdir()
        real.write_text("# mine\n", encoding="utf-8")
        (place.folder / "adapters.toml").symlink_to(real)
        pull(place)
        assert (place.folder / "adapters.toml").is_symlink()
        assert "style" in real.read_text("utf-8")

    def test_broken_registry_is_left_alone(self, place: Place, hub: Hub) -> None:
        path = place.folder / "adapters.toml"
        path.write_text("broken", encoding="utf-8")
        with pytest.raises(AdapterError, match=r"adapters\.toml"):
            pull(place, overwrite=True)
        with pytest.raises(AdapterError, match=r"adapters\.toml.* cannot be read.*Fix it or move it away"):
            pull(place)
        assert path.read_text("utf-8") == "broken"

    def test_encoding_and_mode_are_kept(self, place: Place, hub: Hub) -> None:
        path = place.folder / "adapters.toml"
        path.write_bytes(b"\xef\xbb\xbf# mine\r\n")
        path.chmod(0o644)
        pull(place)
        assert path.stat().st_mode & 0o777 == 0o644
        assert b"# mine\r\n" in path.read_bytes()
        assert place.resolve("style").source == "registry"

    def test_own_binding_is_not_replaced(self, place: Place, hub: Hub) -> None:
        path = place.folder / "adapters.toml"
        path.write_text("[style]\npath = 'made/2' # my copy\n", encoding="utf-8")
        with pytest.raises(AdapterError, match="means something else"):
            pull(place)
        pull(place, overwrite=True)
        assert registry(place)["style"]["path"].startswith("hf://")

    def test_keys_of_same_content_are_kept(self, place: Place, hub: Hub) -> None:
        pull(place, f"{STYLE}@v1.2", name="mine")
        path = place.folder / "adapters.toml"
        path.write_text(path.read_text("utf-8") + "base_model = 'small:1m' # a note\n", encoding="utf-8")
        pull(place, f"{STYLE}@{hub.revisions[STYLE, 'v1.2']}", name="mine")
        assert "base_model = 'small:1m' # a note" in path.read_text("utf-8")
        assert set(registry(place)["mine"]) == {"path", "digest", "base_model"}
        assert place.resolve("mine").found.base_model == "small:1m"

    def test_concurrent_pulls_lose_nothing(self, place: Place, hub: Hub) -> None:
        names = [f"style {number}" for number in range(6)]
        plugins = [place.plugin() for _ in names]
        threads = [
            threading.Thread(target=plugin.pull_adapter, args=(PullAdapterRequest(reference=STYLE, name=name),))
            for plugin, name in zip(plugins, names, strict=True)
        ]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert sorted(registry(place)) == names

    @pytest.mark.parametrize("layout", ["mlx", "gguf"])
    def test_other_layouts(self, place: Place, hub: Hub, layout: str) -> None:
        folder = place.folder / "made" / layout
        if layout == "mlx":
            write_mlx(folder, pairs(place.model))
        else:
            write_gguf(folder / "adapter-F16.gguf", place.model, pairs(place.model))
        hub.add(folder, "main", repository="someone/other")
        pull(place, "someone/other")
        assert place.resolve("other").digest == place.resolve(folder).digest
        assert place.resolve("other", base=lambda: None).name == "other", "the pin does not depend on the base model"

    def test_shared_blobs_are_inside(self, place: Place, hub: Hub) -> None:
        pull(place)
        (blobs,) = (place.folder / "hub").glob("models--*/blobs")
        shared = place.folder / "hub" / "blobs" / "ab"
        shared.mkdir(parents=True)
        for each in blobs.iterdir():
            each.rename(shared / each.name)
            each.symlink_to(f"../../blobs/ab/{each.name}")
        assert place.resolve("style").verdict.status == "compatible"

    def test_progress_is_reported(self, place: Place, hub: Hub) -> None:
        events: dict[str, list[Any]] = defaultdict(list)
        call = Call(emit=lambda event, **fields: events[event].append(fields["progress"]))
        found = pull(place, call=call)
        steps = events["progress"]
        assert steps[0].status == f"asking for {STYLE}"
        assert (steps[-1].status, steps[-1].digest) == ("success", found.digest)
        counts = [each.completed for each in steps if each.completed is not None]
        assert counts == sorted(counts)
        assert counts[-1] == {each.total for each in steps if each.total}.pop()


class TestOtherReferences:
    def test_are_left_to_other_plugins(self, place: Place) -> None:
        for reference in ("style", "./a/b", "/a/b", "a/b/c", "https://example.invalid/a/b", "a/b@../c", ""):
            assert place.plugin().pull_adapter(PullAdapterRequest(reference=reference)) is None
        with pytest.raises(AdapterNotFound, match="followed by"):
            pull(place, "hf://style")

    @pytest.mark.parametrize("name", ["a/b", "..", "CON", "", "x@0123456789ab", "x" * 200, "a\nb"])
    def test_invalid_names_are_refused(self, place: Place, hub: Hub, name: str) -> None:
        if name:
            with pytest.raises(AdapterInvalid, match="cannot be a name"):
                pull(place, name=name)
            assert not hub.requests

    def test_revision_that_is_no_name(self, place: Place, hub: Hub) -> None:
        hub.revisions[STYLE, "refs/pr/1"] = hub.revisions[STYLE, "v1.2"]
        assert pull(place, f"{STYLE}@refs/pr/1").name == "style"
        assert registry(place)["style"]["revision"] == "refs/pr/1"


REFUSED: dict[str, tuple[dict[str, bytes], str]] = {
    "a model": ({"config.json": b"{}", "model.safetensors": b"x"}, "contains no adapter, only config.json, model"),
    "nothing": ({}, "only nothing"),
    "a pickle": ({"adapter_config.json": b"{}", "adapter_model.bin": b"x"}, "is a pickle"),
    "two files": ({"a-F16.gguf": b"GGUF", "a-Q8_0.gguf": b"GGUF"}, "several GGUF files: a-F16"),
    "a folder in it": (
        {"run/adapter_config.json": b"{}", "run/adapter_model.safetensors": b"x"},
        "contains no adapter",
    ),
    "broken weights": ({"adapter_config.json": b"{}", "adapters.safetensors": b"x"}, "`peft_type`"),
}
ANSWERS: dict[str, tuple[int, str, type[Exception], str]] = {
    "no repository": (404, "RepoNotFound", AdapterNotFound, "HF_TOKEN"),
    "no access": (401, "", AdapterError, "denies access"),
    "forbidden": (403, "", AdapterError, "denies access"),
    "gated": (403, "GatedRepo", AdapterError, rf"Ask for access at \$HF_ENDPOINT/{STYLE}"),
    "no revision": (404, "RevisionNotFound", AdapterNotFound, "has no revision"),
    "broken": (400, "", AdapterError, "answered 400"),
}


class TestRefusals:
    @pytest.mark.parametrize("what", list(REFUSED))
    def test_repository_without_adapter(self, place: Place, hub: Hub, what: str) -> None:
        files, reason = REFUSED[what]
        hub.files["someone/odd", "0" * 40] = files
        hub.revisions["someone/odd", "main"] = "0" * 40
        with pytest.raises(AdapterInvalid, match=reason):
            pull(place, "someone/odd")
        assert not (place.folder / "adapters.toml").exists()

    @pytest.mark.parametrize("what", list(ANSWERS))
    def test_answers_have_way_out(self, place: Place, hub: Hub, what: str, caplog: pytest.LogCaptureFixture) -> None:
        hub.status, hub.code, kind, words = ANSWERS[what]
        with caplog.at_level(logging.DEBUG, "graftage"), pytest.raises(kind, match=words) as caught:
            pull(place)
        assert getattr(caught.value, "hint", None)
        assert any(TOKEN in headers.get("authorization", "") for _, _, headers in hub.requests)
        shown = f"{caught.value!r} {caught.value.__cause__!r} {caplog.text}"
        assert TOKEN not in shown
        assert "resolve" not in shown

    def test_password_of_endpoint_is_hidden(self, place: Place, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("//", "//user:S3cret@"))
        for hub.status, hub.code, kind, words in ANSWERS.values():
            with pytest.raises(kind, match=words) as caught:
                pull(place)
            assert "S3cret" not in repr(caught.value)

    def test_missing_repository_and_revision(self, place: Place, hub: Hub) -> None:
        with pytest.raises(AdapterNotFound, match="no repository `someone/nothing`"):
            pull(place, "someone/nothing")
        with pytest.raises(AdapterNotFound, match="no revision `v9`"):
            pull(place, f"{STYLE}@v9")

    def test_size_is_limited_before_download(self, place: Place, hub: Hub) -> None:
        with pytest.raises(AdapterInvalid, match=r"at most 2,000 are allowed.*GRAFTAGE_LORA_MAX_BYTES"):
            pull(place, settings={"max_bytes": 2000})
        hub.stated = 1 << 40
        with pytest.raises(AdapterInvalid, match="are allowed"):
            pull(place)
        assert not any("resolve" in path for _, path, _ in hub.requests)

    def test_more_than_stated_is_refused(self, place: Place, hub: Hub) -> None:
        hub.stated = 100
        with pytest.raises(AdapterInvalid, match="more than the 100 bytes"):
            pull(place)

    def test_moving_branch_is_refused(self, place: Place, hub: Hub) -> None:
        hub.moves_to = "v1.2"
        with pytest.raises(AdapterInvalid, match="changed while it was downloaded"):
            pull(place)
        assert not (place.folder / "adapters.toml").exists()

    def test_deadline_ends_download(self, place: Place, hub: Hub) -> None:
        hub.pause = 0.3
        call = Call(deadline=time.monotonic() + 0.1)
        with pytest.raises(ProviderTimeout):
            pull(place, call=call)

    def test_deadline_ends_waiting_for_registry(self, place: Place, hub: Hub) -> None:
        filelock = pytest.importorskip("filelock")
        with filelock.FileLock(place.folder / ".adapters.toml.lock"), pytest.raises(ProviderTimeout):
            pull(place, call=Call(deadline=time.monotonic() + 0.5))

    def test_unreachable_hub(self, place: Place, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(AdapterError, match="HF_ENDPOINT"):
            pull(place)

    def test_full_or_closed_disk(self, place: Place, hub: Hub) -> None:
        (place.folder / "file").write_text("in the way", encoding="utf-8")
        with pytest.raises(AdapterError, match="cannot be written"):
            pull(place, settings={"hub": place.folder / "file" / "hub"})
        with pytest.raises(AdapterError, match="cannot be read and written"):
            pull(place, settings={"registry": place.folder / "file" / "adapters.toml"})

    @pytest.mark.parametrize("package", ["huggingface_hub", "tomlkit", "filelock"])
    def test_missing_extra_is_named(self, place: Place, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(AdapterUnsupported, match=r"pip install 'graftage-lora\[hub\]'"):
            pull(place)


@pytest.mark.slow
def test_offline_mode_is_respected(place: Place, hub: Hub) -> None:
    program = (
        "import sys, pathlib; from graftage.calls import PullAdapterRequest; from graftage_lora import LoraPlugin\n"
        "plugin = LoraPlugin(hub=sys.argv[1], registry=sys.argv[1] + '.toml')\n"
        "try: plugin.pull_adapter(PullAdapterRequest(reference='someone/style'))\n"
        "except Exception as error: sys.exit(f'{type(error).__name__}: {error}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(place.folder / "hub")],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Unset HF_HUB_OFFLINE" in done.stderr
    assert done.stderr.startswith("AdapterError")
    assert not hub.requests
