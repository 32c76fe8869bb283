"""Readings of a Mac: parsed strictly, reused while valid, recorded without names, replayed anywhere."""

from __future__ import annotations

import json
import os
import stat
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import graftage_m4
from graftage.exceptions import SettingsError
from graftage_m4._machine import (
    READINGS,
    Collector,
    Live,
    MachineFile,
    Output,
    Reading,
    Readings,
    Recorded,
    Sample,
    Static,
    budget_of,
    read_live,
    read_machine,
    read_static,
    record,
    redact,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

ASSETS = Path(__file__).parent / "assets"
MACHINES = sorted(path for path in ASSETS.glob("mini-*.json"))
GIB = 1 << 30

VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                   240117.
Pages active:                                 612410.
Pages inactive:                               598233.
Pages speculative:                             12870.
Pages throttled:                                   0.
Pages wired down:                            1102336.
Pages purgeable:                                6112.
"Translation faults":                      412339021.
Pages copy-on-write:                        18772104.
Pages tagged (MTE):                              104.
File-backed pages:                            402118.
Pages occupied by compressor:                 208844.
Decompressions:                             30112784.
Swapouts:                                     918224.
"""
MEMORY = """\
kern.memorystatus_vm_pressure_level: 1
kern.memorystatus_level: 71
vm.swapusage: total = 1024.00M  used = 96.50M  free = 927.50M  (encrypted)
iogpu.wired_limit_mb: 0
"""
THERMAL = "com.apple.system.thermalpressurelevel 0\n"
POWER = " lowpowermode         0\n sleep                10 (sleep prevented by useractivityd, sharingd)\n"
METAL = '{"recommended_working_set": 12713115648, "largest_buffer": 9534832640}\n'


def outputs(**changed: Output | str) -> dict[str, Output]:
    """All outputs of a Mac that is well, with changes."""
    usual: dict[str, Output | str] = {
        "metal": METAL,
        "memory": MEMORY,
        "vm_stat": VM_STAT,
        "thermal": THERMAL,
        "power": POWER,
    }
    given = {**usual, **changed}
    return {name: Output(each) if isinstance(each, str) else each for name, each in given.items()}


class Script:
    """A runner with scripted outputs that counts its calls."""

    def __init__(self, **answers: Output | str) -> None:
        self.answers = outputs(**answers)
        self.ran: list[str] = []

    def run(self, reading: Reading) -> Output:
        self.ran.append(reading.name)
        return self.answers.get(reading.name, Output(exit=1, problem="not scripted"))


class Clock:
    """Seconds that pass on demand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


UNKNOWN: list[tuple[str, Output | str, str]] = [
    ("pressure", MEMORY.replace("level: 1", "level: 3"), "memory"),
    ("pressure", MEMORY.replace("kern.memorystatus_vm_pressure_level: 1\n", ""), "memory"),
    ("pressure", Output(MEMORY, exit=1), "memory"),
    ("pressure", Output(exit=1, problem="no output within 2 s"), "memory"),
    ("available_percent", MEMORY.replace("71", "171"), "memory"),
    ("wired_limit", MEMORY.replace("iogpu.wired_limit_mb: 0\n", ""), "memory"),
    ("wired_limit", MEMORY.replace("mb: 0", "mb: -1"), "memory"),
    ("swap_used", MEMORY.replace("used = 96.50M", "used = lots"), "memory"),
    ("page", VM_STAT.partition("\n")[2], "vm_stat"),
    ("page", Output(VM_STAT, exit=2), "vm_stat"),
    ("page", VM_STAT.replace("16384", "0"), "vm_stat"),
    ("page", VM_STAT.replace("16384", "9" * 400), "vm_stat"),
    ("page", VM_STAT.replace("16384", "9" * 4400), "vm_stat"),
    ("swap_used", MEMORY.replace("96.50", "9" * 400 + ".5"), "memory"),
    ("swap_used", MEMORY.replace("96.50", "9" * 4400), "memory"),
    ("wired_limit", MEMORY.replace("mb: 0", "mb: 9999999999999999999"), "memory"),
    ("working_set", '{"recommended_working_set": %s}' % ("9" * 400), "metal"),
    ("working_set", '{"recommended_working_set": %s}' % ("9" * 4400), "metal"),
    ("working_set", "[" * 60_000, "metal"),
    ("thermal", "com.apple.system.thermalpressurelevel: Failed with code 9\n", "thermal"),
    ("thermal", "com.apple.system.thermalpressurelevel 5\n", "thermal"),
    ("thermal", "com.apple.system.thermalpressurelevel -1\n", "thermal"),
    ("thermal", "com.apple.system.somethingelse 0\n", "thermal"),
    ("thermal", "", "thermal"),
    ("low_power", " sleep 0\n", "power"),
    ("low_power", " lowpowermode 7\n sleep 0\n", "power"),
    ("sleep_minutes", " lowpowermode 0\n", "power"),
    ("working_set", '{"recommended_working_set": 0}', "metal"),
    ("working_set", '{"recommended_working_set": "much"}', "metal"),
    ("working_set", "[1, 2]", "metal"),
    ("working_set", "Traceback (most recent call last):", "metal"),
]


class TestParsing:
    def test_all_readings(self) -> None:
        readings = read_live(outputs(), 7.0)
        assert (readings.pressure, readings.available_percent, readings.thermal) == (1, 71, 0)
        assert readings.working_set == 12_713_115_648
        assert (readings.wired_limit, readings.swap_used) == (0, int(96.5 * (1 << 20)))
        assert (readings.low_power, readings.sleep_minutes, readings.at) == (False, 10, 7.0)
        assert readings.pages["swapouts"] == 918_224
        assert readings.unknown == {}

    def test_free_memory_as_ollama(self) -> None:
        readings = read_live(outputs(), 0.0)
        taken = 612_410 + 598_233 + 12_870 + 1_102_336 + 208_844 - 6112 - 402_118
        assert readings.available(64 * GIB) == 64 * GIB - 16_384 * taken
        assert readings.available(1 * GIB) == 0

    @pytest.mark.parametrize("width", [16, 30, 45])
    def test_column_width_does_not_matter(self, width: int) -> None:
        head, *rest = VM_STAT.splitlines()
        lines = (line.rpartition(" ") for line in rest)
        text = "\n".join([head, *(f"{label.strip():<{width}} {number:>16}" for label, _, number in lines)])
        assert read_live(outputs(vm_stat=text), 0.0).pages == read_live(outputs(), 0.0).pages

    @pytest.mark.parametrize(("field", "answer", "source"), UNKNOWN)
    def test_failure_is_unknown_with_reason(self, field: str, answer: Output | str, source: str) -> None:
        readings = read_live(outputs(**{source: answer}), 0.0)
        assert getattr(readings, field) is None
        assert readings.unknown[field].startswith(source)

    def test_missing_count_leaves_free_unknown(self) -> None:
        text = VM_STAT.replace("Pages purgeable:                                6112.\n", "")
        assert read_live(outputs(vm_stat=text), 0.0).available(64 * GIB) is None

    @pytest.mark.parametrize("digits", [20, 400, 4400])
    def test_impossible_count_leaves_free_unknown(self, digits: int) -> None:
        text = VM_STAT.replace("612410", "9" * digits) + "Pages stuff: " + "9" * digits + ".\n"
        readings = read_live(outputs(vm_stat=text), 0.0)
        assert readings.available(16 * GIB) is None
        assert readings.pages["swapouts"] == 918_224

    def test_nothing_used_is_not_believed(self) -> None:
        assert read_live(outputs(vm_stat=VM_STAT.replace("402118", "999999999")), 0.0).available(16 * GIB) is None

    @pytest.mark.parametrize("text", ["Apple M4\x1b[2J", "A" * 5000])
    def test_unprintable_chip_is_unknown(self, text: str) -> None:
        found = read_static(Output(f"machdep.cpu.brand_string: {text}\nkern.osproductversion: {text}\n"))
        assert (found.chip, found.os) == (None, None)

    @pytest.mark.parametrize("text", ["\u00b26.1", "9" * 70, "x.1"])
    def test_invalid_release_is_unknown(self, text: str) -> None:
        assert Static(os=text).os_major is None


class TestCollector:
    def test_heat_falls_back_to_process(self) -> None:
        script = Script(thermal="com.apple.system.thermalpressurelevel: Failed with code 9\n",
                        process='{"thermal_state": 1, "low_power": 1}')  # fmt: skip
        readings = Collector(script).readings()
        # `fair` can be moderate or heavy, and counts as heavy.
        assert (readings.thermal, readings.low_power) == (2, False)
        assert "process" in script.ran

    def test_process_is_only_a_fallback(self) -> None:
        script = Script()
        Collector(script).readings()
        assert "process" not in script.ran

    def test_output_is_reused_while_valid(self) -> None:
        clock, script = Clock(), Script()
        collector = Collector(script, clock)
        for _ in range(3):
            collector.readings()
        assert sorted(script.ran) == sorted(["metal", "memory", "vm_stat", "thermal", "power"])
        clock.now += 3
        collector.readings()
        assert sorted(script.ran[5:]) == ["memory", "vm_stat"]
        clock.now += 60
        collector.readings()
        assert sorted(script.ran[7:]) == ["memory", "power", "thermal", "vm_stat"]

    def test_output_from_the_future_is_ignored(self) -> None:
        clock, script = Clock(), Script()
        collector = Collector(script, clock)
        collector.output("memory")
        clock.now -= 50
        collector.output("memory")
        assert script.ran == ["memory", "memory"]

    def test_failure_is_not_retried_at_once(self) -> None:
        script = Script(thermal=Output(exit=1), process=Output(exit=1))
        collector = Collector(script, Clock())
        assert collector.readings().thermal is None
        collector.readings()
        assert script.ran.count("thermal") == script.ran.count("process") == 1

    def test_fresh_rereads_memory(self) -> None:
        script = Script()
        collector = Collector(script, Clock())
        collector.readings()
        collector.readings(fresh=True)
        assert [script.ran.count(name) for name in ("memory", "vm_stat", "metal")] == [2, 2, 1]


class TestLive:
    @pytest.mark.skipif(sys.platform == "win32", reason="runs a script")
    def test_hanging_or_missing_program(self, tmp_path: Path) -> None:
        slow = tmp_path / "slow"
        slow.write_text("#!/bin/sh\nexec sleep 60\n")
        slow.chmod(slow.stat().st_mode | stat.S_IEXEC)
        hung = Live().run(Reading("slow", (str(slow),), 1.0, ".*", limit=0.1))
        assert (hung.exit, hung.problem) == (1, "no output within 0.1 s")
        missing = Live().run(Reading("missing", (str(tmp_path / "none"),), 1.0, ".*"))
        assert "cannot run" in missing.problem

    @pytest.mark.skipif(sys.platform == "win32", reason="runs a script")
    def test_environment_is_not_inherited(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SECRET_OF_THE_HOST", "s3cret")
        script = tmp_path / "show"
        script.write_text("#!/bin/sh\ncat\n/usr/bin/env\n")
        script.chmod(script.stat().st_mode | stat.S_IEXEC)
        output = Live().run(Reading("show", (str(script),), 1.0, ".*"))
        assert output.exit == 0
        assert "s3cret" not in output.stdout
        assert "LC_ALL=C" in output.stdout

    def test_frozen_application_runs_no_probe(self) -> None:
        assert "no Python" in Live().run(Reading("metal", ("", "-I"), 1.0, ".*")).problem

    def test_programs_have_paths_and_timeouts(self) -> None:
        assert all(Path(reading.argv[0]).is_absolute() and 0 < reading.limit <= 5 for reading in READINGS.values())

    @pytest.mark.skipif(sys.platform == "darwin", reason="the probe works there")
    def test_probe_fails_cleanly_elsewhere(self) -> None:
        output = Live().run(READINGS["metal"])
        assert output.exit != 0
        assert read_live(outputs(metal=output), 0.0).working_set is None


BAD_FILES: list[tuple[str, str]] = [
    ("{", "cannot be used"),
    ('{"format": "graftage-m4 machine 2", "readings": []}', "format"),
    ('{"readings": [], "titel": "x"}', "Did you mean `title`?"),
    ('{"readings": [{"name": "static", "sdtout": "x"}]}', "Did you mean `stdout`?"),
    ('{"readings": [{"name": "thermals"}]}', "Did you mean `thermal`?"),
    ('{"readings": [{"name": "thermal", "at": -1}]}', "at"),
    ("[" * 100_000, "cannot be used"),
    (" " * (9 * 1024 * 1024), "larger than 8 MB"),
]


class TestMachineFile:
    @pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
    def test_replays_with_sources(self, path: Path) -> None:
        machine = read_machine(path)
        collector = Collector(Recorded(machine))
        static, readings = collector.static(), collector.readings()
        gigabytes, system = int(path.stem.split("-")[1]), int(path.stem.split("macos")[1].split("-")[0])
        assert static.memory == gigabytes * GIB
        assert (static.os_major, (static.chip or "").startswith("Apple M4")) == (system, True)
        assert (readings.pressure, readings.thermal, readings.low_power) == (1, 0, False)
        free = readings.available(gigabytes * GIB)
        assert free is not None
        assert 0 < free < gigabytes * GIB
        assert all(sample.source for sample in machine.readings)

    @pytest.mark.parametrize("text", ["[]", "5", "null", "{}", '{"format": 1, "readngs": []}', "{", "\x00"])
    def test_invalid_file_is_named(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "mini.json"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(SettingsError, match=r"mini\.json"):
            read_machine(path)

    @pytest.mark.parametrize(("text", "says"), BAD_FILES, ids=[says for _, says in BAD_FILES])
    def test_error_says_what_is_wrong(self, tmp_path: Path, text: str, says: str) -> None:
        path = tmp_path / "machine.json"
        path.write_text(text)
        with pytest.raises(SettingsError) as caught:
            read_machine(path)
        assert says in str(caught.value)

    def test_pipe_or_folder_is_refused(self, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe.json"
        os.mkfifo(pipe)
        for path, says in (
            (pipe, "regular file"),
            (tmp_path, "regular file"),
            (tmp_path / "none.json", "no such file"),
        ):
            with pytest.raises(SettingsError, match=says):
                read_machine(path)

    @pytest.mark.parametrize("path", ["~nobody-of-that-name/mini.json", "a\0b"])
    def test_impossible_path_is_refused(self, path: str) -> None:
        with pytest.raises(SettingsError, match="cannot be used"):
            read_machine(Path(path))
        with pytest.raises(SettingsError):
            graftage_m4.M4(machine=path).policy()


USUAL = {
    (16, 15): 9.7, (16, 26): 10.8, (24, 15): 14.7, (24, 26): 16.3, (32, 15): 19.6, (32, 26): 23.0,
    (48, 15): 33.1, (48, 26): 34.4, (64, 15): 44.2, (64, 26): 47.7,
}  # fmt: skip
"""What models may use on a dedicated Mac, in GiB: Metal's working set less 8 %."""


class TestBudget:
    @pytest.mark.parametrize("path", [each for each in MACHINES if "busy" not in each.stem], ids=lambda path: path.stem)
    def test_matches_table(self, path: Path) -> None:
        collector = Collector(Recorded(read_machine(path)))
        budget = budget_of(collector.static(), collector.readings())
        assert budget is not None
        gigabytes, system = int(path.stem.split("-")[1]), int(path.stem.split("macos")[1])
        assert budget.static / GIB == pytest.approx(USUAL[gigabytes, system], abs=0.06)
        assert budget.source == ("table" if (gigabytes, system) == (48, 15) else "metal")

    @pytest.mark.parametrize(("gigabytes", "system"), [key for key in USUAL if key != (48, 15)])
    def test_fallback_is_below_metal(self, gigabytes: int, system: int) -> None:
        collector = Collector(Recorded(read_machine(ASSETS / f"mini-{gigabytes}-macos{system}.json")))
        stated = budget_of(collector.static(), collector.readings())
        assumed = budget_of(collector.static(), Readings())
        assert stated is not None
        assert assumed is not None
        assert assumed.source == "table"
        assert assumed.cap <= stated.cap * 1.001

    @pytest.mark.parametrize("system", [None, "15.4", "26.4", "27.0", "nonsense"])
    def test_grows_with_memory(self, system: str | None) -> None:
        budgets = [budget_of(Static(memory=size * GIB, os=system), Readings()) for size in range(4, 520, 2)]
        sizes = [budget.static for budget in budgets if budget]
        assert sizes == sorted(sizes)
        assert len(sizes) == len(budgets)

    def test_lower_wired_limit_wins(self) -> None:
        static = Static(memory=24 * GIB)
        lowered = budget_of(static, Readings(working_set=16 * GIB, wired_limit=10 * GIB))
        silent = budget_of(static, Readings(wired_limit=20 * GIB))
        usual = budget_of(static, Readings(working_set=16 * GIB, wired_limit=0))
        assert [(each.cap // GIB, each.source) for each in (lowered, silent, usual) if each] == [
            (10, "wired_limit"), (20, "wired_limit"), (16, "metal"),
        ]  # fmt: skip

    def test_impossible_share_is_ignored(self) -> None:
        static = Static(memory=16 * GIB, os="15.4")
        for readings in (Readings(working_set=15_000 * GIB), Readings(wired_limit=15_000 * GIB)):
            budget = budget_of(static, readings)
            assert budget is not None
            assert (budget.source, budget.cap) == ("table", int(16 * GIB * 2 / 3))

    def test_high_wired_limit_warns(self) -> None:
        budget = budget_of(Static(memory=24 * GIB), Readings(working_set=23 * GIB, wired_limit=23 * GIB))
        assert budget is not None
        assert "may freeze" in budget.warnings[0]

    def test_profiles_differ(self) -> None:
        static, readings = Static(memory=32 * GIB), Readings(working_set=25 * GIB)
        profiles = ("relaxed", "dedicated", "strict", "shared")
        sizes = [budget.static for name in profiles if (budget := budget_of(static, readings, name))]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[3] == int(0.6 * 32 * GIB)

    def test_unknown_mac_has_none(self) -> None:
        assert budget_of(Static(), Readings()) is None


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(
        textwrap.dedent("""\
            provider = "ollama"
            [m4]
            profile = "shared"
            slots = 2
            """)
    )
    monkeypatch.setenv("GRAFTAGE_CONFIG", str(path))
    return path


WRONG: list[tuple[Mapping[str, Any], Mapping[str, str], str]] = [
    ({"profil": "shared"}, {}, "Did you mean `profile`?"),
    ({"profile": "greedy"}, {}, "profile"),
    ({}, {"GRAFTAGE_M4_MASCHINE": "x"}, "Did you mean `machine`?"),
    ({}, {"GRAFTAGE_M4_SLOTS": "many"}, "slots"),
]


class TestSettings:
    def test_order_is_arguments_environment_file(self, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GRAFTAGE_M4_SLOTS", "3")
        assert (graftage_m4.M4().settings().profile, graftage_m4.M4().settings().slots) == ("shared", 3)
        assert graftage_m4.M4(slots=4).settings().slots == 4

    @pytest.mark.parametrize(("arguments", "environment", "says"), WRONG)
    def test_error_suggests_nearest(
        self, arguments: Mapping[str, Any], environment: Mapping[str, str], says: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SettingsError) as caught:
            graftage_m4.M4(**arguments).settings()
        assert says in str(caught.value)

    def test_wrong_key_in_file(self, config: Path) -> None:
        config.write_text("[m4]\nprofiel = 'shared'\n")
        with pytest.raises(SettingsError, match="Did you mean `profile`"):
            graftage_m4.M4().settings()
        config.write_text("m4 = 5\n")
        with pytest.raises(SettingsError, match="must be a table"):
            graftage_m4.M4().settings()

    def test_machine_from_argument_or_environment(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert graftage_m4.M4(machine=MACHINES[0]).policy() is not None
        monkeypatch.setenv("GRAFTAGE_M4_MACHINE", str(MACHINES[0]))
        assert graftage_m4.M4().policy() is not None
        monkeypatch.setenv("GRAFTAGE_M4_MACHINE", str(tmp_path / "none.json"))
        with pytest.raises(SettingsError, match=r"none\.json.*graftage m4 record"):
            graftage_m4.M4().policy()


class TestRecording:
    def test_replays_in_time(self) -> None:
        clock = Clock()
        samples = [Sample(name="thermal", at=at, stdout=f"{level}") for at, level in [(0, 0), (60, 2), (30, 1)]]
        recorded = Recorded(MachineFile(readings=tuple(samples)), clock)
        seen = []
        for _ in range(4):
            seen.append(recorded.run(READINGS["thermal"]).stdout)
            clock.now += 30
        assert seen == ["0", "1", "2", "2"]
        assert recorded.run(READINGS["power"]) == Output(exit=1, problem="not in the machine file")

    def test_omits_names_and_serial_numbers(self) -> None:
        noise = {
            "static": "hw.memsize: 17179869184\nmachdep.cpu.brand_string: Apple M4\nhw.model: Mac16,10\n"
            "kern.hostname: annas-mini.local\nhw.serialnumber: C02XXTESTX\n",
            "power": POWER + " hibernatefile        /Users/anna/sleepimage\n",
            "memory": MEMORY + "kern.uuid: 0000-anna\n",
            "metal": METAL + "device of anna\n",
            "vm_stat": VM_STAT + "anna: nothing\n",
        }
        taken = record(Script(**noise), samples=2, every=5.0, sleep=lambda _: None)
        text = taken.model_dump_json()
        for word in ("anna", "C02", "serial", "hostname", "useractivityd"):
            assert word not in text
        again = Collector(Recorded(taken))
        assert again.static() == Static(memory=16 * GIB, chip="Apple M4")
        assert again.readings().pages == read_live(outputs(), 0.0).pages
        assert [sample.at for sample in taken.readings if sample.name == "vm_stat"] == [0.0, 5.0]
        assert [sample.name for sample in taken.readings].count("static") == 1

    def test_foreign_chip_is_dropped(self) -> None:
        assert redact(READINGS["static"], "machdep.cpu.brand_string: Anna's CPU\n") == ""

    def test_assets_are_what_record_writes(self) -> None:
        for path in MACHINES:
            for sample in json.loads(path.read_text())["readings"]:
                assert redact(READINGS[sample["name"]], sample["stdout"]) == "".join(
                    f"{line.rstrip()}\n" for line in sample["stdout"].splitlines()
                )
