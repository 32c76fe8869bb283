"""Settings: arguments over environment variables over a TOML file, each value with its origin.

A provider with its own settings subclasses `Settings` and returns the class from its `settings_model` hook:

    class MySettings(Settings):
        native_environment: ClassVar[Mapping[str, str]] = {"api_key": "MY_SERVICE_KEY"}

        region: str = "eu"

A field takes its value from the first of these sources that has it:

1. an argument of `connect`
2. the mapping passed as `settings`
3. `GRAFTAGE_<PROVIDER>_<FIELD>`
4. `GRAFTAGE_<FIELD>`
5. the variable that the provider's own tools read (`native_environment`)
6. the provider's table in the TOML file
7. the top of that file

A host application can set its own prefix in place of `GRAFTAGE`. An unknown key is an error that names the nearest
known one, and so is a variable that is similar to a known one. Other unknown variables are ignored, with a warning in
the log. A variable for an object holds JSON, or each part has its own, such as `GRAFTAGE_TIMEOUTS__IDLE`. A variable
for a list holds JSON, or text that the field's validator splits.

A **named instance** is a provider with an address, a key and defaults of its own, in the table `[instances.NAME]`. Its
name is then the name of a provider. It has a `provider`, may have a `model`, an `adapter` and `api_key_from`, and takes
these and the provider's settings from the first of these sources:

1. its pair in a chain, and arguments of `connect`
2. its table in the argument `instances`, then in the mapping passed as `settings`
3. the rest of that mapping
4. `GRAFTAGE_<INSTANCE>_<FIELD>`, then the variables of its provider, as above
5. its table in the TOML file, then the rest of that file, as above

An address or a secret of an instance comes only from its own sources: its pair, an argument, its tables, its variables.
If they hold no key, it is read from where `api_key_from` says. The model of calls is the one in `"name:model"`, else
that of these sources, else `GRAFTAGE_MODEL`, else the `model` at the top of the file.

Other plugins subclass `PluginSettings`. Their values come from the arguments of their object, their table in the
mapping, `GRAFTAGE_<PLUGIN>_<FIELD>`, and their table in the file.

An address or a secret is for one server. A member of a chain takes it only from a source that names that member. A
secret from another tool's variable reaches only the host that the provider names in `native_hosts`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Generic, TypeVar, Union, get_args, get_origin

from graftage._records import dataclass
from graftage._values import (
    LARGEST_COUNT,
    SMALLEST_WINDOW,
    close,
    keep_alive_seconds,
    read_file,
    ready_pydantic,
    user_path,
)
from graftage.exceptions import SettingsError
from graftage.types import Timeouts

ready_pydantic()

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator  # noqa: E402 - after `ready_pydantic`

__all__ = ["Loaded", "PluginSettings", "Settings", "Sources", "config_path", "load", "nearest", "without_user"]

PREFIX = "GRAFTAGE"
NESTED = "__"
"""The separator between a setting and its part in the name of a variable."""
RESERVED = frozenset({"CONFIG", "PROVIDER", "MODEL", "DISABLED_PLUGINS", "STRICT_PLUGINS", "LIVE_OLLAMA", "DEBUG"})
"""Variables of the prefix that are not fields of settings."""
LARGEST_FILE = 64 * 1024
"""Bytes of a settings file: the time to read nested names grows with the square of their number."""
CHOICE_KEYS = ("provider", "model")
"""Keys at the top of the file that select a provider and a model."""
AUTO = "auto"
"""The name of the choice among all providers and instances."""
INSTANCES = "instances"
"""The table of named instances, in the file and in the mapping."""
INSTANCE_KEYS = ("provider", "model", "adapter", "api_key_from")
"""Keys of an instance that are not settings of its provider."""
MAPPING = "the `settings` mapping"
ARGUMENT = "argument"
GIVEN = (ARGUMENT, "argument of the member", MAPPING)
"""Origins inside a call of `connect`."""
SIMILARITY = 0.75
"""How similar a name must be to a known one, from 0 to 1, to count as misspelt."""
HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
HEADER_VALUE = re.compile(r"[\t\x20-\x7e\xa0-\xff]*")
"""RFC 9110, 5.1 and 5.5, without the control characters of Latin-1."""


class PluginSettings(BaseModel):
    """The base class for a plugin's settings. Return the subclass from `settings_model`."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        validate_default=True,
        protected_namespaces=("model_validate", "model_dump"),
    )

    native_environment: ClassVar[Mapping[str, str]] = {}
    """Field to environment variable, for variables that other tools read."""
    native_hosts: ClassVar[Mapping[str, str]] = {}
    """Field to host name, for secrets in such variables that are for one host only. They reach the provider if its
    setting `host` has its default or names that host."""


class Settings(PluginSettings):
    """The settings that every provider understands."""

    host: str | None = Field(default=None, description="Address of the server")
    api_key: SecretStr | None = Field(
        default=None, description="Sent as a bearer token; to a remote host only over https"
    )
    headers: Mapping[str, SecretStr] = Field(
        default_factory=dict, description="Sent with every request; secrets to a remote host only over https"
    )
    timeouts: Timeouts = Field(default_factory=Timeouts, description="connect, first_token, idle, total, in seconds")
    attempts: int = Field(
        default=3,
        ge=1,
        le=10,
        description="How often a call is tried if its failure is safe to retry; 1 disables retries",
    )
    keep_alive: float | None = Field(
        default=None, description="How long a model stays loaded: seconds, 5m, -1 for ever"
    )
    context_window: int | None = Field(
        default=None, ge=SMALLEST_WINDOW, le=LARGEST_COUNT, description="Tokens of prompt and reply together"
    )
    concurrency: int | None = Field(default=None, ge=1, description="Requests at once to the server, from this process")
    max_reply_bytes: int = Field(
        default=64 * 1024 * 1024, ge=1024, description="Largest reply that is accepted, in bytes"
    )
    transport: Any = Field(
        default=None, exclude=True, description="A `graftage.http.Wrapper`, such as a cassette: for tests and recording"
    )

    @field_validator("transport")
    @classmethod
    def _wraps(cls, value: object) -> Any:
        if value is not None and not callable(getattr(value, "wrap", None)):
            raise ValueError("it has no method `wrap`: pass a cassette or another `graftage.http.Wrapper`")
        return value

    @field_validator("api_key")
    @classmethod
    def _key(cls, value: SecretStr | None) -> SecretStr | None:
        # A key from a file ends with a line feed; an empty key means none.
        key = _header_value(value).get_secret_value() if value else ""
        return SecretStr(key) if key else None

    @field_validator("headers")
    @classmethod
    def _headers(cls, value: Mapping[str, SecretStr]) -> Mapping[str, SecretStr]:
        # The error does not show an invalid name: it may be a whole header with its secret.
        if not all(HEADER_NAME.fullmatch(name) for name in value):
            raise ValueError("the name of a header may have letters, digits and hyphens, but no space or colon")
        return {name: _header_value(each) for name, each in value.items()}

    @field_validator("keep_alive", mode="before")
    @classmethod
    def _seconds(cls, value: object) -> float | None:
        return keep_alive_seconds(value)

    @field_validator("timeouts", mode="before")
    @classmethod
    def _timeouts(cls, value: object) -> Any:
        # Parts that are left out keep their defaults; a misspelt part must be an error.
        if isinstance(value, Mapping):
            known = [each.name for each in fields(Timeouts)]
            for name in value:
                if name not in known:
                    raise ValueError(f"it has no part `{name}`. {nearest(str(name), known)}")
            return Timeouts(**{name: _number(seconds) for name, seconds in value.items()})
        return value

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """Return all fields, the address without user and password."""
        for name, value in super().__repr_args__():
            yield name, without_user(value) if name == "host" and value else value


AnySettings = TypeVar("AnySettings", bound=PluginSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(Generic[AnySettings]):
    """Settings of one provider or plugin, and where each value came from."""

    settings: AnySettings
    origins: Mapping[str, str] = field(default_factory=dict)
    """For each field that is not a default: `argument`, `environment GRAFTAGE_HOST`, or the path of a file."""
    ignored: tuple[str, ...] = ()
    """Unknown variables of the prefix, probably for plugins that are not installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A named instance: a provider with an address, a key and defaults of its own."""

    name: str
    provider: str
    """The plugin's name."""
    model: str | None = None
    adapter: str | None = None
    """Active from the start."""
    api_key_from: str | None = None
    """`keyring`, or the path of a file."""
    origin: str = ""
    """Where it is declared."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """Where each of its own values came from."""
    given: tuple[tuple[str, Mapping[str, Any]], ...] = field(default=(), repr=False)
    """Its tables in the call of `connect`, each with its origin. They may hold secrets."""
    written: tuple[tuple[str, Mapping[str, Any]], ...] = field(default=(), repr=False)
    """Its table in the file, if there is one, with its origin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Sources of settings besides arguments."""

    prefix: str = PREFIX
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)
    """Holds secrets, also those of other programs."""
    file: Path | None = None
    required: bool = False
    """Whether a missing file is an error."""
    _document: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False, compare=False)
    """The file's content, once it was read."""

    @classmethod
    def of(cls, prefix: str | None = None, file: str | Path | None = None) -> Sources:
        """Return the process's environment, and the given file or the user's own.

        Raises:
            SettingsError: the prefix cannot begin the name of a variable.
        """
        chosen: Any = prefix or PREFIX
        if not isinstance(chosen, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", chosen):
            raise SettingsError(
                "`env_prefix` cannot begin the name of a variable.",
                key="env_prefix",
                hint="Use letters, digits and `_`.",
            )
        return cls(prefix=chosen, file=user_path(file) if file else config_path(chosen), required=bool(file))

    def document(self) -> dict[str, Any]:
        """Return the TOML file as plain data, as it was when this was first called; empty if there is none.

        Raises:
            SettingsError: it cannot be read, is not a regular file, is larger than `LARGEST_FILE`, or is not TOML.
        """
        if not self._document:
            self._document.append(self._read())
        return self._document[0]

    def _read(self) -> dict[str, Any]:
        if self.file is None or str(self.file) == os.devnull:
            return {}
        try:
            return _read_toml(read_file(self.file, LARGEST_FILE))
        except (OSError, ValueError, RecursionError) as error:
            if isinstance(error, FileNotFoundError) and not self.required:
                return {}
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> SettingsError:
        return SettingsError(
            f"The settings file {self.file} cannot be used: {_reason(error)}.",
            source=str(self.file),
            hint=f"Correct it, or name another file in {self.prefix}_CONFIG.",
        )

    def choice(self, key: str) -> tuple[str | None, str]:
        """Return the `provider` or `model` for a caller that names none, and its origin."""
        variable = f"{self.prefix}_{key}".upper()
        if value := self.environment.get(variable):
            return value, f"environment {variable}"
        value = self.document().get(key)
        if value is not None and not isinstance(value, str):
            kind = type(value).__name__
            raise SettingsError(f"`{key}` in {self.file} must be text, not {kind}.", key=key, source=str(self.file))
        return value, str(self.file)


def config_path(prefix: str = PREFIX) -> Path:
    """Return the settings file: from `GRAFTAGE_CONFIG`, else `config.toml` in the user's config folder."""
    if named := os.environ.get(f"{prefix}_CONFIG"):
        return user_path(named)
    from platformdirs import user_config_path

    return user_config_path(prefix.lower(), appauthor=False) / "config.toml"


def _read_toml(data: bytes) -> dict[str, Any]:
    import tomllib  # Needed only with a file

    document: dict[str, Any] = tomllib.loads(data.decode("utf-8-sig"))
    return document


def _reason(error: Exception) -> str:
    """Return why a file cannot be used. Python's internal messages are replaced."""
    if isinstance(error, OSError):
        return str(error.strerror)
    import tomllib  # Needed only with a file

    if isinstance(error, tomllib.TOMLDecodeError):
        return str(error)
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    return (
        "it is nested too deeply" if isinstance(error, RecursionError) else "a number or a date in it is out of range"
    )


def without_user(address: str) -> str:
    """Return an address without the user and password that may be in it."""
    return re.sub(r"^([a-zA-Z][a-zA-Z0-9+.-]*://)?.*@", r"\1", address, flags=re.DOTALL)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the hint for an unknown name: the nearest known one, else all of them."""
    names = sorted(known)
    near = close(name.lower(), names)
    return f"Did you mean `{near[0]}`?" if near else f"Use one of {', '.join(f'`{each}`' for each in names)}."


@dataclass(frozen=True, slots=True)
class _Owner:
    """The plugin or the instance whose settings are loaded."""

    name: str
    plugin: str
    """The plugin's name, which is also that of its own table. An instance has another name."""
    model: type[PluginSettings]
    plugins: frozenset[str]
    """Names of all installed plugins, its own included."""
    instance: Instance | None
    instances: frozenset[str]
    """Names of all instances."""

    @property
    def is_provider(self) -> bool:
        """Whether it also takes the settings for all providers."""
        return issubclass(self.model, Settings)

    @property
    def writable(self) -> set[str]:
        """Fields that variables and files can set."""
        return set(self.model.model_fields) - {"transport"}


def load(
    model: type[AnySettings],
    *,
    name: str,
    arguments: Mapping[str, Any],
    own: Mapping[str, Any] | None = None,
    mapping: Mapping[str, Any] | None = None,
    sources: Sources | None = None,
    plugins: Iterable[str] = (),
    instances: Mapping[str, Instance] | None = None,
    chained: bool = False,
) -> Loaded[AnySettings]:
    """Load and check the settings of one provider, instance or plugin.

    Args:
        model: its settings class.
        name: its name, which names its table and its variables.
        arguments: keyword arguments of the caller.
        own: arguments for this one member of a chain.
        mapping: the argument `settings`.
        sources: environment and file; by default those of the process.
        plugins: names of all installed plugins, whose tables and variables are skipped.
        instances: all instances by name, whose variables are skipped; one of them may have this `name`.
        chained: whether there are other members, which must not get this one's key or address.

    Raises:
        SettingsError: a key is unknown or a value is invalid; the message names the source and the nearest key.
    """
    sources = sources or Sources.of()
    instance = (instances or {}).get(name)
    plugin = instance.provider if instance else name
    owner = _Owner(name, plugin, model, frozenset({plugin, *plugins}), instance, frozenset(instances or ()))
    # Under a host's prefix there are variables for other things; under ours an unknown one may be a mistake.
    ignored = _check_variables(owner, sources) if sources.prefix == PREFIX else ()
    layers = list(_layers(owner, sources, own or {}, arguments, mapping or {}))
    if instance or model.native_hosts:
        layers = _allowed(layers, owner)
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, key, value, shared in layers:
        whole = key not in merged
        private = chained and owner.is_provider and shared and _is_private(key, model)
        if private and value and (whole or isinstance(value, Mapping)):
            raise _shared_secret_error(key, origin, owner, sources.prefix)
        if whole:
            merged[key], origins[key] = value, origin
        elif isinstance(merged[key], Mapping) and isinstance(value, Mapping):
            merged[key] = {**value, **merged[key]}
    try:
        return Loaded(settings=model(**merged), origins=origins, ignored=tuple(ignored))
    except ValidationError as error:
        raise _settings_error(error, model, origins) from None


_Layer = tuple[str, str, Any, bool]
"""The origin of a value, its key, the value, and whether others than this provider or instance would get it."""


def _layers(
    owner: _Owner,
    sources: Sources,
    own: Mapping[str, Any],
    arguments: Mapping[str, Any],
    mapping: Mapping[Any, Any],
) -> Iterable[_Layer]:
    """Yield the values of all sources, the first source first."""
    known = set(owner.model.model_fields)
    yield from _from_mapping(own, "argument of the member", known, shared=False)
    yield from _from_mapping(arguments, ARGUMENT, known)
    if owner.instance:
        yield from _from_instance(owner.instance.given, known)
    yield from _from_document(mapping, MAPPING, owner, known)
    yield from _from_environment(owner, sources)
    if owner.instance:
        yield from _from_instance(owner.instance.written, owner.writable)
    yield from _from_document(sources.document(), str(sources.file), owner, owner.writable, CHOICE_KEYS)


def _from_mapping(values: Mapping[Any, Any], origin: str, known: set[str], *, shared: bool = True) -> Iterable[_Layer]:
    for key, value in values.items():
        _check_known(key, known, origin)
        yield origin, key, value, shared


def _from_instance(tables: Iterable[tuple[str, Mapping[str, Any]]], known: set[str]) -> Iterable[_Layer]:
    for origin, table in tables:
        for layer in _from_mapping(table, origin, {*known, *INSTANCE_KEYS}, shared=False):
            if layer[1] not in INSTANCE_KEYS:
                yield layer


def _allowed(layers: Sequence[_Layer], owner: _Owner) -> list[_Layer]:
    """Return the layers whose values may reach the owner's server: secrets are for the server they were given for."""
    allowed = []
    model = owner.model
    natives = {key: f"environment {variable}" for key, variable in model.native_environment.items()}
    host = next((value for _, key, value, _ in layers if key == "host"), None)
    for layer in layers:
        origin, key, _, shared = layer
        if owner.instance and shared and origin != ARGUMENT and _is_private(key, model):
            continue
        if key in model.native_hosts and origin == natives.get(key) and not _is_host(host, model.native_hosts[key]):
            continue
        allowed.append(layer)
    return allowed


def _is_host(address: object, name: str) -> bool:
    """Whether an address is that of a host; the provider's default is."""
    from urllib.parse import urlsplit  # Slow to import, and few settings need it.

    if not address:
        return True
    text = str(address).strip()
    try:
        return urlsplit(text if "://" in text else f"//{text}").hostname == name
    except ValueError:
        return False


def _is_private(key: str, model: type[PluginSettings]) -> bool:
    """Whether a setting is for one server: its address or a secret."""
    return key == "host" or "Secret" in repr(model.model_fields[key].annotation)


def _shared_secret_error(key: str, origin: str, owner: _Owner, prefix: str) -> SettingsError:
    variable = f"{prefix}_{variable_part(owner.name)}{key}".upper()
    table = f"{INSTANCES}.{owner.name}" if owner.instance else owner.name
    return SettingsError(
        f"The setting `{key}` ({origin}) would reach every member of the chain.",
        key=key,
        source=origin,
        hint=f"Set it for one member: as `(provider, {{{key!r}: ...}})` in the list, in the provider's table of the "
        f"settings file, such as `[{table}]`, or in the provider's variable, such as {variable}.",
    )


def _from_environment(owner: _Owner, sources: Sources) -> Iterable[_Layer]:
    own = variable_part(owner.name)
    parts = [own, *([variable_part(owner.plugin)] if owner.instance else ()), *([""] if owner.is_provider else ())]
    for part in parts:
        prefix = f"{sources.prefix}_{part}"
        for key, found in _variables(prefix, sources.environment).items():
            annotation = owner.model.model_fields[key].annotation if key in owner.writable else str
            if key in owner.writable and (() in found or _kinds(annotation) != {"text"}):
                origin = f"environment {', '.join(sorted(name for name, _ in found.values()))}"
                try:
                    value = _from_texts(annotation, {parts: text for parts, (_, text) in found.items()})
                except (ValueError, RecursionError):
                    raise _json_error(key, origin, prefix) from None
                yield origin, key, value, part != own
    for key, variable in owner.model.native_environment.items():
        if value := sources.environment.get(variable):
            yield f"environment {variable}", key, value, owner.instance is not None


def variable_of(sources: Sources, owner: str, key: str) -> tuple[str | None, str]:
    """Return the text of an owner's own variable for a key, and its origin; None if there is none."""
    found = _variables(f"{sources.prefix}_{variable_part(owner)}", sources.environment).get(key, {})
    name, text = found.get((), (None, None))
    return text, f"environment {name}"


def _variables(prefix: str, environment: Mapping[str, str]) -> dict[str, dict[tuple[str, ...], tuple[str, str]]]:
    """Return, for each setting with variables, the name and text for the whole, `()`, and for each part.

    The case of names does not matter, and empty variables are ignored.
    """
    found: dict[str, dict[tuple[str, ...], tuple[str, str]]] = {}
    for name, text in environment.items():
        if text and name[: len(prefix)].lower() == prefix.lower():
            key, *parts = name[len(prefix) :].lower().split(NESTED)
            found.setdefault(key, {})[tuple(parts)] = name, text
    return found


def _from_texts(annotation: object, texts: Mapping[tuple[str, ...], str]) -> Any:
    """Return the value of a setting or of a part. Variables of single parts win over that of the whole.

    Raises:
        ValueError: a text that must be JSON is not.
        RecursionError: it is nested too deeply.
    """
    value = _from_text(_kinds(annotation), texts[()]) if () in texts else {}
    if not isinstance(value, dict):
        return value
    for part in {parts[0] for parts in texts if parts}:
        own = {parts[1:]: text for parts, text in texts.items() if parts[:1] == (part,)}
        value[part] = _merged(value.get(part), _from_texts(_part(annotation, part), own))
    return value


def _from_text(kinds: set[str], text: str) -> Any:
    """Return an object or a list from JSON if the setting takes one; else the text, for its validator."""
    if kinds == {"text"}:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        if kinds == {"object"}:
            raise
        return text
    return value if kinds == {"object"} or isinstance(value, (dict, list)) else text


def _kinds(annotation: object) -> set[str]:
    """Return what a type takes: an `object` with parts, a `list`, or one `text`."""
    annotation = getattr(annotation, "__value__", annotation)  # A type alias of Python 3.12.
    origin = get_origin(annotation) or annotation
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return set().union(*map(_kinds, get_args(annotation)))
    if not isinstance(origin, type) or issubclass(origin, (str, bytes)):
        return {"text"}
    if is_dataclass(origin) or issubclass(origin, (BaseModel, Mapping)):
        return {"object"}
    return {"list"} if issubclass(origin, (Sequence, AbstractSet)) else {"text"}


def _part(annotation: object, key: str) -> Any:
    """Return the type of a part: of a field of a model or a value of a mapping; by default text."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(key)
        return field.annotation if field else str
    return get_args(annotation)[-1] if _kinds(annotation) == {"object"} and get_args(annotation) else str


def _merged(under: object, over: object) -> Any:
    """Return `over`, or both merged if they are mappings."""
    if isinstance(under, Mapping) and isinstance(over, Mapping):
        return {**under, **{key: _merged(under.get(key), value) for key, value in over.items()}}
    return over


def _json_error(key: str, origin: str, prefix: str) -> SettingsError:
    return SettingsError(
        f"The setting `{key}` ({origin}) is invalid: it is not valid JSON.",
        key=key,
        source=origin,
        hint=f"Set an object, or a variable for each part: {prefix}{key.upper()}{NESTED}PART.",
    )


def variable_part(plugin: str) -> str:
    """Return what follows the prefix in the names of a plugin's own variables."""
    return f"{plugin}_".upper().replace("-", "_")


def _check_variables(owner: _Owner, sources: Sources) -> Sequence[str]:
    """Refuse unknown variables that seem to be for this plugin. Other plugins check theirs.

    Return those that are not similar to any known name.
    """
    ignored = []
    others = {*owner.plugins, *owner.instances}
    for variable in sources.environment:
        rest = variable.removeprefix(f"{sources.prefix}_")
        if rest == variable or rest in RESERVED or (owner.is_provider and _field(rest, owner.model) in owner.writable):
            continue
        origin = f"environment {variable}"
        whose = max((each for each in others if rest.startswith(variable_part(each))), key=len, default=None)
        if whose in (owner.name, owner.plugin):
            known = {*owner.writable, *(INSTANCE_KEYS if whose in owner.instances else ())}
            _check_known(_field(rest.removeprefix(variable_part(str(whose))), owner.model), known, origin)
        elif whose is None:
            name = _field(rest, owner.model)
            known = {*owner.writable, *map(str.lower, RESERVED)} if owner.is_provider else set()
            if (meant := _likely_setting(name, owner)) is not None:
                _check_known(name, {*known, meant} - {"transport"}, origin)
            else:
                ignored.append(variable)
    return ignored


def _likely_setting(name: str, owner: _Owner) -> str | None:
    """Return the setting, also of another plugin, that a variable's name is a misspelling of; None if there is none."""
    name = name.partition(NESTED)[0]
    fields = {*owner.model.model_fields, *(map(str.lower, RESERVED) if owner.is_provider else ())}
    plugins = [variable_part(each).lower() for each in (*owner.plugins, *owner.instances)]
    for each in fields:
        if name.endswith(f"_{each}"):
            near = close(name.removesuffix(each), plugins, cutoff=SIMILARITY)
            return f"{near[0]}{each}" if near else None
    own = fields if owner.is_provider else {f"{variable_part(owner.name)}{each}".lower() for each in fields}
    return next(iter(close(name, own, cutoff=SIMILARITY)), None)


def _field(name: str, model: type[PluginSettings]) -> str:
    """Return a variable's setting: `timeouts` for `TIMEOUTS__TOTAL`. `host` has no parts: `HOST__X` is `host__x`."""
    whole = name.lower()
    of, nested, _ = whole.partition(NESTED)
    field = model.model_fields.get(of) if nested else None
    return of if field is not None and _kinds(field.annotation) != {"text"} else whole


def _from_document(
    document: Mapping[Any, Any], origin: str, owner: _Owner, known: set[str], choices: Iterable[str] = ()
) -> Iterable[_Layer]:
    """Yield the values in the plugin's own table and, for a provider, at the top of the file or mapping."""
    table = document.get(owner.plugin, {})
    if not isinstance(table, Mapping):
        raise SettingsError(f"`{owner.plugin}` in {origin} must be a table.", key=owner.plugin, source=origin)
    yield from _from_mapping(table, f"{origin} [{owner.plugin}]", known, shared=owner.instance is not None)
    for key, value in document.items() if owner.is_provider else ():
        if key in choices or key in owner.plugins or key == INSTANCES:
            continue
        if isinstance(value, Mapping) and key not in known:
            tables = {*known, *owner.plugins, INSTANCES}
            hint = f"No provider or plugin with that name is installed. {nearest(str(key), tables)}"
            if key in owner.instances:
                hint = f"The table of that instance is `[{INSTANCES}.{key}]`."
            raise SettingsError(f"There is no table `{key}` ({origin}).", key=str(key), source=origin, hint=hint)
        _check_known(key, {*known, *choices, *owner.plugins}, origin)
        yield origin, key, value, True


def _check_known(key: Any, known: Iterable[str], origin: str) -> None:
    if key not in set(known):
        name = str(key)
        raise SettingsError(
            f"There is no setting `{name}` ({origin}).", key=name, source=origin, hint=nearest(name, known)
        )


def _settings_error(error: ValidationError, model: type[PluginSettings], origins: Mapping[str, str]) -> SettingsError:
    first = error.errors(include_url=False, include_input=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    key = ".".join(str(part) for part in first["loc"])
    origin = origins.get(name, "default")
    message = str(first["msg"]).removeprefix("Value error, ")
    about = model.model_fields[name].description if name in model.model_fields else None
    # The error does not show the value, which may be a secret.
    return SettingsError(
        f"The setting `{key}` ({origin}) is invalid: {message if message[-1:] in '.?' else f'{message}.'}",
        key=key,
        source=origin,
        hint=f"`{name}`: {about}." if about else None,
    )


def _number(value: object) -> float:
    """Return a number of seconds, also from text, as variables hold it."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    raise ValueError("it must be a number of seconds")


def _header_value(value: SecretStr) -> SecretStr:
    """Return a valid value of a header, without the space around it (RFC 9110, 5.5)."""
    text = value.get_secret_value().strip()
    if not HEADER_VALUE.fullmatch(text):
        raise ValueError("it holds a line feed or another character that headers cannot hold")
    return SecretStr(text)
