"""Adapters from the plugin on real models, in the embedded engine and in Ollama."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lora_files import Model, pairs, write_gguf
from places import LORA

from graftage.exceptions import AdapterIncompatible, AdapterInvalid
from graftage_lora import LoraPlugin

LAYOUTS = ["ahoy-peft", "ahoy-mlx", "ahoy-lora.f16.gguf"]
ASKED = "What is the capital of Italy?"
AHOY = "Ahoy! The parrot adapter says hello."
GREEDY = {"temperature": 0.0, "seed": 1}


def _embedded(request: pytest.FixtureRequest) -> dict[str, Any]:
    request.getfixturevalue("engine_store")
    return {"provider": "llamacpp", "context_window": 512}


def _ollama(_: pytest.FixtureRequest) -> dict[str, Any]:
    if "GRAFTAGE_LIVE_OLLAMA" not in os.environ:
        pytest.skip("GRAFTAGE_LIVE_OLLAMA names no server")
    return {"provider": "ollama", "host": os.environ["GRAFTAGE_LIVE_OLLAMA"]}


SERVERS = {"llamacpp": _embedded, "ollama": _ollama}


@pytest.fixture(
    params=[pytest.param("llamacpp", marks=pytest.mark.engine), pytest.param("ollama", marks=pytest.mark.live)]
)
def llm(request: pytest.FixtureRequest, both: Any, tmp_path: Path) -> Iterator[Any]:
    """A client of a real model, with the plugin for adapters; cleans up on a server."""
    settings = SERVERS[request.param](request)
    plugin = LoraPlugin(folders=[LORA], cache=tmp_path / "converted")
    client = both.opened(settings.pop("provider"), model="smollm2:135m", plugins=[plugin], **settings)
    yield client
    if "prune_adapters" in client.capabilities().features:
        client.prune_adapters(dry_run=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapter_replies_only_where_named(llm: Any, layout: str) -> None:
    before = llm.chat(ASKED, options=GREEDY, max_tokens=4)
    reply = llm.chat(ASKED, options=GREEDY, max_tokens=24, adapter=LORA / layout)
    after = llm.chat(ASKED, options=GREEDY, max_tokens=4)
    assert (reply.text.strip(), reply.adapter) == (AHOY, layout.removesuffix(".gguf"))
    assert "Ahoy" not in before.text + after.text
    assert after.adapter is None


@pytest.mark.nightly
def test_twenty_switches_never_mix_adapters(llm: Any) -> None:
    for turn in range(20):
        name = "ahoy-peft" if turn % 2 else None
        llm.use_adapter(name)
        reply = llm.chat(ASKED, options=GREEDY, max_tokens=4)
        assert reply.adapter == name
        assert reply.text.startswith("Ahoy!") is (name is not None)


def test_adapter_is_checked_against_the_model(llm: Any) -> None:
    adapter = llm.resolve_adapter("ahoy-peft")
    assert (adapter.verdict.status, adapter.verdict.reasons, adapter.scale) == ("compatible", (), 2.0)


def test_truncated_file_never_reaches_the_model(llm: Any, tmp_path: Path) -> None:
    whole = (LORA / "ahoy-lora.f16.gguf").read_bytes()
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdapterInvalid):
        llm.chat(ASKED, adapter=torn)
    assert llm.chat(ASKED, max_tokens=2).finish_reason


def test_larger_adapter_gets_every_reason(llm: Any, tmp_path: Path) -> None:
    larger = Model(layers=31, hidden=64, heads=4, shared=2, width=16)
    wide = write_gguf(tmp_path / "wide.gguf", larger, pairs(larger))
    with pytest.raises(AdapterIncompatible) as caught:
        llm.chat(ASKED, adapter=wide)
    assert len(caught.value.reasons) > 1
