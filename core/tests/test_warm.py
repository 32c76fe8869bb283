"""`warm` reads a prompt ahead; `pull_adapter` downloads an adapter; `adapters` lists them with verdicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from test_adapters import MODEL, Patch, Shelf, loads, shelf

from graftage.exceptions import (
    AdapterIncompatible,
    AdapterInvalid,
    AdapterNotFound,
    ConnectionFailed,
    ModelNotFound,
    PluginError,
    ProviderTimeout,
    RequestRejected,
    ResourceLimitExceeded,
)
from graftage.hookspecs import hookimpl
from graftage.testing import Echo
from graftage.types import AdapterInfo, Limits, PullProgress, Reply, Usage, Verdict, Warmed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from graftage.calls import ListAdaptersRequest, PullAdapterRequest

SYSTEM = {"role": "system", "content": "You are a pirate."}


def hooks(echo: Echo) -> list[str]:
    """Return the hooks that were called, in order."""
    return [hook for hook, _ in echo.calls if hook != "connect"]


def look(word: str) -> str:
    """Look it up."""
    return word


class TestWarm:
    def test_provider_reads_ahead(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL, plugins=[shelf("poet")])
        warmed = llm.warm("poet", [SYSTEM], tools=[look], context_window=4096, keep_alive=60, think=True)
        assert (warmed.tokens, warmed.cached_tokens, warmed.saved, warmed.warnings) == (4, 0, None, ())
        assert hooks(echo) == ["load_adapter", "warm"]
        request = echo.requests[-1]
        assert (request.adapter.name, request.model, request.context_window) == ("poet", f"{MODEL}+poet", 4096)
        assert (request.messages[0].role, request.tools[0].name, request.think) == ("system", "look", True)
        assert llm.stats().active_adapter is None

    def test_adapter_is_brought_back(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL, plugins=[shelf("poet")])
        llm.warm("poet")
        llm.warm("poet")
        assert len(loads(echo)) == 2

    def test_without_the_hook_a_token_is_asked(self, both: Any) -> None:
        usage = Usage(input_tokens=40, output_tokens=1, cached_tokens=30)
        echo = Echo([Reply(text="Ahoy there", usage=usage)], without=["warm"])
        llm = both.connect(echo, model=MODEL, plugins=[shelf("poet")])
        warmed = llm.warm("poet", [SYSTEM], tools=[look], tool_choice="required", format="json")
        assert warmed == Warmed(tokens=40, cached_tokens=30)
        request = echo.requests[-1]
        assert (hooks(echo), request.max_tokens, request.adapter.name) == (["load_adapter", "chat"], 1, "poet")
        assert [each.name for each in request.tools] == ["look"]
        assert [each.role for each in request.messages] == ["system", "user"]
        llm.warm("poet", "Ahoy!")
        assert [each.content for each in echo.requests[-1].messages] == ["Ahoy!"]

    @pytest.mark.parametrize("without", [(), ("warm",)])
    def test_without_messages_the_adapter_is_loaded(self, both: Any, without: tuple[str, ...]) -> None:
        echo = Echo(without=without)
        llm = both.connect(echo, model=MODEL, plugins=[shelf("poet")])
        assert llm.warm("poet").tokens == 0
        assert hooks(echo) == ["load_adapter"]
        assert llm.chat("x", adapter="poet").adapter == "poet"
        assert len(loads(echo)) == 1

    def test_base_without_messages_loads_the_model(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL)
        llm.warm(None, keep_alive=60, context_window=4096)
        request = echo.requests[-1]
        assert (hooks(echo), request.keep_alive, request.context_window) == (["load_model"], 60, 4096)

    def test_view_lends_its_arguments(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL, plugins=[shelf("poet")])
        view = llm.bind(
            adapter="poet", tools=[look], context_window=4096, max_tokens=9, format="json", retries=1, model="other:7b"
        )
        view.warm(messages=[SYSTEM])
        request = echo.requests[-1]
        assert (request.adapter.name, request.tools[0].name, request.context_window) == ("poet", "look", 4096)
        assert request.model == "other:7b+poet"

    def test_policies_decide_as_for_a_chat(self, both: Any) -> None:
        class Policy:
            name = "strict"

            @hookimpl
            def resource_limits(self, query: Any) -> Limits:
                if (query.context_window or 0) > 9000:
                    raise ResourceLimitExceeded("Too large.", limit="context_window")
                return Limits(context_window=2048, reasons={"context_window": "small machine"})

        echo = Echo()
        llm = both.connect(echo, model=MODEL, plugins=[Policy()])
        warmed = llm.warm(None, [SYSTEM], context_window=4096)
        assert (echo.requests[-1].context_window, len(warmed.warnings)) == (2048, 1)
        with pytest.raises(ResourceLimitExceeded):
            llm.warm(None, [SYSTEM], context_window=9999)

    def test_failures_are_typed_and_counted(self, both: Any) -> None:
        misfit = Patch("wide", Verdict(status="incompatible", reasons=("other width",)))
        echo = Echo(errors={"warm": ConnectionFailed("gone")})
        llm = both.connect(echo, model=MODEL, plugins=[Shelf({"wide": misfit})])
        with pytest.raises(AdapterNotFound):
            llm.warm("nobody", [SYSTEM])
        with pytest.raises(AdapterIncompatible):
            llm.warm("wide", [SYSTEM])
        with pytest.raises(ConnectionFailed) as caught:
            llm.warm(None, [SYSTEM])
        assert (caught.value.operation, caught.value.model) == ("warm", MODEL)
        assert (llm.stats().failures, llm.stats().running) == (3, 0)

    def test_lost_adapter_is_loaded_again(self, both: Any) -> None:
        echo = Echo(strict=True, models=[MODEL])
        llm = both.connect(echo, model=MODEL, plugins=[shelf("poet")])
        llm.warm("poet", [SYSTEM])
        llm.delete(f"{MODEL}+poet")
        assert llm.warm("poet", [SYSTEM]).tokens == 4

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"max_tokn": 1}, TypeError, r"warm\(\) has no argument `max_tokn`"),
            ({"messages": 5}, RequestRejected, "`messages`"),
            ({"context_window": 0}, RequestRejected, "`context_window` is invalid"),
            ({"adapter": 5}, RequestRejected, "dapter"),
            ({"timeout": -1}, RequestRejected, "`timeout` is invalid"),
        ],
    )
    def test_invalid_arguments_are_refused(
        self, both: Any, arguments: dict[str, Any], error: type[Exception], words: str
    ) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL)
        with pytest.raises(error, match=words):
            llm.warm(**{"messages": [SYSTEM], **arguments})
        assert hooks(echo) == []

    def test_chain_asks_for_a_member(self, both: Any) -> None:
        class Second(Echo):
            name = "second"

        llm = both.connect([Echo(), Second()], model=MODEL)
        with pytest.raises(RuntimeError, match="`members`"):
            llm.warm(None, [SYSTEM])

    def test_wrong_result_blames_the_provider(self, both: Any) -> None:
        class Odd(Echo):
            @hookimpl
            def connect(self, request: Any) -> Any:
                connection: Any = super().connect(request)
                connection._warm = lambda *_: 5
                return connection

        llm = both.connect(Odd(), model=MODEL)
        with pytest.raises(Exception, match="answered `warm` with int instead of Warmed"):
            llm.warm(None, [SYSTEM])

    def test_observers_see_the_tokens(self, both: Any, watcher: Any) -> None:
        llm = both.connect(Echo(), model=MODEL, plugins=[watcher])
        llm.warm(None, [SYSTEM])
        assert watcher.kinds("warm") == ["start", "admitted", "finish"]
        assert watcher.events[-1].usage.input_tokens == 4


@dataclass
class Hub:
    """A plugin that downloads what it has."""

    has: dict[str, Any] = field(default_factory=dict)
    name: str = "hub"
    asked: list[PullAdapterRequest] = field(default_factory=list)

    @hookimpl
    def pull_adapter(self, request: PullAdapterRequest) -> AdapterInfo | None:
        self.asked.append(request)
        request.call.emit("progress", progress=PullProgress(status="downloading", total=9, completed=4))
        found = self.has.get(request.reference)
        if isinstance(found, Exception):
            raise found
        return found


FOUND = AdapterInfo(name="poet", reference="poet", digest="sha256:1")


class TestPull:
    def test_first_that_knows_it_downloads(self, both: Any, watcher: Any) -> None:
        unknowing, knowing, later = Hub(name="a"), Hub({"me/poet": FOUND}, "b"), Hub(name="c")
        echo = Echo()
        llm = both.connect(echo, plugins=[shelf(), unknowing, knowing, later, watcher])
        assert llm.pull_adapter("me/poet", name="bard", overwrite=True, timeout=30) == FOUND
        assert [len(each.asked) for each in (unknowing, knowing, later)] == [1, 1, 0]
        request = knowing.asked[0]
        assert (request.reference, request.name, request.overwrite) == ("me/poet", "bard", True)
        assert (request.call.timeouts.total, echo.requests) == (30, [])
        assert watcher.kinds("pull_adapter") == ["start", "progress", "progress", "finish"]

    def test_defaults_have_no_deadline(self, both: Any) -> None:
        hub = Hub({"me/poet": FOUND})
        both.connect(Echo(), plugins=[hub]).pull_adapter("me/poet")
        request = hub.asked[0]
        assert (request.name, request.overwrite, request.call.deadline) == (None, False, float("inf"))

    @pytest.mark.parametrize(("plugins", "hint"), [([], "Install `graftage-lora`"), ([Hub()], "`owner/name`")])
    def test_nobody_knows_it(self, both: Any, plugins: list[Any], hint: str) -> None:
        with pytest.raises(AdapterNotFound, match="No plugin can download the adapter `me/poet`") as caught:
            both.connect(Echo(), plugins=plugins).pull_adapter("me/poet")
        assert hint in str(caught.value.hint)

    def test_failure_ends_the_search(self, both: Any) -> None:
        later = Hub({"me/poet": FOUND}, "later")
        llm = both.connect(Echo(), plugins=[Hub({"me/poet": AdapterInvalid("A pickle.")}), later])
        with pytest.raises(AdapterInvalid, match="A pickle"):
            llm.pull_adapter("me/poet")
        llm = both.connect(Echo(), plugins=[Hub({"me/poet": OSError("disk full")}), later])
        with pytest.raises(PluginError, match="`hub` failed with OSError: disk full"):
            llm.pull_adapter("me/poet")
        llm = both.connect(Echo(), plugins=[Hub({"me/poet": 5}), later])
        with pytest.raises(PluginError, match="`hub` failed with TypeError: it answered `pull_adapter` with int"):
            llm.pull_adapter("me/poet")
        assert later.asked == []

    @pytest.mark.parametrize("given", [{"reference": ""}, {"reference": 5}, {"name": 5}, {"overwrite": "no"}])
    def test_invalid_arguments_are_refused(self, both: Any, given: dict[str, Any]) -> None:
        hub = Hub()
        with pytest.raises(RequestRejected):
            both.connect(Echo(), plugins=[hub]).pull_adapter(**{"reference": "me/poet", **given})
        assert hub.asked == []

    def test_timeout_ends_it(self, both: Any) -> None:
        class Slow:
            name = "slow"

            @hookimpl
            def pull_adapter(self, request: PullAdapterRequest) -> AdapterInfo:
                import time

                time.sleep(0.3)
                return FOUND

        with pytest.raises(ProviderTimeout):
            both.connect(Echo(), plugins=[Slow()]).pull_adapter("me/poet", timeout=0.05)

    def test_works_on_a_chain(self, both: Any) -> None:
        class Second(Echo):
            name = "second"

        llm = both.connect([Echo(), Second()], plugins=[Hub({"me/poet": FOUND})])
        assert llm.pull_adapter("me/poet") == FOUND


@dataclass
class Judge:
    """A plugin that lists one adapter, with a verdict if it is asked about a model."""

    name: str = "judge"
    listed: Any = None

    @hookimpl
    def list_adapters(self, request: ListAdaptersRequest) -> Iterable[AdapterInfo]:
        if self.listed is not None:
            return self.listed  # type: ignore[no-any-return] # what is wrong
        base = request.base()
        fits = Verdict(status="compatible" if base else "unknown", reasons=(f"{request.model} {base and base.name}",))
        return [AdapterInfo(name="poet", reference="poet", verdict=fits if request.model else None)]


class TestList:
    def test_verdicts_are_for_the_model_asked(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model="other:7b", plugins=[Judge()])
        (plain,) = llm.adapters()
        assert (plain.verdict, echo.requests) == (None, [])
        (judged,) = llm.adapters(model=MODEL)
        assert (judged.verdict.status, judged.verdict.reasons) == ("compatible", (f"{MODEL} {MODEL}",))

    def test_model_must_exist(self, both: Any) -> None:
        llm = both.connect(Echo(strict=True), plugins=[Judge()])
        with pytest.raises(ModelNotFound):
            llm.adapters(model="nobody:1")

    def test_provider_without_facts_judges_nothing(self, both: Any) -> None:
        llm = both.connect(Echo(without=["show_model"]), plugins=[Judge()])
        assert llm.adapters(model=MODEL)[0].verdict.status == "unknown"

    @pytest.mark.parametrize("listed", [5, [5], ["poet"]])
    def test_odd_lists_are_problems(self, both: Any, listed: Any) -> None:
        llm = both.connect(Echo(), plugins=[Judge("odd", listed), Judge()])
        odd, poet = llm.adapters()
        assert (odd.name, odd.source, poet.name) == ("", "odd", "poet")
        assert odd.problem

    def test_chain_judges_by_a_member(self, both: Any) -> None:
        class Second(Echo):
            name = "second"

        llm = both.opened([Echo(), Second()], model=MODEL, plugins=[Judge()])
        assert llm.adapters()[0].name == "poet"
        with pytest.raises(RuntimeError, match="`members`"):
            llm.adapters(model=MODEL)
