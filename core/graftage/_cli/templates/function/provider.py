"""The provider NAME for Graftage: replies with a Python function."""

from collections.abc import Iterator, Sequence
from typing import cast

from graftage.calls import ChatRequest, ModelsRequest
from graftage.exceptions import ModelNotFound
from graftage.hookspecs import ConnectRequest, hookimpl
from graftage.settings import Settings
from graftage.types import Capabilities, Chunk, Message, ModelInfo

graftage_contract = 1
MODELS = ("small", "large")


def reply(messages: Sequence[Message], times: int) -> Iterator[str]:
    """Yield the reply to a conversation, piece by piece: put your model here."""
    for _ in range(times):
        yield f"{messages[-1].content} "


class OwnSettings(Settings):
    """The settings that every provider has, and one more."""

    times: int = 1


class Connection:
    """What a client talks to."""

    default_model = MODELS[0]

    def __init__(self, settings: OwnSettings) -> None:
        self._times = settings.times

    @hookimpl
    def chat(self, request: ChatRequest) -> Iterator[Chunk]:
        """Yield the reply, and at the end why it ended."""
        if request.model not in MODELS:
            raise ModelNotFound(f"There is no model `{request.model}`.", suggestions=MODELS, hint="Take `small`.")
        for text in reply(request.messages, self._times):
            yield Chunk(text=text)
        yield Chunk(finish_reason="stop")

    @hookimpl
    def capabilities(self) -> Capabilities:
        """Return what it can do besides its hooks: nothing, so the core warns of `max_tokens` and the like."""
        return Capabilities(features=frozenset(), parameters=frozenset())

    @hookimpl
    def list_models(self, request: ModelsRequest) -> tuple[ModelInfo, ...]:
        """Return the models."""
        return tuple(ModelInfo(name=name) for name in MODELS)


@hookimpl
def settings_model() -> type[Settings]:
    """Return the class of the settings."""
    return OwnSettings


@hookimpl
def connect(request: ConnectRequest) -> Connection:
    """Return a connection for one client."""
    return Connection(cast("OwnSettings", request.settings))
