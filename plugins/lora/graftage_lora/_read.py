"""Reads PEFT, MLX and GGUF adapters into one form, and refuses what it cannot read correctly.

Each file is opened once, its head is checked before anything is read by it, and checks, hash and weights come from the
same descriptor. Memory is bounded by a few times `max_bytes`. Pickles are never read, and paths in a configuration are
never followed.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import numpy as np

from graftage.gguf import INVOCATION, MAGIC, Header, Tensor, bytes_of
from graftage_lora._architectures import EMBEDDING, LEAVE_OUT, OUTPUT, clean_name, gguf_name, tower_of
from graftage_lora._configs import (
    MAX_RANK,
    MERGE,
    Config,
    Scales,
    invocation_tokens,
    is_finite,
    parse_json,
    read_config,
)
from graftage_lora._files import MORE, CheckedFile, Files, Refused, read_head
from graftage_lora._lora import Array, Facts, Lora, Part, checked_scale

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["FLOATS", "dequantize", "read"]

MAX_HEADER: Final = 4 << 20
"""The largest head of a safetensors file; 27,000 tensors fit."""
MAX_TENSORS: Final = 65_536
MAX_NAME: Final = 1024
MAX_SIDE: Final = 1 << 31
UNGATHERED: Final = "DeepSpeed and FSDP must gather the parameters before they are saved."
FLOATS: Final = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}

Halves: TypeAlias = dict[str, dict[str, Array]]
"""The `a` and `b` of each tensor."""


def read(files: Files, *, max_bytes: int, leave_out_vision: bool) -> Lora:
    """Read the adapter in some files, at most so many bytes; without what it changes in a tower, or refuse that.

    Raises:
        Refused: it is malformed, unsafe or not supported.
    """
    with CheckedFile(files.weights, within=files.within, limit=max_bytes, more=MORE) as file:
        start = file.peek(8)
        if files.config is None and start.startswith(MAGIC):
            return _read_gguf(file, max_bytes)
        _refuse_pickle(start, file.name)
        if files.config is None:
            raise Refused(f"`{file.name}` is neither safetensors nor GGUF")
        return _read_safetensors(file, read_config(files), leave_out_vision=leave_out_vision)


def _refuse_pickle(start: bytes, name: str) -> None:
    zipped, pickled, array = start.startswith(b"PK\x03\x04"), start[:1] == b"\x80", start.startswith(b"\x93NUMPY")
    # The second byte of a pickle is its protocol; that of a safetensors file is part of a length.
    if zipped or array or (pickled and start[1:2] in b"\x02\x03\x04\x05" and any(start[3:8])):
        raise Refused(
            f"`{name}` is a pickle or a NumPy archive, which can run code when it is read",
            "Save the adapter as safetensors.",
        )


# --- Safetensors -----------------------------------------------------------------------------------------------------

PEFT_NAME: Final = re.compile(r"(.+?)\.lora_(embedding_)?([AB])(?:\.[\w-]+?)??(\.weight)?")
MLX_NAME: Final = re.compile(r"(.+)\.lora_([ab])")
WHOLE: Final = re.compile(r"(.+?)(?:\.base_layer\..+|\.weight)")
"""A weight of the base model, which PEFT also saves for an embedding and an output that it has trained."""
UNEXPECTED: Final = {
    "lora_magnitude_vector": "a DoRA magnitude",
    "modules_to_save": "a saved module",
    ".bias": "a bias",
}


class Entry(NamedTuple):
    """A tensor of a safetensors file, not yet checked or converted."""

    kind: str
    shape: list[int]
    start: int
    end: int


def _read_safetensors(file: CheckedFile, config: Config, *, leave_out_vision: bool) -> Lora:
    split = _peft_half if config.layout == "peft" else _mlx_half
    entries, data = _safetensors(file)
    halves: Halves = {}
    modules: dict[str, str] = {}
    whole: dict[str, tuple[str, Entry]] = {}
    left_out: dict[str, str] = {}
    for name, entry in entries.items():
        module, half, turned = split(name.removeprefix("base_model.model."))
        if tower := tower_of(module):
            if not leave_out_vision:
                raise Refused(f"`{module[:120]}` belongs to {tower}, which adapters cannot change here", LEAVE_OUT)
            left_out[module] = tower
            continue
        tensor = gguf_name(module)
        if modules.setdefault(tensor, module) != module:
            raise Refused(f"`{modules[tensor][:120]}` and `{module[:120]}` are two names of one module")
        if half:
            array = _entry_array(name, entry, data)
            _add(halves, tensor, half, array.T if turned else array)
        else:
            whole[name] = tensor, entry
    for name, (tensor, entry) in whole.items():
        _check_whole(name, tensor, entry, halves.get(tensor, {}))
    found = _pair(halves, lambda tensor, rank: config.scale(modules[tensor], rank))
    towers = " and ".join(sorted(set(left_out.values())))
    left = f"Modules of {towers} are left out ({len(left_out)}): only the language model is changed."
    return _lora(
        [replace(part, module=clean_name(modules[part.tensor])) for part in found],
        layout=config.layout,
        sha256=file.sha256,
        base_model=config.base_model,
        invocation=config.invocation,
        targets=config.targets,
        warnings=(left,) if left_out else (),
    )


def _peft_half(name: str) -> tuple[str, str, bool]:
    """Return the module of a tensor, which half it is (`""` for a whole weight), and whether it is transposed."""
    if what := next((words for part, words in UNEXPECTED.items() if part in name and "base_layer" not in name), None):
        raise Refused(f"the tensor `{name[:120]}` is {what}")
    match = PEFT_NAME.fullmatch(name)
    if match is None and (whole := WHOLE.fullmatch(name)):
        return whole[1], "", False
    if match is None or bool(match[2]) == bool(match[4]):
        raise _unpaired(name)
    half = match[3].lower()
    if match[2]:
        # For an embedding, PEFT adds the transpose of B @ A: the halves change places.
        return match[1], "b" if half == "a" else "a", True
    return match[1], half, False


def _mlx_half(name: str) -> tuple[str, str, bool]:
    if name.endswith(".m"):
        raise Refused("it is a DoRA adapter, which no supported server can apply")
    match = MLX_NAME.fullmatch(name)
    if match is None:
        raise _unpaired(name)
    if gguf_name(match[1]) == EMBEDDING:
        # For an embedding, mlx-lm looks up rows of `lora_a` by token: that is our B.
        return match[1], "b" if match[2] == "a" else "a", False
    return match[1], match[2], True


def _unpaired(name: str) -> Refused:
    return Refused(f"the tensor `{name[:120]}` is not one half of a LoRA pair")


def _check_whole(name: str, tensor: str, entry: Entry, pair: Mapping[str, Array]) -> None:
    """Check that a weight is the untouched one of a module that the adapter changes by its halves."""
    if len(pair) < 2 and tensor in (EMBEDDING, OUTPUT):
        raise Refused(
            f"it contains the whole weight `{name[:120]}` of the shape {str(entry.shape)[:60]}: the vocabulary was"
            " resized, or the module was trained as a whole, which no server can apply",
            MERGE,
        )
    if len(pair) < 2:
        raise Refused(f"the tensor `{name[:120]}` is a whole weight, not one half of a LoRA pair")
    sides = [len(pair["b"]), pair["a"].shape[1]]
    # A quantised weight has another shape.
    if name.endswith(".weight") and entry.kind in FLOATS and entry.shape != sides:
        raise Refused(f"the tensor `{name[:120]}` has the shape {str(entry.shape)[:60]}, but its halves {sides}")


def _safetensors(file: CheckedFile) -> tuple[dict[str, Entry], memoryview]:
    """Read the tensors of a safetensors file, by the rules of its reference reader and a few more for adapters."""
    if file.size < 8:
        raise Refused(f"`{file.name}` is too short to be safetensors")
    (length,) = struct.unpack("<Q", file.take(8, "head"))
    if length > min(MAX_HEADER, file.left):
        raise Refused(f"its head states a length of {length} bytes, more than the file or any adapter has")
    text = file.take(length, "head")
    if text.count(b"{") > MAX_TENSORS + 2 or text.count(b"[") > 2 * MAX_TENSORS + 2:
        raise Refused(f"it states more than {MAX_TENSORS} tensors")
    table = parse_json(text, "its head")
    notes = table.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(each, str) for each in notes.values()):
        raise Refused("its `__metadata__` is not a table of texts")
    if not table:
        raise Refused("it contains no tensors")
    entries = {name: _check_entry(name, entry) for name, entry in table.items()}
    _check_ranges(entries, file.left)
    return entries, file.rest()


def _check_entry(name: str, entry: object) -> Entry:
    label = f"the tensor `{name[:120]}`"
    if len(name) > MAX_NAME:
        raise Refused(f"{label} has a name of {len(name)} characters; at most {MAX_NAME} are allowed")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Refused(f"{label} must have exactly dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    ordered = _are_integers(offsets) and len(offsets) == 2 and 0 <= offsets[0] <= offsets[1]
    checks = (
        ("type", kind, isinstance(kind, str)),
        ("shape", shape, _are_integers(shape)),
        ("data_offsets", offsets, ordered),
    )
    for what, value, valid in checks:
        if not valid:
            raise Refused(f"{label} has the invalid {what} {str(value)[:60]}")
    return Entry(kind, shape, *offsets)


def _entry_array(name: str, entry: Entry, data: memoryview) -> Array:
    label, kind, shape = f"the tensor `{name[:120]}`", entry.kind, entry.shape
    if kind not in FLOATS:
        raise Refused(f"{label} has the type {kind[:20]}; it must be F32, F16 or BF16")
    if len(shape) != 2 or not all(1 <= side < MAX_SIDE for side in shape):
        raise Refused(f"{label} has the shape {str(shape)[:60]}; it must have two sides of at least 1", UNGATHERED)
    if shape[0] * shape[1] * np.dtype(FLOATS[kind]).itemsize != entry.end - entry.start:
        raise Refused(f"{label} has {entry.end - entry.start} bytes, which contradicts its shape {shape}")
    return _array(name, kind, data[entry.start : entry.end]).reshape(shape)


def _are_integers(value: object) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in value)


def _check_ranges(entries: Mapping[str, Entry], size: int) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != position:
            what = "overlaps another one" if entry.start < position else "leaves a gap before it"
            raise Refused(f"the tensor `{name[:120]}` {what}")
        position = entry.end
    if position != size:
        what = "reach past the end of the file" if position > size else "leave bytes at its end unused"
        raise Refused(f"its tensors {what}")


# --- GGUF ------------------------------------------------------------------------------------------------------------


def _read_gguf(file: CheckedFile, max_bytes: int) -> Lora:
    header = read_head(file)
    keys = header.metadata
    if not header.is_adapter:
        raise Refused("it is a whole model, not an adapter", "Use it as the model instead.")
    if keys.get("adapter.type") != "lora":
        raise Refused(f"`adapter.type` must be lora, not {str(keys.get('adapter.type'))[:40]}")
    if not header.architecture:
        raise Refused("its `general.architecture` is missing")
    decoded = sum(4 * math.prod(each.shape) for each in header.tensors.values() if each.kind not in FLOATS)
    if decoded > max_bytes:
        raise Refused(f"its quantised tensors have {decoded:,} bytes as F32; at most {max_bytes:,} are allowed", MORE)
    halves, skipped = _gguf_halves(file, header)
    alpha = keys.get("adapter.lora.alpha", 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not is_finite(alpha):
        raise Refused(f"`adapter.lora.alpha` must be a finite number, not {str(alpha)[:40]}")
    # As in llama.cpp: alpha / rank, or 1 if alpha is 0 or missing.
    parts = _pair(halves, lambda _, rank: alpha / rank if alpha else 1.0)
    return _lora(
        parts,
        layout="gguf",
        sha256=file.sha256,
        architecture=header.architecture,
        base_model=_gguf_base(keys),
        invocation=invocation_tokens(keys.get(INVOCATION)),
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
                what = "a bias" if tensor.name.endswith(".bias") else "not one half of a LoRA pair"
                raise Refused(f"the tensor `{tensor.name[:120]}` is {what}")
            skipped += 1
            continue
        if len(tensor.shape) != 2:
            raise Refused(f"the tensor `{tensor.name}` has {len(tensor.shape)} dimensions; it must have 2")
        part = data[tensor.offset - header.data :][: tensor.size]
        flat = (
            _array(tensor.name, tensor.kind, part)
            if tensor.kind in FLOATS
            else _checked(tensor.name, dequantize(tensor, part))
        )
        array = flat.reshape(tensor.shape[::-1])
        if name == EMBEDDING:
            # llama.cpp looks up rows of A by token: A is stored transposed, in place of B.
            half, array = ("b", array) if half == "a" else ("a", array.T)
        _add(halves, name, half, array)
    return halves, skipped


def _gguf_base(keys: Mapping[str, object]) -> str | None:
    name, owner = (keys.get(f"general.base_model.0.{key}") for key in ("name", "organization"))
    if not isinstance(name, str) or not name:
        return None
    return f"{owner}/{name}" if isinstance(owner, str) and owner else name


# --- Both ------------------------------------------------------------------------------------------------------------


def _array(name: str, kind: str, data: memoryview) -> Array:
    array = np.frombuffer(data, FLOATS[kind])
    if kind == "BF16":  # The upper half of an F32.
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return _checked(name, array)


def _checked(name: str, array: Array) -> Array:
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
        if len(a) != b.shape[1] or len(a) > MAX_RANK:
            raise Refused(
                f"`{tensor[:120]}` has the ranks {len(a)} and {b.shape[1]}; they must be equal, at most {MAX_RANK}"
            )
        parts.append(Part(tensor=tensor, a=a, b=b, scale=checked_scale(scale(tensor, len(a)))))
    return parts


def _lora(parts: Iterable[Part], **facts: Any) -> Lora:
    found = tuple(parts)
    if not found:
        raise Refused("it contains no LoRA pairs")
    if not any(part.a.any() and part.b.any() for part in found):
        raise Refused("all its changes are zero", "Train it before you save it.")
    return Lora(facts=Facts(shapes=tuple(part.shape for part in found), **facts), parts=found)


def dequantize(tensor: Tensor, data: Any) -> npt.NDArray[np.float32]:
    """Convert whole rows of a tensor to F32, or refuse a type that the `gguf` package does not know."""
    from gguf import GGMLQuantizationType, quants  # Takes a quarter of a second.

    rows = np.frombuffer(data, np.uint8).reshape(-1, bytes_of(tensor.kind, tensor.shape[0]))
    try:
        with np.errstate(all="ignore"):  # Callers check for NaN and infinity.
            return quants.dequantize(rows, GGMLQuantizationType[tensor.kind])
    except (NotImplementedError, KeyError, ValueError):
        raise Refused(f"the tensor `{tensor.name}` has the type {tensor.kind}, which cannot be read") from None
