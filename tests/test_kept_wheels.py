"""The first wheels of providers from outside: they must work with every core that takes their contract.

Never build them again. `graftage new provider` of release 0.2 wrote what is in them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
from places import ROOT

from graftage._engine.plugins import Catalog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from graftage.testing.both import Both

WHEELS = ROOT / "tests" / "assets" / "wheels"


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the wheels on the path: Python imports from them, and finds their entry points."""
    for wheel in WHEELS.glob("*.whl"):
        monkeypatch.syspath_prepend(wheel)
    yield
    for name in [name for name in sys.modules if name.startswith(("graftage_parrot", "graftage_openai_wire"))]:
        del sys.modules[name]


def test_none_is_left_out() -> None:
    found = {entry.name: entry for entry in Catalog().inspect_all()}
    for name in "parrot", "openai-wire":
        entry = found[name]
        assert (entry.state, entry.version, entry.contract) == ("loaded", "0.1.0", 1), entry.error


def test_function_replies(both: Both) -> None:
    llm = both.connect("parrot:large", times=2)
    assert llm.chat("Hello").text == "Hello Hello "
    with llm.chat("Hello", stream=True) as stream:
        assert [(chunk.text, chunk.finish_reason) for chunk in stream][-1] == ("", "stop")
    assert [model.name for model in llm.models()] == ["small", "large"]


def test_server_replies(both: Both, claim_cassette: Callable[[str], Path]) -> None:
    from graftage.testing import Cassette

    recorded = claim_cassette("test_outside_openai/test_chat_gives_text_usage_and_reason.yaml")
    given: dict[str, Any] = {"host": "http://127.0.0.1:11434/v1", "transport": Cassette(recorded)}
    llm = both.connect("openai-wire:smollm2:135m", **given)
    question = "What is the capital of France? Answer with one word."
    reply = llm.chat(question, options={"temperature": 0, "seed": 7}, max_tokens=40)
    assert "Paris" in reply.text
    assert reply.usage.output_tokens
