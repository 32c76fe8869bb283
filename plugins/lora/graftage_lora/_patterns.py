r"""Matches PEFT's `alpha_pattern` with names of modules, in a bounded time.

PEFT uses its keys as regular expressions, and some of these run forever. So only a part of their syntax is allowed:
characters, `.`, `[…]`, `\d`, `\w`, groups, `|`, `^`, `$`; `*`, `+`, `{m,n}` behind one character; `?` also behind a
group. Then the ways to match a name can be counted before it is tried.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from graftage_lora._files import Refused

__all__ = ["Patterns"]

LONGEST: Final = 300
"""Characters of an expression."""
MAX_WORK: Final = 50_000_000
"""Steps that the expressions of one adapter may take: some seconds."""
TOKEN: Final = re.compile(
    r"(?P<one>\\[dw]|\\[^\w\s]|\[\^?(?:[a-z]-[a-z]|[A-Z]-[A-Z]|\d-\d|\\[dw.-]|[\w.])+-?\]|[^\\\[\](){}*+?|^$])"
    r"|(?P<open>\((?:\?:)?)|(?P<close>\))|(?P<or>\|)|(?P<edge>[\^$])"
    r"|(?P<maybe>\?\??)|(?P<repeat>(?:[*+]|\{\d{1,2}(?:,\d{0,2})?\})\??(?!\+))"
)


class Patterns:
    """Figures of modules by pattern: the first that matches counts, as in PEFT's `get_pattern_key`.

    Raises:
        Refused: a pattern uses another syntax; in `find`, too: they would take too long.
    """

    def __init__(self, figures: Mapping[str, float]) -> None:
        self._figures = [(_compiled(key), figure) for key, figure in figures.items()]
        self._work = 0

    def find(self, module: str, default: float) -> float:
        """Return the figure of a module."""
        # A pattern stands for the whole name, or for what follows a dot.
        starts = [0, *(at for at, each in enumerate(module, 1) if each == ".")]
        for (expression, ways, repeats), figure in self._figures:
            self._work += len(starts) * ways * (len(module) + 1) ** repeats
            if self._work > MAX_WORK:
                raise Refused("the expressions of `alpha_pattern` would take too long", "Name the modules in full.")
            if any(expression.fullmatch(module, start) for start in starts):
                return figure
        return default


def _compiled(key: str) -> tuple[re.Pattern[str], int, int]:
    """Return an expression, how many ways its groups give, and how many repeats it has, each with any length."""
    tokens = [(str(match.lastgroup), match[0]) for match in TOKEN.finditer(key)]
    ways, repeats, groups, before = 1, 0, [1], ""
    for kind, _ in tokens:
        if (kind == "repeat" and before != "one") or (kind == "maybe" and before not in ("one", "close")):
            raise _refused(key)
        repeats += kind == "repeat"
        ways *= 2 if kind == "maybe" else 1
        if kind == "open":
            groups.append(1)
        elif kind == "or":
            groups[-1] += 1
        elif kind == "close" and len(groups) > 1:
            ways *= groups.pop()
        before = kind
    if len(key) > LONGEST or "".join(text for _, text in tokens) != key:
        raise _refused(key)
    try:
        return re.compile(f"(?:{key})"), ways * groups[0], repeats
    except (re.error, RecursionError):
        raise _refused(key) from None


def _refused(key: str) -> Refused:
    return Refused(
        f"`alpha_pattern` has the pattern `{key[:80]}`, an expression that is not supported",
        "Name the modules in full.",
    )
