"""The public interface for hosts and plugin authors, and what its import must not load."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Protocol, get_args

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from places import ROOT

import graftage
import graftage.testing
import graftage_ollama
from graftage import calls, exceptions, hookspecs, types
from graftage._engine.clients import Clients
from graftage.testing import Echo

MEMBERS = sorted(path.parent for path in ROOT.glob("*/pyproject.toml")) + sorted(
    path.parent for pattern in ("providers/*/pyproject.toml", "plugins/*/pyproject.toml") for path in ROOT.glob(pattern)
)
PROJECTS: dict[str, Any] = {
    member.relative_to(ROOT).as_posix(): tomllib.loads((member / "pyproject.toml").read_text(encoding="utf-8"))
    for member in MEMBERS
}
PUBLIC = [
    "graftage",
    "graftage.calls",
    "graftage.exceptions",
    "graftage.files",
    "graftage.footprint",
    "graftage.gguf",
    "graftage.hookspecs",
    "graftage.http",
    "graftage.retry",
    "graftage.settings",
    "graftage.testing",
    "graftage.types",
]


def in_order(names: list[str]) -> list[str]:
    """Sort names: constants, then classes, then the rest, each alphabetically."""
    return sorted(names, key=lambda name: (0 if name.isupper() else 1 if name[0].isupper() else 2, name))


def defined(module: str) -> set[str]:
    """Return the public names that a module defines itself."""
    source = inspect.getsource(importlib.import_module(module))
    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in found if not name.startswith("_")}


class TestPublicNames:
    @pytest.mark.parametrize("module", PUBLIC)
    def test_are_listed_in_order(self, module: str) -> None:
        loaded = importlib.import_module(module)
        assert list(loaded.__all__) == in_order(loaded.__all__)
        assert [name for name in loaded.__all__ if not hasattr(loaded, name)] == []

    @pytest.mark.parametrize("module", ["graftage.exceptions", "graftage.hookspecs", "graftage.types"])
    def test_cover_the_contract(self, module: str) -> None:
        assert set(importlib.import_module(module).__all__) == defined(module)

    def test_cover_the_imports_of_the_package(self) -> None:
        tree = ast.parse(inspect.getsource(graftage))
        imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert set(graftage.__all__) == imported

    def test_other_modules_are_private(self) -> None:
        modules = [name for _, name, _ in pkgutil.walk_packages(graftage.__path__, "graftage.")]
        open_ones = {name for name in modules if not any(part.startswith("_") for part in name.split("."))}
        parts = {name for name in open_ones if name.startswith(("graftage.http.", "graftage.testing."))}
        assert {"graftage", *open_ones} - parts == set(PUBLIC)

    def test_are_documented(self) -> None:
        nameless = [
            f"{module}.{name}"
            for module in PUBLIC
            for name in importlib.import_module(module).__all__
            if inspect.isclass(thing := getattr(importlib.import_module(module), name)) or inspect.isfunction(thing)
            if not inspect.getdoc(thing)
        ]
        assert nameless == []


def public_methods(kind: type) -> set[str]:
    return {name for name, value in vars(kind).items() if not name.startswith("_") and (callable(value) or value)}


class TestClients:
    def test_have_equal_methods_and_parameters(self) -> None:
        assert public_methods(graftage.Client) == public_methods(graftage.AsyncClient)
        different = [
            name
            for name in public_methods(graftage.Client)
            if callable(sync := getattr(graftage.Client, name))
            if inspect.signature(sync).parameters != inspect.signature(getattr(graftage.AsyncClient, name)).parameters
        ]
        assert different == []
        assert inspect.signature(graftage.connect).parameters == inspect.signature(graftage.connect_async).parameters
        assert not inspect.iscoroutinefunction(graftage.connect_async)

    def test_async_methods_are_awaited(self) -> None:
        plain = {
            name
            for name in public_methods(graftage.AsyncClient)
            if not inspect.iscoroutinefunction(vars(graftage.AsyncClient)[name])
        }
        assert plain == {"chat", "generate"}  # Their answer is awaited: a coroutine, or a stream.

    def test_sync_client_is_up_to_date(self) -> None:
        command = [sys.executable, str(ROOT / "scripts" / "make_client.py"), "--check"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")

    @pytest.mark.parametrize("client", [graftage.Client, graftage.AsyncClient], ids=["sync", "async"])
    def test_each_member_documents_itself(self, client: type) -> None:
        members = {name: member for name, member in inspect.getmembers(client) if not name.startswith("_")}
        assert {"chat", "provider", "stats"} <= set(members)
        for name, member in members.items():
            text = inspect.getdoc(member) or ""
            given = set(inspect.signature(member).parameters) - {"self"} if callable(member) else set()
            assert text.partition("\n")[0].endswith("."), name
            assert not [each for each in given if not re.search(rf"^    {each}: ", text, re.MULTILINE)], name


GROUPS = {
    "provider": hookspecs.PROVIDER_SPECS,
    "connection": hookspecs.CONNECTION_SPECS,
    "plugin": hookspecs.PLUGIN_SPECS,
}
SPECS = [spec for specs in GROUPS.values() for spec in specs]
HOOKS: dict[str, Any] = {
    name: value for spec in SPECS for name, value in vars(spec).items() if hasattr(value, "graftage_spec")
}
CONNECTION_HOOKS = {
    name for spec in hookspecs.CONNECTION_SPECS for name, value in vars(spec).items() if hasattr(value, "graftage_spec")
}


def answer_of(hook: str) -> str:
    """Return the declared result of a hook."""
    return str(inspect.signature(HOOKS[hook]).return_annotation)


STREAMS = {"chat", "generate", "pull_model"}


def implemented(folder: Path) -> set[str]:
    """Return the hooks that the modules in a folder implement."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                marks = [ast.unparse(mark).partition("(")[0] for mark in node.decorator_list]
                if "hookimpl" in marks:
                    found.add(node.name)
    return found


class TestHooks:
    def test_every_protocol_is_listed(self) -> None:
        protocols = [
            value
            for value in vars(hookspecs).values()
            if inspect.isclass(value)
            and value.__module__ == hookspecs.__name__
            and getattr(value, "_is_protocol", False)
        ]
        assert {each.__name__ for each in protocols} == {"MakeHttp", *(each.__name__ for each in SPECS)}
        assert all(issubclass(each, Protocol) for each in protocols)

    def test_one_protocol_for_each_operation(self) -> None:
        for spec in hookspecs.CONNECTION_SPECS:
            hooks = {name for name, value in vars(spec).items() if hasattr(value, "graftage_spec")}
            assert len(hooks) == 1, spec

    @pytest.mark.parametrize("hook", sorted(HOOKS))
    def test_docstrings_are_complete(self, hook: str) -> None:
        text = inspect.cleandoc(HOOKS[hook].__doc__)
        assert text.startswith("Called ")
        assert re.search(r"Since \d+\.\d+\.$", text)
        if "Raises:" in text:
            assert text.index("Called ") < text.index("Raises:") < text.index("Since ")
            named = re.findall(r"^    (\w+): \S", text, re.MULTILINE)
            assert named
            assert set(named) <= set(exceptions.__all__)
        if answer_of(hook).endswith("| None"):
            assert "None" in text

    @pytest.mark.parametrize("hook", sorted(CONNECTION_HOOKS - {"capabilities"}))
    def test_one_hook_for_both_modes(self, hook: str) -> None:
        wanted = "Stream[" if hook in STREAMS else "Once["
        assert answer_of(hook).startswith(wanted)
        assert f"a{hook}" not in HOOKS

    @pytest.mark.parametrize("hook", sorted(HOOKS))
    def test_take_at_most_one_object(self, hook: str) -> None:
        names = [name for name in inspect.signature(HOOKS[hook]).parameters if name != "self"]
        assert names in ([], ["request"], ["query"], ["event"])
        if names:
            annotation = inspect.signature(HOOKS[hook]).parameters[names[0]].annotation
            kind = getattr(calls, annotation, None) or getattr(hookspecs, annotation)
            assert dataclasses.is_dataclass(kind)

    def test_first_result_only_from_connections(self) -> None:
        first = {name for name, value in HOOKS.items() if value.graftage_spec["firstresult"]}
        plugin_hooks = {name for spec in hookspecs.PLUGIN_SPECS for name in vars(spec) if name in HOOKS}
        # `settings_model` is called for one plugin at a time.
        assert first == (HOOKS.keys() - plugin_hooks) | {"settings_model"}

    def test_optional_operations_are_features(self) -> None:
        always = {"health", "close", "capabilities"}
        assert CONNECTION_HOOKS - always <= set(get_args(types.Feature))

    def test_each_is_implemented_here(self) -> None:
        here = [ROOT / "core", ROOT / "providers", ROOT / "plugins", ROOT / "tests"]
        assert HOOKS.keys() - set().union(*map(implemented, here)) == set()

    def test_ollama_and_echo_implement_all(self) -> None:
        # The toolkit closes its clients without `close`. Ollama has no reranking, and warms up by a chat.
        for hook in CONNECTION_HOOKS - {"close", "rerank", "warm"}:
            assert hook in implemented(ROOT / "providers" / "ollama" / "graftage_ollama"), hook
        for hook in CONNECTION_HOOKS - {"close", "native"}:  # Echo has no server.
            assert hook in implemented(ROOT / "core" / "graftage" / "testing"), hook

    def test_ollama_and_echo_satisfy_the_protocols(self) -> None:
        found = [Echo().connect(request=None), graftage_ollama.connect(_connect_request())]  # type: ignore[arg-type] # Echo does not read it
        for connection in found:
            for spec in hookspecs.CONNECTION_SPECS:
                for name in vars(spec).keys() & CONNECTION_HOOKS & {*dir(connection)}:
                    given = inspect.signature(getattr(connection, name)).parameters
                    assert list(given) == [each for each in inspect.signature(HOOKS[name]).parameters if each != "self"]


def _connect_request() -> hookspecs.ConnectRequest:
    settings = graftage_ollama.settings_model()()
    return hookspecs.ConnectRequest(name="ollama", settings=settings, http=Clients(settings, "sync").make)


RECORDS = [
    value
    for module in (types, calls, hookspecs)
    for value in vars(module).values()
    if dataclasses.is_dataclass(value) and inspect.isclass(value) and value.__module__ == module.__name__
    if value is not calls.Budget
]
BUILT_BY_PLUGINS = {
    "AdapterInfo": {"name", "reference"},
    "Capabilities": {"features"},
    "Chunk": set(),
    "Embeddings": {"vectors"},
    "Health": {"level", "reachable"},
    "Limits": set(),
    "LoadedAdapter": {"name", "digest", "model"},
    "LoadedModel": {"name"},
    "Logprob": {"token", "logprob"},
    "ModelInfo": {"name"},
    "PromptProgress": {"total", "processed"},
    "PullProgress": {"status"},
    "Ranked": {"index", "score"},
    "Ranking": {"results"},
    "Timings": set(),
    "ToolCall": {"name", "arguments", "id"},
    "Usage": set(),
    "Verdict": {"status"},
}
"""The required fields of the first release. Another one would break plugins."""


def required(record: Any) -> list[bool]:
    """Return for each field, in order, whether it has no default."""
    missing = dataclasses.MISSING
    return [each.default is missing and each.default_factory is missing for each in dataclasses.fields(record)]


class TestRecords:
    @pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
    def test_are_frozen_slotted_and_keyword_only(self, record: Any) -> None:
        settings = record.__dataclass_params__
        assert settings.frozen
        assert "__slots__" in vars(record)
        assert not hasattr(record, "__dict__") or "__dict__" not in dir(object.__new__(record))
        assert all(each.kw_only for each in dataclasses.fields(record))

    @pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
    def test_required_fields_come_first(self, record: Any) -> None:
        assert required(record) == sorted(required(record), reverse=True)

    @pytest.mark.parametrize("name", BUILT_BY_PLUGINS)
    def test_required_fields_never_grow(self, name: str) -> None:
        record = getattr(types, name)
        names = [each.name for each in dataclasses.fields(record)]
        assert {name for name, wanted in zip(names, required(record), strict=True) if wanted} == BUILT_BY_PLUGINS[name]

    def test_requests_carry_their_call(self) -> None:
        requests = [each for each in RECORDS if each.__name__.endswith("Request")]
        without = {each.__name__ for each in requests if "call" not in {one.name for one in dataclasses.fields(each)}}
        assert without == {"ConnectRequest", "AnswersRequest"}


class TestDistributions:
    def test_share_one_version(self) -> None:
        umbrella = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        for folder, project in {"": umbrella, **PROJECTS}.items():
            assert project["project"]["dynamic"] == ["version"]
            read_from = (ROOT / folder / project["tool"]["hatch"]["version"]["path"]).resolve()
            assert read_from == ROOT / "core" / "graftage" / "_version.py"

    @pytest.mark.parametrize("member", [name for name in PROJECTS if name != "core"])
    def test_require_a_fitting_core(self, member: str) -> None:
        texts = PROJECTS[member]["project"]["dependencies"]
        (wanted,) = [each for each in map(Requirement, texts) if each.name == "graftage"]
        major, minor = map(int, graftage.__version__.split(".")[:2])
        assert wanted.specifier == SpecifierSet(f">={major}.{minor},<{major + 1}")

    @pytest.mark.parametrize("member", [name for name in PROJECTS if name != "core"])
    def test_name_their_one_plugin(self, member: str) -> None:
        project = PROJECTS[member]["project"]
        kind, name = member.split("/")
        points = project["entry-points"][f"graftage.{kind}"]
        assert list(points) == [name]
        assert project["name"] == f"graftage-{name}"
        assert points[name].partition(":")[0] == f"graftage_{name}"

    @pytest.mark.parametrize("member", PROJECTS)
    def test_have_readme_licence_and_types(self, member: str) -> None:
        project = PROJECTS[member]["project"]
        package = ROOT / member / project["name"].replace("-", "_")
        assert (package / "py.typed").is_file()
        assert (ROOT / member / project["readme"]).is_file()
        assert (project["license"], project["requires-python"]) == ("Apache-2.0", ">=3.11")

    def test_installed_entry_points_match(self) -> None:
        installed = {each.metadata["Name"]: each for each in importlib.metadata.distributions()}
        checked = []
        for project in (each["project"] for each in PROJECTS.values()):
            if project["name"] in installed:
                checked.append(project["name"])
                found = {(each.group, each.name, each.value) for each in installed[project["name"]].entry_points}
                wanted = {
                    (group, name, value)
                    for group, points in project.get("entry-points", {}).items()
                    for name, value in points.items()
                }
                assert wanted <= found
        assert {"graftage", "graftage-ollama"} <= set(checked)


def imports_of(path: Path) -> set[str]:
    """Return the top-level packages that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module or "")
    return {name.partition(".")[0] for name in found}


def loaded_by(code: str, *options: str) -> set[str]:
    """Return the modules that a new Python has imported after some code."""
    report = "\nimport sys\nprint('loaded', *sys.modules)"
    done = subprocess.run(
        [sys.executable, *options, "-c", code + report], capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stdout.rpartition("loaded ")[2].split())


HEAVY = {
    "anyio",
    "asyncio",
    "concurrent.futures",
    "difflib",
    "httpcore",
    "httpx",
    "importlib.metadata",
    "logging",
    "loguru",
    "msgspec",
    "numpy",
    "ollama",
    "packaging",
    "pluggy",
    "pydantic",
    "pydantic_settings",
    "rich",
    "ssl",
    "tenacity",
    "typer",
    "xllamacpp",
}


PARROT = """
import graftage
from graftage.hookspecs import hookimpl
from graftage.types import Chunk, Health

class Parrot:
    name = "parrot"

    @hookimpl
    def connect(self, request):
        return Perch()

class Perch:
    @hookimpl
    def chat(self, request):
        yield Chunk(text=request.messages[-1].content, finish_reason="stop")

    @hookimpl
    def health(self, request):
        return Health(level=request.level, reachable=True, api=True)

with graftage.connect(Parrot(), model="green") as llm:
    assert llm.chat("hello").text == "hello"
"""


class TestImports:
    @pytest.mark.parametrize("member", PROJECTS)
    def test_no_distribution_imports_another_plugin(self, member: str) -> None:
        own = PROJECTS[member]["project"]["name"].replace("-", "_")
        files = list((ROOT / member / own).rglob("*.py"))
        assert files
        # `graftage new` puts the provider's name in place of `graftage_NAME`.
        foreign = {
            f"{path.relative_to(ROOT)}: {name}"
            for path in files
            for name in imports_of(path)
            if name.startswith("graftage_") and name not in (own, "graftage_NAME")
        }
        assert foreign == set()

    def test_package_is_light(self) -> None:
        assert HEAVY & loaded_by("import graftage") == set()

    def test_public_names_are_light(self) -> None:
        assert HEAVY & loaded_by("from graftage import *\nTimeouts(total=3)\nenable_logging()") == set()

    def test_help_loads_no_provider(self) -> None:
        code = "import sys\nfrom graftage._cli.app import main\nsys.argv = ['graftage', '--help']\n"
        code += "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code\n"
        heavy = HEAVY & loaded_by(code)
        assert heavy & {"ollama", "httpx", "numpy", "pluggy", "pydantic", "xllamacpp", "ssl", "tenacity"} == set()

    def test_chat_loads_only_its_provider(self) -> None:
        loaded = loaded_by(PARROT)
        assert {name for name in loaded if name.startswith(("graftage_ollama", "graftage_llamacpp"))} == set()
        assert {"httpx", "loguru", "ollama", "tenacity", "xllamacpp"} & loaded == set()
