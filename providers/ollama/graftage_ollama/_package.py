"""The official package, imported even if the environment would make that fail."""

from __future__ import annotations

import importlib
import os
from typing import Any, Final

__all__ = ["official_package"]

VARIABLES: Final = ("OLLAMA_HOST", "OLLAMA_API_KEY", "SSL_CERT_FILE", "SSL_CERT_DIR")


def official_package() -> Any:
    """Import `ollama`.

    Its import builds a client from proxies, certificates, a key and `OLLAMA_HOST`, and fails if one of them is invalid.
    Our connections may not use these at all, so it is then imported without them.
    """
    try:
        return importlib.import_module("ollama")
    except ModuleNotFoundError:
        raise
    except Exception:  # noqa: BLE001 - invalid settings raise many kinds
        names = [name for name in os.environ if name in VARIABLES or name.lower().endswith("_proxy")]
        taken = {name: os.environ.pop(name) for name in names}
        try:
            return importlib.import_module("ollama")
        finally:
            os.environ.update(taken)
