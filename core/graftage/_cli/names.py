"""What can be named as a provider, and where instances are named."""

from contextlib import suppress
from typing import TYPE_CHECKING

from graftage.exceptions import SettingsError

if TYPE_CHECKING:
    from graftage._engine.instances import Listed

__all__ = ["instances", "provider_names", "settings_file"]


def provider_names() -> list[str]:
    """Return what can be named as a provider: those that are installed, and the instances."""
    from graftage._engine.plugins import Catalog

    return sorted([*Catalog().names("provider"), *(each.name for each in instances())])


def instances() -> "list[Listed]":
    """Return the instances of the settings file; none if they are invalid, which each client reports."""
    from graftage._engine.instances import listed

    with suppress(SettingsError):
        return listed()
    return []


def settings_file() -> str:
    """Return the path of the settings file."""
    from graftage.settings import config_path

    return str(config_path())
