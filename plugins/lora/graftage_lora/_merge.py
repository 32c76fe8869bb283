"""Merges an adapter into its base model: a new GGUF file, written front to back.

Keys and values are copied byte for byte and ours added; a tensor that the adapter does not touch is copied in blocks;
one that it does is read in blocks of rows, changed, and quantised again. Memory stays at a few blocks, whatever the
model's size. Quantising a changed tensor to its own coarse type would lose part of a small change, so Q8_0 is the
default there; a tensor of floats keeps its type.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from graftage_lora import _gguf
from graftage_lora._convert import check_placed, written
from graftage_lora._files import Opened, Refused
from graftage_lora._gguf import Header, Tensor, Value
from graftage_lora._lora import Lora, Part
from graftage_lora._quants import KINDS, WIDTHS, dequantize, quantize, row_bytes

if TYPE_CHECKING:
    from typing import IO

    from graftage_lora._lora import Array

__all__ = ["MARKS", "NoRoom", "marks", "merge"]

VERSION: Final = 1
"""Of what a merge writes; it goes up when the same input gives another file."""
DIGEST: Final = "graftage.adapter.digest"
SCALE: Final = "graftage.adapter.scale"
TYPE: Final = "graftage.merge.type"
MARKS: Final = (DIGEST, SCALE, TYPE, "graftage.merge.version")
"""Keys that tell a merged model by; servers show them."""
BLOCK: Final = 4 << 20
"""Numbers, or bytes of an untouched tensor, that are worked on at once."""
SPARE: Final = 64 << 20
"""Bytes that are left free on the disk."""
FLOATS: Final = ("F32", "F16", "BF16")
HALF_LIMIT: Final = 65504.0
"""The largest F16; in Q8_0 it scales numbers of up to 127."""
FLOAT_LIMIT: Final = float(np.finfo(np.float32).max)

Progress = Callable[[int, int], None]


class NoRoom(Exception):
    """The disk cannot take the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A tensor of the new file."""

    tensor: Tensor
    kind: int
    size: int
    part: Part | None = None
    rows: Array | None = None
    """The part's B in the order of the file."""


def marks(digest: str, lora: Lora, kind: str) -> dict[str, Value]:
    """The keys that a merge adds."""
    values = (
        Value(_gguf.STRING, digest),
        Value(_gguf.FLOAT32, lora.facts.scale),
        Value(_gguf.STRING, kind),
        Value(_gguf.UINT32, VERSION),
    )
    return dict(zip(MARKS, values, strict=True))


def merge(
    base: Opened, header: Header, lora: Lora, out: Path, *, digest: str, kind: str, on_progress: Progress
) -> Path:
    """Write the merged model; what `on_progress` raises ends the work and is raised.

    Args:
        base: the base model's file.
        header: its head.
        lora: the adapter; it must fit.
        out: where to write.
        digest: the adapter's.
        kind: the type of touched tensors that are quantised: `Q8_0` or `F16`.
        on_progress: told bytes written and bytes in all.

    Raises:
        Refused: the adapter or the base model is of a kind that cannot be merged.
        NoRoom: the disk cannot take it.
    """
    _check(header, lora)
    jobs = _jobs(header, lora, KINDS[kind])
    front = _front(base, header, jobs, marks(digest, lora, kind))
    total = len(front) + sum(job.size + _gguf.padding(job.size, header.alignment) for job in jobs)
    _check_room(out, total)

    def fill(file: IO[bytes]) -> None:
        done = file.write(front)
        for data in _contents(base, header, jobs):
            on_progress(done, total)
            done += file.write(data)
        on_progress(done, total)

    written(out, fill)
    return out


def _check(header: Header, lora: Lora) -> None:
    if lora.facts.invocation:
        raise Refused("it acts only after its invocation tokens, and a merged one would always act")
    if present := [key for key in MARKS if key in header.metadata]:
        raise Refused(f"the base model has an adapter merged into it already (`{present[0]}`)", "Give the plain model.")
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise Refused("the base model's file is one of several (`split.count`)", "Join them with `llama-gguf-split`.")
    check_placed(lora, header.metadata)


def _check_room(out: Path, total: int) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < total + SPARE:
        raise NoRoom(f"the merged model needs {total:,} bytes and the disk has {free:,} free")


def _jobs(header: Header, lora: Lora, kind: int) -> list[_Job]:
    parts = {part.tensor: part for part in lora.parts}
    return [_job(tensor, parts.get(tensor.name), lora, header.metadata, kind) for tensor in header.tensors]


def _job(tensor: Tensor, part: Part | None, lora: Lora, metadata: Mapping[str, Any], kind: int) -> _Job:
    if part is None:
        return _Job(tensor=tensor, kind=tensor.kind, size=tensor.size)
    inputs, outputs = tensor.shape
    if _gguf.TYPES[tensor.kind][0] in FLOATS:
        kind = tensor.kind
    elif inputs % WIDTHS[kind]:
        kind = KINDS["F16"]
    size = outputs * row_bytes(kind, inputs)
    return _Job(tensor=tensor, kind=kind, size=size, part=part, rows=lora.rows(part, metadata))


def _front(base: Opened, header: Header, jobs: list[_Job], added: Mapping[str, Value]) -> bytes:
    lines = [(job.tensor.name, job.tensor.shape, job.kind, job.size) for job in jobs]
    front = b"".join(
        (
            _gguf.head(header.version, len(jobs), header.keys + len(added)),
            base.read_at(_gguf.HEAD, header.keys_end - _gguf.HEAD),
            _gguf.key_values(added),
            _gguf.table(lines, header.alignment),
        )
    )
    return front + bytes(_gguf.padding(len(front), header.alignment))


def _contents(base: Opened, header: Header, jobs: list[_Job]) -> Iterator[bytes]:
    for job in jobs:
        start = header.data + job.tensor.offset
        yield from _copied(base, start, job.size) if job.part is None else _changed(base, start, job)
        yield bytes(_gguf.padding(job.size, header.alignment))
    if not base.unchanged():
        raise Refused("the base model's file changed while it was read")


def _copied(base: Opened, start: int, size: int) -> Iterator[bytes]:
    for position in range(0, size, BLOCK):
        yield base.read_at(start + position, min(BLOCK, size - position))


def _changed(base: Opened, start: int, job: _Job) -> Iterator[bytes]:
    part, rows = job.part, job.rows
    assert part is not None and rows is not None  # noqa: S101, PT018 - `_job` sets both
    inputs, outputs = job.tensor.shape
    width = row_bytes(job.tensor.kind, inputs)
    step = max(1, BLOCK // inputs)
    a = part.a.astype(np.float32) * np.float32(part.scale)
    for row in range(0, outputs, step):
        count = min(step, outputs - row)
        block = dequantize(job.tensor, base.read_at(start + row * width, count * width))
        yield quantize(_sum(block, rows[row : row + count].astype(np.float32), a, job), job.kind)


def _sum(block: Array, b: Array, a: Array, job: _Job) -> Array:
    with np.errstate(all="ignore"):  # what is not finite is looked for
        block = block + b @ a
    limit = HALF_LIMIT * {KINDS["F16"]: 1, KINDS["Q8_0"]: 127}.get(job.kind, np.inf)
    # The comparison is false for NaN, too.
    if not np.abs(block).max() <= min(limit, FLOAT_LIMIT):
        raise Refused(f"the change of `{job.tensor.name}` leads out of what its type can hold")
    return block
