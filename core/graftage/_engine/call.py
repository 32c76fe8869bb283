"""An answer while it comes: chunks folded into a reply, and the two streams that hand them on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from graftage._messages import Parse, parsed
from graftage.exceptions import (
    ConnectionFailed,
    GraftageError,
    ProtocolError,
    ProviderError,
    ProviderTimeout,
    StreamInterrupted,
)
from graftage.types import Call, Chunk, Limits, Reply, Timings, Usage

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AsyncStream", "Run", "Source", "Stream", "drive"]

T = TypeVar("T")
Phase = Literal["connect", "first_token", "idle", "total"]
Translate = Callable[[GraftageError], Exception]
"""How a host wants to see an error."""


BROKEN = (ConnectionFailed, ProtocolError, StreamInterrupted)
"""What a call meets whose client is closed under it."""


class Source(Protocol):
    """The chunks of a provider, pulled one by one."""

    async def pull(self) -> Any:
        """The next chunk, or None at the end."""
        ...

    def gone(self) -> bool:
        """Whether nobody can read on: its event loop is closed."""
        ...

    async def close(self) -> None:
        """Stop the provider's work, a pending `pull` of another task too. Safe to call twice."""
        ...


def drive(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends, because its `IO` is `Blocking`."""
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    finally:
        work.close()
    raise RuntimeError("a coroutine of the sync client suspended")


class Fold:
    """Adds chunks up to a reply."""

    __slots__ = ("_base", "_first", "_last", "_logprobs", "_started", "_text", "_thinking", "_tool_calls", "_warnings")

    def __init__(self, base: Reply, started: float) -> None:
        self._base = base
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._tool_calls: list[Any] = []
        self._logprobs: list[Any] = []
        self._warnings: list[str] = []
        self._last: Chunk | None = None
        self._started = started
        self._first: float | None = None

    def add(self, chunk: Chunk) -> None:
        """Take one more chunk."""
        if self._first is None:
            self._first = time.monotonic() - self._started
        if chunk.text:
            self._text.append(chunk.text)
        if chunk.thinking:
            self._thinking.append(chunk.thinking)
        self._tool_calls += chunk.tool_calls
        self._logprobs += chunk.logprobs
        self._warnings += chunk.warnings
        self._last = chunk

    @property
    def received(self) -> bool:
        """Whether anything has come."""
        return self._last is not None

    def reply(self) -> Reply:
        """What has come so far; its `finish_reason` is None until the last chunk is in."""
        last = self._last or Chunk()
        timings = replace(last.timings or Timings(), first_chunk=self._first, wall=time.monotonic() - self._started)
        return replace(
            self._base,
            text="".join(self._text),
            thinking="".join(self._thinking),
            tool_calls=tuple(self._tool_calls),
            logprobs=tuple(self._logprobs),
            finish_reason=last.finish_reason,
            usage=last.usage or Usage(),
            timings=timings,
            model=last.model or self._base.model,
            warnings=(*self._base.warnings, *self._warnings),
            raw=last.raw,
        )


@dataclass(slots=True, kw_only=True)
class Run:
    """One call from its start to its end, whichever end that is."""

    provider: str
    model: str
    operation: str
    call: Call
    started: float
    emit: Callable[..., None]
    release: Callable[[], None]
    """Gives back what the call holds; done once, at its end."""
    count: Callable[..., None]
    translate: Translate
    hide: Callable[[GraftageError], None] = field(default=lambda _: None)
    """Takes secrets out of what an error says: a server may repeat the headers it got."""
    parse: Parse | None = None
    adapter: str | None = None
    limits: Limits | None = None
    warnings: tuple[str, ...] = ()
    source: Source | None = None
    fold: Fold | None = None
    reply: Reply | None = None
    ended: bool = False
    reading: bool = False
    stopped: bool = False
    """Whether the reader wants no more: an end without a last chunk is then no fault."""
    closed: Callable[[], bool] = field(default=lambda: False)
    """Whether the client has been closed meanwhile."""
    told: bool = False
    """Whether observers know how it ended."""
    hosts_own: BaseException | None = None
    """What a callback of the host has raised: it goes back to the host as it is."""

    def begin_fold(self) -> Fold:
        """Start adding up, with what is known before the first chunk."""
        self.fold = Fold(
            Reply(
                text="",
                model=self.model,
                provider=self.provider,
                adapter=self.adapter,
                limits=self.limits,
                warnings=self.warnings,
            ),
            self.started,
        )
        return self.fold

    async def pull(self) -> Chunk | None:
        """The next chunk; None after the last one. Ends the run at the last chunk, and on any error."""
        if self.source is None or self.fold is None or self.stopped or self.reply is not None:
            return None
        with self.failing():
            if self.ended:  # Its slot was taken back: `forgotten`.
                await self.abandon()
                raise too_late(self.call)
            return await self._pull(self.source, self.fold)

    async def _pull(self, source: Source, fold: Fold) -> Chunk | None:
        self.reading = True
        try:
            chunk: Chunk | None = await source.pull()
            if self.stopped:
                await self.abandon()
                return None
            if chunk is None:
                raise StreamInterrupted(
                    "The answer ended before it was done.",
                    retryable=not fold.received,
                    hint="The text so far is in `partial`; ask again for a whole answer.",
                )
            if not isinstance(chunk, Chunk):
                raise ProviderError(
                    f"The provider `{self.provider}` gave {type(chunk).__name__} instead of a Chunk.",
                    hint="That is a fault of the provider; tell its authors.",
                )
            first = not fold.received
            fold.add(chunk)
            if first:
                self.emit("first_chunk")
            if chunk.finish_reason is not None:
                await self._close_source()
                self._finish(chunk, fold)
        except BaseException:
            await self.abandon()
            raise
        finally:
            self.reading = False
        return chunk

    def forgotten(self) -> bool:
        """Whether its time is over and nobody reads it, or can."""
        if self.source is not None and self.source.gone():
            return True
        return not self.reading and time.monotonic() > self.call.deadline

    def _finish(self, last: Chunk, fold: Fold) -> None:
        reply = fold.reply()
        if self.parse is not None and not reply.tool_calls:
            reply = replace(reply, parsed=parsed(reply, self.parse))
        self.reply = reply
        self.end()
        usage = reply.usage
        self.count(input_tokens=usage.input_tokens or 0, output_tokens=usage.output_tokens or 0)
        self._tell("finish", finish_reason=last.finish_reason, usage=usage, timings=reply.timings)

    def _tell(self, kind: str, **facts: Any) -> None:
        """Tell observers how it ended, once."""
        if not self.told:
            self.told = True
            self.emit(kind, **facts)

    async def give_up(self) -> None:
        """Stop because the reader wants no more, which is no failure."""
        try:
            await self.abandon()
        finally:
            self._tell("finish", timings=self.fold.reply().timings if self.fold else None)

    def at_end(self, give_back: Callable[[], None]) -> None:
        """Give one more thing back at the end, before what was taken earlier."""
        earlier = self.release

        def release() -> None:
            give_back()
            earlier()

        self.release = release

    def end(self) -> None:
        """Release what is held, once."""
        if not self.ended:
            self.ended = True
            self.release()

    async def abandon(self) -> None:
        """Stop the provider's work, whatever it thinks of that."""
        self.stopped = True
        try:
            await self._close_source()
        finally:
            self.end()

    async def _close_source(self) -> None:
        # The whole answer, or the error that led here, is what to tell; not that tidying up failed.
        with contextlib.suppress(Exception):
            if self.source is not None:
                await self.source.close()

    def failing(self) -> _Failing:
        """A block whose errors are those of this run."""
        return _Failing(self)

    def failed(self, error: BaseException) -> BaseException:
        """The error to raise for one that occurred, counted and told to observers."""
        self.end()
        if not isinstance(error, Exception) or error is self.hosts_own:
            self._tell("finish")  # Cancelled or interrupted by the caller: not a failure.
            return error
        typed = typed_error(error, self.provider)
        if self.closed() and (typed is not error or isinstance(typed, BROKEN)):
            typed = closed_meanwhile(typed, received=self.fold is not None and self.fold.received)
        self.hide(typed)
        if isinstance(typed, ProviderError):
            typed.provider = typed.provider or self.provider
            typed.model = typed.model or self.model or None
            typed.operation = typed.operation or self.operation
            if self.fold is not None and self.fold.received:
                came = self.fold.reply()
                # What a provider puts there is what it could not make a chunk of.
                typed.partial = replace(came, raw=typed.partial.raw) if typed.partial else came
        self.count(failures=1)
        self._tell("error", error=typed)
        return translated(typed, self.translate)


def too_late(call: Call, phase: Phase = "total") -> ProviderTimeout:
    """The error of a call that has used up one of its limits."""
    what = {
        "connect": "The server could not be reached within",
        "first_token": "The server gave no first token within",
        "idle": "The stream stood still for",
        "total": "The call was not finished within",
    }[phase]
    knob = "timeout" if phase == "total" else f"timeouts.{phase}"
    seconds = float(getattr(call.timeouts, phase))
    return ProviderTimeout(f"{what} {seconds:g} s.", phase=phase, hint=f"Raise `{knob}`, or ask for less at a time.")


def closed_meanwhile(cause: GraftageError | None = None, *, received: bool = False) -> ProviderError:
    """The error of a call whose client was closed under it."""
    kind = StreamInterrupted if received else ConnectionFailed
    hint = "Close a client when its calls are done."
    failed = kind("The client was closed while this call was under way.", retryable=False, hint=hint)
    failed.__cause__ = cause
    return failed


def as_it_is(error: GraftageError) -> Exception:
    """How a host that asked for nothing else sees an error."""
    return error


def translated(error: GraftageError, translate: Translate) -> Exception:
    """An error as the host wants to see it, with the typed one as its cause."""
    answer: Any = translate(error)
    # A host that translates some errors may forget to hand on the others.
    told: Exception = answer if isinstance(answer, Exception) else error
    if told is not error:
        told.__cause__ = error
    return told


class telling:  # noqa: N801 - reads as a word in a `with`
    """A block whose typed errors are raised as the host wants to see them."""

    __slots__ = ("_translate",)

    def __init__(self, translate: Translate) -> None:
        self._translate = translate

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, GraftageError):
            told = translated(error, self._translate)
            if told is not error:
                raise told from error


class _Failing:
    """Ends a run with the error that leaves the block, typed, counted, told and translated."""

    __slots__ = ("_run",)

    def __init__(self, run: Run) -> None:
        self._run = run

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        failure = self._run.failed(error)
        if failure is not error:
            raise failure from failure.__cause__


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
        hint="That is a fault of the provider: tell its authors, with the traceback of the cause.",
    )
    typed.__cause__ = error
    return typed


class _StreamBase:
    """What both streams share."""

    def __init__(self, run: Run, first: Chunk | None) -> None:
        self._run = run
        self._first = first

    @property
    def reply(self) -> Reply:
        """The whole reply, once the last chunk has come.

        Raises:
            RuntimeError: it has not.
        """
        if self._run.reply is None:
            raise RuntimeError("the stream has not been read to its end; `partial` has what came so far")
        return self._run.reply

    @property
    def partial(self) -> Reply:
        """What has come so far."""
        if self._run.reply is not None:
            return self._run.reply
        if self._run.fold is None:  # pragma: no cover - a stream is made after its first chunk
            raise RuntimeError("the stream has not begun")
        return self._run.fold.reply()


class Stream(_StreamBase):
    """The chunks of an answer as they come. Close it, or use it as a context manager, to stop the answer early."""

    def __init__(self, run: Run, first: Chunk | None) -> None:
        super().__init__(run, first)
        self._lock = threading.Lock()
        self._closed = False

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        with self._lock:
            chunk, self._first = self._first, None
            if chunk is None and not self._closed:
                chunk = drive(self._run.pull())
            if self._closed:
                drive(self._run.give_up())
                raise StopIteration
        if chunk is None:
            raise StopIteration
        return chunk

    def close(self) -> None:
        """Stop the answer and give its slot back. From another thread it takes effect when a pending read returns."""
        self._stop(self._run.give_up)

    def _stop(self, stop: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._closed = True
        if self._lock.acquire(blocking=False):
            try:
                drive(stop())
            finally:
                self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A loop that was left by `break` drops the stream: its slot must not stay taken. Observers are not told: they
        # may hold a lock of their own at the very step at which the garbage collector runs this.
        if not self._run.ended:
            self._stop(self._run.abandon)


class AsyncStream(_StreamBase):
    """The chunks of an answer as they come. Close it, or use it as a context manager, to stop the answer early."""

    def __init__(self, run: Run, first: Chunk | None) -> None:
        import asyncio  # noqa: PLC0415 - `import graftage` must stay light

        super().__init__(run, first)
        self._loop = asyncio.get_running_loop()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        chunk, self._first = self._first, None
        if chunk is None:
            chunk = await self._run.pull()
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        """Stop the answer and give its slot back; another task that waits for a chunk gets none."""
        self._first = None
        await self._run.give_up()

    close = aclose

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # A loop that was left by `break` drops the stream: its work must end and its slot must not stay taken.
        if self._run.ended:
            return
        self._run.end()
        abandoning = self._run.give_up()
        try:
            self._loop.call_soon_threadsafe(self._loop.create_task, abandoning)
        except RuntimeError:  # The event loop is closed, and with it whatever it ran.
            abandoning.close()
