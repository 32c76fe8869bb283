"""`connect`, and the two clients it makes. Both do what the engine's `session` says; one blocks, the other awaits."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, overload

from graftage._engine.call import AsyncStream, Stream, Translate, as_it_is, raise_translated
from graftage._engine.driving import drive
from graftage.exceptions import GraftageError

if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import Future
    from typing import Self

    from typing_extensions import Unpack

    from graftage._engine.arguments import (
        CallOptions,
        ChatArguments,
        EmbedArguments,
        GenerateArguments,
        RerankArguments,
        Timeout,
    )
    from graftage._engine.choosing import ConnectOptions
    from graftage._engine.fallback import Chain
    from graftage._engine.inputs import Messages
    from graftage._engine.session import Session
    from graftage.settings import Settings
    from graftage.types import (
        Adapter,
        AdapterInfo,
        Capabilities,
        Embeddings,
        Health,
        HealthLevel,
        LoadedAdapter,
        LoadedModel,
        ModelInfo,
        PullProgress,
        Ranking,
        Reply,
        Stats,
    )

    Reader = Callable[[Any, Mapping[str, Any]], CallOptions]
    SettingsLike = Mapping[str, Any] | Settings | str | Path | None

__all__ = ["AsyncClient", "Client", "connect", "connect_async"]

P = ParamSpec("P")
T = TypeVar("T")


def connect(
    provider: str | object | Sequence[str | object] | None = None,
    *,
    model: str | None = None,
    settings: SettingsLike = None,
    plugins: Sequence[object] | None = (),
    translate_error: Callable[[GraftageError], Exception] | None = None,
    env_prefix: str | None = None,
    **overrides: Any,
) -> Client:
    """Join a provider; nothing is opened until it is needed.

    Args:
        provider: a provider's name, `"provider:model"`, a plugin object, or a list of these: a fallback chain, whose
            next member is asked where the one before could not begin to answer. A member may be a pair of one of
            these and a mapping of its own `model` and settings, `("ollama", {"host": "gpu:11434"})`; what is secret
            and `host` are refused where every member would get them. None or `"auto"` is the one that
            `GRAFTAGE_PROVIDER` or the settings file names, else the first on this machine that answers, Ollama before
            the embedded one; that is settled once, on entering the client or at its first call. Where `host` is given,
            it is that server or none. A model that it lacks is a `ModelNotFound`, and nobody else is asked.
        model: what calls ask when they name no model.
        settings: a mapping of settings, in which a plugin's are under its name, as in the file; or the path of a TOML
            file to read instead of the user's own.
        plugins: plugin objects to use besides those that are installed.
        translate_error: makes the host's own error from each `GraftageError` before it is raised.
        env_prefix: the prefix of environment variables, in place of `GRAFTAGE`.
        overrides: settings by name, such as `host`, `api_key`, `timeouts`, `attempts`, `keep_alive`.

    Raises:
        ProviderNotFound: it is not installed.
        PluginError: it is broken, or claimed by two distributions.
        SettingsError: a setting is unknown or wrong.
    """
    client = connect_async(
        provider,
        model=model,
        settings=settings,
        plugins=plugins,
        translate_error=translate_error,
        env_prefix=env_prefix,
        **overrides,
    )
    return Client(client._options)  # noqa: SLF001 - one way to read the arguments


def connect_async(
    provider: str | object | Sequence[str | object] | None = None,
    *,
    model: str | None = None,
    settings: SettingsLike = None,
    plugins: Sequence[object] | None = (),
    translate_error: Callable[[GraftageError], Exception] | None = None,
    env_prefix: str | None = None,
    **overrides: Any,
) -> AsyncClient:
    """`connect` for asyncio. A plain function: the client opens on `async with`, or at its first call."""
    from graftage._engine.choosing import ConnectOptions
    from graftage._engine.inputs import items, rejected

    if translate_error is not None and not callable(translate_error):
        raise rejected("`translate_error`", "a function that makes an error of an error", translate_error)
    return AsyncClient(
        ConnectOptions(
            provider=provider,
            model=model,
            settings=settings,
            plugins=items(plugins, "`plugins`", "a sequence of plugin objects"),
            translate=translate_error or as_it_is,
            env_prefix=env_prefix,
            overrides=overrides,
        )
    )


def _translate_errors(method: Callable[P, T]) -> Callable[P, T]:
    """A method of a client whose errors the host sees in its own words."""

    @functools.wraps(method)
    def call(*arguments: P.args, **named: P.kwargs) -> T:
        try:
            return method(*arguments, **named)
        except GraftageError as error:
            raise_translated(error, _translate_of(arguments[0]))

    return call


def _translate_errors_async(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """`_translate_errors` for what is awaited."""

    @functools.wraps(method)
    async def call(*arguments: P.args, **named: P.kwargs) -> T:
        try:
            return await method(*arguments, **named)
        except GraftageError as error:
            raise_translated(error, _translate_of(arguments[0]))

    return call


def _translate_of(client: Any) -> Translate:
    options: ConnectOptions = client._options  # noqa: SLF001 - one module, one thing
    return options.translate


class Client:
    """A provider's connection for threads. Made by `connect`; close it, or use it as a context manager."""

    def __init__(self, options: ConnectOptions, session: Session | None = None) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._closed = False
        self._origins: Mapping[str, str] = {}
        self._resolved: Session | Chain | None = session
        if session is None:
            try:
                self._resolve = self._opened()
            except GraftageError as error:
                raise_translated(error, options.translate)

    def _opened(self) -> Callable[[], Session | Chain]:
        """Find and check everything; what is left is settled at once where no server must be asked for it."""
        from graftage._engine.choosing import Opening
        from graftage._engine.waiting import BlockingIO

        opening = Opening(self._options)
        self._origins = opening.origins
        if not opening.is_auto:
            self._resolved = drive(opening.resolve(BlockingIO()))
        return lambda: drive(opening.resolve(BlockingIO()))

    @property
    def _session(self) -> Session | Chain:
        if self._resolved is None:
            with self._lock:
                if self._closed:
                    raise RuntimeError("the client is closed")
                if self._resolved is None:
                    self._resolved = self._resolve()
        return self._resolved

    @property
    @_translate_errors
    def provider(self) -> str:
        """The provider's name."""
        return self._session.provider

    @property
    @_translate_errors
    def model(self) -> str | None:
        """What calls ask when they name no model."""
        return self._session.model

    @property
    @_translate_errors
    def address(self) -> str:
        """Where the provider's server is, in words."""
        return self._session.address

    @property
    @_translate_errors
    def members(self) -> tuple[Client, ...]:
        """The providers of a chain, each as a client; this client alone where it is no chain."""
        sessions = getattr(self._session, "sessions", None)
        return tuple(Client(self._options, each) for each in sessions) if sessions else (self,)

    @property
    @_translate_errors
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

    @_translate_errors
    def chat(self, messages: Messages, *, stream: bool = False, **arguments: Unpack[ChatArguments]) -> Reply | Stream:
        """Answer a conversation.

        Args:
            messages: a text, a message, or a sequence of messages and mappings, as OpenAI or Anthropic have them.
            stream: give a `Stream` once the first chunk has come, instead of the whole `Reply`.
            arguments: all optional.
                `model`: the model, where it is not the client's.
                `adapter`: an adapter for this call; None for the base model; left out for the active one.
                `tools`: what the model may call: Python functions, pydantic models, mappings or `Tool`s.
                `format`: a pydantic model or another type, a JSON schema, or `"json"`; the result is in `Reply.parsed`.
                `retries`: how often to ask again where the answer does not fit the `format`: the conversation goes on
                with that answer and with what is wrong with it. Each time is a call of its own for `stats` and
                observers; `timeout` holds for all, `Reply.usage` is that of all, and `Reply.attempts` counts them.
                `think`: whether to think first, or how hard.
                `images`: pictures for the user's last message: bytes, `Image`, paths, or `data:` URIs.
                `options`: `temperature`, `seed` and so on; `capabilities().options` has the names.
                `keep_alive`: how long the model stays loaded: seconds, `"5m"`, -1 for ever.
                `context_window`: tokens of prompt and answer together.
                `max_tokens`: tokens of the answer.
                `force`: go on where a policy refuses or lowers something, or an adapter does not fit; the reply warns.
                `timeout`: seconds for the whole call, or `Timeouts`.

        Raises:
            ProviderError: it did not work; the class says why, and `partial` has what came.
            AdapterError: the adapter cannot be used.
            ResourceLimitExceeded: a policy refused.
        """
        from graftage._engine.arguments import read_chat

        session = self._session
        run, first = drive(session.infer("chat", session.read(read_chat, messages, arguments), stream=stream))
        return Stream(run, first, self._options.translate) if stream else run.whole()

    @overload
    def generate(
        self, prompt: str, *, stream: Literal[False] = False, **arguments: Unpack[GenerateArguments]
    ) -> Reply: ...

    @overload
    def generate(self, prompt: str, *, stream: Literal[True], **arguments: Unpack[GenerateArguments]) -> Stream: ...

    @_translate_errors
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
        from graftage._engine.arguments import read_generate

        session = self._session
        run, first = drive(session.infer("generate", session.read(read_generate, prompt, arguments), stream=stream))
        return Stream(run, first, self._options.translate) if stream else run.whole()

    @_translate_errors
    def embed(self, inputs: str | Sequence[str], **arguments: Unpack[EmbedArguments]) -> Embeddings:
        """Turn texts into vectors, one for each, in order.

        Args:
            inputs: a text, or several.
            arguments: all optional: `model`, `options`, `keep_alive`, `context_window`, `timeout` as for `chat`, and
                `dimensions`: cut the vectors to this length, where the model allows it.
                `truncate`: False makes an input that does not fit a `ContextOverflow`.
                `purpose`: `"query"` or `"document"`: each input gets the prefix that the model was trained with, such
                as `search_query: `; a model of which none is known gets a warning on the result.
        """
        from graftage._engine.arguments import read_embed

        return drive(self._session.embed(self._session.read(read_embed, inputs, arguments)))

    @_translate_errors
    def rerank(self, query: str, documents: Sequence[str], **arguments: Unpack[RerankArguments]) -> Ranking:
        """Rank texts by how well they answer a query, the best first; it takes a model that is made for it.

        Args:
            query: what is looked for.
            documents: the texts; a result names one by its place among them.
            arguments: all optional: `model`, `options`, `keep_alive`, `context_window`, `force`, `timeout` as for
                `chat`.

        Raises:
            CapabilityUnsupported: the provider or the model cannot; nothing was sent where the provider cannot.
        """
        from graftage._engine.arguments import read_rerank

        session = self._session
        return drive(session.rerank(session.read(partial(read_rerank, query), documents, arguments)))

    @_translate_errors
    def count_tokens(self, messages: Messages, **arguments: Unpack[ChatArguments]) -> int:
        """Count the tokens that a model reads of a conversation, with its template and tools; the model is loaded.

        Ollama has no way to count alone: it reads the conversation and writes one token, and a server before 0.12.6
        may count what is left of a conversation that it has cut.

        Args:
            messages: as for `chat`.
            arguments: those of `chat`.

        Raises:
            CapabilityUnsupported: the provider cannot count.
            ContextOverflow: the conversation does not fit, and the server counts only what does.
        """
        from graftage._engine.arguments import read_chat

        session = self._session.single()
        return drive(session.count_tokens(session.read(read_chat, messages, arguments)))

    @_translate_errors
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
        return drive(self._session.single().health(level, model, max_age, timeout))

    @_translate_errors
    def models(self, *, timeout: Timeout = None) -> tuple[ModelInfo, ...]:
        """The models that can be asked without a download."""
        return drive(self._session.single().models(timeout))

    @_translate_errors
    def show(self, model: str | None = None, *, timeout: Timeout = None) -> ModelInfo:
        """One model in full.

        Raises:
            ModelNotFound: it is not there.
        """
        return drive(self._session.single().show(model, timeout))

    @_translate_errors
    def loaded(self, *, timeout: Timeout = None) -> tuple[LoadedModel, ...]:
        """The models in memory."""
        return drive(self._session.single().loaded(timeout))

    @_translate_errors
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
        return drive(self._session.single().pull(model, on_progress, timeout))

    @_translate_errors
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
        return drive(self._session.single().ensure(model, policy, on_progress, timeout))

    @_translate_errors
    def load(
        self,
        model: str | None = None,
        *,
        keep_alive: float | str | None = None,
        context_window: int | None = None,
        force: bool = False,
        timeout: Timeout = None,
    ) -> None:
        """Bring a model into memory, with the window that the next calls will have; `force` goes past policies."""
        drive(self._session.single().load(model, keep_alive, context_window, timeout, force=force))

    @_translate_errors
    def unload(self, model: str | None = None, *, timeout: Timeout = None) -> None:
        """Put a model out of memory."""
        drive(self._session.single().unload(model, timeout))

    @_translate_errors
    def delete(self, model: str, *, timeout: Timeout = None) -> None:
        """Delete a model from the disk, for good.

        Args:
            model: its name; the client's own is never meant by leaving it out.
            timeout: seconds for it.

        Raises:
            ModelNotFound: it is not there.
        """
        drive(self._session.single().delete(model, timeout))

    @_translate_errors
    def use_adapter(
        self,
        reference: str | Path | None,
        *,
        on_missing: Literal["error", "base"] = "error",
        force: bool = False,
        model: str | None = None,
        timeout: Timeout = None,
    ) -> LoadedAdapter | None:
        """Switch the adapter of all calls that follow; None for the base model. Gives the one that is now active.

        After a failed switch every call raises that error, until a switch works: never another adapter by accident.

        Args:
            reference: a name, a path, or whatever else the installed resolvers understand.
            on_missing: `"base"` answers with the base model, and a warning on each reply, where it is not found.
            force: use it although it does not fit the model, with a warning on each reply.
            model: the base model, where it is not the client's.
            timeout: seconds for finding and loading it.
        """
        return drive(
            self._session.use_adapter(reference, on_missing=on_missing, force=force, model=model, timeout=timeout)
        )

    @_translate_errors
    def adapters(self) -> tuple[AdapterInfo, ...]:
        """The adapters that the installed plugins know of."""
        return drive(self._session.list_adapters())

    @_translate_errors
    def resolve_adapter(self, reference: str | Path, *, model: str | None = None, timeout: Timeout = None) -> Adapter:
        """Find an adapter and check it against a model, without loading it; `Adapter.verdict` says whether it fits.

        Raises:
            AdapterNotFound: no resolver knows the reference.
            AdapterInvalid: its files are malformed, unsafe or unsupported.
        """
        return drive(self._session.single().resolve_adapter(reference, model, timeout))

    @_translate_errors
    def unload_adapter(self, reference: str | Path, *, model: str | None = None, timeout: Timeout = None) -> None:
        """Free what an adapter holds in memory; nothing is deleted, and a call that names it loads it again."""
        drive(self._session.single().unload_adapter(reference, model, timeout))

    @_translate_errors
    def prune_adapters(
        self,
        *,
        keep: Sequence[str] = (),
        older_than: float | None = None,
        dry_run: bool = True,
        timeout: Timeout = None,
    ) -> tuple[ModelInfo, ...]:
        """Delete the models that loading adapters has left on the server; gives those that are gone, or would be.

        Args:
            keep: names of models to leave alone.
            older_than: leave alone what is younger than this many seconds.
            dry_run: only say what would go.
            timeout: seconds for all of it.
        """
        return drive(self._session.single().prune_adapters(keep, older_than, dry_run, timeout))

    @_translate_errors
    def native(self) -> Any:
        """The server's own client, such as `ollama.Client`, on this client's connections: for what Graftage lacks.

        It keeps the time limits, sizes and addresses of the settings, and each of its requests is sent once. It raises
        errors of its own, and knows nothing of adapters, policies and events. It is of use until this client is closed.
        What goes to another address is refused, such as `web_search` of Ollama's: connect to `https://ollama.com`.

        Raises:
            CapabilityUnsupported: the provider has none.
        """
        return drive(self._session.single().native())

    @_translate_errors
    def capabilities(self) -> Capabilities:
        """What the provider can do, without asking a server."""
        return self._session.capabilities()

    @_translate_errors
    def stats(self) -> Stats:
        """What this client has done so far."""
        return self._session.stats()

    @_translate_errors
    def close(self) -> None:
        """Give everything back. Safe to call twice."""
        self._closed = True
        with self._lock:  # Another thread may be opening it.
            session = self._resolved
        if session is not None:
            drive(session.close())

    @_translate_errors
    def __enter__(self) -> Self:
        self._session  # noqa: B018 - settles which provider answers
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def _read_off_loop(
    session: Session | Chain, reader: Reader, subject: Any, arguments: Mapping[str, Any]
) -> CallOptions:
    """Read the arguments of a call, in a thread where that may take the time of a file."""
    from graftage._engine.arguments import may_read_files

    if may_read_files(subject, arguments):
        return await session.io.run(session.read, reader, subject, arguments)
    return session.read(reader, subject, arguments)


def _check_asyncio() -> None:
    """Refuse a coroutine that is not run by asyncio: trio runs it, or nobody but its caller."""
    import asyncio

    with contextlib.suppress(RuntimeError):  # There is no loop.
        if asyncio.current_task() is not None:
            return
    raise RuntimeError(
        "an async client needs asyncio: await it in a task of asyncio's, as by `asyncio.run`; under trio or without a "
        "loop, call the sync client of `graftage.connect`, in a thread where it must not block"
    )


class AsyncClient:
    """A provider's connection for asyncio; the methods are those of `Client`. Works from several event loops."""

    def __init__(self, options: ConnectOptions, session: Session | None = None) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._closed = False
        self._origins: Mapping[str, str] = {}
        self._session: Session | Chain | None = session
        self._opening: Future[bool] | None = None
        self._opener: asyncio.AbstractEventLoop
        self._failed_switch: tuple[Any, BaseException] | None = None

    async def _open(self) -> Session | Chain:
        """The session; the first caller starts to open it, and everyone waits, whoever gives up meanwhile."""
        _check_asyncio()
        while self._session is None:
            if self._closed:
                raise RuntimeError("the client is closed")
            await self._opened()
        if self._failed_switch is not None:
            (reference, error), self._failed_switch = self._failed_switch, None
            self._session.switch_failed(reference, error)
        return self._session

    async def _opened(self) -> bool:
        """Wait for the opening under way, or for a new one; whether it came to an end."""
        import asyncio
        from concurrent.futures import Future  # It brings `logging`, and a sync client may need neither

        loop = asyncio.get_running_loop()
        with self._lock:
            opening = self._opening
            # A loop that has stopped will hardly go on with what it began.
            if opening is None or opening.done() or not self._opener.is_running():
                opening = self._opening = Future()
                self._opener = loop
                self._task = loop.create_task(self._open_now(opening))
        return await asyncio.shield(asyncio.wrap_future(opening))

    async def _open_now(self, opening: Future[bool]) -> None:
        import asyncio

        from graftage._engine.awaiting import AwaitingIO
        from graftage._engine.choosing import Opening
        from graftage._engine.threads import submit

        try:
            # It imports and reads files: not on the event loop.
            found = await asyncio.wrap_future(submit(Opening, self._options))
            session = await found.resolve(AwaitingIO())
            with self._lock:
                late = self._opening is not opening
                if not late:
                    self._origins, self._session = found.origins, session
            if late:  # Another event loop has begun anew meanwhile.
                await session.close()
        except Exception as error:  # noqa: BLE001 - it goes to everyone who waits
            opening.set_exception(error)
        finally:
            if not opening.done():  # False where the event loop ended first: another one may try again.
                opening.set_result(self._session is not None)

    def _ready(self) -> Session | Chain:
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
    def address(self) -> str:
        """As `Client.address`, once the client is open."""
        return self._ready().address

    @property
    def members(self) -> tuple[AsyncClient, ...]:
        """As `Client.members`, once the client is open."""
        sessions = getattr(self._ready(), "sessions", None)
        return tuple(AsyncClient(self._options, each) for each in sessions) if sessions else (self,)

    @property
    def settings(self) -> Settings:
        """The settings in effect, once the client is open."""
        return self._ready().settings

    @property
    def origins(self) -> Mapping[str, str]:
        """Where each setting that is not a default came from."""
        return self._origins

    @overload
    async def chat(
        self, messages: Messages, *, stream: Literal[False] = False, **arguments: Unpack[ChatArguments]
    ) -> Reply: ...

    @overload
    async def chat(
        self, messages: Messages, *, stream: Literal[True], **arguments: Unpack[ChatArguments]
    ) -> AsyncStream: ...

    @_translate_errors_async
    async def chat(
        self, messages: Messages, *, stream: bool = False, **arguments: Unpack[ChatArguments]
    ) -> Reply | AsyncStream:
        """As `Client.chat`."""
        from graftage._engine.arguments import read_chat

        session = await self._open()
        want = await _read_off_loop(session, read_chat, messages, arguments)
        run, first = await session.infer("chat", want, stream=stream)
        return AsyncStream(run, first, self._options.translate) if stream else run.whole()

    @overload
    async def generate(
        self, prompt: str, *, stream: Literal[False] = False, **arguments: Unpack[GenerateArguments]
    ) -> Reply: ...

    @overload
    async def generate(
        self, prompt: str, *, stream: Literal[True], **arguments: Unpack[GenerateArguments]
    ) -> AsyncStream: ...

    @_translate_errors_async
    async def generate(
        self, prompt: str, *, stream: bool = False, **arguments: Unpack[GenerateArguments]
    ) -> Reply | AsyncStream:
        """As `Client.generate`."""
        from graftage._engine.arguments import read_generate

        session = await self._open()
        want = await _read_off_loop(session, read_generate, prompt, arguments)
        run, first = await session.infer("generate", want, stream=stream)
        return AsyncStream(run, first, self._options.translate) if stream else run.whole()

    @_translate_errors_async
    async def embed(self, inputs: str | Sequence[str], **arguments: Unpack[EmbedArguments]) -> Embeddings:
        """As `Client.embed`."""
        from graftage._engine.arguments import read_embed

        session = await self._open()
        return await session.embed(session.read(read_embed, inputs, arguments))

    @_translate_errors_async
    async def rerank(self, query: str, documents: Sequence[str], **arguments: Unpack[RerankArguments]) -> Ranking:
        """As `Client.rerank`."""
        from graftage._engine.arguments import read_rerank

        session = await self._open()
        return await session.rerank(session.read(partial(read_rerank, query), documents, arguments))

    @_translate_errors_async
    async def count_tokens(self, messages: Messages, **arguments: Unpack[ChatArguments]) -> int:
        """As `Client.count_tokens`."""
        from graftage._engine.arguments import read_chat

        session = (await self._open()).single()
        return await session.count_tokens(await _read_off_loop(session, read_chat, messages, arguments))

    @_translate_errors_async
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
        return await session.single().health(level, model, max_age, timeout)

    @_translate_errors_async
    async def models(self, *, timeout: Timeout = None) -> tuple[ModelInfo, ...]:
        """As `Client.models`."""
        session = await self._open()
        return await session.single().models(timeout)

    @_translate_errors_async
    async def show(self, model: str | None = None, *, timeout: Timeout = None) -> ModelInfo:
        """As `Client.show`."""
        session = await self._open()
        return await session.single().show(model, timeout)

    @_translate_errors_async
    async def loaded(self, *, timeout: Timeout = None) -> tuple[LoadedModel, ...]:
        """As `Client.loaded`."""
        session = await self._open()
        return await session.single().loaded(timeout)

    @_translate_errors_async
    async def pull(
        self,
        model: str | None = None,
        *,
        on_progress: Callable[[PullProgress], None] | None = None,
        timeout: Timeout = None,
    ) -> PullProgress:
        """As `Client.pull`."""
        session = await self._open()
        return await session.single().pull(model, on_progress, timeout)

    @_translate_errors_async
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
        return await session.single().ensure(model, policy, on_progress, timeout)

    @_translate_errors_async
    async def load(
        self,
        model: str | None = None,
        *,
        keep_alive: float | str | None = None,
        context_window: int | None = None,
        force: bool = False,
        timeout: Timeout = None,
    ) -> None:
        """As `Client.load`."""
        session = await self._open()
        await session.single().load(model, keep_alive, context_window, timeout, force=force)

    @_translate_errors_async
    async def unload(self, model: str | None = None, *, timeout: Timeout = None) -> None:
        """As `Client.unload`."""
        session = await self._open()
        await session.single().unload(model, timeout)

    @_translate_errors_async
    async def delete(self, model: str, *, timeout: Timeout = None) -> None:
        """As `Client.delete`."""
        session = await self._open()
        await session.single().delete(model, timeout)

    @_translate_errors_async
    async def use_adapter(
        self,
        reference: str | Path | None,
        *,
        on_missing: Literal["error", "base"] = "error",
        force: bool = False,
        model: str | None = None,
        timeout: Timeout = None,
    ) -> LoadedAdapter | None:
        """As `Client.use_adapter`."""
        try:
            session = await self._open()
        except BaseException as error:
            self._failed_switch = (reference, error)  # Told to the session where it opens all the same.
            raise
        return await session.use_adapter(reference, on_missing=on_missing, force=force, model=model, timeout=timeout)

    @_translate_errors_async
    async def adapters(self) -> tuple[AdapterInfo, ...]:
        """As `Client.adapters`."""
        session = await self._open()
        return await session.list_adapters()

    @_translate_errors_async
    async def resolve_adapter(
        self, reference: str | Path, *, model: str | None = None, timeout: Timeout = None
    ) -> Adapter:
        """As `Client.resolve_adapter`."""
        session = await self._open()
        return await session.single().resolve_adapter(reference, model, timeout)

    @_translate_errors_async
    async def unload_adapter(self, reference: str | Path, *, model: str | None = None, timeout: Timeout = None) -> None:
        """As `Client.unload_adapter`."""
        session = await self._open()
        await session.single().unload_adapter(reference, model, timeout)

    @_translate_errors_async
    async def prune_adapters(
        self,
        *,
        keep: Sequence[str] = (),
        older_than: float | None = None,
        dry_run: bool = True,
        timeout: Timeout = None,
    ) -> tuple[ModelInfo, ...]:
        """As `Client.prune_adapters`."""
        session = await self._open()
        return await session.single().prune_adapters(keep, older_than, dry_run, timeout)

    @_translate_errors_async
    async def native(self) -> Any:
        """As `Client.native`: an async one, such as `ollama.AsyncClient`."""
        session = await self._open()
        return await session.single().native()

    @_translate_errors
    def capabilities(self) -> Capabilities:
        """As `Client.capabilities`, once the client is open."""
        return self._ready().capabilities()

    @_translate_errors
    def stats(self) -> Stats:
        """As `Client.stats`, once the client is open."""
        return self._ready().stats()

    @_translate_errors_async
    async def close(self) -> None:
        """As `Client.close`."""
        _check_asyncio()
        self._closed = True
        if self._session is None and self._opening is not None and not self._opening.done():
            with contextlib.suppress(Exception):  # It goes to whoever wanted it opened.
                await self._opened()
        if self._session is not None:
            await self._session.close()

    @_translate_errors_async
    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
