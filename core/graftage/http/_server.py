"""How the server of a URL is reached: straight, or through the proxy that the environment names."""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace
from urllib.parse import SplitResult, unquote, urlsplit

from graftage.exceptions import ConnectionFailed
from graftage.http.address import proxy_for

__all__ = ["Server", "server_of"]


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
