"""The provider NAME for Graftage: speaks OpenAI's chat API, as many servers do."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from graftage.calls import ChatRequest, EmbedRequest, ModelsRequest
from graftage.exceptions import ContextOverflow, ProviderError
from graftage.hookspecs import ConnectRequest, hookimpl
from graftage.http import Answer, place, read_records
from graftage.http.completions import (
    ChatReader,
    read_embeddings,
    write_format,
    write_message,
    write_options,
    write_tools,
)
from graftage.types import Capabilities, Chunk, Embeddings, ModelInfo

graftage_contract = 1
FEATURES = frozenset({"tools", "structured_output"})
OPTIONS = frozenset({"frequency_penalty", "presence_penalty", "seed", "server", "stop", "temperature", "top_p"})


class Connection:
    def __init__(self, request: ConnectRequest) -> None:
        host = request.settings.host or "https://api.openai.com/v1"
        self._http = request.http(host, refusal=refusal)
        self.address = place(host)

    @hookimpl
    def capabilities(self) -> Capabilities:
        return Capabilities(features=FEATURES, options=OPTIONS, parameters=frozenset({"max_tokens"}))

    @hookimpl
    async def chat(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        path, body, reader = "/chat/completions", chat_body(request), ChatReader(request)
        items = self._http.events("POST", path, body, call=request.call, read=reader.read, words=reader.words)
        async for chunk in items:
            if chunk is not None:
                yield chunk
        reader.headers = items.headers
        yield reader.last()  # It waits for the usage, which comes after the reason.

    @hookimpl
    async def embed(self, request: EmbedRequest) -> Embeddings:
        body = {**request.options, "model": request.model, "input": request.inputs, "dimensions": request.dimensions}
        return await self._http.json("POST", "/embeddings", given(body), call=request.call, read=read_embeddings)

    @hookimpl
    async def list_models(self, request: ModelsRequest) -> tuple[ModelInfo, ...]:
        return await self._http.json("GET", "/models", call=request.call, read=models)


def given(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def chat_body(request: ChatRequest) -> dict[str, Any]:
    body = {
        "model": request.model,
        "messages": [write_message(each) for each in request.messages],
        "max_tokens": request.max_tokens,
        "response_format": request.format and write_format(request.format),
    }
    return {**write_options(request.options), **write_tools(request.tools), **given(body)}


def models(answer: Mapping[str, Any]) -> tuple[ModelInfo, ...]:
    return read_records(answer["data"], lambda each: ModelInfo(name=each["id"], raw=each))


def refusal(answer: Answer) -> ProviderError | None:
    """Return the error for what this server says in its own way; the toolkit knows the words of most servers."""
    if answer.facts.get("code") == "prompt_too_long":
        return ContextOverflow(answer.said, hint="Send less.")
    return None


@hookimpl
def connect(request: ConnectRequest) -> Connection:
    return Connection(request)
