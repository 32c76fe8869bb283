"""Adapters and base models for the tests of `graftage_lora`, written by other libraries than the plugin itself.

The model is a small llama in NumPy, in two forms: with the original weights, and with those of a GGUF file, whose
rotary pairs are neighbours. Neither shares code with the plugin.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from places import LORA
from safetensors.numpy import save_file

from graftage.calls import ResolveRequest
from graftage.types import ModelInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

Array = Any
MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """The sizes of a small model with shared keys and values."""

    architecture: str = "llama"
    layers: int = 2
    hidden: int = 64
    heads: int = 4
    shared: int = 2
    width: int = 16
    feed_forward: int = 96
    vocabulary: int = 48
    seed: int = 0
    tied: bool = False

    def sides(self, module: str) -> tuple[int, int]:
        """Return the outputs and inputs of a module."""
        query, key = self.heads * self.width, self.shared * self.width
        return {
            "self_attn.q_proj": (query, self.hidden),
            "self_attn.k_proj": (key, self.hidden),
            "self_attn.v_proj": (key, self.hidden),
            "self_attn.o_proj": (self.hidden, query),
            "mlp.gate_proj": (self.feed_forward, self.hidden),
            "mlp.up_proj": (self.feed_forward, self.hidden),
            "mlp.down_proj": (self.hidden, self.feed_forward),
            "embed_tokens": (self.vocabulary, self.hidden),
            "lm_head": (self.vocabulary, self.hidden),
        }[module]

    def modules(self) -> list[str]:
        """Return all modules by their names in trainers."""
        return [f"model.layers.{layer}.{each}" for layer in range(self.layers) for each in MODULES]

    def weights(self) -> dict[str, Array]:
        """Return the original weights, in the original order."""
        rng = np.random.default_rng(self.seed)
        found: dict[str, Array] = {}
        for name in self.modules():
            shape = self.sides(name.split(".", 3)[3])
            found[name] = rng.normal(0, shape[1] ** -0.5, shape).astype(np.float32)
        for layer in range(self.layers):
            for norm in ("attn_norm", "ffn_norm"):
                found[f"{layer}.{norm}"] = rng.normal(1, 0.1, self.hidden).astype(np.float32)
        found["norm"] = rng.normal(1, 0.1, self.hidden).astype(np.float32)
        for end in ("embed_tokens", "lm_head"):
            found[end] = rng.normal(0, 0.3, self.sides(end)).astype(np.float32)
        return found

    def metadata(self) -> dict[str, Any]:
        """Return the keys of its GGUF file."""
        return {
            "general.architecture": self.architecture,
            "general.name": "small",
            f"{self.architecture}.block_count": self.layers,
            f"{self.architecture}.embedding_length": self.hidden,
            f"{self.architecture}.feed_forward_length": self.feed_forward,
            f"{self.architecture}.attention.head_count": self.heads,
            f"{self.architecture}.attention.head_count_kv": self.shared,
            f"{self.architecture}.attention.key_length": self.width,
            f"{self.architecture}.attention.value_length": self.width,
            f"{self.architecture}.vocab_size": self.vocabulary,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes in the order of GGUF files, inputs first."""
        found = {gguf_name(name): self.sides(name.split(".", 3)[3])[::-1] for name in self.modules()}
        found["token_embd.weight"] = (self.hidden, self.vocabulary)
        if not self.tied:
            found["output.weight"] = (self.hidden, self.vocabulary)
        return dict(found)

    def info(self, **changes: Any) -> ModelInfo:
        """Return what a provider reports about it."""
        facts: dict[str, Any] = {"name": "small:1m", "metadata": self.metadata(), "tensors": self.tensors(), **changes}
        return ModelInfo(**facts)

    def write(self, path: Path, kind: str = "F32", **extra: Any) -> Path:
        """Write its GGUF file with the `gguf` package."""
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in self.metadata().items():
            if key != "general.architecture":
                writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
        writer.add_uint32(f"{self.architecture}.context_length", 512)
        writer.add_uint32(f"{self.architecture}.rope.dimension_count", self.width)
        writer.add_float32(f"{self.architecture}.attention.layer_norm_rms_epsilon", 1e-5)
        writer.add_string("tokenizer.ggml.model", "gpt2")
        writer.add_string("tokenizer.ggml.pre", "default")
        writer.add_array("tokenizer.ggml.tokens", [f"word{number}" for number in range(self.vocabulary)])
        writer.add_array("tokenizer.ggml.token_type", [1] * self.vocabulary)
        writer.add_array("tokenizer.ggml.merges", ["w o"])
        for key, value in extra.items():
            writer.add_uint32(key.replace("__", "."), value)
        for name, data in self.placed().items():
            add(writer, name, data, kind if data.ndim == 2 else "F32")
        close(writer)
        return path

    def placed(self, weights: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Return the weights with the names and the order of a GGUF file."""
        weights = weights or self.weights()
        found = {}
        for name in self.modules():
            found[gguf_name(name)] = self.ordered(name, weights[name])
        for layer in range(self.layers):
            for norm in ("attn_norm", "ffn_norm"):
                found[f"blk.{layer}.{norm}.weight"] = weights[f"{layer}.{norm}"]
        found["output_norm.weight"] = weights["norm"]
        found["token_embd.weight"] = weights["embed_tokens"]
        if not self.tied:
            found["output.weight"] = weights["lm_head"]
        return found

    def ordered(self, name: str, rows: Array) -> Array:
        """Return rows in the order of a GGUF file of the architecture."""
        if self.architecture != "llama" or not name.endswith(("q_proj", "k_proj")):
            return rows
        return neighbours(rows, self.heads if name.endswith("q_proj") else self.shared)


def gguf_name(module: str) -> str:
    """Return the name of a module in GGUF files."""
    if module in ("embed_tokens", "lm_head"):
        return {"embed_tokens": "token_embd.weight", "lm_head": "output.weight"}[module]
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{MODULES[rest]}.weight"


def neighbours(rows: Array, heads: int) -> Array:
    """Move rows, one at a time, so that pairs half a head apart become neighbours."""
    out, width = np.empty_like(rows), len(rows) // heads
    for head in range(heads):
        for pair in range(width // 2):
            for half in (0, 1):
                out[head * width + 2 * pair + half] = rows[head * width + pair + half * width // 2]
    return out


# --- A forward pass --------------------------------------------------------------------------------------------------


def logits(
    model: Model,
    weights: Mapping[str, Array],
    tokens: list[int],
    *,
    side_by_side: bool,
    until: int = 0,
    before: Mapping[str, Array] | None = None,
) -> npt.NDArray[Any]:
    """Return the logits of a llama, in F64. Weights have GGUF names; `side_by_side` is their order of rotary pairs.

    The modules of tokens until a place have the weights `before`.
    """
    earlier = {name: np.asarray(data, np.float64) for name, data in (before or {}).items()}
    held = {name: np.asarray(data, np.float64) for name, data in weights.items()}
    x = held["token_embd.weight"][tokens]
    for layer in range(model.layers):
        own = {
            name.split(".", 2)[2].removesuffix(".weight"): data
            for name, data in held.items()
            if name.startswith(f"blk.{layer}.")
        }

        def times(x: Array, name: str, layer: int = layer, own: Mapping[str, Array] = own) -> Array:
            out = x @ own[name].T
            if until:
                out[:until] = x[:until] @ earlier[f"blk.{layer}.{name}.weight"].T
            return out

        x = x + _attention(model, times, _normed(x, own["attn_norm"]), side_by_side=side_by_side)
        y = _normed(x, own["ffn_norm"])
        gate = times(y, "ffn_gate")
        x = x + times(gate / (1 + np.exp(-gate)) * times(y, "ffn_up"), "ffn_down")
    answers: npt.NDArray[Any] = _normed(x, held["output_norm.weight"]) @ held["output.weight"].T
    return answers


def _normed(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def _attention(model: Model, times: Callable[[Array, str], Array], x: Array, *, side_by_side: bool) -> Array:
    count = len(x)
    q, k, v = (
        times(x, name).reshape(count, heads, model.width)
        for name, heads in (("attn_q", model.heads), ("attn_k", model.shared), ("attn_v", model.shared))
    )
    q, k = (_turned(each, side_by_side=side_by_side) for each in (q, k))
    k, v = (np.repeat(each, model.heads // model.shared, axis=1) for each in (k, v))
    scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(model.width)
    scores = np.where(np.tril(np.ones((count, count), bool)), scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    return times(np.einsum("hij,jhd->ihd", scores, v).reshape(count, -1), "attn_output")


def _turned(x: Array, *, side_by_side: bool) -> Array:
    """Rotate each pair by its position times its frequency."""
    width = x.shape[-1]
    angle = np.arange(len(x))[:, None, None] * 10000.0 ** (-np.arange(width // 2) * 2 / width)
    cos, sin = np.cos(angle), np.sin(angle)
    one, two = (slice(0, None, 2), slice(1, None, 2)) if side_by_side else (slice(width // 2), slice(width // 2, None))
    out = np.empty_like(x)
    out[..., one] = x[..., one] * cos - x[..., two] * sin
    out[..., two] = x[..., one] * sin + x[..., two] * cos
    return out


# --- Files -----------------------------------------------------------------------------------------------------------


def add(writer: gguf.GGUFWriter, name: str, data: Array, kind: str) -> None:
    """Add a tensor of a type."""
    label = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(data, np.float32), label), raw_dtype=label)


def close(writer: gguf.GGUFWriter) -> None:
    """Write the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors_of(path: Path) -> dict[str, Array]:
    """Read the tensors of a GGUF file as F32 with the `gguf` package."""
    reader = gguf.GGUFReader(path)
    return {
        each.name: gguf.quants.dequantize(each.data, each.tensor_type).reshape(tuple(reversed(each.shape.tolist())))
        for each in reader.tensors
    }


def keys_of(path: Path) -> dict[str, Any]:
    """Read the keys of a GGUF file with the `gguf` package."""
    return {
        name: each.contents() for name, each in gguf.GGUFReader(path).fields.items() if not name.startswith("GGUF.")
    }


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The two matrices of an adapter for one module, in the original layout."""

    a: Array
    b: Array
    scale: float

    @property
    def change(self) -> Array:
        """The change of the weight, in F64."""
        return self.scale * self.b.astype(np.float64) @ self.a.astype(np.float64)


def pairs(
    model: Model,
    *,
    rank: int = 4,
    scale: float = 2.0,
    seed: int = 7,
    modules: list[str] | None = None,
    kind: Any = np.float32,
) -> dict[str, Pair]:
    """Make a random adapter, by module."""
    rng = np.random.default_rng(seed)
    found = {}
    for name in modules if modules is not None else model.modules():
        outputs, inputs = model.sides(name.split(".", 3)[3] if name.startswith("model.") else name)
        a = rng.normal(0, inputs**-0.5, (rank, inputs)).astype(kind)
        found[name] = Pair(a=a, b=rng.normal(0, 0.3, (outputs, rank)).astype(kind), scale=scale)
    return found


def write_peft(folder: Path, adapter: Mapping[str, Pair], **config: Any) -> Path:
    """Write an adapter as PEFT does. By default alpha is scale times rank."""
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(adapter.values()))
    rank = len(first.a)
    held = {}
    for name, pair in adapter.items():
        held[f"base_model.model.{name}.lora_A.weight"] = pair.a
        held[f"base_model.model.{name}.lora_B.weight"] = pair.b
    save_file(held, folder / "adapter_model.safetensors")
    known: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": "someone/small-1m",
        "r": rank,
        "lora_alpha": first.scale * rank,
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps({**known, **config}), encoding="utf-8")
    return folder


def write_mlx(
    folder: Path, adapter: Mapping[str, Pair], *, parameters: Mapping[str, Any] | None = None, **config: Any
) -> Path:
    """Write an adapter as mlx-lm does: both matrices transposed, with the scale itself."""
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(adapter.values()))
    held = {}
    for name, pair in adapter.items():
        # An embedding looks up rows of `lora_a` by token, so nothing is transposed.
        a, b = (pair.b, pair.a) if name.endswith("embed_tokens") else (pair.a.T, pair.b.T)
        held[f"{name}.lora_a"], held[f"{name}.lora_b"] = np.ascontiguousarray(a), np.ascontiguousarray(b)
    save_file(held, folder / "adapters.safetensors")
    own = {"rank": len(first.a), "scale": first.scale, "dropout": 0.0} if parameters is None else parameters
    known = {"fine_tune_type": "lora", "model": "someone/small-1m", "num_layers": 2, "lora_parameters": own}
    (folder / "adapter_config.json").write_text(json.dumps({**known, **config}), encoding="utf-8")
    return folder


def write_gguf(
    path: Path, model: Model, adapter: Mapping[str, Pair], *, kind: str = "F32", alpha: float | None = None, **keys: Any
) -> Path:
    """Write an adapter as llama.cpp's converter does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, keys.pop("architecture", model.architecture))
    writer.add_string("general.type", keys.pop("type", "adapter"))
    writer.add_string("adapter.type", keys.pop("adapter", "lora"))
    first = next(iter(adapter.values()))
    writer.add_float32("adapter.lora.alpha", first.scale * len(first.a) if alpha is None else alpha)
    for key, value in keys.items():
        writer.add_array(key.replace("__", "."), value)
    for name, pair in adapter.items():
        add(writer, f"{gguf_name(name)}.lora_a", pair.a, kind)
        add(writer, f"{gguf_name(name)}.lora_b", model.ordered(name, pair.b), "F32")
    close(writer)
    return path


# --- Plugins ---------------------------------------------------------------------------------------------------------


@dataclass
class Place:
    """A plugin whose folders are all in one place, and its requests."""

    folder: Path
    model: Model = field(default_factory=Model)

    def plugin(self, **settings: Any) -> Any:
        """Return the plugin with these folders."""
        from graftage_lora import LoraPlugin

        return LoraPlugin(**{**self.settings(), **settings})

    def settings(self) -> dict[str, Any]:
        """Return its default settings."""
        return {
            "folders": [self.folder / "adapters"],
            "registry": self.folder / "adapters.toml",
            "hub": self.folder / "hub",
            "cache": self.folder / "cache",
        }

    def resolve(self, reference: Any, *, base: Callable[[], ModelInfo | None] | None = None, **settings: Any) -> Any:
        """Return the adapter for a reference, on the small model or another base."""
        request = ResolveRequest(reference=str(reference), model="small:1m", base=base or self.model.info)
        return self.plugin(**settings).resolve_adapter(request)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def bind(registry: Path, /, **table: Any) -> None:
    """Write a registry with one name."""
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items())
    registry.write_text(f"[bound]\n{lines}\n", encoding="utf-8")


def hub(place: Place, repository: str = "models--someone--ahoy") -> Path:
    """A repository as `huggingface_hub` keeps it: links to blobs."""
    folder = place.folder / "hub" / repository
    (folder.parent / ".locks").mkdir(parents=True, exist_ok=True)
    (folder.parent / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55", encoding="ascii")
    snapshot, blobs = folder / "snapshots" / COMMIT, folder / "blobs"
    for each in (snapshot, blobs, folder / "refs"):
        each.mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT, encoding="ascii")
    for number, source in enumerate((LORA / "ahoy-peft").iterdir()):
        (blobs / f"{number:064x}").write_bytes(source.read_bytes())
        (snapshot / source.name).symlink_to(f"../../blobs/{number:064x}")
    return folder


# --- The engine ------------------------------------------------------------------------------------------------------

ENGINE = """
import json, sys, urllib.request, xllamacpp
for order in json.load(sys.stdin):
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.cpuparams.n_threads, params.verbosity = order["model"], 256, 1, 1
    params.fit_params, params.cache_ram_mib, params.n_parallel, params.warmup = False, 0, 1, False
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(each, 0.0) for each in order["adapters"]]
    server = xllamacpp.Server(params)
    for scales in order["asked"]:
        body = {"prompt": order["tokens"], "n_predict": 1, "n_probs": 4096, "temperature": 0, "cache_prompt": False}
        body["lora"] = [{"id": number, "scale": scale} for number, scale in enumerate(scales)]
        request = urllib.request.Request(server.listening_address + "/completion", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as answer:
            found = json.load(answer)["completion_probabilities"][0]["top_logprobs"]
        print(json.dumps([each["logprob"] for each in sorted(found, key=lambda each: each["id"])]))
    del server
"""
"""A server of llama.cpp in a separate process, which does not import Graftage."""


def served(tokens: Sequence[int], *orders: tuple[Path, Sequence[Path], Sequence[Sequence[float]]]) -> list[Any]:
    """Log-probabilities of all words after some tokens, for each model and each set of scales."""
    asked = [
        {"model": str(model), "adapters": [str(each) for each in adapters], "asked": scales, "tokens": list(tokens)}
        for model, adapters, scales in orders
    ]
    done = subprocess.run(
        [sys.executable, "-c", ENGINE],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [np.array(json.loads(line)) for line in done.stdout.splitlines()]
