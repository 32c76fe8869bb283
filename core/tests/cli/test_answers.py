"""`graftage chat`, `generate` and `embed`: one reply, from the command line or a pipe."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cli.conftest import Shell


def imported_by(shell: Shell, *arguments: str) -> set[str]:
    """Return the top-level modules that a command imports."""
    code = f"""
import sys
from graftage._cli.app import app
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


class TestStart:
    @pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"], ["models", "pull", "--help"], ["--version"]])
    def test_help_imports_nothing_heavy(self, shell: Shell, arguments: list[str]) -> None:
        shell.install("raise RuntimeError('was imported')")
        heavy = {"graftage_fake", "graftage_ollama", "httpx", "loguru", "numpy", "ollama", "pluggy", "tenacity"}
        assert heavy & imported_by(shell, *arguments) == set()

    def test_help_does_without_pydantic(self, shell: Shell) -> None:
        # For the help of one command, newer releases of Typer import it by themselves.
        found = imported_by(shell, "--help")
        assert "typer" in found
        assert "pydantic" not in found

    def test_version_is_the_cores(self, shell: Shell) -> None:
        import graftage

        assert shell.run("--version") == (0, f"graftage {graftage.__version__}\n", "")

    @pytest.mark.parametrize(
        "arguments", [["chta"], ["chat", "--temprature", "1"], ["chat", "a", "b"], ["models", "show", "--x"]]
    )
    def test_wrong_usage_has_exit_code_2(self, shell: Shell, arguments: list[str]) -> None:
        done = shell.run(*arguments)
        assert (done.code, done.out) == (2, "")
        assert "Error: " in done.err
        assert "Traceback" not in done.err


POLICY = """
class Tight:
    name = "tight"

    @hookimpl
    def resource_limits(self, query):
        return Limits(**FIGURES, reasons={name: "a small machine" for name in FIGURES})

it = Tight()
"""


class TestReply:
    def test_ends_with_a_line_break(self, shell: Shell) -> None:
        shell.install("it = Echo(['Hello there.'])")
        assert shell.run("chat", "Hi") == (0, "Hello there.\n", "")

    def test_is_printed_as_it_arrives(self, shell: Shell) -> None:
        shell.install("it = Echo([[Chunk(text='first '), Pause(), Chunk(finish_reason='stop')]])")
        child = shell.terminal("chat", "Hi")
        child.expect("first ")  # The rest never comes.
        child.sendintr()
        assert shell.ends(child) == 130

    def test_no_stream_prints_the_same(self, shell: Shell) -> None:
        shell.install("it = Echo(['Hello there.'])")
        assert shell.run("chat", "--no-stream", "Hi") == (0, "Hello there.\n", "")

    @pytest.mark.parametrize(
        ("model", "asked"),
        [("llama3.2:1b", "llama3.2:1b"), ("fake:llama3.2:1b", "llama3.2:1b"), ("fake", "fake"), ("fake:", "small:1b")],
    )
    def test_model_names_its_provider_if_installed(self, shell: Shell, model: str, asked: str) -> None:
        shell.install("it = Echo([lambda request: request.model])")
        assert shell.run("chat", "-m", model, "Hi").out == f"{asked}\n"

    @pytest.mark.parametrize("command", ["chat", "generate"])
    def test_provider_option_keeps_the_model_name(self, shell: Shell, command: str) -> None:
        shell.install("it = Echo([lambda request: request.model])")
        done = shell.run(command, "-p", "fake", "-m", "ollama:1b", "Hi", GRAFTAGE_PROVIDER="")
        assert done == (0, "ollama:1b\n", "")

    def test_provider_option_of_embed(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        done = shell.run("embed", "-p", "fake", "Hi", "--json", GRAFTAGE_PROVIDER="")
        assert json.loads(done.out)["provider"] == "fake"

    def test_help_of_generate_explains_raw_prompt(self, shell: Shell) -> None:
        text = " ".join(shell.run("generate", "--help").out.split())
        assert "Answer one text; `--raw-prompt` continues it." in text
        assert "With `--raw-prompt` the model gets the text as it is" in text

    def test_settings_file_names_model_and_provider(self, shell: Shell) -> None:
        shell.install("it = Echo([lambda request: request.model])")
        (shell.folder / "config.toml").write_text('provider = "fake"\nmodel = "named:here"\n')
        assert shell.run("chat", "Hi", GRAFTAGE_PROVIDER="", GRAFTAGE_MODEL="").out == "named:here\n"

    def test_options_reach_the_request(self, shell: Shell) -> None:
        shell.install(
            """
        def show(request):
            return repr((
                [each.role for each in request.messages], dict(request.options), request.max_tokens,
                request.context_window, request.keep_alive, request.think, request.messages[-1].images[0].data,
                request.call.timeouts.total,
            ))
        it = Echo([show])
        """
        )
        (shell.folder / "a.png").write_bytes(b"png")
        done = shell.run(
            *("chat", "Hi", "--system", "Be kind", "--temperature", "0.5", "--seed", "7", "--max-tokens", "99"),
            *("--context-window", "2048", "--keep-alive", "5m", "--think", "--image", "a.png", "--timeout", "30"),
        )
        options = {"temperature": 0.5, "seed": 7}
        assert done.out == f"{(['system', 'user'], options, 99, 2048, 300.0, True, b'png', 30.0)!r}\n"

    def test_unused_options_are_not_sent(self, shell: Shell) -> None:
        shell.install("it = Echo([lambda r: repr((dict(r.options), r.max_tokens, r.keep_alive, r.think, r.format))])")
        assert shell.run("chat", "Hi").out == "({}, None, None, None, None)\n"

    def test_no_think_is_sent(self, shell: Shell) -> None:
        shell.install("it = Echo([lambda request: repr(request.think)])")
        assert shell.run("chat", "Hi", "--no-think").out == "False\n"

    def test_unknown_adapter_is_an_error(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        done = shell.run("chat", "Hi", "--adapter", "mine")
        assert (done.code, done.out) == (1, "")
        assert "mine" in done.err

    def test_format_takes_json_or_a_file(self, shell: Shell) -> None:
        shell.install("it = Echo([lambda request: '{\"format\": ' + json.dumps(request.format) + '}']); import json")
        (shell.folder / "schema.json").write_text('{"type": "object"}')
        assert json.loads(shell.run("chat", "Hi", "--format", "json").out) == {"format": "json"}
        assert json.loads(shell.run("chat", "Hi", "--format", "schema.json").out) == {"format": {"type": "object"}}

    @pytest.mark.parametrize("content", [None, "no json", "[]", "{}"])
    def test_invalid_schema_is_wrong_usage(self, shell: Shell, content: str | None) -> None:
        shell.install("it = Echo()")
        if content is not None:
            (shell.folder / "schema.json").write_text(content)
        done = shell.run("chat", "Hi", "--format", "schema.json")
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("error: `--format schema.json` ")

    def test_json_has_every_fact(self, shell: Shell) -> None:
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
            "adapter_digest": None,
            "finish_reason": "length",
            "usage": {"input_tokens": 2, "output_tokens": None, "cached_tokens": None, "reasoning_tokens": None},
            "warnings": ["odd"],
        }
        assert set(timings) == {"total", "load", "prompt", "generation", "first_chunk", "wall"}
        assert (done.code, done.err) == (0, "")

    def test_json_has_the_parsed_reply(self, shell: Shell) -> None:
        shell.install("it = Echo(['{\"a\": 1}'])")
        assert json.loads(shell.run("chat", "Hi", "--json", "--format", "json").out)["parsed"] == {"a": 1}

    def test_thinking_and_warnings_go_to_stderr(self, shell: Shell) -> None:
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
            "warning: The reply was cut: raise `--max-tokens` or `--context-window`.\n"
        )

    @pytest.mark.parametrize(
        ("figures", "arguments", "warning"),
        [
            (
                {"max_tokens": 3},
                (),
                "at `--max-tokens` 3 by tight: a small machine. `--max-tokens N --force` exceeds it.",
            ),
            ({"max_tokens": 3}, ("--max-tokens", "9"), "at `--max-tokens` 3 by tight: a small machine."),
            ({"max_tokens": 3}, ("--max-tokens", "2"), ": raise `--max-tokens` or `--context-window`."),
            ({"max_tokens": 3}, ("--max-tokens", "4", "--force"), ": raise `--max-tokens` or `--context-window`."),
            ({"context_window": 7}, ("--max-tokens", "2"), "at `--context-window` 7 by tight: a small machine."),
        ],
    )
    def test_cut_reply_names_the_policy(
        self, shell: Shell, figures: dict[str, int], arguments: tuple[str, ...], warning: str
    ) -> None:
        shell.install(f"FIGURES = {figures}\n{POLICY}", name="tight", group="graftage.plugins")
        shell.install("it = Echo()")
        done = shell.run("chat", "one two three four five", *arguments)
        warnings = [each for each in done.err.splitlines() if "The reply was cut" in each]
        assert len(warnings) == 1
        assert warning in warnings[0]


class TestPipes:
    def test_pipe_and_prompt_are_sent_together(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        assert shell.run("chat", "Summarise this.", text="Long story.\n").out == "Long story.\n\nSummarise this.\n"

    def test_pipe_alone_is_the_prompt(self, shell: Shell) -> None:
        shell.install("it = Echo([history])")
        assert shell.run("chat", text="What is this?").out == "user: What is this?\n"

    def test_empty_pipe_changes_nothing(self, shell: Shell) -> None:
        shell.install("it = Echo([history])")
        assert shell.run("chat", "Hi", text="").out == "user: Hi\n"

    @pytest.mark.parametrize(
        ("arguments", "text", "problem"),
        [
            (["chat"], "", "There is no prompt."),
            (["chat", " "], "", "There is no prompt."),
            (["generate"], "", "There is no prompt."),
            (["chat"], b"\xff\xfe\x00", "The piped input is not valid UTF-8"),
        ],
    )
    def test_missing_prompt_is_wrong_usage(
        self, shell: Shell, arguments: list[str], text: str | bytes, problem: str
    ) -> None:
        shell.install("it = Echo()")
        done = shell.run(*arguments, text=text)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(f"error: {problem}")

    @pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
    def test_reader_that_stops_causes_no_error(self, shell: Shell) -> None:
        shell.install("it = Echo(['word ' * 200_000])")
        done = subprocess.run(
            ["/bin/sh", "-c", '"$@" | head -c 4', "sh", *shell.command, "chat", "Hi"],
            env=shell.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (done.stdout, done.stderr) == ("word", "")

    def test_unencodable_characters_are_replaced(self, shell: Shell) -> None:
        shell.install("it = Echo(['caf\\u00e9 \\u2603'])")
        assert shell.run("chat", "Hi", PYTHONUTF8="0", PYTHONIOENCODING="ascii") == (0, "caf? ?\n", "")


class TestGenerate:
    def test_sends_the_prompt_alone(self, shell: Shell) -> None:
        shell.install("it = Echo([lambda r: repr((r.prompt, r.suffix, r.system, r.raw, r.max_tokens))])")
        done = shell.run(
            "generate", "def f(", "--suffix", "return 1", "--system", "s", "--raw-prompt", "--max-tokens", "9"
        )
        assert done.out == "('def f(', 'return 1', 's', True, 9)\n"

    def test_default_options_are_not_sent(self, shell: Shell) -> None:
        shell.install("it = Echo([lambda r: repr((r.prompt, r.suffix, r.system, r.raw, r.images))])")
        assert shell.run("generate", text="Once").out == "('Once', None, None, False, ())\n"


class TestEmbed:
    def test_prints_a_table_or_json(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        lines = shell.run("embed", "one", "a longer text than a table has room for").out.splitlines()
        assert [line.split()[0] for line in lines] == ["text", "one", "a"]
        data = json.loads(shell.run("embed", "one", "two", "--json", "--dimensions", "4").out)
        assert [len(vector) for vector in data["vectors"]] == [4, 4]
        assert data["usage"]["input_tokens"] == 2

    def test_takes_one_text_from_a_pipe(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        assert len(json.loads(shell.run("embed", "--json", text="one text\nof two lines").out)["vectors"]) == 1
