"""How the cost of Graftage grows: each point in a process of its own, each curve with the power law fitted to it."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.run import Bench

STRAIGHT = 1.1
"""The exponent up to which growth counts as straight: a measured one is never exactly 1."""
LEAST = 2**18
"""Bytes below which memory has not grown: what an allocator takes at once."""
PLUGIN = """
from graftage.hookspecs import hookimpl
class Watcher:
    name = "{name}"
    @hookimpl
    def observe(self, event): pass
watcher = Watcher()
"""
TURNS = [{"role": role, "content": "So much for that, and now to something else."} for role in ("user", "assistant")]


def _ask(bench: Bench, path: str = "", **command: Any) -> tuple[float, float]:
    """CPU time and memory of a command, given to a process that has done a little of the same."""
    with bench.worker("graftage", path) as ask:
        model = "chunks-2"
        ask({**command, "model": model, "times": 2, "prompt": "Hello"})
        figures = ask(command)
        return figures["cpu"], figures["memory"]


def _stream(bench: Bench, size: int) -> tuple[float, float]:
    return _ask(bench, how="repeat", what="stream", model=f"chunks-{size}", times=max(1, 2000 // size))


def _streams(bench: Bench, size: int) -> tuple[float, float]:
    return _ask(bench, how="together", what="streams", model="chunks-20", times=size)


def _messages(bench: Bench, size: int) -> tuple[float, float]:
    said = (TURNS * size)[: size - 1] + TURNS[:1]
    return _ask(bench, how="repeat", what="chat", model="chunks-1", times=max(5, 100 // size), prompt=said)


def _add(folder: Path, name: str, entry: str) -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(entry, encoding="utf-8")


def _connect(bench: Bench, path: str) -> tuple[float, float]:
    """The first client of a process; the median of some."""
    found = [bench.fresh("graftage", path) for _ in range(1 if bench.quick else 5)]
    return median(each["construct"] for each in found), median(each["memory"] for each in found)


def _distributions(bench: Bench, size: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as path:
        for number in range(size):
            _add(Path(path), f"some_{number}", f"[console_scripts]\nsome_{number} = some_{number}:main\n")
        return _connect(bench, path)


def _with_plugins(measure: Callable[[Bench, str], tuple[float, float]]) -> Callable[[Bench, int], tuple[float, float]]:
    def at(bench: Bench, size: int) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as path:
            for number in range(size):
                name = f"watcher_{number}"
                _add(Path(path), name, f"[graftage.plugins]\n{name} = {name}:watcher\n")
                (Path(path) / f"{name}.py").write_text(PLUGIN.format(name=name), encoding="utf-8")
            return measure(bench, path)

    return at


def _chat(bench: Bench, path: str) -> tuple[float, float]:
    return _ask(bench, path, how="repeat", what="chat", model="chunks-20", times=50)


CURVES: tuple[tuple[str, Sequence[int], Callable[[Bench, int], tuple[float, float]]], ...] = (
    ("chunks of a stream", (10, 100, 1_000, 10_000, 100_000), _stream),
    ("async streams at once", (1, 10, 30, 100, 300, 1_000), _streams),
    ("messages of a conversation", (1, 10, 100, 500, 1_000, 2_000), _messages),
    ("installed distributions, first client", (10, 30, 100, 300, 1_000), _distributions),
    ("plugins, first client", (1, 5, 10, 20, 50), _with_plugins(_connect)),
    ("plugins, a chat", (1, 5, 10, 20, 50), _with_plugins(_chat)),
)


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The exponent of the power law through the larger half of the points, where fixed costs weigh least."""
    half = min(len(sizes) // 2, len(sizes) - 2)
    points = [(math.log(size), math.log(value)) for size, value in zip(sizes[half:], values[half:], strict=True)]
    middle_x, middle_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    slope: float = sum((x - middle_x) * (y - middle_y) for x, y in points)
    square: float = sum((x - middle_x) ** 2 for x, _ in points)
    return slope / square


def measure(bench: Bench) -> list[dict[str, Any]]:
    """All curves."""
    found = []
    for title, sizes, at in CURVES:
        print(f"growth: {title}", file=sys.stderr, flush=True)
        taken = sizes[:2] if bench.quick else sizes
        cpu, memory = zip(*(at(bench, size) for size in taken), strict=True)
        least = min(memory) if title.endswith("first client") else 0.0  # There it is that of a whole process.
        risen = [max(LEAST, each - least) for each in memory]
        exponents = {"cpu": exponent(taken, cpu), "memory": exponent(taken, risen)}
        straight = max(exponents.values()) <= STRAIGHT
        found.append(
            {"title": title, "sizes": taken, "cpu": cpu, "memory": memory, "exponents": exponents, "straight": straight}
        )
    return found
