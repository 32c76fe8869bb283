"""What a host passes to a client and gets from it, sync and async, against Echo."""

from __future__ import annotations

import asyncio
import functools
import math
import time
from dataclasses import FrozenInstanceError
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from operations import OPERATIONS

import graftage
from graftage.exceptions import (
    AdapterNotFound,
    CapabilityUnsupported,
    ConnectionFailed,
    GraftageError,
    InferenceFailed,
    ModelNotFound,
    PluginLoadError,
    ProviderError,
    ProviderNotFound,
    ProviderTimeout,
    RequestRejected,
    SettingsError,
    StreamInterrupted,
)
from graftage.hookspecs import hookimpl
from graftage.testing import Echo, Pause
from graftage.types import (
    Capabilities,
    Chunk,
    Health,
    Message,
    ModelInfo,
    Reply,
    Timeouts,
    ToolCall,
    Usage,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

MODEL = "m:1"
GONE = ConnectionFailed("gone")


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


class Silent:
    """A provider whose async hooks never return and ignore their limits."""

    name = "silent"
    ended = False

    @hookimpl
    def connect(self, request: Any) -> object:
        return self.Connection(self)

    class Connection:
        def __init__(self, owner: Silent) -> None:
            self.owner = owner
            self.address = f"silent {id(owner)}"

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
            silent = Silent()
            async with graftage.connect_async(silent, model=MODEL) as llm:
                for act in (llm.chat("x", timeout=0.01), llm.embed("x", timeout=0.01)):
                    with pytest.raises(ProviderTimeout, match="timeout") as caught:
                        await act
                    assert (caught.value.phase, caught.value.retryable) == ("total", False)
                assert silent.ended
                assert llm.stats().running == 0

        asyncio.run(main())

    def test_stalled_stream_keeps_partial(self) -> None:
        async def main() -> None:
            silent = Silent()
            async with graftage.connect_async(silent, model=MODEL) as llm:
                stream = await llm.chat("begin", timeout=0.01, stream=True)
                with pytest.raises(ProviderTimeout) as caught:
                    [chunk async for chunk in stream]
                assert caught.value.partial is not None
                assert caught.value.partial.text == "so far"
                assert silent.ended
                assert (llm.stats().running, llm.stats().failures) == (0, 1)
                task = asyncio.current_task()
                assert task is not None
                assert not task.cancelled()
                assert getattr(task, "cancelling", lambda: 0)() == 0

        asyncio.run(main())

    def test_silent_health_is_a_result(self) -> None:
        async def main() -> Health:
            async with graftage.connect_async(Silent(), model=MODEL) as llm:
                return await llm.health(timeout=0.01)

        health = asyncio.run(main())
        assert not health.ok
        assert isinstance(health.error, ProviderTimeout)


@pytest.mark.parametrize("settings", [{"api_key": "canary-in-the-key"}, {"headers": {"X-A": "canary-in-the-key"}}])
def test_echoed_key_stays_out_of_errors(both: Any, settings: dict[str, Any]) -> None:
    key = "canary-in-the-key"
    refusal = RequestRejected(f"bad header {key}", hint=key, details={"server_message": f"Bearer {key}", "n": [key]})
    llm = both.connect(Echo([refusal]), model=MODEL, **settings)
    with pytest.raises(RequestRejected) as caught:
        llm.chat("x")
    assert key not in str(caught.value) + repr(caught.value) + str(caught.value.to_dict())


def test_stats_count_calls_and_tokens(both: Any) -> None:
    llm = both.connect(Echo(["a b", InferenceFailed("no")]), model=MODEL)
    llm.chat("one two three")
    with pytest.raises(InferenceFailed):
        llm.chat("x")
    stats = llm.stats()
    assert (stats.calls, stats.failures, stats.running, stats.retries) == (2, 1, 0, 0)
    assert (stats.input_tokens, stats.output_tokens, stats.active_adapter) == (3, 2, None)


def test_both_clients_have_the_same_names() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(graftage.Client) == public(graftage.AsyncClient)


class HostError(Exception):
    """The host's error."""

    def __init__(self, error: GraftageError) -> None:
        super().__init__(str(error))
        self.error = error


class Incomplete(Echo):
    """A provider whose connection lacks required hooks."""

    @hookimpl
    def connect(self, request: Any) -> object:
        return Capabilities(features=frozenset())


class Failing(Echo):
    """A provider that fails to connect."""

    @hookimpl
    def connect(self, request: Any) -> object:
        raise ValueError("burst")


WITHOUT_ASYNCIO: dict[str, Callable[[Any], Any]] = {
    "chat": lambda llm: llm.chat("x"),
    "stream": lambda llm: llm.chat("x", stream=True),
    "embed": lambda llm: llm.embed("x"),
    "models": lambda llm: llm.models(),
    "enter": lambda llm: llm.__aenter__(),
    "close": lambda llm: llm.close(),
}


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
            both.connect(Failing(), model=MODEL).chat("x")
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
            (PluginLoadError, [Incomplete()], {}),
            (GraftageError, [Failing()], {}),
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
