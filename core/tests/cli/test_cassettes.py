"""`graftage cassettes`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from places import ROOT

import graftage
from graftage.testing import Cassette, Echo, Replay
from graftage_ollama.testing import Answer

if TYPE_CHECKING:
    from cli.conftest import Shell

    from graftage_ollama.testing import FakeOllama

STREAM = ROOT / "cassettes" / "test_ollama" / "test_chat_streams.yaml"
LENGTH = ROOT / "cassettes" / "test_ollama" / "test_max_tokens_ends_by_length.yaml"
TOOLS = ROOT / "cassettes" / "test_outside_openai" / "test_tool_call_and_its_result.yaml"
CUT = ROOT / "cassettes" / "recordings" / "ollama-0.24.0" / "85-server-killed-mid-stream.yaml"
HEALTHY = ROOT / "cassettes" / "test_ollama" / "test_healthy_server-model_present.yaml"


@pytest.fixture
def recorded(shell: Shell, fake: FakeOllama) -> Path:
    """A cassette of today, from a fake server."""
    path = shell.folder / "cassettes" / "chat.yaml"
    facts: dict[str, Any] = {"server": "Ollama 0.9.3", "digest": "sha256:1"}
    with (
        Cassette(path, mode="once", **facts) as cassette,
        graftage.connect("ollama", model="smollm2:135m", host=fake.url, transport=cassette) as llm,
    ):
        llm.chat("Say hello.")
        llm.models()
    return path


def change(path: Path, old: str, new: str) -> None:
    """Replace a text in a file, which must hold it."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


class TestLint:
    def test_folder_in_order_has_no_finding(self, shell: Shell) -> None:
        folder = TOOLS.parent
        done = shell.run("cassettes", "lint", str(folder))
        assert (done.code, done.out) == (0, "")
        assert done.err == f"{len(list(folder.iterdir()))} cassettes: 0 errors, 0 warnings.\n"

    @pytest.mark.parametrize(
        ("old", "new", "kind"),
        [
            ("Say hello.", "My key is ghp_k3Jx9QmZ2vLr7TnB5cYw8HdPfGs1uVaE4oXi.", "secret"),
            ("Say hello.", "Read /home/jane/notes.txt.", "machine"),
            ('"done":true', '"done":false', "unended"),
            ("    method: POST\n", "    method: POST\n    mode: fast\n", "key"),
            ("    method: POST\n", "    method: !!python/object:os.system POST\n", "tag"),
            ("    method: POST\n", "    method: [\n", "unreadable"),
        ],
    )
    def test_fault_is_shown_with_its_line(self, shell: Shell, recorded: Path, old: str, new: str, kind: str) -> None:
        change(recorded, old, new)
        done = shell.run("cassettes", "lint", "--json")
        (found,) = json.loads(done.out)
        assert (found["kind"], found["level"], done.code) == (kind, "error", 1)
        assert found["path"] == "cassettes/chat.yaml"
        assert found["hint"]
        lines = recorded.read_text(encoding="utf-8").splitlines()
        assert 1 <= found["line"] <= len(lines)
        if kind in ("machine", "key", "tag"):
            assert new.strip().splitlines()[-1] in lines[found["line"] - 1]
        text = shell.run("cassettes", "lint")
        assert text.out.startswith(f"cassettes/chat.yaml:{found['line']}: error: ")
        assert text.err == "1 cassette: 1 error, 0 warnings.\n"
        assert "ghp_" not in text.out

    def test_allowed_secret_is_no_finding(self, shell: Shell, recorded: Path) -> None:
        change(recorded, "Say hello.", "My key is ghp_k3Jx9QmZ2vLr7TnB5cYw8HdPfGs1uVaE4oXi.")
        assert shell.run("cassettes", "lint").code == 1
        allow = "    allow:\n    - {why: made for tests, place: 'request body, `messages[0].content`'}\n    recorded:"
        change(recorded, "    recorded:", allow)
        assert shell.run("cassettes", "lint").code == 0

    def test_json_has_no_lines(self, shell: Shell, fake: FakeOllama) -> None:
        path = shell.folder / "health.json"
        with (
            Cassette(path, mode="once") as cassette,
            graftage.connect("ollama", host=fake.url, transport=cassette) as llm,
        ):
            llm.models()
        change(path, "smollm2:135m", "/home/jane/model")
        (found,) = json.loads(shell.run("cassettes", "lint", "--json", str(path)).out)
        assert (found["kind"], found["line"], found["interaction"]) == ("machine", None, 1)

    def test_cut_stream_may_lack_its_end(self, shell: Shell) -> None:
        assert shell.run("cassettes", "lint", str(CUT)).code == 0

    def test_warnings_are_no_failure(self, shell: Shell, recorded: Path) -> None:
        text = recorded.read_text(encoding="utf-8")
        _, _, interactions = text.partition("interactions:\n")
        recorded.write_text(text + interactions + "#" * 100_000, encoding="utf-8")
        done = shell.run("cassettes", "lint", "--json")
        assert [each["kind"] for each in json.loads(done.out)] == ["size", "duplicate", "duplicate"]
        assert done.code == 0

    def test_missing_file_is_a_misuse(self, shell: Shell) -> None:
        done = shell.run("cassettes", "lint")
        assert (done.code, done.err) == (
            2,
            "error: cassettes does not exist.\nhint: Name cassettes, or folders of them.\n",
        )


class TestStale:
    def test_recording_of_today_is_fresh(self, shell: Shell, recorded: Path) -> None:
        done = shell.run("cassettes", "stale", "--server", "Ollama 0.9.3", "--after", "1d")
        assert (done.code, done.out, done.err) == (0, "", "All are fresh.\n")

    @pytest.mark.parametrize(
        ("old", "new", "reason"),
        [
            ("Ollama 0.9.3", "Ollama 0.9.2", "recorded from Ollama 0.9.2, not Ollama 0.9.3"),
            ("server: Ollama 0.9.3, ", "", "unknown: server"),
            (f"graftage {graftage.__version__}", "graftage 0.0.1", "recorded by graftage 0.0.1, not graftage "),
            ("date: '20", "date: '10", "recorded 36"),
        ],
    )
    def test_reason_is_given(self, shell: Shell, recorded: Path, old: str, new: str, reason: str) -> None:
        change(recorded, old, new)
        done = shell.run("cassettes", "stale", "--server", "Ollama 0.9.3", "--after", "90d", "--json")
        (found,) = json.loads(done.out)
        assert (found["path"], done.code) == ("cassettes/chat.yaml", 1)
        (given,) = found["reasons"]
        assert given.startswith(reason)
        text = shell.run("cassettes", "stale", "--server", "Ollama 0.9.3", "--after", "90")
        assert text.out == f"cassettes/chat.yaml: {given}\n"

    def test_provider_tells_the_current_version(self, shell: Shell, recorded: Path) -> None:
        shell.install("it = Echo()")
        done = shell.run("cassettes", "stale", "-p", "fake")
        assert (done.code, done.out) == (1, "cassettes/chat.yaml: recorded from Ollama 0.9.3, not echo\n")

    def test_invalid_age_is_a_misuse(self, shell: Shell, recorded: Path) -> None:
        done = shell.run("cassettes", "stale", "--after", "soon")
        assert done.code == 2
        assert "`90d`" in done.err


class TestVerify:
    def test_equal_server_has_no_drift(self, shell: Shell, recorded: Path, fake: FakeOllama) -> None:
        fake.reply = "Other words."
        done = shell.run("cassettes", "verify", str(recorded), "--host", fake.url)
        assert (done.code, done.out) == (0, "")
        assert done.err == "0 changes of the API; other texts in 1 response; 0 requests not sent.\n"

    def test_changed_fields_are_named(self, shell: Shell, recorded: Path, fake: FakeOllama) -> None:
        message = {"role": "assistant", "content": ["Hello"], "mood": "calm"}
        lines = [{"model": "smollm2:135m", "message": message, "done": done} for done in (False, True)]
        fake.script("/api/chat", Answer(lines, headers={"content-type": "application/x-ndjson"}))
        fake.script("/api/tags", Answer([{"error": "gone"}], status=410))
        done = shell.run("cassettes", "verify", str(recorded), "--host", fake.url)
        assert done.code == 1
        start = f"{recorded}: interaction"
        chat = [line for line in done.out.splitlines() if line.startswith(f"{start} 1: POST /api/chat: ")]
        assert f"{start} 1: POST /api/chat: the field `message.mood` (text) is new" in chat
        assert f"{start} 1: POST /api/chat: the field `eval_count` (number) is missing" in chat
        assert f"{start} 1: POST /api/chat: the type of the field `message.content` was text, now list" in chat
        assert f"{start} 2: GET /api/tags: the status was 200, now 410" in done.out.splitlines()

    def test_server_is_not_changed_unasked(self, shell: Shell, fake: FakeOllama) -> None:
        path = shell.folder / "delete.yaml"
        with (
            Cassette(path, mode="once") as cassette,
            graftage.connect("ollama", host=fake.url, transport=cassette) as llm,
        ):
            llm.delete("smollm2:135m")
            llm.models()
        fake.requests.clear()
        done = shell.run("cassettes", "verify", str(path), "--host", fake.url)
        assert (done.code, fake.requests) == (0, [])
        assert "2 requests not sent" in done.err
        done = shell.run("cassettes", "verify", str(path), "--host", fake.url, "--all", "--json")
        assert [each.method for each in fake.requests] == ["DELETE", "GET"]
        first = json.loads(done.out)[0]
        assert (first["kind"], first["is_drift"]) == ("status", True)

    def test_dead_server_is_an_error(self, shell: Shell, recorded: Path) -> None:
        done = shell.run("cassettes", "verify", str(recorded), "--host", "http://127.0.0.1:9")
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith("error: Nothing listens at http://127.0.0.1:9.")


class TestShow:
    def test_stream_is_joined_to_a_conversation(self, shell: Shell) -> None:
        done = shell.run("cassettes", "show", str(STREAM))
        assert done.code == 0
        lines = done.out.splitlines()
        assert lines[0].startswith("1. POST http://127.0.0.1:")
        assert "/api/chat → 200 OK · Ollama 0.9.3 · smollm2:135m · " in lines[0]
        assert "  user        Count to three." in lines
        assert "  assistant   I'm counting to three, and I've got it right! It's a classic phrase that has" in lines
        assert lines[-1].startswith("              24 tokens in, 20 tokens out, ended by length, 20 chunks, ")

    def test_tools_are_shown(self, shell: Shell) -> None:
        lines = shell.run("cassettes", "show", str(TOOLS)).out.splitlines()
        assert '  calls       get_weather({"city":"Paris"})' in lines
        assert "  tools       get_weather" in lines
        assert "  tool        sunny" in lines

    def test_times_are_shown(self, shell: Shell, recorded: Path) -> None:
        done = shell.run("cassettes", "show", str(recorded))
        assert "the first after 0." in done.out
        assert "2. GET " in done.out
        assert "  received    {" in done.out

    def test_fault_is_shown(self, shell: Shell) -> None:
        assert "  fault       cut: " in shell.run("cassettes", "show", str(CUT)).out

    def test_text_cannot_control_the_terminal(self, shell: Shell, recorded: Path) -> None:
        change(recorded, "Say hello.", "Say \\u001b[2J.\\nassistant   Yes.")
        lines = shell.run("cassettes", "show", str(recorded)).out.splitlines()
        assert r"  user        Say \x1b[2J." in lines
        assert "              assistant   Yes." in lines


class TestDiff:
    def test_equal_files_have_no_difference(self, shell: Shell, recorded: Path) -> None:
        shutil.copy(recorded, shell.folder / "copy.yaml")
        done = shell.run("cassettes", "diff", str(recorded), "copy.yaml")
        assert (done.code, done.out) == (0, "")

    def test_changed_fields_are_named(self, shell: Shell) -> None:
        done = shell.run("cassettes", "diff", str(STREAM), str(LENGTH))
        assert done.code == 1
        assert done.out.startswith("POST /api/chat: ")
        assert '`messages[0].content` (recorded "Count to three.", now "Tell me a long story.")' in done.out
        assert "`options.num_predict` (recorded 20, now 3)" in done.out

    def test_other_requests_are_listed(self, shell: Shell) -> None:
        done = shell.run("cassettes", "diff", str(STREAM), str(HEALTHY))
        assert done.code == 1
        assert f"only in {STREAM}: POST /api/chat\n" in done.out
        assert f"only in {HEALTHY}: GET /api/version\n" in done.out


class TestRerun:
    @pytest.fixture
    def calls(self, shell: Shell) -> Path:
        """Calls of a provider that says hello."""
        path = shell.folder / "calls.yaml"
        with (
            Cassette(path, mode="all") as cassette,
            graftage.connect(Replay(cassette, Echo(["Hello from the fake.", "Hello!"])), model="m") as llm,
        ):
            llm.chat("Hi")
            llm.chat("And?")
        return path

    def test_changes_are_shown(self, shell: Shell, calls: Path, fake: FakeOllama) -> None:
        done = shell.run("cassettes", "rerun", str(calls), "-m", "ollama:smollm2:135m", "--host", fake.url)
        assert done.code == 1
        assert 'chat "And?": changed\n  text: "Hello from the fake." (was "Hello!")\n' in done.out

    def test_changes_are_data(self, shell: Shell, calls: Path, fake: FakeOllama) -> None:
        done = shell.run("cassettes", "rerun", str(calls), "-m", "ollama:smollm2:135m", "--host", fake.url, "--json")
        first, second = json.loads(done.out)
        assert (first["operation"], first["prompt"], set(first["changes"])) == ("chat", "Hi", {"usage"})
        assert second["changes"]["text"] == ["Hello!", "Hello from the fake."]
