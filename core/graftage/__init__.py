"""Graftage joins language-model providers to an application through plugins."""

from graftage._client import AsyncClient, Client, connect, connect_async
from graftage._events import enable_logging
from graftage._stream import AsyncStream, Stream
from graftage.exceptions import GraftageError
from graftage.types import ACTIVE, Image, Message, Reply, Timeouts, Tool

__all__ = [
    "ACTIVE",
    "AsyncClient",
    "AsyncStream",
    "Client",
    "GraftageError",
    "Image",
    "Message",
    "Reply",
    "Stream",
    "Timeouts",
    "Tool",
    "connect",
    "connect_async",
    "enable_logging",
]
__version__ = "0.1.0"
