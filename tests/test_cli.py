"""The `graftage` command, run as its users run it: as a program of its own, in pipes and in a real terminal."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftage._cli import show

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMMAND = (sys.executable, "-W", "error", "-m", "graftage._cli")
HEAD = """
import threading
from graftage.exceptions import *
from graftage.hookspecs import hookimpl
from graftage.testing.echo import Echo, Pause
from graftage.types import *

def history(request):
    return " | ".join(f"{each.role}: {each.content}" for each in request.messages)
"""
needs_terminal = pytest.mark.skipif(sys.platform == "win32", reason="pexpect needs a pseudo-terminal")


@dataclass
class Shell:
    """Runs the command where nothing but the given provider, `fake`, is meant to be used."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    children: list[Any] = field(default_factory=list)

    def install(self, source: str, *, name: str = "fake", group: str = "graftage.providers", point: str = "it") -> None:
        """Put a distribution with one entry point onto the path."""
        module = f"graftage_{name}"
        (self.folder / f"{module}.py").write_text(HEAD + textwrap.dedent(source), encoding="utf-8")
        info = self.folder / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: graftage-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:{point}\n")

    def run(self, *arguments: str, text: str | bytes | None = None, **environment: str) -> Result:
        """Run the command with `text` piped in, or with no input at all."""
        done = subprocess.run(
            [*COMMAND, *arguments],
            input=text.encode() if isinstance(text, str) else text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            check=False,
            cwd=self.folder,
            env={**self.environment, **environment},
            timeout=60,
        )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    def terminal(self, *arguments: str, columns: int = 80) -> Any:
        """Start the command in a terminal."""
        import pexpect

        child = pexpect.spawn(
            COMMAND[0],
            [*COMMAND[1:], *arguments],
            cwd=str(self.folder),
            env=self.environment,
            dimensions=(30, columns),
            encoding="utf-8",
            timeout=30,
        )
        self.children.append(child)
        return child


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    ours = (
        "GRAFTAGE_",
        "OLLAMA_",
        "HTTP_",
        "HTTPS_",
        "ALL_",
        "NO_",
        "PYTHON",
        "COLUMNS",
        "LINES",
        "FORCE_",
        "CLICOLOR",
    )
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith(ours)}
    environment |= {
        "GRAFTAGE_CONFIG": str(tmp_path / "config.toml"),
        "GRAFTAGE_PROVIDER": "fake",
        "GRAFTAGE_MODEL": "small:1b",
        "PYTHONPATH": str(tmp_path),
        "PYTHONUTF8": "1",
        "TERM": "xterm",
    }
    made = Shell(tmp_path, environment)
    yield made
    for child in made.children:
        child.close(force=True)


def ends(child: Any) -> int:
    """The exit code of a program in a terminal, once it is over."""
    import pexpect

    child.expect(pexpect.EOF)
    child.close()
    return int(child.exitstatus)


# --- Starting --------------------------------------------------------------------------------------------------------


def imported_by(shell: Shell, *arguments: str) -> set[str]:
    """The top-level modules that a command imports."""
    code = f"""
import sys
from graftage._cli import app
try:
    app({list(arguments)!r}, prog_name="graftage")
except SystemExit as end:
    assert end.code == 0
print("imported", *{{name.partition(".")[0] for name in sys.modules}})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=shell.environment, capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.rpartition("imported ")[2].split())


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"], ["models", "pull", "--help"], ["--version"]])
def test_help_imports_neither_a_provider_nor_a_heavy_library(shell: Shell, arguments: list[str]) -> None:
    shell.install("raise RuntimeError('was imported')")
    heavy = {"graftage_fake", "graftage_ollama", "httpx", "loguru", "ollama", "pluggy", "tenacity"}
    assert heavy & imported_by(shell, *arguments) == set()


def test_help_as_a_whole_does_without_pydantic(shell: Shell) -> None:
    # For the help of one command, newer releases of Typer import it by themselves.
    found = imported_by(shell, "--help")
    assert "typer" in found
    assert "pydantic" not in found


def test_version_is_that_of_the_core(shell: Shell) -> None:
    import graftage

    assert shell.run("--version") == Result(0, f"graftage {graftage.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [["chta"], ["chat", "--temprature", "1"], ["chat", "a", "b"], ["models", "show", "--x"]]
)
def test_wrong_usage_has_exit_code_2_and_no_traceback(shell: Shell, arguments: list[str]) -> None:
    done = shell.run(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "Error: " in done.err
    assert "Traceback" not in done.err


# --- One answer ------------------------------------------------------------------------------------------------------


def test_answer_is_printed_with_a_line_break_at_its_end(shell: Shell) -> None:
    shell.install("it = Echo(['Hello there.'])")
    assert shell.run("chat", "Hi") == Result(0, "Hello there.\n", "")


@needs_terminal
def test_answer_is_printed_while_it_comes(shell: Shell) -> None:
    shell.install("it = Echo([[Chunk(text='first '), Pause(), Chunk(finish_reason='stop')]])")
    child = shell.terminal("chat", "Hi")
    child.expect("first ")  # The rest never comes.
    child.sendintr()
    assert ends(child) == 130


def test_no_stream_prints_the_same(shell: Shell) -> None:
    shell.install("it = Echo(['Hello there.'])")
    assert shell.run("chat", "--no-stream", "Hi") == Result(0, "Hello there.\n", "")


@pytest.mark.parametrize(
    ("model", "asked"),
    [("llama3.2:1b", "llama3.2:1b"), ("fake:llama3.2:1b", "llama3.2:1b"), ("fake", "fake"), ("fake:", "small:1b")],
)
def test_a_model_names_its_provider_only_where_one_is_installed(shell: Shell, model: str, asked: str) -> None:
    shell.install("it = Echo([lambda request: request.model])")
    assert shell.run("chat", "-m", model, "Hi").out == f"{asked}\n"


def test_model_and_provider_come_from_the_settings_file(shell: Shell) -> None:
    shell.install("it = Echo([lambda request: request.model])")
    (shell.folder / "config.toml").write_text('provider = "fake"\nmodel = "named:here"\n')
    assert shell.run("chat", "Hi", GRAFTAGE_PROVIDER="", GRAFTAGE_MODEL="").out == "named:here\n"


def test_options_reach_the_request(shell: Shell) -> None:
    shell.install(
        """
        def told(request):
            return repr((
                [each.role for each in request.messages], dict(request.options), request.max_tokens,
                request.context_window, request.keep_alive, request.think, request.messages[-1].images[0].data,
                request.call.timeouts.total,
            ))
        it = Echo([told])
        """
    )
    (shell.folder / "a.png").write_bytes(b"png")
    done = shell.run(
        *("chat", "Hi", "--system", "Be kind", "--temperature", "0.5", "--seed", "7", "--max-tokens", "99"),
        *("--context-window", "2048", "--keep-alive", "5m", "--think", "--image", "a.png", "--timeout", "30"),
    )
    options = {"temperature": 0.5, "seed": 7}
    assert done.out == f"{(['system', 'user'], options, 99, 2048, 300.0, True, b'png', 30.0)!r}\n"


def test_options_that_were_not_used_are_not_sent(shell: Shell) -> None:
    shell.install("it = Echo([lambda r: repr((dict(r.options), r.max_tokens, r.keep_alive, r.think, r.format))])")
    assert shell.run("chat", "Hi").out == "({}, None, None, None, None)\n"


def test_no_think_is_sent(shell: Shell) -> None:
    shell.install("it = Echo([lambda request: repr(request.think)])")
    assert shell.run("chat", "Hi", "--no-think").out == "False\n"


def test_an_adapter_that_nobody_knows_is_an_error(shell: Shell) -> None:
    shell.install("it = Echo()")
    done = shell.run("chat", "Hi", "--adapter", "mine")
    assert (done.code, done.out) == (1, "")
    assert "mine" in done.err


def test_format_takes_json_and_a_schema_file(shell: Shell) -> None:
    shell.install("it = Echo([lambda request: '{\"format\": ' + json.dumps(request.format) + '}']); import json")
    (shell.folder / "schema.json").write_text('{"type": "object"}')
    assert json.loads(shell.run("chat", "Hi", "--format", "json").out) == {"format": "json"}
    assert json.loads(shell.run("chat", "Hi", "--format", "schema.json").out) == {"format": {"type": "object"}}


@pytest.mark.parametrize("content", [None, "no json", "[]", "{}"])
def test_a_format_that_is_no_schema_is_wrong_usage(shell: Shell, content: str | None) -> None:
    shell.install("it = Echo()")
    if content is not None:
        (shell.folder / "schema.json").write_text(content)
    done = shell.run("chat", "Hi", "--format", "schema.json")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: `--format schema.json` ")


def test_json_is_one_object_with_everything_about_the_answer(shell: Shell) -> None:
    shell.install(
        """
        it = Echo([[
            Chunk(text="Hel"), Chunk(thinking="hm"),
            Chunk(text="lo", finish_reason="length", usage=Usage(input_tokens=2), warnings=("odd",), model="m:1"),
        ]])
        """
    )
    done = shell.run("chat", "Hi", "--json")
    data = json.loads(done.out)
    timings = data.pop("timings")
    assert data == {
        "text": "Hello",
        "thinking": "hm",
        "model": "m:1",
        "provider": "fake",
        "adapter": None,
        "finish_reason": "length",
        "usage": {"input_tokens": 2, "output_tokens": None},
        "warnings": ["odd"],
    }
    assert set(timings) == {"total", "load", "prompt", "generation", "first_chunk", "wall"}
    assert (done.code, done.err) == (0, "")


def test_json_with_a_format_has_the_parsed_answer(shell: Shell) -> None:
    shell.install("it = Echo(['{\"a\": 1}'])")
    assert json.loads(shell.run("chat", "Hi", "--json", "--format", "json").out)["parsed"] == {"a": 1}


def test_thinking_and_warnings_go_to_stderr(shell: Shell) -> None:
    shell.install(
        """
        it = Echo([[
            Chunk(thinking="let me "), Chunk(thinking="see"), Chunk(text="42"),
            Chunk(finish_reason="length", warnings=("The window was clamped.",)),
        ]])
        """
    )
    done = shell.run("chat", "Hi")
    assert done.out == "42\n"
    assert done.err == (
        "let me see\n"
        "warning: The window was clamped.\n"
        "warning: The answer was cut: raise `--max-tokens`, or `--context-window`.\n"
    )


# --- Pipes -----------------------------------------------------------------------------------------------------------


def test_pipe_and_prompt_are_sent_together(shell: Shell) -> None:
    shell.install("it = Echo()")
    assert shell.run("chat", "Summarise this.", text="Long story.\n").out == "Long story.\n\nSummarise this.\n"


def test_pipe_alone_is_the_prompt(shell: Shell) -> None:
    shell.install("it = Echo([history])")
    assert shell.run("chat", text="What is this?").out == "user: What is this?\n"


def test_an_empty_pipe_changes_nothing(shell: Shell) -> None:
    shell.install("it = Echo([history])")
    assert shell.run("chat", "Hi", text="").out == "user: Hi\n"


@pytest.mark.parametrize(
    ("arguments", "text", "problem"),
    [
        (["chat"], "", "There is no prompt."),
        (["chat", " "], "", "There is no prompt."),
        (["generate"], "", "There is no prompt."),
        (["chat"], b"\xff\xfe\x00", "What is piped in is no text in UTF-8"),
    ],
)
def test_a_prompt_that_is_no_text_is_wrong_usage(
    shell: Shell, arguments: list[str], text: str | bytes, problem: str
) -> None:
    shell.install("it = Echo()")
    done = shell.run(*arguments, text=text)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {problem}")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_a_reader_that_goes_away_is_no_noise(shell: Shell) -> None:
    shell.install("it = Echo(['word ' * 200_000])")
    done = subprocess.run(
        ["/bin/sh", "-c", '"$@" | head -c 4', "sh", *COMMAND, "chat", "Hi"],
        env=shell.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("word", "")


def test_characters_that_the_output_cannot_encode_are_replaced(shell: Shell) -> None:
    shell.install("it = Echo(['caf\\u00e9 \\u2603'])")
    assert shell.run("chat", "Hi", PYTHONUTF8="0", PYTHONIOENCODING="ascii") == Result(0, "caf? ?\n", "")


# --- Nobody but us steers the terminal -------------------------------------------------------------------------------

EVIL = "\x1b]52;c;aGk=\x07 \x9b2J \u202e \u2066 \u200f \u061c \x7f \ud800"
SHOWN = r"\x1b]52;c;aGk=\x07 \x9b2J \u202e \u2066 \u200f \u061c \x7f \ud800"


def test_control_characters_of_the_answer_are_shown_and_not_obeyed(shell: Shell) -> None:
    shell.install(f"it = Echo([[Chunk(thinking={EVIL!r}), Chunk(text={EVIL!r}), Chunk(finish_reason='stop')]])")
    assert shell.run("chat", "Hi") == Result(0, f"{SHOWN}\n", f"{SHOWN}\n")


@needs_terminal
def test_control_characters_are_shown_on_a_terminal(shell: Shell) -> None:
    shell.install(f"it = Echo([{EVIL!r}])")
    child = shell.terminal("chat", "Hi", columns=60)
    child.expect_exact(SHOWN)
    assert ends(child) == 0


def test_escape_sequences_split_over_chunks_are_shown_too(shell: Shell) -> None:
    shell.install("it = Echo([[Chunk(text='a\\x1b'), Chunk(text='[2Jb'), Chunk(finish_reason='stop')]])")
    assert shell.run("chat", "Hi").out == "a\\x1b[2Jb\n"


def test_a_line_break_split_over_chunks_is_one_line_break(shell: Shell) -> None:
    shell.install(
        "it = Echo([[Chunk(text='a\\r'), Chunk(text='\\nb\\r'), Chunk(text='c\\r'), Chunk(finish_reason='stop')]])"
    )
    assert shell.run("chat", "Hi").out == "a\nb\\x0dc\\x0d\n"


def test_raw_prints_what_the_model_wrote(shell: Shell) -> None:
    shell.install("it = Echo(['a\\x1b[1mb\\r\\nc'])")
    assert shell.run("chat", "Hi", "--raw").out == "a\x1b[1mb\r\nc\n"


def test_json_keeps_the_text_without_a_control_character_in_the_output(shell: Shell) -> None:
    shell.install(f"it = Echo([{EVIL!r}])")
    done = shell.run("chat", "Hi", "--json")
    assert json.loads(done.out)["text"] == EVIL
    assert SHOWN.count("\\u") <= done.out.count("\\u")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", done.out)


def test_rich_markup_of_a_model_is_just_text(shell: Shell) -> None:
    shell.install(
        """
        it = Echo(
            [[Chunk(thinking="[red]t[/red]"), Chunk(text="[bold]a[/nope] :smile:"), Chunk(finish_reason="stop")]],
            models=("[bold]m[/nope]:1",),
        )
        """
    )
    assert shell.run("chat", "Hi") == Result(0, "[bold]a[/nope] :smile:\n", "[red]t[/red]\n")
    assert "[bold]m[/nope]:1" in shell.run("models", "list").out


def test_names_and_errors_are_escaped_and_cannot_pose_as_other_lines(shell: Shell) -> None:
    shell.install(
        "it = Echo([InferenceFailed('bad \\x1b[2J\\nhint: do evil', hint='a\\x07')], models=('e\\x1b[1m\\n:1',))"
    )
    done = shell.run("chat", "Hi")
    assert done == Result(1, "", "error: bad \\x1b[2J\n  hint: do evil\nhint: a\\x07\n")
    assert r"e\x1b[1m\n:1" in shell.run("models", "list").out


@given(st.lists(st.text(alphabet=st.sampled_from("ab\r\n\t\x1b\x9b\u202e\ud800é")), max_size=6))
def test_pieces_are_escaped_as_the_whole_would_be(pieces: list[str]) -> None:
    escaper = show.Escaper()
    printed = "".join(map(escaper.feed, pieces)) + escaper.end()
    assert show.escaped("".join(pieces)) == printed
    assert set(printed) <= set("ab\n\té\\x1b9bu202ed800d")


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_an_error_is_one_message_and_the_way_out(shell: Shell) -> None:
    shell.install("it = Echo([ConnectionFailed('Nothing listens there.', hint='Start it.')])")
    assert shell.run("chat", "Hi") == Result(1, "", "error: Nothing listens there.\nhint: Start it.\n")


def test_text_that_came_before_an_error_stays(shell: Shell) -> None:
    shell.install("it = Echo([[Chunk(text='Once upon'), StreamInterrupted('It broke.')]])")
    assert shell.run("chat", "Hi") == Result(1, "Once upon\n", "error: It broke.\n")


def test_text_that_came_with_an_error_is_printed(shell: Shell) -> None:
    shell.install("it = Echo([[Chunk(text='{\"a\": '), Chunk(text='oops', finish_reason='stop')]])")
    done = shell.run("chat", "Hi", "--format", "json")
    assert (done.code, done.out) == (1, '{"a": oops\n')
    assert done.err.startswith("error: The answer does not fit the `format`.")


def test_a_missing_model_can_be_pulled_or_was_misspelt(shell: Shell) -> None:
    shell.install("it = Echo(models=['smollm2:135m'], strict=True)")
    done = shell.run("chat", "-m", "smolm2:135m", "Hi")
    assert done.code == 1
    assert "Did you mean `smollm2:135m`?" in done.err
    assert "`graftage models pull smolm2:135m`" in done.err


def test_no_model_is_wrong_usage(shell: Shell) -> None:
    shell.install("it = Echo()")
    done = shell.run("chat", "Hi", GRAFTAGE_MODEL="")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: No model is chosen.\nhint: Name one with `-m`")


def test_a_provider_that_is_not_installed_is_named_with_those_that_are(shell: Shell) -> None:
    shell.install("it = Echo()")
    done = shell.run("chat", "Hi", GRAFTAGE_PROVIDER="fakee")
    assert done == Result(1, "", "error: There is no provider `fakee`.\nhint: Did you mean `fake`?\n")


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"GRAFTAGE_HOTS": "x"}, "There is no setting `hots` (environment GRAFTAGE_HOTS)"),
        ({"GRAFTAGE_ATTEMPTS": "0"}, "The setting `attempts` (environment GRAFTAGE_ATTEMPTS) is wrong"),
    ],
)
def test_a_wrong_setting_has_exit_code_2_and_its_source(
    shell: Shell, environment: dict[str, str], problem: str
) -> None:
    shell.install("it = Echo()")
    done = shell.run("chat", "Hi", **environment)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {problem}")


def test_a_settings_file_that_is_no_toml_has_exit_code_2(shell: Shell) -> None:
    shell.install("it = Echo()")
    (shell.folder / "config.toml").write_text("model = ")
    done = shell.run("chat", "Hi")
    assert done.code == 2
    assert str(shell.folder / "config.toml") in done.err


@pytest.mark.parametrize(("arguments", "environment"), [(["--debug"], {}), ([], {"GRAFTAGE_DEBUG": "1"})])
def test_debug_shows_the_traceback(shell: Shell, arguments: list[str], environment: dict[str, str]) -> None:
    shell.install("it = Echo([InferenceFailed('It \\x1b broke.')])")
    done = shell.run(*arguments, "chat", "Hi", **environment)
    assert done.code == 1
    assert "Traceback (most recent call last)" in done.err
    assert done.err.endswith("error: It \\x1b broke.\n")
    assert "\x1b" not in done.err


def test_a_fault_that_nobody_foresaw_is_one_message_too(shell: Shell) -> None:
    (shell.folder / "sitecustomize.py").write_text("import graftage\ngraftage.connect = lambda *a, **k: 1 / 0\n")
    done = shell.run("chat", "Hi")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ZeroDivisionError: division by zero\nhint: ")
    assert "Traceback" not in done.err


@needs_terminal
def test_ctrl_c_ends_a_single_answer_with_exit_code_130(shell: Shell) -> None:
    shell.install("it = Echo([[Chunk(text='first words'), Pause(), Chunk(finish_reason='stop')]])")
    child = shell.terminal("chat", "Hi")
    child.expect("first words")
    child.sendintr()
    assert ends(child) == 130
    assert "Traceback" not in child.before
    assert "error" not in child.before


@needs_terminal
def test_ctrl_c_before_the_first_word_has_exit_code_130(shell: Shell) -> None:
    shell.install("it = Echo([[Pause(), Chunk(finish_reason='stop')]])")
    child = shell.terminal("chat", "Hi")
    child.expect("waiting for the first word")
    child.sendintr()
    assert ends(child) == 130
    assert "Traceback" not in child.before


# --- A conversation --------------------------------------------------------------------------------------------------


@needs_terminal
def test_a_conversation_sends_what_was_said_before(shell: Shell) -> None:
    shell.install("it = Echo(['Hello.', history])")
    child = shell.terminal("chat", "--system", "Be kind", columns=200)
    child.expect("small:1b on fake")
    child.expect(">>> ")
    child.sendline("Hi")
    child.expect(r"Hello\.")
    child.expect(">>> ")
    child.sendline("And now?")
    child.expect_exact("system: Be kind | user: Hi | assistant: Hello. | user: And now?")
    child.expect(">>> ")
    child.sendeof()
    assert ends(child) == 0


@needs_terminal
def test_ctrl_c_stops_the_answer_and_not_the_conversation(shell: Shell) -> None:
    shell.install(
        """
        def running(request):
            return f"{it.running} running; {history(request)}"
        it = Echo([[Chunk(text="Once upon"), Pause(), Chunk(text=" a time", finish_reason="stop")], running])
        """
    )
    child = shell.terminal("chat", columns=200)
    child.expect(">>> ")
    child.sendline("A story!")
    child.expect("Once upon")
    child.sendintr()
    child.expect(r"\(stopped\)")
    child.expect(">>> ")
    child.sendline("Go on.")
    child.expect_exact("0 running; user: A story! | assistant: Once upon | user: Go on.")
    child.expect(">>> ")
    child.sendline("/exit")
    assert ends(child) == 0


@needs_terminal
def test_ctrl_c_before_the_first_word_forgets_the_question(shell: Shell) -> None:
    shell.install("it = Echo([[Pause(), Chunk(finish_reason='stop')], history])")
    child = shell.terminal("chat", columns=200)
    child.expect(">>> ")
    child.sendline("Slow one?")
    child.expect("waiting for the first word")
    child.sendintr()
    child.expect("stopped before it began")
    child.expect(">>> ")
    child.sendline("Quick one?")
    child.expect_exact("\x1b[2Kuser: Quick one?")
    child.expect(">>> ")
    child.sendeof()
    assert ends(child) == 0


@needs_terminal
def test_ctrl_c_at_the_prompt_says_how_to_end(shell: Shell) -> None:
    shell.install("it = Echo()")
    child = shell.terminal("chat")
    child.expect(">>> ")
    child.send("half a question")
    child.expect("half a question")
    child.sendintr()
    child.expect("Ctrl-D or /exit ends the conversation")
    child.expect(">>> ")
    child.sendeof()
    assert ends(child) == 0


@needs_terminal
def test_commands_of_a_conversation(shell: Shell) -> None:
    shell.install("it = Echo(['Hello.', history])")
    child = shell.terminal("chat", "--system", "Be kind", columns=200)
    child.expect(">>> ")
    child.sendline("/help")
    child.expect("/clear .*/exit ")
    child.expect(">>> ")
    child.sendline("Hi")
    child.expect(r"Hello\.")
    child.expect(">>> ")
    child.sendline("/clear")
    child.expect("Forgotten")
    child.expect(">>> ")
    child.sendline("/nonsense")
    child.expect("There is no `/nonsense`")
    child.expect(">>> ")
    child.sendline("/usr/bin is what?")
    child.expect_exact("\x1b[2Ksystem: Be kind | user: /usr/bin is what?")
    child.expect(">>> ")
    child.sendline("/exit")
    assert ends(child) == 0


@needs_terminal
def test_an_error_does_not_end_a_conversation(shell: Shell) -> None:
    shell.install("it = Echo([Overloaded('Too many.', hint='Wait.'), history])")
    child = shell.terminal("chat", columns=200)
    child.expect(">>> ")
    child.sendline("Hi")
    child.expect("error: Too many.\r\nhint: Wait.")
    child.expect(">>> ")
    child.sendline("Again")
    child.expect_exact("\x1b[2Kuser: Again")
    child.expect(">>> ")
    child.sendeof()
    assert ends(child) == 0


@needs_terminal
def test_pictures_go_with_the_first_question_of_a_conversation(shell: Shell) -> None:
    shell.install("it = Echo([count := lambda request: str([len(each.images) for each in request.messages]), count])")
    (shell.folder / "a.png").write_bytes(b"png")
    child = shell.terminal("chat", "--image", "a.png")
    child.expect(">>> ")
    child.sendline("What is it?")
    child.expect_exact("[1]")
    child.expect(">>> ")
    child.sendline("Sure?")
    child.expect_exact("[1, 0, 0]")
    child.expect(">>> ")
    child.sendeof()
    assert ends(child) == 0


@needs_terminal
def test_a_conversation_has_no_json_form(shell: Shell) -> None:
    shell.install("it = Echo()")
    child = shell.terminal("chat", "--json")
    child.expect("error: `--json` needs a prompt")
    assert ends(child) == 2


# --- generate and embed ----------------------------------------------------------------------------------------------


def test_generate_sends_the_prompt_alone(shell: Shell) -> None:
    shell.install("it = Echo([lambda r: repr((r.prompt, r.suffix, r.system, r.raw, r.max_tokens))])")
    done = shell.run("generate", "def f(", "--suffix", "return 1", "--system", "s", "--raw-prompt", "--max-tokens", "9")
    assert done.out == "('def f(', 'return 1', 's', True, 9)\n"


def test_generate_without_options_leaves_all_to_the_provider(shell: Shell) -> None:
    shell.install("it = Echo([lambda r: repr((r.prompt, r.suffix, r.system, r.raw, r.images))])")
    assert shell.run("generate", text="Once").out == "('Once', None, None, False, ())\n"


def test_embed_prints_a_table_or_every_number(shell: Shell) -> None:
    shell.install("it = Echo()")
    lines = shell.run("embed", "one", "a longer text than a table has room for").out.splitlines()
    assert [line.split()[0] for line in lines] == ["text", "one", "a"]
    data = json.loads(shell.run("embed", "one", "two", "--json", "--dimensions", "4").out)
    assert [len(vector) for vector in data["vectors"]] == [4, 4]
    assert data["usage"]["input_tokens"] == 2


def test_embed_takes_one_text_from_a_pipe(shell: Shell) -> None:
    shell.install("it = Echo()")
    assert len(json.loads(shell.run("embed", "--json", text="one text\nof two lines").out)["vectors"]) == 1


# --- models ----------------------------------------------------------------------------------------------------------

MODELS = """
from datetime import datetime, timezone
it = Echo(models=[
    "plain:1b",
    ModelInfo(
        name="rich:7b", digest="sha256:ab", size=4_200_000_000, parameters="7B", quantization="Q4_0",
        modified_at=datetime(2026, 1, 2, 12, 0, tzinfo=timezone.utc), features=frozenset({"chat", "tools"}),
        licence="MIT\\nlong", tensors={"a": (1, 2)}, raw={"secret": 1}, metadata={"general.name": "x"},
    ),
])
"""


def test_models_list_is_a_table_or_json(shell: Shell) -> None:
    shell.install(MODELS)
    lines = shell.run("models", "list").out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", "plain:1b", "rich:7b"]
    assert "4.2 GB" in lines[2]
    data = json.loads(shell.run("models", "list", "--json").out)
    assert [each["name"] for each in data] == ["plain:1b", "rich:7b"]
    assert data[1]["modified_at"] == "2026-01-02T12:00:00+00:00"
    assert data[1]["features"] == ["chat", "tools"]
    assert "raw" not in data[1]


@needs_terminal
def test_tables_fit_a_narrow_terminal_and_cut_nothing(shell: Shell) -> None:
    shell.install(MODELS)
    child = shell.terminal("models", "list", columns=60)
    child.expect("rich:7b ")
    text = child.before + child.after
    assert ends(child) == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text + child.before)
    assert max(map(len, plain.splitlines())) <= 60
    assert "…" not in plain


@needs_terminal
def test_no_color_is_heeded(shell: Shell) -> None:
    shell.install("it = Echo()")
    shell.environment["NO_COLOR"] = "1"
    child = shell.terminal("doctor")
    child.expect("provider")
    assert ends(child) == 0
    assert "\x1b[3" not in child.before


def test_models_show_describes_one_model(shell: Shell) -> None:
    shell.install(MODELS)
    facts = dict(line.split(maxsplit=1) for line in shell.run("models", "show", "rich:7b").out.splitlines())
    assert {name: value.strip() for name, value in facts.items() if name in ("features", "licence", "tensors")} == {
        "features": "chat, tools",
        "licence": "MIT",
        "tensors": "1",
    }
    assert json.loads(shell.run("models", "show", "fake:rich:7b", "--json").out)["metadata"] == {"general.name": "x"}


def test_models_are_loaded_and_unloaded(shell: Shell) -> None:
    shell.install("it = Echo(); it.loaded['m:1'] = LoadedModel(name='m:1', size=100, accelerator_size=50)")
    assert shell.run("models", "load", "m:1").out == "m:1 is loaded.\n"
    assert shell.run("models", "unload", "m:1").out == "m:1 is not in memory.\n"
    line = shell.run("models", "loaded").out.splitlines()[1]
    assert line.split() == ["m:1", "100", "bytes", "50", "%"]
    assert json.loads(shell.run("models", "loaded", "--json").out)[0]["size"] == 100


def test_a_provider_is_chosen_by_option(shell: Shell) -> None:
    shell.install("it = Echo(models=['here:1'])")
    assert "here:1" in shell.run("models", "list", "-p", "fake", GRAFTAGE_PROVIDER="").out


def test_pull_tells_its_steps_in_a_pipe(shell: Shell) -> None:
    shell.install("it = Echo()")
    done = shell.run("models", "pull", "new:1b")
    assert done == Result(0, "new:1b is here.\n", "pulling manifest\npulling new:1b\nsuccess\n")


PULL = """
class Connection:
    address = "fake"

    @hookimpl
    def chat(self, request):
        return iter(())

    @hookimpl
    def health(self, request):
        return Health(level=request.level, reachable=True)

    @hookimpl
    def pull_model(self, request):
        yield PullProgress(status="pulling manifest\\x1b[2J")
        for digest in ("sha256:aaaabbbbccccdddd", "sha256:eeeeffff00001111"):
            for completed in (None, 50_000_000, 100_000_000):
                yield PullProgress(status="pulling", digest=digest, total=100_000_000, completed=completed)
        if "slow" in request.model:
            threading.Event().wait()
        yield PullProgress(status="success")

class Provider:
    @hookimpl
    def connect(self, request):
        return Connection()

it = Provider()
"""


@needs_terminal
def test_pull_draws_a_bar_for_each_layer(shell: Shell) -> None:
    shell.install(PULL)
    child = shell.terminal("models", "pull", "quick:1b", columns=60)
    child.expect_exact(r"pulling manifest\x1b[2J")
    child.expect("aaaabbbbcccc .*100.0/100.0 MB")
    child.expect("eeeeffff0000 .*100.0/100.0 MB")
    child.expect("quick:1b is here.")
    assert ends(child) == 0


@needs_terminal
def test_ctrl_c_ends_a_pull_with_exit_code_130(shell: Shell) -> None:
    shell.install(PULL)
    child = shell.terminal("models", "pull", "slow:1b")
    child.expect("eeeeffff0000")
    child.sendintr()
    child.expect("Stopped. The same command goes on where it ended.")
    assert ends(child) == 130
    assert "Traceback" not in child.before


# --- plugins ---------------------------------------------------------------------------------------------------------


def plugin_table(shell: Shell, **environment: str) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in json.loads(shell.run("plugins", "--json", **environment).out)}


def test_plugins_are_listed_with_where_they_come_from(shell: Shell) -> None:
    shell.install("it = Echo()")
    assert plugin_table(shell)["fake"] == {
        "name": "fake",
        "kind": "provider",
        "distribution": "graftage-fake",
        "version": "1.0",
        "hooks": ["connect"],
        "state": "loaded",
        "why": None,
    }
    assert re.search(
        r"^fake +provider +graftage-fake +1\.0 +loaded +connect *$", shell.run("plugins").out, re.MULTILINE
    )


def test_a_broken_plugin_is_explained_and_hides_no_other(shell: Shell) -> None:
    shell.install("it = Echo()")
    shell.install("raise RuntimeError('out of \\x1b order')", name="bad", group="graftage.plugins")
    done = shell.run("plugins")
    assert done.code == 0
    assert re.search(r"^bad +plugin .* quarantined", done.out, re.MULTILINE)
    assert r"RuntimeError: out of \x1b order" in done.out
    assert {"bad": "quarantined", "fake": "loaded"}.items() <= {
        name: each["state"] for name, each in plugin_table(shell).items()
    }.items()


def test_a_broken_plugin_is_a_warning_and_the_answer_comes(shell: Shell) -> None:
    shell.install("it = Echo(['Hello.'])")
    shell.install("raise RuntimeError('out of order')", name="bad", group="graftage.plugins")
    done = subprocess.run(
        [sys.executable, "-m", "graftage._cli", "chat", "Hi"],
        env=shell.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "Hello.\n")
    assert re.fullmatch(r"warning: .*`bad`.*out of order.*\n", done.stderr)


def test_a_disabled_plugin_is_listed_and_not_imported(shell: Shell) -> None:
    shell.install("raise RuntimeError('was imported')")
    found = plugin_table(shell, GRAFTAGE_DISABLED_PLUGINS="fake")["fake"]
    assert (found["state"], found["why"]) == ("disabled", "GRAFTAGE_DISABLED_PLUGINS names it.")


# --- doctor ----------------------------------------------------------------------------------------------------------


def examined(shell: Shell, *arguments: str, code: int = 0, **environment: str) -> dict[str, Any]:
    """The report, with the checks by name."""
    done = shell.run("doctor", "--json", *arguments, **environment)
    assert done.code == code, done
    report: dict[str, Any] = json.loads(done.out)
    report["checks"] = {each["name"]: each for each in report["checks"]}
    assert report["ok"] is (code == 0)
    return report


def states(report: dict[str, Any]) -> dict[str, str]:
    return {name: each["state"] for name, each in report["checks"].items()}


@pytest.fixture
def port() -> Iterator[int]:
    """A port of this machine that listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    """A port of this machine that does not."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        return int(server.getsockname()[1])


def test_doctor_goes_all_the_way_to_the_model(shell: Shell, port: int) -> None:
    shell.install(f"it = Echo(models=['small:1b'], strict=True, address='http://127.0.0.1:{port}')")
    report = examined(shell)
    assert states(report) == dict.fromkeys(
        ("settings file", "provider", "settings", "address", "proxy", "name", "port", "server", "model"), "ok"
    )
    assert "version echo" in report["checks"]["server"]["text"]
    assert "fake" in [each["name"] for each in report["plugins"]]


def test_doctor_needs_no_network_for_a_provider_that_has_none(shell: Shell) -> None:
    shell.install("it = Echo()")
    found = states(examined(shell))
    assert {name for name, state in found.items() if state == "skip"} == {"proxy", "name", "port"}


def test_doctor_prints_what_json_holds(shell: Shell) -> None:
    shell.install("it = Echo()")
    done = shell.run("doctor")
    assert done.code == 0
    assert re.search(
        r"^ok +provider +`fake` from graftage-fake 1\.0 \(environment GRAFTAGE_PROVIDER\)", done.out, re.MULTILINE
    )
    assert re.search(r"^attempts +3 +default", done.out, re.MULTILINE)
    assert re.search(r"^fake +provider ", done.out, re.MULTILINE)


def test_doctor_stops_at_the_port_where_nothing_listens(shell: Shell, closed_port: int) -> None:
    shell.install(f"it = Echo(address='http://127.0.0.1:{closed_port}')")
    report = examined(shell, code=1)
    assert [name for name, state in states(report).items() if state != "ok"] == ["port", "server", "model"]
    assert "Is the server running" in report["checks"]["port"]["hint"]
    assert report["checks"]["server"]["text"] == "not looked at"


def test_doctor_shows_the_proxy_that_is_on_the_way(shell: Shell, closed_port: int) -> None:
    shell.install("it = Echo(address='http://192.0.2.1:11434')")  # An address for documentation: it is never called.
    report = examined(shell, code=1, HTTP_PROXY=f"http://user:hidden@127.0.0.1:{closed_port}")
    proxy = report["checks"]["proxy"]
    assert proxy["state"] == "note"
    assert proxy["text"] == f"http://127.0.0.1:{closed_port} is on the way (HTTP_PROXY)"
    assert proxy["hint"] == "Set NO_PROXY=192.0.2.1 to go straight."
    assert report["checks"]["port"]["hint"].startswith("That is the proxy.")


def test_doctor_says_that_a_proxy_is_not_for_this_machine(shell: Shell, port: int) -> None:
    shell.install(f"it = Echo(address='http://127.0.0.1:{port}')")
    proxy = examined(shell, HTTP_PROXY="http://proxy.invalid:3128")["checks"]["proxy"]
    assert (proxy["state"], proxy["text"]) == ("ok", "none applies, though HTTP_PROXY is set")


def test_doctor_knows_an_address_to_listen_on(shell: Shell) -> None:
    shell.install("it = Echo()")
    address = examined(shell, "--host", "0.0.0.0:11434")["checks"]["address"]
    assert address["state"] == "note"
    assert "(command line)" in address["text"]
    assert address["hint"].startswith("`0.0.0.0:11434` is an address to listen on.")


def test_doctor_masks_secrets_and_tells_where_each_setting_is_from(shell: Shell) -> None:
    shell.install("it = Echo()")
    (shell.folder / "config.toml").write_text('attempts = 2\nhost = "http://me:hidden@x"\n[headers]\nauth = "hidden"\n')
    done = shell.run("doctor", "--json", GRAFTAGE_API_KEY="hidden-key")
    assert "hidden" not in done.out + done.err
    settings = {each["name"]: each for each in json.loads(done.out)["settings"]}
    assert settings["api_key"]["origin"] == "environment GRAFTAGE_API_KEY"
    assert settings["attempts"] == {"name": "attempts", "value": "2", "origin": str(shell.folder / "config.toml")}
    assert settings["headers"]["value"] == "auth: **********"
    assert settings["host"]["value"] == "http://x"
    assert settings["keep_alive"]["origin"] == "default"


def test_doctor_says_how_to_get_a_missing_model(shell: Shell) -> None:
    shell.install("it = Echo(models=['other:1b'], strict=True)")
    model = examined(shell, "-m", "nope:1b", code=1)["checks"]["model"]
    assert model["state"] == "fail"
    assert "`graftage models pull nope:1b`" in model["hint"]


def test_doctor_is_content_without_a_model(shell: Shell) -> None:
    shell.install("it = Echo()")
    assert examined(shell, GRAFTAGE_MODEL="")["checks"]["model"]["state"] == "note"


def test_doctor_tells_why_a_server_is_not_well(shell: Shell) -> None:
    shell.install(
        "it = Echo(errors={'health': ProtocolError('That is \\x1b another service.', hint='Check the port.')})"
    )
    done = shell.run("doctor")
    assert done.code == 1
    assert re.search(r"^fail server +That is \\x1b another service\. *\n +Check the port\.", done.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("environment", "file", "check"),
    [({"GRAFTAGE_HOTS": "x"}, "", "settings"), ({}, "model = ", "settings file"), ({}, "hots = 1", "settings")],
)
def test_doctor_has_exit_code_2_for_wrong_settings(
    shell: Shell, environment: dict[str, str], file: str, check: str
) -> None:
    shell.install("it = Echo()")
    (shell.folder / "config.toml").write_text(file)
    assert states(examined(shell, code=2, **environment))[check] == "fail"


@pytest.mark.parametrize(
    ("source", "problem"),
    [("raise RuntimeError('out of order')", "out of order"), ("it = object()", "implements no hook")],
)
def test_doctor_survives_a_broken_provider(shell: Shell, source: str, problem: str) -> None:
    shell.install(source)
    report = examined(shell, code=1)
    assert problem in report["checks"]["provider"]["text"]
    assert {each["name"]: each["state"] for each in report["plugins"]}["fake"] == "quarantined"
