"""HTTP/1.1 for both networks: write requests, and read responses with llhttp, through httptools."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import httptools

from graftage.exceptions import RequestRejected, StreamInterrupted

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from graftage.http._server import Server
    from graftage.http.transport import Request

__all__ = ["BLOCK", "BUFFER_LIMIT", "OK", "Framing", "ParserError", "block_of", "head_of", "size_of", "target_of"]

BLOCK: Final = 1 << 16
"""Bytes to receive at once."""
BUFFER_LIMIT: Final = 1 << 16
"""Unread bytes above which a connection pauses; also the most that headers may have, with those of interim responses
(RFC 9110, 15.2)."""
INTERIM: Final = 100
"""The lowest valid status."""
OK: Final = 200
"""The lowest status of a final response."""
FRAMED: Final = frozenset({"content-length", "transfer-encoding"})
"""Headers that define the end of a body."""
ParserError = (httptools.HttpParserError, httptools.HttpParserUpgrade)
TARGET_CHARACTERS: Final = "%/?:@!$&'()*+,;=~[]{}|"
"""Characters that stay as they are if a target is percent-encoded."""
_SAFE: Final = re.compile('[!"$-~]+')
_UNSAFE: Final = re.compile(rb"[\r\n\0]")


def size_of(request: Request) -> int:
    """Return the number of bytes in the body."""
    return request.file.stat().st_size if request.file is not None else len(request.body)


def block_of(file: Path, start: int, size: int) -> bytes:
    """Read the next block of a file, up to the announced `size`: the server would take more bytes for a new request.

    The file is open only during this call, so that an interrupted upload leaves nothing to close.

    Raises:
        RequestRejected: the file is shorter than announced.
    """
    with file.open("rb") as stream:
        stream.seek(start)
        block = stream.read(min(BLOCK, size - start))
    if not block:
        raise RequestRejected("The file became shorter during the upload.", hint="Send it again.")
    return block


def target_of(request: Request, server: Server) -> str:
    """Return the target for the request line: the path, or the whole URL if a proxy reads it."""
    target = request.target if _SAFE.fullmatch(request.target) else quote(request.target, safe=TARGET_CHARACTERS)
    return f"{server.origin}{target}" if server.absolute else target


def head_of(request: Request, server: Server, size: int) -> bytes:
    """Return the request line and the headers for a body of this size.

    Raises:
        RequestRejected: a header cannot be sent. The error does not show it, since it may be a key.
    """
    headers = [*(server.headers if server.absolute else ()), *request.headers]
    if all(name != "host" for name, _ in request.headers):  # Behind a gateway a server may need another name.
        headers.insert(0, ("host", server.netloc))
    if size or request.method not in ("GET", "HEAD"):
        headers.append(("content-length", str(size)))
    try:
        lines = [f"{name}: {value}".encode() for name, value in headers]
    except UnicodeEncodeError:
        lines = [b"\0"]
    if any(map(_UNSAFE.search, lines)):
        hint = "Check `api_key` and `headers`."
        raise RequestRejected("A header holds a line break or another invalid character.", hint=hint)
    return b"\r\n".join([f"{request.method} {target_of(request, server)} HTTP/1.1".encode(), *lines, b"", b""])


class Framing:
    """One response, as far as it has been received. Bytes after its end make its connection unusable."""

    __slots__ = (
        *("_bodiless", "_parser", "complete", "fault", "feed", "head", "headers", "on_body", "pieces", "reason"),
        *("size", "status", "usable"),
    )

    def __init__(self, *, bodiless: bool = False) -> None:
        """Begin a response. `bodiless` is for HEAD and CONNECT, whose responses always end with their headers."""
        self.pieces: list[bytes] = []
        """The received pieces of the body that are not read yet."""
        self.on_body = self._surplus if bodiless else self.pieces.append
        self._parser = httptools.HttpResponseParser(self)
        # Some proxies send a length beside a chunked body; then the chunks count (RFC 9112, 6.3). Small servers end
        # lines with a line feed alone (2.2), or pad the sizes of chunks.
        self._parser.set_dangerous_leniencies(
            lenient_chunked_length=True, lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True
        )
        self.feed: Callable[[bytes], None] = self._parser.feed_data
        """Takes received bytes. Pass what it raises to `failed`."""
        self._bodiless = bodiless
        self.status, self.reason = 0, ""
        self.headers: list[tuple[str, str]] = []
        self.size = 0
        """Bytes received since the last read."""
        self.head = False
        self.complete = False
        self.usable = False
        """Whether the connection can take another request."""
        self.fault: BaseException | None = None
        """Why nothing more will come."""

    def failed(self, error: BaseException) -> None:
        """Note an error in the received bytes."""
        self.usable = False
        if not self.complete:
            self.fault = self.fault or error

    def is_full(self) -> bool:
        """Whether to pause receiving. Too long headers are an error instead."""
        if not self.head:
            self.failed(httptools.HttpParserError(f"the headers are longer than {BUFFER_LIMIT} bytes"))
        return self.head

    def end(self, error: BaseException | None = None) -> None:
        """Note the end of the connection. It also ends a body without length or chunks."""
        self.usable = False
        if error is None and self.head and not any(name in FRAMED for name, _ in self.headers):
            self.complete = True
        self.failed(error or EOFError("the server closed the connection"))

    def release(self) -> None:
        """Drop the parser: it and this object refer to each other, and would wait for garbage collection."""
        del self._parser, self.feed

    def fault_text(self) -> str:
        """Describe `fault` for a message."""
        fault = self.fault or EOFError()
        return str(fault.__context__ or fault).rstrip(".") or type(fault).__name__

    def interrupted(self) -> StreamInterrupted:
        """Return the error for an incomplete body."""
        error = StreamInterrupted(
            f"The connection broke before the response was complete: {self.fault_text()}.",
            retryable=True,
            hint="Was the server stopped, or a proxy's limit reached?",
        )
        error.__cause__ = self.fault
        return error

    # --- What httptools calls ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Refuse a second response: it must not become the response to the next request."""
        if self.complete:
            raise ValueError("it sends a second response")

    def on_status(self, reason: bytes) -> None:
        """Keep the reason phrase."""
        if not self.head:
            self.reason = reason.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; ignore trailers."""
        if not self.head:
            self.headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        """Check the complete headers; drop those of an interim response."""
        if self.complete:
            return
        self.status = self._parser.get_status_code()
        if self.status < INTERIM:
            raise ValueError("its status code is invalid")
        if self.status < OK:
            self.headers.clear()
            return
        if any(name == "transfer-encoding" and value.lower() != "chunked" for name, value in self.headers):
            raise ValueError("its transfer encoding is unknown")
        self.head = True
        if self._bodiless:
            self.complete, self.usable = True, self._parser.should_keep_alive()

    def _surplus(self, _body: bytes) -> None:
        self.usable = False

    def on_message_complete(self) -> None:
        """Note the end of the response; ignore that of an interim one."""
        if self.head and not self.complete:
            self.complete = True
            self.usable = self._parser.should_keep_alive()
