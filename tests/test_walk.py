"""How far a call walks: our layers between `chat` and the socket, and our calls for each chunk.

Counts, not times. `python tests/test_walk.py` prints the walks.
"""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from counting import MODEL, Count, Pace
from places import M4
from sources import modules, tree

pytestmark = pytest.mark.slow

LAYERS = 12
CALLS_PER_CHUNK = 10
LINES = 55
MOST_LINES = 20
"""Lines that nine of ten functions do not exceed."""
SHORT, LONG = 1, 201
WALKS = [(mode, how) for mode in ("sync", "async") for how in ("plain", "streamed")]
KINDS = [f"{mode} {how}" for mode, how in WALKS]
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
MACHINE = M4 / "mini-16-macos15.json"
FORBIDDEN = (
    *("ollama", "openai", "aiohttp", "requests", "trio", "anyio._backends", "loguru", "vcr", "yaml", "pytest"),
    *("pydantic_settings", "dotenv", "difflib", "tomllib", "packaging"),
    *("graftage._cli", "graftage.testing", "graftage.footprint", "graftage.http.completions"),
    *("graftage_llamacpp", "graftage_openai", "graftage_lora", "graftage_m4"),
)
"""What a plain chat with Ollama must not import if no other plugin is enabled."""


# --- Counting, in a separate process ---------------------------------------------------------------------------------


def _sync(count: Count, url: str, pace: Pace, chunks: int, *, stream: bool) -> None:
    import graftage

    with graftage.connect("ollama", model=MODEL, host=url) as llm:
        # The first call does more, which is not counted.
        llm.chat("Hello")
        pace.script(chunks)
        with count:
            if stream:
                list(llm.chat("Hello", stream=True))
            else:
                llm.chat("Hello")


async def _async(count: Count, url: str, pace: Pace, chunks: int, *, stream: bool) -> None:
    import graftage

    async with graftage.connect_async("ollama", model=MODEL, host=url) as llm:
        await llm.chat("Hello")
        pace.script(chunks)
        with count:
            if stream:
                async for _ in await llm.chat("Hello", stream=True):
                    pass
            else:
                await llm.chat("Hello")


def walk(mode: str, *, stream: bool) -> dict[str, Any]:
    """Return the longest walk from `chat` to the socket, and the calls for each chunk by name."""
    from graftage_ollama.testing import FakeOllama

    count, calls = Count(), []
    with FakeOllama() as fake, Pace(fake) as pace:
        for chunks in (SHORT, LONG, LONG, LONG):
            arguments: Any = (count, fake.url, pace, chunks)
            with count.watching():
                if mode == "sync":
                    _sync(*arguments, stream=stream)
                else:
                    asyncio.run(_async(*arguments, stream=stream))
            calls.append(Counter(count.calls))
    short, *long = calls
    fewest = min(long, key=Counter.total)  # On a busy machine the reader falls behind, and reading is paused.
    more = LONG - SHORT
    # Rounded to halves, since a policy checks the machine now and then.
    halves = {name: round(2 * number / more) / 2 for name, number in (fewest - short).items()}
    return {
        # A plugin's request in its own thread is another call. Of equally long walks, take one that sends.
        "walk": max(
            (each for each in count.walks if each and each[0].startswith("graftage._client.")),
            key=lambda each: (len(each), each[-1].endswith("_send")),
        ),
        "calls": {name: times for name, times in halves.items() if times},
    }


@pytest.fixture(scope="module", params=["no plugin", "lora and m4"])
def walks(request: pytest.FixtureRequest) -> dict[str, Any]:
    environment = dict(os.environ)
    if request.param != "no plugin":
        environment |= {"GRAFTAGE_DISABLED_PLUGINS": "", "GRAFTAGE_M4_MACHINE": str(MACHINE)}
    else:
        environment["GRAFTAGE_DISABLED_PLUGINS"] = "lora,m4"
    command = [sys.executable, __file__, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_few_layers_to_the_socket(walks: dict[str, Any], kind: str) -> None:
    path = walks[kind]["walk"]
    assert path[0].startswith("graftage._client."), path
    assert path[-1].startswith("graftage.http."), path
    assert len(path) <= LAYERS, path


def test_walk_matches_its_description(walks: dict[str, Any]) -> None:
    text = PAGE.read_text(encoding="utf-8").partition("## How a call walks")[2].partition("\n## ")[0]
    described = re.findall(r"^\| `([\w.]+)`", text, re.MULTILINE)
    assert described == [each.partition(":")[2].partition(".<locals>")[0] for each in walks["sync plain"]["walk"]]


@pytest.mark.parametrize("kind", KINDS)
def test_chunk_takes_few_calls(walks: dict[str, Any], kind: str) -> None:
    calls = walks[kind]["calls"]
    assert sum(calls.values()) <= CALLS_PER_CHUNK, calls


def test_chat_imports_what_it_needs() -> None:
    program = f"""
import sys
import graftage
from graftage_ollama.testing import FakeOllama
with FakeOllama() as fake, graftage.connect("ollama", model={MODEL!r}, host=fake.url) as llm:
    llm.chat("Hello")
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert not [name for name in loaded for away in FORBIDDEN if f"{name}.".startswith(f"{away}.")]


# --- Sizes -----------------------------------------------------------------------------------------------------------


def _lengths() -> dict[str, int]:
    """Return the lines of each function in the sources, with decorators and docstring."""
    found = {}
    for module, path in modules().items():
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                where = f"{path}:{node.lineno} {node.name}"
                first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
                found[where] = (node.end_lineno or 0) - first + 1
    return found


def test_no_function_is_long() -> None:
    lengths = _lengths()
    assert not {where: lines for where, lines in lengths.items() if lines > LINES}


def test_most_functions_are_short() -> None:
    lengths = sorted(_lengths().values())
    assert lengths[len(lengths) * 9 // 10] <= MOST_LINES


if __name__ == "__main__":
    measured = {f"{mode} {how}": walk(mode, stream=how == "streamed") for mode, how in WALKS}
    if "--json" in sys.argv:
        print(json.dumps(measured))
    else:
        for name, each in measured.items():
            print(f"{name}: {sum(each['calls'].values())} calls for each chunk", *each["walk"], sep="\n    ")
