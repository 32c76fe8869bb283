"""`graftage doctor`: checks everything between this command and a reply, in the order in which it can fail."""

import contextlib
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import SplitResult, urlsplit

import typer

from graftage._cli import options, show
from graftage._cli.errors import FAILED, Misuse, exit_code, way_out
from graftage._cli.plugins import plugin_data, print_plugins
from graftage._secrets import SECRET_NAMES
from graftage.exceptions import GraftageError, ModelNotFound

if TYPE_CHECKING:
    from graftage import Client
    from graftage.types import Health, HealthLevel

__all__ = ["doctor"]

State = Literal["ok", "fail", "note", "skip"]
STYLES = {"ok": "green", "fail": "bold red", "note": "yellow", "skip": "dim"}
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
DEFAULT_PORTS = {"http": 80, "https": 443}
LISTENS_EVERYWHERE = re.compile(r"(^|[/@])(0\.0\.0\.0|\[?::\]?)(:\d+)?(/|$)")
MASK = "**********"


@dataclass(frozen=True, slots=True)
class Check:
    """One check and its result."""

    name: str
    state: State
    text: str
    hint: str | None = None


def doctor(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Provider or instance. Default: the one that `chat` takes."),
    ] = None,
    *,
    model: options.Model = None,
    provider: options.Provider = None,
    host: options.Host = None,
    as_json: options.AsJson = False,
) -> None:
    """Check everything between this command and a reply.

    Exit code: 0 if all is well, 1 if a check failed, 2 if a setting is wrong.
    """
    from graftage._engine.plugins import Catalog

    if name:
        if provider:
            raise Misuse(f"`{name}` and `-p {provider}` both name a provider.", hint="Give one of them.")
        provider, _, rest = name.partition(":")
        model = model or rest or None
    with contextlib.closing(Examination(model, provider, host)) as examination:
        checks = []
        for check in examination.checks():
            checks.append(check)
            if not as_json:
                _print_check(check)
        settings = examination.settings()
    entries = Catalog().inspect_all()
    if as_json:
        plugins = [plugin_data(each) for each in entries]
        found = [asdict(each) for each in checks]
        show.print_json({"ok": not examination.code, "checks": found, "settings": settings, "plugins": plugins})
    else:
        _print_settings(settings)
        show.line("")
        print_plugins(entries)
    raise typer.Exit(examination.code)


class Examination:
    """The checks; each needs the results of those before it."""

    def __init__(self, model: str | None, provider: str | None, host: str | None) -> None:
        self.code = 0
        """The exit code so far."""
        self._provider, self._model = (provider, model) if provider else options.split(model)
        self._model_origin = "command line" if self._model else "the provider's own default"
        self._host = host
        self._client: Client | None = None
        self._proxy: str | None = None

    def checks(self) -> Iterator[Check]:
        """Run the checks in order; those after a failure are skipped."""
        steps: dict[str, Callable[[], Check]] = {
            "settings file": self._settings_file,
            "provider": self._provider_found,
            "settings": self._settings_read,
            "key": self._key_found,
            "address": self._address_read,
            "proxy": self._proxy_found,
            "name": self._name_resolved,
            "port": self._port_open,
            "server": self._server_answers,
            "model": self._model_present,
        }
        for name, step in steps.items():
            check = Check(name, "skip", "not checked") if self.code else self._run(name, step)
            if check.state == "fail":
                self.code = self.code or FAILED
            yield check

    def _run(self, name: str, step: Callable[[], Check]) -> Check:
        try:
            return step()
        except GraftageError as error:
            self.code = exit_code(error)
            return Check(name, "fail", error.message, way_out(error))

    def settings(self) -> list[dict[str, str]]:
        """Return the settings in effect and the origin of each; secrets are masked."""
        if self._client is None:
            return []
        values = self._client.settings
        return [
            {"name": name, "value": _mask(name, getattr(values, name)), "origin": self._origin(name)}
            for name in type(values).model_fields
            if name != "transport"
        ]

    def close(self) -> None:
        """Close the client."""
        if self._client is not None:
            self._client.close()

    # The checks

    def _settings_file(self) -> Check:
        from graftage.settings import Sources

        sources = Sources.of()
        sources.document()
        if sources.file is not None and sources.file.is_file():
            return Check("settings file", "ok", f"{sources.file} is read")
        return Check("settings file", "ok", f"{sources.file} does not exist, which is fine")

    def _provider_found(self) -> Check:
        from graftage._engine.instances import listed
        from graftage._engine.plugins import Catalog

        origin, hint = "command line", None
        if self._provider is None:
            self._provider, origin = options.default_provider(self._host)
            if origin == options.DEFAULT and self._host is None:
                hint = self._auto_hint(self._provider)
        known = {each.name: each for each in listed()}
        instance = known.get(self._provider)
        entry = Catalog().provider(instance.provider if instance else self._provider, known)
        text = f"`{entry.name}` from {entry.origin}"
        if instance:
            text = f"`{instance.name}` in {instance.origin} uses {text}"
        return Check("provider", "note" if hint else "ok", f"{text} ({origin})", hint)

    def _auto_hint(self, usual: str) -> str | None:
        """Use the provider that `auto` chooses, if it finds one; explain if it is not the usual one."""
        with contextlib.suppress(GraftageError), options.open_client(self._model) as client:
            self._provider = client.provider
            if self._provider == usual and self._model is None and "model" not in client.origins:
                self._model, self._model_origin = client.model, "the one in use there"
        if self._provider == usual:
            return None
        return f"`{usual}` cannot answer now: `graftage doctor {usual}` shows why."

    def _settings_read(self) -> Check:
        self._client = options.open_client(self._model, self._provider, host=self._host)
        known = [name for name in self._client.origins if name not in ("model", "provider")]
        return Check("settings", "ok", f"{len(known)} set, the rest are defaults" if known else "all are defaults")

    def _key_found(self) -> Check:
        key = self._connected.settings.api_key
        return Check("key", "ok", f"it comes from: {self._origin('api_key')}" if key else "none is set")

    def _address_read(self) -> Check:
        given = str(self._connected.settings.host or "")
        text = f"{_hide_user(self._address) or 'none: it needs no server'} ({self._origin('host')})"
        if LISTENS_EVERYWHERE.search(given):
            listens = f"`{_hide_user(given)}` is an address to listen on."
            return Check("address", "note", text, f"{listens} Use the address of the machine: 127.0.0.1 for this one.")
        return Check("address", "ok", text)

    def _proxy_found(self) -> Check:
        from graftage.http import proxy_for

        if self._url is None:
            return Check("proxy", "skip", "no network is used")
        names = [name for name in PROXY_VARIABLES if os.environ.get(name) or os.environ.get(name.lower())]
        self._proxy = proxy_for(self._address)
        if self._proxy:
            return Check(
                "proxy",
                "note",
                f"{_hide_user(self._proxy)} is used ({', '.join(names) or 'system settings'})",
                f"Set NO_PROXY={self._url.hostname} to connect directly.",
            )
        return Check("proxy", "ok", f"none applies, though {', '.join(names)} is set" if names else "none is set")

    def _name_resolved(self) -> Check:
        if self._target is None:
            return Check("name", "skip", "no network is used")
        host, port = self._target
        found = _resolve(host, port, self._connected.settings.timeouts.connect)
        if isinstance(found, str):
            return Check(
                "name", "fail", f"`{host}` cannot be resolved: {found}", self._location_hint("Check the spelling.")
            )
        return Check("name", "ok", f"{host} is {', '.join(found)}")

    def _port_open(self) -> Check:
        if self._target is None:
            return Check("port", "skip", "no network is used")
        host, port = self._target
        try:
            socket.create_connection((host, port), timeout=self._connected.settings.timeouts.connect).close()
        except OSError as error:
            text = f"{host} port {port} does not answer: {error.strerror or error}"
            return Check("port", "fail", text, self._location_hint("Is the server running, and is the port right?"))
        return Check("port", "ok", f"{host} listens on port {port}")

    def _location_hint(self, hint: str) -> str:
        from graftage.http import is_loopback

        if self._proxy:
            return f"This is the proxy. {hint}"
        if _in_container() and self._url is not None and is_loopback(self._url.hostname or ""):
            return f"{hint} In a container, localhost is the container itself; its host is `host.docker.internal`."
        return hint

    def _server_answers(self) -> Check:
        health = self._check_health("api")
        version = f"version {health.version}" if health.version else "of unknown version"
        software = f"{health.server} " if health.server else ""
        return Check("server", "ok", f"{software}answers, {version}, in {1000 * (health.latency or 0):.0f} ms")

    def _model_present(self) -> Check:
        model = self._connected.model
        if not model:
            return Check("model", "note", "none is chosen", "Name one with `-m`, or set GRAFTAGE_MODEL.")
        origin = self._connected.origins.get("model") or self._model_origin
        try:
            self._check_health("model_present")
        except ModelNotFound:
            if self._model or "model" in self._connected.origins:
                raise
            # A provider with a default model downloads it for the first reply.
            return Check("model", "note", f"`{model}` is not downloaded yet", "The first reply downloads it.")
        return Check("model", "ok", f"`{model}` is available ({origin})")

    def _check_health(self, level: "HealthLevel") -> "Health":
        health = self._connected.health(level, max_age=0)
        if health.ok:
            return health
        if isinstance(health.error, GraftageError):
            raise health.error
        if level == "model_present":
            raise ModelNotFound(f"The provider does not have the model `{health.model}`.", model=health.model)
        raise GraftageError(f"The server is not well: {health.error or 'no reason was given'}.")

    # What the checks need

    @property
    def _connected(self) -> "Client":
        if self._client is None:
            raise GraftageError("There is no connection to check.")
        return self._client

    def _origin(self, name: str) -> str:
        origin = self._connected.origins.get(name, "default")
        return "command line" if origin == "argument" else origin

    @property
    def _address(self) -> str:
        return self._connected.address

    @property
    def _url(self) -> SplitResult | None:
        parts = urlsplit(self._address)
        return parts if parts.scheme in DEFAULT_PORTS and parts.hostname else None

    @property
    def _target(self) -> tuple[str, int] | None:
        """The host and port to connect to: the server's, or those of the proxy in front of it."""
        parts = urlsplit(self._proxy) if self._proxy else self._url
        if parts is None:
            return None
        return parts.hostname or "", parts.port or DEFAULT_PORTS.get(parts.scheme, 80)


def _resolve(host: str, port: int, seconds: float) -> list[str] | str:
    """Return the addresses of a name, or why there are none. A thread limits the time, as the resolver cannot."""
    found: list[list[str] | str] = []

    def look() -> None:
        try:
            records = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            found.append(str(getattr(error, "strerror", None) or error))
        else:
            found.append(sorted({str(record[4][0]) for record in records}))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else f"no answer within {seconds:g} s"


def _in_container() -> bool:
    """Return whether this runs in a container of Docker or Podman, which mark theirs with a file."""
    return Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()


def _hide_user(address: str) -> str:
    from graftage.settings import without_user

    return without_user(address)


def _mask(name: str, value: Any) -> str:
    """Return a setting as text, without its secrets."""
    if value is None:
        return ""
    if SECRET_NAMES.search(name) or hasattr(value, "get_secret_value"):
        return MASK
    if name == "headers":
        return ", ".join(f"{header}: {MASK}" for header in value)
    if name == "timeouts":
        return ", ".join(f"{part} {seconds:g}" for part, seconds in asdict(value).items())
    return _hide_user(str(value))


def _print_check(check: Check) -> None:
    from rich.table import Table
    from rich.text import Text

    row = Table.grid(padding=(0, 1, 0, 0))
    row.add_column(width=4)
    row.add_column(width=13)
    row.add_column(overflow="fold")
    row.add_row(Text(check.state, style=STYLES[check.state]), Text(check.name), Text(show.cell(check.text)))
    if check.hint:
        row.add_row("", "", Text(show.cell(check.hint), style="italic"))
    show.console().print(row)


def _print_settings(settings: list[dict[str, str]]) -> None:
    if settings:
        show.line("")
        show.print_table(
            ("setting", "value", "from"), ((each["name"], each["value"], each["origin"]) for each in settings)
        )
