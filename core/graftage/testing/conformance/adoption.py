"""What a plugin gives to the suite, and what the suite's tests are given: clients, a stand-in for the server, a spy."""

from __future__ import annotations

import functools
import inspect
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn, TypeVar

import pytest

from graftage._engine.checking import contract_of
from graftage._engine.plugins import plugin_name
from graftage._values import close, entry_points, identity
from graftage._version import __version__
from graftage.hookspecs import hookimpl
from graftage.retry import no_waiting
from graftage.testing.both import Both
from graftage.testing.cassettes import Cassette
from graftage.testing.conformance import report
from graftage.testing.conformance.spy import Spy
from graftage.testing.conformance.standin import PATIENCE, Answer, Probe, Redirect, Seen, StandIn, served

if TYPE_CHECKING:
    from graftage.calls import ResolveRequest
    from graftage.http import Transport
    from graftage.types import Adapter

__all__ = ["Adoption", "not_applicable", "not_offered", "since"]

Test = TypeVar("Test", bound=Callable[..., None])
PREFIX: Final = "CONFORMANCE"
"""Variables with this prefix replace those of the user, which the tests must not see."""
PROMPT: Final = "Count from one to five."
RECORDED_CHATS: Final = ("test_chat_gives_text", "test_stream_gives_chunks")
"""The tests whose cassettes the stand-in plays."""
NO_RECORDING: Final = "it needs a recording"


def since(version: str) -> Callable[[Test], Test]:
    """Mark a test as new in a release of Graftage. If it fails for a plugin that adopted an older suite, it warns."""

    def mark(test: Test) -> Test:
        test.since = version  # type: ignore[attr-defined]
        return test

    return mark


def not_offered(what: str) -> NoReturn:
    """Skip a test of something that the provider does not declare."""
    pytest.skip(f"{report.NOT_OFFERED}: {what}")


def not_applicable(why: str) -> NoReturn:
    """Skip a test that makes no sense for this provider."""
    pytest.skip(f"{report.NOT_APPLICABLE}: {why}")


class Shelf:
    """A plugin that finds the adapter of a suite, whatever it is called."""

    name = "shelf"

    def __init__(self, adapter: Adapter | None) -> None:
        self._adapter = adapter

    @hookimpl
    def resolve_adapter(self, request: ResolveRequest) -> Adapter | None:  # noqa: ARG002 - there is only one
        """Return it."""
        return self._adapter


class Recording:
    """A value for `transport`: the test's cassette, which is opened at the first request.

    A test that is skipped needs none.
    """

    def __init__(self, path: Path, *, live: str | None, **options: Any) -> None:
        self._path = path
        self._live = live
        self._options = options

    @functools.cached_property
    def cassette(self) -> Cassette:
        """The cassette."""
        return Cassette(self._path, **self._options)

    def wrap(self, network: Callable[[], Transport]) -> Transport:
        """Return a transport that replays, or that records the server `live`."""
        return self.cassette.wrap(partial(Redirect(self._live).wrap, network) if self._live else network)

    def save(self) -> None:
        """Write what was recorded, if anything was."""
        if "cassette" in vars(self):
            self.cassette.save()


class Adoption:
    """The attributes of a plugin's class, and the fixtures of its tests."""

    provider: Any
    """The plugin object: a module or an instance. A property can make a new one for each test."""
    cassettes: ClassVar[Path | str | None] = None
    """The folder of the recordings; None for a provider without a server."""
    settings: Mapping[str, Any] = {}
    """The settings to connect with, such as `host`."""
    model: str | None = None
    """The model to ask; by default the provider's own."""
    models: Mapping[str, str] = {}
    """Other models, by the feature that only they have: `{"embed": "tiny-embed"}`."""
    adapter: Adapter | None = None
    """An adapter that fits the model, if the provider loads adapters."""
    live: str | None = None
    """The server to record from, if its address is not that in `settings`."""
    recording: Mapping[str, Any] = {}
    """Arguments of `Cassette` for recordings, such as `server`, `model`, `digest` and `before_record_response`."""
    suite: ClassVar[str] = __version__
    """The release of Graftage whose suite the plugin passes: a newer test that fails is a warning."""
    deviations: ClassVar[Mapping[str, str]] = {}
    """Tests that are known to fail, each with the reason. The report shows them. One that passes fails."""

    def __init_subclass__(cls) -> None:
        """Refuse a test that hides one of the suite, and mark the known deviations."""
        super().__init_subclass__()
        suite = next(each for each in reversed(cls.__mro__) if issubclass(each, Adoption) and _tests(each))
        tests = _tests(suite)
        if cls is suite:
            return
        for name, test in tests.items():
            if inspect.unwrap(getattr(cls, name)) is not test:
                raise TypeError(f"{cls.__name__} hides `{name}` of the suite: declare it in `deviations` instead")
        for name, reason in cls.deviations.items():
            if name not in tests:
                near = close(name, tests)
                raise TypeError(f"`deviations` names no test of the suite: {name}{f' (or {near[0]}?)' if near else ''}")
            if not reason.strip():
                raise TypeError(f"the deviation `{name}` has no reason")
        for name, test in tests.items():
            if name in cls.deviations:
                setattr(cls, name, _may_fail(test, cls.deviations[name], strict=True))
            elif _release(getattr(test, "since", "0")) > _release(cls.suite):
                setattr(cls, name, _may_fail(test, f"{report.NEW} {test.since}", strict=False))
            else:
                setattr(cls, name, test)

    # --- Fixtures --------------------------------------------------------------------------------------------------

    @pytest.fixture(autouse=True)
    def _reported(self, request: pytest.FixtureRequest) -> None:
        report.begin(request, self._look()["facts"])

    @pytest.fixture(autouse=True)
    def _alone(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Without waits, and without the user's settings and other plugins."""
        monkeypatch.setenv(
            f"{PREFIX}_DISABLED_PLUGINS", ",".join(each.name for each in entry_points("graftage.plugins"))
        )
        with no_waiting():
            yield

    @pytest.fixture(params=["sync", "async"])
    def both(self, request: pytest.FixtureRequest) -> Iterator[Both]:
        """Both clients: the test runs with each."""
        kind = Both(request.param)
        yield kind
        kind.close()

    @pytest.fixture
    def connect(self, both: Both) -> Callable[..., Any]:
        """A function that returns an open client of the provider; its methods block with both clients."""

        def connect(provider: Any = None, **settings: Any) -> Any:
            given = {"model": self.model, **self.settings, "plugins": [Shelf(self.adapter)], **settings}
            return both.opened(provider or self.provider, env_prefix=PREFIX, **given)

        return connect

    @pytest.fixture
    def transport(self, request: pytest.FixtureRequest, both: Both) -> Iterator[Recording | None]:
        """The test's cassette; None for a provider without a server."""
        if self.cassettes is None:
            if self._uses_http():
                not_applicable(NO_RECORDING)
            self.pause = 0.2
            yield None
            return
        mode = str(request.config.getoption("record_mode", None) or "none").replace("rewrite", "all")
        records = mode != "none" and both.mode == "sync"  # The async client replays what the sync one records.
        options = {**self.recording, "mode": mode} if records else {}
        found = Recording(self._cassette(request.function.__name__), live=self.live, **options)
        self.pause = 0.2 if records else 0.0
        with suppress(pytest.FixtureLookupError):  # Our plugin for pytest is not enabled.
            request.getfixturevalue("claim_cassette")(self._cassette(request.function.__name__))
        failures = request.session.testsfailed
        yield found
        if request.session.testsfailed == failures:
            found.save()

    @pytest.fixture
    def llm(self, connect: Callable[..., Any], transport: Recording | None) -> Any:
        """A client on the test's cassette."""
        return connect(transport=transport)

    @pytest.fixture
    def spy(self, connect: Callable[..., Any], transport: Recording | None) -> tuple[Any, Spy]:
        """The same client, and what its provider's hooks were asked and gave."""
        spy = Spy(self.provider)
        return connect(spy, transport=transport), spy

    @pytest.fixture
    def server(self) -> Iterator[StandIn]:
        """A stand-in for the provider's server: it answers as recorded, unless the test says otherwise."""
        if not self._uses_http():
            not_applicable("no request passes through the transport")
        with StandIn(self._recorded()) as server:
            yield server

    @pytest.fixture
    def reply(self, server: StandIn) -> Answer:
        """The recorded answer to a chat, which the stand-in gives."""
        if server.chat is None:
            not_applicable(NO_RECORDING)
        return server.chat

    @pytest.fixture
    def steady(self, request: pytest.FixtureRequest, connect: Callable[..., Any]) -> Any:
        """A client whose chats get equal replies: from the stand-in, or from a provider without a server."""
        if not self._uses_http():
            return connect()
        server: StandIn = request.getfixturevalue("server")
        request.getfixturevalue("reply")
        return connect(transport=Redirect(server.url))

    @pytest.fixture
    def ask(self, connect: Callable[..., Any], server: StandIn) -> Callable[..., Any]:
        """A function that asks the stand-in for a chat, with settings of the client."""

        def ask(*, stream: bool = False, **settings: Any) -> Any:
            llm = connect(transport=Redirect(server.url), **settings)
            asked = llm.chat(PROMPT, stream=stream, **self.short(llm))
            return list(asked) if stream else asked

        return ask

    @pytest.fixture
    def quiet(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """What code tried to open while it must not: connections, names, programs. All of it is refused."""
        tried: list[str] = []

        def refuse(what: str) -> Callable[..., Any]:
            def refused(*_: object, **__: object) -> Any:
                tried.append(what)
                raise ConnectionRefusedError(f"{what}: refused by the test")

            return refused

        for name in ("connect", "connect_ex", "sendto"):
            monkeypatch.setattr(socket.socket, name, refuse(f"socket.{name}"))
        monkeypatch.setattr(socket, "getaddrinfo", refuse("getaddrinfo"))
        monkeypatch.setattr(subprocess.Popen, "__init__", refuse("Popen"))
        return tried

    # --- Helpers ---------------------------------------------------------------------------------------------------

    pause = 0.0
    """Seconds to wait for a server between two looks at it; none on replay."""

    def short(self, llm: Any) -> dict[str, Any]:
        """Arguments for a short reply that is the same each time, as far as the provider declares them."""
        able = llm.capabilities()
        options = {name: value for name, value in {"temperature": 0, "seed": 7}.items() if name in able.options}
        return {"options": options} | ({"max_tokens": 24} if "max_tokens" in (able.parameters or ()) else {})

    def model_with(self, llm: Any, feature: str) -> str:
        """Return the model for a feature; skip the test if the provider does not declare it."""
        if feature not in llm.capabilities().features:
            not_offered(feature)
        return self.models.get(feature) or str(llm.model)

    def _cassette(self, test: str) -> Path:
        return Path(self.cassettes or "") / f"{test}.yaml"

    def _recorded(self) -> list[tuple[Seen, Answer]]:
        """Return the requests and answers of the recorded chats."""
        if self.cassettes is None:
            return []
        paths = [self._cassette(test) for test in RECORDED_CHATS]
        return [pair for path in paths if path.exists() for pair in served(Cassette(path).interactions)]

    def _uses_http(self) -> bool:
        """Whether a chat passes through the transport."""
        return bool(self._look()["http"])

    def _look(self) -> dict[str, Any]:
        """Return what is known of the provider, found out once for a class: its facts, and whether it uses HTTP."""
        kind = type(self)
        if "_looked" not in vars(kind):
            probe, features = Probe(), frozenset[str]()
            both = Both("sync")
            with suppress(Exception):  # A test says what is wrong.
                given = {"model": self.model, **self.settings, "transport": probe}
                llm = both.connect(self.provider, env_prefix=PREFIX, **given)
                features = llm.capabilities().features
                llm.chat("Hi", timeout=PATIENCE)
            both.close()
            facts = {**_identity(self.provider), "contract": contract_of(self.provider), "features": sorted(features)}
            kind._looked = {"facts": facts, "http": bool(probe.requests)}  # noqa: SLF001 - of this class
        return kind._looked  # noqa: SLF001

    _looked: ClassVar[dict[str, Any]]


def _identity(provider: Any) -> dict[str, str | None]:
    """Return a provider's name, distribution and version, from the metadata of its entry point if it is installed."""
    for point in entry_points("graftage.providers"):
        module, _, attribute = point.value.partition(":")
        found: Any = sys.modules.get(module)
        if provider is (getattr(found, attribute, None) if attribute else found):
            distribution, version = identity(point.dist)
            return {"provider": point.name, "distribution": distribution, "version": version}
    name = plugin_name(provider)
    return {"provider": name, "distribution": None, "version": None}


def _tests(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if name.startswith("test_")}


def _release(version: str) -> list[int]:
    return [int(each) for each in version.split(".")[:2]]


def _may_fail(test: Callable[..., None], reason: str, *, strict: bool) -> Callable[..., None]:
    """Return a copy of a test that is expected to fail."""

    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        test(*arguments, **named)

    marked: Callable[..., None] = pytest.mark.xfail(reason=reason, strict=strict)(run)
    return marked
