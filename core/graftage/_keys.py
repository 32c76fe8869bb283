"""Keys of instances: in the system's keyring, or in a file that only its owner can read.

The library `keyring` is imported only here, and only for an instance that names it. To read a keyring may block, since
the system may ask its user to unlock it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from graftage._values import read_file, user_path
from graftage.exceptions import SettingsError

__all__ = ["KEYRING", "read", "remove", "store", "stored"]

KEYRING: Final = "keyring"
"""The word in `api_key_from` for the system's keyring."""
SERVICE: Final = "graftage"
"""The service in the keyring; the user is the name of the instance."""
LARGEST_KEY: Final = 8 * 1024
"""Bytes of a key file."""
OTHERS: Final = 0o077
"""The bits of a file's mode that let others than its owner use it."""

PROBLEMS: Final = {"NoKeyringError": "this machine has none", "KeyringLocked": "it is locked"}
"""What errors of the library mean."""

T = TypeVar("T")


def read(name: str, source: str, *, prefix: str) -> str:
    """Return the key of an instance.

    Args:
        name: the name of the instance.
        source: its `api_key_from`: `keyring`, or the path of a file.
        prefix: what the names of variables begin with, for hints.

    Raises:
        SettingsError: there is no key, or it cannot be read; the hint names the other ways to give it.
    """
    if source == KEYRING:
        key = stored(name, prefix=prefix)
        if key is None:
            raise _error(f"The keyring has no key for the instance `{name}`.", KEYRING, name, prefix)
        return key
    return _from_file(user_path(source), name, prefix)


def _from_file(path: Path, name: str, prefix: str) -> str:
    try:
        data = read_file(path, LARGEST_KEY)
        mode = path.stat().st_mode
        key = data.decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "It is not text"
        problem = f"The key file {path} of the instance `{name}` cannot be read: {reason}."
        raise _error(problem, str(path), name, prefix) from None
    if os.name == "posix" and mode & OTHERS:
        raise SettingsError(
            f"The key file {path} of the instance `{name}` has the mode {mode & 0o777:04o}: others can use it.",
            key="api_key",
            source=str(path),
            hint=f"Run `chmod 600 {path}`.",
        )
    if not key:
        raise _error(f"The key file {path} of the instance `{name}` is empty.", str(path), name, prefix)
    return key


def stored(name: str, *, prefix: str = "GRAFTAGE") -> str | None:
    """Return the key of an instance in the keyring; None if there is none.

    Raises:
        SettingsError: there is no keyring, or it is locked.
    """
    key: str | None = _asked(lambda ring: ring.get_password(SERVICE, name), name, prefix)
    return key or None


def store(name: str, key: str) -> None:
    """Keep the key of an instance in the keyring, in place of the one before.

    Raises:
        SettingsError: there is no keyring, or it is locked.
    """
    _asked(lambda ring: ring.set_password(SERVICE, name, key), name)


def remove(name: str) -> bool:
    """Remove the key of an instance from the keyring; return whether there was one.

    Raises:
        SettingsError: there is no keyring, or it is locked.
    """
    if stored(name) is None:
        return False
    _asked(lambda ring: ring.delete_password(SERVICE, name), name)
    return True


def _asked(ask: Callable[[Any], T], name: str, prefix: str = "GRAFTAGE") -> T:
    """Return what the keyring answers."""
    try:
        import keyring
    except ImportError:
        problem = f"The key of the instance `{name}` cannot be used: the library `keyring` is not installed."
        raise _error(problem, KEYRING, name, prefix, "Install `graftage[keyring]` and store it") from None
    try:
        return ask(keyring)
    except Exception as error:
        what = PROBLEMS.get(type(error).__name__, f"it failed with {type(error).__name__}")
        problem = f"The keyring cannot be used for the instance `{name}`: {what}."
        raise _error(problem, KEYRING, name, prefix, "Where a keyring is unlocked, store it") from error


def _error(problem: str, source: str, name: str, prefix: str, first: str = "Store it") -> SettingsError:
    """Return the error for a key that cannot be had, with the ways to give it."""
    variable = f"{prefix}_{name}_API_KEY".upper().replace("-", "_")
    hint = (
        f"{first} with `graftage keys set {name}`, set {variable}, or name a key file of mode 0600 in `api_key_from`."
    )
    return SettingsError(problem, key="api_key", source=source, hint=hint)
