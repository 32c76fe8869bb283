"""What the methods of the clients stand on: opening, closing, reading arguments, errors as the host wants them.

`_BlockingClient` and `_AwaitingClient` have the same methods, so that `sync_client.py` can be made from
`async_client.py`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeAlias, TypeVar

from graftage._client.streams import AsyncStream, Stream
from graftage._engine.call import raise_translated
from graftage._engine.driving import drive
from graftage._records import dataclass
from graftage.exceptions import GraftageError
from graftage.types import ACTIVE

if TYPE_CHECKING:
    import asyncio
    from typing import Self, Unpack

    from graftage._client.streams import Begun
    from graftage._engine.arguments import Bound, CallOptions, DefaultArguments
    from graftage._engine.choosing import ConnectOptions, Opening
    from graftage._engine.fallback import Chain
    from graftage._engine.session import Session
    from graftage.settings import Settings
    from graftage.types import AdapterChoice, Capabilities, Reply, Stats

P = ParamSpec("P")
T = TypeVar("T")
Read: TypeAlias = "Callable[[Any, Mapping[str, Any]], CallOptions]"
"""Reads the subject and the arguments of a call."""


def translate_errors(method: Callable[P, T]) -> Callable[P, T]:
    """Let a method of a client raise errors as the host wants to see them."""

    @functools.wraps(method)
    def call(*arguments: P.args, **named: P.kwargs) -> T:
        try:
            return method(*arguments, **named)
        except GraftageError as error:
            raise_translated(error, _client(arguments).translate)

    return call


def translate_errors_async(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """`translate_errors` for what is awaited."""

    @functools.wraps(method)
    async def call(*arguments: P.args, **named: P.kwargs) -> T:
        try:
            return await method(*arguments, **named)
        except GraftageError as error:
            raise_translated(error, _client(arguments).translate)

    return call


def _client(arguments: Any) -> ConnectOptions:
    options: ConnectOptions = arguments[0]._options  # noqa: SLF001 - the method's own client
    return options


@dataclass(frozen=True, slots=True)
class _View:
    """What makes a client a view of another."""

    root: Any
    """The client whose connection it shares, of the same class."""
    bound: Bound
    failed_switch: tuple[Any, BaseException] | None
    """The switch that failed before, if neither client was open yet."""


class _Client:
    """What both clients share. An async client knows these facts once it is open."""

    def __init__(
        self, options: ConnectOptions, session: Session | Chain | None = None, view: _View | None = None
    ) -> None:
        self._options = options
        self._view = view
        self._session = session
        self._lock = threading.Lock()
        self._closed = False
        self._origins: Mapping[str, str] = {}
        self._failed_switch = view.failed_switch if view is not None else None

    def _with_defaults(
        self, operation: Literal["chat", "generate", "run_tools"], arguments: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Return the arguments of a call with the defaults of this view."""
        if self._view is None:
            return arguments
        from graftage._engine.arguments import with_defaults

        return with_defaults(operation, self._view.bound.defaults, arguments)

    def _ready(self) -> Session | Chain:
        """Return the session; a sync client opens it, an async one must be open."""
        raise NotImplementedError

    def _adopt(self, session: Session | Chain) -> Session | Chain:
        """Take the session that was opened, with the failure of a switch before it, so that no call gets between."""
        if self._failed_switch is not None:
            session.switch_failed(*self._failed_switch)
        self._session = session
        return session

    def _note_failed_switch(self, reference: object, error: BaseException) -> None:
        """Note a switch that failed before the client was open: the base model must not answer in its place."""
        self._failed_switch = (reference, error)
        if self._session is not None:
            self._session.switch_failed(reference, error)

    @translate_errors
    def bind(
        self, *, model: str | None = None, adapter: AdapterChoice = ACTIVE, **defaults: Unpack[DefaultArguments]
    ) -> Self:
        """Return a view of this client with a model, an active adapter and default arguments of its own.

        It shares everything else: connection, slots, counters, plugins, loaded adapters. It asks no server, so that a
        program can have a view for each project. What a call gives itself is used instead of a default; `use_adapter`
        of a view, also a failed one, changes no other view and not this client, whose later switches do not change the
        view. Closing a view ends the view alone; it must be this client that is closed, which ends all its views.
        A view of a view has the defaults of both.

        Args:
            model: the model, if it is not that of this client.
            adapter: the adapter that is active from the start, loaded by the first call; None for the base model;
                left out, the one that is active in this client now.
            defaults: arguments of `chat` except `images`: for `chat`, `generate` (those that it has), `count_tokens`,
                `warm` and `run_tools`. `options` are merged with those of a call, name by name.

        Raises:
            RequestRejected: an argument is invalid, as far as this shows without a server.
        """
        from graftage._engine.arguments import Bound, read_bound

        if self._closed:
            raise RuntimeError("the client is closed")
        root, before = (self._view.root, self._view.bound) if self._view else (self, Bound())
        bound = read_bound(model, adapter, before.defaults, defaults)
        failed = self._failed_switch if adapter is ACTIVE else None
        session = self._session.view(bound) if self._session is not None else None
        return type(self)(self._options, session, _View(root, bound.over(before), failed))

    @property
    @translate_errors
    def provider(self) -> str:
        """The provider's name."""
        return self._ready().provider

    @property
    @translate_errors
    def model(self) -> str | None:
        """The model of all calls that do not name one."""
        return self._ready().model

    @property
    @translate_errors
    def address(self) -> str:
        """The address of the provider's server, in words."""
        return self._ready().address

    @property
    @translate_errors
    def members(self) -> tuple[Self, ...]:
        """The providers of a chain, each as a client; of a client that is not a chain, the client itself."""
        sessions = getattr(self._ready(), "members", None)
        return tuple(type(self)(self._options, each, self._view) for each in sessions) if sessions else (self,)

    @property
    @translate_errors
    def settings(self) -> Settings:
        """The settings in effect."""
        return self._ready().settings

    @property
    def origins(self) -> Mapping[str, str]:
        """Where each setting that is not a default came from."""
        return self._view.root.origins if self._view is not None else self._origins

    @translate_errors
    def capabilities(self) -> Capabilities:
        """Return what the provider can do, without asking a server."""
        return self._ready().capabilities()

    @translate_errors
    def stats(self) -> Stats:
        """Return what this client has done so far."""
        return self._ready().stats()


class _BlockingClient(_Client):
    """Finds and checks everything when it is made. What must ask a server, the choice by `auto`, waits for a call."""

    def __init__(
        self, options: ConnectOptions, session: Session | Chain | None = None, view: _View | None = None
    ) -> None:
        super().__init__(options, session, view)
        if session is None and view is None:
            from graftage._engine.choosing import Opening

            try:
                self._opening: Opening = Opening(options)
                self._origins = self._opening.origins
                if not self._opening.is_auto:
                    self._resolve()
            except GraftageError as error:
                raise_translated(error, options.translate)

    def _resolve(self) -> Session | Chain:
        from graftage._engine.waiting import BlockingIO

        if self._view is not None:
            session = self._view.root._open()  # noqa: SLF001 - a client of ours
            return self._adopt(session.view(self._view.bound, fresh=True))
        return self._adopt(drive(self._opening.resolve(BlockingIO())))

    def _open(self) -> Session | Chain:
        session = self._session
        if session is None:
            with self._lock:
                if self._closed:
                    raise RuntimeError("the client is closed")
                session = self._session or self._resolve()
        return session

    _ready = _open

    def _open_to_switch(self, reference: object) -> Session | Chain:
        try:
            return self._open()
        except BaseException as error:
            self._note_failed_switch(reference, error)
            raise

    def _read(self, read: Read, subject: object, arguments: Mapping[str, object]) -> CallOptions:
        return read(subject, arguments)

    def _answer(
        self,
        operation: Literal["chat", "generate"],
        read: Read,
        subject: object,
        stream: bool,
        arguments: Mapping[str, object],
    ) -> Any:
        """Return the reply, or a stream whose first chunk has come."""
        try:
            session = self._open()
            asked = read(subject, self._with_defaults(operation, arguments))
            begun = drive(session.infer(operation, asked, stream=stream))
        except GraftageError as error:
            raise_translated(error, self._options.translate)
        return Stream(begun, self._options.translate) if stream else begun[0].whole()

    def _close(self) -> None:
        self._closed = True
        with self._lock:  # Another thread may be opening it.
            session = self._session
        if session is not None:
            drive(session.close())


class _AwaitingClient(_Client):
    """Opens at `async with`, or at its first call; tasks that come meanwhile wait for the one that opens it."""

    _task: asyncio.Task[None] | None = None

    def _ready(self) -> Session | Chain:
        if self._session is None:
            raise RuntimeError("the client is not open: use `async with`, or call it first")
        return self._session

    async def _open(self) -> Session | Chain:
        _check_asyncio()
        if self._session is None:
            await self._opened()
        return self._ready()

    async def _opened(self) -> None:
        import asyncio

        if self._closed:
            raise RuntimeError("the client is closed")
        task, loop = self._task, asyncio.get_running_loop()
        if task is None or task.done() or task.get_loop() is not loop:
            task = self._task = loop.create_task(self._resolve())
            task.add_done_callback(_retrieve)
        await asyncio.shield(task)  # A caller that gives up must not take it from the others.

    async def _resolve(self) -> None:
        import asyncio

        from graftage._engine.awaiting import AwaitingIO
        from graftage._engine.choosing import Opening
        from graftage._engine.threads import submit

        if self._view is not None:
            session = await self._view.root._open()  # noqa: SLF001 - a client of ours
            self._adopt(session.view(self._view.bound, fresh=True))
            return
        # It imports and reads files: not on the event loop.
        opening = await asyncio.wrap_future(submit(Opening, self._options))
        self._adopt(await opening.resolve(AwaitingIO()))
        self._origins = opening.origins

    async def _open_to_switch(self, reference: object) -> Session | Chain:
        try:
            return await self._open()
        except BaseException as error:
            self._note_failed_switch(reference, error)
            raise

    async def _read(self, read: Read, subject: object, arguments: Mapping[str, object]) -> CallOptions:
        """Read the arguments of a call, in a thread if that may take the time of a file."""
        from graftage._engine.arguments import may_read_files

        if may_read_files(subject, arguments):
            return await self._ready().io.run(read, subject, arguments)
        return read(subject, arguments)

    def _answer(
        self,
        operation: Literal["chat", "generate"],
        read: Read,
        subject: object,
        stream: bool,
        arguments: Mapping[str, object],
    ) -> Any:
        """Return a coroutine that gives the reply, or a stream that opens when it is awaited or read."""

        async def begin() -> Begun:
            session = await self._open()
            asked = await self._read(read, subject, self._with_defaults(operation, arguments))
            return await session.infer(operation, asked, stream=stream)

        if stream:
            return AsyncStream(begin, self._options.translate)
        work: Any = self._whole(begin)
        work.__qualname__ = f"AsyncClient.{operation}"  # Python names it if it is never awaited.
        return work

    async def _whole(self, begin: Callable[[], Coroutine[Any, Any, Begun]]) -> Reply:
        try:
            run, _ = await begin()
        except GraftageError as error:
            raise_translated(error, self._options.translate)
        return run.whole()

    async def _close(self) -> None:
        _check_asyncio()
        self._closed = True
        if self._task is not None and not self._task.done():
            with contextlib.suppress(Exception):  # Its error goes to the caller that wanted it open.
                await self._task
        if self._session is not None:
            await self._session.close()


def _retrieve(task: asyncio.Task[None]) -> None:
    """Look at how the opening ended: its callers may all have given up."""
    if not task.cancelled():
        task.exception()


def _check_asyncio() -> None:
    """Raise if no asyncio task runs this coroutine, as under trio or if it is driven by hand."""
    import asyncio

    with contextlib.suppress(RuntimeError):  # There is no loop.
        if asyncio.current_task() is not None:
            return
    raise RuntimeError(
        "an async client needs asyncio: await its methods in an asyncio task, for example under `asyncio.run`. With "
        "trio or without an event loop, use the sync client from `graftage.connect`, in a thread if it must not block"
    )
