"""Providers as a stranger begins them: written by `graftage new`, installed by pip, then used by name."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SERVERS = {"parrot": "function", "openai-wire": "openai"}
"""The providers, and what each asks."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the distributions as the command writes them."""
    folder = tmp_path_factory.mktemp("written")
    for name, server in SERVERS.items():
        done = graftage(dict(os.environ), "new", "provider", name, "--server", server, "--into", str(folder))
        assert (done.returncode, done.stderr) == (0, "")
    return folder


@pytest.fixture(scope="module")
def environment(written: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment for programs that use the providers, which are installed in their own folder."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not in this environment")
    target = tmp_path_factory.mktemp("installed")
    # The build backend is usually installed, since this repository needs it; if not, pip downloads it.
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *isolation, "--target", str(target)]
    sources = [str(written / f"graftage-{name}") for name in SERVERS]
    done = subprocess.run([*command, *sources], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GRAFTAGE_", "OLLAMA_"))}
    # Keep the sources under test on the path.
    path = os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "GRAFTAGE_CONFIG": str(target / "none.toml"), "PYTHONUTF8": "1"}


def run(environment: dict[str, str], *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env={**environment, **more},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def graftage(environment: dict[str, str], *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return run(environment, "-m", "graftage._cli", *arguments, **more)


class TestParrot:
    """A provider from another distribution."""

    def test_chats_from_the_command(self, environment: dict[str, str]) -> None:
        done = graftage(environment, "chat", "-m", "parrot:large", "hello")
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "hello", "")

    def test_is_listed_with_its_distribution(self, environment: dict[str, str]) -> None:
        done = graftage(environment, "plugins", "--json")
        found: dict[str, Any] = {each["name"]: each for each in json.loads(done.stdout)}
        parrot = found["parrot"]
        assert (parrot["kind"], parrot["distribution"], parrot["version"]) == ("provider", "graftage-parrot", "0.1.0")
        assert (parrot["state"], parrot["hooks"]) == ("loaded", ["connect", "settings_model"])

    def test_has_its_own_settings(self, environment: dict[str, str]) -> None:
        done = graftage(environment, "chat", "-m", "parrot:small", "hello", GRAFTAGE_PARROT_TIMES="3")
        assert done.stdout.split() == ["hello"] * 3

    def test_errors_reach_the_user_with_hint(self, environment: dict[str, str]) -> None:
        done = graftage(environment, "chat", "-m", "parrot:blue", "hello")
        assert done.returncode != 0
        assert "There is no model `blue`." in done.stderr
        assert "small" in done.stderr
        assert "Traceback" not in done.stderr

    def test_plain_hooks_serve_async_hosts(self, environment: dict[str, str]) -> None:
        code = """
import asyncio, graftage

async def main():
    async with graftage.connect_async("parrot") as llm:
        stream = await llm.chat("hello there", stream=True)
        print([chunk.text async for chunk in stream], [model.name for model in await llm.models()])

asyncio.run(main())
"""
        done = run(environment, "-c", code)
        assert (done.stdout.strip(), done.stderr) == ("['hello there ', ''] ['small', 'large']", "")

    def test_missing_feature_is_refused(self, environment: dict[str, str]) -> None:
        done = graftage(environment, "embed", "-m", "parrot:small", "hello")
        assert done.returncode != 0
        assert "embed" in done.stderr
        assert "parrot" in done.stderr


class TestOpenaiWire:
    """A provider on the toolkit."""

    def test_serves_both_clients(self, environment: dict[str, str], claim_cassette: Any) -> None:
        code = """
import asyncio, sys
import graftage
from graftage.testing import Cassette

async def main(**given):
    async with graftage.connect_async("openai-wire:smollm2:135m", transport=Cassette(sys.argv[1]), **given) as llm:
        return await ask(llm)

def ask(llm):
    question = "What is the capital of France? Answer with one word."
    return llm.chat(question, options={"temperature": 0, "seed": 7}, max_tokens=40)

given = {"host": "http://127.0.0.1:11434/v1"}
with graftage.connect("openai-wire:smollm2:135m", transport=Cassette(sys.argv[1]), **given) as llm:
    for reply in ask(llm), asyncio.run(main(**given)):
        print("Paris" in reply.text, reply.provider)
"""
        recorded = claim_cassette("test_outside_openai/test_chat_gives_text_usage_and_reason.yaml")
        done = run(environment, "-c", code, str(recorded))
        assert (done.stdout.split("\n"), done.stderr) == (["True openai-wire"] * 2 + [""], "")

    def test_common_settings_come_from_variables(self, environment: dict[str, str]) -> None:
        done = graftage(
            environment, "chat", "-m", "openai-wire:any", "hello", GRAFTAGE_OPENAI_WIRE_HOST="http://127.0.0.1:9"
        )
        assert done.returncode != 0
        assert "Nothing listens at http://127.0.0.1:9." in done.stderr


@pytest.mark.parametrize("name", SERVERS)
def test_passes_the_suite_as_written(written: Path, environment: dict[str, str], name: str) -> None:
    done = run(
        {**environment, "PYTEST_ADDOPTS": "-q -p no:cacheprovider"}, "-m", "pytest", str(written / f"graftage-{name}")
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
