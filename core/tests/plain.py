"""`Echo` with plain hooks, which the core runs in threads, and with one that needs an event loop."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from graftage.calls import Blocking
from graftage.hookspecs import hookimpl
from graftage.testing import Echo

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from graftage.types import Chunk

STREAMS = ("chat", "generate", "pull_model")


def finish(work: Any) -> Any:
    """Return the result of a coroutine that never suspends."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it suspended")


class PlainEcho(Echo):
    """`Echo` with `def` hooks only."""

    @hookimpl
    def connect(self, request: Any) -> object:
        inner: Any = super().connect(request)
        hooks = {name: _plain(name) for name in dir(inner) if hasattr(getattr(inner, name), "graftage_impl")}
        return type("PlainConnection", (_Around,), hooks)(inner)


class LoopedEcho(Echo):
    """`Echo` whose chat needs an event loop."""

    @hookimpl
    def connect(self, request: Any) -> object:
        inner: Any = super().connect(request)
        kind = type(inner)

        class Looped(kind):  # type: ignore[misc,valid-type]
            needs_event_loop = True

            @hookimpl
            async def chat(self, request: Any) -> AsyncIterator[Chunk]:
                async for chunk in kind.chat(self, request):
                    await asyncio.sleep(0)
                    yield chunk

        return Looped(self)


class _Around:
    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.address = inner.address


def _blocking(request: Any) -> Any:
    return replace(request, call=replace(request.call, waiting=Blocking()))


def _plain(name: str) -> Any:
    if name == "capabilities":

        @hookimpl
        def capabilities(self: _Around) -> Any:
            return self.inner.capabilities()

        return capabilities
    if name in STREAMS:

        @hookimpl
        def stream(self: _Around, request: Any) -> Iterator[Any]:
            chunks = getattr(self.inner, name)(_blocking(request))
            try:
                while (chunk := finish(anext(chunks, None))) is not None:
                    yield chunk
            finally:
                finish(chunks.aclose())

        return stream

    @hookimpl
    def once(self: _Around, request: Any) -> Any:
        return finish(getattr(self.inner, name)(_blocking(request)))

    return once
