"""Cassettes record and replay."""

from __future__ import annotations

import datetime as dt
import os
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

from graftage.exceptions import StreamInterrupted
from graftage.testing import Cassette, CassetteError, CassetteMiss
from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from collections.abc import Callable

from recording import ELSEWHERE, STREAM, exchange, modes, recorded, talk

import graftage
from graftage.testing.files import CassetteFile
from graftage.testing.interactions import Interaction, RecordedRequest


class TestReplay:
    @modes
    @pytest.mark.parametrize("by", ["sync", "async"])
    def test_keeps_the_pieces_of_the_recording(self, tmp_path: Path, fake: FakeOllama, mode: str, by: str) -> None:
        path = tmp_path / "one" / "story.yaml"
        live = recorded(path, fake, STREAM, mode=by, body={"model": "m"})
        with Cassette(path) as cassette:
            again = exchange(mode, cassette, f"{ELSEWHERE}/api/chat", body={"model": "m"})
        assert again == live
        assert b"".join(live[1]) == '{"n":1}\n{"n":2,"text":"grüß 🌱"}\n{"n":3}\n'.encode()
        assert (cassette.unplayed, cassette.misses, cassette.server) == ((), [], "Ollama 0.9.3")

    def test_generated_call_ids_may_differ(self, tmp_path: Path, fake: FakeOllama) -> None:
        call = {"function": {"name": "f", "arguments": {}}}
        line = {"message": {"content": "", "tool_calls": [call]}, "done": True, "done_reason": "stop"}
        fake.script("/api/chat", *[Answer([line])] * 2)
        path = tmp_path / "one.yaml"
        with Cassette(path, mode="all") as cassette:
            ids = talk(cassette, fake.url)
        with Cassette(path) as cassette:
            assert len({*ids, *talk(cassette, fake.url)}) == 4
        assert cassette.unplayed == ()

    @pytest.mark.parametrize("other", [{"tool_call_id": "a"}, {"tool_calls": []}, {"content": "x"}], ids=str)
    def test_only_call_ids_may_differ(self, tmp_path: Path, fake: FakeOllama, other: Any) -> None:
        def asked(call_id: str, name: str) -> dict[str, Any]:
            call = {"id": call_id, "function": {"name": name}}
            return {"messages": [{"tool_calls": [call]}, {"role": "tool", "tool_call_id": call_id}]}

        path = tmp_path / "one.yaml"
        live = recorded(path, fake, STREAM, body=asked("a", "f"))
        with Cassette(path) as cassette:
            for body in asked("a", "g"), {"messages": [*asked("a", "f")["messages"], other]}:
                with pytest.raises(CassetteMiss):
                    exchange("sync", cassette, f"{ELSEWHERE}/api/chat", body=body)
            assert exchange("sync", cassette, f"{ELSEWHERE}/api/chat", body=asked("b", "f")) == live


class TestRecording:
    @modes
    def test_passes_chunks_on(self, tmp_path: Path, fake: FakeOllama, mode: str) -> None:
        gate = threading.Event()
        # Without the first piece, the second never comes.
        live = recorded(tmp_path / "a.yaml", fake, Answer([b"first", gate, b"second"]), mode=mode, meanwhile=gate.set)
        assert live == (200, [b"first", b"second"])

    @modes
    @pytest.mark.parametrize("ending", ["close", "reset"])
    def test_broken_stream_breaks_again(self, tmp_path: Path, fake: FakeOllama, mode: str, ending: Any) -> None:
        path = tmp_path / "a.yaml"
        gate = threading.Event()
        fake.script("/api/chat", Answer([{"n": 1}, gate], ending=ending))
        with Cassette(path, mode="all") as cassette, pytest.raises(StreamInterrupted):
            exchange(mode, cassette, f"{fake.url}/api/chat", meanwhile=gate.set)
        (interaction,) = Cassette(path).interactions
        assert (interaction.fault is not None and interaction.fault.kind, interaction.stopped) == ("cut", False)
        with pytest.raises(StreamInterrupted):
            exchange(mode, Cassette(path), f"{ELSEWHERE}/api/chat")
        assert exchange(mode, Cassette(path), f"{ELSEWHERE}/api/chat", leave_after=1) == (200, [b'{"n":1}\n'])

    @modes
    def test_early_leave_is_no_fault(self, tmp_path: Path, fake: FakeOllama, mode: str) -> None:
        path = tmp_path / "a.yaml"
        recorded(path, fake, Answer([{"n": 1}], ending="stall"), mode=mode, leave_after=1)
        (interaction,) = Cassette(path).interactions
        assert (interaction.fault, interaction.stopped) == (None, True)
        assert exchange(mode, Cassette(path), f"{ELSEWHERE}/api/chat") == (200, [b'{"n":1}\n'])


class TestFileFormat:
    def test_reads_well_in_a_diff(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        headers = {"authorization": "Bearer secret-of-mine", "cookie": "a=b"}
        _, pieces = recorded(path, fake, STREAM, headers=headers, body={"q": "é" * 90})
        (interaction,) = Cassette(path).interactions
        facts, times = interaction.recorded, interaction.times
        assert dt.date.fromisoformat(facts.date or "") <= dt.datetime.now(dt.UTC).date()
        assert sorted(times) == [*times]
        assert (
            path.read_text(encoding="utf-8")
            == """\
version: 1
interactions:
- request:
    method: POST
    uri: URL/api/chat
    headers:
      content-type: [application/json]
    body: '{"q":"%s"}'
  response:
    recorded: {date: 'TODAY', client: graftage VERSION, server: Ollama 0.9.3}
    status:
      code: 200
      message: OK
    headers:
      content-type: [application/x-ndjson]
    body:
      string: |
        {"n":1}
        {"n":2,"text":"grüß 🌱"}
        {"n":3}
    chunk_lengths: PIECES
    chunk_times: TIMES
""".replace("%s", "é" * 90)
            .replace("URL", fake.url)
            .replace("TODAY", str(facts.date))
            .replace("VERSION", graftage.__version__)
            .replace("PIECES", str([*map(len, pieces)]))
            .replace("TIMES", str([*times]))
        )

    @given(body=st.binary() | st.text().map(str.encode), question=st.text())
    def test_keeps_any_body(self, body: bytes, question: str) -> None:
        one = Interaction(
            request=RecordedRequest(method="POST", uri="http://a/x?a=%20", body=question.encode()),
            status=200,
            reason="OK",
            chunks=(body,) if body else (),
        )
        text = CassetteFile().with_more([one, one])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.yaml"
            path.write_bytes(text)
            assert list(CassetteFile.read(path)) == [one, one]

    def test_keeps_unusual_line_breaks(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        live = recorded(path, fake, Answer(["a\x85b\nc\u2028d\ne\r\nf\n".encode()]))
        assert exchange("sync", Cassette(path), f"{ELSEWHERE}/api/chat") == live


class TestMatching:
    def test_equal_bodies_play_in_order(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        with Cassette(path, mode="all") as cassette:
            for n, body in enumerate((b'{"a":1,"b":[2]}', b'{"a":2}', b'{"a":1,"b":[2]}')):
                fake.script("/api/chat", Answer([{"n": n}]))
                exchange("sync", cassette, f"{fake.url}/api/chat", body=body)
        cassette = Cassette(path)
        answers = [
            exchange("sync", cassette, f"{ELSEWHERE}/api/chat", body=body)[1]
            for body in (b' {"b": [2], "a": 1}', b'{"b":[2],"a":1}', b'{"a":2}')
        ]
        assert answers == [[b'{"n":0}\n'], [b'{"n":2}\n'], [b'{"n":1}\n']]

    @modes
    def test_miss_names_nearest_request_and_field(self, tmp_path: Path, fake: FakeOllama, mode: str) -> None:
        path = tmp_path / "a.yaml"
        with Cassette(path, mode="all") as cassette:
            exchange("sync", cassette, f"{fake.url}/api/version", "GET")
            exchange("sync", cassette, f"{fake.url}/api/chat", body={"model": "m", "options": {"seed": 7}})
        cassette = Cassette(path)
        with pytest.raises(CassetteMiss) as caught:
            exchange(mode, cassette, f"{ELSEWHERE}/api/chat", body={"model": "m", "options": {"seed": 42}})
        assert "The nearest recorded request is POST /api/chat" in str(caught.value)
        assert "differs in `options.seed` (recorded 7, now 42)." in str(caught.value)
        assert cassette.misses == [caught.value]
        assert cassette.unplayed == ("GET /api/version", "POST /api/chat")

    @pytest.mark.parametrize("target", ["/api/a b?x={1}", "/api/grün", "?x=1", "/a%2fb", "/a?b=ü c", "/a#f", "/a[1]|b"])
    def test_spelling_of_addresses_is_ignored(self, tmp_path: Path, fake: FakeOllama, target: str) -> None:
        path = tmp_path / "a.yaml"
        with Cassette(path, mode="all") as cassette:
            live = exchange("sync", cassette, f"{fake.url}{target}", "GET")
        assert exchange("sync", Cassette(path), f"{ELSEWHERE}{target}", "GET") == live
        sent = ELSEWHERE + fake.requests[0].path
        assert exchange("sync", Cassette(path), sent, "GET") == live

    def test_miss_names_each_difference_once(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        with Cassette(path, mode="all") as cassette:
            for n in range(7):
                exchange("sync", cassette, f"{fake.url}/api/show", body={"n": n})
        with pytest.raises(CassetteMiss) as caught:
            exchange("sync", Cassette(path), f"{ELSEWHERE}/api/other", "GET")
        assert (
            str(caught.value)
            .partition("request. ")[2]
            .startswith(
                "Asked: GET /api/other. The nearest recorded request is POST /api/show,"
                " which differs in the method; the path; `n` (recorded 0, now nothing)."
            )
        )

    def test_miss_counts_the_other_differences(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        recorded(path, fake, STREAM, body=dict.fromkeys("abcdefg", 1))
        with pytest.raises(CassetteMiss, match=r"`e` \(recorded 1, now 2\); and in 2 more\.") as caught:
            exchange("sync", Cassette(path), f"{ELSEWHERE}/api/chat", body=dict.fromkeys("abcdefg", 2))
        assert str(caught.value).count("(recorded 1, now 2)") == 5

    def test_path_counts_more_than_body(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        body = dict.fromkeys("abcdefghijkl", 1)
        with Cassette(path, mode="all") as cassette:
            exchange("sync", cassette, f"{fake.url}/api/show", body=body)
            exchange("sync", cassette, f"{fake.url}/api/chat", body=dict.fromkeys(body, 2))
        with pytest.raises(CassetteMiss, match="The nearest recorded request is POST /api/chat"):
            exchange("sync", Cassette(path), f"{ELSEWHERE}/api/chat", body=body)

    def test_interaction_plays_once(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        recorded(path, fake, STREAM)
        cassette = Cassette(path)
        exchange("sync", cassette, f"{ELSEWHERE}/api/chat")
        with pytest.raises(CassetteMiss, match="recorded once and has been played as often"):
            exchange("sync", cassette, f"{ELSEWHERE}/api/chat")
        assert len(cassette.misses) == 1


def recorded_and_broken(cassette: Cassette, fake: FakeOllama) -> None:
    exchange("sync", cassette, f"{fake.url}/api/version", "GET")
    fake.script("/api/chat", Answer([b"x"], ending="close"))
    exchange("sync", cassette, f"{fake.url}/api/chat")


class TestSaving:
    def test_compressed_response_is_refused(self, tmp_path: Path, fake: FakeOllama) -> None:
        with pytest.raises(CassetteError, match="compressed"):
            recorded(tmp_path / "a.yaml", fake, Answer([b"..."], headers={"content-encoding": "gzip"}))

    def test_compression_is_not_requested(self, fake: FakeOllama, both: Any) -> None:
        both.connect("ollama", host=fake.url).chat("Hi", model="smollm2:135m")
        assert fake.requests[0].headers["accept-encoding"] == "identity"

    def test_failed_block_writes_nothing(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        with pytest.raises(StreamInterrupted), Cassette(path, mode="all") as cassette:
            recorded_and_broken(cassette, fake)
        assert not path.exists()
        assert len(cassette) == 2

    def test_failed_replacement_leaves_no_file(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        path.mkdir()
        with pytest.raises(CassetteError, match="cannot be written"), Cassette(path, mode="all") as cassette:
            exchange("sync", cassette, f"{fake.url}/api/version", "GET")
        assert list(tmp_path.iterdir()) == [path]

    def test_empty_cassette_records(self, tmp_path: Path, fake: FakeOllama, both: Any) -> None:
        path = tmp_path / "a.yaml"
        with Cassette(path, mode="all") as cassette:
            assert (bool(cassette), len(cassette)) == (True, 0)
            both.connect("ollama", host=fake.url, transport=cassette).chat("Hi", model="smollm2:135m")
        assert Cassette(path).unplayed == ("POST /api/chat",)

    def test_empty_recording_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(CassetteError, match="Nothing was recorded"), Cassette(tmp_path / "a.yaml", mode="all"):
            pass
        assert list(tmp_path.iterdir()) == []


GOOD = "{status: {code: 200}, body: {string: ''}}"


def one_interaction(request: str, response: str) -> str:
    return f"version: 1\ninteractions: [{{request: {request}, response: {response}}}]"


class TestInvalidFiles:
    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("a: [", "not valid YAML"),
            ("[" * 100_000, "nested|maximum"),  # Newer YAML readers have their own limit.
            ("[" * 1000 + "]" * 1000, "nested more than 32 deep"),
            ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
            ("\x00", "not valid YAML"),
            ("- 1", "not a mapping"),
            ("version: 2\ninteractions: []", "version"),
            ("version: 1", "interactions"),
            ("version: 1\ninteractions: [1]", "in interaction 0, the entry is not a mapping"),
            (one_interaction("{}", "null"), "`response` is not a mapping"),
            (one_interaction("{method: GET, uri: 1}", "{}"), "`method` or `uri`"),
            (one_interaction("{method: GET, uri: /}", "{status: 1}"), "status.code"),
            (one_interaction("{method: GET, uri: 'http://[a'}", GOOD), "Invalid IPv6 URL"),
            (one_interaction("{method: GET, uri: /, body: 1}", GOOD), "neither text nor bytes"),
            (one_interaction("{method: GET, uri: /}", GOOD.replace("string", "text")), "has no `string`"),
            (one_interaction("{method: GET, uri: /}", GOOD[:-1] + ", fault: 1}"), "`fault.kind`"),
            (one_interaction("{method: GET, uri: /, headers: []}", GOOD), "`headers` is not a mapping"),
            (one_interaction("{method: GET, uri: /, headers: {a: [1]}}", GOOD), "header 'a'"),
            (one_interaction("{method: GET, uri: /}", "{status: {code: 200}}"), "`response.body`"),
        ],
    )
    def test_malformed_one_names_the_reason(self, tmp_path: Path, text: str, complaint: str) -> None:
        path = tmp_path / "a.yaml"
        path.write_text(text)
        with pytest.raises(CassetteError, match=complaint):
            Cassette(path)

    def test_missing_one_hints_at_recording(self, tmp_path: Path) -> None:
        with pytest.raises(CassetteError) as caught:
            Cassette(tmp_path / "a.yaml")
        assert 'Cassette(path, mode="once")' in str(caught.value.hint)
        assert "pytest --record-mode=once" in str(caught.value.hint)

    @pytest.mark.parametrize("mode", ["rec", "RECORD", "", None])
    def test_unknown_mode(self, tmp_path: Path, mode: Any) -> None:
        with pytest.raises(ValueError, match="`none`, `once`, `new_episodes`, `all`"):
            Cassette(tmp_path / "a.yaml", mode=mode)

    @pytest.mark.parametrize("kind", ["pipe", "folder", "name"])
    def test_pipe_folder_or_impossible_name(self, tmp_path: Path, fake: FakeOllama, kind: str) -> None:
        path = tmp_path / ("a\0b.yaml" if kind == "name" else "a.yaml")
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        with pytest.raises(CassetteError, match="cannot be read"):
            Cassette(path)

    @pytest.mark.parametrize("name", ["a\0b.yaml", "file/a.yaml"])
    def test_unwritable_one_can_be_saved_elsewhere(self, tmp_path: Path, fake: FakeOllama, name: str) -> None:
        (tmp_path / "file").touch()
        tape = Cassette(tmp_path / name, mode="all")
        exchange("sync", tape, f"{fake.url}/api/version", "GET")
        with pytest.raises(CassetteError, match="cannot be written"):
            tape.save()
        tape.path = tmp_path / "b.yaml"
        tape.save()
        assert len(Cassette(tape.path)) == 1

    def test_too_large_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("graftage.testing.files.MAX_BYTES", 100)
        (tmp_path / "a.yaml").write_text("#" * 101)
        with pytest.raises(CassetteError, match="larger than 100 bytes"):
            Cassette(tmp_path / "a.yaml")

    @pytest.mark.parametrize(
        ("lengths", "pieces"),
        [
            ("[2, 4]", [b"ab", b"cdef"]),
            ("[2, 2]", [b"abcdef"]),
            ("[4, 4]", [b"abcdef"]),
            ("[6, 0]", [b"abcdef"]),
            ("[-1, 7]", [b"abcdef"]),
            ("[a, b]", [b"abcdef"]),
            ("6", [b"abcdef"]),
        ],
    )
    def test_edited_body_plays_in_one_piece(self, tmp_path: Path, lengths: str, pieces: list[bytes]) -> None:
        answer = f"{{status: {{code: 200}}, body: {{string: abcdef}}, chunk_lengths: {lengths}}}"
        (tmp_path / "a.yaml").write_text(one_interaction("{method: POST, uri: http://localhost/api/chat}", answer))
        _, found = exchange("sync", Cassette(tmp_path / "a.yaml"), f"{ELSEWHERE}/api/chat")
        assert found == pieces


def test_threads_share_a_cassette(tmp_path: Path, fake: FakeOllama) -> None:
    path = tmp_path / "a.yaml"

    def on_threads(work: Callable[[int], object]) -> None:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with Cassette(path, mode="all") as cassette:
        on_threads(lambda n: exchange("sync", cassette, f"{fake.url}/api/show", body={"n": n % 4}))
    replay = Cassette(path)
    on_threads(lambda n: exchange("sync", replay, f"{ELSEWHERE}/api/show", body={"n": n % 4}))
    assert (len(replay), replay.unplayed, replay.misses) == (16, (), [])


def test_server_in_old_metadata_is_read(tmp_path: Path, fake: FakeOllama) -> None:
    path = tmp_path / "a.yaml"
    recorded(path, fake, Answer([b"hello"]))
    text = path.read_text(encoding="utf-8").replace(", server: Ollama 0.9.3}", "}")
    path.write_text(f"metadata:\n  server: Ollama 0.9.3\n{text}", encoding="utf-8")
    assert Cassette(path).server == "Ollama 0.9.3"


class TestVcrpy:
    def test_plays_our_files(self, tmp_path: Path, fake: FakeOllama) -> None:
        import vcr  # type: ignore[import-untyped] # it has no types

        path = tmp_path / "a.yaml"
        _, pieces = recorded(path, fake, STREAM, body={"model": "m"})
        player = vcr.VCR(record_mode=vcr.mode.NONE, match_on=["method", "path", "body"])
        with player.use_cassette(str(path)) as cassette, httpx.Client() as client:
            response = client.post(f"{ELSEWHERE}/api/chat", json={"model": "m"})
        assert response.content == b"".join(pieces)
        assert cassette.all_played

    @pytest.mark.parametrize("by", ["vcrpy", "pytest-recording"])
    def test_keeps_our_keys(self, outer: pytest.Pytester, fake: FakeOllama, by: str) -> None:
        import vcr

        path = outer.path / "cassettes" / "test_it" / "test_more.yaml"
        live = recorded(path, fake, STREAM)
        if by == "vcrpy":
            with vcr.use_cassette(str(path), record_mode=vcr.mode.NEW_EPISODES), httpx.Client() as client:
                client.get(f"{fake.url}/api/version")
        else:
            outer.makepyfile(
                test_it=f"""
            import httpx, pytest

            @pytest.mark.vcr
            def test_more():
                assert httpx.get("{fake.url}/api/version").is_success
            """
            )
            result = outer.runpytest_subprocess("-p", "pytest_recording.plugin", "--record-mode=new_episodes")
            result.assert_outcomes(passed=1)
        cassette = Cassette(path)
        assert (len(cassette), cassette.server) == (2, "Ollama 0.9.3")
        assert exchange("async", cassette, f"{ELSEWHERE}/api/chat") == live
        assert exchange("sync", cassette, f"{ELSEWHERE}/api/version", "GET") == (200, [b'{"version":"0.9.3"}'])

    def test_reads_every_cassette_of_the_repository(self, outer: pytest.Pytester) -> None:
        import vcr

        paths = sorted((ROOT / "cassettes").rglob("*.yaml"))
        lengths = {str(path): len(Cassette(path)) for path in paths}
        assert {path: len(vcr.cassette.Cassette.load(path=path)) for path in lengths} == lengths
        # pytest-recording joins several cassettes into one.
        outer.makepyfile(
            test_it=f"""
        import pytest

        @pytest.mark.vcr(*{list(lengths)})
        def test_all(vcr):
            assert len(vcr) == {sum(lengths.values())}
        """
        )
        outer.runpytest_subprocess("-p", "pytest_recording.plugin").assert_outcomes(passed=1)

    @modes
    def test_files_play_here(self, tmp_path: Path, fake: FakeOllama, mode: str) -> None:
        import vcr

        path = tmp_path / "a.yaml"
        with vcr.use_cassette(str(path)), httpx.Client() as client:
            client.post(f"{fake.url}/api/show", json={"model": "nosuch"})
        answer = exchange(mode, Cassette(path), f"{ELSEWHERE}/api/show", body={"model": "nosuch"})
        assert answer == (404, [b'{"error":"model \'nosuch\' not found"}'])
