"""The reader of GGUF heads: valid files are read, others refused, in memory proportional to their size."""

from __future__ import annotations

import io
import os
import random
import struct
import tracemalloc
from pathlib import Path

import pytest
from gguf import GGML_QUANT_SIZES
from gguf_files import ARRAY, MALFORMED, STRING, U32, figure, gguf, head, tensor, text, word

from graftage.gguf import BLOCKS, TYPES, GgufError, bytes_of, read, read_file


def array(key: str, kind: int, count: int, values: bytes) -> bytes:
    return text(key) + struct.pack("<IIQ", ARRAY, kind, count) + values


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "given.gguf"


def test_head_lists_keys_and_tensors(path: Path) -> None:
    keys = head("llama", figure("general.file_type", 15), array("llama.heads", U32, 3, struct.pack("<3I", 1, 7, 2)))
    path.write_bytes(gguf(keys, [tensor(), tensor("output.weight", (32, 2), 8, 1024)], data=1024 + 68))
    found = read_file(path)
    assert (found.version, found.architecture, found.quantization) == (3, "llama", "Q4_K_M")
    assert (found.figure("block_count"), found.figure("heads"), found.figure("nothing")) == (1, 7, None)
    assert found.metadata["llama.heads"] == (1, 7, 2)
    places = [
        (each.name, each.shape, each.kind, each.offset - found.data, each.size) for each in found.tensors.values()
    ]
    assert places == [("token_embd.weight", (32, 8), "F32", 0, 1024), ("output.weight", (32, 2), "Q8_0", 1024, 68)]
    assert found.size == path.stat().st_size == found.data + 1092


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_file_is_refused_with_reason(kind: str, path: Path) -> None:
    data, words = MALFORMED[kind]
    path.write_bytes(data)
    with pytest.raises(GgufError, match=words):
        read_file(path)


def test_long_array_is_only_counted(path: Path) -> None:
    words = b"".join(text(str(place)) for place in range(5000))
    path.write_bytes(
        gguf(head("llama", array("words", STRING, 5000, words), array("scores", U32, 5000, bytes(20_000))))
    )
    assert [len(read_file(path).metadata[key]) for key in ("words", "scores")] == [5000, 5000]
    assert read_file(path).metadata["words"] == range(5000)
    assert read_file(path, long_arrays=True).metadata["words"][4999] == "4999"


def test_array_entries_are_bounded_together() -> None:
    some = (1 << 22) + 1
    data = gguf([array("a", 0, some, bytes(some)), array("b", 0, some, bytes(some))])
    with pytest.raises(GgufError, match="entries of arrays in `b`"):
        read(io.BytesIO(data), len(data))


def test_open_file_is_read_within_bounds() -> None:
    data = gguf()
    source = io.BytesIO(data)
    found = read(source, len(data))
    assert found.keys_end < source.tell() <= found.data
    with pytest.raises(GgufError, match="larger than 64 bytes"):
        read(io.BytesIO(data), len(data), most=64)


def test_file_that_shrinks_is_refused() -> None:
    with pytest.raises(GgufError, match="became shorter"):
        read(io.BytesIO(gguf()[:60]), len(gguf()))


def test_pipe_and_folder_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path / "pipe.gguf", tmp_path):
        with pytest.raises(GgufError, match="not a regular file"):
            read_file(path)


def test_overlapping_tensors_are_refused(path: Path) -> None:
    path.write_bytes(gguf(tensors=[tensor(), tensor("output.weight", (32, 2), 0, 32)]))
    with pytest.raises(GgufError, match=r"`output\.weight` overlaps"):
        read_file(path)


def test_blocks_match_ggml() -> None:
    # Q8_1 is never in a file, and the `gguf` package still gives it its first size of 40 bytes.
    theirs = {kind.name: (kind.value, *block) for kind, block in GGML_QUANT_SIZES.items() if kind.name != "Q8_1"}
    ours = {kind: (TYPES[kind], *BLOCKS[kind]) for kind in theirs}
    assert ours == theirs
    assert (bytes_of("Q4_K", 512), bytes_of("INT8", 128)) == (288, 136)


def test_endless_head_stops_at_the_limit(path: Path) -> None:
    block = text("a" * 1000)
    words = [text(f"k{place}") + struct.pack("<IIQ", ARRAY, STRING, 1000) + block * 1000 for place in range(80)]
    path.write_bytes(gguf(words))
    with pytest.raises(GgufError, match="larger than"):
        read_file(path)


def test_memory_is_proportional_to_the_head(path: Path) -> None:
    words = b"".join(text(f"{place:02x}"[-2:]) for place in range(1 << 15))
    path.write_bytes(gguf(head("llama", text("a") + struct.pack("<IIQ", ARRAY, STRING, 1 << 15) + words)))
    peaks = []
    for long_arrays in (True, False):
        tracemalloc.start()
        read_file(path, long_arrays=long_arrays)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 10 * path.stat().st_size
    assert peaks[1] < path.stat().st_size


def test_damaged_file_is_read_or_refused(path: Path) -> None:
    whole = gguf(head("llama", text("list") + struct.pack("<IIQ3I", ARRAY, U32, 3, 1, 2, 3), word("w", "x" * 50)))
    chance = random.Random(7)
    refused = 0
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(whole) - 1024)] = chance.choice((0, 1, 127, 255, chance.randrange(256)))
        path.write_bytes(data[: chance.choice((len(data), chance.randrange(len(data))))])
        try:
            read_file(path)
        except GgufError:
            refused += 1
    assert 1000 < refused < 2000
