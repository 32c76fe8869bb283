"""A refusal that tells what would work instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from graftage.exceptions import ResourceLimitExceeded
from graftage_m4._footprint import BITS, GIB, Shape
from graftage_m4._machine import gb
from graftage_m4._scene import Scene

__all__ = ["not_now", "too_large"]

SMALLER_WINDOWS: Final = (2048, 1024, 512)
QUANTIZATIONS: Final = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
"""From the finest; all are common."""
LEAST_SYSTEM: Final = 4 * GIB
"""A wired limit must leave this, or 15 %, to everything else."""

Alternative = dict[str, Any]


def not_now(scene: Scene) -> ResourceLimitExceeded:
    """The Mac is not well enough to load a model: ask again later."""
    rules = scene.rules
    alternatives = list(_present(scene))
    wait = f"Ask again in {rules.retry_after:g} s"
    return ResourceLimitExceeded(
        f"`{scene.query.model}` is not loaded now: {rules.refuse}.",
        limit=rules.limit,
        value=rules.value,
        reason=rules.words,
        details={
            "retryable": True,
            "retry_after": rules.retry_after,
            "required": scene.footprint(scene.settings.minimum_window).total,
            "available": 0,
            "binding": rules.limit,
            "alternatives": alternatives,
        },
        hint=f"{wait}, or use {_words(alternatives)}." if alternatives else f"{wait}.",
    )


def too_large(scene: Scene, window: int, known: Mapping[str, Shape]) -> ResourceLimitExceeded:
    """A model does not fit, even with the least window.

    Args:
        scene: what was decided on.
        window: that least window.
        known: other models of that server, by name.
    """
    needs = scene.footprint(window)
    room = scene.room(scene.others)
    alternatives = [*_smaller_windows(scene, window, room.bytes), *_quantizations(scene, window, room.bytes)]
    alternatives += [*_present(scene), *_known(scene, known, room.bytes)]
    if room.binding == "budget":
        alternatives += _wired_limit(scene, needs.total)
        where = f"this Mac gives models {gb(room.bytes)} ({scene.budget.words}{_elsewhere(scene)})"
    else:
        alternatives.append({"kind": "free_memory", "bytes": needs.total - room.bytes})
        where = f"only {gb(room.bytes)} are free now, with {gb(scene.budget.live_reserve)} kept back"
    later = room.binding == "live" or needs.total <= room.static + scene.elsewhere
    smaller = next((each["context_window"] for each in alternatives if each["kind"] == "context_window"), None)
    return ResourceLimitExceeded(
        f"`{scene.query.model}` needs {gb(needs.total)} with a window of {window} tokens; {where}.",
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
            "budget_source": scene.budget.source,
            "context_window": window,
            "alternatives": alternatives,
        },
        hint=f"{_words(alternatives)[:1].upper()}{_words(alternatives)[1:]}, or go on with `force=True`."
        if alternatives
        else "Use a smaller model, or go on with `force=True`.",
    )


def _elsewhere(scene: Scene) -> str:
    return f"; models in use elsewhere on this Mac have {gb(scene.elsewhere)}" if scene.elsewhere else ""


def _smaller_windows(scene: Scene, window: int, room: int) -> Iterator[Alternative]:
    for smaller in SMALLER_WINDOWS:
        if smaller < window and scene.footprint(smaller).total <= room:
            yield {"kind": "context_window", "context_window": smaller}
            return


def _quantizations(scene: Scene, window: int, room: int) -> Iterator[Alternative]:
    shape, bits = scene.shape, scene.shape.bits or 0
    for name in (each for each in QUANTIZATIONS if BITS[each] < bits):
        coarser = replace(scene, shape=replace(shape, weights=int(shape.weights * BITS[name] / bits)))
        if coarser.footprint(window).total <= room:
            yield {"kind": "quantization", "quantization": name, "bytes": coarser.footprint(window).total}
            return


def _present(scene: Scene) -> Iterator[Alternative]:
    for each in scene.others:
        if not each.loading:
            yield {"kind": "model", "model": each.name, "loaded": True}


def _known(scene: Scene, known: Mapping[str, Shape], room: int) -> Iterator[Alternative]:
    loaded = {each.key[2] for each in scene.others}
    for name, shape in known.items():
        if name not in loaded and replace(scene, shape=shape).footprint(scene.settings.minimum_window).total <= room:
            yield {"kind": "model", "model": name, "loaded": False}


def _wired_limit(scene: Scene, needed: int) -> Iterator[Alternative]:
    """Raising what Metal may keep, where enough would be left to the rest of the system."""
    limit = needed + scene.budget.reserve + scene.elsewhere
    if limit <= scene.memory - max(LEAST_SYSTEM, int(0.15 * scene.memory)):
        yield {"kind": "wired_limit", "command": f"sudo sysctl iogpu.wired_limit_mb={-(-limit // (1 << 20))}"}


def _words(alternatives: list[Alternative]) -> str:
    """The alternatives in a sentence, the first of each kind."""
    texts: dict[str, str] = {}
    for each in alternatives:
        texts.setdefault(each["kind"], _text(each))
    words = list(texts.values())
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}" if words else ""


def _text(alternative: Alternative) -> str:
    kind = alternative["kind"]
    if kind == "context_window":
        return f"take a window of {alternative['context_window']} (setting `minimum_window`)"
    if kind == "quantization":
        return f"take it in {alternative['quantization']} ({gb(alternative['bytes'])})"
    if kind == "model":
        return f"use `{alternative['model']}`, which {'is loaded' if alternative['loaded'] else 'fits'}"
    if kind == "free_memory":
        return f"close programs that hold {gb(alternative['bytes'])}"
    return f"give models more with `{alternative['command']}` and restart the server, at the cost of everything else"
