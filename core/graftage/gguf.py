"""Read the head of a GGUF file: the metadata of a model or an adapter, and the places of its tensors.

The format is in ggml's `docs/gguf.md`: magic, version, two counts, keys with values, a table of tensors, then data at
offsets that are multiples of an alignment. Nothing in a file is trusted. Each length is checked against the rest of the
file before a read, so time and memory stay proportional to the file's size.
"""

from __future__ import annotations

import math
import stat
import struct
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any, Final, Protocol

from graftage._records import dataclass

__all__ = [
    "ALIGNMENT",
    "ARRAY",
    "BLOCKS",
    "INVOCATION",
    "MAGIC",
    "MAX_HEAD",
    "SCALARS",
    "STRING",
    "TYPES",
    "GgufError",
    "Header",
    "Source",
    "Tensor",
    "bytes_of",
    "hash_adapter",
    "read",
    "read_file",
]

INVOCATION: Final = "adapter.alora.invocation_tokens"
"""The key with the tokens after which an adapter acts."""
MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
ALIGNMENT: Final = 32
"""The default alignment of the data."""

# --- Types -----------------------------------------------------------------------------------------------------------

SCALARS: Final[Mapping[int, str]] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""GGUF's number for the type of a value to the letter of `struct`."""
STRING: Final = 8
ARRAY: Final = 9

GGML: Final[Mapping[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
"""ggml's number for the type of a tensor to its name, the entries in a block and the bytes of a block (`ggml.c`)."""
SAFETENSORS: Final[Mapping[str, tuple[int, int]]] = {
    "INT4": (32, 20),
    "INT8": (64, 68),
    "MXFP8": (32, 33),
    "F8_E4M3": (1, 1),
    "F8_E5M2": (1, 1),
    "U8": (1, 1),
    "U32": (1, 4),
}
"""Types of safetensors files alone: name to the entries and the bytes of a block.

MLX keeps a scale and a bias of 16 bits for 32 numbers of `INT4` and for 64 of `INT8`, a scale of 8 bits for 32 of
`MXFP8`.
"""

TYPES: Final[Mapping[str, int]] = {name: number for number, (name, _, _) in GGML.items()}
"""The name of a tensor's type to ggml's number."""
BLOCKS: Final = {name: (block, size) for name, block, size in GGML.values()} | dict(SAFETENSORS)
"""The name of a tensor's type, in either format, to the entries and the bytes of a block."""
FILE_TYPES: Final[Sequence[str]] = """
    F32 F16 Q4_0 Q4_1 - - - Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K IQ2_XXS
    IQ2_XS Q2_K_S IQ3_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M BF16 - - - TQ1_0 TQ2_0 MXFP4
    """.split()  # noqa: SIM905 - a table reads better than forty lines
"""Names for the numbers of `general.file_type`; those with `-` are no longer used."""


def bytes_of(kind: str, entries: int) -> int:
    """Return the bytes of some entries of a type in `BLOCKS`. They must fill whole blocks."""
    block, size = BLOCKS[kind]
    return entries // block * size


# --- Results ----------------------------------------------------------------------------------------------------


class GgufError(ValueError):
    """Why a file cannot be read, as the rest of a sentence: "it is truncated: ..."."""


class Source(Protocol):
    """A source of bytes: an open file or anything like it."""

    def read(self, count: int, /) -> bytes:
        """Return the next bytes, fewer only at the end."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A tensor's place in the file."""

    name: str
    shape: tuple[int, ...]
    """In the order of GGUF: the fastest dimension comes first."""
    kind: str
    """The name of its type, one of `TYPES`."""
    offset: int
    """From the start of the file."""
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Everything in a file except for the numbers in its tensors."""

    version: int
    metadata: Mapping[str, Any] = field(repr=False)
    """Numbers, texts and arrays; for a long array that is not kept, a `range` of its length."""
    tensors: Mapping[str, Tensor] = field(repr=False)
    alignment: int
    keys_end: int
    """Where the keys end and the table of tensors begins."""
    data: int
    """Where the data begins."""
    size: int
    """Bytes of the file."""

    @property
    def architecture(self) -> str:
        """The architecture of the model, or of an adapter's base model; empty if the file does not state it."""
        return self._text("general.architecture")

    @property
    def is_activated(self) -> bool:
        """Whether it is an adapter that acts only after some tokens of the prompt (aLoRA)."""
        return INVOCATION in self.metadata

    @property
    def is_adapter(self) -> bool:
        """Whether the file states that it is an adapter."""
        return self.metadata.get("general.type") == "adapter"

    @property
    def template(self) -> str:
        """The chat template; empty if there is none."""
        return self._text("tokenizer.chat_template")

    @property
    def quantization(self) -> str | None:
        """The type of most tensors, as the file states it; None if it does not."""
        found = self.metadata.get("general.file_type")
        if not isinstance(found, int) or not 0 <= found < len(FILE_TYPES) or FILE_TYPES[found] == "-":
            return None
        return FILE_TYPES[found]

    def figure(self, name: str) -> int | None:
        """Return a number of the architecture, such as `block_count`; the largest if each layer has its own."""
        found = self.metadata.get(f"{self.architecture}.{name}")
        if isinstance(found, tuple):
            found = max((each for each in found if isinstance(each, int)), default=None)
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    def _text(self, key: str) -> str:
        found = self.metadata.get(key)
        return found if isinstance(found, str) else ""


# --- Reading ---------------------------------------------------------------------------------------------------------

MAX_HEAD: Final = 64 * 1024 * 1024
"""Bytes before the data. The largest vocabularies take a quarter of this."""
MAX_KEYS: Final = 4096
MAX_TENSORS: Final = 65_536
MAX_ENTRIES: Final = 1 << 23
"""In all arrays together: a million words, each with a score, a type and an entry in the merges."""
LONG: Final = 4096
"""Entries above which an array belongs to the vocabulary, not to the layers."""
MAX_STRING: Final = 1 << 24
"""Some files hold a whole `tokenizer.json`."""
MAX_NAME: Final = 1024
MAX_DIMENSIONS: Final = 4
MAX_SIDE: Final = 1 << 40
"""Entries along one dimension."""
MAX_ALIGNMENT: Final = 1 << 20
LENGTH: Final = struct.Struct("<Q")
"""The length before each text."""
LEAST_KEY: Final = 14
"""Bytes: its length, one letter, the type of the value, and the value."""
LEAST_TENSOR: Final = 33
"""Bytes: the length of its name, one letter, the number of dimensions, one dimension, type and offset."""


def read_file(path: Path, *, long_arrays: bool = False) -> Header:
    """Read the head of a file.

    Args:
        path: the file.
        long_arrays: whether to keep the vocabulary, most of a head and rarely needed. It is checked in any case.

    Raises:
        GgufError: the file is not GGUF, is corrupt or truncated, or has an unsupported version or byte order.
        OSError: it cannot be opened.
    """
    status = path.stat()
    # Opening a pipe could wait for ever.
    if not stat.S_ISREG(status.st_mode):
        raise GgufError("it is not a regular file")
    with path.open("rb") as file:
        return read(file, status.st_size, long_arrays=long_arrays)


def hash_adapter(path: Path) -> tuple[str, float] | None:
    """Return a hash over the tensors of a LoRA adapter, and its alpha, without which two files may be the same adapter.

    Return None if the file cannot be read, or has no alpha.
    """
    from hashlib import sha256  # Slow to import

    found = sha256()
    try:
        header = read_file(path)
        alpha = float(header.metadata["adapter.lora.alpha"])
        with path.open("rb") as data:
            for name, tensor in sorted(header.tensors.items()):
                data.seek(tensor.offset)
                found.update(f"{name} {tensor.shape} {tensor.kind}\n".encode() + data.read(tensor.size))
    except (OSError, GgufError, KeyError, TypeError, ValueError):
        return None
    return (found.hexdigest(), alpha) if alpha else None


def read(source: Source, size: int, *, most: int = MAX_HEAD, long_arrays: bool = False) -> Header:
    """Read the head of an open file, from its start to the end of the table of tensors.

    Args:
        source: the file.
        size: its size in bytes.
        most: the most bytes that its head may have.
        long_arrays: as in `read_file`.

    Raises:
        GgufError: as in `read_file`.
    """
    return _Reader(source, size, min(size, most), long_arrays=long_arrays).header()


class _Reader:
    """A reader that counts the bytes that are left."""

    def __init__(self, source: Source, size: int, limit: int, *, long_arrays: bool) -> None:
        self._source = source
        self._size = size
        self._limit = limit
        self._long_arrays = long_arrays
        self._entries = 0
        self._position = 0

    def header(self) -> Header:
        version = self._version()
        tensors, keys = self._number("Q"), self._number("Q")
        self._check("tensors", tensors, MAX_TENSORS, LEAST_TENSOR)
        self._check("keys", keys, MAX_KEYS, LEAST_KEY)
        metadata = self._metadata(keys)
        keys_end = self._position
        alignment = _alignment(metadata)
        table = [self._tensor(alignment) for _ in range(tensors)]
        data = -(-self._position // alignment) * alignment
        return Header(
            version=version,
            metadata=metadata,
            tensors=self._locate(table, data),
            alignment=alignment,
            keys_end=keys_end,
            data=data,
            size=self._size,
        )

    def _version(self) -> int:
        if self._size < len(MAGIC) or self._take(len(MAGIC)) != MAGIC:
            raise GgufError("it is not a GGUF file")
        version: int = self._number("I")
        if version in VERSIONS:
            return version
        if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
            raise GgufError("it is written for big-endian machines")
        raise GgufError(f"its GGUF version is {version}; 2 and 3 are supported")

    def _metadata(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self._name("a key")
            if key in found:
                raise GgufError(f"the key `{key}` occurs twice")
            found[key] = self._value(self._number("I"), key)
        return found

    def _value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == ARRAY:
            return self._array(key)
        if kind != STRING:
            raise GgufError(f"the key `{key}` has a value of the unknown type {kind}")
        (text,) = self._texts(key, 1)
        return text.decode(errors="replace")

    def _array(self, key: str) -> Sequence[Any]:
        kind, count = self._number("I"), self._number("Q")
        if kind == ARRAY:
            raise GgufError(f"the key `{key}` has an array of arrays")
        if kind != STRING and kind not in SCALARS:
            raise GgufError(f"the key `{key}` has an array of the unknown type {kind}")
        self._entries += count
        width = LENGTH.size if kind == STRING else struct.calcsize(f"<{SCALARS[kind]}")
        self._check(f"entries of arrays in `{key}`", self._entries, MAX_ENTRIES)
        self._check(f"entries in `{key}`", count, MAX_ENTRIES, width)
        keep = self._long_arrays or count <= LONG
        if kind != STRING:
            data = self._take(count * width)
            return struct.unpack(f"<{count}{SCALARS[kind]}", data) if keep else range(count)
        texts = self._texts(key, count)
        if keep:
            return tuple(text.decode(errors="replace") for text in texts)
        deque(texts, maxlen=0)
        return range(count)

    def _texts(self, key: str, count: int) -> Iterator[bytes]:
        """Yield texts one by one. Vocabularies have 100,000 or more, so most of the time is spent in this loop."""
        read, length_of, limit, place = self._source.read, LENGTH.unpack, self._limit, self._position
        for _ in range(count):
            place += LENGTH.size
            prefix = read(LENGTH.size) if place <= limit else b""
            if len(prefix) != LENGTH.size:
                raise self._end_error(place)
            (length,) = length_of(prefix)
            if length > MAX_STRING:
                raise _too_many(f"bytes of text in `{key}`", length, MAX_STRING)
            place += length
            text = read(length) if place <= limit else b""
            if len(text) != length:
                raise self._end_error(place)
            yield text
        self._position = place

    def _tensor(self, alignment: int) -> Tensor:
        """Read a row of the table, with the offset from the start of the data."""
        name = self._name("a tensor's name")
        dimensions = self._number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise GgufError(f"the tensor `{name}` has {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", self._take(8 * dimensions))
        if not all(1 <= each <= MAX_SIDE for each in shape):
            raise GgufError(f"the tensor `{name}` has the shape {shape}")
        number, offset = self._number("I"), self._number("Q")
        if number not in GGML:
            raise GgufError(f"the tensor `{name}` has the unknown type {number}")
        kind, block, _ = GGML[number]
        if shape[0] % block:
            raise GgufError(f"the tensor `{name}` has rows of {shape[0]}, but {kind} comes in blocks of {block}")
        if offset % alignment:
            raise GgufError(f"the tensor `{name}` does not begin at a multiple of {alignment}")
        return Tensor(name=name, shape=shape, kind=kind, offset=offset, size=bytes_of(kind, math.prod(shape)))

    def _locate(self, table: Sequence[Tensor], data: int) -> dict[str, Tensor]:
        """Return the tensors by name, with the offset from the start of the file."""
        found: dict[str, Tensor] = {}
        for each in table:
            if each.name in found:
                raise GgufError(f"the tensor `{each.name}` occurs twice")
            if (missing := data + each.offset + each.size - self._size) > 0:
                raise GgufError(f"it is truncated: at least {missing} bytes are missing (tensor `{each.name}`)")
            found[each.name] = replace(each, offset=data + each.offset)
        end = 0
        for each in sorted(table, key=lambda tensor: tensor.offset):
            if each.offset < end:
                raise GgufError(f"the tensor `{each.name}` overlaps another one")
            end = each.offset + each.size
        return found

    def _name(self, what: str) -> str:
        length = self._number("Q")
        if not 1 <= length <= MAX_NAME:
            raise GgufError(f"{what} has {length} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise GgufError(f"{what} is not UTF-8") from error

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _take(self, count: int) -> bytes:
        place = self._position + count
        data = self._source.read(count) if place <= self._limit else b""
        if len(data) != count:
            raise self._end_error(place)
        self._position = place
        return data

    def _check(self, what: str, count: int, most: int, least: int = 0) -> None:
        """Refuse a count above `most`, or one that needs more bytes, at `least` each, than the file has."""
        if count > most:
            raise _too_many(what, count, most)
        if count * least > self._size - self._position:
            raise GgufError(f"it states {count} {what}, more than the file can hold")

    def _end_error(self, place: int) -> GgufError:
        if place <= self._limit:
            return GgufError("it became shorter during the read")
        if self._limit < self._size:
            return GgufError(f"its head is larger than {self._limit:,} bytes")
        return GgufError("it is truncated: it ends within its head")


def _too_many(what: str, count: int, most: int) -> GgufError:
    return GgufError(f"it states {count} {what}; the limit is {most}")


def _alignment(metadata: Mapping[str, object]) -> int:
    found = metadata.get("general.alignment", ALIGNMENT)
    if type(found) is not int or not 0 < found <= MAX_ALIGNMENT or found & (found - 1):
        raise GgufError(f"its alignment is {str(found)[:40]!r}, which is not a power of two")
    return found
