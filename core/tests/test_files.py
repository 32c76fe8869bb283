"""What a model's own files say about it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from lora_files import Model

from graftage.files import MAX_CONFIG, read_model
from graftage.footprint import footprint, read_shape

if TYPE_CHECKING:
    from pathlib import Path

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "vocab_size": 128_256,
    "quantization": {"group_size": 64, "bits": 4},
}
SIZE = 4_500_000_000


def write(folder: Path, config: object) -> Path:
    """Write a model's folder; its weights have a size and no data."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("model-1.safetensors", "model-2.safetensors"):
        with (folder / name).open("wb") as file:
            file.truncate(SIZE // 2)
    return folder


class TestFolder:
    def test_facts_are_those_of_gguf(self, tmp_path: Path) -> None:
        found = read_model(str(write(tmp_path / "m", CONFIG)))
        assert found is not None
        assert (found.size, found.architecture, found.quantization) == (SIZE, "llama", "4-bit")
        assert (found.context_window, found.path) == (131_072, tmp_path / "m")
        shape = read_shape(found)
        assert shape is not None
        assert shape.mlx
        assert footprint(shape, 4096).cache == 4096 * 32 * 8 * 2 * 128 * 2

    @pytest.mark.parametrize(
        ("changes", "architecture"),
        [
            ({"model_type": "mistral"}, "llama"),
            ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 2560}}, "gemma3"),
            ({"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8}, "qwen3moe"),
        ],
    )
    def test_architecture_has_name_of_gguf(self, tmp_path: Path, changes: dict[str, Any], architecture: str) -> None:
        found = read_model(str(write(tmp_path / "m", {**CONFIG, **changes})))
        assert found is not None
        assert found.metadata["general.architecture"] == architecture
        width = changes.get("text_config", CONFIG)["hidden_size"]
        assert found.metadata[f"{architecture}.embedding_length"] == width
        shape = read_shape(found)
        assert shape is not None
        assert (shape.active < 1) is ("num_experts" in changes)

    def test_download_is_found_by_repository(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        repository = tmp_path / "hub" / "models--mlx-community--Small-4bit"
        write(repository / "snapshots" / "abc", CONFIG)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc\n")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.delenv("HF_HUB_CACHE", raising=False)
        found = read_model("mlx-community/Small-4bit")
        assert found is not None
        assert (found.name, found.size) == ("mlx-community/Small-4bit", SIZE)
        assert read_model("mlx-community/Other-4bit") is None


class TestFile:
    def test_head_is_read(self, tmp_path: Path) -> None:
        model = Model()
        file = model.write(tmp_path / "m.gguf")
        found = read_model(str(file))
        assert found is not None
        assert (found.architecture, found.size) == ("llama", file.stat().st_size)
        assert found.metadata["llama.block_count"] == model.layers
        assert found.tensors is not None
        assert found.tensors.keys() == model.placed().keys()


class TestUnreadable:
    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "{",
            "[" * 100_000,
            '{"text_config": 5}',
            '{"quantization": []}',
            '{"a": "' + "b" * MAX_CONFIG + '"}',
        ],
        ids=["empty", "list", "cut", "deep", "no text", "no bits", "long"],
    )
    def test_config_gives_nothing(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "config.json").write_text(text)
        found = read_model(str(tmp_path))
        assert found is None or found.quantization is None

    @pytest.mark.parametrize("place", ["", "m", "default_model", "a/b", "\0", "x" * 5000])
    def test_place_gives_nothing(self, place: str) -> None:
        assert read_model(place) is None

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a named pipe can only be made here")
    def test_pipe_is_not_opened(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "config.json")
        assert read_model(str(tmp_path)) is None

    def test_broken_file_gives_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").write_bytes(b"GGUF")
        assert read_model(str(tmp_path / "m.gguf")) is None
