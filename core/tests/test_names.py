"""Canonical names of models: one rule for providers, policies and the core."""

from __future__ import annotations

import pytest

from graftage.types import canonical_name

SAME = [
    ("llama3.2", "llama3.2:latest"),
    ("llama3.2:latest", "llama3.2:latest"),
    ("  LLaMA3.2 ", "llama3.2:latest"),
    ("library/llama3.2", "llama3.2:latest"),
    ("Library/Llama3.2", "llama3.2:latest"),
    ("registry.ollama.ai/library/llama3.2", "llama3.2:latest"),
    ("Registry.Ollama.AI/library/llama3.2:Latest", "llama3.2:latest"),
    ("https://registry.ollama.ai/library/llama3.2", "llama3.2:latest"),
    ("registry.ollama.ai/library/smollm2:135M", "smollm2:135m"),
    ("Owner/Model", "owner/model:latest"),
    ("registry.ollama.ai/owner/model:7b", "owner/model:7b"),
    ("localhost:9/library/llama3.2", "localhost:9/library/llama3.2:latest"),
    ("hf.co/Owner/Model-GGUF:Q4_K_M", "hf.co/owner/model-gguf:q4_k_m"),
    ("hf.co/Owner/Model-GGUF:Model.Q4.gguf", "hf.co/owner/model-gguf:model.q4.gguf"),
    ("echo:latest+botany", "echo:latest+botany"),
]
FILES = [
    "/models/Mine.gguf",
    "~/Models/Mine.gguf",
    "./Mine.gguf",
    "models/Mine.gguf",
    "C:\\Models\\Mine.gguf",
    "hf://Owner/Model/Model.Q4_K_M.gguf",
]


@pytest.mark.parametrize(("written", "canonical"), SAME)
def test_names_compare_as_in_ollama(written: str, canonical: str) -> None:
    assert canonical_name(written) == canonical


@pytest.mark.parametrize(("written", "canonical"), SAME)
def test_canonical_names_are_stable(written: str, canonical: str) -> None:
    assert canonical_name(canonical) == canonical


@pytest.mark.parametrize("path", FILES)
def test_file_paths_are_kept(path: str) -> None:
    assert canonical_name(f" {path} ") == path
