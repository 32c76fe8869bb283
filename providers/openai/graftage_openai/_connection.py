"""One connection to a server: every hook of the contract, built on `graftage.http`."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
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
    NativeRequest,
    UnloadAdapterRequest,
)
from graftage.exceptions import (
    AuthenticationFailed,
    CapabilityUnsupported,
    ConnectionFailed,
    InferenceFailed,
    ModelNotFound,
    Overloaded,
    ProtocolError,
    ProviderError,
    ProviderTimeout,
    RequestRejected,
    StreamInterrupted,
)
from graftage.files import add_files
from graftage.hookspecs import hookimpl
from graftage.http import Answer, Document, Rules, by_words, read_word, says
from graftage.http.client import typed_errors
from graftage.http.completions import ChatReader, as_chat
from graftage.http.transport import header
from graftage.types import (
    Capabilities,
    Chunk,
    Embeddings,
    Feature,
    Health,
    LoadedAdapter,
    LoadedModel,
    Message,
    ModelInfo,
    canonical_name,
)
from graftage_openai import _convert
from graftage_openai._adapters import Adapters
from graftage_openai._convert import recognise, unsupported
from graftage_openai._profiles import HOSTS, PROFILES, UNKNOWN, WIDEST, OpenAISettings, Profile, parse_host

if TYPE_CHECKING:
    from graftage.hookspecs import ConnectRequest

__all__ = ["OpenAIConnection"]

LOOK: Final = 2.0
"""Seconds to find out which server it is."""
PASSING: Final = (ConnectionFailed, Overloaded)
"""Errors after which the next call tries to find it out again."""
NOT_FOUND: Final = 404
NOT_THERE: Final = (NOT_FOUND, 405)


class OpenAIConnection:
    """The hooks of a connection. It opens nothing until the first request."""

    def __init__(self, request: ConnectRequest, settings: OpenAISettings) -> None:
        root, self._api = parse_host(settings.host)
        self._http = request.http(root, refusal=_refusal)
        self.address = self._http.base_url
        cloud = HOSTS.get(urlsplit(root).hostname or "")
        self._known = PROFILES[settings.profile] if settings.profile else cloud
        self._declared = self._known or WIDEST
        self.default_model = self._declared.default_model
        self._lacks_key = cloud is not None and not (settings.api_key or settings.headers)
        self._adapters = Adapters(self._http, self._api)
        self._learned = _convert.Learned()
        self._able: frozenset[Feature] | None = None
        self._file: str | None = None

    @hookimpl
    def capabilities(self) -> Capabilities:
        able = self._declared
        found = (self._known or able).features & {"adapter_weights"}  # Adapters come after the server is known.
        return Capabilities(features=able.features | found, options=able.options, parameters=frozenset({"max_tokens"}))

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
        found: Document = await self._get(f"{self._api}/models", call)
        self._known = self._known or recognise(found) or UNKNOWN
        return found

    # --- Inference ---------------------------------------------------------------------------------------------------

    @hookimpl
    async def chat(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        profile = await self._profile(request.call)
        able = await self._features(request.call, profile) if request.tools else None
        if able is not None and "tools" not in able:
            raise unsupported(f"tools` with the template of `{request.model}", profile)
        body = self._chat_body(request, profile)
        async for chunk in self._answer("/chat/completions", body, request, profile):
            yield chunk

    @hookimpl
    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        if not request.raw and request.suffix is None:
            answer = self.chat(as_chat(request))
        else:
            profile = await self._profile(request.call)
            self._check(request, profile, suffix=request.suffix is not None)
            body = _convert.completion_body(request, profile, self._learned)
            answer = self._answer("/completions", body, request, profile)
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
        if self._declared is WIDEST:
            features = {name for name, value in wanted.items() if value} - profile.features
            for name in (*features, *(request.options.keys() & WIDEST.options - profile.options)):
                raise unsupported(name, profile)

    async def _answer(
        self, path: str, body: dict[str, Any], request: ChatRequest | GenerateRequest, profile: Profile
    ) -> AsyncIterator[Chunk]:
        """Yield the chunks of a reply.

        Raises:
            StreamInterrupted: it has no reason for its end, and so may be cut.
        """
        body |= await self._adapters.body(request.call, request.adapter, profile)
        reader = ChatReader(request)
        path, whole = f"{self._api}{path}", "logprobs" in body and not profile.streams_logprobs
        if whole:
            body = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
        begun = False
        with self._adapters.holding(request.adapter):
            while True:
                try:
                    if whole:
                        yield await self._http.json("POST", path, body, call=request.call, read=reader.read_whole)
                        break
                    items = self._http.events(
                        "POST", path, body, call=request.call, read=reader.read, words=reader.words
                    )
                    async for chunk in items:
                        begun, reader.headers = True, items.headers
                        if chunk is not None:
                            yield chunk
                    break
                except (ConnectionFailed, ProviderTimeout, StreamInterrupted):
                    if reader.finish is None:
                        raise
                    break  # With a reason for its end, the reply is complete.
                except RequestRejected as error:
                    if begun or not self._learned.adjust(body, error):  # After the first event, it is too late.
                        raise
        self._learned.thought = reader.thought or self._learned.thought
        yield replace(reader.last(), warnings=tuple(_convert.warnings(request, profile, reader)))

    @hookimpl
    async def embed(self, request: EmbedRequest) -> Embeddings:
        profile = await self._profile(request.call)
        body, read = _convert.embed_body(request, profile), partial(_convert.embeddings, request)
        return await self._http.json("POST", f"{self._api}/embeddings", body, call=request.call, read=read)

    @hookimpl
    async def count_tokens(self, request: ChatRequest) -> int:
        profile = await self._profile(request.call)
        if profile.count is None:
            raise unsupported("count_tokens", profile)
        (path, field), whole = profile.count, self._chat_body(request, profile)
        body = {name: whole[name] for name in whole.keys() & {"model", "messages", "tools", "chat_template_kwargs"}}
        with self._adapters.holding(request.adapter):
            return await self._http.json("POST", path, body, call=request.call, read=lambda found: int(found[field]))

    # --- Models ------------------------------------------------------------------------------------------------------

    @hookimpl
    async def list_models(self, request: ModelsRequest) -> tuple[ModelInfo, ...]:
        found = await self._listed(request.call)
        with typed_errors():
            return _convert.models(self._known or UNKNOWN, found)

    @hookimpl
    async def show_model(self, request: ModelRequest) -> ModelInfo:
        listed = await self.list_models(ModelsRequest(call=request.call))
        profile = self._known or UNKNOWN
        found = _find(request.model, listed)
        model = replace(found, features=await self._features(request.call, profile))
        if profile.loaded == "/api/v1/models":
            more = await self._get(profile.loaded, request.call, partial(_convert.lmstudio_models, loaded=False))
            return next((replace(one, features=model.features) for one in more if one.name == model.name), model)
        place = self._file or str(model.raw.get("root") or model.name)
        if model.name == profile.default_model:  # mlx_lm was started with the one that is a path.
            place = next((each.name for each in listed if each.name.startswith("/")), place)
        return await request.call.run(add_files, model, place) if self._adapters.is_local else model

    async def _features(self, call: Call, profile: Profile) -> frozenset[Feature] | None:
        """Return what the one model of the server can do; None if it does not say."""
        if self._able is None and profile.props:
            with contextlib.suppress(ProviderError):
                props: Document = await self._get(profile.props, call)
                self._able, self._file = _convert.features(profile, props), read_word(props.get("model_path"))
        return self._able

    @hookimpl
    async def loaded_models(self, request: ModelsRequest) -> tuple[LoadedModel, ...]:
        profile = await self._profile(request.call)
        if profile.loaded is None:
            raise unsupported("loaded_models", profile)
        path = f"{self._api}/models" if profile.loaded == "/models" else profile.loaded
        loaded: tuple[LoadedModel, ...] = await self._get(path, request.call, partial(_convert.loaded_models, profile))
        return loaded

    # --- Adapters ----------------------------------------------------------------------------------------------------

    @hookimpl
    async def load_adapter(self, request: LoadAdapterRequest) -> LoadedAdapter:
        profile, base = await self._profile(request.call), ModelInfo(name=request.model)
        if profile.adapters is not None:
            with contextlib.suppress(ModelNotFound):  # mlx_lm takes any path, also of a model that it does not list.
                base = await self.show_model(ModelRequest(call=request.call, model=request.model))
        return await self._adapters.load(request, profile, base)

    @hookimpl
    async def unload_adapter(self, request: UnloadAdapterRequest) -> None:
        await self._adapters.unload(request)

    # --- The official client ------------------------------------------------------------------------------------------

    @hookimpl
    def native(self, request: NativeRequest) -> object:  # noqa: ARG002 - required by the hook
        try:
            openai: Any = importlib.import_module("openai")
        except ImportError as error:
            hint = 'Run `pip install "graftage-openai[native]"`.'
            raise CapabilityUnsupported("The package `openai` cannot be imported.", hint=hint) from error
        names = ("OpenAI", "DefaultHttpxClient"), ("AsyncOpenAI", "DefaultAsyncHttpxClient")
        kind, inner = (getattr(openai, each) for each in names[self._http.colour != "sync"])
        client: Any = kind(
            base_url=f"{self._http.base_url}{self._api}",
            # A placeholder, so that it takes no key from the environment: the transport replaces it.
            api_key="-",
            max_retries=0,
            http_client=inner(transport=self._http.httpx_transport(), trust_env=False, follow_redirects=False),
        )
        client.organization = client.project = None  # They come from the environment, and are OpenAI's alone.
        found: object = client
        return found

    # --- Health ------------------------------------------------------------------------------------------------------

    @hookimpl
    async def health(self, request: HealthRequest) -> Health:
        return await request.check(partial(self._check_levels, request), address=self.address)

    async def _check_levels(self, request: HealthRequest, found: dict[str, Any]) -> None:
        """Check each level up to the requested one."""
        call, model = request.call, request.model or ""
        if self._lacks_key:  # Without one, it would only be asked in vain.
            found["reachable"] = False
            hint = "Set `api_key`, or the `host` of another server."
            raise AuthenticationFailed(f"There is no key for {self.address}.", hint=hint)
        listed = await self.list_models(ModelsRequest(call=call))
        profile = self._known or UNKNOWN
        found["server"] = profile.name or None
        for path, field in profile.health.items():
            found["version"] = read_word((await self._get_optional(path, call)).get(field))
        found.update(reachable=True, api=True)
        if request.wants("model_present"):
            _find(model, listed)
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

    async def _get_optional(self, path: str, call: Call) -> Document:
        """Return what a path says; an empty object if it is not there, since a proxy may pass on the API alone."""
        try:
            found: Document = await self._get(path, call)
        except ProviderError as error:
            if error.status not in NOT_THERE and not isinstance(error, ProtocolError):
                raise
            return Document()
        return found

    async def _get(self, path: str, call: Call, read: Callable[[Document], Any] = lambda found: found) -> Any:
        return await self._http.json("GET", path, call=call, read=read, empty=True)


def _find(name: str, listed: Sequence[ModelInfo]) -> ModelInfo:
    """Return the model of a name."""
    for each in listed:
        if canonical_name(each.name) == canonical_name(name):
            return each
    raise ModelNotFound(f"The server does not list `{name}`.", hint="Choose one that it lists.")


# --- Refusals --------------------------------------------------------------------------------------------------------

NO_ENDPOINT: Final = says(
    CapabilityUnsupported, "The server has no such endpoint.", "Check the path in `host`: it is usually `/v1`."
)
RULES: Final[Rules] = (
    (
        ("generation thread died", '"status": "unavailable"'),
        says(InferenceFailed, "The server's engine has died: it will answer nothing more.", "Restart the server."),
    ),
    (("unexpected endpoint",), NO_ENDPOINT),  # LM Studio, with status 200.
)
MLX: Final[Rules] = (
    (("only 'text' content type",), says(CapabilityUnsupported, "{model} cannot read images here.", "Use another.")),
    (
        ("not a valid model", "cached snapshot", "repository not found", "repo id must", "'config.json'"),
        says(ModelNotFound, "The server does not have {model}.", "Choose one that it lists, or name its folder."),
    ),
    (("",), says(RequestRejected, "", "Correct the request.")),
)
"""mlx_lm.server gives the status 404, with a text as the error, to whatever fails before the first token."""


def _refusal(answer: Answer) -> ProviderError | None:
    if (error := by_words(answer, RULES)) is not None or answer.status != NOT_FOUND:
        return error
    if answer.words.strip().lower() in ("not found", "file not found"):
        return NO_ENDPOINT(answer)
    is_mlx = (header(answer.headers, "server") or "").startswith("BaseHTTP") and b'"message"' not in answer.body
    return by_words(answer, MLX) if is_mlx and answer.known else None
