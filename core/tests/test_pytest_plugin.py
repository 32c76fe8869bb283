"""The fixtures for pytest."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
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
    outer.runpytest("--graftage-record").assert_outcomes(passed=2)
    return outer


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


class TestPytestPlugin:
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
        suite.runpytest("--graftage-record").assert_outcomes(failed=1, passed=1)
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

    def test_guard_allows_only_loopback(self, outer: pytest.Pytester) -> None:
        before = socket.socket.connect, socket.getaddrinfo
        outer.makepyfile(GUARDED)
        outer.runpytest().assert_outcomes(passed=13)
        assert (socket.socket.connect, socket.getaddrinfo) == before
