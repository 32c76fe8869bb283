"""Finding adapters: references, sources, the registry, names that stay in their folder, verdicts, settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import unicodedata
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_files import COMMIT, Model, Place, bind, hub, pairs, write_gguf, write_mlx, write_peft

import graftage
from graftage.calls import ListAdaptersRequest, ResolveRequest
from graftage.exceptions import (
    AdapterInvalid,
    AdapterNotFound,
    AdapterUnsupported,
    RequestRejected,
    SettingsError,
)
from graftage.types import Adapter, ModelInfo

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def ours(place: Place) -> Path:
    """The folder of adapters, with one that is called `mine`."""
    write_peft(place.folder / "adapters" / "mine", pairs(place.model))
    return place.folder / "adapters"


class TestReference:
    def test_name(self, place: Place, ours: Path) -> None:
        found = place.resolve("mine")
        assert isinstance(found, Adapter)
        assert (found.name, found.scale, found.served_as) == ("mine", 2.0, None)
        assert found.verdict.status == "compatible"
        assert found.digest.startswith("sha256:")

    def test_path(self, place: Place, ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = place.resolve(ours / "mine")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert place.resolve(ours / "mine" / name).digest == whole.digest
        monkeypatch.chdir(ours)
        assert place.resolve("./mine", folders=[]).digest == whole.digest
        assert place.resolve("../adapters/mine", folders=[]).name == "mine"
        monkeypatch.setenv("HOME", str(ours))
        assert place.resolve("~/mine", folders=[]).digest == whole.digest

    def test_name_ignores_current_folder(self, place: Place, ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(ours)
        with pytest.raises(AdapterNotFound, match=r"start it with `\./`"):
            place.resolve("mine", folders=[])

    def test_paths_can_be_disabled(self, place: Place, ours: Path) -> None:
        with pytest.raises(AdapterNotFound, match="disabled"):
            place.resolve(ours / "mine", paths=False)
        assert place.resolve("mine", paths=False).name == "mine"

    def test_pinned_digest_must_match(self, place: Place, ours: Path) -> None:
        found = place.resolve("mine")
        for digest in (found.digest, found.digest[:19], found.digest.removeprefix("sha256:")[:12], found.facts.sha256):
            assert place.resolve(f"mine@{digest}").digest == found.digest
        with pytest.raises(AdapterInvalid, match=r"not 0{12}"):
            place.resolve("mine@" + "0" * 12)

    @pytest.mark.parametrize("write", [write_mlx, write_gguf])
    def test_digest_is_equal_across_layouts(self, place: Place, ours: Path, write: Callable[..., Path]) -> None:
        adapter = pairs(place.model)
        if write is write_gguf:
            other = write_gguf(place.folder / "other.gguf", place.model, adapter)
        else:
            other = write_mlx(place.folder / "other", adapter)
        digest = place.resolve("mine").digest
        assert place.resolve(other).digest == digest
        stronger = write_peft(place.folder / "stronger", pairs(place.model, scale=2.5))
        assert place.resolve(stronger).digest != digest


BOUND = '[mine]\npath = "elsewhere"\ndigest = "sha256:deadbeef"\n'
UNREADABLE: dict[str, Callable[[Path], object]] = {
    "an error of TOML": lambda path: path.write_text(BOUND + "[other]\nbroken", encoding="utf-8"),
    "a table twice": lambda path: path.write_text(BOUND + BOUND, encoding="utf-8"),
    "a name in two forms": lambda path: path.write_text(
        '["\u00fc"]\npath="a"\n["u\u0308"]\npath="b"\n', encoding="utf-8"
    ),
    "invalid UTF-8": lambda path: path.write_bytes(BOUND.encode("utf-16")),
    "a folder": lambda path: path.mkdir(),
    "a circular link": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "too large": lambda path: path.write_text(BOUND + "#" * (1 << 20), encoding="utf-8"),
}


class TestChain:
    def test_every_source_gives_a_reason(self, place: Place, ours: Path) -> None:
        with pytest.raises(AdapterNotFound) as caught:
            place.resolve("other", project=place.folder)
        said = {reason.partition(":")[0].split()[0]: reason for reason in caught.value.reasons}
        assert list(said) == ["path", "registry", "folder", "project", "hub", "server"]
        assert "no such entry" in said["folder"]
        assert "does not exist" in said["project"]
        assert "graftage adapters list" in str(caught.value)

    def test_failing_source_does_not_hide_next(self, place: Place, ours: Path) -> None:
        broken = place.folder / "a file"
        broken.write_text("not a folder", encoding="utf-8")
        assert place.resolve("mine", folders=[broken, ours]).name == "mine"
        with pytest.raises(AdapterNotFound) as caught:
            place.resolve("other", folders=[broken, ours])
        assert any("Not a directory" in reason for reason in caught.value.reasons)

    @pytest.mark.parametrize("where", ["the user's", "a folder's"])
    @pytest.mark.parametrize("what", list(UNREADABLE))
    def test_unreadable_registry_blocks_every_name(self, place: Place, ours: Path, what: str, where: str) -> None:
        first = place.folder / "first"
        first.mkdir()
        UNREADABLE[what]((place.folder if where == "the user's" else first) / "adapters.toml")
        with pytest.raises(AdapterInvalid, match=r"adapters\.toml, which may bind that name") as caught:
            place.resolve("mine", folders=[first, ours])
        assert caught.value.hint
        assert place.resolve(ours / "mine", folders=[first, ours]).name == "mine", "registries do not bind paths"

    @pytest.mark.parametrize(
        ("path", "reason"),
        [
            ("hf://me/mine", "graftage adapters pull me/mine"),
            ("hf://", "owner/name"),
            ("x" * 300, r"File name too long|no such file"),
            ("nowhere", "no such file"),
        ],
    )
    def test_broken_binding_is_final(self, place: Place, ours: Path, path: str, reason: str) -> None:
        text = f'[mine]\npath = "{path}"\ndigest = "sha256:deadbeef"\n'
        (place.folder / "adapters.toml").write_text(text, encoding="utf-8")
        (place.folder / "hub").mkdir()
        with pytest.raises(AdapterInvalid, match=reason):
            place.resolve("mine")

    def test_broken_adapter_ends_search(self, place: Place, ours: Path) -> None:
        (ours / "mine" / "adapter_model.safetensors").write_bytes(b"broken")
        write_peft(place.folder / "second" / "mine", pairs(place.model))
        with pytest.raises(AdapterInvalid, match="too short"):
            place.resolve("mine", folders=[ours, place.folder / "second"])

    def test_other_plugins_are_asked(self, place: Place, ours: Path) -> None:
        from graftage.hookspecs import hookimpl
        from graftage.testing.echo import Echo

        asked = []

        class Other:
            name = "other"

            @hookimpl
            def resolve_adapter(self, request: ResolveRequest) -> Adapter | None:
                asked.append(request.reference)
                return None

        with graftage.connect(Echo(), model="small", plugins=[Other(), place.plugin()]) as llm:
            with pytest.raises(AdapterNotFound):
                llm.chat("x", adapter="nothing")
            llm.use_adapter("mine")
        assert "nothing" in asked


ESCAPES = [
    "..",
    ".",
    "../secret",
    "..\\secret",
    "mine/../../secret",
    "adapters/../secret",
    "./../secret",
    "%2e%2e/secret",
    "..%2fsecret",
    "mine/",
    "mine\\",
    "mine.",
    "mine ",
    " mine",
    "MINE",
    "Mine",
    "m\u0131ne",
    "mine\0",
    "mine\n",
    "mine\u202e",
    "\ud800",
    "CON",
    "con.gguf",
    "nul",
    "NUL.txt",
    "COM1",
    "com¹",
    "lpt9.safetensors",
    "CONIN$",
    "C:mine",
    "C:\\mine",
    "\\\\server\\share",
    "mine:stream",
    "mine::$DATA",
    "-rf",
    ".hidden",
    "~",
    "~root",
    "$HOME",
    "",
    " ",
    "x" * 200,
    "x" * 100_000,
    "hf://../secret",
    "hf://a/..",
    "hf://a/b/../../secret",
    "hf:///etc/passwd",
    "hf://a/b@../../x",
    "hf://a--b/c",
    "file:///etc/passwd",
    "https://example.invalid/x",
]


class TestEscape:
    @pytest.mark.parametrize("reference", ESCAPES)
    def test_names_stay_in_folder(self, place: Place, ours: Path, reference: str) -> None:
        write_peft(place.folder / "secret", pairs(place.model))
        write_peft(ours / ".hidden", pairs(place.model))
        (place.folder / "hub").mkdir()
        with pytest.raises(AdapterNotFound) as caught:
            place.resolve(reference, paths=False, project=place.folder)
        assert caught.value.reasons

    @settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        reference=st.text(max_size=30)
        | st.lists(st.sampled_from(["..", ".", "/", "\\", "mine", "secret", "hf://", "@", "a", ":", "~", "%2e"])).map(
            "".join
        )
    )
    def test_any_text_stays_in_folder(self, tmp_path: Path, reference: str) -> None:
        place = Place(tmp_path)
        if not (tmp_path / "secret").exists():
            write_peft(tmp_path / "secret", pairs(place.model))
            (tmp_path / "adapters").mkdir()
        with pytest.raises(AdapterNotFound):
            place.resolve(reference, paths=False)

    def test_only_inside_links_are_followed(self, place: Place, ours: Path) -> None:
        write_peft(place.folder / "secret", pairs(place.model))
        (ours / "inside").symlink_to("mine")
        (ours / "outside").symlink_to(place.folder / "secret")
        assert place.resolve("inside").digest == place.resolve("mine").digest
        with pytest.raises(AdapterInvalid, match="out of its folder"):
            place.resolve("outside")

    def test_circular_link_hides_no_other(self, place: Place, ours: Path) -> None:
        (ours / "round").symlink_to("round")
        with pytest.raises(AdapterInvalid, match=r"out of its folder|no such file"):
            place.resolve("round")
        mine, other = place.plugin().list_adapters(ListAdaptersRequest())
        assert (mine.name, mine.problem, other.name) == ("mine", None, "round")
        assert other.problem

    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
    def test_file_link_outside_is_refused(self, place: Place, ours: Path, name: str) -> None:
        write_peft(place.folder / "secret", pairs(place.model))
        (ours / "mine" / name).unlink()
        (ours / "mine" / name).symlink_to(place.folder / "secret" / name)
        with pytest.raises(AdapterInvalid, match="out of its folder"):
            place.resolve("mine")


class TestNames:
    def test_case_must_match(self, place: Place, ours: Path) -> None:
        with pytest.raises(AdapterNotFound, match="there is `mine`, in a different case"):
            place.resolve("MINE")

    def test_any_language_and_dots(self, place: Place, ours: Path) -> None:
        for name in ("Übung 1", "проект", "v1.2", "a+b_c-d"):
            write_peft(ours / name, pairs(place.model))
            assert place.resolve(name).name == name

    @pytest.mark.parametrize("form", ["NFC", "NFD"])
    def test_unicode_forms_are_equal(self, place: Place, ours: Path, form: Any) -> None:
        name, written = "Übung é", unicodedata.normalize(form, "Übung é")
        write_peft(ours / written, pairs(place.model))
        write_gguf(ours / f"{written} 2.gguf", place.model, pairs(place.model))
        (place.folder / "adapters.toml").write_text(f'["{written} 3"]\npath = "adapters/mine"\n', encoding="utf-8")
        for each in (name, f"{name} 2", f"{name} 3"):
            for asked in ("NFC", "NFD"):
                assert place.resolve(unicodedata.normalize(asked, each)).name == each
        listed = {each.reference for each in place.plugin().list_adapters(ListAdaptersRequest())}
        assert listed == {"mine", name, f"{name} 2", f"{name} 3"}


class TestRegistry:
    def test_binds_path_scale_digest_and_base(self, place: Place, ours: Path) -> None:
        plain = place.resolve("mine")
        bind(place.folder / "adapters.toml", path=str(ours / "mine"), scale=3.0, base_model="someone/other-7b")
        bound = place.resolve("bound")
        assert (bound.name, bound.scale, bound.source) == ("bound", 3.0, "registry")
        assert bound.digest != plain.digest
        assert any("other-7b" in warning for warning in bound.verdict.warnings)
        bind(place.folder / "adapters.toml", path="adapters/mine", digest=plain.digest)
        assert place.resolve("bound").digest == plain.digest
        bind(place.folder / "adapters.toml", path="adapters/mine", digest="0" * 64)
        with pytest.raises(AdapterInvalid, match="another version"):
            place.resolve("bound")

    def test_scale_reaches_converted_file(self, place: Place, ours: Path) -> None:
        from lora_files import keys_of

        bind(place.folder / "adapters.toml", path="adapters/mine", scale=0.5)
        assert keys_of(place.resolve("bound").gguf(place.model.info()))["adapter.lora.alpha"] == 0.5 * 4

    def test_folder_registry_stays_inside(self, place: Place, ours: Path) -> None:
        bind(ours / "adapters.toml", path="mine", scale=3.0)
        assert place.resolve("bound").scale == 3.0
        write_peft(place.folder / "secret", pairs(place.model))
        for path in ("../secret", str(place.folder / "secret"), "mine/../../secret"):
            bind(ours / "adapters.toml", path=path)
            with pytest.raises(AdapterInvalid, match="out of its folder"):
                place.resolve("bound")
        bind(ours / "adapters.toml", path="hf://a/b")
        with pytest.raises(AdapterInvalid, match="user's registry"):
            place.resolve("bound")

    @pytest.mark.parametrize(
        ("table", "reason"),
        [
            ({"path": "mine", "scal": 2}, "Did you mean `scale`"),
            ({"scale": 2}, "invalid `path`"),
            ({"path": 7}, "invalid `path`"),
            ({"path": "mine", "scale": "big"}, "invalid `scale`"),
            ({"path": "mine", "scale": "2"}, "invalid `scale`"),
            ({"path": "mine", "scale": True}, "invalid `scale`"),
            ({"path": "mine", "digest": "abc"}, "invalid `digest`"),
            ({"path": "nowhere"}, "no such file"),
            ({"path": "mine", "scale": 0}, "scale"),
        ],
    )
    def test_wrong_entry_is_explained(self, place: Place, ours: Path, table: dict[str, Any], reason: str) -> None:
        bind(ours / "adapters.toml", **table)
        with pytest.raises(AdapterInvalid, match=reason):
            place.resolve("bound")
        assert place.resolve("mine").name == "mine"


class TestHub:
    def test_repository_is_found_offline(self, place: Place) -> None:
        hub(place)
        for reference in ("hf://someone/ahoy", "hf://someone/ahoy@main", f"hf://someone/ahoy@{COMMIT}"):
            found = place.resolve(reference)
            assert (found.name, found.source) == ("ahoy", "hub")
        assert place.resolve(f"hf://someone/ahoy@{found.digest}").digest == found.digest
        bind(place.folder / "adapters.toml", path="hf://someone/ahoy")
        assert place.resolve("bound").digest == found.digest

    def test_revision_stays_in_cache(self, place: Place) -> None:
        folder = hub(place)
        (folder / "refs" / "refs" / "pr").mkdir(parents=True)
        (folder / "refs" / "refs" / "pr" / "1").write_text(COMMIT, encoding="ascii")
        assert place.resolve("hf://someone/ahoy@refs/pr/1").name == "ahoy"
        for revision in ("refs/../../main", "../main", "refs//main", "/main", "refs/", "x/" * 300 + "x"):
            with pytest.raises(AdapterNotFound, match="followed by `owner/name`"):
                place.resolve(f"hf://someone/ahoy@{revision}")

    def test_missing_repository_hints_at_download(self, place: Place) -> None:
        hub(place)
        with pytest.raises(AdapterNotFound, match="graftage adapters pull someone/other"):
            place.resolve("hf://someone/other")
        with pytest.raises(AdapterNotFound, match="revision next"):
            place.resolve("hf://someone/ahoy@next")
        with pytest.raises(AdapterNotFound, match="does not have it"):
            place.resolve("hf://Someone/AHOY")
        with pytest.raises(AdapterNotFound, match="`hf://someone/ahoy` is a repository"):
            place.resolve("someone/ahoy")

    def test_link_to_other_repository_is_refused(self, place: Place) -> None:
        folder = hub(place)
        other = hub(place, "models--someone--other")
        weights = folder / "snapshots" / COMMIT / "adapter_model.safetensors"
        stolen = (other / "snapshots" / COMMIT / weights.name).resolve()
        weights.unlink()
        weights.symlink_to(stolen)
        with pytest.raises(AdapterInvalid, match="out of its folder"):
            place.resolve("hf://someone/ahoy")

    @pytest.mark.parametrize("text", ["../../../secret", "", "main", "0" * 41, "x" * 2000])
    def test_ref_must_name_commit(self, place: Place, text: str) -> None:
        folder = hub(place)
        (folder / "refs" / "main").write_text(text, encoding="ascii")
        with pytest.raises(AdapterInvalid):
            place.resolve("hf://someone/ahoy")


LAYER = "sha256:" + "ab" * 32


def served(place: Place, model: ModelInfo | None, reference: str = "parrot:latest") -> Any:
    """Resolve the name of a model of the server."""
    request = ResolveRequest(
        reference=reference,
        model="small:1m",
        base=place.model.info,
        show=lambda name: model if name == "parrot:latest" else None,
    )
    return place.plugin().resolve_adapter(request)


class TestServed:
    def test_model_with_adapter_is_found(self, place: Place) -> None:
        model = place.model.info(name="parrot:latest", adapters=(LAYER,), parent="small:1m")
        found = served(place, model)
        assert (found.served_as, found.digest, found.verdict.status) == ("parrot:latest", LAYER, "compatible")
        assert served(place, model, f"parrot:latest@{LAYER[:20]}").digest == LAYER
        with pytest.raises(AdapterInvalid, match="its digest is"):
            served(place, model, "parrot:latest@sha256:" + "0" * 12)
        with pytest.raises(AdapterUnsupported, match="inside a model"):
            found.gguf(model)
        with pytest.raises(AdapterUnsupported, match="inside a model"):
            found.merge(Path("a"), Path("b"))

    def test_merged_model_states_its_adapter(self, place: Place, ours: Path) -> None:
        from lora_files import keys_of

        adapter = place.resolve("mine")
        merged = adapter.merge(place.model.write(place.folder / "base.gguf"), place.folder / "merged.gguf")
        found = served(place, ModelInfo(name="parrot:latest", metadata=keys_of(merged)))
        assert (found.digest, found.scale) == (adapter.digest, 2.0)

    def test_model_without_adapter_is_not_found(self, place: Place) -> None:
        with pytest.raises(AdapterNotFound, match="has no adapter"):
            served(place, place.model.info(name="parrot:latest"))
        with pytest.raises(AdapterNotFound, match="no model of that name"):
            served(place, None)

    def test_only_model_names_are_asked(self, place: Place) -> None:
        asked = []

        def show(name: str) -> ModelInfo | None:
            asked.append(name)
            raise RequestRejected("not a valid name")

        for reference in ("./secret/folder", "/no/such/file", "hf://a/b", "a b", "über", "plain", "owner/plain:tag"):
            request = ResolveRequest(reference=reference, model="small:1m", base=place.model.info, show=show)
            with pytest.raises(AdapterNotFound) as caught:
                place.plugin().resolve_adapter(request)
        assert asked == ["plain", "owner/plain:tag"]
        assert "server: not a valid name" in caught.value.reasons

    def test_other_architecture_or_parent_is_reported(self, place: Place) -> None:
        other = Model(architecture="qwen2").info(name="parrot:latest", adapters=(LAYER,))
        assert served(place, other).verdict.status == "incompatible"
        cousin = place.model.info(name="parrot:latest", adapters=(LAYER,), parent="other:1m")
        assert "other:1m" in served(place, cousin).verdict.warnings[0]


DIFFERENT: dict[str, tuple[Model, str]] = {
    "hidden size": (Model(hidden=32), "`attn_q` of the 2 layers from 0 to 1 has 64 inputs, but 32 in the base model"),
    "heads": (Model(heads=8), "`attn_q` of the 2 layers from 0 to 1 has 64 outputs, but 128 in the base model"),
    "shared heads": (Model(shared=4), "`attn_k` of the 2 layers from 0 to 1 has 32 outputs, but 64 in the base model"),
    "feed-forward": (Model(feed_forward=64), "`ffn_down` of the 2 layers from 0 to 1 has 96 inputs"),
    "layers": (Model(layers=1), "`attn_q` of layer 1 is beyond the base model's 1 layers"),
}


GAPS: dict[str, tuple[Callable[[Model], ModelInfo | None], str]] = {
    "nothing is known": (lambda _: None, "does not report"),
    "no architecture is known": (lambda model: model.info(metadata={}), "does not report"),
    "no number of heads": (
        lambda model: model.info(
            metadata={key: value for key, value in model.metadata().items() if "head_count" not in key}
        ),
        "number of heads",
    ),
    "nothing but an architecture": (
        lambda model: model.info(metadata={"general.architecture": "llama"}, tensors=None),
        "not known",
    ),
}


class TestVerdict:
    @pytest.mark.parametrize("facts", ["tensors", "metadata"])
    @pytest.mark.parametrize("what", list(DIFFERENT))
    def test_contradiction_is_incompatible(self, place: Place, ours: Path, what: str, facts: str) -> None:
        model, reason = DIFFERENT[what]
        info = model.info() if facts == "tensors" else model.info(tensors=None)
        verdict = place.resolve("mine", base=lambda: info).verdict
        assert verdict.status == "incompatible"
        assert any(each.startswith(reason) for each in verdict.reasons)

    def test_contradictions_are_listed_once(self, place: Place, ours: Path) -> None:
        verdict = place.resolve("mine", base=Model(hidden=32, feed_forward=64, layers=1).info).verdict
        assert len(verdict.reasons) == len(set(verdict.reasons))
        words = " ".join(verdict.reasons)
        assert all(f"`{each}`" in words for each in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"))

    def test_equal_shapes_are_compatible_without_tensors(self, place: Place, ours: Path) -> None:
        assert place.resolve("mine", base=lambda: place.model.info(tensors=None)).verdict.status == "compatible"

    def test_other_gguf_architecture_is_incompatible(self, place: Place, ours: Path) -> None:
        write_gguf(ours / "own.gguf", Model(architecture="qwen2"), pairs(place.model))
        verdict = place.resolve("own").verdict
        assert verdict.status == "incompatible"
        assert "`qwen2`" in verdict.reasons[0]

    def test_unlisted_gguf_architecture_uses_tensors(self, place: Place, ours: Path) -> None:
        place.model = other = Model(architecture="phi3")
        write_gguf(ours / "own.gguf", other, pairs(other))
        found = place.resolve("own")
        assert found.verdict.status == "compatible"
        assert found.gguf(other.info()).exists()

    @pytest.mark.parametrize("what", list(GAPS))
    def test_missing_facts_are_unknown(self, place: Place, ours: Path, what: str) -> None:
        build, reason = GAPS[what]
        verdict = place.resolve("mine", base=lambda: build(place.model)).verdict
        assert verdict.status == "unknown"
        assert any(reason in each for each in verdict.reasons)

    def test_missing_tensor_is_incompatible(self, place: Place, ours: Path) -> None:
        tensors = {name: shape for name, shape in place.model.tensors().items() if "ffn_gate" not in name}
        tensors = {name: shape for name, shape in tensors.items() if "ffn_up" not in name}
        verdict = place.resolve("mine", base=lambda: place.model.info(tensors=tensors)).verdict
        assert verdict.status == "incompatible"
        assert any("`ffn_gate`" in reason and "missing" in reason for reason in verdict.reasons)

    def test_other_vocabulary_or_tied_ends(self, place: Place, ours: Path) -> None:
        head = pairs(place.model, modules=["lm_head"])
        write_peft(ours / "head", head)
        assert place.resolve("head").verdict.status == "compatible"
        larger = place.resolve("head", base=Model(vocabulary=64).info).verdict
        assert "48 outputs, but 64 in the base model" in larger.reasons[0]
        tied = place.resolve("head", base=Model(tied=True).info).verdict
        assert (tied.status, "tied" in tied.reasons[0]) == ("incompatible", True)
        assert place.resolve("head", base=lambda: place.model.info(tensors=None)).verdict.status == "unknown"

    @pytest.mark.parametrize(
        ("stated", "base", "warned"),
        [
            ("someone/small-1m", "small:1m", False),
            ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2:135m", False),
            ("unsloth/SmolLM2-135M-Instruct-bnb-4bit", "smollm2:135m-instruct-q4_K_M", False),
            ("meta-llama/Llama-3.2-1B-Instruct", "llama3.2:1b", False),
            ("/home/me/train/Qwen2.5-0.5B", "qwen2.5:0.5b", False),
            ("meta-llama/Llama-3.2-3B", "llama3.2:1b", True),
            ("mistralai/Mistral-7B-v0.3", "llama2:7b", True),
        ],
    )
    def test_name_only_warns(self, place: Place, ours: Path, stated: str, base: str, *, warned: bool) -> None:
        write_peft(ours / "named", pairs(place.model), base_model_name_or_path=stated)
        verdict = place.resolve("named", base=lambda: place.model.info(name=base)).verdict
        assert verdict.status == "compatible"
        assert bool(verdict.warnings) is warned

    def test_odd_server_facts_are_tolerated(self, place: Place, ours: Path) -> None:
        values: tuple[Any, ...] = (None, "8", True, -1, 0, 2.5, [], [4, 4], {}, 1 << 80)
        for value in values:
            facts = dict.fromkeys(place.model.metadata(), value)
            facts["general.architecture"] = "llama"
            for tensors in (None, {}, dict.fromkeys(place.model.tensors(), ("a", None))):
                base = partial(place.model.info, metadata=facts, tensors=tensors)
                assert place.resolve("mine", base=base).verdict.reasons


class TestMemory:
    def test_concurrent_callers_share_one_result(self, place: Place, ours: Path) -> None:
        plugin = place.plugin()
        request = ResolveRequest(reference="mine", model="small:1m", base=place.model.info)
        found: list[str] = []
        callers = [
            threading.Thread(target=lambda: found.append(plugin.resolve_adapter(request).digest)) for _ in range(16)
        ]
        for each in callers:
            each.start()
        for each in callers:
            each.join()
        assert len(found) == 16
        assert len(set(found)) == 1
        write_peft(ours / "mine", pairs(place.model, seed=99))
        assert plugin.resolve_adapter(request).digest != found[0]

    def test_unchanged_adapter_is_read_once(self, place: Place, ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plugin = place.plugin()
        request = ResolveRequest(reference="mine", model="small:1m", base=place.model.info)
        digest = plugin.resolve_adapter(request).digest
        weights = ours / "mine" / "adapter_model.safetensors"
        before = weights.stat()
        monkeypatch.setattr(os, "open", lambda *_: pytest.fail("it was opened again"))
        assert plugin.resolve_adapter(request).digest == digest
        assert weights.stat().st_mtime_ns == before.st_mtime_ns


WRONG: dict[str, tuple[dict[str, str], str, str]] = {
    "a variable that is not known": ({"GRAFTAGE_LORA_FOLDER": "x"}, "", "Did you mean `folders`"),
    "a value that is wrong": ({"GRAFTAGE_LORA_MAX_BYTES": "many"}, "", "max_bytes"),
    "a key of the file that is not known": ({}, "[lora]\nregistri = 'x'\n", "Did you mean `registry`"),
    "a table that is a number": ({}, "lora = 7\n", "must be a table"),
    "a folder of an unknown user": ({"GRAFTAGE_LORA_FOLDERS": "~nobody-at-all/x"}, "", "home folder"),
    "a hub of an unknown user": ({"HF_HUB_CACHE": "~nobody-at-all/x"}, "", "HF_"),
    "a type that is not known": ({}, "[lora]\nmerge_type = 'Q4_0'\n", "merge_type"),
}


class TestSettings:
    def test_order_is_arguments_environment_file(
        self, place: Place, ours: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from graftage_lora import LoraPlugin

        config = place.folder / "config.toml"
        monkeypatch.setenv("GRAFTAGE_CONFIG", str(config))
        config.write_text(f"[lora]\nfolders = [{json.dumps(str(ours))}]\nmax_bytes = 2000\n", encoding="utf-8")
        request = ResolveRequest(reference="mine", model="small:1m", base=place.model.info)
        with pytest.raises(AdapterInvalid, match="2,000 are allowed"):
            LoraPlugin().resolve_adapter(request)
        monkeypatch.setenv("GRAFTAGE_LORA_MAX_BYTES", "3000")
        with pytest.raises(AdapterInvalid, match="3,000 are allowed"):
            LoraPlugin().resolve_adapter(request)
        assert LoraPlugin(max_bytes=1 << 20).resolve_adapter(request).name == "mine"
        monkeypatch.setenv("GRAFTAGE_LORA_FOLDERS", os.pathsep.join(["/nowhere", str(ours)]))
        config.unlink()
        assert LoraPlugin(max_bytes=1 << 20).resolve_adapter(request).name == "mine"

    @pytest.mark.parametrize("what", list(WRONG))
    def test_error_names_source_and_nearest_key(self, place: Place, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
        from graftage_lora import LoraPlugin

        variables, table, reason = WRONG[what]
        config = place.folder / "config.toml"
        config.write_text(table, encoding="utf-8")
        monkeypatch.setenv("GRAFTAGE_CONFIG", str(config))
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SettingsError, match=reason) as caught:
            LoraPlugin().list_adapters(ListAdaptersRequest())
        assert caught.value.source

    def test_variables_do_not_disturb_connect(self, place: Place, ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from graftage.testing.echo import Echo

        monkeypatch.setenv("GRAFTAGE_LORA_FOLDERS", str(ours))
        with graftage.connect(Echo(), model="small", plugins=[place.plugin()]) as llm:
            assert llm.chat("hello").text


def test_import_is_light() -> None:
    program = (
        "import sys, graftage_lora\n"
        "graftage_lora.LoraPlugin()\n"
        "heavy = {'numpy', 'gguf', 'pydantic', 'platformdirs'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_repr_hides_numbers(place: Place, ours: Path) -> None:
    assert len(repr(place.resolve("mine"))) < 600
    assert replace(place.resolve("mine"), name="x").name == "x"
