"""Adapters of one connection: resolved by plugins, loaded by the provider, active for all calls or for one."""

from __future__ import annotations

import copy
import itertools
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from graftage import _limits, _messages
from graftage._io import has
from graftage.exceptions import (
    AdapterError,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterNotFound,
    RequestRejected,
)
from graftage.types import ACTIVE, Adapter, AdapterChoice, Call, LoadAdapterRequest, LoadedAdapter, ResolveRequest

if TYPE_CHECKING:
    from graftage._session import Session

__all__ = ["Adapters"]


@dataclass(frozen=True, slots=True)
class _State:
    """What the calls that name no adapter answer with."""

    reference: str | None = None
    model: str = ""
    loaded: LoadedAdapter | None = None
    error: BaseException | None = None
    """Why the last switch failed: every call raises it, or another project's adapter might answer."""
    warnings: tuple[str, ...] = ()


class Adapters:
    """The active adapter and those loaded so far."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._state = _State()
        self._lock = threading.Lock()
        self._tickets = itertools.count(1)
        self._latest = 0
        self._loaded: dict[tuple[str, str], LoadedAdapter] = {}

    @property
    def active(self) -> str | None:
        """The name of the active adapter."""
        loaded = self._state.loaded
        return loaded.name if loaded else None

    async def switch(
        self, reference: Any, model: str, on_missing: Literal["error", "base"], call: Call
    ) -> LoadedAdapter | None:
        """Make an adapter the active one; of several switches at one time, the one that was asked for last wins."""
        if on_missing not in ("error", "base"):
            raise RequestRejected(f"`on_missing` is {on_missing!r}.", hint="Use 'error' or 'base'.")
        with self._lock:
            ticket = self._latest = next(self._tickets)
        if reference is None:
            state = _State()
        else:
            state = await self._switched(os.fspath(reference), model, on_missing, call, ticket)
        self._settle(ticket, state)
        return self._state.loaded

    async def _switched(self, reference: str, model: str, on_missing: str, call: Call, ticket: int) -> _State:
        try:
            loaded = await self._load(reference, model, call)
        except AdapterNotFound as error:
            if on_missing != "base":
                self._settle(ticket, _State(reference, model, error=error))
                raise
            note = f"The adapter `{reference}` was not found; the base model answers."
            return _State(None, model, warnings=(note,))
        except BaseException as error:
            self._settle(ticket, _State(reference, model, error=error))
            raise
        return _State(reference, model, loaded)

    def _settle(self, ticket: int, state: _State) -> None:
        with self._lock:
            if ticket == self._latest:
                self._state = state

    async def for_call(
        self, choice: AdapterChoice, model: str, call: Call
    ) -> tuple[LoadedAdapter | None, tuple[str, ...]]:
        """The adapter one call answers with, and warnings: a snapshot, whatever is switched meanwhile."""
        if choice is None:
            return None, ()
        if choice is not ACTIVE:
            return await self._load(os.fspath(choice), model, call), ()
        state = self._state
        if state.error is not None:
            raise _again(state)
        if state.reference is None or state.model == model:
            return state.loaded, state.warnings
        return await self._load(state.reference, model, call), state.warnings

    async def _load(self, reference: str, model: str, call: Call) -> LoadedAdapter:
        session = self._session
        _messages.require("load_adapter", has(session.relay, "load_adapter"), session.provider)
        adapter = await self._resolve(reference, model, call)
        if adapter.verdict.status == "incompatible":
            raise AdapterIncompatible(
                f"The adapter `{reference}` does not fit `{model}`: {'; '.join(adapter.verdict.reasons)}.",
                reference=reference,
                reasons=adapter.verdict.reasons,
                hint="Choose the model it was made for.",
            )
        key = (adapter.digest, model)
        if key in self._loaded:
            return self._loaded[key]
        gate = _limits.gate_for(f"adapter {session.provider}", f"{session.address} {key}")
        await session._granted(gate, gate.enter(1), call)  # noqa: SLF001 - one loads, the others wait and find it
        try:
            if key not in self._loaded:
                request = LoadAdapterRequest(call=call, adapter=adapter, model=model)
                self._loaded[key] = await session.io.call(session.relay, "load_adapter", request, call)
        finally:
            gate.leave()
        return self._loaded[key]

    async def _resolve(self, reference: str, model: str, call: Call) -> Adapter:
        session = self._session
        request = ResolveRequest(
            reference=reference,
            model=model,
            provider=session.provider,
            base=session.base_facts(model, call),
            call=call,
        )
        said: list[str] = []
        for name, resolver in session.relay.each("resolve_adapter"):
            try:
                found: Adapter | None = await session.io.run(resolver, request)
            except (AdapterInvalid, AdapterIncompatible):
                raise
            except Exception as error:  # noqa: BLE001 - one resolver's failure must not hide what another knows
                said.append(f"{name}: {type(error).__name__}: {error}")
                continue
            if found is not None:
                return found
            said.append(f"{name}: does not know it")
        what = "; ".join(said) or "no plugin that resolves adapters is installed"
        raise AdapterNotFound(
            f"The adapter `{reference}` was not found ({what}).",
            reference=reference,
            reasons=said,
            hint="Check its name, or install `graftage-lora`." if not said else "Check its name.",
        )


def _again(state: _State) -> BaseException:
    """The error of a failed switch, to be raised by a later call."""
    error = state.error
    if isinstance(error, AdapterError):
        return copy.copy(error)  # One instance raised in several threads would mix their tracebacks.
    failed = AdapterError(
        f"The switch to the adapter `{state.reference}` failed: {error}",
        reference=state.reference,
        hint="Switch again, or call `use_adapter(None)` for the base model.",
    )
    failed.__cause__ = error
    return failed
