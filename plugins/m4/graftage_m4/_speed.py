"""How fast a Mac will be with a model: for ordering and for patience, never a promise."""

from __future__ import annotations

from typing import Final

from graftage_m4._footprint import KV_BYTES, Shape
from graftage_m4._machine import BANDWIDTH, DENSE, EXPERTS, LOW_POWER, PREFILL

__all__ = ["decode_speed", "prefill_seconds", "readable_window"]

MEASURED_WITH: Final = 8e9
"""Parameters of the model whose reading speed was measured."""
MIXTURE_PENALTY: Final = 2.0
"""A mixture with 4 billion active parameters was measured to read as fast as a dense model of 8 billion."""


def decode_speed(shape: Shape, chip: str | None, window: int = 0, *, low_power: bool = False) -> float | None:
    """Tokens per second of an answer: bandwidth over the bytes that a token reads, its cache included.

    Args:
        shape: the model.
        chip: the Mac's; one that is not in the table gives `None`.
        window: tokens that lie before the answer.
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
    """Tokens of a prompt per second: of what was measured with 8 billion parameters, by the number that act."""
    measured = PREFILL.get(chip or "")
    if measured is None:
        return None
    # Without a count, four bits and a half for each parameter.
    parameters = (shape.parameters or shape.weights / 4.5 * 8) * shape.active
    acting = parameters * (MIXTURE_PENALTY if shape.active < 1 else 1)
    return measured * MEASURED_WITH / acting * (LOW_POWER if low_power else 1)


def prefill_seconds(shape: Shape, chip: str | None, window: int, *, low_power: bool = False) -> float | None:
    """Seconds until the first token where the prompt fills the window; `None` for an unknown chip."""
    speed = prefill_speed(shape, chip, low_power=low_power)
    return None if speed is None else window / speed


def readable_window(shape: Shape, chip: str | None, seconds: float) -> int | None:
    """Tokens that can be read in that time; `None` for an unknown chip."""
    speed = prefill_speed(shape, chip)
    return None if speed is None else int(speed * seconds)
