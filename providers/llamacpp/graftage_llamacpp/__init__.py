"""The embedded provider for Graftage: llama.cpp in a child process of the host, with no server to install."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from graftage.hookspecs import hookimpl
from graftage_llamacpp._process import DEFAULT_MODEL, LlamaCppSettings

if TYPE_CHECKING:
    from graftage.hookspecs import AnswersRequest, ConnectRequest
    from graftage.settings import Settings

__all__ = ["DEFAULT_MODEL", "LlamaCppSettings", "answers", "connect", "settings_model"]


@hookimpl
def settings_model() -> type[Settings]:
    """Return the settings of this provider."""
    return LlamaCppSettings


@hookimpl
def answers(request: AnswersRequest) -> int | None:
    """Rank after a running server, and never if a host is named: the engine has none."""
    return 10 if request.settings.host is None else None


@hookimpl
def connect(request: ConnectRequest) -> object:
    """Connect. Imports of the connection happen only here; the engine runs in another process."""
    from graftage_llamacpp._connection import LlamaCppConnection

    return LlamaCppConnection(request, cast("LlamaCppSettings", request.settings))
