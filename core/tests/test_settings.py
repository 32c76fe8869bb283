"""Settings: the order of sources, the origin of each value, and refusals."""

from __future__ import annotations

import copy
import math
import os
import pickle
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, SecretStr, field_validator

import graftage
from graftage._engine.plugins import PluginWarning
from graftage.calls import LimitsQuery, ListAdaptersRequest, ResolveRequest
from graftage.exceptions import AdapterNotFound, PluginLoadError, SettingsError
from graftage.hookspecs import ConnectRequest, hookimpl
from graftage.settings import LARGEST_FILE, Loaded, PluginSettings, Settings, Sources, config_path, load, without_user
from graftage.testing.echo import Echo
from graftage.types import AdapterInfo, Capabilities, Timeouts

SECRET = "s3cret-value"


class Own(Settings):
    """A provider's own settings."""

    native_environment: ClassVar[Mapping[str, str]] = {"host": "TREE_HOST", "api_key": "TREE_KEY"}

    depth: int = Field(default=1, ge=1, description="How deep the roots go")


def read(
    environment: Mapping[str, str] | None = None,
    *,
    file: Path | None = None,
    mapping: Mapping[str, Any] | None = None,
    prefix: str = "GRAFTAGE",
    plugins: tuple[str, ...] = ("lora", "m4", "big-tree"),
    **arguments: Any,
) -> Loaded[Own]:
    """The settings of the provider `tree`."""
    sources = Sources(prefix=prefix, environment=environment or {}, file=file)
    return load(Own, name="tree", arguments=arguments, mapping=mapping, sources=sources, plugins=plugins)


@pytest.fixture
def toml(tmp_path: Path) -> Any:
    """A function that writes a settings file."""

    def write(text: str) -> Path:
        path = tmp_path / "settings.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


class TestPrecedence:
    def test_order_of_sources(self, toml: Any) -> None:
        file = toml('host = "top"\n[tree]\nhost = "table"\n')
        environment = {"TREE_HOST": "native", "GRAFTAGE_HOST": "common", "GRAFTAGE_TREE_HOST": "own"}
        found = []
        for taken in (
            "argument",
            "mapping",
            "GRAFTAGE_TREE_HOST",
            "GRAFTAGE_HOST",
            "TREE_HOST",
            "table",
            "top",
            "nothing",
        ):
            arguments: dict[str, Any] = {"host": "argument"} if taken == "argument" else {}
            mapping = {"host": "mapping"} if taken in ("argument", "mapping") else {}
            loaded = read(environment, file=file, mapping=mapping, **arguments)
            found.append((loaded.settings.host, loaded.origins.get("host")))
            environment.pop(taken, None)
            if taken in ("table", "top"):
                file = toml('host = "top"\n' if taken == "table" else "")
        assert found == [
            ("argument", "argument"),
            ("mapping", "the `settings` mapping"),
            ("own", "environment GRAFTAGE_TREE_HOST"),
            ("common", "environment GRAFTAGE_HOST"),
            ("native", "environment TREE_HOST"),
            ("table", f"{file} [tree]"),
            ("top", str(file)),
            (None, None),
        ]

    def test_parts_come_from_several_sources(self, toml: Any) -> None:
        file = toml("[timeouts]\nidle = 9\ntotal = 99\n[tree.timeouts]\ntotal = 8\n")
        environment = {"GRAFTAGE_TIMEOUTS__CONNECT": "1", "GRAFTAGE_TIMEOUTS__IDLE": "7"}
        loaded = read(environment, file=file, timeouts={"connect": 0.5})
        assert loaded.settings.timeouts == Timeouts(connect=0.5, first_token=300.0, idle=7.0, total=8.0)

    def test_whole_object_replaces_parts(self) -> None:
        loaded = read({"GRAFTAGE_TIMEOUTS__CONNECT": "1"}, timeouts=Timeouts(idle=3.0))
        assert loaded.settings.timeouts == Timeouts(idle=3.0)


class Cloud(Settings):
    """Settings of a provider whose variable is for one host."""

    native_environment: ClassVar[Mapping[str, str]] = {"api_key": "CLOUD_KEY"}
    native_hosts: ClassVar[Mapping[str, str]] = {"api_key": "api.cloud.example"}


class TestNativeHosts:
    @pytest.mark.parametrize(
        ("host", "reached"),
        [
            (None, True),
            ("", True),
            ("api.cloud.example", True),
            ("API.Cloud.Example:443", True),
            (" https://api.cloud.example/v1", True),
            ("http://127.0.0.1:8080/v1", False),
            ("https://api.cloud.example.evil.example", False),
            ("https://api.cloud.example@evil.example", False),
            ("https://evil.example/api.cloud.example", False),
            ("https://api.cloud.example:pw@evil.example#@api.cloud.example", False),
            ("evil.example#api.cloud.example", False),
            ("http://[", False),
        ],
    )
    @pytest.mark.parametrize("source", ["argument", "variable", "table"])
    def test_secret_reaches_one_host_alone(self, toml: Any, host: str | None, reached: bool, source: str) -> None:
        environment = {"CLOUD_KEY": SECRET}
        if source == "variable" and host:
            environment["GRAFTAGE_HOST"] = host
        file = toml(f"[cloud]\nhost = {host!r}\n" if source == "table" and host is not None else "")
        arguments = {"host": host} if source == "argument" else {}
        sources = Sources(environment=environment, file=file)
        loaded = load(Cloud, name="cloud", arguments=arguments, sources=sources)
        assert loaded.settings.api_key == (SecretStr(SECRET) if reached else None)
        assert loaded.origins.get("api_key") == ("environment CLOUD_KEY" if reached else None)

    def test_withheld_one_leaves_room(self, toml: Any) -> None:
        file = toml("[cloud]\napi_key = 'own'\n")
        sources = Sources(environment={"CLOUD_KEY": SECRET}, file=file)
        for host, key in (("http://127.0.0.1:1", "own"), (None, SECRET)):
            loaded = load(Cloud, name="cloud", arguments={"host": host}, sources=sources)
            assert loaded.settings.api_key == SecretStr(key)


class Stem(BaseModel):
    """A part of a setting, with its own parts."""

    rings: tuple[int, ...] = ()
    bark: str = ""


class Wood(PluginSettings):
    """A plugin's settings of all kinds."""

    stems: tuple[str, ...] = ()
    tags: dict[str, str] | str = ""
    by_name: dict[str, Stem] = Field(default_factory=dict)
    stem: Stem | None = None
    label: str = ""

    @field_validator("stems", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value


def wood(**variables: str) -> Wood:
    """The settings of the plugin `wood`, from variables."""
    environment = {f"GRAFTAGE_WOOD_{name}": text for name, text in variables.items()}
    return load(Wood, name="wood", arguments={}, sources=Sources(environment=environment)).settings


class TestVariables:
    def test_hold_numbers_durations_parts_and_json(self) -> None:
        environment = {
            "GRAFTAGE_ATTEMPTS": "2",
            "GRAFTAGE_KEEP_ALIVE": "1h30m",
            "GRAFTAGE_HEADERS": '{"X-Team": "a"}',
            "GRAFTAGE_HEADERS__ZONE": "b",
            "GRAFTAGE_TREE_DEPTH": "5",
        }
        loaded = read(environment)
        settings: Any = loaded.settings
        assert (settings.attempts, settings.keep_alive, settings.depth) == (2, 5400.0, 5)
        assert {name: value.get_secret_value() for name, value in settings.headers.items()} == {
            "X-Team": "a",
            "zone": "b",
        }
        assert loaded.origins["headers"] == "environment GRAFTAGE_HEADERS, GRAFTAGE_HEADERS__ZONE"

    def test_list_is_json_or_split(self) -> None:
        assert wood(STEMS='["a,b", "c"]').stems == ("a,b", "c")
        assert wood(STEMS="a,b").stems == ("a", "b")
        assert wood(STEMS="1").stems == ("1",)

    def test_text_is_json_only_as_object(self) -> None:
        assert wood(TAGS='{"a": "b"}').tags == {"a": "b"}
        assert wood(TAGS="{a").tags == "{a"
        assert wood(TAGS="7").tags == "7"
        assert wood(LABEL='{"a": "b"}').label == '{"a": "b"}'

    def test_nested_parts_win_over_the_whole(self) -> None:
        settings = wood(BY_NAME='{"oak": {"bark": "x", "rings": [1]}}', BY_NAME__OAK__RINGS="[2, 3]", STEM__BARK="[y]")
        assert settings.by_name == {"oak": Stem(bark="x", rings=(2, 3))}
        assert settings.stem == Stem(bark="[y]")

    def test_case_of_names_is_ignored(self) -> None:
        sources = Sources(environment={"graftage_Wood_Label": "x", "GRAFTAGE_WOOD_STEM__Bark": "y"})
        loaded = load(Wood, name="wood", arguments={}, sources=sources)
        assert (loaded.settings.label, loaded.settings.stem) == ("x", Stem(bark="y"))
        assert loaded.origins["label"] == "environment graftage_Wood_Label"

    def test_invalid_json_is_reported(self) -> None:
        with pytest.raises(
            SettingsError, match=r"`by_name` \(environment GRAFTAGE_WOOD_BY_NAME\) .* not valid JSON"
        ) as caught:
            wood(BY_NAME="oak")
        assert "GRAFTAGE_WOOD_BY_NAME__PART" in str(caught.value.hint)

    def test_empty_ones_are_ignored(self, toml: Any) -> None:
        loaded = read({"GRAFTAGE_HOST": "", "TREE_HOST": ""}, file=toml('host = "file"'))
        assert loaded.settings.host == "file"


class TestValues:
    @pytest.mark.parametrize(
        ("asked", "seconds"), [(5, 5.0), ("5m", 300.0), (-1, math.inf), ("-1", math.inf), (None, None)]
    )
    def test_keep_alive_is_seconds_or_a_duration(self, asked: Any, seconds: float | None) -> None:
        assert read(keep_alive=asked).settings.keep_alive == seconds

    def test_are_frozen(self) -> None:
        with pytest.raises(Exception, match="frozen"):
            read().settings.attempts = 5


class TestFile:
    def test_variable_names_it(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("GRAFTAGE_CONFIG", str(tmp_path / "mine.toml"))
        assert config_path() == tmp_path / "mine.toml"
        monkeypatch.delenv("GRAFTAGE_CONFIG")
        assert config_path().name == "config.toml"
        assert config_path().parent.name == "graftage"

    def test_default_one_may_be_missing(self, tmp_path: Path) -> None:
        assert read(file=tmp_path / "none.toml").origins == {}

    def test_given_one_must_exist(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=r"none\.toml cannot be used"):
            graftage.connect(Echo(), settings=tmp_path / "none.toml")

    def test_byte_order_mark_is_skipped(self, toml: Any) -> None:
        assert read(file=toml("\ufeffattempts = 2")).settings.attempts == 2

    @pytest.mark.parametrize("content", [b"attempts = ", b"\xff\xfe", b"a = 1\na = 2"])
    def test_invalid_one_is_named_with_hint(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "bad.toml"
        path.write_bytes(content)
        with pytest.raises(SettingsError) as caught:
            read(file=path)
        assert str(path) in caught.value.message
        assert caught.value.source == str(path)
        assert "GRAFTAGE_CONFIG" in str(caught.value.hint)

    def test_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match="cannot be used"):
            read(file=tmp_path)

    def test_null_device_means_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GRAFTAGE_CONFIG", os.devnull)
        assert Sources.of().document() == {}
        graftage.connect(Echo()).close()

    def test_pipe_is_refused_without_waiting(self, monkeypatch: pytest.MonkeyPatch, pipe: Path) -> None:
        monkeypatch.setenv("GRAFTAGE_CONFIG", str(pipe))
        with pytest.raises(SettingsError, match="not a regular file"):
            Sources.of().document()

    @pytest.mark.parametrize("path", ["~nosuchuser-of-all/x.toml", "~\0", "a\0b", "\ud800"])
    def test_impossible_path_is_a_settings_error(self, path: str) -> None:
        with pytest.raises(SettingsError, match="cannot be used") as caught:
            graftage.connect(Echo(), settings=path)
        assert "GRAFTAGE_CONFIG" in str(caught.value.hint)

    def test_variable_may_name_an_unknown_user(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GRAFTAGE_CONFIG", "~nosuchuser-of-all/x.toml")
        assert config_path() == Path("~nosuchuser-of-all/x.toml")
        assert graftage.connect(Echo()).origins == {}

    def test_tilde_is_expanded(self, monkeypatch: pytest.MonkeyPatch, toml: Any) -> None:
        monkeypatch.setenv("HOME", str(toml("attempts = 7").parent))
        monkeypatch.setenv("USERPROFILE", str(toml("attempts = 7").parent))
        with graftage.connect(Echo(), settings="~/settings.toml") as llm:
            assert llm.settings.attempts == 7

    def test_missing_one_is_named_once(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError) as caught:
            graftage.connect(Echo(), settings=tmp_path / "none.toml")
        assert caught.value.message.count("none.toml") == 1
        assert "Errno" not in caught.value.message

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("attempts = " + "9" * 5000, "out of range"),
            ("x = " + "[" * 100_000, "larger than"),
            ("x = " + "[" * 50_000, "nested too deeply"),
            ("#" * (LARGEST_FILE + 1), "larger than"),
            ("x = 2024-13-45", ""),
        ],
    )
    def test_unreadable_content_is_a_settings_error(self, toml: Any, text: str, reason: str) -> None:
        with pytest.raises(SettingsError, match=f"cannot be used: .*{reason}"):
            read(file=toml(text))

    def test_variable_wins_for_provider_and_model(self, toml: Any) -> None:
        file = toml('provider = "a"\nmodel = "b"\n')
        assert Sources(environment={}, file=file).choice("provider") == ("a", str(file))
        sources = Sources(environment={"GRAFTAGE_MODEL": "c"}, file=file)
        assert sources.choice("model") == ("c", "environment GRAFTAGE_MODEL")
        with pytest.raises(SettingsError, match=r"`model` in .* must be text"):
            Sources(environment={}, file=toml("model = 1")).choice("model")


class TestEnvPrefix:
    def test_selects_variables_and_file(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "host.toml").write_text("attempts = 7\n")
        monkeypatch.setenv("MYAPP_CONFIG", str(tmp_path / "host.toml"))
        monkeypatch.setenv("MYAPP_HOST", "http://mine")
        monkeypatch.setenv("GRAFTAGE_CONTEXT_WINDOW", "4096")
        with graftage.connect(Echo(), env_prefix="MYAPP") as llm:
            assert (llm.settings.host, llm.settings.attempts, llm.settings.context_window) == ("http://mine", 7, None)
            assert llm.origins["host"] == "environment MYAPP_HOST"

    def test_other_variables_of_the_host_are_ignored(self) -> None:
        assert read({"MYAPP_DATABASE": "x", "MYAPP_ATTEMPTS": "2"}, prefix="MYAPP").settings.attempts == 2


class TestRefusals:
    @pytest.mark.parametrize("transport", [object(), "cassette.yaml", {"wrap": 1}])
    def test_transport_without_wrap(self, transport: Any) -> None:
        with (
            pytest.raises(SettingsError, match="no method `wrap`: pass a cassette"),
            graftage.connect(Echo(), transport=transport),
        ):
            pass

    @pytest.mark.parametrize(
        ("environment", "key"),
        [
            ({"GRAFTAGE_HOTS": "x"}, "hots"),
            ({"GRAFTAGE_TREE_HOTS": "x"}, "hots"),
            ({"GRAFTAGE_TRANSPORT": "x"}, "transport"),
            ({"GRAFTAGE_MODLE": "x"}, "modle"),
            ({"GRAFTAGE_HOST__X": "x"}, "host__x"),
            ({"GRAFTAGE_TREE_HOST__X": "x"}, "host__x"),
            ({"GRAFTAGE_ATTEMPTS__": "x"}, "attempts__"),
        ],
    )
    def test_unknown_variable(self, environment: dict[str, str], key: str) -> None:
        with pytest.raises(SettingsError, match=f"There is no setting `{key}`") as caught:
            read(environment)
        assert caught.value.key == key
        assert caught.value.source == f"environment {next(iter(environment))}"

    @pytest.mark.parametrize(
        ("variable", "near"),
        [
            ("GRAFTAGE_HOTS", "host"),
            ("GRAFTAGE_TRE_HOST", "tree_host"),
            ("GRAFTAGE_LOAR_CONTEXT_WINDOW", "lora_context_window"),
            ("GRAFTAGE_CONFG", "config"),
        ],
    )
    def test_misspelt_variable_gets_the_nearest_name(self, variable: str, near: str) -> None:
        with pytest.raises(SettingsError, match=f"Did you mean `{near}`") as caught:
            read({variable: "x"})
        assert caught.value.source == f"environment {variable}"

    @pytest.mark.parametrize(
        "variable", ["GRAFTAGE_MLX_HOST", "GRAFTAGE_VLLM_API_KEY", "GRAFTAGE_OTEL_ENDPOINT", "GRAFTAGE_HOME"]
    )
    def test_variables_of_absent_plugins_are_ignored(self, variable: str) -> None:
        assert read({variable: "x", "GRAFTAGE_ATTEMPTS": "2"}).settings.attempts == 2

    @pytest.mark.parametrize(
        ("key", "near"), [("hots", "host"), ("timeout", "timeouts"), ("dept", "depth"), ("API_KEY", "api_key")]
    )
    def test_unknown_key_gets_the_nearest_name(self, toml: Any, key: str, near: str) -> None:
        for asked in (
            {"file": toml(f"{key} = 1")},
            {"file": toml(f"[tree]\n{key} = 1")},
            {"mapping": {key: 1}},
            {key: 1},
        ):
            with pytest.raises(SettingsError) as caught:
                read(**asked)
            assert caught.value.hint == f"Did you mean `{near}`?"

    def test_tables_and_variables_of_plugins_are_skipped(self, toml: Any) -> None:
        file = toml("attempts = 2\n[lora]\nfolders = [1]\n[m4]\nact = true\n[big-tree]\nx = 1\n")
        environment = {"GRAFTAGE_LORA_FOLDERS": "x", "GRAFTAGE_M4_ACT__AS": "y", "GRAFTAGE_BIG_TREE_X": "z"}
        assert read(environment, file=file).settings.attempts == 2

    def test_table_of_an_absent_plugin(self, toml: Any) -> None:
        with pytest.raises(SettingsError, match="There is no table `otel`") as caught:
            read(file=toml("[otel]\nx = 1\n"))
        assert "is installed" in str(caught.value.hint)

    def test_plugin_named_like_the_provider(self) -> None:
        assert read({"GRAFTAGE_TREE_HOUSE_DOOR": "open"}, plugins=("tree-house",)).origins == {}

    def test_provider_entry_must_be_a_table(self, toml: Any) -> None:
        with pytest.raises(SettingsError, match=r"`tree` in .* must be a table"):
            read(file=toml("tree = 3"))

    @pytest.mark.parametrize("source", ["variable", "table", "argument", "mapping"])
    def test_invalid_value_names_source_and_meaning(self, toml: Any, source: str) -> None:
        loaded: dict[str, Any] = {
            "variable": {"environment": {"GRAFTAGE_TREE_DEPTH": "0"}},
            "table": {"file": toml("[tree]\ndepth = 0")},
            "argument": {"depth": 0},
            "mapping": {"mapping": {"depth": 0}},
        }
        with pytest.raises(SettingsError) as caught:
            read(**loaded[source])
        origins = {
            "variable": "environment GRAFTAGE_TREE_DEPTH",
            "table": f"{toml('')} [tree]",
            "argument": "argument",
            "mapping": "the `settings` mapping",
        }
        assert (caught.value.key, caught.value.source) == ("depth", origins[source])
        assert caught.value.hint == "`depth`: How deep the roots go."

    @pytest.mark.parametrize(
        "timeouts",
        [
            {"totl": 1},
            {5: 1},
            {"total": [1]},
            {"total": None},
            {"total": True},
            {"total": "soon"},
            {"total": 10**400},
            {"total": math.nan},
            {"idle": -1},
            30,
            "30",
        ],
    )
    def test_invalid_timeouts(self, timeouts: Any) -> None:
        with pytest.raises(SettingsError, match="The setting `timeouts`"):
            read(timeouts=timeouts)

    def test_misspelt_part_gets_the_nearest_name(self) -> None:
        with pytest.raises(SettingsError, match=r"it has no part `totl`\. Did you mean `total`\?(?! ?\.)"):
            read({"GRAFTAGE_TIMEOUTS__TOTL": "1"})

    def test_key_must_be_text(self) -> None:
        with pytest.raises(SettingsError, match="There is no setting `5`"):
            read(mapping={5: 1})  # type: ignore[dict-item]

    @pytest.mark.parametrize("text", ["[" * 100_000, '{"total": ' + "9" * 5000 + "}", '{"total": ' + "9" * 400 + "}"])
    def test_unreadable_variable(self, text: str) -> None:
        with pytest.raises(SettingsError, match="The setting `timeouts`"):
            read({"GRAFTAGE_TIMEOUTS": text})

    @pytest.mark.parametrize("prefix", [5, "a\0b", "\ud800", "a=b", "a b"])
    def test_impossible_prefix(self, prefix: Any) -> None:
        with pytest.raises(SettingsError, match="`env_prefix`"):
            graftage.connect(Echo(), env_prefix=prefix)


def refused_key(**sources: Any) -> str | None:
    """Return the setting that is refused, or None."""
    try:
        read(**sources)
    except SettingsError as error:
        return (error.key or "").partition(".")[0]
    return None


class TestAnyInput:
    """Any input gives settings or a `SettingsError`."""

    @given(
        st.dictionaries(
            st.sampled_from(sorted(Own.model_fields)),
            st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text()),
        )
    )
    def test_from_a_mapping(self, values: dict[str, Any]) -> None:
        assert refused_key(mapping=values) in {None, *values}

    @given(st.sampled_from(["HEADERS", "TIMEOUTS", "ATTEMPTS", "KEEP_ALIVE", "TREE_DEPTH", "HEADERS__A__B"]), st.text())
    def test_from_a_variable(self, name: str, text: str) -> None:
        field = name.removeprefix("TREE_").partition("__")[0].lower()
        assert refused_key(environment={f"GRAFTAGE_{name}": text}) in {None, field}


class TestHeaders:
    def test_key_loses_its_line_feed(self) -> None:
        assert secret(read(api_key=f" {SECRET}\r\n").settings.api_key) == SECRET
        assert secret(read({"TREE_KEY": f"{SECRET}\n"}).settings.api_key) == SECRET
        assert secret(read(api_key=SecretStr(f"{SECRET}\n")).settings.api_key) == SECRET
        assert secret(read(headers={"X-Key": f"{SECRET}\n"}).settings.headers["X-Key"]) == SECRET

    @pytest.mark.parametrize("key", ["", " \n"])
    def test_empty_key_is_none(self, key: str) -> None:
        assert read(api_key=key).settings.api_key is None

    @pytest.mark.parametrize("inside", ["\n", "\r\n", "\0", "\x7f", "\x85", "\u2603", "\ud800"])
    def test_invalid_value_is_refused_and_hidden(self, inside: str) -> None:
        settings: dict[str, Any] = {"api_key": f"{SECRET}{inside}x", "headers": {"X-Key": f"{SECRET}{inside}x"}}
        for key, value in settings.items():
            with pytest.raises(SettingsError, match=f"The setting `{key}`") as caught:
                read(**{key: value})
            assert (caught.value.key, SECRET in "".join(traceback.format_exception(caught.value))) == (key, False)
            assert caught.value.hint

    @pytest.mark.parametrize("name", ["", "a b", "a\nb", "a:", "é", f"Authorization: Bearer {SECRET}"])
    def test_invalid_name_is_refused_and_hidden(self, name: str) -> None:
        with pytest.raises(SettingsError, match="The setting `headers`") as caught:
            read(headers={name: "x"})
        assert SECRET not in "".join(traceback.format_exception(caught.value))

    def test_every_legal_one_is_kept(self) -> None:
        headers = {"X-Team": "a\tb", "x_1!#$%&'*+.^`|~": "", "Name": "J\xfcrgen"}
        assert {name: secret(each) for name, each in read(headers=headers).settings.headers.items()} == headers


def secret(value: SecretStr | None) -> str | None:
    """Return the text of a secret."""
    return None if value is None else value.get_secret_value()


class TestSecrets:
    def test_hidden_in_settings_and_sources(self) -> None:
        environment = {"GRAFTAGE_API_KEY": SECRET, "GRAFTAGE_HEADERS": f'{{"a": "{SECRET}"}}', "OTHERS": SECRET}
        loaded = read(environment, host=f"http://me:{SECRET}@there:1")
        for thing in (loaded, loaded.settings, Sources(environment=environment)):
            assert SECRET not in f"{thing!r} {thing!s}"
        assert loaded.settings.api_key is not None
        assert loaded.settings.api_key.get_secret_value() == SECRET
        assert "http://there:1" in repr(loaded.settings)

    @pytest.mark.parametrize(
        "asked",
        [
            {"api_key": [SECRET]},
            {"headers": SECRET},
            {"headers": {"a": [SECRET]}},
            {"environment": {"GRAFTAGE_HEADERS": f"{{{SECRET}"}},
            {"environment": {"GRAFTAGE_HEADERS": f'["{SECRET}"]'}},
            {"environment": {"GRAFTAGE_API_KY": SECRET}},
            {"mapping": {"api_ky": SECRET}},
        ],
    )
    def test_hidden_in_errors_and_tracebacks(self, asked: dict[str, Any]) -> None:
        with pytest.raises(SettingsError) as caught:
            read(**asked)
        printed = "".join(traceback.format_exception(caught.value))
        again = pickle.loads(pickle.dumps(copy.copy(caught.value)))
        assert SECRET not in f"{printed} {again!r} {again.to_dict()}"

    @pytest.mark.parametrize(
        ("address", "shown"),
        [
            ("http://me:pass@there:1/x", "http://there:1/x"),
            ("me:pass@there", "there"),
            ("http://me:pa/ss@there", "http://there"),
            ("http://there:1", "http://there:1"),
            ("", ""),
        ],
    )
    def test_hidden_in_addresses(self, address: str, shown: str) -> None:
        assert without_user(address) == shown


class Tree(Echo):
    name = "tree"

    @hookimpl
    def settings_model(self) -> type[Settings]:
        return Own


class TestConnect:
    def test_provider_gets_its_own_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GRAFTAGE_TREE_DEPTH", "3")
        tree = Tree()
        with graftage.connect(tree, attempts=1) as llm:
            assert llm.settings == Own(depth=3, attempts=1)
            assert llm.origins == {"depth": "environment GRAFTAGE_TREE_DEPTH", "attempts": "argument"}
        assert tree.calls[0][1].settings is llm.settings

    def test_takes_settings_objects_and_files(self, toml: Any) -> None:
        with graftage.connect(Tree(), settings=Own(depth=4)) as llm:
            assert llm.settings == Own(depth=4)
        with graftage.connect(Tree(), settings=toml("[tree]\ndepth = 5\n")) as llm:
            assert llm.settings == Own(depth=5)
        with pytest.raises(SettingsError, match="`settings` must be"):
            graftage.connect(Tree(), settings=5)  # type: ignore[arg-type]


class BeeSettings(PluginSettings):
    """The settings of the bee."""

    honey: int = Field(default=1, ge=0, description="Jars of it")
    meadow: str = "here"


class Bee:
    """A policy and resolver that keeps the settings of each query."""

    name = "bee"

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.seen: list[Any] = []

    @hookimpl
    def settings_model(self) -> type[PluginSettings]:
        return BeeSettings

    @hookimpl
    def resource_limits(self, query: LimitsQuery) -> None:
        self.seen.append(query.settings)

    @hookimpl
    def resolve_adapter(self, request: ResolveRequest) -> None:
        self.seen.append(request.settings)

    @hookimpl
    def list_adapters(self, request: ListAdaptersRequest) -> tuple[AdapterInfo, ...]:
        self.seen.append(request.settings)
        return ()


def asked(both: Any, bee: Bee, **arguments: Any) -> BeeSettings:
    """Return the settings that every hook of the bee got."""
    llm = both.opened(Echo(), model="m", plugins=[bee], **arguments)
    llm.chat("Hi")
    llm.adapters()
    with pytest.raises(AdapterNotFound):
        llm.chat("Hi", adapter="wax")
    assert len(bee.seen) >= 3
    assert len(set(bee.seen)) == 1
    return bee.seen[0]  # type: ignore[no-any-return]


class TestPluginSettings:
    def test_order_of_sources(self, both: Any, toml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GRAFTAGE_CONFIG", str(toml("[bee]\nhoney = 2\nmeadow = 'file'\n")))
        assert asked(both, Bee()) == BeeSettings(honey=2, meadow="file")
        monkeypatch.setenv("GRAFTAGE_BEE_HONEY", "3")
        assert asked(both, Bee()) == BeeSettings(honey=3, meadow="file")
        assert asked(both, Bee(), settings={"bee": {"honey": 4}}) == BeeSettings(honey=4, meadow="file")
        assert asked(both, Bee(honey=5), settings={"bee": {"honey": 4}}) == BeeSettings(honey=5, meadow="file")

    def test_file_and_prefix_of_the_client(self, both: Any, toml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GRAFTAGE_BEE_HONEY", "9")
        monkeypatch.setenv("MYAPP_BEE_HONEY", "3")
        found = asked(both, Bee(), settings=toml("[bee]\nmeadow = 'mine'\n"), env_prefix="MYAPP")
        assert found == BeeSettings(honey=3, meadow="mine")

    def test_each_client_has_its_own(self, both: Any) -> None:
        bee = Bee()
        for honey in (2, 3):
            both.opened(Echo(), model="m", plugins=[bee], settings={"bee": {"honey": honey}}).chat("Hi")
        assert [each.honey for each in bee.seen] == [2, 3]

    @pytest.mark.parametrize(
        ("arguments", "environment", "says"),
        [
            ({"settings": {"bee": {"hony": 1}}}, {}, "Did you mean `honey`"),
            ({"settings": {"bee": {"honey": -1}}}, {}, "Jars of it"),
            ({"settings": {"bee": 3}}, {}, "must be a table"),
            ({"settings": {"bea": {"honey": 1}}}, {}, "Did you mean `bee`"),
            ({}, {"GRAFTAGE_BEE_HONY": "1"}, "Did you mean `honey`"),
            ({}, {"GRAFTAGE_BEEE_HONEY": "1"}, "Did you mean `bee_honey`"),
            ({"honey": 1}, {}, "no setting `honey`"),
        ],
    )
    def test_invalid_ones_fail_at_opening(
        self, both: Any, monkeypatch: pytest.MonkeyPatch, arguments: Any, environment: dict[str, str], says: str
    ) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SettingsError, match=says):
            both.opened(Echo(), plugins=[Bee()], **arguments)

    def test_misspelt_key_of_an_installed_plugin(self, both: Any, toml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GRAFTAGE_DISABLED_PLUGINS", "m4")
        with pytest.raises(SettingsError, match=r"`foldres`.*\[lora\].*Did you mean `folders`"):
            both.opened(Echo(), settings=toml("[lora]\nfoldres = ['x']\n"))

    def test_failing_settings_model_disables_the_plugin(self, both: Any) -> None:
        class Wasp(Bee):
            name = "wasp"

            @hookimpl
            def settings_model(self) -> type[PluginSettings]:
                raise RuntimeError("bzz")

        wasp = Wasp()
        with pytest.warns(PluginWarning, match=r"`wasp` is left out.*settings_model.*bzz"):
            both.opened(Echo(), model="m", plugins=[wasp]).chat("Hi")
        assert wasp.seen == []

    @pytest.mark.parametrize(("prefix", "enabled"), [(None, False), ("MYAPP", True)])
    def test_disabled_plugins_follow_the_prefix(
        self, both: Any, site: Any, monkeypatch: pytest.MonkeyPatch, prefix: str | None, enabled: bool
    ) -> None:
        source = "from graftage.hookspecs import hookimpl\n"
        source += "seen = []\n@hookimpl\ndef observe(event):\n    seen.append(event)\n"
        site.add("graftage-eye", plugins={"eye": "eye_plugin"}, modules={"eye_plugin": source})
        monkeypatch.setenv("GRAFTAGE_DISABLED_PLUGINS", "eye,lora,m4")
        monkeypatch.setenv("MYAPP_DISABLED_PLUGINS", "lora,m4")
        both.opened(Echo(), model="m", env_prefix=prefix).chat("Hi")
        assert ("eye_plugin" in site.imported()) is enabled

    def test_strict_plugins_follows_the_prefix(self, both: Any, site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        site.add("graftage-ill", plugins={"ill": "ill"}, modules={"ill": "raise OSError('no sap')\n"})
        monkeypatch.setenv("MYAPP_DISABLED_PLUGINS", "lora,m4")
        monkeypatch.setenv("MYAPP_STRICT_PLUGINS", "1")
        with pytest.raises(PluginLoadError, match="no sap"):
            both.opened(Echo(), env_prefix="MYAPP")


class Deaf(Echo):
    """A provider that declares the parameters it reads, or does not."""

    name = "deaf"

    def __init__(self, parameters: frozenset[str] | None) -> None:
        super().__init__(["yes"] * 4)
        self.parameters = parameters

    @hookimpl
    def connect(self, request: ConnectRequest) -> Any:
        connection: Any = super().connect(request)
        parameters = self.parameters

        class Said(type(connection)):  # type: ignore[misc] # known when it runs
            @hookimpl
            def capabilities(self) -> Capabilities:
                declared: Capabilities = super().capabilities()
                return replace(declared, parameters=parameters)

        connection.__class__ = Said
        return connection


class TestUnreadParameters:
    @pytest.mark.parametrize("operation", ["chat", "generate", "stream", "embed"])
    def test_are_a_warning(self, both: Any, operation: str) -> None:
        llm = both.opened(Deaf(frozenset({"max_tokens"})), model="m", keep_alive="5m")
        asked = {"context_window": 512} | ({} if operation == "embed" else {"max_tokens": 5})
        if operation == "stream":
            with llm.chat("Hi", stream=True, **asked) as stream:
                list(stream)
            reply = stream.reply
        else:
            reply = getattr(llm, operation)("Hi", **asked)
        assert [each.partition(":")[0] for each in reply.warnings] == [
            "`keep_alive` has no effect",
            "`context_window` has no effect",
        ]

    def test_undeclared_provider_is_trusted(self, both: Any) -> None:
        assert both.opened(Deaf(None), model="m").chat("Hi", keep_alive=5, max_tokens=3).warnings == ()
