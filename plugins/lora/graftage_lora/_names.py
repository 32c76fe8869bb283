"""Compares names of models: a hint for people, never a proof."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from graftage.types import ModelInfo

__all__ = ["name_warnings"]

QUANTISED: Final = re.compile(
    r"\b(i?q\d(_[0-9a-z]+)*|[bf]p?f?16|fp?32|int[48]|[48]bit|bnb|gguf|ggml|mlx|awq|gptq|dynamic|latest)\b"
)
SIZE: Final = re.compile(r"\b\d+(\.\d+)?[bm]\b")


def name_warnings(stated: Iterable[str | None], base: ModelInfo) -> tuple[str, ...]:
    """Return a warning for each stated name that surely names a different model."""
    names = [
        base.name,
        *(each for each in (base.metadata.get("general.basename"), base.parent) if isinstance(each, str)),
    ]
    return tuple(
        f"It was made for `{each}`, but the base model is `{base.name}`: check that they are the same model."
        for each in dict.fromkeys(filter(None, stated))
        if all(_surely_differ(each, name) for name in names)
    )


def _surely_differ(left: str, right: str) -> bool:
    """Return whether two names differ in family or size, as far as both state them."""
    (family, size), (other, other_size) = _family_and_size(left), _family_and_size(right)
    if size and other_size and size != other_size:
        return True
    return bool(family and other) and not family.startswith(other) and not other.startswith(family)


def _family_and_size(text: str) -> tuple[str, str]:
    """Split a model's name into family and size, without owner, path and quantisation."""
    last = re.split(r"[/\\]", text.rstrip("/\\"))[-1].lower()
    words = QUANTISED.sub(" ", re.sub(r"[:\s-]+", " ", last))
    size = SIZE.search(words)
    family = words[: size.start()] if size else words
    return re.sub(r"[^a-z0-9]|instruct|chat", "", family), size[0] if size else ""
