"""The tests of `graftage plugins check`: the suite for an installed provider, without recordings."""

from __future__ import annotations

import os
from typing import Any, Final

from graftage import connect
from graftage._engine.plugins import Catalog
from graftage.testing.conformance.suite import ProviderSuite

__all__ = ["MODEL", "NAME", "OPTIONS"]

NAME: Final = "GRAFTAGE_CHECKED_PROVIDER"
MODEL: Final = "GRAFTAGE_CHECKED_MODEL"
"""The variables that name the provider and the model."""
OPTIONS: Final = (
    "-q",
    "-r",
    "N",
    "--no-header",
    "--tb=short",
    "--import-mode=importlib",
    "-c",
    os.devnull,
    "-p",
    "no:cacheprovider",
    "-p",
    "graftage.testing.conformance.report",
)

if NAME in os.environ:

    class TestInstalled(ProviderSuite):
        """The provider that the variable names."""

        @property
        def provider(self) -> Any:
            """The plugin object."""
            return Catalog().provider(os.environ[NAME]).plugin

        @property
        def model(self) -> str | None:  # type: ignore[override]
            """The named model, the provider's own, or any name, which the stand-in takes."""
            with connect(self.provider) as llm:
                return os.environ[MODEL] or llm.model or "any"
