"""A response that refuses: its words, its figures, and when to retry."""

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
"""Characters of the server's words in a message."""
DEEPEST: Final = 4
"""How many nested errors to unwrap: servers quote the error of another server as text inside their own."""
FACTS: Final = ("code", "type", "param", "n_prompt_tokens", "n_ctx")
"""Fields beside an error that are worth keeping."""
_FOLDER = re.compile(r"(?<![\w:/\\.])(?:[A-Za-z]:[\\/]|/)[^\s\"':,;()]*[\\/](?=[^\s\"':,;()/\\]+)")


@dataclass(frozen=True, slots=False, kw_only=True)
class Answer:
    """A response that refuses: with a status from 400 on, or with an error under status 200."""

    status: int
    headers: Headers
    body: bytes
    """Without the connection's secrets."""
    call: Call = field(repr=False)
    server: str = "the server"
    """The server's name, for messages."""

    @cached_property
    def _read(self) -> tuple[str, dict[str, Any], bool]:
        text = self.body.decode("utf-8", "replace").strip()
        facts: dict[str, Any] = {}
        value: Any = text
        known = False
        for _ in range(DEEPEST):
            if isinstance(value, str):
                value = _parsed(value)
            if isinstance(value, list) and value:  # Gemini puts its error into a list.
                value = value[0]
            if not isinstance(value, Mapping):
                break
            facts.update(_facts(value))
            inner = _inner(value)
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
        """The fields of `FACTS`, and the status, beside those words."""
        return self._read[1]

    @property
    def known(self) -> bool:
        """Whether the body was an error in JSON. If not, it may come from another service."""
        return self._read[2]

    @property
    def inner_status(self) -> int:
        """The status; for an error under status 200 the one in its body, if any."""
        found = self.facts.get("status", self.status) if self.status == OK else self.status
        return found if found == OK or REFUSED <= found <= LAST_STATUS else self.status

    @property
    def model(self) -> str:
        """The model of the call, for a sentence."""
        return f"`{self.call.model}`" if self.call.model else "the model"

    @property
    def said(self) -> str:
        """The server's words as a sentence: shortened, and without folders of its machine, which may name a person."""
        if not (self.known and self.words):
            return f"The status is {self.inner_status}."
        text = f"{self.server[:1].upper()}{self.server[1:]} says: {_FOLDER.sub('', self.words[:MAX_WORDS])}".rstrip()
        return text if text.endswith((".", "!", "?")) else f"{text}."

    @cached_property
    def searched(self) -> str:
        """What a table of words searches: the server's words and codes, in lower case."""
        parts = (self.words, *(str(self.facts[key]) for key in ("code", "type") if key in self.facts))
        return f" {' '.join(word for each in parts for word in each.lower().split())} "

    @property
    def retry_after(self) -> float | None:
        """Seconds to wait, from a header or the body; None if the server names none that is valid."""
        said = re.search(_WAIT_IN_BODY, self.body.decode("utf-8", "replace"))
        named = (
            _to_seconds(f"{header(self.headers, 'retry-after-ms')}ms"),
            _to_seconds(header(self.headers, "retry-after")),
            _seconds_until_reset(self.headers),
            _to_seconds(said and said[1]),
        )
        return next((seconds for seconds in named if seconds is not None), None)


Refusal: TypeAlias = Callable[[Answer], ProviderError | None]
"""A provider's own table: return the error for a response, or None for the toolkit's error."""


# --- Tables ----------------------------------------------------------------------------------------------------------

Make: TypeAlias = Callable[[Answer], ProviderError]
Rules: TypeAlias = tuple[tuple[tuple[str, ...], Make], ...]
"""A table of words: the first rule with a phrase among the server's words decides. Phrases are in lower case."""


def says(kind: type[ProviderError], sentence: str, hint: str, **facts: Any) -> Make:
    """Return a function that makes an error, for a table.

    Args:
        kind: its class.
        sentence: comes before the server's own words; `{model}` in it becomes the model of the call.
        hint: the way out.
        facts: other arguments of the class.
    """
    return lambda it: kind(f"{sentence.format(model=it.model)} {it.said}".lstrip(), hint=hint, **facts)


def by_words(it: Answer, rules: Rules) -> ProviderError | None:
    """Return the error that a table of words has for a response, or None."""
    return next((make(it) for phrases, make in rules if any(each in it.searched for each in phrases)), None)


# --- Reading ---------------------------------------------------------------------------------------------------------


def _parsed(text: str) -> Any:
    """Return the JSON in a text or in its first line; else the text."""
    if text.lstrip().startswith(("{", "[")):
        for each in (text, text.splitlines()[0]):
            with contextlib.suppress(ValueError, RecursionError):
                return json.loads(each)
    return text


def _inner(value: Mapping[str, Any]) -> Any:
    """Return the error inside an object, or its text; None if there is neither."""
    quoted = value.get("metadata")  # Where OpenRouter puts the error of the server behind it.
    if isinstance(quoted, Mapping) and quoted.get("raw"):
        return quoted["raw"]
    if isinstance(value.get("msg"), str) and isinstance(value.get("loc"), list):  # An error of pydantic.
        return f"{value['msg']}: {'.'.join(map(str, value['loc']))}"
    return next((value[key] for key in ("error", "message", "detail") if value.get(key) is not None), None)


def _facts(value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in FACTS:
        if isinstance(value.get(key), (str, int)):
            yield key, value[key]
    for key in ("code", "status", "StatusCode"):  # Other servers put words there.
        if isinstance(value.get(key), int) or re.fullmatch("[0-9]{3}", str(value.get(key))):
            yield "status", int(value[key])


# --- When to ask again -----------------------------------------------------------------------------------------------

EPOCH: Final = 1e9
"""A number from here on is a Unix time in seconds; from `MILLISECONDS` on, in milliseconds."""
MILLISECONDS: Final = 1e11
A_YEAR: Final = 366 * 86_400.0
"""Seconds: a longer wait is a mistake."""
_WAIT_IN_BODY: Final = (
    r"(?i)(?:retry_?(?:delay|after)\W{1,4}|(?:try again|retry) (?:in|after) )"
    r"((?:\d+(?:\.\d+)?(?:ms|[hms])?)+)(?!\w|\.\d|\s?(?:ms|milli|min|hour|day))"
)
"""A wait in the body: Google's `"retryDelay": "34s"`, OpenAI's "Please try again in 1m30s"."""


def _to_seconds(text: str | None) -> float | None:
    """Return the seconds from now for a number, a duration such as `1m30s`, a Unix time or a date."""
    if not text:
        return None
    seconds = duration(text)
    moment = _timestamp(text) if seconds is None else seconds if seconds >= EPOCH else None
    if moment is not None:
        seconds = max((moment / 1000 if moment >= MILLISECONDS else moment) - time.time(), 0.0)
    return seconds if seconds is not None and 0 <= seconds <= A_YEAR else None


def _timestamp(text: str) -> float | None:
    """Return the Unix time of a date in a form of HTTP (RFC 9110, 5.6.7) or of ISO 8601."""
    from datetime import UTC, datetime
    from email.utils import parsedate_to_datetime

    for read in (parsedate_to_datetime, datetime.fromisoformat):
        with contextlib.suppress(ValueError, OverflowError):
            found = read(text)
            return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    return None


def _seconds_until_reset(headers: Headers) -> float | None:
    """Return the seconds until the last used-up limit is reset. A limit that states no remainder counts as used up."""
    given = dict(headers)
    waits = [
        _to_seconds(value)
        for name, value in headers
        if "limit" in name and "reset" in name and given.get(name.replace("reset", "remaining"), "0") in ("0", "0.0")
    ]
    return max((seconds for seconds in waits if seconds is not None), default=None)
