"""A provider around another one, which notes what the core asks its hooks and what they give."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from graftage._engine.checking import ATTRIBUTES, STREAMS, check_hooks, is_async
from graftage._engine.plugins import plugin_name
from graftage.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from graftage.hookspecs import ConnectRequest

__all__ = ["HookCall", "Spy"]


@dataclass
class HookCall:
    """One call of a hook."""

    hook: str
    request: Any
    items: list[Any] = field(default_factory=list)
    """What its iterator gave, or its one result."""
    error: BaseException | None = None


class Spy:
    """Passes everything on unchanged, but reads one item ahead: so what comes after a last chunk is seen, too.

    It closes a connection twice, since a second call must do nothing.
    """

    def __init__(self, provider: Any) -> None:
        self.name = plugin_name(provider)
        self.seen: list[HookCall] = []
        self.hooks: set[str] = set()
        """The hooks of its connection."""
        self._provider = provider
        if hasattr(provider, "settings_model"):
            self.settings_model = provider.settings_model

    def calls(self, hook: str) -> list[HookCall]:
        """Return the calls of one hook."""
        return [each for each in self.seen if each.hook == hook]

    @hookimpl
    def connect(self, request: ConnectRequest) -> object:
        """Return the connection with each hook wrapped."""
        connection = self._provider.connect(request)
        hooks = check_hooks(connection, "connection")
        self.hooks.update(hooks)
        attributes = {name: getattr(connection, name) for name in ATTRIBUTES if hasattr(connection, name)}
        wrapped = {
            name: self._around(name, getattr(connection, name), takes=takes)
            for name, takes in hooks.items()
            if name != "capabilities"
        }
        own = {"capabilities": connection.capabilities} if "capabilities" in hooks else {}
        return SimpleNamespace(**attributes, **wrapped, **own)

    def _around(self, name: str, hook: Any, *, takes: bool) -> Callable[[Any], Any]:
        def begin(request: object) -> tuple[HookCall, Any]:
            note = HookCall(name, request)
            self.seen.append(note)
            try:
                return note, hook(request) if takes else hook()
            except BaseException as error:
                note.error = error
                raise

        waits = is_async(hook)
        if name in STREAMS:
            wrapped = (_async_stream if waits else _stream)(begin)
        else:
            wrapped = (_async_once if waits else _once)(begin)
        if name == "close":
            wrapped = (_async_twice if waits else _twice)(wrapped)
        marked: Callable[[Any], Any] = hookimpl(wrapped)
        return marked


def _async_stream(begin: Any) -> Callable[[Any], Any]:
    async def stream(request: Any) -> AsyncIterator[Any]:
        note, items = begin(request)
        async with aclosing(items):
            async for item in items:
                for ready in _behind(note, item):
                    yield ready
        for last in note.items[-1:]:
            yield last

    return stream


def _stream(begin: Any) -> Callable[[Any], Any]:
    def stream(request: Any) -> Iterator[Any]:
        note, items = begin(request)
        for item in items:
            yield from _behind(note, item)
        yield from note.items[-1:]

    return stream


def _behind(note: HookCall, item: Any) -> list[Any]:
    """Note an item, and return the one before it, if there is one."""
    note.items.append(item)
    return note.items[-2:-1]


def _async_once(begin: Any) -> Callable[[Any], Any]:
    async def once(request: Any) -> Any:
        note, result = begin(request)
        try:
            note.items.append(await result)
        except BaseException as error:
            note.error = error
            raise
        return note.items[0]

    return once


def _once(begin: Any) -> Callable[[Any], Any]:
    def once(request: Any) -> Any:
        note, result = begin(request)
        note.items.append(result)
        return result

    return once


def _async_twice(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    async def twice(request: Any) -> None:
        await hook(request)
        await hook(request)

    return twice


def _twice(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def twice(request: Any) -> None:
        hook(request)
        hook(request)

    return twice
