"""Each row of `scripts/mutants.toml` matches one line and names existing tests.

`just nightly` checks that the tests kill the mutants.
"""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_rows_match_lines_and_tests() -> None:
    table = tomllib.loads((ROOT / "scripts" / "mutants.toml").read_text(encoding="utf-8"))
    count = 0
    for file, given in ((file, given) for area in table.values() for file, given in area.items()):
        source = (ROOT / file).read_text(encoding="utf-8")
        for old, new, *tests in given["mutants"]:
            assert (file, old, source.count(old)) == (file, old, 1)
            assert old != new
            modules = [each for each in shlex.split((tests or [given["tests"]])[0]) if each.endswith(".py")]
            assert modules
            assert all((ROOT / each).is_file() for each in modules), modules
            count += 1
    assert count >= 90
