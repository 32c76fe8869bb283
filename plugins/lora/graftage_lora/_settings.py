"""The settings of the plugin."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import Field, field_validator

from graftage.settings import PluginSettings

__all__ = ["LoraSettings"]


def _hub() -> Path:
    """Return where `huggingface_hub` keeps its downloads, by its variables."""
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


class LoraSettings(PluginSettings):
    """Where adapters are searched, and which are allowed."""

    folders: tuple[Path, ...] = Field(
        default=(), description="Folders of adapters; in the variable, separated as in PATH"
    )
    project: Path | None = Field(default=None, description="A project's folder: its `.graftage/adapters` is searched")
    registry: Path = Field(
        default_factory=lambda: platformdirs.user_config_path("graftage", appauthor=False) / "adapters.toml",
        description="The user's file that binds names to adapters",
    )
    hub: Path = Field(default_factory=_hub, description="The cache of `huggingface_hub`; located by HF_… variables")
    cache: Path = Field(
        default_factory=lambda: platformdirs.user_cache_path("graftage", appauthor=False) / "adapters",
        description="Where converted adapters are kept",
    )
    paths: bool = Field(
        default=True, description="Whether a reference may be a path; names alone cannot leave a folder"
    )
    max_bytes: int = Field(default=2 << 30, ge=1024, description="The largest adapter")
    leave_out_vision: bool = Field(
        default=False, description="Whether an adapter is used without what it changes in a vision or audio tower"
    )
    merge_type: Literal["Q8_0", "F16"] = Field(
        default="Q8_0", description="The type of a quantised tensor that a merge has changed"
    )

    @field_validator("folders", mode="before")
    @classmethod
    def _split(cls, value: object) -> Any:
        return tuple(filter(None, value.split(os.pathsep))) if isinstance(value, str) else value

    @field_validator("folders", "project", "registry", "hub", "cache")
    @classmethod
    def _at_home(cls, value: object) -> Any:
        if isinstance(value, tuple):
            return tuple(map(_expanded, value))
        return _expanded(value) if isinstance(value, Path) else value
