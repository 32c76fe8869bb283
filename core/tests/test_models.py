"""Models: list, load, pull and ensure them, and the health of their server."""

from __future__ import annotations

import math
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from giving import Giving

import graftage
from graftage.calls import EmbedRequest
from graftage.exceptions import (
    CapabilityUnsupported,
    ConnectionFailed,
    ModelNotFound,
    ProviderError,
    RequestRejected,
    StreamInterrupted,
)
from graftage.hookspecs import hookimpl
from graftage.testing import Echo
from graftage.types import (
    LoadedModel,
    ModelInfo,
    PullProgress,
)
from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

MODEL = "m:1"
GONE = ConnectionFailed("gone")


class Listing:
    """A connection that lists models but lacks the requested one."""

    def __init__(self, listed: Any, colour: str) -> None:
        def chat(request: Any) -> Any:
            if request is not None:
                raise ModelNotFound("The server does not have it.", hint="Check its name.")
            yield

        async def chat_async(request: Any) -> Any:
            if request is not None:
                raise ModelNotFound("The server does not have it.", hint="Check its name.")
            yield

        def listed_plain(request: Any) -> Any:
            return listed(request)

        async def listed_async(request: Any) -> Any:
            return listed(request)

        self.chat = hookimpl(chat_async if colour != "plain" else chat)
        self.list_models = hookimpl(listed_async if colour != "plain" else listed_plain)
        self.needs_event_loop = colour == "loop"


def breaking(_: Any) -> Any:
    raise KeyError("k")


LISTS: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "close": (lambda _: (ModelInfo(name="other"), ModelInfo(name="smollm2:135m")), ("smollm2:135m",)),
    "itself": (lambda _: (ModelInfo(name="smolm2"),), ()),
    "nothing": (lambda _: (), ()),
    "fails": (breaking, ()),
    "gives None": (lambda _: None, ()),
    "gives names": (lambda _: ("smollm2",), ()),
}


class TestModels:
    def test_list_show_load_and_unload(self, both: Any) -> None:
        llm = both.connect(Echo(models=["a:1", "b:2"], strict=True), model="a:1")
        assert [each.name for each in llm.models()] == ["a:1", "b:2"]
        assert (llm.show().name, llm.show("b:2").name) == ("a:1", "b:2")
        assert llm.loaded() == ()
        llm.load(context_window=512)
        assert [(type(each), each.name, each.context_window) for each in llm.loaded()] == [(LoadedModel, "a:1", 512)]
        llm.unload()
        assert llm.loaded() == ()
        with pytest.raises(ModelNotFound):
            llm.show("c")

    def test_calls_do_not_list_them(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL)
        llm.chat("x")
        llm.generate("x")
        llm.embed("x")
        assert [hook for hook, _ in echo.calls] == ["connect", "chat", "generate", "embed"]

    def test_embedding_model_loads_by_embed(self, both: Any) -> None:
        echo = Echo(errors={"load_model": CapabilityUnsupported("It does not generate.")})
        both.connect(echo, model=MODEL, keep_alive=60, context_window=512).load()
        (embed,) = (each for each in echo.requests if isinstance(each, EmbedRequest))
        assert (embed.keep_alive, embed.context_window) == (60.0, 512)

    def test_first_load_error_is_raised(self, both: Any) -> None:
        refusals = {name: CapabilityUnsupported(f"It has no {name}.") for name in ("load_model", "embed")}
        with pytest.raises(CapabilityUnsupported, match="load_model"):
            both.connect(Echo(errors=refusals), model=MODEL).load()

    def test_missing_one_suggests_close_names(self, both: Any) -> None:
        llm = both.connect(Echo(strict=True, models=["llama3.2:latest"]), model=MODEL)
        with pytest.raises(ModelNotFound) as caught:
            llm.chat("x", model="llama3")
        error = caught.value
        assert (error.provider, error.model, error.operation, error.status) == ("echo", "llama3", "chat", 404)
        assert error.suggestions == ("llama3.2:latest",)
        assert not error.retryable

    @pytest.mark.parametrize("colour", ["plain", "async", "loop"])
    @pytest.mark.parametrize("case", LISTS)
    def test_any_listing_gives_suggestions(self, both: Any, case: str, colour: str) -> None:
        listed, close = LISTS[case]
        llm = both.connect(Giving(lambda _: Listing(listed, colour)), model="smolm2")
        with pytest.raises(ModelNotFound) as caught:
            llm.chat("x")
        assert caught.value.suggestions == close
        assert caught.value.hint == (f"Did you mean `{close[0]}`?" if close else "Check its name.")

    def test_suggestions_keep_the_deadline(self, both: Any) -> None:
        never = threading.Event()
        llm = both.connect(Giving(lambda _: Listing(lambda _: never.wait(30), "plain")), model="smolm2")
        try:
            with pytest.raises(ModelNotFound) as caught:
                llm.chat("x", timeout=0.05)
        finally:
            never.set()
        assert caught.value.suggestions == ()


class Halting(Echo):
    """A provider whose downloads have the given steps."""

    def __init__(self, steps: list[PullProgress]) -> None:
        super().__init__()
        self.steps = steps

    @hookimpl
    def connect(self, request: Any) -> object:
        steps = self.steps

        class Connection(type(super().connect(request))):  # type: ignore[misc] # pulls the given steps
            @hookimpl
            async def pull_model(self, request: Any) -> AsyncIterator[PullProgress]:
                for step in steps:
                    yield step

        return Connection(self)


class HostStop(Exception):
    """The user pressed stop."""


class TestPull:
    def test_reports_progress(self, both: Any) -> None:
        steps: list[PullProgress] = []
        llm = both.connect(Echo(strict=True), model="new")
        last = llm.pull(on_progress=steps.append)
        assert last.status == "success"
        assert steps[-1] is last
        assert [each.completed for each in steps if each.digest] == [0, 500_000, 1_000_000]
        assert llm.show().name == "new:latest"

    def test_total_limit_is_optional(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL, timeouts={"total": 1, "idle": 5})
        llm.pull()
        llm.pull(timeout=30)
        unbounded, bounded = (each.call for each in echo.requests)
        assert (unbounded.deadline, unbounded.timeouts.idle) == (math.inf, 5)
        assert bounded.deadline < math.inf

    @pytest.mark.parametrize("steps", [[], [PullProgress(status="pulling")]])
    def test_early_end_is_an_interruption(self, both: Any, steps: list[PullProgress]) -> None:
        llm = both.connect(Halting(steps), model=MODEL)
        with pytest.raises(StreamInterrupted, match="Pull again"):
            llm.pull()
        assert llm.stats().running == 0

    def test_callback_error_ends_it(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL)

        def stop(progress: PullProgress) -> None:
            raise HostStop(progress.status)

        with pytest.raises(HostStop):
            llm.pull(on_progress=stop)
        assert llm.stats().running == 0

    def test_runs_one_at_a_time(self, both: Any) -> None:
        steps = [PullProgress(status="a"), PullProgress(status="success")]
        llm = both.connect(Halting(steps), model=MODEL)
        inside, most = [0], [0]

        def step(progress: PullProgress) -> None:
            if progress.status == "a":
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.002)
            else:
                inside[0] -= 1

        outcomes = both.together([lambda: llm.pull(on_progress=step).status] * 6)
        assert outcomes == ["success"] * 6
        assert most == [1]

    def test_nested_pull_is_refused(self) -> None:
        with graftage.connect(Echo(strict=True), model="new") as llm:

            def again(_: PullProgress) -> None:
                llm.pull()

            with pytest.raises(RequestRejected, match="would wait for ever"):
                llm.pull(on_progress=again)
            assert llm.pull().status == "success"

    def test_clears_known_facts(self, both: Any) -> None:
        echo = Echo(["ok"], models=[ModelInfo(name="plain:1", features=frozenset({"chat"}))])
        llm = both.connect(echo, model="plain:1")
        llm.show()
        llm.pull()
        assert llm.chat("x", tools=[{"name": "f"}]).text == "ok"


class TestEnsure:
    def test_pulls_only_what_is_missing(self, both: Any) -> None:
        echo = Echo(strict=True, models=["here:1"])
        llm = both.connect(echo, model="here:1")
        assert llm.ensure().name == "here:1"
        assert not any("pull" in hook for hook, _ in echo.calls)
        steps: list[PullProgress] = []
        assert llm.ensure("new", on_progress=steps.append).name == "new:latest"
        assert steps[-1].status == "success"

    def test_follows_the_policy(self, both: Any) -> None:
        echo = Echo(strict=True, models=["here:1"])
        llm = both.connect(echo, model="here:1")
        with pytest.raises(ModelNotFound):
            llm.ensure("new", policy="never")
        assert not any("pull" in hook for hook, _ in echo.calls)
        llm.ensure(policy="always")
        assert any("pull" in hook for hook, _ in echo.calls)

    def test_outage_is_not_a_missing_model(self, both: Any) -> None:
        echo = Echo(errors={"show_model": GONE})
        with pytest.raises(ConnectionFailed):
            both.connect(echo, model=MODEL).ensure()
        assert not any("pull" in hook for hook, _ in echo.calls)

    def test_raises_if_pull_brings_nothing(self, both: Any) -> None:
        echo = Halting([PullProgress(status="success")])
        echo.strict = True
        with pytest.raises(ModelNotFound):
            both.connect(echo, model="new").ensure()


class TestHealth:
    @pytest.mark.parametrize(("status", "fresh", "stale"), [(200, 4.9, 5.1), (500, 0.9, 1.1)])
    def test_failures_are_remembered_less(
        self, both: Any, monkeypatch: pytest.MonkeyPatch, status: int, fresh: float, stale: float
    ) -> None:
        with FakeOllama() as fake:
            fake.script("/api/version", *[Answer([b'{"version":"0.9.3"}'], status=status, framing="length")] * 2)
            llm = both.connect("ollama", host=fake.url, attempts=1)
            now = [1000.0]
            monkeypatch.setattr("graftage._engine.health.time", SimpleNamespace(monotonic=lambda: now[0]))
            first = llm.health()
            now[0] += fresh
            second = llm.health()
            now[0] += stale - fresh
            third = llm.health()
            assert [each.cached for each in (first, second, third)] == [False, True, False]
            assert second.age == pytest.approx(fresh)
            assert [each.ok for each in (first, second, third)] == [status == 200] * 3
            assert len(fake.requests) == 2

    def test_failed_call_clears_the_memory(self, both: Any) -> None:
        gate = threading.Event()
        with FakeOllama() as fake:
            fake.script("/api/version", Answer([gate, {"version": "0.9.3"}]))
            fake.script("/api/chat", Answer([b"odd"], status=400, framing="length"))
            llm = both.connect("ollama", model="smollm2:135m", host=fake.url, attempts=1)
            checking = both.start(llm.health)
            while not fake.requests:
                assert not checking.done()
                time.sleep(0.001)
            with pytest.raises(ProviderError):
                llm.chat("x")
            gate.set()
            assert checking.result(10).ok
            assert not llm.health().cached
            assert llm.health().cached
            fake.script("/api/chat", Answer([b"odd"], status=400, framing="length"))
            with pytest.raises(ProviderError):
                llm.chat("x")
            assert not llm.health().cached

    @pytest.mark.parametrize("level", ["model", "", 3])
    def test_unknown_levels_are_refused(self, both: Any, level: Any) -> None:
        echo = Echo()
        with pytest.raises(RequestRejected, match="model_present"):
            both.connect(echo, model=MODEL).health(level)
        assert echo.requests == []
