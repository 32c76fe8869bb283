"""Real exchanges, recorded once and replayed offline: a transport for providers that use `graftage.http`.

    with Cassette("cassettes/story.yaml", mode="once", server="Ollama 0.9.3") as cassette:
        with graftage.connect("ollama", model="smollm2:135m", transport=cassette) as llm:
            llm.chat("Tell me a story")

The files have vcrpy's format: vcrpy 8.2.1 or newer and pytest-recording replay them, and theirs are replayed here. Keys
of a response that are ours, and that vcrpy keeps: `recorded` (day, client, server, model), `chunk_lengths` and
`chunk_times` (the sizes in which the body arrived, and when, in seconds), `fault` (how the exchange failed) and
`stopped` (the reader had enough). To vcrpy, an exchange without a response is one with status 502.

Nothing is patched: two cassettes may be open at once, in threads and in tasks.
"""

from __future__ import annotations

import heapq
import json
import os
import threading
import time
import uuid
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from graftage._version import __version__
from graftage.exceptions import ConnectionFailed, ProtocolError, ProviderError, ProviderTimeout, StreamInterrupted
from graftage.testing.files import CassetteFile, pieces
from graftage.testing.interactions import (
    CassetteError,
    CassetteMiss,
    Fault,
    FaultKind,
    HeaderDict,
    Interaction,
    Recorded,
    RecordedRequest,
    address_of,
)
from graftage.testing.matching import DEFAULT, Matching
from graftage.testing.secrets import Allowed, refuse_secrets, secrets_of

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from graftage.http import Clock, Colour, Headers, Request, Response, Transport
    from graftage.testing.matching import Key, Matcher, Normaliser

__all__ = ["Cassette", "CassetteError", "CassetteMiss"]

Mode: TypeAlias = Literal["none", "once", "new_episodes", "all"]
MODES: Final = ("none", "once", "new_episodes", "all")
_OLD_MODES: Final = {"replay": "none", "record": "all"}
KEPT_REQUEST_HEADERS: Final = ("content-type",)
KEPT_RESPONSE_HEADERS: Final = ("content-type", "retry-after", "content-encoding")


class Cassette:
    """A recording, given to a provider as its `transport` setting.

    Each recorded response is given once: equal requests get theirs in the order of the recording. The file is written
    when the block ends without an error. Faults are recorded as well, and raised again: a retry replays its attempts.
    A recorded timeout is raised at once. A response whose reader stopped early is replayed as a whole one.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mode: Mode | Literal["replay", "record"] = "none",
        server: str | None = None,
        model: str | None = None,
        digest: str | None = None,
        match_on: Sequence[Matcher] = DEFAULT,
        normalise: Normaliser | None = None,
        keep_headers: Iterable[str] = (),
        allow: Iterable[Allowed] = (),
        before_record_request: Callable[[RecordedRequest], RecordedRequest | None] | None = None,
        before_record_response: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None,
    ) -> None:
        """Read the file, or start a new one.

        Args:
            path: where the file is, or will be. A file whose name ends in `.json` is written as JSON.
            mode: as vcrpy's. `none` replays, and never opens a connection. `once` records if there is no file, and
                else replays. `new_episodes` replays what the file holds, and adds the rest. `all` sends every request,
                and replaces the file.
            server: the server and its version, such as `Ollama 0.9.3`, kept in the file.
            model: the model's name, kept in the file; by default what each request says.
            digest: the model's digest, kept in the file.
            match_on: what must be equal: vcrpy's names (`method`, `scheme`, `host`, `port`, `path`, `query`, `uri`,
                `headers`, `body`, `raw_body`), `chat` (messages, tools and options by their meaning), and functions as
                for vcrpy: of the request and a recorded one; False or an `AssertionError` means that they differ.
                Names of the loopback are one host. As part of `host`, the port counts if the file has several of it.
            normalise: changes the JSON of a body before it is compared. `graftage.testing.matching.blur` is one.
            keep_headers: headers of requests and responses that are kept, besides those about the content.
            allow: what may be in the file although it looks like a secret. It is kept in the file, with its reasons.
            before_record_request: changes a request before it is compared or kept; None leaves it out of the file.
            before_record_response: changes a response before it is kept, as vcrpy's: a mapping with `status`, `headers`
                and `body`. None leaves the exchange out of the file.

        Raises:
            ValueError: the mode or a matcher is invalid.
            CassetteError: the file to replay is missing or malformed.
        """
        if mode in _OLD_MODES:
            new = _OLD_MODES[mode]
            warnings.warn(f'`mode="{mode}"` is now `mode="{new}"`.', DeprecationWarning, stacklevel=2)
            mode = new  # type: ignore[assignment]
        if mode not in MODES:
            raise ValueError(f"`mode` must be {', '.join(f'`{each}`' for each in MODES)}, not {mode!r}")
        more = tuple(each.lower() for each in keep_headers)
        self.path = Path(path)
        self.mode: Final = mode
        self.misses: list[CassetteError] = []
        """Requests that were not found, even if a provider swallowed the error."""
        self._given = Recorded(client=f"graftage {__version__}", server=server, model=model, digest=digest)
        self._kept_request_headers = (*KEPT_REQUEST_HEADERS, *more)
        self.kept_response_headers: Final = (*KEPT_RESPONSE_HEADERS, *more)
        self._matching = Matching(match_on, normalise, self._kept_request_headers)
        self._allow = tuple(allow)
        self.before_record_request = before_record_request
        self.before_record_response = before_record_response
        self._file = CassetteFile()
        self._tracks: list[Track] = []
        self._sent: dict[str, str] = {}
        """The secrets that requests sent, each with the name of its header; they are never written."""
        self._lock = threading.Lock()
        is_there = self.path.exists() if mode in ("once", "new_episodes") else mode == "none"
        self.records: Final = mode in ("new_episodes", "all") or not is_there
        """Whether requests may be sent."""
        if is_there:
            self._file = CassetteFile.read(self.path)
        self._matching.know(self._file.places)
        self._unread = dict.fromkeys(range(len(self._file)))
        """Places in the file that were not compared yet, in order."""
        self._patience = 4 * len(self._file)
        """How often such a place may still be passed over."""
        self._waiting: defaultdict[Key, list[int]] = defaultdict(list)
        """Heaps of places in the file that were not played."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.save()

    def __len__(self) -> int:
        return len(self._file) + len(self._recorded())

    def __bool__(self) -> bool:
        # An empty recording must not be false, or `if transport` would skip it and use the network.
        return True

    @property
    def server(self) -> str | None:
        """The server and its version: as given, or the first in the file."""
        return self._given.server or next((each.recorded.server for each in self._file if each.recorded.server), None)

    @property
    def interactions(self) -> tuple[Interaction, ...]:
        """All that the file holds, and what was recorded since."""
        return (*self._file, *self._recorded())

    @property
    def allowed(self) -> tuple[Allowed, ...]:
        """What may be in the file although it looks like a secret, as given and as the file says."""
        return (*self._allow, *(Allowed(**entry) for each in self._file for entry in each.allow))

    @property
    def unplayed(self) -> tuple[str, ...]:
        """Recorded requests that were not sent, as `POST /api/chat`."""
        with self._lock:
            places = sorted([*self._unread, *(each for heap in self._waiting.values() for each in heap)])
            requests = [self._file[place].request for place in places]
        return tuple(f"{each.method} {each.target}" for each in requests)

    def wrap(self, network: Callable[[], Transport]) -> Transport:
        """Return a transport that replays, or that records the given one; both colours use the same file."""
        return _Transport(self, network() if self.records else None)

    def save(self) -> None:
        """Write what was recorded, by way of a temporary file beside it. What was in the file stays as it was.

        Raises:
            CassetteError: nothing was recorded, or the file cannot be written, or it would hold a secret: the value of
                a request header, of an environment variable with such a name, or text that looks like a key.
        """
        recorded = self._recorded()
        if not recorded and (not self.records or len(self._file)):
            return
        if not recorded:
            raise CassetteError(
                f"Nothing was recorded for {self.path}.", hint="Was the cassette given to the provider as `transport`?"
            )
        refuse_secrets(self.path, recorded, self._given.server, self._sent, self.allowed)
        if self._allow:  # Once, not with each.
            said = ({name: value for name, value in asdict(each).items() if value} for each in self._allow)
            recorded[0] = replace(recorded[0], allow=tuple(said))
        data = self._file.with_more(recorded, as_json=self.path.suffix == ".json")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(data)
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

    def _recorded(self) -> list[Interaction]:
        with self._lock:
            return [found for each in self._tracks if (found := each.interaction) is not None]

    # --- Answers -----------------------------------------------------------------------------------------------------

    def take(self, request: Request) -> Interaction | Track:
        """Take the response to a request, each once; or what records it, if this mode may send it.

        Raises:
            CassetteMiss: there is no such response, or none is left.
        """
        asked = self._asked(request)
        with self._lock:
            if asked is not None and len(self._file) and (found := self._find(asked)) is not None:
                return found
            if self.records:
                self._sent.update(secrets_of(request.headers))  # Any later response may repeat them.
                return Track(self, asked)
            error = self._miss(asked)
            self.misses.append(error)
        raise error

    def keep(self, track: Track) -> None:
        """Keep what is recorded from now on: its response begins, or failed."""
        with self._lock:
            self._tracks.append(track)

    def _asked(self, request: Request) -> RecordedRequest | None:
        asked = RecordedRequest(
            method=request.method,
            uri=address_of(request.url),
            headers=HeaderDict(
                {name: ", ".join(each) for name, each in _kept(request.headers, self._kept_request_headers).items()}
            ),
            body=request.file.read_bytes() if request.file is not None else request.body,
        )
        return self.before_record_request(asked) if self.before_record_request else asked

    def _find(self, asked: RecordedRequest) -> Interaction | None:
        """Return the first interaction in the file that matches and was not played."""
        key = self._matching.key(asked)
        words = self._matching.words(asked) if self._patience > 0 else ()
        heap = self._waiting[key]
        read = []
        for place in self._unread:
            if heap and heap[0] < place and not self._matching.functions:
                break
            if words and not self._file.may_hold(place, words):
                self._patience -= 1
                continue
            read.append(place)
            heapq.heappush(self._waiting[self._matching.key(self._file[place].request)], place)
        for place in read:
            del self._unread[place]
        if not self._matching.functions:
            return self._file[heapq.heappop(heap)] if heap else None
        for place in sorted(heap):
            if self._matching.agree(asked, self._file[place].request):
                heap.remove(place)
                heapq.heapify(heap)
                return self._file[place]
        return None

    def _miss(self, asked: RecordedRequest | None) -> CassetteMiss:
        if asked is None:
            return CassetteMiss(
                f"{self.path} never holds this request: `before_record_request` leaves it out.",
                hint="Let it return the request.",
            )
        why = self._matching.explain(asked, [each.request for each in self._file])
        return CassetteMiss(
            f"{self.path} does not hold this request. {why}", hint="Record it again, or send a recorded request."
        )

    # --- Recording ---------------------------------------------------------------------------------------------------

    def finish(self, interaction: Interaction) -> Interaction | None:
        """Add the facts to what was recorded, and scrub it."""
        day = datetime.now(UTC).date().isoformat()
        facts = replace(self._given, date=day, model=self._given.model or model_of(interaction.request.body))
        interaction = replace(interaction, recorded=facts)
        if self.before_record_response is None or not interaction.status:
            return interaction
        response = self.before_record_response(
            {
                "status": {"code": interaction.status, "message": interaction.reason},
                "headers": {name: list(values) for name, values in interaction.headers.items()},
                "body": {"string": interaction.body},
            }
        )
        return None if response is None else _replaced(interaction, response)


class Track:
    """What records one exchange. A call of `begin` or `fail` puts it into the cassette."""

    def __init__(self, cassette: Cassette, request: RecordedRequest | None) -> None:
        """Start the clock. Without a request, nothing is kept."""
        self._cassette = cassette
        self._request = request
        self._begun = time.monotonic()
        self._status = 0
        self._reason = ""
        self._headers: dict[str, list[str]] = {}
        self._chunks: list[bytes] = []
        self._times: list[float] = []
        self._fault: Fault | None = None
        self._whole = self._done = False
        self._kept: Interaction | None = None

    def begin(self, status: int, reason: str = "", headers: Headers = ()) -> None:
        """Note the head of the response. The file has the order in which responses began."""
        self._status, self._reason = status, reason
        self._headers = _kept(headers, self._cassette.kept_response_headers)
        self._keep()

    def add(self, chunk: bytes) -> None:
        """Note a piece of the body, and when it came."""
        self._chunks.append(chunk)
        self._times.append(round(time.monotonic() - self._begun, 3))

    def end(self) -> None:
        """Note that the body is whole."""
        self._whole = True
        self.stop()

    def fail(self, error: BaseException) -> None:
        """Note how the exchange failed, if that is a fault of the server or the network."""
        self._fault = _fault_of(error, answered=bool(self._status))
        if self._fault is not None:
            self.stop()
            if not self._status:
                self._keep()

    def stop(self) -> None:
        """Note that nothing more comes: the reader has enough, unless the body is whole or failed."""
        if not self._done and self._request is not None:
            self._kept, self._done = self.interaction, True
            self._chunks.clear()  # What was scrubbed away is not kept either.

    def _keep(self) -> None:
        if self._request is not None:
            self._cassette.keep(self)

    @property
    def interaction(self) -> Interaction | None:
        """What was recorded; None if `before_record_response` leaves it out."""
        if self._done:
            return self._kept
        assert self._request is not None  # noqa: S101 - else it would not be in the cassette
        return self._cassette.finish(
            Interaction(
                request=self._request,
                status=self._status,
                reason=self._reason,
                headers=self._headers,
                chunks=tuple(self._chunks),
                times=tuple(self._times),
                fault=self._fault,
                stopped=not self._whole and self._fault is None,
            )
        )


def _replaced(interaction: Interaction, response: Mapping[str, Any]) -> Interaction:
    """Return an interaction with a response that a scrubber returned."""
    body = response["body"]["string"]
    body = body.encode() if isinstance(body, str) else body
    status, chunks = response["status"], tuple(pieces(body, [len(each) for each in interaction.chunks]))
    return replace(
        interaction,
        status=status["code"],
        reason=status["message"] or "",
        headers=response["headers"],
        chunks=chunks,
        times=interaction.times[-len(chunks) :] if chunks else (),
    )


def model_of(body: bytes) -> str | None:
    """Return the model that a JSON body names."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    model = found.get("model") if isinstance(found, dict) else None
    return model if isinstance(model, str) else None


def _kept(headers: Headers, names: Iterable[str]) -> dict[str, list[str]]:
    found = {name: [value for each, value in headers if each == name] for name in names}
    return {name: values for name, values in found.items() if values}


# --- Faults ----------------------------------------------------------------------------------------------------------


_HINT: Final = "The cassette holds this error. If the server is well now, record again."


def _fault_of(error: BaseException, *, answered: bool) -> Fault | None:
    """Return the fault that an error of a transport stands for; None if it is the caller's own."""
    kind: FaultKind
    cause = error.details.get("cause") if isinstance(error, ConnectionFailed) else None
    if isinstance(error, ProviderTimeout):
        kind = "timeout"
    elif isinstance(error, ConnectionFailed) and cause != "closed":  # By the client itself.
        kind = "reset" if cause == "broken" else "refused"
    elif isinstance(error, StreamInterrupted):
        kind = "cut"
    elif isinstance(error, ProtocolError):
        kind = "invalid"
    else:
        return None
    return Fault(
        kind=kind,
        message=error.message,
        retryable=error.retryable,
        phase=getattr(error, "phase", None),
        cause=cause,
        answered=answered,
    )


def error_of(fault: Fault) -> ProviderError:
    """Return the error that was recorded as a fault."""
    given: dict[str, Any] = {"retryable": fault.retryable, "hint": _HINT}
    if fault.kind == "timeout":
        return ProviderTimeout(fault.message, phase=fault.phase or "total", **given)
    if fault.kind in ("refused", "reset"):
        return ConnectionFailed(fault.message, details={"cause": fault.cause} if fault.cause else {}, **given)
    return (StreamInterrupted if fault.kind == "cut" else ProtocolError)(fault.message, **given)


# --- Transports ------------------------------------------------------------------------------------------------------


class _Transport:
    """Replays what a cassette holds, and records the rest if it has a network."""

    def __init__(self, cassette: Cassette, inner: Transport | None) -> None:
        self.colour: Colour | None = inner.colour if inner else None
        self._cassette = cassette
        self._inner = inner

    async def send(self, request: Request, clock: Clock) -> Response:
        found = self._cassette.take(request)
        if isinstance(found, Interaction):
            if found.fault is not None and not found.fault.answered:
                raise error_of(found.fault)
            clock.sent()
            return Replayed(found)
        assert self._inner is not None  # noqa: S101 - `take` gives a track only if the cassette records
        try:
            response = await self._inner.send(request, clock)
        except BaseException as error:
            found.fail(error)
            raise
        found.begin(response.status, response.reason, response.headers)
        return _Recording(response, found)

    async def close(self) -> None:
        if self._inner is not None:
            await self._inner.close()


class _Recording:
    """Passes each piece on as it arrives, and keeps a copy."""

    def __init__(self, inner: Response, track: Track) -> None:
        self.status, self.reason, self.headers = inner.status, inner.reason, inner.headers
        self._inner = inner
        self._track = track

    async def read(self) -> bytes:
        try:
            piece = await self._inner.read()
        except BaseException as error:
            self._track.fail(error)
            raise
        if piece:
            self._track.add(piece)
        else:
            self._track.end()
        return piece

    async def close(self) -> None:
        self._track.stop()
        await self._inner.close()


class Replayed:
    """A recorded response in its original pieces; it breaks off where the original did."""

    def __init__(self, interaction: Interaction) -> None:
        self.status, self.reason = interaction.status, interaction.reason
        self.headers = tuple((name.lower(), value) for name, values in interaction.headers.items() for value in values)
        self._pieces = iter(interaction.chunks)
        self._fault = interaction.fault

    async def read(self) -> bytes:
        piece = next(self._pieces, b"")
        if not piece and self._fault is not None:
            raise error_of(self._fault)
        return piece

    async def close(self) -> None:
        pass
