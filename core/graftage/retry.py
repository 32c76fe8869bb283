"""Retries, for providers to use where they open a call. tenacity, set up once.

    first = await retry.call(open_and_read_the_first_chunk, request.call)

Only errors that say they are `retryable` are tried again, never past the deadline, and never after the first chunk:
that is up to the provider, by retrying the opening alone. tenacity is imported and set up only after a failure.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, TypeVar

from graftage._records import dataclass
from graftage.exceptions import ConnectionFailed, InferenceFailed, ModelLoadFailed, Overloaded, ProviderError

if TYPE_CHECKING:
    import tenacity

    from graftage.calls import Call

__all__ = ["DEFAULT_POLICY", "RetryPolicy", "call", "no_waiting"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """The schedule, as data. All waits are seconds."""

    connection_waits: tuple[float, ...] = (0.1, 0.5)
    """After a refused or broken connection: short, so that the verdict on a dead server takes less than a second."""
    fault_base: float = 1.0
    """After a fault of the server: doubled each time, within the two bounds below."""
    fault_min: float = 4.0
    fault_max: float = 10.0
    jitter: float = 0.1
    """Up to this share of the wait is added, so that clients do not come back together."""
    retry_after_max: float = 60.0
    """A server's `Retry-After` is honoured up to this. One that names more is not asked again: it would refuse."""
    crash_attempts: int = 2
    """A runner that crashed is tried again once: a second crash has a cause that a third try will not mend."""

    def wait(self, error: BaseException | None, attempt: int, jitter: float) -> float:
        """Seconds to wait after attempt number `attempt`; `jitter` is a random number from 0 to 1."""
        if (named := _named(error)) is not None:
            return min(named, self.retry_after_max)
        if isinstance(error, ConnectionFailed):
            base = self.connection_waits[min(attempt, len(self.connection_waits)) - 1]
        else:
            base = min(max(self.fault_base * 2 ** (attempt - 1), self.fault_min), self.fault_max)
        return base * (1 + self.jitter * jitter)

    def attempts_for(self, error: BaseException | None, attempts: int) -> int:
        """How often a call that fails like this may be tried."""
        crashed = isinstance(error, (ModelLoadFailed, InferenceFailed))
        return min(attempts, self.crash_attempts) if crashed else attempts


def _named(error: BaseException | None) -> float | None:
    """The seconds that a server asks to wait; None where they are before now, or no number."""
    named = error.retry_after if isinstance(error, Overloaded) else None
    return named if named is not None and named >= 0 else None


DEFAULT_POLICY: Final = RetryPolicy()


_waits: ContextVar[bool] = ContextVar("graftage_retry_waits", default=True)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Make every wait between attempts free, for tests. Attempts, budget and events stay as they are."""
    token = _waits.set(False)
    try:
        yield
    finally:
        _waits.reset(token)


async def call(function: Callable[[], Awaitable[T]], of: Call, *, policy: RetryPolicy = DEFAULT_POLICY) -> T:
    """Await what `function` returns, again where its error is safe to retry; waits as the client of the call does.

    Raises:
        ProviderError: the last error, with its number of attempts.
    """
    try:
        result = await function()
    except ProviderError as error:
        return await _retrying(error, function, of, policy)
    if of.budget is not None:
        of.budget.earn()
    return result


async def _retrying(first: ProviderError, function: Callable[[], Awaitable[T]], of: Call, policy: RetryPolicy) -> T:
    import tenacity

    failed = [first]

    async def attempt() -> T:
        if failed:
            raise failed.pop()  # The first attempt has been made already.
        return await function()

    return await tenacity.AsyncRetrying(sleep=of.sleep, **_schedule(of, policy))(attempt)


def _schedule(of: Call, policy: RetryPolicy) -> dict[str, Any]:
    import random

    def error_of(state: tenacity.RetryCallState) -> BaseException | None:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, ProviderError):
            error.attempts = state.attempt_number
        return error

    def worth(state: tenacity.RetryCallState) -> bool:
        error = error_of(state)
        return isinstance(error, ProviderError) and error.retryable

    def wait(state: tenacity.RetryCallState) -> float:
        seconds = policy.wait(error_of(state), state.attempt_number, random.random())  # noqa: S311 - not a secret
        return seconds if _waits.get() else 0.0

    def stop(state: tenacity.RetryCallState) -> bool:
        error = error_of(state)
        if state.attempt_number >= policy.attempts_for(error, of.attempts):
            return True
        left = of.deadline - time.monotonic()
        if state.upcoming_sleep >= left or (_named(error) or 0.0) > min(policy.retry_after_max, left):
            return True
        return of.budget is not None and not of.budget.spend()

    def before_sleep(state: tenacity.RetryCallState) -> None:
        of.emit("retry", attempt=state.attempt_number, delay=state.upcoming_sleep, error=error_of(state))

    return {"retry": worth, "wait": wait, "stop": stop, "before_sleep": before_sleep, "reraise": True}
