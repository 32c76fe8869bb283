"""Streams: what they give, when they end, and that their slots are always freed."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import graftage
from graftage.calls import MAX_OBJECTS
from graftage.exceptions import (
    ConnectionFailed,
    InferenceFailed,
    ProtocolError,
    ProviderError,
    ProviderTimeout,
    StreamInterrupted,
)
from graftage.hookspecs import hookimpl
from graftage.testing import Echo, Pause
from graftage.types import Chunk, Health, Logprob, ToolCall, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from graftage import AsyncStream

MODEL = "m:1"
END = Chunk(finish_reason="stop")


def text_of(chunks: Any) -> str:
    return "".join(chunk.text for chunk in chunks)


def soon(truth: Any) -> bool:
    """Check that something becomes true soon; collect garbage meanwhile."""
    until = time.monotonic() + 2
    while not truth() and time.monotonic() < until:
        gc.collect()
        time.sleep(0.002)
    return bool(truth())


class TestBeginning:
    @pytest.mark.parametrize(
        "script", [ConnectionFailed("gone"), [ConnectionFailed("gone")]], ids=["call", "first chunk"]
    )
    @pytest.mark.parametrize("operation", ["chat", "generate"])
    def test_opening_error_is_the_calls(self, both: Any, operation: str, script: Any) -> None:
        llm = both.connect(Echo([script, "free"]), model=MODEL, concurrency=1)
        with pytest.raises(ConnectionFailed) as caught:
            getattr(llm, operation)("x", stream=True)
        assert caught.value.partial is None
        assert getattr(llm, operation)("y").text == "free"

    def test_first_chunk_is_there(self, both: Any) -> None:
        echo = Echo([[Chunk(text="first"), Chunk(text=" second"), END]])
        stream = both.connect(echo, model=MODEL).chat("x", stream=True)
        assert stream.partial.text == "first"
        assert text_of(stream) == "first second"

    def test_chunks_come_as_they_are_made(self, both: Any) -> None:
        pause = Pause()
        stream = both.connect(Echo([[Chunk(text="now"), pause, Chunk(text=" later"), END]]), model=MODEL).chat(
            "x", stream=True
        )
        assert next(stream).text == "now"
        pause.release()
        assert text_of(stream) == " later"


class Untidy:
    """A provider whose generators fail when they are closed."""

    name = "untidy"

    @hookimpl
    def connect(self, request: Any) -> object:
        return UntidyConnection()


class UntidyConnection:
    address = "untidy"

    @hookimpl
    def chat(self, request: Any) -> Iterator[Chunk]:
        try:
            yield Chunk(text="whole")
            yield Chunk(text=" answer", finish_reason="stop")
        finally:
            raise ValueError("untidy")

    @hookimpl
    def health(self, request: Any) -> Health:
        raise NotImplementedError


class TestEnd:
    def test_brings_the_reply(self, both: Any) -> None:
        stream = both.connect(Echo(["one two"]), model=MODEL).chat("x", stream=True)
        next(stream)
        with pytest.raises(RuntimeError, match="partial"):
            _ = stream.reply
        list(stream)
        assert (stream.reply.text, stream.reply.finish_reason) == ("one two", "stop")
        assert stream.partial is stream.reply

    def test_partial_grows_until_then(self, both: Any) -> None:
        stream = both.connect(Echo(["one two three"]), model=MODEL).chat("x", stream=True)
        seen = [(stream.partial.text, stream.partial.finish_reason) for _ in stream]
        assert seen == [("one ", None), ("one two ", None), ("one two three", None), ("one two three", "stop")]

    def test_one_chunk_is_enough(self, both: Any) -> None:
        only = Chunk(text="all", finish_reason="stop", usage=Usage(input_tokens=1, output_tokens=1))
        llm = both.connect(Echo([[only]]), model=MODEL)
        stream = llm.chat("x", stream=True)
        assert list(stream) == [only]
        assert (stream.reply.text, stream.reply.usage.total_tokens) == ("all", 2)
        assert llm.stats().running == 0

    def test_ended_stream_is_empty(self, both: Any) -> None:
        stream = both.connect(Echo(["one"]), model=MODEL).chat("x", stream=True)
        list(stream)
        assert list(stream) == []
        stream.close()
        assert stream.reply.text == "one"

    def test_nothing_is_read_after_it(self, both: Any) -> None:
        echo = Echo([[Chunk(text="a", finish_reason="stop"), InferenceFailed("too late")]])
        assert both.connect(echo, model=MODEL).chat("x").text == "a"
        assert echo.running == 0

    @pytest.mark.parametrize("items", [[], [Chunk(text="so far")]], ids=["nothing", "something"])
    @pytest.mark.parametrize("stream", [False, True])
    def test_missing_finish_reason_is_an_interruption(self, both: Any, items: list[Chunk], stream: bool) -> None:
        llm = both.connect(Echo([items, "free"]), model=MODEL, concurrency=1)
        with pytest.raises(StreamInterrupted) as caught:
            list(llm.chat("x", stream=stream))
        assert caught.value.retryable is (not items)
        assert (caught.value.partial.text if caught.value.partial else None) == ("so far" if items else None)
        assert llm.chat("y").text == "free"

    @pytest.mark.parametrize("error", [InferenceFailed("broke"), KeyError("k"), ProviderTimeout("late", phase="idle")])
    def test_error_in_the_middle_keeps_partial(self, both: Any, error: Exception) -> None:
        llm = both.connect(Echo([[Chunk(text="so "), Chunk(text="far", thinking="t"), error], "free"]), model=MODEL)
        stream = llm.chat("x", stream=True)
        seen = []
        with pytest.raises(ProviderError) as caught:
            seen += list(stream)
        assert caught.value.partial is not None
        assert (caught.value.partial.text, caught.value.partial.thinking) == ("so far", "t")
        assert stream.partial.text == "so far"
        assert list(stream) == []
        with pytest.raises(RuntimeError):
            _ = stream.reply
        assert llm.stats().running == 0

    def test_error_in_the_middle_is_final(self, both: Any) -> None:
        echo = Echo([[Chunk(text="a"), ConnectionFailed("cut")]])
        with pytest.raises(ConnectionFailed) as caught:
            both.connect(echo, model=MODEL).chat("x")
        assert (len(echo.requests), caught.value.attempts, caught.value.retryable) == (1, 1, False)

    def test_cleanup_error_spares_the_reply(self, both: Any) -> None:
        assert both.connect(Untidy(), model=MODEL).chat("x").text == "whole answer"

    def test_cleanup_error_frees_the_slot(self, both: Any) -> None:
        llm = both.connect(Untidy(), model=MODEL)
        stream = llm.chat("x", stream=True)
        stream.close()
        assert llm.stats().running == 0


def two_calls(both: Any) -> tuple[Echo, Any]:
    """Return an Echo and its client with one slot; the first stream does not end by itself."""
    echo = Echo([[Chunk(text="a"), Chunk(text="b"), Pause(), END], "free"])
    return echo, both.connect(echo, model=MODEL, concurrency=1, timeouts={"total": 20})


class TestLeavingEarly:
    @pytest.mark.parametrize("read", [0, 1, 2])
    def test_closing_frees_the_slot(self, both: Any, read: int) -> None:
        echo, llm = two_calls(both)
        stream = llm.chat("x", stream=True)
        for _ in range(read):
            next(stream)
        stream.close()
        assert (echo.running, llm.stats().running) == (0, 0)
        assert list(stream) == []
        assert stream.partial.text == ("ab" if read == 2 else "a")
        assert llm.chat("y").text == "free"
        stream.close()

    def test_leaving_the_block_closes(self, both: Any) -> None:
        echo, llm = two_calls(both)
        with llm.chat("x", stream=True) as stream:
            assert next(stream).text == "a"
        assert echo.running == 0
        assert llm.chat("y").text == "free"

    def test_error_in_the_block_closes(self, both: Any) -> None:
        echo, llm = two_calls(both)

        def act() -> None:
            with llm.chat("x", stream=True):
                raise KeyError("the host's")

        with pytest.raises(KeyError):
            act()
        assert echo.running == 0

    def test_dropping_frees_the_slot(self, both: Any) -> None:
        _, llm = two_calls(both)

        def glance() -> str:
            for chunk in llm.chat("x", stream=True):
                return str(chunk.text)
            raise AssertionError

        assert glance() == "a"
        assert soon(lambda: llm.stats().running == 0)
        assert llm.chat("y").text == "free"

    def test_dropping_ends_the_work(self, both: Any) -> None:
        echo, llm = two_calls(both)
        next(llm.chat("x", stream=True))
        assert soon(lambda: echo.running == 0)

    def test_closing_ends_a_pending_read(self, both: Any) -> None:
        pause = Pause()
        echo = Echo([[Chunk(text="a"), pause, Chunk(text="b"), END], "free"])
        llm = both.connect(echo, model=MODEL, concurrency=1)
        stream = llm.chat("x", stream=True)
        reading = both.start(lambda: text_of(stream))
        assert pause.reached.wait(5)
        both.start(stream.close).result(5)
        pause.release()
        assert reading.result(5) == "a"
        assert llm.chat("y").text == "free"
        assert soon(lambda: echo.running == 0)

    def test_pending_read_keeps_the_slot(self, both: Any) -> None:
        pause = Pause()
        echo = Echo([[Chunk(text="a"), pause, Chunk(text="b"), END]])
        llm = both.connect(echo, model=MODEL)
        stream = llm.chat("x", stream=True)
        reading = both.start(lambda: text_of(stream))
        assert pause.reached.wait(5)
        both.start(stream.close).result(5)
        # Either the work has ended or the call still counts: no slot is free while its server is busy.
        assert (echo.running, llm.stats().running) in {(0, 0), (1, 1)}
        pause.release()
        reading.result(5)

    def test_closing_the_client_interrupts(self, both: Any) -> None:
        pause = Pause()
        echo = Echo([[Chunk(text="a"), pause, END]])
        llm = both.connect(echo, model=MODEL)
        stream = llm.chat("x", stream=True)
        reading = both.start(list, stream)
        assert pause.reached.wait(5)
        llm.close()
        assert isinstance(reading.exception(5), StreamInterrupted)

    def test_many_threads_may_close(self) -> None:
        echo = Echo([[Chunk(text="a"), Pause(), END]])
        llm = graftage.connect(echo, model=MODEL)
        stream = llm.chat("x", stream=True)
        start = threading.Barrier(8)

        def close(_: int) -> None:
            start.wait(5)
            stream.close()

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(close, range(8)))
        assert (echo.running, llm.stats().running) == (0, 0)


def test_threads_can_share_a_stream() -> None:
    words = [f"w{number} " for number in range(200)]
    stream = graftage.connect(Echo(["".join(words)]), model=MODEL).chat("x", stream=True)
    with ThreadPoolExecutor(4) as threads:
        parts = list(threads.map(lambda _: [chunk.text for chunk in stream], range(4)))
    assert sorted(word for part in parts for word in part if word) == sorted(words)
    assert stream.reply.text == "".join(words)


async def awaited(stream: AsyncStream) -> list[str]:
    return [chunk.text async for chunk in await stream]


async def entered(stream: AsyncStream) -> list[str]:
    async with stream:
        return [chunk.text async for chunk in stream]


async def awaited_and_entered(stream: AsyncStream) -> list[str]:
    async with await stream as same:
        assert same is stream is await stream
        return [chunk.text async for chunk in stream]


async def iterated(stream: AsyncStream) -> list[str]:
    return [chunk.text async for chunk in stream]


async def in_a_task(stream: AsyncStream) -> list[str]:
    return await iterated(await asyncio.wait_for(stream, 5))


HOSTS = [awaited, entered, awaited_and_entered, iterated, in_a_task]


class TestAsyncStream:
    @pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
    def test_opens_once_however_it_is_used(self, host: Any) -> None:
        async def main() -> None:
            echo = Echo(["one two", "not asked"])
            async with graftage.connect_async(echo, model=MODEL) as llm:
                stream = llm.chat("x", stream=True)
                assert echo.requests == []
                assert await host(stream) == ["one ", "two", ""]
                assert stream.reply.text == stream.partial.text == "one two"
            assert (len(echo.requests), echo.running) == (1, 0)

        asyncio.run(main())

    @pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
    def test_opening_raises_the_hosts_error(self, host: Any) -> None:
        async def main() -> None:
            echo = Echo([ConnectionFailed("gone")])
            async with graftage.connect_async(echo, model=MODEL, translate_error=lambda _: LookupError("x")) as llm:
                with pytest.raises(LookupError) as caught:
                    await host(llm.chat("x", stream=True))
            assert isinstance(caught.value.__cause__, ConnectionFailed)

        asyncio.run(main())

    def test_unopened_sends_nothing(self) -> None:
        async def main() -> None:
            echo = Echo()
            async with graftage.connect_async(echo, model=MODEL) as llm:
                stream = llm.chat("x", stream=True)
                with pytest.raises(RuntimeError, match="not open"):
                    _ = stream.partial
                with pytest.raises(RuntimeError, match="not been read to its end"):
                    _ = stream.reply
                await stream.close()
                with pytest.raises(RuntimeError, match="closed"):
                    await stream
                llm.chat("y", stream=True)
            assert echo.requests == []

        asyncio.run(main())

    def test_two_tasks_open_it_once(self) -> None:
        async def main() -> None:
            pause = Pause()
            echo = Echo([[pause, Chunk(text="one"), END], "not asked"])
            async with graftage.connect_async(echo, model=MODEL) as llm:
                stream = llm.chat("x", stream=True)
                first = asyncio.create_task(iterated(stream))
                while not pause.reached.is_set():
                    await asyncio.sleep(0)
                with pytest.raises(RuntimeError, match="another task is opening it"):
                    await stream
                pause.release()
                assert await first == ["one", ""]
            assert len(echo.requests) == 1

        asyncio.run(main())

    def test_dropped_half_way_closes_quietly(self) -> None:
        program = """
import asyncio, gc, sys
import graftage
from graftage.testing import Echo, Pause
from graftage.types import Chunk

async def main():
    echo = Echo([[Chunk(text="a"), Pause()], [Chunk(text="b"), Pause()], "free"])
    llm = graftage.connect_async(echo, model="m", concurrency=1)
    async for chunk in llm.chat("x", stream=True):
        break
    assert (await llm.chat("y", stream=True)).partial.text == "b"
    print((await llm.chat("z")).text)
    while echo.running:
        await asyncio.sleep(0)
    async for chunk in llm.chat("x", stream=True):
        break

asyncio.run(main())
gc.collect()
"""
        command = [sys.executable, "-W", "error", "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == ("free\n", "")


def test_closed_loop_frees_the_slot() -> None:
    echo = Echo([[Chunk(text="a"), Pause(), END], "free"])
    llm = graftage.connect_async(echo, model=MODEL, concurrency=1)

    async def glance() -> str:
        stream = await llm.chat("x", stream=True)
        return (await anext(stream)).text

    assert asyncio.run(glance()) == "a"
    gc.collect()
    assert asyncio.run(llm.chat("y")).text == "free"
    asyncio.run(llm.close())


def test_ended_stream_leaves_no_timer() -> None:
    async def main() -> int:
        async with graftage.connect_async(Echo(["one"]), model=MODEL) as llm:
            stream = await llm.chat("x", stream=True)
            assert [chunk.text async for chunk in stream] == ["one", ""]
        loop: Any = asyncio.get_running_loop()
        return sum(1 for handle in loop._scheduled if not handle.cancelled())

    assert asyncio.run(main()) == 0


@pytest.mark.parametrize(
    "chunk",
    [
        lambda count: Chunk(logprobs=(Logprob(token="a", logprob=0.0),) * count),
        lambda count: Chunk(tool_calls=(ToolCall(id="1", name="f", arguments={}),) * count),
    ],
    ids=["logprobs", "tool calls"],
)
def test_object_limit_spans_chunks(both: Any, chunk: Callable[[int], Chunk]) -> None:
    most = chunk(MAX_OBJECTS)
    llm = both.connect(Echo([[most, END], [most, chunk(1), END]]), model=MODEL)
    reply = llm.chat("x")
    assert len(reply.logprobs or reply.tool_calls) == MAX_OBJECTS
    with pytest.raises(ProtocolError, match=rf"has {MAX_OBJECTS + 1} .*at most {MAX_OBJECTS}"):
        llm.chat("x")


PIECES = st.lists(st.builds(Chunk, text=st.text(max_size=8), thinking=st.text(max_size=4)), max_size=12)
ECHO = Echo()
CLIENT: dict[str, Any] = {}


@settings(max_examples=60)
@given(pieces=PIECES, last=st.sampled_from(["stop", "length", "other"]), broken=st.booleans(), read=st.integers(0, 14))
def test_any_chunks_are_joined_in_order(pieces: list[Chunk], last: Any, broken: bool, read: int) -> None:
    script = [*pieces, InferenceFailed("broken") if broken else Chunk(text="!", finish_reason=last)]
    llm = CLIENT.setdefault("llm", graftage.connect(ECHO, model=MODEL))
    ECHO._script.append(script)
    seen: list[Chunk] = []
    reply = None
    try:
        stream = llm.chat("x", stream=True)
        for chunk, _ in zip(stream, range(read), strict=False):
            seen.append(chunk)
        reply = stream.partial
        stream.close()
    except InferenceFailed as error:
        reply = error.partial
    whole = text_of(script[: len(script) - broken])
    assert whole.startswith(reply.text if reply else "")
    assert text_of(seen) in (reply.text if reply else "")
    assert (llm.stats().running, ECHO.running) == (0, 0)
