"""The suite for providers: what the contract demands, as tests that a plugin adopts. Needs `graftage[testing]`.

    class TestMine(ProviderSuite):
        provider = graftage_mine
        cassettes = Path(__file__).parent / "cassettes"
        settings = {"host": "http://127.0.0.1:8080/v1"}
        model = "tiny"

Each test runs under both clients. What the provider does not declare is skipped as "not offered", and a report at the
end lists what was seen. Read `suite.py` to learn the contract: each test is one claim, and says what to do if it fails.
"""

import pytest

pytest.register_assert_rewrite("graftage.testing.conformance.suite")

from graftage.testing.conformance.suite import ProviderSuite  # noqa: E402 - its asserts must be rewritten first

__all__ = ["ProviderSuite"]
