"""Untrusted adapters: each is refused with its reason, in memory bounded by its size."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_files import Model, Place, pairs, write_gguf, write_mlx, write_peft
from places import LORA

from graftage.exceptions import AdapterInvalid

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MODULE = "model.layers.0.self_attn.q_proj"
A, B = f"base_model.model.{MODULE}.lora_A.weight", f"base_model.model.{MODULE}.lora_B.weight"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
SPARE = 2 << 20
"""Bytes that reading may take beside a multiple of the file's size."""


def entry(shape: Any, start: Any, end: Any, dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end], **more}


TWICE = b',"' + A.encode() + b'":{}}'
GOOD = {A: entry([2, 4], 0, 32), B: entry([4, 2], 32, 64)}
DATA = np.arange(1, 17, dtype="<f4").tobytes()


def safetensors(head: Any, data: bytes = DATA, *, length: int | None = None) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def numbers(*values: float) -> bytes:
    return np.array([*values, *range(1, 17 - len(values))], dtype="<f4").tobytes()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 1049\n"


WEIGHTS: dict[str, tuple[str, bytes]] = {
    "an empty file": ("is empty", b""),
    "seven bytes": ("too short", b"1234567"),
    "a length of 2^64-1": ("states a length", safetensors(GOOD, length=2**64 - 1)),
    "a length of 2^40": ("states a length", safetensors(GOOD, length=1 << 40)),
    "a length beyond the file": ("states a length", safetensors(GOOD, length=4096)),
    "a length of 0": ("not valid JSON", safetensors(b"")),
    "a head of invalid JSON": ("not valid JSON", safetensors(b"{this is it}")),
    "a head of invalid UTF-8": ("not valid JSON", safetensors(b'{"\xff": 1}')),
    "a head that is a list": ("not a JSON object", safetensors([1, 2])),
    "a head of deep brackets": ("more than|not valid JSON", safetensors(b"[" * 200_000)),
    "a head of deep braces": ("not valid JSON|more than", safetensors(b'{"a":' * 60_000)),
    "a head with a number of many digits": ("not valid JSON|shape", safetensors(b'{"a":' + b"9" * 100_000 + b"}")),
    "a head of many numbers": ("exactly dtype", safetensors(b'{"a":[' + b"300," * 100_000 + b"0]}")),
    "a head of many names": ("exactly dtype", safetensors({f"{each:x}": 0 for each in range(9000)})),
    "a tensor that is there twice": ("twice", safetensors(json.dumps(GOOD)[:-1].encode() + TWICE)),
    "no tensors": ("no tensors", safetensors({}, b"")),
    "nothing but notes": ("no tensors", safetensors({"__metadata__": {"format": "pt"}}, b"")),
    "notes that are not texts": ("__metadata__", safetensors({"__metadata__": {"a": 1}, **GOOD})),
    "notes that are a list": ("__metadata__", safetensors({"__metadata__": [], **GOOD})),
    "whole numbers": ("type I64", safetensors({**GOOD, A: entry([2, 2], 0, 32, "I64")})),
    "numbers of eight bits": ("type F8_E4M3", safetensors({**GOOD, A: entry([2, 16], 0, 32, "F8_E4M3")})),
    "a type that is a list": ("type", safetensors({**GOOD, A: entry([2, 4], 0, 32, ["F32"])})),
    "one dimension": ("two sides", safetensors({**GOOD, A: entry([8], 0, 32)})),
    "three dimensions": ("two sides", safetensors({**GOOD, A: entry([2, 2, 2], 0, 32)})),
    "no dimension": ("two sides", safetensors({**GOOD, A: entry([], 0, 32)})),
    "a side of 0": ("two sides", safetensors({**GOOD, A: entry([0, 4], 0, 32)})),
    "a negative side": ("two sides", safetensors({**GOOD, A: entry([-2, -4], 0, 32)})),
    "a side of 2^62": ("two sides", safetensors({**GOOD, A: entry([1 << 62, 1 << 62], 0, 32)})),
    "a side and a half": ("invalid shape", safetensors({**GOOD, A: entry([2.0, 4.0], 0, 32)})),
    "a side that is true": ("invalid shape", safetensors({**GOOD, A: entry([True, 8], 0, 32)})),
    "a shape that is a text": ("invalid shape", safetensors({**GOOD, A: entry("24", 0, 32)})),
    "a shape larger than the data": ("contradicts", safetensors({**GOOD, A: entry([1 << 20, 1 << 20], 0, 32)})),
    "a shape smaller than the data": ("contradicts", safetensors({**GOOD, A: entry([1, 4], 0, 32)})),
    "offsets that are reversed": ("data_offsets", safetensors({**GOOD, A: entry([2, 4], 32, 0)})),
    "offsets that are empty": ("data_offsets", safetensors({**GOOD, A: {**GOOD[A], "data_offsets": []}})),
    "negative offsets": ("data_offsets", safetensors({**GOOD, A: entry([2, 4], -32, 0)})),
    "offsets that are floats": ("data_offsets", safetensors({**GOOD, A: entry([2, 4], 0.0, 32.0)})),
    "offsets past the end": ("past the end", safetensors(GOOD, DATA[:-4])),
    "offsets that overlap": ("overlaps", safetensors({**GOOD, B: entry([4, 2], 16, 48)})),
    "offsets with a gap": ("gap", safetensors({**GOOD, B: entry([4, 2], 36, 68)}, DATA + b"1234")),
    "bytes at the end": ("unused", safetensors(GOOD, DATA + b"1234")),
    "a tensor without a type": ("exactly dtype", safetensors({**GOOD, A: {"shape": [2, 4], "data_offsets": [0, 32]}})),
    "a tensor with an extra key": ("exactly dtype", safetensors({**GOOD, A: entry([2, 4], 0, 32, path="/etc")})),
    "a tensor that is a number": ("exactly dtype", safetensors({**GOOD, A: 7})),
    "a name of two thousand letters": ("characters", safetensors({"x" * 2000: GOOD[A], B: GOOD[B]})),
    "a NaN": ("NaN", safetensors(GOOD, numbers(float("nan")))),
    "an infinity": ("NaN or infinity", safetensors(GOOD, numbers(1, -float("inf")))),
    "the JSON word NaN": ("contains NaN", safetensors(b'{"a": NaN}')),
    "half of a pair": ("lacks its half B", safetensors({A: entry([2, 4], 0, 32)}, DATA[:32])),
    "the other half of a pair": ("lacks its half A", safetensors({B: entry([4, 2], 0, 32)}, DATA[:32])),
    "a whole weight beside one half": ("whole weight", safetensors({A: GOOD[A], f"{MODULE}.weight": GOOD[B]})),
    "an unpaired tensor": ("not one half", safetensors({A: GOOD[A], f"{MODULE}.other": GOOD[B]})),
    "a bias": ("bias", safetensors({A: GOOD[A], f"{MODULE}.bias": GOOD[B]})),
    "a magnitude of DoRA": ("DoRA", safetensors({A: GOOD[A], f"{MODULE}.lora_magnitude_vector": GOOD[B]})),
    "a saved module": ("saved module", safetensors({A: GOOD[A], "lm_head.modules_to_save.weight": GOOD[B]})),
    "a weight of the base": ("whole weight", safetensors({A: GOOD[A], f"{MODULE}.base_layer.weight": GOOD[B]})),
    "a weight of the base in another shape": ("but its halves", safetensors(
        {**GOOD, f"{MODULE}.base_layer.weight": entry([2, 4], 64, 96)}, DATA + DATA[:32])),
    "a weight of the base whose type is a list": ("invalid type", safetensors(
        {**GOOD, f"{MODULE}.base_layer.weight": entry([4, 4], 64, 96, ["F32"])}, DATA + DATA[:32])),
    "a whole output": ("vocabulary", safetensors({**GOOD, "lm_head.weight": entry([2, 4], 64, 96)}, DATA + DATA[:32])),
    "a whole embedding of no type": ("vocabulary", safetensors(
        {**GOOD, "model.embed_tokens.weight": entry([2, 4], 64, 96, "X9")}, DATA + DATA[:32])),
    "a module of a vision tower": ("belongs to the vision tower", safetensors(
        {**GOOD, "vision_tower.layers.0.q_proj.lora_A.weight": entry([2, 2, 2], 64, 96)}, DATA + DATA[:32])),
    "a half that was not gathered": ("two sides", safetensors(
        {A: entry([0], 0, 0), B: entry([4, 2], 0, 32)}, DATA[:32])),
    "a pointer of Git LFS": ("Git LFS pointer", POINTER),
    "halves of two ranks": ("ranks", safetensors({**GOOD, B: entry([2, 4], 32, 64)})),
    "another rank than stated": ("states 2", safetensors({A: entry([4, 2], 0, 32), B: entry([2, 4], 32, 64)})),
    "a half twice": ("twice", safetensors({A: GOOD[A], f"{MODULE}.lora_A.weight": entry([2, 4], 32, 64)})),
    "only zeros": ("are zero", safetensors(GOOD, bytes(64))),
    "a B that was never trained": ("are zero", safetensors(GOOD, DATA[:32] + bytes(32))),
    "a pickle": ("pickle", pickle.dumps({"a": list(range(50))}, protocol=4)),
    "an old pickle": ("neither|states a length", pickle.dumps({"a": list(range(50))}, protocol=0)),
    "an archive": ("pickle", b"PK\x03\x04" + bytes(100)),
    "an array of NumPy": ("pickle", b"\x93NUMPY\x01\x00" + bytes(100)),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def refused(place: Place, path: Path, reason: str, **settings: Any) -> AdapterInvalid:
    """Return the error of an adapter; reading it may take a multiple of its size, and no more."""
    place.resolve(write_peft(place.folder / "warm", pairs(place.model)))  # Do not count imports.
    size = sum(each.stat().st_size for each in ([*path.iterdir()] if path.is_dir() else [path]))
    tracemalloc.start()
    try:
        with pytest.raises(AdapterInvalid, match=reason) as caught:
            place.resolve(path, **settings)
        assert tracemalloc.get_traced_memory()[1] < SPARE + 32 * size
    finally:
        tracemalloc.stop()
    assert caught.value.reasons
    return caught.value


def peft(place: Place, weights: bytes | None = None, config: Any = None) -> Path:
    """A folder as PEFT writes it."""
    folder = place.folder / "given"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(safetensors(GOOD) if weights is None else weights)
    text = config if isinstance(config, bytes) else json.dumps(CONFIG if config is None else config).encode()
    (folder / "adapter_config.json").write_bytes(text)
    return folder


# --- Configurations --------------------------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[str, Any]] = {
    "invalid JSON": ("not valid JSON", b"r = 4"),
    "invalid UTF-8": ("not valid JSON", b'{"\xff": 1}'),
    "a list": ("not a JSON object", [1]),
    "a key twice": ("twice", b'{"r": 1, "r": 2}'),
    "too large": ("bytes", b" " * (1 << 20) + b"{}"),
    "neither PEFT's nor mlx-lm's": ("neither", {"r": 4}),
    "another method": ("peft_type", {**CONFIG, "peft_type": "IA3"}),
    "a method that is a list": ("peft_type", {**CONFIG, "peft_type": ["LORA"]}),
    "no rank": ("`r`", {"peft_type": "LORA", "lora_alpha": 4}),
    "a rank of 0": ("`r`", {**CONFIG, "r": 0}),
    "a rank of 1025": ("`r`", {**CONFIG, "r": 1025}),
    "a rank that is true": ("`r`", {**CONFIG, "r": True}),
    "a rank that is a text": ("`r`", {**CONFIG, "r": "4"}),
    "no alpha": ("lora_alpha", {"peft_type": "LORA", "r": 2}),
    "an alpha of 0": ("lora_alpha", {**CONFIG, "lora_alpha": 0}),
    "an alpha of NaN": ("NaN", b'{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}'),
    "an alpha of 1e999": ("lora_alpha", b'{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}'),
    "an alpha of 1e300": ("scale", {**CONFIG, "lora_alpha": 1e300}),
    "an alpha beyond every float": ("lora_alpha", {**CONFIG, "lora_alpha": 10**400}),
    "an alpha that is a list": ("lora_alpha", {**CONFIG, "lora_alpha": [4]}),
    "DoRA": ("use_dora", {**CONFIG, "use_dora": True}),
    "QALoRA": ("use_qalora", {**CONFIG, "use_qalora": True}),
    "an unknown variant": ("use_next", {**CONFIG, "use_next": True}),
    "biases": ("bias", {**CONFIG, "bias": "all"}),
    "separate biases": ("lora_bias", {**CONFIG, "lora_bias": True}),
    "saved modules": ("modules_to_save", {**CONFIG, "modules_to_save": ["lm_head"]}),
    "single tokens": ("trainable_token", {**CONFIG, "trainable_token_indices": [1]}),
    "repeated layers": ("layer_replication", {**CONFIG, "layer_replication": [[0, 4]]}),
    "bare parameters": ("target_parameters", {**CONFIG, "target_parameters": ["experts.up"]}),
    "a start that changes the base": ("pissa", {**CONFIG, "init_lora_weights": "pissa_niter_4"}),
    "an expression that may run forever": ("expression", {**CONFIG, "alpha_pattern": {"(a+)+$": 2}}),
    "an expression that is too long": ("expression", {**CONFIG, "alpha_pattern": {"a*" * 200: 2}}),
    "an expression that is not one": ("expression", {**CONFIG, "alpha_pattern": {"(q|k_proj": 2}}),
    "an expression of other syntax": ("expression", {**CONFIG, "alpha_pattern": {"(?=q)q_proj": 2}}),
    "an unknown configuration": ("next_config", {**CONFIG, "next_config": {"a": 1}}),
    "block-diagonal halves": ("use_bdlora", {**CONFIG, "use_bdlora": {"nblocks": 2}}),
    "an unknown start": ("next_init", {**CONFIG, "init_lora_weights": "next_init"}),
    "a rank and a half": ("`r`", {**CONFIG, "r": 2.5}),
    "a rank beyond every float": ("`r`", b'{"peft_type": "LORA", "r": 1e999, "lora_alpha": 4}'),
    "a pointer of Git LFS": ("Git LFS pointer", POINTER),
    "a pattern that is a list": ("rank_pattern", {**CONFIG, "rank_pattern": [2]}),
    "a pattern's rank of 0": ("rank_pattern", {**CONFIG, "rank_pattern": {"q_proj": 0}}),
    "a pattern's alpha of NaN": ("alpha_pattern", {**CONFIG, "alpha_pattern": {"q_proj": "x"}}),
    "tokens that are texts": ("invocation", {**CONFIG, "alora_invocation_tokens": ["a"]}),
    "a text instead of tokens": ("acts only after a text", {**CONFIG, "invocation_string": "<|certainty|>"}),
    "negative tokens": ("invocation", {**CONFIG, "alora_invocation_tokens": [-1]}),
    "tokens that are a number": ("invocation", {**CONFIG, "alora_invocation_tokens": 7}),
    "DoRA of mlx-lm": ("fine_tune_type", {"fine_tune_type": "dora", "lora_parameters": {"rank": 2}}),
    "a whole training of mlx-lm": ("fine_tune_type", {"fine_tune_type": "full"}),
    "mlx-lm without a scale": ("lora_parameters", {"fine_tune_type": "lora"}),
    "mlx-lm with a scale of 0": ("scale", {"lora_parameters": {"rank": 2, "scale": 0}}),
    "mlx-lm with only an alpha": ("scale", {"num_layers": 2, "lora_parameters": {"rank": 2, "alpha": 16}}),
    "mlx-lm with an alpha": ("alpha", {"lora_parameters": {"rank": 2, "alpha": 16, "scale": 2.0}}),
}


class TestPeft:
    def test_sample_is_valid(self, place: Place) -> None:
        found = place.resolve(peft(place))
        assert found.scale == 2.0
        assert len(found.facts.shapes) == 1

    @pytest.mark.parametrize("kind", list(WEIGHTS))
    def test_malformed_weights_are_refused(self, place: Place, kind: str) -> None:
        reason, data = WEIGHTS[kind]
        refused(place, peft(place, data), reason)

    @pytest.mark.parametrize("kind", list(CONFIGS))
    def test_unsupported_configuration_is_refused(self, place: Place, kind: str) -> None:
        reason, config = CONFIGS[kind]
        refused(place, peft(place, config=config), reason)

    def test_missing_configuration_is_refused(self, place: Place) -> None:
        folder = peft(place)
        (folder / "adapter_config.json").unlink()
        refused(place, folder / "adapter_model.safetensors", "`adapter_config.json` with the scale is missing")


def test_mlx_magnitude_is_refused(place: Place) -> None:
    folder = write_mlx(place.folder / "mlx", pairs(place.model))
    head = {f"{MODULE}.m": entry([2, 4], 0, 32)}
    (folder / "adapters.safetensors").write_bytes(safetensors(head, DATA[:32]))
    refused(place, folder, "DoRA")


# --- GGUF ------------------------------------------------------------------------------------------------------------


def text(value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: bytes | str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return key("a", 9, struct.pack("<IQ", kind, count) + values)


def tensor(name: str, shape: tuple[int, ...], offset: int, kind: int = 0, dimensions: int | None = None) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


KEYS = [
    key("general.architecture", 8, text("llama")),
    key("general.type", 8, text("adapter")),
    key("adapter.type", 8, text("lora")),
    key("adapter.lora.alpha", 6, struct.pack("<f", 4)),
]
HALF_A, HALF_B = "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"
TOKENS_BELOW = key("adapter.alora.invocation_tokens", 9, struct.pack("<IQi", 5, 1, -1))
TENSORS = [tensor(HALF_A, (4, 2), 0), tensor(HALF_B, (2, 4), 32)]


def gguf(
    keys: list[bytes] = KEYS,
    tensors: list[bytes] = TENSORS,
    data: bytes = DATA,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    key_count: int | None = None,
    tensor_count: int | None = None,
) -> bytes:
    counts = (len(tensors) if tensor_count is None else tensor_count, len(keys) if key_count is None else key_count)
    front = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return front + bytes(-len(front) % 32) + data


def without(number: int) -> list[bytes]:
    return [each for at, each in enumerate(KEYS) if at != number]


GGUFS: dict[str, tuple[str, bytes]] = {
    "another magic": ("neither", gguf(magic=b"GGML")),
    "nothing but a magic": ("ends within", b"GGUF"),
    "version 1": ("version is 1", gguf(version=1)),
    "version 99": ("version is 99", gguf(version=99)),
    "big-endian": ("big-endian", gguf(version=3 << 24)),
    "2^60 keys": ("keys", gguf(key_count=1 << 60)),
    "more keys than fit": ("more than the file", gguf(key_count=4000)),
    "2^60 tensors": ("tensors", gguf(tensor_count=1 << 60)),
    "more tensors than fit": ("more than the file", gguf(tensor_count=60_000)),
    "a key's name of 2^62": ("a key has", gguf([struct.pack("<Q", 1 << 62), *KEYS])),
    "a text of 2^62": ("bytes of text", gguf([key("a", 8, struct.pack("<Q", 1 << 62)), *KEYS])),
    "a text beyond the file": ("ends within", gguf([key("a", 8, struct.pack("<Q", 1 << 19)), *KEYS])),
    "an array of 2^61": ("entries", gguf([array(4, 1 << 61), *KEYS])),
    "an array beyond the file": ("more than the file", gguf([array(4, 1 << 19), *KEYS])),
    "an array beyond any head": ("head is larger", gguf([array(4, 1 << 20, bytes(4 << 20)), *KEYS])),
    "many arrays": ("twice", gguf([array(4, 4000, bytes(16_000)) for _ in range(200)])),
    "an array of endless texts": ("bytes of text", gguf([array(8, 9, struct.pack("<Q", 1 << 40)), *KEYS])),
    "an array of arrays": ("array of arrays", gguf([array(9, 1), *KEYS])),
    "an array of an unknown type": ("unknown type", gguf([array(77, 1), *KEYS])),
    "a value of an unknown type": ("unknown type", gguf([key("a", 77, b""), *KEYS])),
    "a key twice": ("twice", gguf([*KEYS, KEYS[0]])),
    "a key of invalid UTF-8": ("UTF-8", gguf([key(b"\xff", 4, bytes(4)), *KEYS])),
    "an alignment of 0": ("alignment", gguf([key("general.alignment", 4, struct.pack("<I", 0)), *KEYS])),
    "an alignment of 3": ("alignment", gguf([key("general.alignment", 4, struct.pack("<I", 3)), *KEYS])),
    "an alignment that is a text": ("alignment", gguf([key("general.alignment", 8, text("32")), *KEYS])),
    "no dimension": ("dimensions", gguf(tensors=[tensor(HALF_A, (), 0), TENSORS[1]])),
    "five dimensions": ("dimensions", gguf(tensors=[tensor(HALF_A, (1, 1, 1, 1, 1), 0), TENSORS[1]])),
    "2^32 - 1 dimensions": ("dimensions", gguf(tensors=[tensor(HALF_A, (4, 2), 0, dimensions=2**32 - 1), TENSORS[1]])),
    "a side of 0": ("shape", gguf(tensors=[tensor(HALF_A, (0, 2), 0), TENSORS[1]])),
    "a side of 2^62": ("shape", gguf(tensors=[tensor(HALF_A, (1 << 62, 1 << 62), 0), TENSORS[1]])),
    "a type that is not known": ("unknown type", gguf(tensors=[tensor(HALF_A, (4, 2), 0, kind=999), TENSORS[1]])),
    "a type that cannot hold the rows": ("in blocks of", gguf(tensors=[tensor(HALF_A, (4, 2), 0, kind=8), TENSORS[1]])),
    "whole numbers": ("cannot be read", gguf(tensors=[tensor(HALF_A, (4, 2), 0, kind=26), TENSORS[1]])),
    "an offset that is not aligned": ("multiple of 32", gguf(tensors=[tensor(HALF_A, (4, 2), 4), TENSORS[1]])),
    "an offset past the end": ("bytes are missing", gguf(tensors=[tensor(HALF_A, (4, 2), 1 << 40), TENSORS[1]])),
    "an offset of 2^64 - 32": ("bytes are missing", gguf(tensors=[tensor(HALF_A, (4, 2), 2**64 - 32), TENSORS[1]])),
    "tensors that overlap": ("overlaps", gguf(tensors=[TENSORS[0], tensor(HALF_B, (2, 4), 0)])),
    "a tensor twice": ("twice", gguf(tensors=[TENSORS[0], tensor(HALF_A, (4, 2), 32)])),
    "data that is cut": ("bytes are missing", gguf(data=DATA[:40])),
    "no data at all": ("bytes are missing", gguf(data=b"")),
    "no tensors": ("no LoRA pairs", gguf(tensors=[], data=b"")),
    "one dimension": ("1 dimensions", gguf(tensors=[tensor(HALF_A, (8,), 0), TENSORS[1]])),
    "three dimensions": ("3 dimensions", gguf(tensors=[tensor(HALF_A, (2, 2, 2), 0), TENSORS[1]])),
    "a model": ("whole model", gguf(without(1))),
    "an adapter of another kind": ("adapter.type", gguf([*without(2), key("adapter.type", 8, text("ia3"))])),
    "no architecture": ("architecture", gguf(without(0))),
    "an alpha of NaN": ("alpha", gguf([*without(3), key("adapter.lora.alpha", 6, struct.pack("<f", float("nan")))])),
    "an alpha that is a text": ("alpha", gguf([*without(3), key("adapter.lora.alpha", 8, text("8"))])),
    "half of a pair": ("lacks its half", gguf(tensors=TENSORS[:1], data=DATA[:32])),
    "an unpaired tensor": ("not one half", gguf(tensors=[TENSORS[0], tensor("blk.0.attn_q.weight", (2, 4), 32)])),
    "a bias": ("bias", gguf(tensors=[TENSORS[0], tensor("blk.0.attn_q.bias", (2, 4), 32)])),
    "halves of two ranks": ("ranks", gguf(tensors=[TENSORS[0], tensor(HALF_B, (4, 2), 32)])),
    "a NaN": ("NaN", gguf(data=numbers(float("nan")))),
    "only zeros": ("are zero", gguf(data=bytes(64))),
    "invocation tokens below 0": ("invocation", gguf([*KEYS, TOKENS_BELOW])),
}  # fmt: skip


class TestGguf:
    @pytest.mark.parametrize("kind", list(GGUFS))
    def test_malformed_file_is_refused(self, place: Place, kind: str) -> None:
        reason, data = GGUFS[kind]
        path = place.folder / "given.gguf"
        path.write_bytes(data)
        refused(place, path, reason)

    def test_sample_is_valid(self, place: Place) -> None:
        path = place.folder / "given.gguf"
        path.write_bytes(gguf())
        assert place.resolve(path).scale == 2.0


class TestTruncated:
    def test_gguf_is_refused(self, place: Place) -> None:
        whole = gguf()
        path = place.folder / "given.gguf"
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(AdapterInvalid):
                place.resolve(path)

    def test_safetensors_is_refused(self, place: Place) -> None:
        whole = safetensors(GOOD)
        folder = peft(place)
        for length in range(len(whole)):
            (folder / "adapter_model.safetensors").write_bytes(whole[:length])
            with pytest.raises(AdapterInvalid):
                place.resolve(folder)


SETTINGS = json.dumps(CONFIG).encode()
ACCIDENTS: dict[str, tuple[dict[str, bytes], str, str]] = {
    "a pointer as a GGUF file": ({"a.gguf": POINTER}, "Git LFS pointer", "git lfs pull"),
    "checkpoints only": (
        {f"checkpoint-{step}/adapter_config.json": SETTINGS for step in (9, 100, 50)},
        "its checkpoints do",
        "checkpoint-100`",
    ),
    "an adapter in a folder": ({"final/adapter_config.json": SETTINGS}, "folders in it do", "final`"),
    "steps of mlx-lm": (
        {"adapter_config.json": b"{}", "0000100_adapters.safetensors": b"x", "0000200_adapters.safetensors": b"x"},
        "the last is `0000200_adapters",
        "`adapters.safetensors`",
    ),
    "weights in parts": (
        {
            "adapter_config.json": SETTINGS,
            "adapter_model-00001-of-00002.safetensors": b"x",
            "adapter_model-00002-of-00002.safetensors": b"x",
            "adapter_model.safetensors.index.json": b"{}",
        },
        "in parts, the first is `adapter_model-00001",
        "`adapter_model.safetensors`",
    ),
    "a whole model": ({"config.json": b"{}", "model.safetensors": b"x"}, "whole model", "as the model"),
    "an old whole model": ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "whole model", "as the model"),
    "weights alone": ({"adapter_model.safetensors": b"x"}, "missing beside", "into the folder"),
    "a configuration alone": ({"adapter_config.json": SETTINGS}, "no adapter", "adapter_model.safetensors"),
}


class TestFiles:
    def test_pickles_are_named_not_opened(self, place: Place) -> None:
        folder = place.folder / "given"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        for name in ("adapter_model.bin", "adapters.npz"):
            (folder / name).write_bytes(pickle.dumps({"a": 1}))
            assert "safetensors" in str(refused(place, folder, name))
            (folder / name).unlink()

    def test_numpy_archive_is_refused(self, place: Place) -> None:
        path = place.folder / "adapters.safetensors"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.npy", bytes(1000))
        refused(place, path, "pickle or a NumPy archive")

    def test_size_limit_precedes_reading(self, place: Place) -> None:
        folder = peft(place)
        weights = folder / "adapter_model.safetensors"
        os.truncate(weights, 1 << 40)  # Sparse: it takes no space.
        assert "GRAFTAGE_LORA_MAX_BYTES" in str(refused(place, folder, "are allowed"))
        (folder / "adapter_config.json").write_bytes(b" " * (2 << 20))
        weights.write_bytes(safetensors(GOOD))
        assert "GRAFTAGE_LORA_MAX_BYTES" not in str(refused(place, folder, "are allowed"))

    def test_coarse_types_are_limited_as_decoded(self, place: Place) -> None:
        path = place.folder / "coarse.gguf"
        size = 1024 * 54  # A block of TQ1_0 for each of 1024 rows.
        tensors = [tensor(HALF_A, (256, 1024), 0, kind=34), tensor(HALF_B, (1024, 4), size)]
        path.write_bytes(gguf(tensors=tensors, data=b"\1" * (size + 1024 * 16)))
        assert place.resolve(path).facts.shapes[0].rank == 1024
        reason = "1,048,576 bytes as F32; at most 100,000 are allowed"
        assert "GRAFTAGE_LORA_MAX_BYTES" in str(refused(place, path, reason, max_bytes=100_000))

    def test_oversized_head_is_refused(self, place: Place) -> None:
        folder = peft(place)
        length = (4 << 20) + 1
        (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}".ljust(length) + DATA)
        refused(place, folder, f"its head states a length of {length} bytes")

    def test_change_while_open_is_noticed(self, tmp_path: Path) -> None:
        from graftage_lora._files import CheckedFile

        path = tmp_path / "base.gguf"
        for change in (lambda: path.write_bytes(DATA + b"x"), lambda: os.utime(path, ns=(1, 1))):
            path.write_bytes(DATA)
            with CheckedFile(path) as file:
                assert file.unchanged()
                change()
                assert not file.unchanged()

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
    def test_pipe_is_refused_at_once(self, place: Place) -> None:
        folder = peft(place)
        (folder / "adapter_model.safetensors").unlink()
        os.mkfifo(folder / "adapter_model.safetensors")
        refused(place, folder, "not a regular file")

    def test_folder_instead_of_file_is_refused(self, place: Place) -> None:
        folder = peft(place)
        (folder / "adapter_model.safetensors").unlink()
        (folder / "adapter_model.safetensors").mkdir()
        refused(place, folder, "regular file|cannot be opened")

    def test_circular_link_is_refused(self, place: Place) -> None:
        folder = peft(place)
        (folder / "adapter_model.safetensors").unlink()
        (folder / "adapter_model.safetensors").symlink_to("adapter_model.safetensors")
        with pytest.raises(AdapterInvalid, match=r"circular link|cannot be opened|symbolic links"):
            place.resolve(folder)

    @pytest.mark.parametrize("what", list(ACCIDENTS))
    def test_accident_leads_to_way_out(self, place: Place, what: str) -> None:
        files, reason, way_out = ACCIDENTS[what]
        for name, data in files.items():
            path = place.folder / "given" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        error = refused(place, place.folder / "given", reason)
        assert way_out in str(error.hint)

    def test_empty_folder_says_what_was_expected(self, place: Place) -> None:
        (place.folder / "given").mkdir()
        error = refused(place, place.folder / "given", "no adapter")
        assert "adapter_config.json" in str(error)

    def test_model_beside_adapter_is_ignored(self, place: Place) -> None:
        folder = place.folder / "given"
        write_gguf(folder / "adapter.gguf", place.model, pairs(place.model))
        place.model.write(folder / "model.gguf")
        assert place.resolve(folder).facts.layout == "gguf"
        write_gguf(folder / "second.gguf", place.model, pairs(place.model))
        refused(place, folder, r"adapter\.gguf, second\.gguf")


# --- Fuzzing ---------------------------------------------------------------------------------------------------------

FUZZED = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
EDITS = st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 3), st.binary(min_size=1, max_size=9)), max_size=6)


def edited(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Overwrite, insert, remove or repeat some bytes."""
    for position, way, new in edits:
        at = position % (len(data) + 1)
        before, after = data[:at], data[at:]
        data = [
            before + new + after[len(new) :],
            before + new + after,
            before + after[len(new) :],
            before + after[: len(new)] * 2 + after[len(new) :],
        ][way]
    return data


def survives(place: Place, path: Path) -> None:
    """Check that an adapter is either found or refused."""
    try:
        found = place.resolve(path)
    except AdapterInvalid:
        return
    assert found.digest.startswith("sha256:")
    assert found.verdict.status in ("compatible", "incompatible", "unknown")


@pytest.fixture(scope="module")
def small() -> dict[str, bytes]:
    """Return the files to edit."""
    return {"gguf": gguf(), "weights": safetensors(GOOD), "config": json.dumps(CONFIG).encode()}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from(
    [
        A,
        B,
        f"{MODULE}.base_layer.weight",
        "lm_head.weight",
        f"{MODULE}.lora_a",
        f"{MODULE}.lora_b",
        "lora_A",
        "__metadata__",
    ]
) | st.text(max_size=12)
FUZZED_KEYS = ("lora_parameters", "fine_tune_type", "rank_pattern", "alpha_pattern", "target_modules", "num_layers")
FIELDS = st.sampled_from(["dtype", "shape", "data_offsets"]) | st.text(max_size=4)


class TestFuzz:
    @FUZZED
    @given(edits=EDITS)
    def test_edited_gguf(self, tmp_path: Path, small: dict[str, bytes], edits: Any) -> None:
        path = tmp_path / "given.gguf"
        path.write_bytes(edited(small["gguf"], edits))
        survives(Place(tmp_path), path)

    @FUZZED
    @given(weights=EDITS, config=EDITS)
    def test_edited_peft(self, tmp_path: Path, small: dict[str, bytes], weights: Any, config: Any) -> None:
        (tmp_path / "adapter_model.safetensors").write_bytes(edited(small["weights"], weights))
        (tmp_path / "adapter_config.json").write_bytes(edited(small["config"], config))
        survives(Place(tmp_path), tmp_path)

    @FUZZED
    @given(
        head=st.dictionaries(NAMES, st.dictionaries(FIELDS, JSON, max_size=4) | JSON, max_size=4),
        config=st.dictionaries(st.sampled_from([*CONFIG, *FUZZED_KEYS]), JSON),
        data=st.binary(max_size=80),
    )
    def test_any_json(self, tmp_path: Path, head: Any, config: Any, data: bytes) -> None:
        (tmp_path / "adapter_model.safetensors").write_bytes(safetensors(head, data))
        (tmp_path / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}), encoding="utf-8")
        survives(Place(tmp_path), tmp_path)

    @FUZZED
    @given(
        data=st.binary(max_size=200),
        start=st.sampled_from([b"", b"GGUF\x03\x00\x00\x00", b"GGUF", b"\x80\x02", b"PK\x03\x04"]),
    )
    def test_any_bytes(self, tmp_path: Path, data: bytes, start: bytes) -> None:
        path = tmp_path / "given.gguf"
        path.write_bytes(start + data)
        survives(Place(tmp_path), path)

    @FUZZED
    @given(edits=EDITS)
    def test_edited_head_of_trained_adapter(self, tmp_path: Path, edits: Any) -> None:
        source = (LORA / "ahoy-lora.f16.gguf").read_bytes()
        path = tmp_path / "given.gguf"
        path.write_bytes(edited(source[:12_000], edits) + source[12_000:])
        survives(Place(tmp_path, Model(layers=30, hidden=576, heads=9, shared=3, width=64, feed_forward=1536)), path)


def test_reasons_hide_numbers(place: Place) -> None:
    error = refused(place, peft(place, safetensors(GOOD, numbers(float("nan"), 123.456))), "NaN")
    assert "123.4" not in str(error)


def builders() -> dict[str, Callable[..., Path]]:
    return {"peft": write_peft, "mlx": write_mlx}


@pytest.mark.parametrize("layout", list(builders()))
def test_scale_bounds_hold_in_each_layout(place: Place, layout: str) -> None:
    folder = builders()[layout](place.folder / layout, pairs(place.model, scale=1e20))
    refused(place, folder, "scale")
