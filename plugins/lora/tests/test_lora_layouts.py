"""Adapters as folders in PEFT's and mlx-lm's layouts, read back by other code than the plugin's."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from lora_files import Model, Pair, Place, pairs, write_gguf, write_mlx, write_peft
from safetensors.numpy import load_file, save_file

from graftage.exceptions import AdapterError, AdapterUnsupported
from graftage.types import ModelInfo, PortableAdapter

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

EXACT = 1e-6
"""Tolerance of a changed weight if only F32 is rounded."""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def read_peft(folder: Path) -> dict[str, Any]:
    """The change of each module, with vLLM's rule: one rank and one scale, no patterns."""
    config = json.loads((folder / "adapter_config.json").read_text())
    held = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name in {each.partition(".lora_")[0] for each in held}:
        if f"{name}.lora_embedding_A" in held:
            a, b = held[f"{name}.lora_embedding_B"].T, held[f"{name}.lora_embedding_A"].T
        else:
            a, b = held[f"{name}.lora_A.weight"], held[f"{name}.lora_B.weight"]
        assert len(a) == config["r"]
        assert name.removeprefix("base_model.model.") in config["target_modules"]
        found[name.removeprefix("base_model.model.")] = config["lora_alpha"] / config["r"] * b.astype(float) @ a
    return found


def read_mlx(folder: Path, layers: int) -> dict[str, Any]:
    """The change of each module, with the rules of mlx-lm's `linear_to_lora_layers` and `load_adapters`."""
    config = json.loads((folder / "adapter_config.json").read_text())
    own, held = config["lora_parameters"], load_file(folder / "adapters.safetensors")
    prepared = range(layers)[-max(config["num_layers"], 0) :]
    found = {}
    for name in {each.rpartition(".")[0] for each in held}:
        a, b = held[f"{name}.lora_a"], held[f"{name}.lora_b"]
        within = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        assert name in own["keys"] or (within and within[2] in own["keys"] and int(within[1]) in prepared)
        assert a.shape[1] == len(b) == own["rank"]
        change = own["scale"] * a.astype(float) @ b
        found[name] = change if name.endswith("embed_tokens") else change.T
    return found


def assert_equal(found: Mapping[str, Any], adapter: Mapping[str, Pair]) -> None:
    assert set(found) == {"model.embed_tokens" if name == "embed_tokens" else name for name in adapter}
    for name, pair in adapter.items():
        same = found["model.embed_tokens" if name == "embed_tokens" else name]
        assert np.abs(same - pair.change).max() < EXACT


def write_uneven(folder: Path, model: Model) -> dict[str, Pair]:
    """Write a PEFT adapter whose ranks and scales differ by module."""
    special = [name for name in model.modules() if name.endswith("v_proj")]
    plain = [name for name in model.modules() if name not in special]
    adapter = {
        **pairs(model, rank=4, scale=2.0, modules=plain),
        **pairs(model, rank=2, scale=7.0, modules=special),  # alpha 14 by rank 2
    }
    write_peft(folder, adapter, r=4, lora_alpha=8, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 14})
    return adapter


class TestLayouts:
    @pytest.mark.parametrize("source", ["peft", "mlx", "gguf"])
    def test_changes_are_equal_in_each(self, place: Place, source: str) -> None:
        adapter = pairs(place.model, kind=np.float16)
        write = {"peft": write_peft, "mlx": write_mlx}.get(source)
        path = (
            write(place.folder / source, adapter)
            if write
            else write_gguf(place.folder / "a.gguf", place.model, adapter)
        )
        found = place.resolve(path)
        assert isinstance(found, PortableAdapter)
        assert_equal(read_peft(found.peft(place.model.info())), adapter)
        assert_equal(read_mlx(found.mlx(place.model.info()), place.model.layers), adapter)
        for folder in (found.peft(place.model.info()), found.mlx(place.model.info())):
            assert place.resolve(folder).digest == found.digest

    def test_differing_ranks_and_scales_are_folded(self, place: Place) -> None:
        adapter = write_uneven(place.folder / "peft", place.model)
        found = place.resolve(place.folder / "peft")
        assert_equal(read_peft(found.peft(place.model.info())), adapter)
        assert_equal(read_mlx(found.mlx(place.model.info()), place.model.layers), adapter)

    def test_embedding_and_output_are_placed(self, place: Place) -> None:
        adapter = pairs(place.model, modules=["embed_tokens", "lm_head"])
        found = place.resolve(write_mlx(place.folder / "mlx", adapter))
        assert_equal(read_peft(found.peft(place.model.info())), adapter)
        assert_equal(read_mlx(found.mlx(place.model.info()), place.model.layers), adapter)

    def test_modules_without_gguf_names_keep_theirs(self, place: Place) -> None:
        pair = pairs(place.model, modules=["lm_head"])["lm_head"]
        name = "model.layers.0.self_attn.qkv_proj"
        found = place.resolve(write_peft(place.folder / "peft", {name: pair}), base=lambda: None)
        assert_equal(read_mlx(found.mlx(ModelInfo(name="phi")), 1), {name: pair})

    @pytest.mark.parametrize(("stated", "prepared"), [(True, 1), (False, -1)])
    def test_only_last_layers_are_prepared(self, place: Place, stated: bool, prepared: int) -> None:
        adapter = pairs(place.model, modules=["model.layers.1.mlp.up_proj"])
        found = place.resolve(write_peft(place.folder / "peft", adapter))
        folder = found.mlx(place.model.info() if stated else ModelInfo(name="small"))
        assert json.loads((folder / "adapter_config.json").read_text())["num_layers"] == prepared
        assert_equal(read_mlx(folder, place.model.layers), adapter)

    def test_registry_scale_is_written(self, place: Place) -> None:
        adapter = pairs(place.model, scale=2.0)
        write_mlx(place.folder / "mlx", adapter)
        (place.folder / "adapters.toml").write_text('[half]\npath = "mlx"\nscale = 1.0\n')
        folder = place.resolve("half").mlx(place.model.info())
        halved = {name: Pair(a=pair.a, b=pair.b, scale=1.0) for name, pair in adapter.items()}
        assert_equal(read_mlx(folder, place.model.layers), halved)


class TestCache:
    def test_folder_is_copy_of_own(self, place: Place) -> None:
        adapter = pairs(place.model)
        source = write_mlx(place.folder / "mlx", adapter)
        folder = place.resolve(source).mlx(place.model.info())
        assert folder.parent == place.folder / "cache"
        save_file({"other": np.zeros((1, 1), np.float32)}, source / "adapters.safetensors")
        assert_equal(read_mlx(folder, place.model.layers), adapter)

    def test_equal_content_has_equal_folder(self, place: Place) -> None:
        adapter = pairs(place.model)
        write_peft(place.folder / "one" / "same", adapter)
        write_mlx(place.folder / "two" / "same", adapter)
        found = [place.resolve(place.folder / each / "same") for each in ("one", "two")]
        assert len({each.peft(place.model.info()) for each in found}) == 1
        assert len({each.mlx(place.model.info()) for each in found}) == 1

    def test_damaged_folder_is_repaired(self, place: Place) -> None:
        found = place.resolve(write_peft(place.folder / "peft", pairs(place.model)))
        folder = found.mlx(place.model.info())
        before = {each.name: each.read_bytes() for each in folder.iterdir()}
        (folder / "adapters.safetensors").write_bytes(b"cut")
        (folder / "adapter_config.json").unlink()
        assert found.mlx(place.model.info()) == folder
        assert {each.name: each.read_bytes() for each in folder.iterdir()} == before


class TestRefusals:
    def test_invocation_tokens_are_refused(self, place: Place) -> None:
        found = place.resolve(write_peft(place.folder / "peft", pairs(place.model), alora_invocation_tokens=[7]))
        for convert in (found.peft, found.mlx):
            with pytest.raises(AdapterUnsupported, match="invocation tokens"):
                convert(place.model.info())

    def test_gguf_rows_need_number_of_heads(self, place: Place) -> None:
        found = place.resolve(write_gguf(place.folder / "a.gguf", place.model, pairs(place.model)))
        with pytest.raises(AdapterUnsupported, match="how many heads"):
            found.mlx(ModelInfo(name="small"))

    def test_unknown_gguf_tensor_is_refused(self, place: Place) -> None:
        file = write_gguf(place.folder / "a.gguf", place.model, pairs(place.model, modules=place.model.modules()[:1]))
        renamed = file.read_bytes().replace(b"blk.0.attn_q.weight", b"blk.0.attn_z.weight")
        file.write_bytes(renamed)
        with pytest.raises(AdapterUnsupported, match=r"attn_z.*no certain name"):
            place.resolve(file, base=lambda: None).mlx(place.model.info())

    def test_changed_source_is_refused(self, place: Place) -> None:
        source = write_peft(place.folder / "peft", pairs(place.model))
        found = place.resolve(source)
        write_peft(source, pairs(place.model, seed=8))
        with pytest.raises(AdapterError, match="changed after the check"):
            found.mlx(place.model.info())
