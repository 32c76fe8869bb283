"""One connection at work: what `Client` and `AsyncClient` share, written once against `graftage._io.IO`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Literal, TypeVar

from graftage import _limits, _messages
from graftage._adapters import Adapters
from graftage._arguments import EmbedArguments, Wants, check_names
from graftage._events import Counters, Emitter, new_call_id
from graftage._health import Flight, HealthCache
from graftage._io import IO, has
from graftage._limits import Gate
from graftage._plugins import Entry, Relay
from graftage._stream import Run, typed_error
from graftage._values import keep_alive_seconds
from graftage.exceptions import (
    GraftageError,
    ModelNotFound,
    PluginError,
    ProviderTimeout,
    RequestRejected,
    ResourceLimitExceeded,
    StreamInterrupted,
)
from graftage.retry import Budget
from graftage.settings import Settings
from graftage.types import (
    AdapterInfo,
    Call,
    Capabilities,
    CloseRequest,
    Embeddings,
    EmbedRequest,
    Health,
    HealthLevel,
    HealthRequest,
    Limits,
    LimitsQuery,
    LoadedAdapter,
    LoadedModel,
    LoadModelRequest,
    ModelInfo,
    ModelRequest,
    ModelsRequest,
    PullProgress,
    Stats,
    Timeouts,
)

__all__ = ["Session"]

T = TypeVar("T")
HEALTH_TIMEOUTS = Timeouts(connect=5.0, first_token=10.0, idle=10.0, total=10.0)
"""A check that does not make the model work answers soon or not at all."""


class Session:
    """A provider's connection with everything that is bound to it: relay, slots, caches, adapters, counters."""

    def __init__(
        self,
        *,
        provider: str,
        model: str | None,
        settings: Settings,
        connection: object,
        plugins: Sequence[Entry],
        io: IO,
        translate: Callable[[GraftageError], Exception] | None,
    ) -> None:
        self.provider = provider
        self.model = model or getattr(connection, "default_model", None)
        self.settings = settings
        self.io = io
        self.relay = Relay(provider, connection, plugins)
        self.address = str(getattr(connection, "address", ""))
        self.counters = Counters()
        self.emitter = Emitter(self.relay.each("observe"), self.counters)
        self.health_cache = HealthCache()
        self.adapters = Adapters(self)
        self._gate = _limits.gate_for(provider, self.address)
        self._budget = Budget()
        self._translate = translate or (lambda error: error)
        self._infos: dict[str, ModelInfo] = {}
        self._closed = False

    def single(self) -> Session:
        """This session; a chain of several has none."""
        return self

    # --- Calls -------------------------------------------------------------------------------------------------------

    def run(self, operation: str, model: str | None, timeouts: Timeouts, *, bounded: bool = True, **facts: Any) -> Run:
        """Begin a call: its deadline, its events, its counters."""
        if self._closed:
            raise RuntimeError("the client is closed")
        started = time.monotonic()
        emit = self.emitter.for_call(
            call_id=new_call_id(),
            operation=operation,
            provider=self.provider,
            model=model,
            address=self.address or None,
            **facts,
        )
        call = Call(
            deadline=started + timeouts.total if bounded else math.inf,
            timeouts=timeouts,
            attempts=self.settings.attempts,
            budget=self._budget,
            max_reply_bytes=self.settings.max_reply_bytes,
            emit=emit,
        )
        self.counters.add(calls=1, running=1)
        emit("start")
        return Run(
            provider=self.provider,
            model=model or "",
            operation=operation,
            call=call,
            started=started,
            emit=emit,
            release=lambda: self.counters.add(running=-1),
            count=self._count,
            translate=self._translate,
        )

    def read(
        self, reader: Callable[[Any, Mapping[str, Any]], Wants], subject: Any, arguments: Mapping[str, Any]
    ) -> Wants:
        """Read the arguments of a call; what is wrong with them is told as any other failure is."""
        try:
            return reader(subject, arguments)
        except GraftageError as error:
            raise self._translated(error) from error.__cause__

    def _translated(self, error: GraftageError) -> Exception:
        translated = self._translate(error)
        if translated is not error:
            translated.__cause__ = error
        return translated

    def _count(self, **changes: int) -> None:
        if "failures" in changes:
            self.health_cache.drop()
        self.counters.add(**changes)

    def timeouts(self, given: float | Timeouts | None) -> Timeouts:
        """The limits of a call; a number means the total."""
        if given is None:
            return self.settings.timeouts
        if isinstance(given, Timeouts):
            return given
        try:
            return replace(self.settings.timeouts, total=given)
        except ValueError as error:
            raise self._translated(RequestRejected(f"The timeout is wrong: {error}.")) from error

    def choose_model(self, model: str | None) -> str:
        """The model of a call, or the client's."""
        if model is not None and not isinstance(model, str):
            raise self._translated(RequestRejected(f"`model` must be a name, not {type(model).__name__}."))
        chosen = model or self.model
        if not chosen:
            hint = "Give `model=` to the call or to `connect`, or set GRAFTAGE_MODEL."
            raise self._translated(RequestRejected("No model is chosen.", provider=self.provider, hint=hint))
        return chosen

    async def ask(
        self,
        hook: str,
        build: Callable[[Call], Any],
        *,
        model: str | None = None,
        timeout: float | Timeouts | None = None,
        around: Callable[[Run], Any] | None = None,
    ) -> Any:
        """Call a hook that answers once, as a call of its own."""
        run = self.run(hook, model, self.timeouts(timeout))
        with run.failing():
            self.require(hook)
            if around is not None:
                await around(run)
            answer = await self.io.call(self.relay, hook, build(run.call), run.call)
        run.end()
        run.emit("finish")
        return answer

    def require(self, hook: str) -> None:
        """Refuse an operation that the connection does not implement."""
        _messages.require(hook, has(self.relay, hook), self.provider)

    # --- Inference ---------------------------------------------------------------------------------------------------

    async def infer(
        self, operation: Literal["chat", "generate"], want: Wants, *, stream: bool, warnings: Sequence[str] = ()
    ) -> tuple[Run, Any]:
        """Start an answer: the run, and its first chunk. `warnings` go onto its reply."""
        model = self.choose_model(want.model)
        run = self.run(operation, model, self.timeouts(want.timeout), stream=stream)
        run.parse = want.parse
        run.warnings = tuple(warnings)
        with run.failing():
            request = await self._inference_request(run, operation, want, model)
            run.begin_fold()
            run.source = await self.io.open(self.relay, operation, request, run.call)
        return run, await run.pull()

    async def _inference_request(self, run: Run, operation: str, want: Wants, model: str) -> Any:
        """Settle everything that a request needs: options, adapter, limits and a slot."""
        self.require(operation)
        options = _messages.read_options(want.options, self.capabilities().options)
        self._require_features(model, want.needs)
        adapter, notes = await self.adapters.for_call(want.adapter, model, run.call)
        run.adapter = adapter.name if adapter else None
        run.warnings = (*run.warnings, *notes, *(adapter.warnings if adapter else ()))
        run.model = adapter.model if adapter else model
        figures = await self._admit(run, operation, want, run.model)
        if want.build is None:  # pragma: no cover - chat and generate always have one
            raise RuntimeError("there is no request to build")
        return want.build(call=run.call, model=run.model, adapter=adapter, options=options, **figures)

    def _require_features(self, model: str, needs: Sequence[str]) -> None:
        """Refuse what the provider cannot do, or what this model is known not to do."""
        able = self.capabilities().features
        info = self._infos.get(model)
        for feature in needs:
            _messages.require(feature, feature in able, self.provider)
            if info is not None and info.features is not None and feature in ("tools", "images", "thinking"):
                _messages.require(feature, feature in info.features, self.provider, f"{feature}` with `{model}")

    async def _admit(self, run: Run, operation: str, want: Wants, model: str) -> dict[str, Any]:
        """Ask the policies, unload what they name, clamp, and take a slot."""
        wanted = {
            "keep_alive": self._keep_alive(want.keep_alive),
            "context_window": want.context_window or self.settings.context_window,
            "max_tokens": want.max_tokens,
        }
        limits = await self._limits(run, operation, model, wanted, want.prompt_characters)
        clamped, warnings = _limits.clamp(wanted, limits)
        run.limits = limits
        run.warnings = (*run.warnings, *warnings)
        for idle in limits.unload if limits and has(self.relay, "unload_model") else ():
            if idle not in self._gate.in_use():
                await self.io.call(self.relay, "unload_model", ModelRequest(call=run.call, model=idle), run.call)
        await self._take_slot(run, limits, model)
        run.emit("admitted")
        return clamped

    def _keep_alive(self, given: float | str | None) -> float | None:
        try:
            return keep_alive_seconds(given) if given is not None else self.settings.keep_alive
        except ValueError as error:
            raise RequestRejected(f"The setting is wrong: {error}.") from error

    async def _limits(
        self, run: Run, operation: str, model: str, wanted: Mapping[str, Any], characters: int | None
    ) -> Limits | None:
        policies = self.relay.each("resource_limits")
        answers: list[tuple[str, Limits]] = []
        if policies:
            query = LimitsQuery(
                operation=operation,
                provider=self.provider,
                address=self.address,
                model=model,
                prompt_characters=characters,
                adapter=run.adapter,
                model_info=self._lazily(lambda: self._show_now(model, run.call)),
                loaded_models=self._lazily(
                    lambda: self.io.from_thread(self.relay, "loaded_models", ModelsRequest(call=run.call))
                ),
                in_use=self._gate.in_use,
                **wanted,
            )
            for name, policy in policies:
                answer = await self._ask_policy(name, policy, query)
                if answer is not None:
                    answers.append((name, answer))
        return _limits.with_concurrency(_limits.merge(answers), self.settings.concurrency)

    async def _ask_policy(self, name: str, policy: Callable[..., Any], query: LimitsQuery) -> Limits | None:
        try:
            answer: Limits | None = await self.io.run(policy, query)
        except ResourceLimitExceeded as refusal:
            refusal.plugin = refusal.plugin or name
            raise
        except Exception as error:
            raise PluginError(
                f"The policy `{name}` failed with {type(error).__name__}: {error}.",
                plugin=name,
                hint="Tell its authors, or disable it with GRAFTAGE_DISABLED_PLUGINS.",
            ) from error
        return answer

    def _lazily(self, ask: Callable[[], T]) -> Callable[[], T]:
        answers: list[T] = []

        def once() -> T:
            if not answers:
                answers.append(ask())
            return answers[0]

        return once

    def _show_now(self, model: str, call: Call) -> ModelInfo | None:
        """Facts about a model, from a plugin's blocking code."""
        if model not in self._infos:
            try:
                info = self.io.from_thread(self.relay, "show_model", ModelRequest(call=call, model=model))
            except ModelNotFound:
                return None  # The request itself will tell, with suggestions.
            if info is None:
                return None
            self._infos[model] = info
        return self._infos[model]

    async def _take_slot(self, run: Run, limits: Limits | None, model: str) -> None:
        gate = self._gate
        granted = gate.enter(limits.concurrent_requests if limits else None, limits.queued_requests if limits else None)
        await self._granted(gate, granted, run.call)
        gate.use(model, 1)
        before = run.release

        def release() -> None:
            gate.use(model, -1)
            gate.leave()
            before()

        run.release = release

    async def _granted(self, gate: Gate, granted: Future[None], call: Call) -> None:
        """Wait for a slot, and give the place up where the waiting ends otherwise."""
        if granted.done():
            return
        self.counters.add(waiting=1)
        try:
            await self.io.wait(granted, call.deadline)
        except TimeoutError as error:
            gate.withdraw(granted)
            raise ProviderTimeout(
                f"No slot became free within {call.timeouts.total:g} s.",
                phase="total",
                hint="Raise `timeout`, or the limit on concurrent requests.",
            ) from error
        except BaseException:
            gate.withdraw(granted)
            raise
        finally:
            self.counters.add(waiting=-1)

    async def embed(self, inputs: str | Sequence[str], arguments: Mapping[str, Any]) -> Embeddings:
        """One vector for each input."""
        check_names("embed", arguments, EmbedArguments)
        model = self.choose_model(arguments.get("model"))
        run = self.run("embed", model, self.timeouts(arguments.get("timeout")))
        with run.failing():
            self.require("embed")
            request = await self._embed_request(run, model, inputs, arguments)
            answer: Embeddings = await self.io.call(self.relay, "embed", request, run.call)
        run.end()
        self.counters.add(input_tokens=answer.usage.input_tokens or 0)
        timings = replace(answer.timings, wall=time.monotonic() - run.started)
        run.emit("finish", usage=answer.usage, timings=timings)
        return replace(
            answer,
            model=answer.model or model,
            provider=self.provider,
            timings=timings,
            limits=run.limits,
            warnings=(*run.warnings, *answer.warnings),
        )

    async def _embed_request(
        self, run: Run, model: str, inputs: str | Sequence[str], arguments: Mapping[str, Any]
    ) -> EmbedRequest:
        texts = (inputs,) if isinstance(inputs, str) else tuple(inputs) if isinstance(inputs, Iterable) else ()
        if not texts or not all(isinstance(text, str) for text in texts):
            raise RequestRejected("`inputs` must be a text, or a sequence of at least one text.")
        want = Wants(
            keep_alive=arguments.get("keep_alive"),
            context_window=arguments.get("context_window"),
            prompt_characters=sum(map(len, texts)),
        )
        options = _messages.read_options(arguments.get("options"), self.capabilities().options)
        figures = await self._admit(run, "embed", want, model)
        figures.pop("max_tokens")
        return EmbedRequest(
            call=run.call,
            model=model,
            inputs=texts,
            dimensions=arguments.get("dimensions"),
            truncate=arguments.get("truncate", True),
            options=options,
            **figures,
        )

    # --- Health ------------------------------------------------------------------------------------------------------

    async def health(
        self, level: HealthLevel, model: str | None, max_age: float | None, timeout: float | Timeouts | None
    ) -> Health:
        """How well the provider is, remembered for a little while; callers at one time share one check."""
        needs_model = level in ("model_present", "model_loaded", "answers")
        chosen = self.choose_model(model) if needs_model else None
        timeouts = self.timeouts(timeout)
        if timeout is None and level != "answers":
            timeouts = HEALTH_TIMEOUTS
        key = (level, chosen)
        flight = self.health_cache.look(key, max_age)
        if isinstance(flight, Health):
            return flight
        if not flight.mine:
            return await self._join(flight.result, timeouts)
        run = self.run("health", chosen, timeouts)
        with run.failing():
            found = await self._checked(HealthRequest(call=run.call, level=level, model=chosen), flight)
        run.end()
        run.emit("finish")
        return found

    async def _checked(self, request: HealthRequest, flight: Flight) -> Health:
        started = time.monotonic()
        try:
            found: Health = await self.io.call(
                self.relay, "health", replace(request, call=replace(request.call, attempts=1)), request.call
            )
        except BaseException as error:
            typed = typed_error(error, self.provider) if isinstance(error, Exception) else None
            # Those who joined get an answer, too; where this caller was cancelled, they are told so.
            flight.land(
                Health(level=request.level, reachable=False, model=request.model, error=typed) if typed else None
            )
            raise
        found = replace(found, address=found.address or self.address, latency=time.monotonic() - started)
        flight.land(found)
        return found

    async def _join(self, result: Future[Health | None], timeouts: Timeouts) -> Health:
        try:
            found = await self.io.wait(result, time.monotonic() + timeouts.total)
        except TimeoutError as error:
            raise ProviderTimeout("The health check was not finished in time.", phase="total") from error
        if found is None:
            raise ProviderTimeout("The health check was given up by the caller that had started it.", phase="total")
        return found

    # --- Models ------------------------------------------------------------------------------------------------------

    async def models(self, timeout: float | Timeouts | None) -> tuple[ModelInfo, ...]:
        """The models that can be asked."""
        found = await self.ask("list_models", lambda call: ModelsRequest(call=call), timeout=timeout)
        return tuple(found)

    async def show(self, model: str | None, timeout: float | Timeouts | None) -> ModelInfo:
        """One model in full."""
        name = self.choose_model(model)
        info: ModelInfo = await self.ask(
            "show_model", lambda call: ModelRequest(call=call, model=name), model=name, timeout=timeout
        )
        self._infos[name] = info
        return info

    async def loaded(self, timeout: float | Timeouts | None) -> tuple[LoadedModel, ...]:
        """What is in memory."""
        return tuple(await self.ask("loaded_models", lambda call: ModelsRequest(call=call), timeout=timeout))

    async def pull(
        self, model: str | None, on_progress: Callable[[PullProgress], None] | None, timeout: float | Timeouts | None
    ) -> PullProgress:
        """Download a model; one pull of a model at a time, in this process."""
        name = self.choose_model(model)
        given = timeout if timeout is not None else self.settings.timeouts
        run = self.run("pull_model", name, self.timeouts(given), bounded=timeout is not None)
        with run.failing():
            self.require("pull_model")
            gate = _limits.gate_for(f"pull {self.provider}", f"{self.address} {name}")
            await self._granted(gate, gate.enter(1), run.call)
            run.release = _both(gate.leave, run.release)
            try:
                last = await self._pull(run, name, on_progress)
            finally:
                await run.abandon()
        run.emit("finish")
        self._infos.pop(name, None)
        self.health_cache.drop()
        return last

    async def _pull(self, run: Run, model: str, on_progress: Callable[[PullProgress], None] | None) -> PullProgress:
        request = ModelRequest(call=run.call, model=model)
        last: PullProgress | None = None
        run.source = await self.io.open(self.relay, "pull_model", request, run.call)
        while (step := await run.source.pull()) is not None:
            last = step
            run.emit("progress", progress=step)
            if on_progress is not None:
                on_progress(step)
        if last is None or last.status != "success":
            raise StreamInterrupted("The download ended before it was complete.", hint="Pull again: it goes on.")
        return last

    async def ensure(
        self,
        model: str | None,
        policy: Literal["never", "missing", "always"],
        on_progress: Callable[[PullProgress], None] | None,
        timeout: float | Timeouts | None,
    ) -> ModelInfo:
        """Make sure that a model is there."""
        if policy not in ("never", "missing", "always"):
            raise RequestRejected(f"There is no policy {policy!r}.", hint="Use never, missing or always.")
        if policy == "always":
            await self.pull(model, on_progress, timeout)
        try:
            return await self.show(model, None)
        except Exception as error:
            if policy != "missing" or not _is_missing(error):
                raise
        await self.pull(model, on_progress, timeout)
        return await self.show(model, None)

    async def load(
        self,
        model: str | None,
        keep_alive: float | str | None,
        context_window: int | None,
        timeout: float | Timeouts | None,
    ) -> None:
        """Bring a model into memory, with the window that the next calls will have."""
        name = self.choose_model(model)
        want = Wants(keep_alive=keep_alive, context_window=context_window)
        figures: dict[str, Any] = {}

        async def admit(run: Run) -> None:
            figures.update(await self._admit(run, "load_model", want, name))
            figures.pop("max_tokens")

        await self.ask(
            "load_model",
            lambda call: LoadModelRequest(call=call, model=name, **figures),
            model=name,
            timeout=timeout,
            around=admit,
        )

    async def unload(self, model: str | None, timeout: float | Timeouts | None) -> None:
        """Put a model out of memory."""
        name = self.choose_model(model)
        await self.ask("unload_model", lambda call: ModelRequest(call=call, model=name), model=name, timeout=timeout)

    def capabilities(self) -> Capabilities:
        """What the provider can do: as it says, or as its hooks show."""
        if "capabilities" in self.relay.hooks:
            answer: Capabilities = self.relay.call("capabilities")
            return answer
        return Capabilities(features=frozenset(hook.removeprefix("a") for hook in self.relay.hooks) | self.relay.hooks)

    # --- Adapters ----------------------------------------------------------------------------------------------------

    async def use_adapter(
        self,
        reference: Any,
        *,
        on_missing: Literal["error", "base"],
        model: str | None,
        timeout: float | Timeouts | None,
    ) -> LoadedAdapter | None:
        """Switch the adapter of all calls that follow."""
        name = self.choose_model(model) if reference is not None else ""
        run = self.run("use_adapter", name or None, self.timeouts(timeout))
        with run.failing():
            active = await self.adapters.switch(reference, name, on_missing, run.call)
        run.end()
        run.emit("finish", adapter=active.name if active else None)
        return active

    async def list_adapters(self) -> tuple[AdapterInfo, ...]:
        """The adapters that the plugins know of."""
        found: list[AdapterInfo] = []
        for _, function in self.relay.each("list_adapters"):
            found += await self.io.run(lambda ask=function: tuple(ask()))
        return tuple(found)

    def base_facts(self, model: str, call: Call) -> Callable[[], ModelInfo | None]:
        """Facts about a base model for a resolver, asked only when it does."""
        return self._lazily(lambda: self._show_now(model, call))

    def stats(self) -> Stats:
        """What has been done so far."""
        return self.counters.snapshot(self.adapters.active)

    # --- The end -----------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Give everything back. The second time does nothing."""
        if self._closed:
            return
        self._closed = True
        if has(self.relay, "close"):
            try:
                await self.io.call(self.relay, "close", CloseRequest(), Call())
            except Exception as error:
                raise self._translate(typed_error(error, self.provider)) from error


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        first()
        second()

    return both


def _is_missing(error: BaseException | None) -> bool:
    """Whether an error, or the one it was translated from, says that the model is not there."""
    return isinstance(error, ModelNotFound) or isinstance(getattr(error, "__cause__", None), ModelNotFound)
