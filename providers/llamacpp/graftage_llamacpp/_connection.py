"""One connection: every hook of the contract, on an engine in a child process.

Hooks that only read files or processes are plain functions: the core runs them in a thread.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from graftage import retry
from graftage._values import user_path
from graftage.calls import (
    Call,
    ChatRequest,
    CloseRequest,
    EmbedRequest,
    GenerateRequest,
    HealthRequest,
    LoadAdapterRequest,
    LoadModelRequest,
    ModelRequest,
    ModelsRequest,
    RerankRequest,
    UnloadAdapterRequest,
)
from graftage.exceptions import (
    AdapterError,
    AdapterUnsupported,
    CapabilityUnsupported,
    ConnectionFailed,
    ContextOverflow,
    ModelLoadFailed,
    ProtocolError,
)
from graftage.footprint import footprint, read_shape
from graftage.hookspecs import hookimpl
from graftage.http.completions import ChatReader, read_embeddings
from graftage.types import (
    Capabilities,
    Chunk,
    Embeddings,
    Health,
    LoadedAdapter,
    LoadedModel,
    ModelInfo,
    PullProgress,
    Ranking,
    Timings,
    Usage,
    Warmed,
)
from graftage_llamacpp import _convert, _engine
from graftage_llamacpp._engine import (
    BASE_URL,
    CHAT,
    COMPLETIONS,
    COUNT,
    EMBEDDINGS,
    RERANK,
    TEMPLATE,
    TOKENIZE,
    AdapterFile,
    Engine,
    EngineTransport,
    Job,
    Lease,
    Need,
)
from graftage_llamacpp._process import (
    DEFAULT_MODEL,
    Launch,
    LlamaCppSettings,
    Process,
    SlotUse,
    common_prefix,
    default_threads,
    find_package,
    free_memory,
    probe,
    resident_memory,
)
from graftage_llamacpp._sources import Watch
from graftage_llamacpp._states import States
from graftage_llamacpp._store import Store, Stored

if TYPE_CHECKING:
    from graftage.hookspecs import ConnectRequest
    from graftage.types import Adapter

__all__ = ["LlamaCppConnection"]

T = TypeVar("T")
EngineRequest: TypeAlias = (
    ChatRequest | GenerateRequest | EmbedRequest | RerankRequest | LoadModelRequest | LoadAdapterRequest
)
"""A request that needs the engine."""

CAPABILITIES: Final = Capabilities(
    features=_convert.FEATURES,
    options=_convert.OPTIONS,
    parameters=frozenset({"keep_alive", "context_window", "max_tokens"}),
)
DEFAULT_WINDOW: Final = 4096
"""Tokens if neither the caller nor a policy sets them; fewer if the model was trained for fewer."""
KNOWN_ADAPTERS: Final = 256
"""How many adapters a connection remembers. The core loads an older one again."""
EARLY: Final = (
    "The engine applies the adapter `{}` from the token before its invocation tokens on, and its trainer from the first"
    " of them on: replies may differ."
)
"""llama.cpp's `server-context.cpp` reads the prompt up to `alora_invocation_start - 1` without such an adapter."""
OTHERS_SECONDS: Final = 10.0
"""Most of the time for the conversion of adapters that a call does not need; never more than a quarter of its time."""
SPECIAL_TOKENS: Final = 4
"""How many tokens a tokenizer may add to a text."""


class LlamaCppConnection:
    """The hooks of a connection. The first request that needs the engine starts it."""

    def __init__(self, request: ConnectRequest, settings: LlamaCppSettings) -> None:
        self.address = "embedded"
        self.default_model = DEFAULT_MODEL
        self._settings = settings
        self._store = Store(settings.models_path)
        self._http = request.http(BASE_URL, refusal=_convert.refusal, server="the engine", transport=EngineTransport)
        self._adapters: dict[str, AdapterFile] = {}
        """The adapters that this connection has loaded, by digest."""
        self._closed = False

    @hookimpl
    def capabilities(self) -> Capabilities:
        return CAPABILITIES

    @hookimpl
    def close(self, request: CloseRequest) -> None:  # noqa: ARG002 - required by the hook
        self._closed = True
        _engine.release(id(self))

    # --- Inference ---------------------------------------------------------------------------------------------------

    @hookimpl
    async def chat(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        job = await self._job(request, request.adapter)
        async for chunk in self._chunks(request, job, CHAT, _convert.chat_body(request, job.stored.header)):
            yield chunk

    @hookimpl
    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        job = await self._job(request, request.adapter)
        body = _convert.generate_body(request, job.stored.header)
        async for chunk in self._chunks(request, job, COMPLETIONS if request.raw else CHAT, body):
            yield chunk

    async def _chunks(
        self, request: ChatRequest | GenerateRequest, job: Job, path: str, body: Mapping[str, object]
    ) -> AsyncIterator[Chunk]:
        reader = ChatReader(request)
        body = {**_default_options(job.stored, request), **body}
        events = self._http.events(
            "POST", path, body, call=request.call, read=reader.read, words=reader.words, context={"job": job}
        )
        async for chunk in events:
            if chunk is not None:
                yield chunk
        last, load = reader.last(), None
        notes: tuple[str, ...] = ()
        if job.lease is not None and job.lease.use is not None:
            load, notes = job.lease.load, (*job.lease.notes, *_check_cache(job.lease.use, last))
        for each in job.need.adapters:
            notes, each.notes = (*each.notes, *notes), ()
        timings = replace(last.timings or Timings(), load=load)
        warnings = (*_window_notes(job.stored, request.context_window), *notes)
        yield replace(last, model=job.stored.name, timings=timings, warnings=warnings)

    @hookimpl
    async def warm(self, request: ChatRequest) -> Warmed:
        job = await self._job(request, request.adapter)
        text, tokens = await self._beginning(request, job)
        if not tokens:
            return Warmed(tokens=0, cached_tokens=0)
        body = {**_convert.shared_body(replace(request, options={}, max_tokens=1)), "prompt": tokens, "keep": text}
        last = [chunk async for chunk in self._chunks(request, job, COMPLETIONS, body)][-1]
        usage, saved, warnings = last.usage or Usage(), job.place.size if job.place else None, last.warnings
        if saved is None and job.lease is not None and job.states is not None:
            problem = job.place.problem if job.place else "an adapter's file has changed since it was loaded"
            if any(each.activated for each in job.need.adapters):
                problem = "its adapter acts only after its invocation, so the whole prompt is read each time"
            warnings = (*warnings, f"The prompt was not saved: {problem}.")
        return Warmed(tokens=usage.input_tokens, cached_tokens=usage.cached_tokens, saved=saved, warnings=warnings)

    async def _beginning(self, request: ChatRequest, job: Job) -> tuple[str, list[int]]:
        """Return the text with which later prompts begin, and its tokens.

        What two different continuations have in common is right for any template, and wherever the tokenizer cuts.
        """
        texts, tokens = [], []
        for messages in _convert.continuations(request.messages):
            changed = replace(request, messages=messages, adapter=None)
            body = _convert.chat_body(changed, job.stored.header)
            text = await self._post(job, TEMPLATE, body, lambda found: str(found["prompt"]))
            whole = {"content": text, "add_special": True, "parse_special": True}
            texts.append(text)
            tokens.append(await self._post(job, TOKENIZE, whole, _convert.tokens))
        return texts[0][: common_prefix(*texts)], tokens[0][: common_prefix(*tokens)]

    @hookimpl
    async def embed(self, request: EmbedRequest) -> Embeddings:
        job = await self._job(request)
        _convert.require("embed", _convert.features(job.stored.header), job.stored.name)
        stored, running = job.stored, job.engine.running
        width = stored.header.figure("embedding_length")
        if request.dimensions not in (None, width):
            raise CapabilityUnsupported(
                f"The vectors of `{stored.name}` have {width} dimensions and cannot be cut.",
                hint="Leave `dimensions` out.",
            )
        limit = min(self._settings.batch, job.need.window or (running.window if running else DEFAULT_WINDOW))
        inputs: list[str | list[int]] = []
        warnings = [*_window_notes(stored, request.context_window)]
        for place, text in enumerate(request.inputs):
            # A token is at least one byte, so most texts fit without counting.
            if len(text.encode(errors="replace")) + SPECIAL_TOKENS <= limit:
                inputs.append(text)
                continue
            tokens = await self._post(job, TOKENIZE, {"content": text, "add_special": True}, _convert.tokens)
            if len(tokens) > limit:
                if not request.truncate:
                    raise _too_long_error(len(tokens), limit)
                warnings.append(f"Input {place} was cut from {len(tokens)} to {limit} tokens.")
            inputs.append(tokens[:limit])
        found = await self._post(job, EMBEDDINGS, {"input": inputs, "encoding_format": "base64"}, read_embeddings)
        return replace(found, model=stored.name, warnings=tuple(warnings))

    @hookimpl
    async def rerank(self, request: RerankRequest) -> Ranking:
        job = await self._job(request)
        _convert.require("rerank", _convert.features(job.stored.header), job.stored.name)
        body = {"query": request.query, "documents": request.documents}
        read = partial(
            _convert.ranking, model=job.stored.name, warnings=_window_notes(job.stored, request.context_window)
        )
        return await self._post(job, RERANK, body, read)

    @hookimpl
    async def count_tokens(self, request: ChatRequest) -> int:
        job = await self._job(request)
        body = _convert.chat_body(replace(request, adapter=None), job.stored.header)
        return await self._post(job, COUNT, body, _convert.token_count)

    async def _post(self, job: Job, path: str, body: Mapping[str, object], read: Callable[[Mapping[str, Any]], T]) -> T:
        return await self._http.json("POST", path, body, call=job.call, read=read, context={"job": job})

    # --- Models ------------------------------------------------------------------------------------------------------

    @hookimpl
    def list_models(self, request: ModelsRequest) -> tuple[ModelInfo, ...]:  # noqa: ARG002 - required by the hook
        return tuple(_convert.model_info(stored, full=False) for stored in self._store.models())

    @hookimpl
    def show_model(self, request: ModelRequest) -> ModelInfo:
        watch = Watch(request.call)
        if self._store.has(request.model):
            self._find_or_pull(request.model, request.call, watch)
        return _convert.model_info(self._store.find(request.model, watch, long_lists=True), full=True)

    @hookimpl
    def loaded_models(self, request: ModelsRequest) -> tuple[LoadedModel, ...]:  # noqa: ARG002 - required by the hook
        found = ((engine, engine.running) for engine in _engine.engines())
        return tuple(self._loaded_model(engine, process) for engine, process in found if process is not None)

    def _loaded_model(self, engine: Engine, process: Process) -> LoadedModel:
        path, adapters = Path(engine.launch.model), [*process.adapters]
        return LoadedModel(
            name=self._store.name_of(path),
            digest=self._store.digest_of(path) if path.exists() else None,
            size=resident_memory(process.pid),
            expires_at=engine.expires,
            context_window=process.window,
            raw={"pid": process.pid, "version": process.version, "adapters": adapters, "starts": engine.starts},
        )

    @hookimpl
    def pull_model(self, request: ModelRequest) -> Iterator[PullProgress]:
        return self._store.pull(request.model, Watch(request.call))

    @hookimpl
    async def load_model(self, request: LoadModelRequest) -> None:
        await _load(await self._job(request))

    @hookimpl
    async def unload_model(self, request: ModelRequest) -> None:
        for engine in _engine.engines(self._store.path_of(request.model)):
            await engine.end(request.call)

    @hookimpl
    async def delete_model(self, request: ModelRequest) -> None:
        path = await request.call.run(self._store.path_to_delete, request.model)
        for engine in _engine.engines(path):
            await engine.end(request.call)
        await request.call.run(self._store.delete, path)

    # --- Adapters ----------------------------------------------------------------------------------------------------

    @hookimpl
    async def load_adapter(self, request: LoadAdapterRequest) -> LoadedAdapter:
        call, adapter = request.call, request.adapter
        job = await self._job(request)
        file = self._file(adapter, request.model)
        await call.run(file.prepare)
        if file.activated and self._settings.slots > 1:
            # Its server reads such prompts in parts, and mixes them up with those of other slots.
            raise AdapterUnsupported(
                f"The adapter `{adapter.name}` acts only after its invocation tokens, which the engine can do only with"
                " one slot.",
                reference=adapter.name,
                hint="Set `slots` to 1.",
            )
        call.emit("progress", progress=PullProgress(status=f"loading the adapter {adapter.name}"))
        running = job.engine.running
        if running is None or adapter.digest not in running.adapters:
            # The engine loads adapters only when it starts, so it starts with all that may be needed next.
            job.need.others = await call.run(self._other_files, request)
        job.need.adapters = (file,)
        lease = await _load(job)
        file.notes = lease.notes
        self._keep(file)
        # The file contains its scale, so the engine applies it with 1.
        return LoadedAdapter(
            name=adapter.name,
            digest=adapter.digest,
            model=request.model,
            slot=[*lease.process.adapters].index(adapter.digest),
            scale=1.0,
            strategy="hot",
            warnings=(EARLY.format(adapter.name),) if file.activated else (),
        )

    def _file(self, adapter: Adapter, model: str) -> AdapterFile:
        # It may be made once more long after this call, whose deadline must not matter then.
        return AdapterFile(adapter, lambda: self._store.find(model, Watch(Call()), long_lists=True))

    def _other_files(self, request: LoadAdapterRequest) -> tuple[AdapterFile, ...]:
        """Convert the other known adapters for which there is time; those that cannot be converted are left out."""
        others = request.others()[: self._settings.adapter_count - 1]
        if not others:
            return ()
        model = self._store.find(request.model, Watch(request.call), long_lists=True)
        now = time.monotonic()
        end = now + min(OTHERS_SECONDS, (request.call.deadline - now) / 4)
        files = (self._file(adapter, request.model) for adapter in others)
        return tuple(file for file in takewhile(lambda _: time.monotonic() < end, files) if file.usable(model))

    def _keep(self, file: AdapterFile) -> None:
        """Remember an adapter: the engine may drop it, and a later request load it again."""
        self._adapters.pop(file.digest, None)
        self._adapters[file.digest] = file
        while len(self._adapters) > KNOWN_ADAPTERS:
            self._adapters.pop(next(iter(self._adapters)))

    @hookimpl
    async def unload_adapter(self, request: UnloadAdapterRequest) -> None:
        for engine in _engine.engines(self._store.path_of(request.adapter.model)):
            # The engine cannot drop one adapter: end it, and the next request starts it without.
            if engine.drop_adapter(request.adapter.digest):
                await engine.end(request.call)

    # --- Health ------------------------------------------------------------------------------------------------------

    @hookimpl
    async def health(self, request: HealthRequest) -> Health:
        return await request.check(partial(self._check_levels, request), address=self.address, reachable=False)

    async def _check_levels(self, request: HealthRequest, found: dict[str, Any]) -> None:
        """Check each level up to the requested one."""
        call, model = request.call, request.model or DEFAULT_MODEL
        await call.run(find_package)
        found["reachable"] = True
        if request.wants("api"):
            found.update(version=await call.run(probe), api=True)
        if request.wants("model_present"):
            stored = await call.run(self._store.find, model, Watch(call))
            found["model_present"] = True
        if request.wants("model_loaded"):
            found["model_loaded"] = any(engine.running for engine in _engine.engines(stored.path))
        if request.wants("answers"):
            _convert.require("generate", _convert.features(stored.header), stored.name)
            load = LoadModelRequest(
                call=call, model=model, context_window=request.context_window, keep_alive=request.keep_alive
            )
            await self._post(await self._job(load), COMPLETIONS, {"prompt": "Hi", "max_tokens": 1}, dict)
            found.update(model_loaded=True, answers=True)

    # --- Below the hooks ---------------------------------------------------------------------------------------------

    async def _job(self, request: EngineRequest, adapter: LoadedAdapter | None = None) -> Job:
        """Find the engine for a request, and what the request needs of it."""
        watch = Watch(request.call)
        try:
            return await request.call.run(self._prepare, request, adapter, watch)
        finally:
            watch.cancelled.set()

    def _prepare(self, request: EngineRequest, adapter: LoadedAdapter | None, watch: Watch) -> Job:
        stored = self._find_or_pull(request.model, request.call, watch)
        if self._closed:
            raise ConnectionFailed("The connection is closed.", retryable=False, hint="Use a client that is open.")
        engine = self._engine(stored)
        need = Need(
            window=_window(stored, request.context_window),
            default_window=_window(stored, DEFAULT_WINDOW) or DEFAULT_WINDOW,
            keep_alive=request.keep_alive,
            adapters=self._known_adapters(adapter) if adapter is not None else (),
            adapter_count=self._settings.adapter_count,
            adapter_bytes=self._settings.adapter_bytes,
        )
        if self._settings.memory_check:
            _require_memory(stored, engine, need)
        states = self._states if self._settings.prompts_bytes else None
        return Job(call=request.call, stored=stored, engine=engine, need=need, states=states)

    @cached_property
    def _states(self) -> States:
        folder = self._settings.prompts_path
        if folder is None:
            from platformdirs import user_cache_path

            folder = user_cache_path("graftage", appauthor=False) / "prompts"
        return States(user_path(folder).absolute(), self._settings.prompts_bytes)

    def _find_or_pull(self, model: str, call: Call, watch: Watch) -> Stored:
        """Find the model's file. The default model is pulled on its first use, and again if its file has changed."""
        if model.lower() == DEFAULT_MODEL and not self._store.is_unchanged(model, watch):
            for step in self._store.pull(model, watch):
                call.emit("progress", progress=step)
        return self._store.find(model, watch)

    def _engine(self, stored: Stored) -> Engine:
        settings = self._settings
        launch = Launch(
            model=str(stored.path),
            slots=settings.slots,
            threads=settings.threads or default_threads(),
            # The engine shares a batch out equally among its slots, and crashes if it cannot.
            batch=-(-settings.batch // settings.slots) * settings.slots,
            gpu_layers=settings.gpu_layers,
            pooling=_convert.pooling(stored.header),
            prompts=str(self._states.folder),
        )
        return _engine.acquire(launch, id(self))

    def _known_adapters(self, adapter: LoadedAdapter) -> tuple[AdapterFile, ...]:
        """Return the files of a request's adapters. The engine may have been restarted without them."""
        found = []
        for part, weight in adapter.weights:
            file = self._adapters.get(part.digest)
            if file is None:
                # The engine would accept any number and use the base model.
                raise AdapterError(
                    f"The adapter `{part.name}` is not loaded here.",
                    reference=part.name,
                    retryable=True,
                    hint="Load it again.",
                )
            if file.activated and (weight < 0 or len(adapter.weights) > 1):
                raise AdapterUnsupported(
                    f"The adapter `{part.name}` acts only after its invocation tokens, so the engine cannot combine it"
                    " with others or subtract it.",
                    reference=part.name,
                    hint="Use it alone, with a positive weight.",
                )
            found.append(file)
        return tuple(found)


# --- Helpers ---------------------------------------------------------------------------------------------------------


async def _load(job: Job) -> Lease:
    """Start the engine as the job needs it, and return its lease, which has ended."""

    async def load() -> Lease:
        lease = await job.take(min(job.call.deadline, time.monotonic() + job.call.timeouts.first_token))
        lease.end()
        return lease

    return await retry.call(load, job.call)


def _check_cache(use: SlotUse, last: Chunk) -> tuple[str, ...]:
    """Check that the engine read the whole prompt if it had to; return warnings.

    Raises:
        ProtocolError: it used what another adapter or weight may have computed.
    """
    cached = last.usage.cached_tokens if last.usage else None
    if cached is not None and cached > use.most:
        use.distrust()
        raise ProtocolError(
            f"The engine used {cached} tokens of its cache, which other adapters may have computed: the reply may be"
            " wrong.",
            retryable=True,
            hint="Ask again. If that does not help, unload the model.",
        )
    if use.saved is not None and not cached:
        return ("A saved prompt was restored, but the engine read it again.",)
    return ()


def _window(stored: Stored, wanted: int | None) -> int | None:
    """Return the window to request: at most what the model was trained for."""
    trained = stored.header.figure("context_length")
    return min(wanted, trained) if wanted and trained else wanted


def _window_notes(stored: Stored, wanted: int | None) -> tuple[str, ...]:
    window = _window(stored, wanted)
    if window == wanted:
        return ()
    return (f"`context_window` was lowered from {wanted} to {window}, the most that the model was trained for.",)


def _default_options(stored: Stored, request: ChatRequest | GenerateRequest) -> dict[str, Any]:
    """Return the model's options for those that the caller did not set."""
    # JSON repeats its punctuation: a repeat penalty would push the model away from valid JSON.
    bound = request.format is not None
    return {name: value for name, value in stored.default_options.items() if not (bound and name == "repeat_penalty")}


def _too_long_error(tokens: int, limit: int) -> ContextOverflow:
    return ContextOverflow(
        f"A text of {tokens} tokens is too long: the engine reads at most {limit} at once.",
        hint="Raise the setting `batch` and the window, shorten the text, or allow `truncate`.",
        details={"tokens": tokens, "limit": limit},
    )


def _require_memory(stored: Stored, engine: Engine, need: Need) -> None:
    """Refuse a model that is too large for the free memory, before the engine loads it."""
    running = engine.running
    if running is not None and need.window in (None, running.window):
        return
    free, shape = free_memory(), read_shape(_convert.model_info(stored, full=True))
    if free is None or shape is None:
        return
    if running is not None:
        free += resident_memory(running.pid) or 0
    window = need.window or need.default_window
    needs = footprint(shape, window, slots=engine.launch.slots, batch=engine.launch.batch)
    if needs.counted > free:
        raise ModelLoadFailed(
            f"The model `{stored.name}` needs about {needs.counted / 1e6:.0f} MB with a context window of {window}"
            f" tokens ({needs.weights / 1e6:.0f} MB of weights, {needs.cache / 1e6:.0f} MB of cache), and"
            f" {free / 1e6:.0f} MB are free.",
            reason="memory",
            hint="Choose a smaller model or window, free memory, or turn the setting `memory_check` off.",
            details={"needed": needs.counted, "free": free},
        )
