"""`graftage chat --tool`: functions that the model calls."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cli.conftest import Shell

TOOLS = """
def add(a: int, b: int = 2) -> int:
    "Add two numbers."
    return a + b

def shout() -> str:
    return "\\x1b[2J" + 300 * "A" + "\\nB"

async def later() -> None:
    "Not a plain function."
"""
CALLS = """
def calls(*asked):
    made = [ToolCall(name=name, arguments=given, id=str(place)) for place, (name, given) in enumerate(asked)]
    return Reply(text="", tool_calls=tuple(made))
"""


@pytest.fixture
def tooled(shell: Shell) -> Shell:
    """A shell in a folder with a module of tools, which is not on the path."""
    folder = shell.folder / "work"
    folder.mkdir()
    (folder / "mine.py").write_text(TOOLS, encoding="utf-8")
    (folder / "broken.py").write_text("raise OSError('no disk')", encoding="utf-8")
    return replace(shell, folder=folder)


def test_call_and_its_result_are_shown(shell: Shell, tooled: Shell) -> None:
    shell.install(f"{CALLS}\nit = Echo([calls(('add', {{'a': 1}}), ('ad', {{'x': 'y'}})), 'It is 3.'])")
    done = tooled.run("chat", "--tool", "mine:add", "1 + 2?")
    assert (done.code, done.out) == (0, "It is 3.\n")
    assert done.err == 'add(a=1) -> 3\nad(x="y") -> There is no tool `ad`. Did you mean `add`?\n'


def test_output_of_tools_cannot_control_the_terminal(shell: Shell, tooled: Shell) -> None:
    shell.install(f"{CALLS}\nit = Echo([calls(('shout', {{'\\x1b[1m\\n': '\\x1b'}}), ('shout', {{}})), 'Ah.'])")
    done = tooled.run("chat", "--tool", "mine:shout", "Hi")
    wrong, shown = done.err.splitlines()
    assert wrong.startswith(r'shout(\x1b[1m\n="\u001b") -> The arguments of `shout` are wrong. `\x1b[1m\n`: Unexpected')
    assert shown == rf"shout() -> \x1b[2J{193 * 'A'}..."


def test_json_has_the_steps(shell: Shell, tooled: Shell) -> None:
    shell.install(f"{CALLS}\nit = Echo([calls(('add', {{'a': 1}}), ('add', {{}})), 'It is 3.'])")
    done = tooled.run("chat", "--tool", "mine:add", "--tool", "mine:shout", "--json", "1 + 2?")
    (step,) = json.loads(done.out)["steps"]
    assert step["calls"][0] == {"name": "add", "arguments": {"a": 1}, "result": "3", "failed": False}
    assert (step["text"], step["calls"][1]["failed"]) == ("", True)


def test_conversation_keeps_the_steps(shell: Shell, tooled: Shell) -> None:
    shell.install(f"{CALLS}\nit = Echo([calls(('add', {{'a': 1}})), 'It is 3.', history])")
    child = tooled.terminal("chat", "--tool", "mine:add", columns=200)
    child.expect(">>> ")
    child.sendline("1 + 2?")
    child.expect_exact("add(a=1) -> 3")
    child.expect_exact("It is 3.")
    child.expect(">>> ")
    child.sendline("And now?")
    child.expect_exact("user: 1 + 2? | assistant:  | tool: 3 | assistant: It is 3. | user: And now?")
    child.expect(">>> ")
    child.sendeof()
    assert tooled.ends(child) == 0


def test_steps_are_bounded(shell: Shell, tooled: Shell) -> None:
    shell.install(f"{CALLS}\nit = Echo([calls(('add', {{'a': 1}}))] * 3)")
    done = tooled.run("chat", "--tool", "mine:add", "--max-steps", "2", "1 + 2?")
    assert (done.code, done.out) == (1, "")
    assert "after 2 steps" in done.err
    assert "hint: Raise `--max-steps`" in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tool", "mine"], "MODULE:FUNCTION"),
        (["--tool", "../mine:add"], "MODULE:FUNCTION"),
        (["--tool", "nowhere:add"], "`nowhere` cannot be imported: ModuleNotFoundError"),
        (["--tool", "broken:add"], "`broken` cannot be imported: OSError: no disk"),
        (["--tool", "mine:ad"], "Did you mean `add`?"),
        (["--tool", "mine:later"], "no plain function `later`"),
        (["--max-steps", "2"], "`--max-steps` needs a `--tool`"),
    ],
)
def test_wrong_tool_is_refused(shell: Shell, tooled: Shell, arguments: list[str], words: str) -> None:
    shell.install("it = Echo()")
    done = tooled.run("chat", *arguments, "Hi")
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert "hint: " in done.err
    assert "Traceback" not in done.err
