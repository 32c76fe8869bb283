"""Commands that name an instance."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from graftage_ollama.testing import FakeOllama

if TYPE_CHECKING:
    from cli.conftest import Shell

FILE = '[instances.work]\nprovider = "fake"\nmodel = "mine:1b"\n'


@pytest.fixture(autouse=True)
def _instance(shell: Shell) -> None:
    shell.install("it = Echo(models=['mine:1b', 'other:1b'], strict=True)")
    (shell.folder / "config.toml").write_text(FILE)
    shell.environment |= {"GRAFTAGE_MODEL": "", "GRAFTAGE_PROVIDER": ""}


@pytest.mark.parametrize(
    ("arguments", "provider", "model"),
    [
        (["-m", "work:other:1b"], "", "other:1b"),
        (["-m", "work:"], "", "mine:1b"),
        (["-p", "work"], "", "mine:1b"),
        (["-p", "work", "-m", "other:1b"], "", "other:1b"),
        ([], "work", "mine:1b"),
        ([], "work:other:1b", "other:1b"),
    ],
)
def test_instance_is_named_as_a_provider(shell: Shell, arguments: list[str], provider: str, model: str) -> None:
    done = shell.run("chat", "Hi", "--json", *arguments, GRAFTAGE_PROVIDER=provider)
    assert done.code == 0, done
    reply = json.loads(done.out)
    assert (reply["provider"], reply["model"], done.err) == ("work", model, "")


def test_models_of_an_instance_are_listed(shell: Shell) -> None:
    done = shell.run("models", "list", "-p", "work", "--json")
    assert [each["name"] for each in json.loads(done.out)] == ["mine:1b", "other:1b"]


def test_note_names_the_instance_taken(shell: Shell) -> None:
    with FakeOllama() as fake:
        (shell.folder / "config.toml").write_text(f'[instances.box]\nprovider = "ollama"\nhost = "{fake.url}"\n')
        done = shell.run("chat", "Hi", OLLAMA_HOST="127.0.0.1:1")
    assert done.out == "Hello from the fake.\n"
    assert done.err == "smollm2:135m on box, because no provider was named.\n"


def test_misspelt_instance_gets_the_nearest(shell: Shell) -> None:
    done = shell.run("chat", "Hi", "-m", "wrok:mine:1b", GRAFTAGE_PROVIDER="fake")
    assert done.code == 1
    assert "Did you mean `work:mine:1b`?" in done.err
    assert "Did you mean `work`?" in shell.run("chat", "Hi", "-p", "wrok").err


def test_invalid_instance_is_wrong_usage(shell: Shell) -> None:
    (shell.folder / "config.toml").write_text('[instances.work]\nprovider = "nothing"\n')
    for arguments in (["chat", "Hi", "-m", "a:b"], ["keys", "list"], ["doctor", "work"], ["models", "list"]):
        done = shell.run(*arguments)
        assert done.code == 2, done
        assert "There is no provider `nothing` for the instance `work`" in done.out + done.err


def test_hint_names_the_variable_of_the_instance(shell: Shell) -> None:
    gone = "{'list_models': ConnectionFailed('Gone.', hint='Raise `attempts` or `timeouts.connect`.')}"
    shell.install(f"it = Echo(errors={gone})", name="gone")
    (shell.folder / "config.toml").write_text('[instances.my-work]\nprovider = "gone"\n')
    for name, prefix in {"my-work": "GRAFTAGE_MY_WORK_", "gone": "GRAFTAGE_"}.items():
        done = shell.run("models", "list", "-p", name)
        assert done.err == f"error: Gone.\nhint: Raise {prefix}ATTEMPTS or {prefix}TIMEOUTS__CONNECT.\n"
