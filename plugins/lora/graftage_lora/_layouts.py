"""Writes adapters as folders in the layouts of training tools, for servers that read these: PEFT's and mlx-lm's.

mlx-lm has one rank and one scale for all modules, and vLLM reads PEFT's layout without its patterns. So differing
scales are folded into B, and smaller ranks are filled up with zeros, which change nothing. Equal content gives an equal
folder; it contains neither name nor time nor path.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from graftage_lora._architectures import EMBEDDING, layer_of, module_name
from graftage_lora._files import CONFIG, WEIGHTS, Refused
from graftage_lora._lora import Array, Lora, even_scale

__all__ = ["mlx", "peft"]

IN_LAYER: Final = re.compile(r"(?:.*\.)?layers\.\d+\.(.+)")


def mlx(lora: Lora, metadata: Mapping[str, object]) -> dict[str, bytes]:
    """Encode an adapter in mlx-lm's layout, for a base model with this metadata; return the files by name.

    Raises:
        Refused: the layout cannot hold it.
    """
    parts, rank, scale = _even(lora, metadata)
    tensors: dict[str, Array] = {}
    for module, a, b, embeds in parts:
        # mlx-lm multiplies from the left: x @ lora_a @ lora_b. For an embedding, it looks up rows of `lora_a`.
        tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"] = (b, a) if embeds else (a.T, b.T)
    keys = {match[1] if (match := IN_LAYER.fullmatch(module)) else module for module, *_ in parts}
    config = {
        "fine_tune_type": "lora",
        "num_layers": _last_layers(lora, metadata),
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": sorted(keys)},
    }
    return _folder("mlx", tensors, config)


def peft(lora: Lora, metadata: Mapping[str, object]) -> dict[str, bytes]:
    """Encode an adapter in PEFT's layout, as `mlx` does."""
    parts, rank, scale = _even(lora, metadata)
    tensors: dict[str, Array] = {}
    for module, a, b, embeds in parts:
        name = f"base_model.model.{module}"
        if embeds:
            tensors[f"{name}.lora_embedding_A"], tensors[f"{name}.lora_embedding_B"] = b.T, a.T
        else:
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(module for module, *_ in parts),
    }
    return _folder("peft", tensors, config)


def _even(lora: Lora, metadata: Mapping[str, object]) -> tuple[list[tuple[str, Array, Array, bool]], int, float]:
    """Return each module with A and B of one rank and whether it is the embedding, then the rank and the scale."""
    if lora.facts.invocation:
        raise Refused("it acts only after its invocation tokens, but servers that read this layout always apply it")
    rank, scale = max(len(part.a) for part in lora.parts), lora.facts.scale
    found = []
    for part in lora.parts:
        a, b = part.a, even_scale(lora.original_rows(part, metadata), part.scale / scale)
        missing = rank - len(a)
        filled = np.pad(a, ((0, missing), (0, 0))), np.pad(b, ((0, 0), (0, missing)))
        module = part.module or module_name(part.tensor, lora.facts.architecture)
        if module is None:
            raise Refused(
                f"`{part.tensor[:120]}` of `{lora.facts.architecture}` has no certain name outside of GGUF",
                "Use the adapter as its trainer wrote it.",
            )
        found.append((module, *filled, part.tensor == EMBEDDING))
    return found, rank, scale


def _last_layers(lora: Lora, metadata: Mapping[str, object]) -> int:
    """Return how many layers, from the last one, mlx-lm must prepare: as few as possible, or -1 for all."""
    count = metadata.get(f"{metadata.get('general.architecture')}.block_count")
    layers = [layer_of(part.tensor) for part in lora.parts]
    lowest = min((each for each in layers if each is not None), default=None)
    if lowest is None or None in layers or not isinstance(count, int) or not 0 <= lowest < count:
        return -1
    return count - lowest


def _folder(layout: str, tensors: Mapping[str, Array], config: Mapping[str, Any]) -> dict[str, bytes]:
    return {WEIGHTS[layout]: _safetensors(tensors), CONFIG: json.dumps(config, indent=1, sort_keys=True).encode()}


def _safetensors(tensors: Mapping[str, Array]) -> bytes:
    """Encode arrays of F16 and F32 as safetensors."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, data in sorted(tensors.items()):
        place = [position, position + data.nbytes]
        table[name] = {"dtype": f"F{8 * data.dtype.itemsize}", "shape": list(data.shape), "data_offsets": place}
        position = place[1]
    head = json.dumps(table).encode()
    head += b" " * (-len(head) % 8)
    return b"".join((struct.pack("<Q", len(head)), head, *(data.tobytes() for _, data in sorted(tensors.items()))))
