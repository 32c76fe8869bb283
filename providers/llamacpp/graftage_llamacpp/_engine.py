"""The engine of one model, shared by all clients of this process, and the transport that sends their requests to it.

Each request holds a lease on the engine, which starts it if necessary, until its response ends. Above the transport,
the engine has one address and no key, so a recorder in between sees neither port nor secret.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from graftage.exceptions import (
    AdapterError,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterUnsupported,
    ConnectionFailed,
    GraftageError,
    ModelLoadFailed,
    ProviderTimeout,
    StreamInterrupted,
)
from graftage.gguf import GgufError, read_file
from graftage.http import Request, Response, Transport
from graftage.types import PromptProgress
from graftage_llamacpp import _convert
from graftage_llamacpp._process import FileState, Launch, LoadedFile, Process, SlotUse, file_state, start
from graftage_llamacpp._sources import check_adapter
from graftage_llamacpp._states import Place, States, key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from graftage.calls import Call
    from graftage.http import Clock
    from graftage.types import Adapter, Phase
    from graftage_llamacpp._store import Stored

__all__ = [
    "BASE_URL",
    "CHAT",
    "COMPLETIONS",
    "COUNT",
    "EMBEDDINGS",
    "RERANK",
    "TEMPLATE",
    "TOKENIZE",
    "AdapterFile",
    "Engine",
    "EngineTransport",
    "Job",
    "Need",
    "acquire",
    "engines",
    "release",
]

BASE_URL: Final = "http://llamacpp.invalid"
"""Stands for the engine's address, which changes with each start."""
TOKENIZE: Final = "/tokenize"
TEMPLATE: Final = "/apply-template"
CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
COUNT: Final = "/v1/chat/completions/input_tokens"
EMBEDDINGS: Final = "/v1/embeddings"
RERANK: Final = "/v1/rerank"
CHARS_PER_TOKEN: Final = 4
"""Characters of an average token."""
PROGRESS: Final = b'"prompt_progress"'
EVENT_END: Final = b"\n\n"
MARGIN: Final = 0.05
"""Seconds subtracted from a limit, so that the engine's error comes before that of the clock."""
STATUS_OK: Final = 200
EXIT_WAIT: Final = 0.2
"""Seconds to wait for the exit code of a broken engine."""


# --- The transport ---------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Job:
    """The purpose of a request to an engine: the context of its HTTP requests."""

    call: Call
    stored: Stored
    engine: Engine
    need: Need
    states: States | None = None
    """The saved prompts; None if nothing is saved."""
    lease: Lease | None = None
    """The lease of its last request; a replay has none."""
    place: Place | None = None
    """Where the prompt of its last request is saved."""

    async def take(self, deadline: float, *, slot: bool = False) -> Lease:
        """Wait for the right to send a request, which may need a slot.

        Raises:
            ProviderTimeout: the engine was not free in time.
            ModelLoadFailed: it could not be started.
        """
        need = replace(self.need, slot=slot, deadline=deadline)
        self.lease = cast("Lease", await self.engine.grant(need, self.call))
        return self.lease


class EngineTransport:
    """Sends each request to the engine that its job names."""

    def __init__(self, network: Callable[[], Transport]) -> None:
        self._network = network()
        self.colour = self._network.colour

    async def send(self, request: Request, clock: Clock) -> Response:
        """Wait for the engine, send it a request, and wait for the head of its response."""
        job = cast("Job", request.context["job"])
        clock.enter("first_token")
        slot = request.target in (CHAT, COMPLETIONS)
        lease = await job.take(time.monotonic() + clock.left() - MARGIN, slot=slot)
        try:
            body = json.loads(request.body)
            if request.target not in (TOKENIZE, TEMPLATE, COUNT):
                _apply_adapters(request.target, body, lease)
            job.place = await self._place(body, job, lease, clock)
            if job.place is not None:
                await job.place.restore(body["lora"])
                body["cache_prompt"] = job.place.use.reuse
            # A prompt of one batch has no progress.
            if slot and len(request.body) > CHARS_PER_TOKEN * lease.engine.launch.batch:
                body["return_progress"] = True
            clock.enter("connect")
            response = await self._network.send(_post(lease.process, request.target, body), clock)
            return _LeasedResponse(response, lease, job.call, job.place)
        except ConnectionFailed as error:
            try:
                ended = await job.call.run(lease.process.exit_reason, EXIT_WAIT)
            finally:
                lease.end()
            if ended is None:
                raise
            broken = job.place is not None and job.place.broken
            raise _ended_error(ended, lease.process, retryable=lease.process.was_killed or broken) from error
        except BaseException:
            lease.end()
            raise

    async def _place(self, body: dict[str, Any], job: Job, lease: Lease, clock: Clock) -> Place | None:
        """Return where a prompt is saved; None if it is not and cannot be."""
        use, keep = lease.use, body.pop("keep", None)
        if use is None or use.scales is None or job.states is None or not (keep or job.states.exist()):
            return None
        key = await job.call.run(key_of, lease.process, job.stored.digest, use.scales)
        if key is None or not (keep or job.states.has(key)):
            return None
        post = partial(self._ask, lease.process, clock)
        text = keep or body.get("prompt") or (await post(TEMPLATE, body)).get("prompt")
        if not text:
            return None
        use.rendered = text
        tokens = len(body["prompt"]) if keep else 0
        return Place(states=job.states, key=key, use=use, keep=tokens, post=post, run=job.call.run)

    async def _ask(self, process: Process, clock: Clock, path: str, body: Mapping[str, object]) -> Mapping[str, Any]:
        """Send JSON to the engine, and return its answer; empty if it refused."""
        clock.enter("first_token")
        response = await self._network.send(_post(process, path, body), clock)
        try:
            pieces = []
            while piece := await response.read():
                pieces.append(piece)
        finally:
            await response.close()
        found: Mapping[str, Any] = json.loads(b"".join(pieces)) if response.status == STATUS_OK else {}
        return found

    async def close(self) -> None:
        """Close every connection."""
        await self._network.close()


class _LeasedResponse:
    """A response of the engine. Its end gives the lease back."""

    def __init__(self, inner: Response, lease: Lease, call: Call, place: Place | None = None) -> None:
        self.status, self.reason, self.headers = inner.status, inner.reason, inner.headers
        self._inner = inner
        self._lease = lease
        self._call = call
        self._place = place
        self._begun = False

    async def read(self) -> bytes:
        piece = b""
        try:
            while not piece and (piece := await self._inner.read()) and not self._begun:
                piece = self._cut_progress(piece)
        except StreamInterrupted as error:
            raise await self._call.run(self._interrupted) from error
        # Status and comments may come before the prompt is read: the reply begins with its first choice.
        if not self._begun and b'"choices"' in piece:
            self._begun = True
            if self._place is not None and self._place.keep:
                await self._place.save()
            if self._lease.use is not None:
                self._lease.answered()
        return piece

    def _cut_progress(self, piece: bytes) -> bytes:
        """Emit events of the prompt's progress and cut them out: they are not the beginning of a reply."""
        if PROGRESS not in piece:
            return piece
        *events, rest = piece.split(EVENT_END)
        kept = [event + EVENT_END for event in events if not self._emit_progress(event)]
        return b"".join((*kept, rest))

    def _emit_progress(self, event: bytes) -> bool:
        if PROGRESS not in event or not event.startswith(b"data: "):
            return False
        found = json.loads(event.removeprefix(b"data: "))["prompt_progress"]
        progress = PromptProgress(total=found["total"], processed=found["processed"], cached=found["cache"])
        self._call.emit("prompt_progress", prompt=progress)
        return True

    def _interrupted(self) -> StreamInterrupted:
        """Return the error for a response that broke off, as it does without notice if the engine is killed."""
        process = self._lease.process
        ended = process.exit_reason(EXIT_WAIT)
        return StreamInterrupted(
            f"The reply broke off: the engine {ended or 'closed the connection'}.",
            retryable=not self._begun and (ended is None or process.was_killed),
            hint=process.hint_after_exit if ended else "Try again.",
            details={"engine_stderr": process.stderr_tail()} if ended else None,
        )

    async def close(self) -> None:
        try:
            await self._inner.close()
        finally:
            self._lease.end()


def _post(process: Process, path: str, body: Mapping[str, object]) -> Request:
    """Return a request with the engine's address and its key."""
    headers = (("authorization", f"Bearer {process.key}"), ("content-type", "application/json"))
    return Request(method="POST", url=f"{process.address}{path}", headers=headers, body=json.dumps(body).encode())


def _apply_adapters(path: str, body: dict[str, Any], lease: Lease) -> None:
    """Put into a body the scale of every adapter, the slot, and whether to reuse the slot's cache.

    Raises:
        AdapterError: the engine does not have an adapter, and would answer with the base model.
    """
    process = lease.process
    wanted: Counter[str] = Counter()
    for digest, weight in body.pop("adapter", ()):
        wanted[digest] += weight
    if not wanted.keys() <= process.adapters.keys():
        raise AdapterError(
            "The engine has not loaded an adapter of the request.", retryable=True, hint="Load it again."
        )
    scales = tuple(float(wanted[digest]) for digest in process.adapters)
    body["lora"] = [{"id": number, "scale": scale} for number, scale in enumerate(scales)]
    if path in (EMBEDDINGS, RERANK):
        lease.use = process.slots.take_any()
        return
    activated = any(process.adapters[digest].activated for digest in wanted)
    text = body.get("messages") or body.get("prompt") or ()
    lease.use = process.slots.take(None if activated else scales, text)
    body.update(id_slot=lease.use.number, cache_prompt=lease.use.reuse)


def _ended_error(how: str, process: Process, *, retryable: bool) -> ConnectionFailed:
    """Return the error for an engine that ended before it answered."""
    return ConnectionFailed(
        f"The engine {how} before it answered.",
        retryable=retryable,
        hint=process.hint_after_exit,
        details={"cause": "engine", "engine_stderr": process.stderr_tail()},
    )


# --- The engine ------------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True, eq=False)
class Need:
    """What a request needs of the engine before it can be sent."""

    deadline: float = math.inf
    window: int | None = None
    """None for any window."""
    default_window: int = 4096
    adapters: tuple[AdapterFile, ...] = ()
    """The adapters that must be loaded."""
    others: tuple[AdapterFile, ...] = ()
    """Adapters that a restart loads, too, if there is room."""
    adapter_count: int = 1
    adapter_bytes: int = 0
    """The room for all adapters. Those that must be loaded may exceed it."""
    keep_alive: float | None = None
    slot: bool = False
    """Whether it needs a slot of which the last request has been answered."""
    stop: bool = False
    """Whether to end the engine instead, once it is idle."""
    future: Future[Lease | None] = field(default_factory=Future, init=False)
    """The result: a lease, or None if `stop` is set."""


@dataclass(slots=True, kw_only=True, eq=False)
class Lease:
    """The right to send one request. The engine is not restarted while a lease exists."""

    engine: Engine
    process: Process
    load: float | None = None
    """Seconds it took to start the engine for this request."""
    notes: tuple[str, ...] = ()
    """Warnings for the reply."""
    keep_alive: float | None = None
    use: SlotUse | None = None
    """The use of a slot, while adapters are loaded."""
    reading: bool = False
    """Whether its slot waits for the beginning of the reply."""

    def answered(self) -> None:
        """Note that the reply has begun: the engine has read the prompt, and another request may wait for the slot."""
        if self.use is not None:
            self.use.answered()
        self.reading = False
        self.engine.grant_next()

    def end(self) -> None:
        """Give the lease back. A second call does nothing."""
        self.engine.give_back(self)


class Engine:
    """The child process of one launch, if it runs, and the queue of requests for it.

    A restart, for another window or a new adapter, waits until all running requests have ended, and later requests wait
    for the restart.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.process: Process | None = None
        self.expires: datetime | None = None
        """When an idle child ends; None if it stays until the last client is closed."""
        self.holders: set[int] = set()
        self.adapters: dict[str, AdapterFile] = {}
        """The loaded adapters, or those that the next start loads, by digest; the least recently used first."""
        self.starts = 0
        """How often a child was started."""
        self._waiting: deque[Need] = deque()
        self._leases: set[Lease] = set()
        self._busy = False
        self._closed = False
        self._timer: threading.Timer | None = None
        self._lock = threading.RLock()

    @property
    def running(self) -> Process | None:
        """The child, if it is alive."""
        process = self.process
        return process if process is not None and process.alive else None

    async def grant(self, need: Need, call: Call) -> Lease | None:
        """Wait until the engine is what a request needs; return a lease, or None if it was to be ended.

        Raises:
            ProviderTimeout: the engine was not free in time.
            ModelLoadFailed: the engine could not be started.
        """
        with self._lock:
            if self._closed:
                raise _closed_error()
            self._waiting.append(need)
        self.grant_next()
        try:
            await call.waiting.wait(need.future, need.deadline + MARGIN)
            return need.future.result()
        except TimeoutError as error:
            self._withdraw(need.future)
            raise self._not_free(need, call) from error
        except BaseException:
            self._withdraw(need.future)
            raise

    async def end(self, call: Call) -> None:
        """End the child once it is idle."""
        await self.grant(Need(stop=True, deadline=call.deadline), call)

    def _not_free(self, need: Need, call: Call) -> ProviderTimeout:
        if self._fitting_process(need) is not None:
            what = "No slot was free in time."
            hint = "Raise the setting `slots` or the time limit, or ask less at once."
        elif not self._leases:
            what, hint = "The engine was not started in time.", "Raise the time limit."
        else:
            what = f"The engine could not be restarted or ended in time: {len(self._leases)} requests still use it."
            hint = "Close unread streams, use the same `context_window` everywhere, or raise the time limit."
        phase: Phase = "total" if need.deadline >= call.deadline - 2 * MARGIN else "first_token"
        return ProviderTimeout(what, phase=phase, hint=hint)

    def _withdraw(self, future: Future[Lease | None]) -> None:
        """Stop waiting, and give back a lease that is granted meanwhile."""

        def give_back(done: Future[Lease | None]) -> None:
            if done.exception() is None and (lease := done.result()) is not None:
                lease.end()

        if not future.cancel():
            future.add_done_callback(give_back)
        self.grant_next()

    def give_back(self, lease: Lease) -> None:
        """End one request."""
        with self._lock:
            if lease not in self._leases:
                return
            self._leases.remove(lease)
            if lease.use is not None:
                lease.use.end()
            self._start_idle_timer(lease.keep_alive)
        self.grant_next()

    def drop_adapter(self, digest: str) -> bool:
        """Leave an adapter out of the next start, and return whether the running child has loaded it."""
        with self._lock:
            self.adapters.pop(digest, None)
            return self.process is not None and digest in self.process.adapters

    def close(self) -> None:
        """End the child now, even if it is busy, and refuse waiting requests."""
        with self._lock:
            self._closed = True
            process, self.process = self.process, None
            waiting, self._waiting = self._waiting, deque()
            self._cancel_timer()
        if process is not None:
            process.stop()
        for need in waiting:
            if need.future.set_running_or_notify_cancel():
                need.future.set_exception(_closed_error())

    def disown(self) -> None:
        """In a forked process: forget the child without ending it."""
        if self.process is not None:
            self.process.disown()

    def grant_next(self) -> None:
        """Grant all possible leases, and restart the engine if the next request needs that."""
        granted: list[tuple[Need, Lease]] = []
        with self._lock:
            for need in [*self._waiting]:
                if self._busy:
                    break
                if need.future.cancelled():
                    self._waiting.remove(need)
                elif not need.stop and (process := self._fitting_process(need)) is not None:
                    if need.slot and sum(each.reading for each in self._leases) >= self.launch.slots:
                        continue
                    self._waiting.remove(need)
                    if need.future.set_running_or_notify_cancel():
                        granted.append((need, self._lease(need, process)))
                elif not self._leases:
                    self._waiting.remove(need)
                    if need.future.set_running_or_notify_cancel():
                        self._busy = True
                        threading.Thread(
                            target=self._restart, args=(need,), name="graftage-engine", daemon=True
                        ).start()
                else:
                    break
        for need, lease in granted:
            need.future.set_result(lease)

    def _fitting_process(self, need: Need) -> Process | None:
        """Return the running child if it is what the request needs."""
        process = self.running
        if process is None or need.window not in (None, process.window):
            return None
        if need.window is None and need.slot and process.window < need.default_window:
            return None  # Another client has asked for less.
        if process.state != file_state(Path(self.launch.model)):
            return None  # The file may have changed since it was loaded.
        return process if all(each.digest in process.adapters for each in need.adapters) else None

    def _lease(self, need: Need, process: Process, load: float | None = None, notes: tuple[str, ...] = ()) -> Lease:
        self._cancel_timer()
        for each in need.adapters:
            self.adapters[each.digest] = self.adapters.pop(each.digest, each)
        lease = Lease(
            engine=self, process=process, load=load, notes=notes, keep_alive=need.keep_alive, reading=need.slot
        )
        self._leases.add(lease)
        return lease

    def _restart(self, need: Need) -> None:
        """End the child that does not fit, and start one that does. Runs on its own thread, one at a time."""
        began, before = time.monotonic(), self.process
        died = before is not None and not before.alive
        window = need.window or max(before.window if before else 0, need.default_window)
        process: Process | None = None
        lease: Lease | None = None
        error: Exception | None = None
        try:
            adapters = {} if need.stop else self._choose_adapters(need)
            if before is not None:
                self.process = None
                before.stop()
            if not need.stop:
                process = self._start(window, adapters, need)
        except Exception as caught:  # noqa: BLE001 - raised again in the waiting request
            error = caught
        with self._lock:
            self._busy = False
            if process is not None and self._closed:
                process.stop()
                error = _closed_error()
            elif process is not None:
                self.process = process
                self.adapters = {digest: adapters[digest] for digest in process.adapters}
                notes = _notes(before, process, need, died=died)
                lease = self._lease(need, process, time.monotonic() - began, notes)
            elif self.process is not None:
                self._start_idle_timer(need.keep_alive)
        if error is not None:
            need.future.set_exception(error)
        else:
            need.future.set_result(lease)
        self.grant_next()

    def _choose_adapters(self, need: Need) -> dict[str, AdapterFile]:
        """Return the adapters to load: those that the request needs, then the last ones used that there is room for.

        One without a usable file is left out: only requests for it fail.
        """
        for each in need.adapters:
            each.prepare()
        chosen = {each.digest: each for each in need.adapters}
        size = sum(each.size for each in chosen.values())
        for each in (*reversed([*self.adapters.values()]), *need.others):
            if len(chosen) >= need.adapter_count:
                break
            if each.digest not in chosen and each.usable() and size + each.size <= need.adapter_bytes:
                chosen[each.digest] = each
                size += each.size
        return dict(reversed(chosen.items()))

    def _start(self, window: int, adapters: Mapping[str, AdapterFile], need: Need) -> Process:
        """Start a child; if that fails, try again without the adapters that the request does not need."""
        needed = {each.digest: each for each in need.adapters}
        for attempt in (adapters, needed):
            self.starts += 1
            files = {digest: each.loaded for digest, each in attempt.items()}
            try:
                return start(self.launch, window, files, need.deadline)
            except ModelLoadFailed as error:
                failed = error
            if failed.reason == "timeout" or len(needed) == len(adapters):
                break
        raise _load_error(failed, need.adapters)

    # --- The end of an idle child ------------------------------------------------------------------------------------

    def _start_idle_timer(self, keep_alive: float | None) -> None:
        self._cancel_timer()
        if self._leases or self._closed or keep_alive is None or keep_alive == math.inf:
            return
        self.expires = datetime.now(UTC) + timedelta(seconds=keep_alive)
        self._timer = threading.Timer(min(keep_alive, threading.TIMEOUT_MAX), self._expire)
        self._timer.daemon = True
        self._timer.start()

    def _cancel_timer(self) -> None:
        self.expires = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        with self._lock:
            if self._leases or self._waiting or self._busy or self._closed:
                return
            self._waiting.append(Need(stop=True))
        self.grant_next()


def _closed_error() -> ConnectionFailed:
    return ConnectionFailed("The engine has been closed.", retryable=False, hint="Use a client that is open.")


def _notes(before: Process | None, process: Process, need: Need, *, died: bool) -> tuple[str, ...]:
    if before is None:
        return ()
    if died:
        return ("The engine ended unexpectedly and was restarted.",)
    if before.state != process.state:
        return ("The engine was restarted: the file of its model has changed.",)
    if before.window != process.window:
        return (
            f"The engine was restarted with a context window of {process.window} tokens instead of {before.window}.",
        )
    new = [f"`{each.name}`" for each in need.adapters if each.digest not in before.adapters]
    if not new:
        return ()
    note = f"The engine was restarted to load the adapter {' and '.join(new)}"
    if dropped := len(before.adapters.keys() - process.adapters.keys()):
        note += f", and dropped {dropped}; raise `adapter_count` and `adapter_bytes` to keep more"
    return (f"{note}.",)


# --- Files of adapters -----------------------------------------------------------------------------------------------


class AdapterFile:
    """An adapter as a file that the engine can load with one model."""

    def __init__(self, adapter: Adapter, model: Callable[[], Stored]) -> None:
        self.name = adapter.name
        self.digest = adapter.digest
        self.path = Path()
        self.notes: tuple[str, ...] = ()
        """Warnings for the next reply with it."""
        self.activated = False
        """Whether it has an effect only after its invocation tokens."""
        self._adapter = adapter
        self._model = model
        self._state: FileState | None = None

    @property
    def loaded(self) -> LoadedFile:
        """The prepared file, as a child loads it."""
        return LoadedFile(self.path, self._state, self.activated)

    @property
    def size(self) -> int:
        """Bytes of the prepared file, which takes about as much memory."""
        return self._state[2] if self._state else 0

    def prepare(self, model: Stored | None = None) -> None:
        """Make the file at `path`, unless it exists unchanged; the model is read if it is not given.

        Raises:
            GraftageError: it cannot be made, or the engine cannot load it.
        """
        if self._state is None or file_state(self.path) != self._state:
            self._state = None
            self._make(model or self._model())

    def usable(self, model: Stored | None = None) -> bool:
        """Whether it can be prepared."""
        try:
            self.prepare(model)
        except GraftageError:
            return False
        return True

    def _make(self, model: Stored) -> None:
        try:
            self.path = self._adapter.gguf(_convert.model_info(model, full=True)).absolute()
        except GraftageError:
            raise
        except Exception as error:
            raise AdapterError(
                f"The file of the adapter `{self.name}` could not be made: {type(error).__name__}.",
                reference=self.name,
                hint="This is a bug in the plugin that resolved it.",
            ) from error
        state = file_state(self.path)
        self._check(model)
        self._state = state

    def _check(self, model: Stored) -> None:
        """Refuse an invalid file with a reason: the engine would give none."""
        try:
            header = read_file(self.path)
            check_adapter(header)
        except (OSError, GgufError) as error:
            raise AdapterInvalid(
                f"The file of the adapter `{self.name}` cannot be used: {error}.",
                reference=self.name,
                reasons=(str(error),),
                hint="Convert it again, or choose another adapter.",
            ) from error
        if header.architecture != model.header.architecture:
            reason = f"it is made for {header.architecture[:80]!r}, and the model is {model.header.architecture!r}"
            raise AdapterIncompatible(
                f"The adapter `{self.name}` does not fit `{model.name}`: {reason}.",
                reference=self.name,
                reasons=(reason,),
                hint="Choose the model it was made for.",
            )
        self.activated = header.is_activated


def _load_error(error: ModelLoadFailed, adapters: tuple[AdapterFile, ...]) -> GraftageError:
    """Return the error for an engine that did not start with the adapters of a request."""
    words = str(error.details.get("engine_stderr", ""))
    if error.reason != "incompatible" or "adapter_lora" not in words or not adapters:
        return error
    name = next((each for each in adapters if str(each.path) in words), adapters[0]).name
    kind = AdapterIncompatible if "wrong base model" in words or "mismatch" in words else AdapterUnsupported
    failed = kind(
        f"The engine cannot load the adapter `{name}`: {error.message}",
        reference=name,
        reasons=(error.message,),
        hint="Choose the model it was made for.",
    )
    failed.__cause__ = error
    return failed


# --- All engines of this process -------------------------------------------------------------------------------------

_engines: dict[Launch, Engine] = {}
_lock = threading.Lock()


def acquire(launch: Launch, holder: int) -> Engine:
    """Return the engine of a launch, which stays until its last holder releases it."""
    with _lock:
        engine = _engines.get(launch)
        if engine is None:
            engine = _engines[launch] = Engine(launch)
        engine.holders.add(holder)
        return engine


def release(holder: int) -> None:
    """Release all engines of one holder, and end those without another."""
    idle = []
    with _lock:
        for launch, engine in list(_engines.items()):
            engine.holders.discard(holder)
            if not engine.holders:
                idle.append(_engines.pop(launch))
    for engine in idle:
        engine.close()


def engines(model: Path | None = None) -> list[Engine]:
    """Return every engine of this process, or those of the model in a file."""
    with _lock:
        return [each for each in _engines.values() if model is None or each.launch.model == str(model)]


def _end_all() -> None:
    with _lock:
        left = list(_engines.values())
        _engines.clear()
    for engine in left:
        engine.close()


def _forget_all() -> None:
    """Forget all engines after a fork: they belong to the parent."""
    global _lock  # noqa: PLW0603 - at the fork, another thread may have held it
    _lock = threading.Lock()
    for engine in _engines.values():
        engine.disown()
    _engines.clear()


atexit.register(_end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
