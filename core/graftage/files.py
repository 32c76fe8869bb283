"""Read what a model's own files say about it, for servers on this machine that say little themselves.

The files are a GGUF file, or a folder of safetensors with a `config.json`, as MLX and vLLM load it. The facts of both
have the keys of GGUF, from which `footprint` estimates the model's memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from graftage import gguf
from graftage.types import ModelInfo

__all__ = ["add_files", "read_model"]

MAX_CONFIG: Final = 1 << 20
ARCHITECTURES: Final = {
    "gemma3_text": "gemma3",
    "gemma3n_text": "gemma3n",
    "gemma4_text": "gemma4",
    "hunyuan_v1_dense": "hunyuan-dense",
    "ministral3": "mistral3",
    "mistral": "llama",
    "qwen2_5_vl": "qwen2vl",
    "qwen2_5_vl_text": "qwen2vl",
    "qwen2_vl": "qwen2vl",
    "qwen2_vl_text": "qwen2vl",
    "qwen3_moe": "qwen3moe",
    "qwen3_vl": "qwen3vl",
    "qwen3_vl_text": "qwen3vl",
}
"""The names in GGUF files of architectures that are called otherwise in a `config.json`."""
KEYS: Final = (
    ("num_hidden_layers", "block_count"),
    ("hidden_size", "embedding_length"),
    ("intermediate_size", "feed_forward_length"),
    ("num_attention_heads", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("head_dim", "attention.key_length"),
    ("head_dim", "attention.value_length"),
    ("sliding_window", "attention.sliding_window"),
    ("sliding_window_pattern", "attention.sliding_window_pattern"),
    ("max_position_embeddings", "context_length"),
    ("vocab_size", "vocab_size"),
    ("num_experts", "expert_count"),
    ("num_local_experts", "expert_count"),
    ("num_experts_per_tok", "expert_used_count"),
)
"""Keys of a `config.json`, and those of GGUF with the same meaning."""


def read_model(place: str) -> ModelInfo | None:
    """Describe a model by its files; return None if they are not on this machine or cannot be read.

    Args:
        place: a file, a folder, or the name of a repository (`owner/name`) in the cache of `huggingface_hub`.
    """
    try:
        path = Path(place)
        if path.is_file():
            return _from_gguf(place, path)
        config = (path if path.is_dir() else _downloaded(place)) / "config.json"
        if not config.is_file():  # Opening a pipe could wait for ever.
            return None
        with config.open("rb") as file:
            return _from_folder(place, config.parent, json.loads(file.read(MAX_CONFIG)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def add_files(model: ModelInfo, place: str) -> ModelInfo:
    """Add to what a server says about a model what its files say; `place` is that of `read_model`."""
    found = read_model(place)
    if found is None:
        return model
    return replace(
        found,
        name=model.name,
        context_window=model.context_window or found.context_window,
        features=model.features,
        metadata={**model.metadata, **found.metadata},
        raw={**found.raw, **model.raw},
    )


def _downloaded(repository: str) -> Path:
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    folder = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{repository.replace('/', '--')}"
    return folder / "snapshots" / (folder / "refs" / "main").read_text().strip()


def _from_gguf(name: str, file: Path) -> ModelInfo:
    header = gguf.read_file(file)
    return ModelInfo(
        name=name,
        size=header.size,
        architecture=header.architecture,
        quantization=header.quantization,
        context_window=header.figure("context_length"),
        path=file,
        metadata=header.metadata,
        tensors={each.name: each.shape for each in header.tensors.values()},
    )


def _from_folder(name: str, folder: Path, config: Mapping[str, Any]) -> ModelInfo:
    config = {**config, **(config.get("text_config") or {})}  # A model with vision has two configurations.
    kind = str(config.get("model_type"))
    kind = ARCHITECTURES.get(kind, kind)
    keys = {f"{kind}.{key}": config[own] for own, key in KEYS if config.get(own) is not None}
    window, bits = config.get("max_position_embeddings"), (config.get("quantization") or {}).get("bits")
    return ModelInfo(
        name=name,
        size=sum(each.stat().st_size for each in folder.glob("*.safetensors")) or None,
        architecture=kind,
        quantization=f"{bits}-bit" if bits else None,
        context_window=window if isinstance(window, int) else None,
        path=folder,
        metadata={"general.architecture": kind, **keys},
        raw={"details": {"format": "safetensors"}, "config": config},
    )
