"""What an answer that refuses means: the table from status to error, below a provider's own."""

from __future__ import annotations

import email.utils
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from graftage.exceptions import (
    AuthenticationFailed,
    CapabilityUnsupported,
    ConnectionFailed,
    InferenceFailed,
    ModelNotFound,
    Overloaded,
    ProtocolError,
    ProviderError,
    ProviderTimeout,
    QuotaExceeded,
    RequestRejected,
)
from graftage.http.transport import Headers, header

if TYPE_CHECKING:
    from graftage.calls import Call

__all__ = ["Answer", "Refusal", "refused"]

OK: Final = 200
REFUSED: Final = 400
SERVER_FAULT: Final = 500
LAST_STATUS: Final = 599
MAX_WORDS: Final = 500
"""Characters of the server's words that go into a message."""
DEEPEST: Final = 4
"""A server passes on what another one said as a text inside its own: unwrap it, but not for ever."""
FACTS: Final = ("code", "type", "param", "n_prompt_tokens", "n_ctx")
"""What stands beside an error and is worth keeping."""
_FOLDER = re.compile(r"(?<![\w:/\\.])(?:[A-Za-z]:[\\/]|/)[^\s\"':,;()]*[\\/](?=[^\s\"':,;()/\\]+)")


@dataclass(frozen=True, slots=False, kw_only=True)
class Answer:
    """An answer that refuses: with a status from 400 on, or with an error under status 200."""

    status: int
    headers: Headers
    body: bytes
    """Without the secrets of the connection."""
    call: Call = field(repr=False)
    server: str = "the server"
    """Who says it, for messages."""

    @cached_property
    def _read(self) -> tuple[str, dict[str, Any], bool]:
        text = self.body.decode("utf-8", "replace").strip()
        facts: dict[str, Any] = {}
        value: Any = text
        known = False
        for _ in range(DEEPEST):
            if isinstance(value, str):
                value = _parsed(value)
            if not isinstance(value, Mapping):
                break
            facts.update(_figures(value))
            inner = next((value[key] for key in ("error", "message", "detail") if value.get(key) is not None), None)
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
        """The figures beside it."""
        return self._read[1]

    @property
    def known(self) -> bool:
        """Whether the body was an error in JSON: otherwise it may come from another service."""
        return self._read[2]

    @property
    def inner_status(self) -> int:
        """The status; of an error under status 200 the one in its body, where it has one."""
        found = self.facts.get("status", self.status) if self.status == OK else self.status
        return found if found == OK or REFUSED <= found <= LAST_STATUS else self.status

    @property
    def model(self) -> str:
        """The model of the call, as it stands in a sentence."""
        return f"`{self.call.model}`" if self.call.model else "the model"

    @property
    def said(self) -> str:
        """The server's words as a sentence, cut, and without the folders of its machine, which may name a person."""
        if not (self.known and self.words):
            return f"The status is {self.inner_status}."
        text = f"{self.server[:1].upper()}{self.server[1:]} says: {_FOLDER.sub('', self.words[:MAX_WORDS])}".rstrip()
        return text if text.endswith((".", "!", "?")) else f"{text}."

    @property
    def retry_after(self) -> float | None:
        """Seconds to wait, where the server names them: as a number, a date, or in milliseconds."""
        milliseconds = _number(header(self.headers, "retry-after-ms"))
        if milliseconds is not None:
            return milliseconds / 1000
        given = header(self.headers, "retry-after")
        if (seconds := _number(given)) is not None or given is None:
            return seconds
        try:
            return max(email.utils.parsedate_to_datetime(given).timestamp() - time.time(), 0.0)
        except (ValueError, OverflowError):
            return None


Refusal: TypeAlias = Callable[[Answer], ProviderError | None]
"""An author's own table: the error for an answer, or None for what the table of the toolkit says."""


def _parsed(text: str) -> Any:
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text.splitlines()[0] if "\n" in text else text)
    except (ValueError, RecursionError):
        return text


def _figures(value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in FACTS:
        if isinstance(value.get(key), (str, int)):
            yield key, value[key]
    for key in ("code", "status", "StatusCode"):  # Elsewhere they are words.
        if isinstance(value.get(key), int):
            yield "status", value[key]


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None


# --- The table -------------------------------------------------------------------------------------------------------

Make: TypeAlias = Callable[[Answer], ProviderError]


def _rejected(it: Answer) -> ProviderError:
    return RequestRejected(it.said, hint="Mend the request.")


def _unauthorized(it: Answer) -> ProviderError:
    hint = "Set `api_key`, which is sent only over https or to loopback."
    return AuthenticationFailed(f"The server wants a sign-in. {it.said}", hint=hint)


def _forbidden(it: Answer) -> ProviderError:
    hint = "Check the key's rights; a server that says no more may not know the host name or origin it was asked by."
    return AuthenticationFailed(f"The server forbids this. {it.said}", hint=hint)


def _overloaded(it: Answer) -> ProviderError:
    hint = "Ask again later, or send less at one time."
    return Overloaded(f"The server is busy. {it.said}", retry_after=it.retry_after, hint=hint)


def _gateway(it: Answer) -> ProviderError:
    message = f"A proxy on the way could not reach the server. {it.said}"
    return ConnectionFailed(message, hint="Is the server running?", details={"cause": "gateway"})


def _gave_up(*, retryable: bool) -> Make:
    return lambda it: ProviderTimeout(
        f"A proxy or the server gave up waiting. {it.said}",
        phase="first_token",
        retryable=retryable,
        hint="Raise the proxy's limit.",
    )


ANYBODY: Final[Mapping[int, Make]] = {
    401: _unauthorized,
    402: lambda it: QuotaExceeded(f"The plan does not cover this. {it.said}", hint="Check the account's plan."),
    403: _forbidden,
    407: lambda it: ConnectionFailed(
        f"The proxy on the way wants a sign-in. {it.said}",
        retryable=False,
        hint="Put user and password into the proxy variable, or name the host in NO_PROXY.",
        details={"cause": "proxy"},
    ),
    408: _gave_up(retryable=True),
    413: lambda it: RequestRejected(f"The request is too large. {it.said}", hint="Send less, or raise the limit."),
    425: _gave_up(retryable=True),
    429: _overloaded,
    502: _gateway,
    503: _overloaded,
    504: _gave_up(retryable=False),  # Behind a gateway the server may still be at work.
    520: _gateway,
    521: _gateway,
    522: _gateway,
    523: _gateway,
    524: _gave_up(retryable=False),
    529: _overloaded,
    530: _gateway,
}
"""What a status means whoever gives it: the server, or a proxy before it."""
SERVERS_OWN: Final[Mapping[int, Make]] = {
    404: lambda it: ModelNotFound(f"The server does not have it. {it.said}", hint="Check the name."),
    410: lambda it: ModelNotFound(f"The server does not have it any more. {it.said}", hint="Choose another."),
    499: lambda it: InferenceFailed(
        f"The request was ended by another party. {it.said}", retryable=True, hint="Ask again."
    ),
    501: lambda it: CapabilityUnsupported(it.said, hint="Another model or server may."),
}
"""What a status means beside an error in JSON."""


def refused(it: Answer, own: Refusal | None) -> ProviderError:
    """The typed error for an answer that refuses: as the author's table says, else by its status."""
    error = own(it) if own is not None else None
    error = error or _by_status(it)
    error.model = error.model or it.call.model
    error.operation = error.operation or it.call.operation or None
    # An error inside a stream has no status of its own: 200 would be a lie.
    error.status = None if it.inner_status == OK else it.inner_status
    error.details.setdefault("server_message", it.words[:MAX_WORDS])
    error.details.update(it.facts)
    return error


def _by_status(it: Answer) -> ProviderError:
    status = it.inner_status
    if status in ANYBODY:
        return ANYBODY[status](it)
    if status == OK:
        return InferenceFailed(it.said, hint="The server's log may tell more.")
    if not it.known:
        return ProtocolError(
            f"The answer does not come from {it.server}: status {status}.",
            hint="Is it another service, an older server, or a proxy's page? Check `host`.",
        )
    if status in SERVERS_OWN:
        return SERVERS_OWN[status](it)
    if status < SERVER_FAULT:
        return _rejected(it)
    return InferenceFailed(f"The server failed. {it.said}", hint="The server's log may tell more.")
