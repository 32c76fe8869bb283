"""Providers that each break one sentence of the contract, and the test of the suite that must catch each.

`test_conformance.py` runs this file as a test module, and as a plugin that selects those tests alone. The mended copy
of each provider is in `test_conformance_outside.py`, where the whole suite passes.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, ClassVar

from test_conformance_outside import TestEcho, TestOpenai, reply, template

from graftage.calls import Call
from graftage.exceptions import (
    GraftageError,
    InferenceFailed,
    ModelNotFound,
    Overloaded,
    ProtocolError,
    StreamInterrupted,
)
from graftage.hookspecs import hookimpl
from graftage.settings import PluginSettings
from graftage.testing import Echo
from graftage.testing.echo import EchoConnection
from graftage.types import (
    Capabilities,
    Chunk,
    Embeddings,
    Health,
    LoadedAdapter,
    LoadedModel,
    ModelInfo,
    PullProgress,
    Ranking,
    Timeouts,
    Usage,
)

CAUGHT: dict[str, tuple[str, str]] = {}
"""For each broken provider the sentence that it breaks and the test that must catch it."""
wire = template("openai")


def pytest_pycollect_makeitem(collector: Any, name: str) -> Any:
    """Collect, for each broken provider, only the test that must catch it."""
    unwanted = name.startswith("test_") and CAUGHT.get(collector.name, ("", ""))[1] != name
    return [] if unwanted else None


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Use one client for each; only a task can be cancelled."""
    items[:] = [each for each in items if ("async" in each.name) == ("cancelled" in each.name)]


class Plugin:
    """A provider whose connections have one class, or which is broken itself."""

    connection: ClassVar[Any] = None

    def __init__(self) -> None:
        self.name = f"Test{type(self).__name__}"
        self.echo = Echo(itertools.repeat(reply, 99), strict=True, address="echo")

    @hookimpl
    def connect(self, request: Any) -> object:
        return self.connection(request) if issubclass(self.connection, Wire) else self.connection(self.echo)


class Wire(wire.Connection):  # type: ignore[misc, name-defined] # a module that is loaded by its path
    """The provider for OpenAI's API, on the cassettes of the whole one."""


class Local(EchoConnection):
    """Echo, with adapters as the contract wants them."""

    @hookimpl
    async def load_adapter(self, request: Any) -> LoadedAdapter:
        name = "graftage-pirate:latest"
        self._echo.models[name] = ModelInfo(name=name)
        self._echo.derived.add(name)
        return LoadedAdapter(name=request.adapter.name, digest=request.adapter.digest, model=name)


def breaks(sentence: str, test: str) -> Callable[[type], type]:
    """Adopt the suite for a broken connection or plugin, under a name that pytest collects."""

    def adopt(broken: type) -> type:
        base = TestOpenai if issubclass(broken, Wire) or getattr(broken, "connection", None) is Wire else TestEcho
        plugin = broken if issubclass(broken, Plugin) else type(broken.__name__, (Plugin,), {"connection": broken})
        name = f"Test{broken.__name__}"
        CAUGHT[name] = (sentence, test)
        globals()[name] = type(name, (base,), {"provider": property(lambda _: plugin()), "deviations": {}})
        return broken

    return adopt


def knock() -> None:
    """Open a connection, which is refused."""
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", 9), timeout=1).close()


# --- The shape of hooks ----------------------------------------------------------------------------------------------


@breaks("Each hook takes one frozen object from `graftage.calls`", "test_connects")
class TakesTwo(EchoConnection):
    @hookimpl
    async def chat(self, request: Any, more: Any) -> AsyncIterator[Chunk]:  # type: ignore[override]
        yield Chunk(finish_reason="stop")


@breaks("each marked with `hookimpl`", "test_connects")
class Unmarked:
    def __init__(self, echo: Echo) -> None:
        pass

    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        yield Chunk(finish_reason="stop")

    @hookimpl
    def capabilities(self) -> Capabilities:
        return Capabilities(features=frozenset())


@breaks("`chat` is required, the others are optional", "test_connects")
class Silent:
    def __init__(self, echo: Echo) -> None:
        pass

    @hookimpl
    def list_models(self, request: Any) -> tuple[ModelInfo, ...]:
        return ()


@breaks("All other hooks are `def`.", "test_connects")
class AsyncConnect(Plugin):
    @hookimpl
    async def connect(self, request: Any) -> object:
        return Local(self.echo)


@breaks(
    "`async def` that awaits anything else. Set `needs_event_loop = True` on the connection", "test_chat_gives_text"
)
class ForeignAwait(EchoConnection):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        await asyncio.sleep(0.001)
        yield Chunk(text="Hi", finish_reason="stop")


@breaks("The connection may have three attributes", "test_connects")
class Misspelt(EchoConnection):
    needs_eventloop = True


@breaks("for a stream, a generator", "test_chat_gives_text")
class ReturnsText(EchoConnection):
    @hookimpl
    def chat(self, request: Any) -> Any:
        return Chunk(text="Hi", finish_reason="stop")


@breaks("Raise the classes of `graftage.exceptions`", "test_unknown_model_is_not_found")
class RaisesKeyError(EchoConnection):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        yield Chunk(text={"echo:latest": "Hi"}[request.model], finish_reason="stop")


@breaks("Several calls may run at the same time.", "test_calls_run_at_the_same_time")
class Locks(EchoConnection):
    lock = threading.Lock()

    @hookimpl
    def chat(self, request: Any) -> Iterator[Chunk]:  # type: ignore[override]
        with self.lock:
            yield from [Chunk(text="Hi")] * 5000
            yield Chunk(finish_reason="stop")


@breaks("Several calls may run at the same time.", "test_streams_do_not_mix")
class SharesText(EchoConnection):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        self.words = iter(["one ", "two ", "three "])
        while word := next(self.words, ""):
            yield Chunk(text=word)
        yield Chunk(finish_reason="stop")


@breaks("Several calls may run at the same time.", "test_threads_get_equal_replies")
class RefusesSecond(EchoConnection):
    busy = 0

    @hookimpl
    def chat(self, request: Any) -> Iterator[Chunk]:  # type: ignore[override]
        self.busy += 1
        time.sleep(0.02)
        if self.busy > 1:
            self.busy = 0
            raise Overloaded("One at a time.", retryable=False)
        self.busy = 0
        yield Chunk(text="Hi", finish_reason="stop")


# --- connect, settings_model, answers --------------------------------------------------------------------------------


@breaks("Return the connection", "test_connects")
class ReturnsNothing(Plugin):
    @hookimpl
    def connect(self, request: Any) -> object:
        return None


@breaks("open nothing before an operation needs it", "test_connecting_opens_nothing")
class ConnectsEarly(EchoConnection):
    def __init__(self, echo: Echo) -> None:
        super().__init__(echo)
        knock()


@breaks("connections with the same address share their limits", "test_address_is_the_same_for_equal_settings")
class NewAddress(EchoConnection):
    def __init__(self, echo: Echo) -> None:
        super().__init__(echo)
        self.address = f"echo/{random.random()}"


@breaks("`default_model`: the model to use", "test_default_model_is_a_name")
class DefaultIsNoName(EchoConnection):
    default_model = ("echo:latest",)


@breaks("SettingsError: a setting cannot be used.", "test_unusable_host_is_a_settings_error")
class IgnoresHost(Wire):
    def __init__(self, request: Any) -> None:
        host = "http://127.0.0.1:11434/v1"
        super().__init__(replace(request, settings=request.settings.model_copy(update={"host": host})))


@breaks("A provider returns a subclass of `graftage.settings.Settings`", "test_settings_have_the_common_ones")
class OwnKindOfSettings(Plugin):
    connection = Local

    @hookimpl
    def settings_model(self) -> Any:
        return PluginSettings


@breaks("because clients have different settings", "test_clients_keep_their_own_settings")
class KeepsSettings(Plugin):
    connection = Wire
    kept: Any = None

    @hookimpl
    def connect(self, request: Any) -> object:
        type(self).kept = self.kept or Wire(request)
        return self.kept


@breaks("Return a rank, or None to decline.", "test_answers_sends_nothing")
class RankIsText(Plugin):
    connection = Local

    @hookimpl
    def answers(self, request: Any) -> Any:
        return "high"


@breaks("Send nothing here", "test_answers_sends_nothing")
class AsksServer(Plugin):
    connection = Local

    @hookimpl
    def answers(self, request: Any) -> int | None:
        knock()
        return 1


@breaks("return None for a remote address unless `host` is in `request.given`", "test_remote_address_needs_consent")
class AnswersForAll(Plugin):
    connection = Wire

    @hookimpl
    def answers(self, request: Any) -> int | None:
        return 1


# --- chat ------------------------------------------------------------------------------------------------------------


@breaks("Return an iterator.", "test_chat_gives_text")
class ReturnsNone(EchoConnection):
    @hookimpl
    def chat(self, request: Any) -> Any:
        return None


class Kept:
    """A call whose stream nobody closes."""

    responses: ClassVar[list[Any]] = []


@breaks("closing it must stop the work", "test_closed_stream_is_seen_at_the_server")
class NeverCloses(Wire):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        reader = wire.ChatReader(request)
        unowned = replace(request.call, opened={})
        events = self._http.events("POST", "/chat/completions", wire.chat_body(request), call=unowned, read=reader.read)
        Kept.responses.append(events)
        async for chunk in events:
            if chunk is not None:
                yield chunk
        yield reader.last()


@breaks("closing it must stop the work", "test_cancelled_call_is_seen_at_the_server")
class IgnoresCancel(Wire):
    needs_event_loop = True

    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        unowned = replace(request, call=replace(request.call, opened={}))
        chunks = super().chat(unowned)
        Kept.responses.append(chunks)
        while (chunk := await asyncio.shield(asyncio.ensure_future(anext(chunks, None)))) is not None:
            yield chunk


@breaks("Only the last chunk has a `finish_reason`", "test_only_the_last_chunk_has_a_reason")
class ReasonInEach(EchoConnection):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        yield Chunk(text="one", finish_reason="stop")
        yield Chunk(text="two", finish_reason="stop")


@breaks("Only the last chunk has a `finish_reason`", "test_only_the_last_chunk_has_a_reason")
class OneMore(EchoConnection):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        yield Chunk(text="one", finish_reason="stop")
        yield Chunk(usage=Usage(input_tokens=1))


@breaks("an end without one becomes `StreamInterrupted`", "test_chat_gives_text")
class NoReason(EchoConnection):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        yield Chunk(text="one")


@breaks("an end without one becomes `StreamInterrupted`", "test_cut_reply_is_interrupted")
class InventsReason(Wire):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        with suppress(StreamInterrupted):
            async for chunk in super().chat(request):
                yield chunk
        yield Chunk(finish_reason="stop")


@breaks("the core joins the chunks into a whole reply", "test_reply_equals_its_stream")
class OtherWhole(EchoConnection):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        yield Chunk(text="whole" if request.call.whole else "stream", finish_reason="stop")


@breaks("the core joins the chunks into a whole reply", "test_stream_gives_chunks")
class TextTwice(EchoConnection):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        yield Chunk(text="Hi")
        yield "Hi"  # type: ignore[misc]
        yield Chunk(finish_reason="stop")


@breaks("Retry only what is safe", "test_refusal_is_not_repeated")
class RepeatsRefusals(Wire):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        for _ in range(2):
            with suppress(GraftageError):
                async for chunk in super().chat(request):
                    yield chunk
        async for chunk in super().chat(request):
            yield chunk


@breaks("only before the first chunk", "test_begun_reply_is_not_asked_for_again")
class StartsAgain(Wire):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        try:
            async for chunk in super().chat(request):
                yield chunk
        except StreamInterrupted:
            async for chunk in super().chat(request):
                yield chunk


class Patient(Wire):
    """Waits as long as it likes."""

    limits: ClassVar[Mapping[str, Any]] = {}

    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        request = replace(request, call=replace(request.call, **self.limits))
        async for chunk in super().chat(request):
            yield chunk


@breaks("Keep `request.call.deadline`", "test_deadline_of_a_call_is_kept")
class NoDeadline(Patient):
    limits: ClassVar[Mapping[str, Any]] = {"deadline": Call().deadline, "timeouts": Timeouts()}


@breaks("and `request.call.timeouts`", "test_silent_server_times_out")
class NoFirstToken(Patient):
    limits: ClassVar[Mapping[str, Any]] = {"timeouts": Timeouts()}


@breaks("and `request.call.timeouts`", "test_stalled_stream_times_out")
class NoIdle(Patient):
    limits: ClassVar[Mapping[str, Any]] = {"timeouts": Timeouts()}


@breaks("ProviderError: the class that fits best.", "test_status_has_its_class")
class OneClass(Wire):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        try:
            async for chunk in super().chat(request):
                yield chunk
        except GraftageError as error:
            raise InferenceFailed("It failed.") from error


@breaks("ProviderError: the class that fits best.", "test_wait_of_a_busy_server_is_kept")
class ForgetsWait(Wire):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        try:
            async for chunk in super().chat(request):
                yield chunk
        except Overloaded as error:
            raise Overloaded("Busy.") from error


@breaks("the core wraps any other error", "test_errors_are_those_of_the_contract")
class TrustsShape(Wire):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        answer = await self._http.json("POST", "/chat/completions", wire.chat_body(request), call=request.call)
        yield Chunk(text=answer["choices"][0]["text"], finish_reason="stop")


@breaks("ProviderError: the class that fits best.", "test_other_answers_are_protocol_errors")
class SwallowsNonsense(Wire):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        with suppress(ProtocolError):
            async for chunk in super().chat(request):
                yield chunk
            return
        yield Chunk(text="What?", finish_reason="stop")


@breaks("ProviderError: the class that fits best.", "test_dead_port_fails_within_a_second")
class KeepsKnocking(Wire):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        while time.monotonic() < request.call.deadline:
            with suppress(GraftageError):
                async for chunk in super().chat(request):
                    yield chunk
            await request.call.sleep(0.3)
        raise request.call.timed_out()


@breaks("Called for each chat", "test_conversation_reaches_the_server")
class LastMessageOnly(Wire):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        async for chunk in super().chat(replace(request, messages=request.messages[-1:])):
            yield chunk


# --- health, close, generate -----------------------------------------------------------------------------------------


@breaks("Check the levels up to `request.level` and no further.", "test_health_stops_at_its_level")
class ChecksAll(EchoConnection):
    @hookimpl
    async def health(self, request: Any) -> Health:
        return Health(level=request.level, reachable=True, api=True, model_present=True, model_loaded=False)


@breaks("Check the levels up to `request.level` and no further.", "test_health_lets_the_model_rest")
class AlwaysChats(Wire):
    @hookimpl
    async def health(self, request: Any) -> Health:
        body = {"model": request.model, "messages": [], "stream": True}
        with suppress(GraftageError):
            await self._http.json("POST", "/chat/completions", body, call=request.call)
        return Health(level=request.level, reachable=True, api=True)


@breaks("Return a failure in `Health.error` instead of raising it.", "test_health_reports_a_dead_server")
class RaisesIllness(Wire):
    @hookimpl
    async def health(self, request: Any) -> Health:
        await self._http.json("GET", "/models", call=request.call)
        return Health(level=request.level, reachable=True, api=True)


@breaks("Return a failure in `Health.error` instead of raising it.", "test_health_misses_an_unknown_model")
class NeverMisses(EchoConnection):
    @hookimpl
    async def health(self, request: Any) -> Health:
        return Health(level=request.level, reachable=True, api=True, model_present=True)


@breaks("and a chat of one token", "test_health_sees_a_model_answer")
class NeverAnswers(EchoConnection):
    @hookimpl
    async def health(self, request: Any) -> Health:
        return Health(level=request.level, reachable=True, api=True)


@breaks("Do not retry.", "test_health_asks_once")
class AsksAgain(Wire):
    @hookimpl
    async def health(self, request: Any) -> Health:
        for _ in range(3):
            try:
                await self._http.json("GET", "/models", call=request.call)
            except GraftageError as error:
                found = request.result({}, error)
        return found  # type: ignore[no-any-return]


@breaks("A second call must do nothing.", "test_closing_twice_does_nothing")
class ClosesOnce(EchoConnection):
    @hookimpl
    async def close(self, request: Any) -> None:
        if self.closed:
            raise InferenceFailed("It is closed.")
        self.closed = True


@breaks("The rules of `chat` apply.", "test_generate_follows_the_rules_of_chat")
class GeneratesMore(EchoConnection):
    @hookimpl
    async def generate(self, request: Any) -> AsyncIterator[Chunk]:
        yield Chunk(text="one", finish_reason="stop")
        yield Chunk(text="two", finish_reason="stop")


# --- embed, count_tokens, rerank, capabilities -----------------------------------------------------------------------


@breaks("Return one vector for each input, in order.", "test_vectors_follow_their_inputs")
class FewerVectors(EchoConnection):
    @hookimpl
    async def embed(self, request: Any) -> Embeddings:
        return Embeddings(vectors=[(1.0, 0.0)] * (len(request.inputs) - 1))


@breaks("Return one vector for each input, in order.", "test_vectors_follow_their_inputs")
class ReversedVectors(EchoConnection):
    @hookimpl
    async def embed(self, request: Any) -> Embeddings:
        return self._embed("embed", replace(request, inputs=request.inputs[::-1]))


@breaks("Never estimate.", "test_tokens_are_counted")
class Estimates(EchoConnection):
    @hookimpl
    async def count_tokens(self, request: Any) -> int:
        return sum(len(each.content) for each in request.messages) // 3


@breaks("the server counts only the part that fits", "test_overlong_conversation_is_not_counted")
class CountsPart(EchoConnection):
    @hookimpl
    async def count_tokens(self, request: Any) -> int:
        return min(self._count_tokens("count_tokens", request), (request.context_window or 8192) + 900)


@breaks("Return each document once", "test_each_document_is_ranked_once")
class RanksTwice(EchoConnection):
    @hookimpl
    async def rerank(self, request: Any) -> Ranking:
        found = self._rerank("rerank", request)
        return replace(found, results=(*found.results, found.results[0]))


@breaks("Called often; return without I/O.", "test_capabilities_are_known_without_a_server")
class AsksForFeatures(EchoConnection):
    @hookimpl
    def capabilities(self) -> Capabilities:
        knock()
        return Capabilities(features=frozenset())


@breaks("List what the provider can do.", "test_capabilities_are_known_without_a_server")
class UnknownFeature(EchoConnection):
    @hookimpl
    def capabilities(self) -> Capabilities:
        return Capabilities(features=frozenset({"tool"}))


@breaks("The core adds a feature for each implemented hook.", "test_declared_operations_have_hooks")
class DeclaresTooMuch(Wire):
    @hookimpl
    def capabilities(self) -> Capabilities:
        return Capabilities(features=frozenset({"rerank"}))


@breaks("List what the provider can do.", "test_declared_options_reach_the_server")
class DropsOptions(Wire):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        async for chunk in super().chat(replace(request, options={})):
            yield chunk


@breaks("List what the provider can do.", "test_declared_parameters_reach_the_server")
class DropsParameters(Wire):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        async for chunk in super().chat(replace(request, max_tokens=None)):
            yield chunk


@breaks("List what the provider can do.", "test_ignored_parameter_is_a_warning")
class SaysNothing(EchoConnection):
    @hookimpl
    def capabilities(self) -> Capabilities:
        return Capabilities(features=frozenset())


@breaks("List what the provider can do.", "test_tools_reach_the_server")
class DropsTools(Wire):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        async for chunk in super().chat(replace(request, tools=())):
            yield chunk


@breaks("List what the provider can do.", "test_tool_choice_reaches_the_server")
class DropsToolChoice(Wire):
    @hookimpl
    def capabilities(self) -> Capabilities:
        return Capabilities(features=frozenset({"tools", "tool_choice"}))


@breaks("List what the provider can do.", "test_images_reach_the_server")
class DropsImages(Wire):
    @hookimpl
    def capabilities(self) -> Capabilities:
        return Capabilities(features=frozenset({"images"}))

    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        blind = tuple(replace(each, images=()) for each in request.messages)
        async for chunk in super().chat(replace(request, messages=blind)):
            yield chunk


@breaks("List what the provider can do.", "test_thinking_is_asked_for")
class DropsThinking(Wire):
    @hookimpl
    def capabilities(self) -> Capabilities:
        return Capabilities(features=frozenset({"thinking"}))


@breaks("List what the provider can do.", "test_format_gives_data")
class DropsFormat(EchoConnection):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        yield Chunk(text="It is Paris.", finish_reason="stop")


@breaks("Called for each chat", "test_unknown_usage_is_none")
class CountsNothing(EchoConnection):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        yield Chunk(text="Hi", finish_reason="stop", usage=Usage(input_tokens=0, output_tokens=0))


# --- Models and adapters ---------------------------------------------------------------------------------------------


@breaks("the models that can be used without a download", "test_models_are_listed")
class ListsOthers(EchoConnection):
    @hookimpl
    async def list_models(self, request: Any) -> tuple[ModelInfo, ...]:
        return (ModelInfo(name="somewhere:7b"),)


@breaks("ModelNotFound: the server does not have it.", "test_model_is_described")
class DescribesAnything(EchoConnection):
    @hookimpl
    async def show_model(self, request: Any) -> ModelInfo:
        return ModelInfo(name=request.model)


@breaks("ModelNotFound: the server does not have it.", "test_unknown_model_is_not_found")
class AnyModel(EchoConnection):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        yield Chunk(text="Hi", finish_reason="stop")


@breaks("with their measured sizes", "test_model_is_loaded_and_unloaded")
class SizeZero(EchoConnection):
    @hookimpl
    async def loaded_models(self, request: Any) -> tuple[LoadedModel, ...]:
        return tuple(replace(each, size=0) for each in self._loaded_models("loaded_models", request))


@breaks("Called to load a model", "test_model_is_loaded_and_unloaded")
class LoadsNothing(EchoConnection):
    @hookimpl
    async def load_model(self, request: Any) -> None:
        pass


@breaks("Do nothing if it is not loaded.", "test_model_is_loaded_and_unloaded")
class UnloadsOnce(EchoConnection):
    @hookimpl
    async def unload_model(self, request: Any) -> None:
        if request.model not in self._echo.loaded:
            raise ModelNotFound("It is not loaded.")
        self._echo.loaded.clear()


@breaks("Return an iterator whose last item has the status `success`", "test_pull_ends_with_success")
class NoSuccess(EchoConnection):
    @hookimpl
    async def pull_model(self, request: Any) -> AsyncIterator[PullProgress]:
        yield PullProgress(status="pulling")


@breaks("Return an iterator whose last item has the status `success`", "test_pull_ends_with_success")
class SuccessTwice(EchoConnection):
    @hookimpl
    async def pull_model(self, request: Any) -> AsyncIterator[PullProgress]:
        yield PullProgress(status="success")
        yield PullProgress(status="success")


@breaks("ModelNotFound: the server does not have it.", "test_unknown_model_cannot_be_deleted")
class DeletesAnything(EchoConnection):
    @hookimpl
    async def delete_model(self, request: Any) -> None:
        pass


@breaks("Keep what another model needs.", "test_unknown_model_cannot_be_deleted")
class DeletesOthers(EchoConnection):
    @hookimpl
    async def delete_model(self, request: Any) -> None:
        self._echo.models.clear()
        raise ModelNotFound("It is not here.")


@breaks("begin its name with `graftage-`", "test_adapter_is_loaded_and_freed")
class OtherName(EchoConnection):
    pass  # Echo itself, whose names can be read


@breaks("Return the model to request, or the adapter's slot.", "test_adapter_is_loaded_and_freed")
class BaseModelOnly(Local):
    @hookimpl
    async def load_adapter(self, request: Any) -> LoadedAdapter:
        return LoadedAdapter(name=request.adapter.name, digest=request.adapter.digest, model=request.model)


@breaks("apply each of `request.adapter.weights` and no other adapter", "test_weights_change_replies")
class IgnoresWeights(EchoConnection):
    def __init__(self, echo: Echo) -> None:
        super().__init__(echo)
        echo.adapter_weights = True

    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        if request.adapter is not None:
            request = replace(request, adapter=request.adapter.weights[0][0])
        async for chunk in super().chat(request):
            yield chunk


@breaks("Delete nothing.", "test_adapter_is_loaded_and_freed")
class UnloadDeletes(Local):
    @hookimpl
    async def unload_adapter(self, request: Any) -> None:
        del self._echo.models[request.adapter.model]


@breaks("Return the models that were deleted, or would be.", "test_pruning_keeps_other_models")
class PrunesAtOnce(Local):
    @hookimpl
    async def prune_adapters(self, request: Any) -> tuple[ModelInfo, ...]:
        return self._prune_adapters("prune_adapters", replace(request, dry_run=False))


@breaks("Touch only models that this provider provably created.", "test_pruning_keeps_other_models")
class PrunesOthers(Local):
    @hookimpl
    async def prune_adapters(self, request: Any) -> tuple[ModelInfo, ...]:
        self._echo.derived.add("echo:latest")
        return self._prune_adapters("prune_adapters", request)


@breaks("sync or async as the Graftage client is", "test_native_client_has_the_colour_of_ours")
class OneColour(EchoConnection):
    @hookimpl
    async def native(self, request: Any) -> object:
        return object()


# --- The toolkit, and safety -----------------------------------------------------------------------------------------


@breaks("builds a custom transport that replaces the network", "test_nothing_goes_past_the_transport")
class OwnSocket(Wire):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        knock()
        async for chunk in super().chat(request):
            yield chunk


@breaks("in addition to `api_key` as a bearer token", "test_key_stays_out_of_errors_and_logs")
class LogsKey(Wire):
    def __init__(self, request: Any) -> None:
        super().__init__(request)
        key = request.settings.api_key
        logging.getLogger("wire").debug("connecting with %s", key and key.get_secret_value())


@breaks("has a password that would be sent without encryption", "test_key_is_not_sent_in_clear")
class KeyInBody(Wire):
    def __init__(self, request: Any) -> None:
        super().__init__(request)
        key = request.settings.api_key
        self._http = request.http(f"{request.settings.host}/{key.get_secret_value() if key else ''}")


@breaks("closes the toolkit's HTTP clients even without this hook", "test_closed_client_ends_its_calls")
class OutlivesClient(Wire):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        while time.monotonic() < request.call.deadline:
            with suppress(GraftageError):
                async for chunk in super().chat(request):
                    yield chunk
                return
            await request.call.sleep(0.3)


@breaks("Called for each chat", "test_tool_calls_can_be_read")
class ToolsWithoutText(EchoConnection):
    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        yield Chunk(finish_reason="stop")
