"""The toolkit for providers that speak HTTP. `request.http(base_url)` in `connect` makes a client.

    class Connection:
        def __init__(self, request):
            self._http = request.http("http://127.0.0.1:11434")

        @hookimpl
        async def list_models(self, request):
            return await self._http.json("GET", "/api/tags", call=request.call, read=to_models)

Its coroutines serve sync and async clients. It keeps the four time limits, the bounds on sizes, whole lines, typed
errors and retries of the opening. It follows no redirect, uses no proxy for loopback, and sends no key in clear text.

The functions `read_…` read responses: required fields strictly, optional ones leniently.
"""

from graftage._engine.answers import (
    read_count,
    read_entries,
    read_logprobs,
    read_moment,
    read_object,
    read_records,
    read_seconds,
    read_text,
    read_tool_call,
    read_tool_calls,
    read_vectors,
    read_word,
)
from graftage.http.address import is_local, is_loopback, is_private, place, proxy_for
from graftage.http.client import Document, Event, Http, Items
from graftage.http.clock import Clock
from graftage.http.refusal import Answer, Refusal, Rules, by_words, says
from graftage.http.transport import Colour, Headers, Request, Response, Transport, Wrapper

__all__ = [
    "Answer",
    "Clock",
    "Colour",
    "Document",
    "Event",
    "Headers",
    "Http",
    "Items",
    "Refusal",
    "Request",
    "Response",
    "Rules",
    "Transport",
    "Wrapper",
    "by_words",
    "is_local",
    "is_loopback",
    "is_private",
    "place",
    "proxy_for",
    "read_count",
    "read_entries",
    "read_logprobs",
    "read_moment",
    "read_object",
    "read_records",
    "read_seconds",
    "read_text",
    "read_tool_call",
    "read_tool_calls",
    "read_vectors",
    "read_word",
    "says",
]
