"""Which recorded request is meant by a request, and what differs from the nearest one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Key: TypeAlias = tuple[str, str, str]
"""What requests are matched by: the method, the path with its query, the body in canonical form."""

_MAX_SHOWN: Final = 5
"""Differences shown of a request that was not found."""


def canonical(body: bytes) -> str:
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


def explain(key: Key, recorded: Sequence[Key]) -> str:
    """Describe the nearest recorded request, and what differs."""
    asked = f"Asked: {key[0]} {key[1]}."
    if not recorded:
        return f"{asked} It holds no request."
    if equal := sum(each == key for each in recorded):
        return f"{asked} It was recorded {_times(equal)} and has been played as often."
    # The path counts before the body.
    nearest, found = min(
        ((each, list(differences(each, key))) for each in recorded),
        key=lambda pair: (pair[0][:2] != key[:2], len(pair[1])),
    )
    shown = "; ".join(found[:_MAX_SHOWN])
    more = f"; and in {len(found) - _MAX_SHOWN} more" if len(found) > _MAX_SHOWN else ""
    return f"{asked} The nearest recorded request is {nearest[0]} {nearest[1]}, which differs in {shown}{more}."


def differences(recorded: Key, asked: Key) -> Iterator[str]:
    """Yield the differences of two requests in words."""
    # The message already has their values.
    if recorded[0] != asked[0]:
        yield "the method"
    if recorded[1] != asked[1]:
        yield "the path"
    old, new = flatten(recorded[2]), flatten(asked[2])
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield f"`{name}` (recorded {_shorten(old.get(name))}, now {_shorten(new.get(name))})"


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


def _shorten(value: str | None, limit: int = 80) -> str:
    if value is None:
        return "nothing"
    return value if len(value) <= limit else f"{value[:limit]}…"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
