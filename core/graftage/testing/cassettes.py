"""Real exchanges, recorded once and replayed offline: a transport for providers that use `graftage.http`.

    with Cassette("cassettes/story.yaml", mode="record", server="Ollama 0.9.3") as cassette:
        with graftage.connect("ollama", model="smollm2:135m", transport=cassette) as llm:
            llm.chat("Tell me a story")

The files have vcrpy's format: vcrpy 8.2.1 or newer replays them, and so does pytest-recording. Three keys of a response
are ours, and vcrpy keeps them: `server`, the server's name; `chunk_lengths`, the sizes in which the body arrived; and
`cut_short`, if the body broke off. Nothing is patched: two cassettes may be open at once, in threads and in tasks.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import threading
import urllib.parse
import uuid
from collections import defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import yaml

from graftage._values import read_file
from graftage.exceptions import GraftageError, StreamInterrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import TracebackType
    from typing import Self

    from graftage.http import Clock, Colour, Headers, Request, Response, Transport

__all__ = ["Cassette", "CassetteError", "CassetteMiss"]

Key: TypeAlias = tuple[str, str, str]
"""What requests are matched by: the method, the path with its query, the body in canonical form."""

ORIGIN: Final = "http://localhost:11434"
"""Replaces the server's address in every file: a cassette names no machine."""
KEPT_REQUEST_HEADERS: Final = ("content-type",)
KEPT_RESPONSE_HEADERS: Final = ("content-type", "retry-after", "content-encoding")
MAX_BYTES: Final = 16 * 1024 * 1024
"""Larger files are refused before they are parsed."""
_MAX_DEPTH: Final = 32
"""Nesting in a file. The C parser has no limit: a file of 100,000 brackets ends the process."""
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class CassetteError(GraftageError):
    """A cassette cannot be read, or must not be written."""


class CassetteMiss(CassetteError):
    """The cassette does not hold a request, or has already replayed it."""


@dataclass
class _Interaction:
    """A request and its response."""

    method: str
    target: str
    """Path and query."""
    request_headers: Mapping[str, list[str]]
    request_body: bytes
    status: int
    reason: str
    headers: Mapping[str, list[str]]
    chunks: list[bytes] = field(default_factory=list)
    cut_short: bool = False

    @property
    def key(self) -> Key:
        return self.method, self.target, _canonical(self.request_body)


class Cassette:
    """A recording, given to a provider as its `transport` setting.

    On replay, each response is given once: equal requests get theirs in the order of the recording. Ids of tool calls
    are compared by their order, because they are generated and differ each time. On recording, the file is replaced
    when the block ends without an error. A request without a response, such as a refused connection, is not recorded.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mode: Literal["replay", "record"] = "replay",
        server: str | None = None,
    ) -> None:
        """Read the file, or start a new one.

        Args:
            path: where the file is, or will be.
            mode: `record` sends requests on and keeps the responses; `replay` never opens a connection.
            server: the server and its version, such as `Ollama 0.9.3`, kept in the file.

        Raises:
            ValueError: the mode is invalid.
            CassetteError: the file to replay is missing or malformed.
        """
        if mode not in ("replay", "record"):
            raise ValueError(f"`mode` must be `replay` or `record`, not {mode!r}")
        self.path = Path(path)
        self.mode = mode
        self.server = server
        self.misses: list[CassetteMiss] = []
        """Requests that were not found, even if a provider swallowed the error."""
        self._interactions: list[_Interaction] = []
        self._waiting: defaultdict[Key, deque[_Interaction]] = defaultdict(deque)
        self._sent: dict[str, str] = {}
        """The secrets that requests sent, each with the name of its header; they are never written."""
        self._lock = threading.Lock()
        if mode == "replay":
            self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.mode == "record" and error is None:
            self.save()

    def __len__(self) -> int:
        return len(self._interactions)

    def __bool__(self) -> bool:
        # An empty recording must not be false, or `if transport` would skip it and use the network.
        return True

    @property
    def unplayed(self) -> tuple[str, ...]:
        """Recorded requests that were not sent, as `POST /api/chat`."""
        with self._lock:
            return tuple(f"{each.method} {each.target}" for queue in self._waiting.values() for each in queue)

    def wrap(self, network: Callable[[], Transport]) -> Transport:
        """Return a transport that replays, or that records the given one; both colours use the same file."""
        return _Recorder(self, network()) if self.mode == "record" else _Player(self)

    def save(self) -> None:
        """Write the file, by way of a temporary one beside it.

        Raises:
            CassetteError: nothing was recorded, or the file cannot be written, or it would hold a secret: the value of
                a request header, of an environment variable with such a name, or text that looks like a key.
        """
        if not self._interactions:
            raise CassetteError(
                f"Nothing was recorded for {self.path}.", hint="Was the cassette given to the provider as `transport`?"
            )
        _refuse_secrets(self.path, self._interactions, self.server, self._sent)
        text = _to_yaml(self._interactions, self.server)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(text.encode())
        except (OSError, ValueError) as error:  # A NUL in the name is a ValueError.
            why = getattr(error, "strerror", None) or "the file name is not valid"
            raise CassetteError(f"The cassette {self.path} cannot be written: {why}.") from error

    def _write(self, data: bytes) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _read(self) -> None:
        self.server, self._interactions = _from_yaml(self.path)
        for each in self._interactions:
            self._waiting[each.key].append(each)

    def take(self, request: Request) -> _Interaction:
        """Take the response to a request; each is taken once.

        Raises:
            CassetteMiss: there is no such response, or none is left.
        """
        key = (request.method, _target(request.url), _canonical(_body(request)))
        with self._lock:
            if queue := self._waiting.get(key):
                return queue.popleft()
            miss = CassetteMiss(
                f"{self.path} does not hold this request. {_explain(key, self._interactions)}",
                hint="Record it again, or send a recorded request.",
            )
            self.misses.append(miss)
        raise miss

    def note_secrets(self, request: Request) -> None:
        """Note the secrets of a request before it is sent: any later response may repeat them."""
        with self._lock:
            self._sent.update(_secrets_of(request.headers))

    def begin(self, request: Request, response: Response) -> _Interaction:
        """Add a response when its head arrives, so that the file has the order in which they began."""
        interaction = _Interaction(
            request.method,
            _target(request.url),
            _select_headers(request.headers, KEPT_REQUEST_HEADERS),
            _body(request),
            response.status,
            response.reason,
            _select_headers(response.headers, KEPT_RESPONSE_HEADERS),
            cut_short=True,
        )
        with self._lock:
            self._interactions.append(interaction)
        return interaction


# --- Transports ------------------------------------------------------------------------------------------------------


class _Recorder:
    def __init__(self, cassette: Cassette, inner: Transport) -> None:
        self.colour = inner.colour
        self._cassette = cassette
        self._inner = inner

    async def send(self, request: Request, clock: Clock) -> Response:
        self._cassette.note_secrets(request)
        response = await self._inner.send(request, clock)
        return _Recording(response, self._cassette.begin(request, response))

    async def close(self) -> None:
        await self._inner.close()


class _Recording:
    """Passes each piece on as it arrives, and keeps a copy."""

    def __init__(self, inner: Response, interaction: _Interaction) -> None:
        self.status, self.reason, self.headers = inner.status, inner.reason, inner.headers
        self._inner = inner
        self._interaction = interaction

    async def read(self) -> bytes:
        piece = await self._inner.read()
        if piece:
            self._interaction.chunks.append(piece)
        else:
            self._interaction.cut_short = False
        return piece

    async def close(self) -> None:
        await self._inner.close()


class _Player:
    colour: Colour | None = None

    def __init__(self, cassette: Cassette) -> None:
        self._cassette = cassette

    async def send(self, request: Request, clock: Clock) -> Response:
        interaction = self._cassette.take(request)
        clock.sent()
        return Replayed(interaction)

    async def close(self) -> None:
        pass


class Replayed:
    """A recorded response in its original pieces; it breaks off where the original did."""

    def __init__(self, interaction: _Interaction) -> None:
        self.status, self.reason = interaction.status, interaction.reason
        self.headers = tuple((name.lower(), value) for name, values in interaction.headers.items() for value in values)
        self._pieces = iter(interaction.chunks)
        self._cut_short = interaction.cut_short

    async def read(self) -> bytes:
        piece = next(self._pieces, b"")
        if not piece and self._cut_short:
            raise StreamInterrupted(
                "The connection broke before the response was complete (recorded).",
                retryable=True,
                hint="Was the server stopped, or a proxy's limit reached?",
            )
        return piece

    async def close(self) -> None:
        pass


def _body(request: Request) -> bytes:
    return request.file.read_bytes() if request.file is not None else request.body


def _select_headers(headers: Headers, names: Iterable[str]) -> dict[str, list[str]]:
    found = {name: [value for each, value in headers if each == name] for name in names}
    return {name: values for name, values in found.items() if values}


# --- Matching --------------------------------------------------------------------------------------------------------


_MAX_SHOWN: Final = 5
"""Differences shown of a request that was not found."""


def _canonical(body: bytes) -> str:
    """Return JSON with sorted keys and numbered ids of tool calls; other text is unchanged."""
    try:
        return json.dumps(_number_ids(json.loads(body), {}), sort_keys=True, separators=(",", ":"))
    except (ValueError, RecursionError):
        return body.decode("utf-8", "backslashreplace")


def _number_ids(value: object, ids: dict[str, str]) -> Any:
    """Replace the ids of tool calls by `call 1`, `call 2` and so on: they are generated, and do not matter."""
    if isinstance(value, list):
        return [_number_ids(each, ids) for each in value]
    if not isinstance(value, dict):
        return value
    names = ("id", "tool_call_id") if "function" in value else ("tool_call_id",)
    return {
        key: ids.setdefault(each, f"call {len(ids) + 1}")
        if key in names and isinstance(each, str)
        else _number_ids(each, ids)
        for key, each in value.items()
    }


def _explain(key: Key, recorded: list[_Interaction]) -> str:
    """Describe the nearest recorded request, and what differs."""
    asked = f"Asked: {key[0]} {key[1]}."
    if not recorded:
        return f"{asked} It holds no request."
    if equal := sum(each.key == key for each in recorded):
        return f"{asked} It was recorded {_times(equal)} and has been played as often."
    # The path counts before the body.
    nearest, differences = min(
        ((each.key, list(_differences(each.key, key))) for each in recorded),
        key=lambda pair: (pair[0][:2] != key[:2], len(pair[1])),
    )
    shown = "; ".join(differences[:_MAX_SHOWN])
    more = f"; and in {len(differences) - _MAX_SHOWN} more" if len(differences) > _MAX_SHOWN else ""
    return f"{asked} The nearest recorded request is {nearest[0]} {nearest[1]}, which differs in {shown}{more}."


def _differences(recorded: Key, asked: Key) -> Iterator[str]:
    # The message already has their values.
    if recorded[0] != asked[0]:
        yield "the method"
    if recorded[1] != asked[1]:
        yield "the path"
    old, new = _flatten(recorded[2]), _flatten(asked[2])
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield f"`{name}` (recorded {_shorten(old.get(name))}, now {_shorten(new.get(name))})"


def _flatten(body: str) -> dict[str, str]:
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


def _shorten(value: str | None, limit: int = 80) -> str:
    if value is None:
        return "nothing"
    return value if len(value) <= limit else f"{value[:limit]}…"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


# --- Writing ---------------------------------------------------------------------------------------------------------


class _Flow(list[Any]):
    """A list to be written on one line."""


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


def _to_yaml(interactions: Iterable[_Interaction], server: str | None) -> str:
    """Return the text of the file; equal interactions give equal text."""
    content = {"version": 1, "interactions": [_to_plain(each, server) for each in interactions]}
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))


def _to_plain(interaction: _Interaction, server: str | None) -> dict[str, Any]:
    # vcrpy allows keys beside `interactions`, but pytest-recording 0.14 fails on them.
    response: dict[str, Any] = {"server": server} if server else {}
    response |= {
        "status": {"code": interaction.status, "message": interaction.reason},
        "headers": _one_line_each(interaction.headers),
        "body": {"string": _text(b"".join(interaction.chunks))},
        "chunk_lengths": _Flow(len(chunk) for chunk in interaction.chunks),
    }
    if interaction.cut_short:
        response["cut_short"] = True
    request = {
        "method": interaction.method,
        "uri": ORIGIN + interaction.target,
        "headers": _one_line_each(interaction.request_headers),
        "body": _text(interaction.request_body),
    }
    return {"request": request, "response": response}


def _one_line_each(headers: Mapping[str, list[str]]) -> dict[str, _Flow]:
    return {name: _Flow(values) for name, values in headers.items()}


def _text(body: bytes) -> str | bytes:
    try:
        return body.decode()
    except UnicodeDecodeError:
        return body


# --- Secrets ---------------------------------------------------------------------------------------------------------

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


def _secrets_of(headers: Headers) -> Iterator[tuple[str, str]]:
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


def _refuse_secrets(path: Path, interactions: list[_Interaction], server: str | None, sent: Mapping[str, str]) -> None:
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


def _texts(interaction: _Interaction) -> Iterator[str]:
    """Yield all text of an interaction that came from outside."""
    yield from (interaction.method, interaction.target, interaction.reason)
    for headers in (interaction.request_headers, interaction.headers):
        yield from (value for values in headers.values() for value in values)
    for body in (interaction.request_body, b"".join(interaction.chunks)):
        text = body.decode("utf-8", "replace")
        yield text
        yield from _joined_fields(text)


def _joined_fields(text: str) -> Iterator[str]:
    """Yield each field of a stream of JSON as one text: a word may be split over many lines."""
    fields: defaultdict[str, list[str]] = defaultdict(list)
    for line in text.split("\n"):
        for name, value in _flatten(line.removeprefix("data:")).items():
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


# --- Reading ---------------------------------------------------------------------------------------------------------


def _from_yaml(path: Path) -> tuple[str | None, list[_Interaction]]:
    """Read the server and the interactions of a file.

    Raises:
        CassetteError: the file is missing, too large or malformed.
    """
    content = _load(path)
    try:
        _expect(isinstance(content, dict), "the file is not a mapping")
        _expect(content.get("version") == 1, "its `version` is not 1")
        _expect(isinstance(content.get("interactions"), list), "`interactions` is not a list")
        interactions = [_from_plain(place, each) for place, each in enumerate(content["interactions"])]
        # Files of version 0.1 have one server, in their metadata.
        places = [content.get("metadata"), *(each["response"] for each in content["interactions"])]
        servers = (each.get("server") for each in places if isinstance(each, dict))
        return next((each for each in servers if isinstance(each, str)), None), interactions
    except ValueError as error:
        raise CassetteError(f"{path} is not a valid cassette: {error}.", hint="Record it again.") from error


def _load(path: Path) -> Any:
    try:
        data = read_file(path, MAX_BYTES)
    except FileNotFoundError as error:
        raise CassetteError(
            f"The cassette {path} does not exist.",
            hint='Record it with `Cassette(path, mode="record")`, or with `pytest --graftage-record`.',
        ) from error
    except OSError as error:
        raise CassetteError(f"The cassette {path} cannot be read: {error.strerror}.") from error
    try:
        _check_depth(path, data)
        return yaml.load(data, Loader=_LOADER)  # noqa: S506 # a safe loader, in C if available
    except (yaml.YAMLError, ValueError) as error:
        raise CassetteError(f"The cassette {path} is not valid YAML: {error}", hint="Record it again.") from error


def _check_depth(path: Path, data: bytes) -> None:
    depth = 0
    for event in yaml.parse(data, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise CassetteError(f"The cassette {path} is nested more than {_MAX_DEPTH} deep.")


def _from_plain(place: int, plain: Any) -> _Interaction:
    where = f"in interaction {place}, "
    _expect(isinstance(plain, dict), where + "the entry is not a mapping")
    request, response = plain.get("request"), plain.get("response")
    _expect(isinstance(request, dict), where + "`request` is not a mapping")
    _expect(isinstance(response, dict), where + "`response` is not a mapping")
    method, uri, status = request.get("method"), request.get("uri"), response.get("status")
    _expect(isinstance(method, str) and isinstance(uri, str), where + "`method` or `uri` is not text")
    _expect(isinstance(status, dict) and isinstance(status.get("code"), int), where + "`status.code` is not a number")
    body = response.get("body")
    _expect(isinstance(body, dict), where + "`response.body` is not a mapping")
    return _Interaction(
        method,
        _target(uri),
        _headers(where, request.get("headers")),
        _bytes(where, request.get("body")),
        status["code"],
        str(status.get("message") or ""),
        _headers(where, response.get("headers")),
        _pieces(_bytes(where, body.get("string")), response.get("chunk_lengths")),
        cut_short=response.get("cut_short") is True,
    )


_UNQUOTED: Final = "/?%:@!$&'()*+,;=~"
"""Characters that are not quoted in paths and queries, besides letters, digits and `-._`."""


def _target(uri: str) -> str:
    """Return the path and query of a URL as they are sent."""
    parts = urllib.parse.urlsplit(uri)
    query = f"?{parts.query}" if parts.query else ""
    return urllib.parse.quote((parts.path or "/") + query, safe=_UNQUOTED)


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _headers(where: str, headers: Any) -> dict[str, list[str]]:
    _expect(headers is None or isinstance(headers, dict), where + "`headers` is not a mapping")
    lists = {name: value if isinstance(value, list) else [value] for name, value in (headers or {}).items()}
    for name, values in lists.items():
        _expect(all(isinstance(each, str) for each in (name, *values)), where + f"the header {name!r} is not text")
    return lists


def _bytes(where: str, body: Any) -> bytes:
    _expect(body is None or isinstance(body, str | bytes), where + "a body is neither text nor bytes")
    return body.encode() if isinstance(body, str) else body or b""


def _pieces(body: bytes, lengths: Any) -> list[bytes]:
    """Split the body into its chunks; one chunk if their lengths are unknown or do not fit."""
    known = isinstance(lengths, list) and all(isinstance(each, int) and each > 0 for each in lengths)
    if not known or sum(lengths) != len(body):
        return [body] if body else []
    pieces, start = [], 0
    for length in lengths:
        pieces.append(body[start : start + length])
        start += length
    return pieces
