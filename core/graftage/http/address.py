"""Where a request goes: this machine or another one, straight or through a proxy, with or without a key."""

from __future__ import annotations

import base64
import ipaddress
import re
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

from graftage.exceptions import ConnectionFailed, SettingsError

__all__ = ["Server", "check_base", "is_loopback", "is_private", "origin_of", "place", "proxy_for", "server_of"]

SECRET_NAMES: Final = re.compile(r"auth|cookie|credential|key|passw|secret|session|token", re.IGNORECASE)
"""Headers that are named like this carry what only the right server may see."""


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    # Python before 3.13 does not look inside: `::ffff:127.0.0.1` is 127.0.0.1.
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def check_base(url: str) -> str:
    """A base URL without its last slash. A refused one is not repeated: it may hold a password.

    Raises:
        SettingsError: nothing can be sent there.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.username is not None or parts.query or parts.fragment:
        raise SettingsError(
            "The server's address cannot be used: it must be an http or https URL without user, query and fragment.",
            key="host",
            hint="Write it like `http://127.0.0.1:8000/v1`, and put a key into `api_key`.",
        )
    return url.rstrip("/")


def is_private(url: str) -> bool:
    """Whether nobody on the way can read what is sent to `url`: by TLS, or since it stays on this machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or is_loopback(parts.hostname or "")


def place(url: str) -> str:
    """An address for people: without user, password, path and query."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{f':{parts.port}' if parts.port else ''}"


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for `url`. Loopback never has one: a prompt would leave the machine."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host):
        return None
    import urllib.request  # noqa: PLC0415 - a server on this machine does not need it, and it is slow to import

    proxies = urllib.request.getproxies()
    if urllib.request.proxy_bypass(host):
        return None
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


# --- Where connections go --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where the connections for one origin go."""

    origin: str
    """Scheme, host and port."""
    netloc: str
    host: str
    port: int
    tls: bool
    """Whether requests are sent by TLS."""
    first: tuple[str, int]
    """The host and the port that a connection is made to: those of the proxy, where there is one."""
    first_tls: bool = False
    """Whether TLS begins at once; with a tunnel it begins inside."""
    tunnel: bytes | None = None
    """What asks the proxy for a connection to the server."""
    absolute: bool = False
    """Whether requests name the whole URL, which a proxy reads."""
    headers: tuple[tuple[str, str], ...] = ()
    """What the proxy has to be given with each request."""


def origin_of(url: str) -> str:
    """Scheme, host and port of a URL."""
    end = url.find("/", url.find("://") + 3)
    return url if end < 0 else url[:end]


def server_of(origin: str) -> Server:
    """How an origin is reached, straight or through the proxy that the environment names.

    Raises:
        ConnectionFailed: the proxy cannot be used.
    """
    parts = urlsplit(origin)
    tls = parts.scheme == "https"
    host = _ascii(parts.hostname or "")
    name = f"[{host}]" if ":" in host else host
    port = parts.port or (443 if tls else 80)
    netloc = f"{name}:{parts.port}" if parts.port else name
    proxy = proxy_for(origin)
    if proxy is None:
        return Server(origin=origin, netloc=netloc, host=host, port=port, tls=tls, first=(host, port), first_tls=tls)
    by = _checked_proxy(proxy, tls=tls)
    first = (_ascii(by.hostname or ""), by.port or (443 if by.scheme == "https" else 80))
    words = f"{unquote(by.username or '')}:{unquote(by.password or '')}".encode()
    auth = (("proxy-authorization", f"Basic {base64.b64encode(words).decode()}"),) if by.username else ()
    behind = Server(origin=origin, netloc=netloc, host=host, port=port, tls=tls, first=first)
    if not tls:
        return replace(behind, first_tls=by.scheme == "https", absolute=True, headers=auth)
    lines = [f"CONNECT {name}:{port} HTTP/1.1", f"host: {name}:{port}", *(f"{key}: {value}" for key, value in auth)]
    tunnel = "\r\n".join([*lines, "", ""]).encode()
    return replace(behind, tunnel=tunnel)


def _ascii(host: str) -> str:
    return host if host.isascii() else host.encode("idna").decode()


def _checked_proxy(proxy: str, *, tls: bool) -> SplitResult:
    """A proxy's address. It is not repeated in an error: it may hold a password."""
    problem = ""
    try:
        by = urlsplit(proxy)
        usable = bool(by.hostname) and by.port != 0
    except ValueError:
        usable = False
    if not usable:
        problem = "The proxy that the environment names is no address."
    elif by.scheme not in ("http", "https"):
        problem = f"The environment names a proxy of a kind that cannot be used: {by.scheme}."
    elif tls and by.scheme == "https":
        problem = "The environment names a proxy that is reached by TLS, for a server that is reached by TLS as well."
    if problem:
        hint = "Set an http proxy, or name the host in NO_PROXY."
        raise ConnectionFailed(problem, retryable=False, hint=hint, details={"cause": "proxy"})
    return by
