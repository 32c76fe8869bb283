"""The policy: what it grants and refuses, and that no sequence of events exceeds the budget."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import graftage
import graftage_m4
from graftage.calls import LimitsQuery
from graftage.exceptions import ConnectionFailed, ProviderTimeout, ResourceLimitExceeded
from graftage.footprint import RUNTIME, footprint, read_shape
from graftage.testing import Echo
from graftage.types import NEVER_APPLIES, Limits, LoadedModel, ModelInfo
from graftage_m4._machine import Collector, Output, Reading, Readings, budget_of
from graftage_m4._policy import LADDER
from graftage_m4._state import Ledger, Watch, server_of
from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from collections.abc import Mapping

ASSETS = Path(__file__).parent / "assets"
GIB = 1 << 30
PAGE = 16_384
START = datetime(2026, 1, 1, tzinfo=UTC)


def model(
    name: str,
    gigabytes: float,
    *,
    layers: int = 32,
    kv_heads: int = 8,
    length: int = 128,
    embedding: int = 4096,
    vocabulary: int = 151_936,
    trained: int = 131_072,
    billions: float | None = None,
    **more: Any,
) -> ModelInfo:
    keys = {
        "block_count": layers,
        "attention.head_count": 32,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": length,
        "attention.value_length": length,
        "embedding_length": embedding,
        "vocab_size": vocabulary,
        "context_length": trained,
        **{each.replace("__", "."): value for each, value in more.items()},
    }
    metadata = {f"test.{key}": value for key, value in keys.items()}
    return ModelInfo(
        name=name,
        architecture="test",
        size=int(gigabytes * 1e9),
        metadata={**metadata, "general.parameter_count": int((billions or gigabytes / 0.6) * 1e9)},
    )


SMALL = model("qwen3:4b", 2.5, layers=36, embedding=2560, trained=40_960, billions=4.0)
MIDDLE = model("llama3.1:8b", 4.9, vocabulary=128_256, billions=8.0)
LARGE = model("qwen3:14b", 9.3, layers=40, embedding=5120, trained=40_960, billions=14.8)
HUGE = model("llama3.3:70b", 42.5, layers=80, embedding=8192, vocabulary=128_256, billions=70.6)
EMBEDDER = model("nomic-embed-text:v1.5", 0.27, layers=12, kv_heads=12, length=64, embedding=768, vocabulary=30_522,
                 trained=2048, billions=0.137, pooling_type=1)  # fmt: skip
MODELS = {each.name: each for each in (SMALL, MIDDLE, LARGE, HUGE, EMBEDDER)}


class Mac:
    """A Mac whose readings a test sets."""

    def __init__(self, gigabytes: float = 16, *, free: float | None = None, cap: float | None = None) -> None:
        self.memory = int(gigabytes * GIB)
        self.cap = int((cap or gigabytes * (2 / 3 if gigabytes < 36 else 3 / 4)) * GIB)
        self.free = int((gigabytes - 4 if free is None else free) * GIB)
        self.pressure: int | str = 1
        self.thermal: int | str = 0
        self.low_power: int | str = 0
        self.swapouts = 1000
        self.decompressions = 1000
        self.chip = "Apple M4"
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def run(self, reading: Reading) -> Output:
        return Output(getattr(self, f"_{reading.name}")())

    def _static(self) -> str:
        return f"hw.memsize: {self.memory}\nmachdep.cpu.brand_string: {self.chip}\nkern.osproductversion: 15.4\n"

    def _metal(self) -> str:
        return f'{{"recommended_working_set": {self.cap}}}'

    def _memory(self) -> str:
        return (
            f"kern.memorystatus_vm_pressure_level: {self.pressure}\nkern.memorystatus_level: 50\n"
            "vm.swapusage: total = 0.00M  used = 0.00M  free = 0.00M  (encrypted)\niogpu.wired_limit_mb: 0\n"
        )

    def _vm_stat(self) -> str:
        active = max(self.memory - self.free, 0) // PAGE
        counts = {
            "Pages active": active, "Pages inactive": 0, "Pages speculative": 0, "Pages wired down": 0,
            "Pages occupied by compressor": 0, "Pages purgeable": 0, "File-backed pages": 0,
            "Decompressions": self.decompressions, "Swapouts": self.swapouts,
        }  # fmt: skip
        lines = (f"{label + ':':<30} {count:>16}." for label, count in counts.items())
        return "\n".join([f"Mach Virtual Memory Statistics: (page size of {PAGE} bytes)", *lines])

    def _thermal(self) -> str:
        return f"com.apple.system.thermalpressurelevel {self.thermal}"

    def _process(self) -> str:
        return "{}"

    def _power(self) -> str:
        return f" lowpowermode {self.low_power}\n sleep 0\n"


class Desk:
    """Asks a policy for limits, as the core does."""

    def __init__(self, mac: Mac, address: str = "http://127.0.0.1:11434", plugin: Any = None, **settings: Any) -> None:
        self.mac = mac
        self.address = address
        self.plugin = plugin or graftage_m4.M4(runner=mac, clock=mac.clock, **settings)
        self.loaded: dict[str, LoadedModel] = {}
        self.used: Counter[str] = Counter()
        self.reports = True
        """Whether the server reports which models are loaded."""

    def ask(self, info: ModelInfo | None, window: int | None = None, **more: Any) -> Limits:
        query = LimitsQuery(
            operation="chat",
            provider="ollama",
            address=self.address,
            model=info.name if info else "unknown:1",
            context_window=window,
            model_info=lambda: info,
            loaded_models=lambda: tuple(self.loaded.values()) if self.reports else None,
            in_use=lambda: {name: count for name, count in self.used.items() if count},
            **more,
        )
        answer = self.plugin.resource_limits(query)
        assert isinstance(answer, Limits)
        return answer

    def load(
        self, info: ModelInfo, window: int, *, minutes: float = 5, part: float = 1.0, reported: float = 1.0
    ) -> None:
        shape = read_shape(info)
        assert shape is not None
        size = int(footprint(shape, window).counted * reported)
        self.loaded[info.name] = LoadedModel(
            name=info.name,
            size=size,
            accelerator_size=int(size * part),
            context_window=window,
            expires_at=START + timedelta(minutes=minutes),
        )

    def give(self, info: ModelInfo, window: int | None = None, **more: Any) -> Limits:
        """Ask, and load the model as granted."""
        limits = self.ask(info, window, **more)
        for name in limits.unload:
            self.loaded.pop(name, None)
        assert limits.context_window
        self.load(info, limits.context_window)
        return limits


def size_of(info: ModelInfo, window: int) -> int:
    shape = read_shape(info)
    assert shape is not None
    return footprint(shape, window).total


class TestLimits:
    def test_every_number_has_a_reason(self) -> None:
        limits = Desk(Mac(16)).ask(MIDDLE)
        assert limits.context_window == 16_384
        assert (limits.concurrent_requests, limits.queued_requests) == (2, 16)
        assert (limits.loaded_models, limits.keep_alive) == (1, 300)
        assert set(limits.reasons) == {
            "context_window", "concurrent_requests", "queued_requests", "loaded_models", "keep_alive",
        }  # fmt: skip
        assert "Metal's working set of 11.5 GB" in limits.reasons["context_window"]
        assert limits.warnings == ()

    def test_default_window_is_readable_in_time(self) -> None:
        # 220 tokens a second for 8 billion parameters: 26 400 in 120 s.
        assert Desk(Mac(64)).ask(MIDDLE).context_window == 16_384
        assert Desk(Mac(64), prefill_seconds=1000).ask(MIDDLE).context_window == 131_072
        unknown = Mac(64)
        unknown.chip = "Apple M9"
        assert Desk(unknown).ask(MIDDLE).context_window == 131_072

    def test_requested_window_is_lowered_to_fit(self) -> None:
        desk = Desk(Mac(24))
        assert desk.ask(MIDDLE, 6000).context_window == 6000
        assert desk.ask(MIDDLE, 1_000_000).context_window == 65_536
        assert desk.ask(SMALL, 1_000_000).context_window == 40_960
        assert "was trained for 40960" in desk.ask(SMALL, 1_000_000).reasons["context_window"]

    def test_long_prompt_gets_larger_window(self) -> None:
        desk = Desk(Mac(32))
        assert desk.ask(MIDDLE, prompt_characters=120_000).context_window == 65_536
        desk.load(SMALL, 4096)
        notes = desk.ask(SMALL, prompt_characters=120_000)
        assert notes.context_window == 4096
        assert "ask for `context_window=30000`" in notes.warnings[-1]

    def test_concurrency_is_windows_that_fit(self) -> None:
        assert [Desk(Mac(16)).ask(SMALL, window).concurrent_requests for window in (32_768, 16_384, 4096)] == [1, 2, 2]
        assert [Desk(Mac(32)).ask(SMALL, window).concurrent_requests for window in (32_768, 16_384, 4096)] == [3, 4, 4]

    def test_keep_alive_follows_table(self) -> None:
        minutes = {
            gigabytes: [Desk(Mac(gigabytes, free=gigabytes)).ask(info, 4096).keep_alive for info in (SMALL, MIDDLE)]
            for gigabytes in (16, 24, 48)
        }
        assert minutes == {16: [600, 300], 24: [1800, 900], 48: [3600, 3600]}
        assert Desk(Mac(24)).ask(LARGE, 4096).keep_alive == 600

    def test_unknown_model_is_admitted_alone(self) -> None:
        limits = Desk(Mac(16)).ask(None)
        assert (limits.context_window, limits.concurrent_requests) == (4096, 1)
        assert "not known" in limits.warnings[0]

    def test_mlx_leaves_more_free(self) -> None:
        desk = Desk(Mac(16))
        mlx = replace(MIDDLE, name="llama3.1:8b-mlx")
        assert (desk.ask(MIDDLE, 32_768).context_window, desk.ask(mlx, 32_768).context_window) == (32_768, 16_384)


class TestPlugin:
    def test_remote_servers_and_other_computers(
        self,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def query(address: str) -> LimitsQuery:
            return LimitsQuery(operation="chat", provider="ollama", address=address, model="m:1")

        assert graftage_m4.M4().resource_limits(query("http://127.0.0.1:11434")) is NEVER_APPLIES
        monkeypatch.setattr("sys.platform", "darwin")
        monkeypatch.setattr("platform.machine", lambda: "arm64")
        here = graftage_m4.M4()
        assert here.resource_limits(query("http://192.0.2.7:11434")) is NEVER_APPLIES
        for address in (
            "http://127.0.0.1:11434",
            "http://localhost:1",
            "http://[::1]:1",
            "http://0.0.0.0:1",
            "in this process",
        ):
            assert here.resource_limits(query(address)) is not None

    def test_import_is_light(self) -> None:
        heavy = "{'pydantic', 'pydantic_settings', 'typer', 'rich', 'graftage_m4._policy'}"
        code = f"import sys, graftage_m4; print(sorted({heavy} & sys.modules.keys()))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"

    def test_unreadable_mac_gets_little(self) -> None:
        class Mute:
            def run(self, reading: Reading) -> Output:
                return Output(exit=1, problem="cannot be run")

        plugin = graftage_m4.M4(runner=Mute())
        limits = Desk(Mac(), plugin=plugin).ask(MIDDLE)
        assert (limits.concurrent_requests, limits.loaded_models, limits.context_window) == (1, 1, None)
        assert "could be read" in limits.warnings[0]

    @pytest.mark.parametrize("error", [ProviderTimeout("late", phase="total"), RuntimeError("plugin")])
    def test_provider_errors(self, error: Exception) -> None:
        def ask(problem: Exception) -> Limits | None:
            def fail() -> Any:
                raise problem

            query = LimitsQuery(operation="chat", provider="o", address="x", model="m:1", model_info=lambda: MIDDLE,
                                loaded_models=fail)  # fmt: skip
            mac = Mac(16)
            return graftage_m4.M4(runner=mac, clock=mac.clock).resource_limits(query)

        if isinstance(error, graftage.GraftageError):
            answer = ask(error)
            assert answer is not None
            assert answer.context_window == 16_384
        with pytest.raises(ConnectionFailed):
            ask(ConnectionFailed("gone"))


def mlx(level: str | None, **facts: Any) -> ModelInfo:
    """A model for Apple silicon as Ollama shows it: without a size, and with parameters as half of its bytes."""
    metadata = {"general.architecture": "gemma4", "gemma4.context_length": 131_072,
                "general.parameter_count": 3_800_000_000}  # fmt: skip
    reported = {
        "architecture": "gemma4", "quantization": level, "metadata": metadata,
        "tensors": {"a": (12_000_000, 1000)}, "raw": {"details": {"format": "safetensors"}}, **facts,
    }  # fmt: skip
    return ModelInfo(name="gemma4:12b-mlx", **reported)


LEVELS = ["int4", "int8", "mxfp4", "mxfp8", "nvfp4", "INT4", "IQ1_S", "IQ2_XXS", "IQ3_M", "TQ1_0", "TQ2_0", "unknown",
          "fp3_of_tomorrow", "", None]  # fmt: skip


def fail() -> Any:
    raise ProviderTimeout("late", phase="total")


UNLISTED = [lambda: None, lambda: (), lambda: (ModelInfo(name="gemma4:12b-mlx"),), fail,
            lambda: (ModelInfo(name="gemma4:12b-mlx", size=0),),
            lambda: (ModelInfo(name="gemma4:12b", size=9),)]  # fmt: skip


class TestListedSize:
    @pytest.mark.parametrize("level", LEVELS)
    def test_counts_for_every_type(self, level: str | None) -> None:
        listed = (ModelInfo(name="other:1", size=1), ModelInfo(name="gemma4:12b-mlx", size=7_600_000_000))
        limits = Desk(Mac(24, cap=17.76)).ask(mlx(level), 16_384, models=lambda: listed)
        assert limits.context_window == 16_384
        assert limits.warnings == ()

    def test_wins_over_tensors(self) -> None:
        with pytest.raises(ResourceLimitExceeded) as caught:
            Desk(Mac(24)).ask(MIDDLE, models=lambda: (replace(MIDDLE, size=40_000_000_000),))
        assert str(caught.value.reason).startswith("weights 40.0 GB")

    @pytest.mark.parametrize("size", [-1, 384, 900_000_000, 1 << 60])
    def test_impossible_size_is_ignored(self, size: int) -> None:
        listed = (replace(MIDDLE, size=size),)
        limits = Desk(Mac(16)).ask(MIDDLE, models=lambda: listed)
        assert limits.context_window == Desk(Mac(16)).ask(MIDDLE).context_window
        assert limits.warnings == ("Impossible figures of `llama3.1:8b` are ignored: size.",)

    def test_name_is_canonical(self) -> None:
        models = (ModelInfo(name="registry.ollama.ai/library/gemma4:latest", size=7_600_000_000),)
        limits = Desk(Mac(24)).ask(replace(mlx("unknown"), name="Gemma4"), 8192, models=lambda: models)
        assert limits.context_window == 8192
        assert limits.warnings == ()

    @pytest.mark.parametrize("models", UNLISTED)
    def test_missing_size_is_estimated(self, models: Any) -> None:
        limits = Desk(Mac(24, cap=17.76)).ask(mlx("int4"), 4096, models=models)
        assert limits.context_window == 4096
        assert "estimated from 12.0 billion parameters of 5.0 bits" in limits.warnings[0]
        limits = Desk(Mac(8)).ask(mlx("unknown"), 65_536, models=models)
        assert limits.context_window is None
        assert "not known: nothing requested is lowered or refused" in limits.warnings[0]

    def test_list_is_read_once_per_state(self) -> None:
        asked = []

        def models() -> tuple[ModelInfo, ...] | None:
            asked.append(1)
            return (ModelInfo(name="gemma4:12b-mlx", size=7_600_000_000),) if len(asked) > 1 else None

        desk = Desk(Mac(24, cap=17.76))
        for count in (1, 2, 2, 2):
            desk.ask(mlx("int4"), 4096, models=models)
            assert len(asked) == count
        desk.ask(mlx("int4", modified_at=START), 4096, models=models)
        assert len(asked) == 3

    def test_reaches_both_clients(self, both: Any) -> None:
        shown = {
            "details": {"format": "safetensors", "quantization_level": "MXFP6"},
            "model_info": {"general.architecture": "gemma4", "gemma4.context_length": 8192},
            "tensors": [{"name": "a", "type": "MXFP6", "shape": [144_000, 1000]}],
        }
        mac = Mac(16)
        with FakeOllama() as fake:
            fake.script("/api/show", Answer([shown]))
            llm = both.connect(
                "ollama", model="smollm2:135m", host=fake.url, plugins=[graftage_m4.M4(runner=mac, clock=mac.clock)]
            )
            reply = llm.chat("x")
            assert (reply.limits.context_window, reply.warnings) == (8192, ())
            assert [seen.path for seen in fake.requests].count("/api/tags") == 1
            llm.chat("x")
            assert [seen.path for seen in fake.requests].count("/api/tags") == 1


class TestRefusal:
    def test_has_figures_and_ways_out(self) -> None:
        desk = Desk(Mac(24))
        desk.give(SMALL, 4096)
        with pytest.raises(ResourceLimitExceeded) as caught:
            desk.ask(HUGE)
        error = caught.value
        assert (error.limit, error.value) == ("memory", error.details["available"])
        assert error.details["required"] == size_of(HUGE, 4096) > error.details["available"]
        assert (error.details["binding"], error.details["retryable"]) == ("budget", False)
        assert "`llama3.3:70b` needs 46.6 GB with a window of 4096 tokens; this Mac has 15.8 GB for it" in str(error)
        assert error.details["alternatives"] == [{"kind": "model", "model": "qwen3:4b", "loaded": True}]
        assert "Use `qwen3:4b`, which is loaded" in str(error)
        assert "`force=True`" in str(error)

    def test_offers_smaller_window(self) -> None:
        hungry = model("hungry:1", 7.6, layers=60, kv_heads=16)
        with pytest.raises(ResourceLimitExceeded, match="Ask for `context_window=2048`, or go on with") as caught:
            Desk(Mac(16)).ask(hungry)
        assert (caught.value.limit, caught.value.value) == ("context_window", 2048)
        assert caught.value.details["alternatives"] == [{"kind": "context_window", "context_window": 2048}]
        assert Desk(Mac(16)).ask(hungry, 2048).context_window == 2048

    def test_states_assumptions(self) -> None:
        untold = ModelInfo(name="large:1", quantization="MXFP8", parameters="40B")
        with pytest.raises(ResourceLimitExceeded) as caught:
            Desk(Mac(24)).ask(untold)
        assert "the weights are estimated from 40.0 billion parameters of 8.2 bits" in str(caught.value.reason)

    def test_names_memory_of_other_programs(self) -> None:
        with pytest.raises(ResourceLimitExceeded, match=r"only 4\.3 GB are free now.*[Cc]lose programs") as caught:
            Desk(Mac(16, free=6)).ask(MIDDLE)
        assert (caught.value.details["binding"], caught.value.details["retryable"]) == ("live", True)

    def test_offers_known_model_that_fits(self) -> None:
        desk = Desk(Mac(16))
        for seen in (EMBEDDER, SMALL, MIDDLE):
            desk.ask(seen)
        with pytest.raises(ResourceLimitExceeded) as caught:
            desk.ask(HUGE)
        assert caught.value.details["alternatives"] == [{"kind": "model", "model": "qwen3:4b", "loaded": False}]


def test_machine_from_client_settings(both: Any, tmp_path: Path) -> None:
    machine = ASSETS / "mini-16-macos15.json"
    file = tmp_path / "my.toml"
    file.write_text(f"[m4]\nmachine = {machine.as_posix()!r}\n")
    plugin = graftage_m4.M4()
    for source in (file, {"m4": {"machine": machine}}):
        llm = both.connect(Echo(models=[HUGE]), model=HUGE.name, plugins=[plugin], settings=source)
        with pytest.raises(ResourceLimitExceeded, match=r"needs 46"):
            llm.chat("x")


class TestForce:
    def test_overrides_with_warning(self) -> None:
        desk = Desk(Mac(16))
        desk.load(SMALL, 4096)
        limits = desk.ask(HUGE, 8192, force=True)
        assert limits.context_window == 8192
        assert limits.unload == ("qwen3:4b",)
        assert "`force` overrode a refusal" in limits.warnings[0]
        assert "needs 48.1 GB" in limits.warnings[0]
        assert desk.ask(MIDDLE, 4096, force=True).warnings == ()

    def test_reaches_provider(self, both: Any) -> None:
        mac = Mac(16)
        echo = Echo(models=[HUGE])
        llm = both.connect(echo, model=HUGE.name, plugins=[graftage_m4.M4(runner=mac, clock=mac.clock)])
        with pytest.raises(ResourceLimitExceeded) as caught:
            llm.chat("x")
        assert caught.value.plugin == "m4"
        assert [hook for hook, _ in echo.calls if "chat" in hook] == []
        reply = llm.chat("x", context_window=8192, force=True)
        assert echo.requests[-1].context_window == 8192
        assert any("`force` overrode a refusal" in warning for warning in reply.warnings)


class TestLoadedWindow:
    def test_is_kept(self) -> None:
        desk = Desk(Mac(24))
        assert desk.give(MIDDLE, 8192).context_window == 8192
        for _ in range(3):
            assert desk.ask(MIDDLE).context_window == 8192
        assert "is loaded with this window" in desk.ask(MIDDLE).reasons["context_window"]
        desk.loaded.clear()
        assert desk.ask(MIDDLE).context_window == 8192, "the conversation goes on after the model left"

    def test_grows_with_warning_if_it_fits(self) -> None:
        desk = Desk(Mac(24))
        desk.give(MIDDLE, 8192)
        limits = desk.give(MIDDLE, 16_384)
        assert limits.context_window == 16_384
        assert limits.warnings == (
            "The window of `llama3.1:8b` is 16384 instead of 8192, as asked: the server loads it again.",
        )
        assert desk.ask(MIDDLE).context_window == 16_384

    def test_stays_if_larger_does_not_fit(self) -> None:
        desk = Desk(Mac(16))
        desk.give(MIDDLE, 32_768)
        limits = desk.ask(MIDDLE, 131_072)
        assert limits.context_window == 32_768
        assert "a larger one does not fit now" in limits.reasons["context_window"]

    def test_smaller_request_does_not_shrink(self) -> None:
        desk = Desk(Mac(24))
        desk.give(MIDDLE, 16_384)
        less = desk.give(MIDDLE, 4096)
        assert (less.context_window, less.keep_window) == (16_384, True)
        assert desk.ask(MIDDLE).context_window == 16_384

    def test_shrinks_on_request_under_pressure(self) -> None:
        desk = Desk(Mac(24))
        desk.give(MIDDLE, 16_384)
        desk.mac.pressure, desk.mac.now = 2, 10.0
        less = desk.ask(MIDDLE, 4096)
        assert (less.context_window, less.keep_window) == (4096, False)
        assert "is 4096 instead of 16384, as asked: the server loads it again" in less.warnings[0]

    def test_shrinking_warns(self) -> None:
        desk = Desk(Mac(24))
        desk.give(MIDDLE, 32_768)
        desk.loaded.clear()
        desk.mac.pressure, desk.mac.now = 2, 10.0
        limits = desk.ask(MIDDLE)
        assert limits.context_window == 8192
        assert "is 8192 instead of 32768, memory pressure is at warning" in limits.warnings[0]


class TestOtherModels:
    def test_longest_idle_is_unloaded_first(self) -> None:
        desk = Desk(Mac(48))
        for info, minutes in ((SMALL, 9), (MIDDLE, 3), (LARGE, 6)):
            desk.load(info, 16_384, minutes=minutes)
        big = model("big:32b", 17.0, layers=64, embedding=5120)
        assert desk.ask(big, 8192).unload == ("llama3.1:8b", "qwen3:14b")

    def test_busy_model_is_waited_for(self) -> None:
        desk = Desk(Mac(16))
        desk.give(MIDDLE, 16_384)
        desk.used["llama3.1:8b"] = 1
        limits = desk.ask(SMALL)
        assert (limits.wait_for, limits.unload) == (("llama3.1:8b",), ())
        desk.used.clear()
        assert desk.ask(SMALL).unload == ("llama3.1:8b",)

    def test_loading_model_counts(self) -> None:
        desk = Desk(Mac(16))
        desk.ask(MIDDLE, 16_384)
        desk.used["llama3.1:8b"] = 1
        assert desk.ask(SMALL).wait_for == ("llama3.1:8b",)

    def test_other_local_server_counts(self) -> None:
        desk = Desk(Mac(24))
        other = Desk(desk.mac, address="in this process", plugin=desk.plugin)
        assert other.ask(LARGE, 16_384).context_window == 16_384
        assert desk.ask(LARGE, 4096, force=True).warnings
        with pytest.raises(ResourceLimitExceeded):
            Desk(desk.mac, address="http://127.0.0.1:8", plugin=desk.plugin).ask(LARGE, 16_384)

    def test_embedding_model_fits_beside_chat(self) -> None:
        desk = Desk(Mac(16))
        desk.give(MIDDLE, 8192)
        desk.used["llama3.1:8b"] = 1
        limits = desk.ask(EMBEDDER)
        assert (limits.wait_for, limits.unload, limits.context_window) == ((), (), 2048)


class TestUnseen:
    """A server that does not report which models are loaded."""

    def test_models_are_used_one_by_one(self) -> None:
        desk = Desk(Mac(24))
        desk.reports = False
        first = desk.ask(MIDDLE, 8192)
        assert "does not report which models are loaded" in first.warnings[0]
        second = desk.ask(SMALL, 4096)
        assert (second.unload, second.loaded_models) == ((MIDDLE.name,), 1)
        desk.used[SMALL.name] = 1
        assert desk.ask(MIDDLE, 8192).wait_for == (SMALL.name,)
        desk.used.clear()
        desk.reports = True
        seen = desk.ask(SMALL, 4096)
        assert (seen.unload, seen.warnings) == ((), ())

    def test_model_expires(self) -> None:
        desk = Desk(Mac(16))
        desk.reports = False
        desk.ask(MIDDLE, 8192)
        assert desk.ask(SMALL, 4096).unload == (MIDDLE.name,)
        desk.mac.now = 100_000.0
        assert desk.ask(LARGE, 4096, force=True).unload == ()

    @pytest.mark.parametrize(("later", "gone"), [(800, (MIDDLE.name,)), (1400, (MIDDLE.name,)), (1600, ())])
    def test_expiry_includes_longest_call(self, later: float, gone: tuple[str, ...]) -> None:
        desk = Desk(Mac(24))
        desk.reports = False
        assert desk.ask(MIDDLE, 8192).keep_alive == 900
        desk.mac.now += later
        assert desk.ask(SMALL, 4096).unload == gone

    def test_departed_model_is_not_counted(self) -> None:
        desk = Desk(Mac(24))
        desk.give(MIDDLE, 8192)
        desk.loaded.clear()
        desk.give(SMALL, 4096)
        desk.reports = False
        assert desk.ask(LARGE, 4096).unload == (SMALL.name,)


class TestReported:
    def test_slots_are_learned_from_size(self) -> None:
        desk = Desk(Mac(24))
        desk.ask(MIDDLE, 8192)
        alone = desk.ask(SMALL, 131_072).context_window
        shape = read_shape(MIDDLE)
        assert shape is not None
        size = footprint(shape, 8192, slots=4).counted
        desk.loaded["llama3.1:8b"] = LoadedModel(
            name="llama3.1:8b", size=size, accelerator_size=size, context_window=8192
        )
        assert (alone, desk.ask(SMALL, 131_072).context_window) == (40_960, 16_384)

    def test_understated_size_is_not_believed(self) -> None:
        desk = Desk(Mac(24))
        desk.ask(MIDDLE, 32_768)
        desk.load(MIDDLE, 32_768, reported=0.3)
        desk.used["llama3.1:8b"] = 1
        assert desk.ask(LARGE, 4096).wait_for == ("llama3.1:8b",)

    def test_model_partly_on_cpu(self) -> None:
        desk = Desk(Mac(24))
        desk.ask(MIDDLE, 16_384)
        desk.load(MIDDLE, 16_384, part=0.8)
        limits = desk.ask(MIDDLE)
        assert limits.concurrent_requests == 1
        assert "runs on the CPU" in limits.warnings[0]
        desk.loaded.clear()
        assert desk.ask(MIDDLE).context_window == 8192

    def test_runner_is_added_to_size(self) -> None:
        desk = Desk(Mac(24))
        collector = Collector(desk.mac, desk.mac.clock)
        budget = budget_of(collector.static(), collector.readings())
        assert budget is not None
        room = budget.static - size_of(SMALL, 4096)
        for reported, gone in ((room - RUNTIME, ()), (room - RUNTIME // 2, ("other:1",))):
            desk.loaded = {"other:1": LoadedModel(name="other:1", size=reported, accelerator_size=reported)}
            assert desk.ask(SMALL, 4096).unload == gone


class TestLedger:
    def test_is_shared_per_machine(self) -> None:
        file = ASSETS / "mini-16-macos15.json"
        one, other = graftage_m4.M4(machine=file), graftage_m4.M4(machine=str(file))
        address = "http://127.0.0.1:1"
        first = Desk(Mac(), address, one)
        first.ask(MIDDLE, 16_384)
        first.used[MIDDLE.name] = 1
        second = Desk(Mac(), address, other)
        second.used = first.used
        assert second.ask(SMALL).wait_for == (MIDDLE.name,)
        elsewhere = Desk(Mac(), "http://127.0.0.1:2", graftage_m4.M4(machine=file))
        with pytest.raises(ResourceLimitExceeded) as caught:
            elsewhere.ask(SMALL)
        assert caught.value.details["retryable"] is True
        first.used.clear()
        assert elsewhere.ask(SMALL).context_window, "with a machine file, its server may be gone"

    def test_custom_clock_starts_empty(self) -> None:
        file, mac = ASSETS / "mini-16-macos15.json", Mac()
        for _ in range(2):
            desk = Desk(mac, "http://127.0.0.1:3", graftage_m4.M4(machine=file, clock=mac.clock))
            desk.used[MIDDLE.name] = 1
            assert desk.ask(SMALL).wait_for == ()
            desk.ask(MIDDLE)

    def test_local_addresses_are_one_server(self) -> None:
        desk = Desk(Mac(16))
        other = Desk(desk.mac, "http://localhost:11434/", desk.plugin)
        desk.give(MIDDLE, 16_384)
        other.loaded = desk.loaded
        assert other.ask(SMALL).unload == (MIDDLE.name,)
        assert other.ask(MIDDLE).context_window == 16_384

    def test_model_busy_through_other_address(self) -> None:
        desk = Desk(Mac(16))
        other = Desk(desk.mac, "http://[::1]:11434", desk.plugin)
        limits = desk.ask(MIDDLE, 16_384)
        for seen in ({}, desk.loaded):
            other.loaded = dict(seen)
            with pytest.raises(ResourceLimitExceeded, match=r"in use elsewhere.*nload models elsewhere") as caught:
                other.ask(SMALL, 32_768)
            assert caught.value.details["retryable"] is True
            desk.used[MIDDLE.name] = 1
            desk.load(MIDDLE, limits.context_window or 0)

    @pytest.mark.parametrize(
        ("address", "other", "same"),
        [
            ("http://127.0.0.1:11434", "http://LOCALHOST:11434/", True),
            ("http://127.0.0.1", "http://localhost:80", True),
            ("http://127.0.0.1:11434", "http://0.0.0.0:11434", True),
            ("http://127.0.0.1:11434", "http://127.0.0.1:11435", False),
            ("http://192.0.2.7:11434", "http://127.0.0.1:11434", False),
            ("http://127.0.0.1:99999", "http://127.0.0.1:11434", False),
            ("engine", "http://127.0.0.1:11434", False),
        ],
    )
    def test_server_is_identified_by_port(self, address: str, other: str, *, same: bool) -> None:
        assert (server_of(address) == server_of(other)) is same

    def test_fork_drops_parent_requests(self) -> None:
        ledger = Ledger()
        ledger.register_usage("x", ("ollama", "x"), lambda: {"a:1": 1})
        assert ledger.in_use("x") == {"a:1"}
        with ledger.lock:
            ledger.reset_after_fork()
        assert ledger.lock.acquire(blocking=False)
        assert ledger.in_use("x") == set()


class TestPromise:
    def test_warns_until_window_is_back(self) -> None:
        desk = Desk(Mac(24))
        desk.give(MIDDLE, 32_768)
        desk.loaded.clear()
        desk.mac.pressure, desk.mac.now = 2, 10.0
        for _ in range(3):  # The first reply may have failed before it was read.
            limits = desk.give(MIDDLE)
            assert limits.warnings == (
                "The window of `llama3.1:8b` is 8192 instead of 32768, memory pressure is at warning.",
            )
        desk.mac.pressure = 1
        for now in (20.0, 40.0, 60.0, 80.0):
            desk.mac.now = now
            limits = desk.give(MIDDLE)
        assert (limits.context_window, desk.ask(MIDDLE).warnings) == (32_768, ())

    def test_smaller_request_keeps_promise(self) -> None:
        desk = Desk(Mac(24))
        desk.give(MIDDLE, 16_384)
        desk.loaded.clear()
        less = desk.give(MIDDLE, 4096)
        assert (less.context_window, less.warnings) == (4096, ())
        assert desk.give(MIDDLE).context_window == 16_384
        desk.loaded.clear()
        desk.give(MIDDLE, 4096)
        desk.mac.free = 0
        back = desk.ask(MIDDLE)
        assert back.context_window == 4096
        assert "is 4096 instead of 16384" in back.warnings[0]
        assert desk.ask(MIDDLE, 4096).warnings == (), "the caller asked for it"

    def test_warns_while_over_budget(self) -> None:
        desk = Desk(Mac(16))
        desk.give(MIDDLE, 131_072, force=True)
        for _ in range(2):
            assert "Models use 23.9 GB, more than their budget of 10.4 GB" in desk.give(MIDDLE).warnings[0]
        desk.loaded.clear()
        assert not any("Models use" in each for each in desk.give(MIDDLE).warnings)


ODD_FIGURES: list[dict[str, Any]] = [
    {"context_window": 10**12}, {"context_window": -1}, {"context_window": "8192"}, {"context_window": 10**7},
    {"size": -(10**11)}, {"size": 10**30}, {"size": "12"}, {"size": float("nan")}, {"accelerator_size": -5},
]  # fmt: skip


ODD_FACTS: list[dict[str, Any]] = [
    {"block_count": 10**9}, {"context_length": "8192"}, {"context_length": -1}, {"context_length": 1},
    {"attention__head_count_kv": 1 << 49}, {"embedding_length": float("inf")},
]  # fmt: skip


class TestOddFigures:
    def test_wrong_slots_are_forgotten(self) -> None:
        desk = Desk(Mac(24))
        desk.give(MIDDLE, 8192)
        desk.load(MIDDLE, 8192, reported=1.9)
        during = desk.ask(SMALL, 131_072).context_window or 0
        desk.load(MIDDLE, 8192)
        assert during < (desk.ask(SMALL, 131_072).context_window or 0) == 40_960

    @pytest.mark.parametrize("figures", ODD_FIGURES, ids=str)
    def test_loaded_figures_are_reported(self, figures: dict[str, Any]) -> None:
        desk = Desk(Mac(16))
        desk.load(MIDDLE, 8192)
        desk.loaded[MIDDLE.name] = replace(desk.loaded[MIDDLE.name], **figures)
        limits = desk.ask(MIDDLE)
        assert limits.context_window in (8192, 16_384)
        assert "Impossible figures of loaded models are ignored: 'llama3.1:8b'" in limits.warnings[-1]
        assert "Impossible figures of loaded models" in desk.ask(SMALL, 4096).warnings[-1]

    def test_nameless_model_counts(self) -> None:
        desk = Desk(Mac(16))
        desk.load(replace(MIDDLE, name=""), 16_384)
        with pytest.raises(ResourceLimitExceeded, match="elsewhere"):
            desk.ask(SMALL, 32_768)

    @pytest.mark.parametrize("year", [1, 9999])
    def test_extreme_expiry(self, year: int) -> None:
        desk = Desk(Mac(16))
        desk.give(MIDDLE, 8192)
        desk.loaded[MIDDLE.name] = replace(desk.loaded[MIDDLE.name], expires_at=datetime(year, 1, 1))  # noqa: DTZ001
        assert desk.ask(SMALL).unload == (MIDDLE.name,)

    def test_thousands_of_models_are_fast(self) -> None:
        desk = Desk(Mac(16))
        for number in range(3000):
            desk.loaded[f"m{number}:1"] = LoadedModel(name=f"m{number}:1", size=1000, expires_at=START)
        calls: Counter[str] = Counter()
        sys.setprofile(lambda frame, event, _: calls.update([frame.f_code.co_name] if event == "call" else []))
        try:
            limits = desk.ask(MIDDLE)
        finally:
            sys.setprofile(None)
        assert len(limits.unload) == 3000
        assert 0 < calls["fits"] < 100

    @pytest.mark.parametrize("facts", ODD_FACTS, ids=str)
    def test_model_facts_are_reported(self, facts: dict[str, Any]) -> None:
        odd = model("odd:1", 1.0)
        changed = {f"test.{key.replace('__', '.')}": value for key, value in facts.items()}
        odd = replace(odd, context_window=-1, metadata={**odd.metadata, **changed})
        limits = Desk(Mac(16)).ask(odd)
        assert 4096 <= (limits.context_window or 0) <= 32_768
        assert "Impossible figures of `odd:1` are ignored:" in limits.warnings[0]


def ill(**how: Any) -> Desk:
    mac = Mac(24)
    for name, value in how.items():
        setattr(mac, name, value)
    return Desk(mac)


class TestPressure:
    def test_warning_limits_and_drops_idle(self) -> None:
        desk = ill(pressure=2)
        desk.load(EMBEDDER, 2048)
        limits = desk.ask(MIDDLE, 32_768)
        assert (limits.context_window, limits.concurrent_requests) == (8192, 1)
        assert (limits.loaded_models, limits.keep_alive) == (1, 60)
        assert limits.unload == (EMBEDDER.name,)
        assert "memory pressure is at warning" in limits.reasons["concurrent_requests"]

    def test_critical_loads_nothing(self) -> None:
        desk = Desk(Mac(24))
        desk.give(MIDDLE, 8192)
        desk.load(SMALL, 4096)
        desk.mac.pressure, desk.mac.now = 4, 10.0
        limits = desk.ask(MIDDLE)
        assert (limits.context_window, limits.concurrent_requests, limits.keep_alive) == (8192, 1, 0)
        assert limits.unload == ("qwen3:4b",)
        with pytest.raises(ResourceLimitExceeded, match=r"critical.*30 s.*`llama3\.1:8b`") as caught:
            desk.ask(LARGE)
        assert (caught.value.limit, caught.value.details["retry_after"]) == ("memory_pressure", 30)
        assert desk.ask(MIDDLE, 16_384).context_window == 8192, "and it is not loaded again with more"

    def test_swapping_lowers_window(self) -> None:
        desk = Desk(Mac(24))
        assert desk.ask(MIDDLE, 32_768).context_window == 32_768
        desk.mac.now, desk.mac.swapouts = 10.0, 1000 + 10 * 70_000_000 // PAGE
        limits = desk.ask(MIDDLE, 32_768)
        assert (limits.context_window, limits.concurrent_requests, limits.keep_alive) == (16_384, 1, 300)
        assert "swapped" in limits.reasons["context_window"]

    def test_rising_decompressions_count(self) -> None:
        watch, page = Watch(), PAGE

        def look(at: float, megabytes: int) -> Any:
            pages = {"swapouts": 0, "decompressions": megabytes * 1_000_000 // page}
            return watch.rules(Readings(at=at, pressure=1, thermal=0, low_power=False, page=page, pages=pages)).steps

        assert [look(0, 0), look(10, 700), look(20, 1500), look(30, 2000)] == [0, 0, 1, 1]

    @pytest.mark.parametrize("level", [3, 4])
    def test_too_hot_loads_nothing(self, level: int) -> None:
        with pytest.raises(ResourceLimitExceeded, match="too hot") as caught:
            ill(thermal=level).ask(MIDDLE)
        assert (caught.value.limit, caught.value.details["retry_after"]) == ("thermal_pressure", 60)

    @pytest.mark.parametrize(
        ("how", "says"),
        [({"thermal": 2}, "hot"), ({"low_power": 1}, "low power"), ({"thermal": "?"}, "not measured")],
    )
    def test_heat_or_low_power_allows_one_request(self, how: Mapping[str, Any], says: str) -> None:
        limits = ill(**how).ask(SMALL, 4096)
        assert limits.concurrent_requests == 1
        assert says in limits.reasons["concurrent_requests"]
        assert limits.context_window == 4096

    def test_unknown_is_not_normal(self) -> None:
        limits = ill(pressure="?").ask(SMALL, 4096)
        assert (limits.concurrent_requests, limits.loaded_models, limits.keep_alive) == (1, 1, 300)
        assert "could not be measured" in limits.warnings[0]

    def test_relaxes_after_three_good_samples(self) -> None:
        desk = ill(pressure=2)
        seen = []
        for now, pressure in [(0, 2), (5, 1), (15, 1), (25, 1), (34, 1), (36, 1), (40, 2), (45, 1), (60, 4)]:
            desk.mac.now, desk.mac.pressure = float(now), pressure
            try:
                seen.append(desk.ask(SMALL, 4096).keep_alive)
            except ResourceLimitExceeded:
                seen.append(None)
        assert seen == [60, 60, 60, 60, 60, 1800, 60, 60, None]

    def test_burst_is_one_sample(self) -> None:
        desk = ill(pressure=2)
        desk.ask(SMALL, 4096)
        desk.mac.pressure, desk.mac.now = 1, 5.0
        for _ in range(20):
            assert desk.ask(SMALL, 4096).keep_alive == 60
        desk.mac.now = 36.0
        for _ in range(20):
            assert desk.ask(SMALL, 4096).keep_alive == 60


def given_or_nothing(desk: Desk, info: ModelInfo, window: int | None) -> tuple[float, ...]:
    try:
        limits = desk.ask(info, window)
    except ResourceLimitExceeded:
        return (0.0, 0.0, 0.0)
    return (limits.context_window or 0, limits.loaded_models or 0, limits.keep_alive or 0)


class TestMonotonic:
    @settings(max_examples=200)
    @given(
        st.sampled_from(list(MODELS.values())),
        st.none() | st.integers(512, 200_000),
        st.integers(8, 128),
        st.integers(0, 64),
        st.floats(0.3, 1.0),
    )
    def test_more_memory_never_gives_less(
        self, info: ModelInfo, window: int | None, gigabytes: int, more: int, free: float
    ) -> None:
        small, large = (
            given_or_nothing(Desk(Mac(size, free=size * free, cap=size * 2 / 3)), info, window)
            for size in (gigabytes, gigabytes + more)
        )
        assert all(less <= greater for less, greater in zip(small, large, strict=True))

    @settings(max_examples=100)
    @given(st.sampled_from([SMALL, MIDDLE, LARGE]), st.integers(512, 100_000), st.integers(0, 100_000))
    def test_larger_request_never_gets_less(self, info: ModelInfo, window: int, more: int) -> None:
        small, large = (Desk(Mac(24)).ask(info, each).context_window or 0 for each in (window, window + more))
        assert min(small, *LADDER) <= large
        assert small <= large or small not in LADDER


@dataclass
class Running:
    """A request that was admitted."""

    server: str
    model: str
    window: int
    loaded: bool = False


class BudgetMachine(RuleBasedStateMachine):
    """Two servers on one Mac: requests come, load, end and crash, while memory and pressure change."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    @initialize(gigabytes=st.sampled_from([16, 24, 32, 48, 64]), slots=st.sampled_from([1, 1, 2]))
    def begin(self, gigabytes: int, slots: int) -> None:
        self.mac = Mac(gigabytes)
        self.slots = slots
        plugin = graftage_m4.M4(runner=self.mac, clock=self.mac.clock, slots=slots)
        self.desks = {
            address: Desk(self.mac, address=address, plugin=plugin) for address in ("http://127.0.0.1:11434", "engine")
        }
        self.requests: list[Running] = []
        self.expires: dict[tuple[str, str], float] = {}
        self.others = 4 * GIB
        collector = Collector(self.mac, self.mac.clock)
        budget = budget_of(collector.static(), collector.readings())
        assert budget is not None
        self.budget = budget
        self.settle()

    # Facts

    def windows(self) -> dict[tuple[str, str], int]:
        """Return the models in memory or admitted, with the largest window that each has or will have."""
        found = {
            (address, name): each.context_window or 0
            for address, desk in self.desks.items()
            for name, each in desk.loaded.items()
        }
        for each in self.requests:
            key = (each.server, each.model)
            found[key] = max(found.get(key, 0), each.window)
        return found

    def size(self, model: str, window: int) -> int:
        shape = read_shape(MODELS[model])
        assert shape is not None
        return footprint(shape, window, slots=self.slots).total

    def settle(self) -> None:
        """Derive the Mac's free memory from what is loaded."""
        held = sum(
            self.size(name, each.context_window or 0)
            for desk in self.desks.values()
            for name, each in desk.loaded.items()
        )
        self.mac.free = max(self.mac.memory - self.others - held, 0)

    # Events

    @rule(
        server=st.sampled_from(["http://127.0.0.1:11434", "engine"]),
        name=st.sampled_from(list(MODELS)),
        window=st.none() | st.sampled_from([1024, 4096, 6000, 16_384, 65_536]),
    )
    def call(self, server: str, name: str, window: int | None) -> None:
        desk = self.desks[server]
        before = self.windows().get((server, name))
        try:
            limits = desk.ask(MODELS[name], window)
        except ResourceLimitExceeded:
            return
        if any(desk.used[each] for each in limits.wait_for):
            return  # The core would ask again later.
        for each in limits.unload:
            assert not desk.used[each]
            desk.loaded.pop(each, None)
        self.settle()
        assert limits.context_window
        asked = limits.context_window if window is None else min(window, limits.context_window)
        if before is None:
            free = self.mac.free - self.budget.live_reserve - self.coming()
            assert self.size(name, asked) <= free
        desk.used[name] += 1
        self.requests.append(Running(server, name, asked))
        self.expires[server, name] = limits.keep_alive or 0

    def coming(self) -> int:
        """Return the bytes that admitted models will still take."""
        return sum(
            self.size(name, window) - self.has(server, name) for (server, name), window in self.windows().items()
        )

    def has(self, server: str, name: str) -> int:
        """Return the bytes that a model has taken."""
        loaded = self.desks[server].loaded.get(name)
        return self.size(name, loaded.context_window or 0) if loaded else 0

    @precondition(lambda self: any(not each.loaded for each in self.requests))
    @rule(data=st.data(), reported=st.floats(0.5, 1.0))
    def load(self, data: st.DataObject, reported: float) -> None:
        """The server loads the model of a request, and may understate its size."""
        each = data.draw(st.sampled_from([each for each in self.requests if not each.loaded]))
        each.loaded = True
        shape = read_shape(MODELS[each.model])
        assert shape is not None
        size = int(footprint(shape, each.window, slots=self.slots).counted * reported)
        self.desks[each.server].loaded[each.model] = LoadedModel(
            name=each.model, size=size, accelerator_size=size, context_window=each.window, expires_at=START
        )
        self.settle()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        each = data.draw(st.sampled_from(self.requests))
        self.requests.remove(each)
        self.desks[each.server].used[each.model] -= 1

    @rule(server=st.sampled_from(["http://127.0.0.1:11434", "engine"]))
    def crash(self, server: str) -> None:
        """The server crashes: its models are gone, and its requests have failed."""
        self.desks[server].loaded.clear()
        self.desks[server].used.clear()
        self.requests = [each for each in self.requests if each.server != server]
        self.settle()

    @rule(
        seconds=st.sampled_from([1, 10, 31, 120]),
        pressure=st.sampled_from([1, 1, 1, 2, 4, "?"]),
        heat=st.sampled_from([0, 0, 1, 2, 3, "?"]),
    )
    def time_passes(self, seconds: int, pressure: int | str, heat: int | str) -> None:
        self.mac.now += seconds
        self.mac.pressure, self.mac.thermal = pressure, heat

    @rule(gigabytes=st.floats(1.0, 12.0))
    def other_programs(self, gigabytes: float) -> None:
        """The memory of other programs changes before the policy reads it again."""
        self.others = int(gigabytes * GIB)
        self.mac.now += 3
        self.settle()

    @precondition(lambda self: any(desk.loaded for desk in self.desks.values()))
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        idle = [(address, name) for address, desk in self.desks.items() for name in desk.loaded if not desk.used[name]]
        if idle:
            address, name = data.draw(st.sampled_from(idle))
            del self.desks[address].loaded[name]
            self.settle()

    @invariant()
    def budget_is_never_exceeded(self) -> None:
        if hasattr(self, "budget"):
            total = sum(self.size(name, window) for (_, name), window in self.windows().items())
            assert total <= self.budget.static


TestBudget = BudgetMachine.TestCase
TestBudget.settings = settings(max_examples=100, stateful_step_count=40)
