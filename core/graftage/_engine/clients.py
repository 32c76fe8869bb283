"""Make the HTTP clients of one connection: with its settings, on its transport, closed with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from graftage.calls import Call
from graftage.exceptions import SettingsError

if TYPE_CHECKING:
    from graftage.http import Colour, Http, Refusal, Transport
    from graftage.settings import Settings

__all__ = ["Clients"]


class Clients:
    """Makes the HTTP clients of one connection, and closes them."""

    def __init__(self, settings: Settings, colour: Colour) -> None:
        self._settings = settings
        self.colour = colour
        """Whether the hooks that use them are sync or async."""
        self._made: list[Http] = []

    def make(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str] | None = None,
        refusal: Refusal | None = None,
        server: str = "the server",
        transport: Callable[[Callable[[], Transport]], Transport] | None = None,
    ) -> Http:
        """Make a client, as `ConnectRequest.http` documents."""
        # A provider without HTTP need not import these.
        from graftage.http.address import read_base
        from graftage.http.client import Http

        def network() -> Transport:
            return transport(self._network) if transport is not None else self._network()

        def build() -> Transport:
            wrapper = self._settings.transport
            built: Transport = wrapper.wrap(network) if wrapper is not None else network()
            if built.colour not in (None, self.colour):
                raise SettingsError(
                    f"The `transport` is for {built.colour} clients, and this client is {self.colour}.",
                    key="transport",
                    hint="Give each kind of client a transport of its kind.",
                )
            return built

        base, basic = read_base(base_url)
        http = Http(
            base,
            build=build,
            colour=self.colour,
            begin=self._begin,
            headers=self._headers(headers or {}, basic),
            refusal=refusal,
            server=server,
        )
        self._made.append(http)
        return http

    def _begin(self) -> Call:
        """Return the call for a request of an SDK."""
        timeouts = self._settings.timeouts
        return Call(
            operation="native",
            timeouts=timeouts,
            deadline=time.monotonic() + timeouts.total,
            max_reply_bytes=self._settings.max_reply_bytes,
        )

    def _network(self) -> Transport:
        if self.colour == "sync":
            from graftage.http._blocking import BlockingNetwork

            return BlockingNetwork()
        from graftage.http._asynchronous import AsyncNetwork

        return AsyncNetwork()

    def _headers(self, own: Mapping[str, str], basic: dict[str, str]) -> dict[str, str]:
        settings = self._settings
        given = {name.lower(): value for name, value in own.items()}
        if settings.api_key is not None:
            given["authorization"] = f"Bearer {settings.api_key.get_secret_value()}"
        # A password in the address is for this server, while a key may be for all.
        return given | basic | {name.lower(): value.get_secret_value() for name, value in settings.headers.items()}

    async def close(self) -> None:
        """Close all of them."""
        for http in self._made:
            await http.close()
