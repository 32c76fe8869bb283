"""Read small values from callers, and the metadata of installed distributions."""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import re
import stat
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftage._records import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LARGEST_COUNT = 2**31 - 1
"""Engines count tokens in 32 bits."""
SMALLEST_WINDOW = 2
"""Tokens: a prompt and a reply of one each. With less, an engine fails an assertion."""
LONGEST_STAY = 100 * 365 * 24 * 3600.0
"""Seconds: engines count nanoseconds, which overflow after 292 years."""
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")


def keep_alive_seconds(value: object) -> float | None:
    """Return the seconds that a model stays loaded, from a number, a `timedelta`, or text such as `5m`, `1h30m`, `-1`.

    A negative value means for ever and becomes infinity.

    Raises:
        ValueError: the value is invalid.
    """
    if value is None:
        return None
    if isinstance(value, timedelta):
        value = value.total_seconds()
    seconds = duration(value) if isinstance(value, str) else value
    # Of all numbers, only NaN is not at least minus infinity.
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= -math.inf:
        raise ValueError(f"keep_alive must be seconds, a text such as '5m' or '1h30m', or -1 for ever, not {value!r}")
    if seconds < 0 or seconds == math.inf:
        return math.inf
    if seconds > LONGEST_STAY:
        raise ValueError("keep_alive must be at most a hundred years; -1 means for ever")
    return float(seconds)


def user_path(value: str | Path) -> Path:
    """Expand `~` in a path; return the path unchanged if there is no such user."""
    try:
        return Path(value).expanduser()
    except (RuntimeError, ValueError):
        return Path(value)


def read_file(path: Path, largest: int) -> bytes:
    """Read a regular file: a pipe or a device may never end.

    Args:
        path: the file.
        largest: the most bytes it may have.

    Raises:
        OSError: it cannot be read, is not a regular file, or is too large; `strerror` says which.
    """
    try:
        kind = path.stat().st_mode
    except ValueError as error:
        raise OSError(errno.EINVAL, "The name is not valid for a file") from error
    if not stat.S_ISREG(kind):
        raise OSError(errno.EINVAL, "It is not a regular file")
    with path.open("rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise OSError(errno.EFBIG, f"It is larger than {largest} bytes")
    return data


def close(name: str, names: Iterable[str], *, most: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return the names with a similar spelling, the nearest first."""
    if not (known := list(names)):
        return []
    import difflib

    return difflib.get_close_matches(name, known, n=most, cutoff=cutoff)


def duration(text: str) -> float | None:
    """Return the seconds of a number or of a duration as Go writes it; None for other text."""
    text = text.strip()
    try:
        return float(text)
    except ValueError:
        pass
    sign, body = (-1.0, text[1:]) if text.startswith("-") else (1.0, text)
    if not body or _PART.sub("", body):
        return None
    return sign * sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(body))


# --- Installed distributions: the only code that reads their metadata ------------------------------------------------


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """An entry point of a distribution, read from its metadata."""

    group: str
    name: str
    value: str
    dist: Any
    damage: str | None = None
    """Why the file with it cannot be trusted."""

    def load(self) -> Any:
        """Import the object.

        Raises:
            Exception: the import failed, or the value is not a valid reference.
        """
        from importlib import metadata

        ready_pydantic()
        point: Any = metadata.EntryPoint(self.name, self.value, self.group)
        return point.load()


def entry_points(*groups: str) -> tuple[EntryPoint, ...]:
    """Return the entry points of some groups from metadata, without an import.

    An installation changes its folder, and then they are read again. Each distribution is read alone:
    `importlib.metadata.entry_points` returns none at all if the files of one distribution are damaged.
    """
    # Python imports only from text, and a folder may be named twice.
    path: list[Any] = sys.path
    folders = dict.fromkeys(each for each in path if isinstance(each, str))
    return _entry_points(groups, tuple((each, _changed(each)) for each in folders))


def _changed(folder: str) -> int | None:
    try:
        return os.stat(folder or os.curdir).st_mtime_ns  # noqa: PTH116 - takes a third of the time, for each client
    except (OSError, ValueError):
        return None


@functools.lru_cache(maxsize=4)
def _entry_points(groups: tuple[str, ...], folders: tuple[tuple[str, int | None], ...]) -> tuple[EntryPoint, ...]:
    found: dict[Any, list[EntryPoint]] = {}
    for folder, _ in folders:
        for dist in _distributions(path=[folder]):
            if not _points_of(dist, groups):
                continue
            # An import takes the first distribution of a name: its entry points count, even if it has none.
            name = _plain_name(dist)
            first = next((each for each in _distributions(name=name) if _plain_name(each) == name), dist)
            found.setdefault(name or id(dist), _points_of(first if name else dist, groups))
    return tuple(point for group in groups for points in found.values() for point in points if point.group == group)


def _distributions(**where: Any) -> Iterator[Any]:
    """Yield the installed distributions in the order of imports, as far as the folders can be read."""
    from importlib import metadata

    with contextlib.suppress(Exception):  # A damaged folder or archive may raise any error.
        yield from metadata.distributions(**where)


def _points_of(dist: Any, groups: tuple[str, ...]) -> list[EntryPoint]:
    """Return the entry points of one distribution. A malformed one fails later, when it is loaded."""
    damage = None
    try:
        text = dist.read_text("entry_points.txt") or ""
    except UnicodeDecodeError as error:
        text, damage = error.object.decode(errors="replace"), "has an entry_points.txt that is not UTF-8"
    except Exception:  # noqa: BLE001 - an unreadable file may raise any error
        return []
    if not any(group in text for group in groups):
        return []
    section, found = "", {}
    for line in map(str.strip, text.removeprefix("\ufeff").splitlines()):
        name, _, value = (part.strip() for part in line.partition("="))
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1].strip()
        elif section in groups and name and not name.startswith(("#", ";")):
            found[section, name, value] = EntryPoint(section, name, value, dist, damage)
    return list(found.values())


def broken_entry_points() -> Iterator[str]:
    """Yield a message for each distribution whose entry points are broken."""
    for dist in _distributions():
        try:
            tuple(dist.entry_points)
        except Exception as error:  # noqa: BLE001 - a damaged file may raise any error
            whose = " ".join(filter(None, identity(dist))) or f"the distribution in {dist.locate_file('')}"
            why = (
                "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else "one of its lines is not `name = value`"
            )
            yield f"The entry_points.txt of {whose} is broken: {why}. Its unreadable part is ignored."


def _plain_name(dist: object) -> str | None:
    """Return the normalised name of a distribution; None if its metadata is damaged."""
    name, version = identity(dist)
    return re.sub(r"[-_.]+", "-", name).lower() if name and version else None


@functools.cache
def ready_pydantic() -> None:
    """Make pydantic usable even if the metadata of a distribution is damaged.

    At its first type in a process, pydantic searches for its own plugins, and damaged metadata makes that fail, once.
    """
    with contextlib.suppress(Exception):
        from pydantic import TypeAdapter

        TypeAdapter(None)


@functools.lru_cache(maxsize=4096)  # More than are ever installed: each client asks for all of them.
def identity(dist: Any) -> tuple[str | None, str | None]:
    """Return the name and version of a distribution, each None if its metadata lacks it."""
    try:
        metadata: Any = dist.metadata if dist else {}
        return metadata.get("Name"), metadata.get("Version")
    except Exception:  # noqa: BLE001 - a missing or damaged file may raise any error
        return None, None
