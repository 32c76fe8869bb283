"""Each architecture of the table: its names against the `gguf` package, and what an adapter does in the engine.

An adapter in the original order is converted by the plugin and applied by llama.cpp. It must do what it does in a model
whose original weights were merged by hand. How the original weights become a GGUF file is written here once more, from
llama.cpp's converter, and shares no code with the plugin.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from lora_files import Pair, Place, add, close, neighbours, served, write_mlx, write_peft
from places import ROOT

from graftage.exceptions import AdapterInvalid, AdapterUnsupported
from graftage.types import ModelInfo
from graftage_lora._architectures import ARCHITECTURES, LEAVE_OUT, gguf_name, module_name, tower_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

TOKENS = [3, 14, 15, 9, 2, 6, 5]
LAYERS, HIDDEN, HEADS, SHARED, WIDTH, FORWARD, WORDS = 2, 64, 4, 2, 16, 96, 48
EQUAL, CLEAR = 0.02, 0.05
"""Differences of log-probabilities: at most, if two models are the same, and at least, if a module was changed."""

QUERY, KEY = HEADS * WIDTH, SHARED * WIDTH
ATTENTION = {
    "self_attn.q_proj": ("attn_q", QUERY, HIDDEN),
    "self_attn.k_proj": ("attn_k", KEY, HIDDEN),
    "self_attn.v_proj": ("attn_v", KEY, HIDDEN),
    "self_attn.o_proj": ("attn_output", HIDDEN, QUERY),
}
UNGATED = {"mlp.up_proj": ("ffn_up", FORWARD, HIDDEN), "mlp.down_proj": ("ffn_down", HIDDEN, FORWARD)}
USUAL = {**ATTENTION, **UNGATED, "mlp.gate_proj": ("ffn_gate", FORWARD, HIDDEN)}
NORMS = {"attn_norm": HIDDEN, "ffn_norm": HIDDEN}
HEAD_NORMS = {"attn_q_norm": WIDTH, "attn_k_norm": WIDTH}
POST_NORMS = {"post_attention_norm": HIDDEN, "post_ffw_norm": HIDDEN}


@dataclass(frozen=True, kw_only=True)
class Small:
    """A small model of an architecture, as llama.cpp's converter would write it."""

    modules: Mapping[str, tuple[str, int, int]] = field(default_factory=lambda: USUAL)
    """By the name in transformers: GGUF's name, outputs and inputs."""
    permuted: bool = False
    """Whether the converter's class has `undo_permute`."""
    tied: bool = False
    norms: Mapping[str, int] = field(default_factory=lambda: NORMS)
    others: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Other weights of a layer, with their sides from the outermost one on."""
    ends: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Other weights outside of layers."""
    last_norm: str = "output_norm"
    keys: Mapping[str, Any] = field(default_factory=dict)
    """Keys that begin with the architecture."""
    plain_keys: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Layers that have a weight, if not all do."""


ALTUP, LAUREL, PER_LAYER = 256, 64, 256
WINDOW = {"attention.sliding_window": 64}
GEMMA3N = {
    **USUAL,
    "per_layer_input_gate": ("inp_gate", PER_LAYER, HIDDEN),
    "per_layer_projection": ("proj", HIDDEN, PER_LAYER),
    "laurel.linear_left": ("laurel_l", LAUREL, HIDDEN),
    "laurel.linear_right": ("laurel_r", HIDDEN, LAUREL),
}
SMALL = {
    "llama": Small(permuted=True),
    "qwen2": Small(),
    "qwen3": Small(norms={**NORMS, **HEAD_NORMS}),
    "gemma": Small(tied=True),
    "gemma2": Small(
        tied=True,
        norms={**NORMS, **POST_NORMS},
        keys={**WINDOW, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3": Small(tied=True, norms={**NORMS, **POST_NORMS, **HEAD_NORMS}, keys=WINDOW),
    "gemma3n": Small(
        modules=GEMMA3N,
        tied=True,
        norms={
            **NORMS,
            **POST_NORMS,
            **HEAD_NORMS,
            "post_norm": HIDDEN,
            "altup_correct_scale": HIDDEN,
            "altup_router_norm": HIDDEN,
            "laurel_post_norm": HIDDEN,
        },
        others={"altup_correct_coef": (4, 4), "altup_predict_coef": (16, 4), "altup_router": (4, HIDDEN)},
        ends={
            "altup_proj": (3, HIDDEN, HIDDEN),
            "altup_unembd_proj": (3, HIDDEN, HIDDEN),
            "per_layer_token_embd": (WORDS, LAYERS * ALTUP),
            "per_layer_model_proj": (LAYERS * ALTUP, HIDDEN),
            "per_layer_proj_norm": (ALTUP,),
        },
        keys={**WINDOW, "embedding_length_per_layer_input": PER_LAYER, "altup.num_inputs": 4, "altup.active_idx": 0},
    ),
    "gemma4": Small(
        modules={name: GEMMA3N[name] for name in GEMMA3N if "laurel" not in name},
        tied=True,
        norms={**NORMS, **POST_NORMS, **HEAD_NORMS, "post_norm": HIDDEN},
        ends={
            "per_layer_token_embd": (WORDS, LAYERS * PER_LAYER),
            "per_layer_model_proj": (LAYERS * PER_LAYER, HIDDEN),
            "per_layer_proj_norm": (PER_LAYER,),
            "rope_freqs": (WIDTH // 2,),
        },
        keys={
            **WINDOW,
            "embedding_length_per_layer_input": PER_LAYER,
            "attention.sliding_window_pattern": [True, False],
            "attention.key_length_swa": WIDTH,
            "attention.value_length_swa": WIDTH,
            "rope.dimension_count_swa": WIDTH,
            "attention.shared_kv_layers": 0,
        },
    ),
    "mistral3": Small(permuted=True),
    "smollm3": Small(permuted=True),
    "granite": Small(
        permuted=True,
        keys={"attention.scale": 0.2, "embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 2.0},
    ),
    "qwen2vl": Small(keys={"rope.dimension_sections": [2, 3, 3, 0]}),
    "qwen3vl": Small(
        norms={**NORMS, **HEAD_NORMS}, keys={"rope.dimension_sections": [2, 3, 3, 0], "n_deepstack_layers": 0}
    ),
    "hunyuan-dense": Small(norms={**NORMS, **HEAD_NORMS}),
    "exaone4": Small(norms={**POST_NORMS, **HEAD_NORMS}),
    "olmo2": Small(norms={**POST_NORMS, "attn_q_norm": QUERY, "attn_k_norm": KEY}),
    "cohere2": Small(tied=True, norms={"attn_norm": HIDDEN}, keys={**WINDOW, "logit_scale": 0.5}),
    "seed_oss": Small(norms={"attn_norm": HIDDEN, "post_attention_norm": HIDDEN}),
    "arcee": Small(modules={**ATTENTION, **UNGATED}, permuted=True),
    "ernie4_5": Small(),
    "apertus": Small(
        modules={**ATTENTION, **UNGATED},
        norms={**NORMS, **HEAD_NORMS},
        plain_keys={f"xielu.{name}": [0.5] * LAYERS for name in ("alpha_n", "alpha_p", "beta", "eps")},
    ),
    "phi3": Small(
        modules={
            "self_attn.qkv_proj": ("attn_qkv", QUERY + 2 * KEY, HIDDEN),
            "self_attn.o_proj": ("attn_output", HIDDEN, QUERY),
            "mlp.gate_up_proj": ("ffn_up", 2 * FORWARD, HIDDEN),
            "mlp.down_proj": ("ffn_down", HIDDEN, FORWARD),
        },
        keys={"attention.sliding_window": 0, "rope.scaling.original_context_length": 512},
    ),
    "qwen3moe": Small(
        modules=ATTENTION,
        norms={**NORMS, **HEAD_NORMS},
        others={
            "ffn_gate_inp": (4, HIDDEN),
            "ffn_gate_exps": (4, FORWARD, HIDDEN),
            "ffn_up_exps": (4, FORWARD, HIDDEN),
            "ffn_down_exps": (4, HIDDEN, FORWARD),
        },
        keys={"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": FORWARD},
    ),
    "lfm2": Small(
        modules={
            "self_attn.q_proj": ("attn_q", QUERY, HIDDEN),
            "self_attn.k_proj": ("attn_k", KEY, HIDDEN),
            "self_attn.v_proj": ("attn_v", KEY, HIDDEN),
            "self_attn.out_proj": ("attn_output", HIDDEN, QUERY),
            "feed_forward.w1": ("ffn_gate", FORWARD, HIDDEN),
            "feed_forward.w3": ("ffn_up", FORWARD, HIDDEN),
            "feed_forward.w2": ("ffn_down", HIDDEN, FORWARD),
            "conv.in_proj": ("shortconv.in_proj", 3 * HIDDEN, HIDDEN),
            "conv.out_proj": ("shortconv.out_proj", HIDDEN, HIDDEN),
        },
        tied=True,
        norms={**NORMS, **HEAD_NORMS},
        others={"shortconv.conv": (HIDDEN, 3)},
        last_norm="token_embd_norm",
        keys={"attention.head_count_kv": [0, SHARED], "shortconv.l_cache": 3},
        layers={
            "attn_q": (1,),
            "attn_k": (1,),
            "attn_v": (1,),
            "attn_output": (1,),
            "attn_q_norm": (1,),
            "attn_k_norm": (1,),
            "shortconv.in_proj": (0,),
            "shortconv.out_proj": (0,),
            "shortconv.conv": (0,),
        },
    ),
}


def originals(small: Small) -> dict[str, Any]:
    """The weights that adapters may change, by their names in transformers and in the original order."""
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for layer in range(LAYERS):
        for name, (kind, outputs, inputs) in small.modules.items():
            if layer in small.layers.get(kind, range(LAYERS)):
                found[f"model.layers.{layer}.{name}"] = rng.normal(0, inputs**-0.5, (outputs, inputs))
    found["model.embed_tokens"] = rng.normal(0, 0.3, (WORDS, HIDDEN))
    if not small.tied:
        found["lm_head"] = rng.normal(0, 0.3, (WORDS, HIDDEN))
    return found


def placed(small: Small, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights with the names and the order of a GGUF file, as the converter gives them."""
    ends = {"model.embed_tokens": "token_embd.weight", "lm_head": "output.weight"}
    found = {}
    for name, data in weights.items():
        if name in ends:
            found[ends[name]] = data
            continue
        _, _, layer, module = name.split(".", 3)
        rows = data
        if small.permuted and module in ("self_attn.q_proj", "self_attn.k_proj"):
            rows = neighbours(data, HEADS if module == "self_attn.q_proj" else SHARED)
        found[f"blk.{layer}.{small.modules[module][0]}.weight"] = rows
    return found


def others(small: Small) -> dict[str, Any]:
    """The weights that no adapter changes, with their names in GGUF files."""
    rng = np.random.default_rng(1)
    found: dict[str, Any] = {f"{small.last_norm}.weight": rng.normal(1, 0.1, HIDDEN)}
    for name, shape in small.ends.items():
        found[f"{name}.weight"] = rng.normal(1, 0.1, shape) if len(shape) == 1 else rng.normal(0, 0.2, shape)
    for layer in range(LAYERS):
        for name, size in small.norms.items():
            if layer in small.layers.get(name, range(LAYERS)):
                found[f"blk.{layer}.{name}.weight"] = rng.normal(1, 0.1, size)
        for name, shape in small.others.items():
            if layer in small.layers.get(name, range(LAYERS)):
                found[f"blk.{layer}.{name}.weight"] = rng.normal(0, 0.2, shape)
    return found


def metadata(architecture: str) -> dict[str, Any]:
    """The keys of a GGUF file."""
    common = {
        "block_count": LAYERS,
        "context_length": 512,
        "embedding_length": HIDDEN,
        "feed_forward_length": FORWARD,
        "attention.head_count": HEADS,
        "attention.head_count_kv": SHARED,
        "attention.key_length": WIDTH,
        "attention.value_length": WIDTH,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
        "rope.dimension_count": WIDTH,
        "vocab_size": WORDS,
    }
    own = {f"{architecture}.{key}": value for key, value in {**common, **SMALL[architecture].keys}.items()}
    return {"general.architecture": architecture, **own, **SMALL[architecture].plain_keys}


def write_model(path: Path, architecture: str, weights: Mapping[str, Any]) -> Path:
    """Write a GGUF file with changed weights."""
    small = SMALL[architecture]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata(architecture).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "default")
    writer.add_array("tokenizer.ggml.tokens", [f"word{number}" for number in range(WORDS)])
    writer.add_array("tokenizer.ggml.token_type", [1] * WORDS)
    writer.add_array("tokenizer.ggml.merges", ["w o"])
    for name, data in {**placed(small, weights), **others(small)}.items():
        add(writer, name, data, "F32")
    close(writer)
    return path


def changes(small: Small) -> dict[str, Pair]:
    """A random adapter for all modules; tied ends cannot be changed alone."""
    rng = np.random.default_rng(2)
    found = {}
    for name, data in originals(small).items():
        if not small.tied or name.startswith("model.layers"):
            a = rng.normal(0, data.shape[1] ** -0.5, (4, data.shape[1])).astype(np.float32)
            found[name] = Pair(a=a, b=rng.normal(0, 0.3, (len(data), 4)).astype(np.float32), scale=2.0)
    return found


def info(architecture: str) -> ModelInfo:
    """What a provider reports about the base model."""
    small = SMALL[architecture]
    shapes = {name: data.shape[::-1] for name, data in {**placed(small, originals(small)), **others(small)}.items()}
    return ModelInfo(name="small:1m", metadata=metadata(architecture), tensors=shapes)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def resolved(place: Place, architecture: str, name: str, adapter: Mapping[str, Pair]) -> Path:
    """Convert a part of an adapter with the plugin: layers as PEFT writes them, the ends as mlx-lm does."""
    write = write_peft if name == "layers" else write_mlx
    found = place.resolve(write(place.folder / name, adapter), base=lambda: info(architecture))
    assert found.verdict.status == "compatible", found.verdict.reasons
    file: Path = found.gguf(info(architecture))
    return file


@pytest.mark.engine
@pytest.mark.slow
class TestNumbers:
    @pytest.mark.parametrize("architecture", list(SMALL))
    def test_adapter_equals_merge_by_hand(self, place: Place, architecture: str) -> None:
        small = SMALL[architecture]
        weights, adapter = originals(small), changes(small)
        parts = {"layers": {name: pair for name, pair in adapter.items() if "layers" in name}}
        if not small.tied:
            parts["ends"] = {name: pair for name, pair in adapter.items() if "layers" not in name}
        files = [resolved(place, architecture, name, part) for name, part in parts.items()]
        base = write_model(place.folder / "base.gguf", architecture, weights)
        merged = {name: data + (adapter[name].change if name in adapter else 0) for name, data in weights.items()}
        truth = write_model(place.folder / "merged.gguf", architecture, merged)
        off, on = [0.0] * len(files), [1.0] * len(files)
        plain, hot, whole = served(TOKENS, (base, files, [off, on]), (truth, [], [[]]))
        assert np.abs(hot - whole).max() < EQUAL
        assert np.abs(hot - plain).max() > CLEAR

    def test_rows_have_the_order_of_the_engine(self, place: Place) -> None:
        """One model, written as each architecture that computes the same: half of them reorder q and k."""
        names = ["llama", "qwen2", "mistral3", "smollm3", "seed_oss", "qwen2vl"]
        weights = originals(SMALL["llama"])
        models = [write_model(place.folder / f"{name}.gguf", name, weights) for name in names]
        first, *rest = served(TOKENS, *((model, [], [[]]) for model in models))
        assert {SMALL[name].permuted for name in names} == {True, False}
        assert all(np.abs(each - first).max() < EQUAL for each in rest)


# --- Names -----------------------------------------------------------------------------------------------------------


class TestTable:
    def test_every_row_is_proven_by_numbers(self) -> None:
        assert set(SMALL) == set(ARCHITECTURES)
        for name, small in SMALL.items():
            assert {module: kind for module, (kind, *_) in small.modules.items()} == ARCHITECTURES[name].modules

    def test_modules_have_names_of_the_package(self) -> None:
        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        for architecture, row in ARCHITECTURES.items():
            names = gguf.get_tensor_name_map(numbers[architecture], 2)
            for module, kind in row.modules.items():
                assert names.get_name(f"model.layers.1.{module}") == f"blk.1.{kind}", (architecture, module)
                assert gguf_name(f"model.layers.1.{module}") == f"blk.1.{kind}.weight"
            assert names.get_name("model.embed_tokens") == "token_embd"

    def test_names_have_inverse_or_none(self) -> None:
        for architecture, row in ARCHITECTURES.items():
            for module in (*(f"model.layers.3.{each}" for each in row.modules), "model.embed_tokens", "lm_head"):
                assert module_name(gguf_name(module), architecture) == (None if row.has_towers else module)
        assert module_name("blk.0.attn_q.weight", "gpt2") is None
        assert module_name("blk.0.ffn_gate.weight", "phi3") is None

    def test_page_has_every_row(self) -> None:
        page = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
        rows = re.findall(r"^\| `([\w-]+)` \|.*\| ([\w ]+) \| (yes|no) \|$", page, re.MULTILINE)
        assert {name: (order == "reordered", towers == "yes") for name, order, towers in rows} == {
            name: (row.reordered, row.has_towers) for name, row in ARCHITECTURES.items()
        }

    def test_layouts_are_one_adapter(self, place: Place) -> None:
        for architecture, row in ARCHITECTURES.items():
            layers = {name: pair for name, pair in changes(SMALL[architecture]).items() if "layers" in name}
            base, report = partial(info, architecture), info(architecture)
            first = place.resolve(write_peft(place.folder / architecture, layers), base=base)
            second = place.resolve(first.gguf(report), base=base)
            assert (second.verdict.status, second.digest) == ("compatible", first.digest)
            if not row.has_towers:
                assert place.resolve(second.mlx(report), base=base).digest == first.digest


AROUND = [
    "model.layers.1.{}",
    "layers.1.{}",
    "model.language_model.layers.1.{}",
    "language_model.model.layers.1.{}",
    "model.text_model.layers.1.{}",
    "thinker.model.layers.1.{}",
    "llm.model.layers.1.{}",
    "_orig_mod.model.layers.1.{}",
    "module.module.model.layers.1.{}",
    "_orig_mod.module.base_model.model.model.language_model.layers.1.{}",
    "model._orig_mod.layers.1._checkpoint_wrapped_module.{}",
    "base_model.model._orig_mod.model.layers.1._fsdp_wrapped_module.{}._checkpoint_wrapped_module",
]
"""Names of one module in different programs."""


def renamed(name: str, around: str) -> str:
    """The name of a layer's module as another program writes it."""
    return around.replace("layers.1.", f"layers.{name.split('.')[2]}.").format(name.split(".", 3)[3])


class TestWrappers:
    @pytest.mark.parametrize("write", [write_peft, write_mlx])
    def test_every_name_is_the_same_module(self, place: Place, write: Any) -> None:
        adapter = changes(SMALL["gemma3"])
        plain = place.resolve(write_peft(place.folder / "plain", adapter), base=lambda: info("gemma3"))
        for number, around in enumerate(AROUND):
            names = {renamed(name, around): pair for name, pair in adapter.items()}
            found = place.resolve(write(place.folder / str(number), names), base=lambda: info("gemma3"))
            assert (found.verdict.status, found.digest) == ("compatible", plain.digest), around
            assert found.gguf(info("gemma3")).read_bytes() == plain.gguf(info("gemma3")).read_bytes()

    def test_two_names_of_one_module_are_refused(self, place: Place) -> None:
        pair = changes(SMALL["gemma3"])["model.layers.1.mlp.up_proj"]
        for around in AROUND[1:]:
            names = {AROUND[0].format("mlp.up_proj"): pair, around.format("mlp.up_proj"): pair}
            with pytest.raises(AdapterInvalid, match="two names of one module"):
                place.resolve(write_peft(place.folder / "twice", names), base=lambda: info("gemma3"))

    def test_other_programs_get_names_as_written(self, place: Place) -> None:
        adapter = changes(SMALL["gemma3"])
        names = {renamed(name, "_orig_mod.language_model.model.layers.1.{}"): pair for name, pair in adapter.items()}
        found = place.resolve(write_mlx(place.folder / "mlx", names), base=lambda: info("gemma3"))
        from safetensors.numpy import load_file

        held = load_file(found.mlx(info("gemma3")) / "adapters.safetensors")
        assert {name.rpartition(".")[0] for name in held} == {name.removeprefix("_orig_mod.") for name in names}

    @pytest.mark.parametrize(
        "module",
        ["model.decoder.layers.0.self_attn.q_proj", "encoder.layers.0.mlp.up_proj", "transformer.h.0.mlp.up_proj"],
    )
    def test_other_models_are_not_taken_for_text(self, module: str) -> None:
        assert gguf_name(module) == module


class TestTowers:
    def test_parts_beside_the_text_are_told(self) -> None:
        told = {
            "the vision tower": [
                "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
                "visual.blocks.0.attn.qkv",
                "model.visual.merger.mlp.0",
                "vision_model.encoder.layers.0.mlp.fc1",
                "model.embed_vision.embedding_projection",
            ],
            "the audio tower": [
                "model.audio_tower.conformer.0.attention.post",
                "model.embed_audio.embedding_projection",
            ],
            "the projector": [
                "multi_modal_projector.linear_1",
                "model.mm_projector.0",
                "model.connector.modality_projection.proj",
            ],
        }
        for tower, modules in told.items():
            assert {tower_of(module) for module in modules} == {tower}
        assert "leave_out_vision" in LEAVE_OUT

    def test_text_belongs_to_no_tower(self) -> None:
        for row in ARCHITECTURES.values():
            for module in row.modules:
                assert not any(tower_of(each.format(module)) for each in AROUND)


# --- Verdicts --------------------------------------------------------------------------------------------------------

SIDES = {"up": (FORWARD, HIDDEN), "down": (HIDDEN, FORWARD), "fused": (2 * FORWARD, HIDDEN)}
UNSUPPORTED = {
    "an expert": ("qwen3moe", "mlp.experts.3.up_proj", "up", "belongs to the experts"),
    "a router": ("qwen3moe", "mlp.gate", "up", "belongs to the experts"),
    "a split module of a fused model": ("phi3", "mlp.up_proj", "fused", "no tensor of its own"),
    "a fused module of a split model": ("llama", "mlp.gate_up_proj", "fused", "no tensor of its own"),
    "a module of another architecture": ("llama", "feed_forward.w1", "up", "no tensor of its own"),
    "a module that the engine ignores": ("gemma3n", "altup.modality_router", "up", "no tensor of its own"),
    "a gate in a model without gates": ("phi3", "mlp.gate_proj", "up", "part of `ffn_up`"),
    "a shared expert": ("granite", "shared_mlp.input_linear", "fused", "no tensor of its own"),
}


class TestUnsupported:
    @pytest.mark.parametrize("what", list(UNSUPPORTED))
    def test_module_without_place(self, place: Place, what: str) -> None:
        architecture, module, sides, reason = UNSUPPORTED[what]
        outputs, inputs = SIDES[sides]
        pair = Pair(a=np.ones((4, inputs), np.float32), b=np.ones((outputs, 4), np.float32), scale=1.0)
        folder = write_peft(place.folder / "odd", {f"model.layers.1.{module}": pair})
        found = place.resolve(folder, base=lambda: info(architecture))
        assert found.verdict.status == "unsupported"
        assert reason in found.verdict.reasons[0]
        assert "train" in found.verdict.reasons[0]  # The way out.
        if "part of" not in reason:  # Only the base model's tensors tell.
            with pytest.raises(AdapterUnsupported, match=reason):
                found.gguf(info(architecture))

    def test_split_attention_of_fused_model(self, place: Place) -> None:
        folder = write_peft(place.folder / "split", changes(SMALL["qwen3"]))
        found = place.resolve(folder, base=lambda: info("phi3")).verdict
        assert (found.status, any("attn_qkv" in each for each in found.reasons)) == ("unsupported", True)

    def test_architecture_without_row(self, place: Place) -> None:
        folder = write_peft(place.folder / "layers", changes(SMALL["qwen3"]))
        strange = ModelInfo(name="x", metadata={"general.architecture": "gpt2"})
        found = place.resolve(folder, base=lambda: strange)
        assert (found.verdict.status, "convert_lora_to_gguf" in found.verdict.reasons[0]) == ("unsupported", True)
        with pytest.raises(AdapterUnsupported, match="gpt2"):
            found.gguf(strange)

    def test_folder_of_original_weights_needs_no_row(self, place: Place) -> None:
        folder = write_peft(place.folder / "layers", changes(SMALL["qwen3"]))
        strange = ModelInfo(
            name="x", metadata={"general.architecture": "gpt2"}, raw={"details": {"format": "safetensors"}}
        )
        found = place.resolve(folder, base=lambda: strange)
        assert (found.verdict.status, "shapes" in found.verdict.reasons[0]) == ("unknown", True)
        assert found.peft(strange).exists()

    def test_names_outside_of_gguf_must_be_certain(self, place: Place) -> None:
        folder = write_peft(place.folder / "layers", changes(SMALL["gemma3"]))
        file = place.resolve(folder, base=lambda: info("gemma3")).gguf(info("gemma3"))
        original = ModelInfo(name="x", metadata=metadata("gemma3"), raw={"details": {"format": "safetensors"}})
        found = place.resolve(file, base=lambda: original)
        assert (found.verdict.status, "as its trainer wrote it" in found.verdict.reasons[0]) == ("unsupported", True)
        with pytest.raises(AdapterUnsupported, match="no certain name"):
            found.mlx(original)

    def test_tensors_may_be_unknown(self, place: Place) -> None:
        found = {}
        for architecture, small in SMALL.items():
            layers = {name: pair for name, pair in changes(small).items() if "layers" in name}
            base = partial(ModelInfo, name="x", metadata=metadata(architecture))
            found[architecture] = place.resolve(write_peft(place.folder / architecture, layers), base=base).verdict
        unsure = {architecture for architecture, verdict in found.items() if verdict.status != "compatible"}
        assert unsure == {"gemma3n", "gemma4"}  # Their figures do not tell every shape.
        assert {found[architecture].status for architecture in unsure} == {"unknown"}
