"""Find plugins without an import, load the chosen ones, explain the rest, and look up the hooks of a connection."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from graftage._engine.checking import HookProblem, Kind, check_attributes, check_hooks, contract_of, is_async
from graftage._engine.faults import Author, Contained, in_words, is_fault, kind_of
from graftage._records import dataclass
from graftage._values import EntryPoint, close, entry_points, identity
from graftage._version import __version__
from graftage.exceptions import PluginConflict, PluginError, PluginLoadError, ProviderNotFound

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from graftage.settings import PluginSettings

__all__ = ["Catalog", "Entry", "PluginWarning", "Relay", "check_core"]

State = Literal["available", "loaded", "disabled", "quarantined"]
REINSTALL = "Reinstall it."
GROUPS: dict[str, Kind] = {"graftage.providers": "provider", "graftage.plugins": "plugin"}


class PluginWarning(UserWarning):
    """A plugin is left out; `graftage plugins` shows why."""


@dataclass(slots=True, kw_only=True)
class Entry:
    """A plugin as it was found, and its state."""

    name: str
    kind: Kind
    distribution: str | None = None
    version: str | None = None
    state: State = "available"
    error: PluginError | None = None
    """Why it is quarantined."""
    plugin: object | None = None
    hooks: Mapping[str, bool] = field(default_factory=dict)
    """Its hooks, and whether each takes its argument."""
    entry_point: EntryPoint | None = field(default=None, repr=False)
    settings: PluginSettings | None = None
    """The settings of a plugin, if it has any; those of a provider are the connection's."""

    @property
    def contract(self) -> int | None:
        """The number of the contract that it was written for; None if it is not loaded."""
        return None if self.plugin is None else contract_of(self.plugin)

    @property
    def origin(self) -> str:
        """The distribution and its version, in words."""
        if self.entry_point is None:
            return "an object given to connect"
        dist = self.entry_point.dist
        if self.distribution is None or dist is None:
            return f"a distribution without a name in {dist.locate_file('')}" if dist else "an unknown distribution"
        return f"{self.distribution} {self.version or 'without a version'}"

    @property
    def distributions(self) -> tuple[str, ...]:
        """Its distribution, if it has one, as errors have it."""
        return (self.origin,) if self.distribution else ()

    @property
    def author(self) -> Author:
        """Its author, for messages."""
        return Author(self.name, self.origin if self.entry_point else "")

    @property
    def label(self) -> str:
        """Its name and its distribution, if it has one."""
        return f"`{self.name}`{f' ({self.origin})' if self.entry_point else ''}"

    @property
    def named(self) -> str:
        """Its kind, its name and its distribution, if it has one."""
        return f"{self.kind} {self.label}"


class Catalog:
    """The plugins that are installed, and those that were given as objects.

    Args:
        objects: plugin objects to use without installing them; they replace installed plugins of the same name.
        environment: where `GRAFTAGE_DISABLED_PLUGINS` and `GRAFTAGE_STRICT_PLUGINS` are read.
        prefix: what the names of these begin with, instead of `GRAFTAGE`.
    """

    def __init__(
        self,
        objects: Iterable[object] = (),
        environment: Mapping[str, str] = os.environ,
        prefix: str = "GRAFTAGE",
    ) -> None:
        self.strict = environment.get(f"{prefix}_STRICT_PLUGINS", "") not in ("", "0")
        self._prefix = prefix
        disabled = environment.get(f"{prefix}_DISABLED_PLUGINS", "")
        self._disabled = {name.strip() for name in disabled.split(",") if name.strip()}
        self._given = [self.admit(each) for each in {id(each): each for each in objects}.values()]
        taken = {(entry.kind, entry.name) for entry in self._given}
        found = [each for each in self._discover() if (each.kind, each.name) not in taken]
        # Damaged ones come last, so that another one of the same name is found first.
        self.entries = [*self._given, *sorted(found, key=lambda each: each.state == "quarantined")]
        self._mark_conflicts()
        for entry in self._given:
            if entry.error is not None:
                raise entry.error  # Its caller gave it, and must know at once.

    def names(self, kind: Kind | None = None, *, enabled: bool = False) -> list[str]:
        """Return the names of what was found.

        Args:
            kind: only those of this kind.
            enabled: only those that are not disabled.
        """
        found = (entry for entry in self.entries if kind in (None, entry.kind))
        return sorted({entry.name for entry in found if not enabled or entry.state != "disabled"})

    def provider(self, name: str, others: Iterable[str] = ()) -> Entry:
        """Return the provider of that name, loaded.

        Args:
            name: its name.
            others: names that are known, too, for the hint if this one is not.

        Raises:
            ProviderNotFound: it is not installed, or disabled.
            PluginConflict: two distributions claim the name.
            PluginLoadError: it is broken.
        """
        entry = next((each for each in self.entries if (each.kind, each.name) == ("provider", name)), None)
        if entry is None:
            raise self._not_found(name, others)
        if entry.state == "disabled":
            raise ProviderNotFound(
                f"The provider `{name}` is disabled.",
                plugin=name,
                hint=f"Remove it from {self._prefix}_DISABLED_PLUGINS.",
            )
        self._load(entry)
        if entry.error is not None:
            raise entry.error
        return entry

    def given_provider(self, plugin: object) -> Entry:
        """Return the entry of a provider object that was given to `connect`.

        Raises:
            ProviderNotFound: the object is not a provider.
        """
        entry = next(entry for entry in self._given if entry.plugin is plugin)
        if entry.kind != "provider":
            raise ProviderNotFound(
                f"The object `{entry.name}` is not a provider.",
                plugin=entry.name,
                hint="A provider implements `connect`.",
            )
        return entry

    def plugins(self) -> list[Entry]:
        """Return every enabled plugin that works, loaded; quarantine the others, with a warning.

        Raises:
            PluginError: a plugin is broken and `GRAFTAGE_STRICT_PLUGINS` is set.
        """
        chosen = [entry for entry in self.entries if entry.kind == "plugin" and entry.state != "disabled"]
        for entry in chosen:
            self._load(entry)
            if entry.error is not None:
                self._leave_out(entry, entry.error)
        return [entry for entry in chosen if entry.state == "loaded"]

    def quarantine(self, entry: Entry, error: PluginError) -> None:
        """Leave out a plugin that proved to be broken after it was loaded.

        Raises:
            PluginError: `GRAFTAGE_STRICT_PLUGINS` is set.
        """
        self._quarantine(entry, error)
        self._leave_out(entry, error)

    def _leave_out(self, entry: Entry, error: PluginError) -> None:
        if self.strict:
            raise error
        warnings.warn(f"The plugin `{entry.name}` is left out: {error}", PluginWarning, stacklevel=2)

    def inspect_all(self) -> list[Entry]:
        """Return every entry, loaded if possible, for a report."""
        for entry in self.entries:
            if entry.state != "disabled":
                self._load(entry)
        return sorted(self.entries, key=lambda entry: (entry.kind != "provider", entry.name, entry.origin))

    def _discover(self) -> list[Entry]:
        return [self._found(GROUPS[point.group], point) for point in entry_points(*GROUPS)]

    def _found(self, kind: Kind, point: EntryPoint) -> Entry:
        name, version = identity(point.dist)
        state: State = "disabled" if point.name in self._disabled else "available"
        entry = Entry(name=point.name, kind=kind, distribution=name, version=version, state=state, entry_point=point)
        if state == "available" and (damage := _damage(entry)):
            self._quarantine(entry, _load_error(entry, damage, REINSTALL))
        return entry

    def admit(self, plugin: object) -> Entry:
        """Return the entry of an object, checked; its `error` is set if it is broken."""
        kind: Kind = "provider" if is_provider(plugin) else "plugin"
        entry = Entry(name=plugin_name(plugin), kind=kind, plugin=plugin)
        self._inspect(entry)
        return entry

    def _mark_conflicts(self) -> None:
        claims: dict[tuple[Kind, str], list[Entry]] = {}
        for entry in self.entries:
            # Provider objects are distinguished by identity: a chain may have two of one class.
            if entry.state in ("available", "loaded") and (entry.kind != "provider" or entry.entry_point):
                claims.setdefault((entry.kind, entry.name), []).append(entry)
        for rivals in claims.values():
            for entry in rivals if len(rivals) > 1 else ():
                entry.state = "quarantined"
                claimants = " and ".join(each.origin for each in rivals)
                entry.error = PluginConflict(
                    f"The {entry.kind} name `{entry.name}` is claimed by {claimants}.",
                    plugin=entry.name,
                    distributions=[each.origin for each in rivals],
                    hint="Uninstall one of them." if entry.entry_point else "Give each object a different `name`.",
                )

    def _load(self, entry: Entry) -> None:
        if entry.state != "available" or entry.entry_point is None:
            return
        try:
            check_core(entry)
        except PluginLoadError as error:
            self._quarantine(entry, error)
            return
        try:
            entry.plugin = entry.entry_point.load()
        except BaseException as error:
            if not is_fault(error):
                raise
            problem = f"could not be imported: {in_words(error)}"
            self._quarantine(entry, _load_error(entry, problem, "Fix or uninstall it."), error)
            return
        self._inspect(entry)

    def _inspect(self, entry: Entry) -> None:
        try:
            entry.hooks = check_hooks(entry.plugin, entry.kind)
            if entry.kind == "provider" and "connect" not in entry.hooks:
                raise HookProblem("lacks the hook `connect`", "Mark its `connect` with `graftage.hookspecs.hookimpl`.")
        except HookProblem as problem:
            self._quarantine(entry, _load_error(entry, problem.text, problem.hint), problem.__cause__)
            return
        entry.state = "loaded"

    def _quarantine(self, entry: Entry, error: PluginError, cause: BaseException | None = None) -> None:
        error.__cause__ = cause or error.__cause__
        entry.state, entry.error, entry.plugin = "quarantined", error, None

    def _not_found(self, name: str, others: Iterable[str]) -> ProviderNotFound:
        names = self.names("provider")
        near = close(name, [*names, *others])
        installed = f"Installed: {', '.join(f'`{each}`' for each in names)}." if names else "None is installed."
        hint = f"Did you mean `{near[0]}`?" if near else f"{installed} Install one, for example `graftage-ollama`."
        return ProviderNotFound(f"There is no provider `{name}`.", plugin=name, hint=hint)


def plugin_name(plugin: object) -> str:
    """Return the name of a plugin object: its `name`, a module's last part, or its class's name in lower case."""
    named = getattr(plugin, "name", None)
    if isinstance(named, str):
        return named
    if inspect.ismodule(plugin):
        return plugin.__name__.rpartition(".")[2]
    return (plugin if inspect.isclass(plugin) else type(plugin)).__name__.lower()


def is_provider(plugin: object) -> bool:
    """Return whether an object is a provider: it implements `connect`."""
    return bool(getattr(getattr(plugin, "connect", None), "graftage_impl", None))


def _load_error(entry: Entry, problem: str, hint: str) -> PluginLoadError:
    return PluginLoadError(
        f"The {entry.kind} `{entry.name}` ({entry.origin}) {problem}.",
        plugin=entry.name,
        distributions=entry.distributions,
        hint=hint,
    )


def _damage(entry: Entry) -> str | None:
    """Return what is wrong with the metadata of a distribution, if anything is."""
    unnamed = None if entry.distribution and entry.version else "has metadata without a name or a version"
    return (entry.entry_point.damage if entry.entry_point else None) or unnamed


def check_core(entry: Entry) -> None:
    """Refuse a plugin whose metadata requires another Graftage: pip leaves such pairs installed."""
    if entry.entry_point is None or entry.entry_point.dist is None:
        return
    if damage := _damage(entry):
        raise _load_error(entry, damage, REINSTALL)
    try:
        unfit = _unfit(entry.entry_point.dist)
    except Exception as error:  # a damaged file may raise any error
        raise _load_error(entry, f"has broken metadata: {in_words(error)}", REINSTALL) from error
    if unfit is not None:
        hint = "Install versions that fit each other."
        raise _load_error(entry, f"requires graftage{unfit}, and this is {__version__}", hint)


@functools.lru_cache(maxsize=4096)
def _unfit(dist: Any) -> str | None:
    """Return the versions of Graftage that a distribution requires, if this is not one of them."""
    for text in dist.requires or ():
        name = re.match(r"\s*([\w.-]*)", text)
        if not name or re.sub(r"[-_.]+", "-", name[1]).lower() != "graftage" or _is_within(text):
            continue
        # Slow to import, and simple bounds do not need its parser.
        from packaging import requirements

        with contextlib.suppress(requirements.InvalidRequirement):
            wanted = requirements.Requirement(text)
            if not _fits(wanted):
                return str(wanted.specifier)
    return None


_BOUND = re.compile(r"(>=|<)(\d+(?:\.\d+)*)")
_BOUNDED = re.compile(rf"graftage(?:\[[\w,-]*\])?(?:{_BOUND.pattern}(?:,|$))*")


def _is_within(text: str) -> bool:
    """Return whether a requirement has only bounds, as `graftage>=0.2,<1`, and this release is surely within them.

    Then it does not matter whether the requirement applies.
    """
    text = text.partition(";")[0].strip()
    if not (_BOUNDED.fullmatch(text) and re.fullmatch(r"[\d.]+", __version__)):
        return False
    ours = _release(__version__)
    return all(
        ours >= _release(version) if bound == ">=" else ours < _release(version)
        for bound, version in _BOUND.findall(text)
    )


def _release(version: str) -> list[int]:
    """Return the numbers of a release without zeros at its end: 1.0 and 1 are one."""
    return [int(each) for each in re.sub(r"(\.0+)+$", "", version).split(".")]


def _fits(wanted: Requirement) -> bool:
    applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
    return not applies or wanted.specifier.contains(__version__, prereleases=True)


@dataclass(frozen=True, slots=True)
class Hook:
    """A hook of a connection, looked up once."""

    name: str
    function: Callable[[Any], Any]
    is_async: bool
    needs_event_loop: bool
    author: Author
    contained: Contained
    """A block of the provider's code."""

    def __call__(self, request: object) -> Any:
        """Call the hook. An async one returns what must be awaited or iterated over."""
        return self.function(request)

    async def once(self, request: object) -> Any:
        """Return the result of an async hook that returns once."""
        with self.contained:
            return await self.function(request)

    def plain(self, request: object) -> Any:
        """Return the result of a plain hook.

        Raises:
            ProviderError: it returned something that must be awaited.
        """
        with self.contained:
            result = self.function(request)
        if inspect.isawaitable(result) or hasattr(result, "__aiter__"):
            if inspect.iscoroutine(result):
                result.close()
            raise self.author.fault(
                f"has an invalid hook: `{self.name}` is a `def` that returned {kind_of(result)}",
                "Its authors must make it an `async def`.",
            )
        return result

    def items(self, request: object) -> Any:
        """Return what a plain hook gives one by one.

        Raises:
            ProviderError: it returned something else.
        """
        found = self.plain(request)
        if not hasattr(found, "__iter__"):
            raise self.author.fault(
                f"has an invalid hook: `{self.name}` returned {kind_of(found)} instead of an iterator",
                "Its authors must `yield` its items.",
            )
        return found


class Relay:
    """The hooks of one connection and those of the plugins that are enabled for it, looked up once."""

    def __init__(self, author: Author, connection: object, plugins: Sequence[Entry]) -> None:
        provider, origin = author.name, author.origin
        whose = f"The connection of the provider `{provider}`{f' from {origin}' if origin else ''}"
        try:
            hooks = check_hooks(connection, "connection")
            check_attributes(connection, hooks)
            if "chat" not in hooks:
                unmarked = hasattr(connection, "chat")
                raise HookProblem(
                    "lacks a required hook", f"{'Put `@hookimpl` above its' if unmarked else 'Implement'} `chat`."
                )
        except HookProblem as problem:
            raise PluginLoadError(
                f"{whose} {problem.text}.", plugin=provider, distributions=[origin] if origin else (), hint=problem.hint
            ) from problem
        self.needs_event_loop = bool(getattr(connection, "needs_event_loop", False))
        self.contained = Contained(author.typed)
        """A block of the provider's code."""
        self.hooks = {
            name: Hook(
                name,
                _with_argument(getattr(connection, name), takes=takes),
                is_async(getattr(connection, name)),
                self.needs_event_loop,
                author,
                self.contained,
            )
            for name, takes in hooks.items()
        }
        # Two entry points may name one object: it is called once.
        self._plugins = list({id(entry.plugin): entry for entry in reversed(plugins)}.values())[::-1]
        self._implementations: dict[str, list[tuple[str, Callable[..., Any]]]] = {}

    def each(self, name: str) -> list[tuple[str, Callable[..., Any]]]:
        """Return the implementations of a plugin hook, each with its plugin's name, in the order to call them.

        Objects given to `connect` come before installed ones, unless a hook is marked `tryfirst` or `trylast`.
        """
        if name not in self._implementations:
            found = []
            for entry in self._plugins:
                if name in entry.hooks:
                    options = getattr(getattr(entry.plugin, name), "graftage_impl", None) or {}
                    rank = options.get("trylast", False) - options.get("tryfirst", False)
                    found.append((rank, entry.name, _plugin_hook(entry, name)))
            found.sort(key=lambda each: each[0])
            self._implementations[name] = [(plugin, function) for _, plugin, function in found]
        return self._implementations[name]

    def named(self, plugin: str) -> str:
        """Return a plugin's name for a message, with its distribution if it has one."""
        return next((each.label for each in self._plugins if each.name == plugin), f"`{plugin}`")

    def drop(self, name: str, plugin: str) -> None:
        """Do not call a plugin's hook again."""
        self._implementations[name] = [each for each in self.each(name) if each[0] != plugin]


def _with_argument(function: Callable[..., Any], *, takes: bool) -> Callable[..., Any]:
    """Return the function, for calls with one argument: pluggy allows hooks without the parameter."""
    return function if takes else lambda *_: function()


def _plugin_hook(entry: Entry, hook: str) -> Callable[..., Any]:
    function = _with_argument(getattr(entry.plugin, hook), takes=entry.hooks[hook])
    contained = Contained(partial(_plugin_error, entry))

    def call(request: Any) -> Any:
        if entry.settings is not None and hook != "observe":
            request = replace(request, settings=entry.settings)
        with contained:
            result = function(request)
            # A generator runs the plugin's code as it is read: read it inside the block.
            return list(result) if isinstance(result, Iterator) else result

    return call


def _plugin_error(entry: Entry, error: BaseException) -> PluginError:
    return PluginError(
        f"The {entry.named} failed with {in_words(error)}.",
        plugin=entry.name,
        distributions=entry.distributions,
        hint="Report it to its authors, or disable it with GRAFTAGE_DISABLED_PLUGINS.",
    )
