"""Cassettes as files, in vcrpy's format."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import yaml

from graftage._values import read_file
from graftage.testing.interactions import CassetteError, Interaction, target_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

ORIGIN: Final = "http://localhost:11434"
"""Replaces the server's address in every file: a cassette names no machine."""
MAX_BYTES: Final = 16 * 1024 * 1024
"""Larger files are refused before they are parsed."""
_MAX_DEPTH: Final = 32
"""Nesting in a file. The C parser has no limit: a file of 100,000 brackets ends the process."""
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


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


def to_yaml(interactions: Iterable[Interaction], server: str | None) -> str:
    """Return the text of the file; equal interactions give equal text."""
    content = {"version": 1, "interactions": [_to_plain(each, server) for each in interactions]}
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))


def _to_plain(interaction: Interaction, server: str | None) -> dict[str, Any]:
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


# --- Reading ---------------------------------------------------------------------------------------------------------


def from_yaml(path: Path) -> tuple[str | None, list[Interaction]]:
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


def _from_plain(place: int, plain: Any) -> Interaction:
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
    return Interaction(
        method,
        target_of(uri),
        _headers(where, request.get("headers")),
        _bytes(where, request.get("body")),
        status["code"],
        str(status.get("message") or ""),
        _headers(where, response.get("headers")),
        _pieces(_bytes(where, body.get("string")), response.get("chunk_lengths")),
        cut_short=response.get("cut_short") is True,
    )


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
