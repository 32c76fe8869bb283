"""The policy: what a request may have of this Mac, with the reason for each number, or why not."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Final, TypeVar

from graftage.exceptions import ConnectionFailed, GraftageError, ResourceLimitExceeded
from graftage.footprint import MOST_NUMBER, RUNTIME, Shape, count_of, read_shape
from graftage.types import Limits, canonical_name
from graftage_m4._machine import GIB, Collector, budget_of, gb, readable_window
from graftage_m4._state import (
    ALIVE,
    RESIDENTS_UNKNOWN,
    Grant,
    Key,
    Ledger,
    Plan,
    Resident,
    Server,
    State,
    Watch,
    listed_size,
    not_now,
    remember,
    server_of,
    too_large,
)

if TYPE_CHECKING:
    from graftage.calls import LimitsQuery
    from graftage.types import LoadedModel, ModelInfo
    from graftage_m4._settings import M4Settings

__all__ = ["LADDER", "Policy"]

LADDER: Final = (4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144)
"""Windows that a model gets where nobody asked for another."""
MAX_UNTRAINED: Final = 8192
"""The longest window that nobody asked for, where a model does not say what it was trained for."""
SMALL_EMBEDDING: Final = 500_000_000
"""Bytes: an embedding model below this does not count as a loaded model."""
MAX_SLOTS: Final = 16
CHARACTERS_PER_TOKEN: Final = 3
"""So few that a prompt is thought longer than it is."""
ROOM_FOR_ANSWER: Final = 1024
LONGEST_CALL: Final = 600.0
"""Seconds: the default limit on a whole call, after which a model's time in memory begins again."""
LOADING_TIME: Final = 60.0
"""Seconds within which a model that was given to another address of a server is in use there, or is not coming."""
MAX_STRETCH: Final = 8
"""A loaded window that is longer than this many times what the model was trained for is no fact."""
MAX_NAMED: Final = 5
QUEUE_REASON: Final = "more could not be answered before their callers give up"

CLASSES: Final = (3.3e9, 5.8e9, 10e9, 15.5e9, 22e9)
"""Bytes of weights below which a model is of the 4B, 8B, 14B, 20B, 32B and 70B class."""
MINUTES: Final = (
    (20, (10, 5, 2, 2, 2, 2)),
    (28, (30, 15, 10, 5, 5, 5)),
    (40, (30, 30, 15, 10, 5, 5)),
    (56, (60, 60, 60, 60, 30, 10)),
    (float("inf"), (60, 60, 60, 60, 60, 10)),
)
"""How long a model stays, by gigabytes of memory below and by class."""
MAX_CONCURRENCY: Final = ((28, 2), (float("inf"), 4))
"""Requests at once at most, by gigabytes of memory below."""
MAX_LOADED: Final = ((20, 1), (40, 2), (float("inf"), 3))
"""Models in memory, by gigabytes of memory below; 3 is Ollama's own limit on a Mac."""

T = TypeVar("T")


class Policy:
    """Decides about requests, one after the other. Safe for threads."""

    def __init__(self, settings: M4Settings, collector: Collector, ledger: Ledger | None = None) -> None:
        self.settings = settings
        self.collector = collector
        self.ledger = ledger or Ledger()
        self._watch = Watch()
        self._name = object()
        """What this policy signs with: it does not keep it alive."""

    def limits(self, query: LimitsQuery) -> Limits:
        """What a request may have.

        Raises:
            ResourceLimitExceeded: it must not run, or not now.
        """
        info, loaded = _ask(query.model_info), _ask(query.loaded_models)
        size = self._listed_size(query, info) if info is not None else None
        with self.ledger.lock:
            state = self._gather(query, info, size, loaded)
            return state if isinstance(state, Limits) else self._decide(state)

    # --- What is the case --------------------------------------------------------------------------------------------

    def _listed_size(self, query: LimitsQuery, info: ModelInfo) -> int | None:
        """Bytes of a model by its server's list, which is asked once for each state of the model."""
        key = _key(server_of(query.provider, query.address), query.model)
        version = (key, info.digest, info.modified_at, info.size)
        if version not in self.ledger.listed:
            models = _ask(query.models)
            if models is None:
                return None
            with self.ledger.lock:
                remember(self.ledger.listed, version, listed_size(models, query.model, info.name))
        return self.ledger.listed.get(version)

    def _gather(
        self, query: LimitsQuery, info: ModelInfo | None, size: int | None, loaded: tuple[LoadedModel, ...] | None
    ) -> State | Limits:
        """Everything to decide on, or the answer where too little is known to decide."""
        static = self.collector.static()
        readings = self.collector.readings()
        rules = self._watch.rules(readings)
        budget = budget_of(static, readings, self.settings.profile)
        if budget is None:
            return _unreadable_mac_limits(self.settings)
        server = server_of(query.provider, query.address)
        self.ledger.register_usage(server, query.address, query.in_use)
        key = _key(server, query.model)
        shape = self._shape(key, info, size)
        if shape is None:
            return _unknown_model_limits(query, self.settings)
        reported = [self._plausible(server, each) for each in loaded or ()]
        slots = self._learn_slots(server, reported)
        residents = self._residents(server, query.address, None if loaded is None else reported, slots)
        current = residents.pop(key, None)
        others, beyond = _split_reachable(query, residents.values())
        elsewhere, coming = self._elsewhere(server)
        promise = self.ledger.promises.get(key, 0)
        if current is None or query.context_window or promise > (current.window or 0):
            # A load is decided on what is free now; 2 seconds ago another model may not have been there.
            readings = self.collector.readings(fresh=True)
        return State(
            query=query,
            key=key,
            shape=shape,
            budget=budget,
            readings=readings,
            memory=static.memory or budget.cap,
            chip=static.chip,
            rules=rules if loaded is not None else rules.combined(RESIDENTS_UNKNOWN),
            current=current,
            others=others,
            elsewhere=elsewhere + sum(each.size for each in beyond),
            coming_elsewhere=coming + sum(each.coming for each in beyond),
            slots=slots,
            promise=promise,
            odd=tuple(each.name for each, believed in zip(loaded or (), reported, strict=True) if each != believed),
            seen=loaded is not None,
            settings=self.settings,
        )

    def _shape(self, key: Key, info: ModelInfo | None, size: int | None) -> Shape | None:
        shape = read_shape(info, size) if info is not None else None
        if shape is not None:
            remember(self.ledger.shapes, key, shape)
        return self.ledger.shapes.get(key)

    def _plausible(self, server: Server, model: LoadedModel) -> LoadedModel:
        """What a server reports of a loaded model, without what cannot be."""
        shape = self.ledger.shapes.get(_key(server, model.name))
        longest = (shape.trained_window or 0) * MAX_STRETCH if shape is not None else 0
        window = count_of(model.context_window)
        return replace(
            model,
            size=count_of(model.size),
            accelerator_size=count_of(model.accelerator_size),
            context_window=window if window is not None and window <= (longest or MOST_NUMBER) else None,
        )

    def _learn_slots(self, server: Server, loaded: Iterable[LoadedModel]) -> int:
        """The server's parallel slots: as set, else no fewer than the size of a model gave away when last seen."""
        if self.settings.slots is not None:
            return self.settings.slots
        for each in loaded:
            key = _key(server, each.name)
            grant, shape = self.ledger.grants.get(key), self.ledger.shapes.get(key)
            window = each.context_window or (grant.window if grant else None)
            if shape is not None and shape.layers and not shape.embeds and window and each.size:
                remember(self.ledger.slots, key, self._slots_of(shape, window, each.size))
        return max((slots for key, slots in self.ledger.slots.items() if key[:2] == server), default=1)

    def _slots_of(self, shape: Shape, window: int, size: int) -> int:
        for slots in range(1, MAX_SLOTS + 1):
            if self.settings.footprint(shape, window, slots).counted >= size:
                return slots
        return 1  # So large that something else is amiss; the size itself counts anyway.

    def _residents(
        self, server: Server, address: str, loaded: list[LoadedModel] | None, slots: int
    ) -> dict[Key, Resident]:
        """Models in memory, and those that admitted requests are bringing there; `loaded` is None where unknown."""
        used = self.ledger.in_use(server)
        found: dict[Key, Resident] = {}
        for each in loaded or ():
            resident = self._resident(server, each, used, slots)
            before = found.get(resident.key, resident)
            found[resident.key] = max(before, resident, key=lambda one: one.size)
        for key, grant in list(self.ledger.grants.items()):
            if key[:2] != server or key in found:
                continue
            if key[2] in used or self._is_loading(grant, address):
                found[key] = _coming(key, grant)
            elif loaded is None and self._may_be_loaded(grant):
                found[key] = self._assumed(key, grant)
            elif loaded is not None:
                del self.ledger.grants[key]  # It has gone.
        return found

    def _is_loading(self, grant: Grant, address: str) -> bool:
        """Whether it was given this moment to somebody whose requests are counted by another address."""
        return grant.pending and grant.address != address and self.collector.clock() - grant.at < LOADING_TIME

    def _may_be_loaded(self, grant: Grant) -> bool:
        """Whether a model may still be in memory."""
        return self.collector.clock() - grant.at < LONGEST_CALL + grant.keep_alive

    def _assumed(self, key: Key, grant: Grant) -> Resident:
        """A model that may be in memory. Its bytes surely come back only while it surely is there."""
        there = self.collector.clock() - grant.at < grant.keep_alive
        return Resident(
            key=key,
            name=grant.name,
            size=grant.size,
            freed=max(grant.size - RUNTIME, 0) if there else 0,
            window=grant.window,
            expires=grant.at,
        )

    def _resident(self, server: Server, model: LoadedModel, used: set[str], slots: int) -> Resident:
        ledger, key = self.ledger, _key(server, model.name)
        grant, shape = ledger.grants.get(key), ledger.shapes.get(key)
        window = model.context_window or (grant.window if grant else None)
        reported = model.size or 0
        estimate = self.settings.footprint(shape, window, slots).total if shape is not None and window else 0
        loads = grant is not None and key[2] in used and (window or 0) < grant.window
        if grant is not None and grant.pending and not loads:
            ledger.grants[key] = replace(grant, pending=False)
        # `/api/ps` counts too little for sliding windows: it is a floor, and never the truth. What is in use may be
        # about to be loaded again with what it was given.
        size = max(estimate, reported + RUNTIME, grant.size if grant and key[2] in used else 0)
        on_cpu = bool(reported) and model.accelerator_size is not None and model.accelerator_size < reported
        if on_cpu:
            ledger.on_cpu.add(key)
        return Resident(
            key=key,
            name=model.name,
            size=size,
            freed=reported,
            coming=max(size - reported, 0) if loads else 0,
            window=window,
            busy=key[2] in used,
            expires=_expiry(model.expires_at),
            small=bool(shape and shape.embeds) and size <= SMALL_EMBEDDING + RUNTIME,
            on_cpu=on_cpu,
        )

    def _elsewhere(self, here: Server) -> tuple[int, int]:
        """Bytes of models that other servers of this Mac were given and may still have; and those not taken yet.

        A policy that acts as another Mac does not count idle models of another such policy: their server may be gone.
        """
        total = coming = 0
        for key, grant in self.ledger.grants.items():
            if key[:2] == here:
                continue
            busy = key[2] in self.ledger.in_use(key[:2])
            known = self.settings.machine is None or grant.by is self._name
            if busy or (known and self._may_be_loaded(grant)):
                total += grant.size
                coming += grant.size if busy and grant.pending else 0
        return total, coming

    # --- What follows ------------------------------------------------------------------------------------------------

    def _decide(self, state: State) -> Limits:
        plan = self._plan(state)
        if not plan.loads and state.rules.drop_idle:
            plan = replace(plan, unload=tuple(state.idle))
        return self._limits(state, plan)

    def _plan(self, state: State) -> Plan:
        """A loaded model keeps its window, unless the caller or an earlier promise wants more and that fits."""
        wanted = self._wanted(state)
        current = state.current
        if current is None or current.window is None:
            return self._plan_load(state, wanted, promised=state.promise == wanted)
        if wanted < current.window and (state.query.force or state.rules.steps or state.rules.window):
            return Plan(window=wanted)  # As asked: memory is short, and the server gives some back for it.
        grown = self._plan_larger(state, current.window, wanted) if wanted > current.window else None
        return grown or Plan(window=current.window, loads=False)

    def _wanted(self, state: State) -> int:
        """The window to give: as asked, else as promised, else what can be read in good time."""
        if state.query.context_window is not None:
            return self._trained(state, state.query.context_window)
        has = state.current.window if state.current else None
        if has or state.promise:
            return max(has or 0, state.promise)
        readable = readable_window(state.shape, state.chip, self.settings.prefill_seconds)
        needed = -(-(state.query.prompt_characters or 0) // CHARACTERS_PER_TOKEN)
        needed += state.query.max_tokens or ROOM_FOR_ANSWER
        most = min(readable or LADDER[-1], LADDER[-1] if state.shape.trained_window else MAX_UNTRAINED)
        usual = max([step for step in LADDER if step <= most], default=LADDER[0])
        enough = next((step for step in LADDER if step >= needed), LADDER[-1])
        return self._trained(state, max(usual, enough))

    @staticmethod
    def _trained(state: State, window: int) -> int:
        return min(window, state.shape.trained_window or MOST_NUMBER)

    def _plan_load(self, state: State, wanted: int, *, promised: bool = False) -> Plan:
        """How to load a model: the largest window first, and the fewest idle models out of memory for it.

        Args:
            state: what is the case.
            wanted: the window to begin with.
            promised: its conversations have that window: rather wait than take it from them.

        Raises:
            ResourceLimitExceeded: not now, or not at all.
        """
        if state.query.force:
            return self._plan_forced(state, wanted)
        if state.rules.refuse:
            raise not_now(state)
        windows = _steps_down(self._lowered(state, wanted), min(self.settings.minimum_window, wanted))
        for window in windows:
            gone = _fewest_to_unload(state, window)
            if gone is not None:
                return self._limit_models(state, Plan(window=window, unload=gone))
            if promised and state.fits(window, state.others):
                return _plan_waiting(state, window)
        for window in windows:
            if state.fits(window, state.others):
                return _plan_waiting(state, window)
        raise self._too_large(state, windows[-1])

    def _plan_larger(self, state: State, has: int, wanted: int) -> Plan | None:
        """A larger window for a loaded model; `None` where it cannot have one now."""
        if state.query.force:
            return self._plan_forced(state, wanted)
        if state.rules.refuse:
            return None
        for window in _steps_down(self._lowered(state, wanted), has):
            gone = _fewest_to_unload(state, window)
            if window > has and gone is not None:
                return Plan(window=window, unload=gone)
        return None

    def _plan_forced(self, state: State, wanted: int) -> Plan:
        """What the caller wants; whatever is idle goes, and the reply says what would have been refused."""
        refused = None
        if state.rules.refuse:
            refused = not_now(state).message
        elif not state.fits(wanted, state.idle):
            refused = self._too_large(state, wanted).message
        gone = tuple(state.idle) if refused else _fewest_to_unload(state, wanted) or ()
        return Plan(window=wanted, unload=gone, forced=refused)

    def _too_large(self, state: State, window: int) -> ResourceLimitExceeded:
        shapes = self.ledger.shapes
        known = {key[2]: shape for key, shape in shapes.items() if key[:2] == state.key[:2] and key != state.key}
        return too_large(state, window, known)

    def _lowered(self, state: State, wanted: int) -> int:
        """The window after what the state of the Mac, and of the model's last load, takes from it."""
        lower = [step for step in LADDER if step < wanted]
        window = wanted
        for _ in range(state.rules.steps + (state.key in self.ledger.on_cpu)):
            window = lower.pop() if lower else window
        return min(window, state.rules.window or window)

    def _limit_models(self, state: State, plan: Plan) -> Plan:
        """Let more idle models go where too many would be loaded; wait for busy ones only where memory is short."""
        allowed = self._loaded_models(state)
        leaving = {each.key for each in plan.unload}
        stay = {each.key: each for each in state.others if each.key not in leaving and not each.small}
        surplus = [each for each in state.idle if each.key in stay][: max(len(stay) + 1 - allowed, 0)]
        for each in surplus:
            del stay[each.key]
        short = state.rules.loaded is not None and len(stay) + 1 > allowed
        wait_for = tuple(each.name for each in stay.values()) if short else ()
        return replace(plan, unload=(*plan.unload, *surplus), wait_for=wait_for)

    def _loaded_models(self, state: State) -> int:
        usual = _below(MAX_LOADED, state.memory / GIB)
        return min(usual, state.rules.loaded or usual)

    # --- Answers -----------------------------------------------------------------------------------------------------

    def _limits(self, state: State, plan: Plan) -> Limits:
        keep = self._keep_alive(state)
        concurrency, why_concurrency = self._concurrency(state, plan)
        if not plan.wait_for:
            self._record_grant(state, plan, keep)
        rules = state.rules
        return Limits(
            context_window=plan.window,
            concurrent_requests=concurrency,
            queued_requests=self.settings.queued_requests,
            loaded_models=self._loaded_models(state),
            keep_alive=keep,
            keep_window=not plan.loads,
            unload=tuple(each.name for each in plan.unload),
            wait_for=plan.wait_for,
            reasons={
                "context_window": self._window_reason(state, plan),
                "concurrent_requests": why_concurrency,
                "queued_requests": QUEUE_REASON,
                "loaded_models": rules.description or f"{gb(state.memory)} of memory",
                "keep_alive": rules.description
                if rules.keep_alive is not None
                else "what the model takes of the budget",
            },
            warnings=self._warnings(state, plan),
        )

    def _record_grant(self, state: State, plan: Plan, keep: float) -> None:
        """Remember what was given. Who asks for less than others have does not take it from them."""
        ledger, current = self.ledger, state.current
        before = ledger.grants.get(state.key)
        window, size = plan.window, state.footprint(plan.window).total
        if current is not None:
            size = max(size, current.size)
            if state.query.context_window is not None:
                window = max(window, current.window or 0, before.window if before else 0)
        grant = Grant(
            name=state.query.model,
            address=state.query.address,
            by=self._name,
            window=window,
            size=size,
            at=self.collector.clock(),
            keep_alive=keep,
            pending=plan.loads or bool(current and current.coming),
        )
        for each in plan.unload:
            ledger.grants.pop(each.key, None)
        remember(ledger.grants, state.key, grant)
        remember(ledger.promises, state.key, max(plan.window, state.promise))
        if plan.loads:
            ledger.on_cpu.discard(state.key)

    def _window_reason(self, state: State, plan: Plan) -> str:
        asked = state.query.context_window or 0
        if not plan.loads:
            larger = ", and a larger one does not fit now" if asked > plan.window else ""
            return f"the model is loaded with it{larger}"
        if asked > (state.shape.trained_window or asked) == plan.window:
            return f"the model was trained for {plan.window}"
        room = state.room(plan.unload)
        words = f"{gb(state.footprint(plan.window).total)} of {gb(room.bytes)}"
        words += f" ({state.budget.description})" if room.binding == "budget" else " that are free"
        return f"{words}; {state.rules.description}" if state.rules.description else words

    def _concurrency(self, state: State, plan: Plan) -> tuple[int, str]:
        """Requests at once, and why: each slot of a server holds a window of its own."""
        if state.rules.concurrency is not None:
            return state.rules.concurrency, state.rules.description
        if state.current is not None and state.current.on_cpu:
            return 1, "part of the model runs on the CPU"
        room = max(state.room(plan.unload, loading=False).static, 0)
        most = _below(MAX_CONCURRENCY, state.memory / GIB)
        fitting = [slots for slots in range(2, most + 1) if state.footprint(plan.window, slots).total <= room]
        count = max(fitting, default=1)
        return count, f"{count} windows of {plan.window} tokens fit into {gb(room)}"

    def _keep_alive(self, state: State) -> float:
        minutes = _below(MINUTES, state.memory / GIB)
        usual = 60.0 * minutes[sum(state.shape.weights >= bound for bound in CLASSES)]
        return usual if state.rules.keep_alive is None else min(usual, state.rules.keep_alive)

    def _warnings(self, state: State, plan: Plan) -> tuple[str, ...]:
        query, window = state.query, plan.window
        notes = [*state.budget.warnings]
        if plan.forced is not None:
            notes.append(f"`force` overrode a refusal of the policy `m4`: {plan.forced}")
        notes += [*_window_warning(state, plan), *_budget_warning(state, plan), *_doubt_warnings(state)]
        if not state.rules.measured:
            notes.append("The memory pressure could not be measured; the limits are those of the machine alone.")
        if state.current is not None and state.current.on_cpu:
            notes.append(f"Part of `{query.model}` runs on the CPU: it was too large when it was loaded.")
        needed = (query.prompt_characters or 0) // (CHARACTERS_PER_TOKEN + 1)
        if query.context_window is None and needed > window:
            notes.append(f"The prompt may not fit the window of {window} tokens; ask for `context_window={needed}`.")
        return (*notes, *state.shape.notes) if plan.forced else tuple(notes)


def _window_warning(state: State, plan: Plan) -> Iterator[str]:
    """What to say of a window that is not the one its conversations had: to each of them, for one may not listen."""
    loaded = (state.current.window if state.current else None) or 0
    had, asked = max(loaded, state.promise), state.query.context_window
    name, window = state.query.model, plan.window
    again = bool(plan.loads and loaded)
    if not had or window == had or plan.wait_for or (asked is not None and asked <= window and not again):
        return
    why = "as asked" if asked == window else state.rules.description or "as much as fits now"
    yield f"The window of `{name}` is {window} instead of {had}, {why}{': the server loads it again' if again else ''}."


def _budget_warning(state: State, plan: Plan) -> Iterator[str]:
    """What to say while models have more than they may, as after a call with `force`."""
    has = state.resident - sum(each.size for each in plan.unload)
    if not plan.loads and has > state.budget.static:
        yield (
            f"Models have {gb(has)}, and may have {gb(state.budget.static)}: the Mac may freeze. "
            "Unload one, or have it loaded with a smaller window."
        )


def _doubt_warnings(state: State) -> Iterator[str]:
    """What to say of a server that does not report everything, or reports what cannot be."""
    if not state.seen:
        yield "The server does not report what it has in memory: one model is used at a time."
    if state.shape.estimated:
        yield f"The server does not report the size of `{state.query.model}`: {state.shape.notes[0]}."
    if state.shape.odd:
        yield f"What is reported of `{state.query.model}` is odd, and not believed: {', '.join(state.shape.odd)}."
    if state.odd:
        names = ", ".join(map(repr, state.odd[:MAX_NAMED]))
        yield f"The server reports odd figures for what it has in memory, which are not believed: {names}."


def _unknown_model_limits(query: LimitsQuery, settings: M4Settings) -> Limits:
    """Limits of a model that cannot be weighed: little is risked with it."""
    why = f"the size of `{query.model}` is not known"
    return Limits(
        context_window=LADDER[0] if query.context_window is None else None,
        concurrent_requests=1,
        queued_requests=settings.queued_requests,
        reasons={"context_window": why, "concurrent_requests": why, "queued_requests": QUEUE_REASON},
        warnings=(f"The footprint of `{query.model}` is not known: nothing that was asked is lowered or refused.",),
    )


def _unreadable_mac_limits(settings: M4Settings) -> Limits:
    """Limits of a Mac of which neither the memory nor Metal's share is known."""
    why = "neither the memory of this Mac nor Metal's share of it could be read"
    return Limits(
        concurrent_requests=1,
        queued_requests=settings.queued_requests,
        loaded_models=1,
        keep_alive=ALIVE,
        reasons={
            "concurrent_requests": why,
            "queued_requests": QUEUE_REASON,
            "loaded_models": why,
            "keep_alive": why,
        },
        warnings=(f"No window was limited: {why}.",),
    )


def _coming(key: Key, grant: Grant) -> Resident:
    """A model that an admitted request is bringing into memory."""
    return Resident(
        key=key,
        name=grant.name,
        size=grant.size,
        coming=grant.size,
        window=grant.window,
        loading=True,
        busy=True,
    )


def _split_reachable(query: LimitsQuery, others: Iterable[Resident]) -> tuple[tuple[Resident, ...], list[Resident]]:
    """The other models that the core can unload or wait for, and those that it cannot.

    It knows no model that is used by another address of the server, or that has no name.
    """
    known = {canonical_name(model) for model, count in query.in_use().items() if count > 0}
    reach: list[Resident] = []
    beyond: list[Resident] = []
    for each in others:
        (reach if each.name and (not each.busy or each.key[2] in known) else beyond).append(each)
    return tuple(reach), beyond


def _plan_waiting(state: State, window: int) -> Plan:
    """A window that fits once those that work now are done."""
    return Plan(
        window=window,
        unload=tuple(state.idle),
        wait_for=tuple(each.name for each in state.others if each.busy),
    )


def _fewest_to_unload(state: State, window: int) -> tuple[Resident, ...] | None:
    """The fewest idle models that must go for a window to fit; `None` where not even all of them suffice."""
    idle = state.idle
    counts = range(len(idle) if state.rules.drop_idle else 0, len(idle) + 1)
    # The more are gone the more fits, so the fewest are found by halving: a server may list thousands.
    found = bisect_left(counts, True, key=lambda count: state.fits(window, idle[:count]))
    return tuple(idle[: counts[found]]) if found < len(counts) else None


def _steps_down(window: int, least: int) -> list[int]:
    """That window, then those of the ladder below it, none below the least."""
    steps = [step for step in reversed(LADDER) if least <= step < window]
    return [window, *steps, *([least] if least < min([window, *steps]) else [])]


def _below(table: Sequence[tuple[float, T]], value: float) -> T:
    """The entry of the first row whose bound lies above the value."""
    return next(entry for bound, entry in table if value < bound)


def _ask(ask: Callable[[], T]) -> T | None:
    """What a provider reports; nothing if it cannot. One that is not there fails the call as it would anyway."""
    try:
        return ask()
    except ConnectionFailed:
        raise
    except GraftageError:
        return None


def _key(server: Server, model: str) -> Key:
    return *server, canonical_name(model)


def _expiry(moment: datetime | None) -> float:
    try:
        return float("inf") if moment is None else moment.timestamp()
    except (OverflowError, ValueError, OSError):  # A year without a time zone at either end of the calendar.
        return 0.0
