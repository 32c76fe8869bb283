"""Providers are recorded at the call, and replayed without them."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from giving import Giving
from plain import LoopedEcho, PlainEcho

import graftage
from graftage import exceptions
from graftage.calls import Call, LoadAdapterRequest
from graftage.exceptions import (
    AdapterError,
    AdapterUnsupported,
    ConnectionFailed,
    GraftageError,
    InferenceFailed,
    ModelLoadFailed,
    ModelNotFound,
    Overloaded,
    PluginLoadError,
    ProviderError,
    ProviderNotFound,
    ProviderTimeout,
    ResourceLimitExceeded,
    SettingsError,
    StreamInterrupted,
)
from graftage.hookspecs import hookimpl
from graftage.settings import Settings
from graftage.testing import Cassette, CassetteError, CassetteMiss, Echo, Replay, replaying, rerun
from graftage.testing._records import ANSWERS, answer_of, line_of, request_body
from graftage.types import (
    Chunk,
    Embeddings,
    Health,
    Image,
    LoadedAdapter,
    LoadedModel,
    Logprob,
    ModelInfo,
    PullProgress,
    Ranked,
    Ranking,
    Reply,
    Timings,
    ToolCall,
    Usage,
    Verdict,
    Warmed,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from graftage.testing.both import Both
    from graftage_ollama.testing import FakeOllama


def named(name: str, echo: Echo) -> Giving:
    """Return a provider of another name; nothing of that name is installed."""
    return Giving(lambda request: echo.connect(request), name)  # noqa: PLW0108 - a hook would be marked


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "chat": lambda llm: llm.chat("Hi there"),
    "stream": lambda llm: [each.text for each in llm.chat("Hi there", stream=True)],
    "generate": lambda llm: llm.generate("Hi"),
    "embed": lambda llm: llm.embed(["a", "b"]).vectors,
    "rerank": lambda llm: llm.rerank("a", ["b", "a"]).results,
    "count_tokens": lambda llm: llm.count_tokens("a b c"),
    "list_models": lambda llm: llm.models(),
    "show_model": lambda llm: llm.show(),
    "loaded_models": lambda llm: llm.loaded(),
    "pull_model": lambda llm: llm.pull("new"),
    "load_model": lambda llm: llm.load(),
    "unload_model": lambda llm: llm.unload(),
    "delete_model": lambda llm: llm.delete("new"),
    "health": lambda llm: llm.health().version,
    "capabilities": lambda llm: llm.capabilities(),
    "address": lambda llm: llm.address,
}


def outcome(of: Any) -> Any:
    """Return a result without what the clock says."""
    return replace(of, timings=Timings()) if isinstance(of, Reply) else of


def results(llm: Any) -> dict[str, Any]:
    return {name: outcome(ask(llm)) for name, ask in OPERATIONS.items()}


def recorded(path: Path, provider: object, use: Callable[[Any], Any] = lambda llm: llm.chat("Hi"), **more: Any) -> Any:
    """Record what is done with a client; return the result."""
    with Cassette(path, mode="all") as cassette, graftage.connect(Replay(cassette, provider), model="m", **more) as llm:
        return use(llm)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "calls.yaml"


# --- Replay ----------------------------------------------------------------------------------------------------------


class TestReplay:
    @pytest.mark.parametrize("kind", [Echo, PlainEcho, LoopedEcho])
    def test_replays_what_every_hook_answered(self, both: Both, path: Path, kind: Any) -> None:
        with Cassette(path, mode="all") as cassette:
            live = results(both.connect(Replay(cassette, kind()), model="m"))
            both.close_clients()
        cassette = Cassette(path)
        replayed = results(both.connect(Replay(cassette), model="m"))
        assert replayed == live
        assert cassette.unplayed == ()
        assert not any(each.stopped or each.fault for each in cassette.interactions)

    def test_one_file_serves_both_clients(self, both: Both, path: Path) -> None:
        live = recorded(path, Echo(), results)
        assert results(both.connect(Replay(path), model="m")) == live

    def test_provider_need_not_be_installed(self, both: Both, path: Path) -> None:
        recorded(path, named("elsewhere", Echo()))
        for provider in (Replay(path), Replay(path, "elsewhere")):
            with both.connect(provider, model="m") as llm:
                reply = llm.chat("Hi")
            assert (reply.text, reply.provider) == ("Hi", "elsewhere")

    def test_provider_by_name_is_recorded(self, both: Both, path: Path, fake: FakeOllama) -> None:
        live = recorded(path, "ollama", lambda llm: llm.chat("Hi", model="smollm2:135m"), host=fake.url)
        with both.connect(Replay(path), model="smollm2:135m") as llm:
            assert outcome(llm.chat("Hi")) == outcome(live)

    def test_hooks_that_lack_stay_lacking(self, path: Path) -> None:
        recorded(path, Echo(without=["embed"]))
        with (
            graftage.connect(Replay(path), model="m") as llm,
            pytest.raises(exceptions.CapabilityUnsupported, match="embed"),
        ):
            llm.embed("x")

    def test_settings_of_the_provider_are_accepted(self, path: Path) -> None:
        class Own(Settings):
            layers: int = 0

        class Provider(Echo):
            @hookimpl
            def settings_model(self) -> type[Own]:
                return Own

        recorded(path, Provider(), layers=3)
        with graftage.connect(Replay(path), model="m", layers=3) as llm:
            assert llm.chat("Hi").text == "Hi"
        with pytest.raises(SettingsError, match="layerz"):
            graftage.connect(Replay(path), layerz=3)

    def test_default_model_is_recorded(self, path: Path) -> None:
        def connect(request: Any) -> Any:
            connection: Any = Echo().connect(request)
            connection.default_model = "small"
            return connection

        with Cassette(path, mode="all") as cassette:
            graftage.connect(Replay(cassette, Giving(connect))).close()
        assert graftage.connect(Replay(path)).model == "small"

    def test_stopped_reader_is_noted(self, both: Both, path: Path) -> None:
        def begin(llm: Any) -> str:
            with llm.chat("one two three", stream=True) as stream:
                return str(next(stream).text)

        with Cassette(path, mode="all") as cassette:
            assert begin(both.connect(Replay(cassette, Echo()), model="m")) == "one "
            both.close_clients()
        assert [each.stopped for each in Cassette(path).interactions] == [False, True]
        assert begin(both.connect(Replay(path), model="m")) == "one "

    def test_lines_are_found_in_any_pieces(self, path: Path) -> None:
        recorded(path, Echo(["one two three"]))
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("two ", "2 "), encoding="utf-8")  # The lengths of the pieces no longer fit.
        with graftage.connect(Replay(path), model="m") as llm:
            assert llm.chat("Hi").text == "one 2 three"

    def test_lost_adapter_is_loaded_again(self, both: Both, path: Path) -> None:
        class Finds:
            name = "finds"

            @hookimpl
            def resolve_adapter(self) -> Any:
                found = Scion()
                found.gguf = str  # type: ignore[attr-defined] # never called
                return found

        def ask(*arguments: Any) -> str:
            llm = both.connect(Replay(*arguments), model="m", plugins=[Finds()])
            reply = llm.chat("Hi", adapter="botany")
            both.close_clients()
            return f"{reply.text} {reply.adapter} {reply.model}"

        with Cassette(path, mode="all") as cassette:
            live = ask(cassette, Echo([AdapterError("It was lost.", retryable=True), "Hello!"]))
        assert (ask(Cassette(path)), live) == (live, "Hello! botany m+botany")

    def test_images_and_adapters_are_named(self, path: Path) -> None:
        def ask(llm: Any) -> None:
            llm.chat("Look", images=[Image(data=b"\x89PNG secret pixels", media_type="image/png")])

        recorded(path, Echo(), ask)
        text = path.read_text(encoding="utf-8")
        assert "sha256" in text
        assert "pixels" not in text
        with graftage.connect(Replay(path), model="m") as llm:
            ask(llm)
            with pytest.raises(CassetteMiss, match="sha256"):
                llm.chat("Look", images=[Image(data=b"\x89PNG other")])

    def test_wrong_answer_blames_the_provider(self, path: Path) -> None:
        class Wrong:
            @hookimpl
            def chat(self, request: Any) -> Any:
                yield "no chunk"

        with pytest.raises(ProviderError, match="`chat` with str instead of Chunk"):
            recorded(path, Giving(lambda _: Wrong()))

    def test_file_of_several_needs_a_name(self, path: Path) -> None:
        with Cassette(path, mode="all") as cassette:
            for name in ("one", "two"):
                with graftage.connect(Replay(cassette, named(name, Echo())), model="m") as llm:
                    llm.chat(f"I am {name}")
        with pytest.raises(CassetteError, match="several providers: one, two"):
            Replay(path)
        with graftage.connect(Replay(path, "two"), model="m") as llm:
            assert llm.chat("I am two").text == "I am two"
            with pytest.raises(CassetteMiss):
                llm.chat("I am one")

    def test_missing_provider_is_reported(self, path: Path) -> None:
        with pytest.raises(ProviderNotFound, match="nosuch"), Cassette(path, mode="all") as cassette:
            graftage.connect(Replay(cassette, "nosuch"))


class TestCassetteOfCalls:
    def test_near_miss_names_what_differs(self, both: Both, path: Path) -> None:
        recorded(path, Echo(), lambda llm: llm.chat("Tell me a story", options={"seed": 1}))
        with both.connect(Replay(path), model="m") as llm, pytest.raises(CassetteMiss) as caught:
            llm.chat("Tell me a joke", options={"seed": 1})
        assert "POST" in str(caught.value)
        assert "/chat" in str(caught.value)
        assert "Tell me a story" in str(caught.value)
        assert "seed" not in str(caught.value)

    def test_secret_is_not_written(self, path: Path) -> None:
        key = "a-key-of-the-settings-8472"
        with pytest.raises(CassetteError, match="was not written"):
            recorded(path, Echo(), lambda llm: llm.chat(f"My key is {key}"), api_key=key)
        assert not path.exists()

    def test_once_records_then_replays(self, path: Path) -> None:
        for script in (["first"], []):
            echo = Echo(script)
            with Cassette(path, mode="once") as cassette, graftage.connect(Replay(cassette, echo), model="m") as llm:
                assert llm.chat("Hi").text == "first"
        assert echo.calls == []

    def test_new_episodes_adds_the_rest(self, path: Path) -> None:
        recorded(path, Echo(["first"]))
        echo = Echo(["second"])
        with (
            Cassette(path, mode="new_episodes") as cassette,
            graftage.connect(Replay(cassette, echo), model="m") as llm,
        ):
            assert [llm.chat(each).text for each in ("Hi", "And?")] == ["first", "second"]
        assert len(Cassette(path)) == 3

    def test_chats_may_match_by_meaning(self, path: Path) -> None:
        recorded(path, Echo(), lambda llm: llm.chat("Hi", keep_alive=60))
        cassette = Cassette(path, match_on=("method", "host", "path", "chat"))
        with graftage.connect(Replay(cassette), model="m") as llm:
            assert llm.chat("Hi", keep_alive=90).text == "Hi"


# --- Errors ----------------------------------------------------------------------------------------------------------


ERRORS = [
    ModelNotFound("no", hint="pull", suggestions=["a", "b"], status=404, details={"server_message": "x"}),
    ProviderTimeout("late", phase="first_token"),
    ModelLoadFailed("full", reason="memory"),
    Overloaded("busy", retry_after=2.5),
    InferenceFailed("bad", retryable=True, partial=Reply(text="a", raw={"b": 1})),
    SettingsError("wrong", key="host", source="argument"),
    PluginLoadError("broken", plugin="x", distributions=["x 1"]),
    AdapterUnsupported("none", reference="r", reasons=["a"]),
    ResourceLimitExceeded("much", limit="context_window", value=4096, plugin="m4", reason="memory"),
]


class TestErrors:
    @pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
    def test_error_keeps_its_class_and_facts(self, error: GraftageError) -> None:
        with pytest.raises(type(error)) as caught:
            answer_of(line_of(error), Chunk)
        assert (type(caught.value), vars(caught.value)) == (type(error), vars(error))

    def test_every_class_of_the_tree_is_rebuilt(self) -> None:
        needed = {"phase": "total", "reason": "memory", "limit": "x"}
        for name in exceptions.__all__:
            kind: Any = getattr(exceptions, name)
            names = kind.__init__.__code__.co_varnames
            error = kind("why", **{key: value for key, value in needed.items() if key in names})
            with pytest.raises(GraftageError) as caught:
                answer_of(line_of(error), Chunk)
            assert (type(caught.value), str(caught.value)) == (kind, "why")

    def test_error_is_raised_where_it_was(self, both: Both, path: Path) -> None:
        script: list[Any] = [[Chunk(text="Hel"), StreamInterrupted("cut", hint="Ask again.")], ConnectionFailed("gone")]

        def use(llm: Any) -> None:
            with pytest.raises(StreamInterrupted, match="cut") as caught:
                llm.chat("Hi")
            assert caught.value.partial is not None
            assert caught.value.partial.text == "Hel"
            with pytest.raises(ConnectionFailed, match="gone"):
                llm.chat("Hi")

        with Cassette(path, mode="all") as cassette:
            use(both.connect(Replay(cassette, Echo(script)), model="m"))
            both.close_clients()
        use(both.connect(Replay(path), model="m"))

    def test_own_class_becomes_its_nearest(self) -> None:
        class Odd(ModelNotFound):
            pass

        with pytest.raises(ModelNotFound) as caught:
            answer_of(line_of(Odd("no")), Chunk)
        assert type(caught.value) is ModelNotFound

    def test_foreign_error_keeps_its_cause_while_recording(self, path: Path) -> None:
        class Bug:
            @hookimpl
            def chat(self, request: Any) -> Any:
                raise KeyError("x")

        def use(llm: Any) -> BaseException | None:
            with pytest.raises(ProviderError, match="KeyError in `chat`") as caught:
                llm.chat("Hi")
            return caught.value.__cause__

        assert isinstance(recorded(path, Giving(lambda _: Bug()), use), KeyError)
        with graftage.connect(Replay(path), model="m") as llm:
            assert use(llm) is None


# --- Records ---------------------------------------------------------------------------------------------------------


CALL = ToolCall(name="look", arguments={"deep": [1, {"a": None}]}, id="1")
MODEL = ModelInfo(
    name="m:1",
    modified_at=datetime(2026, 1, 2, tzinfo=UTC),
    features=frozenset({"chat", "tools"}),
    adapters=("sha256:ab",),
    metadata={"list": [1, 2]},
    tensors={"a": (1, 2)},
)
RECORDS: list[Any] = [
    Chunk(text="grüß\u2028\x85\ud800 🌱", tool_calls=(CALL,), logprobs=(Logprob(token="a", logprob=float("-inf")),)),
    Chunk(finish_reason="", usage=Usage(input_tokens=1), timings=Timings(total=0.5), warnings=("w",), raw={"a": [1]}),
    PullProgress(status="pulling", total=10, completed=5),
    Warmed(tokens=10, cached_tokens=5, saved=100),
    MODEL,
    LoadedModel(name="m", expires_at=datetime(2026, 1, 2, tzinfo=UTC)),
    Embeddings(vectors=[[0.1, 1e-9], [2.0, 3.0]], usage=Usage(input_tokens=3)),
    Ranking(results=(Ranked(index=1, score=0.5), Ranked(index=0, score=-1.0))),
    LoadedAdapter(name="a", digest="sha256:ab", model="m", scale=2.0),
    5,
    None,
]


class Scion:
    name, digest, scale, served_as = "botany", "sha256:ab", 2.0, None
    verdict = Verdict(status="compatible")


class TestRecords:
    @pytest.mark.parametrize("adapter", [Scion(), LoadedAdapter(name="botany", digest="sha256:ab", model="m+1")])
    def test_adapter_is_named_in_a_request(self, adapter: Any) -> None:
        request = LoadAdapterRequest(call=Call(), adapter=adapter, model="m", others=lambda: ())
        body = json.loads(request_body(request))
        assert body == {"adapter": {"name": "botany", "digest": "sha256:ab"}, "model": "m"}

    @pytest.mark.parametrize("record", RECORDS, ids=lambda each: type(each).__name__)
    def test_record_survives_its_line(self, record: Any) -> None:
        line = line_of(record)
        assert line.count(b"\n") == 1
        assert answer_of(line, type(record)) == record

    def test_health_survives_with_its_error(self) -> None:
        health = Health(level="api", reachable=False, error=ConnectionFailed("gone", hint="Start it."))
        found = answer_of(line_of(health), Health)
        assert (type(found.error), str(found.error)) == (ConnectionFailed, "gone Start it.")
        assert replace(found, error=None) == replace(health, error=None)

    def test_later_fields_are_ignored(self) -> None:
        assert answer_of(b'{"text": "a", "colour": "blue"}', Chunk) == Chunk(text="a")

    @pytest.mark.parametrize(
        "line",
        [
            b"",
            b"{",
            b"[]",
            b'{"text": 3}',
            b'{"raised": []}',
            b'{"raised": {"error": "GraftageErr"}}',
            b'{"raised": {"error": "annotations"}}',
            b'{"raised": {"error": "ProviderTimeout", "message": "x"}}',
            b"[" * 100_000,
        ],
    )
    def test_odd_line_is_refused(self, line: bytes) -> None:
        with pytest.raises(CassetteError, match="not valid"):
            answer_of(line, Chunk)

    def test_every_kind_of_answer_is_tried(self) -> None:
        assert {type(each) for each in RECORDS} | {Health} == set(ANSWERS.values())


# --- Everywhere ------------------------------------------------------------------------------------------------------


class TestReplaying:
    def test_code_that_connects_itself_is_replayed(self, both: Both, path: Path, fake: FakeOllama) -> None:
        def host(url: str) -> str:
            with both.connect("ollama", model="smollm2:135m", host=url) as llm:
                return str(llm.chat("Hi").text)

        with Cassette(path, mode="all") as cassette, replaying(cassette):
            live = host(fake.url)
        asked = len(fake.requests)
        cassette = Cassette(path)
        with replaying(cassette):
            assert host("http://nowhere.invalid:1") == live
        assert (cassette.unplayed, len(fake.requests)) == ((), asked)
        assert host(fake.url) == live
        assert len(fake.requests) > asked

    def test_threads_of_the_host_are_replayed(self, path: Path) -> None:
        recorded(path, named("elsewhere", Echo(["Hello"])))
        said = []

        def host() -> None:
            with graftage.connect("elsewhere", model="m") as llm:
                said.append(llm.chat("Hi").text)

        with replaying(Cassette(path)):
            thread = threading.Thread(target=host)
            thread.start()
            thread.join()
        assert said == ["Hello"]

    def test_chain_replays_its_fallback(self, both: Both, path: Path) -> None:
        def host(*chain: object) -> Any:
            with both.connect(list(chain), model="m") as llm:
                return llm.chat("Hi")

        down, up = named("down", Echo([ConnectionFailed("gone")])), named("up", Echo())
        with Cassette(path, mode="all") as cassette, replaying(cassette):
            live = host(down, up)
        cassette = Cassette(path)
        with replaying(cassette):
            assert outcome(host("down", "up")) == outcome(live)
        assert (live.provider, cassette.unplayed) == ("up", ())

    def test_auto_takes_the_recorded_provider(self, both: Both, path: Path, fake: FakeOllama) -> None:
        with Cassette(path, mode="all") as cassette, replaying(cassette):
            live = both.connect(host=fake.url).chat("Hi")
            both.close_clients()
        cassette = Cassette(path)
        with replaying(cassette):
            assert outcome(both.connect(host=fake.url).chat("Hi")) == outcome(live)
        assert (live.provider, cassette.unplayed) == ("ollama", ())

    def test_miss_is_kept_though_code_swallows_it(self, path: Path) -> None:
        recorded(path, Echo())
        cassette = Cassette(path)
        with replaying(cassette), graftage.connect("echo", model="m") as llm, pytest.raises(CassetteMiss):
            llm.chat("Bye")
        assert [type(each) for each in cassette.misses] == [CassetteMiss]


# --- Again -----------------------------------------------------------------------------------------------------------


class TestRerun:
    def test_changes_are_named(self, path: Path) -> None:
        def use(llm: Any) -> None:
            llm.chat("Same")
            llm.chat("Other", max_tokens=9)
            llm.generate("Fail")

        recorded(path, Echo(), use)
        now = Echo(["Same", ToolCall(name="look", arguments={}, id="7"), ConnectionFailed("gone")])
        with graftage.connect(now, model="new") as llm:
            same, other, failed = rerun(path, llm)
        assert (same.changes, str(same)) == ({}, 'chat "Same": the same')
        assert set(other.changes) == {"text", "tool_calls", "finish_reason", "usage"}
        assert other.changes["tool_calls"] == ([], [("look", {})])
        assert 'text: "" (was "Other")' in str(other)
        assert (failed.operation, failed.changes) == ("generate", {"error": (None, "ConnectionFailed: gone")})
        assert [each.model for each in now.requests] == ["new"] * 3
        assert now.requests[1].max_tokens == 9

    def test_recorded_model_is_asked_by_default(self, path: Path) -> None:
        recorded(path, Echo())
        echo = Echo()
        with graftage.connect(echo) as llm:
            assert [each.changes for each in rerun(path, llm)] == [{}]
        assert echo.requests[-1].model == "m"

    def test_pictures_cannot_be_asked_again(self, path: Path) -> None:
        recorded(path, Echo(), lambda llm: llm.chat("Look", images=[b"\x89PNG\r\n\x1a\n"]))
        echo = Echo()
        with graftage.connect(echo, model="m") as llm:
            (one,) = rerun(path, llm)
        assert "pictures" in str(one.now)
        assert echo.requests == []

    def test_cassette_of_http_is_refused(self, path: Path, fake: FakeOllama) -> None:
        with (
            Cassette(path, mode="all") as cassette,
            graftage.connect("ollama", model="smollm2:135m", host=fake.url, transport=cassette) as llm,
        ):
            llm.chat("Hi")
        with graftage.connect(Echo(), model="m") as llm, pytest.raises(CassetteError, match="no `chat`"):
            list(rerun(path, llm))


# --- The fixture -----------------------------------------------------------------------------------------------------


HOST = """
import graftage
from graftage.testing import Echo

def tell(topic):
    with graftage.connect(Echo(["Once upon a time"]), model="m") as llm:
        return llm.chat(f"A story about {topic}").text
"""
SUITE = """
from host import tell

def test_story(replay):
    assert tell("TOPIC") == "Once upon a time"
"""


class TestFixture:
    @pytest.fixture
    def suite(self, outer: pytest.Pytester) -> pytest.Pytester:
        """A test of an application, recorded."""
        outer.makepyfile(host=HOST, test_it=SUITE.replace("TOPIC", "foxes"))
        outer.runpytest("--record-mode=once").assert_outcomes(passed=1)
        outer.makepyfile(host=HOST.replace('["Once upon a time"]', ""))  # It would repeat what it is asked.
        return outer

    def test_test_replays_what_it_recorded(self, suite: pytest.Pytester) -> None:
        suite.runpytest().assert_outcomes(passed=1)

    def test_changed_prompt_names_the_nearest(self, suite: pytest.Pytester) -> None:
        suite.makepyfile(test_it=SUITE.replace("TOPIC", "hens"))
        done = suite.runpytest()
        done.assert_outcomes(failed=1, errors=1)
        done.stdout.fnmatch_lines(["*recorded*A story about foxes*A story about hens*"])

    def test_swallowed_miss_fails_the_test(self, suite: pytest.Pytester) -> None:
        suite.makepyfile(
            test_it="""
            import contextlib
            from host import tell

            def test_story(replay):
                tell("foxes")
                with contextlib.suppress(Exception):
                    tell("hens")
            """
        )
        suite.runpytest().assert_outcomes(passed=1, errors=1)

    def test_unplayed_call_fails_the_test(self, suite: pytest.Pytester) -> None:
        suite.makepyfile(test_it="def test_story(replay):\n    pass\n")
        done = suite.runpytest()
        done.assert_outcomes(passed=1, errors=1)
        done.stdout.fnmatch_lines(["*was not fully played: POST /connect, POST /chat*"])
