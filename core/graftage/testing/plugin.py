"""Fixtures for pytest, enabled by `pytest_plugins = ["graftage.testing.plugin"]`.

    def test_story(cassette):
        with graftage.connect("ollama", model="smollm2:135m", transport=cassette) as llm:
            assert llm.chat("Tell me a story").text

Cassettes are `<root>/<test module>/<test name>.yaml`; a test that runs as `[sync]` and `[async]` has one for both.
`--graftage-record` records them again. A cassette that no test uses fails a suite that passed as a whole.
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
"""Parts of a test's id that share one cassette."""
_claims = pytest.StashKey[set[Path]]()
_WORKER_REPORT = "graftage"
"""The key of what a worker of pytest-xdist sends to its controller."""
_orphans = pytest.StashKey[list[Path]]()
_partial = pytest.StashKey[bool]()
_passed = pytest.StashKey[bool]()


class NetworkRefused(RuntimeError):
    """A test used the network. Not an `OSError`, which a provider would report as a server that is down."""


# --- Settings of the run ---------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add one option and one setting."""
    parser.getgroup("graftage").addoption(
        "--graftage-record", action="store_true", help="Record the cassettes of the selected tests again."
    )
    parser.addini("graftage_cassettes", "The folder that holds the cassettes.", default="cassettes")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", "cassette(name): play this cassette; a name with `/` is below the root.")
    config.stash[_claims] = set()


# --- Cassettes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cassette_root(request: pytest.FixtureRequest) -> Path:
    """The folder that holds the cassettes: `graftage_cassettes` in pytest's settings, or `cassettes`."""
    return _root(request.config)


@pytest.fixture
def cassette_server() -> str | None:
    """The server's name and version, kept in recordings: override it if you know them."""
    return None


@pytest.fixture
def claim_cassette(request: pytest.FixtureRequest, cassette_root: Path) -> Callable[[str | Path], Path]:
    """A function that claims a cassette that a test opens itself, and returns its full path."""

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

    Fails the test if a request was not recorded, even if the provider swallowed that error, or if a response was not
    played. With `--graftage-record` it records instead, and replaces the file only if the test passes; of a test that
    runs both sync and async, the sync one records and the async one replays.
    """
    recording = request.config.getoption("--graftage-record") and "async" not in _ids(request.node)
    path = claim_cassette(cassette_root / _name(request.node))
    cassette = Cassette(path, mode="all" if recording else "none", server=cassette_server)
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
    """Note whether the test passed, for the teardown of fixtures."""
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


# --- Unused cassettes ----------------------------------------------------------------------------------------------


def pytest_collection_finish(session: pytest.Session) -> None:
    """Claim the cassettes of all collected tests, also of those that are skipped here."""
    for item in session.items:
        if "cassette" in getattr(item, "fixturenames", ()) or item.get_closest_marker("cassette"):
            session.config.stash[_claims].add(_root(session.config) / _name(item))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    """Note that a module was skipped: its tests are unknown."""
    report = yield
    if report.skipped:
        collector.config.stash[_partial] = True
    return report


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Note that only a part of the suite runs."""
    if items:
        items[0].config.stash[_partial] = True


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the claims of a worker of pytest-xdist: the controller itself collects nothing."""
    report = getattr(node, "workeroutput", {}).get(_WORKER_REPORT)
    stash = node.config.stash
    stash[_claims] |= {Path(each) for each in report["claims"]} if report else set()
    stash[_partial] = stash.get(_partial, False) or not report or report["partial"]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a whole session that passed if cassettes are unused."""
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
    """List the cassettes that no test uses."""
    if orphans := config.stash.get(_orphans, []):
        terminalreporter.section("cassettes that no test uses", red=True)
        for path in orphans:
            terminalreporter.line(str(path))
        terminalreporter.line("Delete them, or claim them with the fixture `claim_cassette` or the marker `cassette`.")


def _is_whole(session: pytest.Session) -> bool:
    """Return whether every test was collected and none failed: a part of a suite cannot find unused cassettes."""
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
    """Skip the waiting between attempts."""
    from graftage.retry import no_waiting  # Imported only if it is used

    with no_waiting():
        yield


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow connections and look-ups to this machine only; others raise `NetworkRefused`.

    Other processes, and code that does not use Python's `socket`, are not restricted.
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
    """Return the host of `sock.connect(address)` or `sock.sendto(data[, flags], address)`."""
    address = args[-1]
    return address[0] if isinstance(address, tuple) else None


def _host_of_first(host: object = None, *_args: Any, **_kwargs: Any) -> object:
    """Return the host of `getaddrinfo(host, port)`."""
    return host


def _is_local(host: object) -> bool:
    """Return whether a host is this machine; a missing host is, as for Unix sockets."""
    name = host.decode("ascii", "replace") if isinstance(host, bytes) else host
    if not name or name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(str(name))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
