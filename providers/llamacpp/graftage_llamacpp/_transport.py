"""Requests on their way to the engine: each takes a lease on it, which starts it where needed, until its answer ends.

Above this the engine has one address and no key, so a recorder that stands in between sees neither port nor secret.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import httpx

from graftage.exceptions import (
    ConnectionFailed,
    GraftageError,
    ProtocolError,
    ProviderError,
    ProviderTimeout,
    StreamInterrupted,
)
from graftage.http import AsyncGuard, AsyncNetwork, Exchange, Guard, Network, exchange, reason
from graftage_llamacpp import _convert
from graftage_llamacpp._convert import Answer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from graftage.types import Call, Chunk, Transport
    from graftage_llamacpp._process import Engine, Lease, Need

__all__ = ["EMBEDDINGS", "TOKENIZE", "AsyncEngineClient", "EngineClient", "Job"]

PLACE: Final = httpx.URL("http://llamacpp.invalid")
"""Stands for the engine, wherever it listens."""
JOB: Final = "graftage_job"
LEASE: Final = "graftage_lease"
TOKENIZE: Final = "/tokenize"
EMBEDDINGS: Final = "/v1/embeddings"
MARGIN: Final = 0.05
"""Seconds kept back from a limit, so that the engine's own error comes before that of the clock."""
DRAIN: Final = 0.2
"""Seconds to wait for the end of a body after its last event."""
PATIENCE: Final = 0.2
"""Seconds to wait for a broken engine's end, to say how it ended."""


@dataclass(slots=True, kw_only=True)
class Job:
    """One request to the engine, as often as it is tried."""

    call: Call
    engine: Engine
    need: Callable[[float], Need]
    """Makes what it needs of the engine, given a deadline."""
    path: str
    body: Mapping[str, Any] | None = None
    answer: Callable[[], Answer] = field(default=lambda: Answer(""))
    """Makes a reader for each attempt."""

    def exchange(self, *, lines: bool) -> Exchange:
        """The limits of one attempt."""
        return Exchange(call=self.call, refuse=_refuse, line=_convert.read_line, lines=lines)

    def at(self, path: str, body: Mapping[str, Any] | None) -> Job:
        """The same for another part of the work."""
        return Job(call=self.call, engine=self.engine, need=self.need, path=path, body=body)

    def request(self, client: httpx.Client | httpx.AsyncClient, of: Exchange) -> httpx.Request:
        """The HTTP request of one attempt."""
        extensions = {JOB: (self, of)}
        return client.build_request("POST", self.path, json=self.body, extensions=extensions)


def _refuse(status: int, headers: Mapping[str, str], body: bytes) -> ProviderError:  # noqa: ARG001 - nothing in them
    return _convert.refusal(status, body)


# --- Leases ----------------------------------------------------------------------------------------------------------


def lease(job: Job, deadline: float) -> Lease:
    """The right to send a request; waits for the engine.

    Raises:
        ProviderTimeout: it was not free in time.
        ModelLoadFailed: it could not be started.
    """
    future = job.engine.ask(job.need(deadline))
    try:
        return future.result(max(0.0, deadline - time.monotonic() + MARGIN))
    except FutureTimeout as error:
        job.engine.withdraw(future)
        raise _not_free(job, deadline) from error
    except BaseException:
        job.engine.withdraw(future)
        raise


async def alease(job: Job, deadline: float) -> Lease:
    """`lease` for asyncio."""
    future = job.engine.ask(job.need(deadline))
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), max(0.0, deadline - time.monotonic() + MARGIN))
    except (asyncio.TimeoutError, FutureTimeout) as error:
        job.engine.withdraw(future)
        raise _not_free(job, deadline) from error
    except BaseException:
        job.engine.withdraw(future)
        raise


def _not_free(job: Job, deadline: float) -> ProviderTimeout:
    total = deadline >= job.call.deadline - 2 * MARGIN
    phase: Literal["total", "first_token"] = "total" if total else "first_token"
    running = job.engine.running
    if not running:
        return ProviderTimeout("The engine was not started in time.", phase=phase, hint="Raise the limit of time.")
    return ProviderTimeout(
        f"The engine was not ready in time: {running} requests hold it, and this one needs it restarted.",
        phase=phase,
        hint="Close streams that are not read, ask for the same `context_window` everywhere, or raise the limit.",
    )


# --- Transports ------------------------------------------------------------------------------------------------------


class _ToEngine(httpx.BaseTransport):
    """Sends each request to the engine that its job names."""

    def __init__(self) -> None:
        self._network = Network(httpx.URL("http://127.0.0.1"))

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        job, of = request.extensions[JOB]
        of.clock.enter("first_token")
        granted = lease(job, time.monotonic() + of.clock.left() - MARGIN)
        try:
            of.clock.enter("connect")
            response = self._network.handle_request(_directed(request, granted))
            return _leased(response, _Leased(cast("httpx.SyncByteStream", response.stream), granted), granted)
        except httpx.NetworkError as error:
            ended = _ended(granted)
            granted.end()
            raise ended or error from error
        except BaseException:
            granted.end()
            raise

    def close(self) -> None:
        self._network.close()


class _AsyncToEngine(httpx.AsyncBaseTransport):
    """The same for asyncio."""

    def __init__(self) -> None:
        self._network = AsyncNetwork(httpx.URL("http://127.0.0.1"))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        job, of = request.extensions[JOB]
        granted = await alease(job, time.monotonic() + of.clock.left() - MARGIN)
        try:
            response = await self._network.handle_async_request(_directed(request, granted))
            return _leased(response, _AsyncLeased(cast("httpx.AsyncByteStream", response.stream), granted), granted)
        except httpx.NetworkError as error:
            ended = await asyncio.to_thread(_ended, granted)
            granted.end()
            raise ended or error from error
        except BaseException:
            granted.end()
            raise

    async def aclose(self) -> None:
        await self._network.aclose()


def _directed(request: httpx.Request, granted: Lease) -> httpx.Request:
    """The request as it goes over the wire: with the engine's address, its key, and its numbers of the adapters."""
    process = granted.process
    url = httpx.URL(process.address).copy_with(path=request.url.path)
    body = _with_adapters(request.content, request.url.path, granted) if process.adapters else request.content
    headers = {
        "authorization": f"Bearer {process.key}",
        "content-type": "application/json",
        # With several slots the engine often closes a connection just when it is to be used again.
        "connection": "close",
    }
    extensions = {name: value for name, value in request.extensions.items() if name != JOB}
    return httpx.Request(request.method, url, headers=headers, content=body, extensions=extensions)


def _with_adapters(body: bytes, path: str, granted: Lease) -> bytes:
    """A body that names the scale of every adapter, its slot, and whether to go on from the cache of that."""
    if path == TOKENIZE:
        return body
    process, found = granted.process, json.loads(body)
    scales = _convert.scales(found, process.adapters)
    found["lora"] = [{"id": number, "scale": scale} for number, scale in enumerate(scales)]
    if path == EMBEDDINGS:
        granted.use = process.slots.take_any()
    else:
        wanted = (found.pop("adapter", None) or {}).get("digest")
        text = found.get("messages") or found.get("prompt") or ()
        granted.use = process.slots.take(None if wanted in process.activated else scales, text)
        found.update(id_slot=granted.use.number, cache_prompt=granted.use.reuse)
    return json.dumps(found).encode()


def _ended(granted: Lease) -> ConnectionFailed | None:
    """The error for an engine that ended before it answered; None where it still runs."""
    ended = granted.process.how_it_ended(PATIENCE)
    if ended is None:
        return None
    return ConnectionFailed(
        f"The engine was {ended} before it answered." if ended.startswith("killed") else f"The engine {ended}.",
        hint="It is started again for the next request. Is there enough memory?",
        details={"cause": "engine", "engine_stderr": granted.process.last_words()},
    )


def _leased(
    response: httpx.Response, stream: httpx.SyncByteStream | httpx.AsyncByteStream, granted: Lease
) -> httpx.Response:
    extensions = {**response.extensions, LEASE: granted}
    return httpx.Response(response.status_code, headers=response.headers, stream=stream, extensions=extensions)


class _Leased(httpx.SyncByteStream):
    """A body that gives the lease back when it is closed."""

    def __init__(self, inner: httpx.SyncByteStream, granted: Lease) -> None:
        self._inner = inner
        self._granted = granted

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._inner)

    def close(self) -> None:
        try:
            self._inner.close()
        finally:
            self._granted.end()


class _AsyncLeased(httpx.AsyncByteStream):
    def __init__(self, inner: httpx.AsyncByteStream, granted: Lease) -> None:
        self._inner = inner
        self._granted = granted

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._inner:
            yield piece

    async def aclose(self) -> None:
        try:
            await self._inner.aclose()
        finally:
            self._granted.end()


# --- Clients ---------------------------------------------------------------------------------------------------------


class EngineClient:
    """Sends jobs, and reads their answers."""

    def __init__(self, transport: Transport | None) -> None:
        guard = Guard(transport.sync_transport(_ToEngine) if transport is not None else _ToEngine())
        self._http = httpx.Client(base_url=PLACE, transport=guard, trust_env=False, timeout=None)  # noqa: S113 - the guard keeps the time

    def ask(self, job: Job) -> dict[str, Any]:
        """Send a job that answers once."""
        of = job.exchange(lines=False)
        with exchange(of), typed():
            return _object(self._http.send(job.request(self._http, of)).content)

    def open(self, job: Job) -> Reading:
        """Send a job that answers with a stream; the first chunk has come when this returns."""
        of = job.exchange(lines=True)
        with exchange(of), typed():
            response = self._http.send(job.request(self._http, of), stream=True)
        reading = Reading(of, response, job.answer())
        try:
            reading.begin()
        except BaseException:
            reading.close()
            raise
        return reading

    def close(self) -> None:
        """Close every connection."""
        self._http.close()


class AsyncEngineClient:
    """The same for asyncio."""

    def __init__(self, transport: Transport | None) -> None:
        guard = AsyncGuard(transport.async_transport(_AsyncToEngine) if transport is not None else _AsyncToEngine())
        self._http = httpx.AsyncClient(base_url=PLACE, transport=guard, trust_env=False, timeout=None)  # noqa: S113 - the guard keeps the time

    async def ask(self, job: Job) -> dict[str, Any]:
        """Send a job that answers once."""
        of = job.exchange(lines=False)
        with exchange(of), typed():
            return _object((await self._http.send(job.request(self._http, of))).content)

    async def open(self, job: Job) -> AsyncReading:
        """Send a job that answers with a stream; the first chunk has come when this returns."""
        of = job.exchange(lines=True)
        with exchange(of), typed():
            response = await self._http.send(job.request(self._http, of), stream=True)
        reading = AsyncReading(of, response, job.answer())
        try:
            await reading.begin()
        except BaseException:
            await reading.close()
            raise
        return reading

    async def close(self) -> None:
        """Close every connection."""
        await self._http.aclose()


# --- Streams ---------------------------------------------------------------------------------------------------------


class _ReadingBase:
    """What both readings share."""

    def __init__(self, of: Exchange, response: httpx.Response, answer: Answer) -> None:
        self._of = of
        self._response = response
        self._answer = answer
        self._begun = False
        self._granted: Lease | None = response.extensions.get(LEASE)
        if self._granted is not None:  # A replay has none.
            answer.load = self._granted.load
            answer.notes = (*answer.notes, *self._granted.notes)

    def _answered(self) -> None:
        """Note that the first chunk has come: the engine's status does not wait for the prompt to be read."""
        self._begun = True
        if self._granted is not None and self._granted.use is not None:
            self._granted.use.answered()

    def _interrupted(self, error: StreamInterrupted | None = None) -> StreamInterrupted:
        """The error for a stream that ended before its last event. An engine that is killed ends it without a word."""
        ended = self._granted.process.how_it_ended(PATIENCE) if self._granted else None
        what = (
            f"the engine was {ended}"
            if ended and ended.startswith("killed")
            else f"the engine {ended}"
            if ended
            else "the engine closed the connection"
        )
        failed = StreamInterrupted(
            f"The answer ended before it was done: {what}.",
            retryable=not self._begun,
            hint="Ask again; the engine is started anew where it has ended.",
            details={"engine_stderr": self._granted.process.last_words()} if self._granted and ended else None,
        )
        failed.__cause__ = error
        return failed

    def _end_soon(self) -> None:
        self._of.clock.deadline = time.monotonic() + DRAIN


class Reading(_ReadingBase):
    """The chunks of one answer. The first one is there when the reading is handed out."""

    first: Chunk

    def __init__(self, of: Exchange, response: httpx.Response, answer: Answer) -> None:
        super().__init__(of, response, answer)
        self._lines = response.iter_raw()

    def begin(self) -> None:
        """Wait for the first chunk."""
        self.first = self.next()
        self._answered()

    def next(self) -> Chunk:
        """The next chunk; after the one with a `finish_reason` there is none."""
        while True:
            with exchange(self._of), typed():
                try:
                    line = next(self._lines, None)
                except StreamInterrupted as error:
                    raise self._interrupted(error) from error
                if line is None:
                    raise self._interrupted()
                chunk = self._answer.read(line.rstrip(b"\n"))
            if chunk is not None:
                if chunk.finish_reason is not None:
                    self._drain()
                return chunk

    def _drain(self) -> None:
        """Read the end of the body, so that whatever stands in between sees all of it."""
        self._end_soon()
        with exchange(self._of), contextlib.suppress(GraftageError, httpx.HTTPError):
            next(self._lines, None)

    def close(self) -> None:
        """Stop the answer, which frees the engine."""
        self._response.close()


class AsyncReading(_ReadingBase):
    """The same for asyncio."""

    first: Chunk

    def __init__(self, of: Exchange, response: httpx.Response, answer: Answer) -> None:
        super().__init__(of, response, answer)
        self._lines = response.aiter_raw()

    async def begin(self) -> None:
        """Wait for the first chunk."""
        self.first = await self.next()
        self._answered()

    async def next(self) -> Chunk:
        """The next chunk; after the one with a `finish_reason` there is none."""
        while True:
            with exchange(self._of), typed():
                try:
                    line = await anext(self._lines, None)
                except StreamInterrupted as error:
                    raise await asyncio.to_thread(self._interrupted, error) from error
                if line is None:
                    raise await asyncio.to_thread(self._interrupted)
                chunk = self._answer.read(line.rstrip(b"\n"))
            if chunk is not None:
                if chunk.finish_reason is not None:
                    await self._drain()
                return chunk

    async def _drain(self) -> None:
        self._end_soon()
        with exchange(self._of), contextlib.suppress(GraftageError, httpx.HTTPError):
            await anext(self._lines, None)

    async def close(self) -> None:
        """Stop the answer, which frees the engine."""
        await self._response.aclose()


class typed:  # noqa: N801 - reads as a word in a `with`
    """Lets no foreign error out: what the transport has not typed is an answer that cannot be read."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, GraftageError):
            raise ProtocolError(
                f"The engine's answer is not what its API promises ({type(error).__name__}).",
                hint="That is a fault of the provider; tell its authors.",
                details={"reason": reason(error)},
            ) from error


def _object(data: bytes) -> dict[str, Any]:
    found = json.loads(data)
    if not isinstance(found, dict):
        raise ProtocolError("The engine's answer is no JSON object.")
    return found
