"""What the models of one Mac were given: one ledger for all policies of a process, whichever object asks."""

from __future__ import annotations

import ipaddress
import os
import platform
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from pathlib import Path

    from graftage.types import ModelInfo
    from graftage_m4._footprint import Shape
    from graftage_m4._scene import Grant, Key, Server

__all__ = ["Ledger", "is_here", "ledger_of", "listed_size", "plain", "remember", "server_of"]

MOST_REMEMBERED: Final = 512
PORTS: Final = {"http": 80, "https": 443}

K = TypeVar("K")
T = TypeVar("T")


class Ledger:
    """What was given, promised and learned. Whoever reads or writes holds the lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.grants: dict[Key, Grant] = {}
        self.promises: dict[Key, int] = {}
        """The largest window that each model was given: its conversations may be as long."""
        self.shapes: dict[Key, Shape] = {}
        self.listed: dict[Hashable, int | None] = {}
        """The size of each state of a model by its server's list; `None` where the list lacks it."""
        self.slots: dict[Key, int] = {}
        """The parallel slots that the size of each model gave away when it was last seen."""
        self.on_cpu: set[Key] = set()
        self._in_use: dict[Server, dict[str, Callable[[], Mapping[str, int]]]] = {}
        """For each server, and each way to write its address, which models requests use."""

    def ask_later(self, server: Server, address: str, in_use: Callable[[], Mapping[str, int]]) -> None:
        """Remember how to ask which models of a server are in use; its gate lives as long as the process."""
        self._in_use.setdefault(server, {})[address] = in_use

    def used(self, server: Server) -> set[str]:
        """The plain names of a server's models that requests of this process use, by whatever address."""
        counts = [in_use() for in_use in self._in_use.get(server, {}).values()]
        return {plain(model) for each in counts for model, count in each.items() if count > 0}

    def forked(self) -> None:
        """In a process that was forked off: what runs, runs in the parent, and its threads hold no lock here."""
        self.lock = threading.Lock()
        self._in_use = {}


_ledgers: dict[Path | None, Ledger] = {}
_lock = threading.Lock()


def ledger_of(machine: Path | None) -> Ledger:
    """The ledger of this Mac, or of the one of a machine file."""
    with _lock:
        return _ledgers.setdefault(machine and machine.expanduser().resolve(), Ledger())


def _forked() -> None:
    global _lock  # noqa: PLW0603 - another thread may have held it at the fork
    _lock = threading.Lock()
    for ledger in _ledgers.values():
        ledger.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def remember(memory: dict[K, T], key: K, value: T) -> None:
    """Keep the newest, and drop the oldest beyond what a host can use."""
    memory.pop(key, None)
    memory[key] = value
    if len(memory) > MOST_REMEMBERED:
        del memory[next(iter(memory))]


def plain(model: str) -> str:
    """A model's name for comparing."""
    name = model.strip().lower().removeprefix("registry.ollama.ai/").removeprefix("library/")
    return name.removesuffix(":latest")


def listed_size(models: Iterable[ModelInfo], *names: str) -> int | None:
    """Bytes of a model in a list, however its name is written there and here."""
    wanted = {plain(name) for name in names}
    return next((each.size for each in models if each.size and plain(each.name) in wanted), None)


def is_here(address: str) -> bool:
    """Whether a server is on this machine. An address that is no URL is an engine in this process."""
    return "://" not in address or _is_own(urlsplit(address).hostname or "")


def server_of(provider: str, address: str) -> Server:
    """A server, however its address is written: all names of this machine are one."""
    try:
        parts = urlsplit(address)
        port = parts.port or PORTS.get(parts.scheme)
    except ValueError:
        return provider, address
    own = "://" in address and _is_own(parts.hostname or "")
    return provider, f"this machine:{port}{parts.path.rstrip('/')}" if own else address


def _is_own(host: str) -> bool:
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return host in ("localhost", platform.node().lower()) or host.endswith(".localhost")
    return found.is_loopback or found.is_unspecified
