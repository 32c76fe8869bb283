"""Read the responses of servers and the replies of models: strictly where it matters, leniently elsewhere.

A text, the end of a reply, a vector and the name of a tool must be what the API promises. Any other field may be
missing, empty or of another type: it is then unknown, and the other fields are still read.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from graftage.calls import EmbedRequest, GenerateRequest
from graftage.exceptions import InferenceFailed, ProtocolError
from graftage.types import FinishReason, Logprob, Reply, ToolCall, Usage

if TYPE_CHECKING:
    from graftage.calls import ChatRequest

__all__ = [
    "check_tool_choice",
    "cut_warning",
    "decode",
    "parsed",
    "read_arguments",
    "read_count",
    "read_entries",
    "read_finish_reason",
    "read_logprobs",
    "read_moment",
    "read_object",
    "read_records",
    "read_seconds",
    "read_text",
    "read_tool_call",
    "read_tool_calls",
    "read_usage",
    "read_vectors",
    "read_word",
    "reason_of",
]

T = TypeVar("T")
READ_ERRORS: Final = (TypeError, ValueError, LookupError, AttributeError, OverflowError)
"""The errors of reading a value of an unexpected type or form."""
LARGEST_COUNT: Final = 2**53
"""Some servers count with floats, which skip integers above it."""


# --- Fields ----------------------------------------------------------------------------------------------------------


def read_text(value: object) -> str:
    """Return a string of a response; None becomes an empty string.

    Raises:
        TypeError: the value is something else.
    """
    if value is not None and not isinstance(value, str):
        raise TypeError("it is not a string")
    return value or ""


def read_word(value: object) -> str | None:
    """Return an optional string; None if it is empty or not a string."""
    return value if isinstance(value, str) and value else None


def read_count(value: object) -> int | None:
    """Return an integer from 0 to 2**53, also from a float; None for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LARGEST_COUNT:
        return int(value) if value == int(value) else None
    return None


def read_seconds(value: object, *, per_second: float = 1) -> float | None:
    """Return a duration in seconds; None if it is not a number, or is negative or absurdly large.

    Args:
        value: the server's value.
        per_second: how many of its units are in a second, such as 1e9 for nanoseconds.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LARGEST_COUNT:
        return value / per_second
    return None


def read_moment(value: Any) -> datetime | None:
    """Return a moment in ISO 8601; None for anything else, and for the year 1, with which Go means "never"."""
    with contextlib.suppress(*READ_ERRORS):
        found = datetime.fromisoformat(value)
        return found if found.year > 1 else None
    return None


def read_object(value: object) -> Mapping[str, Any]:
    """Return a JSON object; an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def read_entries(found: object, read: Callable[[Any], T]) -> tuple[T, ...]:
    """Return the entries of a list that can be read; skip the others."""
    taken = []
    for each in found if isinstance(found, list) else ():
        with contextlib.suppress(*READ_ERRORS):
            taken.append(read(each))
    return tuple(taken)


def read_records(found: object, read: Callable[[Any], T]) -> tuple[T, ...]:
    """Return the entries of a requested list that can be read. None is an empty list.

    Raises:
        TypeError: it is not a list, or not one of its entries can be read.
    """
    taken = read_entries(found, read)
    if found not in (None, []) and not taken:
        raise TypeError("it is not a list of records")
    return taken


def read_logprobs(found: object, *, top: bool = True) -> tuple[Logprob, ...]:
    """Return the log-probabilities that can be read, each from an object with `token`, `logprob` and `top_logprobs`.

    Args:
        found: the list of objects.
        top: whether to read the most probable tokens at each place.
    """
    return read_entries(found, partial(_read_logprob, top=top))


def _read_logprob(found: Any, *, top: bool) -> Logprob:
    token, logprob = found["token"], found["logprob"]
    if not isinstance(token, str) or isinstance(logprob, bool) or math.isnan(logprob):
        raise TypeError("it is not a token with its log-probability")
    return Logprob(
        token=token,
        logprob=float(logprob),
        top=read_logprobs(found.get("top_logprobs"), top=False) if top else (),
    )


def read_usage(usage: Usage | None) -> Usage | None:
    """Return the counts of tokens without impossible ones."""
    if usage is None:
        return None
    return Usage(**{each.name: read_count(getattr(usage, each.name)) for each in fields(usage)})


def read_vectors(data: Any) -> list[Any]:
    """Return the vectors of a response in OpenAI's form, in the order of their `index`.

    Raises:
        ProtocolError: the indexes are not the numbers from 0 on.
    """
    places = [each.get("index") for each in data]
    if places != [None] * len(data) and sorted(places) != list(range(len(data))):
        raise ProtocolError(
            f"The response has {len(data)} vectors, which are not numbered from 0 to {len(data) - 1}.",
            hint="Embed one text at a time, and report it to the server's authors.",
        )
    return [each["embedding"] for each in sorted(data, key=lambda each: each.get("index") or 0)]


# --- JSON ------------------------------------------------------------------------------------------------------------


def decode(data: bytes | str) -> Any:
    """Decode JSON; put the replacement character for each lone half of a surrogate pair, which UTF-8 cannot encode.

    Raises:
        ValueError: it is not valid JSON or UTF-8.
        RecursionError: it is nested too deeply.
    """
    import msgspec

    with contextlib.suppress(msgspec.DecodeError, ValueError, RecursionError):
        return msgspec.json.decode(data)
    # `json` also accepts NaN and the line ends that models write inside strings.
    text = data if isinstance(data, str) else data.decode()
    found = json.loads(text, strict=False)
    return _without_lone_surrogates(found) if "\\ud" in text or "\\uD" in text else found


def _without_lone_surrogates(value: object) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_without_lone_surrogates(key): _without_lone_surrogates(each) for key, each in value.items()}
    return [_without_lone_surrogates(each) for each in value] if isinstance(value, list) else value


THOUGHT: Final = r"</think(?:ing)?>"
FENCE: Final = r"(?s)```[ \t]*\w*\s*(.*?)(?:\n[ \t]*```|```\Z|\Z)"
"""The end of a thought, and a block of code in Markdown, whose end may be missing."""


LONGEST_REASON: Final = 4000
"""Characters: a reply with many wrong fields has a long list of errors."""


def parsed(reply: Reply, parse: Callable[[str], Any]) -> Any:
    """Parse the JSON of a reply to a `format`, even inside a Markdown fence or after a thought.

    Raises:
        InferenceFailed: the JSON is missing or does not match; `partial` has the reply.
        Exception: an error of the host application's validators, unchanged.
    """
    text = next(
        filter(None, map(_valid_json, _json_candidates(reply.text if reply.text.strip() else reply.thinking))), None
    )
    if text is None:
        cut = reply.finish_reason == "length"
        raise InferenceFailed(
            "The reply was cut before its JSON was complete." if cut else "The reply does not match the `format`.",
            hint="Raise `max_tokens`, or `context_window` if it was full."
            if cut
            else "Try a larger model or a simpler schema.",
            partial=reply,
            details={"reason": "no JSON"},
        )
    try:
        return parse(text)
    except ValueError as error:
        from pydantic import ValidationError

        if not isinstance(error, ValidationError):
            raise
        raise InferenceFailed(
            "The reply does not match the `format`.",
            hint="Try a larger model or a simpler schema.",
            partial=reply,
            details={"reason": f"ValidationError of {error.title}"},
        ) from error


def check_tool_choice(reply: Reply, choice: str) -> None:
    """Check that a reply has the call that was required: servers do not enforce it, or a limit comes first.

    Args:
        reply: the whole reply.
        choice: `required`, or the name of the tool.

    Raises:
        InferenceFailed: no tool was called, or another one.
    """
    called = {each.name for each in reply.tool_calls}
    if called == {choice} or (called and choice == "required"):
        return
    cut = reply.finish_reason == "length"
    wanted = "a tool" if choice == "required" else f"`{choice}` alone"
    raise InferenceFailed(
        f"The reply {'was cut before' if cut else 'lacks'} the call of {wanted} that `tool_choice` requires.",
        hint="Raise `max_tokens`." if cut else "Ask again, or try a model that is better with tools.",
    )


def reason_of(error: InferenceFailed) -> str:
    """Return why a reply did not match its format, in the parser's words, for the model."""
    words = re.sub(r"\n *For further information visit \S+", "", str(error.__cause__ or error.message))
    return words[:LONGEST_REASON]


def _json_candidates(text: str) -> Iterator[str]:
    """Yield the parts of a reply that may be its JSON, the most likely first."""
    yield text
    rest = re.split(THOUGHT, text)[-1].strip("\ufeff \t\r\n")
    yield rest
    fenced = re.findall(FENCE, rest)
    if len(fenced) == 1:  # With several, it is unclear which one is meant.
        yield fenced[0]


def _valid_json(text: str) -> str | None:
    """Return a text if it is JSON, with the line ends that models write inside strings escaped."""
    for strict in (True, False):
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(text, strict=strict)
            return text if strict else json.dumps(found)
    return None


# --- Tool calls ------------------------------------------------------------------------------------------------------


def read_tool_calls(found: object) -> tuple[ToolCall, ...]:
    """Return the tool calls of a message. One malformed call fails all, since a part of a plan is another plan.

    Raises:
        InferenceFailed: a call is malformed.
        TypeError: it is neither a list nor a single call.
    """
    calls = [found] if found and isinstance(found, Mapping) else found or ()
    if not isinstance(calls, (list, tuple)):
        raise TypeError("it is not a list of tool calls")
    return tuple(_read_whole_call(read_object(each)) for each in calls if each is not None)


def _read_whole_call(call: Mapping[str, object]) -> ToolCall:
    body = read_object(call.get("function") or call)
    return read_tool_call(body.get("name"), body.get("arguments"), call.get("id"))


def read_tool_call(name: object, arguments: object, call_id: object = None) -> ToolCall:
    """Return a tool call as a model has written it.

    Args:
        name: the name of the tool.
        arguments: an object, or its JSON in a string; None, `null` and an empty string mean an empty object.
        call_id: the name of the call when its result is sent back; without one, a unique name is made.

    Raises:
        InferenceFailed: it has no name, or its arguments are not an object; `partial.raw` has what the model wrote.
    """
    found = read_arguments(arguments, decode)
    if isinstance(name, str) and name and found is not None:
        return ToolCall(name=name, arguments=found, id=str(call_id or f"call_{os.urandom(8).hex()}"))
    of = f" of the tool `{name[:80]}`" if isinstance(name, str) and name else ""
    raise InferenceFailed(
        f"The model's call{of} is malformed: {'its arguments are not a JSON object' if of else 'it has no tool name'}.",
        hint="Try again, raise `max_tokens`, or choose a larger model.",
        partial=Reply(text="", raw={"name": name, "arguments": arguments}),
    )


LOADS: Final = partial(json.loads, strict=False)


def read_arguments(value: object, loads: Callable[[str], Any] = LOADS) -> dict[str, Any] | None:
    """Return the arguments of a tool call; None if they cannot be read as an object."""
    with contextlib.suppress(ValueError, RecursionError):
        while isinstance(value, str):  # Some servers encode the JSON twice.
            value = loads(value) if value.strip() else None
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else None


# --- The end ---------------------------------------------------------------------------------------------------------


FINISH_REASONS: Final[Mapping[str, FinishReason]] = {
    "stop": "stop",
    "stop_sequence": "stop",
    "end_turn": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "complete": "stop",
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "tool_calls": "tool_calls",
    "tool_call": "tool_calls",
    "tool_use": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
    "safety": "content_filter",
    "refusal": "content_filter",
    "load": "load",
    "unload": "unload",
}
"""The finish reasons in the words of servers."""


def read_finish_reason(word: object, *, calls: bool, full: bool) -> FinishReason:
    """Return why a reply ended.

    Args:
        word: the server's word; empty if it gave none.
        calls: whether the reply has tool calls, which are more reliable than the word.
        full: whether the reply is as long as was allowed.
    """
    absent: FinishReason = "length" if full else "stop"
    reason = FINISH_REASONS.get(str(word).lower(), "other") if word else absent
    if calls and (reason == "stop" or not word):
        return "tool_calls"
    return "stop" if reason == "tool_calls" and not calls else reason


UNCOUNTED: Final = 2
"""Tokens: some servers do not count the special ones at the beginning and the end of a text."""
SMALLEST_DEFAULT_WINDOW: Final = 2048
"""Tokens: the smallest window that servers choose by default. All default windows are powers of two."""
WORDS: Final = r"[^\W\x00-\u2fff]{1,8}|[^\s\u3000-\uffff]+"
"""A word, or as many characters of a script without spaces as one token may hold."""


def cut_warning(request: ChatRequest | GenerateRequest | EmbedRequest, read: int | None) -> tuple[str, ...]:
    """Return a warning if a prompt or an input was probably cut to fit the window, which servers do silently.

    It was cut if the tokens that the server read fill the window, or are fewer than the words. A word takes at least
    one token, while a token may hold dozens of dashes or spaces, so the number of characters proves nothing. Some cuts
    go unnoticed: those that leave more tokens than words, if the server does not fill the window or sums over inputs.

    Args:
        request: the request.
        read: the tokens of the input, as the server counted them.
    """
    if isinstance(request, EmbedRequest):
        if not request.truncate:  # The server refuses what does not fit.
            return ()
        texts = request.inputs
    elif isinstance(request, GenerateRequest):
        texts = (request.prompt,)
    else:
        texts = tuple(each.content for each in request.messages)
    window, embeds = request.context_window, isinstance(request, EmbedRequest)
    windows = len(texts) if embeds else 1
    room = None if window is None else window * windows
    if room is not None and (read or 0) > room:  # The server's window is larger, or its count.
        return ()
    if not (_fills(read, room, embeds=embeds) or _has_more_words(texts, read, window, embeds=embeds)):
        return ()
    what = "An input" if embeds else "The prompt"
    of = f" of {window} tokens" if window else ""
    size = sum(map(len, texts))
    found = f"the server read {read} tokens of {size} characters" if read else f"it has {size} characters"
    return (f"{what} was probably cut to fit the context window{of}: {found}. Raise `context_window`, or send less.",)


def _fills(read: int | None, room: int | None, *, embeds: bool) -> bool:
    if read is None:
        return False
    if room is not None:
        return read >= room - UNCOUNTED
    # Some servers split an input before they embed it, so a power of two proves nothing there.
    return not embeds and read >= SMALLEST_DEFAULT_WINDOW and read.bit_count() == 1


def _has_more_words(texts: tuple[str, ...], read: int | None, window: int | None, *, embeds: bool) -> bool:
    # A text has at most as many tokens as characters.
    if sum(map(len, texts)) <= (window or SMALLEST_DEFAULT_WINDOW):
        return False
    words = [len(each.split()) if each.isascii() else len(re.findall(WORDS, each)) for each in texts]
    longest = max(words) if embeds else sum(words)
    return longest > (window or math.inf) or sum(words) > (read or math.inf)
