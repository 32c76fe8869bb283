"""Limits of policies: merged, applied to the request, and held as slots until the call ends."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from plain import PlainEcho

import graftage
from graftage._engine.slots import Slots
from graftage.exceptions import (
    ConnectionFailed,
    ModelNotFound,
    Overloaded,
    PluginError,
    ProviderTimeout,
    RequestRejected,
    ResourceLimitExceeded,
)
from graftage.hookspecs import hookimpl
from graftage.testing import Echo, Pause
from graftage.types import NEVER_APPLIES, Chunk, Limits, ModelInfo

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from graftage.calls import LimitsQuery

MODEL = "m:1"
END = Chunk(finish_reason="stop")


class Policy:
    """Returns the given result, and records its queries."""

    def __init__(
        self, answer: Limits | Exception | Callable[[LimitsQuery], Limits | None] | None, name: str = "policy"
    ) -> None:
        self.name = name
        self.answer = answer
        self.queries: list[LimitsQuery] = []

    @hookimpl
    def resource_limits(self, query: LimitsQuery) -> Limits | None:
        self.queries.append(query)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer(query) if callable(self.answer) else self.answer


def held(*, then: Any = "free") -> tuple[Echo, Pause]:
    """Return a provider whose first reply is held; later ones are not."""
    pause = Pause()
    return Echo([[Chunk(text="a"), pause, END], then, then, then]), pause


def until(truth: Callable[[], bool]) -> None:
    """Wait for another thread."""
    end = time.monotonic() + 5
    while not truth():
        assert time.monotonic() < end
        time.sleep(0.001)


class TestClamping:
    def test_tightest_value_wins_with_its_reason(self, both: Any) -> None:
        echo = Echo()
        one = Policy(Limits(context_window=4096, max_tokens=10, reasons={"context_window": "16 GB"}), "one")
        two = Policy(Limits(context_window=2048, max_tokens=50, reasons={"context_window": "hot"}), "two")
        reply = both.connect(echo, model=MODEL, plugins=[one, two, Policy(None, "three")]).chat("x")
        assert (echo.requests[0].context_window, echo.requests[0].max_tokens) == (2048, 10)
        assert (reply.limits.context_window, reply.limits.max_tokens) == (2048, 10)
        assert reply.limits.reasons == {"context_window": "two: hot", "max_tokens": "one: no reason given"}

    def test_unset_field_takes_the_limit(self, both: Any) -> None:
        echo = Echo()
        policy = Policy(Limits(context_window=2048, max_tokens=7, keep_alive=60.0))
        reply = both.connect(echo, model=MODEL, plugins=[policy]).chat("x")
        request = echo.requests[0]
        assert (request.context_window, request.max_tokens, request.keep_alive) == (2048, 7, 60.0)
        assert reply.warnings == ()

    def test_set_field_is_lowered_with_a_warning(self, both: Any) -> None:
        echo = Echo()
        policy = Policy(Limits(context_window=2048, reasons={"context_window": "16 GB"}), "m4")
        reply = both.connect(echo, model=MODEL, plugins=[policy]).chat("x", context_window=8192)
        assert echo.requests[0].context_window == 2048
        assert reply.warnings == ("`context_window` was lowered from 8192 to 2048 (m4: 16 GB).",)

    def test_field_below_the_limit_stays(self, both: Any) -> None:
        echo = Echo()
        reply = both.connect(echo, model=MODEL, plugins=[Policy(Limits(context_window=2048))]).chat(
            "x", context_window=512
        )
        assert (echo.requests[0].context_window, reply.warnings) == (512, ())

    def test_setting_is_limited_like_an_argument(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL, context_window=8192, plugins=[Policy(Limits(context_window=2048))])
        assert "8192 to 2048" in llm.chat("x").warnings[0]
        assert echo.requests[0].context_window == 2048

    @pytest.mark.parametrize("given", [-1, "-1", math.inf])
    def test_endless_keep_alive_is_lowered(self, both: Any, given: Any) -> None:
        echo = Echo()
        policy = Policy(Limits(keep_alive=300.0))
        reply = both.connect(echo, model=MODEL, plugins=[policy]).chat("x", keep_alive=given)
        assert policy.queries[0].keep_alive == math.inf
        assert echo.requests[0].keep_alive == 300.0
        assert "from inf to 300" in reply.warnings[0]

    def test_zero_keep_alive_is_not_unset(self, both: Any) -> None:
        echo = Echo()
        both.connect(echo, model=MODEL, plugins=[Policy(Limits(keep_alive=300.0))]).chat("x", keep_alive=0)
        assert echo.requests[0].keep_alive == 0.0

    def test_policy_warnings_reach_the_reply(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL, plugins=[Policy(Limits(warnings=("hot",)))])
        assert llm.chat("x").warnings == ("hot",)
        assert llm.embed("x").warnings == ("hot",)

    def test_every_operation_is_limited(self, both: Any) -> None:
        echo = Echo()
        policy = Policy(Limits(context_window=1024, keep_alive=9.0))
        llm = both.connect(echo, model=MODEL, plugins=[policy])
        llm.chat("x")
        list(llm.chat("x", stream=True))
        llm.generate("x")
        llm.embed("x")
        llm.load()
        assert [(each.context_window, each.keep_alive) for each in echo.requests] == [(1024, 9.0)] * 5
        assert [each.operation for each in policy.queries] == ["chat", "chat", "generate", "embed", "load_model"]


def hooks_of(echo: Echo) -> list[str]:
    return [hook for hook, _ in echo.calls[1:]]


class TestQuery:
    """What a policy can learn."""

    def test_has_the_requests_facts(self, both: Any) -> None:
        policy = Policy(None)
        echo = Echo()
        both.connect(echo, model=MODEL, plugins=[policy]).chat(["abc", "de"], max_tokens=5, keep_alive="1m")
        query = policy.queries[0]
        assert (query.operation, query.provider, query.address, query.model) == ("chat", "echo", echo.address, MODEL)
        assert (query.prompt_characters, query.max_tokens, query.keep_alive, query.context_window) == (5, 5, 60.0, None)
        assert (query.adapter, query.in_use()) == (None, {})

    def test_unused_facts_cost_nothing(self, both: Any) -> None:
        echo = Echo()
        both.connect(echo, model=MODEL, plugins=[Policy(None)]).chat("x")
        assert hooks_of(echo) == ["chat"]

    def test_facts_are_fetched_once(self, both: Any) -> None:
        def ask(query: LimitsQuery) -> None:
            for _ in range(3):
                assert query.model_info() is not None
                assert query.loaded_models() is not None

        echo = Echo()
        llm = both.connect(echo, model=MODEL, plugins=[Policy(ask, "one"), Policy(ask, "two")])
        llm.chat("x")
        llm.chat("y")
        assert hooks_of(echo) == ["show_model", "loaded_models", "chat", "loaded_models", "chat"]

    def test_unsupported_facts_are_none(self, both: Any) -> None:
        seen: list[Any] = []
        policy = Policy(lambda query: seen.append((query.model_info(), query.loaded_models())))
        both.connect(Echo(without=["show_model", "loaded_models"]), model=MODEL, plugins=[policy]).chat("x")
        assert seen == [(None, None)]

    def test_missing_model_has_no_facts(self, both: Any) -> None:
        seen: list[Any] = []
        policy = Policy(lambda query: seen.append(query.model_info()))
        echo = Echo(strict=True)
        with pytest.raises(graftage.GraftageError, match=r"no model `no:1`"):
            both.connect(echo, model="no:1", plugins=[policy]).chat("x")
        assert seen == [None]

    @pytest.mark.parametrize("ask", ["model_info", "loaded_models"])
    def test_dead_server_is_a_connection_failure(self, both: Any, ask: str) -> None:
        gone = ConnectionFailed("gone")
        echo = Echo([gone], errors={"show_model": gone, "loaded_models": gone})
        policy = Policy(lambda query: getattr(query, ask)() and None)
        with pytest.raises(ConnectionFailed):
            both.connect(echo, model=MODEL, plugins=[policy]).chat("x")


class TestPolicyFaults:
    def test_failing_policy_is_named(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL, plugins=[Policy(ValueError("burst"), "m4")])
        with pytest.raises(PluginError, match=r"`m4`.*ValueError: burst.*GRAFTAGE_DISABLED_PLUGINS") as caught:
            llm.chat("x")
        assert caught.value.plugin == "m4"
        assert isinstance(caught.value.__cause__, ValueError)
        assert echo.requests == []
        assert llm.stats().running == 0

    @pytest.mark.parametrize("answer", ["none", 5, {"context_window": 5}])
    def test_wrong_result_names_the_policy(self, both: Any, answer: Any) -> None:
        echo = Echo()
        with pytest.raises(PluginError, match="m4") as caught:
            both.connect(echo, model=MODEL, plugins=[Policy(lambda _: answer, "m4")]).chat("x")
        assert caught.value.plugin == "m4"
        assert echo.requests == []

    @pytest.mark.parametrize(
        "figures",
        [
            {"context_window": -5},
            {"keep_alive": math.nan},
            {"concurrent_requests": "x"},
            {"max_tokens": True},
            {"unload": "abc"},
            {"wait_for": (5,)},
        ],
        ids=str,
    )
    def test_wrong_number_names_the_policy(self, both: Any, figures: dict[str, Any]) -> None:
        echo = Echo()
        with pytest.raises(PluginError, match=rf"`m4` failed.*{next(iter(figures))}"):
            both.connect(echo, model=MODEL, plugins=[Policy(lambda _: Limits(**figures), "m4")]).chat("x")
        assert echo.requests == []

    def test_refusal_passes_and_names_the_policy(self, both: Any) -> None:
        refusal = ResourceLimitExceeded("no room", limit="context_window", value=512, reason="0.3 GB free")
        llm = both.connect(Echo(), model=MODEL, plugins=[Policy(refusal, "m4")])
        with pytest.raises(ResourceLimitExceeded) as caught:
            llm.chat("x")
        error = caught.value
        assert (error.limit, error.value, error.plugin, error.reason) == ("context_window", 512, "m4", "0.3 GB free")
        assert llm.stats().running == 0

    def test_run_outside_the_event_loop(self) -> None:
        async def main() -> bool:
            threads: list[int] = []
            policy = Policy(lambda _: threads.append(threading.get_ident()))
            async with graftage.connect_async(Echo(), model=MODEL, plugins=[policy]) as llm:
                await llm.chat("x")
            return threads[0] != threading.get_ident()

        assert asyncio.run(main())

    def test_policy_that_hangs_meets_the_deadline(self, both: Any) -> None:
        echo, hanging = Echo(), threading.Event()

        def hang(query: LimitsQuery) -> None:
            if query.prompt_characters != 1:
                hanging.wait()

        llm = both.connect(echo, model=MODEL, plugins=[Policy(hang, "slow")])
        try:
            with pytest.raises(ProviderTimeout, match=r"`slow` did not answer within 0\.2 s") as caught:
                llm.chat("long", timeout=0.2)
            assert (caught.value.phase, echo.requests) == ("total", [])
            assert llm.chat("x").text == "x"
            assert llm.stats().running == 0
        finally:
            hanging.set()

    @pytest.mark.parametrize("error", [TimeoutError("mine"), StopIteration("mine")], ids=repr)
    def test_own_timeout_error_is_a_fault(self, both: Any, error: Exception) -> None:
        with pytest.raises(PluginError, match="`odd` failed with"):
            both.connect(Echo(), model=MODEL, plugins=[Policy(error, "odd")]).chat("x")


class TestUnloading:
    def test_named_models_go_before_the_request(self, both: Any) -> None:
        echo = Echo()
        plugins = [Policy(Limits(unload=("a:1", "b:1")), "one"), Policy(Limits(unload=("b:1", "c:1")), "two")]
        both.connect(echo, model=MODEL, plugins=plugins).chat("x")
        unloaded = [request.model for hook, request in echo.calls if "unload_model" in hook]
        assert sorted(unloaded) == ["a:1", "b:1", "c:1"]
        assert "chat" in echo.calls[-1][0]

    def test_missing_model_is_passed_over(self, both: Any) -> None:
        echo = Echo(errors={"unload_model": ModelNotFound("it was deleted")})
        llm = both.connect(echo, model=MODEL, plugins=[Policy(Limits(unload=("deleted:1",)))])
        assert llm.chat("x").text == "x"

    @pytest.mark.parametrize("spelling", ["busy:latest", "Busy", "registry.ollama.ai/library/busy"])
    def test_model_in_use_stays_in_any_spelling(self, both: Any, spelling: str) -> None:
        echo, pause = held()
        policy = Policy(lambda query: Limits(unload=tuple(each.name for each in query.loaded_models() or ())))
        llm = both.connect(echo, model=MODEL, plugins=[policy])
        with llm.chat("x", model=spelling, stream=True):
            llm.chat("y", model="other:1")
        pause.release()
        assert [request.model for hook, request in echo.calls if "unload_model" in hook] == []

    def test_unsupported_unload_is_not_asked(self, both: Any) -> None:
        echo = Echo(without=["unload_model"])
        llm = both.connect(echo, model=MODEL, plugins=[Policy(Limits(unload=("a:1",)))])
        assert llm.chat("x").text == "x"

    def test_models_in_use_are_counted(self, both: Any) -> None:
        echo, pause = held()
        policy = Policy(None)
        llm = both.connect(echo, model=MODEL, plugins=[policy])
        with llm.chat("x", stream=True):
            llm.chat("y", model="other:1")
            assert policy.queries[-1].in_use() == {MODEL: 1}
        pause.release()
        assert policy.queries[-1].in_use() == {}


def only_one(query: LimitsQuery) -> Limits:
    """Allow one model at a time: wait until the others are idle, then unload them."""
    others = tuple(each.name for each in query.loaded_models() or () if each.name != query.model)
    return Limits(wait_for=others, unload=others)


class TestAdmission:
    def test_one_request_is_decided_at_a_time(self, both: Any) -> None:
        inside, most, lock = [0], [0], threading.Lock()

        def look(query: LimitsQuery) -> None:
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.002)
            with lock:
                inside[0] -= 1

        llm = both.connect(Echo(), model=MODEL, plugins=[Policy(look)])
        assert both.together([lambda: llm.chat("x").text] * 12) == ["x"] * 12
        assert most == [1]

    def test_waiting_request_uses_its_model(self, both: Any) -> None:
        echo, pause = held()
        policy = Policy(None)
        llm = both.opened(echo, model=MODEL, concurrency=1, plugins=[policy])
        with llm.chat("x", stream=True):
            waiting = both.start(llm.chat, "y", model="other:1")
            until(lambda: llm.stats().waiting == 1)
            assert policy.queries[-1].in_use() == {MODEL: 1, "other:1": 1}
            pause.release()
        waiting.result(5)
        assert policy.queries[-1].in_use() == {}

    def test_waits_for_models_then_unloads_them(self, both: Any) -> None:
        echo, pause = held()
        llm = both.opened(echo, model="a:1", plugins=[Policy(only_one)])
        stream = llm.chat("x", stream=True)
        second = both.start(llm.chat, "y", model="b:1")
        until(lambda: llm.stats().waiting == 1)
        assert [hook for hook, _ in echo.calls if "unload" in hook] == []
        pause.release()
        list(stream)
        assert second.result(5).model == "b:1"
        assert [request.model for hook, request in echo.calls if "unload" in hook] == ["a:1"]
        assert list(echo.loaded) == ["b:1"]

    def test_policy_is_asked_again_after_a_change(self, both: Any) -> None:
        echo, pause = held()
        streams: list[Any] = []

        def careful(query: LimitsQuery) -> Limits:
            busy = tuple(each for each in query.in_use() if each != query.model)
            if busy:  # Its stream ends at this moment.
                pause.release()
                list(streams.pop())
                return Limits(wait_for=busy)
            idle = tuple(each.name for each in query.loaded_models() or () if each.name != query.model)
            return Limits(unload=idle)

        llm = both.opened(echo, model="a:1", plugins=[Policy(careful)])
        streams.append(llm.chat("x", stream=True))
        assert llm.chat("y", model="b:1").model == "b:1"
        assert list(echo.loaded) == ["b:1"]

    def test_call_from_a_policy_is_refused(self, both: Any) -> None:
        llm: Any = None

        def selfish(query: LimitsQuery) -> None:
            if query.prompt_characters == 1:
                llm.chat("should I?")

        llm = both.connect(Echo(), model=MODEL, plugins=[Policy(selfish)])
        with pytest.raises(RequestRejected, match="decides about"):
            llm.chat("x", timeout=30)
        assert llm.chat("another").text == "another"

    def test_health_check_is_admitted_like_chat(self, both: Any) -> None:
        echo = Echo()
        policy = Policy(Limits(context_window=512))
        llm = both.connect(echo, model=MODEL, plugins=[policy])
        assert llm.health("answers").ok
        assert echo.requests[-1].context_window == 512
        policy.answer = ResourceLimitExceeded("no room", limit="memory", value=1)
        health = llm.health("answers", max_age=0)
        assert (health.reachable, health.answers, type(health.error)) == (True, False, ResourceLimitExceeded)
        assert echo.requests[-1].level == "model_loaded"
        assert llm.health("api").ok

    def test_wait_for_a_model_ends_in_time(self, both: Any) -> None:
        echo, pause = held()
        llm = both.opened(echo, model="a:1", plugins=[Policy(only_one)])
        with llm.chat("x", stream=True):
            with pytest.raises(ProviderTimeout):
                llm.chat("y", model="b:1", timeout=0.05)
            assert (llm.stats().waiting, llm.stats().running) == (0, 1)
        pause.release()
        assert llm.chat("z", model="b:1").model == "b:1"

    def test_cancelled_wait_leaves_no_trace(self) -> None:
        async def main() -> None:
            echo, _ = held()
            async with graftage.connect_async(echo, model="a:1", plugins=[Policy(only_one)]) as llm:
                for steps in range(12):
                    stream = await llm.chat("x", stream=True)
                    waiting = asyncio.create_task(llm.chat("y", model="b:1"))
                    while llm.stats().waiting < 1:
                        await asyncio.sleep(0.001)
                    waiting.cancel()
                    for _ in range(steps):
                        await asyncio.sleep(0)
                    await stream.aclose()
                    with pytest.raises(asyncio.CancelledError):
                        await waiting
                    assert (llm.stats().running, llm.stats().waiting) == (0, 0)
                    echo._script.appendleft([Chunk(text="a"), Pause(), END])

        asyncio.run(main())


class TestForce:
    def test_overrides_a_refusal_with_a_warning(self, both: Any) -> None:
        refusal = ResourceLimitExceeded("no room", limit="context_window", reason="0.3 GB free")
        policy = Policy(refusal, "m4")
        llm = both.connect(Echo(), model=MODEL, plugins=[policy])
        for reply in (llm.chat("x", force=True), llm.generate("x", force=True), llm.embed("x", force=True)):
            assert reply.warnings == ("`force` overrode a refusal of the policy `m4`: no room",)
        llm.load(force=True)
        assert all(query.force for query in policy.queries)
        with pytest.raises(ResourceLimitExceeded):
            llm.chat("x")

    def test_keeps_the_callers_values(self, both: Any) -> None:
        echo = Echo()
        policy = Policy(Limits(context_window=2048, keep_alive=60.0, reasons={"context_window": "16 GB"}), "m4")
        reply = both.connect(echo, model=MODEL, plugins=[policy]).chat("x", context_window=8192, force=True)
        assert (echo.requests[0].context_window, echo.requests[0].keep_alive) == (8192, 60.0)
        assert reply.warnings == ("`context_window` stays at 8192 by `force`, above 2048 (m4: 16 GB).",)


class TestLoadedWindow:
    def test_smaller_window_is_raised_with_a_warning(self, both: Any) -> None:
        echo = Echo()
        policy = Policy(Limits(context_window=8192, keep_window=True), "m4")
        reply = both.connect(echo, model=MODEL, plugins=[policy]).chat("x", context_window=2048)
        assert echo.requests[0].context_window == 8192
        assert reply.warnings == ("`context_window` was raised from 2048 to 8192: the model is loaded with it.",)
        forced = both.connect(echo, model=MODEL, plugins=[policy]).chat("x", context_window=2048, force=True)
        assert (echo.requests[-1].context_window, forced.warnings) == (2048, ())

    def test_equal_window_gives_no_warning(self, both: Any) -> None:
        policy = Policy(Limits(context_window=8192), "m4")
        assert both.connect(Echo(), model=MODEL, plugins=[policy]).chat("x", context_window=8192).warnings == ()


def test_queue_for_a_decision_is_bounded(both: Any) -> None:
    echo, pause = held()

    def strict(query: LimitsQuery) -> Limits:
        return replace(only_one(query), queued_requests=1)

    llm = both.opened(echo, model="a:1", plugins=[Policy(strict)])
    stream = llm.chat("x", stream=True)
    first = both.start(llm.chat, "y", model="b:1")
    until(lambda: llm.stats().waiting == 1)
    second = both.start(llm.chat, "z", model="b:1")
    until(lambda: llm.stats().waiting == 2)
    with pytest.raises(Overloaded):
        llm.chat("w", model="b:1")
    pause.release()
    list(stream)
    assert [first.result(5).model, second.result(5).model] == ["b:1", "b:1"]


class TestSlots:
    @pytest.mark.parametrize("other", ["http://localhost:11434", "http://[::1]:11434"])
    def test_loopback_names_share_slots(self, both: Any, other: str) -> None:
        pause = Pause()
        first = Echo([[Chunk(text="a"), pause, END]], address="http://127.0.0.1:11434")
        llm = both.connect(first, model=MODEL, concurrency=1)
        same = both.connect(Echo(address=other), model=MODEL, concurrency=1)
        with llm.chat("x", stream=True), pytest.raises(ProviderTimeout):
            same.chat("y", timeout=0.05)
        pause.release()
        assert same.chat("z").text == "z"

    def test_slot_is_held_until_the_stream_ends(self, both: Any) -> None:
        echo, pause = held()
        llm = both.connect(echo, model=MODEL, concurrency=1)
        stream = llm.chat("x", stream=True)
        second = both.start(llm.chat, "y")
        until(lambda: llm.stats().waiting == 1)
        assert len(echo.requests) == 1
        pause.release()
        assert [chunk.text for chunk in stream] == ["a", ""]
        assert second.result(5).text == "free"

    @pytest.mark.parametrize("by", ["setting", "policy"])
    def test_concurrent_calls_are_bounded(self, both: Any, by: str) -> None:
        running, most, lock = [0], [0], threading.Lock()

        def busy(_: Any) -> str:
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            time.sleep(0.002)
            with lock:
                running[0] -= 1
            return "ok"

        how: dict[str, Any] = (
            {"concurrency": 2} if by == "setting" else {"plugins": [Policy(Limits(concurrent_requests=2))]}
        )
        # Plain hooks, so that calls run at the same time in both modes.
        echo = PlainEcho([busy] * 12)
        llm = both.connect(echo, model=MODEL, **how)
        assert [reply.text for reply in both.together([lambda: llm.chat("x")] * 12)] == ["ok"] * 12
        assert 1 <= most[0] <= 2

    def test_tighter_of_setting_and_policy_holds(self, both: Any) -> None:
        policy = Policy(Limits(concurrent_requests=3, reasons={"concurrent_requests": "hot"}), "m4")
        loose = both.connect(Echo(), model=MODEL, concurrency=8, plugins=[policy]).chat("x").limits
        assert (loose.concurrent_requests, loose.reasons["concurrent_requests"]) == (3, "m4: hot")
        tight = both.connect(Echo(), model=MODEL, concurrency=1, plugins=[policy]).chat("x").limits
        assert (tight.concurrent_requests, tight.reasons["concurrent_requests"]) == (1, "settings: `concurrency`")

    def test_clients_of_one_server_share_slots(self, both: Any) -> None:
        address = f"shared {both.mode}"
        pause = Pause()
        one = Echo([[Chunk(text="a"), pause, END]], address=address)
        two = Echo(["second"], address=address)
        first = both.connect(one, model=MODEL, concurrency=1)
        second = both.opened(two, model=MODEL, concurrency=1)
        stream = first.chat("x", stream=True)
        waiting = both.start(second.chat, "y")
        until(lambda: second.stats().waiting == 1)
        assert two.requests == []
        pause.release()
        list(stream)
        assert waiting.result(5).text == "second"

    def test_another_server_has_its_own_slots(self, both: Any) -> None:
        echo, pause = held()
        first = both.connect(echo, model=MODEL, concurrency=1)
        with first.chat("x", stream=True):
            assert both.connect(Echo(["other"]), model=MODEL, concurrency=1).chat("y").text == "other"
        pause.release()

    def test_sync_and_async_clients_share_slots(self) -> None:
        pause = Pause()
        one = Echo([[Chunk(text="a"), pause, END]], address="sync and async")
        stream = graftage.connect(one, model=MODEL, concurrency=1).chat("x", stream=True)

        async def main() -> str:
            two = Echo(["second"], address="sync and async")
            async with graftage.connect_async(two, model=MODEL, concurrency=1) as llm:
                task = asyncio.create_task(llm.chat("y"))
                while not llm.stats().waiting:
                    await asyncio.sleep(0.001)
                pause.release()
                await asyncio.to_thread(list, stream)
                return (await task).text

        assert asyncio.run(main()) == "second"

    def test_first_come_first_served(self, both: Any) -> None:
        echo, pause = held(then=lambda request: request.messages[0].content)
        llm = both.connect(echo, model=MODEL, concurrency=1)
        stream = llm.chat("first", stream=True)
        others = []
        for number in range(1, 4):
            others.append(both.start(llm.chat, f"number {number}"))
            until(lambda number=number: llm.stats().waiting == number)  # type: ignore[misc] # mypy cannot infer a default
        pause.release()
        list(stream)
        for each in others:
            each.result(5)
        assert [request.messages[0].content for request in echo.requests[1:]] == ["number 1", "number 2", "number 3"]

    def test_full_queue_refuses_at_once(self, both: Any) -> None:
        echo, pause = held()
        llm = both.connect(echo, model=MODEL, plugins=[Policy(Limits(concurrent_requests=1, queued_requests=1))])
        stream = llm.chat("x", stream=True)
        waiting = both.start(llm.chat, "y")
        until(lambda: llm.stats().waiting == 1)
        with pytest.raises(Overloaded, match="queued_requests") as caught:
            llm.chat("z")
        assert caught.value.retryable
        pause.release()
        list(stream)
        assert waiting.result(5).text == "free"
        assert llm.stats().running == 0

    def test_wait_for_a_slot_ends_in_time(self, both: Any) -> None:
        echo, pause = held()
        llm = both.connect(echo, model=MODEL, concurrency=1)
        with llm.chat("x", stream=True):
            with pytest.raises(ProviderTimeout, match="slot") as caught:
                llm.chat("y", timeout=0.01)
            assert caught.value.phase == "total"
            assert (llm.stats().waiting, len(echo.requests)) == (0, 1)
        pause.release()
        assert llm.chat("z").text == "free"

    @pytest.mark.parametrize("operation", ["embed", "load", "generate"])
    def test_every_model_operation_takes_a_slot(self, both: Any, operation: str) -> None:
        echo, pause = held()
        llm = both.connect(echo, model=MODEL, concurrency=1)
        act: dict[str, Callable[[], Any]] = {
            "embed": lambda: llm.embed("x", timeout=0.01),
            "load": lambda: llm.load(timeout=0.01),
            "generate": lambda: llm.generate("x", timeout=0.01),
        }
        with llm.chat("x", stream=True):
            with pytest.raises(ProviderTimeout, match="slot"):
                act[operation]()
            assert llm.health().ok
            assert llm.models()
        pause.release()

    def test_zero_slots_count_as_one(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL, plugins=[Policy(Limits(concurrent_requests=0))])
        assert llm.chat("x", timeout=5).text == "x"

    def test_error_after_admission_frees_the_slot(self, both: Any) -> None:
        echo = Echo(
            [KeyError("k"), [KeyError("k")], "free"], errors={"embed": KeyError("k"), "load_model": KeyError("k")}
        )
        llm = both.connect(echo, model=MODEL, concurrency=1)
        for act in (lambda: llm.chat("x"), lambda: llm.chat("x"), lambda: llm.embed("x"), llm.load):
            with pytest.raises(graftage.GraftageError):
                act()
        assert llm.chat("x", timeout=5).text == "free"


def test_model_facts_may_decide(both: Any) -> None:
    def by_size(query: LimitsQuery) -> Limits:
        info = query.model_info()
        return Limits(context_window=1024 if info and (info.size or 0) > 100 else None)

    echo = Echo(models=[ModelInfo(name="big:1", size=1000), ModelInfo(name="small:1", size=1)])
    llm = both.connect(echo, model="big:1", plugins=[Policy(by_size)])
    llm.chat("x")
    llm.chat("x", model="small:1")
    chats = [request.context_window for hook, request in echo.calls if hook == "chat"]
    assert chats == [1024, None]


class SlotsMachine(RuleBasedStateMachine):
    """Callers arrive with their own limits, are served, leave, or give up."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots()
        self.line: list[tuple[Future[None], int | None]] = []
        self.inside: list[Future[None]] = []

    def settle(self) -> None:
        """Move the callers that were let in; they must be the first of the line."""
        let_in = [granted for granted, _ in self.line if granted.done()]
        assert let_in == [granted for granted, _ in self.line[: len(let_in)]]
        self.line = self.line[len(let_in) :]
        self.inside += let_in

    @rule(limit=st.one_of(st.none(), st.integers(0, 4)))
    def come(self, limit: int | None) -> None:
        granted = self.slots.enter(limit)
        alone = not self.line
        self.line.append((granted, limit))
        if granted.done():
            assert alone
            assert limit is None or len(self.inside) < max(limit, 1)
        self.settle()

    @rule(limit=st.integers(0, 3), queued=st.integers(0, 3))
    def come_to_a_bounded_line(self, limit: int, queued: int) -> None:
        full = len(self.inside) >= max(limit, 1)
        try:
            self.line.append((self.slots.enter(limit, queued), limit))
        except Overloaded:
            assert full
            assert len(self.line) >= queued
        else:
            assert not full or len(self.line) <= queued
            self.settle()

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.inside.remove(data.draw(st.sampled_from(self.inside)))
        self.slots.leave()
        self.settle()

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.line))
        self.line.remove(entry)
        self.slots.withdraw(entry[0])
        self.settle()

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def give_up_too_late(self, data: st.DataObject) -> None:
        granted = data.draw(st.sampled_from(self.inside))
        self.inside.remove(granted)
        self.slots.withdraw(granted)
        self.settle()

    @invariant()
    def counts_are_true_and_nobody_waits_who_could_run(self) -> None:
        assert self.slots.running == len(self.inside)
        if self.line:
            limit = self.line[0][1]
            assert limit is not None
            assert len(self.inside) >= max(limit, 1)

    def teardown(self) -> None:
        while self.inside or self.line:
            if not self.inside:
                raise AssertionError("a caller was lost in the line")
            self.inside.pop()
            self.slots.leave()
            self.settle()
        assert self.slots.running == 0


TestSlotsInAnyOrder = SlotsMachine.TestCase
TestSlotsInAnyOrder.settings = settings(max_examples=150, stateful_step_count=30)


def test_slots_lose_no_call_under_threads() -> None:
    slots = Slots()
    inside, most, served, lock = [0], [0], [0], threading.Lock()

    def caller(number: int) -> None:
        for turn in range(40):
            granted = slots.enter(3)
            if (number + turn) % 5 == 0:
                slots.withdraw(granted)
                continue
            granted.result(10)
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                served[0] += 1
            with lock:
                inside[0] -= 1
            slots.leave()

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(10)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(20)
    assert (slots.running, inside[0], served[0]) == (0, 0, 320)
    assert most[0] <= 3


def test_policy_that_never_applies_is_asked_once(both: Any) -> None:
    policy = Policy(NEVER_APPLIES)
    llm = both.connect(Echo(), model=MODEL, plugins=[policy])
    assert [llm.chat("x").limits for _ in range(3)] == [None] * 3
    assert len(policy.queries) == 1
