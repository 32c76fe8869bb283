"""The plugin's settings: arguments over `GRAFTAGE_M4_*` over the table `[m4]` of the settings file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from graftage.exceptions import SettingsError
from graftage.settings import Sources, nearest

__all__ = ["PREFIX", "M4Settings", "load"]

PREFIX = "GRAFTAGE_M4_"


class M4Settings(BaseSettings):
    """What a host, or the person whose Mac it is, can say."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=PREFIX, env_ignore_empty=True)

    machine: Path | None = Field(
        default=None, description="A machine file to act as, on any computer; `graftage m4 record` writes one"
    )
    profile: Literal["dedicated", "shared", "strict", "relaxed"] = Field(
        default="dedicated", description="How much is left to others: `shared` is for a Mac that a person works at"
    )
    kv_type: Literal["f16", "q8_0", "q4_0"] = Field(
        default="f16", description="The server's cache type (`OLLAMA_KV_CACHE_TYPE`), which no client can see"
    )
    slots: int | None = Field(
        default=None, ge=1, le=64, description="The server's parallel slots (`OLLAMA_NUM_PARALLEL`), where known"
    )
    flash_attention: bool = Field(default=True, description="Whether the server uses it")
    minimum_window: int = Field(default=4096, ge=256, description="Refuse a model rather than give it fewer tokens")
    prefill_seconds: float = Field(
        default=120.0, gt=0, description="A window that nobody asked for is no longer than can be read in that time"
    )
    queued_requests: int = Field(
        default=16,
        ge=0,
        description="Requests that may wait: 16 answers of 400 tokens at 20 tokens a second take the 300 s that a call "
        "waits for its first token",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the library's signature
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then the environment; `load` has put the file's table beneath them."""
        return (init_settings, env_settings)


def load(arguments: Mapping[str, Any]) -> M4Settings:
    """Gather and check the settings.

    Raises:
        SettingsError: a key is unknown or a value is wrong; the message names the source and the nearest key.
    """
    sources = Sources.of()
    table = sources.document().get("m4", {})
    origin = f"{sources.file} [m4]"
    if not isinstance(table, Mapping):
        raise SettingsError(f"`m4` in {sources.file} must be a table.", key="m4", source=origin)
    set_ones = (name for name, value in sources.environment.items() if name.startswith(PREFIX) and value)
    variables = {name.removeprefix(PREFIX).lower() for name in set_ones}
    _require(arguments, "argument")
    _require(table, origin)
    _require(variables, f"environment {PREFIX}*")
    beneath = {key: value for key, value in table.items() if key not in variables}
    try:
        return M4Settings(**{**beneath, **arguments})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        hint = "`graftage_m4` lists the settings in its README."
        raise SettingsError(f"The setting `{key}` of m4 is wrong: {first['msg']}.", key=key, hint=hint) from None


def _require(keys: Iterable[str], origin: str) -> None:
    for key in keys:
        if key not in M4Settings.model_fields:
            hint = nearest(key, M4Settings.model_fields)
            raise SettingsError(f"There is no setting `{key}` of m4 ({origin}).", key=key, source=origin, hint=hint)
