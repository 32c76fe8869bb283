"""A server for tests: it gives scripted answers to any request, and notes what its clients do."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from graftage.exceptions import ConnectionFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Self

    from graftage.http import Clock, Request, Response, Transport
    from graftage.testing.interactions import Interaction

__all__ = ["PATIENCE", "Answer", "Probe", "Redirect", "Seen", "StandIn", "dead_address", "served"]

PATIENCE: Final = 2.0
"""Seconds for which a stalled answer waits for its client to leave. Then the test fails, and does not hang."""


@dataclass(frozen=True)
class Answer:
    """What the server answers."""

    pieces: tuple[bytes, ...] = ()
    """The body; each piece is sent on its own."""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    ending: Literal["end", "cut", "stall"] = "end"
    """After the pieces: a proper end, a closed connection, or silence until the client leaves."""
    silent: bool = False
    """Send nothing at all, not even a head."""

    @property
    def is_stream(self) -> bool:
        """Whether the body has several lines, of which the first ones are the begin of a reply."""
        return b"".join(self.pieces).count(b"\n") > 2

    def begun(self, ending: Literal["end", "cut", "stall"]) -> Answer:
        """Return the first half of this answer, cut after a line, with an ending."""
        body = b"".join(self.pieces)
        first = body[: body.rfind(b"\n", 0, len(body) // 2) + 1] or body[: len(body) // 2]
        return replace(self, pieces=(first,), ending=ending)


@dataclass(frozen=True)
class Seen:
    """A request that came."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes


class StandIn:
    """The server. It answers as recorded: to an equal request, else to the last one of that method and target."""

    def __init__(self, recorded: Iterable[tuple[Seen, Answer]] = ()) -> None:
        self._exact = {(each.method, each.target, each.body): answer for each, answer in recorded}
        self._by_target = {key[:2]: answer for key, answer in self._exact.items()}
        self._chat = next(reversed(self._by_target), ("", ""))
        self._otherwise = Answer((b"{}",))
        self.requests: list[Seen] = []
        self.stalled = threading.Event()
        """Set when an answer has begun to stall."""
        self.left = threading.Event()
        """Set when the client of a stalled answer has closed its connection."""
        handler = type("Handler", (_Handler,), {"stand_in": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign] # clients may leave
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def chat(self) -> Answer | None:
        """The recorded answer to a chat, which is the last of the recorded ones."""
        return self._by_target.get(self._chat)

    @property
    def chats(self) -> list[bytes]:
        """The bodies of all requests for a chat."""
        return [each.body for each in self.requests if (each.method, each.target) == self._chat]

    def answer_chats(self, answer: Answer) -> None:
        """Answer every chat with this."""
        self._exact.clear()
        self._by_target[self._chat] = answer

    def answer_all(self, answer: Answer) -> None:
        """Answer every request with this."""
        self._exact.clear()
        self._by_target.clear()
        self._otherwise = answer

    def answer_to(self, seen: Seen) -> Answer:
        """Note a request, and return the answer to it."""
        self.requests.append(seen)
        target = seen.method, seen.target
        return self._exact.get((*target, seen.body)) or self._by_target.get(target, self._otherwise)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stand_in: ClassVar[StandIn]

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(PATIENCE)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        named = {name.lower(): value for name, value in self.headers.items()}
        answer = self.stand_in.answer_to(Seen(self.command, self.path, named, body))
        with suppress(OSError):
            if not answer.silent:
                self._send(answer)
            if answer.ending == "stall":
                self._stall()
        self.close_connection = self.close_connection or answer.ending != "end"

    do_GET = do_DELETE = do_HEAD = do_PUT = do_POST  # noqa: N815 - the names of the base class

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for piece in answer.pieces:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.wfile.flush()
        if answer.ending == "end":
            self.wfile.write(b"0\r\n\r\n")

    def _stall(self) -> None:
        """Wait until the client leaves: the end of what it sends, or a reset."""
        self.stand_in.stalled.set()
        with suppress(TimeoutError):
            try:
                gone = not self.connection.recv(1)
            except ConnectionError:
                gone = True
            if gone:
                self.stand_in.left.set()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass


class Redirect:
    """A value for `transport`: sends every request to one address, over the network."""

    def __init__(self, url: str) -> None:
        self._url = url

    def wrap(self, network: Callable[[], Transport]) -> Transport:
        """Return the network's transport with other addresses."""
        return _Redirected(network(), self._url)


class _Redirected:
    def __init__(self, inner: Transport, url: str) -> None:
        self.colour = inner.colour
        self.close = inner.close
        self._inner = inner
        self._url = url

    async def send(self, request: Request, clock: Clock) -> Response:
        return await self._inner.send(replace(request, url=self._url + request.target), clock)


class Probe:
    """A value for `transport`: notes what would be sent, and fails as if nothing listened."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.colour = None

    def wrap(self, network: Callable[[], Transport]) -> Transport:  # noqa: ARG002 - there is no network
        """Return the probe itself."""
        return self

    async def send(self, request: Request, clock: Clock) -> Response:  # noqa: ARG002
        """Note a request."""
        self.requests.append(request)
        raise ConnectionFailed("Nothing listens here.", retryable=False)

    async def close(self) -> None:
        """Do nothing."""


def dead_address() -> str:
    """Return an address of this machine at which nothing listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def served(recorded: Iterable[Interaction]) -> Iterator[tuple[Seen, Answer]]:
    """Yield the requests of a cassette with their answers."""
    for each in recorded:
        headers = {name: values[0] for name, values in each.headers.items() if values}
        seen = Seen(each.request.method, each.request.target, {}, each.request.body)
        yield seen, Answer(each.chunks, each.status, headers)
