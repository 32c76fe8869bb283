"""The settings, and the server's address in every form that Ollama's tools accept."""

from __future__ import annotations

import ipaddress
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Final, NoReturn

from pydantic import ByteSize, Field, SecretStr

from graftage.exceptions import SettingsError
from graftage.settings import Settings

__all__ = ["OllamaSettings", "parse_host"]


class OllamaSettings(Settings):
    """The common settings, also read from the variables of Ollama's tools."""

    native_environment: ClassVar[Mapping[str, str]] = {"host": "OLLAMA_HOST", "api_key": "OLLAMA_API_KEY"}

    host: str | None = Field(
        default=None,
        description="Address of the server, by default 127.0.0.1:11434. A final `/v1` or `/api` is ignored",
    )
    api_key: SecretStr | None = Field(default=None, description="Sent as a bearer token over https or to loopback only")
    merge_adapters: bool | ByteSize = Field(
        default=False,
        description="Whether an adapter may be merged into a copy of its base if the server supports no adapters: "
        "true, or the size of the largest base (`2GB`). It takes minutes, and as much disk as the base",
    )
    adapter_base_file: Path | None = Field(
        default=None, description="The base model's GGUF file for merging, if the server's own file cannot be read"
    )


# --- The address -----------------------------------------------------------------------------------------------------

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 11434
PORTS = {"http": 80, "https": 443}
MAX_PORT = 65535
_SHAPE = re.compile(
    r"(?:(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://)?"
    r"(?:(?P<user>[^/?#]*)@)?"
    r"(?P<host>\[[^\]/]*\]|[^/:\[\]?#]*)"
    r"(?::(?P<port>[^/:?#]*))?"
    r"(?P<path>/[^?#]*)?"
    r"(?P<extra>[?#].*)?"
)
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,254}}$)({_LABEL}\.)*{_LABEL}\.?")
"""Names that a look-up accepts: an empty or overlong label would raise a foreign error."""
_PATH = re.compile(r"[\x21-\x7e]*")
_API_PATH = re.compile(
    r"/+(?:(?:api|v1)(?:/+(?:chat(?:/completions)?|completions|embed|embeddings|generate|models|ps|show|tags|version))?/*)?$"
)
"""The end of a path that belongs to the API."""
SAFE: Final = "/%:@!$&'()*+,;=~-._"
"""Characters that need no escape in a path (RFC 3986, 3.3)."""
MAX_TEXT = 2000
_LISTEN_ONLY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - replaced, never used


def parse_host(text: str | None) -> str:
    """Parse the address of a server; None is the default.

    The forms are `host`, `host:port`, `:port`, `[ipv6]:port`, `http(s)://host…/path`, and a socket file,
    `http+unix://%2Frun%2Follama.sock`. A user and a password are kept. A path of the API, `/v1` or `/api/chat`, is
    dropped. `0.0.0.0`, which servers listen on, becomes the loopback address.

    Raises:
        SettingsError: the address has none of these forms.
    """
    text = (text or "").strip().strip("'\"").strip().removeprefix("//") or DEFAULT_HOST
    found = _SHAPE.fullmatch(text)
    # A query may hold a secret: refuse it before any message that would repeat it.
    if found["extra"] if found else re.search(r"[?#]", text):
        _refuse_secret("a query or a fragment, which would not be sent", "Leave them out.")
    if len(text) > MAX_TEXT:
        _refuse(text, "is too long", f"An address has at most {MAX_TEXT} characters.")
    if found is None:
        if _is_bare_ipv6(text):
            _refuse(text, "is an IPv6 address without brackets", f"Write `[{text}]` or `[{text}]:{DEFAULT_PORT}`.")
        _refuse(text, "is not an address", "Write it as `host:port` or `http://host:port`.")
    scheme = (found["scheme"] or "").lower()
    if scheme == "http+unix":
        return text.rstrip("/")
    if scheme not in ("", *PORTS):
        _refuse(text, f"has the scheme `{scheme}`", "Use `http://` or `https://`.")
    port = _port(text, found["port"], PORTS.get(scheme, DEFAULT_PORT))
    host = _host(text, found["host"], named=bool(scheme))
    path = _without_dots(found["path"] or "")
    if not _PATH.fullmatch(path):
        _refuse(text, "has a path with spaces or other odd characters", "Write them as `%20` and so on.")
    scheme = scheme or "http"
    name = f"[{host}]" if ":" in host else host.lower()
    authority = name if port == PORTS[scheme] else f"{name}:{port}"
    return (
        f"{scheme}://{_user(found['user'], host, scheme)}{authority}{urllib.parse.quote(_without_api(path), safe=SAFE)}"
    )


def _without_api(path: str) -> str:
    """Drop the API's part of a path: people copy addresses that other programs need."""
    while (shorter := _API_PATH.sub("", path)) != path:
        path = shorter
    return path


def _user(user: str | None, host: str, scheme: str) -> str:
    """Return the user and the password before a host, if they may be sent."""
    if user is None:
        return ""
    from graftage.http import is_loopback

    if scheme != "https" and not is_loopback(host):
        _refuse_user()
    return ":".join(urllib.parse.quote(urllib.parse.unquote(part), safe="") for part in user.split(":", 1)) + "@"


def _without_dots(path: str) -> str:
    """Resolve `.` and `..` in a path, as a server would."""
    return urllib.parse.urlsplit(urllib.parse.urljoin("http://host", path)).path if _PATH.fullmatch(path) else path


def _port(text: str, port: str | None, default: int) -> int:
    if port is None:
        return default
    # Check the length first: Python refuses to read thousands of digits.
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) <= MAX_PORT:
        _refuse(text, f"has the port `{port[:20]}`", f"A port is a number from 1 to {MAX_PORT}.")
    return int(port)


def _host(text: str, host: str, *, named: bool) -> str:
    if not host:
        if named:
            _refuse(text, "names no host", "Write it as `http://host:port`.")
        return DEFAULT_HOST
    if host.startswith("["):
        return _ipv6(text, host[1:-1])
    if re.fullmatch(r"[0-9.]+|0[xX][0-9a-fA-F.xX]*", host):
        try:
            host = str(ipaddress.IPv4Address(host))
        except ValueError:
            _refuse(text, "is not an IPv4 address", "Write four numbers from 0 to 255, such as 127.0.0.1.")
    elif not _NAME.fullmatch(host):
        _refuse(text, "is not a host name", "Names have letters, digits, dots and hyphens.")
    return _LISTEN_ONLY.get(host, host)


def _ipv6(text: str, address: str) -> str:
    try:
        found = str(ipaddress.IPv6Address(address))
    except ValueError:
        _refuse(text, "has no IPv6 address in its brackets", "Write it as `[::1]:11434`.")
    if "%" in found:
        _refuse(text, "has a zone in its IPv6 address", "Use an address without one.")
    return _LISTEN_ONLY.get(found, found)


def _is_bare_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _refuse(text: str, problem: str, hint: str) -> NoReturn:
    if "@" in text:
        _refuse_user()
    raise SettingsError(f"The host {text[:200]!r} {problem}.", key="host", hint=hint)


def _refuse_user() -> NoReturn:
    problem = "a user or a password in it, which is sent only over https or to loopback"
    _refuse_secret(problem, "Use https, or check what stands before the `@`, with `%2F` for a slash.")


def _refuse_secret(problem: str, hint: str) -> NoReturn:
    # Do not repeat the text: it may hold a secret.
    raise SettingsError(f"The host has {problem}.", key="host", hint=hint)
