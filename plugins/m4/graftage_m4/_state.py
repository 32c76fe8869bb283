"""What one decision is made of: the Mac, the model, other models in memory, earlier grants; and the refusal."""

from __future__ import annotations

import ipaddress
import os
import platform
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypeVar
from urllib.parse import urlsplit

from graftage.exceptions import ResourceLimitExceeded
from graftage.types import canonical_name
from graftage_m4._machine import GIB, Budget, Readings, gb

if TYPE_CHECKING:
    from pathlib import Path

    from graftage.calls import LimitsQuery
    from graftage.footprint import Footprint, Shape
    from graftage.types import ModelInfo
    from graftage_m4._settings import M4Settings

__all__ = [
    "RESIDENTS_UNKNOWN",
    "Grant",
    "Key",
    "Ledger",
    "Plan",
    "Resident",
    "Room",
    "Route",
    "Rules",
    "Server",
    "State",
    "Watch",
    "is_local_server",
    "ledger_of",
    "listed_size",
    "not_now",
    "remember",
    "server_of",
    "too_large",
]

ALIVE = 300.0
"""Seconds that a model is assumed to stay if nothing else is known: Ollama's default."""
MLX_RESERVE = 3 * GIB
"""While it reads a prompt, MLX briefly takes far more than its cache."""

N = TypeVar("N", int, float)
Server: TypeAlias = str
"""Its address. Several providers, and instances of them, may use one server."""
Route: TypeAlias = tuple[str, str]
"""A provider or instance, and the address as it writes it. A query knows what is in use through its own route only."""
Key: TypeAlias = tuple[Server, str]
"""The server, and the model's canonical name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A model that is in memory or being loaded."""

    key: Key
    name: str
    size: int
    """Bytes that it takes, at least the estimate."""
    freed: int = 0
    """Bytes that unloading it surely frees."""
    coming: int = 0
    """Bytes that it will still take while it is being loaded."""
    window: int | None = None
    loading: bool = False
    """It was admitted and not seen in memory yet."""
    busy: bool = False
    expires: float = 0.0
    """When it leaves by itself: the first to leave has been idle longest."""
    small: bool = False
    """It is an embedding model too small to count."""
    on_cpu: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What a model was granted last, while it may be in memory."""

    name: str
    route: Route
    """Through which it was granted."""
    by: object
    """The signature of the policy."""
    window: int
    size: int
    at: float
    keep_alive: float = ALIVE
    pending: bool = True
    """It has not been seen in memory with that window yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A window, and the models to unload or wait for."""

    window: int
    loads: bool = True
    """Whether the server will load the model for it."""
    unload: tuple[Resident, ...] = ()
    wait_for: tuple[str, ...] = ()
    forced: str | None = None
    """The refusal that was overridden."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The memory that is there for one model."""

    static: int
    """Bytes of the budget that no other model takes."""
    live: int | None
    """Bytes that are free now; `None` if unknown or irrelevant."""

    @property
    def bytes(self) -> int:
        """The smaller of the two."""
        return max(self.static if self.live is None else min(self.static, self.live), 0)

    @property
    def binding(self) -> Literal["live", "budget"]:
        """Which of the two is smaller."""
        return "live" if self.live is not None and self.live < self.static else "budget"


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Everything that one decision is made of."""

    query: LimitsQuery
    key: Key
    shape: Shape
    budget: Budget
    readings: Readings
    memory: int
    chip: str | None
    rules: Rules
    current: Resident | None
    """The model itself, if it is in memory or being loaded."""
    others: tuple[Resident, ...]
    elsewhere: int
    """Bytes of models that this request can neither wait for nor unload: those on other servers of this Mac, and those
    in use through another route to this server."""
    coming_elsewhere: int
    """The part of them that may not be taken yet."""
    slots: int
    """Parallel slots of the server."""
    promise: int
    """The largest window that the model was granted, or 0."""
    odd: tuple[str, ...]
    """Loaded models for which the server reports impossible figures."""
    seen: bool
    """Whether the server reported what it has in memory."""
    keeps: bool
    """Whether the server keeps a model until another one takes its place, whatever is asked."""
    settings: M4Settings

    @property
    def idle(self) -> list[Resident]:
        """Other models that no request uses, the longest idle first."""
        return sorted((each for each in self.others if not each.busy), key=lambda each: each.expires)

    @property
    def resident(self) -> int:
        """Bytes of all models that are in memory or being loaded."""
        return self.elsewhere + sum(each.size for each in self.others) + (self.current.size if self.current else 0)

    def footprint(self, window: int, slots: int = 1) -> Footprint:
        """Estimate the model's footprint with a window, in this server."""
        return self.settings.footprint(self.shape, window, max(slots, self.slots))

    def room(self, gone: Sequence[Resident] = (), *, loading: bool = True) -> Room:
        """Return the room once some other models are gone; memory that is free now matters only for loading."""
        leaving = {each.key for each in gone}
        stay = [each for each in self.others if each.key not in leaving]
        static = self.budget.static - self.elsewhere - sum(each.size for each in stay)
        if self.shape.mlx:
            static -= max(MLX_RESERVE - self.budget.reserve, 0)
        # If the server may have the model already, what is free now does not show whether it fits.
        hidden = self.keeps and not self.seen
        free = self.readings.available(self.memory) if loading and not hidden else None
        if free is None:
            return Room(static=static, live=None)
        # Models being loaded have not taken all of their memory yet; a reload frees what the model has now.
        coming = self.coming_elsewhere + sum(each.coming for each in stay)
        back = sum(each.freed for each in gone) + (self.current.freed if self.current else 0)
        return Room(static=static, live=free + back - coming - self.budget.live_reserve)

    def fits(self, window: int, gone: Sequence[Resident]) -> bool:
        """Return whether the model can be loaded with a window once some other models are gone."""
        return self.footprint(window).total <= self.room(gone).bytes


# --- Pressure: limits tighten at once, and relax only after the Mac has been well for a while ------------------------

SAMPLES: Final = 3
SPAN: Final = 30.0
"""Limits relax after `SAMPLES` better samples over at least so many seconds."""
SAME_SAMPLE: Final = 2.0
"""Seconds: samples closer than this count as one."""
SWAP_RATE: Final = 64e6
"""Bytes per second to swap, or from the compressor, above which memory is short."""
MIN_INTERVAL: Final = 1.0
"""Seconds between two counts of pages below which they give no rate."""


@dataclass(slots=True)
class _Hysteresis:
    """A severity that rises at once and falls slowly. An unknown sample does not count as a better one."""

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
    """What the pressure on the Mac allows. The defaults are those of a Mac that is well."""

    concurrency: int | None = None
    loaded: int | None = None
    """The most models in memory."""
    window: int | None = None
    """The longest window for a model that is loaded now."""
    steps: int = 0
    """Steps of the ladder to go down for a model that is loaded now."""
    keep_alive: float | None = None
    drop_idle: bool = False
    """Unload every other idle model, even if its memory is not needed."""
    measured: bool = True
    """Whether the pressure is known."""
    refuse: str | None = None
    """Why no model can be loaded now."""
    limit: str = ""
    """The name of the limit that refuses."""
    value: int | None = None
    """The worst reading at which a model could be loaded."""
    retry_after: float | None = None
    reasons: tuple[str, ...] = ()

    def combined(self, other: Rules) -> Rules:
        """Combine two sets of rules into the tighter of each."""
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
    def description(self) -> str:
        """All reasons in one line."""
        return "; ".join(self.reasons)


def _least(one: N | None, other: N | None) -> N | None:
    return min((value for value in (one, other) if value is not None), default=None)


WELL: Final = Rules()
PRESSURE_UNKNOWN: Final = Rules(
    concurrency=1, loaded=1, keep_alive=300.0, measured=False, reasons=("the memory pressure is not measured",)
)
SWAPPING: Final = Rules(concurrency=1, loaded=1, steps=1, keep_alive=300.0, reasons=("memory is being swapped out",))
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
HEAT_UNKNOWN: Final = Rules(concurrency=1, reasons=("the heat is not measured",))
RESIDENTS_UNKNOWN: Final = Rules(loaded=1, reasons=("what the server has in memory is not known",))
LOW_POWER: Final = Rules(concurrency=1, reasons=("low power mode is on",))


class Watch:
    """Follows the readings of a Mac, and derives what they allow."""

    def __init__(self) -> None:
        self._pressure = _Hysteresis()
        self._swapping = _Hysteresis()
        self._thermal = _Hysteresis()
        self._saving = _Hysteresis()
        self._pages: tuple[float, int, int] | None = None
        self._rate: float | None = None

    def rules(self, readings: Readings) -> Rules:
        """Return what these readings, and those before them, allow."""
        at = readings.at
        pressure = self._pressure.update(readings.pressure, at)
        swapping = self._swap_level(readings)
        thermal = self._thermal.update(readings.thermal, at)
        saving = self._saving.update(None if readings.low_power is None else int(readings.low_power), at)
        rules = _memory_rules(pressure, swapping, known=readings.pressure is not None)
        rules = rules.combined(_heat_rules(thermal, known=readings.thermal is not None))
        return rules.combined(LOW_POWER) if saving else rules

    def _swap_level(self, readings: Readings) -> int:
        """Return 1 if pages go out, or come back at a high and rising rate; ignore counts too close together."""
        out, back = readings.pages.get("swapouts"), readings.pages.get("decompressions")
        if out is None or back is None or readings.page is None:
            return self._swapping.update(None, readings.at)
        if self._pages is None:
            self._pages = (readings.at, out, back)
        since, out_before, back_before = self._pages
        elapsed = readings.at - since
        if elapsed < MIN_INTERVAL:
            return self._swapping.level
        self._pages = (readings.at, out, back)
        swapped = (out - out_before) * readings.page / elapsed
        returned = (back - back_before) * readings.page / elapsed
        rising = self._rate is not None and returned > self._rate > SWAP_RATE
        self._rate = returned
        return self._swapping.update(int(swapped > SWAP_RATE or rising), readings.at)


def _memory_rules(pressure: int, swapping: int, *, known: bool) -> Rules:
    felt = CRITICAL if pressure >= 4 else WARNING if pressure >= 2 else SWAPPING if swapping else WELL
    return felt if known else felt.combined(PRESSURE_UNKNOWN)


def _heat_rules(thermal: int, *, known: bool) -> Rules:
    felt = TOO_HOT if thermal >= 3 else THROTTLED if thermal == 2 else WELL
    return felt if known else felt.combined(HEAT_UNKNOWN)


# --- The ledger: one for all policies of a process that share a Mac --------------------------------------------------

MAX_REMEMBERED: Final = 512
PORTS: Final = {"http": 80, "https": 443}

K = TypeVar("K")
T = TypeVar("T")


class Ledger:
    """What was granted, promised and learned. To read or write it, hold the lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.grants: dict[Key, Grant] = {}
        self.promises: dict[Key, int] = {}
        """The largest window that each model was granted: its conversations may be as long."""
        self.shapes: dict[Key, Shape] = {}
        self.listed: dict[Hashable, int | None] = {}
        """The size of each version of a model in its server's list; `None` if the list does not have it."""
        self.slots: dict[Key, int] = {}
        """The parallel slots that follow from the last reported size of each model."""
        self.on_cpu: set[Key] = set()
        self._in_use: dict[Server, dict[Route, Callable[[], Mapping[str, int]]]] = {}
        """For each server, and each route to it, how to get the models in use."""

    def register_usage(self, server: Server, route: Route, in_use: Callable[[], Mapping[str, int]]) -> None:
        """Remember how to get the models of a server that are in use."""
        self._in_use.setdefault(server, {})[route] = in_use

    def in_use(self, server: Server) -> set[str]:
        """Return the canonical names of a server's models in use, through any route."""
        counts = [in_use() for in_use in self._in_use.get(server, {}).values()]
        return {canonical_name(model) for each in counts for model, count in each.items() if count > 0}

    def reset_after_fork(self) -> None:
        """Drop, in a forked process, the lock and the requests: they belong to the parent."""
        self.lock = threading.Lock()
        self._in_use = {}


_ledgers: dict[str, Ledger] = {}


def ledger_of(machine: Path | None) -> Ledger:
    """Return the ledger of this Mac, or of the one that a machine file describes."""
    # `setdefault` of a dict with text as keys is atomic.
    return _ledgers.setdefault(str(machine and machine.expanduser().resolve()), Ledger())


def _reset_after_fork() -> None:
    for ledger in _ledgers.values():
        ledger.reset_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)


def remember(memory: dict[K, T], key: K, value: T) -> None:
    """Store a value as the newest, and drop the oldest beyond `MAX_REMEMBERED`."""
    memory.pop(key, None)
    memory[key] = value
    if len(memory) > MAX_REMEMBERED:
        del memory[next(iter(memory))]


def listed_size(models: Iterable[ModelInfo], *names: str) -> int | None:
    """Return the size of a model in a list, by any of its names."""
    wanted = {canonical_name(name) for name in names}
    return next((each.size for each in models if each.size and canonical_name(each.name) in wanted), None)


def is_local_server(address: str) -> bool:
    """Return whether a server is on this machine; an address that is not a URL is an engine in this process."""
    return "://" not in address or _is_local(urlsplit(address).hostname or "")


def server_of(address: str) -> Server:
    """Identify a server, however its address is written: all names of this machine are one."""
    try:
        parts = urlsplit(address)
        port = parts.port or PORTS.get(parts.scheme)
    except ValueError:
        return address
    own = "://" in address and _is_local(parts.hostname or "")
    return f"this machine:{port}{parts.path.rstrip('/')}" if own else address


def _is_local(host: str) -> bool:
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return host in ("localhost", platform.node().lower()) or host.endswith(".localhost")
    return found.is_loopback or found.is_unspecified


# --- The refusal -----------------------------------------------------------------------------------------------------

SMALLER_WINDOWS: Final = (2048, 1024, 512)

Way = tuple[dict[str, Any], str]
"""Something that works instead, as data and in words."""


def not_now(state: State) -> ResourceLimitExceeded:
    """Build the error for a Mac under too much pressure to load a model."""
    rules = state.rules
    ways = list(_loaded_model(state))
    return ResourceLimitExceeded(
        f"`{state.query.model}` cannot be loaded now: {rules.refuse}.",
        limit=rules.limit,
        value=rules.value,
        reason=rules.description,
        details={
            "retryable": True,
            "retry_after": rules.retry_after,
            "required": state.footprint(state.settings.minimum_window).total,
            "available": 0,
            "binding": rules.limit,
            "alternatives": [way for way, _ in ways],
        },
        hint=f"Try again in {rules.retry_after:g} s{''.join(f', or {words}' for _, words in ways)}.",
    )


def too_large(state: State, window: int, known: Mapping[str, Shape]) -> ResourceLimitExceeded:
    """Build the error for a model that does not fit even with the least window.

    Args:
        state: everything to decide on.
        window: the least window.
        known: other models of the server, by name.
    """
    needs = state.footprint(window)
    room = state.room(state.others)
    if room.binding == "budget":
        where = f"this Mac has {gb(room.bytes)} for it ({state.budget.description}{_elsewhere(state)})"
    else:
        where = f"only {gb(room.bytes)} are free now, with {gb(state.budget.live_reserve)} in reserve"
    later = room.binding == "live" or needs.total <= room.static + state.elsewhere
    smaller = next((each for each in SMALLER_WINDOWS if each < window and state.fits(each, state.others)), None)
    ways: list[Way] = []
    if smaller:
        ways.append(({"kind": "context_window", "context_window": smaller}, f"ask for `context_window={smaller}`"))
    ways += [*_loaded_model(state), *_fitting_models(state, known)][:1]
    if later:
        missing = needs.total - room.bytes
        free = "close programs" if room.binding == "live" else "unload models elsewhere"
        ways.append(({"kind": "free_memory", "bytes": missing}, f"{free} that hold {gb(missing)}"))
    ways = ways[:2]
    hint = ", or ".join([*(words for _, words in ways or [({}, "use a smaller model")]), "go on with `force=True`"])
    return ResourceLimitExceeded(
        f"`{state.query.model}` needs {gb(needs.total)} with a window of {window} tokens; {where}.",
        limit="context_window" if smaller else "memory",
        value=smaller or room.bytes,
        reason=f"weights {gb(needs.weights)}, cache {gb(needs.cache)}, working memory "
        f"{gb(needs.total - needs.weights - needs.cache)}{''.join(f'; {note}' for note in needs.notes)}",
        details={
            "retryable": later,
            "retry_after": 30.0 if later else None,
            "required": needs.total,
            "available": room.bytes,
            "binding": room.binding,
            "budget_source": state.budget.source,
            "context_window": window,
            "alternatives": [way for way, _ in ways],
        },
        hint=f"{hint[0].upper()}{hint[1:]}.",
    )


def _elsewhere(state: State) -> str:
    return f"; models in use elsewhere on this Mac take {gb(state.elsewhere)}" if state.elsewhere else ""


def _loaded_model(state: State) -> Iterator[Way]:
    """Offer the first other model that is already loaded."""
    for each in [each for each in state.others if not each.loading and not each.small][:1]:
        yield {"kind": "model", "model": each.name, "loaded": True}, f"use `{each.name}`, which is loaded"


def _fitting_models(state: State, known: Mapping[str, Shape]) -> Iterator[Way]:
    """Offer other models of the server that fit, for the same purpose."""
    for name, shape in known.items():
        same = shape.embeds == state.shape.embeds
        if same and replace(state, shape=shape).fits(state.settings.minimum_window, state.others):
            yield {"kind": "model", "model": name, "loaded": False}, f"use `{name}`, which fits"
