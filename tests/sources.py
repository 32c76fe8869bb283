"""The sources of all distributions, by module."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


@cache
def modules() -> dict[str, Path]:
    """Return each of our modules and its file."""
    found = {}
    for package in sorted([*ROOT.glob("core/graftage"), *ROOT.glob("providers/*/*"), *ROOT.glob("plugins/*/*")]):
        for path in sorted(package.rglob("*.py")) if package.name.startswith("graftage") else ():
            parts = path.relative_to(package.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    """Return a parsed module."""
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


@cache
def imports(module: str) -> dict[str, int]:
    """Return which of our modules a module imports, lazily and for types too, with the lines."""
    found = {}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno} imports by dots"
            inner = [f"{node.module}.{each.name}" for each in node.names]
            names = [each if each in modules() else str(node.module) for each in inner]
        else:
            continue
        found.update({name: node.lineno for name in names if name in modules() and name != module})
    return found
