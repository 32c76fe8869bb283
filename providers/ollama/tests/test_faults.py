"""What a network, a proxy or a faulty server can do to a response, and the typed error for each fault.

Each fault is a few bytes on a real socket. Each ends in time, in an error of Graftage, with the text so far in
`.partial`. A fault that is safe to repeat is fixed by the next attempt; after the first chunk, nothing is repeated.

A scenario is one behaviour of a server and a row of a table: its name, what the server does, and the result. Each row
of `ALL` runs in every mode: chat and generate, plain and as a stream, with both clients, and as an embedding if that
means the same. `check_scenario` checks what must be true of all of them.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
import subprocess
import sys
import threading
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from itertools import accumulate, groupby, pairwise, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from giving import Giving
from patience import soon

from graftage.calls import MAX_OBJECTS
from graftage.exceptions import (
    AuthenticationFailed,
    CapabilityUnsupported,
    ConnectionFailed,
    ContextOverflow,
    GraftageError,
    InferenceFailed,
    ModelLoadFailed,
    ModelNotFound,
    Overloaded,
    ProtocolError,
    ProviderError,
    ProviderTimeout,
    QuotaExceeded,
    RequestRejected,
    StreamInterrupted,
)
from graftage.hookspecs import hookimpl
from graftage.types import Chunk, Timeouts, Usage
from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

MODEL = "smollm2:135m"
PATIENCE = 20.0
SHORT = Timeouts(connect=5.0, first_token=0.3, idle=0.3, total=1.0)
"""For faults that end only by a timeout."""
SHORTER = Timeouts(connect=5.0, first_token=0.2, idle=0.2, total=0.4)
CALM = Timeouts(connect=10.0, first_token=10.0, idle=10.0, total=15.0)
"""For all other faults: a busy machine must not make them time out."""


def line(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "message": {"role": "assistant", "content": text}, "done": False, **fields}


def raw_text(text: str) -> bytes:
    """A line with the text unescaped, as far as JSON allows."""
    return json.dumps(line(text), ensure_ascii=False).encode() + b"\n"


def read(stream: Any) -> Any:
    """Read a stream to its end, and return its reply."""
    with stream as chunks:
        for _ in chunks:
            pass
        return chunks.reply


BREAKS = "a\x7f\x85b\u2028c\u2029d"
"""Characters that some readers treat as the end of a line."""
FIRST = line("Hello ")
SECOND = line("world")
LAST = line("", done=True, done_reason="stop", eval_count=2, prompt_eval_count=5)
WHOLE = [FIRST, SECOND, LAST]
BODY = b"".join(json.dumps(each).encode() + b"\n" for each in WHOLE)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
BARE = HEAD + b"connection: close\r\n\r\n"
STATUS, FIELDS = HEAD.split(b"\r\n", 1)
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HINTS = b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%s\r\n%s\r\n" % (len(data), extension, data)


def measured(body: bytes) -> bytes:
    """A complete response with its length."""
    return HEAD + b"content-length: %d\r\n\r\n%s" % (len(body), body)


def bytewise(data: bytes) -> list[bytes]:
    return [bytes([each]) for each in data]


def error(words: Any, status: int = 500, **headers: str) -> Answer:
    return Answer([json.dumps({"error": words}).encode()], status=status, framing="length", headers=headers)


def plain(text: str, status: int, kind: str = "text/plain") -> Answer:
    return Answer([text.encode()], status=status, framing="length", headers={"content-type": kind})


def redirect(status: int, to: str) -> Answer:
    return Answer([], status=status, framing="length", headers={"location": to})


@dataclass(frozen=True)
class Fault:
    """A server's answer, and the result of a chat: the whole text, or an error with the text so far."""

    name: str
    answer: Answer
    _: KW_ONLY
    kind: type[ProviderError] | None = None
    partial: str | None = None
    """The text so far; None if no chunk had come."""
    text: str = "Hello world"
    """The text of the reply if no error is expected."""
    finish: str = "stop"
    """The finish reason of that reply."""
    again: bool = False
    """Whether a retry is safe."""
    facts: tuple[tuple[str, Any], ...] = ()
    timeouts: Timeouts = CALM
    embeds: bool = True
    """Whether embeddings fail in the same way; never if the answer has text of a chat."""


GOOD = [
    Fault("ok", Answer(WHOLE)),
    Fault("ok_split_lines", Answer([BODY[start : start + 7] for start in range(0, len(BODY), 7)])),
    Fault("ok_coalesced", Answer([BODY])),
    Fault("done_no_newline", Answer([FIRST, SECOND, json.dumps(LAST).encode()])),
    Fault("data_after_done", Answer([*WHOLE, line("never"), b"\xff{"])),
    Fault("reset_after_done", Answer(WHOLE, ending="reset")),
    Fault("stall_after_done", Answer(WHOLE, ending="stall")),
    Fault("blank_line", Answer([b"\n", FIRST, b"\r\n \n", SECOND, LAST])),
    Fault("split_utf8", Answer([*bytewise(raw_text("é€😀")), LAST]), text="é€😀"),
    Fault("u2028_in_content", Answer([raw_text(BREAKS), LAST]), text=BREAKS),
    Fault("crlf_lines", Answer([BODY.replace(b"\n", b"\r\n")])),
    Fault("lone_surrogate_escape", Answer([json.dumps(line("a\ud83dz")).encode() + b"\n", LAST]), text="a\ufffdz"),
    Fault("length_and_chunked", Answer(WHOLE, headers={"content-length": "7"})),
    Fault("no_framing_close", Answer(WHOLE, framing="none")),
    Fault("continue_100", Answer([BODY], raw=b"HTTP/1.1 100 Continue\r\n\r\n" + BARE)),
    Fault("trailers", Answer([chunk(BODY), b"0\r\nx-sum: 1\r\n\r\n"], raw=CHUNKED, ending="keep")),
    Fault(
        "duplicate_line", Answer([FIRST, FIRST, LAST]), text="Hello Hello "
    ),  # Lines have no numbers, so this cannot be detected.
    Fault("fin_no_last_chunk_after_done", Answer(WHOLE, ending="close")),
    *[
        Fault(name, Answer(raw=raw, ending="close"))
        for name, raw in {
            "http10": b"HTTP/1.0 200 OK\r\n\r\n" + BODY,
            "no_reason_phrase": b"HTTP/1.1 200\r\n" + FIELDS + b"\r\n" + BODY,
            "bare_line_feeds": BARE.replace(b"\r", b"") + BODY,
            "header_not_ascii": HEAD + "x-a: é\r\n\r\n".encode() + BODY,
            "header_of_8000_bytes": HEAD + b"x-a: " + b"y" * 8000 + b"\r\n\r\n" + BODY,
            "headers_90": HEAD + b"".join(b"x-%d: y\r\n" % each for each in range(90)) + b"\r\n" + BODY,
        }.items()
    ],
]
BROKEN = [
    Fault("rst_before_headers", Answer(raw=b"", ending="reset"), kind=ConnectionFailed, again=True),
    Fault("fin_before_headers", Answer(raw=b"", ending="close"), kind=ConnectionFailed, again=True),
    Fault("fin_mid_headers", Answer(raw=HEAD, ending="close"), kind=ConnectionFailed, again=True),
    Fault("garbage_status_line", Answer(raw=b"SSH-2.0-OpenSSH_9.6\r\n\r\n", ending="close"), kind=ProtocolError),
    Fault("rst_mid_stream", Answer([FIRST], ending="reset"), kind=StreamInterrupted, partial="Hello "),
    Fault(
        "fin_mid_chunk",
        Answer([b"ff\r\n" + raw_text("Hello ")], raw=CHUNKED, ending="close"),
        partial="Hello ",
        kind=StreamInterrupted,
    ),
    Fault("fin_no_last_chunk", Answer([FIRST], ending="close"), kind=StreamInterrupted, partial="Hello "),
    Fault("clean_no_done", Answer([FIRST, SECOND]), kind=StreamInterrupted, partial="Hello world"),
    Fault("clean_no_done_half_line", Answer([FIRST, b'{"mess']), kind=StreamInterrupted, partial="Hello "),
    Fault("half_line_only", Answer([b'{"mess']), kind=StreamInterrupted, again=True),
    Fault("clean_empty", Answer([]), kind=StreamInterrupted, again=True),
    Fault("empty_200", Answer([], framing="length"), kind=StreamInterrupted, again=True),
    Fault(
        "status_204",
        Answer(raw=b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n"),
        kind=StreamInterrupted,
        again=True,
    ),
    Fault(
        "length_too_long",
        Answer([FIRST], framing="length", headers={"content-length": "9999"}, ending="close"),
        kind=StreamInterrupted,
        partial="Hello ",
    ),
    Fault(
        "length_too_short",
        Answer([FIRST, SECOND], framing="length", headers={"content-length": "100"}),
        kind=StreamInterrupted,
        partial="Hello ",
    ),
    Fault(
        "http10_close_half",
        Answer([FIRST], raw=b"HTTP/1.0 200 OK\r\n\r\n", ending="close"),
        kind=StreamInterrupted,
        partial="Hello ",
    ),
    Fault(
        "bad_chunk_size",
        Answer([chunk(raw_text("Hello ")), b"zz\r\n"], raw=CHUNKED, ending="close"),
        kind=StreamInterrupted,
        partial="Hello ",
    ),
    Fault("nonstream_done_false", Answer([FIRST], framing="length"), kind=StreamInterrupted, partial="Hello "),
    Fault(
        "no_framing_reset", Answer([FIRST], framing="none", ending="reset"), kind=StreamInterrupted, partial="Hello "
    ),
    *[
        Fault(
            f"chunk_size_{name}",
            Answer([chunk(raw_text("Hello ")), size + b"\r\n" + BODY], raw=CHUNKED, ending="close"),
            kind=StreamInterrupted,
            partial="Hello ",
        )
        for name, size in {
            "negative": b"-5",
            "with_plus": b"+5",
            "with_prefix": b"0x5",
            "with_underscore": b"5_0",
            "list": b"5 5",
            "empty": b"",
            "of_100_digits": b"f" * 100,
            "2_to_70": b"%x" % 2**70,
        }.items()
    ],
    Fault(
        "chunk_longer_than_its_size",
        Answer([chunk(raw_text("Hello ")), b"1\r\n\n" + BODY], raw=CHUNKED, ending="close"),
        kind=StreamInterrupted,
        partial="Hello ",
    ),
]
NONSENSE = [
    Fault("invalid_json_line", Answer([FIRST, b"{nonsense}\n"]), kind=ProtocolError, partial="Hello "),
    Fault("json_array_line", Answer([b"[]\n"]), kind=ProtocolError),
    Fault("json_null_line", Answer([FIRST, b"null\n"]), kind=ProtocolError, partial="Hello "),
    Fault("json_string_line", Answer([b'"text"\n']), kind=ProtocolError),
    Fault("missing_message", Answer([{"model": MODEL}]), kind=ProtocolError),
    Fault(
        "wrong_type",
        Answer([FIRST, {"message": {"role": "assistant", "content": 7}}]),
        kind=ProtocolError,
        partial="Hello ",
    ),
    Fault(
        "non_utf8",
        Answer([b'{"message":{"role":"assistant","content":"\xff\xfe"},"done":false}\n']),
        kind=ProtocolError,
    ),
    Fault("sse_instead", Answer([b"data: " + raw_text("Hello")]), kind=ProtocolError),
    Fault("deep_json", Answer([b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"\n"]), kind=ProtocolError),
    Fault("nan_json", Answer([b'{"message":{"role":"assistant","content":NaN},"done":false}\n']), kind=ProtocolError),
    Fault("huge_int_json", Answer([b'{"eval_count":' + b"9" * 5000 + b',"done":false}\n']), kind=ProtocolError),
    Fault(
        "huge_line_50MB",
        Answer([FIRST, b'{"x":"', *([b"y" * 2**20] * 50)], ending="close"),
        kind=ProtocolError,
        partial="Hello ",
    ),
    Fault("gzip_ok", Answer([gzip.compress(BODY)], headers={"content-encoding": "gzip"}), kind=ProtocolError),
    Fault(
        "gzip_truncated", Answer([gzip.compress(BODY)[:20]], headers={"content-encoding": "gzip"}), kind=ProtocolError
    ),
    Fault("gzip_header_plain_body", Answer(WHOLE, headers={"content-encoding": "gzip"}), kind=ProtocolError),
    Fault(
        "gzip_bomb_100MB",
        Answer([gzip.compress(bytes(100 * 2**20))], headers={"content-encoding": "gzip"}),
        kind=ProtocolError,
    ),
    Fault("header_flood", Answer(raw=HEAD + b"x-a: 1\r\n" * 20_000, ending="close"), kind=ProtocolError),
    Fault("header_one_huge", Answer(raw=HEAD + b"x-a: " + b"y" * 200_000, ending="close"), kind=ProtocolError),
    Fault(
        "headers_2000",
        Answer(raw=HEAD + b"".join(b"x-%d: %s\r\n" % (each, b"y" * 100) for each in range(2000)), ending="close"),
        kind=ProtocolError,
    ),
    *[
        Fault(name, Answer(raw=raw + BODY, ending="close"), kind=ProtocolError)
        for name, raw in {
            "length_not_a_number": HEAD + b"content-length: many\r\n\r\n",
            "length_negative": HEAD + b"content-length: -5\r\n\r\n",
            "length_with_plus": HEAD + b"content-length: +5\r\n\r\n",
            "length_with_underscore": HEAD + b"content-length: 5_0\r\n\r\n",
            "length_twice_different": HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n",
            "length_list": HEAD + b"content-length: 5, 6\r\n\r\n",
            "transfer_encoding_unknown": HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n",
            "header_without_colon": HEAD + b"nonsense\r\ntransfer-encoding: chunked\r\n\r\n",
            "header_with_space_before_colon": HEAD + b"transfer-encoding : chunked\r\n\r\n",
            "header_folded": HEAD + b"x-a: b\r\n c\r\n\r\n",
            "header_with_null": HEAD + b"x-a: b\0c\r\n\r\n",
            "status_not_a_number": b"HTTP/1.1 abc OK\r\n\r\n",
            "status_of_two_digits": b"HTTP/1.1 20 OK\r\n\r\n",
            "switching_101": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        }.items()
    ],
    Fault("html_200", plain("<html>Sign in to the network</html>", 200, "text/html"), kind=ProtocolError),
    Fault("html_200_without_type", Answer([b"<html>\n<body>Sign in</body>\n</html>\n"]), kind=ProtocolError),
    Fault("status_304", Answer(raw=b"HTTP/1.1 304 Not Modified\r\n\r\n"), kind=ProtocolError),
    Fault("redirect_loop", redirect(302, "/api/chat"), kind=ProtocolError),
    Fault("redirect_301_post", redirect(301, "/api/tags"), kind=ProtocolError),
    Fault("redirect_307_other_origin", redirect(307, "http://127.0.0.1:9/api/chat"), kind=ProtocolError),
    Fault("redirect_file", redirect(302, "file:///etc/hosts"), kind=ProtocolError),
    Fault("redirect_303_get", redirect(303, "/api/version"), kind=ProtocolError),
]


def slow(name: str, answer: Answer, phase: str, partial: str | None = None, *, embeds: bool = True) -> Fault:
    """A fault that ends only by one timeout; the others are longer than the test waits."""
    far = dict.fromkeys(("connect", "first_token", "idle", "total"), 200.0)
    limits = {**far, phase: 1.0 if phase == "total" else 0.3}
    facts = (("phase", phase),)
    timeouts = Timeouts(**limits)
    return Fault(name, answer, kind=ProviderTimeout, partial=partial, facts=facts, timeouts=timeouts, embeds=embeds)


def drip(name: str, raw: bytes, piece: bytes, phase: str = "idle") -> Fault:
    """A fault that repeats a piece after a beginning."""
    partial = None if phase == "first_token" else "Hello "
    return slow(f"drip_of_{name}", Answer(repeat(piece), raw=raw, delay=0.05), phase, partial)


HELLO = raw_text("Hello ")
SLOW = [
    slow("slow_loris_headers", Answer(repeat(b"x-a: 1\r\n"), raw=HEAD, delay=0.05), "first_token"),
    slow("drip_stream", Answer(repeat(b" "), delay=0.05), "first_token", embeds=False),
    slow("drip_after_a_line", Answer([FIRST, *[b" "] * 400], delay=0.05), "idle", "Hello "),
    slow("endless_stream", Answer([FIRST, *[line("")] * 400], delay=0.05), "total", "Hello "),
    slow("hang_after_accept", Answer(raw=b"", ending="stall"), "first_token"),
    slow("hang_after_headers", Answer([], ending="stall"), "first_token"),
    slow("hang_mid_stream", Answer([FIRST], ending="stall"), "idle", "Hello "),
    slow("hang_after_accept_until_total", Answer(raw=b"", ending="stall"), "total"),
    slow("hang_mid_stream_until_total", Answer([FIRST], ending="stall"), "total", "Hello "),
    slow("continue_100_flood", Answer(repeat(CONTINUE), raw=b"", delay=0.05), "first_token"),
    slow(
        "drip_of_lines",
        Answer(bytewise(raw_text("") * 20), raw=BARE + HELLO, delay=0.005, ending="stall"),
        "total",
        "Hello ",
    ),
    drip("a_status_line", b"HTTP/1.1 200 ", b"K", "first_token"),
    drip("a_header", HEAD + b"x-a: ", b"y", "first_token"),
    drip("hints", b"", HINTS, "first_token"),
    drip("a_first_chunk_size", CHUNKED, b"0", "first_token"),
    slow("drip_of_a_first_line", Answer(repeat(b"y"), raw=BARE, delay=0.05), "first_token", embeds=False),
    drip("a_chunk_size", CHUNKED + chunk(HELLO), b"0"),
    drip("a_chunk_extension", CHUNKED + chunk(HELLO) + b"5;", b"x"),
    drip("a_trailer", CHUNKED + chunk(HELLO) + b"0\r\n", b"x"),
    drip("trailers", CHUNKED + chunk(HELLO) + b"0\r\n", b"x: y\r\n"),
    drip("a_chunk", CHUNKED + b"ffff\r\n" + HELLO, b"y"),
    drip("a_body", BARE + HELLO, b"y"),
    drip("a_measured_body", measured(HELLO).replace(b"length: ", b"length: 9"), b"y"),
]
REFUSED = [
    Fault(
        "html_502",
        plain("<html>Bad gateway</html>", 502, "text/html"),
        kind=ConnectionFailed,
        again=True,
        facts=(("status", 502),),
    ),
    Fault("plain_404", plain("404 page not found", 404), kind=ProtocolError, facts=(("status", 404),)),
    Fault("plain_405", plain("405 method not allowed", 405), kind=ProtocolError),
    Fault("empty_403", plain("", 403), kind=AuthenticationFailed, facts=(("status", 403),)),
    Fault("json_404", error("model 'x' not found", 404), kind=ModelNotFound),
    Fault("json_400_string", Answer([b'"bad"'], status=400, framing="length"), kind=ProtocolError),
    Fault("json_400_list", Answer([b'["bad"]'], status=400, framing="length"), kind=ProtocolError),
    Fault("json_400_error_object", error({"code": 400, "message": "bad field"}, 400), kind=RequestRejected),
    Fault("json_400", error("something is wrong with it", 400), kind=RequestRejected),
    Fault("json_401", error("unauthorized", 401), kind=AuthenticationFailed),
    Fault("status_408", plain("", 408), kind=ProviderTimeout, again=True),
    Fault(
        "json_429",
        error("slow down", 429, **{"retry-after": "7"}),
        kind=Overloaded,
        again=True,
        facts=(("retry_after", 7.0),),
    ),
    Fault(
        "json_429_negative_wait",
        error("slow down", 429, **{"retry-after": "-7"}),
        kind=Overloaded,
        again=True,
        facts=(("retry_after", None),),
    ),
    Fault(
        "json_429_in_an_hour",
        error("slow down", 429, **{"retry-after": "3600"}),
        kind=Overloaded,
        facts=(("retry_after", 3600.0),),
    ),
    Fault("quota_429", error("you have reached your weekly usage limit", 429), kind=QuotaExceeded),
    Fault("quota_line_first", Answer([{"error": "you have reached your usage limit"}]), kind=QuotaExceeded),
    Fault(
        "quota_line_mid",
        Answer([FIRST, {"error": "you have reached your usage limit"}]),
        kind=QuotaExceeded,
        partial="Hello ",
    ),
    Fault("subscription_403", error("this model requires a subscription", 403), kind=QuotaExceeded),
    Fault("retired_410", error("the model was retired", 410), kind=ModelNotFound),
    Fault("runner_died_400", error('Post "http://127.0.0.1:5/x": EOF', 400), kind=InferenceFailed, again=True),
    Fault("html_524", plain("<html>error code: 524</html>", 524, "text/html"), kind=ProviderTimeout),
    Fault("json_499", error("client closed request", 499), kind=InferenceFailed, again=True),
    Fault("json_500", error("something odd"), kind=InferenceFailed),
    Fault("json_500_option", error('option "num_ctx" must be of type integer'), kind=RequestRejected),
    Fault("json_500_format", error('invalid format: "x"'), kind=RequestRejected),
    Fault("json_500_image", error("image: unknown format"), kind=RequestRejected),
    Fault(
        "json_500_memory",
        error("model requires more system memory (9 GiB) than is available"),
        kind=ModelLoadFailed,
        facts=(("reason", "memory"),),
    ),
    Fault(
        "json_500_memory_newer",
        error("llama-server process has terminated: cudaMalloc failed: out of memory"),
        kind=ModelLoadFailed,
        facts=(("reason", "memory"),),
    ),
    Fault(
        "json_500_incompatible",
        error("this model may be incompatible with your version of Ollama"),
        kind=ModelLoadFailed,
        facts=(("reason", "incompatible"),),
    ),
    Fault(
        "json_500_load_timeout",
        error("timed out waiting for llama-server to start: no progress"),
        kind=ModelLoadFailed,
        facts=(("reason", "timeout"),),
    ),
    Fault(
        "json_500_crash",
        error("llama runner process has terminated: exit status 2"),
        kind=ModelLoadFailed,
        again=True,
        facts=(("reason", "crashed"),),
    ),
    Fault(
        "json_500_runner_stopped",
        error("model runner has unexpectedly stopped, this may be due to …"),
        kind=InferenceFailed,
        again=True,
    ),
    Fault("json_500_nan", error("embedding contains NaN or Inf values"), kind=InferenceFailed),
    Fault("json_500_canceled", error("context canceled"), kind=InferenceFailed, again=True),
    Fault(
        "json_503",
        error("server busy, please try again.  maximum pending requests exceeded", 503),
        kind=Overloaded,
        again=True,
    ),
    Fault("json_504", plain("gateway timeout", 504), kind=ProviderTimeout),
    Fault(
        "cloud_sign_in",
        Answer(
            [b'{"error":"unauthorized","signin_url":"https://example.org/x?key=abc"}'], status=401, framing="length"
        ),
        kind=AuthenticationFailed,
    ),
    Fault(
        "tools_unsupported",
        error("registry.ollama.ai/library/x does not support tools", 400),
        kind=CapabilityUnsupported,
    ),
    Fault(
        "overflow",
        error(
            json.dumps(
                {
                    "error": {
                        "code": 400,
                        "message": "request (30 tokens) exceeds the available "
                        "context size (16 tokens), try increasing it",
                        "n_ctx": 16,
                    }
                }
            ),
            400,
        ),
        kind=ContextOverflow,
    ),
    Fault("error_line_first", Answer([{"error": "something odd"}]), kind=InferenceFailed, facts=(("status", None),)),
    Fault(
        "error_line_mid",
        Answer([FIRST, {"error": "an error was encountered while running the model: EOF"}]),
        kind=InferenceFailed,
        partial="Hello ",
    ),
    Fault(
        "error_line_unframed",
        Answer([FIRST, b'{"mess{"StatusCode":502,"error":"bad gateway"}']),
        kind=ConnectionFailed,
        partial="Hello ",
        facts=(("status", 502),),
    ),
    Fault(
        "error_line_with_status",
        Answer([FIRST, {"error": "no space for it", "status": 503}]),
        kind=Overloaded,
        partial="Hello ",
        facts=(("status", 503),),
    ),
    Fault("error_line_object", Answer([FIRST, {"error": {"message": "odd"}}]), kind=InferenceFailed, partial="Hello "),
    Fault("error_line_empty_string", Answer([FIRST, {"error": ""}]), kind=InferenceFailed, partial="Hello "),
    Fault(
        "error_line_with_signin",
        Answer([{"error": "unauthorized", "signin_url": "https://example.org/?key=abc"}]),
        kind=AuthenticationFailed,
    ),
    Fault("error_line_json_string", Answer([FIRST, {"error": "[]"}]), kind=InferenceFailed, partial="Hello "),
    Fault("error_line_numeric_string", Answer([FIRST, {"error": "500"}]), kind=InferenceFailed, partial="Hello "),
    Fault("error_line_null", Answer([FIRST, {"error": None}]), kind=ProtocolError, partial="Hello "),
    Fault("nonstream_error_200", Answer([b'{"error":"something odd"}'], framing="length"), kind=InferenceFailed),
]


def last(**fields: Any) -> dict[str, Any]:
    """The last line with other fields."""
    return {**LAST, **fields}


def without(name: str, given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key != name}


def dates(each: dict[str, Any]) -> dict[str, Any]:
    return {**each, "created_at": 1767225600.5}


DEVIATING_LINES: dict[str, list[Any]] = {
    "one_line": [last(message=line("Hello world")["message"])],
    "text_in_the_last_line": [FIRST, last(message=SECOND["message"])],
    "fifty_empty_texts": [*[line("")] * 50, *WHOLE],
    "model_missing": [without("model", each) for each in WHOLE],
    "model_null": [{**each, "model": None} for each in WHOLE],
    "created_at_a_number": [dates(each) for each in WHOLE],
    "unknown_fields": [{**each, "x": {"message": [{}], "done": True}} for each in WHOLE],
    "thinking_null": [line("Hello world", message={"content": "Hello world", "thinking": None}), LAST],
    "role_missing": [line("", message={"content": "Hello world"}), LAST],
    "role_null": [line("", message={"role": None, "content": "Hello world"}), LAST],
    "role_unknown": [line("", message={"role": "oracle", "content": "Hello world"}), LAST],
    "images_in_reply": [line("", message={"content": "Hello world", "images": ["iVBORw0K"]}), LAST],
    "content_null_at_the_end": [FIRST, SECOND, last(message={"role": "assistant", "content": None})],
    "logprobs_null": [{**each, "logprobs": None} for each in WHOLE],
    "logprobs_empty": [{**each, "logprobs": []} for each in WHOLE],
    "counts_missing": [FIRST, SECOND, without("eval_count", without("prompt_eval_count", LAST))],
    "counts_null": [FIRST, SECOND, last(eval_count=None, prompt_eval_count=None)],
    "counts_zero": [FIRST, SECOND, last(eval_count=0, prompt_eval_count=0)],
    "durations_null": [FIRST, SECOND, last(total_duration=None, load_duration=None)],
    "context_of_generate": [FIRST, SECOND, last(context=[1, 2, 3])],
    "duplicate_key": [
        FIRST,
        SECOND,
        json.dumps(LAST).replace('"done": true', '"done": false, "done": true').encode(),
    ],
    "error_null": [{**each, "error": None} for each in WHOLE],
}
DEVIATING = [
    *[Fault(name, Answer(lines)) for name, lines in DEVIATING_LINES.items()],
    Fault("tool_calls_null", Answer([line("", message={"content": "Hello world", "tool_calls": None}), LAST])),
    Fault("tool_calls_empty", Answer([line("", message={"content": "Hello world", "tool_calls": []}), LAST])),
    Fault("null_character", Answer([line("a\0b"), LAST]), text="a\0b"),
    Fault("line_of_1_MB", Answer([line("x" * 2**20), LAST]), text="x" * 2**20),
    Fault("done_reason_unknown", Answer([FIRST, SECOND, last(done_reason="bored")]), finish="other"),
    Fault("done_reason_length", Answer([FIRST, SECOND, last(done_reason="length")]), finish="length"),
]
WRAPPED = [
    Fault(name, answer)
    for name, answer in {
        "bytewise": Answer(bytewise(BODY), framing="none"),
        "bytewise_in_chunks": Answer(bytewise(BODY)),
        "bytewise_framing": Answer(bytewise(CHUNKED + chunk(BODY) + END), raw=b"", ending="keep"),
        "hints_103": Answer([BODY], raw=HINTS + BARE),
        "many_100_and_103": Answer([BODY], raw=(CONTINUE + HINTS) * 10 + BARE),
        "content_type_missing": Answer(raw=b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + BODY),
        "content_type_text": Answer(WHOLE, headers={"content-type": "text/plain"}),
        "content_type_octets": Answer(WHOLE, headers={"content-type": "application/octet-stream"}),
        "reason_phrase_odd": Answer([BODY], raw=BARE.replace(b"200 OK", b"200 Who knows?")),
        "retry_after_under_200": Answer(WHOLE, headers={"retry-after": "60"}),
        "cookie": Answer(WHOLE, headers={"set-cookie": "a=b; Path=/"}),
        "identity_encoding": Answer(WHOLE, headers={"content-encoding": "identity"}),
        "measured": Answer(WHOLE, framing="length"),
        "chunks_with_extensions": Answer([chunk(BODY, b";a=b"), END], raw=CHUNKED, ending="keep"),
        "chunk_sizes_with_zeros": Answer([b"000%X\r\n%s\r\n" % (len(BODY), BODY), END], raw=CHUNKED, ending="keep"),
        "lines_packed_by_two": Answer([json.dumps(FIRST).encode() + b"\n" + json.dumps(SECOND).encode(), b"\n", LAST]),
    }.items()
]
FOREIGN = [
    Fault(name, Answer(raw=said, ending="close"), kind=ProtocolError)
    for name, said in {
        "speaks_tls": b"\x15\x03\x01\x00\x02\x02\x50",
        "speaks_http2": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + b"\0" * 18 + b"\r\n\r\n",
        "speaks_redis": b"-ERR unknown command 'POST'\r\n\r\n",
        "speaks_mail": b"220 mail.example ESMTP\r\n\r\n",
        "speaks_icy": b"ICY 200 OK\r\n\r\n" + BODY,
        "speaks_html_alone": b"<html><body>It works!</body></html>\r\n\r\n",
        "speaks_http9": b"HTTP/9.9 200 OK\r\n\r\n" + BODY,
        "speaks_lower_case": b"http/1.1 200 ok\r\n\r\n" + BODY,
        "status_of_four_digits": b"HTTP/1.1 2000 OK\r\n\r\n" + BODY,
        "status_negative": b"HTTP/1.1 -200 OK\r\n\r\n" + BODY,
    }.items()
]
FOREIGN_BODIES: dict[str, bytes | dict[str, Any]] = {
    "true_line": b"true\n",
    "number_line": b"7\n",
    "infinity_line": b'{"message":{"role":"assistant","content":Infinity},"done":false}\n',
    "single_quotes": b"{'message': {'content': 'x'}}\n",
    "trailing_comma": b'{"message":{"content":"x"},}\n',
    "comment": b'{"message":{"content":"x"}} // said\n',
    "two_objects_in_a_line": json.dumps(FIRST).encode() * 2 + b"\n",
    "null_bytes": b"\0\0\0\0\n",
    "utf_16": BODY.decode().encode("utf-16"),
    "half_of_an_escape": b'{"message":{"content":"\\u12"},"done":false}\n',
    "line_feed_in_a_text": b'{"message":{"content":"a\nb"},"done":false}\n',
    "xml": b"<?xml version='1.0'?><error/>\n",
    "openai_form": b'{"choices":[{"delta":{"content":"Hello "}}]}\n',
    "openai_stream": b'data: {"choices":[{"delta":{"content":"Hello "}}]}\n\ndata: [DONE]\n\n',
    "anthropic_stream": b'event: message_start\ndata: {"type":"message_start"}\n\n',
    "deep_array": b"[" * 50_000 + b"\n",
    "message_a_list": {"message": ["x"], "done": False},
    "message_a_number": {"message": 7, "done": False},
    "content_a_list": {"message": {"content": ["x"]}, "done": False},
    "content_an_object": {"message": {"content": {"a": 1}}, "done": False},
    "content_true": {"message": {"content": True}, "done": False},
    "thinking_a_number": {"message": {"content": "", "thinking": 7}, "done": False},
}
FOREIGN += [Fault(name, Answer([body]), kind=ProtocolError) for name, body in FOREIGN_BODIES.items()]
FOREIGN += [
    Fault(name, Answer([], status=status, framing="length", headers=headers), kind=ProtocolError)
    for name, status, headers in [
        ("redirect_300", 300, {}),
        ("redirect_302_without_location", 302, {}),
        ("redirect_302_empty_location", 302, {"location": ""}),
        ("redirect_303_with_a_key", 303, {"location": "https://u:key=abc@example.org/?key=abc"}),
        ("redirect_305", 305, {"location": "http://127.0.0.1:9/"}),
        ("redirect_307_same", 307, {"location": "/api/chat"}),
        ("redirect_308_https", 308, {"location": "https://example.org/api/chat"}),
        ("redirect_invalid_url", 302, {"location": "http://[::1"}),
        ("redirect_javascript", 302, {"location": "javascript:alert(1)"}),
    ]
]
CUT = [
    Fault(name, answer, kind=ConnectionFailed, again=True)
    for name, answer in {
        "fin_in_status_line": Answer(raw=b"HTTP/1", ending="close"),
        "fin_after_status_line": Answer(raw=STATUS + b"\r\n", ending="close"),
        "fin_after_100": Answer(raw=CONTINUE, ending="close"),
        "fin_after_103": Answer(raw=HINTS, ending="close"),
        "rst_mid_headers": Answer(raw=HEAD, ending="reset"),
    }.items()
]
CUT += [
    Fault(name, answer, kind=StreamInterrupted, again=True)
    for name, answer in {
        "only_blank_lines": Answer([b"\n\n\n"]),
        "only_spaces": Answer([b"   "]),
        "first_line_cut_in_utf8": Answer([b'{"message":{"content":"\xc3']),
        "no_chunk_then_fin": Answer(raw=CHUNKED, ending="close"),
        "half_a_chunk_size_then_fin": Answer(raw=CHUNKED + b"f", ending="close"),
        "length_zero": Answer(raw=measured(b""), ending="keep"),
        "measured_then_fin": Answer(raw=HEAD + b"content-length: 99\r\n\r\n", ending="close"),
        "measured_then_rst": Answer(raw=HEAD + b"content-length: 99\r\n\r\n", ending="reset"),
    }.items()
]
CUT += [
    Fault(name, answer, kind=StreamInterrupted, partial="Hello world")
    for name, answer in {
        "last_line_cut": Answer([FIRST, SECOND, json.dumps(LAST).encode()[:-1]]),
        "last_line_cut_by_fin": Answer([FIRST, SECOND, json.dumps(LAST).encode()[:-1]], ending="close"),
        "last_line_cut_by_rst": Answer([FIRST, SECOND, json.dumps(LAST).encode()[:-1]], ending="reset"),
        "done_missing": Answer([FIRST, SECOND, without("done", LAST)]),
        "done_null": Answer([FIRST, SECOND, last(done=None)]),
        "blank_end": Answer([FIRST, SECOND, b"\n\n"]),
        "unframed_end": Answer([FIRST, SECOND], framing="none"),
        "measured_end": Answer([FIRST, SECOND], framing="length"),
    }.items()
]


def refusal(status: int, body: Any, kind: type[ProviderError], *, again: bool = False, **facts: Any) -> dict[str, Any]:
    """A refusal: an error in JSON, or without one a page of a proxy."""
    answer = error(body, status) if body is not None else plain("<html>No</html>", status, "text/html")
    return {"answer": answer, "kind": kind, "again": again, "facts": (("status", status), *facts.items())}


STATUSES = [
    Fault(name, **given)
    for name, given in {
        "status_400_page": refusal(400, None, ProtocolError),
        "status_402": refusal(402, "payment required", QuotaExceeded),
        "status_403": refusal(403, "forbidden", AuthenticationFailed),
        "status_403_page": refusal(403, None, AuthenticationFailed),
        "status_404_page": refusal(404, None, ProtocolError),
        "status_405": refusal(405, "method not allowed", RequestRejected),
        "status_407": refusal(407, None, ConnectionFailed),
        "status_409": refusal(409, "conflict", RequestRejected),
        "status_410": refusal(410, "this model was retired", ModelNotFound),
        "status_411": refusal(411, "length required", RequestRejected),
        "status_413": refusal(413, "too large", RequestRejected),
        "status_413_page": refusal(413, None, RequestRejected),
        "status_415": refusal(415, "unsupported media type", RequestRejected),
        "status_418": refusal(418, "teapot", RequestRejected),
        "status_422": refusal(422, "field required", RequestRejected),
        "status_425": refusal(425, "too early", ProviderTimeout, again=True),
        "status_429_page": refusal(429, None, Overloaded, again=True),
        "status_431": refusal(431, "headers too large", RequestRejected),
        "status_451": refusal(451, "legal reasons", AuthenticationFailed),
        "status_500_page": refusal(500, None, ProtocolError),
        "status_500_empty_error": refusal(500, "", InferenceFailed),
        "status_500_error_number": refusal(500, 7, InferenceFailed),
        "status_500_error_list": refusal(500, ["a", "b"], InferenceFailed),
        "status_501": refusal(501, "not implemented", CapabilityUnsupported),
        "status_502": refusal(502, "bad gateway", ConnectionFailed, again=True),
        "status_503_page": refusal(503, None, Overloaded, again=True),
        "status_504": refusal(504, "gateway timeout", ProviderTimeout),
        "status_505": refusal(505, "version", InferenceFailed),
        "status_520": refusal(520, None, ConnectionFailed, again=True),
        "status_521": refusal(521, None, ConnectionFailed, again=True),
        "status_522": refusal(522, None, ConnectionFailed, again=True),
        "status_523": refusal(523, None, ConnectionFailed, again=True),
        "status_524": refusal(524, None, ProviderTimeout),
        "status_529": refusal(529, "overloaded", Overloaded, again=True),
        "status_530": refusal(530, None, ConnectionFailed, again=True),
        "status_599": refusal(599, "odd", ConnectionFailed, again=True),
        "status_600": refusal(600, "odd", InferenceFailed),
        "generate_unsupported": refusal(400, '"x" does not support generate', CapabilityUnsupported),
        "thinking_unsupported": refusal(400, '"x" does not support thinking', CapabilityUnsupported),
        "think_value_invalid": refusal(400, 'invalid think value: "most"', RequestRejected),
        "model_is_required": refusal(400, "model is required", RequestRejected),
        "request_body_missing": refusal(400, "missing request body", RequestRejected),
        "bad_template": refusal(500, 'template: :1: function "x" not defined', RequestRejected),
        "not_found_in_other_words": refusal(404, 'model "x" not found, try pulling it first', ModelNotFound),
        "not_found_as_400": refusal(400, "model 'x' not found", ModelNotFound),
        "overflow_older": refusal(400, "the input length exceeds the context length", ContextOverflow),
        "memory_vulkan": refusal(500, "ErrorOutOfDeviceMemory", ModelLoadFailed, reason="memory"),
        "memory_resources": refusal(
            500,
            "model failed to load, this may be due to resource limitations or an internal error",
            ModelLoadFailed,
            reason="memory",
        ),
        "architecture": refusal(
            500, "unable to load model: unknown model architecture: 'x'", ModelLoadFailed, reason="incompatible"
        ),
        "still_loading": refusal(500, "unexpected server status: llm server loading model", Overloaded, again=True),
        "runner_killed": refusal(
            500, "llama runner process has terminated: signal: killed", ModelLoadFailed, again=True, reason="crashed"
        ),
        "runner_gone_503": refusal(503, "model runner has unexpectedly stopped", InferenceFailed, again=True),
        "error_in_message": {
            "answer": Answer([b'{"message": "odd"}'], status=400, framing="length"),
            "kind": RequestRejected,
        },
        "error_in_detail": {
            "answer": Answer([b'{"detail": "odd"}'], status=422, framing="length"),
            "kind": RequestRejected,
        },
        "error_in_list": {
            "answer": Answer([b'[{"error": {"code": 400}}]'], status=400, framing="length"),
            "kind": RequestRejected,
        },
        "error_nested": {
            "answer": error(json.dumps({"error": json.dumps({"error": {"message": "server busy"}})}), 500),
            "kind": Overloaded,
            "again": True,
        },
        "body_of_20_MB": {
            "answer": Answer([b'{"error":"', *([b"y" * 2**20] * 20)], status=400),
            "kind": ProtocolError,
        },
        "body_not_utf8": {
            "answer": Answer([b'{"error":"\xff\xfe busy"}'], status=503, framing="length"),
            "kind": Overloaded,
            "again": True,
        },
        "body_deep": {"answer": Answer([b"[" * 50_000], status=400, framing="length"), "kind": ProtocolError},
        "body_empty": {"answer": Answer([], status=500, framing="length"), "kind": ProtocolError},
        "body_missing": {
            "answer": Answer(raw=b"HTTP/1.1 500 Internal Server Error\r\n\r\n", ending="close"),
            "kind": ProtocolError,
        },
        "body_of_spaces": {"answer": Answer([b"  \n"], status=500, framing="length"), "kind": ProtocolError},
        "body_of_lines": {
            "answer": Answer([b'{"error":"server busy"}\n{"error":"odd"}\n'], status=500, framing="length"),
            "kind": Overloaded,
            "again": True,
        },
        "status_500_with_folder": refusal(500, "open /home/ann/.ollama/models/x: permission denied", InferenceFailed),
        "body_in_gzip": {
            "answer": Answer([gzip.compress(b'{"error":"odd"}')], status=500, headers={"content-encoding": "gzip"}),
            "kind": ProtocolError,
        },
    }.items()
]


def waiting(name: str, status: int = 429, *, wanted: float | None, **headers: str) -> Fault:
    """A server that says when to retry, in some form."""
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    facts = (("retry_after", wanted),)
    return Fault(name, error("slow down", status, **named), kind=Overloaded, again=True, facts=facts)


WAITS = [
    waiting("wait_fraction", wanted=1.5, retry_after="1.5"),
    waiting("wait_zero", wanted=0.0, retry_after="0"),
    waiting("wait_until_past_date", wanted=0.0, retry_after="Wed, 21 Oct 2015 07:28:00 GMT"),
    waiting("wait_in_milliseconds", wanted=0.25, retry_after_ms="250"),
    waiting("wait_in_seconds_and_milliseconds", wanted=0.25, retry_after_ms="250", retry_after="9"),
    waiting("wait_not_a_time", wanted=None, retry_after="soon"),
    waiting("wait_empty", wanted=None, retry_after=""),
    waiting("wait_not_a_number", wanted=None, retry_after="nan"),
    waiting("wait_infinite", wanted=None, retry_after="inf"),
    waiting("wait_by_503", 503, wanted=3.0, retry_after="3"),
    waiting("wait_by_529", 529, wanted=3.0, retry_after="3"),
]
LIMIT_WORDS = "you (bob) have reached your weekly usage limit, upgrade for higher limits: https://ollama.com/upgrade"
RUNNER = 'Post "http://127.0.0.1:61135/completion": '
MESSAGES = [
    Fault(name, **given)
    for name, given in {
        "quota_429_session": refusal(429, "you've reached your session usage limit", QuotaExceeded),
        "plan_402_page": refusal(402, None, QuotaExceeded),
        "plan_403": refusal(403, "this model requires a subscription, upgrade for access", QuotaExceeded),
        "runner_eof_400": refusal(400, f"do completion request: {RUNNER}EOF", InferenceFailed, again=True),
        "runner_eof_500": refusal(500, f"do completion request: {RUNNER}EOF", InferenceFailed, again=True),
        "runner_pipe": refusal(500, f"{RUNNER}write: broken pipe", InferenceFailed, again=True),
        "runner_refused": refusal(
            500, f"{RUNNER}dial tcp 127.0.0.1:61135: connect: connection refused", InferenceFailed, again=True
        ),
        "runner_reset": refusal(500, f"{RUNNER}read: connection reset by peer", InferenceFailed, again=True),
        "runner_closed_on_windows": refusal(
            500,
            f"{RUNNER}wsarecv: An existing connection was forcibly closed by the remote host.",
            InferenceFailed,
            again=True,
        ),
        "input_too_large": refusal(
            500, "input is too large to process. increase the physical batch size", ContextOverflow
        ),
    }.items()
]
MESSAGES += [
    Fault(name, Answer([{"error": said}]), kind=kind, again=again)
    for name, said, kind, again in [
        ("quota_line", LIMIT_WORDS, QuotaExceeded, False),
        ("plan_line", "this model requires a subscription, upgrade for access", QuotaExceeded, False),
        ("retired_line", "model 'x' was retired on 2026-01-01", ModelNotFound, False),
        ("runner_eof_line", f"{RUNNER}EOF", InferenceFailed, True),
        ("image_unknown_line", "image: unknown format", RequestRejected, False),
    ]
]
MESSAGES += [
    Fault(
        name,
        error("slow down", 429, **headers),
        kind=Overloaded,
        again=again,
        facts=(("retry_after", wanted),),
    )
    for name, headers, wanted, again in [
        ("wait_until_reset", {"x-ratelimit-reset": "9"}, 9.0, True),
        ("wait_one_day", {"retry-after": "86400"}, 86_400.0, False),
    ]
]
MORE_DEVIATING = [
    Fault(name, answer, finish=finish)
    for name, answer, finish in [
        ("last_without_message", Answer([FIRST, SECOND, without("message", LAST)]), "stop"),
        ("last_with_message_null", Answer([FIRST, SECOND, last(message=None)]), "stop"),
        ("a_line_without_message", Answer([{"model": MODEL, "done": False}, *WHOLE]), "stop"),
        ("counts_as_fractions", Answer([FIRST, SECOND, last(eval_count=2.0, prompt_eval_count=5.0)]), "stop"),
        ("counts_as_text", Answer([FIRST, SECOND, last(eval_count="2")]), "stop"),
        ("counts_negative", Answer([FIRST, SECOND, last(eval_count=-1, prompt_eval_count=-1)]), "stop"),
        ("counts_absurd", Answer([FIRST, SECOND, last(eval_count=10**18)]), "stop"),
        ("durations_as_fractions", Answer([FIRST, SECOND, last(total_duration=4e6, eval_duration=1.5)]), "stop"),
        ("durations_as_text", Answer([FIRST, SECOND, last(total_duration="4ms")]), "stop"),
        ("model_a_number", Answer([FIRST, SECOND, last(model=7)]), "stop"),
        (
            "logprob_null",
            Answer([{**FIRST, "logprobs": [{"token": "Hello ", "logprob": None}]}, SECOND, LAST]),
            "stop",
        ),
        ("done_reason_missing", Answer([FIRST, SECOND, without("done_reason", LAST)]), "stop"),
        ("done_reason_null", Answer([FIRST, SECOND, last(done_reason=None)]), "stop"),
        ("done_reason_empty", Answer([FIRST, SECOND, last(done_reason="")]), "stop"),
        ("done_reason_content_filter", Answer([FIRST, SECOND, last(done_reason="content_filter")]), "content_filter"),
    ]
]
UNBOUNDED = [
    Fault(
        "too_many_logprobs",
        Answer([json.dumps({**FIRST, "logprobs": [{}] * (MAX_OBJECTS + 1)}).encode() + b"\n", LAST]),
        kind=ProtocolError,
    ),
    Fault("status_000", Answer(raw=b"HTTP/1.1 000 Nothing\r\n\r\n", ending="close"), kind=ProtocolError),
]
BAD = [*BROKEN, *CUT, *NONSENSE, *FOREIGN, *SLOW, *REFUSED, *STATUSES, *WAITS, *MESSAGES, *UNBOUNDED]
ALL = [*GOOD, *DEVIATING, *MORE_DEVIATING, *WRAPPED, *BAD]


@pytest.fixture
def fake() -> Iterator[FakeOllama]:
    with FakeOllama(reply="mended") as server:
        yield server


def named(faults: list[Fault]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fault", faults, ids=lambda each: each.name)


def in_time(both: Any, work: Callable[[], Any]) -> Any:
    """Return the result of the work; a test that hangs fails instead."""
    return both.start(work).result(PATIENCE)


def failure(both: Any, work: Callable[[], Any]) -> Any:
    """Return the error of the work."""
    error = both.start(work).exception(PATIENCE)
    assert isinstance(error, GraftageError), f"{error!r} is not an error of Graftage"
    return error


# --- The same faults for other operations ----------------------------------------------------------------------------

SAID = re.compile(rb'"message": ?{"role": ?"assistant", ?"content": ?("(?:[^"\\]|\\.)*"|NaN|Infinity)}')
"""The message in a line of a chat, as bytes."""


def as_generate(piece: Any) -> Any:
    """Convert a piece of a chat to one of a generate; bytes keep their length, so that the framing stays valid."""
    if isinstance(piece, bytes):
        return SAID.sub(lambda found: b'"response":'.ljust(len(found[0]) - len(found[1])) + found[1], piece)
    if not isinstance(piece, dict) or "message" not in piece:
        return piece
    message, others = piece["message"], without("message", piece)
    if not isinstance(message, dict):
        return {**others, "response": message}
    return {**others, "response": message.get("content"), **without("role", without("content", message))}


def converted(answer: Answer, operation: str) -> Answer:
    """Convert an answer to a chat to one to another operation."""
    if operation != "generate":
        return answer
    chunks: Any = answer.chunks
    if isinstance(chunks, repeat):
        return replace(answer, chunks=repeat(as_generate(next(chunks))), raw=answer.raw and as_generate(answer.raw))
    found: list[Any] = []
    for are_bytes, together in groupby(chunks, lambda each: isinstance(each, bytes)):
        pieces = list(together)
        if are_bytes:  # A line may be in several pieces.
            body = as_generate(b"".join(pieces))
            found += [body[start:stop] for start, stop in pairwise(accumulate(map(len, pieces), initial=0))]
        else:
            found += map(as_generate, pieces)
    return replace(answer, chunks=found, raw=answer.raw and as_generate(answer.raw))


class Mode(NamedTuple):
    """An operation, plain or streamed."""

    operation: str
    stream: bool

    def ask(self, llm: Any, seen: list[str]) -> Any:
        """Return the reply; `seen` gets the chunks of a stream."""
        if not self.stream:
            return getattr(llm, self.operation)("Hi")
        with getattr(llm, self.operation)("Hi", stream=True) as chunks:
            seen.extend(each.text for each in chunks)
            return chunks.reply


MODES = [Mode(operation, stream) for operation in ("chat", "generate") for stream in (False, True)]
EMBED = Mode("embed", stream=False)


def modes(fault: Fault) -> list[Mode]:
    """Return the modes in which a scenario means the same: embeddings, too, if it has no line of a chat."""
    speaks = fault.kind in (None, StreamInterrupted) or fault.partial is not None
    return [*MODES, EMBED] if fault.embeds and not speaks else MODES


def check(error: Any, fault: Fault, operation: str = "chat") -> None:
    assert type(error) is fault.kind
    assert (error.provider, error.operation, error.model) == ("ollama", operation, MODEL)
    assert (error.partial.text if error.partial else None) == fault.partial
    for name, value in fault.facts:
        assert getattr(error, name) == value
    assert error.retryable or not fault.again
    assert error.hint
    assert ".." not in error.message
    assert len(str(error)) < 2000
    assert "key=abc" not in f"{error} {error.to_dict()}"


def check_scenario(fault: Fault, mode: Mode, found: Any, seen: list[str]) -> None:
    """Check what is true of every scenario in every mode.

    No foreign exception, no success of an unfinished answer, and no chunk lost or duplicated.
    """
    if fault.kind is not None:
        assert isinstance(found, GraftageError), f"{found!r} is not an error of Graftage"
        check(found, fault, mode.operation)
        assert "".join(seen) == (fault.partial or "" if mode.stream else "")
        return
    assert not isinstance(found, BaseException), repr(found)
    assert (found.text, found.finish_reason) == (fault.text, fault.finish)
    assert "".join(seen) == (fault.text if mode.stream else "")
    assert found.text.encode()


def check_retry(both: Any, fake: FakeOllama, fault: Fault) -> None:
    """Check that only what is safe is retried, and then succeeds."""
    fake.requests.clear()
    fake.script("/api/chat", fault.answer)
    llm = both.connect("ollama", model=MODEL, host=fake.url, timeouts=fault.timeouts, attempts=2)
    if fault.again:
        assert in_time(both, lambda: llm.chat("Hi")).text == "mended"
    else:
        check(failure(both, lambda: llm.chat("Hi")), fault)
    asked = [seen for seen in fake.requests if seen.path == "/api/chat"]
    assert len(asked) == (2 if fault.again else 1)


@named(ALL)
def test_fault_in_every_mode(both: Any, fake: FakeOllama, fault: Fault) -> None:
    llm = both.connect("ollama", model=MODEL, host=fake.url, timeouts=fault.timeouts, attempts=1)
    asked = modes(fault)
    seen: list[list[str]] = [[] for _ in asked]
    for mode in asked:
        fake.script(f"/api/{mode.operation}", converted(fault.answer, mode.operation))
    # Both modes of an operation get equal answers.
    ended = both.together([partial(mode.ask, llm, heard) for mode, heard in zip(asked, seen, strict=True)])
    problems = []
    for mode, found, heard in zip(asked, ended, seen, strict=True):
        try:
            check_scenario(fault, mode, found, heard)
        except AssertionError as problem:
            problems.append(f"{mode.operation}, {'stream' if mode.stream else 'plain'}: {problem}")
    assert not problems, "\n\n".join(problems)
    assert llm.stats().running == 0
    # After "not found", the client lists the models.
    requests = [(each.method, each.path) for each in fake.requests if each.path != "/api/tags"]
    assert sorted(requests) == sorted(("POST", f"/api/{mode.operation}") for mode in asked)
    if fault.kind is None:
        assert llm.chat("Hi").text == "mended"
    elif fault.timeouts is CALM:
        check_retry(both, fake, fault)
    both.close_clients()
    assert soon(lambda: fake.open_connections == 0)


@named([fault for fault in (*BROKEN, *NONSENSE, *SLOW, *REFUSED) if fault.partial is None])
def test_health_reports_every_fault(both: Any, fake: FakeOllama, fault: Fault) -> None:
    fake.script("/api/version", fault.answer)
    timeouts = CALM if fault.timeouts is CALM else SHORT
    llm = both.connect("ollama", host=fake.url, timeouts=timeouts, attempts=1)
    found = in_time(both, lambda: llm.health(timeout=timeouts))
    assert not found.ok
    assert isinstance(found.error, ProviderError)
    assert found.reachable is not isinstance(found.error, ConnectionFailed)


# --- Responses that are one JSON object ------------------------------------------------------------------------------

VECTORS = json.dumps({"model": MODEL, "embeddings": [[1.0, 2.0]]}).encode()


def whole(body: bytes, **options: Any) -> Answer:
    return Answer([body], framing="length", **options)


OBJECTS: list[tuple[str, Answer, type[ProviderError] | None]] = [
    ("ok", whole(VECTORS), None),
    ("chunked", Answer([VECTORS[:9], VECTORS[9:]]), None),
    ("no_framing", Answer([VECTORS], framing="none"), None),
    ("bytewise", Answer(bytewise(measured(VECTORS)), raw=b""), None),
    ("hints", Answer(raw=HINTS + measured(VECTORS)), None),
    ("reset", Answer(raw=b"", ending="reset"), ConnectionFailed),
    ("cut", whole(VECTORS[:20], headers={"content-length": "99"}, ending="close"), StreamInterrupted),
    ("half", whole(VECTORS[:20]), ProtocolError),
    ("empty", whole(b""), ProtocolError),
    ("status_204", Answer(raw=b"HTTP/1.1 204 No Content\r\n\r\n"), ProtocolError),
    ("null", whole(b"null"), ProtocolError),
    ("array", whole(b"[]"), ProtocolError),
    ("string", whole(b'"text"'), ProtocolError),
    ("number", whole(b"7"), ProtocolError),
    ("other_object", whole(b"{}"), ProtocolError),
    ("wrong_type", whole(b'{"model":"x","embeddings":"none"}'), ProtocolError),
    ("deep", whole(b"[" * 50_000 + b"]" * 50_000), ProtocolError),
    ("huge_int", whole(b'{"embeddings":[[' + b"9" * 5000 + b"]]}"), ProtocolError),
    ("not_utf8", whole(b'{"model":"\xff","embeddings":[]}'), ProtocolError),
    ("html", whole(b"<html></html>"), ProtocolError),
    ("html_with_type", plain("<html></html>", 200, "text/html"), ProtocolError),
    ("gzip", whole(gzip.compress(VECTORS), headers={"content-encoding": "gzip"}), ProtocolError),
    ("error_200", whole(b'{"error":"something odd"}'), InferenceFailed),
    ("busy_200", whole(b'{"error":"server busy, please try again"}'), Overloaded),
    ("odd_400", error("something is wrong with it", 400), RequestRejected),
    ("crash_400", error("llama runner process no longer running: -1", 400), ModelLoadFailed),
    ("redirect", redirect(307, "http://127.0.0.1:9/"), ProtocolError),
    ("one_for_two", whole(b'{"embeddings":[]}'), ProtocolError),
    ("two_for_one", whole(b'{"embeddings":[[1.0],[2.0]]}'), ProtocolError),
    ("vector_empty", whole(b'{"embeddings":[[]]}'), ProtocolError),
    ("vector_null", whole(b'{"embeddings":[null]}'), ProtocolError),
    ("vector_of_words", whole(b'{"embeddings":[["a"]]}'), ProtocolError),
    ("vector_infinite", whole(b'{"embeddings":[[1e999]]}'), ProtocolError),
    ("vector_nan", whole(b'{"embeddings":[[NaN]]}'), ProtocolError),
    ("count_negative", whole(b'{"embeddings":[[1.0, 2.0]],"prompt_eval_count":-1}'), None),
    ("durations_as_fractions", whole(b'{"embeddings":[[1.0, 2.0]],"total_duration":1.5}'), None),
    ("model_missing", whole(b'{"embeddings":[[1.0, 2.0]]}'), None),
    ("crash_500", error('do embedding request: Post "http://127.0.0.1:61135/embedding": EOF', 500), InferenceFailed),
    (
        "crash_400_eof",
        error('do embedding request: Post "http://127.0.0.1:61135/embedding": EOF', 400),
        InferenceFailed,
    ),
    ("too_large", error("input is too large to process. increase the physical batch size", 500), ContextOverflow),
    ("quota", error(LIMIT_WORDS, 429), QuotaExceeded),
    ("stall", Answer([VECTORS[:9]], ending="stall"), ProviderTimeout),
]


LISTINGS = [
    b"{}",
    b"[]",
    b"null",
    b'{"models":7}',
    b'{"models":[7]}',
    b'{"models":[{"name":7,"model":[]}]}',
    b'{"models":[{"details":7}]}',
    b"{",
]


class TestObjects:
    @pytest.mark.parametrize(("answer", "kind"), [each[1:] for each in OBJECTS], ids=[each[0] for each in OBJECTS])
    def test_object_is_whole_or_typed_error(
        self, both: Any, fake: FakeOllama, answer: Answer, kind: type[ProviderError] | None
    ) -> None:
        fake.script("/api/embed", answer)
        timeouts = SHORT if kind is ProviderTimeout else CALM
        llm = both.connect("ollama", model=MODEL, host=fake.url, timeouts=timeouts, attempts=1)
        if kind is None:
            assert in_time(both, lambda: llm.embed("Hi")).vectors == ((1.0, 2.0),)
            return
        found = failure(both, lambda: llm.embed("Hi"))
        assert type(found) is kind
        assert (found.provider, found.operation, found.model) == ("ollama", "embed", MODEL)
        assert found.hint

    @pytest.mark.parametrize("operation", ["models", "loaded", "show"])
    @pytest.mark.parametrize("body", LISTINGS)
    def test_malformed_listings_raise(self, both: Any, fake: FakeOllama, operation: str, body: bytes) -> None:
        path = {"models": "/api/tags", "loaded": "/api/ps", "show": "/api/show"}[operation]
        fake.script(path, whole(body))
        llm = both.connect("ollama", model=MODEL, host=fake.url, attempts=1)
        error = both.start(getattr(llm, operation)).exception(PATIENCE)
        assert type(error) is ProtocolError


# --- Pulls -----------------------------------------------------------------------------------------------------------

STEP = {"status": "pulling manifest"}
PULLS: list[tuple[str, Answer, type[ProviderError]]] = [
    ("no_success", Answer([STEP]), StreamInterrupted),
    ("cut", Answer([STEP], ending="close"), StreamInterrupted),
    ("reset", Answer([STEP], ending="reset"), StreamInterrupted),
    ("empty", Answer([]), StreamInterrupted),
    ("half_line", Answer([STEP, b'{"sta']), StreamInterrupted),
    ("stall", Answer([STEP], ending="stall"), ProviderTimeout),
    ("unknown", Answer([STEP, {"error": "pull model manifest: file does not exist"}]), ModelNotFound),
    ("damaged", Answer([STEP, {"error": "digest mismatch, file must be downloaded again"}]), StreamInterrupted),
    ("disk_full", Answer([STEP, {"error": "write /models/x: no space left on device"}]), InferenceFailed),
    (
        "newer_server",
        Answer([STEP, {"error": "pull model manifest: 412: \n\nThe model requires a newer version of Ollama."}]),
        ModelLoadFailed,
    ),
    ("eof", Answer([STEP, {"error": "max retries exceeded: EOF"}]), ConnectionFailed),
    ("hub_401", Answer([STEP, {"error": "pull model manifest: 401: unauthorized"}]), AuthenticationFailed),
    ("hub_403", Answer([STEP, {"error": "pull model manifest: 403: forbidden"}]), AuthenticationFailed),
    ("hub_429", Answer([STEP, {"error": "pull model manifest: 429: too many requests"}]), Overloaded),
    (
        "hub_unreachable",
        Answer([STEP, {"error": "dial tcp: lookup registry.ollama.ai: no such host"}]),
        ConnectionFailed,
    ),
    ("permission", Answer([STEP, {"error": "open /models/blobs/x: permission denied"}]), InferenceFailed),
    (
        "disk_full_windows",
        Answer([STEP, {"error": "write x: There is not enough space on the disk."}]),
        InferenceFailed,
    ),
    ("refused_500", error("pull model manifest: file does not exist"), ModelNotFound),
    ("busy_503", error("server busy, please try again", 503), Overloaded),
    ("not_json", Answer([STEP, b"{nonsense\n"]), ProtocolError),
    ("array", Answer([STEP, b"[]\n"]), ProtocolError),
    ("wrong_type", Answer([STEP, {"status": 7}]), ProtocolError),
    ("wrong_total", Answer([STEP, {"status": "pulling", "total": "many"}]), StreamInterrupted),
]


@pytest.mark.parametrize(("answer", "kind"), [each[1:] for each in PULLS], ids=[each[0] for each in PULLS])
def test_pull_without_success_is_typed_error(
    both: Any, fake: FakeOllama, answer: Answer, kind: type[ProviderError]
) -> None:
    fake.script("/api/pull", answer)
    timeouts = SHORT if kind is ProviderTimeout else CALM
    llm = both.connect("ollama", host=fake.url, timeouts=timeouts, attempts=1)
    found = failure(both, lambda: llm.pull("x:1b"))
    assert type(found) is kind
    assert (found.operation, found.model) == ("pull_model", "x:1b")
    assert "/models" not in str(found) or kind is not InferenceFailed


FORKED = """
import os, sys, graftage
llm = graftage.connect("ollama:smollm2:135m", host=sys.argv[1], concurrency=1)
llm.chat("one")
stream = llm.chat("two", stream=True)
child = os.fork()
if not child:
    print("child:", llm.chat("three", timeout=10).text, llm.chat("four", timeout=10).text, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("parent:", "".join(chunk.text for chunk in stream), llm.chat("five", timeout=10).text)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_fork_shares_no_connections_or_slots(fake: FakeOllama) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FORKED, fake.url], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert sorted(ended.stdout.splitlines()) == [f"{who}: {fake.reply} {fake.reply}" for who in ("child", "parent")]
    assert fake.accepted == 2  # One each.


# --- Responses that are valid JSON with odd content ------------------------------------------------------------------


def calling(*calls: Any, done: bool = False, text: str = "") -> dict[str, Any]:
    """A line with tool calls."""
    found = line(text, done=done, done_reason="stop" if done else None)
    found["message"]["tool_calls"] = list(calls)
    return found


ARGUMENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "object": ({"arguments": {"a": 1}}, {"a": 1}),
    "missing": ({}, {}),
    "null": ({"arguments": None}, {}),
    "empty text": ({"arguments": ""}, {}),
    "spaces": ({"arguments": "  "}, {}),
    "text: null": ({"arguments": "null"}, {}),
    "text: object": ({"arguments": '{"a": "\u00e9"}'}, {"a": "\u00e9"}),
    "text: object with line breaks": ({"arguments": '{"a": "1\n\t2"}'}, {"a": "1\n\t2"}),
    "half of a surrogate pair": ({"arguments": {"a": "\ud800"}}, {"a": "\ufffd"}),
}


UNCOUNTED = line("", done=True, done_reason="stop")
UNNEEDED: dict[str, list[dict[str, Any]]] = {
    "the last line without a message": [line("hi"), {"model": MODEL, "done": True, "done_reason": "stop"}],
    "the last line with null": [line("hi"), {**UNCOUNTED, "message": None}],
    "a line without a message": [{"model": MODEL, "done": False}, line("hi"), UNCOUNTED],
    "a line without `done`": [{"message": {"content": "hi"}}, UNCOUNTED],
    "no role": [{"message": {"content": "hi"}, "done": False}, UNCOUNTED],
    "an unknown role": [{"message": {"role": 7, "content": "hi"}, "done": False}, UNCOUNTED],
    "no model": [{"message": {"content": "hi"}, "done": False}, {"message": {}, "done": True, "done_reason": "stop"}],
    "times as numbers": [line("hi", created_at=1767322800), {**UNCOUNTED, "created_at": 1767322800.5}],
    "a picture": [
        line("h", images=["aGk="]),
        {"message": {"content": "i", "images": ["aGk="]}, "done": False},
        UNCOUNTED,
    ],
    "null in every optional field": [
        {"message": {"content": "hi", "thinking": None, "tool_calls": None, "images": None}, "logprobs": None},
        {**UNCOUNTED, "total_duration": None, "eval_count": None, "model": None, "logprobs": None},
    ],
    "an empty list of calls": [calling(text="hi"), UNCOUNTED],
    "a number as model": [line("hi"), {**UNCOUNTED, "model": 7}],
    "a null probability": [line("hi", logprobs=[{"token": "hi", "logprob": None}]), UNCOUNTED],
    "probabilities of another type": [line("hi", logprobs=7), {**UNCOUNTED, "logprobs": "x"}],
}


GENERATED: dict[str, list[dict[str, Any]]] = {
    "as it should be": [{"response": "hi", "done": False}, {"response": "", "done": True, "done_reason": "stop"}],
    "no text at the end": [{"response": "hi", "done": False}, {"done": True}],
    "no text in the middle": [{"done": False}, {"response": "hi", "thinking": None}, {"response": None, "done": True}],
}


ODD_MODELS: dict[str, dict[str, Any]] = {
    "null": {"digest": None, "size": None, "modified_at": None, "details": None, "capabilities": None},
    "empty": {"digest": "", "size": "", "modified_at": "", "details": {}, "capabilities": ""},
    "numbers": {"digest": 7, "size": -7, "modified_at": 7, "details": 7, "capabilities": 7, "expires_at": 7},
    "numbers inside": {"details": {"family": 7, "parameter_size": 7, "quantization_level": 7, "context_length": "x"}},
    "zero time of Go": {"modified_at": "0001-01-01T00:00:00Z", "expires_at": "0001-01-01T00:00:00Z"},
}


class TestOddContent:
    @pytest.mark.parametrize(
        "vectors",
        [[[1.0, 2.0]], [[1.0], [2.0], [3.0]], [], [[], []], [[1.0], [1.0, 2.0]], [["1.0"], ["2.0"]], [[True], [1]]],
    )
    def test_mismatched_vectors_raise(self, both: Any, fake: FakeOllama, vectors: Any) -> None:
        fake.script("/api/embed", Answer([{"model": MODEL, "embeddings": vectors}]))
        with pytest.raises(ProtocolError):
            both.connect("ollama", model=MODEL, host=fake.url).embed(["a", "b"])

    @pytest.mark.parametrize("done", [False, True], ids=["in the middle", "in the last line"])
    @pytest.mark.parametrize(("given", "read"), ARGUMENTS.values(), ids=ARGUMENTS)
    def test_tool_arguments_in_every_form(
        self, both: Any, fake: FakeOllama, given: dict[str, Any], read: dict[str, Any], done: bool
    ) -> None:
        lines = [line("Let "), calling({"function": {"name": "now", **given}}, done=done, text="me see.")]
        lines += [] if done else [line("", done=True, done_reason="stop")]
        fake.script("/api/chat", Answer([json.dumps(each).encode() + b"\n" for each in lines]))
        reply = both.connect("ollama", model=MODEL, host=fake.url).chat("Hello")
        assert [(call.name, call.arguments) for call in reply.tool_calls] == [("now", read)]
        assert (reply.text, reply.finish_reason) == ("Let me see.", "tool_calls")

    @pytest.mark.parametrize(
        "function",
        [
            {"name": "now", "arguments": '{"a": "canary'},
            {"name": "now", "arguments": "canary"},
            {"name": "now", "arguments": '["canary"]'},
            {"name": "now", "arguments": ["canary"]},
            {"name": "", "arguments": {"a": "canary"}},
            {"name": None, "arguments": {"a": "canary"}},
            {"arguments": {"a": "canary"}},
        ],
    )
    def test_malformed_tool_call_stays_in_partial(self, both: Any, fake: FakeOllama, function: dict[str, Any]) -> None:
        fake.script("/api/chat", Answer([line("Let me see."), calling({"function": function})]))
        with pytest.raises(InferenceFailed, match=r"model's call.* malformed") as caught:
            both.connect("ollama", model=MODEL, host=fake.url).chat("Hello")
        error = caught.value
        assert ("`now`" in error.message) == bool(function.get("name"))
        assert "max_tokens" in str(error.hint)
        assert "service" not in str(error)
        assert error.partial is not None
        assert error.partial.raw is not None
        assert (error.partial.text, error.partial.raw["arguments"]) == ("Let me see.", function["arguments"])
        assert "canary" not in f"{error} {error!r} {error.to_dict()} {error.__cause__} {error.__context__}"

    @pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
    @pytest.mark.parametrize("lines", UNNEEDED.values(), ids=UNNEEDED)
    def test_chat_ignores_odd_fields(
        self, both: Any, fake: FakeOllama, lines: list[dict[str, Any]], stream: bool
    ) -> None:
        fake.script("/api/chat", Answer(lines))
        reply = both.connect("ollama", model=MODEL, host=fake.url).chat("Hello", stream=stream)
        if stream:
            list(reply)
            reply = reply.reply
        assert (reply.text, reply.finish_reason, reply.tool_calls) == ("hi", "stop", ())

    def test_numbers_of_other_types(self, both: Any, fake: FakeOllama) -> None:
        odd = {"total_duration": 1.5e9, "load_duration": "2s", "eval_duration": -1, "eval_count": 2.0}
        fake.script("/api/chat", Answer([line("hi"), {**UNCOUNTED, **odd, "prompt_eval_count": -1}]))
        reply = both.connect("ollama", model=MODEL, host=fake.url).chat("Hello")
        assert (reply.timings.total, reply.timings.load, reply.timings.generation) == (1.5, None, None)
        assert reply.usage == Usage(output_tokens=2)

    @pytest.mark.parametrize("lines", GENERATED.values(), ids=GENERATED)
    def test_generate_ignores_odd_fields(self, both: Any, fake: FakeOllama, lines: list[dict[str, Any]]) -> None:
        fake.script("/api/generate", Answer(lines))
        reply = both.connect("ollama", model=MODEL, host=fake.url).generate("Hello")
        assert (reply.text, reply.finish_reason) == ("hi", "stop")

    @pytest.mark.parametrize(
        ("word", "allowed", "wanted"),
        [({"done_reason": ""}, 4, "stop"), ({}, 2, "length"), ({"done_reason": None}, None, "stop")],
        ids=str,
    )
    def test_missing_done_reason_of_older_servers(
        self, both: Any, fake: FakeOllama, word: dict[str, Any], allowed: int | None, wanted: str
    ) -> None:
        fake.script("/api/chat", Answer([line("hi"), line("", done=True, eval_count=2, **word)]))
        llm = both.connect("ollama", model=MODEL, host=fake.url)
        assert llm.chat("Hello", max_tokens=allowed).finish_reason == wanted

    @pytest.mark.parametrize("odd", ODD_MODELS.values(), ids=ODD_MODELS)
    @pytest.mark.parametrize(("operation", "path"), [("models", "/api/tags"), ("loaded", "/api/ps")])
    def test_odd_model_spares_the_list(
        self, both: Any, fake: FakeOllama, operation: str, path: str, odd: dict[str, Any]
    ) -> None:
        good = {"name": "a:1b", "size": 7.0, "context_length": 4096.0, "details": {"context_length": 4096.0}}
        fake.script(path, Answer([{"models": [good, {"name": "b:1b", **odd}, {"name": None}, None, 7]}]))
        first, second = getattr(both.connect("ollama", host=fake.url), operation)()
        assert (first.name, first.size, first.context_window) == ("a:1b", 7, 4096)
        assert (second.name, second.digest, second.size, second.context_window) == ("b:1b", None, None, None)

    def test_show_leaves_odd_fields_out(self, both: Any, fake: FakeOllama) -> None:
        info = {"general.architecture": "llama", "llama.context_length": 4096.0}
        tensors = [{"name": "a", "type": "F32", "shape": [2.0, 3]}, {"name": "b", "shape": None}, None]
        odd: dict[str, Any] = {"modelfile": None, "template": 7, "system": [], "license": ["MIT"], "modified_at": 7}
        odd |= {"details": [], "capabilities": ["completion", None, 5]}
        fake.script("/api/show", Answer([{**odd, "model_info": info, "tensors": tensors}]))
        found = both.connect("ollama", model=MODEL, host=fake.url).show()
        assert (found.architecture, found.context_window, found.family) == ("llama", 4096, None)
        assert (found.tensors, found.size) == ({"a": (2, 3)}, None)
        assert found.features == {"chat", "generate", "structured_output", "logprobs"}

    @pytest.mark.parametrize("inputs", [["word " * 300], ["Hi", "word " * 300]], ids=["one", "several"])
    def test_cut_input_warns(self, both: Any, fake: FakeOllama, inputs: list[str]) -> None:
        vectors = [[1.0, 2.0]] * len(inputs)
        fake.script("/api/embed", Answer([{"embeddings": vectors, "prompt_eval_count": 255 + len(inputs)}]))
        (warning,) = both.connect("ollama", model=MODEL, host=fake.url).embed(inputs, context_window=256).warnings
        assert "An input was probably cut to fit the context window of 256 tokens" in warning

    def test_protocol_error_hides_content(self, both: Any, fake: FakeOllama) -> None:
        broken = line("canary-in-the-answer")
        broken["message"] = [broken["message"]]
        fake.script("/api/chat", Answer([broken]))
        with pytest.raises(ProtocolError) as caught:
            both.connect("ollama", model=MODEL, host=fake.url).chat("Hello")
        assert caught.value.details["reason"] == "AttributeError"
        assert "canary" not in f"{caught.value!r} {caught.value.details}"


# --- Connections -----------------------------------------------------------------------------------------------------

CHUNKS = CHUNKED + chunk(BODY)
SURPLUS = measured(json.dumps(line("evil", done=True, done_reason="stop")).encode())


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def kept(*pieces: bytes) -> Answer:
    """Raw bytes, after which the server waits for the next request."""
    return Answer(pieces, raw=b"", ending="keep")


class Asking:
    """A connection whose chat runs one function with the HTTP toolkit."""

    def __init__(self, url: str, ask: Callable[[Any, Any], Awaitable[Any]], request: Any) -> None:
        self.http = request.http(url)
        self.ask = ask

    @hookimpl
    async def chat(self, request: Any) -> AsyncIterator[Chunk]:
        await self.ask(self.http, request.call)
        yield Chunk(finish_reason="stop")


REUSED: dict[str, Answer] = {
    "chunked": Answer(WHOLE),
    "measured": Answer(WHOLE, framing="length"),
    "bytewise": kept(*bytewise(CHUNKS + END)),
    "trailers": kept(CHUNKS + b"0\r\nx-sum: 1\r\nx-b: 2\r\n\r\n"),
    "chunk extensions": kept(CHUNKED + chunk(BODY, b';a="b;c";d') + b"0;e\r\n\r\n"),
    "a size in capitals, with zeros": kept(CHUNKED + b"00%X\r\n%s\r\n" % (len(BODY), BODY) + END),
    "100 before it": kept(CONTINUE + CHUNKS + END),
    "103 before it": kept(HINTS, CHUNKS + END),
    "many before it": kept((CONTINUE + HINTS) * 10 + measured(BODY)),
}


SINGLE: dict[str, Answer] = {
    "close": Answer(WHOLE, headers={"connection": "close"}),
    "close in capitals": Answer(WHOLE, headers={"connection": "Close"}),
    "close among others": Answer(WHOLE, headers={"connection": "x-a, close"}),
    "http10": kept(measured(BODY).replace(b"HTTP/1.1", b"HTTP/1.0")),
    "no framing": Answer(WHOLE, framing="none"),
}


STALE: dict[str, Answer] = {
    "closed": Answer(WHOLE, framing="length", ending="close"),
    "reset": Answer(WHOLE, framing="length", ending="reset"),
    "closed after chunks": Answer(raw=CHUNKS + END, ending="close"),
    "closed after a timeout response": Answer(
        [b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\n\r\n"], raw=measured(BODY), delay=0.05, ending="close"
    ),
}


BEYOND: dict[str, Answer] = {
    "after a length": kept(measured(BODY) + SURPLUS),
    "after chunks": kept(CHUNKS + END + SURPLUS),
    "after trailers": kept(CHUNKS + b"0\r\nx-sum: 1\r\n\r\n" + SURPLUS),
    "half of one": kept(measured(BODY) + SURPLUS[:-9]),
    "garbage": kept(measured(BODY) + b"\0" * 99),
    "in a later packet": Answer([SURPLUS], raw=measured(BODY), delay=0.05, ending="close"),
}


BODILESS: dict[str, tuple[str, bytes]] = {
    "a head with a length": ("HEAD", HEAD + b"content-length: 5\r\n\r\n"),
    "a head with chunks": ("HEAD", CHUNKED),
    "a head with neither": ("HEAD", HEAD + b"\r\n"),
    "a head after hints": ("HEAD", HINTS + CHUNKED),
    "no content": ("GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
    "no content with a length": ("GET", b"HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\n"),
    "a length of zero": ("GET", measured(b"")),
}


def leave_by_break(stream: Any) -> None:
    with stream:
        for _ in stream:
            break


def leave_by_close(stream: Any) -> None:
    next(stream)
    stream.close()


def leave_to_garbage_collection(stream: Any) -> None:
    next(stream)


REFUSALS: dict[str, Answer] = {
    "with words": error("something odd"),
    "with a page": plain("<html>No</html>", 500, "text/html"),
    "longer than the limit": Answer([b"y" * 2**20] * 4, status=500),
    "without a body": Answer([], status=404, framing="length"),
    "without end": Answer(repeat(b"y" * 1000), status=400),
    "redirect": redirect(302, "https://example.org/"),
    "by another service": plain("<html>Sign in</html>", 200, "text/html"),
    "in the first line": Answer([{"error": "odd"}]),
    "by nonsense": Answer([b"{nonsense}\n", *[b"y" * 2**20] * 4]),
}


FLOODS: dict[str, Answer] = {
    "status line": Answer(repeat(b"H" * 1000), raw=b"HTTP/1.1 200 "),
    "empty lines": Answer(repeat(b"\r\n" * 1000), raw=b""),
    "hints": Answer(repeat(HINTS * 100), raw=b""),
    "a header": Answer(repeat(b"y" * 1000), raw=HEAD + b"x-a: "),
    "headers": Answer(repeat(b"x-a: y\r\n" * 100), raw=HEAD),
    "a chunk size": Answer(repeat(b"0" * 1000), raw=CHUNKED),
    "a chunk extension": Answer(repeat(b"x" * 1000), raw=CHUNKED + b"5;"),
    "tiny chunks": Answer(repeat(chunk(b" ") * 1000), raw=CHUNKED),
    "a trailer": Answer(repeat(b"x" * 1000), raw=CHUNKED + b"0\r\n"),
    "trailers": Answer(repeat(b"x: y\r\n" * 100), raw=CHUNKED + b"0\r\n"),
    "a line": Answer(repeat(b"y" * 1000), framing="none"),
    "blank lines": Answer(repeat(b"\n" * 1000), framing="none"),
    "lines": Answer(repeat(raw_text("") * 10), framing="none"),
    "an error": Answer(repeat(b"y" * 1000), framing="none", status=500),
}


class Watched(type(Path())):  # type: ignore[misc]
    """A path that remembers its open files."""

    def open(self, *arguments: Any, **named: Any) -> Any:
        self.__dict__.setdefault("opened", []).append(super().open(*arguments, **named))
        return self.opened[-1]


LARGE = 16 << 20
"""More bytes than socket buffers hold."""
TOO_LARGE = error("the request is too large", 413)
EARLY: dict[str, tuple[Answer, tuple[type[ProviderError], ...]]] = {
    "answers and continues reading": (replace(TOO_LARGE, ending="stall"), (RequestRejected,)),
    "answers and closes": (TOO_LARGE, (RequestRejected, ConnectionFailed)),
    "answers and waits": (
        replace(TOO_LARGE, chunks=[*TOO_LARGE.chunks, threading.Event()]),
        (RequestRejected, ProviderTimeout),
    ),
    "closes": (Answer(raw=b"", ending="close"), (ConnectionFailed,)),
    "resets": (Answer(raw=b"", ending="reset"), (ConnectionFailed,)),
    "reads nothing": (Answer([threading.Event()], raw=b""), (ProviderTimeout,)),
}


class TestConnections:
    @pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
    @pytest.mark.parametrize("answer", REUSED.values(), ids=REUSED)
    def test_calls_share_one_connection(self, both: Any, fake: FakeOllama, answer: Answer, stream: bool) -> None:
        fake.script("/api/chat", *[answer] * 3)
        llm = both.connect("ollama", model=MODEL, host=fake.url, timeouts=CALM, attempts=1)
        for _ in range(3):
            found = in_time(both, lambda: read(llm.chat("Hi", stream=True)) if stream else llm.chat("Hi"))
            assert found.text == "Hello world"
        assert fake.accepted == 1

    @pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
    @pytest.mark.parametrize("answer", SINGLE.values(), ids=SINGLE)
    def test_single_use_connection(self, both: Any, fake: FakeOllama, answer: Answer, stream: bool) -> None:
        fake.script("/api/chat", *[answer] * 3)
        llm = both.connect("ollama", model=MODEL, host=fake.url, timeouts=CALM, attempts=1)
        for _ in range(3):
            found = in_time(both, lambda: read(llm.chat("Hi", stream=True)) if stream else llm.chat("Hi"))
            assert found.text == "Hello world"
        assert fake.accepted == 3
        assert soon(lambda: fake.open_connections == 0)

    @pytest.mark.parametrize("answer", STALE.values(), ids=STALE)
    def test_closed_idle_connection_costs_no_attempt(self, both: Any, fake: FakeOllama, answer: Answer) -> None:
        fake.script("/api/chat", *[answer] * 2)
        llm = both.connect("ollama", model=MODEL, host=fake.url, timeouts=CALM, attempts=1)
        for text in ("Hello world", "Hello world", "mended"):
            assert in_time(both, lambda: llm.chat("Hi")).text == text
            assert text == "mended" or soon(lambda: fake.open_connections == 0)
        assert len(fake.requests) == 3

    def test_closing_reused_connection_costs_one_attempt(self, both: Any, fake: FakeOllama) -> None:
        fake.script("/api/chat", Answer(WHOLE), Answer(raw=b"", ending="close"))
        llm = both.connect("ollama", model=MODEL, host=fake.url, timeouts=CALM, attempts=2)
        assert [in_time(both, lambda: llm.chat("Hi")).text for _ in range(2)] == ["Hello world", "mended"]
        assert len(fake.requests) == 3

    @pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
    @pytest.mark.parametrize("answer", BEYOND.values(), ids=BEYOND)
    def test_surplus_bytes_never_answer_next_request(
        self, both: Any, fake: FakeOllama, answer: Answer, stream: bool
    ) -> None:
        fake.script("/api/chat", answer)
        llm = both.connect("ollama", model=MODEL, host=fake.url, timeouts=CALM, attempts=1)
        for text in ("Hello world", "mended", "mended"):
            found = in_time(both, lambda: read(llm.chat("Hi", stream=True)) if stream else llm.chat("Hi"))
            assert found.text == text
            assert answer.ending == "keep" or text == "mended" or soon(lambda: fake.open_connections == 0)

    @pytest.mark.parametrize("surplus", [b"", SURPLUS], ids=["", "with a body"])
    @pytest.mark.parametrize(("method", "head"), BODILESS.values(), ids=BODILESS)
    def test_bodiless_response_ends_with_head(
        self, both: Any, fake: FakeOllama, method: str, head: bytes, surplus: bytes
    ) -> None:
        found: list[dict[str, Any]] = []

        async def ask(http: Any, call: Any) -> None:
            found.append(await http.json("GET" if found else method, "/api/version", call=call, empty=True))

        fake.script("/api/version", kept(head + surplus))
        llm = both.connect(Giving(partial(Asking, fake.url, ask)), model=MODEL, timeouts=CALM, attempts=1)
        for _ in range(3):
            in_time(both, lambda: llm.chat("Hi"))
        assert found == [{}, *[{"version": fake.version}] * 2]
        # A response without length or chunks cannot be followed by another.
        assert surplus or fake.accepted == 1 or head == HEAD + b"\r\n"

    @pytest.mark.parametrize(
        "answer", [Answer([FIRST], ending="stall"), Answer(repeat(FIRST))], ids=["stalls", "goes on"]
    )
    @pytest.mark.parametrize("leave", [leave_by_break, leave_by_close, leave_to_garbage_collection])
    def test_dropped_stream_frees_slot_and_socket(
        self, both: Any, fake: FakeOllama, leave: Callable[[Any], None], answer: Answer
    ) -> None:
        fake.script("/api/chat", *[answer] * 3)
        llm = both.connect("ollama", model=MODEL, host=fake.url, timeouts=CALM, attempts=1, concurrency=1)
        for _ in range(3):
            in_time(both, lambda: leave(llm.chat("Hi", stream=True)))
            assert soon(lambda: llm.stats().running == 0)
            assert soon(lambda: fake.open_connections == 0)
        assert in_time(both, lambda: llm.chat("Hi")).text == "mended"
        assert fake.accepted == 4

    @pytest.mark.parametrize("answer", REFUSALS.values(), ids=REFUSALS)
    def test_refusals_leave_no_sockets(self, both: Any, fake: FakeOllama, answer: Answer) -> None:
        fake.script("/api/chat", *[answer] * 8)
        llm = both.connect("ollama", model=MODEL, host=fake.url, timeouts=CALM, attempts=1)
        for _ in range(8):
            failure(both, lambda: llm.chat("Hi"))
            assert soon(lambda: fake.open_connections <= 1)  # One is kept open.
        assert llm.chat("Hi").text == "mended"
        assert llm.stats().running == 0

    @pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
    @pytest.mark.parametrize("answer", FLOODS.values(), ids=FLOODS)
    def test_flood_ends_in_typed_error(self, both: Any, fake: FakeOllama, answer: Answer, stream: bool) -> None:
        fake.script("/api/chat", answer)
        llm = both.connect("ollama", model=MODEL, host=fake.url, timeouts=SHORTER, attempts=1)
        found = failure(both, lambda: read(llm.chat("Hi", stream=True)) if stream else llm.chat("Hi"))
        assert isinstance(found, ProviderTimeout | ProtocolError | StreamInterrupted | InferenceFailed)
        assert soon(lambda: fake.open_connections == 0)
        assert llm.stats().running == 0

    @pytest.mark.parametrize("kind", ["text", "file"])
    @pytest.mark.parametrize("early", EARLY.values(), ids=EARLY)
    def test_early_response_to_large_request(
        self,
        both: Any,
        fake: FakeOllama,
        tmp_path: Path,
        early: tuple[Answer, tuple[type[ProviderError], ...]],
        kind: str,
    ) -> None:
        answer, errors = early
        file = Watched(tmp_path / "large")
        with file.open("wb") as made:
            made.truncate(LARGE)

        async def ask(http: Any, call: Any) -> None:
            if kind == "file":
                await http.upload("/x", file, call=call)
            else:
                await http.json("POST", "/x", {"text": "x" * LARGE}, call=call)

        fake.script("/x", replace(answer, early=True))
        timeouts = SHORT if ProviderTimeout in errors else CALM
        llm = both.connect(Giving(partial(Asking, fake.url, ask)), model=MODEL, timeouts=timeouts, attempts=1)
        assert type(failure(both, lambda: llm.chat("Hi"))) in errors
        assert llm.stats().running == 0
        assert soon(lambda: all(each.closed for each in file.opened))

    @pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
    def test_ipv6(self, both: Any) -> None:
        with FakeOllama(reply="mended", address="::1") as fake:
            llm = both.connect("ollama", model=MODEL, host=fake.url, timeouts=CALM, attempts=1)
            assert [in_time(both, lambda: llm.chat("Hi")).text for _ in range(2)] == ["mended"] * 2
            assert [seen.headers["host"] for seen in fake.requests] == [fake.url.removeprefix("http://")] * 2
            assert fake.accepted == 1
