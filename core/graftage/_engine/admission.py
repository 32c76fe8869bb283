"""Admission: what the policies allow a request, which models go before it, and the slot it waits for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from graftage._engine import limits as gates
from graftage._engine.faults import in_words, kind_of
from graftage._engine.hooks import call_hook
from graftage._records import dataclass
from graftage.calls import LimitsQuery, ModelRequest, ModelsRequest
from graftage.exceptions import ModelNotFound, PluginError, ProviderError, ProviderTimeout, ResourceLimitExceeded
from graftage.types import NEVER_APPLIES, Limits

if TYPE_CHECKING:
    from graftage._engine.arguments import CallOptions
    from graftage._engine.call import Run
    from graftage._engine.connection import Connection
    from graftage._engine.limits import Gate
    from graftage.calls import Call

__all__ = ["Admission"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a request may have, before it waits for its slot."""

    figures: dict[str, Any]
    limits: Limits | None
    warnings: tuple[str, ...]
    give_back: Callable[[], None]
    """The model is in use no more."""


class Admission:
    """The way in to one server, shared by all clients of the process that use it."""

    def __init__(self, session: Connection) -> None:
        self._session = session
        self._most_waiting: int | None = None
        """How many may wait for the policies, as they said last."""

    @property
    def gate(self) -> Gate:
        """The slots of the server. Looked up each time: in a process that was forked off there is another."""
        return gates.gate_for(self._session.provider, self._session.address)

    async def admit(self, run: Run, operation: str, asked: CallOptions, model: str) -> dict[str, Any]:
        """Ask the policies, unload what they name, clamp, and take a slot; the figures that the request may have."""
        allowed = await self.allow(run, operation, asked, model)
        run.at_end(allowed.give_back)
        run.limits = allowed.limits
        run.warnings = (*run.warnings, *allowed.warnings)
        await self._take_slot(run, allowed.limits)
        run.emit("admitted")
        return allowed.figures

    async def allow(self, run: Run, operation: str, asked: CallOptions, model: str) -> Allowed:
        """Ask the policies, unload what they name, and clamp. The model counts as in use until it is given back."""
        session = self._session
        wanted = {
            "keep_alive": session.keep_alive(asked.keep_alive),
            "context_window": asked.context_window or session.settings.context_window,
            "max_tokens": asked.max_tokens,
        }
        policies = session.relay.each("resource_limits")
        if policies:
            limits, give_back = await self._as_policies_say(run, operation, asked, model, wanted)
        else:
            limits, give_back = None, self._reserve(model)
        limits = gates.with_concurrency(limits, session.settings.concurrency)
        figures, warnings = gates.clamp(wanted, limits, force=asked.force)
        return Allowed(figures, limits, (*warnings, *self._without_effect(wanted)), give_back)

    def _without_effect(self, wanted: Mapping[str, Any]) -> Iterator[str]:
        """A warning for each parameter that is set and that the provider says it does not read."""
        read = self._session.capabilities().parameters
        for name, value in wanted.items():
            if value is not None and read is not None and name not in read:
                yield f"`{name}` has no effect: the provider `{self._session.provider}` does not read it."

    async def granted(self, gate: Gate, granted: Future[None], call: Call) -> None:
        """Wait for a slot, and give the place up where the waiting ends otherwise.

        Raises:
            ProviderTimeout: the deadline passed.
        """
        if granted.done():
            return
        counters = self._session.counters
        counters.add(waiting=1)
        try:
            await self._session.io.wait(granted, call.deadline)
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
            counters.add(waiting=-1)

    async def _take_slot(self, run: Run, limits: Limits | None) -> None:
        gate = self.gate
        granted = gate.enter(limits.concurrent_requests if limits else None, limits.queued_requests if limits else None)
        await self.granted(gate, granted, run.call)
        run.at_end(gate.leave)

    def _reserve(self, model: str) -> Callable[[], None]:
        """Count a model as in use, until the answer is called."""
        gate = self.gate
        gate.use(model, 1)
        return lambda: gate.use(model, -1)

    # --- Policies ----------------------------------------------------------------------------------------------------

    async def _as_policies_say(
        self, run: Run, operation: str, asked: CallOptions, model: str, wanted: Mapping[str, Any]
    ) -> tuple[Limits | None, Callable[[], None]]:
        """What the policies allow, once those models have gone that must; the model is then reserved."""
        lock = self.gate.policy_lock
        with gates.inside(lock, "A policy made a request to the server that it was deciding about."):
            await self.granted(lock, lock.enter(1, self._most_waiting), run.call)
            return await self._locked(lock, run, model, self._query(run, operation, asked, model, wanted))

    async def _locked(
        self, lock: Gate, run: Run, model: str, query: Callable[[], LimitsQuery]
    ) -> tuple[Limits | None, Callable[[], None]]:
        try:
            limits = await self._when_there_is_room(run, query)
            await self._unload(limits, run.call)
            return limits, self._reserve(model)
        finally:
            lock.leave()

    async def _when_there_is_room(self, run: Run, query: Callable[[], LimitsQuery]) -> Limits | None:
        """What the policies say once no model is in use that they want to be done first."""
        gate = self.gate
        while True:
            moved = gate.moved()
            used = gate.in_use()
            try:
                limits = await self._limits(query(), run.call)
                self._most_waiting = limits.queued_requests if limits else None
                if limits is None or not gates.named(limits.wait_for, used):
                    return limits
                # One that was done while they answered is idle now, and may have to go: they are asked again.
                if gate.busy(limits.wait_for):
                    await self.granted(gate, moved, run.call)
            finally:
                gate.withdraw(moved)

    async def _unload(self, limits: Limits | None, call: Call) -> None:
        session = self._session
        for idle in limits.unload if limits and session.has("unload_model") else ():
            if not self.gate.busy([idle]):
                with contextlib.suppress(ModelNotFound):  # It was deleted while it was in memory, or has just gone.
                    await call_hook(
                        session.io, session.relay.hooks["unload_model"], ModelRequest(call=call, model=idle), call
                    )

    def _query(
        self, run: Run, operation: str, asked: CallOptions, model: str, wanted: Mapping[str, Any]
    ) -> Callable[[], LimitsQuery]:
        """Makes the question to the policies, whose facts are asked for lazily, and anew each time."""
        session, call = self._session, run.call

        def ask(hook: str) -> Callable[[], Any]:
            return _once(lambda: session.from_plugin(hook, ModelsRequest(call=call)))

        return lambda: LimitsQuery(
            operation=operation,
            provider=session.provider,
            address=session.address,
            model=model,
            prompt_characters=asked.prompt_characters,
            adapter=run.adapter,
            force=asked.force,
            model_info=_once(lambda: session.facts(model, call)),
            loaded_models=ask("loaded_models"),
            models=ask("list_models"),
            in_use=self.gate.in_use,
            **wanted,
        )

    async def _limits(self, query: LimitsQuery, call: Call) -> Limits | None:
        answers: list[tuple[str, Limits]] = []
        for name, policy in self._session.relay.each("resource_limits"):
            answer = await self._ask(name, policy, query, call)
            if answer is NEVER_APPLIES:
                self._session.relay.drop("resource_limits", name)
            elif answer is not None:
                answers.append((name, answer))
        return gates.merge(answers)

    async def _ask(self, name: str, policy: Callable[..., Any], query: LimitsQuery, call: Call) -> Limits | None:
        problem, cause = "", None
        try:
            answer = await self._session.io.ask(name, policy, query, call)
            if answer is None or isinstance(answer, Limits):
                return answer
            problem = f"answered with {kind_of(answer)} instead of Limits"
        except ResourceLimitExceeded as refusal:
            refusal.plugin = refusal.plugin or name
            if not query.force:
                raise
            return Limits(warnings=(f"`force` overrode a refusal of the policy `{refusal.plugin}`: {refusal.message}",))
        except (ProviderError, PluginError):
            raise  # The provider failed when the policy asked about it, or the policy has been named already.
        except Exception as error:  # noqa: BLE001 - whatever it is, the policy must be named
            problem, cause = f"failed with {in_words(error)}", error
        hint = "Tell its authors, or disable it with GRAFTAGE_DISABLED_PLUGINS."
        raise PluginError(f"The policy {self._session.relay.named(name)} {problem}.", plugin=name, hint=hint) from cause


def _once(ask: Callable[[], T]) -> Callable[[], T]:
    answers: list[T] = []

    def once() -> T:
        if not answers:
            answers.append(ask())
        return answers[0]

    return once
