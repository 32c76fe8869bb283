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

from graftage import hookspecs
from graftage.testing.conformance import ProviderSuite

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

    @pytest.mark.parametrize("sentence", {sentence for sentence, _ in CAUGHT.values()})
    def test_breaks_words_of_the_contract(self, sentence: str) -> None:
        source = " ".join(re.sub(r"^\s*#?", "", line) for line in inspect.getsource(hookspecs).splitlines())
        assert sentence in re.sub(r"\s+", " ", source)

    def test_there_is_one_for_each_test(self) -> None:
        # The core alone keeps these two, whatever a provider does.
        alone = {"test_missing_operations_are_refused_unsent", "test_undeclared_option_is_refused"}
        assert TESTS.keys() - {test for _, test in CAUGHT.values()} == alone
