"""Makes the sessions of a client: finds providers and plugins, loads settings, chooses a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol, TypeVar

from graftage._engine.arguments import check_model
from graftage._engine.call import Translate, as_it_is
from graftage._engine.clients import Clients
from graftage._engine.delivery import Delivery
from graftage._engine.events import log
from graftage._engine.fallback import Chain
from graftage._engine.faults import in_words, is_fault
from graftage._engine.plugins import Catalog, Entry
from graftage._engine.session import HEALTH_TIMEOUTS, Session
from graftage._engine.waiting import IO
from graftage._records import dataclass
from graftage.exceptions import (
    GraftageError,
    ModelNotFound,
    PluginError,
    PluginLoadError,
    ProviderError,
    ProviderNotFound,
    SettingsError,
)
from graftage.hookspecs import AnswersRequest, ConnectRequest
from graftage.settings import GIVEN, Loaded, PluginSettings, Settings, Sources, load
from graftage.types import ModelInfo, canonical_name

AnySettings = TypeVar("AnySettings", bound=PluginSettings)

__all__ = ["ConnectOptions", "Opening", "StandIn", "standing_in"]

AUTO = "auto"
DERIVED = "graftage-"
"""How the names of models begin that were made of an adapter (see `hookspecs.LoadAdapter`)."""


class StandIn(Protocol):
    """What a test puts in the place of every provider, whichever the code under test names."""

    def names(self, installed: Sequence[str]) -> Sequence[str]:
        """Return the names of the providers that `auto` may take."""
        ...

    def provider(self, provider: str | object, find: Callable[[], Entry]) -> object:
        """Return the provider to use for the one that was chosen, by name or as an object; `find` loads that one."""
        ...


_stand_ins: Final[list[StandIn]] = []
"""The last one counts. One list for the process, because the code under test may connect in threads of its own."""


@contextlib.contextmanager
def standing_in(stand_in: StandIn) -> Iterator[None]:
    """Put a stand-in in the place of each provider that is chosen meanwhile, in all threads."""
    _stand_ins.append(stand_in)
    try:
        yield
    finally:
        _stand_ins.remove(stand_in)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectOptions:
    """The arguments of `connect`, read."""

    provider: Any
    model: str | None = None
    settings: Any = field(default=None, repr=False)
    plugins: Sequence[object] = ()
    translate: Translate = as_it_is
    env_prefix: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """May hold secrets."""


@dataclass(frozen=True, slots=True)
class _Member:
    """A provider with its model and settings, ready to be connected."""

    entry: Entry
    model: str | None
    loaded: Loaded[Settings]

    @property
    def given(self) -> frozenset[str]:
        """The settings that were given to Graftage and do not come from another tool's variable."""
        others = {f"environment {variable}" for variable in type(self.loaded.settings).native_environment.values()}
        return frozenset(name for name, origin in self.loaded.origins.items() if origin not in others)


class Opening:
    """Finds plugins and checks settings at once; what must ask a server waits for `resolve`."""

    def __init__(self, options: ConnectOptions) -> None:
        self._options = options
        self.origins: dict[str, str] = {}
        self._delivery = Delivery()
        self._read()

    def _read(self) -> None:
        options = self._options
        self._check_names()
        self._sources = Sources.of(
            options.env_prefix, options.settings if isinstance(options.settings, (str, Path)) else None
        )
        self._chained = isinstance(options.provider, (list, tuple))
        wanted = [_with_settings(each) for each in (options.provider if self._chained else [options.provider])]
        objects = [each for each, _ in wanted if not isinstance(each, (str, type(None)))]
        self._catalog = Catalog([*objects, *options.plugins], self._sources.environment, self._sources.prefix)
        self._installed = self._catalog.names()
        self._mapping = _as_mapping(options.settings)
        if not wanted:
            raise ProviderNotFound("The list of providers is empty.", hint="Name at least one.")
        self._several = len(wanted) > 1
        self._names = [self._named(each) for each, _ in wanted]
        self._members = []
        if not self.is_auto:
            self._members = [self._member(*name, own) for name, (_, own) in zip(self._names, wanted, strict=True)]
        for member in self._members:
            self.origins.update(member.loaded.origins)
        self._plugins = self._loaded_plugins()

    @property
    def is_auto(self) -> bool:
        """Whether the provider is still to be chosen, which asks servers."""
        return not self._chained and self._names[0][0] == AUTO

    def _check_names(self) -> None:
        if self._options.model is not None:
            check_model(self._options.model)

    async def resolve(self, io: IO) -> Session | Chain:
        """Connect the providers; return the session, or the chain."""
        return await (self._auto(io) if self.is_auto else self._chosen(io))

    async def _chosen(self, io: IO) -> Session | Chain:
        sessions: list[Session] = []
        try:
            for member in self._members:
                sessions.append(await self._session(member, io))  # noqa: PERF401 - a failure closes those made so far
        except BaseException:
            for session in sessions:
                await _given_back(session)
            raise
        return Chain(sessions) if self._chained else sessions[0]

    def _named(self, provider: object) -> tuple[Any, str | None]:
        """Return the provider, by name or as an object, and the model of one item of `provider`."""
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
        # A provider among the `plugins`, if it is the only one, is there to be used.
        return (given[0] if len(given) == 1 else AUTO), None

    def _member(self, provider: Any, model: str | None, own: Mapping[str, Any] = MappingProxyType({})) -> _Member:
        entry = self._entry(provider)
        settings = dict(own)
        own_model = settings.pop("model", None)
        if own_model is not None:
            check_model(own_model)
        loaded = self._settings_of(entry, Settings, arguments=self._options.overrides, own=settings)
        for variable in loaded.ignored:
            log("WARNING", f"{variable} is ignored: neither `{entry.name}` nor another plugin has such a setting")
        return _Member(entry, model or own_model or self._default_model(), loaded)

    def _entry(self, provider: Any) -> Entry:
        by_name = isinstance(provider, str)
        find = partial(self._catalog.provider if by_name else self._catalog.given_provider, provider)
        return self._catalog.admit(_stand_ins[-1].provider(provider, find)) if _stand_ins else find()

    def _default_model(self) -> str | None:
        if self._options.model:
            return self._options.model
        model, origin = self._sources.choice("model")
        if model:
            self.origins["model"] = origin
        return model

    def _loaded_plugins(self) -> list[Entry]:
        """Return the enabled plugins with their settings; a plugin whose settings cannot be read is left out."""
        plugins = self._catalog.plugins()
        for entry in plugins:
            if "settings_model" in entry.hooks:
                try:
                    with _blaming(entry, "arguments"):
                        arguments = getattr(entry.plugin, "arguments", {})
                    entry.settings = self._settings_of(entry, PluginSettings, arguments=arguments).settings
                except PluginError as error:
                    self._catalog.quarantine(entry, error)
        return [entry for entry in plugins if entry.error is None]

    def _settings_of(self, entry: Entry, kind: type[AnySettings], **given: Any) -> Loaded[AnySettings]:
        with _blaming(entry, "settings_model"):  # Its settings may have validators.
            model = _hook(entry, "settings_model") if "settings_model" in entry.hooks else kind
            if not issubclass(model, kind):
                raise TypeError(f"`{model.__name__}` is not a subclass of `{kind.__name__}`")
            loaded: Loaded[AnySettings] = load(
                model,
                name=entry.name,
                mapping=self._mapping,
                sources=self._sources,
                plugins=self._installed,
                chained=self._several,
                **given,
            )
        return loaded

    async def _session(self, member: _Member, io: IO) -> Session:
        # A provider's `connect` may read files: not on the event loop.
        return await io.run(self._connected, member, io)

    def _connected(self, member: _Member, io: IO) -> Session:
        clients = Clients(member.loaded.settings, io.colour)
        request = ConnectRequest(name=member.entry.name, settings=member.loaded.settings, http=clients.make)
        connection = _hook(member.entry, "connect", request=request)
        if connection is None:
            raise PluginLoadError(
                f"The {member.entry.named} has no connection: its `connect` returned None.",
                plugin=member.entry.name,
                distributions=[member.entry.origin] if member.entry.distribution else (),
                hint="It must return the object that implements `chat`.",
            )
        with _blaming(member.entry, "connect"):  # The connection's attributes may be properties.
            return Session(
                author=member.entry.author,
                model=member.model,
                settings=member.loaded.settings,
                connection=connection,
                plugins=self._plugins,
                io=io,
                clients=clients,
                delivery=self._delivery,
            )

    # --- auto --------------------------------------------------------------------------------------------------------

    async def _auto(self, io: IO) -> Session:
        """Return a session of the provider with the highest rank that answers."""
        members, wrong = self._ranked()
        for member in members:
            try:
                session = await self._well(member, io)
            except (ProviderError, PluginError) as error:
                if "host" in member.given:
                    raise  # A named server is the only one to ask.
                wrong = {**wrong, member.entry.name: error}
                continue
            self._note_taken(member, wrong)
            return await self._with_model(session)
        raise self._none_taken(wrong)

    def ranked(self) -> list[str]:
        """Return the names of the providers that `auto` may take, in the order in which it asks them."""
        members, wrong = self._ranked()
        if not members:
            raise self._none_taken(wrong)
        return [member.entry.name for member in members]

    def _ranked(self) -> tuple[list[_Member], dict[str, GraftageError]]:
        """Return the providers that `auto` may choose, and the errors of those that gave no rank."""
        found: list[tuple[int, _Member]] = []
        wrong: dict[str, GraftageError] = {}
        installed = self._catalog.names("provider", enabled=True)
        for name in _stand_ins[-1].names(installed) if _stand_ins else installed:
            try:
                member = self._member(name, None)
                rank = _rank(member)
            except PluginError as error:
                wrong[name] = error
            except SettingsError as error:
                if error.source not in GIVEN:
                    raise
                wrong[name] = error  # The caller's arguments are for another provider.
            else:
                if rank is not None:
                    found.append((-rank, member))
        return [member for _, member in sorted(found, key=lambda each: (each[0], each[1].entry.name))], wrong

    async def _well(self, member: _Member, io: IO) -> Session:
        """Return a session of a provider that answers.

        Raises:
            ProviderError: it does not answer.
        """
        session = await self._session(member, io)
        try:
            # A check has short limits: a server that hangs must not hold up the choice.
            health = await session.health("api", None, None, None)
            if not health.ok:
                raise session.author.typed(health.error or RuntimeError("it is not healthy"))
        except BaseException:
            await _given_back(session)
            raise
        return session

    def _note_taken(self, member: _Member, wrong: Mapping[str, GraftageError]) -> None:
        why = " ".join(f"`{name}` cannot be taken: {error.message}" for name, error in wrong.items()) or "it answers"
        self.origins.update(member.loaded.origins)
        self.origins["provider"] = f"{AUTO}: {why}"
        log("INFO", f"took the provider `{member.entry.name}`: {why}", provider=member.entry.name)

    async def _with_model(self, session: Session) -> Session:
        """Give the session a default model if it has none. The first call shows whether a named model exists."""
        try:
            session.model = session.model or await _default_model(session)
        except BaseException:
            await _given_back(session)
            raise
        return session

    def _none_taken(self, wrong: Mapping[str, GraftageError]) -> GraftageError:
        if wrong:
            # The error of a server says more than an error of settings.
            error = min(wrong.values(), key=lambda each: not isinstance(each, ProviderError))
            if len(wrong) == 1:
                error.hint = f"{error.hint or ''} Or install `graftage-llamacpp`, which needs no server.".strip()
            return error
        names = self._catalog.names("provider", enabled=True)
        if not names:
            hint = "Install `graftage-ollama` or `graftage-llamacpp`."
            return ProviderNotFound("No provider is installed.", plugin=AUTO, hint=hint)
        hint = f"Name one, or the `host` of its server. Installed: {', '.join(f'`{name}`' for name in names)}."
        return ProviderNotFound("None of the installed providers can be chosen without a name.", plugin=AUTO, hint=hint)


def _rank(member: _Member) -> int | None:
    entry = member.entry
    if "answers" not in entry.hooks:
        return None
    request = AnswersRequest(name=entry.name, settings=member.loaded.settings, given=member.given)
    rank = _hook(entry, "answers", request=request)
    with _blaming(entry, "answers"):
        if rank is not None and not isinstance(rank, int):
            raise TypeError(f"its rank is {type(rank).__name__}")
    return rank


def _as_mapping(settings: object) -> Mapping[Any, Any] | None:
    if isinstance(settings, Settings):
        return {name: getattr(settings, name) for name in settings.model_fields_set}
    if not isinstance(settings, (Mapping, str, Path, type(None))):
        raise SettingsError("`settings` must be a mapping, a `Settings`, or the path of a TOML file.", key="settings")
    return settings if isinstance(settings, Mapping) else None


def _with_settings(member: object) -> tuple[Any, Mapping[str, Any]]:
    """Return a member of a chain, and its own settings."""
    if isinstance(member, tuple) and len(member) == 2 and isinstance(member[1], Mapping):  # A pair
        return member[0], member[1]
    return member, {}


async def _given_back(session: Session) -> None:
    """Close a session that is not used; the error that led here matters more than an error of closing."""
    with contextlib.suppress(Exception):
        await session.close()


async def _default_model(session: Session) -> str | None:
    """Return a model to chat with: one that is loaded, or else the newest; None if there is none.

    Never one that was made of an adapter: a call that names no model must not be answered by an adapter.
    """
    if not session.has("list_models"):
        return None
    listed = sorted(await session.models(HEALTH_TIMEOUTS), key=_age, reverse=True)
    found = {canonical_name(each.name): each for each in listed if not each.name.startswith(DERIVED)}
    loaded = await session.loaded(HEALTH_TIMEOUTS) if session.has("loaded_models") else ()
    for name in dict.fromkeys([*(canonical_name(each.name) for each in loaded), *found]):
        # A model that was deleted may still be in memory.
        if name in found and await _chats(session, found[name]):
            return found[name].name
    return None


async def _chats(session: Session, model: ModelInfo) -> bool:
    """Whether a model can chat and has no adapter in it. A list may not say it; `show` does."""
    if model.features is None and session.has("show_model"):
        try:
            model = await session.show(model.name, HEALTH_TIMEOUTS)
        except ModelNotFound:
            return False
    return not model.adapters and (model.features is None or "chat" in model.features)


def _age(model: ModelInfo) -> float:
    return model.modified_at.timestamp() if model.modified_at else 0.0


def _hook(entry: Entry, name: str, **arguments: Any) -> Any:
    """Call a plain hook, in the caller's thread."""
    with _blaming(entry, name):
        return getattr(entry.plugin, name)(**arguments if entry.hooks[name] else {})


@contextlib.contextmanager
def _blaming(entry: Entry, hook: str) -> Iterator[None]:
    """Turn the foreign exceptions of a block into an error that blames the plugin."""
    try:
        yield
    except GraftageError:
        raise
    except BaseException as error:
        if not is_fault(error):
            raise
        raise PluginLoadError(
            f"The {entry.named} failed in `{hook}` with {in_words(error)}.",
            plugin=entry.name,
            distributions=[entry.origin] if entry.distribution else (),
            hint=f"That is a bug in the {entry.kind}: report it to its authors.",
        ) from error
