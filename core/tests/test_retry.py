"""Retries: only safe ones, never past a limit, with the original error at the end."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import graftage.exceptions
from graftage import retry
from graftage._engine.awaiting import AwaitingIO
from graftage._engine.driving import drive
from graftage.calls import Budget, Call
from graftage.exceptions import (
    ConnectionFailed,
    GraftageError,
    InferenceFailed,
    ModelLoadFailed,
    ModelNotFound,
    Overloaded,
    ProviderError,
    ProviderTimeout,
    RequestRejected,
)
from graftage.retry import DEFAULT_POLICY, RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Callable

GONE = ConnectionFailed("gone")
EXTRAS: dict[str, dict[str, Any]] = {
    "ProviderTimeout": {"phase": "idle"},
    "ModelLoadFailed": {"reason": "memory"},
    "ResourceLimitExceeded": {"limit": "keep_alive"},
}


class Server:
    """A server with the given failures before its answer."""

    def __init__(self, *failures: BaseException) -> None:
        self.failures = list(failures)
        self.asked = 0

    async def ask(self) -> str:
        self.asked += 1
        if self.failures:
            raise self.failures.pop(0)
        return "answer"


@pytest.fixture(params=["sync", "async"])
def attempt(request: pytest.FixtureRequest) -> Callable[..., str]:
    """`retry.call` as the sync or the async client runs it."""

    def blocking(server: Server, of: Call, **more: Any) -> str:
        return drive(retry.call(server.ask, of, **more))

    def awaiting(server: Server, of: Call, **more: Any) -> str:
        return asyncio.run(retry.call(server.ask, replace(of, waiting=AwaitingIO()), **more))

    return blocking if request.param == "sync" else awaiting


def built(kind: type[GraftageError], **more: Any) -> Any:
    return kind("x", **EXTRAS.get(kind.__name__, {}), **more)


KINDS = [
    kind
    for kind in vars(graftage.exceptions).values()
    if isinstance(kind, type) and issubclass(kind, GraftageError) and kind.__module__ == "graftage.exceptions"
]


class TestWhatIsRetried:
    def test_safe_failures_are(self, attempt: Callable[..., str]) -> None:
        server = Server(GONE, GONE)
        assert attempt(server, Call()) == "answer"
        assert server.asked == 3

    def test_last_error_is_raised_with_attempts(self, attempt: Callable[..., str]) -> None:
        errors = [ConnectionFailed(f"gone {number}") for number in range(3)]
        server = Server(*errors)
        with pytest.raises(ConnectionFailed) as caught:
            attempt(server, Call(attempts=3))
        assert caught.value is errors[2]
        assert (caught.value.attempts, server.asked) == (3, 3)

    @pytest.mark.parametrize("attempts", [1, 2, 5])
    def test_attempts_include_the_first(self, attempt: Callable[..., str], attempts: int) -> None:
        server = Server(*[ConnectionFailed("gone") for _ in range(9)])
        with pytest.raises(ConnectionFailed) as caught:
            attempt(server, Call(attempts=attempts))
        assert (caught.value.attempts, server.asked) == (attempts, attempts)

    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
    def test_each_class_declares_it(self, attempt: Callable[..., str], kind: type) -> None:
        error = built(kind)
        server = Server(error)
        if getattr(error, "retryable", False):
            assert attempt(server, Call()) == "answer"
            assert server.asked == 2
        else:
            with pytest.raises(kind):
                attempt(server, Call())
            assert server.asked == 1

    @pytest.mark.parametrize("kind", [k for k in KINDS if issubclass(k, ProviderError)], ids=lambda kind: kind.__name__)
    def test_instance_overrides_its_class(self, attempt: Callable[..., str], kind: type) -> None:
        assert attempt(Server(built(kind, retryable=True)), Call()) == "answer"
        with pytest.raises(kind):
            attempt(Server(built(kind, retryable=False)), Call())

    @pytest.mark.parametrize("error", [ModelNotFound("no"), RequestRejected("no")])
    def test_permanent_errors_are_not(self, attempt: Callable[..., str], error: ProviderError) -> None:
        server = Server(error)
        with pytest.raises(type(error)):
            attempt(server, Call(attempts=9))
        assert (server.asked, error.attempts) == (1, 1)

    @pytest.mark.parametrize("error", [TypeError("mine"), KeyError("k"), OSError("o"), asyncio.CancelledError()])
    @pytest.mark.parametrize("before", [(), (GONE,)], ids=["at once", "after a retry"])
    def test_bugs_and_cancellation_are_not(
        self, attempt: Callable[..., str], error: BaseException, before: tuple[ProviderError, ...]
    ) -> None:
        server = Server(*before, error)
        with pytest.raises(type(error)):
            attempt(server, Call(attempts=9))
        assert server.asked == len(before) + 1

    @pytest.mark.parametrize(
        "error", [InferenceFailed("crash", retryable=True), ModelLoadFailed("x", reason="crashed")]
    )
    def test_crashed_runner_is_retried_once(self, attempt: Callable[..., str], error: ProviderError) -> None:
        server = Server(*[error] * 9)
        with pytest.raises(type(error)):
            attempt(server, Call(attempts=9))
        assert server.asked == 2

    def test_only_connect_timeouts_and_crashes_are(self) -> None:
        phases: list[Any] = ["connect", "first_token", "idle", "total"]
        assert [ProviderTimeout("x", phase=each).retryable for each in phases] == [True, False, False, False]
        reasons: list[Any] = ["memory", "incompatible", "crashed", "timeout"]
        assert [ModelLoadFailed("x", reason=each).retryable for each in reasons] == [False, False, True, False]


class TestDeadline:
    def test_no_attempt_begins_after_it(self, attempt: Callable[..., str]) -> None:
        server = Server(*[GONE] * 9)
        with pytest.raises(ConnectionFailed):
            attempt(server, Call(deadline=time.monotonic() - 1, attempts=9))
        assert server.asked == 1

    @pytest.mark.waits
    def test_no_wait_ends_after_it(self) -> None:
        server = Server(Overloaded("busy", retry_after=50))
        with pytest.raises(Overloaded):
            drive(retry.call(server.ask, Call(deadline=time.monotonic() + 5)))
        assert server.asked == 1

    @pytest.mark.parametrize(
        ("named", "total", "asked"),
        [
            (60, 600, 2),
            (61, 600, 1),
            (3600, 600, 1),
            (86_400, math.inf, 1),
            (9, 10, 2),
            (11, 10, 1),
            (math.nan, 600, 2),
        ],
    )
    def test_longer_retry_after_ends_the_call(
        self, attempt: Callable[..., str], named: float, total: float, asked: int
    ) -> None:
        error = Overloaded("busy", retry_after=named)
        server = Server(error, error)
        with pytest.raises(Overloaded) as caught:
            attempt(server, Call(deadline=time.monotonic() + total, attempts=2))
        assert (caught.value, server.asked, error.attempts) == (error, asked, asked)


class TestBudget:
    def test_limits_retries_of_many_calls(self, attempt: Callable[..., str]) -> None:
        budget = Budget(capacity=10, cost=5, refill=1)
        for expected in (3, 1, 1):
            server = Server(*[ConnectionFailed("gone") for _ in range(9)])
            with pytest.raises(ConnectionFailed):
                attempt(server, Call(attempts=3, budget=budget))
            assert server.asked == expected

    def test_first_attempt_successes_refill_it(
        self,
        attempt: Callable[..., str],
    ) -> None:
        budget = Budget(capacity=5, cost=5, refill=1)
        assert budget.spend()
        assert not budget.spend()
        for _ in range(9):
            attempt(Server(), Call(budget=budget))
        assert budget.spend()
        assert not budget.spend()

    @given(st.lists(st.booleans(), max_size=60))
    def test_stays_within_its_bounds(self, steps: list[bool]) -> None:
        budget = Budget(capacity=12, cost=5, refill=2)
        for spends in steps:
            budget.spend() if spends else budget.earn()
            assert 0 <= budget._tokens <= budget.capacity


class TestPolicy:
    def test_default_waits_are_as_documented(self) -> None:
        policy = DEFAULT_POLICY
        assert [policy.wait(GONE, attempt, 0.0) for attempt in (1, 2, 3)] == [0.1, 0.5, 0.5]
        fault = InferenceFailed("x", retryable=True)
        assert [policy.wait(fault, attempt, 0.0) for attempt in (1, 2, 3, 4, 5)] == [4.0, 4.0, 4.0, 8.0, 10.0]
        assert policy.wait(fault, 1, 1.0) == pytest.approx(4.4)
        assert policy.crash_attempts == 2
        assert Call().attempts == 3

    def test_dead_server_is_reported_within_a_second(self) -> None:
        waits = [DEFAULT_POLICY.wait(GONE, attempt, 1.0) for attempt in (1, 2)]
        assert sum(waits) < 1

    def test_retry_after_is_honoured_and_capped(self) -> None:
        policy = RetryPolicy(retry_after_max=60)
        assert policy.wait(Overloaded("x", retry_after=7), 1, 1.0) == 7
        assert policy.wait(Overloaded("x", retry_after=0), 1, 1.0) == 0
        assert policy.wait(Overloaded("x", retry_after=86_400), 1, 1.0) == 60
        assert policy.wait(Overloaded("x"), 1, 0.0) == 4

    @pytest.mark.parametrize("retry_after", [-5.0, math.nan])
    def test_invalid_retry_after_is_bounded(self, retry_after: float) -> None:
        wait = DEFAULT_POLICY.wait(Overloaded("x", retry_after=retry_after), 1, 0.0)
        assert 0 <= wait <= DEFAULT_POLICY.retry_after_max

    @given(
        attempt=st.integers(1, 50),
        jitter=st.floats(0, 1),
        error=st.sampled_from([GONE, InferenceFailed("x"), Overloaded("x"), None]),
    )
    def test_jitter_only_adds_within_bounds(self, attempt: int, jitter: float, error: Any) -> None:
        least = DEFAULT_POLICY.wait(error, attempt, 0.0)
        assert least <= DEFAULT_POLICY.wait(error, attempt, jitter) <= least * 1.1 + 1e-9 <= 11.1

    @pytest.mark.parametrize("attempts", [2, 3])
    def test_custom_policy_is_followed(self, attempt: Callable[..., str], attempts: int) -> None:
        server = Server(*[InferenceFailed("x", retryable=True)] * 9)
        with pytest.raises(InferenceFailed):
            attempt(server, Call(attempts=9), policy=RetryPolicy(crash_attempts=attempts))
        assert server.asked == attempts


class TestEvents:
    def test_retry_has_attempt_delay_and_error(self, attempt: Callable[..., str]) -> None:
        events: list[tuple[str, dict[str, Any]]] = []
        errors = [ConnectionFailed("one"), ConnectionFailed("two")]
        attempt(Server(*errors), Call(emit=lambda kind, **facts: events.append((kind, facts))))
        assert [kind for kind, _ in events] == ["retry", "retry"]
        assert [(facts["attempt"], facts["error"]) for _, facts in events] == [(1, errors[0]), (2, errors[1])]
        assert all(facts["delay"] >= 0 for _, facts in events)

    def test_no_retry_when_giving_up(self, attempt: Callable[..., str]) -> None:
        events: list[str] = []
        with pytest.raises(ModelNotFound):
            attempt(Server(ModelNotFound("x")), Call(emit=lambda kind, **_: events.append(kind)))
        with pytest.raises(ConnectionFailed):
            attempt(Server(GONE), Call(attempts=1, emit=lambda kind, **_: events.append(kind)))
        assert events == []


class TestWaiting:
    @pytest.mark.waits
    def test_is_skipped_only_inside_no_waiting(self) -> None:
        delays: list[float] = []

        def note(kind: str, **facts: Any) -> None:
            delays.append(facts["delay"])

        quick = RetryPolicy(connection_waits=(0.001,), jitter=0)

        def ask() -> None:
            drive(retry.call(Server(GONE).ask, Call(emit=note), policy=quick))

        ask()
        with retry.no_waiting():
            ask()
            thread = threading.Thread(target=ask)  # Of a host that is tested.
            thread.start()
            thread.join()
        ask()
        assert delays == [0.001, 0.0, 0.0, 0.001]

    @pytest.mark.waits
    def test_can_be_cancelled(self) -> None:
        async def main() -> int:
            server = Server(Overloaded("busy", retry_after=60))
            task = asyncio.create_task(retry.call(server.ask, Call(waiting=AwaitingIO())))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return server.asked

        assert asyncio.run(main()) == 1
