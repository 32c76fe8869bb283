"""Fixtures for pytest, for those who ask for them: `pytest_plugins = ["graftage.testing.plugin"]`.

    def test_story(cassette):
        with graftage.connect("ollama", model="smollm2:135m", transport=cassette) as llm:
            assert llm.chat("Tell me a story").text

Cassettes are `<root>/<test module>/<test name>.yaml`; a test that runs as `[sync]` and `[async]` has one for both.
`--graftage-record` records them again. When the whole suite has passed, a cassette that no test uses fails it.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from graftage.testing.cassettes import Cassette

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "NetworkRefused",
    "cassette",
    "cassette_root",
    "cassette_server",
    "claim_cassette",
    "free_waiting",
    "no_network",
]

_MODES: Final = {"sync", "async"}
"""Parts of a test's id that do not make another cassette."""
_claims = pytest.StashKey[set[Path]]()
_WORKER_REPORT = "graftage"
"""What a worker of pytest-xdist tells its controller is under this name."""
_orphans = pytest.StashKey[list[Path]]()
_partial = pytest.StashKey[bool]()
_passed = pytest.StashKey[bool]()


class NetworkRefused(RuntimeError):
    """A test reached for the network. No `OSError`, or a provider would take it for a server that is down."""


# --- Settings of the run ---------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add one option and one setting."""
    parser.getgroup("graftage").addoption(
        "--graftage-record", action="store_true", help="Record the cassettes of the selected tests again."
    )
    parser.addini("graftage_cassettes", "The folder that holds the cassettes.", default="cassettes")


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", "cassette(name): play this cassette; a name with `/` is below the root.")
    config.stash[_claims] = set()


# --- Cassettes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cassette_root(request: pytest.FixtureRequest) -> Path:
    """The folder that holds the cassettes: `graftage_cassettes` in pytest's settings, or `cassettes`."""
    return _root(request.config)


@pytest.fixture
def cassette_server() -> str | None:
    """The server's name and version, kept in what is recorded: override it where you know them."""
    return None


@pytest.fixture
def claim_cassette(request: pytest.FixtureRequest, cassette_root: Path) -> Callable[[str | Path], Path]:
    """A function that claims a cassette a test opens itself, and returns its full path."""

    def claim(path: str | Path) -> Path:
        whole = (cassette_root / path).resolve()
        request.config.stash[_claims].add(whole)
        return whole

    return claim


@pytest.fixture
def cassette(
    request: pytest.FixtureRequest,
    cassette_root: Path,
    cassette_server: str | None,
    claim_cassette: Callable[[str | Path], Path],
) -> Iterator[Cassette]:
    """The test's cassette, to be given as `transport`.

    Fails the test if it asked for what was not recorded, even where the provider swallowed that, or if it left
    something unplayed. With `--graftage-record` it records instead, and replaces the file only if the test passes; of a
    test that runs both sync and async, the sync one records and the async one replays.
    """
    recording = request.config.getoption("--graftage-record") and "async" not in _ids(request.node)
    path = claim_cassette(cassette_root / _name(request.node))
    cassette = Cassette(path, mode="record" if recording else "replay", server=cassette_server)
    yield cassette
    passed = request.node.stash.get(_passed, False)
    if recording and passed:
        cassette.save()
    if cassette.misses:
        pytest.fail("\n".join(map(str, cassette.misses)), pytrace=False)
    if passed and cassette.unplayed:
        pytest.fail(f"{path} was not fully played: {', '.join(cassette.unplayed)}.", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Let fixtures know at teardown whether the test itself passed."""
    report = yield
    if call.when == "call":
        item.stash[_passed] = report.passed
    return report


def _root(config: pytest.Config) -> Path:
    return (config.rootpath / str(config.getini("graftage_cassettes"))).resolve()


def _ids(item: pytest.Item) -> list[str]:
    callspec = getattr(item, "callspec", None)
    return callspec.id.split("-") if callspec else []


def _name(item: pytest.Item) -> str:
    """The cassette's path below the root."""
    if marker := item.get_closest_marker("cassette"):
        name = str(marker.args[0])
        return f"{name}.yaml" if "/" in name else f"{item.path.stem}/{name}.yaml"
    plain = [getattr(item, "originalname", item.name), *(each for each in _ids(item) if each not in _MODES)]
    name = re.sub(r"[^\w.-]+", "_", "-".join(plain))
    return f"{item.path.stem}/{name}.yaml"


# --- Cassettes that nobody uses --------------------------------------------------------------------------------------


def pytest_collection_finish(session: pytest.Session) -> None:
    """Claim the cassettes of all tests that were collected: one that is skipped on this machine keeps its own."""
    for item in session.items:
        if "cassette" in getattr(item, "fixturenames", ()) or item.get_closest_marker("cassette"):
            session.config.stash[_claims].add(_root(session.config) / _name(item))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    """Remember that a module skipped itself: its tests are unknown here."""
    report = yield
    if report.skipped:
        collector.config.stash[_partial] = True
    return report


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Remember that only a part of the suite runs."""
    if items:
        items[0].config.stash[_partial] = True


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Hear from a worker of pytest-xdist what it has claimed: the controller itself collects nothing."""
    report = getattr(node, "workeroutput", {}).get(_WORKER_REPORT)
    stash = node.config.stash
    stash[_claims] |= {Path(each) for each in report["claims"]} if report else set()
    stash[_partial] = stash.get(_partial, False) or not report or report["partial"]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a session that was whole and good if cassettes were left over."""
    config = session.config
    output = getattr(config, "workeroutput", None)
    if output is not None:
        output[_WORKER_REPORT] = {
            "claims": [str(each) for each in config.stash[_claims]],
            "partial": not _is_whole(session),
        }
        return
    if not _is_whole(session):
        return
    claims = config.stash[_claims]
    orphans = sorted(path for path in _root(config).rglob("*.yaml") if path not in claims)
    config.stash[_orphans] = orphans
    if orphans:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Name the cassettes that no test uses."""
    if orphans := config.stash.get(_orphans, []):
        terminalreporter.section("cassettes that no test uses", red=True)
        for path in orphans:
            terminalreporter.line(str(path))
        terminalreporter.line("Delete them, or claim them with the fixture `claim_cassette` or the marker `cassette`.")


def _is_whole(session: pytest.Session) -> bool:
    """Whether every test was collected here and none failed: a part of a suite cannot tell an orphan."""
    config = session.config
    options = ("collectonly", "ignore", "ignore_glob", "lf", "stepwise")
    narrowed = (
        (config.args_source is pytest.Config.ArgsSource.ARGS and not hasattr(config, "workerinput"))
        or config.stash.get(_partial, False)
        or any(config.getoption(name, None) for name in options)
    )
    nothing = not session.items and not config.stash[_claims]
    return not (narrowed or nothing or session.testsfailed or session.shouldstop or session.shouldfail)


# --- Time and network ------------------------------------------------------------------------------------------------


@pytest.fixture
def free_waiting() -> Iterator[None]:
    """Waiting between attempts costs no time."""
    from graftage.retry import no_waiting  # Only tests that ask for it need it

    with no_waiting():
        yield


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections and look-ups reach this machine only; anything else is a `NetworkRefused`.

    Other processes and what does not go through Python's `socket` are not held.
    """
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, _guard(getattr(socket.socket, name), address_of=_host_of_last))
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
        monkeypatch.setattr(socket, name, _guard(getattr(socket, name), address_of=_host_of_first))


def _guard(real: Callable[..., Any], *, address_of: Callable[..., object]) -> Callable[..., Any]:
    def guarded(*args: Any, **kwargs: Any) -> Any:
        host = address_of(*args, **kwargs)
        if not _is_local(host):
            raise NetworkRefused(f"The fixture `no_network` refused a connection to {host!r}.")
        return real(*args, **kwargs)

    return guarded


def _host_of_last(*args: Any, **_kwargs: Any) -> object:
    """The host in `sock.connect(address)` and `sock.sendto(data[, flags], address)`."""
    address = args[-1]
    return address[0] if isinstance(address, tuple) else None


def _host_of_first(host: object = None, *_args: Any, **_kwargs: Any) -> object:
    """The host in `getaddrinfo(host, port)`."""
    return host


def _is_local(host: object) -> bool:
    """Whether a host is this machine; no host at all is one, as with sockets of the file system."""
    name = host.decode("ascii", "replace") if isinstance(host, bytes) else host
    if not name or name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(str(name))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
