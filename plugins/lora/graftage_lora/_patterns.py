r"""Matches PEFT's `alpha_pattern` with names of modules, in a bounded time.

PEFT uses its keys as regular expressions, and some of these run forever. So only a part of their syntax is allowed:
characters, `.`, `[…]`, `\d`, `\w`, groups, `|`, `^`, `$`; `*`, `+`, `{m,n}` behind one character; `?` also behind a
group. Then the ways to match a name can be counted before it is tried.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Final

from graftage_lora._files import Refused

__all__ = ["Patterns"]

LONGEST: Final = 300
"""Characters of an expression."""
MOST: Final = 100
"""Expressions of one adapter; names are not counted."""
MAX_WORK: Final = 50_000_000
"""Steps that they may take for one adapter, of which a second has some ten millions."""
STARTING: Final = 50
"""Steps that it takes to begin."""
IN_FULL: Final = "Name the modules in full."
PLAIN: Final = re.compile(r"\^?[\w.]+")
TOKEN: Final = re.compile(
    r"(?P<one>\\[dw]|\\[^\w\s]|\[\^?(?:[a-z]-[a-z]|[A-Z]-[A-Z]|\d-\d|\\[dw.-]|[\w.])+-?\]|[^\\\[\](){}*+?|^$])"
    r"|(?P<open>\((?:\?:)?)|(?P<close>\))|(?P<or>\|)|(?P<edge>[\^$])"
    r"|(?P<maybe>\?\??)|(?P<repeat>(?:[*+]|\{\d{1,2}(?:,\d{0,2})?\})\??(?!\+))"
)


class Patterns:
    """Figures of modules by pattern: the first that matches counts, as in PEFT's `get_pattern_key`.

    Raises:
        Refused: a pattern uses another syntax, or there are too many; in `find`, too: they would take too long.
    """

    def __init__(self, figures: Mapping[str, float]) -> None:
        numbered = enumerate(figures.items())
        self._names = {key: (place, figure) for place, (key, figure) in numbered if PLAIN.fullmatch(key)}
        keys = [(place, key, figure) for place, (key, figure) in enumerate(figures.items()) if key not in self._names]
        if len(keys) > MOST:
            raise Refused(f"`alpha_pattern` has {len(keys)} expressions; at most {MOST} are allowed", IN_FULL)
        self._expressions = [(place, _Expression(key), figure) for place, key, figure in keys]
        self._work = 0

    def find(self, module: str, default: float) -> float:
        """Return the figure of a module."""
        # A pattern stands for the whole name, or for what follows a dot.
        starts = [0, *(at for at, each in enumerate(module, 1) if each == ".")]
        names = (f"^{module}", *(module[start:] for start in starts))
        first, figure = min((self._names[name] for name in names if name in self._names), default=(math.inf, default))
        for place, expression, own in self._expressions:
            if place > first:
                break
            own_starts = starts[:1] if expression.begins_anywhere else starts
            self._work += len(own_starts) * (STARTING + expression.work(module))
            if self._work > MAX_WORK:
                raise Refused("the expressions of `alpha_pattern` would take too long", IN_FULL)
            if any(expression.matches(module, start) for start in own_starts):
                return own
        return figure


class _Expression:
    """A regular expression of the syntax above."""

    def __init__(self, key: str) -> None:
        tokens = [(str(match.lastgroup), match[0]) for match in TOKEN.finditer(key)]
        self.begins_anywhere = key.startswith(".*") and "|" not in key
        self._ways = 1
        """In how many ways its groups can be read."""
        self._repeated: list[str] = []
        """What it repeats."""
        groups = [1]
        for (before, one), (kind, _) in zip([("", ""), *tokens], tokens, strict=False):
            if (kind == "repeat" and before != "one") or (kind == "maybe" and before not in ("one", "close")):
                raise _refused(key)
            if kind == "repeat":
                self._repeated.append(one)
            elif kind == "maybe":
                self._ways *= 2
            elif kind == "open":
                groups.append(1)
            elif kind == "or":
                groups[-1] += 1
            elif kind == "close" and len(groups) > 1:
                self._ways *= groups.pop()
        self._ways *= groups[0]
        if len(key) > LONGEST or "".join(text for _, text in tokens) != key:
            raise _refused(key)
        try:
            self.matches = re.compile(f"(?:{key})").fullmatch
        except (re.error, RecursionError):
            raise _refused(key) from None

    def work(self, module: str) -> int:
        """Return the most steps that a match with a name can take."""
        return self._ways * math.prod(1 + _longest(each, module) for each in self._repeated)


@functools.lru_cache(maxsize=4096)
def _longest(token: str, module: str) -> int:
    """Return how often a token comes in a row at most."""
    return max(map(len, re.findall(f"(?:{token})+", module)), default=0)


def _refused(key: str) -> Refused:
    return Refused(
        f"`alpha_pattern` has the pattern `{key[:80]}`, an expression that is not supported",
        IN_FULL,
    )
