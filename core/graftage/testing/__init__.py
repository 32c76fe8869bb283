"""Tools for tests: a scripted provider and recorded responses. Needs `graftage[testing]`."""

from graftage.testing.cassettes import Cassette, CassetteError, CassetteMiss
from graftage.testing.echo import Echo, Pause
from graftage.testing.replay import Replay, replaying
from graftage.testing.reruns import Comparison, rerun

__all__ = ["Cassette", "CassetteError", "CassetteMiss", "Comparison", "Echo", "Pause", "Replay", "replaying", "rerun"]
