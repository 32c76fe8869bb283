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
    deviations = {
        "test_tool_calls_can_be_read": "the small model has no template for tools",
        "test_format_gives_data": "the small model writes at random, and does not end",
        "test_each_document_is_ranked_once": "the small model cannot rank",
    }

    @pytest.fixture(autouse=True)
    def _stored(self, small_models: Path, tmp_path: Path) -> None:
        self.settings = {"models_path": small_models, "prompts_path": tmp_path}
