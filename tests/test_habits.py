"""What the documents and the workflow name exists: the commands of the justfile, and the files of the architecture."""

from __future__ import annotations

import re

import pytest
from places import ROOT

JUSTFILE = (ROOT / "justfile").read_text(encoding="utf-8")
RECIPES = set(re.findall(r"^([a-z][a-z-]*)(?: \*\w+)?:(?!=)", JUSTFILE, re.MULTILINE))
PROGRAMS = (".github/workflows/test.yml", ".pre-commit-config.yaml", ".ci/run")
"""Files that run commands: those of the justfile and no others, so that the two cannot differ."""
FOLDERS = [ROOT, ROOT / "core" / "graftage", *ROOT.glob("p*/*"), *ROOT.glob("p*/*/graftage_*")]
"""Where a file that the architecture names may be."""


@pytest.mark.parametrize("file", [*PROGRAMS, "CONTRIBUTING.md", "README.md", "docs/architecture.md"])
def test_commands_are_recipes(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    named = set(re.findall(r'\bjust"? ([a-z][a-z-]*)', text))
    assert named
    assert named <= RECIPES


@pytest.mark.parametrize("file", PROGRAMS)
def test_programs_run_recipes_alone(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert not re.search(r"(?m)^(?!.*README).*(pytest|ruff|mypy)", text)


def test_readme_runs_what_the_recipe_runs() -> None:
    command = re.search(r"^test \*arguments:\n    (.*) \{\{", JUSTFILE, re.MULTILINE)
    assert command
    assert f"/{command[1]}\n```" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_files_of_the_architecture_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w./-]+(?:\.py|\.txt|\.json|/))`", text))
    assert len(named) > 50
    assert not [each for each in named if not any((folder / each).exists() for folder in FOLDERS)]
