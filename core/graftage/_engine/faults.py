"""Turn what a plugin's code raises into the error that it should have raised."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable

from graftage._records import dataclass
from graftage.exceptions import GraftageError, ProviderError

__all__ = ["Author", "Contained", "in_words", "is_fault", "kind_of"]

PACKAGE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")  # noqa: PTH118, PTH120 - compared as text
STDLIB = os.path.join(os.path.dirname(os.__file__), "")  # noqa: PTH118, PTH120
PYTHON_MESSAGE = (
    r"'[\w.]+' object (?:has no attribute '\w+'|is not [\w ]+)|[\w.<>]+\(\) (?:missing|got|takes) [\w ',.:()-]+"
    r"|name '\w+' is not defined|No module named '[\w.]+'|cannot import name '\w+'"
)
"""Messages of Python itself about a mistake in a program. They hold names, and no data."""

NO_LOOP_MESSAGE = re.compile(
    r"no (running|current) event loop|async library|not currently running on any", re.IGNORECASE
)
"""Messages of asyncio, sniffio and anyio to code that needs an event loop, which a sync client does not run."""
NEEDS_LOOP_HINT = "It needs an event loop: its connection must set `needs_event_loop = True`. Report it to its authors."


def is_fault(error: BaseException) -> bool:
    """Return whether an exception from a plugin's code is its fault, and not a cancellation or an interrupt.

    Only the main thread is interrupted, only a task that was asked to end is cancelled. The limits: an interrupt in
    the main thread counts as the user's, and the end of a generator as its reader's, even if the plugin raised it.
    """
    import asyncio

    if isinstance(error, KeyboardInterrupt):
        return threading.current_thread() is not threading.main_thread()
    if isinstance(error, asyncio.CancelledError):
        with contextlib.suppress(RuntimeError):  # No event loop runs here.
            task = asyncio.current_task()
            return task is None or not task.cancelling()
        return True
    return not (isinstance(error, GeneratorExit) or _is_from_signal_handler(error))


def _is_from_signal_handler(error: BaseException) -> bool:
    """Return whether a signal handler of the host raised it, as one for SIGTERM that calls `sys.exit`.

    It interrupts whatever the main thread does, a plugin's code as well.
    """
    import signal
    import traceback

    handlers = [signal.getsignal(each) for each in signal.valid_signals()]
    codes = {getattr(each, "__code__", None) for each in handlers}
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


class Contained:
    """A block of a plugin's code. What would end the program or the event loop, as `sys.exit`, becomes an error.

    Code of the host must stay outside: what it raises is its own.
    """

    __slots__ = ("_blame",)

    def __init__(self, blame: Callable[[BaseException], GraftageError]) -> None:
        self._blame = blame

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, Exception) and is_fault(error):
            raise self._blame(error) from error


@dataclass(frozen=True, slots=True)
class Author:
    """The author of a provider, for messages."""

    name: str
    origin: str = ""
    """The distribution and its version; empty for an object that was given to `connect`."""

    def __str__(self) -> str:
        return f"The provider `{self.name}`{f' ({self.origin})' if self.origin else ''}"

    def fault(
        self, what: str, hint: str = "This is a fault of the provider: report it to its authors."
    ) -> ProviderError:
        """Return the error for a mistake of the author."""
        return ProviderError(f"{self} {what}.", provider=self.name, hint=hint)

    def typed(self, error: BaseException) -> GraftageError:
        """Return the error itself if it is one of ours, else one that names the provider."""
        if isinstance(error, GraftageError):
            return error
        # The message of a foreign error may hold the prompt: it stays in the cause.
        said = re.match(PYTHON_MESSAGE, _message_of(error))
        what = f"{type(error).__name__}{f' ({said[0]})' if said else ''}{_place(error)}"
        typed = self.fault(
            f"failed with {what}; a provider must raise the errors of `graftage.exceptions`",
            NEEDS_LOOP_HINT
            if isinstance(error, RuntimeError) and NO_LOOP_MESSAGE.search(_message_of(error))
            else "This is a fault of the provider: report it to its authors, with the traceback of the cause.",
        )
        typed.__cause__ = error
        return typed


def _message_of(error: BaseException) -> str:
    """Return the message of any error; nothing if its `__str__` fails."""
    try:
        return str(error)
    except BaseException as failure:
        if not is_fault(failure):
            raise
        return ""


def in_words(error: BaseException) -> str:
    """Return the type and message of any error, as a part of a sentence."""
    return f"{type(error).__name__}: {_message_of(error)}".rstrip(".: ")


def kind_of(value: object) -> str:
    """Return the type of a value, for a sentence about what it should have been."""
    return "None" if value is None else type(value).__name__


def _place(error: BaseException) -> str:
    """Return where in a plugin's code an error arose: the last step in the first file that is not ours or Python's."""
    trace, found = error.__traceback__, None
    while trace is not None:
        code = trace.tb_frame.f_code
        file = code.co_filename
        foreign = not file.startswith(PACKAGE) and (not file.startswith(STDLIB) or "-packages" in file)
        if file == found[0] if found else foreign:
            found = file, code.co_name, trace.tb_lineno
        trace = trace.tb_next
    return f" in `{found[1]}` ({os.path.basename(found[0])}, line {found[2]})" if found else ""  # noqa: PTH119
