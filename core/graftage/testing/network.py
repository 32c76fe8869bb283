"""Guards that refuse connections and look-ups of tests.

They replace functions of Python's `socket`: other processes, and code that does not use it, are not restricted.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import threading
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import pytest

    from graftage.http import Clock, Request, Response, Transport

__all__ = ["NetworkRefused"]

_active: Final[list[Guard]] = []
_pairing: Final = threading.local()


class NetworkRefused(RuntimeError):
    """A test used the network. Not an `OSError`, which a provider would report as a server that is down."""


class Guard:
    """Refuses hosts until the test ends. It never refuses Unix sockets."""

    def __init__(self, name: str, way_out: str, *, loopback: bool, patterns: Iterable[str] = ()) -> None:
        """Set what is allowed.

        Args:
            name: what asked for the guard, for messages.
            way_out: what to do about a refusal.
            loopback: whether this machine may be reached.
            patterns: regular expressions for the beginnings of hosts that may be reached.
        """
        self._name = name
        self._way_out = way_out
        self._loopback = loopback
        self._patterns = [re.compile(each) for each in patterns]
        self._opened: set[str] = set()

    @contextlib.contextmanager
    def installed(self, patch: pytest.MonkeyPatch) -> Iterator[None]:
        """Guard the functions of `socket` until the patch is undone."""
        # With a patch of its own, the test's patches could restore guarded functions after the guard has ended.
        for name, place in (("connect", 1), ("connect_ex", 1), ("sendto", -1), ("sendmsg", 4)):
            patch.setattr(socket.socket, name, self._guard_address(getattr(socket.socket, name), place))
        for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
            patch.setattr(socket, name, self._guard_look_up(getattr(socket, name)))
        patch.setattr(socket, "socketpair", _note_pairing(socket.socketpair))
        _active.append(self)
        try:
            yield
        finally:
            _active.remove(self)

    def open(self, host: str) -> None:
        """Allow a host from now on."""
        self._opened.add(host)

    def _allows(self, host: str) -> bool:
        return (
            not host
            or host in self._opened
            or (self._loopback and _is_local(host))
            or any(each.match(host) for each in self._patterns)
        )

    def _refuse(self, host: str) -> None:
        raise NetworkRefused(f"{self._name} refused a connection to {host!r}. {self._way_out}")

    def _guard_address(self, real: Callable[..., Any], place: int) -> Callable[..., Any]:
        """Guard `sock.connect(address)`, `sock.sendto(data[, flags], address)` and the like."""

        def guarded(*args: Any) -> Any:
            address = args[place] if place < len(args) else None
            host = _text(address[0]) if isinstance(address, tuple) else ""
            if not self._allows(host) and not getattr(_pairing, "active", False):
                self._refuse(host)
            return real(*args)

        return guarded

    def _guard_look_up(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Guard `getaddrinfo(host, port)` and the like. The addresses of an allowed name are allowed, too."""

        def guarded(host: Any, *args: Any, **kwargs: Any) -> Any:
            name = _text(host)
            allowed = self._allows(name)
            if not allowed and not _is_local(name):
                self._refuse(name)
            found = real(host, *args, **kwargs)
            if name and allowed:
                self._opened.update(_addresses(found))
            return found

        return guarded


class Opened:
    """A transport whose requests open their hosts: what a cassette records comes from there."""

    def __init__(self, inner: Transport) -> None:
        self.colour = inner.colour
        self._inner = inner

    async def send(self, request: Request, clock: Clock) -> Response:
        """Open the host in all guards, and send."""
        host = urlsplit(request.url).hostname
        for guard in _active if host else ():
            guard.open(host or "")
        return await self._inner.send(request, clock)

    async def close(self) -> None:
        """Close the transport."""
        await self._inner.close()


def _note_pairing(real: Callable[..., Any]) -> Callable[..., Any]:
    """Note that a pair of sockets is made: on Windows, they connect through loopback, and each event loop has one."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        _pairing.active = True
        try:
            return real(*args, **kwargs)
        finally:
            _pairing.active = False

    return guarded


def _text(host: object) -> str:
    """Return the name of a host; a missing one is this machine."""
    return host.decode("ascii", "replace") if isinstance(host, bytes) else str(host or "")


def _addresses(found: Any) -> Iterable[str]:
    """Return the addresses that a look-up found."""
    if isinstance(found, str):
        return [found]
    return found[2] if isinstance(found, tuple) else [str(each[4][0]) for each in found]


def _is_local(host: str) -> bool:
    """Return whether a host is this machine."""
    if not host or host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
