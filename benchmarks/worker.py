"""The compared clients. Each runs in a separate process, which reads commands and answers with figures.

    python -P worker.py CLIENT URL            read commands, one JSON object on each line
    python -P worker.py CLIENT URL MODEL      measure a fresh process: import, client, first chat

What this module imports costs a client nothing, so imports are few, or stand where they are needed. Peers import it in
environments that have nothing else of the project. Times are in seconds, memory in bytes.
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


def reply_chunks(count: int) -> list[str]:
    """Return the texts of the chunks of a reply."""
    return [f"{number:05d}-" for number in range(count)]


class Client:
    """A client, used as its users do. What it cannot do raises `NotImplementedError`."""

    module = ""
    text_of: Any = None
    """Finds the text of a whole reply."""
    chunk_text_of: Any = None
    """Finds the text of a chunk, if it is in another place."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.api: Any = sys.modules[self.module]
        self.prompt: Any = "Hello"
        self.cache: dict[str, Any] = {}

    def cached(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what users make once and keep. Async clients are made inside their loop."""
        if name not in self.cache:
            self.cache[name] = make()
        return self.cache[name]

    def send(self, model: str, *, stream: bool, is_async: bool) -> Any:
        """Send the prompt, and return the reply or an iterable of its chunks; with `is_async`, something to await."""
        raise NotImplementedError

    async def chunk_texts(self, model: str) -> AsyncIterator[Any]:
        """Yield the texts of the chunks of an async stream."""
        find, found = self.chunk_text_of or self.text_of, self.send(model, stream=True, is_async=True)
        async for each in found if hasattr(found, "__aiter__") else await found:
            yield find(each)

    def chat(self, model: str) -> None:
        """Get a whole reply."""
        check([self.text_of(self.send(model, stream=False, is_async=False))], model, whole=True)

    def stream(self, model: str) -> None:
        """Get a reply in chunks."""
        check(list(map(self.chunk_text_of or self.text_of, self.send(model, stream=True, is_async=False))), model)

    def embed(self, model: str) -> None:
        """Get the vectors of 256 texts."""
        vectors = self.vectors(model)
        if len(vectors) != len(TEXTS) or {len(each) for each in vectors} != {768}:
            raise ValueError("got other vectors than the server sent")

    def vectors(self, model: str) -> Any:
        """Return the vectors."""
        raise NotImplementedError

    def health(self, model: str) -> None:
        """Ask the server for its health, without a cache."""
        raise NotImplementedError

    def construct(self, model: str) -> None:
        """Make a second client."""
        raise NotImplementedError


def check(texts: list[str], model: str, *, whole: bool = False) -> None:
    """Check that the reply is what the server sent."""
    count = int(model.split("-")[1])
    texts = [text for text in texts if text]
    if "".join(texts) != "".join(reply_chunks(count)) or len(texts) != (1 if whole else count):
        raise ValueError(f"{model}: got {len(texts)} chunks, {len(''.join(texts))} characters")


class Floor(Client):
    """Sockets and `json`, without any handling of errors."""

    module = "json"
    text_of = staticmethod(lambda found: found["message"]["content"])

    def request(self, path: str, **body: Any) -> bytes:
        """Return the bytes of a request."""
        data = self.api.dumps(body).encode()
        return b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (path.encode(), len(data), data)

    def address(self) -> tuple[str, int]:
        """Return the host and port of the server."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def objects(self, request: bytes) -> Iterator[Any]:
        """Yield the JSON objects of a response; a chunked one has one on each line."""
        import socket

        server = self.cache.pop("idle", None) or socket.create_connection(self.address())
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
        self.cache["idle"] = server

    def send(self, model: str, *, stream: bool, is_async: bool) -> Any:
        """Stream on `asyncio.Protocol` if it is async, even for a whole reply."""
        request = self.request("/api/chat", model=model, messages=HELLO, stream=stream or is_async)
        if is_async:
            return self.stream_async(request) if stream else self.join(self.stream_async(request))
        return self.objects(request) if stream else next(self.objects(request))

    async def join(self, found: AsyncIterator[Any]) -> Any:
        """Return the whole reply of a stream."""
        return {"message": {"content": "".join([self.text_of(each) async for each in found])}}

    async def stream_async(self, request: bytes) -> AsyncIterator[Any]:
        """Yield the JSON objects of a chunked response."""
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
    """Ollama's client for Python."""

    module = "ollama"
    text_of = attrgetter("message.content")

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.sync = self.api.Client(host=url)

    def send(self, model: str, *, stream: bool, is_async: bool) -> Any:
        client = self.cached("async", lambda: self.api.AsyncClient(host=self.url)) if is_async else self.sync
        return client.chat(model=model, messages=HELLO, stream=stream)

    def vectors(self, model: str) -> Any:
        return self.sync.embed(model=model, input=TEXTS).embeddings

    def health(self, model: str) -> None:
        self.sync.ps()

    def construct(self, model: str) -> None:
        self.api.Client(host=self.url)


class OpenAI(Client):
    """OpenAI's client for Python."""

    module = "openai"
    text_of = staticmethod(lambda found: found.choices[0].message.content)
    chunk_text_of = staticmethod(lambda found: found.choices[0].delta.content)

    def __init__(self, url: str) -> None:
        super().__init__(f"{url}/v1")
        self.sync = self.make("OpenAI")

    def make(self, kind: str) -> Any:
        """Return a new client."""
        return getattr(self.api, kind)(base_url=self.url, api_key="none")

    def send(self, model: str, *, stream: bool, is_async: bool) -> Any:
        client = self.cached("async", lambda: self.make("AsyncOpenAI")) if is_async else self.sync
        return client.chat.completions.create(model=model, messages=HELLO, stream=stream)

    def health(self, model: str) -> None:
        self.sync.models.list()

    def construct(self, model: str) -> None:
        self.make("OpenAI")


class Graftage(Client):
    """Graftage, with the installed plugins."""

    module = "graftage"
    text_of = attrgetter("text")
    provider = "ollama"
    path = ""

    def __init__(self, url: str) -> None:
        super().__init__(f"{url}{self.path}")
        self.sync = self.api.connect(self.provider, host=self.url)

    def send(self, model: str, *, stream: bool, is_async: bool) -> Any:
        client = (
            self.cached("async", lambda: self.api.connect_async(self.provider, host=self.url))
            if is_async
            else self.sync
        )
        return client.chat(self.prompt, model=model, stream=stream)

    def vectors(self, model: str) -> Any:
        return self.sync.embed(TEXTS, model=model).vectors

    def health(self, model: str) -> None:
        self.sync.health(max_age=0).raise_for_error()

    def construct(self, model: str) -> None:
        self.api.connect(self.provider, host=self.url)


class GraftageOpenAI(Graftage):
    """Graftage on OpenAI's API."""

    provider = "openai"
    path = "/v1"

    def vectors(self, model: str) -> Any:
        raise NotImplementedError


CLIENTS: dict[str, type[Client]] = {
    "floor": Floor,
    "ollama": Official,
    "graftage": Graftage,
    "openai": OpenAI,
    "graftage-openai": GraftageOpenAI,
}


# --- Measures ---------------------------------------------------------------------------------------------------------

_loops: list[asyncio.AbstractEventLoop] = []
"""The one event loop of this process, once it is needed."""


def run(work: Any) -> Any:
    """Run a coroutine on the event loop of this process."""
    import asyncio

    if not _loops:
        _loops.append(asyncio.new_event_loop())
        asyncio.set_event_loop(_loops[0])
    return _loops[0].run_until_complete(work)


def peak_memory() -> float:
    """Return the peak memory of this process."""
    # On Linux `getrusage` counts the parent process, too, if its peak was higher.
    try:
        with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123
            return next(float(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def measure_fresh(kind: type[Client], url: str, model: str) -> dict[str, float]:
    """Measure a new process until its first reply, and the chats after it."""
    wall, start = time.perf_counter(), time.process_time()
    __import__(kind.module)
    imported = time.process_time()
    client = kind(url)
    built = time.process_time()
    client.chat(model)
    end, ended, peak = time.process_time(), time.perf_counter(), peak_memory()
    phases = {"import": imported - start, "construct": built - imported, "memory": peak}
    following = measure_calls(lambda: client.chat(model), lambda: None, 20)["cpu"]
    return {"cpu": end - start, "wall": ended - wall, **phases, "next chat": following}


def measure_calls(work: Callable[[], object], warm: Callable[[], object], times: int) -> dict[str, float]:
    """Return the cost of each call; the calls of `warm` are not counted."""
    warm()
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        work()
    ended, end = time.perf_counter(), time.process_time()
    return {"cpu": (end - cpu) / times, "wall": (ended - wall) / times, "memory": peak_memory()}


def measure(client: Client, what: str, model: str, times: int, prompt: Any = "Hello") -> dict[str, float]:
    """Measure calls in turn; or async `streams`, chats as `tasks`, or chats in `threads`, all at once."""
    client.prompt = prompt
    if what in ("streams", "tasks"):
        return measure_together(client, what, model, times)
    if what != "threads":
        work = getattr(client, what)
        return measure_calls(lambda: work(model), lambda: work(model), times)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(times) as pool:

        def threads() -> None:
            for each in [pool.submit(client.chat, model) for _ in range(times)]:
                each.result()

        return measure_calls(threads, threads, 1)


def measure_together(client: Client, what: str, model: str, times: int) -> dict[str, float]:
    """Measure async calls on one event loop; for streams the time to the first token, too."""
    import asyncio

    firsts: list[float] = []

    async def run_one(start: float) -> None:
        texts: list[str] = []
        if what == "tasks":
            texts.append(client.text_of(await client.send(model, stream=False, is_async=True)))
        else:
            async for text in client.chunk_texts(model):
                if not texts:
                    firsts.append(time.perf_counter() - start)
                texts.append(text)
        check(texts, model, whole=what == "tasks")

    async def run_all(count: int) -> None:
        start = time.perf_counter()
        await asyncio.gather(*(run_one(start) for _ in range(count)))

    figures = measure_calls(lambda: run(run_all(times)), lambda: run(run_all(2)), 1)
    firsts = sorted(firsts[-times:])
    ranks = {"first p50": len(firsts) // 2, "first p99": len(firsts) * 99 // 100}
    return figures | ({name: firsts[rank] for name, rank in ranks.items()} if firsts else {})


def main(name: str, url: str, model: str = "") -> None:
    """Run the commands. What a client prints goes to standard error, so it does not disturb the figures."""
    responses = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    kind = CLIENTS[name]

    def respond(work: Callable[..., dict[str, Any]], *arguments: Any, **options: Any) -> None:
        try:
            figures = work(*arguments, **options)
        except NotImplementedError:
            figures = {}
        except Exception as error:  # noqa: BLE001 - the other measures go on
            figures = {"error": repr(error)[:500]}
        import json

        print(json.dumps(figures), file=responses, flush=True)

    if model:
        respond(measure_fresh, kind, url, model)
        return
    import json

    __import__(kind.module)
    client = kind(url)
    for line in sys.stdin:
        respond(measure, client, **json.loads(line))


if __name__ == "__main__":
    main(*sys.argv[1:])
