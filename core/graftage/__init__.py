"""Graftage joins language-model providers to an application through plugins."""

from graftage._client.async_client import AsyncClient
from graftage._client.connecting import connect, connect_async
from graftage._client.streams import AsyncStream, Stream
from graftage._client.sync_client import Client
from graftage._client.tools import run_tools, run_tools_async
from graftage._engine.events import enable_logging
from graftage._version import __version__
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
    "__version__",
    "connect",
    "connect_async",
    "enable_logging",
    "run_tools",
    "run_tools_async",
]
