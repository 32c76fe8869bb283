"""Named instances: providers with an address, a key and defaults of their own, read from tables of the settings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from graftage._engine.plugins import Catalog
from graftage._keys import KEYRING
from graftage._records import dataclass
from graftage._values import user_path
from graftage.exceptions import SettingsError
from graftage.settings import (
    AUTO,
    INSTANCE_KEYS,
    INSTANCES,
    MAPPING,
    Instance,
    Sources,
    nearest,
    variable_of,
    variable_part,
    without_user,
)

__all__ = ["Listed", "find", "listed"]

ARGUMENT: Final = "the argument `instances`"
NAME: Final = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """An instance of the settings file, as a list shows it. It holds no key."""

    name: str
    provider: str
    """The plugin's name."""
    model: str | None
    host: str | None
    """Without user and password; None is the provider's default."""
    adapter: str | None
    origin: str
    """Where it is declared: the path of the file, and the table."""
    key: str | None
    """Where its key comes from: a variable, the table, `keyring`, or the path of a key file; None if it names none.
    Whether the keyring or the key file has one was not asked."""
    api_key_from: str | None
    """`keyring`, or the path of a key file: used if no variable and no table has the key itself."""


def listed(sources: Sources | None = None) -> list[Listed]:
    """Return the instances of the settings file, with their variables, by name. No keyring is asked.

    Raises:
        SettingsError: one is invalid.
    """
    sources = sources or Sources.of()
    found = find(sources, Catalog(environment=sources.environment, prefix=sources.prefix))
    return [_listed(found[name], sources) for name in sorted(found)]


def _listed(instance: Instance, sources: Sources) -> Listed:
    host, _ = _first("host", instance, sources)
    key, origin = _first("api_key", instance, sources)
    return Listed(
        name=instance.name,
        provider=instance.provider,
        model=instance.model,
        host=without_user(str(host)) if host else None,
        adapter=instance.adapter,
        origin=instance.origin,
        key=origin if key else instance.api_key_from,
        api_key_from=instance.api_key_from,
    )


def find(
    sources: Sources,
    catalog: Catalog,
    mapping: Mapping[Any, Any] | None = None,
    argument: object = None,
    *,
    installed: bool = True,
) -> dict[str, Instance]:
    """Return the instances of all sources by name.

    Args:
        sources: the environment and the file.
        catalog: the plugins that are installed, whose names an instance must not have.
        mapping: the argument `settings`.
        argument: the argument `instances`.
        installed: whether the providers must be installed.

    Raises:
        SettingsError: a table or a name is invalid, or a provider is not installed.
    """
    places = {ARGUMENT: argument, MAPPING: (mapping or {}).get(INSTANCES)}
    written = {str(sources.file): sources.document().get(INSTANCES)}
    given = list(_tables(places))
    stored = list(_tables(written))
    names = dict.fromkeys(name for name, _, _ in (*given, *stored))
    if not names:
        return {}
    _check_names(names, catalog.names())
    found = {}
    for name in names:
        bare = Instance(
            name=name,
            provider="",
            given=tuple((origin, table) for each, origin, table in given if each == name),
            written=tuple((origin, table) for each, origin, table in stored if each == name),
        )
        found[name] = _read(bare, sources, catalog.names("provider") if installed else None)
    return found


def _tables(places: Mapping[str, object]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield the name, the origin and the values of each table."""
    for place, tables in places.items():
        if tables is None:
            continue
        if not isinstance(tables, Mapping):
            raise SettingsError(
                f"`{INSTANCES}` in {place} must be a table of tables, each with the name of an instance.",
                key=INSTANCES,
                source=place,
            )
        for name, table in tables.items():
            origin = f"{place} [{INSTANCES}.{name}]"
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise SettingsError(
                    f"`{name}` cannot be the name of an instance ({origin}).",
                    key=INSTANCES,
                    source=origin,
                    hint="Use letters, digits, `-` and `_`.",
                )
            if not isinstance(table, Mapping):
                raise SettingsError(
                    f"The instance `{name}` in {place} must be a table.",
                    key=name,
                    source=place,
                    hint=f"Write `[{INSTANCES}.{name}]` with a `provider` in it.",
                )
            yield name, origin, table


def _check_names(names: Iterable[str], plugins: Iterable[str]) -> None:
    """Refuse names that mean something else, or whose variables do."""
    taken = {variable_part(each): f"the plugin `{each}`" for each in plugins}
    taken[variable_part(AUTO)] = "the choice among all providers"
    for name in names:
        if (owner := taken.setdefault(variable_part(name), f"the instance `{name}`")) != f"the instance `{name}`":
            raise SettingsError(
                f"The name of the instance `{name}` is taken: {owner} has the same name or the same variables.",
                key=name,
                source=INSTANCES,
                hint="Choose another name.",
            )


def _read(bare: Instance, sources: Sources, providers: Sequence[str] | None) -> Instance:
    """Return an instance with the values that are not settings of its provider."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for key in INSTANCE_KEYS:
        value, origin = _first(key, bare, sources)
        if value is None:
            continue
        if not isinstance(value, str) or not value.strip():
            raise SettingsError(
                f"`{key}` of the instance `{bare.name}` must be text ({origin}).", key=key, source=origin
            )
        if key == "api_key_from" and value != KEYRING and not user_path(value).is_absolute():
            # It may be a key that was written there by mistake, so the error does not show it.
            problem = (
                f"`{key}` of the instance `{bare.name}` must be `{KEYRING}`, or the path of a file from `/` or `~`."
            )
            hint = f"Run `graftage keys set {bare.name}` to store a key."
            raise SettingsError(problem, key=key, source=origin, hint=hint)
        values[key], origins[key] = value, origin
    origin = (*bare.given, *bare.written)[0][0]
    if "provider" not in values:
        raise SettingsError(
            f"The instance `{bare.name}` names no provider ({origin}).",
            key="provider",
            source=origin,
            hint="Set `provider` to the name of an installed provider.",
        )
    if providers is not None and values["provider"] not in providers:
        raise SettingsError(
            f"There is no provider `{values['provider']}` for the instance `{bare.name}` ({origins['provider']}).",
            key="provider",
            source=origins["provider"],
            hint=nearest(values["provider"], providers) if providers else "Install one, for example `graftage-openai`.",
        )
    return replace(bare, **values, origin=origin, origins=origins)


def _first(key: str, instance: Instance, sources: Sources) -> tuple[Any, str]:
    """Return a value from the sources of the instance alone, and its origin; None if there is none."""
    for origin, table in instance.given:
        if table.get(key) is not None:
            return table[key], origin
    value, origin = variable_of(sources, instance.name, key)
    if value is not None:
        return value, origin
    return next(((table[key], origin) for origin, table in instance.written if table.get(key) is not None), (None, ""))
