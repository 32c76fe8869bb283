"""Other frameworks, each in an environment of its own, by the way their users take to Ollama.

python -P peers.py CLIENT URL [MODEL]: as `worker.py`.
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
"""What is installed into the environment of each; the first is the one whose version is told."""


def sub(module: str) -> Any:
    """A module of a framework."""
    __import__(module)
    return sys.modules[module]


class LangChain(Client):
    """LangChain: a chat model by name, kept."""

    module = "langchain_ollama"
    text = attrgetter("content")

    def ask(self, model: str, *, stream: bool, later: bool) -> Any:
        chat = self.once(model, lambda: self.api.ChatOllama(model=model, base_url=self.url))
        return getattr(chat, "a" * later + ("stream" if stream else "invoke"))(self.prompt)

    def vectors(self, model: str) -> Any:
        made = self.once("embed", lambda: self.api.OllamaEmbeddings(model=model, base_url=self.url))
        return made.embed_documents(TEXTS)


class LiteLLM(Client):
    """LiteLLM: functions of the module."""

    module = "litellm"
    text = staticmethod(lambda found: found.choices[0].message.content)
    piece = staticmethod(lambda found: found.choices[0].delta.content)

    def ask(self, model: str, *, stream: bool, later: bool) -> Any:
        complete = self.api.acompletion if later else self.api.completion
        return complete(model=f"ollama_chat/{model}", messages=HELLO, api_base=self.url, stream=stream)

    def vectors(self, model: str) -> Any:
        return [each["embedding"] for each in self.api.embedding(f"ollama/{model}", TEXTS, api_base=self.url).data]


class Llm(Client):
    """LLM: a model by name, kept; its plugin makes a new client for each call."""

    module = "llm"
    text = staticmethod(str)

    def ask(self, model: str, *, stream: bool, later: bool) -> Any:
        os.environ["OLLAMA_HOST"] = self.url
        get = self.api.get_async_model if later else self.api.get_model
        found = self.once(f"{model}{later}", lambda: get(f"ollama/{model}")).prompt(self.prompt, stream=stream)
        return found if stream else found.text()


class AnyLLM(LiteLLM):
    """any-llm: a provider, kept."""

    module = "any_llm"

    def ask(self, model: str, *, stream: bool, later: bool) -> Any:
        made = self.once(f"{later}", lambda: self.api.AnyLLM.create("ollama", api_base=self.url))
        return (made.acompletion if later else made.completion)(model=model, messages=HELLO, stream=stream)

    def vectors(self, model: str) -> Any:
        return [each.embedding for each in self.api.embedding(model, TEXTS, provider="ollama", api_base=self.url).data]


class PydanticAI(Client):
    """Pydantic AI, by the path of OpenAI's API, as it has no other; its own way is async."""

    module = "pydantic_ai"
    text = attrgetter("output")
    piece = staticmethod(str)

    def agent(self, model: str) -> Any:
        provider = sub("pydantic_ai.providers.ollama").OllamaProvider(base_url=f"{self.url}/v1")
        return self.api.Agent(sub("pydantic_ai.models.ollama").OllamaModel(model, provider=provider))

    def ask(self, model: str, *, stream: bool, later: bool) -> Any:
        if not later and (stream or threading.current_thread() is not threading.main_thread()):
            raise NotImplementedError
        agent = self.once(model, lambda: self.agent(model))
        if stream:
            return self.streamed(agent)
        return agent.run(self.prompt) if later else run(agent.run(self.prompt))

    async def streamed(self, agent: Any) -> AsyncIterator[Any]:
        async with agent.run_stream(self.prompt) as result:
            async for piece in result.stream_text(delta=True, debounce_by=None):
                yield piece


class LlamaIndex(Client):
    """LlamaIndex: a model by name, kept."""

    module = "llama_index.llms.ollama"
    text = attrgetter("message.content")
    piece = attrgetter("delta")

    def ask(self, model: str, *, stream: bool, later: bool) -> Any:
        said = [sub("llama_index.core.llms").ChatMessage(role="user", content="Hello")]
        made = self.once(model, lambda: self.api.Ollama(model, base_url=self.url, context_window=8192))
        return getattr(made, "a" * later + "stream_" * stream + "chat")(said)

    def vectors(self, model: str) -> Any:
        kind = sub("llama_index.embeddings.ollama").OllamaEmbedding
        made = self.once("embed", lambda: kind(model, base_url=self.url, embed_batch_size=256))
        return made.get_text_embedding_batch(TEXTS)


class Haystack(Client):
    """Haystack: it hands the pieces of an answer to a callback; here they come out once it has ended."""

    module = "haystack_integrations.components.generators.ollama"
    text = staticmethod(lambda found: found["replies"][0].text)
    piece = attrgetter("content")

    def ask(self, model: str, *, stream: bool, later: bool) -> Any:
        said = [sub("haystack.dataclasses").ChatMessage.from_user("Hello")]
        made = self.once(model, lambda: self.api.OllamaChatGenerator(model=model, url=self.url))
        go = made.run_async if later else made.run
        if later and stream:
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
        kind = sub("haystack_integrations.components.embedders.ollama").OllamaDocumentEmbedder
        made = self.once("embed", lambda: kind(model=model, url=self.url, batch_size=256, progress_bar=False))
        return [
            each.embedding for each in made.run([sub("haystack").Document(content=text) for text in TEXTS])["documents"]
        ]


CLIENTS |= zip(REQUIREMENTS, (LangChain, LiteLLM, Llm, AnyLLM, PydanticAI, LlamaIndex, Haystack), strict=True)

if __name__ == "__main__":
    main(*sys.argv[1:])
