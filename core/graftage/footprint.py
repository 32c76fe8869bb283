"""Estimate the memory of a model from the metadata of its file.

    F(window, slots) = weights + projector + attention cache + recurrent state + compute buffers + runtime

The terms come from llama.cpp and Ollama's planner; each function names its source. Estimates are rather too high: that
costs a smaller window, while an estimate that is too low can freeze a computer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from graftage._records import dataclass
from graftage.gguf import BLOCKS

if TYPE_CHECKING:
    from graftage.types import ModelInfo

__all__ = [
    "BITS",
    "KV_BYTES",
    "MOST_NUMBER",
    "RUNTIME",
    "Footprint",
    "KVType",
    "Layer",
    "Shape",
    "count_of",
    "footprint",
    "read_shape",
]

MIB: Final = 1 << 20
GIB: Final = 1 << 30
KVType: TypeAlias = Literal["f16", "q8_0", "q4_0"]


def _width(kind: str) -> float:
    """Return the bytes of one number of a type, with its share of the block's scales."""
    entries, size = BLOCKS[kind]
    return size / entries


KV_BYTES: Final[Mapping[KVType, float]] = {"f16": _width("F16"), "q8_0": _width("Q8_0"), "q4_0": _width("Q4_0")}
"""Bytes of one number in the cache."""
BATCH: Final = 512
"""Tokens of a prompt computed at once: the default of llama.cpp (`n_ubatch`) and Ollama (`num_batch`)."""
SMALLEST_CACHE: Final = 2048
"""Cells: the least that Ollama 0.9.3 counts for a model, measured at windows of 512 to 2048."""
PADDING: Final = 256
"""Cells to which llama.cpp rounds the cache of a sliding window."""
PROJECTOR_WORK: Final = GIB
"""Ollama's `mmprojOffloadHeadroom`: memory to process an image, besides the projector's weights."""
RUNTIME: Final = 300 * MIB
"""The runner's own memory and Metal's. Ollama's planner up to 0.24 counted 457 to 512 MiB here on a GPU, 0 on a CPU."""
MARGIN: Final = 0.05
"""A share of the sum, for what the formulas leave out."""
ASSUMED_VOCABULARY: Final = 262_144
"""The largest vocabulary in wide use (Gemma): an upper bound if the file does not state it."""

BITS: Final[Mapping[str, float]] = {kind: 8 * _width(kind) for kind in BLOCKS} | {
    "F16": 16.0005,
    "BF16": 16.0005,
    "Q8_0": 8.5008,
    "Q6_K": 6.5633,
    "Q5_K_M": 5.7036,
    "Q5_K_S": 5.5704,
    "Q4_K_M": 4.8944,
    "Q4_K_S": 4.6672,
    "Q4_0": 4.6672,
    "Q3_K_L": 4.2979,
    "Q3_K_M": 3.996,
    "Q3_K_S": 3.6429,
    "Q2_K": 3.1593,
    "Q2_K_S": 2.9697,
    "IQ4_NL": 4.6818,
    "IQ4_XS": 4.4597,
    "IQ3_M": 3.7628,
    "IQ3_S": 3.6606,
    "IQ3_XS": 3.4977,
    "IQ3_XXS": 3.2548,
    "IQ2_M": 2.9294,
    "IQ2_S": 2.7403,
    "IQ2_XS": 2.5882,
    "IQ2_XXS": 2.3824,
    "IQ1_M": 2.146,
    "IQ1_S": 2.0042,
    "FP8": 8.0,
    "FLOAT32": 32.0,
    "FLOAT16": 16.0005,
    "BFLOAT16": 16.0005,
}
"""Bits for each weight of a whole file: the table in llama.cpp's `tools/quantize/README.md`, else the block's size.

Full precision also has torch's names.
"""
UNKNOWN_WEIGHTS: Final = 1.25
"""Factor for weights estimated from the number of parameters: tables and projectors have a higher precision. Measured:
1.17 for smollm2:135m, 1.24 for gpt-oss:20b, 1.25 for gemma3:4b, and hardly above 1 for most."""
LEAST_BITS: Final = 1
"""Bits of each weight: a listed size below this is not that of the weights, as for a model that runs elsewhere."""

CACHE_BY_SIZE: Final[tuple[tuple[float, int], ...]] = ((6e9, 144), (12e9, 160), (30e9, 256), (float("inf"), 320))
"""KiB of cache for each token by bytes of weights: the largest among the common models of each class, at f16."""

SLIDING_EVERY: Final[Mapping[str, int]] = {"gemma3": 6, "gemma3n": 5, "gemma2": 2, "gptoss": 2, "gpt-oss": 2}
"""If the file has no pattern, every n-th layer sees the whole window; the others have a sliding one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The memory of one layer."""

    cell: int = 0
    """Numbers for each token: heads times (key length plus value length); 0 without attention."""
    window: int = 0
    """Tokens that it looks back at; 0 for all."""
    state: int = 0
    """Bytes for each sequence of any length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The properties of a model that determine its footprint and speed."""

    weights: int
    """Bytes."""
    layers: tuple[Layer, ...] | None = None
    """`None` if the file does not state them; then the cache is estimated from the size of the weights."""
    embedding: int = 4096
    heads: int = 32
    vocabulary: int = ASSUMED_VOCABULARY
    trained_window: int | None = None
    parameters: int | None = None
    bits: float | None = None
    """For each weight: from its type, else from size and parameters."""
    estimated: bool = False
    """Whether the size of the weights is estimated from parameters and type."""
    vision: bool = False
    embeds: bool = False
    """Whether it is an embedding model: its batch is its window, and it has one slot."""
    mlx: bool = False
    """Whether it runs on MLX, whose prefill takes far more memory for a moment."""
    active: float = 1.0
    """The share of the weights that one token reads."""
    notes: tuple[str, ...] = ()
    """The assumptions behind the figures."""
    odd: tuple[str, ...] = ()
    """Keys with impossible values, which are ignored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes in memory, by purpose."""

    weights: int
    projector: int
    cache: int
    state: int
    compute: int
    margin: int
    runtime: int = RUNTIME
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def counted(self) -> int:
        """What a server counts as the size of the model: everything except for the runner."""
        return self.weights + self.projector + self.cache + self.state + self.compute + self.margin

    @property
    def total(self) -> int:
        """Everything."""
        return self.counted + self.runtime


def footprint(
    shape: Shape,
    window: int,
    *,
    slots: int = 1,
    kv_type: KVType = "f16",
    flash_attention: bool = True,
    batch: int = BATCH,
) -> Footprint:
    """Return the footprint of a model with a window, in a server with some parallel slots.

    Args:
        shape: the model.
        window: tokens of one slot.
        slots: the server's parallel slots, each with its own window.
        kv_type: the quantization of the cache.
        flash_attention: whether the server uses it; without it, the compute buffers grow with the window.
        batch: tokens computed at once.
    """
    slots = 1 if shape.embeds else max(slots, 1)
    cache = _cache(shape, window, slots, batch) * KV_BYTES[kv_type]
    state = sum(layer.state for layer in shape.layers or ()) * slots
    compute = _compute(shape, window * slots, batch, flash_attention=flash_attention)
    projector = PROJECTOR_WORK if shape.vision else 0
    margin = MARGIN * (shape.weights + projector + cache + state + compute)
    if shape.layers is None:
        # An upper bound if only the size is known: 15 % of the weights and a gigabyte.
        margin += 0.10 * shape.weights + GIB
    return Footprint(
        weights=shape.weights,
        projector=projector,
        cache=int(cache),
        state=state,
        compute=compute,
        margin=int(margin),
        notes=shape.notes,
    )


def _cache(shape: Shape, window: int, slots: int, batch: int) -> int:
    """Return the numbers in the attention cache (llama.cpp's `llama_kv_cache`; sliding windows: September 2025)."""
    cells = max(window * slots, SMALLEST_CACHE)
    if shape.layers is None:
        kib = next(kib for below, kib in CACHE_BY_SIZE if shape.weights < below)
        return cells * kib * 1024 // 2
    total = 0
    for layer in shape.layers:
        if layer.window:
            slid = min(window, -(-(layer.window + batch) // PADDING) * PADDING)
            total += min(slots * slid, cells) * layer.cell
        else:
            total += cells * layer.cell
    return total


def _compute(shape: Shape, cells: int, batch: int, *, flash_attention: bool) -> int:
    """Return the bytes of the compute buffers.

    With flash attention: the logits and activations of a batch, and the mask. This gives 299.75 MiB (llama.cpp#11083
    printed 299.75) and 398 MiB (llama.cpp#17609 printed 404). Without it: Ollama's graph of the llama family
    (`fs/ggml`, `GraphSize`). This gives 2145 MiB (a log of codegeex4 at 32k printed 2.1 GiB).
    """
    if shape.embeds:
        return 4 * cells * shape.embedding * 8  # Queries, keys, values and the wide middle layer; no logits.
    logits = 4 * batch * (shape.vocabulary + shape.embedding)
    if flash_attention:
        return logits + 2 * batch * cells
    return max(4 * batch * (1 + 4 * shape.embedding + cells * (1 + shape.heads)), logits)


# --- Reading a model -------------------------------------------------------------------------------------------------


MOST_BYTES: Final = 1 << 50
"""No model is larger."""
MOST_NUMBER: Final = 1 << 24
"""No window, vocabulary or width of a layer is larger. The longest window in use has 10 million tokens."""
MOST_LAYERS: Final = 4096
LEAST_TRAINED: Final = 64
"""Every model was trained for more tokens."""


def count_of(value: object, most: int = MOST_BYTES) -> int | None:
    """Return a number that can be a count: not negative, and not too large for a model; else None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= most:
        return int(value)
    return None


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


class _Keys:
    """The metadata of a GGUF file, by keys without the architecture's name. Nothing in it is trusted."""

    def __init__(self, metadata: Mapping[str, object], architecture: str) -> None:
        self._metadata = metadata
        self._prefix = architecture or str(metadata.get("general.architecture") or "")
        self.odd: dict[str, None] = {}
        """Keys with impossible values, in the order in which they were found."""

    def has(self, key: str) -> bool:
        return f"{self._prefix}.{key}" in self._metadata

    def value(self, key: str) -> Any:
        return self._metadata.get(f"{self._prefix}.{key}")

    def checked(self, key: str, value: object, most: int = MOST_NUMBER) -> int | None:
        """Return a count, or None. A value that is not a count is noted as odd."""
        count = count_of(value, most)
        if count is None and value is not None:
            self.odd[key] = None
        return count

    def number(self, key: str, most: int = MOST_NUMBER) -> int | None:
        """Return a count; of an array, the largest."""
        value = self.value(key)
        if _is_list(value):
            numbers = [each for each in (self.checked(key, each, most) for each in value) if each is not None]
            return max(numbers, default=None)
        return self.checked(key, value, most)

    def each(self, key: str, layers: int) -> list[int] | None:
        """Return a count for each layer, from one number or an array; `None` if there is none."""
        value = self.value(key)
        if _is_list(value):
            numbers = [self.checked(key, each) for each in value[:layers]]
            if not numbers or any(each is None for each in numbers):
                return None
            known = [each or 0 for each in numbers]
            return known + [max(known)] * (layers - len(known))
        one = self.checked(key, value)
        return None if one is None else [one] * layers


def read_shape(info: ModelInfo, size: int | None = None) -> Shape | None:
    """Read the shape of a model from its provider's information; `None` if not even its size is known.

    Args:
        info: the result of `show_model`, with arrays.
        size: bytes of the weights from a list of models. They are measured, so they win over those in `info`.
    """
    keys = _Keys(info.metadata, _text(info.architecture))
    parameters = keys.checked("parameters", info.metadata.get("general.parameter_count"), MOST_BYTES)
    parameters = parameters or keys.checked("parameters", _parse_count(info.parameters), MOST_BYTES)
    bits = BITS.get(_text(info.quantization).upper())
    weights, notes = _weights(info, keys, parameters, bits, size)
    if not weights:
        return None
    estimated = bool(notes)
    layers = _layers(keys, _text(info.architecture))
    if layers is None:
        notes = (*notes, "the cache is estimated from the file's size: the layers of the model are unknown")
    features = info.features or frozenset()
    return Shape(
        weights=weights,
        layers=layers,
        embedding=keys.number("embedding_length") or 4096,
        heads=keys.number("attention.head_count") or 32,
        vocabulary=_vocabulary(info, keys) or ASSUMED_VOCABULARY,
        trained_window=_trained(keys, info),
        parameters=parameters,
        # For safetensors models Ollama reports half of their bytes as parameters.
        bits=bits or (weights * 8 / parameters if parameters and not _is_mlx(info) else None),
        estimated=estimated,
        vision="images" in features,
        embeds=keys.value("pooling_type") is not None or features == {"embed"},
        mlx=_is_mlx(info),
        active=_active(info, keys),
        notes=notes,
        odd=tuple(keys.odd),
    )


def _vocabulary(info: ModelInfo, keys: _Keys) -> int | None:
    stated = keys.number("vocab_size") or _length(info.metadata.get("tokenizer.ggml.tokens"))
    table = (info.tensors or {}).get("token_embd.weight") or (None,)
    return stated or keys.checked("token_embd.weight", table[-1])


def _trained(keys: _Keys, info: ModelInfo) -> int | None:
    trained = keys.number("context_length") or keys.checked("context_length", info.context_window, MOST_NUMBER)
    if trained is not None and trained < LEAST_TRAINED:
        keys.odd["context_length"] = None
        return None
    return trained


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _weights(
    info: ModelInfo, keys: _Keys, parameters: int | None, bits: float | None, size: int | None
) -> tuple[int | None, tuple[str, ...]]:
    elements = keys.checked("tensors", sum(map(_product, (info.tensors or {}).values())), MOST_BYTES) or parameters
    listed = keys.checked("size", size, MOST_BYTES)
    if listed and listed * 8 < (elements or 0) * LEAST_BITS:
        keys.odd["size"] = None
        listed = None
    if known := listed or keys.checked("size", info.size, MOST_BYTES):
        return known, ()
    if info.path is not None:
        try:
            return info.path.stat().st_size, ()
        except (OSError, ValueError):
            pass
    if not elements or not bits:
        # An unknown type may have 1 bit or 32, and a wrong number would be worse than none.
        return None, ()
    note = f"the weights are estimated from {elements / 1e9:.1f} billion parameters of {bits:.1f} bits"
    return int(elements * bits / 8 * UNKNOWN_WEIGHTS), (note,)


def _product(shape: Sequence[int]) -> float:
    """Return the elements of a tensor; infinity if the number is impossible."""
    counts = [count_of(each) for each in shape]
    total = math.prod(each or 0 for each in counts)
    return float("inf") if None in counts or total > MOST_BYTES else total


_COUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMBT])\s*", re.IGNORECASE)


def _parse_count(text: str | None) -> float | None:
    """Read a number of parameters such as `134.52M`; hundreds of digits give infinity."""
    found = _COUNT.fullmatch(_text(text))
    if not found:
        return None
    return float(found[1]) * {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[found[2].upper()]


def _length(value: Any) -> int | None:
    return len(value) if _is_list(value) else None


def _is_mlx(info: ModelInfo) -> bool:
    details = info.raw.get("details")
    kind = details.get("format") if isinstance(details, Mapping) else None
    return kind == "safetensors" or "-mlx" in info.name.lower()


def _active(info: ModelInfo, keys: _Keys) -> float:
    """Return the share of the weights that one token reads: in a mixture of experts, only the chosen ones count."""
    count, used = keys.number("expert_count"), keys.number("expert_used_count")
    if not count or not used:
        return 1.0
    tensors = info.tensors or {}
    everything = count_of(sum(map(_product, tensors.values())))
    experts = sum(_product(shape) for name, shape in tensors.items() if "_exps" in name)
    share = experts / everything if everything else 0.95  # gpt-oss:20b 0.91, qwen3:30b-a3b 0.95
    return 1 - share * (1 - min(used / count, 1))


def _layers(keys: _Keys, architecture: str) -> tuple[Layer, ...] | None:
    """Return the layers, or `None` if the file does not state enough."""
    count = keys.number("block_count", MOST_LAYERS)
    heads = _kv_heads(keys, count) if count else None
    if not count or heads is None:
        return None
    global_length = _head_length(keys, "") if any(heads) else 0
    sliding_length = _head_length(keys, "_swa") or global_length
    if global_length is None or sliding_length is None:
        return None
    state = _recurrent_state(keys)
    if not any(heads) and not state:
        return None  # Every model has attention or a state, so the figures are wrong.
    attends = _attention(keys, heads, recurrent=bool(state))
    keeps = count - (keys.number("attention.shared_kv_layers") or 0)
    windows = _windows(keys, architecture, count)
    # In a hybrid, layers with attention get a state too: some have both, and the sum is an upper bound.
    return tuple(
        Layer(
            cell=heads[place] * (sliding_length if window else global_length)
            if attends[place] and place < keeps
            else 0,
            window=window,
            state=state,
        )
        for place, window in enumerate(windows)
    )


def _kv_heads(keys: _Keys, layers: int) -> list[int] | None:
    """Return the heads of keys and values in each layer. If the key is missing, GGUF means as many as of queries.

    A key without a value is one that the provider left out.
    """
    left_out = not keys.has("attention.head_count_kv")
    return keys.each("attention.head_count" if left_out else "attention.head_count_kv", layers)


def _head_length(keys: _Keys, suffix: str) -> int | None:
    """Return the numbers in a key and a value of one head; with MLA, files state the small or the large ones."""
    key, value = keys.number(f"attention.key_length{suffix}"), keys.number(f"attention.value_length{suffix}")
    if key and value:
        return key + value
    if suffix:
        return None
    embedding, heads = keys.number("embedding_length"), keys.number("attention.head_count")
    if not embedding or not heads:
        return None
    return (key or embedding // heads) + (value or embedding // heads)


def _recurrent_state(keys: _Keys) -> int:
    """Return the bytes of one recurrent layer for one sequence, in f32 (llama.cpp's `n_embd_r` and `n_embd_s`)."""
    if short := keys.number("shortconv.l_cache"):
        return (short - 1) * (keys.number("embedding_length") or 0) * 4
    inner, state = keys.number("ssm.inner_size"), keys.number("ssm.state_size")
    if not inner or not state:
        return 0
    kernel, groups = keys.number("ssm.conv_kernel") or 1, keys.number("ssm.group_count") or 0
    return (max(kernel - 1, 0) * (inner + 2 * groups * state) + state * inner) * 4


def _attention(keys: _Keys, heads: list[int], *, recurrent: bool) -> list[bool]:
    """Return which layers have attention: those with heads, or every n-th layer of a hybrid."""
    every = keys.number("full_attention_interval")
    if every and recurrent and min(heads) > 0:
        return [(place + 1) % every == 0 for place in range(len(heads))]
    return [each > 0 for each in heads]


def _windows(keys: _Keys, architecture: str, count: int) -> Iterator[int]:
    """Yield the window of each layer; 0 for one that sees everything."""
    window = keys.number("attention.sliding_window") or 0
    pattern = keys.value("attention.sliding_window_pattern")
    every = SLIDING_EVERY.get(architecture, 0)
    if isinstance(pattern, int) and not isinstance(pattern, bool):
        every, pattern = keys.checked("attention.sliding_window_pattern", pattern, count) or 0, None
    for place in range(count):
        if _is_list(pattern):
            slides = bool(pattern[place]) if place < len(pattern) else False
        else:
            slides = bool(every) and (place + 1) % every != 0
        yield window if slides else 0
