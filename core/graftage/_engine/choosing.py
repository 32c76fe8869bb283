"""From what `connect` was asked to a session: choosing providers and models, loading settings and plugins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from graftage._arguments import check_model
from graftage._chain import Chain, passes_on
from graftage._events import log
from graftage._io import IO
from graftage._plugins import Catalog, Entry
from graftage._session import HEALTH_TIMEOUTS, Session
from graftage._stream import Translate, as_it_is, is_fault, telling, typed_error
from graftage.exceptions import (
    GraftageError,
    ModelNotFound,
    PluginError,
    PluginLoadError,
    ProviderError,
    ProviderNotFound,
    RequestRejected,
    SettingsError,
)
from graftage.settings import Loaded, Settings, Sources, load
from graftage.types import ConnectRequest, ModelInfo

__all__ = ["Opening", "Wish"]

AUTO = "auto"
SERVER, EMBEDDED = "ollama", "llamacpp"
"""What `auto` looks for, in this order."""
DERIVED = "graftage-"
"""How the names of models begin that were made of an adapter (`hookspecs.LoadAdapter`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What `connect` was asked."""

    provider: Any
    model: str | None = None
    models: Sequence[str] = ()
    settings: Any = field(default=None, repr=False)
    plugins: Sequence[object] = ()
    translate: Translate = as_it_is
    env_prefix: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """May hold secrets."""


@dataclass(frozen=True, slots=True)
class _Member:
    """A provider that was chosen by name, ready to be connected."""

    entry: Entry
    model: str | None
    loaded: Loaded


class Opening:
    """Reads a wish: plugins are found and settings checked at once; what must ask a server waits for `resolve`."""

    def __init__(self, wish: Wish) -> None:
        self._wish = wish
        self.origins: dict[str, str] = {}
        with telling(wish.translate):
            self._read()

    def _read(self) -> None:
        wish = self._wish
        self._check_names()
        self._sources = Sources.of(wish.env_prefix, wish.settings if isinstance(wish.settings, (str, Path)) else None)
        self._chained = isinstance(wish.provider, (list, tuple))
        wanted = [_with_settings(each) for each in (wish.provider if self._chained else [wish.provider])]
        objects = [each for each, _ in wanted if not isinstance(each, (str, type(None)))]
        self._catalog = Catalog([*objects, *wish.plugins])
        if not wanted:
            raise ProviderNotFound("The list of providers is empty.", hint="Name at least one.")
        self._several = len(wanted) > 1
        self._names = [self._named(each) for each, _ in wanted]
        self._members = []
        if not self.is_auto:
            self._members = [self._member(*name, own) for name, (_, own) in zip(self._names, wanted, strict=True)]
        self._plugins = self._catalog.plugins()

    @property
    def is_auto(self) -> bool:
        """Whether the provider is still to be chosen."""
        return not self._chained and self._names[0][0] == AUTO

    @property
    def must_ask(self) -> bool:
        """Whether a server must be asked before the first call."""
        return self.is_auto or bool(self._wish.models)

    def _check_names(self) -> None:
        for model in (self._wish.model, *self._wish.models):
            if model is not None:
                check_model(model)
        if None in self._wish.models:
            raise RequestRejected("One of the `models` is None.", hint="Name each model.")

    async def resolve(self, io: IO) -> Session | Chain:
        """The session, or the chain of them."""
        with telling(self._wish.translate):
            found = await (self._auto(io) if self.is_auto else self._chosen(io))
        found.translate = self._wish.translate
        return found

    async def _chosen(self, io: IO) -> Session | Chain:
        sessions: list[Session] = []
        try:
            for member in self._members:
                sessions.append(await self._session(member, io))
                await self._preferring(sessions[-1])
        except BaseException:
            for session in sessions:
                await _given_back(session)
            raise
        return Chain(sessions) if self._chained else sessions[0]

    def _named(self, provider: Any) -> tuple[Any, str | None]:
        """The provider, by name or as an object, and the model in one item of the wish."""
        if isinstance(provider, str):
            name, _, model = provider.partition(":")
            return name, model or None
        if provider is not None:
            return provider, None
        chosen, origin = self._sources.choice("provider")
        if chosen:
            self.origins["provider"] = origin
            return self._named(chosen)
        given = [each.plugin for each in self._catalog.entries if each.kind == "provider" and each.entry_point is None]
        # The one provider that was handed over as an object was surely handed over to be used.
        return (given[0] if len(given) == 1 else AUTO), None

    def _member(self, provider: Any, model: str | None, own: Mapping[str, Any] = MappingProxyType({})) -> _Member:
        by_name = isinstance(provider, str)
        entry = self._catalog.provider(provider) if by_name else self._catalog.given_provider(provider)
        settings = dict(own)
        own_model = settings.pop("model", None)
        if own_model is not None:
            check_model(own_model)
        return _Member(entry, model or own_model or self._default_model(), self._settings_of(entry, settings))

    def _default_model(self) -> str | None:
        if self._wish.model or self._wish.models:
            return self._wish.model
        model, origin = self._sources.choice("model")
        if model:
            self.origins["model"] = origin
        return model

    def _settings_of(self, entry: Entry, own: Mapping[str, Any]) -> Loaded:
        mapping = self._wish.settings
        if isinstance(mapping, Settings):
            mapping = {name: getattr(mapping, name) for name in mapping.model_fields_set}
        if not isinstance(mapping, (Mapping, str, Path, type(None))):
            raise SettingsError(
                "`settings` must be a mapping, a `Settings`, or the path of a TOML file.", key="settings"
            )
        with _blaming(entry, "settings_model"):  # A provider's own settings may have validators of its own.
            loaded = load(
                _hook(entry, "settings_model") if "settings_model" in entry.hooks else Settings,
                provider=entry.name,
                arguments=self._wish.overrides,
                own=own,
                mapping=mapping if isinstance(mapping, Mapping) else None,
                sources=self._sources,
                plugins=self._catalog.names(),
                chained=self._several,
            )
        self.origins.update(loaded.origins)
        return loaded

    async def _session(self, member: _Member, io: IO) -> Session:
        # A provider's `connect` may read files: not on the event loop.
        return await io.run(self._connected, member, io)

    def _connected(self, member: _Member, io: IO) -> Session:
        request = ConnectRequest(name=member.entry.name, settings=member.loaded.settings)
        connection = _hook(member.entry, "connect", request=request)
        if connection is None:
            raise PluginLoadError(
                f"The provider `{member.entry.name}` gave no connection: its `connect` returned None.",
                plugin=member.entry.name,
                distributions=[member.entry.origin] if member.entry.distribution else (),
                hint="It must return the object that implements `chat` and `health`.",
            )
        with _blaming(member.entry, "connect"):  # The connection's attributes may be properties.
            return Session(
                provider=member.entry.name,
                model=member.model,
                settings=member.loaded.settings,
                connection=connection,
                plugins=self._plugins,
                io=io,
                origin=member.entry.origin,
            )

    async def _preferring(self, session: Session) -> Session:
        """The session with the first of the wished models that is there."""
        wished = self._wish.models
        if not wished:
            return session
        for model in wished:
            try:
                session.model = (await session.show(model, HEALTH_TIMEOUTS)).name
            except ModelNotFound:
                continue
            except ProviderError as error:
                if not (self._chained and passes_on(error)):
                    raise
                session.model = model  # It is skipped as long as it is down, and asked for this when it is back.
            return session
        if self._chained:
            session.model = wished[0]
            return session
        raise ModelNotFound(
            f"The provider `{session.provider}` has none of {', '.join(f'`{each}`' for each in wished)}.",
            provider=session.provider,
            hint=f"Pull one: `graftage models pull {wished[0]}`.",
        )

    # --- auto --------------------------------------------------------------------------------------------------------

    async def _auto(self, io: IO) -> Session:
        """Ollama where it answers with the wanted model, else the embedded provider."""
        failed: GraftageError | None = None
        if self._may_use(SERVER):
            try:
                return self._taken(await self._server(io), "its server answers")
            except (ProviderError, PluginError) as error:
                failed = error
        if self._may_use(EMBEDDED):
            self.origins.clear()  # What was read for the server is in effect no more.
            why = (
                f"`{SERVER}` cannot be taken: {failed.message}"
                if failed
                else f"`{SERVER}` is not installed, or is disabled"
            )
            return self._taken(await self._opened(EMBEDDED, io), why)
        if failed is not None:
            failed.hint = f"{failed.hint or ''} Or install `graftage-llamacpp`, which needs no server.".strip()
            raise failed
        raise ProviderNotFound(
            "No provider is installed.", plugin=AUTO, hint="Install `graftage-ollama` or `graftage-llamacpp`."
        )

    def _may_use(self, name: str) -> bool:
        named = (each for each in self._catalog.entries if (each.kind, each.name) == ("provider", name))
        return any(each.state != "disabled" for each in named)

    def _taken(self, session: Session, why: str) -> Session:
        self.origins["provider"] = f"{AUTO}: {why}"
        log("INFO", f"took the provider `{session.provider}`: {why}", provider=session.provider)
        return session

    async def _opened(self, name: str, io: IO) -> Session:
        session = await self._session(self._member(name, None), io)
        try:
            return await self._preferring(session)
        except BaseException:
            await _given_back(session)
            raise

    async def _server(self, io: IO) -> Session:
        """A session of the server, with a model where one was found.

        Raises:
            ProviderError: it does not answer, or lacks the wanted model.
        """
        session = await self._session(self._member(SERVER, None), io)
        try:
            # A check has short limits of its own: a server that hangs must not hold up the choice.
            health = await session.health("model_present" if session.model else "api", session.model, None, None)
            if not health.ok:
                raise typed_error(health.error or RuntimeError("it is not well"), session.provider)
            await self._preferring(session)
            session.model = session.model or await _used_model(session)
        except BaseException:
            await _given_back(session)
            raise
        return session


def _with_settings(member: Any) -> tuple[Any, Mapping[str, Any]]:
    """A member of a chain, and the settings that are for it alone."""
    if isinstance(member, tuple) and len(member) == 2 and isinstance(member[1], Mapping):  # noqa: PLR2004 - a pair
        return member[0], member[1]
    return member, {}


async def _given_back(session: Session) -> None:
    """Close a session that is not to be used; why it is not is more worth telling than what closing it says."""
    with contextlib.suppress(Exception):
        await session.close()


async def _used_model(session: Session) -> str:
    """The model that a server's user seems to work with: one that is loaded, else the newest.

    Never one that was made of an adapter: nobody is answered by somebody else's adapter because he named no model.
    """
    in_memory = await session.loaded(HEALTH_TIMEOUTS)
    found = {each.name: each for each in await session.models(HEALTH_TIMEOUTS) if not each.name.startswith(DERIVED)}
    if not found:
        raise ModelNotFound(
            "The server has no model.", provider=session.provider, hint="Pull one: `graftage models pull llama3.2`."
        )
    for loaded in in_memory:
        if loaded.name in found:  # A model that was deleted may still be in memory.
            return loaded.name
    return max(found.values(), key=_age).name


def _age(model: ModelInfo) -> float:
    return model.modified_at.timestamp() if model.modified_at else 0.0


def _hook(entry: Entry, name: str, **arguments: Any) -> Any:
    """Call a hook of a provider plugin."""
    with _blaming(entry, name):
        return getattr(entry.plugin, name)(**arguments)


@contextlib.contextmanager
def _blaming(entry: Entry, hook: str) -> Iterator[None]:
    """A block whose foreign exceptions are a provider's fault."""
    try:
        yield
    except GraftageError:
        raise
    except BaseException as error:
        if not is_fault(error):
            raise
        raise PluginLoadError(
            f"The provider `{entry.name}` failed in `{hook}` with {type(error).__name__}: {error}.",
            plugin=entry.name,
            distributions=[entry.origin] if entry.distribution else (),
            hint="That is a fault of the provider; tell its authors.",
        ) from error
