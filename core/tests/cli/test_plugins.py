"""`graftage plugins`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from cli.conftest import Shell


def plugin_table(shell: Shell, **environment: str) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in json.loads(shell.run("plugins", "--json", **environment).out)}


def test_plugins_are_listed_with_their_source(shell: Shell) -> None:
    shell.install("it = Echo()")
    assert plugin_table(shell)["fake"] == {
        "name": "fake",
        "kind": "provider",
        "distribution": "graftage-fake",
        "version": "1.0",
        "contract": 1,
        "hooks": ["connect"],
        "state": "loaded",
        "why": None,
    }
    assert re.search(
        r"^fake +provider +graftage-fake +1\.0 +1 +loaded +connect *$", shell.run("plugins").out, re.MULTILINE
    )


def test_broken_plugin_hides_no_other(shell: Shell) -> None:
    shell.install("it = Echo()")
    shell.install("raise RuntimeError('out of \\x1b order')", name="bad", group="graftage.plugins")
    done = shell.run("plugins")
    assert done.code == 0
    assert re.search(r"^bad +plugin .* quarantined", done.out, re.MULTILINE)
    assert r"RuntimeError: out of \x1b order" in done.out
    assert {"bad": "quarantined", "fake": "loaded"}.items() <= {
        name: each["state"] for name, each in plugin_table(shell).items()
    }.items()


def test_broken_entry_points_are_skipped_with_a_note(shell: Shell) -> None:
    shell.install("it = Echo()")
    damage = {
        "one": (b"[console_scripts]\nfoo\n", "one of its lines is not `name = value`"),
        "two": (b"\xe9", "it is not UTF-8"),
    }
    for name, (points, _) in damage.items():
        info = shell.folder / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "entry_points.txt").write_bytes(points)
    done = shell.run("plugins")
    assert done.code == 0
    assert "fake" in done.out
    for name, (_, why) in damage.items():
        assert f"The entry_points.txt of {name} 1 is broken: {why}. " in done.err


def test_broken_plugin_is_only_a_warning(shell: Shell) -> None:
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


def test_disabled_plugin_is_not_imported(shell: Shell) -> None:
    shell.install("raise RuntimeError('was imported')")
    found = plugin_table(shell, GRAFTAGE_DISABLED_PLUGINS="fake")["fake"]
    assert (found["state"], found["why"]) == ("disabled", "GRAFTAGE_DISABLED_PLUGINS names it.")


@pytest.mark.slow
def test_check_tells_what_is_wrong(shell: Shell) -> None:
    shell.install("it = Echo(strict=True)")
    done = shell.run("plugins", "check", "fake", "--model", "echo:latest", "--report", str(shell.folder / "it.json"))
    assert done.code == 1
    (found,) = json.loads((shell.folder / "it.json").read_text("utf-8"))["providers"]
    assert (found["provider"], found["tests"]["test_chat_gives_text"]) == ("fake", {"outcome": "passed"})
    assert found["tests"]["test_format_gives_data"]["outcome"] == "failed"
    assert "failed: test_format_gives_data" in done.out


def test_check_needs_an_installed_provider(shell: Shell) -> None:
    done = shell.run("plugins", "check", "nobody")
    assert done.code != 0
    assert "There is no provider `nobody`." in done.err
