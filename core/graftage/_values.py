"""Small readings: of what callers write, and of what is installed."""

from __future__ import annotations

import errno
import functools
import math
import re
import stat
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from importlib_metadata import EntryPoint

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
    seconds = _from_text(value) if isinstance(value, str) else value
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or seconds != seconds:  # noqa: PLR0124 - NaN
        raise ValueError(f"keep_alive must be seconds, a text such as '5m' or '1h30m', or -1 for ever, not {value!r}")
    if seconds < 0:
        return math.inf
    try:
        return float(seconds)
    except OverflowError as error:
        raise ValueError("keep_alive is larger than any number of seconds; -1 is for ever") from error


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


def plain_name(model: str) -> str:
    """A model's name for comparing: in lower case and without the tag that a missing one stands for."""
    return model.strip().lower().removesuffix(":latest")


def _from_text(text: str) -> float | None:
    """A number, or a duration as Go writes it."""
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


def entry_points(*groups: str) -> tuple[EntryPoint, ...]:
    """The entry points of some groups, read from metadata: nothing is imported.

    They are read again when something has been installed, which changes its folder.
    """
    return _entry_points(groups, tuple((each, _changed(each)) for each in sys.path))


def _changed(folder: str) -> int | None:
    try:
        return Path(folder).stat().st_mtime_ns
    except (OSError, ValueError):
        return None


@functools.lru_cache(maxsize=4)
def _entry_points(groups: tuple[str, ...], folders: object) -> tuple[EntryPoint, ...]:  # noqa: ARG001 - part of the key
    import importlib_metadata  # noqa: PLC0415 - `import graftage` must stay light

    try:
        every = importlib_metadata.entry_points()
        return tuple(point for group in groups for point in every.select(group=group))
    except ValueError:  # The last release for Python 3.10 refuses all of them for one that is malformed.
        distributions = {each.name: each for each in reversed(list(importlib_metadata.distributions()))}
        return tuple(point for group in groups for each in distributions.values() for point in _points_of(each, group))


def _points_of(dist: Any, group: str) -> Iterable[EntryPoint]:
    """The entry points of one distribution; a malformed reference is left to fail when it is loaded."""
    import configparser  # noqa: PLC0415 - hardly ever needed
    import importlib.metadata  # noqa: PLC0415

    config = configparser.ConfigParser(delimiters="=", interpolation=None, strict=False)
    config.optionxform = str  # type: ignore[method-assign, assignment] # names keep their case
    try:
        config.read_string(dist.read_text("entry_points.txt") or "")
    except configparser.Error:
        return
    for name, value in config.items(group) if config.has_section(group) else ():
        point: Any = importlib.metadata.EntryPoint(name, value, group)
        point.dist = dist
        yield point


def identity(dist: Any) -> tuple[str | None, str | None]:
    """The name and the version of a distribution, each None where its metadata does not tell."""
    try:
        metadata: Any = dist.metadata if dist else {}
        return metadata.get("Name"), metadata.get("Version")
    except Exception:  # noqa: BLE001 - the file is missing, or no text
        return None, None
