"""The adapters of one connection: plugins find them, the provider loads them, calls use them."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass as mutable
from dataclasses import field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from graftage._engine.admission import once
from graftage._engine.arguments import CallOptions, read_adapter, read_flag, read_reference
from graftage._engine.faults import in_words
from graftage._engine.slots import Slots, slots_for
from graftage._records import dataclass
from graftage.calls import Call, ListAdaptersRequest, LoadAdapterRequest, ResolveRequest, UnloadAdapterRequest
from graftage.exceptions import (
    AdapterError,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterNotFound,
    AdapterUnsupported,
    ProviderError,
    RequestRejected,
    SettingsError,
)
from graftage.types import ACTIVE, Adapter, AdapterInfo, LoadedAdapter, canonical_name

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

    from graftage._engine.admission import Admission
    from graftage._engine.arguments import Choice
    from graftage._engine.call import Run
    from graftage._engine.connection import Connection
    from graftage.types import _Unset

__all__ = ["Adapters", "Applied", "missing_note", "name_of", "read_on_missing"]

MOST_OTHERS: Final = 64
"""Adapters that a provider is offered besides the one to load."""
OTHERS_SECONDS: Final = 10.0
"""How long the search for them goes on."""
REMEMBERED: Final = 256
"""Loaded adapters that the core knows of: a call with an older one asks the provider to load it, which may be cheap."""
Key: TypeAlias = "tuple[str, str]"
"""A digest and a base model."""


@mutable(slots=True)
class _State:
    """The adapter of calls that do not name one."""

    choice: Choice | None = None
    on_missing: Literal["error", "base"] = "error"
    force: bool = False
    name: str | None = None
    """What it is called; None for the base model."""
    digests: dict[str, str] = field(default_factory=dict)
    """What the last call used, by base model."""
    error: BaseException | None = None
    """Why the last switch failed. Every call raises it: another project's adapter must not answer."""

    @property
    def is_untried(self) -> bool:
        """Whether no call has used its adapter, as at the start of a client."""
        return self.choice is not None and not self.digests


@dataclass(frozen=True, slots=True)
class _Part:
    """An adapter that may be used, with its weight."""

    adapter: Adapter
    name: str
    digest: str
    weight: float
    resolver: str
    """The name of the plugin that found it."""


@dataclass(frozen=True, slots=True)
class Applied:
    """The adapters of one call."""

    loaded: LoadedAdapter
    """As the request has them: all as one."""
    warnings: tuple[str, ...]
    """Those of the verdicts; `loaded` has all."""
    parts: tuple[_Part, ...]
    held: tuple[tuple[Key, LoadedAdapter], ...]
    """What is loaded for it."""


class Adapters:
    """The active adapter and those loaded so far."""

    def __init__(
        self,
        session: Connection,
        admission: Admission,
        choice: Choice | None = None,
        *,
        state: _State | None = None,
        loaded: OrderedDict[Key, LoadedAdapter] | None = None,
    ) -> None:
        """Build it; `choice` is active from the start, and loaded by the first call."""
        self._session = session
        self._admission = admission
        self._first = choice
        self._state = state or _State(choice, name=name_of(choice) if choice else None)
        self._switches = Slots()
        """One switch at a time: the last one that was asked for is in effect at the end."""
        self._loaded: OrderedDict[Key, LoadedAdapter] = OrderedDict() if loaded is None else loaded
        """The least recently used first."""

    @property
    def active(self) -> str | None:
        """The name of the active adapter."""
        return self._state.name

    def view(self, adapter: Choice | Literal[_Unset.ACTIVE] | None, *, fresh: bool) -> Adapters:
        """Return these adapters with an active one of their own, as `Session.view` documents."""
        choice = self._first if adapter is ACTIVE else adapter
        kept = adapter is ACTIVE and not fresh
        state = replace(self._state, digests=dict(self._state.digests)) if kept else None
        return Adapters(self._session, self._admission, choice, state=state, loaded=self._loaded)

    @contextlib.contextmanager
    def switching(self, reference: object) -> Iterator[None]:
        """Run a switch in this block, with the reading of its arguments, and record any error as its failure."""
        try:
            yield
        except BaseException as error:
            self._state = _State(error=_lasting(error, reference))
            raise

    async def switch(
        self,
        reference: object,
        model: str,
        run: Run,
        *,
        on_missing: Literal["error", "base"] | None,
        force: bool | None,
    ) -> LoadedAdapter | None:
        """Make an adapter the active one, after the switch that is under way."""
        on_missing = read_on_missing(on_missing)
        force = read_flag("force", force)
        choice = None if reference is None else read_adapter(reference)
        await self._admission.granted(self._switches, self._switches.enter(1), run.call)
        try:
            state = _State(choice, on_missing, force)
            applied, _ = await self._active(state, model, run, CallOptions(force=force))
            run.answered()
            self._state = state
        finally:
            self._switches.leave()
        return applied.loaded if applied else None

    async def for_call(self, asked: CallOptions, model: str, run: Run) -> tuple[Applied | None, tuple[str, ...]]:
        """Return the adapters of one call, and warnings: a snapshot that later switches do not change."""
        if asked.adapter is None:
            return None, ()
        if asked.adapter is not ACTIVE:
            return await self._apply(asked.adapter, model, run, asked), ()
        if self._state.is_untried:  # A switch under way, which began before this call, comes first.
            await self._admission.granted(self._switches, self._switches.enter(1), run.call)
            self._switches.leave()
        state = self._state
        if state.error is not None:
            raise _again(state.error)
        return await self._active(state, model, run, replace(asked, force=asked.force or state.force))

    async def _active(
        self, state: _State, model: str, run: Run, asked: CallOptions
    ) -> tuple[Applied | None, tuple[str, ...]]:
        """Find and load the active adapter as if the call had named it, so that it is always what its files hold."""
        if state.choice is None:
            return None, ()
        try:
            applied = await self._apply(state.choice, model, run, asked)
        except AdapterNotFound:
            if state.on_missing != "base":
                raise
            state.name = None
            return None, (missing_note(state.choice),)
        state.name, digest = applied.loaded.name, applied.loaded.digest
        before = state.digests.get(canonical_name(model), digest)
        run.answered = lambda: state.digests.update({canonical_name(model): digest})
        if before == digest:
            return applied, ()
        return applied, (f"The adapter `{state.name}` has changed since it was last used: {digest}, not {before}.",)

    async def unload(self, reference: object, model: str, call: Call) -> None:
        """Free the memory of an adapter; a call that names it loads it again."""
        session = self._session
        session.require("unload_adapter")
        choice = read_adapter(reference)
        # Under its name there may be what its files held before.
        old = [
            key
            for key, one in list(self._loaded.items())
            if key[1] == canonical_name(model) and len(choice) == 1 and one.name == choice[0][0]
        ]
        try:
            parts = [await self._part(name, weight, model, call) for name, weight in choice]
        except AdapterNotFound:
            if not old:
                raise
            parts = []
        for key in dict.fromkeys((*self._keys(parts, model), *old) if parts else old):
            loaded = self._loaded.pop(key, None)
            if loaded is not None:
                await session.call("unload_adapter", UnloadAdapterRequest(call=call, adapter=loaded), call)

    def forget(self, model: str) -> None:
        """Forget the adapters loaded as this model or for it, as it is gone or new: the next call loads them again."""
        name = canonical_name(model)
        for key, loaded in list(self._loaded.items()):
            if name in (key[1], canonical_name(loaded.model)):
                self._loaded.pop(key, None)

    def forget_all(self) -> None:
        """Forget every loaded adapter: the next call that needs one loads it again."""
        self._loaded.clear()

    # --- Loading -----------------------------------------------------------------------------------------------------

    async def _apply(self, choice: Choice, model: str, run: Run, asked: CallOptions) -> Applied:
        """Find, check and load the adapters of a call."""
        session = self._session
        session.require("load_adapter")
        parts: list[_Part] = []
        warnings: list[str] = []
        for reference, weight in choice:
            part = await self._part(reference, weight, model, run.call)
            with session.relay.contained:  # Its attributes may be properties.
                warnings += _checked(part.adapter, reference, model, force=asked.force)
            for same in (each for each in parts if each.digest == part.digest):
                what = f"`{same.name}` and `{part.name}` have the same content."
                raise RequestRejected(what, hint="Name one of them, with its weight.")
            parts.append(part)
        return await self._bring(tuple(parts), tuple(warnings), model, run, asked)

    async def again(self, applied: Applied, model: str, run: Run, asked: CallOptions, figures: Any) -> Applied:
        """Load adapters that the server has lost, with the figures that the policies have allowed the call."""
        for key, loaded in applied.held:
            if loaded.model != model:
                self._session.forget_facts(loaded.model)
            if self._loaded.get(key) is loaded:  # Another call may have loaded it again.
                self._loaded.pop(key, None)
        return await self._bring(applied.parts, applied.warnings, model, run, asked, figures=figures)

    async def _bring(
        self,
        parts: tuple[_Part, ...],
        warnings: tuple[str, ...],
        model: str,
        run: Run,
        asked: CallOptions,
        *,
        figures: Mapping[str, Any] | None = None,
    ) -> Applied:
        """Load what is not loaded: each adapter if the provider applies weights, else what the resolver mixes."""
        name = name_of([(each.name, each.weight) for each in parts])

        async def load(part: _Part | None) -> LoadedAdapter:
            adapter = part.adapter if part else await self._mixed(parts, name, run.call)
            return await self._load(adapter, model, run, asked, figures)

        apart: Sequence[_Part | None] = [None] if self._must_mix(parts) else parts
        keys = self._keys(parts, model)
        each = [
            await self._held(key, partial(load, part), run.call, again=asked.reload)
            for key, part in zip(keys, apart, strict=True)
        ]
        # Two references may have the same content, which is loaded once: the reply has the name that was asked for.
        if apart == [None] or _is_plain(parts):
            loaded = replace(each[0], name=name)
        else:
            loaded = _joined([replace(one, name=part.name) for one, part in zip(each, parts, strict=True)], parts, name)
        notes = dict.fromkeys((*warnings, *(note for one in each for note in one.warnings)))
        held = tuple(zip(keys, each, strict=True))
        return Applied(replace(loaded, warnings=tuple(notes)), warnings, parts, held)

    def _must_mix(self, parts: Sequence[_Part]) -> bool:
        """Whether the resolver must make one adapter of these."""
        return not _is_plain(parts) and "adapter_weights" not in self._session.asked_capabilities().features

    def _keys(self, parts: Sequence[_Part], model: str) -> list[Key]:
        """Return what is loaded for some adapters: each one, or their mix."""
        digests = [_digest_of(parts)] if self._must_mix(parts) else [each.digest for each in parts]
        return [(digest, canonical_name(model)) for digest in digests]

    async def _mixed(self, parts: Sequence[_Part], names: str, call: Call) -> Adapter:
        """Let the resolver add up adapters, for a provider that applies only one at a time."""
        first, *others = parts
        with self._session.relay.contained:
            mix = getattr(first.adapter, "mix", None)
        if not callable(mix):
            reason = f"`{first.name}` comes from the plugin `{first.resolver}`, which cannot mix adapters"
            raise AdapterUnsupported(
                f"The provider `{self._session.provider}` cannot apply `{names}`: {reason}.",
                reference=names,
                reasons=[reason],
                hint="Use one adapter without a weight, one from a file (`graftage-lora` mixes these), or a provider "
                "that applies weights itself: the embedded one or llama-server.",
            )
        weighted = [(each.adapter, each.weight) for each in others]
        try:
            mixed: Adapter = await self._session.io.ask(
                first.resolver, lambda _: mix(first.weight, weighted), None, call
            )
        except (AdapterError, ProviderError):
            raise
        except Exception as error:
            said = f"The plugin `{first.resolver}` could not mix `{names}`: {in_words(error)}."
            raise AdapterError(said, reference=names, hint="Report it to its authors.") from error
        return mixed

    async def _held(
        self, key: Key, load: Callable[[], Awaitable[LoadedAdapter]], call: Call, *, again: bool = False
    ) -> LoadedAdapter:
        """Return what is loaded, or load it, or `again`: one call does, the others wait."""
        session = self._session
        loaded = None if again else self._loaded.get(key)
        if loaded is None:
            slot = slots_for(f"adapter {session.plugin}", f"{session.address} {key}")
            await self._admission.granted(slot, slot.enter(1), call)
            try:
                loaded = None if again else self._loaded.get(key)
                if loaded is None:
                    loaded = self._loaded[key] = await load()
            finally:
                slot.leave()
        with contextlib.suppress(KeyError):  # It was unloaded meanwhile.
            self._loaded.move_to_end(key)
        while len(self._loaded) > REMEMBERED:
            with contextlib.suppress(KeyError):
                self._loaded.popitem(last=False)
        return loaded

    async def _load(
        self, adapter: Adapter, model: str, run: Run, asked: CallOptions, figures: Mapping[str, Any] | None
    ) -> LoadedAdapter:
        """Let the provider load it. That brings the model into memory, so policies must allow it first."""
        session = self._session
        others = session.io.in_thread(once(lambda: self._others(adapter, model, run.call)))
        with contextlib.ExitStack() as allowance:
            if figures is None:
                allowed = await self._admission.allow(run, "load_adapter", asked, model)
                figures = allowed.figures
                allowance.callback(allowed.give_back)
            own = {name: figures[name] for name in ("keep_alive", "context_window")}
            request = LoadAdapterRequest(
                call=run.call, adapter=adapter, model=model, force=asked.force, others=others, **own
            )
            loaded: LoadedAdapter = await session.call("load_adapter", request, run.call, LoadedAdapter)
            return loaded

    def _others(self, adapter: Adapter, model: str, call: Call) -> tuple[Adapter, ...]:
        """Return other known adapters that fit a model, those used last first. It blocks, and never fails."""
        session, io = self._session, self._session.io
        brief = replace(call, deadline=min(call.deadline, time.monotonic() + OTHERS_SECONDS))
        request = ListAdaptersRequest(call=brief, model=model, base=lambda: session.facts(model, brief))
        fitting = {adapter.digest: adapter}
        for name, known in session.relay.each("list_adapters"):
            found: tuple[AdapterInfo, ...] = ()
            with contextlib.suppress(Exception):  # A broken or slow plugin hides no other.
                found = tuple(io.from_thread(partial(io.ask, name, known, request, brief)))
                found = tuple(each for each in found if each.verdict is None or each.verdict.status == "compatible")
            for info in found:
                with contextlib.suppress(Exception):
                    other = io.from_thread(partial(self.resolve, info.reference, model, brief))
                    if other.verdict.status == "compatible" and len(fitting) <= MOST_OTHERS:
                        fitting.setdefault(other.digest, other)
        del fitting[adapter.digest]
        used = [digest for digest, base in list(self._loaded) if base == canonical_name(model)]
        last = [fitting.pop(digest) for digest in reversed(used) if digest in fitting]
        return (*last, *fitting.values())

    async def _part(self, reference: str, weight: float, model: str, call: Call) -> _Part:
        """Find an adapter."""
        resolver, adapter = await self._found(reference, model, call)
        with self._session.relay.contained:  # Its attributes may be properties.
            return _Part(adapter, adapter.name, adapter.digest, weight, resolver)

    # --- Finding -----------------------------------------------------------------------------------------------------

    async def resolve(self, reference: object, model: str, call: Call) -> Adapter:
        """Find the adapter of a reference: the first one that a resolver knows."""
        return (await self._found(read_reference(reference), model, call))[1]

    async def _found(self, reference: str, model: str, call: Call) -> tuple[str, Adapter]:
        """Return an adapter and the name of the plugin that has found it."""
        session = self._session
        request = ResolveRequest(
            reference=reference,
            model=model,
            provider=session.provider,
            base=lambda: session.facts(model, call),
            show=lambda name: session.facts(name, call),
            call=call,
        )
        said: list[str] = []
        hint = "Check its name."
        for name, resolver in session.relay.each("resolve_adapter"):
            try:
                found: Any = await session.io.ask(name, resolver, request, call)
            except (AdapterInvalid, AdapterIncompatible, ProviderError, SettingsError):
                raise  # A resolver knows the reference, or the provider failed.
            except AdapterNotFound as error:
                said += [f"{name}: {reason}" for reason in error.reasons or (error.message,)]
                hint = error.hint or hint
                continue
            except Exception as error:  # noqa: BLE001 - the next resolver may know it
                said.append(f"{name}: {in_words(error)}")
                continue
            with session.relay.contained:
                known = callable(getattr(found, "gguf", None))
            if known:
                return name, found
            said.append(
                f"{name}: {'does not know it' if found is None else 'returned something that is not an adapter'}"
            )
        what = "; ".join(said) or "no plugin that resolves adapters is installed"
        raise AdapterNotFound(
            f"The adapter `{request.reference}` was not found ({what}).",
            reference=request.reference,
            reasons=said,
            hint=hint if said else "Check its name, or install `graftage-lora`.",
        )


def read_on_missing(value: Literal["error", "base"] | None) -> Literal["error", "base"]:
    """Return what `use_adapter` does if the adapter is not found; by default it raises.

    Raises:
        RequestRejected: it is neither `error` nor `base`.
    """
    if value not in ("error", "base", None):
        raise RequestRejected(f"`on_missing` must be 'error' or 'base', not {value!r}.", hint="Or leave it out.")
    return value or "error"


def name_of(choice: Iterable[tuple[str, float]]) -> str:
    """Return what adapters with weights are called together: `style + 0.6 domain`."""
    words: list[str] = []
    for name, weight in choice:
        size = "" if abs(weight) == 1 else f"{abs(weight):g} "
        sign = "-" if weight < 0 else "+"
        words.append(f"{sign} {size}{name}" if words else f"{sign if weight < 0 else ''}{size}{name}")
    return " ".join(words)


def missing_note(choice: Choice) -> str:
    """Return the warning on a reply of the base model because an adapter was not found."""
    return f"The adapter `{name_of(choice)}` was not found; the base model answers."


def _is_plain(parts: Sequence[_Part]) -> bool:
    """Whether it is one adapter as it was trained."""
    return len(parts) == 1 and parts[0].weight == 1


def _digest_of(parts: Sequence[_Part]) -> str:
    """Return a digest of adapters with their weights, whatever their order."""
    lines = sorted(f"{each.digest} {each.weight!r}\n" for each in parts)
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def _joined(loaded: Sequence[LoadedAdapter], parts: Sequence[_Part], name: str) -> LoadedAdapter:
    """Return several loaded adapters as one, for a provider that applies weights.

    Raises:
        AdapterUnsupported: the provider has made different models of them.
    """
    first = loaded[0]
    if any(each.model != first.model for each in loaded):
        reasons = [f"`{each.name}` is loaded as `{each.model}`" for each in loaded]
        raise AdapterUnsupported(
            f"The adapters cannot act together: {'; '.join(reasons)}.",
            reference=name,
            reasons=reasons,
            hint="Name adapters in files, not models that contain one.",
        )
    weighted = tuple(zip(loaded, (each.weight for each in parts), strict=True))
    return LoadedAdapter(
        name=name, digest=_digest_of(parts), model=first.model, strategy=first.strategy, parts=weighted
    )


def _checked(adapter: Adapter, reference: str, model: str, *, force: bool) -> tuple[str, ...]:
    """Return the warnings of an adapter that may be used.

    Raises:
        AdapterIncompatible: it does not fit the model.
        AdapterUnsupported: its resolver cannot convert it for such a model, which `force` does not change.
    """
    verdict = adapter.verdict
    reasons = "; ".join(verdict.reasons)
    if verdict.status == "unsupported":
        raise AdapterUnsupported(
            f"The adapter `{reference}` cannot be used with `{model}`: {reasons}.",
            reference=reference,
            reasons=verdict.reasons,
            hint="Convert it to GGUF with `convert_lora_to_gguf.py` of llama.cpp and name that file, or merge it into "
            "its base model with the tools that trained it.",
        )
    if verdict.status != "incompatible":
        unsure = f"It is unknown whether the adapter `{adapter.name}` fits `{model}`: {reasons}."
        return (*verdict.warnings, *((unsure,) if verdict.status == "unknown" else ()))
    if not force:
        raise AdapterIncompatible(
            f"The adapter `{reference}` does not fit `{model}`: {reasons}.",
            reference=reference,
            reasons=verdict.reasons,
            hint="Choose the model it was made for, or load it anyway with `force`.",
        )
    return (
        *verdict.warnings,
        f"The adapter `{adapter.name}` was forced onto `{model}`, which it does not fit: {reasons}.",
    )


def _again(error: BaseException) -> BaseException:
    """Return an error to raise once more: one instance raised in several threads would mix tracebacks."""
    again = copy.copy(error)
    again.__cause__ = error.__cause__
    return again


def _lasting(error: BaseException, reference: object) -> BaseException:
    """Return the error of a failed switch, for later calls to raise."""
    if isinstance(error, AdapterError):
        return error
    failed = AdapterError(
        f"The switch to the adapter `{reference}` failed: {str(error) or type(error).__name__}",
        reference=str(reference),
        hint="Switch again, or call `use_adapter(None)` for the base model.",
    )
    failed.__cause__ = error
    return failed
