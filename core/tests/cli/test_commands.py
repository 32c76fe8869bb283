"""Subcommands of plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cli.conftest import Shell

GROUP = "graftage.commands"
TREE = """
import typer

it = typer.Typer(help="Plant trees.")

@it.command()
def plant(kind: str, count: int = 1, broken: bool = False):
    if broken:
        raise InferenceFailed("It \\x1b broke.", hint="Mend it.")
    print(f"{count} {kind}")
"""


def test_commands_are_listed_without_import(shell: Shell) -> None:
    shell.install("raise RuntimeError('was imported')", name="tree", group=GROUP)
    done = shell.run("--help")
    assert done.code == 0
    assert "  tree       From graftage-tree 1.0.\n" in done.out


def test_listing_has_the_distributions_summary(shell: Shell) -> None:
    source = "raise RuntimeError('was imported')"
    shell.install(source, name="tree", group=GROUP, summary="Plants \x1b trees: oaks and more")
    assert "  tree       Plants \\x1b trees: oaks and more\n" in shell.run("--help").out


def test_command_gets_its_arguments(shell: Shell) -> None:
    shell.install(TREE, name="tree", group=GROUP)
    assert shell.run("tree", "plant", "oak", "--count", "3") == (0, "3 oak\n", "")
    text = shell.run("tree", "--help").out
    assert "Plant trees." in text
    assert "--install-completion" not in text
    wrong = shell.run("tree", "plant")
    assert wrong.code == 2
    assert "graftage tree plant" in wrong.err


def test_error_of_a_command_is_one_message(shell: Shell) -> None:
    shell.install(TREE, name="tree", group=GROUP)
    assert shell.run("tree", "plant", "oak", "--broken") == (1, "", "error: It \\x1b broke.\nhint: Mend it.\n")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("raise RuntimeError('out of order')", "RuntimeError: out of order"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("raise BaseException('oh')", "BaseException: oh"),
        ("it = object()", "`graftage_tree:it` must be a `typer.Typer`, not a `object`"),
        ("", "AttributeError"),
    ],
)
def test_broken_command_hides_no_other(shell: Shell, source: str, problem: str) -> None:
    shell.install("it = Echo(['Hello.'])")
    shell.install(source, name="tree", group=GROUP)
    done = shell.run("tree", "plant")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: The command `tree` (graftage-tree 1.0) could not be loaded")
    assert problem in done.err
    assert shell.run("chat", "Hi").out == "Hello.\n"


def test_disabled_command_is_absent(shell: Shell) -> None:
    shell.install("raise RuntimeError('was imported')", name="tree", group=GROUP)
    off = {"GRAFTAGE_DISABLED_PLUGINS": "x, tree"}
    assert "tree" not in shell.run("--help", **off).out
    hint = "hint: Remove it from GRAFTAGE_DISABLED_PLUGINS.\n"
    assert shell.run("tree", **off) == (1, "", f"error: The command `tree` is disabled.\n{hint}")


def test_builtin_names_are_reserved(shell: Shell) -> None:
    shell.install("it = Echo(['Hello.'])")
    shell.install("raise RuntimeError('was imported')", name="chat", group=GROUP)
    assert shell.run("chat", "Hi") == (0, "Hello.\n", "")
    assert "graftage-chat" not in shell.run("--help").out


def test_conflict_names_both_distributions(shell: Shell) -> None:
    shell.install("raise RuntimeError('was imported')", name="tree", group=GROUP)
    shell.install("raise RuntimeError('was imported')", name="tree", group=GROUP, distribution="stranger")
    done = shell.run("tree")
    assert done.code == 1
    assert "graftage-tree 1.0" in done.err
    assert "stranger 1.0" in done.err
    assert "was imported" not in done.err


def test_command_for_another_graftage_is_not_imported(shell: Shell) -> None:
    shell.install("raise RuntimeError('was imported')", name="tree", group=GROUP, requires="graftage>=99")
    done = shell.run("tree")
    assert done.code == 1
    assert "requires graftage>=99" in done.err
    assert "was imported" not in done.err


def test_unknown_name_is_wrong_usage(shell: Shell) -> None:
    shell.install("raise RuntimeError('was imported')", name="tree", group=GROUP)
    done = shell.run("tre")
    assert done.code == 2
    assert "No such command 'tre'" in done.err
