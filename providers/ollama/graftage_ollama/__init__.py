"""The Ollama provider for Graftage: the reference plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from graftage.hookspecs import hookimpl
from graftage_ollama._settings import OllamaSettings, parse_host

if TYPE_CHECKING:
    from graftage.hookspecs import AnswersRequest, ConnectRequest
    from graftage.settings import Settings

__all__ = ["OllamaSettings", "answers", "connect", "local_addresses", "settings_model"]


@hookimpl
def settings_model() -> type[Settings]:
    """Return the settings of this provider."""
    return OllamaSettings


@hookimpl
def answers(request: AnswersRequest) -> int | None:
    """Rank before the embedded engine, if the server is on this machine or the user named one."""
    from graftage.http.address import is_local

    here = is_local(parse_host(request.settings.host))
    return 20 if here or "host" in request.given else None


@hookimpl
def local_addresses() -> tuple[str, ...]:
    """Return the address that a server has by default."""
    return (parse_host(None),)


@hookimpl
def connect(request: ConnectRequest) -> object:
    """Connect. The modules of the connection are imported only here, the `ollama` package not at all."""
    from graftage_ollama._connection import OllamaConnection

    return OllamaConnection(request, cast("OllamaSettings", request.settings))
