"""Makes the sessions of a client: finds providers and plugins, loads settings, chooses a model."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol, TypeVar

from graftage._engine.arguments import check_model
from graftage._engine.call import Translate, as_it_is
from graftage._engine.clients import Clients
from graftage._engine.connection import MODEL_DECIDES
from graftage._engine.delivery import Delivery
from graftage._engine.events import log
from graftage._engine.fallback import Chain, skipped_note
from graftage._engine.faults import in_words, is_fault
from graftage._engine.plugins import Catalog, Entry
from graftage._engine.session import HEALTH_TIMEOUTS, Session
from graftage._engine.waiting import IO
from graftage._records import dataclass
from graftage.exceptions import (
    CapabilityUnsupported,
    GraftageError,
    ModelNotFound,
    PluginError,
    PluginLoadError,
    ProviderError,
    ProviderNotFound,
    SettingsError,
)
from graftage.hookspecs import AnswersRequest, ConnectRequest
from graftage.settings import AUTO, GIVEN, INSTANCES, Instance, Loaded, PluginSettings, Settings, Sources, load
from graftage.types import LoadedModel, ModelInfo, canonical_name

AnySettings = TypeVar("AnySettings", bound=PluginSettings)

__all__ = ["AUTO", "ConnectOptions", "Opening", "StandIn", "standing_in"]

MEASURES = frozenset({"embed", "rerank"})
"""Features of models that need not chat."""
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
    instances: Mapping[str, Any] | None = field(default=None, repr=False)
    """May hold secrets."""
    needs: frozenset[str] = frozenset()
    """The features that the provider and the model must have."""
    overrides: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """May hold secrets."""


@dataclass(frozen=True, slots=True)
class _Member:
    """A provider with its model and settings, ready to be connected."""

    entry: Entry
    model: str | None
    settings: Settings
    origins: Mapping[str, str]
    """Where its model and its settings came from."""
    instance: Instance | None
    own: Mapping[str, Any] = field(repr=False)
    """Its own settings in a chain."""

    @property
    def lacks_key(self) -> bool:
        """Whether its key is still to be read from a keyring or a file."""
        return bool(self.instance and self.instance.api_key_from and self.settings.api_key is None)

    @property
    def given(self) -> frozenset[str]:
        """The settings that were given to Graftage and do not come from another tool's variable.

        The address of an instance is not among them: that it has one is no consent to send prompts there unasked.
        """
        others = {f"environment {variable}" for variable in type(self.settings).native_environment.values()}
        given = frozenset(name for name, origin in self.origins.items() if name != "model" and origin not in others)
        return given - {"host"} if self.instance else given


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
        self._instances = self._read_instances()
        if not wanted:
            raise ProviderNotFound("The list of providers is empty.", hint="Name at least one.")
        self._several = len(wanted) > 1
        self._names = [self._named(each) for each, _ in wanted]
        self._members = []
        if not self.is_auto:
            self._members = [self._member(*name, own) for name, (_, own) in zip(self._names, wanted, strict=True)]
        for member in self._members:
            self.origins.update(member.origins)
        self._plugins = self._loaded_plugins()

    def _read_instances(self) -> Mapping[str, Instance]:
        given = self._options.instances
        if given is None and INSTANCES not in {**(self._mapping or {}), **self._sources.document()}:
            return {}
        from graftage._engine.instances import find  # Most programs have none.

        # A replay needs no provider.
        return find(self._sources, self._catalog, self._mapping, given, installed=not _stand_ins)

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
        left_out: list[str] = []
        try:
            for member in self._members:
                session = await self._session(member, io)
                sessions.append(session)
                try:
                    session.require_features("", self._options.needs)
                except CapabilityUnsupported as error:
                    left_out.append(skipped_note(session.provider, session.model, error))
                    if len(left_out) == len(self._members):
                        error.hint = " ".join(filter(None, (error.hint, *left_out[:-1])))
                        raise
                    await _given_back(sessions.pop())
        except BaseException:
            for session in sessions:
                await _given_back(session)
            raise
        return Chain(sessions, left_out) if self._chained else sessions[0]

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
        instance = self._instances.get(provider) if isinstance(provider, str) else None
        entry = self._entry(provider, instance)
        settings = dict(own)
        own_model = settings.pop("model", None)
        if own_model is not None:
            check_model(own_model)
        loaded = self._settings_of(entry, Settings, arguments=self._options.overrides, own=settings)
        for variable in loaded.ignored:
            log("WARNING", f"{variable} is ignored: neither `{entry.name}` nor another plugin has such a setting")
        chosen, origin = model or own_model or self._options.model, None
        if chosen is None:
            chosen, origin = self._default_model(instance)
        origins = {**loaded.origins, **({"model": origin} if chosen and origin else {})}
        return _Member(entry, chosen, loaded.settings, origins, instance, settings)

    def _entry(self, provider: Any, instance: Instance | None) -> Entry:
        load: Callable[[], Entry] = partial(self._catalog.given_provider, provider)
        if isinstance(provider, str):
            name = instance.provider if instance else provider
            load = partial(self._catalog.provider, name, self._instances)
        entry = self._catalog.admit(_stand_ins[-1].provider(provider, load)) if _stand_ins else load()
        return replace(entry, name=instance.name) if instance else entry

    def _default_model(self, instance: Instance | None) -> tuple[str | None, str]:
        """Return the model of calls if the caller named none, and its origin."""
        if instance is not None and instance.model:
            return instance.model, instance.origins["model"]
        return self._sources.choice("model")

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
                **{"instances": self._instances, **given},
            )
        return loaded

    async def _session(self, member: _Member, io: IO) -> Session:
        # The key of an instance may be in a keyring, which asks its user, and a provider's `connect` may read files:
        # not on the event loop.
        return await io.run(lambda: self._connected(self._with_key(member), io))

    def _with_key(self, member: _Member) -> _Member:
        """Return a member with the key that its instance keeps in a keyring or a file."""
        instance = member.instance
        if instance is None or instance.api_key_from is None or not member.lacks_key:
            return member
        from graftage._keys import read  # Few instances need it.

        key = read(instance.name, instance.api_key_from, prefix=self._sources.prefix)
        table = (instance.api_key_from, {"api_key": key})
        with_key = replace(instance, given=(table, *instance.given))
        loaded = self._settings_of(
            member.entry,
            Settings,
            arguments=self._options.overrides,
            own=member.own,
            instances={**self._instances, instance.name: with_key},
        )
        self.origins["api_key"] = instance.api_key_from
        return replace(member, settings=loaded.settings)

    def _connected(self, member: _Member, io: IO) -> Session:
        clients = Clients(member.settings, io.colour)
        request = ConnectRequest(name=member.entry.name, settings=member.settings, http=clients.make)
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
                plugin=member.instance.provider if member.instance else member.entry.name,
                needs=self._options.needs,
                adapter=member.instance.adapter if member.instance else None,
                model=member.model,
                settings=member.settings,
                connection=connection,
                plugins=self._plugins,
                io=io,
                clients=clients,
                delivery=self._delivery,
            )

    # --- auto --------------------------------------------------------------------------------------------------------

    async def _auto(self, io: IO) -> Session:
        """Return a session of the provider with the highest rank that answers, and can do what is needed."""
        members, wrong = self._ranked()
        for member in members:
            try:
                session = await self._well(member, io)
                if session is None:
                    continue
                await self._choose_model(session)
            except (ProviderError, PluginError) as error:
                if "host" in member.given:
                    raise  # A named server is the only one to ask.
                wrong = {**wrong, member.entry.name: error}
                continue
            self._note_taken(member, wrong)
            return session
        raise self._none_taken(wrong)

    def ranked(self) -> list[str]:
        """Return the names of the providers that `auto` may take, in the order in which it asks them."""
        members, wrong = self._ranked()
        if not members:
            raise self._none_taken(wrong)
        return [member.entry.name for member in members]

    def _ranked(self) -> tuple[list[_Member], dict[str, GraftageError]]:
        """Return the providers that `auto` may choose, and the errors of those that gave no rank."""
        found: list[_Member] = []
        ranks: dict[str, int] = {}
        wrong: dict[str, GraftageError] = {}
        names = self._catalog.names("provider", enabled=True)
        if not self._names_server():
            names = [*names, *self._instances]
        for name in _stand_ins[-1].names(names) if _stand_ins else names:
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
                    found.append(member)
                    ranks[name] = rank
        # At the same rank, what the user has set up comes first.
        order = sorted(found, key=lambda each: (-ranks[each.entry.name], each.instance is None, each.entry.name))
        return order, wrong

    def _names_server(self) -> bool:
        """Whether an address or a secret is given for the provider that is taken: an instance has its own."""
        given = {**(self._mapping or {}), **self._options.overrides}
        return bool(given.keys() & {"host", "api_key", "headers"} or self._sources.choice("host")[0])

    async def _well(self, member: _Member, io: IO) -> Session | None:
        """Return a session of a provider that answers; None for an instance that is not on this machine.

        Raises:
            ProviderError: it does not answer.
        """
        session = await io.run(self._connected, member, io)
        if member.instance and not _stays_here(session.address):
            await _given_back(session)
            return None
        if member.lacks_key:  # Only now: no keyring is asked for an instance that is not taken.
            await _given_back(session)
            session = await self._session(member, io)
        try:
            session.require_features("", self._options.needs)
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
        self.origins.update(member.origins)
        self.origins["provider"] = f"{AUTO}: {why}"
        log("INFO", f"took the provider `{member.entry.name}`: {why}", provider=member.entry.name)

    async def _choose_model(self, session: Session) -> None:
        """Give the session a default model if it has none. The first call shows whether a named model exists.

        Raises:
            CapabilityUnsupported: the named model, or every model, lacks a feature that is needed.
        """
        try:
            if session.model is None:
                session.model = await _default_model(session)
            elif session.needs and session.has("show_model"):
                with contextlib.suppress(ModelNotFound, CapabilityUnsupported):
                    await session.show(session.model, HEALTH_TIMEOUTS)
                session.require_features(session.model, session.needs)
        except BaseException:
            await _given_back(session)
            raise

    def _none_taken(self, wrong: Mapping[str, GraftageError]) -> GraftageError:
        if wrong:
            # The error of a server says more than an error of settings, and what answers but lacks a feature says most.
            kinds = (CapabilityUnsupported, ProviderError, GraftageError)
            error = min(wrong.values(), key=lambda each: [not isinstance(each, kind) for kind in kinds])
            if len(wrong) == 1 and not isinstance(error, CapabilityUnsupported):
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
    request = AnswersRequest(name=entry.name, settings=member.settings, given=member.given)
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
    """Return a model that can do what is needed: one that is loaded, or else the newest; None if there is none.

    Never one that was made of an adapter: a call that names no model must not be answered by an adapter.

    Raises:
        CapabilityUnsupported: there is none, and features are needed.
    """
    needs = session.needs
    wanted = needs if needs and needs <= MEASURES else (needs & MODEL_DECIDES) | {"chat"}
    if not session.has("list_models"):
        return None
    listed: Sequence[ModelInfo] = ()
    loaded: Sequence[LoadedModel] = ()
    with contextlib.suppress(CapabilityUnsupported):  # A provider may have servers that cannot say it.
        listed = sorted(await session.models(HEALTH_TIMEOUTS), key=_age, reverse=True)
        loaded = await session.loaded(HEALTH_TIMEOUTS) if session.has("loaded_models") else ()
    found = {canonical_name(each.name): each for each in listed if not each.name.startswith(DERIVED)}
    for name in dict.fromkeys([*(canonical_name(each.name) for each in loaded), *found]):
        # A model that was deleted may still be in memory.
        if name in found and await _fits(session, found[name], wanted):
            return found[name].name
    if needs:
        able = ", ".join(f"`{each}`" for each in sorted(wanted))
        raise CapabilityUnsupported(
            f"The provider `{session.provider}` has no model with {able} to choose.",
            provider=session.provider,
            hint="Name a model, get one, or choose another provider.",
        )
    return None


async def _fits(session: Session, model: ModelInfo, wanted: frozenset[str]) -> bool:
    """Whether a model has features, and no adapter in it. A list may not say it; `show` does."""
    if model.features is None and session.has("show_model"):
        try:
            with contextlib.suppress(CapabilityUnsupported):
                model = await session.show(model.name, HEALTH_TIMEOUTS)
        except ModelNotFound:
            return False
    return not model.adapters and (model.features is None or wanted <= model.features)


def _stays_here(address: str) -> bool:
    """Whether a connection stays on this machine; without a URL it may be a word, such as `embedded`."""
    from graftage.http.address import is_local  # Needed only for an instance under `auto`.

    return is_local(address if "://" in address else f"//{address}") or bool(re.fullmatch(r"[\w/-]*", address))


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
