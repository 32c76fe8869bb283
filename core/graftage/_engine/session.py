"""The operations of both clients, written once: how to wait is in `graftage._engine.waiting.IO`."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

from graftage._engine import inputs
from graftage._engine.adapters import Adapters
from graftage._engine.admission import Admission
from graftage._engine.answers import cut_warning, read_count, read_usage, reason_of
from graftage._engine.arguments import (
    Bound,
    CallOptions,
    check_callback,
    check_model,
    check_tokens,
    read_adapter,
    read_flag,
    read_reference,
    read_seconds,
)
from graftage._engine.call import Run, closed_meanwhile
from graftage._engine.connection import Connection
from graftage._engine.events import log
from graftage._engine.faults import in_words, kind_of
from graftage._engine.hooks import call_hook, open_hook
from graftage._engine.options import read_options
from graftage._engine.slots import holding, slots_for
from graftage.calls import (
    Call,
    ChatRequest,
    CloseRequest,
    EmbedRequest,
    HealthRequest,
    ListAdaptersRequest,
    LoadModelRequest,
    ModelRequest,
    ModelsRequest,
    NativeRequest,
    PruneAdaptersRequest,
    PullAdapterRequest,
    RerankRequest,
)
from graftage.exceptions import (
    AdapterNotFound,
    CapabilityUnsupported,
    ContextOverflow,
    GraftageError,
    InferenceFailed,
    ModelNotFound,
    PluginError,
    ProtocolError,
    ProviderError,
    RequestRejected,
    ResourceLimitExceeded,
    SettingsError,
    StreamInterrupted,
)
from graftage.types import (
    HEALTH_LEVELS,
    Adapter,
    AdapterInfo,
    Chunk,
    Embeddings,
    Health,
    HealthLevel,
    LoadedAdapter,
    LoadedModel,
    Message,
    ModelInfo,
    PullProgress,
    Ranked,
    Ranking,
    Stats,
    Timeouts,
    Usage,
    Vectors,
    Warmed,
    canonical_name,
)

__all__ = ["HEALTH_TIMEOUTS", "Session"]

Measured = TypeVar("Measured", bound=Embeddings | Ranking)
NOT_FITTING = "That does not fit the requested format. Answer again, only with JSON that fits:"
HEALTH_TIMEOUTS = Timeouts(connect=5.0, first_token=10.0, idle=10.0, total=10.0)
"""The limits of a health check that does not make the model work."""
NAMED = 9
"""How many empty inputs an error names."""


class Session(Connection):
    """The operations of a client, on one connection with its admission and its adapters."""

    def __init__(self, *, adapter: str | None = None, **of: Any) -> None:
        super().__init__(**of)
        self.admission = Admission(self)
        self.adapters = Adapters(self, self.admission, read_adapter(adapter) if adapter else None)

    def single(self) -> Session:
        """Return this session; a chain of several providers raises."""
        return self

    def view(self, bound: Bound, *, fresh: bool = False) -> Session:
        """Return a session on the same connection, with a model and an active adapter of its own.

        Args:
            bound: its model, if it has one, and its adapter: `ACTIVE` for the one that is active here now.
            fresh: `ACTIVE` means the one that was active from the start.

        Raises:
            RequestRejected: an option among the defaults is unknown or invalid.
        """
        self._require_open()
        read_options(bound.defaults.get("options"), self.capabilities().options)
        view = copy.copy(self)
        view.root = self.root or self
        view.model = bound.model or self.model
        view.adapters = self.adapters.view(bound.adapter, fresh=fresh)
        return view

    # --- Inference ---------------------------------------------------------------------------------------------------

    async def infer(
        self,
        operation: Literal["chat", "generate"],
        asked: CallOptions,
        *,
        stream: bool,
        warnings: Sequence[str] = (),
    ) -> tuple[Run, Any]:
        """Return the run at its end, or a stream's run with the first chunk. `warnings` go onto its reply."""
        if not isinstance(stream, bool):  # None as well: it decides what comes back.
            raise inputs.rejected("`stream`", "True or False", stream)
        if stream and asked.retries:
            hint = "Leave out `retries` or `stream`: what was shown cannot be taken back."
            raise RequestRejected("`retries` cannot be used with `stream`.", hint=hint)
        model = self.choose_model(asked.model)
        run = self.run(operation, model, self.timeouts(asked.timeout), stream=stream)
        run.parse = asked.parse
        run.warnings = tuple(warnings)
        try:
            with run.failing():
                request = await self._inference_request(run, operation, asked, model)
                run.request = self._as_read(request)
                run.tool_choice = getattr(request, "tool_choice", None)
                run.open = lambda found: open_hook(self.io, self.relay.hooks[operation], found, run.call)
                run.source = run.open(request)
            first = await run.pull()
            while not stream and run.reply is None:
                await run.pull()
            return run, first
        except InferenceFailed as error:
            if asked.retries and run.misfits():
                return await self._ask_again(asked, run, error, warnings)
            raise

    async def _ask_again(
        self, asked: CallOptions, run: Run, error: InferenceFailed, warnings: Sequence[str]
    ) -> tuple[Run, Any]:
        """Ask again if a reply does not fit its format: another call, within the time of the first."""
        left = run.call.deadline - time.monotonic()
        if left <= 0 or asked.build is None:
            raise error
        build, answer = asked.build, run.so_far()
        problem = Message(role="user", content=f"{NOT_FITTING}\n\n{reason_of(error)}")

        def longer(**settled: Any) -> ChatRequest:
            request: ChatRequest = build(**settled)
            return replace(request, messages=(*request.messages, answer.message, problem))

        timeouts = replace(run.call.timeouts, total=left)
        again = replace(asked, build=longer, retries=asked.retries - 1, timeout=timeouts)
        try:
            last, chunk = await self.infer("chat", again, stream=False, warnings=warnings)
        except ProviderError as later:
            later.attempts += 1
            raise
        reply = last.whole()
        last.reply = replace(reply, attempts=reply.attempts + 1, usage=answer.usage + reply.usage)
        return last, chunk

    async def _inference_request(self, run: Run, operation: str, asked: CallOptions, model: str) -> Any:
        """Get all that a request needs: options, adapter, limits and a slot."""
        self.require(operation)
        options = read_options(asked.options, self.capabilities().options)
        self.require_features(model, asked.needs)
        if self.needs or "images" in asked.needs:  # Some servers silently drop pictures, and the model invents.
            await self._know(model, run.call)
            self.require_features(model, (*self.needs, *asked.needs))
        applied, notes = await self.adapters.for_call(asked, model, run)
        run.warnings = (*run.warnings, *notes)
        if applied is not None:
            run.applied(applied.loaded)
            run.warnings = (*run.warnings, *applied.loaded.warnings)
        figures = await self.admission.admit(run, operation, asked, run.model)
        if self.is_closed:
            raise closed_meanwhile()
        if asked.build is None:  # pragma: no cover - chat and generate always have one
            raise RuntimeError("there is no request to build")
        build = partial(asked.build, call=run.call, options=options, **figures)
        if applied is None:
            return build(model=run.model, adapter=None)

        async def again() -> Any:
            found = await self.adapters.again(applied, model, run, asked, figures)
            run.applied(found.loaded)
            return build(model=run.model, adapter=found.loaded)

        run.again = again
        return build(model=run.model, adapter=applied.loaded)

    async def embed(self, asked: CallOptions) -> Embeddings:
        """Return one vector for each input."""
        return await self._measure("embed", asked, Embeddings, _checked_embeddings)

    async def rerank(self, asked: CallOptions) -> Ranking:
        """Return the documents in the order of their scores."""
        return await self._measure("rerank", asked, Ranking, _checked_ranking)

    async def _measure(
        self,
        operation: str,
        asked: CallOptions,
        kind: type[Measured],
        check: Callable[[Measured, Any], dict[str, Any]],
    ) -> Measured:
        """Call a hook that answers for all texts at once; `check` returns the fields of its result, or raises."""
        model = self.choose_model(asked.model)
        run = self.run(operation, model, self.timeouts(asked.timeout))
        with run.failing():
            self.require(operation)
            request = await self._measure_request(run, operation, model, asked)
            with _naming_empty(request):
                answer: Measured = await self.call(operation, request, run.call, kind)
                checked = check(answer, self._as_read(request))
        run.end()
        warnings = checked.pop("warnings")
        usage = read_usage(answer.usage) or Usage()
        self.counters.add(input_tokens=usage.input_tokens or 0)
        timings = replace(answer.timings, wall=time.monotonic() - run.started)
        run.emit("finish", usage=usage, timings=timings)
        return replace(
            answer,
            **checked,
            model=answer.model or model,
            provider=self.provider,
            usage=usage,
            timings=timings,
            limits=run.limits,
            warnings=(*run.warnings, *warnings),
        )

    def _as_read(self, request: Any) -> Any:
        """Return a request as the provider reads it: without a window, if it cannot set one."""
        if request.context_window is None:
            return request
        read = self.capabilities().parameters
        return request if read is None or "context_window" in read else replace(request, context_window=None)

    async def _measure_request(self, run: Run, operation: str, model: str, asked: CallOptions) -> Any:
        options = read_options(asked.options, self.capabilities().options)
        figures = await self.admission.admit(run, operation, asked, model)
        figures.pop("max_tokens")
        if asked.purpose is not None:
            from graftage._engine.purposes import prefix_for

            figures["prefix"] = prefix_for(model, asked.purpose)
            if figures["prefix"] is None:
                run.warnings = (*run.warnings, f"`purpose` has no effect: the prefix of `{model}` is unknown.")
        if asked.build is None:  # pragma: no cover - embed and rerank always have one
            raise RuntimeError("there is no request to build")
        return asked.build(call=run.call, model=model, options=options, **figures)

    async def count_tokens(self, asked: CallOptions) -> int:
        """Count the tokens of a conversation as the model reads it."""
        model = self.choose_model(asked.model)
        run = self.run("count_tokens", model, self.timeouts(asked.timeout))
        with run.failing():
            request = await self._inference_request(run, "count_tokens", asked, model)
            count: int = await self._once(run, "count_tokens", request, int)
            if not read_count(count):
                hint = "A conversation cannot be that short: report it to the provider's authors."
                raise ProtocolError(f"The provider counted {count} tokens.", hint=hint)
            if cut := cut_warning(self._as_read(request), count):
                raise ContextOverflow(*cut)
        run.end()
        run.emit("finish", usage=Usage(input_tokens=count))
        return count

    async def _once(self, run: Run, hook: str, request: Any, answers: type) -> Any:
        """Call a hook that returns once; if the server has lost the adapter, load it again and call once more."""
        try:
            return await self.call(hook, request, run.call, answers)
        except GraftageError as error:
            if (again := run.take_again(error)) is None:
                raise
            return await self.call(hook, await again(), run.call, answers)

    async def warm(self, asked: CallOptions) -> Warmed:
        """Load an adapter and its model, and read the messages ahead, if there are any."""
        if asked.build is not None and not self.has("warm"):
            asked = replace(asked, build=partial(_with_a_question, asked.build))
            run, _ = await self.infer("chat", asked, stream=False)
            reply = run.whole()
            return Warmed(
                tokens=reply.usage.input_tokens, cached_tokens=reply.usage.cached_tokens, warnings=reply.warnings
            )
        model = self.choose_model(asked.model)
        run = self.run("warm", model, self.timeouts(asked.timeout))
        with run.failing():
            warmed = await (self._load_ahead if asked.build is None else self._read_ahead)(run, asked, model)
        run.end()
        run.emit("finish", usage=Usage(input_tokens=warmed.tokens, cached_tokens=warmed.cached_tokens))
        return replace(warmed, warnings=(*run.warnings, *warmed.warnings))

    async def _read_ahead(self, run: Run, asked: CallOptions, model: str) -> Warmed:
        request = await self._inference_request(run, "chat", asked, model)
        warmed: Warmed = await self._once(run, "warm", request, Warmed)
        return replace(warmed, warnings=(*warmed.warnings, *cut_warning(self._as_read(request), warmed.tokens)))

    async def _load_ahead(self, run: Run, asked: CallOptions, model: str) -> Warmed:
        """Load the adapter, or else the model."""
        applied, notes = await self.adapters.for_call(replace(asked, reload=True), model, run)
        if applied is None:
            await self._load(run, asked, model)
        run.warnings = (*run.warnings, *notes, *(applied.loaded.warnings if applied else ()))
        return Warmed(tokens=0)

    # --- Health ------------------------------------------------------------------------------------------------------

    async def health(
        self, level: HealthLevel | None, model: str | None, max_age: float | None, timeout: float | Timeouts | None
    ) -> Health:
        """Say how well the provider is; the result is remembered for a few seconds."""
        self._require_open()
        level = "api" if level is None else level
        if level not in HEALTH_LEVELS:
            levels = ", ".join(HEALTH_LEVELS)
            raise RequestRejected(f"`level` must be one of {levels}, not {level!r}.", hint="Or leave it out.")
        if model is not None:
            check_model(model)
        read_seconds("max_age", max_age)
        needs_model = level in ("model_present", "model_loaded", "answers")
        chosen = self.choose_model(model) if needs_model else None
        timeouts = self.timeouts(timeout)
        if timeout is None and level != "answers":
            timeouts = HEALTH_TIMEOUTS
        key = (level, chosen)
        cache = self.health_cache
        known, generation = cache.get(key, max_age), cache.generation
        if known is not None:
            return known
        run = self.run("health", chosen, timeouts)
        with run.failing():
            found = await self._checked(run, HealthRequest(call=run.call, level=level, model=chosen))
        cache.put(key, found, generation)
        run.end()
        run.emit("finish")
        return found

    async def _checked(self, run: Run, request: HealthRequest) -> Health:
        once = replace(request, call=replace(request.call, attempts=1))
        try:
            found = await self._looked_at(run, once)
        except CapabilityUnsupported:
            raise
        except Exception as error:  # noqa: BLE001 - the error is the result
            typed = self.author.typed(error)
            self.hide(typed)
            found = Health(level=request.level, reachable=False, model=request.model, error=typed)
        if isinstance(found.error, GraftageError):
            self.hide(found.error)
        return replace(found, address=found.address or self.address, latency=time.monotonic() - run.started)

    async def _looked_at(self, run: Run, request: HealthRequest) -> Health:
        """Ask the provider. If the model has to answer, policies decide as for any request."""
        found: Health
        if request.level == "answers" and request.model is not None:
            try:
                figures = await self.admission.admit(run, "health", CallOptions(), request.model)
            except ResourceLimitExceeded as refusal:
                found = await self._ask_health(replace(request, level="model_loaded"))
                return replace(found, level="answers", answers=False, error=found.error or refusal)
            figures.pop("max_tokens")
            request = replace(request, **figures)
        return await self._ask_health(request)

    async def _ask_health(self, request: HealthRequest) -> Health:
        """Call the hook `health`, or, if the provider has none, the hooks that show the same."""
        call = request.call
        if self.has("health"):
            asked: Health = await self.call("health", request, call, Health)
            if isinstance(asked.error, ModelNotFound):
                await self._suggest(asked.error, "health", call)
            if request.model is None or request.level != "answers":
                return asked
            if not (asked.model_present and isinstance(asked.error, CapabilityUnsupported)):
                return asked
            try:
                await self._one_vector(request, request.model, asked.error)
            except ProviderError as error:
                return replace(asked, error=error)
            return replace(asked, model_loaded=True, answers=True, error=None)
        self.require("list_models")
        levels: dict[str, Any] = {}
        try:
            await self._look(request, levels)
        except ProviderError as error:
            if isinstance(error, ModelNotFound):
                await self._suggest(error, "health", call)
            return request.result(levels, error)
        return request.result(levels)

    async def _look(self, request: HealthRequest, found: dict[str, Any]) -> None:
        """Check level by level with the other hooks."""
        call, model = request.call, request.model
        models = await self.call("list_models", ModelsRequest(call=call), call, tuple)
        found.update(reachable=True, api=True)
        if model is None or not request.wants("model_present"):
            return
        names = [each.name for each in models]
        if canonical_name(model) not in map(canonical_name, names):
            close = inputs.close_names(model, names)
            raise ModelNotFound(
                f"The server does not list `{model}`.", model=model, suggestions=close, hint="Choose one that it lists."
            )
        found["model_present"] = True
        if request.wants("answers"):
            found["model_loaded"] = None  # It is unknown if the next step fails.
            try:
                await self._one_token(request, model)
            except (CapabilityUnsupported, ModelNotFound, RequestRejected) as refusal:  # It is listed, so it is there.
                await self._one_vector(request, model, refusal)
            found.update(model_loaded=True, answers=True)
        elif request.wants("model_loaded"):
            self.require("loaded_models")
            loaded = await self.call("loaded_models", ModelsRequest(call=call), call, tuple)
            found["model_loaded"] = canonical_name(model) in {canonical_name(each.name) for each in loaded}

    async def _one_token(self, request: HealthRequest, model: str) -> None:
        chat = ChatRequest(call=request.call, model=model, messages=(Message(role="user", content="Hi"),), max_tokens=1)
        source = open_hook(self.io, self.relay.hooks["chat"], chat, request.call)
        try:
            while isinstance(chunk := await source.pull(), Chunk) and chunk.finish_reason is None:
                pass
        finally:
            await source.close()
            await request.call.release()

    async def _one_vector(self, request: HealthRequest | LoadModelRequest, model: str, refusal: ProviderError) -> None:
        """Embed one text, which loads a model that only embeds. Raise `refusal` if the model cannot embed, either."""
        if not self.has("embed"):
            raise refusal
        embed = EmbedRequest(
            call=request.call,
            model=model,
            inputs=("Hi",),
            context_window=request.context_window,
            keep_alive=request.keep_alive,
        )
        try:
            await self.call("embed", embed, request.call, Embeddings)
        except (CapabilityUnsupported, ModelNotFound, RequestRejected):
            raise refusal from None

    # --- Models ------------------------------------------------------------------------------------------------------

    async def models(self, timeout: float | Timeouts | None) -> tuple[ModelInfo, ...]:
        """List the models that can be used."""
        found: tuple[ModelInfo, ...] = await self.ask(
            "list_models", lambda call: ModelsRequest(call=call), tuple, timeout=self._soon(timeout)
        )
        return found

    async def show(self, model: str | None, timeout: float | Timeouts | None) -> ModelInfo:
        """Describe one model in full."""
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
        """List the models in memory."""
        found: tuple[LoadedModel, ...] = await self.ask(
            "loaded_models", lambda call: ModelsRequest(call=call), tuple, timeout=self._soon(timeout)
        )
        return found

    async def pull(
        self, model: str | None, on_progress: Callable[[PullProgress], None] | None, timeout: float | Timeouts | None
    ) -> PullProgress:
        """Download a model, one download of a model at a time in this process."""
        check_callback("on_progress", on_progress)
        name = self.choose_model(model)
        given = timeout if timeout is not None else self.settings.timeouts
        run = self.run("pull_model", name, self.timeouts(given), bounded=timeout is not None)
        with run.failing():
            self.require("pull_model")
            slot = slots_for(f"pull {self.plugin}", f"{self.address} {name}")
            with holding(slot, f"`on_progress` of the pull of `{name}` pulls it again, which would wait for ever."):
                await self.admission.granted(slot, slot.enter(1), run.call)
                run.at_end(slot.leave)
                try:
                    last = await self._pull(run, name, on_progress)
                finally:
                    await run.abandon()
        run.emit("finish")
        self.forget_facts(name)
        self.adapters.forget(name)
        self.health_cache.drop()
        return last

    async def _pull(self, run: Run, model: str, on_progress: Callable[[PullProgress], None] | None) -> PullProgress:
        request = ModelRequest(call=run.call, model=model)
        last: PullProgress | None = None
        run.source = open_hook(self.io, self.relay.hooks["pull_model"], request, run.call)
        while (step := await run.source.pull()) is not None:
            if not isinstance(step, PullProgress):
                raise self.author.fault(f"gave {kind_of(step)} instead of a PullProgress")
            last = step
            run.emit("progress", progress=step)
            if on_progress is not None:
                _tell(run, on_progress, step)
        if last is None or last.status != "success":
            hint = "Pull again: it continues."
            if not run.call.opened:  # It did not come from a server.
                hint += " A provider's last PullProgress must have the status `success`, and it must not yield None."
            raise StreamInterrupted("The download ended before it was complete.", hint=hint)
        return last

    async def ensure(
        self,
        model: str | None,
        policy: Literal["never", "missing", "always"] | None,
        on_progress: Callable[[PullProgress], None] | None,
        timeout: float | Timeouts | None,
    ) -> ModelInfo:
        """Make sure that a model is there."""
        policy = "missing" if policy is None else policy
        if policy not in ("never", "missing", "always"):
            raise RequestRejected(
                f"`policy` must be never, missing or always, not {policy!r}.", hint="Or leave it out."
            )
        check_callback("on_progress", on_progress)
        self.timeouts(timeout)
        if policy == "always":
            await self.pull(model, on_progress, timeout)
        try:
            return await self.show(model, None)
        except ModelNotFound:
            if policy != "missing":
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
        force: bool | None,
    ) -> None:
        """Bring a model into memory, with the window of the next calls."""
        name = self.choose_model(model)
        check_tokens("context_window", context_window)
        asked = CallOptions(keep_alive=keep_alive, context_window=context_window, force=read_flag("force", force))
        run = self.run("load_model", name, self.timeouts(timeout))
        with run.failing():
            await self._load(run, asked, name)
        run.end()
        run.emit("finish")

    async def _load(self, run: Run, asked: CallOptions, model: str) -> None:
        self.require("load_model")
        figures = await self.admission.admit(run, "load_model", asked, model)
        figures.pop("max_tokens")
        request = LoadModelRequest(call=run.call, model=model, **figures)
        try:
            await self.call("load_model", request, run.call)
        except CapabilityUnsupported as refusal:
            await self._one_vector(request, model, refusal)

    async def unload(self, model: str | None, timeout: float | Timeouts | None) -> None:
        """Remove a model from memory."""
        name = self.choose_model(model)
        await self.ask("unload_model", lambda call: ModelRequest(call=call, model=name), model=name, timeout=timeout)

    async def delete(self, model: str, timeout: float | Timeouts | None) -> None:
        """Delete the model of exactly this name; the default is never meant."""
        check_model(model)
        await self.ask("delete_model", lambda call: ModelRequest(call=call, model=model), model=model, timeout=timeout)
        self.forget_facts(model)
        self.adapters.forget(model)
        self.health_cache.drop()

    # --- Adapters ----------------------------------------------------------------------------------------------------

    async def use_adapter(
        self,
        reference: object,
        *,
        on_missing: Literal["error", "base"] | None,
        force: bool | None,
        model: str | None,
        timeout: float | Timeouts | None,
    ) -> LoadedAdapter | None:
        """Switch the adapter of all calls that follow."""
        self._require_open()
        with self.adapters.switching(reference):
            name = self.choose_model(model) if reference is not None else ""
            run = self.run("use_adapter", name or None, self.timeouts(timeout))
            with run.failing():
                active = await self.adapters.switch(reference, name, run, on_missing=on_missing, force=force)
        run.end()
        run.emit("finish", adapter=active.name if active else None)
        return active

    def switch_failed(self, reference: object, error: BaseException) -> None:
        """Note a switch that failed before the client was open."""
        with contextlib.suppress(BaseException), self.adapters.switching(reference):
            raise error

    async def resolve_adapter(self, reference: object, model: str | None, timeout: float | Timeouts | None) -> Adapter:
        """Find the adapter of a reference, with the verdict on it."""
        name = self.choose_model(model)
        run = self.run("resolve_adapter", name, self.timeouts(timeout))
        with run.failing():
            adapter = await self.adapters.resolve(reference, name, run.call)
        run.end()
        run.emit("finish", adapter=adapter.name)
        return adapter

    async def unload_adapter(self, reference: object, model: str | None, timeout: float | Timeouts | None) -> None:
        """Free the memory of an adapter."""
        name = self.choose_model(model)
        run = self.run("unload_adapter", name, self.timeouts(timeout))
        with run.failing():
            await self.adapters.unload(reference, name, run.call)
        run.end()
        run.emit("finish")

    async def prune_adapters(
        self,
        keep: Sequence[str] | None,
        older_than: float | None,
        dry_run: bool | None,
        timeout: float | Timeouts | None,
    ) -> tuple[ModelInfo, ...]:
        """Delete the models that loaded adapters have left on the server."""
        kept = tuple(inputs.text(each, "`keep`") for each in inputs.items(keep, "`keep`", "a sequence of names"))
        dry_run = read_flag("dry_run", dry_run, default=True)
        read_seconds("older_than", older_than)
        found: tuple[ModelInfo, ...] = await self.ask(
            "prune_adapters",
            lambda call: PruneAdaptersRequest(call=call, keep=kept, older_than=older_than, dry_run=dry_run),
            tuple,
            timeout=timeout,
        )
        if not dry_run:
            self.adapters.forget_all()
        return found

    async def list_adapters(
        self, model: str | None = None, timeout: float | Timeouts | None = None
    ) -> tuple[AdapterInfo, ...]:
        """List the adapters that the plugins know, judged against a model if one is given.

        If one plugin fails, the others are still asked.
        """
        self._require_open()
        base: ModelInfo | None = None
        if model is not None:
            check_model(model)
            with contextlib.suppress(CapabilityUnsupported):
                base = await self.show(model, timeout)
        call = Call(operation="list_adapters", model=model, waiting=self.io)
        request = ListAdaptersRequest(model=model, base=lambda: base, call=call)
        found: list[AdapterInfo] = []
        for name, function in self.relay.each("list_adapters"):
            try:
                found += await self.io.run(lambda ask=function: _checked_adapters(ask(request)))
            except Exception as error:
                if isinstance(error, SettingsError):  # The user must correct it.
                    raise
                log("WARNING", f"the plugin `{name}` failed to list its adapters: {in_words(error)}")
                found.append(AdapterInfo(name="", reference="", source=name, problem=in_words(error)))
        return tuple(found)

    async def pull_adapter(
        self, reference: object, name: str | None, overwrite: bool | None, timeout: float | Timeouts | None
    ) -> AdapterInfo:
        """Download an adapter by the first plugin that knows such references."""
        wanted = read_reference(reference)
        name = inputs.optional_text(name, "`name`")
        given = timeout if timeout is not None else self.settings.timeouts
        run = self.run("pull_adapter", None, self.timeouts(given), bounded=timeout is not None)
        with run.failing():
            request = PullAdapterRequest(
                reference=wanted, name=name, overwrite=read_flag("overwrite", overwrite), call=run.call
            )
            found = await self._pulled(request)
        run.end()
        run.emit("finish", adapter=found.name)
        return found

    async def _pulled(self, request: PullAdapterRequest) -> AdapterInfo:
        pullers = self.relay.each("pull_adapter")
        for plugin, function in pullers:
            try:
                found: Any = await self.io.ask(plugin, function, request, request.call)
                if isinstance(found, AdapterInfo):
                    return found
                if found is not None:
                    raise TypeError(f"it answered `pull_adapter` with {kind_of(found)}")
            except GraftageError:
                raise
            except Exception as error:
                raise PluginError(
                    f"The plugin {self.relay.named(plugin)} failed with {in_words(error)}.",
                    plugin=plugin,
                    hint="Report it to its authors.",
                ) from error
        hint = (
            "Give the name of a repository, such as `owner/name`, or download its files yourself and give their path."
        )
        raise AdapterNotFound(
            f"No plugin can download the adapter `{request.reference}`.",
            reference=request.reference,
            hint=hint if pullers else "Install `graftage-lora`, which can, or download it yourself and give its path.",
        )

    async def native(self) -> Any:
        """Return the server's own client, on this connection."""
        return await self.ask("native", lambda call: NativeRequest(call=call))

    def stats(self) -> Stats:
        """Return what was done so far."""
        return self.counters.snapshot(self.adapters.active)

    # --- The end -----------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Give everything back. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self.root is not None:
            return
        try:
            if self.has("close"):
                request = CloseRequest(call=Call(waiting=self.waiting))
                await call_hook(self.io, self.relay.hooks["close"], request, request.call)
        except Exception as error:  # noqa: BLE001 - it is typed
            typed = self.author.typed(error)
            raise typed from typed.__cause__
        finally:
            try:
                await self.waiting.finish(self._clients.close)
            finally:
                await self.delivery.close(self.io.wait)


def _with_a_question(build: Callable[..., ChatRequest], **settled: Any) -> ChatRequest:
    """Return a request in which the user says something: the templates of some models need that."""
    request = build(**settled)
    if any(each.role == "user" for each in request.messages):
        return request
    return replace(request, messages=(*request.messages, Message(role="user", content="Hi")))


def _checked_adapters(listed: Any) -> tuple[AdapterInfo, ...]:
    """Return what a plugin has listed.

    Raises:
        TypeError: it is not a sequence of `AdapterInfo`.
    """
    found = tuple(listed)
    for each in found:
        if not isinstance(each, AdapterInfo):
            raise TypeError(f"it listed {kind_of(each)} instead of an `AdapterInfo`")
    return found


def _tell(run: Run, on_progress: Callable[[PullProgress], None], step: PullProgress) -> None:
    try:
        on_progress(step)
    except BaseException as error:
        run.host_error = error
        raise


def _checked_ranking(answer: Ranking, request: RerankRequest) -> dict[str, Any]:
    """Return the fields of a ranking, in its order, with each document once.

    Raises:
        ProtocolError: a document is missing or comes twice, or a score is not a finite number.
    """
    count = len(request.documents)
    results: Any = answer.results
    hint = "Rerank fewer documents at a time, or choose a model that is made for it."
    if not isinstance(results, tuple) or not all(isinstance(each, Ranked) for each in results):
        raise ProtocolError("The results are not a tuple of `Ranked`.", hint="Report it to the provider's authors.")
    places = sorted(each.index for each in results if type(each.index) is int)
    if places != list(range(count)):
        found = f"{len(results)} for {count}" if len(results) != count else "one twice, or one that was not given"
        raise ProtocolError(f"The result does not rank each document once: {found}.", hint=hint)
    scores = [each.score for each in results]
    if not all(isinstance(each, (int, float)) and math.isfinite(each) for each in scores):
        raise ProtocolError("The result has a score that is not a finite number.", hint=hint)
    results = tuple(sorted(results, key=lambda each: (-each.score, each.index)))
    return {"results": results, "warnings": answer.warnings}


def _checked_embeddings(answer: Embeddings, request: EmbedRequest) -> dict[str, Any]:
    vectors = _checked_vectors(answer.vectors, len(request.inputs))
    # A provider that cuts inputs itself warns itself.
    cut = answer.warnings or cut_warning(request, read_count(answer.usage.input_tokens))
    return {"vectors": vectors, "warnings": (*cut, *_length_warning(len(vectors[0]), request.dimensions))}


@contextlib.contextmanager
def _naming_empty(request: EmbedRequest | RerankRequest) -> Iterator[None]:
    """Let the errors of a block say which inputs are empty: many servers refuse those and do not say which."""
    try:
        yield
    except (InferenceFailed, ProtocolError, RequestRejected) as error:
        texts = request.inputs if isinstance(request, EmbedRequest) else request.documents
        empty = [str(place) for place, each in enumerate(texts, 1) if not each.strip()]
        if empty:
            error.message = f"{error.message} Empty inputs: number {', '.join(empty[:NAMED])} of {len(texts)}."
            error.args = (error.message,)
        raise


def _length_warning(length: int, wanted: int | None) -> tuple[str, ...]:
    if wanted in (None, length):
        return ()
    return (f"`dimensions` had no effect: the vectors have {length} numbers. Another model or server may use it.",)


def _checked_vectors(given: Any, inputs: int) -> Vectors:
    """Return the vectors of a result, one for each input: with one too few, later ones would go to the wrong text.

    Raises:
        ProtocolError: there are more or fewer, or they are not vectors.
    """
    hint = "Embed one text at a time to find the one that fails, or choose a model that is made for embeddings."
    try:
        vectors = Vectors(given)
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"The result has {error}.", hint=hint) from None
    if len(vectors) != inputs:
        found = f"{len(vectors)} for {inputs}"
        raise ProtocolError(f"The number of vectors is not the number of inputs: {found}.", hint=hint)
    return vectors
