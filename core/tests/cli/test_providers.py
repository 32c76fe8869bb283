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


def compared(shell: Shell, *arguments: str) -> dict[str, dict[str, Any]]:
    done = shell.run("providers", "--json", *arguments)
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
