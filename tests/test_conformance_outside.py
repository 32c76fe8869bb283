"""The suite for providers, adopted by Echo and by those that `graftage new provider` writes."""

from __future__ import annotations

import importlib.util
import itertools
import os
from typing import Any

from places import ROOT
from test_outside_openai import TOOL_MODEL

from graftage.testing import Echo
from graftage.testing.conformance import ProviderSuite
from graftage.types import Verdict

TEMPLATES = ROOT / "core" / "graftage" / "_cli" / "templates"


def template(name: str) -> Any:
    """Import the provider that `graftage new provider` begins with."""
    spec = importlib.util.spec_from_file_location(f"graftage_{name}", TEMPLATES / name / "provider.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


class Wrapped:
    """An adapter that Echo takes as it is."""

    name = "pirate"
    digest = "sha256:0"
    scale = 1.0
    verdict = Verdict(status="compatible")
    served_as = None

    def gguf(self, base: Any) -> Any:
        raise NotImplementedError

    merge = gguf


def reply(request: Any) -> str:
    """Return JSON if it is asked for."""
    if request.format:
        return '{"city": "Paris"}'
    return "One, two, three."


class TestEcho(ProviderSuite):
    model = "echo:latest"
    adapter: Any = Wrapped()

    @property
    def provider(self) -> Any:
        return Echo(itertools.repeat(reply, 99), strict=True, adapter_weights=True)


class TestFunction(ProviderSuite):
    provider = template("function")


class TestOpenai(ProviderSuite):
    provider = template("openai")
    cassettes = TEMPLATES / "openai" / "cassettes"
    settings = {"host": "http://127.0.0.1:11434/v1"}
    model = "smollm2:135m"
    models = {"tools": TOOL_MODEL}
    live = os.environ.get("GRAFTAGE_LIVE_OLLAMA") or None
    recording = {"server": "Ollama 0.9.3"}
