"""`graftage chat`, `generate` and `embed`: one answer, from the command line or a pipe."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cli.conftest import Shell


# --- Starting --------------------------------------------------------------------------------------------------------


def imported_by(shell: Shell, *arguments: str) -> set[str]:
    """The top-level modules that a command imports."""
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


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"], ["models", "pull", "--help"], ["--version"]])
def test_help_imports_neither_a_provider_nor_a_heavy_library(shell: Shell, arguments: list[str]) -> None:
    shell.install("raise RuntimeError('was imported')")
    heavy = {"graftage_fake", "graftage_ollama", "httpx", "loguru", "numpy", "ollama", "pluggy", "tenacity"}
    assert heavy & imported_by(shell, *arguments) == set()


def test_help_as_a_whole_does_without_pydantic(shell: Shell) -> None:
    # For the help of one command, newer releases of Typer import it by themselves.
    found = imported_by(shell, "--help")
    assert "typer" in found
    assert "pydantic" not in found


def test_version_is_that_of_the_core(shell: Shell) -> None:
    import graftage

    assert shell.run("--version") == (0, f"graftage {graftage.__version__}\n", "")


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
    assert shell.run("chat", "Hi") == (0, "Hello there.\n", "")


def test_answer_is_printed_while_it_comes(shell: Shell) -> None:
    shell.install("it = Echo([[Chunk(text='first '), Pause(), Chunk(finish_reason='stop')]])")
    child = shell.terminal("chat", "Hi")
    child.expect("first ")  # The rest never comes.
    child.sendintr()
    assert shell.ends(child) == 130


def test_no_stream_prints_the_same(shell: Shell) -> None:
    shell.install("it = Echo(['Hello there.'])")
    assert shell.run("chat", "--no-stream", "Hi") == (0, "Hello there.\n", "")


@pytest.mark.parametrize(
    ("model", "asked"),
    [("llama3.2:1b", "llama3.2:1b"), ("fake:llama3.2:1b", "llama3.2:1b"), ("fake", "fake"), ("fake:", "small:1b")],
)
def test_a_model_names_its_provider_only_where_one_is_installed(shell: Shell, model: str, asked: str) -> None:
    shell.install("it = Echo([lambda request: request.model])")
    assert shell.run("chat", "-m", model, "Hi").out == f"{asked}\n"


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_provider_by_option_leaves_the_model_as_it_is_written(shell: Shell, command: str) -> None:
    shell.install("it = Echo([lambda request: request.model])")
    done = shell.run(command, "-p", "fake", "-m", "ollama:1b", "Hi", GRAFTAGE_PROVIDER="")
    assert done == (0, "ollama:1b\n", "")


def test_an_embedding_is_of_the_provider_by_option(shell: Shell) -> None:
    shell.install("it = Echo()")
    done = shell.run("embed", "-p", "fake", "Hi", "--json", GRAFTAGE_PROVIDER="")
    assert json.loads(done.out)["provider"] == "fake"


def test_the_help_of_generate_says_that_the_template_makes_a_question_of_the_text(shell: Shell) -> None:
    told = " ".join(shell.run("generate", "--help").out.split())
    assert "Answer one text; `--raw-prompt` continues it." in told
    assert "With `--raw-prompt` the model gets the text as it is" in told


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


POLICY = """
class Tight:
    name = "tight"

    @hookimpl
    def resource_limits(self, query):
        return Limits(**FIGURES, reasons={name: "a small machine" for name in FIGURES})

it = Tight()
"""


@pytest.mark.parametrize(
    ("figures", "arguments", "told"),
    [
        (
            {"max_tokens": 3},
            (),
            "at `--max-tokens` 3 by tight: a small machine. `--max-tokens N --force` goes past it.",
        ),
        ({"max_tokens": 3}, ("--max-tokens", "9"), "at `--max-tokens` 3 by tight: a small machine."),
        ({"max_tokens": 3}, ("--max-tokens", "2"), ": raise `--max-tokens`, or `--context-window`."),
        ({"max_tokens": 3}, ("--max-tokens", "4", "--force"), ": raise `--max-tokens`, or `--context-window`."),
        ({"context_window": 7}, ("--max-tokens", "2"), "at `--context-window` 7 by tight: a small machine."),
    ],
)
def test_an_answer_that_a_policy_has_cut_names_the_policy(
    shell: Shell, figures: dict[str, int], arguments: tuple[str, ...], told: str
) -> None:
    shell.install(f"FIGURES = {figures}\n{POLICY}", name="tight", group="graftage.plugins")
    shell.install("it = Echo()")
    done = shell.run("chat", "one two three four five", *arguments)
    warnings = [each for each in done.err.splitlines() if "The answer was cut" in each]
    assert len(warnings) == 1
    assert told in warnings[0]


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
        ["/bin/sh", "-c", '"$@" | head -c 4', "sh", *shell.command, "chat", "Hi"],
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
    assert shell.run("chat", "Hi", PYTHONUTF8="0", PYTHONIOENCODING="ascii") == (0, "caf? ?\n", "")


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
