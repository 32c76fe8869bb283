"""One connection to a server: every hook of the contract, sync and async.

The official package reads the answers, and pulls. Its client loses some of what can be asked and takes an error under
status 200 for an answer, so the rest is asked through an httpx client beside it. Both stand on one guarded transport,
which bounds and types every answer.
"""

from __future__ import annotations

import contextlib
import difflib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio.to_thread

from graftage import retry
from graftage.exceptions import ConnectionFailed, GraftageError, ModelNotFound, ProtocolError, ProviderError
from graftage.hookspecs import hookimpl
from graftage.http import Exchange, exchange
from graftage.types import Call, Capabilities, Chunk, Health, ModelInfo, PullProgress, Timeouts
from graftage_ollama import _convert
from graftage_ollama._adapters import Adapters, Wire, drive
from graftage_ollama._clients import AsyncClients, AsyncLines, Clients, Lines, checked_line, request_headers, typed
from graftage_ollama._errors import refusal
from graftage_ollama._host import parse_host

if TYPE_CHECKING:
    from graftage.types import (
        ChatRequest,
        CloseRequest,
        Embeddings,
        EmbedRequest,
        GenerateRequest,
        HealthRequest,
        LoadAdapterRequest,
        LoadedAdapter,
        LoadedModel,
        LoadModelRequest,
        ModelRequest,
        ModelsRequest,
        PruneAdaptersRequest,
        UnloadAdapterRequest,
    )
    from graftage_ollama import OllamaSettings

__all__ = ["OllamaConnection"]

T = TypeVar("T")
FEATURES: Final = frozenset(
    {
        "chat",
        "generate",
        "embed",
        "tools",
        "structured_output",
        "thinking",
        "images",
        "logprobs",
        "suffix",
        "list_models",
        "show_model",
        "loaded_models",
        "pull_model",
        "load_model",
        "unload_model",
        "load_adapter",
        "unload_adapter",
        "prune_adapters",
    }
)
SUGGESTION_TIMEOUTS: Final = Timeouts(connect=1.0, first_token=2.0, idle=2.0, total=3.0)
"""Close names are a courtesy: they must not hold the error up."""


class OllamaConnection:
    """The hooks, on clients that open nothing until the first request."""

    keeps_time = True

    def __init__(self, name: str, settings: OllamaSettings) -> None:
        self.name = name
        self._url = parse_host(settings.host)
        self.address = str(self._url).rstrip("/")
        self._transport = settings.transport
        self._headers = request_headers(settings, self._url)
        self._secrets = tuple(
            each.get_secret_value() for each in (settings.api_key, *settings.headers.values()) if each
        )
        self._merge = settings.merge_adapters
        self._base_file = settings.adapter_base_file
        self._lock = threading.Lock()
        self._sync: Clients | None = None
        self._async: AsyncClients | None = None
        self._closed = False

    # --- Chat and generate -------------------------------------------------------------------------------------------

    @hookimpl
    def chat(self, request: ChatRequest) -> Iterator[Chunk]:
        body = _convert.chat_body(request)
        return self._stream(request.call, "chat", body, _convert.ChatReader(request).chunk)

    @hookimpl
    def achat(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        body = _convert.chat_body(request)
        return self._astream(request.call, "chat", body, _convert.ChatReader(request).chunk)

    @hookimpl
    def generate(self, request: GenerateRequest) -> Iterator[Chunk]:
        body = _convert.generate_body(request)
        return self._stream(request.call, "generate", body, lambda line: _convert.generate_chunk(line, request))

    @hookimpl
    def agenerate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        body = _convert.generate_body(request)
        return self._astream(request.call, "generate", body, lambda line: _convert.generate_chunk(line, request))

    def _stream(
        self, call: Call, operation: str, body: Mapping[str, Any], convert: Callable[[bytes], Chunk]
    ) -> Iterator[Chunk]:
        def start() -> Iterator[bytes]:
            with self._clients().http.stream("POST", f"/api/{operation}", json=body) as response:
                yield from response.iter_raw()

        def opened() -> tuple[Lines[bytes], bytes]:
            lines = Lines(self._exchange(call, operation, body["model"], lines=True), start())
            return lines, lines.first()

        lines, line = self._suggesting(lambda: retry.call(opened, call), call)
        try:
            while True:
                chunk = _converted(convert, line)
                if chunk.finish_reason is not None:
                    lines.drain()
                yield chunk
                found = None if chunk.finish_reason is not None else lines.next()
                if found is None:
                    return
                line = found
        finally:
            lines.close()

    async def _astream(
        self, call: Call, operation: str, body: Mapping[str, Any], convert: Callable[[bytes], Chunk]
    ) -> AsyncIterator[Chunk]:
        async def start() -> AsyncIterator[bytes]:
            async with self._aclients().http.stream("POST", f"/api/{operation}", json=body) as response:
                async for line in response.aiter_raw():
                    yield line

        async def opened() -> tuple[AsyncLines[bytes], bytes]:
            lines = AsyncLines(self._exchange(call, operation, body["model"], lines=True), start())
            return lines, await lines.first()

        lines, line = await self._asuggesting(lambda: retry.acall(opened, call), call)
        try:
            while True:
                chunk = _converted(convert, line)
                if chunk.finish_reason is not None:
                    await lines.drain()
                yield chunk
                found = None if chunk.finish_reason is not None else await lines.next()
                if found is None:
                    return
                line = found
        finally:
            await lines.close()

    # --- What answers once -------------------------------------------------------------------------------------------

    @hookimpl
    def embed(self, request: EmbedRequest) -> Embeddings:
        body = _convert.embed_body(request)
        return self._ask(
            request.call,
            "embed",
            lambda each: each.json("POST", "/api/embed", body),
            lambda answer: _convert.embeddings(answer, request.dimensions),
            request.model,
        )

    @hookimpl
    async def aembed(self, request: EmbedRequest) -> Embeddings:
        body = _convert.embed_body(request)
        return await self._aask(
            request.call,
            "embed",
            lambda each: each.json("POST", "/api/embed", body),
            lambda answer: _convert.embeddings(answer, request.dimensions),
            request.model,
        )

    @hookimpl
    def list_models(self, request: ModelsRequest) -> tuple[ModelInfo, ...]:
        return self._listed(request.call)

    @hookimpl
    async def alist_models(self, request: ModelsRequest) -> tuple[ModelInfo, ...]:
        return await self._alisted(request.call)

    @hookimpl
    def loaded_models(self, request: ModelsRequest) -> tuple[LoadedModel, ...]:
        return self._ask(
            request.call, "loaded_models", lambda each: each.json("GET", "/api/ps"), _convert.loaded_models
        )

    @hookimpl
    async def aloaded_models(self, request: ModelsRequest) -> tuple[LoadedModel, ...]:
        return await self._aask(
            request.call, "loaded_models", lambda each: each.json("GET", "/api/ps"), _convert.loaded_models
        )

    @hookimpl
    def show_model(self, request: ModelRequest) -> ModelInfo:
        # Only `verbose` gives the arrays of the metadata; the official client cannot ask for it.
        body = {"model": request.model, "verbose": True}
        return self._ask(
            request.call,
            "show_model",
            lambda each: each.json("POST", "/api/show", body),
            lambda answer: _convert.model_info(request.model, answer),
            request.model,
        )

    @hookimpl
    async def ashow_model(self, request: ModelRequest) -> ModelInfo:
        body = {"model": request.model, "verbose": True}
        return await self._aask(
            request.call,
            "show_model",
            lambda each: each.json("POST", "/api/show", body),
            lambda answer: _convert.model_info(request.model, answer),
            request.model,
        )

    @hookimpl
    def load_model(self, request: LoadModelRequest) -> None:
        body = _residency(request.model, request.keep_alive, request.context_window)
        self._json(request.call, "load_model", "/api/generate", body)

    @hookimpl
    async def aload_model(self, request: LoadModelRequest) -> None:
        body = _residency(request.model, request.keep_alive, request.context_window)
        await self._ajson(request.call, "load_model", "/api/generate", body)

    @hookimpl
    def unload_model(self, request: ModelRequest) -> None:
        self._json(request.call, "unload_model", "/api/generate", _residency(request.model, 0.0, None))

    @hookimpl
    async def aunload_model(self, request: ModelRequest) -> None:
        await self._ajson(request.call, "unload_model", "/api/generate", _residency(request.model, 0.0, None))

    def _ask(
        self,
        call: Call,
        operation: str,
        ask: Callable[[Clients], Any],
        read: Callable[[Any], T],
        model: str | None = None,
    ) -> T:
        """Ask and read the answer; where a model is missing, the names that are there are added to the error."""
        return self._suggesting(lambda: self._plainly(call, operation, ask, read, model), call)

    def _plainly(
        self, call: Call, operation: str, ask: Callable[[Clients], Any], read: Callable[[Any], T], model: str | None
    ) -> T:
        """Ask and read the answer; neither lets a foreign error out."""

        def once() -> T:
            with exchange(self._exchange(call, operation, model)), typed():
                return read(ask(self._clients()))

        return retry.call(once, call)

    async def _aask(
        self,
        call: Call,
        operation: str,
        ask: Callable[[AsyncClients], Awaitable[Any]],
        read: Callable[[Any], T],
        model: str | None = None,
    ) -> T:
        return await self._asuggesting(lambda: self._aplainly(call, operation, ask, read, model), call)

    async def _aplainly(
        self,
        call: Call,
        operation: str,
        ask: Callable[[AsyncClients], Awaitable[Any]],
        read: Callable[[Any], T],
        model: str | None,
    ) -> T:
        async def once() -> T:
            with exchange(self._exchange(call, operation, model)), typed():
                return read(await ask(self._aclients()))

        return await retry.acall(once, call)

    def _json(self, call: Call, operation: str, path: str, body: Mapping[str, Any]) -> Any:
        return self._ask(call, operation, lambda each: each.json("POST", path, body), _same, body["model"])

    async def _ajson(self, call: Call, operation: str, path: str, body: Mapping[str, Any]) -> Any:
        return await self._aask(call, operation, lambda each: each.json("POST", path, body), _same, body["model"])

    # --- Pull --------------------------------------------------------------------------------------------------------

    @hookimpl
    def pull_model(self, request: ModelRequest) -> Iterator[PullProgress]:
        def opened() -> tuple[Lines[Any], Any]:
            of = self._exchange(_patient(request.call), "pull_model", request.model, lines=True)
            lines: Lines[Any] = Lines(of, iter(self._clients().ollama.pull(request.model, stream=True)))
            return lines, lines.first()

        lines, part = retry.call(opened, request.call)
        try:
            while part is not None:
                step = _convert.progress(part)
                if step.status == "success":
                    lines.drain()  # That word is the end, whatever the connection does.
                    part = None
                yield step
                part = lines.next() if part is not None else None
        finally:
            lines.close()

    @hookimpl
    async def apull_model(self, request: ModelRequest) -> AsyncIterator[PullProgress]:
        async def opened() -> tuple[AsyncLines[Any], Any]:
            of = self._exchange(_patient(request.call), "pull_model", request.model, lines=True)
            parts = await self._aclients().ollama.pull(request.model, stream=True)
            lines: AsyncLines[Any] = AsyncLines(of, aiter(parts))
            return lines, await lines.first()

        lines, part = await retry.acall(opened, request.call)
        try:
            while part is not None:
                step = _convert.progress(part)
                if step.status == "success":
                    await lines.drain()  # That word is the end, whatever the connection does.
                    part = None
                yield step
                part = await lines.next() if part is not None else None
        finally:
            await lines.close()

    # --- Adapters ----------------------------------------------------------------------------------------------------

    @hookimpl
    def load_adapter(self, request: LoadAdapterRequest) -> LoadedAdapter:
        return self._suggesting(lambda: drive(self._adapters(_Wire(self)).load(request)), request.call)

    @hookimpl
    async def aload_adapter(self, request: LoadAdapterRequest) -> LoadedAdapter:
        return await self._asuggesting(lambda: self._adapters(_AsyncWire(self)).load(request), request.call)

    @hookimpl
    def unload_adapter(self, request: UnloadAdapterRequest) -> None:
        drive(self._adapters(_Wire(self)).unload(request))

    @hookimpl
    async def aunload_adapter(self, request: UnloadAdapterRequest) -> None:
        await self._adapters(_AsyncWire(self)).unload(request)

    @hookimpl
    def prune_adapters(self, request: PruneAdaptersRequest) -> tuple[ModelInfo, ...]:
        return drive(self._adapters(_Wire(self)).prune(request))

    @hookimpl
    async def aprune_adapters(self, request: PruneAdaptersRequest) -> tuple[ModelInfo, ...]:
        return await self._adapters(_AsyncWire(self)).prune(request)

    def _adapters(self, wire: Wire) -> Adapters:
        return Adapters(wire, self.address, merge=self._merge, base_file=self._base_file)

    # --- Health ------------------------------------------------------------------------------------------------------

    @hookimpl
    def health(self, request: HealthRequest) -> Health:
        look = _Look(request, self.address)
        call = request.call
        try:
            self._ask(call, "health", lambda each: each.json("GET", "/api/version"), look.version)
            if look.wants("model_present"):
                # Asked without `verbose`: the vocabulary is not needed to know that it is there.
                look.present(self._json(call, "health", "/api/show", {"model": request.model}))
            if look.wants("model_loaded"):
                self._ask(call, "health", lambda each: each.json("GET", "/api/ps"), look.loaded)
            if look.wants("answers"):
                look.answered(self._json(call, "health", "/api/generate", _one_token(request)))
        except ProviderError as error:
            look.failed(error)
        return look.health()

    @hookimpl
    async def ahealth(self, request: HealthRequest) -> Health:
        look = _Look(request, self.address)
        call = request.call
        try:
            await self._aask(call, "health", lambda each: each.json("GET", "/api/version"), look.version)
            if look.wants("model_present"):
                look.present(await self._ajson(call, "health", "/api/show", {"model": request.model}))
            if look.wants("model_loaded"):
                await self._aask(call, "health", lambda each: each.json("GET", "/api/ps"), look.loaded)
            if look.wants("answers"):
                look.answered(await self._ajson(call, "health", "/api/generate", _one_token(request)))
        except ProviderError as error:
            look.failed(error)
        return look.health()

    @hookimpl
    def capabilities(self) -> Capabilities:
        return Capabilities(features=FEATURES, options=_convert.OPTIONS)

    # --- The end -----------------------------------------------------------------------------------------------------

    @hookimpl
    def close(self, request: CloseRequest) -> None:  # noqa: ARG002 - nothing in it yet
        with self._lock:
            self._closed = True
        if self._sync is not None:
            self._sync.close()

    @hookimpl
    async def aclose(self, request: CloseRequest) -> None:
        self.close(request)
        if self._async is not None:
            await self._async.close()

    # --- Inside ------------------------------------------------------------------------------------------------------

    def _clients(self) -> Clients:
        with self._lock:  # Two threads would build two pools, and one of them would never be closed.
            self._require_open()
            if self._sync is None:
                self._sync = Clients(self._url, self._transport, self._headers)
            return self._sync

    def _aclients(self) -> AsyncClients:
        with self._lock:
            self._require_open()
            if self._async is None:
                self._async = AsyncClients(self._url, self._transport, self._headers)
            return self._async

    def _require_open(self) -> None:
        if self._closed:
            raise ConnectionFailed("The connection is closed.", retryable=False, hint="Use a client that is open.")

    def _exchange(self, call: Call, operation: str, model: str | None, *, lines: bool = False) -> Exchange:
        def refuse(status: int, headers: Mapping[str, str], body: bytes) -> ProviderError:
            return refusal(status, headers, body, model=model, operation=operation, secrets=self._secrets)

        def read(line: bytes, whole: bool) -> bytes:
            return checked_line(line, whole, refuse)

        return Exchange(call=call, refuse=refuse, line=read, lines=lines)

    def _listed(self, call: Call) -> tuple[ModelInfo, ...]:
        return self._ask(call, "list_models", lambda each: each.json("GET", "/api/tags"), _convert.listed_models)

    async def _alisted(self, call: Call) -> tuple[ModelInfo, ...]:
        return await self._aask(call, "list_models", lambda each: each.json("GET", "/api/tags"), _convert.listed_models)

    def _suggesting(self, work: Callable[[], T], call: Call) -> T:
        """Do the work; where the model is missing, add the names that are there."""
        try:
            return work()
        except ModelNotFound as error:
            if error.model:  # The list of models has none: it must not be asked because of itself.
                with contextlib.suppress(GraftageError):
                    _suggest(error, self._listed(_brief(call)))
            raise

    async def _asuggesting(self, work: Callable[[], Awaitable[T]], call: Call) -> T:
        try:
            return await work()
        except ModelNotFound as error:
            if error.model:
                with contextlib.suppress(GraftageError):
                    _suggest(error, await self._alisted(_brief(call)))
            raise


# --- Wires: the server as the adapters' module asks it ---------------------------------------------------------------


class _Wire:
    """Blocks; its coroutines never suspend."""

    def __init__(self, connection: OllamaConnection) -> None:
        self._plainly = connection._plainly  # noqa: SLF001 - one module, one thing

    async def ask(
        self,
        call: Call,
        operation: str,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        read: Callable[[dict[str, Any]], Any] = dict,
    ) -> Any:
        model = (body or {}).get("model")
        return self._plainly(call, operation, lambda each: each.json(method, path, body, empty=True), read, model)

    async def upload(self, call: Call, path: str, file: Path) -> None:
        self._plainly(call, "load_adapter", lambda each: each.upload(path, file), _same, None)

    async def run(self, function: Callable[[], T]) -> T:
        return function()


class _AsyncWire:
    """Awaits; what blocks runs in worker threads."""

    def __init__(self, connection: OllamaConnection) -> None:
        self._plainly = connection._aplainly  # noqa: SLF001

    async def ask(
        self,
        call: Call,
        operation: str,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        read: Callable[[dict[str, Any]], Any] = dict,
    ) -> Any:
        def ask(each: AsyncClients) -> Awaitable[dict[str, Any]]:
            return each.json(method, path, body, empty=True)

        return await self._plainly(call, operation, ask, read, (body or {}).get("model"))

    async def upload(self, call: Call, path: str, file: Path) -> None:
        await self._plainly(call, "load_adapter", lambda each: each.upload(path, file), _same, None)

    async def run(self, function: Callable[[], T]) -> T:
        # Cancelled, the caller goes at once and takes the folder away; the thread notices that and ends.
        return await anyio.to_thread.run_sync(function, abandon_on_cancel=True)


# --- Bodies and readings ---------------------------------------------------------------------------------------------


def _same(answer: T) -> T:
    return answer


def _converted(convert: Callable[[bytes], Chunk], line: bytes) -> Chunk:
    with typed():
        try:
            return convert(line)
        except ValueError:
            if (mended := _convert.without_lone_surrogates(line)) == line:
                raise
            return convert(mended)


def _residency(model: str, keep_alive: float | None, context_window: int | None) -> dict[str, Any]:
    """An empty prompt loads a model, or with a `keep_alive` of 0 unloads it."""
    body: dict[str, Any] = {"model": model, "stream": False}
    if keep_alive is not None:
        body["keep_alive"] = _convert.keep_alive(keep_alive)
    if context_window is not None:
        body["options"] = {"num_ctx": context_window}
    return body


def _one_token(request: HealthRequest) -> dict[str, Any]:
    body = _residency(str(request.model), request.keep_alive, request.context_window)
    return {**body, "prompt": "Hi", "options": {**body.get("options", {}), "num_predict": 1}}


def _patient(call: Call) -> Call:
    """A pull has no first token: each step has the idle limit."""
    return replace(call, timeouts=replace(call.timeouts, first_token=call.timeouts.idle))


def _brief(call: Call) -> Call:
    deadline = min(call.deadline, time.monotonic() + SUGGESTION_TIMEOUTS.total)
    return replace(call, deadline=deadline, timeouts=SUGGESTION_TIMEOUTS, attempts=1)


def _suggest(error: ModelNotFound, models: Sequence[ModelInfo]) -> None:
    """Add the names of the server that are close to the one that was asked for."""
    names = [found.name for found in models if found.name]
    wanted = error.model or ""
    close = difflib.get_close_matches(wanted.lower(), names, n=3, cutoff=0.5)
    family = wanted.partition(":")[0].lower()
    error.suggestions = tuple(dict.fromkeys([*close, *(name for name in names if name.partition(":")[0] == family)]))
    if error.suggestions:
        error.hint = f"Did you mean `{error.suggestions[0]}`? Otherwise pull it: `graftage models pull {wanted}`."


class _Look:
    """A health check as it goes up the levels."""

    def __init__(self, request: HealthRequest, address: str) -> None:
        self._request = request
        self._address = address
        self.found: dict[str, Any] = {"reachable": False}

    def wants(self, level: str) -> bool:
        from graftage.types import HEALTH_LEVELS  # noqa: PLC0415 - read once for each check

        return HEALTH_LEVELS.index(self._request.level) >= HEALTH_LEVELS.index(level)

    def version(self, answer: Mapping[str, Any]) -> None:
        version = answer.get("version")
        if not isinstance(version, str):
            raise ProtocolError("Another service than Ollama answers there.", hint="Check `host` and its port.")
        self.found.update(reachable=True, api=True, version=version)

    def present(self, _answer: Mapping[str, Any]) -> None:
        self.found["model_present"] = True

    def loaded(self, answer: Mapping[str, Any]) -> None:
        wanted = _convert.canonical(self._request.model or "")
        names = {_convert.canonical(found.name) for found in _convert.loaded_models(answer)}
        self.found["model_loaded"] = wanted in names

    def answered(self, _answer: Mapping[str, Any]) -> None:
        # It may not have been in memory before, but it is now.
        self.found.update(model_loaded=True, answers=True)

    def failed(self, error: ProviderError) -> None:
        self.found["error"] = error
        if not isinstance(error, ConnectionFailed) and getattr(error, "phase", None) != "connect":
            self.found["reachable"] = True
        for level in ("api", "model_present", "model_loaded", "answers"):
            if self.wants(level) and level not in self.found:
                self.found[level] = False
                return

    def health(self) -> Health:
        return Health(level=self._request.level, address=self._address, model=self._request.model, **self.found)
