"""Cassettes as files, in vcrpy's format: YAML or JSON.

A YAML file is cut at its interactions, and each is parsed when it is first needed: a test seldom plays all of a large
file. What is added later leaves the text of the others unchanged.
"""

from __future__ import annotations

import json
import re
import urllib.parse
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, overload

import yaml

from graftage._values import read_file
from graftage.testing.interactions import (
    CassetteError,
    Fault,
    HeaderDict,
    Interaction,
    Recorded,
    RecordedRequest,
    address_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from typing import Self

__all__ = ["CassetteFile", "check_depth", "pieces", "to_plain"]

MAX_BYTES: Final = 16 * 1024 * 1024
"""Larger files are refused before they are parsed, and bodies that become larger when they are decompressed."""
NO_RESPONSE: Final = 502
"""The status in the file of an exchange without a response: vcrpy knows no faults, and needs a status."""
_MAX_DEPTH: Final = 32
"""Nesting in a file. The C parser has no limit: a file of 100,000 brackets ends the process."""
_HARMLESS: Final = 1000
"""So many signs that may open a level do no harm."""


# --- Writing ---------------------------------------------------------------------------------------------------------


class _Flow(list[Any]):
    """A list to be written on one line."""


class _FlowDict(dict[str, Any]):
    """A mapping to be written on one line."""


class _Dumper(yaml.SafeDumper):
    """Writes readable text: blocks for several lines, no folding, no anchors."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002 # PyYAML's signature
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    if re.search("[\r\x85\u2028\u2029]", text):
        # YAML reads these as line breaks and would change them; only double quotes escape them.
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(
    _Flow, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)
_Dumper.add_representer(
    _FlowDict, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=True)
)


def _dump(content: object) -> bytes:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf")).encode()


def to_plain(interaction: Interaction) -> dict[str, Any]:
    """Return an interaction as it stands in a file."""
    # vcrpy allows keys beside `interactions`, but pytest-recording 0.14 fails on them.
    response: dict[str, Any] = {"recorded": _FlowDict(_said(interaction.recorded))}
    fault = interaction.fault
    response |= {
        "status": {
            "code": interaction.status or NO_RESPONSE,
            "message": interaction.reason if interaction.status or fault is None else f"No response: {fault.kind}",
        },
        "headers": _one_line_each(interaction.headers),
        "body": {"string": _text(interaction.body)},
        "chunk_lengths": _Flow(map(len, interaction.chunks)),
    }
    if interaction.times:
        response["chunk_times"] = _Flow(interaction.times)
    if fault is not None:
        response["fault"] = _FlowDict(_said(fault))
    if interaction.stopped:
        response["stopped"] = True
    if interaction.allow:
        response["allow"] = [_FlowDict(each) for each in interaction.allow]
    asked = interaction.request
    request = {
        "method": asked.method,
        "uri": asked.uri,
        "headers": _one_line_each({name: [value] for name, value in asked.headers.items()}),
        "body": _text(asked.body),
    }
    return {"request": request, "response": response}


def _said(record: Fault | Recorded) -> dict[str, Any]:
    return {name: value for name, value in asdict(record).items() if value is not None}


def _one_line_each(headers: Mapping[str, list[str]]) -> dict[str, _Flow]:
    return {name: _Flow(values) for name, values in headers.items()}


def _text(body: bytes) -> str | bytes:
    try:
        return body.decode()
    except UnicodeDecodeError:
        return body


# --- A file ----------------------------------------------------------------------------------------------------------


class CassetteFile(Sequence[Interaction]):
    """The interactions of a file, each parsed when it is needed."""

    def __init__(self) -> None:
        """Begin without a file."""
        self._path: Path | None = None
        self._head, self._tail = b"version: 1\ninteractions:\n", b""
        self._texts: list[bytes] | None = []
        """The text of each interaction, if the file could be cut."""
        self._plain: list[Any] | None = None
        """All of the file as plain data, if that was necessary."""
        self._content: dict[str, Any] = {}
        """All of the file but its interactions."""
        self._is_json = False
        self._parsed: dict[int, Interaction] = {}
        self.places: set[tuple[str, int | None]] = set()
        """The hosts and ports of all requests."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            CassetteError: the file is missing, too large or malformed. What is wrong with one interaction of many may
                show only when that is needed.
        """
        return cls.of(_read(path), path)

    @classmethod
    def of(cls, data: bytes, path: Path | None = None) -> Self:
        """Read the content of a file, with the errors of `read`."""
        file = cls()
        file._path = path
        try:
            if not file._cut(data):
                file._parse_all(data)
        except ValueError as error:
            raise _invalid(path, error) from error
        return file

    def _cut(self, data: bytes) -> bool:
        """Cut the text at its interactions; False if it has not the usual form."""
        cut = _cut(data)
        if cut is None:
            return False
        self._head, self._texts, self._tail = cut
        uris = [_uri_in(text) for text in self._texts]
        if None in uris:
            return False
        frame = self._load(self._head.removesuffix(b"interactions:\n") + b"interactions: []\n" + self._tail)
        self._check(frame)
        self._content = frame
        self.places = {_place(uri) for uri in uris if uri is not None}
        return True

    def _parse_all(self, data: bytes) -> None:
        self._texts = None
        content = self._loaded_json(data)
        self._is_json = content is not None
        content = self._load(data) if content is None else content
        self._check(content)
        self._plain = content["interactions"]
        self._content = content
        self.places = {_place(each.request.uri) for each in self}

    def _loaded_json(self, data: bytes) -> Any:
        try:
            return json.loads(data) if data.lstrip().startswith(b"{") else None
        except (ValueError, RecursionError):
            return None  # YAML may begin with a bracket as well.

    def _check(self, content: Any) -> None:
        _expect(isinstance(content, dict), "the file is not a mapping")
        # vcrpy reads files without a version, too.
        _expect(content.get("version", 1) == 1, "its `version` is not 1")
        _expect(isinstance(content.get("interactions"), list), "`interactions` is not a list")

    def _load(self, data: bytes) -> Any:
        try:
            check_depth(data)
            return yaml.load(data, Loader=Loader)  # noqa: S506 # a safe loader, in C if available
        except (yaml.YAMLError, ValueError) as error:
            raise CassetteError(
                f"The cassette {self._path} is not valid YAML: {error}", hint="Record it again."
            ) from error

    def __len__(self) -> int:
        return len(self._plain if self._texts is None else self._texts)  # type: ignore[arg-type] # one is there

    @overload
    def __getitem__(self, place: int) -> Interaction: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Interaction]: ...
    def __getitem__(self, place: int | slice) -> Interaction | Sequence[Interaction]:
        """Return an interaction.

        Raises:
            CassetteError: it is malformed.
        """
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        if not 0 <= place < len(self):
            raise IndexError(place)
        if place not in self._parsed:
            try:
                self._parsed[place] = _from_plain(place, self._plain_at(place), self._content)
            except (ValueError, RecursionError) as error:
                raise _invalid(self._path, error) from error
        return self._parsed[place]

    def _plain_at(self, place: int) -> Any:
        if self._plain is None and self._texts is not None:
            try:
                found = self._load(self._texts[place])
            except CassetteError:
                found = None
            if isinstance(found, list) and len(found) == 1:
                return found[0]
            # It may refer to an anchor in another one.
            content = self._load(self._head + b"".join(self._texts) + self._tail)
            self._check(content)
            _expect(len(content["interactions"]) == len(self._texts), "its text cannot be cut at its interactions")
            self._plain = content["interactions"]
        return self._plain[place] if self._plain is not None else None

    def may_hold(self, place: int, words: Iterable[bytes]) -> bool:
        """Whether an interaction that was not parsed may have a request whose body holds all of these words."""
        if self._texts is None:
            return True
        request = self._texts[place].partition(b"\n  response:\n")[0]
        return all(word in request for word in words) or _OPAQUE.search(request) is not None

    def with_more(self, interactions: Iterable[Interaction], *, as_json: bool = False) -> bytes:
        """Return the file with more interactions. Equal ones give equal text.

        Raises:
            CassetteError: JSON cannot hold a body that is not text.
        """
        new = [to_plain(each) for each in interactions]
        if self._texts and not self._texts[-1].endswith(b"\n"):
            self._texts[-1] += b"\n"
        if self._texts is not None and not (as_json and not self._texts):
            return self._head + b"".join(self._texts) + _dump(new) + self._tail
        content = {"version": 1, **self._content, "interactions": [*(self._plain or ()), *new]}
        if not (as_json or self._is_json):
            return _dump(content)
        try:
            return json.dumps(content, indent=4).encode() + b"\n"
        except TypeError as error:
            raise CassetteError(
                f"{self._path or 'The cassette'} was not written: JSON cannot hold a body that is not text.",
                hint="Use a name that ends in `.yaml`.",
            ) from error


_LINE: Final = re.compile(rb"^[^ \n#].*\n?", re.MULTILINE)
"""A line without indentation. Blocks and folded texts are always indented."""
_FIELD: Final = re.compile(rb"[a-z_]+:[ \n]")
_URI: Final = re.compile(rb"^    uri: (.*)$", re.MULTILINE)
_OPAQUE: Final = re.compile(rb"!!|^    body:\n|\\[ux](?:00)?(?:3[0-9]|[46][1-9A-Fa-f]|[57][0-9Aa])", re.MULTILINE)
"""What hides letters: binary data, a body that is no text, escaped letters."""


def _cut(data: bytes) -> tuple[bytes, list[bytes], bytes] | None:
    """Cut the text into what is before the interactions, each of them, and what is after."""
    starts: list[int] = []
    head = tail = None
    for line in _LINE.finditer(data):
        if head is None:
            if line[0] == b"interactions:\n":
                head = line.end()
            elif not _FIELD.match(line[0]):
                return None
        elif line[0].startswith(b"- request:") and tail is None:
            starts.append(line.start())
        elif not _FIELD.match(line[0]) or line[0].startswith(b"interactions:"):
            return None
        else:
            tail = line.start() if tail is None else tail
    if head is None or not starts or starts[0] != head:
        return None
    ends = [*starts[1:], len(data) if tail is None else tail]
    return data[:head], [data[a:b] for a, b in zip(starts, ends, strict=True)], data[ends[-1] :]


def _uri_in(text: bytes) -> str | None:
    found = _URI.search(text)
    return found and found[1].decode("utf-8", "replace").strip("'\"")


def _place(uri: str) -> tuple[str, int | None]:
    asked = RecordedRequest(method="", uri=uri)
    return asked.host, asked.port


# --- Reading ---------------------------------------------------------------------------------------------------------


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc] # in C if available
    """Reads the few tags of Python that vcrpy writes as plain data, and builds no object."""


def _construct_file(loader: Any, node: Any) -> bytes:
    """Return the content of a body that was a file: `BytesIO` with its content first in its state."""
    state = loader.construct_mapping(node, deep=True).get("state")
    return _joined(state[:1] if isinstance(state, list) else [])


def _construct_iterator(loader: Any, node: Any) -> bytes:
    """Return the content of a body that was an iterator: `iter` with a list as its argument."""
    found = loader.construct_mapping(node, deep=True).get("args")
    return _joined(found[0] if isinstance(found, list) and found and isinstance(found[0], list) else [])


def _joined(parts: list[Any]) -> bytes:
    _expect(all(isinstance(each, str | bytes) for each in parts), "a body is neither text nor bytes")
    return b"".join(each.encode() if isinstance(each, str) else each for each in parts)


_PYTHON: Final = "tag:yaml.org,2002:python/"
for _tag in ("str", "unicode"):
    Loader.add_constructor(_PYTHON + _tag, lambda loader, node: loader.construct_scalar(node))
Loader.add_constructor(_PYTHON + "tuple", lambda loader, node: loader.construct_sequence(node, deep=True))
Loader.add_constructor(_PYTHON + "object/new:_io.BytesIO", _construct_file)
Loader.add_constructor(_PYTHON + "object/apply:builtins.iter", _construct_iterator)


def _read(path: Path) -> bytes:
    try:
        return read_file(path, MAX_BYTES)
    except FileNotFoundError as error:
        raise CassetteError(
            f"The cassette {path} does not exist.",
            hint='Record it with `Cassette(path, mode="once")`, or with `pytest --record-mode=once`.',
        ) from error
    except OSError as error:
        raise CassetteError(f"The cassette {path} cannot be read: {error.strerror}.") from error


def _invalid(path: Path | None, error: ValueError | RecursionError) -> CassetteError:
    return CassetteError(f"{path} is not a valid cassette: {error}.", hint="Record it again.")


def check_depth(data: bytes) -> None:
    """Refuse what is nested too deeply, if it has signs enough for that."""
    signs = sum(map(data.count, (b"[", b"{", b"- ", b"? ", b" " * _HARMLESS)))
    if signs < _HARMLESS and b" " * _HARMLESS not in data:
        return
    depth = 0
    for event in yaml.parse(data, Loader=Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        _expect(depth <= _MAX_DEPTH, f"it is nested more than {_MAX_DEPTH} deep")


def _from_plain(place: int, plain: Any, content: Mapping[str, Any]) -> Interaction:
    where = f"in interaction {place}, "
    _expect(isinstance(plain, dict), where + "the entry is not a mapping")
    request, response = plain.get("request"), plain.get("response")
    _expect(isinstance(request, dict), where + "`request` is not a mapping")
    _expect(isinstance(response, dict), where + "`response` is not a mapping")
    method, uri, status = request.get("method"), request.get("uri"), response.get("status")
    _expect(isinstance(method, str) and isinstance(uri, str), where + "`method` or `uri` is not text")
    _expect(isinstance(status, dict) and isinstance(status.get("code"), int), where + "`status.code` is not a number")
    body = response.get("body")
    _expect(isinstance(body, dict) and "string" in body, where + "`response.body` has no `string`")
    asked = HeaderDict({name: ", ".join(each) for name, each in _headers(where, request.get("headers")).items()})
    headers = _headers(where, response.get("headers"))
    data, headers = _decoded(where, _bytes(where, body["string"], None), headers)
    chunks = tuple(pieces(data, response.get("chunk_lengths")))
    times = response.get("chunk_times")
    fault = _fault(where, response)
    answered = fault is None or fault.answered
    return Interaction(
        request=RecordedRequest(
            method=method,
            uri=address_of(uri),
            headers=asked,
            body=_bytes(where, request.get("body"), asked.get("content-type", "")),
        ),
        status=status["code"] if answered else 0,
        reason=str(status.get("message") or "") if answered else "",
        headers=headers,
        chunks=chunks,
        times=tuple(map(float, times)) if _fits(times, chunks) else (),
        fault=fault,
        stopped=response.get("stopped") is True,
        recorded=_recorded(response, content.get("metadata")),
        allow=_allow(where, response.get("allow")),
    )


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _headers(where: str, headers: Any) -> dict[str, list[str]]:
    _expect(headers is None or isinstance(headers, dict), where + "`headers` is not a mapping")
    lists = {
        name: [_header(each) for each in (value if isinstance(value, list) else [value])]
        for name, value in (headers or {}).items()
    }
    for name, values in lists.items():
        _expect(all(isinstance(each, str) for each in (name, *values)), where + f"the header {name!r} is not text")
    return lists


def _header(value: Any) -> Any:
    # Some libraries send bytes, which vcrpy keeps.
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _bytes(where: str, body: Any, kind: str | None) -> bytes:
    """Return a body as it was sent. A request may hold the object that was given to the library, with its kind."""
    if kind is not None and isinstance(body, dict | list):
        if "x-www-form-urlencoded" in kind and isinstance(body, dict):
            return urllib.parse.urlencode(body, doseq=True).encode()
        return json.dumps(body, ensure_ascii=False, default=str).encode()
    _expect(body is None or isinstance(body, str | bytes), where + "a body is neither text nor bytes")
    return body.encode() if isinstance(body, str) else body or b""


def _decoded(where: str, body: bytes, headers: dict[str, list[str]]) -> tuple[bytes, dict[str, list[str]]]:
    """Return a body without its compression. vcrpy may have undone it, and have kept the header."""
    found = (each for name, each in headers.items() if name.lower() == "content-encoding")
    kind = ", ".join(value for each in found for value in each).strip().lower()
    if kind in ("gzip", "x-gzip", "deflate"):
        reader = zlib.decompressobj(zlib.MAX_WBITS | (32 if "gzip" in kind else 0))
        try:
            whole = reader.decompress(body, MAX_BYTES)
            _expect(not reader.unconsumed_tail, where + f"a body is larger than {MAX_BYTES} bytes")
            body = whole
        except zlib.error:
            pass  # It is decoded already.
    elif kind in ("", "identity") or isinstance(_text(body), bytes):
        return body, headers
    return body, {name: each for name, each in headers.items() if name.lower() != "content-encoding"}


def pieces(body: bytes, lengths: Any) -> list[bytes]:
    """Split the body into its chunks; one chunk if their lengths are unknown or do not fit."""
    known = isinstance(lengths, list) and all(isinstance(each, int) and each > 0 for each in lengths)
    if not known or sum(lengths) != len(body):
        return [body] if body else []
    pieces, start = [], 0
    for length in lengths:
        pieces.append(body[start : start + length])
        start += length
    return pieces


def _fits(times: Any, chunks: tuple[bytes, ...]) -> bool:
    return (
        isinstance(times, list) and len(times) == len(chunks) and all(isinstance(each, int | float) for each in times)
    )


_FAULTS: Final = ("refused", "reset", "timeout", "cut", "invalid")
_PHASES: Final = ("connect", "first_token", "idle", "total")


def _fault(where: str, response: Mapping[str, Any]) -> Fault | None:
    if response.get("cut_short") is True:  # Of version 0.1.
        return Fault(
            kind="cut", message="The connection broke before the response was complete.", retryable=True, answered=True
        )
    fault = response.get("fault")
    if fault is None:
        return None
    _expect(isinstance(fault, dict) and fault.get("kind") in _FAULTS, where + f"`fault.kind` is none of {_FAULTS}")
    phase = fault.get("phase")
    return Fault(
        kind=fault["kind"],
        message=str(fault.get("message") or ""),
        retryable=fault.get("retryable") is True,
        phase=phase if phase in _PHASES else None,
        cause=_word(fault.get("cause")),
        answered=fault.get("answered") is True,
    )


def _recorded(response: Mapping[str, Any], metadata: Any) -> Recorded:
    found = response.get("recorded")
    # Files of version 0.1 have only the server, of each response or of all of them.
    old = response if "server" in response else metadata
    facts = {"server": old.get("server")} if isinstance(old, dict) else {}
    facts |= found if isinstance(found, dict) else {}
    return Recorded(
        date=_word(facts.get("date")),
        client=_word(facts.get("client")),
        server=_word(facts.get("server")),
        model=_word(facts.get("model")),
        digest=_word(facts.get("digest")),
    )


def _allow(where: str, found: Any) -> tuple[Mapping[str, str], ...]:
    entries = found if isinstance(found, list) else [] if found is None else [found]
    for each in entries:
        fits = isinstance(each, dict) and all(isinstance(text, str) for text in each.values())
        _expect(
            fits and {*each} in ({"why", "sha256"}, {"why", "place"}),
            where + "an entry of `allow` must have `why`, and `sha256` or `place`",
        )
    return tuple(entries)


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) else None
