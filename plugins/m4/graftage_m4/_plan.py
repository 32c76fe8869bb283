"""Which models fit with which windows, how fast they will be, and the same as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Final, Literal

from graftage_m4._footprint import Shape, footprint
from graftage_m4._machine import Budget, budget_of, gb
from graftage_m4._policy import LADDER
from graftage_m4._speed import decode_speed, prefill_seconds

if TYPE_CHECKING:
    from graftage_m4._policy import Policy

__all__ = ["WINDOWS", "Cell", "Ground", "Row", "ground", "picture", "rows"]

WINDOWS: Final = LADDER[:-1]
TIGHT: Final = 0.9
"""A model that takes more of the budget than this fits tightly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One model with one window."""

    window: int
    verdict: Literal["fits", "tight", "no", "untrained"]
    """`tight`: it fits the budget, but not what is free now, or hardly; `untrained`: the model has no such window."""
    bytes: int
    prefill: float | None
    """Seconds to read a prompt as long as the window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model."""

    model: str
    weights: int
    speed: float | None
    """Tokens per second of a short answer."""
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()

    @property
    def largest(self) -> int | None:
        """The largest window of those asked for that the budget holds."""
        return max((cell.window for cell in self.cells if cell.verdict in ("fits", "tight")), default=None)

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        cells = [asdict(cell) for cell in self.cells]
        return {
            "model": self.model,
            "weights": self.weights,
            "tokens_per_second": self.speed,
            "largest_window": self.largest,
            "windows": cells,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """The machine that a plan is for."""

    title: str
    budget: Budget
    live: int | None
    """Bytes that a model could take now."""
    chip: str | None
    low_power: bool


def ground(policy: Policy) -> Ground | None:
    """The machine of a policy; `None` where neither its memory nor Metal's share is known."""
    static, readings = policy.collector.static(), policy.collector.readings()
    budget = budget_of(static, readings, policy.settings.profile)
    if budget is None:
        return None
    memory = static.memory or budget.cap
    free = readings.available(memory)
    return Ground(
        title=f"{static.chip or 'unknown chip'}, {memory / (1 << 30):.0f} GB, macOS {static.os or 'unknown'}",
        budget=budget,
        live=None if free is None else max(free - budget.live_reserve, 0),
        chip=static.chip,
        low_power=bool(readings.low_power),
    )


def rows(models: Mapping[str, Shape], on: Ground, policy: Policy, windows: Sequence[int] = WINDOWS) -> list[Row]:
    """The plan: a row for each model, a cell for each window."""
    return [
        Row(
            model=name,
            weights=shape.weights,
            speed=decode_speed(shape, on.chip, low_power=on.low_power),
            cells=tuple(_cell(shape, window, on, policy) for window in windows),
            notes=shape.notes,
        )
        for name, shape in models.items()
    ]


def size_with(shape: Shape, window: int, policy: Policy) -> int:
    """Bytes of a model with a window, in the server that the settings describe."""
    settings = policy.settings
    return footprint(
        shape,
        window,
        slots=settings.slots or 1,
        kv_type=settings.kv_type,
        flash_attention=settings.flash_attention,
    ).total


def _cell(shape: Shape, window: int, on: Ground, policy: Policy) -> Cell:
    size = size_with(shape, window, policy)
    verdict: Literal["fits", "tight", "no", "untrained"] = "fits"
    if shape.trained_window is not None and window > shape.trained_window:
        verdict = "untrained"
    elif size > on.budget.static:
        verdict = "no"
    elif size > TIGHT * on.budget.static or (on.live is not None and size > on.live):
        verdict = "tight"
    seconds = prefill_seconds(shape, on.chip, window, low_power=on.low_power)
    return Cell(window=window, verdict=verdict, bytes=size, prefill=seconds)


# --- The picture -----------------------------------------------------------------------------------------------------

WIDTH: Final = 860
HEIGHT: Final = 480
LEFT: Final = 60
RIGHT: Final = 200
TOP: Final = 50
BOTTOM: Final = 50
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7f7f7f", "#8c564b")
"""Told apart by those who do not see all colours."""


def picture(models: Mapping[str, Shape], on: Ground, policy: Policy, windows: Sequence[int] = WINDOWS) -> str:
    """Footprint against window as SVG, with the line of the budget."""
    curves = {
        name: [size_with(shape, window, policy) for window in windows if window <= (shape.trained_window or window)]
        for name, shape in models.items()
    }
    top = max([on.budget.static * 1.25, *(min(sizes[0], on.budget.static * 3) for sizes in curves.values() if sizes)])
    frame = _Frame(windows, top)
    parts = [frame.axes(), frame.line(on.budget.static, "budget", "#b00020")]
    if on.live is not None and on.live < on.budget.static:
        parts.append(frame.line(on.live, "free now", "#b06000"))
    labels: list[float] = []
    for place, (name, sizes) in enumerate(curves.items()):
        parts.append(frame.curve(name, sizes, COLOURS[place % len(COLOURS)], labels))
    title = f"Memory of models by context window: {on.title}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><title>{escape(title)}</title><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{LEFT}" y="24" font-size="15">{escape(title)}</text>{"".join(parts)}</svg>\n'
    )


class _Frame:
    """Where a window and a size lie on the picture."""

    def __init__(self, windows: Sequence[int], top: float) -> None:
        self._windows = windows
        self._top = top

    def x(self, place: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * place / max(len(self._windows) - 1, 1)

    def y(self, size: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(size / self._top, 1.0)

    def axes(self) -> str:
        step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if self._top / 1e9 / step <= 12)  # noqa: PLR2004
        marks = range(0, int(self._top / 1e9) + 1, step)
        return "".join([*map(self._mark, marks), *(self._tick(place) for place in range(len(self._windows)))])

    def _mark(self, gigabytes: int) -> str:
        y = self.y(gigabytes * 1e9)
        return (
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{gigabytes} GB</text>'
        )

    def _tick(self, place: int) -> str:
        y = HEIGHT - BOTTOM + 20
        return f'<text x="{self.x(place):.1f}" y="{y}" text-anchor="middle">{short(self._windows[place])}</text>'

    def line(self, size: float, name: str, colour: str) -> str:
        y = self.y(size)
        return (
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}" '
            f'stroke-dasharray="6 4" stroke-width="2"/>'
            f'<text x="{LEFT + 6}" y="{y - 6:.1f}" fill="{colour}">{name} {gb(size)}</text>'
        )

    def curve(self, name: str, sizes: Sequence[int], colour: str, labels: list[float]) -> str:
        """A model's line, and its name where no other stands."""
        if not sizes:
            return ""
        points = " ".join(f"{self.x(place):.1f},{self.y(size):.1f}" for place, size in enumerate(sizes))
        y = self.y(sizes[-1])
        while any(abs(y - other) < 14 for other in labels):  # noqa: PLR2004 - the height of a line of text
            y += 14
        labels.append(y)
        last = self.x(len(sizes) - 1)
        return (
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
            f'<line x1="{last:.1f}" y1="{self.y(sizes[-1]):.1f}" x2="{WIDTH - RIGHT + 8}" y2="{y:.1f}" '
            f'stroke="{colour}" stroke-width="0.5"/>'
            f'<text x="{WIDTH - RIGHT + 12}" y="{y + 4:.1f}" fill="{colour}">{escape(printable(name))}</text>'
        )


def short(window: int) -> str:
    """`8k`."""
    return f"{window // 1024}k" if window % 1024 == 0 else str(window)


def printable(text: str) -> str:
    """A name that a server gave, without what could steer a terminal or break a picture."""
    return "".join(each if each.isprintable() else "?" for each in text)


def lines(plan: Iterable[Row]) -> list[list[str]]:
    """The plan as text: model, weights, speed, and a cell for each window."""
    return [
        [
            printable(row.model),
            gb(row.weights),
            "-" if row.speed is None else f"{row.speed:.0f}",
            *map(_text, row.cells),
        ]
        for row in plan
    ]


def _text(cell: Cell) -> str:
    if cell.verdict == "untrained":
        return "-"
    text = f"{cell.verdict} {gb(cell.bytes)}"
    return text if cell.verdict == "no" or cell.prefill is None else f"{text} {_seconds(cell.prefill)}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f}s" if seconds < 120 else f"{seconds / 60:.0f}m"  # noqa: PLR2004
