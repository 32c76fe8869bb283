"""What is deprecated: it still works, and warns at the line of its author."""

from __future__ import annotations

import ast
import re
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import pytest
from sources import modules, tree

from graftage import types
from graftage._deprecations import deprecation
from graftage._engine.checking import check_hooks
from graftage._records import dataclass
from graftage._version import __version__
from graftage.hookspecs import hookimpl, hookspec
from graftage.testing import Cassette


class OldHooks(Protocol):
    """The hooks of a provider, as if one of them was deprecated."""

    @hookspec(warn_on_impl=deprecation("The hook `answers`", since="0.3", instead="`chat`"))
    def answers(self, request: object) -> object: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request with a deprecated field."""

    name: str

    @property
    def title(self) -> str:
        warnings.warn(deprecation("`Request.title`", since="1.0", instead="`name`"), stacklevel=2)
        return self.name


class Provider:
    @hookimpl
    def answers(self, request: Request) -> str:
        return request.title  # the line of `test_field_warns_where_it_is_read`


LINE = Provider.answers.__code__.co_firstlineno
"""The line of the decorator, where the function begins for Python."""


def test_hook_warns_where_it_is_implemented() -> None:
    with pytest.warns(DeprecationWarning, match="answers") as caught:
        hooks = check_hooks(Provider(), "provider", {"provider": OldHooks})
    (warning,) = caught
    assert (warning.filename, warning.lineno) == (__file__, LINE)
    assert str(warning.message) == (
        "The hook `answers` is deprecated since Graftage 0.3, and will be removed in 0.5. Use `chat`."
    )
    assert hooks == {"answers": True}


def test_field_warns_where_it_is_read() -> None:
    with pytest.warns(DeprecationWarning, match=r"will be removed in 1\.2\. Use `name`\.") as caught:
        assert Provider().answers(Request(name="Ada")) == "Ada"
    (warning,) = caught
    assert (warning.filename, warning.lineno) == (__file__, LINE + 2)


@pytest.mark.parametrize(("old", "new"), [("record", "all"), ("replay", "none")])
def test_argument_warns_where_it_is_passed(tmp_path: Path, old: Any, new: str) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("version: 1\ninteractions: []\n", encoding="utf-8")
    expected = f'`mode="{old}"` is deprecated since Graftage 0.2, and will be removed in 0.4. Use `mode="{new}"`.'
    with pytest.warns(DeprecationWarning, match=re.escape(expected)) as caught:
        Cassette(path, mode=old)
    assert [warning.filename for warning in caught] == [__file__]


def test_nothing_stays_after_its_time() -> None:
    now = tuple(map(int, __version__.split(".")[:2]))
    calls = [node for module in modules() for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    since = [
        ast.literal_eval(each.value)
        for node in calls
        if ast.unparse(node.func) == deprecation.__name__
        for each in node.keywords
        if each.arg == "since"
    ]
    for release in since:
        major, minor = map(int, release.split("."))
        assert now < (major, minor + 2), f"what is deprecated since {release} must be removed now"


@pytest.mark.parametrize(("name", "home"), [("ResolveRequest", "calls"), ("ConnectRequest", "hookspecs")])
def test_moved_names_still_work(name: str, home: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"Use `graftage.{home}.{name}`") as caught:
        found = getattr(types, name)
    assert found is getattr(import_module(f"graftage.{home}"), name)
    assert caught[0].filename == __file__


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        getattr(types, "Nothing")  # noqa: B009 - a type checker would refuse it
