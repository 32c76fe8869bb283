"""A model that the embedded engine loads in a fifth of a second and that replies at once, with adapters.

Its weights are random and its tokens are letters, so replies are nonsense, but always the same, and far from those with
an adapter. A separate forward pass gives the expected replies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from lora_files import Model, Pair, add, close, logits, pairs

from graftage_llamacpp._convert import SYSTEM_PROMPT

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

START, END = "<|im_start|>", "<|im_end|>"
TOKENS = [chr(number) for number in range(33, 127)] + ["Ġ", "Ċ", START, END]
"""The visible characters of ASCII, a space and a line feed (as GPT-2 spells them), and two marks."""
TEMPLATE = (
    f"{{% for m in messages %}}{{{{'{START}'+m['role']+'\\n'+m['content']+'{END}\\n'}}}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{{{{'{START}assistant\\n'}}}}{{% endif %}}"
)
WINDOW = 32768
NAME = "small"


def add_vocabulary(writer: gguf.GGUFWriter, template: str = TEMPLATE) -> None:
    """Add the tokens and a chat template."""
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "default")
    writer.add_array("tokenizer.ggml.tokens", TOKENS)
    writer.add_array("tokenizer.ggml.token_type", [1] * (len(TOKENS) - 2) + [3, 3])
    writer.add_array("tokenizer.ggml.merges", ["~ ~"])
    writer.add_string("tokenizer.chat_template", template)


@dataclass(frozen=True, kw_only=True)
class SmallModel(Model):
    """A small llama that the engine can run."""

    vocabulary: int = len(TOKENS)
    seed: int = 6

    def weights(self) -> dict[str, Any]:
        """Return the original weights, changed so that no reply ends early."""
        found = super().weights()
        found["lm_head"][TOKENS.index(START) :] = 0
        return found

    def write_for_engine(self, path: Path, template: str = TEMPLATE) -> None:
        """Write its GGUF file with everything for a chat."""
        writer = gguf.GGUFWriter(path, self.architecture)
        numbers = {key: value for key, value in self.metadata().items() if isinstance(value, int)}
        numbers["llama.context_length"] = WINDOW
        numbers["llama.rope.dimension_count"] = self.width
        numbers["tokenizer.ggml.eos_token_id"] = TOKENS.index(END)
        for key, value in numbers.items():
            writer.add_uint32(key, value)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        add_vocabulary(writer, template)
        for name, data in self.placed().items():
            add(writer, name, data, "F32")
        close(writer)


MODEL = SmallModel()
ADAPTERS: Mapping[str, Mapping[str, Pair]] = {
    "ahoy": pairs(MODEL, seed=1),
    "contrary": pairs(MODEL, seed=2),
    "mute": pairs(MODEL, scale=1e-6),
}
"""Two that change every reply, and one that changes none."""
QUESTION = "What is the capital of France?"
BASE, AHOY = "E`3WyDG9", "fyS3yS95"
"""The reply to that question, without and with the adapter `ahoy`; a test compares both with `answer`."""


LONG: Mapping[str, Any] = {"max_tokens": 30_000, "context_window": WINDOW, "options": {"temperature": 0.0}}
"""Arguments of a chat that keeps the engine busy for a minute, unless it is stopped."""


def answer(question: str, adapter: str | None, count: int) -> str:
    """Return the most likely letters after a question, in F64."""
    placed = _merged({adapter: 1.0} if adapter else {})
    tokens = _prompt(SYSTEM_PROMPT, question)
    begin = len(tokens)
    for _ in range(count):
        tokens.append(int(logits(MODEL, placed, tokens, side_by_side=True)[-1].argmax()))
    return "".join(_letter(number) for number in tokens[begin:])


def first_letters(
    adapters: Mapping[str, float], system: str = SYSTEM_PROMPT, question: str = QUESTION, *, until: int = 0
) -> dict[str, float]:
    """Return the log-probability of each first letter after a question, in F64.

    The weighted adapters do not act on the letters until a place of the prompt.
    """
    tokens = _prompt(system, question)
    found = logits(MODEL, _merged(adapters), tokens, side_by_side=True, until=until, before=_merged({}))[-1]
    found = found - np.log(np.exp(found).sum())
    return {_letter(number): float(each) for number, each in enumerate(found)}


def _merged(adapters: Mapping[str, float]) -> dict[str, Any]:
    weights = MODEL.weights()
    for adapter, weight in adapters.items():
        for name, pair in ADAPTERS[adapter].items():
            weights[name] = weights[name].astype(np.float64) + weight * pair.change
    return MODEL.placed(weights)


def _prompt(system: str, question: str) -> list[int]:
    return [*_said("system", system), *_said("user", question), TOKENS.index(START), *_spelt("assistant\n")]


def place_of(letters: str, question: str) -> int:
    """Return the place of letters of a question in its prompt."""
    return len(_said("system", SYSTEM_PROMPT)) + len([START, *"user\n"]) + question.rindex(letters)


def _letter(number: int) -> str:
    return {"Ġ": " ", "Ċ": "\n"}.get(TOKENS[number], TOKENS[number])


def _said(role: str, text: str) -> list[int]:
    return [TOKENS.index(START), *_spelt(f"{role}\n{text}"), TOKENS.index(END), *_spelt("\n")]


def _spelt(text: str) -> list[int]:
    return [TOKENS.index({" ": "Ġ", "\n": "Ċ"}.get(letter, letter)) for letter in text]


def write_embedder(path: Path) -> None:
    """Write the GGUF file of a small BERT, which only embeds."""
    hidden, width, words = 32, 64, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁hi", "▁hello"]
    writer = gguf.GGUFWriter(path, "bert")
    for key, value in {
        "bert.context_length": 128,
        "bert.embedding_length": hidden,
        "bert.feed_forward_length": width,
        "bert.block_count": 1,
        "bert.attention.head_count": 2,
        "bert.pooling_type": 1,
        "tokenizer.ggml.token_type_count": 2,
        **{f"tokenizer.ggml.{name}_token_id": at for at, name in enumerate(("padding", "unknown", "bos", "eos"))},
        "tokenizer.ggml.seperator_token_id": 3,
    }.items():
        writer.add_uint32(key, value)
    writer.add_float32("bert.attention.layer_norm_epsilon", 1e-5)
    writer.add_bool("bert.attention.causal", False)
    writer.add_string("tokenizer.ggml.model", "bert")
    writer.add_array("tokenizer.ggml.tokens", words)
    writer.add_array("tokenizer.ggml.token_type", [3] * 5 + [1] * 2)
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (len(words), hidden),
        "token_types": (2, hidden),
        "position_embd": (128, hidden),
        **{f"blk.0.attn_{each}": (hidden, hidden) for each in ("q", "k", "v", "output")},
        "blk.0.ffn_up": (width, hidden),
        "blk.0.ffn_down": (hidden, width),
    }
    for name, shape in shapes.items():
        add(writer, f"{name}.weight", rng.normal(0, 0.2, shape), "F32")
        if name.startswith("blk"):
            add(writer, f"{name}.bias", np.zeros(shape[0]), "F32")
    for name in ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm"):
        add(writer, f"{name}.weight", np.ones(hidden), "F32")
        add(writer, f"{name}.bias", np.zeros(hidden), "F32")
    close(writer)
