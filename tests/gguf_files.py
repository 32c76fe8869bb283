"""GGUF files made by hand, valid and malformed."""

from __future__ import annotations

import struct

U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def figure(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", U32, value)


def word(key: str, value: str) -> bytes:
    return text(key) + struct.pack("<I", STRING) + text(value)


def number(key: str, value: float) -> bytes:
    return text(key) + struct.pack("<If", F32, value)


def flag(key: str, value: bool) -> bytes:
    return text(key) + struct.pack("<I?", BOOL, value)


def words_of(key: str, values: list[str]) -> bytes:
    return text(key) + struct.pack("<IIQ", ARRAY, STRING, len(values)) + b"".join(map(text, values))


def head(architecture: str = "llama", *more: bytes) -> list[bytes]:
    return [
        word("general.architecture", architecture),
        figure(f"{architecture}.context_length", 64),
        figure(f"{architecture}.embedding_length", 32),
        figure(f"{architecture}.block_count", 1),
        *more,
    ]


def tensor(name: str = "token_embd.weight", shape: tuple[int, ...] = (32, 8), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(keys: list[bytes] | None = None, tensors: list[bytes] | None = None, *, data: int = 1024) -> bytes:
    """Return a model, by default with one tensor: a valid head, and data without meaning."""
    keys = head() if keys is None else keys
    tensors = [tensor()] if tensors is None else tensors
    start = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join((*keys, *tensors))
    return start + bytes(-len(start) % 32) + bytes(data)


HUGE = 1 << 62
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF file"),
    "of text": (b"<html>Not found</html>" * 50, "not a GGUF file"),
    "of another format": (b"\x08\0\0\0\0\0\0\0{}" + bytes(99), "not a GGUF file"),
    "a mark alone": (b"GGUF", "truncated"),
    "of an old version": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version is 1"),
    "for big-endian machines": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "of countless tensors": (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0) + bytes(99), "tensors"),
    "of countless keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE) + bytes(99), "keys"),
    "with a huge key": (gguf([struct.pack("<Q", HUGE)]), "a key has"),
    "with a huge text": (gguf([text("a") + struct.pack("<IQ", STRING, HUGE)]), "bytes of text in `a`"),
    "with a huge list": (gguf([text("a") + struct.pack("<IIQ", ARRAY, U32, HUGE)]), "entries of arrays"),
    "with a long list of texts": (
        gguf([text("a") + struct.pack("<IIQ", ARRAY, STRING, 1 << 22)]),
        "more than the file can hold",
    ),
    "with lists in lists": (gguf([text("a") + struct.pack("<IIQ", ARRAY, ARRAY, 1)]), "array of arrays"),
    "with an unknown type": (gguf([text("a") + struct.pack("<I", 99)]), "`a` has a value of the unknown type 99"),
    "with a key twice": (gguf([figure("a", 1), figure("a", 2)]), "`a` occurs twice"),
    "with a key that is not text": (gguf([struct.pack("<Q", 2) + b"\xff\xff"]), "a key is not UTF-8"),
    "aligned to 3": (gguf(head("llama", figure("general.alignment", 3))), "alignment is '3'"),
    "cut in its head": (gguf()[:100], "truncated"),
    "cut in its tensors": (gguf(data=1000), "24 bytes are missing"),
    "with a tensor twice": (gguf(tensors=[tensor(), tensor()]), "`token_embd.weight` occurs twice"),
    "with a tensor of no size": (gguf(tensors=[tensor(shape=(32, 0))]), r"shape \(32, 0\)"),
    "with a tensor of a huge size": (gguf(tensors=[tensor(shape=(1 << 40,) * 4)]), "bytes are missing"),
    "with a tensor of nine dimensions": (gguf(tensors=[tensor(shape=(1,) * 9)]), "9 dimensions"),
    "with a tensor of an unknown type": (gguf(tensors=[tensor(kind=99)]), "unknown type 99"),
    "with a tensor in broken blocks": (gguf(tensors=[tensor(shape=(33,), kind=8)]), "Q8_0 comes in blocks of 32"),
    "with a tensor beyond its end": (gguf(tensors=[tensor(offset=HUGE)]), "bytes are missing"),
    "with a tensor at an odd place": (gguf(tensors=[tensor(offset=3)]), "multiple of 32"),
}
"""What is wrong with a file: its bytes, and words of the error."""
