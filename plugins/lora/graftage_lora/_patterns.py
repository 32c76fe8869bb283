r"""Matches PEFT's `alpha_pattern` with names of modules, in a time that cannot explode.

PEFT uses its keys as regular expressions, and some of these run forever. Here a part of their syntax is read:
characters, `.`, `[…]`, `\d`, `\w`, groups, `|`, `^`, `$`; `*`, `+`, `{m,n}` behind one character; `?` also behind a
group. All positions that a match can have reached are followed at once, as the bits of a number.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, TypeAlias

from graftage_lora._files import Refused

__all__ = ["Patterns"]

LONGEST: Final = 300
"""Characters of an expression."""
DEEPEST: Final = 10
"""Groups in groups."""
MAX_WORK: Final = 10_000_000
"""Steps that one adapter may take: some seconds."""
PLAIN: Final = re.compile(r"\^?[\w.]+")
TOKEN: Final = re.compile(
    r"(?P<one>\\[dw]|\\[^\w\s]|\[\^?(?:[a-z]-[a-z]|[A-Z]-[A-Z]|\d-\d|\\[dw.-]|[\w.])+-?\]|[^\\\[\](){}*+?|^$])"
    r"|(?P<open>\((?:\?:)?)|(?P<close>\))|(?P<or>\|)|(?P<edge>[\^$])|(?P<repeat>[*+?]|\{\d{1,2}(?:,\d{0,2})?\})\??(?!\+)"
)
Step: TypeAlias = Callable[[int, str], int]
"""Takes the positions before a part of the pattern and the name, and returns those behind it."""


class Patterns:
    """Figures of modules by pattern: the first that matches counts, as in PEFT's `get_pattern_key`.

    Raises:
        Refused: a pattern uses another syntax; in `find`, too: they are too many for the modules.
    """

    def __init__(self, figures: Mapping[str, float]) -> None:
        self._figures = [(_matcher(key), figure) for key, figure in figures.items()]
        self._work = 0

    def find(self, module: str, default: float) -> float:
        """Return the figure of a module."""
        for (matches, cost), figure in self._figures:
            self._work += cost
            if self._work > MAX_WORK:
                raise Refused("`alpha_pattern` has too many patterns for its modules")
            if matches(module):
                return figure
        return default


def _matcher(key: str) -> tuple[Callable[[str], bool], int]:
    """Return what compares a key with a name, and its cost."""
    if PLAIN.fullmatch(key):
        return partial(_matches_plain, key), 1
    expression = _Expression(key)
    return expression.matches, LONGEST * (1 + expression.repeats)


def _matches_plain(key: str, name: str) -> bool:
    return name == key.removeprefix("^") or name.endswith(f".{key}")


class _Expression:
    """A regular expression of the syntax above."""

    def __init__(self, text: str) -> None:
        tokens = [(str(match.lastgroup), match) for match in TOKEN.finditer(text)]
        self._text = text
        self._left = [(kind, match[kind]) for kind, match in reversed(tokens)]
        self.repeats = sum(kind == "repeat" for kind, _ in tokens)
        if len(text) > LONGEST or "".join(match[0] for _, match in tokens) != text:
            raise self._refused()
        self._step = self._alternatives(depth=0)
        if self._left:
            raise self._refused()

    def matches(self, name: str) -> bool:
        """Return whether a name, or its end after a dot, is the expression."""
        if len(name) > LONGEST:
            raise Refused(f"`{name[:80]}…` is too long for the expressions of `alpha_pattern`")
        starts = 1 | sum(1 << at for at, each in enumerate(name, 1) if each == ".")
        return bool(self._step(starts, name) >> len(name) & 1)

    def _alternatives(self, depth: int) -> Step:
        if depth > DEEPEST:
            raise self._refused()
        branches = [self._sequence(depth)]
        while self._take("or"):
            branches.append(self._sequence(depth))
        return partial(_any_of, branches)

    def _sequence(self, depth: int) -> Step:
        steps: list[Step] = []
        while (kind := self._kind()) in ("one", "edge", "open"):
            token = self._take(kind)
            step = self._alternatives(depth + 1) if kind == "open" else partial(STEPS[kind], token)
            if kind == "open" and not self._take("close"):
                raise self._refused()
            if repeat := self._take("repeat"):
                if kind == "edge" or (kind == "open" and repeat != "?"):
                    raise self._refused()
                step = partial(_repeated, step, *_bounds(repeat))
            steps.append(step)
        return partial(_all_of, steps)

    def _kind(self) -> str:
        return self._left[-1][0] if self._left else ""

    def _take(self, kind: str) -> str:
        return self._left.pop()[1] if self._kind() == kind else ""

    def _refused(self) -> Refused:
        return Refused(
            f"`alpha_pattern` has the pattern `{self._text[:80]}`, an expression that is not supported",
            "Name the modules in full.",
        )


def _any_of(branches: Sequence[Step], positions: int, name: str) -> int:
    return functools.reduce(operator.or_, (step(positions, name) for step in branches))


def _all_of(steps: Sequence[Step], positions: int, name: str) -> int:
    return functools.reduce(lambda found, step: step(found, name), steps, positions)


def _one(token: str, positions: int, name: str) -> int:
    return (positions & _places(token, name)) << 1


def _edge(sign: str, positions: int, name: str) -> int:
    return positions & (1 if sign == "^" else 1 << len(name))


def _repeated(step: Step, least: int, most: int, positions: int, name: str) -> int:
    found = 0 if least else positions
    for count in range(1, most + 1):
        positions = step(positions, name)
        if not positions:
            break
        found |= positions if count >= least else 0
    return found


def _bounds(repeat: str) -> tuple[int, int]:
    """Return the least and the most times; no name is longer than `LONGEST`."""
    if repeat in KNOWN:
        return KNOWN[repeat]
    least, comma, most = repeat[1:-1].partition(",")
    return int(least), int(most) if most else LONGEST if comma else int(least)


@functools.lru_cache(maxsize=1024)
def _places(token: str, name: str) -> int:
    """Return the positions of a name whose character is the token's, as bits."""
    return sum(1 << at for at, each in enumerate(name) if re.fullmatch(token, each))


STEPS: Final[Mapping[str, Callable[[str, int, str], int]]] = {"one": _one, "edge": _edge}
KNOWN: Final = {"*": (0, LONGEST), "+": (1, LONGEST), "?": (0, 1)}
