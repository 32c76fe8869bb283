"""`graftage new`."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any

import pytest

from graftage._version import __version__
from graftage.hookspecs import CONTRACT

if TYPE_CHECKING:
    from pathlib import Path

    from cli.conftest import Shell


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


class TestProvider:
    @pytest.mark.parametrize("server", ["function", "openai"])
    def test_is_a_whole_distribution(self, shell: Shell, server: str) -> None:
        done = shell.run("new", "provider", "my-server", "--server", server)
        assert (done.code, done.err) == (0, "")
        folder = shell.folder / "graftage-my-server"
        found = {each for each in files(folder) if "/cassettes/" not in each}
        assert found == {
            "README.md",
            "graftage_my_server/__init__.py",
            "graftage_my_server/py.typed",
            "pyproject.toml",
            "tests/test_my_server.py",
        }
        text = "".join((folder / each).read_text(encoding="utf-8") for each in found)
        assert not [word for word in ("NAME", "VARIABLE", "REQUIREMENT") if word in text]
        assert f"graftage_contract = {CONTRACT}\n" in text

    @pytest.mark.parametrize(("server", "extra"), [("function", ""), ("openai", "[http]")])
    def test_requires_this_release(self, shell: Shell, server: str, extra: str) -> None:
        shell.run("new", "provider", "mine", "--server", server)
        release = ".".join(__version__.split(".")[:2])
        found = project(shell.folder / "graftage-mine")["project"]
        assert found["dependencies"] == [f"graftage{extra}>={release},<1"]
        assert found["entry-points"] == {"graftage.providers": {"mine": "graftage_mine"}}

    def test_next_steps_are_printed(self, shell: Shell) -> None:
        (shell.folder / "my code").mkdir()
        done = shell.run("new", "provider", "mine", "--into", "my code")
        assert done.out == (
            "my code/graftage-mine is written. Next:\n\n"
            "  cd 'my code/graftage-mine'\n"
            '  pip install -e ".[test]"\n'
            "  pytest\n"
            '  graftage chat -m mine:small "Hello"\n'
        )


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("My Server", ", such as `my-server`."),
            ("graftage-mine", ", such as `mine`."),
            ("my_server", ", such as `my-server`."),
            ("../mine", ", such as `mine`."),
            ("9", " between them."),
            ("", " between them."),
        ],
    )
    def test_invalid_name(self, shell: Shell, name: str, hint: str) -> None:
        before = files(shell.folder)
        done = shell.run("new", "provider", name)
        assert (done.code, done.out) == (2, "")
        assert f"`{name}` is not a valid name for a provider." in done.err
        assert done.err.endswith(f"{hint}\n")
        assert files(shell.folder) == before

    @pytest.mark.parametrize("name", ["auto", "host", "debug"])
    def test_word_of_the_settings(self, shell: Shell, name: str) -> None:
        done = shell.run("new", "provider", name)
        assert done.code == 2
        assert f"`{name}` is a word of Graftage's settings." in done.err

    def test_name_of_an_installed_plugin(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        done = shell.run("new", "provider", "fake")
        assert done.code == 2
        assert "`fake` is the name of graftage-fake 1.0." in done.err

    def test_existing_folder_is_kept(self, shell: Shell) -> None:
        (shell.folder / "graftage-mine").mkdir()
        done = shell.run("new", "provider", "mine")
        assert done.code == 2
        assert "`graftage-mine` already exists." in done.err
        assert files(shell.folder / "graftage-mine") == set()

    def test_folder_that_cannot_be_written(self, shell: Shell) -> None:
        done = shell.run("new", "provider", "a" * 300)
        assert done.code == 2
        assert "cannot be written: " in done.err
        assert done.err.endswith("hint: Name another folder with `--into`.\n")
