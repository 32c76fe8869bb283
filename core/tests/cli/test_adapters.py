"""`graftage adapters`, and `--adapter` and `--force` of the commands that ask a model."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from cli.conftest import Shell

LORE = """
from pathlib import Path

class Found:
    name, digest, scale, served_as = "ahoy", "sha256:" + "ab" * 32, 2.0, None

    def __init__(self, status, folder):
        reasons = {"incompatible": ("layer 30 of \\x1b 30", "other width"), "unknown": ("no facts",)}
        self.verdict = Verdict(status=status, reasons=reasons.get(status, ()))
        self.folder = folder

    def gguf(self, base):
        made = self.folder / "made.gguf"
        made.write_text(f"GGUF for {base.name}")
        return made

    def merge(self, base_file, out, on_progress):
        for written in (0, 50_000_000, 100_000_000):
            on_progress(written, 100_000_000)
        out.write_text("half")
        if base_file.name == "slow.gguf":
            threading.Event().wait()
        if base_file.name == "bad.gguf":
            raise AdapterInvalid("That base is broken.")
        out.write_text(f"merged into {base_file.name}")
        return out

class Lore:
    name = "lore"

    @hookimpl
    def resolve_adapter(self, request):
        if request.reference == "malformed":
            raise AdapterInvalid("It holds a pickle.", reasons=["a pickle"])
        if request.reference in ("compatible", "incompatible", "unknown"):
            return Found(request.reference, Path(__file__).parent)

    @hookimpl
    def list_adapters(self, request):
        facts = {"reference": "/a/b", "source": "folder", "base_model": "small", "digest": "sha256:" + "ab" * 32}
        base = request.base()
        status = "incompatible" if base and base.name == "other:7b" else "compatible"
        verdict = Verdict(status=status) if request.model else None
        yield AdapterInfo(name="ah\\x1boy", rank=8, size=98_000_000, verdict=verdict, **facts)
        yield AdapterInfo(name="", reference="", source="registry", problem="line 3 is\\nnot TOML")

    @hookimpl
    def pull_adapter(self, request):
        if request.reference.startswith("me/"):
            for done in (0, 5, 10):
                step = PullProgress(status="downloading weights", total=10, completed=done)
                request.call.emit("progress", progress=step)
            if request.name == "taken" and not request.overwrite:
                raise AdapterInvalid("The name `taken` is bound to something else.", hint="Set `overwrite`.")
            name = request.name or request.reference.rpartition("/")[2]
            return AdapterInfo(name=name, reference=name, path=Path("/a/b"), size=98_000_000, digest="sha256:ab")

it = Lore()
"""


@pytest.fixture(autouse=True)
def _installed(shell: Shell) -> None:
    shell.install(LORE, name="lore", group="graftage.plugins")
    shell.environment["GRAFTAGE_DISABLED_PLUGINS"] = "lora"  # It would look in the user's folders, and on the network.
    for name in ("base", "other", "slow", "bad"):
        (shell.folder / f"{name}.gguf").write_text("")


class TestList:
    def test_table_and_json(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        done = shell.run("adapters", "list")
        head, row = done.out.splitlines()
        assert head.split() == ["name", "fits", "rank", "size", "digest", "base", "model", "where"]
        facts = ["8", "98.0", "MB", "sha256:abababababab", "small", "folder", "/a/b"]
        assert row.split() == [r"ah\x1boy", "yes", *facts]
        assert done.err == "problem: registry: line 3 is\n  not TOML\n"
        found, problem = json.loads(shell.run("adapters", "list", "--json").out)
        assert (found["digest"], found["verdict"]["status"]) == ("sha256:" + "ab" * 32, "compatible")
        assert problem["problem"] == "line 3 is\nnot TOML"

    def test_verdict_is_for_the_named_model(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        done = shell.run("adapters", "list", "-m", "other:7b")
        assert done.out.splitlines()[1].split()[1] == "no"
        assert "`graftage adapters check NAME` says why" in done.err

    @pytest.mark.parametrize(
        ("provider", "environment", "reason"),
        [
            ("Echo(errors={'show_model': ConnectionFailed('Nothing answers there.')})", {}, "Nothing answers there"),
            ("Echo(strict=True)", {}, "There is no model `small:1b`"),
            ("Echo()", {"GRAFTAGE_MODEL": ""}, "no model is chosen"),
        ],
    )
    def test_without_a_server_it_lists(
        self, shell: Shell, provider: str, environment: dict[str, str], reason: str
    ) -> None:
        shell.install(f"it = {provider}")
        done = shell.run("adapters", "list", **environment)
        assert (done.code, done.out.splitlines()[1].split()[:2]) == (0, [r"ah\x1boy", "8"])
        assert f"Whether they fit is left out: {reason}.\n" in done.err

    def test_without_a_plugin_one_is_named(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        done = shell.run("adapters", "list", GRAFTAGE_DISABLED_PLUGINS="lore,lora")
        assert (done.code, done.out) == (0, "")
        assert done.err.endswith("install `graftage-lora` to find adapters.\n")

    def test_without_adapters_the_places_are_named(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        (shell.folder / "mine").mkdir()
        places = {name: str(shell.folder / "mine") for name in ("HF_HUB_CACHE", "GRAFTAGE_LORA_FOLDERS")}
        registry = str(shell.folder / "adapters.toml")
        done = shell.run(
            "adapters", "list", GRAFTAGE_DISABLED_PLUGINS="lore", GRAFTAGE_LORA_REGISTRY=registry, **places
        )
        assert (done.code, done.out) == (0, ""), done.err
        assert f"looked in the folders of GRAFTAGE_LORA_FOLDERS ({shell.folder / 'mine'})" in done.err
        assert f"`[lora]` in {shell.folder / 'config.toml'}" in done.err
        assert "`GRAFTAGE_LORA_FOLDERS=FOLDER graftage adapters list`" in done.err
        assert "install `graftage-lora`" not in done.err


class TestCheck:
    @pytest.mark.parametrize(
        ("reference", "code", "status", "reasons"),
        [
            ("compatible", 0, "compatible", []),
            ("incompatible", 1, "incompatible", ["layer 30 of \x1b 30", "other width"]),
            ("unknown", 3, "unknown", ["no facts"]),
            ("malformed", 1, "invalid", ["a pickle"]),
        ],
    )
    def test_verdict_has_every_reason(
        self, shell: Shell, reference: str, code: int, status: str, reasons: list[str]
    ) -> None:
        shell.install("it = Echo()")
        done = shell.run("adapters", "check", reference, "--json")
        report: dict[str, Any] = json.loads(done.out)
        assert (done.code, done.err) == (code, "")
        assert (report["status"], report["reasons"], report["model"]) == (status, reasons, "small:1b")
        table = shell.run("adapters", "check", reference)
        assert table.code == code
        assert re.search(rf"^verdict +{status} *$", table.out, re.MULTILINE)
        assert re.findall(r"^reason +(.+?) *$", table.out, re.MULTILINE) == [
            each.replace("\x1b", r"\x1b") for each in reasons
        ]

    def test_unknown_adapter_is_an_error(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        done = shell.run("adapters", "check", "nope", "--json")
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith("error: The adapter `nope` was not found")

    def test_missing_model_is_an_error(self, shell: Shell) -> None:
        shell.install("it = Echo(models=['small:1b'], strict=True)")
        done = shell.run("adapters", "check", "unknown", "-m", "smal:1b", "--json")
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith("error: There is no model `smal:1b`.\n")
        assert "Did you mean `small:1b`?" in done.err

    def test_works_without_model_facts(self, shell: Shell) -> None:
        shell.install("it = Echo(without=['show_model'])")
        assert shell.run("adapters", "check", "unknown", "--json").code == 3

    def test_takes_the_named_model(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        done = shell.run("adapters", "check", "compatible", "-m", "fake:other:7b", "--json")
        assert json.loads(done.out)["model"] == "other:7b"


class TestLoad:
    def test_load_and_unload(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        assert shell.run("adapters", "load", "compatible") == (0, "ahoy is loaded as small:1b+ahoy (derived).\n", "")
        assert shell.run("adapters", "unload", "compatible") == (0, "compatible is not in memory.\n", "")

    def test_embedded_load_ends_with_the_command(self, shell: Shell) -> None:
        shell.install("it = Echo(address='embedded')")
        done = shell.run("adapters", "load", "compatible")
        assert done.out == "ahoy is loaded as small:1b+ahoy (derived).\n"
        assert done.err == "It is unloaded when this command ends. To keep it, keep a client open in a program.\n"

    def test_misfit_needs_force(self, shell: Shell) -> None:
        shell.install("it = Echo(['Ahoy!'] * 2)")
        for command in (["adapters", "load", "incompatible"], ["chat", "Hi", "--adapter", "incompatible"]):
            refused = shell.run(*command)
            assert (refused.code, refused.out) == (1, "")
            assert r"layer 30 of \x1b 30; other width" in refused.err
            assert "--force" in refused.err
            forced = shell.run(*command, "--force")
            assert forced.code == 0
            assert "warning: " in forced.err

    def test_reply_names_its_adapter(self, shell: Shell) -> None:
        shell.install("it = Echo(['Ahoy!'])")
        assert json.loads(shell.run("chat", "Hi", "--adapter", "compatible", "--json").out)["adapter"] == "ahoy"


WARMER = """
class Warm(Echo):
    @hookimpl
    def connect(self, request):
        connection = super().connect(request)
        connection._warm = self.read
        return connection

    def read(self, hook, request):
        words = sum(len(each.content.split()) for each in request.messages)
        warnings = (f"window {request.context_window}",) if request.context_window else ()
        kept = words // 2 if self.address == "embedded" else None
        return Warmed(tokens=words, cached_tokens=kept, saved=26_600_000 if kept else None, warnings=warnings)

it = Warm(address=%r, adapter_weights=True)
"""


class TestWarm:
    def test_each_is_read_with_the_prompt(self, shell: Shell) -> None:
        shell.install(WARMER % "server")
        (shell.folder / "system.txt").write_text("You are a pirate, ahoy.")
        done = shell.run("adapters", "warm", "compatible", "unknown=0.5", "--system-file", "system.txt")
        assert done.code == 0
        assert done.out.splitlines() == [
            "compatible is loaded, with 5 tokens read ahead.",
            "unknown=0.5 is loaded, with 5 tokens read ahead.",
        ]
        assert "The server keeps that until it needs the memory" in done.err

    def test_embedded_one_says_what_stays(self, shell: Shell) -> None:
        shell.install(WARMER % "embedded")
        done = shell.run("adapters", "warm", "compatible", "--system", "You are nice.", "--context-window", "4096")
        read = "compatible is loaded, with 3 tokens read ahead (1 kept from before); 26.6 MB saved on the disk."
        assert done.out == f"{read}\n"
        assert "warning: window 4096\n" in done.err
        assert "What stays is on the disk: the converted adapters and the saved prompts" in done.err

    def test_without_a_prompt_it_loads(self, shell: Shell) -> None:
        shell.install(WARMER % "embedded")
        done = shell.run("adapters", "warm", "compatible")
        assert done.out == "compatible is loaded.\n"
        assert "the converted adapters, from which another process goes on" in done.err

    def test_failure_stops_no_other(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        done = shell.run("adapters", "warm", "incompatible", "compatible", "--system", "Hi")
        assert (done.code, done.out) == (1, "compatible is loaded, with 1 token read ahead.\n")
        assert done.err.startswith("error: The adapter `incompatible` does not fit")
        alone = shell.run("adapters", "warm", "nobody")
        assert (alone.code, alone.out, "keeps" in alone.err) == (1, "", False)

    @pytest.mark.parametrize("arguments", [["--system", "a", "--system-file", "b.txt"], ["--system-file", "gone.txt"]])
    def test_misuse_is_refused(self, shell: Shell, arguments: list[str]) -> None:
        shell.install("it = Echo()")
        (shell.folder / "b.txt").write_bytes(b"\xff")
        assert shell.run("adapters", "warm", "compatible", *arguments).code == 2

    def test_unreadable_prompt_is_refused(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        (shell.folder / "b.txt").write_bytes(b"\xff")
        done = shell.run("adapters", "warm", "compatible", "--system-file", "b.txt")
        assert (done.code, "`b.txt` cannot be read" in done.err) == (2, True)


class TestPull:
    def test_download_is_named(self, shell: Shell) -> None:
        shell.install("it = Echo(strict=True, errors={'show_model': ConnectionFailed('down')})")
        done = shell.run("adapters", "pull", "me/poet@main", "--name", "bard")
        assert done == (0, "bard is here: /a/b, 98.0 MB, sha256:ab\n", "downloading weights\n")

    def test_bound_name_needs_overwrite(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        refused = shell.run("adapters", "pull", "me/poet", "--name", "taken")
        assert (refused.code, refused.out) == (1, "")
        assert "--overwrite" in refused.err
        assert shell.run("adapters", "pull", "me/poet", "--name", "taken", "--overwrite").code == 0

    def test_nobody_knows_it(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        done = shell.run("adapters", "pull", "you/poet")
        assert (done.code, done.err.startswith("error: No plugin can download the adapter `you/poet`.")) == (1, True)

    def test_terminal_shows_a_bar(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        child = shell.terminal("adapters", "pull", "me/poet", columns=100)
        child.expect("downloading weights")
        child.expect("poet is here: /a/b")
        assert shell.ends(child) == 0


class TestSeveral:
    def test_adapters_with_weights_answer(self, shell: Shell) -> None:
        shell.install("it = Echo(['Ahoy!'] * 3, adapter_weights=True)")
        one = ("chat", "Hi", "--json", "--adapter", "compatible=0.5")
        assert json.loads(shell.run(*one).out)["adapter"] == "0.5 ahoy"
        same = shell.run(*one, "--adapter", "unknown")
        assert (same.code, "have the same content" in same.err) == (1, True)
        bad = shell.run("generate", "Hi", "--adapter", "compatible=0")
        assert (bad.code, "The weight of the adapter" in bad.err) == (1, True)

    def test_existing_path_is_no_weight(self, shell: Shell) -> None:
        shell.install("it = Echo(['Ahoy!'])")
        (shell.folder / "lr=0.001").mkdir()
        done = shell.run("chat", "Hi", "--adapter", "lr=0.001")
        assert "The adapter `lr=0.001` was not found" in done.err
        assert "The adapter `lr` was not found" in shell.run("chat", "Hi", "--adapter", "lr=0.002").err


PRUNER = """
class Connection:
    address = "fake"

    @hookimpl
    def chat(self, request):
        return iter(())

    @hookimpl
    def health(self, request):
        return Health(level=request.level, reachable=True)

    @hookimpl
    def prune_adapters(self, request):
        text = repr((request.keep, request.older_than, request.dry_run))
        found = (ModelInfo(name="graftage/a", size=98_000_000), ModelInfo(name=text))
        return () if request.keep == ("all",) else found

class Provider:
    @hookimpl
    def connect(self, request):
        return Connection()

it = Provider()
"""


class TestPrune:
    def test_deletes_nothing_without_yes(self, shell: Shell) -> None:
        shell.install(PRUNER)
        done = shell.run("adapters", "prune")
        assert (done.code, done.err) == (0, "")
        assert re.search(r"^graftage/a +98.0 MB *$", done.out, re.MULTILINE)
        assert "((), None, True)" in done.out
        assert done.out.endswith("2 models would be deleted. Add `--yes` to do so.\n")

    @pytest.mark.parametrize(("age", "seconds"), [("90", 90.0), ("30m", 1800.0), ("12h", 43200.0), ("7d", 604800.0)])
    def test_deletes_old_models_not_kept(self, shell: Shell, age: str, seconds: float) -> None:
        shell.install(PRUNER)
        done = shell.run("adapters", "prune", "--yes", "--older-than", age, "--keep", "a", "--keep", "b")
        assert f"(('a', 'b'), {seconds!r}, False)" in done.out
        assert done.out.endswith("2 models deleted.\n")

    def test_json_says_if_it_deleted(self, shell: Shell) -> None:
        shell.install(PRUNER)
        data = json.loads(shell.run("adapters", "prune", "--json").out)
        assert data["deleted"] is False
        assert [each["name"] for each in data["models"]] == ["graftage/a", "((), None, True)"]

    def test_says_if_nothing_is_found(self, shell: Shell) -> None:
        shell.install(PRUNER)
        assert shell.run("adapters", "prune", "--keep", "all", "--yes").out == "There is nothing to delete.\n"

    @pytest.mark.parametrize("age", ["soon", "-1", "7x", ""])
    def test_invalid_age_deletes_nothing(self, shell: Shell, age: str) -> None:
        shell.install(PRUNER)
        done = shell.run("adapters", "prune", "--yes", f"--older-than={age}")
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(f"error: `--older-than {age}` is not a valid age.")


MERGE = ("adapters", "merge", "compatible", "--out", "new.gguf")


def names(shell: Shell) -> set[str]:
    return {each.name for each in shell.folder.iterdir() if "new.gguf" in each.name}


class TestConvertAndMerge:
    def test_convert_writes_a_file(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        done = shell.run("adapters", "convert", "compatible", "--out", "new.gguf")
        assert done == (0, "new.gguf is written.\n", "")
        assert (shell.folder / "new.gguf").read_text() == "GGUF for small:1b"

    def test_merge_takes_the_models_file(self, shell: Shell) -> None:
        shell.install(
            "from pathlib import Path; it = Echo(models=[ModelInfo(name='small:1b', path=Path('/x/base.gguf'))])"
        )
        assert shell.run(*MERGE) == (0, "new.gguf is written.\n", "merging\n")
        assert (shell.folder / "new.gguf").read_text() == "merged into base.gguf"

    def test_merge_takes_a_named_file(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        assert shell.run(*MERGE, "--base-file", "other.gguf").code == 0
        assert (shell.folder / "new.gguf").read_text() == "merged into other.gguf"

    def test_merge_draws_a_bar(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        child = shell.terminal(*MERGE, "--base-file", "other.gguf")
        child.expect("merging .*100.0/100.0 MB")
        child.expect("new.gguf is written.")
        assert shell.ends(child) == 0

    def test_merge_needs_a_file(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        done = shell.run(*MERGE)
        assert (done.code, done.out) == (2, "")
        assert "--base-file" in done.err

    def test_unfinished_merge_leaves_no_file(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        assert shell.run(*MERGE, "--base-file", "bad.gguf").err == "merging\nerror: That base is broken.\n"
        assert names(shell) == set()
        child = shell.terminal(*MERGE, "--base-file", "slow.gguf")
        child.expect("merging .*100.0/100.0 MB")
        child.sendintr()
        assert shell.ends(child) == 130
        assert names(shell) == set()

    @pytest.mark.parametrize(
        "command", [("convert", "compatible"), ("merge", "compatible", "--base-file", "base.gguf")]
    )
    def test_existing_file_needs_overwrite(self, shell: Shell, command: tuple[str, ...]) -> None:
        shell.install("it = Echo()")
        (shell.folder / "new.gguf").write_text("precious")
        done = shell.run("adapters", *command, "--out", "new.gguf")
        assert (done.code, done.err) == (
            2,
            "error: `new.gguf` already exists.\nhint: Choose another name, or add `--overwrite`.\n",
        )
        assert (shell.folder / "new.gguf").read_text() == "precious"
        assert shell.run("adapters", *command, "--out", "new.gguf", "--overwrite").code == 0
        assert (shell.folder / "new.gguf").read_text() != "precious"

    def test_unwritable_file_is_an_error(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        done = shell.run("adapters", "convert", "compatible", "--out", "nowhere/new.gguf")
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("error: `nowhere/new.gguf` cannot be written: No such file or directory.")

    def test_misfit_is_written_only_by_force(self, shell: Shell) -> None:
        shell.install("it = Echo()")
        command = ("adapters", "convert", "incompatible", "--out", "new.gguf")
        done = shell.run(*command)
        assert (done.code, names(shell)) == (1, set())
        assert "other width" in done.err
        assert shell.run(*command, "--force").code == 0
