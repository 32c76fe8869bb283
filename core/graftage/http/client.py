"""HTTP for providers, written once for sync and async: JSON, lines, server-sent events, uploads.

Here is what every provider needs: limits on time and size, whole lines, typed errors, retries of the opening, and keys
that go to one server alone. `ConnectRequest.http` makes a client.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, TypeAlias, TypeVar
from urllib.parse import urljoin, urlsplit

from graftage import retry
from graftage._engine.answers import decode
from graftage._secrets import SECRET_NAMES, SHORTEST_SECRET
from graftage.calls import MAX_OBJECTS
from graftage.exceptions import ConnectionFailed, GraftageError, ProtocolError, ProviderError, StreamInterrupted
from graftage.http.address import is_private, place
from graftage.http.clock import Clock
from graftage.http.refusal import OK, REFUSED, Answer, Refusal
from graftage.http.transport import Colour, Headers, ReadResponse, Request, Response, Transport, header, read_all
from graftage.types import Chunk, Vectors

if TYPE_CHECKING:
    from typing import Self

    from graftage.calls import Call
    from graftage.http.httpx_transport import AsyncTransport, BlockingTransport

__all__ = ["Document", "Event", "Http", "Items"]

T = TypeVar("T")
Words: TypeAlias = Callable[[bytes], "tuple[str, str] | None"]
"""Returns the text and the thinking of a line that holds nothing else; None for other lines."""
MAX_LINE: Final = 8 * 1024 * 1024
"""Bytes of one line of a stream: the limit of Ollama's own client (`api/client.go`, `maxBufferSize`)."""
MAX_ERROR_BODY: Final = 64 * 1024
REDIRECT: Final = 300
NOT_THERE: Final = (404, 405)
_PLACE: Final = re.compile(r"https?://[A-Za-z0-9._:\[\]-]{1,260}")
DRAIN: Final = 0.2
"""Seconds to wait for the end of a body after its last item, before the connection is given up."""
AGENT: Final = "graftage"
ABOUT_BODY: Final = frozenset({"content-encoding", "content-length", "transfer-encoding"})
EVENTS: Final = "text/event-stream"
FIELDS: Final = ("event", "id", "retry")
"""Fields of an event besides its data; others are ignored."""
DONE: Final = b"[DONE]"
"""The data of the last event in OpenAI's API."""


class Document(dict[str, Any]):
    """A JSON object from a server."""

    headers: Headers = ()
    """The headers that came with it."""


class Http:
    """A client of one server. It opens no connection before the first request."""

    def __init__(
        self,
        base_url: str,
        *,
        build: Callable[[], Transport],
        colour: Colour,
        begin: Callable[[], Call],
        headers: Mapping[str, str] | None = None,
        refusal: Refusal | None = None,
        server: str = "the server",
    ) -> None:
        """Set what all requests share.

        Args:
            base_url: as from `read_base`.
            build: makes the transport at the first request.
            colour: whether the client is sync or async.
            begin: makes the call for a request of an SDK, with the limits of the settings.
            headers: sent with each request; one with the name of a secret only over https or to loopback.
            refusal: the provider's own table of errors.
            server: the server's name, for messages.
        """
        self.base_url = base_url
        self.headers: Headers = _allowed((headers or {}).items(), safe=is_private(base_url))
        self._build = build
        self.colour = colour
        self._begin = begin
        self._transport: Transport | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._refusal = refusal
        self._server = server
        self._secrets = tuple(
            part.encode(errors="surrogatepass")
            for name, value in (headers or {}).items()
            if SECRET_NAMES.search(name)
            for part in (value, value.partition(" ")[2])
            if len(part) >= SHORTEST_SECRET
        )

    async def json(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        call: Call,
        read: Callable[[Document], T] = lambda found: found,  # type: ignore[assignment, return-value]
        empty: bool = False,
        wrap: str | None = None,
        vectors: str | None = None,
        context: Mapping[str, object] | None = None,
    ) -> T:
        """Request a JSON object, again if an error is safe to retry.

        Args:
            method: the HTTP method.
            path: comes after the base URL.
            body: is sent as JSON.
            call: the call whose limits hold.
            read: turns the object into the result; an error of it that is not typed becomes a `ProtocolError`.
            empty: whether an empty body counts as an empty object.
            wrap: a name; a body that is an array or plain text counts as an object that has it under this name.
            vectors: a name in the object that may hold many vectors; valid ones become `Vectors` at once.
            context: for the provider's own transport; it is not sent.

        Raises:
            ProviderError: the class that fits the failure.
        """

        async def ask() -> T:
            clock = Clock(call)
            request = self._request(method, path, _encoded(body), context=context)
            response = await self.send(request, call, clock)
            try:
                data, within = await read_all(response, call.max_reply_bytes)
            finally:
                await response.close()
            if not within:
                raise _too_large(call)
            data = data or (b"{}" if empty else b"")
            document = self._document(data, response.headers, call, vectors, wrap)
            with typed_errors():
                return read(document)

        return await retry.call(ask, call)

    def lines(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        call: Call,
        read: Callable[[dict[str, Any]], T],
        words: Words | None = None,
        context: Mapping[str, object] | None = None,
    ) -> Items[T]:
        """Request a stream of lines, each a JSON object (NDJSON). Only its opening is retried.

        Args:
            method: the HTTP method.
            path: comes after the base URL.
            body: is sent as JSON.
            call: the call whose limits hold, and whose end closes the stream.
            read: turns an object into an item; an error of it that is not typed becomes a `ProtocolError`.
            words: a faster reader for lines that hold only text. It returns their text and thinking, which become a
                chunk, or None to leave a line to `read`. If the caller does not stream, chunks that arrive together
                become one.
            context: for the provider's own transport; it is not sent.
        """
        request = self._request(method, path, _encoded(body), context=context)
        return Items(self, request, call, _Lines(self, call, read), words)

    def events(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        call: Call,
        read: Callable[[Event], T],
        words: Words | None = None,
        context: Mapping[str, object] | None = None,
    ) -> Items[T]:
        """Request server-sent events, with the arguments of `lines`. `[DONE]` ends them.

        `read` takes an `Event`, whose `json()` returns the data as an object or raises the error in it; `words` takes
        the data of an event that has no name and no id. If events belong together, such as a finish reason and the
        usage after it, let `read` keep them, and yield the last chunk after the loop.
        """
        request = self._request(method, path, _encoded(body), ("accept", EVENTS), context=context)
        return Items(self, request, call, _Events(self, call, read), words)

    async def upload(self, path: str, file: Path, *, call: Call, method: str = "POST") -> None:
        """Send a file. It may take long as long as it makes progress.

        Raises:
            ProviderError: the class that fits the failure.
        """

        async def send() -> None:
            with typed_errors():  # The file may be missing.
                request = self._request(method, path, b"", ("content-type", "application/octet-stream"), file=file)
                response = await self.send(request, call, Clock(call))
            await response.close()

        await retry.call(send, call)

    def httpx_transport(self) -> BlockingTransport | AsyncTransport:
        """Return a transport for the client of an SDK built on httpx or httpx2, sync or async as this client is.

        Each request has the limits of the settings and is sent once. The SDK's own timeouts, proxies, redirects and
        keys are ignored. Errors are those of that library, each with the typed error as its cause. Closing the
        transport does nothing: its connections belong to this client.
        """
        from graftage.http.httpx_transport import AsyncTransport, BlockingTransport

        return (BlockingTransport if self.colour == "sync" else AsyncTransport)(self.base_url, self._forward)

    async def close(self) -> None:
        """Close every connection."""
        with self._lock:
            self._closed = True
            transport, self._transport = self._transport, None
        if transport is not None:
            await transport.close()

    # --- Inside ------------------------------------------------------------------------------------------------------

    def _request(
        self,
        method: str,
        path: str,
        body: bytes,
        *more: tuple[str, str],
        file: Path | None = None,
        context: Mapping[str, object] | None = None,
    ) -> Request:
        # A compressed response could be a bomb, and saves nothing on a local network.
        headers = [("accept-encoding", "identity"), ("user-agent", AGENT), *more]
        if body:
            headers.append(("content-type", "application/json"))
        given = {name for name, _ in self.headers}
        kept = (pair for pair in headers if pair[0] not in given)
        return Request(
            method=method,
            url=f"{self.base_url}{path}",
            headers=(*kept, *self.headers),
            body=body,
            file=file,
            context=context or {},
        )

    async def send(self, request: Request, call: Call, clock: Clock) -> Response:
        """Send a request and return its response, or raise the error for one that refuses."""
        response = await (self._transport or self._get_transport()).send(request, clock)
        try:
            if response.status >= REDIRECT:
                body, _ = await read_all(response, MAX_ERROR_BODY)
                raise self._refused(request, response, body, call)
            _check_kind(response)
        except BaseException:
            await response.close()
            raise
        return response

    async def _forward(self, request: Request) -> Response:
        """Send a request of an SDK with our keys in place of its own. The SDK itself reads refusals."""
        call = self._begin()
        given = {name for name, _ in self.headers}
        kept = (pair for pair in _allowed(request.headers, safe=False) if pair[0] not in given)
        request = replace(request, headers=(("accept-encoding", "identity"), *kept, *self.headers))
        response = await (self._transport or self._get_transport()).send(request, Clock(call))
        try:
            if response.status < REDIRECT:
                _check_kind(response)
                return _Bounded(response, call)
            body, _ = await read_all(response, MAX_ERROR_BODY)
            if response.status < REFUSED:
                raise self._refused(request, response, body, call)
            await response.close()
            # Headers about the body may be wrong now.
            headers = tuple(pair for pair in response.headers if pair[0] not in ABOUT_BODY)
            return ReadResponse(response.status, response.reason, headers, self._redact(body))
        except BaseException:
            await response.close()
            raise

    def _redact(self, body: bytes) -> bytes:
        for secret in self._secrets:
            body = body.replace(secret, b"***")
        return body

    def _get_transport(self) -> Transport:
        with self._lock:  # Two threads would build two pools, one of which nobody would close.
            if self._closed:
                raise ConnectionFailed("The connection is closed.", retryable=False, hint="Use an open client.")
            if self._transport is None:
                self._transport = self._build()
            return self._transport

    def _refused(self, request: Request, response: Response, body: bytes, call: Call) -> ProviderError:
        """Return the typed error for a response with an error status or a redirect."""
        status = response.status
        if status < REFUSED:
            return _redirected(status, request.url, header(response.headers, "location"))
        error = self.refused(status, response.headers, body, call)
        if status in NOT_THERE and isinstance(error, ProtocolError):
            error.hint = f"The path was `{request.target.partition('?')[0]}`. {error.hint or ''}".rstrip()
        return error

    def refused(self, status: int, headers: Headers, body: bytes, call: Call) -> ProviderError:
        """Return the typed error for a response that refuses."""
        from graftage.http.errors import refused

        answer = Answer(status=status, headers=headers, body=self._redact(body), call=call, server=self._server)
        return refused(answer, self._refusal)

    def _document(self, data: bytes, headers: Headers, call: Call, vectors: str | None, wrap: str | None) -> Document:
        try:
            found = (vectors and _with_vectors(data, vectors)) or _parsed(data)
        except (ValueError, RecursionError):
            found = None
        if wrap is not None and not isinstance(found, dict):
            found = {wrap: data.decode(errors="replace") if found is None else found}
        if not isinstance(found, dict):
            raise ProtocolError("The response is not a JSON object.", hint="Is it another service? Check `host`.")
        if found.get("error") is not None:
            # Some proxies and old servers report errors with status 200.
            raise self.refused(OK, headers, data, call)
        document = Document(found)
        document.headers = headers
        return document


class Items(Generic[T]):
    """The items of a streamed response. The stream is closed at the end of its call at the latest.

    A chunk with a `finish_reason`, or a step of a pull with the status `success`, is the last item; what follows is
    ignored. The idle limit counts only while this waits for the next item.
    """

    def __init__(
        self, http: Http, request: Request, call: Call, reader: _Lines[T] | _Events[T], words: Words | None = None
    ) -> None:
        self._http = http
        self._request = request
        self._call = call
        self._reader = reader
        self._words = words
        self._most = call.max_reply_bytes
        self._response: Response | None = None
        self.headers: Headers = ()
        """The headers of the response, once its first item is read. They stay after the end."""
        self._begin()

    def _begin(self) -> None:
        self._reader.reset()
        self._clock = Clock(self._call, patient=True)
        self._ready: deque[Any] = deque()
        self._rest = bytearray()
        self._size = 0
        self._over = self._started = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        ready, clock, words = self._ready, self._clock, self._words
        item: Any = None
        try:
            if self._started:
                clock.phase, clock.until = "idle", time.monotonic() + clock.idle
            elif self._response is None and not self._over:
                return await retry.call(self._open, self._call)
            while not ready:
                if self._over or self._response is None:
                    raise StopAsyncIteration
                piece = await self._response.read()
                self._size += len(piece)
                # Split at line feeds alone: JSON may hold U+0085 and U+2028.
                *whole, rest = piece.split(b"\n")
                if whole:
                    whole[0] = bytes(self._rest) + whole[0]
                    self._rest = bytearray(rest)
                    ready.extend(self._reader.take(whole))
                else:
                    self._rest += rest
                if not piece or self._reader.done or len(self._rest) > MAX_LINE or self._size > self._most:
                    await self._end(piece)
            found = words(ready[0]) if words is not None and isinstance(ready[0], bytes) else None
            if found is not None:
                ready.popleft()
                text, thinking = self._joined(*found) if self._call.whole and ready else found
                item = Chunk(text=text, thinking=thinking)
            else:
                item = await self._item(ready.popleft())
        except BaseException:
            await self.close()
            raise
        self._started = True
        taken: T = item
        return taken

    async def _end(self, piece: bytes) -> None:
        """Handle the end of the body, or raise the error for a bound."""
        if self._size > self._most:
            raise _too_large(self._call)
        if len(self._rest) > MAX_LINE:
            raise _too_long()
        if not piece:
            self._over = True
            self._ready.extend(self._reader.end(bytes(self._rest)))
        if self._reader.done:
            await self._drain()

    def _joined(self, text: str, thinking: str) -> tuple[str, str]:
        """Join the words of a line with those of the lines after it, for a caller that does not stream."""
        words: Any = self._words
        ready = self._ready
        texts, thoughts = [text], [thinking]
        while ready and isinstance(ready[0], bytes) and (found := words(ready[0])) is not None:
            ready.popleft()
            texts.append(found[0])
            thoughts.append(found[1])
        return "".join(texts), "".join(thoughts)

    async def _item(self, raw: Any) -> T:
        """Read a line or an event as an item, and drain the body after the last one."""
        try:
            item = self._reader.read(raw)
        except GraftageError:
            raise
        except Exception as error:
            raise _unreadable(error) from error
        if getattr(item, "finish_reason", None) is not None or getattr(item, "status", None) == "success":
            await self._drain()
        return item

    async def _open(self) -> T:
        """Send the request and wait for the first item."""
        self._begin()  # An earlier attempt may have read to the end of its response.
        self._call.opened[id(self)] = self
        self._response = await self._http.send(self._request, self._call, self._clock)
        self.headers = self._response.headers
        try:
            return await self.__anext__()
        except StopAsyncIteration:
            raise self._empty_error() from None

    def _empty_error(self) -> ProviderError:
        """Return the error for a response without an item. Comments, which servers send while they load, are none."""
        kind = (header(self.headers, "content-type") or EVENTS).partition(";")[0]
        if self._size and kind != EVENTS and isinstance(self._reader, _Events):
            return ProtocolError(f"The response is `{kind[:80]}`, not a stream.", hint="Is `host` the URL of an API?")
        return StreamInterrupted("The server sent an empty response.", retryable=True, hint="Try again.")

    async def _drain(self) -> None:
        """Read and drop the rest of the body, so that the connection can be used again."""
        self._over = True
        self._clock.deadline = min(self._clock.deadline, time.monotonic() + DRAIN)
        with contextlib.suppress(GraftageError):
            while self._response is not None and await self._response.read():
                pass
        await self._drop()

    async def _drop(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            await response.close()

    async def close(self) -> None:
        """Stop reading. Safe to call twice."""
        self._over = True
        self._call.opened.pop(id(self), None)
        await self._drop()


# --- Responses for an SDK ---------------------------------------------------------------------------------------------


class _Bounded:
    """A response that raises an error beyond the size that its call allows."""

    def __init__(self, response: Response, call: Call) -> None:
        self.status, self.reason, self.headers = response.status, response.reason, response.headers
        self._response = response
        self._call = call
        self._size = 0

    async def read(self) -> bytes:
        piece = await self._response.read()
        self._size += len(piece)
        if self._size > self._call.max_reply_bytes:
            raise _too_large(self._call)
        return piece

    async def close(self) -> None:
        await self._response.close()


# --- Lines and events ------------------------------------------------------------------------------------------------


class _Lines(Generic[T]):
    """Lines, each a JSON object."""

    done = False

    def __init__(self, http: Http, call: Call, read: Callable[[dict[str, Any]], T]) -> None:
        self._http = http
        self._call = call
        self._of = read
        self.reset()

    def reset(self) -> None:
        """Begin with another response."""
        self._unfinished = b""

    take: Callable[[Iterable[bytes]], Iterable[bytes]] = staticmethod(partial(filter, bytes.strip))
    """Return the lines that are not blank. `read` takes them one by one: an invalid one spoils none before it."""

    def end(self, rest: bytes) -> Iterable[bytes]:
        """Return the last line of a body, which may lack its line break."""
        self._unfinished = rest
        return self.take([rest])

    def read(self, line: bytes) -> T:
        """Read a line as an item."""
        try:
            found = _parsed(line)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict) and found.get("error") is None:
            return self._of(found)
        raise self._line_error(line, found)

    def _line_error(self, line: bytes, found: object) -> ProviderError:
        """Return the error for a line that holds an error, or is not an object."""
        tail = line if found else line[max(line.rfind(b"{"), 0) :]
        if b'"error"' in tail:  # Some servers write an error right after an unfinished object.
            return self._http.refused(OK, (), tail, self._call)
        if line is self._unfinished and line.lstrip().startswith(b"{"):
            return _cut()
        return ProtocolError("A line of the stream is not a JSON object.", hint="Is it another service? Check `host`.")


class Event:
    """A server-sent event."""

    __slots__ = ("_call", "_data", "_http", "event", "id", "retry")

    def __init__(self, http: Http, call: Call, fields: Mapping[str, str], data: bytes) -> None:
        self._http = http
        self._call = call
        self._data = data
        self.event = fields.get("event", "message")
        self.id = fields.get("id")
        self.retry = fields.get("retry")

    @property
    def data(self) -> str:
        """The data as text."""
        return self._data.decode("utf-8", "replace")

    def json(self) -> dict[str, Any]:
        """Return the data as a JSON object.

        Raises:
            ProviderError: the data is an error of the server.
        """
        try:
            found = _parsed(self._data)
        except (ValueError, RecursionError):
            found = None
        if self.event == "error" and not isinstance(found, dict):
            raise self._http.refused(OK, (), _encoded({"error": found or self.data}), self._call)
        if not isinstance(found, dict):
            raise ProtocolError("An event of the stream is not a JSON object.", hint="Check that `host` is right.")
        if found.get("error") is not None or self.event == "error":
            raise self._http.refused(OK, (), self._data, self._call)
        return found


class _Events(Generic[T]):
    """Events (HTML Living Standard, 9.2.6), except that a lone carriage return does not end a line."""

    def __init__(self, http: Http, call: Call, read: Callable[[Event], T]) -> None:
        self._http = http
        self._call = call
        self._of = read
        self.reset()

    def reset(self) -> None:
        """Begin with another response."""
        self.done = False
        self._fields: dict[str, str] = {}
        self._data: list[bytes] = []

    def take(self, lines: Iterable[bytes]) -> Iterator[Event | bytes | str]:
        """Yield the events that these lines complete; of one that has nothing else, its data.

        A line that looks like a JSON object comes unchanged, as text.
        """
        for each in lines:
            line = each.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line:
                data = b"\n".join(self._data)
                self.done = self.done or data.strip() == DONE
                if self._data and not self.done:
                    yield Event(self._http, self._call, self._fields, data) if self._fields else data
                self._data.clear()
                self._fields = {}
            elif line.startswith(b"{"):  # No field has such a name.
                yield line.decode("utf-8", "replace")
            else:
                self._take(line.decode("utf-8", "replace"))
        if len(self._data) > MAX_OBJECTS:
            raise _too_many(len(self._data), "lines in one event")

    def end(self, rest: bytes) -> Iterator[Event | bytes | str]:
        """Yield the last events. An event without its empty line is incomplete, and an error."""
        yield from self.take([rest] if rest else [])
        if self._data and not self.done and b"".join(self._data).strip() != DONE:
            raise _cut()
        self.done = self.done or bool(self._data)

    def read(self, found: Event | bytes | str) -> T:
        """Read an event as an item."""
        if not isinstance(found, str):
            return self._of(found if isinstance(found, Event) else Event(self._http, self._call, {}, found))
        Event(self._http, self._call, {}, found.encode()).json()
        raise ProtocolError("The response is a JSON object, not a stream of events.", hint="Is it the right service?")

    def _take(self, line: str) -> None:
        """Take a field that is rarely sent; a comment has no name."""
        name, _, value = line.removeprefix("\ufeff").partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value.encode())
        elif name in FIELDS:
            self._fields[name] = value


def _too_long() -> ProtocolError:
    return ProtocolError(
        f"A line of the response is longer than {MAX_LINE} bytes.",
        hint="No model writes so much at once. Is it the right service?",
    )


def _cut() -> StreamInterrupted:
    return StreamInterrupted("The stream ended in the middle of a line.", retryable=True, hint="Try again.")


def _too_large(call: Call) -> ProtocolError:
    return ProtocolError(f"The response is larger than {call.max_reply_bytes} bytes.", hint="Raise `max_reply_bytes`.")


def _redirected(status: int, url: str, location: str | None) -> ProtocolError:
    """Return the error for a redirect. To follow it could send the prompt to any server.

    The error shows no user, path or query of the target, which may be secret.
    """
    to, hint = "", "Set `host` to the final address."
    with contextlib.suppress(ValueError):
        target, own = urlsplit(urljoin(url, location or "")), place(url)
        there = place(target.geturl())
        if there == own:
            to, hint = " to another of its pages", "Does it require a sign-in? Check the path in `host`, and `api_key`."
        elif target.scheme in ("http", "https") and _PLACE.fullmatch(there):
            to, hint = f" to {there}", f"If that is right, set `host` to it in place of {own}."
        elif target.scheme not in ("http", "https"):
            to = " to an address that is not http"
    return ProtocolError(
        f"The server redirects{to} (status {status}); redirects are not followed.", status=status, hint=hint
    )


def _too_many(count: int, what: str) -> ProtocolError:
    return ProtocolError(
        f"The response holds {count} {what}; the limit is {MAX_OBJECTS}.",
        hint="Is it the right service? If it is, request less at once.",
    )


def _allowed(headers: Iterable[tuple[str, str]], *, safe: bool) -> Headers:
    """Return the headers that may be sent: secrets only over https or to loopback (`safe`)."""
    return tuple((name.lower(), value) for name, value in headers if safe or not SECRET_NAMES.search(name))


def _check_kind(response: Response) -> None:
    encoding = (header(response.headers, "content-encoding") or "identity").lower()
    if encoding != "identity":
        raise ProtocolError(
            f"The response is compressed ({encoding[:40]}), which was not requested.",
            hint="Turn compression off in the server, or in the proxy in front of it.",
        )
    if "text/html" in (header(response.headers, "content-type") or "").lower():
        raise ProtocolError(
            "The response is a web page, of another service or of a proxy.",
            status=response.status,
            hint="Check `host` and its port.",
        )


# --- JSON ------------------------------------------------------------------------------------------------------------


_encoder: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _encoded(body: Mapping[str, object] | None) -> bytes:
    return b"" if body is None else _encoder.encode(body).encode()


def _parsed(data: bytes) -> Any:
    """Read JSON with `decode`.

    Raises:
        ProtocolError: it holds too many objects.
        ValueError: it is not valid JSON, or not UTF-8.
        RecursionError: it is nested too deeply.
    """
    if len(data) > MAX_OBJECTS:  # Fewer bytes hold fewer objects.
        _check_objects(data)
    return decode(data)


def _check_objects(data: bytes) -> None:
    """Refuse JSON that would take much more memory than its bytes. Brackets inside texts count as well."""
    count = data.count(b"{") + data.count(b"[")
    if count > MAX_OBJECTS:
        raise _too_many(count, "objects and lists at once")


def _with_vectors(data: bytes, name: str) -> Any:
    """Return a JSON object with `Vectors` under a name, without building their lists.

    Return None if the object has anything else there; then it is read in the common way.
    """
    import msgspec

    _check_objects(data)
    plain = str | int | float | bool | dict[str, Any] | None
    with contextlib.suppress(msgspec.DecodeError, ValueError, RecursionError):
        found: dict[str, Any] = msgspec.json.decode(data, type=dict[str, tuple[tuple[float, ...], ...] | plain])
        if [each for each, value in found.items() if isinstance(value, tuple)] == [name]:
            return {**found, name: Vectors._of(found[name])}  # noqa: SLF001 - the parser has checked the types
    return None


@contextlib.contextmanager
def typed_errors() -> Iterator[None]:
    """Turn untyped errors in a block that reads a response into a `ProtocolError`."""
    try:
        yield
    except GraftageError:
        raise
    except Exception as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> ProtocolError:
    return ProtocolError(
        f"The response does not follow the API ({type(error).__name__}).",
        hint="Is it another service, or the page of a proxy? Check `host`.",
        details={"reason": reason(error)},
    )


def reason(error: Exception) -> str:
    """Return what was wrong with a response, without its text, which must not be logged."""
    found = getattr(error, "errors", None)
    if callable(found):  # pydantic's
        places = [f"{'.'.join(map(str, each['loc']))} ({each['type']})" for each in found(include_input=False)]
        return f"{type(error).__name__}: {', '.join(places)}"[:500]
    return f"{type(error).__name__}: {error.args[0]!r}"[:200] if isinstance(error, KeyError) else type(error).__name__
