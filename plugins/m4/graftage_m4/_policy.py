"""The policy: what a request may have of this Mac, with the reason for each number, or why not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Final, TypeVar

from graftage.exceptions import ConnectionFailed, GraftageError, ResourceLimitExceeded
from graftage.types import Limits
from graftage_m4._footprint import GIB, RUNTIME, Footprint, Shape, footprint, read_shape
from graftage_m4._machine import budget_of, gb
from graftage_m4._reactions import Watch
from graftage_m4._readings import Collector
from graftage_m4._refusal import not_now, too_large
from graftage_m4._scene import ALIVE, Grant, Key, Plan, Resident, Scene
from graftage_m4._speed import readable_window

if TYPE_CHECKING:
    from graftage.types import LimitsQuery, LoadedModel, ModelInfo
    from graftage_m4._settings import M4Settings

__all__ = ["LADDER", "Policy"]

LADDER: Final = (4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144)
"""Windows that a model gets where nobody asked for another."""
SMALL_EMBEDDING: Final = 500_000_000
"""Bytes: an embedding model below this does not count as a loaded model."""
MOST_SLOTS: Final = 16
CHARACTERS_PER_TOKEN: Final = 3
"""So few that a prompt is thought longer than it is."""
ROOM_FOR_ANSWER: Final = 1024
LONGEST_CALL: Final = 600.0
"""Seconds: the default limit on a whole call, after which a model's time in memory begins anew."""
MOST_REMEMBERED: Final = 512
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
TOGETHER: Final = ((28, 2), (float("inf"), 4))
"""Requests at once at most, by gigabytes of memory below."""
LOADED: Final = ((20, 1), (40, 2), (float("inf"), 3))
"""Models in memory, by gigabytes of memory below; 3 is Ollama's own limit on a Mac."""

T = TypeVar("T")


class Policy:
    """Decides about requests, one after the other. Safe for threads."""

    def __init__(self, settings: M4Settings, collector: Collector) -> None:
        self.settings = settings
        self.collector = collector
        self._watch = Watch()
        self._grants: dict[Key, Grant] = {}
        self._shapes: dict[Key, Shape] = {}
        self._slots: dict[tuple[str, str], int] = {}
        self._on_cpu: set[Key] = set()
        self._in_use: dict[tuple[str, str], Callable[[], Mapping[str, int]]] = {}
        """For each server, which models requests use; its gate lives as long as the process."""
        self._lock = threading.Lock()

    def limits(self, query: LimitsQuery) -> Limits:
        """What a request may have.

        Raises:
            ResourceLimitExceeded: it must not run, or not now.
        """
        info, loaded = _told(query.model_info), _told(query.loaded_models)
        with self._lock:
            scene = self._scene(query, info, loaded)
            return scene if isinstance(scene, Limits) else self._decide(scene)

    # --- What is the case --------------------------------------------------------------------------------------------

    def _scene(
        self, query: LimitsQuery, info: ModelInfo | None, loaded: tuple[LoadedModel, ...] | None
    ) -> Scene | Limits:
        """Everything to decide on, or the answer where too little is known to decide."""
        static = self.collector.static()
        readings = self.collector.readings()
        rules = self._watch.rules(readings)
        budget = budget_of(static, readings, self.settings.profile)
        if budget is None:
            return _unmeasured(self.settings)
        key = _key(query, query.model)
        shape = self._shape(key, info)
        if shape is None:
            return _of_unknown(query, self.settings)
        slots = self._learned_slots(query, loaded)
        everyone = {each.key: each for each in self._residents(query, loaded, slots)}
        mine = everyone.pop(key, None)
        elsewhere, coming = self._elsewhere(query)
        grant = self._grants.get(key)
        if mine is None or query.context_window or (grant is not None and grant.window != mine.window):
            # A load is decided on what is free now; 2 seconds ago another model may not have been there.
            readings = self.collector.readings(fresh=True)
        return Scene(
            query=query,
            key=key,
            shape=shape,
            budget=budget,
            readings=readings,
            memory=static.memory or budget.cap,
            chip=static.chip,
            rules=rules,
            mine=mine,
            others=tuple(everyone.values()),
            elsewhere=elsewhere,
            coming_elsewhere=coming,
            slots=slots,
            settings=self.settings,
        )

    def _shape(self, key: Key, info: ModelInfo | None) -> Shape | None:
        shape = read_shape(info) if info is not None else None
        if shape is not None:
            _remember(self._shapes, key, shape)
        return self._shapes.get(key)

    def _learned_slots(self, query: LimitsQuery, loaded: tuple[LoadedModel, ...] | None) -> int:
        """The server's parallel slots: as set, else no fewer than a loaded model's size gives away."""
        if self.settings.slots is not None:
            return self.settings.slots
        server = (query.provider, query.address)
        for each in loaded or ():
            key = _key(query, each.name)
            grant = self._grants.get(key)
            window = each.context_window or (grant.window if grant else None)
            shape = self._shapes.get(key)
            if shape is not None and shape.layers and not shape.embeds and window and each.size:
                self._slots[server] = max(self._slots.get(server, 1), self._slots_of(shape, window, each.size))
        return self._slots.get(server, 1)

    def _slots_of(self, shape: Shape, window: int, size: int) -> int:
        for slots in range(1, MOST_SLOTS + 1):
            if self._footprint(shape, window, slots).counted >= size:
                return slots
        return 1  # So large that something else is amiss; the size itself counts anyway.

    def _footprint(self, shape: Shape, window: int, slots: int) -> Footprint:
        settings = self.settings
        return footprint(shape, window, slots=slots, kv_type=settings.kv_type, flash_attention=settings.flash_attention)

    def _residents(self, query: LimitsQuery, loaded: tuple[LoadedModel, ...] | None, slots: int) -> Iterable[Resident]:
        """Models in memory, and those that admitted requests are bringing there."""
        used = {_plain(model) for model, count in query.in_use().items() if count > 0}
        seen = set()
        for each in loaded or ():
            resident = self._resident(query, each, used, slots)
            seen.add(resident.key)
            yield resident
        for name in used:
            key = _key(query, name)
            grant = self._grants.get(key)
            if key not in seen and grant is not None:
                yield Resident(
                    key=key,
                    name=name,
                    size=grant.size,
                    coming=grant.size,
                    window=grant.window,
                    loading=True,
                    busy=True,
                )

    def _resident(self, query: LimitsQuery, model: LoadedModel, used: set[str], slots: int) -> Resident:
        key = _key(query, model.name)
        grant, shape = self._grants.get(key), self._shapes.get(key)
        window = model.context_window or (grant.window if grant else None)
        told = model.size or 0
        estimate = self._footprint(shape, window, slots).total if shape is not None and window else 0
        loads = grant is not None and key[2] in used and (window or 0) < grant.window
        if grant is not None and grant.loads and not loads:
            self._grants[key] = replace(grant, loads=False)
        # `/api/ps` counts too little for sliding windows: it is a floor, and never the truth. What is in use may be
        # about to be loaded again with what it was given.
        size = max(estimate, told + RUNTIME, grant.size if grant and key[2] in used else 0)
        on_cpu = bool(told) and model.accelerator_size is not None and model.accelerator_size < told
        if on_cpu:
            self._on_cpu.add(key)
        return Resident(
            key=key,
            name=model.name,
            size=size,
            freed=told,
            coming=max(size - told, 0) if loads else 0,
            window=window,
            busy=key[2] in used,
            expires=_expiry(model.expires_at),
            small=bool(shape and shape.embeds) and size <= SMALL_EMBEDDING + RUNTIME,
            on_cpu=on_cpu,
        )

    def _elsewhere(self, query: LimitsQuery) -> tuple[int, int]:
        """Bytes of models that other servers of this Mac were given and may still have; and those not taken yet."""
        here = (query.provider, query.address)
        self._in_use[here] = query.in_use
        used = {server: {_plain(name) for name in in_use()} for server, in_use in self._in_use.items()}
        now = self.collector.clock()
        total = coming = 0
        for key, grant in self._grants.items():
            busy = key[2] in used[key[:2]]
            if key[:2] != here and (busy or now - grant.at < LONGEST_CALL + grant.keep_alive):
                total += grant.size
                coming += grant.size if busy and grant.loads else 0
        return total, coming

    # --- What follows ------------------------------------------------------------------------------------------------

    def _decide(self, scene: Scene) -> Limits:
        before = self._grants.get(scene.key)
        plan = self._plan(scene, before)
        if not plan.loads and scene.rules.drop_idle:
            plan = replace(plan, gone=tuple(scene.idle))
        return self._granted(scene, plan, before)

    def _plan(self, scene: Scene, before: Grant | None) -> Plan:
        """A loaded model keeps its window, unless the caller or an earlier promise wants more and that fits."""
        wanted = self._wanted(scene, before)
        mine = scene.mine
        if mine is None or mine.window is None:
            return self._loaded(scene, wanted, promised=before is not None and before.window == wanted)
        if wanted < mine.window and (scene.query.force or scene.rules.steps or scene.rules.window):
            return Plan(window=wanted)  # As asked: memory is short, and the server gives some back for it.
        grown = self._grown(scene, mine.window, wanted) if wanted > mine.window else None
        return grown or Plan(window=mine.window, loads=False)

    def _wanted(self, scene: Scene, before: Grant | None) -> int:
        """The window to give: as asked, else as before, else what can be read in good time."""
        if scene.query.context_window is not None:
            return self._trained(scene, scene.query.context_window)
        has = scene.mine.window if scene.mine else None
        if has or before:
            return max(has or 0, before.window if before else 0)
        readable = readable_window(scene.shape, scene.chip, self.settings.prefill_seconds)
        needed = -(-(scene.query.prompt_characters or 0) // CHARACTERS_PER_TOKEN)
        needed += scene.query.max_tokens or ROOM_FOR_ANSWER
        usual = max([step for step in LADDER if readable is None or step <= readable], default=LADDER[0])
        enough = next((step for step in LADDER if step >= needed), LADDER[-1])
        return self._trained(scene, max(usual, enough))

    @staticmethod
    def _trained(scene: Scene, window: int) -> int:
        return min(window, scene.shape.trained_window or window)

    def _loaded(self, scene: Scene, wanted: int, *, promised: bool = False) -> Plan:
        """How to load a model: the largest window first, and the fewest idle models out of memory for it.

        Args:
            scene: what is the case.
            wanted: the window to begin with.
            promised: its conversations have that window: rather wait than take it from them.

        Raises:
            ResourceLimitExceeded: not now, or not at all.
        """
        if scene.query.force:
            return self._forced(scene, wanted)
        if scene.rules.refuse:
            raise not_now(scene)
        windows = _steps_down(self._lowered(scene, wanted), min(self.settings.minimum_window, wanted))
        for window in windows:
            gone = _fewest_gone(scene, window)
            if gone is not None:
                return self._counted(scene, Plan(window=window, gone=gone))
            if promised and scene.fits(window, scene.others):
                return _waiting(scene, window)
        for window in windows:
            if scene.fits(window, scene.others):
                return _waiting(scene, window)
        raise self._too_large(scene, windows[-1])

    def _grown(self, scene: Scene, has: int, wanted: int) -> Plan | None:
        """A larger window for a loaded model; `None` where it cannot have one now."""
        if scene.query.force:
            return self._forced(scene, wanted)
        if scene.rules.refuse:
            return None
        for window in _steps_down(self._lowered(scene, wanted), has):
            gone = _fewest_gone(scene, window)
            if window > has and gone is not None:
                return Plan(window=window, gone=gone)
        return None

    def _forced(self, scene: Scene, wanted: int) -> Plan:
        """What the caller wants; whatever is idle goes, and the reply says what would have been refused."""
        refused = None
        if scene.rules.refuse:
            refused = not_now(scene).message
        elif not scene.fits(wanted, scene.idle):
            refused = self._too_large(scene, wanted).message
        gone = tuple(scene.idle) if refused else _fewest_gone(scene, wanted) or ()
        return Plan(window=wanted, gone=gone, forced=refused)

    def _too_large(self, scene: Scene, window: int) -> ResourceLimitExceeded:
        known = {key[2]: shape for key, shape in self._shapes.items() if key[:2] == scene.key[:2] and key != scene.key}
        return too_large(scene, window, known)

    def _lowered(self, scene: Scene, wanted: int) -> int:
        """The window after what the state of the Mac, and of the model's last load, takes from it."""
        lower = [step for step in LADDER if step < wanted]
        window = wanted
        for _ in range(scene.rules.steps + (scene.key in self._on_cpu)):
            window = lower.pop() if lower else window
        return min(window, scene.rules.window or window)

    def _counted(self, scene: Scene, plan: Plan) -> Plan:
        """Let more idle models go where too many would be loaded; wait for busy ones only where memory is short."""
        allowed = self._loaded_models(scene)
        gone = list(plan.gone)
        leaving = {each.key for each in gone}
        stay = [each for each in scene.others if each.key not in leaving and not each.small]
        for each in scene.idle:
            if each in stay and len(stay) + 1 > allowed:
                gone.append(each)
                stay.remove(each)
        short = scene.rules.loaded is not None and len(stay) + 1 > allowed
        return replace(plan, gone=tuple(gone), wait_for=tuple(each.name for each in stay) if short else ())

    def _loaded_models(self, scene: Scene) -> int:
        usual = _below(LOADED, scene.memory / GIB)
        return min(usual, scene.rules.loaded or usual)

    # --- Answers -----------------------------------------------------------------------------------------------------

    def _granted(self, scene: Scene, plan: Plan, before: Grant | None) -> Limits:
        keep = self._keep_alive(scene)
        together, why_together = self._together(scene, plan)
        if not plan.wait_for:
            self._note(scene, plan, before, keep)
        rules = scene.rules
        return Limits(
            context_window=plan.window,
            concurrent_requests=together,
            queued_requests=self.settings.queued_requests,
            loaded_models=self._loaded_models(scene),
            keep_alive=keep,
            keep_window=not plan.loads,
            unload=tuple(each.name for each in plan.gone),
            wait_for=plan.wait_for,
            reasons={
                "context_window": self._why_window(scene, plan),
                "concurrent_requests": why_together,
                "queued_requests": QUEUE_REASON,
                "loaded_models": rules.words or f"{gb(scene.memory)} of memory",
                "keep_alive": rules.words if rules.keep_alive is not None else "what the model takes of the budget",
            },
            warnings=self._warnings(scene, plan, before),
        )

    def _note(self, scene: Scene, plan: Plan, before: Grant | None, keep: float) -> None:
        """Remember what was given. Who asks for less than others have does not take it from them."""
        size = scene.footprint(plan.window).total
        if scene.mine is not None:
            size = max(size, scene.mine.size)
        has = max(scene.mine.window if scene.mine and scene.mine.window else 0, before.window if before else 0)
        promised = max(has, plan.window) if scene.query.context_window is not None and scene.mine else plan.window
        _remember(
            self._grants,
            scene.key,
            Grant(
                window=promised,
                size=size,
                at=self.collector.clock(),
                keep_alive=keep,
                loads=plan.loads or bool(scene.mine and scene.mine.coming),
            ),
        )
        if plan.loads:
            self._on_cpu.discard(scene.key)

    def _why_window(self, scene: Scene, plan: Plan) -> str:
        asked = scene.query.context_window or 0
        if not plan.loads:
            larger = ", and a larger one does not fit now" if asked > plan.window else ""
            return f"the model is loaded with it{larger}"
        if asked > (scene.shape.trained_window or asked) == plan.window:
            return f"the model was trained for {plan.window}"
        room = scene.room(plan.gone)
        words = f"{gb(scene.footprint(plan.window).total)} of {gb(room.bytes)}"
        words += f" ({scene.budget.words})" if room.binding == "budget" else " that are free"
        return f"{words}; {scene.rules.words}" if scene.rules.words else words

    def _together(self, scene: Scene, plan: Plan) -> tuple[int, str]:
        """Requests at once, and why: each slot of a server holds a window of its own."""
        if scene.rules.concurrency is not None:
            return scene.rules.concurrency, scene.rules.words
        if scene.mine is not None and scene.mine.on_cpu:
            return 1, "part of the model runs on the CPU"
        room = max(scene.room(plan.gone, loading=False).static, 0)
        most = _below(TOGETHER, scene.memory / GIB)
        fitting = [slots for slots in range(2, most + 1) if scene.footprint(plan.window, slots).total <= room]
        count = max(fitting, default=1)
        return count, f"{count} windows of {plan.window} tokens fit into {gb(room)}"

    def _keep_alive(self, scene: Scene) -> float:
        minutes = _below(MINUTES, scene.memory / GIB)
        usual = 60.0 * minutes[sum(scene.shape.weights >= bound for bound in CLASSES)]
        return usual if scene.rules.keep_alive is None else min(usual, scene.rules.keep_alive)

    def _warnings(self, scene: Scene, plan: Plan, before: Grant | None) -> tuple[str, ...]:
        query, window = scene.query, plan.window
        notes = [*scene.budget.warnings]
        if plan.forced is not None:
            notes.append(f"`force` overrode a refusal of the policy `m4`: {plan.forced}")
        notes += _window_note(scene, plan, before)
        if not scene.rules.measured:
            notes.append("The memory pressure could not be measured; the limits are those of the machine alone.")
        if scene.mine is not None and scene.mine.on_cpu:
            notes.append(f"Part of `{query.model}` runs on the CPU: it was too large when it was loaded.")
        needed = (query.prompt_characters or 0) // (CHARACTERS_PER_TOKEN + 1)
        if query.context_window is None and needed > window:
            notes.append(f"The prompt may not fit the window of {window} tokens; ask for `context_window={needed}`.")
        return (*notes, *scene.shape.notes) if plan.forced else tuple(notes)


def _window_note(scene: Scene, plan: Plan, before: Grant | None) -> list[str]:
    """What to say of a window that is not the one its conversations had."""
    loaded = scene.mine.window if scene.mine else None
    promised = max(loaded or 0, before.window if before else 0)
    name, window = scene.query.model, plan.window
    if not promised or window == promised or plan.wait_for:
        return []
    why = "as asked" if scene.query.context_window == window else scene.rules.words or "as much as fits now"
    change = f"The window of `{name}` is {window} instead of {promised}, {why}"
    return [f"{change}: the server loads it again." if plan.loads and loaded else f"{change}."]


def _of_unknown(query: LimitsQuery, settings: M4Settings) -> Limits:
    """Limits of a model that cannot be weighed: little is risked with it."""
    why = f"the size of `{query.model}` is not known"
    return Limits(
        context_window=LADDER[0] if query.context_window is None else None,
        concurrent_requests=1,
        queued_requests=settings.queued_requests,
        reasons={"context_window": why, "concurrent_requests": why, "queued_requests": QUEUE_REASON},
        warnings=(f"The footprint of `{query.model}` is not known: nothing that was asked is lowered or refused.",),
    )


def _unmeasured(settings: M4Settings) -> Limits:
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


def _waiting(scene: Scene, window: int) -> Plan:
    """A window that fits once those that work now are done."""
    return Plan(
        window=window,
        gone=tuple(scene.idle),
        wait_for=tuple(each.name for each in scene.others if each.busy),
    )


def _fewest_gone(scene: Scene, window: int) -> tuple[Resident, ...] | None:
    """The fewest idle models that must go for a window to fit; `None` where not even all of them suffice."""
    idle = scene.idle
    for count in range(len(idle) if scene.rules.drop_idle else 0, len(idle) + 1):
        if scene.fits(window, idle[:count]):
            return tuple(idle[:count])
    return None


def _steps_down(window: int, least: int) -> list[int]:
    """That window, then those of the ladder below it, none below the least."""
    steps = [step for step in reversed(LADDER) if least <= step < window]
    return [window, *steps, *([least] if least < min([window, *steps]) else [])]


def _below(table: Sequence[tuple[float, T]], value: float) -> T:
    """The entry of the first row whose bound lies above the value."""
    return next(entry for bound, entry in table if value < bound)


def _told(ask: Callable[[], T]) -> T | None:
    """What a provider tells; nothing where it cannot. One that is not there fails the call as it would anyway."""
    try:
        return ask()
    except ConnectionFailed:
        raise
    except GraftageError:
        return None


def _plain(model: str) -> str:
    """A model's name for comparing."""
    return model.strip().lower().removesuffix(":latest")


def _key(query: LimitsQuery, model: str) -> Key:
    return query.provider, query.address, _plain(model)


def _expiry(moment: datetime | None) -> float:
    return float("inf") if moment is None else moment.timestamp()


def _remember(memory: dict[Key, T], key: Key, value: T) -> None:
    """Keep the newest, and drop the oldest beyond what a host can use."""
    memory.pop(key, None)
    memory[key] = value
    if len(memory) > MOST_REMEMBERED:
        del memory[next(iter(memory))]
