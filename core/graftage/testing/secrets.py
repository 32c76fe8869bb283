"""Secrets, which must not be in a cassette.

Three things count: the values of secret variables of the environment, what a request sent in its headers, and text that
looks like a secret. They are also found in base64, URL-encoded, escaped by JSON, and split over the pieces of a stream.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import urllib.parse
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from graftage.testing.interactions import CassetteError
from graftage.testing.shapes import in_address, is_placeholder, looks_random, shapes_in

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping
    from pathlib import Path

    from graftage.http import Headers
    from graftage.testing.interactions import Interaction

    Texts: TypeAlias = Iterable[tuple[str, str]]
    """Places, such as `request body`, and their texts."""

__all__ = ["Allowed", "Found", "find_secrets", "refuse_secrets", "secrets_of", "texts_of"]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A secret, without its value."""

    place: str
    """Such as ``request body, `messages[0].content` ``."""
    kind: str
    """Such as `a GitHub token`."""
    sha256: str
    """The hash of the value."""


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """What may be in a cassette although it looks like a secret: a value by its hash, or whatever is at a place."""

    why: str
    sha256: str | None = None
    place: str | None = None

    def __post_init__(self) -> None:
        """Check that it says what is allowed, and why."""
        if not self.why or (self.sha256 is None) is (self.place is None):
            raise ValueError("What is allowed must have a reason, and either a hash or a place.")

    @classmethod
    def of(cls, value: str, *, why: str) -> Allowed:
        """Allow a value, such as a key made for tests."""
        return cls(sha256=_hash(value), why=why)


def find_secrets(texts: Texts, sent: Mapping[str, str], allowed: Iterable[Allowed] = ()) -> Iterator[Found]:
    """Yield the secrets in texts. JSON, also on each line, is searched by its fields, and as it stands.

    Args:
        texts: each with its place.
        sent: secrets by their values, with their kinds, as `secrets_of` yields them.
        allowed: is left out.
    """
    searched = [(place, f"{_label(place)}: {text}") for place, text in _split(texts)]
    found = _values_in("\n".join(dict.fromkeys(text for _, text in searched)), sent)
    found |= {value: kind for place, text in searched if place.endswith("address") for value, kind in in_address(text)}
    if not found:
        return
    hashes, places = {each.sha256 for each in allowed}, {each.place for each in allowed}
    forms = [(place, "\n".join(_decoded_forms(text))) for place, text in searched]
    reported = set()
    for value, kind in found.items():
        encoded = _encoded_forms(value)
        seen: list[str] = []
        for place in (place for place, text in forms if any(each in text for each in encoded)):
            # A field comes before the text that holds it, and names the place better.
            if any(each.startswith(f"{place}, ") for each in seen):
                continue
            seen.append(place)
            if _hash(value) not in hashes and not _is_allowed(place, places) and (place, kind) not in reported:
                reported.add((place, kind))
                yield Found(place=place, kind=kind, sha256=_hash(value))


def _values_in(text: str, sent: Mapping[str, str]) -> dict[str, str]:
    """Return the secrets in a text, with their kinds."""
    forms = list(_decoded_forms(text))
    everything = "\n".join(forms)
    known = {**dict(_environment()), **sent}.items()
    found = {value: kind for value, kind in known if any(form in everything for form in _encoded_forms(value))}
    for value, kind in shapes_in(forms):
        found.setdefault(value, kind)
    return found


def refuse_secrets(
    path: Path,
    interactions: Iterable[Interaction],
    server: str | None,
    sent: Mapping[str, str],
    allowed: Iterable[Allowed] = (),
) -> None:
    """Refuse to write a secret. The message names its place and kind, and never shows it.

    Raises:
        CassetteError: there is one, or a body cannot be searched.
    """
    texts = [("name of the server", server or "")]
    for number, each in enumerate(interactions, 1):
        if any(value != "identity" for value in each.headers.get("content-encoding", ())):
            raise CassetteError(
                f"{path} was not written: a compressed body cannot be searched for secrets.",
                hint="Turn compression off in the server, or in the proxy in front of it.",
            )
        texts += ((f"interaction {number}, {place}", text) for place, text in texts_of(each))
    found = [f"{each.kind} ({each.place})" for each in find_secrets(texts, sent, allowed)]
    if found:
        more = f", and {len(found) - _MAX_SHOWN} more" if len(found) > _MAX_SHOWN else ""
        raise CassetteError(
            f"{path} was not written: it would hold {', '.join(found[:_MAX_SHOWN])}{more}.",
            hint="Record without it, or with a value made for tests. If it is none, allow it: "
            '`Cassette(..., allow=[Allowed(place="...", why="...")])`.',
        )


_MAX_SHOWN: Final = 3


def texts_of(interaction: Interaction) -> Iterator[tuple[str, str]]:
    """Yield all text of an interaction that came from outside, with its place."""
    asked, fault = interaction.request, interaction.fault
    yield "request method", asked.method
    yield "address", asked.uri
    for name, value in asked.headers.items():
        yield f"request header `{name}`", value
    yield "request body", asked.body.decode("utf-8", "replace")
    yield "reason of the response", interaction.reason
    for name, values in interaction.headers.items():
        yield f"response header `{name}`", "\n".join(values)
    yield "response body", interaction.body.decode("utf-8", "replace")
    yield "fault", fault.message if fault else ""


# --- Headers ---------------------------------------------------------------------------------------------------------


_MEDIA: Final = (
    r"(?:\*|[a-z]+)/(?:\*|[a-z]+(?:[.+-][a-z]+\d{0,2})*)(?:;\s*(?:q|charset|version|boundary)=[\w.\"'()+,/:=?-]+)*"
)
_LANGUAGE: Final = r"(?:\*|[a-z]{2,3}(?:-[A-Za-z]{2,4}|-\d{3})?)(?:;\s*q=[\d.]+)?"
_HARMLESS: Final = re.compile(
    rf"{_MEDIA}(?:,\s*{_MEDIA})*"
    rf"|{_LANGUAGE}(?:,\s*{_LANGUAGE})*"
    r"|(?:gzip|deflate|br|zstd|compress|identity|chunked|keep-alive|close|upgrade|trailers|no-cache|no-store"
    r"|max-age=\d+|100-continue|timeout=\d+|max=\d+|[,;\s*]|q=[\d.]+)+"
    r"|(?:[A-Z][a-z]{2}, )?\d\d [A-Z][a-z]{2} \d{4} [\d:]{8} GMT|\d{4}-\d\d-\d\d"
    r"|bytes=[\d, -]+"
    r"|[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}"  # Where a trace is, as OpenTelemetry sends it.
    r"|true|false|\d{1,7}"
)
"""Values that libraries set, under any name."""
_HARMLESS_NAMED: Final = re.compile(
    r"host: .*|user-agent: graftage"
    r"|user-agent: [A-Za-z][A-Za-z._-]*(?:/[A-Za-z][A-Za-z._-]*)?[/ ]v?\d[\d.]{0,12}(?:[.+-]?[a-z]{1,5}\d{0,4})?"
    r"(?: (?:\([\w.,:;/+ -]*\)|[A-Za-z][A-Za-z._-]*(?:/[\w.+-]{1,16})?))*"
    r"|x-stainless-[\w-]+: (?:[A-Za-z]+:?|[\d.]+|[A-Za-z]+[:-][\w.-]{1,15}|x\d\d|arm\d\d)"
)
"""Headers whose values are harmless under these names."""
_MIN_HEADER_SECRET: Final = 6
_SCHEMES: Final = frozenset({"basic", "bearer", "token"})
"""Words before credentials in any header; in `authorization` any word may stand there."""


def secrets_of(headers: Headers) -> Iterator[tuple[str, str]]:
    """Yield the secrets of a request with their kinds: the values of its headers that no library sets by itself."""
    for name, value in headers:
        if not _HARMLESS.fullmatch(value.strip()) and not _HARMLESS_NAMED.fullmatch(f"{name}: {value.strip()}"):
            for part in _parts(name, value):
                if len(secret := part.strip()) >= _MIN_HEADER_SECRET:
                    yield secret, f"the value of the request header `{name}`, or a part of it"


def _parts(name: str, value: str) -> Iterator[str]:
    """Yield what a server may repeat of a header: credentials without their scheme, a password, each cookie."""
    scheme, _, credentials = value.strip().partition(" ")
    has_scheme = credentials and ("authorization" in name or scheme.lower() in _SCHEMES)
    yield credentials if has_scheme else value
    if has_scheme and scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            yield base64.b64decode(credentials).decode().partition(":")[2]
    if name == "cookie":
        yield from (each.partition("=")[2].strip(' "') for each in value.split(";"))


# --- The environment -------------------------------------------------------------------------------------------------


_SECRET_NAMES: Final = re.compile(
    r"(?<![A-Za-z])(?:api|access|account|private|secret|auth|pg|db|mysql|redis|npm)*"
    r"(?:keys?|tokens?|secrets?|password|passwd|passphrase|pass|pwd|pat|dsn|creds?|credentials?|auth|jwt|cookie|sas"
    r"|webhook)(?![A-Za-z])",
    re.IGNORECASE,
)
"""Words in names of variables: `DB_PASS`, but not `COMPASS` or `KEYBOARD_LAYOUT`."""
_MIN_SECRET: Final = 8
"""Shorter values, such as `1` or `true`, occur everywhere."""
_ORDINARY: Final = re.compile(r"[A-Za-z]?[a-z]*(?:[ _.-][a-z]+)?|[A-Z]+(?:[ _.-][A-Z]+)?|[~.]{0,2}/[^:]*|[A-Za-z]:\\.*")
"""One or two words, and paths of files."""
_LONGEST_WORDS: Final = 20
_CONNECTION_PASSWORD: Final = re.compile(r"\b(?:password|pwd|\w*key)\s*=\s*([^;\s]+)", re.IGNORECASE)
"""As in `host=db user=app password=...` and `Server=db;Pwd=...`."""


def _environment() -> Iterator[tuple[str, str]]:
    """Yield the secrets of the environment, with their kinds."""
    for name, value in os.environ.items():
        kind = f"the value of the environment variable `{name}`"
        named = _SECRET_NAMES.search(name) is not None
        for secret in _secrets_of_variable(value.strip(), named=named):
            if len(secret) >= _MIN_SECRET and not (len(secret) <= _LONGEST_WORDS and _ORDINARY.fullmatch(secret)):
                yield secret, kind


def _secrets_of_variable(value: str, *, named: bool) -> Iterator[str]:
    """Yield a value, or what is secret in an address: its password, also of variables with other names."""
    if "://" not in value:
        if named and not value.startswith(("/", "~/", "./", "../")):
            yield value
            yield from _CONNECTION_PASSWORD.findall(value)
        return
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(value)
        if parts.password and not is_placeholder(parts.password) and parts.password != parts.username:
            yield parts.password
            yield urllib.parse.unquote(parts.password)
        if named:
            pieces = [parts.username or "", *parts.path.split("/"), *re.split("[&=]", parts.query)]
            yield from (each for each in pieces if looks_random(each))


# --- Texts -----------------------------------------------------------------------------------------------------------


def _split(texts: Texts) -> Iterator[tuple[str, str]]:
    """Yield each field of JSON as one text, and then the whole text: a word may be split over the lines of a stream."""
    for place, text in texts:
        fields: defaultdict[str, list[str]] = defaultdict(list)
        for document in _documents(text):
            for path, value in _strings(document, ""):
                fields[path].append(value)
        yield from ((f"{place}, `{path}`", "".join(values)) for path, values in fields.items())
        if text:
            yield place, text


def _documents(text: str) -> Iterator[object]:
    """Yield the JSON of a text, or that on each of its lines."""
    if "{" in text or "[" in text:
        try:
            yield json.loads(text)
        except (ValueError, RecursionError):
            for line in text.split("\n"):
                with contextlib.suppress(ValueError, RecursionError):
                    yield json.loads(line.removeprefix("data:"))


def _strings(value: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str) and path:
        yield path, value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _strings(each, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        words = [each for each in value if isinstance(each, str)]  # They may be a whole vocabulary.
        if words and path:
            yield path, "\n".join(words)
        for place, each in enumerate(value):
            if isinstance(each, dict | list):
                yield from _strings(each, f"{path}[{place}]")


def _label(place: str) -> str:
    """Return the name of a field or header: it may say that its text is a secret."""
    return place.rstrip("`0123456789[]").rpartition("`")[2].rpartition(".")[2]


def _is_allowed(place: str, allowed: Container[str | None]) -> bool:
    """Return whether a place is allowed, with or without the number of its interaction."""
    return place in allowed or place.removeprefix(place.partition(", ")[0] + ", ") in allowed


def _hash(value: str) -> str:
    return hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()


_IN_BASE64: Final = re.compile(r"[A-Za-z0-9+/]{20,}|[A-Za-z0-9_-]{20,}")
_READABLE: Final = re.compile(rb"[\t\n\r\x20-\x7e]{12,}")


def _decoded_forms(text: str) -> Iterator[str]:
    """Yield the text, and its forms without the escapes of JSON and URLs; twice, for JSON inside JSON. And base64."""
    forms = [text]
    for undo in (_unescaped, urllib.parse.unquote) * 2:
        forms.append(undo(forms[-1]))
    forms = list(dict.fromkeys(forms))
    yield from forms
    yield from filter(None, map(_out_of_base64, forms))


def _out_of_base64(text: str) -> str:
    """Return the readable texts that are in a text in base64, which may begin anywhere in a run of its signs."""
    found: list[str] = []
    for run in dict.fromkeys(_IN_BASE64.findall(text)):
        data = run.replace("-", "+").replace("_", "/").encode()
        for start in range(4):
            end = start + (len(data) - start) // 4 * 4
            rest = data[end:]
            part = data[start:end] + (rest + b"=" * (4 - len(rest)) if len(rest) > 1 else b"")
            found += (each.decode() for each in _READABLE.findall(base64.b64decode(part)))
    return "\n".join(found)


_ESCAPE: Final = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|(.))")
_ESCAPED: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


def _unescaped(text: str) -> str:
    # Servers differ in what they escape: Go writes `\u0026` for `&`, PHP `\/` for `/`.
    if "\\" not in text:
        return text
    text = _ESCAPE.sub(lambda found: chr(int(found[1], 16)) if found[1] else _ESCAPED.get(found[2], found[2]), text)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _encoded_forms(value: str) -> set[str]:
    """Return the forms of a secret in text without escapes: plain, URL-encoded, in base64."""
    data = value.encode("utf-8", "surrogateescape")
    return {value, urllib.parse.quote_plus(data), *_base64_forms(data)}


def _base64_forms(data: bytes) -> Iterator[str]:
    """Yield the base64 forms of bytes inside others; they depend on the offset in a group of three."""
    for before, start in ((0, 0), (1, 2), (2, 3)):
        signs = base64.b64encode(bytes(before) + data).decode()[start : (before + len(data)) * 8 // 6]
        yield signs
        yield signs.replace("+", "-").replace("/", "_")
