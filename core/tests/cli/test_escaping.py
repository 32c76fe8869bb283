"""No model, server or plugin controls the terminal."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from graftage._cli import show

if TYPE_CHECKING:
    from cli.conftest import Shell


EVIL = "\x1b]52;c;aGk=\x07 \x9b2J \u202e \u2066 \u200f \u061c \x7f \ud800"
SHOWN = r"\x1b]52;c;aGk=\x07 \x9b2J \u202e \u2066 \u200f \u061c \x7f \ud800"


def test_control_characters_are_shown(shell: Shell) -> None:
    shell.install(f"it = Echo([[Chunk(thinking={EVIL!r}), Chunk(text={EVIL!r}), Chunk(finish_reason='stop')]])")
    assert shell.run("chat", "Hi") == (0, f"{SHOWN}\n", f"{SHOWN}\n")


def test_control_characters_on_a_terminal(shell: Shell) -> None:
    shell.install(f"it = Echo([{EVIL!r}])")
    child = shell.terminal("chat", "Hi", columns=60)
    child.expect_exact(SHOWN)
    assert shell.ends(child) == 0


def test_split_escape_sequences_are_shown(shell: Shell) -> None:
    shell.install("it = Echo([[Chunk(text='a\\x1b'), Chunk(text='[2Jb'), Chunk(finish_reason='stop')]])")
    assert shell.run("chat", "Hi").out == "a\\x1b[2Jb\n"


def test_split_line_break_is_one(shell: Shell) -> None:
    shell.install(
        "it = Echo([[Chunk(text='a\\r'), Chunk(text='\\nb\\r'), Chunk(text='c\\r'), Chunk(finish_reason='stop')]])"
    )
    assert shell.run("chat", "Hi").out == "a\nb\\x0dc\\x0d\n"


def test_raw_prints_the_models_text(shell: Shell) -> None:
    shell.install("it = Echo(['a\\x1b[1mb\\r\\nc'])")
    assert shell.run("chat", "Hi", "--raw").out == "a\x1b[1mb\r\nc\n"


def test_json_has_no_control_character(shell: Shell) -> None:
    shell.install(f"it = Echo([{EVIL!r}])")
    done = shell.run("chat", "Hi", "--json")
    assert json.loads(done.out)["text"] == EVIL
    assert SHOWN.count("\\u") <= done.out.count("\\u")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", done.out)


def test_rich_markup_is_plain_text(shell: Shell) -> None:
    shell.install(
        """
        it = Echo(
            [[Chunk(thinking="[red]t[/red]"), Chunk(text="[bold]a[/nope] :smile:"), Chunk(finish_reason="stop")]],
            models=("[bold]m[/nope]:1",),
        )
        """
    )
    assert shell.run("chat", "Hi") == (0, "[bold]a[/nope] :smile:\n", "[red]t[/red]\n")
    assert "[bold]m[/nope]:1" in shell.run("models", "list").out


def test_names_and_errors_are_escaped(shell: Shell) -> None:
    shell.install(
        "it = Echo([InferenceFailed('bad \\x1b[2J\\nhint: do evil', hint='a\\x07')], models=('e\\x1b[1m\\n:1',))"
    )
    done = shell.run("chat", "Hi")
    assert done == (1, "", "error: bad \\x1b[2J\n  hint: do evil\nhint: a\\x07\n")
    assert r"e\x1b[1m\n:1" in shell.run("models", "list").out


@settings(deadline=None)
@given(st.lists(st.text(alphabet=st.sampled_from("ab\r\n\t\x1b\x9b\u202e\ud800é")), max_size=6))
def test_pieces_are_escaped_like_the_whole(pieces: list[str]) -> None:
    escaper = show.Escaper()
    printed = "".join(map(escaper.feed, pieces)) + escaper.end()
    assert show.escape("".join(pieces)) == printed
    assert set(printed) <= set("ab\n\té\\x1b9bu202ed800d")
