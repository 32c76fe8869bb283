"""What an adapter does to a model, in numbers: converted and merged, against an independent forward pass.

Tolerances: a conversion keeps every number, so its logits differ by rounding (1e-4 on logits of up to 8). A merge
rounds each touched weight to its type, so each may move by at most half a step of that type; how far the
logits move is compared with how far the adapter moves them.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_files import (
    Model,
    Pair,
    Place,
    gguf_name,
    keys_of,
    logits,
    neighbours,
    pairs,
    served,
    tensors_of,
    write_gguf,
    write_mlx,
    write_peft,
)
from places import LORA

from graftage.exceptions import AdapterError, AdapterIncompatible, AdapterInvalid, AdapterUnsupported

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

TOKENS = [3, 14, 15, 9, 2, 6, 5]
EXACT = 1e-4
"""Tolerance of a logit if only F32 is rounded."""
SEVEN = ["llama", "qwen2", "qwen3", "gemma2", "gemma3"]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def changed(model: Model, adapter: Mapping[str, Pair]) -> dict[str, Any]:
    """The original weights with the adapter's changes, under GGUF names and in the original order."""
    weights = model.weights()
    for name, pair in adapter.items():
        weights[name] = weights[name].astype(np.float64) + pair.change
    plain = Model(**{**vars(model), "architecture": "plain"})
    return plain.placed(weights)


def applied(model: Model, adapter: Path) -> dict[str, Any]:
    """A GGUF model's weights as llama.cpp changes them: alpha by the rank of each pair, times B, times A."""
    held, alpha = tensors_of(adapter), keys_of(adapter)["adapter.lora.alpha"]
    weights: dict[str, Any] = {name: data.astype(np.float64) for name, data in model.placed().items()}
    for name in {each.rpartition(".lora_")[0] for each in held}:
        a, b = held[f"{name}.lora_a"].astype(np.float64), held[f"{name}.lora_b"].astype(np.float64)
        weights[name] += alpha / b.shape[1] * b @ a
    return weights


def answers(model: Model, adapter: Mapping[str, Pair]) -> Any:
    """The truth: the original model, changed as the adapter says."""
    return logits(model, changed(model, adapter), TOKENS, side_by_side=False)


def written(place: Place, layout: str, adapter: Mapping[str, Pair]) -> Path:
    """The adapter in one of the layouts."""
    if layout == "gguf":
        return write_gguf(place.folder / "own.gguf", place.model, adapter)
    return (write_peft if layout == "peft" else write_mlx)(place.folder / layout, adapter)


class TestConversion:
    @pytest.mark.parametrize("layout", ["peft", "mlx", "gguf"])
    @pytest.mark.parametrize("architecture", SEVEN)
    def test_tensors_are_exact(self, place: Place, architecture: str, layout: str) -> None:
        place.model = model = Model(architecture=architecture)
        adapter = pairs(model)
        found = tensors_of(place.resolve(written(place, layout, adapter)).gguf(model.info()))
        assert len(found) == 2 * 7 * model.layers
        for name, pair in adapter.items():
            assert np.array_equal(found[f"{gguf_name(name)}.lora_a"], pair.a)
            assert np.array_equal(found[f"{gguf_name(name)}.lora_b"], model.ordered(name, pair.b))

    @pytest.mark.parametrize("layout", ["peft", "mlx", "gguf"])
    def test_logits_match_changed_original(self, place: Place, layout: str) -> None:
        adapter = pairs(place.model)
        file = place.resolve(written(place, layout, adapter)).gguf(place.model.info())
        truth = answers(place.model, adapter)
        served = logits(place.model, applied(place.model, file), TOKENS, side_by_side=True)
        assert np.abs(served - truth).max() < EXACT
        assert np.abs(answers(place.model, {}) - truth).max() > 1000 * EXACT

    def test_missing_permutation_would_be_noticed(self, place: Place) -> None:
        adapter = pairs(
            place.model, modules=[name for name in place.model.modules() if name.endswith(("q_proj", "k_proj"))]
        )
        truth = answers(place.model, adapter)
        unmoved = Model(architecture="plain")  # its file has q and k in the original order, as a careless converter's
        careless = write_gguf(place.folder / "careless.gguf", unmoved, adapter)
        served = logits(place.model, applied(place.model, careless), TOKENS, side_by_side=True)
        assert np.abs(served - truth).max() > 100 * EXACT
        converted = place.resolve(write_peft(place.folder / "peft", adapter)).gguf(place.model.info())
        served = logits(place.model, applied(place.model, converted), TOKENS, side_by_side=True)
        assert np.abs(served - truth).max() < EXACT


class TestScale:
    def test_rslora_divides_by_root_of_rank(self, place: Place) -> None:
        adapter = pairs(place.model, rank=16, scale=8 / 16**0.5)
        found = place.resolve(write_peft(place.folder / "peft", adapter, lora_alpha=8, use_rslora=True))
        assert found.scale == 2.0
        served = logits(place.model, applied(place.model, found.gguf(place.model.info())), TOKENS, side_by_side=True)
        assert np.abs(served - answers(place.model, adapter)).max() < EXACT
        plain = place.resolve(write_peft(place.folder / "plain", adapter, lora_alpha=8))
        assert plain.scale == 0.5

    def test_mlx_scale_is_taken_as_stated(self, place: Place) -> None:
        adapter = pairs(place.model, rank=4, scale=3.0)
        found = place.resolve(write_mlx(place.folder / "stated", adapter))
        assert found.scale == 3.0
        assert keys_of(found.gguf(place.model.info()))["adapter.lora.alpha"] == 12.0
        with pytest.raises(AdapterInvalid, match="`scale`"):
            place.resolve(write_mlx(place.folder / "silent", adapter, parameters={"rank": 4}))

    def test_patterns_fold_into_one_alpha(self, place: Place) -> None:
        model = place.model
        names = model.modules()
        special = [name for name in names if name.endswith("v_proj")]
        single = "model.layers.1.mlp.down_proj"
        plain = [name for name in names if name not in special and name != single]
        adapter = {
            **pairs(model, rank=4, scale=2.0, modules=plain),
            **pairs(model, rank=2, scale=2.0, modules=special),  # alpha 4 by rank 2
            **pairs(model, rank=4, scale=5.0, modules=[single]),  # alpha 20 by rank 4
        }
        folder = write_peft(
            place.folder / "peft",
            adapter,
            r=4,
            lora_alpha=8,
            rank_pattern={"v_proj": 2},
            alpha_pattern={"v_proj": 4, f"^{single}": 20},
        )
        found = place.resolve(folder)
        served = logits(model, applied(model, found.gguf(model.info())), TOKENS, side_by_side=True)
        assert found.scale == 2.0
        assert np.abs(served - answers(model, adapter)).max() < EXACT


def write_ends(folder: Path, adapter: Mapping[str, Pair]) -> Path:
    """Write a PEFT adapter for both ends: its embedding has transposed halves; mlx-lm's are like ours."""
    from safetensors.numpy import save_file

    write_peft(folder, adapter)
    embedding, head = adapter["embed_tokens"], adapter["lm_head"]
    held = {
        "base_model.model.model.embed_tokens.lora_embedding_A": np.ascontiguousarray(embedding.b.T),
        "base_model.model.model.embed_tokens.lora_embedding_B": np.ascontiguousarray(embedding.a.T),
        "base_model.model.lm_head.lora_A.weight": head.a,
        "base_model.model.lm_head.lora_B.weight": head.b,
    }
    save_file(held, folder / "adapter_model.safetensors")
    return folder


class TestLayout:
    def test_square_mlx_halves_are_transposed(self, place: Place) -> None:
        place.model = model = Model(hidden=64, heads=4, shared=4, width=16, feed_forward=64)
        adapter = pairs(model, rank=64)
        file = place.resolve(write_mlx(place.folder / "mlx", adapter)).gguf(model.info())
        served = logits(model, applied(model, file), TOKENS, side_by_side=True)
        assert np.abs(served - answers(model, adapter)).max() < EXACT

    def test_ends_match_llama_cpp(self, place: Place) -> None:
        adapter = pairs(place.model, modules=["embed_tokens", "lm_head"])
        found = {}
        for layout, write in (("peft", write_ends), ("mlx", write_mlx)):
            file = place.resolve(write(place.folder / layout, adapter)).gguf(place.model.info())
            found[layout] = held = tensors_of(file)
            assert np.array_equal(held["token_embd.weight.lora_a"], adapter["embed_tokens"].b)
            assert np.array_equal(held["token_embd.weight.lora_b"], adapter["embed_tokens"].a.T)
            assert np.array_equal(held["output.weight.lora_a"], adapter["lm_head"].a)
            again = place.resolve(file).gguf(place.model.info())
            assert again.read_bytes() == file.read_bytes()
        assert list(found["peft"]) == list(found["mlx"])

    @pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "F32"])
    def test_gguf_types_are_read(self, place: Place, kind: str) -> None:
        adapter = pairs(place.model)
        source = write_gguf(place.folder / "own.gguf", place.model, adapter, kind=kind)
        converted = tensors_of(place.resolve(source).gguf(place.model.info()))
        for name, data in tensors_of(source).items():
            assert np.array_equal(converted[name], data)


class TestSample:
    def test_three_layouts_are_one_adapter(self, place: Place) -> None:
        place.model = Model(layers=30, hidden=576, heads=9, shared=3, width=64, feed_forward=1536, vocabulary=49152)
        names = ("ahoy-peft", "ahoy-mlx", "ahoy-lora.f16.gguf")
        found = [place.resolve(LORA / name) for name in names]
        assert {each.digest for each in found} == {found[0].digest}
        assert [each.verdict.status for each in found] == ["compatible"] * 3
        files = [each.gguf(place.model.info()) for each in found]
        assert len({hashlib.sha256(file.read_bytes()).hexdigest() for file in files}) == 1
        shipped = tensors_of(LORA / "ahoy-lora.f16.gguf")
        converted = tensors_of(files[0])
        assert shipped.keys() == converted.keys()
        assert all(np.array_equal(converted[name], data) for name, data in shipped.items())

    def test_rows_of_q_and_k_move(self, place: Place) -> None:
        from safetensors.numpy import load_file

        peft = load_file(LORA / "ahoy-peft" / "adapter_model.safetensors")
        place.model = Model(layers=30, hidden=576, heads=9, shared=3, width=64, feed_forward=1536, vocabulary=49152)
        converted = tensors_of(place.resolve(LORA / "ahoy-peft").gguf(place.model.info()))
        for letter, heads in (("q", 9), ("k", 3)):
            original = peft[f"base_model.model.model.layers.20.self_attn.{letter}_proj.lora_B.weight"]
            found = converted[f"blk.20.attn_{letter}.weight.lora_b"]
            assert np.array_equal(found, neighbours(original, heads))
            assert not np.array_equal(found, original)


class TestConvertedFile:
    def test_bytes_are_reproducible(self, place: Place) -> None:
        folder = write_peft(place.folder / "peft", pairs(place.model))
        first = place.resolve(folder).gguf(place.model.info())
        second = place.resolve(folder, cache=place.folder / "elsewhere").gguf(place.model.info())
        assert first != second
        assert first.read_bytes() == second.read_bytes()
        assert hashlib.sha256(first.read_bytes()).hexdigest()[:16] in first.name

    def test_damaged_cache_is_rebuilt(self, place: Place) -> None:
        adapter = place.resolve(write_peft(place.folder / "peft", pairs(place.model)))
        file = adapter.gguf(place.model.info())
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + b"!")
        assert adapter.gguf(place.model.info()).read_bytes() == whole
        assert [each.name for each in file.parent.iterdir()] == [file.name]

    def test_invocation_tokens_are_kept(self, place: Place) -> None:
        folder = write_peft(place.folder / "peft", pairs(place.model), alora_invocation_tokens=[7, 8])
        converted = place.resolve(folder).gguf(place.model.info())
        assert keys_of(converted)["adapter.alora.invocation_tokens"] == [7, 8]
        assert place.resolve(converted).digest == place.resolve(folder).digest

    def test_unplaced_modules_are_refused(self, place: Place) -> None:
        folder = write_peft(place.folder / "peft", pairs(place.model))
        other = Model(architecture="gpt2")
        found = place.resolve(folder, base=other.info)
        assert found.verdict.status == "unsupported"
        with pytest.raises(AdapterUnsupported, match="gpt2"):
            found.gguf(other.info())

    def test_changed_files_are_refused(self, place: Place) -> None:
        folder = write_peft(place.folder / "peft", pairs(place.model))
        found = place.resolve(folder)
        write_peft(folder, pairs(place.model, seed=8))
        with pytest.raises(AdapterInvalid, match="changed"):
            found.gguf(place.model.info())


ROUNDED = {"F32": 0.0001, "F16": 0.005, "BF16": 0.05, "Q8_0": 0.05, "Q4_1": 0.05, "Q5_0": 0.05}
"""Root mean square of the logits' errors by that of what the adapter changes; by the type of the base model."""
STEPS = {"F32": 2**-22, "F16": 2**-11, "BF16": 2**-8}
"""Half a step of a float, by its size. Of Q8_0 a step is the largest of 32 numbers by 127, which is kept as F16."""


def half_steps(data: Any, kind: str) -> Any:
    """How far rounding may move each number."""
    if kind in STEPS:
        return np.abs(data) * STEPS[kind] * 1.01
    if data.ndim == 1:  # A norm stays unchanged.
        return np.zeros_like(data)
    blocks = np.abs(data).reshape(-1, 32).max(1, keepdims=True) / 127 * (0.5 + 127 * 2**-11)
    return np.broadcast_to(blocks, (len(blocks), 32)).reshape(data.shape) * 1.01


def size(errors: Any) -> float:
    """Root mean square."""
    return float(np.sqrt((errors**2).mean()))


def refused_merges() -> dict[str, tuple[str, Any]]:
    def split(place: Place) -> tuple[Path, Path]:
        return place.model.write(place.folder / "base.gguf", split__count=3), peft(place)

    def merged_twice(place: Place) -> tuple[Path, Path]:
        folder = peft(place)
        base = place.model.write(place.folder / "base.gguf")
        return place.resolve(folder).merge(base, place.folder / "once.gguf"), folder

    def adapter_as_base(place: Place) -> tuple[Path, Path]:
        return write_gguf(place.folder / "base.gguf", place.model, pairs(place.model)), peft(place)

    def after_its_tokens(place: Place) -> tuple[Path, Path]:
        folder = write_peft(place.folder / "peft", pairs(place.model), alora_invocation_tokens=[1])
        return place.model.write(place.folder / "base.gguf"), folder

    def unplaced(place: Place) -> tuple[Path, Path]:
        odd = {"model.layers.0.mixer.in_proj": pairs(place.model)["model.layers.0.mlp.up_proj"]}
        return place.model.write(place.folder / "base.gguf"), write_peft(place.folder / "peft", odd)

    def tied(place: Place) -> tuple[Path, Path]:
        place.model = Model(tied=True)
        folder = write_ends(place.folder / "peft", pairs(place.model, modules=["embed_tokens", "lm_head"]))
        return place.model.write(place.folder / "base.gguf"), folder

    def overflowing(place: Place) -> tuple[Path, Path]:
        return place.model.write(place.folder / "base.gguf", "F16"), write_peft(
            place.folder / "peft", pairs(place.model, scale=1e6)
        )

    def garbage(place: Place) -> tuple[Path, Path]:
        (place.folder / "base.gguf").write_bytes(b"GGUF" + bytes(20) + b"\xff" * 40)
        return place.folder / "base.gguf", peft(place)

    def missing(place: Place) -> tuple[Path, Path]:
        return place.folder / "nowhere.gguf", peft(place)

    return {
        "a split base": ("split.count", split),
        "a base that is merged": ("already", merged_twice),
        "a base that is an adapter": ("is an adapter", adapter_as_base),
        "an adapter with invocation tokens": ("invocation", after_its_tokens),
        "a module without a place": ("mixer", unplaced),
        "tied ends": ("tied", tied),
        "a change beyond F16": ("can hold", overflowing),
        "a base that is garbage": ("GGUF version", garbage),
        "a base that is not there": ("No such file", missing),
    }


def peft(place: Place) -> Path:
    return write_peft(place.folder / "peft", pairs(place.model))


class TestMerge:
    @pytest.mark.parametrize("kind", list(ROUNDED))
    def test_logits_match_base_plus_change(self, place: Place, kind: str) -> None:
        model, adapter = place.model, pairs(place.model)
        base = model.write(place.folder / "base.gguf", kind)
        found = place.resolve(write_peft(place.folder / "peft", adapter))
        merged = tensors_of(found.merge(base, place.folder / "merged.gguf"))
        held = tensors_of(base)
        truth: dict[str, Any] = {name: data.astype(np.float64) for name, data in held.items()}
        for name, pair in adapter.items():
            truth[gguf_name(name)] += model.ordered(name, pair.change)
        for name, data in truth.items():
            assert (np.abs(merged[name] - data) <= half_steps(data, kind) + 1e-6).all()
        expected, served, untouched = (logits(model, each, TOKENS, side_by_side=True) for each in (truth, merged, held))
        assert size(served - expected) < ROUNDED[kind] * size(untouched - expected)

    def test_type_can_be_f16(self, place: Place) -> None:
        base = place.model.write(place.folder / "base.gguf", "Q4_1")
        folder = write_peft(place.folder / "peft", pairs(place.model))
        sizes = {}
        for kind in ("Q8_0", "F16"):
            merged = place.resolve(folder, merge_type=kind).merge(base, place.folder / f"{kind}.gguf")
            assert keys_of(merged)["graftage.merge.type"] == kind
            sizes[kind] = merged.stat().st_size
        assert sizes["F16"] > sizes["Q8_0"] > base.stat().st_size

    def test_keys_and_other_tensors_are_unchanged(self, place: Place) -> None:
        import gguf

        base = place.model.write(place.folder / "base.gguf", "Q4_1")
        name = "model.layers.0.mlp.down_proj"
        found = place.resolve(write_peft(place.folder / "peft", pairs(place.model, modules=[name])))
        merged = found.merge(base, place.folder / "merged.gguf")
        before, after = keys_of(base), keys_of(merged)
        assert {key: after.pop(key) for key in list(after) if key.startswith("graftage.")} == {
            "graftage.adapter.digest": found.digest,
            "graftage.adapter.scale": 2.0,
            "graftage.merge.type": "Q8_0",
            "graftage.merge.version": 1,
        }
        assert after == before
        old, new = (gguf.GGUFReader(path).tensors for path in (base, merged))
        assert [each.name for each in old] == [each.name for each in new]
        differing = [one.name for one, two in zip(old, new, strict=True) if one.data.tobytes() != two.data.tobytes()]
        assert differing == [gguf_name(name)]

    def test_is_reproducible_and_reports_progress(self, place: Place) -> None:
        base = place.model.write(place.folder / "base.gguf", "Q8_0")
        found = place.resolve(write_peft(place.folder / "peft", pairs(place.model)))
        reported: list[tuple[int, int]] = []
        first = found.merge(base, place.folder / "first.gguf", lambda done, total: reported.append((done, total)))
        second = found.merge(base, place.folder / "second.gguf")
        assert first.read_bytes() == second.read_bytes()
        assert reported == sorted(reported)
        assert reported[-1] == (first.stat().st_size,) * 2
        assert {total for _, total in reported} == {first.stat().st_size}

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("enough"), BrokenPipeError("gone")])
    def test_cancelling_leaves_nothing(self, place: Place, error: BaseException) -> None:
        base = place.model.write(place.folder / "base.gguf", "Q8_0")
        found = place.resolve(write_peft(place.folder / "peft", pairs(place.model)))
        out = place.folder / "out" / "merged.gguf"
        out.parent.mkdir()
        out.write_bytes(b"what was here")

        def stop(done: int, total: int) -> None:
            if done > total // 2:
                raise error

        with pytest.raises(type(error)) as caught:
            found.merge(base, out, stop)
        assert caught.value is error
        assert [each.name for each in out.parent.iterdir()] == ["merged.gguf"]
        assert out.read_bytes() == b"what was here"

    def test_stale_parts_are_deleted(self, place: Place) -> None:
        write_peft(place.folder / "adapters" / "mine", pairs(place.model))
        base = place.model.write(place.folder / "base.gguf")
        names = ("old", "young", "other")
        old, young, other = (place.folder / f".merged.gguf.{name}.part" for name in names)
        other = other.with_name(".else.gguf.other.part")
        for each in (old, young, other):
            each.write_bytes(b"left")
        for each in (old, other):
            os.utime(each, (1, 1))
        place.resolve("mine").merge(base, place.folder / "merged.gguf")
        assert sorted(each.name for each in place.folder.glob(".*.part")) == sorted((young.name, other.name))

    def test_full_disk_is_refused_first(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        import shutil

        base = place.model.write(place.folder / "base.gguf", "Q8_0")
        found = place.resolve(write_peft(place.folder / "peft", pairs(place.model)))
        usage = shutil.disk_usage(place.folder)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        reported: list[int] = []
        with pytest.raises(AdapterError, match="1,000 free"):
            found.merge(base, place.folder / "out" / "merged.gguf", lambda done, _: reported.append(done))
        assert reported == []
        assert list((place.folder / "out").iterdir()) == []

    def test_misfit_names_every_contradiction(self, place: Place) -> None:
        other = Model(hidden=96, layers=1, width=24)
        base = other.write(place.folder / "base.gguf")
        found = place.resolve(write_peft(place.folder / "peft", pairs(place.model)))
        with pytest.raises(AdapterIncompatible) as caught:
            found.merge(base, place.folder / "merged.gguf")
        assert len(caught.value.reasons) > 7
        assert any("beyond" in reason for reason in caught.value.reasons)
        assert any("inputs" in reason for reason in caught.value.reasons)

    @pytest.mark.parametrize("case", list(refused_merges()))
    def test_refusal_leaves_nothing(self, place: Place, case: str) -> None:
        reason, build = refused_merges()[case]
        base, folder = build(place)
        found = place.resolve(folder)
        with pytest.raises(AdapterError, match=reason):
            found.merge(base, place.folder / "out" / "merged.gguf")
        assert not (place.folder / "out").exists() or list((place.folder / "out").iterdir()) == []

    def test_base_is_never_overwritten(self, place: Place) -> None:
        base = place.model.write(place.folder / "base.gguf")
        before = base.read_bytes()
        with pytest.raises(AdapterUnsupported, match="replace its base"):
            place.resolve(peft(place)).merge(base, place.folder / "." / "base.gguf")
        assert base.read_bytes() == before


@pytest.mark.engine
def test_llama_cpp_agrees(place: Place) -> None:
    """0.003 of a log-probability is what the engine differs by from NumPy on the base model alone."""
    model, adapter = place.model, pairs(place.model)
    base = model.write(place.folder / "base.gguf")
    found = place.resolve(write_peft(place.folder / "peft", adapter))
    careless = write_gguf(place.folder / "careless.gguf", Model(architecture="plain"), adapter, architecture="llama")
    native = found.gguf(model.info())
    merged = found.merge(base, place.folder / "merged.gguf")
    scales = [[0.0, 0.0], [1.0, 0.0], [0.5, 0.0], [0.0, 1.0]]
    plain, hot, half, wrong, whole = served(TOKENS, (base, [native, careless], scales), (merged, [], [[]]))
    truth, weaker = (log_probabilities(answers(model, each)) for each in (adapter, halved(adapter)))
    assert len(hot) == len(truth) == model.vocabulary
    assert np.abs(plain - log_probabilities(answers(model, {}))).max() < 0.01
    assert np.abs(hot - truth).max() < 0.01
    assert np.abs(whole - truth).max() < 0.01
    assert np.abs(half - weaker).max() < 0.01
    assert np.abs(wrong - truth).max() > 1


def halved(adapter: Mapping[str, Pair]) -> dict[str, Pair]:
    """The same at half its strength."""
    return {name: Pair(a=pair.a, b=pair.b, scale=pair.scale / 2) for name, pair in adapter.items()}


def log_probabilities(found: Any) -> Any:
    """Of the token after the last."""
    last = found[-1]
    return last - np.log(np.exp(last).sum())


MODELS = st.builds(
    lambda heads, width, seed: Model(
        layers=1, hidden=32, heads=heads[0], shared=heads[1], width=width, feed_forward=64, seed=seed
    ),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 3), (3, 3)]),
    width=st.sampled_from([2, 8, 32]),
    seed=st.integers(0, 1000),
)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model=MODELS,
    rank=st.integers(1, 9),
    scale=st.floats(0.01, 30),
    layout=st.sampled_from(["peft", "mlx", "gguf"]),
)
def test_any_shape_rank_and_scale(
    tmp_path_factory: pytest.TempPathFactory, model: Model, rank: int, scale: float, layout: str
) -> None:
    place = Place(tmp_path_factory.mktemp("any"), model)
    adapter = pairs(model, rank=rank, scale=scale, seed=model.seed)
    found = place.resolve(written(place, layout, adapter))
    assert found.verdict.status == "compatible"
    merged = tensors_of(found.merge(model.write(place.folder / "base.gguf"), place.folder / "merged.gguf"))
    native = applied(model, found.gguf(model.info()))
    for name, pair in adapter.items():
        expected = model.placed()[gguf_name(name)] + model.ordered(name, pair.change)
        assert np.allclose(merged[gguf_name(name)], expected, rtol=1e-4, atol=1e-4 * max(1.0, scale))
        assert np.allclose(native[gguf_name(name)], expected, rtol=1e-4, atol=1e-4 * max(1.0, scale))
