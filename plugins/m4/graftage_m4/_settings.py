"""The settings of the plugin."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from graftage.settings import PluginSettings

if TYPE_CHECKING:
    from graftage.footprint import Footprint, Shape

__all__ = ["M4Settings"]


class M4Settings(PluginSettings):
    """The settings of the policy."""

    machine: Path | None = Field(
        default=None, description="A machine file: act as that Mac; `graftage m4 record` writes one"
    )
    profile: Literal["dedicated", "shared", "strict", "relaxed"] = Field(
        default="dedicated", description="How much is left to other programs; `shared` for a Mac that a person works at"
    )
    kv_type: Literal["f16", "q8_0", "q4_0"] = Field(
        default="f16", description="The server's cache type (`OLLAMA_KV_CACHE_TYPE`), which clients cannot read"
    )
    slots: int | None = Field(
        default=None, ge=1, le=64, description="The server's parallel slots (`OLLAMA_NUM_PARALLEL`), if known"
    )
    flash_attention: bool = Field(default=True, description="Whether the server uses flash attention")
    minimum_window: int = Field(
        default=4096, ge=256, description="Refuse a model rather than load it with fewer tokens"
    )
    prefill_seconds: float = Field(
        default=120.0, gt=0, description="A default window is at most as long as can be read in so many seconds"
    )
    queued_requests: int = Field(
        default=16,
        ge=0,
        description="Requests that may wait: 16 replies of 400 tokens at 20 tokens a second take the 300 s that a call "
        "waits for its first token",
    )

    def footprint(self, shape: Shape, window: int, slots: int | None = None) -> Footprint:
        """Estimate what a model takes with a window, in the server that these settings describe."""
        from graftage.footprint import footprint  # Not needed to connect.

        return footprint(
            shape,
            window,
            slots=slots or self.slots or 1,
            kv_type=self.kv_type,
            flash_attention=self.flash_attention,
        )
