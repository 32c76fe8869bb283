"""Whether an adapter fits a base model: by architecture, layers, shapes and vocabulary. Names are hints and no more.

The verdict is about loading and not about sense: all derivatives of one model look alike. What is compared, with what,
and what follows from it:

    architecture      a GGUF adapter's own, with the base model's             differs: incompatible
    layers            the highest one, with `block_count`                     beyond: incompatible
    shapes            inputs and outputs of each part, with the tensor's      differ: incompatible
    tensors           each part's, with those there are                       missing: incompatible; fused: unknown
    vocabulary        rows of the embedding and the output                    differ, or both tied: incompatible
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from graftage.types import Verdict
from graftage_lora._lora import (
    ARCHITECTURES,
    EMBEDDING,
    OUTPUT,
    Facts,
    Shape,
    heads,
    is_placed,
    is_reordered,
    kind_of,
    layer_of,
    per_layer,
)

if TYPE_CHECKING:
    from graftage.types import ModelInfo

__all__ = ["judge"]

Finding: TypeAlias = "tuple[Literal['contradiction', 'gap'], str]"
"""What is wrong with a part, without its layer; or what is missing to know."""
FUSED: Final[Mapping[str, tuple[str, ...]]] = {
    "attn_q": ("attn_qkv",),
    "attn_k": ("attn_qkv",),
    "attn_v": ("attn_qkv",),
    "ffn_gate": ("ffn_gate_exps", "ffn_up"),
    "ffn_up": ("ffn_up_exps",),
    "ffn_down": ("ffn_down_exps",),
}
"""What some architectures have instead of a tensor: it may hold it, or several of it."""


def judge(facts: Facts, base: ModelInfo | None, *, meant_for: str | None = None) -> Verdict:
    """Whether an adapter fits a base model, with all the reasons.

    Args:
        facts: what is known of the adapter.
        base: what is known of the base model.
        meant_for: the base model that its registry names.
    """
    if base is None or not isinstance(base.metadata.get("general.architecture"), str):
        reason = "the provider tells nothing of the base model's shapes"
        return Verdict(status="unknown", reasons=(reason,), warnings=facts.warnings)
    warnings = (*facts.warnings, *_hints((facts.base_model, meant_for), base))
    found = [*_architecture(facts, base.metadata), *_by_layer(facts.shapes, base)]
    contradictions = tuple(reason for kind, reason in found if kind == "contradiction")
    gaps = tuple(reason for kind, reason in found if kind == "gap")
    if contradictions:
        return Verdict(status="incompatible", reasons=contradictions, warnings=warnings)
    return Verdict(status="unknown" if gaps else "compatible", reasons=gaps, warnings=warnings)


def _architecture(facts: Facts, metadata: Mapping[str, Any]) -> Iterator[Finding]:
    architecture = metadata["general.architecture"]
    if facts.architecture is not None and facts.architecture != architecture:
        yield (
            "contradiction",
            f"it is for the architecture `{facts.architecture}`, and the base model is `{architecture}`",
        )
    if facts.layout != "gguf" and architecture not in ARCHITECTURES:
        known = ", ".join(f"`{each}`" for each in ARCHITECTURES)
        yield "gap", f"its modules cannot be placed in the architecture `{architecture}`, only in {known}"


def _by_layer(shapes: Iterable[Shape], base: ModelInfo) -> Iterator[Finding]:
    """One finding for all the layers that share it."""
    layers: dict[tuple[Finding, str], list[int]] = defaultdict(list)
    for shape in shapes:
        for finding in _part(shape, base):
            layer = layer_of(shape.tensor)
            layers[finding, _label(shape.tensor)].append(-1 if layer is None else layer)
    for ((kind, text), tensor), found in layers.items():
        yield kind, f"`{tensor}`{_span(sorted(found))} {text}"


def _label(tensor: str) -> str:
    return kind_of(tensor) if is_placed(tensor) else re.sub(r"\d+", "N", tensor[:120])


def _span(layers: list[int]) -> str:
    if layers[0] < 0:
        return ""
    if len(layers) == 1:
        return f" of layer {layers[0]}"
    whole = layers == list(range(layers[0], layers[-1] + 1))
    return f" of the {len(layers)} layers from {layers[0]} to {layers[-1]}" if whole else f" of {len(layers)} layers"


def _part(shape: Shape, base: ModelInfo) -> Iterator[Finding]:
    if not is_placed(shape.tensor):
        yield "gap", "is no module that can be placed"
        return
    metadata, layer = base.metadata, layer_of(shape.tensor)
    count = metadata.get(f"{metadata['general.architecture']}.block_count")
    if layer is not None and isinstance(count, int) and layer >= count:
        yield "contradiction", f"lies beyond the base model's {count} layers"
        return
    yield from _ends(shape, base)
    yield from _sides(shape, base)
    if is_reordered(metadata["general.architecture"], shape.tensor) and heads(metadata, shape.tensor) is None:
        yield "gap", "has rows in an order that depends on the number of heads, which is not known"


def _ends(shape: Shape, base: ModelInfo) -> Iterator[Finding]:
    if shape.tensor not in (EMBEDDING, OUTPUT):
        return
    if base.tensors is None:
        yield "gap", "may be tied to the other end of the base model: its tensors are not known"
    elif OUTPUT not in base.tensors:
        yield "contradiction", "changes one end of a model whose ends are tied: embedding and output are one tensor"


def _sides(shape: Shape, base: ModelInfo) -> Iterator[Finding]:
    if base.tensors is not None and shape.tensor not in base.tensors:
        if shape.tensor != OUTPUT:  # `_ends` has told
            yield _absent(shape, base.tensors)
        return
    sides = base.tensors[shape.tensor] if base.tensors is not None else _derived(base.metadata, shape.tensor)
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):  # noqa: PLR2004
        yield "gap", "has a shape in the base model that is not known"
        return
    for side, own, other in (("inputs", shape.inputs, sides[0]), ("outputs", shape.outputs, sides[1])):
        if own != other:
            yield "contradiction", f"has {own} {side}, and in the base model {other}"


def _absent(shape: Shape, tensors: Mapping[str, Any]) -> Finding:
    kind = kind_of(shape.tensor)
    instead = [each for each in FUSED.get(kind, ()) if shape.tensor.replace(kind, each) in tensors]
    if instead:
        return "gap", f"is not there by itself in the base model, which has `{instead[0]}`"
    return "contradiction", "is not there in the base model"


def _derived(metadata: Mapping[str, Any], tensor: str) -> tuple[int | None, ...]:
    """Inputs and outputs of a tensor by the model's figures, as llama.cpp derives them."""
    architecture, layer = metadata["general.architecture"], layer_of(tensor)

    def figure(key: str) -> int | None:
        return per_layer(metadata.get(f"{architecture}.{key}"), layer)

    hidden, count = figure("embedding_length"), figure("attention.head_count")
    shared = figure("attention.head_count_kv") or count
    # A head's width is stated only where it is not the even share.
    even = hidden // count if hidden and count and hidden % count == 0 else None
    key = figure("attention.key_length") or even
    value = figure("attention.value_length") or even
    shapes = {
        "attn_q": (hidden, _times(count, key)),
        "attn_k": (hidden, _times(shared, key)),
        "attn_v": (hidden, _times(shared, value)),
        "attn_output": (_times(count, value), hidden),
        "ffn_gate": (hidden, figure("feed_forward_length")),
        "ffn_up": (hidden, figure("feed_forward_length")),
        "ffn_down": (figure("feed_forward_length"), hidden),
        "token_embd": (hidden, _vocabulary(metadata)),
        "output": (hidden, _vocabulary(metadata)),
    }
    return shapes.get(kind_of(tensor), ())


def _times(count: int | None, width: int | None) -> int | None:
    return count * width if count and width else None


def _vocabulary(metadata: Mapping[str, Any]) -> int | None:
    stated = metadata.get(f"{metadata['general.architecture']}.vocab_size")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(stated, int):
        return stated
    return len(tokens) if isinstance(tokens, (list, tuple, range)) else None


# --- Names -----------------------------------------------------------------------------------------------------------

QUANTISED: Final = re.compile(
    r"\b(i?q\d(_[0-9a-z]+)*|[bf]p?f?16|fp?32|int[48]|[48]bit|bnb|gguf|ggml|mlx|awq|gptq|dynamic|latest)\b"
)
SIZE: Final = re.compile(r"\b\d+(\.\d+)?[bm]\b")


def _hints(stated: Iterable[str | None], base: ModelInfo) -> tuple[str, ...]:
    names = [
        base.name,
        *(each for each in (base.metadata.get("general.basename"), base.parent) if isinstance(each, str)),
    ]
    return tuple(
        f"It was made for `{each}` by name, and the base model is `{base.name}`: check that they are one model."
        for each in dict.fromkeys(filter(None, stated))
        if all(_differ(each, name) for name in names)
    )


def _differ(left: str, right: str) -> bool:
    """Whether two names surely mean two models: by family or size, as far as both tell them."""
    (family, size), (other, other_size) = _name(left), _name(right)
    if size and other_size and size != other_size:
        return True
    return bool(family and other) and not family.startswith(other) and not other.startswith(family)


def _name(text: str) -> tuple[str, str]:
    """Family and size in a model's name: owner, file system and quantisation do not count."""
    last = re.split(r"[/\\]", text.rstrip("/\\"))[-1].lower()
    words = QUANTISED.sub(" ", re.sub(r"[:\s-]+", " ", last))
    size = SIZE.search(words)
    family = words[: size.start()] if size else words
    return re.sub(r"[^a-z0-9]|instruct|chat", "", family), size[0] if size else ""
