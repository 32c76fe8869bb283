"""Real exchanges, recorded once and replayed offline: a transport for providers that use `graftage.http`.

    with Cassette("cassettes/story.yaml", mode="record", server="Ollama 0.9.3") as cassette:
        with graftage.connect("ollama", model="smollm2:135m", transport=cassette) as llm:
            llm.chat("Tell me a story")

The files have vcrpy's format: vcrpy 8.2.1 or newer replays them, and so does pytest-recording. Three keys of a response
are ours, and vcrpy keeps them: `server`, the server's name; `chunk_lengths`, the sizes in which the body arrived; and
`cut_short`, if the body broke off. Nothing is patched: two cassettes may be open at once, in threads and in tasks.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections import defaultdict, deque
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from graftage.exceptions import StreamInterrupted
from graftage.testing.files import from_yaml, to_yaml
from graftage.testing.interactions import CassetteError, CassetteMiss, Interaction, target_of
from graftage.testing.matching import Key, canonical, explain
from graftage.testing.secrets import refuse_secrets, secrets_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from typing import Self

    from graftage.http import Clock, Colour, Headers, Request, Response, Transport

__all__ = ["Cassette", "CassetteError", "CassetteMiss"]

KEPT_REQUEST_HEADERS: Final = ("content-type",)
KEPT_RESPONSE_HEADERS: Final = ("content-type", "retry-after", "content-encoding")


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
        self._interactions: list[Interaction] = []
        self._waiting: defaultdict[Key, deque[Interaction]] = defaultdict(deque)
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
        refuse_secrets(self.path, self._interactions, self.server, self._sent)
        text = to_yaml(self._interactions, self.server)
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
        self.server, self._interactions = from_yaml(self.path)
        for each in self._interactions:
            self._waiting[each.key].append(each)

    def take(self, request: Request) -> Interaction:
        """Take the response to a request; each is taken once.

        Raises:
            CassetteMiss: there is no such response, or none is left.
        """
        key = (request.method, target_of(request.url), canonical(_body(request)))
        with self._lock:
            if queue := self._waiting.get(key):
                return queue.popleft()
            miss = CassetteMiss(
                f"{self.path} does not hold this request. {explain(key, [each.key for each in self._interactions])}",
                hint="Record it again, or send a recorded request.",
            )
            self.misses.append(miss)
        raise miss

    def note_secrets(self, request: Request) -> None:
        """Note the secrets of a request before it is sent: any later response may repeat them."""
        with self._lock:
            self._sent.update(secrets_of(request.headers))

    def begin(self, request: Request, response: Response) -> Interaction:
        """Add a response when its head arrives, so that the file has the order in which they began."""
        interaction = Interaction(
            request.method,
            target_of(request.url),
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

    def __init__(self, inner: Response, interaction: Interaction) -> None:
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

    def __init__(self, interaction: Interaction) -> None:
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
