"""Names that are going to be removed. Each works for two more minor releases, and warns at the line that uses it."""

from __future__ import annotations

__all__ = ["deprecation"]

KEPT = 2
"""Minor releases for which a deprecated name still works."""


def deprecation(name: str, *, since: str, instead: str) -> DeprecationWarning:
    """Return the warning for a name that is going to be removed.

    A hook gets it as `@hookspec(warn_on_impl=deprecation(...))`, which warns at the line of each implementation. A
    field or an argument is warned of with `warnings.warn(deprecation(...), stacklevel=...)`.

    Args:
        name: what is deprecated, in words.
        since: the release that deprecates it, such as `0.3`.
        instead: what to write instead.
    """
    major, minor = map(int, since.split("."))
    return DeprecationWarning(
        f"{name} is deprecated since Graftage {since}, and will be removed in {major}.{minor + KEPT}. Use {instead}."
    )
