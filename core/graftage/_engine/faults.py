"""What a plugin's code lets out, made into the error that it should have been."""

from __future__ import annotations

import re
from collections.abc import Callable

from graftage.exceptions import GraftageError, ProviderError

__all__ = ["Contained", "is_fault", "typed_error"]

NO_LOOP = re.compile(r"no (running|current) event loop|async library|not currently running on any", re.IGNORECASE)
"""What asyncio, sniffio and anyio say to code that needs a loop where there is none: under a sync client."""
LOOPLESS = "It needs an event loop: its connection must say `needs_event_loop = True`. Tell its authors."


def is_fault(error: BaseException) -> bool:
    """Whether an exception from a plugin's code is its fault: an interrupt or a cancellation is somebody's wish."""
    from asyncio import CancelledError  # noqa: PLC0415 - `import graftage` must stay light

    return not isinstance(error, (KeyboardInterrupt, GeneratorExit, CancelledError)) and not _by_a_signal(error)


def _by_a_signal(error: BaseException) -> bool:
    """Whether a handler of the host's raised it: it strikes wherever the main thread is, in a plugin's code as well."""
    import signal  # noqa: PLC0415

    handlers = [signal.getsignal(each) for each in signal.valid_signals()]
    codes = {getattr(each, "__code__", None) for each in handlers} - {None}
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in codes:
            return True
        trace = trace.tb_next
    return False


class Contained:
    """A block of a plugin's code. What would end the program or the event loop, as `sys.exit` does, becomes an error.

    It must be the code alone: where the host's own thread waits for it, such an exception is the host's.
    """

    __slots__ = ("_blame",)

    def __init__(self, blame: Callable[[BaseException], GraftageError]) -> None:
        self._blame = blame

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, Exception) and is_fault(error):
            raise self._blame(error) from error


def typed_error(error: BaseException, provider: str) -> GraftageError:
    """The error itself, or a typed one for what a provider should not have let out."""
    if isinstance(error, GraftageError):
        return error
    typed = ProviderError(
        # The words of a foreign error may hold the prompt: they stay in the cause.
        f"The provider `{provider}` failed with {type(error).__name__}, which it should have typed.",
        provider=provider,
        hint=LOOPLESS
        if isinstance(error, RuntimeError) and NO_LOOP.search(str(error))
        else "That is a fault of the provider: tell its authors, with the traceback of the cause.",
    )
    typed.__cause__ = error
    return typed
