"""The one form every layout is read into, and what the architectures differ in.

An adapter changes a weight W to W + scale * B @ A. Weights are named as GGUF names them, since that is what every
server of ours holds; the rows of B are in the order of the layout they were read from until `rows` reorders them.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np

from graftage_lora._files import Refused

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["ARCHITECTURES", "Array", "Facts", "Lora", "Part", "Shape", "gguf_name", "heads", "is_placed", "layer_of"]

Array: TypeAlias = "npt.NDArray[Any]"

ARCHITECTURES: Final[Mapping[str, bool]] = {
    "llama": True,
    "qwen2": False,
    "qwen3": False,
    "gemma2": False,
    "gemma3": False,
}
"""Architectures whose modules can be placed; true where GGUF reorders the rows of q and k.

Those files turn pairs of neighbouring numbers by one angle, and the original weights pair each number with the one half
a head away. llama.cpp's converter therefore reorders the rows within each head (`LlamaModel.permute`).
"""

SCALES: Final = (1e-9, 1e9)
"""A scale outside of these is a mistake, and its product with a number of the adapter might be no F32."""
MODULES: Final[Mapping[str, str]] = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
EMBEDDING: Final = "token_embd.weight"
OUTPUT: Final = "output.weight"
ENDS: Final[Mapping[str, str]] = {"model.embed_tokens": EMBEDDING, "embed_tokens": EMBEDDING, "lm_head": OUTPUT}
LAYER: Final = re.compile(r"(?:model\.)?layers\.(\d{1,5})\.([a-z_.]+)")
PLACED: Final = re.compile(r"blk\.(\d{1,5})\.([a-z0-9_]+)\.weight|token_embd\.weight|output\.weight")


def gguf_name(module: str) -> str:
    """The GGUF name of a module's weight, or the module's own name where the table does not have it."""
    if module in ENDS:
        return ENDS[module]
    match = LAYER.fullmatch(module)
    if match and match[2] in MODULES:
        return f"blk.{int(match[1])}.{MODULES[match[2]]}.weight"
    return module


def is_placed(tensor: str) -> bool:
    """Whether a name is a GGUF name."""
    return PLACED.fullmatch(tensor) is not None


def layer_of(tensor: str) -> int | None:
    """The layer a tensor belongs to; `None` for the two ends of a model."""
    match = PLACED.fullmatch(tensor)
    return int(match[1]) if match and match[1] else None


def kind_of(tensor: str) -> str:
    """A tensor's name without its layer: `attn_q`."""
    match = PLACED.fullmatch(tensor)
    return match[2] if match and match[2] else tensor.removesuffix(".weight")


def heads(metadata: Mapping[str, Any], tensor: str) -> int | None:
    """How many heads the rows of a tensor are divided into; `None` where it is not told."""
    architecture = metadata.get("general.architecture")
    count = metadata.get(f"{architecture}.attention.head_count")
    if kind_of(tensor) == "attn_k":
        count = metadata.get(f"{architecture}.attention.head_count_kv", count)
    return per_layer(count, layer_of(tensor))


def per_layer(figure: Any, layer: int | None) -> int | None:
    """A figure that some models state once and some for each layer."""
    if isinstance(figure, (list, tuple)):
        figure = figure[layer] if layer is not None and layer < len(figure) else None
    return figure if isinstance(figure, int) and not isinstance(figure, bool) and figure > 0 else None


def is_reordered(architecture: str | None, tensor: str) -> bool:
    """Whether GGUF files of the architecture hold the rows of this tensor in another order than the original."""
    return ARCHITECTURES.get(architecture or "", False) and kind_of(tensor) in ("attn_q", "attn_k")


def reorder(rows: Array, count: int) -> Array:
    """Rows of a llama's q or k from the original order into GGUF's, as llama.cpp's `LlamaModel.permute` does it."""
    found: Array = rows.reshape(count, 2, len(rows) // count // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
    return found


def restore(rows: Array, count: int) -> Array:
    """The inverse of `reorder`."""
    found: Array = rows.reshape(count, len(rows) // count // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
    return found


def checked_scale(scale: float) -> float:
    """A scale that may be used.

    Raises:
        Refused: it is outside of `SCALES`.
    """
    if not SCALES[0] <= abs(scale) <= SCALES[1]:
        raise Refused(f"its scale is {scale:g}, which no training gives")
    return scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A part without its numbers."""

    tensor: str
    inputs: int
    outputs: int
    rank: int
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """The change of one weight: `scale * b @ a`."""

    tensor: str
    a: Array
    """Rank by inputs."""
    b: Array
    """Outputs by rank."""
    scale: float

    @property
    def shape(self) -> Shape:
        """Its figures."""
        (rank, inputs), outputs = self.a.shape, len(self.b)
        return Shape(tensor=self.tensor, inputs=inputs, outputs=outputs, rank=rank, scale=self.scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All of an adapter but its numbers: cheap to keep."""

    layout: Literal["peft", "mlx", "gguf"]
    shapes: tuple[Shape, ...]
    sha256: str
    """Of the file with the weights."""
    architecture: str | None = None
    """As a GGUF adapter states it; the others do not."""
    base_model: str | None = None
    """The model it was trained on, in its author's words."""
    invocation: tuple[int, ...] = ()
    """Tokens after which it acts ("activated LoRA"); none for one that always acts."""
    warnings: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """The scale of most of its parts."""
        return Counter(each.scale for each in self.shapes).most_common(1)[0][0]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lora:
    """An adapter in memory."""

    facts: Facts
    parts: tuple[Part, ...]
    """Sorted by tensor."""

    def scaled(self, scale: float) -> Lora:
        """The same with another scale for all of it.

        Raises:
            Refused: the scale is 0, or beyond what any training gives.
        """
        checked_scale(scale)
        shapes = tuple(replace(each, scale=scale) for each in self.facts.shapes)
        parts = tuple(replace(each, scale=scale) for each in self.parts)
        return Lora(facts=replace(self.facts, shapes=shapes), parts=parts)

    def rows(self, part: Part, metadata: Mapping[str, Any]) -> Array:
        """B with its rows as a GGUF base model with that metadata has them.

        Raises:
            Refused: the metadata does not tell enough.
        """
        stated = metadata.get("general.architecture")
        if self.facts.layout == "gguf" or not is_reordered(stated, part.tensor):
            return part.b
        return reorder(part.b, _divisor(part, metadata))

    def digest(self, metadata: Mapping[str, Any]) -> str:
        """`sha256:…` over the content that acts: names, scales, and the numbers as F32, rows in the original order.

        One adapter has one digest in each layout and float type, as long as the type holds its numbers exactly. Only
        the base model tells how a GGUF adapter for a llama ordered its rows: without it, that one's digest differs.
        """
        found = hashlib.sha256(b"graftage-lora 1\n")
        found.update(f"{self.facts.invocation}\n".encode())
        for part in self.parts:
            rows, order = self._original(part, metadata)
            found.update(f"{part.tensor} {part.a.shape} {part.b.shape} {part.scale:.6g} {order}\n".encode())
            for data in (part.a, rows):
                found.update(np.ascontiguousarray(data, "<f4").data)
        return f"sha256:{found.hexdigest()}"

    def _original(self, part: Part, metadata: Mapping[str, Any]) -> tuple[Array, str]:
        if self.facts.layout != "gguf" or not is_reordered(self.facts.architecture, part.tensor):
            return part.b, ""
        try:
            return restore(part.b, _divisor(part, metadata)), ""
        except Refused:
            return part.b, "reordered"


def _divisor(part: Part, metadata: Mapping[str, Any]) -> int:
    count = heads(metadata, part.tensor)
    if count is None:
        raise Refused(f"the base model does not tell how many heads `{part.tensor}` has")
    if len(part.b) % (2 * count):
        raise Refused(f"`{part.tensor}` has {len(part.b)} rows, which {count} heads cannot share")
    return count
