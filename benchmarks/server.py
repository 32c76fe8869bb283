"""A server on loopback that responds like Ollama and costs little: the bytes of every response are cached.

The name of the model sets the response: `chunks-20` gives all chunks at once, `chunks-20-delay-5` one every 5 ms. The
server prints its port, and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
import socket
import sys
import threading
from typing import Any

from benchmarks.worker import reply_chunks

COUNTS = (1, 5, 20, 100, 200, 1000)
MODELS = (*(f"chunks-{count}" for count in COUNTS), "chunks-100-delay-5", "chunks-500-delay-1")
MODELS += ("chunks-5-delay-5", "chunks-5-delay-1")
"""The models that it lists. It accepts any count and delay."""
DATE = "2026-01-01T00:00:00Z"
DONE = {"done": True, "done_reason": "stop", "total_duration": 4_000_000, "load_duration": 1_000_000} | {
    "prompt_eval_count": 5, "prompt_eval_duration": 1_000_000, "eval_count": 20, "eval_duration": 2_000_000
}  # fmt: skip
DETAILS = {"format": "gguf", "family": "llama", "parameter_size": "134.52M", "quantization_level": "Q4_1"}
CHUNKED = "HTTP/1.1 200 OK\r\ncontent-type: {}\r\ntransfer-encoding: chunked\r\n\r\n"


def _object(content: dict[str, Any]) -> list[bytes]:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return [head.encode() + body]


def _stream(kind: str, lines: list[bytes]) -> list[bytes]:
    """Return a packet for each line. The first begins with the head, and the last one ends the body."""
    packets = [b"%x\r\n%s\r\n" % (len(line), line) for line in lines]
    packets[0] = CHUNKED.format(kind).encode() + packets[0]
    packets[-1] += b"0\r\n\r\n"
    return packets


def _chat(model: str, count: int, *, stream: bool) -> list[bytes]:
    head = {"model": model, "created_at": DATE}
    if not stream:
        return _object({**head, "message": {"role": "assistant", "content": "".join(reply_chunks(count))}, **DONE})
    said = [{"message": {"role": "assistant", "content": word}, "done": False} for word in reply_chunks(count)]
    said.append({"message": {"role": "assistant", "content": ""}, **DONE})
    return _stream("application/x-ndjson", [json.dumps({**head, **each}).encode() + b"\n" for each in said])


def _openai(model: str, count: int, *, stream: bool) -> list[bytes]:
    kind = "chat.completion" + ".chunk" * stream
    head = {"id": "chatcmpl-1", "object": kind, "created": 1_700_000_000, "model": model}

    def choice(text: str, reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {**head, "choices": [{"index": 0, "delta" if stream else "message": message, "finish_reason": reason}]}

    if not stream:
        usage = {"prompt_tokens": 5, "completion_tokens": count, "total_tokens": count + 5}
        return _object({**choice("".join(reply_chunks(count)), "stop"), "usage": usage})
    said = [*(choice(word, None) for word in reply_chunks(count)), choice("", "stop")]
    events = [*map(json.dumps, said), "[DONE]"]
    return _stream("text/event-stream", [f"data: {event}\n\n".encode() for event in events])


@functools.cache
def respond(path: str, model: str, *, stream: bool) -> tuple[list[bytes], float]:
    """Return the packets of a response, and the seconds between them: without a delay it is one packet."""
    match = re.fullmatch(r"chunks-(\d+)(?:-delay-(\d+))?", model.removesuffix(":latest"))
    count, delay = (int(match[1]), int(match[2] or 0) / 1e3) if match else (1, 0.0)
    tags = [
        {"name": each, "model": each, "modified_at": DATE, "size": 1, "digest": f"{at:064}"}
        for at, each in enumerate(MODELS)
    ]
    vectors = [[(row * 768 + column) % 1999 / 1999 - 0.5 for column in range(768)] for row in range(256)]
    plain: dict[str, Any] = {
        "/api/version": {"version": "0.9.3"},
        "/api/ps": {"models": []},
        "/api/tags": {"models": [{**tag, "details": DETAILS} for tag in tags]},
        "/api/show": {"details": DETAILS, "model_info": {}, "capabilities": ["completion"], "modified_at": DATE},
        "/v1/models": {"object": "list", "data": [{"id": each, "object": "model"} for each in MODELS]},
        "/api/embed": {"model": model, "embeddings": vectors, "prompt_eval_count": 256},
    }
    if path in plain:
        return _object(plain[path]), 0.0
    packets = (_openai if path.startswith("/v1/") else _chat)(model, count, stream=stream)
    return packets if delay else [b"".join(packets)], delay


class Connection(asyncio.Protocol):
    """A connection. The client sends its next request only after the response to the last one."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Switch off the delay of small packets."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._loop, self._seen = asyncio.get_running_loop(), b""

    def data_received(self, data: bytes) -> None:
        """Respond once the request is complete."""
        self._seen += data
        head, found, body = self._seen.partition(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        if not found or len(body) < (int(length[1]) if length else 0):
            return
        self._seen = b""
        request = json.loads(body) if body else {}
        path = head.split(None, 2)[1].decode()
        stream = request.get("stream", not path.startswith("/v1/"))
        packets, delay = respond(path, str(request.get("model")), stream=bool(stream))
        if delay:
            self._send_due(packets, 0, delay, self._loop.time() + delay)
        else:
            self._transport.write(packets[0])

    def _send_due(self, packets: list[bytes], at: int, delay: float, due: float) -> None:
        """Send the packets that are due, and schedule the next one."""
        while at < len(packets) and due <= self._loop.time():
            self._transport.write(packets[at])
            at, due = at + 1, due + delay
        if at < len(packets) and not self._transport.is_closing():
            self._loop.call_at(due, self._send_due, packets, at, delay, due)


async def main() -> None:
    """Serve until the standard input ends, which happens if the parent process dies."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)

    def wait() -> None:
        sys.stdin.buffer.read()
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=wait, daemon=True).start()
    await ended.wait()
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
