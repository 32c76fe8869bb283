"""What comes before a request is sent: policies set limits, idle models are unloaded, a slot becomes free."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from graftage._engine.faults import in_words, kind_of
from graftage._engine.hooks import call_hook
from graftage._engine.limits import clamp, merge, with_concurrency
from graftage._engine.slots import any_of, holding, slots_for
from graftage._records import dataclass
from graftage.calls import LimitsQuery, ModelRequest, ModelsRequest
from graftage.exceptions import ModelNotFound, PluginError, ProviderError, ProviderTimeout, ResourceLimitExceeded
from graftage.types import NEVER_APPLIES, Limits

if TYPE_CHECKING:
    from graftage._engine.arguments import CallOptions
    from graftage._engine.call import Run
    from graftage._engine.connection import Connection
    from graftage._engine.slots import Slots
    from graftage.calls import Call

__all__ = ["Admission", "once"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Allowed:
    """What policies allow a request, before it waits for a slot."""

    figures: dict[str, Any]
    limits: Limits | None
    warnings: tuple[str, ...]
    give_back: Callable[[], None]
    """Says that the model is not in use any more."""


class Admission:
    """Admits the requests of one connection to its server."""

    def __init__(self, session: Connection) -> None:
        self._session = session
        self._most_waiting: int | None = None
        """How many requests may wait for the policies, as these said last."""

    @property
    def slots(self) -> Slots:
        """The slots of the server. Looked up each time: a forked process has its own."""
        return slots_for(self._session.plugin, self._session.address)

    async def admit(self, run: Run, operation: str, asked: CallOptions, model: str) -> dict[str, Any]:
        """Ask the policies, unload what they name, clamp, take a slot; return the figures that the request may have."""
        allowed = await self.allow(run, operation, asked, model)
        run.at_end(allowed.give_back)
        run.limits = allowed.limits
        run.warnings = (*run.warnings, *allowed.warnings)
        await self._take_slot(run, allowed.limits)
        run.emit("admitted")
        return allowed.figures

    async def allow(self, run: Run, operation: str, asked: CallOptions, model: str) -> Allowed:
        """Ask the policies, unload what they name, and clamp. The model counts as in use until `give_back`."""
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
        limits = with_concurrency(limits, session.settings.concurrency)
        figures, warnings = clamp(wanted, limits, force=asked.force)
        return Allowed(figures, limits, (*warnings, *self._without_effect(wanted)), give_back)

    def _without_effect(self, wanted: Mapping[str, object]) -> Iterator[str]:
        """Yield a warning for each parameter that is set and that the provider does not read."""
        read = self._session.capabilities().parameters
        for name, value in wanted.items():
            if value is not None and read is not None and name not in read:
                yield f"`{name}` has no effect: the provider `{self._session.provider}` does not read it."

    async def granted(self, slots: Slots, granted: Future[None], call: Call) -> None:
        """Wait for a slot; on any error, give the place up.

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
            slots.withdraw(granted)
            raise ProviderTimeout(
                f"No slot became free within {call.timeouts.total:g} s.",
                phase="total",
                hint="Raise `timeout`, or the limit on concurrent requests.",
            ) from error
        except BaseException:
            slots.withdraw(granted)
            raise
        finally:
            counters.add(waiting=-1)

    async def _take_slot(self, run: Run, limits: Limits | None) -> None:
        slots = self.slots
        granted = slots.enter(
            limits.concurrent_requests if limits else None, limits.queued_requests if limits else None
        )
        await self.granted(slots, granted, run.call)
        run.at_end(slots.leave)

    def _reserve(self, model: str) -> Callable[[], None]:
        """Count a model as in use until the returned function is called."""
        slots = self.slots
        slots.use(model, 1)
        return lambda: slots.use(model, -1)

    # --- Policies ----------------------------------------------------------------------------------------------------

    async def _as_policies_say(
        self, run: Run, operation: str, asked: CallOptions, model: str, wanted: Mapping[str, object]
    ) -> tuple[Limits | None, Callable[[], None]]:
        """Ask the policies, unload what they name, and reserve the model."""
        lock = self.slots.policy_lock
        with holding(lock, "A policy may not send requests to the server that it decides about."):
            await self.granted(lock, lock.enter(1, self._most_waiting), run.call)
            return await self._locked(lock, run, model, self._query(run, operation, asked, model, wanted))

    async def _locked(
        self, lock: Slots, run: Run, model: str, query: Callable[[], LimitsQuery]
    ) -> tuple[Limits | None, Callable[[], None]]:
        try:
            limits = await self._when_there_is_room(run, query)
            await self._unload(limits, run.call)
            return limits, self._reserve(model)
        finally:
            lock.leave()

    async def _when_there_is_room(self, run: Run, query: Callable[[], LimitsQuery]) -> Limits | None:
        """Ask the policies until no model is in use that they want to wait for."""
        slots = self.slots
        while True:
            moved = slots.moved()
            used = slots.in_use()
            try:
                limits = await self._limits(query(), run.call)
                self._most_waiting = limits.queued_requests if limits else None
                if limits is None or not any_of(limits.wait_for, used):
                    return limits
                # A model that became idle while they answered may have to go: ask them again.
                if slots.busy(limits.wait_for):
                    await self.granted(slots, moved, run.call)
            finally:
                slots.withdraw(moved)

    async def _unload(self, limits: Limits | None, call: Call) -> None:
        session = self._session
        for idle in limits.unload if limits and session.has("unload_model") else ():
            if not self.slots.busy([idle]):
                with contextlib.suppress(ModelNotFound):  # It was deleted, or has just been unloaded.
                    await call_hook(
                        session.io, session.relay.hooks["unload_model"], ModelRequest(call=call, model=idle), call
                    )

    def _query(
        self, run: Run, operation: str, asked: CallOptions, model: str, wanted: Mapping[str, Any]
    ) -> Callable[[], LimitsQuery]:
        """Return what makes the query for the policies; its facts are asked for lazily, each time again."""
        session, call = self._session, run.call

        def ask(hook: str) -> Callable[[], Any]:
            return once(lambda: session.from_plugin(hook, ModelsRequest(call=call)))

        return lambda: LimitsQuery(
            operation=operation,
            provider=session.plugin,
            address=session.address,
            model=model,
            prompt_characters=asked.prompt_characters,
            adapter=run.adapter,
            force=asked.force,
            parameters=session.capabilities().parameters,
            model_info=once(lambda: session.facts(model, call)),
            loaded_models=ask("loaded_models"),
            models=ask("list_models"),
            in_use=self.slots.in_use,
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
        return merge(answers)

    async def _ask(self, name: str, policy: Callable[..., Any], query: LimitsQuery, call: Call) -> Limits | None:
        problem, cause = "", None
        try:
            answer = await self._session.io.ask(name, policy, query, call)
            if answer is None or isinstance(answer, Limits):
                return answer
            problem = f"returned {kind_of(answer)} instead of Limits"
        except ResourceLimitExceeded as refusal:
            refusal.plugin = refusal.plugin or name
            if not query.force:
                raise
            return Limits(warnings=(f"`force` overrode a refusal of the policy `{refusal.plugin}`: {refusal.message}",))
        except (ProviderError, PluginError):
            raise  # The provider failed, or the error names the policy already.
        except Exception as error:  # noqa: BLE001 - the error must name the policy
            problem, cause = f"failed with {in_words(error)}", error
        hint = "Report it to its authors, or disable it with GRAFTAGE_DISABLED_PLUGINS."
        raise PluginError(f"The policy {self._session.relay.named(name)} {problem}.", plugin=name, hint=hint) from cause


def once(ask: Callable[[], T]) -> Callable[[], T]:
    """Return a function that asks at its first call, and returns the same answer from then on."""
    answers: list[T] = []

    def answer() -> T:
        if not answers:
            answers.append(ask())
        return answers[0]

    return answer
