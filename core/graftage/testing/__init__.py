"""For those who test against Graftage: a scripted provider and recorded answers. Needs `graftage[testing]`."""

from graftage.testing.cassettes import Cassette, CassetteError, CassetteMiss
from graftage.testing.echo import Echo, Pause

__all__ = ["Cassette", "CassetteError", "CassetteMiss", "Echo", "Pause"]
