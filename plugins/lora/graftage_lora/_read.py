"""Reads PEFT, MLX and GGUF adapters into one form, and refuses what it cannot read correctly.

Each file is opened once, its head is checked before anything is read by it, and checks, hash and weights come from the
same descriptor. Memory is bounded by the file's size. Pickles are never read, and paths in a configuration are never
followed.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np

from graftage.gguf import MAGIC, Header, Tensor, bytes_of
from graftage_lora._architectures import EMBEDDING, clean_name, gguf_name
from graftage_lora._files import CheckedFile, Files, Refused, read_head
from graftage_lora._lora import Array, Facts, Lora, Part, checked_scale

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["MAX_BYTES", "dequantize", "read", "stated_base"]

MAX_BYTES: Final = 2 << 30
MAX_CONFIG: Final = 1 << 20
MAX_HEADER: Final = 4 << 20
"""The largest head of a safetensors file; 27,000 tensors fit."""
MAX_TENSORS: Final = 65_536
MAX_NAME: Final = 1024
MAX_RANK: Final = 1024
MAX_SIDE: Final = 1 << 31
FLOATS: Final = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}

Halves: TypeAlias = dict[str, dict[str, Array]]
"""The `a` and `b` of each tensor."""
Scales: TypeAlias = Callable[[str], tuple[int | None, float]]
"""Returns a module's scale, and its rank if that is stated."""


def read(files: Files, *, max_bytes: int = MAX_BYTES) -> Lora:
    """Read the adapter in some files.

    Raises:
        Refused: it is malformed, unsafe or not supported.
    """
    with CheckedFile(files.weights, within=files.within, limit=max_bytes) as file:
        start = file.peek(8)
        if start.startswith(MAGIC):
            return _read_gguf(file)
        _refuse_pickle(start, file.name)
        if files.config is None:
            raise Refused(f"`{file.name}` is neither safetensors nor GGUF")
        return _read_safetensors(file, _config(files))


def stated_base(files: Files) -> str | None:
    """Return the base model that an adapter names; `None` also for a broken adapter, for use in lists."""
    try:
        if files.config is not None:
            return _config_base(_config(files))
        with CheckedFile(files.weights, within=files.within) as file:
            return _gguf_base(read_head(file).metadata)
    except Refused:
        return None


def _refuse_pickle(start: bytes, name: str) -> None:
    zipped, pickled, array = start.startswith(b"PK\x03\x04"), start[:1] == b"\x80", start.startswith(b"\x93NUMPY")
    # The second byte of a pickle is its protocol; that of a safetensors file is part of a length.
    if zipped or array or (pickled and start[1:2] in b"\x02\x03\x04\x05" and any(start[3:8])):
        raise Refused(
            f"`{name}` is a pickle or a NumPy archive, which can run code when it is read",
            "Save the adapter as safetensors.",
        )


# --- Configurations --------------------------------------------------------------------------------------------------


def _config(files: Files) -> dict[str, Any]:
    if files.config is None or not files.config.exists():
        raise Refused("`adapter_config.json` with the scale is missing", "Put it beside the weights.")
    with CheckedFile(files.config, within=files.within, limit=MAX_CONFIG) as file:
        return _json(bytes(file.rest()), f"`{file.name}`")


def _json(data: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, _JsonRule) else "it is not valid JSON"
        raise Refused(f"{what} cannot be read: {reason}") from None
    if not isinstance(found, dict):
        raise Refused(f"{what} is not a JSON object")
    return found


class _JsonRule(ValueError):
    """JSON that is valid and not accepted."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _JsonRule("it has a key twice")
    return found


def _no_constant(name: str) -> Any:
    raise _JsonRule(f"it contains {name}")


def _text(config: Mapping[str, object], key: str) -> str | None:
    found = config.get(key)
    return found if isinstance(found, str) and found else None


def _config_base(config: Mapping[str, object]) -> str | None:
    return _text(config, "base_model_name_or_path") or _text(config, "model")


def _number(config: Mapping[str, object], key: str, default: float | None = None) -> float:
    """Return a finite number other than 0: a scale of 0 would change nothing."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value or not _is_finite(value):
        raise Refused(f"`{key}` must be a finite number other than 0, not {str(value)[:40]}")
    return float(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _rank(value: object, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise Refused(f"`{key}` must be an integer from 1 to {MAX_RANK}, not {str(value)[:40]}")
    return value


REFUSED_FIELDS: Final[Mapping[str, str]] = {
    "lora_bias": "it trains separate biases",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it trains single tokens",
    "layer_replication": "it repeats layers of the base model",
    "target_parameters": "it targets bare parameters",
    "arrow_config": "it routes between adapters",
    "monteclora_config": "it samples its weights",
    "velora_config": "it projects its inputs",
}
REFUSED_INITS: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that also change the base model: the saved halves are not the whole change."""


def _check_peft(config: Mapping[str, object]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise Refused(f"`peft_type` must be LORA, not {str(kind)[:40]}")
    for key, reason in REFUSED_FIELDS.items():
        if config.get(key):
            raise Refused(f"`{key}` is set: {reason}, which no supported server can apply")
    for key, value in config.items():
        if key.startswith("use_") and key != "use_rslora" and value:
            raise Refused(f"`{key[:40]}` is set: no supported server can apply this variant of LoRA")
    if config.get("bias", "none") not in ("none", None):
        raise Refused("`bias` is set: it trains the biases of the base model")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(REFUSED_INITS):
        raise Refused(
            f"it was initialised by `{start[:40]}`, which also changes the base model",
            "Save it with `path_initial_model_for_weight_conversion`.",
        )


def _peft_scales(config: Mapping[str, object]) -> Scales:
    """Return PEFT's scales: alpha / r, or alpha / sqrt(r) with rsLoRA; patterns override single modules."""
    rank = _rank(config.get("r"), "r")
    alpha = _number(config, "lora_alpha")
    ranks = {key: _rank(value, "rank_pattern") for key, value in _pattern(config, "rank_pattern").items()}
    alphas = {
        key: _number({"alpha_pattern": value}, "alpha_pattern")
        for key, value in _pattern(config, "alpha_pattern").items()
    }
    power = 0.5 if config.get("use_rslora") else 1.0

    def scale(module: str) -> tuple[int, float]:
        own = _match_pattern(ranks, module, rank)
        return own, _match_pattern(alphas, module, alpha) / own**power

    return scale


def _pattern(config: Mapping[str, object], key: str) -> Mapping[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, dict) or len(found) > MAX_TENSORS:
        raise Refused(f"`{key}` is not a JSON object")
    for name in found:
        # PEFT accepts any regular expression, and some run forever.
        if not re.fullmatch(r"\^?[\w.]+", name):
            raise Refused(f"`{key}` has the pattern `{name[:80]}`; only names are supported, not expressions")
    return found


def _match_pattern(figures: Mapping[str, object], module: str, default: object) -> Any:
    """Find the first key that is the module's name, or its end after a dot, as PEFT's `get_pattern_key` does."""
    for key, value in figures.items():
        name = key.removeprefix("^")
        if module == name or (name == key and module.endswith(f".{name}")):
            return value
    return default


def _check_mlx(config: Mapping[str, object]) -> None:
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise Refused(f"`fine_tune_type` must be lora, not {str(kind)[:40]}")


def _mlx_scales(config: Mapping[str, object]) -> Scales:
    """Return mlx-lm's scales: the scale as stated, 20 by default; no alpha."""
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise Refused("`lora_parameters` with the scale are missing")
    rank = _rank(parameters["rank"], "rank") if "rank" in parameters else None
    scale = _number(parameters, "scale", 20.0)
    if "alpha" in parameters and parameters["alpha"] != rank:
        # Releases of 2024 multiplied by alpha / rank; later ones ignore the alpha of an old configuration.
        raise Refused(
            "`lora_parameters` have an `alpha`, whose meaning depends on the release of mlx-lm",
            "Remove it, and multiply `scale` by alpha / rank if the adapter was trained before October 2024.",
        )
    return lambda _: (rank, scale)


def _invocation(value: object) -> tuple[int, ...]:
    if not value:
        return ()
    tokens = tuple(value) if isinstance(value, (list, tuple)) else (-1,)
    if len(tokens) > 4096 or not all(type(each) is int and 0 <= each < MAX_SIDE for each in tokens):
        raise Refused("its invocation tokens are not a list of token numbers")
    return tokens


# --- Safetensors -----------------------------------------------------------------------------------------------------

PEFT_NAME: Final = re.compile(r"(?:base_model\.model\.)?(.+?)\.lora_(embedding_)?([AB])(?:\.[\w-]+?)??(\.weight)?")
MLX_NAME: Final = re.compile(r"(.+)\.lora_([ab])")
UNEXPECTED: Final = {
    "lora_magnitude_vector": "a DoRA magnitude",
    ".bias": "a bias",
    "modules_to_save": "a saved module",
    "base_layer": "a weight of the base model",
}


def _read_safetensors(file: CheckedFile, config: Mapping[str, object]) -> Lora:
    layout: Literal["peft", "mlx"]
    if "peft_type" in config:
        layout, check, scales, named = "peft", _check_peft, _peft_scales, _peft_half
    elif "lora_parameters" in config or "fine_tune_type" in config:
        layout, check, scales, named = "mlx", _check_mlx, _mlx_scales, _mlx_half
    else:
        raise Refused("its configuration is neither PEFT's (`peft_type`) nor mlx-lm's (`lora_parameters`)")
    check(config)
    scale = scales(config)
    halves: Halves = {}
    modules: dict[str, str] = {}
    for name, data in _safetensors(file).items():
        module, half, array = named(name, data)
        tensor = gguf_name(module)
        if modules.setdefault(tensor, module) != module:
            raise Refused(f"`{modules[tensor][:120]}` and `{module[:120]}` are two names of one module")
        _add(halves, tensor, half, array)
    found = _pair(halves, lambda tensor: scale(modules[tensor]))
    parts = [replace(part, module=clean_name(modules[part.tensor])) for part in found]
    return _lora(
        parts,
        layout=layout,
        sha256=file.sha256,
        base_model=_config_base(config),
        invocation=_invocation(config.get("alora_invocation_tokens")),
    )


def _peft_half(name: str, data: Array) -> tuple[str, str, Array]:
    match = PEFT_NAME.fullmatch(name)
    if match is None or bool(match[2]) == bool(match[4]):
        raise Refused(_unexpected(name))
    half = match[3].lower()
    if match[2]:
        # For an embedding, PEFT adds the transpose of B @ A: the halves change places.
        return match[1], "b" if half == "a" else "a", data.T
    return match[1], half, data


def _mlx_half(name: str, data: Array) -> tuple[str, str, Array]:
    if name.endswith(".m"):
        raise Refused("it is a DoRA adapter, which no supported server can apply")
    match = MLX_NAME.fullmatch(name)
    if match is None:
        raise Refused(_unexpected(name))
    if gguf_name(match[1]) == EMBEDDING:
        # For an embedding, mlx-lm looks up rows of `lora_a` by token: that is our B.
        return match[1], "b" if match[2] == "a" else "a", data
    return match[1], match[2], data.T


def _unexpected(name: str) -> str:
    what = next((words for part, words in UNEXPECTED.items() if part in name), "not one half of a LoRA pair")
    return f"the tensor `{name[:120]}` is {what}"


def _safetensors(file: CheckedFile) -> dict[str, Array]:
    """Read the tensors of a safetensors file, by the rules of its reference reader and a few more for adapters."""
    if file.size < 8:
        raise Refused(f"`{file.name}` is too short to be safetensors")
    (length,) = struct.unpack("<Q", file.take(8, "head"))
    if length > min(MAX_HEADER, file.left):
        raise Refused(f"its head states a length of {length} bytes, more than the file or any adapter has")
    text = file.take(length, "head")
    if text.count(b"{") > MAX_TENSORS + 2 or text.count(b"[") > 2 * MAX_TENSORS + 2:
        raise Refused(f"it states more than {MAX_TENSORS} tensors")
    table = _json(text, "its head")
    notes = table.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(each, str) for each in notes.values()):
        raise Refused("its `__metadata__` is not a table of texts")
    if not table:
        raise Refused("it contains no tensors")
    places = {name: _check_entry(name, entry) for name, entry in table.items()}
    _check_ranges(places, file.left)
    data = file.rest()
    return {name: _array(name, data[start:end], kind, shape) for name, (kind, shape, start, end) in places.items()}


def _check_entry(name: str, entry: object) -> tuple[str, tuple[int, int], int, int]:
    label = f"the tensor `{name[:120]}`"
    if len(name) > MAX_NAME:
        raise Refused(f"{label} has a name of {len(name)} characters; at most {MAX_NAME} are allowed")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Refused(f"{label} must have exactly dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in FLOATS:
        raise Refused(f"{label} has the type {str(kind)[:20]}; it must be F32, F16 or BF16")
    if not _are_integers(shape, 2) or not all(1 <= side < MAX_SIDE for side in shape):
        raise Refused(f"{label} has the shape {str(shape)[:60]}; it must have two sides of at least 1")
    if not _are_integers(offsets, 2) or not 0 <= offsets[0] < offsets[1]:
        raise Refused(f"{label} has the invalid data_offsets {str(offsets)[:60]}")
    width = np.dtype(FLOATS[kind]).itemsize
    if shape[0] * shape[1] * width != offsets[1] - offsets[0]:
        raise Refused(f"{label} has {offsets[1] - offsets[0]} bytes, which contradicts its shape {shape}")
    return FLOATS[kind], (shape[0], shape[1]), offsets[0], offsets[1]


def _are_integers(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(type(each) is int for each in value)


def _check_ranges(places: Mapping[str, tuple[str, tuple[int, int], int, int]], size: int) -> None:
    position = 0
    for name, (_, _, start, end) in sorted(places.items(), key=lambda item: item[1][2]):
        if start != position:
            what = "overlaps another one" if start < position else "leaves a gap before it"
            raise Refused(f"the tensor `{name[:120]}` {what}")
        position = end
    if position != size:
        what = "reach past the end of the file" if position > size else "leave bytes at its end unused"
        raise Refused(f"its tensors {what}")


# --- GGUF ------------------------------------------------------------------------------------------------------------


def _read_gguf(file: CheckedFile) -> Lora:
    header = read_head(file)
    keys = header.metadata
    if not header.is_adapter:
        raise Refused("it is a whole model, not an adapter", "Use it as the model instead.")
    if keys.get("adapter.type") != "lora":
        raise Refused(f"`adapter.type` must be lora, not {str(keys.get('adapter.type'))[:40]}")
    if not header.architecture:
        raise Refused("its `general.architecture` is missing")
    halves, skipped = _gguf_halves(file, header)
    alpha = keys.get("adapter.lora.alpha", 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not _is_finite(alpha):
        raise Refused(f"`adapter.lora.alpha` must be a finite number, not {str(alpha)[:40]}")
    # As in llama.cpp: alpha / rank, or 1 if alpha is 0 or missing.
    parts = _pair(halves, lambda tensor: (None, alpha / halves[tensor]["b"].shape[1] if alpha else 1.0))
    return _lora(
        parts,
        layout="gguf",
        sha256=file.sha256,
        architecture=header.architecture,
        base_model=_gguf_base(keys),
        invocation=_invocation(keys.get("adapter.alora.invocation_tokens")),
        warnings=(f"{skipped} norm tensors of the adapter are ignored: no server applies them.",) if skipped else (),
    )


def _gguf_halves(file: CheckedFile, header: Header) -> tuple[Halves, int]:
    file.take(header.data - file.position if header.data <= file.size else 0, "padding")
    data = file.rest()
    halves: Halves = {}
    skipped = 0
    for tensor in header.tensors.values():
        name, _, half = tensor.name.rpartition(".lora_")
        if half not in ("a", "b"):
            if not tensor.name.endswith("_norm.weight"):
                raise Refused(_unexpected(tensor.name))
            skipped += 1
            continue
        if len(tensor.shape) != 2:
            raise Refused(f"the tensor `{tensor.name}` has {len(tensor.shape)} dimensions; it must have 2")
        array = _gguf_array(tensor, data[tensor.offset - header.data :][: tensor.size])
        if name == EMBEDDING:
            # llama.cpp looks up rows of A by token: A is stored transposed, in place of B.
            half, array = ("b", array) if half == "a" else ("a", array.T)
        _add(halves, name, half, array)
    return halves, skipped


def _gguf_array(tensor: Tensor, data: memoryview) -> Array:
    shape = (tensor.shape[1], tensor.shape[0])
    if tensor.kind in FLOATS:
        return _array(tensor.name, data, FLOATS[tensor.kind], shape)
    return _finite_array(tensor.name, dequantize(tensor, data).reshape(shape))


def _gguf_base(keys: Mapping[str, object]) -> str | None:
    name = _text(keys, "general.base_model.0.name")
    owner = _text(keys, "general.base_model.0.organization")
    return f"{owner}/{name}" if name and owner else name


# --- Both ------------------------------------------------------------------------------------------------------------


def _array(name: str, data: memoryview, kind: str, shape: tuple[int, int]) -> Array:
    array = np.frombuffer(data, kind).reshape(shape)
    if kind == "<u2":  # BF16 is the upper half of an F32
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return _finite_array(name, array)


def _finite_array(name: str, array: Array) -> Array:
    if not np.isfinite(array).all():
        raise Refused(f"the tensor `{name[:120]}` contains NaN or infinity")
    return array


def _add(halves: Halves, tensor: str, half: str, array: Array) -> None:
    pair = halves.setdefault(tensor, {})
    if half in pair:
        raise Refused(f"`{tensor[:120]}` has its half {half.upper()} twice")
    pair[half] = array


def _pair(halves: Halves, scale: Scales) -> list[Part]:
    parts = []
    for tensor, pair in sorted(halves.items()):
        if missing := {"a", "b"} - set(pair):
            raise Refused(f"`{tensor[:120]}` lacks its half {missing.pop().upper()}")
        a, b = pair["a"], pair["b"]
        rank, factor = scale(tensor)
        if len(a) != b.shape[1] or len(a) > MAX_RANK:
            raise Refused(
                f"`{tensor[:120]}` has the ranks {len(a)} and {b.shape[1]}; they must be equal, at most {MAX_RANK}"
            )
        if rank is not None and rank != len(a):
            raise Refused(f"`{tensor[:120]}` has the rank {len(a)}, but its configuration states {rank}")
        parts.append(Part(tensor=tensor, a=a, b=b, scale=checked_scale(factor)))
    return parts


def _lora(parts: Iterable[Part], **facts: Any) -> Lora:
    found = tuple(parts)
    if not found:
        raise Refused("it contains no LoRA pairs")
    if not any(part.a.any() and part.b.any() for part in found):
        raise Refused("all its changes are zero", "Train it before you save it.")
    return Lora(facts=Facts(shapes=tuple(part.shape for part in found), **facts), parts=found)


def dequantize(tensor: Tensor, data: Any) -> npt.NDArray[np.float32]:
    """Convert whole rows of a tensor to F32.

    Raises:
        Refused: the `gguf` package does not know the type.
    """
    from gguf import GGMLQuantizationType, quants  # Takes a quarter of a second.

    rows = np.frombuffer(data, np.uint8).reshape(-1, bytes_of(tensor.kind, tensor.shape[0]))
    try:
        with np.errstate(all="ignore"):  # Callers check for NaN and infinity.
            return quants.dequantize(rows, GGMLQuantizationType[tensor.kind])
    except (NotImplementedError, KeyError, ValueError):
        raise Refused(f"the tensor `{tensor.name}` has the type {tensor.kind}, which cannot be read") from None
