"""Part of the tests, in less than a minute on two cores: `just test-fast`, a plugin of pytest.

The rule: one case of each test, always the same one, and no test that may take longer than the usual limit of time
(those marked `engine`, `live` or `timeout`). So each module of each distribution is touched, in either mode.
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
    quick = [item for item in items if item.get_closest_marker("timeout") is None]
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in quick:
        cases[item.nodeid.partition("[")[0]].append(item)
    # The name decides which case it is, so that one test runs with a sync client and the next with an async one.
    chosen = {id(same[zlib.crc32(name.encode()) % len(same)]) for name, same in cases.items()}
    config.stash[_counts] = len(chosen), len(quick) - len(chosen), len(items) - len(quick)
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    items[:] = [item for item in items if id(item) in chosen]


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
            f"Fast: ran one case of each of {one} tests. Left out: {more} more cases, {long} that need an engine, "
            "a server or long. `just test` runs all."
        )
