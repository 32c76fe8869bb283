"""The network of the toolkit: addresses, Unix sockets, closing, forks, cancels, odd requests."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import shutil
import socket
import struct
import sys
import threading
import time
import tracemalloc
import weakref
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest
import vcr  # type: ignore[import-untyped] # it has no types
from giving import Giving
from network_servers import (
    CALLS,
    HERE,
    OBJECT,
    SECRET,
    SHORT,
    SLACK,
    STREAM,
    Authority,
    Proxy,
    Server,
    Uploading,
    WithKey,
    answer,
    hang,
    needs_proc,
    on,
    read_request,
    saying,
    secured,
    stalled_handshake,
)
from patience import soon
from test_colours import MODEL, OnToolkit, needs_fork, run

import graftage
from graftage.exceptions import (
    ConnectionFailed,
    GraftageError,
    ProtocolError,
    ProviderTimeout,
    RequestRejected,
    SettingsError,
)
from graftage.hookspecs import hookimpl
from graftage.http import is_private, place
from graftage.http._framing import Framing
from graftage.http._network import is_stale
from graftage.http._server import server_of
from graftage.http.address import read_base
from graftage.types import Timeouts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.slow


def found_as(*addresses: str, port: int) -> Callable[..., Any]:
    real = socket.getaddrinfo

    def look(host: Any, *arguments: Any, **named: Any) -> Any:
        if host in (b"model.test", "model.test"):
            if named.get("flags", 0) & socket.AI_NUMERICHOST:
                raise socket.gaierror
            families = [socket.AF_INET6 if ":" in each else socket.AF_INET for each in addresses]
            return [
                (family, socket.SOCK_STREAM, 6, "", (each, port))
                for family, each in zip(families, addresses, strict=True)
            ]
        return real(host, *arguments, **named)

    return look


def full(listener: socket.socket) -> list[socket.socket]:
    """Fill the queue of a listener, so that the next connection waits for ever."""
    waiting = []
    for _ in range(8):
        each = socket.socket()
        each.setblocking(False)
        each.connect_ex(listener.getsockname())
        waiting.append(each)
    return waiting


class TestHostNames:
    def test_ipv6_literal(self, both: Any) -> None:
        if not socket.has_ipv6:
            pytest.skip("this system has no IPv6")
        server = Server()
        server.listener.close()
        try:
            server.listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
        except OSError:
            pytest.skip("this system has no IPv6")
        with server:
            port = server.listener.getsockname()[1]
            assert both.connect(on(f"http://[::1]:{port}"), model=MODEL).chat("x").text == "Hello world"
            assert f"host: [::1]:{port}\r\n".encode() in server.requests[0]

    def test_second_address_if_the_first_refuses(self, both: Any, monkeypatch: Any) -> None:
        with Server() as server:
            monkeypatch.setattr(socket, "getaddrinfo", found_as("127.0.0.2", HERE, port=server.port))
            assert both.connect(on(f"http://model.test:{server.port}"), model=MODEL).chat("x").text == "Hello world"

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux lets those who connect wait")
    def test_second_address_if_the_first_is_silent(self, both: Any, monkeypatch: Any) -> None:
        with Server() as server, socket.socket() as silent:
            silent.bind(("127.0.0.2", server.port))
            silent.listen(0)
            waiting = full(silent)
            monkeypatch.setattr(socket, "getaddrinfo", found_as("127.0.0.2", HERE, port=server.port))
            timeouts = Timeouts(connect=1, first_token=5, idle=5, total=10)
            llm = both.connect(on(f"http://model.test:{server.port}"), model=MODEL, attempts=1, timeouts=timeouts)
            assert llm.chat("x").text == "Hello world"
            for each in waiting:
                each.close()

    def test_unknown_name_is_not_retried(self, both: Any, monkeypatch: Any) -> None:
        def look(host: Any, *arguments: Any, **named: Any) -> Any:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", look)
        with pytest.raises(ConnectionFailed, match=r"The host name in http://model\.test is not known") as caught:
            both.connect(on("http://model.test"), model=MODEL).chat("x")
        assert (caught.value.details["cause"], caught.value.retryable) == ("dns", False)

    def test_endless_lookup_times_out(self, both: Any, monkeypatch: Any) -> None:
        ended = threading.Event()
        real = socket.getaddrinfo

        def look(host: Any, *arguments: Any, **named: Any) -> Any:
            if host != b"model.test":
                return real(host, *arguments, **named)
            if named.get("flags", 0) & socket.AI_NUMERICHOST:
                raise socket.gaierror
            ended.wait(20)
            raise socket.gaierror

        monkeypatch.setattr(socket, "getaddrinfo", look)
        begun = time.monotonic()
        llm = both.connect(on("http://model.test"), model=MODEL, attempts=1, timeouts=SHORT)
        with pytest.raises(ProviderTimeout) as caught:
            llm.chat("x")
        assert time.monotonic() - begun < SHORT.total + SLACK
        assert caught.value.phase == "connect"
        ended.set()

    @pytest.mark.parametrize("host", ["a..b", "x" * 70, "\u00fc..de", "\u00fc" * 70])
    def test_invalid_name_is_a_failed_connection(self, both: Any, no_network: Any, host: str) -> None:
        no_network.open(host)  # The name is invalid, so there is no lookup.
        with pytest.raises(ConnectionFailed) as caught:
            both.connect(on(f"http://{host}"), model=MODEL, attempts=1).chat("x")
        assert caught.value.details["cause"] == "dns"


BASES = {
    " 'HTTP://model.test:80/v1/' ": "http://model.test:80/v1",
    "http://0.0.0.0:8000/v1": "http://127.0.0.1:8000/v1",
    "http://[::]:8000": "http://[::1]:8000",
    "http://0.0.0.0": "http://127.0.0.1",
    "https://me:p@ss@model.test/v1": "https://model.test/v1",
    "http://me@[::1]:80/": "http://[::1]:80",
}


WRONG = [
    "",
    "//model.test",
    "model.test:80",
    "ftp://a",
    "http://",
    "http://a:0",
    "http://a:x",
    "http://[::1",
    "http://a?b",
]


class TestBaseUrl:
    @pytest.mark.parametrize(("given", "url"), BASES.items(), ids=BASES)
    def test_is_normalised(self, given: str, url: str) -> None:
        assert read_base(given)[0] == url

    @pytest.mark.parametrize(
        "given", [*WRONG, "http://me:word@model.test", "http://me:word@a#b", "https://me:word@a:99999"]
    )
    def test_invalid_one_is_refused_and_hidden(self, given: str) -> None:
        with pytest.raises(SettingsError) as caught:
            read_base(given)
        assert "word@" not in str(caught.value)
        assert caught.value.hint

    def test_explicit_headers_override_its_user(self, both: Any) -> None:
        with Server() as server:
            url = server.url.replace("://", "://me:word@")
            both.connect(on(url, WithKey), model=MODEL).models()
            assert b"authorization: Basic bWU6d29yZA==\r\n" in server.requests[0]
            both.connect(on(url), model=MODEL, headers={"Authorization": "Own"}).models()
            assert b"authorization: Own\r\n" in server.requests[1]


MOVED: dict[str, tuple[bytes, str]] = {
    "https": (b"https://me:word@llm.test/models?token=word#word", r"to https://llm\.test \(.*in place of http://127"),
    "a port": (b"http://llm.test:81/word", r"to http://llm\.test:81 \("),
    "without a scheme": (b"//llm.test/x", r"to http://llm\.test \("),
    "a path": (b"/login?word", "to another of its pages .*sign-in"),
    "a relative path": (b"login", "to another of its pages"),
    "no place": (b"", "The server redirects"),
    "a file": (b"file:///etc/word", "to an address that is not http"),
    "a script": (b"javascript:word", "to an address that is not http"),
    "a bad port": (b"http://llm.test:word/", r"redirects \(status"),
    "an odd name": (b'http://llm\xe9 "x.test/word', r"redirects \(status"),
    "a name too long": (b"http://" + b"a" * 400 + b"/word", r"redirects \(status"),
}


@pytest.mark.parametrize(("location", "words"), MOVED.values(), ids=MOVED)
def test_redirect_is_refused_with_its_target(both: Any, location: bytes, words: str) -> None:
    head = b"HTTP/1.1 307 Moved\r\nlocation: %b\r\ncontent-length: 0\r\n\r\n" % location
    with Server(saying(head)) as server:
        llm = both.connect(on(server.url), model=MODEL, attempts=1)
        with pytest.raises(ProtocolError, match=words) as caught:
            llm.models()
        assert not re.search("word|token|x.test", str(caught.value))
        assert caught.value.hint
        assert len(server.requests) == 1


def test_error_names_the_missing_path(both: Any) -> None:
    with Server(saying(b"HTTP/1.1 404 Not Found\r\ncontent-length: 8\r\n\r\nnot here")) as server:
        llm = both.connect(on(f"{server.url}/v1/"), model=MODEL, attempts=1)
        with pytest.raises(ProtocolError, match=r"The path was `/v1/models`\. .*Check `host`"):
            llm.models()


needs_unix = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="has no Unix sockets")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: a Unix socket has a path of at most a hundred characters."""
    path = Path(os.path.realpath("/tmp")) / f"Graft{os.getpid()}-{threading.get_ident()}"
    path.mkdir()
    yield path
    shutil.rmtree(path)


def named(path: Path) -> str:
    return "http+unix://" + str(path).replace("/", "%2F")


class TestUnixSockets:
    @needs_unix
    def test_serve_both_clients(self, both: Any, folder: Path, monkeypatch: Any) -> None:
        monkeypatch.setenv("all_proxy", f"http://{HERE}:1")
        path = folder / "Server.Sock"
        with Server(path=path) as server:
            llm = both.connect(on(f"{named(path)}/v1/", WithKey), model=MODEL)
            assert "".join(chunk.text for chunk in llm.chat("x", stream=True)) == "Hello world"
            assert [each.name for each in llm.models()] == ["a"]
            assert server.requests[0].startswith(b"POST /v1/chat HTTP/1.1\r\nhost: localhost\r\n")
            assert SECRET.encode() in server.requests[0]
            assert server.accepted == 1

    @needs_unix
    def test_work_as_host_of_ollama(self, both: Any, folder: Path) -> None:
        lines = b'{"message":{"content":"Hi"},"done":true,"done_reason":"stop"}\n'
        head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(lines)
        with Server(saying(head + lines), path=folder / "A.sock") as server:
            assert both.connect("ollama", model=MODEL, host=named(folder / "A.sock")).chat("x").text == "Hi"
            assert b"POST /api/chat HTTP/1.1" in server.requests[0]

    @needs_unix
    def test_no_listener_is_a_failed_connection(self, both: Any, folder: Path) -> None:
        llm = both.connect(on(named(folder / "none")), model=MODEL, attempts=1)
        with pytest.raises(ConnectionFailed, match=r"Nothing listens at http.unix://%2F") as caught:
            llm.chat("x")
        assert caught.value.details["cause"] == "refused"

    def test_missing_support_is_reported(self, both: Any, monkeypatch: Any) -> None:
        monkeypatch.delattr(socket, "AF_UNIX", raising=False)
        with pytest.raises(ConnectionFailed, match="This system has no Unix sockets") as caught:
            both.connect(on("http+unix://%2Frun%2Fa"), model=MODEL).chat("x")
        assert not caught.value.retryable

    @pytest.mark.parametrize("host", ["", "run", "%2F", "%2Fa:80", "me@%2Fa", "%2Fa%00b", "[::1]"])
    def test_invalid_path_is_refused(self, both: Any, host: str) -> None:
        with pytest.raises(SettingsError):
            both.connect(on(f"http+unix://{host}/v1"), model=MODEL).chat("x")

    def test_are_private_and_keep_their_case(self) -> None:
        url = "http+unix://%2Frun%2FServer.sock/v1"
        assert is_private(url)
        assert place(url) == "http+unix://%2Frun%2FServer.sock"
        assert server_of("http+unix://%2Frun%2FServer.sock").path == "/run/Server.sock"


def silent_body(server: Server, connection: socket.socket) -> None:
    read_request(connection)
    connection.sendall(STREAM[:-60])
    server.stopping.wait(20)


RUNNING: dict[str, Callable[[Server, socket.socket], None]] = {"an answer": hang, "a body": silent_body}


def own_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class TestClosing:
    @pytest.mark.parametrize("where", ["an answer", "a body", "a handshake", "a proxy", "a connection"])
    def test_wakes_waiting_calls_at_once(self, both: Any, monkeypatch: Any, trusted: Authority, where: str) -> None:
        with Server(RUNNING.get(where, stalled_handshake)) as server:
            url, waiting = server.url, []
            if where == "a handshake":
                url = f"https://{HERE}:{server.port}"
            elif where == "a proxy":
                url = "https://model.test"
                monkeypatch.setenv("all_proxy", server.url)
            elif where == "a connection":
                if not Path("/proc/self/fd").exists():
                    pytest.skip("only Linux lets those who connect wait")
                silent = socket.socket()
                silent.bind((HERE, 0))
                silent.listen(0)
                waiting = [silent, *full(silent)]
                url = f"http://{HERE}:{silent.getsockname()[1]}"
            llm = both.opened(on(url), model=MODEL)
            call = both.start(llm.chat, "x", timeout=30)
            time.sleep(0.3)
            begun = time.monotonic()
            llm.close()
            with pytest.raises(GraftageError):
                call.result(10)
            assert time.monotonic() - begun < SLACK
            llm.close()
            with pytest.raises(RuntimeError, match="closed"):
                llm.chat("x")
            for each in waiting:
                each.close()

    @needs_proc
    def test_late_connection_is_not_kept(self, both: Any) -> None:
        class Own(OnToolkit):
            @hookimpl
            async def list_models(self, request: Any) -> Any:
                response = await self.http.send(
                    self.http._request("GET", "/models", b""), request.call, self.clock(request.call)
                )
                network = self.http._transport
                assert network is not None
                while await response.read():
                    pass
                await network.close()
                await response.close()
                return ()

            def clock(self, call: Any) -> Any:
                from graftage.http import Clock

                return Clock(call)

        with Server() as server:
            llm = both.opened(on(server.url, Own), model=MODEL, attempts=1)
            before = own_descriptors()
            llm.models()
            assert soon(lambda: own_descriptors() <= before)


FORKS = """
    import os, sys, graftage
    sys.path[:] = sys.argv[2].split("|")
    from test_network import on, MODEL
    llm = graftage.connect(on(sys.argv[1]), model=MODEL)
    print(llm.chat("x").text)
    sys.stdout.flush()
    children = []
    for number in range(4):
        child = os.fork()
        if not child:
            import threading, gc
            found = []
            threads = [threading.Thread(target=lambda: found.append(llm.chat("x").text)) for _ in range(4)]
            [each.start() for each in threads]
            [each.join() for each in threads]
            gc.collect()
            ok = found == ["Hello world"] * 4
            if number % 2:
                llm.close()
            os._exit(0 if ok else 1)
        children.append(child)
        assert llm.chat("x").text == "Hello world"
    print([os.waitpid(each, 0)[1] for each in children])
    print(llm.chat("x").text)
    llm.close()
"""


def strict(program: str, *arguments: str) -> str:
    """Run a program with warnings as errors, and return its output."""
    return run(f"import warnings\nwarnings.simplefilter('error', ResourceWarning)\n{dedent(program)}", *arguments)


@needs_fork
def test_fork_shares_no_connection() -> None:
    with Server() as server:
        found = strict(FORKS, server.url, "|".join(sys.path)).splitlines()
        assert found == ["Hello world", "[0, 0, 0, 0]", "Hello world"]


ENDS = {
    "a sync client": """
        llm = graftage.connect(on(sys.argv[1]), model=MODEL)
        print(llm.chat("x").text)
    """,
    "a sync stream": """
        llm = graftage.connect(on(sys.argv[1]), model=MODEL)
        stream = llm.chat("x", stream=True)
        print(next(stream).text + "world")
    """,
    "an async client": """
        llm = graftage.connect_async(on(sys.argv[1]), model=MODEL)
        async def main():
            print((await llm.chat("x")).text)
        asyncio.run(main())
    """,
    "an async stream": """
        llm = graftage.connect_async(on(sys.argv[1]), model=MODEL)
        async def main():
            global stream
            stream = await llm.chat("x", stream=True)
            print((await anext(stream)).text + "world")
        asyncio.run(main())
    """,
}


@pytest.mark.parametrize("program", ENDS.values(), ids=ENDS)
def test_program_may_end_with_open_client(program: str) -> None:
    begin = "import asyncio, sys, graftage\nsys.path[:] = sys.argv[2].split('|')\nfrom test_network import on, MODEL\n"
    with Server() as server:
        assert strict(begin + dedent(program), server.url, "|".join(sys.path)) == "Hello world"


class Foreign:
    """A transport of another class than asyncio's, like those of uvloop."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class ForeignLoop(asyncio.SelectorEventLoop):
    async def create_connection(  # type: ignore[override] # it has two kinds of arguments
        self, factory: Any, *arguments: Any, **named: Any
    ) -> Any:
        def make() -> Any:
            protocol = factory()
            made = protocol.connection_made
            protocol.connection_made = lambda transport: made(Foreign(transport))
            return protocol

        return await super().create_connection(make, *arguments, **named)


UNTIDY = """
    import asyncio, gc, os, sys, warnings, graftage
    sys.path[:] = sys.argv[2].split("|")
    from network_servers import on
    warnings.simplefilter("ignore")
    llm = graftage.connect_async(on(sys.argv[1]), model="m")

    def own_descriptors():
        return len(os.listdir("/proc/self/fd"))

    async def call():
        await llm.models()

    async def stream():
        await anext(await llm.chat("x", stream=True))

    def leave(use, close):
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)  # A task may be left.
        loop.run_until_complete(use())
        if close:
            loop.close()

    leave(call, True)
    for close in True, False:
        for use in call, stream:
            gc.collect()
            before = own_descriptors()
            for _ in range(5):
                leave(use, close)
            gc.collect()
            print(close, use.__name__, max(own_descriptors() - before, 0))
    gc.disable()
    before = own_descriptors()
    for _ in range(5):
        leave(call, True)
    asyncio.run(llm.close())
    print("without a collector", max(own_descriptors() - before, 0))
"""


class TestLoopsAndThreads:
    @needs_proc
    def test_many_loops_share_a_client(self) -> None:
        async def ask(llm: Any, times: int) -> None:
            for _ in range(times):
                assert (await llm.chat("x")).text == "Hello world"

        with Server() as server:
            llm = graftage.connect_async(on(server.url), model=MODEL)
            asyncio.run(ask(llm, 1))
            before = own_descriptors()
            for _ in range(5):
                asyncio.run(ask(llm, 2))
            faults: list[BaseException] = []

            def work() -> None:
                try:
                    for _ in range(5):
                        asyncio.run(ask(llm, 5))
                except BaseException as error:  # noqa: BLE001 - fails the test
                    faults.append(error)

            threads = [threading.Thread(target=work) for _ in range(8)]
            for each in threads:
                each.start()
            for each in threads:
                each.join(60)
            assert faults == []
            assert soon(lambda: server.open == 0)
            asyncio.run(llm.close())
            assert soon(lambda: own_descriptors() <= before)

    @pytest.mark.parametrize("repeat", range(3))
    def test_32_threads_lose_no_connection(self, both: Any, repeat: int) -> None:
        with Server() as server:
            llm = both.opened(on(server.url), model=MODEL)
            together = both.together([lambda: llm.chat("x").text] * 32)
            assert together == ["Hello world"] * 32
            assert soon(lambda: server.open <= 20)
            kept, accepted = server.open, server.accepted
            assert both.together([lambda: llm.chat("x").text] * kept) == ["Hello world"] * kept
            assert server.accepted == accepted
            llm.close()
            assert soon(lambda: server.open == 0)

    def test_foreign_loop_transports_work(self) -> None:
        async def main(url: str) -> None:
            async with graftage.connect_async(on(url), model=MODEL) as llm:
                assert (await llm.chat("x")).text == "Hello world"

        with Server() as server, asyncio.Runner(loop_factory=ForeignLoop) as runner:
            runner.run(main(server.url))

    def test_loop_ended_during_a_stream_is_released(self) -> None:
        async def begin() -> Any:
            stream = await llm.chat("x", stream=True)
            await anext(stream)
            return stream

        with Server(silent_body) as server:
            llm = graftage.connect_async(on(server.url), model=MODEL)
            loops: list[Any] = []
            for _ in range(3):
                loop = asyncio.new_event_loop()
                loops.append(weakref.ref(loop))
                stream = loop.run_until_complete(begin())
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.close()
                del loop, stream
            assert soon(lambda: sum(each() is not None for each in loops) <= 1)  # The client keeps its first loop.
            asyncio.run(llm.close())

    @needs_proc
    def test_untidy_ends_leave_no_socket(self) -> None:
        with Server() as server:
            found = run(UNTIDY, server.url, "|".join(sys.path)).splitlines()
        assert found == ["True call 0", "True stream 0", "False call 0", "False stream 0", "without a collector 0"]


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def answering_once(end: Callable[[socket.socket], object]) -> Callable[[Server, socket.socket], None]:
    """Answer the first request of each connection, then read the second and end the connection."""

    def serve(server: Server, connection: socket.socket) -> None:
        for count in range(2):
            if not (request := read_request(connection)):
                return
            server.requests.append(request)
            if count:
                end(connection)
            else:
                answer(connection, request)

    return serve


ENDED: dict[str, Callable[[socket.socket], object]] = {"the end": lambda _: None, "a reset": reset}
ASKED: dict[str, Callable[[Any], object]] = {
    "a chat": lambda llm: llm.chat("x").text,
    "a stream": lambda llm: [chunk.text for chunk in llm.chat("x", stream=True)],
    "a list": lambda llm: llm.models(),
}


def hasty(server: Server, connection: socket.socket) -> None:
    server.requests.append(read_request(connection))
    answer(connection, server.requests[-1])


class TestStaleConnections:
    """Kept connections that the server has closed."""

    @pytest.mark.parametrize("end", ENDED.values(), ids=ENDED)
    @pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
    def test_closed_one_is_replaced(self, both: Any, ask: Any, end: Any) -> None:
        with Server(answering_once(end)) as server:
            llm = both.connect(on(server.url), model=MODEL, attempts=1)
            found = [ask(llm) for _ in range(4)]
            assert all(each == found[0] for each in found)
            assert (server.accepted, len(server.requests)) == (4, 7)
            assert llm.stats().running == 0

    @pytest.mark.parametrize("end", ENDED.values(), ids=ENDED)
    def test_file_is_sent_again_whole(self, both: Any, tmp_path: Path, end: Any) -> None:
        file = tmp_path / "file"
        file.write_bytes(b"x" * 100_000)
        with Server(answering_once(end)) as server:
            llm = both.connect(Giving(lambda request: Uploading(request, server.url, file)), model=MODEL, attempts=1)
            llm.models()
            llm.models()
            assert [each.endswith(file.read_bytes()) for each in server.requests] == [True] * 3

    def test_closed_one_in_a_tunnel_is_replaced(self, both: Any, monkeypatch: Any, trusted: Authority) -> None:
        with Server(secured(trusted.context(), answering_once(reset))) as server, Proxy(server.port) as proxy:
            monkeypatch.setenv("https_proxy", f"http://{HERE}:{proxy.port}")
            llm = both.connect(on("https://model.test"), model=MODEL, attempts=1)
            assert [llm.chat("x").text for _ in range(3)] == ["Hello world"] * 3

    def test_silent_close_after_each_response(self, both: Any) -> None:
        with Server(hasty) as server:
            llm = both.connect(on(server.url), model=MODEL, attempts=1)
            assert [llm.chat("x").text for _ in range(100)] == ["Hello world"] * 100
            assert server.accepted == 100

    def test_request_is_repeated_only_once(self, both: Any) -> None:
        def serve(server: Server, connection: socket.socket) -> None:
            if request := read_request(connection):
                server.requests.append(request)
                if server.accepted == 1:
                    answer(connection, request)
                    server.requests.append(read_request(connection))

        with Server(serve) as server:
            llm = both.connect(on(server.url), model=MODEL, attempts=1)
            llm.models()
            with pytest.raises(ConnectionFailed, match="broke before a response came"):
                llm.models()
            assert len(server.requests) == 3

    def test_request_with_partial_response_is_not_repeated(self, both: Any) -> None:
        with Server(answering_once(lambda connection: connection.sendall(b"HTTP/1.1 2"))) as server:
            llm = both.connect(on(server.url), model=MODEL, attempts=1)
            llm.models()
            with pytest.raises(ConnectionFailed, match="broke before a response came"):
                llm.models()
            assert len(server.requests) == 2

    def test_late_end_is_not_stale(self) -> None:
        answer = Framing()
        answer.end()
        assert is_stale(answer, time.monotonic())
        assert not is_stale(answer, time.monotonic() - 6)


STEPS = {"plain": 150, "tls": 100, "tunnel": 100, "upload": 60}


@needs_proc
@pytest.mark.parametrize("way", STEPS)
def test_cancel_at_any_step_leaves_nothing(monkeypatch: Any, trusted: Authority, tmp_path: Path, way: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 200_000)

    async def once(llm: Any) -> None:
        if way == "upload":
            await llm.models()
        async with await llm.chat("x", stream=True) as stream:
            assert "".join([chunk.text async for chunk in stream]) == "Hello world"

    async def main(url: str) -> None:
        provider = Giving(lambda request: Uploading(request, url, file))
        async with graftage.connect_async(provider, model=MODEL, concurrency=1) as llm:
            await once(llm)
            await llm.close()
        before = own_descriptors()
        for step in range(STEPS[way]):
            async with graftage.connect_async(provider, model=MODEL, concurrency=1) as llm:
                for _ in range(2):
                    task = asyncio.create_task(once(llm))
                    for _ in range(step):
                        if task.done():
                            break
                        await asyncio.sleep(0.0005 if step % 3 == 0 else 0)
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task
                    assert llm.stats().running == 0
                if step % 10 == 0:
                    await asyncio.wait_for(once(llm), 10)
        assert await asyncio.to_thread(soon, lambda: own_descriptors() <= before + 1)

    with (
        Server(secured(trusted.context()) if way in ("tls", "tunnel") else None) as server,
        Proxy(server.port) as proxy,
    ):
        if way == "tunnel":
            monkeypatch.setenv("https_proxy", f"http://{HERE}:{proxy.port}")
        url = {"tls": f"https://{HERE}:{server.port}", "tunnel": "https://model.test"}.get(way, server.url)
        complaints: list[Any] = []
        with asyncio.Runner() as runner:
            runner.get_loop().set_exception_handler(lambda _, context: complaints.append(context))
            runner.run(main(url))
        assert complaints == []
        assert soon(lambda: server.open == 0)


class Bytes(OnToolkit):
    """A connection that reads a body like an SDK, with pauses."""

    def __init__(self, request: Any, url: str, pause: float) -> None:
        super().__init__(request, url)
        self.pause = pause
        self.size = 0

    @hookimpl
    async def list_models(self, request: Any) -> Any:
        from graftage.http import Request

        response = await self.http._forward(Request(method="GET", url=f"{self.http.base_url}/models"))
        while piece := await response.read():
            if self.size == 0 or self.size < 1 << 20 <= self.size + len(piece):
                await request.call.sleep(self.pause)
            self.size += len(piece)
        await response.close()
        return ()


def test_slow_reader_loses_nothing(both: Any) -> None:
    burst = b"x" * (30 << 20)
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(burst)
    made: list[Bytes] = []

    def make(request: Any) -> Bytes:
        made.append(Bytes(request, server.url, 1.0))
        return made[-1]

    with Server(saying(head + burst)) as server:
        timeouts = Timeouts(connect=5, first_token=0.5, idle=0.5, total=60)
        llm = both.opened(Giving(make), model=MODEL, timeouts=timeouts, attempts=1)
        tracemalloc.start()
        llm.models()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert made[0].size == len(burst)
        assert peak < 4 << 20


class Odd(OnToolkit):
    """A connection that sends the given request."""

    def __init__(self, request: Any, url: str, headers: dict[str, str], method: str = "GET", path: str = "/m") -> None:
        super().__init__(request, url)
        self.http = request.http(url, headers=headers)
        self.method = method
        self.path = path

    @hookimpl
    async def list_models(self, request: Any) -> Any:
        body = {"text": "\u00e4\u20ac\U0001f600"} if self.method == "POST" else None
        await self.http.json(self.method, self.path, body, call=request.call, empty=True)
        return ()


def odd(server: Server, headers: dict[str, str] | None = None, **how: str) -> Giving:
    return Giving(lambda request: Odd(request, server.url, headers or {}, **how))


class TestRequests:
    @pytest.mark.parametrize("value", [f"{SECRET}\r\nx: y", f"{SECRET}\n", f"{SECRET}\0", f"{SECRET}\ud800"])
    @pytest.mark.parametrize("patched", [False, True], ids=["plain", "vcrpy"])
    def test_invalid_header_is_refused_and_hidden(self, both: Any, tmp_path: Path, value: str, patched: bool) -> None:
        cassette = vcr.use_cassette(str(tmp_path / "a.yaml")) if patched else contextlib.nullcontext()
        with Server() as server, cassette:
            llm = both.connect(odd(server, {"x-api-key": value}), model=MODEL)
            with pytest.raises(RequestRejected) as caught:
                llm.models()
            assert SECRET not in str(caught.value)
            assert server.requests == []

    def test_header_may_hold_any_letter(self, both: Any) -> None:
        with Server() as server:
            both.connect(odd(server, {"x-name": "J\u00f6rg \u20ac"}), model=MODEL).models()
            assert "x-name: J\u00f6rg \u20ac\r\n".encode() in server.requests[0]

    def test_explicit_host_replaces_the_default(self, both: Any) -> None:
        with Server() as server:
            both.connect(odd(server, {"Host": "model.internal"}), model=MODEL).models()
            assert re.findall(rb"(?im)^host: .*$", server.requests[0]) == [b"host: model.internal\r"]

    @pytest.mark.parametrize(
        ("path", "target"),
        [
            ("/a b", "/a%20b"),
            ("/m\u00f6del:1", "/m%C3%B6del:1"),
            ("/a%2Fb", "/a%2Fb"),
            ("/a\r\nx: y", "/a%0D%0Ax:%20y"),
            ("/a?b=c d&e=[1]", "/a?b=c%20d&e=[1]"),
            ("/a\x7f", "/a%7F"),
            ("?a=b", "/?a=b"),
            ("/a#b", "/a"),
        ],
    )
    def test_path_is_percent_encoded(self, both: Any, path: str, target: str) -> None:
        with Server() as server:
            both.connect(odd(server, path=path), model=MODEL).models()
            assert server.requests[0].startswith(f"GET {target} HTTP/1.1\r\n".encode())

    @pytest.mark.parametrize("method", ["GET", "DELETE", "HEAD", "POST"])
    def test_content_length_matches_the_body(self, both: Any, method: str) -> None:
        def serve(server: Server, connection: socket.socket) -> None:
            while request := read_request(connection):
                server.requests.append(request)
                connection.sendall(OBJECT[:-17] if method == "HEAD" else OBJECT)

        with Server(serve) as server:
            llm = both.connect(odd(server, method=method), model=MODEL)
            llm.models()
            llm.models()
            head, _, body = server.requests[1].partition(b"\r\n\r\n")
            lengths = re.findall(rb"content-length: (\d+)", head)
            assert body == ('{"text":"\u00e4\u20ac\U0001f600"}'.encode() if method == "POST" else b"")
            assert lengths == {"GET": [], "HEAD": [], "DELETE": [b"0"], "POST": [str(len(body)).encode()]}[method]
            assert server.accepted == 1


@needs_proc
def test_many_calls_leave_nothing(both: Any) -> None:
    def some(times: int) -> None:
        for _ in range(times):
            llm.chat("x")

    with Server() as server:
        llm = both.connect(on(server.url), model=MODEL)
        some(100)
        server.requests.clear()
        gc.collect()
        tracemalloc.start()
        some(20)
        server.requests.clear()
        gc.collect()
        before, descriptors = tracemalloc.get_traced_memory()[0], own_descriptors()
        some(CALLS)
        server.requests.clear()
        gc.collect()
        after = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        print(both.mode, "bytes more:", after - before)
        assert own_descriptors() <= descriptors
        assert after - before < 50_000 + CALLS * 5
        assert server.accepted == 1
