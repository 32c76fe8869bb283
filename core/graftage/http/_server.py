"""How the server of a URL is reached: straight, by a socket of the file system, or through the environment's proxy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from urllib.parse import SplitResult, urlsplit

from graftage.exceptions import ConnectionFailed
from graftage.http.address import basic, named_proxy, place, socket_path

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
    """The proxy's address, without user and password, and what names it: for messages."""
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
    host = _ascii(parts.hostname or "")
    if host is None:
        hint = "Check the spelling of `host`."
        raise ConnectionFailed(
            f"The host name in {place(origin)} is invalid.", retryable=False, hint=hint, details={"cause": "dns"}
        )
    name = f"[{host}]" if ":" in host else host
    port = parts.port or (443 if tls else 80)
    netloc = f"{name}:{parts.port}" if parts.port else name
    straight = Server(origin=origin, netloc=netloc, host=host, first=(host, port), tls=tls)
    proxy, variable = named_proxy(origin)
    if proxy is None:
        return straight
    by, first = _checked_proxy(proxy, variable, tls=tls)
    auth = tuple(basic("proxy-authorization", by).items())
    named = f"{place(proxy)}, which {variable} names"
    behind = replace(straight, first=first, tls=by.scheme == "https", proxy=named, headers=auth)
    if not tls:
        return replace(behind, absolute=True)
    lines = [f"CONNECT {name}:{port} HTTP/1.1", f"host: {name}:{port}", *(f"{key}: {value}" for key, value in auth)]
    return replace(behind, tunnel="\r\n".join([*lines, "", ""]).encode())


def _ascii(host: str) -> str | None:
    """A host name as it is looked up; None where it is invalid."""
    try:
        return host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:
        return None


def _checked_proxy(proxy: str, variable: str, *, tls: bool) -> tuple[SplitResult, tuple[str, int]]:
    """A proxy's address, and where a connection to it is made. No password of it stands in an error."""
    problem = ""
    try:
        by = urlsplit(proxy)
        host, port = _ascii(by.hostname or ""), by.port
    except ValueError:
        host = port = None
    if not host or port == 0:
        problem = f"What {variable} names as a proxy is invalid."
    elif by.scheme not in ("http", "https"):
        problem = f"The proxy {place(proxy)}, which {variable} names, is of a kind that cannot be used: {by.scheme}."
    elif tls and by.scheme == "https":
        problem = (
            f"The proxy {place(proxy)}, which {variable} names, is reached by TLS, as the server is: not both can."
        )
    if problem or not host:
        hint = "Set an http proxy, or name the host in NO_PROXY."
        raise ConnectionFailed(problem, retryable=False, hint=hint, details={"cause": "proxy"})
    return by, (host, port or (443 if by.scheme == "https" else 80))
