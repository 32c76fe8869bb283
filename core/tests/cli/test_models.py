"""`graftage models`."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cli.conftest import Shell


MODELS = """
from datetime import datetime, timezone
it = Echo(models=[
    "plain:1b",
    ModelInfo(
        name="rich:7b", digest="sha256:ab", size=4_200_000_000, parameters="7B", quantization="Q4_0",
        modified_at=datetime(2026, 1, 2, 12, 0, tzinfo=timezone.utc), features=frozenset({"chat", "tools"}),
        licence="MIT\\nlong", tensors={"a": (1, 2)}, raw={"secret": 1}, metadata={"general.name": "x"},
    ),
])
"""


class TestTables:
    def test_list_is_a_table_or_json(self, shell: Shell) -> None:
        shell.install(MODELS)
        lines = shell.run("models", "list").out.splitlines()
        assert [line.split()[0] for line in lines] == ["name", "plain:1b", "rich:7b"]
        assert "4.2 GB" in lines[2]
        data = json.loads(shell.run("models", "list", "--json").out)
        assert [each["name"] for each in data] == ["plain:1b", "rich:7b"]
        assert data[1]["modified_at"] == "2026-01-02T12:00:00+00:00"
        assert data[1]["features"] == ["chat", "tools"]
        assert "raw" not in data[1]

    def test_fit_a_narrow_terminal(self, shell: Shell) -> None:
        shell.install(MODELS)
        child = shell.terminal("models", "list", columns=60)
        child.expect("rich:7b ")
        text = child.before + child.after
        assert shell.ends(child) == 0
        plain = re.sub(r"\x1b\[[0-9;]*m", "", text + child.before)
        assert max(map(len, plain.splitlines())) <= 60
        assert "…" not in plain

    def test_no_color_is_honoured(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        shell.environment["NO_COLOR"] = "1"
        child = shell.terminal("doctor")
        child.expect("provider")
        assert shell.ends(child) == 0
        assert "\x1b[3" not in child.before

    def test_show_describes_one_model(self, shell: Shell) -> None:
        shell.install(MODELS)
        facts = dict(line.split(maxsplit=1) for line in shell.run("models", "show", "rich:7b").out.splitlines())
        assert {name: value.strip() for name, value in facts.items() if name in ("features", "licence", "tensors")} == {
            "features": "chat, tools",
            "licence": "MIT",
            "tensors": "1",
        }
        assert json.loads(shell.run("models", "show", "fake:rich:7b", "--json").out)["metadata"] == {
            "general.name": "x"
        }


ENDS = "It is unloaded when this command ends. To keep it, keep a client open in a program.\n"


class TestLoad:
    def test_load_and_unload(self, shell: Shell) -> None:
        shell.install("it = Echo(); it.loaded['m:1'] = LoadedModel(name='m:1', size=100, accelerator_size=50)")
        assert shell.run("models", "load", "m:1") == (0, "m:1 is loaded.\n", "")
        assert shell.run("models", "unload", "m:1").out == "m:1 was unloaded.\n"
        line = shell.run("models", "loaded").out.splitlines()[1]
        assert line.split() == ["m:1", "100", "bytes", "50", "%"]
        assert json.loads(shell.run("models", "loaded", "--json").out)[0]["size"] == 100

    def test_nothing_loaded_prints_no_table(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        assert shell.run("models", "loaded") == (0, "", "Nothing is loaded.\n")
        assert shell.run("models", "loaded", "--json") == (0, "[]\n", "")

    def test_embedded_load_ends_with_the_command(self, shell: Shell) -> None:
        shell.install("it = Echo(address='embedded')")
        assert shell.run("models", "load", "m:1") == (0, "m:1 is loaded.\n", ENDS)


def test_provider_is_chosen_by_option(shell: Shell) -> None:
    shell.install("it = Echo(models=['here:1'])")
    assert "here:1" in shell.run("models", "list", "-p", "fake", GRAFTAGE_PROVIDER="").out


PULL = """
class Connection:
    address = "fake"

    @hookimpl
    def chat(self, request):
        return iter(())

    @hookimpl
    def health(self, request):
        return Health(level=request.level, reachable=True)

    @hookimpl
    def pull_model(self, request):
        yield PullProgress(status="pulling manifest\\x1b[2J")
        for digest in ("sha256:aaaabbbbccccdddd", "sha256:eeeeffff00001111"):
            for completed in (0, 50_000_000, 100_000_000):
                status = f"pulling {digest[7:19]}"
                yield PullProgress(status=status, digest=digest, total=100_000_000, completed=completed)
        # The bars are drawn several times a second: a pull that ends at once may draw none.
        threading.Event().wait(None if "slow" in request.model else 1.0)
        yield PullProgress(status="success")

class Provider:
    @hookimpl
    def connect(self, request):
        return Connection()

it = Provider()
"""


class TestPull:
    def test_prints_its_steps_in_a_pipe(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        done = shell.run("models", "pull", "new:1b")
        assert done == (0, "new:1b is here.\n", "pulling manifest\npulling new:1b\n")

    def test_draws_a_bar_for_each_layer(self, shell: Shell) -> None:
        shell.install(PULL)
        child = shell.terminal("models", "pull", "quick:1b", columns=60)
        child.expect_exact(r"pulling manifest\x1b[2J")
        child.expect("aaaabbbbcccc .*100.0/100.0 MB")
        child.expect("eeeeffff0000 .*100.0/100.0 MB")
        child.expect("quick:1b is here.")
        assert shell.ends(child) == 0

    def test_ctrl_c_has_exit_code_130(self, shell: Shell) -> None:
        shell.install(PULL)
        child = shell.terminal("models", "pull", "slow:1b")
        child.expect("eeeeffff0000")
        child.sendintr()
        child.expect("Stopped. Run the same command to resume.")
        assert shell.ends(child) == 130
        assert "Traceback" not in child.before


class TestDelete:
    def test_needs_yes(self, shell: Shell) -> None:
        shell.install(MODELS)
        done = shell.run("models", "delete", "rich:7b")
        assert (done.code, done.out) == (0, "rich:7b (4.2 GB) would be deleted. Add `--yes` to do so.\n")
        assert shell.run("models", "delete", "rich:7b", "--yes") == (0, "rich:7b was deleted.\n", "")
        assert shell.run("models", "delete", "nope:1b", "--yes").code == 1

    def test_needs_a_name(self, shell: Shell) -> None:
        shell.install(MODELS)
        for name in ([], ["fake:"]):
            done = shell.run("models", "delete", "--yes", *name)
            assert (done.code, done.out) == (2, "")
