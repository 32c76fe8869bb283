"""`graftage chat` in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cli.conftest import Shell


def test_earlier_messages_are_sent(shell: Shell) -> None:
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
    assert shell.ends(child) == 0


LINES = [f"line {number}" for number in range(41)]
SHOW = """
def show(request):
    return f"{len(request.messages)} messages, the last of {len(request.messages[-1].content.splitlines())} lines"
it = Echo([show] * 3)
"""


class TestPaste:
    def test_bracketed_lines_are_one_message(self, shell: Shell) -> None:
        shell.install(SHOW)
        child = shell.terminal("chat", columns=200)
        child.expect_exact("\x1b[?2004h")  # The terminal is asked to mark pastes.
        child.expect(">>> ")
        child.send("\x1b[200~" + "\r".join(LINES) + "\r\x1b[201~")
        child.expect("line 40")
        child.sendline(" and a word")
        child.expect_exact("1 messages, the last of 42 lines")
        child.expect(">>> ")
        child.sendline("Hi")
        child.expect_exact("3 messages, the last of 1 lines")
        child.expect(">>> ")
        child.sendeof()
        assert shell.ends(child) == 0

    def test_waiting_lines_are_one_message(self, shell: Shell) -> None:
        shell.install(SHOW)
        child = shell.terminal("chat", columns=200)
        child.expect(">>> ")
        child.send("\r".join(LINES) + "\r")
        child.expect_exact("1 messages, the last of 41 lines")
        child.expect(">>> ")
        child.sendline("Hi")
        child.expect_exact("3 messages, the last of 1 lines")
        child.expect(">>> ")
        child.sendeof()
        assert shell.ends(child) == 0

    def test_unfinished_line_waits_for_its_end(self, shell: Shell) -> None:
        shell.install("it = Echo([history])")
        child = shell.terminal("chat", columns=200)
        child.expect(">>> ")
        child.send("  first\rsecond")
        child.expect_exact("... ")
        child.expect("second")
        child.sendline(" and more")
        child.expect("user:   first\r\nsecond and more\r\n")
        child.expect(">>> ")
        child.sendeof()
        assert shell.ends(child) == 0

    def test_command_takes_one_line(self, shell: Shell) -> None:
        shell.install("it = Echo([history])")
        child = shell.terminal("chat", columns=200)
        child.expect(">>> ")
        child.send("/clear\rone\rtwo\r\x04")
        child.expect("Forgotten")
        child.expect("user: one\r\ntwo\r\n")
        assert shell.ends(child) == 0


class TestCtrlC:
    def test_ctrl_c_stops_only_the_reply(self, shell: Shell) -> None:
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
        assert shell.ends(child) == 0

    def test_ctrl_c_before_a_word_forgets_the_question(self, shell: Shell) -> None:
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
        assert shell.ends(child) == 0

    def test_ctrl_c_at_prompt_says_how_to_end(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        child = shell.terminal("chat")
        child.expect(">>> ")
        child.send("half a question")
        child.expect("half a question")
        child.sendintr()
        child.expect("Ctrl-D or /exit ends the conversation")
        child.expect(">>> ")
        child.sendeof()
        assert shell.ends(child) == 0


def test_commands_of_a_conversation(shell: Shell) -> None:
    shell.install("it = Echo(['Hello.', history, history])")
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
    child.expect("There is no command `/nonsense`")
    child.expect(">>> ")
    child.sendline("/nonsense at all")
    child.expect("There is no command `/nonsense at all`")
    child.expect(">>> ")
    child.sendline(" /nonsense")
    child.expect_exact("\x1b[2Ksystem: Be kind | user:  /nonsense")
    child.expect(">>> ")
    child.sendline("/clear")
    child.expect("Forgotten")
    child.expect(">>> ")
    child.sendline("/usr/bin is what?")
    child.expect_exact("\x1b[2Ksystem: Be kind | user: /usr/bin is what?")
    child.expect(">>> ")
    child.sendline("/bye")
    assert shell.ends(child) == 0


def test_model_that_cannot_chat_is_refused(shell: Shell) -> None:
    shell.install("it = Echo(models=[ModelInfo(name='small:1b', features=frozenset({'embed'}))])")
    child = shell.terminal("chat")
    child.expect("The model `small:1b` cannot chat")
    child.expect("GRAFTAGE_MODEL")
    assert shell.ends(child) == 1


def test_error_does_not_end_a_conversation(shell: Shell) -> None:
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
    assert shell.ends(child) == 0


def test_pictures_go_with_the_first_question(shell: Shell) -> None:
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
    assert shell.ends(child) == 0


def test_has_no_json_form(shell: Shell) -> None:
    shell.install("it = Echo()")
    child = shell.terminal("chat", "--json")
    child.expect("error: `--json` needs a prompt")
    assert shell.ends(child) == 2
