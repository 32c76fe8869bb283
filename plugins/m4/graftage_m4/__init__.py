"""Resource limits for Macs with Apple silicon: what fits is admitted, what does not is refused with what would.

Installed, it works by itself. To act as another machine, or with other settings, give an object of your own:

    graftage.connect("ollama", model="qwen3:8b", plugins=[graftage_m4.M4(machine="mini-16.json")])
"""

from __future__ import annotations

import platform
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from graftage.hookspecs import hookimpl
from graftage_m4._ledger import Ledger, is_here, ledger_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from graftage.types import Limits, LimitsQuery
    from graftage_m4._policy import Policy
    from graftage_m4._readings import Runner

__all__ = ["M4", "plugin"]


class M4:
    """The policy as a plugin. Nothing is read, and nothing heavy is imported, before the first request.

    All objects for one Mac, or for one machine file, know what the others gave. One with a runner or a clock of its own
    stands for a Mac of its own, so a test that gives one starts afresh.

    Args:
        runner: runs the readings; the default is this Mac, or the machine file of the settings.
        clock: seconds that never go back; a test may have one of its own.
        settings: `machine`, `profile`, `kv_type` and the others of the README; they win over environment and file.
    """

    name = "m4"

    def __init__(
        self, *, runner: Runner | None = None, clock: Callable[[], float] = time.monotonic, **settings: Any
    ) -> None:
        self._runner = runner
        self._clock = clock
        self._settings = settings
        self._policy: Policy | None = None
        self._acts = False
        """Whether it was told what machine to be, wherever the server is."""
        self._ready = False
        self._lock = threading.Lock()

    @hookimpl
    def resource_limits(self, query: LimitsQuery) -> Limits | None:
        """Limits for one request; None where this is no Mac with Apple silicon, or the server is elsewhere."""
        policy = self.policy()
        if policy is None or not (self._acts or is_here(query.address)):
            return None
        return policy.limits(query)

    def policy(self) -> Policy | None:
        """What decides, built once; None off a Mac with Apple silicon, unless told to act as one.

        Raises:
            SettingsError: a setting or the machine file is wrong.
        """
        with self._lock:
            if not self._ready:
                self._policy = self._build()
                self._ready = True
            return self._policy

    def _build(self) -> Policy | None:
        from graftage_m4._settings import load  # noqa: PLC0415 - a host that is no Mac pays for nothing more

        settings = load(self._settings)
        self._acts = self._runner is not None or settings.machine is not None
        if not self._acts and (sys.platform != "darwin" or platform.machine() != "arm64"):
            return None
        from graftage_m4._machine import Recorded, read_machine  # noqa: PLC0415
        from graftage_m4._policy import Policy  # noqa: PLC0415
        from graftage_m4._readings import Collector, Live  # noqa: PLC0415

        runner = self._runner
        if runner is None:
            runner = Recorded(read_machine(settings.machine), self._clock) if settings.machine else Live()
        own = self._runner is not None or self._clock is not time.monotonic
        ledger = Ledger() if own else ledger_of(settings.machine)
        return Policy(settings, Collector(runner, self._clock), ledger)


plugin = M4()
