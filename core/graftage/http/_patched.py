"""Requests through `http.client` while a tool such as vcrpy has replaced its connection classes.

A cassette holds whole bodies, so pieces and times of the network are lost here.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from graftage.http._framing import head_of, size_of, target_of
from graftage.http._network import early_error, not_http_error, tls_context
from graftage.http.transport import ReadResponse

if TYPE_CHECKING:
    from graftage.http._server import Server
    from graftage.http.clock import Clock
    from graftage.http.transport import Request

__all__ = ["exchange", "is_patched"]


def is_patched(server: Server) -> bool:
    """Whether a tool has replaced the connection class of `http.client`. Checked for each request."""
    client = sys.modules.get("http.client")
    return client is not None and client.HTTPConnection.__module__ != "http.client" and server.path is None


def exchange(request: Request, server: Server, clock: Clock) -> ReadResponse:
    """Send a request and read its whole response, by blocking."""
    import http.client

    (host, port), left = server.first, clock.left()
    connection: Any = (
        http.client.HTTPSConnection(host, port, timeout=left, context=tls_context())
        if server.tls or server.tunnel
        else http.client.HTTPConnection(host, port, timeout=left)
    )
    if server.tunnel:
        connection.set_tunnel(server.netloc, headers=dict(server.headers))
    head_of(request, server, size_of(request))  # Refuses invalid headers.
    headers = dict((*(server.headers if server.absolute else ()), *request.headers))
    body = request.file.read_bytes() if request.file is not None else request.body
    clock.sent()
    try:
        connection.request(request.method, target_of(request, server), body=body or None, headers=headers)
        found = connection.getresponse()
        given = tuple((name.lower(), value) for name, value in found.getheaders())
        return ReadResponse(found.status, found.reason or "", given, found.read())
    except OSError as error:
        raise early_error(error, clock, request.url) from error
    except http.client.IncompleteRead as error:
        raise early_error(EOFError(str(error)), clock, request.url) from error
    except http.client.HTTPException as error:
        raise not_http_error(request.url, type(error).__name__) from error
    finally:
        connection.close()
