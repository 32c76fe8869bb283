"""NAME keeps the contract: the suite of Graftage, under both clients."""

from pathlib import Path

from graftage.testing.conformance import ProviderSuite

import graftage_NAME


class TestProvider(ProviderSuite):
    provider = graftage_NAME
    cassettes = Path(__file__).parent / "cassettes"
    settings = {"host": "http://127.0.0.1:11434/v1"}
    model = "smollm2:135m"
    models = {"tools": "smollm2-tools:135m"}
