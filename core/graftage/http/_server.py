"""How to reach a server: directly, by a Unix socket, or through a proxy from the environment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from urllib.parse import SplitResult, urlsplit

from graftage.exceptions import ConnectionFailed
from graftage.http.address import basic, named_proxy, place, socket_path

__all__ = ["Server", "server_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where to connect for one origin."""

    origin: str
    """Scheme, host and port."""
    netloc: str
    host: str
    tls: bool = False
    """Whether TLS begins at once. With a tunnel, another TLS for the host begins inside it."""
    first: tuple[str, int]
    """The host and port to connect to: those of the proxy if there is one."""
    path: str | None = None
    """The Unix socket to connect to instead."""
    proxy: str | None = None
    """The proxy, without user and password, and the variable that names it: for messages."""
    tunnel: bytes | None = None
    """The request for a tunnel through the proxy."""
    absolute: bool = False
    """Whether requests must name the whole URL, for a proxy."""
    headers: tuple[tuple[str, str], ...] = ()
    """Headers for the proxy alone: sent with each request, or with the one for the tunnel."""


def server_of(origin: str) -> Server:
    """Return how to reach an origin.

    Raises:
        ConnectionFailed: the host name, or the proxy from the environment, cannot be used.
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
    """Return a host name in the form for lookups, or None if it is invalid."""
    try:
        return host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:
        return None


def _checked_proxy(proxy: str, variable: str, *, tls: bool) -> tuple[SplitResult, tuple[str, int]]:
    """Return a proxy's URL, and the host and port to connect to. Errors do not show its password."""
    problem = ""
    try:
        by = urlsplit(proxy)
        host, port = _ascii(by.hostname or ""), by.port
    except ValueError:
        host = port = None
    if not host or port == 0:
        problem = f"The URL of the proxy in {variable} is invalid."
    elif by.scheme not in ("http", "https"):
        problem = f"The proxy {place(proxy)}, which {variable} names, has an unsupported scheme: {by.scheme}."
    elif tls and by.scheme == "https":
        problem = f"The proxy {place(proxy)}, which {variable} names, uses TLS as the server does: only one can."
    if problem or not host:
        hint = "Set an http proxy, or add the host to NO_PROXY."
        raise ConnectionFailed(problem, retryable=False, hint=hint, details={"cause": "proxy"})
    return by, (host, port or (443 if by.scheme == "https" else 80))
