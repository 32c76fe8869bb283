"""Cassettes by their modes: what is sent, what is kept, how faults return."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import pytest
from recording import CALL, ELSEWHERE, JSON, STREAM, exchange, modes, recorded, run

import graftage
from graftage.exceptions import ConnectionFailed, ProtocolError, ProviderError, ProviderTimeout, StreamInterrupted
from graftage.http import Clock, Request
from graftage.http._blocking import BlockingNetwork
from graftage.testing import Cassette, CassetteMiss
from graftage.testing.interactions import HeaderDict, RecordedRequest
from graftage.types import Timeouts
from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from pathlib import Path

VERSION = "/api/version"


def ask(cassette: Cassette, url: str, n: int) -> bytes:
    """Send one of several requests."""
    _, pieces = exchange("sync", cassette, f"{url}/api/show", body={"n": n})
    return b"".join(pieces)


@pytest.fixture
def path(tmp_path: Path, fake: FakeOllama) -> Path:
    """A file with the answers to the requests 1 and 2."""
    fake.script("/api/show", Answer([{"old": 1}]), Answer([{"old": 2}]))
    with Cassette(tmp_path / "a.yaml", mode="once", server="Ollama 0.9.3") as cassette:
        assert [ask(cassette, fake.url, n) for n in (1, 2)] == [b'{"old":1}\n', b'{"old":2}\n']
    fake.script("/api/show", *[Answer([{"new": True}])] * 3)
    fake.requests.clear()
    return cassette.path


class TestModes:
    @pytest.mark.parametrize("mode", ["none", "once"])
    def test_existing_file_opens_no_connection(self, path: Path, fake: FakeOllama, mode: Any) -> None:
        before = path.read_bytes()
        with Cassette(path, mode=mode) as cassette:
            assert ask(cassette, fake.url, 1) == b'{"old":1}\n'
            with pytest.raises(CassetteMiss) as caught:
                ask(cassette, fake.url, 3)
        assert cassette.misses == [caught.value]
        assert (cassette.records, fake.requests, path.read_bytes()) == (False, [], before)

    def test_new_episodes_keep_the_file_unchanged(self, path: Path, fake: FakeOllama) -> None:
        before = path.read_bytes()
        with Cassette(path, mode="new_episodes") as cassette:
            assert [ask(cassette, fake.url, n) for n in (3, 2, 1)] == [
                b'{"new":true}\n',
                b'{"old":2}\n',
                b'{"old":1}\n',
            ]
            assert ask(cassette, fake.url, 1) == b'{"new":true}\n', "each is played once"
        after = path.read_bytes()
        assert after.startswith(before)
        assert len(fake.requests) == 2
        assert [b"n" in each.request.body for each in Cassette(path).interactions] == [True] * 4
        with Cassette(path, mode="new_episodes") as cassette:
            assert ask(cassette, fake.url, 3) == b'{"new":true}\n'
        assert path.read_bytes() == after, "nothing new, nothing written"

    def test_all_replaces_the_file(self, path: Path, fake: FakeOllama) -> None:
        with Cassette(path, mode="all") as cassette:
            assert ask(cassette, fake.url, 1) == b'{"new":true}\n'
        assert [each.body for each in Cassette(path).interactions] == [b'{"new":true}\n']

    @pytest.mark.parametrize(("old", "new"), [("replay", "none"), ("record", "all")])
    def test_old_words_warn_at_their_line(self, path: Path, old: Any, new: str) -> None:
        with pytest.warns(DeprecationWarning, match=f'mode="{new}"') as caught:
            assert Cassette(path, mode=old).mode == new
        assert caught[0].filename == __file__

    def test_client_uses_each_mode(self, both: Any, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        texts = []
        for mode in ("once", "once", "new_episodes", "none"):
            with Cassette(path, mode=mode) as cassette:
                llm = both.connect("ollama", model="smollm2:135m", host=fake.url, transport=cassette)
                texts.append(llm.chat("Hi").text)
        assert texts == texts[:1] * 4
        assert len(fake.requests) == 1

    def test_facts_are_kept_and_read(self, path: Path, fake: FakeOllama) -> None:
        with Cassette(path, mode="new_episodes", server="Ollama 0.9.4", digest="abc") as cassette:
            exchange("sync", cassette, f"{fake.url}/api/chat", body={"model": "m"})
        first, _, last = (each.recorded for each in Cassette(path).interactions)
        assert first.client == f"graftage {graftage.__version__}"
        assert (first.server, first.model, first.digest) == ("Ollama 0.9.3", None, None)
        assert (last.server, last.model, last.digest) == ("Ollama 0.9.4", "m", "abc")
        assert Cassette(path).server == "Ollama 0.9.3"


class TestScrubbers:
    def test_request_is_changed_before_it_is_kept(self, tmp_path: Path, fake: FakeOllama) -> None:
        def scrub(request: RecordedRequest) -> RecordedRequest | None:
            request.uri = request.uri.replace("mine", "yours")
            return None if request.path == VERSION else request

        path = tmp_path / "a.yaml"
        with Cassette(path, mode="once", before_record_request=scrub) as cassette:
            exchange("sync", cassette, f"{fake.url}/api/show?user=mine")
            exchange("sync", cassette, f"{fake.url}{VERSION}", "GET")
        assert [each.request.target for each in cassette.interactions] == ["/api/show?user=yours"]
        cassette = Cassette(path, before_record_request=scrub)
        assert exchange("sync", cassette, f"{ELSEWHERE}/api/show?user=mine")[0] == 404
        with pytest.raises(CassetteMiss, match="before_record_request"):
            exchange("sync", cassette, f"{ELSEWHERE}{VERSION}", "GET")

    def test_response_is_changed_before_it_is_kept(self, tmp_path: Path, fake: FakeOllama) -> None:
        def scrub(response: dict[str, Any]) -> dict[str, Any] | None:
            if response["status"]["code"] == 404:
                return None
            response["body"]["string"] = response["body"]["string"].replace(b"mine", b"yours")
            return response

        path = tmp_path / "a.yaml"
        fake.script("/api/chat", Answer([b"this is ", b"mine"]))
        with Cassette(path, mode="once", before_record_response=scrub) as cassette:
            assert b"".join(exchange("sync", cassette, f"{fake.url}/api/chat")[1]) == b"this is mine"
            exchange("sync", cassette, f"{fake.url}/nowhere")
        assert [each.body for each in cassette.interactions] == [b"this is yours"]
        assert [each._chunks for each in cassette._tracks] == [[], []]
        assert b"mine" not in path.read_bytes()
        assert exchange("sync", Cassette(path), f"{ELSEWHERE}/api/chat") == (200, [b"this is yours"])

    def test_reader_who_leaves_leaves_nothing_raw(self, tmp_path: Path, fake: FakeOllama) -> None:
        fake.script("/api/chat", Answer([b"mine", b"more"], delay=0.05))
        with Cassette(tmp_path / "a.yaml", mode="once", before_record_response=lambda each: each) as cassette:
            exchange("sync", cassette, f"{fake.url}/api/chat", leave_after=1)
            assert [each._chunks for each in cassette._tracks] == [[]]
        assert [each.stopped for each in cassette.interactions] == [True]

    def test_headers_are_kept_by_a_list(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        fake.script("/api/chat", Answer(headers={"X-Request-Cost": "7", "X-Other": "1"}))
        with Cassette(path, mode="once", keep_headers=["X-Request-Cost", "x-team"]) as cassette:
            exchange("sync", cassette, f"{fake.url}/api/chat", headers={"x-team": "a"}, body={})
        (interaction,) = Cassette(path).interactions
        assert interaction.headers.keys() == {"content-type", "x-request-cost"}
        assert interaction.request.headers == HeaderDict({"Content-Type": "application/json", "X-Team": "a"})


def refusing() -> str:
    """Return an address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def failing(cassette: Cassette, url: str, mode: str) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        exchange(mode, cassette, f"{url}/api/chat", body={"model": "m"})
    return caught.value


class TestFaults:
    @modes
    @pytest.mark.parametrize(
        ("answer", "fault", "kind"),
        [
            (None, "refused", ConnectionFailed),
            (Answer(raw=b"", ending="close"), "reset", ConnectionFailed),
            (Answer([b"x"], ending="close"), "cut", StreamInterrupted),
            (Answer([b"x"], ending="reset"), "cut", StreamInterrupted),
            (Answer(raw=b"220 mail.test ESMTP\r\n\r\n"), "invalid", ProtocolError),
        ],
        ids=["refused", "reset", "closed", "cut", "invalid"],
    )
    def test_replay_as_the_same_error(
        self,
        tmp_path: Path,
        fake: FakeOllama,
        *,
        mode: str,
        answer: Answer | None,
        fault: str,
        kind: type[ProviderError],
    ) -> None:
        path = tmp_path / "a.yaml"
        fake.script("/api/chat", *[answer] if answer else [])
        with Cassette(path, mode="once") as cassette:
            live = failing(cassette, fake.url if answer else refusing(), mode)
        (interaction,) = Cassette(path).interactions
        assert (interaction.fault is not None and interaction.fault.kind, interaction.stopped) == (fault, False)
        again = failing(Cassette(path), ELSEWHERE, mode)
        assert (type(live), type(again)) == (kind, kind)
        assert (again.retryable, again.message, again.details) == (live.retryable, live.message, live.details)
        assert "record again" in str(again.hint)

    @pytest.mark.parametrize(
        ("phase", "answer"), [("first_token", Answer(raw=b"")), ("idle", Answer([{"message": {}}]))]
    )
    def test_timeout_is_replayed_at_once(
        self, both: Any, tmp_path: Path, fake: FakeOllama, phase: str, answer: Answer
    ) -> None:
        path = tmp_path / "a.yaml"
        fake.script("/api/chat", Answer(answer.chunks, raw=answer.raw, ending="stall"))

        def ask(cassette: Cassette, timeouts: Timeouts) -> ProviderTimeout:
            llm = both.connect("ollama", model="m", host=fake.url, transport=cassette, timeouts=timeouts)
            with pytest.raises(ProviderTimeout) as caught:
                llm.chat("Hi")
            return caught.value

        with Cassette(path, mode="once") as cassette:
            live = ask(cassette, Timeouts(first_token=0.2, idle=0.2))
        again = ask(Cassette(path), Timeouts())
        assert (again.phase, again.retryable, again.message) == (phase, live.retryable, live.message)

    def test_retry_repeats_its_attempts(self, both: Any, tmp_path: Path, fake: FakeOllama, free_waiting: None) -> None:
        path = tmp_path / "a.yaml"
        done = {"message": {"content": "ok"}, "done": True, "done_reason": "stop"}
        fake.script("/api/chat", Answer(raw=b"", ending="close"), Answer(status=503), Answer([done]))

        def ask(cassette: Cassette) -> tuple[str, int]:
            reply = both.connect("ollama", model="m", host=fake.url, transport=cassette, attempts=4).chat("Hi")
            return reply.text, reply.attempts

        with Cassette(path, mode="once") as cassette:
            live = ask(cassette)
        assert len(cassette) == 3
        cassette = Cassette(path)
        assert (ask(cassette), cassette.unplayed) == (live, ())
        assert live[0] == "ok"

    def test_no_response_is_no_empty_one(self, tmp_path: Path) -> None:
        with Cassette(tmp_path / "a.yaml", mode="once") as cassette:
            failing(cassette, refusing(), "sync")
        request = Request(method="POST", url=f"{ELSEWHERE}/api/chat", headers=JSON, body=b'{"model":"m"}')
        with pytest.raises(ConnectionFailed):
            run("sync", Cassette(cassette.path).wrap(BlockingNetwork).send(request, Clock(CALL)))

    @modes
    def test_early_leave_replays_as_whole(self, tmp_path: Path, fake: FakeOllama, mode: str) -> None:
        path = tmp_path / "a.yaml"
        recorded(path, fake, Answer([b"data: [DONE]\n\n"], ending="stall"), mode=mode, leave_after=1)
        (interaction,) = Cassette(path).interactions
        assert (interaction.stopped, interaction.fault) == (True, None)
        assert exchange(mode, Cassette(path), f"{ELSEWHERE}/api/chat") == (200, [b"data: [DONE]\n\n"])

    def test_old_mark_of_a_cut_is_read(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        recorded(path, fake, STREAM)
        text = path.read_text(encoding="utf-8")
        path.write_text(text.rstrip() + "\n    cut_short: true\n", encoding="utf-8")
        assert isinstance(failing_read(path), StreamInterrupted)


def failing_read(path: Path) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        exchange("sync", Cassette(path), f"{ELSEWHERE}/api/chat")
    return caught.value
