"""Count the calls and lines of our code in a piece of work, in all threads, with the same result on each run."""

from __future__ import annotations

import dis
import gc
import json
import socket
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import CodeType, FrameType
    from typing import Self

MODEL = "smollm2:135m"
PATIENCE = 60.0
SOCKET = frozenset({"connect", "send", "sendall", "sendto", "sendmsg", "recv", "recv_into"})
UNSTEADY = ("<listcomp>", "<dictcomp>", "<setcomp>", "__create_fn__")


@cache
def _beginnings(code: CodeType) -> frozenset[int]:
    """Return where calls of a function begin. Resuming after a wait does not count: it depends on the network."""
    steps = (each for each in dis.get_instructions(code) if each.opname == "RESUME" and not _waited(each))
    return frozenset() if _passing(code) else frozenset(each.offset for each in steps)


def _passing(code: CodeType) -> bool:
    """Whether only some versions of Python have such a frame."""
    return code.co_name in UNSTEADY or (code.co_name, code.co_filename) == ("<module>", "<string>")


def _waited(instruction: dis.Instruction) -> bool:
    return instruction.arg is not None and instruction.arg & 3 == 3


def _ours(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    return name.startswith("graftage") and not name.startswith("graftage_ollama.testing")


def _name(frame: FrameType) -> str:
    return f"{frame.f_globals['__name__']}:{frame.f_code.co_qualname}"


def _stack(frame: FrameType | None) -> tuple[str, ...]:
    found = []
    while frame is not None:
        if _ours(frame):
            found.append(_name(frame))
        frame = frame.f_back
    return tuple(reversed(found))


class Count:
    """A counter of calls and lines, or of calls and paths to sockets. Each `with count:` starts from zero."""

    def __init__(self) -> None:
        self._on = False
        self.calls: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        self.walks: dict[tuple[str, ...], None] = {}
        """Our functions on the stack at each use of a socket."""

    @contextmanager
    def watching(self, *, lines: bool = False) -> Iterator[None]:
        """Watch this thread and new ones: their lines, or else their sockets."""
        ours, everywhere, look = (
            (sys.settrace, threading.settrace, self._trace)
            if lines
            else (sys.setprofile, threading.setprofile, self._profile)
        )
        gc.disable()  # Garbage collection is not part of the work.
        everywhere(look)
        ours(look)
        try:
            yield
        finally:
            ours(None)
            everywhere(None)
            gc.enable()

    def _profile(self, frame: FrameType, event: str, what: Any) -> None:
        if not self._on:
            return
        if event == "call" and _ours(frame):
            self._called(frame)
        elif event == "c_call" and getattr(what, "__qualname__", "").startswith("socket.") and what.__name__ in SOCKET:
            self.walks.setdefault(_stack(frame))

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            if self._on:
                self.lines[_name(frame)] += 1
        elif event == "call":
            if not _ours(frame):
                return None
            if self._on:
                self._called(frame)
        return self._trace

    def _called(self, frame: FrameType) -> None:
        if frame.f_lasti in _beginnings(frame.f_code):
            self.calls[_name(frame)] += 1

    def __enter__(self) -> None:
        self.calls.clear()
        self.lines.clear()
        self._on = True

    def __exit__(self, *_: object) -> None:
        self._on = False


class Pace:
    """A server of chats that sends each chunk after the one before was read, so that each takes one read."""

    def __init__(self, fake: Any) -> None:
        self._fake = fake
        self._port = urlsplit(fake.url).port
        self._read = threading.Semaphore(0)

    def __enter__(self) -> Self:
        self._readers = {name: getattr(socket.socket, name) for name in ("recv", "recv_into")}
        for name, reader in self._readers.items():
            setattr(socket.socket, name, self._counted(reader))  # Nothing else shows a read.
        return self

    def __exit__(self, *_: object) -> None:
        for name, reader in self._readers.items():
            setattr(socket.socket, name, reader)

    def _counted(self, reader: Callable[..., Any]) -> Callable[..., Any]:
        def read(connection: socket.socket, *arguments: Any) -> Any:
            found = reader(connection, *arguments)
            if connection.getpeername()[1:2] == (self._port,):  # Not an event loop's own socket.
                self._read.release()
            return found

        return read

    def script(self, chunks: int) -> None:
        """Answer the next chat with some chunks."""
        from graftage_ollama.testing import Answer

        lines = [json.dumps(each).encode() + b"\n" for each in [*[_line("a")] * chunks, _line("", done=True)]]
        pieces = [b"%x\r\n%s\r\n" % (len(each), each) for each in lines]
        pieces[0] = http("x-ndjson", "transfer-encoding: chunked") + pieces[0]
        pieces[-1] += b"0\r\n\r\n"
        self._fake.script("/api/chat", Answer(self._paced(pieces), raw=b"", ending="keep"))

    def _paced(self, pieces: list[bytes]) -> Iterator[bytes]:
        self._read = threading.Semaphore(0)  # Earlier requests of policies have been read.
        yield pieces[0]
        for piece in pieces[1:]:
            assert self._read.acquire(timeout=PATIENCE)
            yield piece


def _line(text: str, *, done: bool = False) -> dict[str, Any]:
    reason = {"done_reason": "stop"} if done else {}
    return {"model": MODEL, "message": {"role": "assistant", "content": text}, "done": done, **reason}


def http(content: str, *headers: str) -> bytes:
    """Return the head of a response."""
    return "\r\n".join(["HTTP/1.1 200 OK", f"content-type: application/{content}", *headers, "\r\n"]).encode()
