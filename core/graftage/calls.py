"""What hooks are given: calls, requests, queries, events. Each grows by fields with defaults, never by parameters."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeVar

from graftage._records import dataclass
from graftage.exceptions import ConnectionFailed, ProviderTimeout
from graftage.types import HEALTH_LEVELS, Health, Timeouts

if TYPE_CHECKING:
    from concurrent.futures import Future

    from graftage.settings import PluginSettings
    from graftage.types import (
        Adapter,
        FinishReason,
        HealthLevel,
        Image,
        LoadedAdapter,
        LoadedModel,
        Message,
        ModelInfo,
        Operation,
        Phase,
        PromptProgress,
        PullProgress,
        Timings,
        Tool,
        Usage,
    )

__all__ = [
    "Budget",
    "Call",
    "ChatRequest",
    "CloseRequest",
    "EmbedRequest",
    "Event",
    "GenerateRequest",
    "HealthRequest",
    "LimitsQuery",
    "ListAdaptersRequest",
    "LoadAdapterRequest",
    "LoadModelRequest",
    "ModelRequest",
    "ModelsRequest",
    "NativeRequest",
    "Owned",
    "PruneAdaptersRequest",
    "RerankRequest",
    "ResolveRequest",
    "UnloadAdapterRequest",
    "Waiting",
]

T = TypeVar("T")


# --- A call ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Budget:
    """Retries that a connection can afford, so that a sick server is not hammered.

    A token bucket as in the AWS SDKs' standard mode: a retry takes `cost`, a call that works at once gives `refill`.
    """

    capacity: float = 100.0
    cost: float = 5.0
    refill: float = 1.0
    _tokens: float = field(default=100.0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        self._tokens = self.capacity

    def spend(self) -> bool:
        """Take the price of one retry; False where it cannot be paid."""
        with self._lock:
            if self._tokens < self.cost:
                return False
            self._tokens -= self.cost
            return True

    def earn(self) -> None:
        """Give back a little after a call that worked at once."""
        if self._tokens < self.capacity:
            with self._lock:
                self._tokens = min(self.capacity, self._tokens + self.refill)


class Waiting(Protocol):
    """How a client waits: by blocking, or by awaiting. A provider uses it through its call, and needs no asyncio."""

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run code that blocks; an async client runs it in a thread."""
        ...

    async def finish(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do what gives back what hooks have opened, where they have opened it."""
        ...

    async def wait(self, future: Future[Any], deadline: float) -> None:
        """Wait until a future is done, whatever came of it.

        Raises:
            TimeoutError: the deadline, in seconds on the monotonic clock, passed first.
        """
        ...


class Blocking:
    """Waits by blocking the thread: its coroutines never suspend."""

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)  # noqa: ASYNC251 - that is its way

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run code that blocks."""
        return function(*arguments)

    async def finish(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Give back what hooks have opened."""
        await work()

    async def wait(self, future: Future[Any], deadline: float) -> None:
        """Wait until a future is done, whatever came of it.

        Raises:
            TimeoutError: the deadline passed first.
        """
        future.exception(None if deadline == math.inf else max(deadline - time.monotonic(), 0))


class Owned(Protocol):
    """What a call has opened."""

    async def close(self) -> None:
        """Give it back. Safe to call twice."""
        ...


def _tell_nobody(_kind: str, **_facts: Any) -> None:
    """The `emit` of a call that nobody observes."""


MAX_OBJECTS: Final = 100_000
"""Objects and lists in one line or one JSON answer, and tool calls and log-probabilities in a whole answer. In memory,
each takes many times the bytes that it is sent in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What every operation's request carries about the call itself."""

    operation: Operation = ""
    """The name of the hook."""
    model: str | None = None
    deadline: float = math.inf
    """Seconds on the monotonic clock: after this the call has failed. Infinite for a pull."""
    timeouts: Timeouts = field(default_factory=Timeouts)
    attempts: int = 3
    """How often a safe failure may be tried, the first time included."""
    budget: Budget | None = None
    """Retries this connection can still afford."""
    max_reply_bytes: int = 64 * 1024 * 1024
    whole: bool = False
    """Nobody sees single chunks: those that come together may be one."""
    emit: Callable[..., None] = field(default=_tell_nobody, repr=False)
    """Tells observers: `emit("retry", attempt=1, delay=0.1, error=error)`; the core adds the rest of the `Event`."""
    waiting: Waiting = field(default_factory=Blocking, repr=False)
    """How its client waits."""
    opened: dict[int, Owned] = field(default_factory=dict, repr=False)
    """What the toolkit has opened for it: closed at its end, however the author's code ended."""

    async def release(self) -> None:
        """Close what is still open."""
        if self.opened:
            await self.waiting.finish(self._close_opened)

    async def _close_opened(self) -> None:
        while self.opened:
            await self.opened.popitem()[1].close()

    def timed_out(self, phase: Phase = "total") -> ProviderTimeout:
        """The error for a limit that has passed."""
        what = {
            "connect": "The server could not be reached within",
            "first_token": "The server gave no first token within",
            "idle": "The stream stood still for",
            "total": "The call was not finished within",
        }[phase]
        knob = "timeout" if phase == "total" else f"timeouts.{phase}"
        seconds = float(getattr(self.timeouts, phase))
        hint = f"Raise `{knob}`, or ask for less at a time."
        return ProviderTimeout(f"{what} {seconds:g} s.", phase=phase, hint=hint)

    async def sleep(self, seconds: float) -> None:
        """Wait, in the way of the client."""
        await self.waiting.sleep(seconds)

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run code that blocks, in the way of the client: an async one runs it in a thread."""
        return await self.waiting.run(function, *arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened, for observers and logs. Never holds a prompt or an answer."""

    kind: Literal[
        "start", "admitted", "attempt", "retry", "prompt_progress", "first_chunk", "progress", "finish", "error"
    ]
    """One `start` and one `finish` or `error` for each call; the rest between them."""
    call_id: str
    operation: Operation
    provider: str
    model: str | None = None
    adapter: str | None = None
    address: str | None = None
    at: float = 0.0
    """Seconds on the monotonic clock."""
    stream: bool = False
    attempt: int | None = None
    delay: float | None = None
    """With `retry`: seconds until the next attempt."""
    error: Exception | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    progress: PullProgress | None = None
    prompt: PromptProgress | None = None
    """With `prompt_progress`: how far the prompt has been read, where the provider tells."""


# --- Requests: the one argument of each hook -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseRequest:
    """What `close` is asked."""

    call: Call = field(default_factory=Call)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """What `chat` is asked, and `count_tokens`."""

    call: Call
    model: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    format: Mapping[str, Any] | Literal["json"] | None = None
    """A JSON schema, or any JSON."""
    think: bool | str | None = None
    """Whether to think first, or how hard: `low`, `medium`, `high`, or any other level: the server is the judge."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Checked by the core against `Capabilities.options`, by name, type and range."""
    keep_alive: float | None = None
    context_window: int | None = None
    max_tokens: int | None = None
    adapter: LoadedAdapter | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """What `generate` is asked."""

    call: Call
    model: str
    prompt: str
    suffix: str | None = None
    """What comes after the gap that the model is to fill."""
    system: str | None = None
    raw: bool = False
    """Send the prompt as it is, without the model's template."""
    images: tuple[Image, ...] = ()
    format: Mapping[str, Any] | Literal["json"] | None = None
    think: bool | str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    keep_alive: float | None = None
    context_window: int | None = None
    max_tokens: int | None = None
    adapter: LoadedAdapter | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest:
    """What `embed` is asked."""

    call: Call
    model: str
    inputs: tuple[str, ...]
    dimensions: int | None = None
    truncate: bool = True
    """Cut an input that does not fit; otherwise it is a `ContextOverflow`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    keep_alive: float | None = None
    context_window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankRequest:
    """What `rerank` is asked."""

    call: Call
    model: str
    query: str
    documents: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    keep_alive: float | None = None
    context_window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthRequest:
    """What `health` is asked."""

    call: Call
    level: HealthLevel = "api"
    model: str | None = None
    context_window: int | None = None
    """For `answers`, as of a chat: the model must not be loaded otherwise than its users want it."""
    keep_alive: float | None = None

    def wants(self, level: HealthLevel) -> bool:
        """Whether the check goes up to this level."""
        return HEALTH_LEVELS.index(self.level) >= HEALTH_LEVELS.index(level)

    def result(self, found: Mapping[str, Any], error: Exception | None = None) -> Health:
        """The answer: what was found of each level. With an error, the first level not reached is where it failed.

        Whether a server is `reachable` need not be found: any error of its own shows that it is.
        """
        levels = dict(found)
        if error is not None:
            reached = not isinstance(error, ConnectionFailed) and getattr(error, "phase", None) != "connect"
            missing = (level for level in HEALTH_LEVELS if self.wants(level) and level not in levels)
            if levels.setdefault("reachable", reached) and (failed := next(missing, None)) is not None:
                levels[failed] = False
        return Health(level=self.level, model=self.model, error=error, **{"reachable": False, **levels})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelsRequest:
    """What `list_models` and `loaded_models` are asked."""

    call: Call


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeRequest:
    """What `native` is asked."""

    call: Call


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest:
    """What `show_model`, `pull_model`, `unload_model` and `delete_model` are asked."""

    call: Call
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadModelRequest:
    """What `load_model` is asked."""

    call: Call
    model: str
    keep_alive: float | None = None
    context_window: int | None = None
    """The window that the next requests will have: another one would load the model again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadAdapterRequest:
    """What `load_adapter` is asked."""

    call: Call
    adapter: Adapter
    model: str
    """The base model."""
    force: bool = False
    """Load it although it may not fit: the caller said so."""
    keep_alive: float | None = None
    context_window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadAdapterRequest:
    """What `unload_adapter` is asked."""

    call: Call
    adapter: LoadedAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneAdaptersRequest:
    """What `prune_adapters` is asked."""

    call: Call
    keep: tuple[str, ...] = ()
    """Names of models to leave alone."""
    older_than: float | None = None
    """Seconds since a model was made; younger ones are left alone."""
    dry_run: bool = True
    """Only say what would go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolveRequest:
    """What `resolve_adapter` is asked."""

    reference: str
    model: str
    """The base model's name on the provider."""
    provider: str = ""
    base: Callable[[], ModelInfo | None] = field(default=lambda: None, repr=False)
    """Facts about the base model: asked on the first call, then remembered."""
    show: Callable[[str], ModelInfo | None] = field(default=lambda _name: None, repr=False)
    """Facts about any model of the server; `None` where it has none of that name or cannot tell."""
    settings: PluginSettings | None = None
    """An instance of what the plugin's `settings_model` returned; `None` where it has no such hook."""
    call: Call = field(default_factory=Call)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListAdaptersRequest:
    """What `list_adapters` is asked."""

    settings: PluginSettings | None = None
    """As for `resolve_adapter`."""
    call: Call = field(default_factory=Call)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsQuery:
    """What a policy may know of a request before it is admitted."""

    operation: Operation
    provider: str
    address: str
    model: str
    context_window: int | None = None
    """As the caller set it."""
    max_tokens: int | None = None
    keep_alive: float | None = None
    prompt_characters: int | None = None
    adapter: str | None = None
    force: bool = False
    """The caller wants it done all the same: a refusal and a clamp become warnings on the reply."""
    model_info: Callable[[], ModelInfo | None] = field(default=lambda: None, repr=False)
    """Facts about the model: asked on the first call, then remembered; `None` where the provider cannot tell."""
    loaded_models: Callable[[], tuple[LoadedModel, ...] | None] = field(default=lambda: None, repr=False)
    """What is in memory: asked once for each request; `None` where the provider cannot tell."""
    models: Callable[[], tuple[ModelInfo, ...] | None] = field(default=lambda: None, repr=False)
    """What could be asked instead: asked once for each request; `None` where the provider cannot tell."""
    in_use: Callable[[], Mapping[str, int]] = field(default=dict, repr=False)
    """Models that admitted requests of this process use or wait for, and how many requests."""
    settings: PluginSettings | None = None
    """An instance of what the plugin's `settings_model` returned; `None` where it has no such hook."""
