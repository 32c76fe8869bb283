"""One connection to a server: every hook of the contract, built on `graftage.http`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

from graftage.calls import (
    Call,
    ChatRequest,
    EmbedRequest,
    GenerateRequest,
    HealthRequest,
    LoadAdapterRequest,
    ModelRequest,
    ModelsRequest,
    UnloadAdapterRequest,
)
from graftage.exceptions import (
    AuthenticationFailed,
    CapabilityUnsupported,
    ConnectionFailed,
    ModelNotFound,
    Overloaded,
    ProviderError,
    ProviderTimeout,
    RequestRejected,
    StreamInterrupted,
)
from graftage.hookspecs import hookimpl
from graftage.types import (
    Capabilities,
    Chunk,
    Embeddings,
    Health,
    LoadedAdapter,
    LoadedModel,
    Message,
    ModelInfo,
    canonical_name,
)
from graftage_openai import _convert
from graftage_openai._adapters import Adapters
from graftage_openai._profiles import HOSTS, PROFILES, UNKNOWN, WIDEST, OpenAISettings, Profile, parse_host, recognise

if TYPE_CHECKING:
    from graftage.hookspecs import ConnectRequest

__all__ = ["OpenAIConnection"]

T = TypeVar("T")
LOOK: Final = 2.0
"""Seconds to find out which server it is."""
PASSING: Final = (AuthenticationFailed, ConnectionFailed, Overloaded, ProviderTimeout)
"""Errors after which the server is asked again, at the next call."""


class OpenAIConnection:
    """The hooks of a connection. It opens nothing until the first request."""

    def __init__(self, request: ConnectRequest, settings: OpenAISettings) -> None:
        root, self._api = parse_host(settings.host)
        self._http = request.http(root, refusal=_convert.refusal)
        self.address = self._http.base_url
        self._known = PROFILES[settings.profile] if settings.profile else HOSTS.get(urlsplit(root).hostname or "")
        self.default_model = self._known.default_model if self._known else None
        self._adapters = Adapters(self._http, self._api)
        self._learned = _convert.Learned()

    @hookimpl
    def capabilities(self) -> Capabilities:
        known = self._known or WIDEST
        return Capabilities(features=known.features, options=known.options, parameters=frozenset({"max_tokens"}))

    async def _profile(self, call: Call) -> Profile:
        """Return what the server can do; ask it once which it is."""
        if self._known is None:
            soon = replace(call, attempts=1, deadline=min(call.deadline, time.monotonic() + LOOK))
            try:
                found = await self._get(f"{self._api}/models", soon, recognise)
            except PASSING:
                return UNKNOWN
            except ProviderError:
                found = None
            self._known = found or UNKNOWN
        return self._known
