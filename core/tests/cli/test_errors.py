"""Each error of a command is one message, a hint and an exit code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cli.conftest import Shell


class TestMissingModel:
    def test_close_name_is_suggested(self, shell: Shell) -> None:
        shell.install("it = Echo(models=['smollm2:135m'], strict=True)")
        done = shell.run("chat", "-m", "smolm2:135m", "Hi")
        assert done.code == 1
        assert "Did you mean `smollm2:135m`?" in done.err
        assert "graftage models pull" not in done.err  # The provider has its own hint.

    def test_pull_command_is_suggested(self, shell: Shell) -> None:
        shell.install("it = Echo([ModelNotFound('Not here.', provider='fake', model='a:1')])")
        done = shell.run("chat", "-m", "a:1", "Hi")
        assert done.err == "error: Not here.\nhint: `graftage models pull fake:a:1` downloads it.\n"

    @pytest.mark.parametrize(
        ("model", "hint"),
        [
            ("fakke:small:1b", "Did you mean `fake:small:1b`? Not here."),
            ("fakke:small", "Did you mean `fake:small`? Not here."),
            ("fakke:7b", None),
            ("fakke/x:q4_K_M", None),
            ("fakke://x/y", None),
            ("fake:fake", "`fake` is a provider: write `fake:`, or `fake:MODEL`. Not here."),
        ],
    )
    @pytest.mark.parametrize("error", ["ModelNotFound", "RequestRejected"])
    def test_misspelt_provider_is_suggested(self, shell: Shell, error: str, model: str, hint: str | None) -> None:
        shell.install(
            f"""
        def refuse(request):
            return {error}(f"No `{{request.model}}`.", hint="Not here.")
        it = Echo([refuse])
        """
        )
        done = shell.run("chat", "-m", model, "Hi")
        assert done.code == 1
        assert done.err.endswith(f"hint: {hint or 'Not here.'}\n")

    def test_unknown_provider_lists_those_installed(self, shell: Shell) -> None:
        shell.install("it = Echo(models=['nope:foo1'], strict=True)")
        assert "Did you mean `nope:foo1`?" in (near := shell.run("chat", "-m", "nope:foo", "Hi").err)
        assert "is not a provider" not in near
        far = shell.run("chat", "-m", "strange:thing", "Hi").err
        assert re.search(r"hint: `strange` is not a provider. Installed: `fake`, .*`openai`\.", far)

    def test_other_rejection_names_no_provider(self, shell: Shell) -> None:
        shell.install("it = Echo([RequestRejected('No such option.', hint='Leave it out.')])")
        assert shell.run("chat", "-m", "fakke:small", "Hi").err.endswith("hint: Leave it out.\n")


class TestMessage:
    def test_has_one_line_and_a_hint(self, shell: Shell) -> None:
        shell.install("it = Echo([ConnectionFailed('Nothing listens there.', hint='Start it.')])")
        assert shell.run("chat", "Hi") == (1, "", "error: Nothing listens there.\nhint: Start it.\n")

    def test_text_before_an_error_stays(self, shell: Shell) -> None:
        shell.install("it = Echo([[Chunk(text='Once upon'), StreamInterrupted('It broke.')]])")
        assert shell.run("chat", "Hi") == (1, "Once upon\n", "error: It broke.\n")

    def test_text_that_came_with_an_error(self, shell: Shell) -> None:
        shell.install("it = Echo([[Chunk(text='{\"a\": '), Chunk(text='oops', finish_reason='stop')]])")
        done = shell.run("chat", "Hi", "--format", "json")
        assert (done.code, done.out) == (1, '{"a": oops\n')
        assert done.err.startswith("error: The reply does not match the `format`.")

    def test_adapter_error_has_every_reason(self, shell: Shell) -> None:
        shell.install("it = Echo([AdapterUnsupported('No way.', reasons=['too old', 'No way'], hint='Update it.')])")
        assert shell.run("chat", "Hi").err == "error: No way.\n  too old\nhint: Update it.\n"

    @pytest.mark.parametrize("error", ["AdapterIncompatible('No.')", "ResourceLimitExceeded('No.', limit='x')"])
    def test_hint_names_force(self, shell: Shell, error: str) -> None:
        shell.install(f"it = Echo([{error}])")
        assert shell.run("chat", "Hi").err == "error: No.\nhint: `--force` overrides this.\n"

    @pytest.mark.parametrize(
        ("command", "words"),
        [
            (
                "chat Hi",
                {
                    "`timeout`": "`--timeout`",
                    "`timeouts.idle`": "GRAFTAGE_TIMEOUTS__IDLE",
                    "`context_window`": "`--context-window`",
                    "`api_key`": "GRAFTAGE_API_KEY",
                    "`max_reply_bytes`": "GRAFTAGE_MAX_REPLY_BYTES",
                    "the setting `memory_check`": "the setting GRAFTAGE_FAKE_MEMORY_CHECK",
                    "`images`": "`--image`",
                    "`truncate`": "`truncate`",
                    "`show`": "`graftage models show`",
                },
            ),
            ("generate Hi", {"`raw`": "`--raw-prompt`"}),
            (
                "models list",
                {
                    "`timeout`": "GRAFTAGE_TIMEOUTS__TOTAL",
                    "`host`": "`--host`",
                    "`context_window`": "GRAFTAGE_CONTEXT_WINDOW",
                },
            ),
        ],
    )
    def test_hint_uses_the_commands_words(self, shell: Shell, command: str, words: dict[str, str]) -> None:
        shell.install(
            f"""
        error = ProviderError("No.", hint={", ".join(words)!r})
        it = Echo(errors={{"chat": error, "generate": error, "list_models": error}})
        """
        )
        assert shell.run(*command.split()).err == f"error: No.\nhint: {', '.join(words.values())}\n"

    @pytest.mark.parametrize("command", ["chat", "embed"])
    def test_default_model_is_shown_with_its_origin(self, shell: Shell, command: str) -> None:
        shell.install(f"it = Echo(errors={{'{command}': CapabilityUnsupported('No.', hint='Look.')}})")
        hint = "`small:1b` is the default (environment GRAFTAGE_MODEL): name another with `-m`."
        assert shell.run(command, "Hi").err == f"error: No.\nhint: Look. {hint}\n"
        assert shell.run(command, "Hi", "-m", "small:1b").err == "error: No.\nhint: Look.\n"


def redirected(shell: Shell, command: str, streams: str) -> tuple[int, str]:
    """Run a command with streams redirected by a POSIX shell; return its exit code and stderr."""
    shell.install("it = Echo(['Hello.', 'Hello.'])")
    done = subprocess.run(
        ["/bin/sh", "-c", f'"$@" {streams}', "sh", *shell.command, *command.split()],
        env=shell.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


posix = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")


class TestOutputStreams:
    """Standard streams that are closed or full."""

    @posix
    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
    @pytest.mark.parametrize(
        "command",
        ["--help", "chat --help", "chat Hi", "chat Hi --json", "embed Hi", "models list", "models pull", "doctor"],
    )
    def test_output_that_cannot_be_written(self, shell: Shell, command: str) -> None:
        code, said = redirected(shell, command, ">/dev/full")
        assert code == 1
        assert said.endswith("error: Standard output cannot be written: No space left on device.\n")
        assert "bug in Graftage" not in said

    @posix
    @pytest.mark.parametrize("streams", [">&-", ">&- 2>&- <&-"])
    @pytest.mark.parametrize("command", ["--help", "chat Hi", "models list"])
    def test_closed_stream_is_ignored(self, shell: Shell, command: str, streams: str) -> None:
        assert redirected(shell, command, streams) == (0, "")

    @posix
    @pytest.mark.parametrize("streams", ["2>&-", "2>/dev/full"])
    def test_unprintable_error_sets_the_exit_code(self, shell: Shell, streams: str) -> None:
        assert redirected(shell, "chat Hi -m fake: --format nothing.json", streams) == (2, "")


class TestExitCodes:
    def test_no_model_is_wrong_usage(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        done = shell.run("chat", "Hi", GRAFTAGE_MODEL="")
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("error: No model is chosen.\nhint: Name one with `-m`")

    def test_unknown_provider_is_named(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        done = shell.run("chat", "Hi", GRAFTAGE_PROVIDER="fakee")
        assert done == (1, "", "error: There is no provider `fakee`.\nhint: Did you mean `fake`?\n")

    @pytest.mark.parametrize(
        ("environment", "problem"),
        [
            ({"GRAFTAGE_HOTS": "x"}, "There is no setting `hots` (environment GRAFTAGE_HOTS)"),
            ({"GRAFTAGE_ATTEMPTS": "0"}, "The setting `attempts` (environment GRAFTAGE_ATTEMPTS) is invalid"),
        ],
    )
    def test_wrong_setting_names_its_source(self, shell: Shell, environment: dict[str, str], problem: str) -> None:
        shell.install("it = Echo()")
        done = shell.run("chat", "Hi", **environment)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(f"error: {problem}")

    def test_invalid_settings_file_is_named(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        (shell.folder / "config.toml").write_text("model = ")
        done = shell.run("chat", "Hi")
        assert done.code == 2
        assert str(shell.folder / "config.toml") in done.err

    @pytest.mark.parametrize(("arguments", "environment"), [(["--debug"], {}), ([], {"GRAFTAGE_DEBUG": "1"})])
    def test_debug_shows_the_traceback(self, shell: Shell, arguments: list[str], environment: dict[str, str]) -> None:
        shell.install("it = Echo([InferenceFailed('It \\x1b broke.')])")
        done = shell.run(*arguments, "chat", "Hi", **environment)
        assert done.code == 1
        assert "Traceback (most recent call last)" in done.err
        assert done.err.endswith("error: It \\x1b broke.\n")
        assert "\x1b" not in done.err

    def test_unexpected_error_is_one_message(self, shell: Shell) -> None:
        (shell.folder / "sitecustomize.py").write_text("import graftage\ngraftage.connect = lambda *a, **k: 1 / 0\n")
        done = shell.run("chat", "Hi")
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith("error: ZeroDivisionError: division by zero\nhint: ")
        assert "Traceback" not in done.err

    def test_ctrl_c_ends_a_reply(self, shell: Shell) -> None:
        shell.install("it = Echo([[Chunk(text='first words'), Pause(), Chunk(finish_reason='stop')]])")
        child = shell.terminal("chat", "Hi")
        child.expect("first words")
        child.sendintr()
        assert shell.ends(child) == 130
        assert "Traceback" not in child.before
        assert "error" not in child.before

    def test_ctrl_c_before_the_first_word(self, shell: Shell) -> None:
        shell.install("it = Echo([[Pause(), Chunk(finish_reason='stop')]])")
        child = shell.terminal("chat", "Hi")
        child.expect("waiting for the first word")
        child.sendintr()
        assert shell.ends(child) == 130
        assert "Traceback" not in child.before
