"""Options of a call: known ones are checked before a request, others must be in `server` and bypass no limit."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import BaseModel

from graftage._engine.options import NUMBERS, SWITCHES, WHOLE, read_options
from graftage.exceptions import RequestRejected
from graftage.testing.echo import Echo

KNOWN = frozenset({*NUMBERS, *WHOLE, *SWITCHES, "stop", "server", "voice"})
RIGHT: dict[str, list[Any]] = {
    "temperature": [0, 0.0, 1, 0.7, 2],
    "top_p": [0, 1, 0.5],
    "min_p": [0.05],
    "typical_p": [1.0],
    "repeat_penalty": [0, 1.1],
    "frequency_penalty": [-2, 2.0],
    "presence_penalty": [-0.5],
    "mirostat": [0, 2],
    "top_k": [-1, 0, 40],
    "repeat_last_n": [-1, 64],
    "seed": [-1, 0, 42, 2**63 - 1],
    "top_logprobs": [0, 20],
    "num_gpu": [-1, 0, 99],
    "num_thread": [0, 8],
    "num_batch": [1, 512],
    "main_gpu": [0],
    "num_keep": [-1, 4],
    "logprobs": [True, False],
    "penalize_newline": [True],
    "use_mmap": [False],
    "stop": [["a"], ["a", "b"], []],
    "voice": ["any", 5, [1], {"a": None}, True],
}
WRONG: dict[str, list[Any]] = {
    "temperature": ["hot", "0.5", "", True, math.nan, math.inf, -0.1, 1e300, 10**400, [0.5], {}, b"1", 1j],
    "top_p": [1.1, -1, "0.9", False, math.nan],
    "min_p": [2],
    "typical_p": ["x"],
    "repeat_penalty": [-1, True],
    "frequency_penalty": ["x", -math.inf],
    "presence_penalty": [[]],
    "mirostat": [3, 1.0, "1"],
    "top_k": [0.5, 40.0, "40", True, -2, 2**31],
    "repeat_last_n": [-2],
    "seed": ["42", 0.5, True, 2**63, -(2**63) - 1, math.nan],
    "top_logprobs": [-1, "5", True, 1.5],
    "num_gpu": ["all", -2],
    "num_thread": [-1, 1.5],
    "num_batch": [0, -512],
    "main_gpu": [-1],
    "num_keep": [True],
    "logprobs": ["yes", 1, 5, 0, []],
    "penalize_newline": ["no"],
    "use_mmap": ["false", 0],
    "stop": [5, True, "", [""], [5], ["a", None], {"a": 1}, {"a"}, b"a"],
    "voice": [math.nan, {1}, object()],
}


class Options(BaseModel):
    """Like `ollama.Options`."""

    num_ctx: int | None = None
    temperature: float | None = None


class TestValues:
    @pytest.mark.parametrize(("name", "value"), [(name, each) for name, values in RIGHT.items() for each in values])
    def test_valid_ones_are_sent_unchanged(self, name: str, value: Any) -> None:
        read = read_options({name: value}, KNOWN)[name]
        assert (read, type(read)) == (value, type(value))

    @pytest.mark.parametrize(("name", "value"), [(name, each) for name, values in WRONG.items() for each in values])
    def test_invalid_ones_are_refused(self, name: str, value: Any) -> None:
        with pytest.raises(RequestRejected, match=f"`{name}`") as caught:
            read_options({name: value}, KNOWN)
        assert caught.value.hint

    def test_hint_names_type_and_range(self) -> None:
        hints = {
            "temperature": "a number from 0 to 1000",
            "mirostat": "a whole number from 0 to 2",
            "logprobs": "True or False",
            "stop": "a string that is not empty, or a list of them",
        }
        for name, hint in hints.items():
            with pytest.raises(RequestRejected) as caught:
                read_options({name: -1}, KNOWN)
            assert caught.value.hint == f"Give {hint}."

    def test_single_stop_becomes_a_list(self) -> None:
        assert read_options({"stop": "a"}, KNOWN) == {"stop": ["a"]}

    @pytest.mark.parametrize("none", [None, {}, {"temperature": None}, {"server": None}, {"server": {}}])
    def test_none_is_not_sent(self, none: Any) -> None:
        assert read_options(none, KNOWN) == {}

    @pytest.mark.parametrize("options", ["x", 5, [("temperature", 1)], {"temperature"}, True])
    def test_other_than_a_mapping_is_refused(self, options: Any) -> None:
        with pytest.raises(RequestRejected, match="`options`"):
            read_options(options, KNOWN)

    def test_pydantic_object_gives_its_set_fields(self) -> None:
        assert read_options(Options(temperature=0.5), KNOWN) == {"temperature": 0.5}
        with pytest.raises(RequestRejected) as caught:
            read_options(Options(num_ctx=9), KNOWN)
        assert caught.value.hint == "Use the parameter `context_window`."

    @pytest.mark.parametrize(
        ("name", "way_out"),
        {
            "num_ctx": "parameter `context_window`",
            "Num_Ctx": "parameter `context_window`",
            "numCtx": "parameter `context_window`",
            "num-predict": "parameter `max_tokens`",
            "max_tokens": "parameter `max_tokens`",
            "keepAlive": "parameter `keep_alive`",
            "reasoning_effort": "parameter `think`",
            "response_format": "parameter `format`",
            "temp": "Did you mean `temperature`?",
            "temprature": "Did you mean `temperature`?",
            "Temperature": "Did you mean `temperature`?",
            "repetition_penalty": "Did you mean `repeat_penalty`?",
            "n_gpu_layers": "Did you mean `num_gpu`?",
            "xtc_probability": "goes into `server`",
            5: "goes into `server`",
        }.items(),
    )
    def test_unknown_name_gets_the_right_one(self, name: Any, way_out: str) -> None:
        for value in (1, None):
            with pytest.raises(RequestRejected) as caught:
                read_options({name: value}, KNOWN)
            assert way_out in str(caught.value.hint)


NEWER = {"xtc_probability": 0.5, "dry": {"multiplier": 1, "breakers": ["\n"]}, "flag": True, "word": "x"}
OURS = {
    "context_window": ["num_ctx", "Num_Ctx", "NUM_CTX", "numCtx", "num-ctx", "n_ctx", "context_window", "ctx_size"],
    "max_tokens": ["num_predict", "n_predict", "NumPredict", "max_tokens", "max_completion_tokens", "maxTokens"],
    "keep_alive": ["keep_alive", "Keep_Alive", "keepalive", "\u212aeep_alive"],
    "num_thread": ["num_thread", "Num_Thread", "n_threads", "threads"],
    "num_gpu": ["num_gpu", "n_gpu_layers", "NUM_GPU"],
    "num_batch": ["num_batch", "n_batch"],
    "main_gpu": ["main_gpu", "mainGPU"],
}
LIMITED = [(word, name) for word, names in OURS.items() for name in names]
NOT_NESTED = {
    "temperature": ["temperature", "Temperature"],
    "use_mmap": ["use_mmap", "mmap"],
    "stop": ["stop"],
    "model": ["model", "Model"],
    "stream": ["stream", "stream_options"],
    "format": ["format", "response_format", "json_schema"],
    "think": ["think", "reasoning_effort", "enable_thinking"],
    "adapter": ["lora", "adapter"],
    "tools": ["tools"],
    "voice": ["voice", "Voice"],
    "server": ["server"],
}
TOP = [*LIMITED, *((word, name) for word, names in NOT_NESTED.items() for name in names)]


class TestServerOptions:
    """What goes into `server`: options that only the server knows."""

    def test_are_merged_with_the_rest(self) -> None:
        assert read_options({"temperature": 0, "server": {**NEWER, "none": None}}, KNOWN) == {"temperature": 0, **NEWER}

    @pytest.mark.parametrize("value", ["x", 5, [1], True, {1: 2}, {"x": math.nan}, {"x": {1}}, {"x": object()}])
    def test_must_be_json(self, value: Any) -> None:
        with pytest.raises(RequestRejected, match="`server`"):
            read_options({"server": value}, KNOWN)

    @pytest.mark.parametrize(("word", "name"), TOP)
    def test_cannot_hold_graftage_names(self, word: str, name: str) -> None:
        with pytest.raises(RequestRejected, match="cannot be given in `server`") as caught:
            read_options({"server": {name: 1}}, KNOWN)
        assert str(caught.value.hint).endswith(f"`{word}`.")

    @pytest.mark.parametrize(("word", "name"), LIMITED)
    def test_cannot_bypass_limits_at_any_depth(self, word: str, name: str) -> None:
        for given in ({"options": {name: 1}}, {"a": [{"b": {name: None}}]}):
            with pytest.raises(RequestRejected) as caught:
                read_options({"server": given}, KNOWN)
            assert f"`{word}`" in str(caught.value.hint)

    def test_nested_data_may_use_other_names(self) -> None:
        given = {"guide": {"properties": {"model": {"format": "date"}, "stop": {}}}}
        assert read_options({"server": given}, KNOWN) == given

    def test_several_replies_are_refused(self) -> None:
        with pytest.raises(RequestRejected, match="`n`") as caught:
            read_options({"server": {"n": 2}}, KNOWN)
        assert "Call again" in str(caught.value.hint)

    def test_options_of_other_providers_are_checked(self) -> None:
        known = frozenset({"server", "temperature"})
        assert read_options({"server": {"top_k": 40}}, known) == {"top_k": 40}
        with pytest.raises(RequestRejected, match="`top_k`"):
            read_options({"server": {"top_k": "40"}}, known)
        with pytest.raises(RequestRejected) as caught:
            read_options({"server": {"num_thread": 4}}, known)
        assert "settings" in str(caught.value.hint)

    def test_provider_without_them_refuses(self) -> None:
        with pytest.raises(RequestRejected, match="does not pass on options") as caught:
            read_options({"server": NEWER}, frozenset({"temperature"}))
        assert caught.value.hint == "Known options: temperature."


def test_options_reach_the_provider(both: Any) -> None:
    echo = Echo()
    llm = both.connect(echo, model="m")
    options = {"seed": 1, "stop": "a", "server": NEWER}
    llm.chat("x", options=options)
    llm.generate("x", options=options)
    llm.embed("x", options=options)
    assert [each.options for each in echo.requests] == [{"seed": 1, "stop": ["a"], **NEWER}] * 3
    for wrong in ({"temperature": "hot"}, {"server": {"Num_Ctx": 1}}):
        for act in (llm.chat, llm.generate, llm.embed):
            with pytest.raises(RequestRejected):
                act("x", options=wrong)
    assert len(echo.requests) == 3
