"""Adapters: resolvers find them, providers load them, and only the requested one is ever used."""

from __future__ import annotations

import asyncio
import hashlib
import math
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from plain import LoopedEcho, PlainEcho

import graftage
from graftage.exceptions import (
    AdapterError,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterNotFound,
    AdapterUnsupported,
    CapabilityUnsupported,
    ConnectionFailed,
    InferenceFailed,
    ModelNotFound,
    RequestRejected,
    ResourceLimitExceeded,
)
from graftage.hookspecs import hookimpl
from graftage.testing import Echo
from graftage.testing.echo import Pause
from graftage.types import AdapterInfo, Chunk, Limits, ModelInfo, Verdict

if TYPE_CHECKING:
    from pathlib import Path

    from graftage.calls import ResolveRequest

MODEL = "m:1"
FITS = Verdict(status="compatible")
NO = Verdict(status="incompatible", reasons=("40 layers against 30", "width 960 against 576"))


@dataclass(frozen=True)
class Patch:
    """An adapter as a resolver returns it."""

    name: str
    verdict: Verdict = FITS
    scale: float = 1.0
    served_as: str | None = None
    content: str | None = None
    """What the digest is made of, by default the name."""

    @property
    def digest(self) -> str:
        # It hides the name, so that a mix-up of the two fails a test.
        return f"sha256:{hashlib.sha256((self.content or self.name).encode()).hexdigest()}"

    def gguf(self, base: ModelInfo) -> Path:
        raise NotImplementedError

    def merge(self, base_file: Path, out: Path, on_progress: Any = None) -> Path:
        raise NotImplementedError


@dataclass(frozen=True)
class Scion(Patch):
    """An adapter that can be mixed with others of its kind."""

    def mix(self, weight: float, others: Any) -> Scion:
        if not all(isinstance(each, Scion) for each, _ in others):
            raise AdapterUnsupported("They are of different kinds.")
        return Scion(f"mix of {weight:g} {self.name}" + "".join(f" and {w:g} {each.name}" for each, w in others))


@dataclass
class Shelf:
    """A resolver of named adapters. Errors among them are raised, functions called with the request."""

    patches: dict[str, Any] = field(default_factory=dict)
    name: str = "shelf"
    asked: list[ResolveRequest] = field(default_factory=list)

    @hookimpl
    def resolve_adapter(self, request: ResolveRequest) -> Any:
        self.asked.append(request)
        found = self.patches.get(request.reference)
        if isinstance(found, Exception):
            raise found
        return found(request) if callable(found) else found

    @hookimpl
    def list_adapters(self) -> list[AdapterInfo]:
        return [AdapterInfo(name=name, reference=name) for name in self.patches]


class BrokenShelf(Shelf):
    @hookimpl
    def list_adapters(self) -> list[AdapterInfo]:
        raise OSError("no disk")


def shelf(*names: str, **more: Any) -> Shelf:
    return Shelf({**{name: Patch(name) for name in names}, **more})


def marks(request: Any) -> tuple[str, str]:
    """Return the name and digest of a request's adapter."""
    return request.adapter.name, request.adapter.digest


def loads(echo: Echo) -> list[Any]:
    """Return the requests to load an adapter."""
    return [request for hook, request in echo.calls if hook == "load_adapter"]


class TestUse:
    def test_argument_serves_one_call(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL, plugins=[shelf("poet")])
        with_it, without = llm.chat("x", adapter="poet"), llm.chat("x")
        assert (with_it.adapter, with_it.model) == ("poet", "m:1+poet")
        assert (without.adapter, without.model) == (None, MODEL)

    def test_active_one_serves_until_switched(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL, plugins=[shelf("poet")])
        active = llm.use_adapter("poet")
        assert (active.name, active.model, active.strategy) == ("poet", "m:1+poet", "derived")
        assert llm.stats().active_adapter == "poet"
        assert [llm.chat("x").adapter, llm.generate("x").adapter, llm.chat("x", adapter=None).adapter] == [
            "poet",
            "poet",
            None,
        ]
        assert llm.use_adapter(None) is None
        assert (llm.chat("x").adapter, llm.stats().active_adapter) == (None, None)

    def test_concurrent_calls_load_once(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL, plugins=[shelf("poet")])
        replies = both.together([lambda: llm.chat("x", adapter="poet").adapter] * 16)
        assert replies == ["poet"] * 16
        assert len(loads(echo)) == 1

    def test_unloaded_one_loads_again(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL, plugins=[shelf("poet")])
        llm.use_adapter("poet")
        llm.unload_adapter("poet")
        llm.unload_adapter("poet")
        assert llm.loaded() == ()
        assert llm.chat("x", adapter="poet").adapter == "poet"
        hooks = [hook for hook, _ in echo.calls if "load_adapter" in hook]
        assert hooks == ["load_adapter", "unload_adapter", "load_adapter"]

    @pytest.mark.parametrize("gone", [False, True])
    def test_unloading_finds_what_files_held_before(self, both: Any, *, gone: bool) -> None:
        echo, plugin = Echo(), shelf("poet")
        llm = both.connect(echo, model=MODEL, plugins=[plugin])
        llm.use_adapter("poet")
        plugin.patches["poet"] = Patch("poet", content="new")
        if gone:
            del plugin.patches["poet"]
        llm.unload_adapter("poet")
        (freed,) = [request.adapter for hook, request in echo.calls if hook == "unload_adapter"]
        assert freed.digest == Patch("poet").digest

    @pytest.mark.parametrize("change", ["pull", "delete"])
    def test_new_base_loads_it_again(self, both: Any, change: str) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL, plugins=[shelf("poet")])
        llm.use_adapter("poet")
        llm.pull(MODEL)
        getattr(llm, change)(MODEL)
        assert llm.chat("x").adapter == "poet"
        assert len(loads(echo)) == 2

    def test_prune_is_dry_by_default(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL, plugins=[shelf("poet", "pirate")])
        for name in ("poet", "pirate"):
            llm.chat("x", adapter=name)
        assert [each.name for each in llm.prune_adapters()] == ["m:1+pirate", "m:1+poet"]
        assert echo.derived == {"m:1+pirate", "m:1+poet"}
        assert [each.name for each in llm.prune_adapters(keep=["m:1+poet"], dry_run=False)] == ["m:1+pirate"]
        assert echo.derived == {"m:1+poet"}
        assert llm.chat("x", adapter="pirate").adapter == "pirate"

    def test_running_call_keeps_its_adapter(self) -> None:
        async def main() -> None:
            llm = graftage.connect_async(Echo(["a b c", "d"]), model=MODEL, plugins=[shelf("poet", "pirate")])
            async with llm:
                await llm.use_adapter("poet")
                async with await llm.chat("x", stream=True) as stream:
                    await llm.use_adapter("pirate")
                    assert [chunk.text async for chunk in stream] == ["a ", "b ", "c", ""]
                    assert (stream.reply.adapter, stream.reply.model) == ("poet", "m:1+poet")
                assert (await llm.chat("y")).adapter == "pirate"

        asyncio.run(main())

    def test_policies_limit_the_loading(self, both: Any) -> None:
        class Strict:
            name = "strict"
            answer: Any = Limits(context_window=512)

            @hookimpl
            def resource_limits(self, query: Any) -> Any:
                if isinstance(self.answer, Exception):
                    raise self.answer
                return self.answer

        policy = Strict()
        echo = Echo()
        llm = both.connect(echo, model=MODEL, plugins=[shelf("poet", "other"), policy])
        llm.use_adapter("poet")
        (loading,) = loads(echo)
        assert loading.context_window == 512
        policy.answer = ResourceLimitExceeded("no room", limit="memory", value=1)
        with pytest.raises(ResourceLimitExceeded):
            llm.use_adapter("other")
        assert len(loads(echo)) == 1


class TestSeveral:
    @pytest.mark.parametrize(
        ("adapter", "name", "model"),
        [
            (["style"], "style", "m:1+style"),
            (("style", 1), "style", "m:1+style"),
            (("style", 0.5), "0.5 style", "m:1+0.5*style"),
            (("style", -1.0), "-style", "m:1+-1*style"),
            (["style", "domain"], "style + domain", "m:1+style+domain"),
            (("style", "domain"), "style + domain", "m:1+style+domain"),
            ([("style", 2), ("domain", -0.25)], "2 style - 0.25 domain", "m:1+2*style+-0.25*domain"),
            (deque(["style", ("domain", 0.6)]), "style + 0.6 domain", "m:1+style+0.6*domain"),
        ],
    )
    def test_act_with_their_weights(self, both: Any, adapter: Any, name: str, model: str) -> None:
        echo = Echo(adapter_weights=True)
        llm = both.connect(echo, model=MODEL, plugins=[shelf("style", "domain")])
        once = llm.chat("x", adapter=adapter)
        active = llm.use_adapter(adapter)
        replies = [once, llm.chat("x"), llm.generate("x"), llm.generate("x", adapter=adapter)]
        assert {(each.adapter, each.model) for each in replies} == {(name, model)}
        assert {each.adapter_digest for each in replies} == {active.digest}
        assert (active.name, llm.stats().active_adapter) == (name, name)
        assert echo.requests[-1].model == MODEL
        assert len(loads(echo)) == len(active.weights)

    def test_resolver_mixes_for_other_providers(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL, plugins=[Shelf({"style": Scion("style"), "domain": Scion("domain")})])
        replies = [llm.chat("x", adapter=["style", ("domain", 0.6)]) for _ in range(2)]
        mixed = Scion("mix of 1 style and 0.6 domain")
        assert {each.adapter for each in replies} == {"style + 0.6 domain"}
        assert {each.model for each in replies} == {f"m:1+{mixed.name}"}
        assert {each.adapter_digest for each in replies} == {mixed.digest}
        assert llm.chat("x", adapter=("style", 0.5)).model == "m:1+mix of 0.5 style"
        assert [each.adapter.name for each in loads(echo)] == [mixed.name, "mix of 0.5 style"]
        llm.unload_adapter(["style", ("domain", 0.6)])
        assert echo.requests[-1].adapter.model == replies[0].model

    @pytest.mark.parametrize("second", [Patch("domain"), Scion("domain")])
    def test_cannot_act_without_either(self, both: Any, second: Patch) -> None:
        echo = Echo()
        first = Patch("style") if isinstance(second, Scion) else Scion("style")
        llm = both.connect(echo, model=MODEL, plugins=[Shelf({"style": first, "domain": second})])
        with pytest.raises(AdapterUnsupported):
            llm.chat("x", adapter=["style", "domain"])
        assert loads(echo) == []
        assert llm.chat("x", adapter=["style"]).adapter == "style"

    def test_refusal_names_who_can(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL, plugins=[shelf("style")])
        with pytest.raises(AdapterUnsupported, match=r"`0\.5 style`.*`shelf`.*embedded one or llama-server"):
            llm.chat("x", adapter=("style", 0.5))

    def test_failing_mix_is_typed(self, both: Any) -> None:
        class Odd(Scion):
            def mix(self, weight: float, others: Any) -> Scion:
                raise OSError("disk full")

        llm = both.connect(Echo(), model=MODEL, plugins=[shelf(odd=Odd("odd"))])
        with pytest.raises(AdapterError, match="`shelf` could not mix `2 odd`: OSError: disk full"):
            llm.chat("x", adapter=("odd", 2))

    @pytest.mark.parametrize("weighted", [False, True])
    def test_chain_goes_on_to_one_that_can(self, both: Any, weighted: bool) -> None:
        chain = [Echo(), Echo(adapter_weights=weighted)]
        llm = both.connect(chain, model=MODEL, plugins=[shelf("style", "domain")])
        llm.use_adapter(["style", ("domain", 2)])
        assert llm.stats().active_adapter == "style + 2 domain"
        if weighted:
            assert llm.chat("x").adapter == "style + 2 domain"
        else:
            with pytest.raises(AdapterUnsupported):
                llm.chat("x")

    def test_each_verdict_counts(self, both: Any) -> None:
        unsure = Verdict(status="unknown", reasons=("no shapes",), warnings=("odd name",))
        plugin = shelf("style", big=Patch("big", NO), odd=Patch("odd", unsure))
        llm = both.connect(Echo(adapter_weights=True), model=MODEL, plugins=[plugin])
        with pytest.raises(AdapterIncompatible, match="`big` does not fit"):
            llm.chat("x", adapter=["style", "odd", "big"])
        warnings = llm.chat("x", adapter=["style", "odd", "big"], force=True).warnings
        assert len(warnings) == 3
        assert "odd name" in warnings
        assert any("`big` was forced" in each for each in warnings)

    def test_order_does_not_matter(self, both: Any) -> None:
        llm = both.connect(Echo(adapter_weights=True), model=MODEL, plugins=[shelf("style", "domain")])
        mixes = [["style", ("domain", 2)], [("domain", 2), "style"], ["domain", ("style", 2)], ("style", 2), "style"]
        digests = [llm.chat("x", adapter=each).adapter_digest for each in mixes]
        assert digests[0] == digests[1]
        assert len(set(digests)) == 4

    def test_unloaded_part_is_loaded_again(self, both: Any) -> None:
        echo = Echo(adapter_weights=True)
        llm = both.connect(echo, model=MODEL, plugins=[shelf("style", "domain")])
        llm.use_adapter(["style", "domain"])
        llm.unload_adapter("style")
        assert llm.chat("x").adapter == "style + domain"
        assert [each.adapter.name for each in loads(echo)] == ["style", "domain", "style"]

    def test_parts_of_different_models_are_refused(self, both: Any) -> None:
        class Derived(Echo):
            """A provider that claims to apply weights, but makes models."""

            @hookimpl
            def connect(self, request: Any) -> Any:
                self.adapter_weights = False
                found: Any = super().connect(request)
                claimed = found.capabilities()
                found.capabilities = hookimpl(lambda: replace(claimed, features=claimed.features | {"adapter_weights"}))
                return found

        llm = both.connect(Derived(), model=MODEL, plugins=[shelf("style", "domain")])
        with pytest.raises(AdapterUnsupported, match=r"`style` is loaded as `m:1\+style`; `domain` is"):
            llm.chat("x", adapter=["style", "domain"])

    @pytest.mark.parametrize(
        "adapter",
        [
            [],
            (),
            {"style": 1},
            {"style"},
            [["style"]],
            ["style", 0.5],
            [("style", 0.5, 1)],
            ("style", True),
            ("style", 0),
            ("style", math.nan),
            ("style", math.inf),
            ("style", 10**400),
            ("style", 1e-9),
            ("", 0.5),
            (0.5, "style"),
            ["style", None],
            ["style", "style"],
            [("style", 0.5), "style"],
            ["style", "same"],
            [f"a{number}" for number in range(9)],
        ],
    )
    def test_wrong_ones_are_refused(self, both: Any, adapter: Any) -> None:
        echo = Echo(adapter_weights=True)
        plugin = shelf("style", same=Patch("same", content="style"))
        llm = both.connect(echo, model=MODEL, plugins=[plugin])
        for act in (partial(llm.chat, "x", adapter=adapter), partial(llm.use_adapter, adapter)):
            with pytest.raises(RequestRejected) as caught:
                act()
            assert caught.value.hint
        assert echo.requests == []


def lost() -> AdapterError:
    return AdapterError("The server has lost it.", retryable=True)


def gone(model: str | None = "m:1+poet") -> ModelNotFound:
    return ModelNotFound("It was deleted.", model=model)


class TestLost:
    @pytest.mark.parametrize("make", [lost, gone, lambda: gone(None)])
    def test_is_loaded_again_in_the_call(self, both: Any, make: Any, watcher: Any) -> None:
        echo = Echo(["a", make(), "b", make(), "c"])
        llm = both.connect(echo, model=MODEL, plugins=[shelf("poet"), watcher])
        assert [llm.chat("x", adapter="poet").text, llm.generate("x", adapter="poet").text] == ["a", "b"]
        stream = llm.chat("x", adapter="poet", stream=True)
        assert "".join(chunk.text for chunk in stream) == "c"
        assert (stream.reply.adapter, stream.reply.model) == ("poet", "m:1+poet")
        assert len(loads(echo)) == 3
        retry = watcher.last("retry")
        assert (type(retry.error), retry.adapter) == (type(make()), "poet")
        assert (llm.stats().failures, llm.stats().retries, llm.stats().running) == (0, 2, 0)

    @pytest.mark.parametrize("weighted", [False, True])
    def test_every_part_is_loaded_again(self, both: Any, weighted: bool) -> None:
        echo = Echo(["a", lost(), "b"], adapter_weights=weighted)
        llm = both.connect(echo, model=MODEL, plugins=[Shelf({each: Scion(each) for each in ("style", "domain")})])
        replies = [llm.chat("x", adapter=["style", ("domain", 0.5)]) for _ in range(2)]
        assert [each.text for each in replies] == ["a", "b"]
        assert replies[0].model == replies[1].model
        assert len(loads(echo)) == (4 if weighted else 2)

    def test_second_failure_is_raised(self, both: Any) -> None:
        echo = Echo([lost(), gone(), "a"])
        llm = both.connect(echo, model=MODEL, plugins=[shelf("poet")])
        with pytest.raises(ModelNotFound):
            llm.chat("x", adapter="poet")
        assert (llm.stats().failures, llm.stats().running) == (1, 0)
        assert llm.chat("x", adapter="poet").text == "a"

    def test_failing_load_is_raised(self, both: Any) -> None:
        def fail(_: Any) -> Any:
            echo.errors["load_adapter"] = AdapterUnsupported("no more room")
            return lost()

        echo = Echo([fail, "a"])
        llm = both.connect(echo, model=MODEL, plugins=[shelf("poet")])
        with pytest.raises(AdapterUnsupported, match="no more room"):
            llm.chat("x", adapter="poet")
        echo.errors.clear()
        assert llm.chat("x", adapter="poet").text == "a"

    @pytest.mark.parametrize(
        "step",
        [
            AdapterError("broken"),
            ModelNotFound("no base", model=MODEL),
            ConnectionFailed("away"),
            [Chunk(text="a"), lost()],
        ],
    )
    def test_nothing_else_is_repeated(self, both: Any, step: Any) -> None:
        echo = Echo([step])
        llm = both.connect(echo, model=MODEL, plugins=[shelf("poet")])
        with pytest.raises(graftage.GraftageError):
            llm.chat("x", adapter="poet")
        assert len(loads(echo)) == 1
        assert [hook for hook, _ in echo.calls].count("chat") == 1

    def test_request_keeps_its_call(self, both: Any) -> None:
        echo = Echo([lost(), "a"])
        llm = both.connect(echo, model=MODEL, plugins=[shelf("poet")])
        llm.chat("x", adapter="poet", max_tokens=7, timeout=50)
        first, second = (request for hook, request in echo.calls if hook == "chat")
        assert first.call is second.call
        assert (first.messages, first.max_tokens) == (second.messages, 7)

    def test_evicted_ones_are_loaded_again(self, both: Any) -> None:
        class Small(Echo):
            """A provider with room for two adapters."""

            room: tuple[str, ...] = ()

            def note(self, hook: str, request: Any) -> None:
                super().note(hook, request)
                if hook == "load_adapter":
                    self.room = (*self.room, request.adapter.digest)[-2:]
                elif hook == "chat" and not {each.digest for each, _ in request.adapter.weights} <= {*self.room}:
                    raise lost()

        echo = Small(adapter_weights=True)
        llm = both.connect(echo, model=MODEL, plugins=[shelf("one", "two", "three")])
        turns: list[Any] = ["one", "two", "three", ["one", "two"], "three", ["three", ("one", 2)], "two"] * 2
        models = ["one", "two", "three", "one+two", "three", "three+2*one", "two"] * 2
        assert [llm.chat("x", adapter=each).model for each in turns] == [f"{MODEL}+{each}" for each in models]
        assert llm.stats().failures == 0

    @pytest.mark.parametrize("kind", [PlainEcho, LoopedEcho])
    def test_is_loaded_again_on_other_threads(self, both: Any, kind: Any) -> None:
        echo = kind([lost(), "a b"])
        llm = both.connect(echo, model=MODEL, plugins=[shelf("poet")])
        stream = llm.chat("x", adapter="poet", stream=True)
        assert "".join(chunk.text for chunk in stream) == "a b"
        assert len(loads(echo)) == 2

    def test_facts_of_its_model_are_asked_again(self, both: Any) -> None:
        def served(request: ResolveRequest) -> Patch | None:
            return Patch("poet") if request.show("m:1+poet") else None

        echo = Echo([lost(), "a"])
        llm = both.connect(echo, model=MODEL, plugins=[shelf(poet=served)])
        llm.chat("x", adapter="poet")
        llm.chat("x", adapter="poet")
        assert [request.model for hook, request in echo.calls if hook == "show_model"] == ["m:1+poet"] * 2

    def test_count_loads_again_too(self, both: Any) -> None:
        class Once(dict[str, Any]):
            def get(self, key: str, default: Any = None) -> Any:
                return self.pop(key, default)

        echo = Echo()
        echo.errors = Once(count_tokens=lost())
        llm = both.connect(echo, model=MODEL, plugins=[shelf("poet")])
        assert llm.count_tokens("x", adapter="poet") == 1
        assert len(loads(echo)) == 2

    def test_concurrent_calls_load_it_once(self, both: Any) -> None:
        pause = Pause()
        echo = Echo([[pause, lost()] for _ in range(8)])
        llm = both.opened(echo, model=MODEL, plugins=[shelf("poet")])
        llm.use_adapter("poet")
        calls = [both.start(llm.chat, "x") for _ in range(8)]
        while echo.running < 8:
            time.sleep(0.001)
        pause.release()
        assert [each.result(10).adapter for each in calls] == ["poet"] * 8
        assert len(loads(echo)) == 2


class TestMemory:
    def test_is_bounded(self, both: Any) -> None:
        echo, names = Echo(), [f"a{number}" for number in range(258)]
        llm = both.connect(echo, model=MODEL, plugins=[shelf(*names)])
        for name in [*names[:256], "a0", *names[256:], "a0", "a1"]:
            assert llm.chat("x", adapter=name).adapter == name
        assert [each.adapter.name for each in loads(echo)] == [*names, "a1"]


class TestFollowing:
    def test_first_reply_warns_also_after_other_calls(self, both: Any) -> None:
        plugin = shelf("poet")
        llm = both.connect(Echo(["one", InferenceFailed("no"), "two"]), model=MODEL, plugins=[plugin])
        llm.use_adapter("poet")
        llm.chat("x")
        plugin.patches["poet"] = Patch("poet", content="new")
        llm.count_tokens("x")
        with pytest.raises(InferenceFailed):
            llm.chat("x")
        assert "has changed" in "".join(llm.chat("x").warnings)

    def test_retrained_one_answers_and_warns_once(self, both: Any) -> None:
        plugin = shelf("poet")
        llm = both.connect(Echo(), model=MODEL, plugins=[plugin])
        llm.use_adapter("poet")
        new = plugin.patches["poet"] = Patch("poet", content="new")
        first, second = llm.chat("x"), llm.chat("x")
        assert (first.adapter_digest, second.adapter_digest) == (new.digest, new.digest)
        (warning,) = first.warnings
        assert warning == (
            f"The adapter `poet` has changed since it was last used: {new.digest}, not {Patch('poet').digest}."
        )
        assert second.warnings == ()

    def test_vanished_one_does_not_answer(self, both: Any) -> None:
        plugin = shelf("poet")
        llm = both.connect(Echo(), model=MODEL, plugins=[plugin])
        llm.use_adapter("poet")
        poet = plugin.patches.pop("poet")
        for _ in range(2):
            with pytest.raises(AdapterNotFound, match="`poet`"):
                llm.chat("x")
        plugin.patches["poet"] = poet
        assert llm.chat("x").adapter == "poet"

    def test_on_missing_holds_for_each_call(self, both: Any) -> None:
        plugin = shelf("poet")
        llm = both.connect(Echo(), model=MODEL, plugins=[plugin])
        llm.use_adapter("poet", on_missing="base")
        poet = plugin.patches.pop("poet")
        reply = llm.chat("x")
        assert (reply.adapter, reply.adapter_digest, len(reply.warnings)) == (None, None, 1)
        assert llm.stats().active_adapter is None
        plugin.patches["poet"] = poet
        assert (llm.chat("x").adapter, llm.stats().active_adapter) == ("poet", "poet")

    def test_other_base_is_no_change(self, both: Any) -> None:
        def by_base(request: ResolveRequest) -> Patch:
            return Patch("poet", content=f"poet for {request.model}")

        llm = both.connect(Echo(), model=MODEL, plugins=[shelf(poet=by_base)])
        llm.use_adapter("poet")
        assert llm.chat("x", model="m:2").warnings == ()
        assert llm.chat("x").warnings == ()


class TestOthers:
    def test_are_those_that_fit(self, both: Any) -> None:
        unsure = Patch("unsure", Verdict(status="unknown", reasons=("?",)))
        unfit = {"torn": AdapterInvalid("torn"), "missing": None, "big": Patch("big", NO), "unsure": unsure}
        names = ("one", "two", "three", "last")
        plugin = shelf(*names, same=Patch("same", content="last"), based=lambda request: request.base() and Patch("b"))
        plugin.patches.update(unfit)
        echo, odd = Echo(), Shelf(name="odd")
        odd.list_adapters = hookimpl(lambda: [5])  # type: ignore[assignment]
        llm = both.opened(echo, model=MODEL, plugins=[BrokenShelf(name="broken"), odd, plugin])
        for name in ("three", "two", "last"):
            llm.chat("x", adapter=name)
        others, asked = loads(echo)[-1].others, len(plugin.asked)
        assert asked == 3
        assert [each.name for each in others()] == ["two", "three", "one", "b"]
        asked = len(plugin.asked)
        assert len(others()) == 4
        assert len(plugin.asked) == asked

    def test_blocking_call_does_not_hang(self) -> None:
        async def main() -> None:
            echo = Echo()
            async with graftage.connect_async(echo, model=MODEL, plugins=[shelf("one", "two")]) as llm:
                await llm.chat("x", adapter="one")
                assert loads(echo)[0].others() == ()

        asyncio.run(main())


class TestMany:
    @pytest.mark.parametrize("weighted", [False, True])
    def test_each_reply_is_of_its_own(self, both: Any, weighted: bool) -> None:
        mixes: list[Any] = [None, "one", "two", ("three", 0.5), ["one", "two"], ["one", ("two", 0.5)], [("two", -1)]]
        ways = ["", "+one", "+two", "+0.5*three", "+one+two", "+one+0.5*two", "+-1*two"]
        if not weighted:
            ways[3:] = [f"+mix of {each}" for each in ("0.5 three", "1 one and 1 two", "1 one and 0.5 two", "-1 two")]
        echo = Echo(adapter_weights=weighted)
        llm = both.connect(echo, model=MODEL, plugins=[Shelf({each: Scion(each) for each in ("one", "two", "three")})])
        order = [place % len(mixes) for place in range(300)]
        replies = both.together([partial(llm.chat, f"prompt {place}", adapter=mixes[place]) for place in order])
        assert [each.model for each in replies] == [MODEL + ways[place] for place in order]
        assert [each.text for each in replies] == [f"prompt {place}" for place in order]
        assert len(loads(echo)) == (3 if weighted else 6)


class TestSwitch:
    def test_failure_lasts_until_success(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL, plugins=[shelf("poet")])
        llm.use_adapter("poet")
        with pytest.raises(AdapterNotFound):
            llm.use_adapter("pirate")
        for act in (llm.chat, llm.generate):
            with pytest.raises(AdapterNotFound, match="pirate"):
                act("x")
        assert llm.chat("x", adapter=None).adapter is None
        assert llm.chat("x", adapter="poet").adapter == "poet"
        llm.use_adapter("poet")
        assert llm.chat("x").adapter == "poet"

    def test_provider_failure_lasts_too(self, both: Any) -> None:
        echo = Echo(errors={"load_adapter": ConnectionFailed("gone")})
        llm = both.connect(echo, model=MODEL, plugins=[shelf("poet")])
        with pytest.raises(ConnectionFailed):
            llm.use_adapter("poet")
        with pytest.raises(AdapterError, match="poet") as caught:
            llm.chat("x")
        assert isinstance(caught.value.__cause__, ConnectionFailed)
        llm.use_adapter(None)
        assert llm.chat("x").adapter is None

    def test_on_missing_warns_each_reply(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL, plugins=[shelf()])
        assert llm.use_adapter("pirate", on_missing="base") is None
        for _ in range(2):
            reply = llm.chat("x")
            assert reply.adapter is None
            assert any("pirate" in warning for warning in reply.warnings)
        llm.use_adapter(None)
        assert llm.chat("x").warnings == ()

    def test_on_missing_covers_nothing_else(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL, plugins=[shelf(torn=AdapterInvalid("torn"))])
        with pytest.raises(AdapterInvalid):
            llm.use_adapter("torn", on_missing="base")
        with pytest.raises(RequestRejected, match="on_missing"):
            llm.use_adapter("torn", on_missing="other")

    def test_last_one_wins(self, both: Any) -> None:
        reached, go = threading.Event(), threading.Event()

        def slow(request: ResolveRequest) -> Patch:
            reached.set()
            assert go.wait(10)
            return Patch(request.reference)

        names = ("one", "two", "three")
        llm = both.opened(Echo(), model=MODEL, plugins=[shelf(**dict.fromkeys(names, slow))])
        switches = []
        for waiting, name in enumerate(names):
            switches.append(both.start(llm.use_adapter, name))
            assert reached.wait(10)
            while llm.stats().waiting < waiting:
                time.sleep(0.001)
        go.set()
        assert [each.result(10).name for each in switches] == [*names]
        assert llm.chat("x").adapter == "three"

    @pytest.mark.parametrize(
        ("reference", "arguments"),
        [("", {}), (5, {}), ("other", {"timeout": 0}), ("other", {"on_missing": "bse"}), ("other", {"model": 5})],
    )
    def test_wrong_arguments_are_a_failure(self, both: Any, reference: Any, arguments: dict[str, Any]) -> None:
        llm = both.connect(Echo(), model=MODEL, plugins=[shelf("poet", "other")])
        llm.use_adapter("poet")
        with pytest.raises(RequestRejected):
            llm.use_adapter(reference, **arguments)
        with pytest.raises(AdapterError, match="Switch again"):
            llm.chat("x")
        llm.use_adapter(None)
        assert llm.chat("x").adapter is None

    def test_cancellation_is_a_failure(self) -> None:
        async def main() -> None:
            llm = graftage.connect_async(Echo(), model=MODEL, plugins=[shelf("poet")])
            switching = asyncio.create_task(llm.use_adapter("poet"))
            await asyncio.sleep(0)
            switching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await switching
            with pytest.raises(AdapterError, match="Switch again"):
                await llm.chat("x")
            await llm.close()

        asyncio.run(main())

    def test_success_holds_during_the_next(self, both: Any) -> None:
        gates = {name: (threading.Event(), threading.Event()) for name in ("early", "late")}

        def slow(request: ResolveRequest) -> Patch:
            reached, go = gates[request.reference]
            reached.set()
            assert go.wait(10)
            return Patch(request.reference)

        llm = both.opened(Echo(), model=MODEL, plugins=[shelf(early=slow, late=slow)])
        switches = [both.start(llm.use_adapter, "early")]
        assert gates["early"][0].wait(10)
        switches.append(both.start(llm.use_adapter, "late"))
        for (reached, go), switch, name, before in zip(gates.values(), switches, gates, (None, "early"), strict=True):
            assert reached.wait(10)
            assert llm.stats().active_adapter == before
            go.set()
            assert switch.result(10).name == name
        assert llm.chat("x").adapter == "late"


class TestVerdict:
    def test_incompatible_is_refused_with_reasons(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL, plugins=[shelf(big=Patch("big", NO))])
        with pytest.raises(AdapterIncompatible, match="40 layers") as caught:
            llm.chat("x", adapter="big")
        assert caught.value.reasons == NO.reasons
        assert "force" in str(caught.value)
        assert loads(echo) == []

    def test_force_loads_with_a_warning(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL, plugins=[shelf(big=Patch("big", NO))])
        once = llm.chat("x", adapter="big", force=True)
        llm.use_adapter("big", force=True)
        for reply in (once, llm.chat("x")):
            assert reply.adapter == "big"
            assert any("forced" in warning and "40 layers" in warning for warning in reply.warnings)
        assert loads(echo)[0].force
        with pytest.raises(AdapterIncompatible):
            llm.chat("x", adapter="big")

    def test_unknown_loads_with_a_warning(self, both: Any) -> None:
        unsure = Verdict(status="unknown", reasons=("the shapes of the base are unknown",), warnings=("other name",))
        reply = both.connect(Echo(), model=MODEL, plugins=[shelf(odd=Patch("odd", unsure))]).chat("x", adapter="odd")
        assert reply.warnings[0] == "other name"
        assert "shapes of the base" in reply.warnings[1]

    @pytest.mark.parametrize("force", [False, True])
    def test_unsupported_is_refused_even_forced(self, both: Any, force: bool) -> None:
        cannot = Verdict(status="unsupported", reasons=("the rows of `attn_qkv` are fused",))
        echo, plugin = Echo(), shelf(odd=Patch("odd", cannot))
        with pytest.raises(AdapterUnsupported, match=r"fused.*convert_lora_to_gguf\.py") as caught:
            both.connect(echo, model=MODEL, plugins=[plugin]).chat("x", adapter="odd", force=force)
        assert caught.value.reasons == cannot.reasons
        chain = both.connect([echo, Echo(without=["load_adapter"])], model=MODEL, plugins=[plugin])
        with pytest.raises(CapabilityUnsupported):  # The second one was asked.
            chain.chat("x", adapter="odd", force=force)
        assert loads(echo) == []

    def test_resolving_loads_nothing(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL, plugins=[shelf(big=Patch("big", NO))])
        assert llm.resolve_adapter("big").verdict == NO
        assert echo.requests == []
        with pytest.raises(AdapterNotFound):
            llm.resolve_adapter("small")


class TestResolvers:
    def test_are_asked_in_turn(self, both: Any) -> None:
        broken, empty, full = Shelf({"poet": OSError("no disk")}, "one"), Shelf({}, "two"), Shelf({}, "three")
        llm = both.connect(Echo(), model=MODEL, plugins=[broken, empty, full])
        with pytest.raises(AdapterNotFound) as caught:
            llm.chat("x", adapter="poet")
        assert caught.value.reasons == ("one: OSError: no disk", "two: does not know it", "three: does not know it")
        full.patches["poet"] = Patch("poet")
        assert llm.chat("x", adapter="poet").adapter == "poet"

    def test_invalid_result_is_skipped(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL, plugins=[shelf(poet={"name": "poet"})])
        with pytest.raises(AdapterNotFound, match="not an adapter"):
            llm.chat("x", adapter="poet")

    def test_missing_one_names_graftage_lora(self, both: Any) -> None:
        with pytest.raises(AdapterNotFound, match="graftage-lora"):
            both.connect(Echo(), model=MODEL).chat("x", adapter="poet")

    def test_unable_provider_is_refused_first(self, both: Any) -> None:
        found = shelf("poet")
        echo = Echo(without=["load_adapter"])
        with pytest.raises(CapabilityUnsupported, match="load_adapter"):
            both.connect(echo, model=MODEL, plugins=[found]).chat("x", adapter="poet")
        assert found.asked == []

    def test_base_facts_come_on_request(self, both: Any) -> None:
        facts: list[ModelInfo | None] = []

        def look(request: ResolveRequest) -> Patch:
            facts.extend([request.base(), request.base()])
            return Patch("poet")

        echo = Echo(models=[ModelInfo(name="m:1", architecture="llama")])
        llm = both.connect(echo, model=MODEL, plugins=[shelf("plain", poet=look)])
        llm.chat("x", adapter="plain")
        assert not any(hook == "show_model" for hook, _ in echo.calls)
        llm.chat("x", adapter="poet")
        assert [info.architecture if info else None for info in facts] == ["llama", "llama"]
        assert sum(hook == "show_model" for hook, _ in echo.calls) == 1

    def test_dead_server_is_a_connection_error(self, both: Any) -> None:
        echo = Echo(errors={"show_model": ConnectionFailed("gone")})
        with pytest.raises(ConnectionFailed):
            both.connect(echo, model=MODEL, plugins=[shelf(poet=lambda request: request.base())]).chat(
                "x", adapter="poet"
            )

    @pytest.mark.parametrize("reference", ["", "  ", 5, b"poet", [5]])
    def test_invalid_references_are_refused(self, both: Any, reference: Any) -> None:
        llm = both.connect(Echo(), model=MODEL, plugins=[shelf("poet")])
        with pytest.raises(RequestRejected, match="dapter"):
            llm.use_adapter(reference)

    def test_broken_one_hides_no_other(self, both: Any) -> None:
        llm = both.connect(
            Echo(), model=MODEL, plugins=[shelf("poet"), BrokenShelf(name="broken"), Shelf({"pirate": 1}, "b")]
        )
        poet, broken, pirate = llm.adapters()
        assert (poet.name, broken.name, pirate.name) == ("poet", "", "pirate")
        assert (broken.source, "OSError: no disk" in broken.problem) == ("broken", True)


class TestIdentity:
    def test_shared_content_keeps_both_names(self, both: Any) -> None:
        echo, names = Echo(), ("one", "two", "one")
        patches = {name: Patch(name, content="same") for name in names}
        llm = both.connect(echo, model=MODEL, plugins=[Shelf(patches)])
        assert [llm.chat("x", adapter=name).adapter for name in names] == [*names]
        assert [marks(request) for hook, request in echo.calls if hook == "chat"] == [
            (name, patches[name].digest) for name in names
        ]
        assert len(loads(echo)) == 1

    def test_name_and_digest_are_separate(self, both: Any, watcher: Any) -> None:
        echo, patch = Echo(), Patch("poet")
        llm = both.connect(echo, model=MODEL, plugins=[Shelf({"a/path": patch}), watcher])
        loaded = llm.use_adapter("a/path")
        assert (loaded.name, loaded.digest) == ("poet", patch.digest)
        assert (llm.stats().active_adapter, watcher.last("finish").adapter) == ("poet", "poet")
        replies = [llm.chat("x"), llm.generate("x"), llm.chat("x", adapter="a/path")]
        assert [marks(request) for request in echo.requests[-3:]] == [("poet", patch.digest)] * 3
        assert [reply.adapter for reply in replies] == ["poet"] * 3
        llm.unload_adapter("a/path")
        assert marks(echo.requests[-1]) == ("poet", patch.digest)

    def test_new_content_is_another_adapter(self, both: Any) -> None:
        echo, old, new = Echo(), Patch("poet"), Patch("poet", content="new")
        plugin = Shelf({"poet": old, "old": old})
        llm = both.connect(echo, model=MODEL, plugins=[plugin])
        llm.use_adapter("poet")
        plugin.patches["poet"] = new
        for how in ({"adapter": "poet"}, {}, {"adapter": "old"}):
            reply = llm.chat("x", **how)
            digest = old.digest if how.get("adapter") == "old" else new.digest
            assert reply.adapter_digest == digest
            assert marks(echo.requests[-1]) == ("poet", digest)
        assert [request.adapter.digest for request in loads(echo)] == [old.digest, new.digest]


NAMES = ("one", "two", "three")
UNFIT = {
    "torn": AdapterInvalid("torn"),
    "unsupported": AdapterUnsupported("not here"),
    "big": Patch("big", NO),
}


class AdapterMachine(RuleBasedStateMachine):
    """After any switch, unload, prune or failure, a reply names the requested adapter."""

    @initialize()
    def begin(self) -> None:
        self.echo = Echo()
        self.shelf = shelf(*NAMES, **UNFIT)
        self.llm = graftage.connect(self.echo, model=MODEL, plugins=[self.shelf])
        self.expected: str | None = None
        self.failed = False

    @rule(name=st.sampled_from([*NAMES, *UNFIT, "missing", None]), lost=st.booleans())
    def switch(self, name: str | None, lost: bool) -> None:
        self.echo.errors = {"load_adapter": ConnectionFailed("gone")} if lost else {}
        try:
            active = self.llm.use_adapter(name)
        except graftage.GraftageError:
            self.failed = True
        else:
            self.failed, self.expected = False, name
            assert (active.name if active else None) == name
        self.echo.errors = {}

    @rule()
    def chat(self) -> None:
        try:
            reply = self.llm.chat("x")
        except AdapterError:
            assert self.failed
            return
        assert not self.failed
        assert reply.adapter == self.expected
        assert reply.model == (f"{MODEL}+{self.expected}" if self.expected else MODEL)
        assert self.echo.requests[-1].model == reply.model
        assert reply.adapter_digest == (self.shelf.patches[self.expected].digest if self.expected else None)

    @rule(name=st.sampled_from(NAMES), content=st.integers(0, 2))
    def retrain(self, name: str, content: int) -> None:
        self.shelf.patches[name] = Patch(name, content=f"{name} {content}")

    @rule(name=st.sampled_from([*NAMES, None]), lost=st.booleans())
    def chat_once_with(self, name: str | None, lost: bool) -> None:
        self.echo.errors = {"load_adapter": ConnectionFailed("gone")} if lost else {}
        try:
            assert self.llm.chat("x", adapter=name).adapter == name
        except ConnectionFailed:
            assert lost
        self.echo.errors = {}

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name: str) -> None:
        self.llm.unload_adapter(name)

    @rule()
    def prune(self) -> None:
        self.llm.prune_adapters(dry_run=False)

    @invariant()
    def nothing_is_left_running(self) -> None:
        if hasattr(self, "llm"):
            assert (self.llm.stats().running, self.echo.running) == (0, 0)


TestAdapterMachine = AdapterMachine.TestCase
TestAdapterMachine.settings = settings(max_examples=60, stateful_step_count=30)
