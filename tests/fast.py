"""A part of the tests, for less than a minute on two cores: `just test-fast`, a plugin of pytest.

The rule: one case of each test, always the same. Left out are tests that wait for time limits or start processes
(marked `slow`), may take longer than the usual time limit (marked `engine`, `live` or `timeout`), make up examples
(marked `hypothesis`) or start the command (fixture `shell`).
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from typing import Any

import pytest

_counts = pytest.StashKey[tuple[int, int, int]]()
_OUTPUT = "fast"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    quick = [item for item in items if not _is_slow(item)]
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in quick:
        cases[item.nodeid.partition("[")[0]].append(item)
    # The name decides which case it is, so that one test runs with a sync client and the next with an async one.
    chosen = {id(same[zlib.crc32(name.encode()) % len(same)]) for name, same in cases.items()}
    config.stash[_counts] = len(chosen), len(quick) - len(chosen), len(items) - len(quick)
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    items[:] = [item for item in items if id(item) in chosen]


def _is_slow(item: pytest.Item) -> bool:
    marked = {each.name for each in item.iter_markers()}
    return not marked.isdisjoint({"slow", "timeout", "hypothesis"}) or "shell" in getattr(item, "fixturenames", ())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let a worker of pytest-xdist report to its controller."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output[_OUTPUT] = session.config.stash.get(_counts, None)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if (counts := getattr(node, "workeroutput", {}).get(_OUTPUT)) is not None:
        node.config.stash[_counts] = tuple(counts)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say what was left out."""
    if (counts := config.stash.get(_counts, None)) is not None:
        one, more, long = counts
        terminalreporter.line(
            f"Fast: one case of each of {one} tests. Left out: {more} more cases of these, and {long} tests that need "
            "an engine, a server or a long time, make up examples or start the command. `just test` runs all."
        )
