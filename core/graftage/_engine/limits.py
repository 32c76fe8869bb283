"""Limits: merged from what policies say, and clamped into requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from graftage.types import Limits

__all__ = ["clamp", "merge", "with_concurrency"]

FIGURES = tuple(
    each.name
    for each in fields(Limits)
    if each.name not in ("keep_window", "unload", "wait_for", "reasons", "warnings")
)
"""The fields of which the smallest value wins."""


def merge(answers: Iterable[tuple[str, Limits]]) -> Limits | None:
    """Return the tightest value of each field, with its reason; None if no policy set a limit."""
    merged: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    unload: dict[str, None] = {}
    wait_for: dict[str, None] = {}
    warnings: list[str] = []
    answered = False
    for policy, limits in answers:
        answered = True
        unload.update(dict.fromkeys(limits.unload))
        wait_for.update(dict.fromkeys(limits.wait_for))
        warnings += limits.warnings
        for name in FIGURES:
            value = getattr(limits, name)
            if value is not None and (name not in merged or value < merged[name]):
                merged[name] = value
                if name == "context_window":
                    merged["keep_window"] = limits.keep_window
                reasons[name] = f"{policy}: {limits.reasons.get(name, 'no reason given')}"
    if not answered:
        return None
    return Limits(**merged, unload=tuple(unload), wait_for=tuple(wait_for), reasons=reasons, warnings=tuple(warnings))


def clamp(
    wanted: Mapping[str, object], limits: Limits | None, *, force: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Return what a request may have of what it wants, and warnings about the difference.

    A field that is not set takes the limit. One that is set is lowered to it, or kept with `force`, with a warning.
    """
    clamped = dict(wanted)
    warnings = list(limits.warnings) if limits else []
    for name, value in wanted.items():
        limit = getattr(limits, name, None)
        if limits is None or limit is None:
            continue
        if value is None:
            clamped[name] = limit
        elif name == "context_window" and limits.keep_window and value < limit and not force:
            clamped[name] = limit
            warnings.append(f"`{name}` was raised from {value:g} to {limit:g}: the model is loaded with it.")
        elif value > limit:
            reason = limits.reasons.get(name, "")
            what = f"stays at {value:g} by `force`, above" if force else f"was lowered from {value:g} to"
            warnings.append(f"`{name}` {what} {limit:g} ({reason}).")
            clamped[name] = value if force else limit
    return clamped, warnings


def with_concurrency(limits: Limits | None, concurrency: int | None) -> Limits | None:
    """Return the limits with the setting `concurrency` as one more policy."""
    if concurrency is None:
        return limits
    if limits is not None and limits.concurrent_requests is not None and limits.concurrent_requests <= concurrency:
        return limits
    reasons = {**(limits.reasons if limits else {}), "concurrent_requests": "settings: `concurrency`"}
    return replace(limits or Limits(), concurrent_requests=concurrency, reasons=reasons)
