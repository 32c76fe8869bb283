"""An answer that refuses, and what it says: its words, its figures, and when to ask again."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from graftage._values import duration
from graftage.exceptions import ProviderError
from graftage.http.transport import Headers, header

if TYPE_CHECKING:
    from graftage.calls import Call

__all__ = ["Answer", "Refusal", "Rules", "by_words", "says"]

OK: Final = 200
REFUSED: Final = 400
LAST_STATUS: Final = 599
MAX_WORDS: Final = 500
"""Characters of the server's words that go into a message."""
DEEPEST: Final = 4
"""A server passes on what another one said as a text inside its own: unwrap it, but not for ever."""
FACTS: Final = ("code", "type", "param", "n_prompt_tokens", "n_ctx")
"""What stands beside an error and is worth keeping."""
_FOLDER = re.compile(r"(?<![\w:/\\.])(?:[A-Za-z]:[\\/]|/)[^\s\"':,;()]*[\\/](?=[^\s\"':,;()/\\]+)")


@dataclass(frozen=True, slots=False, kw_only=True)
class Answer:
    """An answer that refuses: with a status from 400 on, or with an error under status 200."""

    status: int
    headers: Headers
    body: bytes
    """Without the secrets of the connection."""
    call: Call = field(repr=False)
    server: str = "the server"
    """Who says it, for messages."""

    @cached_property
    def _read(self) -> tuple[str, dict[str, Any], bool]:
        text = self.body.decode("utf-8", "replace").strip()
        facts: dict[str, Any] = {}
        value: Any = text
        known = False
        for _ in range(DEEPEST):
            if isinstance(value, str):
                value = _parsed(value)
            if isinstance(value, list) and value:  # Gemini's API puts its one error into a list.
                value = value[0]
            if not isinstance(value, Mapping):
                break
            facts.update(_figures(value))
            inner = next((value[key] for key in ("error", "message", "detail") if value.get(key) is not None), None)
            if inner is None:
                break
            known, value = True, inner
        return (value if isinstance(value, str) else text)[: DEEPEST * MAX_WORDS], facts, known

    @property
    def words(self) -> str:
        """What the server said."""
        return self._read[0]

    @property
    def facts(self) -> Mapping[str, Any]:
        """The figures beside it."""
        return self._read[1]

    @property
    def known(self) -> bool:
        """Whether the body was an error in JSON: otherwise it may come from another service."""
        return self._read[2]

    @property
    def inner_status(self) -> int:
        """The status; of an error under status 200 the one in its body, where it has one."""
        found = self.facts.get("status", self.status) if self.status == OK else self.status
        return found if found == OK or REFUSED <= found <= LAST_STATUS else self.status

    @property
    def model(self) -> str:
        """The model of the call, as it stands in a sentence."""
        return f"`{self.call.model}`" if self.call.model else "the model"

    @property
    def said(self) -> str:
        """The server's words as a sentence, cut, and without the folders of its machine, which may name a person."""
        if not (self.known and self.words):
            return f"The status is {self.inner_status}."
        text = f"{self.server[:1].upper()}{self.server[1:]} says: {_FOLDER.sub('', self.words[:MAX_WORDS])}".rstrip()
        return text if text.endswith((".", "!", "?")) else f"{text}."

    @cached_property
    def searched(self) -> str:
        """What tables of words look into, in lower case: the server's words, and the codes beside them."""
        parts = (self.words, *(str(self.facts[key]) for key in ("code", "type") if key in self.facts))
        return f" {' '.join(word for each in parts for word in each.lower().split())} "

    @property
    def retry_after(self) -> float | None:
        """Seconds to wait, where the server names them in a header or in its words; what makes no sense is left out."""
        said = re.search(_SAID, self.body.decode("utf-8", "replace"))
        named = (
            _wait(f"{header(self.headers, 'retry-after-ms')}ms"),
            _wait(header(self.headers, "retry-after")),
            _reset(self.headers),
            _wait(said and said[1]),
        )
        return next((seconds for seconds in named if seconds is not None), None)


Refusal: TypeAlias = Callable[[Answer], ProviderError | None]
"""An author's own table: the error for an answer, or None for what the table of the toolkit says."""


# --- Tables ----------------------------------------------------------------------------------------------------------

Make: TypeAlias = Callable[[Answer], ProviderError]
Rules: TypeAlias = tuple[tuple[tuple[str, ...], Make], ...]
"""A table of words: the first rule of which one phrase, in lower case, is among the server's words decides."""


def says(kind: type[ProviderError], sentence: str, hint: str, **facts: Any) -> Make:
    """How a table makes an error.

    Args:
        kind: its class.
        sentence: what it says before the server's own words; `{model}` in it becomes the model of the call.
        hint: the way out.
        facts: what else the class takes.
    """
    return lambda it: kind(f"{sentence.format(model=it.model)} {it.said}".lstrip(), hint=hint, **facts)


def by_words(it: Answer, rules: Rules) -> ProviderError | None:
    """The error that a table of words has for an answer."""
    return next((make(it) for phrases, make in rules if any(each in it.searched for each in phrases)), None)


# --- Reading ---------------------------------------------------------------------------------------------------------


def _parsed(text: str) -> Any:
    """The JSON that a text is, or that its first line is; else the text."""
    if text.lstrip().startswith(("{", "[")):
        for each in (text, text.splitlines()[0]):
            with contextlib.suppress(ValueError, RecursionError):
                return json.loads(each)
    return text


def _figures(value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in FACTS:
        if isinstance(value.get(key), (str, int)):
            yield key, value[key]
    for key in ("code", "status", "StatusCode"):  # Elsewhere they are words.
        if isinstance(value.get(key), int) or re.fullmatch("[0-9]{3}", str(value.get(key))):
            yield "status", int(value[key])


# --- When to ask again -----------------------------------------------------------------------------------------------

EPOCH: Final = 1e9
"""A number from here on is a time of Unix, in seconds, or in milliseconds where it is `MILLISECONDS` or more."""
MILLISECONDS: Final = 1e11
A_YEAR: Final = 366 * 86_400.0
"""Seconds: who names more has made a mistake."""
_SAID: Final = (
    r"(?i)(?:retry_?(?:delay|after)\W{1,4}|(?:try again|retry) (?:in|after) )"
    r"((?:\d+(?:\.\d+)?(?:ms|[hms])?)+)(?!\w|\.\d|\s?(?:ms|milli|min|hour|day))"
)
"""How long to wait, in the body: Google's `"retryDelay": "34s"`, OpenAI's "Please try again in 1m30s"."""


def _wait(text: str | None) -> float | None:
    """The seconds from now on that a number, a duration such as `1m30s`, a time of Unix or a date means."""
    if not text:
        return None
    seconds = duration(text)
    moment = _date(text) if seconds is None else seconds if seconds >= EPOCH else None
    if moment is not None:
        seconds = max((moment / 1000 if moment >= MILLISECONDS else moment) - time.time(), 0.0)
    return seconds if seconds is not None and 0 <= seconds <= A_YEAR else None


def _date(text: str) -> float | None:
    """The time of Unix that a date means, in one of the three forms of HTTP (RFC 9110, 5.6.7) or that of ISO 8601."""
    from datetime import UTC, datetime
    from email.utils import parsedate_to_datetime

    for read in (parsedate_to_datetime, datetime.fromisoformat):
        with contextlib.suppress(ValueError, OverflowError):
            found = read(text)
            return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    return None


def _reset(headers: Headers) -> float | None:
    """Seconds until the limit that is used up begins again; until the last of them where several are, or may be."""
    given = dict(headers)
    waits = [
        _wait(value)
        for name, value in headers
        if "limit" in name and "reset" in name and given.get(name.replace("reset", "remaining"), "0") in ("0", "0.0")
    ]
    return max((seconds for seconds in waits if seconds is not None), default=None)
