"""The contract: every hook a plugin can implement, in the order in which things happen.

A **provider** is found through the entry-point group `graftage.providers` and loaded only when it is chosen. It
implements `connect`, which returns a **connection**: an object with the hooks of the operations it can do, each marked
with `hookimpl`. A **plugin** is found through `graftage.plugins` and may implement policies, adapters and observers.

Each hook takes one frozen object from `graftage.calls` and grows by fields of that object, never by parameters. An
operation that a connection does not implement is `CapabilityUnsupported` before anything is sent. Several calls may run
at once. Errors are raised as `graftage.exceptions` names them; whatever else escapes is wrapped.

**One hook, one name, one colour**: an author writes each operation of a connection once, and both clients use it.

- `async def` (for a stream an async generator) on the toolkit, `graftage.http` and `request.call`: awaited by an async
  client; under a sync one the toolkit's coroutines block, and never suspend.
- `async def` that awaits something of its own: the connection says so with `needs_event_loop = True`, and runs on one
  event loop in the background, under both clients.
- `def` (for a stream a generator): in a thread of the core, from its start to the end of its iterator. The call does
  not wait for it past its limits, so it need not keep them.

All other hooks are `def`, and are called where their caller is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

import pluggy

from graftage._records import dataclass

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Mapping

    from graftage.calls import (
        ChatRequest,
        CloseRequest,
        EmbedRequest,
        Event,
        GenerateRequest,
        HealthRequest,
        LimitsQuery,
        ListAdaptersRequest,
        LoadAdapterRequest,
        LoadModelRequest,
        ModelRequest,
        ModelsRequest,
        NativeRequest,
        PruneAdaptersRequest,
        RerankRequest,
        ResolveRequest,
        UnloadAdapterRequest,
    )
    from graftage.http import Http, Refusal, Transport
    from graftage.settings import PluginSettings, Settings
    from graftage.types import (
        Adapter,
        AdapterInfo,
        Capabilities,
        Chunk,
        Embeddings,
        Health,
        Limits,
        LoadedAdapter,
        LoadedModel,
        ModelInfo,
        PullProgress,
        Ranking,
    )

    T = TypeVar("T")
    Once: TypeAlias = T | Awaitable[T]
    Stream: TypeAlias = Iterator[T] | AsyncIterator[T]

__all__ = [
    "CONNECTION_SPECS",
    "PLUGIN_SPECS",
    "PROVIDER_SPECS",
    "Answers",
    "AnswersRequest",
    "Chat",
    "CheckHealth",
    "Close",
    "Connect",
    "ConnectRequest",
    "CountTokens",
    "DeleteModel",
    "DescribeCapabilities",
    "Embed",
    "Generate",
    "ListModels",
    "LoadAdapter",
    "LoadModel",
    "LoadedModels",
    "MakeHttp",
    "Native",
    "Observe",
    "PruneAdapters",
    "PullModel",
    "Rerank",
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


class MakeHttp(Protocol):
    """What `ConnectRequest.http` is."""

    def __call__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str] | None = None,
        refusal: Refusal | None = None,
        server: str = "the server",
        transport: Callable[[Callable[[], Transport]], Transport] | None = None,
    ) -> Http:
        """A client for one server, closed with the connection; it opens nothing until the first request.

        Args:
            base_url: scheme, host, port, and a path that is put before that of each request. A user and a password in
                it are sent as Basic authorization.
            headers: sent with each request, besides `api_key` as a bearer token and `headers` of the settings.
            refusal: the author's own table of errors; what it passes is typed by the status.
            server: who refuses, for messages: `Ollama`.
            transport: builds the author's own transport, which stands in the place of the network; it is given what
                makes the network, in the colour of the client.

        Raises:
            SettingsError: `base_url` is no http or https URL, has a query or a fragment, or a password that would go in
                clear.
        """
        ...


def _no_http(base_url: str, **_: object) -> Http:  # noqa: ARG001 - the shape is `MakeHttp`'s
    raise RuntimeError("the core makes the clients of a connection; this request is none of its making")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectRequest:
    """What `connect` is asked."""

    name: str
    """The provider's plugin name."""
    settings: Settings
    """An instance of what `settings_model` returned."""
    http: MakeHttp = field(default=_no_http, repr=False)
    """Makes a client of the toolkit for a server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswersRequest:
    """What `answers` is asked."""

    name: str
    """The provider's plugin name."""
    settings: Settings
    """An instance of what `settings_model` returned."""
    given: frozenset[str] = frozenset()
    """The settings that were given to Graftage: by an argument, a variable of its own, or its file. What comes from the
    variable of another tool is not among them."""


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
        - `needs_event_loop = True`, where its hooks await more than the toolkit.

        Raises:
            SettingsError: a setting cannot be used.

        Since 0.1.
        """
        ...


class SettingsModel(Protocol):
    """What a provider or any other plugin implements to have settings of its own."""

    @hookspec(firstresult=True)
    def settings_model(self) -> type[PluginSettings]:
        """Called once for each client, to know which settings to look for.

        A provider returns a subclass of `graftage.settings.Settings`, and finds an instance in `ConnectRequest`;
        without this hook it has the common settings. Another plugin returns a subclass of `PluginSettings`, and finds
        an instance in each of its requests: clients differ, so its object keeps none. What a host gave to the object
        when it built it stands in the object's `arguments`, a mapping, and wins over all other sources.

        Since 0.1.
        """
        ...


class Answers(Protocol):
    """What a provider plugin implements to be found where nobody chose a provider."""

    @hookspec(firstresult=True)
    def answers(self, request: AnswersRequest) -> int | None:
        """Called where nobody chose; the provider with the highest rank whose `health` is well at `api` is taken.

        Return a rank, or None for "not me". A server is asked by `health`, not here. No prompt may leave this machine
        unless its user said so: an address elsewhere has no rank unless `host` is in `request.given`.

        Since 0.1.
        """
        ...


# --- A connection: `chat` is required, and all else is optional ------------------------------------------------------


class Chat(Protocol):
    """Answer a conversation."""

    @hookspec(firstresult=True)
    def chat(self, request: ChatRequest) -> Stream[Chunk]:
        """Called for each chat, streamed or not: a plain answer is a fold over the chunks.

        Return an iterator. Nothing need happen before its first `next`; closing it must stop the work. The last chunk,
        and no other, has a `finish_reason`; an end without one is a `StreamInterrupted`. Retry only what is safe, and
        only before the first chunk (`graftage.retry`). Keep to `request.call.deadline` and `request.call.timeouts`.

        Raises:
            ProviderError: whichever class fits.

        Since 0.1.
        """
        ...


class CheckHealth(Protocol):
    """Say how well the provider is. Without this hook `list_models` tells, `loaded_models`, and a chat of one token."""

    @hookspec(firstresult=True)
    def health(self, request: HealthRequest) -> Once[Health]:
        """Called when a host asks and no fresh answer is remembered: the core caches and joins callers.

        Return how far up the levels it is well, up to `request.level` and no further; put what went wrong into
        `Health.error` instead of raising it. Do not retry.

        Since 0.1.
        """
        ...


class Close(Protocol):
    """Give everything back. Clients of the toolkit are closed without it."""

    @hookspec(firstresult=True)
    def close(self, request: CloseRequest) -> Once[None]:
        """Called when the client is closed, perhaps twice: the second time does nothing.

        Since 0.1.
        """
        ...


class Generate(Protocol):
    """Continue a text."""

    @hookspec(firstresult=True)
    def generate(self, request: GenerateRequest) -> Stream[Chunk]:
        """Called for each completion of a prompt; the same rules as for `chat`. Since 0.1."""
        ...


class Embed(Protocol):
    """Turn texts into vectors."""

    @hookspec(firstresult=True)
    def embed(self, request: EmbedRequest) -> Once[Embeddings]:
        """Called for each batch of texts. Return one vector for each input, in order. Since 0.1."""
        ...


class CountTokens(Protocol):
    """Say how long a conversation is."""

    @hookspec(firstresult=True)
    def count_tokens(self, request: ChatRequest) -> Once[int]:
        """Called to count the tokens of what `chat` would be asked, template and tools included.

        Return what the model would read. Generate nothing that can be left out; never guess.

        Raises:
            ContextOverflow: the conversation does not fit, and the server counts only what does.
            CapabilityUnsupported: this server cannot tell.

        Since 0.2.
        """
        ...


class Rerank(Protocol):
    """Say how well each of several texts answers a query."""

    @hookspec(firstresult=True)
    def rerank(self, request: RerankRequest) -> Once[Ranking]:
        """Called to rank documents. Return each of them once, in any order: the core sorts. Since 0.2."""
        ...


class DescribeCapabilities(Protocol):
    """Say what the provider can do."""

    @hookspec(firstresult=True)
    def capabilities(self) -> Capabilities:
        """Called often; answer without I/O.

        Return what the hooks do not show: the features that are implemented hooks are added. Without this hook they are
        all there is.

        Since 0.1.
        """
        ...


class ListModels(Protocol):
    """Say which models there are."""

    @hookspec(firstresult=True)
    def list_models(self, request: ModelsRequest) -> Once[tuple[ModelInfo, ...]]:
        """Called to list the models that can be asked without a download. Since 0.1."""
        ...


class ShowModel(Protocol):
    """Describe one model."""

    @hookspec(firstresult=True)
    def show_model(self, request: ModelRequest) -> Once[ModelInfo]:
        """Called to describe one model in full, arrays included.

        Raises:
            ModelNotFound: it is not there.

        Since 0.1.
        """
        ...


class LoadedModels(Protocol):
    """Say which models are in memory."""

    @hookspec(firstresult=True)
    def loaded_models(self, request: ModelsRequest) -> Once[tuple[LoadedModel, ...]]:
        """Called to list what is in memory, with its size as measured. Since 0.1."""
        ...


class PullModel(Protocol):
    """Download a model."""

    @hookspec(firstresult=True)
    def pull_model(self, request: ModelRequest) -> Stream[PullProgress]:
        """Called to download a model; the core lets one pull of a model run at a time.

        Return an iterator whose last item has the status `success`; an end without it is a `StreamInterrupted`. The
        limit on it is `timeouts.idle`, between steps.

        Since 0.1.
        """
        ...


class LoadModel(Protocol):
    """Bring a model into memory."""

    @hookspec(firstresult=True)
    def load_model(self, request: LoadModelRequest) -> Once[None]:
        """Called to load a model with the window the next requests will have. Since 0.1."""
        ...


class UnloadModel(Protocol):
    """Put a model out of memory."""

    @hookspec(firstresult=True)
    def unload_model(self, request: ModelRequest) -> Once[None]:
        """Called to free a model's memory; one that is not loaded is no error. Since 0.1."""
        ...


class DeleteModel(Protocol):
    """Delete a model."""

    @hookspec(firstresult=True)
    def delete_model(self, request: ModelRequest) -> Once[None]:
        """Called to delete a model from the disk, and from memory. Delete nothing that another model needs.

        Raises:
            ModelNotFound: it is not there.

        Since 0.2.
        """
        ...


class LoadAdapter(Protocol):
    """Make an adapter usable."""

    @hookspec(firstresult=True)
    def load_adapter(self, request: LoadAdapterRequest) -> Once[LoadedAdapter]:
        """Called when a request or `use_adapter` names an adapter that this connection has not loaded.

        Return the model to ask for, or the adapter's slot. Tell slow steps with `request.call.emit("progress", …)`.
        A model that is made for it has a name that begins with `graftage-`: it is not taken where nobody names one.

        Raises:
            AdapterUnsupported: neither this server nor this version can take it; `reasons` tells what was tried.

        Since 0.1.
        """
        ...


class UnloadAdapter(Protocol):
    """Free what an adapter holds."""

    @hookspec(firstresult=True)
    def unload_adapter(self, request: UnloadAdapterRequest) -> Once[None]:
        """Called to free an adapter's memory; it deletes nothing. Since 0.1."""
        ...


class PruneAdapters(Protocol):
    """Delete what `load_adapter` has left on the server."""

    @hookspec(firstresult=True)
    def prune_adapters(self, request: PruneAdaptersRequest) -> Once[tuple[ModelInfo, ...]]:
        """Called to list or delete the models that `load_adapter` derived, now or in earlier runs.

        Return those that were deleted, or would be. Never touch a model that is not provably of this provider's making.

        Since 0.1.
        """
        ...


class Native(Protocol):
    """Hand out the server's own client."""

    @hookspec(firstresult=True)
    def native(self, request: NativeRequest) -> Once[object]:
        """Called when a host wants what the contract does not have.

        Return the official client of the server, sync or async as the client is, on `Http.httpx_transport()`: so it
        keeps the limits of the settings and sends keys nowhere else. It is the host's from then on.

        Since 0.1.
        """
        ...


# --- Other plugins: the module or object behind an entry point of `graftage.plugins` ---------------------------------
# They are called one implementation at a time, outside the event loop.


class ResourceLimits(Protocol):
    """A policy: what the machine can take."""

    @hookspec
    def resource_limits(self, query: LimitsQuery) -> Limits | None:
        """Called before each request is admitted, one request of a server at a time; the tightest value wins.

        Return None to allow everything, or `NEVER_APPLIES` to be asked no more on this connection. A field that the
        caller left unset takes the limit; one that was set is clamped, and the reply says so. Any error but
        `ResourceLimitExceeded` fails the call and names the plugin.

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
    def list_adapters(self, request: ListAdaptersRequest) -> Iterable[AdapterInfo]:
        """Called to list the adapters that this plugin knows of. Since 0.1."""
        ...


class Observe(Protocol):
    """Watch what happens."""

    @hookspec
    def observe(self, event: Event) -> None:
        """Called for each event, those of a call in their order. An observer that raises is reported and dropped.

        It is called in a thread of Graftage's, one event of a client after the other, with the context variables of the
        call's caller: it may block, and no call waits for it. One that falls far behind is not told of whole calls,
        which `Client.stats` counts. `close` waits half a second until everything is told, and so does the end of the
        process. Since 0.1.
        """
        ...


PROVIDER_SPECS = (Connect, SettingsModel, Answers)
CONNECTION_SPECS = (
    Chat,
    CheckHealth,
    Close,
    Generate,
    Embed,
    CountTokens,
    Rerank,
    DescribeCapabilities,
    ListModels,
    ShowModel,
    LoadedModels,
    PullModel,
    LoadModel,
    UnloadModel,
    DeleteModel,
    LoadAdapter,
    UnloadAdapter,
    PruneAdapters,
    Native,
)
PLUGIN_SPECS = (SettingsModel, ResourceLimits, ResolveAdapter, Observe)
