"""Settings of this plugin: arguments over `GRAFTAGE_LORA_…` over the table `[lora]` of Graftage's settings file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import platformdirs
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from graftage.exceptions import SettingsError
from graftage.settings import Sources, nearest

__all__ = ["LoraSettings", "load"]

PREFIX: Final = "GRAFTAGE_LORA_"
TABLE: Final = "lora"


def _hub() -> Path:
    """Where `huggingface_hub` keeps what it downloads, by its own variables."""
    if named := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(named)
    home = os.environ.get("HF_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(home) if home else Path(cache) / "huggingface") / "hub"


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"the home folder in `{path}` is not known") from None


class LoraSettings(BaseSettings):
    """Where adapters are looked for, and how far they are let in."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=PREFIX)

    folders: Annotated[tuple[Path, ...], NoDecode] = Field(
        default=(), description="Folders of adapters; in the variable, separated as in PATH"
    )
    project: Path | None = Field(
        default=None, description="A project's folder: adapters are looked for in its `.graftage/adapters`"
    )
    registry: Path = Field(
        default_factory=lambda: platformdirs.user_config_path("graftage", appauthor=False) / "adapters.toml",
        description="The user's own file that binds names to adapters",
    )
    hub: Path = Field(default_factory=_hub, description="The cache of `huggingface_hub`, read and never filled")
    cache: Path = Field(
        default_factory=lambda: platformdirs.user_cache_path("graftage", appauthor=False) / "adapters",
        description="Where converted adapters are kept",
    )
    paths: bool = Field(
        default=True, description="Whether a reference may be a path; names alone cannot leave a folder"
    )
    max_bytes: int = Field(default=2 << 30, ge=1024, description="A larger adapter is refused")
    merge_type: Literal["Q8_0", "F16"] = Field(
        default="Q8_0", description="Type of a quantised tensor after a merge has changed it"
    )

    @field_validator("folders", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(filter(None, value.split(os.pathsep))) if isinstance(value, str) else value

    @field_validator("folders", "project", "registry", "hub", "cache")
    @classmethod
    def _at_home(cls, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(_expanded, value))
        return _expanded(value) if isinstance(value, Path) else value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the library's signature
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take what `load` gathered and nothing else: it knows where each value came from."""
        return (init_settings,)


def load(arguments: Mapping[str, Any]) -> LoraSettings:
    """Gather and check the settings.

    Raises:
        SettingsError: a key is unknown or a value is wrong; the message names the source and the nearest key.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in _layers(arguments):
        for key, value in layer.items():
            _require(key, origin)
            if key not in values:
                values[key], origins[key] = value, origin
    try:
        return LoraSettings(**values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        # The hub is the only default that may be wrong: other variables name it.
        source = origins.get(key, "environment HF_…")
        raise SettingsError(
            f"The setting `{key}` ({source}) of the plugin `lora` is wrong: {first['msg']}.", key=key, source=source
        ) from None


def _layers(arguments: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    yield "argument", arguments
    yield f"environment {PREFIX}…", _environment()
    sources = Sources.of()
    table = sources.document().get(TABLE, {})
    if not isinstance(table, Mapping):
        raise SettingsError(f"`{TABLE}` in {sources.file} must be a table.", key=TABLE, source=str(sources.file))
    yield f"{sources.file} [{TABLE}]", table


def _environment() -> dict[str, Any]:
    for variable, value in os.environ.items():
        if variable.startswith(PREFIX) and value:
            _require(variable.removeprefix(PREFIX).lower(), f"environment {variable}")
    found = EnvSettingsSource(LoraSettings, env_prefix=PREFIX, env_ignore_empty=True)()
    return {key: value for key, value in found.items() if key in LoraSettings.model_fields}


def _require(key: str, origin: str) -> None:
    if key not in LoraSettings.model_fields:
        raise SettingsError(
            f"The plugin `lora` has no setting `{key}` ({origin}).",
            key=key,
            source=origin,
            hint=nearest(key, LoraSettings.model_fields),
        )
