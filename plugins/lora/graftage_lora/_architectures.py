"""The architectures whose modules have known places in GGUF files, and the names that training tools give to modules.

The facts are those of llama.cpp's converter (`conversion/` and `convert_lora_to_gguf.py`), of the tensor maps in its
package `gguf`, and of the model files in transformers. Only what its graphs compute with `build_lora_mm` has a place:
of any other tensor, the server would load the change and ignore it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

__all__ = [
    "ARCHITECTURES",
    "EMBEDDING",
    "LEAVE_OUT",
    "OUTPUT",
    "Architecture",
    "clean_name",
    "gguf_name",
    "is_placed",
    "kind_of",
    "layer_of",
    "module_name",
    "no_row",
    "tower_of",
    "why_misplaced",
]

EMBEDDING: Final = "token_embd.weight"
OUTPUT: Final = "output.weight"
ENDS: Final[Mapping[str, str]] = {"embed_tokens": EMBEDDING, "lm_head": OUTPUT}
ATTENTION: Final[Mapping[str, str]] = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
UNGATED: Final[Mapping[str, str]] = {**ATTENTION, "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
USUAL: Final[Mapping[str, str]] = {**UNGATED, "mlp.gate_proj": "ffn_gate"}
PER_LAYER: Final[Mapping[str, str]] = {
    **USUAL,
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What GGUF files of an architecture make of a layer's modules."""

    modules: Mapping[str, str] = field(default_factory=lambda: USUAL)
    """The GGUF name of each module."""
    reordered: bool = False
    """Whether GGUF reorders the rows of q and k.

    Such files rotate pairs of neighbouring numbers, while the original weights pair numbers half a head apart. The
    converter therefore reorders the rows within each head (`LlamaModel.permute`).
    """
    has_towers: bool = False
    """Whether its models may see or hear: then the names of their modules depend on the program that runs them."""


ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "llama": Architecture(reordered=True),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "gemma2": Architecture(),
    "gemma3": Architecture(has_towers=True),
    "apertus": Architecture(modules=UNGATED),
    "arcee": Architecture(modules=UNGATED, reordered=True),
    "cohere2": Architecture(),
    "ernie4_5": Architecture(),
    "exaone4": Architecture(),
    "gemma": Architecture(),
    "gemma3n": Architecture(
        modules={**PER_LAYER, "laurel.linear_left": "laurel_l", "laurel.linear_right": "laurel_r"}, has_towers=True
    ),
    "gemma4": Architecture(modules=PER_LAYER, has_towers=True),
    "granite": Architecture(reordered=True),
    "hunyuan-dense": Architecture(),
    "lfm2": Architecture(
        modules={
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.out_proj": "attn_output",
            "feed_forward.w1": "ffn_gate",
            "feed_forward.w2": "ffn_down",
            "feed_forward.w3": "ffn_up",
            "conv.in_proj": "shortconv.in_proj",
            "conv.out_proj": "shortconv.out_proj",
        }
    ),
    "mistral3": Architecture(reordered=True, has_towers=True),
    "olmo2": Architecture(),
    "phi3": Architecture(
        modules={
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }
    ),
    "qwen2vl": Architecture(has_towers=True),
    "qwen3moe": Architecture(modules=ATTENTION),
    "qwen3vl": Architecture(has_towers=True),
    "seed_oss": Architecture(),
    "smollm3": Architecture(reordered=True),
}
"""By `general.architecture`. A GGUF adapter needs no row: its tensors have their names and their order."""
MODULES: Final[Mapping[str, str]] = {
    module: kind for row in ARCHITECTURES.values() for module, kind in row.modules.items()
}


# --- Names -----------------------------------------------------------------------------------------------------------

WRAPPERS: Final = {"_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
"""What PyTorch puts into names: compiled, parallel and checkpointed modules."""
TEXT: Final = re.compile(
    r"(?:(?:base_model|model|language_model|text_model|thinker|llm)\.)*"
    r"(?:layers\.(?P<layer>\d{1,5})\.(?P<module>[a-z0-9_.]+)|(?P<end>embed_tokens|lm_head))"
)
"""A module of the language model, within any number of the models around it."""
PLACED: Final = re.compile(r"blk\.(\d{1,5})\.([a-z0-9_.]+)\.weight|token_embd\.weight|output\.weight")
TOWERS: Final[Mapping[str, re.Pattern[str]]] = {
    "the projector": re.compile(r"\w*projector|mm_\w+|multi_?modal\w*|connector|mlp1"),
    "the vision tower": re.compile(r"vis(?:ion|ual)\w*|\w+_vision|ima?ge?_\w+|vit|vpm|resampler"),
    "the audio tower": re.compile(r"(?:audio|speech)\w*|\w+_audio|apm"),
}
LEAVE_OUT: Final = "Set `leave_out_vision` of the plugin to use the rest of the adapter."


def clean_name(module: str) -> str:
    """Return a module's name without PyTorch's and PEFT's wrappers, from the whole model on."""
    name = ".".join(part for part in module.split(".") if part not in WRAPPERS)
    while name.startswith("base_model.model."):
        name = name.removeprefix("base_model.model.")
    return f"model.{name}" if name.startswith("layers.") or name == "embed_tokens" else name


def tower_of(module: str) -> str | None:
    """Return which part of a model beside the language model a module belongs to; `None` if it belongs to none."""
    parts = module.split(".")
    return next((tower for tower, pattern in TOWERS.items() if any(map(pattern.fullmatch, parts))), None)


def gguf_name(module: str) -> str:
    """Return the GGUF name of a module's weight, or its clean name if no architecture has it."""
    name = clean_name(module)
    match = TEXT.fullmatch(name)
    if match is None:
        return name
    if match["end"]:
        return ENDS[match["end"]]
    kind = MODULES.get(match["module"])
    return name if kind is None else f"blk.{int(match['layer'])}.{kind}.weight"


def module_name(tensor: str, architecture: str | None) -> str | None:
    """Return the name of a weight's module in training tools; `None` if it is not known."""
    row = ARCHITECTURES.get(architecture or "")
    if row is None or row.has_towers:
        return None
    if tensor in (EMBEDDING, OUTPUT):
        return "model.embed_tokens" if tensor == EMBEDDING else "lm_head"
    layer, kind = layer_of(tensor), kind_of(tensor)
    found = next((module for module, own in row.modules.items() if own == kind), None)
    return None if found is None or layer is None else f"model.layers.{layer}.{found}"


def is_placed(tensor: str) -> bool:
    """Return whether a name is a GGUF name of a weight."""
    return PLACED.fullmatch(tensor) is not None


def layer_of(tensor: str) -> int | None:
    """Return the layer of a tensor; `None` for the embedding and the output."""
    match = PLACED.fullmatch(tensor)
    return int(match[1]) if match and match[1] else None


def kind_of(tensor: str) -> str:
    """Return a tensor's name without its layer: `attn_q`."""
    match = PLACED.fullmatch(tensor)
    return match[2] if match and match[2] else tensor.removesuffix(".weight")


# --- Places ----------------------------------------------------------------------------------------------------------

EXPERTS: Final = re.compile(r"(?:\w+\.)*(?:experts|router|block_sparse_moe)(?:\..+)?|mlp\.gate")


def no_row(architecture: str) -> str:
    """Say that an architecture is not in the table, and the way out."""
    return (
        f"its modules have no known places in the architecture `{architecture[:40]}`: "
        "convert it to GGUF with llama.cpp's `convert_lora_to_gguf.py`"
    )


def why_misplaced(module: str, tensor: str, row: Architecture) -> str | None:
    """Return why GGUF files of an architecture have no place for a module and its `gguf_name`; `None` if they may."""
    if tensor in (EMBEDDING, OUTPUT):
        return None
    match = TEXT.fullmatch(module)
    name, kind = match["module"] if match else "", kind_of(tensor)
    # A tensor that the row does not name may still be in the file; then its name says what it is.
    if is_placed(tensor) and (name in row.modules or kind not in row.modules.values()):
        return None
    if EXPERTS.fullmatch(name):
        return "belongs to the experts, which a GGUF file holds together: train without it"
    return "has no tensor of its own in a GGUF file of this architecture: train without it"
