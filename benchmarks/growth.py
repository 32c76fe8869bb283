"""How the cost of Graftage grows with the size of its input, and the power law that fits each curve."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from benchmarks.run import Bench

Figures: TypeAlias = "Mapping[str, float]"
Series: TypeAlias = "Callable[[Bench, Sequence[int]], Iterator[Figures]]"
"""Yields figures to start from, then those of each size."""

MAX_EXPONENT = 1.1
"""The largest exponent that counts as linear growth: a measured one is never exactly 1."""
MIN_GROWTH = 2**18
"""Bytes of memory below which nothing has grown: an allocator takes as much at once."""
TURNS = [{"role": role, "content": "So much for that, and now to something else."} for role in ("user", "assistant")]
PLUGIN = """
from graftage.hookspecs import hookimpl
class Watcher:
    name = __name__
    @hookimpl
    def observe(self, event): pass
watcher = Watcher()
"""


def medians(found: Sequence[Figures]) -> Figures:
    """Return the median of each figure."""
    return {name: median(each[name] for each in found) for name in found[0]}


def from_commands(command: Callable[[int], Mapping[str, Any]]) -> Series:
    """Measure commands of growing size in one process, which has run the smallest one before."""

    def series(bench: Bench, sizes: Sequence[int]) -> Iterator[Figures]:
        with bench.worker("graftage") as ask:
            for size in (sizes[0], *sizes):
                yield medians([ask(command(size)) for _ in range(1 if bench.quick else 3)])

    return series


def from_installed(entry: str, module: str = "") -> Series:
    """Measure fresh processes with a growing number of installed distributions."""

    def series(bench: Bench, sizes: Sequence[int]) -> Iterator[Figures]:
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                for name in (f"some_{number}" for number in range(size)):
                    info = Path(folder) / f"{name}-1.0.dist-info"
                    info.mkdir()
                    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
                    (info / "entry_points.txt").write_text(entry.format(name=name))
                    (Path(folder) / f"{name}.py").write_text(module)
                figures = medians([bench.fresh("graftage", folder) for _ in range(1 if bench.quick else 5)])
            if size == sizes[0]:
                yield figures
            yield figures

    return series


CURVES: tuple[tuple[Series, Sequence[int], Mapping[str, str]], ...] = (
    (
        from_commands(lambda size: {"what": "stream", "model": f"chunks-{size}", "times": max(1, 2000 // size)}),
        (10, 100, 1_000, 10_000, 100_000),
        {"chunks of a stream": "cpu"},
    ),
    (
        from_commands(lambda size: {"what": "streams", "model": "chunks-20", "times": size}),
        (1, 10, 30, 100, 300, 1_000),
        {"async streams at once": "cpu"},
    ),
    (
        from_commands(
            lambda size: (
                {"what": "chat", "model": "chunks-1", "times": max(5, 100 // size)}
                | {"prompt": (TURNS * size)[: size - 1] + TURNS[:1]}
            )
        ),
        (1, 10, 100, 500, 1_000, 2_000),
        {"messages of a conversation": "cpu"},
    ),
    (
        from_installed("[console_scripts]\n{name} = {name}:main\n"),
        (10, 30, 100, 300, 1_000),
        {"installed distributions, first client": "construct"},
    ),
    (
        from_installed("[graftage.plugins]\n{name} = {name}:watcher\n", PLUGIN),
        (1, 5, 10, 20, 50),
        {"plugins, first client": "construct", "plugins, each chat": "next chat"},
    ),
)
"""For each series its sizes, and the figure that each curve shows."""


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Return the exponent of the power law that fits the larger half of the points, where fixed costs matter least."""
    half = min(len(sizes) // 2, len(sizes) - 2)
    points = [(math.log(size), math.log(value)) for size, value in zip(sizes[half:], values[half:], strict=True)]
    x, y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    rise: float = sum((each - x) * (value - y) for each, value in points)
    square: float = sum((each - x) ** 2 for each, _ in points)
    return rise / square


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Measure all curves. Memory is the growth of the peak."""
    found = []
    for series, all_sizes, figures in CURVES:
        print("growth:", *figures, file=sys.stderr, flush=True)
        sizes = all_sizes[:2] if bench.quick else all_sizes
        try:
            base, *points = series(bench, sizes)
        except RuntimeError as error:
            # The other curves are still measured.
            print("growth:", *figures, error, file=sys.stderr, flush=True)
            continue
        memory = [max(0.0, point["memory"] - base["memory"]) for point in points]
        for title, figure in figures.items():
            cpu = [point[figure] for point in points]
            grown = [max(MIN_GROWTH, each) for each in memory]
            exponents = {"cpu": exponent(sizes, cpu), "memory": exponent(sizes, grown)}
            curve = {"title": title, "sizes": sizes, "cpu": cpu, "memory": memory, "exponents": exponents}
            found.append({**curve, "linear": max(exponents.values()) <= MAX_EXPONENT})
    return found
