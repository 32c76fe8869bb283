"""Names with two meanings, what the list shows, and downloads from a stand-in for the hub."""

from __future__ import annotations

import os
import shutil
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from lora_files import COMMIT, Model, Place, bind, hub, pairs, write_gguf, write_mlx, write_peft

import graftage
from graftage.calls import Call, ListAdaptersRequest, ResolveRequest
from graftage.exceptions import AdapterInvalid, AdapterNotFound, ConnectionFailed
from graftage.testing.echo import Echo

if TYPE_CHECKING:
    from collections.abc import Callable

    from graftage.types import AdapterInfo


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def listed(place: Place, *, base: Any = None, **settings: Any) -> list[AdapterInfo]:
    """What the plugin lists, judged against the small model or another base."""
    request = ListAdaptersRequest(model="small:1m", base=base or place.model.info)
    return list(place.plugin(**settings).list_adapters(request))


def look(place: Place, reference: str, **settings: Any) -> Any:
    """Resolve a reference as `resolve_adapter` of a client does, which does not use the adapter."""
    call = Call(operation="resolve_adapter")
    request = ResolveRequest(reference=reference, model="small:1m", base=place.model.info, call=call)
    return place.plugin(**settings).resolve_adapter(request)


def watch_opening(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the folders in which a file was opened."""
    opened: list[str] = []
    real = os.open

    def noted(path: Any, *rest: Any) -> int:
        opened.append(Path(path).parent.name)
        return real(path, *rest)

    monkeypatch.setattr(os, "open", noted)
    return opened


def two(place: Place, second: int = 2) -> dict[str, Any]:
    """The settings for two folders, each with an adapter `mine`, from the seeds 1 and `second`."""
    write_peft(place.folder / "x" / "mine", pairs(place.model, seed=1))
    write_peft(place.folder / "y" / "mine", pairs(place.model, seed=second))
    return {"folders": [place.folder / "x", place.folder / "y"]}


def beside(place: Place) -> dict[str, Any]:
    """A folder and a GGUF file of one name in one folder."""
    write_peft(place.folder / "x" / "mine", pairs(place.model, seed=1))
    write_gguf(place.folder / "x" / "mine.gguf", place.model, pairs(place.model, seed=2))
    return {"folders": [place.folder / "x"]}


def project(place: Place) -> dict[str, Any]:
    """A project that has a name of a configured folder."""
    write_peft(place.folder / "x" / "mine", pairs(place.model, seed=1))
    write_mlx(place.folder / "p" / ".graftage" / "adapters" / "mine", pairs(place.model, seed=2))
    return {"folders": [place.folder / "x"], "project": place.folder / "p"}


def bound(place: Place) -> dict[str, Any]:
    """A folder's registry that gives a name to another adapter."""
    settings = two(place)
    write_peft(place.folder / "y" / "other", pairs(place.model, seed=3))
    (place.folder / "y" / "adapters.toml").write_text('[mine]\npath = "other"\nscale = 3.0\n', encoding="utf-8")
    return settings


def forms(place: Place) -> dict[str, Any]:
    """Two names that differ only in their Unicode form."""
    write_peft(place.folder / "x" / unicodedata.normalize("NFC", "müne"), pairs(place.model, seed=1))
    write_peft(place.folder / "x" / unicodedata.normalize("NFD", "müne"), pairs(place.model, seed=2))
    return {"folders": [place.folder / "x"]}


TWICE: dict[str, Callable[[Place], dict[str, Any]]] = {
    "two folders": two,
    "a folder and a file": beside,
    "a project": project,
    "a folder's registry": bound,
}


class TestAmbiguous:
    @pytest.mark.parametrize("where", list(TWICE))
    def test_name_is_refused_with_its_paths(self, place: Place, where: str) -> None:
        settings = TWICE[where](place)
        with pytest.raises(AdapterInvalid, match="`mine` is ambiguous") as caught:
            place.resolve("mine", **settings)
        assert len(caught.value.reasons) == 2
        for each in listed(place, **settings):
            assert any(str(each.digest)[:19] in reason for reason in caught.value.reasons) or each.name != "mine"
        assert str(place.folder / "adapters.toml") in str(caught.value)

    @pytest.mark.parametrize("paths", [True, False])
    @pytest.mark.parametrize("where", list(TWICE))
    def test_each_is_listed_with_own_reference(self, place: Place, where: str, *, paths: bool) -> None:
        settings = {**TWICE[where](place), "paths": paths}
        mine = [each for each in listed(place, **settings) if each.name == "mine"]
        assert len({each.digest for each in mine}) == len(mine) == 2
        assert len({each.path for each in mine}) == 2
        for each in mine:
            assert place.resolve(each.reference, **settings).digest == each.digest

    @pytest.mark.parametrize("paths", [True, False])
    def test_without_model_reference_keeps_scale(self, place: Place, *, paths: bool) -> None:
        settings = {**two(place), "paths": paths}
        write_gguf(place.folder / "x" / "file.gguf", place.model, pairs(place.model, seed=3))
        (place.folder / "x" / "adapters.toml").write_text('[mine]\npath = "file.gguf"\nscale = 0.25\n', "utf-8")
        found = list(place.plugin(**settings).list_adapters(ListAdaptersRequest()))
        (mine,) = (each for each in found if each.name == "mine" and each.path.name == "file.gguf")
        assert mine.digest is None
        assert place.resolve(mine.reference, **settings).scale == 0.25

    def test_unicode_forms_are_one_name(self, place: Place) -> None:
        settings = forms(place)
        with pytest.raises(AdapterInvalid, match="ambiguous"):
            place.resolve("müne", **settings)
        found = listed(place, **settings)
        assert len({place.resolve(each.reference, **settings).digest for each in found}) == 2

    def test_digest_selects_one(self, place: Place) -> None:
        settings = two(place)
        for each in listed(place, **settings):
            digest = str(each.digest)
            assert place.resolve(f"mine@{digest[:19]}", **settings).digest == digest
            weights = place.resolve(each.reference, **settings).facts.sha256
            assert place.resolve(f"mine@{weights[:12]}", **settings).digest == digest
        with pytest.raises(AdapterInvalid, match="none of its versions"):
            place.resolve("mine@" + "0" * 12, **settings)

    def test_equal_contents_are_one(self, place: Place) -> None:
        settings = two(place, second=1)
        write_gguf(place.folder / "z" / "mine.gguf", place.model, pairs(place.model, seed=1))
        settings["folders"].append(place.folder / "z")
        assert place.resolve("mine", **settings).verdict.status == "compatible"
        assert len(listed(place, **settings)) == 3

    def test_one_folder_given_twice_is_one(self, place: Place) -> None:
        write_peft(place.folder / "x" / "mine", pairs(place.model))
        settings: dict[str, Any] = {"folders": [place.folder / "x"] * 2}
        assert [each.reference for each in listed(place, **settings)] == ["mine"]
        assert place.resolve("mine", **settings).name == "mine"

    def test_registry_settles_it(self, place: Place) -> None:
        settings = two(place)
        (place.folder / "adapters.toml").write_text('[mine]\npath = "y/mine"\n', encoding="utf-8")
        digest = place.resolve(place.folder / "y" / "mine", **settings).digest
        assert place.resolve("mine", **settings).digest == digest
        found = {each.reference: each for each in listed(place, **settings)}
        assert found["mine"].digest == digest
        assert set(found) == {"mine", str(place.folder / "x" / "mine")}

    @pytest.mark.parametrize("which", ["x", "y"])
    def test_broken_rival_is_not_ignored(self, place: Place, which: str) -> None:
        settings = two(place)
        weights = place.folder / which / "mine" / "adapter_model.safetensors"
        weights.write_bytes(b"broken")
        with pytest.raises(AdapterInvalid, match="too short") as caught:
            place.resolve("mine", **settings)
        assert len(caught.value.reasons) == 2
        weights.unlink()
        with pytest.raises(AdapterInvalid, match="no adapter"):
            place.resolve("mine", **settings)
        (good,) = (each for each in listed(place, **settings) if not each.problem)
        assert place.resolve(f"mine@{good.digest}", **settings).digest == good.digest

    @pytest.mark.parametrize("what", ["a model", "an empty folder", "a folder of notes", "a text"])
    def test_what_is_no_adapter_is_no_rival(self, place: Place, what: str) -> None:
        settings = two(place)
        rival = place.folder / "x" / "mine"
        shutil.rmtree(rival)
        if what == "a model":
            place.model.write(rival.with_suffix(".gguf"))
        elif what == "a text":
            rival.write_text("notes", encoding="utf-8")
        else:
            rival.mkdir()
            if what == "a folder of notes":
                (rival / "README.md").write_text("notes", encoding="utf-8")
        assert [(each.reference, each.problem) for each in listed(place, **settings)] == [("mine", None)]
        assert place.resolve("mine", **settings).verdict.status == "compatible"
        shutil.rmtree(place.folder / "y" / "mine")
        with pytest.raises(AdapterInvalid, match=r"whole model|no adapter|neither"):
            place.resolve("mine", **settings)

    def test_looking_shows_first_and_use_is_refused(self, place: Place) -> None:
        settings = two(place)
        found = look(place, "mine", **settings)
        assert (found.verdict.status, found.verdict.reasons[0]) == ("unknown", "its name is ambiguous")
        for use in (found.gguf, found.peft, found.mlx, found.mix(0.5, []).gguf):
            with pytest.raises(AdapterInvalid, match="ambiguous"):
                use(place.model.info())
        with pytest.raises(AdapterInvalid, match="ambiguous"):
            found.merge(place.model.write(place.folder / "base.gguf"), place.folder / "merged.gguf")

    def test_client_refuses_it(self, place: Place) -> None:
        plugin = place.plugin(**two(place))
        with graftage.connect(Echo(), model="small", plugins=[plugin]) as llm:
            assert len({each.reference for each in llm.adapters()}) == 2
            for use in (lambda: llm.chat("x", adapter="mine"), lambda: llm.use_adapter("mine", on_missing="base")):
                with pytest.raises(AdapterInvalid, match="ambiguous"):
                    use()
            shutil.rmtree(place.folder / "x" / "mine")
            assert llm.chat("x", adapter="mine").adapter == "mine"

    def test_retrained_adapter_is_read_again(self, place: Place) -> None:
        plugin = place.plugin()
        request = ResolveRequest(reference="mine", model="small:1m", base=place.model.info)
        folder = place.folder / "adapters" / "mine"
        found = set()
        for seed in range(3):
            write_peft(folder, pairs(place.model, seed=seed))
            found.add(plugin.resolve_adapter(request).digest)
        write_peft(folder, pairs(place.model, seed=2, scale=3.0))  # The configuration alone differs.
        found.add(plugin.resolve_adapter(request).digest)
        assert len(found) == 4


class TestList:
    def test_each_has_facts_and_verdict(self, place: Place) -> None:
        ours = place.folder / "adapters"
        write_peft(ours / "fits", pairs(place.model, rank=6))
        write_gguf(ours / "file.gguf", place.model, pairs(place.model))
        write_peft(ours / "small", pairs(Model(hidden=32)))
        found = {each.reference: each for each in listed(place)}
        fits, small = found["fits"], found["small"]
        assert (fits.rank, fits.base_model, fits.problem) == (6, "someone/small-1m", None)
        assert (fits.path, fits.size) == (ours / "fits", (ours / "fits" / "adapter_model.safetensors").stat().st_size)
        assert fits.digest == place.resolve("fits").digest
        assert fits.verdict == place.resolve("fits").verdict
        assert small.verdict is not None
        assert small.verdict.status == "incompatible"
        assert found["file"].digest == place.resolve("file").digest

    def test_without_model_no_verdict(self, place: Place) -> None:
        write_peft(place.folder / "adapters" / "mine", pairs(place.model))
        write_gguf(place.folder / "adapters" / "file.gguf", place.model, pairs(place.model))
        found = {each.name: each for each in place.plugin().list_adapters(ListAdaptersRequest())}
        assert (found["mine"].verdict, found["mine"].digest) == (None, place.resolve("mine").digest)
        assert found["file"].digest is None, "its rows are in the order of a base model that is not known"

    def test_each_is_read_once_and_when_it_is_needed(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("a", "b"):
            write_peft(place.folder / "adapters" / name, pairs(place.model))
        plugin = place.plugin()
        opened = watch_opening(monkeypatch)
        first = next(iter(plugin.list_adapters(ListAdaptersRequest())))
        assert (first.name, "b" in opened) == ("a", False)
        opened.clear()
        request = ResolveRequest(reference="a", model="small:1m", base=place.model.info)
        assert plugin.resolve_adapter(request).digest == first.digest
        assert not opened

    def test_unreachable_server_hides_nothing(self, place: Place) -> None:
        write_peft(place.folder / "adapters" / "mine", pairs(place.model))

        def base() -> None:
            raise ConnectionFailed("no server")

        (mine,) = listed(place, base=base)
        assert mine.verdict is not None
        assert (mine.verdict.status, mine.verdict.reasons) == ("unknown", ("no server",))

    def test_spans_sources(self, place: Place) -> None:
        ours = place.folder / "adapters"
        hub(place)
        write_peft(ours / "mine", pairs(place.model))
        write_gguf(ours / "own.gguf", place.model, pairs(place.model))
        write_mlx(place.folder / "p" / ".graftage" / "adapters" / "theirs", pairs(place.model))
        place.model.write(ours / "a model.gguf")
        (ours / "notes.txt").write_text("nothing", encoding="utf-8")
        (ours / "empty").mkdir()
        (ours / "data").mkdir()
        place.model.write(ours / "data" / "model.gguf")
        bind(place.folder / "adapters.toml", path="adapters/mine", scale=5.0)
        found = {each.reference: each for each in listed(place, project=place.folder / "p")}
        assert sorted(found) == ["bound", "hf://someone/ahoy", "mine", "own", "theirs"]
        assert not any(each.problem for each in found.values())
        for reference, each in found.items():
            again = place.resolve(reference, project=place.folder / "p")
            assert (again.name, again.digest) == (each.name, each.digest)

    def test_broken_ones_are_named(self, place: Place) -> None:
        ours = place.folder / "adapters"
        write_peft(ours / "cut", pairs(place.model))
        (ours / "cut" / "adapter_model.safetensors").write_bytes(b"broken")
        write_peft(ours / "half", pairs(place.model))
        (ours / "half" / "adapter_model.safetensors").unlink()
        (ours / "broken.gguf").write_bytes(b"GGUF")
        (ours / "pickled").mkdir()
        (ours / "pickled" / "adapter_model.bin").write_bytes(b"x")
        write_peft(ours / "run" / "checkpoint-500", pairs(place.model))
        write_peft(place.folder / "secret", pairs(place.model))
        (ours / "outside").symlink_to(place.folder / "secret")
        folder = hub(place)
        (folder / "snapshots" / COMMIT / "adapter_model.safetensors").unlink()
        bind(place.folder / "adapters.toml", path="adapters/half", digest="ab" * 32)
        found = {each.name: each for each in listed(place)}
        assert set(found) == {"cut", "half", "broken", "pickled", "run", "outside", "ahoy", "bound"}
        for each in found.values():
            assert each.problem
            assert (each.verdict, each.digest) == (None, None)
            with pytest.raises(AdapterInvalid):
                place.resolve(each.reference)

    def test_wrong_pin_is_problem(self, place: Place) -> None:
        write_peft(place.folder / "adapters" / "mine", pairs(place.model))
        bind(place.folder / "adapters.toml", path="adapters/mine", digest="ab" * 32)
        found = {each.name: each for each in listed(place)}
        assert "another version" in str(found["bound"].problem)

    def test_unreadable_sources_are_named(self, place: Place) -> None:
        write_peft(place.folder / "adapters" / "mine", pairs(place.model))
        file = place.folder / "file"
        file.write_text("not a folder", encoding="utf-8")
        (place.folder / "adapters.toml").write_text("broken", encoding="utf-8")
        settings: dict[str, Any] = {"folders": [place.folder / "adapters", file, place.folder / "nowhere"]}
        mine, *others = sorted(listed(place, **settings), key=lambda each: not each.name)
        assert {each.path for each in others} == {file, place.folder / "nowhere", place.folder / "adapters.toml"}
        assert all(each.problem and not each.reference for each in others)
        assert place.resolve(mine.reference, **settings).name == "mine", "the registry refuses names, not paths"

    def test_missing_project_and_hub_are_no_problem(self, place: Place) -> None:
        (place.folder / "adapters").mkdir()
        assert listed(place, project=place.folder) == []

    def test_revisions_of_repository(self, place: Place) -> None:
        (place.folder / "adapters").mkdir()
        folder = hub(place)
        other, third = "1" * 40, "2" * 40
        shutil.copytree(folder / "snapshots" / COMMIT, folder / "snapshots" / other, symlinks=True)
        shutil.copytree(folder / "snapshots" / COMMIT, folder / "snapshots" / third, symlinks=True)
        (folder / "refs" / "v1.2").write_text(other, encoding="ascii")
        (folder / "refs" / "same").write_text(COMMIT, encoding="ascii")
        references = [each.reference for each in listed(place)]
        assert references == ["hf://someone/ahoy", "hf://someone/ahoy@v1.2", f"hf://someone/ahoy@{third}"]
        for each in references:
            assert place.resolve(each).name == "ahoy"
        (folder / "refs" / "main").unlink()
        assert listed(place)[0].reference == "hf://someone/ahoy@same"


class TestVersions:
    def test_name_may_have_version(self, place: Place) -> None:
        ours = place.folder / "adapters"
        write_peft(ours / "style@v1", pairs(place.model, seed=1))
        write_peft(ours / "mine", pairs(place.model, seed=2))
        (place.folder / "adapters.toml").write_text('["style@v2"]\npath = "adapters/mine"\n', encoding="utf-8")
        one, two = place.resolve("style@v1"), place.resolve("style@v2")
        assert (one.name, two.name) == ("style@v1", "style@v2")
        assert place.resolve(f"style@v2@{two.digest}").digest == two.digest
        with pytest.raises(AdapterNotFound):
            place.resolve("style")

    def test_name_like_digest_is_listed_by_path(self, place: Place) -> None:
        write_peft(place.folder / "adapters" / "style@0123456789ab", pairs(place.model))
        (found,) = listed(place)
        assert place.resolve(found.reference).name == "style@0123456789ab"
