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

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Callable, Iterator
    from typing import Any

    Figures = dict[str, float]

HELLO = [{"role": "user", "content": "Hello"}]
TEXTS = [f"text {number}" for number in range(256)]


def words(count: int) -> list[str]:
    """The text of an answer, chunk by chunk."""
    return [f"{number:05d}-" for number in range(count)]


class Client:
    """A client as its users have it. What it cannot do raises `NotImplementedError`."""

    module = ""
    sync_chat = True

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

    def text(self, found: Any) -> Any:
        """The text of a whole answer."""
        raise NotImplementedError

    def piece(self, found: Any) -> Any:
        """The text of a piece of it."""
        return self.text(found)

    def chat(self, model: str) -> Any:
        """The text of an answer."""
        return self.text(self.ask(model, stream=False, later=False))

    def stream(self, model: str) -> Iterator[Any]:
        """The same in pieces."""
        return map(self.piece, self.ask(model, stream=True, later=False))

    async def achat(self, model: str) -> Any:
        """`chat`, async."""
        return self.text(await self.ask(model, stream=False, later=True))

    async def astream(self, model: str) -> AsyncIterator[Any]:
        """`stream`, async."""
        found = self.ask(model, stream=True, later=True)
        async for each in found if hasattr(found, "__aiter__") else await found:
            yield self.piece(each)

    def embed(self, model: str) -> Any:
        """The vectors of 256 texts."""
        raise NotImplementedError

    def health(self) -> Any:
        """Ask the server anew how it is."""
        raise NotImplementedError

    def construct(self) -> object:
        """Make a second client."""
        raise NotImplementedError


class Floor(Client):
    """What no client can be below: sockets and `json`, with no care for anything that may go wrong."""

    module = "json"

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

    def text(self, found: Any) -> Any:
        return found["message"]["content"]

    def embed(self, model: str) -> Any:
        return next(self.objects(self.request("/api/embed", model=model, input=TEXTS)))["embeddings"]

    def health(self) -> Any:
        return next(self.objects(self.request("/api/version")))


class Official(Client):
    """Ollama's own client."""

    module = "ollama"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.sync = self.api.Client(host=url)

    def ask(self, model: str, *, stream: bool, later: bool) -> Any:
        client = self.once("async", lambda: self.api.AsyncClient(host=self.url)) if later else self.sync
        return client.chat(model=model, messages=HELLO, stream=stream)

    def text(self, found: Any) -> Any:
        return found.message.content

    def embed(self, model: str) -> Any:
        return self.sync.embed(model=model, input=TEXTS).embeddings

    def health(self) -> Any:
        return self.sync.ps()

    def construct(self) -> object:
        return self.api.Client(host=self.url)


class Graftage(Client):
    """Graftage with the plugins that are installed."""

    module = "graftage"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.sync = self.construct()

    def ask(self, model: str, *, stream: bool, later: bool) -> Any:
        client = self.once("async", lambda: self.api.connect_async("ollama", host=self.url)) if later else self.sync
        return client.chat(self.prompt, model=model, stream=stream)

    def text(self, found: Any) -> Any:
        return found.text

    def embed(self, model: str) -> Any:
        return self.sync.embed(TEXTS, model=model).vectors

    def health(self) -> Any:
        return self.sync.health(max_age=0).ok

    def construct(self) -> Any:
        return self.api.connect("ollama", host=self.url)


CLIENTS: dict[str, type[Client]] = {"floor": Floor, "ollama": Official, "graftage": Graftage}


# --- What is measured -------------------------------------------------------------------------------------------------


def run(work: Any, loops: list[asyncio.AbstractEventLoop] = []) -> Any:  # noqa: B006 - one loop for the process
    """The result of a coroutine, from the one loop of this process."""
    import asyncio

    if not loops:
        loops.append(asyncio.new_event_loop())
        asyncio.set_event_loop(loops[0])
    return loops[0].run_until_complete(work)


def check(pieces: list[str], model: str, *, whole: bool = False) -> None:
    """Refuse an answer that is not what the server said."""
    count = int(model.split("-")[1])
    pieces = [piece for piece in pieces if piece]
    if "".join(pieces) != "".join(words(count)) or len(pieces) != (1 if whole else count):
        raise ValueError(f"{model}: got {len(pieces)} pieces, {len(''.join(pieces))} characters")


def memory() -> float:
    """The most this process ever had in memory."""
    try:  # On Linux `getrusage` tells what whoever started this had, where that is more.
        with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123
            return next(float(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def fresh(kind: type[Client], url: str, model: str) -> Figures:
    """What a new process pays until its first answer."""
    wall, start = time.perf_counter(), time.process_time()
    __import__(kind.module)
    imported = time.process_time()
    client = kind(url)
    built = time.process_time()
    text = client.chat(model)
    end, ended = time.process_time(), time.perf_counter()
    check([text], model, whole=True)
    phases = {"import": imported - start, "construct": built - imported, "first": end - built}
    return {"cpu": end - start, "wall": ended - wall, **phases, "memory": memory()}


def timed(work: Callable[[], object], warm: Callable[[], object], times: int) -> Figures:
    """The cost of each time after a first that is not counted; memory is what the peak grows by from there on."""
    before = memory()
    warm()
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        work()
    ended, end = time.perf_counter(), time.process_time()
    return {"cpu": (end - cpu) / times, "wall": (ended - wall) / times, "memory": memory() - before}


def repeat(client: Client, what: str, model: str, times: int) -> Figures:
    """One thing after the other."""

    def work() -> None:
        if what == "chat":
            check([client.chat(model)], model, whole=True)
        elif what == "stream":
            check(list(client.stream(model)), model)
        elif what == "embed":
            vectors = client.embed(model)
            if len(vectors) != len(TEXTS) or {len(each) for each in vectors} != {768}:
                raise ValueError("these are not the vectors")
        elif not getattr(client, what)():
            raise ValueError(f"{what} failed")

    return timed(work, work, times)


def together(client: Client, what: str, model: str, times: int) -> Figures:
    """Many at one time: `streams` and chats as `tasks` of one loop, or chats in `threads`."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    firsts: list[float] = []

    async def one(start: float) -> None:
        if what == "tasks":
            return check([await client.achat(model)], model, whole=True)
        pieces: list[str] = []
        async for piece in client.astream(model):
            if not pieces:
                firsts.append(time.perf_counter() - start)
            pieces.append(piece)
        return check(pieces, model)

    async def gathered(count: int) -> None:
        start = time.perf_counter()
        await asyncio.gather(*(one(start) for _ in range(count)))

    if what == "threads":
        if not client.sync_chat:
            raise NotImplementedError
        with ThreadPoolExecutor(times) as pool:

            def threads() -> None:
                for each in [pool.submit(client.chat, model) for _ in range(times)]:
                    check([each.result()], model, whole=True)

            return timed(threads, threads, 1)
    figures = timed(lambda: run(gathered(times)), lambda: run(gathered(min(2, times))), 1)
    firsts = sorted(firsts[-times:])
    ranks = {"first p50": len(firsts) // 2, "first p99": len(firsts) * 99 // 100}
    return figures | ({name: firsts[rank] for name, rank in ranks.items()} if firsts else {})


def main(name: str, url: str, model: str = "") -> None:
    """Do what is asked; nothing that a client prints gets into the answers."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    kind = CLIENTS[name]
    figures = fresh(kind, url, model) if model else {}
    import json

    if model:
        answers.write(json.dumps(figures) + "\n")
        return
    __import__(kind.module)
    client = kind(url)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            client.prompt = asked.pop("prompt", "Hello")
            figures = {"repeat": repeat, "together": together}[asked.pop("how")](client, **asked)
        except NotImplementedError:
            figures = {}
        except Exception as error:  # noqa: BLE001 - one measure that fails must not cost the others
            print(json.dumps({"error": repr(error)[:500]}), file=answers, flush=True)
            continue
        print(json.dumps(figures), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
