"""The test kit: Echo, cassettes, the pytest plugin, and the fake server."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import os
import socket
import threading
import urllib.parse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

import graftage
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
from graftage.http import Clock, Request
from graftage.http._asynchronous import AsyncNetwork
from graftage.http._blocking import BlockingNetwork
from graftage.testing import Cassette, CassetteError, CassetteMiss, Echo, Pause
from graftage.types import Chunk, Message, ModelInfo, Timeouts
from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator

    from graftage.http import Response

pytest_plugins = ["pytester"]

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


# --- Cassettes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake() -> Iterator[FakeOllama]:
    with FakeOllama() as server:
        yield server


Exchange = tuple[int, list[bytes]]


NETWORKS: dict[str, Any] = {"sync": BlockingNetwork, "async": AsyncNetwork}
JSON = (("content-type", "application/json"),)


async def pieces_of(response: Response) -> AsyncIterator[bytes]:
    while piece := await response.read():
        yield piece


def exchange(
    mode: str,
    cassette: Cassette,
    url: str,
    method: str = "POST",
    *,
    body: Any = b"",
    headers: dict[str, str] | None = None,
    leave_after: int | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> Exchange:
    """Return the status and the pieces of the body, through a cassette.

    Args:
        body: bytes as they are, anything else as JSON.
        leave_after: how many pieces are read; all by default.
        meanwhile: is called after the first piece.
    """
    given = tuple((name.lower(), value) for name, value in (headers or {}).items())
    if not isinstance(body, bytes):
        body, given = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(), given + JSON
    request = Request(method=method, url=url, headers=given, body=body)

    async def send() -> Exchange:
        transport = cassette.wrap(NETWORKS[mode])
        got: list[bytes] = []
        try:
            response = await transport.send(request, Clock(CALL))
            async for piece in pieces_of(response):
                got.append(piece)
                meanwhile()
                if len(got) == leave_after:
                    break
            await response.close()
        finally:
            await transport.close()
        return response.status, got

    return run(mode, send())  # type: ignore[no-any-return]


def recorded(
    path: Path, fake: FakeOllama, *answers: Answer, mode: str = "sync", query: str = "", **more: Any
) -> Exchange:
    fake.script("/api/chat", *answers)
    with Cassette(path, mode="record", server="Ollama 0.9.3") as cassette:
        return exchange(mode, cassette, f"{fake.url}/api/chat{query}", **more)


ELSEWHERE = "http://nowhere.invalid:1"
STREAM = Answer([{"n": 1}, {"n": 2, "text": "grüß 🌱"}, b'{"n":', b"3}\n"])


def talk(transport: Cassette, host: str) -> list[str]:
    """Call a tool twice in a conversation with a server without call ids. Return the generated ids."""
    with graftage.connect("ollama", model="m", host=host, transport=transport) as llm:
        first = llm.chat("Hi")
        result = {"role": "tool", "content": "1", "tool_call_id": first.tool_calls[0].id}
        second = llm.chat(["Hi", first, result])
    return [each.tool_calls[0].id for each in (first, second)]


class TestReplay:
    @modes
    @pytest.mark.parametrize("by", ["sync", "async"])
    def test_keeps_the_pieces_of_the_recording(self, tmp_path: Path, fake: FakeOllama, mode: str, by: str) -> None:
        path = tmp_path / "one" / "story.yaml"
        live = recorded(path, fake, STREAM, mode=by, body={"model": "m"})
        with Cassette(path) as cassette:
            again = exchange(mode, cassette, f"{ELSEWHERE}/api/chat", body={"model": "m"})
        assert again == live
        assert b"".join(live[1]) == '{"n":1}\n{"n":2,"text":"grüß 🌱"}\n{"n":3}\n'.encode()
        assert (cassette.unplayed, cassette.misses, cassette.server) == ((), [], "Ollama 0.9.3")

    def test_generated_call_ids_may_differ(self, tmp_path: Path, fake: FakeOllama) -> None:
        call = {"function": {"name": "f", "arguments": {}}}
        line = {"message": {"content": "", "tool_calls": [call]}, "done": True, "done_reason": "stop"}
        fake.script("/api/chat", *[Answer([line])] * 2)
        path = tmp_path / "one.yaml"
        with Cassette(path, mode="record") as cassette:
            ids = talk(cassette, fake.url)
        with Cassette(path) as cassette:
            assert len({*ids, *talk(cassette, fake.url)}) == 4
        assert cassette.unplayed == ()

    @pytest.mark.parametrize("other", [{"tool_call_id": "a"}, {"tool_calls": []}, {"content": "x"}], ids=str)
    def test_only_call_ids_may_differ(self, tmp_path: Path, fake: FakeOllama, other: Any) -> None:
        def asked(call_id: str, name: str) -> dict[str, Any]:
            call = {"id": call_id, "function": {"name": name}}
            return {"messages": [{"tool_calls": [call]}, {"role": "tool", "tool_call_id": call_id}]}

        path = tmp_path / "one.yaml"
        live = recorded(path, fake, STREAM, body=asked("a", "f"))
        with Cassette(path) as cassette:
            for body in asked("a", "g"), {"messages": [*asked("a", "f")["messages"], other]}:
                with pytest.raises(CassetteMiss):
                    exchange("sync", cassette, f"{ELSEWHERE}/api/chat", body=body)
            assert exchange("sync", cassette, f"{ELSEWHERE}/api/chat", body=asked("b", "f")) == live


class TestRecording:
    @modes
    def test_passes_chunks_on(self, tmp_path: Path, fake: FakeOllama, mode: str) -> None:
        gate = threading.Event()
        # Without the first piece, the second never comes.
        live = recorded(tmp_path / "a.yaml", fake, Answer([b"first", gate, b"second"]), mode=mode, meanwhile=gate.set)
        assert live == (200, [b"first", b"second"])

    @modes
    @pytest.mark.parametrize("ending", ["close", "reset"])
    def test_broken_stream_breaks_again(self, tmp_path: Path, fake: FakeOllama, mode: str, ending: Any) -> None:
        path = tmp_path / "a.yaml"
        gate = threading.Event()
        fake.script("/api/chat", Answer([{"n": 1}, gate], ending=ending))
        with Cassette(path, mode="record") as cassette, pytest.raises(StreamInterrupted):
            exchange(mode, cassette, f"{fake.url}/api/chat", meanwhile=gate.set)
        assert "cut_short: true" in path.read_text()
        with pytest.raises(StreamInterrupted):
            exchange(mode, Cassette(path), f"{ELSEWHERE}/api/chat")
        assert exchange(mode, Cassette(path), f"{ELSEWHERE}/api/chat", leave_after=1) == (200, [b'{"n":1}\n'])

    @modes
    def test_early_leave_is_marked_as_cut(self, tmp_path: Path, fake: FakeOllama, mode: str) -> None:
        path = tmp_path / "a.yaml"
        recorded(path, fake, Answer([{"n": 1}], ending="stall"), mode=mode, leave_after=1)
        content = yaml.safe_load(path.read_text())
        response = content["interactions"][0]["response"]
        assert (response["body"]["string"], response["cut_short"]) == ('{"n":1}\n', True)


class TestFileFormat:
    def test_reads_well_in_a_diff(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        headers = {"authorization": "Bearer secret-of-mine", "cookie": "a=b"}
        _, pieces = recorded(path, fake, STREAM, headers=headers, body={"q": "é" * 90})
        assert (
            path.read_text(encoding="utf-8")
            == """\
version: 1
interactions:
- request:
    method: POST
    uri: http://localhost:11434/api/chat
    headers:
      content-type: [application/json]
    body: '{"q":"%s"}'
  response:
    server: Ollama 0.9.3
    status:
      code: 200
      message: OK
    headers:
      content-type: [application/x-ndjson]
    body:
      string: |
        {"n":1}
        {"n":2,"text":"grüß 🌱"}
        {"n":3}
    chunk_lengths: PIECES
""".replace("%s", "é" * 90).replace("PIECES", str([*map(len, pieces)]))
        )

    @given(body=st.binary() | st.text().map(str.encode), question=st.text())
    def test_keeps_any_body(self, body: bytes, question: str) -> None:
        from graftage.testing import cassettes

        one = cassettes._Interaction("POST", "/x?a=%20", {}, question.encode(), 200, "OK", {}, [body] if body else [])
        text = cassettes._to_yaml([one], None)
        content = yaml.load(text.encode(), Loader=cassettes._LOADER)
        assert cassettes._from_plain(0, content["interactions"][0]) == one

    def test_keeps_unusual_line_breaks(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        live = recorded(path, fake, Answer(["a\x85b\nc\u2028d\ne\r\nf\n".encode()]))
        assert exchange("sync", Cassette(path), f"{ELSEWHERE}/api/chat") == live


class TestMatching:
    def test_equal_bodies_play_in_order(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        with Cassette(path, mode="record") as cassette:
            for n, body in enumerate((b'{"a":1,"b":[2]}', b'{"a":2}', b'{"a":1,"b":[2]}')):
                fake.script("/api/chat", Answer([{"n": n}]))
                exchange("sync", cassette, f"{fake.url}/api/chat", body=body)
        cassette = Cassette(path)
        answers = [
            exchange("sync", cassette, f"{ELSEWHERE}/api/chat", body=body)[1]
            for body in (b' {"b": [2], "a": 1}', b'{"b":[2],"a":1}', b'{"a":2}')
        ]
        assert answers == [[b'{"n":0}\n'], [b'{"n":2}\n'], [b'{"n":1}\n']]

    @modes
    def test_miss_names_nearest_request_and_field(self, tmp_path: Path, fake: FakeOllama, mode: str) -> None:
        path = tmp_path / "a.yaml"
        with Cassette(path, mode="record") as cassette:
            exchange("sync", cassette, f"{fake.url}/api/version", "GET")
            exchange("sync", cassette, f"{fake.url}/api/chat", body={"model": "m", "options": {"seed": 7}})
        cassette = Cassette(path)
        with pytest.raises(CassetteMiss) as caught:
            exchange(mode, cassette, f"{ELSEWHERE}/api/chat", body={"model": "m", "options": {"seed": 42}})
        assert "The nearest recorded request is POST /api/chat" in str(caught.value)
        assert "differs in `options.seed` (recorded 7, now 42)." in str(caught.value)
        assert cassette.misses == [caught.value]
        assert cassette.unplayed == ("GET /api/version", "POST /api/chat")

    @pytest.mark.parametrize("target", ["/api/a b?x={1}", "/api/grün", "?x=1", "/a%2fb", "/a?b=ü c", "/a#f", "/a[1]|b"])
    def test_spelling_of_addresses_is_ignored(self, tmp_path: Path, fake: FakeOllama, target: str) -> None:
        path = tmp_path / "a.yaml"
        with Cassette(path, mode="record") as cassette:
            live = exchange("sync", cassette, f"{fake.url}{target}", "GET")
        assert exchange("sync", Cassette(path), f"{ELSEWHERE}{target}", "GET") == live
        sent = ELSEWHERE + fake.requests[0].path
        assert exchange("sync", Cassette(path), sent, "GET") == live

    def test_miss_names_each_difference_once(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        with Cassette(path, mode="record") as cassette:
            for n in range(7):
                exchange("sync", cassette, f"{fake.url}/api/show", body={"n": n})
        with pytest.raises(CassetteMiss) as caught:
            exchange("sync", Cassette(path), f"{ELSEWHERE}/api/other", "GET")
        assert (
            str(caught.value)
            .partition("request. ")[2]
            .startswith(
                "Asked: GET /api/other. The nearest recorded request is POST /api/show,"
                " which differs in the method; the path; `n` (recorded 0, now nothing)."
            )
        )

    def test_miss_counts_the_other_differences(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        recorded(path, fake, STREAM, body=dict.fromkeys("abcdefg", 1))
        with pytest.raises(CassetteMiss, match=r"`e` \(recorded 1, now 2\); and in 2 more\.") as caught:
            exchange("sync", Cassette(path), f"{ELSEWHERE}/api/chat", body=dict.fromkeys("abcdefg", 2))
        assert str(caught.value).count("(recorded 1, now 2)") == 5

    def test_path_counts_more_than_body(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        body = dict.fromkeys("abcdefghijkl", 1)
        with Cassette(path, mode="record") as cassette:
            exchange("sync", cassette, f"{fake.url}/api/show", body=body)
            exchange("sync", cassette, f"{fake.url}/api/chat", body=dict.fromkeys(body, 2))
        with pytest.raises(CassetteMiss, match="The nearest recorded request is POST /api/chat"):
            exchange("sync", Cassette(path), f"{ELSEWHERE}/api/chat", body=body)

    def test_interaction_plays_once(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        recorded(path, fake, STREAM)
        cassette = Cassette(path)
        exchange("sync", cassette, f"{ELSEWHERE}/api/chat")
        with pytest.raises(CassetteMiss, match="recorded once and has been played as often"):
            exchange("sync", cassette, f"{ELSEWHERE}/api/chat")
        assert len(cassette.misses) == 1


SENT = 'q7&/+é"x'
"""A header whose characters JSON, URLs and base64 all encode differently."""


def in_base64(*, before: str = "", alphabet: bytes = b"+/") -> bytes:
    return base64.b64encode(f"{before}{SENT}~~~".encode(), altchars=alphabet)


ECHOES: dict[str, Answer] = {
    "401": Answer([{"error": f"{SENT} is no key of ours"}], status=401),
    "raw": Answer([f"you sent {SENT}".encode()]),
    "chunks": Answer([b"you sent " + SENT.encode()[:4], SENT.encode()[4:]]),
    "lines": Answer([{"message": {"content": SENT[:4]}}, {"message": {"content": SENT[4:]}}]),
    "events": Answer([b'data: {"delta":"' + each + b'"}\n\n' for each in (b"q7&/", b'+\\u00e9\\"x')]),
    "json": Answer([json.dumps({"error": SENT}).encode()]),
    "json as Go writes it": Answer([b'{"error":"q7\\u0026/+\xc3\xa9\\"x"}']),
    "json as PHP writes it": Answer([b'{"error":"q7&\\/+\\u00E9\\"x"}']),
    "json in json": Answer([json.dumps({"error": json.dumps({"error": SENT})}).encode()]),
    "url": Answer([urllib.parse.quote(SENT, safe="").encode()]),
    "url in small letters": Answer([urllib.parse.quote(SENT, safe="").lower().encode()]),
    "base64": Answer([base64.b64encode(SENT.encode())]),
    "base64 after one": Answer([in_base64(before="~")]),
    "base64 after two": Answer([in_base64(before="~~")]),
    "base64 for addresses": Answer([in_base64(before="user:", alphabet=b"-_")]),
    "header": Answer([b"x"], status=429, headers={"retry-after": "in q7&/+e"}),
}


class TestSecretsAreNotWritten:
    @pytest.mark.parametrize("where", ["answer", "request", "split", "quoted"])
    def test_value_of_a_secret_variable(
        self, tmp_path: Path, fake: FakeOllama, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        secret = 'it\'s "quite" öpaque' if where == "quoted" else "quite-opaque-value"
        monkeypatch.setenv("MY_SERVICE_TOKEN", secret)
        path = tmp_path / "a.yaml"
        path.write_text("the one before")
        answers: dict[str, list[Any]] = {
            "answer": [{"text": secret}],
            "quoted": [{"text": secret}],
            "split": [b"quite-opa", b"que-value"],
        }
        with pytest.raises(CassetteError, match="MY_SERVICE_TOKEN") as caught:
            recorded(path, fake, Answer(answers.get(where, [])), body=secret.encode() if where == "request" else b"")
        assert secret not in str(caught.value)
        assert path.read_text() == "the one before"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize(
        "secret",
        [
            "sk-abcdefghijklmnopqrstuv",
            "hf_abcdefghijklmnopqrstuv",
            "Bearer abcdefghijklmnopqrst.uv",
            "-----BEGIN OPENSSH PRIVATE KEY-----",
        ],
    )
    def test_text_like_a_key(self, tmp_path: Path, fake: FakeOllama, secret: str) -> None:
        path = tmp_path / "a.yaml"
        with pytest.raises(CassetteError, match="looks like a secret") as caught:
            recorded(path, fake, Answer([{"text": f"use {secret} now"}]))
        assert secret not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    @modes
    @pytest.mark.parametrize("header", ["authorization", "X-Api-Key", "X-Anything"])
    @pytest.mark.parametrize("how", ECHOES)
    def test_header_repeated_by_the_server(
        self, tmp_path: Path, fake: FakeOllama, how: str, header: str, mode: str
    ) -> None:
        path = tmp_path / "a.yaml"
        path.write_text("the one before")
        secret = "q7&/+e" if how == "header" else SENT
        sent = f"Bearer {secret}" if header == "authorization" else secret
        with pytest.raises(CassetteError, match=f"request header `{header.lower()}`") as caught:
            recorded(path, fake, ECHOES[how], mode=mode, headers={header: sent})
        assert secret not in f"{caught.value!r} {caught.value} {caught.value.hint}"
        assert path.read_text() == "the one before"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("before", ["", "~", "~~"])
    def test_header_in_url_safe_base64(self, tmp_path: Path, fake: FakeOllama, before: str) -> None:
        secret = "opaque~~~???>>>~~~"
        repeated = base64.urlsafe_b64encode(f"{before}{secret}~".encode())
        assert set(repeated) & set(b"-_")
        with pytest.raises(CassetteError, match="request header `x-api-key`"):
            recorded(tmp_path / "a.yaml", fake, Answer([repeated]), headers={"x-api-key": secret})

    @pytest.mark.parametrize(
        ("headers", "repeated"),
        [
            ({"authorization": "Bearer opaque-1"}, "opaque-1"),
            ({"authorization": "Own-Scheme opaque-1"}, "opaque-1"),
            ({"authorization": "opaque-1"}, "opaque-1"),
            ({"authorization": f"Basic {base64.b64encode(b'me:opaque-1').decode()}"}, "opaque-1"),
            ({"proxy-authorization": "Bearer opaque-1"}, "opaque-1"),
            ({"x-team": "bearer opaque-1"}, "opaque-1"),
            ({"cookie": "theme=dark; session=opaque-1"}, "opaque-1"),
            ({"cookie": 'session="opaque-1"'}, "opaque-1"),
            ({"x-six": "opaque"}, "opaque"),
            ({"x-two-words": "opaque words"}, "opaque words"),
        ],
    )
    def test_credentials_inside_a_header(
        self, tmp_path: Path, fake: FakeOllama, headers: dict[str, str], repeated: str
    ) -> None:
        (name,) = headers
        with pytest.raises(CassetteError, match=f"request header `{name}`") as caught:
            recorded(tmp_path / "a.yaml", fake, Answer([{"text": repeated}]), headers=headers)
        assert repeated not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("where", ["prompt", "address"])
    def test_key_repeated_by_the_caller(self, tmp_path: Path, fake: FakeOllama, where: str) -> None:
        more: dict[str, Any] = (
            {"body": {"prompt": "My key is opaque-1."}} if where == "prompt" else {"query": "?key=opaque-1"}
        )
        with pytest.raises(CassetteError, match="request header `x-api-key`"):
            recorded(tmp_path / "a.yaml", fake, STREAM, headers={"x-api-key": "opaque-1"}, **more)
        assert list(tmp_path.iterdir()) == []

    def test_header_of_another_request(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        key = {"x-api-key": "opaque-1"}
        fake.script("/api/chat", Answer([{"text": "opaque-1"}]))
        cassette = Cassette(path, mode="record")
        exchange("sync", cassette, f"{fake.url}/api/chat")
        with pytest.raises(ConnectionFailed):
            exchange("sync", cassette, "http://127.0.0.1:1/", headers=key)
        with pytest.raises(CassetteError, match="request header `x-api-key`"):
            cassette.save()
        assert list(tmp_path.iterdir()) == []

    def test_harmless_and_short_headers_may_repeat(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        headers = {
            "accept": "application/json",
            "accept-language": "de, en",
            "user-agent": "python-httpx/9",
            "x-short": "seven",
            "x-silent": "opaque-1",
        }
        text = " ".join(
            [*(value for name, value in headers.items() if name != "x-silent"), fake.url, "Bearer identity"]
        )
        live = recorded(path, fake, Answer([{"text": text}]), headers=headers)
        assert exchange("sync", Cassette(path), f"{ELSEWHERE}/api/chat") == live
        assert "opaque-1" not in path.read_text()


def recorded_and_broken(cassette: Cassette, fake: FakeOllama) -> None:
    exchange("sync", cassette, f"{fake.url}/api/version", "GET")
    fake.script("/api/chat", Answer([b"x"], ending="close"))
    exchange("sync", cassette, f"{fake.url}/api/chat")


class TestSaving:
    def test_compressed_response_is_refused(self, tmp_path: Path, fake: FakeOllama) -> None:
        with pytest.raises(CassetteError, match="compressed"):
            recorded(tmp_path / "a.yaml", fake, Answer([b"..."], headers={"content-encoding": "gzip"}))

    def test_compression_is_not_requested(self, fake: FakeOllama, both: Any) -> None:
        both.connect("ollama", host=fake.url).chat("Hi", model="smollm2:135m")
        assert fake.requests[0].headers["accept-encoding"] == "identity"

    def test_failed_block_writes_nothing(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        with pytest.raises(StreamInterrupted), Cassette(path, mode="record") as cassette:
            recorded_and_broken(cassette, fake)
        assert not path.exists()
        assert len(cassette) == 2

    def test_failed_replacement_leaves_no_file(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        path.mkdir()
        with pytest.raises(CassetteError, match="cannot be written"), Cassette(path, mode="record") as cassette:
            exchange("sync", cassette, f"{fake.url}/api/version", "GET")
        assert list(tmp_path.iterdir()) == [path]

    def test_empty_cassette_records(self, tmp_path: Path, fake: FakeOllama, both: Any) -> None:
        path = tmp_path / "a.yaml"
        with Cassette(path, mode="record") as cassette:
            assert (bool(cassette), len(cassette)) == (True, 0)
            both.connect("ollama", host=fake.url, transport=cassette).chat("Hi", model="smollm2:135m")
        assert Cassette(path).unplayed == ("POST /api/chat",)

    def test_empty_recording_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(CassetteError, match="Nothing was recorded"), Cassette(tmp_path / "a.yaml", mode="record"):
            pass
        assert list(tmp_path.iterdir()) == []


GOOD = "{status: {code: 200}, body: {string: ''}}"


def one_interaction(request: str, response: str) -> str:
    return f"version: 1\ninteractions: [{{request: {request}, response: {response}}}]"


class TestInvalidFiles:
    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("a: [", "not valid YAML"),
            ("[" * 100_000, "nested|maximum"),  # Newer YAML readers have their own limit.
            ("[" * 33 + "]" * 33, "nested more than 32 deep"),
            ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
            ("\x00", "not valid YAML"),
            ("- 1", "not a mapping"),
            ("version: 2\ninteractions: []", "version"),
            ("version: 1", "interactions"),
            ("version: 1\ninteractions: [1]", "in interaction 0, the entry is not a mapping"),
            (one_interaction("{}", "null"), "`response` is not a mapping"),
            (one_interaction("{method: GET, uri: 1}", "{}"), "`method` or `uri`"),
            (one_interaction("{method: GET, uri: /}", "{status: 1}"), "status.code"),
            (one_interaction("{method: GET, uri: 'http://[a'}", GOOD), "Invalid IPv6 URL"),
            (one_interaction("{method: GET, uri: /, body: {}}", GOOD), "neither text nor bytes"),
            (one_interaction("{method: GET, uri: /, headers: []}", GOOD), "`headers` is not a mapping"),
            (one_interaction("{method: GET, uri: /, headers: {a: [1]}}", GOOD), "header 'a'"),
            (one_interaction("{method: GET, uri: /}", "{status: {code: 200}}"), "`response.body`"),
        ],
    )
    def test_malformed_one_names_the_reason(self, tmp_path: Path, text: str, complaint: str) -> None:
        path = tmp_path / "a.yaml"
        path.write_text(text)
        with pytest.raises(CassetteError, match=complaint):
            Cassette(path)

    def test_missing_one_hints_at_recording(self, tmp_path: Path) -> None:
        with pytest.raises(CassetteError) as caught:
            Cassette(tmp_path / "a.yaml")
        assert 'Cassette(path, mode="record")' in str(caught.value.hint)
        assert "pytest --graftage-record" in str(caught.value.hint)

    @pytest.mark.parametrize("mode", ["rec", "RECORD", "", None])
    def test_unknown_mode(self, tmp_path: Path, mode: Any) -> None:
        with pytest.raises(ValueError, match="`replay` or `record`"):
            Cassette(tmp_path / "a.yaml", mode=mode)

    @pytest.mark.parametrize("kind", ["pipe", "folder", "name"])
    def test_pipe_folder_or_impossible_name(self, tmp_path: Path, fake: FakeOllama, kind: str) -> None:
        path = tmp_path / ("a\0b.yaml" if kind == "name" else "a.yaml")
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        with pytest.raises(CassetteError, match="cannot be read"):
            Cassette(path)

    @pytest.mark.parametrize("name", ["a\0b.yaml", "file/a.yaml"])
    def test_unwritable_one_can_be_saved_elsewhere(self, tmp_path: Path, fake: FakeOllama, name: str) -> None:
        (tmp_path / "file").touch()
        tape = Cassette(tmp_path / name, mode="record")
        exchange("sync", tape, f"{fake.url}/api/version", "GET")
        with pytest.raises(CassetteError, match="cannot be written"):
            tape.save()
        tape.path = tmp_path / "b.yaml"
        tape.save()
        assert len(Cassette(tape.path)) == 1

    def test_too_large_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("graftage.testing.cassettes.MAX_BYTES", 100)
        (tmp_path / "a.yaml").write_text("#" * 101)
        with pytest.raises(CassetteError, match="larger than 100 bytes"):
            Cassette(tmp_path / "a.yaml")

    @pytest.mark.parametrize(
        ("lengths", "pieces"),
        [
            ("[2, 4]", [b"ab", b"cdef"]),
            ("[2, 2]", [b"abcdef"]),
            ("[4, 4]", [b"abcdef"]),
            ("[6, 0]", [b"abcdef"]),
            ("[-1, 7]", [b"abcdef"]),
            ("[a, b]", [b"abcdef"]),
            ("6", [b"abcdef"]),
        ],
    )
    def test_edited_body_plays_in_one_piece(self, tmp_path: Path, lengths: str, pieces: list[bytes]) -> None:
        answer = f"{{status: {{code: 200}}, body: {{string: abcdef}}, chunk_lengths: {lengths}}}"
        (tmp_path / "a.yaml").write_text(one_interaction("{method: POST, uri: /api/chat}", answer))
        _, found = exchange("sync", Cassette(tmp_path / "a.yaml"), f"{ELSEWHERE}/api/chat")
        assert found == pieces


def test_threads_share_a_cassette(tmp_path: Path, fake: FakeOllama) -> None:
    path = tmp_path / "a.yaml"

    def on_threads(work: Callable[[int], object]) -> None:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with Cassette(path, mode="record") as cassette:
        on_threads(lambda n: exchange("sync", cassette, f"{fake.url}/api/show", body={"n": n % 4}))
    replay = Cassette(path)
    on_threads(lambda n: exchange("sync", replay, f"{ELSEWHERE}/api/show", body={"n": n % 4}))
    assert (len(replay), replay.unplayed, replay.misses) == (16, (), [])


def test_server_in_old_metadata_is_read(tmp_path: Path, fake: FakeOllama) -> None:
    path = tmp_path / "a.yaml"
    recorded(path, fake, Answer([b"hello"]))
    text = path.read_text(encoding="utf-8").replace("    server: Ollama 0.9.3\n", "")
    path.write_text(f"metadata:\n  server: Ollama 0.9.3\n{text}", encoding="utf-8")
    assert Cassette(path).server == "Ollama 0.9.3"


class TestVcrpy:
    def test_plays_our_files(self, tmp_path: Path, fake: FakeOllama) -> None:
        import vcr  # type: ignore[import-untyped] # it has no types

        path = tmp_path / "a.yaml"
        _, pieces = recorded(path, fake, STREAM, body={"model": "m"})
        player = vcr.VCR(record_mode=vcr.mode.NONE, match_on=["method", "path", "body"])
        with player.use_cassette(str(path)) as cassette, httpx.Client() as client:
            response = client.post(f"{ELSEWHERE}/api/chat", json={"model": "m"})
        assert response.content == b"".join(pieces)
        assert cassette.all_played

    @pytest.mark.parametrize("by", ["vcrpy", "pytest-recording"])
    def test_keeps_our_keys(self, outer: pytest.Pytester, fake: FakeOllama, by: str) -> None:
        import vcr

        path = outer.path / "cassettes" / "test_it" / "test_more.yaml"
        live = recorded(path, fake, STREAM)
        if by == "vcrpy":
            with vcr.use_cassette(str(path), record_mode=vcr.mode.NEW_EPISODES), httpx.Client() as client:
                client.get(f"{fake.url}/api/version")
        else:
            outer.makepyfile(
                test_it=f"""
            import httpx, pytest

            @pytest.mark.vcr
            def test_more():
                assert httpx.get("{fake.url}/api/version").is_success
            """
            )
            result = outer.runpytest_subprocess("-p", "pytest_recording.plugin", "--record-mode=new_episodes")
            result.assert_outcomes(passed=1)
        cassette = Cassette(path)
        assert (len(cassette), cassette.server) == (2, "Ollama 0.9.3")
        assert exchange("async", cassette, f"{ELSEWHERE}/api/chat") == live
        assert exchange("sync", cassette, f"{ELSEWHERE}/api/version", "GET") == (200, [b'{"version":"0.9.3"}'])

    def test_reads_every_cassette_of_the_repository(self, outer: pytest.Pytester) -> None:
        import vcr

        paths = sorted((ROOT / "cassettes").rglob("*.yaml"))
        lengths = {str(path): len(Cassette(path)) for path in paths}
        assert {path: len(vcr.cassette.Cassette.load(path=path)) for path in lengths} == lengths
        # pytest-recording joins several cassettes into one.
        outer.makepyfile(
            test_it=f"""
        import pytest

        @pytest.mark.vcr(*{list(lengths)})
        def test_all(vcr):
            assert len(vcr) == {sum(lengths.values())}
        """
        )
        outer.runpytest_subprocess("-p", "pytest_recording.plugin").assert_outcomes(passed=1)

    @modes
    def test_files_play_here(self, tmp_path: Path, fake: FakeOllama, mode: str) -> None:
        import vcr

        path = tmp_path / "a.yaml"
        with vcr.use_cassette(str(path)), httpx.Client() as client:
            client.post(f"{fake.url}/api/show", json={"model": "nosuch"})
        answer = exchange(mode, Cassette(path), f"{ELSEWHERE}/api/show", body={"model": "nosuch"})
        assert answer == (404, [b'{"error":"model \'nosuch\' not found"}'])


# --- The pytest plugin -----------------------------------------------------------------------------------------------

SUITE = """
import asyncio, graftage, pytest

@pytest.mark.parametrize("mode", ["sync", "async"])
def test_version(cassette, mode):
    settings = {"host": "URL", "transport": cassette}
    if mode == "sync":
        with graftage.connect("ollama", **settings) as llm:
            assert llm.health().version == "0.9.3"
        return

    async def check():
        async with graftage.connect_async("ollama", **settings) as llm:
            return await llm.health()

    assert asyncio.run(check()).version == "0.9.3"
"""


@pytest.fixture
def outer(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A test folder with our plugin alone."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeconftest('pytest_plugins = ["graftage.testing.plugin"]')
    return pytester


@pytest.fixture
def suite(outer: pytest.Pytester, fake: FakeOllama) -> pytest.Pytester:
    """A test suite with one test and its recorded cassette."""
    outer.makepyfile(test_it=SUITE.replace("URL", fake.url))
    outer.runpytest("--graftage-record").assert_outcomes(passed=2)
    return outer


GUARDED = """
import asyncio, socket, pytest
from graftage.testing.plugin import NetworkRefused

pytestmark = pytest.mark.usefixtures("no_network")

@pytest.mark.parametrize("reach", [
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
    lambda: socket.getaddrinfo("example.invalid", 80),
    lambda: socket.gethostbyname("example.invalid"),
    lambda: with_socket(lambda one: one.connect(("192.0.2.1", 80))),
    lambda: with_socket(lambda one: one.connect_ex(("192.0.2.1", 80))),
    lambda: with_socket(lambda one: one.sendto(b"x", ("192.0.2.1", 53)), socket.SOCK_DGRAM),
    lambda: asyncio.run(asyncio.open_connection("example.invalid", 80)),
])
def test_others(reach):
    with pytest.raises(NetworkRefused):
        reach()

def with_socket(use, kind=socket.SOCK_STREAM):
    with socket.socket(socket.AF_INET, kind) as one:
        use(one)

@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.9.9.9", "::1", None])
def test_loopback(host):
    assert socket.getaddrinfo(host, 80)

def test_connection():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as one:
        assert one.getpeername() == server.getsockname()
"""


class TestPytestPlugin:
    def test_modes_share_one_cassette(self, suite: pytest.Pytester, fake: FakeOllama) -> None:
        asked = len(fake.requests)
        suite.runpytest().assert_outcomes(passed=2)
        assert (asked, len(fake.requests)) == (1, 1)
        assert [path.name for path in (suite.path / "cassettes" / "test_it").iterdir()] == ["test_version.yaml"]

    def test_swallowed_miss_fails_the_test(self, suite: pytest.Pytester) -> None:
        suite.makepyfile(
            test_it="""
        import contextlib, graftage

        def test_version(cassette):
            with graftage.connect("ollama", transport=cassette) as llm:
                assert llm.health().ok
                with contextlib.suppress(Exception):
                    llm.models()
        """
        )
        result = suite.runpytest()
        result.assert_outcomes(passed=1, errors=1)
        result.stdout.fnmatch_lines(["*Asked: GET /api/tags*"])

    def test_unplayed_interaction_fails_the_test(self, suite: pytest.Pytester) -> None:
        suite.makepyfile(test_it="def test_version(cassette): pass")
        result = suite.runpytest()
        result.assert_outcomes(passed=1, errors=1)
        result.stdout.fnmatch_lines(["*not fully played: GET /api/version.*"])

    def test_failed_test_keeps_the_old_cassette(self, suite: pytest.Pytester, fake: FakeOllama) -> None:
        path = suite.path / "cassettes" / "test_it" / "test_version.yaml"
        before = path.read_text()
        fake.version = "0.9.4"
        suite.runpytest("--graftage-record").assert_outcomes(failed=1, passed=1)
        assert path.read_text() == before

    def test_marker_selects_the_cassette(self, suite: pytest.Pytester) -> None:
        suite.makepyfile(
            test_it="""
        import graftage, pytest

        @pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.cassette("test_it/test_version"))])
        @pytest.mark.cassette("test_version")
        def test_other(cassette, n):
            with graftage.connect("ollama", transport=cassette) as llm:
                assert llm.health().ok
        """
        )
        result = suite.runpytest("--strict-markers")
        result.assert_outcomes(passed=2)
        assert result.ret == 0

    def test_orphan_fails_only_whole_runs(self, suite: pytest.Pytester) -> None:
        orphan = suite.path / "cassettes" / "old.yaml"
        orphan.write_text("version: 1\ninteractions: []\n")
        whole = suite.runpytest()
        assert whole.ret == pytest.ExitCode.TESTS_FAILED
        whole.stdout.fnmatch_lines(["*cassettes that no test uses*", "*old.yaml"])
        partial = [("test_it.py",), ("-k", "not async"), ("--deselect", "test_it.py::test_version[sync]"), ("--co",)]
        assert [suite.runpytest(*options).ret for options in partial] == [0, 0, 0, 0]

    def test_skipped_module_leaves_no_orphans(self, suite: pytest.Pytester) -> None:
        suite.makepyfile(test_it="import pytest; pytest.importorskip('nothing_of_that_name')")
        assert suite.runpytest().ret == pytest.ExitCode.NO_TESTS_COLLECTED
        suite.makepyfile(test_more="def test_more(): pass")
        assert suite.runpytest().ret == 0

    def test_claimed_cassette_is_not_an_orphan(self, suite: pytest.Pytester) -> None:
        (suite.path / "cassettes" / "more.yaml").write_text("version: 1\ninteractions: []\n")
        suite.makepyfile(test_more="def test_more(claim_cassette): assert claim_cassette('more.yaml').exists()")
        assert suite.runpytest().ret == 0

    def test_free_waiting_fixture(self, suite: pytest.Pytester) -> None:
        suite.makepyfile(
            test_free="""
        import asyncio
        from graftage import retry
        from graftage.exceptions import ConnectionFailed
        from graftage.calls import Call

        def test_free(free_waiting):
            tries = iter([True, True, False])
            async def work():
                if next(tries):
                    raise ConnectionFailed("once more")
                return "done"
            assert asyncio.run(retry.call(work, Call())) == "done"
        """
        )
        suite.runpytest("test_free.py").assert_outcomes(passed=1)
        assert suite.path.exists()

    def test_guard_allows_only_loopback(self, outer: pytest.Pytester) -> None:
        before = socket.socket.connect, socket.getaddrinfo
        outer.makepyfile(GUARDED)
        outer.runpytest().assert_outcomes(passed=13)
        assert (socket.socket.connect, socket.getaddrinfo) == before


# --- FakeOllama ------------------------------------------------------------------------------------------------------


def lines(response: httpx.Response) -> list[Any]:
    return [json.loads(line) for line in response.text.splitlines()]


@pytest.fixture
def client(fake: FakeOllama) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fake.url) as client:
        yield client


class TestFakeOllama:
    def test_responds_like_ollama(self, client: httpx.Client) -> None:
        assert client.get("/").text == "Ollama is running"
        assert client.head("/").status_code == 200
        assert client.get("/api/version").json() == {"version": "0.9.3"}
        assert [model["name"] for model in client.get("/api/tags").json()["models"]] == ["smollm2:135m"]
        assert client.post("/api/show", json={"model": "smollm2:135m"}).json()["capabilities"][0] == "completion"
        missing = client.post("/api/show", json={"model": "nosuch"})
        assert (missing.status_code, missing.json()) == (404, {"error": "model 'nosuch' not found"})
        assert client.post("/api/show", content="{").json() == {"error": "unexpected EOF"}
        assert client.get("/api/chat").status_code == 405
        assert client.get("/api/nothing").text == "404 page not found"

    @pytest.mark.parametrize(
        ("path", "given", "text"),
        [
            ("/api/chat", {"messages": [{"role": "user", "content": "Hi"}]}, lambda line: line["message"]["content"]),
            ("/api/generate", {"prompt": "Hi"}, lambda line: line["response"]),
        ],
    )
    def test_infers_loads_and_unloads(self, client: httpx.Client, path: str, given: dict[str, Any], text: Any) -> None:
        model = {"model": "smollm2:135m"}
        streamed = lines(client.post(path, json={**model, **given}))
        assert "".join(map(text, streamed)) == "Hello from the fake."
        assert [line["done"] for line in streamed] == [False] * 4 + [True]
        assert streamed[-1]["done_reason"] == "stop"
        short = client.post(path, json={**model, **given, "stream": False, "options": {"num_predict": 2}}).json()
        assert (text(short), short["done_reason"], short["eval_count"]) == ("Hello from ", "length", 2)
        assert [each["name"] for each in client.get("/api/ps").json()["models"]] == ["smollm2:135m"]
        (unloaded,) = lines(client.post(path, json={**model, "keep_alive": 0}))
        assert unloaded["done_reason"] == "unload"
        assert client.get("/api/ps").json() == {"models": []}
        (loaded,) = lines(client.post(path, json=model))
        assert loaded["done_reason"] == "load"
        assert client.post(path, json={"model": "nosuch", **given}).status_code == 404

    def test_embeds_and_pulls(self, client: httpx.Client) -> None:
        answer = client.post("/api/embed", json={"model": "smollm2:135m", "input": ["a", "bb"]}).json()
        assert len(answer["embeddings"]) == 2
        assert client.post("/api/embed", json={"model": "new", "input": "a"}).status_code == 404
        assert lines(client.post("/api/pull", json={"model": "new"}))[-1] == {"status": "success"}
        assert client.post("/api/embed", json={"model": "new", "input": "a"}).status_code == 200

    def test_serves_the_official_client(self, fake: FakeOllama) -> None:
        import ollama

        client = ollama.Client(fake.url)
        with client._client:
            parts = [
                part.message.content
                for part in client.chat("smollm2:135m", [{"role": "user", "content": "Hi"}], stream=True)
            ]
            assert "".join(map(str, parts)) == "Hello from the fake."
            assert client.list().models[0].model == "smollm2:135m"
            assert client.show("smollm2:135m").details is not None
            assert client.embed("smollm2:135m", "a").embeddings
            assert client.ps().models[0].name == "smollm2:135m"
            assert [step.status for step in client.pull("new", stream=True)][-1] == "success"

    def test_script_comes_before_usual_responses(self, client: httpx.Client, fake: FakeOllama) -> None:
        fake.script("/api/version", Answer([{"error": "busy"}], status=503, headers={"retry-after": "2"}))
        first, second = client.get("/api/version?x=1"), client.get("/api/version")
        assert (first.status_code, first.headers["retry-after"], first.json()) == (503, "2", {"error": "busy"})
        assert second.status_code == 200

    def test_requests_are_parsed(self, client: httpx.Client, fake: FakeOllama) -> None:
        client.post("/api/chat", json={"a": 1})
        client.post("/api/blobs/x", content=(part for part in (b"\xff", b"bytes")))
        assert [(seen.method, seen.path, seen.body) for seen in fake.requests] == [
            ("POST", "/api/chat", {"a": 1}),
            ("POST", "/api/blobs/x", b"\xffbytes"),
        ]
        assert fake.requests[0].headers["content-type"] == "application/json"

    def test_connection_is_kept_alive(self, client: httpx.Client, fake: FakeOllama) -> None:
        for _ in range(3):
            client.get("/api/version")
        assert fake.open_connections == 1
        client.get("/api/version", headers={"connection": "close"})
        assert client.get("/api/version").status_code == 200

    @pytest.mark.parametrize("framing", ["chunked", "length", "none"])
    def test_every_framing_carries_the_body(self, client: httpx.Client, fake: FakeOllama, framing: Any) -> None:
        fake.script("/x", Answer([{"a": 1}, b"tail"], framing=framing))
        assert [client.get("/x").content, client.get("/api/version").status_code] == [b'{"a":1}\ntail', 200]

    @pytest.mark.parametrize(
        ("answer", "error"),
        [
            (Answer(raw=b"", ending="reset"), httpx.ReadError),
            (Answer(raw=b"", ending="close"), httpx.RemoteProtocolError),
            (Answer(raw=b"", ending="stall"), httpx.ReadTimeout),
            (Answer(raw=b"garbage\r\n\r\n"), httpx.RemoteProtocolError),
            (Answer(raw=b"HTTP/1.1 200 OK\r\ncontent-"), httpx.RemoteProtocolError),
            (Answer([{"n": 1}], ending="close"), httpx.RemoteProtocolError),
            (Answer([{"n": 1}], ending="stall"), httpx.ReadTimeout),
            (Answer([{"n": 1}], ending="reset"), httpx.ReadError),
            (
                Answer([b"12345"], framing="length", headers={"Content-Length": "9"}, ending="close"),
                httpx.RemoteProtocolError,
            ),
            (Answer([b"no gzip at all"], headers={"content-encoding": "gzip"}), httpx.DecodingError),
        ],
    )
    def test_faults_reach_the_client(self, fake: FakeOllama, answer: Answer, error: type[Exception]) -> None:
        fake.script("/api/chat", answer)
        patience = 0.2 if answer.ending == "stall" else 10
        with httpx.Client(base_url=fake.url, timeout=patience) as client, pytest.raises(error):
            client.post("/api/chat", json={})

    def test_event_holds_a_stream(self, client: httpx.Client, fake: FakeOllama) -> None:
        gate = threading.Event()
        fake.script("/x", Answer([b"a", gate, b"b"], delay=0.001))
        with client.stream("GET", "/x") as response:
            pieces = response.iter_raw()
            assert next(pieces) == b"a"
            gate.set()
            assert list(pieces) == [b"b"]

    def test_stop_leaves_nothing(self) -> None:
        with FakeOllama() as fake:
            fake.script("/stall", Answer([b"x"], ending="stall"))
            fake.script("/held", Answer([b"x", threading.Event()]))
            client = httpx.Client(base_url=fake.url)
            streams = [client.send(client.build_request("GET", path), stream=True) for path in ("/stall", "/held", "/")]
            assert fake.open_connections == 3
        for stream in streams:
            stream.close()
        client.close()
        gc.collect()
        assert fake.open_connections == 0
        assert [thread for thread in threading.enumerate() if thread.name == "FakeOllama"] == []

    def test_notices_a_leaving_client(self) -> None:
        with FakeOllama() as fake:
            fake.script("/stall", Answer([b"x"], ending="stall"))
            with httpx.Client(base_url=fake.url) as client, client.stream("GET", "/stall"):
                (thread,) = fake._connections.values()
            thread.join(10)
            assert fake.open_connections == 0
