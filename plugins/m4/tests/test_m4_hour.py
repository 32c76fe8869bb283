"""An hour of twenty callers on a Mac with 16 GB whose memory runs short: real clients, a fake server, a virtual clock.

`pytest -s plugins/m4/tests/test_m4_hour.py` prints what happened minute by minute.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import graftage
import graftage_m4
from graftage.exceptions import Overloaded, ResourceLimitExceeded
from graftage.footprint import footprint, read_shape
from graftage.types import ModelInfo, Reply
from graftage_m4._machine import Collector, Output, Reading, Recorded, budget_of, read_machine
from graftage_ollama.testing import Answer, FakeOllama, Seen

if TYPE_CHECKING:
    from collections.abc import Mapping

pytestmark = pytest.mark.slow

HOUR = Path(__file__).parent / "assets" / "hour-16-macos15.json"
CALLERS = 20
QUEUE = 8
START = datetime(2026, 1, 1, tzinfo=UTC)
PAGE = 16_384


def model(name: str, gigabytes: float, billions: float, layers: int, embedding: int) -> ModelInfo:
    """A model of a common shape."""
    keys = {
        "block_count": layers, "attention.head_count": 32, "attention.head_count_kv": 8, "attention.key_length": 128,
        "attention.value_length": 128, "embedding_length": embedding, "vocab_size": 151_936, "context_length": 40_960,
    }  # fmt: skip
    metadata = {f"test.{key}": value for key, value in keys.items()}
    return ModelInfo(
        name=name,
        architecture="test",
        size=int(gigabytes * 1e9),
        metadata={**metadata, "general.parameter_count": int(billions * 1e9)},
    )


SMALL = model("qwen3:4b", 2.5, 4.0, 36, 2560)
MIDDLE = model("llama3.1:8b", 4.9, 8.0, 32, 4096)
LARGE = model("qwen3:14b", 9.3, 14.8, 40, 5120)
MODELS = {info.name: info for info in (SMALL, MIDDLE, LARGE)}


class Clock:
    """Seconds that pass on demand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Held:
    """A model in the server's memory."""

    window: int
    keep_alive: float
    used: float
    working: int = 0


class Server(FakeOllama):
    """Ollama with models of some size: it keeps windows and time, and replies on demand."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(models=list(MODELS))
        self.clock = clock
        self.held: dict[str, Held] = {}
        self.unloaded: list[str] = []
        self.reloads = 0
        self.answering: list[threading.Event] = []
        self.mutex = threading.Lock()

    def _usual_answer(self, seen: Seen) -> Answer:
        if seen.path == "/api/show":
            return self._json(self._details(str(seen.body["model"])))
        if seen.path == "/api/ps":
            return self._json({"models": [self._loaded_model(name) for name in self.living()]})
        if seen.path == "/api/generate" and seen.body.get("keep_alive") == 0 and not seen.body.get("prompt"):
            with self.mutex:
                self.held.pop(seen.body["model"], None)
                self.unloaded.append(seen.body["model"])
        if seen.path == "/api/chat":
            return self._chat_reply(seen)
        return super()._usual_answer(seen)

    def _json(self, content: Mapping[str, Any]) -> Answer:
        return Answer([content], framing="none")

    def _details(self, name: str) -> dict[str, Any]:
        info = MODELS[name]
        details = {"format": "gguf", "family": "test", "quantization_level": "Q4_K_M", "parameter_size": ""}
        return {
            "details": details,
            "model_info": {"general.architecture": "test", **info.metadata},
            "capabilities": ["completion"],
        }

    def size(self, name: str, window: int) -> int:
        """Return the bytes that a model really takes."""
        shape = read_shape(MODELS[name])
        assert shape is not None
        return footprint(shape, window).total

    def living(self) -> dict[str, Held]:
        """Return the models in memory, after expired ones have left."""
        with self.mutex:
            for name, held in list(self.held.items()):
                if not held.working and self.clock() - held.used >= held.keep_alive:
                    del self.held[name]
            return dict(self.held)

    def total(self) -> int:
        """Return the bytes that all models really take."""
        return sum(self.size(name, held.window) for name, held in self.living().items())

    def _loaded_model(self, name: str) -> dict[str, Any]:
        held = self.held[name]
        size = int(self.size(name, held.window) * 0.9)
        expires = START + timedelta(seconds=held.used + held.keep_alive)
        return {
            "name": name,
            "model": name,
            "size": size,
            "size_vram": size,
            "digest": "0" * 64,
            "details": {},
            "expires_at": expires.isoformat(),
            "context_length": held.window,
        }

    def _chat_reply(self, seen: Seen) -> Answer:
        name, window = seen.body["model"], seen.body["options"]["num_ctx"]
        gate = threading.Event()
        self.living()
        with self.mutex:
            before = self.held.get(name)
            self.reloads += before is not None and before.window != window
            working = before.working if before else 0
            self.held[name] = Held(window, float(seen.body["keep_alive"]), self.clock(), working + 1)
            self.answering.append(gate)
        line = {"model": name, "created_at": "2026-01-01T00:00:00Z"}
        first = {**line, "message": {"role": "assistant", "content": "Well"}, "done": False}
        last = {**line, "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop"}
        return Answer([first, gate, last])

    def finish(self, name: str) -> None:
        """Note that a caller has its reply."""
        with self.mutex:
            if held := self.held.get(name):
                held.working -= 1
                held.used = self.clock()


class Inhabited:
    """The recorded Mac, with the server's models in its memory."""

    def __init__(self, recorded: Recorded, server: Server) -> None:
        self.recorded = recorded
        self.server = server

    def run(self, reading: Reading) -> Output:
        output = self.recorded.run(reading)
        if reading.name != "vm_stat":
            return output
        lines = []
        for line in output.stdout.splitlines():
            label, _, number = line.rpartition(" ")
            if label.startswith("Pages wired down"):
                number = f"{int(number.rstrip('.')) + self.server.total() // PAGE}."
            lines.append(f"{label} {number}")
        return Output("\n".join(lines), output.exit)


@dataclass
class Minute:
    """What happened in a minute."""

    started: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    unloaded: list[str] = field(default_factory=list)
    running: int = 0
    waiting: int = 0


class Hour:
    """Twenty callers, minute by minute."""

    def __init__(self, server: Server, clock: Clock, llm: Any, most: int) -> None:
        self.server, self.clock, self.llm, self.most = server, clock, llm, most
        self.random = random.Random(4)
        self.threads = ThreadPoolExecutor(CALLERS)
        self.calls: dict[int, Future[str]] = {}
        self.outcomes: Counter[str] = Counter()
        self.highest = 0
        self.windows: dict[str, list[int]] = {}

    def call(self, model: str, window: int | None) -> str:
        """Make one call, and return its outcome."""
        try:
            with self.llm.chat("?", model=model, context_window=window, stream=True) as stream:
                for _ in stream:
                    pass
        except Overloaded:
            return "queue full"
        except ResourceLimitExceeded as refusal:
            return f"refused: {refusal.limit}"
        self.server.finish(model)
        return self.answered(stream.reply)

    def answered(self, reply: Reply) -> str:
        """Note the window that was granted."""
        assert reply.limits is not None
        given = self.windows.setdefault(reply.model, [])
        if not given or given[-1] != reply.limits.context_window:
            given.append(reply.limits.context_window or 0)
        return "answered"

    def settle(self) -> None:
        """Wait until every call waits, runs, or has ended."""
        end = time.monotonic() + 20

        calm = 0
        while calm < 2:
            assert time.monotonic() < end, "a call neither waits nor runs"
            time.sleep(0.001)
            open_ones = sum(not each.done() for each in self.calls.values())
            calm = calm + 1 if open_ones == self.llm.stats().waiting + len(self.server.answering) else 0
        self.highest = max(self.highest, self.server.total())
        assert self.server.total() <= self.most

    def start(self, minute: Minute) -> None:
        """Let some idle callers make a call."""
        for caller in range(CALLERS):
            free = caller not in self.calls
            if free and self.random.random() < 0.6:
                model = SMALL.name if caller < 11 else MIDDLE.name if caller < 19 else LARGE.name
                window = 8192 if caller % 4 == 0 else None
                self.calls[caller] = self.threads.submit(self.call, model, window)
                minute.started += 1
                self.settle()

    def answer(self, minute: Minute) -> None:
        """Let twenty seconds pass, and finish the running calls."""
        self.clock.now += 20
        with self.server.mutex:
            gates, self.server.answering = self.server.answering, []
        for gate in gates:
            gate.set()
        self.settle()
        for caller, call in list(self.calls.items()):
            if call.done():
                minute.ended[call.result()] += 1
                del self.calls[caller]

    def minute(self) -> Minute:
        """Run one minute."""
        minute = Minute()
        before = len(self.server.unloaded)
        self.start(minute)
        minute.running, minute.waiting = len(self.server.answering), self.llm.stats().waiting
        for _ in range(3):
            self.answer(minute)
        minute.unloaded = self.server.unloaded[before:]
        self.outcomes += minute.ended
        return minute

    def end(self) -> None:
        """Finish all remaining calls."""
        while self.calls:
            self.answer(Minute())
        self.threads.shutdown()


def show(line: str) -> None:
    """Print a line for `pytest -s`."""
    sys.stdout.write(f"{line}\n")


def report(number: int, minute: Minute, readings: Any, server: Server, most: int) -> str:
    models = ", ".join(f"{name}@{held.window}" for name, held in server.living().items()) or "-"
    ended = ", ".join(f"{count} {what}" for what, count in sorted(minute.ended.items())) or "-"
    gone = f"; unloaded {', '.join(minute.unloaded)}" if minute.unloaded else ""
    return (
        f"{number:2} pressure {readings.pressure} heat {readings.thermal} | {minute.started:2} asked, "
        f"{minute.running} running, {minute.waiting:2} waiting | {ended}{gone} | "
        f"{models}: {server.total() / 1e9:.1f} of {most / 1e9:.1f} GB"
    )


@pytest.mark.nightly
def test_budget_holds_for_an_hour() -> None:
    clock = Clock()
    with Server(clock) as server:
        recorded = Recorded(read_machine(HOUR), clock)
        runner = Inhabited(recorded, server)
        policy = graftage_m4.M4(runner=runner, clock=clock, queued_requests=QUEUE)
        collector = Collector(recorded, clock)
        budget = budget_of(collector.static(), collector.readings())
        assert budget is not None
        with graftage.connect("ollama", host=server.url, plugins=[policy]) as llm:
            hour = Hour(server, clock, llm, budget.static)
            minutes = []
            for number in range(60):
                clock.now = number * 60.0
                minutes.append(hour.minute())
                show(report(number, minutes[-1], collector.readings(), server, budget.static))
            hour.end()
            stats = llm.stats()
    show(f"{dict(hour.outcomes)}; unloaded {len(server.unloaded)}, loaded again {server.reloads}")
    show(f"most memory {hour.highest / 1e9:.1f} of {budget.static / 1e9:.1f} GB; windows {hour.windows}")
    assert 0 < hour.highest <= budget.static
    assert hour.outcomes["answered"] > 100
    assert hour.outcomes["queue full"] > 0
    assert hour.outcomes["refused: memory"] > 0, "the model that never fits"
    assert hour.outcomes["refused: memory_pressure"] > 0
    assert max(minute.waiting for minute in minutes) > 0
    assert server.unloaded
    assert (stats.running, stats.waiting) == (0, 0)
    # While pressure is critical nothing is loaded: only callers of loaded models get replies.
    assert sum(minute.ended["answered"] for minute in minutes[34:40]) < sum(
        minute.ended["answered"] for minute in minutes[4:10]
    )
