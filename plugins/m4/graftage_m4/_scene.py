"""What one decision is made of: the machine, the model, and who else is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from graftage_m4._footprint import GIB, Footprint, Shape, footprint

if TYPE_CHECKING:
    from graftage.types import LimitsQuery
    from graftage_m4._machine import Budget
    from graftage_m4._reactions import Rules
    from graftage_m4._readings import Readings
    from graftage_m4._settings import M4Settings

__all__ = ["Grant", "Key", "Plan", "Resident", "Room", "Scene", "Server"]

ALIVE = 300.0
"""Seconds a model is thought to stay where nobody said: Ollama's own default."""
MLX_RESERVE = 3 * GIB
"""MLX takes far more than its cache for a moment while it reads a prompt."""

Server: TypeAlias = tuple[str, str]
"""Provider and address."""
Key: TypeAlias = tuple[str, str, str]
"""Provider, address, and the model's plain name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A model in memory, or on its way there."""

    key: Key
    name: str
    size: int
    """Bytes it takes, never less than the estimate."""
    freed: int = 0
    """Bytes that surely come back where it goes."""
    coming: int = 0
    """Bytes that it will still take: it is being loaded."""
    window: int | None = None
    loading: bool = False
    """Admitted and not yet seen in memory."""
    busy: bool = False
    expires: float = 0.0
    """When it goes by itself: the first to go has been idle longest."""
    small: bool = False
    """An embedding model that does not count."""
    on_cpu: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What a model was given last, while it may be in memory."""

    name: str
    address: str
    """As whoever it was given to writes it."""
    by: object
    """The policy that gave it."""
    window: int
    size: int
    at: float
    keep_alive: float = ALIVE
    loads: bool = True
    """It has not been seen in memory with that window yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A window, and who goes or is waited for."""

    window: int
    loads: bool = True
    """Whether the server will load the model for it."""
    gone: tuple[Resident, ...] = ()
    wait_for: tuple[str, ...] = ()
    forced: str | None = None
    """The refusal that was overridden."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What is there for one model."""

    static: int
    """Bytes below the budget that no other model takes."""
    live: int | None
    """Bytes that are free now; `None` where that is unknown or does not count."""

    @property
    def bytes(self) -> int:
        """The smaller of both."""
        return max(self.static if self.live is None else min(self.static, self.live), 0)

    @property
    def binding(self) -> Literal["live", "budget"]:
        """Which of both is the smaller."""
        return "live" if self.live is not None and self.live < self.static else "budget"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Everything that one decision is made of."""

    query: LimitsQuery
    key: Key
    shape: Shape
    budget: Budget
    readings: Readings
    memory: int
    chip: str | None
    rules: Rules
    mine: Resident | None
    """The model itself, where it is in memory or on its way."""
    others: tuple[Resident, ...]
    elsewhere: int
    """Bytes of models that this request can neither wait for nor unload: on other servers of this Mac, or in use by
    requests that reach this one by another address."""
    coming_elsewhere: int
    """Those of them that may not be taken yet."""
    slots: int
    """Parallel slots of the server."""
    promise: int
    """The largest window that the model was given; 0 for none."""
    odd: tuple[str, ...]
    """Loaded models of which the server tells nonsense."""
    seen: bool
    """Whether the server told what it has in memory."""
    settings: M4Settings

    @property
    def idle(self) -> list[Resident]:
        """Others that no request uses, the longest idle first."""
        return sorted((each for each in self.others if not each.busy), key=lambda each: each.expires)

    @property
    def resident(self) -> int:
        """Bytes of all models that are in memory, or on their way there."""
        return self.elsewhere + sum(each.size for each in self.others) + (self.mine.size if self.mine else 0)

    def footprint(self, window: int, slots: int = 1) -> Footprint:
        """The model's footprint with that window, in this server."""
        return footprint(
            self.shape,
            window,
            slots=max(slots, self.slots),
            kv_type=self.settings.kv_type,
            flash_attention=self.settings.flash_attention,
        )

    def room(self, gone: Sequence[Resident] = (), *, loading: bool = True) -> Room:
        """What is there once some of the others are gone; what is free now matters only for loading."""
        leaving = {each.key for each in gone}
        stay = [each for each in self.others if each.key not in leaving]
        static = self.budget.static - self.elsewhere - sum(each.size for each in stay)
        if self.shape.mlx:
            static -= max(MLX_RESERVE - self.budget.reserve, 0)
        free = self.readings.available(self.memory) if loading else None
        if free is None:
            return Room(static=static, live=None)
        # Those on their way have not taken all of their memory yet; a reload gives back what the model has.
        coming = self.coming_elsewhere + sum(each.coming for each in stay)
        back = sum(each.freed for each in gone) + (self.mine.freed if self.mine else 0)
        return Room(static=static, live=free + back - coming - self.budget.live_reserve)

    def fits(self, window: int, gone: Sequence[Resident]) -> bool:
        """Whether the model can be loaded with that window once those are gone."""
        return self.footprint(window).total <= self.room(gone).bytes
