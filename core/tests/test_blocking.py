"""Plain hooks that block: neither a call nor a process waits for them past its limits."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from typing import TYPE_CHECKING, Any

import pytest

import graftage
from graftage.exceptions import InferenceFailed, ProviderTimeout
from graftage.hookspecs import hookimpl
from graftage.types import Chunk, Health, Timeouts

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

SHORT = Timeouts(connect=0.1, first_token=0.1, idle=0.1, total=30)


class Deaf:
    """Gives some chunks, then waits for a gate beyond the limits of the call."""

    name = "deaf"

    def __init__(self, before: int = 0) -> None:
        self.before = before
        self.gate = threading.Event()
        self.threads: list[int] = []
        self.closed = threading.Event()
        self.given = 0

    @hookimpl
    def connect(self, request: Any) -> object:
        return Silence(self)

    def wait(self) -> None:
        self.threads.append(threading.get_ident())
        self.gate.wait(60)


class Silence:
    def __init__(self, deaf: Deaf) -> None:
        self.deaf = deaf
        self.address = f"deaf/{id(deaf)}"

    @hookimpl
    def chat(self, request: Any) -> Iterator[Chunk]:
        try:
            for place in range(self.deaf.before):
                self.deaf.given += 1
                yield Chunk(text=f"{place} ")
            self.deaf.wait()
            yield Chunk(finish_reason="stop")
        finally:
            self.deaf.threads.append(threading.get_ident())
            self.deaf.closed.set()

    @hookimpl
    def health(self, request: Any) -> Health:
        self.deaf.wait()
        return Health(level=request.level, reachable=True)

    @hookimpl
    def list_models(self, request: Any) -> tuple[Any, ...]:
        self.deaf.wait()
        return ()


@pytest.fixture
def deaf() -> Iterator[Deaf]:
    found = Deaf()
    yield found
    found.gate.set()


class TestLimits:
    """Each limit of a call ends it."""

    @pytest.mark.parametrize(
        ("before", "timeout", "phase"),
        [(0, 0.2, "total"), (3, 0.2, "total"), (0, SHORT, "first_token"), (3, SHORT, "idle")],
    )
    def test_chat_ends_in_time(self, both: Any, deaf: Deaf, before: int, timeout: Any, phase: str) -> None:
        deaf.before = before
        llm = both.connect(deaf, model="m")
        with pytest.raises(ProviderTimeout) as caught:
            llm.chat("x", timeout=timeout)
        assert (caught.value.phase, caught.value.operation) == (phase, "chat")
        assert (caught.value.partial.text if caught.value.partial else "") == "".join(f"{n} " for n in range(before))
        assert llm.stats().running == 0

    def test_list_ends_in_time(self, both: Any, deaf: Deaf) -> None:
        with pytest.raises(ProviderTimeout):
            both.connect(deaf, model="m").models(timeout=0.2)

    def test_health_ends_in_time(self, both: Any, deaf: Deaf) -> None:
        assert isinstance(both.connect(deaf, model="m").health(timeout=0.2).error, ProviderTimeout)

    def test_slot_is_free_again(self, both: Any, deaf: Deaf) -> None:
        llm = both.connect(deaf, model="m", concurrency=1)
        with pytest.raises(ProviderTimeout):
            llm.chat("x", timeout=0.2)
        deaf.gate.set()
        assert llm.chat("x").finish_reason == "stop"


class TestStreams:
    """One thread reads the iterator from start to end."""

    def test_reading_thread_also_closes(self, both: Any, deaf: Deaf) -> None:
        deaf.before = 3
        stream = both.connect(deaf, model="m").chat("x", stream=True)
        stream.close()
        deaf.gate.set()
        assert deaf.closed.wait(30)
        assert len(set(deaf.threads)) == 1
        assert deaf.threads[0] != threading.get_ident()

    def test_slow_reader_holds_the_provider_back(self, both: Any, deaf: Deaf) -> None:
        deaf.before = 10_000
        with both.connect(deaf, model="m").chat("x", stream=True) as stream:
            assert next(iter(stream)).text == "0 "
        assert deaf.closed.wait(30)
        assert deaf.given < 100

    def test_error_comes_after_earlier_chunks(self, both: Any) -> None:
        class Failing(Deaf):
            def wait(self) -> None:
                raise InferenceFailed("broken")

        llm = both.connect(Failing(5), model="m")
        with pytest.raises(InferenceFailed) as caught:
            llm.chat("x")
        assert caught.value.partial
        assert caught.value.partial.text == "0 1 2 3 4 "

    def test_chunks_arrive_whole_and_in_order(self, both: Any, deaf: Deaf) -> None:
        deaf.before = 500
        deaf.gate.set()
        assert both.connect(deaf, model="m").chat("x").text == "".join(f"{n} " for n in range(500))


@pytest.mark.parametrize(
    "main",
    [
        """
        with suppress(ProviderTimeout), graftage.connect(Deaf(), model="m") as llm:
            llm.chat("x", timeout=0.2)
        """,
        """
        async def main():
            with suppress(ProviderTimeout):
                async with graftage.connect_async(Deaf(), model="m") as llm:
                    await llm.chat("x", timeout=0.2)

        asyncio.run(main())
        """,
    ],
    ids=["sync", "async"],
)
def test_process_ends_while_a_hook_hangs(main: str) -> None:
    program = """
        import asyncio, threading
        from contextlib import suppress
        import graftage
        from graftage.exceptions import ProviderTimeout
        from graftage.hookspecs import hookimpl

        class Deaf:
            name = "deaf"

            @hookimpl
            def connect(self, request):
                return self.Silence()

            class Silence:
                @hookimpl
                def chat(self, request):
                    threading.Event().wait()
                    yield

                @hookimpl
                def health(self, request):
                    threading.Event().wait()
    """
    text = textwrap.dedent(program) + textwrap.dedent(main) + "\nprint('the end')\n"
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("the end\n", "", 0)


def test_event_loop_runs_while_a_hook_hangs(deaf: Deaf) -> None:
    import asyncio

    async def main() -> int:
        async with graftage.connect_async(deaf, model="m") as llm:
            task = asyncio.create_task(llm.chat("x"))
            steps = 0
            while not deaf.threads:
                steps += 1
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return steps

    assert asyncio.run(main()) > 0


@pytest.mark.parametrize("asleep", ["chat", "connect"])
@pytest.mark.skipif(not hasattr(__import__("signal"), "setitimer"), reason="this system has no timers that signal")
def test_exit_in_a_signal_handler_ends_the_host(asleep: str) -> None:
    program = """
        import signal, sys, time
        import graftage
        from graftage.hookspecs import hookimpl
        from graftage.testing import Echo, Pause

        class Sleeper(Echo):
            @hookimpl
            def connect(self, request):
                signal.setitimer(signal.ITIMER_REAL, 0.2)
                if sys.argv[1] == "connect":
                    time.sleep(30)
                return super().connect(request)

        signal.signal(signal.SIGALRM, lambda *_: sys.exit(3))
        with graftage.connect(Sleeper([[Pause()]]), model="m") as llm:
            llm.chat("x", timeout=30)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program), asleep], timeout=60, check=False)
    assert ended.returncode == 3
