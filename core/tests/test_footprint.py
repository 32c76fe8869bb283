"""The footprint of a model, compared with what servers printed and with measured memory."""

from __future__ import annotations

import json
import os
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGML_QUANT_SIZES
from hypothesis import given
from hypothesis import strategies as st

import graftage
from graftage.footprint import BITS, CACHE_BY_SIZE, GIB, KV_BYTES, Layer, Shape, footprint, read_shape
from graftage.types import ModelInfo

ASSETS = Path(__file__).parent / "assets"
MEASURED = json.loads((ASSETS / "smollm2-loaded.json").read_text())
LOW, HIGH = -0.05, 0.25


def show(line: str) -> None:
    """Print a line for `pytest -s`."""
    sys.stdout.write(f"{line}\n")


def model(  # noqa: PLR0917 - the columns of a table
    architecture: str,
    layers: int,
    heads: int,
    kv_heads: Any,
    length: int,
    embedding: int,
    vocabulary: int,
    gigabytes: float,
    *,
    features: frozenset[str] | None = None,
    **more: Any,
) -> ModelInfo:
    """Return a model as its provider describes it; `more` are further keys, with `__` for the dot."""
    keys = {
        "block_count": layers,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": length,
        "attention.value_length": length,
        "embedding_length": embedding,
        "vocab_size": vocabulary,
        **{name.replace("__", "."): value for name, value in more.items()},
    }
    metadata = {"general.architecture": architecture, **{f"{architecture}.{key}": keys[key] for key in keys}}
    return ModelInfo(
        name="model:1",
        architecture=architecture,
        size=int(gigabytes * 1e9),
        metadata=metadata,
        features=features,
    )


def shape_of(*arguments: Any, **named: Any) -> Shape:
    shape = read_shape(model(*arguments, **named))
    assert shape is not None
    return shape


VISION = frozenset({"chat", "images"})
LLAMA_8B = ("llama", 32, 32, 8, 128, 4096, 128_256)
QWEN3_4B = ("qwen3", 36, 32, 8, 128, 2560, 151_936, 2.5)
QWEN25_7B = ("qwen2", 28, 28, 4, 128, 3584, 152_064, 4.7)

PUBLISHED: list[tuple[str, Shape, int, int, bool, float, str]] = [
    ("llama3 8B q4_0", shape_of(*LLAMA_8B, 4.7), 2048, 4, False, 6.7, "Ollama 0.2.0 release notes"),
    ("llama3.1 8B q4", shape_of(*LLAMA_8B, 4.9), 131_072, 1, True, 22.0, "log"),
    ("llama3.2 1B q8", shape_of("llama", 16, 32, 8, 64, 2048, 128_256, 1.3), 131_072, 1, True, 6.4, "guide"),
    ("llama3.2 3B q4", shape_of("llama", 28, 24, 8, 128, 3072, 128_256, 2.0), 131_072, 1, True, 18.0, "log"),
    ("qwen2.5 3B q4", shape_of("qwen2", 36, 16, 2, 128, 2048, 151_936, 1.9), 32_768, 1, False, 4.3, "guide"),
    ("qwen2.5-coder 7B q4", shape_of(*QWEN25_7B), 32_768, 1, True, 6.6, "guide"),
    ("qwen2.5 7B q4, 0.30+", shape_of(*QWEN25_7B), 4096, 1, True, 4.7, "log"),
    ("qwen2.5 32B q4", shape_of("qwen2", 64, 40, 8, 128, 5120, 152_064, 20.0), 32_768, 1, True, 28.0, "guide"),
    ("qwen3 4B q4", shape_of(*QWEN3_4B), 4096, 1, True, 3.5, "log"),
    ("qwen3-type 4B q4_K_M", shape_of(*QWEN3_4B), 16_384, 1, True, 5.1, "log"),
    (
        "gpt-oss 20B mxfp4",
        shape_of("gptoss", 24, 64, 8, 64, 2880, 201_088, 14.0, attention__sliding_window=128),
        131_072, 1, True, 17.0, "log",
    ),
    (
        "gemma3 4B q4",
        shape_of("gemma3", 34, 8, 4, 256, 2560, 262_144, 3.3, attention__sliding_window=1024, features=VISION),
        65_536, 1, True, 6.6, "Ollama docs context-length.mdx",
    ),
    (
        "gemma3 12B q4",
        shape_of("gemma3", 48, 16, 8, 256, 3840, 262_144, 8.1, attention__sliding_window=1024, features=VISION),
        4096, 2, True, 11.7 * GIB / 1e9, "ollama#10395",
    ),
    (
        "codegeex4 9B q4_0",
        shape_of("chatglm", 40, 32, 2, 128, 4096, 151_552, 5.5),
        32_768, 1, False, 8.1 * GIB / 1e9, "log of an M4 with 32 GB",
    ),
]  # fmt: skip
"""Name, shape by the published configuration, window, slots, flash attention, printed gigabytes, source."""


class TestTotal:
    @pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row[0])
    def test_meets_published_sizes(self, row: tuple[str, Shape, int, int, bool, float, str]) -> None:
        name, shape, window, slots, flash, printed, source = row
        ours = footprint(shape, window, slots=slots, flash_attention=flash)
        # Ollama's planner up to 0.24 counts 457 to 512 MiB for the runner on a GPU; so it is counted here, too.
        error = ours.total / (printed * 1e9) - 1
        figures = f"printed {printed:5.1f} GB, ours {ours.total / 1e9:5.1f} {error:+.1%}"
        show(f"{name:22} {window:7} x {slots} {figures}  {source}")
        assert LOW <= error <= HIGH

    @pytest.mark.parametrize(
        "point", MEASURED["loaded"], ids=lambda point: f"{point['context_window']}x{point['parallel']}"
    )
    def test_meets_measured_sizes(self, point: dict[str, int]) -> None:
        facts = MEASURED["model"]
        shape = read_shape(ModelInfo(**facts))
        assert shape is not None
        window, slots = point["context_window"], point["parallel"]
        # That server ran on a CPU, where Ollama counts nothing for the runner, and without flash attention.
        ours = footprint(shape, window, slots=slots, flash_attention=False)
        error = ours.counted / point["size"] - 1
        resident = ours.counted / point["resident"] - 1
        show(f"{window:5} x {slots}  {point['size'] / 1e6:4.0f} MB counted {error:+.1%}; resident {resident:+.1%}")
        assert LOW <= error <= HIGH
        assert ours.total > point["resident"]

    @pytest.mark.live
    def test_meets_a_live_server(self) -> None:
        host = os.environ.get("GRAFTAGE_LIVE_OLLAMA")
        if not host:
            pytest.skip("GRAFTAGE_LIVE_OLLAMA names no server")
        errors = []
        with graftage.connect("ollama", model="smollm2:135m", host=host) as llm:
            shape = read_shape(llm.show(), next(info.size for info in llm.models() if info.name == "smollm2:135m"))
            assert shape is not None
            for window in (1024, 2048, 4096, 6144, 8192):
                llm.unload()
                llm.chat("hi", context_window=window, max_tokens=2)
                size = llm.loaded()[0].size
                assert size
                fits = [footprint(shape, window, slots=slots, flash_attention=False).counted for slots in (1, 2, 4)]
                errors.append([ours / size - 1 for ours in fits])
        show(str(errors))
        # The server does not report its slots: one number must explain all five sizes.
        assert any(all(LOW <= error <= HIGH for error in column) for column in zip(*errors, strict=True))


KIB_PER_TOKEN = [
    ("qwen2.5:7b", shape_of(*QWEN25_7B), 56),
    ("qwen3:30b-a3b", shape_of("qwen3moe", 48, 32, 4, 128, 2048, 151_936, 18.6), 96),
    ("llama3.1:8b", shape_of(*LLAMA_8B, 4.9), 128),
    ("qwen3:4b", shape_of(*QWEN3_4B), 144),
    ("qwen3:14b", shape_of("qwen3", 40, 40, 8, 128, 5120, 151_936, 9.3), 160),
    ("qwen3:32b", shape_of("qwen3", 64, 64, 8, 128, 5120, 151_936, 20.0), 256),
    ("llama3.3:70b", shape_of("llama", 80, 64, 8, 128, 8192, 128_256, 42.5), 320),
]


class TestTerms:
    @pytest.mark.parametrize(("name", "shape", "kib"), KIB_PER_TOKEN, ids=[each[0] for each in KIB_PER_TOKEN])
    def test_cache_of_a_token(self, name: str, shape: Shape, kib: int) -> None:
        assert footprint(shape, 8192).cache - footprint(shape, 4096).cache == 4096 * kib * 1024

    def test_sliding_layers_stop_growing(self) -> None:
        gemma = shape_of("gemma3", 62, 32, 16, 128, 5376, 262_144, 17.4, attention__sliding_window=1024)
        assert sum(not layer.window for layer in gemma.layers or ()) == 10
        grown = footprint(gemma, 131_072).cache - footprint(gemma, 65_536).cache
        assert grown == 65_536 * 80 * 1024
        assert footprint(gemma, 4096).cache - 4096 * 80 * 1024 == pytest.approx(0.6 * GIB, rel=0.05)

    def test_pattern_says_which_layers_slide(self) -> None:
        shape = shape_of(
            "gemma4", 4, 8, 2, 64, 512, 1000, 1.0,
            attention__sliding_window=512, attention__sliding_window_pattern=[True, True, True, False],
            attention__key_length_swa=32, attention__value_length_swa=32, attention__shared_kv_layers=1,
        )  # fmt: skip
        assert [(layer.window, layer.cell) for layer in shape.layers or ()] == [
            (512, 128),
            (512, 128),
            (512, 128),
            (0, 0),
        ]

    def test_latent_cache_follows_the_file(self) -> None:
        converted = model("deepseek2", 27, 16, 1, 0, 2048, 102_400, 8.9, attention__kv_lora_rank=512)
        keys = {"deepseek2.attention.key_length": 576, "deepseek2.attention.value_length": 512}
        small = read_shape(replace(converted, metadata={**converted.metadata, **keys}))
        old = shape_of("deepseek2", 27, 16, 16, 192, 2048, 102_400, 8.9)
        assert small is not None
        assert footprint(small, 32_768).cache == 32_768 * 27 * (576 + 512) * 2
        assert footprint(old, 32_768).cache > 5 * footprint(small, 32_768).cache

    def test_recurrent_layers_have_only_a_state(self) -> None:
        ssm: dict[str, Any] = {
            "ssm__conv_kernel": 4,
            "ssm__inner_size": 4096,
            "ssm__state_size": 128,
            "ssm__group_count": 16,
        }
        hybrid = shape_of("qwen35", 32, 16, 4, 256, 4096, 248_320, 6.0, full_attention_interval=4, **ssm)
        assert [place for place, layer in enumerate(hybrid.layers or ()) if layer.cell] == list(range(3, 32, 4))
        assert footprint(hybrid, 8192).cache - footprint(hybrid, 4096).cache == 4096 * 32 * 1024
        one, four = footprint(hybrid, 4096, slots=1).state, footprint(hybrid, 4096, slots=4).state
        assert (one, four) == (32 * (3 * (4096 + 2 * 16 * 128) + 128 * 4096) * 4, 4 * one)
        by_array = shape_of("nemotron_h", 4, 32, [0, 8, 0, 0], 128, 4096, 131_072, 5.0, **ssm)
        assert [layer.cell > 0 for layer in by_array.layers or ()] == [False, True, False, False]

    def test_slots_multiply_the_cache(self) -> None:
        shape = shape_of(*QWEN3_4B)
        assert footprint(shape, 8192, slots=4).cache == 4 * footprint(shape, 8192).cache
        bert = shape_of("nomic-bert", 12, 12, 12, 64, 768, 30_522, 0.27, pooling_type=1)
        assert bert.embeds
        assert footprint(bert, 2048, slots=4) == footprint(bert, 2048)

    def test_quantised_cache_counts_its_blocks(self) -> None:
        shape = shape_of(*QWEN3_4B)
        full = footprint(shape, 8192).cache
        assert footprint(shape, 8192, kv_type="q8_0").cache == full * 34 // 64
        assert footprint(shape, 8192, kv_type="q4_0").cache == full * 18 // 64

    def test_compute_buffers_match_llama_cpp(self) -> None:
        small = shape_of("qwen2", 28, 12, 2, 128, 1536, 151_936, 1.0)
        assert footprint(small, 512).compute / (1 << 20) == pytest.approx(299.75, abs=0.6)
        codegeex = PUBLISHED[-1][1]
        assert footprint(codegeex, 32_768, flash_attention=False).compute / (1 << 20) == pytest.approx(2145, abs=1)


BLOCK_BITS = {kind.name: size * 8 / numbers for kind, (numbers, size) in GGML_QUANT_SIZES.items()}
FILES = {
    "IQ3_XS": "IQ3_XXS",
    "IQ3_M": "IQ3_S",
    "IQ2_M": "IQ2_S",
    "Q2_K_S": "Q2_K",
    **{
        f"Q{bits}_K_{kind}": f"Q{bits}_K"
        for bits in (3, 4, 5)
        for kind in "SML"
        if (bits, kind) not in {(4, "L"), (5, "L")}
    },
}
"""Files with several types of tensors, by the most frequent type."""
NEVER_A_FILE = {"Q3_K", "Q4_K", "Q5_K", "Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}


class TestBits:
    @pytest.mark.parametrize("kind", sorted({*BLOCK_BITS, *FILES} - NEVER_A_FILE))
    def test_quantised_file_is_near_its_blocks(self, kind: str) -> None:
        block = BLOCK_BITS[FILES.get(kind, kind)]
        assert block <= BITS[kind] <= block + 0.9

    @pytest.mark.parametrize(
        ("kind", "bits"),
        [("INT4", 5), ("INT8", 8.5), ("MXFP4", 4.25), ("MXFP8", 8.25), ("NVFP4", 4.5), ("FP8", 8), ("F8_E4M3", 8),
         ("F8_E5M2", 8), ("BF16", 16), ("bfloat16", 16), ("float16", 16), ("float32", 32)],
    )  # fmt: skip
    def test_safetensors_types(self, kind: str, bits: float) -> None:
        for written in (kind.upper(), kind.lower()):
            shape = read_shape(ModelInfo(name="x:1", quantization=written, tensors={"a": (1000, 1_000_000)}))
            assert shape is not None
            assert shape.weights == pytest.approx(1e9 * bits / 8 * 1.25, rel=0.001)

    @pytest.mark.parametrize("quantization", [None, "", "unknown", "int5", "MXFP6", "Q9_X"])
    def test_unknown_type_is_not_16_bits(self, quantization: str | None) -> None:
        info = ModelInfo(name="x:1", quantization=quantization, parameters="12.0B", tensors={"a": (12_000_000, 1000)})
        assert read_shape(info) is None
        shape = read_shape(info, 7_600_000_000)
        assert shape is not None
        assert (shape.weights, shape.estimated) == (7_600_000_000, False)


class TestOddFacts:
    @pytest.mark.parametrize(("given", "trained"), [(8, None), (63, None), (64, 64), (8192, 8192)])
    def test_tiny_window_is_odd(self, given: int, trained: int | None) -> None:
        shape = shape_of(*LLAMA_8B, 4.9, context_length=given)
        assert (shape.trained_window, shape.odd) == (trained, () if trained else ("context_length",))

    def test_size_below_one_bit_is_odd(self) -> None:
        shape = read_shape(replace(model(*LLAMA_8B, 4.9), parameters="8.03B"), 9_000_000)
        assert shape is not None
        assert (shape.weights, shape.odd) == (4_900_000_000, ("size",))

    @pytest.mark.parametrize("bad", [-1, "many", [1, "x"], 10**30, True, {"a": 1}, float("nan"), [], None])
    @pytest.mark.parametrize("key", ["block_count", "attention.head_count_kv", "attention.key_length", "vocab_size"])
    def test_nonsense_in_metadata_is_unknown(self, key: str, bad: Any) -> None:
        info = model(*LLAMA_8B, 4.9)
        shape = read_shape(replace(info, metadata={**info.metadata, f"llama.{key}": bad}))
        assert shape is not None
        assert 0 < footprint(shape, 8192).total < 1 << 50

    @pytest.mark.parametrize("layers", [10**9, 1 << 49])
    def test_impossible_layer_count_costs_no_memory(self, layers: int) -> None:
        info = model(*LLAMA_8B, 4.9)
        tracemalloc.start()
        shape = read_shape(replace(info, metadata={**info.metadata, "llama.block_count": layers}))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert shape is not None
        assert (shape.layers, shape.odd) == (None, ("block_count",))
        assert most < 1 << 20

    @pytest.mark.parametrize(
        "facts",
        [
            {"parameters": "9" * 320 + "B"}, {"parameters": "9" * 400 + "B", "tensors": {"a": (10**15, 10**15)}},
            {"size": -5_000_000_000}, {"size": 10**30}, {"tensors": {"a": (-5, 7)}}, {"tensors": {"a": ("5", 2)}},
            {"tensors": {"a": (10**15,) * 30, "b": (-1,)}}, {"path": Path("a\0b")}, {"architecture": ["llama"]},
            {"quantization": 4, "parameters": 5},
        ],
    )  # fmt: skip
    def test_impossible_size_is_unknown(self, facts: dict[str, Any]) -> None:
        assert read_shape(ModelInfo(name="x:1", **facts)) is None
        shape = read_shape(ModelInfo(name="x:1", **{"quantization": "Q8_0", **facts, "parameters": "8.0B"}))
        assert (shape is None) == (facts.get("quantization") == 4), "a type that is not text has no size"
        assert shape is None or shape.weights == pytest.approx(8e9 * 8.5008 / 8 * 1.25)


def without(info: ModelInfo, key: str) -> Shape:
    """Return the shape of a model whose file lacks a key."""
    shape = read_shape(replace(info, metadata={name: info.metadata[name] for name in info.metadata if name != key}))
    assert shape is not None
    return shape


class TestMissingFacts:
    def test_missing_heads_are_bounded_by_size(self) -> None:
        known = footprint(shape_of("llama", 32, 32, 8, 128, 4096, 128_256, 4.9), 32_768).total
        unknown = read_shape(model("llama", 32, 32, None, 128, 4096, 128_256, 4.9))
        assert unknown is not None
        assert unknown.layers is None
        assert "estimated from the file's size" in unknown.notes[0]
        assert known < footprint(unknown, 32_768).total

    def test_missing_size_is_estimated_from_parameters(self) -> None:
        info = ModelInfo(name="x:1", architecture="llama", parameters="8.03B", quantization="Q4_K_M")
        shape = read_shape(info)
        assert shape is not None
        assert 4.9e9 < shape.weights < 6.2e9
        assert "estimated from 8.0 billion parameters of 4.9 bits" in shape.notes[0]
        listed = read_shape(info, 4_920_000_000)
        assert listed == replace(shape, weights=4_920_000_000, estimated=False, notes=(shape.notes[1],))

    def test_unknown_model_has_no_shape(self) -> None:
        assert read_shape(ModelInfo(name="x:1")) is None

    def test_missing_shared_heads_equal_query_heads(self) -> None:
        shape = without(model("llama", 32, 32, 8, 128, 4096, 128_256, 4.9), "llama.attention.head_count_kv")
        assert shape.layers == shape_of("llama", 32, 32, 32, 128, 4096, 128_256, 4.9).layers

    def test_missing_vocabulary_comes_from_the_table(self) -> None:
        info = replace(model(*LLAMA_8B, 4.9), tensors={"token_embd.weight": (4096, 128_256)})
        assert without(info, "llama.vocab_size").vocabulary == 128_256

    def test_without_attention_only_a_state(self) -> None:
        ssm: dict[str, Any] = {"ssm__conv_kernel": 4, "ssm__inner_size": 1536, "ssm__state_size": 16}
        shape = without(model("mamba", 24, 0, None, 0, 768, 50_280, 0.3, **ssm), "mamba.attention.head_count_kv")
        assert (footprint(shape, 8192).cache, footprint(shape, 8192).state) == (0, 24 * (3 * 1536 + 16 * 1536) * 4)

    def test_zero_heads_are_bounded_by_size(self) -> None:
        assert shape_of("llama", 32, 32, 0, 128, 4096, 128_256, 4.9).layers is None


class TestShape:
    def test_short_convolution_state(self) -> None:
        shape = shape_of("lfm2", 2, 32, [0, 8], 64, 2048, 65_536, 1.0, shortconv__l_cache=3)
        assert [layer.state for layer in shape.layers or ()] == [2 * 2048 * 4] * 2

    def test_largest_figure_of_the_layers_counts(self) -> None:
        info = model(*LLAMA_8B, 4.9)
        several = read_shape(replace(info, metadata={**info.metadata, "llama.attention.head_count": [4, 32, 8]}))
        assert several is not None
        assert several.heads == 32

    def test_listed_size_wins_over_computed(self) -> None:
        shape = read_shape(model(*LLAMA_8B, 4.9), 5_100_000_000)
        assert shape is not None
        assert shape.weights == 5_100_000_000

    def test_mixture_reads_part_of_its_weights(self) -> None:
        moe = shape_of("gptoss", 24, 64, 8, 64, 2880, 201_088, 13.8, expert_count=32, expert_used_count=4)
        assert 0.15 < moe.active < 0.25
        info = model("gptoss", 24, 64, 8, 64, 2880, 201_088, 13.8, expert_count=32, expert_used_count=4)
        by_tensors = read_shape(
            replace(info, tensors={"blk.0.ffn_up_exps.weight": (90, 10), "blk.0.attn.weight": (10, 10)})
        )
        assert by_tensors is not None
        assert by_tensors.active == pytest.approx(1 - 0.9 * (1 - 4 / 32))


LAYERS = st.builds(
    Layer,
    cell=st.integers(0, 1 << 15),
    window=st.sampled_from([0, 128, 1024, 4096]),
    state=st.integers(0, 1 << 22),
)
SHAPES = st.builds(
    Shape,
    weights=st.integers(10**7, 10**11),
    layers=st.none() | st.lists(LAYERS, max_size=12).map(tuple),
    embedding=st.integers(64, 16_384),
    heads=st.integers(1, 128),
    vocabulary=st.integers(1000, 300_000),
    vision=st.booleans(),
    embeds=st.booleans(),
)


@given(
    SHAPES,
    st.integers(1, 300_000),
    st.integers(0, 300_000),
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from(list(KV_BYTES)),
)
def test_longer_window_never_takes_less(  # noqa: PLR0917 - each is drawn
    shape: Shape, window: int, more: int, slots: int, flash: bool, kv_type: Any
) -> None:
    short, long = (
        footprint(shape, each, slots=slots, flash_attention=flash, kv_type=kv_type) for each in (window, window + more)
    )
    assert short.total <= long.total
    assert shape.weights < short.total
    assert short.total <= footprint(shape, window, slots=slots + 1, flash_attention=flash, kv_type=kv_type).total


def test_tables_rise() -> None:
    assert [kib for _, kib in CACHE_BY_SIZE] == sorted(kib for _, kib in CACHE_BY_SIZE)
    assert BITS["Q8_0"] > BITS["Q6_K"] > BITS["Q5_K_M"] > BITS["Q4_K_M"] > BITS["Q3_K_M"] > BITS["Q2_K"]
