"""What a chat sends: messages, images, tools, and the format of its reply."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel

from graftage.exceptions import (
    InferenceFailed,
    RequestRejected,
)
from graftage.testing import Echo
from graftage.types import (
    Chunk,
    Image,
    Message,
    Reply,
    Tool,
    ToolCall,
)

if TYPE_CHECKING:
    from pathlib import Path

MODEL = "m:1"
JSON_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


class Street(BaseModel):
    """Where a house is."""

    name: str


class House(BaseModel):
    """A place to live in."""

    street: Street
    number: int


HELLO = Message(role="user", content="Hi")


class TestMessages:
    @pytest.mark.parametrize(
        ("given", "read"),
        [
            ("Hi", (HELLO,)),
            (HELLO, (HELLO,)),
            ({"role": "user", "content": "Hi"}, (HELLO,)),
            (["Hi"], (HELLO,)),
            ((HELLO, HELLO), (HELLO, HELLO)),
            (({"role": "system", "content": "S"}, "Hi"), (Message(role="system", content="S"), HELLO)),
            (["Hi", Reply(text="Ho", thinking="t")], (HELLO, Message(role="assistant", content="Ho", thinking="t"))),
            (
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}],
                },
                (Message(role="assistant", tool_calls=(ToolCall(name="f", arguments={"a": 1}, id="call_0"),)),),
            ),
            (
                {"role": "tool", "content": "9", "tool_name": "f", "tool_call_id": "c"},
                (Message(role="tool", content="9", tool_name="f", tool_call_id="c"),),
            ),
        ],
    )
    def test_each_form_is_read(self, both: Any, given: Any, read: tuple[Message, ...]) -> None:
        echo = Echo(["ok"])
        both.connect(echo, model=MODEL).chat(given)
        assert echo.requests[0].messages == read

    def test_generators_are_read(self, both: Any) -> None:
        echo = Echo(["ok"])
        both.connect(echo, model=MODEL).chat(each for each in ["one", "two"])
        assert [each.content for each in echo.requests[0].messages] == ["one", "two"]

    @pytest.mark.parametrize(
        ("given", "complaint"),
        [
            (5, "messages"),
            (None, "messages"),
            ([], "no messages"),
            ([5], "message"),
            (b"Hi", "message"),
            ({"role": "editor", "content": "x"}, "user, assistant"),
            ({"content": "x"}, "role"),
            ({"role": "user", "contents": "x"}, "`content`"),
            ({"role": "user", "content": [{"type": "text"}]}, "content"),
            ({"role": "assistant", "tool_calls": [5]}, "tool call"),
            ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, "not a JSON object"),
            ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}, "object"),
        ],
    )
    def test_invalid_ones_are_refused(self, both: Any, given: Any, complaint: str) -> None:
        echo = Echo()
        with pytest.raises(RequestRejected, match=complaint):
            both.connect(echo, model=MODEL).chat(given)
        assert echo.requests == []

    def test_prompt_must_be_text(self, both: Any) -> None:
        with pytest.raises(RequestRejected, match="prompt"):
            both.connect(Echo(), model=MODEL).generate(["x"])


class TestImages:
    def test_go_with_last_user_message(self, both: Any, tmp_path: Path) -> None:
        file = tmp_path / "cat.png"
        file.write_bytes(b"from a file")
        pictures = [file, str(file), b"bytes", Image(data=b"image")]
        echo = Echo(["ok", "ok"])
        llm = both.connect(echo, model=MODEL)
        llm.chat(["first", "second", Reply(text="third")], images=pictures)
        assert [len(each.images) for each in echo.requests[-1].messages] == [0, 4, 0]
        expected = [b"from a file", b"from a file", b"bytes", b"image"]
        assert [each.data for each in echo.requests[-1].messages[1].images] == expected
        llm.generate("what?", images=pictures[2:])
        assert [each.data for each in echo.requests[-1].images] == [b"bytes", b"image"]

    @pytest.mark.parametrize("given", ["cat.png", b"bytes", [5], ["/no/such/cat.png"], ["\0"]])
    def test_invalid_ones_are_refused(self, both: Any, given: Any) -> None:
        echo = Echo()
        with pytest.raises(RequestRejected, match="image"):
            both.connect(echo, model=MODEL).chat("x", images=given)
        assert echo.requests == []

    def test_need_a_user_message(self, both: Any) -> None:
        with pytest.raises(RequestRejected, match="user"):
            both.connect(Echo(), model=MODEL).chat(Reply(text="x"), images=[b"x"])


def weather(city: str, days: int = 1) -> str:
    """Forecast the weather.

    Args:
        city: where.
        days (int): how far ahead.

    Returns:
        words
    """
    return f"{city} {days}"


def sell(house: House) -> None:
    """Sell a house."""


def tools_of(both: Any, *tools: Any) -> tuple[Tool, ...]:
    echo = Echo(["ok"])
    both.connect(echo, model=MODEL).chat("x", tools=list(tools))
    read: tuple[Tool, ...] = echo.requests[0].tools
    return read


class TestTools:
    def test_functions_are_read(self, both: Any) -> None:
        (tool,) = tools_of(both, weather)
        assert (tool.name, tool.description) == ("weather", "Forecast the weather.")
        assert tool.parameters["required"] == ["city"]
        properties = tool.parameters["properties"]
        assert (properties["city"]["type"], properties["city"]["description"]) == ("string", "where.")
        assert (properties["days"]["default"], properties["days"]["description"]) == (1, "how far ahead.")

    def test_nested_schemas_are_kept(self, both: Any) -> None:
        by_function, by_model = tools_of(both, sell, House)
        assert by_function.parameters["$defs"]["Street"]["properties"]["name"]["type"] == "string"
        assert (by_model.name, by_model.description) == ("House", "A place to live in.")
        assert by_model.parameters["$defs"]["Street"]["required"] == ["name"]

    def test_mappings_are_read(self, both: Any) -> None:
        plain = {"name": "f", "description": "d", "parameters": JSON_SCHEMA}
        tool = Tool(name="f", description="d", parameters=JSON_SCHEMA)
        read = tools_of(both, plain, {"type": "function", "function": plain}, tool, {"name": "g"})
        assert read == (tool, tool, tool, Tool(name="g"))

    def test_methods_omit_self(self, both: Any) -> None:
        class Home:
            def heat(self, degrees: float) -> None:
                """Heat it."""

        (tool,) = tools_of(both, Home().heat)
        assert list(tool.parameters["properties"]) == ["degrees"]

    @pytest.mark.parametrize("tool", [5, "weather", {"parameters": {}}, {"function": 5}, lambda stream: stream.read])
    def test_invalid_ones_are_refused(self, both: Any, tool: Any) -> None:
        if callable(tool):
            tool.__annotations__ = {"stream": threading.Thread}  # A type without a JSON schema.
        echo = Echo()
        with pytest.raises(RequestRejected, match="tool"):
            both.connect(echo, model=MODEL).chat("x", tools=[tool])
        assert echo.requests == []

    def test_partial_functions_are_refused(self, both: Any) -> None:
        echo = Echo(["ok"])
        with pytest.raises(RequestRejected, match="tool"):
            both.connect(echo, model=MODEL).chat("x", tools=[functools.partial(weather, days=2)])

    def test_positional_parameters_are_refused(self, both: Any) -> None:
        def positional(city: str, /) -> str:
            return city

        echo = Echo(["ok"])
        with pytest.raises(RequestRejected, match="tool"):
            both.connect(echo, model=MODEL).chat("x", tools=[positional])

    @pytest.mark.parametrize("tools", [weather, 5])
    def test_must_be_a_sequence(self, both: Any, tools: Any) -> None:
        with pytest.raises(RequestRejected, match="tools"):
            both.connect(Echo(), model=MODEL).chat("x", tools=tools)


GOOD = '{"street": {"name": "Elm"}, "number": 9}'


class TestFormats:
    def test_models_become_schema_and_instance(self, both: Any) -> None:
        echo = Echo([GOOD, GOOD])
        llm = both.connect(echo, model=MODEL)
        assert llm.chat("x", format=House).parsed == House(street=Street(name="Elm"), number=9)
        assert echo.requests[0].format["$defs"]["Street"]["required"] == ["name"]
        stream = llm.generate("x", format=House, stream=True)
        assert "".join(chunk.text for chunk in stream) == GOOD
        assert stream.reply.parsed.number == 9

    @pytest.mark.parametrize("given", ["json", JSON_SCHEMA])
    def test_schemas_give_plain_data(self, both: Any, given: Any) -> None:
        echo = Echo(['{"city": "Ulm"}'])
        assert both.connect(echo, model=MODEL).chat("x", format=given).parsed == {"city": "Ulm"}
        assert echo.requests[0].format == given

    @pytest.mark.parametrize("given", ["xml", 5, {}, object()])
    def test_other_formats_are_refused(self, both: Any, given: Any) -> None:
        with pytest.raises(RequestRejected, match="format"):
            both.connect(Echo(), model=MODEL).chat("x", format=given)

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("given", "text"), [(House, '{"number": 9}'), (House, "plain words"), ("json", "{"), (JSON_SCHEMA, "")]
    )
    def test_misfit_keeps_the_reply(self, both: Any, given: Any, text: str, stream: bool) -> None:
        llm = both.connect(Echo([text]), model=MODEL)

        def act() -> None:
            reply = llm.chat("x", format=given, stream=stream)
            if stream:
                list(reply)

        with pytest.raises(InferenceFailed, match="format") as caught:
            act()
        assert caught.value.partial is not None
        assert (caught.value.partial.text, caught.value.partial.finish_reason) == (text, "stop")
        assert text == "" or text not in str(caught.value)
        assert llm.stats().running == 0

    def test_cut_reply_blames_max_tokens(self, both: Any) -> None:
        with pytest.raises(InferenceFailed, match=r"cut .* Raise `max_tokens`"):
            both.connect(Echo([GOOD]), model=MODEL).chat("x", format=House, max_tokens=2)

    def test_tool_calls_are_not_parsed(self, both: Any) -> None:
        call = ToolCall(name="f", arguments={}, id="c")
        llm = both.connect(Echo([[Chunk(tool_calls=(call,), finish_reason="tool_calls")]]), model=MODEL)
        assert llm.chat("x", format=House, tools=[weather]).parsed is None

    def test_deep_json_does_not_fit(self, both: Any) -> None:
        with pytest.raises(InferenceFailed, match="does not match"):
            both.connect(Echo(["[" * 100_000]), model=MODEL).chat("x", format="json")
