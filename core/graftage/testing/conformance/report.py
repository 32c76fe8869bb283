"""The report of the suite: for each provider what it can do, and what became of each test.

pytest prints it as a section at its end. With `pytest_plugins = ["graftage.testing.conformance.report"]` there is the
option `--graftage-report=FILE`, which writes it as JSON. A plugin may have that file, named `graftage-report.json`, in
its wheel: `graftage providers` shows it.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from graftage._version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["NEW", "NOT_APPLICABLE", "NOT_OFFERED", "Report", "begin"]

NOT_OFFERED: Final = "not offered"
NOT_APPLICABLE: Final = "not applicable"
NEW: Final = "new in"
"""The first words of the reasons by which a report knows what a skipped test means."""
OUTCOMES: Final = ("failed", "deviation", "warning", "passed", "skipped", NOT_APPLICABLE, NOT_OFFERED)
"""What became of a test; of one that runs with both clients, the first of these counts."""
_NAME: Final = "graftage-conformance-report"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option for the file."""
    parser.getgroup("graftage").addoption("--graftage-report", metavar="FILE", help="Write the suite's report as JSON.")


def pytest_configure(config: pytest.Config) -> None:
    """Begin a report."""
    config.pluginmanager.register(Report(config), _NAME)


def begin(request: pytest.FixtureRequest, facts: Mapping[str, Any]) -> None:
    """Note which provider a test is for, where the report finds it, also from a worker of pytest-xdist."""
    if not request.config.pluginmanager.hasplugin(_NAME):
        request.config.pluginmanager.register(Report(request.config), _NAME)
    request.node.user_properties.append((_NAME, {**facts, "test": request.function.__name__}))


class Report:
    """Collects the outcomes; a plugin object of pytest."""

    def __init__(self, config: pytest.Config) -> None:
        self._file = config.getoption("--graftage-report", default=None)
        self.providers: dict[str, dict[str, Any]] = {}
        """For each provider its facts, and under `tests` the outcomes by name."""

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in one phase of a test."""
        facts = dict(dict(report.user_properties).get(_NAME, {}))
        if not facts or (report.passed and report.when != "call"):
            return
        test = facts.pop("test")
        tests = self.providers.setdefault(facts["provider"], {**facts, "tests": {}})["tests"]
        outcome, reason = _read(report)
        known = tests.get(test, {"outcome": outcome})["outcome"]
        if OUTCOMES.index(outcome) <= OUTCOMES.index(known):
            tests[test] = {"outcome": outcome} | ({"reason": reason} if reason else {})

    def as_data(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {"graftage": __version__, "providers": list(self.providers.values())}

    @pytest.hookimpl
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the file."""
        if self._file and not hasattr(session.config, "workerinput"):
            Path(self._file).write_text(json.dumps(self.as_data(), indent=2) + "\n", encoding="utf-8")

    @pytest.hookimpl
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print a section: the facts and the counts of each provider, and the tests that a reader must know of."""
        if self.providers:
            terminalreporter.section("what providers can do")
        for each in self.providers.values():
            terminalreporter.line(f"{each['provider']} {each['version'] or ''}".rstrip())
            terminalreporter.line(f"  features: {', '.join(each['features']) or 'unknown'}")
            terminalreporter.line(f"  tests: {counts(each['tests'])}")
            for outcome in ("failed", "deviation", "warning", "skipped"):
                for name, test in each["tests"].items():
                    if test["outcome"] == outcome:
                        terminalreporter.line(f"  {outcome}: {name}{_because(test)}")


def counts(tests: Mapping[str, Mapping[str, str]]) -> str:
    """Return how many tests had each outcome, in words."""
    found = Counter(each["outcome"] for each in tests.values())
    return ", ".join(f"{found[outcome]} {outcome}" for outcome in OUTCOMES if found[outcome])


def _because(test: Mapping[str, str]) -> str:
    return f" - {test['reason']}" if "reason" in test else ""


def _read(report: pytest.TestReport) -> tuple[str, str]:
    """Return the outcome of a test and its reason."""
    expected: str | None = getattr(report, "wasxfail", None)
    if report.skipped and expected is not None:
        reason = expected.removeprefix("reason: ")
        return ("warning" if reason.startswith(NEW) else "deviation"), reason
    if report.skipped:
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else "").removeprefix("Skipped: ")
        kind = next((each for each in (NOT_OFFERED, NOT_APPLICABLE) if reason.startswith(each)), None)
        return (kind, reason.removeprefix(f"{kind}: ")) if kind else ("skipped", reason)
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        return "failed", (crash.message if crash else str(report.longrepr)).partition("\n")[0]
    return "passed", ""
