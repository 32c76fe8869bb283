"""A machine: what it may give to models, what it is like, and files that stand in for one."""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graftage.exceptions import SettingsError
from graftage_m4._readings import MOST_DIGITS, READINGS, Output, Reading, Readings, Runner, Static, kept

__all__ = ["Budget", "MachineFile", "Recorded", "Sample", "budget_of", "read_machine", "record"]

GIB: Final = 1 << 30
MOST_BYTES: Final = 8 * 1024 * 1024
"""A machine file is refused above this: an hour of readings is far below it."""

NEW_RULE: Final = 26
"""The first release of macOS in whose logs Metal gives away more; the exact one is not known."""
NEW_SHARES: Final = ((16, 2 / 3), (32, 0.74), (64, 0.78), (128, 0.81), (float("inf"), 0.84))
"""Metal's working set by gigabytes of memory below, on macOS 26: logs of 16, 24, 32, 48, 64 and 128 GB Macs."""
OLD_SHARES: Final = ((36.5, 2 / 3), (float("inf"), 3 / 4))
"""The same up to macOS 15."""

BANDWIDTH: Final[Mapping[str, float]] = {"Apple M4": 120e9, "Apple M4 Pro": 273e9}
"""Bytes per second that the memory gives, as Apple says; it cannot be read. Others are unknown."""
PREFILL: Final[Mapping[str, float]] = {"Apple M4": 220.0, "Apple M4 Pro": 440.0}
"""Tokens of a prompt per second for a dense model of 8 billion parameters: measured on the M4, twice that inferred."""
DENSE: Final[Mapping[str, float]] = {"Apple M4": 0.8, "Apple M4 Pro": 0.75}
"""The share of the bandwidth that decoding reaches, from measured tokens per second."""
EXPERTS: Final = 0.45
"""The same for a mixture of experts."""
LOW_POWER: Final = 0.65
"""What is left of the speed in low power mode."""


# --- What models may have ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bytes that models may have, all together."""

    cap: int
    """What Metal keeps for programs at most."""
    source: Literal["metal", "wired_limit", "table"]
    """Where the cap comes from: `table` is a fallback, which up to macOS 15 promises no more than Metal does."""
    reserve: int
    static: int
    """`cap` less the reserve: never passed, whatever happens."""
    live_reserve: int
    """What stays free of the memory that is free now."""
    warnings: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The budget for a reason."""
        where = {"metal": "Metal's working set", "wired_limit": "iogpu.wired_limit_mb", "table": "the usual share"}
        return f"{gb(self.static)}: {where[self.source]} of {gb(self.cap)} less {gb(self.reserve)}"


def gb(count: float) -> str:
    """Bytes in gigabytes for people."""
    return f"{count / 1e9:.1f} GB"


def budget_of(static: Static, readings: Readings, profile: str = "dedicated") -> Budget | None:
    """What models may have on a Mac; `None` where neither its memory nor Metal's share of it is known."""
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
    wired = readings.wired_limit or None  # 0 is the system's own rule.
    metal = readings.working_set
    most = static.memory or 10**MOST_DIGITS
    if metal and metal <= most:
        # The limit holds at once, while Metal was perhaps asked some minutes ago.
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
        return (f"iogpu.wired_limit_mb leaves {left} to everything else: the Mac may freeze. Lower it.",)
    return ()


# --- Machine files ----------------------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Sample(_Strict):
    """What one program answered at one moment."""

    name: str
    at: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Seconds after the recording began."""
    stdout: str = ""
    exit: int = 0
    problem: str = ""
    source: str = ""
    """Where it was published, or what was made up."""


class MachineFile(_Strict):
    """Readings of a Mac, to act as one anywhere."""

    format: Literal["graftage-m4 machine 1"] = "graftage-m4 machine 1"
    title: str = ""
    recorded: str = ""
    """When, in UTC."""
    sources: tuple[str, ...] = ()
    readings: tuple[Sample, ...]


def read_machine(path: Path) -> MachineFile:
    """Read and check a machine file.

    Raises:
        SettingsError: it cannot be read, or is not one.
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
        raise SettingsError(f"The machine file {path} is wrong at `{where}`: {first['msg']}.", hint=way) from None
    except (OSError, ValueError, RuntimeError) as error:  # Of these: a home that is not known, JSON that is too deep.
        raise SettingsError(f"The machine file {path} cannot be used: {error}.", source=str(path), hint=hint) from None
    for sample in machine.readings:
        if sample.name not in READINGS:
            close = difflib.get_close_matches(sample.name, READINGS, n=1)
            way = f"Did you mean `{close[0]}`?" if close else f"There are {', '.join(READINGS)}."
            raise SettingsError(f"The machine file {path} has an unknown reading `{sample.name}`.", hint=way)
    return machine


def _content(path: Path) -> bytes:
    # Whoever opens a pipe waits for one who writes.
    if not path.is_file():
        raise ValueError("it is no file" if path.exists() else "there is no such file")
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES // 1024**2} MB")
    return data


class Recorded:
    """A machine file as a runner: of each reading the last answer that is not in the future."""

    def __init__(self, machine: MachineFile, clock: Callable[[], float] = time.monotonic) -> None:
        self._samples: dict[str, list[Sample]] = {}
        for sample in sorted(machine.readings, key=lambda each: each.at):
            self._samples.setdefault(sample.name, []).append(sample)
        self._clock = clock
        self._started = clock()

    def run(self, reading: Reading) -> Output:
        """The recorded answer."""
        now = self._clock() - self._started
        past = [sample for sample in self._samples.get(reading.name, ()) if sample.at <= now]
        if not past:
            return Output(exit=1, problem="not in the machine file")
        return Output(past[-1].stdout, past[-1].exit, past[-1].problem)


def record(
    runner: Runner, *, samples: int = 1, every: float = 5.0, sleep: Callable[[float], None] = time.sleep
) -> MachineFile:
    """Take readings, without what tells a person or one machine from another.

    Args:
        runner: whose readings.
        samples: how many times; what does not change is taken once.
        every: seconds between them.
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
                    stdout=kept(reading, output.stdout),
                    exit=output.exit,
                    problem=output.problem,
                )
            )
    moment = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M")
    return MachineFile(recorded=moment, sources=("recorded by graftage m4 record",), readings=tuple(taken))
