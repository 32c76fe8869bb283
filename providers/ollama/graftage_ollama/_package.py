"""The official package, whatever the environment says.

Importing it builds a client of its own, which reads proxies, certificates and `OLLAMA_HOST` and fails where one of them
is wrong, though the provider's own client may have nothing to do with it. Then it is imported without them.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ollama"]


@contextlib.contextmanager
def _without_what_it_reads() -> Iterator[None]:
    names = ("OLLAMA_HOST", "SSL_CERT_FILE", "SSL_CERT_DIR")
    taken = {name: os.environ[name] for name in os.environ if name in names or name.lower().endswith("_proxy")}
    for name in taken:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(taken)


try:
    import ollama
except ModuleNotFoundError:
    raise
except Exception:  # noqa: BLE001 - whatever it stumbled over
    with _without_what_it_reads():
        import ollama
