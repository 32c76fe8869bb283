"""Adds up adapters: the sum of scaled products B @ A is one product, with A stacked and B side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from graftage_lora._architectures import module_name
from graftage_lora._configs import MAX_RANK
from graftage_lora._files import Refused
from graftage_lora._lora import Lora, Part, checked_scale, even_scale

__all__ = ["mixed"]


def mixed(loras: Sequence[tuple[Lora, float]], metadata: Mapping[str, object]) -> Lora:
    """Return the sum of adapters, each times its weight, for a base model with this metadata.

    Nothing is approximated: ranks add up, and differing scales are folded into B as F32. Rows get the original order,
    unless all the adapters have the order of one GGUF architecture.

    Raises:
        Refused: they cannot be added up.
    """
    first = loras[0][0].facts
    uniform = {(lora.facts.layout, lora.facts.architecture) for lora, _ in loras} == {
        (first.layout, first.architecture)
    }
    found: dict[str, list[Part]] = defaultdict(list)
    for lora, weight in loras:
        for part in lora.parts:
            scaled = replace(part, scale=checked_scale(part.scale * weight))
            if not uniform:  # What has GGUF's order and no other name gets the original ones.
                module = part.module or module_name(part.tensor, lora.facts.architecture) or ""
                scaled = replace(scaled, b=lora.original_rows(part, metadata), module=module)
            found[part.tensor].append(scaled)
    parts = tuple(_sum(each) for _, each in sorted(found.items()))
    facts = replace(first, shapes=tuple(part.shape for part in parts))
    return Lora(facts=facts if uniform else replace(facts, layout="peft", architecture=None), parts=parts)


def _sum(parts: Sequence[Part]) -> Part:
    """Return the sum of changes of one tensor."""
    first, *others = parts
    if not others:
        return first
    rank = sum(len(each.a) for each in parts)
    if rank > MAX_RANK:
        raise Refused(f"the ranks of `{first.tensor[:120]}` add up to {rank}; at most {MAX_RANK} are allowed")
    for each in others:
        if (each.a.shape[1], len(each.b)) != (first.a.shape[1], len(first.b)):
            raise Refused(f"they have other shapes of `{first.tensor[:120]}`: they are for different models")
    with np.errstate(over="ignore"):
        b = np.hstack([first.b, *(even_scale(each.b, each.scale / first.scale) for each in others)])
    if not np.isfinite(b).all():
        raise Refused(f"the scales of `{first.tensor[:120]}` differ too much to be one")
    return replace(first, a=np.vstack([each.a for each in parts]), b=b)
