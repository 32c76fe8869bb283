"""Bytes of HTTP/1.1 to requests and answers: what both networks share. llhttp, through httptools, reads the answers."""

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

__all__ = ["BLOCK", "ENOUGH", "OK", "Framing", "ParserError", "block_of", "head_of", "size_of", "target_of"]

BLOCK: Final = 1 << 16
"""Bytes that are received at once."""
ENOUGH: Final = 1 << 16
"""Bytes that have come and were not read, above which a connection waits with more; what headers may have at most,
those of interim answers (RFC 9110, 15.2) included."""
INTERIM: Final = 100
"""The lowest status that there is."""
OK: Final = 200
"""The lowest status that is no interim answer."""
FRAMED: Final = frozenset({"content-length", "transfer-encoding"})
"""Headers that say where a body ends."""
ParserError = (httptools.HttpParserError, httptools.HttpParserUpgrade)
KEPT: Final = "%/?:@!$&'()*+,;=~[]{}|"
"""What a target keeps as it is, where another character of it has to be encoded."""
_SAFE: Final = re.compile('[!"$-~]+')
_UNSAFE: Final = re.compile(rb"[\r\n\0]")


def size_of(request: Request) -> int:
    """Bytes of the body."""
    return request.file.stat().st_size if request.file is not None else len(request.body)


def block_of(file: Path, start: int, size: int) -> bytes:
    """The next block of a file of which `size` bytes were promised; what it has grown by would be taken for a request.

    The file is open no longer than this takes: a call that ends half-way leaves nothing to close.

    Raises:
        RequestRejected: the file has become shorter.
    """
    with file.open("rb") as stream:
        stream.seek(start)
        block = stream.read(min(BLOCK, size - start))
    if not block:
        raise RequestRejected("The file became shorter while it was sent.", hint="Send it again.")
    return block


def target_of(request: Request, server: Server) -> str:
    """What the request line names: the path, or the whole URL where a proxy reads it."""
    target = request.target if _SAFE.fullmatch(request.target) else quote(request.target, safe=KEPT)
    return f"{server.origin}{target}" if server.absolute else target


def head_of(request: Request, server: Server, size: int) -> bytes:
    """The request line and the headers of a request with a body of this size.

    Raises:
        RequestRejected: a header cannot be sent. It is not repeated: it may be a key.
    """
    headers = [*(server.headers if server.absolute else ()), *request.headers]
    if all(name != "host" for name, _ in request.headers):  # A server behind a gateway may go by another name.
        headers.insert(0, ("host", server.netloc))
    if size or request.method not in ("GET", "HEAD"):
        headers.append(("content-length", str(size)))
    try:
        lines = [f"{name}: {value}".encode() for name, value in headers]
    except UnicodeEncodeError:
        lines = [b"\0"]
    if any(map(_UNSAFE.search, lines)):
        hint = "Check `api_key` and `headers`."
        raise RequestRejected("A header holds a line break, or what no text can hold.", hint=hint)
    return b"\r\n".join([f"{request.method} {target_of(request, server)} HTTP/1.1".encode(), *lines, b"", b""])


class Framing:
    """One answer, as far as its bytes have come. What comes after its end makes its connection useless."""

    __slots__ = (
        *("_bodiless", "_parser", "complete", "fault", "feed", "head", "headers", "on_body", "pieces", "reason"),
        *("size", "status", "usable"),
    )

    def __init__(self, *, bodiless: bool = False) -> None:
        """Begin. `bodiless` is the answer to HEAD or CONNECT, which ends with its headers whatever they say."""
        self.pieces: list[bytes] = []
        """What has come of the body and was not read."""
        self.on_body = self._surplus if bodiless else self.pieces.append
        self._parser = httptools.HttpResponseParser(self)
        # Some proxies send a length beside a chunked body; the chunks count (RFC 9112, 6.3). Small servers end lines
        # with a line feed alone (2.2), or pad the sizes of chunks.
        self._parser.set_dangerous_leniencies(
            lenient_chunked_length=True, lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True
        )
        self.feed: Callable[[bytes], None] = self._parser.feed_data
        """Takes what has come. Whatever it raises is for `failed`."""
        self._bodiless = bodiless
        self.status, self.reason = 0, ""
        self.headers: list[tuple[str, str]] = []
        self.size = 0
        """Bytes that have come since something was read."""
        self.head = False
        self.complete = False
        self.usable = False
        """Whether the connection can take another request."""
        self.fault: BaseException | None = None
        """Why no more will come."""

    def failed(self, error: BaseException) -> None:
        """What has come breaks a rule."""
        self.usable = False
        if not self.complete:
            self.fault = self.fault or error

    def crowded(self) -> bool:
        """Whether enough has come for now. Headers have a bound instead."""
        if not self.head:
            self.failed(httptools.HttpParserError(f"the headers are longer than {ENOUGH} bytes"))
        return self.head

    def end(self, error: BaseException | None = None) -> None:
        """The connection has ended, which ends a body that nothing else ends."""
        self.usable = False
        if error is None and self.head and not any(name in FRAMED for name, _ in self.headers):
            self.complete = True
        self.failed(error or EOFError("the server closed the connection"))

    def let_go(self) -> None:
        """Nothing more will be fed: the parser and this refer to each other, and must not wait for the collector."""
        del self._parser, self.feed

    def words(self) -> str:
        """Why no more will come, for people."""
        fault = self.fault or EOFError()
        return str(fault.__context__ or fault).rstrip(".") or type(fault).__name__

    def interrupted(self) -> StreamInterrupted:
        """The error for a body that will not be complete."""
        error = StreamInterrupted(
            f"The connection broke before the answer was complete: {self.words()}.",
            retryable=True,
            hint="Was the server stopped, or a proxy's limit reached?",
        )
        error.__cause__ = self.fault
        return error

    # --- What httptools calls ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """An answer begins; a second one must not be taken for that to the next request."""
        if self.complete:
            raise ValueError("nobody has asked for another answer")

    def on_status(self, reason: bytes) -> None:
        """The reason phrase."""
        if not self.head:
            self.reason = reason.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer, which nobody needs."""
        if not self.head:
            self.headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        """The headers of an interim answer, or of the answer itself, are there."""
        if self.complete:
            return
        self.status = self._parser.get_status_code()
        if self.status < INTERIM:
            raise ValueError("its status is none")
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
        """An interim answer, or the answer itself, has ended."""
        if self.head and not self.complete:
            self.complete = True
            self.usable = self._parser.should_keep_alive()
