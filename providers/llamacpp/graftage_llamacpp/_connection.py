"""One connection: every hook of the contract on an engine in a child process, sync and async."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from graftage import retry
from graftage.exceptions import (
    AdapterError,
    CapabilityUnsupported,
    ConnectionFailed,
    ContextOverflow,
    GraftageError,
    ModelLoadFailed,
    ProviderTimeout,
)
from graftage.hookspecs import hookimpl
from graftage.types import (
    HEALTH_LEVELS,
    Call,
    Capabilities,
    Chunk,
    Embeddings,
    Health,
    LoadedAdapter,
    LoadedModel,
    ModelInfo,
    PullProgress,
    Usage,
)
from graftage_llamacpp import DEFAULT_MODEL, _convert, _machine, _process
from graftage_llamacpp._adapters import AdapterFile
from graftage_llamacpp._convert import Answer
from graftage_llamacpp._process import Engine, Launch, Lease, Need, Stopped
from graftage_llamacpp._sources import Watch
from graftage_llamacpp._store import Store, Stored
from graftage_llamacpp._transport import EMBEDDINGS, TOKENIZE, AsyncEngineClient, EngineClient, Job, alease, lease

if TYPE_CHECKING:
    from graftage.types import (
        ChatRequest,
        CloseRequest,
        EmbedRequest,
        GenerateRequest,
        HealthRequest,
        LoadAdapterRequest,
        LoadModelRequest,
        ModelRequest,
        ModelsRequest,
        UnloadAdapterRequest,
    )
    from graftage_llamacpp import LlamaCppSettings

__all__ = ["LlamaCppConnection"]

T = TypeVar("T")
Steps: TypeAlias = Generator[tuple[str, Mapping[str, Any]], dict[str, Any], T]
"""Work of several requests: yields path and body, gets the answer, and returns the result."""

DEFAULT_WINDOW: Final = 4096
"""Tokens, where neither the caller nor a policy says; or as many as the model was trained for."""
SPECIAL_TOKENS: Final = 4
"""Tokens that a tokenizer may add to a text."""
BYTES_OF_A_SCORE: Final = 4
"""The engine keeps one for each token it reads at once and each word it knows."""


class LlamaCppConnection:
    """The hooks, on an engine that is started by the first request which needs it."""

    keeps_time = True

    def __init__(self, name: str, settings: LlamaCppSettings) -> None:
        self.name = name
        self.address = "embedded"
        self.default_model = DEFAULT_MODEL
        self._settings = settings
        self._store = Store(settings.models_path)
        self._threads = settings.threads or _machine.default_threads()
        self._clients_lock = threading.Lock()
        self._sync: EngineClient | None = None
        self._async: AsyncEngineClient | None = None
        self._adapters: dict[str, AdapterFile] = {}
        """By their digests, those that this connection has loaded."""
        self._closed = False

    # --- Chat and generate -------------------------------------------------------------------------------------------

    @hookimpl
    def chat(self, request: ChatRequest) -> Iterator[Chunk]:
        return self._stream(request, lambda stored: self._chat_job(request, stored))

    @hookimpl
    def achat(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        return self._astream(request, lambda stored: self._chat_job(request, stored))

    @hookimpl
    def generate(self, request: GenerateRequest) -> Iterator[Chunk]:
        return self._stream(request, lambda stored: self._generate_job(request, stored))

    @hookimpl
    def agenerate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        return self._astream(request, lambda stored: self._generate_job(request, stored))

    def _chat_job(self, request: ChatRequest, stored: Stored) -> Job:
        return self._answer_job(request, stored, "/v1/chat/completions", _convert.chat_body(request, stored.header))

    def _generate_job(self, request: GenerateRequest, stored: Stored) -> Job:
        path = "/v1/completions" if request.raw else "/v1/chat/completions"
        return self._answer_job(request, stored, path, _convert.generate_body(request, stored.header))

    def _answer_job(
        self, request: ChatRequest | GenerateRequest, stored: Stored, path: str, body: Mapping[str, Any]
    ) -> Job:
        job = self._job(stored, request.call, request.context_window, request.keep_alive, request.adapter)
        notes = _window_notes(stored, request.context_window)
        top = bool(request.options.get("top_logprobs"))
        return replace(
            job,
            path=path,
            body={**_advised(stored, request), **body},
            answer=lambda: Answer(stored.name, top=top, notes=notes),
        )

    def _stream(self, request: ChatRequest | GenerateRequest, prepare: Callable[[Stored], Job]) -> Iterator[Chunk]:
        job = prepare(self._present(request.model, request.call))
        reading = retry.call(lambda: self._client().open(job), request.call)
        try:
            chunk = reading.first
            while True:
                yield chunk
                if chunk.finish_reason is not None:
                    return
                chunk = reading.next()
        finally:
            reading.close()

    async def _astream(
        self, request: ChatRequest | GenerateRequest, prepare: Callable[[Stored], Job]
    ) -> AsyncIterator[Chunk]:
        stored = await self._apresent(request.model, request.call)
        job = await asyncio.to_thread(prepare, stored)
        reading = await retry.acall(lambda: self._aclient().open(job), request.call)
        try:
            chunk = reading.first
            while True:
                yield chunk
                if chunk.finish_reason is not None:
                    return
                chunk = await reading.next()
        finally:
            await reading.close()

    # --- Embed -------------------------------------------------------------------------------------------------------

    @hookimpl
    def embed(self, request: EmbedRequest) -> Embeddings:
        stored = self._present(request.model, request.call)
        job = self._job(stored, request.call, request.context_window, request.keep_alive)
        return self._run(job, self._embedding(request, stored, job.engine))

    @hookimpl
    async def aembed(self, request: EmbedRequest) -> Embeddings:
        stored = await self._apresent(request.model, request.call)
        job = await asyncio.to_thread(self._job, stored, request.call, request.context_window, request.keep_alive)
        return await self._arun(job, self._embedding(request, stored, job.engine))

    def _embedding(self, request: EmbedRequest, stored: Stored, engine: Engine) -> Steps[Embeddings]:
        width = stored.header.figure("embedding_length")
        if request.dimensions not in (None, width):
            raise CapabilityUnsupported(
                f"The vectors of `{stored.name}` have {width} dimensions and cannot be cut.",
                hint="Leave `dimensions` out.",
            )
        running = engine.process.window if engine.process else None
        limit = min(self._settings.batch, self._window(stored, request.context_window) or running or DEFAULT_WINDOW)
        inputs: list[str | list[int]] = []
        warnings: list[str] = []
        for place, text in enumerate(request.inputs):
            # A token stands for one byte at least: most texts are known to fit without counting.
            if len(text.encode(errors="replace")) + SPECIAL_TOKENS <= limit:
                inputs.append(text)
                continue
            answer = yield TOKENIZE, {"content": text, "add_special": True}
            tokens = list(answer["tokens"])
            if len(tokens) > limit:
                if not request.truncate:
                    raise _too_long(len(tokens), limit)
                warnings.append(f"Input {place} was cut from {len(tokens)} to {limit} tokens.")
            inputs.append(tokens[:limit])
        answer = yield EMBEDDINGS, {"input": inputs, "encoding_format": "float"}
        found = sorted(answer["data"], key=lambda each: int(each["index"]))
        usage = answer.get("usage") or {}
        return Embeddings(
            vectors=tuple(each["embedding"] for each in found),
            model=stored.name,
            provider=self.name,
            usage=Usage(input_tokens=usage.get("prompt_tokens")),
            warnings=(*_window_notes(stored, request.context_window), *warnings),
        )

    def _run(self, job: Job, steps: Steps[T]) -> T:
        answer: dict[str, Any] | None = None
        while True:
            try:
                path, body = next(steps) if answer is None else steps.send(answer)
            except StopIteration as done:
                result: T = done.value
                return result
            part = job.at(path, body)
            answer = retry.call(lambda part=part: self._client().ask(part), job.call)  # type: ignore[misc] # a bound name

    async def _arun(self, job: Job, steps: Steps[T]) -> T:
        answer: dict[str, Any] | None = None
        while True:
            try:
                path, body = next(steps) if answer is None else steps.send(answer)
            except StopIteration as done:
                result: T = done.value
                return result
            part = job.at(path, body)
            answer = await retry.acall(lambda part=part: self._aclient().ask(part), job.call)  # type: ignore[misc] # a bound name

    # --- Models ------------------------------------------------------------------------------------------------------
    # What only reads files has no async twin: the core calls it in a worker thread, and so would a twin.

    @hookimpl
    def list_models(self, request: ModelsRequest) -> tuple[ModelInfo, ...]:  # noqa: ARG002 - the store knows
        return tuple(_convert.model_info(stored, full=False) for stored in self._store.models())

    @hookimpl
    def show_model(self, request: ModelRequest) -> ModelInfo:
        return _convert.model_info(self._store.find(request.model, long_lists=True), full=True)

    @hookimpl
    def loaded_models(self, request: ModelsRequest) -> tuple[LoadedModel, ...]:  # noqa: ARG002 - this process knows
        found = (self._loaded_model(engine) for engine in _process.engines())
        return tuple(each for each in found if each is not None)

    def _loaded_model(self, engine: Engine) -> LoadedModel | None:
        process = engine.process
        if process is None or not process.alive:
            return None
        path = Path(engine.launch.model)
        return LoadedModel(
            name=self._store.name_of(path),
            digest=self._store.digest_of(path),
            size=_machine.resident_memory(process.pid),
            expires_at=engine.expires,
            context_window=process.window,
            raw={"pid": process.pid, "version": process.version, "adapters": list(process.adapters)},
        )

    @hookimpl
    def pull_model(self, request: ModelRequest) -> Iterator[PullProgress]:
        return self._store.pull(request.model, Watch(request.call))

    @hookimpl
    def apull_model(self, request: ModelRequest) -> AsyncIterator[PullProgress]:
        return self._apull(request.model, request.call)

    async def _apull(self, model: str, call: Call) -> AsyncGenerator[PullProgress, None]:
        """The steps of a pull, each in a worker thread; one that is given up ends before this does."""
        watch = Watch(call)
        steps = self._store.pull(model, watch)
        pending: asyncio.Future[PullProgress | None] | None = None
        try:
            while True:
                pending = asyncio.ensure_future(asyncio.to_thread(next, steps, None))
                step = await asyncio.shield(pending)
                if step is None:
                    return
                yield step
        finally:
            watch.given_up.set()
            if pending is not None and not pending.done():
                await asyncio.wait({pending})
            if pending is not None and not pending.cancelled():
                pending.exception()  # It has been told, or nobody wants to know.
            await asyncio.to_thread(steps.close)

    @hookimpl
    def load_model(self, request: LoadModelRequest) -> None:
        stored = self._present(request.model, request.call)
        job = self._job(stored, request.call, request.context_window, request.keep_alive)
        retry.call(lambda: lease(job, _first_token(request.call)).end(), request.call)

    @hookimpl
    async def aload_model(self, request: LoadModelRequest) -> None:
        stored = await self._apresent(request.model, request.call)
        job = await asyncio.to_thread(self._job, stored, request.call, request.context_window, request.keep_alive)

        async def load() -> None:
            (await alease(job, _first_token(request.call))).end()

        await retry.acall(load, request.call)

    @hookimpl
    def unload_model(self, request: ModelRequest) -> None:
        path = str(self._store.path_of(request.model))
        for engine in _process.engines():
            if engine.launch.model == path:
                _end(engine, request.call)

    @hookimpl
    async def aunload_model(self, request: ModelRequest) -> None:
        await asyncio.to_thread(self.unload_model, request)

    # --- Adapters ----------------------------------------------------------------------------------------------------

    @hookimpl
    def load_adapter(self, request: LoadAdapterRequest) -> LoadedAdapter:
        stored = self._present(request.model, request.call)
        job = self._adapter_job(request, stored)
        granted = retry.call(lambda: lease(job, _first_token(request.call)), request.call)
        granted.end()
        return self._loaded_adapter(request, granted)

    @hookimpl
    async def aload_adapter(self, request: LoadAdapterRequest) -> LoadedAdapter:
        stored = await self._apresent(request.model, request.call)
        job = await asyncio.to_thread(self._adapter_job, request, stored)
        granted = await retry.acall(lambda: alease(job, _first_token(request.call)), request.call)
        granted.end()
        return self._loaded_adapter(request, granted)

    def _adapter_job(self, request: LoadAdapterRequest, stored: Stored) -> Job:
        """Convert the adapter, look at it, and make the job that has it loaded."""
        adapter = request.adapter
        file = AdapterFile(adapter, lambda: self._store.find(request.model, long_lists=True))
        file.prepare()
        request.call.emit("progress", progress=PullProgress(status=f"loading the adapter {adapter.name}"))
        self._adapters[adapter.digest] = file
        job = self._job(stored, request.call, request.context_window, request.keep_alive)
        wants = job.need
        return replace(job, need=lambda deadline: replace(wants(deadline), adapter=file))

    def _loaded_adapter(self, request: LoadAdapterRequest, granted: Lease) -> LoadedAdapter:
        adapter = request.adapter
        # The file carries the strength it was made for, so the engine applies it as it is: 1.
        return LoadedAdapter(
            name=adapter.name,
            digest=adapter.digest,
            model=request.model,
            slot=granted.process.adapters.index(adapter.digest),
            scale=1.0,
            strategy="hot",
            warnings=granted.notes,
        )

    @hookimpl
    def unload_adapter(self, request: UnloadAdapterRequest) -> None:
        path = str(self._store.path_of(request.adapter.model))
        for engine in _process.engines():
            # The engine cannot drop one alone: it ends, and the next request starts it without.
            if engine.launch.model == path and engine.drop_adapter(request.adapter.digest):
                _end(engine, request.call)

    @hookimpl
    async def aunload_adapter(self, request: UnloadAdapterRequest) -> None:
        await asyncio.to_thread(self.unload_adapter, request)

    # --- Health and capabilities -------------------------------------------------------------------------------------

    @hookimpl
    def health(self, request: HealthRequest) -> Health:
        look = _Look(request, self.address)
        try:
            stored = self._look(look, request)
            if look.wants("answers") and stored is not None:
                self._run(self._job(stored, request.call, request.context_window, request.keep_alive), _one_token())
                look.found.update(model_loaded=True, answers=True)
        except GraftageError as error:
            look.failed(error)
        return look.health()

    @hookimpl
    async def ahealth(self, request: HealthRequest) -> Health:
        look = _Look(request, self.address)
        try:
            stored = await asyncio.to_thread(self._look, look, request)
            if look.wants("answers") and stored is not None:
                job = await asyncio.to_thread(
                    self._job, stored, request.call, request.context_window, request.keep_alive
                )
                await self._arun(job, _one_token())
                look.found.update(model_loaded=True, answers=True)
        except GraftageError as error:
            look.failed(error)
        return look.health()

    def _look(self, look: _Look, request: HealthRequest) -> Stored | None:
        """All levels but `answers`."""
        _process.find_package()
        look.found["reachable"] = True
        if look.wants("api"):
            look.found.update(version=_process.probe(), api=True)
        if not look.wants("model_present"):
            return None
        stored = self._store.find(request.model or DEFAULT_MODEL)
        look.found["model_present"] = True
        if look.wants("model_loaded"):
            loaded = any(
                engine.launch.model == str(stored.path) and engine.process is not None and engine.process.alive
                for engine in _process.engines()
            )
            look.found["model_loaded"] = loaded
        return stored

    @hookimpl
    def capabilities(self) -> Capabilities:
        return Capabilities(features=_convert.FEATURES, options=_convert.OPTIONS)

    # --- The end -----------------------------------------------------------------------------------------------------

    @hookimpl
    def close(self, request: CloseRequest) -> None:  # noqa: ARG002 - nothing in it yet
        self._closed = True
        client, self._sync = self._sync, None
        if client is not None:
            client.close()
        _process.let_go(id(self))

    @hookimpl
    async def aclose(self, request: CloseRequest) -> None:
        client, self._async = self._async, None
        if client is not None:
            await client.close()
        await asyncio.to_thread(self.close, request)

    # --- Below the hooks ---------------------------------------------------------------------------------------------

    def _client(self) -> EngineClient:
        with self._clients_lock:
            if self._sync is None:
                self._sync = EngineClient(self._settings.transport)
            return self._sync

    def _aclient(self) -> AsyncEngineClient:
        with self._clients_lock:
            if self._async is None:
                self._async = AsyncEngineClient(self._settings.transport)
            return self._async

    def _present(self, model: str, call: Call) -> Stored:
        """The model's file; the default model is pulled on its first use."""
        if self._comes_by_itself(model):
            for step in self._store.pull(model, Watch(call)):
                call.emit("progress", progress=step)
        return self._store.find(model)

    async def _apresent(self, model: str, call: Call) -> Stored:
        if await asyncio.to_thread(self._comes_by_itself, model):
            async with contextlib.aclosing(self._apull(model, call)) as steps:
                async for step in steps:
                    call.emit("progress", progress=step)
        return await asyncio.to_thread(self._store.find, model)

    def _comes_by_itself(self, model: str) -> bool:
        return model.lower() == DEFAULT_MODEL and not self._store.has(model)

    def _job(
        self,
        stored: Stored,
        call: Call,
        context_window: int | None,
        keep_alive: float | None,
        adapter: LoadedAdapter | None = None,
    ) -> Job:
        """What every request to the engine starts from: which engine, and what it must be like."""
        if self._closed:
            raise ConnectionFailed("The connection is closed.", retryable=False)
        settings = self._settings
        header = stored.header
        launch = Launch(
            model=str(stored.path),
            slots=settings.slots,
            threads=self._threads,
            batch=settings.batch,
            gpu_layers=settings.gpu_layers,
            pool=header.figure("pooling_type") is None,
        )
        engine = _process.hold(launch, id(self))
        window = self._window(stored, context_window)
        default = self._window(stored, DEFAULT_WINDOW) or DEFAULT_WINDOW
        if settings.memory_check:
            _require_memory(stored, engine, window, default)
        wanted = self._known_adapter(adapter) if adapter is not None else None

        def need(deadline: float) -> Need:
            return Need(deadline=deadline, window=window, default_window=default, keep_alive=keep_alive, adapter=wanted)

        return Job(call=call, engine=engine, need=need, path="")

    def _known_adapter(self, adapter: LoadedAdapter) -> AdapterFile:
        """The file of an adapter that a request names; the engine may have been restarted without it."""
        file = self._adapters.get(adapter.digest)
        if file is None:
            # The engine would take any number and answer with the base model.
            raise AdapterError(
                f"The adapter `{adapter.name}` is not loaded here.", reference=adapter.name, hint="Load it again."
            )
        return file

    def _window(self, stored: Stored, wanted: int | None) -> int | None:
        """The window to ask for: not above what the model was trained for."""
        trained = stored.header.figure("context_length")
        return min(wanted, trained) if wanted and trained else wanted


# --- Parts -----------------------------------------------------------------------------------------------------------


def _advised(stored: Stored, request: ChatRequest | GenerateRequest) -> dict[str, Any]:
    """The options for what the caller leaves open. JSON repeats its marks, so nothing may hold that against it."""
    bound = request.format is not None
    return {name: value for name, value in stored.advised.items() if not (bound and name == "repeat_penalty")}


def _window_notes(stored: Stored, wanted: int | None) -> tuple[str, ...]:
    trained = stored.header.figure("context_length")
    if wanted is None or trained is None or wanted <= trained:
        return ()
    return (f"`context_window` was lowered from {wanted} to {trained}: the model was trained for no more.",)


def _first_token(call: Call) -> float:
    return min(call.deadline, time.monotonic() + call.timeouts.first_token)


def _one_token() -> Steps[None]:
    yield "/v1/completions", {"prompt": "Hi", "max_tokens": 1}


def _too_long(tokens: int, limit: int) -> ContextOverflow:
    return ContextOverflow(
        f"A text of {tokens} tokens does not fit: {limit} are taken at once.",
        hint="Raise the setting `batch` and the window, send less, or let it be cut with `truncate`.",
        details={"tokens": tokens, "limit": limit},
    )


def _require_memory(stored: Stored, engine: Engine, window: int | None, default: int) -> None:
    """Refuse a model that the free memory cannot hold, before the engine takes it."""
    process = engine.process
    running = process if process is not None and process.alive else None
    if running is not None and window in (None, running.window):
        return
    free = _machine.free_memory()
    if free is None:
        return
    if running is not None:
        free += _machine.resident_memory(running.pid) or 0
    window = window or default
    header, launch = stored.header, engine.launch
    cache = _convert.cache_bytes(header, window * launch.slots)
    needed = header.size + cache + launch.batch * _convert.vocabulary(header) * BYTES_OF_A_SCORE
    if needed > free:
        raise ModelLoadFailed(
            f"The model `{stored.name}` needs about {needed / 1e6:.0f} MB with a context window of {window} tokens"
            f" ({header.size / 1e6:.0f} MB of weights, {cache / 1e6:.0f} MB of cache), and {free / 1e6:.0f} MB are"
            " free.",
            reason="memory",
            hint="Choose a smaller model or window, free memory, or turn the setting `memory_check` off.",
            details={"needed": needed, "free": free},
        )


def _end(engine: Engine, call: Call) -> None:
    """End an engine once nothing runs on it."""
    future = engine.ask(Need(deadline=call.deadline, stop=True))
    try:
        future.result(min(max(0.0, call.deadline - time.monotonic()), threading.TIMEOUT_MAX))
    except Stopped:
        pass
    except FutureTimeout as error:
        engine.withdraw(future)
        raise ProviderTimeout(
            f"The engine could not be ended in time: {engine.running} requests hold it.",
            phase="total",
            hint="Close streams that are not read.",
        ) from error


class _Look:
    """A health check as it goes up the levels."""

    def __init__(self, request: HealthRequest, address: str) -> None:
        self._request = request
        self._address = address
        self.found: dict[str, Any] = {"reachable": False}

    def wants(self, level: str) -> bool:
        """Whether the check goes up to this level."""
        names: tuple[str, ...] = HEALTH_LEVELS
        return names.index(self._request.level) >= names.index(level)

    def failed(self, error: GraftageError) -> None:
        """Note why the first level that was not reached was not."""
        self.found["error"] = error
        for level in ("api", "model_present", "model_loaded", "answers"):
            if self.wants(level) and level not in self.found:
                self.found[level] = False
                return

    def health(self) -> Health:
        """What was found."""
        return Health(level=self._request.level, address=self._address, model=self._request.model, **self.found)
