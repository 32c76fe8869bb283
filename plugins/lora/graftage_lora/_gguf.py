"""GGUF: a bounded reader of its head, and a writer of adapters whose bytes depend on their content alone.

The layout is that of ggml's `docs/gguf.md`: magic, version, two counts, keys with values, a table of tensors, then data
at offsets that are multiples of an alignment. Shapes here are as GGUF writes them, inputs first. No file that somebody
else made is given to the `gguf` package's reader: it spins on an array of 2^61 entries; only its arithmetic is used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from graftage_lora._files import Refused

if TYPE_CHECKING:
    from graftage_lora._files import Opened

__all__ = ["ADAPTER", "MODEL", "TYPES", "Bounds", "Header", "Tensor", "Value", "file", "read"]

MAGIC: Final = b"GGUF"
HEAD: Final = 24
"""Bytes of magic, version and counts."""
ALIGNMENT: Final = 32
SCALARS: Final[Mapping[int, str]] = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
UINT32, FLOAT32, STRING, ARRAY = 4, 6, 8, 9
KEPT: Final = 4096
"""Entries of an array of numbers that is kept; longer ones, and arrays of strings, are only passed over."""

TYPES: Final[Mapping[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
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
}
"""ggml's number to name, entries in a block, bytes of a block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much of each thing a file may have."""

    head: int
    """Bytes before the tensors' numbers."""
    keys: int
    tensors: int
    string: int
    array: int


ADAPTER: Final = Bounds(head=1 << 22, keys=4096, tensors=65_536, string=1 << 20, array=1 << 20)
MODEL: Final = Bounds(head=1 << 28, keys=65_536, tensors=65_536, string=1 << 24, array=1 << 23)
"""A model carries its vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A line of the table of tensors."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    """From the start of the data."""
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """All of a file but the numbers in its tensors."""

    version: int
    keys: int
    metadata: Mapping[str, Any] = field(repr=False)
    """Numbers, strings and short arrays of numbers; of other arrays, their length, as a `range`."""
    tensors: tuple[Tensor, ...] = field(repr=False)
    alignment: int
    keys_end: int
    """Where the keys end and the table of tensors begins."""
    data: int
    """Where the data begins."""

    @property
    def architecture(self) -> str | None:
        """The kind of model it is, or is for."""
        found = self.metadata.get("general.architecture")
        return found if isinstance(found, str) and found else None

    @property
    def is_adapter(self) -> bool:
        """Whether it calls itself an adapter."""
        return self.metadata.get("general.type") == "adapter"


def read(file: Opened, bounds: Bounds) -> Header:
    """The head of a file; the file is then at the end of the table of tensors.

    Raises:
        Refused: it breaks a rule of the format or a bound.
    """
    return _Reader(file, bounds).header()


class _Reader:
    def __init__(self, file: Opened, bounds: Bounds) -> None:
        self._file = file
        self._bounds = bounds

    def header(self) -> Header:
        if self._take(4, "head") != MAGIC:
            raise Refused(f"`{self._file.name}` is not a GGUF file")
        version = self._number("<I", "head")
        if version not in (2, 3):
            big = version in (2 << 24, 3 << 24)
            raise Refused("it is a big-endian GGUF" if big else f"its GGUF version is {version}; known are 2 and 3")
        tensor_count = self._count("tensors", self._bounds.tensors, smallest=24)
        key_count = self._count("keys", self._bounds.keys, smallest=13)
        metadata = self._metadata(key_count)
        keys_end = self._file.position
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise Refused(f"its alignment is {alignment!r}, which is not a power of two")
        table = [self._tensor(alignment) for _ in range(tensor_count)]
        data = self._file.position + padding(self._file.position, alignment)
        self._check_table(table, data)
        return Header(
            version=version,
            keys=key_count,
            metadata=metadata,
            tensors=tuple(table),
            alignment=alignment,
            keys_end=keys_end,
            data=data,
        )

    def _number(self, code: str, what: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code), what))[0]

    def _take(self, count: int, what: str) -> bytes:
        if self._file.position + count > self._bounds.head:
            raise Refused(f"its head is larger than {self._bounds.head:,} bytes")
        return self._file.take(count, what)

    def _count(self, what: str, most: int, *, smallest: int) -> int:
        """A count, refused where so many could not fit into what is left of the file."""
        count: int = self._number("<Q", "head")
        if count > most:
            raise Refused(f"it states {count} {what}; at most {most} are allowed")
        if count * smallest > self._file.left:
            raise Refused(f"it states {count} {what}, more than the file can hold")
        return count

    def _string(self, what: str, most: int) -> str:
        length: int = self._number("<Q", what)
        if length > most:
            raise Refused(f"a {what} states a length of {length}; at most {most} bytes are allowed")
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise Refused(f"a {what} is not UTF-8") from None

    def _metadata(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self._string("key", 1 << 16)
            if key in found:
                raise Refused(f"the key `{key[:80]}` is there twice")
            found[key] = self._value(self._number("<I", "keys"), key)
        return found

    def _value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self._string("string", self._bounds.string)
        if kind == ARRAY:
            return self._array(key)
        if kind not in SCALARS:
            raise Refused(f"the key `{key[:80]}` has a value of the unknown type {kind}")
        return self._number(SCALARS[kind], "keys")

    def _array(self, key: str) -> Any:
        kind = self._number("<I", "keys")
        if kind == ARRAY:
            raise Refused(f"the key `{key[:80]}` has an array of arrays")
        if kind != STRING and kind not in SCALARS:
            raise Refused(f"the key `{key[:80]}` has an array of the unknown type {kind}")
        width = 8 if kind == STRING else struct.calcsize(SCALARS[kind])
        count = self._count(f"entries in `{key[:80]}`", self._bounds.array, smallest=width)
        if kind == STRING:
            for _ in range(count):
                self._take(self._number("<Q", "array"), "array")
            return range(count)
        data = self._take(count * width, "array")
        return struct.unpack(f"<{count}{SCALARS[kind][1]}", data) if count <= KEPT else range(count)

    def _tensor(self, alignment: int) -> Tensor:
        name = self._string("tensor's name", 1024)
        dimensions = self._number("<I", "table of tensors")
        if not 1 <= dimensions <= 4:  # noqa: PLR2004 - ggml's limit
            raise Refused(f"the tensor `{name}` has {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", self._take(8 * dimensions, "table of tensors"))
        kind = self._number("<I", "table of tensors")
        offset = self._number("<Q", "table of tensors")
        if kind not in TYPES:
            raise Refused(f"the tensor `{name}` has the unknown type {kind}")
        if not all(1 <= each < 1 << 31 for each in shape):
            raise Refused(f"the tensor `{name}` has the shape {list(shape)}")
        if offset % alignment:
            raise Refused(f"the tensor `{name}` is not aligned")
        return Tensor(name=name, shape=shape, kind=kind, offset=offset, size=_size(name, shape, kind))

    def _check_table(self, table: Sequence[Tensor], data: int) -> None:
        if len({each.name for each in table}) != len(table):
            raise Refused("a tensor is there twice")
        room = self._file.size - data
        end = 0
        for each in sorted(table, key=lambda tensor: tensor.offset):
            if each.offset < end:
                raise Refused(f"the tensor `{each.name}` overlaps another one")
            end = each.offset + each.size
            if end > room:
                raise Refused(f"the tensor `{each.name}` reaches past the end of the file")


def _size(name: str, shape: tuple[int, ...], kind: int) -> int:
    label, entries, width = TYPES[kind]
    if shape[0] % entries:
        raise Refused(f"the tensor `{name}` has rows of {shape[0]}, which {label} cannot hold")
    count = 1
    for each in shape:
        count *= each
    return count // entries * width


def padding(position: int, alignment: int) -> int:
    """Bytes to the next multiple of the alignment."""
    return -position % alignment


# --- Writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Value:
    """A key's value with its type."""

    kind: int
    data: Any


def key_values(values: Mapping[str, Value]) -> bytes:
    """Keys and values as they stand in a file."""
    return b"".join(
        _text(key) + struct.pack("<I", value.kind) + _encoded(value.kind, value.data) for key, value in values.items()
    )


def _encoded(kind: int, data: Any) -> bytes:
    if kind == STRING:
        return _text(data)
    if kind == ARRAY:
        return struct.pack(f"<IQ{len(data)}I", UINT32, len(data), *data)
    return struct.pack(SCALARS[kind], data)


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def table(tensors: Sequence[tuple[str, tuple[int, ...], int, int]], alignment: int) -> bytes:
    """A table of tensors, given as name, shape, type and size, whose data follow each other."""
    lines = []
    offset = 0
    for name, shape, kind, size in tensors:
        lines.append(_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset))
        offset += size + padding(size, alignment)
    return b"".join(lines)


def head(version: int, tensors: int, keys: int) -> bytes:
    """The first bytes of a file, `HEAD` of them."""
    return MAGIC + struct.pack("<IQQ", version, tensors, keys)


def file(values: Mapping[str, Value], tensors: Sequence[tuple[str, Any]]) -> Iterator[bytes]:
    """A whole file of F32 and F16 arrays, piece by piece."""
    lines = [(name, tuple(reversed(data.shape)), int(data.dtype.itemsize == 2), data.nbytes) for name, data in tensors]  # noqa: PLR2004
    front = head(3, len(tensors), len(values)) + key_values(values) + table(lines, ALIGNMENT)
    yield front + bytes(padding(len(front), ALIGNMENT))
    for _, data in tensors:
        yield data.astype(data.dtype.newbyteorder("<"), order="C", copy=False).tobytes()
        yield bytes(padding(data.nbytes, ALIGNMENT))
