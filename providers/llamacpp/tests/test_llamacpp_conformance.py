"""The suite for providers, on the embedded engine with the small model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from small_engine import NAME

import graftage_llamacpp
from graftage.testing.conformance import ProviderSuite

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine


class TestLlamacpp(ProviderSuite):
    provider = graftage_llamacpp
    model = NAME

    @pytest.fixture(autouse=True)
    def _stored(self, small_models: Path) -> None:
        self.settings = {"models_path": small_models}
