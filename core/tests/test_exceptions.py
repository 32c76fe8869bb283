"""Errors: they can be copied and pickled, hold no secrets, and end with the way out."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest

import graftage
from graftage import exceptions
from graftage.exceptions import (
    AdapterError,
    ConnectionFailed,
    GraftageError,
    ModelLoadFailed,
    Overloaded,
    PluginError,
    ProviderError,
    ProviderTimeout,
    QuotaExceeded,
    ResourceLimitExceeded,
    SettingsError,
)
from graftage.hookspecs import hookimpl
from graftage.testing import Echo
from graftage.types import Chunk, Limits, Reply
from graftage_ollama.testing import FakeOllama

MODEL = "m:1"
CLASSES: list[type[GraftageError]] = [getattr(exceptions, name) for name in exceptions.__all__]


def full(kind: type[GraftageError]) -> GraftageError:
    """Return an error with a value in every attribute."""
    given: dict[str, Any] = {"hint": "Do this."}
    if issubclass(kind, ProviderError):
        given |= {"provider": "p", "model": "m", "operation": "chat", "status": 500, "retryable": True}
        given |= {"suggestions": ["a", "b"], "partial": Reply(text="so far"), "details": {"server_message": "no"}}
    if issubclass(kind, ProviderTimeout):
        given["phase"] = "idle"
    if issubclass(kind, ModelLoadFailed):
        given["reason"] = "memory"
    if issubclass(kind, (Overloaded, QuotaExceeded)):
        given["retry_after"] = 2.5
    if issubclass(kind, PluginError):
        given |= {"plugin": "oak", "distributions": ["graftage-oak 1.0"]}
    if issubclass(kind, AdapterError):
        given |= {"reference": "bonsai", "reasons": ["too small", "too green"]}
    if issubclass(kind, SettingsError):
        given |= {"key": "host", "source": "argument"}
    if issubclass(kind, ResourceLimitExceeded):
        given |= {"limit": "context_window", "value": 4096, "plugin": "m4", "reason": "small", "details": {"free": 1}}
    error = kind("It went wrong.", **given)
    if isinstance(error, ProviderError):
        error.attempts = 3
    return error


class TestTree:
    def test_docstring_shows_the_tree(self) -> None:
        drawn = re.findall(r"^    ([│ ├└─]*)(\w+Error|\w+)(?=\s|$)", exceptions.__doc__ or "", re.MULTILINE)
        parents: list[str] = []
        tree: dict[str, str | None] = {}
        for branch, name in drawn:
            depth = len(branch) // 4
            if name in exceptions.__all__:
                parents[depth:] = [name]
                tree[name] = parents[depth - 1] if depth else None
        real = {each.__name__: each.__mro__[1].__name__ for each in CLASSES if each is not GraftageError}
        assert tree == {"GraftageError": None, **real}

    @pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
    def test_every_class_has_a_docstring(self, kind: type[GraftageError]) -> None:
        assert (inspect.getdoc(kind) or "").strip().endswith(".")
        assert "__doc__" in vars(kind)

    def test_which_errors_are_retried(self) -> None:
        retried = {each.__name__ for each in CLASSES if issubclass(each, ProviderError) and each.default_retryable}
        assert retried == {"ConnectionFailed", "Overloaded"}
        assert [
            ProviderTimeout("x", phase=phase).retryable for phase in ("connect", "first_token", "idle", "total")
        ] == [
            True,
            False,
            False,
            False,
        ]
        assert not ModelLoadFailed("x", reason="memory").retryable
        assert not ModelLoadFailed("x", reason="incompatible").retryable
        assert ModelLoadFailed("x", reason="crashed").retryable
        assert not ModelLoadFailed("x", reason="timeout").retryable
        assert ConnectionFailed("x", retryable=False).retryable is False


class TestTravel:
    """Errors are copied and pickled whole."""

    @pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
    @pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
    def test_every_attribute_travels(self, kind: type[GraftageError], way: Callable[[Any], Any]) -> None:
        error = full(kind)
        arrived = way(error)
        assert type(arrived) is kind
        assert arrived is not error
        assert (arrived.args, str(arrived), vars(arrived)) == (error.args, str(error), vars(error))

    @pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
    def test_no_attribute_is_left_out_here(self, kind: type[GraftageError]) -> None:
        assert [name for name, value in vars(full(kind)).items() if value in (None, (), {}, "")] == []

    @pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
    def test_dict_is_plain_and_without_the_reply(self, kind: type[GraftageError]) -> None:
        data = full(kind).to_dict()
        assert data["error"] == kind.__name__
        assert (data["message"], data["hint"]) == ("It went wrong.", "Do this.")
        assert "so far" not in json.dumps(data)

    def test_raised_error_travels(self, both: Any) -> None:
        llm = both.connect(Echo([[Chunk(text="so far"), ConnectionFailed("It is gone.")]]), model=MODEL)
        with pytest.raises(ConnectionFailed) as caught:
            llm.chat("x")
        arrived = pickle.loads(pickle.dumps(caught.value))
        assert (arrived.provider, arrived.model, arrived.operation, arrived.partial.text) == (
            "echo",
            MODEL,
            "chat",
            "so far",
        )

    def test_given_mappings_are_copied(self) -> None:
        details = {"server_message": "no"}
        error = ProviderError("It went wrong.", details=details)
        details["server_message"] = "changed"
        assert error.details == {"server_message": "no"}

    def test_subclass_of_a_plugin_travels(self) -> None:
        arrived = pickle.loads(pickle.dumps(TooGreen("It is green.", shade="dark", hint="Paint it.")))
        assert (type(arrived), arrived.shade, str(arrived)) == (TooGreen, "dark", "It is green. Paint it.")


class TooGreen(ProviderError):
    """An error of a plugin, with its own attribute."""

    def __init__(self, message: str, *, shade: str, **attributes: Any) -> None:
        super().__init__(message, **attributes)
        self.shade = shade


class Policy:
    """A policy that fails or returns limits."""

    name = "policy"

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    @hookimpl
    def resource_limits(self, query: Any) -> Limits:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[no-any-return] # also what it should not be


def dead_server() -> Any:
    with graftage.connect("ollama", model=MODEL, host="http://127.0.0.1:9") as llm:
        return llm.chat("x")


def missing_model() -> Any:
    with FakeOllama() as fake, graftage.connect("ollama", model="smollm2:134m", host=fake.url) as llm:
        return llm.chat("x")


WAYS_OUT: dict[str, tuple[Callable[[], Any], str]] = {
    "a dead server": (dead_server, "."),
    "a missing model": (missing_model, "smollm2:135m|[Pp]ull"),
    "an unknown provider": (lambda: graftage.connect("olama"), "Did you mean `ollama`"),
    "an unknown setting": (lambda: graftage.connect(Echo(), hots="x"), "Did you mean `host`"),
    "no model": (lambda: graftage.connect(Echo()).chat("x"), "GRAFTAGE_MODEL"),
    "an unknown option": (lambda: graftage.connect(Echo(), model=MODEL).chat("x", options={"sed": 1}), "`seed`"),
    "an unknown adapter": (lambda: graftage.connect(Echo(), model=MODEL).chat("x", adapter="a"), "."),
    "a fault of the provider": (lambda: graftage.connect(Echo([KeyError("k")]), model=MODEL).chat("x"), "its authors"),
    "a cut answer": (lambda: graftage.connect(Echo([[]]), model=MODEL).chat("x"), "partial"),
    "a missing operation": (
        lambda: graftage.connect(Echo(without=["embed"]), model=MODEL).embed("x"),
        ".",
    ),
    "a failing policy": (
        lambda: graftage.connect(Echo(), model=MODEL, plugins=[Policy(KeyError("k"))]).chat("x"),
        "GRAFTAGE_DISABLED_PLUGINS",
    ),
    "a class instead of an object": (lambda: graftage.connect(Echo), r"`Echo\(\)`"),
    "an empty chain": (lambda: graftage.connect([]), "at least one"),
}


@pytest.mark.parametrize("case", WAYS_OUT)
def test_message_ends_with_the_way_out(case: str) -> None:
    act, way_out = WAYS_OUT[case]
    with pytest.raises(GraftageError) as caught:
        act()
    assert re.search(way_out, caught.value.hint or "")
    assert str(caught.value) == f"{caught.value.message} {caught.value.hint}"
    assert str(caught.value).endswith((".", "?"))
