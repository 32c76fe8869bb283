"""The suite for providers, on cassettes from three real servers.

Record them again, each from a server with SmolLM2-135M (for Ollama, `smollm2:135m`):

    export GRAFTAGE_LIVE_MLX=http://127.0.0.1:8081 GRAFTAGE_LIVE_LLAMA_SERVER=http://127.0.0.1:8080
    export GRAFTAGE_LIVE_OLLAMA=http://127.0.0.1:11434
    pytest providers/openai/tests/test_openai_conformance.py --record-mode=all
"""

from __future__ import annotations

import os
from typing import Any

import httpx
import pytest
from places import ROOT
from test_outside_openai import TOOL_MODEL, create_tool_model

import graftage_openai
from graftage.testing.conformance import ProviderSuite

CASSETTES = ROOT / "cassettes" / "test_openai_conformance"
LIVE = {name: os.environ.get(f"GRAFTAGE_LIVE_{name}") for name in ("MLX", "LLAMA_SERVER", "OLLAMA")}


class Suite(ProviderSuite):
    """What the three have in common."""

    provider = graftage_openai
    settings = {"host": "http://127.0.0.1:8080"}

    @pytest.fixture(autouse=True)
    def _recorded_from(self, request: pytest.FixtureRequest) -> None:
        if request.config.getoption("record_mode") and not self.live:
            pytest.skip("there is no server to record from")


class TestMlx(Suite):
    cassettes = CASSETTES / "mlx"
    settings = {**Suite.settings, "profile": "mlx"}
    model = "default_model"
    live = LIVE["MLX"]
    recording = {"server": "mlx_lm.server 0.32.2"}
    deviations = {
        "test_declared_options_reach_the_server": "with log-probabilities, chats are not streamed as the recorded ones",
        "test_tokens_are_counted": "the server has no endpoint for it",
        "test_vectors_follow_their_inputs": "the server has no endpoint for it",
    }


class TestLlamaServer(Suite):
    """The provider finds out itself which server this is."""

    cassettes = CASSETTES / "llama-server"
    model = "smollm2-135m"
    live = LIVE["LLAMA_SERVER"]
    recording = {"server": "llama-server b11549"}
    deviations = {
        "test_unknown_model_is_not_found": "the server replies to any name with its one model; the reply has a warning",
    }


class TestOllama(Suite):
    cassettes = CASSETTES / "ollama"
    settings = {**Suite.settings, "profile": "ollama-v1"}
    model = "smollm2:135m"
    models = {"tools": TOOL_MODEL}
    live = LIVE["OLLAMA"]
    deviations = {"test_tokens_are_counted": "the API has no endpoint for it"}

    @pytest.fixture(autouse=True)
    def _prepared(self, request: pytest.FixtureRequest) -> None:
        if self.live and request.config.getoption("record_mode"):
            create_tool_model(self.live)
            version = httpx.get(f"{self.live}/api/version", trust_env=False).json()["version"]
            self.recording: Any = {"server": f"Ollama {version}"}
