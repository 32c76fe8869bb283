"""LoRA adapters for Graftage: found, proven, converted and merged.

    graftage.connect("ollama", model="smollm2:135m", plugins=[LoraPlugin(folders=["adapters"])])

Installed, it works by itself, with `GRAFTAGE_LORA_…` and the table `[lora]` of the settings file.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from graftage.hookspecs import hookimpl

if TYPE_CHECKING:
    from graftage.calls import ListAdaptersRequest, ResolveRequest
    from graftage.types import Adapter, AdapterInfo
    from graftage_lora._resolve import Resolver
    from graftage_lora._settings import LoraSettings

__all__ = ["LoraPlugin", "plugin"]

AnyPath: TypeAlias = "str | PathLike[str]"


class LoraPlugin:
    """Resolves adapters. What is not given here is taken from the environment, then from the settings file.

    Args:
        folders: folders of adapters, asked in that order.
        project: a project's folder; its adapters are in `.graftage/adapters`.
        registry: the file that binds names to adapters, `adapters.toml` in the user's config folder by default.
        hub: the cache of `huggingface_hub`, where that has it by default.
        cache: where converted adapters are kept.
        paths: whether a reference may be a path. Turn it off where references come from strangers.
        max_bytes: a larger adapter is refused; 2 GiB by default.
        merge_type: type of a quantised tensor after a merge, `Q8_0` (the default) or `F16`.

    Wrong settings are a `SettingsError` when a client opens.
    """

    name = "lora"

    def __init__(
        self,
        *,
        folders: Iterable[AnyPath] | None = None,
        project: AnyPath | None = None,
        registry: AnyPath | None = None,
        hub: AnyPath | None = None,
        cache: AnyPath | None = None,
        paths: bool | None = None,
        max_bytes: int | None = None,
        merge_type: str | None = None,
    ) -> None:
        given: dict[str, Any] = {
            "folders": None if folders is None else tuple(folders),
            "project": project,
            "registry": registry,
            "hub": hub,
            "cache": cache,
            "paths": paths,
            "max_bytes": max_bytes,
            "merge_type": merge_type,
        }
        self.arguments = {key: value for key, value in given.items() if value is not None}
        self._resolvers: dict[LoraSettings, Resolver] = {}
        self._lock = threading.Lock()

    @hookimpl
    def settings_model(self) -> type[LoraSettings]:
        """The settings of this plugin."""
        from graftage_lora._settings import LoraSettings

        return LoraSettings

    @hookimpl
    def resolve_adapter(self, request: ResolveRequest) -> Adapter:
        """The adapter of a reference, read and judged.

        Raises:
            AdapterNotFound: none of the sources knows it; `reasons` has what each said.
            AdapterInvalid: it was found and cannot be used.
        """
        return self._resolver(request).resolve(request)

    @hookimpl
    def list_adapters(self, request: ListAdaptersRequest) -> Iterable[AdapterInfo]:
        """The adapters that the sources know of."""
        return tuple(self._resolver(request).known())

    def _resolver(self, request: ResolveRequest | ListAdaptersRequest) -> Resolver:
        """The one for these settings: it remembers the adapters that it has read."""
        from graftage.settings import load
        from graftage_lora._resolve import Resolver  # NumPy, only where an adapter is named

        settings = cast("LoraSettings | None", request.settings)
        if settings is None:  # It is asked without a client.
            settings = load(self.settings_model(), name=self.name, arguments=self.arguments).settings
        with self._lock:
            if settings not in self._resolvers:
                self._resolvers[settings] = Resolver(settings)
            return self._resolvers[settings]


plugin = LoraPlugin()
"""The one that is installed."""
