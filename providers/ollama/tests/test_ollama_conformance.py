"""The suite for providers, on cassettes from a real Ollama.

Record them again, from any server that has `smollm2:135m`:

    export GRAFTAGE_LIVE_OLLAMA=http://127.0.0.1:11434
    pytest providers/ollama/tests/test_ollama_conformance.py --record-mode=all
"""

from __future__ import annotations

import hashlib
import os
import re
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from places import LORA, ROOT
from test_outside_openai import TOOL_MODEL, create_tool_model

import graftage_ollama
from graftage.testing.conformance import ProviderSuite
from graftage.types import Verdict

if TYPE_CHECKING:
    from pathlib import Path

    from graftage.types import ModelInfo

LIVE = os.environ.get("GRAFTAGE_LIVE_OLLAMA", "")


class Ahoy:
    """An adapter that is a GGUF file already."""

    name = "ahoy"
    scale = 2.0
    verdict = Verdict(status="compatible")
    served_as = None
    file = LORA / "ahoy-lora.f16.gguf"
    digest = f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"

    def gguf(self, base: ModelInfo) -> Path:
        return self.file


class TestOllama(ProviderSuite):
    provider = graftage_ollama
    cassettes = ROOT / "cassettes" / "test_ollama_conformance"
    settings = {"host": "http://127.0.0.1:11434"}
    model = "smollm2:135m"
    models = {"tools": TOOL_MODEL}
    adapter: Any = Ahoy()
    live = LIVE or None
    deviations = {"test_pull_ends_with_success": "no registry could be reached where the cassettes were recorded"}

    @pytest.fixture(autouse=True)
    def _prepared(self, request: pytest.FixtureRequest) -> None:
        """Send the server what recordings need, so that no cassette contains it."""
        if LIVE and request.config.getoption("record_mode"):
            create_tool_model(LIVE)
            data = self.adapter.file.read_bytes()
            with httpx.Client(base_url=LIVE, trust_env=False) as client:
                client.post(f"/api/blobs/{self.adapter.digest}", content=data).raise_for_status()
                server = f"Ollama {client.get('/api/version').json()['version']}"
            self.recording = {"server": server, "before_record_response": without_folders}


def without_folders(response: dict[str, Any]) -> dict[str, Any]:
    """Shorten the paths of models, which may contain a user name."""
    body = response["body"]
    return {**response, "body": {"string": re.sub(rb"/[\w./-]*?/blobs/", b"/models/blobs/", body["string"])}}
