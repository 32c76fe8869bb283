"""The client for asyncio. `sync_client.py` is made from it: after a change, run `python scripts/make_client.py`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from graftage._client.opening import _AwaitingClient, translate_errors_async
from graftage._client.streams import AsyncStream
from graftage.types import ACTIVE

if TYPE_CHECKING:
    from typing import Self, Unpack

    from graftage._engine.arguments import (
        ChatArguments,
        DefaultArguments,
        EmbedArguments,
        GenerateArguments,
        RerankArguments,
        Timeout,
    )
    from graftage._engine.inputs import Messages
    from graftage.types import (
        Adapter,
        AdapterChoice,
        AdapterInfo,
        AdapterReference,
        Embeddings,
        Health,
        HealthLevel,
        LoadedAdapter,
        LoadedModel,
        ModelInfo,
        PullProgress,
        Ranking,
        Reply,
        Warmed,
    )

__all__ = ["AsyncClient"]


class AsyncClient(_AwaitingClient):
    """A connection to a provider, for asyncio.

    Made by `connect_async`. It opens at `async with` or at its first call; use it as a context manager, or close it.
    Tasks may share it, and event loops may use it in turn.
    An argument of None means "not given", except `adapter=None`, which means the base model; `stream`, which decides
    what comes back, must be True or False.
    Every method may raise a `GraftageError`; the errors named below are those to expect of it.
    """

    @overload
    def chat(
        self, messages: Messages, *, stream: Literal[False] = False, **arguments: Unpack[ChatArguments]
    ) -> Coroutine[Any, Any, Reply]: ...

    @overload
    def chat(self, messages: Messages, *, stream: Literal[True], **arguments: Unpack[ChatArguments]) -> AsyncStream: ...

    def chat(
        self, messages: Messages, *, stream: bool = False, **arguments: Unpack[ChatArguments]
    ) -> Coroutine[Any, Any, Reply] | AsyncStream:
        """Send a conversation to the model, and return its reply.

        Args:
            messages: a text, a message, or a sequence of messages and mappings, in OpenAI's or Anthropic's form.
            stream: return an `AsyncStream` of chunks instead of the whole `Reply`.
            arguments: all optional.
                `model`: the model, if it is not the client's.
                `adapter`: an adapter for this call, `("style", 0.6)` for one with a weight, or a list of these for
                several at once; None for the base model; left out, the active one.
                `tools`: what the model may call: Python functions, pydantic models, mappings, `Tool`s, or the result
                of `list_tools` of an MCP client. `graftage.run_tools` calls them and goes on.
                `tool_choice`: `"auto"`; `"none"`, so that no tools are sent; `"required"`; or the name of the tool to
                call. If the model does not call it, that is an `InferenceFailed`.
                `format`: a pydantic model or another type, a JSON schema, or `"json"`; the result is in `Reply.parsed`.
                `retries`: how often to ask again if the reply does not fit the `format`, up to 10. The conversation
                goes on with that reply and with what is wrong with it. Each attempt is a separate call for `stats` and
                observers; `timeout` is the limit for all; `Reply.usage` is the sum, and `Reply.attempts` counts them.
                `think`: whether to think first, or how hard.
                `images`: pictures for the user's last message: bytes, `Image`, paths, or `data:` URIs.
                `options`: `temperature`, `seed` and so on; `capabilities().options` has the names.
                `keep_alive`: how long the model stays loaded: seconds, `"5m"`, or -1 for ever.
                `context_window`: tokens of prompt and reply together.
                `max_tokens`: tokens of the reply.
                `force`: go on if a policy refuses or lowers something, or if an adapter does not fit; the reply warns.
                `timeout`: seconds for the whole call, or `Timeouts`.

        Raises:
            ProviderError: it failed; the class says why, and `partial` has what came.
            AdapterError: the adapter cannot be used.
            ResourceLimitExceeded: a policy refused.
        """
        from graftage._engine.arguments import read_chat

        return self._answer("chat", read_chat, messages, stream, arguments)  # type: ignore[no-any-return]

    @overload
    def generate(
        self, prompt: str, *, stream: Literal[False] = False, **arguments: Unpack[GenerateArguments]
    ) -> Coroutine[Any, Any, Reply]: ...

    @overload
    def generate(
        self, prompt: str, *, stream: Literal[True], **arguments: Unpack[GenerateArguments]
    ) -> AsyncStream: ...

    def generate(
        self, prompt: str, *, stream: bool = False, **arguments: Unpack[GenerateArguments]
    ) -> Coroutine[Any, Any, Reply] | AsyncStream:
        """Continue a text.

        Args:
            prompt: the text to continue.
            stream: return an `AsyncStream` of chunks instead of the whole `Reply`.
            arguments: those of `chat` except `tools` and `retries`, and
                `system`: a system prompt, if the model's template has a place for one.
                `suffix`: the text after the gap that the model is to fill.
                `raw`: send the prompt without the model's template.

        Raises:
            ProviderError: as for `chat`.
        """
        from graftage._engine.arguments import read_generate

        return self._answer("generate", read_generate, prompt, stream, arguments)  # type: ignore[no-any-return]

    @translate_errors_async
    async def embed(self, inputs: str | Sequence[str], **arguments: Unpack[EmbedArguments]) -> Embeddings:
        """Turn texts into vectors, one for each text, in order.

        Args:
            inputs: a text, or several.
            arguments: all optional: `model`, `options`, `keep_alive`, `context_window`, `force`, `timeout` as for
                `chat`, and
                `dimensions`: cut the vectors to this length, if the model allows it.
                `truncate`: False makes an input that does not fit a `ContextOverflow`; by default it is cut.
                `purpose`: `"query"` or `"document"`: each input gets the prefix that the model was trained with, such
                as `search_query: `. If no prefix of the model is known, the result has a warning.

        Raises:
            CapabilityUnsupported: the provider or the model cannot embed.
            ContextOverflow: an input does not fit, and `truncate` is False.
        """
        from graftage._engine.arguments import read_embed

        session = await self._open()
        return await session.embed(read_embed(inputs, arguments))

    @translate_errors_async
    async def rerank(self, query: str, documents: Sequence[str], **arguments: Unpack[RerankArguments]) -> Ranking:
        """Rank texts by how well they answer a query, the best first. The model must be made for it.

        Args:
            query: what to look for.
            documents: the texts; a result names each by its place among them.
            arguments: all optional: `model`, `options`, `keep_alive`, `context_window`, `force`, `timeout` as for
                `chat`.

        Raises:
            CapabilityUnsupported: the provider or the model cannot; if the provider cannot, nothing was sent.
        """
        from graftage._engine.arguments import read_rerank

        session = await self._open()
        return await session.rerank(read_rerank(query, documents, arguments))

    @translate_errors_async
    async def count_tokens(self, messages: Messages, **arguments: Unpack[ChatArguments]) -> int:
        """Count the tokens that a model reads of a conversation, with its template and tools. It loads the model.

        Ollama cannot count without a reply: it reads the conversation and writes one token. A server before 0.12.6
        may count only what is left of a conversation that it has cut.

        Args:
            messages: as for `chat`.
            arguments: those of `chat`.

        Raises:
            CapabilityUnsupported: the provider cannot count.
            ContextOverflow: the conversation does not fit, and the server counts only what does.
        """
        from graftage._engine.arguments import read_chat

        session = await self._open()
        asked = await self._read(read_chat, messages, self._with_defaults("chat", arguments))
        return await session.single().count_tokens(asked)

    @translate_errors_async
    async def health(
        self,
        level: HealthLevel | None = None,
        *,
        model: str | None = None,
        max_age: float | None = None,
        timeout: Timeout = None,
    ) -> Health:
        """Check the health of the provider. A failure is in the result; `Health.raise_for_error` raises it.

        Args:
            level: how far to look: `reachable`, `api` (the default), `model_present`, `model_loaded`, `answers`.
            model: the model, if it is not the client's.
            max_age: seconds for which an earlier result is used again; 0 asks the server. The default is 5, and 1
                after a failure.
            timeout: seconds for the check. The default is 10, and the client's own limits for `answers`.

        Raises:
            CapabilityUnsupported: the provider cannot look that far.
        """
        session = await self._open()
        return await session.single().health(level, model, max_age, timeout)

    @translate_errors_async
    async def models(self, *, timeout: Timeout = None) -> tuple[ModelInfo, ...]:
        """List the models that can be used without a download.

        Args:
            timeout: seconds for the whole call, or `Timeouts`.

        Raises:
            CapabilityUnsupported: the provider cannot list its models.
        """
        session = await self._open()
        return await session.single().models(timeout)

    @translate_errors_async
    async def show(self, model: str | None = None, *, timeout: Timeout = None) -> ModelInfo:
        """Describe one model in full.

        Args:
            model: the model, if it is not the client's.
            timeout: seconds for the whole call, or `Timeouts`.

        Raises:
            ModelNotFound: the model is not there; close names are in `suggestions`.
        """
        session = await self._open()
        return await session.single().show(model, timeout)

    @translate_errors_async
    async def loaded(self, *, timeout: Timeout = None) -> tuple[LoadedModel, ...]:
        """List the models in memory.

        Args:
            timeout: seconds for the whole call, or `Timeouts`.

        Raises:
            CapabilityUnsupported: the provider does not know what is loaded.
        """
        session = await self._open()
        return await session.single().loaded(timeout)

    @translate_errors_async
    async def pull(
        self,
        model: str | None = None,
        *,
        on_progress: Callable[[PullProgress], None] | None = None,
        timeout: Timeout = None,
    ) -> PullProgress:
        """Download a model, one download of a model at a time in this process. Returns the last step.

        The limit between two steps is `timeouts.idle`; the whole download has a limit only if `timeout` is given.

        Args:
            model: the model, if it is not the client's.
            on_progress: called with each step; an error that it raises ends the download.
            timeout: seconds for the whole download.

        Raises:
            ModelNotFound: there is no such model to download.
            StreamInterrupted: the download broke off; pull again, and it goes on.
        """
        session = await self._open()
        return await session.single().pull(model, on_progress, timeout)

    @translate_errors_async
    async def ensure(
        self,
        model: str | None = None,
        *,
        policy: Literal["never", "missing", "always"] | None = None,
        on_progress: Callable[[PullProgress], None] | None = None,
        timeout: Timeout = None,
    ) -> ModelInfo:
        """Make sure that a model is there, and describe it.

        Args:
            model: the model, if it is not the client's.
            policy: when to download it: if it is `missing` (the default), `always`, or `never`.
            on_progress: called with each step of a download.
            timeout: seconds for the whole download.

        Raises:
            ModelNotFound: the model is not there and `policy` is `never`, or there is no such model to download.
        """
        session = await self._open()
        return await session.single().ensure(model, policy, on_progress, timeout)

    @translate_errors_async
    async def load(
        self,
        model: str | None = None,
        *,
        keep_alive: float | str | None = None,
        context_window: int | None = None,
        force: bool | None = None,
        timeout: Timeout = None,
    ) -> None:
        """Bring a model into memory.

        Args:
            model: the model, if it is not the client's.
            keep_alive: how long it stays loaded: seconds, `"5m"`, or -1 for ever.
            context_window: the window of the calls that follow, in tokens: another one would load the model again.
            force: go on if a policy refuses or lowers something.
            timeout: seconds for the whole call, or `Timeouts`.

        Raises:
            ModelNotFound: the model is not there.
            ModelLoadFailed: it cannot be loaded; `reason` says why.
            ResourceLimitExceeded: a policy refused.
        """
        session = await self._open()
        await session.single().load(model, keep_alive, context_window, timeout, force=force)

    @translate_errors_async
    async def unload(self, model: str | None = None, *, timeout: Timeout = None) -> None:
        """Remove a model from memory; it stays on the disk.

        Args:
            model: the model, if it is not the client's.
            timeout: seconds for the whole call, or `Timeouts`.

        Raises:
            CapabilityUnsupported: the provider cannot unload.
        """
        session = await self._open()
        await session.single().unload(model, timeout)

    @translate_errors_async
    async def delete(self, model: str, *, timeout: Timeout = None) -> None:
        """Delete a model from the disk, for good.

        Args:
            model: its name; it must be given, also if it is the client's own model.
            timeout: seconds for the whole call, or `Timeouts`.

        Raises:
            ModelNotFound: the model is not there.
        """
        session = await self._open()
        await session.single().delete(model, timeout)

    @translate_errors_async
    async def use_adapter(
        self,
        reference: AdapterReference | Sequence[AdapterReference] | None,
        *,
        on_missing: Literal["error", "base"] | None = None,
        force: bool | None = None,
        model: str | None = None,
        timeout: Timeout = None,
    ) -> LoadedAdapter | None:
        """Switch the adapter of all calls that follow, and return the one that is now active.

        Each of them finds the adapter again, as if it had named the adapter: after the files have changed, the new
        content answers, and the first reply warns; once they are gone, calls raise `AdapterNotFound`, or the base model
        answers if `on_missing` says so.

        After a failed switch every call raises that error until a switch succeeds, so that neither another adapter nor
        the base model answers by accident. Switches happen one at a time, in the order in which they were asked for.

        Args:
            reference: a name, a path, or what else the installed resolvers understand; `(reference, weight)`; a list
                of these for several at once; None for the base model.
            on_missing: `"error"`, or `"base"`: if the adapter is not found, the base model answers and each reply
                warns.
            force: use the adapter even if it does not fit the model; each reply warns.
            model: the base model, if it is not the client's.
            timeout: seconds to find and load the adapter.

        Raises:
            AdapterNotFound: no resolver knows the reference.
            AdapterInvalid: its files are malformed, unsafe or unsupported.
            AdapterIncompatible: it does not fit the model.
            AdapterUnsupported: this provider or server cannot load it.
        """
        session = await self._open_to_switch(reference)
        return await session.use_adapter(reference, on_missing=on_missing, force=force, model=model, timeout=timeout)

    @translate_errors_async
    async def warm(
        self,
        adapter: AdapterChoice = ACTIVE,
        messages: Messages = (),
        *,
        model: str | None = None,
        **arguments: Unpack[DefaultArguments],
    ) -> Warmed:
        """Load an adapter, and read ahead the messages that later calls begin with: usually the system message.

        A later `chat` with the same adapter, model, tools and window reads only what comes after them, as long as its
        server still holds what was read. The embedded engine also saves it on the disk, for later processes. Other
        servers are sent the messages as a chat with a reply of one token.

        Args:
            adapter: as for `chat`.
            messages: as for `chat`; without any, only the adapter is loaded, or for the base model the model.
            model: the model, if it is not the client's.
            arguments: all others of `chat` but `images`: `tools`, `think`, `context_window`, `keep_alive`, `options`
                and so on must be those of the later calls.

        Raises:
            AdapterError: the adapter cannot be used.
            ContextOverflow: the messages do not fit the window.
            ResourceLimitExceeded: a policy refused.
        """
        from graftage._engine.arguments import read_warm

        session = await self._open()
        given = self._with_defaults("chat", {"model": model, "adapter": adapter, **arguments})
        asked = await self._read(read_warm, messages, given)
        return await session.single().warm(asked)

    @translate_errors_async
    async def adapters(self, *, model: str | None = None, timeout: Timeout = None) -> tuple[AdapterInfo, ...]:
        """List the adapters that the installed plugins know. What could not be read is an entry with a `problem`.

        Args:
            model: judge each adapter against this model: `AdapterInfo.verdict`. Without it no server is asked.
            timeout: seconds to describe the model, or `Timeouts`.

        Raises:
            ModelNotFound: the model is not there.
            SettingsError: a plugin's settings name a folder or file that it cannot read.
        """
        session = await self._open()
        return await session.list_adapters(model, timeout)

    @translate_errors_async
    async def pull_adapter(
        self,
        reference: str,
        *,
        name: str | None = None,
        overwrite: bool | None = None,
        timeout: Timeout = None,
    ) -> AdapterInfo:
        """Download an adapter, and bind it to a name. No server of models is asked.

        The download has a limit only if `timeout` is given. Observers get its progress as events.

        Args:
            reference: what to download, such as `owner/name@revision` for a repository of Hugging Face.
            name: the name to bind it to, by default the last part of the reference.
            overwrite: bind the name to it even if it is bound to something else.
            timeout: seconds for the whole download.

        Raises:
            AdapterNotFound: there is no such adapter, or no plugin can download it.
            AdapterInvalid: what was downloaded is not an adapter.
            AdapterError: the name is bound to something else.
        """
        session = await self._open()
        return await session.pull_adapter(reference, name, overwrite, timeout)

    @translate_errors_async
    async def resolve_adapter(
        self, reference: str | Path, *, model: str | None = None, timeout: Timeout = None
    ) -> Adapter:
        """Find an adapter and check it against a model, without loading it. `Adapter.verdict` says whether it fits.

        Args:
            reference: a name, a path, or what else the installed resolvers understand.
            model: the base model, if it is not the client's.
            timeout: seconds for the whole call, or `Timeouts`.

        Raises:
            AdapterNotFound: no resolver knows the reference.
            AdapterInvalid: its files are malformed, unsafe or unsupported.
        """
        session = await self._open()
        return await session.single().resolve_adapter(reference, model, timeout)

    @translate_errors_async
    async def unload_adapter(self, reference: str | Path, *, model: str | None = None, timeout: Timeout = None) -> None:
        """Free the memory of an adapter. Nothing is deleted, and a call that names it loads it again.

        Args:
            reference: as for `resolve_adapter`.
            model: the base model, if it is not the client's.
            timeout: seconds for the whole call, or `Timeouts`.

        Raises:
            AdapterNotFound: no resolver knows the reference.
        """
        session = await self._open()
        await session.single().unload_adapter(reference, model, timeout)

    @translate_errors_async
    async def prune_adapters(
        self,
        *,
        keep: Sequence[str] | None = None,
        older_than: float | None = None,
        dry_run: bool | None = None,
        timeout: Timeout = None,
    ) -> tuple[ModelInfo, ...]:
        """Delete the models that loading adapters has left on the server; return them.

        Args:
            keep: names of models to leave alone.
            older_than: leave alone what is younger than this many seconds.
            dry_run: True, the default, deletes nothing and returns what would be deleted.
            timeout: seconds for the whole call, or `Timeouts`.

        Raises:
            CapabilityUnsupported: the provider makes no models of adapters.
        """
        session = await self._open()
        return await session.single().prune_adapters(keep, older_than, dry_run, timeout)

    @translate_errors_async
    async def native(self) -> Any:
        """Return the server's own client, such as `ollama.AsyncClient`, on this client's connections.

        It is for what Graftage lacks. It keeps the settings' limits on time and sizes, and sends each request once. It
        raises its own errors, and knows nothing of adapters, policies and events. It works until this client is closed.
        Requests to another address are refused, such as Ollama's `web_search`: connect to `https://ollama.com`.

        Raises:
            CapabilityUnsupported: the provider has no such client.
        """
        session = await self._open()
        return await session.single().native()

    @translate_errors_async
    async def close(self) -> None:
        """Close the client and its connections. Safe to call twice; a later call raises `RuntimeError`."""
        await self._close()

    @translate_errors_async
    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
