"""Files as trainers write them: what is saved beside the halves, configurations of each release, what is missing."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_files import Model, Pair, Place, pairs, write_mlx, write_peft
from safetensors.numpy import load_file, save_file

from graftage.exceptions import AdapterInvalid, AdapterUnsupported
from graftage_lora._files import Refused
from graftage_lora._patterns import Patterns

if TYPE_CHECKING:
    from pathlib import Path

HEAD = "base_model.model.lm_head"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def save_more(folder: Path, more: dict[str, Any]) -> Path:
    """Add tensors to the weights of a PEFT adapter."""
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), **more}, path)
    return folder


class TestUntouched:
    @pytest.mark.parametrize(
        "more",
        [
            {f"{HEAD}.base_layer.weight": np.ones((48, 64), np.float16)},
            {f"{HEAD}.weight": np.ones((48, 64), np.float32)},
            {
                f"{HEAD}.base_layer.weight": np.ones((1536, 1), np.uint8),
                f"{HEAD}.base_layer.weight.absmax": np.ones(24),
            },
            {
                f"{HEAD}.base_layer.weight": np.full((48, 64), np.nan, np.float32),
                f"{HEAD}.base_layer.bias": np.ones(48),
            },
        ],
        ids=["half precision", "without its wrapper", "quantised", "not finite, with a bias"],
    )
    def test_weight_beside_halves_is_no_change(self, place: Place, more: dict[str, Any]) -> None:
        adapter = pairs(place.model, modules=["model.layers.0.self_attn.q_proj", "lm_head"])
        digest = place.resolve(write_peft(place.folder / "plain", adapter)).digest
        found = place.resolve(save_more(write_peft(place.folder / "saved", adapter), more))
        assert (found.digest, found.verdict.status, found.verdict.warnings) == (digest, "compatible", ())

    def test_embedding_weight_is_no_change(self, place: Place) -> None:
        pair = pairs(place.model, modules=["embed_tokens"])["embed_tokens"]
        folder = write_peft(place.folder / "given", {"model.layers.0.mlp.up_proj": pair})
        name = "base_model.model.model.embed_tokens"
        save_file(
            {
                f"{name}.lora_embedding_A": np.ascontiguousarray(pair.b.T),
                f"{name}.lora_embedding_B": np.ascontiguousarray(pair.a.T),
                f"{name}.base_layer.weight": np.ones((48, 64), np.float32),
            },
            folder / "adapter_model.safetensors",
        )
        assert [each.tensor for each in place.resolve(folder).facts.shapes] == ["token_embd.weight"]

    def test_resized_vocabulary_is_named(self, place: Place) -> None:
        alone = write_peft(place.folder / "alone", pairs(place.model))
        with pytest.raises(AdapterInvalid, match="vocabulary was resized"):
            place.resolve(save_more(alone, {f"{HEAD}.weight": np.ones((50, 64), np.float32)}))
        trained = write_peft(place.folder / "trained", pairs(Model(vocabulary=50), modules=["lm_head"]))
        verdict = place.resolve(
            save_more(trained, {f"{HEAD}.base_layer.weight": np.ones((50, 64), np.float32)})
        ).verdict
        assert verdict.status == "incompatible"
        assert "vocabulary" in verdict.reasons[0]

    def test_vision_is_left_out_on_request(self, place: Place) -> None:
        tower = "base_model.model.visual.blocks.0.attn.qkv"
        halves = {f"{tower}.lora_A.weight": np.ones((4, 3, 2, 2)), f"{tower}.lora_B.weight": np.ones((9, 4))}
        plain = place.resolve(write_peft(place.folder / "given", pairs(place.model)))
        folder = save_more(place.folder / "given", halves)
        with pytest.raises(AdapterInvalid, match="vision tower") as caught:
            place.resolve(folder)
        assert "leave_out_vision" in str(caught.value.hint)
        found = place.resolve(folder, leave_out_vision=True)
        assert found.digest == plain.digest
        assert found.verdict.warnings == (
            "Modules of the vision tower are left out (1): only the language model is changed.",
        )


class TestConfiguration:
    @pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b"\r\n", b""], ids=["a byte-order mark", "a line", "nothing"])
    def test_text_of_any_editor_is_read(self, place: Place, start: bytes) -> None:
        folder = write_peft(place.folder / "given", pairs(place.model), r=4.0, target_modules=["q_proj"])
        config = folder / "adapter_config.json"
        config.write_bytes(start + config.read_bytes().replace(b",", b",\r\n"))
        assert place.resolve(folder).scale == 2.0

    def test_harmless_fields_are_accepted(self, place: Place) -> None:
        fields = {
            "loftq_config": {},
            "eva_config": {"rho": 2.0},
            "corda_config": None,
            "arrow_config": None,
            "next_config": None,
            "megatron_core": "megatron.core",
            "use_dora": False,
            "use_bdlora": None,
            "use_rslora": False,
            "init_lora_weights": "eva",
            "ensure_weight_tying": True,
        }
        assert place.resolve(write_peft(place.folder / "given", pairs(place.model), **fields)).scale == 2.0

    @pytest.mark.parametrize(
        ("config", "parameters", "scale"),
        [
            ({}, {"rank": 4, "alpha": 16, "scale": 3.0}, 3.0),
            ({"num_layers": -1, "mask_prompt": False}, {"rank": 4, "alpha": 8, "scale": 10.0, "keys": None}, 10.0),
            ({}, {"rank": 4.0, "scale": 20, "dropout": 0.1}, 20.0),
            ({}, {"alpha": 16, "scale": 5.0}, 5.0),
        ],
    )
    def test_scale_counts_in_mlx_releases_since_2025(
        self, place: Place, config: Any, parameters: Any, scale: float
    ) -> None:
        folder = write_mlx(place.folder / "given", pairs(place.model), parameters=parameters, **config)
        assert place.resolve(folder).scale == scale

    def test_weights_decide_between_two_vocabularies(self, place: Place) -> None:
        peft: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
        mlx: dict[str, Any] = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 3.0}}
        adapter = pairs(place.model)
        assert place.resolve(write_mlx(place.folder / "mlx", adapter, **{**mlx, **peft})).scale == 3.0
        assert place.resolve(write_peft(place.folder / "peft", adapter, **{**mlx, **peft})).scale == 1.0

    def test_old_mlx_alpha_is_refused(self, place: Place) -> None:
        folder = write_mlx(
            place.folder / "given", pairs(place.model), parameters={"rank": 4, "alpha": 16, "scale": 2.0}
        )
        path = folder / "adapter_config.json"
        known = json.loads(path.read_text(encoding="utf-8"))
        for key, value in {"num_layers": None, "fine_tune_type": None, "lora_layers": 2}.items():
            known = {**known, key: value} if value else {name: each for name, each in known.items() if name != key}
        path.write_text(json.dumps(known), encoding="utf-8")
        with pytest.raises(AdapterInvalid, match="alpha"):
            place.resolve(folder)

    def test_activated_adapter_is_never_merged(self, place: Place) -> None:
        tokens = {"alora_invocation_tokens": [1, 2, 3], "invocation_string": "<|certainty|>"}
        found = place.resolve(write_peft(place.folder / "given", pairs(place.model), **tokens))
        assert found.facts.invocation == (1, 2, 3)
        base = place.model.write(place.folder / "base.gguf")
        with pytest.raises(AdapterUnsupported, match="invocation tokens"):
            found.merge(base, place.folder / "out.gguf")
        for layout in (found.peft, found.mlx):
            with pytest.raises(AdapterUnsupported, match="invocation tokens"):
                layout(place.model.info())


MODULES = (
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.self_attn.k_proj",
    "model.layers.2.mlp.down_proj",
    "lm_head",
)
KEYS = (
    "q_proj", "proj", "layers.1.self_attn.q_proj", "^lm_head", "^q_proj", r".*\.q_proj", r"model\.layers\.[0-9]\..*",
    r"model\.layers\.\d+\.self_attn\.(q|k)_proj", "(q_proj|k_proj)", "q_proj|lm_head", "lm_hea?d", "lm_head?d", "",
    "^model.layers.1.self_attn.q_proj$", r"layers\.(?:1|2)\..*", r"layers\.\d\d\..*proj", r"(self_attn\.)?q_proj",
    r"layers\.\d{1,2}\.mlp\.\w+", r".*[^k]_proj", r"layers\.\d{2,}\..*?", "[a-z_]+", "(|lm_head)", r"l.*_.*d",
)  # fmt: skip


def peft_matches(key: str, module: str) -> bool:
    """Return what PEFT's `get_pattern_key` decides."""
    return re.match(rf"(.*\.)?({key})$", module) is not None


class TestPatterns:
    def test_expressions_match_as_in_peft(self) -> None:
        wrong = [
            (key, module)
            for key in KEYS
            for module in MODULES
            if (Patterns({key: 2.0}).find(module, 1.0) == 2.0) is not peft_matches(key, module)
        ]
        assert wrong == []

    @given(
        key=st.lists(st.sampled_from([*"ab.|()*+?^$", "\\.", "[ab]", "[^a]", "\\d", "{1,2}", "(?:"]), max_size=8).map(
            "".join
        ),
        module=st.text(alphabet="ab.", max_size=8),
    )
    def test_any_expression_matches_or_is_refused(self, key: str, module: str) -> None:
        try:
            found = Patterns({f"{key}[a]?": 2.0}).find(module, 1.0) == 2.0
        except Refused:
            return
        assert found is peft_matches(f"{key}[a]?", module)

    def test_first_match_counts(self) -> None:
        patterns = Patterns({r".*\.q_proj": 2.0, "q_proj": 3.0, "k_proj": 4.0})
        assert [patterns.find(each, 1.0) for each in MODULES] == [2.0, 4.0, 1.0, 1.0]

    def test_endless_work_is_refused(self) -> None:
        patterns = Patterns({r"(?:.*a)?" + ".*" * 140 + "x": 2.0})
        with pytest.raises(Refused, match="take too long"):
            patterns.find("model.layers.1", 1.0)
        many = Patterns({".*x.*y": 2.0})
        with pytest.raises(Refused, match="take too long"):
            _ = [many.find("model." + "a" * 300, 1.0) for _ in range(1000)]

    def test_pattern_changes_scale_of_its_modules(self, place: Place) -> None:
        config = {"rank_pattern": {r".*\.q_proj": 4, "(a+)+$": 8}, "alpha_pattern": {r"model\.layers\.0\..*_proj": 16}}
        facts = place.resolve(write_peft(place.folder / "given", pairs(place.model), **config)).facts
        scales = {each.tensor.split(".")[1]: each.scale for each in facts.shapes}
        assert scales == {"0": 4.0, "1": 2.0}


def partly(place: Place, adapter: dict[str, Pair], **config: Any) -> str:
    """Return the warning of a PEFT adapter."""
    verdict = place.resolve(write_peft(place.folder / "given", adapter, **config)).verdict
    assert verdict.status == "compatible"
    return "".join(verdict.warnings)


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FIRST = {name for name in Model().modules() if ".layers.0." in name}


class TestPartlySaved:
    def test_missing_modules_are_counted(self, place: Place) -> None:
        adapter = pairs(place.model)
        del adapter["model.layers.1.mlp.up_proj"], adapter["model.layers.1.self_attn.q_proj"]
        said = partly(place, adapter, target_modules=ALL)
        assert "of the 14 modules that its configuration names in the base model, 2 are missing" in said
        assert "`attn_q` of layer 1" in said

    @pytest.mark.parametrize(
        ("config", "modules"),
        [
            ({"target_modules": ALL}, None),
            ({"target_modules": [*ALL, "gate", "qkv", "lm_head_2"]}, None),
            ({"target_modules": r".*layers\.0\..*"}, FIRST),
            ({"target_modules": "all-linear"}, FIRST),
            ({"target_modules": None}, FIRST),
            ({"target_modules": ALL, "layers_to_transform": [0]}, FIRST),
            ({"target_modules": ALL, "layers_to_transform": 0, "layers_pattern": "layers"}, FIRST),
            ({"target_modules": ALL, "exclude_modules": ["layers.1"]}, FIRST),
            ({"target_modules": sorted(FIRST)}, FIRST),
            (
                {"target_modules": ["0.mlp.up_proj", "1.mlp.up_proj"]},
                {f"model.layers.{at}.mlp.up_proj" for at in (0, 1)},
            ),
        ],
    )
    def test_whole_adapter_is_silent(self, place: Place, config: Any, modules: set[str] | None) -> None:
        adapter = {name: pair for name, pair in pairs(place.model).items() if modules is None or name in modules}
        assert partly(place, adapter, **config) == ""

    def test_modules_that_base_lacks_are_not_missed(self, place: Place) -> None:
        tensors = {name: shape for name, shape in place.model.tensors().items() if "blk.1.ffn" not in name}
        adapter = {name: pair for name, pair in pairs(place.model).items() if ".layers.1.mlp" not in name}
        folder = write_peft(place.folder / "given", adapter, target_modules=ALL)
        assert place.resolve(folder, base=lambda: place.model.info(tensors=tensors)).verdict.warnings == ()

    @pytest.mark.parametrize(
        ("config", "keys", "missing"),
        [
            ({"num_layers": 2}, None, 7),
            ({"num_layers": -1}, ["self_attn.q_proj"], 1),
            ({"num_layers": 1}, None, 0),
            ({"num_layers": 16}, ["self_attn.q_proj", "mlp.up_proj"], 2),
        ],
    )
    def test_last_layers_of_mlx_are_expected(self, place: Place, config: Any, keys: Any, missing: int) -> None:
        adapter = {
            name: pair
            for name, pair in pairs(place.model).items()
            if ".layers.1." in name and (keys is None or name.endswith(tuple(keys)))
        }
        parameters = {"rank": 4, "scale": 2.0, **({"keys": keys} if keys else {})}
        folder = write_mlx(place.folder / "given", adapter, parameters=parameters, **config)
        said = "".join(place.resolve(folder).verdict.warnings)
        assert (f"{missing} are missing" in said) is bool(missing)
