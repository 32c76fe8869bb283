"""`docs/providers.md`: its blocks run one after another, and what it builds passes the suite."""

from __future__ import annotations

import re
from typing import Any

import pytest
from places import ROOT

from graftage_ollama.testing import FakeOllama

PAGE = ROOT / "docs" / "providers.md"
TEXT = PAGE.read_text(encoding="utf-8")
SERVER = "http://127.0.0.1:11434"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def page(fake: FakeOllama) -> dict[str, Any]:
    """What the blocks leave behind. A failing one has the line of the page in its traceback."""
    names: dict[str, Any] = {"__name__": "page"}
    for found in re.finditer(r"```python\n(.*?)```", TEXT, re.DOTALL):
        above = "\n" * TEXT.count("\n", 0, found.start(1))
        exec(compile(above + found[1].replace(SERVER, fake.url), PAGE, "exec"), names)
    return names
