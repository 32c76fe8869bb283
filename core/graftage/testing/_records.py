"""Requests and answers of hooks as JSON, and back: what a `Replay` writes into its file."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import MISSING, Field, fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, get_type_hints

import msgspec

from graftage import exceptions
from graftage._engine.faults import in_words
from graftage.exceptions import GraftageError, ProviderError
from graftage.testing.interactions import CassetteError
from graftage.types import (
    Chunk,
    Embeddings,
    Health,
    Image,
    LoadedAdapter,
    LoadedModel,
    ModelInfo,
    PullProgress,
    Ranking,
    Reply,
    Vectors,
    Warmed,
)

__all__ = ["ANSWERS", "MANY", "STREAMS", "answer_of", "line_of", "record_of", "request_body"]

ANSWERS: Final[Mapping[str, type]] = {
    "chat": Chunk,
    "generate": Chunk,
    "pull_model": PullProgress,
    "list_models": ModelInfo,
    "loaded_models": LoadedModel,
    "prune_adapters": ModelInfo,
    "show_model": ModelInfo,
    "embed": Embeddings,
    "rerank": Ranking,
    "count_tokens": int,
    "health": Health,
    "load_adapter": LoadedAdapter,
    "load_model": type(None),
    "unload_model": type(None),
    "delete_model": type(None),
    "unload_adapter": type(None),
    "warm": Warmed,
}
"""What each hook answers with, or the kind of its items; `native` cannot be recorded, and `close` needs no answer."""
STREAMS: Final = ("chat", "generate", "pull_model")
MANY: Final = ("list_models", "loaded_models", "prune_adapters")
_RAISED: Final = "raised"
"""The key of a line that holds an error."""
_LEFT_OUT: Final = ("call", "others", "path")
"""Fields that belong to one process or one machine."""


# --- Writing ---------------------------------------------------------------------------------------------------------


def request_body(request: object) -> bytes:
    """Return the request of a hook as JSON, without its `call`: an adapter by name and digest, an image by its hash."""
    return _json(_plain(request))


def line_of(answer: object) -> bytes:
    """Return one answer, or an error that was raised instead, as a line of JSON."""
    plain = {_RAISED: _plain(answer)} if isinstance(answer, Exception) else _plain(answer)
    return _json(plain) + b"\n"


def _json(plain: object) -> bytes:
    # Lone surrogates are no UTF-8, but Python's strings may hold them.
    return json.dumps(plain, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _plain(value: Any) -> Any:
    """Return plain data for JSON: of records the fields that are set, of what JSON does not have the text."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Image):
        media = {"media_type": value.media_type} if value.media_type else {}
        return {"sha256": hashlib.sha256(value.data).hexdigest(), **media}
    if isinstance(value, Exception):
        return _plain_error(value if isinstance(value, GraftageError) else ProviderError(in_words(value)))
    if isinstance(value, Vectors):
        return list(map(list, value))
    if is_dataclass(value):
        return {
            each.name: _field(each.name, getattr(value, each.name)) for each in fields(value) if _is_set(value, each)
        }
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, AbstractSet):
        return sorted(map(str, value))
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _field(name: str, value: Any) -> Any:
    return {"name": value.name, "digest": value.digest} if name == "adapter" and value is not None else _plain(value)


def _is_set(record: Any, each: Field[Any]) -> bool:
    default = each.default if each.default_factory is MISSING else each.default_factory()
    return each.name not in _LEFT_OUT and bool(getattr(record, each.name) != default)


def _plain_error(error: GraftageError) -> dict[str, Any]:
    # A provider may raise a subclass of its own: the core knows it by the nearest class of ours.
    kind = next(each for each in type(error).__mro__ if vars(exceptions).get(each.__name__) is each)
    found = {name: _plain(value) for name, value in vars(error).items() if name in _arguments(kind)}
    if found.get("attempts") == 1:
        del found["attempts"]
    return {"error": kind.__name__, **{name: value for name, value in found.items() if value not in (None, [], {})}}


# --- Reading ---------------------------------------------------------------------------------------------------------


def answer_of(line: bytes, kind: type) -> Any:
    """Return the answer in a line.

    Raises:
        GraftageError: the recorded error.
        CassetteError: the line holds something else.
    """
    try:
        plain = json.loads(line.decode("utf-8", "surrogatepass"))
        if isinstance(plain, dict) and _RAISED in plain:
            failed = _error(plain[_RAISED])
        else:
            return record_of(plain, kind)
    except (ValueError, TypeError, RecursionError) as error:
        raise CassetteError(
            f"A recorded answer is not valid: {kind.__name__}: {error}.", hint="Record it again."
        ) from error
    raise failed


def record_of(plain: Any, kind: type) -> Any:
    """Return a record of plain data. Unknown fields are ignored: a later version may have written them.

    Raises:
        ValueError: the data do not fit.
    """
    if not is_dataclass(kind):
        return msgspec.convert(plain, kind)
    if not isinstance(plain, dict):
        raise ValueError(f"{type(plain).__name__} instead of an object")  # noqa: TRY004 - as msgspec raises
    return kind(
        **{
            name: msgspec.convert(plain[name], hint, dec_hook=_custom)
            for name, hint in _hints(kind).items()
            if name in plain
        }
    )


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, localns={"datetime": datetime})  # `types` imports it for type checkers alone.


def _custom(kind: type, value: Any) -> Any:
    if kind is Exception:
        return _error(value)
    return Vectors(value) if kind is Vectors else Path(value)


def _error(plain: Any) -> GraftageError:
    if not isinstance(plain, dict):
        raise TypeError("an error must be an object")
    kind = getattr(exceptions, str(plain.get("error")), None)
    if not (isinstance(kind, type) and issubclass(kind, GraftageError)):
        raise TypeError(f"there is no error `{plain.get('error')}`")
    found = {name: value for name, value in plain.items() if name in _arguments(kind)}
    attempts, partial = found.pop("attempts", 1), found.pop("partial", None)
    error: Any = kind(str(found.pop("message", "")), **found)
    if isinstance(error, ProviderError):
        error.attempts = attempts
    if partial is not None:
        error.partial = record_of(partial, Reply)
    return error  # type: ignore[no-any-return]


def _arguments(kind: type[Any]) -> frozenset[str]:
    """Return the attributes of an error that are kept."""
    codes = (
        each.__init__.__code__ for each in kind.__mro__ if issubclass(each, GraftageError) and "__init__" in vars(each)
    )
    own = {name for code in codes for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]}
    return frozenset(own - {"self"} | ({"attempts"} if issubclass(kind, ProviderError) else set()) | {"partial"})
