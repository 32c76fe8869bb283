"""Bytes of HTTP/1.1 to requests and answers: what both networks share. llhttp, through httptools, reads the answers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import httptools

from graftage.exceptions import RequestRejected, StreamInterrupted

if TYPE_CHECKING:
    from graftage.http.address import Server
    from graftage.http.transport import Request

__all__ = ["BLOCK", "HIGH_WATER", "OK", "Framing", "head_of"]

BLOCK: Final = 1 << 16
"""Bytes that are received at once."""
HIGH_WATER: Final = 1 << 18
"""Bytes that have come and were not read, above which a connection waits with more."""
MAX_HEAD: Final = 100 * 1024
"""Bytes of the headers of one answer, those of interim answers (RFC 9110, 15.2) included."""
OK: Final = 200
"""The lowest status that is no interim answer."""
FRAMED: Final = frozenset({"content-length", "transfer-encoding"})
"""Headers that say where a body ends."""
_UNSAFE: Final = re.compile(rb"[\r\n\0]")


def head_of(request: Request, server: Server) -> bytes:
    """The request line and the headers of a request.

    Raises:
        RequestRejected: a header cannot be sent. It is not repeated: it may be a key.
    """
    size = request.file.stat().st_size if request.file is not None else len(request.body)
    target = request.target if request.target.isascii() and request.target.isprintable() else quote(request.target)
    if server.absolute:
        target = f"{server.origin}{target}"
    headers = [("host", server.netloc), *server.headers, *request.headers]
    if size or request.method not in ("GET", "HEAD"):
        headers.append(("content-length", str(size)))
    lines = [f"{name}: {value}".encode() for name, value in headers]
    if any(map(_UNSAFE.search, lines)):
        raise RequestRejected("A header holds a line break.", hint="Check `api_key` and `headers`.")
    return b"\r\n".join([f"{request.method} {target} HTTP/1.1".encode(), *lines, b"", b""])


class Framing:
    """One answer, as far as its bytes have come. What comes after its end makes its connection useless."""

    __slots__ = (
        *("_bodiless", "_parser", "_pieces"),
        *("complete", "fault", "head", "headers", "reason", "size", "status", "usable"),
    )

    def __init__(self, *, bodiless: bool = False) -> None:
        """Begin. `bodiless` is the answer to HEAD or CONNECT, which ends with its headers whatever they say."""
        self._parser = httptools.HttpResponseParser(self)
        # Some proxies send a length beside a chunked body; the chunks count (RFC 9112, 6.3).
        self._parser.set_dangerous_leniencies(lenient_chunked_length=True)
        self._bodiless = bodiless
        self._pieces: list[bytes] = []
        self.status, self.reason = 0, ""
        self.headers: list[tuple[str, str]] = []
        self.size = 0
        """Bytes that wait to be taken; before the head is complete, those of the head."""
        self.head = False
        self.complete = False
        self.usable = False
        """Whether the connection can take another request."""
        self.fault: BaseException | None = None
        """Why no more will come."""

    def feed(self, data: bytes) -> None:
        """Take what has come."""
        if not self.head:
            self.size += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.usable = False
            if not self.complete:
                self.fault = self.fault or error
        if not self.head and self.size > MAX_HEAD:
            self.fault = self.fault or httptools.HttpParserError(f"the headers are longer than {MAX_HEAD} bytes")

    def end(self, error: BaseException | None = None) -> None:
        """The connection has ended, which ends a body that nothing else ends."""
        self.usable = False
        if self.complete:
            return
        if error is None and self.head and not any(name in FRAMED for name, _ in self.headers):
            self.complete = True
        else:
            self.fault = self.fault or error or EOFError("the server closed the connection")

    def let_go(self) -> None:
        """Nothing more will be fed. The parser and this refer to each other, and neither must wait for the collector."""
        del self._parser

    def take(self) -> bytes:
        """What has come of the body; empty where more has to be received, or where it is `complete`.

        Raises:
            StreamInterrupted: nothing more will come of a body that is not complete.
        """
        if pieces := self._pieces:
            self._pieces, self.size = [], 0
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if self.fault is not None:
            raise self._interrupted(self.fault) from self.fault
        return b""

    @staticmethod
    def _interrupted(fault: BaseException) -> StreamInterrupted:
        return StreamInterrupted(
            f"The connection broke before the answer was complete: {_words(fault)}.",
            retryable=True,
            hint="Was the server stopped, or a proxy's limit reached?",
        )

    # --- What httptools calls ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.complete:  # Nobody has asked for another answer, and it must not be taken for that to the next request.
            self.usable = False

    def on_status(self, reason: bytes) -> None:
        if not self.head:
            self.reason = reason.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.head:  # Later ones are trailers.
            self.headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        if self.complete:
            return
        self.status = self._parser.get_status_code()
        if self.status < OK:
            self.headers.clear()
            return
        self.head, self.size = True, 0
        self.complete = self._bodiless

    def on_body(self, body: bytes) -> None:
        if not self.complete:
            self._pieces.append(body)
            self.size += len(body)

    def on_message_complete(self) -> None:
        if self.head and not self.complete:
            self.complete = True
            self.usable = self._parser.should_keep_alive()


def _words(fault: BaseException) -> str:
    return str(fault).rstrip(".") or type(fault).__name__
