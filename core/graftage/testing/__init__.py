"""Tools for tests: a scripted provider and recorded responses. Needs `graftage[testing]`."""

from graftage.testing.cassettes import Cassette, CassetteError, CassetteMiss
from graftage.testing.echo import Echo, Pause

__all__ = ["Cassette", "CassetteError", "CassetteMiss", "Echo", "Pause"]
