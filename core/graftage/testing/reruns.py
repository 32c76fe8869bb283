"""Recorded calls asked again, of another model or provider, with what changed.

with graftage.connect("ollama", model="llama3.2") as llm:
    for each in rerun("cassettes/story.yaml", llm):
        print(each)
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any, Final

from graftage._engine.answers import read_finish_reason
from graftage._records import dataclass
from graftage.exceptions import GraftageError
from graftage.testing._records import answer_of, record_of
from graftage.testing.cassettes import Cassette, CassetteError
from graftage.testing.replay import recorded_calls
from graftage.types import Chunk, Message, Reply, Tool, Usage

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from graftage import Client
    from graftage.testing.interactions import RecordedRequest

__all__ = ["Comparison", "rerun"]

_PASSED_ON: Final = (
    "tool_choice",
    "format",
    "think",
    "options",
    "context_window",
    "max_tokens",
    "system",
    "suffix",
    "raw",
)
_OPERATIONS: Final = {"/chat": "chat", "/generate": "generate"}
_NAMES: Final = ("text", "thinking", "tool_calls", "finish_reason", "usage")
_MAX_SHOWN: Final = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A recorded call, and the same call now."""

    operation: str
    prompt: str
    """The prompt, or the last message."""
    before: Reply | GraftageError
    """The recorded reply, or the error that was raised instead."""
    now: Reply | GraftageError

    @property
    def changes(self) -> Mapping[str, tuple[Any, Any]]:
        """What differs, each before and now: `text`, `thinking`, `tool_calls`, `finish_reason`, `usage`; or `error`."""
        before, now = _facts(self.before), _facts(self.now)
        names = ["error"] if before["error"] or now["error"] else list(before)
        return {name: (before[name], now[name]) for name in names if before[name] != now[name]}

    def __str__(self) -> str:
        changes = [f"  {name}: {_shown(now)} (was {_shown(before)})" for name, (before, now) in self.changes.items()]
        return "\n".join([f"{self.operation} {_shown(self.prompt)}: {'changed' if changes else 'the same'}", *changes])


def rerun(path: str | os.PathLike[str], llm: Client) -> Iterator[Comparison]:
    """Ask each `chat` and `generate` that a `Replay` recorded again, and yield the comparisons as the replies come.

    The client decides who is asked: its provider, its model (if it has none, the recorded one), its active adapter. An
    error of a call becomes a part of its comparison.

    Raises:
        CassetteError: the file cannot be read, or holds no such call: only a `Replay` records calls, and a cassette of
            HTTP does not.
    """
    cassette = Cassette(path)
    calls = [each for each in recorded_calls(cassette) if each.request.path in _OPERATIONS]
    if not calls:
        raise CassetteError(f"{cassette.path} holds no `chat` and no `generate`.", hint="Record it with `Replay`.")
    for each in calls:
        yield Comparison(
            operation=_OPERATIONS[each.request.path],
            prompt=_prompt(each.request),
            before=_before(each.body),
            now=_now(llm, each.request),
        )


def _prompt(request: RecordedRequest) -> str:
    with _reading():
        plain = json.loads(request.body)
        return str(plain["prompt"] if "prompt" in plain else plain["messages"][-1].get("content", ""))


def _now(llm: Client, request: RecordedRequest) -> Reply | GraftageError:
    with _reading():
        plain = json.loads(request.body)
        arguments = {name: plain[name] for name in _PASSED_ON if name in plain} | {"model": llm.model or plain["model"]}
        if "tools" in plain:
            arguments["tools"] = [record_of(each, Tool) for each in plain["tools"]]
        if any("images" in each for each in (plain, *plain.get("messages", ()))):
            return CassetteError("It has pictures, of which only hashes are recorded.", hint="Ask it by hand.")
        is_chat = "messages" in plain
        subject = [record_of(each, Message) for each in plain["messages"]] if is_chat else plain["prompt"]
    ask: Any = getattr(llm, _OPERATIONS[request.path])
    try:
        return ask(subject, **arguments)  # type: ignore[no-any-return]
    except GraftageError as error:
        return error


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CassetteError("A recorded request is not valid.", hint="Record it again.") from error


def _before(body: bytes) -> Reply | GraftageError:
    try:
        chunks: list[Chunk] = [answer_of(line, Chunk) for line in body.splitlines()]
    except CassetteError:
        raise
    except GraftageError as error:
        return error
    calls = tuple(call for each in chunks for call in each.tool_calls)
    last = chunks[-1] if chunks else Chunk()
    word = last.finish_reason
    return Reply(
        text="".join(each.text for each in chunks),
        thinking="".join(each.thinking for each in chunks),
        tool_calls=calls,
        finish_reason=None if word is None else read_finish_reason(word, calls=bool(calls), full=False),
        usage=last.usage or Usage(),
    )


def _facts(outcome: Reply | GraftageError) -> dict[str, Any]:
    """Return what counts of a reply. The ids of tool calls are generated, and differ each time."""
    if isinstance(outcome, GraftageError):
        return {"error": f"{type(outcome).__name__}: {outcome.message}"}
    calls = [(each.name, dict(each.arguments)) for each in outcome.tool_calls]
    found = {name: getattr(outcome, name) for name in _NAMES} | {"tool_calls": calls, "error": None}
    return found | {"usage": (outcome.usage.input_tokens, outcome.usage.output_tokens)}


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
