"""`connect`, and the two clients it makes. Both do what `graftage._session` says; one blocks, the other awaits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from graftage._arguments import ChatArguments, EmbedArguments, GenerateArguments, Timeout, Wants
    from graftage._messages import Messages
    from graftage._plugins import Catalog, Entry
    from graftage._session import Session
    from graftage._stream import AsyncStream, Stream
    from graftage.exceptions import GraftageError
    from graftage.settings import Loaded, Settings
    from graftage.types import (
        AdapterInfo,
        Capabilities,
        Embeddings,
        Health,
        HealthLevel,
        LoadedAdapter,
        LoadedModel,
        ModelInfo,
        PullProgress,
        Reply,
        Stats,
    )

    SettingsLike = Mapping[str, Any] | Settings | str | Path | None

__all__ = ["AsyncClient", "Client", "connect", "connect_async"]

DEFAULT_PROVIDER = "ollama"
T = TypeVar("T")


def connect(
    provider: str | object | None = None,
    *,
    model: str | None = None,
    settings: SettingsLike = None,
    plugins: Sequence[object] | None = None,
    translate_error: Callable[[GraftageError], Exception] | None = None,
    env_prefix: str | None = None,
    **overrides: Any,
) -> Client:
    """Join a provider; nothing is opened until it is needed.

    Args:
        provider: a provider's name, `"provider:model"`, a plugin object, or None for the one that `GRAFTAGE_PROVIDER`
            or the settings file names, else `ollama`.
        model: what calls ask when they name no model.
        settings: a mapping of settings, or the path of a TOML file to read instead of the user's own.
        plugins: plugin objects to use besides those that are installed.
        translate_error: makes the host's own error from each `GraftageError` before it is raised.
        env_prefix: the prefix of environment variables, in place of `GRAFTAGE`.
        overrides: settings by name, such as `host`, `api_key`, `timeouts`, `attempts`, `keep_alive`.

    Raises:
        ProviderNotFound: it is not installed.
        PluginError: it is broken, or claimed by two distributions.
        SettingsError: a setting is unknown or wrong.
    """
    return Client(_Opening(provider, model, settings, plugins or (), translate_error, env_prefix, overrides))


def connect_async(
    provider: str | object | None = None,
    *,
    model: str | None = None,
    settings: SettingsLike = None,
    plugins: Sequence[object] | None = None,
    translate_error: Callable[[GraftageError], Exception] | None = None,
    env_prefix: str | None = None,
    **overrides: Any,
) -> AsyncClient:
    """`connect` for asyncio. A plain function: the client opens on `async with`, or at its first call."""
    return AsyncClient(_Opening(provider, model, settings, plugins or (), translate_error, env_prefix, overrides))


@dataclass(slots=True)
class _Opening:
    """What `connect` was asked, and how to do it."""

    provider: str | object | None
    model: str | None
    settings: SettingsLike
    plugins: Sequence[object]
    translate: Callable[[GraftageError], Exception] | None
    env_prefix: str | None
    overrides: Mapping[str, Any]
    origins: dict[str, str] = field(default_factory=dict)

    def open(self) -> Callable[..., Session]:
        """Find and load everything; what is left is a session that only wants its `IO`."""
        from graftage._session import Session  # noqa: PLC0415 - `import graftage` must stay light
        from graftage.exceptions import GraftageError  # noqa: PLC0415 - the same holds for all such imports here

        try:
            name, parts = self._parts()
        except GraftageError as error:
            if self.translate is None:
                raise
            raise self.translate(error) from error
        return lambda io: Session(provider=name, io=io, translate=self.translate, **parts)

    def _parts(self) -> tuple[str, dict[str, Any]]:
        from graftage._plugins import Catalog  # noqa: PLC0415
        from graftage.settings import Sources  # noqa: PLC0415
        from graftage.types import ConnectRequest  # noqa: PLC0415

        file = self.settings if isinstance(self.settings, (str, Path)) else None
        sources = Sources.of(self.env_prefix, file)
        given = [self.provider] if not isinstance(self.provider, (str, type(None))) else []
        catalog = Catalog([*given, *self.plugins])
        name, model = self._chosen(catalog, sources)
        entry = catalog.provider(name)
        loaded = self._load_settings(entry, catalog, sources)
        plugins = catalog.plugins()
        connection = _hook(entry, "connect")(request=ConnectRequest(name=name, settings=loaded.settings))
        self.origins.update(loaded.origins)
        return name, {"model": model, "settings": loaded.settings, "connection": connection, "plugins": plugins}

    def _chosen(self, catalog: Catalog, sources: Any) -> tuple[str, str | None]:
        """The provider's name, and the model."""
        from graftage._plugins import plugin_name  # noqa: PLC0415

        model = self.model
        if isinstance(self.provider, str):
            name, _, named_model = self.provider.partition(":")
            model = model or named_model or None
        elif self.provider is None:
            name, _ = sources.choice("provider")
            name = name or self._only_given(catalog) or DEFAULT_PROVIDER
        else:
            name = plugin_name(self.provider)
        if model is None:
            model, self.origins["model"] = sources.choice("model")
        return name, model

    def _only_given(self, catalog: Catalog) -> str | None:
        """The provider among the given objects, where there is just one: it was surely handed over to be used."""
        given = [entry.name for entry in catalog.entries if entry.kind == "provider" and entry.entry_point is None]
        return given[0] if len(given) == 1 else None

    def _load_settings(self, entry: Entry, catalog: Catalog, sources: Any) -> Loaded:
        from graftage.settings import Settings, load  # noqa: PLC0415

        mapping = self.settings
        if isinstance(mapping, Settings):
            mapping = {name: getattr(mapping, name) for name in mapping.model_fields_set}
        return load(
            _hook(entry, "settings_model")() if "settings_model" in entry.hooks else Settings,
            provider=entry.name,
            arguments=self.overrides,
            mapping=mapping if isinstance(mapping, Mapping) else None,
            sources=sources,
            plugins=catalog.names(),
        )


def _hook(entry: Entry, name: str) -> Callable[..., Any]:
    hook: Callable[..., Any] = getattr(entry.plugin, name)
    return hook


class Client:
    """A provider's connection for threads. Made by `connect`; close it, or use it as a context manager."""

    def __init__(self, opening: _Opening) -> None:
        from graftage._io import Blocking  # noqa: PLC0415

        self._session = opening.open()(Blocking())
        self._origins = opening.origins

    @property
    def provider(self) -> str:
        """The provider's name."""
        return self._session.provider

    @property
    def model(self) -> str | None:
        """What calls ask when they name no model."""
        return self._session.model

    @property
    def settings(self) -> Settings:
        """The settings in effect."""
        return self._session.settings

    @property
    def origins(self) -> Mapping[str, str]:
        """Where each setting that is not a default came from."""
        return self._origins

    @overload
    def chat(
        self, messages: Messages, *, stream: Literal[False] = False, **arguments: Unpack[ChatArguments]
    ) -> Reply: ...

    @overload
    def chat(self, messages: Messages, *, stream: Literal[True], **arguments: Unpack[ChatArguments]) -> Stream: ...

    def chat(self, messages: Messages, *, stream: bool = False, **arguments: Unpack[ChatArguments]) -> Reply | Stream:
        """Answer a conversation.

        Args:
            messages: a text, a message, or a sequence of messages and mappings.
            stream: give a `Stream` once the first chunk has come, instead of the whole `Reply`.
            arguments: all optional.
                `model`: the model, where it is not the client's.
                `adapter`: an adapter for this call; None for the base model; left out for the active one.
                `tools`: what the model may call: Python functions, pydantic models, mappings or `Tool`s.
                `format`: a pydantic model, a JSON schema, or `"json"`; the result is in `Reply.parsed`.
                `think`: whether to think first, or how hard.
                `images`: paths or bytes, for the user's last message.
                `options`: `temperature`, `seed` and so on; `capabilities().options` has the names.
                `keep_alive`: how long the model stays loaded: seconds, `"5m"`, -1 for ever.
                `context_window`: tokens of prompt and answer together.
                `max_tokens`: tokens of the answer.
                `timeout`: seconds for the whole call, or `Timeouts`.

        Raises:
            ProviderError: it did not work; the class says why, and `partial` has what came.
            AdapterError: the adapter cannot be used.
            ResourceLimitExceeded: a policy refused.
        """
        from graftage._arguments import chat_wants  # noqa: PLC0415

        return self._answer("chat", self._session.read(chat_wants, messages, arguments), stream)

    @overload
    def generate(
        self, prompt: str, *, stream: Literal[False] = False, **arguments: Unpack[GenerateArguments]
    ) -> Reply: ...

    @overload
    def generate(self, prompt: str, *, stream: Literal[True], **arguments: Unpack[GenerateArguments]) -> Stream: ...

    def generate(self, prompt: str, *, stream: bool = False, **arguments: Unpack[GenerateArguments]) -> Reply | Stream:
        """Continue a text.

        Args:
            prompt: the text to continue.
            stream: give a `Stream` once the first chunk has come, instead of the whole `Reply`.
            arguments: those of `chat` but `tools`, and
                `system`: a system prompt, where the template has a place for one.
                `suffix`: what comes after the gap that the model is to fill.
                `raw`: send the prompt without the model's template.

        Raises:
            ProviderError: as for `chat`.
        """
        from graftage._arguments import generate_wants  # noqa: PLC0415

        return self._answer("generate", self._session.read(generate_wants, prompt, arguments), stream)

    def _answer(self, operation: Literal["chat", "generate"], want: Wants, stream: bool) -> Reply | Stream:
        from graftage._stream import Stream, drive  # noqa: PLC0415

        run, first = drive(self._session.infer(operation, want, stream=stream))
        if stream:
            return Stream(run, first)
        while run.reply is None:
            drive(run.pull())
        return run.reply

    def embed(self, inputs: str | Sequence[str], **arguments: Unpack[EmbedArguments]) -> Embeddings:
        """Turn texts into vectors, one for each, in order.

        Args:
            inputs: a text, or several.
            arguments: all optional: `model`, `options`, `keep_alive`, `context_window`, `timeout` as for `chat`, and
                `dimensions`: cut the vectors to this length, where the model allows it.
                `truncate`: False makes an input that does not fit a `ContextOverflow`.
        """
        return _run(self._session.embed(inputs, arguments))

    def health(
        self,
        level: HealthLevel = "api",
        *,
        model: str | None = None,
        max_age: float | None = None,
        timeout: Timeout = None,
    ) -> Health:
        """How well the provider is. What is wrong is in the answer; `Health.raise_for_error` raises it.

        Args:
            level: how far to look: `reachable`, `api`, `model_present`, `model_loaded`, `answers`.
            model: the model, where it is not the client's.
            max_age: seconds an earlier answer may be old; 0 asks anew. The default is 5, and 1 after a failure.
            timeout: seconds for the check. The default is 10, and the client's own limits for `answers`.
        """
        return _run(self._session.health(level, model, max_age, timeout))

    def models(self, *, timeout: Timeout = None) -> tuple[ModelInfo, ...]:
        """The models that can be asked without a download."""
        return _run(self._session.models(timeout))

    def show(self, model: str | None = None, *, timeout: Timeout = None) -> ModelInfo:
        """One model in full.

        Raises:
            ModelNotFound: it is not there.
        """
        return _run(self._session.show(model, timeout))

    def loaded(self, *, timeout: Timeout = None) -> tuple[LoadedModel, ...]:
        """The models in memory."""
        return _run(self._session.loaded(timeout))

    def pull(
        self,
        model: str | None = None,
        *,
        on_progress: Callable[[PullProgress], None] | None = None,
        timeout: Timeout = None,
    ) -> PullProgress:
        """Download a model. Limited by `timeouts.idle` between steps, and as a whole by `timeout` where it is given.

        Args:
            model: the model, where it is not the client's.
            on_progress: called with each step; an error it raises ends the download.
            timeout: seconds for the whole download.
        """
        return _run(self._session.pull(model, on_progress, timeout))

    def ensure(
        self,
        model: str | None = None,
        *,
        policy: Literal["never", "missing", "always"] = "missing",
        on_progress: Callable[[PullProgress], None] | None = None,
        timeout: Timeout = None,
    ) -> ModelInfo:
        """Make sure that a model is there, and describe it.

        Args:
            model: the model, where it is not the client's.
            policy: download it where it is `missing`, `always`, or `never`.
            on_progress: called with each step of a download.
            timeout: seconds for the whole download.

        Raises:
            ModelNotFound: it is not there and `policy` is `never`.
        """
        return _run(self._session.ensure(model, policy, on_progress, timeout))

    def load(
        self,
        model: str | None = None,
        *,
        keep_alive: float | str | None = None,
        context_window: int | None = None,
        timeout: Timeout = None,
    ) -> None:
        """Bring a model into memory, with the window that the next calls will have."""
        _run(self._session.load(model, keep_alive, context_window, timeout))

    def unload(self, model: str | None = None, *, timeout: Timeout = None) -> None:
        """Put a model out of memory."""
        _run(self._session.unload(model, timeout))

    def use_adapter(
        self,
        reference: str | Path | None,
        *,
        on_missing: Literal["error", "base"] = "error",
        model: str | None = None,
        timeout: Timeout = None,
    ) -> LoadedAdapter | None:
        """Switch the adapter of all calls that follow; None for the base model. Gives the one that is now active.

        After a failed switch every call raises that error, until a switch works: never another adapter by accident.

        Args:
            reference: a name, a path, or whatever else the installed resolvers understand.
            on_missing: `"base"` answers with the base model, and a warning on each reply, where it is not found.
            model: the base model, where it is not the client's.
            timeout: seconds for finding and loading it.
        """
        return _run(self._session.use_adapter(reference, on_missing=on_missing, model=model, timeout=timeout))

    def adapters(self) -> tuple[AdapterInfo, ...]:
        """The adapters that the installed plugins know of."""
        return _run(self._session.list_adapters())

    def capabilities(self) -> Capabilities:
        """What the provider can do, without asking a server."""
        return self._session.capabilities()

    def stats(self) -> Stats:
        """What this client has done so far."""
        return self._session.stats()

    def close(self) -> None:
        """Give everything back. Safe to call twice."""
        _run(self._session.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _run(work: Coroutine[Any, Any, T]) -> T:
    from graftage._stream import drive  # noqa: PLC0415

    return drive(work)


class AsyncClient:
    """A provider's connection for asyncio; the methods are those of `Client`. Works from several event loops."""

    def __init__(self, opening: _Opening) -> None:
        self._opening = opening
        self._session: Session | None = None
        self._closed = False
        self._lock = threading.Lock()

    async def _open(self) -> Session:
        if self._session is None:
            import asyncio  # noqa: PLC0415

            await asyncio.to_thread(self._open_once)  # It imports and reads files: not on the event loop.
        if self._session is None:
            raise RuntimeError("the client is closed")
        return self._session

    def _open_once(self) -> None:
        from graftage._io import Awaiting  # noqa: PLC0415

        with self._lock:
            if self._session is None and not self._closed:
                self._session = self._opening.open()(Awaiting())

    def _ready(self) -> Session:
        if self._session is None:
            raise RuntimeError("the client is not open: use `async with`, or call it first")
        return self._session

    @property
    def provider(self) -> str:
        """The provider's name, once the client is open."""
        return self._ready().provider

    @property
    def model(self) -> str | None:
        """What calls ask when they name no model, once the client is open."""
        return self._ready().model

    @property
    def settings(self) -> Settings:
        """The settings in effect, once the client is open."""
        return self._ready().settings

    @property
    def origins(self) -> Mapping[str, str]:
        """Where each setting that is not a default came from."""
        return self._opening.origins

    @overload
    async def chat(
        self, messages: Messages, *, stream: Literal[False] = False, **arguments: Unpack[ChatArguments]
    ) -> Reply: ...

    @overload
    async def chat(
        self, messages: Messages, *, stream: Literal[True], **arguments: Unpack[ChatArguments]
    ) -> AsyncStream: ...

    async def chat(
        self, messages: Messages, *, stream: bool = False, **arguments: Unpack[ChatArguments]
    ) -> Reply | AsyncStream:
        """As `Client.chat`."""
        from graftage._arguments import chat_wants  # noqa: PLC0415

        session = await self._open()
        # Pictures are read from files: not on the event loop.
        want = await session.io.run(session.read, chat_wants, messages, arguments)
        return await self._answer(session, "chat", want, stream)

    @overload
    async def generate(
        self, prompt: str, *, stream: Literal[False] = False, **arguments: Unpack[GenerateArguments]
    ) -> Reply: ...

    @overload
    async def generate(
        self, prompt: str, *, stream: Literal[True], **arguments: Unpack[GenerateArguments]
    ) -> AsyncStream: ...

    async def generate(
        self, prompt: str, *, stream: bool = False, **arguments: Unpack[GenerateArguments]
    ) -> Reply | AsyncStream:
        """As `Client.generate`."""
        from graftage._arguments import generate_wants  # noqa: PLC0415

        session = await self._open()
        want = session.read(generate_wants, prompt, arguments)
        return await self._answer(session, "generate", want, stream)

    async def _answer(
        self, session: Session, operation: Literal["chat", "generate"], want: Wants, stream: bool
    ) -> Reply | AsyncStream:
        from graftage._stream import AsyncStream  # noqa: PLC0415

        run, first = await session.infer(operation, want, stream=stream)
        if stream:
            return AsyncStream(run, first)
        while run.reply is None:
            await run.pull()
        return run.reply

    async def embed(self, inputs: str | Sequence[str], **arguments: Unpack[EmbedArguments]) -> Embeddings:
        """As `Client.embed`."""
        session = await self._open()
        return await session.embed(inputs, arguments)

    async def health(
        self,
        level: HealthLevel = "api",
        *,
        model: str | None = None,
        max_age: float | None = None,
        timeout: Timeout = None,
    ) -> Health:
        """As `Client.health`."""
        session = await self._open()
        return await session.health(level, model, max_age, timeout)

    async def models(self, *, timeout: Timeout = None) -> tuple[ModelInfo, ...]:
        """As `Client.models`."""
        session = await self._open()
        return await session.models(timeout)

    async def show(self, model: str | None = None, *, timeout: Timeout = None) -> ModelInfo:
        """As `Client.show`."""
        session = await self._open()
        return await session.show(model, timeout)

    async def loaded(self, *, timeout: Timeout = None) -> tuple[LoadedModel, ...]:
        """As `Client.loaded`."""
        session = await self._open()
        return await session.loaded(timeout)

    async def pull(
        self,
        model: str | None = None,
        *,
        on_progress: Callable[[PullProgress], None] | None = None,
        timeout: Timeout = None,
    ) -> PullProgress:
        """As `Client.pull`."""
        session = await self._open()
        return await session.pull(model, on_progress, timeout)

    async def ensure(
        self,
        model: str | None = None,
        *,
        policy: Literal["never", "missing", "always"] = "missing",
        on_progress: Callable[[PullProgress], None] | None = None,
        timeout: Timeout = None,
    ) -> ModelInfo:
        """As `Client.ensure`."""
        session = await self._open()
        return await session.ensure(model, policy, on_progress, timeout)

    async def load(
        self,
        model: str | None = None,
        *,
        keep_alive: float | str | None = None,
        context_window: int | None = None,
        timeout: Timeout = None,
    ) -> None:
        """As `Client.load`."""
        session = await self._open()
        await session.load(model, keep_alive, context_window, timeout)

    async def unload(self, model: str | None = None, *, timeout: Timeout = None) -> None:
        """As `Client.unload`."""
        session = await self._open()
        await session.unload(model, timeout)

    async def use_adapter(
        self,
        reference: str | Path | None,
        *,
        on_missing: Literal["error", "base"] = "error",
        model: str | None = None,
        timeout: Timeout = None,
    ) -> LoadedAdapter | None:
        """As `Client.use_adapter`."""
        session = await self._open()
        return await session.use_adapter(reference, on_missing=on_missing, model=model, timeout=timeout)

    async def adapters(self) -> tuple[AdapterInfo, ...]:
        """As `Client.adapters`."""
        session = await self._open()
        return await session.list_adapters()

    def capabilities(self) -> Capabilities:
        """As `Client.capabilities`, once the client is open."""
        return self._ready().capabilities()

    def stats(self) -> Stats:
        """As `Client.stats`, once the client is open."""
        return self._ready().stats()

    async def close(self) -> None:
        """As `Client.close`."""
        self._closed = True
        if self._session is not None:
            await self._session.close()

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
