"""The 29 faults of the client that Graftage replaces must not return. Each class names its fault.

| fault | where it is tested |
| --- | --- |
| 1 to 27, and 29 | here, each under its number |
| 28: typing errors, since no type checker was run | by mypy in the gate. That the packages are typed is tested here |
"""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import pickle
import shutil
import socket
import subprocess
import time
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pytest
from places import ROOT

import graftage
from graftage.exceptions import (
    AuthenticationFailed,
    ConnectionFailed,
    GraftageError,
    InferenceFailed,
    ModelNotFound,
    Overloaded,
    ProviderError,
    ProviderTimeout,
    RequestRejected,
    StreamInterrupted,
)
from graftage.retry import DEFAULT_POLICY, RetryPolicy
from graftage.testing import Echo
from graftage.types import Embeddings, Health, LoadedModel, ModelInfo, Reply, Timeouts
from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from collections.abc import Callable

MODEL = "smollm2:135m"
DAY = 86_400.0


@pytest.fixture
def llm(both: Any, fake: FakeOllama) -> Any:
    return both.connect("ollama", model=MODEL, host=fake.url)


@pytest.fixture
def dead() -> str:
    """An address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def asked(fake: FakeOllama) -> list[str]:
    return [seen.path for seen in fake.requests]


def refusal(words: str, status: int, **headers: str) -> Answer:
    return Answer([{"error": words}], status=status, framing="length", headers=headers)


def line(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "message": {"role": "assistant", "content": text}, "done": False, **fields}


LAST = line("", done=True, done_reason="stop")
MISSING = refusal("model 'x' not found", 404)
BUSY = refusal("server busy, please try again.  maximum pending requests exceeded", 503)


class TestFault01StaleHealth:
    def test_result_of_yesterday_is_stale(self, both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        with FakeOllama() as server:
            llm = both.connect("ollama", host=server.url)
            assert llm.health().ok
        real = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: real() + DAY + 2.0)
        assert not llm.health().ok

    def test_wall_clock_does_not_count(self, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        assert not llm.health().cached
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + DAY)
        found = llm.health()
        assert found.cached
        assert found.age < 60


class TestFault02HealthMemory:
    def test_failed_call_clears_a_good_result(self, both: Any) -> None:
        with FakeOllama() as server:
            llm = both.connect("ollama", model=MODEL, host=server.url)
            assert llm.health().ok
        with pytest.raises(ConnectionFailed):
            llm.chat("Hi")
        found = llm.health()
        assert not found.ok
        assert not found.cached

    def test_failure_is_remembered_briefly(self, both: Any, fake: FakeOllama) -> None:
        fake.script("/api/version", refusal("odd", 500))
        llm = both.connect("ollama", host=fake.url)
        found = [llm.health() for _ in range(5)]
        assert [each.ok for each in found] == [False] * 5
        assert asked(fake) == ["/api/version"]


class TestFault03HealthLevels:
    def test_reports_each_level_without_a_list(self, llm: Any, fake: FakeOllama) -> None:
        found = llm.health("answers")
        assert isinstance(found, Health)
        assert (found.reachable, found.api, found.model_present, found.model_loaded, found.answers) == (True,) * 5
        assert found.version == fake.version
        assert "/api/tags" not in asked(fake)

    def test_reports_failure_without_raising(self, both: Any, dead: str) -> None:
        found = both.connect("ollama", host=dead).health()
        assert (found.ok, found.reachable) == (False, False)
        with pytest.raises(ConnectionFailed):
            found.raise_for_error()


class TestFault04PermanentErrors:
    @pytest.mark.parametrize(
        ("answer", "kind"),
        [
            (MISSING, ModelNotFound),
            (refusal("bad field", 400), RequestRejected),
            (refusal("unauthorized", 401), AuthenticationFailed),
            (refusal("odd", 500), InferenceFailed),
        ],
    )
    def test_are_not_retried(self, llm: Any, fake: FakeOllama, answer: Answer, kind: type[ProviderError]) -> None:
        fake.script("/api/chat", answer)
        with pytest.raises(kind) as caught:
            llm.chat("Hi")
        assert caught.value.attempts == 1
        assert asked(fake).count("/api/chat") == 1


class TestFault05TransientErrors:
    @pytest.mark.parametrize("answer", [BUSY, refusal("slow down", 429), Answer(raw=b"", ending="reset")])
    def test_are_retried(self, llm: Any, fake: FakeOllama, answer: Answer) -> None:
        fake.script("/api/chat", answer, answer)
        assert llm.chat("Hi").text == fake.reply
        assert llm.stats().retries == 2

    def test_timeout_is_typed_after_retry_after(self, both: Any, fake: FakeOllama, watcher: Any) -> None:
        llm = both.connect("ollama", model=MODEL, host=fake.url, plugins=[watcher])
        stalled = Answer(ending="stall")
        fake.script("/api/chat", refusal("slow down", 429, **{"retry-after": "9"}), stalled)
        with pytest.raises(ProviderTimeout) as caught:
            llm.chat("Hi", timeout=Timeouts(first_token=0.2, total=15))
        assert caught.value.phase == "first_token"
        # Tests skip waits, so the schedule is checked.
        assert DEFAULT_POLICY.wait(watcher.last("retry").error, 1, 0.0) == 9.0


class TestFault06LastError:
    @pytest.mark.parametrize("operation", ["chat", "generate", "embed", "show", "models", "load"])
    def test_is_raised_unwrapped(self, both: Any, dead: str, operation: str) -> None:
        llm = both.connect("ollama", model=MODEL, host=dead)
        inputs = ["Hi"] if operation in ("chat", "generate", "embed") else []
        with pytest.raises(GraftageError) as caught:
            getattr(llm, operation)(*inputs)
        assert type(caught.value) is ConnectionFailed
        assert caught.value.attempts == 3


class TestFault07Retryable:
    @pytest.mark.parametrize(
        "answer",
        [MISSING, BUSY, refusal("odd", 500), refusal("odd", 400), refusal("no", 403), Answer(raw=b"", ending="reset"),
         refusal("model runner has unexpectedly stopped", 500), Answer([])],
    )  # fmt: skip
    def test_matches_what_was_done(self, both: Any, fake: FakeOllama, answer: Answer) -> None:
        fake.script("/api/chat", answer, answer)
        llm = both.connect("ollama", model=MODEL, host=fake.url, attempts=2)
        with pytest.raises(ProviderError) as caught:
            llm.chat("Hi")
        assert asked(fake).count("/api/chat") == (2 if caught.value.retryable else 1)


class TestFault08RequestCounts:
    def test_retries_do_not_multiply(self, both: Any, fake: FakeOllama) -> None:
        fake.script("/api/chat", *[Answer(raw=b"", ending="reset")] * 9)
        llm = both.connect("ollama", model=MODEL, host=fake.url)
        with pytest.raises(ConnectionFailed) as caught:
            llm.chat("Hi")
        assert asked(fake) == ["/api/chat"] * 3
        assert caught.value.attempts == 3

    def test_unknown_model_costs_two_requests(self, llm: Any, fake: FakeOllama) -> None:
        with pytest.raises(ModelNotFound) as caught:
            llm.chat("Hi", model="smollm2:136m")
        assert caught.value.suggestions == (MODEL,)
        assert asked(fake) == ["/api/chat", "/api/tags"]

    def test_failed_suggestions_are_not_retried(self, llm: Any, fake: FakeOllama) -> None:
        fake.script("/api/tags", *[BUSY] * 9)
        with pytest.raises(ModelNotFound) as caught:
            llm.chat("Hi", model="smollm2:136m")
        assert caught.value.suggestions == ()
        assert asked(fake) == ["/api/chat", "/api/tags"]


class TestFault09Outage:
    @pytest.mark.parametrize("ask", ["show", "ensure", "chat"])
    def test_is_not_a_missing_model(self, both: Any, dead: str, ask: str) -> None:
        llm = both.connect("ollama", model=MODEL, host=dead)
        with pytest.raises(ConnectionFailed):
            getattr(llm, ask)(*(["Hi"] if ask == "chat" else []))

    def test_health_leaves_the_model_unknown(self, both: Any, dead: str) -> None:
        found = both.connect("ollama", model=MODEL, host=dead).health("model_present")
        assert (found.reachable, found.model_present) == (False, None)


class TestFault10ModelKeys:
    @pytest.mark.parametrize("keys", [("name", "model"), ("model",), ("name",)])
    def test_either_key_of_the_server_works(self, llm: Any, fake: FakeOllama, keys: tuple[str, ...]) -> None:
        fake.script("/api/tags", Answer([{"models": [dict.fromkeys(keys, MODEL)]}], framing="length"))
        (model,) = llm.models()
        assert model.name == MODEL
        assert llm.health("model_present").ok


class TestFault11ModelNames:
    @pytest.mark.parametrize("name", ["llama3.2", "llama3.2:latest", "LLAMA3.2", "library/llama3.2"])
    def test_tag_is_optional(self, both: Any, name: str) -> None:
        with FakeOllama(models=["llama3.2"]) as fake:
            llm = both.connect("ollama", host=fake.url)
            llm.load("llama3.2")
            fake.script("/api/show", Answer([fake._facts("llama3.2:latest", verbose=False)], framing="length"))
            assert llm.health("model_loaded", model=name).model_loaded

    def test_confused_name_gets_a_suggestion(self, both: Any) -> None:
        with FakeOllama(models=["gpt-oss:20b", MODEL]) as fake:
            llm = both.connect("ollama", host=fake.url)
            with pytest.raises(ModelNotFound, match="Did you mean `gpt-oss:20b`"):
                llm.chat("Hi", model="gpt-oss-20b")


class TestFault12NoListFirst:
    def test_calls_request_no_list(self, llm: Any, fake: FakeOllama) -> None:
        llm.chat("Hi")
        llm.generate("Hi")
        llm.embed("Hi")
        llm.chat("Hi", stream=True).close()
        assert asked(fake) == ["/api/chat", "/api/generate", "/api/embed", "/api/chat"]


class TestFault13StreamErrors:
    def test_opening_raises_and_retries_like_any(self, llm: Any, fake: FakeOllama) -> None:
        with pytest.raises(ModelNotFound):
            llm.chat("Hi", model="nosuch", stream=True)
        fake.script("/api/chat", BUSY)
        with llm.chat("Hi", stream=True) as stream:
            assert "".join(chunk.text for chunk in stream) == fake.reply

    def test_dead_server_is_the_same_error(self, both: Any, dead: str) -> None:
        llm = both.connect("ollama", model=MODEL, host=dead)
        for stream in (True, False):
            with pytest.raises(ConnectionFailed) as caught:
                llm.chat("Hi", stream=stream)
            assert caught.value.details["cause"] == "refused"

    @pytest.mark.parametrize(
        ("answer", "kind"),
        [
            (
                Answer([line("so far"), {"error": "an error was encountered while running the model: EOF"}]),
                InferenceFailed,
            ),
            (Answer([line("so far")]), StreamInterrupted),
            (Answer([line("so far")], ending="reset"), StreamInterrupted),
        ],
    )
    def test_cut_stream_keeps_its_text(
        self, llm: Any, fake: FakeOllama, answer: Answer, kind: type[ProviderError]
    ) -> None:
        fake.script("/api/chat", answer)
        with llm.chat("Hi", stream=True) as stream, pytest.raises(kind) as caught:
            for _ in stream:
                pass
        assert caught.value.partial is not None
        assert caught.value.partial.text == "so far"
        assert asked(fake) == ["/api/chat"]


class TestFault14Timeouts:
    def test_long_reply_may_take_its_time(self, llm: Any, fake: FakeOllama) -> None:
        fake.script("/api/chat", Answer([*[line("word ")] * 30, LAST], delay=0.02))
        assert llm.chat("Hi", timeout=Timeouts(first_token=5, idle=0.5, total=15)).text == "word " * 30

    def test_pull_may_take_its_time(self, both: Any, fake: FakeOllama) -> None:
        steps = [{"status": "pulling b179", "total": 100, "completed": each} for each in range(30)]
        fake.script("/api/pull", Answer([*steps, {"status": "success"}], delay=0.02))
        llm = both.connect("ollama", host=fake.url, timeouts={"total": 0.2, "first_token": 0.2, "idle": 5})
        seen: list[int | None] = []
        llm.pull("x:1b", on_progress=lambda step: seen.append(step.completed))
        assert seen == [*range(30), None]

    @pytest.mark.parametrize("phase", ["first_token", "idle", "total"])
    def test_limits_are_independent(self, llm: Any, fake: FakeOllama, phase: str) -> None:
        answers = {
            "first_token": Answer(ending="stall"),
            "idle": Answer([line("so far")], ending="stall"),
            "total": Answer([line("so far")] * 300, delay=0.02),
        }
        fake.script("/api/chat", answers[phase])
        with pytest.raises(ProviderTimeout) as caught:
            llm.chat("Hi", timeout=Timeouts(**{"first_token": 15, "idle": 15, "total": 15, phase: 0.3}))
        assert caught.value.phase == phase


class TestFault15EventLoops:
    def test_client_works_in_a_second_one(self, fake: FakeOllama) -> None:
        llm = graftage.connect_async("ollama", model=MODEL, host=fake.url)
        assert [asyncio.run(llm.chat("Hi")).text for _ in range(3)] == [fake.reply] * 3
        assert gone(fake), "the connections of a loop are closed with it"
        gc.collect()  # An open connection would warn now.
        asyncio.run(llm.close())


def gone(fake: FakeOllama) -> bool:
    until = time.monotonic() + 10
    while fake.open_connections and time.monotonic() < until:
        time.sleep(0.01)
    return fake.open_connections == 0


class TestFault16Close:
    def test_releases_connections_and_may_repeat(self, llm: Any, fake: FakeOllama) -> None:
        llm.chat("Hi")
        llm.models()
        assert fake.open_connections > 0
        llm.close()
        llm.close()
        assert gone(fake)
        with pytest.raises(RuntimeError):
            llm.chat("Hi")

    def test_clients_are_context_managers(self, both: Any, fake: FakeOllama) -> None:
        with both.connect("ollama", model=MODEL, host=fake.url) as llm:
            llm.chat("Hi")
        assert gone(fake)


class TestFault17Threads:
    def test_first_calls_build_one_pool(self, both: Any, fake: FakeOllama) -> None:
        built: list[Any] = []

        class Slow:
            def wrap(self, network: Callable[[], Any]) -> Any:
                time.sleep(0.05)
                built.append(network())
                return built[-1]

        llm = both.connect("ollama", model=MODEL, host=fake.url, transport=Slow())
        replies = both.together([lambda: llm.chat("Hi")] * 16)
        assert [reply.text for reply in replies] == [fake.reply] * 16
        assert len(built) == 1


class TestFault18Concurrency:
    def test_limit_is_never_exceeded(self, both: Any, fake: FakeOllama) -> None:
        fake.script("/api/chat", *[Answer([line("a"), LAST], delay=0.02)] * 12)
        llm = both.connect("ollama", model=MODEL, host=fake.url, concurrency=2)
        both.together([lambda: llm.chat("Hi")] * 12)
        assert len(asked(fake)) == 12
        assert fake.accepted <= 2


class TestFault19Coroutines:
    def test_are_retried_like_functions(self, fake: FakeOllama) -> None:
        fake.script("/api/chat", BUSY, BUSY)

        async def main() -> str:
            async with graftage.connect_async("ollama", model=MODEL, host=fake.url) as llm:
                reply = await llm.chat("Hi")
                return str(reply.text)

        assert asyncio.run(main()) == fake.reply
        assert asked(fake) == ["/api/chat"] * 3


class TestFault20ProgramErrors:
    def test_are_not_retried(self, both: Any) -> None:
        echo = Echo([TypeError("a mistake"), "never reached"])
        with pytest.raises(GraftageError) as caught:
            both.connect(echo, model=MODEL).chat("Hi")
        assert isinstance(caught.value.__cause__, TypeError)
        assert len(echo.requests) == 1
        with pytest.raises(TypeError):
            both.connect(Echo(), model=MODEL).chat("Hi", nosuch=1)


class TestFault21Logging:
    def test_errors_log_nothing(
        self, both: Any, dead: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with caplog.at_level(logging.INFO):
            assert not both.connect("ollama", host=dead).health().ok
            with pytest.raises(ConnectionFailed):
                both.connect("ollama", model=MODEL, host=dead).chat("Hi")
        assert [record.getMessage() for record in caplog.records] == []
        assert capfd.readouterr() == ("", "")


class TestFault22Details:
    @pytest.mark.parametrize("given", [None, {}, {"key": "value"}])
    def test_are_copied_and_optional(self, given: Any) -> None:
        error = ProviderError("x", details=given)
        error.details["more"] = 1
        assert given in (None, {}, {"key": "value"})

    def test_are_not_shared_between_errors(self, llm: Any, fake: FakeOllama) -> None:
        fake.script("/api/chat", refusal("odd", 500), refusal("odder", 500))
        errors = []
        for _ in range(2):
            with pytest.raises(InferenceFailed) as caught:
                llm.chat("Hi")
            errors.append(caught.value)
        assert [error.details["server_message"] for error in errors] == ["odd", "odder"]


class TestFault23Pickling:
    def test_errors_survive_pickling_and_copying(self, llm: Any, fake: FakeOllama) -> None:
        with pytest.raises(ModelNotFound) as caught:
            llm.chat("Hi", model="smollm2:136m")
        error = caught.value
        for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert type(twin) is ModelNotFound
            assert str(twin) == str(error)
            assert twin.to_dict() == error.to_dict()


class TestFault24ErrorTypes:
    def test_each_status_has_its_type(self, llm: Any, fake: FakeOllama) -> None:
        expected = {
            400: RequestRejected,
            401: AuthenticationFailed,
            403: AuthenticationFailed,
            404: ModelNotFound,
            413: RequestRejected,
            429: Overloaded,
            500: InferenceFailed,
            502: ConnectionFailed,
            503: Overloaded,
            504: ProviderTimeout,
        }
        found = {}
        for status in expected:
            fake.script("/api/chat", *[refusal("no", status)] * 3)
            with pytest.raises(ProviderError) as caught:
                llm.chat("Hi")
            found[status] = type(caught.value)
            fake._scripts["/api/chat"].clear()
        assert found == expected

    def test_registry_outage_is_a_failed_connection(self, llm: Any, fake: FakeOllama) -> None:
        words = 'pull model manifest: Get "https://registry/v2": dial tcp: lookup registry: no such host'
        fake.script("/api/pull", Answer([{"status": "pulling manifest"}, {"error": words}]))
        with pytest.raises(ConnectionFailed) as caught:
            llm.pull("llama3.2")
        assert caught.value.details["cause"] == "registry"

    def test_mistyped_model_gets_no_restart_advice(self, llm: Any) -> None:
        with pytest.raises(ModelNotFound) as caught:
            llm.chat("Hi", model="smolm2:135m")
        assert "restart" not in str(caught.value).lower()
        pull = "pull it: `graftage models pull smolm2:135m`."
        assert caught.value.hint == f"Did you mean `{MODEL}`? If not, {pull}"


class TestFault25ReturnTypes:
    def test_records_are_graftages_own(self, llm: Any) -> None:
        llm.load()
        assert type(llm.chat("Hi")) is Reply
        assert type(llm.embed("Hi")) is Embeddings
        (listed,), (loaded,), shown = llm.models(), llm.loaded(), llm.show()
        assert (type(listed), type(loaded), type(shown)) == (ModelInfo, LoadedModel, ModelInfo)
        assert [each.name for each in (listed, loaded, shown)] == [MODEL] * 3


class TestFault26Requests:
    def test_context_window_and_keep_alive_are_sent(self, both: Any, fake: FakeOllama) -> None:
        llm = both.connect("ollama", model=MODEL, host=fake.url, context_window=2048, keep_alive="10m")
        llm.chat("Hi")
        llm.generate("Hi", context_window=512, keep_alive=-1)
        first, second = (seen.body for seen in fake.requests)
        assert (first["options"]["num_ctx"], first["keep_alive"]) == (2048, 600)
        assert (second["options"]["num_ctx"], second["keep_alive"]) == (512, -1)

    def test_truncated_prompt_is_a_warning(self, llm: Any) -> None:
        reply = llm.chat("source code " * 20_000)  # The fake reports five tokens.
        (warning,) = reply.warnings
        assert "probably cut" in warning


class TestFault27Documentation:
    @pytest.mark.waits
    def test_documented_waits_are_used(self, both: Any, dead: str, fake: FakeOllama) -> None:
        # Within 3 s a dead server is tried three times, a busy one once: its first wait takes 4 s.
        fake.script("/api/chat", BUSY)
        attempts = []
        for host in (dead, fake.url):
            with pytest.raises(ProviderError) as caught:
                both.connect("ollama", model=MODEL, host=host).chat("Hi", timeout=3)
            attempts.append(caught.value.attempts)
        assert attempts == [3, 1]
        policy = RetryPolicy()
        assert [policy.wait(ConnectionFailed("x"), each, 0.0) for each in (1, 2)] == [0.1, 0.5]
        assert [policy.wait(Overloaded("x"), each, 0.0) for each in (1, 2, 3, 4, 5)] == [4, 4, 4, 8, 10]

    @pytest.mark.parametrize("attempts", [1, 2, 5])
    def test_attempts_and_health_age_are_settings(self, both: Any, fake: FakeOllama, attempts: int) -> None:
        fake.script("/api/chat", *[BUSY] * 9)
        llm = both.connect("ollama", model=MODEL, host=fake.url, attempts=attempts)
        with pytest.raises(Overloaded):
            llm.chat("Hi")
        assert len(asked(fake)) == attempts
        assert [llm.health(max_age=age).cached for age in (None, None, 0)] == [False, True, False]


class TestFault28Typing:
    @pytest.mark.parametrize("package", ["graftage", "graftage_ollama"])
    def test_packages_are_marked_as_typed(self, package: str) -> None:
        assert (files(package) / "py.typed").is_file()


class TestFault29Gitignore:
    def test_loses_no_file_of_the_project(self) -> None:
        if shutil.which("git") is None or not (ROOT / ".git").exists():
            pytest.skip("this is no checkout")
        command = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "--"]
        folders = [
            "core",
            "providers",
            "plugins",
            "tests",
            "cassettes",
            ".ci",
            "README.md",
            "LICENSE",
            "pyproject.toml",
        ]
        printed = subprocess.run([*command, *folders], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        lost = [
            each for each in printed.splitlines() if not each.endswith((".pyc", ".pyo")) and ".egg-info/" not in each
        ]
        assert [each for each in lost if "_cache/" not in each] == []
