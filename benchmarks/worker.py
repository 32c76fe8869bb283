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
    import socket
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

    def __init__(self, url: str) -> None:
        self.url = url
        self.api: Any = sys.modules[self.module]
        self.prompt: Any = "Hello"

    def chat(self, model: str) -> str:
        """A whole answer."""
        return run(self.achat(model))

    def stream(self, model: str) -> Iterator[str]:
        """An answer in pieces."""
        raise NotImplementedError

    async def achat(self, model: str) -> str:
        """A whole answer, async."""
        raise NotImplementedError

    def astream(self, model: str) -> AsyncIterator[str]:
        """An answer in pieces, async."""
        raise NotImplementedError

    def embed(self, model: str) -> Any:
        """The vectors of 256 texts."""
        raise NotImplementedError

    def health(self) -> object:
        """Ask the server anew how it is."""
        raise NotImplementedError


class Floor(Client):
    """What no client can be below: sockets and `json`, with no care for anything that may go wrong."""

    module = "json"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        host, _, port = url.removeprefix("http://").partition(":")
        self.address = (host, int(port))
        self.idle: list[socket.socket] = []

    def request(self, path: str, **body: Any) -> bytes:
        data = self.api.dumps(body).encode()
        return b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (path.encode(), len(data), data)

    def lines(self, request: bytes) -> Iterator[Any]:
        """The objects of an answer; a chunked one has one on a line."""
        import socket

        server = self.idle.pop() if self.idle else socket.create_connection(self.address)
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
                for line in whole.split(b"\n"):
                    if line[:1] == b"{":
                        yield self.api.loads(line)
                if whole.endswith(b"\n0\r\n\r"):
                    break
                rest += server.recv(65536)
        self.idle.append(server)

    def chat(self, model: str) -> str:
        (answer,) = self.lines(self.request("/api/chat", model=model, messages=HELLO, stream=False))
        return str(answer["message"]["content"])

    def stream(self, model: str) -> Iterator[str]:
        for line in self.lines(self.request("/api/chat", model=model, messages=HELLO, stream=True)):
            yield line["message"]["content"]

    async def achat(self, model: str) -> str:
        return "".join([piece async for piece in self.astream(model)])

    async def astream(self, model: str) -> AsyncIterator[str]:
        import asyncio

        loads, pieces, ready, state = self.api.loads, list[str](), asyncio.Event(), [b"", b""]

        class Reader(asyncio.Protocol):
            def data_received(self, data: bytes) -> None:
                whole, _, state[0] = (state[0] + data).rpartition(b"\n")
                lines = whole.split(b"\n")
                pieces.extend(loads(line)["message"]["content"] for line in lines if line[:1] == b"{")
                state[1] = whole[-5:]
                ready.set()

        transport, _ = await asyncio.get_running_loop().create_connection(Reader, *self.address)
        transport.write(self.request("/api/chat", model=model, messages=HELLO, stream=True))
        while state[1] != b"\n0\r\n\r":
            await ready.wait()
            ready.clear()
            for piece in pieces:
                yield piece
            pieces.clear()
        transport.close()

    def embed(self, model: str) -> Any:
        return next(self.lines(self.request("/api/embed", model=model, input=TEXTS)))["embeddings"]

    def health(self) -> object:
        return next(self.lines(self.request("/api/version")))


class Official(Client):
    """Ollama's own client."""

    module = "ollama"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.sync, self.later = self.api.Client(host=url), once(lambda: self.api.AsyncClient(host=url))

    def chat(self, model: str) -> str:
        return str(self.sync.chat(model=model, messages=HELLO).message.content)

    def stream(self, model: str) -> Iterator[str]:
        for part in self.sync.chat(model=model, messages=HELLO, stream=True):
            yield part.message.content

    async def achat(self, model: str) -> str:
        return str((await self.later().chat(model=model, messages=HELLO)).message.content)

    async def astream(self, model: str) -> AsyncIterator[str]:
        async for part in await self.later().chat(model=model, messages=HELLO, stream=True):
            yield part.message.content

    def embed(self, model: str) -> Any:
        return self.sync.embed(model=model, input=TEXTS).embeddings

    def health(self) -> object:
        return self.sync.ps()


class Graftage(Client):
    """Graftage with the plugins that are installed."""

    module = "graftage"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.sync = self.api.connect("ollama", host=url)
        self.later = once(lambda: self.api.connect_async("ollama", host=url))

    def chat(self, model: str) -> str:
        return str(self.sync.chat(self.prompt, model=model).text)

    def stream(self, model: str) -> Iterator[str]:
        for chunk in self.sync.chat(self.prompt, model=model, stream=True):
            yield chunk.text

    async def achat(self, model: str) -> str:
        return str((await self.later().chat(self.prompt, model=model)).text)

    async def astream(self, model: str) -> AsyncIterator[str]:
        async for chunk in await self.later().chat(self.prompt, model=model, stream=True):
            yield chunk.text

    def embed(self, model: str) -> Any:
        return self.sync.embed(TEXTS, model=model).vectors

    def health(self) -> object:
        found = self.sync.health(max_age=0)
        found.raise_for_error()
        return found


CLIENTS: dict[str, type[Client]] = {"floor": Floor, "ollama": Official, "graftage": Graftage}


# --- What is measured --------------------------------------------------------------------------------------------------


def once(make: Callable[[], Any]) -> Callable[[], Any]:
    """A client that is made when it is first wanted: an async one inside its loop."""
    made: list[Any] = []

    def get() -> Any:
        if not made:
            made.append(make())
        return made[0]

    return get


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


def fresh(kind: type[Client], url: str, model: str) -> Figures:
    """What a new process pays until its first answer."""
    wall, cpu = time.perf_counter(), time.process_time()
    __import__(kind.module)
    imported = time.process_time()
    client = kind(url)
    built = time.process_time()
    text = client.chat(model)
    end, ended = time.process_time(), time.perf_counter()
    check([text], model, whole=True)
    phases = {"import": imported - cpu, "construct": built - imported, "first": end - built}
    return {"cpu": end - cpu, "wall": ended - wall, **phases, "memory": memory()}


def memory() -> float:
    """The most this process ever had in memory."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def repeat(client: Client, what: str, model: str, times: int) -> Figures:
    """One thing after the other, for each the same; the first is not counted."""

    def chat() -> None:
        check([client.chat(model)], model, whole=True)

    def stream() -> None:
        check(list(client.stream(model)), model)

    def embed() -> None:
        vectors = client.embed(model)
        if len(vectors) != len(TEXTS) or {len(each) for each in vectors} != {768}:
            raise ValueError("these are not the vectors")

    def health() -> None:
        if not client.health():
            raise ValueError("the server is not well")

    def construct() -> None:
        type(client)(client.url)

    work: Callable[[], None] = {each.__name__: each for each in (chat, stream, embed, health, construct)}[what]
    work()
    return timed(work, times)


def timed(work: Callable[[], object], times: int = 1) -> Figures:
    """The cost of each time; memory is what the peak has grown by."""
    gc.collect()
    before, wall, cpu = memory(), time.perf_counter(), time.process_time()
    for _ in range(times):
        work()
    ended, end = time.perf_counter(), time.process_time()
    return {"cpu": (end - cpu) / times, "wall": (ended - wall) / times, "memory": memory() - before}


def together(client: Client, what: str, model: str, times: int) -> Figures:
    """Many at one time: async streams, chats of tasks, or chats of threads."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    firsts: list[float] = []

    async def stream(start: float) -> None:
        pieces: list[str] = []
        async for piece in client.astream(model):
            if not pieces:
                firsts.append(time.perf_counter() - start)
            pieces.append(piece)
        check(pieces, model)

    async def chat(_: float) -> None:
        check([await client.achat(model)], model, whole=True)

    def blocking() -> None:
        check([client.chat(model)], model, whole=True)

    async def gathered(count: int) -> None:
        one, start = stream if what == "streams" else chat, time.perf_counter()
        await asyncio.gather(*(one(start) for _ in range(count)))

    if what == "threads":
        with ThreadPoolExecutor(times) as pool:
            everyone = lambda: [each.result() for each in [pool.submit(blocking) for _ in range(times)]]  # noqa: E731
            everyone()
            return timed(everyone)
    run(gathered(2))
    firsts.clear()
    figures = timed(lambda: run(gathered(times)))
    firsts.sort()
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
