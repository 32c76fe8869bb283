"""One call: its chunks are folded into a reply, and what it holds is given back at its end."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from graftage._engine.answers import check_tool_choice, cut_warning, parsed, read_finish_reason, read_usage
from graftage._engine.faults import Author, is_fault, kind_of
from graftage._engine.inputs import Parse
from graftage.calls import MAX_OBJECTS
from graftage.exceptions import (
    AdapterError,
    ConnectionFailed,
    GraftageError,
    ModelNotFound,
    ProtocolError,
    ProviderError,
    StreamInterrupted,
)
from graftage.types import Chunk, Limits, Logprob, Reply, Timings, ToolCall, Usage, canonical_name

if TYPE_CHECKING:
    from graftage._engine.waiting import Source
    from graftage.calls import Call, ChatRequest, GenerateRequest
    from graftage.types import FinishReason, LoadedAdapter

__all__ = ["Run"]

T = TypeVar("T")
Translate = Callable[[GraftageError], Exception]
"""Turns a `GraftageError` into the host's own error."""


WANTED = {
    "usage": "`Usage`",
    "timings": "`Timings`",
    "tool_calls": "tuple of `ToolCall`",
}
"""What fields of a Chunk must be; they are checked once, at the end of a reply."""
BROKEN = (ConnectionFailed, ProtocolError, StreamInterrupted)
"""The errors of a call whose client is closed while it runs."""


class Fold:
    """What the chunks so far say; the chunks are not kept."""

    __slots__ = ("first", "last", "logprobs", "texts", "thoughts", "tool_calls", "warnings")

    def __init__(self) -> None:
        self.first: float | None = None
        """When the first chunk came, in seconds on the monotonic clock."""
        self.last: Chunk | None = None
        self.texts: list[str] = []
        self.thoughts: list[str] = []
        self.tool_calls: list[ToolCall] = []
        self.logprobs: list[Logprob] = []
        self.warnings: list[str] = []

    def add_more(self, chunk: Chunk) -> None:
        """Add the fields that few chunks have."""
        self.thoughts.append(chunk.thinking)
        self.tool_calls += chunk.tool_calls
        self.logprobs += chunk.logprobs
        self.warnings += chunk.warnings
        count = len(self.tool_calls) + len(self.logprobs)
        if count > MAX_OBJECTS:
            raise ProtocolError(
                f"The reply has {count} tool calls and log-probabilities; at most {MAX_OBJECTS} are read.",
                hint="Ask for a shorter reply, or without `logprobs`.",
            )


@dataclass(slots=True, kw_only=True, eq=False, repr=False)
class Run:
    """One call from its start to its end."""

    author: Author
    model: str
    operation: str
    call: Call
    started: float
    emit: Callable[..., None]
    release: Callable[[], None]
    """Gives back what the call holds; called once, at its end."""
    count: Callable[..., None]
    hide: Callable[[GraftageError], None] = field(default=lambda _: None)
    """Removes secrets from an error: a server may repeat the headers it got."""
    suggest: Callable[[ModelNotFound], Coroutine[Any, Any, None]]
    """Adds close names to the error about a missing model."""
    parse: Parse | None = None
    adapter: str | None = None
    adapter_digest: str | None = None
    limits: Limits | None = None
    warnings: tuple[str, ...] = ()
    tool_choice: str | None = None
    """What the model must call: `required`, or the name of a tool."""
    request: ChatRequest | GenerateRequest | None = None
    """The request, as far as the provider reads it."""
    open: Callable[[Any], Source] | None = None
    """Sends a request."""
    again: Callable[[], Coroutine[Any, Any, Any]] | None = None
    """Loads an adapter again that the server has lost, and returns the request to send; used once."""
    answered: Callable[[], object] = field(default=lambda: None)
    """Called once the call has its reply."""
    source: Source | None = None
    fold: Fold = field(default_factory=Fold)
    reply: Reply | None = None
    ended: bool = False
    stopped: bool = False
    """Whether the reader has stopped: an end without a last chunk is then not an error."""
    closed: Callable[[], bool] = field(default=lambda: False)
    """Whether the client was closed in the meantime."""
    reported: bool = False
    """Whether observers were sent its end."""
    host_error: BaseException | None = None
    """What a callback or a validator of the host raised: it goes back to the host unchanged."""

    @property
    def provider(self) -> str:
        """The provider's name."""
        return self.author.name

    @property
    def received(self) -> bool:
        """Whether anything has come."""
        return self.fold.last is not None

    def so_far(self) -> Reply:
        """Return what has come; `finish_reason` is None until the last chunk is there."""
        fold = self.fold
        last = fold.last or Chunk()
        first = None if fold.first is None else fold.first - self.started
        return Reply(
            text="".join(fold.texts),
            thinking="".join(fold.thoughts),
            tool_calls=tuple(fold.tool_calls),
            logprobs=tuple(fold.logprobs),
            finish_reason=cast("FinishReason | None", last.finish_reason),
            usage=last.usage or Usage(),
            timings=replace(last.timings or Timings(), first_chunk=first, wall=time.monotonic() - self.started),
            model=last.model or self.model,
            provider=self.provider,
            adapter=self.adapter,
            adapter_digest=self.adapter_digest,
            limits=self.limits,
            warnings=(*self.warnings, *fold.warnings),
            request_id=last.request_id,
            rate_limits=last.rate_limits,
            raw=last.raw,
        )

    async def pull(self) -> Chunk | None:
        """Return the next chunk, or None after the last one. The last chunk and any error end the run."""
        source, fold = self.source, self.fold
        over = self.stopped or self.reply is not None
        if source is None or over:
            return None
        try:
            chunk: Any = await source.pull()
            if self.stopped:
                await self.abandon()
                return None
            is_chunk = isinstance(chunk, Chunk)
            if not (is_chunk and isinstance(chunk.text, str) and isinstance(chunk.thinking, str)):
                raise self._no_chunk(chunk)
            if chunk.finish_reason is not None:
                chunk = self._last(chunk)
            fold.texts.append(chunk.text)
            if chunk.thinking or chunk.tool_calls or chunk.logprobs or chunk.warnings:
                fold.add_more(chunk)
            if fold.last is None:
                fold.first = time.monotonic()
                self.emit("first_chunk")
            fold.last = chunk
            if chunk.finish_reason is not None:
                await self._close_source()
                self._finish(chunk)
        except BaseException as error:  # noqa: BLE001 - raised again, unless the reader has stopped
            if self.again is not None and fold.last is None and (again := self.take_again(error)) is not None:
                return await self._pull_again(again)
            await self._broken(error)
            return None
        taken: Chunk = chunk
        return taken

    def applied(self, adapter: LoadedAdapter) -> None:
        """Note the adapter that answers, and the model that contains it."""
        self.adapter, self.adapter_digest, self.model = adapter.name, adapter.digest, adapter.model
        self.emit = partial(self.emit, adapter=adapter.name)

    def take_again(self, error: BaseException) -> Callable[[], Coroutine[Any, Any, Any]] | None:
        """Return `again`, once, if an error says that the server has lost the adapter or its model."""
        base = canonical_name(self.call.model or "")
        lost = isinstance(error, AdapterError) and error.retryable
        if isinstance(error, ModelNotFound) and canonical_name(self.model) != base:
            lost = error.model is None or canonical_name(error.model) == canonical_name(self.model)
        if self.again is None or not lost:
            return None
        again, self.again = self.again, None
        self.emit("retry", attempt=1, delay=0.0, error=error)
        return again

    async def _pull_again(self, again: Callable[[], Coroutine[Any, Any, Any]]) -> Chunk | None:
        """Load the adapter again, send the request again, and return the first chunk."""
        try:
            await self._close_source()
            request = await again()
            if self.open is not None and not self.stopped:
                self.source = self.open(request)
        except BaseException as error:  # noqa: BLE001 - raised again, unless the reader has stopped
            await self._broken(error)
            return None
        return await self.pull()

    def _last(self, last: Chunk) -> Chunk:
        """Return the last chunk with its reason in our words, checked counts, and a warning if the prompt was cut."""
        self._check_end(last)
        usage, request = read_usage(last.usage), self.request
        self.request = None  # It may hold pictures, and a host may hold the stream for long.
        read, written = (usage.input_tokens, usage.output_tokens) if usage else (None, None)
        full = request is not None and written is not None and written >= (request.max_tokens or math.inf)
        calls = bool(self.fold.tool_calls or last.tool_calls)
        cut = cut_warning(request, read) if request is not None else ()
        reason = read_finish_reason(last.finish_reason, calls=calls, full=full)
        return replace(last, finish_reason=reason, usage=usage, warnings=(*last.warnings, *cut))

    def _no_chunk(self, found: object) -> ProviderError:
        """Return the error for what is not a chunk: an early end, or a bug in the provider."""
        if found is not None:
            odd = f"{kind_of(found)} instead of a Chunk"
            what = "a Chunk whose `text` or `thinking` is not a string" if isinstance(found, Chunk) else odd
            return self.author.fault(f"gave {what}")
        hint = "The text so far is in `partial`; ask again for a whole reply."
        if not self.call.opened:  # It did not come from a server.
            hint += " A provider's last Chunk must have a `finish_reason`, and it must not yield None."
        return StreamInterrupted("The reply ended before it was done.", retryable=True, hint=hint)

    async def _broken(self, error: BaseException) -> None:
        """End the run with an error, and raise it, unless the reader has stopped."""
        if self.stopped and is_fault(error):
            await self.abandon()
            return
        if isinstance(error, ModelNotFound):
            await self.suggest(error)
        await self.abandon()
        failure = self.failed(error)
        if failure is error:
            raise error
        raise failure from failure.__cause__

    def misfits(self) -> bool:
        """Whether a whole reply came but does not match its format. A reply cut by a limit would only be cut again."""
        last = self.fold.last
        whole = last is not None and last.finish_reason not in (None, "length")
        return self.reply is None and whole and self.tool_choice is None

    def whole(self) -> Reply:
        """Return the reply, which must have been read to its end."""
        if self.reply is None:  # pragma: no cover - the engine reads it to its end, or raises
            raise RuntimeError("the reply has not been read to its end")
        return self.reply

    def _finish(self, last: Chunk) -> None:
        reply = self.so_far()
        if self.tool_choice is not None:
            check_tool_choice(reply, self.tool_choice)
        if self.parse is not None and not reply.tool_calls:
            try:
                reply = replace(reply, parsed=parsed(reply, self.parse))
            except GraftageError:
                raise
            except BaseException as error:
                self.host_error = error  # From a validator of the host.
                raise
        self.reply = reply
        self.answered()
        self.end()
        usage = reply.usage
        self.count(input_tokens=usage.input_tokens or 0, output_tokens=usage.output_tokens or 0)
        self._report("finish", finish_reason=last.finish_reason, usage=usage, timings=reply.timings)

    def _check_end(self, last: Chunk) -> None:
        """Check the fields that only the reader of a reply would use."""
        right = {
            "usage": last.usage is None or isinstance(last.usage, Usage),
            "timings": last.timings is None or isinstance(last.timings, Timings),
            "tool_calls": all(isinstance(each, ToolCall) for each in (*self.fold.tool_calls, *last.tool_calls)),
        }
        for name in (each for each in right if not right[each]):
            raise self.author.fault(
                f"gave a Chunk with a wrong `{name}`", f"Its authors must make it a {WANTED[name]}."
            )

    def _report(self, kind: str, **facts: Any) -> None:
        """Send observers its end, once."""
        if not self.reported:
            self.reported = True
            self.emit(kind, **facts)

    async def give_up(self) -> None:
        """Stop because the reader has stopped; that is not a failure."""
        try:
            await self.abandon()
        finally:
            self._report("finish", timings=self.so_far().timings if self.received else None)

    def at_end(self, give_back: Callable[[], None]) -> None:
        """Call a function at the end, before those that were given earlier."""
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
        """Stop the provider's work, even if that fails."""
        self.stopped = True
        try:
            await self._close_source()
        finally:
            self.end()

    async def _close_source(self) -> None:
        # The reply, or the error that led here, matters more than an error of tidying up.
        try:
            if self.source is not None:
                await self.source.close()
        except BaseException as error:
            if not is_fault(error):
                raise
        finally:
            with contextlib.suppress(Exception):
                await self.call.release()

    def failing(self) -> _Failing:
        """Return a block whose errors end this run."""
        return _Failing(self)

    def failed(self, error: BaseException) -> BaseException:
        """End the run; return the error to raise, counted and sent to observers."""
        self.end()
        if not is_fault(error) or error is self.host_error:
            self._report("finish")  # Cancelled or interrupted by the caller: not a failure.
            return error
        typed = self.author.typed(error)
        if self.closed() and (typed is not error or isinstance(typed, BROKEN)):
            typed = closed_meanwhile(typed, received=self.received)
        self.hide(typed)
        if isinstance(typed, ProviderError):
            typed.provider = typed.provider or self.provider
            typed.model = typed.model or self.model or None
            typed.operation = typed.operation or self.operation
        if self.received:
            came = self.so_far()
            # A provider puts there what it could not read.
            typed.partial = replace(came, raw=typed.partial.raw) if typed.partial else came
            if isinstance(typed, ProviderError):
                typed.retryable = False  # The chunks so far would come twice.
        self.count(failures=1)
        self._report("error", error=typed)
        return typed


def closed_meanwhile(cause: GraftageError | None = None, *, received: bool = False) -> ProviderError:
    """Return the error of a call whose client was closed while it ran."""
    kind = StreamInterrupted if received else ConnectionFailed
    hint = "Close a client when its calls are done."
    failed = kind("The client was closed while this call was under way.", retryable=False, hint=hint)
    failed.__cause__ = cause
    return failed


def as_it_is(error: GraftageError) -> Exception:
    """Return the error unchanged, for a host without `translate_error`."""
    return error


def raise_translated(error: GraftageError, translate: Translate) -> NoReturn:
    """Raise an error as the host wants to see it, with the typed one as its cause."""
    answer: Any = translate(error)
    # A host that translates some errors may forget to return the others.
    if answer is error or not isinstance(answer, Exception):
        raise error
    raise answer from error


class _Failing:
    """Ends a run with the error that leaves the block."""

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
