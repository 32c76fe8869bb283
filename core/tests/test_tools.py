"""`run_tools`, for both clients, and `tool_choice`."""

from __future__ import annotations

import asyncio
import contextvars
import datetime as dt
import enum
import itertools
import threading
from typing import TYPE_CHECKING, Any

import pytest
from adding import PATIENCE, begin, run
from giving import Giving
from patience import soon
from pydantic import BaseModel, Field

import graftage
from graftage.exceptions import (
    CapabilityUnsupported,
    ConnectionFailed,
    InferenceFailed,
    ProviderTimeout,
    RequestRejected,
)
from graftage.hookspecs import hookimpl
from graftage.testing import Echo
from graftage.testing.both import Both
from graftage.testing.echo import Pause
from graftage.types import Capabilities, Chunk, Message, Reply, Tool, ToolCall, Usage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from suite import Watcher

MODEL = "m:1"


class Unit(enum.Enum):
    """A unit of temperature."""

    CELSIUS = "c"
    FAHRENHEIT = "f"


class Place(BaseModel):
    """A place on a map."""

    x: int
    y: int = 0


class Answer(BaseModel):
    """The format of an answer."""

    result: int


class Stop(BaseException):
    """Ends the program of the host."""


def add(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


def look(day: dt.date, unit: Unit, place: Place) -> str:
    """Look at the weather."""
    assert isinstance(day, dt.date)
    return f"{day:%d.%m.}, {unit.name}, {place.x + place.y}"


async def sleep(seconds: float) -> str:
    """Sleep."""
    await asyncio.sleep(seconds)
    return "slept"


def calls(*asked: tuple[str, dict[str, Any]], **of: Any) -> Reply:
    """A reply that calls tools."""
    made = (ToolCall(name=name, arguments=given, id=f"c{place}") for place, (name, given) in enumerate(asked))
    return Reply(text="", tool_calls=tuple(made), usage=Usage(input_tokens=10, output_tokens=1), **of)


def results(echo: Echo) -> list[str]:
    """Return the results in the last request."""
    return [each.content for each in echo.requests[-1].messages if each.role == "tool"]


class TestRun:
    def test_results_go_back_until_the_answer(self, both: Both) -> None:
        echo = Echo([calls(("add", {"a": 1})), calls(("add", {"a": 3, "b": 4}), thinking="hm"), "It is 7."])
        reply = run(both, both.connect(echo, model=MODEL), "1 + 2?", [add])
        assert [each.content for each in echo.requests[-1].messages] == ["1 + 2?", "", "3", "", "7"]
        assert echo.requests[-1].messages[3].thinking == "hm"
        assert (reply.text, len(reply.steps)) == ("It is 7.", 2)
        assert reply.steps[0].results == (Message(role="tool", content="3", tool_name="add", tool_call_id="c0"),)
        assert [dict(each.errors) for each in reply.steps] == [{}, {}]
        assert reply.usage == Usage(input_tokens=10 + 10 + 5, output_tokens=1 + 1 + 3)

    def test_reply_continues_the_conversation(self, both: Both) -> None:
        echo = Echo([calls(("add", {"a": 1})), "It is 3.", "Bye."])
        llm = both.connect(echo, model=MODEL)
        reply = run(both, llm, "1 + 2?", [add])
        llm.chat(["1 + 2?", reply, "Thanks."])
        assert echo.requests[-1].messages[1:4] == reply.messages
        assert [each.role for each in reply.messages] == ["assistant", "tool", "assistant"]

    def test_function_gets_what_it_annotates(self, both: Both) -> None:
        given = {"day": "2026-11-28", "unit": "c", "place": {"x": "3"}}
        echo = Echo([calls(("look", given))])
        run(both, both.connect(echo, model=MODEL), "x", [look])
        assert results(echo) == ["28.11., CELSIUS, 3"]

    def test_results_stand_in_the_order_of_calls(self, both: Both) -> None:
        second = threading.Event()

        def wait() -> bool:
            return second.wait(PATIENCE)

        echo = Echo([calls(("wait", {}), ("set", {}))])
        tools = [wait, Tool(name="set")]
        run(both, both.connect(echo, model=MODEL), "x", tools, call=lambda name, arguments: second.set())
        assert results(echo) == ["true", "null"]

    def test_context_reaches_tools(self, both: Both) -> None:
        user = contextvars.ContextVar("user", default="nobody")

        def who() -> str:
            return user.get()

        echo = Echo([calls(("who", {}))])
        llm = both.opened(echo, model=MODEL)
        contextvars.copy_context().run(lambda: (user.set("me"), run(both, llm, "x", [who])))
        assert results(echo) == ["me"]

    def test_images_are_sent_each_time(self, both: Both) -> None:
        echo = Echo([calls(("add", {"a": 1}))])
        run(both, both.connect(echo, model=MODEL), "x", [add], images=[b"GIF89a"])
        assert [len(each.messages[0].images) for each in echo.requests if hasattr(each, "messages")] == [1, 1]

    def test_first_call_may_be_required(self, both: Both) -> None:
        echo = Echo([calls(("add", {"a": 1})), "done"])
        assert run(both, both.connect(echo, model=MODEL), "x", [add], tool_choice="add").text == "done"
        assert [each.tool_choice for each in echo.requests] == ["add", None]

    def test_chain_goes_on_in_a_run(self, both: Both) -> None:
        down, echo = Echo([calls(("add", {"a": 1})), ConnectionFailed("gone")]), Echo(["done"])
        reply = run(both, both.connect([down, echo], model=MODEL), "x", [add])
        assert (reply.text, results(echo)) == ("done", ["3"])
        assert "was skipped" in reply.warnings[0]

    def test_warnings_of_all_replies_are_kept(self, both: Both) -> None:
        cut = [Chunk(tool_calls=calls(("add", {"a": 1})).tool_calls, finish_reason="", warnings=("cut",))]
        assert run(both, both.connect(Echo([cut, "done"]), model=MODEL), "x", [add]).warnings == ("cut",)

    def test_steps_are_watched(self, both: Both) -> None:
        seen: list[Any] = []
        llm = both.connect(Echo([calls(("add", {"a": 1})), "done"]), model=MODEL)
        assert run(both, llm, "x", [add], on_step=seen.append).steps == tuple(seen)

    def test_error_of_a_watcher_ends_the_run(self, both: Both) -> None:
        def watch(step: Any) -> None:
            raise LookupError("mine")

        with pytest.raises(LookupError, match="mine"):
            run(both, both.connect(Echo([calls(("add", {"a": 1}))]), model=MODEL), "x", [add], on_step=watch)


class TestFormat:
    def test_answer_is_asked_for_in_the_format(self, both: Both) -> None:
        echo = Echo([calls(("add", {"a": 1})), "It is three.", '{"result": 3}'])
        reply = run(both, both.connect(echo, model=MODEL), "x", [add], format=Answer)
        assert (reply.parsed, len(reply.steps)) == (Answer(result=3), 1)
        assert [(bool(each.tools), bool(each.format)) for each in echo.requests] == [(1, 0), (1, 0), (0, 1)]
        assert results(echo) == ["3"]
        assert reply.usage.output_tokens == 1 + 3 + 2

    def test_answer_that_fits_is_taken(self, both: Both) -> None:
        echo = Echo([calls(("add", {"a": 1})), '```json\n{"result": 3}\n```'])
        assert run(both, both.connect(echo, model=MODEL), "x", [add], format=Answer).parsed == Answer(result=3)
        assert len(echo.requests) == 2

    def test_provider_must_be_able_to(self, both: Both) -> None:
        with pytest.raises(CapabilityUnsupported, match="structured_output"):
            run(both, both.connect(Giving(lambda _: Plain()), model=MODEL), "x", [add], format=Answer)

    def test_answer_may_be_asked_for_again(self, both: Both) -> None:
        echo = Echo(["Three.", "Three!", '{"result": 3}'])
        assert run(both, both.connect(echo, model=MODEL), "x", [add], format=Answer, retries=1).attempts == 2


class TestAsync:
    """Only the async client awaits tools."""

    @pytest.fixture
    def both(self) -> Iterator[Both]:
        kind = Both("async")
        yield kind
        kind.close()

    def test_async_tools_are_awaited(self, both: Both) -> None:
        async def call(name: str, arguments: dict[str, Any]) -> Any:
            return [name, arguments]

        echo = Echo([calls(("sleep", {"seconds": "0"}), ("it", {"x": 1}))])
        run(both, both.connect(echo, model=MODEL), "x", [sleep, Tool(name="it")], call=call)
        assert results(echo) == ["slept", '["it",{"x":1}]']

    def test_plain_function_may_return_a_coroutine(self, both: Both) -> None:
        echo = Echo([calls(("it", {"seconds": 0}))])
        tools = [Tool(name="it")]
        run(both, both.connect(echo, model=MODEL), "x", tools, call=lambda _, given: sleep(**given))
        assert results(echo) == ["slept"]

    def test_late_tool_is_cancelled(self, both: Both) -> None:
        ended: list[str] = []

        async def hang() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("yes")

        echo = Echo([calls(("hang", {}), ("add", {"a": 1}))])
        assert run(both, both.connect(echo, model=MODEL), "x", [hang, add], tool_timeout=0.5).text == "x"
        assert results(echo) == ["The tool `hang` did not finish within 0.5 s.", "3"]
        assert soon(lambda: ended)

    def test_cancelled_run_cancels_its_tools(self, both: Both) -> None:
        begun, ended = threading.Event(), threading.Event()

        async def hang() -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        work = begin(both, both.connect(Echo([calls(("hang", {}))]), model=MODEL), "x", [hang])
        assert begun.wait(PATIENCE)
        work.cancel()
        assert ended.wait(PATIENCE)

    def test_base_exception_ends_the_run(self, both: Both) -> None:
        async def stop() -> None:
            raise Stop

        with pytest.raises(Stop):
            run(both, both.connect(Echo([calls(("stop", {}))]), model=MODEL), "x", [stop])

    def test_cancelled_tool_does_not_end_the_run(self, both: Both) -> None:
        async def leave() -> None:
            raise asyncio.CancelledError

        echo = Echo([calls(("leave", {}))])
        run(both, both.connect(echo, model=MODEL), "x", [leave])
        assert "CancelledError" in results(echo)[0]


class Odd:
    """Nothing that JSON has."""


def fail(how: str) -> Any:
    """Fail in some way."""
    if how == "silently":
        raise Silent
    if how == "with an odd result":
        return Odd()
    if how == "on a file":
        open("/home/me/secret/plan.txt")  # noqa: PTH123, SIM115 - it does not exist
    if how == "by validation":
        return Place(x=how)  # type: ignore[arg-type]
    if how == "by the end":
        raise StopIteration
    if how == "by cancellation":
        raise asyncio.CancelledError
    raise ValueError(f"`{how}` is not in /usr/lib/python3/words.txt; see https://example.org/a/b")


class Silent(Exception):
    """An error without words."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


WRONG_CALLS: dict[str, tuple[str, dict[str, Any], str]] = {
    "an unknown tool": ("ad", {"a": 1}, "There is no tool `ad`. Did you mean `add`?"),
    "a private name": ("__import__", {"name": "os"}, "There is no tool `__import__`. Known names: add, fail."),
    "a missing argument": ("add", {}, "The arguments of `add` are wrong. `a`: Missing required argument."),
    "an argument too many": ("add", {"a": 1, "c": 2}, "`c`: Unexpected keyword argument."),
    "a wrong type": ("add", {"a": "one"}, "`a`: Input should be a valid integer"),
    "an exception": (
        "fail",
        {"how": "x"},
        "The tool `fail` failed with ValueError: `x` is not in words.txt; see https",
    ),
    "an exception without words": ("fail", {"how": "silently"}, "The tool `fail` failed with Silent."),
    "a path in an exception": ("fail", {"how": "on a file"}, "No such file or directory: 'plan.txt'."),
    "a validation inside": ("fail", {"how": "by validation"}, "failed with ValidationError: 1 validation error"),
    "an end of a generator": ("fail", {"how": "by the end"}, "The tool `fail` failed with StopIteration."),
    "a cancellation": ("fail", {"how": "by cancellation"}, "The tool `fail` failed with CancelledError."),
    "an odd result": (
        "fail",
        {"how": "with an odd result"},
        "The result of the tool, Odd, cannot be converted to text.",
    ),
}


class TestWrongCalls:
    @pytest.mark.parametrize(("name", "given", "words"), WRONG_CALLS.values(), ids=WRONG_CALLS)
    def test_model_is_informed(self, both: Both, name: str, given: dict[str, Any], words: str) -> None:
        echo = Echo([calls((name, given), ("add", {"a": 1})), "I see."])
        reply = run(both, both.connect(echo, model=MODEL), "x", [add, fail])
        told, fine = results(echo)
        assert words in told
        assert (fine, reply.text) == ("3", "I see.")
        assert dict(reply.steps[0].errors) == {"c0": told}
        assert not {"Traceback", "/usr", "/home"} & set(told.replace("/", " /").split())

    def test_too_many_calls_at_once_are_refused(self, both: Both) -> None:
        echo = Echo([calls(*[("add", {"a": 1})] * 34)])
        reply = run(both, both.connect(echo, model=MODEL), "x", [add])
        assert results(echo) == ["3"] * 32 + ["At most 32 tools can be called at once."] * 2
        assert list(reply.steps[0].errors) == ["c32", "c33"]

    def test_stuck_tool_is_left_behind(self, both: Both) -> None:
        release = threading.Event()

        def hang() -> None:
            release.wait(PATIENCE)

        echo = Echo([calls(("hang", {}), ("add", {"a": 1})), "Well."])
        reply = run(both, both.connect(echo, model=MODEL), "x", [hang, add], tool_timeout=0.5)
        release.set()
        assert reply.text == "Well."
        assert results(echo) == ["The tool `hang` did not finish within 0.5 s.", "3"]


NESTED = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
SCHEMAS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a string for a number": ({"a": {"type": "integer"}}, {"a": "5"}, '{"a":5}'),
    "a wrong number": ({"a": {"type": "number"}}, {"a": "five"}, "`a`: Input should be a valid number"),
    "a value of an enum": ({"a": {"enum": ["x", "y"]}}, {"a": "y"}, '{"a":"y"}'),
    "a value beside an enum": ({"a": {"enum": ["x", "y"]}}, {"a": "z"}, "`a`: Input should be 'x' or 'y'"),
    "items": ({"a": {"type": "array", "items": {"type": "integer"}}}, {"a": ["1", 2]}, '{"a":[1,2]}'),
    "a wrong item": ({"a": {"type": "array", "items": {"type": "integer"}}}, {"a": ["one"]}, "`a.0`: Input should"),
    "an object inside": ({"a": NESTED}, {"a": {"x": 1}}, '{"a":{"x":1}}'),
    "a name missing inside": ({"a": NESTED}, {"a": {}}, "`a.x`: Field required"),
    "any object": ({"a": {"type": "object"}}, {"a": {"k": 1}}, '{"a":{"k":1}}'),
    "no object": ({"a": {"type": "object"}}, {"a": "k"}, "`a`: Input should be an object"),
    "a name that is not given": ({"a": {"type": "integer"}}, {}, "{}"),
    "a name beside the schema": ({}, {"b": 1}, '{"b":1}'),
    "an odd name": ({"max-results": {"type": "boolean"}}, {"max-results": "yes"}, '{"max-results":true}'),
    "what is not checked": ({"a": {"anyOf": [{"type": "integer"}]}}, {"a": "x"}, '{"a":"x"}'),
    "an odd enum": ({"a": {"enum": [1.5, []]}}, {"a": "x"}, '{"a":"x"}'),
    "an odd schema": ({"a": True, "b": {"type": ["string", "null"]}}, {"a": 1, "b": 1}, '{"a":1,"b":1}'),
}


class TestSchemas:
    @pytest.mark.parametrize(("properties", "given", "wanted"), SCHEMAS.values(), ids=SCHEMAS)
    def test_arguments_are_checked(self, both: Both, properties: Any, given: Any, wanted: str) -> None:
        echo = Echo([calls(("it", given))])
        tool = {"name": "it", "parameters": {"type": "object", "properties": properties}}
        run(both, both.connect(echo, model=MODEL), "x", [tool], call=lambda name, arguments: arguments)
        assert wanted in results(echo)[0]

    def test_required_names_are_checked(self, both: Both) -> None:
        schema = {"type": "object", "properties": {}, "required": ["a"], "additionalProperties": False}
        echo = Echo([calls(("it", {"b": 1}))])
        run(both, both.connect(echo, model=MODEL), "x", [Tool(name="it", parameters=schema)], call=lambda *_: "ran")
        assert "`a`: Field required; `b`: Extra inputs are not permitted" in results(echo)[0]

    def test_models_are_checked_and_called(self, both: Both) -> None:
        echo = Echo([calls(("Place", {"x": 1}), ("Place", {"x": "one"}))])
        run(both, both.connect(echo, model=MODEL), "x", [Place], call=lambda name, arguments: (name, arguments))
        ran, refused = results(echo)
        assert ran == '["Place",{"x":1}]'
        assert "`x`: Input should be a valid integer" in refused


class Block(BaseModel):
    """A part of an MCP result."""

    type: str
    text: str | None = None
    resource: dict[str, Any] | None = None


class Listed(BaseModel):
    """A tool as an MCP server lists it."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any] = Field(alias="inputSchema")
    meta: Any = Field(alias="_meta", default=None)


class ListToolsResult(BaseModel):
    """What `list_tools` of an MCP client returns."""

    tools: list[Listed]
    next_cursor: str | None = Field(alias="nextCursor", default=None)


class CallToolResult(BaseModel):
    """What `call_tool` of an MCP client returns."""

    content: list[Block]
    structured_content: dict[str, Any] | None = Field(serialization_alias="structuredContent", default=None)
    is_error: bool = Field(serialization_alias="isError", default=False)


LONG = "x" * 40_000
RESULTS: list[tuple[Any, str]] = [
    ("as it is\n", "as it is\n"),
    (None, "null"),
    ({"a": [1, 2.5, None]}, '{"a":[1,2.5,null]}'),
    (Place(x=1), '{"x":1,"y":0}'),
    ([Unit.CELSIUS, dt.date(2026, 11, 28), {3}], '["c","2026-11-28",[3]]'),
    (LONG, f"{LONG[:32_000]}\n[Cut: 32000 of 40000 characters.]"),
    ("half \ud800", "half ?"),
    (CallToolResult(content=[Block(type="text", text="one"), Block(type="text", text="two")]), "one\ntwo"),
    (CallToolResult(content=[], structured_content={"a": 1}), '{"a":1}'),
    (CallToolResult(content=[Block(type="image")]), "[image, which is not text]"),
    (CallToolResult(content=[Block(type="resource", resource={"uri": "a:b", "text": "hi"})]), "hi"),
    ({"content": [{"type": "resource_link", "uri": "file:///a"}], "isError": False}, "file:///a"),
    ({"content": []}, '{"content":[]}'),
]


class TestResults:
    @pytest.mark.parametrize(("value", "wanted"), RESULTS, ids=range(len(RESULTS)))
    def test_result_becomes_text(self, both: Both, value: Any, wanted: str) -> None:
        echo = Echo([calls(("it", {}))])
        reply = run(both, both.connect(echo, model=MODEL), "x", [Tool(name="it")], call=lambda *_: value)
        assert results(echo) == [wanted]
        assert dict(reply.steps[0].errors) == {}

    def test_endless_result_is_refused(self, both: Both) -> None:
        echo = Echo([calls(("it", {}))])
        reply = run(both, both.connect(echo, model=MODEL), "x", [Tool(name="it")], call=lambda *_: itertools.count())
        assert results(echo) == ["The result of the tool, count, cannot be converted to text."]
        assert list(reply.steps[0].errors) == ["c0"]

    def test_mcp_tools_work_as_they_are(self, both: Both) -> None:
        def call(name: str, arguments: dict[str, Any]) -> CallToolResult:
            return CallToolResult(content=[Block(type="text", text="Disk full.")], is_error=True)

        listed = ListToolsResult(tools=[Listed(name="save", inputSchema=NESTED)])
        echo = Echo([calls(("save", {"x": 1}), ("save", {}))])
        llm = both.connect(echo, model=MODEL)
        reply = run(both, llm, "x", listed, call=call)
        assert reply.steps[0].errors == {"c0": "Disk full.", "c1": results(echo)[1]}
        assert "`x`: Field required" in results(echo)[1]
        for tools in (listed, listed.tools):
            llm.chat("x", tools=tools)
            assert echo.requests[-1].tools == (Tool(name="save", parameters=NESTED),)


class TestBounds:
    def test_steps_are_bounded(self, both: Both) -> None:
        echo = Echo([calls(("add", {"a": place})) for place in range(9)])
        with pytest.raises(InferenceFailed, match="after 2 steps") as caught:
            run(both, both.connect(echo, model=MODEL), "x", [add], max_steps=2)
        partial = caught.value.partial
        assert partial is not None
        assert [each.results[0].content for each in partial.steps] == ["2", "3"]
        assert partial.tool_calls[0].arguments == {"a": 2}
        assert partial.usage == Usage(input_tokens=30, output_tokens=3)
        assert caught.value.hint
        assert len(echo.requests) == 3

    def test_time_is_bounded(self, both: Both) -> None:
        release = threading.Event()

        def hang() -> None:
            release.wait(PATIENCE)

        llm = both.connect(Echo([calls(("hang", {}), ("add", {"a": 1}))]), model=MODEL)
        with pytest.raises(ProviderTimeout, match=r"within 1 s") as caught:
            run(both, llm, "x", [hang, add], timeout=1.0)
        release.set()
        assert (caught.value.phase, caught.value.retryable) == ("total", False)
        assert caught.value.partial is not None
        step = caught.value.partial.steps[0]
        assert step.results[1].content == "3"
        assert "did not finish" in step.errors["c0"]

    def test_time_is_bounded_while_the_model_writes(self, both: Both) -> None:
        llm = both.connect(Echo([calls(("add", {"a": 1})), [Pause()]]), model=MODEL)
        with pytest.raises(ProviderTimeout, match=r"The run did not finish within 1 s") as caught:
            run(both, llm, "x", [add], timeout=1.0)
        assert caught.value.partial is not None
        assert caught.value.partial.steps[0].results[0].content == "3"

    def test_failure_keeps_the_steps(self, both: Both) -> None:
        llm = both.connect(Echo([calls(("add", {"a": 1})), ConnectionFailed("gone")]), model=MODEL, attempts=1)
        with pytest.raises(ConnectionFailed) as caught:
            run(both, llm, "x", [add])
        assert caught.value.partial is not None
        assert caught.value.partial.steps[0].results[0].content == "3"
        assert not caught.value.retryable, "the tool would run again"

    def test_first_failure_may_be_tried_again(self, both: Both) -> None:
        with pytest.raises(ConnectionFailed) as caught:
            run(both, both.connect(Echo([ConnectionFailed("gone")]), model=MODEL, attempts=1), "x", [add])
        assert (caught.value.partial, caught.value.retryable) == (None, True)

    def test_host_may_translate_errors(self, both: Both) -> None:
        llm = both.connect(
            Echo([calls(("add", {"a": 1}))] * 2), model=MODEL, translate_error=lambda _: KeyError("mine")
        )
        with pytest.raises(KeyError) as caught:
            run(both, llm, "x", [add], max_steps=1)
        assert isinstance(caught.value.__cause__, InferenceFailed)

    def test_base_exception_ends_the_run(self, both: Both) -> None:
        def stop() -> None:
            raise Stop

        llm = both.connect(Echo([calls(("stop", {})), "done"]), model=MODEL)
        with pytest.raises(Stop):
            run(both, llm, "x", [stop])
        assert llm.stats().running == 0


REFUSED: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "a tool without a function": ([Tool(name="it")], {}, "no function to run"),
    "a model without a function": ([Place], {}, "no function to run"),
    "a `call` that cannot be called": ([Tool(name="it")], {"call": 5}, "`call`"),
    "two tools of one name": ([add, add], {}, "Two tools"),
    "what is no tool": ([5], {}, "tool"),
    "no steps": ([add], {"max_steps": 0}, "max_steps"),
    "steps as a text": ([add], {"max_steps": "2"}, "max_steps"),
    "a negative time": ([add], {"tool_timeout": -1}, "tool_timeout"),
    "an async watcher": ([add], {"on_step": sleep}, "on_step"),
    "a wrong format": ([add], {"format": 5}, "format"),
    "a wrong time": ([add], {"timeout": "x"}, "timeout"),
    "retries without a format": ([add], {"retries": 1}, "`retries` needs a `format`"),
    "an unknown choice": ([add], {"tool_choice": "ad"}, "tool_choice"),
}


class TestRefusals:
    @pytest.mark.parametrize(("tools", "given", "words"), REFUSED.values(), ids=REFUSED)
    def test_nothing_is_sent(self, both: Both, tools: list[Any], given: dict[str, Any], words: str) -> None:
        echo = Echo()
        with pytest.raises(RequestRejected, match=words) as caught:
            run(both, both.connect(echo, model=MODEL), "x", tools, **given)
        assert caught.value.hint
        assert echo.requests == []

    def test_unknown_argument_is_named(self, both: Both) -> None:
        with pytest.raises(TypeError, match="did you mean `max_tokens`"):
            run(both, both.connect(Echo(), model=MODEL), "x", [add], max_token=5)

    @pytest.mark.parametrize(
        ("tools", "call"),
        [([sleep], None), ([Tool(name="sleep")], lambda _, given: sleep(**given))],
        ids=["a function", "a function that returns a coroutine"],
    )
    def test_sync_client_awaits_nothing(self, tools: list[Any], call: Any) -> None:
        with (
            graftage.connect(Echo([calls(("sleep", {"seconds": 0}))]), model=MODEL) as llm,
            pytest.raises(RequestRejected, match="no event loop") as caught,
        ):
            graftage.run_tools(llm, "x", tools, call=call)
        assert "run_tools_async" in str(caught.value.hint)

    async def _run(self, llm: Any) -> None:
        await graftage.run_tools_async(llm, "x", [add])

    def test_client_of_the_other_kind_is_refused(self) -> None:
        other: Any = graftage.connect_async(Echo(), model=MODEL)
        with pytest.raises(TypeError, match="run_tools_async"):
            graftage.run_tools(other, "x", [add])
        with graftage.connect(Echo(), model=MODEL) as llm, pytest.raises(TypeError, match=r"run_tools\(\)"):
            asyncio.run(self._run(llm))


class TestEvents:
    def test_each_tool_is_an_event_without_content(self, both: Both, watcher: Watcher) -> None:
        script = [calls(("add", {"a": "SECRET"}), ("SECRET", {}), ("fail", {"how": "SECRET"}), ("add", {"a": 1}))]
        llm = both.connect(Echo(script), model=MODEL, plugins=[watcher])
        run(both, llm, "x", [add, fail])
        events = [each for each in watcher.events if each.kind == "tool"]
        assert [each.tool for each in events] == ["add", None, "fail", "add"]
        assert [str(each.error) for each in events] == [
            "The tool failed: wrong arguments.",
            "The tool failed: an unknown tool.",
            "The tool failed: ValueError.",
            "None",
        ]
        assert all(each.seconds is not None and each.seconds >= 0 for each in events)
        assert {each.call_id for each in events} == {watcher.events[0].call_id}
        assert "SECRET" not in repr(events)


class Plain:
    """A connection without the feature `tool_choice`."""

    @hookimpl
    async def chat(self, request: Any) -> Any:
        yield Chunk(text="ok", finish_reason="stop")

    @hookimpl
    def capabilities(self) -> Capabilities:
        return Capabilities(features=frozenset({"tools"}))


class TestToolChoice:
    @pytest.mark.parametrize(
        ("choice", "sent", "tools"),
        [(None, None, 2), ("auto", None, 2), ("none", None, 0), ("required", "required", 2), ("add", "add", 2)],
    )
    def test_choice_is_sent(self, both: Both, choice: str | None, sent: str | None, tools: int) -> None:
        echo = Echo([calls(("add", {"a": 1}))])
        reply = both.connect(echo, model=MODEL).chat("x", tools=[add, fail], tool_choice=choice)
        assert (echo.requests[0].tool_choice, len(echo.requests[0].tools)) == (sent, tools)
        assert reply.tool_calls[0].name == "add"

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("choice", "answer", "words"),
        [
            ("required", "No.", "lacks the call of a tool"),
            ("fail", calls(("add", {})), "lacks the call of `fail` alone"),
            ("fail", calls(("fail", {}), ("add", {})), "lacks the call of `fail` alone"),
            ("required", Reply(text="Well, I", finish_reason="length"), "was cut before the call of a tool"),
        ],
    )
    def test_missing_call_is_an_error(self, both: Both, choice: str, answer: Any, words: str, stream: bool) -> None:
        llm = both.connect(Echo([answer]), model=MODEL)
        with pytest.raises(InferenceFailed, match=words) as caught:
            list(llm.chat("x", tools=[add, fail], tool_choice=choice, stream=stream))
        partial = caught.value.partial
        assert partial is not None
        expected = Reply(text=answer) if isinstance(answer, str) else answer
        assert (partial.text, partial.tool_calls) == (expected.text, expected.tool_calls)
        assert caught.value.hint

    def test_missing_call_is_not_a_matter_of_format(self, both: Both) -> None:
        echo = Echo(["No.", "No."])
        with pytest.raises(InferenceFailed, match="tool_choice"):
            both.connect(echo, model=MODEL).chat("x", tools=[add], tool_choice="required", format="json", retries=1)
        assert len(echo.requests) == 1

    def test_provider_must_have_the_feature(self, both: Both) -> None:
        llm = both.connect(Giving(lambda _: Plain()), model=MODEL)
        with pytest.raises(CapabilityUnsupported, match="tool_choice"):
            llm.chat("x", tools=[add], tool_choice="required")
        assert llm.chat("x", tools=[add], tool_choice="none").text == "ok"

    def test_chain_takes_a_member_that_can(self, both: Both) -> None:
        echo = Echo([calls(("add", {"a": 1}))])
        llm = both.connect([Giving(lambda _: Plain()), echo], model=MODEL)
        assert llm.chat("x", tools=[add], tool_choice="required").provider == "echo"
