"""`connect` and `connect_async`: their arguments, read once for both clients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from graftage._client.async_client import AsyncClient
from graftage._client.sync_client import Client
from graftage._engine.call import as_it_is
from graftage.exceptions import GraftageError

if TYPE_CHECKING:
    from graftage._engine.choosing import ConnectOptions
    from graftage.settings import Settings
    from graftage.types import Feature

    SettingsLike = Mapping[str, Any] | Settings | str | Path | None

__all__ = ["connect", "connect_async"]


def connect(
    provider: str | object | Sequence[str | object] | None = None,
    *,
    model: str | None = None,
    settings: SettingsLike = None,
    plugins: Sequence[object] | None = None,
    translate_error: Callable[[GraftageError], Exception] | None = None,
    env_prefix: str | None = None,
    instances: Mapping[str, Mapping[str, Any]] | None = None,
    needs: Collection[Feature] | None = None,
    **overrides: Any,
) -> Client:
    """Join a provider. Nothing is opened until it is needed. An argument of None means "not given".

    Args:
        provider: the name of a provider or an instance, `"provider:model"`, a plugin object, or a list of these: a
            fallback chain, whose next member is asked if the one before could not begin to answer. A member may be a
            pair of one of these and a mapping with its own `model` and settings, `("ollama", {"host": "gpu:11434"})`;
            secrets and `host` are refused if every member would get them. None or `"auto"` means the provider that
            `GRAFTAGE_PROVIDER` or the settings file names, or else the first one on this machine that answers:
            instances and providers by their rank, Ollama before the embedded one. It is chosen once, when the client
            is entered or at its first call. With `host`, only the server there is asked; if it does not have the
            model, that is a `ModelNotFound`.
        model: the model of all calls that do not name one.
        settings: a mapping of settings, in which a plugin's settings stand under its name, as in the file; or the path
            of a TOML file to read instead of the user's.
        plugins: plugin objects to use besides the installed ones.
        translate_error: makes the host's error from each `GraftageError` before it is raised.
        env_prefix: the prefix of environment variables instead of `GRAFTAGE`.
        instances: named instances, as the tables `[instances.NAME]` of the settings file: each has a `provider`, and
            may have a `model`, an `adapter` that is active from the start, `api_key_from` (`"keyring"`, or the path of
            a file that only its owner can read), and settings of the provider. The key is read when the instance is
            connected; a keyring may ask its user then.
        needs: features that the provider and its model must have, such as `{"tools"}`. `auto` takes the first that
            has them, a chain leaves out the members that do not. Where it depends on the model, calls check it.
        overrides: settings by name, such as `host`, `api_key`, `timeouts`, `attempts`, `keep_alive`.

    Raises:
        ProviderNotFound: the provider is not installed.
        PluginError: the provider is broken, or two distributions claim its name.
        SettingsError: a setting or an instance is unknown or invalid, or the key of an instance cannot be read.
        CapabilityUnsupported: the provider, or each member of the chain, lacks a feature of `needs`.
    """
    options = _read(
        provider,
        plugins,
        translate_error,
        overrides,
        model=model,
        settings=settings,
        env_prefix=env_prefix,
        instances=instances,
        needs=_read_needs(needs),
    )
    return Client(options)


def connect_async(
    provider: str | object | Sequence[str | object] | None = None,
    *,
    model: str | None = None,
    settings: SettingsLike = None,
    plugins: Sequence[object] | None = None,
    translate_error: Callable[[GraftageError], Exception] | None = None,
    env_prefix: str | None = None,
    instances: Mapping[str, Mapping[str, Any]] | None = None,
    needs: Collection[Feature] | None = None,
    **overrides: Any,
) -> AsyncClient:
    """Join a provider for asyncio, with the arguments of `connect`.

    A plain function: the client opens, and raises what `connect` raises, on `async with` or at its first call.
    """
    options = _read(
        provider,
        plugins,
        translate_error,
        overrides,
        model=model,
        settings=settings,
        env_prefix=env_prefix,
        instances=instances,
        needs=_read_needs(needs),
    )
    return AsyncClient(options)


def _read_needs(needs: object) -> frozenset[Any]:
    if needs is None:
        return frozenset()
    from graftage._engine.inputs import rejected, suggest
    from graftage.exceptions import RequestRejected
    from graftage.types import Feature

    if isinstance(needs, (str, bytes, Mapping)) or not isinstance(needs, Iterable):
        raise rejected("`needs`", "a set of features, such as {'tools'}", needs)
    known = get_args(Feature)
    found = tuple(needs)
    for each in found:
        if each not in known:
            raise RequestRejected(f"There is no feature `{each}` (`needs`).", hint=suggest(str(each), known))
    return frozenset(found)


def _read(
    provider: object,
    plugins: object,
    translate_error: Callable[[GraftageError], Exception] | None,
    overrides: Mapping[str, object],
    **given: Any,
) -> ConnectOptions:
    from graftage._engine.choosing import ConnectOptions
    from graftage._engine.inputs import items, rejected

    if translate_error is not None and not callable(translate_error):
        raise rejected(
            "`translate_error`", "a function from a `GraftageError` to the exception to raise", translate_error
        )
    plugins = items(plugins, "`plugins`", "a sequence of plugin objects")
    return ConnectOptions(
        provider=provider,
        plugins=plugins,
        translate=translate_error or as_it_is,
        overrides={name: value for name, value in overrides.items() if value is not None},
        **given,
    )
