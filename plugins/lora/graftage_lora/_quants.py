"""The numbers in blocks of bytes: the arithmetic is the `gguf` package's, the files are read and checked by us."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from graftage_lora._files import Refused
from graftage_lora._gguf import TYPES, Tensor

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["KINDS", "WIDTHS", "dequantize", "quantize", "row_bytes"]

KINDS: Final = {"F32": 0, "F16": 1, "Q8_0": 8, "BF16": 30}
"""The types that are written, with ggml's numbers."""
WIDTHS: Final = {kind: TYPES[kind][1] for kind in KINDS.values()}
"""Entries in a block of each: a row must be a multiple of it."""


def row_bytes(kind: int, entries: int) -> int:
    """Bytes of a row."""
    _, block, width = TYPES[kind]
    return entries // block * width


def dequantize(tensor: Tensor, data: Any) -> npt.NDArray[np.float32]:
    """Whole rows of a tensor as F32.

    Raises:
        Refused: the `gguf` package does not know the type.
    """
    from gguf import GGMLQuantizationType, quants  # noqa: PLC0415 - a quarter of a second, only where it is needed

    rows = np.frombuffer(data, np.uint8).reshape(-1, row_bytes(tensor.kind, tensor.shape[0]))
    try:
        with np.errstate(all="ignore"):  # what is not finite is looked for afterwards
            return quants.dequantize(rows, GGMLQuantizationType(tensor.kind))
    except (NotImplementedError, ValueError):
        raise Refused(
            f"the tensor `{tensor.name}` has the type {TYPES[tensor.kind][0]}, which cannot be read"
        ) from None


def quantize(rows: npt.NDArray[np.float32], kind: int) -> bytes:
    """Rows of F32 as a type of `KINDS`."""
    from gguf import GGMLQuantizationType, quants  # noqa: PLC0415 - as above

    return quants.quantize(rows, GGMLQuantizationType(kind)).tobytes()
