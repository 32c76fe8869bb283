"""The echo provider plays its script."""

from __future__ import annotations

import asyncio
import gc
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from graftage._engine.awaiting import AwaitingIO
from graftage._engine.driving import drive
from graftage.calls import (
    Call,
    ChatRequest,
    CloseRequest,
    EmbedRequest,
    GenerateRequest,
    HealthRequest,
    LoadAdapterRequest,
    LoadModelRequest,
    ModelRequest,
    ModelsRequest,
    UnloadAdapterRequest,
)
from graftage.exceptions import ConnectionFailed, ModelNotFound, ProviderTimeout, StreamInterrupted
from graftage.hookspecs import CONNECTION_SPECS, PROVIDER_SPECS, ConnectRequest
from graftage.testing import Echo, Pause
from graftage.types import Chunk, Message, ModelInfo, Reply, Timeouts, ToolCall, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from suite import Both

CALL = Call()
HOOKS = [name for spec in CONNECTION_SPECS for name in vars(spec) if hasattr(vars(spec)[name], "graftage_spec")]


# --- Echo ------------------------------------------------------------------------------------------------------------


def joined(echo: Echo) -> Any:
    return echo.connect(ConnectRequest(name="echo", settings=None))  # type: ignore[arg-type] # it has no settings


def chat_request(*contents: str, call: Call = CALL, model: str = "echo", **more: Any) -> ChatRequest:
    messages = tuple(Message(role="user", content=each) for each in contents or ("good  morning\nworld",))
    return ChatRequest(call=call, model=model, messages=messages, **more)


async def collect(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


def waiting(mode: str, request: Any) -> Any:
    """Return a request that waits as the client of a mode does."""
    return replace(request, call=replace(request.call, waiting=AwaitingIO())) if mode == "async" else request


def run(mode: str, work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine as the client of a mode does."""
    return drive(work) if mode == "sync" else asyncio.run(work)


def ask(mode: str, connection: Any, hook: str, request: Any) -> Any:
    """Return the whole result of a hook in a mode."""
    answer = getattr(connection, hook)(waiting(mode, request))
    return run(mode, collect(answer) if hasattr(answer, "__aiter__") else answer)


modes = pytest.mark.parametrize("mode", ["sync", "async"])


class Scion:
    name, digest, scale, verdict, served_as = "botany", "sha256:ab", 2.0, None, None


class TestEcho:
    def test_implements_every_hook(self) -> None:
        hooks = joined(Echo())
        missing = [name for name in HOOKS if not hasattr(getattr(hooks, name, None), "graftage_impl")]
        assert missing == ["native"]  # It has no server.

    def test_registers_with_pluggy(self) -> None:
        import pluggy

        manager = pluggy.PluginManager("graftage")
        for spec in PROVIDER_SPECS + CONNECTION_SPECS:
            manager.add_hookspecs(spec)
        echo = Echo()
        manager.register(echo)
        manager.register(joined(echo))
        manager.check_pending()
        assert (
            "".join(chunk.text for chunk in drive(collect(manager.hook.chat(request=chat_request("Hi there")))))
            == "Hi there"
        )

    @modes
    def test_chat_echoes_and_counts_words(self, mode: str) -> None:
        chunks = ask(mode, joined(Echo()), "chat", chat_request("not this", "good  morning\nworld "))
        assert [chunk.text for chunk in chunks] == ["good  ", "morning\n", "world ", ""]
        assert [chunk.finish_reason for chunk in chunks] == [None, None, None, "stop"]
        assert (chunks[-1].usage.input_tokens, chunks[-1].usage.output_tokens) == (5, 3)

    @modes
    def test_max_tokens_cuts_the_reply(self, mode: str) -> None:
        chunks = ask(mode, joined(Echo()), "chat", chat_request("one two three", max_tokens=2))
        assert "".join(chunk.text for chunk in chunks) == "one two "
        assert chunks[-1].finish_reason == "length"

    @modes
    def test_generate_echoes_its_prompt(self, mode: str) -> None:
        chunks = ask(mode, joined(Echo()), "generate", GenerateRequest(call=CALL, model="m", prompt="a b"))
        assert "".join(chunk.text for chunk in chunks) == "a b"

    @modes
    def test_script_has_one_step_per_call(self, mode: str) -> None:
        chunks = [Chunk(text="x"), Chunk(finish_reason="stop")]
        hooks = joined(Echo(["Hello!", chunks, lambda request: request.messages[0].content.upper()]))
        answers = [ask(mode, hooks, "chat", chat_request("hi")) for _ in range(4)]
        assert ["".join(chunk.text for chunk in answer) for answer in answers] == ["Hello!", "x", "HI", "hi"]
        assert answers[1] == chunks

    def test_reply_as_a_step_is_played(self, both: Both) -> None:
        call = ToolCall(name="look", arguments={"city": "Rome"}, id="1")
        whole = Reply(text="I look.", thinking="Hm", tool_calls=(call,), usage=Usage(input_tokens=9))
        with both.connect(Echo([whole, Reply(text="cut", finish_reason="length")]), model="m") as llm:
            first, second = llm.chat("Weather?"), llm.chat("And?")
        assert (first.text, first.thinking, first.tool_calls) == ("I look.", "Hm", (call,))
        assert (first.finish_reason, first.usage.input_tokens) == ("tool_calls", 9)
        assert (second.text, second.finish_reason, second.usage.output_tokens) == ("cut", "length", 1)

    def test_tool_call_as_a_step_is_called(self, both: Both) -> None:
        call = ToolCall(name="look", arguments={}, id="1")
        with both.connect(Echo([call, "Sunny."]), model="m") as llm:
            first = llm.chat("Weather?")
            result = {"role": "tool", "content": "sun", "tool_call_id": "1"}
            assert (first.tool_calls, first.text) == ((call,), "")
            assert llm.chat(["Weather?", first, result]).text == "Sunny."

    @modes
    def test_exception_as_a_step_is_raised(self, mode: str) -> None:
        error = ConnectionFailed("gone")
        with pytest.raises(ConnectionFailed) as caught:
            ask(mode, joined(Echo([error])), "chat", chat_request())
        assert caught.value is error

    @modes
    def test_exception_among_chunks_is_raised_there(self, mode: str) -> None:
        hooks = joined(Echo([[Chunk(text="Hel"), StreamInterrupted("cut"), Chunk(text="lo")]]))
        seen: list[str] = []

        async def read() -> None:
            async for chunk in hooks.chat(chat_request()):
                seen.append(chunk.text)  # noqa: PERF401 # keeps the items before an error

        with pytest.raises(StreamInterrupted):
            run(mode, read())
        assert seen == ["Hel"]

    def test_pause_holds_a_stream_open(self) -> None:
        pause = Pause()
        echo = Echo([[Chunk(text="a"), pause, Chunk(finish_reason="stop")]])
        answer: list[Chunk] = []
        thread = threading.Thread(target=lambda: answer.extend(drive(collect(joined(echo).chat(chat_request())))))
        thread.start()
        assert pause.reached.wait(10)
        assert (echo.running, thread.is_alive()) == (1, True)
        pause.release()
        thread.join(10)
        assert ([chunk.text for chunk in answer], echo.running) == (["a", ""], 0)

    def test_paused_stream_can_be_cancelled(self) -> None:
        pause = Pause()
        echo = Echo([[pause]])

        async def cancel() -> None:
            task = asyncio.create_task(collect(joined(echo).chat(waiting("async", chat_request()))))
            assert await asyncio.to_thread(pause.reached.wait, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(cancel())
        assert echo.running == 0

    @modes
    def test_pause_ends_at_the_timeout(self, mode: str) -> None:
        hooks = joined(Echo([[Pause()], [Chunk(text="a"), Pause()], [Pause()]]))
        phases = []
        for call in (
            Call(timeouts=Timeouts(first_token=0.01)),
            Call(timeouts=Timeouts(idle=0.01)),
            Call(deadline=0.0),
        ):
            with pytest.raises(ProviderTimeout) as caught:
                ask(mode, hooks, "chat", chat_request(call=call))
            phases.append(caught.value.phase)
        assert phases == ["first_token", "idle", "total"]

    def test_close_ends_a_pause(self) -> None:
        pause = Pause()
        echo = Echo([[Chunk(text="a"), pause]])
        hooks = joined(echo)
        stream = hooks.chat(chat_request())
        drive(anext(stream))
        drive(hooks.close(CloseRequest()))
        with pytest.raises(StreamInterrupted):
            drive(anext(stream))
        assert echo.closed

    @modes
    def test_close_may_be_repeated(self, mode: str) -> None:
        echo = Echo()
        hooks = joined(echo)
        assert not echo.closed
        ask(mode, hooks, "close", CloseRequest())
        ask(mode, hooks, "close", CloseRequest())
        assert echo.closed

    @modes
    def test_vectors_depend_only_on_the_text(self, mode: str) -> None:
        request = EmbedRequest(call=CALL, model="m", inputs=("a b", "c", "a b"))
        first, second = (ask(mode, joined(Echo()), "embed", request).vectors for _ in range(2))
        assert first == second
        assert first[0] == first[2] != first[1]
        assert sum(number**2 for number in first[0]) == pytest.approx(1)
        longer = EmbedRequest(call=CALL, model="m", inputs=("a",), dimensions=3)
        assert len(ask(mode, joined(Echo()), "embed", longer).vectors[0]) == 3

    @modes
    def test_health_stops_at_the_level(self, mode: str) -> None:
        hooks = joined(Echo(strict=True))
        api = ask(mode, hooks, "health", HealthRequest(call=CALL, level="api"))
        assert (api.ok, api.api, api.model_present, api.answers) == (True, True, None, None)
        missing = ask(mode, hooks, "health", HealthRequest(call=CALL, level="model_present", model="other"))
        assert not missing.ok
        assert ask(mode, hooks, "health", HealthRequest(call=CALL, level="model_present", model="echo")).ok

    @modes
    def test_errors_by_operation(self, mode: str) -> None:
        error = ConnectionFailed("down")
        hooks = joined(Echo(errors={"health": error, "embed": error}))
        health = ask(mode, hooks, "health", HealthRequest(call=CALL))
        assert (health.reachable, health.error) == (False, error)
        with pytest.raises(ConnectionFailed):
            ask(mode, hooks, "embed", EmbedRequest(call=CALL, model="m", inputs=("a",)))

    @modes
    def test_strict_one_suggests_its_models(self, mode: str) -> None:
        hooks = joined(Echo(models=("llama3.2", "qwen:0.5b"), strict=True))
        with pytest.raises(ModelNotFound) as caught:
            ask(mode, hooks, "chat", chat_request(model="lama3.2"))
        assert caught.value.suggestions == ("llama3.2:latest",)
        assert (caught.value.model, caught.value.operation) == ("lama3.2", "chat")

    @modes
    def test_models_are_listed_shown_and_pulled(self, mode: str) -> None:
        own = ModelInfo(name="own:1b", size=7)
        hooks = joined(Echo(models=("echo", own), strict=True))
        names = [info.name for info in ask(mode, hooks, "list_models", ModelsRequest(call=CALL))]
        assert names == ["echo:latest", "own:1b"]
        assert ask(mode, hooks, "show_model", ModelRequest(call=CALL, model="own:1b")) is own
        steps = ask(mode, hooks, "pull_model", ModelRequest(call=CALL, model="new"))
        assert steps[-1].status == "success"
        assert ask(mode, hooks, "show_model", ModelRequest(call=CALL, model="new")).name == "new:latest"

    @modes
    def test_models_are_loaded_and_unloaded(self, mode: str) -> None:
        hooks = joined(Echo())
        ask(mode, hooks, "load_model", LoadModelRequest(call=CALL, model="echo", context_window=2048))
        (loaded,) = ask(mode, hooks, "loaded_models", ModelsRequest(call=CALL))
        assert (loaded.name, loaded.context_window) == ("echo:latest", 2048)
        ask(mode, hooks, "unload_model", ModelRequest(call=CALL, model="echo"))
        assert ask(mode, hooks, "loaded_models", ModelsRequest(call=CALL)) == ()

    @modes
    def test_adapter_becomes_its_own_model(self, mode: str) -> None:
        hooks = joined(Echo(strict=True))
        request = LoadAdapterRequest(call=CALL, adapter=Scion(), model="echo:latest")  # type: ignore[arg-type]
        adapter = ask(mode, hooks, "load_adapter", request)
        assert (adapter.name, adapter.digest, adapter.model) == ("botany", "sha256:ab", "echo:latest+botany")
        chunks = ask(mode, hooks, "chat", chat_request("hi", model="echo:latest+botany", adapter=adapter))
        assert chunks[-1].model == "echo:latest+botany"
        ask(mode, hooks, "unload_adapter", UnloadAdapterRequest(call=CALL, adapter=adapter))
        names = [model.name for model in ask(mode, hooks, "loaded_models", ModelsRequest(call=CALL))]
        assert "echo:latest+botany" not in names

    def test_without_omits_hooks(self) -> None:
        hooks = joined(Echo(without={"embed", "health"}))
        assert [name for name in ("embed", "health") if hasattr(hooks, name)] == []
        features = hooks.capabilities().features
        assert "embed" not in features
        assert {"chat", "generate", "tools"} <= features
        assert hasattr(joined(Echo()), "embed")

    def test_without_refuses_unknown_hooks(self) -> None:
        with pytest.raises(ValueError, match="embedd"):
            Echo(without={"embedd"})

    @modes
    def test_calls_are_recorded_by_hook(self, mode: str) -> None:
        echo = Echo()
        hooks = joined(echo)
        request = waiting(mode, chat_request())
        ask(mode, hooks, "chat", request)
        ask(mode, hooks, "close", CloseRequest())
        assert [hook for hook, _ in echo.calls] == ["connect", "chat", "close"]
        assert [each.messages for each in echo.requests] == [request.messages]

    def test_threads_share_one_script(self) -> None:
        echo = Echo([str(number) for number in range(200)])
        hooks = joined(echo)
        answers: list[str] = []

        def work() -> None:
            for _ in range(25):
                answers.append(drive(anext(hooks.chat(chat_request()))).text)  # noqa: PERF401 # not read to the end

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gc.collect()
        assert sorted(map(int, answers)) == list(range(200))
        assert echo.running == 0
