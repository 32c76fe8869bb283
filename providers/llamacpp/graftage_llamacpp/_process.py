"""The parent's side of the engine: child processes, shared by all clients of one model, started and ended as needed."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import math
import os
import platform
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from graftage.exceptions import ConnectionFailed, ModelLoadFailed, ProviderError
from graftage_llamacpp._slots import Slots, Use

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from graftage_llamacpp._adapters import AdapterFile

__all__ = ["Engine", "Launch", "Lease", "Need", "engines", "hold", "let_go", "probe"]

PACKAGE: Final = "xllamacpp"
SCRIPT: Final = Path(__file__).with_name("_engine.py")
END_GENTLY: Final = 2.0
"""Seconds for the child to end by itself, and again after SIGTERM."""
STDERR_TAIL: Final = 4000
"""Characters of the engine's last words that go into an error's details."""
PROBE_LIMIT: Final = 20.0


# --- One child -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What two clients must have in common to share an engine."""

    model: str
    """Path of the file."""
    slots: int
    threads: int
    batch: int
    gpu_layers: int | None
    pool: bool
    """Whether vectors are averaged over the tokens: for models that were not made for them."""


class Process:
    """A running child. Made by `start`."""

    def __init__(self, child: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self._child = child
        self._errors = errors
        self._stopping = threading.Lock()
        self.address = ""
        self.key = ""
        self.version = ""
        self.window = 0
        self.adapters: tuple[str, ...] = ()
        """Digests, in the order of the engine's numbers."""
        self.activated: frozenset[str] = frozenset()
        """Those of them that act only after their invocation tokens."""
        self.slots = Slots(1)

    @property
    def pid(self) -> int:
        """The child's id."""
        return self._child.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._child.poll() is None

    def how_it_ended(self, patience: float = 0.0) -> str | None:
        """Why it does not run any more, in words; None while it does."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(patience)
        code = self._child.poll()
        if code is None:
            return None
        return f"killed by signal {-code}" if code < 0 else f"ended with status {code}"

    def last_words(self) -> str:
        """The end of what it wrote to standard error."""
        try:
            size = self._errors.seek(0, os.SEEK_END)
            self._errors.seek(max(0, size - STDERR_TAIL))
            return self._errors.read().decode(errors="replace").strip()
        except (OSError, ValueError):
            return ""

    def stop(self) -> None:
        """End it, gently first; safe to call twice and from several threads."""
        with self._stopping:
            for end in (self._close_input, self._child.terminate, self._child.kill):
                with contextlib.suppress(OSError):
                    end()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._child.wait(END_GENTLY)
                    break
            for pipe in (self._child.stdout, self._errors):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def _close_input(self) -> None:
        if self._child.stdin is not None:
            self._child.stdin.close()

    def disown(self) -> None:
        """In a process that was forked off: close the pipe, so that the child ends with its real parent."""
        with contextlib.suppress(OSError):
            self._close_input()
        self._child.returncode = 0  # It is not ours to wait for.


def start(launch: Launch, window: int, adapters: Mapping[str, AdapterFile], deadline: float) -> Process:
    """Start a child and wait until it has loaded the model.

    Raises:
        ModelLoadFailed: it could not, or not in time.
    """
    key = secrets.token_urlsafe(24)
    order = {
        "key": key,
        "window": window,
        "adapters": [str(each.path) for each in adapters.values()],
        **{name: getattr(launch, name) for name in ("model", "slots", "threads", "batch", "gpu_layers", "pool")},
    }
    process, answer = _launch(order, deadline)
    try:
        found = _started(process, answer, deadline)
    except BaseException:
        process.stop()
        raise
    process.address, process.key, process.version = str(found["address"]), key, str(found["version"])
    process.window, process.adapters, process.slots = window, tuple(adapters), Slots(launch.slots)
    # What such an adapter has read depends on where it was invoked, so its cache serves no other request.
    process.activated = frozenset(digest for digest, each in adapters.items() if each.activated)
    return process


def _started(process: Process, answer: dict[str, Any] | None, deadline: float) -> dict[str, Any]:
    """The answer of a child that serves.

    Raises:
        ModelLoadFailed: it does not.
    """
    if answer is None or "address" not in answer:
        raise _not_started(process, answer, deadline)
    return answer


def probe() -> str:
    """The engine's version, once it has been shown that it can be loaded here; asked once.

    Raises:
        ModelLoadFailed: it cannot, and what to install.
    """
    global _version  # noqa: PLW0603 - asked once for each process
    if _version is None:
        process, answer = _launch({"model": None, "key": ""}, time.monotonic() + PROBE_LIMIT)
        try:
            if answer is None or answer.get("error", "") is not None:
                raise _not_started(process, answer, math.inf)
            _version = str(answer["version"])
        finally:
            process.stop()
    return _version


_version: str | None = None


def _launch(order: Mapping[str, Any], deadline: float) -> tuple[Process, dict[str, Any] | None]:
    """Start the script with an order; the answer is None where there was none before the deadline."""
    location = find_package()
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
    try:
        child = subprocess.Popen(  # noqa: S603 - our own script, by our own interpreter
            [sys.executable, "-I", "-S", str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            # With threads that spin while they wait, a busy machine is fifteen times slower.
            env={**os.environ, "OMP_WAIT_POLICY": "passive"},
            cwd=Path(sys.executable).anchor or None,
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except OSError as error:
        errors.close()
        raise ModelLoadFailed(
            f"The engine's process could not be started: {error}.",
            reason="crashed",
            hint="Are there too many processes or open files?",
        ) from error
    process = Process(child, errors)
    line = {**order, "location": str(location), "parent": os.getpid()}
    try:
        return process, _answer(child, json.dumps(line).encode() + b"\n", deadline)
    except BaseException:
        process.stop()
        raise


def _answer(child: subprocess.Popen[bytes], order: bytes, deadline: float) -> dict[str, Any] | None:
    seconds = max(0.0, deadline - time.monotonic())
    # A pipe cannot be read with a limit on every system; but a killed child ends it.
    watchdog = threading.Timer(min(seconds, threading.TIMEOUT_MAX), child.kill)
    watchdog.daemon = True
    watchdog.start()
    try:
        if child.stdin is None or child.stdout is None:  # pragma: no cover - both are pipes
            return None
        child.stdin.write(order)
        child.stdin.flush()
        line = child.stdout.readline()
    except OSError:
        return None
    finally:
        watchdog.cancel()
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def find_package() -> Path:
    """Where the engine's package lies; it is never imported here, because a crash of it would take the host along.

    Raises:
        ModelLoadFailed: it is not installed, and why that may be so.
    """
    try:
        spec = importlib.util.find_spec(PACKAGE)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise ModelLoadFailed(
            f"The engine's package `{PACKAGE}` is not installed.", reason="incompatible", hint=_platform_hint()
        )
    if not sys.executable:
        raise ModelLoadFailed(
            "There is no Python interpreter to run the engine with: `sys.executable` is empty.",
            reason="incompatible",
            hint="Run the host with a normal Python, or choose another provider.",
        )
    return Path(spec.origin).parent.parent


def _platform_hint() -> str:
    if sys.platform == "linux" and platform.libc_ver()[0] != "glibc":
        return "There is no build of it for musl (Alpine): use an image with glibc, or another provider."
    return (
        "Install `graftage-llamacpp` with its requirements; there are builds for Linux with glibc (x86-64, aarch64), "
        "macOS 13 and later, and Windows (x86-64)."
    )


def _not_started(process: Process, answer: Mapping[str, Any] | None, deadline: float) -> ModelLoadFailed:
    """The typed error for a child that gave no address."""
    ended = process.how_it_ended(patience=1.0)
    words = process.last_words()
    details = {"engine_message": str((answer or {}).get("message", "")), "engine_stderr": words}
    if answer is None:
        if time.monotonic() >= deadline:
            return ModelLoadFailed(
                "The model was not loaded in time.",
                reason="timeout",
                hint="Raise `timeouts.first_token` or `timeout`, or choose a smaller model.",
                details=details,
            )
        return ModelLoadFailed(
            f"The engine crashed while it loaded the model ({ended or 'no answer'}).",
            reason="crashed",
            hint="Is there enough memory? Its last words are in `details`.",
            details=details,
        )
    if answer.get("error") == "import":
        return _not_imported(details)
    if _short_of_memory(words):
        return ModelLoadFailed(
            "The memory did not suffice for the model.",
            reason="memory",
            hint="Choose a smaller model or a smaller `context_window`.",
            details=details,
        )
    return ModelLoadFailed(
        f"The engine could not load the model: {_cause(words) or details['engine_message'].rstrip('.')}.",
        reason="incompatible",
        hint="Was it made for a newer engine, or is the file damaged?",
        details=details,
    )


def _not_imported(details: Mapping[str, str]) -> ModelLoadFailed:
    message = details["engine_message"]
    library = re.search(r"(lib[\w+-]+)\.so[.\d]*: cannot open", message)
    hints = {
        "libgomp": "Install it: `libgomp1` on Debian and Ubuntu, `libgomp` on Fedora and its kin.",
        "libstdc++": "Install it: `libstdc++6` on Debian and Ubuntu, `libstdc++` on Fedora and its kin.",
    }
    name = library[1] if library else ""
    if name:
        text, hint = f"The system library `{name}`, which the engine needs, is missing.", hints.get(name, "Install it.")
    else:
        text, hint = f"The engine cannot be loaded on this system: {message}.", _platform_hint()
    return ModelLoadFailed(text, reason="incompatible", hint=hint, details=details)


def _short_of_memory(words: str) -> bool:
    lower = words.lower()
    return any(each in lower for each in ("failed to allocate", "out of memory", "bad_alloc", "unable to allocate"))


def _cause(words: str) -> str:
    """The first thing the engine complained about."""
    found = re.search(r"error loading model: (.*)", words) or re.search(r" E (.*)", words)
    return found[1].strip().rstrip(".")[:300] if found else ""


# --- The engine of one model, shared ---------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True, eq=False)
class Need:
    """What a request wants of the engine before it can be sent."""

    deadline: float
    window: int | None = None
    """None for whatever window there is."""
    default_window: int = 4096
    adapter: AdapterFile | None = None
    """The one that must be loaded."""
    keep_alive: float | None = None
    stop: bool = False
    """Whether the engine is to be ended instead: when nothing runs any more."""
    future: Future[Lease] = field(default_factory=Future)


@dataclass(slots=True, kw_only=True, eq=False)
class Lease:
    """The right to send one request; while there is one, the engine is not restarted."""

    engine: Engine
    process: Process
    load: float | None = None
    """Seconds it took to start the engine for this request."""
    notes: tuple[str, ...] = ()
    """Warnings for the reply."""
    keep_alive: float | None = None
    use: Use | None = None
    """Of a slot, while adapters are loaded."""
    _ended: bool = False

    def end(self) -> None:
        """Give it back; the second time does nothing."""
        if not self._ended:
            self._ended = True
            if self.use is not None:
                self.use.end()
            self.engine.give_back(self)


class Engine:
    """The child of one launch: there is one or none, and what wants it waits in one fair line.

    A restart, for another window or a new adapter, waits until what runs has ended; what comes later waits behind it.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.process: Process | None = None
        self.expires: datetime | None = None
        """When an idle child ends; None for as long as a client is open."""
        self.holders: set[int] = set()
        self.adapters: dict[str, AdapterFile] = {}
        """Digests and files of the adapters that the next start loads, in this order."""
        self._waiting: deque[Need] = deque()
        self._running = 0
        self._busy = False
        self._closed = False
        self._timer: threading.Timer | None = None
        self._lock = threading.RLock()

    @property
    def running(self) -> int:
        """Requests under way."""
        return self._running

    def ask(self, need: Need) -> Future[Lease]:
        """Wait in line; never blocks. Whoever stops waiting must call `withdraw`."""
        with self._lock:
            if self._closed:
                raise ConnectionFailed(
                    "The engine has been closed.", retryable=False, hint="Use a client that is open."
                )
            self._waiting.append(need)
        self._pump()
        return need.future

    def withdraw(self, future: Future[Lease]) -> None:
        """Stop waiting; a lease that is granted all the same is given back."""
        if not future.cancel():
            future.add_done_callback(lambda done: None if done.exception() else done.result().end())
        self._pump()

    def give_back(self, lease: Lease) -> None:
        """End one request."""
        with self._lock:
            self._running -= 1
            self._rest(lease.keep_alive)
        self._pump()

    def drop_adapter(self, digest: str) -> bool:
        """Leave an adapter out from the next start on; whether the running child still holds it."""
        with self._lock:
            self.adapters.pop(digest, None)
            return self.process is not None and digest in self.process.adapters

    def close(self) -> None:
        """End the child now, whatever it does, and refuse what waits."""
        with self._lock:
            self._closed = True
            process, self.process = self.process, None
            waiting, self._waiting = self._waiting, deque()
            self._cancel_timer()
        if process is not None:
            process.stop()
        for need in waiting:
            if need.future.set_running_or_notify_cancel():
                need.future.set_exception(
                    ConnectionFailed(
                        "The engine was closed meanwhile.", retryable=False, hint="Use a client that is open."
                    )
                )

    def disown(self) -> None:
        """In a process that was forked off: let go of the child without ending it."""
        if self.process is not None:
            self.process.disown()

    def _pump(self) -> None:
        """Grant what can be granted, and start a restart where the next in line needs one."""
        granted: list[tuple[Need, Lease]] = []
        with self._lock:
            while self._waiting and not self._busy:
                need = self._waiting[0]
                if need.future.cancelled():
                    self._waiting.popleft()
                elif not need.stop and (process := self._fitting(need)) is not None:
                    self._waiting.popleft()
                    if need.future.set_running_or_notify_cancel():
                        granted.append((need, self._lease(need, process)))
                elif self._running == 0:
                    self._waiting.popleft()
                    if need.future.set_running_or_notify_cancel():
                        self._busy = True
                        threading.Thread(target=self._change, args=(need,), name="graftage-engine", daemon=True).start()
                else:
                    break
        for need, lease in granted:
            need.future.set_result(lease)

    def _fitting(self, need: Need) -> Process | None:
        """The running child, where it is what the request needs."""
        process = self.process
        if process is None or not process.alive:
            return None
        if need.window not in (None, process.window):
            return None
        if need.adapter is not None and need.adapter.digest not in process.adapters:
            return None
        return process

    def _lease(self, need: Need, process: Process, load: float | None = None, notes: tuple[str, ...] = ()) -> Lease:
        self._running += 1
        self._cancel_timer()
        return Lease(engine=self, process=process, load=load, notes=notes, keep_alive=need.keep_alive)

    def _change(self, need: Need) -> None:
        """End the child that does not fit, and start one that does; on a thread of its own, and alone."""
        began = time.monotonic()
        before = self.process
        died = before is not None and not before.alive
        window = need.window or (before.window if before else None) or need.default_window
        process: Process | None = None
        lease: Lease | None = None
        error: Exception | None = None
        adapters: dict[str, AdapterFile] = {}
        try:
            if not need.stop:
                adapters = self._usable(need.adapter)
            if before is not None:
                self.process = None
                before.stop()
            if not need.stop:
                process = self._start(window, adapters, need)
        except Exception as caught:  # noqa: BLE001 - it goes to the one who waits, whatever it is
            error = caught
        with self._lock:
            self._busy = False
            if process is not None and self._closed:
                process.stop()
                error, process = ConnectionFailed("The engine was closed meanwhile.", retryable=False), None
            if process is not None:
                self.process = process
                self.adapters = {digest: adapters[digest] for digest in process.adapters}
                notes = _notes(before, process, died=died)
                lease = self._lease(need, process, time.monotonic() - began, notes)
            elif self.process is not None:
                self._rest(need.keep_alive)
        if lease is not None:
            need.future.set_result(lease)
        elif need.stop and error is None:
            need.future.set_exception(Stopped())
        else:
            need.future.set_exception(error or ProviderError("The engine did not start."))
        self._pump()

    def _usable(self, needed: AdapterFile | None) -> dict[str, AdapterFile]:
        """The adapters to start with: a file that cannot be had is left out, and fails only who needs it."""
        usable = {digest: each for digest, each in self.adapters.items() if each.usable()}
        if needed is not None:
            needed.prepare()
            usable[needed.digest] = needed
        return usable

    def _start(self, window: int, adapters: Mapping[str, AdapterFile], need: Need) -> Process:
        """Start a child; if it fails, again without the adapters that are not needed, for it may be one of them."""
        try:
            return start(self.launch, window, adapters, need.deadline)
        except ModelLoadFailed as error:
            failed = error
        needed = {} if need.adapter is None else {need.adapter.digest: need.adapter}
        if len(needed) < len(adapters) and failed.reason != "timeout":
            try:
                return start(self.launch, window, needed, need.deadline)
            except ModelLoadFailed as error:
                failed = error
        raise failed if need.adapter is None else need.adapter.not_taken(failed)

    # How long an idle child stays

    def _rest(self, keep_alive: float | None) -> None:
        self._cancel_timer()
        if self._running or self._closed or keep_alive is None or keep_alive == math.inf:
            return
        self.expires = datetime.now(timezone.utc) + timedelta(seconds=keep_alive)
        self._timer = threading.Timer(keep_alive, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def _cancel_timer(self) -> None:
        self.expires = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        with self._lock:
            if self._running or self._waiting or self._busy or self._closed:
                return
            self._waiting.append(Need(deadline=math.inf, stop=True))
        self._pump()


class Stopped(Exception):
    """The engine was ended, as was asked."""


def _notes(before: Process | None, process: Process, *, died: bool) -> tuple[str, ...]:
    if before is None:
        return ()
    if died:
        return ("The engine had ended unexpectedly and was started again.",)
    if before.window != process.window:
        return (
            f"The engine was started again with a context window of {process.window} tokens, before {before.window}.",
        )
    return ()


# --- All engines of this process -------------------------------------------------------------------------------------

_engines: dict[Launch, Engine] = {}
_lock = threading.Lock()


def hold(launch: Launch, holder: int) -> Engine:
    """The engine of a launch, which stays until its last holder lets go."""
    with _lock:
        engine = _engines.get(launch)
        if engine is None:
            engine = _engines[launch] = Engine(launch)
        engine.holders.add(holder)
        return engine


def let_go(holder: int) -> None:
    """Let go of everything one holder has; what nobody holds any more ends."""
    idle = []
    with _lock:
        for launch, engine in list(_engines.items()):
            engine.holders.discard(holder)
            if not engine.holders:
                idle.append(_engines.pop(launch))
    for engine in idle:
        engine.close()


def engines() -> list[Engine]:
    """Every engine of this process."""
    with _lock:
        return list(_engines.values())


def _end_all() -> None:
    with _lock:
        left = list(_engines.values())
        _engines.clear()
    for engine in left:
        engine.close()


def _forget_all() -> None:
    """After a fork: the children are the parent's."""
    global _lock  # noqa: PLW0603 - another thread may have held it at the fork
    _lock = threading.Lock()
    for engine in _engines.values():
        engine.disown()
    _engines.clear()


atexit.register(_end_all)
_at_fork: Callable[..., None] | None = getattr(os, "register_at_fork", None)
if _at_fork is not None:
    _at_fork(after_in_child=_forget_all)
