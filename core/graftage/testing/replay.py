"""A recorder at the call: what providers are asked and what they answer, whatever they do to answer it.

    with Cassette("cassettes/story.yaml", mode="once") as cassette:
        with graftage.connect(Replay(cassette, "ollama"), model="smollm2:135m") as llm:
            llm.chat("Tell me a story")

A cassette that is given as `transport` records HTTP. A `Replay` stands above that: it records requests and chunks as
the contract of plugins knows them, also of a provider that is a plain function or an SDK. The file is a cassette like
any other: each request is a `POST graftage://PROVIDER/HOOK`, each chunk a line of its response.
"""

from __future__ import annotations

import contextlib
import urllib.parse
from collections.abc import Mapping
from contextlib import aclosing
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from pydantic import SecretStr, create_model

from graftage._engine.choosing import standing_in
from graftage._engine.driving import drive
from graftage._engine.faults import kind_of
from graftage._engine.plugins import Catalog, Relay, plugin_name
from graftage._records import dataclass
from graftage.calls import Call
from graftage.exceptions import GraftageError
from graftage.hookspecs import hookimpl
from graftage.http import Clock, Request
from graftage.settings import Settings
from graftage.testing.cassettes import Cassette, CassetteError
from graftage.testing.records import ANSWERS, MANY, STREAMS, answer_of, line_of, request_body
from graftage.types import Capabilities

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence

    from graftage._engine.faults import Author
    from graftage._engine.plugins import Entry, Hook
    from graftage.calls import CloseRequest
    from graftage.hookspecs import AnswersRequest, ConnectRequest
    from graftage.http import Colour, Headers, Response, Transport
    from graftage.testing.interactions import Interaction

__all__ = ["Replay", "recorded_calls", "replaying"]

_SCHEME: Final = "graftage"
_JSON: Final = (("content-type", "application/json"),)
_LINES: Final = (("content-type", "application/x-ndjson"),)


@contextlib.contextmanager
def replaying(cassette: Cassette) -> Iterator[None]:
    """Record or replay, on one cassette, every provider that is chosen meanwhile, whatever the code names.

    It holds in all threads of the process. A client that was connected before is not touched.
    """
    with standing_in(_Everywhere(cassette)):
        yield


class Replay:
    """A provider plugin that passes another one on and records it, or that replays it without it.

    It has the other's name, hooks, settings, address and capabilities; only `native` is missing, since what a host does
    with a server's own client cannot be recorded. A replay needs no provider: it is neither loaded nor installed.
    Errors are recorded after the provider's own retries, and raised again as their class.
    """

    def __init__(
        self,
        cassette: Cassette | str | os.PathLike[str],
        provider: str | object | None = None,
        *,
        find: Callable[[], Entry] | None = None,
    ) -> None:
        """Build the plugin.

        Args:
            cassette: where to record or replay; a path is replayed.
            provider: the provider to record, by name or as an object; not needed for a replay of a file with one.
            find: finds the provider; by default among the installed ones.

        Raises:
            CassetteError: the file cannot be replayed, or no provider is given and the file names none or several.
        """
        self.cassette = cassette if isinstance(cassette, Cassette) else Cassette(cassette)
        self._provider = provider
        self._find = find
        if provider is None:
            self.name = self._only_name()
        else:
            self.name = provider if isinstance(provider, str) else plugin_name(provider)

    def _only_name(self) -> str:
        names = _recorded_names(self.cassette)
        if len(names) != 1:
            what = f"of several providers: {', '.join(names)}" if names else "of a provider"
            raise CassetteError(
                f"{self.cassette.path} holds {'calls' if names else 'no call'} {what}.",
                hint="Name one as the second argument of `Replay`.",
            )
        return names[0]

    @cached_property
    def _entry(self) -> Entry:
        """The provider behind it, loaded; only a recording needs it."""
        if self._find is not None:
            return self._find()
        if isinstance(self._provider, str):
            return Catalog().provider(self._provider)
        return Catalog([self._provider]).given_provider(self._provider)

    def _call(self, hook: str, **arguments: Any) -> Any:
        """Call a hook of the provider; None if it has no such hook."""
        takes = self._entry.hooks.get(hook)
        if takes is None:
            return None
        return getattr(self._entry.plugin, hook)(**arguments if takes else {})

    @hookimpl
    def settings_model(self) -> type[Settings]:
        """Return the provider's; for a replay, one with settings of the same names and any values."""
        if self.cassette.records:
            return self._call("settings_model") or Settings
        names = [name for each in self._facts() for name in each.settings]
        return create_model("RecordedSettings", __base__=Settings, **dict.fromkeys(names, (Any, None)))  # type: ignore[call-overload, no-any-return]

    @hookimpl
    def answers(self, request: AnswersRequest) -> int | None:
        """Return the provider's rank; on replay, providers rank as they were asked."""
        if self.cassette.records:
            return self._call("answers", request=request)  # type: ignore[no-any-return]
        names = _recorded_names(self.cassette)
        return -names.index(self.name) if self.name in names else None

    @hookimpl
    def connect(self, request: ConnectRequest) -> object:
        """Return a connection with the hooks of the provider's, or with those that it had when it was recorded."""
        live = self._live(request) if self.cassette.records else None
        transport = self.cassette.wrap(lambda: live)  # type: ignore[arg-type, return-value] # a replay does not call it
        wire = _Wire(self.name, transport, tuple(_secrets(request.settings)))
        facts = drive(wire.once("connect", request, Call()))
        plain = {name: not each.is_async for name, each in live.relay.hooks.items()} if live else {}
        names = {*(live.relay.hooks if live else facts.hooks), "close"} & {*ANSWERS, "capabilities", "close"}
        hooks = {name: _hook(name, plain=plain.get(name, False)) for name in names}
        return type("ReplayConnection", (_Connection,), hooks)(wire, live, facts)

    def _live(self, request: ConnectRequest) -> _Live:
        return _Live(self._entry, lambda: self._call("connect", request=request), request.settings)

    def _facts(self) -> Iterator[_Facts]:
        """Yield what connections of the provider were recorded to have."""
        for each in recorded_calls(self.cassette):
            if each.request.path == "/connect" and _name_of(each) == self.name:
                for line in each.body.splitlines():
                    with contextlib.suppress(Exception):  # An error that `connect` raised.
                        yield answer_of(line, _Facts)


class _Everywhere:
    """Replays, or records, in the place of each provider that is chosen."""

    def __init__(self, cassette: Cassette) -> None:
        self._cassette = cassette

    def names(self, installed: Sequence[str]) -> Sequence[str]:
        return installed if self._cassette.records else _recorded_names(self._cassette)

    def provider(self, provider: str | object, find: Callable[[], Entry]) -> object:
        return provider if isinstance(provider, Replay) else Replay(self._cassette, provider, find=find)


def recorded_calls(cassette: Cassette) -> Iterator[Interaction]:
    """Yield what was recorded at calls."""
    return (each for each in cassette.interactions if each.request.scheme == _SCHEME)


def _name_of(interaction: Interaction) -> str:
    """Return the name of the provider."""
    return urllib.parse.unquote(interaction.request.parsed_uri.netloc)


def _recorded_names(cassette: Cassette) -> list[str]:
    """Return the names of the recorded providers, in the order of their first calls."""
    return list(dict.fromkeys(map(_name_of, recorded_calls(cassette))))


# --- Connections -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What is known about a connection without asking it."""

    hooks: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    """The settings that only this provider has."""
    address: str | None = None
    default_model: str | None = None
    capabilities: Capabilities | None = None


class _Wire:
    """Sends the requests of hooks through a cassette, and reads what comes back."""

    def __init__(self, name: str, transport: Transport, secrets: Headers) -> None:
        self._origin = f"{_SCHEME}://{urllib.parse.quote(name, safe='')}"
        self._transport = transport
        self._headers = (*_JSON, *secrets)

    async def items(self, hook: str, request: Any, call: Call) -> AsyncGenerator[Any, None]:
        """Yield the answers to a request; raise the error that ended them."""
        kind = _Facts if hook == "connect" else ANSWERS[hook]
        body = b"{}" if hook == "connect" else request_body(request)
        context: dict[str, Any] = {"hook": hook, "request": request}
        url = f"{self._origin}/{hook}"
        asked = Request(method="POST", url=url, headers=self._headers, body=body, context=context)
        response = await self._transport.send(asked, Clock(call))
        try:
            async for line in _lines(response):
                try:
                    item = answer_of(line, kind)
                except GraftageError as error:
                    await response.read()  # It is the last line, and the reader did not stop early.
                    # Of a recording, with the traceback of the provider.
                    raise error from context.get("cause", error.__cause__)
                if _is_last(item):
                    await response.read()  # The reader stops here, and that is no early stop.
                yield item
        finally:
            await response.close()

    async def once(self, hook: str, request: Any, call: Call) -> Any:
        """Return the answer to a request; of several, a tuple."""
        async with aclosing(self.items(hook, request, call)) as items:
            found = tuple([item async for item in items])
        if hook not in MANY and len(found) != 1:
            raise CassetteError(f"A recorded answer of `{hook}` has {len(found)} lines.", hint="Record it again.")
        return found if hook in MANY else found[0]

    async def close(self) -> None:
        """Close the transport."""
        await self._transport.close()


async def _lines(response: Response) -> AsyncIterator[bytes]:
    rest = b""
    while piece := await response.read():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest


def _is_last(item: object) -> bool:
    """Return whether an item of a stream is the last one, as the core reads it."""
    return getattr(item, "finish_reason", None) is not None or getattr(item, "status", None) == "success"


def _secrets(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield the secrets of a connection as headers, which no cassette writes, and whose values it refuses to write."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        secrets = value.items() if isinstance(value, Mapping) else [(name, value)]
        for key, secret in secrets:
            if isinstance(secret, SecretStr):
                yield str(key).lower(), secret.get_secret_value()


class _Connection:
    """A connection of a `Replay`; its hooks are added by `_hook`."""

    def __init__(self, wire: _Wire, live: _Live | None, facts: _Facts) -> None:
        self._wire = wire
        self._live = live
        self._facts = facts
        self.address = facts.address or ""
        self.default_model = facts.default_model
        self.needs_event_loop = live is not None and live.relay.needs_event_loop


def _hook(name: str, *, plain: bool) -> Any:
    """Return a hook for `_Connection`, of the colour of the recorded one: who waits, and where, stays the same."""
    if name == "capabilities":
        return hookimpl(lambda self: self._facts.capabilities)
    if name == "close":
        return hookimpl(_close if plain else _async_close)
    return hookimpl((_stream if name in STREAMS else _once)(name, plain=plain))


def _stream(name: str, *, plain: bool) -> Any:
    def hook(self: _Connection, request: Any) -> Iterator[Any]:
        items: Any = self._wire.items(name, request, request.call)
        try:
            with contextlib.suppress(StopAsyncIteration):
                while True:
                    yield drive(anext(items))
        finally:
            drive(items.aclose())

    async def async_hook(self: _Connection, request: Any) -> AsyncIterator[Any]:
        async with aclosing(self._wire.items(name, request, request.call)) as items:
            async for item in items:
                yield item

    return hook if plain else async_hook


def _once(name: str, *, plain: bool) -> Any:
    def hook(self: _Connection, request: Any) -> Any:
        return drive(self._wire.once(name, request, request.call))

    async def async_hook(self: _Connection, request: Any) -> Any:
        return await self._wire.once(name, request, request.call)

    return hook if plain else async_hook


def _close(self: _Connection, request: CloseRequest) -> None:
    if self._live is not None:
        self._live.relay.hooks["close"].plain(request)
    drive(self._wire.close())


async def _async_close(self: _Connection, request: CloseRequest) -> None:
    if self._live is not None and "close" in self._live.relay.hooks:
        await self._live.relay.hooks["close"].once(request)
    await self._wire.close()


# --- Recording -------------------------------------------------------------------------------------------------------


class _Live:
    """The connection of the recorded provider, as a transport: a request calls its hook."""

    colour: Colour | None = None

    def __init__(self, entry: Entry, connect: Callable[[], object], settings: Settings) -> None:
        self._entry = entry
        self._connect = connect
        self._settings = settings

    @cached_property
    def connection(self) -> object:
        """The connection."""
        return self._connect()

    @cached_property
    def relay(self) -> Relay:
        """Its hooks, checked."""
        return Relay(self._entry.author, self.connection, ())

    async def send(self, request: Request, clock: Clock) -> Response:
        clock.sent()
        context: Any = request.context
        return _Answer(self._items(context["hook"], context["request"]), self._entry.author, context)

    async def close(self) -> None:
        pass

    async def _items(self, name: str, request: Any) -> AsyncGenerator[Any, None]:
        if name == "connect":
            yield self._facts()
            return
        hook, kind = self.relay.hooks[name], ANSWERS[name]
        async with aclosing(_answers(hook, request)) as items:
            async for item in items:
                if not isinstance(item, kind):
                    raise hook.author.fault(f"answered `{name}` with {kind_of(item)} instead of {kind.__name__}")
                yield item
                if _is_last(item):
                    return

    def _facts(self) -> _Facts:
        hooks = self.relay.hooks
        default_model = getattr(self.connection, "default_model", None)
        return _Facts(
            hooks=tuple(sorted(hooks)),
            settings=tuple(sorted(type(self._settings).model_fields.keys() - Settings.model_fields.keys())),
            address=str(getattr(self.connection, "address", "")),
            default_model=default_model,
            capabilities=hooks["capabilities"].plain(None) if "capabilities" in hooks else None,
        )


async def _answers(hook: Hook, request: Any) -> AsyncGenerator[Any, None]:
    """Yield what a hook answers, whatever its colour."""
    if hook.name not in STREAMS:
        answer = await hook.once(request) if hook.is_async else hook.plain(request)
        for item in answer if hook.name in MANY else (answer,):
            yield item
    elif hook.is_async:
        async with aclosing(hook(request)) as items:
            async for item in items:
                yield item
    else:
        with _closing(hook.items(request)) as items:
            for item in items:
                yield item


@contextlib.contextmanager
def _closing(items: Any) -> Iterator[Any]:
    """Close an iterator at the end, if it can be closed."""
    try:
        yield items
    finally:
        if hasattr(items, "close"):
            items.close()


class _Answer:
    """What a hook answers, as a response: a line for each item."""

    status = 200
    reason = "OK"
    headers: Headers = _LINES

    def __init__(self, items: AsyncGenerator[Any, None], author: Author, context: dict[str, Any]) -> None:
        self._items = items
        self._author = author
        self._context = context

    async def read(self) -> bytes:
        try:
            return line_of(await anext(self._items))
        except StopAsyncIteration:
            return b""
        except Exception as error:  # noqa: BLE001 - it is recorded, and raised again by the reader
            self._context["cause"] = error
            return line_of(self._author.typed(error))

    async def close(self) -> None:
        await self._items.aclose()
