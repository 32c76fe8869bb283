"""One connection, and what each of its calls needs: hooks, settings, deadlines, events, counters, secrets."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, get_args

from graftage._engine import inputs
from graftage._engine.arguments import check_model, read_keep_alive, read_timeouts
from graftage._engine.call import Run
from graftage._engine.clients import Clients
from graftage._engine.delivery import Delivery
from graftage._engine.events import Counters, Emitter, new_call_id
from graftage._engine.faults import Author, kind_of
from graftage._engine.health import HealthCache
from graftage._engine.hooks import call_hook
from graftage._engine.plugins import Entry, Relay
from graftage._engine.waiting import IO
from graftage._secrets import SHORTEST_SECRET, hidden
from graftage.calls import (
    Budget,
    Call,
    ModelRequest,
    ModelsRequest,
    Waiting,
)
from graftage.exceptions import (
    CapabilityUnsupported,
    GraftageError,
    ModelNotFound,
    ProviderError,
    RequestRejected,
)
from graftage.settings import Settings
from graftage.types import (
    Capabilities,
    Feature,
    LoadedModel,
    ModelInfo,
    Timeouts,
)

__all__ = ["Connection"]

BRIEF = Timeouts(connect=1.0, first_token=2.0, idle=2.0, total=3.0)
"""Limits of the search for close names, which must not delay the error."""
RECORDS = {"list_models": ModelInfo, "loaded_models": LoadedModel, "prune_adapters": ModelInfo}
"""The kind of each item, for hooks that return several."""
MODEL_DECIDES = frozenset({"tools", "images", "thinking"})
"""Features that only some models of a provider have."""
SOON = 30.0
"""Seconds for facts about models."""


class Connection:
    """A provider's connection and what belongs to it."""

    root: Connection | None = None
    """Of a view: the connection that it shares, which it neither opens nor closes."""

    def __init__(
        self,
        *,
        author: Author,
        plugin: str,
        needs: frozenset[str] = frozenset(),
        model: str | None,
        settings: Settings,
        connection: object,
        plugins: Sequence[Entry],
        io: IO,
        clients: Clients,
        delivery: Delivery,
    ) -> None:
        self.author = author
        self.provider = author.name
        self.plugin = plugin
        """The plugin's name. `provider` is that of the instance, if it is one; all instances of a server share its
        slots and limits."""
        self.needs = needs
        """The features that the model of each call must have."""
        self.model = model or getattr(connection, "default_model", None)
        self.settings = settings
        self.io = io
        self.relay = Relay(author, connection, plugins)
        self._object = connection
        self.waiting: Waiting = io
        """How the hooks of the connection wait."""
        if self.relay.needs_event_loop:
            from graftage._engine.awaiting import BackgroundIO

            self.waiting = BackgroundIO(io)
            clients.colour = "async"
        self.address = str(getattr(connection, "address", ""))
        self.counters = Counters()
        self.delivery = delivery
        self.emitter = Emitter(self.relay.each("observe"), self.counters, delivery, self.hide)
        self.health_cache = HealthCache()
        self._budget = Budget()
        self._clients = clients
        self._infos: dict[str, ModelInfo] = {}
        self._capabilities: Capabilities | None = None
        self._closed = False

    def run(
        self, operation: str, model: str | None, timeouts: Timeouts, *, bounded: bool = True, stream: bool = False
    ) -> Run:
        """Begin a call: its deadline, its events, its counters."""
        self._require_open()
        started = time.monotonic()
        emit = self.emitter.for_call(
            call_id=new_call_id(),
            operation=operation,
            provider=self.provider,
            model=model,
            address=self.address or None,
            stream=stream,
        )
        call = Call(
            operation=operation,
            model=model,
            waiting=self.waiting,
            deadline=started + timeouts.total if bounded else math.inf,
            timeouts=timeouts,
            attempts=self.settings.attempts,
            budget=self._budget,
            max_reply_bytes=self.settings.max_reply_bytes,
            whole=not stream,
            emit=emit,
        )
        emit("start")
        self.counters.add(calls=1, running=1)
        return Run(
            author=self.author,
            model=model or "",
            operation=operation,
            call=call,
            started=started,
            emit=emit,
            release=lambda: self.counters.add(running=-1),
            count=self._count,
            hide=self.hide,
            closed=lambda: (self.root or self).is_closed,
            suggest=lambda error: self._suggest(error, operation, call),
        )

    async def ask(
        self,
        hook: str,
        build: Callable[[Call], Any],
        answers: type | None = None,
        *,
        model: str | None = None,
        timeout: float | Timeouts | None = None,
    ) -> Any:
        """Call a hook that returns once, as one whole call."""
        run = self.run(hook, model, self.timeouts(timeout))
        with run.failing():
            self.require(hook)
            answer = await self.call(hook, build(run.call), run.call, answers)
        run.end()
        run.emit("finish")
        return answer

    async def call(self, hook: str, request: object, call: Call, answers: type | None = None) -> Any:
        """Call a hook, and check the kind of its result."""
        try:
            answer = await call_hook(self.io, self.relay.hooks[hook], request, call)
        except ModelNotFound as error:
            await self._suggest(error, hook, call)
            raise
        finally:
            await call.release()
        self._check(hook, answer, answers)
        return answer

    def _check(self, hook: str, answer: Any, wanted: type | None) -> None:
        """Check that a result has the kind that the contract says.

        Raises:
            ProviderError: it has another kind.
        """
        if wanted is not None and not isinstance(answer, wanted):
            raise self.author.fault(f"answered `{hook}` with {kind_of(answer)} instead of {wanted.__name__}")
        record = RECORDS.get(hook, object)
        for each in answer if hook in RECORDS else ():
            if not isinstance(each, record):
                raise self.author.fault(f"answered `{hook}` with {kind_of(each)} among its {record.__name__}s")

    async def _suggest(self, error: ModelNotFound, hook: str, call: Call) -> None:
        """Add to an error the names that exist and are close to the missing one."""
        wanted = error.model or call.model
        if hook == "list_models" or error.suggestions or not wanted or not self.has("list_models"):
            return
        brief = replace(
            call, deadline=min(call.deadline, time.monotonic() + BRIEF.total), timeouts=BRIEF, attempts=1, opened={}
        )
        with contextlib.suppress(Exception):
            models = await self.call("list_models", ModelsRequest(call=brief), brief, tuple)
            names = [each.name for each in models if each.name and each.name != wanted]
            error.suggestions = inputs.close_names(wanted, names)
        if error.suggestions:
            hint = error.hint if self.has("pull_model") else None  # Otherwise only a listed model helps.
            otherwise = f" If not, {hint[0].lower()}{hint[1:]}" if hint else ""
            error.hint = f"Did you mean `{error.suggestions[0]}`?{otherwise}"

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, or the connection that it shares."""
        return self._closed or (self.root is not None and self.root.is_closed)

    def has(self, hook: str) -> bool:
        """Whether the connection implements a hook."""
        return hook in self.relay.hooks

    def require(self, hook: str) -> None:
        """Refuse an operation that the connection does not implement."""
        if not self.has(hook) and callable(getattr(self._object, hook, None)):
            raise CapabilityUnsupported(
                f"{self.author} has a `{hook}` that is not marked as a hook.",
                hint="Its authors must put `@hookimpl` above it.",
            )
        inputs.require(hook, self.has(hook), self.provider)

    def capabilities(self) -> Capabilities:
        """Return what the provider can do, as it says and as its hooks show."""
        if self._capabilities is None:
            self._capabilities = self.asked_capabilities()
        return self._capabilities

    def asked_capabilities(self) -> Capabilities:
        shown = frozenset(name for name in get_args(Feature) if self.has(name))
        if not self.has("capabilities"):
            return Capabilities(features=shown)
        try:
            answer: Capabilities = self.relay.hooks["capabilities"].plain(None)
            self._check("capabilities", answer, Capabilities)
            return replace(answer, features=shown.union(answer.features))
        except Exception as error:  # noqa: BLE001 - it is typed
            typed = self.author.typed(error)
            raise typed from typed.__cause__

    async def _know(self, model: str, call: Call) -> None:
        """Ask what a model can do, if the provider can say."""
        if model not in self._infos and self.has("show_model"):
            with contextlib.suppress(ProviderError):  # The request itself will say it.
                self._infos[model] = await self.call(
                    "show_model", ModelRequest(call=call, model=model), call, ModelInfo
                )

    def require_features(self, model: str, needs: Collection[str]) -> None:
        """Refuse what the provider cannot do, or this model is known not to do."""
        if not needs:
            return
        able = self.capabilities().features
        info = self._infos.get(model)
        for feature in sorted(needs):
            inputs.require(feature, feature in able, self.provider)
            if info is not None and info.features is not None and feature in MODEL_DECIDES:
                inputs.require(feature, feature in info.features, self.provider, f"{feature}` with `{model}")

    def from_plugin(self, hook: str, request: Any) -> Any:
        """Call a hook from a plugin's blocking code; None if the connection has no such hook."""
        found = self.relay.hooks.get(hook)
        return self.io.from_thread(lambda: call_hook(self.io, found, request, request.call)) if found else None

    def facts(self, model: str, call: Call) -> ModelInfo | None:
        """Return facts about a model to a plugin's blocking code. They are remembered."""
        if model not in self._infos:
            try:
                info = self.from_plugin("show_model", ModelRequest(call=call, model=model))
            except ModelNotFound:
                return None  # The request itself will say it, with suggestions.
            if info is None:
                return None
            self._infos[model] = info
        return self._infos[model]

    def forget_facts(self, model: str) -> None:
        """Forget what is known of a model that was pulled, deleted or replaced."""
        self._infos.pop(model, None)

    def timeouts(self, given: float | Timeouts | None) -> Timeouts:
        """Return the limits of a call; a number means the total."""
        return read_timeouts(given, self.settings.timeouts)

    def _soon(self, given: float | Timeouts | None) -> float | Timeouts:
        """Return shorter limits, for calls that do not make a model work."""
        if given is not None:
            return given
        own = self.settings.timeouts
        return replace(own, first_token=min(own.first_token, SOON), total=min(own.total, SOON))

    def keep_alive(self, given: float | str | None) -> float | None:
        """Return the seconds for which a model stays loaded: the call's, or the settings'."""
        return read_keep_alive(given) if given is not None else self.settings.keep_alive

    def choose_model(self, model: str | None) -> str:
        """Return the model of a call, or the client's."""
        chosen = self.model if model is None else model
        if not chosen and model is None:
            hint = "Give `model=` to the call or to `connect`, or set GRAFTAGE_MODEL. `graftage models list` shows "
            hint += "what there is, and `graftage models pull NAME` gets one."
            raise RequestRejected("No model is chosen.", provider=self.provider, hint=hint)
        check_model(chosen)
        return str(chosen)

    def hide(self, error: GraftageError) -> None:
        """Remove secrets from an error: a server may repeat the headers it got."""
        settings = self.settings
        secrets = [each.get_secret_value() for each in (settings.api_key, *settings.headers.values()) if each]
        for secret in (each for each in secrets if len(each) >= SHORTEST_SECRET):
            error.args = tuple(hidden(each, secret) for each in error.args)
            for name, value in vars(error).items():
                setattr(error, name, hidden(value, secret))

    def _count(self, **changes: int) -> None:
        if "failures" in changes:
            self.health_cache.drop()
        self.counters.add(**changes)

    def _require_open(self) -> None:
        if self.is_closed:
            raise RuntimeError("the client is closed")
