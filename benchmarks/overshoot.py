"""How long after its deadline a call ends, for servers with many faults: `python -m benchmarks --overshoot`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from itertools import repeat
from typing import Any, Final

import graftage
from graftage.exceptions import ProviderTimeout
from graftage_ollama.testing import Answer, FakeOllama

MODEL: Final = "smollm2:135m"
LIMIT: Final = 0.2
"""Seconds that each call may take."""
LINE: Final = {"message": {"role": "assistant", "content": "word "}, "done": False}
HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\n"
FAULTS: Final[dict[str, Answer]] = {
    "says nothing": Answer(raw=b"", ending="stall"),
    "sends headers slowly": Answer(repeat(b"x-a: 1\r\n"), raw=HEAD, delay=0.01),
    "sends hints forever": Answer(repeat(b"HTTP/1.1 103 Early Hints\r\n\r\n"), raw=b"", delay=0.001),
    "sends a line slowly": Answer(repeat(b"y"), raw=HEAD + b"\r\n", delay=0.01),
    "stops in the middle": Answer([LINE], ending="stall"),
    "sends lines forever": Answer(repeat(LINE), delay=0.001),
    "sends a flood of lines": Answer(repeat(LINE)),
    "sends a flood of spaces": Answer(repeat(b" " * 999 + b"\n"), framing="none"),
}


def measure(times: int) -> str:
    """Measure all faults, and return a table in Markdown."""
    found = {name: sorted(measure_fault(answer, times)) for name, answer in FAULTS.items()}
    found["all together"] = sorted(each for values in found.values() for each in values)
    rows = [
        f"| {name} | {_percentile(values, 0.5):.1f} | {_percentile(values, 0.99):.1f} | {values[-1]:.1f} |"
        for name, values in found.items()
    ]
    head = ["| a server that … | p50, ms | p99, ms | worst, ms |", "|---|---|---|---|"]
    calls, ended = 4 * times * len(FAULTS), len(found["all together"])
    about = f"{calls} calls with `timeout={LIMIT}`, {4 * times} of each server. The deadline ended {ended} of them."
    load = f"Load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores."
    return "\n".join([about, load, "", *head, *rows])


def measure_fault(answer: Answer, times: int) -> list[float]:
    """Return milliseconds after the deadline, of both clients, for whole replies and for streams."""
    found: list[float] = []
    with FakeOllama() as fake:
        settings: dict[str, Any] = {"host": fake.url, "model": MODEL, "attempts": 1, "max_reply_bytes": 1 << 40}
        fake.script("/api/chat", *[answer] * times * 4)
        for stream in (False, True):
            with graftage.connect("ollama", **settings) as client:
                for _ in range(times):
                    with _overshoot(found):
                        if stream:
                            for _ in client.chat("Hi", stream=True, timeout=LIMIT):
                                pass
                        else:
                            client.chat("Hi", timeout=LIMIT)
            asyncio.run(_measure_async(settings, times, found, stream=stream))
    return found


async def _measure_async(settings: dict[str, Any], times: int, found: list[float], *, stream: bool) -> None:
    async with graftage.connect_async("ollama", **settings) as client:
        for _ in range(times):
            with _overshoot(found):
                if stream:
                    async for _ in client.chat("Hi", stream=True, timeout=LIMIT):
                        pass
                else:
                    await client.chat("Hi", timeout=LIMIT)


@contextlib.contextmanager
def _overshoot(found: list[float]) -> Iterator[None]:
    """Note how late the block ended, if the deadline ended it."""
    began = time.monotonic()
    try:
        yield
    except ProviderTimeout:
        found.append((time.monotonic() - began - LIMIT) * 1000)


def _percentile(values: list[float], share: float) -> float:
    return values[min(int(len(values) * share), len(values) - 1)]
