"""The contract: every hook that a plugin can implement, in the order in which the core calls them.

A **provider** is found through the entry-point group `graftage.providers` and loaded only when it is chosen. It
implements `connect`, which returns a **connection**: an object with a hook for each operation that it supports, each
marked with `hookimpl`. A **plugin** is found through `graftage.plugins` and may implement policies, adapters and
observers.

Each hook takes one frozen object from `graftage.calls` and grows by fields of that object, never by parameters. An
operation that a connection does not implement raises `CapabilityUnsupported` before anything is sent. Several calls may
run at the same time. Raise the classes of `graftage.exceptions`; the core wraps any other error.

**Write each operation once**: both clients use it, whether it is sync or async.

- `async def` that awaits only the toolkit, `graftage.http` and `request.call` (for a stream, an async generator). An
  async client awaits it. Under a sync client the toolkit's coroutines block and never suspend.
- `async def` that awaits anything else. Set `needs_event_loop = True` on the connection: its hooks then run on one
  event loop in the background, under both clients.
- `def` (for a stream, a generator). It runs in a thread of the core until its iterator ends. It does not have to keep
  time limits, because the call does not wait for it after they pass.

All other hooks are `def`. The core calls them in the thread that needs them.

**The contract has a number**, `CONTRACT`. A plugin may declare the one it was written for, as `graftage_contract = 1`
in the module or on the object behind its entry point; without that it is 1. A plugin with a number that this core does
not support is left out when it is registered, with both numbers in the error. The number grows when plugins that worked
must be changed: a hook or a field was removed, or means something else. A new hook, a new field and a new error do not
change it. What is deprecated works for two more minor releases, and warns at its author's own line.
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
        PullAdapterRequest,
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
        Warmed,
    )

    T = TypeVar("T")
    Once: TypeAlias = T | Awaitable[T]
    Stream: TypeAlias = Iterator[T] | AsyncIterator[T]

__all__ = [
    "CONNECTION_SPECS",
    "CONTRACT",
    "OLDEST_CONTRACT",
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
    "LocalAddresses",
    "MakeHttp",
    "Native",
    "Observe",
    "PruneAdapters",
    "PullAdapter",
    "PullModel",
    "Rerank",
    "ResolveAdapter",
    "ResourceLimits",
    "SettingsModel",
    "ShowModel",
    "UnloadAdapter",
    "UnloadModel",
    "Warm",
    "hookimpl",
    "hookspec",
]

CONTRACT = 1
"""The number of the contract on this page."""
OLDEST_CONTRACT = 1
"""The oldest number whose plugins this core still takes."""

hookspec = pluggy.HookspecMarker("graftage")
hookimpl = pluggy.HookimplMarker("graftage")
"""Mark an implementation: write `@hookimpl` above a method or function that has the hook's name."""


class MakeHttp(Protocol):
    """The type of `ConnectRequest.http`."""

    def __call__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str] | None = None,
        refusal: Refusal | None = None,
        server: str = "the server",
        transport: Callable[[Callable[[], Transport]], Transport] | None = None,
    ) -> Http:
        """Make an HTTP client for one server. It opens nothing before its first request. The core closes it.

        Args:
            base_url: scheme, host, port, and a path that goes before the path of each request. A user and a password
                in it are sent as Basic authorization.
            headers: sent with each request, in addition to `api_key` as a bearer token and `headers` of the settings.
            refusal: maps error responses to errors; if it returns None, the status decides.
            server: the server's name in messages, such as `Ollama`.
            transport: builds a custom transport that replaces the network. Its argument is a function that makes the
                network's transport, sync or async as the client is.

        Raises:
            SettingsError: `base_url` is not an http or https URL, has a query or a fragment, or has a password that
                would be sent without encryption.
        """
        ...


def _no_http(base_url: str, **_: object) -> Http:  # noqa: ARG001 - the shape is `MakeHttp`'s
    raise RuntimeError("`http` needs the core: a `ConnectRequest` made elsewhere must set it")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectRequest:
    """The argument of `connect`."""

    name: str
    """The provider's plugin name, or the name of the instance."""
    settings: Settings
    """An instance of the class from `settings_model`."""
    http: MakeHttp = field(default=_no_http, repr=False)
    """Make the toolkit's HTTP client for a server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswersRequest:
    """The argument of `answers`."""

    name: str
    """The provider's plugin name, or the name of the instance."""
    settings: Settings
    """An instance of the class from `settings_model`."""
    given: frozenset[str] = frozenset()
    """The names of the settings that the user gave to Graftage: by an argument, one of its variables, or its file.
    Settings from the variables of other tools are not included, and for a named instance `host` is not: `auto` never
    takes one that is not on this machine."""


# --- A provider plugin: the module or object behind an entry point of `graftage.providers` ---------------------------


class Connect(Protocol):
    """Open a provider. Every provider plugin implements this hook."""

    @hookspec(firstresult=True)
    def connect(self, request: ConnectRequest) -> object:
        """Called once for each client, when its provider is chosen.

        Return the connection: an object whose methods implement the hooks below. Connecting must be cheap, so open
        nothing before an operation needs it. The connection may have three attributes:

        - `address`: the server's address as text; connections with the same address share their limits;
        - `default_model`: the model to use if neither the caller nor the settings name one;
        - `needs_event_loop = True`: its hooks await more than the toolkit.

        Raises:
            SettingsError: a setting cannot be used.

        Since 0.1.
        """
        ...


class SettingsModel(Protocol):
    """Declare settings, for a provider or any other plugin."""

    @hookspec(firstresult=True)
    def settings_model(self) -> type[PluginSettings]:
        """Called once for each client, before its settings are read.

        A provider returns a subclass of `graftage.settings.Settings` and receives an instance in `ConnectRequest`.
        Without this hook it has the common settings. Another plugin returns a subclass of `PluginSettings` and receives
        an instance in each request. The plugin must not keep it, because clients have different settings. A plugin
        object may have `arguments`, a mapping of the settings that the host application passed to its constructor: they
        win over all other sources.

        Since 0.1.
        """
        ...


class Answers(Protocol):
    """Take part in the choice of a provider if the user has not named one."""

    @hookspec(firstresult=True)
    def answers(self, request: AnswersRequest) -> int | None:
        """Called if no provider was named. The core takes the highest rank whose `health` is ok at the level `api`.

        Return a rank, or None to decline. Send nothing here: `health` asks the server. Prompts must not leave this
        machine without the user's consent, so return None for a remote address unless `host` is in `request.given`.

        Since 0.1.
        """
        ...


class LocalAddresses(Protocol):
    """Name the addresses at which servers of this kind usually listen on this machine."""

    @hookspec(firstresult=True)
    def local_addresses(self) -> tuple[str, ...]:
        """Called by `graftage providers --scan`, which connects to each address with the setting `host`.

        Return URLs on loopback, without I/O: the ports that the servers have by default.

        Since 0.3.
        """
        ...


# --- A connection: `chat` is required, the others are optional -------------------------------------------------------


class Chat(Protocol):
    """Reply to a conversation."""

    @hookspec(firstresult=True)
    def chat(self, request: ChatRequest) -> Stream[Chunk]:
        """Called for each chat, streamed or not: the core joins the chunks into a whole reply.

        Return an iterator. It may do nothing before the first `next`; closing it must stop the work. Only the last
        chunk has a `finish_reason`; an end without one becomes `StreamInterrupted`. Retry only what is safe, and only
        before the first chunk (`graftage.retry`). Keep `request.call.deadline` and `request.call.timeouts`.

        With the feature `adapter_weights`, apply each of `request.adapter.weights` and no other adapter.

        Raises:
            ProviderError: the class that fits best.
            AdapterError: with `retryable`, the server has lost the adapter or has replaced it. Before the first chunk,
                the core then loads it again and calls this hook once more, as after a `ModelNotFound` for its model.

        Since 0.1.
        """
        ...


class CheckHealth(Protocol):
    """Check the provider. Without this hook the core uses `list_models`, `loaded_models`, and a chat of one token."""

    @hookspec(firstresult=True)
    def health(self, request: HealthRequest) -> Once[Health]:
        """Called for a health check, unless the core has a fresh result.

        Check the levels up to `request.level` and no further. Return a failure in `Health.error` instead of raising it.
        Do not retry.

        Since 0.1.
        """
        ...


class Close(Protocol):
    """Close the connection. The core closes the toolkit's HTTP clients even without this hook."""

    @hookspec(firstresult=True)
    def close(self, request: CloseRequest) -> Once[None]:
        """Called when the client is closed. A second call must do nothing.

        Since 0.1.
        """
        ...


class Generate(Protocol):
    """Continue a text."""

    @hookspec(firstresult=True)
    def generate(self, request: GenerateRequest) -> Stream[Chunk]:
        """Called for each completion of a prompt. The rules of `chat` apply. Since 0.1."""
        ...


class Embed(Protocol):
    """Turn texts into vectors."""

    @hookspec(firstresult=True)
    def embed(self, request: EmbedRequest) -> Once[Embeddings]:
        """Called for each batch of inputs. Return one vector for each input, in order. Since 0.1."""
        ...


class CountTokens(Protocol):
    """Count the tokens of a conversation."""

    @hookspec(firstresult=True)
    def count_tokens(self, request: ChatRequest) -> Once[int]:
        """Called to count the tokens that the model would read for this chat, including its template and tools.

        Generate as few tokens as the server allows. Never estimate.

        Raises:
            ContextOverflow: the conversation does not fit, and the server counts only the part that fits.
            CapabilityUnsupported: this server cannot count tokens.

        Since 0.2.
        """
        ...


class Rerank(Protocol):
    """Score how well each document answers a query."""

    @hookspec(firstresult=True)
    def rerank(self, request: RerankRequest) -> Once[Ranking]:
        """Called to rank documents. Return each document once, in any order: the core sorts them. Since 0.2."""
        ...


class DescribeCapabilities(Protocol):
    """List what the provider can do."""

    @hookspec(firstresult=True)
    def capabilities(self) -> Capabilities:
        """Called often; return without I/O.

        The core adds a feature for each implemented hook. Without this hook, those are the only features.

        Since 0.1.
        """
        ...


class ListModels(Protocol):
    """List the available models."""

    @hookspec(firstresult=True)
    def list_models(self, request: ModelsRequest) -> Once[tuple[ModelInfo, ...]]:
        """Called to list the models that can be used without a download. Since 0.1."""
        ...


class ShowModel(Protocol):
    """Describe one model."""

    @hookspec(firstresult=True)
    def show_model(self, request: ModelRequest) -> Once[ModelInfo]:
        """Called to describe one model in full, including arrays.

        Raises:
            ModelNotFound: the server does not have it.

        Since 0.1.
        """
        ...


class LoadedModels(Protocol):
    """List the models in memory."""

    @hookspec(firstresult=True)
    def loaded_models(self, request: ModelsRequest) -> Once[tuple[LoadedModel, ...]]:
        """Called to list the models in memory, with their measured sizes. Since 0.1."""
        ...


class PullModel(Protocol):
    """Download a model."""

    @hookspec(firstresult=True)
    def pull_model(self, request: ModelRequest) -> Stream[PullProgress]:
        """Called to download a model. The core runs one pull of a model at a time.

        Return an iterator whose last item has the status `success`; an end without it becomes `StreamInterrupted`. The
        only time limit is `timeouts.idle`, between two steps.

        Since 0.1.
        """
        ...


class LoadModel(Protocol):
    """Load a model into memory."""

    @hookspec(firstresult=True)
    def load_model(self, request: LoadModelRequest) -> Once[None]:
        """Called to load a model with the window that the next requests will have. Since 0.1."""
        ...


class UnloadModel(Protocol):
    """Unload a model from memory."""

    @hookspec(firstresult=True)
    def unload_model(self, request: ModelRequest) -> Once[None]:
        """Called to free a model's memory. Do nothing if it is not loaded. Since 0.1."""
        ...


class DeleteModel(Protocol):
    """Delete a model."""

    @hookspec(firstresult=True)
    def delete_model(self, request: ModelRequest) -> Once[None]:
        """Called to delete a model from disk and memory. Keep what another model needs.

        Raises:
            ModelNotFound: the server does not have it.

        Since 0.2.
        """
        ...


class LoadAdapter(Protocol):
    """Load an adapter."""

    @hookspec(firstresult=True)
    def load_adapter(self, request: LoadAdapterRequest) -> Once[LoadedAdapter]:
        """Called when a request or `use_adapter` names an adapter that this connection has not loaded.

        Return the model to request, or the adapter's slot. Report slow steps with `request.call.emit("progress", …)`.
        It may be loaded already: look at the server, not at what an earlier call has left in memory. The core adds the
        verdict's warnings to replies.
        If you create a model for it, begin its name with `graftage-`, so that it never becomes the default model.

        Raises:
            AdapterUnsupported: the server cannot load it; `reasons` lists what was tried.

        Since 0.1.
        """
        ...


class UnloadAdapter(Protocol):
    """Unload an adapter from memory."""

    @hookspec(firstresult=True)
    def unload_adapter(self, request: UnloadAdapterRequest) -> Once[None]:
        """Called to free an adapter's memory. Delete nothing. Since 0.1."""
        ...


class PruneAdapters(Protocol):
    """Delete the models that `load_adapter` has left on the server."""

    @hookspec(firstresult=True)
    def prune_adapters(self, request: PruneAdaptersRequest) -> Once[tuple[ModelInfo, ...]]:
        """Called to list or delete the models that `load_adapter` created, in this run or an earlier one.

        Return the models that were deleted, or would be. Touch only models that this provider provably created.

        Since 0.1.
        """
        ...


class Warm(Protocol):
    """Read a prompt ahead."""

    @hookspec(firstresult=True)
    def warm(self, request: ChatRequest) -> Once[Warmed]:
        """Called to read the beginning of later prompts, and to keep what was computed, if possible on disk.

        Without this hook the core sends the messages as a chat with a reply of one token. What was computed with one
        adapter, weight or window must never be used with another.

        Since 0.3.
        """
        ...


class Native(Protocol):
    """Return the server's official client."""

    @hookspec(firstresult=True)
    def native(self, request: NativeRequest) -> Once[object]:
        """Called when a host application needs something that the contract does not have.

        Return the server's official client, sync or async as the Graftage client is. Build it on
        `Http.httpx_transport()`, so that it keeps the limits of the settings and sends keys to this server only. The
        host application owns it.

        Since 0.1.
        """
        ...


# --- Other plugins: the module or object behind an entry point of `graftage.plugins` ---------------------------------
# The core calls one implementation at a time, outside the event loop.


class ResourceLimits(Protocol):
    """Limit what a request may use of the machine: a policy."""

    @hookspec
    def resource_limits(self, query: LimitsQuery) -> Limits | None:
        """Called before a request is admitted, for one request of a server at a time. The lowest value wins.

        Return None to allow everything, or `NEVER_APPLIES` to opt out for this connection. A field that the caller left
        unset takes the limit. A larger value is lowered to the limit, and the reply warns of it. Any error except
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
        """Called when a call names an adapter, one resolver after another until one returns it.

        Return None if the reference is unknown. `AdapterInvalid` and `AdapterIncompatible` end the search: the
        reference is known, but cannot be used. The core notes any other error and asks the next resolver.

        Since 0.1.
        """
        ...

    @hookspec
    def list_adapters(self, request: ListAdaptersRequest) -> Iterable[AdapterInfo]:
        """Called to list the adapters that this plugin knows. Since 0.1."""
        ...


class PullAdapter(Protocol):
    """Download an adapter."""

    @hookspec
    def pull_adapter(self, request: PullAdapterRequest) -> AdapterInfo | None:
        """Called to download an adapter, one resolver after another until one does it; never without a caller's wish.

        Return None if the reference is not of this plugin's kind. Report progress with
        `request.call.emit("progress", …)`.

        Since 0.3.
        """
        ...


class Observe(Protocol):
    """Watch the events of a client."""

    @hookspec
    def observe(self, event: Event) -> None:
        """Called for each event, in order within a call. The core reports and drops an observer that raises.

        It runs in a thread of the core, one event of a client after another, with the context variables of the caller.
        It may block, and no call waits for it. An observer that falls far behind misses all events of some calls;
        `Client.stats` counts them. `close` and the end of the process wait up to half a second for events that are not
        delivered yet.

        Since 0.1.
        """
        ...


PROVIDER_SPECS = (Connect, SettingsModel, Answers, LocalAddresses)
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
    Warm,
    Native,
)
PLUGIN_SPECS = (SettingsModel, ResourceLimits, ResolveAdapter, PullAdapter, Observe)
