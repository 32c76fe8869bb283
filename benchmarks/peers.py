"""Other frameworks, each in a separate environment, used as their documentation shows for Ollama.

Like `worker.py`, with the folder above this one in PYTHONPATH: python -P peers.py CLIENT URL [MODEL]
"""

from __future__ import annotations

import os
import sys
import threading
from operator import attrgetter

from benchmarks.worker import CLIENTS, HELLO, TEXTS, Client, main, run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from typing import Any

REQUIREMENTS = {
    "langchain-ollama": ["langchain-ollama"],
    "litellm": ["litellm"],
    "llm": ["llm", "llm-ollama"],
    "any-llm": ["any-llm-sdk[ollama]"],
    "pydantic-ai": ["pydantic-ai-slim[openai]"],
    "llama-index": ["llama-index-llms-ollama", "llama-index-embeddings-ollama"],
    "haystack": ["ollama-haystack"],
}
"""What is installed into each environment. The report names the version of the first."""


def load(module: str) -> Any:
    """Import and return a module of a framework."""
    __import__(module)
    return sys.modules[module]


class LangChain(Client):
    """LangChain: one chat model, kept."""

    module = "langchain_ollama"
    text_of = attrgetter("content")

    def send(self, model: str, *, stream: bool, is_async: bool) -> Any:
        chat = self.cached(model, lambda: self.api.ChatOllama(model=model, base_url=self.url))
        return getattr(chat, "a" * is_async + ("stream" if stream else "invoke"))(self.prompt)

    def vectors(self, model: str) -> Any:
        made = self.cached("embed", lambda: self.api.OllamaEmbeddings(model=model, base_url=self.url))
        return made.embed_documents(TEXTS)


class LiteLLM(Client):
    """LiteLLM: functions of the module."""

    module = "litellm"
    text_of = staticmethod(lambda found: found.choices[0].message.content)
    chunk_text_of = staticmethod(lambda found: found.choices[0].delta.content)

    def send(self, model: str, *, stream: bool, is_async: bool) -> Any:
        complete = self.api.acompletion if is_async else self.api.completion
        return complete(model=f"ollama_chat/{model}", messages=HELLO, api_base=self.url, stream=stream)

    def vectors(self, model: str) -> Any:
        return [each["embedding"] for each in self.api.embedding(f"ollama/{model}", TEXTS, api_base=self.url).data]


class Llm(Client):
    """LLM: one model, kept. Its plugin makes a new client for each call."""

    module = "llm"
    text_of = staticmethod(str)

    def send(self, model: str, *, stream: bool, is_async: bool) -> Any:
        os.environ["OLLAMA_HOST"] = self.url
        get = self.api.get_async_model if is_async else self.api.get_model
        found = self.cached(f"{model}{is_async}", lambda: get(f"ollama/{model}")).prompt(self.prompt, stream=stream)
        return found if stream else found.text()


class AnyLLM(LiteLLM):
    """any-llm: one provider, kept."""

    module = "any_llm"

    def send(self, model: str, *, stream: bool, is_async: bool) -> Any:
        made = self.cached(f"{is_async}", lambda: self.api.AnyLLM.create("ollama", api_base=self.url))
        return (made.acompletion if is_async else made.completion)(model=model, messages=HELLO, stream=stream)

    def vectors(self, model: str) -> Any:
        return [each.embedding for each in self.api.embedding(model, TEXTS, provider="ollama", api_base=self.url).data]


class PydanticAI(Client):
    """Pydantic AI: one agent, kept. It speaks OpenAI's API only, and is async only."""

    module = "pydantic_ai"
    text_of = attrgetter("output")
    chunk_text_of = staticmethod(str)

    def agent(self, model: str) -> Any:
        provider = load("pydantic_ai.providers.ollama").OllamaProvider(base_url=f"{self.url}/v1")
        return self.api.Agent(load("pydantic_ai.models.ollama").OllamaModel(model, provider=provider))

    def send(self, model: str, *, stream: bool, is_async: bool) -> Any:
        if not is_async and (stream or threading.current_thread() is not threading.main_thread()):
            raise NotImplementedError
        agent = self.cached(model, lambda: self.agent(model))
        if stream:
            return self.streamed(agent)
        return agent.run(self.prompt) if is_async else run(agent.run(self.prompt))

    async def streamed(self, agent: Any) -> AsyncIterator[Any]:
        async with agent.run_stream(self.prompt) as result:
            async for piece in result.stream_text(delta=True, debounce_by=None):
                yield piece


class LlamaIndex(Client):
    """LlamaIndex: one model, kept."""

    module = "llama_index.llms.ollama"
    text_of = attrgetter("message.content")
    chunk_text_of = attrgetter("delta")

    def send(self, model: str, *, stream: bool, is_async: bool) -> Any:
        said = [load("llama_index.core.llms").ChatMessage(role="user", content="Hello")]
        made = self.cached(model, lambda: self.api.Ollama(model, base_url=self.url, context_window=8192))
        return getattr(made, "a" * is_async + "stream_" * stream + "chat")(said)

    def vectors(self, model: str) -> Any:
        kind = load("llama_index.embeddings.ollama").OllamaEmbedding
        made = self.cached("embed", lambda: kind(model, base_url=self.url, embed_batch_size=256))
        return made.get_text_embedding_batch(TEXTS)


class Haystack(Client):
    """Haystack: it passes the chunks of a reply to a callback. Here they come out once it has ended."""

    module = "haystack_integrations.components.generators.ollama"
    text_of = staticmethod(lambda found: found["replies"][0].text)
    chunk_text_of = attrgetter("content")

    def send(self, model: str, *, stream: bool, is_async: bool) -> Any:
        said = [load("haystack.dataclasses").ChatMessage.from_user("Hello")]
        made = self.cached(model, lambda: self.api.OllamaChatGenerator(model=model, url=self.url))
        go = made.run_async if is_async else made.run
        if is_async and stream:
            return self.streamed(go, said)
        found: list[Any] = []
        whole = go(said, **({"streaming_callback": found.append} if stream else {}))
        return found if stream else whole

    async def streamed(self, go: Callable[..., Any], said: Any) -> AsyncIterator[Any]:
        found: list[Any] = []

        async def keep(chunk: Any) -> None:
            found.append(chunk)

        await go(said, streaming_callback=keep)
        for each in found:
            yield each

    def vectors(self, model: str) -> Any:
        kind = load("haystack_integrations.components.embedders.ollama").OllamaDocumentEmbedder
        made = self.cached("embed", lambda: kind(model=model, url=self.url, batch_size=256, progress_bar=False))
        return [
            each.embedding
            for each in made.run([load("haystack").Document(content=text) for text in TEXTS])["documents"]
        ]


CLIENTS |= zip(REQUIREMENTS, (LangChain, LiteLLM, Llm, AnyLLM, PydanticAI, LlamaIndex, Haystack), strict=True)

if __name__ == "__main__":
    main(*sys.argv[1:])
