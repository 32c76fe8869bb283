"""The results as Markdown and as pictures, in colours that are readable on white and on black."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

REFERENCE, OURS, FLOOR = "ollama", "graftage", "floor"
OPENAI = ("openai", "graftage-openai")
UNITS = {"µs": 1e6, "ms": 1e3, "MB": 1e-6}
TEXT, LINE, PEER, GOOD, BAD = "#757b83", "#757b8355", "#757b83aa", "#2da44e", "#d4762c"
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
LEGEND = (("graftage", OURS), ("socket and json", FLOOR), ("other frameworks", ""))


def number_text(value: float) -> str:
    """Return a number with three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratio_text(ratio: float) -> str:
    """Return a ratio with few digits."""
    return f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.2f}×"


def markdown(found: Mapping[str, Any]) -> str:
    """Return the tables, with the machine and the versions."""
    about = found["about"]
    facts = (
        f"Python {about['python']}, {about['machine']}, load {about['load before']:.1f} to {about['load after']:.1f}"
    )
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        *(
            ["A quick run: 5 chunks at most, and each call twice. Its figures cannot be compared.\n"]
            if about["quick"]
            else []
        ),
        f"{facts}; median of {about['repetitions']}; {versions}.\n",
        "CPU time of the client's process unless a row names something else, and its ratio to Ollama's own client.\n",
        *_comparison(found["rows"]),
        "\nThe same on OpenAI's API, and the ratio to OpenAI's own client:\n",
        *_comparison(found["openai"]),
        "\nHow the cost of Graftage grows:\n",
        *_table(
            ["with the number of", "sizes", "CPU ms", "memory MB", "CPU ∝ n^", "memory ∝ n^", "linear or better"],
            [
                [
                    curve["title"],
                    *(" ".join(map(number_text, each)) for each in _series(curve)),
                    *(f"{curve['exponents'][each]:.2f}" for each in ("cpu", "memory")),
                    "yes" if curve["linear"] else "**no**",
                ]
                for curve in found["growth"]
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def _comparison(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return _table(["", "unit", *rows[0]["clients"]], [[row["title"], row["unit"], *_cells(row)] for row in rows])


def _series(curve: Mapping[str, Any]) -> tuple[Sequence[float], ...]:
    return curve["sizes"], [each * 1e3 for each in curve["cpu"]], [each / 1e6 for each in curve["memory"]]


def _cells(row: Mapping[str, Any]) -> Iterable[str]:
    for cell in row["clients"].values():
        ratio = f" ({ratio_text(cell['ratio'])})" if cell.get("ratio") is not None else ""
        yield number_text(cell["value"] * UNITS[row["unit"]]) + ratio if cell else "–"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    aligned = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(each)} |" for each in (head, aligned, *rows)]


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = TEXT) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _dot(x: float, y: float, client: str, colour: str = GOOD) -> str:
    looks = {OURS: f'r="5" fill="{colour}"', FLOOR: f'r="4" fill="none" stroke="{TEXT}"'}
    look = looks.get(client, f'r="3" fill="{PEER}"')
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" {look}/>'


def _line(points: Iterable[tuple[float, float]], colour: str = LINE, width: float = 1) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _picture(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    font = 'font-family="system-ui, sans-serif" font-size="13" role="img"'
    return "\n".join([f"{head} {font}>", f"<title>{escape(title)}</title>", *parts, "</svg>\n"])


def bars(found: Mapping[str, Any]) -> str:
    """Draw every row as a line from Ollama's own client to Graftage, with the others as dots."""
    rows = [row for row in found["rows"] if row["clients"][OURS].get("ratio")]
    ratios = [cell["ratio"] for row in rows for cell in row["clients"].values() if cell.get("ratio")]
    low, high = math.log(min(*ratios, 0.5)), math.log(max(*ratios, 2.0))
    left, right, top, step = 330, 900, 60, 24
    bottom = top + step * len(rows)

    def at(ratio: float) -> float:
        return left + (right - left) * (math.log(ratio) - low) / (high - low)

    parts = [_text(16, 24, "Cost against Ollama's own client (1×), less is better")]
    for tick in (tick for tick in TICKS if low <= math.log(tick) <= high):
        one = tick == 1.0
        parts.append(_line([(at(tick), top - 8), (at(tick), bottom - 8)], TEXT if one else LINE, 2 if one else 1))
        parts.append(_text(at(tick), top - 14, f"{tick:g}×", "middle"))
    for place, row in enumerate(rows):
        y, ours = top + step * place + step / 2 - 8, row["clients"][OURS]["ratio"]
        colour = GOOD if ours <= 1 else BAD
        parts += [_text(16, y + 4, row["title"].replace("`", "")), _line([(at(1.0), y), (at(ours), y)], colour, 4)]
        others = [client for client in row["clients"] if client not in (REFERENCE, OURS)]
        cells = [(client, row["clients"][client].get("ratio")) for client in (*others, OURS)]
        parts += [_dot(at(ratio), y, client, colour) for client, ratio in cells if ratio]
        parts.append(_text(right + 75, y + 4, ratio_text(ours), "end", colour))
    peers = len(rows[0]["clients"]) > len((REFERENCE, OURS, FLOOR))
    for place, (name, client) in enumerate(LEGEND[: 2 + peers]):
        parts += [_dot(left + 170 * place, bottom + 10, client), _text(left + 170 * place + 10, bottom + 14, name)]
    return _picture(right + 90, bottom + 30, "Cost of Graftage against Ollama's own client", parts)


def curves(found: Mapping[str, Any]) -> str:
    """Draw a panel for each curve: CPU time over size, both logarithmic, beside linear growth."""
    wide, high, edge, parts = 320, 220, 44, list[str]()
    for place, curve in enumerate(found["growth"]):
        left, top = place % 3 * wide + edge, place // 3 * high + edge
        parts += _panel(curve, left, top, wide - edge - 16, high - edge - 50)
    return _picture(3 * wide, 2 * high, "How the cost of Graftage grows", parts)


def _panel(curve: Mapping[str, Any], left: int, top: int, width: int, height: int) -> list[str]:
    sizes, cpu, _ = _series(curve)
    room = 1.5 * (max(cpu) / min(cpu)) ** 0.2
    lows, highs = (min(sizes), min(cpu) / room), (max(sizes), max(cpu) * room)

    def at(*point: float) -> tuple[float, float]:
        x, y = (math.log(v / low) / math.log(high / low) for v, low, high in zip(point, lows, highs, strict=True))
        return left + width * x, top + height * (1 - y)

    end = min(sizes[-1], sizes[0] * highs[1] / cpu[0])
    colour = GOOD if curve["linear"] else BAD
    powers = "CPU ∝ n^{cpu:.2f}, memory ∝ n^{memory:.2f}".format(**curve["exponents"])
    return [
        _text(left, top - 22, curve["title"]),
        _text(left, top - 6, powers, colour=colour),
        _line([(left, top), (left, top + height), (left + width, top + height)]),
        f'<g stroke-dasharray="4">{_line([at(sizes[0], cpu[0]), at(end, cpu[0] * end / sizes[0])])}</g>',
        _line([at(*point) for point in zip(sizes, cpu, strict=True)], colour, 2),
        *(_dot(*at(*point), OURS, colour) for point in zip(sizes, cpu, strict=True)),
        _text(left, top + height + 16, number_text(sizes[0])),
        _text(left + width, top + height + 16, number_text(sizes[-1]), "end"),
        _text(left + 6, at(sizes[0], cpu[0])[1] + 18, f"{number_text(cpu[0])} ms"),
        _text(left + width, at(sizes[-1], cpu[-1])[1] - 8, f"{number_text(cpu[-1])} ms", "end"),
    ]
