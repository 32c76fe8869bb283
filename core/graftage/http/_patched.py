"""Requests through `http.client`, while somebody has put a class of their own there: vcrpy does within a cassette.

A cassette takes a body as a whole, so what is seen here are neither the pieces nor the times of the network.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from graftage.http._framing import head_of, size_of, target_of
from graftage.http._network import failed_before_answer, not_http, tls_context

if TYPE_CHECKING:
    from graftage.http._server import Server
    from graftage.http.clock import Clock
    from graftage.http.transport import Request

__all__ = ["exchange", "is_patched"]


def is_patched(server: Server) -> bool:
    """Whether `http.client` makes connections of somebody else's class. Looked at for each request."""
    client = sys.modules.get("http.client")
    return client is not None and client.HTTPConnection.__module__ != "http.client" and server.path is None


def exchange(request: Request, server: Server, clock: Clock) -> Exchanged:
    """Send a request and read all of its answer, by blocking."""
    import http.client

    (host, port), left = server.first, clock.left()
    connection: Any = (
        http.client.HTTPSConnection(host, port, timeout=left, context=tls_context())
        if server.tls or server.tunnel
        else http.client.HTTPConnection(host, port, timeout=left)
    )
    if server.tunnel:
        connection.set_tunnel(server.netloc, headers=dict(server.headers))
    head_of(request, server, size_of(request))  # Refuses headers that must not be sent.
    headers = dict((*(server.headers if server.absolute else ()), *request.headers))
    body = request.file.read_bytes() if request.file is not None else request.body
    clock.sent()
    try:
        connection.request(request.method, target_of(request, server), body=body or None, headers=headers)
        return Exchanged(connection.getresponse())
    except OSError as error:
        raise failed_before_answer(error, clock, request.url) from error
    except http.client.IncompleteRead as error:
        raise failed_before_answer(EOFError(str(error)), clock, request.url) from error
    except http.client.HTTPException as error:
        raise not_http(request.url, type(error).__name__) from error
    finally:
        connection.close()


class Exchanged:
    """An answer that is here as a whole."""

    def __init__(self, response: Any) -> None:
        self.status, self.reason = response.status, response.reason or ""
        self.headers = tuple((name.lower(), value) for name, value in response.getheaders())
        self._body: bytes = response.read()

    async def read(self) -> bytes:
        """The body, at once."""
        body, self._body = self._body, b""
        return body

    async def close(self) -> None:
        """Nothing is held."""
