"""The provider for servers that speak OpenAI's chat API: OpenAI, MLX, llama-server, LM Studio, vLLM and others."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from graftage.hookspecs import hookimpl
from graftage_openai._profiles import OpenAISettings, parse_host

if TYPE_CHECKING:
    from graftage.hookspecs import AnswersRequest, ConnectRequest
    from graftage.settings import Settings

__all__ = ["OpenAISettings", "answers", "connect", "local_addresses", "settings_model"]


@hookimpl
def settings_model() -> type[Settings]:
    """Return the settings of this provider."""
    return OpenAISettings


@hookimpl
def answers(request: AnswersRequest) -> int | None:
    """Rank between Ollama and the embedded engine, if the user named a server."""
    from graftage.http.address import is_local

    host = request.settings.host
    if host is None:
        return None
    root, _ = parse_host(host)
    return 15 if is_local(root) or "host" in request.given else None


@hookimpl
def local_addresses() -> tuple[str, ...]:
    """Return the ports of LM Studio, Jan, vLLM, llama-server, mlx_lm and its neighbours, mlx-omni-server and SGLang."""
    return tuple(f"http://127.0.0.1:{port}/v1" for port in (1234, 1337, 8000, 8080, 8081, 10240, 30000))


@hookimpl
def connect(request: ConnectRequest) -> object:
    """Connect. The modules of the connection are imported only here."""
    from graftage_openai._connection import OpenAIConnection

    return OpenAIConnection(request, cast("OpenAISettings", request.settings))
