"""How servers deviate from OpenAI's API, as reports about them describe it, and what a caller sees."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from graftage.exceptions import (
    AuthenticationFailed,
    CapabilityUnsupported,
    ContextOverflow,
    InferenceFailed,
    ModelNotFound,
    Overloaded,
    ProtocolError,
    ProviderError,
    QuotaExceeded,
    RequestRejected,
    StreamInterrupted,
)
from graftage.types import Timeouts
from graftage_ollama.testing import Answer, FakeOllama
from graftage_openai._convert import Learned

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

CHAT = "/v1/chat/completions"
EMBED = "/v1/embeddings"
TOOL = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
PARIS = ("weather", {"city": "Paris"})
ROME = ("weather", {"city": "Rome"})


@pytest.fixture
def connect(both: Any, fake: FakeOllama) -> Callable[..., Any]:
    return lambda **given: both.connect("openai", **{"model": "m", "host": f"{fake.url}/v1", "attempts": 1, **given})


def sent(fake: FakeOllama) -> list[Any]:
    """Return the bodies of the requests, without the questions about the server."""
    return [seen.body for seen in fake.requests if seen.method == "POST"]


def event(data: Any, head: bytes = b"") -> bytes:
    return b"%sdata: %s\n\n" % (head, json.dumps(data).encode())


def part(reason: str | None = None, /, **delta: Any) -> bytes:
    return event({"id": "c1", "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})


def calling(*fragments: Mapping[str, Any], reason: str | None = None) -> bytes:
    return part(reason, tool_calls=list(fragments))


def piece(arguments: Any = None, /, name: str | None = None, **more: Any) -> dict[str, Any]:
    """A part of a tool call."""
    given = {"name": name, "arguments": arguments}
    return {**more, "function": {key: value for key, value in given.items() if value is not None}}


def usage(read: int, written: int, **more: Any) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": read, "completion_tokens": written, **more}}


def found(*choices: Any, **more: Any) -> bytes:
    return event({"id": "c1", "model": "m", "choices": list(choices), **more})


def block(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def streamed(*events: bytes, **more: Any) -> Answer:
    return Answer(events, headers={"content-type": "text/event-stream"}, **more)


def refused(status: int, body: Any, **headers: str) -> Answer:
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    return Answer([data], status=status, headers={"content-type": "application/json", **headers})


DONE = b"data: [DONE]\n\n"
HELLO = part(role="assistant", content="Hello")
STOP = part("stop")
CALLED = part("tool_calls")
TEXT = b"".join([HELLO, STOP, DONE])


def bytewise(body: bytes) -> tuple[bytes, ...]:
    return tuple(body[place : place + 1] for place in range(len(body)))


NAMED = piece("", "weather", index=0, id="a")
WHOLE = piece('{"city": "Paris"}', "weather", index=0)
CALLS: dict[str, tuple[list[bytes | list[dict[str, Any]]], list[Any]]] = {
    "fragments": ([[NAMED], [piece('{"city": "Pa', index=0)], [piece('ris"}', index=0)]], [PARIS]),
    "interleaved": (
        [
            [piece('{"city"', "weather", index=0, id="a"), piece('{"city": ', "weather", index=1, id="b")],
            [piece('"Rome"}', index=1), piece(': "Paris"}', index=0)],
        ],
        [PARIS, ROME],
    ),
    "no index": ([[piece('{"city": "Pa', "weather", id="a")], [piece('ris"}')]], [PARIS]),
    "no index, two in turn": (
        [
            *([piece('{"city": ', "weather", id="a")], [piece('"Paris"}')]),
            *([piece('{"city": ', "weather", id="b")], [piece('"Rome"}')]),
        ],
        [PARIS, ROME],
    ),
    "no index, by id": (
        [
            [piece('{"city"', "weather", id="a"), piece('{"city": ', "weather", id="b")],
            [piece(': "Paris"}', id="a"), piece('"Rome"}', id="b")],
        ],
        [PARIS, ROME],
    ),
    "no index and no id": (
        [[piece('{"city": "Paris"}', "weather")], [piece('{"city": "Rome"}', "weather")]],
        [PARIS, ROME],
    ),
    "no index, together": (
        [[piece('{"city": "Paris"}', "weather"), piece('{"city": "Rome"}', "weather")]],
        [PARIS, ROME],
    ),
    "index 0 for each": (
        [[{**WHOLE, "id": "a"}], [piece('{"city": "Rome"}', "weather", index=0, id="b")]],
        [PARIS, ROME],
    ),
    "a new id in each": (
        [[piece('{"city": ', "weather", index=0, id="a")], [piece('"Paris"}', index=0, id="b")]],
        [PARIS],
    ),
    "names empty later": ([[NAMED], [piece('{"city": "Paris"}', "", index=0, id="", type="function")]], [PARIS]),
    "names null later": (
        [[NAMED], [{"index": 0, "id": None, "function": {"name": None, "arguments": '{"city": "Paris"}'}}]],
        [PARIS],
    ),
    "an empty list in each": (
        [part(content="", tool_calls=[]), [WHOLE], part(content="", tool_calls=[]), part("stop", tool_calls=[])],
        [PARIS],
    ),
    "null in each": ([part(content=None, tool_calls=None), [WHOLE], part(content=None, tool_calls=None)], [PARIS]),
    "an object, no list": ([part(tool_calls=piece({"city": "Paris"}, "weather")), part("eos_token")], [PARIS]),
    "arguments an object": ([[piece({"city": "Paris"}, "weather", index=0)]], [PARIS]),
    "arguments encoded twice": ([[piece(json.dumps('{"city": "Paris"}'), "weather")]], [PARIS]),
    "arguments empty": ([[NAMED]], [("weather", {})]),
    "arguments absent": ([[piece(None, "weather", index=0)]], [("weather", {})]),
    "arguments null": ([[{"index": 0, "function": {"name": "weather", "arguments": None}}]], [("weather", {})]),
    "arguments the word null": ([[piece("null", "weather", index=0)]], [("weather", {})]),
    "the reason stop": ([calling(WHOLE, reason="stop")], [PARIS]),
    "the reason tool_call": ([[WHOLE], part("tool_call")], [PARIS]),
    "the reason length": ([[WHOLE], part("length")], [PARIS]),
    "a byte at a time": ([*bytewise(calling(NAMED) + calling(piece('{"city": "Paris"}', index=0)))], [PARIS]),
}
"""Tool calls in a stream, and what is called."""


class TestCalls:
    @pytest.mark.parametrize("case", CALLS)
    def test_are_joined(self, connect: Any, fake: FakeOllama, case: str) -> None:
        chunks, calls = CALLS[case]
        events = [each if isinstance(each, bytes) else calling(*each) for each in chunks]
        fake.script(CHAT, streamed(*events, CALLED if "reason" not in case else b"", DONE))
        reply = connect().chat("Hi", tools=[TOOL])
        assert [(call.name, call.arguments) for call in reply.tool_calls] == calls
        assert len({call.id for call in reply.tool_calls if call.id}) == len(calls)
        assert reply.finish_reason == ("length" if "length" in case else "tool_calls")
        assert reply.text == ""

    def test_repeated_id_gets_a_new_name(self, connect: Any, fake: FakeOllama) -> None:
        events = [
            calling({**piece("{}", index=place, id="same"), "function": {"name": "add", "arguments": "{}"}})
            for place in (0, 1)
        ]
        fake.script(CHAT, streamed(*events, CALLED, DONE))
        first, second = connect().chat("Hi", tools=[TOOL]).tool_calls
        assert first.id == "same" != second.id

    def test_first_id_is_kept(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(CHAT, streamed(calling(NAMED), calling(piece("{}", index=0, id="b")), CALLED))
        (call,) = connect().chat("Hi", tools=[TOOL]).tool_calls
        assert call.id == "a"

    @pytest.mark.parametrize("arguments", ['{"ci', "", '{"city": "Par'])
    def test_cut_call_is_an_error(self, connect: Any, fake: FakeOllama, arguments: str) -> None:
        fake.script(CHAT, streamed(HELLO, calling(piece(arguments, "weather", index=0)), part("length"), DONE))
        with pytest.raises(InferenceFailed, match="max_tokens") as caught:
            connect().chat("Hi", tools=[TOOL])
        assert caught.value.partial is not None

    def test_calls_in_the_text_stay_text(self, connect: Any, fake: FakeOllama) -> None:
        said = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
        fake.script(CHAT, streamed(part(content=said), part("tool_calls"), DONE))
        reply = connect().chat("Hi", tools=[TOOL])
        assert (reply.text, reply.tool_calls, reply.finish_reason) == (said, (), "stop")


SPLIT = ("<", "th", "ink>", "S", "o<", "/thi", "nk", ">", "\n", "\nHel", "lo")
THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "So"}]}
REPLIES: dict[str, tuple[list[bytes], dict[str, Any]]] = {
    "no [DONE]": ([HELLO, STOP], {}),
    "comments": ([b": OPENROUTER PROCESSING\n\n", HELLO, b":\n\n", STOP, b": keepalive 1/1\n\n", DONE], {}),
    "a byte at a time": ([*bytewise(b"\xef\xbb\xbf" + TEXT.replace(b"\n", b"\r\n"))], {}),
    "all at once": ([TEXT], {}),
    "ids and names": ([b"id: 1\nevent: message\n" + HELLO, b"retry: 5\n" + STOP, DONE], {}),
    "names without data": ([b"event: error\n\n", HELLO, b"id: 2\n\n", STOP, DONE], {}),
    "choices empty": ([found(prompt_filter_results=[{"prompt_index": 0}]), HELLO, STOP, DONE], {}),
    "choices absent": ([event({"x_groq": {"id": "r"}}), HELLO, STOP, event({"timings": {}}), DONE], {}),
    "choices null": ([HELLO, event({"choices": None}), STOP, DONE], {}),
    "delta null": ([HELLO, found({"delta": None}), found({"delta": None, "finish_reason": "stop"}), DONE], {}),
    "delta absent": ([HELLO, found({"finish_reason": "stop"}), DONE], {}),
    "content null": ([part(role="assistant", content=None), HELLO, part("stop", content=None), DONE], {}),
    "the reason with the text": ([part(content="Hel"), part("stop", content="lo"), DONE], {}),
    "the reason empty in each": ([part("", content="Hel"), part("", content="lo"), STOP, DONE], {}),
    "the reason eos": ([HELLO, part("eos"), DONE], {}),
    "the reason eos_token": ([HELLO, part("eos_token"), DONE], {}),
    "the reason tool_calls without any": ([HELLO, CALLED, DONE], {}),
    "the reason error": ([HELLO, part("error"), DONE], {"finish_reason": "other"}),
    "an unknown reason": ([HELLO, part("banana"), DONE], {"finish_reason": "other"}),
    "the reason length": ([HELLO, part("length"), DONE], {"finish_reason": "length"}),
    "refusal": ([part(refusal="Hello"), STOP, DONE], {"finish_reason": "content_filter"}),
    "logprobs null": ([found({"delta": {"content": "Hello"}, "logprobs": None}), STOP, DONE], {}),
    "created a float": ([found({"delta": {"content": "Hello"}}, created=1.5), STOP, DONE], {}),
    "no id and no model": ([b'data: {"choices": [{"delta": {"content": "Hello"}}]}\n\n', STOP, DONE], {}),
    "error null": ([found({"delta": {"content": "Hello"}}, error=None), STOP, DONE], {}),
    "usage never": ([HELLO, STOP, DONE], {"usage": None}),
    "usage last": ([HELLO, STOP, found(**usage(3, 1)), DONE], {"usage": (3, 1)}),
    "usage with the reason": ([HELLO, found({"finish_reason": "stop"}, **usage(3, 1)), DONE], {"usage": (3, 1)}),
    "usage in each": (
        [
            *(found({"delta": {"content": text}}, **usage(3, n)) for n, text in ((1, "Hel"), (2, "lo"))),
            *(STOP, found(**usage(3, 2)), DONE),
        ],
        {"usage": (3, 2)},
    ),
    "usage in each but the last": (
        [found({"delta": {"content": "Hello"}}, **usage(3, 1)), found({"finish_reason": "stop"}, usage=None), DONE],
        {"usage": (3, 1)},
    ),
    "usage null": ([found({"delta": {"content": "Hello"}}, usage=None), STOP, DONE], {"usage": None}),
    "reasoning": ([part(reasoning="So"), HELLO, STOP, DONE], {"thinking": "So"}),
    "reasoning_content": ([part(reasoning_content="So", content=None), HELLO, STOP, DONE], {"thinking": "So"}),
    "reasoning in both fields": ([part(reasoning="So", reasoning_content="So"), HELLO, STOP], {"thinking": "So"}),
    "reasoning in blocks": (
        [part(content=[THOUGHT]), part(content=[block("Hel")]), part("stop", content="lo")],
        {"thinking": "So"},
    ),
    "content in blocks": ([part(content=[block("Hel"), block("lo")]), STOP], {}),
    "tags": ([part(content="<think>\nSo</think>\n\nHello"), STOP], {"thinking": "\nSo"}),
    "tags in pieces": ([*(part(content=each) for each in SPLIT), STOP], {"thinking": "So"}),
    "a tag that is none": ([part(content="<"), part(content="thin ice"), STOP], {"text": "<thin ice"}),
    "a tag in the middle": ([part(content="Hello <think>"), STOP], {"text": "Hello <think>"}),
    "a tag cut short": ([part(content="<thi"), STOP], {"text": "<thi"}),
    "a list of texts": ([part(content=["Hel", block("lo")]), STOP], {}),
    "a text beside a refusal": ([part(content="Hel", refusal="lo"), STOP], {"finish_reason": "content_filter"}),
    "two different thoughts": (
        [part(reasoning="So", reasoning_content=" it is"), HELLO, STOP],
        {"thinking": "So it is"},
    ),
    "a thought without an answer": (
        [part(content="<think>So"), part("length")],
        {"text": "", "thinking": "So", "finish_reason": "length"},
    ),
}
"""Replies in a stream, and how they differ from a plain `Hello`."""


class TestReplies:
    @pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
    @pytest.mark.parametrize("case", REPLIES)
    def test_are_read(self, connect: Any, fake: FakeOllama, case: str, *, stream: bool) -> None:
        events, differs = REPLIES[case]
        fake.script(CHAT, streamed(*events))
        reply = connect().chat("Hi", stream=stream)
        if stream:
            said = "".join(chunk.text for chunk in reply)
            reply = reply.reply
            assert said == reply.text
        expected = {"text": "Hello", "thinking": "", "finish_reason": "stop", "warnings": (), **differs}
        counts = expected.pop("usage", None) or (None, None)
        assert {name: getattr(reply, name) for name in expected} == expected
        if "usage" in case:
            assert (reply.usage.input_tokens, reply.usage.output_tokens) == counts

    @pytest.mark.parametrize("ending", ["close", "reset", "stall"])
    def test_are_whole_with_a_reason(self, connect: Any, fake: FakeOllama, ending: Any) -> None:
        fake.script(CHAT, streamed(HELLO, STOP, ending=ending))
        reply = connect(timeouts=Timeouts(idle=0.2)).chat("Hi")
        assert (reply.text, reply.finish_reason) == ("Hello", "stop")

    def test_details_of_usage_are_read(self, connect: Any, fake: FakeOllama) -> None:
        details = {"prompt_tokens_details": {"cached_tokens": 2}, "completion_tokens_details": {"reasoning_tokens": 1}}
        fake.script(CHAT, streamed(HELLO, STOP, found(**usage(3, 1, **details)), DONE))
        read = connect().chat("Hi").usage
        assert (read.cached_tokens, read.reasoning_tokens) == (2, 1)

    def test_headers_are_kept(self, connect: Any, fake: FakeOllama) -> None:
        headers = {"x-request-id": "r1", "x-ratelimit-remaining-tokens": "9", "content-type": "text/event-stream"}
        fake.script(CHAT, Answer([TEXT], headers=headers))
        reply = connect().chat("Hi")
        assert (reply.request_id, reply.rate_limits) == ("r1", {"x-ratelimit-remaining-tokens": "9"})

    def test_body_may_end_with_the_connection(self, connect: Any, fake: FakeOllama) -> None:
        head = b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
        fake.script(CHAT, *(Answer([each], raw=head, ending="close") for each in (TEXT, HELLO, TEXT)))
        llm = connect()
        assert llm.chat("Hi").text == "Hello"
        with pytest.raises(StreamInterrupted):
            llm.chat("Hi")
        assert llm.chat("Hi").text == "Hello"

    def test_another_model_is_named(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(CHAT, streamed(TEXT.replace(b'"model": "m"', b'"model": "other"')))
        reply = connect(profile="llama-server").chat("Hi")
        assert reply.model == "other"
        assert "`other`" in reply.warnings[0]


CUT: dict[str, tuple[bytes, ...]] = {
    "no reason": (HELLO, DONE),
    "no reason and no [DONE]": (HELLO,),
    "reason null": (HELLO, part(None), DONE),
    "reason empty": (HELLO, part(""), DONE),
    "an empty chunk without a model": (HELLO, event({"model": "", "choices": [{"delta": {"content": ""}}]})),
    "half an event": (HELLO, STOP[:30]),
}
MID: dict[str, tuple[bytes, type[ProviderError], str]] = {
    "object": (event({"error": {"message": "It broke", "type": "server_error"}}), InferenceFailed, "It broke"),
    "text": (event({"error": "It broke"}), InferenceFailed, "It broke"),
    "list": (event({"error": ["It broke"]}), InferenceFailed, "It broke"),
    "an event's name": (event({"message": "It broke"}, b"event: error\n"), InferenceFailed, "It broke"),
    "an event's name and text": (b"event: error\ndata: It broke\n\n", InferenceFailed, "It broke"),
    "a status as a number": (event({"error": {"code": 503, "message": "It broke"}}), Overloaded, "It broke"),
    "a status as text": (event({"error": {"code": "429", "message": "Slow"}}), Overloaded, "Slow"),
    "beside choices": (
        found(
            {"delta": {"content": ""}, "finish_reason": "error"}, error={"code": "server_error", "message": "It broke"}
        ),
        InferenceFailed,
        "It broke",
    ),
    "quoted": (
        event({"error": {"code": 502, "message": "Provider returned error", "metadata": {"raw": "It broke"}}}),
        ProviderError,
        "It broke",
    ),
    "a bare object": (b'{"error": {"message": "It broke"}}\n', InferenceFailed, "It broke"),
    "too late for another form": (
        event({"error": {"code": 400, "message": "stream_options is not supported"}}),
        RequestRejected,
        "stream_options",
    ),
    "used up": (event({"error": {"message": "insufficient_quota"}}), QuotaExceeded, "insufficient"),
    "the window": (event({"error": {"message": "maximum context length is 9"}}), ContextOverflow, "context"),
}


class TestCutStreams:
    @pytest.mark.parametrize("ending", ["end", "close"])
    @pytest.mark.parametrize("case", CUT)
    def test_keep_their_text(self, connect: Any, fake: FakeOllama, case: str, ending: Any) -> None:
        fake.script(CHAT, streamed(*CUT[case], ending=ending))
        with pytest.raises((StreamInterrupted, InferenceFailed)) as caught:
            connect(attempts=3).chat("Hi")
        assert caught.value.partial is not None
        assert caught.value.partial.text == "Hello"
        assert len(sent(fake)) == 1

    @pytest.mark.parametrize("case", MID)
    def test_errors_in_events_are_typed(self, connect: Any, fake: FakeOllama, case: str) -> None:
        broken, kind, words = MID[case]
        fake.script(CHAT, streamed(HELLO, broken, STOP, DONE))
        with pytest.raises(kind, match=words) as caught:
            connect(attempts=3).chat("Hi")
        assert caught.value.partial is not None
        assert caught.value.partial.text == "Hello"
        assert not caught.value.retryable
        assert len(sent(fake)) == 1

    @pytest.mark.parametrize("case", ["a status as a number", "a status as text"])
    def test_errors_before_the_first_are_retried(self, connect: Any, fake: FakeOllama, case: str) -> None:
        fake.script(CHAT, streamed(b": ping\n\n", MID[case][0]), streamed(TEXT))
        assert connect(attempts=2).chat("Hi").text == "Hello"


HTML = "<html><h1>Welcome</h1></html>"
ERRORS: dict[str, tuple[Answer, type[ProviderError], str]] = {
    "text": (refused(400, {"error": "It is wrong"}), RequestRejected, "It is wrong"),
    "flat": (refused(400, {"object": "error", "message": "It is wrong", "code": 400}), RequestRejected, "It is wrong"),
    "a list": (refused(400, [{"error": {"code": 400, "message": "It is wrong"}}]), RequestRejected, "It is wrong"),
    "nested": (
        refused(400, {"error": {"message": json.dumps({"error": {"message": "It is wrong"}})}}),
        RequestRejected,
        "It is wrong",
    ),
    "Mistral's 422": (
        refused(422, {"object": "error", "message": {"detail": [{"msg": "Extra", "loc": ["body", "n"]}]}}),
        RequestRejected,
        r"Extra: body\.n",
    ),
    "OpenRouter's quote": (
        refused(400, {"error": {"message": "odd", "metadata": {"raw": '{"error": "It is wrong"}'}}}),
        RequestRejected,
        "It is wrong",
    ),
    "Groq's broken call": (
        refused(400, {"error": {"message": "Failed to call a function.", "code": "tool_use_failed"}}),
        InferenceFailed,
        "Failed to call",
    ),
    "a page": (refused(404, HTML, **{"content-type": "text/html"}), ProviderError, "404"),
    "a page with 200": (refused(200, HTML, **{"content-type": "text/html"}), ProtocolError, "web page"),
    "plain text with 200": (refused(200, "It works!", **{"content-type": "text/plain"}), ProtocolError, "text/plain"),
    "LM Studio's unknown path": (
        refused(200, {"error": "Unexpected endpoint or method. (POST /chat/completions)"}),
        CapabilityUnsupported,
        "Unexpected endpoint",
    ),
    "LM Studio has none": (
        refused(404, {"error": {"message": "No models loaded. Please load a model", "code": None}}),
        ModelNotFound,
        "No models loaded",
    ),
    "a model is unknown": (
        refused(404, {"error": {"message": "The model `m` does not exist", "code": "model_not_found"}}),
        ModelNotFound,
        "does not exist",
    ),
    "a wrong key": (refused(401, {"error": {"message": "Incorrect key"}}), AuthenticationFailed, "Incorrect key"),
    "no tools": (
        refused(400, {"error": {"message": "tool choice requires --enable-auto-tool-choice"}}),
        CapabilityUnsupported,
        "requires",
    ),
    "loading": (refused(503, {"error": {"code": 503, "message": "Loading model"}}), Overloaded, "loading"),
    "a completion": (Answer([{"choices": [{"message": {"content": "Hello"}}]}]), ProtocolError, "not a stream"),
    "nothing": (Answer([], framing="length"), StreamInterrupted, "empty"),
}


class TestErrors:
    @pytest.mark.parametrize("case", ERRORS)
    def test_are_typed_with_their_words(self, connect: Any, fake: FakeOllama, case: str) -> None:
        answer, kind, words = ERRORS[case]
        fake.script(CHAT, answer)
        with pytest.raises(kind, match=words) as caught:
            connect().chat("Hi")
        assert caught.value.hint
        assert caught.value.partial is None
        assert HTML not in str(caught.value)

    @pytest.mark.parametrize(
        ("status", "headers", "tries"),
        [
            (429, {"retry-after": "0"}, 2),
            (429, {"retry-after-ms": "1"}, 2),
            (429, {"x-should-retry": "false"}, 1),
            (409, {"x-should-retry": "true"}, 2),
            (503, {"retry-after": "3600"}, 1),
            (400, {}, 1),
        ],
        ids=str,
    )
    def test_server_says_when_to_try_again(
        self, connect: Any, fake: FakeOllama, status: int, headers: dict[str, str], tries: int
    ) -> None:
        fake.script(CHAT, refused(status, {"error": {"message": "No"}}, **headers), streamed(TEXT))
        llm = connect(attempts=2)
        if tries == 1:
            with pytest.raises(ProviderError):
                llm.chat("Hi")
        else:
            assert llm.chat("Hi").text == "Hello"
        assert len(sent(fake)) == tries


UNSUPPORTED = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
EXTRA = {"type": "extra_forbidden", "loc": ["body", "max_completion_tokens"], "msg": "Extra inputs are not permitted"}
SWAPS: dict[str, tuple[str, int, Any, str]] = {
    "OpenAI's newer models": (
        "max_tokens",
        400,
        {"error": {"message": UNSUPPORTED, "code": "unsupported_parameter"}},
        "max_completion_tokens",
    ),
    "Mistral": (
        "max_completion_tokens",
        422,
        {"message": {"detail": [EXTRA]}},
        "max_tokens",
    ),
}


class TestRequests:
    @pytest.mark.parametrize("case", SWAPS)
    def test_limit_is_swapped_once(self, connect: Any, fake: FakeOllama, case: str) -> None:
        first, status, body, second = SWAPS[case]
        fake.script(CHAT, refused(status, body), streamed(TEXT), streamed(TEXT), refused(status, body))
        llm = connect(profile="openai" if first == "max_completion_tokens" else None)
        for _ in range(2):
            assert llm.chat("Hi", max_tokens=5).text == "Hello"
        with pytest.raises(RequestRejected):
            llm.chat("Hi", max_tokens=5)
        limits = [[name for name in ("max_tokens", "max_completion_tokens") if name in each] for each in sent(fake)]
        assert limits == [[first], [second], [second], [second]]

    def test_refused_value_swaps_nothing(self, connect: Any, fake: FakeOllama) -> None:
        error = {"error": {"message": "max_tokens 99999 is not supported by this model: the most is 4096"}}
        fake.script(CHAT, refused(400, error))
        with pytest.raises(RequestRejected):
            connect().chat("Hi", max_tokens=99999)
        assert len(sent(fake)) == 1

    def test_calls_at_once_are_all_swapped(self) -> None:
        learned, bodies = Learned(), [{"max_tokens": 5}, {"max_tokens": 6}]
        error = RequestRejected(UNSUPPORTED, status=400, details={"server_message": UNSUPPORTED})
        assert [learned.adjust(each, error) for each in bodies] == [True, True]
        assert bodies == [{"max_completion_tokens": 5}, {"max_completion_tokens": 6}]

    def test_refused_json_object_becomes_a_schema(self, connect: Any, fake: FakeOllama) -> None:
        error = {"error": "'response_format.type' must be 'json_schema' or 'text'"}
        fake.script(CHAT, refused(400, error), streamed(part(content="{}"), STOP, DONE))
        assert connect().chat("Hi", format="json").parsed == {}
        first, second = (each["response_format"] for each in sent(fake))
        assert first == {"type": "json_object"}
        assert (second["type"], second["json_schema"]["schema"]) == ("json_schema", {"type": "object"})

    @pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
    def test_reasoning_is_sent_back_as_it_came(self, connect: Any, fake: FakeOllama, field: str) -> None:
        call = calling(piece("{}", "weather", index=0, id="a"))
        fake.script(CHAT, streamed(part(**{field: "So"}), call, CALLED, DONE), streamed(TEXT))
        llm = connect()
        reply = llm.chat("Hi", tools=[TOOL])
        result = {"role": "tool", "tool_call_id": "a", "content": "sunny"}
        llm.chat(["Hi", reply.message, result], tools=[TOOL])
        _, history, _ = sent(fake)[-1]["messages"]
        assert history[field] == "So"
        assert not {"reasoning", "reasoning_content"} - {field} & history.keys()


FLOATS, BASE64 = [0.5, -2.0], "AAAAPwAAAMA="


class TestEmbeddings:
    @pytest.mark.parametrize("profile", [None, "openai"], ids=["floats asked for", "base64 asked for"])
    @pytest.mark.parametrize("vector", [FLOATS, BASE64], ids=["floats", "base64"])
    def test_both_forms_are_read(self, connect: Any, fake: FakeOllama, profile: str | None, vector: Any) -> None:
        fake.script(EMBED, Answer([{"data": [{"index": 0, "embedding": vector}], "model": "m"}]))
        assert connect(profile=profile).embed("Hi").vectors == (tuple(FLOATS),)

    @pytest.mark.parametrize("vector", ["AAAA", "%%%", "", None, {}, ["a"]], ids=str)
    def test_wrong_vectors_are_errors(self, connect: Any, fake: FakeOllama, vector: Any) -> None:
        fake.script(EMBED, Answer([{"data": [{"index": 0, "embedding": vector}]}]))
        with pytest.raises(ProtocolError):
            connect().embed("Hi")
