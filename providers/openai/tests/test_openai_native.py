"""OpenAI's own client on Graftage's connections."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import openai
import pytest

from graftage.exceptions import CapabilityUnsupported, ConnectionFailed
from graftage_ollama.testing import Answer, FakeOllama

KEY = "opaque-key-1"
HI: Any = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"
REPLY = {"id": "c", "object": "chat.completion", "created": 1, "model": "m"} | {
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hello"}}]
}
EVENT = b'data: {"id": "c", "choices": [{"index": 0, "delta": {"content": "Hello"}, "finish_reason": null}]}\n\n'


def done(both: Any, work: Any) -> Any:
    """Return the result of a call of either client; of a stream, its events."""

    async def wait() -> Any:
        found = await work
        return [each async for each in found] if isinstance(found, openai.AsyncStream) else found

    if inspect.isawaitable(work):
        return both.run(wait())
    return list(work) if isinstance(work, openai.Stream) else work


@pytest.fixture
def official(both: Any, fake: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The client, made beside variables that are not for it."""
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_BASE_URL"):
        monkeypatch.setenv(name, "http://another.test")
    return both.native(both.connect("openai", model="m", host=f"{fake.url}/v1", api_key=KEY))


def test_chats_streams_and_lists(both: Any, official: Any, fake: FakeOllama) -> None:
    stream = Answer([EVENT, b"data: [DONE]\n\n"], headers={"content-type": "text/event-stream"})
    fake.script(CHAT, Answer([REPLY]), stream)
    fake.script("/v1/models", Answer([{"object": "list", "data": [{"id": "m", "object": "model"}]}]))
    create = official.chat.completions.create
    assert done(both, create(model="m", messages=HI)).choices[0].message.content == "Hello"
    assert [each.choices[0].delta.content for each in done(both, create(model="m", messages=HI, stream=True))] == [
        "Hello"
    ]
    assert [each.id for each in done(both, official.models.list()).data] == ["m"]
    assert {seen.headers["authorization"] for seen in fake.requests} == {f"Bearer {KEY}"}
    assert "another.test" not in str(fake.requests)


def test_raises_its_own_errors_once(both: Any, official: Any, fake: FakeOllama) -> None:
    fake.script(CHAT, Answer([{"error": {"message": f"Slow down, {KEY}"}}], status=429), Answer([REPLY]))
    with pytest.raises(openai.RateLimitError, match="Slow down") as caught:
        done(both, official.chat.completions.create(model="m", messages=HI))
    assert KEY not in str(caught.value)
    assert len(fake.requests) == 1
    unreachable = both.native(both.connect("openai", model="m", host="http://127.0.0.1:1/v1"))
    with pytest.raises(openai.APIConnectionError) as refused:
        done(both, unreachable.models.list())
    assert refused.value.__cause__ is not None
    assert isinstance(refused.value.__cause__.__cause__, ConnectionFailed)


def test_missing_package_is_named(both: Any, fake: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    llm = both.connect("openai", model="m", host=f"{fake.url}/v1")
    with pytest.raises(CapabilityUnsupported, match=r"graftage-openai\[native\]"):
        both.native(llm)
