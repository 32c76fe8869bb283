"""A Mac: what can be read of it without root, how much memory models may use, and how fast they will be.

Each reading is one small program with a timeout, and a strict parser. A reading that fails, or whose output is not
exactly what that program prints, is unknown: never zero, never normal. A machine file can stand in for a Mac.
"""

from __future__ import annotations

import difflib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graftage.exceptions import SettingsError
from graftage.footprint import KV_BYTES, Shape

__all__ = [
    "GIB", "Budget", "Collector", "Live", "Output", "Reading", "Readings", "Recorded", "Runner", "budget_of",
    "decode_speed", "gb", "prefill_seconds", "read_machine", "readable_window", "record",
]  # fmt: skip

SYSCTL: Final = "/usr/sbin/sysctl"
PYTHON: Final = "" if getattr(sys, "frozen", False) else sys.executable or ""
"""What runs the probe; a frozen application is not a Python, and would start itself."""
PROBE: Final = str(Path(__file__).with_name("_probe.py"))
MAX_OUTPUT: Final = 64 * 1024
"""Characters of an output that are parsed."""
MAX_DIGITS: Final = 15
"""Digits of a plausible number."""
PAGE_SIZES: Final = range(4096, 65_537)
"""Plausible sizes of a page: it has 16 384 bytes on Apple silicon."""
THERMAL_KEY: Final = "com.apple.system.thermalpressurelevel"
THERMAL_LEVELS: Final = range(5)
PRESSURE_LEVELS: Final = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class Reading:
    """A program to run, and how long its output stays valid."""

    name: str
    argv: tuple[str, ...]
    life: float
    """Seconds for which its output may be reused."""
    keep: str
    """Lines of its output that identify neither a person nor a machine: a recording drops all others."""
    limit: float = 2.0
    """Seconds that it may take; most take 2 to 10 ms, Metal about 100."""


_NUMBER_LINE = r'"?[A-Za-z][\w -]*"?: +\d+\.'
READINGS: Final[Mapping[str, Reading]] = {
    each.name: each
    for each in (
        Reading(
            "static",
            (SYSCTL, "-i", "hw.memsize", "machdep.cpu.brand_string", "hw.model", "hw.perflevel0.physicalcpu",
             "hw.perflevel1.physicalcpu", "kern.osproductversion"),
            float("inf"),
            r"(hw\.memsize|hw\.perflevel\d\.physicalcpu): \d+|machdep\.cpu\.brand_string: Apple M[\w ]+"
            r"|hw\.model: [A-Za-z]+\d+,\d+|kern\.osproductversion: [\d.]+",
        ),
        Reading("metal", (PYTHON, "-I", PROBE, "metal"), 600.0, r"\{[\w\": ,]+\}", limit=5.0),
        Reading(
            "memory",
            (SYSCTL, "-i", "kern.memorystatus_vm_pressure_level", "kern.memorystatus_level", "vm.swapusage",
             "iogpu.wired_limit_mb"),
            2.0,
            r"(kern\.memorystatus_vm_pressure_level|kern\.memorystatus_level|iogpu\.wired_limit_mb): -?\d+"
            r"|vm\.swapusage: [\w =.,()]+",
        ),
        Reading(
            "vm_stat", ("/usr/bin/vm_stat",), 2.0,
            r"Mach Virtual Memory Statistics: \(page size of \d+ bytes\)|" + _NUMBER_LINE,
        ),
        Reading("thermal", ("/usr/bin/notifyutil", "-g", THERMAL_KEY), 5.0, re.escape(THERMAL_KEY) + r"[\w: ]+"),
        Reading("process", (PYTHON, "-I", PROBE, "process"), 5.0, r"\{[\w\": ,]+\}", limit=5.0),
        Reading("power", ("/usr/bin/pmset", "-g"), 60.0, r"\s*(lowpowermode|powermode|sleep)\s+\d+"),
    )
}  # fmt: skip
"""Memory changes in seconds, heat in tens of seconds, a power mode by hand."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a program printed."""

    stdout: str = ""
    exit: int = 0
    problem: str = ""
    """Why there is no output: the program is missing, or took too long."""


class Runner(Protocol):
    """Runs a reading's program, or replays its output."""

    def run(self, reading: Reading) -> Output:
        """Return the program's output, with the problem if it failed."""
        ...


class Live:
    """Runs the programs of this Mac, by their full paths and in a clean environment."""

    def run(self, reading: Reading) -> Output:
        """Run a reading's program, within its time limit."""
        if not reading.argv[0]:
            return Output(exit=1, problem="no Python is available to run it")
        try:
            done = subprocess.run(  # noqa: S603 - fixed paths, no shell, no input of a caller
                reading.argv,
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=reading.limit,
                env={"LC_ALL": "C", "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Output(exit=1, problem=f"no output within {reading.limit:g} s")
        except OSError as error:
            return Output(exit=1, problem=f"cannot run ({error.strerror or type(error).__name__})")
        return Output(done.stdout[:MAX_OUTPUT].decode("utf-8", "replace"), done.returncode)


def redact(reading: Reading, stdout: str) -> str:
    """Remove what a recording must not hold: serial numbers, names, other programs."""
    found = re.compile(rf"({reading.keep})")
    matches = (found.match(line) for line in stdout[:MAX_OUTPUT].splitlines())
    return "".join(f"{match[0].rstrip()}\n" for match in matches if match)


# --- Readings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Static:
    """What does not change while a Mac runs. Unknown fields are `None`."""

    memory: int | None = None
    """Bytes."""
    chip: str | None = None
    """`Apple M4`."""
    os: str | None = None
    """`15.4`."""

    @property
    def os_major(self) -> int | None:
        """The major release: Metal's share of the memory depends on it."""
        return _whole((self.os or "").partition(".")[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """The readings of one moment. Unknown fields are `None`, and `unknown` says why."""

    at: float = 0.0
    """Seconds on the collector's clock."""
    working_set: int | None = None
    """Metal's `recommendedMaxWorkingSetSize`, in bytes."""
    wired_limit: int | None = None
    """`iogpu.wired_limit_mb` in bytes; 0 is the system's default."""
    pressure: int | None = None
    """1 normal, 2 warning, 4 critical."""
    available_percent: int | None = None
    page: int | None = None
    """Bytes of a page."""
    pages: Mapping[str, int] = field(default_factory=dict, repr=False)
    """The counts of `vm_stat`, by label."""
    swap_used: int | None = None
    thermal: int | None = None
    """0 nominal, 1 moderate, 2 heavy, 3 trapping, 4 sleeping."""
    low_power: bool | None = None
    sleep_minutes: int | None = None
    """Until an idle Mac sleeps; 0 is never."""
    unknown: Mapping[str, str] = field(default_factory=dict)
    """Why a field is `None`."""

    def available(self, memory: int) -> int | None:
        """Return the bytes that are free, by Ollama's formula (`discover/gpu_info_darwin.m`) so that both agree."""
        used = ("active", "inactive", "speculative", "wired down", "occupied by compressor")
        spare = ("purgeable", "file-backed")
        counts = {name: self.pages.get(name) for name in (*used, *spare)}
        if self.page is None or None in counts.values():
            return None
        known = {name: count or 0 for name, count in counts.items()}
        taken = sum(known[name] for name in used) - sum(known[name] for name in spare)
        # A Mac that uses no memory is not plausible.
        return max(memory - self.page * taken, 0) if taken > 0 else None


class Collector:
    """Runs readings on demand, and reuses each output while it is valid. Safe for threads."""

    def __init__(self, runner: Runner, clock: Callable[[], float] = time.monotonic) -> None:
        self.runner = runner
        self.clock = clock
        self._outputs: dict[str, tuple[float, Output]] = {}
        self._lock = threading.Lock()

    def output(self, name: str, *, fresh: bool = False) -> Output:
        """Return the output of a reading; run it if the last output is too old or `fresh` is set."""
        reading = READINGS[name]
        with self._lock:
            now = self.clock()
            taken, output = self._outputs.get(name, (float("-inf"), Output()))
            if now - taken >= reading.life or fresh or taken > now:
                output = self.runner.run(reading)
                self._outputs[name] = (now, output)
            return output

    def static(self) -> Static:
        """Return what does not change while a Mac runs."""
        return read_static(self.output("static"))

    def readings(self, *, fresh: bool = False) -> Readings:
        """Return the readings of now; `fresh` reads memory again."""
        outputs = {name: self.output(name) for name in ("metal", "power", "thermal")}
        outputs |= {name: self.output(name, fresh=fresh) for name in ("memory", "vm_stat")}
        readings = read_live(outputs, self.clock())
        if readings.thermal is None or readings.low_power is None:
            # The coarse fallback costs a Python process.
            readings = read_live({**outputs, "process": self.output("process")}, self.clock())
        return readings


def read_static(output: Output) -> Static:
    """Parse the `sysctl` output of what does not change."""
    values = _sysctl(output)
    return Static(
        memory=_whole(values.get("hw.memsize")) or None,
        chip=_printable(values.get("machdep.cpu.brand_string")),
        os=_printable(values.get("kern.osproductversion")),
    )


def read_live(outputs: Mapping[str, Output], at: float) -> Readings:
    """Parse all readings of one moment."""
    found: dict[str, int | bool | None] = {}
    memory = _sysctl(outputs["memory"])
    # A recommendation of 0 is not plausible.
    found["working_set"] = _json(outputs["metal"]).get("recommended_working_set") or None
    wired = _whole(memory.get("iogpu.wired_limit_mb"))
    found["wired_limit"] = None if wired is None else wired << 20
    found["pressure"] = _one_of(PRESSURE_LEVELS, memory.get("kern.memorystatus_vm_pressure_level"))
    found["available_percent"] = _one_of(range(101), memory.get("kern.memorystatus_level"))
    found["swap_used"] = _swap_used(memory.get("vm.swapusage"))
    found["page"], pages = _vm_stat(outputs["vm_stat"])
    found["thermal"] = _thermal(outputs["thermal"])
    found |= _power(outputs["power"])
    if "process" in outputs:
        found = _fill_from_process(found, outputs["process"])
    unknown = {name: _unknown_reason(outputs, name) for name, value in found.items() if value is None}
    return Readings(at=at, pages=pages, unknown=unknown, **found)  # type: ignore[arg-type] # the names are fields


SOURCE_OF: Final = {
    "working_set": "metal", "wired_limit": "memory", "pressure": "memory",
    "available_percent": "memory", "swap_used": "memory", "page": "vm_stat", "thermal": "thermal",
    "low_power": "power", "sleep_minutes": "power",
}  # fmt: skip


def _unknown_reason(outputs: Mapping[str, Output], name: str) -> str:
    output = outputs[SOURCE_OF[name]]
    if output.problem:
        return f"{SOURCE_OF[name]}: {output.problem}"
    return f"{SOURCE_OF[name]}: exit {output.exit}" if output.exit else f"{SOURCE_OF[name]}: not in its output"


def _sysctl(output: Output) -> dict[str, str]:
    """Parse `key: value` lines; `sysctl -i` omits keys that the system does not know."""
    lines = (line.partition(": ") for line in output.stdout.splitlines() if output.exit == 0)
    return {key.strip(): value.strip() for key, colon, value in lines if colon}


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS else None


def _printable(text: str | None) -> str | None:
    """Return a text if it is short and can be shown anywhere."""
    return text if text and text.isprintable() and len(text) < 80 else None


def _one_of(levels: range | tuple[int, ...], text: str | None) -> int | None:
    value = _whole(text)
    return value if value in levels else None


_SWAP = re.compile(r"total = [\d.]+M  used = ([0-9]{1,12}(?:\.[0-9]{1,6})?)M  free = [\d.]+M")


def _swap_used(text: str | None) -> int | None:
    """Return the bytes of swap in use. The total means nothing: macOS creates swap files as needed."""
    found = _SWAP.match(text or "")
    return int(float(found[1]) * (1 << 20)) if found else None


_PAGE_SIZE = re.compile(r"Mach Virtual Memory Statistics: \(page size of ([0-9]+) bytes\)")
_PAGES = re.compile(r'"?([A-Za-z][\w -]*?)"?: +(\d+)\.')


def _vm_stat(output: Output) -> tuple[int | None, dict[str, int]]:
    """Return the page size and the counts by label, without `Pages` and in lower case."""
    head, _, rest = output.stdout.partition("\n")
    found = _PAGE_SIZE.match(head)
    if output.exit or not found:
        return None, {}
    matches = filter(None, map(_PAGES.fullmatch, map(str.strip, rest.splitlines())))
    counts = {_label(each[1]): _whole(each[2]) for each in matches}
    known = {label: count for label, count in counts.items() if count is not None}
    page = _whole(found[1])
    return (page, known) if page in PAGE_SIZES else (None, {})


def _label(text: str) -> str:
    return text.lower().removeprefix("pages ").removesuffix(" pages")


def _thermal(output: Output) -> int | None:
    """Return the level after the expected key: `notifyutil` prints failures on stdout and exits with 0."""
    words = output.stdout.split()
    if output.exit or len(words) != 2 or words[0] != THERMAL_KEY:
        return None
    return _one_of(THERMAL_LEVELS, words[1])


def _power(output: Output) -> dict[str, int | bool | None]:
    lines = (line.split() for line in output.stdout.splitlines() if output.exit == 0)
    values = {words[0]: _whole(words[1]) for words in lines if len(words) > 1}
    low = values.get("lowpowermode")
    return {"low_power": bool(low) if low in (0, 1) else None, "sleep_minutes": values.get("sleep")}


def _json(output: Output) -> dict[str, int]:
    try:
        answer = json.loads(output.stdout) if output.exit == 0 else None
    except (ValueError, RecursionError):
        return {}
    values = answer if isinstance(answer, dict) else {}
    return {str(key): value for key, value in values.items() if type(value) is int and 0 <= value < 10**MAX_DIGITS}


def _fill_from_process(found: dict[str, int | bool | None], output: Output) -> dict[str, int | bool | None]:
    """Fill gaps from `NSProcessInfo`, whose `fair` can be moderate or heavy and counts as heavy."""
    values = _json(output)
    filled = dict(found)
    if filled["thermal"] is None and values.get("thermal_state") in range(4):
        filled["thermal"] = (0, 2, 3, 4)[values["thermal_state"]]
    if filled["low_power"] is None and values.get("low_power") in (0, 1):
        filled["low_power"] = bool(values["low_power"])
    return filled


# --- Budget ----------------------------------------------------------------------------------------------------------

GIB: Final = 1 << 30

NEW_RULE: Final = 26
"""The first macOS release in whose logs Metal's share is larger; the exact release is not known."""
NEW_SHARES: Final = ((16, 2 / 3), (32, 0.74), (64, 0.78), (128, 0.81), (float("inf"), 0.84))
"""Metal's share of the memory (below so many GB) on macOS 26, from logs of 16, 24, 32, 48, 64 and 128 GB Macs."""
OLD_SHARES: Final = ((36.5, 2 / 3), (float("inf"), 3 / 4))
"""The same up to macOS 15."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bytes that all models together may use."""

    cap: int
    """The most that Metal keeps in memory for programs."""
    source: Literal["metal", "wired_limit", "table"]
    """Where the cap comes from: `table` is a fallback, up to macOS 15 never above Metal's own value."""
    reserve: int
    static: int
    """`cap` less the reserve: never exceeded."""
    live_reserve: int
    """How much of the memory that is free now stays free."""
    warnings: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """The budget in words."""
        where = {"metal": "Metal's working set", "wired_limit": "iogpu.wired_limit_mb", "table": "the usual share"}
        return f"{gb(self.static)}: {where[self.source]} of {gb(self.cap)} less {gb(self.reserve)}"


def gb(count: float) -> str:
    """Format bytes as gigabytes."""
    return f"{count / 1e9:.1f} GB"


def budget_of(static: Static, readings: Readings, profile: str = "dedicated") -> Budget | None:
    """Return what models may use of a Mac; `None` if neither its memory nor Metal's share of it is known."""
    cap, source = _cap(static, readings)
    if cap is None:
        return None
    memory = static.memory or cap
    reserve = {
        "dedicated": max(GIB, int(0.08 * cap)),
        "relaxed": GIB,
    }.get(profile, max(3 * GIB, int(0.15 * cap)))
    allowed = cap - reserve
    if profile == "shared":
        allowed = min(allowed, int(0.60 * memory))
    return Budget(
        cap=cap,
        source=source,
        reserve=reserve,
        static=max(allowed, 0),
        live_reserve=max(2 * GIB, int(0.08 * memory)),
        warnings=_hazards(memory, readings.wired_limit),
    )


def _cap(static: Static, readings: Readings) -> tuple[int | None, Literal["metal", "wired_limit", "table"]]:
    wired = readings.wired_limit or None
    metal = readings.working_set
    most = static.memory or 10**MAX_DIGITS
    if metal and metal <= most:
        # A changed limit holds at once, while Metal's value may be some minutes old.
        lowered = wired is not None and wired < metal
        return (wired, "wired_limit") if lowered else (metal, "metal")
    if wired and wired <= most:
        return wired, "wired_limit"
    if not static.memory:
        return None, "table"
    shares = NEW_SHARES if (static.os_major or 0) >= NEW_RULE else OLD_SHARES
    share = next(share for below, share in shares if static.memory / GIB < below)
    return int(static.memory * share), "table"


def _hazards(memory: int, wired: int | None) -> tuple[str, ...]:
    if wired and wired > memory - max(4 * GIB, int(0.15 * memory)):
        left = gb(max(memory - wired, 0))
        return (f"`iogpu.wired_limit_mb` leaves only {left} to everything else: the Mac may freeze. Lower it.",)
    return ()


# --- Machine files ---------------------------------------------------------------------------------------------------

MAX_BYTES: Final = 8 * 1024 * 1024
"""The largest machine file; an hour of readings is far smaller."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Sample(_Strict):
    """What one program printed at one moment."""

    name: str
    at: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Seconds after the recording began."""
    stdout: str = ""
    exit: int = 0
    problem: str = ""
    source: str = ""
    """Where it was published, or that it is made up."""


class MachineFile(_Strict):
    """Readings of a Mac, to act as that Mac on any computer."""

    format: Literal["graftage-m4 machine 1"] = "graftage-m4 machine 1"
    title: str = ""
    recorded: str = ""
    """When, in UTC."""
    sources: tuple[str, ...] = ()
    readings: tuple[Sample, ...]


def read_machine(path: Path) -> MachineFile:
    """Read and check a machine file.

    Raises:
        SettingsError: the file cannot be read, or is not a machine file.
    """
    hint = "`graftage m4 record` writes one."
    try:
        machine = MachineFile.model_validate(json.loads(_content(path.expanduser())))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the top"
        key = str(first["loc"][-1]) if first["loc"] else ""
        close = difflib.get_close_matches(key, {*MachineFile.model_fields, *Sample.model_fields}, n=1)
        way = f"Did you mean `{close[0]}`?" if close and "extra" in first["type"] else hint
        raise SettingsError(f"The machine file {path} is invalid at `{where}`: {first['msg']}.", hint=way) from None
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home folder, or JSON that is too deep.
        raise SettingsError(f"The machine file {path} cannot be used: {error}.", source=str(path), hint=hint) from None
    for sample in machine.readings:
        if sample.name not in READINGS:
            close = difflib.get_close_matches(sample.name, READINGS, n=1)
            way = f"Did you mean `{close[0]}`?" if close else f"Valid readings: {', '.join(READINGS)}."
            raise SettingsError(f"The machine file {path} has an unknown reading `{sample.name}`.", hint=way)
    return machine


def _content(path: Path) -> bytes:
    # Opening a pipe would wait for its writer.
    if not path.is_file():
        raise ValueError("it is not a regular file" if path.exists() else "no such file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // 1024**2} MB")
    return data


class Recorded:
    """Replays a machine file: the last output of each reading that is not in the future."""

    def __init__(self, machine: MachineFile, clock: Callable[[], float] = time.monotonic) -> None:
        self._samples: dict[str, list[Sample]] = {}
        for sample in sorted(machine.readings, key=lambda each: each.at):
            self._samples.setdefault(sample.name, []).append(sample)
        self._clock = clock
        self._started = clock()

    def run(self, reading: Reading) -> Output:
        """Return the recorded output."""
        now = self._clock() - self._started
        past = [sample for sample in self._samples.get(reading.name, ()) if sample.at <= now]
        if not past:
            return Output(exit=1, problem="not in the machine file")
        return Output(past[-1].stdout, past[-1].exit, past[-1].problem)


def record(
    runner: Runner, *, samples: int = 1, every: float = 5.0, sleep: Callable[[float], None] = time.sleep
) -> MachineFile:
    """Record readings, without what identifies a person or a machine.

    Args:
        runner: where the readings come from.
        samples: how many samples; what does not change is recorded once.
        every: seconds between samples.
        sleep: how to wait.
    """
    taken: list[Sample] = []
    for turn in range(samples):
        if turn:
            sleep(every)
        for reading in READINGS.values():
            if turn and reading.life > every * samples:
                continue
            output = runner.run(reading)
            taken.append(
                Sample(
                    name=reading.name,
                    at=turn * every,
                    stdout=redact(reading, output.stdout),
                    exit=output.exit,
                    problem=output.problem,
                )
            )
    moment = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    return MachineFile(recorded=moment, sources=("recorded by graftage m4 record",), readings=tuple(taken))


# --- Speed: an estimate for ordering and timeouts, never a promise ---------------------------------------------------

BANDWIDTH: Final[Mapping[str, float]] = {"Apple M4": 120e9, "Apple M4 Pro": 273e9}
"""The memory's bytes per second, as Apple publishes them; they cannot be read. Other chips are unknown."""
PREFILL: Final[Mapping[str, float]] = {"Apple M4": 220.0, "Apple M4 Pro": 440.0}
"""Prompt tokens per second for a dense model of 8 billion parameters: measured on the M4, assumed twice on the Pro."""
DENSE: Final[Mapping[str, float]] = {"Apple M4": 0.8, "Apple M4 Pro": 0.75}
"""The share of the bandwidth that decoding reaches, from measured tokens per second."""
EXPERTS: Final = 0.45
"""The same for a mixture of experts."""
LOW_POWER: Final = 0.65
"""The share of the speed that is left in low power mode."""
MEASURED_WITH: Final = 8e9
"""Parameters of the model that `PREFILL` was measured with."""
MIXTURE_PENALTY: Final = 2.0
"""A mixture with 4 billion active parameters was measured to read as fast as a dense model of 8 billion."""


def decode_speed(shape: Shape, chip: str | None, window: int = 0, *, low_power: bool = False) -> float | None:
    """Estimate a reply's tokens per second: bandwidth over the bytes that a token reads, its cache included.

    Args:
        shape: the model.
        chip: the Mac's chip; for one that is not in the table the result is `None`.
        window: tokens before the reply.
        low_power: whether the Mac saves power.
    """
    bandwidth = BANDWIDTH.get(chip or "")
    if bandwidth is None:
        return None
    share = EXPERTS if shape.active < 1 else DENSE[chip or ""]
    cached = sum(layer.cell * min(window, layer.window or window) for layer in shape.layers or ()) * KV_BYTES["f16"]
    speed = share * bandwidth / (shape.weights * shape.active + cached)
    return speed * (LOW_POWER if low_power else 1)


def prefill_speed(shape: Shape, chip: str | None, *, low_power: bool = False) -> float | None:
    """Estimate prompt tokens per second from the measured speed, by the number of active parameters."""
    measured = PREFILL.get(chip or "")
    if measured is None:
        return None
    # Without a count, assume 4.5 bits per parameter.
    parameters = (shape.parameters or shape.weights / 4.5 * 8) * shape.active
    weighted = parameters * (MIXTURE_PENALTY if shape.active < 1 else 1)
    return measured * MEASURED_WITH / weighted * (LOW_POWER if low_power else 1)


def prefill_seconds(shape: Shape, chip: str | None, window: int, *, low_power: bool = False) -> float | None:
    """Estimate seconds until the first token if the prompt fills the window; `None` for an unknown chip."""
    speed = prefill_speed(shape, chip, low_power=low_power)
    return None if speed is None else window / speed


def readable_window(shape: Shape, chip: str | None, seconds: float) -> int | None:
    """Estimate how many tokens can be read in some seconds; `None` for an unknown chip."""
    speed = prefill_speed(shape, chip)
    return None if speed is None else int(speed * seconds)
