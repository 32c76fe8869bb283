"""A fake server, and exchanges with it that tests record."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

import graftage
from graftage._engine.driving import drive
from graftage.calls import (
    Call,
)
from graftage.http import Clock, Request
from graftage.http._asynchronous import AsyncNetwork
from graftage.http._blocking import BlockingNetwork
from graftage.testing import Cassette
from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path

    from graftage.http import Response


CALL = Call()
modes = pytest.mark.parametrize("mode", ["sync", "async"])


def run(mode: str, work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine as the client of a mode does."""
    return drive(work) if mode == "sync" else asyncio.run(work)


Exchange = tuple[int, list[bytes]]


NETWORKS: dict[str, Any] = {"sync": BlockingNetwork, "async": AsyncNetwork}
JSON = (("content-type", "application/json"),)


async def pieces_of(response: Response) -> AsyncIterator[bytes]:
    while piece := await response.read():
        yield piece


def exchange(
    mode: str,
    cassette: Cassette,
    url: str,
    method: str = "POST",
    *,
    body: Any = b"",
    headers: dict[str, str] | None = None,
    leave_after: int | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> Exchange:
    """Return the status and the pieces of the body, through a cassette.

    Args:
        body: bytes as they are, anything else as JSON.
        leave_after: how many pieces are read; all by default.
        meanwhile: is called after the first piece.
    """
    given = tuple((name.lower(), value) for name, value in (headers or {}).items())
    if not isinstance(body, bytes):
        body, given = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(), given + JSON
    request = Request(method=method, url=url, headers=given, body=body)

    async def send() -> Exchange:
        transport = cassette.wrap(NETWORKS[mode])
        got: list[bytes] = []
        try:
            response = await transport.send(request, Clock(CALL))
            async for piece in pieces_of(response):
                got.append(piece)
                meanwhile()
                if len(got) == leave_after:
                    break
            await response.close()
        finally:
            await transport.close()
        return response.status, got

    return run(mode, send())  # type: ignore[no-any-return]


def recorded(
    path: Path, fake: FakeOllama, *answers: Answer, mode: str = "sync", query: str = "", **more: Any
) -> Exchange:
    fake.script("/api/chat", *answers)
    with Cassette(path, mode="all", server="Ollama 0.9.3") as cassette:
        return exchange(mode, cassette, f"{fake.url}/api/chat{query}", **more)


ELSEWHERE = "http://localhost:1"
STREAM = Answer([{"n": 1}, {"n": 2, "text": "grüß 🌱"}, b'{"n":', b"3}\n"])


def talk(transport: Cassette, host: str) -> list[str]:
    """Call a tool twice in a conversation with a server without call ids. Return the generated ids."""
    with graftage.connect("ollama", model="m", host=host, transport=transport) as llm:
        first = llm.chat("Hi")
        result = {"role": "tool", "content": "1", "tool_call_id": first.tool_calls[0].id}
        second = llm.chat(["Hi", first, result])
    return [each.tool_calls[0].id for each in (first, second)]
