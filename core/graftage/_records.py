"""A `dataclass` for frozen records that costs a tenth of the library's at import.

The library compiles up to seven functions for each class. Here all classes share these functions, except for
`__init__`, which is compiled at its first use: most programs use only a few of the classes. The result is an ordinary
dataclass for `fields`, `replace`, `copy`, `pickle`, type checkers and subclasses.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import MISSING, FrozenInstanceError, fields
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from dataclasses import dataclass

__all__ = ["dataclass"]


class _Init:
    """A placeholder for `__init__`, which is replaced by a compiled one at its first use."""

    def __init__(self, cls: type) -> None:
        self._cls = cls

    def __get__(self, instance: object, owner: type) -> Any:
        compiled: Any = _compiled_init(self._cls)
        self._cls.__init__ = compiled  # type: ignore[misc] # every thread sets the same
        return compiled.__get__(instance, owner)


def _compiled_init(cls: Any) -> Callable[..., None]:
    known: dict[str, Any] = {"_set": object.__setattr__, "_missing": MISSING}
    placed: list[str] = []
    named: list[str] = []
    lines: list[str] = []
    for each in fields(cls):
        name, own = each.name, f"_of_{each.name}"
        head, value = name, name
        if each.default is not MISSING:
            known[own], head, value = each.default, f"{name}={own}", name if each.init else own
        elif each.default_factory is not MISSING:
            known[own], head = each.default_factory, f"{name}=_missing"
            value = f"{own}() if {name} is _missing else {name}" if each.init else f"{own}()"
        if each.init:
            (named if each.kw_only else placed).append(head)
        lines.append(f"  _set(self, {name!r}, {value})\n")
    if hasattr(cls, "__post_init__"):
        lines.append("  self.__post_init__()\n")
    heads = ", ".join(["self", *placed, *(["*", *named] if named else ())])
    text = f"def make({', '.join(known)}):\n def __init__({heads}):\n{''.join(lines) or '  pass'}\n return __init__"
    made: dict[str, Any] = {}
    exec(text, vars(sys.modules[cls.__module__]), made)  # noqa: S102 - as the library does, with the names of fields
    init: Any = made["make"](**known)
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    init.__annotations__ = {each.name: each.type for each in fields(cls) if each.init} | {"return": None}
    return init  # type: ignore[no-any-return]


def _values(record: Any, wanted: str) -> tuple[Any, ...]:
    return tuple(getattr(record, each.name) for each in fields(record) if getattr(each, wanted))


@recursive_repr()
def _repr(self: Any) -> str:
    shown = ", ".join(f"{each.name}={getattr(self, each.name)!r}" for each in fields(self) if each.repr)
    return f"{type(self).__qualname__}({shown})"


def _eq(self: object, other: object) -> Any:
    return _values(self, "compare") == _values(other, "compare") if type(other) is type(self) else NotImplemented


def _hash(self: object) -> int:
    return hash(_values(self, "compare"))


def _setattr(self: Any, name: str, value: Any) -> None:
    if "__dataclass_fields__" in vars(type(self)) or name in self.__dataclass_fields__:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")
    object.__setattr__(self, name, value)


def _delattr(self: Any, name: str) -> None:
    if "__dataclass_fields__" in vars(type(self)) or name in self.__dataclass_fields__:
        raise FrozenInstanceError(f"cannot delete field {name!r}")
    object.__delattr__(self, name)


def _getstate(self: Any) -> list[Any]:
    return [getattr(self, each.name) for each in fields(self)]


def _setstate(self: Any, state: list[Any]) -> None:
    for each, value in zip(fields(self), state, strict=True):
        object.__setattr__(self, each.name, value)


_SHARED = {"__repr__": _repr, "__eq__": _eq, "__hash__": _hash, "__setattr__": _setattr, "__delattr__": _delattr}
_STATE = {"__getstate__": _getstate, "__setstate__": _setstate}


def _frozen(cls: type, *, slots: bool, kw_only: bool) -> type:
    own = vars(cls)
    shared = {name: each for name, each in (_SHARED | (_STATE if slots else {})).items() if name not in own}
    made: Any = dataclasses.dataclass(init=False, repr=False, eq=False, slots=slots, kw_only=kw_only)(cls)
    for name in ("init", "repr", "eq", "frozen"):
        setattr(made.__dataclass_params__, name, True)
    made.__init__ = _Init(made)
    for name, each in shared.items():
        setattr(made, name, each)
    return made  # type: ignore[no-any-return]


if not TYPE_CHECKING:

    def dataclass(*, frozen: bool = False, slots: bool = False, kw_only: bool = False) -> Callable[[type], type]:
        """Return a decorator; for a class that is not frozen, that of the library."""
        if not frozen:
            return dataclasses.dataclass(slots=slots, kw_only=kw_only)
        return lambda cls: _frozen(cls, slots=slots, kw_only=kw_only)
