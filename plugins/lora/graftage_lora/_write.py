"""Writes adapters as GGUF files for servers, and base models with an adapter merged into them.

Equal content gives an equal adapter: it contains neither name nor time nor path. llama.cpp has one alpha per file and
divides it by each pair's rank, so differing scales are folded into B.

A merged model is written from start to end. Keys, values and untouched tensors are copied; touched tensors are read in
blocks of rows, changed and quantised again. A coarse type would lose part of a small change, so they become Q8_0 by
default; a tensor of floats keeps its type.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from graftage.gguf import ALIGNMENT, ARRAY, BLOCKS, INVOCATION, MAGIC, SCALARS, STRING, TYPES, Header, Tensor, bytes_of
from graftage_lora._architectures import ARCHITECTURES, EMBEDDING, is_placed, no_row, why_misplaced
from graftage_lora._files import CheckedFile, Refused
from graftage_lora._lora import Array, Lora, Part, even_scale
from graftage_lora._read import FLOATS, dequantize

if TYPE_CHECKING:
    from typing import IO

__all__ = ["DIGEST", "SCALE", "Step", "atomic_file", "encode", "merge", "store"]

Value: TypeAlias = tuple[int, Any]
"""A key's type and value."""
STALE: Final = 3600.0
"""Seconds without a write after which a file counts as abandoned; a merge writes several times a second."""


def encode(lora: Lora, metadata: Mapping[str, object]) -> bytes:
    """Encode an adapter as GGUF for a base model with this metadata; refuse modules without a known name there."""
    _check_placed(lora, metadata)
    alpha = Counter(part.scale * len(part.a) for part in lora.parts).most_common(1)[0][0]
    tensors: list[tuple[str, Array]] = []
    for part in lora.parts:
        a, b = part.a, even_scale(lora.rows(part, metadata), part.scale * len(part.a) / alpha)
        if part.tensor == EMBEDDING:
            a, b = b, a.T  # llama.cpp looks up rows of A by token, so the halves change places.
        tensors += (f"{part.tensor}.lora_a", a), (f"{part.tensor}.lora_b", b)
    values: dict[str, Value] = {
        "general.architecture": (STRING, lora.facts.architecture or metadata["general.architecture"]),
        "general.type": (STRING, "adapter"),
        "adapter.type": (STRING, "lora"),
        "adapter.lora.alpha": (FLOAT32, alpha),
    }
    if lora.facts.invocation:
        values[INVOCATION] = (ARRAY, lora.facts.invocation)
    lines = [(name, data.shape[::-1], f"F{8 * data.dtype.itemsize}", data.nbytes) for name, data in tensors]
    data = [each.tobytes() + bytes(_padding(each.nbytes, ALIGNMENT)) for _, each in tensors]
    return _encoded_head(3, len(values), _key_values(values), lines, ALIGNMENT) + b"".join(data)


def _check_placed(lora: Lora, metadata: Mapping[str, object]) -> None:
    """Refuse an adapter whose modules have no known places in a model with this metadata."""
    architecture = str(metadata.get("general.architecture"))
    row = ARCHITECTURES.get(architecture)
    if lora.facts.layout != "gguf" and row is None:
        raise Refused(no_row(architecture))
    for part in lora.parts:
        why = why_misplaced(part.module, part.tensor, row) if part.module and row else None
        if why or not is_placed(part.tensor):
            raise Refused(f"`{(part.module or part.tensor)[:120]}` {why or 'is not a known module'}")


# --- Atomic files ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(out: Path) -> Iterator[IO[bytes]]:
    """Write a file that appears under its name only once complete; leave nothing after an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for part in out.parent.glob(f".{glob.escape(out.name[:80])}.*.part"):  # Killed runs have left them.
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE:
                part.unlink()
    descriptor, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name[:80]}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # There may be no file yet.
            shutil.copymode(out, name)
        Path(name).replace(out)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def store(content: bytes | Mapping[str, bytes], path: Path) -> Path:
    """Keep a GGUF file, or a folder of files, whose name gets the start of a SHA-256 at its end."""
    if isinstance(content, bytes):
        return _keep(path.with_name(f"{path.name}-{hashlib.sha256(content).hexdigest()[:16]}.gguf"), content)
    found = hashlib.sha256()
    for each, data in sorted(content.items()):
        found.update(f"{each} {len(data)}\n".encode() + data)
    folder = path.with_name(f"{path.name}-{found.hexdigest()[:16]}")
    for each, data in content.items():
        _keep(folder / each, data)
    return folder


def _keep(path: Path, data: bytes) -> Path:
    """Write a file unless it has this content: it may have been cut or changed since it was written."""
    with contextlib.suppress(OSError):
        if path.stat().st_size == len(data) and path.read_bytes() == data:
            return path
    with atomic_file(path) as file:
        file.write(data)
    return path


# --- Merged models ---------------------------------------------------------------------------------------------------

VERSION: Final = 1
"""The version of the merge; increase it when the same input gives a different file."""
DIGEST: Final = "graftage.adapter.digest"
SCALE: Final = "graftage.adapter.scale"
BLOCK: Final = 4 << 20
"""Numbers, or bytes of an untouched tensor, to process at once."""
SPARE: Final = 64 << 20
"""Bytes to leave free on the disk."""
HALF_LIMIT: Final = 65504.0
"""The largest F16; Q8_0 multiplies it by up to 127."""
FLOAT_LIMIT: Final = float(np.finfo(np.float32).max)

Step: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A tensor to write."""

    tensor: Tensor
    kind: str
    size: int
    change: tuple[Part, Array] | None = None
    """The part that changes it, and that part's B in the order of the file."""


def merge(base: CheckedFile, header: Header, lora: Lora, out: Path, *, digest: str, kind: str) -> Iterator[Step]:
    """Write the merged model step by step; yield the bytes written and the total before each.

    The adapter must fit the base model. Touched quantised tensors get the type `kind`: `Q8_0` or `F16`.

    Raises:
        Refused: the adapter or the base model cannot be merged.
        OSError: the merged model does not fit on the disk.
    """
    added = {  # They mark a merged model; servers show them.
        DIGEST: (STRING, digest),
        SCALE: (FLOAT32, lora.facts.scale),
        "graftage.merge.type": (STRING, kind),
        "graftage.merge.version": (UINT32, VERSION),
    }
    _check(header, lora, added)
    parts = {part.tensor: part for part in lora.parts}
    jobs = [_job(tensor, parts.get(tensor.name), lora, header.metadata, kind) for tensor in header.tensors.values()]
    lines = [(job.tensor.name, job.tensor.shape, job.kind, job.size) for job in jobs]
    keys = base.read_at(START_SIZE, header.keys_end - START_SIZE) + _key_values(added)
    head = _encoded_head(header.version, len(header.metadata) + len(added), keys, lines, header.alignment)
    total = len(head) + sum(job.size + _padding(job.size, header.alignment) for job in jobs)
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < total + SPARE:
        raise OSError(errno.ENOSPC, f"the merged model needs {total:,} bytes, but the disk has {free:,} free")
    with atomic_file(out) as file:
        done = file.write(head)
        for data in _tensor_data(base, header, jobs):
            yield done, total
            done += file.write(data)
        yield done, total


def _check(header: Header, lora: Lora, added: Mapping[str, Value]) -> None:
    if lora.facts.invocation:
        raise Refused("it acts only after its invocation tokens, but merged it would always act")
    if present := [key for key in added if key in header.metadata]:
        raise Refused(f"the base model already contains an adapter (`{present[0]}`)", "Use the plain model.")
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise Refused(
            "the base model is split into several files (`split.count`)", "Join them with `llama-gguf-split`."
        )
    _check_placed(lora, header.metadata)


def _job(tensor: Tensor, part: Part | None, lora: Lora, metadata: Mapping[str, object], kind: str) -> _Job:
    if part is None:
        return _Job(tensor=tensor, kind=tensor.kind, size=tensor.size)
    inputs, outputs = tensor.shape
    if tensor.kind in FLOATS:
        kind = tensor.kind
    elif inputs % BLOCKS[kind][0]:
        kind = "F16"
    size = outputs * bytes_of(kind, inputs)
    return _Job(tensor=tensor, kind=kind, size=size, change=(part, lora.rows(part, metadata)))


def _tensor_data(base: CheckedFile, header: Header, jobs: list[_Job]) -> Iterator[bytes]:
    for job in jobs:
        if job.change:
            yield from _merged_rows(base, job, *job.change)
        else:
            for at in range(0, job.size, BLOCK):
                yield base.read_at(job.tensor.offset + at, min(BLOCK, job.size - at))
        yield bytes(_padding(job.size, header.alignment))
    if not base.unchanged():
        raise Refused("the base model's file changed while it was read")


def _merged_rows(base: CheckedFile, job: _Job, part: Part, rows: Array) -> Iterator[bytes]:
    from gguf import GGMLQuantizationType, quants  # Takes a quarter of a second.

    inputs, outputs = job.tensor.shape
    width = bytes_of(job.tensor.kind, inputs)
    step = max(1, BLOCK // inputs)
    a = part.a.astype(np.float32) * np.float32(part.scale)
    limit = min(HALF_LIMIT * {"F16": 1, "Q8_0": 127}.get(job.kind, np.inf), FLOAT_LIMIT)
    for row in range(0, outputs, step):
        count = min(step, outputs - row)
        block = dequantize(job.tensor, base.read_at(job.tensor.offset + row * width, count * width))
        with np.errstate(all="ignore"):
            block = block + rows[row : row + count].astype(np.float32) @ a
        # The comparison is false for NaN, too.
        if not np.abs(block).max() <= limit:
            raise Refused(f"the changed `{job.tensor.name}` exceeds what its type can hold")
        yield quants.quantize(block, GGMLQuantizationType[job.kind]).tobytes()


# --- The parts of a GGUF file ----------------------------------------------------------------------------------------

START_SIZE: Final = 24
"""Bytes of magic, version and counts."""
UINT32, FLOAT32 = 4, 6


def _padding(position: int, alignment: int) -> int:
    """Return the bytes up to the next multiple of the alignment."""
    return -position % alignment


def _key_values(values: Mapping[str, Value]) -> bytes:
    """Encode keys and values."""
    return b"".join(_text(key) + struct.pack("<I", kind) + _encoded(kind, data) for key, (kind, data) in values.items())


def _encoded(kind: int, data: Any) -> bytes:
    if kind == STRING:
        return _text(data)
    if kind == ARRAY:
        return struct.pack(f"<IQ{len(data)}I", UINT32, len(data), *data)
    return struct.pack(f"<{SCALARS[kind]}", data)


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _encoded_head(
    version: int, count: int, keys: bytes, tensors: Sequence[tuple[str, tuple[int, ...], str, int]], alignment: int
) -> bytes:
    """Encode all before the data: keys, and a table of tensors (name, shape, type, size) that follow each other."""
    pieces = [MAGIC, struct.pack("<IQQ", version, len(tensors), count), keys]
    offset = 0
    for name, shape, kind, size in tensors:
        pieces += _text(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, TYPES[kind], offset)
        offset += size + _padding(size, alignment)
    head = b"".join(pieces)
    return head + bytes(_padding(len(head), alignment))
