"""The README: its Python blocks run, and its commands are those of the gate."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from places import ROOT

from graftage_ollama.testing import FakeOllama

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeOllama() as fake:
        monkeypatch.setenv("OLLAMA_HOST", fake.url)
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", BLOCKS[number]],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_shows_commands_to_chat_and_test() -> None:
    for marker in ("chat", "test"):
        found = re.findall(rf"<!-- {marker} -->\n```bash\n(.*?)```", TEXT, re.DOTALL)
        assert len(found) == 1
        assert len(found[0].strip().splitlines()) == 1


def test_sections_are_in_order() -> None:
    headings = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
    expected = ["Two commands", "Ten lines", "The smallest plugin", "What does not work yet"]
    assert [each for each in headings if each in expected] == expected


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
