"""The fixtures for pytest."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from graftage.testing import Cassette

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from graftage_ollama.testing import FakeOllama

SUITE = """
import asyncio, graftage, pytest

@pytest.mark.parametrize("mode", ["sync", "async"])
def test_version(cassette, mode):
    settings = {"host": "URL", "transport": cassette}
    if mode == "sync":
        with graftage.connect("ollama", **settings) as llm:
            assert llm.health().version == "0.9.3"
        return

    async def check():
        async with graftage.connect_async("ollama", **settings) as llm:
            return await llm.health()

    assert asyncio.run(check()).version == "0.9.3"
"""


@pytest.fixture
def suite(outer: pytest.Pytester, fake: FakeOllama) -> pytest.Pytester:
    """A test suite with one test and its recorded cassette."""
    outer.makepyfile(test_it=SUITE.replace("URL", fake.url))
    outer.runpytest("--record-mode=rewrite").assert_outcomes(passed=2)
    return outer


class TestCassette:
    def test_modes_share_one_cassette(self, suite: pytest.Pytester, fake: FakeOllama) -> None:
        asked = len(fake.requests)
        suite.runpytest().assert_outcomes(passed=2)
        assert (asked, len(fake.requests)) == (1, 1)
        assert [path.name for path in (suite.path / "cassettes" / "test_it").iterdir()] == ["test_version.yaml"]

    def test_swallowed_miss_fails_the_test(self, suite: pytest.Pytester) -> None:
        suite.makepyfile(
            test_it="""
        import contextlib, graftage

        def test_version(cassette):
            with graftage.connect("ollama", transport=cassette) as llm:
                assert llm.health().ok
                with contextlib.suppress(Exception):
                    llm.models()
        """
        )
        result = suite.runpytest()
        result.assert_outcomes(passed=1, errors=1)
        result.stdout.fnmatch_lines(["*Asked: GET /api/tags*"])

    def test_unplayed_interaction_fails_the_test(self, suite: pytest.Pytester) -> None:
        suite.makepyfile(test_it="def test_version(cassette): pass")
        result = suite.runpytest()
        result.assert_outcomes(passed=1, errors=1)
        result.stdout.fnmatch_lines(["*not fully played: GET /api/version.*"])

    def test_failed_test_keeps_the_old_cassette(self, suite: pytest.Pytester, fake: FakeOllama) -> None:
        path = suite.path / "cassettes" / "test_it" / "test_version.yaml"
        before = path.read_text()
        fake.version = "0.9.4"
        suite.runpytest("--record-mode=rewrite").assert_outcomes(failed=2)
        assert path.read_text() == before

    def test_marker_selects_the_cassette(self, suite: pytest.Pytester) -> None:
        suite.makepyfile(
            test_it="""
        import graftage, pytest

        @pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.cassette("test_it/test_version"))])
        @pytest.mark.cassette("test_version")
        def test_other(cassette, n):
            with graftage.connect("ollama", transport=cassette) as llm:
                assert llm.health().ok
        """
        )
        result = suite.runpytest("--strict-markers")
        result.assert_outcomes(passed=2)
        assert result.ret == 0

    def test_orphan_fails_only_whole_runs(self, suite: pytest.Pytester) -> None:
        orphan = suite.path / "cassettes" / "old.yaml"
        orphan.write_text("version: 1\ninteractions: []\n")
        whole = suite.runpytest()
        assert whole.ret == pytest.ExitCode.TESTS_FAILED
        whole.stdout.fnmatch_lines(["*cassettes that no test uses*", "*old.yaml"])
        partial = [("test_it.py",), ("-k", "not async"), ("--deselect", "test_it.py::test_version[sync]"), ("--co",)]
        assert [suite.runpytest(*options).ret for options in partial] == [0, 0, 0, 0]

    def test_skipped_module_leaves_no_orphans(self, suite: pytest.Pytester) -> None:
        suite.makepyfile(test_it="import pytest; pytest.importorskip('nothing_of_that_name')")
        assert suite.runpytest().ret == pytest.ExitCode.NO_TESTS_COLLECTED
        suite.makepyfile(test_more="def test_more(): pass")
        assert suite.runpytest().ret == 0

    def test_claimed_cassette_is_not_an_orphan(self, suite: pytest.Pytester) -> None:
        (suite.path / "cassettes" / "more.yaml").write_text("version: 1\ninteractions: []\n")
        suite.makepyfile(test_more="def test_more(claim_cassette): assert claim_cassette('more.yaml').exists()")
        assert suite.runpytest().ret == 0


ONE = """
import graftage

def test_one(cassette):
    with graftage.connect("ollama", host="URL", transport=cassette) as llm:
        assert llm.health().ok
        MORE
"""


def recorded(path: Path) -> list[str]:
    """Return what a cassette holds, as `/api/version Ollama 1`."""
    found = Cassette(path).interactions
    return [f"{each.request.path} {each.recorded.server or ''}".strip() for each in found]


class TestRecordMode:
    @pytest.fixture
    def write(self, outer: pytest.Pytester, fake: FakeOllama) -> Callable[..., Path]:
        """Write the test, and return its cassette."""

        def write(more: str = "pass") -> Path:
            outer.makepyfile(test_it=ONE.replace("URL", fake.url).replace("MORE", more))
            return outer.path / "cassettes" / "test_it" / "test_one.yaml"

        return write

    def test_none_is_the_default(self, outer: pytest.Pytester, write: Callable[..., Path], fake: FakeOllama) -> None:
        path = write()
        result = outer.runpytest()
        result.assert_outcomes(errors=1)
        result.stdout.fnmatch_lines([f"*{path}*does not exist*--record-mode*"])
        assert not fake.requests

    def test_once_records_a_missing_file(
        self, outer: pytest.Pytester, write: Callable[..., Path], fake: FakeOllama
    ) -> None:
        path = write()
        outer.runpytest("--record-mode=once").assert_outcomes(passed=1)
        write("llm.models()")
        outer.runpytest("--record-mode=once").assert_outcomes(failed=1, errors=1)
        assert recorded(path) == ["/api/version"]
        assert len(fake.requests) == 1

    def test_new_episodes_are_added(self, outer: pytest.Pytester, write: Callable[..., Path], fake: FakeOllama) -> None:
        path = write()
        outer.runpytest("--record-mode=once").assert_outcomes(passed=1)
        write("llm.models()")
        outer.runpytest("--record-mode=new_episodes").assert_outcomes(passed=1)
        assert recorded(path) == ["/api/version", "/api/tags"]
        assert len(fake.requests) == 2

    @pytest.mark.parametrize("mode", ["all", "rewrite"])
    def test_everything_is_recorded_again(self, outer: pytest.Pytester, write: Callable[..., Path], mode: str) -> None:
        path = write("llm.models()")
        outer.runpytest("--record-mode=once").assert_outcomes(passed=1)
        write()
        outer.runpytest(f"--record-mode={mode}").assert_outcomes(passed=1)
        assert recorded(path) == ["/api/version"]

    def test_option_wins_over_the_fixture(self, outer: pytest.Pytester, write: Callable[..., Path]) -> None:
        path = write()
        outer.makeconftest(
            """
        import pytest
        pytest_plugins = ["graftage.testing.plugin"]

        @pytest.fixture
        def cassette_options():
            return {"mode": "once", "match_on": ["method", "path"]}
        """
        )
        outer.runpytest("--record-mode=none").assert_outcomes(errors=1)
        assert not path.exists()
        outer.runpytest().assert_outcomes(passed=1)
        assert path.exists()

    def test_only_recordings_ask_for_facts(self, outer: pytest.Pytester, write: Callable[..., Path]) -> None:
        path = write()
        outer.makeconftest(
            """
        import pytest
        pytest_plugins = ["graftage.testing.plugin"]
        asked = []

        @pytest.fixture
        def cassette_facts():
            assert not asked
            asked.append(1)
            return {"server": "Ollama 1"}

        def pytest_sessionfinish():
            print("asked", len(asked))
        """
        )
        outer.runpytest("--record-mode=once").stdout.fnmatch_lines(["*asked 1*"])
        outer.runpytest("--record-mode=once").stdout.fnmatch_lines(["*asked 0*"])
        assert recorded(path) == ["/api/version Ollama 1"]


SHARED = """
import graftage, pytest

@pytest.fixture
def llm(cassette):
    with graftage.connect("ollama", host="URL", transport=cassette) as llm:
        yield llm

@pytest.mark.cassette("both")
class TestShared:
    def test_first(self, llm):
        assert llm.health().ok

    def test_second(self, llm):
        MORE
"""


class TestSharedCassette:
    @pytest.fixture
    def shared(self, outer: pytest.Pytester, fake: FakeOllama) -> pytest.Pytester:
        """A class whose tests share a recorded cassette."""
        self.source = SHARED.replace("URL", fake.url)
        outer.makepyfile(test_it=self.source.replace("MORE", "llm.models()"))
        outer.runpytest("--record-mode=rewrite").assert_outcomes(passed=2)
        return outer

    def test_tests_play_it_together(self, shared: pytest.Pytester, fake: FakeOllama) -> None:
        assert recorded(shared.path / "cassettes" / "test_it" / "both.yaml") == ["/api/version", "/api/tags"]
        asked = len(fake.requests)
        shared.runpytest().assert_outcomes(passed=2)
        assert len(fake.requests) == asked

    def test_unplayed_is_judged_at_the_end(self, shared: pytest.Pytester) -> None:
        shared.makepyfile(test_it=self.source.replace("MORE", "pass"))
        result = shared.runpytest()
        result.assert_outcomes(passed=2, errors=1)
        result.stdout.fnmatch_lines(
            ["*ERROR at teardown of TestShared.test_second*", "*not fully played: GET /api/tags.*"]
        )

    @pytest.mark.parametrize("choice", [("-k", "first"), ("test_it.py::TestShared::test_first",)])
    def test_part_is_not_judged(self, shared: pytest.Pytester, choice: tuple[str, ...]) -> None:
        shared.runpytest(*choice).assert_outcomes(passed=1, deselected=choice[0] == "-k")

    def test_part_is_not_written(self, shared: pytest.Pytester) -> None:
        result = shared.runpytest("-k", "first", "--record-mode=rewrite")
        result.assert_outcomes(passed=1, errors=1, deselected=1)
        result.stdout.fnmatch_lines(["*was not written: not every test of `TestShared` passed here.*"])
        shared.runpytest().assert_outcomes(passed=2)

    def test_each_client_plays_all_of_it(self, shared: pytest.Pytester) -> None:
        sent = 'llm.models()\n\npytestmark = pytest.mark.parametrize("mode", ["sync", "async"])'
        source = self.source.replace("MORE", sent).replace("(self, llm)", "(self, llm, mode)")
        shared.makepyfile(test_it=source)
        shared.runpytest().assert_outcomes(passed=4)

    def test_module_shares_one(self, shared: pytest.Pytester) -> None:
        source = self.source.replace("@pytest.mark.cassette", "pytestmark = pytest.mark.cassette")
        shared.makepyfile(test_it=source.replace("MORE", "llm.models()"))
        shared.runpytest().assert_outcomes(passed=2)
        # The class of the module was not collected, so it may hold tests that play the rest.
        shared.makepyfile(
            test_it=source.replace("MORE", "llm.models()") + "\ndef test_third(llm): assert llm.health().ok"
        )
        result = shared.runpytest("test_it.py::test_third")
        result.assert_outcomes(passed=1)


class TestFurtherCassettes:
    def test_each_client_has_its_own(self, outer: pytest.Pytester, fake: FakeOllama) -> None:
        outer.makepyfile(
            test_it=f"""
        import graftage

        def test_two(cassette, cassettes):
            for each in (cassette, cassettes("other"), cassettes("elsewhere/third")):
                with graftage.connect("ollama", host="{fake.url}", transport=each) as llm:
                    assert llm.health().ok
        """
        )
        outer.runpytest("--record-mode=rewrite").assert_outcomes(passed=1)
        folder = outer.path / "cassettes"
        names = sorted(str(each.relative_to(folder)) for each in folder.rglob("*.yaml"))
        assert names == ["elsewhere/third.yaml", "test_it/other.yaml", "test_it/test_two.yaml"]
        result = outer.runpytest()
        result.assert_outcomes(passed=1)
        assert (result.ret, len(fake.requests)) == (0, 3)

    def test_unplayed_one_fails_the_test(self, suite: pytest.Pytester) -> None:
        suite.makepyfile(test_it="def test_it(cassettes): cassettes('test_version')")
        suite.runpytest().assert_outcomes(passed=1, errors=1)

    def test_skipped_test_leaves_no_orphan(self, suite: pytest.Pytester) -> None:
        suite.makepyfile(
            test_it="""
        import pytest

        def test_other(): pass

        @pytest.mark.skip
        def test_it(cassettes): cassettes('test_version')
        """
        )
        assert suite.runpytest().ret == 0


NAMED = """
import pytest

@pytest.mark.parametrize("value", ["a/b", "a_b", "a:b", "\N{ROCKET}", "x" * 300, "x" * 301, "GET", "get"])
def test_it(value, cassette):
    with open(r"FILE", "a") as names:
        print(cassette.path.name, file=names)
"""


class TestNames:
    def test_files_never_collide(self, outer: pytest.Pytester) -> None:
        outer.makeconftest(
            """
        import pytest
        pytest_plugins = ["graftage.testing.plugin"]

        @pytest.fixture
        def cassette_options():
            return {"mode": "new_episodes"}
        """
        )
        outer.makepyfile(test_it=NAMED.replace("FILE", str(outer.path / "names.txt")))
        outer.runpytest()
        names = (outer.path / "names.txt").read_text().splitlines()
        assert len({each.lower() for each in names}) == 8
        assert all(len(each) < 120 and each.isascii() and not set(each) & set('<>:"/\\|?*') for each in names)
        assert {"test_it-a_b.yaml", "test_it-get.yaml"} < set(names)

    def test_two_tests_cannot_share_by_accident(self, suite: pytest.Pytester) -> None:
        suite.makepyfile(
            test_it="""
        class TestOne:
            def test_version(self, cassette): pass

        class TestTwo:
            def test_version(self, cassette): pass
        """
        )
        result = suite.runpytest()
        result.assert_outcomes(errors=2)
        result.stdout.fnmatch_lines(
            ["*of `test_it.py::TestOne::test_version` and of `test_it.py::TestTwo::test_version`*"]
        )

    def test_mark_needs_a_name(self, suite: pytest.Pytester) -> None:
        suite.makepyfile(
            test_it="""
        import pytest

        @pytest.mark.cassette
        def test_it(cassette): pass
        """
        )
        result = suite.runpytest()
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(["*The mark `cassette` of test_it.py::test_it must have one name.*"])


class TestWaiting:
    def test_free_waiting_fixture(self, suite: pytest.Pytester) -> None:
        suite.makepyfile(
            test_free="""
        import asyncio
        from graftage import retry
        from graftage.exceptions import ConnectionFailed
        from graftage.calls import Call

        def test_free(free_waiting):
            tries = iter([True, True, False])
            async def work():
                if next(tries):
                    raise ConnectionFailed("once more")
                return "done"
            assert asyncio.run(retry.call(work, Call())) == "done"
        """
        )
        suite.runpytest("test_free.py").assert_outcomes(passed=1)
        assert suite.path.exists()


GUARDED = """
import asyncio, socket, pytest
from graftage.testing.plugin import NetworkRefused

pytestmark = pytest.mark.usefixtures("no_network")

@pytest.mark.parametrize("reach", [
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
    lambda: socket.getaddrinfo("example.invalid", 80),
    lambda: socket.gethostbyname("example.invalid"),
    lambda: with_socket(lambda one: one.connect(("192.0.2.1", 80))),
    lambda: with_socket(lambda one: one.connect_ex(("192.0.2.1", 80))),
    lambda: with_socket(lambda one: one.sendto(b"x", ("192.0.2.1", 53)), socket.SOCK_DGRAM),
    lambda: asyncio.run(asyncio.open_connection("example.invalid", 80)),
])
def test_others(reach):
    with pytest.raises(NetworkRefused):
        reach()

def with_socket(use, kind=socket.SOCK_STREAM):
    with socket.socket(socket.AF_INET, kind) as one:
        use(one)

@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.9.9.9", "::1", None])
def test_loopback(host):
    assert socket.getaddrinfo(host, 80)

def test_connection():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as one:
        assert one.getpeername() == server.getsockname()
"""


class TestNoNetwork:
    def test_guard_allows_only_loopback(self, outer: pytest.Pytester) -> None:
        before = socket.socket.connect, socket.getaddrinfo
        outer.makepyfile(GUARDED)
        outer.runpytest().assert_outcomes(passed=13)
        assert (socket.socket.connect, socket.getaddrinfo) == before


BLOCKED = """
import socket, pytest
from graftage.testing.plugin import NetworkRefused

@pytest.fixture
def server():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()

def test_it(server):
    with socket.socket() as one:
        one.connect(server)
"""


class TestBlockedNetwork:
    @pytest.mark.parametrize(
        ("options", "mark"),
        [
            ((), ""),
            (("--block-network", "--allowed-hosts=192[.]0[.]2[.]1,127[.]0"), ""),
            ((), '@pytest.mark.block_network(allowed_hosts=["127.0.0.1"])'),
            (("--block-network",), '@pytest.mark.allowed_hosts(["127.0.0.1"])'),
            (("--block-network",), '@pytest.mark.allowed_hosts("127.0.0.1")'),
        ],
    )
    def test_allowed_host_is_reached(self, outer: pytest.Pytester, options: tuple[str, ...], mark: str) -> None:
        outer.makepyfile(BLOCKED.replace("def test_it", f"{mark}\ndef test_it"))
        outer.runpytest(*options).assert_outcomes(passed=1)

    @pytest.mark.parametrize(
        ("options", "mark"),
        [
            (("--block-network",), ""),
            ((), "@pytest.mark.block_network"),
            (("--block-network", "--allowed-hosts=192.0.2.1"), ""),
            (("--allowed-hosts=127.0.0.1",), '@pytest.mark.block_network(allowed_hosts=["192.0.2.1"])'),
        ],
    )
    def test_even_loopback_is_refused(self, outer: pytest.Pytester, options: tuple[str, ...], mark: str) -> None:
        outer.makepyfile(BLOCKED.replace("def test_it", f"{mark}\ndef test_it"))
        result = outer.runpytest(*options)
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(
            ["*NetworkRefused: A blocked network refused a connection to '127.0.0.1'. Name it in*"]
        )

    def test_wrong_argument_is_an_error(self, outer: pytest.Pytester) -> None:
        outer.makepyfile("import pytest\n@pytest.mark.block_network('x')\ndef test_it(): pass")
        result = outer.runpytest()
        result.assert_outcomes(errors=1)
        result.stdout.fnmatch_lines(["*`block_network` has no argument but `allowed_hosts=*"])

    def test_recording_opens_its_host_alone(self, outer: pytest.Pytester, fake: FakeOllama) -> None:
        outer.makepyfile(
            test_it=ONE.replace("URL", fake.url).replace("MORE", "pass")
            + """
    import pytest, socket
    from graftage.testing.plugin import NetworkRefused
    with socket.socket() as one, pytest.raises(NetworkRefused):
        one.connect(("192.0.2.1", 80))
"""
        )
        outer.runpytest("--block-network", "--record-mode=rewrite").assert_outcomes(passed=1)
        outer.runpytest("--block-network").assert_outcomes(passed=1)
        assert len(fake.requests) == 1

    def test_event_loop_works(self, outer: pytest.Pytester) -> None:
        outer.makepyfile(
            """
        import asyncio, socket

        def pair():
            # What `socket.socketpair` does on Windows.
            with socket.create_server(("127.0.0.1", 0)) as server:
                one = socket.create_connection(server.getsockname())
                return one, server.accept()[0]

        real, socket.socketpair = socket.socketpair, pair

        def test_it():
            asyncio.run(asyncio.sleep(0))

        def teardown_module():
            socket.socketpair = real
        """
        )
        outer.runpytest("--block-network").assert_outcomes(passed=1)


PEER = """
import socket

def test_ours(cassette, pytestconfig):
    assert pytestconfig.getoption("--record-mode") == "once"
    assert cassette.records
"""
PEER_MARKED = """
import pytest

@pytest.mark.vcr
def test_theirs(vcr):
    assert vcr.record_mode.value == "once"
    # A test that records is left to pytest-recording, which blocks nothing then.
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
"""


class TestBesidePytestRecording:
    @pytest.mark.parametrize(
        ("loaded", "conftest"),
        [
            (["graftage.testing.plugin", "pytest_recording.plugin"], ""),
            (["pytest_recording.plugin", "graftage.testing.plugin"], ""),
            (["graftage.testing.plugin", "recording"], ""),
            (["recording"], "pytest_plugins = ['graftage.testing.plugin']"),
            ([], "pytest_plugins = ['pytest_recording.plugin', 'graftage.testing.plugin']"),
            (["graftage.testing.plugin"], ""),
        ],
        ids=["first", "second", "before-entry-points", "after-entry-points", "conftest", "alone"],
    )
    def test_options_do_not_clash(self, outer: pytest.Pytester, loaded: list[str], conftest: str) -> None:
        outer.makeconftest(conftest)
        alone = loaded == ["graftage.testing.plugin"]
        outer.makepyfile(PEER if alone else PEER + PEER_MARKED)
        plugins = [each for name in loaded for each in ("-p", name)]
        result = outer.runpytest(*plugins, "--record-mode=once", "--block-network")
        result.assert_outcomes(passed=1 if alone else 2, errors=1)
        result.stdout.fnmatch_lines(["*Nothing was recorded for*test_ours.yaml*"])
