"""The engine's process: started if needed, shared, restarted after a crash, and never left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from subprocess import PIPE
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from engine_fixtures import PATIENCE, eventually
from small_engine import LONG, NAME

import graftage
from graftage.exceptions import ConnectionFailed, ModelLoadFailed, ProviderTimeout, StreamInterrupted
from graftage_llamacpp import _engine, _process

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.by_turns,
    pytest.mark.engine,
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc"),
]


@pytest.fixture
def llm(both: Any, small_store: Path) -> Any:
    return both.connect("llamacpp", context_window=512)


def children() -> set[int]:
    """Return the engines that are children of this process."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z" and is_engine(int(stat.parent.name)):
            found.add(int(stat.parent.name))
    return found


def is_engine(pid: int) -> bool:
    try:
        return b"_child.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def engine(llm: Any) -> int:
    """Return the process of the only model in memory."""
    (loaded,) = llm.loaded()
    return int(loaded.raw["pid"])


def environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(each.split("=", 1) for each in pairs if each)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert eventually(lambda: children() == set())


class TestSecurity:
    def test_listens_on_loopback_with_hidden_key(self, llm: Any) -> None:
        llm.load()
        (engine_,) = _engine.engines()
        assert engine_.process is not None
        address, key = engine_.process.address, engine_.process.key
        assert address.startswith("http://127.0.0.1:")
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer"}):
            refused = httpx.post(f"{address}/v1/chat/completions", json=body, headers=headers)
            assert refused.status_code == 401
            assert not refused.headers.get("access-control-allow-origin")
        assert len(key) >= 32
        pid = engine_.process.pid
        assert key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert key not in str(environment(pid))
        assert key not in repr(engine_.process) + repr(llm.loaded())

    def test_each_start_has_another_key(self, llm: Any) -> None:
        keys = set()
        for _ in range(2):
            llm.load()
            (engine_,) = _engine.engines()
            assert engine_.process is not None
            keys.add(engine_.process.key)
            llm.unload()
        assert len(keys) == 2


class TestThreads:
    def test_threads_wait_passively_without_backtraces(self, llm: Any) -> None:
        llm.load()
        assert environment(engine(llm)).items() >= {"OMP_WAIT_POLICY": "passive", "GGML_NO_BACKTRACE": "1"}.items()

    def test_default_leaves_one_core_free(self) -> None:
        cores = len(os.sched_getaffinity(0))
        assert 1 <= _process.default_threads() <= max(1, cores - 1)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def ended(llm: Any, both: Any, how: signal.Signals) -> Any:
    """Start a chat whose engine a signal ends before it answers."""
    llm.load()
    pid = engine(llm)
    os.kill(pid, signal.SIGSTOP)
    answer = both.start(llm.chat, "Hello", max_tokens=1)
    assert eventually(lambda: llm.stats().running == 1)
    time.sleep(0.3)
    os.kill(pid, how)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    return answer


class TestCrashes:
    def test_crash_in_stream_gives_partial(self, llm: Any) -> None:
        stream = llm.chat("Hello", stream=True, **LONG)
        first = next(iter(stream))
        os.kill(engine(llm), signal.SIGKILL)
        with pytest.raises(StreamInterrupted, match="killed by signal 9") as caught:
            for _ in stream:
                pass
        assert caught.value.partial is not None
        assert caught.value.partial.text.startswith(first.text)
        assert caught.value.partial.finish_reason is None
        assert not caught.value.retryable

    def test_crash_in_plain_reply_gives_partial(self, llm: Any, both: Any) -> None:
        llm.load(context_window=LONG["context_window"])
        answer = both.start(llm.chat, "Hello", timeout=60, **LONG)
        time.sleep(1)
        os.kill(engine(llm), signal.SIGKILL)
        with pytest.raises(StreamInterrupted) as caught:
            answer.result(PATIENCE)
        assert caught.value.partial is not None

    def test_next_call_restarts_with_warning(self, llm: Any) -> None:
        llm.chat("Hello", max_tokens=1)
        os.kill(engine(llm), signal.SIGKILL)
        assert eventually(lambda: llm.loaded() == ())
        reply = llm.chat("Hello", max_tokens=1)
        assert reply.text
        assert any("ended unexpectedly" in each for each in reply.warnings)
        assert llm.chat("Hello", max_tokens=1).warnings == ()

    def test_killed_before_reply_is_retried(self, llm: Any, both: Any) -> None:
        answer = ended(llm, both, signal.SIGKILL)
        assert answer.result(PATIENCE).text

    @pytest.mark.parametrize("how", [signal.SIGABRT, signal.SIGSEGV])
    def test_crashed_before_reply_is_not_retried(self, llm: Any, both: Any, how: signal.Signals) -> None:
        with pytest.raises(ConnectionFailed, match=f"signal {int(how)}") as caught:
            ended(llm, both, how).result(PATIENCE)
        assert (caught.value.attempts, caught.value.retryable) == (1, False)
        assert "The engine crashed" in str(caught.value.hint)
        assert llm.chat("Hello", max_tokens=1).text

    def test_hanging_start_ends_at_timeout(
        self, both: Any, small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stand_in(tmp_path, monkeypatch, "import time; time.sleep(60)")
        with pytest.raises((ModelLoadFailed, ProviderTimeout)):
            both.connect("llamacpp").chat("Hello", timeout=1)
        assert eventually(lambda: children() == set())


PARENT = f"""
import sys, time, os
import graftage
llm = graftage.connect("llamacpp")
long = {LONG}
stream = llm.chat("Tell me a story", stream=True, **long)
next(iter(stream))
print(llm.loaded()[0].raw["pid"], flush=True)
"""


@pytest.fixture
def parent(small_store: Path, default_signals: None) -> Iterator[Any]:
    """Start a host with an engine, and return the host and the engine's process."""
    started: list[tuple[subprocess.Popen[str], int]] = []

    def start(then: str) -> tuple[subprocess.Popen[str], int]:
        code = f"{PARENT}sys.stdin.readline()\n{then}"
        host = subprocess.Popen([sys.executable, "-c", code], text=True, stdin=PIPE, stdout=PIPE, stderr=PIPE)
        assert host.stdin is not None
        assert host.stdout is not None
        pid = int(host.stdout.readline())
        started.append((host, pid))
        assert is_engine(pid)
        host.stdin.write("\n")  # From now on, it may end.
        host.stdin.flush()
        return host, pid

    yield start
    for host, pid in started:
        host.kill()
        host.communicate()
        assert eventually(lambda pid=pid: not is_engine(pid))  # type: ignore[misc] # a bound name


class TestEndOfParent:
    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
    def test_killed_parent(self, how: signal.Signals, parent: Any) -> None:
        host, pid = parent("time.sleep(60)")
        host.send_signal(how)
        host.wait(PATIENCE)
        assert eventually(lambda: not is_engine(pid))

    @pytest.mark.parametrize("then", ["", "sys.exit(3)", "os._exit(0)", "os.abort()", "1 / 0"])
    def test_unclosed_client(self, then: str, parent: Any) -> None:
        host, pid = parent(then)
        host.wait(PATIENCE)
        assert eventually(lambda: not is_engine(pid))

    def test_fork_does_not_keep_engine_alive(self, parent: Any) -> None:
        host, pid = parent("child = os.fork()\nif child: print(child, flush=True)\ntime.sleep(60)")
        fork = int(host.stdout.readline())
        try:
            assert is_engine(pid)
            host.kill()
            host.wait(PATIENCE)
            assert eventually(lambda: not is_engine(pid))
        finally:
            os.kill(fork, signal.SIGKILL)

    def test_fork_that_ends_leaves_engine_running(self, parent: Any) -> None:
        host, pid = parent(
            "stream.close()\n"
            "child = os.fork()\n"
            "if not child: sys.exit(0)\n"
            "os.waitpid(child, 0)\n"
            "print(llm.chat('Hello', max_tokens=1).timings.load, llm.loaded()[0].raw['pid'], flush=True)\n"
        )
        assert host.stdout.readline().split() == ["None", str(pid)]

    def test_ctrl_c_ends_only_the_stream(self, parent: Any) -> None:
        host, pid = parent(
            "try:\n"
            "    print('reading', flush=True)\n"
            "    while True:\n"
            "        for _ in stream: pass\n"
            "        stream = llm.chat('Tell me a story', stream=True, **long)\n"
            "except KeyboardInterrupt:\n"
            "    stream.close()\n"
            "    print(bool(llm.chat('Hello', max_tokens=1).text), llm.loaded()[0].raw['pid'], flush=True)\n"
        )
        assert host.stdout.readline() == "reading\n"
        time.sleep(0.3)
        host.send_signal(signal.SIGINT)
        assert host.stdout.readline().split() == ["True", str(pid)]


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Replace the engine's package by one that runs `source` when it is imported."""
    (folder / "xllamacpp").mkdir()
    (folder / "xllamacpp" / "__init__.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)


class TestFailedStart:
    @pytest.mark.parametrize(
        ("library", "package"),
        [("libgomp.so.1", "libgomp1"), ("libstdc++.so.6", r"libstdc\+\+6"), ("libodd.so.3", "libodd")],
    )
    def test_missing_library_names_its_package(
        self, library: str, package: str, llm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        words = f"{library}: cannot open shared object file: No such file or directory"
        stand_in(tmp_path, monkeypatch, f"raise ImportError({words!r})")
        with pytest.raises(ModelLoadFailed, match=package) as caught:
            llm.chat("Hello")
        assert caught.value.reason == "incompatible"
        assert library.partition(".")[0] in caught.value.message
        assert caught.value.attempts == 1

    def test_missing_engine_package_is_named(
        self, both: Any, small_store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "xllamacpp", None)
        llm = both.connect("llamacpp")
        with pytest.raises(ModelLoadFailed, match="xllamacpp") as caught:
            llm.chat("Hello")
        assert "graftage-llamacpp" in str(caught.value.hint)
        health = llm.health("answers")
        assert not health.reachable
        assert isinstance(health.error, ModelLoadFailed)

    @pytest.mark.parametrize(("number", "attempts"), [(9, 2), (6, 1)])
    def test_crash_is_reported_and_kill_retried(
        self, llm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, attempts: int
    ) -> None:
        log = tmp_path / "starts"
        lines = (
            f"open({str(log)!r}, 'a').write('x')",
            "import os, sys",
            "print('out of luck', file=sys.stderr, flush=True)",
            f"os.kill(os.getpid(), {number})",
        )
        stand_in(tmp_path, monkeypatch, "\n".join(lines))
        with pytest.raises(ModelLoadFailed, match=f"signal {number}") as caught:
            llm.chat("Hello")
        assert caught.value.reason == "crashed"
        assert "out of luck" in caught.value.details["engine_stderr"]
        assert caught.value.attempts == len(log.read_text()) == attempts

    def test_abort_for_lack_of_memory(
        self, both: Any, small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stand_in(tmp_path, monkeypatch, "import os\nos.write(2, b'what(): std::bad_alloc')\nos.abort()")
        with pytest.raises(ModelLoadFailed) as caught:
            both.connect("llamacpp").chat("Hello")
        assert (caught.value.reason, caught.value.attempts) == ("memory", 1)


class TestLifetime:
    def test_runs_from_first_request_to_close(self, llm: Any) -> None:
        llm.models()
        llm.show()
        assert children() == set()
        llm.chat("Hello", max_tokens=1)
        assert children() == {engine(llm)}
        llm.close()
        assert children() == set()

    def test_equal_clients_share_an_engine(self, both: Any, small_store: Path) -> None:
        one, two = (both.connect("llamacpp", context_window=512) for _ in range(2))
        one.chat("Hello", max_tokens=1)
        assert two.chat("Hello", max_tokens=1).timings.load is None
        assert children() == {engine(one)}
        one.close()
        assert two.chat("Hello", max_tokens=1).text
        two.close()
        assert children() == set()

    def test_other_settings_get_another_engine(self, both: Any, small_store: Path) -> None:
        one, two = (both.connect("llamacpp", context_window=512, batch=batch) for batch in (64, 128))
        one.chat("Hello", max_tokens=1)
        two.chat("Hello", max_tokens=1)
        assert len(children()) == 2

    def test_concurrent_requests_start_one_engine(self, llm: Any, both: Any) -> None:
        answers = [both.start(llm.chat, "Hello", max_tokens=1) for _ in range(6)]
        seen: set[int] = set()
        while not all(each.done() for each in answers):
            seen |= children()
            time.sleep(0.01)
        assert all(each.result().text for each in answers)
        assert len(seen) == 1

    @pytest.mark.nightly
    def test_twenty_starts_leak_nothing(self, small_store: Path) -> None:
        before = open_files()
        seen = set()
        with graftage.connect("llamacpp", context_window=128, batch=32) as llm:
            for _ in range(20):
                llm.load()
                seen.add(engine(llm))
                llm.unload()
                assert children() == set()
        assert len(seen) == 20
        assert open_files() <= before + 1

    def test_closed_client_starts_nothing(self, llm: Any) -> None:
        llm.close()
        with pytest.raises((RuntimeError, ConnectionFailed)):
            llm.chat("Hello", model=NAME)
        assert children() == set()

    def test_close_ends_stream_of_another_thread(self, small_store: Path) -> None:
        llm = graftage.connect("llamacpp", context_window=512)
        stream = llm.chat("Hello", stream=True, **LONG)
        next(iter(stream))
        failed: list[BaseException] = []

        def read() -> None:
            try:
                for _ in stream:
                    pass
            except Exception as error:  # noqa: BLE001 - the test looks at its class
                failed.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        llm.close()
        reader.join(PATIENCE)
        assert not reader.is_alive()
        assert all(isinstance(each, (graftage.GraftageError, RuntimeError)) for each in failed)
        assert children() == set()
