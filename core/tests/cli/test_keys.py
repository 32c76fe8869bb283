"""`graftage keys`, on a keyring of the test's own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from cli.conftest import Shell

RING = """
import json
import pathlib
from keyring.backend import KeyringBackend
from keyring.errors import KeyringLocked, PasswordDeleteError

FILE = pathlib.Path(__file__).with_suffix(".json")

class Ring(KeyringBackend):
    priority = 1

    def _keys(self):
        return json.loads(FILE.read_text()) if FILE.exists() else {}

    def get_password(self, service, username):
        return self._keys().get(f"{service} {username}")

    def set_password(self, service, username, password):
        FILE.write_text(json.dumps({**self._keys(), f"{service} {username}": password}))

    def delete_password(self, service, username):
        keys = self._keys()
        del keys[f"{service} {username}"]
        FILE.write_text(json.dumps(keys))

class Locked(Ring):
    def get_password(self, service, username):
        raise KeyringLocked("It is locked.")
"""
FILE = """
[instances.work]
provider = "fake"
api_key_from = "keyring"

[instances.home]
provider = "fake"
"""
NONE = {"PYTHON_KEYRING_BACKEND": "keyring.backends.fail.Keyring"}
LOCKED = {"PYTHON_KEYRING_BACKEND": "ring.Locked"}


@pytest.fixture(autouse=True)
def _keyring(shell: Shell) -> None:
    pytest.importorskip("keyring")
    (shell.folder / "ring.py").write_text(RING)
    (shell.folder / "config.toml").write_text(FILE)
    shell.environment["PYTHON_KEYRING_BACKEND"] = "ring.Ring"
    shell.install("it = Echo()")


def ring(shell: Shell) -> dict[str, str]:
    found: dict[str, str] = json.loads((shell.folder / "ring.json").read_text())
    return found


def listed(shell: Shell, **environment: str) -> dict[str, dict[str, Any]]:
    done = shell.run("keys", "list", "--json", **environment)
    assert done.code == 0, done
    return {each["instance"]: each for each in json.loads(done.out)}


class TestSet:
    def test_key_is_read_from_the_pipe(self, shell: Shell) -> None:
        assert shell.run("keys", "set", "work", text="sk-hidden\n") == (
            0,
            "The key of `work` is stored in the keyring.\n",
            "",
        )
        assert ring(shell) == {"graftage work": "sk-hidden"}

    def test_terminal_does_not_show_the_key(self, shell: Shell) -> None:
        child = shell.terminal("keys", "set", "work")
        child.expect("Key of `work`, which is not shown: ")
        child.sendline("sk-hidden")
        child.expect("stored in the keyring")
        assert shell.ends(child) == 0
        assert "sk-hidden" not in child.before
        assert ring(shell) == {"graftage work": "sk-hidden"}

    @pytest.mark.parametrize(
        ("name", "text", "error", "hint"),
        [
            ("wrok", "key", "There is no instance `wrok`.", "Did you mean `work`?"),
            ("home", "key", "does not take its key from the keyring.", 'Add `api_key_from = "keyring"` below'),
            ("work", " \n", "There is no key.", "`graftage keys set work < FILE`"),
            ("work", "two\nlines", "must be one line", ""),
            ("work", "k" * 10000, "must be one line", ""),
        ],
    )
    def test_what_cannot_be_stored_is_refused(self, shell: Shell, name: str, text: str, error: str, hint: str) -> None:
        done = shell.run("keys", "set", name, text=text)
        assert (done.code, done.out) == (2, "")
        assert error in done.err
        assert hint in done.err
        assert not (shell.folder / "ring.json").exists()

    def test_key_is_never_an_argument(self, shell: Shell) -> None:
        assert shell.run("keys", "set", "work", "sk-hidden").code == 2

    @pytest.mark.parametrize("backend", [NONE, LOCKED])
    def test_without_a_keyring_it_says_the_other_ways(self, shell: Shell, backend: dict[str, str]) -> None:
        shell.environment |= backend
        done = shell.run("keys", "set", "work", text="sk-hidden")
        assert done.code == 2
        assert "GRAFTAGE_WORK_API_KEY" in done.err
        assert "0600" in done.err
        assert "hidden" not in done.err

    def test_warns_of_a_key_that_wins(self, shell: Shell) -> None:
        done = shell.run("keys", "set", "work", text="sk-hidden", GRAFTAGE_WORK_API_KEY="other")
        assert done.code == 0
        assert "environment GRAFTAGE_WORK_API_KEY" in done.err


class TestList:
    def test_says_where_each_key_comes_from(self, shell: Shell) -> None:
        before = listed(shell)
        assert (before["work"]["from"], before["work"]["present"]) == ("keyring", False)
        assert (before["home"]["from"], before["home"]["present"]) == (None, False)
        shell.run("keys", "set", "work", text="sk-hidden")
        after = shell.run("keys", "list", GRAFTAGE_HOME_API_KEY="sk-hidden")
        assert after.code == 0
        lines = [line.split() for line in after.out.splitlines()]
        assert ["work", "fake", "keyring", "yes"] in lines
        assert ["home", "fake", "environment", "GRAFTAGE_HOME_API_KEY", "yes"] in lines
        assert "hidden" not in after.out + after.err

    def test_key_file_is_checked(self, shell: Shell) -> None:
        file = shell.folder / "key"
        file.write_text("sk-hidden\n")
        (shell.folder / "config.toml").write_text(FILE + f'api_key_from = "{file}"\n')
        file.chmod(0o644)
        found = listed(shell)["home"]
        assert (found["from"], found["present"]) == (str(file), None)
        assert "chmod 600" in found["problem"]
        file.chmod(0o600)
        assert listed(shell)["home"]["present"] is True

    def test_locked_keyring_is_unknown(self, shell: Shell) -> None:
        shell.environment |= LOCKED
        found = listed(shell)["work"]
        assert found["present"] is None
        assert "locked" in found["problem"]

    def test_no_instance_names_the_file(self, shell: Shell) -> None:
        (shell.folder / "config.toml").write_text("")
        assert str(shell.folder / "config.toml") in shell.run("keys", "list").out


def test_remove_takes_the_key_away(shell: Shell) -> None:
    shell.run("keys", "set", "work", text="sk-hidden")
    assert shell.run("keys", "remove", "work").code == 0
    assert ring(shell) == {}
    again = shell.run("keys", "remove", "work")
    assert again.code == 2
    assert "no key for `work`" in again.err
