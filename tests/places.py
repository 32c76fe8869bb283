"""Folders for the tests of several distributions."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LORA = ROOT / "tests" / "assets" / "lora"
M4 = ROOT / "plugins" / "m4" / "tests" / "assets"
