"""The whole suite runs offline, replays cassettes, and waits for nothing between attempts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest_plugins = ["graftage.testing.plugin"]


@pytest.fixture(autouse=True)
def _offline(no_network: None) -> None:
    """Only loopback can be reached."""


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No setting of the machine reaches a test."""
    for name in list(os.environ):
        if name.startswith(("GRAFTAGE_", "OLLAMA_")) and not name.startswith("GRAFTAGE_LIVE"):
            monkeypatch.delenv(name)
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GRAFTAGE_CONFIG", str(tmp_path_factory.getbasetemp() / "no-settings.toml"))


@pytest.fixture(autouse=True)
def _free(free_waiting: None) -> None:
    """Waits between attempts are free."""


class Both:
    """One client of either kind, so that a test says what happens once: `llm.chat(...)` in both modes.

    In async mode each method runs to its end in one event loop that lives as long as the test.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self._loop = asyncio.new_event_loop() if mode == "async" else None
        self._clients: list[Any] = []

    def connect(self, *arguments: Any, **settings: Any) -> Any:
        """A client whose methods block, whichever kind it is inside."""
        import graftage

        if self._loop is None:
            client: Any = graftage.connect(*arguments, **settings)
        else:
            client = _Waiting(graftage.connect_async(*arguments, **settings), self.run)
        self._clients.append(client)
        return client

    def run(self, work: Any) -> Any:
        """Run a coroutine to its end."""
        assert self._loop is not None
        return self._loop.run_until_complete(work)

    def close(self) -> None:
        for client in self._clients:
            client.close()
        if self._loop is not None:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()


class _Waiting:
    """An async client, or stream, as if it were a sync one."""

    def __init__(self, inner: Any, run: Callable[[Any], Any]) -> None:
        self._inner = inner
        self._run = run

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **named: Any) -> Any:
            result = value(*arguments, **named)
            if asyncio.iscoroutine(result):
                result = self._run(result)
            return _Waiting(result, self._run) if hasattr(result, "__anext__") else result

        return call

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return self._run(self._inner.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> _Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture(params=["sync", "async"])
def both(request: pytest.FixtureRequest) -> Iterator[Both]:
    """The same behaviour, from both kinds of client."""
    kind = Both(request.param)
    yield kind
    kind.close()
