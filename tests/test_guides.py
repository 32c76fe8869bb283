"""The guides: their Python blocks run, their tests pass, and their commands exist."""

from __future__ import annotations

import re
import shlex
import socket
from typing import TYPE_CHECKING, Any

import pytest
from places import ROOT

import graftage
from graftage_ollama.testing import FakeOllama

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FAKES = ROOT / "providers" / "ollama" / "README.md"
TESTING = ROOT / "docs" / "testing.md"
SERVERS = ROOT / "docs" / "servers.md"
NAMED = re.compile(r"# ([\w/]+\.py)\n")
RECORD = ["--record-mode=once", "-p", "no:cacheprovider"]


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def files(text: str) -> Iterator[tuple[str, str]]:
    """Yield the blocks that begin with the name of a file."""
    for block in blocks("python", text):
        if named := NAMED.match(block):
            yield named[1], block


def check_commands(text: str) -> None:
    """Check that the commands of a page exist, with their options."""
    from typer.main import get_command

    from graftage._cli.app import app

    lines = [shlex.split(line, comments=True) for block in blocks("bash", text) for line in block.splitlines()]
    commands = [line[1:] for line in lines if line and line[0] == "graftage"]
    assert commands
    for words in commands:
        command = get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {name for each in command.params for name in each.opts}
        assert {word for word in words if word.startswith("-")} <= known


@pytest.mark.parametrize("number", range(len(blocks("python", FAKES.read_text(encoding="utf-8")))))
def test_examples_of_the_fake_run(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeOllama() as fake:
        monkeypatch.setenv("OLLAMA_HOST", fake.url)
        exec(blocks("python", FAKES.read_text(encoding="utf-8"))[number], {})


class TestTesting:
    TEXT = TESTING.read_text(encoding="utf-8")

    def test_its_tests_record_and_replay(self, outer: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, block in files(self.TEXT):
            file = outer.path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block, encoding="utf-8")
        with FakeOllama() as fake:
            monkeypatch.setenv("OLLAMA_HOST", fake.url)
            outer.runpytest(*RECORD).assert_outcomes(passed=self.TEXT.count("\ndef test_"))
        outer.runpytest("--record-mode=none").assert_outcomes(passed=self.TEXT.count("\ndef test_"))

    def test_its_other_blocks_run(self, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(str(tmp_path))
        ran = 0
        with FakeOllama() as fake:
            monkeypatch.setenv("OLLAMA_HOST", fake.url)
            for block in blocks("python", self.TEXT):
                if not NAMED.match(block):
                    exec(block, {})
                    ran += 1
        assert ran

    def test_its_commands_exist(self) -> None:
        check_commands(self.TEXT)

    def test_it_is_short(self) -> None:
        assert len(self.TEXT.splitlines()) < 250
        assert graftage.__name__ in self.TEXT


class TestServers:
    TEXT = SERVERS.read_text(encoding="utf-8")

    def test_its_blocks_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            closed = f"http://127.0.0.1:{server.getsockname()[1]}"
        with FakeOllama() as fake:
            text = self.TEXT.replace("http://127.0.0.1:11434", fake.url).replace("http://127.0.0.1:8081", closed)
            monkeypatch.setenv("OLLAMA_HOST", fake.url)
            monkeypatch.setenv("GRAFTAGE_CONFIG", str(tmp_path / "config.toml"))
            (settings,) = blocks("toml", text)
            (tmp_path / "config.toml").write_text(settings, encoding="utf-8")
            names: dict[str, Any] = {}
            for block in blocks("python", text):
                exec(block, names)
        assert names["reply"].text

    def test_its_commands_exist(self) -> None:
        check_commands(self.TEXT)
