"""NAME keeps the contract: the suite of Graftage, under both clients."""

from graftage.testing.conformance import ProviderSuite

import graftage_NAME


class TestProvider(ProviderSuite):
    provider = graftage_NAME
