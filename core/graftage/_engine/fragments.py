"""Join what servers send in pieces: tool calls, and thoughts in tags."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from graftage._engine.answers import read_object, read_tool_call, read_word
from graftage.exceptions import InferenceFailed
from graftage.types import Reply, ToolCall

__all__ = ["CallJoiner", "ThoughtSplitter"]

OPEN: Final = "<think>"
CLOSE: Final = "</think>"


class CallJoiner:
    """Joins the fragments of tool calls in OpenAI's form, also where servers leave out their index or id."""

    def __init__(self) -> None:
        self._calls: list[dict[str, str]] = []
        self._places: dict[object, dict[str, str]] = {}

    def add(self, part: Mapping[str, Any]) -> None:
        """Add a fragment: to the call with its index or id; else to a new call if it has a name, or to the last one."""
        function = read_object(part.get("function"))
        place, call_id, name = part.get("index"), read_word(part.get("id")), read_word(function.get("name"))
        place = call_id if place is None else place
        call = self._places.get(place)
        if place is None and not name and self._calls:
            call = self._calls[-1]
        if call is None or (call_id and name and call["id"] not in ("", call_id)):  # Some servers count all as 0.
            call = {"id": "", "name": "", "arguments": ""}
            self._calls.append(call)
        if place is not None:
            self._places[place] = call
        arguments = function.get("arguments")
        call["id"], call["name"] = call["id"] or call_id or "", call["name"] or name or ""
        call["arguments"] += arguments if isinstance(arguments, str) else json.dumps(arguments) if arguments else ""

    def read(self, *, cut: bool) -> tuple[ToolCall, ...]:
        """Return the calls.

        Raises:
            InferenceFailed: a call is malformed, or `cut` by the limit of the reply; `partial.raw` has it.
        """
        if cut and self._calls and not (last := self._calls[-1])["arguments"].rstrip().endswith("}"):
            problem = f"The reply reached its limit in the middle of a call of the tool `{last['name'][:80]}`."
            raise InferenceFailed(problem, hint="Raise `max_tokens`.", partial=Reply(text="", raw=last))
        return tuple(read_tool_call(each["name"], each["arguments"], each["id"]) for each in self._calls)


class ThoughtSplitter:
    """Takes a thought in `<think>` tags from the start of a text that comes in pieces."""

    def __init__(self) -> None:
        self._held = ""
        self._inside = self._gap = False
        self.over = False
        """Whether all that follows is text."""

    def split(self, piece: str, *, last: bool = False) -> tuple[str, str]:
        """Return the text and the thought of a piece, and hold back what may be the begin of a tag."""
        if self.over and not self._gap:
            return piece, ""
        held, self._held = self._held + piece, ""
        if not self._inside and not self.over:
            start = held.lstrip()
            if OPEN.startswith(start) and start != OPEN and not last:
                self._held = held
                return "", ""
            self._inside = start.startswith(OPEN)
            self.over = not self._inside
            if self.over:
                return held, ""
            held = start.removeprefix(OPEN)
        thought, closed, text = ("", "", held) if self.over else held.partition(CLOSE)
        if closed or self.over:
            self.over, text = True, text.lstrip()
            self._gap = not text
            return text, thought
        keep = 0 if last else next(n for n in range(len(CLOSE) - 1, -1, -1) if held.endswith(CLOSE[:n]))
        self._held = held[len(held) - keep :]
        return "", held[: len(held) - keep]
