"""Whether cassettes are in order, and from which server, client and day they are.

    for finding in lint([Path("cassettes")]):
        print(finding.path, finding.line, finding.message)

The command `graftage cassettes` prints what these functions find.
"""

from __future__ import annotations

import datetime as dt
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import yaml

import graftage
from graftage.testing import bodies
from graftage.testing.cassettes import Cassette
from graftage.testing.files import Loader
from graftage.testing.interactions import CassetteError
from graftage.testing.secrets import find_secrets, texts_of

if TYPE_CHECKING:
    from graftage.testing.interactions import Interaction

__all__ = ["Finding", "Stale", "lint", "paths_of", "stale"]

LARGE: Final = 100_000
"""Bytes of a file that is too large to be read in a review."""
SUFFIXES: Final = (".yaml", ".yml", ".json")
KEYS: Final = {
    "": {"version", "interactions"},
    "request": {"method", "uri", "body", "headers"},
    "response": {"status", "headers", "body", "url", "recorded", "chunk_lengths", "chunk_times", "fault", "stopped"}
    | {"server", "cut_short"},  # Of version 0.1.
}
"""The keys of a file, and of the two parts of each interaction: vcrpy's and ours."""
PLACE: Final = re.compile(r"(?<![\w.-])(?:/home/|/Users/|[A-Za-z]:\\+Users\\+)[\w.-]+")
"""The folder of a user."""
SHORTEST_HOST: Final = 5
"""Characters: shorter names of machines occur in texts by chance."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is wrong with a cassette."""

    path: Path
    kind: Literal["unreadable", "tag", "key", "secret", "machine", "unended", "duplicate", "size"]
    message: str
    hint: str
    line: int | None = None
    interaction: int | None = None
    """Its number, from 1."""
    level: Literal["error", "warning"] = "error"


@dataclass(frozen=True, kw_only=True)
class Stale:
    """A cassette that should be recorded again, and why."""

    path: Path
    reasons: tuple[str, ...]


def paths_of(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the given files, and the cassettes in the given folders, in order."""
    for path in paths:
        if path.is_dir():
            yield from sorted(each for each in path.rglob("*") if each.suffix in SUFFIXES and each.is_file())
        else:
            yield path


# --- Order -----------------------------------------------------------------------------------------------------------


def lint(paths: Iterable[Path]) -> Iterator[Finding]:
    """Yield what is wrong with cassettes, file by file."""
    for path in paths_of(paths):
        try:
            interactions = Cassette(path).interactions
        except CassetteError as error:
            yield _unreadable(path, error)
            continue
        text = path.read_text("utf-8")
        if len(text) > LARGE:
            yield Finding(
                path=path,
                kind="size",
                message=f"The file has {len(text) // 1000} kB.",
                hint="Ask for less, or split the test.",
                level="warning",
            )
        file = _File(path, text)
        yield from file.unknown_keys()
        seen: dict[tuple[object, ...], int] = {}
        for number, each in enumerate(interactions, 1):
            yield from file.judge(number, each)
            same = each.request.method, each.request.uri, each.request.body, each.status, each.body
            if (first := seen.setdefault(same, number)) != number:
                yield file.finding(
                    number,
                    "duplicate",
                    f"It is equal to interaction {first}.",
                    "Send the request once, if the test is not about that.",
                    level="warning",
                )


def _unreadable(path: Path, error: CassetteError) -> Finding:
    """Return why a file cannot be read, with the line if its YAML is at fault."""
    found = Finding(path=path, kind="unreadable", message=error.message, hint=error.hint or "Record it again.")
    if not isinstance(error.__cause__, yaml.YAMLError):
        return found
    try:
        for event in yaml.parse(path.read_bytes(), Loader=Loader):
            tag = getattr(event, "tag", None)
            if tag and tag not in Loader.yaml_constructors:
                message = f"The tag `{tag}` makes YAML build an object, which may run any code."
                return replace(found, kind="tag", message=message, line=_line(event.start_mark))
    except yaml.MarkedYAMLError as fault:
        line = _line(fault.problem_mark or fault.context_mark)
        return replace(found, message=f"It is not valid YAML: {fault.problem}.", line=line)
    return found


def _line(mark: Any) -> int | None:
    return mark.line + 1 if mark else None


class _File:
    """A file with the lines of its parts."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._lines = text.split("\n")
        # A file of JSON has long lines, and no need for numbers of them.
        self._root: Any = None if text.startswith("{") else yaml.compose(text, Loader=Loader)
        self._interactions = _child(self._root, "interactions").value if self._root else ()

    def finding(
        self, number: int, kind: Any, message: str, hint: str, *, needle: str = "", level: Any = "error"
    ) -> Finding:
        """Return a finding in an interaction, at the first line with a text in it."""
        found = Finding(path=self._path, kind=kind, message=message, hint=hint, interaction=number, level=level)
        if not self._interactions:
            return found
        node = self._interactions[number - 1]
        first, end = node.start_mark.line, node.end_mark.line
        line = next((place for place in range(first, end) if needle in self._lines[place]), first)
        return replace(found, line=line + 1)

    def unknown_keys(self) -> Iterator[Finding]:
        """Yield the keys that no reader knows."""
        places: list[tuple[int | None, str, Any]] = [(None, "", self._root)] if self._root else []
        for number, node in enumerate(self._interactions, 1):
            places += [(number, name, _child(node, name)) for name in ("request", "response")]
        for place, name, node in places:
            for key, _ in node.value:
                if key.value not in KEYS[name]:
                    where = f"`{name}.{key.value}`" if name else f"`{key.value}`"
                    yield Finding(
                        path=self._path,
                        kind="key",
                        message=f"The key {where} is unknown.",
                        hint="Remove it.",
                        line=key.start_mark.line + 1,
                        interaction=place,
                    )

    def judge(self, number: int, interaction: Interaction) -> Iterator[Finding]:
        """Yield what is wrong with an interaction."""
        texts = list(texts_of(interaction))
        for found in find_secrets(texts, {}, ()):
            yield self.finding(
                number,
                "secret",
                f"The {found.place} looks like it holds a secret: {found.kind}.",
                "Record it with a value made for tests; withdraw the secret if others could read it.",
            )
        for place, text in texts:
            if machine := _machine_in(text):
                yield self.finding(
                    number,
                    "machine",
                    f"The {place} names a machine or its user: {machine}.",
                    "Scrub it, and record again.",
                    needle=machine,
                )
        if not interaction.fault and not interaction.stopped and bodies.is_unended(interaction):
            yield self.finding(
                number, "unended", "The stream has no end, and nothing says that it was cut.", "Record it again."
            )


def _child(node: Any, name: str) -> Any:
    return next((value for key, value in node.value if key.value == name), yaml.MappingNode("", []))


def _machine_in(text: str) -> str | None:
    """Return the name of this machine or the folder of a user in a text."""
    names = [str(Path.home())] + [
        each for each in (platform.node(),) if len(each) >= SHORTEST_HOST and each != "localhost"
    ]
    own = "|".join(re.escape(each) for each in names)
    found = PLACE.search(text) or re.search(rf"(?<![\w.-])(?:{own})(?![\w-])", text)
    return found[0] if found else None


# --- Freshness -------------------------------------------------------------------------------------------------------


def stale(
    paths: Iterable[Path],
    *,
    server: str | None = None,
    days: int | None = None,
    today: dt.date | None = None,
) -> Iterator[Stale]:
    """Yield the cassettes that are not from a server, too old, from another client, or of unknown origin.

    Args:
        paths: files and folders.
        server: the name and version that is current, such as `Ollama 0.9.4`, or the version alone.
        days: how old a cassette may be.
        today: the day to count from; by default, today.

    Raises:
        CassetteError: a file cannot be read.
    """
    today = today or dt.datetime.now(dt.UTC).date()
    for path in paths_of(paths):
        reasons = [
            reason
            for each in Cassette(path).interactions
            for reason in _reasons(each, server=server, days=days, today=today)
        ]
        if reasons:
            yield Stale(path=path, reasons=tuple(dict.fromkeys(reasons)))


def _reasons(interaction: Interaction, *, server: str | None, days: int | None, today: dt.date) -> Iterator[str]:
    facts = interaction.recorded
    unknown = [name for name in ("server", "client", "date") if not getattr(facts, name)]
    if unknown:
        yield f"unknown: {', '.join(unknown)}"
    if server and facts.server and server not in (facts.server, facts.server.rpartition(" ")[2]):
        yield f"recorded from {facts.server}, not {server}"
    ours = f"graftage {graftage.__version__}"
    if facts.client and _minor(facts.client) != _minor(ours):
        yield f"recorded by {facts.client}, not {ours}"
    if days is not None and facts.date and (age := _age(facts.date, today)) > days:
        yield f"recorded {age} days ago"


def _minor(client: str) -> str:
    """Return the client's name with the first two numbers of its version."""
    return ".".join(client.split(".")[:2])


def _age(date: str, today: dt.date) -> int:
    return (today - dt.date.fromisoformat(date)).days
