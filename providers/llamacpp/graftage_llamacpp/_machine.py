"""What this machine has: cores, free memory, and what a process uses of it."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

__all__ = ["default_threads", "free_memory", "resident_memory"]

CPUS = Path("/sys/devices/system/cpu")
CGROUP = Path("/sys/fs/cgroup")
PROC = Path("/proc")


def default_threads() -> int:
    """One thread less than there are real cores, and at least one: the host must not starve while the model thinks."""
    return max(1, _cores() - 1)


def _cores() -> int:
    """Cores this process may use, counting two threads of one core once."""
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
    """Bytes that can still be used without pushing others out; None where the system does not tell."""
    if platform.system() == "Linux":
        return min((each for each in (_available(), _left_in_cgroup()) if each is not None), default=None)
    if platform.system() == "Darwin":
        # macOS gives up its file cache and compresses before it swaps; what is there is the best figure it has.
        found = _output("sysctl", "-n", "hw.memsize")
        return int(found) if found and found.isdigit() else None
    if platform.system() == "Windows":
        return _windows_memory()
    return None


def _available() -> int | None:
    for line in (_read(PROC / "meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _left_in_cgroup() -> int | None:
    """What a container may still take: its limit, less what it uses apart from caches."""
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
    import ctypes  # noqa: PLC0415 - on Windows alone

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
    """Bytes of real memory a process uses; None where the system does not tell."""
    if platform.system() == "Linux":
        pages = (_read(PROC / str(pid) / "statm") or "").split()
        return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else None
    if platform.system() == "Darwin":
        found = _output("ps", "-o", "rss=", "-p", str(pid))
        return int(found) * 1024 if found and found.isdigit() else None
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2, check=False)  # noqa: S603 - fixed words
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
