"""One connection at work: what `Client` and `AsyncClient` share, written once against `graftage._io.IO`."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from numbers import Real
from typing import Any, Literal, TypeVar, get_args

from graftage import _limits, _messages
from graftage._adapters import Adapters
from graftage._admission import Admission
from graftage._arguments import Wants, check_model, check_tokens, read_flag
from graftage._events import Counters, Emitter, log, new_call_id
from graftage._health import Flight, HealthCache
from graftage._io import IO, has
from graftage._plugins import Entry, Relay
from graftage._stream import Run, Translate, as_it_is, closed_meanwhile, telling, typed_error
from graftage._values import SHORTEST_SECRET, hidden, keep_alive_seconds
from graftage.exceptions import (
    CapabilityUnsupported,
    GraftageError,
    ModelNotFound,
    ProtocolError,
    ProviderError,
    ProviderTimeout,
    RequestRejected,
    ResourceLimitExceeded,
    SettingsError,
    StreamInterrupted,
)
from graftage.retry import Budget
from graftage.settings import Settings
from graftage.types import (
    HEALTH_LEVELS,
    Adapter,
    AdapterInfo,
    Call,
    Capabilities,
    CloseRequest,
    Embeddings,
    Feature,
    Health,
    HealthLevel,
    HealthRequest,
    LoadedAdapter,
    LoadedModel,
    LoadModelRequest,
    ModelInfo,
    ModelRequest,
    ModelsRequest,
    PruneAdaptersRequest,
    PullProgress,
    Stats,
    Timeouts,
)

__all__ = ["Session"]

T = TypeVar("T")
HEALTH_TIMEOUTS = Timeouts(connect=5.0, first_token=10.0, idle=10.0, total=10.0)
"""A check that does not make the model work answers soon or not at all."""
SOON = 30.0
"""Seconds for facts about models."""


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
        origin: str = "",
    ) -> None:
        self.provider = provider
        self.model = model or getattr(connection, "default_model", None)
        self.settings = settings
        self.io = io
        self.relay = Relay(provider, connection, plugins, origin)
        self.address = str(getattr(connection, "address", ""))
        self.counters = Counters()
        self.emitter = Emitter(self.relay.each("observe"), self.counters, self.hide)
        self.health_cache = HealthCache()
        self.adapters = Adapters(self)
        self.translate: Translate = as_it_is
        """How the host wants to see errors; set once the client is open, since opening must read them itself."""
        self.admission = Admission(self)
        self._budget = Budget()
        self._infos: dict[str, ModelInfo] = {}
        self._closed = False

    def single(self) -> Session:
        """This session; a chain of several has none."""
        return self

    # --- Calls -------------------------------------------------------------------------------------------------------

    def run(self, operation: str, model: str | None, timeouts: Timeouts, *, bounded: bool = True, **facts: Any) -> Run:
        """Begin a call: its deadline, its events, its counters."""
        self._require_open()
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
        emit("start")
        self.counters.add(calls=1, running=1)
        return Run(
            provider=self.provider,
            model=model or "",
            operation=operation,
            call=call,
            started=started,
            emit=emit,
            release=lambda: self.counters.add(running=-1),
            count=self._count,
            translate=self.translate,
            hide=self.hide,
            closed=lambda: self._closed,
        )

    def hide(self, error: GraftageError) -> None:
        """Take secrets out of what an error says: a server may repeat the headers it got."""
        settings = self.settings
        secrets = [each.get_secret_value() for each in (settings.api_key, *settings.headers.values()) if each]
        for secret in (each for each in secrets if len(each) >= SHORTEST_SECRET):
            error.args = tuple(hidden(each, secret) for each in error.args)
            for name, value in vars(error).items():
                setattr(error, name, hidden(value, secret))

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("the client is closed")

    def read(
        self, reader: Callable[[Any, Mapping[str, Any]], Wants], subject: Any, arguments: Mapping[str, Any]
    ) -> Wants:
        """Read the arguments of a call; what is wrong with them is told as any other failure is."""
        with telling(self.translate):
            return reader(subject, arguments)

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
        with telling(self.translate):
            try:
                return replace(self.settings.timeouts, total=given)
            except ValueError as error:
                hint = "Give seconds above 0, or `Timeouts`."
                raise RequestRejected(f"The timeout is wrong: {error}.", hint=hint) from error

    def _soon(self, given: float | Timeouts | None) -> float | Timeouts:
        """The limits of a call for which no model works: a server that does not answer it soon will not at all."""
        if given is not None:
            return given
        own = self.settings.timeouts
        return replace(own, first_token=min(own.first_token, SOON), total=min(own.total, SOON))

    def choose_model(self, model: str | None) -> str:
        """The model of a call, or the client's."""
        with telling(self.translate):
            chosen = self.model if model is None else model
            if not chosen and model is None:
                hint = "Give `model=` to the call or to `connect`, or set GRAFTAGE_MODEL."
                raise RequestRejected("No model is chosen.", provider=self.provider, hint=hint)
            check_model(chosen)
            return str(chosen)

    async def ask(
        self,
        hook: str,
        build: Callable[[Call], Any],
        answers: type | None = None,
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
            answer = await self._call(hook, build(run.call), run.call, answers)
        run.end()
        run.emit("finish")
        return answer

    async def _call(self, hook: str, request: Any, call: Call, answers: type | None = None) -> Any:
        """Call a hook, and refuse an answer of another kind than the contract says."""
        answer = await self.io.call(self.relay, hook, request, call)
        if answers is not None and not isinstance(answer, answers):
            raise ProviderError(
                f"The provider `{self.provider}` answered `{hook}` with {type(answer).__name__} instead of "
                f"{answers.__name__}.",
                hint="That is a fault of the provider; tell its authors.",
            )
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
        try:
            with run.failing():
                request = await self._inference_request(run, operation, want, model)
                run.begin_fold()
                run.source = await self.io.open(self.relay, operation, request, run.call)
                self.admission.watch(run)
            return run, await run.pull()
        except Exception as error:
            if run.adapter and is_missing(error):
                self.adapters.forget(run.model)  # Somebody has deleted it: the next call makes it again.
            raise

    async def _inference_request(self, run: Run, operation: str, want: Wants, model: str) -> Any:
        """Settle everything that a request needs: options, adapter, limits and a slot."""
        self.require(operation)
        options = _messages.read_options(want.options, self.capabilities().options)
        self._require_features(model, want.needs)
        if "images" in want.needs:  # Some servers leave them out without a word, and the model makes something up.
            await self._know(model, run.call)
            self._require_features(model, want.needs)
        adapter, notes = await self.adapters.for_call(want, model, run)
        run.adapter = adapter.name if adapter else None
        run.warnings = (*run.warnings, *notes, *(adapter.warnings if adapter else ()))
        run.model = adapter.model if adapter else model
        figures = await self.admission.admit(run, operation, want, run.model)
        if self._closed:
            raise closed_meanwhile()
        if want.build is None:  # pragma: no cover - chat and generate always have one
            raise RuntimeError("there is no request to build")
        return want.build(call=run.call, model=run.model, adapter=adapter, options=options, **figures)

    async def _know(self, model: str, call: Call) -> None:
        """Learn what a model can do, where the provider can tell."""
        if model not in self._infos and has(self.relay, "show_model"):
            with contextlib.suppress(ProviderError):  # The request itself will tell.
                self._infos[model] = await self._call(
                    "show_model", ModelRequest(call=call, model=model), call, ModelInfo
                )

    def _require_features(self, model: str, needs: Sequence[str]) -> None:
        """Refuse what the provider cannot do, or what this model is known not to do."""
        able = self.capabilities().features
        info = self._infos.get(model)
        for feature in needs:
            _messages.require(feature, feature in able, self.provider)
            if info is not None and info.features is not None and feature in ("tools", "images", "thinking"):
                _messages.require(feature, feature in info.features, self.provider, f"{feature}` with `{model}")

    def keep_alive(self, given: float | str | None) -> float | None:
        """Seconds a model is to stay: as the call says, else the settings."""
        try:
            return keep_alive_seconds(given) if given is not None else self.settings.keep_alive
        except ValueError as error:
            raise RequestRejected(f"The setting is wrong: {error}.", hint="Write it as `300` or `5m`.") from error

    async def embed(self, want: Wants) -> Embeddings:
        """One vector for each input."""
        model = self.choose_model(want.model)
        run = self.run("embed", model, self.timeouts(want.timeout))
        with run.failing():
            self.require("embed")
            request = await self._embed_request(run, model, want)
            answer: Embeddings = await self._call("embed", request, run.call, Embeddings)
            vectors = _checked_vectors(answer.vectors, len(request.inputs))
        run.end()
        self.counters.add(input_tokens=answer.usage.input_tokens or 0)
        timings = replace(answer.timings, wall=time.monotonic() - run.started)
        run.emit("finish", usage=answer.usage, timings=timings)
        return replace(
            answer,
            vectors=vectors,
            model=answer.model or model,
            provider=self.provider,
            timings=timings,
            limits=run.limits,
            warnings=(*run.warnings, *answer.warnings),
        )

    async def _embed_request(self, run: Run, model: str, want: Wants) -> Any:
        options = _messages.read_options(want.options, self.capabilities().options)
        figures = await self.admission.admit(run, "embed", want, model)
        figures.pop("max_tokens")
        if want.build is None:  # pragma: no cover - embed always has one
            raise RuntimeError("there is no request to build")
        return want.build(call=run.call, model=model, options=options, **figures)

    # --- Health ------------------------------------------------------------------------------------------------------

    async def health(
        self, level: HealthLevel, model: str | None, max_age: float | None, timeout: float | Timeouts | None
    ) -> Health:
        """How well the provider is, remembered for a little while; callers at one time share one check."""
        self._require_open()
        with telling(self.translate):
            if level not in HEALTH_LEVELS:
                raise RequestRejected(f"There is no level {level!r}.", hint=f"Use one of {', '.join(HEALTH_LEVELS)}.")
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
            found = await self._checked(run, HealthRequest(call=run.call, level=level, model=chosen), flight)
        run.end()
        run.emit("finish")
        return found

    async def _checked(self, run: Run, request: HealthRequest, flight: Flight) -> Health:
        started = time.monotonic()
        once = replace(request, call=replace(request.call, attempts=1))
        try:
            found = await self._looked_at(run, once)
        except CapabilityUnsupported:
            flight.land(None)
            raise
        except Exception as error:  # noqa: BLE001 - what went wrong is the answer
            typed = typed_error(error, self.provider)
            self.hide(typed)
            found = Health(level=request.level, reachable=False, model=request.model, error=typed)
        except BaseException:
            flight.land(None)  # Those who joined are told that this caller gave up.
            raise
        if isinstance(found.error, GraftageError):
            self.hide(found.error)
        found = replace(found, address=found.address or self.address, latency=time.monotonic() - started)
        flight.land(found)
        return found

    async def _looked_at(self, run: Run, request: HealthRequest) -> Health:
        """Ask the provider; a model that has to answer must be allowed to, as for any request."""
        found: Health
        if request.level == "answers" and request.model is not None:
            try:
                figures = await self.admission.admit(run, "health", Wants(), request.model)
            except ResourceLimitExceeded as refusal:
                found = await self._call("health", replace(request, level="model_loaded"), request.call, Health)
                return replace(found, level="answers", answers=False, error=found.error or refusal)
            figures.pop("max_tokens")
            request = replace(request, **figures)
        found = await self._call("health", request, request.call, Health)
        return found

    async def _join(self, result: Future[Health | None], timeouts: Timeouts) -> Health:
        try:
            await self.io.wait(result, time.monotonic() + timeouts.total)
        except TimeoutError as error:
            raise ProviderTimeout(
                "The health check was not finished in time.", phase="total", hint="Raise `timeout`."
            ) from error
        found = result.result()
        if found is None:
            raise ProviderTimeout(
                "The health check was given up by the caller that had started it.", phase="total", hint="Ask again."
            )
        return found

    # --- Models ------------------------------------------------------------------------------------------------------

    async def models(self, timeout: float | Timeouts | None) -> tuple[ModelInfo, ...]:
        """The models that can be asked."""
        found: tuple[ModelInfo, ...] = await self.ask(
            "list_models", lambda call: ModelsRequest(call=call), tuple, timeout=self._soon(timeout)
        )
        return found

    async def show(self, model: str | None, timeout: float | Timeouts | None) -> ModelInfo:
        """One model in full."""
        name = self.choose_model(model)
        info: ModelInfo = await self.ask(
            "show_model",
            lambda call: ModelRequest(call=call, model=name),
            ModelInfo,
            model=name,
            timeout=self._soon(timeout),
        )
        self._infos[name] = info
        return info

    async def loaded(self, timeout: float | Timeouts | None) -> tuple[LoadedModel, ...]:
        """What is in memory."""
        found: tuple[LoadedModel, ...] = await self.ask(
            "loaded_models", lambda call: ModelsRequest(call=call), tuple, timeout=self._soon(timeout)
        )
        return found

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
            with _limits.inside(gate, f"`{name}` was to be pulled by its own pull, which would wait for itself."):
                await self.admission.granted(gate, gate.enter(1), run.call)
                run.at_end(gate.leave)
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
                _tell(run, on_progress, step)
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
            with telling(self.translate):
                raise RequestRejected(f"There is no policy {policy!r}.", hint="Use never, missing or always.")
        if policy == "always":
            await self.pull(model, on_progress, timeout)
        try:
            return await self.show(model, None)
        except Exception as error:
            if policy != "missing" or not is_missing(error):
                raise
        await self.pull(model, on_progress, timeout)
        return await self.show(model, None)

    async def load(
        self,
        model: str | None,
        keep_alive: float | str | None,
        context_window: int | None,
        timeout: float | Timeouts | None,
        *,
        force: bool,
    ) -> None:
        """Bring a model into memory, with the window that the next calls will have."""
        name = self.choose_model(model)
        with telling(self.translate):
            check_tokens("context_window", context_window)
            read_flag("force", force)
        want = Wants(keep_alive=keep_alive, context_window=context_window, force=force)
        figures: dict[str, Any] = {}

        async def admit(run: Run) -> None:
            figures.update(await self.admission.admit(run, "load_model", want, name))
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
            try:
                answer: Capabilities = self.relay.call("capabilities")
            except Exception as error:  # noqa: BLE001 - it is typed
                typed = typed_error(error, self.provider)
                raise typed from typed.__cause__
            return answer
        return Capabilities(features=frozenset(name for name in get_args(Feature) if has(self.relay, name)))

    # --- Adapters ----------------------------------------------------------------------------------------------------

    async def use_adapter(
        self,
        reference: Any,
        *,
        on_missing: Literal["error", "base"],
        force: bool,
        model: str | None,
        timeout: float | Timeouts | None,
    ) -> LoadedAdapter | None:
        """Switch the adapter of all calls that follow."""
        self._require_open()
        with self.adapters.switching(reference) as ticket:
            name = self.choose_model(model) if reference is not None else ""
            run = self.run("use_adapter", name or None, self.timeouts(timeout))
            with run.failing():
                active = await self.adapters.switch(ticket, reference, name, run, on_missing=on_missing, force=force)
        run.end()
        run.emit("finish", adapter=active.name if active else None)
        return active

    def switch_failed(self, reference: Any, error: BaseException) -> None:
        """A switch ended before it came here."""
        with contextlib.suppress(BaseException), self.adapters.switching(reference):
            raise error

    async def resolve_adapter(self, reference: Any, model: str | None, timeout: float | Timeouts | None) -> Adapter:
        """The adapter behind a reference, with the verdict on it."""
        name = self.choose_model(model)
        run = self.run("resolve_adapter", name, self.timeouts(timeout))
        with run.failing():
            adapter = await self.adapters.resolve(reference, name, run.call)
        run.end()
        run.emit("finish", adapter=adapter.name)
        return adapter

    async def unload_adapter(self, reference: Any, model: str | None, timeout: float | Timeouts | None) -> None:
        """Free what an adapter holds."""
        name = self.choose_model(model)
        run = self.run("unload_adapter", name, self.timeouts(timeout))
        with run.failing():
            await self.adapters.unload(reference, name, run.call)
        run.end()
        run.emit("finish")

    async def prune_adapters(
        self, keep: Sequence[str], older_than: float | None, dry_run: bool, timeout: float | Timeouts | None
    ) -> tuple[ModelInfo, ...]:
        """Delete what loaded adapters have left on the server."""
        with telling(self.translate):
            kept = tuple(
                _messages.text(each, "`keep`") for each in _messages.items(keep, "`keep`", "a sequence of names")
            )
            read_flag("dry_run", dry_run)
        found: tuple[ModelInfo, ...] = await self.ask(
            "prune_adapters",
            lambda call: PruneAdaptersRequest(call=call, keep=kept, older_than=older_than, dry_run=dry_run),
            tuple,
            timeout=timeout,
        )
        if not dry_run:
            self.adapters.forget_all()
        return found

    async def list_adapters(self) -> tuple[AdapterInfo, ...]:
        """The adapters that the plugins know of; one that fails to list hides nobody else's."""
        self._require_open()
        found: list[AdapterInfo] = []
        for name, function in self.relay.each("list_adapters"):
            try:
                found += await self.io.run(lambda ask=function: tuple(ask()))
            except Exception as error:  # noqa: PERF203 - plugins are isolated from each other
                if isinstance(error, SettingsError):  # It is the user's to mend, and silence looks like an empty list.
                    raise
                log("WARNING", f"the plugin `{name}` failed to list its adapters: {type(error).__name__}: {error}")
        return tuple(found)

    def facts(self, model: str, call: Call) -> ModelInfo | None:
        """Facts about a model, from a plugin's blocking code; remembered."""
        if model not in self._infos:
            try:
                info = self.io.from_thread(self.relay, "show_model", ModelRequest(call=call, model=model))
            except ModelNotFound:
                return None  # The request itself will tell, with suggestions.
            if info is None:
                return None
            self._infos[model] = info
        return self._infos[model]

    def stats(self) -> Stats:
        """What has been done so far."""
        return self.counters.snapshot(self.adapters.active)

    # --- The end -----------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Give everything back. The second time does nothing."""
        if self._closed:
            return
        self._closed = True
        if self.io.can(self.relay, "close"):
            with telling(self.translate):
                try:
                    await self.io.call(self.relay, "close", CloseRequest(), Call())
                except Exception as error:  # noqa: BLE001 - it is typed
                    typed = typed_error(error, self.provider)
                    raise typed from typed.__cause__


def _tell(run: Run, on_progress: Callable[[PullProgress], None], step: PullProgress) -> None:
    try:
        on_progress(step)
    except Exception as error:
        run.hosts_own = error
        raise


def _checked_vectors(given: Any, inputs: int) -> tuple[tuple[float, ...], ...]:
    """The vectors of an answer, one for each input; a vector too few would put each later one to the wrong text.

    Raises:
        ProtocolError: there are more or fewer, one is empty or longer than another, or holds what is no finite number.
    """
    try:
        vectors = tuple(map(tuple, given))
    except TypeError:
        raise _wrong_vectors("what is no sequence of vectors") from None
    if len(vectors) != inputs:
        raise _wrong_vectors(f"another number of vectors than there are inputs, {len(vectors)} for {inputs}")
    lengths = sorted(set(map(len, vectors)))
    if lengths[0] == 0:
        raise _wrong_vectors("an empty vector", "Choose a model that is made for embeddings.")
    if len(lengths) > 1:
        raise _wrong_vectors(f"vectors of different lengths, from {lengths[0]} to {lengths[-1]} numbers")
    kinds = set().union(*(map(type, each) for each in vectors))
    try:
        right = bool not in kinds and all(issubclass(each, Real) for each in kinds)
        if right and all(all(map(math.isfinite, each)) for each in vectors):
            return vectors if kinds == {float} else tuple(tuple(map(float, each)) for each in vectors)
    except OverflowError:  # A whole number may be larger than any float.
        pass
    raise _wrong_vectors("a vector that holds what is no finite number")


def _wrong_vectors(
    what: str, hint: str = "Embed one text at a time to find the one that fails; another model may do."
) -> ProtocolError:
    return ProtocolError(f"The answer has {what}.", hint=hint)


def is_missing(error: BaseException | None) -> bool:
    """Whether an error, or the one it was translated from, says that the model is not there."""
    return isinstance(error, ModelNotFound) or isinstance(getattr(error, "__cause__", None), ModelNotFound)
