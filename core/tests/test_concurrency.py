"""One client in several threads, tasks and event loops, and cancelled tasks."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from typing import Any

import pytest
from plain import PlainEcho

import graftage
from graftage.exceptions import (
    GraftageError,
)
from graftage.hookspecs import hookimpl
from graftage.settings import Settings
from graftage.testing import Echo, Pause
from graftage.types import (
    Chunk,
    Reply,
)

MODEL = "m:1"


class PlacingEcho(Echo):
    """An Echo that records the threads of its hooks."""

    def __init__(self, **options: Any) -> None:
        super().__init__([lambda _: self._here("a b c"), lambda _: self._here("d")], **options)
        self.threads: dict[str, int] = {}

    def note(self, hook: str, request: Any) -> None:
        self.threads[hook] = threading.get_ident()
        super().note(hook, request)

    def _here(self, text: str) -> str:
        self.threads["script"] = threading.get_ident()
        return text


class PlacingPlainEcho(PlacingEcho, PlainEcho):
    """The same, with plain hooks."""


async def every_operation(llm: Any) -> Reply:
    reply: Reply = await llm.chat("x")
    await llm.generate("x")
    await llm.embed("x")
    await llm.health()
    await llm.models()
    await llm.show()
    await llm.loaded()
    await llm.pull()
    await llm.load()
    await llm.unload()
    return reply


class TestHooks:
    def test_plain_ones_serve_async_clients(self) -> None:
        async def main() -> None:
            echo = PlacingPlainEcho()
            async with graftage.connect_async(echo, model=MODEL) as llm:
                reply = await every_operation(llm)
                stream = await llm.chat("one two", stream=True)
                assert [chunk.text async for chunk in stream] == ["one ", "two", ""]
            assert (reply.text, reply.finish_reason) == ("a b c", "stop")
            assert echo.closed

        asyncio.run(main())

    def test_plain_ones_leave_the_loop(self) -> None:
        async def main() -> None:
            here = threading.get_ident()
            echo = PlacingPlainEcho()
            async with graftage.connect_async(echo, model=MODEL) as llm:
                await every_operation(llm)
            assert [hook for hook, thread in echo.threads.items() if thread == here] == []

        asyncio.run(main())

    def test_async_ones_run_on_it(self) -> None:
        async def main() -> None:
            here = threading.get_ident()
            echo = PlacingEcho()
            async with graftage.connect_async(echo, model=MODEL) as llm:
                await every_operation(llm)
            assert [hook for hook, thread in echo.threads.items() if thread != here] == []

        asyncio.run(main())

    @pytest.mark.parametrize("place", ["chat", "policy", "resolver"])
    def test_stop_iteration_never_hangs(self, place: str) -> None:
        class Stopping:
            name = "stopping"

            @hookimpl
            def resource_limits(self, query: Any) -> Any:
                return next(iter(())) if place == "policy" else None

            @hookimpl
            def resolve_adapter(self, request: Any) -> Any:
                return next(iter(()))

        async def main() -> None:
            echo = PlainEcho([StopIteration()] if place == "chat" else [])
            async with graftage.connect_async(echo, model=MODEL, plugins=[Stopping()]) as llm:
                with pytest.raises(GraftageError):
                    await asyncio.wait_for(llm.chat("x", adapter="a" if place == "resolver" else None), 5)

        asyncio.run(main())


class Slow(Echo):
    """A provider whose opening waits for a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.reached = threading.Event(), threading.Event()

    @hookimpl
    def settings_model(self) -> type[Settings]:
        self.reached.set()
        self.gate.wait(5)
        return Settings


class TestConcurrentOpening:
    def test_several_event_loops_in_turn(self) -> None:
        echo = Echo()
        llm = graftage.connect_async(echo, model=MODEL, concurrency=1)
        assert [asyncio.run(llm.chat(word)).text for word in ("one", "two", "three")] == ["one", "two", "three"]
        asyncio.run(llm.close())
        assert (len(echo.connections), echo.closed) == (1, True)

    @pytest.mark.parametrize("end", ["cancelled", "no loop"])
    def test_another_loop_after_the_first(self, end: str) -> None:
        llm = graftage.connect_async(Echo(), model=MODEL)
        if end == "no loop":
            call = llm.chat("x")
            with pytest.raises(RuntimeError, match="needs asyncio"):
                call.send(None)
        else:
            loop = asyncio.new_event_loop()
            opening = loop.create_task(llm.chat("x"))
            loop.run_until_complete(asyncio.sleep(0))
            opening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                loop.run_until_complete(opening)
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.close()
        assert asyncio.run(llm.chat("y")).text == "y"

    def test_first_calls_share_one_connection(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL)
        replies = both.together([lambda word=word: llm.chat(word).text for word in "abcdefgh"])
        assert replies == list("abcdefgh")
        assert len(echo.connections) == 1

    @pytest.mark.parametrize("cancelled", [0, 1])
    def test_cancelled_task_spares_the_others(self, cancelled: int) -> None:
        async def main() -> list[Any]:
            slow = Slow()
            llm = graftage.connect_async(slow, model=MODEL)
            tasks = [asyncio.create_task(llm.chat(word)) for word in ("one", "two", "three")]
            while not slow.reached.is_set():
                await asyncio.sleep(0.001)
            tasks[cancelled].cancel()
            await asyncio.sleep(0.005)
            slow.gate.set()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            await llm.close()
            return [getattr(each, "text", type(each)) for each in outcomes]

        expected: list[Any] = ["one", "two", "three"]
        expected[cancelled] = asyncio.CancelledError
        assert asyncio.run(main()) == expected

    def test_closing_meanwhile_leaks_nothing(self) -> None:
        async def main() -> Slow:
            slow = Slow()
            llm = graftage.connect_async(slow, model=MODEL)
            task = asyncio.create_task(llm.chat("x"))
            while not slow.reached.is_set():
                await asyncio.sleep(0.001)
            closing = asyncio.create_task(llm.close())
            await asyncio.sleep(0.005)
            slow.gate.set()
            await asyncio.gather(task, closing, return_exceptions=True)
            return slow

        slow = asyncio.run(main())
        assert all(each.closed for each in slow.connections)

    def test_connect_leaves_the_loop(self) -> None:
        class Heavy(Echo):
            thread = 0

            @hookimpl
            def connect(self, request: Any) -> object:
                self.thread = threading.get_ident()
                return super().connect(request)

        async def main() -> None:
            heavy = Heavy()
            async with graftage.connect_async(heavy, model=MODEL) as llm:
                await llm.chat("x")
            assert heavy.thread != threading.get_ident()

        asyncio.run(main())


async def settled(echo: Echo) -> None:
    """Wait until cancelled work has ended."""
    for _ in range(500):
        if not echo.running:
            return
        gc.collect()
        await asyncio.sleep(0.002)


class TestCancellation:
    @pytest.mark.parametrize("kind", [Echo, PlainEcho], ids=["async hooks", "plain hooks"])
    @pytest.mark.parametrize("place", ["opening", "streaming"])
    def test_frees_the_slot(self, place: str, kind: type[Echo]) -> None:
        async def main() -> None:
            pause = Pause()
            items = [Chunk(text="a"), pause] if place == "streaming" else [pause]
            echo = kind([[*items, Chunk(finish_reason="stop")], "free"])
            async with graftage.connect_async(echo, model=MODEL, concurrency=1) as llm:
                task = asyncio.create_task(llm.chat("x"))
                while not pause.reached.is_set():
                    await asyncio.sleep(0.001)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                del task
                stats = llm.stats()
                assert (stats.running, stats.failures) == (0, 0)
                assert (await llm.chat("y")).text == "free"
                # A worker thread cannot be cancelled; it ends when its wait ends.
                pause.release()
                await settled(echo)
                assert echo.running == 0

        asyncio.run(main())

    @pytest.mark.parametrize("kind", [Echo, PlainEcho], ids=["async hooks", "plain hooks"])
    def test_is_never_lost(self, kind: type[Echo]) -> None:
        async def main() -> None:
            echo = kind([[*[Chunk(text="a")] * 40, Chunk(finish_reason="stop")]] * 200)
            async with graftage.connect_async(echo, model=MODEL) as llm:
                for moment in range(200):
                    task = asyncio.create_task(llm.chat("x"))
                    for _ in range(moment):
                        await asyncio.sleep(0)
                    was_cancelled = task.cancel()
                    await asyncio.wait([task])
                    assert task.cancelled() is was_cancelled

        asyncio.run(main())

    def test_waiting_task_leaves_the_queue(self) -> None:
        async def main() -> None:
            pause = Pause()
            echo = Echo([[Chunk(text="a"), pause, Chunk(finish_reason="stop")], "second"])
            async with graftage.connect_async(echo, model=MODEL, concurrency=1) as llm:
                first = asyncio.create_task(llm.chat("x"))
                while not pause.reached.is_set():
                    await asyncio.sleep(0.001)
                waiting = asyncio.create_task(llm.chat("given up"))
                third = asyncio.create_task(llm.chat("z"))
                while llm.stats().waiting < 2:
                    await asyncio.sleep(0.001)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                assert llm.stats().waiting == 1
                pause.release()
                assert [(await first).text, (await third).text] == ["a", "second"]
                stats = llm.stats()
                assert (stats.running, stats.waiting, stats.failures) == (0, 0, 0)
            assert [request.messages[0].content for request in echo.requests] == ["x", "z"]

        asyncio.run(main())

    def test_outside_timeout_is_honoured(self) -> None:
        async def main() -> None:
            pause = Pause()
            echo = Echo([[pause]])
            async with graftage.connect_async(echo, model=MODEL) as llm:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(llm.chat("x"), 0.05)
                await settled(echo)
                assert (echo.running, llm.stats().running) == (0, 0)

        asyncio.run(main())


class TestSharing:
    def test_each_caller_gets_its_reply(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL, concurrency=3)
        words = [f"word{number}" for number in range(60)]
        assert both.together([lambda word=word: llm.chat(word).text for word in words]) == words
        stats = llm.stats()
        assert (stats.calls, stats.failures, stats.running, stats.waiting) == (60, 0, 0, 0)

    def test_tasks_can_share_a_stream(self) -> None:
        async def main() -> list[str]:
            words = "".join(f"w{number} " for number in range(50))
            async with graftage.connect_async(Echo([words]), model=MODEL) as llm:
                stream = await llm.chat("x", stream=True)

                async def read() -> list[str]:
                    return [chunk.text async for chunk in stream]

                parts = await asyncio.gather(read(), read(), read())
                assert stream.reply.text == words
                return sorted(word for part in parts for word in part)

        assert [word for word in asyncio.run(main()) if word] == sorted(f"w{number} " for number in range(50))

    def test_collected_stream_takes_no_lock(self) -> None:
        llm = graftage.connect(Echo(), model=MODEL, concurrency=1)
        before = gc.get_threshold()
        # Collect often enough to do so inside every locked block, and only new objects.
        gc.freeze()
        gc.set_threshold(3, 2, 2)
        try:
            for _ in range(50):
                cycle: list[Any] = [llm.chat("a b", stream=True)]
                cycle.append(cycle)
                next(cycle[0])
                del cycle
                gc.collect()
        finally:
            gc.set_threshold(*before)
            gc.unfreeze()
        assert (llm.stats().running, llm.chat("x", timeout=5).text) == (0, "x")
