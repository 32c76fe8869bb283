"""The clients that are compared, each in a process of its own that is told what to do and answers with figures.

    python -P worker.py CLIENT URL            reads commands, lines of JSON
    python -P worker.py CLIENT URL MODEL      what a fresh process pays: import, client, first chat

Nothing is imported above that a client could then have for nothing, and no sibling, as peers have an environment of
their own. Times are in seconds, memory in bytes.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from operator import attrgetter

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Callable, Iterator
    from typing import Any

HELLO = [{"role": "user", "content": "Hello"}]
TEXTS = [f"text {number}" for number in range(256)]


def words(count: int) -> list[str]:
    """The text of an answer, chunk by chunk."""
    return [f"{number:05d}-" for number in range(count)]


class Client:
    """A client as its users have it. What it cannot do raises `NotImplementedError`."""

    module = ""
    text: Any = None
    """Finds the text of a whole answer."""
    piece: Any = None
    """Finds the text of a piece, where it is at another place."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.api: Any = sys.modules[self.module]
        self.prompt: Any = "Hello"
        self.made: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What users make once and keep; async clients are made inside their loop."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def ask(self, model: str, *, stream: bool, later: bool) -> Any:
        """Send the prompt: the answer or its pieces, to be awaited where it is for `later`."""
        raise NotImplementedError

    async def pieces(self, model: str) -> AsyncIterator[Any]:
        """The pieces of an answer, async."""
        find, found = self.piece or self.text, self.ask(model, stream=True, later=True)
        async for each in found if hasattr(found, "__aiter__") else await found:
            yield find(each)

    def chat(self, model: str) -> None:
        """Get an answer."""
        check([self.text(self.ask(model, stream=False, later=False))], model, whole=True)

    def stream(self, model: str) -> None:
        """Get it in pieces."""
        check(list(map(self.piece or self.text, self.ask(model, stream=True, later=False))), model)

    def embed(self, model: str) -> None:
        """Get the vectors of 256 texts."""
        vectors = self.vectors(model)
        if len(vectors) != len(TEXTS) or {len(each) for each in vectors} != {768}:
            raise ValueError("these are not the vectors")

    def vectors(self, model: str) -> Any:
        """The vectors themselves."""
        raise NotImplementedError

    def health(self, model: str) -> None:
        """Ask the server anew how it is."""
        raise NotImplementedError

    def construct(self, model: str) -> None:
        """Make a second client."""
        raise NotImplementedError


def check(pieces: list[str], model: str, *, whole: bool = False) -> None:
    """Refuse an answer that is not what the server said."""
    count = int(model.split("-")[1])
    pieces = [piece for piece in pieces if piece]
    if "".join(pieces) != "".join(words(count)) or len(pieces) != (1 if whole else count):
        raise ValueError(f"{model}: got {len(pieces)} pieces, {len(''.join(pieces))} characters")


class Floor(Client):
    """Sockets and `json`, with no care for anything that may go wrong."""

    module = "json"
    text = staticmethod(lambda found: found["message"]["content"])

    def request(self, path: str, **body: Any) -> bytes:
        """The bytes of a request."""
        data = self.api.dumps(body).encode()
        return b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (path.encode(), len(data), data)

    def address(self) -> tuple[str, int]:
        """Where the server is."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def objects(self, request: bytes) -> Iterator[Any]:
        """The objects of an answer; a chunked one has one on a line."""
        import socket

        server = self.made.pop("idle", None) or socket.create_connection(self.address())
        server.sendall(request)
        head, _, rest = server.recv(65536).partition(b"\r\n\r\n")
        if (at := head.find(b"content-length: ")) >= 0:
            missing, parts = int(head[at + 16 :].split(b"\r\n", 1)[0]) - len(rest), [rest]
            while missing > 0:
                parts.append(server.recv(1 << 20))
                missing -= len(parts[-1])
            yield self.api.loads(b"".join(parts))
        else:
            while True:
                whole, _, rest = rest.rpartition(b"\n")
                yield from (self.api.loads(line) for line in whole.split(b"\n") if line[:1] == b"{")
                if whole.endswith(b"\n0\r\n\r"):
                    break
                rest += server.recv(65536)
        self.made["idle"] = server

    def ask(self, model: str, *, stream: bool, later: bool) -> Any:
        """Async it is streams only, on `asyncio.Protocol`."""
        request = self.request("/api/chat", model=model, messages=HELLO, stream=stream or later)
        if later:
            return self.later(request) if stream else self.whole(self.later(request))
        return self.objects(request) if stream else next(self.objects(request))

    async def whole(self, found: AsyncIterator[Any]) -> Any:
        """The sum of a stream."""
        return {"message": {"content": "".join([self.text(each) async for each in found])}}

    async def later(self, request: bytes) -> AsyncIterator[Any]:
        """`objects` of a chunked answer."""
        import asyncio

        found: list[Any] = []
        loads, ready, state = self.api.loads, asyncio.Event(), [b"", b""]

        class Reader(asyncio.Protocol):
            def data_received(self, data: bytes) -> None:
                state[1], _, state[0] = (state[0] + data).rpartition(b"\n")
                found.extend(loads(line) for line in state[1].split(b"\n") if line[:1] == b"{")
                ready.set()

        transport, _ = await asyncio.get_running_loop().create_connection(Reader, *self.address())
        transport.write(request)
        while not state[1].endswith(b"\n0\r\n\r"):
            await ready.wait()
            ready.clear()
            for each in found:
                yield each
            found.clear()
        transport.close()

    def vectors(self, model: str) -> Any:
        return next(self.objects(self.request("/api/embed", model=model, input=TEXTS)))["embeddings"]

    def health(self, model: str) -> None:
        next(self.objects(self.request("/api/version")))


class Official(Client):
    """Ollama's own client."""

    module = "ollama"
    text = attrgetter("message.content")

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.sync = self.api.Client(host=url)

    def ask(self, model: str, *, stream: bool, later: bool) -> Any:
        client = self.once("async", lambda: self.api.AsyncClient(host=self.url)) if later else self.sync
        return client.chat(model=model, messages=HELLO, stream=stream)

    def vectors(self, model: str) -> Any:
        return self.sync.embed(model=model, input=TEXTS).embeddings

    def health(self, model: str) -> None:
        self.sync.ps()

    def construct(self, model: str) -> None:
        self.api.Client(host=self.url)


class Graftage(Client):
    """Graftage with the plugins that are installed."""

    module = "graftage"
    text = attrgetter("text")

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.sync = self.api.connect("ollama", host=url)

    def ask(self, model: str, *, stream: bool, later: bool) -> Any:
        client = self.once("async", lambda: self.api.connect_async("ollama", host=self.url)) if later else self.sync
        return client.chat(self.prompt, model=model, stream=stream)

    def vectors(self, model: str) -> Any:
        return self.sync.embed(TEXTS, model=model).vectors

    def health(self, model: str) -> None:
        self.sync.health(max_age=0).raise_for_error()

    def construct(self, model: str) -> None:
        self.api.connect("ollama", host=self.url)


CLIENTS: dict[str, type[Client]] = {"floor": Floor, "ollama": Official, "graftage": Graftage}


# --- What is measured -------------------------------------------------------------------------------------------------


_loops: list[asyncio.AbstractEventLoop] = []
"""The one event loop of this process, once it is needed."""


def run(work: Any) -> Any:
    """Run a coroutine on the event loop of this process."""
    import asyncio

    if not _loops:
        _loops.append(asyncio.new_event_loop())
        asyncio.set_event_loop(_loops[0])
    return _loops[0].run_until_complete(work)


def memory() -> float:
    """The most this process ever had in memory."""
    try:  # On Linux `getrusage` tells what whoever started this had, where that is more.
        with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123
            return next(float(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def fresh(kind: type[Client], url: str, model: str) -> dict[str, float]:
    """What a new process pays until its first answer, and for each that follows."""
    wall, start = time.perf_counter(), time.process_time()
    __import__(kind.module)
    imported = time.process_time()
    client = kind(url)
    built = time.process_time()
    client.chat(model)
    end, ended, peak = time.process_time(), time.perf_counter(), memory()
    phases = {"import": imported - start, "construct": built - imported, "memory": peak}
    again = timed(lambda: client.chat(model), lambda: None, 20)["cpu"]
    return {"cpu": end - start, "wall": ended - wall, **phases, "again": again}


def timed(work: Callable[[], object], warm: Callable[[], object], times: int) -> dict[str, float]:
    """The cost of each time after a first that is not counted."""
    warm()
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        work()
    ended, end = time.perf_counter(), time.process_time()
    return {"cpu": (end - cpu) / times, "wall": (ended - wall) / times, "memory": memory()}


def measure(client: Client, what: str, model: str, times: int, prompt: Any = "Hello") -> dict[str, float]:
    """One thing after the other; or at one time async `streams`, chats as `tasks` of a loop, or chats in `threads`."""
    client.prompt = prompt
    if what in ("streams", "tasks"):
        return together(client, what, model, times)
    if what != "threads":
        work = getattr(client, what)
        return timed(lambda: work(model), lambda: work(model), times)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(times) as pool:

        def threads() -> None:
            for each in [pool.submit(client.chat, model) for _ in range(times)]:
                each.result()

        return timed(threads, threads, 1)


def together(client: Client, what: str, model: str, times: int) -> dict[str, float]:
    """Many in one event loop; for streams with the time to the first token, too."""
    import asyncio

    firsts: list[float] = []

    async def one(start: float) -> None:
        pieces: list[str] = []
        if what == "tasks":
            pieces.append(client.text(await client.ask(model, stream=False, later=True)))
        else:
            async for piece in client.pieces(model):
                if not pieces:
                    firsts.append(time.perf_counter() - start)
                pieces.append(piece)
        check(pieces, model, whole=what == "tasks")

    async def all_of(count: int) -> None:
        start = time.perf_counter()
        await asyncio.gather(*(one(start) for _ in range(count)))

    figures = timed(lambda: run(all_of(times)), lambda: run(all_of(2)), 1)
    firsts = sorted(firsts[-times:])
    ranks = {"first p50": len(firsts) // 2, "first p99": len(firsts) * 99 // 100}
    return figures | ({name: firsts[rank] for name, rank in ranks.items()} if firsts else {})


def main(name: str, url: str, model: str = "") -> None:
    """Do what is asked; nothing that a client prints gets into the answers."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    kind = CLIENTS[name]

    def answer(work: Callable[..., dict[str, Any]], *arguments: Any, **options: Any) -> None:
        try:
            figures = work(*arguments, **options)
        except NotImplementedError:
            figures = {}
        except Exception as error:  # noqa: BLE001 - one measure that fails must not cost the others
            figures = {"error": repr(error)[:500]}
        import json

        print(json.dumps(figures), file=answers, flush=True)

    if model:
        answer(fresh, kind, url, model)
        return
    import json

    __import__(kind.module)
    client = kind(url)
    for line in sys.stdin:
        answer(measure, client, **json.loads(line))


if __name__ == "__main__":
    main(*sys.argv[1:])
