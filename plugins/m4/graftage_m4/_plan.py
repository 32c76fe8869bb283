"""Which models fit with which windows and how fast they will be, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Final, Literal

from graftage.footprint import Shape
from graftage_m4._machine import Budget, budget_of, decode_speed, gb, prefill_seconds
from graftage_m4._policy import LADDER

if TYPE_CHECKING:
    from graftage_m4._policy import Policy

__all__ = ["WINDOWS", "Cell", "Mac", "Row", "picture", "read_mac", "rows"]

WINDOWS: Final = LADDER[:-1]
TIGHT: Final = 0.9
"""A model that takes more of the budget than this fits tightly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One model with one window."""

    window: int
    verdict: Literal["fits", "tight", "no", "untrained"]
    """`tight`: it fits the budget barely, or not what is free now; `untrained`: longer than the model's longest."""
    bytes: int
    prefill: float | None
    """Seconds to read a prompt that fills the window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model."""

    model: str
    weights: int
    speed: float | None
    """Tokens per second of a short reply."""
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()

    @property
    def largest(self) -> int | None:
        """The largest listed window that fits the budget."""
        return max((cell.window for cell in self.cells if cell.verdict in ("fits", "tight")), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain data."""
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
class Mac:
    """The Mac that a plan is for."""

    title: str
    budget: Budget
    live: int | None
    """Bytes that models could take now."""
    chip: str | None
    low_power: bool


def read_mac(policy: Policy) -> Mac | None:
    """Describe the Mac of a policy; return `None` if neither its memory nor Metal's share is known."""
    static, readings = policy.collector.static(), policy.collector.readings()
    budget = budget_of(static, readings, policy.settings.profile)
    if budget is None:
        return None
    memory = static.memory or budget.cap
    free = readings.available(memory)
    return Mac(
        title=f"{static.chip or 'unknown chip'}, {memory / (1 << 30):.0f} GB, macOS {static.os or 'unknown'}",
        budget=budget,
        live=None if free is None else max(free - budget.live_reserve, 0),
        chip=static.chip,
        low_power=bool(readings.low_power),
    )


def rows(models: Mapping[str, Shape], mac: Mac, policy: Policy, windows: Sequence[int] = WINDOWS) -> list[Row]:
    """Build the plan: a row for each model, a cell for each window."""
    return [
        Row(
            model=name,
            weights=shape.weights,
            speed=decode_speed(shape, mac.chip, low_power=mac.low_power),
            cells=tuple(_cell(shape, window, mac, policy) for window in windows),
            notes=(*shape.notes, *(f"{fact} is impossible, and ignored" for fact in shape.odd)),
        )
        for name, shape in models.items()
    ]


def _cell(shape: Shape, window: int, mac: Mac, policy: Policy) -> Cell:
    size = policy.settings.footprint(shape, window).total
    verdict: Literal["fits", "tight", "no", "untrained"] = "fits"
    if shape.trained_window is not None and window > shape.trained_window:
        verdict = "untrained"
    elif size > mac.budget.static:
        verdict = "no"
    elif size > TIGHT * mac.budget.static or (mac.live is not None and size > mac.live):
        verdict = "tight"
    seconds = prefill_seconds(shape, mac.chip, window, low_power=mac.low_power)
    return Cell(window=window, verdict=verdict, bytes=size, prefill=seconds)


# --- The picture -----------------------------------------------------------------------------------------------------

PLOT: Final = 600
"""Width within the axes."""
HEIGHT: Final = 480
"""Least height; many models need more."""
LEFT: Final = 60
TOP: Final = 50
BOTTOM: Final = 50
LINE: Final = 15
"""Height of a line of text."""
LETTER: Final = 7.5
"""Width of a letter, on the safe side: the font depends on the viewer."""
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7f7f7f", "#8c564b")
"""Colours that colour-blind readers can distinguish."""


def picture(models: Mapping[str, Shape], mac: Mac, policy: Policy, windows: Sequence[int] = WINDOWS) -> str:
    """Draw footprint against window as SVG, with a line for the budget."""
    curves = [
        _Curve(printable(name), _sizes(shape, windows, policy), COLOURS[place % len(COLOURS)])
        for place, (name, shape) in enumerate(models.items())
        if shape.trained_window is None or shape.trained_window >= windows[0]
    ]
    budget = mac.budget.static
    top = max([1e9, budget * 1.25, *(min(curve.sizes[0], budget * 3) for curve in curves)])
    frame = _Frame(windows, top, max(HEIGHT, TOP + BOTTOM + LINE * len(curves)))
    title = printable(f"Memory of models by context window: {mac.title}")
    parts = [frame.axes(), *frame.curves(curves), frame.limits(budget, mac.live)]
    longest = max(
        [LEFT + LETTER * len(title) * 15 / 12, *(frame.right + LETTER * len(each.label(top)) for each in curves)]
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {longest + LINE:.0f} {frame.height}" '
        f'font-family="sans-serif" font-size="12"><title>{escape(title)}</title>'
        f'<rect width="100%" height="100%" fill="white"/>'
        f'<text x="{LEFT}" y="24" font-size="15">{escape(title)}</text>{"".join(parts)}</svg>\n'
    )


def _sizes(shape: Shape, windows: Sequence[int], policy: Policy) -> list[int]:
    footprint = policy.settings.footprint
    return [footprint(shape, window).total for window in windows if window <= (shape.trained_window or window)]


@dataclass(frozen=True, slots=True)
class _Curve:
    """A model's line."""

    name: str
    sizes: Sequence[int]
    colour: str

    def label(self, top: float) -> str:
        """Return its name, with its last size if that lies above the picture."""
        return f"{self.name} (above: {gb(self.sizes[-1])})" if self.sizes[-1] > top else self.name


class _Frame:
    """Maps windows and sizes to places in the picture, and draws there."""

    def __init__(self, windows: Sequence[int], top: float, height: int) -> None:
        self._windows = windows
        self._top = top
        self.height = height
        self._bottom = height - BOTTOM
        self._edge = LEFT + PLOT
        self.right = self._edge + LINE
        """Where the labels begin."""

    def x(self, place: float) -> float:
        return LEFT + PLOT * place / max(len(self._windows) - 1, 1)

    def y(self, size: float) -> float:
        return self._bottom - (self._bottom - TOP) * min(size / self._top, 1.0)

    def axes(self) -> str:
        step = 1.0
        while self._top / 1e9 / step > 12:
            step *= 2.5 if str(step).startswith("2") else 2  # 1, 2, 5, 10 and so on
        marks = (step * place for place in range(int(self._top / 1e9 / step) + 1))
        return "".join([*map(self._mark, marks), *(self._tick(place) for place in range(len(self._windows)))])

    def _mark(self, gigabytes: float) -> str:
        y = self.y(gigabytes * 1e9)
        return (
            f'<line x1="{LEFT}" x2="{self._edge}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{gigabytes:.0f} GB</text>'
        )

    def _tick(self, place: int) -> str:
        y = self._bottom + 20
        return f'<text x="{self.x(place):.1f}" y="{y}" text-anchor="middle">{short(self._windows[place])}</text>'

    def limits(self, budget: int, live: int | None) -> str:
        """Draw the line of the budget, labelled above it, and that of free memory, labelled below it."""
        drawn = self._limit(budget, f"budget {gb(budget)}", "#b00020", -6)
        if live is None or live >= budget:
            return drawn
        # If little is free, there is no place below the line, and enough above it.
        below = LINE if self.y(live) < self._bottom - LINE else -6
        return drawn + self._limit(live, f"free now {gb(live)}", "#b06000", below)

    def _limit(self, size: float, text: str, colour: str, shift: int) -> str:
        y = self.y(size)
        return (
            f'<line x1="{LEFT}" x2="{self._edge}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}" '
            f'stroke-dasharray="6 4" stroke-width="2"/>'
            f'<rect x="{LEFT + 3}" y="{y + shift - 11:.1f}" width="{LETTER * len(text):.0f}" height="14" '
            f'fill="white" fill-opacity="0.7"/>'
            f'<text x="{LEFT + 6}" y="{y + shift:.1f}" fill="{colour}">{text}</text>'
        )

    def curves(self, curves: Sequence[_Curve]) -> list[str]:
        """Draw the models' lines, and their labels one below the other."""
        ordered = sorted(curves, key=lambda curve: self.y(curve.sizes[-1]))
        places = _spread([self.y(curve.sizes[-1]) for curve in ordered], self._bottom)
        return [self._curve(curve, y) for curve, y in zip(ordered, places, strict=True)]

    def _curve(self, curve: _Curve, label: float) -> str:
        points = self._points(curve.sizes)
        x, y = points[-1]
        text, colour = escape(curve.label(self._top)), curve.colour
        above = curve.sizes[-1] > self._top
        arrow = f'<path d="M{x:.1f},{TOP - 8} l-5,8 h10 z" fill="{colour}"/>' if above else ""
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        return (
            f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>{arrow}'
            f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{self.right - 4}" y2="{label:.1f}" stroke="{colour}" '
            f'stroke-width="0.5"/><text x="{self.right}" y="{label + 4:.1f}" fill="{colour}">{text}</text>'
        )

    def _points(self, sizes: Sequence[int]) -> list[tuple[float, float]]:
        """Return the points of a line, up to where it leaves the picture at the top."""
        inside = [size for size in sizes if size <= self._top]
        points = [(self.x(place), self.y(size)) for place, size in enumerate(inside)]
        if not inside:
            return [(self.x(0), TOP)]
        if len(inside) < len(sizes):
            last, following = inside[-1], sizes[len(inside)]
            share = (self._top - last) / (following - last)
            points.append((self.x(len(inside) - 1 + share), TOP))
        return points


def _spread(wanted: Sequence[float], bottom: float) -> list[float]:
    """Spread lines of text so that none overlap, near the wanted heights, from the top down."""
    places: list[float] = []
    for y in wanted:
        places.append(max(y, places[-1] + LINE) if places else y)
    for place in range(len(places) - 1, -1, -1):
        places[place] = min(places[place], bottom - LINE * (len(places) - 1 - place))
    return places


def short(window: int) -> str:
    """Format a window as `8k`."""
    return f"{window // 1024}k" if window % 1024 == 0 else str(window)


def printable(text: str) -> str:
    """Replace characters of a server's name that could control a terminal or break a picture."""
    return "".join(each if each.isprintable() else "?" for each in text)


def lines(plan: Iterable[Row]) -> list[list[str]]:
    """Format the plan as text: model, weights, speed, and a cell for each window."""
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
    return f"{seconds:.0f}s" if seconds < 120 else f"{seconds / 60:.0f}m"
