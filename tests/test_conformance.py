"""The suite for providers catches every provider that breaks a sentence of the contract."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from broken_providers import CAUGHT
from test_conformance_outside import TestEcho as Adopted

from graftage import hookspecs
from graftage.testing.conformance import ProviderSuite

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
TESTS = {name: test for name, test in vars(ProviderSuite).items() if name.startswith("test_")}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of each broken provider's test."""
    report = tmp_path_factory.mktemp("report") / "report.json"
    plugins = ["-p", "graftage.testing.conformance.report", "-p", "broken_providers", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, f"--graftage-report={report}"]
    done = subprocess.run(
        [*command, str(HERE / "broken_providers.py")],
        cwd=HERE.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.exists(), done.stdout + done.stderr
    return {each["provider"]: each["tests"] for each in json.loads(report.read_text("utf-8"))["providers"]}


class TestBrokenProvider:
    @pytest.mark.parametrize("provider", CAUGHT)
    def test_is_caught_by_name(self, outcomes: dict[str, Any], provider: str) -> None:
        test = CAUGHT[provider][1]
        assert outcomes[provider][test]["outcome"] == "failed"

    @pytest.mark.parametrize("sentence", sorted({sentence for sentence, _ in CAUGHT.values()}))
    def test_breaks_words_of_the_contract(self, sentence: str) -> None:
        source = " ".join(re.sub(r"^\s*#?", "", line) for line in inspect.getsource(hookspecs).splitlines())
        assert sentence in re.sub(r"\s+", " ", source)

    def test_there_is_one_for_each_test(self) -> None:
        # The core alone keeps these two, whatever a provider does.
        alone = {"test_missing_operations_are_refused_unsent", "test_undeclared_option_is_refused"}
        assert TESTS.keys() - {test for _, test in CAUGHT.values()} == alone


class TestSuite:
    def test_each_test_says_what_to_do(self) -> None:
        for name, test in TESTS.items():
            claim, _, help_with_it = (inspect.getdoc(test) or "").partition("\n\nIf it fails: ")
            assert claim.endswith("."), name
            assert help_with_it.endswith("."), name

    @pytest.mark.parametrize("hidden", [lambda self: None, None])
    def test_cannot_be_hidden(self, hidden: Any) -> None:
        with pytest.raises(TypeError, match="declare it in `deviations`"):
            type("TestMine", (ProviderSuite,), {"test_connects": hidden})

    def test_unknown_deviation_is_refused(self) -> None:
        with pytest.raises(TypeError, match="`deviations` names no test of the suite: test_conects"):
            type("TestMine", (ProviderSuite,), {"deviations": {"test_conects": "It is new."}})

    def test_deviation_needs_a_reason(self) -> None:
        with pytest.raises(TypeError, match="has no reason"):
            type("TestMine", (ProviderSuite,), {"deviations": {"test_connects": " "}})

    def test_subclass_has_its_own_deviations(self) -> None:
        mine = type("TestMine", (Adopted,), {"deviations": {}})
        for name, test in TESTS.items():
            assert getattr(mine, name) is test


MODULE = """
from graftage.testing import Echo
from graftage.testing.conformance import ProviderSuite
from graftage.testing.conformance.suite import ProviderSuite as Suite

Suite.test_connects.since = "99.0"

class TestMine(ProviderSuite):
    suite = "0.2"
    model = "echo:latest"
    deviations = {"test_models_are_listed": "It lists none.", "test_chat_gives_text": "It says nothing."}
    provider = Echo(errors={"list_models": ValueError("no")}, without=PARTS)
"""


class TestReport:
    def report(self, pytester: pytest.Pytester, *, without: tuple[str, ...] = ()) -> Any:
        pytester.makepyfile(MODULE.replace("PARTS", repr(without)))
        chosen = "connects or models_are_listed or chat_gives_text or tokens_are_counted"
        result = pytester.runpytest_subprocess(
            "-q", "-p", "graftage.testing.conformance.report", "--graftage-report=it.json", "-k", chosen
        )
        found = json.loads((pytester.path / "it.json").read_text("utf-8"))
        return result, found["providers"][0]

    def test_has_each_outcome(self, pytester: pytest.Pytester) -> None:
        result, found = self.report(pytester, without=("count_tokens",))
        tests = {name: each["outcome"] for name, each in found["tests"].items()}
        assert tests == {
            "test_connects": "passed",
            "test_chat_gives_text": "failed",  # A deviation that passes
            "test_tokens_are_counted": "not offered",
            "test_models_are_listed": "deviation",
        }
        assert found["tests"]["test_models_are_listed"]["reason"] == "It lists none."
        result.stdout.fnmatch_lines(["*what providers can do*", "echo", "*deviation: test_models_are_listed - It*"])

    def test_newer_test_warns(self, pytester: pytest.Pytester) -> None:
        _, found = self.report(pytester, without=("chat",))
        assert found["tests"]["test_connects"] == {"outcome": "warning", "reason": "new in 99.0"}
