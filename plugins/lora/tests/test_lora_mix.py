"""Several adapters added up: the product of the sum is the sum of the products, in every layout."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from lora_files import Model, Pair, Place, gguf_name, keys_of, pairs, tensors_of, write_gguf, write_mlx, write_peft

from graftage.exceptions import AdapterIncompatible, AdapterInvalid, AdapterUnsupported
from graftage.types import MixableAdapter

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

EXACT = 2e-6
"""Tolerance of a changed weight of up to 10 if only F32 is rounded."""
SOME = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "embed_tokens"]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Three adapters of several layouts, ranks, scales and modules."""
    place = Place(tmp_path)
    ours = tmp_path / "adapters"
    write_peft(ours / "style", contents(place.model)["style"])
    write_gguf(ours / "domain.gguf", place.model, contents(place.model)["domain"])
    write_mlx(ours / "voice", contents(place.model)["voice"])
    return place


def contents(model: Model) -> dict[str, dict[str, Pair]]:
    return {
        "style": pairs(model, rank=4, scale=2.0, seed=1, kind=np.float16),
        "domain": pairs(model, rank=6, scale=0.5, seed=2, modules=SOME[:2]),
        "voice": pairs(model, rank=3, scale=20.0, seed=3, modules=SOME),
    }


def total(model: Model, weights: Mapping[str, float]) -> dict[str, Any]:
    """The sum of the changes by GGUF name, in the original order and F64."""
    found: dict[str, Any] = {}
    for name, weight in weights.items():
        for module, pair in contents(model)[name].items():
            found[module] = found.get(module, 0) + weight * pair.change
    return found


def mix(place: Place, weights: Mapping[str, float], **settings: Any) -> Any:
    parts = [(place.resolve(name, **settings), weight) for name, weight in weights.items()]
    (first, weight), *others = parts
    assert isinstance(first, MixableAdapter)
    return first.mix(weight, others)


def changes(path: Path) -> dict[str, Any]:
    """The change of each tensor in a GGUF adapter, by llama.cpp's rule: alpha / rank."""
    held, alpha = tensors_of(path), keys_of(path)["adapter.lora.alpha"]
    found = {}
    for name in {each.rpartition(".")[0] for each in held}:
        a, b = held[f"{name}.lora_a"].astype(float), held[f"{name}.lora_b"].astype(float)
        if name == "token_embd.weight":  # Rows of A are looked up by token.
            a, b = b.T, a
        found[name] = alpha / len(a) * (b @ a)
    return found


WEIGHTS: dict[str, dict[str, float]] = {
    "one with a weight": {"style": 0.5},
    "GGUF with a negative weight": {"domain": -1.5},
    "two layouts": {"style": 1.0, "domain": 0.6},
    "GGUF first": {"domain": 1.0, "style": -0.25},
    "three layouts": {"voice": 0.1, "style": 1.0, "domain": 3.0},
    "each has a tensor of its own": {"voice": 0.1, "domain": 1.0},
}


class TestNumbers:
    @pytest.mark.parametrize("which", list(WEIGHTS))
    def test_gguf_is_sum(self, place: Place, which: str) -> None:
        found = changes(mix(place, WEIGHTS[which]).gguf(place.model.info()))
        right = total(place.model, WEIGHTS[which])
        assert set(found) == {gguf_name(module) for module in right}
        for module, change in right.items():
            assert np.abs(found[gguf_name(module)] - place.model.ordered(module, change)).max() < EXACT

    @pytest.mark.parametrize("which", list(WEIGHTS))
    def test_merge_is_sum(self, place: Place, which: str) -> None:
        base = place.model.write(place.folder / "base.gguf")
        adapter = mix(place, WEIGHTS[which])
        merged = adapter.merge(base, place.folder / "merged.gguf")
        assert keys_of(merged)["graftage.adapter.digest"] == adapter.digest
        before, after = tensors_of(base), tensors_of(merged)
        right = total(place.model, WEIGHTS[which])
        for module in place.model.modules():
            change = place.model.ordered(
                module, right.get(module, np.zeros(place.model.sides(module.split(".", 3)[3])))
            )
            assert np.abs(after[gguf_name(module)] - before[gguf_name(module)] - change).max() < EXACT

    @pytest.mark.parametrize("which", ["two layouts", "each has a tensor of its own"])
    @pytest.mark.parametrize("layout", ["peft", "mlx"])
    def test_folders_are_sum(self, place: Place, layout: str, which: str) -> None:
        weights = WEIGHTS[which]
        folder = getattr(mix(place, weights), layout)(place.model.info())
        again = place.resolve(folder).gguf(place.model.info())
        for module, change in total(place.model, weights).items():
            found = changes(again)[gguf_name(module)]
            assert np.abs(found - place.model.ordered(module, change)).max() < EXACT

    def test_equal_scales_keep_half_floats(self, place: Place) -> None:
        write_peft(place.folder / "adapters" / "other", pairs(place.model, rank=4, scale=2.0, seed=9, kind=np.float16))
        whole = mix(place, {"style": 1.0, "other": 1.0}).gguf(place.model.info())
        single = place.resolve("style").gguf(place.model.info())
        assert whole.stat().st_size < 2.1 * single.stat().st_size

    def test_order_of_rows_of_unknown_architecture_is_kept(self, place: Place) -> None:
        place.model = other = Model(architecture="unheard-of")
        one, two = pairs(other, seed=1, modules=SOME[:2]), pairs(other, seed=2, modules=SOME[:1])
        write_gguf(place.folder / "adapters" / "one.gguf", other, one)
        write_gguf(place.folder / "adapters" / "two.gguf", other, two)
        found = changes(mix(place, {"one": 1.0, "two": 0.5}).gguf(other.info()))
        change = one[SOME[0]].change + 0.5 * two[SOME[0]].change
        assert np.abs(found[gguf_name(SOME[0])] - change).max() < EXACT


class TestIdentity:
    def test_order_does_not_matter(self, place: Place) -> None:
        one, two = mix(place, {"style": 1.0, "domain": 0.6}), mix(place, {"domain": 0.6, "style": 1.0})
        assert (one.name, two.name) == ("style + 0.6 domain", "0.6 domain + style")
        assert one.digest == two.digest
        assert one.gguf(place.model.info()).read_bytes() == two.gguf(place.model.info()).read_bytes()

    def test_weights_and_parts_matter(self, place: Place) -> None:
        found = [
            mix(place, weights)
            for weights in (
                {"style": 1.0},
                {"style": 0.5},
                {"style": 1.0, "domain": 1.0},
                {"style": 1.0, "domain": 0.5},
                {"style": 0.5, "domain": 1.0},
                {"style": 1.0, "voice": 1.0},
            )
        ]
        assert len({each.digest for each in found}) == len(found)
        assert found[0] == place.resolve("style"), "it alone with the weight 1 is itself"
        assert (found[1].name, found[1].scale) == ("0.5 style", 1.0)

    def test_verdicts_are_joined(self, place: Place) -> None:
        small = Model(hidden=32)
        write_peft(place.folder / "adapters" / "small", pairs(small))
        assert mix(place, {"style": 1.0, "domain": 1.0}).verdict.status == "compatible"
        verdict = mix(place, {"style": 1.0, "small": 1.0}).verdict
        assert verdict.status == "incompatible"
        assert any("inputs" in reason for reason in verdict.reasons)

    def test_retrained_part_is_refused(self, place: Place) -> None:
        adapter = mix(place, {"style": 1.0, "domain": 1.0})
        write_gguf(place.folder / "adapters" / "domain.gguf", place.model, pairs(place.model, seed=99))
        with pytest.raises(AdapterInvalid, match=r"`domain`.*changed after the check"):
            adapter.gguf(place.model.info())


class TestRefusals:
    def test_other_shapes(self, place: Place) -> None:
        write_peft(place.folder / "adapters" / "small", pairs(Model(hidden=32)))
        adapter = mix(place, {"style": 1.0, "small": 1.0})
        with pytest.raises(AdapterUnsupported, match="different models"):
            adapter.gguf(place.model.info())
        with pytest.raises(AdapterIncompatible, match="does not fit"):
            adapter.merge(place.model.write(place.folder / "base.gguf"), place.folder / "merged.gguf")

    def test_activated(self, place: Place) -> None:
        write_peft(place.folder / "adapters" / "later", pairs(place.model), alora_invocation_tokens=[1, 2])
        with pytest.raises(AdapterUnsupported, match="invocation tokens"):
            mix(place, {"style": 1.0, "later": 1.0})
        keys = keys_of(mix(place, {"later": 0.5}).gguf(place.model.info()))
        assert keys["adapter.alora.invocation_tokens"] == [1, 2]
        assert keys["adapter.lora.alpha"] == 0.5 * 2.0 * 4

    def test_adapters_of_others_and_sums(self, place: Place) -> None:
        style, domain = place.resolve("style"), place.resolve("domain")
        with pytest.raises(AdapterUnsupported, match="`theirs` has no files"):
            style.mix(1.0, [(_Theirs(), 1.0)])
        with pytest.raises(AdapterUnsupported, match="a sum already"):
            style.mix(1.0, [(domain.mix(0.5, []), 1.0)])

    @pytest.mark.parametrize(
        ("ranks", "weights", "reason"),
        [
            ((600, 500), (1.0, 1.0), "add up to 1100"),
            ((4, 4), (1.0, 1e-12), "its scale is"),
            ((4, 4), (1e9, 1), "scale"),
        ],
    )
    def test_beyond_bounds(self, place: Place, ranks: Any, weights: Any, reason: str) -> None:
        for name, rank in zip("ab", ranks, strict=True):
            write_peft(place.folder / "adapters" / name, pairs(place.model, rank=rank, modules=SOME[:1]))
        adapter = mix(place, dict(zip("ab", weights, strict=True)))
        with pytest.raises(AdapterUnsupported, match=reason):
            adapter.gguf(place.model.info())

    def test_gguf_without_heads(self, place: Place) -> None:
        info = place.model.info()
        facts = {key: value for key, value in info.metadata.items() if "head_count" not in key}
        with pytest.raises(AdapterUnsupported, match="how many heads"):
            mix(place, {"style": 1.0, "domain": 1.0}).gguf(replace(info, metadata=facts))


class _Theirs:
    name, digest, scale, verdict, served_as = "theirs", "sha256:00", 1.0, None, None
