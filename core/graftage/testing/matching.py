"""Which recorded request is meant by a request, and what differs from the nearest one.

Bodies that say the same are equal: JSON is compared by its values, and fields that are null, empty texts or empty
objects count as absent. So does `stream` if it says what the API does anyway. Generated ids are compared by their
order; moments in fields such as `created_at` do not matter.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from graftage.http import is_loopback
from graftage.testing.chats import to_chat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from graftage.testing.interactions import RecordedRequest

    Matcher: TypeAlias = str | Callable[[RecordedRequest, RecordedRequest], bool | None]
    Normaliser: TypeAlias = Callable[[Any], Any]
    Key: TypeAlias = tuple[object, ...]

__all__ = ["Matching", "blur", "canonical", "flatten"]

DEFAULT: Final = ("method", "host", "path", "query", "body")
MATCHERS: Final = ("method", "scheme", "host", "port", "path", "query", "uri", "headers", "body", "raw_body", "chat")
"""The names of matchers: vcrpy's, and `chat`."""
_BODIES: Final = ("body", "raw_body", "chat")
_MAX_SHOWN: Final = 5
"""Differences shown of a request that was not found."""


class Matching:
    """The rules by which a cassette finds a request."""

    def __init__(
        self, match_on: Sequence[Matcher] = DEFAULT, normalise: Normaliser | None = None, headers: Iterable[str] = ()
    ) -> None:
        """Set the rules.

        Raises:
            ValueError: a matcher is neither a known name nor a function.
        """
        for each in match_on:
            if not callable(each) and each not in MATCHERS:
                raise ValueError(f"`match_on` must hold functions or some of {', '.join(MATCHERS)}, not {each!r}.")
        self.names: Final = tuple(each for each in match_on if isinstance(each, str))
        self.functions: Final = tuple(each for each in match_on if not isinstance(each, str))
        self._normalise: Final = normalise
        self._headers: Final = frozenset(headers)
        self._crowded: frozenset[str] = frozenset()
        """Hosts whose port counts."""

    def know(self, places: Iterable[tuple[str, int | None]]) -> None:
        """Note all hosts and ports of a file. A port counts if the file has several of its host."""
        ports: defaultdict[str, set[int | None]] = defaultdict(set)
        for host, port in places:
            ports[_host(host)].add(port)
        self._crowded = frozenset(host for host, found in ports.items() if len(found) > 1)

    def key(self, request: RecordedRequest) -> Key:
        """Return what the named matchers compare; equal requests have equal keys."""
        return tuple(self._part(name, request) for name in self.names)

    def agree(self, asked: RecordedRequest, recorded: RecordedRequest) -> bool:
        """Return whether one's own functions take two requests with the same key as equal."""
        return all(self._complaint(each, asked, recorded) is None for each in self.functions)

    def words(self, request: RecordedRequest) -> tuple[bytes, ...]:
        """Return words that the text of any matching request in a file must hold; none if nothing is known."""
        if "body" not in self.names or self._normalise is not None:
            return ()
        texts = _texts(_loaded(self._part("body", request)))
        return tuple(dict.fromkeys(word.encode() for text in texts for word in _WORD.findall(text)))

    def differences(self, recorded: RecordedRequest, asked: RecordedRequest) -> Iterator[str]:
        """Yield the differences of two requests in words, as in `the path (recorded /a, now /b)`."""
        for name in self.names:
            old, new = self._part(name, recorded), self._part(name, asked)
            if old == new:
                continue
            if name in _BODIES:
                yield from _body_differences(str(old), str(new))
            elif name in ("method", "path"):  # The message already has their values.
                yield f"the {name}"
            else:
                yield f"the {name} (recorded {_show(old)}, now {_show(new)})"
        for function in self.functions:
            if (complaint := self._complaint(function, asked, recorded)) is not None:
                yield f"`{getattr(function, '__name__', function)}`{complaint and f' ({complaint})'}"

    def explain(self, asked: RecordedRequest, recorded: Sequence[RecordedRequest]) -> str:
        """Describe the nearest recorded request, and what differs."""
        what = f"Asked: {asked.method} {asked.target}."
        if not recorded:
            return f"{what} It holds no request."
        key = self.key(asked)
        if equal := sum(self.key(each) == key and self.agree(asked, each) for each in recorded):
            return f"{what} It was recorded {_times(equal)} and has been played as often."
        # The path counts before the body.
        nearest, found = min(
            ((each, list(self.differences(each, asked))) for each in recorded),
            key=lambda pair: (sum(each.startswith("the ") for each in pair[1]), len(pair[1])),
        )
        shown = "; ".join(found[:_MAX_SHOWN])
        more = f"; and in {len(found) - _MAX_SHOWN} more" if len(found) > _MAX_SHOWN else ""
        return (
            f"{what} The nearest recorded request is {nearest.method} {nearest.target}, which differs in {shown}{more}."
        )

    def _complaint(
        self, function: Callable[..., bool | None], asked: RecordedRequest, recorded: RecordedRequest
    ) -> str | None:
        """Return why a function of vcrpy's kind takes two requests as different; None if it takes them as equal."""
        try:
            return "" if function(asked, recorded) is False else None
        except AssertionError as error:
            return str(error)

    def _part(self, name: str, request: RecordedRequest) -> Any:
        if name == "host":
            host = _host(request.host)
            return f"{host}:{request.port}" if host in self._crowded else host
        if name == "query":
            return tuple(request.query)
        if name == "headers":
            return tuple(sorted(pair for pair in request.headers.items() if pair[0] in self._headers))
        if name == "raw_body":
            return request.body.decode("utf-8", "backslashreplace")
        if name == "body":
            return canonical(request.body, request.path, self._normalise)
        if name == "chat":
            return _chat(request, self._normalise)
        return getattr(request, name)


def _host(name: str) -> str:
    return "localhost" if is_loopback(name) else name.rstrip(".")


# --- Bodies ----------------------------------------------------------------------------------------------------------


_CALL_IDS: Final = frozenset({"tool_call_id", "tool_use_id", "call_id"})
_CALLS: Final = frozenset({"function_call", "tool_use"})
"""Types of blocks whose `id` is that of a call."""
_MOMENTS: Final = frozenset({"created", "created_at", "timestamp", "request_id", "session_id"})
"""Fields that say nothing about what is requested."""
_UUID: Final = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", re.IGNORECASE)
_DATE: Final = re.compile(r"\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?: ?Z|[+-]\d\d:?\d\d)?)?")
_WORD: Final = re.compile(r"[A-Za-z0-9]+")
_NUMBERED: Final = re.compile(r"#\d+")
_SAYS_NOTHING: Final[tuple[object, ...]] = (None, "", {})


def canonical(body: bytes, path: str = "", normalise: Normaliser | None = None) -> str:
    """Return JSON in the form in which equal bodies are equal; other text is unchanged."""
    try:
        value = json.loads(body)
        value = _simplified(normalise(value) if normalise else value, {})
        if isinstance(value, dict) and value.get("stream") is path.startswith("/api/"):  # What is sent without it.
            del value["stream"]
        return "" if value in _SAYS_NOTHING else json.dumps(value, sort_keys=True, separators=(",", ":"))
    except (ValueError, RecursionError):
        return body.decode("utf-8", "backslashreplace")


def blur(value: Any) -> Any:
    """Replace ids and dates inside texts, for the argument `normalise`: `Today is 2026-11-28` becomes `Today is …`."""
    if isinstance(value, dict):
        return {name: blur(each) for name, each in value.items()}
    if isinstance(value, list):
        return [blur(each) for each in value]
    return _DATE.sub("…", _UUID.sub("…", value)) if isinstance(value, str) else value


def _simplified(value: object, ids: dict[str, str]) -> Any:
    """Leave out what says nothing, and number generated ids in the order of their appearance."""
    if isinstance(value, list):
        return [_simplified(each, ids) for each in value]
    if isinstance(value, dict):
        has_id = "function" in value or value.get("type") in _CALLS
        names = {*_CALL_IDS, "id"} if has_id else _CALL_IDS
        pairs = (
            (key, _numbered(each, ids) if key in names and isinstance(each, str) else _simplified(each, ids))
            for key, each in value.items()
            if key not in _MOMENTS
        )
        return {key: each for key, each in pairs if each not in _SAYS_NOTHING}
    if isinstance(value, str) and _UUID.fullmatch(value):
        return _numbered(value, ids)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _numbered(name: str, ids: dict[str, str]) -> str:
    return ids.setdefault(name, f"#{len(ids) + 1}")


def _chat(request: RecordedRequest, normalise: Normaliser | None) -> str:
    """Return a chat by its meaning; other bodies in their canonical form."""
    text = canonical(request.body, request.path, normalise)
    chat = to_chat(_loaded(text))
    return text if chat is None else json.dumps(chat, sort_keys=True, separators=(",", ":"))


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _texts(value: object) -> Iterator[str]:
    """Yield the names and texts of a body."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield name
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, str) and not _NUMBERED.fullmatch(value):  # It stands for an id.
        yield value


# --- Messages --------------------------------------------------------------------------------------------------------


def _body_differences(recorded: str, asked: str) -> Iterator[str]:
    old, new = flatten(recorded), flatten(asked)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            before, after = _shorten_both(old.get(name, "nothing"), new.get(name, "nothing"))
            yield f"`{name}` (recorded {before}, now {after})"


def flatten(body: str) -> dict[str, str]:
    """Return the leaves of a JSON body by their paths: `{"options.seed": "42"}`."""

    def walk(value: object, path: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict) and value:
            for name, each in value.items():
                yield from walk(each, f"{path}.{name}" if path else name)
        elif isinstance(value, list) and value:
            for place, each in enumerate(value):
                yield from walk(each, f"{path}[{place}]")
        else:
            yield path or "body", json.dumps(value, ensure_ascii=False)

    try:
        return dict(walk(json.loads(body), ""))
    except (ValueError, RecursionError):
        return {"body": body} if body else {}


def _shorten_both(old: str, new: str, limit: int = 80) -> tuple[str, str]:
    """Cut two texts to what is around their first difference."""
    same = next((place for place, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    start = max(0, same - limit // 2) if same >= limit else 0

    def shorten(text: str) -> str:
        cut = text[start : start + limit]
        return f"{'…' * bool(start)}{cut}{'…' * (start + limit < len(text))}"

    return shorten(old), shorten(new)


def _show(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join("=".join(map(str, each)) for each in value) or "nothing"
    return "nothing" if value in (None, "") else str(value)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
