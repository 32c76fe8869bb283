"""Responses of servers and models: read strictly where it matters, leniently elsewhere."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel, field_validator

from graftage._engine.answers import cut_warning, read_vectors
from graftage.calls import Call, ChatRequest, EmbedRequest, GenerateRequest
from graftage.exceptions import InferenceFailed, ProtocolError
from graftage.hookspecs import hookimpl
from graftage.http import (
    read_count,
    read_entries,
    read_logprobs,
    read_moment,
    read_object,
    read_records,
    read_seconds,
    read_text,
    read_tool_calls,
    read_word,
)
from graftage.testing import Echo
from graftage.types import Capabilities, Chunk, Embeddings, Logprob, Message, ToolCall, Usage

if TYPE_CHECKING:
    from suite import Watcher

MODEL = "m"
CALL = ToolCall(name="f", arguments={}, id="c")


HUGE = 10**400
ODD: tuple[Any, ...] = ("", "x", None, True, [], {}, math.nan, math.inf, -1, -0.5, HUGE, 2**60)
FIELDS: list[tuple[Any, Any, Any]] = [
    *((read_text, value, value or "") for value in (None, "", "x")),
    *((read_word, value, None) for value in ODD if value != "x"),
    (read_word, "x", "x"),
    *((read_count, value, int(value)) for value in (0, 7, 4096.0, 2**53)),
    *((read_count, value, None) for value in (*ODD, 0.5)),
    *((read_seconds, value, value) for value in (0, 1.5)),
    *((read_seconds, value, None) for value in ODD),
    (read_moment, "2026-01-02T03:04:05.123456789Z", datetime(2026, 1, 2, 3, 4, 5, 123456, UTC)),
    *((read_moment, value, None) for value in ("0001-01-01T00:00:00Z", 1767322800, 1.5, "today", *ODD)),
    *((read_object, value, {}) for value in ODD),
    (read_object, {"a": 1}, {"a": 1}),
]


class TestFields:
    @pytest.mark.parametrize(("read", "value", "wanted"), FIELDS)
    def test_odd_value_is_unknown(self, read: Any, value: Any, wanted: Any) -> None:
        assert read(value) == wanted

    @pytest.mark.parametrize("value", [5, True, [], {}, ["x"]])
    def test_text_must_be_a_string(self, value: Any) -> None:
        with pytest.raises(TypeError):
            read_text(value)

    def test_bad_entry_keeps_the_others(self) -> None:
        given: list[Any] = [{"name": "a"}, None, 5, {}, "x", {"name": "b"}]
        for read in read_entries, read_records:
            assert read(given, lambda each: each["name"]) == ("a", "b")
            assert read(None, str) == read([], str) == ()

    def test_list_without_records_is_refused(self) -> None:
        others: list[Any] = [5, {"a": 1}, "x", [5], [{}]]
        for given in others:
            assert read_entries(given, lambda each: each["name"]) == ()
            with pytest.raises(TypeError):
                read_records(given, lambda each: each["name"])

    def test_unreadable_probability_is_left_out(self) -> None:
        rival = {"token": "b", "logprob": -2}
        good = {"token": "a", "logprob": -1.5, "bytes": [97], "top_logprobs": [rival, {"token": "c", "logprob": None}]}
        bad: list[Any] = [{"token": "x", "logprob": each} for each in (None, "x", True, math.nan, HUGE)]
        found = read_logprobs([*bad, good, {"token": None, "logprob": 1}, {"logprob": 1}, None, 5])
        assert found == (Logprob(token="a", logprob=-1.5, top=(Logprob(token="b", logprob=-2.0),)),)
        assert read_logprobs([good], top=False)[0].top == ()
        assert [read_logprobs(each) for each in (*ODD, bad)] == [()] * (len(ODD) + 1)


def numbered(*places: Any) -> list[dict[str, Any]]:
    return [{"index": place, "embedding": [number]} for number, place in enumerate(places)]


class TestVectors:
    def test_follow_their_indexes(self) -> None:
        assert read_vectors(numbered(1, 2.0, 0)) == [[2], [0], [1]]
        assert (
            read_vectors(numbered(None, None)) == read_vectors([{"embedding": [0]}, {"embedding": [1]}]) == [[0], [1]]
        )
        assert read_vectors([]) == []

    @pytest.mark.parametrize("places", [(0, 0), (0, 2), (1, 2), (-1, 0)], ids=str)
    def test_wrong_numbering_is_an_error(self, places: Any) -> None:
        with pytest.raises(ProtocolError, match="2 vectors, which are not numbered from 0 to 1"):
            read_vectors(numbered(*places))


FORMS: dict[str, tuple[Any, list[str]]] = {
    "none": (None, []),
    "an empty list": ([], []),
    "a list of nothing": ([None], []),
    "an empty object": ({}, []),
    "in OpenAI's form": ([{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}], ["1"]),
    "flat": ([{"id": "1", "name": "f"}], ["1"]),
    "one alone": ({"id": 7, "function": {"name": "f"}}, ["7"]),
    "several": ([{"id": "1", "name": "f"}, {"id": "2", "name": "f"}], ["1", "2"]),
}


def ask(name: str, *ids: str) -> Message:
    return Message(role="assistant", tool_calls=tuple(ToolCall(name=name, arguments={}, id=each) for each in ids))


def result(**of: Any) -> dict[str, Any]:
    return {"role": "tool", "content": "1", **of}


PAIRS: dict[str, tuple[list[Any], list[tuple[str | None, str | None]]]] = {
    "the id alone": ([ask("f", "1"), result(tool_call_id="1")], [("1", "f")]),
    "the name alone": ([ask("f", "1"), result(tool_name="f")], [("1", "f")]),
    "both": ([ask("f", "1"), result(tool_call_id="1", tool_name="other")], [("1", "other")]),
    "neither": ([ask("f", "1"), result()], [("1", "f")]),
    "neither, of several calls": ([ask("f", "1"), ask("g", "2"), result(), result()], [("1", "f"), ("2", "g")]),
    "neither, after one that has": (
        [ask("f", "1"), ask("g", "2"), result(tool_call_id="1"), result()],
        [("1", "f"), ("2", "g")],
    ),
    "neither, and no call is left": ([ask("f", "1"), result(), result()], [("1", "f"), (None, None)]),
    "an unknown id": ([ask("f", "1"), result(tool_call_id="2")], [("2", None)]),
    "an unknown name": ([ask("f", "1"), result(tool_name="g")], [(None, "g")]),
    "no call": ([result(tool_call_id="1")], [("1", None)]),
    "in another order": (
        [ask("f", "1"), ask("g", "2"), result(tool_call_id="2"), result(tool_call_id="1")],
        [("2", "g"), ("1", "f")],
    ),
    "two of one name": ([ask("f", "1", "2"), result(tool_name="f"), result(tool_name="f")], [("1", "f"), ("2", "f")]),
    "an id that comes again": (
        [ask("f", "1"), result(tool_call_id="1"), ask("g", "1"), result(tool_call_id="1")],
        [("1", "f"), ("1", "g")],
    ),
    "a call without an id": (
        [{"role": "assistant", "tool_calls": [{"name": "f"}]}, result(tool_name="f")],
        [("call_0", "f")],
    ),
}


class TestToolCalls:
    @pytest.mark.parametrize(("given", "ids"), FORMS.values(), ids=FORMS)
    def test_every_form_is_read(self, given: Any, ids: list[str]) -> None:
        assert read_tool_calls(given) == tuple(ToolCall(name="f", arguments={}, id=each) for each in ids)

    @pytest.mark.parametrize(
        "bad", [{}, "f", 5, {"function": None}, {"function": "f"}, {"function": {}}, {"name": 5}, {"name": ""}], ids=str
    )
    def test_one_malformed_call_fails_the_reply(self, bad: Any) -> None:
        with pytest.raises(InferenceFailed, match="The model's call is malformed"):
            read_tool_calls([{"name": "f"}, bad])

    def test_generated_ids_are_unique(self) -> None:
        made = [call.id for _ in range(20) for call in read_tool_calls([{"name": "f"}, {"name": "f", "id": ""}])]
        assert len(set(made)) == 40

    @pytest.mark.parametrize(("messages", "wanted"), PAIRS.values(), ids=PAIRS)
    def test_result_goes_out_with_id_and_name(self, both: Any, messages: Any, wanted: Any) -> None:
        echo = Echo(["ok"])
        both.connect(echo, model=MODEL).chat(["Hi", *messages])
        sent = echo.requests[0].messages
        assert [(each.tool_call_id, each.tool_name) for each in sent if each.role == "tool"] == wanted
        assert [each.content for each in sent if each.role == "tool"] == ["1"] * len(wanted)

    def test_earlier_calls_get_stable_ids(self, both: Any) -> None:
        echo = Echo(["ok"] * 2)
        llm = both.connect(echo, model=MODEL)
        bare = {"role": "assistant", "tool_calls": [{"name": "f"}, {"name": "f"}]}
        for _ in range(2):
            llm.chat([bare, ask("f", "call_1"), bare])
        for request in echo.requests:
            ids = [call.id for each in request.messages for call in each.tool_calls]
            assert ids == ["call_0", "call_2", "call_1", "call_3", "call_4"]


ENDS: list[tuple[Any, bool, int, str]] = [
    # The server's word, whether tools are called, tokens of the 10 allowed, the meaning
    ("stop", False, 10, "stop"),
    ("STOP", False, 5, "stop"),
    ("eos", False, 5, "stop"),
    ("eos_token", False, 5, "stop"),
    ("end_turn", False, 5, "stop"),
    ("length", False, 5, "length"),
    ("MAX_TOKENS", False, 5, "length"),
    ("content_filter", False, 5, "content_filter"),
    ("load", False, 5, "load"),
    ("unload", False, 5, "unload"),
    ("banana", False, 5, "other"),
    (5, False, 5, "other"),
    ("", False, 5, "stop"),
    ("", False, 10, "length"),
    ("", False, 11, "length"),
    ("tool_calls", True, 5, "tool_calls"),
    ("tool_call", True, 5, "tool_calls"),
    ("function_call", True, 5, "tool_calls"),
    ("stop", True, 10, "tool_calls"),
    ("", True, 5, "tool_calls"),
    ("", True, 10, "tool_calls"),
    ("length", True, 5, "length"),
    ("content_filter", True, 5, "content_filter"),
    ("banana", True, 5, "other"),
    ("tool_calls", False, 5, "stop"),
]


class TestEnd:
    @pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
    @pytest.mark.parametrize("end", ENDS, ids=str)
    def test_server_words_become_known_reasons(self, both: Any, watcher: Watcher, end: Any, stream: bool) -> None:
        word, calls, written, wanted = end
        chunks = [Chunk(text="x", tool_calls=(CALL,) if calls else ())]
        last = Chunk(finish_reason=word, usage=Usage(output_tokens=written), raw={"reason": word})
        llm = both.connect(Echo([[*chunks, last]]), model=MODEL, plugins=[watcher])
        reply = llm.chat("x", max_tokens=10, stream=stream)
        if stream:
            assert list(reply)[-1].finish_reason == wanted
            reply = reply.reply
        assert (reply.finish_reason, reply.raw) == (wanted, {"reason": word})
        assert watcher.last("finish").finish_reason == wanted

    @pytest.mark.parametrize("count", [-1, 1.5, "5", True, math.nan, HUGE, 2**60, None], ids=lambda each: str(each)[:9])
    def test_impossible_token_count_is_unknown(self, both: Any, count: Any) -> None:
        usage = Usage(input_tokens=count, output_tokens=count)
        llm = both.connect(Echo([[Chunk(text="x", finish_reason="stop", usage=usage)]]), model=MODEL)
        assert llm.chat("x").usage == Usage()
        assert (llm.stats().input_tokens, llm.stats().output_tokens) == (0, 0)


PROSE = "word " * 600
CUTS: dict[str, tuple[list[str], int | None, int | None, bool]] = {
    # Texts, window, tokens read, whether they were cut
    "the window is full": ([PROSE], 256, 256, True),
    "nearly": (["(){};" * 500], 512, 510, True),
    "not nearly": (["(){};" * 500], 512, 509, False),
    "more than the window was counted": ([PROSE], 256, 621, False),
    "half of it was kept": ([PROSE], 256, 130, True),
    "no count": ([PROSE], 256, None, True),
    "a count of 0": ([PROSE], 256, 0, True),
    "it fits": ([PROSE], 2048, 621, False),
    "it fits, and was cached": (["word " * 100], 2048, 3, False),
    "it fits, without a count": ([PROSE], 2048, None, False),
    "a line of dashes": (["-" * 5000], 2048, 99, False),
    "a line of equals signs": (["=" * 5000], 2048, 99, False),
    "spaces": ([" " * 5000], 2048, 98, False),
    "a table": (["| --------- " * 500], 2048, 1020, False),
    "digits": (["0" * 5000], 2048, 2048, True),
    "ideographs that fill it": (["今天天气很好" * 250], 2048, 2048, True),
    "ideographs of which half was kept": (["今天天气很好" * 500], 256, 130, True),
    "ideographs that fit": (["今天天气很好" * 250], 2048, 1100, False),
    "a window that is not known": (["source code " * 20_000], None, 5, True),
    "a usual window that is full": (["(){};" * 5000], None, 4096, True),
    "no usual window": (["(){};" * 5000], None, 4097, False),
    "few words and a count that is too small": (["just a few words of the user"], None, 1, False),
    "nothing": ([""], 2048, None, False),
}


SUMS: dict[str, tuple[list[str], int, bool]] = {
    # The server counts several inputs together, and each has a window of 256.
    "all fit": (["word " * 100] * 5, 505, False),
    "one does not": ([PROSE, "Hi"], 257, True),
    "none does": ([PROSE, PROSE], 512, True),
    "one of many": ([*["-" * 300] * 9, "word " * 257], 320, True),
}


class Short:
    """A provider whose server reads 256 tokens of every prompt, and accepts no window."""

    class Connection:
        def __init__(self, parameters: frozenset[str] | None) -> None:
            self.parameters = parameters

        @hookimpl
        def capabilities(self) -> Capabilities:
            return Capabilities(features=frozenset(), parameters=self.parameters)

        @hookimpl
        def chat(self, request: Any) -> Any:
            yield Chunk(text="x", finish_reason="stop", usage=Usage(input_tokens=256))

        @hookimpl
        def embed(self, request: Any) -> Embeddings:
            usage = Usage(input_tokens=256, output_tokens=-1)
            return Embeddings(vectors=[[1.0, 2.0]], usage=usage, warnings=("mine",) if request.dimensions else ())

    def __init__(self, parameters: frozenset[str] | None = None) -> None:
        self.parameters = parameters

    @hookimpl
    def connect(self, request: Any) -> object:
        return self.Connection(self.parameters)


def conversation(*texts: str, window: int | None) -> ChatRequest:
    messages = tuple(Message(role="user", content=each) for each in texts)
    return ChatRequest(call=Call(), model=MODEL, messages=messages, context_window=window)


class TestCutPrompt:
    """A server that cuts a prompt to its window without saying so."""

    @pytest.mark.parametrize("kind", ["messages", "prompt", "inputs"])
    @pytest.mark.parametrize(("texts", "window", "read", "cut"), CUTS.values(), ids=CUTS)
    def test_full_window_means_a_cut(
        self, texts: Any, window: int | None, read: int | None, cut: bool, kind: str
    ) -> None:
        if kind == "inputs" and window is None and read == 4096:
            cut = False  # Texts that are split before they are embedded have a round number of tokens, too.
        requests: dict[str, ChatRequest | GenerateRequest | EmbedRequest] = {
            "messages": conversation(*texts, window=window),
            "prompt": GenerateRequest(call=Call(), model=MODEL, prompt=texts[0], context_window=window),
            "inputs": EmbedRequest(call=Call(), model=MODEL, inputs=tuple(texts), context_window=window),
        }
        found = cut_warning(requests[kind], read)
        assert bool(found) == cut
        assert all("probably cut to fit the context window" in each for each in found)

    @pytest.mark.parametrize(("texts", "read", "cut"), SUMS.values(), ids=SUMS)
    def test_cut_input_among_several_is_seen(self, texts: list[str], read: int, cut: bool) -> None:
        request = EmbedRequest(call=Call(), model=MODEL, inputs=tuple(texts), context_window=256)
        assert bool(cut_warning(request, read)) == cut

    def test_messages_share_one_window(self) -> None:
        turn = "word " * 200
        assert cut_warning(conversation(turn, turn, turn, window=512), 410)
        assert not cut_warning(conversation(turn, turn, window=512), 410)

    def test_is_warned_of_with_any_provider(self, both: Any) -> None:
        llm = both.connect(Short(), model=MODEL, context_window=256)
        with llm.chat(PROSE, stream=True) as stream:
            warnings = tuple(each for chunk in stream for each in chunk.warnings)
        assert ["probably cut" in each for each in warnings] == [True]
        assert stream.reply.warnings == llm.chat(PROSE).warnings == warnings
        found = llm.embed(PROSE)
        assert ["An input was probably cut" in each for each in found.warnings] == [True]
        assert found.usage == Usage(input_tokens=256)
        assert llm.embed(PROSE, truncate=False).warnings == ()  # It would have been refused.

    def test_unsupported_window_gives_no_warning(self, both: Any) -> None:
        llm = both.connect(Short(frozenset()), model=MODEL, context_window=256)
        for given in llm.chat("-" * 900), llm.embed("-" * 900):
            assert [each for each in given.warnings if "cut" in each] == []

    def test_providers_own_warning_is_enough(self, both: Any) -> None:
        found = both.connect(Short(), model=MODEL, context_window=256).embed(PROSE, dimensions=2)
        assert found.warnings == ("mine",)


def test_ignored_dimensions_are_warned_of(both: Any) -> None:
    (mine, other) = both.connect(Short(), model=MODEL).embed("x", dimensions=3).warnings
    assert (mine, "`dimensions` had no effect: the vectors have 2 numbers" in other) == ("mine", True)


class Point(BaseModel):
    """A place on a line."""

    a: int


GOOD = '{"a": 1}'
WAYS: dict[str, str | Chunk] = {
    "as it is": GOOD,
    "after blanks": f" \n{GOOD}\n",
    "in a fence": f"```\n{GOOD}\n```",
    "in a fence with its language": f"\n```json\n{GOOD}\n```\n",
    "in a fence of one line": f"```json {GOOD} ```",
    "in a fence that does not end": f"```json\n{GOOD}",
    "in a fence after words": f"Here it is:\n\n```json\n{GOOD}\n```\nThat is all.",
    "in a fence of several lines": '```JSON\n{\n  "a": 1\n}\n```',
    "after a byte order mark": f"\ufeff{GOOD}",
    "after a thought": f"<think>\nIs it {{1}}?\n</think>\n\n{GOOD}",
    "after the end of a thought": f"It is 1.</think>{GOOD}",
    "after a thought, in a fence": f"<thinking>```json\n5\n```</thinking>\n```json\n{GOOD}\n```",
    "in the thinking": Chunk(thinking=GOOD),
    "in the thinking, with blanks as the text": Chunk(text=" \n", thinking=f"```\n{GOOD}\n```"),
    "before endless blanks": GOOD + " " * 5000,
}


class Note(BaseModel):
    """Words on several lines."""

    a: str


UNCERTAIN = {
    "words": f"It is {GOOD}, I think.",
    "two fences": f"```json\n{GOOD}\n```\nor\n```json\n{GOOD}\n```",
    "a thought that does not end": f"<think>{GOOD}",
    "half": '{"a": ',
    "nothing": "",
    "a fence around half": '```json\n{"a": ',
}


class TestFoundJson:
    """JSON that the model wrapped in other text."""

    @pytest.mark.parametrize("given", [Point, {"type": "object"}, "json"], ids=["model", "schema", "json"])
    @pytest.mark.parametrize("way", WAYS)
    def test_is_found_where_certain(self, both: Any, way: str, given: Any) -> None:
        come = WAYS[way]
        chunk = Chunk(text=come) if isinstance(come, str) else come
        llm = both.connect(Echo([[chunk, Chunk(finish_reason="stop")]]), model=MODEL)
        reply = llm.chat("x", format=given)
        assert reply.parsed == (Point(a=1) if given is Point else {"a": 1})
        assert reply.text == chunk.text

    def test_tool_call_need_not_fit_the_format(self, both: Any) -> None:
        calls = Chunk(text="I look it up.", tool_calls=(CALL,), finish_reason="tool_calls")
        reply = both.connect(Echo([[calls]]), model=MODEL).chat("x", format="json")
        assert (reply.tool_calls, reply.parsed) == ((CALL,), None)

    def test_fence_inside_a_string_is_kept(self, both: Any) -> None:
        given = '{"a": "```json\\n5\\n``` </think> 7"}'
        llm = both.connect(Echo([given]), model=MODEL)
        assert llm.chat("x", format="json").parsed == {"a": "```json\n5\n``` </think> 7"}

    @pytest.mark.parametrize("given", [Note, "json"], ids=["model", "json"])
    @pytest.mark.parametrize("text", ['{"a": "1\n\t2"}', '{\n"a": "1\n\t2"\n}', '```json\n{"a": "1\n\t2"}\n```'])
    def test_line_ends_inside_strings_are_read(self, both: Any, given: Any, text: str) -> None:
        found = both.connect(Echo([text]), model=MODEL).chat("x", format=given).parsed
        assert found == (Note(a="1\n\t2") if given is Note else {"a": "1\n\t2"})

    @pytest.mark.parametrize("reason", ["stop", "length"])
    @pytest.mark.parametrize("text", UNCERTAIN.values(), ids=UNCERTAIN)
    def test_uncertain_text_is_an_error_with_hint(self, both: Any, text: str, reason: str) -> None:
        llm = both.connect(Echo([[Chunk(text=text), Chunk(finish_reason=reason)]]), model=MODEL)
        with pytest.raises(InferenceFailed) as caught:
            llm.chat("x", format="json")
        assert ("cut" in caught.value.message, "`max_tokens`" in str(caught.value.hint)) == ((reason == "length"),) * 2
        assert "service" not in str(caught.value)
        assert caught.value.partial is not None
        assert caught.value.partial.text == text

    def test_whole_json_was_not_cut(self, both: Any) -> None:
        llm = both.connect(Echo([[Chunk(text='{"b": 1}'), Chunk(finish_reason="length")]]), model=MODEL)
        with pytest.raises(InferenceFailed, match="does not match") as caught:
            llm.chat("x", format=Point)
        assert caught.value.details == {"reason": "ValidationError of Point"}


class OwnError(Exception):
    """An error of the host."""


class Own(BaseModel):
    """A model whose validator raises the error that its input names."""

    a: str

    @field_validator("a")
    @classmethod
    def check(cls, value: str) -> str:
        """Refuse everything."""
        raise {"own": OwnError, "key": KeyError, "type": TypeError, "zero": ZeroDivisionError}.get(value, ValueError)


class Reader(BaseModel):
    """A model with its own reader."""

    @classmethod
    def model_validate_json(cls, *_: Any, **__: Any) -> Any:
        """Refuse everything."""
        raise UnicodeError


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize(
    "case",
    [
        (Own, "own", OwnError),
        (Own, "key", KeyError),
        (Own, "type", TypeError),
        (Own, "zero", ZeroDivisionError),
        (Own, "value", InferenceFailed),
        (Reader, "", UnicodeError),
    ],
)
def test_error_of_a_host_validator_passes_through(
    both: Any, watcher: Watcher, case: tuple[Any, str, type[Exception]], stream: bool
) -> None:
    model, word, kind = case
    llm = both.connect(Echo([f'{{"a": "{word}"}}']), model=MODEL, plugins=[watcher])
    with pytest.raises(kind) as caught:
        list(llm.chat("x", format=model, stream=stream))
    assert type(caught.value) is kind
    assert llm.stats().running == 0
    assert watcher.kinds("chat")[-1] == ("error" if kind is InferenceFailed else "finish")
