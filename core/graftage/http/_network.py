"""What both networks share: what a failure means, and TLS."""

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
    "KEEPALIVE",
    "KEEPALIVE_EXPIRY",
    "Addresses",
    "closed",
    "failed_before_answer",
    "is_answered",
    "is_stale",
    "known_addresses",
    "not_http",
    "tls_context",
    "tunnel_failed",
    "unanswered",
    "unconnected",
]

Addresses: TypeAlias = list[tuple[Any, Any, int, str, Any]]
"""As `socket.getaddrinfo` gives them."""
KEEPALIVE = 20
"""Idle connections that are kept."""
KEEPALIVE_EXPIRY = 30.0
"""Seconds for which an idle connection is kept."""
RACE = 5.0
"""Seconds within which the end of a connection may have crossed a request; later it is the end of the server's work."""
PROXY_SIGN_IN = 407
SERVER_FAULT = 500


def known_addresses(server: Server) -> Addresses | None:
    """The addresses of a server that take no time to find; None where a name has to be looked up.

    Raises:
        ConnectionFailed: this system has no such sockets.
    """
    if server.path is not None:
        if not hasattr(socket, "AF_UNIX"):
            hint = "Let the server listen at a port."
            raise _failed("This system has no sockets of the file system.", "unreachable", hint)
        return [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", server.path)]
    host, port = server.first[0].encode(), server.first[1]  # For a text, Python would look into IDNA.
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        return None


@functools.cache
def tls_context() -> ssl.SSLContext:
    """The one TLS context of the process: building one costs some 50 ms, and no plain-http host needs it.

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
    except OSError as error:  # ssl.SSLError is one
        raise _failed(
            f"The certificates for TLS cannot be read: {error}.", "tls", "Check SSL_CERT_FILE and SSL_CERT_DIR."
        ) from error
    context.set_alpn_protocols(["http/1.1"])
    return context


def failed_before_answer(error: BaseException, clock: Clock, url: str) -> ProviderError:
    """The typed error for what the system said before the head of an answer was there."""
    return clock.expired() if isinstance(error, TimeoutError) else connection_failed(error, url)


def unconnected(error: BaseException, clock: Clock, server: Server) -> ProviderError:
    """The typed error for a connection that was not made, which blames the proxy where there is one."""
    # What TLS says inside a tunnel, the server says.
    inside = server.tunnel is not None and _tls_error(list(_chain(error))) is not None
    if isinstance(error, ProviderTimeout):
        found: ProviderError = error
    else:
        found = failed_before_answer(error, clock, server.origin if inside else peer_of(server))
    return found if inside else _blamed(found, server)


def peer_of(server: Server) -> str:
    """Scheme, host and port of what connections are made to: the proxy, where there is one."""
    return server.origin if server.proxy is None else server.proxy.partition(",")[0]


def _blamed(error: ProviderError, server: Server) -> ProviderError:
    """The same error, which names the proxy where it was the proxy that failed."""
    if server.proxy is not None:
        error.message += f" It is the proxy on the way to {place(server.origin)}."
        error.hint = f"Check the proxy {server.proxy}. NO_PROXY names hosts that need none."
        error.args = (error.message,)
    return error


def closed() -> ConnectionFailed:
    """The typed error for a connection that was closed while it was made."""
    return _failed("The connection was closed while it was made.", "closed", "Use a client that is open.")


def is_stale(answer: Framing, begun: float) -> bool:
    """Whether a connection that had been used before was closed, it seems, before the request came.

    It is sent again then, at once and whatever it is, as a browser does: nothing fails that was never read. Had it been
    read after all, a model answers twice, a pull goes on, an upload is the same, and what was to be deleted is gone.
    """
    closed = answer.size == 0 and isinstance(answer.fault, (OSError, EOFError))
    return closed and time.monotonic() - begun < RACE


def unanswered(answer: Framing, clock: Clock, server: Server) -> ProviderError:
    """The typed error for a connection that ended, or broke a rule, before the head of its answer was there."""
    if answer.head:
        return tunnel_failed(answer, server)
    # In a tunnel it was the server.
    where = peer_of(server) if server.absolute else server.origin
    fault = answer.fault or EOFError()
    if isinstance(fault, (OSError, EOFError)):
        error = failed_before_answer(fault, clock, where)
    else:
        error = not_http(where, answer.words())
    return _blamed(error, server) if server.absolute else error


def is_answered(answer: Framing, server: Server) -> bool:
    """Whether the server has begun to answer: a proxy that wants a sign-in speaks in its place."""
    return answer.head and not (server.absolute and answer.status == PROXY_SIGN_IN)


def not_http(url: str, why: str) -> ProtocolError:
    """The typed error for an answer that breaks the rules of HTTP."""
    return ProtocolError(
        f"What answers at {place(url)} does not speak HTTP: {why}.", hint="Check `host`, its scheme and its port."
    )


def connection_failed(error: BaseException, url: str) -> ConnectionFailed:
    """The typed error for a connection that could not be made or broke, with the cause in `details["cause"]`."""
    where = place(url)
    causes = list(_chain(error))
    if any(isinstance(each, (socket.gaierror, UnicodeError)) for each in causes):
        return _failed(f"The host name in {where} is not known.", "dns", "Check the spelling of `host`.")
    if (found := _tls_error(causes)) is not None:
        return _failed(
            f"TLS with {where} failed: {found.reason or found}.",
            "tls",
            "Check the scheme, the certificate and the clock.",
        )
    if any(isinstance(each, (ConnectionRefusedError, FileNotFoundError)) for each in causes):
        return _failed(
            f"Nothing listens at {where}.", "refused", "Is the server running, and is the port right?", retryable=True
        )
    if any(isinstance(each, (EOFError, ConnectionError)) for each in causes):
        return _failed(
            f"The connection to {where} broke before an answer came: {_innermost(causes)}.",
            "broken",
            "Was the server stopped?",
            retryable=True,
        )
    return _failed(
        f"{where} cannot be reached: {_innermost(causes)}.",
        "unreachable",
        "Check `host` and the network.",
        retryable=True,
    )


def tunnel_failed(answer: Framing, server: Server) -> ConnectionFailed:
    """The error for a proxy that makes no connection to the server."""
    hint = "Put user and password into its address." if answer.status == PROXY_SIGN_IN else "Check its log."
    what = f"refuses: status {answer.status}" if answer.head else f"broke off: {answer.words()}"
    return _failed(
        f"The proxy on the way to {place(server.origin)} {what}. It is {server.proxy}.",
        "proxy",
        f"{hint} NO_PROXY names hosts that need none.",
        retryable=answer.status >= SERVER_FAULT,
    )


def _failed(message: str, cause: str, hint: str, *, retryable: bool = False) -> ConnectionFailed:
    return ConnectionFailed(message, hint=hint, retryable=retryable, details={"cause": cause})


def _tls_error(causes: list[BaseException]) -> Any:
    ssl = sys.modules.get("ssl")  # Where it was never imported, no such error can be.
    return next((each for each in causes if isinstance(each, ssl.SSLError)), None) if ssl else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _innermost(causes: list[BaseException]) -> str:
    texts = [str(each) for each in causes if str(each)]
    return texts[-1].rstrip(".") if texts else type(causes[0]).__name__
