"""Adapters: resolvers find them, providers load them, and only the requested one is ever used."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import graftage
from graftage.exceptions import (
    AdapterError,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterNotFound,
    AdapterUnsupported,
    CapabilityUnsupported,
    ConnectionFailed,
    RequestRejected,
    ResourceLimitExceeded,
)
from graftage.hookspecs import hookimpl
from graftage.testing import Echo
from graftage.types import AdapterInfo, Limits, ModelInfo, Verdict

if TYPE_CHECKING:
    from pathlib import Path

    from graftage.calls import ResolveRequest

MODEL = "m:1"
FITS = Verdict(status="compatible")


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


NO = Verdict(status="incompatible", reasons=("40 layers against 30", "width 960 against 576"))


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
        class Broken(Shelf):
            @hookimpl
            def list_adapters(self) -> list[AdapterInfo]:
                raise OSError("no disk")

        llm = both.connect(
            Echo(), model=MODEL, plugins=[shelf("poet"), Broken(name="broken"), Shelf({"pirate": 1}, "b")]
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
        self.llm = graftage.connect(self.echo, model=MODEL, plugins=[shelf(*NAMES, **UNFIT)])
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
