"""Resource limits for Macs with Apple silicon: a request that does not fit is refused, with a way out.

Installed, it works by itself. To act as another machine, or to change settings, pass your own object:

    graftage.connect("ollama", model="qwen3:8b", plugins=[graftage_m4.M4(machine="mini-16.json")])
"""

from __future__ import annotations

import platform
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, cast

from graftage.hookspecs import hookimpl
from graftage.types import NEVER_APPLIES

if TYPE_CHECKING:
    from collections.abc import Callable

    from graftage.calls import LimitsQuery
    from graftage.types import Limits
    from graftage_m4._machine import Runner
    from graftage_m4._policy import Policy
    from graftage_m4._settings import M4Settings

__all__ = ["M4", "plugin"]


class M4:
    """The policy as a plugin. It reads nothing, and imports nothing heavy, before the first request.

    All objects for one Mac, or for one machine file, share what they granted. An object with a custom runner or clock
    stands for a separate Mac, so that a test starts fresh.

    Args:
        runner: runs the readings; the default is this Mac, or the machine file of the settings.
        clock: monotonic seconds; tests may pass their own.
        settings: `machine`, `profile`, `kv_type` and others (see the README); they win over environment and file.
    """

    name = "m4"

    def __init__(
        self, *, runner: Runner | None = None, clock: Callable[[], float] = time.monotonic, **settings: Any
    ) -> None:
        self._runner = runner
        self._clock = clock
        self.arguments = settings
        self._policies: dict[M4Settings, Policy | None] = {}
        self._lock = threading.Lock()

    @hookimpl
    def settings_model(self) -> type[M4Settings]:
        """Return the model of this plugin's settings."""
        from graftage_m4._settings import M4Settings

        return M4Settings

    @hookimpl
    def resource_limits(self, query: LimitsQuery) -> Limits | None:
        """Return limits for one request; none apply without Apple silicon, or if the server is on another machine."""
        settings = cast("M4Settings | None", query.settings) or self.settings()
        policy = self.policy(settings)
        if policy is None:
            return NEVER_APPLIES
        from graftage_m4._state import is_local_server

        return policy.limits(query) if self._acts(settings) or is_local_server(query.address) else NEVER_APPLIES

    def settings(self) -> M4Settings:
        """Load the settings of the process, for a caller without a client.

        Raises:
            SettingsError: a setting is unknown or invalid.
        """
        from graftage.settings import load

        return load(self.settings_model(), name=self.name, arguments=self.arguments).settings

    def policy(self, settings: M4Settings | None = None) -> Policy | None:
        """Return the policy for these settings, built once; `None` without Apple silicon or a machine to act as.

        Raises:
            SettingsError: a setting or the machine file is invalid.
        """
        settings = settings or self.settings()
        with self._lock:
            if settings not in self._policies:
                self._policies[settings] = self._build(settings)
            return self._policies[settings]

    def _acts(self, settings: M4Settings) -> bool:
        """Return whether it acts as a given machine, so that it does not matter where the server is."""
        return self._runner is not None or settings.machine is not None

    def _build(self, settings: M4Settings) -> Policy | None:
        if not self._acts(settings) and (sys.platform != "darwin" or platform.machine() != "arm64"):
            return None
        from graftage_m4._machine import Collector, Live, Recorded, read_machine
        from graftage_m4._policy import Policy
        from graftage_m4._state import Ledger, ledger_of

        runner = self._runner
        if runner is None:
            runner = Recorded(read_machine(settings.machine), self._clock) if settings.machine else Live()
        custom = self._runner is not None or self._clock is not time.monotonic
        ledger = Ledger() if custom else ledger_of(settings.machine)
        return Policy(settings, Collector(runner, self._clock), ledger)


plugin = M4()
