"""Compare Graftage with Ollama's and OpenAI's own clients, with a socket and `json`, and with other frameworks.

Each client runs in a separate process. In each repetition, all clients run each command in turn, in random order, and
each figure is divided by that of the server's own client. The report has the median of these ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks import growth, overshoot, report
from benchmarks.peers import REQUIREMENTS
from benchmarks.report import FLOOR, OPENAI, OURS, REFERENCE

HERE = Path(__file__).resolve().parent
TIME_LIMIT = 300.0
"""Seconds for one command of one client."""
FRESH = "fresh"
COMMANDS: dict[str, tuple[str, str, int]] = {
    FRESH: (FRESH, "chunks-20", 1),
    "chat 20": ("chat", "chunks-20", 100),
    "stream 20": ("stream", "chunks-20", 100),
    "chat 200": ("chat", "chunks-200", 50),
    "stream 200": ("stream", "chunks-200", 20),
    "burst": ("stream", "chunks-1000", 5),
    "paced": ("stream", "chunks-500-delay-1", 1),
    "embed": ("embed", "chunks-1", 3),
    "health": ("health", "chunks-1", 100),
    "construct": ("construct", "chunks-1", 20),
    "streams": ("streams", "chunks-100", 200),
    "paced streams": ("streams", "chunks-100-delay-5", 200),
    "tasks": ("tasks", "chunks-20", 64),
    "threads": ("threads", "chunks-20", 64),
}
"""For each command what a worker does, with which model, and how often."""


class Row(NamedTuple):
    """A row of the table: one figure of one command."""

    title: str
    command: str
    figure: str = "cpu"
    unit: str = "ms"
    each: int = 1
    """The figure is divided by this."""
    reference: str = ""
    """The command of the server's own client to compare with, if it is another one."""


ROWS = (
    Row("`import` alone", FRESH, "import"),
    Row("cold: import, client, first chat", FRESH),
    Row("cold: import, client, first chat; wall", FRESH, "wall"),
    Row("peak memory of one chat", FRESH, "memory", "MB"),
    Row("a second client, `connect()`", "construct"),
    Row("chat, 20 chunks", "chat 20", unit="µs"),
    Row("chat, 20 chunks, streamed", "stream 20", unit="µs", reference="chat 20"),
    Row("chat, 200 chunks", "chat 200", unit="µs"),
    Row("chat, 200 chunks, streamed", "stream 200", unit="µs", reference="chat 200"),
    Row("stream of 1,000, each chunk", "burst", unit="µs", each=1000),
    Row("stream of 500, 1 ms apart, each chunk", "paced", unit="µs", each=500),
    Row("200 async streams of 100", "streams"),
    Row("200 streams of 100; wall", "streams", "wall"),
    Row("200 streams of 100; first token, median", "streams", "first p50"),
    Row("200 streams of 100; first token, 99 %", "streams", "first p99"),
    Row("200 async streams of 100, 5 ms apart", "paced streams"),
    Row("200 streams of 100, 5 ms apart; wall", "paced streams", "wall"),
    Row("200 streams of 100, 5 ms apart; first token, median", "paced streams", "first p50"),
    Row("200 streams of 100, 5 ms apart; first token, 99 %", "paced streams", "first p99"),
    Row("embed, 256 texts × 768", "embed"),
    Row("health without a cache, against `ps()`", "health", unit="µs"),
    Row("64 tasks, a chat each", "tasks"),
    Row("64 tasks, a chat each; wall", "tasks", "wall"),
    Row("64 threads, a chat each", "threads"),
    Row("64 threads, a chat each; wall", "threads", "wall"),
)


OPENAI_ROWS = tuple(
    row._replace(title=row.title.replace("ps()", "models.list()"), reference="")
    for row in ROWS
    if row.command != "embed"
)
"""The rows for OpenAI's API, whose streams are compared with streams."""


class Bench:
    """The server and the environments of the clients.

    Args:
        environments: the folder with those of peers.
        quick: run each command as little as possible.
    """

    def __init__(self, environments: Path, *, quick: bool) -> None:
        self.environments = environments
        self.quick = quick
        self.url = ""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("GRAFTAGE_", "OLLAMA_")) and not name.lower().endswith("_proxy")
        }
        quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HAYSTACK_TELEMETRY_ENABLED": "False"}
        folders = {"GRAFTAGE_CONFIG": str(environments / "none.toml"), "LLM_USER_PATH": str(environments / "llm-user")}
        self.environment = {**kept, **quiet, **folders}

    @contextlib.contextmanager
    def serve(self) -> Iterator[None]:
        """Run the server during the block. It ends with its input, which `Popen` closes."""
        command = [sys.executable, "-m", "benchmarks.server"]
        with subprocess.Popen(command, cwd=HERE.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
            assert server.stdout
            self.url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            yield

    def _python(self, client: str) -> str:
        if client not in REQUIREMENTS:
            return sys.executable
        return str(self.environments / client / ("Scripts" if os.name == "nt" else "bin") / "python")

    def start(self, client: str, *more: str, path: str = "") -> subprocess.Popen[str]:
        """Start a worker, which finds modules in the folder `path`, too."""
        own = client not in REQUIREMENTS
        script = str(HERE / ("worker.py" if own else "peers.py"))
        folders = [path, self.environment.get("PYTHONPATH", "") if own else str(HERE.parent)]
        return subprocess.Popen(
            [self._python(client), "-P", script, client, self.url, *more],
            env={**self.environment, "PYTHONPATH": os.pathsep.join(filter(None, folders))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def fresh(self, client: str, path: str = "", model: str = "chunks-20") -> dict[str, float]:
        """Measure a new process until its first reply."""
        with self.start(client, model, path=path) as worker:
            return read_figures(worker)

    @contextlib.contextmanager
    def worker(self, client: str) -> Iterator[Callable[[Mapping[str, Any]], dict[str, float]]]:
        """Start a worker at the first command, and end it after the block; each fresh process is another one."""
        with contextlib.ExitStack() as stack:
            started: list[subprocess.Popen[str]] = []

            def ask(command: Mapping[str, Any]) -> dict[str, float]:
                if command["what"] == FRESH:
                    return self.fresh(client, model=command["model"])
                # Started earlier, it could disturb the measures of other clients.
                if not started:
                    started.append(stack.enter_context(self.start(client)))
                assert started[0].stdin
                with contextlib.suppress(OSError):
                    started[0].stdin.write(json.dumps(command) + "\n")
                    started[0].stdin.flush()
                return read_figures(started[0])

            yield ask

    def scale(self, what: str, model: str, times: int) -> dict[str, Any]:
        """Return a command, with little to do in a quick run."""
        if self.quick:
            model, times = re.sub(r"\d+", "5", model, count=1), 2
        return {"what": what, "model": model, "times": times}

    def version(self, client: str) -> str:
        """Return the version of a client."""
        name = REQUIREMENTS.get(client, [client])[0].partition("[")[0]
        code = f"import importlib.metadata as m; print(m.version({name!r}))"
        found = subprocess.run([self._python(client), "-c", code], capture_output=True, text=True, check=False)
        return found.stdout.strip() or "no version"

    def install(self, client: str) -> None:
        """Make the environment of a peer, unless it exists.

        Raises:
            subprocess.CalledProcessError: it cannot be installed.
        """
        folder = self.environments / client
        if (folder / "whole").exists():
            return
        log(f"{client}: installing")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, capture_output=True)
        command = [self._python(client), "-m", "pip", "install", "--quiet", *REQUIREMENTS[client]]
        subprocess.run(command, check=True, capture_output=True, timeout=4 * TIME_LIMIT)
        (folder / "whole").touch()


def read_figures(worker: subprocess.Popen[str]) -> dict[str, float]:
    """Read the figures of a worker, or kill it if it takes too long.

    Raises:
        RuntimeError: the worker failed.
    """
    assert worker.stdout
    watch = threading.Timer(TIME_LIMIT, worker.kill)
    watch.start()
    line = worker.stdout.readline()
    watch.cancel()
    figures: dict[str, Any] = json.loads(line or '{"error": "the worker died"}')
    if "error" in figures:
        raise RuntimeError(figures["error"])
    return figures


def log(text: str) -> None:
    """Show progress."""
    print(text, file=sys.stderr, flush=True)


def usable_clients(bench: Bench, clients: Sequence[str]) -> list[str]:
    """Return the clients that can be installed and give a reply; log the others."""
    found = []
    for client in clients:
        try:
            if client in REQUIREMENTS:
                bench.install(client)
                # The first start compiles modules, which is not measured.
                bench.fresh(client)
            found.append(client)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            log(f"{client}: skipped, {error}")
    return found


def compare(
    bench: Bench, clients: Sequence[str], reference: str, rows: Sequence[Row], repetitions: int
) -> list[dict[str, Any]]:
    """Return rows, each with the figures of every client, and their ratios to those of the reference."""
    taken: list[dict[tuple[str, str], dict[str, float]]] = []
    failed: set[tuple[str, str]] = set()
    for repetition in range(repetitions):
        log(f"repetition {repetition + 1} of {repetitions}")
        taken.append({})
        order = random.Random(repetition)  # noqa: S311 - an order
        with contextlib.ExitStack() as stack:
            workers = {client: stack.enter_context(bench.worker(client)) for client in clients}
            for name, command in COMMANDS.items():
                for client in order.sample(clients, len(clients)):
                    if (name, client) in failed:
                        continue
                    try:
                        taken[-1][name, client] = workers[client](bench.scale(*command))
                    except RuntimeError as error:
                        failed.add((name, client))
                        log(f"{client}, {name}: {error}")
    return [
        {**row._asdict(), "clients": {client: _cell(row, client, reference, taken) for client in clients}}
        for row in rows
    ]


def _cell(
    row: Row, client: str, reference: str, taken: Sequence[Mapping[tuple[str, str], Mapping[str, float]]]
) -> dict[str, Any]:
    """Return the median of a client's figures, and of their ratios to the reference in the same repetition."""
    values, ratios = [], []
    for figures in taken:
        value = figures.get((row.command, client), {}).get(row.figure)
        base = figures.get((row.reference or row.command, reference), {}).get(row.figure)
        if value is not None:
            values.append(value / row.each)
            ratios += [value / base] if base else []
    return {"value": median(values), "ratio": median(ratios) if ratios else None, "all": values} if values else {}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `python -m benchmarks`."""
    temporary = Path(tempfile.gettempdir()) / "graftage-benchmarks"
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, default=temporary / "out", help="folder for the report and the pictures")
    parser.add_argument("--pictures", type=Path, help="another folder for the pictures")
    parser.add_argument("--peers", action="store_true", help="measure other frameworks, too")
    parser.add_argument("--environments", type=Path, default=temporary, help="folder where these are installed")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--quick", action="store_true", help="run everything once and as little as possible, to see that it works"
    )
    parser.add_argument(
        "--overshoot", action="store_true", help="measure only how long after their deadlines calls end"
    )
    given = parser.parse_args(arguments)
    if given.overshoot:
        print(overshoot.measure(1 if given.quick else 15))
        return
    for folder in (given.out, given.environments, given.pictures or given.out):
        folder.mkdir(parents=True, exist_ok=True)
    _raise_limit()
    repetitions = 1 if given.quick else given.repetitions
    bench = Bench(given.environments.resolve(), quick=given.quick)
    with bench.serve():
        clients = usable_clients(bench, [FLOOR, REFERENCE, OURS, *(REQUIREMENTS if given.peers else ())])
        about = {
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "load before": os.getloadavg()[0],
            "quick": given.quick,
            "repetitions": repetitions,
            "versions": {client: bench.version(client) for client in (*clients, *OPENAI) if client != FLOOR},
        }
        rows = compare(bench, clients, REFERENCE, ROWS, repetitions)
        openai = compare(bench, OPENAI, OPENAI[0], OPENAI_ROWS, repetitions)
        curves = growth.measure(bench)
    found = {"about": {**about, "load after": os.getloadavg()[0]}, "rows": rows, "openai": openai, "growth": curves}
    (given.out / "benchmark.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = report.markdown(found)
    (given.out / "benchmark.md").write_text(text, encoding="utf-8")
    for name, picture in (("benchmark.svg", report.bars(found)), ("growth.svg", report.curves(found))):
        ((given.pictures or given.out) / name).write_text(picture, encoding="utf-8")
    print(text)


def _raise_limit() -> None:
    """Allow enough open files for a thousand streams."""
    with contextlib.suppress(ImportError, ValueError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
