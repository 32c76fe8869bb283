"""The suite for providers, adopted by providers from outside, by Echo, and by broken ones."""

from __future__ import annotations

from typing import Any

from graftage.testing import Echo
from graftage.testing.conformance import ProviderSuite


class TestEcho(ProviderSuite):
    model = "echo:latest"

    @property
    def provider(self) -> Any:
        return Echo(strict=True)
