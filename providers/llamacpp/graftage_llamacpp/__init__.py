"""The embedded provider for Graftage: llama.cpp in a child process of the host, with no server to install."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from pydantic import Field

from graftage.hookspecs import hookimpl
from graftage.settings import Settings

if TYPE_CHECKING:
    from graftage.types import ConnectRequest

__all__ = ["DEFAULT_MODEL", "LlamaCppSettings", "connect", "settings_model"]

DEFAULT_MODEL: Final = "smollm2:135m"
"""What to ask where the host names no model: small, free, and downloaded from the package index on its first use."""


class LlamaCppSettings(Settings):
    """The common settings, of which `host`, `api_key` and `headers` have no use here, and those of the engine."""

    models_path: Path | None = Field(
        default=None, description="Folder of the models; graftage/models in the user's data folder where none is given"
    )
    threads: int | None = Field(
        default=None, ge=1, description="Threads of the engine; one less than the processor has cores by default"
    )
    slots: int = Field(default=1, ge=1, le=64, description="Requests answered at once; each slot has its own window")
    batch: int = Field(
        default=512, ge=32, le=8192, description="Tokens read at once, and of the longest text that `embed` takes"
    )
    gpu_layers: int | None = Field(
        default=None, ge=0, description="Layers on the graphics processor, where the engine has one; all by default"
    )
    memory_check: bool = Field(default=True, description="Refuse a model that the free memory cannot hold")


@hookimpl
def settings_model() -> type[Settings]:
    """The settings of this provider."""
    return LlamaCppSettings


@hookimpl
def connect(request: ConnectRequest) -> object:
    """A connection; httpx and the rest are imported only now, and the engine not at all: it has its own process."""
    from graftage_llamacpp._connection import LlamaCppConnection  # noqa: PLC0415 - listing providers must stay cheap

    settings = request.settings
    if not isinstance(settings, LlamaCppSettings):
        settings = LlamaCppSettings(**{name: getattr(settings, name) for name in settings.model_fields_set})
    return LlamaCppConnection(request.name, settings)
