"""How the server of a URL is reached: straight, by a socket of the file system, or through the environment's proxy."""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace
from urllib.parse import SplitResult, unquote, urlsplit

from graftage.exceptions import ConnectionFailed
from graftage.http.address import place, proxy_for, socket_path

__all__ = ["Server", "server_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where the connections for one origin go."""

    origin: str
    """Scheme, host and port."""
    netloc: str
    host: str
    tls: bool = False
    """Whether TLS begins at once; with a tunnel it begins inside, for the host."""
    first: tuple[str, int]
    """The host and the port that a connection is made to: those of the proxy, where there is one."""
    path: str | None = None
    """The socket of the file system that a connection is made to instead."""
    proxy: str | None = None
    """The proxy's address, for messages: without user and password."""
    tunnel: bytes | None = None
    """What asks the proxy for a connection to the server."""
    absolute: bool = False
    """Whether requests name the whole URL, which a proxy reads."""
    headers: tuple[tuple[str, str], ...] = ()
    """What the proxy, and nobody behind it, has to be given: with each request, or with the one for the tunnel."""


def server_of(origin: str) -> Server:
    """How an origin is reached.

    Raises:
        ConnectionFailed: the host name, or the proxy that the environment names, cannot be used.
    """
    if (path := socket_path(origin)) is not None:
        return Server(origin=origin, netloc="localhost", host="localhost", first=("", 0), path=path)
    parts = urlsplit(origin)
    tls = parts.scheme == "https"
    host = _ascii(parts.hostname or "", origin)
    name = f"[{host}]" if ":" in host else host
    port = parts.port or (443 if tls else 80)
    netloc = f"{name}:{parts.port}" if parts.port else name
    straight = Server(origin=origin, netloc=netloc, host=host, first=(host, port), tls=tls)
    proxy = proxy_for(origin)
    if proxy is None:
        return straight
    by = _checked_proxy(proxy, tls=tls)
    first = (_ascii(by.hostname or "", proxy), by.port or (443 if by.scheme == "https" else 80))
    words = f"{unquote(by.username or '')}:{unquote(by.password or '')}".encode()
    auth = (("proxy-authorization", f"Basic {base64.b64encode(words).decode()}"),) if by.username else ()
    behind = replace(straight, first=first, tls=by.scheme == "https", proxy=place(proxy), headers=auth)
    if not tls:
        return replace(behind, absolute=True)
    lines = [f"CONNECT {name}:{port} HTTP/1.1", f"host: {name}:{port}", *(f"{key}: {value}" for key, value in auth)]
    return replace(behind, tunnel="\r\n".join([*lines, "", ""]).encode())


def _ascii(host: str, url: str) -> str:
    try:
        return host if host.isascii() else host.encode("idna").decode()
    except UnicodeError as error:
        raise ConnectionFailed(
            f"The host name in {place(url)} is none.",
            retryable=False,
            hint="Check the spelling of `host`.",
            details={"cause": "dns"},
        ) from error


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
