"""Which slot of an engine answers a request, and whether it may go on from that slot's cache.

What an adapter has read differs from what the base model or another adapter has read in the same text, and the engine
does not keep them apart (ggml-org/llama.cpp issue 26207). So a request uses a cache only if all of it was made with the
same scales; otherwise the engine reads the whole prompt, which makes the cache right for the next one.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

__all__ = ["Scales", "Slots", "Use"]

Scales: TypeAlias = tuple[float, ...]
"""The scale of each adapter, in the order of the engine's numbers."""


@dataclass(slots=True, eq=False)
class _Slot:
    number: int
    made_with: Scales | None = None
    """What all of the cache was made with; None where that is not known."""
    running: list[Scales | None] = field(default_factory=list)
    """Of the requests under way in it or on their way to it, whose order is the engine's."""
    text: Sequence[Any] = ()
    """Of the last request: its messages, or its prompt."""
    turn: int = 0
    """When it was taken last."""


@dataclass(slots=True, eq=False)
class Use:
    """One request in its slot; in all of them where the engine chooses."""

    of: Slots
    slots: Sequence[_Slot]
    scales: Scales | None
    reuse: bool = False
    """Whether the request may go on from the cache."""

    @property
    def number(self) -> int:
        """Of the slot."""
        return self.slots[0].number

    def answered(self) -> None:
        """Note that the engine has read the prompt: if nothing else is in the slot, its cache is this request's."""
        with self.of.lock:
            for slot in self.slots:
                if all(each == self.scales for each in slot.running):
                    slot.made_with = self.scales

    def end(self) -> None:
        """Leave the slot."""
        with self.of.lock:
            for slot in self.slots:
                slot.running.remove(self.scales)


class Slots:
    """The slots of one child."""

    def __init__(self, count: int) -> None:
        self.lock = threading.Lock()
        self._slots = [_Slot(number) for number in range(count)]
        self._turns = itertools.count(1)

    def take(self, scales: Scales | None, text: Sequence[Any]) -> Use:
        """Choose an idle slot, the one whose cache serves best; `scales` is None if a cache must not be used again."""
        with self.lock:
            slot = min(
                self._slots,
                key=lambda each: (
                    len(each.running),
                    -_shared(each.text, text) if each.made_with == scales else 0,
                    each.turn,
                ),
            )
            slot.text, slot.turn = text, next(self._turns)
            reuse = scales is not None and slot.made_with == scales
            return self._enter([slot], scales, reuse=reuse)

    def take_any(self) -> Use:
        """Leave the choice to the engine, which cannot be told: afterwards nothing is known of any cache."""
        with self.lock:
            return self._enter(self._slots, None, reuse=False)

    def _enter(self, slots: Sequence[_Slot], scales: Scales | None, *, reuse: bool) -> Use:
        for slot in slots:
            slot.running.append(scales)
            if not reuse:
                # A request that fails may leave what was there before.
                slot.made_with = None
        return Use(self, slots, scales, reuse)


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many messages, or letters, two begin with in common."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
