"""Which provider is used: `auto` and fallback chains."""

from __future__ import annotations

import pickle
import re
import time
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import SecretStr

import graftage
from graftage.exceptions import (
    AdapterIncompatible,
    AdapterInvalid,
    AdapterNotFound,
    AdapterUnsupported,
    AuthenticationFailed,
    CapabilityUnsupported,
    ConnectionFailed,
    ContextOverflow,
    GraftageError,
    InferenceFailed,
    ModelLoadFailed,
    ModelNotFound,
    Overloaded,
    PluginError,
    PluginLoadError,
    ProtocolError,
    ProviderError,
    ProviderNotFound,
    ProviderTimeout,
    QuotaExceeded,
    RequestRejected,
    ResourceLimitExceeded,
    SettingsError,
    StreamInterrupted,
)
from graftage.hookspecs import hookimpl
from graftage.settings import Settings
from graftage.testing import Cassette, Echo, Pause
from graftage.types import AdapterInfo, Chunk, ModelInfo, Timeouts, Verdict
from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

MODEL = "m:1"
DEAD = "http://127.0.0.1:9"
"""An address where nothing listens: the discard port."""
EMBEDDED = """
from graftage.hookspecs import hookimpl
from graftage.testing import Echo

class Embedded(Echo):
    name = "llamacpp"

    @hookimpl
    def answers(self):
        return {"llamacpp": 10, "ollama": 20}[self.name]

it = Embedded(["the embedded one answers"] * 4, models=["small:1b"])
"""


@pytest.fixture
def ollama(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOllama]:
    """An Ollama server where `auto` looks for it."""
    with FakeOllama(models=["smollm2:135m", "qwen:0.5b"], reply="the server answers") as fake:
        monkeypatch.setenv("OLLAMA_HOST", fake.url)
        yield fake


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Ollama server where `auto` looks for one."""
    monkeypatch.setenv("OLLAMA_HOST", DEAD)


@pytest.fixture
def embedded(site: Any) -> Any:
    """A stand-in for the embedded provider. It shadows the real one if that is installed."""
    site.add(
        "graftage-llamacpp", version="0.1.0", providers={"llamacpp": "embedded:it"}, modules={"embedded": EMBEDDED}
    )
    return site


class TestAuto:
    @pytest.mark.parametrize("provider", [None, "auto"])
    def test_takes_the_server_first(self, both: Any, ollama: Any, embedded: Any, provider: Any) -> None:
        llm = both.opened(provider)
        assert llm.chat("x").text == "the server answers"
        assert llm.provider == "ollama"

    def test_takes_the_server_with_the_model(self, both: Any, ollama: Any, embedded: Any) -> None:
        llm = both.opened(model="qwen:0.5b")
        assert (llm.provider, llm.chat("x").model) == ("ollama", "qwen:0.5b")

    @pytest.mark.usefixtures("ollama", "embedded")
    def test_missing_model_is_an_error(self, both: Any) -> None:
        with pytest.raises(ModelNotFound, match=r"graftage models pull qwen:0\.6b"):
            both.opened(model="qwen:0.6b").chat("x")

    @pytest.mark.usefixtures("embedded")
    def test_close_names_are_suggested(self, both: Any, ollama: Any) -> None:
        with pytest.raises(ModelNotFound, match=r"Did you mean `qwen:0\.5b`") as caught:
            both.opened(model="qwen:0.6b").chat("x")
        assert caught.value.suggestions == ("qwen:0.5b",)

    def test_missing_model_can_be_pulled(self, both: Any, ollama: Any) -> None:
        llm = both.opened(model="new:1b")
        llm.pull()
        assert (llm.provider, "new:1b" in ollama.models) == ("ollama", True)

    @pytest.mark.usefixtures("no_server", "embedded")
    def test_falls_back_to_the_embedded(self, both: Any) -> None:
        llm = both.opened(model="small:1b")
        assert llm.chat("x").text == "the embedded one answers"
        assert llm.provider == "llamacpp"

    @pytest.mark.usefixtures("embedded")
    def test_empty_server_names_pull(self, both: Any, monkeypatch: Any) -> None:
        with FakeOllama(models=[]) as empty:
            monkeypatch.setenv("OLLAMA_HOST", empty.url)
            with pytest.raises(RequestRejected, match=r"No model is chosen.*graftage models pull"):
                both.opened().chat("x")


GIVEN: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "an argument": ({"host": DEAD}, {}),
    "the mapping": ({"settings": {"host": DEAD}}, {}),
    "a table of the mapping": ({"settings": {"ollama": {"host": DEAD}}}, {}),
    "a variable": ({}, {"GRAFTAGE_HOST": DEAD}),
}


class TestAutoHost:
    @pytest.mark.usefixtures("embedded", "ollama")
    @pytest.mark.parametrize("how", GIVEN)
    def test_named_dead_server_is_an_error(self, both: Any, monkeypatch: Any, how: str) -> None:
        given, environment = GIVEN[how]
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:9"):
            both.opened(**given)

    @pytest.mark.usefixtures("embedded")
    def test_remote_ollama_host_is_skipped(self, both: Any, monkeypatch: Any) -> None:
        monkeypatch.setenv("OLLAMA_HOST", "gpu.example:11434")
        assert both.opened(model="small:1b").provider == "llamacpp"

    @pytest.mark.usefixtures("embedded")
    def test_named_remote_server_is_asked(self, both: Any) -> None:
        with pytest.raises(ProviderError, match=r"NetworkRefused"):
            both.opened(host="gpu.example:11434")

    def test_error_names_installed_providers(self, both: Any, monkeypatch: Any) -> None:
        monkeypatch.setenv("GRAFTAGE_DISABLED_PLUGINS", "llamacpp,lora,m4")
        monkeypatch.setenv("OLLAMA_HOST", "gpu.example:11434")
        with pytest.raises(ProviderNotFound, match=r"Name one.*`ollama`"):
            both.opened()


RANKED = """
from graftage.hookspecs import hookimpl
from graftage.testing import Echo

class Ranked(Echo):
    name = "oak"

    @hookimpl
    def answers(self, request):
        return RANK

it = Ranked(["the oak answers"] * 4, models=["acorn:1b"])
"""


class TestAutoRank:
    @pytest.mark.usefixtures("embedded", "ollama")
    @pytest.mark.parametrize(("rank", "taken"), [("30", "oak"), ("1", "ollama"), ("None", "ollama")])
    def test_highest_is_taken(self, both: Any, site: Any, rank: str, taken: str) -> None:
        site.add("graftage-oak", providers={"oak": "oak:it"}, modules={"oak": RANKED.replace("RANK", rank)})
        assert both.opened().provider == taken

    @pytest.mark.usefixtures("embedded", "ollama")
    def test_invalid_one_is_left_out(self, both: Any, site: Any) -> None:
        site.add("graftage-oak", providers={"oak": "oak:it"}, modules={"oak": RANKED.replace("RANK", "'first'")})
        llm = both.opened()
        assert llm.provider == "ollama"
        assert "`oak` cannot be taken" in llm.origins["provider"]

    @pytest.mark.usefixtures("embedded")
    def test_own_settings_reach_their_provider(self, both: Any, ollama: Any) -> None:
        assert both.opened(merge_adapters=True).provider == "ollama"
        with pytest.raises(SettingsError, match="merge_adaptors"):
            both.opened(merge_adaptors=True)


EMBEDDING = """
from graftage.types import LoadedModel, ModelInfo

it = Embedded(models=[
    ModelInfo(name="small:1b", features=frozenset({"chat"})),
    ModelInfo(name="with-adapter:1b", features=frozenset({"chat"}), adapters=("sha256:1",)),
    ModelInfo(name="vectors:1b", features=frozenset({"embed"})),
])
for name in ("vectors:1b", "with-adapter:1b"):
    it.loaded[name] = LoadedModel(name=name)
"""


class TestAutoModel:
    def test_loaded_one_is_preferred(self, both: Any, ollama: Any) -> None:
        ollama.loaded.append("qwen:0.5b")
        assert both.opened().model == "qwen:0.5b"

    def test_otherwise_any_is_taken(self, both: Any, ollama: Any) -> None:
        assert both.opened().model in ollama.models

    @pytest.mark.parametrize("without", ["loaded_models", "show_model", "list_models"])
    def test_server_may_not_say_what_it_has(self, both: Any, without: str) -> None:
        refusal = CapabilityUnsupported("This server cannot say it.")
        llm = both.opened("auto", plugins=[Able({"m:1": None}, errors={without: refusal})])
        assert (llm.provider, llm.model) == ("able", None if without == "list_models" else "m:1")

    @pytest.mark.usefixtures("no_server")
    def test_must_chat_without_adapter(self, both: Any, site: Any) -> None:
        site.add("graftage-llamacpp", providers={"llamacpp": "stand_in:it"}, modules={"stand_in": EMBEDDED + EMBEDDING})
        assert both.opened().model == "small:1b"

    def test_derived_one_is_never_taken(self, both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        derived = "graftage-lora/smollm2-135m:ahoy-e6f3be36d42c"
        with FakeOllama(models=["smollm2:135m", derived]) as fake:
            monkeypatch.setenv("OLLAMA_HOST", fake.url)
            fake.loaded.append(derived)
            assert both.opened().model == "smollm2:135m"
            fake.models.remove("smollm2:135m")
            assert derived not in str(both.opened().model)


class TestAutoSkips:
    @pytest.mark.usefixtures("embedded")
    def test_foreign_server(self, both: Any, monkeypatch: Any) -> None:
        page = Answer([b"<html>Welcome to nginx</html>"], headers={"Content-Type": "text/html"}, framing="length")
        with FakeOllama() as fake:
            for path in ("/", "/api/version", "/api/tags", "/api/ps", "/api/show"):
                fake.script(path, *[page] * 5)
            monkeypatch.setenv("OLLAMA_HOST", fake.url)
            assert both.opened(model="small:1b").provider == "llamacpp"

    @pytest.mark.usefixtures("embedded")
    def test_disabled_provider(self, both: Any, monkeypatch: Any, ollama: Any) -> None:
        monkeypatch.setenv("GRAFTAGE_DISABLED_PLUGINS", "ollama")
        llm = both.opened()
        assert llm.provider == "llamacpp"
        assert llm.origins["provider"] == "auto: it answers"
        assert ollama.requests == []

    @pytest.mark.usefixtures("embedded")
    def test_broken_provider(self, both: Any, site: Any) -> None:
        site.add("graftage-ollama", providers={"ollama": "ill"}, modules={"ill": "raise OSError('no sap')\n"})
        llm = both.opened()
        assert llm.provider == "llamacpp"
        assert "no sap" in llm.origins["provider"]

    def test_checks_are_short(self, both: Any, site: Any) -> None:
        source = EMBEDDED.replace('"llamacpp"', '"ollama"')
        site.add("graftage-ollama", providers={"ollama": "stand_in:it"}, modules={"stand_in": source})
        both.opened()
        import stand_in  # type: ignore[import-not-found] # importable only in this test

        asked = [(hook, request) for hook, request in stand_in.it.calls if hook not in ("connect", "close")]
        assert [hook for hook, _ in asked] == ["health", "list_models", "loaded_models"]
        assert max(request.call.timeouts.total for _, request in asked) <= 10

    @pytest.mark.usefixtures("no_server")
    def test_no_server_says_what_to_install(self, both: Any, monkeypatch: Any) -> None:
        monkeypatch.setenv("GRAFTAGE_DISABLED_PLUGINS", "llamacpp")
        with pytest.raises(ConnectionFailed, match="install `graftage-llamacpp`, which needs no server"):
            both.opened()

    def test_no_provider_says_what_to_install(self, both: Any, monkeypatch: Any) -> None:
        monkeypatch.setenv("GRAFTAGE_DISABLED_PLUGINS", "llamacpp, ollama,openai")
        with pytest.raises(ProviderNotFound, match="Install `graftage-ollama` or `graftage-llamacpp`"):
            both.opened()

    @pytest.mark.usefixtures("embedded")
    def test_wrong_setting_is_an_error(self, both: Any, monkeypatch: Any) -> None:
        monkeypatch.setenv("OLLAMA_HOST", "ftp://somewhere")
        with pytest.raises(SettingsError):
            both.opened()

    def test_skipped_connection_is_closed(self, both: Any, site: Any, embedded: Any) -> None:
        source = EMBEDDED.replace('name = "llamacpp"', 'name = "ollama"').replace(
            "models=", "errors={'health': OSError('gone')}, models="
        )
        site.add("graftage-ollama", providers={"ollama": "stand_in:it"}, modules={"stand_in": source})
        assert both.opened(model="another:1b").provider == "llamacpp"
        import stand_in  # importable only in this test

        assert stand_in.it.closed


class TestPrecedence:
    @pytest.mark.usefixtures("ollama", "embedded")
    def test_variable_beats_search(self, both: Any, monkeypatch: Any) -> None:
        monkeypatch.setenv("GRAFTAGE_PROVIDER", "llamacpp:small:1b")
        llm = both.opened()
        assert (llm.provider, llm.model) == ("llamacpp", "small:1b")
        assert llm.origins["provider"] == "environment GRAFTAGE_PROVIDER"

    @pytest.mark.usefixtures("ollama", "embedded")
    def test_file_beats_search(self, both: Any, monkeypatch: Any, tmp_path: Path) -> None:
        file = tmp_path / "settings.toml"
        file.write_text('provider = "llamacpp"\nmodel = "small:1b"\n')
        monkeypatch.setenv("GRAFTAGE_CONFIG", str(file))
        llm = both.opened()
        assert (llm.provider, llm.model) == ("llamacpp", "small:1b")
        assert llm.origins == {"provider": str(file), "model": str(file)}

    @pytest.mark.usefixtures("ollama", "embedded")
    def test_variable_beats_file(self, both: Any, monkeypatch: Any, tmp_path: Path) -> None:
        file = tmp_path / "settings.toml"
        file.write_text('provider = "llamacpp"\n')
        monkeypatch.setenv("GRAFTAGE_CONFIG", str(file))
        monkeypatch.setenv("GRAFTAGE_PROVIDER", "ollama")
        assert both.opened(model="qwen:0.5b").provider == "ollama"

    @pytest.mark.usefixtures("ollama", "embedded")
    def test_argument_beats_everything(self, both: Any, monkeypatch: Any) -> None:
        monkeypatch.setenv("GRAFTAGE_PROVIDER", "ollama")
        assert both.opened("llamacpp").provider == "llamacpp"

    @pytest.mark.usefixtures("embedded")
    def test_named_provider_is_not_replaced(self, both: Any, no_server: None) -> None:
        llm = both.opened("ollama", model="small:1b")
        with pytest.raises(ConnectionFailed):
            llm.chat("x")


class TestChoice:
    @pytest.mark.usefixtures("embedded")
    def test_is_made_once(self, both: Any, ollama: Any) -> None:
        llm = both.opened()
        assert llm.chat("x").provider == "ollama"
        checks = [seen.path for seen in ollama.requests if seen.path != "/api/chat"]
        assert llm.chat("x").provider == "ollama"
        assert [seen.path for seen in ollama.requests if seen.path != "/api/chat"] == checks

    @pytest.mark.usefixtures("embedded")
    def test_stays_when_the_server_stops(self, both: Any, monkeypatch: Any) -> None:
        with FakeOllama() as fake:
            monkeypatch.setenv("OLLAMA_HOST", fake.url)
            llm = both.opened()
            assert llm.chat("x").provider == "ollama"
        with pytest.raises(ConnectionFailed):
            llm.chat("x")
        assert llm.provider == "ollama"

    @pytest.mark.usefixtures("embedded")
    def test_stays_when_the_server_returns(self, both: Any, monkeypatch: Any) -> None:
        monkeypatch.setenv("OLLAMA_HOST", DEAD)
        llm = both.opened(model="small:1b")
        with FakeOllama(models=["small:1b"]) as fake:
            monkeypatch.setenv("OLLAMA_HOST", fake.url)
            assert [llm.chat("x").provider, llm.chat("x").provider] == ["llamacpp", "llamacpp"]
            assert fake.requests == []

    def test_waits_for_first_use(self, ollama: Any) -> None:
        llm = graftage.connect()
        graftage.connect_async()
        assert ollama.requests == []
        llm.close()

    def test_first_call_makes_it(self, both: Any, ollama: Any) -> None:
        assert both.connect().chat("x").provider == "ollama"

    @pytest.mark.usefixtures("ollama")
    def test_origins_give_the_reason(self, both: Any) -> None:
        assert both.opened().origins["provider"] == "auto: it answers"

    @pytest.mark.usefixtures("no_server", "embedded")
    def test_origins_explain_the_skipped_server(self, both: Any) -> None:
        llm = both.opened(model="small:1b")
        assert re.search(r"auto: `ollama` cannot be taken: .*127\.0\.0\.1", llm.origins["provider"])

    @pytest.mark.usefixtures("no_server", "embedded")
    def test_origins_omit_skipped_settings(self, both: Any) -> None:
        assert sorted(both.opened(model="small:1b").origins) == ["provider"]


PASSES_ON: list[GraftageError] = [
    AuthenticationFailed("It needs a key."),
    QuotaExceeded("It is used up."),
    ContextOverflow("It is too long."),
    InferenceFailed("It crashed.", status=503, retryable=True),
    ResourceLimitExceeded("It is too much.", limit="context_window"),
    AdapterUnsupported("It takes no adapters."),
    ConnectionFailed("It is gone."),
    Overloaded("It is busy."),
    ModelNotFound("It does not have the model."),
    CapabilityUnsupported("It cannot do that."),
    ProviderTimeout("It was slow.", phase="connect"),
    ProviderTimeout("It was slow.", phase="first_token"),
    ModelLoadFailed("It is too large.", reason="memory"),
    ModelLoadFailed("It has another format.", reason="incompatible"),
    ModelLoadFailed("It crashed.", reason="crashed"),
    ModelLoadFailed("It took too long.", reason="timeout"),
]
STAYS: list[GraftageError] = [
    ProviderTimeout("It stood still.", phase="idle"),
    ProviderTimeout("It took too long.", phase="total"),
    RequestRejected("It refuses."),
    RequestRejected("It refuses.", retryable=True),
    InferenceFailed("It crashed."),
    StreamInterrupted("It was cut."),
    ProtocolError("It sent invalid data."),
    ProviderError("It failed for another reason."),
    AdapterIncompatible("It does not fit."),
    AdapterInvalid("It is broken."),
]


def _id(error: GraftageError) -> str:
    return "-".join(filter(None, [type(error).__name__, getattr(error, "phase", ""), getattr(error, "reason", "")]))


class Second(Echo):
    """An Echo with another name."""

    name = "second"


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "chat": lambda llm: llm.chat("x"),
    "stream": lambda llm: list(llm.chat("x", stream=True)),
    "generate": lambda llm: llm.generate("x"),
    "embed": lambda llm: llm.embed("x"),
}


def failing_with(error: Exception) -> Echo:
    """Return an Echo that raises the error in each operation."""
    return Echo([error], errors={"embed": error})


def copied(error: GraftageError) -> Any:
    """Return a fresh copy, since a raised error gathers facts about its call."""
    return pickle.loads(pickle.dumps(error))


class TestPassingOn:
    @pytest.mark.parametrize("operation", OPERATIONS)
    @pytest.mark.parametrize("error", PASSES_ON, ids=_id)
    def test_these_errors_pass(self, both: Any, error: GraftageError, operation: str) -> None:
        first, second = failing_with(copied(error)), Second()
        OPERATIONS[operation](both.connect([first, second], model=MODEL))
        assert [len([hook for hook, _ in each.calls if hook in (operation, "chat")]) for each in (first, second)] == [
            1,
            1,
        ]

    @pytest.mark.parametrize("operation", OPERATIONS)
    @pytest.mark.parametrize("error", STAYS, ids=_id)
    def test_other_errors_do_not(self, both: Any, error: GraftageError, operation: str) -> None:
        first, second = failing_with(copied(error)), Second()
        with pytest.raises(type(error)):
            OPERATIONS[operation](both.connect([first, second], model=MODEL))
        assert second.requests == []

    def test_tables_name_every_provider_error(self) -> None:
        named = {type(error) for error in [*PASSES_ON, *STAYS]}
        assert {each for each in ProviderError.__subclasses__() if each.__module__ == "graftage.exceptions"} <= named

    def test_foreign_exceptions_do_not(self, both: Any) -> None:
        second = Second()
        with pytest.raises(ProviderError, match="`echo` failed with KeyError"):
            both.connect([failing_with(KeyError("k")), second], model=MODEL).chat("x")
        assert second.requests == []

    def test_missing_operations_pass(self, both: Any) -> None:
        first, second = Echo(without=["embed"]), Second()
        answer = both.connect([first, second], model=MODEL).embed("x")
        assert answer.provider == "second"
        assert (len(first.requests), len(second.requests)) == (0, 1)
        assert re.fullmatch("`echo:m:1` was skipped: .*embed.*", answer.warnings[0])

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("error", [*PASSES_ON, PluginError("It is broken.")], ids=_id)
    def test_nothing_passes_after_a_chunk(self, both: Any, error: GraftageError, stream: bool) -> None:
        first, second = Echo([[Chunk(text="so far "), copied(error)]]), Second()
        llm = both.connect([first, second], model=MODEL)

        def act() -> Any:
            answer = llm.chat("x", stream=stream)
            return list(answer) if stream else answer

        with pytest.raises(type(error)) as caught:
            act()
        if isinstance(caught.value, ProviderError):
            assert caught.value.partial is not None
            assert caught.value.partial.text == "so far "
        assert (llm.stats().calls, llm.stats().running) == (1, 0)
        assert second.requests == []

    def test_empty_streams_do_not(self, both: Any) -> None:
        second = Second()
        with pytest.raises(StreamInterrupted):
            both.connect([Echo([[]]), second], model=MODEL).chat("x")
        assert second.requests == []


class TestSkippedMembers:
    def test_first_able_member_replies(self, both: Any) -> None:
        first, second = Echo(["one"]), Second(["two"])
        reply = both.connect([first, second], model=MODEL).chat("x")
        assert (reply.text, reply.provider, reply.warnings) == ("one", "echo", ())
        assert second.requests == []

    def test_reply_names_them(self, both: Any) -> None:
        class Third(Echo):
            name = "third"

        members = [Echo([ConnectionFailed("It is gone.")]), Second([Overloaded("It is busy.")]), Third(["three"])]
        reply = both.connect(members, model=MODEL).chat("x")
        assert (reply.text, reply.provider) == ("three", "third")
        assert reply.warnings == ("`echo:m:1` was skipped: It is gone.", "`second:m:1` was skipped: It is busy.")

    def test_stream_names_them(self, both: Any) -> None:
        llm = both.connect([Echo([ConnectionFailed("It is gone.")]), Second(["two words"])], model=MODEL)
        stream = llm.chat("x", stream=True)
        assert stream.partial.warnings == ("`echo:m:1` was skipped: It is gone.",)
        assert "".join(chunk.text for chunk in stream) == "two words"
        assert (stream.reply.provider, stream.reply.warnings) == ("second", ("`echo:m:1` was skipped: It is gone.",))

    def test_embeddings_name_them(self, both: Any) -> None:
        answer = both.connect([failing_with(ConnectionFailed("It is gone.")), Second()], model=MODEL).embed(["x", "y"])
        assert (answer.provider, answer.warnings) == ("second", ("`echo:m:1` was skipped: It is gone.",))
        assert len(answer.vectors) == 2

    def test_last_error_names_them(self, both: Any) -> None:
        llm = both.connect([Echo([ConnectionFailed("It is gone.")]), Second([Overloaded("It is busy.")])], model=MODEL)
        with pytest.raises(Overloaded) as caught:
            llm.chat("x")
        assert caught.value.provider == "second"
        assert caught.value.details["skipped"] == ("`echo:m:1` was skipped: It is gone.",)
        assert "Before it: `echo:m:1` was skipped: It is gone." in str(caught.value.hint)

    def test_next_call_tries_them_again(self, both: Any) -> None:
        first, second = Echo([ConnectionFailed("gone"), "back"]), Second(["two"])
        llm = both.connect([first, second], model=MODEL)
        assert [llm.chat("x").provider, llm.chat("x").provider] == ["second", "echo"]


class TestTotalLimit:
    def test_is_shared_by_all_members(self, both: Any) -> None:
        first, second = Echo([[Pause()]]), Second(["two"])
        limits = Timeouts(first_token=0.2, total=30)
        assert both.connect([first, second], model=MODEL).chat("x", timeout=limits).text == "two"
        assert first.requests[0].call.timeouts.total <= 30
        # The first member used 0.2 s of the shared limit.
        assert second.requests[0].call.timeouts.total <= 29.8
        assert second.requests[0].call.timeouts.first_token == 0.2

    def test_ends_the_chain(self, both: Any) -> None:
        second = Second()
        limits = Timeouts(first_token=30, total=0.2)
        with pytest.raises(ProviderTimeout) as caught:
            both.connect([Echo([[Pause()]]), second], model=MODEL).chat("x", timeout=limits)
        assert caught.value.phase == "total"
        assert second.requests == []

    def test_late_error_is_raised(self, both: Any) -> None:
        def late(request: Any) -> Any:
            while time.monotonic() < request.call.deadline:
                time.sleep(0.01)
            raise ConnectionFailed("It is gone.")

        second = Second()
        with pytest.raises(ConnectionFailed):
            both.connect([Echo([late]), second], model=MODEL).chat("x", timeout=0.2)
        assert second.requests == []

    def test_invalid_timeout_is_refused(self, both: Any) -> None:
        first = Echo()
        with pytest.raises(RequestRejected, match="timeout"):
            both.connect([first, Second()], model=MODEL).chat("x", timeout=-1)
        assert first.requests == []


class Fits:
    """An adapter as a resolver returns it."""

    digest = "sha256:0"
    scale = 1.0
    served_as = None
    verdict = Verdict(status="compatible")

    def __init__(self, name: str) -> None:
        self.name = name

    def gguf(self, base: Any) -> Path:
        raise NotImplementedError

    def merge(self, base_file: Path, out: Path, on_progress: Any = None) -> Path:
        raise NotImplementedError


class Resolver:
    """A resolver that finds every adapter but `unknown`, and records who asked."""

    name = "resolver"

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    @hookimpl
    def resolve_adapter(self, request: Any) -> Any:
        self.asked.append((request.provider, request.model))
        return None if request.reference == "unknown" else Fits(request.reference)

    @hookimpl
    def list_adapters(self) -> list[AdapterInfo]:
        return [AdapterInfo(name="bonsai", reference="bonsai")]


class TestChainAdapters:
    @pytest.mark.parametrize("by_call", [True, False])
    def test_are_resolved_for_each_member(self, both: Any, by_call: bool) -> None:
        resolver = Resolver()
        first, second = Echo([ConnectionFailed("gone")]), Second(["two"])
        llm = both.connect([first, second], model=MODEL, plugins=[resolver])
        if by_call:
            reply = llm.chat("x", adapter="bonsai")
        else:
            assert llm.use_adapter("bonsai") is None
            reply = llm.chat("x")
        assert (reply.adapter, reply.model, reply.provider) == ("bonsai", f"{MODEL}+bonsai", "second")
        assert resolver.asked == [("echo", MODEL), ("second", MODEL)]

    def test_unable_member_is_skipped(self, both: Any) -> None:
        first, second = Echo(without=["load_adapter"]), Second(["two"])
        reply = both.connect([first, second], model=MODEL, plugins=[Resolver()]).chat("x", adapter="bonsai")
        assert (reply.provider, reply.adapter) == ("second", "bonsai")

    def test_unknown_one_is_an_error(self, both: Any) -> None:
        first, second = Echo(), Second()
        llm = both.connect([first, second], model=MODEL, plugins=[Resolver()])
        with pytest.raises(AdapterNotFound):
            llm.chat("x", adapter="unknown")
        llm.use_adapter("unknown")
        with pytest.raises(AdapterNotFound):
            llm.chat("x")
        assert first.requests == second.requests == []

    def test_on_missing_allows_the_base(self, both: Any) -> None:
        llm = both.connect([Echo(["base"]), Second()], model=MODEL, plugins=[Resolver()])
        llm.use_adapter("unknown", on_missing="base")
        reply = llm.chat("x")
        assert (reply.text, reply.adapter) == ("base", None)
        assert reply.warnings == ("The adapter `unknown` was not found; the base model answers.",)

    def test_none_means_the_base(self, both: Any) -> None:
        llm = both.connect([Echo(["base"]), Second()], model=MODEL, plugins=[Resolver()])
        llm.use_adapter("bonsai")
        assert llm.stats().active_adapter == "bonsai"
        assert llm.chat("x", adapter=None).adapter is None
        llm.use_adapter(None)
        assert llm.stats().active_adapter is None

    def test_are_listed_once(self, both: Any) -> None:
        llm = both.connect([Echo(), Second()], model=MODEL, plugins=[Resolver()])
        assert [each.name for each in llm.adapters()] == ["bonsai"]


class HostError(Exception):
    """The host's error."""


class TestChain:
    def test_members_have_their_own_models(self, both: Any, ollama: Any) -> None:
        echo = Echo([ModelNotFound("no")])
        llm = both.opened([echo, "ollama:qwen:0.5b"], model=MODEL)
        assert [member.model for member in llm.members] == [MODEL, "qwen:0.5b"]
        assert llm.chat("x").model == "qwen:0.5b"
        assert echo.requests[0].model == MODEL

    def test_members_are_clients(self, both: Any) -> None:
        first, second = Echo(models=["a:1"]), Second(models=["b:1"])
        llm = both.opened([first, second], model=MODEL)
        assert [member.provider for member in llm.members] == ["echo", "second"]
        assert (llm.provider, llm.model) == ("echo, second", MODEL)
        member = llm.members[1]
        models = both.run(member.models()) if both.mode == "async" else member.models()
        assert [each.name for each in models] == ["b:1"]
        assert first.requests == []

    def test_single_client_is_its_member(self) -> None:
        with graftage.connect(Echo(), model=MODEL) as llm:
            assert llm.members == (llm,)

    @pytest.mark.parametrize("method", ["health", "models", "show", "loaded", "pull", "ensure", "load", "unload"])
    def test_single_provider_methods_are_refused(self, both: Any, method: str) -> None:
        first, second = Echo(), Second()
        with pytest.raises(RuntimeError, match="`members`"):
            getattr(both.opened([first, second], model=MODEL), method)()
        assert first.requests == second.requests == []

    def test_members_may_share_a_provider(self, both: Any) -> None:
        first, second = Echo([ConnectionFailed("gone")]), Echo(["two"])
        assert both.connect([first, second], model=MODEL).chat("x").text == "two"

    def test_features_unite_and_options_intersect(self, both: Any) -> None:
        first, second = Echo(without=["embed"]), Second(without=["capabilities"])
        found = both.opened([first, second], model=MODEL).capabilities()
        assert {"embed", "chat", "tools"} <= found.features
        assert found.options == frozenset()

    def test_stats_add_up(self, both: Any) -> None:
        llm = both.connect([Echo([ConnectionFailed("gone")]), Second(["a b"])], model=MODEL)
        llm.chat("x")
        stats = llm.stats()
        assert (stats.calls, stats.failures, stats.running, stats.output_tokens) == (2, 1, 0, 2)

    def test_close_reaches_every_member(self, both: Any) -> None:
        first, second = Echo(errors={"close": OSError("stuck")}), Second()
        llm = both.opened([first, second], model=MODEL)
        with pytest.raises(ProviderError, match="OSError"):
            llm.close()
        assert second.closed
        llm.close()

    def test_failed_opening_closes_earlier_members(self, both: Any) -> None:
        class Bad(Echo):
            name = "bad"

            @hookimpl
            def connect(self, request: Any) -> Any:
                raise OSError("no")

        first = Echo()
        with pytest.raises(PluginLoadError):
            both.opened([first, Bad()], model=MODEL)
        assert first.closed

    def test_empty_one_is_refused(self, both: Any) -> None:
        with pytest.raises(ProviderNotFound, match="empty"):
            both.opened([])

    def test_unknown_member_is_refused_first(self, both: Any) -> None:
        echo = Echo()
        with pytest.raises(ProviderNotFound, match="`nonesuch`"):
            both.opened([echo, "nonesuch:1"], model=MODEL)
        assert echo.connections == []

    def test_final_error_is_translated(self, both: Any) -> None:
        def translate(error: GraftageError) -> Exception:
            return HostError(type(error).__name__)

        members = [Echo([ConnectionFailed("gone")]), Second(["fine", Overloaded("busy")])]
        llm = both.connect([members[0], members[1]], model=MODEL, translate_error=translate)
        assert llm.chat("x").provider == "second"
        members[0].errors["chat"] = ConnectionFailed("gone")
        with pytest.raises(HostError, match="Overloaded") as caught:
            llm.chat("x")
        assert isinstance(caught.value.__cause__, Overloaded)

    def test_stream_error_is_translated(self, both: Any) -> None:
        members = [Echo([ConnectionFailed("gone")]), Second([[Chunk(text="a"), InferenceFailed("fell")]])]
        llm = both.connect(members, model=MODEL, translate_error=lambda error: HostError(type(error).__name__))
        stream = llm.chat("x", stream=True)
        with pytest.raises(HostError, match="InferenceFailed"):
            list(stream)

    @pytest.mark.usefixtures("no_server")
    def test_dead_server_is_skipped(self, both: Any) -> None:
        reply = both.connect(["ollama:smollm2:135m", Echo(["fine"])], model=MODEL).chat("x")
        assert reply.provider == "echo"
        assert re.fullmatch(r"`ollama:.*` was skipped: .*127\.0\.0\.1.*", reply.warnings[0])


SECRET = "sk-for-one-of-them"


class Guarded(Settings):
    token: SecretStr | None = None


class Guarding(Echo):
    name = "guarding"

    @hookimpl
    def settings_model(self) -> type[Settings]:
        return Guarded


def given(echo: Echo) -> Any:
    """Return the settings that a provider was connected with."""
    return next(request.settings for hook, request in echo.calls if hook == "connect")


SHARED: dict[str, tuple[dict[str, Any], dict[str, str], str, tuple[str, str]]] = {
    "an argument api_key": ({"api_key": SECRET}, {}, "", ("api_key", "argument")),
    "an argument host": ({"host": f"http://{SECRET}@gpu"}, {}, "", ("host", "argument")),
    "an argument headers": ({"headers": {"X-Key": SECRET}}, {}, "", ("headers", "argument")),
    "a mapping": ({"settings": {"api_key": SECRET}}, {}, "", ("api_key", "the `settings` mapping")),
    "an object": ({"settings": Settings(api_key=SecretStr(SECRET))}, {}, "", ("api_key", "the `settings` mapping")),
    "a variable": ({}, {"GRAFTAGE_API_KEY": SECRET}, "", ("api_key", "environment GRAFTAGE_API_KEY")),
    "a variable with the host": ({}, {"GRAFTAGE_HOST": SECRET}, "", ("host", "environment GRAFTAGE_HOST")),
    "a variable with JSON": (
        {},
        {"GRAFTAGE_HEADERS": f'{{"X-Key": "{SECRET}"}}'},
        "",
        ("headers", "environment GRAFTAGE_HEADERS"),
    ),
    "a variable with a part": (
        {},
        {"GRAFTAGE_HEADERS__X_KEY": SECRET},
        "",
        ("headers", "environment GRAFTAGE_HEADERS__X_KEY"),
    ),
    "a variable with a custom prefix": (
        {"env_prefix": "TREES"},
        {"TREES_API_KEY": SECRET},
        "",
        ("api_key", "environment TREES_API_KEY"),
    ),
    "the top of the file": ({}, {}, f"api_key = '{SECRET}'", ("api_key", "FILE")),
    "a table at the top of the file": ({}, {}, f"headers.X-Key = '{SECRET}'", ("headers", "FILE")),
}


class TestChainSettings:
    @pytest.mark.parametrize("names", [("guarding", "echo"), ("echo", "guarding"), ("echo", "echo")])
    @pytest.mark.parametrize("case", SHARED)
    def test_shared_key_or_address_is_refused(
        self, both: Any, monkeypatch: Any, tmp_path: Path, case: str, names: tuple[str, str]
    ) -> None:
        arguments, variables, text, (key, source) = SHARED[case]
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
        (tmp_path / "settings.toml").write_text(text, encoding="utf-8")
        monkeypatch.setenv(
            "TREES_CONFIG" if "env_prefix" in arguments else "GRAFTAGE_CONFIG", f"{tmp_path}/settings.toml"
        )
        members = [Guarding() if name == "guarding" else Echo() for name in names]
        with pytest.raises(SettingsError, match=f"`{key}`.*every member") as caught:
            both.opened(members, model=MODEL, **arguments)
        assert (caught.value.key, caught.value.source) == (key, source.replace("FILE", f"{tmp_path}/settings.toml"))
        assert caught.value.hint
        assert SECRET not in f"{caught.value} {caught.value!r} {vars(caught.value)}"
        assert [member.connections for member in members] == [[], []]

    def test_shared_key_needs_overrides(self, both: Any, monkeypatch: Any) -> None:
        monkeypatch.setenv("GRAFTAGE_GUARDING_API_KEY", "custom")
        monkeypatch.setenv("GRAFTAGE_API_KEY", SECRET)
        with pytest.raises(SettingsError, match=r"`api_key` \(environment GRAFTAGE_API_KEY\).*every member"):
            both.opened([Guarding(), Echo()], model=MODEL)
        members = [Guarding(), Guarding()]
        both.opened(members, model=MODEL)
        assert [given(each).api_key for each in members] == [SecretStr("custom")] * 2

    def test_shared_headers_are_refused(self, both: Any) -> None:
        members = [(Guarding(), {"headers": {"X-A": "a"}}), (Guarding(), {"headers": {"X-A": "b"}})]
        with pytest.raises(SettingsError, match=r"`headers` \(argument\).*every member"):
            both.opened(members, model=MODEL, headers={"X-Key": SECRET})
        both.opened([(Guarding(), {"api_key": "a"}), (Guarding(), {"api_key": "b"})], model=MODEL, api_key=SECRET)

    def test_shared_custom_secret_is_refused(self, both: Any) -> None:
        with pytest.raises(SettingsError, match=r"`token`.*every member"):
            both.opened([Guarding(), Guarding()], model=MODEL, token=SECRET)

    @pytest.mark.parametrize("case", SHARED)
    def test_single_member_takes_any(self, both: Any, monkeypatch: Any, tmp_path: Path, case: str) -> None:
        arguments, variables, text, (key, _) = SHARED[case]
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
        (tmp_path / "settings.toml").write_text(text, encoding="utf-8")
        monkeypatch.setenv(
            "TREES_CONFIG" if "env_prefix" in arguments else "GRAFTAGE_CONFIG", f"{tmp_path}/settings.toml"
        )
        echo = Echo()
        both.opened([echo], model=MODEL, **arguments)
        assert getattr(given(echo), key)

    @pytest.mark.parametrize(
        "nothing",
        [{"api_key": None}, {"host": None}, {"headers": {}}, {"api_key": ""}, {"settings": {"api_key": None}}],
    )
    def test_empty_secrets_are_accepted(self, both: Any, nothing: dict[str, Any]) -> None:
        assert both.connect([Echo(["one"]), Echo()], model=MODEL, **nothing).chat("x").text == "one"

    def test_other_settings_reach_every_member(self, both: Any, monkeypatch: Any, tmp_path: Path) -> None:
        monkeypatch.setenv("GRAFTAGE_ATTEMPTS", "1")
        transport = Cassette(tmp_path / "none.yaml", mode="all")
        members = [Echo(), Guarding()]
        both.opened(members, model=MODEL, transport=transport, keep_alive="5m")
        for member in members:
            assert (given(member).attempts, given(member).keep_alive) == (1, 300)
            assert given(member).transport is transport

    def test_named_key_reaches_its_member(self, both: Any, monkeypatch: Any, tmp_path: Path) -> None:
        (tmp_path / "settings.toml").write_text("[guarding]\nhost = 'gpu'\n[guarding.headers]\nX-A = 'a'\n")
        monkeypatch.setenv("GRAFTAGE_CONFIG", str(tmp_path / "settings.toml"))
        monkeypatch.setenv("GRAFTAGE_GUARDING_API_KEY", SECRET)
        first, second = Guarding(), Echo()
        both.opened([first, second], model=MODEL)
        assert (given(first).host, given(first).api_key, list(given(first).headers)) == (
            "gpu",
            SecretStr(SECRET),
            ["X-A"],
        )
        assert (given(second).host, given(second).api_key, given(second).headers) == (None, None, {})

    def test_ollama_key_reaches_ollama_alone(self, both: Any, monkeypatch: Any) -> None:
        monkeypatch.setenv("OLLAMA_API_KEY", SECRET)
        monkeypatch.setenv("OLLAMA_HOST", DEAD)
        echo = Echo()
        llm = both.opened(["ollama:m", echo], model=MODEL)
        assert llm.members[0].address == DEAD
        assert given(echo).api_key is None

    def test_members_have_their_own(self, both: Any, monkeypatch: Any) -> None:
        monkeypatch.setenv("GRAFTAGE_ECHO_HOST", "elsewhere")
        first, second, third = Echo(), Echo(), Echo()
        own = {"host": "gpu", "api_key": SECRET, "headers": {"X-Key": SECRET}, "attempts": 2, "model": "own:1"}
        llm = both.opened([(first, own), second, (third, {})], model=MODEL, attempts=1)
        assert [each.model for each in llm.members] == ["own:1", MODEL, MODEL]
        assert [given(each).attempts for each in (first, second, third)] == [2, 1, 1]
        assert [given(each).host for each in (first, second, third)] == ["gpu", "elsewhere", "elsewhere"]
        assert [given(each).api_key for each in (first, second, third)] == [SecretStr(SECRET), None, None]
        assert "model" in own

    def test_named_members_have_their_own(self, both: Any) -> None:
        with FakeOllama(models=["smollm2:135m"], reply="the server answers") as fake:
            members = [("ollama:smollm2:135m", {"host": DEAD}), ("ollama", {"host": fake.url, "model": "smollm2:135m"})]
            reply = both.connect(members).chat("x")
        assert (reply.text, len(reply.warnings)) == ("the server answers", 1)

    @pytest.mark.parametrize(
        ("own", "error", "message"),
        [
            ({"api_kye": SECRET}, SettingsError, r"`api_kye` \(argument of the member\).*`api_key`"),
            ({"attempts": 0}, SettingsError, r"`attempts` \(argument of the member\)"),
            ({5: 5}, SettingsError, "`5`"),
            ({"model": " "}, RequestRejected, "`model` is empty"),
            ({"model": 5}, RequestRejected, "`model`"),
        ],
    )
    def test_wrong_ones_are_refused(self, both: Any, own: Any, error: Any, message: str) -> None:
        with pytest.raises(error, match=message) as caught:
            both.opened([(Echo(), own), Echo()], model=MODEL)
        assert SECRET not in str(caught.value)


class Able(Echo):
    """A provider that `auto` takes first, whose models say what they can do."""

    name = "able"
    rank = 30

    def __init__(self, models: Mapping[str, Sequence[str] | None], **of: Any) -> None:
        facts = [ModelInfo(name=name, features=None if can is None else frozenset(can)) for name, can in models.items()]
        super().__init__(models=facts, **of)

    @hookimpl
    def answers(self) -> int:
        return self.rank


PLAIN: Any = {"plain:1": ["chat", "embed"]}
SKILLED: Any = {"plain:1": ["chat"], "vectors:1": ["embed"], "skilled:1": ["chat", "tools", "images"]}


class TestNeeds:
    def test_named_provider_must_have_them(self, both: Any) -> None:
        echo = Echo(without=["capabilities", "embed"])
        with pytest.raises(CapabilityUnsupported, match="`echo` does not support `tools`"):
            both.opened(echo, model=MODEL, needs={"tools"})
        assert echo.closed
        assert both.opened(Echo(), model=MODEL, needs=["tools", "embed"]).chat("x").text == "x"

    def test_named_model_must_have_them(self, both: Any) -> None:
        able = Able(SKILLED)
        llm = both.opened(able, model="plain:1", needs={"tools"})
        with pytest.raises(CapabilityUnsupported, match="`tools` with `plain:1`"):
            llm.chat("x")
        assert [hook for hook, _ in able.calls if hook == "chat"] == []
        assert llm.chat("x", model="skilled:1").text == "x"
        assert both.opened(Able({"m:1": None}), model=MODEL, needs={"tools"}).chat("x").text == "x"

    @pytest.mark.parametrize(
        ("needs", "model"),
        [
            ({"tools"}, "skilled:1"),
            (("tools", "images"), "skilled:1"),
            ({"embed"}, "vectors:1"),
            ({"embed", "tools"}, "skilled:1"),
            ({"list_models"}, "plain:1"),
            (set(), "plain:1"),
            (None, "plain:1"),
        ],
    )
    def test_auto_chooses_an_able_model(self, both: Any, needs: Any, model: str) -> None:
        assert both.opened("auto", plugins=[Able(SKILLED)], needs=needs).model == model

    @pytest.mark.parametrize(
        ("models", "without"),
        [(SKILLED, ["capabilities"]), (PLAIN, []), ({}, [])],
        ids=["its provider", "its models", "without models"],
    )
    def test_auto_passes_over_the_unable(
        self, both: Any, embedded: Any, no_server: None, models: Any, without: list[str]
    ) -> None:
        first = Able(models, without=without)
        llm = both.opened("auto", plugins=[first, Second()], needs={"tools"})
        assert llm.provider == "llamacpp"
        assert re.search("`able` cannot be taken: The provider `able` .*`tools`", llm.origins["provider"])
        assert first.closed

    @pytest.mark.usefixtures("no_server")
    @pytest.mark.parametrize("disabled", ["llamacpp", "llamacpp,ollama"])
    def test_auto_without_the_able_says_so(self, both: Any, monkeypatch: Any, disabled: str) -> None:
        monkeypatch.setenv("GRAFTAGE_DISABLED_PLUGINS", f"{disabled},openai,lora,m4")
        able = Able(PLAIN)
        able.rank = 1
        with pytest.raises(CapabilityUnsupported, match="`able` has no model with `chat`, `tools`") as caught:
            both.opened("auto", plugins=[able], needs={"tools"})
        assert "install" not in str(caught.value.hint)

    def test_auto_checks_the_named_model(self, both: Any, embedded: Any, no_server: None) -> None:
        able = Able(SKILLED)
        assert both.opened("auto", plugins=[able], model="plain:1", needs={"tools"}).provider == "llamacpp"
        assert both.opened("auto", plugins=[able], model="skilled:1", needs={"tools"}).provider == "able"
        with pytest.raises(CapabilityUnsupported, match="`tools` with `plain:1`") as caught:
            both.opened("auto", plugins=[able], model="plain:1", needs={"tools"}, host=DEAD)
        assert "install" not in str(caught.value.hint)

    def test_chain_leaves_out_the_unable(self, both: Any) -> None:
        unable = Echo(["one"], without=["capabilities"])
        able = Able({"m:1": None, "plain:1": ["chat"]}, script=["two", "three"])
        llm = both.opened([unable, able], model=MODEL, needs={"tools"})
        assert (llm.provider, unable.closed) == ("able", True)
        assert llm.chat("x").warnings == ("`echo:m:1` was skipped: The provider `echo` does not support `tools`.",)
        llm = both.opened([(able, {"model": "plain:1"}), Second(["four"])], model=MODEL, needs={"tools"})
        reply = llm.chat("x")
        assert (reply.text, len(reply.warnings)) == ("four", 1)

    def test_chain_of_the_unable_is_an_error(self, both: Any) -> None:
        members = [Echo(without=["capabilities"]), Second(without=["capabilities"])]
        with pytest.raises(CapabilityUnsupported, match="`second` does not support `tools`") as caught:
            both.opened(members, model=MODEL, needs={"tools"})
        assert "`echo:m:1` was skipped" in str(caught.value.hint)
        assert all(each.closed for each in members)

    @pytest.mark.parametrize("needs", ["tools", 5, {"tools": True}, b"tools"])
    def test_must_be_a_set_of_features(self, both: Any, needs: Any) -> None:
        with pytest.raises(RequestRejected, match="`needs` is invalid"):
            both.opened(Echo(), model=MODEL, needs=needs)

    @pytest.mark.parametrize(("needs", "hint"), [({"toolz"}, "Did you mean `tools`"), ([5], "Known names: ")])
    def test_unknown_feature_gets_the_nearest(self, both: Any, needs: Any, hint: str) -> None:
        with pytest.raises(RequestRejected, match="There is no feature") as caught:
            both.opened(Echo(), model=MODEL, needs=needs)
        assert hint in str(caught.value.hint)
