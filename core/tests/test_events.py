"""Events, logs and counters: their content and order, and what must never be in them."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any

import pytest

import graftage
from graftage._engine import events as engine_events
from graftage._engine.delivery import FLUSH_TIMEOUT, MAX_QUEUED, flush
from graftage._engine.driving import drive
from graftage.exceptions import (
    AdapterNotFound,
    CapabilityUnsupported,
    ConnectionFailed,
    GraftageError,
    InferenceFailed,
    Overloaded,
    ProviderError,
    RequestRejected,
    SettingsError,
    StreamInterrupted,
)
from graftage.hookspecs import hookimpl
from graftage.retry import call as retry_call
from graftage.testing import Echo
from graftage.types import Chunk, Limits, PullProgress, ToolCall, Usage
from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MODEL = "m:1"
PROMPT = "canary-in-the-prompt"
ANSWER = "canary-in-the-answer"
KEY = "canary-in-the-key"
WHOLE = ["start", "admitted", "first_chunk", "finish"]


OTHERS: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "embed": (lambda llm: llm.embed("x"), ["start", "admitted", "finish"]),
    "health": (lambda llm: llm.health(), ["start", "finish"]),
    "list_models": (lambda llm: llm.models(), ["start", "finish"]),
    "show_model": (lambda llm: llm.show(), ["start", "finish"]),
    "loaded_models": (lambda llm: llm.loaded(), ["start", "finish"]),
    "pull_model": (lambda llm: llm.pull(), ["start", *["progress"] * 5, "finish"]),
    "load_model": (lambda llm: llm.load(), ["start", "admitted", "finish"]),
    "unload_model": (lambda llm: llm.unload(), ["start", "finish"]),
}


class TestOrder:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("operation", ["chat", "generate"])
    def test_events_of_a_reply(self, both: Any, watcher: Any, operation: str, stream: bool) -> None:
        llm = both.connect(Echo(["a b c"]), model=MODEL, plugins=[watcher])
        answer = getattr(llm, operation)("x", stream=stream)
        if stream:
            list(answer)
        assert watcher.kinds(operation) == watcher.kinds() == WHOLE
        assert {event.stream for event in watcher.events} == {stream}

    @pytest.mark.parametrize("operation", OTHERS)
    def test_events_of_every_operation(self, both: Any, watcher: Any, operation: str) -> None:
        act, kinds = OTHERS[operation]
        act(both.connect(Echo(), model=MODEL, plugins=[watcher]))
        assert [(event.operation, event.kind) for event in watcher.events] == [(operation, kind) for kind in kinds]

    def test_call_has_its_own_id(self, both: Any, watcher: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL, plugins=[watcher])
        llm.chat("x")
        llm.chat("x")
        assert {(each.provider, each.model, each.address) for each in watcher.events} == {("echo", MODEL, echo.address)}
        ids = [event.call_id for event in watcher.events]
        assert ids == [ids[0]] * 4 + [ids[4]] * 4
        assert ids[0] != ids[4]
        times = [event.at for event in watcher.events]
        assert times == sorted(times)

    def test_last_event_has_reason_and_usage(self, both: Any, watcher: Any) -> None:
        both.connect(Echo(["a b"]), model=MODEL, plugins=[watcher]).chat("one two three")
        last = watcher.last("finish")
        assert (last.finish_reason, last.usage) == ("stop", Usage(input_tokens=3, output_tokens=2))
        assert 0 <= last.timings.first_chunk <= last.timings.wall
        assert last.error is None

    @pytest.mark.parametrize(
        ("script", "kinds"),
        [
            (ConnectionFailed("gone"), ["start", "admitted", "error"]),
            ([Chunk(text="a"), InferenceFailed("fell")], ["start", "admitted", "first_chunk", "error"]),
            ([Chunk(text="a")], ["start", "admitted", "first_chunk", "error"]),
        ],
    )
    def test_failed_call_ends_with_one_error(self, both: Any, watcher: Any, script: Any, kinds: Any) -> None:
        llm = both.connect(Echo([script]), model=MODEL, plugins=[watcher])
        with pytest.raises(ProviderError) as caught:
            llm.chat("x")
        assert watcher.kinds() == kinds
        error = watcher.last("error").error
        assert (type(error), str(error), error.partial) == (
            type(caught.value),
            str(caught.value),
            None,
        )  # No answer in events.

    def test_refused_call_ends_with_an_error(self, both: Any, watcher: Any) -> None:
        llm = both.connect(Echo(without=["embed"]), model=MODEL, plugins=[watcher])
        with pytest.raises(CapabilityUnsupported):
            llm.embed("x")
        assert watcher.kinds() == ["start", "error"]

    def test_stream_closed_early_is_not_a_failure(self, both: Any, watcher: Any) -> None:
        llm = both.connect(Echo(["a b c"]), model=MODEL, plugins=[watcher])
        stream = llm.chat("x", stream=True)
        next(iter(stream))
        stream.close()
        assert "error" not in watcher.kinds()
        assert llm.stats().failures == 0

    def test_every_start_has_one_end(self, both: Any, watcher: Any) -> None:
        llm = both.connect(Echo(["a", InferenceFailed("no"), "b"]), model=MODEL, plugins=[watcher])
        for _ in range(3):
            with contextlib.suppress(InferenceFailed):
                llm.chat("x")
        ends: dict[str, list[str]] = {}
        for event in watcher.events:
            if event.kind in ("start", "finish", "error"):
                ends.setdefault(event.call_id, []).append(event.kind)
        assert sorted(ends.values()) == [["start", "error"], ["start", "finish"], ["start", "finish"]]

    def test_chain_reports_each_member(self, both: Any, watcher: Any) -> None:
        class Second(Echo):
            name = "second"

        llm = both.connect([Echo([ConnectionFailed("gone")]), Second()], model=MODEL, plugins=[watcher])
        llm.chat("x")
        assert [(each.provider, each.kind) for each in watcher.events] == [
            *[("echo", kind) for kind in ("start", "admitted", "error")],
            *[("second", kind) for kind in WHOLE],
        ]


class TestRetries:
    def test_are_reported_and_counted(self, both: Any, watcher: Any) -> None:
        busy = Answer([{"error": "server busy, please try again"}], status=503)
        with FakeOllama() as fake:
            fake.script("/api/chat", busy, busy)
            llm = both.connect("ollama", model="smollm2:135m", host=fake.url, plugins=[watcher])
            assert llm.chat("x").text
            assert llm.stats().retries == 2
        assert [kind for kind in watcher.kinds() if kind != "attempt"] == [
            "start",
            "admitted",
            *["retry"] * 2,
            *WHOLE[2:],
        ]
        retries = [event for event in watcher.events if event.kind == "retry"]
        assert [event.attempt for event in retries] == [1, 2]
        assert all(isinstance(event.error, Overloaded) and event.delay >= 0 for event in retries)

    def test_are_counted_without_observers(self, both: Any) -> None:
        busy = Answer([{"error": "server busy, please try again"}], status=503)
        with FakeOllama() as fake:
            fake.script("/api/chat", busy, busy, busy)
            llm = both.connect("ollama", model="smollm2:135m", host=fake.url)
            with pytest.raises(Overloaded) as caught:
                llm.chat("x")
            stats = llm.stats()
        assert (stats.calls, stats.failures, stats.retries, stats.running) == (1, 1, 2, 0)
        assert caught.value.attempts == 3

    def test_emitted_event_carries_its_calls_facts(self, both: Any, watcher: Any) -> None:
        def retry(request: Any) -> str:
            request.call.emit("retry", attempt=1, delay=0.5, error=ConnectionFailed("gone"))
            return "done"

        llm = both.connect(Echo([retry]), model=MODEL, plugins=[watcher])
        llm.chat("x")
        event = watcher.last("retry")
        assert (event.provider, event.model, event.operation, event.attempt, event.delay) == (
            "echo",
            MODEL,
            "chat",
            1,
            0.5,
        )
        assert llm.stats().retries == 1


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What the host's loguru sink receives at the lowest level, after `enable_logging`."""
    from loguru import logger

    monkeypatch.setattr(engine_events, "_enabled", False)
    graftage.enable_logging()
    sink = io.StringIO()
    logger.remove()
    number = logger.add(sink, level=0, format="{level} {message} {extra}")
    yield sink
    logger.remove(number)


def quiet(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh Python."""
    head = "import sys, graftage\nfrom graftage.exceptions import *\nfrom graftage.testing import Echo\n"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", head + code], capture_output=True, text=True, timeout=60, check=True
    )


CALLS = """
with graftage.connect(Echo(["a", InferenceFailed("no")]), model="m") as llm:
    llm.chat("x")
    try:
        llm.chat("x")
    except InferenceFailed:
        pass
"""


class TestLogs:
    def test_call_is_info_and_steps_are_debug(self, both: Any, logged: io.StringIO) -> None:
        both.connect(Echo(["a"]), model=MODEL).chat("x")
        lines = logged.getvalue().splitlines()
        assert [line.split(" {")[0] for line in lines] == [
            f"DEBUG chat echo:{MODEL}: start",
            f"DEBUG chat echo:{MODEL}: admitted",
            f"DEBUG chat echo:{MODEL}: first_chunk",
            f"INFO chat echo:{MODEL}: stop",
        ]
        assert all(f"'model': '{MODEL}'" in line and "'call_id': '" in line for line in lines)

    def test_failure_is_error_and_retry_is_warning(self, both: Any, logged: io.StringIO) -> None:
        def fail(request: Any) -> Any:
            request.call.emit("retry", attempt=1, delay=0.5, error=ConnectionFailed("gone"))
            raise InferenceFailed("It fell over.")

        with pytest.raises(InferenceFailed):
            both.connect(Echo([fail]), model=MODEL).chat("x")
        log = logged.getvalue()
        assert f"WARNING chat echo:{MODEL}: attempt 1 failed, next in 0.5 s: ConnectionFailed: gone" in log
        assert f"ERROR chat echo:{MODEL}: InferenceFailed: It fell over." in log

    def test_dropped_observer_is_reported_once(self, both: Any, logged: io.StringIO) -> None:
        class Blind:
            name = "blind"

            @hookimpl
            def observe(self, event: Any) -> None:
                raise ValueError("cannot see")

        llm = both.connect(Echo(), model=MODEL, plugins=[Blind()])
        llm.chat("x")
        llm.chat("x")
        llm.close()
        assert logged.getvalue().count("the observer `blind` failed and is dropped: ValueError: cannot see") == 1

    def test_are_off_until_enabled(self) -> None:
        done = quiet(CALLS + "assert 'loguru' not in sys.modules")
        assert (done.stdout, done.stderr) == ("", "")

    def test_go_to_the_hosts_sinks(self) -> None:
        code = "from loguru import logger\nlogger.remove()\nlogger.add(sys.stdout, format='{level} {message}')\n"
        done = quiet(code + "graftage.enable_logging()\n" + CALLS)
        assert "INFO chat echo:m: stop" in done.stdout
        assert "ERROR chat echo:m: InferenceFailed: no" in done.stdout
        assert done.stderr == ""

    def test_import_keeps_an_earlier_choice(self) -> None:
        code = "import graftage\ngraftage.enable_logging()\nimport graftage._engine.session, graftage._client\n" + CALLS
        assert "InferenceFailed: no" in quiet(code).stderr


class Stuck:
    """An observer that hangs at its first event until it is released, then records."""

    name = "stuck"

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.came_to_an_end = threading.Event()
        self.seen: list[Any] = []

    @hookimpl
    def observe(self, event: Any) -> None:
        self.go_on.wait(60)
        self.seen.append(event)
        self.came_to_an_end.set()


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    observer = Stuck()
    yield observer
    observer.go_on.set()


class Slow:
    """A slow observer that records the events of each call."""

    name = "slow"

    def __init__(self) -> None:
        self.seen: dict[str, list[str]] = {}

    @hookimpl
    def observe(self, event: Any) -> None:
        time.sleep(0.03)
        self.seen.setdefault(event.call_id, []).append(event.kind)


SPAN: ContextVar[str] = ContextVar("span", default="none")


class Spans:
    """Records the caller's context variable, and keeps its own from a call's first event to its last."""

    name = "spans"

    def __init__(self) -> None:
        self.seen: list[tuple[str, ...]] = []
        self.own: ContextVar[str] = ContextVar("own")
        self.threads: set[int] = set()
        self.inside = threading.Lock()

    @hookimpl
    def observe(self, event: Any) -> None:
        assert self.inside.acquire(blocking=False)
        if event.kind == "start":
            self.own.set(event.call_id)
        self.seen.append((SPAN.get(), event.kind, self.own.get(), event.call_id))
        self.threads.add(threading.get_ident())
        self.inside.release()


END = """
import os, threading
from graftage.hookspecs import hookimpl
go_on = threading.Event()
class Printing:
    name = "printing"
    @hookimpl
    def observe(self, event):
        go_on.wait(20)
        print(who, event.kind, flush=True)
who = "parent"
llm = graftage.connect(Echo(), model="m", plugins=[Printing()])
llm.chat("x")
"""
FORK = """
child = os.fork()
go_on.set()
if child:
    os.waitpid(child, 0)
else:
    who = "child"
    go_on = threading.Event()
    go_on.set()
    llm.chat("x")
"""


class TestObserverThread:
    """Observers have their own thread."""

    def test_blocked_observer_delays_nothing(self, both: Any, stuck: Stuck) -> None:
        llm = both.connect(Echo(["a", "b c"]), model=MODEL, plugins=[stuck])
        assert llm.chat("x", timeout=5).text == "a"
        assert [each.text for each in llm.chat("x", stream=True)][:2] == ["b ", "c"]
        free = Stuck()
        free.go_on.set()
        other = both.connect(Echo(), model=MODEL, plugins=[free])
        other.chat("x")
        other.close()
        assert [event.kind for event in free.seen] == WHOLE
        assert stuck.seen == []
        assert (llm.stats().events_dropped, other.stats().events_dropped) == (0, 0)

    def test_unread_events_are_dropped_and_counted(self, both: Any, stuck: Stuck, logged: io.StringIO) -> None:
        llm = both.connect(Echo(), model=MODEL, plugins=[stuck])
        llm.chat("x")
        llm.close()
        assert llm.stats().events_dropped == 3  # The first one is with the observer.
        assert logged.getvalue().count("events are dropped, since the observers are too slow (`stuck`)") == 1
        stuck.go_on.set()
        assert stuck.came_to_an_end.wait(60)
        assert [event.kind for event in stuck.seen] == ["start"]

    def test_chain_waits_once_for_a_blocked_observer(self, stuck: Stuck) -> None:
        llm = graftage.connect([Echo() for _ in range(20)], model=MODEL, plugins=[stuck])
        llm.chat("x")
        begun = time.monotonic()
        llm.close()
        assert time.monotonic() - begun < 10 * FLUSH_TIMEOUT

    def test_calls_events_are_dropped_whole(self, both: Any, stuck: Stuck) -> None:
        def many(request: Any) -> str:
            for _ in range(MAX_QUEUED):
                request.call.emit("retry", attempt=1, delay=0.0, error=ConnectionFailed("gone"))
            return "done"

        llm = both.connect(Echo([many, "a", "b", "c"]), model=MODEL, plugins=[stuck])
        for _ in range(3):
            llm.chat("x")
        assert llm.stats().events_dropped == 2 * len(WHOLE)
        stuck.go_on.set()
        flush(60)
        llm.chat("x")
        flush(60)
        kinds = [event.kind for event in stuck.seen]
        assert kinds == [*WHOLE[:2], *["retry"] * MAX_QUEUED, *WHOLE[2:], *WHOLE]
        assert llm.stats().events_dropped == 2 * len(WHOLE)

    def test_started_call_is_delivered_to_its_end(self, both: Any) -> None:
        slow = Slow()
        llm = both.connect(Echo(), model=MODEL, plugins=[slow])
        both.together([lambda: llm.chat("x")] * 8)
        llm.close()
        dropped = llm.stats().events_dropped
        while sum(map(len, slow.seen.values())) + dropped < 8 * len(WHOLE):
            time.sleep(0.01)
        assert dropped > 0
        assert set(map(tuple, slow.seen.values())) == {tuple(WHOLE)}

    def test_queue_of_steps_is_bounded(self, both: Any, stuck: Stuck) -> None:
        def many(request: Any) -> str:
            for _ in range(MAX_QUEUED + 100):
                request.call.emit("progress", progress=PullProgress(status="on its way"))
            return "done"

        llm = both.connect(Echo([many]), model=MODEL, plugins=[stuck])
        llm.chat("x")
        assert 100 <= llm.stats().events_dropped <= 100 + len(WHOLE)
        stuck.go_on.set()
        flush(60)
        assert [event.kind for event in stuck.seen if event.kind != "progress"] == WHOLE

    def test_call_dropped_in_part_stays_dropped(self, both: Any, stuck: Stuck) -> None:
        llm = both.connect(Echo(["a b c"]), model=MODEL, plugins=[stuck])
        stream = llm.chat("x", stream=True)
        llm.close()
        list(stream)
        assert llm.stats().events_dropped == len(WHOLE) - 1, "the first one is being delivered"

    def test_events_keep_order_and_context(self, both: Any) -> None:
        spans = Spans()
        llm = both.connect(Echo(), model=MODEL, plugins=[spans])

        def call(name: str) -> None:
            SPAN.set(name)
            llm.chat("x")

        both.together([lambda name=name: copy_context().run(call, name) for name in "abcdefgh"])
        llm.close()
        assert threading.get_ident() not in spans.threads
        for name in "abcdefgh":
            seen = [each for each in spans.seen if each[0] == name]
            assert [kind for _, kind, *_ in seen] == WHOLE
            assert len({each for _, _, *ids in seen for each in ids}) == 1
        assert SPAN.get() == "none"

    def test_process_delivers_everything_before_it_ends(self) -> None:
        done = quiet(END + "go_on.set()\n")
        assert done.stdout.splitlines() == [f"parent {kind}" for kind in WHOLE]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system forks no process")
    def test_forked_process_reports_only_its_calls(self) -> None:
        done = quiet(END + FORK)
        assert sorted(done.stdout.splitlines()) == sorted(
            f"{who} {kind}" for who in ("child", "parent") for kind in WHOLE
        )


def chat_that_works(llm: Any) -> None:
    llm.chat(PROMPT)


def chat_with_tools_that_are_called(llm: Any) -> None:
    llm.chat(PROMPT, tools=[{"name": PROMPT.replace("-", "_"), "description": PROMPT, "parameters": {}}])


def prompt_in(operation: str) -> Callable[[Any], None]:
    return lambda llm: getattr(llm, operation)(PROMPT)


def options_that_are_wrong(llm: Any) -> None:
    llm.chat(PROMPT, options={"temprature": 1})


def adapter_that_is_missing(llm: Any) -> None:
    llm.chat(PROMPT, adapter="nonesuch")


def format_that_is_not_kept(llm: Any) -> None:
    llm.chat(PROMPT, format={"type": "object"})


def stream_that_is_cut(llm: Any) -> None:
    list(llm.chat(PROMPT, stream=True))


HIDDEN: dict[str, tuple[Any, Callable[[Any], None], type[Exception] | None]] = {
    "an answer": (ANSWER, chat_that_works, None),
    "a completion": (ANSWER, prompt_in("generate"), None),
    "vectors": (ANSWER, prompt_in("embed"), None),
    "a tool call": (
        [Chunk(tool_calls=(ToolCall(name="f", arguments={"a": ANSWER}, id="1"),), finish_reason="tool_calls")],
        chat_with_tools_that_are_called,
        None,
    ),
    "thinking": ([Chunk(thinking=ANSWER), Chunk(finish_reason="stop", raw={"a": ANSWER})], chat_that_works, None),
    "a wrong option": (ANSWER, options_that_are_wrong, RequestRejected),
    "a missing adapter": (ANSWER, adapter_that_is_missing, AdapterNotFound),
    "a broken format": (f"{{{ANSWER}", format_that_is_not_kept, ProviderError),
    "a cut stream": ([Chunk(text=ANSWER)], stream_that_is_cut, StreamInterrupted),
    "a failure": ([Chunk(text=ANSWER), InferenceFailed("fell")], chat_that_works, InferenceFailed),
    "a refusal": (ConnectionFailed("gone"), chat_that_works, ConnectionFailed),
    "an answer of the wrong kind": ([ANSWER], chat_that_works, ProviderError),
}


class TestNoPromptLeaks:
    @pytest.mark.parametrize("case", HIDDEN)
    def test_events_logs_and_errors(self, both: Any, watcher: Any, logged: io.StringIO, case: str) -> None:
        script, act, error = HIDDEN[case]
        llm = both.connect(Echo([script]), model=MODEL, plugins=[watcher])
        seen = [logged.getvalue()]
        if error is None:
            act(llm)
        else:
            with pytest.raises(error) as caught:
                act(llm)
            assert isinstance(caught.value, GraftageError)
            seen += [str(caught.value), repr(caught.value), repr(caught.value.to_dict()), repr(caught.value.args)]
        seen += [repr(event) for event in watcher.events]
        seen += [str(event.error) for event in watcher.events]
        seen.append(logged.getvalue())
        assert len(watcher.events) >= 2
        for text in seen:
            assert PROMPT not in text
            assert PROMPT.replace("-", "_") not in text
            assert ANSWER not in text

    def test_only_partial_holds_the_text(self, both: Any, watcher: Any) -> None:
        llm = both.connect(Echo([[Chunk(text=ANSWER), InferenceFailed("fell")]]), model=MODEL, plugins=[watcher])
        with pytest.raises(InferenceFailed) as caught:
            llm.chat(PROMPT)
        assert caught.value.partial is not None
        assert caught.value.partial.text == ANSWER
        assert "partial" not in caught.value.to_dict()
        assert watcher.last("error").error.partial is None

    def test_unreadable_line_is_not_repeated(self, both: Any, logged: io.StringIO) -> None:
        with FakeOllama() as fake:
            broken = Answer([b'{"message": {"role": "assistant", "content": "' + ANSWER.encode() + b"\n"])
            fake.script("/api/chat", broken, broken, broken)
            llm = both.connect("ollama", model="smollm2:135m", host=fake.url)
            with pytest.raises(ProviderError) as caught:
                llm.chat(PROMPT)
        assert ANSWER not in str(caught.value) + logged.getvalue()

    def test_policy_sees_only_the_length(self, both: Any) -> None:
        class Nosy:
            name = "nosy"
            asked: list[Any] = []

            @hookimpl
            def resource_limits(self, query: Any) -> Limits:
                self.asked.append(query)
                return Limits()

        nosy = Nosy()
        both.connect(Echo(), model=MODEL, plugins=[nosy]).chat(PROMPT)
        assert nosy.asked[0].prompt_characters == len(PROMPT)
        assert PROMPT not in repr(nosy.asked[0])


def secrets(llm: Any) -> str:
    """Return everything that a client shows of itself."""
    settings = llm.settings
    return "\n".join([repr(llm), repr(settings), str(settings), repr(llm.origins), llm.address, repr(llm.stats())])


def test_retry_event_has_delay_and_error() -> None:
    from graftage.calls import Call

    seen: list[tuple[str, dict[str, Any]]] = []
    failures = [ConnectionFailed("gone")]

    async def once() -> str:
        if failures:
            raise failures.pop()
        return "fine"

    assert drive(retry_call(once, Call(emit=lambda kind, **facts: seen.append((kind, facts))))) == "fine"
    ((kind, facts),) = [each for each in seen if each[0] == "retry"]
    assert (kind, facts["attempt"]) == ("retry", 1)
    assert isinstance(facts["error"], ConnectionFailed)
    assert facts["delay"] >= 0


def test_stream_closed_early_has_finished(both: Any, watcher: Any) -> None:
    llm = both.connect(Echo(["a b c"]), model=MODEL, plugins=[watcher])
    with llm.chat("x", stream=True) as stream:
        next(stream)
    stream.close()
    assert watcher.kinds() == WHOLE
    assert watcher.last("finish").finish_reason is None


class TestNoSecretLeaks:
    @pytest.mark.parametrize("answer", [401, 403, 500, 404])
    def test_key_in_repr_log_error_or_pickle(self, both: Any, watcher: Any, logged: io.StringIO, answer: int) -> None:
        with FakeOllama() as fake:
            fake.script("/api/chat", *[Answer([{"error": "no"}], status=answer, framing="length")] * 3)
            llm = both.opened(
                "ollama",
                model="smollm2:135m",
                host=fake.url,
                api_key=KEY,
                headers={"X-Other": f"{KEY}-2"},
                plugins=[watcher],
            )
            with pytest.raises(ProviderError) as caught:
                llm.chat("x")
            sent = fake.requests[-1].headers
        assert (sent["authorization"], sent["x-other"]) == (f"Bearer {KEY}", f"{KEY}-2")
        error = caught.value
        seen = [str(error), repr(error), repr(vars(error)), *traceback.format_exception(error), secrets(llm)]
        seen += [repr(event) for event in watcher.events] + [logged.getvalue()]
        assert KEY not in "\n".join(seen)
        assert KEY.encode() not in pickle.dumps(error)

    def test_password_in_a_refused_address(self, both: Any, logged: io.StringIO) -> None:
        with pytest.raises(SettingsError, match="password") as caught:
            both.opened("ollama", model=MODEL, host=f"http://user:{KEY}@example.com:9")
        assert KEY not in "\n".join([str(caught.value), repr(vars(caught.value)), logged.getvalue()])
        assert KEY.encode() not in pickle.dumps(caught.value)

    def test_password_in_settings(self, both: Any) -> None:
        llm = both.opened(Echo(), model=MODEL, host=f"http://user:{KEY}@127.0.0.1:9")
        assert KEY not in secrets(llm)

    def test_value_of_a_wrong_setting(self, both: Any) -> None:
        for wrong in ({"headers": {"X-Key": [KEY]}}, {"api_key": [KEY]}, {"headers": KEY}):
            with pytest.raises(GraftageError) as caught:
                both.opened("ollama", model=MODEL, **wrong)
            assert KEY not in str(caught.value)
            assert KEY.encode() not in pickle.dumps(caught.value)

    def test_client_hides_its_arguments(self, both: Any) -> None:
        llm = graftage.connect(Echo(), model=MODEL, api_key=KEY, settings={"headers": {"X-Key": KEY}})
        assert KEY not in repr(llm._options)
        assert KEY not in repr(vars(llm))
        llm.close()

    def test_connect_request_hides_its_key(self, both: Any) -> None:
        echo = Echo()
        both.opened(echo, model=MODEL, api_key=KEY)
        request = dict(echo.calls)["connect"]
        assert KEY not in repr(request)
        assert request.settings.api_key.get_secret_value() == KEY

    def test_secret_that_a_server_repeats(self, both: Any, watcher: Any) -> None:
        echo = Echo(errors={"health": ConnectionFailed(f"denied to {KEY}")})
        llm = both.connect(echo, model=MODEL, plugins=[watcher], api_key=KEY)
        assert KEY not in repr(llm.health().error)
        with FakeOllama() as fake:
            retrying = both.connect("ollama:smollm2:135m", host=fake.url, plugins=[watcher], api_key=KEY, attempts=2)
            words = "x" * 480 + KEY  # A server's text is cut to a length: no part of the key may remain.
            fake.script("/api/chat", Answer([{"error": words}], status=503), Answer([{"error": words}], status=503))
            with pytest.raises(ProviderError) as caught:
                retrying.chat("x")
        assert watcher.last("retry").error is not None
        seen = [repr(event.error) + str(getattr(event.error, "details", "")) for event in watcher.events if event.error]
        assert not [text for text in (*seen, repr(caught.value), str(caught.value.details)) if KEY[:8] in text]

    def test_secret_in_an_emitted_event(self, both: Any, watcher: Any) -> None:
        def retried(request: Any) -> str:
            request.call.emit("retry", attempt=1, delay=0.0, error=ConnectionFailed(f"denied to {KEY}"))
            return "fine"

        assert both.connect(Echo([retried]), model=MODEL, plugins=[watcher], api_key=KEY).chat("x").text == "fine"
        error = watcher.last("retry").error
        assert ("denied to" in str(error), KEY in repr(error)) == (True, False)
