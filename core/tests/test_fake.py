"""The fake server."""

from __future__ import annotations

import gc
import json
import threading
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from collections.abc import Iterator


def lines(response: httpx.Response) -> list[Any]:
    return [json.loads(line) for line in response.text.splitlines()]


@pytest.fixture
def client(fake: FakeOllama) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fake.url) as client:
        yield client


class TestFakeOllama:
    def test_responds_like_ollama(self, client: httpx.Client) -> None:
        assert client.get("/").text == "Ollama is running"
        assert client.head("/").status_code == 200
        assert client.get("/api/version").json() == {"version": "0.9.3"}
        assert [model["name"] for model in client.get("/api/tags").json()["models"]] == ["smollm2:135m"]
        assert client.post("/api/show", json={"model": "smollm2:135m"}).json()["capabilities"][0] == "completion"
        missing = client.post("/api/show", json={"model": "nosuch"})
        assert (missing.status_code, missing.json()) == (404, {"error": "model 'nosuch' not found"})
        assert client.post("/api/show", content="{").json() == {"error": "unexpected EOF"}
        assert client.get("/api/chat").status_code == 405
        assert client.get("/api/nothing").text == "404 page not found"

    @pytest.mark.parametrize(
        ("path", "given", "text"),
        [
            ("/api/chat", {"messages": [{"role": "user", "content": "Hi"}]}, lambda line: line["message"]["content"]),
            ("/api/generate", {"prompt": "Hi"}, lambda line: line["response"]),
        ],
    )
    def test_infers_loads_and_unloads(self, client: httpx.Client, path: str, given: dict[str, Any], text: Any) -> None:
        model = {"model": "smollm2:135m"}
        streamed = lines(client.post(path, json={**model, **given}))
        assert "".join(map(text, streamed)) == "Hello from the fake."
        assert [line["done"] for line in streamed] == [False] * 4 + [True]
        assert streamed[-1]["done_reason"] == "stop"
        short = client.post(path, json={**model, **given, "stream": False, "options": {"num_predict": 2}}).json()
        assert (text(short), short["done_reason"], short["eval_count"]) == ("Hello from ", "length", 2)
        assert [each["name"] for each in client.get("/api/ps").json()["models"]] == ["smollm2:135m"]
        (unloaded,) = lines(client.post(path, json={**model, "keep_alive": 0}))
        assert unloaded["done_reason"] == "unload"
        assert client.get("/api/ps").json() == {"models": []}
        (loaded,) = lines(client.post(path, json=model))
        assert loaded["done_reason"] == "load"
        assert client.post(path, json={"model": "nosuch", **given}).status_code == 404

    def test_embeds_and_pulls(self, client: httpx.Client) -> None:
        answer = client.post("/api/embed", json={"model": "smollm2:135m", "input": ["a", "bb"]}).json()
        assert len(answer["embeddings"]) == 2
        assert client.post("/api/embed", json={"model": "new", "input": "a"}).status_code == 404
        assert lines(client.post("/api/pull", json={"model": "new"}))[-1] == {"status": "success"}
        assert client.post("/api/embed", json={"model": "new", "input": "a"}).status_code == 200

    def test_serves_the_official_client(self, fake: FakeOllama) -> None:
        import ollama

        client = ollama.Client(fake.url)
        with client._client:
            parts = [
                part.message.content
                for part in client.chat("smollm2:135m", [{"role": "user", "content": "Hi"}], stream=True)
            ]
            assert "".join(map(str, parts)) == "Hello from the fake."
            assert client.list().models[0].model == "smollm2:135m"
            assert client.show("smollm2:135m").details is not None
            assert client.embed("smollm2:135m", "a").embeddings
            assert client.ps().models[0].name == "smollm2:135m"
            assert [step.status for step in client.pull("new", stream=True)][-1] == "success"

    def test_script_comes_before_usual_responses(self, client: httpx.Client, fake: FakeOllama) -> None:
        fake.script("/api/version", Answer([{"error": "busy"}], status=503, headers={"retry-after": "2"}))
        first, second = client.get("/api/version?x=1"), client.get("/api/version")
        assert (first.status_code, first.headers["retry-after"], first.json()) == (503, "2", {"error": "busy"})
        assert second.status_code == 200

    def test_requests_are_parsed(self, client: httpx.Client, fake: FakeOllama) -> None:
        client.post("/api/chat", json={"a": 1})
        client.post("/api/blobs/x", content=(part for part in (b"\xff", b"bytes")))
        assert [(seen.method, seen.path, seen.body) for seen in fake.requests] == [
            ("POST", "/api/chat", {"a": 1}),
            ("POST", "/api/blobs/x", b"\xffbytes"),
        ]
        assert fake.requests[0].headers["content-type"] == "application/json"

    def test_connection_is_kept_alive(self, client: httpx.Client, fake: FakeOllama) -> None:
        for _ in range(3):
            client.get("/api/version")
        assert fake.open_connections == 1
        client.get("/api/version", headers={"connection": "close"})
        assert client.get("/api/version").status_code == 200

    @pytest.mark.parametrize("framing", ["chunked", "length", "none"])
    def test_every_framing_carries_the_body(self, client: httpx.Client, fake: FakeOllama, framing: Any) -> None:
        fake.script("/x", Answer([{"a": 1}, b"tail"], framing=framing))
        assert [client.get("/x").content, client.get("/api/version").status_code] == [b'{"a":1}\ntail', 200]

    @pytest.mark.parametrize(
        ("answer", "error"),
        [
            (Answer(raw=b"", ending="reset"), httpx.ReadError),
            (Answer(raw=b"", ending="close"), httpx.RemoteProtocolError),
            (Answer(raw=b"", ending="stall"), httpx.ReadTimeout),
            (Answer(raw=b"garbage\r\n\r\n"), httpx.RemoteProtocolError),
            (Answer(raw=b"HTTP/1.1 200 OK\r\ncontent-"), httpx.RemoteProtocolError),
            (Answer([{"n": 1}], ending="close"), httpx.RemoteProtocolError),
            (Answer([{"n": 1}], ending="stall"), httpx.ReadTimeout),
            (Answer([{"n": 1}], ending="reset"), httpx.ReadError),
            (
                Answer([b"12345"], framing="length", headers={"Content-Length": "9"}, ending="close"),
                httpx.RemoteProtocolError,
            ),
            (Answer([b"no gzip at all"], headers={"content-encoding": "gzip"}), httpx.DecodingError),
        ],
    )
    def test_faults_reach_the_client(self, fake: FakeOllama, answer: Answer, error: type[Exception]) -> None:
        fake.script("/api/chat", answer)
        patience = 0.2 if answer.ending == "stall" else 10
        with httpx.Client(base_url=fake.url, timeout=patience) as client, pytest.raises(error):
            client.post("/api/chat", json={})

    def test_event_holds_a_stream(self, client: httpx.Client, fake: FakeOllama) -> None:
        gate = threading.Event()
        fake.script("/x", Answer([b"a", gate, b"b"], delay=0.001))
        with client.stream("GET", "/x") as response:
            pieces = response.iter_raw()
            assert next(pieces) == b"a"
            gate.set()
            assert list(pieces) == [b"b"]

    def test_stop_leaves_nothing(self) -> None:
        with FakeOllama() as fake:
            fake.script("/stall", Answer([b"x"], ending="stall"))
            fake.script("/held", Answer([b"x", threading.Event()]))
            client = httpx.Client(base_url=fake.url)
            streams = [client.send(client.build_request("GET", path), stream=True) for path in ("/stall", "/held", "/")]
            assert fake.open_connections == 3
        for stream in streams:
            stream.close()
        client.close()
        gc.collect()
        assert fake.open_connections == 0
        assert [thread for thread in threading.enumerate() if thread.name == "FakeOllama"] == []

    def test_notices_a_leaving_client(self) -> None:
        with FakeOllama() as fake:
            fake.script("/stall", Answer([b"x"], ending="stall"))
            with httpx.Client(base_url=fake.url) as client, client.stream("GET", "/stall"):
                (thread,) = fake._connections.values()
            thread.join(10)
            assert fake.open_connections == 0
