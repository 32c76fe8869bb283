"""Fixtures for pytest, enabled by `pytest_plugins = ["graftage.testing.plugin"]`.

    def test_story(cassette):
        with graftage.connect("ollama", model="smollm2:135m", transport=cassette) as llm:
            assert llm.chat("Tell me a story").text

Cassettes are `<root>/<test module>/<test name>.yaml`; a test that runs as `[sync]` and `[async]` has one for both.
`@pytest.mark.cassette("name")` names another. On a class or module, its tests share that one and play it together.

`--record-mode` has the modes of vcrpy, and `rewrite`, which starts from nothing. What a test records is written when it
passes; a shared cassette, when all its tests have passed. A cassette that no test uses fails a suite that passed as a
whole.

`--block-network` and the mark `block_network` refuse all connections, also to this machine, but to `--allowed-hosts`
and to what is recorded. If pytest-recording is installed, these options are its own, and its guard refuses what is
recorded here: allow that host. Without autoload of plugins, name pytest-recording before this plugin.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from graftage.testing.cassettes import Cassette, CassetteError
from graftage.testing.network import Guard, NetworkRefused, Opened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from graftage.http import Transport

__all__ = [
    "NetworkRefused",
    "cassette",
    "cassette_facts",
    "cassette_options",
    "cassette_root",
    "cassettes",
    "claim_cassette",
    "free_waiting",
    "no_network",
    "replay",
]

_MODES: Final = {"sync", "async"}
"""Parts of a test's id that share one cassette."""
_RECORD_MODES: Final = ("none", "once", "new_episodes", "all", "rewrite")
_PEERS: Final = ("recording", "pytest_recording.plugin")
"""Names under which pytest-recording may be registered: it has options of the same names."""
_MAX_NAME: Final = 100
"""Characters of a file's name, without its hash and `.yaml`."""
_UNSAFE: Final = re.compile(r"[^a-z0-9_.-]+", re.IGNORECASE)
_WORKER_REPORT: Final = "graftage"
"""The key of what a worker of pytest-xdist sends to its controller."""
_claims = pytest.StashKey[set[Path]]()
_users = pytest.StashKey[dict[str, set[str]]]()
"""The tests that have a cassette by default, by its name in lower case."""
_recorded = pytest.StashKey[set[Path]]()
_open = pytest.StashKey[dict[tuple[Path, tuple[str, ...]], Cassette]]()
"""The open cassettes of a test, class or module: one for each file and kind of client."""
_parts = pytest.StashKey[set[pytest.Item | pytest.Collector]]()
"""What was found in a class or module that shares a cassette."""
_orphans = pytest.StashKey[list[Path]]()
_partial = pytest.StashKey[bool]()
_passed = pytest.StashKey[bool]()


# --- Settings of the run ---------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Add the setting, and the options if conftest files are being read: then all other plugins are here."""
    parser.addini("graftage_cassettes", "The folder that holds the cassettes.", default="cassettes")
    known = getattr(pluginmanager.get_plugin("pytestconfig"), "known_args_namespace", None)
    if getattr(known, "confcutdir", None) is not None:
        _add_options(parser, pluginmanager)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config, parser: pytest.Parser) -> None:
    """Add the options of a plugin that was loaded before conftest files: now pytest-recording is there, if ever."""
    _add_options(parser, early_config.pluginmanager)


def _add_options(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if any(map(pluginmanager.has_plugin, _PEERS)):
        return
    group = parser.getgroup("graftage")
    group.addoption("--record-mode", choices=_RECORD_MODES, help="What cassettes record. Default: none.")
    group.addoption(
        "--block-network", action="store_true", help="Refuse connections, but to allowed hosts and to what is recorded."
    )
    group.addoption(
        "--allowed-hosts", metavar="REGEXES", help="Hosts that are not blocked: regular expressions with commas."
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers."""
    for line in (
        "cassette(name, **options): play this one, which a class or module shares; a name with `/` is below the root.",
        "block_network(allowed_hosts=[...]): refuse connections, but to these hosts and to what is recorded.",
        "allowed_hosts(regexes): hosts that `--block-network` allows.",
    ):
        config.addinivalue_line("markers", line)
    config.stash[_claims] = set()
    config.stash[_users] = {}
    config.stash[_recorded] = set()


# --- Cassettes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cassette_root(request: pytest.FixtureRequest) -> Path:
    """The folder that holds the cassettes: `graftage_cassettes` in pytest's settings, or `cassettes`."""
    return _root(request.config)


@pytest.fixture
def cassette_options() -> Mapping[str, Any]:
    """Arguments for `Cassette`, such as `match_on`: override it. `mode` is used if there is no `--record-mode`."""
    return {}


@pytest.fixture
def cassette_facts() -> Mapping[str, str]:
    """What is kept in recordings: `server`, `model` and `digest`. Override it; only a recording asks for it."""
    return {}


@pytest.fixture
def claim_cassette(request: pytest.FixtureRequest, cassette_root: Path) -> Callable[[str | Path], Path]:
    """A function that claims a cassette that a test opens itself, and returns its full path."""

    def claim(path: str | Path) -> Path:
        whole = (cassette_root / path).resolve()
        request.config.stash[_claims].add(whole)
        return whole

    return claim


@pytest.fixture
def cassettes(
    request: pytest.FixtureRequest,
    cassette_root: Path,
    cassette_options: Mapping[str, Any],
    claim_cassette: Callable[[str | Path], Path],
) -> Iterator[Callable[[str], Cassette]]:
    """A function that opens a further cassette of the test: `cassettes("other_server")`.

    Fails the test if a request was not recorded, even if the provider swallowed that error, or if a response was not
    played.
    """
    item = request.node
    used: list[tuple[Cassette, int]] = []

    def open_cassette(name: str = "") -> Cassette:
        path = claim_cassette(_in_module(item, name) if name else _name(item))
        owner = item if name else _owner(item)
        opened = owner.stash.setdefault(_open, {})
        key = path, _kind(item)
        if key not in opened:
            if not name and cassette_root == _root(request.config):
                _refuse_clash(item, path)
            mark = item.get_closest_marker("cassette")
            options = {**cassette_options, **(mark.kwargs if mark and not name else {})}
            opened[key] = _begin(request, path, options)
            owner.addfinalizer(partial(_finish, owner, key))
        used.append((opened[key], len(opened[key].misses)))
        return opened[key]

    yield open_cassette
    if misses := [miss for cassette, before in used for miss in cassette.misses[before:]]:
        pytest.fail("\n".join(map(str, dict.fromkeys(misses))), pytrace=False)


@pytest.fixture
def cassette(cassettes: Callable[[], Cassette]) -> Cassette:
    """The test's cassette, to be given as `transport`.

    Of several tests that have the same file, the first one to pass records, and the others replay.
    """
    return cassettes()


@pytest.fixture
def replay(cassette: Cassette) -> Iterator[Cassette]:
    """Record or replay, on the test's cassette, whatever the code under test connects to by itself.

    Nothing is given to that code, and no network is used: calls are replayed, not HTTP. It holds in all threads, for
    clients that are connected during the test.
    """
    from graftage.testing.replay import replaying  # Imported only if it is used

    with replaying(cassette):
        yield cassette


class _Cassette(Cassette):
    """A cassette whose recording opens its hosts in a blocked network."""

    def wrap(self, network: Callable[[], Transport]) -> Transport:
        return super().wrap(lambda: Opened(network()))


def _begin(request: pytest.FixtureRequest, path: Path, options: dict[str, Any]) -> Cassette:
    mode = request.config.getoption("record_mode", None) or options.pop("mode", "none")
    if mode in ("all", "rewrite"):
        mode = "none" if path in request.config.stash[_recorded] else "all"
    may_record = mode != "none" and not (mode == "once" and path.exists())
    facts = request.getfixturevalue("cassette_facts") if may_record else {}
    with _plain_errors():
        return _Cassette(path, **{**facts, **options, "mode": mode})


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Show the errors of cassettes without a traceback, which would say nothing about the test."""
    try:
        yield
    except CassetteError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None


def _finish(owner: pytest.Item | pytest.Collector, key: tuple[Path, tuple[str, ...]]) -> None:
    """Write the recording of tests that passed, or check that they played everything."""
    cassette = owner.stash[_open].pop(key)
    path, kind = key
    if not _has_passed(owner, kind):
        if cassette.records and not isinstance(owner, pytest.Item):
            pytest.fail(f"{path} was not written: not every test of `{owner.name}` passed here.", pytrace=False)
        return
    with _plain_errors():
        cassette.save()
    if cassette.records:
        owner.config.stash[_recorded].add(path)
    if cassette.unplayed:
        pytest.fail(f"{path} was not fully played: {', '.join(cassette.unplayed)}.", pytrace=False)


def _has_passed(owner: pytest.Item | pytest.Collector, kind: tuple[str, ...]) -> bool:
    """Return whether a test passed, or all tests of a class or module that share its cassette.

    They do not if only a part of them was chosen, or if pytest-xdist gave some to another process.
    """
    parts = [owner] if isinstance(owner, pytest.Item) else owner.stash.get(_parts, set())
    return all(
        part.stash.get(_passed, False)
        for part in parts
        if not isinstance(part, pytest.Item) or (_kind(part) == kind and _uses_cassette(part) and _owner(part) is owner)
    )


def _refuse_clash(item: pytest.Item, path: Path) -> None:
    """Fail a test whose cassette is, by its name, that of another test, too."""
    if len(users := item.config.stash[_users].get(_name(item).lower(), ())) > 1:
        names = " and of ".join(f"`{each}`" for each in sorted(users))
        pytest.fail(f"{path} would be the cassette of {names}. Name another with the mark `cassette`.", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Note whether the test passed, for the teardown of fixtures; the claims of a skipped one are unknown."""
    report = yield
    if call.when == "call":
        item.stash[_passed] = report.passed
    if report.skipped and {"cassettes", "claim_cassette"} & set(getattr(item, "fixturenames", ())):
        item.config.stash[_partial] = True
    return report


def _root(config: pytest.Config) -> Path:
    return (config.rootpath / str(config.getini("graftage_cassettes"))).resolve()


def _ids(item: pytest.Item) -> list[str]:
    callspec = getattr(item, "callspec", None)
    return callspec.id.split("-") if callspec else []


def _kind(item: pytest.Item) -> tuple[str, ...]:
    """Return the parts of a test's id that its cassette is shared by."""
    return tuple(each for each in _ids(item) if each in _MODES)


def _uses_cassette(item: pytest.Item) -> bool:
    return "cassette" in getattr(item, "fixturenames", ())


def _owner(item: pytest.Item) -> pytest.Item | pytest.Collector:
    """Return the class or module whose mark names the cassette, or else the test."""
    node = next((node for node, _ in item.iter_markers_with_node("cassette")), item)
    return node if isinstance(node, (pytest.Class, pytest.Module)) else item


def _name(item: pytest.Item) -> str:
    """Return the cassette's path below the root."""
    if mark := item.get_closest_marker("cassette"):
        if len(mark.args) != 1:
            raise pytest.UsageError(f"The mark `cassette` of {item.nodeid} must have one name.")
        return _in_module(item, str(mark.args[0]))
    return f"{item.path.stem}/{_safe(_test(item))}.yaml"


def _in_module(item: pytest.Item, name: str) -> str:
    return f"{name}.yaml" if "/" in name else f"{item.path.stem}/{name}.yaml"


def _test(item: pytest.Item) -> str:
    """Return the name of a test, which is the same for both clients."""
    return "-".join([getattr(item, "originalname", item.name), *(each for each in _ids(item) if each not in _MODES)])


def _safe(name: str) -> str:
    """Return a name for a file. A hash tells apart what is equal on some systems."""
    safe = _UNSAFE.sub("_", name)[:_MAX_NAME]
    if safe == name.lower():
        return safe
    return f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


# --- Unused cassettes ------------------------------------------------------------------------------------------------


def pytest_collection_finish(session: pytest.Session) -> None:
    """Claim the cassettes of all collected tests, also of those that are skipped here."""
    for item in session.items:
        marked = item.get_closest_marker("cassette")
        if not marked and not _uses_cassette(item):
            continue
        name = _name(item)
        session.config.stash[_claims].add(_root(session.config) / name)
        if not marked and item.parent:
            session.config.stash[_users].setdefault(name.lower(), set()).add(f"{item.parent.nodeid}::{_test(item)}")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    """Note that a module was skipped, whose tests are unknown, and what is in a class or module."""
    report = yield
    if report.skipped:
        collector.config.stash[_partial] = True
    for owner in collector.listchain():
        if any(mark.name == "cassette" for mark in owner.own_markers):
            parts = owner.stash.setdefault(_parts, set())
            parts.discard(collector)
            parts.update(report.result or ())
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
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guard]:
    """Allow connections and look-ups to this machine only, and to what is recorded; others raise `NetworkRefused`.

    `no_network.open(host)` allows a host for the rest of the test.

    Other processes, and code that does not use Python's `socket`, are not restricted.
    """
    guard = Guard("The fixture `no_network`", "Does the test need it? Then do not use that fixture.", loopback=True)
    with guard.installed(monkeypatch):
        yield guard


@pytest.fixture(autouse=True)
def _block_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse connections if an option or a mark asks for it; tests marked `vcr` are left to pytest-recording."""
    mark = request.node.get_closest_marker("block_network")
    wanted = mark or request.config.getoption("block_network", default=False)
    if not wanted or request.node.get_closest_marker("vcr"):
        yield
        return
    if mark and (mark.args or mark.kwargs.keys() - {"allowed_hosts"}):
        raise pytest.UsageError("The mark `block_network` has no argument but `allowed_hosts=[...]`.")
    patterns = _allowed_hosts(request.node)
    way_out = "Name it in `--allowed-hosts`, or in the mark `allowed_hosts`."
    with Guard("A blocked network", way_out, loopback=False, patterns=patterns).installed(monkeypatch):
        yield


def _allowed_hosts(item: pytest.Item) -> list[str]:
    """Return the patterns of the closest mark, or else those of the option."""
    for mark in item.iter_markers():
        if mark.name == "allowed_hosts":
            return [pattern for each in mark.args for pattern in ([each] if isinstance(each, str) else each)]
        if mark.name == "block_network" and "allowed_hosts" in mark.kwargs:
            return list(mark.kwargs["allowed_hosts"])
    option = str(item.config.getoption("allowed_hosts", default=None) or "")
    return [each for each in option.split(",") if each]
