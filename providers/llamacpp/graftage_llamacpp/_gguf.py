"""Reads the head of a GGUF file with bounds, and refuses by name what the engine could not use.

The engine says "Failed to init server" whatever is wrong, and a hostile head has killed other readers: every length is
checked against what is left of the file before anything is read, so time and memory stay in proportion to the bytes.
"""

from __future__ import annotations

import math
import stat
import struct
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = ["ARCHITECTURES", "GgufError", "Header", "Tensor", "check_adapter", "check_model", "read"]

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
MAX_HEADER: Final = 64 * 1024 * 1024
"""The largest vocabularies in use take a quarter of that."""
MAX_KEYS: Final = 4096
MAX_TENSORS: Final = 65_536
MAX_ENTRIES: Final = 1 << 22
"""Of all lists together: a million words have each a score, a type and a place in the merges."""
LONG: Final = 1024
"""Entries above which a list is none of figures, one for each layer, but belongs to the vocabulary."""
MAX_STRING: Final = 1 << 20
LENGTH: Final = struct.Struct("<Q")
"""What stands before each text."""
MAX_NAME: Final = 255
"""Bytes of a key; ggml's limit for a tensor's name is 63."""
MAX_DIMENSIONS: Final = 4
MAX_SIZE: Final = 1 << 40
"""Entries along one dimension."""
DEFAULT_ALIGNMENT: Final = 32
MAX_ALIGNMENT: Final = 1 << 20

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
STRING: Final = 8
ARRAY: Final = 9

TENSOR_TYPES: Final[Mapping[int, tuple[str, int, int]]] = {
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
"""Number to name, entries in a block, bytes of a block."""

FILE_TYPES: Final = dict(
    enumerate(
        """
        F32 F16 Q4_0 Q4_1 - - - Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K IQ2_XXS
        IQ2_XS Q2_K_S IQ3_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M BF16 - - - TQ1_0 TQ2_0 MXFP4
        """.split()  # noqa: SIM905 - a table reads better than forty lines
    )
)
"""What `general.file_type` means."""

ARCHITECTURES: Final = frozenset(
    """
    afmoe apertus arcee arctic arwkv7 baichuan bailingmoe bailingmoe2 bailingmoe3 bert bitnet bloom chameleon
    chatglm codeshell cogvlm cohere2 cohere2moe command-r dbrx deci deepseek deepseek2 deepseek2-ocr deepseek32
    deepseek4 dots1 dots3note dream ernie4_5 ernie4_5-moe eurobert exaone exaone-moe exaone4 falcon falcon-h1
    gemma gemma-embedding gemma-embedding2 gemma2 gemma3 gemma3n gemma4 gemma4-assistant glm-dsa glm4 glm4moe
    glm5-next gpt-oss gpt2 gptneox granite granite_swa granitehybrid granitemoe graniteswitch grok grovemoe
    hrm_text hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 hy_v4 internlm2 jais jais2 jamba jina-bert-v2 jina-bert-v3
    k2-horizon kimi-k3 kimi-linear laguna lfm2 lfm2moe llada llada-moe llama llama-embed llama4 maincoder mamba
    mamba2 maple mellum mimo2 minicpm minicpm3 minimax-01 minimax-m2 mistral3 mistral4 modern-bert mpt nanbeige
    nemotron nemotron_h nemotron_h_moe neo-bert nomic-bert nomic-bert-moe olmo olmo2 olmoe openelm orion paddleocr
    pangu-embedded phi2 phi3 phimoe plamo plamo2 plamo3 plm pockettts qwen qwen2 qwen2moe qwen2vl qwen3 qwen35
    qwen35moe qwen3moe qwen3next qwen3tts qwen3vl qwen3vlmoe qwen4exp refact rnd1 rwkv6 rwkv6qwen2 rwkv7 seed_oss
    smallthinker smollm3 spark2_5 stablelm starcoder starcoder2 step35 t5 t5encoder talkie wavtokenizer-dec xverse
    """.split()  # noqa: SIM905 - a list of 149 lines is not easier to read
)
"""What the pinned engine knows: each name was tried on it with an otherwise empty model."""


class GgufError(Exception):
    """What is wrong with a file, in words; it never leaves the provider."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor's place in the file."""

    shape: tuple[int, ...]
    """As GGUF has it: the dimension that varies fastest comes first."""
    kind: str
    offset: int
    """From the start of the file."""
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """All of a file but the numbers in its tensors."""

    version: int
    metadata: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, Tensor] = field(repr=False)
    size: int
    """Bytes of the file."""

    @property
    def architecture(self) -> str:
        """The kind of model; empty where the file does not say."""
        found = self.metadata.get("general.architecture")
        return found if isinstance(found, str) else ""

    def figure(self, name: str) -> int | None:
        """A number of the architecture, such as `block_count`; the largest where there is one for each layer."""
        found = self.metadata.get(f"{self.architecture}.{name}")
        if isinstance(found, list):
            found = max((each for each in found if isinstance(each, int)), default=None)
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    @property
    def template(self) -> str:
        """The chat template; empty where there is none."""
        found = self.metadata.get("tokenizer.chat_template")
        return found if isinstance(found, str) else ""


def read(path: Path, *, long_lists: bool = True) -> Header:
    """The head of a file, once it is known to be sound and the file to be whole.

    Without `long_lists` the vocabulary is checked but not kept: it is most of a head, and few need it.

    Raises:
        GgufError: it is not GGUF, of a version or byte order that is not read, corrupt, or cut.
        OSError: it cannot be opened.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise GgufError("it is no regular file")  # To open a pipe would wait for ever.
    with path.open("rb") as file:
        return _Reader(file, status.st_size, long_lists=long_lists).header()


class _Reader:
    """Reads on, and keeps count of what is left."""

    def __init__(self, file: BinaryIO, size: int, *, long_lists: bool) -> None:
        self._file = file
        self._size = size
        self._long_lists = long_lists
        self._entries = 0
        self._place = 0
        self._limit = min(size, MAX_HEADER)

    def header(self) -> Header:
        version = self._version()
        tensor_count, key_count = self._number("Q"), self._number("Q")
        _bound("tensors", tensor_count, MAX_TENSORS)
        _bound("keys", key_count, MAX_KEYS)
        metadata: dict[str, Any] = {}
        seen: set[str] = set()
        for _ in range(key_count):
            key = self._name("a key")
            if key in seen:
                raise GgufError(f"the key `{key}` is there twice")
            seen.add(key)
            value = self._value(self._number("I"), key)
            if value is not None:
                metadata[key] = value
        tensors = self._tensors(tensor_count, _alignment(metadata))
        return Header(version=version, metadata=metadata, tensors=tensors, size=self._size)

    def _version(self) -> int:
        if self._size < len(MAGIC) or self._take(len(MAGIC)) != MAGIC:
            raise GgufError("it is not a GGUF file")
        version: int = self._number("I")
        if version in VERSIONS:
            return version
        if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
            raise GgufError("it is written for big-endian machines")
        raise GgufError(f"it is of GGUF version {version}, and 2 and 3 are read")

    def _tensors(self, count: int, alignment: int) -> dict[str, Tensor]:
        found = [self._tensor() for _ in range(count)]
        start = -(-self._place // alignment) * alignment
        tensors: dict[str, Tensor] = {}
        for name, shape, kind, offset, size in found:
            if name in tensors:
                raise GgufError(f"the tensor `{name}` is there twice")
            if offset % alignment:
                raise GgufError(f"the tensor `{name}` does not begin at a multiple of {alignment}")
            if start + offset + size > self._size:
                missing = start + offset + size - self._size
                raise GgufError(f"it is cut: at least {missing} bytes are missing (tensor `{name}`)")
            tensors[name] = Tensor(shape, kind, start + offset, size)
        return tensors

    def _tensor(self) -> tuple[str, tuple[int, ...], str, int, int]:
        name = self._name("a tensor's name")
        dimensions = self._number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise GgufError(f"the tensor `{name}` has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        if not all(1 <= each <= MAX_SIZE for each in shape):
            raise GgufError(f"the tensor `{name}` has the shape {shape}")
        number = self._number("I")
        if number not in TENSOR_TYPES:
            raise GgufError(f"the tensor `{name}` is of the unknown type {number}")
        kind, entries, block = TENSOR_TYPES[number]
        if shape[0] % entries:
            raise GgufError(f"the tensor `{name}` has rows of {shape[0]}, and {kind} goes in blocks of {entries}")
        return name, shape, kind, self._number("Q"), math.prod(shape) // entries * block

    def _value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == STRING:
            return self._text(key)
        if kind == ARRAY:
            return self._array(key)
        raise GgufError(f"the key `{key}` is of the unknown type {kind}")

    def _array(self, key: str) -> list[Any] | None:
        """A list; None for one that is too long to be kept."""
        kind, count = self._number("I"), self._number("Q")
        self._entries += count
        _bound("entries of lists", self._entries, MAX_ENTRIES)
        keep = self._long_lists or count <= LONG
        if kind in SCALARS:
            code = f"<{count}{SCALARS[kind]}"
            data = self._take(struct.calcsize(code))
            return list(struct.unpack(code, data)) if keep else None
        if kind != STRING:
            raise GgufError(f"the list `{key}` holds values of type {kind}, which is not allowed")
        if count * 8 > self._limit - self._place:  # Each text has a length of 8 bytes at least.
            raise GgufError(f"the list `{key}` is longer than the file")
        texts = self._texts(key, count)
        if keep:
            return [text.decode(errors="replace") for text in texts]
        deque(texts, maxlen=0)
        return None

    def _texts(self, key: str, count: int) -> Iterator[bytes]:
        """Many texts. Vocabularies have a hundred thousand and more: this loop is most of the time of a first look."""
        read, length_of, limit, place = self._file.read, LENGTH.unpack, self._limit, self._place
        for _ in range(count):
            prefix = read(LENGTH.size)
            place += LENGTH.size
            if place > limit or len(prefix) != LENGTH.size:
                raise self._ended(place)
            (length,) = length_of(prefix)
            if length > MAX_STRING:
                raise _too_many(f"bytes of text in `{key}`", length, MAX_STRING)
            text = read(length)
            place += length
            if place > limit or len(text) != length:
                raise self._ended(place)
            yield text
        self._place = place

    def _name(self, what: str) -> str:
        length = self._number("Q")
        if not 1 <= length <= MAX_NAME:
            raise GgufError(f"{what} has {length} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise GgufError(f"{what} is not text") from error

    def _text(self, key: str) -> str:
        length = self._number("Q")
        _bound(f"bytes of text in `{key}`", length, MAX_STRING)
        return self._take(length).decode(errors="replace")

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _take(self, count: int) -> bytes:
        self._place += count
        if self._place > self._limit:
            raise self._ended(self._place)
        data = self._file.read(count)
        if len(data) != count:
            raise self._ended(self._place)
        return data

    def _ended(self, place: int) -> GgufError:
        if place <= self._limit:
            return GgufError("it became shorter while it was read")
        if self._limit < self._size:
            return GgufError(f"its head is larger than {MAX_HEADER} bytes")
        return GgufError("it is cut: it ends within its head")


def _bound(what: str, count: int, most: int) -> None:
    if count > most:
        raise _too_many(what, count, most)


def _too_many(what: str, count: int, most: int) -> GgufError:
    return GgufError(f"it claims {count} {what}; more than {most} are not read")


def _alignment(metadata: Mapping[str, Any]) -> int:
    found = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(found, int) or not 0 < found <= MAX_ALIGNMENT or found & (found - 1):
        raise GgufError(f"it is aligned to {found!r}, which is no power of two")
    return found


# --- What the engine can use -----------------------------------------------------------------------------------------


def check_model(header: Header) -> None:
    """Make sure that a file is a language model which the engine knows.

    Raises:
        GgufError: it is something else, or incomplete.
    """
    kind = header.metadata.get("general.type", "model")
    if kind == "adapter":
        raise GgufError("it is an adapter, not a model: give it as `adapter`")
    if kind != "model" or header.architecture == "clip":
        raise GgufError(f"it holds no language model but {kind if kind != 'model' else 'an image encoder'!r}")
    if header.architecture not in ARCHITECTURES:
        raise GgufError(f"its architecture {header.architecture[:80]!r} is not known to this engine")
    if header.metadata.get("split.count", 0) not in (0, 1):
        raise GgufError("it is one part of several: join them with `llama-gguf-split --merge`")
    for name in ("context_length", "embedding_length", "block_count"):
        if not header.figure(name):
            raise GgufError(f"its key `{header.architecture}.{name}` is missing")
    if not header.tensors:
        raise GgufError("it has no tensors")


def check_adapter(header: Header) -> None:
    """Make sure that a file is a LoRA adapter.

    Raises:
        GgufError: it is not.
    """
    if header.metadata.get("general.type") != "adapter" or header.metadata.get("adapter.type") != "lora":
        raise GgufError("it is not a LoRA adapter")
    if not header.tensors:
        raise GgufError("it has no tensors")
