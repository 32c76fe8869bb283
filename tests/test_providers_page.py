"""`docs/providers.md`: its blocks run one after another, and what it builds passes the suite."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from typing import Any

from places import ROOT

from graftage.testing.conformance import ProviderSuite
from graftage_ollama.testing import FakeOllama

PAGE = ROOT / "docs" / "providers.md"
TEXT = PAGE.read_text(encoding="utf-8")


@cache
def names() -> dict[str, Any]:
    """Run the blocks, and return what they leave behind. A failing one has the line of the page in its traceback."""
    found: dict[str, Any] = {"__name__": "page"}
    with FakeOllama() as fake:
        for block in re.finditer(r"```python\n(.*?)```", TEXT, re.DOTALL):
            above = "\n" * TEXT.count("\n", 0, block.start(1))
            exec(compile(above + block[1].replace("http://127.0.0.1:11434", fake.url), PAGE, "exec"), found)
    return found


class TestPage(ProviderSuite):
    @property
    def provider(self) -> Any:
        return names()["TestParrot"].provider


def test_blocks_run() -> None:
    assert names()["graftage_contract"] == names()["graftage"].hookspecs.CONTRACT


def test_entry_point_is_valid() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    assert tomllib.loads(block)["project"]["entry-points"] == {
        "graftage.providers": {"my-server": "graftage_my_server"}
    }


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (PAGE.parent / target).exists(), target
