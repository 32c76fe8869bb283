"""The official package, whatever the environment says."""

from __future__ import annotations

import importlib
import os
from typing import Any, Final

__all__ = ["official_package"]

VARIABLES: Final = ("OLLAMA_HOST", "OLLAMA_API_KEY", "SSL_CERT_FILE", "SSL_CERT_DIR")


def official_package() -> Any:
    """Import `ollama`.

    Its import builds a client of its own, which reads proxies, certificates, a key and `OLLAMA_HOST`, and fails where
    one of them is wrong, though our own connections may have nothing to do with it. Then it is imported without them.
    """
    try:
        return importlib.import_module("ollama")
    except ModuleNotFoundError:
        raise
    except Exception:  # noqa: BLE001 - whatever it stumbled over
        names = [name for name in os.environ if name in VARIABLES or name.lower().endswith("_proxy")]
        taken = {name: os.environ.pop(name) for name in names}
        try:
            return importlib.import_module("ollama")
        finally:
            os.environ.update(taken)
