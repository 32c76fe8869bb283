"""The Ollama provider for Graftage: the reference plugin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from pydantic import ByteSize, Field, SecretStr

from graftage.hookspecs import hookimpl
from graftage.settings import Settings

if TYPE_CHECKING:
    from graftage.types import ConnectRequest

__all__ = ["OllamaSettings", "connect", "settings_model"]


class OllamaSettings(Settings):
    """The common settings, also from the variables that Ollama's own tools read."""

    native_environment: ClassVar[Mapping[str, str]] = {"host": "OLLAMA_HOST", "api_key": "OLLAMA_API_KEY"}

    host: str | None = Field(default=None, description="Address of the server; 127.0.0.1:11434 where none is given")
    api_key: SecretStr | None = Field(default=None, description="Sent as a bearer token over https or to loopback only")
    merge_adapters: bool | ByteSize = Field(
        default=False,
        description="Whether an adapter may be merged into a copy of its base where the server takes none: true, or "
        "the largest base to do it with (`2GB`). It costs minutes, and as much disk as the base",
    )
    adapter_base_file: Path | None = Field(
        default=None, description="The base model's GGUF file for merging, where the server's own cannot be read"
    )


@hookimpl
def settings_model() -> type[Settings]:
    """The settings of this provider."""
    return OllamaSettings


@hookimpl
def connect(request: ConnectRequest) -> object:
    """A connection; the `ollama` package and httpx are imported only now."""
    from graftage_ollama._connection import OllamaConnection  # noqa: PLC0415 - listing providers must stay cheap

    return OllamaConnection(request.name, cast("OllamaSettings", request.settings))
