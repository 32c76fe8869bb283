"""Named instances: where their settings come from, their keys, their adapters, and where they may be named."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Mapping
from threading import Event
from typing import TYPE_CHECKING, Any, ClassVar

import keyring
import pytest
from keyring.backend import KeyringBackend
from keyring.backends import fail
from keyring.errors import KeyringLocked
from pydantic import SecretStr
from suite import Watcher
from test_adapters import Patch, loads, shelf

from graftage import _keys
from graftage._engine.instances import listed
from graftage.exceptions import (
    AdapterNotFound,
    ConnectionFailed,
    InferenceFailed,
    PluginLoadError,
    ProviderError,
    ProviderNotFound,
    SettingsError,
)
from graftage.hookspecs import hookimpl
from graftage.settings import Settings
from graftage.testing import Cassette, Echo, Pause, replaying
from graftage_ollama.testing import FakeOllama

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODEL = "m:1"
DEAD = "http://127.0.0.1:9"
"""An address where nothing listens: the discard port."""
KEY = "sk-only-for-the-oak"
posix = pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")


class TreeSettings(Settings):
    native_environment: ClassVar[Mapping[str, str]] = {"host": "TREE_HOST", "api_key": "TREE_KEY"}

    depth: int = 1
    token: SecretStr | None = None


class Tree(Echo):
    """A provider for instances. It takes part in `auto` with its rank."""

    name = "tree"
    rank: int | None = None

    @hookimpl
    def settings_model(self) -> type[Settings]:
        return TreeSettings

    @hookimpl
    def answers(self, request: Any) -> int | None:
        remote = request.settings.host is not None and "127.0.0.1" not in request.settings.host
        return None if remote and "host" not in request.given else self.rank


def oak(**values: Any) -> dict[str, Any]:
    """The instance `oak` of the provider `tree`."""
    return {"oak": {"provider": "tree", **values}}


def connected(tree: Echo) -> Any:
    """Return the last request to connect."""
    return [request for hook, request in tree.calls if hook == "connect"][-1]


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that writes the user's settings file."""

    def write(text: str) -> Path:
        path = tmp_path / "settings.toml"
        path.write_text(text, encoding="utf-8")
        monkeypatch.setenv("GRAFTAGE_CONFIG", str(path))
        return path

    return write


class TestSources:
    def test_order(self, both: Any, toml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        file = toml("attempts = 1\n[tree]\nattempts = 2\n[instances.oak]\nprovider = 'tree'\nattempts = 3\n")
        environment = {"GRAFTAGE_ATTEMPTS": "4", "GRAFTAGE_TREE_ATTEMPTS": "5", "GRAFTAGE_OAK_ATTEMPTS": "6"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        mapping: dict[str, Any] = {"attempts": 7, "tree": {"attempts": 8}, "instances": oak(attempts=9)}
        given: dict[str, Any] = {"settings": mapping, "instances": {"oak": {"attempts": 10}}, "attempts": 5}
        member: Any = ("oak", {"attempts": 2})
        found = []
        for _ in range(12):
            llm = both.opened([member], plugins=[Tree()], **given)
            origin = llm.origins["attempts"]
            found.append((llm.settings.attempts, origin))
            if member != "oak":
                member = "oak"
            elif origin == "argument":
                del given["attempts"]
            elif "argument `instances`" in origin:
                del given["instances"]
            elif "mapping" in origin:
                del (mapping["instances"]["oak"] if "oak" in origin else mapping.get("tree", mapping))["attempts"]
                mapping = given["settings"] = {name: each for name, each in mapping.items() if each}
            elif origin.startswith("environment"):
                monkeypatch.delenv(origin.removeprefix("environment "))
            else:
                toml(file.read_text().replace("attempts = 3\n" if "oak" in origin else "attempts = 2\n", ""))
        where = "the `settings` mapping"
        assert found == [
            (2, "argument of the member"),
            (5, "argument"),
            (10, "the argument `instances` [instances.oak]"),
            (9, f"{where} [instances.oak]"),
            (8, f"{where} [tree]"),
            (7, where),
            (6, "environment GRAFTAGE_OAK_ATTEMPTS"),
            (5, "environment GRAFTAGE_TREE_ATTEMPTS"),
            (4, "environment GRAFTAGE_ATTEMPTS"),
            (3, f"{file} [instances.oak]"),
            (2, f"{file} [tree]"),
            (1, str(file)),
        ]

    def test_model_order(self, both: Any, toml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        toml("model = 'top'\n[instances.oak]\nprovider = 'tree'\nmodel = 'table'\n[instances.elm]\nprovider = 'tree'\n")

        def model(provider: Any, **given: Any) -> str | None:
            llm = both.opened([provider], plugins=[Tree()], **given)
            return f"{llm.model} from {llm.origins.get('model')}"

        file = os.environ["GRAFTAGE_CONFIG"]
        assert model("elm") == f"top from {file}"
        monkeypatch.setenv("GRAFTAGE_MODEL", "all")
        assert model("elm") == "all from environment GRAFTAGE_MODEL"
        assert model("oak") == f"table from {file} [instances.oak]"
        monkeypatch.setenv("GRAFTAGE_OAK_MODEL", "own")
        assert model("oak") == "own from environment GRAFTAGE_OAK_MODEL"
        given: dict[str, Any] = {"instances": {"oak": {"model": "given"}}}
        assert model("oak", **given) == "given from the argument `instances` [instances.oak]"
        assert model("oak", model="argument", **given) == "argument from None"
        assert model(("oak", {"model": "pair"}), model="argument", **given) == "pair from None"
        assert model(("oak:colon", {"model": "pair"}), model="argument", **given) == "colon from None"

    def test_secrets_come_from_its_own_alone(self, both: Any, toml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        secrets = "host = 'gpu'\napi_key = 'no'\nheaders.X-A = 'no'\n"
        toml(f"{secrets}[tree]\n{secrets}token = 'no'\ndepth = 5\n[instances.oak]\nprovider = 'tree'\n")
        for name in ("", "TREE_"):
            monkeypatch.setenv(f"GRAFTAGE_{name}HOST", "gpu")
            monkeypatch.setenv(f"GRAFTAGE_{name}API_KEY", "no")
            monkeypatch.setenv(f"GRAFTAGE_{name}HEADERS__X_B", "no")
        for name in ("TREE_HOST", "TREE_KEY"):
            monkeypatch.setenv(name, "no")
        tree = Tree()
        mapping = {"host": "gpu", "api_key": "no", "tree": {"api_key": "no", "token": "no"}}
        both.opened("oak", plugins=[tree], settings=mapping)
        settings = connected(tree).settings
        assert settings == TreeSettings(depth=5)
        monkeypatch.setenv("GRAFTAGE_OAK_API_KEY", KEY)
        monkeypatch.setenv("GRAFTAGE_OAK_HEADERS__X_C", "own")
        both.opened("oak", plugins=[tree], host="here")
        settings = connected(tree).settings
        assert (settings.host, settings.api_key, list(settings.headers)) == ("here", SecretStr(KEY), ["x_c"])

    def test_variables_of_others_are_skipped(self, both: Any, toml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        toml("[instances.big-oak]\nprovider = 'tree'\n")
        monkeypatch.setenv("GRAFTAGE_BIG_OAK_API_KEY", KEY)
        monkeypatch.setenv("GRAFTAGE_BIG_OAK_ADAPTER", "poet")
        tree = Tree()
        both.opened(tree, model=MODEL)
        assert connected(tree).settings.api_key is None
        both.opened("big-oak", plugins=[tree], model=MODEL)
        assert connected(tree).settings.api_key == SecretStr(KEY)

    @pytest.mark.parametrize(
        ("variable", "used", "near"),
        [
            ("GRAFTAGE_OAK_API_KYE", "oak", "api_key"),
            ("GRAFTAGE_OAK_MODLE", "oak", "model"),
            ("GRAFTAGE_OAK_TRANSPORT", "oak", "Use one of"),
            ("GRAFTAGE_TREE_DEPHT", "oak", "depth"),
            ("GRAFTAGE_OKA_API_KEY", "oak", "oak_api_key"),
            ("GRAFTAGE_OKA_API_KEY", "tree", "oak_api_key"),
        ],
    )
    def test_misspelt_variable_is_refused(
        self, both: Any, monkeypatch: pytest.MonkeyPatch, variable: str, used: str, near: str
    ) -> None:
        monkeypatch.setenv(variable, "x")
        with pytest.raises(SettingsError, match=variable) as caught:
            both.opened(used, plugins=[Tree()], instances=oak())
        assert near in str(caught.value.hint)
        assert caught.value.source == f"environment {variable}"


REFUSED: dict[str, tuple[Any, str, str]] = {
    "not a table of tables": ("oak", "must be a table of tables", "the argument `instances`"),
    "not a table": ({"oak": "tree"}, "`oak` in the argument .* must be a table", "the argument `instances`"),
    "no provider": ({"oak": {"host": "gpu"}}, "names no provider", "the argument `instances` [instances.oak]"),
    "unknown provider": (oak(provider="tere"), "no provider `tere`.*Did you mean `tree`", "…"),
    "another instance as provider": ({**oak(), "elm": {"provider": "oak"}}, "no provider `oak`", "[instances.elm]"),
    "a provider that is a number": (oak(provider=5), "`provider` .* must be text", "…"),
    "an empty model": (oak(model=" "), "`model` .* must be text", "…"),
    "a misspelt key": (oak(modle="x"), "no setting `modle`.*Did you mean `model`", "…"),
    "a misspelt setting": (oak(dephts=2), "no setting `dephts`.*Did you mean `depth`", "…"),
    "an invalid setting": (oak(attempts=0), "`attempts`.*invalid", "…"),
    "the name of a provider": ({"tree": {"provider": "tree"}}, "`tree` is taken: the plugin `tree`", "instances"),
    "the name of a plugin": ({"lora": {"provider": "tree"}}, "`lora` is taken: the plugin `lora`", "instances"),
    "the variables of a plugin": ({"Tree": {"provider": "tree"}}, "`Tree` is taken: the plugin `tree`", "instances"),
    "the variables of another": (
        {"a-b": {"provider": "tree"}, "a_b": {"provider": "tree"}},
        "`a_b` is taken: the instance `a-b`",
        "instances",
    ),
    "auto": ({"auto": {"provider": "tree"}}, "`auto` is taken", "instances"),
    "a colon in its name": ({"a:b": {"provider": "tree"}}, "`a:b` cannot be the name", "[instances.a:b]"),
    "a name that is a number": ({5: {"provider": "tree"}}, "`5` cannot be the name", "[instances.5]"),
}


class TestRefusals:
    @pytest.mark.parametrize("case", REFUSED)
    def test_say_where_and_what(self, both: Any, case: str) -> None:
        instances, words, source = REFUSED[case]
        with pytest.raises(SettingsError, match=words) as caught:
            both.opened("oak", plugins=[Tree()], instances=instances)
        assert str(caught.value.source).endswith(source.replace("…", "the argument `instances` [instances.oak]"))

    def test_file_is_named(self, both: Any, toml: Any) -> None:
        file = toml("[instances.oak]\nprovider = 'tere'\n")
        with pytest.raises(SettingsError, match="Did you mean `tree`") as caught:
            both.opened(Tree(), model=MODEL)
        assert caught.value.source == f"{file} [instances.oak]"
        file.write_text("[oak]\n[instances.oak]\nprovider = 'tree'\n", encoding="utf-8")
        with pytest.raises(SettingsError, match=r"no table `oak`.*`\[instances\.oak\]`"):
            both.opened(Tree(), model=MODEL)
        file.write_text("[instance.oak]\nprovider = 'tree'\n", encoding="utf-8")
        with pytest.raises(SettingsError, match=r"no table `instance`.*`instances`"):
            both.opened(Tree(), model=MODEL)

    def test_unknown_name_gets_the_nearest(self, both: Any) -> None:
        with pytest.raises(ProviderNotFound, match="Did you mean `oak`"):
            both.opened("oka", plugins=[Tree()], instances=oak())


class TestNames:
    @pytest.mark.parametrize("how", ["argument", "variable", "file", "chain"])
    def test_instance_is_a_provider(self, both: Any, toml: Any, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
        table = "[instances.oak]\nprovider = 'tree'\nmodel = 'acorn:1'\n"
        toml(f"provider = 'oak:leaf:2'\n{table}" if how == "file" else table)
        if how == "variable":
            monkeypatch.setenv("GRAFTAGE_PROVIDER", "oak:leaf:2")
        tree = Tree(["fine", InferenceFailed("It fell.")])
        named: Any = {"argument": "oak:leaf:2", "chain": ["oak:leaf:2"]}.get(how)
        watcher = Watcher()
        llm = both.opened(named, plugins=[tree, Echo(), watcher])
        reply = llm.chat("x")
        assert (reply.provider, reply.model, llm.provider) == ("oak", "leaf:2", "oak")
        assert connected(tree).name == "oak"
        assert {each.provider for each in watcher.events} == {"oak"}
        with pytest.raises(InferenceFailed) as caught:
            llm.chat("x")
        assert caught.value.provider == "oak"

    def test_replay_needs_no_provider(self, both: Any, tmp_path: Path) -> None:
        file = tmp_path / "calls.yaml"
        trees = {**oak(model=MODEL), "elm": {"provider": "tree", "model": MODEL}}
        for mode in ("all", "none"):
            script = Tree(["from the oak", "from the elm"])
            with Cassette(file, mode=mode) as cassette, replaying(cassette):
                plugins = [script] if mode == "all" else []
                found = [both.opened(name, plugins=plugins, instances=trees).chat("x") for name in trees]
            assert [(each.provider, each.text) for each in found] == [("oak", "from the oak"), ("elm", "from the elm")]

    def test_faults_name_instance_and_distribution(self, both: Any, site: Any) -> None:
        source = "from graftage.hookspecs import hookimpl\n@hookimpl\ndef connect(request):\n    raise OSError('no')\n"
        site.add("graftage-birch", providers={"birch": "birch"}, modules={"birch": source})
        with pytest.raises(PluginLoadError, match=r"provider `oak` \(graftage-birch 1\.0\)"):
            both.opened("oak", instances={"oak": {"provider": "birch"}})

    def test_one_server_shares_its_slots(self, both: Any) -> None:
        pause = Pause()
        tree = Tree([[pause], "second"], address="http://127.0.0.1:1")
        both_of = {**oak(concurrency=1), "elm": {"provider": "tree", "concurrency": 1}}
        first, second = (both.opened(name, plugins=[tree], model=MODEL, instances=both_of) for name in both_of)
        running = both.start(first.chat, "x", stream=True)
        assert pause.reached.wait(60)
        with pytest.raises(ProviderError, match="No slot became free"):
            second.chat("x", timeout=0.05)
        first.close()
        assert isinstance(running.exception(60), ProviderError)

    def test_policies_see_the_plugin(self, both: Any) -> None:
        seen = []

        class Policy:
            name = "policy"

            @hookimpl
            def resource_limits(self, query: Any) -> None:
                seen.append(query.provider)

        both.opened("oak", plugins=[Tree(), Policy()], model=MODEL, instances=oak()).chat("x")
        assert seen == ["tree"]


class TestChains:
    def test_own_secrets_do_not_count_as_shared(self, both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        trees = {**oak(host="a", api_key=KEY), "elm": {"provider": "tree", "host": "b"}}
        monkeypatch.setenv("GRAFTAGE_ELM_API_KEY", "elm-key")
        tree = Tree()
        both.opened(["oak", ("elm", {"headers": {"X-A": "a"}})], plugins=[tree], model=MODEL, instances=trees)
        found = [request.settings for hook, request in tree.calls if hook == "connect"]
        assert [(each.host, each.api_key, list(each.headers)) for each in found] == [
            ("a", SecretStr(KEY), []),
            ("b", SecretStr("elm-key"), ["X-A"]),
        ]
        with pytest.raises(SettingsError, match=r"`host` \(argument\).*every member") as caught:
            both.opened(["oak", "elm"], plugins=[tree], instances=trees, host="c")
        assert "`[instances.oak]`" in str(caught.value.hint)

    def test_each_stopped_server_is_skipped(self, both: Any) -> None:
        first, second = (FakeOllama(models=[MODEL], reply=each) for each in ("first", "second"))
        with first, second:
            servers = {
                name: {"provider": "ollama", "host": each.url, "model": MODEL, "attempts": 1}
                for name, each in (("mini", first), ("studio", second))
            }
            llm = both.opened(["mini", "studio", Echo(["third"])], instances=servers, model=MODEL)
            assert (llm.chat("x").text, llm.chat("x").provider) == ("first", "mini")
            first.__exit__(None, None, None)
            reply = llm.chat("x")
            assert (reply.text, reply.provider, len(reply.warnings)) == ("second", "studio", 1)
            second.__exit__(None, None, None)
            reply = llm.chat("x")
        assert (reply.text, reply.provider) == ("third", "echo")
        assert [each.partition(" was")[0] for each in reply.warnings] == ["`mini:m:1`", "`studio:m:1`"]


class TestAdapters:
    @pytest.mark.parametrize("chained", [False, True])
    def test_is_active_from_the_start(self, both: Any, chained: bool) -> None:
        tree, shelf_ = Tree(), shelf("poet", "clerk")
        trees = {**oak(adapter="poet"), "elm": {"provider": "tree"}}
        llm = both.opened(["oak", "elm"] if chained else "oak", plugins=[tree, shelf_], model=MODEL, instances=trees)
        assert (llm.stats().active_adapter, shelf_.asked) == ("poet", [])
        assert [llm.chat("x").adapter, llm.chat("x").adapter] == ["poet", "poet"]
        assert (len(loads(tree)), len(shelf_.asked)) == (1, 2)
        assert llm.chat("x", adapter=None).adapter is None
        assert llm.chat("x", adapter="clerk").adapter == "clerk"
        assert llm.chat("x").adapter == "poet"
        llm.use_adapter(None)
        assert (llm.chat("x").adapter, llm.stats().active_adapter) == (None, None)

    def test_members_have_their_own(self, both: Any) -> None:
        tree = Tree(["one", ConnectionFailed("It is gone."), "two", ConnectionFailed("It is gone."), "three"])
        trees = {**oak(adapter="poet"), "elm": {"provider": "tree", "adapter": "clerk"}, "fir": {"provider": "tree"}}
        llm = both.opened(["oak", "elm"], plugins=[tree, shelf("poet", "clerk")], model=MODEL, instances=trees)
        assert [llm.chat("x").adapter, llm.chat("x").adapter] == ["poet", "clerk"]
        llm = both.opened(["oak", "fir"], plugins=[tree, shelf("poet", "clerk")], model=MODEL, instances=trees)
        assert llm.chat("x").adapter is None

    def test_missing_one_fails_each_call(self, both: Any) -> None:
        tree = Tree()
        llm = both.opened("oak", plugins=[tree, shelf()], model=MODEL, instances=oak(adapter="poet"))
        for _ in range(2):
            with pytest.raises(AdapterNotFound, match="`poet`"):
                llm.chat("x")
        assert tree.requests == []
        llm.use_adapter(None)
        assert llm.chat("x").adapter is None
        with pytest.raises(AdapterNotFound):
            llm.use_adapter("clerk")
        assert llm.stats().active_adapter is None

    def test_switch_under_way_wins(self, both: Any) -> None:
        begun, go_on = Event(), Event()

        def slowly(_: Any) -> Any:
            begun.set()
            assert go_on.wait(60)
            return Patch("clerk")

        plugins = [Tree(), shelf("poet", clerk=slowly)]
        llm = both.opened("oak", plugins=plugins, model=MODEL, instances=oak(adapter="poet"))
        switch = both.start(llm.use_adapter, "clerk")
        assert begun.wait(60)
        call = both.start(llm.chat, "x")
        while llm.stats().waiting < 1:
            time.sleep(0.01)
        go_on.set()
        assert (switch.result(60).name, call.result(60).adapter) == ("clerk", "clerk")
        assert llm.chat("x").adapter == "clerk"

    def test_another_switch_replaces_it(self, both: Any) -> None:
        tree = Tree()
        plugins = [tree, shelf("poet", "clerk")]
        llm = both.opened("oak", plugins=plugins, model=MODEL, instances=oak(adapter="poet"))
        llm.use_adapter("clerk")
        assert llm.chat("x").adapter == "clerk"
        assert [each.adapter.name for each in loads(tree)] == ["clerk"]


class Ring(KeyringBackend):
    """A keyring in memory."""

    priority = 0  # Of all keyrings, it is found last.

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # of the library
        self.keys: dict[tuple[str, str], str] = {}
        self.asked: list[str] = []
        self.error: Exception | None = None

    def _ask(self, username: str) -> None:
        with pytest.raises(RuntimeError):  # It may block, so no event loop may run here.
            asyncio.get_running_loop()
        self.asked.append(username)
        if self.error is not None:
            raise self.error

    def get_password(self, service: str, username: str) -> str | None:
        self._ask(username)
        return self.keys.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self._ask(username)
        self.keys[service, username] = password

    def delete_password(self, service: str, username: str) -> None:
        self._ask(username)
        del self.keys[service, username]


@pytest.fixture
def ring() -> Iterator[Ring]:
    """The system's keyring."""
    made = Ring()
    keyring.set_keyring(made)
    yield made
    keyring.set_keyring(no_keyring())


def no_keyring() -> KeyringBackend:
    return fail.Keyring()  # type: ignore[no-untyped-call] # of the library


def shown(error: SettingsError) -> str:
    return f"{error} {error!r} {vars(error)}"


class TestKeyring:
    def test_key_is_read_at_connect(self, both: Any, ring: Ring) -> None:
        ring.keys["graftage", "oak"] = f"{KEY}\n"
        tree = Tree(["fine", InferenceFailed(f"It repeats {KEY}.")])
        trees = {**oak(api_key_from="keyring"), "elm": {"provider": "tree", "api_key_from": "keyring"}}
        llm = both.opened(["oak", tree], plugins=[tree], model=MODEL, instances=trees)
        assert connected(tree).name == "tree"
        settings = llm.members[0].settings
        assert (settings.api_key, llm.origins["api_key"], ring.asked) == (SecretStr(KEY), "keyring", ["oak"])
        assert KEY not in f"{settings} {settings!r} {llm._options!r}"
        llm.chat("x")
        with pytest.raises(InferenceFailed) as caught:
            llm.chat("x")
        assert KEY not in str(caught.value)

    @pytest.mark.parametrize("how", ["variable", "argument", "table"])
    def test_given_key_wins_unasked(self, both: Any, ring: Ring, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
        if how == "variable":
            monkeypatch.setenv("GRAFTAGE_OAK_API_KEY", KEY)
        tree = Tree()
        table = {"api_key": KEY} if how == "table" else {}
        argument = {"api_key": KEY} if how == "argument" else {}
        both.opened("oak", plugins=[tree], instances=oak(api_key_from="keyring", **table), **argument)
        assert (connected(tree).settings.api_key, ring.asked) == (SecretStr(KEY), [])

    @pytest.mark.parametrize("case", ["none stored", "locked", "no keyring", "another error", "no library"])
    def test_missing_key_names_the_ways_out(
        self, both: Any, ring: Ring, monkeypatch: pytest.MonkeyPatch, case: str
    ) -> None:
        if case in ("locked", "another error"):
            ring.error = KeyringLocked("…") if case == "locked" else OSError("…")
        elif case == "no keyring":
            keyring.set_keyring(no_keyring())
        elif case == "no library":
            monkeypatch.setitem(sys.modules, "keyring", None)
        words = {"locked": "it is locked", "no keyring": "has none", "no library": "`keyring` is not installed"}
        with pytest.raises(SettingsError, match=words.get(case, "keyring")) as caught:
            both.opened("big-oak", plugins=[Tree()], instances={"big-oak": oak(api_key_from="keyring")["oak"]})
        assert (caught.value.key, caught.value.source) == ("api_key", "keyring")
        for way in ("`graftage keys set big-oak`", "GRAFTAGE_BIG_OAK_API_KEY", "key file"):
            assert way in str(caught.value.hint)

    def test_others_need_no_library(self, both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "keyring", None)
        trees = {**oak(api_key_from="keyring"), "elm": {"provider": "tree"}}
        assert both.opened("elm", plugins=[Tree()], model=MODEL, instances=trees).chat("x").text == "x"

    def test_keys_are_set_and_removed(self, ring: Ring) -> None:
        assert (_keys.stored("oak"), _keys.remove("oak")) == (None, False)
        _keys.store("oak", KEY)
        assert (_keys.stored("oak"), ring.keys) == (KEY, {("graftage", "oak"): KEY})
        assert (_keys.remove("oak"), ring.keys) == (True, {})

    def test_failing_store_is_an_error(self, ring: Ring) -> None:
        ring.error = KeyringLocked("…")
        with pytest.raises(SettingsError, match="it is locked") as caught:
            _keys.store("oak", KEY)
        assert KEY not in shown(caught.value)


class TestKeyFile:
    @pytest.mark.parametrize("mode", [0o600, 0o400])
    def test_owner_alone_may_read_it(self, both: Any, tmp_path: Path, mode: int) -> None:
        file = tmp_path / "oak.key"
        file.write_text(f"{KEY}\n")
        file.chmod(mode)
        tree = Tree()
        llm = both.opened("oak", plugins=[tree], instances=oak(api_key_from=str(file)))
        assert (connected(tree).settings.api_key, llm.origins["api_key"]) == (SecretStr(KEY), str(file))

    @posix
    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
    def test_file_open_to_others_is_refused(self, both: Any, tmp_path: Path, mode: int) -> None:
        file = tmp_path / "oak.key"
        file.write_text(KEY)
        file.chmod(mode)
        with pytest.raises(SettingsError, match=f"mode {mode:04o}") as caught:
            both.opened("oak", plugins=[Tree()], instances=oak(api_key_from=str(file)))
        assert caught.value.hint == f"Run `chmod 600 {file}`."
        assert KEY not in shown(caught.value)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (None, "No such file"),
            (b"", "is empty"),
            (b" \n", "is empty"),
            (b"\xff\xfe", "not text"),
            (b"x" * (_keys.LARGEST_KEY + 1), "larger than"),
            (b"sk-one\nsk-two", "line feed"),
        ],
    )
    def test_unusable_file_is_an_error(self, both: Any, tmp_path: Path, content: bytes | None, words: str) -> None:
        file = tmp_path / "oak.key"
        if content is not None:
            file.write_bytes(content)
            file.chmod(0o600)
        with pytest.raises(SettingsError, match=words) as caught:
            both.opened("oak", plugins=[Tree()], instances=oak(api_key_from=str(file)))
        assert (caught.value.key, caught.value.source) == ("api_key", str(file))
        assert "sk-" not in shown(caught.value)

    def test_pipe_is_refused_without_waiting(self, both: Any, pipe: Path) -> None:
        with pytest.raises(SettingsError, match="not a regular file"):
            both.opened("oak", plugins=[Tree()], instances=oak(api_key_from=str(pipe)))

    @pytest.mark.parametrize("path", ["keyrnig", "keys/oak.key"])
    def test_path_must_be_whole(self, both: Any, path: str) -> None:
        with pytest.raises(SettingsError, match="`keyring`, or the path") as caught:
            both.opened("oak", plugins=[Tree()], instances=oak(api_key_from=path))
        assert path not in shown(caught.value), "it may be a key"


class Ranked(Tree):
    rank = 20


REMOTE = ["http://gpu.example:1/v1", "https://api.example", "gpu.example:1", "10.0.0.7:1"]
LOCAL = ["http://127.0.0.1:1/v1", "http://[::1]:1", "http+unix://%2Frun%2Fa.sock", "in-process"]


class TestAuto:
    def test_instance_comes_first_at_its_rank(self, both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GRAFTAGE_DISABLED_PLUGINS", "llamacpp,openai,lora,m4")
        tree = Ranked(models=["acorn:1"])
        with FakeOllama(models=["a:1"]) as fake:
            monkeypatch.setenv("OLLAMA_HOST", fake.url)
            llm = both.opened("auto", plugins=[tree], instances={"zebrawood": {"provider": "tree"}})
            assert (llm.provider, llm.model) == ("zebrawood", "acorn:1")
            mini = {"mini": {"provider": "ollama", "host": fake.url, "model": "own:1"}}
            llm = both.opened("auto", plugins=[Tree()], instances=mini)
            assert (llm.provider, llm.model) == ("mini", "own:1")
            assert llm.origins["provider"] == "auto: it answers"
            assert "instances.mini" in llm.origins["host"]

    def test_stopped_one_is_passed_over(self, both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GRAFTAGE_DISABLED_PLUGINS", "llamacpp,openai,ollama,lora,m4")
        gone = {"provider": "tree", "host": DEAD}

        class Health(Ranked):
            @hookimpl
            def connect(self, request: Any) -> Any:
                self.errors = {"health": ConnectionFailed("It is gone.")} if request.settings.host else {}
                return super().connect(request)

        llm = both.opened("auto", plugins=[Health()], model=MODEL, instances={"gone": gone})
        assert (llm.provider, "`gone` cannot be taken" in llm.origins["provider"]) == ("tree", True)

    @pytest.mark.parametrize("address", REMOTE)
    def test_remote_one_is_never_taken(
        self, both: Any, ring: Ring, monkeypatch: pytest.MonkeyPatch, address: str
    ) -> None:
        monkeypatch.setenv("GRAFTAGE_DISABLED_PLUGINS", "llamacpp,openai,ollama,lora,m4")
        tree = Ranked(address=address)
        with_key = oak(api_key_from="keyring", model=MODEL)
        llm = both.opened("auto", plugins=[tree], model=MODEL, instances=with_key)
        assert (llm.provider, ring.asked) == ("tree", [])
        declared = oak(host="http://gpu.example:1", model=MODEL)
        assert both.opened("auto", plugins=[Ranked()], model=MODEL, instances=declared).provider == "tree"

    @pytest.mark.parametrize("address", LOCAL)
    def test_local_one_is_taken_with_its_key(self, both: Any, ring: Ring, address: str) -> None:
        ring.keys["graftage", "oak"] = KEY
        tree = Ranked(address=address)
        llm = both.opened("auto", plugins=[tree], model=MODEL, instances=oak(api_key_from="keyring"))
        assert (llm.provider, llm.settings.api_key, ring.asked) == ("oak", SecretStr(KEY), ["oak"])

    @pytest.mark.parametrize("given", [{"host": DEAD}, {"api_key": KEY}, {"headers": {"X-A": KEY}}, "env"])
    def test_given_address_or_key_is_not_for_it(self, both: Any, monkeypatch: pytest.MonkeyPatch, given: Any) -> None:
        monkeypatch.setenv("GRAFTAGE_DISABLED_PLUGINS", "llamacpp,openai,ollama,lora,m4")
        if given == "env":
            monkeypatch.setenv("GRAFTAGE_HOST", DEAD)
            given = {}
        tree = Ranked()
        llm = both.opened("auto", plugins=[tree], model=MODEL, instances=oak(api_key="own"), **given)
        assert llm.provider == "tree"
        assert [request.name for hook, request in tree.calls if hook == "connect"] == ["tree"]

    def test_prefers_its_loaded_model(self, both: Any) -> None:
        tree = Ranked(models=["a:1", "b:1"])
        both.opened("oak", plugins=[tree], instances=oak(model="b:1")).load()
        assert both.opened("auto", plugins=[tree], instances=oak()).model == "b:1"


class TestListed:
    def test_shows_what_is_known_unasked(self, toml: Any, ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
        file = toml(
            "[instances.mini]\nprovider = 'ollama'\nhost = 'http://me:pw@127.0.0.1:1'\napi_key_from = 'keyring'\n"
            "[instances.big]\nprovider = 'ollama'\nmodel = 'q:1'\napi_key_from = '~/key'\nadapter = 'poet'\n"
            "[instances.far]\nprovider = 'ollama'\napi_key = 'secret'\n[instances.bare]\nprovider = 'ollama'\n"
        )
        monkeypatch.setenv("GRAFTAGE_BIG_MODEL", "q:2")
        found = [(each.name, each.model, each.host, each.adapter, each.key, each.origin) for each in listed()]
        assert found == [
            ("bare", None, None, None, None, f"{file} [instances.bare]"),
            ("big", "q:2", None, "poet", "~/key", f"{file} [instances.big]"),
            ("far", None, None, None, f"{file} [instances.far]", f"{file} [instances.far]"),
            ("mini", None, "http://127.0.0.1:1", None, "keyring", f"{file} [instances.mini]"),
        ]
        monkeypatch.setenv("GRAFTAGE_MINI_API_KEY", KEY)
        assert listed()[-1].key == "environment GRAFTAGE_MINI_API_KEY"
        assert ring.asked == []
        assert "secret" not in repr(listed())
