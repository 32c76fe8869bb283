"""`graftage providers --scan`: finds the servers that listen on this machine."""

import json
import re
import socket
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from graftage._cli import options, show
from graftage._cli.errors import describe
from graftage._cli.names import settings_file
from graftage._cli.parallel import run_all
from graftage.exceptions import AuthenticationFailed, GraftageError

if TYPE_CHECKING:
    from graftage import Client
    from graftage._engine.instances import Listed
    from graftage._engine.plugins import Entry

__all__ = ["scan"]

TIMEOUT = 5.0
"""Seconds for each server; all are asked at the same time."""
PORT_TIMEOUT = 0.5
"""Seconds until a port of this machine is open."""
GRACE = 1.0
NAME = "scanned-server"
"""The instance that a server is while it is asked."""
PORTS = {"http": 80, "https": 443}
STATES = ("server", "other", "closed")
"""States of an address, the most interesting one first."""


@dataclass(kw_only=True)
class Place:
    """An address at which a provider may find a server, and what is there."""

    address: str
    provider: str
    state: Literal["server", "other", "closed"] = "closed"
    """`other`: something listens there that is not a server of this provider, or does not say so."""
    server: str | None = None
    version: str | None = None
    models: list[str] | None = None
    features: list[str] | None = None
    """What the provider can do there."""
    name: str | None = None
    """The provider or the instance that uses it."""
    instance: dict[str, str] | None = None
    """The table of a new instance for it, which `name` then names."""
    problem: str | None = None
    """What is wrong with what listens there."""


def scan(timeout: float | None, *, as_json: bool) -> None:
    """Find the servers at the addresses that providers know, and print them."""
    from graftage._engine.instances import listed

    known = listed()
    places = _usual_places()
    _look_at(places, timeout or TIMEOUT)
    found = [replace(each) for each in _best(places)]  # A copy, which late results cannot change.
    _name(found, known)
    if as_json:
        show.print_json([asdict(each) for each in found])
    else:
        _print(found)


def _usual_places() -> list[Place]:
    """Return the addresses that the installed providers name. A provider that fails is left out with a note."""
    from graftage._engine.plugins import Catalog

    catalog = Catalog()
    places = []
    for name in catalog.names("provider", enabled=True):
        try:
            places += [Place(address=each, provider=name) for each in _addresses(catalog.provider(name))]
        except Exception as error:  # noqa: BLE001 - one provider must not affect the others
            show.note(describe(error))
    return places


def _addresses(entry: "Entry") -> list[str]:
    """Return the addresses on this machine that a provider names."""
    from graftage.http import is_loopback

    plugin: Any = entry.plugin
    named = plugin.local_addresses() if "local_addresses" in entry.hooks else ()
    return [each for each in named if is_loopback(_port(each)[0])]


def _look_at(places: Sequence[Place], timeout: float) -> None:
    ended = run_all([partial(_look, each, timeout) for each in places], timeout + GRACE)
    for each, in_time in zip(places, ended, strict=True):
        if not in_time and each.state != "server":
            each.state, each.problem = "other", f"It did not answer within {timeout:g} s."


def _look(place: Place, timeout: float) -> None:
    """Fill in what is at an address; an error becomes a problem there."""
    try:
        socket.create_connection(_port(place.address), timeout=PORT_TIMEOUT).close()
    except OSError:
        return
    place.state = "other"
    try:
        with _client(place) as client:
            _ask(client, place, timeout)
    except Exception as error:  # noqa: BLE001 - one server must not affect the others
        place.problem = _without_hint(error)


def _without_hint(error: Exception) -> str:
    """Return an error without its hint, which is about a server that its user has named."""
    if isinstance(error, AuthenticationFailed):
        return f"{error.message} If it runs models, it needs a key: add it to the settings file as an instance."
    return error.message if isinstance(error, GraftageError) else describe(error)


def _client(place: Place) -> "Client":
    """Connect as an instance, which gets no key or header that is meant for another server."""
    import graftage

    where = {"provider": place.provider, "host": place.address}
    return graftage.connect(NAME, instances={NAME: where}, api_key="", attempts=1)


def _ask(client: "Client", place: Place, timeout: float) -> None:
    health = client.health("api", max_age=0, timeout=timeout)
    if not health.ok:
        place.problem = _without_hint(health.error) if health.error else "It is not well."
        return
    place.state, place.server, place.version = "server", health.server, health.version
    place.features = sorted(client.capabilities().features)
    with suppress(GraftageError):
        place.models = [each.name for each in client.models(timeout=timeout)]
    with suppress(GraftageError), options.open_client(None, place.provider) as own:
        place.name = place.provider if _port(own.address) == _port(place.address) else None


def _port(address: str) -> tuple[str, int]:
    """Return the host and the port of an address, as far as it has them."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    host = parts.hostname or ""
    with suppress(ValueError):  # An instance may have an invalid one, which its client reports.
        return "127.0.0.1" if host == "localhost" else host, parts.port or PORTS.get(parts.scheme, 80)
    return host, 0


def _best(places: Iterable[Place]) -> list[Place]:
    """Return one for each port: where several providers find a server, that of the one that can do more with it."""
    at: dict[tuple[str, int], list[Place]] = defaultdict(list)
    for each in places:
        at[_port(each.address)].append(each)
    return [min(each, key=_preference) for each in at.values()]


def _preference(place: Place) -> tuple[int, int]:
    return STATES.index(place.state), -len(place.features or ())


# --- Names -----------------------------------------------------------------------------------------------------------


def _name(found: Iterable[Place], known: Sequence["Listed"]) -> None:
    """Name each server as the settings do; for another one, make a name and the table of an instance."""
    from graftage._engine.plugins import Catalog
    from graftage.settings import variable_part

    named = {_port(each.host): each.name for each in known if each.host}
    taken = {variable_part(each) for each in ("auto", *Catalog().names(), *(each.name for each in known))}
    for each in found:
        each.name = named.get(_port(each.address), each.name)
        if each.state == "server" and each.name is None:
            each.name = _new_name(each)
            if variable_part(each.name) in taken:
                each.name += f"-{_port(each.address)[1]}"
            taken.add(variable_part(each.name))
            each.instance = {"provider": each.provider, "host": each.address}
            if each.models:
                each.instance["model"] = each.models[0]


def _new_name(place: Place) -> str:
    """Return a name from the server's, or else the provider's."""
    return re.sub(r"[^a-z0-9]+", "-", (place.server or place.provider).lower()).strip("-") or place.provider


# --- The table -------------------------------------------------------------------------------------------------------


def _print(found: Sequence[Place]) -> None:
    """Print the servers, what else listens, and the instances for the settings file."""
    servers = [each for each in found if each.state == "server"]
    if servers:
        rows = [(each.address, _software(each), each.provider, show.some(each.models), each.name) for each in servers]
        show.print_table(("address", "server", "provider", "models", "name"), rows)
    else:
        show.line(_nothing(found))
    for each in found:
        if each.state == "other":
            text = f"{each.address} listens, but `{each.provider}` cannot use it: {each.problem}"
            show.line(f"\n{show.cell(text)}")
    new = {each.name: each.instance for each in servers if each.instance}
    if new:
        show.line(
            f"\nTo use them by name, as in `graftage chat -p {next(iter(new))}`, add to {show.cell(settings_file())}:"
        )
    for name, table in new.items():
        show.line(f"\n[instances.{name}]")
        for key, value in table.items():
            show.line(f"{key} = {show.cell(json.dumps(value, ensure_ascii=False))}")


def _software(place: Place) -> str:
    return " ".join(filter(None, (place.server or place.provider, place.version)))


def _nothing(found: Sequence[Place]) -> str:
    """Explain that no server was found."""
    if not found:
        return "No installed provider says where its servers listen. `pip install graftage-openai` brings one."
    tried = ", ".join(sorted(f"{host}:{port}" for host, port in (_port(each.address) for each in found)))
    return (
        f"No server was found on this machine. Tried: {tried}.\n"
        "For one that listens elsewhere, name its address: `graftage doctor PROVIDER --host ADDRESS`."
    )
