"""Retries for the opening of a call, by providers. Uses tenacity.

    first = await retry.call(open_and_read_the_first_chunk, request.call)

Only errors with `retryable` are retried, and never past the deadline. A provider retries only the opening, so nothing
is retried after the first chunk. tenacity is imported only after a failure.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
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
    """The schedule of retries. All waits are seconds."""

    connection_waits: tuple[float, ...] = (0.1, 0.5)
    """After a refused or broken connection: short, so that a dead server is reported within a second."""
    fault_base: float = 1.0
    """After an error of the server: doubled each time, within the two bounds below."""
    fault_min: float = 4.0
    fault_max: float = 10.0
    jitter: float = 0.1
    """Up to this share of the wait is added, so that clients do not return all at once."""
    retry_after_max: float = 60.0
    """The longest `Retry-After` to wait for. A longer one ends the call, since the server would refuse again."""
    crash_attempts: int = 2
    """Attempts after a crash of the runner: after a second crash a third attempt would not help."""

    def wait(self, error: BaseException | None, attempt: int, jitter: float) -> float:
        """Return the seconds to wait after attempt number `attempt`; `jitter` is a random number from 0 to 1."""
        if (named := _retry_after(error)) is not None:
            return min(named, self.retry_after_max)
        if isinstance(error, ConnectionFailed):
            base = self.connection_waits[min(attempt, len(self.connection_waits)) - 1]
        else:
            base = min(max(self.fault_base * 2 ** (attempt - 1), self.fault_min), self.fault_max)
        return base * (1 + self.jitter * jitter)

    def attempts_for(self, error: BaseException | None, attempts: int) -> int:
        """Return how often a call with this error may be tried."""
        crashed = isinstance(error, (ModelLoadFailed, InferenceFailed))
        return min(attempts, self.crash_attempts) if crashed else attempts


def _retry_after(error: BaseException | None) -> float | None:
    """Return the wait that a server asks for; None if it is negative or not a number."""
    named = error.retry_after if isinstance(error, Overloaded) else None
    return named if named is not None and named >= 0 else None


DEFAULT_POLICY: Final = RetryPolicy()


_skipping: list[None] = []
"""An item for each `no_waiting` that is open."""


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Skip the waits between attempts in the whole process, for tests. Attempts, budget and events stay as they are."""
    _skipping.append(None)
    try:
        yield
    finally:
        _skipping.pop()


async def call(function: Callable[[], Awaitable[T]], of: Call, *, policy: RetryPolicy = DEFAULT_POLICY) -> T:
    """Await `function()`, and again if its error is safe to retry. It waits as the client does: blocking or awaiting.

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
            raise failed.pop()  # The first attempt is done.
        return await function()

    return await tenacity.AsyncRetrying(sleep=of.sleep, **_schedule(of, policy))(attempt)


def _schedule(of: Call, policy: RetryPolicy) -> dict[str, Any]:
    import random

    def error_of(state: tenacity.RetryCallState) -> BaseException | None:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, ProviderError):
            error.attempts = state.attempt_number
        return error

    def is_retryable(state: tenacity.RetryCallState) -> bool:
        error = error_of(state)
        return isinstance(error, ProviderError) and error.retryable

    def wait(state: tenacity.RetryCallState) -> float:
        seconds = policy.wait(error_of(state), state.attempt_number, random.random())  # noqa: S311 - not a secret
        return 0.0 if _skipping else seconds

    def stop(state: tenacity.RetryCallState) -> bool:
        error = error_of(state)
        if state.attempt_number >= policy.attempts_for(error, of.attempts):
            return True
        left = of.deadline - time.monotonic()
        if state.upcoming_sleep >= left or (_retry_after(error) or 0.0) > min(policy.retry_after_max, left):
            return True
        return of.budget is not None and not of.budget.spend()

    def before_sleep(state: tenacity.RetryCallState) -> None:
        of.emit("retry", attempt=state.attempt_number, delay=state.upcoming_sleep, error=error_of(state))

    return {"retry": is_retryable, "wait": wait, "stop": stop, "before_sleep": before_sleep, "reraise": True}
