"""LoRA adapters for Graftage: found, checked, converted and merged.

    graftage.connect("ollama", model="smollm2:135m", plugins=[LoraPlugin(folders=["adapters"])])

Installed, it works by itself; configure it by `GRAFTAGE_LORA_…` or the table `[lora]` of the settings file.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from graftage.hookspecs import hookimpl

if TYPE_CHECKING:
    from graftage.calls import ListAdaptersRequest, PullAdapterRequest, ResolveRequest
    from graftage.types import Adapter, AdapterInfo
    from graftage_lora._resolve import Resolver
    from graftage_lora._settings import LoraSettings

__all__ = ["LoraPlugin", "plugin"]

AnyPath: TypeAlias = "str | PathLike[str]"


class LoraPlugin:
    """Resolves adapters. Settings that are not given here come from the environment, then from the settings file.

    Args:
        folders: folders of adapters, searched in this order.
        project: a project's folder; its adapters are in `.graftage/adapters`.
        registry: the file that binds names to adapters; default: `adapters.toml` in the user's config folder.
        hub: the cache of `huggingface_hub`; default: where that library keeps it.
        cache: where converted adapters are kept.
        paths: whether a reference may be a path. Disable it if references come from untrusted users.
        max_bytes: the largest adapter; default: 2 GiB.
        leave_out_vision: whether to use an adapter without what it changes in a vision or audio tower.
        merge_type: the type of a quantised tensor after a merge, `Q8_0` (the default) or `F16`.

    Invalid settings raise `SettingsError` when a client opens.
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
        leave_out_vision: bool | None = None,
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
            "leave_out_vision": leave_out_vision,
            "merge_type": merge_type,
        }
        self.arguments = {key: value for key, value in given.items() if value is not None}
        self._resolvers: dict[LoraSettings, Resolver] = {}
        self._lock = threading.Lock()

    @hookimpl
    def settings_model(self) -> type[LoraSettings]:
        """Return the model of this plugin's settings."""
        from graftage_lora._settings import LoraSettings

        return LoraSettings

    @hookimpl
    def resolve_adapter(self, request: ResolveRequest) -> Adapter:
        """Find, read and judge the adapter of a reference.

        Raises:
            AdapterNotFound: no source has it; `reasons` has a reason from each.
            AdapterInvalid: it was found and cannot be used.
        """
        return self._resolver(request).resolve(request)

    @hookimpl
    def list_adapters(self, request: ListAdaptersRequest) -> Iterable[AdapterInfo]:
        """List the adapters that the sources have, the broken ones among them, and the sources that cannot be read.

        Each adapter is read when the iterator reaches it: about half a second for 100 MB, the first time.
        """
        return self._resolver(request).known(request)

    @hookimpl
    def pull_adapter(self, request: PullAdapterRequest) -> AdapterInfo | None:
        """Download the adapter of a repository of Hugging Face, and bind it to a name in the user's registry.

        Raises:
            AdapterError: it cannot be downloaded or used, or its name means something else.
        """
        from graftage_lora._hub import pull

        return pull(request, self._resolver(request))

    def _resolver(self, request: ResolveRequest | ListAdaptersRequest | PullAdapterRequest) -> Resolver:
        """Return the resolver for the request's settings; it remembers the adapters that it has read."""
        from graftage.settings import load
        from graftage_lora._resolve import Resolver  # Imports NumPy.

        settings = cast("LoraSettings | None", request.settings)
        if settings is None:  # There is no client.
            settings = load(self.settings_model(), name=self.name, arguments=self.arguments).settings
        with self._lock:
            if settings not in self._resolvers:
                self._resolvers[settings] = Resolver(settings)
            return self._resolvers[settings]


plugin = LoraPlugin()
"""The installed plugin."""
