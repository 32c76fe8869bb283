"""Readers of OpenAI's chat API: pieces of any size give the same calls and thoughts."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from graftage.http.completions import CallJoiner, ThoughtSplitter

TAGGED = st.lists(st.sampled_from(["<think>", "</think>", "<", "think>", "\n", " a", "b "]), max_size=8).map("".join)
VALUES = st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.integers(), max_size=3)


def cut(text: str, places: list[int]) -> list[str]:
    """Cut a text at some places."""
    ends = sorted({0, len(text), *(each % (len(text) + 1) for each in places)})
    return [text[start:end] for start, end in pairwise(ends)]


class TestThoughtSplitter:
    @given(TAGGED, st.lists(st.integers(0, 60)))
    def test_pieces_give_what_the_whole_gives(self, text: str, places: list[int]) -> None:
        assert self.split(cut(text, places)) == self.split([text])

    @given(TAGGED)
    def test_only_a_thought_at_the_start_is_taken(self, text: str) -> None:
        found = re.fullmatch(r"\s*<think>(.*?)(?:</think>\s*(.*))?", text, re.DOTALL)
        assert self.split([text]) == ((found[2] or "", found[1]) if found else (text, ""))

    def split(self, pieces: list[str]) -> tuple[str, str]:
        splitter = ThoughtSplitter()
        found = [*map(splitter.split, pieces), splitter.split("", last=True)]
        return "".join(text for text, _ in found), "".join(thought for _, thought in found)


class TestCallJoiner:
    @given(st.lists(st.tuples(VALUES, st.lists(st.integers(0, 60), max_size=4)), max_size=4), st.randoms())
    def test_interleaved_pieces_give_whole_calls(self, calls: list[tuple[Any, list[int]]], chance: Any) -> None:
        pieces = [[{"index": n, "id": f"c{n}", "function": {"name": f"f{n}"}}] for n in range(len(calls))]
        for n, (arguments, places) in enumerate(calls):
            pieces[n] += [{"index": n, "function": {"arguments": each}} for each in cut(json.dumps(arguments), places)]
        joiner = CallJoiner()
        while pieces := [each for each in pieces if each]:
            joiner.add(chance.choice(pieces).pop(0))
        found = {each.id: (each.name, each.arguments) for each in joiner.read(cut=False)}
        assert found == {f"c{n}": (f"f{n}", arguments) for n, (arguments, _) in enumerate(calls)}
