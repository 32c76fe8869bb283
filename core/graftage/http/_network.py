"""Errors and TLS for both networks."""

from __future__ import annotations

import functools
import socket
import sys
import time
from typing import TYPE_CHECKING, Any, TypeAlias

from graftage.exceptions import ConnectionFailed, ProtocolError, ProviderError, ProviderTimeout
from graftage.http.address import place

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

    from graftage.http._framing import Framing
    from graftage.http._server import Server
    from graftage.http.clock import Clock

__all__ = [
    "IDLE_SECONDS",
    "MAX_IDLE",
    "Addresses",
    "closed_error",
    "connect_error",
    "early_error",
    "has_response",
    "is_stale",
    "known_addresses",
    "no_response_error",
    "not_http_error",
    "tls_context",
    "tunnel_error",
]

Addresses: TypeAlias = list[tuple[Any, Any, int, str, Any]]
"""As `socket.getaddrinfo` gives them."""
MAX_IDLE = 20
"""How many idle connections are kept."""
IDLE_SECONDS = 30.0
"""Seconds for which an idle connection is kept."""
RACE_SECONDS = 5.0
"""Seconds within which the end of a connection may have crossed the request. Later ends mean that the server failed."""
PROXY_SIGN_IN = 407
SERVER_FAULT = 500


def known_addresses(server: Server) -> Addresses | None:
    """Return the addresses of a server that need no lookup, or None.

    Raises:
        ConnectionFailed: this system has no Unix sockets.
    """
    if server.path is not None:
        if not hasattr(socket, "AF_UNIX"):
            hint = "Let the server listen on a port."
            raise _connection_failed("This system has no Unix sockets.", "unreachable", hint)
        return [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", server.path)]
    host, port = server.first[0].encode(), server.first[1]  # For a `str`, Python would import IDNA.
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        return None


@functools.cache
def tls_context() -> ssl.SSLContext:
    """Return the one TLS context of the process. Building one takes about 50 ms, and plain HTTP needs none.

    Raises:
        ConnectionFailed: the certificates cannot be read.
    """
    import os
    import ssl

    import certifi

    own = "SSL_CERT_FILE" in os.environ or "SSL_CERT_DIR" in os.environ
    try:
        context = ssl.create_default_context(
            cafile=os.environ.get("SSL_CERT_FILE") if own else certifi.where(), capath=os.environ.get("SSL_CERT_DIR")
        )
    except OSError as error:  # ssl.SSLError is a subclass.
        raise _connection_failed(
            f"The certificates for TLS cannot be read: {error}.", "tls", "Check SSL_CERT_FILE and SSL_CERT_DIR."
        ) from error
    context.set_alpn_protocols(["http/1.1"])
    return context


def early_error(error: BaseException, clock: Clock, url: str) -> ProviderError:
    """Return the typed error for a system error before the head of a response."""
    return clock.expired() if isinstance(error, TimeoutError) else connection_error(error, url)


def connect_error(error: BaseException, clock: Clock, server: Server) -> ProviderError:
    """Return the typed error for a connection that was not made. It names the proxy if there is one."""
    # A TLS error inside a tunnel comes from the server, not from the proxy.
    inside = server.tunnel is not None and _tls_error(list(_chain(error))) is not None
    if isinstance(error, ProviderTimeout):
        found: ProviderError = error
    else:
        found = early_error(error, clock, server.origin if inside else peer_of(server))
    return found if inside else _name_proxy(found, server)


def peer_of(server: Server) -> str:
    """Return scheme, host and port of the proxy, or of the server if there is none."""
    return server.origin if server.proxy is None else server.proxy.partition(",")[0]


def _name_proxy(error: ProviderError, server: Server) -> ProviderError:
    """Name the proxy, if there is one, in an error and its hint."""
    if server.proxy is not None:
        error.message += f" It is the proxy for {place(server.origin)}."
        error.hint = f"Check the proxy {server.proxy}, or add the host to NO_PROXY."
        error.args = (error.message,)
    return error


def closed_error() -> ConnectionFailed:
    """Return the typed error for a connection that was closed while it was made."""
    return _connection_failed("The client was closed while it was connecting.", "closed", "Use an open client.")


def is_stale(framing: Framing, begun: float) -> bool:
    """Whether the server probably closed a reused connection before it read the request.

    Any such request is sent again at once, as browsers do, so that no request fails unread. If the server had read it
    after all, a repeat does no harm: a model replies twice, a pull continues, an upload or a deletion stays the same.
    """
    closed = framing.size == 0 and isinstance(framing.fault, (OSError, EOFError))
    return closed and time.monotonic() - begun < RACE_SECONDS


def no_response_error(framing: Framing, clock: Clock, server: Server) -> ProviderError:
    """Return the typed error for a connection that ended, or sent invalid bytes, before the head of its response."""
    if framing.head:
        return tunnel_error(framing, server)
    # Inside a tunnel the server is to blame.
    where = peer_of(server) if server.absolute else server.origin
    fault = framing.fault or EOFError()
    if isinstance(fault, (OSError, EOFError)):
        error = early_error(fault, clock, where)
    else:
        error = not_http_error(where, framing.fault_text())
    return _name_proxy(error, server) if server.absolute else error


def has_response(framing: Framing, server: Server) -> bool:
    """Whether the head of the server's own response has come, not a proxy's demand for a sign-in."""
    return framing.head and not (server.absolute and framing.status == PROXY_SIGN_IN)


def not_http_error(url: str, why: str) -> ProtocolError:
    """Return the typed error for a response that is not valid HTTP."""
    return ProtocolError(
        f"The server at {place(url)} does not speak HTTP: {why}.", hint="Check `host`, its scheme and its port."
    )


def connection_error(error: BaseException, url: str) -> ConnectionFailed:
    """Return the typed error for a connection that failed or broke, with the cause in `details["cause"]`."""
    where = place(url)
    causes = list(_chain(error))
    if any(isinstance(each, (socket.gaierror, UnicodeError)) for each in causes):
        return _connection_failed(f"The host name in {where} is not known.", "dns", "Check the spelling of `host`.")
    if (found := _tls_error(causes)) is not None:
        return _connection_failed(
            f"TLS with {where} failed: {found.reason or found}.",
            "tls",
            "Check the scheme, the certificate and the clock.",
        )
    if any(isinstance(each, (ConnectionRefusedError, FileNotFoundError)) for each in causes):
        return _connection_failed(
            f"Nothing listens at {where}.", "refused", "Is the server running, and is the port right?", retryable=True
        )
    if any(isinstance(each, (EOFError, ConnectionError)) for each in causes):
        return _connection_failed(
            f"The connection to {where} broke before a response came: {_innermost(causes)}.",
            "broken",
            "Was the server stopped?",
            retryable=True,
        )
    return _connection_failed(
        f"{where} cannot be reached: {_innermost(causes)}.",
        "unreachable",
        "Check `host` and the network.",
        retryable=True,
    )


def tunnel_error(framing: Framing, server: Server) -> ConnectionFailed:
    """Return the error for a proxy that does not connect to the server."""
    hint = "Put user and password into its address." if framing.status == PROXY_SIGN_IN else "Check its log."
    what = f"refuses: status {framing.status}" if framing.head else f"broke off: {framing.fault_text()}"
    return _connection_failed(
        f"The proxy for {place(server.origin)} {what}. It is {server.proxy}.",
        "proxy",
        f"{hint} If the host needs no proxy, add it to NO_PROXY.",
        retryable=framing.status >= SERVER_FAULT,
    )


def _connection_failed(message: str, cause: str, hint: str, *, retryable: bool = False) -> ConnectionFailed:
    return ConnectionFailed(message, hint=hint, retryable=retryable, details={"cause": cause})


def _tls_error(causes: list[BaseException]) -> ssl.SSLError | None:
    module = sys.modules.get("ssl")  # If it was never imported, there is no such error.
    return next((each for each in causes if isinstance(each, module.SSLError)), None) if module else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _innermost(causes: list[BaseException]) -> str:
    texts = [str(each) for each in causes if str(each)]
    return texts[-1].rstrip(".") if texts else type(causes[0]).__name__
