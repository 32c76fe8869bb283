"""Retries: policy as data, only what is safe, never past a limit, and the original error at the end."""

from __future__ import annotations

import asyncio
import math
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
    """Fails as it is told and then answers."""

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
    """`retry.call` in the way of each client, to its end."""

    def blocking(server: Server, of: Call, **more: Any) -> str:
        return drive(retry.call(server.ask, of, **more))

    def awaiting(server: Server, of: Call, **more: Any) -> str:
        return asyncio.run(retry.call(server.ask, replace(of, waiting=AwaitingIO()), **more))

    return blocking if request.param == "sync" else awaiting


@pytest.mark.usefixtures("_free")
def test_a_safe_failure_is_tried_again_also_for_coroutines(attempt: Callable[..., str]) -> None:
    server = Server(GONE, GONE)
    assert attempt(server, Call()) == "answer"
    assert server.asked == 3


def test_the_original_error_is_raised_with_its_attempts_and_never_a_retry_error(attempt: Callable[..., str]) -> None:
    errors = [ConnectionFailed(f"gone {number}") for number in range(3)]
    server = Server(*errors)
    with pytest.raises(ConnectionFailed) as caught:
        attempt(server, Call(attempts=3))
    assert caught.value is errors[2]
    assert (caught.value.attempts, server.asked) == (3, 3)


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_attempts_count_the_first_one(attempt: Callable[..., str], attempts: int) -> None:
    server = Server(*[ConnectionFailed("gone") for _ in range(9)])
    with pytest.raises(ConnectionFailed) as caught:
        attempt(server, Call(attempts=attempts))
    assert (caught.value.attempts, server.asked) == (attempts, attempts)


def built(kind: type[GraftageError], **more: Any) -> Any:
    return kind("x", **EXTRAS.get(kind.__name__, {}), **more)


KINDS = [
    kind
    for kind in vars(graftage.exceptions).values()
    if isinstance(kind, type) and issubclass(kind, GraftageError) and kind.__module__ == "graftage.exceptions"
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_the_class_says_of_retrying_is_what_happens(attempt: Callable[..., str], kind: type) -> None:
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
def test_the_instance_decides_and_not_its_class(attempt: Callable[..., str], kind: type) -> None:
    assert attempt(Server(built(kind, retryable=True)), Call()) == "answer"
    with pytest.raises(kind):
        attempt(Server(built(kind, retryable=False)), Call())


@pytest.mark.parametrize("error", [ModelNotFound("no"), RequestRejected("no")])
def test_permanent_errors_are_never_retried(attempt: Callable[..., str], error: ProviderError) -> None:
    server = Server(error)
    with pytest.raises(type(error)):
        attempt(server, Call(attempts=9))
    assert (server.asked, error.attempts) == (1, 1)


@pytest.mark.parametrize("error", [TypeError("mine"), KeyError("k"), OSError("o"), asyncio.CancelledError()])
@pytest.mark.parametrize("before", [(), (GONE,)], ids=["at once", "after a retry"])
def test_programming_errors_and_cancellation_are_never_retried(
    attempt: Callable[..., str], error: BaseException, before: tuple[ProviderError, ...]
) -> None:
    server = Server(*before, error)
    with pytest.raises(type(error)):
        attempt(server, Call(attempts=9))
    assert server.asked == len(before) + 1


@pytest.mark.parametrize("error", [InferenceFailed("crash", retryable=True), ModelLoadFailed("x", reason="crashed")])
def test_a_runner_that_crashed_is_tried_once_more_and_no_oftener(
    attempt: Callable[..., str], error: ProviderError
) -> None:
    server = Server(*[error] * 9)
    with pytest.raises(type(error)):
        attempt(server, Call(attempts=9))
    assert server.asked == 2


def test_only_a_connect_timeout_and_a_crash_are_safe_among_their_kind() -> None:
    phases: list[Any] = ["connect", "first_token", "idle", "total"]
    assert [ProviderTimeout("x", phase=each).retryable for each in phases] == [True, False, False, False]
    reasons: list[Any] = ["memory", "incompatible", "crashed", "timeout"]
    assert [ModelLoadFailed("x", reason=each).retryable for each in reasons] == [False, False, True, False]


# --- Limits on retrying ----------------------------------------------------------------------------------------------


def test_no_attempt_begins_past_the_deadline(attempt: Callable[..., str]) -> None:
    server = Server(*[GONE] * 9)
    with pytest.raises(ConnectionFailed):
        attempt(server, Call(deadline=time.monotonic() - 1, attempts=9))
    assert server.asked == 1


def test_a_wait_that_would_end_after_the_deadline_is_not_begun() -> None:
    server = Server(Overloaded("busy", retry_after=50))
    reset = retry._waits.set(True)
    try:
        with pytest.raises(Overloaded):
            drive(retry.call(server.ask, Call(deadline=time.monotonic() + 5)))
    finally:
        retry._waits.reset(reset)
    assert server.asked == 1


@pytest.mark.parametrize(
    ("named", "total", "asked"),
    [(60, 600, 2), (61, 600, 1), (3600, 600, 1), (86_400, math.inf, 1), (9, 10, 2), (11, 10, 1), (math.nan, 600, 2)],
)
def test_a_server_that_asks_for_longer_than_the_call_or_the_cap_is_not_asked_again(
    attempt: Callable[..., str], named: float, total: float, asked: int
) -> None:
    error = Overloaded("busy", retry_after=named)
    server = Server(error, error)
    with pytest.raises(Overloaded) as caught:
        attempt(server, Call(deadline=time.monotonic() + total, attempts=2))
    assert (caught.value, server.asked, error.attempts) == (error, asked, asked)


def test_a_budget_keeps_a_sick_server_from_being_hammered(attempt: Callable[..., str]) -> None:
    budget = Budget(capacity=10, cost=5, refill=1)
    for expected in (3, 1, 1):
        server = Server(*[ConnectionFailed("gone") for _ in range(9)])
        with pytest.raises(ConnectionFailed):
            attempt(server, Call(attempts=3, budget=budget))
        assert server.asked == expected


def test_a_budget_recovers_with_calls_that_work_at_once_and_never_beyond_its_capacity(
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
def test_a_budget_never_leaves_its_bounds(steps: list[bool]) -> None:
    budget = Budget(capacity=12, cost=5, refill=2)
    for spends in steps:
        budget.spend() if spends else budget.earn()
        assert 0 <= budget._tokens <= budget.capacity


# --- The schedule ----------------------------------------------------------------------------------------------------


def test_the_schedule_is_data_with_the_documented_figures() -> None:
    policy = DEFAULT_POLICY
    assert [policy.wait(GONE, attempt, 0.0) for attempt in (1, 2, 3)] == [0.1, 0.5, 0.5]
    fault = InferenceFailed("x", retryable=True)
    assert [policy.wait(fault, attempt, 0.0) for attempt in (1, 2, 3, 4, 5)] == [4.0, 4.0, 4.0, 8.0, 10.0]
    assert policy.wait(fault, 1, 1.0) == pytest.approx(4.4)
    assert policy.crash_attempts == 2
    assert Call().attempts == 3


def test_a_dead_server_is_known_to_be_dead_within_a_second() -> None:
    waits = [DEFAULT_POLICY.wait(GONE, attempt, 1.0) for attempt in (1, 2)]
    assert sum(waits) < 1


def test_a_servers_retry_after_is_honoured_and_capped() -> None:
    policy = RetryPolicy(retry_after_max=60)
    assert policy.wait(Overloaded("x", retry_after=7), 1, 1.0) == 7
    assert policy.wait(Overloaded("x", retry_after=0), 1, 1.0) == 0
    assert policy.wait(Overloaded("x", retry_after=86_400), 1, 1.0) == 60
    assert policy.wait(Overloaded("x"), 1, 0.0) == 4


@pytest.mark.parametrize("retry_after", [-5.0, math.nan])
def test_a_retry_after_that_makes_no_sense_is_no_negative_or_endless_wait(retry_after: float) -> None:
    wait = DEFAULT_POLICY.wait(Overloaded("x", retry_after=retry_after), 1, 0.0)
    assert 0 <= wait <= DEFAULT_POLICY.retry_after_max


@given(
    attempt=st.integers(1, 50),
    jitter=st.floats(0, 1),
    error=st.sampled_from([GONE, InferenceFailed("x"), Overloaded("x"), None]),
)
def test_waits_stay_within_their_bounds_and_jitter_only_adds(attempt: int, jitter: float, error: Any) -> None:
    least = DEFAULT_POLICY.wait(error, attempt, 0.0)
    assert least <= DEFAULT_POLICY.wait(error, attempt, jitter) <= least * 1.1 + 1e-9 <= 11.1


@pytest.mark.parametrize("attempts", [2, 3])
def test_a_policy_of_ones_own_is_followed(attempt: Callable[..., str], attempts: int) -> None:
    server = Server(*[InferenceFailed("x", retryable=True)] * 9)
    with pytest.raises(InferenceFailed):
        attempt(server, Call(attempts=9), policy=RetryPolicy(crash_attempts=attempts))
    assert server.asked == attempts


# --- What is told ----------------------------------------------------------------------------------------------------


def test_each_retry_is_told_with_attempt_delay_and_error(attempt: Callable[..., str]) -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    errors = [ConnectionFailed("one"), ConnectionFailed("two")]
    attempt(Server(*errors), Call(emit=lambda kind, **facts: told.append((kind, facts))))
    assert [kind for kind, _ in told] == ["retry", "retry"]
    assert [(facts["attempt"], facts["error"]) for _, facts in told] == [(1, errors[0]), (2, errors[1])]
    assert all(facts["delay"] >= 0 for _, facts in told)


def test_a_call_that_is_given_up_tells_no_retry(attempt: Callable[..., str]) -> None:
    told: list[str] = []
    with pytest.raises(ModelNotFound):
        attempt(Server(ModelNotFound("x")), Call(emit=lambda kind, **_: told.append(kind)))
    with pytest.raises(ConnectionFailed):
        attempt(Server(GONE), Call(attempts=1, emit=lambda kind, **_: told.append(kind)))
    assert told == []


def test_waiting_is_free_inside_no_waiting_and_nowhere_else() -> None:
    delays: list[float] = []

    def note(kind: str, **facts: Any) -> None:
        delays.append(facts["delay"])

    quick = RetryPolicy(connection_waits=(0.001,), jitter=0)
    drive(retry.call(Server(GONE).ask, Call(emit=note), policy=quick))
    reset = retry._waits.set(True)
    try:
        drive(retry.call(Server(GONE).ask, Call(emit=note), policy=quick))
        with retry.no_waiting():
            drive(retry.call(Server(GONE).ask, Call(emit=note), policy=quick))
    finally:
        retry._waits.reset(reset)
    assert delays == [0.0, 0.001, 0.0]


def test_waiting_can_be_cancelled() -> None:
    async def main() -> int:
        server = Server(Overloaded("busy", retry_after=60))
        retry._waits.set(True)
        task = asyncio.create_task(retry.call(server.ask, Call(waiting=AwaitingIO())))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return server.asked

    assert asyncio.run(main()) == 1
