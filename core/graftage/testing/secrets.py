"""Secrets, which must not be in a cassette."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import urllib.parse
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from graftage.testing.interactions import CassetteError
from graftage.testing.matching import flatten

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from graftage.http import Headers
    from graftage.testing.interactions import Interaction

_SECRET_NAMES: Final = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
_MIN_SECRET: Final = 8
"""Shorter values, such as `1` or `true`, occur everywhere."""
_SECRET_SHAPES: Final = re.compile(
    r"(?P<key>\bsk-[A-Za-z0-9_-]{16,})"
    r"|(?P<token>\bhf_[A-Za-z0-9]{16,}|\bgh[opsu]_[A-Za-z0-9]{20,})"
    r"|(?P<bearer>\bBearer\s+[\w.~+/-]{16,})"
    r"|(?P<private_key>-----BEGIN [A-Z ]*PRIVATE KEY-----)"
)

_HARMLESS_HEADERS: Final = re.compile(
    r"accept(-\w+)?|cache-control|connection|content-(encoding|length|type)|date|expect|host|keep-alive|pragma|range"
    r"|te|traceparent|transfer-encoding|upgrade|user-agent|x-stainless-.+"
)
"""Request headers that clients set. The value of any other is treated as a secret."""
_MIN_HEADER_SECRET: Final = 6
_SCHEMES: Final = frozenset({"basic", "bearer", "token"})
"""Words before credentials in any header; in `authorization` any word may stand there."""


def secrets_of(headers: Headers) -> Iterator[tuple[str, str]]:
    """Yield the secrets of a request, each with the name of its header."""
    for name, value in headers:
        if not _HARMLESS_HEADERS.fullmatch(name):
            yield from ((part.strip(), name) for part in _parts(name, value) if len(part.strip()) >= _MIN_HEADER_SECRET)


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


def refuse_secrets(path: Path, interactions: list[Interaction], server: str | None, sent: Mapping[str, str]) -> None:
    """Refuse to write a secret. The message names its source, and never shows it."""
    texts = [server or ""]
    for each in interactions:
        if any(value != "identity" for value in each.headers.get("content-encoding", ())):
            raise CassetteError(
                f"{path} was not written: a compressed body cannot be searched for secrets.",
                hint="Turn compression off in the server, or in the proxy in front of it.",
            )
        texts += _texts(each)
    searched = "\n".join(dict.fromkeys(_decoded_forms("\n".join(texts))))
    if found := next(_secrets_in(searched, sent), None):
        raise CassetteError(
            f"{path} was not written: it would hold {found}.",
            hint="Record without it, or with a value made for tests that occurs nowhere else.",
        )


def _texts(interaction: Interaction) -> Iterator[str]:
    """Yield all text of an interaction that came from outside."""
    asked, fault = interaction.request, interaction.fault
    yield from (asked.method, asked.uri, interaction.reason, fault.message if fault else "")
    yield from asked.headers.values()
    yield from (value for values in interaction.headers.values() for value in values)
    for body in (asked.body, interaction.body):
        text = body.decode("utf-8", "replace")
        yield text
        yield from _joined_fields(text)


def _joined_fields(text: str) -> Iterator[str]:
    """Yield each field of a stream of JSON as one text: a word may be split over many lines."""
    fields: defaultdict[str, list[str]] = defaultdict(list)
    for line in text.split("\n"):
        for name, value in flatten(line.removeprefix("data:")).items():
            if value.startswith('"'):
                fields[name].append(value[1:-1])
    yield from map("".join, fields.values())


def _decoded_forms(text: str) -> Iterator[str]:
    """Yield the text, and its forms without the escapes of JSON and URLs; twice, for JSON inside JSON."""
    yield text
    for undo in (_unescaped, urllib.parse.unquote) * 2:
        text = undo(text)
        yield text


_ESCAPE: Final = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|(.))")
_ESCAPED: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


def _unescaped(text: str) -> str:
    # Servers differ in what they escape: Go writes `\u0026` for `&`, PHP `\/` for `/`.
    text = _ESCAPE.sub(lambda found: chr(int(found[1], 16)) if found[1] else _ESCAPED.get(found[2], found[2]), text)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _secrets_in(text: str, sent: Mapping[str, str]) -> Iterator[str]:
    for name, value in os.environ.items():
        named = _SECRET_NAMES.search(name) and len(value) >= _MIN_SECRET
        if named and any(form in text for form in _encoded_forms(value)):
            yield f"the value of the environment variable `{name}`"
    for value, header in sent.items():
        if any(form in text for form in _encoded_forms(value)):
            yield f"the value of the request header `{header}`, or a part of it"
    for match in _SECRET_SHAPES.finditer(text):
        yield f"what looks like a secret ({match.lastgroup})"


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
