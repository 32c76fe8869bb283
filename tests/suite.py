"""Fixtures for all tests: they run offline, replay cassettes, and skip the waits between attempts."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import threading
import zlib
from collections import defaultdict
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock
from hypothesis import settings

from graftage._engine.delivery import flush
from graftage.hookspecs import hookimpl
from graftage.retry import no_waiting
from graftage.testing.both import Both
from graftage_ollama.testing import FakeOllama

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from graftage.calls import Event

pytest_plugins = ["graftage.testing.plugin", "engine_fixtures", "network_servers", "pytester"]

PATIENCE = 60.0
"""Seconds after which a hanging test fails."""

LONG_TABLE = 4
"""Cases of a test from which each of them runs under one client only."""

LONG = 600.0
"""Seconds for a test that may download a model, start an engine, or wait for the one real server."""

# The gate gives the same result each time, also on a slow machine. `--hypothesis-profile=search` tries more inputs.
settings.register_profile("gate", deadline=None, derandomize=True, max_examples=30)
settings.register_profile("search", deadline=None, print_blob=True)
settings.load_profile("gate")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="Run what takes too long for each change, too.")


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    # Most tests wait more than they compute: for time limits, threads and programs.
    return 2 * (os.cpu_count() or 1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--nightly"):
        later = _for_the_night(items)
        config.hook.pytest_deselected(items=[item for item in items if item in later])
        items[:] = [item for item in items if item not in later]
    for item in items:
        if item.get_closest_marker("engine") or item.get_closest_marker("live"):
            item.add_marker(pytest.mark.timeout(LONG))


def _for_the_night(items: list[pytest.Item]) -> set[pytest.Item]:
    """Return the tests that wait for `--nightly`.

    These are all that are marked `nightly`, and every other case of a long table, or of a test marked `by_turns`: its
    cases run under the sync and the async client by turns.
    """
    later = {item for item in items if item.get_closest_marker("nightly")}
    tables: dict[str, dict[str, list[pytest.Item]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        name, _, case = item.nodeid.partition("[")
        parts = case.rstrip("]").split("-")
        if not {"sync", "async"}.isdisjoint(parts):
            tables[name]["-".join(each for each in parts if each not in ("sync", "async"))].append(item)
    for name, table in tables.items():
        for place, both in enumerate(table.values(), zlib.crc32(name.encode())):
            if len(both) == 2 and (len(table) >= LONG_TABLE or both[0].get_closest_marker("by_turns")):
                later.add(both[place % 2])
    return later


@pytest.fixture(autouse=True, scope="module")
def _settled() -> None:
    # Thousands of tests and what they leave make each full garbage collection slow, and tests for leaks ask for many.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _isolated(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    no_network: object,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[None]:
    """Reach only loopback, without the machine's settings, proxies and plugins, and without waits between attempts."""
    for name in list(os.environ):
        if name.startswith(("GRAFTAGE_", "OLLAMA_")) and not name.startswith("GRAFTAGE_LIVE"):
            monkeypatch.delenv(name)
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GRAFTAGE_DISABLED_PLUGINS", "lora,m4")
    monkeypatch.setenv("GRAFTAGE_CONFIG", str(tmp_path_factory.getbasetemp() / "no-settings.toml"))
    marks = {each.name for each in request.node.iter_markers()}
    # With several workers, one test at a time uses the real server, since each counts its models. All share the folder
    # above their own.
    alone = FileLock(tmp_path_factory.getbasetemp().parent / "live.lock") if "live" in marks else nullcontext()
    with alone, nullcontext() if "waits" in marks else no_waiting():
        yield


@pytest.fixture
def fake() -> Iterator[FakeOllama]:
    """A fake Ollama server."""
    with FakeOllama() as server:
        yield server


@pytest.fixture
def outer(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A test folder with our plugin alone."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeconftest('pytest_plugins = ["graftage.testing.plugin"]')
    return pytester


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Make programs that the test starts react to Ctrl-C and a lost terminal.

    A background job (`pytest &` in a script, `nohup`) ignores both, and the programs it starts inherit that.
    """
    wanted: dict[int, Any] = {signal.SIGINT: signal.default_int_handler}
    if hasattr(signal, "SIGHUP"):
        wanted[signal.SIGHUP] = signal.SIG_DFL
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Path]:
    """A named pipe. A thread opens it for writing, so that a test that reads it fails instead of hanging."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.open("wb").close())
    writer.start()
    yield path
    while writer.is_alive():  # The thread may not have opened it yet, so try until it ends.
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        writer.join(0.1)
        os.close(reader)


# --- One test for both kinds of client -------------------------------------------------------------------------------


@pytest.fixture(params=["sync", "async"])
def both(request: pytest.FixtureRequest) -> Iterator[Both]:
    """The test runs with both clients."""
    kind = Both(request.param)
    yield kind
    kind.close()


# --- Plugins that tests pass or install ------------------------------------------------------------------------------


class Watcher:
    """An observer that keeps its events."""

    name = "watcher"

    def __init__(self) -> None:
        self._events: list[Event] = []

    @hookimpl
    def observe(self, event: Event) -> None:
        self._events.append(event)

    @property
    def events(self) -> list[Event]:
        """All events so far, once they have arrived."""
        flush(PATIENCE)
        return self._events

    def kinds(self, operation: str | None = None) -> list[str]:
        """Return the kinds of the events, in order."""
        return [event.kind for event in self.events if operation in (None, event.operation)]

    def last(self, kind: str) -> Event:
        """Return the last event of a kind."""
        return [event for event in self.events if event.kind == kind][-1]


@pytest.fixture
def watcher() -> Watcher:
    """An observer that keeps its events, to pass as a plugin."""
    return Watcher()


class Site:
    """A folder of installed distributions, importable during the test."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch

    def add(
        self,
        distribution: str,
        *,
        version: str = "1.0",
        providers: Mapping[str, str] | None = None,
        plugins: Mapping[str, str] | None = None,
        requires: Iterable[str] = (),
        modules: Mapping[str, str] | None = None,
        metadata: str | None = None,
    ) -> None:
        """Install a distribution: its metadata and its modules."""
        # With hyphens in the name of that folder, several distributions would count as one.
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        text = [f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}"]
        text += [f"Requires-Dist: {each}" for each in requires]
        if metadata != "":
            (info / "METADATA").write_text(metadata or "\n".join(text) + "\n", encoding="utf-8")
        groups = [("graftage.providers", providers or {}), ("graftage.plugins", plugins or {})]
        lines = [
            f"[{group}]\n" + "".join(f"{name} = {at}\n" for name, at in points.items()) for group, points in groups
        ]
        (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
        for module, source in (modules or {}).items():
            (self.folder / f"{module}.py").write_text(source, encoding="utf-8")
        self._monkeypatch.syspath_prepend(self.folder)
        importlib.invalidate_caches()

    def imported(self) -> list[str]:
        """Return the imported modules of this folder."""
        here = str(self.folder)
        modules = list(sys.modules.items())
        return sorted(name for name, module in modules if str(getattr(module, "__file__", "")).startswith(here))

    def forget(self) -> None:
        """Remove the modules, so that no other test finds them."""
        for name in self.imported():
            del sys.modules[name]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Distributions that are installed during the test."""
    folder = tmp_path / "site"
    folder.mkdir()
    made = Site(folder, monkeypatch)
    yield made
    made.forget()
