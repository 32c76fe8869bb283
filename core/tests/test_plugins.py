"""Plugins: found without an import, loaded only when needed, and left out if they are broken."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from giving import Giving
from operations import OPERATIONS
from plain import PlainEcho

import graftage
from graftage._engine.plugins import Catalog, Entry, PluginWarning
from graftage._version import __version__
from graftage.exceptions import (
    AdapterIncompatible,
    AdapterNotFound,
    GraftageError,
    PluginConflict,
    PluginError,
    PluginLoadError,
    ProviderError,
    ProviderNotFound,
    StreamInterrupted,
)
from graftage.hookspecs import CONTRACT, OLDEST_CONTRACT, hookimpl
from graftage.settings import PluginSettings, Settings
from graftage.testing import Echo
from graftage.types import AdapterInfo, Chunk, Health, Limits, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = "m:1"
HEAD = "from graftage.hookspecs import hookimpl\n"
PROVIDER = (
    HEAD
    + """
from graftage.types import Chunk, Health

class Connection:
    @hookimpl
    def chat(self, request):
        yield Chunk(text=f"{__name__} answers")
        yield Chunk(finish_reason="stop")

    @hookimpl
    def health(self, request):
        return Health(level=request.level, reachable=True, api=True)

@hookimpl
def connect(request):
    return Connection()
"""
)
OBSERVER = HEAD + "seen = []\n@hookimpl\ndef observe(event):\n    seen.append(event.kind)\n"


def entry_named(name: str) -> Entry:
    """Return the entry of a plugin after all were inspected."""
    (found,) = [entry for entry in Catalog().inspect_all() if entry.name == name]
    return found


@contextmanager
def left_out(name: str) -> Iterator[None]:
    """Expect only the warning that a plugin is left out."""
    with pytest.warns(PluginWarning, match=f"`{name}` is left out") as caught:
        yield
    assert len({str(each.message) for each in caught}) == 1


class TestDiscovery:
    def test_imports_no_plugin(self, site: Any) -> None:
        site.add(
            "graftage-oak",
            providers={"oak": "oak_provider"},
            plugins={"oak-policy": "oak_policy"},
            modules={"oak_provider": PROVIDER, "oak_policy": OBSERVER},
        )
        catalog = Catalog(environment={})
        assert {"oak", "oak-policy"} <= set(catalog.names())
        assert {entry.state for entry in catalog.entries} == {"available"}
        assert site.imported() == []

    def test_provider_is_imported_when_chosen(self, site: Any, both: Any) -> None:
        for name in ("oak", "elm"):
            site.add(f"graftage-{name}", providers={name: f"{name}_provider"}, modules={f"{name}_provider": PROVIDER})
        assert both.connect("oak", model=MODEL).chat("x").text == "oak_provider answers"
        assert site.imported() == ["oak_provider"]

    def test_enabled_plugins_are_loaded_and_called(self, site: Any, both: Any) -> None:
        site.add("graftage-eye", plugins={"eye": "eye_plugin"}, modules={"eye_plugin": OBSERVER})
        llm = both.connect(Echo(), model=MODEL)
        llm.chat("x")
        llm.close()
        import eye_plugin  # type: ignore[import-not-found] # it is there as long as the test runs

        assert eye_plugin.seen == ["start", "admitted", "first_chunk", "finish"]

    def test_second_client_repeats_no_checks(self, site: Any, both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        site.add(
            "graftage-oak",
            providers={"oak": "oak_provider"},
            plugins={"eye": "eye_plugin"},
            modules={"oak_provider": PROVIDER, "eye_plugin": OBSERVER},
            requires=["graftage>=0.2"],
        )
        monkeypatch.setattr("sys.dont_write_bytecode", True)  # Byte code would change the folder.
        assert both.connect("oak", model=MODEL).chat("x").text == "oak_provider answers"

        def never(*_: Any, **__: Any) -> Any:
            raise AssertionError("it is done again")

        monkeypatch.setattr("pluggy.PluginManager", never)
        monkeypatch.setattr("importlib.metadata.PathDistribution.read_text", never)
        assert both.connect("oak", model=MODEL).chat("x").text == "oak_provider answers"

    def test_metadata_is_read_once(self, site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        for number in range(100):
            site.add(f"graftage-oak{number}", providers={f"oak{number}": "oak_provider"})
        names = Catalog().names()
        assert f"oak{number}" in names

        def never(*_: Any) -> Any:
            raise AssertionError("it is read again")

        monkeypatch.setattr("importlib.metadata.PathDistribution.read_text", never)
        assert Catalog().names() == names
        assert not [entry for entry in Catalog().entries if entry.state == "quarantined"]

    def test_changed_module_is_checked_again(self, site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        site.add("graftage-oak", providers={"oak": "oak_provider"}, modules={"oak_provider": PROVIDER})
        graftage.connect("oak", model=MODEL).close()
        module: Any = sys.modules["oak_provider"]
        monkeypatch.setattr(module, "answer", hookimpl(lambda request: None), raising=False)
        module.answer.__name__ = "answer"
        with pytest.raises(PluginLoadError, match="implements `answer`"):
            graftage.connect("oak", model=MODEL)

    def test_entry_point_names_object_or_module(self, site: Any) -> None:
        source = PROVIDER.replace(
            "@hookimpl\ndef connect(request)", "class Tree:\n  @hookimpl\n  def connect(self, request)"
        )
        source = source.replace("    return Connection()", "      return Connection()") + "tree = Tree()\n"
        site.add("graftage-tree", providers={"tree": "tree_provider:tree"}, modules={"tree_provider": source})
        assert list(entry_named("tree").hooks) == ["connect"]
        assert graftage.connect("tree", model=MODEL).chat("x").text == "tree_provider answers"

    def test_unknown_provider_gets_the_nearest_name(self, site: Any) -> None:
        site.add("graftage-oak", providers={"oaktree": "oak_provider"})
        with pytest.raises(ProviderNotFound, match=r"`oaktre`.*Did you mean `oaktree`\?") as caught:
            graftage.connect("oaktre")
        assert caught.value.plugin == "oaktre"

    def test_unknown_provider_lists_the_installed(self, site: Any) -> None:
        site.add("graftage-oak", providers={"oaktree": "oak_provider"})
        with pytest.raises(ProviderNotFound, match=r"Installed: .*`oaktree`.*Install one"):
            graftage.connect("zzz")

    def test_editable_install_counts_once(self, site: Any, tmp_path: Path, monkeypatch: Any) -> None:
        # An editable install has metadata in the environment and beside the source.
        site.add("Graftage_Oak", providers={"oak": "oak_provider"}, modules={"oak_provider": PROVIDER})
        beside = tmp_path / "source"
        info = beside / "graftage_oak.egg-info"
        info.mkdir(parents=True)
        (info / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: graftage-oak\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[graftage.providers]\noak = oak_provider\n")
        monkeypatch.syspath_prepend(beside)
        assert Catalog().provider("oak").state == "loaded"

    def test_shared_object_is_called_once(self, site: Any, both: Any) -> None:
        site.add("graftage-eye", plugins={"eye": "twice_seen", "eye2": "twice_seen"}, modules={"twice_seen": OBSERVER})
        llm = both.connect(Echo(), model=MODEL)
        llm.chat("x")
        llm.close()
        import twice_seen  # type: ignore[import-not-found] # it is there as long as the test runs

        assert twice_seen.seen == ["start", "admitted", "first_chunk", "finish"]


OLD = "graftage>=0.0.1,<0.1"
BROKEN_PLUGINS = {
    "its import fails": (
        "import no_such_module_anywhere\n",
        "could not be imported: ModuleNotFoundError: .*no_such_mod",
    ),
    "its import raises": ("raise OSError('no sap')\n", "could not be imported: OSError: no sap"),
    "it ends the program": ("raise SystemExit('bye')\n", "could not be imported: SystemExit: bye"),
    "it is no Python": ("def observe(event\n", "could not be imported: SyntaxError"),
    "it is a class": (
        HEAD + "class it:\n    @hookimpl\n    def observe(self, event): ...\n",
        "is a class.*Register an instance: `it\\(\\)`",
    ),
    "a hook is misspelt": (
        HEAD + "@hookimpl\ndef resource_limit(query): ...\n",
        "implements `resource_limit`, which is not a hook. Did you mean `resource_limits`\\?",
    ),
    "a hook is unheard of": (
        HEAD + "@hookimpl\ndef zzz(query): ...\n",
        "implements `zzz`, which is not a hook. Hooks of a plugin: list_adapters, observe, pull_adapter",
    ),
    "a signature is wrong": (
        HEAD + "@hookimpl\ndef observe(happening): ...\n",
        "the hook `observe` with a wrong signature.*Its parameters are: event",
    ),
    "it wraps a hook": (
        HEAD + "@hookimpl(wrapper=True)\ndef observe(event):\n    return (yield)\n",
        "wraps the hook `observe`",
    ),
    "it wraps in the old way": (
        HEAD + "@hookimpl(hookwrapper=True)\ndef observe(event):\n    yield\n",
        "wraps the hook `observe`",
    ),
    "it answers chats": (HEAD + "@hookimpl\ndef chat(request): ...\n", "`chat`, which is a hook of a connection, not"),
    "it is a provider in the wrong group": (
        HEAD + "@hookimpl\ndef connect(request): ...\n",
        "`connect`, which is a hook of a provider, not of a plugin. Move it to a provider",
    ),
    "it has no hooks": ("def observe(event): ...\n", "implements no hook"),
    "it raises while it is registered": (
        OBSERVER + "def __dir__():\n    raise RuntimeError('boom')\n",
        "fails when it is inspected: RuntimeError: boom",
    ),
    "a hook would never be awaited": (
        HEAD + "@hookimpl\nasync def observe(event): ...\n",
        "implements `observe` as `async def`",
    ),
}


BROKEN_PROVIDERS = {
    "a wrong signature": (HEAD + "@hookimpl\ndef connect(wrong): ...\n", "wrong signature"),
    "a connection's hook": (HEAD + "@hookimpl\ndef chat(request): ...\n", "hook of a connection.*`connect` returns"),
    "a plugin's hook": (PROVIDER + "@hookimpl\ndef observe(event): ...\n", "hook of a plugin.*Move it to a plugin"),
    "an exit": ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
    "no object of that name": ("", "AttributeError"),
    "a broken reference": (None, "could not be imported"),
}


class TestQuarantine:
    @pytest.mark.parametrize("case", BROKEN_PLUGINS)
    def test_broken_plugin_has_origin_and_cause(self, site: Any, case: str) -> None:
        source, message = BROKEN_PLUGINS[case]
        at = "ill:it" if re.search(r"^(class )?it\b", source, re.MULTILINE) else "ill"
        site.add("graftage-ill", version="3.1", plugins={"ill": at}, modules={"ill": source})
        entry = entry_named("ill")
        assert (entry.state, entry.distribution, entry.version) == ("quarantined", "graftage-ill", "3.1")
        assert isinstance(entry.error, PluginLoadError)
        assert re.search(message, str(entry.error), re.DOTALL)
        assert "`ill` (graftage-ill 3.1)" in entry.error.message
        assert (entry.error.plugin, entry.error.distributions) == ("ill", ("graftage-ill 3.1",))
        assert entry.error.hint
        assert entry.plugin is None

    @pytest.mark.parametrize("case", BROKEN_PLUGINS)
    def test_broken_plugin_affects_no_other(self, site: Any, both: Any, watcher: Any, case: str) -> None:
        source, _ = BROKEN_PLUGINS[case]
        at = "ill:it" if re.search(r"^(class )?it\b", source, re.MULTILINE) else "ill"
        site.add("graftage-ill", plugins={"ill": at}, modules={"ill": source})
        with left_out("ill"):
            llm = both.opened(Echo(["fine"]), model=MODEL, plugins=[watcher])
        assert llm.chat("x").text == "fine"
        assert watcher.kinds() == ["start", "admitted", "first_chunk", "finish"]

    @pytest.mark.parametrize("case", BROKEN_PLUGINS)
    def test_is_an_error_under_strict_plugins(
        self, site: Any, both: Any, monkeypatch: pytest.MonkeyPatch, case: str
    ) -> None:
        source, message = BROKEN_PLUGINS[case]
        at = "ill:it" if re.search(r"^(class )?it\b", source, re.MULTILINE) else "ill"
        site.add("graftage-ill", plugins={"ill": at}, modules={"ill": source})
        monkeypatch.setenv("GRAFTAGE_STRICT_PLUGINS", "1")
        with pytest.raises(PluginLoadError) as caught:
            both.opened(Echo(), model=MODEL)
        assert re.search(message, str(caught.value), re.DOTALL)

    @pytest.mark.parametrize(("value", "strict"), [("", False), ("0", False), ("1", True)])
    def test_strict_plugins_is_a_switch(self, value: str, strict: bool) -> None:
        assert Catalog(environment={"GRAFTAGE_STRICT_PLUGINS": value}).strict is strict

    def test_failed_import_keeps_its_cause(self, site: Any) -> None:
        site.add("graftage-ill", providers={"ill": "ill"}, modules={"ill": "raise OSError('no sap')\n"})
        with pytest.raises(PluginLoadError) as caught:
            graftage.connect("ill")
        assert isinstance(caught.value.__cause__, OSError)
        assert str(caught.value.__cause__) == "no sap"

    @pytest.mark.parametrize("case", BROKEN_PROVIDERS)
    def test_broken_provider_fails_when_chosen(self, site: Any, both: Any, case: str) -> None:
        source, message = BROKEN_PROVIDERS[case]
        at = "ill:it" if source == "" else "ill" if source else "not a module!"
        site.add("graftage-ill", version="3.1", providers={"ill": at}, modules={"ill": source or ""})
        with pytest.raises(PluginLoadError) as caught:
            both.opened("ill", model=MODEL)
        assert re.search(message, str(caught.value), re.DOTALL)
        assert caught.value.distributions == ("graftage-ill 3.1",)

    def test_broken_provider_affects_no_other(self, site: Any, both: Any) -> None:
        site.add("graftage-ill", providers={"ill": "ill"}, modules={"ill": "raise OSError('no sap')\n"})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert both.connect(Echo(["fine"]), model=MODEL).chat("x").text == "fine"
        assert site.imported() == []


class TestMetadata:
    @pytest.mark.parametrize(
        ("requirement", "fits"),
        [
            ("graftage", True),
            ("graftage>=0.1,<1", True),
            ("Graftage>=0.1", True),
            (OLD, False),
            ("graftage>=99", False),
            ("Graftage (>=99)", False),
            ("graftage[testing]>=99", False),
            ("graftage>=99; python_version < '3'", True),
            ("graftage>=99; extra == 'testing'", True),
            ("graftage[testing]; extra == 'testing'", True),
            ("graftage<99,>=0", True),
            (f"graftage<{__version__}", False),
            (f"graftage<{__version__}.0", False),
            (f"graftage<{__version__}.1", True),
            (f"graftage>={__version__}.0", True),
            (f"graftage>={__version__}.1", False),
            (f"graftage>=0.1,!={__version__}", False),
            ("another>=99", True),
            ("!! no requirement at all", True),
        ],
    )
    def test_required_core_is_checked_before_import(self, site: Any, requirement: str, fits: bool) -> None:
        site.add(
            "graftage-oak",
            providers={"oak": "oak_provider"},
            requires=[requirement],
            modules={"oak_provider": PROVIDER},
        )
        entry = entry_named("oak")
        assert entry.state == ("loaded" if fits else "quarantined")
        if not fits:
            assert re.search(r"requires graftage.*, and this is \d", str(entry.error))
            assert site.imported() == []

    @pytest.mark.parametrize(
        ("metadata", "message"),
        [
            ("", "has broken metadata|without a name"),
            ("Metadata-Version: 2.1\nVersion: 1.0\n", "without a name or a version"),
            ("Metadata-Version: 2.1\nName: graftage-ill\n", "without a name or a version"),
            ("nonsense", "without a name or a version"),
        ],
    )
    def test_missing_fields_quarantine_that_plugin_alone(self, site: Any, metadata: str, message: str) -> None:
        site.add("graftage-ill", plugins={"ill": "ill"}, modules={"ill": OBSERVER}, metadata=metadata)
        site.add("graftage-eye", plugins={"eye": "eye_plugin"}, modules={"eye_plugin": OBSERVER})
        entry = entry_named("ill")
        assert entry.state == "quarantined"
        assert re.search(message, str(entry.error))
        assert entry_named("eye").state == "loaded"
        assert "ill" not in site.imported()

    def test_nameless_distribution_is_named_by_folder(self, site: Any) -> None:
        site.add("graftage-ill", plugins={"ill": "ill"}, metadata="Metadata-Version: 2.1\nVersion: 1.0\n")
        assert str(site.folder) in str(entry_named("ill").error)

    def test_undecodable_file_is_quarantined(self, site: Any) -> None:
        site.add("graftage-ill", plugins={"ill": "ill"}, modules={"ill": OBSERVER})
        (site.folder / "graftage_ill-1.0.dist-info" / "METADATA").write_bytes(b"Name: \xff\xfe\nVersion: 1\n")
        entry = entry_named("ill")
        assert entry.state == "quarantined"
        assert isinstance(entry.error, PluginLoadError)


class TestContract:
    """The number of the contract that a plugin was written for."""

    def test_current_or_none_is_loaded(self, site: Any) -> None:
        for name, line in ("silent", ""), ("current", f"graftage_contract = {CONTRACT}\n"):
            site.add(f"graftage-{name}", providers={name: name}, modules={name: PROVIDER + line})
            assert (entry_named(name).state, entry_named(name).contract) == ("loaded", CONTRACT)

    @pytest.mark.parametrize(
        ("number", "message"),
        [
            (
                CONTRACT + 1,
                (
                    f"is written for contract {CONTRACT + 1}, and Graftage {__version__} has contract {CONTRACT}. "
                    "Upgrade graftage: `pip install --upgrade graftage`."
                ),
            ),
            (
                OLDEST_CONTRACT - 1,
                (
                    f"is written for contract {OLDEST_CONTRACT - 1}, and Graftage {__version__} takes none before "
                    f"{OLDEST_CONTRACT}. Upgrade it, or install an older graftage."
                ),
            ),
            ("1.0", f"has an invalid `graftage_contract`. It must be a number: {CONTRACT}."),
            (True, f"has an invalid `graftage_contract`. It must be a number: {CONTRACT}."),
        ],
    )
    @pytest.mark.parametrize("kind", ["provider", "plugin"])
    def test_other_number_is_refused(self, site: Any, kind: str, number: object, message: str) -> None:
        source = (PROVIDER if kind == "provider" else OBSERVER) + f"graftage_contract = {number!r}\n"
        site.add("graftage-odd", **{f"{kind}s": {"odd": "odd"}}, modules={"odd": source})
        found = entry_named("odd")
        assert (found.state, found.contract) == ("quarantined", None)
        assert isinstance(found.error, PluginLoadError)
        assert str(found.error) == f"The {kind} `odd` (graftage-odd 1.0) {message}"

    def test_newer_object_is_refused_at_once(self, both: Any) -> None:
        class Newer(Echo):
            graftage_contract = CONTRACT + 1

        with pytest.raises(PluginLoadError, match=f"contract {CONTRACT + 1}"):
            both.opened(Newer(), model=MODEL)


class TestConflicts:
    def test_two_providers_of_one_name(self, site: Any, both: Any) -> None:
        site.add("graftage-oak", version="1.0", providers={"tree": "oak_provider"}, modules={"oak_provider": PROVIDER})
        site.add("graftage-elm", version="2.0", providers={"tree": "elm_provider"}, modules={"elm_provider": PROVIDER})
        with pytest.raises(PluginConflict) as caught:
            both.opened("tree", model=MODEL)
        assert sorted(caught.value.distributions) == ["graftage-elm 2.0", "graftage-oak 1.0"]
        assert "graftage-elm 2.0" in str(caught.value)
        assert "graftage-oak 1.0" in str(caught.value)
        assert site.imported() == []

    def test_two_plugins_of_one_name(self, site: Any, both: Any) -> None:
        for name in ("oak", "elm"):
            site.add(f"graftage-{name}", plugins={"eye": f"{name}_eye"}, modules={f"{name}_eye": OBSERVER})
        with pytest.warns(PluginWarning, match=r"claimed by .* and ") as caught:
            assert both.connect(Echo(["fine"]), model=MODEL).chat("x").text == "fine"
        assert len(caught) == 2
        assert site.imported() == []

    def test_provider_and_plugin_may_share_a_name(self, site: Any) -> None:
        site.add(
            "graftage-oak",
            providers={"oak": "oak_provider"},
            plugins={"oak": "oak_eye"},
            modules={"oak_provider": PROVIDER, "oak_eye": OBSERVER},
        )
        both_of_them = [entry for entry in Catalog().inspect_all() if entry.name == "oak"]
        assert [(entry.kind, entry.state) for entry in both_of_them] == [("provider", "loaded"), ("plugin", "loaded")]


class TestDisabledPlugins:
    def test_plugins_are_not_imported(self, site: Any, both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("eye", "ear"):
            site.add(f"graftage-{name}", plugins={name: f"{name}_plugin"}, modules={f"{name}_plugin": OBSERVER})
        monkeypatch.setenv("GRAFTAGE_DISABLED_PLUGINS", "nobody, eye")
        both.connect(Echo(), model=MODEL).chat("x")
        assert site.imported() == ["ear_plugin"]
        assert entry_named("eye").state == "disabled"
        assert site.imported() == ["ear_plugin"]

    def test_provider_cannot_be_chosen(self, site: Any, both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        site.add("graftage-oak", providers={"oak": "oak_provider"}, modules={"oak_provider": PROVIDER})
        monkeypatch.setenv("GRAFTAGE_DISABLED_PLUGINS", "oak")
        with pytest.raises(ProviderNotFound, match=r"disabled.*GRAFTAGE_DISABLED_PLUGINS"):
            both.opened("oak", model=MODEL)
        assert site.imported() == []

    def test_name_disables_both_rivals(self, site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("oak", "elm"):
            site.add(f"graftage-{name}", plugins={"eye": f"{name}_eye"}, modules={f"{name}_eye": OBSERVER})
        monkeypatch.setenv("GRAFTAGE_DISABLED_PLUGINS", "eye,lora,m4")
        assert Catalog().plugins() == []


class Policy:
    """A strict policy that keeps its queries."""

    def __init__(self, name: str = "policy", **limits: Any) -> None:
        self.name = name
        self.limits = Limits(**limits)
        self.asked: list[Any] = []

    @hookimpl
    def resource_limits(self, query: Any) -> Limits:
        self.asked.append(query)
        return self.limits


class TestPassedObjects:
    """Plugins passed to `connect` as objects."""

    def test_need_no_installation(self, both: Any) -> None:
        policy = Policy(max_tokens=2)
        reply = both.connect(Echo(["a b c"]), model=MODEL, plugins=[policy]).chat("x")
        assert (reply.text, reply.finish_reason) == ("a b ", "length")
        assert policy.asked[0].operation == "chat"

    def test_module_works(self, both: Any) -> None:
        seen: list[str] = []
        module = ModuleType("some.observer")
        module.observe = hookimpl(lambda event: seen.append(event.kind))  # type: ignore[attr-defined] # a module is open
        llm = both.connect(Echo(), model=MODEL, plugins=[module])
        llm.chat("x")
        llm.close()
        assert seen == ["start", "admitted", "first_chunk", "finish"]

    def test_replace_the_installed_namesake(self, site: Any, both: Any) -> None:
        site.add("graftage-eye", plugins={"policy": "eye_plugin"}, modules={"eye_plugin": OBSERVER})
        assert both.connect(Echo(["a b"]), model=MODEL, plugins=[Policy(max_tokens=1)]).chat("x").text == "a "
        assert site.imported() == []

    def test_broken_one_is_an_error(self, both: Any) -> None:
        class Misspelt:
            @hookimpl
            def observes(self, event: Any) -> None: ...

        with pytest.raises(PluginLoadError, match=r"`misspelt` .*Did you mean `observe`"):
            both.opened(Echo(), model=MODEL, plugins=[Misspelt()])
        with pytest.raises(PluginLoadError, match=r"is a class.*`Policy\(\)`"):
            both.opened(Echo(), model=MODEL, plugins=[Policy])
        with pytest.raises(PluginLoadError, match=r"is a class.*`Echo\(\)`"):
            both.opened(Echo, model=MODEL)

    def test_same_one_twice_counts_once(self, both: Any, watcher: Any) -> None:
        both.connect(Echo(), model=MODEL, plugins=[watcher, watcher]).chat("x")
        assert watcher.kinds() == ["start", "admitted", "first_chunk", "finish"]

    def test_two_of_one_name_conflict(self, both: Any) -> None:
        with pytest.raises(PluginConflict, match=r"`policy` is claimed.*a different `name`"):
            both.opened(Echo(), model=MODEL, plugins=[Policy(), Policy()])

    def test_optional_hook_may_be_unknown(self, both: Any) -> None:
        class Ahead:
            """A plugin for a later version of Graftage."""

            name = "ahead"
            seen = 0

            @hookimpl(optionalhook=True)
            def a_hook_of_next_year(self, request: Any) -> None: ...

            @hookimpl
            def observe(self, event: Any) -> None:
                self.seen += 1

        ahead = Ahead()
        llm = both.connect(Echo(), model=MODEL, plugins=[ahead])
        llm.chat("x")
        llm.close()
        assert ahead.seen == 4

    def test_hook_may_omit_its_parameter(self, both: Any) -> None:
        class Flat:
            @hookimpl
            def resource_limits(self) -> Limits:
                return Limits(max_tokens=1)

        assert both.connect(Echo(["a b"]), model=MODEL, plugins=[Flat()]).chat("x").text == "a "


class Answering:
    """A minimal connection."""

    @hookimpl
    def chat(self, request: Any) -> Any:
        yield Chunk(text="fine", finish_reason="stop")

    @hookimpl
    def health(self, request: Any) -> Health:
        return Health(level=request.level, reachable=True, api=True)


class Speechless:
    @hookimpl
    def health(self, request: Any) -> Any: ...


class Wrapping(Answering):
    @hookimpl(wrapper=True)
    def generate(self, request: Any) -> Any:
        return (yield)


class Watching(Answering):
    @hookimpl
    def observe(self, event: Any) -> None: ...


class Misspelling(Answering):
    @hookimpl
    def embedd(self, request: Any) -> None: ...


class Unawaited(Answering):
    @hookimpl
    async def chat(self, request: Any) -> Any:
        return iter(())


class Yielding(Answering):
    @hookimpl
    async def embed(self, request: Any) -> Any:
        yield


class Twin(Answering):
    @hookimpl
    async def achat(self, request: Any) -> Any:
        yield


class Mistyped(Answering):
    adress = "somewhere"


class Exploding(Answering):
    @property
    def address(self) -> str:
        raise RuntimeError("boom")


AUTHORS_HEAD = (
    HEAD
    + """
from graftage.types import *
class MyError(Exception): pass
"""
)
AUTHORS_TAIL = """
@hookimpl
def connect(request):
    return Connection()
"""
CHAT = """
    @hookimpl
    async def chat(self, request):
        yield Chunk(finish_reason="stop")
"""
FORGOTTEN: dict[str, tuple[str, str, str]] = {
    "chat without yield": ("def chat(self, request): pass", "chat", r"`chat` returned None .*`yield`"),
    "chat that returns a reply": (
        "def chat(self, request): return Reply(text='x')",
        "chat",
        r"returned Reply .*`yield`",
    ),
    "chat of texts": ("async def chat(self, request): yield 'text'", "chat", "gave str instead of a Chunk"),
    "a chunk of dicts": (
        "async def chat(self, request): yield Chunk(tool_calls=[{}], finish_reason='stop')",
        "chat",
        r"wrong `tool_calls`.*`ToolCall`",
    ),
    "usage as a dict": (
        "async def chat(self, request): yield Chunk(finish_reason='stop', usage={})",
        "chat",
        "wrong `usage`.*`Usage`",
    ),
    "a field that is missing": (
        "async def embed(self, request): return Embeddings()",
        "embed",
        r"missing 1 required keyword-only argument: 'vectors'.* in `embed` \(oak\.py, line \d+\)",
    ),
    "a field that is not": (
        "async def chat(self, request): yield Chunk(content='x')",
        "chat",
        r"unexpected keyword argument 'content'.* in `chat` \(oak\.py",
    ),
    "an attribute that is not": (
        "def chat(self, request): yield Chunk(text=request.prompt)",
        "chat",
        r"'ChatRequest' object has no attribute 'prompt'.* in `chat` \(oak\.py",
    ),
    "an error of its own": (
        "async def chat(self, request):\n        raise MyError(request.messages[0].content)\n        yield",
        "chat",
        r"failed with MyError in `chat` \(oak\.py, line \d+\); .*`graftage\.exceptions`",
    ),
    "embed that gives None": (
        "async def embed(self, request): pass",
        "embed",
        "`embed` with None instead of Embeddings",
    ),
    "plain embed that gives None": (
        "def embed(self, request): pass",
        "embed",
        "`embed` with None instead of Embeddings",
    ),
    "a list for a tuple": ("async def list_models(self, request): return []", "models", "with list instead of tuple"),
    "a tuple of names": ("def list_models(self, request): return ('a',)", "models", "with str among its ModelInfos"),
    "a pull of dicts": ("async def pull_model(self, request): yield {}", "pull", "gave dict instead of a PullProgress"),
    "capabilities as a set": ("def capabilities(self): return {'tools'}", "chat", "with set instead of Capabilities"),
    "a hook without its mark": (
        "pass\n\n    def embed(self, request): ...",
        "embed",
        "`embed` that is not marked.*@hookimpl",
    ),
    "a misspelt hook": ("async def chatt(self, request): yield", "chat", "implements `chatt`, .*Did you mean `chat`"),
    "a generator that answers once": ("async def embed(self, request): yield 1", "chat", "`embed` as a generator"),
}


def asked_of(llm: Any, operation: str) -> Any:
    ask = getattr(llm, operation)
    return ask("a secret") if operation in ("chat", "embed") else ask()


UNMARKED = """
class Connection:
    def chat(self, request): ...
    @hookimpl
    def embed(self, request): ...
@hookimpl
def connect(request):
    return Connection()
"""


class TestAuthorMistakes:
    """What an author of a plugin gets wrong is an error that names the plugin and its distribution."""

    @pytest.mark.parametrize(
        ("connection", "message"),
        [
            (Speechless(), "lacks a required hook"),
            (Wrapping(), "wraps the hook `generate`"),
            (Watching(), "`observe`, which is a hook of a plugin"),
            (Misspelling(), "Did you mean `embed`"),
            (Unawaited(), "`chat` as `async def` without `yield`.*async generator"),
            (Yielding(), "`embed` as a generator.*`return`"),
            (Twin(), "`achat`.*Did you mean `chat`"),
            (Mistyped(), "attribute `adress`.*Did you mean `address`"),
            (Answering, "is a class"),
            (None, "has no connection"),
            ("a string", "implements no hook"),
            (Exploding(), "RuntimeError: boom"),
        ],
    )
    def test_in_a_connection(self, both: Any, connection: Any, message: str) -> None:
        with pytest.raises(PluginLoadError) as caught:
            both.opened(Giving(lambda _: connection), model=MODEL)
        assert re.search(message, str(caught.value), re.DOTALL)
        assert "`giving`" in str(caught.value)
        assert caught.value.plugin == "giving"

    @pytest.mark.parametrize("case", FORGOTTEN)
    def test_forgotten_in_a_hook(self, both: Any, site: Any, case: str) -> None:
        hook, operation, message = FORGOTTEN[case]
        chat = "" if hook.startswith(("def chat(", "async def chat(")) else CHAT
        marked = "" if hook.startswith("pass") else "@hookimpl"
        source = f"{AUTHORS_HEAD}class Connection:{chat}\n    {marked}\n    {hook}\n{AUTHORS_TAIL}"
        site.add("graftage-oak", version="1.2", providers={"oak": "oak"}, modules={"oak": source})
        with pytest.raises(GraftageError) as caught:
            asked_of(both.connect("oak", model=MODEL), operation)
        assert re.search(message, str(caught.value), re.DOTALL)
        assert "`oak`" in str(caught.value)
        assert "graftage-oak 1.2" in str(caught.value)
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("@hookimpl\ndef settings_model():\n    pass\ndef connect(request): ...", "lacks the hook `connect`"),
            ("@hookimpl\ndef connect(request):\n    yield", "`connect` as a generator.*`return`"),
            ("@hookimpl\ndef connect(request):\n    pass", "`connect` returned None"),
            ("@hookimpl\ndef connect(request):\n    raise KeyError('k')", "failed in `connect` with KeyError"),
            (UNMARKED, "Put `@hookimpl` above its `chat`"),
        ],
        ids=["connect unmarked", "connect as a generator", "connect without return", "connect fails", "chat unmarked"],
    )  # fmt: skip
    def test_forgotten_in_connect(self, both: Any, site: Any, source: str, message: str) -> None:
        site.add("graftage-oak", version="1.2", providers={"oak": "oak"}, modules={"oak": HEAD + source + "\n"})
        with pytest.raises(PluginLoadError) as caught:
            both.opened("oak", model=MODEL)
        assert re.search(message, str(caught.value), re.DOTALL)
        assert "graftage-oak 1.2" in str(caught.value)

    @pytest.mark.parametrize(
        "hook", ["def resource_limits(query): return {}", "def resource_limits(query): raise KeyError"]
    )
    def test_in_a_policy(self, both: Any, site: Any, hook: str) -> None:
        site.add("graftage-oak", version="1.2", plugins={"oak": "oak"}, modules={"oak": f"{HEAD}@hookimpl\n{hook}\n"})
        with pytest.raises(PluginError, match=r"The policy `oak` \(graftage-oak 1\.2\)"):
            both.connect(Echo(), model=MODEL).chat("x")

    def test_missing_last_chunk(self, both: Any) -> None:
        class Connection:
            @hookimpl
            async def chat(self, request: Any) -> Any:
                yield Chunk(text="so far")

        with pytest.raises(StreamInterrupted, match="last Chunk must have a `finish_reason`"):
            both.connect(Giving(lambda _: Connection()), model=MODEL).chat("x")


def test_each_client_calls_its_own_provider(site: Any, both: Any) -> None:
    site.add("graftage-oak", providers={"oak": "oak_provider"}, modules={"oak_provider": PROVIDER})
    first, second = Echo(["one"]), Echo(["two"])
    llms = both.connect(first, model=MODEL), both.connect(second, model=MODEL)
    assert [llm.chat("x").text for llm in llms] == ["one", "two"]
    assert (len(first.requests), len(second.requests)) == (1, 1)
    assert site.imported() == []


class Failing:
    """A plugin that always fails and counts its calls."""

    def __init__(self, error: BaseException, name: str = "failing") -> None:
        self.name = name
        self.error = error
        self.asked = 0

    def _fail(self) -> Any:
        self.asked += 1
        raise self.error


class FailingObserver(Failing):
    @hookimpl
    def observe(self, event: Any) -> None:
        self._fail()


class FailingPolicy(Failing):
    @hookimpl
    def resource_limits(self, query: Any) -> Limits:
        return self._fail()  # type: ignore[no-any-return] # it never returns


class FailingResolver(Failing):
    @hookimpl
    def resolve_adapter(self, request: Any) -> Any:
        return self._fail()

    @hookimpl
    def list_adapters(self) -> Any:
        return self._fail()


class FoundAdapter:
    """An adapter from a resolver."""

    name = "bonsai"
    digest = "sha256:0"
    scale = 1.0
    served_as = None
    verdict = Verdict(status="compatible")

    def gguf(self, base: Any) -> Path:
        return Path("bonsai.gguf")

    def merge(self, base_file: Path, out: Path, on_progress: Any = None) -> Path:
        return out


class Resolver:
    """A resolver of one adapter."""

    name = "resolver"

    @hookimpl
    def resolve_adapter(self, request: Any) -> Any:
        return FoundAdapter() if request.reference == "bonsai" else None

    @hookimpl
    def list_adapters(self) -> list[AdapterInfo]:
        return [AdapterInfo(name="bonsai", reference="bonsai")]


class TestFailingPlugins:
    def test_observer_is_dropped(self, both: Any, watcher: Any) -> None:
        bad = FailingObserver(ValueError("blind"))
        llm = both.connect(Echo(["one", "two"]), model=MODEL, plugins=[bad, watcher])
        assert [llm.chat("x").text, llm.chat("x").text] == ["one", "two"]
        llm.close()
        assert bad.asked == 1
        assert watcher.kinds() == ["start", "admitted", "first_chunk", "finish"] * 2

    def test_policy_fails_the_call(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL, plugins=[FailingPolicy(KeyError("k"), "stern")])
        with pytest.raises(PluginError, match=r"`stern` failed with KeyError.*GRAFTAGE_DISABLED_PLUGINS") as caught:
            llm.chat("x")
        assert caught.value.plugin == "stern"
        assert isinstance(caught.value.__cause__, KeyError)
        assert echo.requests == []
        assert llm.stats().running == 0

    def test_policy_with_invalid_result_fails_the_call(self, both: Any) -> None:
        class Nonsense:
            name = "nonsense"

            @hookimpl
            def resource_limits(self, query: Any) -> Any:
                return {"max_tokens": 1}

        with pytest.raises(PluginError, match="`nonsense` returned dict instead of Limits"):
            both.connect(Echo(), model=MODEL, plugins=[Nonsense()]).chat("x")

    def test_resolver_passes_to_the_next(self, both: Any) -> None:
        bad = FailingResolver(OSError("disk on fire"))
        llm = both.connect(Echo(["fine"]), model=MODEL, plugins=[bad, Resolver()])
        reply = llm.chat("x", adapter="bonsai")
        assert (reply.text, reply.adapter) == ("fine", "bonsai")
        assert bad.asked == 1

    def test_unresolved_adapter_lists_all_reasons(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL, plugins=[FailingResolver(OSError("disk on fire")), Resolver()])
        with pytest.raises(AdapterNotFound) as caught:
            llm.chat("x", adapter="oak")
        reasons = "\n".join(caught.value.reasons)
        assert re.search(r"failing.*disk on fire", reasons)
        assert "resolver" in reasons
        assert caught.value.reference == "oak"

    def test_resolver_may_end_the_search(self, both: Any) -> None:
        certain = FailingResolver(AdapterIncompatible("It is for another tree.", reference="bonsai"), "a-certain")
        llm = both.connect(Echo(), model=MODEL, plugins=[certain, Resolver()])
        with pytest.raises(AdapterIncompatible, match="another tree"):
            llm.chat("x", adapter="bonsai")

    def test_failed_list_hides_no_other(self, both: Any) -> None:
        llm = both.connect(Echo(), model=MODEL, plugins=[FailingResolver(OSError("disk on fire")), Resolver()])
        assert [each.name for each in llm.adapters()] == ["", "bonsai"]


CLAIM = b"[graftage.plugins]\nill = ill\n"
NOT_TEXT = b"[console_scripts]\nf\xe9 = a\n"
STRANGERS: dict[str, bytes | None] = {
    "a line without a value": b"[console_scripts]\nfoo\n",
    "Latin-1": NOT_TEXT,
    "UTF-16": "[console_scripts]\nfoo = a\n".encode("utf-16"),
    "zero bytes": b"\0\0\0\n[\0]\n\0 = \0\n",
    "no section": b"foo = a\n",
    "a section that is not closed": b"[console_scripts\nfoo = a\n",
    "the same section and name twice": b"[a]\nb = c\nb = c\n[a]\nb = d\n",
    "no reference": b"[console_scripts]\nfoo = 1+1\n",
    "a folder in its place": None,
    "our section without entries": b"[graftage.plugins]\n\n[graftage.providers]\n",
    "our section with an entry that has no name": b"[graftage.providers]\n= a\n",
}
CLAIMS = {
    "not UTF-8": (NOT_TEXT + CLAIM, "entry_points.txt that is not UTF-8"),
    "no value": (b"[graftage.plugins]\nill\n", "could not be imported: "),
    "no reference": (b"[graftage.plugins]\nill = 1+1\n", "could not be imported: "),
    "a zero byte": (b"[graftage.plugins]\nill = i\0l\n", "could not be imported: "),
    "claimed twice": (b"[graftage.plugins]\nill = a\nill = b\n", "claimed by graftage-ill 1.0 and graftage-ill 1.0"),
}
READABLE = {
    "a mark of byte order": b"\xef\xbb\xbf" + CLAIM,
    "line ends of Windows": CLAIM.replace(b"\n", b"\r\n"),
    "comments": b"# one\n; two\n[graftage.plugins]\n; ill = no\n# ill = no\nill = ill\n",
    "the same line twice": CLAIM + b"ill = ill\n",
    "other lines that make no sense": b"foo\n[x\n" + CLAIM,
}


def damage(site: Any, distribution: str, entry_points: bytes | None) -> None:
    """Replace the entry points of a distribution."""
    (file,) = site.folder.glob(f"{distribution.replace('-', '_')}-*.dist-info/entry_points.txt")
    if entry_points is None:
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(entry_points)


class TestDamagedMetadata:
    @pytest.mark.parametrize("case", STRANGERS)
    def test_of_another_distribution_is_ignored(self, site: Any, both: Any, case: str) -> None:
        site.add("a-stranger")
        damage(site, "a-stranger", STRANGERS[case])
        site.add("graftage-oak", providers={"oak": "oak_provider"}, modules={"oak_provider": PROVIDER})
        assert both.connect("oak", model=MODEL).chat("x").text == "oak_provider answers"
        assert not any(entry.distribution == "a-stranger" for entry in Catalog().entries)

    @pytest.mark.parametrize("case", STRANGERS)
    def test_of_another_distribution_stops_no_program(self, site: Any, case: str) -> None:
        site.add("a-stranger")
        damage(site, "a-stranger", STRANGERS[case])
        program = "import graftage as g; from graftage.testing import Echo\n"
        program += "print(g.connect(Echo(), model='m').chat('hi').text)"
        # Our dependencies also read all metadata, once in a process, so the test needs its own process.
        path = os.pathsep.join([str(site.folder), *sys.path])
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.stdout, done.returncode) == ("hi\n", 0), done.stderr

    @pytest.mark.parametrize("case", CLAIMS)
    def test_of_a_plugin_quarantines_it_alone(self, site: Any, both: Any, case: str) -> None:
        source, message = CLAIMS[case]
        site.add("graftage-ill", plugins={"ill": "ill"}, modules={"ill": OBSERVER})
        site.add("graftage-eye", plugins={"eye": "eye_plugin"}, modules={"eye_plugin": OBSERVER})
        damage(site, "graftage-ill", source)
        with left_out("ill"):
            both.connect(Echo(), model=MODEL).chat("x")
        entries = {entry.name: entry for entry in Catalog().inspect_all() if entry.kind == "plugin"}
        assert (entries["ill"].state, entries["eye"].state) == ("quarantined", "loaded")
        assert message in str(entries["ill"].error)
        assert "ill" not in site.imported()

    @pytest.mark.parametrize("case", READABLE)
    def test_odd_but_readable_entry_points_load(self, site: Any, case: str) -> None:
        site.add("graftage-ill", plugins={"ill": "ill"}, modules={"ill": OBSERVER})
        damage(site, "graftage-ill", READABLE[case])
        assert entry_named("ill").state == "loaded"

    @pytest.mark.parametrize("metadata", ["", "Version: 1.0\n", "Name: graftage-oak\n"])
    def test_remains_of_an_update_are_ignored(self, site: Any, both: Any, metadata: str) -> None:
        # The remains of an interrupted update; some sort before the complete distribution, some after.
        for version in ("0.9", "1.1"):
            site.add("graftage-oak", version=version, providers={"oak": "no_such_module"}, metadata=metadata)
        site.add("graftage-oak", providers={"oak": "oak_provider"}, modules={"oak_provider": PROVIDER})
        assert both.connect("oak", model=MODEL).chat("x").text == "oak_provider answers"

    def test_first_on_the_path_wins(self, site: Any, tmp_path: Path, monkeypatch: Any) -> None:
        site.add("graftage-oak", plugins={"oak": "oak_plugin"}, modules={"oak_plugin": OBSERVER})
        newer = tmp_path / "newer"
        (newer / "graftage_oak-2.0.dist-info").mkdir(parents=True)
        (newer / "graftage_oak-2.0.dist-info" / "METADATA").write_text("Name: Graftage.Oak\nVersion: 2.0\n")
        monkeypatch.syspath_prepend(newer)
        assert "oak" not in Catalog().names()

    @pytest.mark.parametrize("folder", ["/no/such/folder", __file__, ""])
    def test_odd_search_path_entries_are_skipped(self, site: Any, both: Any, monkeypatch: Any, folder: str) -> None:
        site.add("graftage-oak", providers={"oak": "oak_provider"}, modules={"oak_provider": PROVIDER})
        monkeypatch.setattr(sys, "path", [folder, *sys.path])
        assert both.connect("oak", model=MODEL).chat("x").text == "oak_provider answers"

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"no archive"])
    def test_broken_archives_are_skipped(
        self, site: Any, both: Any, monkeypatch: Any, tmp_path: Path, content: bytes
    ) -> None:
        for name in ("old.egg", "new.zip", "linked.egg-link"):
            (tmp_path / name).write_bytes(content)
            monkeypatch.syspath_prepend(tmp_path / name)
        site.add("graftage-oak", providers={"oak": "oak_provider"}, modules={"oak_provider": PROVIDER})
        assert both.connect("oak", model=MODEL).chat("x").text == "oak_provider answers"


class Panic(BaseException):
    """Like the error of an extension after a panic in Rust."""


ENDS: dict[str, BaseException] = {
    "exit": SystemExit(0),
    "exit with words": SystemExit("bye"),
    "panic": Panic("oh"),
    "cancel": asyncio.CancelledError(),
}


class Mute(Exception):
    """An error whose `str()` fails."""

    def __str__(self) -> str:
        raise SystemExit


def test_error_with_failing_str_is_handled(both: Any, watcher: Any) -> None:
    plugins = [FailingObserver(Mute()), watcher, FailingResolver(Mute(), "bad"), Resolver()]
    llm = both.connect(Echo(["one"]), model=MODEL, plugins=plugins)
    assert llm.chat("x", adapter="bonsai").text == "one"
    assert "finish" in watcher.kinds()
    assert "bonsai" in [each.name for each in llm.adapters()]
    with pytest.raises(PluginError, match="`stern` failed with Mute"):
        both.connect(Echo(), model=MODEL, plugins=[FailingPolicy(Mute(), "stern")]).chat("x")
    with pytest.raises(ProviderError, match="`ending` failed with Mute"):
        both.connect(Ending(Mute(), "chat"), model=MODEL).chat("x")
    with pytest.raises(PluginLoadError, match="`ending` failed in `connect` with Mute"):
        both.opened(Ending(Mute(), "connect"))


class Ending(Echo):
    """A provider that ends the program in one hook or property of its connection."""

    name = "ending"

    def __init__(self, end: BaseException, at: str, **more: Any) -> None:
        super().__init__(**more)
        self.end = end
        self.at = at

    def note(self, hook: str, request: Any) -> None:
        if self.at == hook:
            raise self.end
        super().note(hook, request)

    @hookimpl
    def settings_model(self) -> Any:
        if self.at == "settings_model":
            raise self.end
        return Settings

    @hookimpl
    def connect(self, request: Any) -> Any:
        if self.at == "connect":
            raise self.end
        connection: Any = super().connect(request)
        if self.at in ("address", "default_model"):

            def fail(_: Any) -> Any:
                raise self.end

            connection.__class__ = type("Odd", (type(connection),), {self.at: property(fail)})
        return connection


class PlainEnding(Ending, PlainEcho):
    """The same with plain hooks."""


CALLS: dict[str, Any] = {
    **OPERATIONS,
    "delete_model": lambda llm: llm.delete(MODEL),
    "count_tokens": lambda llm: llm.count_tokens("x"),
    "rerank": lambda llm: llm.rerank("x", ["y"]),
    "prune_adapters": lambda llm: llm.prune_adapters(),
    "health": lambda llm: llm.health(max_age=0).raise_for_error(),
}


# Each call with one way to end, each way with `chat`: all ways go through the same code.
ENDED = [*zip(CALLS, itertools.cycle(ENDS), strict=False), *(("chat", end) for end in ENDS)]


def close_in(mode: str, provider: Any) -> None:
    """Open and close a client."""

    async def work() -> None:
        async with graftage.connect_async(provider, model=MODEL):
            pass

    if mode == "async":
        asyncio.run(work())
    else:
        with graftage.connect(provider, model=MODEL):
            pass


class OnLoop(Ending):
    """The same on the background event loop."""

    @hookimpl
    def connect(self, request: Any) -> Any:
        connection: Any = super().connect(request)
        connection.__class__ = type("Needy", (type(connection),), {"needs_event_loop": True})
        return connection


class InThread(Giving):
    """A provider that runs a function which interrupts its thread."""

    def __init__(self, end: BaseException, _: str) -> None:
        class Connection:
            @hookimpl
            async def chat(self, request: Any) -> Any:
                await request.call.run(self.fail)
                yield Chunk(finish_reason="stop")

            def fail(self) -> None:
                raise end

        super().__init__(lambda _: Connection())


def ask_in(mode: str, provider: Any, **arguments: Any) -> Any:
    """Call in the main thread, the only one that Ctrl-C interrupts."""

    async def work() -> Any:
        async with graftage.connect_async(provider, model=MODEL, **arguments) as llm:
            return await llm.chat("x")

    if mode == "async":
        return asyncio.run(work())
    with graftage.connect(provider, model=MODEL, **arguments) as llm:
        return llm.chat("x")


def test_cancelled_hook_is_not_a_failure() -> None:
    class Waiting:
        @hookimpl
        async def embed(self, request: Any) -> Any:
            begun.set()
            await asyncio.sleep(60)

        @hookimpl
        async def chat(self, request: Any) -> Any:
            yield Chunk(finish_reason="stop")

    async def work() -> int:
        async with graftage.connect_async(Giving(lambda _: Waiting()), model=MODEL) as llm:
            task = asyncio.create_task(llm.embed("x"))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return llm.stats().failures

    begun = asyncio.Event()
    assert asyncio.run(work()) == 0


class Odd:
    """A plugin that ends the program in one of its members."""

    def __init__(self, at: str, end: BaseException) -> None:
        self.at = at
        self.end = end

    def fail(self, _: Any = None) -> Any:
        raise self.end

    @property
    def arguments(self) -> Any:
        return self.fail() if self.at == "arguments" else {}

    @hookimpl
    def settings_model(self) -> Any:
        return self.fail() if self.at == "settings_model" else PluginSettings

    @hookimpl
    def list_adapters(self, request: Any) -> Any:
        return map(self.fail, [1]) if self.at == "a lazy list" else []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_callback_error_reaches_the_host(error: BaseException) -> None:
    def stop(_: Any) -> None:
        raise error

    with graftage.connect(Echo(), model=MODEL) as llm, pytest.raises(type(error)) as caught:
        llm.pull(on_progress=stop)
    assert caught.value is error


AT_IMPORT = {
    "a panic": ("class P(BaseException): ...\nraise P('oh')\n", "could not be imported: P: oh"),
    "a cancellation": ("import asyncio\nraise asyncio.CancelledError\n", "could not be imported: CancelledError"),
    "an error without words": (
        "class E(Exception):\n    def __str__(self):\n        raise SystemExit\nraise E\n",
        "could not be imported: E.",
    ),
    "an object that fails when it is looked at": (
        OBSERVER + "class P:\n    @property\n    def __class__(self):\n        raise SystemExit('no')\np = P()\n",
        "fails when it is inspected: SystemExit: no",
    ),
}


class TestExit:
    """A plugin that raises `SystemExit` or another `BaseException` fails like any other and ends no program."""

    @pytest.mark.parametrize("end", ENDS)
    @pytest.mark.parametrize("at", ["settings_model", "connect", "address", "default_model"])
    def test_while_opening(self, both: Any, at: str, end: str) -> None:
        with pytest.raises(PluginLoadError, match="`ending`") as caught:
            both.opened(Ending(ENDS[end], at))
        assert type(ENDS[end]).__name__ in str(caught.value)

    @pytest.mark.parametrize("kind", [Ending, PlainEnding])
    @pytest.mark.parametrize(("at", "end"), dict.fromkeys(ENDED))
    def test_in_a_hook(self, both: Any, at: str, end: str, kind: type[Ending]) -> None:
        llm = both.connect(kind(ENDS[end], at), model=MODEL)
        with pytest.raises(ProviderError, match="`ending` failed with") as caught:
            CALLS[at](llm)
        assert caught.value.__cause__ is ENDS[end]
        assert llm.stats().running == 0
        assert both.connect(Echo(["and on"]), model=MODEL).chat("x").text == "and on"

    @pytest.mark.parametrize("colour", ["async", "plain", "loop"])
    @pytest.mark.parametrize("end", ENDS)
    def test_between_chunks(self, both: Any, end: str, colour: str) -> None:
        class Connection:
            needs_event_loop = colour == "loop"

            @hookimpl
            async def chat(self, request: Any) -> Any:
                yield Chunk(text="one")
                raise ENDS[end]

        class Plain:
            @hookimpl
            def chat(self, request: Any) -> Any:
                yield Chunk(text="one")
                raise ENDS[end]

        llm = both.connect(Giving(lambda _: Plain() if colour == "plain" else Connection()), model=MODEL)
        stream = llm.chat("x", stream=True)
        with pytest.raises(ProviderError, match="`giving` failed with") as caught:
            list(stream)
        assert caught.value.partial is not None
        assert caught.value.partial.text == "one"
        assert llm.stats().running == 0

    @pytest.mark.parametrize("end", ENDS)
    @pytest.mark.parametrize("kind", [Ending, PlainEnding])
    def test_while_closing(self, end: str, kind: type[Ending]) -> None:
        for mode in ("sync", "async"):
            with pytest.raises(ProviderError, match="`ending` failed with"):
                close_in(mode, kind(ENDS[end], "close"))

    @pytest.mark.parametrize("end", ENDS)
    def test_in_capabilities(self, both: Any, end: str) -> None:
        class Connection:
            @hookimpl
            def chat(self, request: Any) -> Any: ...

            @hookimpl
            def health(self, request: Any) -> Any: ...

            @hookimpl
            def capabilities(self) -> Any:
                raise ENDS[end]

        llm = both.opened(Giving(lambda _: Connection()), model=MODEL)
        for ask in (llm.capabilities, lambda: llm.chat("x")):
            with pytest.raises(ProviderError, match="`giving` failed with") as caught:
                ask()
            assert caught.value.__cause__ is ENDS[end]

    @pytest.mark.parametrize("end", ENDS)
    def test_in_observer_policy_or_resolver(self, both: Any, watcher: Any, end: str) -> None:
        error: Any = ENDS[end]
        bad = FailingObserver(error)
        llm = both.connect(
            Echo(["one"]), model=MODEL, plugins=[bad, watcher, FailingResolver(error, "bad"), Resolver()]
        )
        reply = llm.chat("x", adapter="bonsai")
        assert "finish" in watcher.kinds()
        assert (reply.text, bad.asked) == ("one", 1)
        assert "bonsai" in [each.name for each in llm.adapters()]
        with pytest.raises(AdapterNotFound, match=rf"`bad` failed with {type(error).__name__}"):
            llm.chat("x", adapter="oak")
        llm = both.connect(Echo(), model=MODEL, plugins=[FailingPolicy(error, "stern")])
        with pytest.raises(PluginError, match=rf"`stern` failed with {type(error).__name__}") as caught:
            llm.chat("x")
        assert caught.value.plugin == "stern"
        assert caught.value.__cause__ is error

    @pytest.mark.parametrize("end", ENDS)
    @pytest.mark.parametrize("at", ["arguments", "settings_model", "a lazy list"])
    def test_during_setup(self, both: Any, at: str, end: str) -> None:
        odd = Odd(at, ENDS[end])
        with left_out("odd") if at != "a lazy list" else contextlib.nullcontext():
            llm = both.opened(Echo(["fine"]), model=MODEL, plugins=[odd, Resolver()])
        assert "bonsai" in [each.name for each in llm.adapters()]
        assert llm.chat("x").text == "fine"

    @pytest.mark.parametrize("case", AT_IMPORT)
    def test_during_import(self, site: Any, case: str) -> None:
        source, message = AT_IMPORT[case]
        site.add("graftage-ill", plugins={"ill": "ill"}, modules={"ill": source})
        assert message in str(entry_named("ill").error)


def test_lazy_proxy_in_a_module_is_ignored(site: Any) -> None:
    proxy = (
        "class Proxy:\n    def __getattr__(self, name):\n        raise RuntimeError('not set up')\nproxy = Proxy()\n"
    )
    site.add("graftage-eye", plugins={"eye": "eye_plugin"}, modules={"eye_plugin": OBSERVER + proxy})
    assert entry_named("eye").state == "loaded"


class TestInterrupt:
    """Ctrl-C interrupts only the main thread; in other threads a KeyboardInterrupt is an error of the plugin."""

    def test_at_import_in_the_main_thread(self, site: Any) -> None:
        site.add("graftage-ill", providers={"ill": "ill"}, modules={"ill": "raise KeyboardInterrupt\n"})
        with pytest.raises(KeyboardInterrupt):
            graftage.connect("ill")

    @pytest.mark.parametrize(
        ("kind", "mode"),
        [(PlainEnding, "sync"), (PlainEnding, "async"), (OnLoop, "sync"), (OnLoop, "async"), (InThread, "async")],
    )
    def test_in_a_worker_thread(self, kind: Any, mode: str) -> None:
        for _ in range(2):  # The thread and the loop survive the first error.
            with pytest.raises(ProviderError, match=r"`(ending|giving)` failed with"):
                ask_in(mode, kind(KeyboardInterrupt(), "chat"))

    @pytest.mark.parametrize("mode", ["sync", "async"])
    def test_in_a_worker_plugin(self, mode: str, watcher: Any) -> None:
        seen = FailingObserver(KeyboardInterrupt())
        assert ask_in(mode, Echo(["fine"]), plugins=[seen, watcher]).text == "fine"
        assert (watcher.kinds()[-1], seen.asked) == ("finish", 1)
        with pytest.raises(PluginError, match=r"`stern` .*failed with KeyboardInterrupt"):
            ask_in(mode, Echo(), plugins=[FailingPolicy(KeyboardInterrupt(), "stern")])

    def test_in_a_hook_reaches_the_user(self) -> None:
        with (
            graftage.connect(Ending(KeyboardInterrupt(), "chat"), model=MODEL) as llm,
            pytest.raises(KeyboardInterrupt),
        ):
            llm.chat("x")

    def test_at_import_in_a_worker_thread(self, site: Any) -> None:
        site.add("graftage-ill", plugins={"ill": "ill"}, modules={"ill": "raise KeyboardInterrupt\n"})
        with left_out("ill"):
            assert ask_in("async", Echo(["fine"])).text == "fine"
