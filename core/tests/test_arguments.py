"""Arguments of callers: all are checked before anything is sent, and a bad call changes nothing."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import enum
import functools
import math
import os
import typing
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeAlias, cast

import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

import graftage
from graftage._engine.inputs import DEEPEST, LARGEST_IMAGE, read_messages
from graftage._engine.schemas import read_format, read_tools
from graftage.calls import Call
from graftage.exceptions import AdapterNotFound, InferenceFailed, RequestRejected
from graftage.settings import Settings
from graftage.testing.echo import Echo
from graftage.types import Image, Message, Reply, Tool, ToolCall

MODEL = "echo:latest"
HALF = "\ud800"
"""Half of a surrogate pair, which UTF-8 cannot encode."""
Act: TypeAlias = Callable[[Any], Any]


def refusal(both: Any, act: Act) -> RequestRejected:
    """Return how a call is refused; nothing is sent, and the next call works."""
    echo = Echo()
    llm = both.connect(echo, model=MODEL)
    with pytest.raises(RequestRejected) as caught:
        act(llm)
    assert caught.value.hint
    assert echo.requests == []
    assert llm.chat("again").text == "again"
    assert (llm.stats().running, llm.stats().waiting) == (0, 0)
    return caught.value


def chat(messages: Any) -> Act:
    """A call with these messages."""
    return lambda llm: llm.chat(messages)


def calls(name: str, arguments: Any) -> dict[str, Any]:
    """A message that calls a tool."""
    return {"role": "assistant", "tool_calls": [{"name": name, "arguments": arguments}]}


def tool(parameters: Any) -> dict[str, Any]:
    """A tool as a mapping."""
    return {"name": "f", "parameters": parameters}


def nested(levels: int) -> Any:
    """Lists in lists."""
    value: Any = []
    for _ in range(levels - 1):
        value = [value]
    return value


PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
BASE64 = base64.b64encode(PNG).decode()
JPEG = b"\xff\xd8\xff\xe0" + PNG
"""Its base64 starts like a path."""


class Text(str):
    """A text that is also path-like."""

    __slots__ = ()

    def __fspath__(self) -> str:
        return str(self)


TEXTS: dict[str, tuple[str, bytes, str]] = {
    "base64": (BASE64, PNG, "image/png"),
    "base64 of a subclass": (Text(BASE64), PNG, "image/png"),
    "base64 in lines": (base64.encodebytes(PNG * 3).decode(), PNG * 3, "image/png"),
    "base64 with blanks around": (f" \r\n{BASE64}\t", PNG, "image/png"),
    "base64 without its padding": (BASE64.rstrip("="), PNG, "image/png"),
    "base64 for addresses": (base64.urlsafe_b64encode(PNG).decode(), PNG, "image/png"),
    "base64 like a path": (base64.b64encode(JPEG).decode(), JPEG, "image/jpeg"),
    "a URI": (f"data:image/png;base64,{BASE64}", PNG, "image/png"),
    "a URI of a subclass": (Text(f"data:image/png;base64,{BASE64}"), PNG, "image/png"),
    "a URI in capitals": (f"DATA:IMAGE/PNG;BASE64,{BASE64}", PNG, "image/png"),
    "a URI with blanks": (f"\n data:image/png; base64, {BASE64}\n", PNG, "image/png"),
    "a URI with a parameter": (f"data:image/png;name=cat.png;base64,{BASE64}", PNG, "image/png"),
    "a URI without its padding": (f"data:image/png;base64,{BASE64.rstrip('=')}", PNG, "image/png"),
    "a URI with escaped base64": (f"data:image/png;base64,{BASE64.replace('+', '%2B')}", PNG, "image/png"),
    "a URI without base64": ("data:image/png," + "".join(f"%{each:02x}" for each in PNG), PNG, "image/png"),
    "a URI of a type without a mark": ("data:image/x-tga;base64,AAECAw==", b"\0\1\2\3", "image/x-tga"),
}
NO_PICTURES: dict[str, str] = {
    "nothing": "",
    "blanks": " \n",
    "a path that is base64, too": "/etc/passwd",
    "a path in a home": "~/cat.png",
    "a name": "cat",
    "a name of a subclass": Text("cat"),
    "words": "not a picture",
    "words outside ASCII": "Kätzchen",
    "half of a pair": HALF,
    "a file's address": "file:///etc/passwd",
    "an address": "https://example.org/cat.png",
    "an address in capitals": " HTTP://EXAMPLE.ORG/CAT",
    "base64 of a text": base64.b64encode(b"a text of a user").decode(),
    "base64 that is cut": BASE64[:41],
    "a URI of a text": f"data:text/plain;base64,{BASE64}",
    "a URI without a type": f"data:;base64,{BASE64}",
    "a URI without data": "data:image/gif;base64,",
    "a URI without a comma": "data:image/gif;base64",
    "a URI that is not base64": "data:image/png;base64,a cat!",
    "a URI with half of a pair": f"data:image/png;base64,{HALF}",
}


def in_mapping(image: Any) -> Any:
    return {"role": "user", "content": "x", "images": [image]}


def in_message(image: Any) -> Any:
    return Message(role="user", content="x", images=(image,))


def in_history(image: Any) -> Any:
    return [in_mapping(image), Reply(text="y"), "z"]


WAYS = [in_mapping, in_message, in_history]


def picture(both: Any, messages: Any, **arguments: Any) -> Image:
    """Return the picture that reaches the provider."""
    echo = Echo()
    both.connect(echo, model=MODEL).chat(messages, **arguments)
    (found,) = echo.requests[-1].messages[0].images
    return cast("Image", found)


class TestPictures:
    def test_pipe_is_refused_at_once(self, both: Any, pipe: Path) -> None:
        assert "not a regular file" in refusal(both, lambda llm: llm.chat("x", images=[pipe])).message

    def test_oversized_file_is_refused(self, both: Any, tmp_path: Path) -> None:
        path = tmp_path / "huge.png"
        with path.open("wb") as file:
            file.truncate(LARGEST_IMAGE + 1)
        assert (
            f"larger than {LARGEST_IMAGE} bytes" in refusal(both, lambda llm: llm.generate("x", images=[path])).message
        )

    @pytest.mark.parametrize(
        "path", ["~nosuchuser-of-all/cat.png", "~\0", "cat.png\0", HALF, "/no/such/cat.png", "", "."]
    )
    def test_bad_path_is_named_once(self, both: Any, path: str) -> None:
        message = refusal(both, lambda llm: llm.chat("x", images=[path])).message
        assert "Errno" not in message
        assert message.count("cat.png") <= 1

    @pytest.mark.parametrize(
        "act",
        [
            lambda llm: llm.chat("x", images=5),
            lambda llm: llm.generate("x", images=5),
            lambda llm: llm.chat("x", images={b"x": 1}),
            lambda llm: llm.chat("x", images=[Image(data="text")]),  # type: ignore[arg-type]
            lambda llm: llm.chat("x", images=[Image(data=b"x", path="cat.png")]),
            lambda llm: llm.chat("x", images=[Image(path=5)]),  # type: ignore[arg-type]
            lambda llm: llm.chat("x", images=[Image()]),
            lambda llm: llm.chat("x", images=[b""]),
            lambda llm: llm.chat({"role": "user", "images": [{"path": "cat.png"}]}),
            lambda llm: llm.chat({"role": "user", "content": "x", "images": 5}),
            lambda llm: llm.chat(Message(role="user", content="x", images=5)),  # type: ignore[arg-type]
            lambda llm: llm.chat(Message(role="user", content="x", images=("nothing.png",))),  # type: ignore[arg-type]
        ],
    )
    def test_other_data_is_refused(self, both: Any, act: Act) -> None:
        assert "image" in refusal(both, act).message

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("case", TEXTS)
    def test_message_text_is_base64_or_data_uri(self, both: Any, way: Act, case: str) -> None:
        given, data, media_type = TEXTS[case]
        assert picture(both, way(given)) == Image(data=data, media_type=media_type)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("case", NO_PICTURES)
    def test_any_other_text_is_refused_and_hidden(self, both: Any, way: Act, case: str) -> None:
        given = NO_PICTURES[case]
        error = refusal(both, lambda llm: llm.chat(way(given)))
        assert error.__cause__ is error.__context__ is None
        assert not given.strip() or given not in str(error)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("form", [str, Text, os.fspath, Path.as_uri], ids=["str", "subclass", "fspath", "address"])
    def test_no_text_in_a_message_reads_a_file(self, both: Any, tmp_path: Path, way: Act, form: Act) -> None:
        file = tmp_path / "cat.png"
        file.write_bytes(PNG)
        error = refusal(both, lambda llm: llm.chat(way(form(file))))
        assert "cat.png" not in str(error)
        assert "pathlib.Path" in str(error.hint)

    @pytest.mark.parametrize("way", [*WAYS, None])
    def test_path_or_bytes_work_everywhere(self, both: Any, tmp_path: Path, way: Act | None) -> None:
        file = tmp_path / "cat.png"
        file.write_bytes(PNG)
        images = [file, PNG, bytearray(PNG), memoryview(PNG), Image(data=PNG), Image(path=file), Image(path=str(file))]
        for given in (*images, BASE64.encode(), base64.encodebytes(PNG)):
            found = picture(both, way(given)) if way else picture(both, "x", images=[given])
            assert found == graftage.Image(data=PNG, media_type="image/png")

    @pytest.mark.parametrize("way", WAYS)
    def test_file_in_a_message_must_be_regular(self, both: Any, pipe: Path, way: Act) -> None:
        for given in (pipe, Image(path=pipe), Path("/dev/zero")):
            assert "not a regular file" in refusal(both, chat(way(given))).message

    def test_every_form_has_a_largest_size(self) -> None:
        huge = PNG + bytes(LARGEST_IMAGE)
        for given in (huge, "data:image/png;base64," + base64.b64encode(huge).decode()):
            with pytest.raises(RequestRejected, match=f"larger than {LARGEST_IMAGE} bytes"):
                read_messages([in_mapping(given)])

    def test_text_in_a_call_is_uri_or_path(self, both: Any, tmp_path: Path) -> None:
        file = tmp_path / "cat.png"
        file.write_bytes(PNG)
        for given in (str(file), f"data:image/png;base64,{BASE64}"):
            assert picture(both, "x", images=[given]) == Image(data=PNG, media_type="image/png")

    @pytest.mark.parametrize("given", [BASE64, "https://example.org/cat.png", "data:text/plain,cat", "no-such-cat"])
    def test_other_text_in_a_call_stays_hidden(self, both: Any, given: str) -> None:
        error = refusal(both, lambda llm: llm.generate("x", images=[given]))
        assert given not in f"{error} {error.__cause__} {error.__context__}"
        assert "bytes" in str(error.hint) or "base64" in str(error.hint)


class TestText:
    @pytest.mark.parametrize(
        "act",
        [
            lambda llm: llm.chat(HALF),
            lambda llm: llm.chat({"role": "user", "content": HALF}),
            lambda llm: llm.chat(Message(role="user", content=HALF)),
            lambda llm: llm.chat({"role": "assistant", "thinking": HALF}),
            lambda llm: llm.chat({"role": "tool", "content": "x", "tool_name": HALF}),
            lambda llm: llm.chat({"role": "tool", "content": "x", "tool_call_id": HALF}),
            lambda llm: llm.chat(calls(HALF, {})),
            lambda llm: llm.chat(calls("f", {"a": HALF})),
            lambda llm: llm.chat(calls("f", {HALF: 1})),
            lambda llm: llm.chat(calls("f", '{"a": "\\ud800"}')),
            lambda llm: llm.chat("x", tools=[Tool(name=HALF)]),
            lambda llm: llm.chat("x", tools=[Tool(name="f", description=HALF)]),
            lambda llm: llm.chat("x", tools=[tool({"a": HALF})]),
            lambda llm: llm.chat("x", format={"const": HALF}),
            lambda llm: llm.chat("x", options={"stop": [HALF]}),
            lambda llm: llm.chat("x", adapter=HALF),
            lambda llm: llm.resolve_adapter(HALF),
            lambda llm: llm.generate(HALF),
            lambda llm: llm.generate("x", system=HALF),
            lambda llm: llm.generate("x", suffix=HALF),
            lambda llm: llm.embed(HALF),
            lambda llm: llm.embed(["x", HALF]),
            lambda llm: llm.chat("x", model=HALF),
            lambda llm: llm.embed("x", model=HALF),
            lambda llm: llm.show(HALF),
            lambda llm: llm.pull(HALF),
            lambda llm: llm.load(HALF),
        ],
    )
    def test_without_utf8_is_refused_and_hidden(self, both: Any, act: Act) -> None:
        error = refusal(both, act)
        assert "surrogate" in error.message
        assert HALF not in str(error)

    def test_any_language_is_sent_unchanged(self, both: Any) -> None:
        echo = Echo()
        words = "Grüße, 世界 🌍 \0"
        assert both.connect(echo, model=MODEL).chat(words, options={"stop": [words]}).text == words
        assert echo.requests[0].options == {"stop": [words]}

    @pytest.mark.parametrize(
        "act",
        [
            lambda llm: llm.chat({"role": "assistant", "tool_calls": 5}),
            lambda llm: llm.chat(Message(role="user", tool_calls=5)),  # type: ignore[arg-type]
            lambda llm: llm.chat(Message(role="assistant", tool_calls=(ToolCall(name="f", arguments="x", id="1"),))),  # type: ignore[arg-type]
            lambda llm: llm.chat({"role": "assistant", "tool_calls": [{"arguments": {}}]}),
            lambda llm: llm.chat(Message(role="bishop", content="x")),  # type: ignore[arg-type]
            lambda llm: llm.chat({"role": "assistant", "thinking": 5}),
            lambda llm: llm.chat({"role": "tool", "content": "x", "tool_name": b"f"}),
            lambda llm: llm.chat({"role": "tool", "content": "x", "tool_call_id": 5}),
            lambda llm: llm.chat({"a", "b"}),
            lambda llm: llm.chat("x", tools=[Tool(name=5)]),  # type: ignore[arg-type]
            lambda llm: llm.chat("x", tools=[Tool(name="f", parameters=5)]),  # type: ignore[arg-type]
            lambda llm: llm.chat("x", tools=[tool(5)]),
            lambda llm: llm.generate("x", system={1}),
            lambda llm: llm.generate("x", suffix=5),
            lambda llm: llm.embed({"a": 1}),
            lambda llm: llm.embed({"a"}),
            lambda llm: llm.embed("x", dimensions=math.nan),
            lambda llm: llm.embed("x", dimensions=-5),
            lambda llm: llm.chat("x", max_tokens=10**5000),
            lambda llm: llm.chat("x", context_window=2**31),
            lambda llm: llm.chat("x", context_window=1),
        ],
    )
    def test_another_kind_is_refused(self, both: Any, act: Act) -> None:
        assert "which it should have typed" not in refusal(both, act).message


CIRCLE: dict[str, Any] = {"type": "object"}
CIRCLE["properties"] = CIRCLE
NO_JSON = {
    "nan": math.nan,
    "infinity": math.inf,
    "a number beyond any float": 10**400,
    "a set": {1},
    "an object": object(),
    "bytes": b"x",
    "a key that is not text": {1: 2},
    "a circle": CIRCLE,
    "too many levels": nested(5000),
    "one level too many": nested(DEEPEST),
}


class TestJsonData:
    @pytest.mark.parametrize("value", NO_JSON.values(), ids=NO_JSON)
    @pytest.mark.parametrize(
        "act",
        [
            lambda llm, value: llm.chat("x", format={"const": value}),
            lambda llm, value: llm.chat("x", tools=[tool({"default": value})]),
            lambda llm, value: llm.chat("x", tools=[Tool(name="f", parameters={"default": value})]),
            lambda llm, value: llm.chat(calls("f", {"a": value})),
            lambda llm, value: llm.embed("x", options={"stop": [value]}),
        ],
        ids=["format", "tool", "Tool", "arguments of a call", "option"],
    )
    def test_other_values_are_refused(self, both: Any, act: Callable[[Any, Any], Any], value: Any) -> None:
        assert refusal(both, lambda llm: act(llm, value)).message

    def test_any_mapping_is_sent_unchanged(self, both: Any) -> None:
        echo = Echo(["{}"])
        schema = MappingProxyType({"type": "object", "default": nested(DEEPEST - 1), "enum": (1, 2.5, None, True, "a")})
        both.connect(echo, model=MODEL).chat("x", format=schema)
        expected = {"type": "object", "default": nested(DEEPEST - 1), "enum": [1, 2.5, None, True, "a"]}
        assert echo.requests[0].format == expected
        assert type(echo.requests[0].format) is dict

    def test_sent_data_is_a_copy(self, both: Any) -> None:
        echo = Echo(["{}"])
        schema: dict[str, Any] = {"type": "object", "required": []}
        both.connect(echo, model=MODEL).chat("x", format=schema)
        schema["required"].append("later")
        assert echo.requests[0].format == {"type": "object", "required": []}


class Opaque:
    pass


class Pair(typing.NamedTuple):
    city: str
    day: int


class Colour(enum.Enum):
    RED = "red"


City = typing.NewType("City", str)


class WithObject(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    thing: Opaque


class WithFunction(BaseModel):
    act: Callable[[int], int]


class WithNan(BaseModel):
    number: float = math.nan


def takes_object(thing: Opaque) -> None:
    """Take an argument without a schema."""


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
PLAIN = {"name": "f", "description": "d"}
READ = Tool(name="f", description="d", parameters=SCHEMA)
TOOLS: dict[str, dict[str, Any]] = {
    "ours": {**PLAIN, "parameters": SCHEMA},
    "OpenAI's": {"type": "function", "function": {**PLAIN, "parameters": SCHEMA, "strict": True}},
    "OpenAI's without levels": {"type": "function", **PLAIN, "parameters": SCHEMA, "strict": True},
    "Anthropic's": {**PLAIN, "input_schema": SCHEMA, "type": "custom", "cache_control": {"type": "ephemeral"}},
    "MCP's": {
        **PLAIN,
        "inputSchema": SCHEMA,
        "title": "F",
        "outputSchema": {"type": "object"},
        "annotations": {"readOnlyHint": True},
        "icons": None,
        "execution": None,
        "_meta": {},
    },
    "MCP's in OpenAI's": {"type": "function", "function": {**PLAIN, "inputSchema": SCHEMA}},
    "the same schema twice": {**PLAIN, "parameters": dict(SCHEMA), "inputSchema": SCHEMA},
    "a schema and a key without": {**PLAIN, "parameters": None, "input_schema": SCHEMA},
}
NO_TOOLS: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt schema": ({**PLAIN, "paramaters": SCHEMA}, "`parameters`"),
    "a schema in capitals": ({**PLAIN, "Parameters": SCHEMA}, "`parameters`"),
    "a misspelt schema of MCP": ({**PLAIN, "inputSchma": SCHEMA}, "`inputSchema`"),
    "a misspelt schema of Anthropic": ({**PLAIN, "input_shema": SCHEMA}, "`input_schema`"),
    "a misspelt description": ({"name": "f", "descripton": "d"}, "`description`"),
    "a schema under another word": ({**PLAIN, "json": SCHEMA}, "parameters"),
    "a schema without its key": ({**PLAIN, **SCHEMA}, "parameters"),
    "a key that is not text": ({**PLAIN, 5: SCHEMA}, "parameters"),  # type: ignore[dict-item]
    "a misspelt schema in OpenAI's": ({"function": {**PLAIN, "params": SCHEMA}}, "parameters"),
    "a schema beside OpenAI's": ({"function": PLAIN, "parameters": SCHEMA}, "function"),
    "a description beside OpenAI's": ({"function": {"name": "f"}, "description": "d"}, "function"),
    "two schemas": ({**PLAIN, "parameters": SCHEMA, "inputSchema": {"type": "object"}}, "`inputSchema`"),
    "a schema and an empty one": ({**PLAIN, "parameters": {}, "input_schema": SCHEMA}, "`input_schema`"),
    "a list for a schema": ({**PLAIN, "parameters": []}, "JSON schema"),
    "a text for a schema": ({**PLAIN, "inputSchema": "{}"}, "JSON schema"),
    "a description that is not text": ({"name": "f", "description": ["d"]}, "string"),
}


class Bare(BaseModel):
    city: str


class Parent(BaseModel):
    """The parent's."""


class Child(Parent):
    city: str


class Described(Parent):
    """
    Show the weather.

    In any city.
    """

    city: str


@dataclasses.dataclass
class BareData:
    city: str


@dataclasses.dataclass
class DescribedData:
    """Show the weather."""

    city: str


class BareKeys(typing.TypedDict):
    city: str


class DescribedKeys(BareKeys):
    """Show the weather."""

    day: typing.NotRequired[Annotated[int, Field(ge=1)]]


class Station:
    """A weather station."""

    def show(self, city: str) -> str:
        """Show the weather."""
        return city

    @classmethod
    def show_all(cls, city: str) -> str:
        """Show the weather."""
        return city


class OtherStation(Station):
    def show(self, city: str) -> str:
        return city


def bare(city: str) -> str:
    return city


def described(city: str) -> str:
    """Show the weather.

    Args:
        city: where.
    """
    return city


def named(function: Any, **more: Any) -> Any:
    """Return a partial function with a name, as `functools.wraps` would give it."""
    made = functools.partial(function)
    made.__name__ = "named"  # type: ignore[attr-defined]
    vars(made).update(more)
    return made


WEATHER = "Show the weather."
DOCSTRINGS: dict[str, tuple[Any, str]] = {
    "a model": (Bare, ""),
    "a model with a parent": (Child, ""),
    "a model with its own": (Described, "Show the weather.\n\nIn any city."),
    "a dataclass": (BareData, ""),
    "a dataclass with its own": (DescribedData, WEATHER),
    "a TypedDict": (BareKeys, ""),
    "a TypedDict with its own": (DescribedKeys, WEATHER),
    "a function": (bare, ""),
    "a function with its own": (described, WEATHER),
    "a method": (Station().show, WEATHER),
    "a method without its parent's": (OtherStation().show, ""),
    "a method of a class": (Station.show_all, WEATHER),
    "a partial function": (named(bare), ""),
    "a partial function with its own": (named(bare, __doc__=WEATHER), WEATHER),
}


def long(city: str, day: int, hour: int = 0) -> str:
    """Show the weather.

    Args:
        city (str): where it is: a name,
            or a post code.
        day: 0 is today,
          1 tomorrow.

        hour: from 0 on

    Returns:
        words: some.
    """
    return f"{city}{day}{hour}"


class TestTools:
    @pytest.mark.parametrize("model", [BaseModel, WithObject, WithFunction, WithNan])
    @pytest.mark.parametrize("argument", ["format", "tools"])
    def test_model_without_schema_is_refused(self, both: Any, argument: str, model: Any) -> None:
        given = model if argument == "format" else [model]
        error = refusal(both, lambda llm: llm.chat("x", **{argument: given}))
        assert "http" not in str(error)

    @pytest.mark.parametrize(
        "function", [functools.partial(int, base=2), takes_object, print, Opaque], ids=lambda each: type(each).__name__
    )
    def test_function_without_schema_is_refused(self, both: Any, function: Any) -> None:
        error = refusal(both, lambda llm: llm.chat("x", tools=[function]))
        assert "cannot be offered as a tool" in error.message
        assert "http" not in str(error)
        assert "arbitrary_types_allowed" not in str(error)

    def test_function_needs_a_name(self, both: Any) -> None:
        error = refusal(both, lambda llm: llm.chat("x", tools=[lambda x: x]))
        assert "Give it a name" in str(error.hint)

    @pytest.mark.parametrize("given", TOOLS.values(), ids=TOOLS)
    def test_every_form_keeps_its_schema(self, both: Any, given: dict[str, Any]) -> None:
        echo = Echo()
        both.connect(echo, model=MODEL).chat("x", tools=[given])
        assert echo.requests[0].tools == (READ,)

    @pytest.mark.parametrize("given", [{}, {"parameters": None}, {"parameters": {}}, {"inputSchema": {}}])
    def test_missing_schema_takes_no_arguments(self, both: Any, given: dict[str, Any]) -> None:
        echo = Echo()
        both.connect(echo, model=MODEL).chat("x", tools=[{"name": "f", **given}])
        assert echo.requests[0].tools == (Tool(name="f"),)

    @pytest.mark.parametrize(("given", "way_out"), NO_TOOLS.values(), ids=NO_TOOLS)
    def test_schema_that_would_be_lost_is_refused(self, both: Any, given: dict[str, Any], way_out: str) -> None:
        assert way_out in str(refusal(both, lambda llm: llm.chat("x", tools=[given])).hint)

    def test_long_argument_description_is_kept(self) -> None:
        (tool,) = read_tools([long])
        said = {name: each["description"] for name, each in tool.parameters["properties"].items()}
        assert said == {
            "city": "where it is: a name, or a post code.",
            "day": "0 is today, 1 tomorrow.",
            "hour": "from 0 on",
        }

    @pytest.mark.parametrize(("given", "description"), DOCSTRINGS.values(), ids=DOCSTRINGS)
    def test_description_is_not_inherited(self, given: Any, description: str) -> None:
        (tool,) = read_tools([given])
        assert tool.description == description
        assert next(iter(tool.parameters["properties"])) == "city"

    @pytest.mark.parametrize("given", [Pair, Colour, Station, Station(), max, int, [Bare], Bare(city="Ulm")])
    def test_other_objects_are_refused(self, given: Any) -> None:
        with pytest.raises(RequestRejected) as caught:
            read_tools([given])
        assert caught.value.hint

    @pytest.mark.parametrize("kind", ["web_search_20250305", "web_search_preview", "mcp", "computer_use", 5])
    def test_tool_that_runs_elsewhere_is_refused(self, kind: Any) -> None:
        for given in ({**PLAIN, "type": kind}, {"type": kind, "function": PLAIN}):
            with pytest.raises(RequestRejected, match="runs on a server") as caught:
                read_tools([given])
            assert "`function`" in str(caught.value.hint)


FORMATS: dict[str, tuple[Any, str, Any]] = {
    "a model": (Bare, '{"city": "Ulm"}', Bare(city="Ulm")),
    "a dataclass": (BareData, '{"city": "Ulm"}', BareData(city="Ulm")),
    "a TypedDict": (BareKeys, '{"city": "Ulm"}', {"city": "Ulm"}),
    "a TypedDict with what may be missing": (DescribedKeys, '{"city": "Ulm"}', {"city": "Ulm"}),
    "a NamedTuple": (Pair, '["Ulm", 2]', Pair("Ulm", 2)),
    "a list": (list[Bare], '[{"city": "Ulm"}]', [Bare(city="Ulm")]),
    "a dictionary": (dict[str, int], '{"a": 1}', {"a": 1}),
    "one of two": (Bare | int, "5", 5),
    "perhaps": (typing.Optional[Bare], "null", None),  # noqa: UP045 - the older form is another object
    "annotated": (Annotated[int, Field(ge=3)], "5", 5),
    "an adapter": (TypeAdapter(list[Bare]), '[{"city": "Ulm"}]', [Bare(city="Ulm")]),
    "words": (Literal["yes", "no"], '"yes"', "yes"),
    "an enumeration": (Colour, '"red"', Colour.RED),
    "a new type": (City, '"Ulm"', "Ulm"),
    "a number": (int, "5", 5),
    "a schema": (SCHEMA, '{"city": "Ulm"}', {"city": "Ulm"}),
}


WRAPPED: dict[str, tuple[Any, Any]] = {
    "nothing": (None, None),
    "no text": ("", None),
    "text": ({"type": "text"}, None),
    "any JSON": ({"type": "json_object"}, "json"),
    "any JSON with a schema": ({"type": "json_object", "schema": SCHEMA}, SCHEMA),
    "OpenAI's": ({"type": "json_schema", "json_schema": {"name": "A", "strict": True, "schema": SCHEMA}}, SCHEMA),
    "OpenAI's without levels": ({"type": "json_schema", "name": "A", "strict": True, "schema": SCHEMA}, SCHEMA),
    "OpenAI's inside": ({"name": "A", "schema": SCHEMA}, SCHEMA),
    "Anthropic's": ({"type": "json_schema", "schema": SCHEMA}, SCHEMA),
    "a schema of several types": ({"type": ["object", "null"]}, {"type": ["object", "null"]}),
    "a schema without a type": ({"anyOf": [SCHEMA]}, {"anyOf": [SCHEMA]}),
    "a schema with a key of that name": (
        {"type": "object", "properties": {"schema": {}}, "schema": "x"},
        {"type": "object", "properties": {"schema": {}}, "schema": "x"},
    ),
}
NO_FORMATS: dict[str, Any] = {
    "an empty schema": {},
    "OpenAI's without a schema": {"type": "json_schema", "json_schema": {"name": "A"}},
    "OpenAI's without anything": {"type": "json_schema"},
    "OpenAI's with an empty schema": {"type": "json_schema", "json_schema": {"schema": {}}},
    "OpenAI's with no object": {"type": "json_schema", "json_schema": [SCHEMA]},
    "OpenAI's with its name": {"response_format": {"type": "json_object"}},
    "OpenAI's with a level left out": {"json_schema": {"name": "A", "schema": SCHEMA}},
    "OpenAI's with a level more": {"format": {"type": "json_schema", "name": "A", "schema": SCHEMA}},
    "a type of another client": {"type": "regex", "value": "[a-z]+"},
    "a type in capitals": {"type": "JSON_OBJECT"},
    "an example": {"city": "Ulm"},
    "JSON as text": '{"type": "object"}',
    "the name of a type": "json_object",
    "capitals": "JSON",
    "an instance": Bare(city="Ulm"),
    "an instance of a dataclass": BareData(city="Ulm"),
    "a function": bare,
    "a partial function": functools.partial(bare),
    "a class": Opaque,
    "any object": object,
    "anything": Any,
    "a callable": Callable[[int], int],
    "a list of a class": list[Opaque],
    "a number": 5,
    "a list of models": [Bare],
}


class TestFormats:
    @pytest.mark.parametrize(("given", "answer", "parsed"), FORMATS.values(), ids=FORMATS)
    def test_type_is_sent_as_schema_and_parsed(self, both: Any, given: Any, answer: str, parsed: Any) -> None:
        echo = Echo([answer])
        assert both.connect(echo, model=MODEL).chat("x", format=given).parsed == parsed
        assert {"type", "anyOf", "enum", "$ref"} & set(echo.requests[0].format)

    def test_reply_of_another_type_is_refused(self, both: Any) -> None:
        with pytest.raises(InferenceFailed, match="does not match the `format`"):
            both.connect(Echo(['["Ulm"]']), model=MODEL).chat("x", format=list[Bare])

    def test_typed_dict_keeps_its_descriptions(self) -> None:
        schema: Any = read_format(DescribedKeys)[0]
        assert schema["required"] == ["city"]
        assert schema["properties"]["day"]["minimum"] == 1
        assert schema["title"] == "DescribedKeys"

    @pytest.mark.parametrize(("given", "sent"), WRAPPED.values(), ids=WRAPPED)
    def test_other_clients_formats_are_unwrapped(self, given: Any, sent: Any) -> None:
        schema, parse = read_format(given)
        assert schema == sent
        assert (parse is None) == (sent is None)

    @pytest.mark.parametrize("given", NO_FORMATS.values(), ids=NO_FORMATS)
    def test_wrong_format_is_refused_before_sending(self, both: Any, given: Any) -> None:
        error = refusal(both, lambda llm: llm.chat("x", format=given))
        assert "http" not in str(error)
        assert "schema" in str(error.hint)


URI = f"data:image/png;base64,{BASE64}"
ONE_PIXEL = Image(data=PNG, media_type="image/png")
CALL = ToolCall(name="f", arguments={"a": 1}, id="c1")


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def assistant(**keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, **keys}


def seen(images: tuple[Image, ...] = (ONE_PIXEL,), content: str = "") -> tuple[Message, ...]:
    """A message of the user with a picture."""
    return (Message(role="user", content=content, images=images),)


def said(**keys: Any) -> tuple[Message, ...]:
    return (Message(role="assistant", **keys),)


def result(content: str = "", **keys: Any) -> Message:
    return Message(role="tool", content=content, **{"tool_call_id": "c1", **keys})


class Part(BaseModel):
    """A part like those of OpenAI's and Anthropic's packages."""

    type: str = "text"
    text: str = "hi"
    citations: list[Any] | None = None


MESSAGES: dict[str, tuple[Any, tuple[Message, ...]]] = {
    "a text part": (user({"type": "text", "text": "hi"}), seen((), "hi")),
    "two text parts": (user({"type": "text", "text": "a"}, {"type": "text", "text": "b"}), seen((), "a\nb")),
    "a part of the other API": (user({"type": "input_text", "text": "hi"}), seen((), "hi")),
    "a text among parts": (user("hi"), seen((), "hi")),
    "a part with unused keys": (
        user({"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}, "annotations": None}),
        seen((), "hi"),
    ),
    "a part of a package": (user(Part()), seen((), "hi")),
    "a part alone": ({"role": "user", "content": {"type": "text", "text": "hi"}}, seen((), "hi")),
    "a part alone, of a package": ({"role": "user", "content": Part()}, seen((), "hi")),
    "parts from a tuple": ({"role": "user", "content": ({"type": "text", "text": "hi"},)}, seen((), "hi")),
    "no parts": (user(), seen((), "")),
    "parts in a Message": (Message(role="user", content=[Part()]), seen((), "hi")),  # type: ignore[arg-type]
    "OpenAI's picture": (user({"type": "image_url", "image_url": {"url": URI, "detail": "low"}}), seen()),
    "OpenAI's picture as a text": (user({"type": "image_url", "image_url": URI}), seen()),
    "the other API's picture": (user({"type": "input_image", "image_url": URI, "detail": "auto"}), seen()),
    "Anthropic's picture": (
        user({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}}),
        seen(),
    ),
    "MCP's picture": (user({"type": "image", "data": BASE64, "mimeType": "image/png"}), seen()),
    "a picture without a type": (user({"type": "image", "data": BASE64}), seen()),
    "a picture and a question": (
        user({"type": "image_url", "image_url": URI}, {"type": "text", "text": "What?"}),
        seen(content="What?"),
    ),
    "pictures in both places": (
        {"role": "user", "content": [{"type": "image_url", "image_url": URI}], "images": [PNG]},
        seen((ONE_PIXEL, ONE_PIXEL)),
    ),
    "a developer": ({"role": "developer", "content": "hi"}, (Message(role="system", content="hi"),)),
    "a name": ({"role": "user", "content": "hi", "name": "bob"}, (Message(role="user", content="hi", name="bob"),)),
    "a name of the assistant": (assistant(content="hi", name="bob"), said(content="hi", name="bob")),
    "the name of a tool": (
        {"role": "tool", "content": "5", "tool_call_id": "c1", "name": "f"},
        (result("5", tool_name="f"),),
    ),
    "an older result": (
        {"role": "function", "name": "f", "content": "5"},
        (Message(role="tool", content="5", tool_name="f"),),
    ),
    "a result in parts": (
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "5"}]},
        (result("5"),),
    ),
    "what OpenAI's package has": (
        assistant(content="hi", refusal=None, annotations=[], audio=None, function_call=None, tool_calls=None),
        said(content="hi"),
    ),
    "what others add": (
        assistant(content="hi", id="x", type="message", model="m", usage={"a": 1}, stop_reason="end_turn", parsed=5),
        said(content="hi"),
    ),
    "a refusal": (assistant(refusal="No."), said(content="No.")),
    "a refusal as a part": (assistant(content=[{"type": "refusal", "refusal": "No."}]), said(content="No.")),
    "an answer of the other API": (
        assistant(content=[{"type": "output_text", "text": "hi", "annotations": [], "logprobs": []}]),
        said(content="hi"),
    ),
    "reasoning_content": (assistant(content="hi", reasoning_content="hm"), said(content="hi", thinking="hm")),
    "reasoning": (assistant(content="hi", reasoning="hm", reasoning_content=""), said(content="hi", thinking="hm")),
    "Anthropic's thinking": (
        assistant(content=[{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "hi"}]),
        said(content="hi", thinking="hm"),
    ),
    "an older call": (
        assistant(function_call={"name": "f", "arguments": '{"a": 1}'}),
        said(tool_calls=(ToolCall(name="f", arguments={"a": 1}, id="call_0"),)),
    ),
    "Anthropic's call": (
        assistant(
            content=[{"type": "text", "text": "hi"}, {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}}]
        ),
        said(content="hi", tool_calls=(CALL,)),
    ),
    "Anthropic's result": (user({"type": "tool_result", "tool_use_id": "c1", "content": "5"}), (result("5"),)),
    "Anthropic's result in parts, and more": (
        user(
            {
                "type": "tool_result",
                "tool_use_id": "c1",
                "is_error": False,
                "content": [
                    {"type": "text", "text": "5"},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}},
                ],
            },
            {"type": "tool_result", "tool_use_id": "c2"},
            {"type": "text", "text": "Go on."},
        ),
        (result("5", images=(ONE_PIXEL,)), result(tool_call_id="c2"), Message(role="user", content="Go on.")),
    ),
}
NO_MESSAGES: dict[str, tuple[Any, str]] = {
    "sound": (user({"type": "input_audio", "input_audio": {"data": "canary", "format": "wav"}}), "`input_audio`"),
    "a file": (user({"type": "file", "file": {"file_data": "canary"}}), "`file`"),
    "a document": (user({"type": "document", "source": {"data": "canary"}}), "`document`"),
    "thinking that is hidden": (assistant(content=[{"type": "redacted_thinking", "data": "canary"}]), "redacted"),
    "an unknown part": (user({"type": "canary" * 20}), "of the type"),
    "a part without a type": (user({"text": "canary"}), "without a type"),
    "a part whose type is not text": (user({"type": ["text"], "text": "canary"}), "without a type"),
    "data in place of parts": ({"role": "tool", "content": {"temperature": "canary"}}, "without a type"),
    "a number among parts": (user(5), "without a type"),
    "bytes among parts": (user(b"canary"), "without a type"),
    "a text part without its text": (user({"type": "text"}), "`text` part"),
    "a text part of a number": (user({"type": "text", "text": 5}), "`text` part"),
    "a picture elsewhere": (user({"type": "image_url", "image_url": {"url": "https://x.org/canary"}}), "address"),
    "a picture by its id": (user({"type": "input_image", "file_id": "canary"}), "without its bytes"),
    "a picture of Anthropic elsewhere": (
        user({"type": "image", "source": {"type": "url", "url": "https://x.org/canary"}}),
        "address",
    ),
    "a picture of a path": (user({"type": "image_url", "image_url": {"url": "/etc/passwd"}}), "base64"),
    "data that is not a picture": (user({"type": "image", "data": "canary", "mimeType": "text/plain"}), "URI"),
    "a result of nothing": (user({"type": "tool_result", "content": "canary"}), "`tool_use_id`"),
    "a result in a result": (
        user({"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "tool_result", "content": "canary"}]}),
        "`tool_result`",
    ),
    "a call without a name": (assistant(content=[{"type": "tool_use", "id": "c1", "input": {}}]), "no name"),
    "a call without an object": (
        assistant(content=[{"type": "tool_use", "id": "c1", "name": "f", "input": "canary"}]),
        "malformed",
    ),
    "a number for a content": ({"role": "user", "content": 5}, "`content`"),
    "bytes for a content": ({"role": "user", "content": b"canary"}, "`content`"),
    "sound beside the text": (assistant(audio={"id": "canary"}), "`audio`"),
    "a name that is not text": ({"role": "user", "content": "x", "name": 5}, "`name`"),
    "an unknown role": ({"role": "human", "content": "canary"}, "human"),
    "a role that is not text": ({"role": ["user"], "content": "canary"}, "role"),
}


class TestForeignMessages:
    """Messages in the form of other clients."""

    @pytest.mark.parametrize(("given", "read"), MESSAGES.values(), ids=MESSAGES)
    def test_are_read_by_meaning(self, given: Any, read: tuple[Message, ...]) -> None:
        assert read_messages([given]) == read

    def test_reach_the_provider(self, both: Any) -> None:
        echo = Echo(["ok"])
        both.connect(echo, model=MODEL).chat([given for given, _ in MESSAGES.values()])
        assert echo.requests[-1].messages == read_messages([given for given, _ in MESSAGES.values()])

    @pytest.mark.parametrize(("given", "complaint"), NO_MESSAGES.values(), ids=NO_MESSAGES)
    def test_content_that_would_be_lost_is_refused(self, given: Any, complaint: str) -> None:
        with pytest.raises(RequestRejected, match=complaint) as caught:
            read_messages([given])
        error = caught.value
        assert error.hint
        assert "canary" * 8 not in f"{error} {error.__cause__} {error.__context__}"
        assert "canary" not in f"{error.message.replace('canary' * 6, '')} {error.__cause__} {error.__context__}"


ARGUMENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "an object": ({"arguments": {"a": 1}}, {"a": 1}),
    "an empty object": ({"arguments": {}}, {}),
    "none": ({}, {}),
    "null": ({"arguments": None}, {}),
    "an empty text": ({"arguments": ""}, {}),
    "blanks": ({"arguments": " \n"}, {}),
    "a text of null": ({"arguments": "null"}, {}),
    "a text of an object": ({"arguments": ' {"a": 1}\n'}, {"a": 1}),
    "a text with lines inside": ({"arguments": '{"a": "1\n\t2"}'}, {"a": "1\n\t2"}),
    "a text of a text of an object": ({"arguments": '"{\\"a\\": 1}"'}, {"a": 1}),
    "a text of a text of null": ({"arguments": '"null"'}, {}),
}
NO_ARGUMENTS = [
    "{",
    "canary",
    '{"a": canary}',
    "[1]",
    "5",
    "true",
    '"canary"',
    [1],
    [],
    5,
    0,
    True,
    False,
    "[" * 100_000,
]


def made(body: dict[str, Any]) -> list[Any]:
    """A conversation with a call of the tool `f`, in OpenAI's form and in ours."""
    return [
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", **body}}]},
        {"role": "assistant", "tool_calls": [{"id": "1", "name": "f", **body}]},
    ]


class TestEarlierCalls:
    """Calls of tools in earlier messages."""

    @pytest.mark.parametrize(("given", "read"), ARGUMENTS.values(), ids=ARGUMENTS)
    def test_arguments_are_read_by_meaning(self, both: Any, given: dict[str, Any], read: dict[str, Any]) -> None:
        echo = Echo(["ok"])
        both.connect(echo, model=MODEL).chat(made(given))
        for message in echo.requests[0].messages:
            assert message.tool_calls == (ToolCall(name="f", arguments=read, id="1"),)

    @pytest.mark.parametrize("given", NO_ARGUMENTS, ids=lambda each: str(each)[:20])
    def test_arguments_must_be_an_object(self, both: Any, given: Any) -> None:
        for message in made({"arguments": given}):
            error = refusal(both, chat(message))
            assert "tool `f` is malformed" in error.message
            assert "canary" not in f"{error} {error.__cause__} {error.__context__} {error.to_dict()}"

    @pytest.mark.parametrize("key", ["input", "args", "argumets"])
    def test_another_key_is_refused(self, both: Any, key: str) -> None:
        for message in made({key: {"a": 1}}):
            assert "`arguments`" in str(refusal(both, chat(message)).hint)

    def test_other_known_keys_are_left_out(self, both: Any) -> None:
        echo = Echo(["ok"])
        call = {"id": "1", "index": 0, "function": {"name": "f", "arguments": "{}", "index": 0}, "extra_content": {}}
        both.connect(echo, model=MODEL).chat({"role": "assistant", "tool_calls": [call]})
        assert echo.requests[0].messages[0].tool_calls == (ToolCall(name="f", arguments={}, id="1"),)


def breaking() -> Iterator[str]:
    """A generator that fails halfway."""
    yield "x"
    raise LookupError("the caller's own")


@pytest.mark.parametrize(
    "act",
    [
        lambda llm: llm.chat(breaking()),
        lambda llm: llm.embed(breaking()),
        lambda llm: llm.chat("x", images=breaking()),
        lambda llm: llm.chat("x", tools=breaking()),
        lambda llm: llm.generate("x", images=breaking()),
    ],
)
def test_error_of_the_callers_generator_passes_through(both: Any, act: Act) -> None:
    echo = Echo()
    llm = both.connect(echo, model=MODEL)
    with pytest.raises(LookupError, match="the caller's own"):
        act(llm)
    assert echo.requests == []
    assert (llm.stats().running, llm.stats().failures) == (0, 0)
    assert llm.chat("again").text == "again"


class TestSwitchesAndNames:
    @pytest.mark.parametrize("value", ["no", "x", 1])
    @pytest.mark.parametrize(
        "act",
        [
            lambda llm, value: llm.chat("x", force=value),
            lambda llm, value: llm.generate("x", raw=value),
            lambda llm, value: llm.embed("x", truncate=value),
            lambda llm, value: llm.embed("x", force=value),
            lambda llm, value: llm.load(force=value),
        ],
        ids=["chat force", "raw", "truncate", "embed force", "load force"],
    )
    def test_switch_must_be_a_bool(self, both: Any, act: Callable[[Any, Any], Any], value: Any) -> None:
        assert "True or False" in str(refusal(both, lambda llm: act(llm, value)).hint)

    @pytest.mark.parametrize("value", ["", " ", 5, 0, {}, [], math.nan, b"low"])
    def test_think_must_be_bool_or_level(self, both: Any, value: Any) -> None:
        for act in (lambda llm: llm.chat("x", think=value), lambda llm: llm.generate("x", think=value)):
            assert "a level such as" in str(refusal(both, act).hint)

    @pytest.mark.parametrize("value", [True, False, None, "low", "high", "max", "none", "of a newer server"])
    def test_every_level_is_sent_unchanged(self, both: Any, value: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL)
        llm.chat("x", think=value)
        llm.generate("x", think=value)
        assert [each.think for each in echo.requests] == [value, value]

    @pytest.mark.parametrize("value", ["", " ", 5, b"x", True])
    @pytest.mark.parametrize(
        "act",
        [
            lambda llm, value: llm.chat("x", model=value),
            lambda llm, value: llm.generate("x", model=value),
            lambda llm, value: llm.embed("x", model=value),
            lambda llm, value: llm.show(value),
            lambda llm, value: llm.pull(value),
            lambda llm, value: llm.unload(value),
        ],
        ids=["chat", "generate", "embed", "show", "pull", "unload"],
    )
    def test_empty_model_name_is_refused(self, both: Any, act: Callable[[Any, Any], Any], value: Any) -> None:
        assert "model" in refusal(both, lambda llm: act(llm, value)).message

    @pytest.mark.parametrize("names", [{"model": ""}, {"model": 5}, {"model": HALF}])
    def test_client_needs_valid_model_names(self, both: Any, names: dict[str, Any]) -> None:
        echo = Echo()
        with pytest.raises(RequestRejected, match="model"):
            both.opened(echo, **names)
        assert echo.calls == []

    @pytest.mark.parametrize("keep", ["abc", 5, {"a": 1}, [5]])
    def test_invalid_keep_deletes_nothing(self, both: Any, keep: Any) -> None:
        assert "keep" in refusal(both, lambda llm: llm.prune_adapters(keep=keep, dry_run=False)).message

    @pytest.mark.parametrize("chained", [False, True])
    def test_force_must_be_a_bool(self, both: Any, chained: bool) -> None:
        echo = Echo()
        llm = both.connect([echo] if chained else echo, model=MODEL)
        with pytest.raises(RequestRejected, match="force"):
            llm.use_adapter("poet", force="no")


async def awaited(_: Any) -> None:
    """An async function, which would not be awaited."""


class AwaitedObject:
    async def __call__(self, _: Any) -> None:
        """An async method, which would not be awaited either."""


WRONG_ARGUMENTS: dict[str, list[Any]] = {
    "stream": ["no", "false", "", 0, 0.0, 1, [], None, object()],
    "timeout": ["x", "5", True, 0, -1, math.nan, math.inf, [], {}],
    "on_progress": [5, "print", True, [], awaited, AwaitedObject()],
    "max_age": ["x", "5m", True, False, math.nan, -1, Decimal(1), Decimal("NaN"), timedelta(1), []],
    "older_than": ["7d", "7", True, False, math.nan, -1, Decimal(1), timedelta(7), []],
    "dry_run": ["no", 0, 1, []],
    "keep": ["abc", 5, {"a": 1}, [5]],
    "keep_alive": ["soon", "", True, math.nan, [], {}],
    "context_window": [0, -1, 1.5, "4096", True, math.nan, 2**31],
    "max_tokens": [0, -1, 1.5, "9", True, math.nan, 2**31],
    "dimensions": [0, -1, 1.5, "9", True, math.nan],
    "force": ["no", 1, 0],
    "raw": ["no", 1],
    "truncate": ["no", 1],
    "retries": [-1, 1.5, "2", True, math.nan, 10**9],
    "purpose": ["search", 5, "", True, []],
    "level": ["up", 5, [], True],
    "policy": ["sometimes", 5, [], True],
    "model": [5, "", " ", True, b"x", []],
    "adapter": [5, "", True, [], b"x"],
    "options": ["x", 5, [1], True, {"temperature": "hot"}, {"num_ctx": 1}],
    "system": [5, [], True],
    "suffix": [5, [], True],
    "images": [5, "cat.png", b"x", [5], [None], Path("cat.png")],
    "tools": [5, "f", [5], [None], {"name": "f"}],
    "tool_choice": [5, "", True, [], "required", "look_up", {"type": "function"}],
    "format": [5, True, "xml", [], object()],
    "think": [5, "", []],
}
COMMON = ("model", "timeout", "options", "keep_alive", "context_window", "force")
INFERENCE = (*COMMON, "adapter", "max_tokens", "images", "format", "think", "stream")
TAKES: dict[str, tuple[str, ...]] = {
    "chat": (*INFERENCE, "tools", "tool_choice", "retries"),
    "generate": (*INFERENCE, "system", "suffix", "raw"),
    "embed": (*COMMON, "dimensions", "truncate", "purpose"),
    "count_tokens": (*COMMON, "tools", "tool_choice", "images", "think"),
    "rerank": COMMON,
    "delete": ("timeout",),
    "health": ("level", "model", "max_age", "timeout"),
    "models": ("timeout",),
    "show": ("model", "timeout"),
    "loaded": ("timeout",),
    "pull": ("model", "on_progress", "timeout"),
    "ensure": ("model", "policy", "on_progress", "timeout"),
    "load": ("model", "keep_alive", "context_window", "force", "timeout"),
    "unload": ("model", "timeout"),
    "resolve_adapter": ("model", "timeout"),
    "unload_adapter": ("model", "timeout"),
    "prune_adapters": ("keep", "older_than", "dry_run", "timeout"),
}
TAKES_TEXT = ("chat", "generate", "embed", "count_tokens", "delete", "resolve_adapter", "unload_adapter")
SUBJECT: dict[str, list[Any]] = {**{each: ["x"] for each in TAKES_TEXT}, "rerank": ["x", ["y"]]}


def without_call(request: Any) -> Any:
    return replace(request, call=Call()) if hasattr(request, "call") else request


class TestEveryPath:
    """Every argument on every path."""

    @pytest.mark.parametrize(("operation", "name"), [(each, name) for each, names in TAKES.items() for name in names])
    def test_argument_is_read_before_sending(self, both: Any, operation: str, name: str) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL)
        for value in WRONG_ARGUMENTS[name]:
            with pytest.raises(RequestRejected) as caught:
                getattr(llm, operation)(*SUBJECT.get(operation, ()), **{name: value})
            assert caught.value.hint, value
        assert echo.requests == []
        assert (llm.stats().running, llm.stats().waiting) == (0, 0)

    @pytest.mark.parametrize("operation", TAKES)
    def test_none_means_not_given(self, both: Any, operation: str) -> None:
        names = [each for each in TAKES[operation] if each not in ("adapter", "stream")]  # None has a meaning here.
        asked = []
        for arguments in ({}, dict.fromkeys(names)):
            echo = Echo(models=[MODEL, "x"])
            llm = both.connect(echo, model=MODEL)
            with contextlib.suppress(AdapterNotFound):  # No plugin resolves adapters here.
                getattr(llm, operation)(*SUBJECT.get(operation, ()), **arguments)
            asked.append([(hook, repr(without_call(request))) for hook, request in echo.calls])
        assert asked[0] == asked[1]
        assert asked[0]

    def test_none_means_not_given_to_connect(self, both: Any) -> None:
        own = ("model", "settings", "plugins", "translate_error", "env_prefix", "instances", "needs")
        names = (*own, *Settings.model_fields)
        llm = both.opened(Echo(), **dict.fromkeys(names))
        assert llm.origins == {}
        assert llm.settings == both.opened(Echo()).settings

    @pytest.mark.parametrize("name", ["stream", "model", "keep_alive", "options", "think", "timeout"])
    def test_chain_reads_its_arguments(self, both: Any, name: str) -> None:
        echo = Echo()
        llm = both.connect([echo, Echo()], model=MODEL)
        for value in WRONG_ARGUMENTS[name]:
            with pytest.raises(RequestRejected):
                llm.chat("x", **{name: value})
        assert echo.requests == []

    @pytest.mark.parametrize("chained", [False, True])
    @pytest.mark.parametrize("name", ["model", "timeout", "force"])
    def test_adapter_switch_reads_its_arguments(self, both: Any, chained: bool, name: str) -> None:
        for value in WRONG_ARGUMENTS[name]:
            echo = Echo()
            llm = both.connect([echo] if chained else echo, model=MODEL)
            with pytest.raises(RequestRejected):
                llm.use_adapter("poet", **{name: value})
            assert echo.requests == []

    @pytest.mark.parametrize(
        "given",
        [{"plugins": 5}, {"plugins": "m4"}, {"translate_error": 5}, {"needs": "tools"}],
        ids=str,
    )
    def test_client_arguments_are_read_strictly(self, both: Any, given: Any) -> None:
        with pytest.raises(RequestRejected, match=next(iter(given))):
            both.opened(Echo(), model=MODEL, **given)

    @pytest.mark.parametrize("retries", [0, 1, 10])
    def test_reply_may_be_asked_again_ten_times(self, both: Any, retries: int) -> None:
        llm = both.connect(Echo([*["{"] * retries, "{}"]), model=MODEL)
        assert llm.chat("x", format="json", retries=retries).attempts == retries + 1

    def test_valid_arguments_are_accepted(self, both: Any) -> None:
        steps: list[Any] = []
        llm = both.connect(Echo(), model=MODEL)
        llm.pull(on_progress=steps.append, timeout=5)
        assert steps
        for max_age in (None, 0, 1.5, math.inf):
            assert llm.health(max_age=max_age, model=MODEL).ok
        for older_than in (None, 0, 1.5, math.inf):
            llm.prune_adapters(older_than=older_than)
        assert llm.ensure(timeout=5, on_progress=steps.append).name == MODEL
