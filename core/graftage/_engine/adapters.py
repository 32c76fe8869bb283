"""The adapters of one connection: plugins find them, the provider loads them, calls use them."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from graftage._engine.arguments import Bound, CallOptions, read_flag, read_reference
from graftage._engine.faults import in_words
from graftage._engine.slots import Slots, slots_for
from graftage._records import dataclass
from graftage.calls import Call, LoadAdapterRequest, ResolveRequest, UnloadAdapterRequest
from graftage.exceptions import (
    AdapterError,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterNotFound,
    ProviderError,
    RequestRejected,
    SettingsError,
)
from graftage.types import ACTIVE, Adapter, LoadedAdapter, canonical_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from graftage._engine.admission import Admission
    from graftage._engine.call import Run
    from graftage._engine.connection import Connection

__all__ = ["Adapters", "State"]


@dataclass(frozen=True, slots=True)
class State:
    """The adapter of calls that do not name one."""

    reference: str | None = None
    model: str = ""
    loaded: LoadedAdapter | None = None
    error: BaseException | None = None
    """Why the last switch failed. Every call raises it: another project's adapter must not answer."""
    warnings: tuple[str, ...] = ()
    force: bool = False


class Adapters:
    """The active adapter and those loaded so far."""

    def __init__(
        self,
        session: Connection,
        admission: Admission,
        first: State,
        loaded: dict[tuple[str, str], LoadedAdapter] | None = None,
    ) -> None:
        """Build it with the state to begin with, whose adapter the first call loads, and those loaded already."""
        self._session = session
        self._admission = admission
        self._state = self._first = first
        self._switches = Slots()
        """One switch at a time: the last one that was asked for is in effect at the end."""
        self._loaded: dict[tuple[str, str], LoadedAdapter] = {} if loaded is None else loaded

    @property
    def active(self) -> str | None:
        """The name of the active adapter."""
        state = self._state
        if state.loaded is None:
            return state.reference if state.error is None else None
        return state.loaded.name

    def view(self, bound: Bound, *, fresh: bool) -> Adapters:
        """Return these adapters with an active one of their own, as `Session.view` documents."""
        state = self._first if fresh else self._state
        if bound.adapter is not ACTIVE:
            state = State(bound.adapter)  # type: ignore[arg-type] # CORE
        return Adapters(self._session, self._admission, state, self._loaded)

    @contextlib.contextmanager
    def switching(self, reference: object) -> Iterator[None]:
        """Run a switch in this block, with the reading of its arguments, and record any error as its failure."""
        try:
            yield
        except BaseException as error:
            self._state = State(str(reference), error=error)
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
        name = None if reference is None else read_reference(reference)
        await self._admission.granted(self._switches, self._switches.enter(1), run.call)
        try:
            state = State() if name is None else await self._switched(name, model, run, on_missing, force=force)
            self._state = state
        finally:
            self._switches.leave()
        return state.loaded

    async def _switched(self, reference: str, model: str, run: Run, on_missing: str, *, force: bool) -> State:
        try:
            loaded = await self._load(reference, model, run, CallOptions(force=force))
        except AdapterNotFound:
            if on_missing != "base":
                raise
            note = f"The adapter `{reference}` was not found; the base model answers."
            return State(None, model, warnings=(note,))
        return State(reference, model, loaded, force=force)

    async def for_call(self, asked: CallOptions, model: str, run: Run) -> tuple[LoadedAdapter | None, tuple[str, ...]]:
        """Return the adapter of one call, and warnings: a snapshot that later switches do not change."""
        if asked.adapter is None:
            return None, ()
        if asked.adapter is not ACTIVE:
            return await self._load(read_reference(asked.adapter), model, run, asked), ()
        state = self._state
        if state.error is not None:
            raise _again(state)
        if state.reference is None:
            return state.loaded, state.warnings
        if state.loaded is None and not asked.force:
            await self._begin(state, state.reference, model, run)
            return await self.for_call(asked, model, run)
        if canonical_name(state.model) == canonical_name(model) and self._holds(state.loaded):
            return state.loaded, state.warnings
        forced = replace(asked, force=asked.force or state.force)
        return await self._load(state.reference, model, run, forced), state.warnings

    async def _begin(self, first: State, reference: str, model: str, run: Run) -> None:
        """Load the adapter that is active from the start, unless another switch came before."""
        await self._admission.granted(self._switches, self._switches.enter(1), run.call)
        try:
            if self._state is first:
                self._state = await self._switched(reference, model, run, "error", force=False)
        finally:
            self._switches.leave()

    def _holds(self, loaded: LoadedAdapter | None) -> bool:
        """Whether an adapter is still loaded: after `prune` or `unload` it must be loaded again."""
        return loaded is not None and any(
            (each.digest, each.model) == (loaded.digest, loaded.model) for each in list(self._loaded.values())
        )

    async def unload(self, reference: object, model: str, call: Call) -> None:
        """Free the memory of an adapter; a call that names it loads it again."""
        session = self._session
        session.require("unload_adapter")
        adapter = await self.resolve(reference, model, call)
        loaded = self._loaded.pop((adapter.digest, canonical_name(model)), None)
        if loaded is not None:
            await session.call("unload_adapter", UnloadAdapterRequest(call=call, adapter=loaded), call)

    def forget(self, model: str) -> None:
        """Forget the adapters loaded as this model, which is gone from the server: the next call loads them again."""
        name = canonical_name(model)
        for key, loaded in list(self._loaded.items()):
            if canonical_name(loaded.model) == name:
                self._loaded.pop(key, None)

    def forget_all(self) -> None:
        """Forget every loaded adapter: the next call that needs one loads it again."""
        self._loaded.clear()

    async def _load(self, reference: str, model: str, run: Run, asked: CallOptions) -> LoadedAdapter:
        session, call = self._session, run.call
        session.require("load_adapter")
        adapter = await self.resolve(reference, model, call)
        with session.relay.contained:  # Its attributes may be properties.
            warnings = _checked(adapter, reference, model, force=asked.force)
            key = (adapter.digest, canonical_name(model))
        loaded = self._loaded.get(key)
        if loaded is None:
            slot = slots_for(f"adapter {session.plugin}", f"{session.address} {key}")
            await self._admission.granted(slot, slot.enter(1), call)  # One call loads it, the others wait.
            try:
                loaded = self._loaded.get(key)
                if loaded is None:
                    loaded = self._loaded[key] = await self._loaded_now(adapter, model, run, asked)
            finally:
                slot.leave()
        # Two references may have the same content, which is loaded once: the reply has the name that was asked for.
        return replace(loaded, name=adapter.name, warnings=(*warnings, *loaded.warnings))

    async def _loaded_now(self, adapter: Adapter, model: str, run: Run, asked: CallOptions) -> LoadedAdapter:
        """Let the provider load it. That brings the model into memory, so policies must allow it first."""
        session = self._session
        allowed = await self._admission.allow(run, "load_adapter", asked, model)
        try:
            figures = {name: allowed.figures[name] for name in ("keep_alive", "context_window")}
            request = LoadAdapterRequest(call=run.call, adapter=adapter, model=model, force=asked.force, **figures)
            loaded: LoadedAdapter = await session.call("load_adapter", request, run.call, LoadedAdapter)
            return loaded
        finally:
            allowed.give_back()

    async def resolve(self, reference: object, model: str, call: Call) -> Adapter:
        """Find the adapter of a reference: the first one that a resolver knows."""
        session = self._session
        request = ResolveRequest(
            reference=read_reference(reference),
            model=model,
            provider=session.provider,
            base=lambda: session.facts(model, call),
            show=lambda name: session.facts(name, call),
            call=call,
        )
        said: list[str] = []
        for name, resolver in session.relay.each("resolve_adapter"):
            try:
                found: Any = await session.io.ask(name, resolver, request, call)
            except (AdapterInvalid, AdapterIncompatible, ProviderError, SettingsError):
                raise  # A resolver knows the reference, or the provider failed.
            except AdapterNotFound as error:
                said += [f"{name}: {reason}" for reason in error.reasons or (error.message,)]
                continue
            except Exception as error:  # noqa: BLE001 - the next resolver may know it
                said.append(f"{name}: {in_words(error)}")
                continue
            with session.relay.contained:
                known = callable(getattr(found, "gguf", None))
            if known:
                adapter: Adapter = found
                return adapter
            said.append(
                f"{name}: {'does not know it' if found is None else 'returned something that is not an adapter'}"
            )
        what = "; ".join(said) or "no plugin that resolves adapters is installed"
        raise AdapterNotFound(
            f"The adapter `{request.reference}` was not found ({what}).",
            reference=request.reference,
            reasons=said,
            hint="Check its name, or install `graftage-lora`." if not said else "Check its name.",
        )


def read_on_missing(value: Literal["error", "base"] | None) -> Literal["error", "base"]:
    """Return what `use_adapter` does if the adapter is not found; by default it raises.

    Raises:
        RequestRejected: it is neither `error` nor `base`.
    """
    if value not in ("error", "base", None):
        raise RequestRejected(f"`on_missing` must be 'error' or 'base', not {value!r}.", hint="Or leave it out.")
    return value or "error"


def _checked(adapter: Adapter, reference: str, model: str, *, force: bool) -> tuple[str, ...]:
    """Return the warnings of an adapter that may be used.

    Raises:
        AdapterIncompatible: it may not.
    """
    verdict = adapter.verdict
    if verdict.status != "incompatible":
        unsure = f"It is unknown whether the adapter `{adapter.name}` fits `{model}`: {'; '.join(verdict.reasons)}."
        return (*verdict.warnings, *((unsure,) if verdict.status == "unknown" else ()))
    reasons = "; ".join(verdict.reasons)
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


def _again(state: State) -> BaseException:
    """Return the error of a failed switch, for a later call to raise."""
    error = state.error
    if isinstance(error, AdapterError):
        return copy.copy(error)  # One instance raised in several threads would mix tracebacks.
    failed = AdapterError(
        f"The switch to the adapter `{state.reference}` failed: {str(error) or type(error).__name__}",
        reference=state.reference,
        hint="Switch again, or call `use_adapter(None)` for the base model.",
    )
    failed.__cause__ = error
    return failed
