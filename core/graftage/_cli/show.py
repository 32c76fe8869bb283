"""Writes to the terminal. The text of models, servers and plugins must not control it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console
    from rich.table import Table

    from graftage.types import LoadedModel, ModelInfo

__all__ = [
    "Escaper",
    "OutputFailed",
    "cell",
    "console",
    "date",
    "discard",
    "escape",
    "is_terminal",
    "line",
    "note",
    "prepare_streams",
    "print_json",
    "print_table",
    "record",
    "size",
    "some",
]

_RISKY = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 without tab and line feed, DEL, C1, changes of the direction of text, and lone surrogates."""
_PIPE_WIDTH = 1000
"""Columns of a table in a file or a pipe, where nothing is cut or folded."""
_NAME_WIDTH = 24
_SHOWN_NAMES = 5
_HIDDEN = ("raw", "tensors")
"""Fields that `--json` leaves out: the server's own data, and thousands of shapes."""
_LATIN_1_END = 0xFF


# --- Escaping --------------------------------------------------------------------------------------------------------


def escape(text: str) -> str:
    """Make control characters visible, ESC as backslash-x1b; tabs and line breaks stay."""
    return _RISKY.sub(_make_visible, text.replace("\r\n", "\n"))


def cell(value: object) -> str:
    """Convert a value to escaped text on one line; `None` is empty."""
    text = "" if value is None else escape(str(value))
    return text.replace("\n", r"\n").replace("\t", r"\t")


def _make_visible(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code <= _LATIN_1_END else f"\\u{code:04x}"


class Escaper:
    """Escapes a text in pieces; a line break may be split between two."""

    def __init__(self, *, raw: bool = False) -> None:
        self._raw = raw
        self._held = ""

    def feed(self, piece: str) -> str:
        """Return what can be printed now."""
        if self._raw:
            return piece
        text = self._held + piece
        self._held = "\r" if text.endswith("\r") else ""
        return escape(text.removesuffix("\r") if self._held else text)

    def end(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return escape(held)


# --- Streams ---------------------------------------------------------------------------------------------------------


class OutputFailed(Exception):
    """Standard output cannot be written."""


class _Output(io.FileIO):
    """Standard output, whose errors have their own class."""

    def write(self, data: Any) -> int:
        """Write data.

        Raises:
            OutputFailed: it cannot be written.
        """
        try:
            return super().write(data)
        except OSError as error:
            raise OutputFailed(error.strerror or str(error)) from error


def prepare_streams() -> None:
    """Print characters that the terminal cannot show as question marks.

    A closed stream (`>&-`) is opened to nowhere, so that no later file takes its number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            nowhere = os.open(os.devnull, os.O_RDONLY if name == "stdin" else os.O_WRONLY)
            setattr(sys, name, os.fdopen(nowhere, mode, encoding="utf-8", closefd=False))
        elif name == "stdout" and not is_terminal(stream):
            output = io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False))
            sys.stdout = io.TextIOWrapper(output, encoding=stream.encoding)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            with contextlib.suppress(ValueError, OSError):
                reconfigure(errors="replace")
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    note(str(message), kind="warning")


def line(text: str) -> None:
    """Print a line."""
    sys.stdout.write(f"{text}\n")


def note(text: str, *, kind: str | None = None, indent: str = "  ") -> None:
    """Print an escaped note on stderr. Further lines are indented, or they could pose as another note."""
    start = f"{kind}: " if kind else ""
    try:
        sys.stderr.write(f"{start}{escape(text)}".replace("\n", f"\n{indent}") + "\n")
        sys.stderr.flush()
    except OSError:
        discard(sys.stderr)  # There is no place left to report this.


def discard(stream: TextIO) -> None:
    """Redirect a broken stream to nowhere, or Python reports an error when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def console(*, error: bool = False) -> Console:
    """Return the console for tables, bars and dimmed text."""
    from rich.console import Console  # Only what draws something pays for rich

    stream = sys.stderr if error else sys.stdout
    return Console(
        stderr=error,
        width=None if is_terminal(stream) else _PIPE_WIDTH,
        markup=False,
        highlight=False,
        emoji=False,
    )


# --- Data ------------------------------------------------------------------------------------------------------------


def print_json(value: object) -> None:
    """Print plain data as JSON, with risky characters escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=2, default=_plain)
    sys.stdout.write(_RISKY.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def record(facts: ModelInfo | LoadedModel) -> dict[str, Any]:
    """Convert a record to a dictionary."""
    return {each.name: getattr(facts, each.name) for each in fields(facts) if each.name not in _HIDDEN}


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Path):
        return str(value)
    return repr(value)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; each cell is escaped, and folded instead of cut on a narrow terminal."""
    from rich.text import Text

    cells = [[Text(cell(value)) for value in row] for row in rows]
    table = _table(columns, first=max((row[0].cell_len for row in cells), default=0))
    for row in cells:
        table.add_row(*row)
    console().print(table)


def _table(columns: Sequence[str], *, first: int) -> Table:
    """Make a table whose first column, the names, is folded last."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_header=any(columns))
    for place, name in enumerate(columns):
        table.add_column(name, overflow="fold", min_width=None if place else min(first, _NAME_WIDTH))
    return table


def some(names: Sequence[str] | None) -> str | None:
    """Return the first names, and how many more there are."""
    if names is None:
        return None
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return (", ".join(names[:_SHOWN_NAMES]) or "none") + more


def size(count: int | None) -> str | None:
    """Format a number of bytes: `271 MB`."""
    if count is None:
        return None
    from rich.filesize import decimal

    return decimal(count)


def date(moment: datetime | None) -> str | None:
    """Format a moment in local time, to the minute."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M") if moment else None
