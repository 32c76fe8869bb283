"""`bind`: views of a client with an adapter, a model and defaults of their own, on one connection."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from test_adapters import MODEL, Patch, Shelf, loads, shelf

import graftage
from graftage.exceptions import (
    AdapterError,
    AdapterIncompatible,
    AdapterNotFound,
    ConnectionFailed,
    ProviderTimeout,
    RequestRejected,
)
from graftage.hookspecs import hookimpl
from graftage.testing import Echo, Pause
from graftage.types import Chunk, ToolCall, Verdict


class Second(Echo):
    """Another provider, for chains."""

    name = "second"


def sent(echo: Echo) -> Any:
    """Return the last request."""
    return echo.requests[-1]


class TestAdapter:
    def test_each_view_has_its_own(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL, plugins=[shelf("poet", "pirate")])
        llm.use_adapter("poet")
        same, other, base = llm.bind(), llm.bind(adapter="pirate"), llm.bind(adapter=None)
        clients = (llm, same, other, base)
        assert [each.chat("x").adapter for each in clients] == ["poet", "poet", "pirate", None]
        llm.use_adapter(None)
        assert [each.chat("x").adapter for each in clients] == [None, "poet", "pirate", None]
        assert [each.stats().active_adapter for each in clients] == [None, "poet", "pirate", None]
        same.use_adapter("pirate")
        other.use_adapter(None)
        base.use_adapter("poet")
        assert [each.chat("x").adapter for each in clients] == [None, "pirate", None, "poet"]

    def test_failed_switch_is_the_views_alone(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL, plugins=[shelf("poet")])
        view = llm.bind(adapter="poet")
        with pytest.raises(AdapterNotFound):
            view.use_adapter("nobody")
        later = view.bind()
        for broken in (view, later):
            with pytest.raises(AdapterNotFound):
                broken.chat("x")
        assert (llm.chat("x").adapter, view.bind(adapter="poet").chat("x").adapter) == (None, "poet")
        assert (later.use_adapter(None), later.chat("x").adapter) == (None, None)
        with pytest.raises(AdapterNotFound):
            view.chat("x")

    def test_argument_of_a_call_wins(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL, plugins=[shelf("poet", "pirate")])
        view = llm.bind(adapter="poet")
        assert [view.chat("x", adapter=each).adapter for each in ("pirate", None)] == ["pirate", None]
        assert view.chat("x").adapter == "poet"

    def test_weights_and_several(self, both: Any) -> None:
        llm = both.opened(Echo(), model=MODEL, plugins=[shelf("poet", "pirate")])
        assert llm.bind(adapter=["poet", ("pirate", 0.5)]).stats().active_adapter == "poet + 0.5 pirate"

    def test_loads_once_for_all(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL, plugins=[shelf("poet")])
        views = [llm.bind(adapter="poet"), llm.bind(adapter="poet"), llm]
        for each in views:
            each.chat("x", adapter="poet")
        assert len(loads(echo)) == 1
        views[0].unload_adapter("poet")
        assert views[1].chat("x").adapter == "poet"
        assert len(loads(echo)) == 2

    def test_force_is_a_default(self, both: Any) -> None:
        misfit = Patch("poet", Verdict(status="incompatible", reasons=("other width",)))
        llm = both.connect(Echo(), model=MODEL, plugins=[Shelf({"poet": misfit})])
        with pytest.raises(AdapterIncompatible):
            llm.bind(adapter="poet").chat("x")
        reply = llm.bind(adapter="poet", force=True).chat("x")
        assert (reply.adapter, "was forced onto" in reply.warnings[0]) == ("poet", True)

    def test_many_at_once_never_mix(self, both: Any) -> None:
        names = [f"p{place}" for place in range(10)]
        llm = both.connect(Echo(), model=MODEL, plugins=[shelf(*names)])
        views = {name: llm.bind(adapter=name, options={"seed": place}) for place, name in enumerate(names)}

        def call(name: str, view: Any) -> Any:
            reply = view.chat(name)
            return name, reply.text, reply.adapter, reply.model

        calls = [lambda n=name, v=view: call(n, v) for name, view in views.items()] * 30
        assert both.together(calls) == [(name, name, name, f"{MODEL}+{name}") for name in names] * 30
        assert llm.stats().calls == 300


class TestModelAndDefaults:
    def test_model_is_the_views(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL, plugins=[shelf("poet")])
        view = llm.bind(model="other:7b", adapter="poet")
        assert (view.chat("x").model, view.chat("x", model=MODEL).model) == ("other:7b+poet", f"{MODEL}+poet")
        assert (view.show().name, view.model, llm.model, llm.chat("x").model) == ("other:7b", "other:7b", MODEL, MODEL)

    def test_defaults_reach_chat_and_generate(self, both: Any) -> None:
        def look(word: str) -> str:
            """Look it up."""
            return word

        echo = Echo()
        view = both.connect(echo, model=MODEL).bind(
            options={"temperature": 0, "seed": 1},
            think=True,
            keep_alive="5m",
            context_window=4096,
            max_tokens=7,
            timeout=9,
            tools=[look],
        )
        view.chat("x")
        chat = sent(echo)
        assert (chat.options, chat.think, chat.keep_alive) == ({"temperature": 0, "seed": 1}, True, 300.0)
        assert (chat.context_window, chat.max_tokens, chat.call.timeouts.total) == (4096, 7, 9)
        assert [each.name for each in chat.tools] == ["look"]
        view.generate("x")
        assert (sent(echo).think, sent(echo).max_tokens) == (True, 7)
        assert view.count_tokens("x") == 1
        assert [each.name for each in sent(echo).tools] == ["look"]

    def test_call_wins_and_options_merge(self, both: Any) -> None:
        echo = Echo()
        view = both.connect(echo, model=MODEL).bind(options={"temperature": 0, "seed": 1}, max_tokens=7)
        view.chat("x", options={"seed": 2, "top_k": 3}, max_tokens=8)
        assert (sent(echo).options, sent(echo).max_tokens) == ({"temperature": 0, "seed": 2, "top_k": 3}, 8)
        view.chat("x", options=None, max_tokens=None)
        assert (sent(echo).options, sent(echo).max_tokens) == ({"temperature": 0, "seed": 1}, 7)

    def test_view_of_a_view_has_both(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL, plugins=[shelf("poet")])
        view = llm.bind(model="other:7b", options={"seed": 1}, max_tokens=7).bind(adapter="poet", options={"top_k": 2})
        assert view.chat("x").model == "other:7b+poet"
        assert (sent(echo).options, sent(echo).max_tokens) == ({"seed": 1, "top_k": 2}, 7)

    def test_format_is_a_default(self, both: Any) -> None:
        view = both.connect(Echo(['{"a": 1}']), model=MODEL).bind(format="json")
        assert view.chat("x").parsed == {"a": 1}

    def test_run_tools_has_defaults(self, both: Any) -> None:
        def look(word: str) -> str:
            """Look it up."""
            return word

        def other(word: str) -> str:
            """Do something else."""
            return word

        echo = Echo([ToolCall(id="1", name="look", arguments={"word": "a"}), "done"])
        llm = both.connect(echo, model=MODEL, plugins=[shelf("poet")])
        view = llm.bind(adapter="poet", max_tokens=9, tools=[other])
        run = graftage.run_tools if both.mode == "sync" else graftage.run_tools_async
        reply: Any = run(getattr(view, "_inner", view), "x", [look])
        reply = reply if both.mode == "sync" else both.run(reply)
        assert (reply.text, reply.adapter, sent(echo).max_tokens) == ("done", "poet", 9)
        assert [each.name for each in sent(echo).tools] == ["look"]

    @pytest.mark.parametrize(
        ("bound", "error", "words"),
        [
            ({"temperatur": 0}, TypeError, r"bind\(\) has no argument `temperatur`"),
            ({"max_token": 5}, TypeError, "did you mean `max_tokens`"),
            ({"num_ctx": 5}, TypeError, "did you mean `context_window`"),
            ({"images": []}, TypeError, r"bind\(\) has no argument `images`"),
            ({"max_tokens": 0}, RequestRejected, "`max_tokens` is invalid"),
            ({"timeout": -1}, RequestRejected, "`timeout` is invalid"),
            ({"keep_alive": "soon"}, RequestRejected, "invalid"),
            ({"model": " "}, RequestRejected, "`model` is empty"),
            ({"adapter": ""}, RequestRejected, "dapter"),
            ({"adapter": ("poet", 0)}, RequestRejected, "weight"),
            ({"think": 5}, RequestRejected, "`think`"),
            ({"tools": 5}, RequestRejected, "tools"),
            ({"retries": 2}, RequestRejected, "`retries` needs a `format`"),
        ],
    )
    def test_invalid_ones_are_refused_at_once(
        self, both: Any, bound: dict[str, Any], error: type[Exception], words: str
    ) -> None:
        llm = both.connect(Echo(), model=MODEL)
        with pytest.raises(error, match=words):
            llm.bind(**bound)

    def test_options_are_checked_when_open(self, both: Any) -> None:
        llm = both.opened(Echo(), model=MODEL)
        with pytest.raises(RequestRejected, match="`temperatur` is unknown"):
            llm.bind(options={"temperatur": 0})
        with pytest.raises(RequestRejected, match="`seed` is invalid"):
            llm.bind(options={"seed": "x"})

    def test_errors_are_translated(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL, translate_error=lambda error: LookupError(str(error)))
        with pytest.raises(LookupError, match="max_tokens"):
            llm.bind(max_tokens=0)


class TestSharing:
    def test_binding_asks_nothing(self, both: Any) -> None:
        echo = Echo()
        llm = both.opened(echo, model=MODEL, plugins=[shelf("poet")])
        for _ in range(50):
            llm.bind(adapter="poet", max_tokens=5)
        assert (echo.requests, len(echo.connections)) == ([], 1)

    def test_counters_and_slots_are_one(self, both: Any) -> None:
        pause = Pause()
        echo = Echo([[Chunk(text="a"), pause, Chunk(finish_reason="stop")], "b"])
        llm = both.connect(echo, model=MODEL, concurrency=1)
        view = llm.bind(timeout=0.2)
        first = both.start(llm.chat, "x")
        assert pause.reached.wait(10)
        with pytest.raises(ProviderTimeout, match="No slot"):
            view.chat("x")
        pause.release()
        assert first.result(10).text == "a"
        assert (llm.stats().calls, view.stats().failures, len(echo.connections)) == (2, 1, 1)

    def test_closing_a_view_ends_it_alone(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL)
        with llm.bind() as view:
            later = view.bind()
            view.chat("x")
        view.close()
        for use in (lambda: view.chat("x"), view.bind, view.models, lambda: view.use_adapter(None)):
            with pytest.raises(RuntimeError, match="the client is closed"):
                use()
        assert (later.chat("x").text, llm.chat("x").text, echo.closed) == ("x", "x", False)

    def test_closing_the_client_ends_all(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL)
        used, unused = llm.bind(), llm.bind().bind()
        used.chat("x")
        llm.close()
        assert echo.closed
        for view in (used, unused):
            with pytest.raises(RuntimeError, match="the client is closed"):
                view.chat("x")
            view.close()
        with pytest.raises(RuntimeError, match="the client is closed"):
            llm.bind()

    def test_closed_unopened_view_stays_closed(self, both: Any) -> None:
        llm = both.connect("auto", model=MODEL, plugins=[First()])
        view = llm.bind()
        view.close()
        with pytest.raises(RuntimeError, match="the client is closed"):
            view.chat("x")
        assert llm.chat("x").text == "x"


class First(Echo):
    """A provider that `auto` takes first."""

    name = "first"

    @hookimpl
    def answers(self) -> int:
        return 99


class TestUnopened:
    """A client that chooses its provider at its first call."""

    def test_first_view_opens_the_client(self, both: Any) -> None:
        echo = First()
        llm = both.connect("auto", model=MODEL, plugins=[echo, shelf("poet")])
        view = llm.bind(adapter="poet", model="other:7b")
        assert both.together([lambda: view.chat("x").model] * 5) == ["other:7b+poet"] * 5
        assert (llm.chat("x").model, len(echo.connections)) == (MODEL, 1)
        assert view.origins == llm.origins

    def test_adapter_is_that_of_the_binding(self, both: Any) -> None:
        llm = both.connect("auto", model=MODEL, plugins=[First(), shelf("poet")])
        view = llm.bind()
        llm.use_adapter("poet")
        assert (view.chat("x").adapter, llm.chat("x").adapter) == (None, "poet")
        assert llm.bind().chat("x").adapter == "poet"

    def test_failed_switch_is_not_forgotten(self) -> None:
        class Late(Echo):
            attempts = 0

            @hookimpl
            def connect(self, request: Any) -> object:
                self.attempts += 1
                if self.attempts == 1:
                    raise ConnectionFailed("not yet")
                return super().connect(request)

        async def main() -> None:
            llm = graftage.connect_async(Late(), model=MODEL, plugins=[shelf("poet")])
            with pytest.raises(ConnectionFailed):
                await llm.use_adapter("poet")
            same, own = llm.bind(), llm.bind(adapter="poet")
            with pytest.raises(AdapterError, match="The switch to the adapter `poet` failed"):
                await same.chat("x")
            assert (await own.chat("x")).adapter == "poet"
            await llm.use_adapter(None)
            with pytest.raises(AdapterError):
                await same.chat("x")
            await llm.close()

        asyncio.run(main())


class TestChain:
    def test_views_of_a_chain(self, both: Any) -> None:
        bad, good = Echo([ConnectionFailed("gone")] * 9), Second()
        llm = both.connect([bad, good], model=MODEL, plugins=[shelf("poet", "pirate")])
        view = llm.bind(model="other:7b", adapter="poet", max_tokens=3)
        reply = view.chat("x")
        assert (reply.provider, reply.model, sent(good).max_tokens) == ("second", "other:7b+poet", 3)
        assert (view.stats().active_adapter, llm.stats().active_adapter) == ("poet", None)
        assert (llm.chat("x").model, llm.chat("x").adapter) == (MODEL, None)
        view.use_adapter("pirate")
        assert (view.chat("x").adapter, llm.chat("x").adapter) == ("pirate", None)
        view.close()
        assert (llm.chat("x").text, good.closed) == ("x", False)

    def test_members_have_the_defaults(self, both: Any) -> None:
        echo = Echo()
        llm = both.opened([echo, Second()], model=MODEL, plugins=[shelf("poet")])
        view = llm.bind(max_tokens=3, adapter="poet")
        member = view.members[0]
        reply = member.chat("x") if both.mode == "sync" else both.run(member.chat("x"))
        assert (sent(echo).max_tokens, reply.adapter) == (3, "poet")
