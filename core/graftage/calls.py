"""What hooks receive: calls, requests, queries, events. Each grows by fields with defaults, never by parameters."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeVar

from graftage._records import dataclass
from graftage.exceptions import ConnectionFailed, GraftageError, ProviderTimeout
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
    "PullAdapterRequest",
    "RerankRequest",
    "ResolveRequest",
    "UnloadAdapterRequest",
    "Waiting",
]

T = TypeVar("T")


# --- A call ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Budget:
    """The retries that a connection has left, so that a failing server does not receive even more requests.

    It is a token bucket, as in the standard mode of the AWS SDKs: a retry takes `cost` tokens, and a call that succeeds
    at the first attempt adds `refill`.
    """

    capacity: float = 100.0
    cost: float = 5.0
    refill: float = 1.0
    _tokens: float = field(default=100.0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        self._tokens = self.capacity

    def spend(self) -> bool:
        """Take the tokens of one retry; return False if there are too few."""
        with self._lock:
            if self._tokens < self.cost:
                return False
            self._tokens -= self.cost
            return True

    def earn(self) -> None:
        """Add tokens after a call that succeeded at the first attempt."""
        if self._tokens < self.capacity:
            with self._lock:
                self._tokens = min(self.capacity, self._tokens + self.refill)


class Waiting(Protocol):
    """How a client waits: it blocks or it awaits. A provider uses it through its `Call`, and needs no asyncio."""

    async def sleep(self, seconds: float) -> None:
        """Wait for some seconds."""
        ...

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run code that blocks; an async client uses a thread."""
        ...

    async def finish(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Close what hooks have opened, in the event loop in which they opened it."""
        ...

    async def wait(self, future: Future[Any], deadline: float) -> None:
        """Wait until a future is done, with a result or an error.

        Raises:
            TimeoutError: the deadline, in seconds on the monotonic clock, passed first.
        """
        ...


class Blocking:
    """A `Waiting` that blocks the thread: its coroutines never suspend."""

    async def sleep(self, seconds: float) -> None:
        """Block for some seconds."""
        time.sleep(seconds)  # noqa: ASYNC251 - blocking is the purpose

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run code that blocks."""
        return function(*arguments)

    async def finish(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Close what hooks have opened."""
        await work()

    async def wait(self, future: Future[Any], deadline: float) -> None:
        """Block until a future is done, with a result or an error.

        Raises:
            TimeoutError: the deadline passed first.
        """
        future.exception(None if deadline == math.inf else max(deadline - time.monotonic(), 0))


class Owned(Protocol):
    """Something that a call has opened."""

    async def close(self) -> None:
        """Close it. A second call does nothing."""
        ...


def _ignore_event(_kind: str, **_facts: object) -> None:
    """Ignore an event: the call has no observers."""


MAX_OBJECTS: Final = 100_000
"""The most objects and lists in one line or one JSON response, and tool calls and log-probabilities in one reply. Each
takes many times more memory than bytes on the network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The part of every request that describes the call itself."""

    operation: Operation = ""
    """The name of the hook."""
    model: str | None = None
    deadline: float = math.inf
    """The time on the monotonic clock, in seconds, at which the call fails. Infinite for a pull."""
    timeouts: Timeouts = field(default_factory=Timeouts)
    attempts: int = 3
    """How often a request may be sent, including the first time, if a retry is safe."""
    budget: Budget | None = None
    """The retries that this connection has left."""
    max_reply_bytes: int = 64 * 1024 * 1024
    whole: bool = False
    """The caller receives only the whole reply, so chunks that arrive together may be merged."""
    emit: Callable[..., None] = field(default=_ignore_event, repr=False)
    """Notify observers: `emit("retry", attempt=1, delay=0.1, error=error)`. The core adds the rest of the `Event`."""
    waiting: Waiting = field(default_factory=Blocking, repr=False)
    """How the client waits."""
    opened: dict[int, Owned] = field(default_factory=dict, repr=False)
    """What the toolkit has opened for the call. The core closes it at the end, even if the hook failed."""

    async def release(self) -> None:
        """Close what the call has left open."""
        if self.opened:
            await self.waiting.finish(self._close_opened)

    async def _close_opened(self) -> None:
        while self.opened:
            await self.opened.popitem()[1].close()

    def timed_out(self, phase: Phase = "total") -> ProviderTimeout:
        """Return the error for a time limit that has passed."""
        what = {
            "connect": "The server could not be reached within",
            "first_token": "The server sent no first token within",
            "idle": "The stream sent nothing for",
            "total": "The call did not finish within",
        }[phase]
        setting = "timeout" if phase == "total" else f"timeouts.{phase}"
        seconds = float(getattr(self.timeouts, phase))
        hint = f"Raise `{setting}`, or request less at a time."
        return ProviderTimeout(f"{what} {seconds:g} s.", phase=phase, hint=hint)

    async def sleep(self, seconds: float) -> None:
        """Wait in the client's way."""
        await self.waiting.sleep(seconds)

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run code that blocks in the client's way: an async client uses a thread."""
        return await self.waiting.run(function, *arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened, for observers and logs. It never holds a prompt or a reply."""

    kind: Literal[
        "start",
        "admitted",
        "attempt",
        "retry",
        "prompt_progress",
        "first_chunk",
        "progress",
        "finish",
        "error",
        "tool",
    ]
    """Each call has one `start` and one `finish` or `error`; the others are between them, except `tool`: `run_tools`
    has run a tool after the call that asked for it."""
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
    tool: str | None = None
    """With `tool`: the tool's name."""
    seconds: float | None = None
    """With `tool`: how long it ran; `error` is set if it failed."""
    prompt: PromptProgress | None = None
    """With `prompt_progress`: how much of the prompt has been read."""


# --- Requests: the one argument of each hook -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseRequest:
    """The argument of `close`."""

    call: Call = field(default_factory=Call)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """The argument of `chat` and of `count_tokens`."""

    call: Call
    model: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: str | None = None
    """`required`, or the name of the tool that the model must call; None leaves it to the model. Only for a provider
    with the feature `tool_choice`."""
    format: Mapping[str, Any] | Literal["json"] | None = None
    """A JSON schema; `json` allows any JSON."""
    think: bool | str | None = None
    """Whether to think first, or how hard: `low`, `medium`, `high`, or another level that the server knows."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The core has checked their names against `Capabilities.options`, and the types and ranges of those it knows."""
    keep_alive: float | None = None
    context_window: int | None = None
    max_tokens: int | None = None
    adapter: LoadedAdapter | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """The argument of `generate`."""

    call: Call
    model: str
    prompt: str
    suffix: str | None = None
    """The text after the gap that the model fills."""
    system: str | None = None
    raw: bool = False
    """Send the prompt unchanged, without the model's template."""
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
    """The argument of `embed`."""

    call: Call
    model: str
    inputs: tuple[str, ...]
    dimensions: int | None = None
    truncate: bool = True
    """Cut an input that does not fit; if False, raise `ContextOverflow`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    keep_alive: float | None = None
    context_window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankRequest:
    """The argument of `rerank`."""

    call: Call
    model: str
    query: str
    documents: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    keep_alive: float | None = None
    context_window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthRequest:
    """The argument of `health`."""

    call: Call
    level: HealthLevel = "api"
    model: str | None = None
    context_window: int | None = None
    """For the level `answers`, as for a chat: the check must not load the model with another window."""
    keep_alive: float | None = None

    def wants(self, level: HealthLevel) -> bool:
        """Return whether the check includes this level."""
        return HEALTH_LEVELS.index(self.level) >= HEALTH_LEVELS.index(level)

    def result(self, found: Mapping[str, Any], error: Exception | None = None) -> Health:
        """Return the `Health` for what was found at each level. After an error, the first level without a value failed.

        `found` may omit `reachable`: any error except a failed connection shows that the server is.
        """
        levels = dict(found)
        if error is not None:
            reached = not isinstance(error, ConnectionFailed) and getattr(error, "phase", None) != "connect"
            missing = (level for level in HEALTH_LEVELS if self.wants(level) and level not in levels)
            if levels.setdefault("reachable", reached) and (failed := next(missing, None)) is not None:
                levels[failed] = False
        return Health(level=self.level, model=self.model, error=error, **{"reachable": False, **levels})

    async def check(self, levels: Callable[[dict[str, Any]], Awaitable[None]], **found: Any) -> Health:
        """Return the `Health` for what a function finds. It adds each level that it has checked; an error ends it."""
        try:
            await levels(found)
        except GraftageError as error:
            return self.result(found, error)
        return self.result(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelsRequest:
    """The argument of `list_models` and of `loaded_models`."""

    call: Call


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeRequest:
    """The argument of `native`."""

    call: Call


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest:
    """The argument of `show_model`, `pull_model`, `unload_model` and `delete_model`."""

    call: Call
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadModelRequest:
    """The argument of `load_model`."""

    call: Call
    model: str
    keep_alive: float | None = None
    context_window: int | None = None
    """The window of the next requests: another one would load the model again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadAdapterRequest:
    """The argument of `load_adapter`."""

    call: Call
    adapter: Adapter
    model: str
    """The base model."""
    force: bool = False
    """The caller wants it loaded even if it may not fit."""
    keep_alive: float | None = None
    context_window: int | None = None
    others: Callable[[], Sequence[Adapter]] = field(default=tuple, repr=False)
    """Return the other known adapters that fit the model, those used last first, for a server that can only load
    adapters when it starts. The first call reads and checks each one: use `request.call.run(request.others)`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadAdapterRequest:
    """The argument of `unload_adapter`."""

    call: Call
    adapter: LoadedAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneAdaptersRequest:
    """The argument of `prune_adapters`."""

    call: Call
    keep: tuple[str, ...] = ()
    """Names of models to keep."""
    older_than: float | None = None
    """Keep models that were made less than this many seconds ago."""
    dry_run: bool = True
    """Delete nothing: only return the models that would be deleted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolveRequest:
    """The argument of `resolve_adapter`."""

    reference: str
    model: str
    """The base model's name on the provider."""
    provider: str = ""
    base: Callable[[], ModelInfo | None] = field(default=lambda: None, repr=False)
    """Return facts about the base model; only the first call sends a request."""
    show: Callable[[str], ModelInfo | None] = field(default=lambda _name: None, repr=False)
    """Return facts about any model of the server; `None` if there is no such model or the facts are unknown."""
    settings: PluginSettings | None = None
    """An instance of the class from the plugin's `settings_model`; `None` without that hook."""
    call: Call = field(default_factory=Call)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListAdaptersRequest:
    """The argument of `list_adapters`."""

    model: str | None = None
    """The model that each adapter is judged against; `None` to list them without a verdict."""
    base: Callable[[], ModelInfo | None] = field(default=lambda: None, repr=False)
    """Return facts about that model."""
    settings: PluginSettings | None = None
    """As for `resolve_adapter`."""
    call: Call = field(default_factory=Call)


@dataclass(frozen=True, slots=True, kw_only=True)
class PullAdapterRequest:
    """The argument of `pull_adapter`."""

    reference: str
    """The adapter to download, such as `hf://owner/name@revision`."""
    name: str | None = None
    """The name to bind it to; `None` for the last part of the reference."""
    overwrite: bool = False
    """Whether the name may be bound to something else already."""
    settings: PluginSettings | None = None
    """As for `resolve_adapter`."""
    call: Call = field(default_factory=Call)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsQuery:
    """The argument of `resource_limits`: what a policy may know about a request before it is admitted."""

    operation: Operation
    provider: str
    """The provider's plugin name, also for a named instance."""
    address: str
    model: str
    context_window: int | None = None
    """The caller's value."""
    max_tokens: int | None = None
    keep_alive: float | None = None
    prompt_characters: int | None = None
    adapter: str | None = None
    force: bool = False
    """The caller ignores limits: a refusal or a lowered value becomes a warning on the reply."""
    parameters: frozenset[str] | None = None
    """Which of the fields above the provider reads, as in `Capabilities`; None if it does not say. A server whose
    provider does not read `keep_alive` decides itself how long a model stays."""
    model_info: Callable[[], ModelInfo | None] = field(default=lambda: None, repr=False)
    """Return facts about the model, looked up once per connection; `None` if unknown."""
    loaded_models: Callable[[], tuple[LoadedModel, ...] | None] = field(default=lambda: None, repr=False)
    """Return the models in memory, looked up once per request; `None` if unknown."""
    models: Callable[[], tuple[ModelInfo, ...] | None] = field(default=lambda: None, repr=False)
    """Return the models that could reply instead, looked up once per request; `None` if unknown."""
    in_use: Callable[[], Mapping[str, int]] = field(default=dict, repr=False)
    """Return the models that admitted requests of this process use or wait for, with the number of requests."""
    settings: PluginSettings | None = None
    """An instance of the class from the plugin's `settings_model`; `None` without that hook."""
