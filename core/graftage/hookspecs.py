"""The contract: every hook a plugin can implement, in the order in which things happen.

A **provider** is found through the entry-point group `graftage.providers` and loaded only when it is chosen. It
implements `connect`, which returns a **connection**: an object with the hooks of the operations it can do, each marked
with `hookimpl`. A **plugin** is found through `graftage.plugins` and may implement policies, adapters and observers.

Each hook takes one frozen object from `graftage.types` and grows by fields of that object, never by parameters. An
operation that a connection does not implement is `CapabilityUnsupported` before anything is sent. Hooks prefixed with
`a` are the async twins: without one, `AsyncClient` runs the sync hook in a thread; without the sync one, `Client`
raises `CapabilityUnsupported`. A plain hook is called in one thread of the core, from its start to the end of its
iterator, or in the caller's where the connection says that it `keeps_time`; an async one on the event loop of the
caller. Several calls may run at once. Errors are raised as `graftage.exceptions` names them; whatever else escapes is
wrapped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import pluggy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

    from graftage.settings import Settings
    from graftage.types import (
        Adapter,
        AdapterInfo,
        Capabilities,
        ChatRequest,
        Chunk,
        CloseRequest,
        ConnectRequest,
        Embeddings,
        EmbedRequest,
        Event,
        GenerateRequest,
        Health,
        HealthRequest,
        Limits,
        LimitsQuery,
        LoadAdapterRequest,
        LoadedAdapter,
        LoadedModel,
        LoadModelRequest,
        ModelInfo,
        ModelRequest,
        ModelsRequest,
        PruneAdaptersRequest,
        PullProgress,
        ResolveRequest,
        UnloadAdapterRequest,
    )

__all__ = [
    "CONNECTION_SPECS",
    "PLUGIN_SPECS",
    "PROVIDER_SPECS",
    "Chat",
    "CheckHealth",
    "Close",
    "Connect",
    "DescribeCapabilities",
    "Embed",
    "Generate",
    "ListModels",
    "LoadAdapter",
    "LoadModel",
    "LoadedModels",
    "Observe",
    "PruneAdapters",
    "PullModel",
    "ResolveAdapter",
    "ResourceLimits",
    "SettingsModel",
    "ShowModel",
    "UnloadAdapter",
    "UnloadModel",
    "hookimpl",
    "hookspec",
]

hookspec = pluggy.HookspecMarker("graftage")
hookimpl = pluggy.HookimplMarker("graftage")
"""Marks an implementation: `@hookimpl` above a method or function named like the hook."""


# --- A provider plugin: the module or object behind an entry point of `graftage.providers` ---------------------------


class Connect(Protocol):
    """What every provider plugin implements."""

    @hookspec(firstresult=True)
    def connect(self, request: ConnectRequest) -> object:
        """Called once for each client, when its provider is chosen.

        Return the connection: an object whose methods implement the hooks below. It opens nothing until an operation
        needs it, since connecting must be cheap. It may have three attributes:

        - `address`, the server's address in words, which names the slots that limits are held on;
        - `default_model`, which is asked where nobody names a model;
        - `keeps_time = True`, a promise that its plain hooks end by the limits of `request.call`. Without it they run
          in a thread of the core, which is left behind where it outlasts them.

        Raises:
            SettingsError: a setting cannot be used.

        Since 0.1.
        """
        ...


class SettingsModel(Protocol):
    """What a provider plugin implements to have settings of its own."""

    @hookspec(firstresult=True)
    def settings_model(self) -> type[Settings]:
        """Called before `connect`, to know which settings to look for.

        Return a subclass of `graftage.settings.Settings`. Without this hook the provider has the common settings.

        Since 0.1.
        """
        ...


# --- A connection: required ------------------------------------------------------------------------------------------


class Chat(Protocol):
    """Answer a conversation."""

    @hookspec(firstresult=True)
    def chat(self, request: ChatRequest) -> Iterator[Chunk]:
        """Called for each chat, streamed or not: a plain answer is a fold over the chunks.

        Return an iterator. Nothing need happen before its first `next`; closing it must stop the work. The last chunk,
        and no other, has a `finish_reason`; an end without one is a `StreamInterrupted`. Retry only what is safe, and
        only before the first chunk (`graftage.retry`). Keep to `request.call.deadline` and `request.call.timeouts`.

        Raises:
            ProviderError: whichever class fits.

        Since 0.1.
        """
        ...

    @hookspec(firstresult=True)
    def achat(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        """The async twin of `chat`. Since 0.1."""
        ...


class CheckHealth(Protocol):
    """Say how well the provider is."""

    @hookspec(firstresult=True)
    def health(self, request: HealthRequest) -> Health:
        """Called when a host asks and no fresh answer is remembered: the core caches and joins callers.

        Return how far up the levels it is well, up to `request.level` and no further; put what went wrong into
        `Health.error` instead of raising it. Do not retry.

        Since 0.1.
        """
        ...

    @hookspec(firstresult=True)
    async def ahealth(self, request: HealthRequest) -> Health:
        """The async twin of `health`. Since 0.1."""
        ...


class Close(Protocol):
    """Give everything back."""

    @hookspec(firstresult=True)
    def close(self, request: CloseRequest) -> None:
        """Called when the client is closed, perhaps twice: the second time does nothing.

        Since 0.1.
        """
        ...

    @hookspec(firstresult=True)
    async def aclose(self, request: CloseRequest) -> None:
        """The async twin of `close`. Since 0.1."""
        ...


# --- A connection: optional ------------------------------------------------------------------------------------------


class Generate(Protocol):
    """Continue a text."""

    @hookspec(firstresult=True)
    def generate(self, request: GenerateRequest) -> Iterator[Chunk]:
        """Called for each completion of a prompt; the same rules as for `chat`. Since 0.1."""
        ...

    @hookspec(firstresult=True)
    def agenerate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """The async twin of `generate`. Since 0.1."""
        ...


class Embed(Protocol):
    """Turn texts into vectors."""

    @hookspec(firstresult=True)
    def embed(self, request: EmbedRequest) -> Embeddings:
        """Called for each batch of texts. Return one vector for each input, in order. Since 0.1."""
        ...

    @hookspec(firstresult=True)
    async def aembed(self, request: EmbedRequest) -> Embeddings:
        """The async twin of `embed`. Since 0.1."""
        ...


class DescribeCapabilities(Protocol):
    """Say what the provider can do."""

    @hookspec(firstresult=True)
    def capabilities(self) -> Capabilities:
        """Called often; answer without I/O. Without this hook, the implemented hooks are the features. Since 0.1."""
        ...


class ListModels(Protocol):
    """Say which models there are."""

    @hookspec(firstresult=True)
    def list_models(self, request: ModelsRequest) -> tuple[ModelInfo, ...]:
        """Called to list the models that can be asked without a download. Since 0.1."""
        ...

    @hookspec(firstresult=True)
    async def alist_models(self, request: ModelsRequest) -> tuple[ModelInfo, ...]:
        """The async twin of `list_models`. Since 0.1."""
        ...


class ShowModel(Protocol):
    """Describe one model."""

    @hookspec(firstresult=True)
    def show_model(self, request: ModelRequest) -> ModelInfo:
        """Called to describe one model in full, arrays included.

        Raises:
            ModelNotFound: it is not there.

        Since 0.1.
        """
        ...

    @hookspec(firstresult=True)
    async def ashow_model(self, request: ModelRequest) -> ModelInfo:
        """The async twin of `show_model`. Since 0.1."""
        ...


class LoadedModels(Protocol):
    """Say which models are in memory."""

    @hookspec(firstresult=True)
    def loaded_models(self, request: ModelsRequest) -> tuple[LoadedModel, ...]:
        """Called to list what is in memory, with its size as measured. Since 0.1."""
        ...

    @hookspec(firstresult=True)
    async def aloaded_models(self, request: ModelsRequest) -> tuple[LoadedModel, ...]:
        """The async twin of `loaded_models`. Since 0.1."""
        ...


class PullModel(Protocol):
    """Download a model."""

    @hookspec(firstresult=True)
    def pull_model(self, request: ModelRequest) -> Iterator[PullProgress]:
        """Called to download a model; the core lets one pull of a model run at a time.

        Return an iterator whose last item has the status `success`; an end without it is a `StreamInterrupted`. The
        limit on it is `timeouts.idle`, between steps.

        Since 0.1.
        """
        ...

    @hookspec(firstresult=True)
    def apull_model(self, request: ModelRequest) -> AsyncIterator[PullProgress]:
        """The async twin of `pull_model`. Since 0.1."""
        ...


class LoadModel(Protocol):
    """Bring a model into memory."""

    @hookspec(firstresult=True)
    def load_model(self, request: LoadModelRequest) -> None:
        """Called to load a model with the window the next requests will have. Since 0.1."""
        ...

    @hookspec(firstresult=True)
    async def aload_model(self, request: LoadModelRequest) -> None:
        """The async twin of `load_model`. Since 0.1."""
        ...


class UnloadModel(Protocol):
    """Put a model out of memory."""

    @hookspec(firstresult=True)
    def unload_model(self, request: ModelRequest) -> None:
        """Called to free a model's memory; one that is not loaded is no error. Since 0.1."""
        ...

    @hookspec(firstresult=True)
    async def aunload_model(self, request: ModelRequest) -> None:
        """The async twin of `unload_model`. Since 0.1."""
        ...


class LoadAdapter(Protocol):
    """Make an adapter usable."""

    @hookspec(firstresult=True)
    def load_adapter(self, request: LoadAdapterRequest) -> LoadedAdapter:
        """Called when a request or `use_adapter` names an adapter that this connection has not loaded.

        Return the model to ask for, or the adapter's slot. Tell slow steps with `request.call.emit("progress", …)`.
        A model that is made for it has a name that begins with `graftage-`: it is not taken where nobody names one.

        Raises:
            AdapterUnsupported: neither this server nor this version can take it; `reasons` tells what was tried.

        Since 0.1.
        """
        ...

    @hookspec(firstresult=True)
    async def aload_adapter(self, request: LoadAdapterRequest) -> LoadedAdapter:
        """The async twin of `load_adapter`. Since 0.1."""
        ...


class UnloadAdapter(Protocol):
    """Free what an adapter holds."""

    @hookspec(firstresult=True)
    def unload_adapter(self, request: UnloadAdapterRequest) -> None:
        """Called to free an adapter's memory; it deletes nothing. Since 0.1."""
        ...

    @hookspec(firstresult=True)
    async def aunload_adapter(self, request: UnloadAdapterRequest) -> None:
        """The async twin of `unload_adapter`. Since 0.1."""
        ...


class PruneAdapters(Protocol):
    """Delete what `load_adapter` has left on the server."""

    @hookspec(firstresult=True)
    def prune_adapters(self, request: PruneAdaptersRequest) -> tuple[ModelInfo, ...]:
        """Called to list or delete the models that `load_adapter` derived, now or in earlier runs.

        Return those that were deleted, or would be. Never touch a model that is not provably of this provider's making.

        Since 0.1.
        """
        ...

    @hookspec(firstresult=True)
    async def aprune_adapters(self, request: PruneAdaptersRequest) -> tuple[ModelInfo, ...]:
        """The async twin of `prune_adapters`. Since 0.1."""
        ...


# --- Other plugins: the module or object behind an entry point of `graftage.plugins` ---------------------------------
# They are called one implementation at a time, outside the event loop.


class ResourceLimits(Protocol):
    """A policy: what the machine can take."""

    @hookspec
    def resource_limits(self, query: LimitsQuery) -> Limits | None:
        """Called before each request is admitted, one request of a server at a time; the tightest value wins.

        Return None to allow everything. A field that the caller left unset takes the limit; one that was set is
        clamped, and the reply says so. Any error but `ResourceLimitExceeded` fails the call and names the plugin.

        Raises:
            ResourceLimitExceeded: the request must not run at all.

        Since 0.1.
        """
        ...


class ResolveAdapter(Protocol):
    """Find an adapter."""

    @hookspec
    def resolve_adapter(self, request: ResolveRequest) -> Adapter | None:
        """Called when an adapter is named, resolver after resolver until one answers.

        Return None to pass. `AdapterInvalid` and `AdapterIncompatible` end the search: the reference was known, and
        the answer is no. Any other error is noted and the next resolver is asked.

        Since 0.1.
        """
        ...

    @hookspec
    def list_adapters(self) -> Iterable[AdapterInfo]:
        """Called to list the adapters that this plugin knows of. Since 0.1."""
        ...


class Observe(Protocol):
    """Watch what happens."""

    @hookspec
    def observe(self, event: Event) -> None:
        """Called for each event, on the caller's thread: be quick. An observer that raises is reported and dropped.

        Since 0.1.
        """
        ...


PROVIDER_SPECS = (Connect, SettingsModel)
CONNECTION_SPECS = (
    Chat,
    CheckHealth,
    Close,
    Generate,
    Embed,
    DescribeCapabilities,
    ListModels,
    ShowModel,
    LoadedModels,
    PullModel,
    LoadModel,
    UnloadModel,
    LoadAdapter,
    UnloadAdapter,
    PruneAdapters,
)
PLUGIN_SPECS = (ResourceLimits, ResolveAdapter, Observe)
