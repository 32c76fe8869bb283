"""What type checkers see of the public API. Only mypy reads this file, and fails on a wrong type."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Mapping
from pathlib import Path
from typing import Any, assert_type

from pydantic import BaseModel

import graftage
from graftage.calls import (
    ChatRequest,
    CloseRequest,
    EmbedRequest,
    Event,
    HealthRequest,
    LimitsQuery,
    ListAdaptersRequest,
    ModelsRequest,
    ResolveRequest,
)
from graftage.exceptions import GraftageError, ProviderTimeout
from graftage.hookspecs import (
    Chat,
    CheckHealth,
    Close,
    Connect,
    ConnectRequest,
    DescribeCapabilities,
    Embed,
    ListModels,
    Observe,
    ResolveAdapter,
    ResourceLimits,
    SettingsModel,
    hookimpl,
)
from graftage.settings import Settings
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
    Message,
    ModelInfo,
    PullProgress,
    Ranked,
    Ranking,
    Reply,
    Stats,
    Step,
    Timeouts,
    Vectors,
    Warmed,
)


class City(BaseModel):
    """The format of a reply."""

    name: str


def look_up(name: str) -> str:
    """Look something up."""
    return name


def show(step: PullProgress) -> None:
    """Watch a download."""
    assert_type(step.completed, int | None)


def watch(step: Step) -> None:
    """Watch a run of tools."""
    assert_type(step.errors, Mapping[str, str])


async def take(name: str, arguments: dict[str, Any]) -> str:
    """Call a tool."""
    return f"{name} {arguments}"


class HostError(Exception):
    """The host's error."""


def translate(error: GraftageError) -> Exception:
    """Make the host's error of one of ours."""
    return HostError(str(error))


# --- A host ----------------------------------------------------------------------------------------------------------


def sync_host(streamed: bool) -> None:
    """Use every method of `Client`."""
    with graftage.connect("ollama", model="m", timeouts=Timeouts(total=3), translate_error=translate) as llm:
        assert_type(llm, graftage.Client)
        assert_type(llm.chat("x"), Reply)
        assert_type(llm.chat("x", stream=False), Reply)
        assert_type(llm.generate("x", suffix="y", raw=True), Reply)
        assert_type(llm.chat([Message(role="user", content="x"), {"role": "user", "content": "y"}]), Reply)
        assert_type(llm.chat("x", tools=[look_up], format=City, images=[Path("a.png"), b""], timeout=3), Reply)
        assert_type(llm.chat("x", tools=[look_up], tool_choice="look_up").messages, tuple[Message, ...])
        assert_type(graftage.run_tools(llm, "x", [look_up], max_steps=3, on_step=watch, format=City), Reply)
        assert_type(llm.chat("x", adapter=None, options={"seed": 1}, keep_alive="5m", force=True), Reply)
        with llm.chat("x", stream=True) as stream:
            assert_type(stream, graftage.Stream)
            for chunk in stream:
                assert_type(chunk, Chunk)
            assert_type(stream.reply, Reply)
            assert_type(stream.partial, Reply)
        assert_type(llm.generate("x", stream=True), graftage.Stream)
        assert_type(llm.embed(["x", "y"], dimensions=3), Embeddings)
        assert_type(llm.embed("x", purpose="query").vectors, Vectors)
        assert_type(llm.rerank("x", ["y", "z"], context_window=512).results, tuple[Ranked, ...])
        assert_type(llm.count_tokens("x", tools=[look_up]), int)
        assert_type(llm.chat("x", format=City, retries=2).attempts, int)
        assert_type(llm.health("model_loaded", max_age=0), Health)
        assert_type(llm.models(), tuple[ModelInfo, ...])
        assert_type(llm.show(), ModelInfo)
        assert_type(llm.loaded(), tuple[LoadedModel, ...])
        assert_type(llm.pull("m", on_progress=show), PullProgress)
        assert_type(llm.ensure(policy="never"), ModelInfo)
        assert_type(llm.use_adapter("a", on_missing="base"), LoadedAdapter | None)
        assert_type(llm.resolve_adapter("a"), Adapter)
        assert_type(llm.adapters(model="m"), tuple[AdapterInfo, ...])
        assert_type(llm.pull_adapter("owner/name", name="a", overwrite=True), AdapterInfo)
        view = llm.bind(model="m", adapter=["a", ("b", 0.5)], options={"seed": 1}, tools=[look_up], format=City)
        assert_type(view, graftage.Client)
        assert_type(view.warm("a", [{"role": "system", "content": "x"}], context_window=4096), Warmed)
        assert_type(llm.prune_adapters(older_than=3.0), tuple[ModelInfo, ...])
        assert_type(llm.capabilities(), Capabilities)
        assert_type(llm.stats(), Stats)
        assert_type(llm.members, tuple[graftage.Client, ...])
        llm.load(context_window=4096)
        llm.unload()
        llm.delete("m")
        llm.chat("x", temprature=1)  # type: ignore[call-overload] # misspelt argument
        llm.chat(3)  # type: ignore[call-overload] # not a message
        llm.embed("x", purpose="search")  # type: ignore[arg-type] # unknown purpose
        llm.delete()  # type: ignore[call-arg] # the name is required
        llm.health("well")  # type: ignore[arg-type] # unknown level
        llm.bind(max_token=1)  # type: ignore[call-arg] # misspelt argument
        llm.bind(images=[])  # type: ignore[call-arg] # not the same for many calls


async def async_host() -> None:
    """Use every method of `AsyncClient`."""
    async with graftage.connect_async(
        ["ollama:m", "mini"], instances={"mini": {"provider": "ollama", "host": "mini"}}, needs={"tools"}
    ) as llm:
        assert_type(llm, graftage.AsyncClient)
        assert_type(await llm.chat("x"), Reply)
        assert_type(await llm.generate("x"), Reply)
        async for chunk in llm.chat("x", stream=True):
            assert_type(chunk, Chunk)
        async with llm.generate("x", stream=True) as entered:
            assert_type(entered, graftage.AsyncStream)
        task: Coroutine[Any, Any, Reply] = llm.chat("x")
        assert_type(await task, Reply)
        stream = await llm.chat("x", stream=True)
        assert_type(stream, graftage.AsyncStream)
        async with stream:
            async for chunk in stream:
                assert_type(chunk, Chunk)
        assert_type(stream.reply, Reply)
        assert_type(await llm.embed("x"), Embeddings)
        assert_type(await llm.rerank("x", ["y"]), Ranking)
        assert_type(await graftage.run_tools_async(llm, "x", [look_up, take], call=take, timeout=3), Reply)
        graftage.run_tools(llm, "x", [look_up])  # type: ignore[arg-type] # the other client
        assert_type(await llm.count_tokens("x"), int)
        await llm.delete("m")
        assert_type(await llm.health(), Health)
        assert_type(await llm.models(), tuple[ModelInfo, ...])
        assert_type(await llm.show("m"), ModelInfo)
        assert_type(await llm.pull("m"), PullProgress)
        assert_type(await llm.use_adapter(None), LoadedAdapter | None)
        assert_type(llm.stats(), Stats)
        assert_type(llm.members, tuple[graftage.AsyncClient, ...])


def readers(reply: Reply, error: GraftageError) -> None:
    """Read the fields of replies and errors."""
    assert_type(reply.text, str)
    assert_type(reply.usage.output_tokens, int | None)
    assert_type(reply.timings.wall, float | None)
    assert_type(reply.message, Message)
    assert_type(error.hint, str | None)
    if isinstance(error, ProviderTimeout):
        assert_type(error.partial, Reply | None)
        assert_type(error.attempts, int)
    reply.text = "y"  # type: ignore[misc] # replies are frozen


# --- A plugin author -------------------------------------------------------------------------------------------------


class TreeSettings(Settings):
    """The common settings and one more."""

    height: int = 3


class Tree:
    """A provider."""

    @hookimpl
    def connect(self, request: ConnectRequest) -> Branch:
        """Open a connection."""
        assert_type(request.settings, Settings)
        return Branch()

    @hookimpl
    def settings_model(self) -> type[Settings]:
        """Return the class of its settings."""
        return TreeSettings


class Branch:
    """A connection."""

    @hookimpl
    async def chat(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        """Stream a reply."""
        assert_type(request.messages, tuple[Message, ...])
        yield Chunk(text=request.model, finish_reason="stop")

    @hookimpl
    def health(self, request: HealthRequest) -> Health:
        """Report that the server is reachable."""
        return Health(level=request.level, reachable=True)

    @hookimpl
    def close(self, request: CloseRequest) -> None:
        """Release nothing."""

    @hookimpl
    def embed(self, request: EmbedRequest) -> Embeddings:
        """Return vectors."""
        return Embeddings(vectors=tuple((0.0,) for _ in request.inputs))

    @hookimpl
    def capabilities(self) -> Capabilities:
        """Return the features."""
        return Capabilities(features=frozenset({"chat", "embed"}))

    @hookimpl
    def list_models(self, request: ModelsRequest) -> tuple[ModelInfo, ...]:
        """List one model."""
        return (ModelInfo(name="oak"),)


class Gardener:
    """A plugin: policy, resolver and observer."""

    @hookimpl
    def resource_limits(self, query: LimitsQuery) -> Limits | None:
        """Limit the context window."""
        info = query.model_info()
        return Limits(context_window=info.context_window) if info else None

    @hookimpl
    def resolve_adapter(self, request: ResolveRequest) -> Adapter | None:
        """Find nothing."""
        assert_type(request.base(), ModelInfo | None)
        return None

    @hookimpl
    def list_adapters(self, request: ListAdaptersRequest) -> list[AdapterInfo]:
        """List nothing."""
        return []

    @hookimpl
    def observe(self, event: Event) -> None:
        """Watch events."""
        assert_type(event.error, Exception | None)


def protocols(tree: Tree, branch: Branch, gardener: Gardener) -> None:
    """Check that each class satisfies the Protocols of its hooks."""
    _provider: tuple[Connect, SettingsModel] = (tree, tree)
    _required: tuple[Chat, CheckHealth, Close] = (branch, branch, branch)
    _optional: tuple[Embed, DescribeCapabilities, ListModels] = (branch, branch, branch)
    _plugin: tuple[ResourceLimits, ResolveAdapter, Observe] = (gardener, gardener, gardener)
    _wrong: Chat = gardener  # type: ignore[assignment] # has no `chat`
