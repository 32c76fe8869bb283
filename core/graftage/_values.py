"""Small readings: of what callers write, and of what is installed."""

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
"""What engines count tokens in has 32 bits."""
SMALLEST_WINDOW = 2
"""Tokens: a prompt and an answer of one each. An engine that is to make do with less ends by an assertion."""
LONGEST_STAY = 100 * 365 * 24 * 3600.0
"""Seconds; engines count them in nanoseconds, which overflow after 292 years."""
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")


def keep_alive_seconds(value: Any) -> float | None:
    """Seconds a model is to stay loaded: from a number, a `timedelta`, or text such as `5m`, `1h30m`, `-1`.

    A negative value is for ever and comes back as infinity.

    Raises:
        ValueError: it is none of these.
    """
    if value is None:
        return None
    if isinstance(value, timedelta):
        value = value.total_seconds()
    seconds = duration(value) if isinstance(value, str) else value
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or seconds != seconds:  # noqa: PLR0124 - NaN
        raise ValueError(f"keep_alive must be seconds, a text such as '5m' or '1h30m', or -1 for ever, not {value!r}")
    if seconds < 0:
        return math.inf
    if seconds != math.inf and seconds > LONGEST_STAY:
        raise ValueError("keep_alive is longer than a hundred years; -1 is for ever")
    return float(seconds)


def user_path(value: str | Path) -> Path:
    """A path whose `~` is made whole; as it is where there is no such user."""
    try:
        return Path(value).expanduser()
    except (RuntimeError, ValueError):
        return Path(value)


def read_file(path: Path, largest: int) -> bytes:
    """What is in a regular file: a pipe or a device may never end.

    Args:
        path: the file.
        largest: bytes it may have.

    Raises:
        OSError: it cannot be read, is another kind of file, or larger; `strerror` says which.
    """
    try:
        kind = path.stat().st_mode
    except ValueError as error:
        raise OSError(errno.EINVAL, "No file can have that name") from error
    if not stat.S_ISREG(kind):
        raise OSError(errno.EINVAL, "It is not a regular file")
    with path.open("rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise OSError(errno.EFBIG, f"It is larger than {largest} bytes")
    return data


def close(name: str, names: Iterable[str], *, most: int = 1, cutoff: float = 0.6) -> list[str]:
    """The names that are spelt alike, the nearest first."""
    if not (known := list(names)):
        return []
    import difflib

    return difflib.get_close_matches(name, known, n=most, cutoff=cutoff)


SHORTEST_SECRET = 4
"""Characters: what is shorter stands in many words by chance, and would tell its place by its absence."""


def hidden(value: Any, secret: str) -> Any:
    """The same text, mapping or tuple without the secret."""
    if isinstance(value, str):
        return value.replace(secret, "***")
    if isinstance(value, dict):
        return {key: hidden(each, secret) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(hidden(each, secret) for each in value)
    return value


def duration(text: str) -> float | None:
    """The seconds of a number, or of a duration as Go writes it; None for what is neither."""
    text = text.strip()
    try:
        return float(text)
    except ValueError:
        pass
    sign, body = (-1.0, text[1:]) if text.startswith("-") else (1.0, text)
    if not body or _PART.sub("", body):
        return None
    return sign * sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(body))


# --- What is installed: the one place that reads metadata ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """What a distribution offers under a name, read from its metadata."""

    group: str
    name: str
    value: str
    dist: Any
    damage: str | None = None
    """Why the file that it stands in cannot be trusted."""

    def load(self) -> Any:
        """Import it.

        Raises:
            Exception: whatever its import raises, or that its value is no reference.
        """
        from importlib import metadata

        ready_pydantic()
        point: Any = metadata.EntryPoint(self.name, self.value, self.group)
        return point.load()


def entry_points(*groups: str) -> tuple[EntryPoint, ...]:
    """The entry points of some groups, read from metadata: nothing is imported.

    They are read again when something has been installed, which changes its folder. Each distribution is read by
    itself: `importlib.metadata.entry_points` gives none at all where the files of a single one are damaged.
    """
    # Python imports from nothing but text, and a folder that is named twice is one.
    path: list[Any] = sys.path
    folders = dict.fromkeys(each for each in path if isinstance(each, str))
    return _entry_points(groups, tuple((each, _changed(each)) for each in folders))


def _changed(folder: str) -> int | None:
    try:
        return os.stat(folder or os.curdir).st_mtime_ns  # noqa: PTH116 - a third of the time, for each client
    except (OSError, ValueError):
        return None


@functools.lru_cache(maxsize=4)
def _entry_points(groups: tuple[str, ...], folders: tuple[tuple[str, int | None], ...]) -> tuple[EntryPoint, ...]:
    found: dict[Any, list[EntryPoint]] = {}
    for folder, _ in folders:
        for dist in _distributions(path=[folder]):
            if not _points_of(dist, groups):
                continue
            # What counts is what an import would find: the first of that name, whether it has entry points or not.
            name = _plain_name(dist)
            first = next((each for each in _distributions(name=name) if _plain_name(each) == name), dist)
            found.setdefault(name or id(dist), _points_of(first if name else dist, groups))
    return tuple(point for group in groups for points in found.values() for point in points if point.group == group)


def _distributions(**where: Any) -> Iterator[Any]:
    """What is installed, in the order of an import, as far as the folders can be read."""
    from importlib import metadata

    with contextlib.suppress(Exception):  # What is wrong with a stranger's folder or archive is not one kind of error.
        yield from metadata.distributions(**where)


def _points_of(dist: Any, groups: tuple[str, ...]) -> list[EntryPoint]:
    """The entry points of one distribution. A malformed one is left to fail when it is loaded."""
    damage = None
    try:
        text = dist.read_text("entry_points.txt") or ""
    except UnicodeDecodeError as error:
        text, damage = error.object.decode(errors="replace"), "has an entry_points.txt that is not UTF-8"
    except Exception:  # noqa: BLE001 - it cannot be read, so nobody can say what it offers
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
    """Whose entry points are broken, and how, in words: what cannot be read of them is passed over."""
    for dist in _distributions():
        try:
            tuple(dist.entry_points)
        except Exception as error:  # noqa: BLE001 - what is wrong with a stranger's file is not one kind of error
            whose = " ".join(filter(None, identity(dist))) or f"the distribution in {dist.locate_file('')}"
            why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else "a line of it is no `name = value`"
            yield f"The entry_points.txt of {whose} is broken: {why}. What cannot be read of it is passed over."


def _plain_name(dist: Any) -> str | None:
    """The name of a distribution for comparing; None where its metadata is damaged."""
    name, version = identity(dist)
    return re.sub(r"[-_.]+", "-", name).lower() if name and version else None


@functools.cache
def ready_pydantic() -> None:
    """Let pydantic be imported and used, whatever is installed.

    At the first type of a process it looks for plugins of its own, and fails, once, where the metadata of any
    distribution is damaged.
    """
    with contextlib.suppress(Exception):
        from pydantic import TypeAdapter

        TypeAdapter(None)


@functools.lru_cache(maxsize=4096)  # More than anybody has installed: each client asks for all of them.
def identity(dist: Any) -> tuple[str | None, str | None]:
    """The name and the version of a distribution, each None where its metadata does not tell."""
    try:
        metadata: Any = dist.metadata if dist else {}
        return metadata.get("Name"), metadata.get("Version")
    except Exception:  # noqa: BLE001 - the file is missing, or no text
        return None, None
