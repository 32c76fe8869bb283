"""The policy: what a request may use of this Mac, with the reason for each number, or why it is refused."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from math import inf
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
    Route,
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
"""Windows that a model gets if the caller asks for none."""
MAX_UNTRAINED: Final = 8192
"""The longest default window of a model that does not state what it was trained for."""
SMALL_EMBEDDING: Final = 500_000_000
"""Bytes: an embedding model below this does not count as a loaded model."""
MAX_SLOTS: Final = 16
CHARACTERS_PER_TOKEN: Final = 3
"""Low, so that the length of a prompt is overestimated."""
ROOM_FOR_ANSWER: Final = 1024
LONGEST_CALL: Final = 600.0
"""Seconds: the default limit on a whole call; the `keep_alive` of a model starts when its call ends."""
LOADING_TIME: Final = 60.0
"""Seconds for which a model that was granted through another route to the server is assumed to be still loading."""
MAX_STRETCH: Final = 8
"""A reported window longer than this many times what the model was trained for is not believed."""
MAX_NAMED: Final = 5
QUEUE_REASON: Final = "more requests would not finish before their callers give up"

CLASSES: Final = (3.3e9, 5.8e9, 10e9, 15.5e9, 22e9)
"""Bytes of weights below which a model is of the 4B, 8B, 14B, 20B, 32B and 70B class."""
MINUTES: Final = (
    (20, (10, 5, 2, 2, 2, 2)),
    (28, (30, 15, 10, 5, 5, 5)),
    (40, (30, 30, 15, 10, 5, 5)),
    (56, (60, 60, 60, 60, 30, 10)),
    (inf, (60, 60, 60, 60, 60, 10)),
)
"""Minutes that a model stays, by memory (below so many gigabytes) and class."""
MAX_CONCURRENCY: Final = ((28, 2), (inf, 4))
"""The most requests at once, by memory."""
MAX_LOADED: Final = ((20, 1), (40, 2), (inf, 3))
"""The most models in memory, by memory; 3 is Ollama's own limit on a Mac."""

T = TypeVar("T")


class Policy:
    """Decides about requests, one by one. Safe for threads."""

    def __init__(self, settings: M4Settings, collector: Collector, ledger: Ledger | None = None) -> None:
        self.settings = settings
        self.collector = collector
        self.ledger = ledger or Ledger()
        self._watch = Watch()
        self._signature = object()
        """Marks this policy's grants without keeping it alive."""

    def limits(self, query: LimitsQuery) -> Limits:
        """Return what a request may use.

        Raises:
            ResourceLimitExceeded: it cannot run, or not now.
        """
        info, loaded = _ask(query.model_info), _ask(query.loaded_models)
        size = self._listed_size(query, info) if info is not None else None
        with self.ledger.lock:
            state = self._gather(query, info, size, loaded)
            return state if isinstance(state, Limits) else self._decide(state)

    # --- Gather ------------------------------------------------------------------------------------------------------

    def _listed_size(self, query: LimitsQuery, info: ModelInfo) -> int | None:
        """Return the size of a model from its server's list, which is read once for each version of the model."""
        key = _key(server_of(query.address), query.model)
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
        """Gather everything to decide on; return limits at once if too little is known."""
        static = self.collector.static()
        readings = self.collector.readings()
        rules = self._watch.rules(readings)
        budget = budget_of(static, readings, self.settings.profile)
        if budget is None:
            return _unreadable_mac_limits(self.settings)
        server = server_of(query.address)
        route = (query.provider, query.address)
        self.ledger.register_usage(server, route, query.in_use)
        key = _key(server, query.model)
        shape = self._shape(key, info, size)
        if shape is None:
            return _unknown_model_limits(query, self.settings)
        reported = [self._plausible(server, each) for each in loaded or ()]
        slots = self._learn_slots(server, reported)
        residents = self._residents(server, route, None if loaded is None else reported, slots)
        current = residents.pop(key, None)
        others, beyond = _split_reachable(query, residents.values())
        elsewhere, coming = self._elsewhere(server)
        promise = self.ledger.promises.get(key, 0)
        if current is None or query.context_window or promise > (current.window or 0):
            # Another model may have been loaded since memory was last read.
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
            keeps="keep_alive" not in (query.parameters or {"keep_alive"}),
            settings=self.settings,
        )

    def _shape(self, key: Key, info: ModelInfo | None, size: int | None) -> Shape | None:
        shape = read_shape(info, size) if info is not None else None
        if shape is not None:
            remember(self.ledger.shapes, key, shape)
        return self.ledger.shapes.get(key)

    def _plausible(self, server: Server, model: LoadedModel) -> LoadedModel:
        """Drop impossible figures from what a server reports of a loaded model."""
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
        """Return the server's parallel slots: as set, else as derived from the sizes of its loaded models."""
        if self.settings.slots is not None:
            return self.settings.slots
        for each in loaded:
            key = _key(server, each.name)
            grant, shape = self.ledger.grants.get(key), self.ledger.shapes.get(key)
            window = each.context_window or (grant.window if grant else None)
            if shape is not None and shape.layers and not shape.embeds and window and each.size:
                remember(self.ledger.slots, key, self._slots_of(shape, window, each.size))
        return max((slots for key, slots in self.ledger.slots.items() if key[0] == server), default=1)

    def _slots_of(self, shape: Shape, window: int, size: int) -> int:
        for slots in range(1, MAX_SLOTS + 1):
            if self.settings.footprint(shape, window, slots).counted >= size:
                return slots
        return 1  # No number of slots explains the size; the size itself counts anyway.

    def _residents(
        self, server: Server, route: Route, loaded: list[LoadedModel] | None, slots: int
    ) -> dict[Key, Resident]:
        """Return the models in memory and those being loaded by admitted requests; `loaded` is None if unknown."""
        used = self.ledger.in_use(server)
        found: dict[Key, Resident] = {}
        for each in loaded or ():
            resident = self._resident(server, each, used, slots)
            before = found.get(resident.key, resident)
            found[resident.key] = max(before, resident, key=lambda one: one.size)
        for key, grant in list(self.ledger.grants.items()):
            if key[0] != server or key in found:
                continue
            if key[1] in used or self._is_loading(grant, route):
                found[key] = _loading(key, grant)
            elif loaded is None and self._may_be_loaded(grant):
                found[key] = self._assumed(key, grant)
            elif loaded is not None:
                del self.ledger.grants[key]
        return found

    def _is_loading(self, grant: Grant, route: Route) -> bool:
        """Return whether a model was just granted through another route to the server."""
        return grant.pending and grant.route != route and self.collector.clock() - grant.at < LOADING_TIME

    def _may_be_loaded(self, grant: Grant) -> bool:
        """Return whether a model may still be in memory."""
        return self.collector.clock() - grant.at < LONGEST_CALL + grant.keep_alive

    def _assumed(self, key: Key, grant: Grant) -> Resident:
        """Describe a model that may be in memory; unloading it surely frees bytes only during its `keep_alive`."""
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
        loads = grant is not None and key[1] in used and (window or 0) < grant.window
        if grant is not None and grant.pending and not loads:
            ledger.grants[key] = replace(grant, pending=False)
        # `/api/ps` counts too little for sliding windows, so it is only a lower bound. A model in use may be about to
        # be reloaded with the window it was granted.
        size = max(estimate, reported + RUNTIME, grant.size if grant and key[1] in used else 0)
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
            busy=key[1] in used,
            expires=_expiry(model.expires_at),
            small=bool(shape and shape.embeds) and size <= SMALL_EMBEDDING + RUNTIME,
            on_cpu=on_cpu,
        )

    def _elsewhere(self, here: Server) -> tuple[int, int]:
        """Return the bytes granted to models of other servers on this Mac, and how many of them are not taken yet.

        With a machine file, idle models granted by other policies do not count: their servers may be gone.
        """
        total = coming = 0
        for key, grant in self.ledger.grants.items():
            if key[0] == here:
                continue
            busy = key[1] in self.ledger.in_use(key[0])
            known = self.settings.machine is None or grant.by is self._signature
            if busy or (known and self._may_be_loaded(grant)):
                total += grant.size
                coming += grant.size if busy and grant.pending else 0
        return total, coming

    # --- Decide ------------------------------------------------------------------------------------------------------

    def _decide(self, state: State) -> Limits:
        plan = self._plan(state)
        if not plan.loads and state.rules.drop_idle:
            plan = replace(plan, unload=tuple(state.idle))
        return self._limits(state, plan)

    def _plan(self, state: State) -> Plan:
        """Keep a loaded model's window, unless the caller or an earlier promise wants more and that fits."""
        wanted = self._wanted(state)
        current = state.current
        if current is None or current.window is None:
            return self._plan_load(state, wanted, promised=state.promise == wanted)
        if wanted < current.window and (state.query.force or state.rules.steps or state.rules.window):
            return Plan(window=wanted)  # Memory is short, and a smaller window frees some.
        grown = self._plan_larger(state, current.window, wanted) if wanted > current.window else None
        return grown or Plan(window=current.window, loads=False)

    def _wanted(self, state: State) -> int:
        """Return the window to aim at: as requested, else as promised, else as long as can be read in time."""
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
        """Plan a load: the largest window that fits, unloading as few idle models as possible.

        Args:
            state: everything to decide on.
            wanted: the window to aim at.
            promised: whether conversations already have that window; if so, wait for it rather than plan a smaller one.

        Raises:
            ResourceLimitExceeded: the model does not fit, or cannot be loaded now.
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
        """Plan a larger window for a loaded model; return `None` if none fits now."""
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
        """Plan what the caller forces: unload all idle models if needed, and keep the refusal for the reply."""
        refused = None
        if state.rules.refuse:
            refused = not_now(state).message
        elif not state.fits(wanted, state.idle):
            refused = self._too_large(state, wanted).message
        gone = tuple(state.idle) if refused else _fewest_to_unload(state, wanted) or ()
        return Plan(window=wanted, unload=gone, forced=refused)

    def _too_large(self, state: State, window: int) -> ResourceLimitExceeded:
        shapes = self.ledger.shapes
        known = {key[1]: shape for key, shape in shapes.items() if key[0] == state.key[0] and key != state.key}
        return too_large(state, window, known)

    def _lowered(self, state: State, wanted: int) -> int:
        """Lower a window by what the Mac's pressure and the model's last load demand."""
        lower = [step for step in LADDER if step < wanted]
        window = wanted
        for _ in range(state.rules.steps + (state.key in self.ledger.on_cpu)):
            window = lower.pop() if lower else window
        return min(window, state.rules.window or window)

    def _limit_models(self, state: State, plan: Plan) -> Plan:
        """Unload more idle models if too many would be loaded; wait for busy ones only if memory is short."""
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

    # --- Limits ------------------------------------------------------------------------------------------------------

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
                "keep_alive": rules.description if rules.keep_alive is not None else "the size of the model",
            },
            warnings=self._warnings(state, plan),
        )

    def _record_grant(self, state: State, plan: Plan, keep: float) -> None:
        """Remember what was granted; a smaller request does not shrink what others were granted."""
        ledger, current = self.ledger, state.current
        before = ledger.grants.get(state.key)
        window, size = plan.window, state.footprint(plan.window).total
        if current is not None:
            size = max(size, current.size)
            if state.query.context_window is not None:
                window = max(window, current.window or 0, before.window if before else 0)
        grant = Grant(
            name=state.query.model,
            route=(state.query.provider, state.query.address),
            by=self._signature,
            window=window,
            size=size,
            at=self.collector.clock(),
            keep_alive=inf if state.keeps else keep,
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
            return f"the model is loaded with this window{larger}"
        if asked > (state.shape.trained_window or asked) == plan.window:
            return f"the model was trained for {plan.window}"
        room = state.room(plan.unload)
        words = f"{gb(state.footprint(plan.window).total)} of {gb(room.bytes)}"
        words += f" ({state.budget.description})" if room.binding == "budget" else " that are free"
        return f"{words}; {state.rules.description}" if state.rules.description else words

    def _concurrency(self, state: State, plan: Plan) -> tuple[int, str]:
        """Return how many requests may run at once, and why: each slot of a server holds its own window."""
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
            notes.append("The memory pressure could not be measured; the limits follow from the size of the Mac alone.")
        if state.current is not None and state.current.on_cpu:
            notes.append(f"Part of `{query.model}` runs on the CPU: it was too large when it was loaded.")
        needed = (query.prompt_characters or 0) // (CHARACTERS_PER_TOKEN + 1)
        if query.context_window is None and needed > window:
            notes.append(f"The prompt may not fit the window of {window} tokens; ask for `context_window={needed}`.")
        return (*notes, *state.shape.notes) if plan.forced else tuple(notes)


def _window_warning(state: State, plan: Plan) -> Iterator[str]:
    """Warn, in every reply, of a window that differs from the one that conversations had."""
    loaded = (state.current.window if state.current else None) or 0
    had, asked = max(loaded, state.promise), state.query.context_window
    name, window = state.query.model, plan.window
    again = bool(plan.loads and loaded)
    if not had or window == had or plan.wait_for or (asked is not None and asked <= window and not again):
        return
    why = "as asked" if asked == window else state.rules.description or "as much as fits now"
    yield f"The window of `{name}` is {window} instead of {had}, {why}{': the server loads it again' if again else ''}."


def _budget_warning(state: State, plan: Plan) -> Iterator[str]:
    """Warn while models exceed the budget, as after a call with `force`."""
    has = state.resident - sum(each.size for each in plan.unload)
    if not plan.loads and has > state.budget.static:
        yield (
            f"Models use {gb(has)}, more than their budget of {gb(state.budget.static)}: the Mac may freeze. "
            "Unload one, or load it with a smaller window."
        )


def _doubt_warnings(state: State) -> Iterator[str]:
    """Warn of missing and impossible figures of a server."""
    if not state.seen:
        what = "what is free now is not compared" if state.keeps else "one model is used at a time"
        yield f"The server does not report which models are loaded: {what}."
    if state.shape.estimated:
        yield f"The server does not report the size of `{state.query.model}`: {state.shape.notes[0]}."
    if state.shape.odd:
        yield f"Impossible figures of `{state.query.model}` are ignored: {', '.join(state.shape.odd)}."
    if state.odd:
        names = ", ".join(map(repr, state.odd[:MAX_NAMED]))
        yield f"Impossible figures of loaded models are ignored: {names}."


def _unknown_model_limits(query: LimitsQuery, settings: M4Settings) -> Limits:
    """Return cautious limits for a model of unknown size."""
    why = f"the size of `{query.model}` is not known"
    return Limits(
        context_window=LADDER[0] if query.context_window is None else None,
        concurrent_requests=1,
        queued_requests=settings.queued_requests,
        reasons={"context_window": why, "concurrent_requests": why, "queued_requests": QUEUE_REASON},
        warnings=(f"The size of `{query.model}` is not known: nothing requested is lowered or refused.",),
    )


def _unreadable_mac_limits(settings: M4Settings) -> Limits:
    """Return cautious limits for a Mac whose memory and Metal share are both unknown."""
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


def _loading(key: Key, grant: Grant) -> Resident:
    """Describe a model that an admitted request is loading."""
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
    """Split other models into those that the core can unload or wait for, and those that it cannot.

    The core does not know models that are used through another route to the server, or that have no name.
    """
    known = {canonical_name(model) for model, count in query.in_use().items() if count > 0}
    reach: list[Resident] = []
    beyond: list[Resident] = []
    for each in others:
        (reach if each.name and (not each.busy or each.key[1] in known) else beyond).append(each)
    return tuple(reach), beyond


def _plan_waiting(state: State, window: int) -> Plan:
    """Plan a window that fits once the busy models are done."""
    return Plan(
        window=window,
        unload=tuple(state.idle),
        wait_for=tuple(each.name for each in state.others if each.busy),
    )


def _fewest_to_unload(state: State, window: int) -> tuple[Resident, ...] | None:
    """Return the fewest idle models to unload for a window to fit; `None` if all of them are not enough."""
    idle = state.idle
    counts = range(len(idle) if state.rules.drop_idle else 0, len(idle) + 1)
    # Bisect: a server may list thousands of models.
    found = bisect_left(counts, True, key=lambda count: state.fits(window, idle[:count]))
    return tuple(idle[: counts[found]]) if found < len(counts) else None


def _steps_down(window: int, least: int) -> list[int]:
    """Return a window, then the smaller ones of the ladder, down to the least."""
    steps = [step for step in reversed(LADDER) if least <= step < window]
    return [window, *steps, *([least] if least < min([window, *steps]) else [])]


def _below(table: Sequence[tuple[float, T]], value: float) -> T:
    """Return the entry of the first row whose bound lies above the value."""
    return next(entry for bound, entry in table if value < bound)


def _ask(ask: Callable[[], T]) -> T | None:
    """Return what a provider reports, `None` if it cannot; an unreachable one fails the call anyway."""
    try:
        return ask()
    except ConnectionFailed:
        raise
    except GraftageError:
        return None


def _key(server: Server, model: str) -> Key:
    return server, canonical_name(model)


def _expiry(moment: datetime | None) -> float:
    try:
        return inf if moment is None else moment.timestamp()
    except (OverflowError, ValueError, OSError):  # A year without a time zone at either end of the calendar.
        return 0.0
