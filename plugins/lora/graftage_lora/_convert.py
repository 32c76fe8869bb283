"""Writes an adapter as the GGUF file that servers take: one content, one file, one digest.

llama.cpp has one alpha for a file and divides it by each pair's own rank, so where modules have scales of their own the
difference is folded into B. The file holds no name, no time and no path.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from graftage_lora import _gguf
from graftage_lora._files import Refused
from graftage_lora._gguf import Value
from graftage_lora._lora import ARCHITECTURES, EMBEDDING, Array, Lora, Part, is_placed

if TYPE_CHECKING:
    from typing import IO

__all__ = ["check_placed", "pieces", "store", "written"]

TOLERANCE: Final = 1e-6
"""Of a scale: alpha is written as F32."""
STALE: Final = 3600.0
"""Seconds in which nothing was written to a file that nobody writes any more; a merge writes several times a second."""


def pieces(lora: Lora, metadata: Mapping[str, Any]) -> Iterator[bytes]:
    """The adapter's GGUF file, piece by piece, for a base model with that metadata.

    Raises:
        Refused: the adapter cannot be placed in such a model.
    """
    check_placed(lora, metadata)
    alpha = Counter(part.scale * len(part.a) for part in lora.parts).most_common(1)[0][0]
    tensors: list[tuple[str, Array]] = []
    for part in lora.parts:
        tensors += _halves(part, lora.rows(part, metadata), part.scale * len(part.a) / alpha)
    return _gguf.file(_keys(lora, metadata, alpha), tensors)


def check_placed(lora: Lora, metadata: Mapping[str, Any]) -> None:
    """Refuse an adapter whose modules have no known place in a model with that metadata."""
    architecture = metadata.get("general.architecture")
    if lora.facts.layout != "gguf" and architecture not in ARCHITECTURES:
        raise Refused(
            f"its modules cannot be placed in the architecture `{str(architecture)[:40]}`",
            f"Known are {', '.join(ARCHITECTURES)}; a GGUF adapter made for it needs no placing.",
        )
    for part in lora.parts:
        if not is_placed(part.tensor):
            raise Refused(f"`{part.tensor[:120]}` is no module that can be placed")


def _keys(lora: Lora, metadata: Mapping[str, Any], alpha: float) -> dict[str, Value]:
    architecture = lora.facts.architecture or metadata["general.architecture"]
    keys = {
        "general.architecture": Value(_gguf.STRING, architecture),
        "general.type": Value(_gguf.STRING, "adapter"),
        "adapter.type": Value(_gguf.STRING, "lora"),
        "adapter.lora.alpha": Value(_gguf.FLOAT32, alpha),
    }
    if lora.facts.invocation:
        keys["adapter.alora.invocation_tokens"] = Value(_gguf.ARRAY, lora.facts.invocation)
    return keys


def _halves(part: Part, rows: Array, factor: float) -> list[tuple[str, Array]]:
    if abs(factor - 1) > TOLERANCE:
        rows = rows.astype(np.float32) * np.float32(factor)
    a = part.a
    if part.tensor == EMBEDDING:
        # llama.cpp looks rows of A up by token, so the halves change places there.
        a, rows = rows, a.T
    return [(f"{part.tensor}.lora_a", a), (f"{part.tensor}.lora_b", np.ascontiguousarray(rows))]


# --- Files that are whole or not there -------------------------------------------------------------------------------


def written(out: Path, fill: Callable[[IO[bytes]], None]) -> Path:
    """A file that appears under its name only when all of it is on the disk; after any error, nothing is left of it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _sweep(out)
    descriptor, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name[:80]}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(out)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return out


def _sweep(out: Path) -> None:
    """Delete what runs that were killed have left of the same file."""
    for part in out.parent.glob(f".{glob.escape(out.name[:80])}.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE:
                part.unlink()


def store(content: Iterable[bytes], folder: Path, name: str) -> Path:
    """Keep a file in a folder under a name that ends in the beginning of its SHA-256, unless it is there already."""
    data = b"".join(content)
    sha256 = hashlib.sha256(data).hexdigest()
    path = folder / f"{name}-{sha256[:16]}.gguf"
    if not _holds(path, len(data), sha256):
        written(path, lambda file: _write(file, data))
    return path


def _write(file: IO[bytes], data: bytes) -> None:
    file.write(data)


def _holds(path: Path, size: int, sha256: str) -> bool:
    """Whether a file has that content: what an earlier run left may have been cut or changed since."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == size and hashlib.sha256(file.read(size)).hexdigest() == sha256
    except OSError:
        return False
