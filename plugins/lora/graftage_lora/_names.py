"""Compares names of models: a hint for people, never a proof.

A name is read as family, version, variant and size: `unsloth/Qwen2.5-Coder-7B-Instruct-bnb-4bit` is qwen, 2.5, coder,
7b. Owner, folder, float types and words such as `instruct` do not count. Two names differ for sure only in what both
state; a folder such as `./output/merged` states nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from graftage.types import ModelInfo

__all__ = ["name_warnings"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


BASES: Final = _words(
    "apertus baichuan bloom chatglm command ernie exaone falcon gemma glm gpt granite hunyuan internlm lfm llama"
    " minicpm ministral mistral mixtral mpt olmo phi pythia qwen smollm stablelm starcoder yi"
)
LONG: Final = tuple(each for each in BASES if len(each) > 3)
"""Words that end with one of these are families of their own: `tinyllama`, `codegemma`."""
BRANDS: Final = _words(
    "aya codestral cogito deepseek devstral dolphin hermes magistral mathstral nemotron openchat openhermes openthinker"
    " orca qwq smolvlm solar starling tulu vicuna wizardlm zephyr"
)
"""Models that are trained further from others, and often name these too: `DeepSeek-R1-Distill-Qwen-7B`."""
VARIANTS: Final = _words(
    "abliterated audio code coder embed embedding guard math med n nemo neo neox omni oss prover r reranker uncensored"
    " vision vl"
)
SIZES: Final = _words("large lite medium micro mini nano small tiny")
UNVERSIONED: Final = _words("falcon gemma internlm llama olmo smollm")
"""Families whose first generation has no number in its name."""
QUANTISED: Final = re.compile(
    r"(?<![a-z\d])(i?q\d(_[0-9a-z]+)*|[bf]p?f?16|fp?(8|32)|int[48]|nf4|([2-8]|16|32)bit|w\da\d+|latest)(?![a-z\d])"
)
DECIMAL: Final = re.compile(r"(?<=\d)_(?=\d)|(?<![\d.]\d)(?<=\d)-(?=\d(?![\d._]*[bm\d._]))")
"""What stands for the point of a number in names without points: `llama-3_2-1b`, `llama-3-2-1b`."""
LONGEST: Final = 500
"""Letters of a name that are read."""
TOKEN: Final = re.compile(r"(?<![a-z\d.])(\d{1,4}x|e)?\d{1,4}(\.\d{1,4})?[bm]\b|v?\d+(\.\d+)*|[a-z]+")
SIZE: Final = re.compile(r"(\d{1,4}x|e)?\d{1,4}(\.\d{1,4})?[bm]")
DATE: Final = re.compile(r"2[3-9](0[1-9]|1[0-2])")
"""Year and month, as in `-2507`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    """What a model's name states; `None` and empty sets are not stated."""

    family: str | None
    root: str | None
    """The family that a brand was trained from."""
    version: str | None
    release: str | None
    """A version further back: `v0.3`."""
    date: str | None
    size: float | str | None
    """In numbers; a text for a mixture of experts."""
    sizes: frozenset[str]
    variants: frozenset[str]

    def differs(self, other: Name) -> bool:
        """Return whether two names surely belong to different models."""
        if _differ(self.size, other.size):
            return True
        if self.family is None or other.family is None:
            return False
        return (
            self.family != other.family
            or self.variants != other.variants
            or self._differs_in_version(other)
            or (bool(self.sizes and other.sizes) and self.sizes.isdisjoint(other.sizes))
            or any(_differ(getattr(self, each), getattr(other, each)) for each in ("root", "release", "date"))
        )

    def _differs_in_version(self, other: Name) -> bool:
        if self.version is not None and other.version is not None:
            return self.version != other.version
        bare, stated = (self, other) if self.version is None else (other, self)
        if stated.version is None or self.family not in UNVERSIONED or bare.size is None:
            return False
        return stated.version.split(".")[0] not in ("0", "1")


def name_warnings(stated: Iterable[str | None], base: ModelInfo) -> tuple[str, ...]:
    """Return a warning for each stated name that surely names a different model than the base model's names."""
    known = (base.name, base.parent, _joined_name(base.metadata), base.metadata.get("general.name"))
    names = [read_name(each) for each in known if isinstance(each, str)]
    clear = [each for each in names if each.family or each.size]
    return tuple(
        f"It was made for `{each[:LONGEST]}`, but the base model is `{base.name}`: check that they are the same model."
        for each in dict.fromkeys(filter(None, stated))
        if clear and all(read_name(each).differs(name) for name in clear)
    )


def _joined_name(metadata: Mapping[str, object]) -> str | None:
    """Return the name that llama.cpp's converter has split; the counted size alone would be no name."""
    found = [metadata.get(f"general.{key}") for key in ("basename", "finetune", "size_label", "version")]
    parts = [each for each in found if isinstance(each, str)]
    return " ".join(parts) if found[0] in parts and read_name(parts[0]).family else None


def read_name(text: str) -> Name:
    """Read a model's name: that of a repository, a folder, a file, or a model of Ollama."""
    words = [each[0] for each in TOKEN.finditer(_plain(text))]
    families = [each for each in words if each in BASES or each in BRANDS or each.endswith(LONG)]
    family = next((each for each in families if each not in BASES), families[0] if families else None)
    numbers = [each for each in words if SIZE.fullmatch(each)]
    return Name(
        family=family,
        root=next((each for each in families if each in BASES and each != family), None),
        version=_version(words, family),
        release=next((each for each in words if re.fullmatch(r"v\d.*", each)), None),
        date=next((each for each in words if DATE.fullmatch(each)), None),
        size=_size(numbers[0]) if numbers else None,
        sizes=SIZES.intersection(words),
        variants=VARIANTS.intersection(words),
    )


def _plain(text: str) -> str:
    """Return the last part of a path or reference in lower case, without float types."""
    text = text[-LONGEST:]
    cached = re.search(r"models--[^/\\]*?--([^/\\]+)", text)  # A folder of Hugging Face's cache.
    last = cached[1] if cached else re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    plain = last.lower().replace("___", ".")  # ModelScope's cache has no points in folders.
    plain = QUANTISED.sub(" ", re.sub(r"[:\s]+|\.gguf\b", " ", plain))
    return DECIMAL.sub(".", plain).replace("_", " ")


def _version(words: list[str], family: str | None) -> str | None:
    """Return the number that follows the family, with words of size between: `mistral-small3.1`."""
    if family is None:
        return None
    for each in words[words.index(family) + 1 :]:
        if re.fullmatch(r"\d{1,2}(\.\d+)*", each):  # Longer ones are dates.
            return each.removesuffix(".0")
        if each not in SIZES:
            break
    return None


def _size(text: str) -> float | str:
    if not text[:-1].replace(".", "").isdigit():
        return text
    return round(float(text[:-1]) * (1e9 if text[-1] == "b" else 1e6))


def _differ(one: object, other: object) -> bool:
    return one is not None and other is not None and one != other
