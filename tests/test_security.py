"""The tests that SECURITY.md names exist."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
PROMISES = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| Risk")]


@functools.cache
def names_in(path: str) -> frozenset[str]:
    """Return the tests of a module, those of a class as `TestClass::test_name`."""
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    classes = [each for each in body if isinstance(each, ast.ClassDef)]
    inside = {f"{each.name}::{name}" for each in classes for name in functions(each.body)}
    return frozenset(inside | functions(body))


def functions(body: list[ast.stmt]) -> set[str]:
    return {each.name for each in body if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))}


def test_each_promise_names_existing_tests() -> None:
    assert len(PROMISES) >= 14
    for promise in PROMISES:
        named = re.findall(r"`([\w/]+\.py)::((?:Test\w+::)?test_\w+)`", promise)
        assert named, promise
        assert not [(path, name) for path, name in named if name not in names_in(path)]
