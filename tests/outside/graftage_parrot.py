"""A provider for Graftage that repeats what it is told, as often as its settings say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from graftage.calls import ChatRequest, HealthRequest, ModelsRequest
from graftage.exceptions import ModelNotFound
from graftage.hookspecs import ConnectRequest, hookimpl
from graftage.settings import Settings
from graftage.types import Chunk, Health, ModelInfo

MODELS = ("green", "grey")


class ParrotSettings(Settings):
    """The common settings, and one more."""

    times: int = 1


class Perch:
    """Where the parrot sits."""

    address = "the perch"
    default_model = "green"

    def __init__(self, settings: ParrotSettings) -> None:
        self._times = settings.times

    @hookimpl
    def chat(self, request: ChatRequest) -> Iterator[Chunk]:
        """Repeat the last message."""
        if request.model not in MODELS:
            raise ModelNotFound(f"There is no {request.model} parrot.", suggestions=MODELS, hint="Take a green one.")
        for _ in range(self._times):
            yield Chunk(text=f"{request.messages[-1].content} ")
        yield Chunk(finish_reason="stop")

    @hookimpl
    def health(self, request: HealthRequest) -> Health:
        """Parrots are always well."""
        return Health(level=request.level, reachable=True, api=True, model_present=request.model in MODELS)

    @hookimpl
    def list_models(self, request: ModelsRequest) -> tuple[ModelInfo, ...]:
        """Both parrots."""
        return tuple(ModelInfo(name=name) for name in MODELS)


@hookimpl
def settings_model() -> type[Settings]:
    """Its own settings."""
    return ParrotSettings


@hookimpl
def connect(request: ConnectRequest) -> Perch:
    """Sit down."""
    return Perch(cast("ParrotSettings", request.settings))
