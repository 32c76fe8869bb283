"""One connection to a server: every hook of the contract, built on `graftage.http`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from graftage.calls import (
    Call,
    ChatRequest,
    EmbedRequest,
    GenerateRequest,
    HealthRequest,
    LoadAdapterRequest,
    LoadModelRequest,
    ModelRequest,
    ModelsRequest,
    NativeRequest,
    PruneAdaptersRequest,
    UnloadAdapterRequest,
)
from graftage.exceptions import ProtocolError, ProviderError
from graftage.hookspecs import hookimpl
from graftage.types import (
    Capabilities,
    Chunk,
    Embeddings,
    Health,
    LoadedAdapter,
    LoadedModel,
    ModelInfo,
    PullProgress,
    canonical_name,
)
from graftage_ollama import _convert
from graftage_ollama._adapters import Adapters
from graftage_ollama._settings import OllamaSettings, parse_host

if TYPE_CHECKING:
    from graftage.hookspecs import ConnectRequest
    from graftage.http import Answer

__all__ = ["OllamaConnection"]

T = TypeVar("T")
CAPABILITIES: Final = Capabilities(
    features=frozenset({"tools", "structured_output", "thinking", "images", "logprobs", "suffix"}),
    options=_convert.OPTIONS,
    parameters=frozenset({"keep_alive", "context_window", "max_tokens"}),
)


class OllamaConnection:
    """The hooks of a connection. It opens nothing until the first request."""

    def __init__(self, request: ConnectRequest, settings: OllamaSettings) -> None:
        self._http = request.http(parse_host(settings.host), refusal=_refusal, server="Ollama")
        self.address = self._http.base_url
        self._adapters = Adapters(
            self._http, self.address, merge=settings.merge_adapters, base_file=settings.adapter_base_file
        )

    @hookimpl
    def capabilities(self) -> Capabilities:
        return CAPABILITIES

    # --- Inference ---------------------------------------------------------------------------------------------------

    @hookimpl
    async def chat(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        body = _convert.chat_body(request)
        read, words = _convert.chat_chunk, _convert.chat_text
        chunks = self._http.lines("POST", "/api/chat", body, call=request.call, read=read, words=words)
        async for chunk in self._checked(request, chunks):
            yield chunk

    @hookimpl
    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        body = _convert.generate_body(request)
        chunks = self._http.lines("POST", "/api/generate", body, call=request.call, read=_convert.generate_chunk)
        async for chunk in self._checked(request, chunks):
            yield chunk

    def _checked(self, request: ChatRequest | GenerateRequest, chunks: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
        adapter = request.adapter
        return self._adapters.checked(request.call, adapter, chunks) if adapter else chunks

    @hookimpl
    async def embed(self, request: EmbedRequest) -> Embeddings:
        body, read = _convert.embed_body(request), _convert.embeddings
        return await self._http.json("POST", "/api/embed", body, call=request.call, read=read, vectors="embeddings")

    @hookimpl
    async def count_tokens(self, request: ChatRequest) -> int:
        # No endpoint only counts. `num_predict: 0` would mean no limit.
        body = _convert.chat_body(replace(request, max_tokens=1, options={**request.options, **_convert.NO_TRUNCATION}))
        body["stream"] = False
        async with self._adapters.certain(request.call, request.adapter):
            last = await self._http.json("POST", "/api/chat", body, call=request.call, read=_convert.chat_chunk)
        return _convert.prompt_tokens(last)

    # --- Models ------------------------------------------------------------------------------------------------------

    @hookimpl
    async def list_models(self, request: ModelsRequest) -> tuple[ModelInfo, ...]:
        return await self._get("/api/tags", request.call, _convert.listed_models)

    @hookimpl
    async def loaded_models(self, request: ModelsRequest) -> tuple[LoadedModel, ...]:
        return await self._get("/api/ps", request.call, _convert.loaded_models)

    @hookimpl
    async def show_model(self, request: ModelRequest) -> ModelInfo:
        # Only `verbose` gives the arrays of the metadata.
        body = {"model": request.model, "verbose": True}
        read = partial(_convert.model_info, request.model)
        return await self._http.json("POST", "/api/show", body, call=request.call, read=read)

    @hookimpl
    async def pull_model(self, request: ModelRequest) -> AsyncIterator[PullProgress]:
        # A pull has no first token: the idle limit holds for each step.
        timeouts = replace(request.call.timeouts, first_token=request.call.timeouts.idle)
        call = replace(request.call, timeouts=timeouts)
        body = {"model": request.model, "insecure": False, "stream": True}
        steps = self._http.lines("POST", "/api/pull", body, call=call, read=_convert.progress)
        async for step in steps:
            yield step

    @hookimpl
    async def load_model(self, request: LoadModelRequest) -> None:
        await self._post_generate(
            _convert.load_body(request.model, request.keep_alive, request.context_window), request.call
        )

    @hookimpl
    async def unload_model(self, request: ModelRequest) -> None:
        await self._post_generate(_convert.load_body(request.model, 0.0, None), request.call)

    @hookimpl
    async def delete_model(self, request: ModelRequest) -> None:
        once = replace(request.call, attempts=1)  # A second attempt would not find the deleted model.
        await self._http.json("DELETE", "/api/delete", {"model": request.model}, call=once, empty=True)

    # --- Adapters ----------------------------------------------------------------------------------------------------

    @hookimpl
    async def load_adapter(self, request: LoadAdapterRequest) -> LoadedAdapter:
        return await self._adapters.load(request)

    @hookimpl
    async def unload_adapter(self, request: UnloadAdapterRequest) -> None:
        await self._adapters.unload(request)

    @hookimpl
    async def prune_adapters(self, request: PruneAdaptersRequest) -> tuple[ModelInfo, ...]:
        return await self._adapters.prune(request)

    # --- The official client ------------------------------------------------------------------------------------------

    @hookimpl
    def native(self, request: NativeRequest) -> object:  # noqa: ARG002 - required by the hook
        from graftage_ollama._package import official_package

        package = official_package()
        kind = package.Client if self._http.colour == "sync" else package.AsyncClient
        client: object = kind(
            self.address,
            # A placeholder, so that it takes no key from the environment: the transport replaces it.
            headers={"authorization": "Bearer -"},
            transport=self._http.httpx_transport(),
            follow_redirects=False,
            trust_env=False,
        )
        return client

    # --- Health ------------------------------------------------------------------------------------------------------

    @hookimpl
    async def health(self, request: HealthRequest) -> Health:
        return await request.check(partial(self._check_levels, request), address=self.address)

    async def _check_levels(self, request: HealthRequest, found: dict[str, Any]) -> None:
        """Check each level up to the requested one."""
        call, model = request.call, request.model or ""
        found.update(reachable=True, api=True, version=await self._get("/api/version", call, _read_version))
        if request.wants("model_present"):
            # Without `verbose`, which would send the vocabulary too.
            await self._http.json("POST", "/api/show", {"model": model}, call=call)
            found["model_present"] = True
        if request.wants("model_loaded"):
            loaded = await self._get("/api/ps", call, _convert.loaded_models)
            names = {canonical_name(each.name) for each in loaded}
            found["model_loaded"] = canonical_name(model) in names
        if request.wants("answers"):
            body = _convert.load_body(model, request.keep_alive, request.context_window)
            await self._post_generate(
                {**body, "prompt": "Hi", "options": {**body.get("options", {}), "num_predict": 1}}, call
            )
            # The reply has loaded the model.
            found.update(model_loaded=True, answers=True)

    # --- Helpers -----------------------------------------------------------------------------------------------------

    async def _get(self, path: str, call: Call, read: Callable[[Mapping[str, Any]], T]) -> T:
        return await self._http.json("GET", path, call=call, read=read)

    async def _post_generate(self, body: Mapping[str, object], call: Call) -> None:
        await self._http.json("POST", "/api/generate", body, call=call)


def _refusal(answer: Answer) -> ProviderError | None:
    from graftage_ollama._errors import refusal

    return refusal(answer)


def _read_version(response: Mapping[str, object]) -> str:
    version = response.get("version")
    if not isinstance(version, str):
        raise ProtocolError(
            "This server is not Ollama: it did not report its version.", hint="Check `host` and its port."
        )
    return version
