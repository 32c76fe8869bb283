"""Run mixed calls with random faults for some minutes: every reply must be right, and nothing may grow.

    python scripts/soak.py --minutes 10 [--host http://127.0.0.1:11434 --model smollm2:135m] [--seed 7] [--workers 16]

Threads with a sync client and tasks with an async one chat, stream, break off, cancel, generate, embed, pull and check
the health of a server on loopback, which has a fault in one call of five. Each result must be what the server sent, or
one of Graftage's errors. With `--host`, a real server is called, too, without faults. Memory, descriptors and threads
are printed regularly. The exit code is 1 if a result was wrong, or if one of the three grew.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import re
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import graftage
from graftage import retry
from graftage.exceptions import GraftageError
from graftage.types import Timeouts
from graftage_ollama.testing import Answer, FakeOllama

MODEL: Final = "smollm2:135m"
REPLY: Final = "The quick brown fox jumps over the lazy dog, é€😀."
LINE: Final = {"message": {"role": "assistant", "content": "The "}, "response": "The ", "done": False}
FAULTS: Final = (
    Answer(raw=b"", ending="reset"),
    Answer(raw=b"", ending="close"),
    Answer([LINE], ending="reset"),
    Answer([LINE], ending="close"),
    Answer([LINE]),
    Answer([LINE, b"{nonsense}\n"]),
    Answer([LINE, {"error": "an error was encountered while running the model: EOF"}]),
    Answer([b'{"error":"server busy, please try again"}'], status=503, framing="length"),
    Answer([b"<html>No</html>"], status=502, framing="length"),
    Answer([LINE], ending="stall"),
    Answer([b"y" * 2**20] * 4, status=500),
    Answer(raw=b"SSH-2.0-OpenSSH_9.6\r\n\r\n", ending="close"),
)
PATHS: Final = ("/api/chat", "/api/generate", "/api/embed", "/api/pull", "/api/version")
TIMEOUTS: Final = Timeouts(connect=10.0, first_token=20.0, idle=0.5, total=30.0)
MAX_TOKENS: Final = 8
"""Tokens of a reply; the server on loopback counts words."""
MAX_GROWTH: Final = {"MB": 8.0, "descriptors": 8, "threads": 8}
"""How much each may grow from the start until everything is closed; memory from the first figures."""
RANDOM: Final = random.Random()  # noqa: S311 - not for secrets
REPORT_INTERVAL: Final = 10.0
"""Seconds between two lines of figures."""


@dataclass
class Tally:
    """What was done, and what was wrong. Threads share it."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def expect(self, what: str, found: Any, wanted: Any) -> None:
        """Count a result, and note it if it is wrong."""
        self.done[what] += 1
        if found != wanted:
            self.wrong.append(f"{what}: {found!r} instead of {wanted!r}")


class Server(NamedTuple):
    """A server, its model and its reply."""

    url: str
    model: str
    reply: str | None
    """None for a real server, whose reply is not known."""


# --- Operations ------------------------------------------------------------------------------------------------------

# Each operation is written once for both clients: `wait` gives what either returns.
Wait = Callable[[Any], Awaitable[Any]]


async def _chat(llm: Any, wait: Wait, server: Server, tally: Tally) -> None:
    reply = await wait(llm.chat("Hi", max_tokens=MAX_TOKENS))
    tally.expect("chat", reply.text, _expected_text(server, reply.text))


async def _generate(llm: Any, wait: Wait, server: Server, tally: Tally) -> None:
    reply = await wait(llm.generate("Hi", max_tokens=MAX_TOKENS))
    tally.expect("generate", reply.text, _expected_text(server, reply.text))


async def _stream(llm: Any, wait: Wait, server: Server, tally: Tally) -> None:
    stream = await wait(llm.chat("Hi", max_tokens=MAX_TOKENS, stream=True))
    texts = [chunk.text async for chunk in _chunks(stream)]
    tally.expect("stream", "".join(texts), _expected_text(server, stream.reply.text))
    tally.expect("end of a stream", stream.reply.finish_reason in ("stop", "length"), wanted=True)


async def _break_off(llm: Any, wait: Wait, server: Server, tally: Tally) -> None:
    stream = await wait(llm.chat("Hi", max_tokens=MAX_TOKENS, stream=True))
    async for chunk in _chunks(stream):
        tally.expect("break", server.reply is None or server.reply.startswith(chunk.text), wanted=True)
        break


async def _embed(llm: Any, wait: Wait, server: Server, tally: Tally) -> None:
    inputs = ["a" * RANDOM.randint(1, 9) for _ in range(3)]
    found = await wait(llm.embed(inputs))
    firsts = [vector[0] for vector in found.vectors]
    if server.reply:
        tally.expect("embed", firsts, [float(len(each)) for each in inputs])
    else:
        tally.expect("embed", len(firsts), len(inputs))


async def _pull(llm: Any, wait: Wait, server: Server, tally: Tally) -> None:
    if server.reply is not None:
        await wait(llm.pull("other:1b"))
        tally.done["pull"] += 1


async def _health(llm: Any, wait: Wait, _server: Server, tally: Tally) -> None:
    found = await wait(llm.health(max_age=0))
    tally.expect("health", found.ok or isinstance(found.error, GraftageError), wanted=True)


def _expected_text(server: Server, found: str) -> str:
    return found if server.reply is None else "".join(re.findall(r"\S+\s*", server.reply)[:MAX_TOKENS])


async def _chunks(stream: Any) -> Any:
    if hasattr(stream, "__anext__"):
        async with stream:
            async for chunk in stream:
                yield chunk
    else:
        with stream:
            for chunk in stream:
                yield chunk


OPERATIONS: Final = (_chat, _generate, _stream, _break_off, _embed, _pull, _health)


async def _run_one(llm: Any, wait: Wait, server: Server, tally: Tally) -> None:
    """Run a random operation. An error of Graftage is a valid result."""
    operation = RANDOM.choice(OPERATIONS)
    try:
        await operation(llm, wait, server, tally)
    except GraftageError as error:
        tally.done[f"error {type(error).__name__}"] += 1
    except Exception as error:  # noqa: BLE001 - any other error is a finding
        tally.wrong.append(f"{operation.__name__}: {error!r}")


# --- Threads and tasks -----------------------------------------------------------------------------------------------


def _run_thread(server: Server, tally: Tally) -> None:
    async def wait(value: Any) -> Any:
        return value

    with retry.no_waiting(), graftage.connect("ollama", host=server.url, model=server.model, timeouts=TIMEOUTS) as llm:
        while not tally.stop.is_set():
            try:
                _run_one(llm, wait, server, tally).send(None)
            except StopIteration:
                continue


def _run_tasks(server: Server, tally: Tally, count: int) -> None:
    async def wait(value: Any) -> Any:
        return await value

    async def one(llm: Any) -> None:
        while not tally.stop.is_set():
            task = asyncio.create_task(_run_one(llm, wait, server, tally))
            if RANDOM.random() < 0.1:
                await asyncio.sleep(RANDOM.random() * 0.01)
                task.cancel()
                tally.done["cancel"] += 1
            await asyncio.wait([task])

    async def main() -> None:
        async with graftage.connect_async("ollama", host=server.url, model=server.model, timeouts=TIMEOUTS) as llm:
            await asyncio.gather(*(one(llm) for _ in range(count)))

    with retry.no_waiting():
        asyncio.run(main())


def _script_faults(fake: FakeOllama, tally: Tally) -> None:
    """Script a fault for about every fifth request."""
    seen = 0
    while not tally.stop.wait(0.005):
        for _ in range((len(fake.requests) - seen) // 5):
            fake.script(RANDOM.choice(PATHS), RANDOM.choice(FAULTS))
            seen += 5
        # The fake server keeps all requests.
        if seen > 1000:
            del fake.requests[:seen]
            seen = 0


def figures() -> dict[str, float]:
    """Return the memory, descriptors and threads of this process."""
    gc.collect()
    if Path("/proc/self/statm").exists():
        memory = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    folder = next(each for each in map(Path, ("/proc/self/fd", "/dev/fd")) if each.exists())
    return {"MB": memory / 1e6, "descriptors": len(list(folder.iterdir())), "threads": threading.active_count()}


def print_figures(began: float, now: dict[str, float], tally: Tally) -> None:
    """Print a line of figures."""
    calls = sum(count for what, count in tally.done.items() if not what.startswith("error"))
    errors = tally.done.total() - calls
    print(
        f"{time.monotonic() - began:6.0f} s  {now['MB']:6.1f} MB  {now['descriptors']:4.0f} descriptors  "
        f"{now['threads']:4.0f} threads  {calls} results, {errors} errors, {len(tally.wrong)} wrong",
        flush=True,
    )


def run(servers: list[Server], fake: FakeOllama, minutes: float, workers: int) -> tuple[Tally, dict[str, float]]:
    """Run for some minutes, and return the tally and the figures after the first interval."""
    tally = Tally()
    threads = [threading.Thread(target=_script_faults, args=(fake, tally))]
    for server in servers:
        threads += [threading.Thread(target=_run_thread, args=(server, tally)) for _ in range(workers // 2)]
        threads.append(threading.Thread(target=_run_tasks, args=(server, tally, workers // 2)))
    for thread in threads:
        thread.start()
    began = time.monotonic()
    warm: dict[str, float] = {}
    while (left := began + minutes * 60 - time.monotonic()) > 0 and not tally.wrong:
        time.sleep(min(REPORT_INTERVAL, left))
        now = figures()
        warm = warm or now
        print_figures(began, now, tally)
    tally.stop.set()
    for thread in threads:
        thread.join()
    return tally, warm


def main(arguments: list[str] | None = None) -> int:
    """Run, print the results, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--host", help="a real server to call, too")
    parser.add_argument("--model", default=MODEL, help="the model that the real server has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=16, help="half are threads, half are tasks")
    given = parser.parse_args(arguments)
    RANDOM.seed(given.seed)
    before = figures()
    with FakeOllama(reply=REPLY) as fake:
        servers = [Server(fake.url, MODEL, REPLY)] + ([Server(given.host, given.model, None)] if given.host else [])
        tally, warm = run(servers, fake, given.minutes, given.workers)
    time.sleep(1)
    after = figures()
    grown = {name: after[name] - max(before[name], warm.get(name, 0) if name == "MB" else 0) for name in MAX_GROWTH}
    problems = [
        *tally.wrong[:20],
        *(f"{name} grew by {grown[name]:g}" for name in MAX_GROWTH if grown[name] > MAX_GROWTH[name]),
    ]
    print(", ".join(f"{count} {what}" for what, count in sorted(tally.done.items())))
    print("\n".join(problems) or f"seed {given.seed}: all results were right, and nothing grew: {after}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
