"""`graftage m4`: the plan against the published table, the picture, the watch, the recording."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import graftage_m4
from graftage.footprint import Shape, read_shape
from graftage.types import ModelInfo
from graftage_m4 import _plan
from graftage_m4._commands import app
from graftage_m4._machine import decode_speed, prefill_seconds
from graftage_ollama.testing import FakeOllama

ASSETS = Path(__file__).parent / "assets"
SMALLEST = ASSETS / "mini-16-macos15.json"


def shape(  # noqa: PLR0917 - the columns of a table
          layers: int, heads: int, kv_heads: int, length: int, embedding: int, vocabulary: int, gigabytes: float,
          billions: float, trained: int, architecture: str = "llama", **more: Any) -> Shape:  # fmt: skip
    keys = {
        "block_count": layers, "attention.head_count": heads, "attention.head_count_kv": kv_heads,
        "attention.key_length": length, "attention.value_length": length, "embedding_length": embedding,
        "vocab_size": vocabulary, "context_length": trained, **{key.replace("__", "."): more[key] for key in more},
    }  # fmt: skip
    metadata = {f"{architecture}.{key}": value for key, value in keys.items()}
    found = read_shape(
        ModelInfo(
            name="x:1",
            architecture=architecture,
            size=int(gigabytes * 1e9),
            metadata={**metadata, "general.parameter_count": int(billions * 1e9)},
        )
    )
    assert found is not None
    return found


EXPERTS = {"expert_count": 128, "expert_used_count": 8}
NINE = {
    "qwen3:4b": shape(36, 32, 8, 128, 2560, 151_936, 2.5, 4.0, 262_144),
    "llama3.1:8b": shape(32, 32, 8, 128, 4096, 128_256, 4.9, 8.0, 131_072),
    "gemma3:12b": shape(48, 16, 8, 256, 3840, 262_144, 8.1, 12.2, 131_072, "gemma3", attention__sliding_window=1024),
    "qwen3:14b": shape(40, 40, 8, 128, 5120, 151_936, 9.3, 14.8, 40_960),
    "gpt-oss:20b": shape(24, 64, 8, 64, 2880, 201_088, 13.8, 20.9, 131_072, "gptoss",
                         attention__sliding_window=128, expert_count=32, expert_used_count=4),
    "gemma3:27b": shape(62, 32, 16, 128, 5376, 262_144, 17.4, 27.4, 131_072, "gemma3", attention__sliding_window=1024),
    "qwen3:30b-a3b": shape(48, 32, 4, 128, 2048, 151_936, 18.6, 30.5, 262_144, "qwen3moe", **EXPERTS),
    "qwen3:32b": shape(64, 64, 8, 128, 5120, 151_936, 20.2, 32.8, 40_960),
    "llama3.3:70b": shape(80, 64, 8, 128, 8192, 128_256, 42.5, 70.6, 131_072),
}  # fmt: skip
"""The models of the published table, by their published configurations."""

K = 1024
TABLE: dict[tuple[int, int], tuple[int | None, ...]] = {
    (16, 15): (32, 16, 4, None, None, None, None, None, None),
    (16, 26): (32, 32, 16, 4, None, None, None, None, None),
    (24, 15): (64, 32, 64, 16, 16, None, None, None, None),
    (24, 26): (64, 64, 64, 32, 64, None, None, None, None),
    (32, 15): (64, 64, 128, 32, 128, 8, 8, None, None),
    (32, 26): (128, 128, 128, 32, 128, 32, 32, 8, None),
    (48, 15): (128, 128, 128, 32, 128, 128, 128, 32, None),
    (48, 26): (128, 128, 128, 32, 128, 128, 128, 32, None),
    (64, 15): (256, 128, 128, 32, 128, 128, 128, 32, 4),
    (64, 26): (256, 128, 128, 32, 128, 128, 256, 32, 16),
}
"""As published: the largest window in thousands, for each of the nine; a trained limit of 40 960 is the step 32."""


def largest(machine: str) -> list[int | None]:
    """Return the largest window of each of the nine, in thousands; `pytest -s` shows the whole plan."""
    policy = graftage_m4.M4(machine=ASSETS / f"{machine}.json").policy()
    assert policy is not None
    mac = _plan.read_mac(policy)
    assert mac is not None
    windows = (*_plan.WINDOWS, 262_144)
    plan = _plan.rows(NINE, mac, policy, windows)
    sys.stdout.write(f"\n{mac.title}, budget {mac.budget.description}\n")
    sys.stdout.writelines("  ".join(f"{cell:18}" for cell in cells) + "\n" for cells in _plan.lines(plan))
    return [row.largest and row.largest // K for row in plan]


class TestEstimates:
    @pytest.mark.parametrize(("gigabytes", "system"), list(TABLE))
    def test_windows_near_published_table(self, gigabytes: int, system: int) -> None:
        ours, published = largest(f"mini-{gigabytes}-macos{system}"), TABLE[gigabytes, system]
        for name, mine, theirs in zip(NINE, ours, published, strict=True):
            sys.stdout.write(
                f"{gigabytes:2} GB macOS {system} {name:14} plan {mine or 'no':>4}  table {theirs or 'no':>4}\n"
            )
        steps = [None, 4, 8, 16, 32, 64, 128, 256]
        distances = [abs(steps.index(mine) - steps.index(theirs)) for mine, theirs in zip(ours, published, strict=True)]
        assert max(distances) <= 1

    @pytest.mark.parametrize(
        ("name", "chip", "measured"),
        [
            ("llama3.1:8b", "Apple M4", 20.9),
            ("qwen3:14b", "Apple M4", 11.0),
            ("gpt-oss:20b", "Apple M4", 22.5),
            ("gemma3:27b", "Apple M4 Pro", 13.2),
            ("qwen3:30b-a3b", "Apple M4 Pro", 70.6),
        ],
    )
    def test_decode_speed_near_measured(self, name: str, chip: str, measured: float) -> None:
        speed = decode_speed(NINE[name], chip)
        assert speed == pytest.approx(measured, rel=0.25)

    def test_prefill_matches_measured(self) -> None:
        assert prefill_seconds(NINE["llama3.1:8b"], "Apple M4", 26_400) == pytest.approx(120)
        assert prefill_seconds(NINE["qwen3:14b"], "Apple M4", 15_000) == pytest.approx(120, rel=0.1)
        assert prefill_seconds(NINE["llama3.1:8b"], "Apple M4", 1000, low_power=True) == pytest.approx(
            1000 / 220 / 0.65
        )

    def test_unknown_chip_has_no_speed(self) -> None:
        assert decode_speed(NINE["qwen3:4b"], "Apple M9 Ultra") is None
        assert prefill_seconds(NINE["qwen3:4b"], None, 4096) is None


# --- The command -----------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture
def host() -> Any:
    with FakeOllama(models=["smollm2:135m", "second:1b"]) as fake:
        yield fake.url


def plan(host: str, *arguments: object) -> Any:
    return run("plan", "-p", "ollama", "--host", host, "--machine", SMALLEST, *arguments)


class TestPlan:
    def test_table_of_models_by_windows(self, host: str) -> None:
        result = plan(host)
        assert result.exit_code == 0
        assert "Apple M4, 16 GB, macOS 15.4" in result.stdout
        assert "budget 10.4 GB: Metal's working set of 11.5 GB less 1.1 GB" in result.stdout
        rows = {line.split()[0]: line for line in result.stdout.splitlines() if line}
        assert "fits 0.6 GB 1s" in rows["smollm2:135m"]
        assert rows["smollm2:135m"].split()[-1] == "-", "it was not trained for 128k"
        assert "second:1b" in rows

    def test_json_has_bytes_and_seconds(self, host: str) -> None:
        answer = json.loads(plan(host, "smollm2:135m", "--json").stdout)
        (row,) = answer["models"]
        assert answer["budget"]["source"] == "metal"
        assert row["largest_window"] == 8192
        assert [cell["verdict"] for cell in row["windows"]][:3] == ["fits", "fits", "untrained"]
        assert all(cell["bytes"] > 0 and cell["prefill"] > 0 for cell in row["windows"])

    def test_picture_has_budget_line(self, host: str, tmp_path: Path) -> None:
        path = tmp_path / "plan.svg"
        assert plan(host, "--plot", path).exit_code == 0
        text = path.read_text()
        root = ET.fromstring(text)
        space = "{http://www.w3.org/2000/svg}"
        assert root.tag == f"{space}svg"
        assert len(root.findall(f"{space}polyline")) == 2
        assert "budget 10.4 GB" in text
        assert "smollm2:135m" in text

    def test_picture_escapes_names(self) -> None:
        policy = graftage_m4.M4(machine=SMALLEST).policy()
        assert policy is not None
        mac = _plan.read_mac(policy)
        assert mac is not None
        models = {'<script>alert("x")</script>&\x1b[2J': NINE["qwen3:4b"], **NINE}
        root = ET.fromstring(_plan.picture(models, mac, policy))
        labels = [each.text or "" for each in root.iter() if each.text]
        assert any("<script>" in each and "\x1b" not in each for each in labels)

    def test_misfit_exits_1_unless_forced(self, host: str, tmp_path: Path) -> None:
        tiny = json.loads(SMALLEST.read_text())
        tiny["readings"][0]["stdout"] = tiny["readings"][0]["stdout"].replace("17179869184", "2147483648")
        tiny["readings"][1]["stdout"] = '{"recommended_working_set": 1431655765}'
        path = tmp_path / "tiny.json"
        path.write_text(json.dumps(tiny))
        arguments = ("plan", "-p", "ollama", "--host", host, "--machine", path)
        assert run(*arguments, "smollm2:135m").exit_code == 1
        assert run(*arguments, "smollm2:135m", "--force").exit_code == 0
        assert run(*arguments).exit_code == 0


class TestOffMac:
    def test_watch_hints_at_machine_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.platform", "linux")
        result = run("watch", "--count", 1)
        assert result.exit_code == 1
        assert "machine file with `--machine`" in str(result.exception)

    def test_record_hints_at_the_mac(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.platform", "linux")
        error = run("record").exception
        assert error.hint.startswith("Record on the Mac itself; ")
        assert "m4 plan --machine" in error.hint, "only as an option of another command"


class TestWatch:
    def test_shows_readings_and_limits(self) -> None:
        result = run("watch", "--machine", SMALLEST, "--count", 1)
        assert result.stdout.startswith("pressure 1 · available 71 % · swap 0.1 GB · thermal 0 · low power False")
        assert "loads allowed" in result.stdout

    def test_json_explains_unknown(self, tmp_path: Path) -> None:
        path = tmp_path / "machine.json"
        content = json.loads(SMALLEST.read_text())
        content["readings"] = [each for each in content["readings"] if each["name"] in ("static", "vm_stat")]
        path.write_text(json.dumps(content))
        moment = json.loads(run("watch", "--machine", path, "--count", 1, "--json").stdout)
        assert (moment["pressure"], moment["thermal"], moment["concurrency"]) == (None, None, 1)
        assert moment["unknown"]["pressure"] == "memory: not in the machine file"
        assert "the memory pressure is not measured" in moment["why"]


def test_recording_can_be_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTAGE_M4_MACHINE", str(SMALLEST))
    path = tmp_path / "again.json"
    assert run("record", path, "--title", "again").exit_code == 0
    assert json.loads(path.read_text())["title"] == "again"
    first, second = (run("watch", "--machine", each, "--count", 1, "--json").stdout for each in (SMALLEST, path))
    old, new = json.loads(first), json.loads(second)
    assert {**old, "at": 0} == {**new, "at": 0}
    assert json.loads(run("record").stdout)["format"] == "graftage-m4 machine 1"
