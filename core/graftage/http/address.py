"""Where a request goes: this machine or another one, straight or through a proxy, with or without a key."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote, urlsplit

from graftage.exceptions import SettingsError

__all__ = ["check_base", "is_loopback", "is_private", "place", "proxy_for", "socket_path"]

UNIX: Final = "http+unix"
"""The scheme of a server that listens at a socket of the file system."""
SECRET_NAMES: Final = re.compile(r"auth|cookie|credential|key|passw|secret|session|token", re.IGNORECASE)
"""Headers that are named like this carry what only the right server may see."""


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


def check_base(url: str) -> str:
    """A base URL without its last slash. A refused one is not repeated: it may hold a password.

    A server that listens at a socket of the file system is named by the percent-encoded path in place of the host:
    `http+unix://%2Frun%2Fserver.sock/v1`. It counts as this machine: keys may go there, and no proxy is asked.

    Raises:
        SettingsError: nothing can be sent there.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        if parts.scheme == UNIX:
            usable = bool(re.fullmatch("%2[Ff][^:\\[\\]]+", parts.netloc)) and "\0" not in unquote(parts.netloc)
    except ValueError:
        usable = False
    if not usable or parts.username is not None or parts.query or parts.fragment:
        raise SettingsError(
            "The server's address cannot be used: it must be an http or https URL without user, query and fragment.",
            key="host",
            hint="Write it like `http://127.0.0.1:8000/v1`, and put a key into `api_key`.",
        )
    return url.rstrip("/")


def socket_path(url: str) -> str | None:
    """The path of the socket that a URL names; None where it names a host."""
    parts = urlsplit(url)
    return unquote(parts.netloc) if parts.scheme == UNIX else None  # Not the host name, which is in lower case.


def is_private(url: str) -> bool:
    """Whether nobody on the way can read what is sent to `url`: by TLS, or since it stays on this machine."""
    parts = urlsplit(url)
    return parts.scheme in ("https", UNIX) or is_loopback(parts.hostname or "")


def place(url: str) -> str:
    """An address for people: without user, password, path and query."""
    parts = urlsplit(url)
    if parts.scheme == UNIX:
        return f"{UNIX}://{parts.netloc}"
    host = parts.hostname or ""
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{f':{parts.port}' if parts.port else ''}"


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for `url`. Loopback never has one: a prompt would leave the machine."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == UNIX or is_loopback(host):
        return None
    import urllib.request  # noqa: PLC0415 - a server on this machine does not need it, and it is slow to import

    proxies = urllib.request.getproxies()
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    if any(map(urllib.request.proxy_bypass, (host, f"{host}:{port}", f"[{host}]:{port}"))) or _is_spared(host, proxies):
        return None
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


def _is_spared(host: str, proxies: Mapping[str, str]) -> bool:
    """Whether NO_PROXY names a network that an address is in, as other tools read it and Python does not."""
    for each in proxies.get("no", "").split(","):
        with contextlib.suppress(ValueError):  # A name.
            if "/" in each and ipaddress.ip_address(host) in ipaddress.ip_network(each.strip(), strict=False):
                return True
    return False
