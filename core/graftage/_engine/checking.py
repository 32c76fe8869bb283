"""Check the hooks that plugins and connections implement, before one is called."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType, MethodType
from typing import Any, Literal

import pluggy

from graftage._engine.faults import in_words, is_fault
from graftage._values import close
from graftage._version import __version__
from graftage.hookspecs import CONNECTION_SPECS, CONTRACT, OLDEST_CONTRACT, PLUGIN_SPECS, PROVIDER_SPECS

__all__ = ["HookProblem", "Hooks", "Kind", "check_attributes", "check_hooks", "contract_of", "is_async"]

Kind = Literal["provider", "plugin", "connection"]


class HookProblem(Exception):
    """What is wrong with a plugin object."""

    def __init__(self, text: str, hint: str) -> None:
        super().__init__(text)
        self.text = text
        self.hint = hint


def _specs(classes: Iterable[type]) -> type:
    """Return a class with the hooks of some Protocols alone, since pluggy looks at every attribute."""
    found = {name: value for each in classes for name, value in vars(each).items() if hasattr(value, "graftage_spec")}
    return type("Specs", (), found)


SPECS: dict[Kind, type] = {
    "provider": _specs(PROVIDER_SPECS),
    "plugin": _specs(PLUGIN_SPECS),
    "connection": _specs(CONNECTION_SPECS),
}
HOOK_NAMES: dict[Kind, set[str]] = {
    kind: {name for name in vars(specs) if not name.startswith("_")} for kind, specs in SPECS.items()
}
FUNCTIONS = (FunctionType, MethodType)
Hooks = Mapping[str, bool]
"""The hooks that an object implements, and whether each takes its argument, which pluggy allows to leave out."""
_checked: weakref.WeakKeyDictionary[object, tuple[Kind, Mapping[str, object], Hooks]] = weakref.WeakKeyDictionary()
"""For each class or module: the kind it was checked as, its own marked functions, and its hooks."""


def check_hooks(plugin: object, kind: Kind, specs: Mapping[Kind, type] = SPECS) -> Hooks:
    """Check the hooks of an object, and return them. A deprecated hook warns at its own line.

    A class is checked once in a process, and so is a module as long as its functions stay the same. An object that
    has hooks besides those of its class is checked each time.

    Args:
        plugin: the plugin object or connection.
        kind: what it should be.
        specs: for each kind, a class with its hooks.

    Raises:
        HookProblem: something is wrong with them.
    """
    try:
        return _hooks_of(plugin, kind, specs)
    except HookProblem:
        raise
    except BaseException as error:
        if not is_fault(error):
            raise
        raise HookProblem(f"fails when it is inspected: {in_words(error)}", "Fix or remove it.") from error


def _hooks_of(plugin: object, kind: Kind, specs: Mapping[Kind, type]) -> Hooks:
    if inspect.isclass(plugin):
        raise HookProblem("is a class", f"Register an instance: `{plugin.__name__}()`.")
    # Only functions are looked at: a proxy in a module may raise any error before it is set up.
    functions = [(name, each) for name, each in getattr(plugin, "__dict__", {}).items() if type(each) in FUNCTIONS]
    own = {name: each for name, each in functions if hasattr(each, "graftage_impl")}
    owner = plugin if inspect.ismodule(plugin) else type(plugin)
    if (found := _checked.get(owner)) is not None and found[:2] == (kind, own):
        return found[2]
    if kind != "connection":
        _check_contract(contract_of(plugin))
    manager = pluggy.PluginManager("graftage")
    manager.add_hookspecs(specs[kind])
    try:
        manager.register(plugin, "plugin")
    except pluggy.PluginValidationError as error:
        raise _wrong_signature(error, kind) from error
    hooks: dict[str, bool] = {}
    for caller in manager.get_hookcallers(plugin) or []:
        for impl in caller.get_hookimpls():
            _check_hook(caller.name, impl, kind)
            _check_async(caller.name, impl.function, kind)
            hooks[caller.name] = bool(impl.argnames)
    if not hooks:
        raise HookProblem("implements no hook", "Mark its functions with `graftage.hookspecs.hookimpl`.")
    if owner is plugin or not own:
        _checked[owner] = kind, own, hooks
    return hooks


def contract_of(plugin: object) -> Any:
    """Return the number of the contract that a plugin was written for."""
    return getattr(plugin, "graftage_contract", 1)


def _check_contract(number: Any) -> None:
    if type(number) is not int:
        raise HookProblem("has an invalid `graftage_contract`", f"It must be a number: {CONTRACT}.")
    written = f"is written for contract {number}, and Graftage {__version__}"
    if number > CONTRACT:
        raise HookProblem(f"{written} has contract {CONTRACT}", "Upgrade graftage: `pip install --upgrade graftage`.")
    if number < OLDEST_CONTRACT:
        raise HookProblem(f"{written} takes none before {OLDEST_CONTRACT}", "Upgrade it, or install an older graftage.")


def _wrong_signature(error: pluggy.PluginValidationError, kind: Kind) -> HookProblem:
    name = str(error).partition("for hook '")[2].partition("'")[0]
    parameters = [each for each in inspect.signature(getattr(SPECS[kind], name)).parameters if each != "self"]
    return HookProblem(
        f"has the hook `{name}` with a wrong signature: {str(error).strip().splitlines()[-1]}",
        f"Its parameters are: {', '.join(parameters) or 'none'}.",
    )


def _check_hook(name: str, impl: pluggy.HookImpl, kind: Kind) -> None:
    if impl.wrapper or impl.hookwrapper:
        raise HookProblem(f"wraps the hook `{name}`", "Hooks cannot be wrapped: implement them, or use `observe`.")
    if name in HOOK_NAMES[kind] or impl.optionalhook:
        return
    for other, names in HOOK_NAMES.items():
        if name in names:
            raise HookProblem(
                f"implements `{name}`, which is a hook of a {other}, not of a {kind}",
                "A provider's `connect` returns the connection that has such hooks."
                if other == "connection"
                else f"Move it to a {other}.",
            )
    near = close(name, HOOK_NAMES[kind])
    hint = f"Did you mean `{near[0]}`?" if near else f"Hooks of a {kind}: {', '.join(sorted(HOOK_NAMES[kind]))}."
    raise HookProblem(f"implements `{name}`, which is not a hook", hint)


STREAMS = ("chat", "generate", "pull_model")
"""Hooks that return an iterator."""


def _check_async(name: str, function: Callable[..., Any], kind: Kind) -> None:
    """Refuse what would fail at its first call: a coroutine instead of an iterator, and the reverse."""
    if kind != "connection" or name == "capabilities":
        if is_async(function):
            raise HookProblem(f"implements `{name}` as `async def`", "Write `def`: it is not awaited.")
        if kind != "plugin" and inspect.isgeneratorfunction(function):
            raise HookProblem(f"implements `{name}` as a generator", "It must `return` one result.")
    elif name in STREAMS:
        if inspect.iscoroutinefunction(function):
            raise HookProblem(f"implements `{name}` as `async def` without `yield`", "Make it an async generator.")
    elif inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        raise HookProblem(f"implements `{name}` as a generator", "It must `return` one result.")


def is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


ATTRIBUTES = ("address", "default_model", "needs_event_loop")
"""The attributes of a connection that the core reads."""


def check_attributes(connection: object, hooks: Hooks) -> None:
    """Refuse a misspelt attribute, which would have no effect."""
    if found := _near_attribute(frozenset(name for name in dir(connection) if name[0] != "_" and name not in hooks)):
        raise HookProblem(
            f"has an attribute `{found[1]}`", f"Did you mean `{found[0]}`? If not, put a `_` before its name."
        )


@functools.lru_cache(maxsize=64)
def _near_attribute(present: frozenset[str]) -> tuple[str, str] | None:
    for name in ATTRIBUTES:
        if name not in present and (near := close(name, present.difference(ATTRIBUTES), cutoff=0.85)):
            return name, near[0]
    return None
