"""The provider NAME for Graftage: speaks OpenAI's chat API, as many servers do."""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from graftage.calls import ChatRequest, EmbedRequest, ModelsRequest
from graftage.exceptions import ContextOverflow, ProviderError, QuotaExceeded
from graftage.hookspecs import ConnectRequest, hookimpl
from graftage.http import Answer, CallJoiner, Event, place, read_object, read_records, read_vectors
from graftage.types import Capabilities, Chunk, Embeddings, Message, ModelInfo, Usage

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
        reader, body = Reader(), chat_body(request)
        async for text in self._http.events("POST", "/chat/completions", body, call=request.call, read=reader.text):
            if text:
                yield Chunk(text=text)
        if reader.end:  # The usage comes after the reason, so both wait for the end.
            yield reader.last()

    @hookimpl
    async def embed(self, request: EmbedRequest) -> Embeddings:
        body = {**request.options, "model": request.model, "input": request.inputs, "dimensions": request.dimensions}
        return await self._http.json("POST", "/embeddings", given(body), call=request.call, read=embeddings)

    @hookimpl
    async def list_models(self, request: ModelsRequest) -> tuple[ModelInfo, ...]:
        return await self._http.json("GET", "/models", call=request.call, read=models)


class Reader:
    """Reads the events of one answer: the text of each, and at the end what else was in them."""

    def __init__(self) -> None:
        self.end: dict[str, Any] = {}
        self._calls = CallJoiner()
        self._usage: Usage | None = None

    def text(self, event: Event) -> str:
        part = event.json()
        self._usage = usage(part) or self._usage
        choice = (part["choices"] or [{"delta": {}}])[0]
        if choice.get("finish_reason"):
            self.end = part
        for each in choice["delta"].get("tool_calls") or ():
            self._calls.add(each)
        return "" + (choice["delta"].get("content") or "")  # Anything but a text is an error here.

    def last(self) -> Chunk:
        reason = self.end["choices"][0]["finish_reason"]
        calls = self._calls.read(cut=reason == "length")
        return Chunk(tool_calls=calls, finish_reason=reason, usage=self._usage, raw=self.end)


def given(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def chat_body(request: ChatRequest) -> dict[str, Any]:
    schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": request.format}}
    tools = [{"name": it.name, "description": it.description, "parameters": it.parameters} for it in request.tools]
    body = {**request.options, "model": request.model, "messages": [message(each) for each in request.messages]}
    body |= {"max_tokens": request.max_tokens, "stream": True, "stream_options": {"include_usage": True}}
    body["tools"] = [{"type": "function", "function": each} for each in tools] or None
    body["response_format"] = request.format and ({"type": "json_object"} if request.format == "json" else schema)
    return given(body)


def message(it: Message) -> dict[str, Any]:
    calls = [
        {"id": each.id, "type": "function", "function": {"name": each.name, "arguments": json.dumps(each.arguments)}}
        for each in it.tool_calls
    ]
    body = {"role": it.role, "content": it.content, "name": it.name, "tool_call_id": it.tool_call_id}
    return given(body | {"tool_calls": calls or None})


def usage(answer: Mapping[str, Any]) -> Usage | None:
    found = read_object(answer.get("usage"))
    return (
        Usage(input_tokens=found.get("prompt_tokens"), output_tokens=found.get("completion_tokens")) if found else None
    )


def embeddings(answer: Mapping[str, Any]) -> Embeddings:
    return Embeddings(vectors=read_vectors(answer["data"]), usage=usage(answer) or Usage())


def models(answer: Mapping[str, Any]) -> tuple[ModelInfo, ...]:
    return read_records(answer["data"], lambda each: ModelInfo(name=each["id"], raw=each))


def refusal(answer: Answer) -> ProviderError | None:
    kinds = {"context_length_exceeded": ContextOverflow, "insufficient_quota": QuotaExceeded}
    kind = kinds.get(answer.facts.get("code", ""))
    return kind(answer.said, hint="Send less, or check the account's plan.") if kind else None


@hookimpl
def connect(request: ConnectRequest) -> Connection:
    return Connection(request)
