"""What servers have in memory, and that the policy `m4` counts it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from places import ROOT

from graftage.exceptions import CapabilityUnsupported, ResourceLimitExceeded
from graftage_m4 import M4
from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MACHINE = ROOT / "plugins" / "m4" / "tests" / "assets" / "mini-16-macos15.json"
MODELS, NATIVE = "/v1/models", "/api/v1/models"
GIB = 1 << 30


def lmstudio(key: str, size: float, *windows: int) -> dict[str, Any]:
    """A model in LM Studio's list, as its documentation has it, and the windows of its loaded instances."""
    names = [key, *(f"{key}:{place}" for place in range(2, len(windows) + 1))]
    return {
        "type": "llm",
        "key": key,
        "architecture": "llama",
        "quantization": {"name": "Q4_0", "bits_per_weight": 4},
        "size_bytes": int(size),
        "params_string": "8B",
        "loaded_instances": [
            {"id": name, "config": {"context_length": window}} for name, window in zip(names, windows, strict=False)
        ],
        "max_context_length": 131_072,
        "format": "mlx",
    }


LLAMA = {
    "id": "smollm2-135m",
    "object": "model",
    "owned_by": "llamacpp",
    "meta": {"n_vocab": 49152, "n_ctx": 1024, "n_ctx_train": 8192, "n_params": 134515008, "size": 96576768},
}
VLLM = {"id": "org/model", "object": "model", "owned_by": "vllm", "root": "org/model", "max_model_len": 2048}


def body(found: Any) -> Answer:
    return Answer([json.dumps(found).encode()], headers={"content-type": "application/json"})


def streamed() -> Answer:
    choice = {"index": 0, "delta": {"content": "Hi"}, "finish_reason": "stop"}
    event = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    return Answer([event.encode()], headers={"content-type": "text/event-stream"})


@pytest.fixture
def connect(both: Any, fake: FakeOllama) -> Callable[..., Any]:
    def connect(profile: str, found: Any, own: Any = None, **given: Any) -> Any:
        fake.script(MODELS, *[body({"data": found})] * 9)
        fake.script(NATIVE, *[body({"models": own})] * 9)
        return both.connect("openai", **{"host": fake.url, "profile": profile, "attempts": 1, **given})

    return connect


def write_mlx(folder: Path, gigabytes: float) -> str:
    """Write an MLX model's folder, with weights that have a size and no data."""
    folder.mkdir()
    config = {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32_768,
        "vocab_size": 128_256,
    }
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(int(gigabytes * 1e9))
    return str(folder)


class TestLoaded:
    def test_lm_studio_lists_instances(self, connect: Any) -> None:
        models = [lmstudio("small", 2.5e9, 4096, 8192), lmstudio("idle", 5e9)]
        found = connect("lmstudio", [], models).loaded()
        assert [(each.name, each.context_window) for each in found] == [("small", 4096), ("small:2", 8192)]
        assert all(2.5e9 < each.size < 2.5e9 + 2 * GIB for each in found)
        assert found[0].size < found[1].size

    def test_llama_server_has_one(self, connect: Any) -> None:
        (found,) = connect("llama-server", [LLAMA]).loaded()
        assert (found.name, found.context_window) == ("smollm2-135m", 1024)
        assert found.size > LLAMA["meta"]["size"]  # type: ignore[index]

    def test_size_that_is_not_told_is_unknown(self, connect: Any) -> None:
        (found,) = connect("vllm", [VLLM]).loaded()
        assert (found.name, found.size, found.context_window) == ("org/model", None, 2048)

    def test_mlx_does_not_tell(self, connect: Any) -> None:
        with pytest.raises(CapabilityUnsupported, match="loaded_models"):
            connect("mlx", [{"id": "/srv/models/m"}]).loaded()


class TestShown:
    def test_lm_studio_knows_size(self, connect: Any) -> None:
        found = connect("lmstudio", [{"id": "small"}], [lmstudio("other", 1), lmstudio("small", 2.5e9)]).show("small")
        assert (found.size, found.architecture, found.context_window) == (2_500_000_000, "llama", 131_072)

    @pytest.mark.parametrize("name", ["", "default_model"])
    def test_mlx_folder_is_read(self, connect: Any, tmp_path: Path, name: str) -> None:
        folder = write_mlx(tmp_path / "m", 4.5)
        found = connect("mlx", [{"id": "org/other"}, {"id": folder}]).show(name or folder)
        assert (found.name, found.size, str(found.path)) == (name or folder, 4_500_000_000, folder)

    def test_folder_of_other_machine_is_not_read(
        self, connect: Any, fake: FakeOllama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = write_mlx(tmp_path / "m", 4.5)
        monkeypatch.setenv("HTTP_PROXY", fake.url)
        fake.script(f"http://far.test{MODELS}", body({"data": [{"id": folder}]}))
        found = connect("mlx", [], host="http://far.test").show(folder)
        assert (found.size, found.path) == (None, None)


class TestPolicy:
    """The policy `m4` on a recorded Mac mini with 16 GB, whose budget for models is 9.7 GiB."""

    def test_huge_mlx_folder_is_refused(self, connect: Any, fake: FakeOllama, tmp_path: Path) -> None:
        folder = write_mlx(tmp_path / "m", 12)
        llm = connect("mlx", [{"id": folder}], model=folder, plugins=[M4(machine=MACHINE)])
        with pytest.raises(ResourceLimitExceeded, match=r"needs 13\.8 GB with a window of 4096 tokens"):
            llm.chat("Hi")
        assert "/v1/chat/completions" not in [seen.path for seen in fake.requests]

    def test_model_on_mlx_counts_for_other_servers(self, connect: Any, fake: FakeOllama, tmp_path: Path) -> None:
        fake.script("/v1/chat/completions", streamed(), streamed())
        folder, policy = write_mlx(tmp_path / "m", 4.5), M4(machine=MACHINE)
        mlx = connect("mlx", [{"id": folder}], model=folder, plugins=[policy])
        assert mlx.chat("Hi", context_window=8192).limits.context_window == 8192
        with FakeOllama() as other:
            other.script(MODELS, *[body({"data": [{"id": "small"}]})] * 9)
            other.script(NATIVE, *[body({"models": [lmstudio("small", 4.5e9)]})] * 9)
            llm = connect("lmstudio", [], host=other.url, model="small", plugins=[policy])
            with pytest.raises(ResourceLimitExceeded, match="models in use elsewhere on this Mac take"):
                llm.chat("Hi")

    def test_loaded_models_keep_their_windows(self, connect: Any, fake: FakeOllama) -> None:
        fake.script("/v1/chat/completions", streamed())
        models = [lmstudio("small", 2.5e9, 8192), lmstudio("other", 2e9, 4096)]
        llm = connect("lmstudio", [{"id": "small"}], models, model="small", plugins=[M4(machine=MACHINE)])
        limits = llm.chat("Hi").limits
        assert limits.context_window == 8192
        assert limits.reasons["context_window"] == "m4: the model is loaded with this window"
