"""A fallback chain: providers in order. The next one is asked if the one before could not begin to answer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from graftage._engine.adapters import missing_note, name_of, read_on_missing
from graftage._engine.arguments import Bound, check_model, read_adapter, read_flag
from graftage._engine.session import Measured, Session
from graftage._records import dataclass
from graftage.exceptions import AdapterNotFound, GraftageError, RequestRejected
from graftage.types import ACTIVE, AdapterInfo, Capabilities, Embeddings, LoadedAdapter, Ranking, Stats, Timeouts

if TYPE_CHECKING:
    from graftage._engine.arguments import CallOptions
    from graftage._engine.call import Run

__all__ = ["Chain", "skipped_note"]

T = TypeVar("T")


def skipped_note(provider: str, model: str | None, error: GraftageError) -> str:
    """Return the note about a member that was skipped."""
    return f"`{provider}:{model or ''}` was skipped: {error.message}"


def _note_skipped(error: GraftageError, skipped: Sequence[str]) -> None:
    """Add to the error that ends a chain what happened to the members before."""
    details = getattr(error, "details", None)
    if isinstance(details, dict):
        details.setdefault("skipped", tuple(skipped))
    if skipped:
        error.hint = " ".join(filter(None, (error.hint, "Before it:", *skipped)))


@dataclass(frozen=True, slots=True)
class _Adapter:
    """What `use_adapter` asked for; until then, the adapter that is active at each member."""

    reference: Any
    on_missing: Literal["error", "base"] = "error"
    force: bool = False


class Chain:
    """Sessions in order, with the methods of a session that make sense for several providers."""

    def __init__(
        self, sessions: Sequence[Session], left_out: Sequence[str] = (), adapter: _Adapter | None = None
    ) -> None:
        self.sessions = tuple(sessions)
        self._left_out = tuple(left_out)
        """Why members are not among them, in words."""
        self._adapter = adapter or _Adapter(ACTIVE)

    @property
    def io(self) -> Any:
        """How to wait: the same for all members."""
        return self.sessions[0].io

    @property
    def provider(self) -> str:
        """The names of the members, in order."""
        return ", ".join(session.provider for session in self.sessions)

    @property
    def model(self) -> str | None:
        """The first member's model."""
        return self.sessions[0].model

    @property
    def settings(self) -> Any:
        """The first member's settings."""
        return self.sessions[0].settings

    @property
    def address(self) -> str:
        """The members' addresses, in order."""
        return ", ".join(session.address for session in self.sessions)

    @property
    def members(self) -> tuple[Session, ...]:
        """The sessions of the members, each with the adapter of the chain if it has one."""
        reference = self._adapter.reference
        if reference is ACTIVE:
            return self.sessions
        bound = Bound(adapter=None if reference is None else read_adapter(reference))
        return tuple(session.view(bound) for session in self.sessions)

    def single(self) -> Session:
        """Refuse an operation for one provider."""
        raise RuntimeError("this client has several providers: call it on one of its `members`")

    def view(self, bound: Bound, *, fresh: bool = False) -> Chain:
        """Return the same chain with a model and an active adapter of its own, as `Session.view` does."""
        here = replace(bound, adapter=ACTIVE)
        sessions = [session.view(here, fresh=fresh) for session in self.sessions]
        own = bound.adapter is not ACTIVE or fresh
        return Chain(sessions, self._left_out, _Adapter(bound.adapter) if own else self._adapter)

    def timeouts(self, given: float | Timeouts | None) -> Timeouts:
        """Return the limits of a call, on all members together."""
        return self.sessions[0].timeouts(given)

    async def infer(
        self, operation: Literal["chat", "generate"], asked: CallOptions, *, stream: bool
    ) -> tuple[Run, Any]:
        """Start a reply: the first member that gives a first chunk gives all others, too."""
        adapter = self._adapter if asked.adapter is ACTIVE else _Adapter(asked.adapter, force=asked.force)
        asked = replace(asked, adapter=adapter.reference, force=asked.force or adapter.force)

        async def ask(session: Session, timeouts: Timeouts, notes: Sequence[str]) -> tuple[Run, Any]:
            here = replace(asked, timeout=timeouts)
            try:
                run, first = await session.infer(operation, here, stream=stream, warnings=notes)
            except AdapterNotFound:
                if adapter.on_missing != "base":
                    raise
                notes = (*notes, missing_note(read_adapter(adapter.reference)))
                here = replace(here, adapter=None)
                run, first = await session.infer(operation, here, stream=stream, warnings=notes)
            return run, first

        return await self._first(ask, asked.timeout)

    async def embed(self, asked: CallOptions) -> Embeddings:
        """Return one vector for each input, all from one member."""
        return await self._measure(Session.embed, asked)

    async def rerank(self, asked: CallOptions) -> Ranking:
        """Return the documents in the order of one member's scores."""
        return await self._measure(Session.rerank, asked)

    async def _measure(
        self, of: Callable[[Session, CallOptions], Coroutine[Any, Any, Measured]], asked: CallOptions
    ) -> Measured:
        async def ask(session: Session, timeouts: Timeouts, skipped: Sequence[str]) -> Measured:
            answer = await of(session, replace(asked, timeout=timeouts))
            return replace(answer, warnings=(*skipped, *answer.warnings))

        return await self._first(ask, asked.timeout)

    async def _first(self, ask: Callable[..., Coroutine[Any, Any, T]], timeout: float | Timeouts | None) -> T:
        timeouts = self.timeouts(timeout)
        deadline = time.monotonic() + timeouts.total
        skipped = list(self._left_out)
        for session in self.sessions:
            left = max(deadline - time.monotonic(), 0.001)
            try:
                return await ask(session, replace(timeouts, total=left), tuple(skipped))
            except GraftageError as error:
                late = time.monotonic() >= deadline
                begun = error.partial is not None
                if session is self.sessions[-1] or late or begun or not error.falls_back:
                    _note_skipped(error, skipped)
                    raise
                model = getattr(error, "model", None) or session.model
                skipped.append(skipped_note(session.provider, model, error))
        raise RuntimeError("a chain without members")  # pragma: no cover - connect refuses an empty list

    async def use_adapter(
        self,
        reference: object,
        *,
        on_missing: Literal["error", "base"] | None,
        force: bool | None,
        model: str | None,
        timeout: float | Timeouts | None,
    ) -> LoadedAdapter | None:
        """Note the adapter of all calls that follow: each member resolves it at its next call."""
        self._adapter = _Adapter(reference)  # If an argument is invalid, the adapter before must not answer.
        choice = None if reference is None else read_adapter(reference)
        self._adapter = _Adapter(choice, on_missing=read_on_missing(on_missing), force=read_flag("force", force))
        if model is not None:
            check_model(model)
        self.timeouts(timeout)
        return None

    def switch_failed(self, reference: object, error: BaseException) -> None:  # noqa: ARG002 - the next call tries again
        """Note a switch that failed before the client was open."""
        self._adapter = _Adapter(reference)

    async def list_adapters(
        self, model: str | None = None, timeout: float | Timeouts | None = None
    ) -> tuple[AdapterInfo, ...]:
        """List the adapters that the plugins know. Only one provider can describe a model to judge them against."""
        asked = self.sessions[0] if model is None else self.single()
        return await asked.list_adapters(model, timeout)

    async def pull_adapter(
        self, reference: object, name: str | None, overwrite: bool | None, timeout: float | Timeouts | None
    ) -> AdapterInfo:
        """Download an adapter by the first plugin that knows such references: no member is asked."""
        return await self.sessions[0].pull_adapter(reference, name, overwrite, timeout)

    def capabilities(self) -> Capabilities:
        """Return what at least one member can do, with the options that all of them take."""
        each = [session.capabilities() for session in self.sessions]
        return Capabilities(
            features=frozenset().union(*(one.features for one in each)),
            options=frozenset.intersection(*(one.options for one in each)),
        )

    def stats(self) -> Stats:
        """Return the sums of the counters of all members."""
        each = [session.stats() for session in self.sessions]
        names = [each.name for each in fields(Stats) if each.name != "active_adapter"]
        reference, active = self._adapter.reference, None
        if reference is ACTIVE:
            active = next(filter(None, (one.active_adapter for one in each)), None)
        elif reference is not None:
            with contextlib.suppress(RequestRejected):  # Every call raises it.
                active = name_of(read_adapter(reference))
        return Stats(**{name: sum(getattr(one, name) for one in each) for name in names}, active_adapter=active)

    async def close(self) -> None:
        """Close every member, even if closing one fails."""
        failed: GraftageError | None = None
        for session in self.sessions:
            try:
                await session.close()
            except GraftageError as error:
                failed = error
        if failed is not None:
            raise failed
