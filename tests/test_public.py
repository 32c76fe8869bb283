"""The public names, as agreed in `public.txt`, and which module may import which.

`python tests/test_public.py > tests/public.txt` records the public names as they are now.
"""

from __future__ import annotations

import ast
import difflib
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from sources import imports, modules, tree

if TYPE_CHECKING:
    from collections.abc import Iterator

AGREED = Path(__file__).with_name("public.txt")
RENEW = "python tests/test_public.py > tests/public.txt"
ARGUMENTS = "graftage._engine.arguments"
TAKEN = {"Arguments", "ChatArguments", "EmbedArguments", "GenerateArguments", "RerankArguments", "RunArguments"}
"""The arguments of `chat(**arguments)` and similar methods, which a private module defines."""
Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
ENGINE = [
    "threads",
    "delivery",
    "driving",
    "faults",
    "events",
    "health",
    "answers",
    "inputs",
    "schemas",
    "options",
    "purposes",
    "arguments",
    "limits",
    "slots",
    "checking",
    "plugins",
    "instances",
    "waiting",
    "toolbox",
    "awaiting",
    "hooks",
    "call",
    "clients",
    "connection",
    "admission",
    "adapters",
    "session",
    "fallback",
    "tool_loop",
    "choosing",
]
"""The modules of the engine, lowest first: each imports only those before it."""


# --- The public names ------------------------------------------------------------------------------------------------


def surface() -> str:
    """Return every public module with its names, as callers see them."""
    lines = []
    for module in modules():
        if names := TAKEN if module == ARGUMENTS else _names(module) if _is_public(module) else set():
            lines += [module, *(f"    {line}" for line in _module(module, names)), ""]
    return "\n".join(lines)


def _module(module: str, public: set[str]) -> Iterator[str]:
    public = public | _private_bases(module, public)
    for node in _statements(tree(module).body):
        if isinstance(node, ast.ImportFrom):
            yield from _imported(str(node.module), {each.name for each in node.names} & public)
        elif isinstance(node, ast.ClassDef) and node.name in public:
            yield from _class(node, built=_is_public(module))
        elif isinstance(node, Function) and node.name in public:
            yield _function(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and _target(node) in public:
            yield ast.unparse(node)


def _private_bases(module: str, public: set[str]) -> set[str]:
    """Return the private bases of public classes."""
    classes = [node for node in tree(module).body if isinstance(node, ast.ClassDef) and node.name in public]
    bases = {ast.unparse(base) for node in classes for base in node.bases}
    return {base for base in bases if base.startswith("_")}


def _imported(module: str, names: set[str]) -> Iterator[str]:
    """Describe names from another module, in full only if that module is private."""
    if _is_public(module) or not names:
        yield from (f"{name} is that of {module}" for name in sorted(names))
    else:
        yield from _module(module, names)


def _is_public(module: str) -> bool:
    return not any(part.startswith("_") for part in module.split("."))


def _names(module: str) -> set[str]:
    """Return the names in `__all__`."""
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and _target(node) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])
        else:
            yield node


def _class(node: ast.ClassDef, *, built: bool) -> Iterator[str]:
    """Describe a class, with its constructor if callers may build it."""
    bases = ", ".join(ast.unparse(each) for each in [*node.bases, *node.keywords])
    decorators = "".join(f"@{ast.unparse(each)} " for each in node.decorator_list)
    yield f"{decorators}class {node.name}({bases})"
    for each in node.body:
        if isinstance(each, Function) and ((each.name == "__init__" and built) or not each.name.startswith("_")):
            yield f"    {_function(each)}"
            yield from (f"    {field}" for field in _fields(each) if each.name == "__init__")
        elif isinstance(each, ast.AnnAssign | ast.Assign) and not _target(each).startswith("_"):
            yield f"    {ast.unparse(each)}"


def _function(node: Function) -> str:
    decorators = "".join(
        f"@{each} " for each in map(ast.unparse, node.decorator_list) if not each.startswith(("_", "translate_errors"))
    )
    kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{decorators}{kind} {node.name}({ast.unparse(node.args)}){returns}"


def _fields(init: Function) -> Iterator[str]:
    """List the public attributes that a constructor sets."""
    for node in ast.walk(init):
        for target in node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]:
            for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(each, ast.Attribute) and not each.attr.startswith("_"):
                    yield f"self.{each.attr}"


def _target(node: ast.Assign | ast.AnnAssign) -> str:
    return ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)


def test_public_names_are_as_agreed() -> None:
    agreed, found = AGREED.read_text(encoding="utf-8").splitlines(), surface().splitlines()
    changes = "\n".join(difflib.unified_diff(agreed, found, "agreed", "now", lineterm="", n=1))
    assert not changes, f"{changes}\nIf this is intended: {RENEW}"


def test_public_modules_have_all() -> None:
    assert not [module for module in modules() if _is_public(module) and not _names(module)]


def test_names_in_all_exist() -> None:
    for module in modules():
        lines = "\n".join(_module(module, _names(module)))
        assert not [name for name in _names(module) if name not in lines], module


# --- Imports ---------------------------------------------------------------------------------------------------------


def test_imports_have_no_cycle() -> None:
    try:
        TopologicalSorter({module: set(imports(module)) for module in modules()}).prepare()
    except CycleError as error:
        raise AssertionError(" is imported by ".join(error.args[1])) from None


def test_engine_imports_run_one_way() -> None:
    order = [f"graftage._engine.{name}" for name in ENGINE]
    assert {each for each in modules() if each.startswith("graftage._engine.")} == set(order)
    up = [
        f"{modules()[module]}:{line} imports {other}"
        for place, module in enumerate(order)
        for other, line in imports(module).items()
        if other in order[place:]
    ]
    assert not up


if __name__ == "__main__":
    sys.stdout.write(surface())
