"""How each server takes an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from graftage.exceptions import AdapterUnsupported

if TYPE_CHECKING:
    from graftage.calls import LoadAdapterRequest, UnloadAdapterRequest
    from graftage.http import Http
    from graftage.types import LoadedAdapter
    from graftage_openai._profiles import Profile

__all__ = ["Adapters"]


class Adapters:
    """The adapters of one connection."""

    def __init__(self, http: Http, api: str) -> None:
        self._http = http
        self._api = api

    async def load(self, request: LoadAdapterRequest, profile: Profile) -> LoadedAdapter:
        """Make an adapter usable.

        Raises:
            AdapterUnsupported: this server takes no adapters.
        """
        raise AdapterUnsupported(
            f"{profile.name or 'This server'} takes no adapters.", reference=request.adapter.name, hint="Use another."
        )

    async def unload(self, request: UnloadAdapterRequest) -> None:
        """Free an adapter's memory."""

    def body(self, adapter: LoadedAdapter | None, profile: Profile) -> Mapping[str, object]:  # noqa: ARG002
        """Return the fields to add to each chat and completion."""
        return {}
