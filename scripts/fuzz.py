"""Feed random bytes to the readers of Graftage: they must raise only its own errors, and lose nothing.

    python scripts/fuzz.py --list
    python scripts/fuzz.py TARGET [FOLDER OF EXAMPLES] [-max_total_time=60] [more options of libFuzzer]

It needs `pip install atheris`, and runs until it finds an error. `tests/test_fuzz.py` runs each target on fewer inputs.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final
from unittest import mock

import graftage
from graftage._engine.inputs import read_messages
from graftage._engine.schemas import read_tools
from graftage.calls import Call
from graftage.exceptions import GraftageError, ProviderError, SettingsError
from graftage.gguf import GgufError
from graftage.gguf import read as read_gguf
from graftage.http import Answer, Headers, Response, is_loopback, proxy_for, read_tool_call
from graftage.http._framing import Framing
from graftage.http.address import read_base
from graftage.http.errors import refused
from graftage_ollama._errors import refusal
from graftage_ollama._settings import parse_host

MAX_MESSAGE: Final = 4000
"""Characters that an error may have, since it goes into logs."""


def split(data: bytes) -> list[bytes]:
    """Split data into pieces, whose lengths depend on the data."""
    pieces, start = [], 0
    while start < len(data):
        length = 1 + data[start] % 37
        pieces.append(data[start : start + length])
        start += length
    return pieces


def text_of(data: bytes) -> str:
    """Return text of any kind, also with lone surrogates."""
    try:
        text = data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return str(data)
    return text if len(data) % 2 else data.decode("utf-8", "replace")


def value_of(data: bytes) -> Any:
    """Return the value if the data is JSON, otherwise a text."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return text_of(data)


# --- A stream --------------------------------------------------------------------------------------------------------


class ScriptedTransport:
    """A transport that is also its only response: pieces of a body."""

    colour = None
    status, reason = 200, "OK"
    headers: Headers = (("content-type", "application/x-ndjson"),)
    pieces: Iterator[bytes] = iter(())

    def wrap(self, _network: object) -> ScriptedTransport:
        """Return the transport."""
        return self

    async def send(self, _request: object, _clock: object) -> Response:
        """Return the response."""
        return self

    async def read(self) -> bytes:
        """Return the next piece."""
        return next(self.pieces, b"")

    async def close(self) -> None:
        """Do nothing."""


TRANSPORT: Final = ScriptedTransport()


@functools.cache
def _client(provider: str, **settings: Any) -> graftage.Client:
    return graftage.connect(provider, host="127.0.0.1:9", model="m", transport=TRANSPORT, attempts=1, **settings)


def _text_in(body: bytes) -> str:
    """Return the text of a whole reply, read in the simplest way."""
    texts = []
    for line in body.split(b"\n"):
        if line.strip():
            part = json.loads(line.decode("utf-8", "replace"))
            texts.append((part.get("message") or {}).get("content") or "")
            if part.get("done"):
                break
    return "".join(texts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def lines(data: bytes) -> None:
    """A stream of lines in pieces of any size gives all of its text, or an error with the part that arrived."""
    TRANSPORT.pieces = iter(split(data))
    seen: list[str] = []
    try:
        with _client("ollama").chat("x", stream=True) as stream:
            seen.extend(chunk.text for chunk in stream)
        whole = _text_in(data)
        assert stream.reply.text == whole
    except GraftageError as error:
        whole = error.partial.text if error.partial else ""
    assert "".join(seen) == whole


def events(data: bytes) -> None:
    """A stream of events gives the same reply or error, in whichever pieces it arrives."""
    found = _read_events([data])
    assert found == _read_events(split(data))
    assert found[0] is not ProviderError


def _read_events(pieces: list[bytes]) -> tuple[Any, ...]:
    TRANSPORT.pieces = iter(pieces)
    try:
        reply = _client("openai", profile="mlx").chat("x", tools=[{"name": "f"}])
    except GraftageError as error:
        return type(error), error.partial and error.partial.text
    return reply.text, reply.thinking, reply.finish_reason, [(each.name, each.arguments) for each in reply.tool_calls]


def framing(data: bytes) -> None:
    """The framing of a response does not depend on the pieces in which it arrives."""
    assert _read_framing([data]) == _read_framing(split(data))


def _read_framing(pieces: list[bytes]) -> tuple[Any, ...]:
    answer = Framing()
    for piece in pieces:
        try:
            answer.feed(piece)
        except Exception as error:  # noqa: BLE001 - as its callers do
            answer.failed(error)
            break
    answer.end()
    found = answer.head, answer.status if answer.head else 0, answer.headers if answer.head else []
    return *found, b"".join(answer.pieces), answer.complete


# --- Errors ----------------------------------------------------------------------------------------------------------


def errors(data: bytes) -> None:
    """The body of a refusal gives a typed error with a hint and a short text."""
    for status in (200, 400, 404, 429, 500, 503, 530):
        for operation in ("chat", "pull_model"):
            call = Call(operation=operation, model="m")
            error = refused(Answer(status=status, headers=(), body=data, call=call, server="Ollama"), refusal)
            assert isinstance(error, ProviderError)
            assert error.hint
            assert len(str(error)) < MAX_MESSAGE
            json.dumps(error.to_dict())


def retry_after(data: bytes) -> None:
    """A header that says when to retry gives finite seconds, or None."""
    text = data.decode("latin-1")
    for name in ("retry-after", "retry-after-ms", "x-ratelimit-reset"):
        found = Answer(status=429, headers=((name, text),), body=b"", call=Call()).retry_after
        assert found is None or 0 <= found < float("inf")


# --- Settings and arguments ------------------------------------------------------------------------------------------


def host(data: bytes) -> None:
    """The address of a server gives a stable URL, or a `SettingsError`."""
    with contextlib.suppress(SettingsError):
        found = parse_host(text_of(data))
        base, _ = read_base(found)
        assert read_base(base) == (base, {})


def no_proxy(data: bytes) -> None:
    """No value of the proxy variables sends a request to this machine through a proxy, or raises."""
    words = data.decode("latin-1").replace("\0", "")
    given = {"NO_PROXY": words, "HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": words}
    with mock.patch.dict(os.environ, given, clear=True):
        for name in ("127.0.0.1", "localhost", "[::1]", "models.example", "10.0.0.1", "[2001:db8::7]"):
            for scheme in ("http", "https"):
                found = proxy_for(f"{scheme}://{name}:8000/x")
                assert found is None or not is_loopback(name)


def arguments(data: bytes) -> None:
    """The arguments of a tool call give a dict, or an error."""
    for value in (text_of(data), value_of(data)):
        with contextlib.suppress(GraftageError):
            assert isinstance(dict(read_tool_call("f", value, "id").arguments), dict)


def messages(data: bytes) -> None:
    """Messages can be sent, or give an error."""
    value = value_of(data)
    for each in (value, [value], [{"role": "user", "content": value}], [{"role": "assistant", "tool_calls": value}]):
        with contextlib.suppress(GraftageError):
            for message in read_messages(each):
                message.content.encode()


def tools(data: bytes) -> None:
    """Tools can be sent, or give an error."""
    value = value_of(data)
    for each in ([value], [{"type": "function", "function": value}], [{"name": "f", "parameters": value}]):
        with contextlib.suppress(GraftageError):
            json.dumps([tool.parameters for tool in read_tools(each)])


def gguf(data: bytes) -> None:
    """The head of a GGUF file is read, or gives a `GgufError`."""
    with contextlib.suppress(GgufError):
        read_gguf(io.BytesIO(data), len(data))


_LINE = b'{"model":"m","message":{"role":"assistant","content":"a\xc2\x85b\\u00e9"},"done":false}\n'
_LAST = b'{"message":{"content":"c"},"done":true,"done_reason":"stop","eval_count":2}\n'
_HEAD = b'data: {"model":"m","choices":[{"index":0,"delta":'
_TEXT = _HEAD + b'{"content":"<think>a</think>b\\u00e9","reasoning":""},"finish_reason":null}]}\n\n'
_CALL = _HEAD + b'{"tool_calls":[{"index":0,"function":{"name":"f","arguments":"{}"}}]},"finish_reason":null}]}\n\n'
_STOP = _HEAD + b'{},"finish_reason":"stop"}],"usage":{"prompt_tokens":1}}\n\ndata: [DONE]\n\n'
_KEY = b"\x14\0\0\0\0\0\0\0general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama"
TARGETS: Final[dict[str, tuple[Callable[[bytes], None], tuple[bytes, ...]]]] = {
    "lines": (lines, (_LINE * 3 + _LAST, _LINE + b"\r\n \n" + _LAST + _LINE, b'{"error":"busy"}\n')),
    "events": (
        events,
        (
            b": ping\n\n" + _TEXT * 3 + _STOP,
            b"id: 1\r\n" + _TEXT + _CALL + _STOP,
            _TEXT + b'event: error\ndata: {"message":"busy"}\n\n',
        ),
    ),
    "framing": (
        framing,
        (
            b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
            (
                b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
                b"5;a=b\r\nhello\r\n0\r\nx: y\r\n\r\n"
            ),
            b"HTTP/1.0 404 Not Found\r\nx-a: b\r\n\r\nnothing",
        ),
    ),
    "errors": (
        errors,
        (
            b'{"error":"server busy, please try again"}',
            b'{"error":"{\\"error\\":{\\"code\\":400,\\"message\\":\\"x\\",\\"n_ctx\\":16}}"}',
            b'{"StatusCode":502,"Status":"x","error":"pull model manifest: file does not exist"}',
            b'[{"detail":["x"]}]',
        ),
    ),
    "retry_after": (retry_after, (b"7", b"1.5e3", b"Wed, 21 Oct 2015 07:28:00 GMT", b"-1", b"nan", b"6m0s")),
    "host": (host, (b"http://127.0.0.1:11434/a/../b", b"[::1]:80", b"user:p@h?x=1#f", b"HTTPS://Example.COM.")),
    "no_proxy": (no_proxy, (b"127.0.0.0/8, *.example,models.example:8000,[::1],*", b"10.0.0.0/33", b"http://[")),
    "arguments": (arguments, (b'{"a":[1,null,"\\ud800"]}', b"null", b'""', b'"{\\"a\\":1}"', b"[1]", b'{"a":NaN}')),
    "messages": (
        messages,
        (
            b'{"role":"user","content":[{"type":"text","text":"x"},{"type":"image_url","image_url":{"url":"data:x"}}]}',
            b'[{"id":"1","type":"function","function":{"name":"f","arguments":"{}"}}]',
            b'{"role":"tool","content":"x","tool_call_id":"1","images":["iVBORw0K"]}',
        ),
    ),
    "tools": (
        tools,
        (
            b'{"name":"f","description":"x","parameters":{"type":"object","properties":{"a":{"type":"string"}}}}',
            b'{"name":"f","inputSchema":{"type":"object","$ref":"#/a"}}',
            b'{"type":"object","properties":[],"required":7}',
        ),
    ),
    "gguf": (gguf, (b"GGUF\x03\0\0\0" + bytes(8) + b"\x01" + bytes(7) + _KEY + bytes(64), b"GGUF\0\0\0\x03")),
}
"""For each name a target, and examples to begin with."""


def main(words: list[str]) -> int:
    """Run one target under atheris."""
    if words[:1] == ["--list"] or not words or words[0] not in TARGETS:
        print(*(f"{name:12} {target.__doc__}" for name, (target, _) in TARGETS.items()), sep="\n")
        return 0 if words[:1] == ["--list"] else 2
    try:
        import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError:
        print("This needs atheris: `pip install atheris`.", file=sys.stderr)
        return 2
    target, examples = TARGETS[words[0]]
    for each in examples:
        target(each)
    atheris.instrument_all()
    atheris.Setup([sys.argv[0], *words[1:]], target)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
