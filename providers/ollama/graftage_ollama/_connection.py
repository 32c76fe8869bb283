"""One connection to a server: every hook of the contract but adapters, sync and async.

What the official package does without loss goes through its clients (embed, ps, pull); the rest goes through an httpx
client beside it. Both stand on one guarded transport, which bounds and types every answer.
"""

from __future__ import annotations

import contextlib
import difflib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

import httpx
import ollama

from graftage import retry
from graftage.exceptions import (
    ConnectionFailed,
    GraftageError,
    ModelNotFound,
    ProtocolError,
    ProviderError,
    StreamInterrupted,
)
from graftage.hookspecs import hookimpl
from graftage.http import AsyncGuard, AsyncNetwork, Exchange, Guard, Network, current, exchange, is_loopback
from graftage.types import Call, Capabilities, Chunk, Health, ModelInfo, PullProgress, Timeouts
from graftage_ollama import _convert
from graftage_ollama._errors import refusal
from graftage_ollama._host import parse_host

if TYPE_CHECKING:
    from graftage.settings import Settings
    from graftage.types import (
        ChatRequest,
        CloseRequest,
        Embeddings,
        EmbedRequest,
        GenerateRequest,
        HealthRequest,
        LoadedModel,
        LoadModelRequest,
        ModelRequest,
        ModelsRequest,
    )

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
    }
)
SECRET_HEADERS: Final = frozenset({"authorization", "proxy-authorization", "cookie", "x-api-key", "api-key"})
SUGGESTION_TIMEOUTS: Final = Timeouts(connect=1.0, first_token=2.0, idle=2.0, total=3.0)
"""Close names are a courtesy: they must not hold the error up."""
DRAIN: Final = 0.2
"""Seconds to wait for the end of a body after its last line; then the connection is not used again."""


class OllamaConnection:
    """The hooks, on clients that open nothing until the first request."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self._url = parse_host(settings.host)
        self.address = str(self._url).rstrip("/")
        self._transport = settings.transport
        self._headers = _headers(settings, self._url)
        self._closed = False
        self._sync: _Clients | None = None
        self._async: _AsyncClients | None = None

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

        def opened() -> tuple[_Lines[bytes], bytes]:
            lines = _Lines(self._exchange(call, operation, body["model"], lines=True), start())
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

        async def opened() -> tuple[_AsyncLines[bytes], bytes]:
            lines = _AsyncLines(self._exchange(call, operation, body["model"], lines=True), start())
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
        arguments = _embed_arguments(request)
        return self._ask(
            request.call,
            "embed",
            lambda each: each.ollama.embed(**arguments),
            lambda answer: _convert.embeddings(answer, request.dimensions),
            request.model,
        )

    @hookimpl
    async def aembed(self, request: EmbedRequest) -> Embeddings:
        arguments = _embed_arguments(request)
        return await self._aask(
            request.call,
            "embed",
            lambda each: each.ollama.embed(**arguments),
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
        return self._ask(request.call, "loaded_models", lambda each: each.ollama.ps(), _convert.loaded_models)

    @hookimpl
    async def aloaded_models(self, request: ModelsRequest) -> tuple[LoadedModel, ...]:
        return await self._aask(request.call, "loaded_models", lambda each: each.ollama.ps(), _convert.loaded_models)

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
        ask: Callable[[_Clients], Any],
        read: Callable[[Any], T],
        model: str | None = None,
    ) -> T:
        """Ask and read the answer; neither lets a foreign error out."""

        def once() -> T:
            with exchange(self._exchange(call, operation, model)), _typed():
                return read(ask(self._clients()))

        return self._suggesting(lambda: retry.call(once, call), call)

    async def _aask(
        self,
        call: Call,
        operation: str,
        ask: Callable[[_AsyncClients], Awaitable[Any]],
        read: Callable[[Any], T],
        model: str | None = None,
    ) -> T:
        async def once() -> T:
            with exchange(self._exchange(call, operation, model)), _typed():
                return read(await ask(self._aclients()))

        return await self._asuggesting(lambda: retry.acall(once, call), call)

    def _json(self, call: Call, operation: str, path: str, body: Mapping[str, Any]) -> Any:
        return self._ask(call, operation, lambda each: each.json("POST", path, body), _same, body["model"])

    async def _ajson(self, call: Call, operation: str, path: str, body: Mapping[str, Any]) -> Any:
        return await self._aask(call, operation, lambda each: each.json("POST", path, body), _same, body["model"])

    # --- Pull --------------------------------------------------------------------------------------------------------

    @hookimpl
    def pull_model(self, request: ModelRequest) -> Iterator[PullProgress]:
        def opened() -> tuple[_Lines[Any], Any]:
            of = self._exchange(_patient(request.call), "pull_model", request.model, lines=True)
            lines: _Lines[Any] = _Lines(of, iter(self._clients().ollama.pull(request.model, stream=True)))
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
        async def opened() -> tuple[_AsyncLines[Any], Any]:
            of = self._exchange(_patient(request.call), "pull_model", request.model, lines=True)
            parts = await self._aclients().ollama.pull(request.model, stream=True)
            lines: _AsyncLines[Any] = _AsyncLines(of, aiter(parts))
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
                self._ask(call, "health", lambda each: each.ollama.ps(), look.loaded)
            if look.wants("answers"):
                look.answered(self._json(call, "health", "/api/generate", _one_token(request.model)))
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
                await self._aask(call, "health", lambda each: each.ollama.ps(), look.loaded)
            if look.wants("answers"):
                look.answered(await self._ajson(call, "health", "/api/generate", _one_token(request.model)))
        except ProviderError as error:
            look.failed(error)
        return look.health()

    @hookimpl
    def capabilities(self) -> Capabilities:
        return Capabilities(features=FEATURES, options=_convert.OPTIONS)

    # --- The end -----------------------------------------------------------------------------------------------------

    @hookimpl
    def close(self, request: CloseRequest) -> None:  # noqa: ARG002 - nothing in it yet
        self._closed = True
        if self._sync is not None:
            self._sync.close()

    @hookimpl
    async def aclose(self, request: CloseRequest) -> None:
        self.close(request)
        if self._async is not None:
            await self._async.close()

    # --- Inside ------------------------------------------------------------------------------------------------------

    def _clients(self) -> _Clients:
        if self._sync is None:
            self._sync = _Clients(self._url, self._transport, self._headers)
        return self._sync

    def _aclients(self) -> _AsyncClients:
        if self._async is None:
            self._async = _AsyncClients(self._url, self._transport, self._headers)
        return self._async

    def _exchange(self, call: Call, operation: str, model: str | None, *, lines: bool = False) -> Exchange:
        def refuse(status: int, headers: Mapping[str, str], body: bytes) -> ProviderError:
            return refusal(status, headers, body, model=model, operation=operation)

        def read(line: bytes, whole: bool) -> bytes:
            return _checked_line(line, whole, refuse)

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


# --- Clients ---------------------------------------------------------------------------------------------------------


class _Clients:
    """The official client, and an httpx client beside it, on one transport."""

    def __init__(self, url: httpx.URL, transport: Any, headers: Mapping[str, str | None]) -> None:
        def build() -> httpx.BaseTransport:
            return Network(url)

        guard = Guard(transport.sync_transport(build) if transport is not None else build(), headers)
        self.http = httpx.Client(base_url=url, transport=guard, trust_env=False, timeout=None)  # noqa: S113 - the guard keeps the time
        self.ollama = ollama.Client(host=str(url), transport=guard, trust_env=False, follow_redirects=False)

    def json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Ask for a JSON object."""
        return _object(self.http.request(method, path, json=body).content)

    def close(self) -> None:
        self.http.close()
        self.ollama.close()  # type: ignore[no-untyped-call] # the package is only partly typed


class _AsyncClients:
    """The same for asyncio."""

    def __init__(self, url: httpx.URL, transport: Any, headers: Mapping[str, str | None]) -> None:
        def build() -> httpx.AsyncBaseTransport:
            return AsyncNetwork(url)

        guard = AsyncGuard(transport.async_transport(build) if transport is not None else build(), headers)
        self.http = httpx.AsyncClient(base_url=url, transport=guard, trust_env=False, timeout=None)  # noqa: S113 - the guard keeps the time
        self.ollama = ollama.AsyncClient(host=str(url), transport=guard, trust_env=False, follow_redirects=False)

    async def json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Ask for a JSON object."""
        return _object((await self.http.request(method, path, json=body)).content)

    async def close(self) -> None:
        await self.http.aclose()
        await self.ollama.close()  # type: ignore[no-untyped-call] # the package is only partly typed


def _headers(settings: Settings, url: httpx.URL) -> dict[str, str | None]:
    """The headers of every request. A secret goes over https or to loopback, and nowhere else.

    The official client would send `OLLAMA_API_KEY` to any host, so the header is always set or taken out here.
    """
    safe = url.scheme == "https" or is_loopback(url.host)
    headers: dict[str, str | None] = {"authorization": None}
    if settings.api_key is not None and safe:
        headers["authorization"] = f"Bearer {settings.api_key.get_secret_value()}"
    for name, value in settings.headers.items():
        if safe or name.lower() not in SECRET_HEADERS:
            headers[name.lower()] = value.get_secret_value()
    return headers


# --- Streams ---------------------------------------------------------------------------------------------------------


class _Lines(Iterator[T]):
    """The parts of a streamed answer, each read inside its exchange."""

    def __init__(self, of: Exchange, parts: Iterator[T]) -> None:
        self._of = of
        self._parts = parts

    def __next__(self) -> T:
        with exchange(self._of), _typed():
            return next(self._parts)

    def first(self) -> T:
        """The first part, or an error that says there is none; whatever fails, the connection is given back."""
        try:
            part = self.next()
            if part is None:
                raise _empty()
        except BaseException:
            self.close()
            raise
        return part

    def next(self) -> T | None:
        """The next part; None at the end."""
        return next(self, None)

    def drain(self) -> None:
        """Read the end of the body, so that the connection can be used again; whatever is there is not wanted."""
        self._of.clock.deadline = time.monotonic() + DRAIN
        with contextlib.suppress(GraftageError):
            self.next()

    def close(self) -> None:
        close = getattr(self._parts, "close", None)
        if close is not None:
            close()


class _AsyncLines(AsyncIterator[T]):
    """The same for asyncio."""

    def __init__(self, of: Exchange, parts: AsyncIterator[T]) -> None:
        self._of = of
        self._parts = parts

    async def __anext__(self) -> T:
        with exchange(self._of), _typed():
            return await anext(self._parts)

    async def first(self) -> T:
        try:
            part = await self.next()
            if part is None:
                raise _empty()
        except BaseException:
            await self.close()
            raise
        return part

    async def next(self) -> T | None:
        return await anext(self, None)

    async def drain(self) -> None:
        self._of.clock.deadline = time.monotonic() + DRAIN
        with contextlib.suppress(GraftageError):
            await self.next()

    async def close(self) -> None:
        close = getattr(self._parts, "aclose", None)
        if close is not None:
            await close()


def _empty() -> StreamInterrupted:
    return StreamInterrupted("The server sent an empty answer.", retryable=True, hint="Ask again.")


def _checked_line(line: bytes, whole: bool, refuse: Callable[[int, Mapping[str, str], bytes], ProviderError]) -> bytes:
    """A line of a stream: an object, and not an error."""
    if not line.lstrip().startswith(b"{"):
        raise ProtocolError(
            "The stream holds a line that is no JSON object.", hint="Is it another service? Check `host`."
        )
    if not whole and not _is_json(line):
        raise StreamInterrupted("The stream ended in the middle of a line.", retryable=True, hint="Ask again.")
    if b'"error"' in line:
        found = _parsed(line)
        if isinstance(found, dict) and "error" in found:
            raise refuse(200, {}, line)
        if found is None and line.rstrip().endswith(b'"}'):
            # Some paths of the server write the error right after an unfinished object.
            raise refuse(200, {}, line[line.rindex(b"{") :])
    return line


def _parsed(data: bytes) -> Any:
    import json  # noqa: PLC0415 - httpx has imported it

    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _is_json(data: bytes) -> bool:
    return _parsed(data) is not None


def _object(data: bytes) -> dict[str, Any]:
    found = _parsed(data)
    if not isinstance(found, dict):
        raise ProtocolError("The answer is no JSON object.", hint="Is it another service? Check `host`.")
    if "error" in found:
        # Some proxies, and old servers once they had begun, say 200 to that too.
        raise current().refuse(200, {}, data)
    return found


def _same(answer: T) -> T:
    return answer


def _converted(convert: Callable[[bytes], Chunk], line: bytes) -> Chunk:
    with _typed():
        return convert(line)


class _typed:  # noqa: N801 - reads as a word in a `with`
    """Lets no foreign error out: what the transport has not typed is an answer that cannot be read."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, (GraftageError, StopIteration, StopAsyncIteration)):
            raise _foreign(error) from error


def _foreign(error: Exception) -> ProviderError:
    if isinstance(error, httpx.InvalidURL):
        return ConnectionFailed(f"The address cannot be used: {error}.", retryable=False, hint="Check `host`.")
    return ProtocolError(
        f"The answer is not what Ollama's API promises ({type(error).__name__}).",
        hint="Is it another service, or a proxy's page? Check `host`.",
        details={"reason": f"{type(error).__name__}: {error}"[:500]},
    )


# --- Bodies and readings ---------------------------------------------------------------------------------------------


def _embed_arguments(request: EmbedRequest) -> dict[str, Any]:
    return {
        "model": request.model,
        "input": list(request.inputs),
        "truncate": request.truncate,
        "dimensions": request.dimensions,
        "options": _convert.server_options(request.options, request.context_window) or None,
        "keep_alive": _convert.keep_alive(request.keep_alive),
    }


def _residency(model: str, keep_alive: float | None, context_window: int | None) -> dict[str, Any]:
    """An empty prompt loads a model, or with a `keep_alive` of 0 unloads it."""
    body: dict[str, Any] = {"model": model, "stream": False}
    if keep_alive is not None:
        body["keep_alive"] = _convert.keep_alive(keep_alive)
    if context_window is not None:
        body["options"] = {"num_ctx": context_window}
    return body


def _one_token(model: str | None) -> dict[str, Any]:
    return {"model": model, "prompt": "Hi", "stream": False, "options": {"num_predict": 1}}


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

    def loaded(self, answer: Any) -> None:
        wanted = _convert.canonical(self._request.model or "")
        names = {_convert.canonical(found.model or found.name or "") for found in answer.models}
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
