"""From what `connect` was asked to a session: choosing providers and models, loading settings and plugins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

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

__all__ = ["ConnectOptions", "Opening"]

AUTO = "auto"
DERIVED = "graftage-"
"""How the names of models begin that were made of an adapter (`hookspecs.LoadAdapter`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectOptions:
    """What `connect` was asked."""

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
    """A provider that was chosen by name, ready to be connected."""

    entry: Entry
    model: str | None
    loaded: Loaded[Settings]

    @property
    def given(self) -> frozenset[str]:
        """The settings that were given to Graftage, and do not come from another tool's variable."""
        others = {f"environment {variable}" for variable in type(self.loaded.settings).native_environment.values()}
        return frozenset(name for name, origin in self.loaded.origins.items() if origin not in others)


class Opening:
    """Reads a options: plugins are found and settings checked at once; what must ask a server waits for `resolve`."""

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
        """The session, or the chain of them."""
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

    def _named(self, provider: Any) -> tuple[Any, str | None]:
        """The provider, by name or as an object, and the model in one item of the options."""
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
        loaded = self._settings_of(entry, Settings, arguments=self._options.overrides, own=settings)
        for variable in loaded.ignored:
            log("WARNING", f"{variable} is ignored: neither `{entry.name}` nor another plugin has such a setting")
        return _Member(entry, model or own_model or self._default_model(), loaded)

    def _default_model(self) -> str | None:
        if self._options.model:
            return self._options.model
        model, origin = self._sources.choice("model")
        if model:
            self.origins["model"] = origin
        return model

    def _loaded_plugins(self) -> list[Entry]:
        """The enabled plugins with their settings; one that cannot say what its settings are is left out."""
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
        with _blaming(entry, "settings_model"):  # Its settings may have validators of its own.
            model = _hook(entry, "settings_model") if "settings_model" in entry.hooks else kind
            if not issubclass(model, kind):
                raise TypeError(f"`{model.__name__}` is no subclass of `{kind.__name__}`")
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
                f"The {member.entry.named} gave no connection: its `connect` returned None.",
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
        """The provider with the highest rank whose server is well."""
        members, wrong = self._ranked()
        for member in members:
            try:
                session = await self._well(member, io)
            except (ProviderError, PluginError) as error:
                if "host" in member.given:
                    raise  # Who names a server means that server.
                wrong = {**wrong, member.entry.name: error}
                continue
            self._note_taken(member, wrong)
            return await self._with_model(session)
        raise self._none_taken(wrong)

    def ranked(self) -> list[str]:
        """The names of the providers that `auto` may take, in the order in which it asks them."""
        members, wrong = self._ranked()
        if not members:
            raise self._none_taken(wrong)
        return [member.entry.name for member in members]

    def _ranked(self) -> tuple[list[_Member], dict[str, GraftageError]]:
        """The providers that say that they may be taken, and what is wrong with those that cannot say."""
        found: list[tuple[int, _Member]] = []
        wrong: dict[str, GraftageError] = {}
        for name in self._catalog.names("provider", enabled=True):
            try:
                member = self._member(name, None)
                rank = _rank(member)
            except PluginError as error:
                wrong[name] = error
            except SettingsError as error:
                if error.source not in GIVEN:
                    raise
                wrong[name] = error  # What the caller asks for is not for this one.
            else:
                if rank is not None:
                    found.append((-rank, member))
        return [member for _, member in sorted(found, key=lambda each: (each[0], each[1].entry.name))], wrong

    async def _well(self, member: _Member, io: IO) -> Session:
        """A session of a provider that answers.

        Raises:
            ProviderError: it does not.
        """
        session = await self._session(member, io)
        try:
            # A check has short limits of its own: a server that hangs must not hold up the choice.
            health = await session.health("api", None, None, None)
            if not health.ok:
                raise session.author.typed(health.error or RuntimeError("it is not well"))
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
        """The session with a model where one can be found. One that was named is not looked for: the call will tell."""
        try:
            session.model = session.model or await _default_model(session)
        except BaseException:
            await _given_back(session)
            raise
        return session

    def _none_taken(self, wrong: Mapping[str, GraftageError]) -> GraftageError:
        if wrong:
            # A provider that was asked says more than one that could not even say whether it may be.
            error = min(wrong.values(), key=lambda each: not isinstance(each, ProviderError))
            if len(wrong) == 1:
                error.hint = f"{error.hint or ''} Or install `graftage-llamacpp`, which needs no server.".strip()
            return error
        names = self._catalog.names("provider", enabled=True)
        if not names:
            hint = "Install `graftage-ollama` or `graftage-llamacpp`."
            return ProviderNotFound("No provider is installed.", plugin=AUTO, hint=hint)
        hint = f"Name one, or the `host` of its server. Installed: {', '.join(f'`{name}`' for name in names)}."
        return ProviderNotFound("No provider on this machine can be taken where none is named.", plugin=AUTO, hint=hint)


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


def _as_mapping(settings: Any) -> Mapping[Any, Any] | None:
    if isinstance(settings, Settings):
        return {name: getattr(settings, name) for name in settings.model_fields_set}
    if not isinstance(settings, (Mapping, str, Path, type(None))):
        raise SettingsError("`settings` must be a mapping, a `Settings`, or the path of a TOML file.", key="settings")
    return settings if isinstance(settings, Mapping) else None


def _with_settings(member: Any) -> tuple[Any, Mapping[str, Any]]:
    """A member of a chain, and the settings that are for it alone."""
    if isinstance(member, tuple) and len(member) == 2 and isinstance(member[1], Mapping):  # A pair
        return member[0], member[1]
    return member, {}


async def _given_back(session: Session) -> None:
    """Close a session that is not to be used; why it is not is more worth telling than what closing it says."""
    with contextlib.suppress(Exception):
        await session.close()


async def _default_model(session: Session) -> str | None:
    """The model that a server's user seems to chat with: one that is loaded, else the newest; None where there is none.

    Never one that was made of an adapter: nobody is answered by somebody else's adapter because he named no model.
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
    """Whether a model can chat, and has no adapter in it; a list may not say, so it is shown."""
    if model.features is None and session.has("show_model"):
        try:
            model = await session.show(model.name, HEALTH_TIMEOUTS)
        except ModelNotFound:
            return False
    return not model.adapters and (model.features is None or "chat" in model.features)


def _age(model: ModelInfo) -> float:
    return model.modified_at.timestamp() if model.modified_at else 0.0


def _hook(entry: Entry, name: str, **arguments: Any) -> Any:
    """Call a hook that is called where its caller is."""
    with _blaming(entry, name):
        return getattr(entry.plugin, name)(**arguments if entry.hooks[name] else {})


@contextlib.contextmanager
def _blaming(entry: Entry, hook: str) -> Iterator[None]:
    """A block whose foreign exceptions are the plugin's fault."""
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
            hint=f"That is a fault of the {entry.kind}; tell its authors.",
        ) from error
