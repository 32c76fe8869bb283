"""Where a request goes: this machine or another one, straight or through a proxy, with or without a key."""

from __future__ import annotations

import ipaddress
import re
from typing import Final
from urllib.parse import urlsplit

from graftage.exceptions import SettingsError

__all__ = ["check_base", "is_loopback", "is_private", "place", "proxy_for"]

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

    Raises:
        SettingsError: nothing can be sent there.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.username is not None or parts.query or parts.fragment:
        raise SettingsError(
            "The server's address cannot be used: it must be an http or https URL without user, query and fragment.",
            key="host",
            hint="Write it like `http://127.0.0.1:8000/v1`, and put a key into `api_key`.",
        )
    return url.rstrip("/")


def is_private(url: str) -> bool:
    """Whether nobody on the way can read what is sent to `url`: by TLS, or since it stays on this machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or is_loopback(parts.hostname or "")


def place(url: str) -> str:
    """An address for people: without user, password, path and query."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{f':{parts.port}' if parts.port else ''}"


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for `url`. Loopback never has one: a prompt would leave the machine."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host):
        return None
    import urllib.request  # noqa: PLC0415 - a server on this machine does not need it, and it is slow to import

    proxies = urllib.request.getproxies()
    if urllib.request.proxy_bypass(host):
        return None
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy
