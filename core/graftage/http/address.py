"""Where a request goes: to this machine or another, directly or through a proxy, with or without a key."""

from __future__ import annotations

import base64
import ipaddress
import re
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

from graftage.exceptions import SettingsError

__all__ = [
    "basic",
    "is_local",
    "is_loopback",
    "is_private",
    "named_proxy",
    "place",
    "proxy_for",
    "read_base",
    "socket_path",
]

UNIX: Final = "http+unix"
"""The scheme of a server on a Unix socket."""
LISTEN_ONLY: Final = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - recognised in order not to be used
_LIST: Final = re.compile(r"[\s,]+")
_ENTRY: Final = re.compile(r"(\[[^\]]*\]|[^:]*):([0-9]{1,5})")
_ZONE: Final = re.compile("%[^/]*")


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    # Python before 3.13 does not look inside: `::ffff:127.0.0.1` is 127.0.0.1.
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def is_local(url: str) -> bool:
    """Whether a URL is of a server on this machine: on loopback, or on a Unix socket."""
    parts = urlsplit(url)
    return parts.scheme == UNIX or is_loopback(parts.hostname or "")


def read_base(text: str) -> tuple[str, dict[str, str]]:
    """Return a base URL without its last slash, and the header for a user and password in it.

    Spaces and quotes around it are removed. `0.0.0.0`, which servers listen on, becomes the loopback address. An error
    does not show the URL, since it may hold a password.

    A server on a Unix socket has the percent-encoded path in place of the host: `http+unix://%2Frun%2Fserver.sock/v1`.
    It counts as this machine: keys may go there, and no proxy is used.

    Raises:
        SettingsError: nothing can be sent there, or a password would go in clear text.
    """
    url = text.strip().strip("'\"").strip()
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        if parts.scheme == UNIX:
            usable = bool(re.fullmatch("%2[Ff][^:@\\[\\]]+", parts.netloc)) and "\0" not in unquote(parts.netloc)
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment or (parts.username is not None and not is_private(url)):
        raise SettingsError(
            "The server's address is invalid: it must be an http or https URL without query and fragment, and without "
            "a user or a password that would be sent in clear text.",
            key="host",
            hint="Use the form `http://127.0.0.1:8000/v1`, and set a key as `api_key`.",
        )
    if parts.scheme == UNIX:
        return url.rstrip("/"), {}
    netloc = parts.netloc.rpartition("@")[2]
    if parts.hostname in LISTEN_ONLY:
        netloc = f"{LISTEN_ONLY[parts.hostname]}:{parts.port}" if parts.port else LISTEN_ONLY[parts.hostname]
    return f"{parts.scheme}://{netloc}{parts.path.rstrip('/')}", basic("authorization", parts)


def basic(header: str, parts: SplitResult) -> dict[str, str]:
    """Return the header for the user and password of a URL; empty if it has no user."""
    if parts.username is None:
        return {}
    words = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode(errors="replace")
    return {header: f"Basic {base64.b64encode(words).decode()}"}


def socket_path(url: str) -> str | None:
    """Return the path of a URL's Unix socket, or None if the URL names a host."""
    parts = urlsplit(url)
    return unquote(parts.netloc) if parts.scheme == UNIX else None  # `hostname` would be in lower case.


def is_private(url: str) -> bool:
    """Whether nobody between can read what is sent to `url`: it uses TLS or stays on this machine."""
    return urlsplit(url).scheme == "https" or is_local(url)


def place(url: str) -> str:
    """Return scheme, host and port of a URL, for messages: no user, password, path or query."""
    parts = urlsplit(url)
    if parts.scheme == UNIX:
        return f"{UNIX}://{parts.netloc}"
    host = parts.hostname or ""
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{f':{parts.port}' if parts.port else ''}"


def proxy_for(url: str) -> str | None:
    """Return the proxy for `url` from the environment. Loopback never has one: prompts must not leave the machine."""
    return named_proxy(url)[0]


def named_proxy(url: str) -> tuple[str | None, str]:
    """Return the proxy for `url`, and what names it: a variable of the environment or the system's settings."""
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    if parts.scheme == UNIX or is_loopback(host):
        return None, ""
    import os  # Slow to import, and a server on this machine needs neither.
    import urllib.request

    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    spared = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if (
        not proxy
        or urllib.request.proxy_bypass(host)
        or any(_is_named(host, port, each) for each in _LIST.split(spared))
    ):
        return None, ""
    kinds = (f"{parts.scheme}_proxy", "all_proxy")
    names = (name for name, value in os.environ.items() if name.lower() in kinds and value == proxy)
    return proxy if "://" in proxy else f"http://{proxy}", next(names, "the system's settings")


def _is_named(host: str, port: int | None, entry: str) -> bool:
    """Whether an entry of NO_PROXY names a host, in any form of curl, Go or Python."""
    found = _ENTRY.fullmatch(entry)
    name, own_port = found.groups() if found else (entry, None)
    name = name.strip("[]").rstrip(".").lower()
    if not name or (own_port and int(own_port) != port):
        return False
    if (network := _network(name)) is not None:
        address = _network(host)
        return address is not None and address.subnet_of(network)
    # `.name` covers the name and its subdomains, as in curl; `*.name` only the subdomains.
    return name == "*" or host == name.lstrip(".") or host.endswith(f".{name.removeprefix('*').lstrip('.')}")


def _network(text: str) -> ipaddress.IPv6Network | None:
    """Return a network, or an address as one, in the form of IPv6, so that both forms of an IPv4 address are equal."""
    try:
        found = ipaddress.ip_network(_ZONE.sub("", text), strict=False)
    except ValueError:  # It is a name.
        return None
    if isinstance(found, ipaddress.IPv6Network):
        return found
    return ipaddress.IPv6Network((0xFFFF << 32 | int(found.network_address), 96 + found.prefixlen))
