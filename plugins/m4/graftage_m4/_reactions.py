"""How limits follow what a Mac feels: tightened at once, relaxed only after it has been well for a while."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from graftage_m4._readings import Readings

__all__ = ["UNSEEN", "Rules", "Watch"]

SAMPLES: Final = 3
SPAN: Final = 30.0
"""Limits are relaxed after so many better samples that span so many seconds."""
SAME_SAMPLE: Final = 2.0
"""Seconds: two looks closer than this have seen one reading."""
SWAPPING: Final = 64e6
"""Bytes per second that go out to swap, or come back from the compressor, when memory runs short."""
SHORTEST: Final = 1.0
"""Seconds between two counts of pages from which a rate is taken."""


@dataclass(slots=True)
class _Calm:
    """One severity with hysteresis. What is unknown is no better sample."""

    level: int = 0
    _better: list[tuple[float, int]] = field(default_factory=list)

    def update(self, level: int | None, at: float) -> int:
        if level is None:
            self._better.clear()
        elif level >= self.level:
            self.level = level
            self._better.clear()
        elif not self._better or at - self._better[-1][0] >= SAME_SAMPLE:
            self._better.append((at, level))
            if len(self._better) >= SAMPLES and at - self._better[0][0] >= SPAN:
                self.level = max(level for _, level in self._better)
                self._better.clear()
        return self.level


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the state of the Mac allows. The defaults are those of one that is well."""

    concurrency: int | None = None
    loaded: int | None = None
    """Models in memory at most."""
    window: int | None = None
    """Tokens of a model that is loaded now."""
    steps: int = 0
    """Steps of the ladder to go down for a model that is loaded now."""
    keep_alive: float | None = None
    drop_idle: bool = False
    """Every other idle model goes, whether or not its memory is needed."""
    measured: bool = True
    """Whether the pressure is known."""
    refuse: str | None = None
    """No model is loaded now: why."""
    limit: str = ""
    """What of the Mac refuses."""
    value: int | None = None
    """The worst reading at which it would not."""
    retry_after: float | None = None
    reasons: tuple[str, ...] = ()

    def and_(self, other: Rules) -> Rules:
        """Both: the tighter of each."""
        refusing = self if self.refuse else other
        return Rules(
            concurrency=_least(self.concurrency, other.concurrency),
            loaded=_least(self.loaded, other.loaded),
            window=_least(self.window, other.window),
            steps=max(self.steps, other.steps),
            keep_alive=_least(self.keep_alive, other.keep_alive),
            drop_idle=self.drop_idle or other.drop_idle,
            measured=self.measured and other.measured,
            refuse=refusing.refuse,
            limit=refusing.limit,
            value=refusing.value,
            retry_after=refusing.retry_after,
            reasons=(*self.reasons, *other.reasons),
        )

    @property
    def words(self) -> str:
        """Why, in one line."""
        return "; ".join(self.reasons)


def _least(*values: float | None) -> int | None:
    known = [value for value in values if value is not None]
    return min(known) if known else None  # type: ignore[return-value] # a keep-alive may be a float


WELL: Final = Rules()
UNKNOWN: Final = Rules(
    concurrency=1, loaded=1, keep_alive=300.0, measured=False, reasons=("the memory pressure is not measured",)
)
SWAPS: Final = Rules(concurrency=1, loaded=1, steps=1, keep_alive=300.0, reasons=("memory is being swapped out",))
WARNING: Final = Rules(
    concurrency=1, loaded=1, window=8192, keep_alive=60.0, drop_idle=True, reasons=("memory pressure is at warning",)
)
CRITICAL: Final = Rules(
    concurrency=1, loaded=1, window=8192, keep_alive=0.0, drop_idle=True, refuse="memory pressure is critical",
    limit="memory_pressure", value=2, retry_after=30.0, reasons=("memory pressure is critical",),
)  # fmt: skip
THROTTLED: Final = Rules(concurrency=1, reasons=("the Mac is hot and slows down",))
TOO_HOT: Final = Rules(
    concurrency=1, refuse="the Mac is too hot", limit="thermal_pressure", value=2, retry_after=60.0,
    reasons=("the Mac is too hot",),
)  # fmt: skip
UNFELT: Final = Rules(concurrency=1, reasons=("the heat is not measured",))
UNSEEN: Final = Rules(loaded=1, reasons=("what the server has in memory is not known",))
SAVING: Final = Rules(concurrency=1, reasons=("low power mode is on",))


class Watch:
    """Remembers how the Mac was, and says what that allows."""

    def __init__(self) -> None:
        self._pressure = _Calm()
        self._swapping = _Calm()
        self._thermal = _Calm()
        self._saving = _Calm()
        self._pages: tuple[float, int, int] | None = None
        self._rate: float | None = None

    def rules(self, readings: Readings) -> Rules:
        """What the readings, and those before them, allow."""
        at = readings.at
        pressure = self._pressure.update(readings.pressure, at)
        swapping = self._swap_level(readings)
        thermal = self._thermal.update(readings.thermal, at)
        saving = self._saving.update(None if readings.low_power is None else int(readings.low_power), at)
        rules = _of_memory(pressure, swapping, known=readings.pressure is not None)
        rules = rules.and_(_of_heat(thermal, known=readings.thermal is not None))
        return rules.and_(SAVING) if saving else rules

    def _swap_level(self, readings: Readings) -> int:
        """Whether pages go out, or come back faster and faster; two counts too close together tell nothing."""
        out, back = readings.pages.get("swapouts"), readings.pages.get("decompressions")
        if out is None or back is None or readings.page is None:
            return self._swapping.update(None, readings.at)
        if self._pages is None:
            self._pages = (readings.at, out, back)
        since, out_before, back_before = self._pages
        elapsed = readings.at - since
        if elapsed < SHORTEST:
            return self._swapping.level
        self._pages = (readings.at, out, back)
        swapped = (out - out_before) * readings.page / elapsed
        returned = (back - back_before) * readings.page / elapsed
        rising = self._rate is not None and returned > self._rate > SWAPPING
        self._rate = returned
        return self._swapping.update(int(swapped > SWAPPING or rising), readings.at)


def _of_memory(pressure: int, swapping: int, *, known: bool) -> Rules:
    felt = CRITICAL if pressure >= 4 else WARNING if pressure >= 2 else SWAPS if swapping else WELL  # noqa: PLR2004
    return felt if known else felt.and_(UNKNOWN)


def _of_heat(thermal: int, *, known: bool) -> Rules:
    felt = TOO_HOT if thermal >= 3 else THROTTLED if thermal == 2 else WELL  # noqa: PLR2004
    return felt if known else felt.and_(UNFELT)
