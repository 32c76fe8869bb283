"""One connection to a server: every hook of the contract, built on `graftage.http`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from graftage.calls import (
    Call,
    ChatRequest,
    EmbedRequest,
    GenerateRequest,
    HealthRequest,
    LoadAdapterRequest,
    ModelRequest,
    ModelsRequest,
    UnloadAdapterRequest,
)
from graftage.exceptions import (
    AuthenticationFailed,
    ConnectionFailed,
    ModelNotFound,
    Overloaded,
    ProviderError,
    ProviderTimeout,
    RequestRejected,
    StreamInterrupted,
)
from graftage.hookspecs import hookimpl
from graftage.http import Document, Headers, is_loopback, read_word
from graftage.http.client import typed_errors
from graftage.types import (
    Capabilities,
    Chunk,
    Embeddings,
    Health,
    LoadedAdapter,
    LoadedModel,
    Message,
    ModelInfo,
    canonical_name,
)
from graftage_openai import _convert
from graftage_openai._adapters import Adapters
from graftage_openai._profiles import HOSTS, PROFILES, UNKNOWN, WIDEST, OpenAISettings, Profile, parse_host, recognise

if TYPE_CHECKING:
    from graftage.hookspecs import ConnectRequest

__all__ = ["OpenAIConnection"]

LOOK: Final = 2.0
"""Seconds to find out which server it is."""
PASSING: Final = (AuthenticationFailed, ConnectionFailed, Overloaded, ProviderTimeout)
"""Errors after which the server is asked again, at the next call."""


class OpenAIConnection:
    """The hooks of a connection. It opens nothing until the first request."""

    def __init__(self, request: ConnectRequest, settings: OpenAISettings) -> None:
        root, self._api = parse_host(settings.host)
        self._http = request.http(root, refusal=_convert.refusal)
        self.address = self._http.base_url
        self._known = PROFILES[settings.profile] if settings.profile else HOSTS.get(urlsplit(root).hostname or "")
        self._declared = self._known or WIDEST
        self.default_model = self._declared.default_model
        self._adapters = Adapters(self._http, self._api)
        self._learned = _convert.Learned()

    @hookimpl
    def capabilities(self) -> Capabilities:
        able = self._declared
        return Capabilities(features=able.features, options=able.options, parameters=frozenset({"max_tokens"}))

    async def _profile(self, call: Call) -> Profile:
        """Return what the server can do; find out which it is, once."""
        if self._known is None:
            soon = replace(call, attempts=1, deadline=min(call.deadline, time.monotonic() + LOOK))
            try:
                await self._listed(soon)
            except PASSING:
                return UNKNOWN
            except ProviderError:
                self._known = UNKNOWN
        return self._known or UNKNOWN

    async def _listed(self, call: Call) -> Document:
        """Return the list of models, which shows which server it is."""
        found: Document = await self._http.json("GET", f"{self._api}/models", call=call, empty=True)
        self._known = self._known or recognise(found) or UNKNOWN
        return found

    # --- Inference ---------------------------------------------------------------------------------------------------

    @hookimpl
    async def chat(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        profile = await self._profile(request.call)
        body = self._chat_body(request, profile)
        async for chunk in self._answer("/chat/completions", body, request, profile):
            yield chunk

    @hookimpl
    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        profile = await self._profile(request.call)
        if request.raw or request.suffix is not None:
            self._check(request, profile, suffix=request.suffix is not None)
            body = _convert.completion_body(request, profile, self._learned)
            answer = self._answer("/completions", body, request, profile)
        else:
            chat = _convert.as_chat(request)
            answer = self._answer("/chat/completions", self._chat_body(chat, profile), chat, profile)
        async for chunk in answer:
            yield chunk

    def _chat_body(self, request: ChatRequest, profile: Profile) -> dict[str, Any]:
        self._check(
            request,
            profile,
            tools=request.tools,
            tool_choice=request.tool_choice,
            structured_output=request.format is not None,
            thinking=request.think,
            images=any(each.images for each in request.messages),
        )
        return _convert.chat_body(request, profile, self._learned)

    def _check(self, request: ChatRequest | GenerateRequest, profile: Profile, **wanted: object) -> None:
        """Refuse what the core did not, because the server was not known."""
        if self._declared is not WIDEST:
            return
        for feature, value in {**wanted, "logprobs": request.options.get("logprobs")}.items():
            if value and feature not in profile.features:
                raise _convert.unsupported(feature, profile)
        for option in request.options.keys() & (WIDEST.options - profile.options):
            raise _convert.unsupported(option, profile)

    async def _answer(
        self, path: str, body: dict[str, Any], request: ChatRequest | GenerateRequest, profile: Profile
    ) -> AsyncIterator[Chunk]:
        """Yield the chunks of a reply. Without a reason for its end, there is no last one."""
        body |= await self._adapters.body(request.call, request.adapter, profile)
        reader = _convert.Reader(request, profile, self._learned)
        whole = bool(body.get("logprobs")) and not profile.streams_logprobs
        while True:
            headers: Headers = ()
            try:
                if whole:
                    plain = {name: value for name, value in body.items() if not name.startswith("stream")}
                    found = await self._http.json("POST", f"{self._api}{path}", plain, call=request.call)
                    headers = found.headers
                    if (chunk := reader.take(found)) is not None:
                        yield chunk
                else:
                    items = self._http.events("POST", f"{self._api}{path}", body, call=request.call, read=reader.read)
                    async for chunk in items:
                        headers = items.headers
                        if chunk is not None:
                            yield chunk
            except (ConnectionFailed, ProviderTimeout, StreamInterrupted):
                if reader.finish is None:  # With a reason, the reply is whole.
                    raise
            except RequestRejected as error:
                if not self._learned.adjust(body, error):
                    raise
                continue
            break
        if reader.finish is not None:
            yield reader.last(headers)

    @hookimpl
    async def embed(self, request: EmbedRequest) -> Embeddings:
        profile = await self._profile(request.call)
        body, read = _convert.embed_body(request, profile), partial(_convert.embeddings, request)
        return await self._http.json("POST", f"{self._api}/embeddings", body, call=request.call, read=read)

    @hookimpl
    async def count_tokens(self, request: ChatRequest) -> int:
        profile = await self._profile(request.call)
        if profile.count is None:
            raise _convert.unsupported("count_tokens", profile)
        path, field = profile.count
        whole = self._chat_body(request, profile)
        body = {name: whole[name] for name in ("model", "messages", "tools", "chat_template_kwargs") if name in whole}
        read = partial(_read_field, field)
        return int(await self._http.json("POST", path, body, call=request.call, read=read))

    # --- Models ------------------------------------------------------------------------------------------------------

    @hookimpl
    async def list_models(self, request: ModelsRequest) -> tuple[ModelInfo, ...]:
        found = await self._listed(request.call)
        with typed_errors():
            listed = _convert.models(found)
        own = (await self._profile(request.call)).default_model
        return (ModelInfo(name=own), *listed) if own else listed

    @hookimpl
    async def show_model(self, request: ModelRequest) -> ModelInfo:
        profile = await self._profile(request.call)
        listed = await self.list_models(ModelsRequest(call=request.call))
        model = next((each for each in listed if canonical_name(each.name) == canonical_name(request.model)), None)
        if model is None:
            raise ModelNotFound(f"The server does not list `{request.model}`.", hint="Choose one that it lists.")
        if (
            model.name == profile.default_model
        ):  # Of the models in the list, it was started with the one that is a path.
            path = next((each.name for each in listed if each.name.startswith("/")), None)
            model = replace(model, raw={"root": path})
        if profile.show is not None:
            method, body = ("POST", {"model": request.model}) if profile.show == "/api/show" else ("GET", None)
            read = partial(_convert.described, model)
            model = await self._http.json(method, profile.show, body, call=request.call, read=read)
        if is_loopback(urlsplit(self.address).hostname or ""):
            model = await request.call.run(_convert.with_files, model)
        return model

    @hookimpl
    async def loaded_models(self, request: ModelsRequest) -> tuple[LoadedModel, ...]:
        profile = await self._profile(request.call)
        if profile.loaded is None:
            raise _convert.unsupported("loaded_models", profile)
        path = f"{self._api}/models" if profile.loaded == "/models" else profile.loaded
        found: tuple[LoadedModel, ...] = await self._get(path, request.call, _convert.loaded_models)
        return found

    # --- Adapters ----------------------------------------------------------------------------------------------------

    @hookimpl
    async def load_adapter(self, request: LoadAdapterRequest) -> LoadedAdapter:
        base = ModelInfo(name=request.model)
        with contextlib.suppress(ModelNotFound):  # mlx_lm takes any path, also of a model that it does not list.
            base = await self.show_model(ModelRequest(call=request.call, model=request.model))
        return await self._adapters.load(request, await self._profile(request.call), base)

    @hookimpl
    async def unload_adapter(self, request: UnloadAdapterRequest) -> None:
        await self._adapters.unload(request)

    # --- Health ------------------------------------------------------------------------------------------------------

    @hookimpl
    async def health(self, request: HealthRequest) -> Health:
        found: dict[str, Any] = {"address": self.address}
        try:
            await self._check_levels(request, found)
        except ProviderError as error:
            return request.result(found, error)
        return request.result(found)

    async def _check_levels(self, request: HealthRequest, found: dict[str, Any]) -> None:
        """Check each level up to the requested one."""
        call, model = request.call, request.model or ""
        listed = await self.list_models(ModelsRequest(call=call))
        profile = await self._profile(call)
        found["server"] = profile.name or None
        if profile.health:
            await self._get(profile.health, call)
        if profile.version:
            path, field = profile.version
            found["version"] = read_word((await self._get(path, call)).get(field))
        found.update(reachable=True, api=True)
        if request.wants("model_present"):
            if canonical_name(model) not in {canonical_name(each.name) for each in listed}:
                raise ModelNotFound(f"The server does not list `{model}`.", hint="Choose one that it lists.")
            found["model_present"] = True
        if request.wants("answers"):
            found["model_loaded"] = None  # It is unknown if the next step fails.
            hello = Message(role="user", content="Hi")
            async for _ in self.chat(ChatRequest(call=call, model=model, messages=(hello,), max_tokens=1)):
                pass
            found.update(model_loaded=True, answers=True)
        elif request.wants("model_loaded"):
            loaded = await self.loaded_models(ModelsRequest(call=call))
            found["model_loaded"] = canonical_name(model) in {canonical_name(each.name) for each in loaded}

    async def _get(self, path: str, call: Call, read: Callable[[Document], Any] = lambda found: found) -> Any:
        return await self._http.json("GET", path, call=call, read=read, empty=True)


def _read_field(field: str, found: Mapping[str, Any]) -> Any:
    return found[field]
