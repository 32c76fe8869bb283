"""Whether a live server still answers as recorded: changes of its API, apart from changes of texts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal
from urllib.parse import urlsplit

from graftage._engine.driving import drive
from graftage.calls import Call
from graftage.http import Clock, Request
from graftage.http._blocking import BlockingNetwork
from graftage.http.address import read_base
from graftage.http.transport import header, read_all
from graftage.testing import bodies
from graftage.testing.cassettes import Cassette

if TYPE_CHECKING:
    from pathlib import Path

    from graftage.testing.interactions import Interaction

__all__ = ["Difference", "verify"]

_HARMLESS: Final = re.compile(
    r".*/(chat|chat/completions|completions|responses|messages|generate|embed|embeddings|show|count_tokens|tokenize"
    r"|detokenize)/?"
)
"""Paths to which a POST changes nothing but what is in memory."""
_LAST_PART: Final = re.compile(r"(\[\]|\.[^.\[\]]*)$")
"""The end of a field's path: `[]`, or a name."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How the live response to a recorded request differs."""

    interaction: int
    """Its number, from 1."""
    request: str
    """Such as `POST /api/chat`."""
    kind: Literal["status", "type", "new", "lost", "changed", "text", "skipped"]
    """`type` is that of the content; a field is `new`, `lost`, or has `changed` its type. `text` and `skipped` are no
    drift: other values, and a request that was not sent."""
    field: str | None = None
    recorded: str | None = None
    now: str | None = None

    @property
    def is_drift(self) -> bool:
        """Whether the server's API changed."""
        return self.kind not in ("text", "skipped")


def verify(path: Path, host: str, *, unsafe: bool = False) -> Iterator[Difference]:
    """Send the recorded requests to a server, and yield how its responses differ.

    Args:
        path: the cassette.
        host: the server's address; nothing is sent anywhere else. Paths are as recorded.
        unsafe: also send requests that may change the server, such as a pull or a deletion. Without it, what follows
            such a request in the file is not sent either, since it may depend on it.

    Raises:
        CassetteError: the file cannot be read.
        SettingsError: the address is invalid.
        ProviderError: the server could not be reached, or broke off.
    """
    base, headers = read_base(host)
    parts = urlsplit(base)
    network = BlockingNetwork()
    may_send = True
    try:
        for number, each in enumerate(Cassette(path).interactions, 1):
            request = f"{each.request.method} {each.request.target}"
            may_send = may_send and (unsafe or _is_safe(each))
            if not may_send or each.fault or each.request.scheme not in ("http", "https"):
                yield Difference(interaction=number, request=request, kind="skipped")
                continue
            sent = Request(
                method=each.request.method,
                url=f"{parts.scheme}://{parts.netloc}{each.request.target}",
                headers=(*each.request.headers.items(), *headers.items()),
                body=each.request.body,
            )
            for kind, field, recorded, now in _compare(each, *drive(_ask(network, sent))):
                yield Difference(
                    interaction=number, request=request, kind=kind, field=field, recorded=recorded, now=now
                )
    finally:
        drive(network.close())


def _is_safe(interaction: Interaction) -> bool:
    request = interaction.request
    return request.method in ("GET", "HEAD") or (
        request.method == "POST" and bool(_HARMLESS.fullmatch(urlsplit(request.uri).path))
    )


async def _ask(network: BlockingNetwork, request: Request) -> tuple[int, str, bytes]:
    call = Call()
    response = await network.send(request, Clock(call))
    try:
        body, _ = await read_all(response, call.max_reply_bytes)
    finally:
        await response.close()
    return response.status, (header(response.headers, "content-type") or "").partition(";")[0].strip().lower(), body


def _compare(
    interaction: Interaction, status: int, kind: str, body: bytes
) -> Iterator[tuple[Literal["status", "type", "new", "lost", "changed", "text"], str | None, str | None, str | None]]:
    if interaction.status != status:
        yield "status", None, str(interaction.status), str(status)
        return
    if (before := bodies.content_type(interaction)) and before != kind:
        yield "type", None, before, kind
    old, new = bodies.documents(interaction.body), bodies.documents(body)
    was, now = bodies.shape(old), bodies.shape(new)
    for field in sorted(was.keys() | now.keys()):
        if _is_inside_empty(field, was) or _is_inside_empty(field, now):
            continue
        parent = _LAST_PART.sub("", field)
        if parent != field and parent in was.keys() ^ now.keys():  # Reported already.
            continue
        recorded, found = " or ".join(sorted(was.get(field, ()))), " or ".join(sorted(now.get(field, ())))
        if field not in now:
            yield "lost", field, recorded, None
        elif field not in was and not interaction.stopped:  # The last fields of a stream were never read.
            yield "new", field, None, found
        elif recorded and found and recorded != found:
            yield "changed", field, recorded, found
    if interaction.body != body:
        yield "text", None, None, None


def _is_inside_empty(field: str, shape: dict[str, set[str]]) -> bool:
    """Return whether a field is an item of a list without items, which says nothing about them."""
    parts = field.split("[]")
    heads = ["[]".join(parts[:count]) for count in range(1, len(parts))]
    return any(head in shape and f"{head}[]" not in shape for head in heads)
