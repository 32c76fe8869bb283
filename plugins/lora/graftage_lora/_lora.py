"""The form that every layout is read into, the differences of architectures, and whether an adapter fits a base model.

An adapter changes a weight W to W + scale * B @ A. Weights have their GGUF names, as in the servers' files. The rows of
B keep the order of the layout that they were read from until `rows` reorders them.

The verdict says whether an adapter can be loaded, not whether it makes sense: all derivatives of one model look alike,
and names are only hints. It compares layers, shapes, tensors and vocabulary of the base model, and the places of
modules in its architecture.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np

from graftage.types import Verdict
from graftage_lora._architectures import (
    ARCHITECTURES,
    EMBEDDING,
    OUTPUT,
    Architecture,
    gguf_name,
    is_placed,
    kind_of,
    layer_of,
    module_name,
    no_row,
    why_misplaced,
)
from graftage_lora._files import Refused
from graftage_lora._names import name_warnings

if TYPE_CHECKING:
    import numpy.typing as npt

    from graftage.types import ModelInfo

__all__ = [
    "STATUSES",
    "Array",
    "Facts",
    "Lora",
    "Part",
    "Shape",
    "Targets",
    "checked_scale",
    "even_scale",
    "head_count",
    "is_reordered",
    "judge",
]

Array: TypeAlias = "npt.NDArray[Any]"

SCALES: Final = (1e-9, 1e9)
"""Bounds of a plausible scale; beyond them, its product with a weight might not fit F32."""
TOLERANCE: Final = 1e-6
"""Relative difference of scales that does not count: GGUF has them as F32."""


def head_count(metadata: Mapping[str, object], tensor: str) -> int | None:
    """Return how many heads the rows of a tensor are divided into; `None` if unknown."""
    architecture = metadata.get("general.architecture")
    count = metadata.get(f"{architecture}.attention.head_count")
    if kind_of(tensor) == "attn_k":
        count = metadata.get(f"{architecture}.attention.head_count_kv", count)
    return per_layer(count, layer_of(tensor))


def per_layer(figure: object, layer: int | None) -> int | None:
    """Return a figure that some models state once and some for each layer."""
    if isinstance(figure, (list, tuple)):
        figure = figure[layer] if layer is not None and layer < len(figure) else None
    return figure if isinstance(figure, int) and not isinstance(figure, bool) and figure > 0 else None


def is_reordered(architecture: str | None, tensor: str) -> bool:
    """Return whether GGUF files of an architecture hold the rows of a tensor in a different order."""
    row = ARCHITECTURES.get(architecture or "")
    return row is not None and row.reordered and kind_of(tensor) in ("attn_q", "attn_k")


def reorder(rows: Array, count: int) -> Array:
    """Reorder rows of a llama's q or k from the original order to GGUF's, as `LlamaModel.permute` of llama.cpp does."""
    found: Array = rows.reshape(count, 2, len(rows) // count // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
    return found


def restore(rows: Array, count: int) -> Array:
    """Reorder rows from GGUF's order to the original one: the inverse of `reorder`."""
    found: Array = rows.reshape(count, len(rows) // count // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
    return found


def even_scale(rows: Array, factor: float) -> Array:
    """Return B times a factor: as F32, unless the factor is 1."""
    return rows if abs(factor - 1) <= TOLERANCE else rows.astype(np.float32) * np.float32(factor)


def checked_scale(scale: float) -> float:
    """Return a scale, or refuse one outside of `SCALES`."""
    if not SCALES[0] <= abs(scale) <= SCALES[1]:
        raise Refused(f"its scale is {scale:g}; it must be from {SCALES[0]:g} to {SCALES[1]:g}")
    return scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A part without its weights."""

    tensor: str
    inputs: int
    outputs: int
    rank: int
    scale: float
    module: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """The change of one tensor: `scale * b @ a`."""

    tensor: str
    a: Array
    """Rank by inputs."""
    b: Array
    """Outputs by rank."""
    scale: float
    module: str = ""
    """Its clean name in the training tool; empty in a GGUF adapter."""

    @property
    def shape(self) -> Shape:
        """The part without its weights."""
        sides = {"inputs": self.a.shape[1], "outputs": len(self.b), "rank": len(self.a)}
        return Shape(tensor=self.tensor, **sides, scale=self.scale, module=self.module)


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The modules that a configuration names."""

    names: tuple[str, ...]
    """Ends of their names in training tools; if empty, the kinds that the adapter has."""
    layers: tuple[int, ...] | range | None = None
    """Only these layers; negative numbers count from the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """An adapter without its weights: cheap to keep."""

    layout: Literal["peft", "mlx", "gguf"]
    shapes: tuple[Shape, ...]
    sha256: str
    """Of the file with the weights."""
    architecture: str | None = None
    """Only GGUF adapters state it."""
    base_model: str | None = None
    """The model that it was trained on, as its author names it."""
    invocation: tuple[int, ...] = ()
    """Tokens after which it acts ("activated LoRA"); empty if it always acts."""
    targets: Targets | None = None
    """What it should contain, if that is known."""
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
        """Return the adapter with one plausible scale for all its parts."""
        parts = tuple(replace(each, scale=checked_scale(scale)) for each in self.parts)
        return Lora(facts=replace(self.facts, shapes=tuple(each.shape for each in parts)), parts=parts)

    def rows(self, part: Part, metadata: Mapping[str, Any]) -> Array:
        """Return B with its rows in the order of a GGUF base model; refuse metadata without the number of heads."""
        stated = metadata.get("general.architecture")
        if self.facts.layout == "gguf" or not is_reordered(stated, part.tensor):
            return part.b
        return reorder(part.b, _heads_of(part, metadata))

    def original_rows(self, part: Part, metadata: Mapping[str, object]) -> Array:
        """Return B with its rows in the order of the original weights; `rows` backwards."""
        if self.facts.layout != "gguf" or not is_reordered(self.facts.architecture, part.tensor):
            return part.b
        return restore(part.b, _heads_of(part, metadata))

    def digest(self, metadata: Mapping[str, object]) -> str:
        """Return `sha256:…` over names, scales and weights as F32, with rows in the original order.

        An adapter has the same digest in every layout and float type that holds its weights exactly. The rows of a
        GGUF adapter for a llama can only be restored with the base model's metadata: without it, the digest differs.
        """
        found = hashlib.sha256(b"graftage-lora 1\n")
        found.update(f"{self.facts.invocation}\n".encode())
        for part in self.parts:
            try:
                rows, order = self.original_rows(part, metadata), ""
            except Refused:
                rows, order = part.b, "reordered"
            found.update(f"{part.tensor} {part.a.shape} {part.b.shape} {part.scale:.6g} {order}\n".encode())
            for data in (part.a, rows):
                found.update(np.ascontiguousarray(data, "<f4").data)
        return f"sha256:{found.hexdigest()}"


def _heads_of(part: Part, metadata: Mapping[str, object]) -> int:
    count = head_count(metadata, part.tensor)
    if count is None:
        raise Refused(f"the base model does not say how many heads `{part.tensor}` has")
    if len(part.b) % (2 * count):
        raise Refused(f"`{part.tensor}` has {len(part.b)} rows, which {count} heads cannot share")
    return count


# --- The verdict -----------------------------------------------------------------------------------------------------


STATUSES: Final = ("incompatible", "unsupported", "unknown")
"""The statuses of findings, from the gravest on: a contradiction, what prevents a conversion, what is not known."""
Finding: TypeAlias = "tuple[Literal['incompatible', 'unsupported', 'unknown'], str]"
"""What is wrong with an adapter, or with a part of it (without its layer)."""
REPLACED: Final[Mapping[str, tuple[str, ...]]] = {
    "attn_q": ("attn_qkv",),
    "attn_k": ("attn_qkv",),
    "attn_v": ("attn_qkv",),
    "attn_qkv": ("attn_q",),
    "ffn_gate": ("ffn_gate_exps", "ffn_up"),
    "ffn_up": ("ffn_up_exps",),
    "ffn_down": ("ffn_down_exps",),
}
"""Tensors that some models have instead, which may hold a tensor fused with others."""


def judge(facts: Facts, base: ModelInfo | None, *, meant_for: str | None = None) -> Verdict:
    """Judge whether an adapter fits a base model, with all reasons; `meant_for` is what its registry names."""
    if base is None or not isinstance(base.metadata.get("general.architecture"), str):
        reason = "the provider does not report the base model's shapes"
        return Verdict(status="unknown", reasons=(reason,), warnings=facts.warnings)
    warnings = (*facts.warnings, *name_warnings((facts.base_model, meant_for), base), *_check_targets(facts, base))
    found = [*_check_architecture(facts, base), *_check_layers(facts, base)]
    if found:
        status = min((each for each, _ in found), key=STATUSES.index)
        reasons = tuple(reason for each, reason in found if each == status)
        return Verdict(status=status, reasons=reasons, warnings=warnings)
    return Verdict(status="compatible", warnings=warnings)


def _check_targets(facts: Facts, base: ModelInfo) -> Iterator[str]:
    """Warn if modules are missing that the configuration names and the base model has."""
    row = ARCHITECTURES.get(str(base.metadata["general.architecture"]))
    count = base.metadata.get(f"{base.metadata['general.architecture']}.block_count")
    if facts.targets is None or base.tensors is None or row is None or not isinstance(count, int):
        return
    own = {shape.tensor for shape in facts.shapes}
    expected = set(_expected(facts.targets, own, base.tensors, row, count))
    if missing := sorted(expected - own, key=lambda each: (layer_of(each) or 0, each)):
        yield (
            f"The adapter may have been saved partly: of the {len(expected)} modules that its configuration names in"
            f" the base model, {len(missing)} are missing, the first is `{kind_of(missing[0])}`"
            f"{_span([layer_of(missing[0])])}."
        )


def _expected(
    targets: Targets, own: Collection[str], tensors: Iterable[str], row: Architecture, count: int
) -> Iterator[str]:
    """Yield the base model's tensors in layers that an adapter should change."""
    modules = {kind: module for module, kind in row.modules.items()}
    kinds, names = set(map(kind_of, own)), {*targets.names, *map(gguf_name, targets.names)}
    for tensor in tensors:
        layer, kind = layer_of(tensor), kind_of(tensor)
        if layer is None or kind not in modules:
            continue
        if targets.layers is not None and layer not in targets.layers and layer - count not in targets.layers:
            continue
        parts = f"layers.{layer}.{modules[kind]}".split(".")
        ends = (".".join(parts[at:]) for at in range(len(parts)))
        if not names.isdisjoint((tensor, *ends)) if names else kind in kinds:
            yield tensor


def _is_gguf(base: ModelInfo) -> bool:
    """Return whether adapters must become GGUF for a base model: only a folder of safetensors takes others."""
    details = base.raw.get("details")
    return not (isinstance(details, Mapping) and details.get("format") == "safetensors")


def _check_architecture(facts: Facts, base: ModelInfo) -> Iterator[Finding]:
    architecture = str(base.metadata["general.architecture"])
    if facts.architecture is not None and facts.architecture != architecture:
        reason = f"it is for the architecture `{facts.architecture}`, but the base model is `{architecture}`"
        yield "incompatible", reason
    if architecture in ARCHITECTURES:
        return
    if facts.layout != "gguf" and _is_gguf(base):
        yield "unsupported", no_row(architecture)
    elif base.tensors is None:
        yield "unknown", f"the shapes of the architecture `{architecture[:40]}` are not known"


def _check_layers(facts: Facts, base: ModelInfo) -> Iterator[Finding]:
    """Yield one finding for all layers that share it."""
    layers: dict[tuple[Finding, str], list[int | None]] = defaultdict(list)
    for shape in facts.shapes:
        label = kind_of(shape.tensor) if is_placed(shape.tensor) else re.sub(r"\d+", "N", shape.tensor[:120])
        for finding in _check_part(shape, facts, base):
            layers[finding, label].append(layer_of(shape.tensor))
    for ((status, text), label), found in layers.items():
        yield status, f"`{label}`{_span(found)} {text}"


def _span(found: list[int | None]) -> str:
    layers = sorted(each for each in found if each is not None)
    if len(layers) < 2:
        return f" of layer {layers[0]}" if layers else ""
    whole = layers == list(range(layers[0], layers[-1] + 1))
    return f" of the {len(layers)} layers from {layers[0]} to {layers[-1]}" if whole else f" of {len(layers)} layers"


def _check_part(shape: Shape, facts: Facts, base: ModelInfo) -> Iterator[Finding]:
    metadata, layer = base.metadata, layer_of(shape.tensor)
    count = metadata.get(f"{metadata['general.architecture']}.block_count")
    if layer is not None and isinstance(count, int) and layer >= count:
        yield "incompatible", f"is beyond the base model's {count} layers"
        return
    if place := _check_place(shape, facts, base):
        yield place
        return
    yield from _check_shape(shape, base)
    if is_reordered(metadata["general.architecture"], shape.tensor) and head_count(metadata, shape.tensor) is None:
        yield "unknown", "cannot be reordered: the number of heads is not known"


def _check_place(shape: Shape, facts: Facts, base: ModelInfo) -> Finding | None:
    """Return what prevents a part from being written for the base model."""
    row = ARCHITECTURES.get(str(base.metadata["general.architecture"]))
    if not _is_gguf(base):
        if not shape.module and module_name(shape.tensor, facts.architecture) is None:
            return "unsupported", "has no certain name outside of GGUF: use the adapter as its trainer wrote it"
    elif shape.module and row and (why := why_misplaced(shape.module, shape.tensor, row)):
        return "unsupported", why
    return None if is_placed(shape.tensor) else ("unknown", "is not a known module")


def _check_shape(shape: Shape, base: ModelInfo) -> Iterator[Finding]:
    tensor, kind, tensors = shape.tensor, kind_of(shape.tensor), base.tensors
    at_end = tensor in (EMBEDDING, OUTPUT)
    if tensors is None:
        if at_end:
            yield "unknown", "may be tied to another tensor: the base model's tensors are not known"
        if base.metadata["general.architecture"] not in ARCHITECTURES:
            return  # `_check_architecture` has reported it.
    elif at_end and OUTPUT not in tensors:
        yield "incompatible", "cannot be changed alone: the base model's embedding and output are tied"
        if tensor == OUTPUT:
            return
    elif tensor not in tensors:
        if instead := [each for each in REPLACED.get(kind, ()) if tensor.replace(kind, each) in tensors]:
            yield "unsupported", f"is part of `{instead[0]}` in the base model: use it in the form that was trained"
        else:
            yield "incompatible", "is missing in the base model"
        return
    yield from _check_sides(
        shape, _expected_shape(base.metadata, tensor) if tensors is None else tensors.get(tensor, ())
    )


def _check_sides(shape: Shape, sides: Sequence[int | None]) -> Iterator[Finding]:
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        yield "unknown", "has an unknown shape in the base model"
        return
    for side, own, other in (("inputs", shape.inputs, sides[0]), ("outputs", shape.outputs, sides[1])):
        if own != other:
            rows = side == "outputs" and shape.tensor in (EMBEDDING, OUTPUT)
            why = ": its vocabulary was resized, or it is for another model" if rows else ""
            yield "incompatible", f"has {own} {side}, but {other} in the base model{why}"


def _expected_shape(metadata: Mapping[str, object], tensor: str) -> tuple[int | None, ...]:
    """Derive inputs and outputs of a tensor from the model's figures, as llama.cpp does; `()` if they do not say."""
    architecture, layer = metadata["general.architecture"], layer_of(tensor)

    def figure(key: str) -> int | None:
        return per_layer(metadata.get(f"{architecture}.{key}"), layer)

    hidden, count, forward = figure("embedding_length"), figure("attention.head_count"), figure("feed_forward_length")
    shared = figure("attention.head_count_kv") or count
    # A head's width is stated only if it differs from the even share.
    even = hidden // count if hidden and count and hidden % count == 0 else None
    key = figure("attention.key_length") or even
    value = figure("attention.value_length") or even
    if figure("attention.key_length_swa"):
        key = value = None  # Which layers have which width is not stated here.
    row = ARCHITECTURES.get(str(architecture))
    fused = 2 if row and "mlp.gate_up_proj" in row.modules else 1
    q, k, v = _times(count, key), _times(shared, key), _times(shared, value)
    per_layer_input = figure("embedding_length_per_layer_input")
    shapes = {
        "attn_q": (hidden, q),
        "attn_k": (hidden, k),
        "attn_v": (hidden, v),
        "attn_qkv": (hidden, q + k + v if q and k and v else None),
        "attn_output": (_times(count, value), hidden),
        "ffn_gate": (hidden, forward),
        "ffn_up": (hidden, _times(fused, forward)),
        "ffn_down": (forward, hidden),
        "shortconv.in_proj": (hidden, _times(3, hidden)),
        "shortconv.out_proj": (hidden, hidden),
        "inp_gate": (hidden, per_layer_input),
        "proj": (per_layer_input, hidden),
        "token_embd": (hidden, _vocabulary(metadata)),
        "output": (hidden, _vocabulary(metadata)),
    }
    return shapes.get(kind_of(tensor), ())


def _times(count: int | None, width: int | None) -> int | None:
    return count * width if count and width else None


def _vocabulary(metadata: Mapping[str, object]) -> int | None:
    stated = metadata.get(f"{metadata['general.architecture']}.vocab_size")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(stated, int):
        return stated
    return len(tokens) if isinstance(tokens, (list, tuple, range)) else None
