"""What a host can say to a client, and what it gets: each behaviour sync and async, against Echo."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import gc
import json
import math
import pickle
import sys
import threading
import time
from array import array
from dataclasses import FrozenInstanceError
from datetime import timedelta
from fractions import Fraction
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from giving import Giving
from plain import PlainEcho
from pydantic import BaseModel

import graftage
from graftage.calls import EmbedRequest
from graftage.exceptions import (
    AdapterNotFound,
    CapabilityUnsupported,
    ConnectionFailed,
    GraftageError,
    InferenceFailed,
    ModelNotFound,
    PluginLoadError,
    ProtocolError,
    ProviderError,
    ProviderNotFound,
    ProviderTimeout,
    RequestRejected,
    SettingsError,
    StreamInterrupted,
)
from graftage.hookspecs import hookimpl
from graftage.settings import Settings
from graftage.testing import Echo, Pause
from graftage.types import (
    Capabilities,
    Chunk,
    Embeddings,
    Health,
    Image,
    LoadedModel,
    Message,
    ModelInfo,
    PullProgress,
    Reply,
    Timeouts,
    Tool,
    ToolCall,
    Usage,
    Vectors,
)
from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

MODEL = "m:1"
HOOKS = (
    "chat",
    "generate",
    "embed",
    "health",
    "list_models",
    "show_model",
    "loaded_models",
    "pull_model",
    "load_model",
    "unload_model",
    "load_adapter",
    "unload_adapter",
    "close",
)
JSON_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


class Street(BaseModel):
    """Where a house is."""

    name: str


class House(BaseModel):
    """A place to live in."""

    street: Street
    number: int


# --- Answers ---------------------------------------------------------------------------------------------------------


class TestReplies:
    def test_chat_gives_text_usage_and_timings(self, both: Any) -> None:
        llm = both.connect(Echo(["Hello you there"]), model=MODEL)
        reply = llm.chat("Hi there")
        assert (reply.text, reply.finish_reason) == ("Hello you there", "stop")
        assert (reply.provider, reply.model, reply.adapter) == ("echo", MODEL, None)
        assert reply.usage == Usage(input_tokens=2, output_tokens=3)
        assert reply.usage.total_tokens == 5
        assert reply.message == Message(role="assistant", content="Hello you there")
        assert str(reply) == "Hello you there"
        assert (reply.limits, reply.warnings, reply.parsed) == (None, (), None)
        assert reply.raw == {"model": MODEL, "done": True}
        assert 0 <= reply.timings.first_chunk <= reply.timings.wall

    def test_generate_sends_its_arguments(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL)
        reply = llm.generate("Once upon", system="Be brief", suffix="the end", raw=True, think=False, max_tokens=1)
        assert (reply.text, reply.finish_reason) == ("Once ", "length")
        request = echo.requests[-1]
        assert (request.prompt, request.system, request.suffix) == ("Once upon", "Be brief", "the end")
        assert (request.raw, request.think, request.max_tokens) == (True, False, 1)

    def test_plain_equals_the_joined_stream(self, both: Any) -> None:
        call = ToolCall(name="look", arguments={"where": "up"}, id="call_0")
        chunks = [
            Chunk(thinking="hm "),
            Chunk(thinking="yes", warnings=("one",)),
            Chunk(text="a "),
            Chunk(text="b", tool_calls=(call,)),
            Chunk(finish_reason="tool_calls", usage=Usage(input_tokens=1), model="m:1-real", warnings=("two",)),
        ]
        llm = both.connect(Echo([chunks, chunks]), model=MODEL)
        whole = llm.chat("x")
        stream = llm.chat("x", stream=True)
        assert list(stream) == chunks
        for reply in (whole, stream.reply):
            assert (reply.text, reply.thinking, reply.tool_calls) == ("a b", "hm yes", (call,))
            assert (reply.model, reply.warnings) == ("m:1-real", ("one", "two"))
            assert reply.message.thinking == "hm yes"

    def test_unknown_figures_are_none(self, both: Any) -> None:
        llm = both.connect(Echo([[Chunk(text="x", finish_reason="stop")]]), model=MODEL)
        reply = llm.chat("x")
        assert reply.usage == Usage(input_tokens=None, output_tokens=None)
        assert reply.usage.total_tokens is None
        assert (reply.timings.total, reply.timings.load) == (None, None)

    def test_records_are_typed_and_frozen(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL)
        reply, health, models = llm.chat("x"), llm.health(), llm.models()
        assert (type(reply), type(health), type(models[0])) == (Reply, Health, ModelInfo)
        with pytest.raises(FrozenInstanceError):
            reply.text = "y"


class VectorsConnection:
    """Answers every `embed` with the same vectors, whatever was asked."""

    address = "nowhere"

    def __init__(self, vectors: Any) -> None:
        self.vectors = vectors

    @hookimpl
    def chat(self, request: Any) -> Any:
        return iter([Chunk(finish_reason="stop")])

    @hookimpl
    def embed(self, request: Any) -> Embeddings:
        return Embeddings(vectors=self.vectors, usage=Usage(input_tokens=7))

    @hookimpl
    def health(self, request: Any) -> Health:
        return Health(level=request.level, reachable=True, api=True)


WRONG_VECTORS: dict[str, tuple[Any, str]] = {
    "too few": (((1.0, 2.0),), "1 for 2"),
    "too many": (((1.0,), (2.0,), (3.0,)), "3 for 2"),
    "none": ((), "0 for 2"),
    "one that is empty": (((1.0,), ()), "empty"),
    "all empty": (((), ()), "empty"),
    "two lengths": (((1.0, 2.0), (1.0,)), "from 1 to 2"),
    "not a number": (((1.0,), (math.nan,)), "finite"),
    "infinite": (((1.0,), (-math.inf,)), "finite"),
    "beyond any float": (((1.0,), (10**400,)), "finite"),
    "a truth value": (((1.0,), (True,)), "finite"),
    "a text": (((1.0,), ("1.0",)), "finite"),
    "a null": (((1.0,), (None,)), "finite"),
    "texts for vectors": (("1", "2"), "finite"),
    "numbers for vectors": ((1.0, 2.0), "sequence"),
    "nulls for vectors": ((None, None), "sequence"),
    "null": (None, "sequence"),
}


def embedded(both: Any, vectors: Any) -> Vectors:
    """The vectors of two inputs, whatever the provider gives for them."""
    answer = both.connect(Giving(lambda _: VectorsConnection(vectors), "vectors"), model=MODEL).embed(["a", "b"])
    assert isinstance(answer.vectors, Vectors)
    return answer.vectors


RIGHT_VECTORS: dict[str, Callable[[], Any]] = {
    "tuples": lambda: ((1, 0.5), (0, 2)),
    "lists": lambda: [[1, 0.5], [0, 2]],
    "arrays": lambda: [array("f", each) for each in ((1, 0.5), (0, 2))],
    "a generator": lambda: (iter(each) for each in ((1, 0.5), (0, 2))),
    "fractions": lambda: [[Fraction(1), Fraction(1, 2)], [0, 2.0]],
    "an array of NumPy": lambda: pytest.importorskip("numpy").array([[1, 0.5], [0, 2]], "float32"),
    "numbers of NumPy": lambda: [[pytest.importorskip("numpy").float64(1), 0.5], [0, 2]],
}


class TestVectors:
    def test_behave_like_tuples(self, both: Any) -> None:
        found = embedded(both, [[0.1, 0.2], [3, 4]])
        assert (found[0][1], len(found), [list(each) for each in found]) == (0.2, 2, [[0.1, 0.2], [3.0, 4.0]])
        for again in (copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found)), Vectors(list(found))):
            assert type(again) is Vectors
            assert again == found
            assert hash(again) == hash(found)
        assert json.loads(json.dumps(found)) == [[0.1, 0.2], [3.0, 4.0]]
        assert repr(found) == "<Vectors 2 x 2>"

    @pytest.mark.parametrize(("vectors", "complaint"), list(WRONG_VECTORS.values())[3:], ids=list(WRONG_VECTORS)[3:])
    def test_invalid_values_are_refused(self, vectors: Any, complaint: str) -> None:
        with pytest.raises((TypeError, ValueError), match=complaint):
            Vectors(vectors)

    def test_become_one_numpy_array(self, both: Any) -> None:
        np = pytest.importorskip("numpy")
        found = embedded(both, [[0.5, 0.1, 2.0], [3, 4, 5]])
        single, double = found.numpy(), found.numpy("float64")
        assert (single.shape, single.dtype, double.dtype) == ((2, 3), np.float32, np.float64)
        assert double.tolist() == [[0.5, 0.1, 2.0], [3.0, 4.0, 5.0]]
        assert single[0, 1] == np.float32(0.1)
        single[0] = 0.0  # It is the caller's own.
        assert found[0] == (0.5, 0.1, 2.0)
        assert Vectors().numpy().shape == (0, 0)

    def test_missing_numpy_is_an_import_error(self, both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "numpy", None)
        with pytest.raises(ImportError, match="pip install numpy") as caught:
            embedded(both, [[0.5], [1.0]]).numpy()
        assert caught.value.name == "numpy"


# --- Messages --------------------------------------------------------------------------------------------------------

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
            ({"role": "bishop", "content": "x"}, "user, assistant"),
            ({"content": "x"}, "role"),
            ({"role": "user", "contents": "x"}, "`content`"),
            ({"role": "user", "content": [{"type": "text"}]}, "content"),
            ({"role": "assistant", "tool_calls": [5]}, "tool call"),
            ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, "no JSON object"),
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


# --- Tools -----------------------------------------------------------------------------------------------------------


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
            tool.__annotations__ = {"stream": threading.Thread}  # A type that has no JSON schema.
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


# --- Structured output -----------------------------------------------------------------------------------------------

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
        ("given", "answer"), [(House, '{"number": 9}'), (House, "plain words"), ("json", "{"), (JSON_SCHEMA, "")]
    )
    def test_misfit_keeps_the_reply(self, both: Any, given: Any, answer: str, stream: bool) -> None:
        llm = both.connect(Echo([answer]), model=MODEL)

        def act() -> None:
            reply = llm.chat("x", format=given, stream=stream)
            if stream:
                list(reply)

        with pytest.raises(InferenceFailed, match="format") as caught:
            act()
        assert caught.value.partial is not None
        assert (caught.value.partial.text, caught.value.partial.finish_reason) == (answer, "stop")
        assert answer == "" or answer not in str(caught.value)
        assert llm.stats().running == 0

    def test_cut_reply_blames_max_tokens(self, both: Any) -> None:
        with pytest.raises(InferenceFailed, match=r"cut .* Raise `max_tokens`"):
            both.connect(Echo([GOOD]), model=MODEL).chat("x", format=House, max_tokens=2)

    def test_tool_calls_are_not_parsed(self, both: Any) -> None:
        call = ToolCall(name="f", arguments={}, id="c")
        llm = both.connect(Echo([[Chunk(tool_calls=(call,), finish_reason="tool_calls")]]), model=MODEL)
        assert llm.chat("x", format=House, tools=[weather]).parsed is None

    def test_deep_json_does_not_fit(self, both: Any) -> None:
        with pytest.raises(InferenceFailed, match="does not fit"):
            both.connect(Echo(["[" * 100_000]), model=MODEL).chat("x", format="json")


# --- Options and arguments -------------------------------------------------------------------------------------------


class TestOptions:
    def test_unset_ones_are_left_out(self, both: Any) -> None:
        echo = Echo(["ok"])
        both.connect(echo, model=MODEL).chat("x", options={"temperature": 0, "seed": None})
        assert echo.requests[0].options == {"temperature": 0}

    @pytest.mark.parametrize(
        ("name", "way_out"),
        [
            ("temprature", "`temperature`"),
            ("zzz", "temperature"),
            ("num_ctx", "`context_window`"),
            ("num_predict", "`max_tokens`"),
            ("max_tokens", "`max_tokens`"),
            ("context_window", "`context_window`"),
            ("keep_alive", "`keep_alive`"),
        ],
    )
    def test_unknown_ones_are_corrected(self, both: Any, name: str, way_out: str) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL)
        for act in (llm.chat, llm.generate, llm.embed):
            with pytest.raises(RequestRejected, match=way_out):
                act("x", options={name: 1})
        assert echo.requests == []

    @pytest.mark.parametrize("options", [["temperature"], "hot", 5])
    def test_must_be_a_mapping(self, both: Any, options: Any) -> None:
        with pytest.raises(RequestRejected, match="options"):
            both.connect(Echo(), model=MODEL).chat("x", options=options)


class TestArguments:
    @pytest.mark.parametrize(
        ("name", "right"),
        [("max_token", "max_tokens"), ("num_ctx", "context_window"), ("stop_after", None), ("formatt", "format")],
    )
    def test_unknown_ones_are_type_errors(self, both: Any, name: str, right: str | None) -> None:
        echo = Echo()
        with pytest.raises(TypeError, match=f"`{name}`{f'.*`{right}`' if right else '$'}"):
            both.connect(echo, model=MODEL).chat("x", **{name: 1})
        assert echo.requests == []

    @pytest.mark.parametrize(
        ("given", "sent"),
        [
            (5, 5.0),
            (0, 0.0),
            ("5m", 300.0),
            ("1h30m", 5400.0),
            (-1, math.inf),
            ("-1", math.inf),
            (timedelta(minutes=1), 60.0),
        ],
    )
    def test_keep_alive_and_window_are_sent(self, both: Any, given: Any, sent: float) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL, keep_alive=7, context_window=512)
        for act in (llm.chat, llm.generate, llm.embed):
            act("x", keep_alive=given, context_window=1024)
        llm.load(keep_alive=given, context_window=1024)
        assert [(each.keep_alive, each.context_window) for each in echo.requests] == [(sent, 1024)] * 4
        llm.chat("x")
        assert (echo.requests[-1].keep_alive, echo.requests[-1].context_window) == (7.0, 512)

    @pytest.mark.parametrize("given", ["soon", "5 parrots", True, [5], math.nan, 1e10, "99999999h", 10**400])
    def test_invalid_keep_alive_is_refused(self, both: Any, given: Any) -> None:
        echo = Echo()
        with pytest.raises(RequestRejected, match="keep_alive"):
            both.connect(echo, model=MODEL).chat("x", keep_alive=given)
        assert echo.requests == []

    @pytest.mark.parametrize("name", ["context_window", "max_tokens"])
    def test_invalid_token_counts_are_refused(self, both: Any, name: str) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL)
        for figure in (0, -3, 2.5, "many", True):
            for act in (llm.chat, llm.generate):
                with pytest.raises(RequestRejected, match=name):
                    act("x", **{name: figure})
        assert echo.requests == []

    @pytest.mark.parametrize("operation", ["embed", "load"])
    def test_invalid_windows_are_refused(self, both: Any, operation: str) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL)
        act = llm.load if operation == "load" else functools.partial(llm.embed, "x")
        for figure in (0, -3, 2.5, "many", True):
            with pytest.raises(RequestRejected, match="context_window"):
                act(context_window=figure)
        assert echo.requests == []

    def test_model_is_required(self, both: Any) -> None:
        echo = Echo()
        with pytest.raises(RequestRejected, match=r"`model=`.*GRAFTAGE_MODEL"):
            both.connect(echo).chat("x")
        assert echo.requests == []

    def test_model_overrides_the_clients(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL)
        llm.chat("x", model="other")
        assert echo.requests[0].model == "other"

    def test_model_follows_the_first_colon(self, both: Any) -> None:
        echo = Echo()
        llm = both.opened("echo:smollm2:135m", plugins=[echo])
        assert (llm.provider, llm.model) == ("echo", "smollm2:135m")


# --- Time ------------------------------------------------------------------------------------------------------------


class Deaf:
    """A provider whose async hooks never answer, and never look at the clock."""

    name = "deaf"
    ended = False

    @hookimpl
    def connect(self, request: Any) -> object:
        return self.Connection(self)

    class Connection:
        def __init__(self, owner: Deaf) -> None:
            self.owner = owner
            self.address = f"deaf {id(owner)}"

        @hookimpl
        async def chat(self, request: Any) -> AsyncIterator[Chunk]:
            try:
                if request.messages[0].content == "begin":
                    yield Chunk(text="so far")
                await asyncio.Event().wait()
            finally:
                self.owner.ended = True

        @hookimpl
        async def embed(self, request: Any) -> Any:
            await asyncio.Event().wait()

        @hookimpl
        async def health(self, request: Any) -> Health:
            await asyncio.Event().wait()
            raise AssertionError


WITHOUT_ASYNCIO: dict[str, Callable[[Any], Any]] = {
    "chat": lambda llm: llm.chat("x"),
    "stream": lambda llm: llm.chat("x", stream=True),
    "embed": lambda llm: llm.embed("x"),
    "models": lambda llm: llm.models(),
    "enter": lambda llm: llm.__aenter__(),
    "close": lambda llm: llm.close(),
}


@pytest.mark.parametrize("settings", [{"api_key": "canary-in-the-key"}, {"headers": {"X-A": "canary-in-the-key"}}])
def test_echoed_key_stays_out_of_errors(both: Any, settings: dict[str, Any]) -> None:
    key = "canary-in-the-key"
    refusal = RequestRejected(f"bad header {key}", hint=key, details={"server_message": f"Bearer {key}", "n": [key]})
    llm = both.connect(Echo([refusal]), model=MODEL, **settings)
    with pytest.raises(RequestRejected) as caught:
        llm.chat("x")
    assert key not in str(caught.value) + repr(caught.value) + str(caught.value.to_dict())


class TestTimeouts:
    def test_each_call_has_a_deadline(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL)
        before = time.monotonic()
        llm.chat("x")
        call = echo.requests[0].call
        assert call.timeouts == Timeouts(connect=5, first_token=300, idle=60, total=600)
        assert before + 600 <= call.deadline <= time.monotonic() + 600

    def test_number_is_the_total(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL, timeouts={"idle": 7})
        llm.chat("x", timeout=0.5)
        llm.chat("x", timeout=Timeouts(connect=1, first_token=2, idle=3, total=4))
        first, second = (each.call.timeouts for each in echo.requests)
        assert first == Timeouts(idle=7, total=0.5)
        assert second == Timeouts(connect=1, first_token=2, idle=3, total=4)

    def test_invalid_ones_are_refused(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL)
        acts = (functools.partial(llm.chat, "x"), functools.partial(llm.embed, "x"), llm.health, llm.models, llm.pull)
        for given in (0, -1, math.inf, math.nan, 1e10, 10**400, True, "5", "soon", [5]):
            for act in acts:
                with pytest.raises(RequestRejected, match="timeout"):
                    act(timeout=given)
        assert echo.requests == []
        assert llm.stats().running == 0

    def test_settings_reach_the_provider(self, both: Any) -> None:
        echo = Echo()
        both.connect(echo, model=MODEL, attempts=7, timeouts={"total": 9}, max_reply_bytes=4096).chat("x")
        call = echo.requests[0].call
        assert (call.attempts, call.timeouts.total, call.max_reply_bytes) == (7, 9, 4096)
        assert call.budget is not None

    @pytest.mark.parametrize("operation", ["models", "show", "loaded"])
    def test_model_facts_get_less_time(self, both: Any, operation: str) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL)
        getattr(llm, operation)()
        assert (echo.requests[-1].call.timeouts.first_token, echo.requests[-1].call.timeouts.total) == (30, 30)
        getattr(llm, operation)(timeout=100)
        assert echo.requests[-1].call.timeouts.total == 100

    def test_silent_provider_is_ended(self) -> None:
        async def main() -> None:
            deaf = Deaf()
            async with graftage.connect_async(deaf, model=MODEL) as llm:
                for act in (llm.chat("x", timeout=0.01), llm.embed("x", timeout=0.01)):
                    with pytest.raises(ProviderTimeout, match="timeout") as caught:
                        await act
                    assert (caught.value.phase, caught.value.retryable) == ("total", False)
                assert deaf.ended
                assert llm.stats().running == 0

        asyncio.run(main())

    def test_stalled_stream_keeps_partial(self) -> None:
        async def main() -> None:
            deaf = Deaf()
            async with graftage.connect_async(deaf, model=MODEL) as llm:
                stream = await llm.chat("begin", timeout=0.01, stream=True)
                with pytest.raises(ProviderTimeout) as caught:
                    [chunk async for chunk in stream]
                assert caught.value.partial is not None
                assert caught.value.partial.text == "so far"
                assert deaf.ended
                assert (llm.stats().running, llm.stats().failures) == (0, 1)
                task = asyncio.current_task()
                assert task is not None
                assert not task.cancelled()
                assert getattr(task, "cancelling", lambda: 0)() == 0

        asyncio.run(main())

    def test_silent_health_is_a_result(self) -> None:
        async def main() -> Health:
            async with graftage.connect_async(Deaf(), model=MODEL) as llm:
                return await llm.health(timeout=0.01)

        health = asyncio.run(main())
        assert not health.ok
        assert isinstance(health.error, ProviderTimeout)


class TestHealth:
    @pytest.mark.parametrize(("status", "fresh", "stale"), [(200, 4.9, 5.1), (500, 0.9, 1.1)])
    def test_failures_are_remembered_less(
        self, both: Any, monkeypatch: pytest.MonkeyPatch, status: int, fresh: float, stale: float
    ) -> None:
        with FakeOllama() as fake:
            fake.script("/api/version", *[Answer([b'{"version":"0.9.3"}'], status=status, framing="length")] * 2)
            llm = both.connect("ollama", host=fake.url, attempts=1)
            now = [1000.0]
            monkeypatch.setattr("graftage._engine.health.time", SimpleNamespace(monotonic=lambda: now[0]))
            first = llm.health()
            now[0] += fresh
            second = llm.health()
            now[0] += stale - fresh
            third = llm.health()
            assert [each.cached for each in (first, second, third)] == [False, True, False]
            assert second.age == pytest.approx(fresh)
            assert [each.ok for each in (first, second, third)] == [status == 200] * 3
            assert len(fake.requests) == 2

    def test_failed_call_clears_the_memory(self, both: Any) -> None:
        gate = threading.Event()
        with FakeOllama() as fake:
            fake.script("/api/version", Answer([gate, {"version": "0.9.3"}]))
            fake.script("/api/chat", Answer([b"odd"], status=400, framing="length"))
            llm = both.connect("ollama", model="smollm2:135m", host=fake.url, attempts=1)
            checking = both.start(llm.health)
            while not fake.requests:
                assert not checking.done()
                time.sleep(0.001)
            with pytest.raises(ProviderError):
                llm.chat("x")
            gate.set()
            assert checking.result(10).ok
            assert not llm.health().cached
            assert llm.health().cached
            fake.script("/api/chat", Answer([b"odd"], status=400, framing="length"))
            with pytest.raises(ProviderError):
                llm.chat("x")
            assert not llm.health().cached

    @pytest.mark.parametrize("level", ["model", "", 3])
    def test_unknown_levels_are_refused(self, both: Any, level: Any) -> None:
        echo = Echo()
        with pytest.raises(RequestRejected, match="model_present"):
            both.connect(echo, model=MODEL).health(level)
        assert echo.requests == []


# --- What providers do wrong -----------------------------------------------------------------------------------------


class Listing:
    """A connection that has no model but can list some."""

    def __init__(self, listed: Any, colour: str) -> None:
        def chat(request: Any) -> Any:
            if request is not None:
                raise ModelNotFound("The server does not have it.", hint="Check its name.")
            yield

        async def chat_async(request: Any) -> Any:
            if request is not None:
                raise ModelNotFound("The server does not have it.", hint="Check its name.")
            yield

        def listed_plain(request: Any) -> Any:
            return listed(request)

        async def listed_async(request: Any) -> Any:
            return listed(request)

        self.chat = hookimpl(chat_async if colour != "plain" else chat)
        self.list_models = hookimpl(listed_async if colour != "plain" else listed_plain)
        self.needs_event_loop = colour == "loop"


def breaking(_: Any) -> Any:
    raise KeyError("k")


LISTS: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "close": (lambda _: (ModelInfo(name="other"), ModelInfo(name="smollm2:135m")), ("smollm2:135m",)),
    "itself": (lambda _: (ModelInfo(name="smolm2"),), ()),
    "none": (lambda _: (), ()),
    "fails": (breaking, ()),
    "gives None": (lambda _: None, ()),
    "gives names": (lambda _: ("smollm2",), ()),
}


class Embedding:
    """A connection that embeds as it is given."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    @hookimpl
    def chat(self, request: Any) -> Any: ...

    @hookimpl
    async def embed(self, request: Any) -> Any:
        if isinstance(self._answer, Exception):
            raise self._answer
        return Embeddings(vectors=((1.0,),) * self._answer)


class TestEmbeddings:
    def test_come_in_order(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL)
        several = llm.embed(["a b", "c"], dimensions=3, truncate=False, options={"seed": 1})
        assert [len(each) for each in several.vectors] == [3, 3]
        assert several.vectors[1] == llm.embed("c", dimensions=3).vectors[0]
        assert (several.model, several.provider, several.usage.input_tokens) == (MODEL, "echo", 3)
        assert several.timings.wall >= 0
        first = echo.requests[0]
        assert (first.inputs, first.dimensions, first.truncate, first.options) == (("a b", "c"), 3, False, {"seed": 1})

    @pytest.mark.parametrize(("vectors", "complaint"), WRONG_VECTORS.values(), ids=WRONG_VECTORS)
    def test_wrong_vectors_are_protocol_errors(self, both: Any, vectors: Any, complaint: str) -> None:
        llm = both.connect(Giving(lambda _: VectorsConnection(vectors), "vectors"), model=MODEL)
        with pytest.raises(ProtocolError, match=complaint) as caught:
            llm.embed(["a", "b"])
        assert (caught.value.provider, caught.value.operation, caught.value.model) == ("vectors", "embed", MODEL)
        assert caught.value.hint
        assert (llm.stats().failures, llm.stats().running, llm.stats().input_tokens) == (1, 0, 0)

    @pytest.mark.parametrize("given", RIGHT_VECTORS.values(), ids=RIGHT_VECTORS)
    def test_numbers_become_floats(self, both: Any, given: Callable[[], Any]) -> None:
        found = embedded(both, given())
        assert found == ((1.0, 0.5), (0.0, 2.0))
        assert {type(number) for vector in found for number in vector} == {float}

    def test_sum_may_be_infinite(self, both: Any) -> None:
        assert embedded(both, [[1e308, 1e308], [-1e308, 0.0]]) == ((1e308, 1e308), (-1e308, 0.0))

    @pytest.mark.parametrize("inputs", [[], [1], ["a", None], b"ab", None, 5])
    def test_invalid_inputs_are_refused(self, both: Any, inputs: Any) -> None:
        echo = Echo()
        with pytest.raises(RequestRejected, match="inputs"):
            both.connect(echo, model=MODEL).embed(inputs)
        assert echo.requests == []

    @pytest.mark.parametrize(
        ("answer", "inputs", "said"),
        [
            (RequestRejected("no"), ["a", ""], "number 2 of 2"),
            (InferenceFailed("no"), ["", "a", " \n", "b"], "number 1, 3 of 4"),
            (1, ["a", ""], "number 2 of 2"),
            (RequestRejected("no"), "", "number 1 of 1"),
            (RequestRejected("no"), [""] * 99, "number 1, 2, 3, 4, 5, 6, 7, 8, 9 of 99"),
            (RequestRejected("no"), ["a", "b"], None),
            (ConnectionFailed("no"), ["a", ""], None),
        ],
    )
    def test_errors_name_empty_inputs(self, both: Any, answer: Any, inputs: Any, said: str | None) -> None:
        with pytest.raises(ProviderError) as caught:
            both.connect(Giving(lambda _: Embedding(answer)), model=MODEL, attempts=1).embed(inputs)
        assert (f"Empty inputs: {said}." in str(caught.value)) == (said is not None)
        assert ("mpty" in str(caught.value)) == (said is not None)

    def test_empty_inputs_are_sent(self, both: Any) -> None:
        assert len(both.connect(Giving(lambda _: Embedding(2)), model=MODEL).embed(["a", ""]).vectors) == 2


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "chat": lambda llm: llm.chat("x"),
    "generate": lambda llm: llm.generate("x"),
    "embed": lambda llm: llm.embed("x"),
    "list_models": lambda llm: llm.models(),
    "show_model": lambda llm: llm.show(),
    "loaded_models": lambda llm: llm.loaded(),
    "pull_model": lambda llm: llm.pull(),
    "load_model": lambda llm: llm.load(),
    "unload_model": lambda llm: llm.unload(),
}


class MuteConnection:
    """Its hooks forget to return."""

    address = "mute"

    @hookimpl
    def chat(self, request: Any) -> Any:
        return None

    @hookimpl
    def health(self, request: Any) -> Any:
        return None

    @hookimpl
    def embed(self, request: Any) -> Any:
        return None

    @hookimpl
    def list_models(self, request: Any) -> Any:
        return None

    @hookimpl
    def loaded_models(self, request: Any) -> Any:
        return None

    @hookimpl
    def show_model(self, request: Any) -> Any:
        return None

    @hookimpl
    def pull_model(self, request: Any) -> Any:
        return None


class MuteProvider:
    name = "mute"

    @hookimpl
    def connect(self, request: Any) -> object:
        return MuteConnection()


class TestCapabilities:
    def test_missing_hooks_are_refused(self, both: Any) -> None:
        echo = Echo(without=[hook for hook in HOOKS if hook not in ("chat", "health", "close")])
        llm = both.connect(echo, model=MODEL)
        for operation, act in OPERATIONS.items():
            if operation != "chat":
                with pytest.raises(CapabilityUnsupported, match=f"`{operation}`") as caught:
                    act(llm)
                assert (caught.value.provider, caught.value.retryable) == ("echo", False)
        with pytest.raises(CapabilityUnsupported, match="load_adapter"):
            llm.use_adapter("x")
        assert echo.requests == []

    @pytest.mark.parametrize(
        ("feature", "arguments"),
        [
            ("tools", {"tools": [weather]}),
            ("structured_output", {"format": "json"}),
            ("thinking", {"think": True}),
            ("images", {"images": [b"x"]}),
        ],
    )
    def test_missing_features_are_refused(self, both: Any, feature: str, arguments: dict[str, Any]) -> None:
        echo = Echo(without=["capabilities"])
        with pytest.raises(CapabilityUnsupported, match=feature):
            both.connect(echo, model=MODEL).chat("x", **arguments)
        assert echo.requests == []

    def test_known_model_facts_refuse(self, both: Any) -> None:
        plain = ModelInfo(name="plain:1", features=frozenset({"chat"}))
        echo = Echo(["ok"], models=[plain])
        llm = both.connect(echo, model="plain:1")
        assert llm.chat("x", tools=[weather]).text == "ok"
        llm.show()
        asked = len(echo.requests)
        with pytest.raises(CapabilityUnsupported, match=r"`tools` with `plain:1`"):
            llm.chat("x", tools=[weather])
        assert len(echo.requests) == asked

    def test_default_to_implemented_hooks(self, both: Any) -> None:
        llm = both.opened(Echo(without=["capabilities", "embed"]), model=MODEL)
        features = llm.capabilities().features
        assert {"chat", "generate", "pull_model"} <= features
        assert "embed" not in features
        assert both.opened(Echo(), model=MODEL).capabilities().options >= {"temperature", "seed"}

    def test_default_names_only_features(self, both: Any) -> None:
        declared = both.opened(Echo(), model=MODEL).capabilities().features
        found = both.opened(Echo(without=["capabilities"]), model=MODEL).capabilities().features
        assert sorted(found - declared) == []

    def test_need_no_io(self, both: Any) -> None:
        echo = Echo()
        assert isinstance(both.opened(echo, model=MODEL).capabilities(), Capabilities)
        assert echo.requests == []


# --- Plain hooks and async ones --------------------------------------------------------------------------------------


class PlacingEcho(Echo):
    """Remembers on which threads its hooks were called."""

    def __init__(self, **options: Any) -> None:
        super().__init__([lambda _: self._here("a b c"), lambda _: self._here("d")], **options)
        self.threads: dict[str, int] = {}

    def note(self, hook: str, request: Any) -> None:
        self.threads[hook] = threading.get_ident()
        super().note(hook, request)

    def _here(self, answer: str) -> str:
        self.threads["script"] = threading.get_ident()
        return answer


class PlacingPlainEcho(PlacingEcho, PlainEcho):
    """The same with plain hooks."""


async def every_operation(llm: Any) -> Reply:
    reply: Reply = await llm.chat("x")
    await llm.generate("x")
    await llm.embed("x")
    await llm.health()
    await llm.models()
    await llm.show()
    await llm.loaded()
    await llm.pull()
    await llm.load()
    await llm.unload()
    return reply


class TestHooks:
    def test_plain_ones_serve_async_clients(self) -> None:
        async def main() -> None:
            echo = PlacingPlainEcho()
            async with graftage.connect_async(echo, model=MODEL) as llm:
                reply = await every_operation(llm)
                stream = await llm.chat("one two", stream=True)
                assert [chunk.text async for chunk in stream] == ["one ", "two", ""]
            assert (reply.text, reply.finish_reason) == ("a b c", "stop")
            assert echo.closed

        asyncio.run(main())

    def test_plain_ones_leave_the_loop(self) -> None:
        async def main() -> None:
            here = threading.get_ident()
            echo = PlacingPlainEcho()
            async with graftage.connect_async(echo, model=MODEL) as llm:
                await every_operation(llm)
            assert [hook for hook, thread in echo.threads.items() if thread == here] == []

        asyncio.run(main())

    def test_async_ones_run_on_it(self) -> None:
        async def main() -> None:
            here = threading.get_ident()
            echo = PlacingEcho()
            async with graftage.connect_async(echo, model=MODEL) as llm:
                await every_operation(llm)
            assert [hook for hook, thread in echo.threads.items() if thread != here] == []

        asyncio.run(main())

    @pytest.mark.parametrize("place", ["chat", "policy", "resolver"])
    def test_stop_iteration_never_hangs(self, place: str) -> None:
        class Stopping:
            name = "stopping"

            @hookimpl
            def resource_limits(self, query: Any) -> Any:
                return next(iter(())) if place == "policy" else None

            @hookimpl
            def resolve_adapter(self, request: Any) -> Any:
                return next(iter(()))

        async def main() -> None:
            echo = PlainEcho([StopIteration()] if place == "chat" else [])
            async with graftage.connect_async(echo, model=MODEL, plugins=[Stopping()]) as llm:
                with pytest.raises(GraftageError):
                    await asyncio.wait_for(llm.chat("x", adapter="a" if place == "resolver" else None), 5)

        asyncio.run(main())


def test_both_clients_have_the_same_names() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(graftage.Client) == public(graftage.AsyncClient)


# --- Event loops, tasks, threads -------------------------------------------------------------------------------------


class Slow(Echo):
    """A provider that takes its time while it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.reached = threading.Event(), threading.Event()

    @hookimpl
    def settings_model(self) -> type[Settings]:
        self.reached.set()
        self.gate.wait(5)
        return Settings


class TestConcurrentOpening:
    def test_several_event_loops_in_turn(self) -> None:
        echo = Echo()
        llm = graftage.connect_async(echo, model=MODEL, concurrency=1)
        assert [asyncio.run(llm.chat(word)).text for word in ("one", "two", "three")] == ["one", "two", "three"]
        asyncio.run(llm.close())
        assert (len(echo.connections), echo.closed) == (1, True)

    @pytest.mark.parametrize("end", ["cancelled", "no loop"])
    def test_another_loop_after_the_first(self, end: str) -> None:
        llm = graftage.connect_async(Echo(), model=MODEL)
        if end == "no loop":
            call = llm.chat("x")
            with pytest.raises(RuntimeError, match="needs asyncio"):
                call.send(None)
        else:
            loop = asyncio.new_event_loop()
            opening = loop.create_task(llm.chat("x"))
            loop.run_until_complete(asyncio.sleep(0))
            opening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                loop.run_until_complete(opening)
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.close()
        assert asyncio.run(llm.chat("y")).text == "y"

    def test_first_calls_share_one_connection(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL)
        replies = both.together([lambda word=word: llm.chat(word).text for word in "abcdefgh"])
        assert replies == list("abcdefgh")
        assert len(echo.connections) == 1

    @pytest.mark.parametrize("cancelled", [0, 1])
    def test_cancelled_task_spares_the_others(self, cancelled: int) -> None:
        async def main() -> list[Any]:
            slow = Slow()
            llm = graftage.connect_async(slow, model=MODEL)
            tasks = [asyncio.create_task(llm.chat(word)) for word in ("one", "two", "three")]
            while not slow.reached.is_set():
                await asyncio.sleep(0.001)
            tasks[cancelled].cancel()
            await asyncio.sleep(0.005)
            slow.gate.set()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            await llm.close()
            return [getattr(each, "text", type(each)) for each in outcomes]

        expected: list[Any] = ["one", "two", "three"]
        expected[cancelled] = asyncio.CancelledError
        assert asyncio.run(main()) == expected

    def test_closing_meanwhile_leaks_nothing(self) -> None:
        async def main() -> Slow:
            slow = Slow()
            llm = graftage.connect_async(slow, model=MODEL)
            task = asyncio.create_task(llm.chat("x"))
            while not slow.reached.is_set():
                await asyncio.sleep(0.001)
            closing = asyncio.create_task(llm.close())
            await asyncio.sleep(0.005)
            slow.gate.set()
            await asyncio.gather(task, closing, return_exceptions=True)
            return slow

        slow = asyncio.run(main())
        assert all(each.closed for each in slow.connections)

    def test_connect_leaves_the_loop(self) -> None:
        class Heavy(Echo):
            thread = 0

            @hookimpl
            def connect(self, request: Any) -> object:
                self.thread = threading.get_ident()
                return super().connect(request)

        async def main() -> None:
            heavy = Heavy()
            async with graftage.connect_async(heavy, model=MODEL) as llm:
                await llm.chat("x")
            assert heavy.thread != threading.get_ident()

        asyncio.run(main())


class TestSharing:
    def test_each_caller_gets_its_reply(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL, concurrency=3)
        words = [f"word{number}" for number in range(60)]
        assert both.together([lambda word=word: llm.chat(word).text for word in words]) == words
        stats = llm.stats()
        assert (stats.calls, stats.failures, stats.running, stats.waiting) == (60, 0, 0, 0)

    def test_tasks_can_share_a_stream(self) -> None:
        async def main() -> list[str]:
            words = "".join(f"w{number} " for number in range(50))
            async with graftage.connect_async(Echo([words]), model=MODEL) as llm:
                stream = await llm.chat("x", stream=True)

                async def read() -> list[str]:
                    return [chunk.text async for chunk in stream]

                parts = await asyncio.gather(read(), read(), read())
                assert stream.reply.text == words
                return sorted(word for part in parts for word in part)

        assert [word for word in asyncio.run(main()) if word] == sorted(f"w{number} " for number in range(50))

    def test_collected_stream_takes_no_lock(self) -> None:
        llm = graftage.connect(Echo(), model=MODEL, concurrency=1)
        before = gc.get_threshold()
        gc.freeze()  # What is there already need not be looked at each time.
        gc.set_threshold(3, 2, 2)  # So often that it runs inside every locked block.
        try:
            for _ in range(50):
                cycle: list[Any] = [llm.chat("a b", stream=True)]
                cycle.append(cycle)
                next(cycle[0])
                del cycle
                gc.collect()
        finally:
            gc.set_threshold(*before)
            gc.unfreeze()
        assert (llm.stats().running, llm.chat("x", timeout=5).text) == (0, "x")


async def settled(echo: Echo) -> None:
    """Let what was cancelled wind up."""
    for _ in range(500):
        if not echo.running:
            return
        gc.collect()
        await asyncio.sleep(0.002)


class TestCancellation:
    @pytest.mark.parametrize("kind", [Echo, PlainEcho], ids=["async hooks", "plain hooks"])
    @pytest.mark.parametrize("place", ["opening", "streaming"])
    def test_frees_the_slot(self, place: str, kind: type[Echo]) -> None:
        async def main() -> None:
            pause = Pause()
            items = [Chunk(text="a"), pause] if place == "streaming" else [pause]
            echo = kind([[*items, Chunk(finish_reason="stop")], "free"])
            async with graftage.connect_async(echo, model=MODEL, concurrency=1) as llm:
                task = asyncio.create_task(llm.chat("x"))
                while not pause.reached.is_set():
                    await asyncio.sleep(0.001)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                del task
                stats = llm.stats()
                assert (stats.running, stats.failures) == (0, 0)
                assert (await llm.chat("y")).text == "free"
                pause.release()  # A worker thread cannot be cancelled: it ends with its own wait.
                await settled(echo)
                assert echo.running == 0

        asyncio.run(main())

    @pytest.mark.parametrize("kind", [Echo, PlainEcho], ids=["async hooks", "plain hooks"])
    def test_is_never_lost(self, kind: type[Echo]) -> None:
        async def main() -> None:
            echo = kind([[*[Chunk(text="a")] * 40, Chunk(finish_reason="stop")]] * 200)
            async with graftage.connect_async(echo, model=MODEL) as llm:
                for moment in range(200):
                    task = asyncio.create_task(llm.chat("x"))
                    for _ in range(moment):
                        await asyncio.sleep(0)
                    was_cancelled = task.cancel()
                    await asyncio.wait([task])
                    assert task.cancelled() is was_cancelled

        asyncio.run(main())

    def test_waiting_task_leaves_the_queue(self) -> None:
        async def main() -> None:
            pause = Pause()
            echo = Echo([[Chunk(text="a"), pause, Chunk(finish_reason="stop")], "second"])
            async with graftage.connect_async(echo, model=MODEL, concurrency=1) as llm:
                first = asyncio.create_task(llm.chat("x"))
                while not pause.reached.is_set():
                    await asyncio.sleep(0.001)
                waiting = asyncio.create_task(llm.chat("given up"))
                third = asyncio.create_task(llm.chat("z"))
                while llm.stats().waiting < 2:
                    await asyncio.sleep(0.001)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                assert llm.stats().waiting == 1
                pause.release()
                assert [(await first).text, (await third).text] == ["a", "second"]
                stats = llm.stats()
                assert (stats.running, stats.waiting, stats.failures) == (0, 0, 0)
            assert [request.messages[0].content for request in echo.requests] == ["x", "z"]

        asyncio.run(main())

    def test_outside_timeout_is_honoured(self) -> None:
        async def main() -> None:
            pause = Pause()
            echo = Echo([[pause]])
            async with graftage.connect_async(echo, model=MODEL) as llm:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(llm.chat("x"), 0.05)
                await settled(echo)
                assert (echo.running, llm.stats().running) == (0, 0)

        asyncio.run(main())


# --- Errors in the host's own words ----------------------------------------------------------------------------------


class HostError(Exception):
    """What the host wants to see."""

    def __init__(self, error: GraftageError) -> None:
        super().__init__(str(error))
        self.error = error


class Forgetful(Echo):
    """A provider whose connection lacks what is required."""

    @hookimpl
    def connect(self, request: Any) -> object:
        return Capabilities(features=frozenset())


class Bursting(Echo):
    """A provider that cannot even connect."""

    @hookimpl
    def connect(self, request: Any) -> object:
        raise ValueError("burst")


GONE = ConnectionFailed("gone")
TRANSLATED: dict[str, tuple[type[Exception], Callable[[], Any], Callable[[Any], Any]]] = {
    "an open error": (ConnectionFailed, lambda: Echo([GONE]), lambda llm: llm.chat("x")),
    "an open stream": (ConnectionFailed, lambda: Echo([GONE]), lambda llm: llm.chat("x", stream=True)),
    "a foreign error": (ProviderError, lambda: Echo([KeyError()]), lambda llm: llm.chat("x")),
    "a broken stream": (
        StreamInterrupted,
        lambda: Echo([[Chunk(text="a")]]),
        lambda llm: list(llm.chat("x", stream=True)),
    ),
    "generate": (ConnectionFailed, lambda: Echo([GONE]), lambda llm: llm.generate("x")),
    **{
        operation: (ConnectionFailed, functools.partial(Echo, errors={operation: GONE}), act)
        for operation, act in OPERATIONS.items()
        if operation not in ("chat", "generate")
    },
    "ensure": (ModelNotFound, lambda: Echo(strict=True), lambda llm: llm.ensure("no", policy="never")),
    "a wrong policy": (RequestRejected, Echo, lambda llm: llm.ensure(policy="perhaps")),
    "a format": (InferenceFailed, lambda: Echo(["no"]), lambda llm: llm.chat("x", format="json")),
    "messages": (RequestRejected, Echo, lambda llm: llm.chat(5)),
    "options": (RequestRejected, Echo, lambda llm: llm.chat("x", options={"no": 1})),
    "a timeout": (RequestRejected, Echo, lambda llm: llm.chat("x", timeout=0)),
    "no model": (RequestRejected, Echo, lambda llm: llm.chat("x", model="")),
    "a capability": (
        CapabilityUnsupported,
        lambda: Echo(without=["embed"]),
        lambda llm: llm.embed("x"),
    ),
    "a switch": (AdapterNotFound, Echo, lambda llm: llm.use_adapter("no")),
    "an adapter of one call": (AdapterNotFound, Echo, lambda llm: llm.chat("x", adapter="no")),
    "close": (ConnectionFailed, lambda: Echo(errors={"close": GONE}), lambda llm: llm.close()),
}


# --- Models ----------------------------------------------------------------------------------------------------------


class TestModels:
    def test_list_show_load_and_unload(self, both: Any) -> None:
        llm = both.connect(Echo(models=["a:1", "b:2"], strict=True), model="a:1")
        assert [each.name for each in llm.models()] == ["a:1", "b:2"]
        assert (llm.show().name, llm.show("b:2").name) == ("a:1", "b:2")
        assert llm.loaded() == ()
        llm.load(context_window=512)
        assert [(type(each), each.name, each.context_window) for each in llm.loaded()] == [(LoadedModel, "a:1", 512)]
        llm.unload()
        assert llm.loaded() == ()
        with pytest.raises(ModelNotFound):
            llm.show("c")

    def test_calls_do_not_list_them(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL)
        llm.chat("x")
        llm.generate("x")
        llm.embed("x")
        assert [hook for hook, _ in echo.calls] == ["connect", "chat", "generate", "embed"]

    def test_embedding_model_loads_by_embed(self, both: Any) -> None:
        echo = Echo(errors={"load_model": CapabilityUnsupported("It does not generate.")})
        both.connect(echo, model=MODEL, keep_alive=60, context_window=512).load()
        (embed,) = (each for each in echo.requests if isinstance(each, EmbedRequest))
        assert (embed.keep_alive, embed.context_window) == (60.0, 512)

    def test_first_load_error_is_raised(self, both: Any) -> None:
        refusals = {name: CapabilityUnsupported(f"It has no {name}.") for name in ("load_model", "embed")}
        with pytest.raises(CapabilityUnsupported, match="load_model"):
            both.connect(Echo(errors=refusals), model=MODEL).load()

    def test_missing_one_suggests_close_names(self, both: Any) -> None:
        llm = both.connect(Echo(strict=True, models=["llama3.2:latest"]), model=MODEL)
        with pytest.raises(ModelNotFound) as caught:
            llm.chat("x", model="llama3")
        error = caught.value
        assert (error.provider, error.model, error.operation, error.status) == ("echo", "llama3", "chat", 404)
        assert error.suggestions == ("llama3.2:latest",)
        assert not error.retryable

    @pytest.mark.parametrize("colour", ["plain", "async", "loop"])
    @pytest.mark.parametrize("case", LISTS)
    def test_any_listing_gives_suggestions(self, both: Any, case: str, colour: str) -> None:
        listed, close = LISTS[case]
        llm = both.connect(Giving(lambda _: Listing(listed, colour)), model="smolm2")
        with pytest.raises(ModelNotFound) as caught:
            llm.chat("x")
        assert caught.value.suggestions == close
        assert caught.value.hint == (f"Did you mean `{close[0]}`?" if close else "Check its name.")

    def test_suggestions_keep_the_deadline(self, both: Any) -> None:
        never = threading.Event()
        llm = both.connect(Giving(lambda _: Listing(lambda _: never.wait(30), "plain")), model="smolm2")
        try:
            with pytest.raises(ModelNotFound) as caught:
                llm.chat("x", timeout=0.05)
        finally:
            never.set()
        assert caught.value.suggestions == ()


class Halting(Echo):
    """Its downloads stop before they are done."""

    def __init__(self, steps: list[PullProgress]) -> None:
        super().__init__()
        self.steps = steps

    @hookimpl
    def connect(self, request: Any) -> object:
        steps = self.steps

        class Connection(type(super().connect(request))):  # type: ignore[misc] # a connection that pulls in its own way
            @hookimpl
            async def pull_model(self, request: Any) -> AsyncIterator[PullProgress]:
                for step in steps:
                    yield step

        return Connection(self)


class HostStop(Exception):
    """The user pressed stop."""


class TestEnsure:
    def test_pulls_only_what_is_missing(self, both: Any) -> None:
        echo = Echo(strict=True, models=["here:1"])
        llm = both.connect(echo, model="here:1")
        assert llm.ensure().name == "here:1"
        assert not any("pull" in hook for hook, _ in echo.calls)
        steps: list[PullProgress] = []
        assert llm.ensure("new", on_progress=steps.append).name == "new:latest"
        assert steps[-1].status == "success"

    def test_follows_the_policy(self, both: Any) -> None:
        echo = Echo(strict=True, models=["here:1"])
        llm = both.connect(echo, model="here:1")
        with pytest.raises(ModelNotFound):
            llm.ensure("new", policy="never")
        assert not any("pull" in hook for hook, _ in echo.calls)
        llm.ensure(policy="always")
        assert any("pull" in hook for hook, _ in echo.calls)

    def test_outage_is_not_a_missing_model(self, both: Any) -> None:
        echo = Echo(errors={"show_model": GONE})
        with pytest.raises(ConnectionFailed):
            both.connect(echo, model=MODEL).ensure()
        assert not any("pull" in hook for hook, _ in echo.calls)

    def test_raises_if_pull_brings_nothing(self, both: Any) -> None:
        echo = Halting([PullProgress(status="success")])
        echo.strict = True
        with pytest.raises(ModelNotFound):
            both.connect(echo, model="new").ensure()


class TestTranslateError:
    @pytest.mark.parametrize("case", TRANSLATED)
    def test_every_error_is_translated(self, both: Any, case: str) -> None:
        kind, build, act = TRANSLATED[case]
        llm = both.opened(build(), model=None if case == "no model" else MODEL, translate_error=HostError)
        with pytest.raises(HostError) as caught:
            act(llm)
        assert type(caught.value.error) is kind
        assert caught.value.__cause__ is caught.value.error

    def test_none_keeps_the_error(self, both: Any) -> None:
        llm = both.connect(Echo([GONE]), model=MODEL, translate_error=lambda error: None)
        with pytest.raises(ConnectionFailed):
            llm.chat("x")

    def test_failed_switch_is_translated(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL, translate_error=HostError)
        for act, argument in ((llm.use_adapter, "no"), (llm.chat, "x")):
            with pytest.raises(HostError) as caught:
                act(argument)
            assert isinstance(caught.value.error, AdapterNotFound)

    @pytest.mark.parametrize(
        ("kind", "arguments", "named"),
        [
            (ProviderNotFound, ["no-such-provider"], {}),
            (SettingsError, [Echo()], {"hots": "x"}),
            (SettingsError, [Echo()], {"attempts": 0}),
            (PluginLoadError, [Echo], {}),
            (PluginLoadError, [Forgetful()], {}),
            (GraftageError, [Bursting()], {}),
        ],
        ids=["unknown provider", "unknown setting", "wrong setting", "class", "broken connection", "failing connect"],
    )
    def test_connect_errors_are_translated(
        self, both: Any, kind: type, arguments: list[Any], named: dict[str, Any]
    ) -> None:
        with pytest.raises(HostError) as caught:
            both.connect(*arguments, model=MODEL, translate_error=HostError, **named).chat("x")
        assert isinstance(caught.value.error, kind)

    def test_ensure_still_pulls(self, both: Any) -> None:
        llm = both.connect(Echo(strict=True), model="new", translate_error=HostError)
        assert llm.ensure().name == "new:latest"


class TestPull:
    def test_reports_progress(self, both: Any) -> None:
        steps: list[PullProgress] = []
        llm = both.connect(Echo(strict=True), model="new")
        last = llm.pull(on_progress=steps.append)
        assert last.status == "success"
        assert steps[-1] is last
        assert [each.completed for each in steps if each.digest] == [0, 500_000, 1_000_000]
        assert llm.show().name == "new:latest"

    def test_total_limit_is_optional(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL, timeouts={"total": 1, "idle": 5})
        llm.pull()
        llm.pull(timeout=30)
        unbounded, bounded = (each.call for each in echo.requests)
        assert (unbounded.deadline, unbounded.timeouts.idle) == (math.inf, 5)
        assert bounded.deadline < math.inf

    @pytest.mark.parametrize("steps", [[], [PullProgress(status="pulling")]])
    def test_early_end_is_an_interruption(self, both: Any, steps: list[PullProgress]) -> None:
        llm = both.connect(Halting(steps), model=MODEL)
        with pytest.raises(StreamInterrupted, match="Pull again"):
            llm.pull()
        assert llm.stats().running == 0

    def test_callback_error_ends_it(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL)

        def stop(progress: PullProgress) -> None:
            raise HostStop(progress.status)

        with pytest.raises(HostStop):
            llm.pull(on_progress=stop)
        assert llm.stats().running == 0

    def test_runs_one_at_a_time(self, both: Any) -> None:
        steps = [PullProgress(status="a"), PullProgress(status="success")]
        llm = both.connect(Halting(steps), model=MODEL)
        inside, most = [0], [0]

        def step(progress: PullProgress) -> None:
            if progress.status == "a":
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.002)
            else:
                inside[0] -= 1

        outcomes = both.together([lambda: llm.pull(on_progress=step).status] * 6)
        assert outcomes == ["success"] * 6
        assert most == [1]

    def test_nested_pull_is_refused(self) -> None:
        with graftage.connect(Echo(strict=True), model="new") as llm:

            def again(_: PullProgress) -> None:
                llm.pull()

            with pytest.raises(RequestRejected, match="wait for itself"):
                llm.pull(on_progress=again)
            assert llm.pull().status == "success"

    def test_clears_known_facts(self, both: Any) -> None:
        echo = Echo(["ok"], models=[ModelInfo(name="plain:1", features=frozenset({"chat"}))])
        llm = both.connect(echo, model="plain:1")
        llm.show()
        llm.pull()
        assert llm.chat("x", tools=[weather]).text == "ok"


# --- The end ---------------------------------------------------------------------------------------------------------


class TestClosing:
    def test_leaving_the_block_closes(self, both: Any) -> None:
        echo = Echo()
        with both.connect(echo, model=MODEL) as llm:
            llm.chat("x")
            assert not echo.closed
        assert echo.closed

    def test_closing_twice_closes_once(self, both: Any) -> None:
        echo = Echo()
        llm = both.opened(echo, model=MODEL)
        llm.close()
        llm.close()
        assert [hook for hook, _ in echo.calls if hook == "close"] == ["close"]

    @pytest.mark.parametrize("used", [True, False], ids=["used", "unused"])
    def test_later_use_raises(self, both: Any, used: bool) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL)
        if used:
            llm.chat("x")
        sent = len(echo.requests)
        llm.close()
        others: list[Callable[[Any], Any]] = [
            lambda llm: llm.health(),
            lambda llm: llm.ensure(),
            lambda llm: llm.use_adapter("x"),
            lambda llm: llm.use_adapter(None),
            lambda llm: llm.chat("x", stream=True),
        ]
        for act in (*OPERATIONS.values(), *others):
            with pytest.raises(RuntimeError, match="closed"):
                act(llm)
        assert len(echo.requests) == sent

    def test_remembered_health_is_cleared(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL)
        assert llm.health().ok
        llm.close()
        with pytest.raises(RuntimeError, match="closed"):
            llm.health()

    def test_adapters_are_not_listed(self, both: Any) -> None:
        llm = both.opened(Echo(), model=MODEL)
        llm.close()
        with pytest.raises(RuntimeError, match="closed"):
            llm.adapters()

    def test_unused_client_opens_nothing(self) -> None:
        echo = Echo()
        asyncio.run(graftage.connect_async(echo, model=MODEL).close())
        assert echo.connections == []

    def test_waiting_call_is_refused(self, both: Any) -> None:
        pause = Pause()
        llm = both.connect(Echo([[Chunk(text="a"), pause, Chunk(finish_reason="stop")]]), model=MODEL, concurrency=1)
        stream = llm.chat("x", stream=True)
        waiting = both.start(llm.chat, "y")
        while llm.stats().waiting == 0:
            time.sleep(0.001)
        llm.close()
        stream.close()
        error = waiting.exception(10)
        assert isinstance(error, ConnectionFailed)
        assert "client was closed" in str(error)


class TestOpening:
    def test_failed_connect_can_be_repeated(self) -> None:
        class Moody(Echo):
            failed = False

            @hookimpl
            def connect(self, request: Any) -> object:
                if not self.failed:
                    self.failed = True
                    raise SettingsError("not yet")
                return super().connect(request)

        async def twice() -> str:
            llm = graftage.connect_async(Moody(), model=MODEL)
            with pytest.raises(SettingsError):
                await llm.chat("x")
            text = (await llm.chat("x")).text
            await llm.close()
            return text

        assert asyncio.run(twice()) == "x"

    def test_foreign_exception_is_wrapped(self, both: Any) -> None:
        with pytest.raises(GraftageError, match="burst") as caught:
            both.connect(Bursting(), model=MODEL).chat("x")
        assert isinstance(caught.value.__cause__, ValueError)

    def test_unopened_client_has_no_facts(self) -> None:
        llm = graftage.connect_async(Echo(), model=MODEL)
        for act in (llm.stats, llm.capabilities, lambda: llm.provider, lambda: llm.model, lambda: llm.settings):
            with pytest.raises(RuntimeError, match="not open"):
                act()

    @pytest.mark.parametrize("opened", [False, True], ids=["new", "opened"])
    @pytest.mark.parametrize("use", WITHOUT_ASYNCIO.values(), ids=WITHOUT_ASYNCIO)
    def test_async_client_needs_asyncio(self, use: Callable[[Any], Any], opened: bool) -> None:
        llm = graftage.connect_async(Echo(), model=MODEL)
        if opened:
            asyncio.run(llm.chat("x"))

        def by_hand() -> None:
            work = use(llm).__await__()
            with pytest.raises(RuntimeError, match=r"needs asyncio: .*`graftage\.connect`"):
                next(work)

        async def in_a_callback() -> None:
            done = asyncio.Event()

            def callback() -> None:
                by_hand()
                done.set()

            asyncio.get_running_loop().call_soon(callback)
            await asyncio.wait_for(done.wait(), 5)

        by_hand()
        asyncio.run(in_a_callback())
        assert asyncio.run(llm.chat("y")).text == "y"


def test_stats_count_calls_and_tokens(both: Any) -> None:
    llm = both.connect(Echo(["a b", InferenceFailed("no")]), model=MODEL)
    llm.chat("one two three")
    with pytest.raises(InferenceFailed):
        llm.chat("x")
    stats = llm.stats()
    assert (stats.calls, stats.failures, stats.running, stats.retries) == (2, 1, 0, 0)
    assert (stats.input_tokens, stats.output_tokens, stats.active_adapter) == (3, 2, None)


class TestProviderErrors:
    def test_errors_name_the_call(self, both: Any) -> None:
        llm = both.connect(Echo([ConnectionFailed("gone")]), model=MODEL)
        with pytest.raises(ConnectionFailed) as caught:
            llm.chat("x")
        assert (caught.value.provider, caught.value.model, caught.value.operation) == ("echo", MODEL, "chat")

    @pytest.mark.parametrize(
        "raised", [KeyError("k"), ValueError("v"), OSError("o"), StopIteration(), RuntimeError("r")]
    )
    @pytest.mark.parametrize("place", ["call", "first chunk", "later chunk"])
    def test_foreign_exceptions_are_wrapped(self, both: Any, raised: Exception, place: str) -> None:
        steps: dict[str, Any] = {
            "call": raised,
            "first chunk": [raised],
            "later chunk": [Chunk(text="so far"), raised],
        }
        llm = both.connect(Echo([steps[place]]), model=MODEL)
        with pytest.raises(ProviderError) as caught:
            llm.chat("x")
        error = caught.value
        assert (error.provider, error.model, error.operation, error.retryable) == ("echo", MODEL, "chat", False)
        assert "fault of the provider" in str(error)
        assert isinstance(error.__cause__, type(raised) | RuntimeError)
        assert (error.partial.text if error.partial else None) == ("so far" if place == "later chunk" else None)

    def test_own_line_is_named(self, both: Any) -> None:
        library: dict[str, Any] = {}
        exec(compile("def read():\n    raise KeyError", "/elsewhere/library.py", "exec"), library)

        def ask(_: Any) -> str:
            return str(library["read"]())

        with pytest.raises(ProviderError, match=r"KeyError in `ask` \(test_client\.py, line \d+\)"):
            both.connect(Echo([ask]), model=MODEL).chat("x")

    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_every_operation_wraps_them(self, both: Any, operation: str) -> None:
        llm = both.connect(Echo(errors={operation: KeyError("k")}), model=MODEL)
        with pytest.raises(ProviderError) as caught:
            OPERATIONS[operation](llm)
        assert isinstance(caught.value.__cause__, KeyError)
        assert caught.value.operation == operation
        assert llm.stats().running == 0

    @pytest.mark.parametrize(
        "operation", ["chat", "embed", "list_models", "loaded_models", "show_model", "pull_model", "health"]
    )
    def test_hook_must_return_a_result(self, both: Any, operation: str) -> None:
        llm = both.connect(MuteProvider(), model=MODEL)
        with pytest.raises(GraftageError):
            llm.health(timeout=1).raise_for_error() if operation == "health" else OPERATIONS[operation](llm)
        assert llm.stats().running == 0

    @pytest.mark.parametrize(
        ("chunk", "words"),
        [
            ("text", "`echo` gave str instead of a Chunk"),
            (5, "gave int"),
            ({"text": "x"}, "gave dict"),
            (Chunk(text=5), ""),  # type: ignore[arg-type]
            (Chunk(thinking=b"x"), ""),  # type: ignore[arg-type]
        ],
    )
    def test_invalid_chunks_are_errors(self, both: Any, chunk: Any, words: str) -> None:
        llm = both.connect(Echo([[chunk]]), model=MODEL)
        with pytest.raises(ProviderError, match=words):
            llm.chat("x")
        assert llm.stats().running == 0

    def test_dead_server_is_asked_once(self, both: Any) -> None:
        echo = Echo([GONE])
        with pytest.raises(ConnectionFailed):
            both.connect(echo, model=MODEL).chat("x")
        assert len(echo.requests) == 1
