"""What reaches the terminal. Models, servers and plugins write what they like; none of it may steer the terminal."""

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
]

_RISKY = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 without tab and line feed, DEL, C1, what turns the direction of text, and halves of surrogate pairs."""
_PIPE_WIDTH = 1000
"""Columns of a table that goes to a file or a pipe: nothing is cut or folded there."""
_NAME_WIDTH = 24
_HIDDEN = ("raw", "tensors")
"""Fields of a record that even `--json` leaves out: the server's own form of the same, and thousands of shapes."""
_LATIN_1_END = 0xFF


# --- Escaping --------------------------------------------------------------------------------------------------------


def escape(text: str) -> str:
    """The text with every control character made visible, ESC as backslash-x1b; tabs and line breaks stay."""
    return _RISKY.sub(_make_visible, text.replace("\r\n", "\n"))


def cell(value: object) -> str:
    """A value as escaped text on one line; `None` is empty."""
    text = "" if value is None else escape(str(value))
    return text.replace("\n", r"\n").replace("\t", r"\t")


def _make_visible(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code <= _LATIN_1_END else f"\\u{code:04x}"


class Escaper:
    """Escapes a text that comes in pieces; a line break may be split between two."""

    def __init__(self, *, raw: bool = False) -> None:
        self._raw = raw
        self._held = ""

    def feed(self, piece: str) -> str:
        """What of it can be printed now."""
        if self._raw:
            return piece
        text = self._held + piece
        self._held = "\r" if text.endswith("\r") else ""
        return escape(text.removesuffix("\r") if self._held else text)

    def end(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return escape(held)


# --- Streams ---------------------------------------------------------------------------------------------------------


class OutputFailed(Exception):
    """Standard output cannot be written."""


class _Output(io.FileIO):
    """Standard output. What fails there is told from what fails in another file."""

    def write(self, data: Any) -> int:
        """Write to it.

        Raises:
            OutputFailed: it cannot be written.
        """
        try:
            return super().write(data)
        except OSError as error:
            raise OutputFailed(error.strerror or str(error)) from error


def prepare_streams() -> None:
    """No character may end the command: what the terminal cannot show becomes a question mark.

    A stream that was closed (`>&-`) leads nowhere, so that no file that is opened later takes its number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            nowhere = os.open(os.devnull, os.O_RDONLY if name == "stdin" else os.O_WRONLY)
            setattr(sys, name, open(nowhere, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
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
    """Print a line of our own."""
    sys.stdout.write(f"{text}\n")


def note(text: str, *, kind: str | None = None, indent: str = "  ") -> None:
    """Tell something on stderr, escaped: `error: ...`. Further lines are indented, or they could pose as another."""
    start = f"{kind}: " if kind else ""
    try:
        sys.stderr.write(f"{start}{escape(text)}".replace("\n", f"\n{indent}") + "\n")
        sys.stderr.flush()
    except OSError:
        discard(sys.stderr)  # Nobody can be told that nobody can be told.


def discard(stream: TextIO) -> None:
    """Lead a stream nowhere, where nothing can be written any more: Python flushes it at its end, and complains."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person may be looking at a stream."""
    return stream is not None and not stream.closed and stream.isatty()


def console(*, error: bool = False) -> Console:
    """Where tables, bars and dimmed text go."""
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


def print_json(value: Any) -> None:
    """Print plain data. JSON has an escape of its own for every risky character."""
    text = json.dumps(value, ensure_ascii=False, indent=2, default=_plain)
    sys.stdout.write(_RISKY.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def record(facts: ModelInfo | LoadedModel) -> dict[str, Any]:
    """A record for programs."""
    return {each.name: getattr(facts, each.name) for each in fields(facts) if each.name not in _HIDDEN}


def _plain(value: Any) -> Any:
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
    """Print a table; each cell is escaped, and folded rather than cut where the terminal is narrow."""
    from rich.text import Text

    cells = [[Text(cell(value)) for value in row] for row in rows]
    table = _table(columns, first=max((row[0].cell_len for row in cells), default=0))
    for row in cells:
        table.add_row(*row)
    console().print(table)


def _table(columns: Sequence[str], *, first: int) -> Table:
    """A table whose first column, which holds names, is the last to be folded."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_header=any(columns))
    for place, name in enumerate(columns):
        table.add_column(name, overflow="fold", min_width=None if place else min(first, _NAME_WIDTH))
    return table


def size(count: int | None) -> str | None:
    """Bytes for people: `271 MB`."""
    if count is None:
        return None
    from rich.filesize import decimal

    return decimal(count)


def date(moment: datetime | None) -> str | None:
    """A moment in local time, to the minute."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M") if moment else None
