"""One hook, one name, one colour: a hook is written once, as `def` or `async def`, and serves both clients.

Nothing hangs, nothing is sent twice, and everything is released, even if a caller leaves early.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import socket
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from giving import Giving
from patience import soon

import graftage
from graftage._engine.answers import decode
from graftage.exceptions import (
    GraftageError,
    InferenceFailed,
    PluginError,
    PluginLoadError,
    ProtocolError,
    ProviderError,
    ProviderTimeout,
    SettingsError,
    StreamInterrupted,
)
from graftage.hookspecs import hookimpl
from graftage.testing import Echo
from graftage.types import Chunk, Embeddings, ModelInfo, Timeouts, Vectors
from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

pytestmark = pytest.mark.slow

MODEL = "m:1"
END = Chunk(finish_reason="stop")
SHORT = Timeouts(connect=5.0, first_token=0.4, idle=0.4, total=1.5)
PATIENCE = 20.0
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="has no fork")


def run(program: str, *arguments: str) -> str:
    """Return what a program prints. It must succeed without warnings."""
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.stderr, ended.returncode) == ("", 0)
    return ended.stdout.strip()


class OnToolkit:
    """A connection on server-sent events and JSON. It closes nothing itself."""

    def __init__(self, request: Any, url: str, vectors: str | None = None) -> None:
        self.http = request.http(url)
        self.address = url
        self.vectors = vectors

    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        def read(event: Any) -> Chunk:
            found = event.json()
            return Chunk(text=found.get("text", ""), finish_reason=found.get("end"))

        async for chunk in self.http.events("POST", "/chat", {}, call=request.call, read=read):
            if chunk.text == "raise":
                raise InferenceFailed("the hook's error")
            yield chunk
            if chunk.text == "return":
                return
            if chunk.text == "break":
                break

    @hookimpl
    async def list_models(self, request: Any) -> tuple[ModelInfo, ...]:
        def read(found: Any) -> tuple[ModelInfo, ...]:
            return tuple(ModelInfo(name=each) for each in found["models"])

        found: tuple[ModelInfo, ...] = await self.http.json("GET", "/models", call=request.call, read=read)
        return found

    @hookimpl
    async def embed(self, request: Any) -> Embeddings:
        found = await self.http.json("POST", "/embed", {}, call=request.call, vectors=self.vectors)
        return Embeddings(vectors=found["vectors"], warnings=(str(found.get("more")),))


def event(**fields: Any) -> bytes:
    text = ", ".join(f'"{name}": "{value}"' for name, value in fields.items())
    return f"data: {{{text}}}\n\n".encode()


EVENTS = {"content-type": "text/event-stream"}
WHOLE = [event(text="Hello "), event(text="world"), event(text="", end="stop"), b"data: [DONE]\n\n"]


def streamed(*chunks: Any, **how: Any) -> Answer:
    return Answer(list(chunks) or WHOLE, headers=EVENTS, **how)


def on_toolkit(fake: FakeOllama) -> Giving:
    return Giving(lambda request: OnToolkit(request, fake.url))


def count_chunks() -> int:
    return sum(type(each) is Chunk for each in gc.get_objects())


ODD: dict[str, tuple[bytes, list[str]]] = {
    "half of a surrogate pair": (rb'["a\ud83dz", "\uDE00", "\ud83d\ude00"]', ["a\ufffdz", "\ufffd", "\U0001f600"]),
    "JavaScript numbers": (b"[NaN, Infinity, -Infinity]", ["nan", "inf", "-inf"]),
    "beyond any float": (b"[1e400, -1e400, 1e-400]", ["inf", "-inf", "0.0"]),
    "whole numbers": (b"[9" + b"9" * 30 + b", -0, 18446744073709551616]", ["9" * 31, "0", str(2**64)]),
    "halfway between two floats": (b"[9007199254740993.0, 5e-324]", ["9007199254740992.0", "5e-324"]),
    "a repeated name": (b'["a"], "models": ["b"]', ["b"]),
    "moderate nesting": (b'["a"], "more": ' + b"[" * 100 + b"]" * 100, ["a"]),
}


def embedded(both: Any, fake: FakeOllama, body: bytes, vectors: str | None) -> Any:
    """Return the vectors and warnings that a client reads from a response, or its error."""
    fake.script("/embed", Answer([body]))
    llm = both.connect(Giving(lambda request: OnToolkit(request, fake.url, vectors)), model=MODEL)
    try:
        found = llm.embed(["a", "b"])
    except ProviderError as error:
        return type(error), error.message
    assert type(found.vectors) is Vectors
    return found.vectors, found.warnings


def leave_by_break(stream: Any) -> None:
    for _chunk in stream:
        break


def leave_by_close(stream: Any) -> None:
    stream.close()


def leave_by_error(stream: Any) -> None:
    with suppress(KeyError), stream:
        raise KeyError


def leave_in_a_thread(stream: Any) -> None:
    closer = threading.Thread(target=stream.close)
    closer.start()
    closer.join()


class WithHeaders(OnToolkit):
    """A connection whose last chunk has the headers of its stream."""

    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        items = self.http.events("POST", "/chat", {}, call=request.call, read=lambda event: event.json())
        assert items.headers == ()
        async for found in items:
            assert ("x-request-id", "r1") in items.headers
            yield Chunk(text=found["text"])
        yield Chunk(finish_reason="stop", raw=dict(items.headers))


class Quick(OnToolkit):
    """A connection with a faster reader, which marks what it has read."""

    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        def read(event: Any) -> Chunk:
            found = event.json()
            return Chunk(text=found["text"], finish_reason=found.get("end"))

        def words(data: bytes) -> tuple[str, str] | None:
            return None if b"end" in data else (f"<{decode(data)['text']}>", "")

        async for chunk in self.http.events("POST", "/chat", call=request.call, read=read, words=words):
            yield chunk


class TestToolkit:
    def test_words_are_read_from_plain_events(self, both: Any, fake: FakeOllama) -> None:
        plain = event(text="Hi")
        body = b"".join([plain, b"id: 1\n" + plain, plain, plain, *WHOLE[2:]])
        fake.script("/chat", streamed(body), streamed(body))
        llm = both.connect(Giving(lambda request: Quick(request, fake.url)), model=MODEL)
        assert [chunk.text for chunk in llm.chat("x", stream=True)] == ["<Hi>", "Hi", "<Hi>", "<Hi>", ""]
        assert llm.chat("x").text == "<Hi>Hi<Hi><Hi>"

    @pytest.mark.parametrize("last", [b"data: [DONE]\n\n", b""], ids=["done", "end"])
    def test_headers_outlive_the_stream(self, both: Any, fake: FakeOllama, last: bytes) -> None:
        fake.script("/chat", Answer([event(text="Hi"), last], headers=EVENTS | {"x-request-id": "r1"}))
        llm = both.connect(Giving(lambda request: WithHeaders(request, fake.url)), model=MODEL)
        assert llm.chat("Hi").raw["x-request-id"] == "r1"

    def test_one_hook_serves_both_clients(self, both: Any, fake: FakeOllama) -> None:
        fake.script("/chat", streamed(), streamed())
        fake.script("/models", Answer([b'{"models": ["a", "b"]}']))
        fake.script("/embed", Answer([b'{"vectors": [[1.0]]}']))
        llm = both.connect(on_toolkit(fake), model=MODEL)
        assert llm.chat("x").text == "Hello world"
        assert "".join(chunk.text for chunk in llm.chat("x", stream=True)) == "Hello world"
        assert [each.name for each in llm.models()] == ["a", "b"]
        assert llm.embed("x").vectors == ((1.0,),)
        assert (fake.accepted, llm.stats().running) == (1, 0)

    def test_close_ends_a_pending_read(self, fake: FakeOllama) -> None:
        fake.script("/chat", streamed(*WHOLE[:1], ending="stall"))
        timeouts = Timeouts(connect=5, first_token=60, idle=60, total=60)
        with graftage.connect(on_toolkit(fake), model=MODEL, timeouts=timeouts) as llm:
            stream = llm.chat("x", stream=True)
            pieces: list[str] = []
            reader = threading.Thread(target=lambda: pieces.extend(chunk.text for chunk in stream), daemon=True)
            reader.start()
            while not pieces:
                time.sleep(0.01)
            stream.close()
            reader.join(20)
            assert not reader.is_alive()
            assert (stream.partial.text, stream.partial.finish_reason) == ("".join(pieces), None)
            assert (llm.stats().running, llm.stats().failures) == (0, 0)

    def test_slow_reader_is_not_idle(self, both: Any, fake: FakeOllama) -> None:
        fake.script("/chat", streamed(*WHOLE, delay=0.01))
        timeouts = Timeouts(connect=5, first_token=20, idle=0.2, total=20)
        stream = both.connect(on_toolkit(fake), model=MODEL, timeouts=timeouts).chat("x", stream=True)
        pieces = []
        for chunk in stream:
            pieces.append(chunk.text)
            time.sleep(0.4)
        assert "".join(pieces) == "Hello world"

    def test_read_chunks_are_not_kept(self, both: Any, fake: FakeOllama) -> None:
        fake.script("/chat", streamed(*[event(text="a ")] * 300, *WHOLE[-2:]))
        before = count_chunks()
        stream = both.connect(on_toolkit(fake), model=MODEL).chat("x", stream=True)
        for _ in range(299):
            next(stream)
        assert stream.partial.text == "a " * 299
        assert count_chunks() < before + 9

    def test_async_calls_run_concurrently(self) -> None:
        together, body = 20, b"".join(WHOLE)
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(body)

        async def ask() -> list[str]:
            # No response comes before all requests: sequential calls would wait for ever.
            all_here = asyncio.Barrier(together)

            async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await reader.readuntil(b"\r\n\r\n")
                await all_here.wait()
                writer.write(head + body)
                writer.close()

            async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
                url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
                async with graftage.connect_async(Giving(lambda request: OnToolkit(request, url)), model=MODEL) as llm:
                    return [each.text for each in await asyncio.gather(*(llm.chat("x") for _ in range(together)))]

        assert asyncio.run(asyncio.wait_for(ask(), 30)) == ["Hello world"] * together

    @pytest.mark.parametrize(("body", "read"), ODD.values(), ids=ODD)
    def test_odd_json_reads_like_python(self, both: Any, fake: FakeOllama, body: bytes, read: list[str]) -> None:
        fake.script("/models", Answer([b'{"models": ' + body + b"}"]))
        names = [str(each.name) for each in both.connect(on_toolkit(fake), model=MODEL).models()]
        assert names == read

    @pytest.mark.parametrize(
        "more", ["1", "-0", "1.0", "9" * 30, "null", '"\\ud83d"', "[1, [2]]", "[[3]]", "[]", '{"a": [true]}']
    )
    def test_declared_vectors_read_alike(self, both: Any, fake: FakeOllama, more: str) -> None:
        body = f'{{"vectors": [[1, 0.1], [-2e-3, 1e308]], "more": {more}}}'.encode()
        found = embedded(both, fake, body, "vectors")
        assert found == embedded(both, fake, body, None)
        assert found[0] == ((1.0, 0.1), (-0.002, 1e308))

    @pytest.mark.parametrize(
        "wrong",
        [
            "[[1.0]]",
            "[[1.0], []]",
            "[[1.0], [1.0, 2.0]]",
            "[[1.0], [NaN]]",
            "[[1.0], [1e400]]",
            "[[1], [true]]",
            '[[1], ["2"]]',
            '[[1], "2"]',
            "[1, 2]",
            "{}",
            "null",
            '[[1], [2]], "error": "too busy"',
        ],
    )
    def test_wrong_vectors_fail_alike(self, both: Any, fake: FakeOllama, wrong: str) -> None:
        body = f'{{"vectors": {wrong}}}'.encode()
        kind, message = embedded(both, fake, body, "vectors")
        assert (kind, message) == embedded(both, fake, body, None)
        assert issubclass(kind, ProviderError)

    def test_running_loop_adopts_no_generators(self, fake: FakeOllama) -> None:
        """As in Jupyter: a loop runs in this thread and would close generators that start in it."""
        fake.script("/chat", *[streamed() for _ in range(6)])
        adopted: list[Any] = []

        async def main() -> None:
            before = sys.get_asyncgen_hooks()
            sys.set_asyncgen_hooks(adopted.append, adopted.append)
            with graftage.connect(on_toolkit(fake), model=MODEL, concurrency=1) as llm:
                assert llm.chat("x").text == "Hello world"
                for _chunk in llm.chat("x", stream=True):
                    break
                gc.collect()
                stream = llm.chat("x", stream=True)
                del stream
                gc.collect()
                stream = llm.chat("x", stream=True)
                await asyncio.to_thread(stream.close)
                stream = llm.chat("x", stream=True)
                await asyncio.get_running_loop().shutdown_asyncgens()
                assert "".join(chunk.text for chunk in stream) == "Hello world"
                assert llm.chat("x").text == "Hello world"
                assert llm.stats().running == 0
            assert sys.get_asyncgen_hooks() != before
            sys.set_asyncgen_hooks(*before)

        asyncio.run(main())
        assert adopted == []

    def test_error_restores_the_loops_hooks(self, fake: FakeOllama) -> None:
        fake.script("/chat", streamed(event(text="raise")))

        async def main() -> None:
            before = sys.get_asyncgen_hooks()
            with graftage.connect(on_toolkit(fake), model=MODEL) as llm, pytest.raises(InferenceFailed):
                llm.chat("x")
            assert sys.get_asyncgen_hooks() == before

        asyncio.run(main())

    @pytest.mark.parametrize("end", ["break", "raise", "return"])
    def test_ended_hook_returns_its_connection(self, both: Any, fake: FakeOllama, end: str) -> None:
        fake.script("/chat", *[streamed(event(text=end), ending="stall") for _ in range(5)])
        llm = both.connect(on_toolkit(fake), model=MODEL, concurrency=1)
        for _ in range(5):
            with pytest.raises(InferenceFailed if end == "raise" else StreamInterrupted):
                llm.chat("x", timeout=10)
            assert soon(lambda: fake.open_connections == 0)
        assert llm.stats().running == 0

    @pytest.mark.parametrize("leave", [leave_by_break, leave_by_close, leave_by_error, leave_in_a_thread])
    def test_leaving_reader_returns_the_connection(
        self, both: Any, fake: FakeOllama, leave: Callable[[Any], None]
    ) -> None:
        fake.script("/chat", *[streamed(event(text="Hello"), ending="stall") for _ in range(5)])
        llm = both.connect(on_toolkit(fake), model=MODEL, concurrency=1)
        for _ in range(5):
            leave(llm.chat("x", stream=True, timeout=10))
            assert soon(lambda: fake.open_connections == 0)
            assert soon(lambda: llm.stats().running == 0)


class Sleepy:
    """A connection that waits without declaring it. Its cleanup may wait too, like that of an SDK."""

    def __init__(self, where: str = "before", *, tidies: bool = False, needs_loop: bool = False) -> None:
        self.where = where
        self.tidies = tidies
        self.sent = 0
        self.tidied = 0
        self.loops: set[Any] = set()
        self.threads: set[int] = set()
        self.address = f"sleepy/{id(self)}"
        self.hang = False
        if needs_loop:
            self.needs_event_loop = True

    async def wait(self) -> None:
        if not getattr(self, "needs_event_loop", False):
            waiting: Any = Suspended()
            await waiting
            return
        self.loops.add(asyncio.get_running_loop())
        self.threads.add(threading.get_ident())
        await asyncio.sleep(PATIENCE if self.hang else 0.001)

    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        self.sent += 1
        try:
            if self.where == "before":
                await self.wait()
            yield Chunk(text="one ")
            await self.wait()
            yield Chunk(text="two", finish_reason="stop")
        finally:
            if self.tidies:
                await self.wait()
            self.tidied += 1

    @hookimpl
    async def embed(self, request: Any) -> Embeddings:
        self.sent += 1
        try:
            await self.wait()
            return Embeddings(vectors=((1.0,),))
        finally:
            self.tidied += 1

    @hookimpl
    async def list_models(self, request: Any) -> tuple[ModelInfo, ...]:
        self.sent += 1
        await self.wait()
        return (ModelInfo(name="a"),)


class Suspended:
    """An awaitable that suspends."""

    def __await__(self) -> Iterator[None]:
        yield


USES: dict[str, Callable[[Any], Any]] = {
    "chat": lambda llm: llm.chat("x"),
    "stream": lambda llm: list(llm.chat("x", stream=True)),
    "embed": lambda llm: llm.embed("x"),
    "models": lambda llm: llm.models(),
}


class TestSuspension:
    @pytest.mark.parametrize("tidies", [False, True], ids=["", "and again in cleanup"])
    @pytest.mark.parametrize("where", ["before", "between"])
    @pytest.mark.parametrize("use", USES)
    def test_is_an_error(self, use: str, where: str, tidies: bool) -> None:
        connection = Sleepy(where, tidies=tidies)
        with graftage.connect(Giving(lambda _: connection), model=MODEL, concurrency=1) as llm:
            for count in (1, 2, 3):
                with pytest.raises(PluginError, match="needs_event_loop"):
                    USES[use](llm)
                assert connection.sent == count
                assert llm.stats().running == 0

    def test_asyncio_sleep_is_an_error(self) -> None:
        class Asking:
            @hookimpl
            async def chat(self, request: Any) -> AsyncIterator[Chunk]:
                await asyncio.sleep(0.001)
                yield END

        with (
            graftage.connect(Giving(lambda _: Asking()), model=MODEL) as llm,
            pytest.raises(GraftageError, match="needs_event_loop"),
        ):
            llm.chat("x")


def _same(connection: Any, _: Any) -> Any:
    return connection


def _is_tidied(connection: Any, count: int) -> bool:
    return bool(connection.tidied == count)


FORKED_LOOP = """
    import asyncio, os, sys, warnings, graftage
    from graftage.hookspecs import hookimpl
    from graftage.types import Chunk

    # Python 3.12 warns of each fork of a process with threads.
    warnings.simplefilter("ignore", DeprecationWarning)

    class Connection:
        needs_event_loop = True

        @hookimpl
        async def chat(self, request):
            await asyncio.sleep(0.001)
            yield Chunk(text="fine", finish_reason="stop")

    class Plain:
        @hookimpl
        def chat(self, request):
            yield Chunk(text="fine", finish_reason="stop")

    class Provider:
        def __init__(self, name, connection):
            self.name, self.connection = name, connection

        @hookimpl
        def connect(self, request):
            return self.connection

    for provider in (Provider("loop", Connection()), Provider("plain", Plain())):
        llm = graftage.connect(provider, model="m", concurrency=1)
        assert llm.chat("x").text == "fine"
        child = os.fork()
        if not child:
            assert llm.chat("x", timeout=10).text == "fine"

            async def main():
                async with graftage.connect_async(provider, model="m") as other:
                    assert (await other.chat("x", timeout=10)).text == "fine"

            asyncio.run(main())
            assert not llm.stats().running
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert llm.chat("x", timeout=10).text == "fine"
    print("the end")
"""


class TestBackgroundLoop:
    @pytest.mark.parametrize("use", USES)
    def test_is_shared(self, both: Any, use: str) -> None:
        first, second = Sleepy(needs_loop=True), Sleepy(needs_loop=True)
        for connection in (first, second):
            llm = both.connect(Giving(partial(_same, connection)), model=MODEL, concurrency=1)
            USES[use](llm)
            USES[use](llm)
            assert llm.stats().running == 0
        assert len(first.loops | second.loops) == 1
        assert len(first.threads | second.threads) == 1
        assert threading.get_ident() not in first.threads

    def test_errors_come_back_typed(self, both: Any) -> None:
        class Failing(Sleepy):
            async def wait(self) -> None:
                await asyncio.sleep(0)
                raise InferenceFailed("broken")

        llm = both.connect(Giving(lambda _: Failing("between", needs_loop=True)), model=MODEL, concurrency=1)
        with pytest.raises(InferenceFailed) as caught:
            llm.chat("x")
        assert caught.value.partial
        with pytest.raises(InferenceFailed):
            llm.embed("x")
        assert llm.stats().running == 0

    @pytest.mark.parametrize("where", ["before", "between"])
    @pytest.mark.parametrize("use", ["chat", "stream", "embed"])
    def test_hanging_hook_ends_in_time(self, both: Any, use: str, where: str) -> None:
        connection = Sleepy(where, needs_loop=True)
        connection.hang = True
        llm = both.connect(Giving(lambda _: connection), model=MODEL, concurrency=1, timeouts=SHORT)
        with pytest.raises(ProviderTimeout):
            USES[use](llm)
        assert llm.stats().running == 0
        assert soon(lambda: connection.tidied == 1)
        connection.hang = False
        USES[use](llm)

    def test_leaving_early_ends_the_hook(self, both: Any) -> None:
        connection = Sleepy("between", needs_loop=True)
        connection.hang = True
        llm = both.connect(Giving(lambda _: connection), model=MODEL, concurrency=1)
        for count in (1, 2, 3):
            leave_in_a_thread(llm.chat("x", stream=True))
            assert soon(partial(_is_tidied, connection, count))
            assert soon(lambda: llm.stats().running == 0)

    @pytest.mark.parametrize("use", ["chat", "embed"])
    def test_cancelling_ends_the_hook(self, use: str) -> None:
        connection = Sleepy(needs_loop=True)
        connection.hang = True

        async def main() -> None:
            async with graftage.connect_async(Giving(lambda _: connection), model=MODEL, concurrency=1) as llm:
                work: Any = llm.chat("x") if use == "chat" else llm.embed("x")
                task = asyncio.create_task(work)
                while not connection.threads:
                    await asyncio.sleep(0.001)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert llm.stats().running == 0
                for _ in range(1000):
                    if connection.tidied:
                        break
                    await asyncio.sleep(0.005)
                assert connection.tidied == 1

        asyncio.run(main())

    def test_call_sleep_blocks_no_other(self, both: Any) -> None:
        began = threading.Event()

        class Patient:
            needs_event_loop = True

            @hookimpl
            async def chat(self, request: Any) -> AsyncIterator[Chunk]:
                began.set()
                await request.call.sleep(PATIENCE)
                yield END

        slow = both.connect(Giving(lambda _: Patient()), model=MODEL)
        waiting = both.start(lambda: slow.chat("x", timeout=3))
        assert began.wait(5)
        quick = both.connect(Giving(lambda _: Sleepy(needs_loop=True)), model=MODEL)
        assert quick.chat("x", timeout=1.5).text == "one two"
        assert isinstance(waiting.exception(PATIENCE), ProviderTimeout)

    def test_toolkit_blocks_no_other(self, both: Any, fake: FakeOllama) -> None:
        class Mixed(OnToolkit):
            needs_event_loop = True
            chat, list_models, embed = OnToolkit.chat, OnToolkit.list_models, OnToolkit.embed

        fake.script("/chat", streamed(event(text="Hello"), ending="stall"), streamed())
        fake.script("/models", Answer([b'{"models": ["a"]}']))
        llm = both.connect(Giving(lambda request: Mixed(request, fake.url)), model=MODEL)
        stream = llm.chat("x", stream=True, timeout=Timeouts(connect=5, first_token=5, idle=2, total=10))
        reading = both.start(list, stream)
        assert llm.chat("x", timeout=5).text == "Hello world"
        assert [each.name for each in llm.models(timeout=5)] == ["a"]
        stream.close()
        reading.exception(PATIENCE)
        llm.close()
        assert soon(lambda: fake.open_connections == 0)

    @needs_fork
    def test_forked_process_has_its_own(self) -> None:
        assert run(FORKED_LOOP).splitlines()[-1] == "the end"


class Returning:
    """A connection whose `def` hooks return what a function makes."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    @hookimpl
    def chat(self, request: Any) -> Any:
        return self.make()

    @hookimpl
    def embed(self, request: Any) -> Any:
        return self.make()


async def coroutine() -> None: ...


async def generator() -> AsyncIterator[Chunk]:
    yield END


class TestPlainHooks:
    def test_generator_keeps_one_daemon_thread(self, both: Any) -> None:
        threads: list[threading.Thread] = []

        class Plain:
            @hookimpl
            def chat(self, request: Any) -> Iterator[Chunk]:
                try:
                    for _ in range(100):
                        threads.append(threading.current_thread())
                        yield Chunk(text="a")
                finally:
                    threads.append(threading.current_thread())

        llm = both.connect(Giving(lambda _: Plain()), model=MODEL, concurrency=1)
        for read in (1, 3, 50):
            threads.clear()
            stream = llm.chat("x", stream=True)
            for _ in range(read):
                next(stream)
            stream.close()
            assert soon(lambda: llm.stats().running == 0)
            assert len(set(threads)) == 1
            assert threads[0].daemon
            assert threads[0] is not threading.current_thread()

    @pytest.mark.parametrize("make", [coroutine, generator])
    @pytest.mark.parametrize("use", ["chat", "stream", "embed"])
    def test_awaitable_result_is_refused(self, both: Any, use: str, make: Callable[[], Any]) -> None:
        llm = both.connect(Giving(lambda _: Returning(make)), model=MODEL, concurrency=1)
        for _ in range(2):
            with pytest.raises(ProviderError, match=r"is a `def` that returned .*\n?.*`async def`"):
                USES[use](llm)
        assert llm.stats().running == 0

    @pytest.mark.parametrize("given", [None, 5, END, "text", [], iter(())])
    def test_chat_must_return_chunks(self, both: Any, given: Any) -> None:
        llm = both.connect(Giving(lambda _: Returning(lambda: given)), model=MODEL, concurrency=1)
        with pytest.raises(ProviderError):
            llm.chat("x")
        assert llm.stats().running == 0


class Least:
    @hookimpl
    def chat(self, request: Any) -> Iterator[Chunk]:
        yield END


class Unyielding:
    @hookimpl
    async def chat(self, request: Any) -> Any:
        return iter([END])


class Old(Least):
    @hookimpl
    async def aembed(self, request: Any) -> Any: ...


class Misspelt(Least):
    adress = "somewhere"


class OfABase(Misspelt):
    pass


class MisspeltNeed(Least):
    need_event_loop = True


class MisspeltInside(Least):
    def __init__(self) -> None:
        self.adress = "somewhere"


class Coloured:
    """A transport of one colour that counts its requests."""

    def __init__(self, colour: Any) -> None:
        self.colour = colour
        self.sent = 0

    def wrap(self, network: Any) -> Any:
        return self

    async def send(self, request: Any, clock: Any) -> Any:
        self.sent += 1
        raise ProtocolError("sent")

    async def close(self) -> None: ...


class TestRefusals:
    @pytest.mark.parametrize(
        ("connection", "message"),
        [
            (Unyielding, "async generator"),
            (Old, "`aembed`.*Did you mean `embed`"),
            (Misspelt, "Did you mean `address`"),
            (OfABase, "Did you mean `address`"),
            (MisspeltInside, "Did you mean `address`"),
            (MisspeltNeed, "Did you mean `needs_event_loop`"),
        ],
    )
    def test_faulty_connection(self, both: Any, connection: Any, message: str) -> None:
        with pytest.raises(PluginLoadError, match=rf"(?s){message}"):
            both.opened(Giving(lambda _: connection()), model=MODEL)

    @pytest.mark.parametrize(
        "hook", ["resource_limits", "resolve_adapter", "list_adapters", "observe", "settings_model"]
    )
    def test_async_plugin_hook(self, both: Any, hook: str) -> None:
        async def implementation(self: Any, *_: Any) -> None: ...

        async def with_query(self: Any, query: Any) -> None: ...

        async def with_request(self: Any, request: Any) -> None: ...

        async def with_event(self: Any, event: Any) -> None: ...

        async def without(self: Any) -> None: ...

        functions: dict[str, Any] = {"resource_limits": with_query, "observe": with_event, "settings_model": without}
        function = hookimpl(functions.get(hook, with_request))
        plugin = type("Wrong", (), {"name": "wrong", hook: function})()
        with pytest.raises(PluginLoadError, match=rf"(?s)`{hook}` as `async def`.*Write `def`"):
            both.opened(Echo(), model=MODEL, plugins=[plugin])

    def test_async_connect(self, both: Any) -> None:
        class Provider:
            name = "late"

            @hookimpl
            async def connect(self, request: Any) -> Any: ...

        with pytest.raises(PluginLoadError, match="`connect` as `async def`"):
            both.opened(Provider(), model=MODEL)

    @pytest.mark.parametrize("colour", ["sync", "async", None])
    def test_transport_of_wrong_colour(self, both: Any, fake: FakeOllama, colour: Any) -> None:
        transport = Coloured(colour)
        llm = both.connect(on_toolkit(fake), model=MODEL, transport=transport, concurrency=1)
        right = colour in (None, both.mode)
        with pytest.raises(ProtocolError if right else SettingsError, match=None if right else "transport"):
            llm.chat("x")
        assert transport.sent == int(right)
        assert (llm.stats().running, fake.accepted) == (0, 0)

    @pytest.mark.parametrize("given", [5, "http", object()])
    def test_invalid_transport(self, both: Any, fake: FakeOllama, given: Any) -> None:
        with pytest.raises(SettingsError, match="transport"):
            both.opened(on_toolkit(fake), model=MODEL, transport=given)


INTERRUPTED = """
    import signal, sys, graftage
    from graftage.hookspecs import hookimpl
    from graftage.types import Chunk

    class Connection:
        def __init__(self, request):
            self.http = request.http(sys.argv[1])

        @hookimpl
        async def chat(self, request):
            def read(event):
                found = event.json()
                return Chunk(text=found["text"], finish_reason=found.get("end"))

            async for chunk in self.http.events("POST", f"/{request.model}", {}, call=request.call, read=read):
                yield chunk

    class Provider:
        name = "on-toolkit"

        @hookimpl
        def connect(self, request):
            return Connection(request)

    signal.signal(signal.SIGALRM, signal.default_int_handler)
    with graftage.connect(Provider(), model="m", concurrency=1) as llm:
        llm.chat("x")
        for use in (lambda: llm.chat("x", model="stall"), lambda: list(llm.chat("x", model="stall", stream=True))) * 3:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            try:
                use()
            except KeyboardInterrupt:
                print("interrupted", llm.stats().running)
        print(llm.chat("x", timeout=5).text, llm.stats().running)
"""


class TestSharing:
    @pytest.mark.parametrize("use", ["chat", "stream", "embed"])
    def test_cancelling_anywhere_loses_nothing(self, fake: FakeOllama, use: str) -> None:
        chance = random.Random(7)
        body = b"".join(WHOLE)
        pieces = [body[place : place + 9] for place in range(0, len(body), 9)]

        async def once(llm: Any) -> None:
            if use == "embed":
                await llm.embed("x")
            elif use == "chat":
                assert (await llm.chat("x")).text == "Hello world"
            else:
                async with await llm.chat("x", stream=True) as stream:
                    assert "".join([chunk.text async for chunk in stream]) == "Hello world"

        async def main() -> None:
            async with graftage.connect_async(on_toolkit(fake), model=MODEL, concurrency=2) as llm:
                for _ in range(300):
                    task = asyncio.create_task(once(llm))
                    for _ in range(chance.randrange(60)):
                        await asyncio.sleep(0)
                    if chance.random() < 0.3:
                        await asyncio.sleep(chance.random() / 200)
                    task.cancel()
                    with suppress(asyncio.CancelledError):
                        await task
                    assert llm.stats().running == 0
                for _ in range(5):
                    await asyncio.wait_for(once(llm), 5)
                await asyncio.sleep(0.2)
                assert fake.open_connections <= 2

        fake.script("/chat", *[streamed(*pieces) for _ in range(400)])
        fake.script("/embed", *[Answer([b'{"vectors": ', b"[[1.0]]}"]) for _ in range(400)])
        asyncio.run(main())
        assert soon(lambda: fake.open_connections == 0)

    def test_event_loops_take_turns(self, fake: FakeOllama) -> None:
        fake.script("/chat", *[streamed() for _ in range(20)])
        llm = graftage.connect_async(on_toolkit(fake), model=MODEL, concurrency=1)

        async def main(*, leave: bool) -> None:
            assert (await llm.chat("x", timeout=10)).text == "Hello world"
            stream = await llm.chat("x", stream=True)
            if not leave:
                await stream.aclose()

        for turn in range(6):
            asyncio.run(main(leave=turn % 2 == 0))
            assert soon(lambda: fake.open_connections == 0)
        assert soon(lambda: llm.stats().running == 0)
        asyncio.run(llm.close())

    def test_threads_share_a_sync_client(self, fake: FakeOllama) -> None:
        fake.script("/chat", *[streamed() for _ in range(200)])
        with graftage.connect(on_toolkit(fake), model=MODEL, concurrency=4) as llm:

            def work(number: int) -> None:
                for turn in range(10):
                    if (turn + number) % 3:
                        assert llm.chat("x", timeout=30).text == "Hello world"
                    else:
                        leave_by_break(llm.chat("x", stream=True, timeout=30))

            with ThreadPoolExecutor(16) as threads:
                list(threads.map(work, range(16)))
            assert soon(lambda: llm.stats().running == 0)
            assert fake.open_connections <= 4

    @pytest.mark.skipif(not hasattr(__import__("signal"), "setitimer"), reason="this system has no signal timers")
    def test_interrupt_frees_the_slot(self, fake: FakeOllama) -> None:
        stalled = [streamed(event(text="Hello"), ending="stall"), Answer(raw=b"HTTP/1.1 200 OK\r\n", ending="stall")]
        fake.script("/stall", *stalled * 3)
        fake.script("/m", streamed(), streamed())
        assert run(INTERRUPTED, fake.url).splitlines() == ["interrupted 0"] * 6 + ["Hello world 0"]


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
BARE = HEAD + b"connection: close\r\n\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


def drip(data: bytes, times: int = 200) -> Answer:
    """Return a response that repeats some bytes slowly."""
    return Answer([data] * times, headers=EVENTS, delay=0.05)


SLOW: dict[str, tuple[Answer, set[str]]] = {
    "a letter at a time": (drip(b"d"), {"first_token"}),
    "an event, then a letter at a time": (Answer([WHOLE[0], *[b"d"] * 200], headers=EVENTS, delay=0.05), {"idle"}),
    "comments": (drip(b": keepalive\n\n"), {"first_token"}),
    "an event, then comments": (Answer([WHOLE[0], *[b": hi\n\n"] * 200], headers=EVENTS, delay=0.05), {"idle"}),
    "empty lines": (drip(b"\n"), {"first_token"}),
    "an event, then empty lines": (Answer([WHOLE[0], *[b"\r\n"] * 200], headers=EVENTS, delay=0.05), {"idle"}),
    "events for ever": (drip(WHOLE[0]), {"total"}),
    "a header, byte by byte": (Answer([b"x"] * 200, raw=HEAD, delay=0.05), {"first_token"}),
    "interim responses for ever": (
        Answer([b"HTTP/1.1 100 Continue\r\n\r\n"] * 200, raw=b"", delay=0.05),
        {"first_token"},
    ),
    "a chunk size": (Answer([b"0"] * 200, raw=CHUNKED, delay=0.05), {"first_token"}),
    "trailers": (Answer([b"0\r\n", *[b"a: b\r\n"] * 200], raw=CHUNKED, delay=0.05), {"first_token"}),
    "an error, byte by byte": (Answer([b"x"] * 200, status=400, delay=0.05), {"first_token", "idle"}),
}
BIG = b"x" * (1 << 20)
WRONG: dict[str, Answer] = {
    "a line of 9 MB": streamed(b"data: ", *[BIG] * 9),
    "an event without end": streamed(*[b"data: " + BIG[: 1 << 19] + b"\n"] * 12),
    "comments without end": streamed(*[b": " + BIG[: 1 << 19] + b"\n"] * 12),
    "empty lines without end": streamed(*[b"\n" * (1 << 20)] * 6),
    "a huge header": Answer([b"x-a: " + BIG + b"\r\n"], raw=HEAD),
    "too many headers": Answer([b"a: b\r\n" * 200_000], raw=HEAD),
    "an invalid chunk size": Answer([b"zz\r\nhello\r\n"], raw=CHUNKED),
    "a negative chunk size": Answer([b"-5\r\nhello\r\n"], raw=CHUNKED),
    "a huge chunk size": Answer([b"f" * 40 + b"\r\nhello\r\n"], raw=CHUNKED),
    "a chunk that is too short": Answer([b"5\r\nhelloworld\r\n"], raw=CHUNKED),
    "less than its length": Answer(
        WHOLE[:1], framing="none", headers={**EVENTS, "content-length": "999"}, ending="close"
    ),
    "an invalid length": Answer(WHOLE, framing="none", headers={**EVENTS, "content-length": "many"}),
    "a negative length": Answer(WHOLE, framing="none", headers={**EVENTS, "content-length": "-1"}),
    "two lengths": Answer(WHOLE, raw=HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n"),
    "the end of an event is missing": streamed(WHOLE[0], b'data: {"text"', ending="end"),
    "the end of the stream is missing": streamed(WHOLE[0]),
    "no events": streamed(b""),
    "only the end": streamed(b"data: [DONE]\n\n"),
    "an event that is not an object": streamed(b"data: 5\n\n"),
    "invalid JSON in an event": streamed(b"data: {\n\n"),
    "invalid UTF-8 in an event": streamed(b"data: \xff\xfe\n\n"),
    "deep nesting in an event": streamed(b"data: " + b"[" * 100_000 + b"\n\n"),
    "a huge number in an event": streamed(b"data: " + b"9" * 10_000 + b"\n\n"),
    "an error": streamed(b'data: {"error": {"message": "full"}}\n\n'),
    "an event named error": streamed(b'event: error\ndata: {"message": "full"}\n\n'),
    "a web page": Answer([b"<html>"], headers={"content-type": "text/html"}),
    "compressed": Answer([b"xx"], headers={"content-encoding": "gzip"}),
    "HTTP/2": Answer([], raw=b"HTTP/2 200 OK\r\n\r\n", ending="close"),
    "not HTTP": Answer([BIG], raw=b"", ending="close"),
    "another protocol": Answer([], raw=b"HTTP/1.1 101 Switching\r\n\r\n", ending="close"),
    "status 999": Answer([b"{}"], raw=b"HTTP/1.1 999 What\r\nconnection: close\r\ncontent-length: 2\r\n\r\n"),
    "nothing": Answer([], raw=b"HTTP/1.1 204 None\r\nconnection: close\r\n\r\n"),
}
OBJECTS: dict[str, Answer] = {
    "without end": Answer([BIG] * 6),
    "a huge length": Answer([], framing="none", headers={"content-length": "99999999999"}, ending="close"),
    "cut": Answer([b'{"models": ['], framing="none", headers={"content-length": "99"}, ending="close"),
    "an invalid chunk size": Answer([b"zz\r\n{}\r\n"], raw=CHUNKED),
    "a huge header": Answer([b"x-a: " + BIG + b"\r\n"], raw=HEAD),
    "deep nesting": Answer([b'{"models": ' + b"[" * 100_000]),
    "a huge number": Answer([b'{"models": ' + b"9" * 10_000 + b"}"]),
    "not an object": Answer([b"[]"]),
    "invalid UTF-8": Answer([b"\xff\xfe{}"]),
    "another object": Answer([b'{"modells": []}']),
    "nothing": Answer([]),
    "an error": Answer([b'{"error": "full"}']),
}
MANY = 200_000
DENSE: dict[str, tuple[bytes, str]] = {
    "models": (b'{"models": [' + b'{"name":"m"},' * MANY + b"{}]}", "200003 objects and lists"),
    "empty lists": (b'{"x": [' + b"[]," * MANY + b"0]}", "200002 objects and lists"),
    "objects in objects": (b'{"x": [' + b'{"a":{}},' * MANY + b"0]}", "400002 objects and lists"),
}
CROWDED = {
    "an event": b"data: " + b'{"text": "", "x": [' + b"[]," * MANY + b"0]}\n\n",
    "lines of an event": b"data:\n" * MANY,
}


class TestResponses:
    @pytest.mark.parametrize(("answer", "phases"), SLOW.values(), ids=SLOW)
    def test_dripping_events_end_in_time(self, both: Any, fake: FakeOllama, answer: Answer, phases: set[str]) -> None:
        fake.script("/chat", answer)
        llm = both.connect(on_toolkit(fake), model=MODEL, timeouts=SHORT, attempts=1, concurrency=1)
        begun = time.monotonic()
        with pytest.raises(ProviderTimeout) as caught:
            llm.chat("x")
        assert caught.value.phase in phases
        assert time.monotonic() - begun < SHORT.total + 2
        assert llm.stats().running == 0
        assert soon(lambda: fake.open_connections == 0)

    @pytest.mark.parametrize("data", [b" ", b"\n", b'{"'], ids=["blanks", "empty lines", "an object"])
    @pytest.mark.parametrize("use", ["models", "embed"])
    def test_dripping_objects_end_in_time(self, both: Any, fake: FakeOllama, use: str, data: bytes) -> None:
        fake.script(f"/{use}", Answer([data] * 200, delay=0.05))
        llm = both.connect(on_toolkit(fake), model=MODEL, timeouts=SHORT, attempts=1, concurrency=1)
        with pytest.raises(ProviderTimeout):
            USES[use](llm)
        assert llm.stats().running == 0
        assert soon(lambda: fake.open_connections == 0)

    @pytest.mark.parametrize("answer", WRONG.values(), ids=WRONG)
    def test_wrong_events_are_typed_errors(self, both: Any, fake: FakeOllama, answer: Answer) -> None:
        fake.script("/chat", answer, answer, streamed())
        timeouts = Timeouts(connect=5, first_token=8, idle=8, total=12)
        llm = both.connect(
            on_toolkit(fake), model=MODEL, timeouts=timeouts, attempts=1, concurrency=1, max_reply_bytes=4 << 20
        )
        for _ in range(2):
            with pytest.raises(ProviderError) as caught:
                llm.chat("x")
            assert not isinstance(caught.value, ProviderTimeout)
            assert type(caught.value) is not ProviderError, caught.value
        assert llm.chat("x").text == "Hello world"
        assert llm.stats().running == 0

    @pytest.mark.parametrize("data", ["The runner died", '["The runner died"]', '{"detail": "The runner died"}'])
    def test_event_named_error_keeps_its_words(self, both: Any, fake: FakeOllama, data: str) -> None:
        fake.script("/chat", streamed(WHOLE[0], f"event: error\ndata: {data}\n\n".encode()))
        with pytest.raises(InferenceFailed, match="The runner died") as caught:
            both.connect(on_toolkit(fake), model=MODEL).chat("x")
        assert caught.value.partial is not None

    def test_text_instead_of_events_is_reported(self, both: Any, fake: FakeOllama) -> None:
        fake.script("/chat", Answer([b"It works!\n"], headers={"content-type": "text/plain"}))
        with pytest.raises(ProtocolError, match="`text/plain`") as caught:
            both.connect(on_toolkit(fake), model=MODEL).chat("x")
        assert "host" in str(caught.value)

    @pytest.mark.parametrize("answer", OBJECTS.values(), ids=OBJECTS)
    def test_wrong_objects_are_typed_errors(self, both: Any, fake: FakeOllama, answer: Answer) -> None:
        fake.script("/models", answer, Answer([b'{"models": []}']))
        timeouts = Timeouts(connect=5, first_token=8, idle=8, total=12)
        llm = both.connect(on_toolkit(fake), model=MODEL, timeouts=timeouts, attempts=1, max_reply_bytes=4 << 20)
        with pytest.raises(ProviderError) as caught:
            llm.models()
        assert type(caught.value) not in (ProviderError, ProviderTimeout)
        assert llm.models() == ()
        assert llm.stats().running == 0

    @pytest.mark.parametrize("vectors", [None, "vectors"], ids=["an object", "vectors"])
    @pytest.mark.parametrize(("body", "words"), DENSE.values(), ids=DENSE)
    def test_crowded_object_is_refused_unread(
        self, both: Any, fake: FakeOllama, body: bytes, words: str, vectors: str | None
    ) -> None:
        fake.script("/embed", Answer([body]))
        llm = both.connect(Giving(lambda request: OnToolkit(request, fake.url, vectors)), model=MODEL)
        tracemalloc.start()
        with pytest.raises(ProtocolError, match=f"{words}.*the limit is 100000"):
            llm.embed("x")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 12 << 20

    @pytest.mark.parametrize("body", CROWDED.values(), ids=CROWDED)
    def test_crowded_event_is_refused(self, both: Any, fake: FakeOllama, body: bytes) -> None:
        fake.script("/chat", streamed(WHOLE[0], body))
        with pytest.raises(ProtocolError, match="the limit is 100000"):
            both.connect(on_toolkit(fake), model=MODEL).chat("x")

    def test_unknown_event_fields_are_dropped(self, both: Any, fake: FakeOllama) -> None:
        seen: list[int] = []

        class Looking(OnToolkit):
            @hookimpl
            async def chat(self, request: Any) -> AsyncIterator[Chunk]:
                items = self.http.events("POST", "/chat", {}, call=request.call, read=lambda event: event)
                seen.extend([len(items._reader._fields) async for _ in items])
                yield END

        fake.script(
            "/chat", streamed(WHOLE[0], b"".join(b"f%d: x\n" % each for each in range(999)), b"id: 7\n", *WHOLE)
        )
        both.connect(Giving(lambda request: Looking(request, fake.url)), model=MODEL).chat("x")
        assert max(seen) <= 1

    def test_brackets_in_text_do_not_count(self, both: Any, fake: FakeOllama) -> None:
        fake.script("/models", Answer([b'{"models": ["' + b"[{" * 45_000 + b'"]}']))
        assert len(both.connect(on_toolkit(fake), model=MODEL).models()) == 1

    def test_surplus_bytes_are_discarded(self, both: Any) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n"
        good, wrong = b'{"models": ["good"]}', b'{"models": ["evil"]}'

        def serve(listener: socket.socket) -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, suppress(OSError):
                        extra = head + wrong
                        while connection.recv(65536):
                            connection.sendall(head + good + extra)
                            extra = b""

        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=serve, args=(listener,), daemon=True).start()
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            llm = both.connect(Giving(lambda request: OnToolkit(request, url)), model=MODEL)
            assert [llm.models()[0].name for _ in range(3)] == ["good"] * 3
            llm.close()
            listener.shutdown(socket.SHUT_RDWR)

    def test_bom_and_any_newline_are_accepted(self, both: Any, fake: FakeOllama) -> None:
        body = b"\xef\xbb\xbf" + b"".join(WHOLE).replace(b"\n", b"\r\n").replace(b"data: [", b"data:[")
        fake.script("/chat", streamed(*[body[place : place + 1] for place in range(len(body))]))
        assert both.connect(on_toolkit(fake), model=MODEL).chat("x").text == "Hello world"
