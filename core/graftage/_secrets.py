"""What is a secret, and how it is removed from what is shown."""

from __future__ import annotations

import re
from typing import Any, Final

__all__ = ["SECRET_NAMES", "SHORTEST_SECRET", "hidden"]

SECRET_NAMES: Final = re.compile(r"auth|cookie|credential|key|passw|secret|session|token", re.IGNORECASE)
"""Headers and settings with such names hold secrets."""
SHORTEST_SECRET: Final = 4
"""Characters: shorter secrets occur in many words by chance, and gaps there would reveal them."""


def hidden(value: Any, secret: str) -> Any:
    """Return a text, mapping, list or tuple with the secret replaced."""
    if isinstance(value, str):
        return value.replace(secret, "***")
    if isinstance(value, dict):
        return {key: hidden(each, secret) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(hidden(each, secret) for each in value)
    return value
