"""`graftage providers`."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from cli.conftest import Shell


@pytest.fixture(autouse=True)
def _alone(shell: Shell) -> None:
    """Disable the providers that are really installed: they could ask a real server."""
    shell.environment["GRAFTAGE_DISABLED_PLUGINS"] = "ollama,llamacpp,openai"


def compared(shell: Shell, *arguments: str, **environment: str) -> dict[str, dict[str, Any]]:
    done = shell.run("providers", "--json", *arguments, **environment)
    assert done.code == 0, done
    return {each["name"]: each for each in json.loads(done.out)}


def test_json_has_every_fact(shell: Shell) -> None:
    shell.install("it = Echo(models=['a:1', 'b:2'], address='http://me:hidden@here')")
    gone = "{'health': ConnectionFailed('Down.', hint='Start it.')}"
    shell.install(f"it = Echo(without=['embed'], errors={gone})", name="down")
    found = compared(shell)
    well, down = found["fake"], found["down"]
    assert (well["state"], well["health"], well["models"]) == ("loaded", "well", ["a:1", "b:2"])
    assert (well["distribution"], well["version"], well["server_version"]) == ("graftage-fake", "1.0", "echo")
    assert (well["address"], well["problems"]) == ("http://here", [])
    assert (down["state"], down["health"], down["models"]) == ("loaded", "not well", None)
    assert down["problems"] == ["Down. Start it."]
    assert set(well["features"]) - set(down["features"]) == {"embed"}


def test_table_has_a_column_each(shell: Shell) -> None:
    shell.install("it = Echo(models=[f'm:{n}' for n in range(7)] + ['\\x1b[2J'])")
    shell.install("it = Echo(without=['embed'])", name="other")
    out = shell.run("providers").out
    assert out.split("\n")[0].split() == ["fake", "llamacpp", "ollama", "openai", "other"]
    assert re.search(r"^state +loaded +(disabled +){3}loaded *$", out, re.MULTILINE)
    assert re.search(r"^embed +yes +no *$", out, re.MULTILINE)
    assert "m:0, m:1, m:2, m:3, m:4 and 3 more" in out
    assert "ollama: GRAFTAGE_DISABLED_PLUGINS names it." in out


def test_broken_provider_hides_no_other(shell: Shell) -> None:
    shell.install("it = Echo()")
    shell.install("raise RuntimeError('out of \\x1b order')", name="bad")
    shell.install("it = Echo(errors={'list_models': ValueError('odd')})", name="odd")
    found = compared(shell)
    assert (found["fake"]["state"], found["fake"]["health"]) == ("loaded", "well")
    assert (found["bad"]["state"], found["bad"]["health"]) == ("quarantined", "unknown")
    assert "out of \x1b order" in found["bad"]["problems"][0]
    assert (found["odd"]["health"], found["odd"]["models"]) == ("well", None)
    assert "odd" in found["odd"]["problems"][0]


HANGS = """
class Hanging(Echo):
    @hookimpl
    def connect(self, request):
        threading.Event().wait()

it = Hanging()
"""


def test_provider_that_hangs_is_left_behind(shell: Shell) -> None:
    shell.install("it = Echo()")
    shell.install(HANGS, name="slow")
    found = compared(shell, "--timeout", "0.5")
    assert found["fake"]["health"] == "well"
    assert (found["slow"]["health"], found["slow"]["problems"]) == ("unknown", ["It did not answer within 0.5 s."])


def test_one_name_twice_is_a_conflict(shell: Shell) -> None:
    shell.install("it = Echo()")
    shell.install("it = Echo()", distribution="stranger")
    assert "stranger 1.0" in compared(shell)["fake"]["problems"][0]


def test_report_in_a_package_is_shown(shell: Shell) -> None:
    shell.install("it = Echo()")
    shell.install("it = Echo()", name="torn")
    tests = {"test_a": {"outcome": "passed"}, "test_b": {"outcome": "passed"}, "test_c": {"outcome": "deviation"}}
    report = json.dumps({"providers": [{"provider": "fake", "tests": tests}]})
    for module, text in {"graftage_fake": report, "graftage_torn": report[:20]}.items():
        (shell.folder / f"{module}-data").mkdir()
        (shell.folder / f"{module}-data" / "graftage-report.json").write_text(text)
        (shell.folder / f"{module}-1.0.dist-info" / "RECORD").write_text(f"{module}-data/graftage-report.json,,\n")
    found = compared(shell)
    assert found["fake"]["tests"] == "2 passed, 1 deviation"
    assert found["torn"]["tests"] == "unknown: its report cannot be read (JSONDecodeError)"


class TestInstances:
    def test_instances_stand_beside_providers(self, shell: Shell) -> None:
        shell.install("it = Echo(models=['a:1'], address='http://here')")
        (shell.folder / "config.toml").write_text(
            '[instances.work]\nprovider = "fake"\napi_key_from = "/missing"\n[instances.home]\nprovider = "fake"\n'
        )
        found = compared(shell, GRAFTAGE_WORK_API_KEY="hidden")
        assert list(found)[-2:] == ["home", "work"]
        home, work = found["home"], found["work"]
        assert (home["instance_of"], home["health"], home["models"]) == ("fake", "well", ["a:1"])
        assert (home["distribution"], home["key"]) == ("graftage-fake", None)
        assert work["key"] == "environment GRAFTAGE_WORK_API_KEY"
        assert found["fake"]["instance_of"] is None

    def test_missing_key_is_a_problem_of_one(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        (shell.folder / "config.toml").write_text(
            '[instances.work]\nprovider = "fake"\napi_key_from = "/missing"\n[instances.home]\nprovider = "fake"\n'
        )
        found = compared(shell)
        assert "/missing" in found["work"]["problems"][0]
        assert (found["home"]["health"], found["home"]["problems"]) == ("well", [])

    def test_narrow_terminal_gets_several_tables(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        names = [f"instance-number-{number}" for number in range(4)]
        (shell.folder / "config.toml").write_text("".join(f'[instances.{name}]\nprovider = "fake"\n' for name in names))
        child = shell.terminal("providers")
        assert shell.ends(child) == 0
        lines = re.sub(r"\x1b\[[0-9;]*m", "", child.before).splitlines()
        assert max(map(len, lines)) <= 80
        assert all(any(name in line.split() for line in lines) for name in names)


def test_invalid_instance_is_shown_at_each(shell: Shell) -> None:
    shell.install("it = Echo()")
    (shell.folder / "config.toml").write_text("[instances.work]\nprovider = 'nothing'\n")
    assert "There is no provider `nothing`" in compared(shell)["fake"]["problems"][0]
