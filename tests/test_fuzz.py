"""Readers raise only typed errors for any bytes, and lose nothing.

`scripts/fuzz.py` has the targets and runs longer; `--hypothesis-profile=search` tries more inputs here.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable

PATH = Path(__file__).parent.parent / "scripts" / "fuzz.py"


def targets() -> dict[str, tuple[Callable[[bytes], None], tuple[bytes, ...]]]:
    spec = importlib.util.spec_from_file_location("graftage_fuzz", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    found: dict[str, Any] = module.TARGETS
    return found


TARGETS = targets()


@st.composite
def edited(draw: st.DrawFn, examples: tuple[bytes, ...]) -> bytes:
    """Return an example with some bytes removed, doubled or replaced."""
    data = draw(st.sampled_from(examples))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        stop = min(start + draw(st.integers(0, 8)), len(data))
        data = data[:start] + draw(st.binary(max_size=4) | st.just(data[start:stop] * 2)) + data[stop:]
    return data


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60 if settings.default and settings.default.derandomize else 5000)
@given(st.data())
def test_any_bytes_raise_only_typed_errors(name: str, data: st.DataObject) -> None:
    target, examples = TARGETS[name]
    target(data.draw(edited(examples) | st.binary(max_size=200)))


@pytest.mark.parametrize("name", TARGETS)
def test_examples_pass(name: str) -> None:
    target, examples = TARGETS[name]
    for each in examples:
        target(each)
