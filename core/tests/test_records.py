"""Frozen records: our `dataclass` gives the same classes as the library's."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, field
from typing import Any

import pytest

from graftage._records import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    """A record with fields of every kind."""

    name: str
    tags: tuple[str, ...] = ()
    words: dict[str, Any] = field(default_factory=dict)
    secret: str = field(default="s", repr=False)
    aside: int = field(default=0, compare=False)
    length: int = field(default=7, init=False)
    own: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("no name")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Theirs:
    """The same, made by the library."""

    name: str
    tags: tuple[str, ...] = ()
    words: dict[str, Any] = field(default_factory=dict)
    secret: str = field(default="s", repr=False)
    aside: int = field(default=0, compare=False)
    length: int = field(default=7, init=False)
    own: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("no name")


@dataclass(frozen=True)
class Placed:
    """A record with positional fields and without slots."""

    first: int
    rest: Any = None


@dataclasses.dataclass(frozen=True)
class Derived(Placed):
    """A subclass of a host."""

    more: int = 1


class Plain(Placed):
    """A subclass that is not a dataclass."""


class TestLikeTheLibrary:
    def test_shape(self) -> None:
        for name in ("__slots__", "__match_args__", "__dataclass_params__"):
            assert repr(getattr(Ours, name)) == repr(getattr(Theirs, name))
        assert [repr(each) for each in dataclasses.fields(Ours)] == [repr(each) for each in dataclasses.fields(Theirs)]

    def test_signature_before_the_first_instance(self) -> None:
        @dataclass(frozen=True, kw_only=True)
        class Fresh:
            name: str
            size: int = 3

        assert str(inspect.signature(Fresh)) == "(*, name: 'str', size: 'int' = 3) -> None"
        assert list(inspect.signature(Ours).parameters) == list(inspect.signature(Theirs).parameters)

    def test_repr_equality_and_hash(self) -> None:
        ours = Ours(name="a", tags=("b",), secret="x")
        theirs: Any = Theirs(name="a", tags=("b",), secret="x")
        assert repr(ours) == repr(theirs).replace("Theirs", "Ours")
        assert ours == Ours(name="a", tags=("b",), secret="x", aside=1)
        assert ours != Ours(name="b", tags=("b",), secret="x")
        assert ours != theirs
        assert hash(Placed(1, "x")) == hash(Placed(1, "x"))
        with pytest.raises(TypeError, match="unhashable"):
            hash(ours)

    def test_wrong_arguments_are_refused(self) -> None:
        make: Any = Ours
        for given in ({}, {"name": "a", "x": 1}, {"name": "a", "length": 1}):
            with pytest.raises(TypeError):
                make(**given)
        with pytest.raises(TypeError):
            make("a")
        with pytest.raises(ValueError, match="no name"):
            Ours(name="")

    def test_default_factories_are_not_shared(self) -> None:
        assert Ours(name="a").words is not Ours(name="a").words
        assert Ours(name="a").own is not Ours(name="a").own

    def test_fields_are_frozen(self) -> None:
        for record, name in ((Ours(name="a"), "name"), (Ours(name="a"), "new"), (Placed(1), "new")):
            with pytest.raises(FrozenInstanceError, match=f"cannot assign to field '{name}'"):
                setattr(record, name, 1)
            with pytest.raises(FrozenInstanceError, match=f"cannot delete field '{name}'"):
                delattr(record, name)

    @pytest.mark.parametrize("record", [Ours(name="a", words={"b": [1]}), Placed(1, "x"), Derived(1, 2, 3)])
    def test_copy_pickle_and_replace(self, record: Any) -> None:
        assert copy.copy(record) == copy.deepcopy(record) == pickle.loads(pickle.dumps(record)) == record
        assert dataclasses.asdict(pickle.loads(pickle.dumps(record))) == dataclasses.asdict(record)
        changed = dataclasses.replace(record, **{dataclasses.fields(record)[0].name: 9})
        assert (changed != record, type(changed)) == (True, type(record))

    def test_subclasses(self) -> None:
        derived = Derived(1, 2, 3)
        assert repr(derived) == "Derived(first=1, rest=2, more=3)"
        with pytest.raises(FrozenInstanceError):
            derived.first = 2  # type: ignore[misc]
        plain: Any = Plain(1)
        plain.note = "x"
        assert (plain.note, plain.first) == ("x", 1)
        with pytest.raises(FrozenInstanceError):
            plain.first = 2
        del plain.note

    def test_repr_of_a_cycle(self) -> None:
        words: dict[str, Any] = {}
        record = Ours(name="a", words=words)
        words["self"] = record
        assert "..." in repr(record)


class TestLazyCompilation:
    def test_first_instances_in_many_threads(self) -> None:
        for _ in range(20):

            @dataclass(frozen=True, slots=True)
            class Raced:
                value: int

            with ThreadPoolExecutor(8) as pool:
                assert list(pool.map(Raced, range(8))) == [Raced(each) for each in range(8)]

    def test_unused_classes_are_not_compiled(self) -> None:
        program = "import graftage.types as t; t.Timeouts(); print(*(type(vars(c)['__init__']).__name__ for c in "
        program += "(t.Timeouts, t.Message)))"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["function", "_Init"]
