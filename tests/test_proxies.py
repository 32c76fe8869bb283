"""Proxies: whole URLs, tunnels, errors that name the proxy, and NO_PROXY."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Any

import pytest
from network_servers import (
    BASIC,
    HERE,
    SECRET,
    SHORT,
    SLACK,
    WORDS,
    Authority,
    Proxy,
    Server,
    WithKey,
    close,
    drip,
    garbage,
    hang,
    on,
    saying,
    secured,
)
from patience import soon
from test_colours import MODEL

from graftage.exceptions import (
    ConnectionFailed,
    ProviderError,
    ProviderTimeout,
)
from graftage.http import proxy_for

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.slow


class TestRouting:
    def test_plain_http_sends_the_whole_url(self, both: Any, monkeypatch: Any) -> None:
        with Server() as server, Proxy(server.port) as proxy:
            monkeypatch.setenv("http_proxy", f"http://{WORDS}@{HERE}:{proxy.port}")
            llm = both.connect(on("http://model.test", WithKey), model=MODEL)
            assert llm.chat("x").text == "Hello world"
            assert proxy.requests[0].startswith(b"POST http://model.test/chat HTTP/1.1\r\nhost: model.test\r\n")
            assert BASIC in proxy.requests[0]
            assert SECRET.encode() not in proxy.requests[0]

    @pytest.mark.parametrize("name", ["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"])
    def test_https_hides_the_key_in_a_tunnel(self, both: Any, monkeypatch: Any, trusted: Authority, name: str) -> None:
        with Server(secured(trusted.context())) as server, Proxy(server.port) as proxy:
            monkeypatch.setenv(name, f"http://{WORDS}@{HERE}:{proxy.port}")
            llm = both.connect(on("https://model.test", WithKey), model=MODEL)
            for _ in range(2):
                assert llm.chat("x").text == "Hello world"
            assert proxy.requests[0].startswith(b"CONNECT model.test:443 HTTP/1.1\r\nhost: model.test:443\r\n")
            assert BASIC in proxy.requests[0]
            assert (proxy.accepted, server.accepted) == (1, 1)
            assert all(SECRET.encode() not in each for each in proxy.requests)
            assert SECRET.encode() in server.requests[0]
            assert b"proxy-authorization" not in server.requests[0]

    def test_proxy_may_speak_tls(self, both: Any, monkeypatch: Any, trusted: Authority) -> None:
        with Server() as server, Proxy(server.port, secure=trusted.context()) as proxy:
            monkeypatch.setenv("http_proxy", f"https://{HERE}:{proxy.port}")
            assert both.connect(on("http://model.test"), model=MODEL).chat("x").text == "Hello world"
            assert proxy.requests[0].startswith(b"POST http://model.test/chat")


REFUSING: dict[str, tuple[Callable[[Server, socket.socket], None], type[ProviderError]]] = {
    "407": (saying(b"HTTP/1.1 407 Sign in\r\ncontent-length: 0\r\n\r\n"), ConnectionFailed),
    "403": (saying(b"HTTP/1.1 403 No\r\ncontent-length: 2\r\n\r\nno"), ConnectionFailed),
    "502": (saying(b"HTTP/1.1 502 Bad\r\ntransfer-encoding: chunked\r\n\r\n"), ConnectionFailed),
    "hangs": (hang, ProviderTimeout),
    "drips": (drip, ProviderTimeout),
    "closes": (close, ConnectionFailed),
    "garbage": (garbage, ConnectionFailed),
}


UNUSABLE = {
    "socks5://me:word@p.test:1080": r"socks5://p\.test:1080, which ALL_PROXY names, has an unsupported scheme: socks5",
    "socks5h://p.test": r"socks5h://p\.test, which",
    "ftp://p.test": "ftp",
    "http://": "proxy in ALL_PROXY is invalid",
    "http://me:word@p.test:99999": "proxy in ALL_PROXY is invalid",
    "http://me:word@p.test:abc": "proxy in ALL_PROXY is invalid",
    "me:word@[::1": "proxy in ALL_PROXY is invalid",
    "http://p..\u00fc.test": "proxy in ALL_PROXY is invalid",
    "https://me:word@p.test": r"https://p\.test, which ALL_PROXY names, uses TLS",
    "http://p.test": r"The host name in http://p\.test is not known\. It is the proxy",
}


class TestFailures:
    @pytest.mark.parametrize(("serve", "kind"), REFUSING.values(), ids=REFUSING)
    def test_refused_tunnel_names_the_proxy(
        self, both: Any, monkeypatch: Any, serve: Any, kind: type[ProviderError]
    ) -> None:
        with Server(serve) as proxy:
            monkeypatch.setenv("https_proxy", f"http://me:{SECRET}@{HERE}:{proxy.port}")
            llm = both.connect(on("https://model.test"), model=MODEL, attempts=1, timeouts=SHORT)
            begun = time.monotonic()
            named = rf"(?i)proxy.*model\.test.*http://{HERE}:{proxy.port}, which https_proxy names.*NO_PROXY"
            with pytest.raises(kind, match=named) as caught:
                llm.chat("x")
            assert time.monotonic() - begun < SHORT.total + SLACK
            assert SECRET not in str(caught.value)
            assert "status 0" not in str(caught.value)
            assert soon(lambda: proxy.open == 0 or serve is hang)

    @pytest.mark.parametrize("serve", [REFUSING["407"][0], close, garbage], ids=["407", "closes", "garbage"])
    def test_failed_plain_request_names_the_proxy(self, both: Any, monkeypatch: Any, serve: Any) -> None:
        with Server(serve) as proxy:
            monkeypatch.setenv("HTTP_PROXY", f"http://me:{SECRET}@{HERE}:{proxy.port}")
            llm = both.connect(on("http://model.test"), model=MODEL, attempts=1)
            named = rf"(?i)proxy.*http://model\.test.*http://{HERE}:{proxy.port}, which HTTP_PROXY names.*NO_PROXY"
            with pytest.raises(ProviderError, match=named) as caught:
                llm.chat("x")
            assert SECRET not in str(caught.value)
            assert soon(lambda: proxy.open == 0)

    @pytest.mark.parametrize(("proxy", "problem"), UNUSABLE.items(), ids=UNUSABLE)
    def test_unusable_proxy_is_named(self, both: Any, monkeypatch: Any, proxy: str, problem: str) -> None:
        def look(host: Any, *arguments: Any, **named: Any) -> Any:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", look)
        monkeypatch.setenv("ALL_PROXY", proxy)
        llm = both.connect(on("https://model.test"), model=MODEL, attempts=1)
        with pytest.raises(ConnectionFailed, match=problem) as caught:
            llm.chat("x")
        assert "NO_PROXY" in str(caught.value)
        assert "word" not in str(caught.value)

    @pytest.mark.parametrize("url", ["http://model.test", "https://model.test"])
    def test_absent_proxy_is_named(self, both: Any, monkeypatch: Any, url: str) -> None:
        with socket.create_server((HERE, 0)) as free:
            port = free.getsockname()[1]
        monkeypatch.setenv("all_proxy", f"http://me:{SECRET}@{HERE}:{port}")
        llm = both.connect(on(url), model=MODEL, attempts=1)
        with pytest.raises(ConnectionFailed, match=rf"Nothing listens at http://{HERE}:{port}.*NO_PROXY") as caught:
            llm.chat("x")
        assert SECRET not in str(caught.value)


SPARED = [
    ("*", "http://a.test", True),
    ("a.test", "http://a.test", True),
    (".test", "http://a.test", True),
    ("other.test, A.Test", "http://a.test:81", True),
    ("a.test:81", "http://a.test:81", True),
    ("a.test:81", "http://a.test:82", False),
    ("a.test:80", "http://a.test", True),
    ("a.test:443", "https://a.test", True),
    ("b.test", "http://a.test", False),
    ("test", "http://contest", False),
    ("10.0.0.0/8", "http://10.1.2.3:5", True),
    ("10.0.0.0/8", "http://11.1.2.3", False),
    ("fd00::/8", "http://[fd00::1]:80", True),
    ("fd00::1", "http://[fd00::1]", True),
    ("10.0.0.0/8", "http://a.test", False),
    ("test", "http://a.b.TEST", True),
    ("*.test", "http://a.test", True),
    ("*.test", "http://a.b.test", True),
    ("*.a.test", "http://a.test", False),
    ("*.test", "http://contest", False),
    (".a.test", "http://a.test", True),
    (".A.Test:81", "http://b.a.test:81", True),
    ("*.test:81", "http://a.test:80", False),
    ("a.test.", "http://a.test", True),
    ("a.test", "http://a.test.", True),
    ("x.test y.test\ta.test", "http://a.test", True),
    (" , ,a.test,", "http://a.test", True),
    ("b.test,*", "http://a.test", True),
    ("10.0.0.0/8:80", "http://10.1.2.3", True),
    ("10.1.2.3:81", "http://10.1.2.3:81", True),
    ("10.1.2.3:81", "http://10.1.2.3:82", False),
    ("10.0.0.0/8", "http://[::ffff:10.1.2.3]", True),
    ("::ffff:10.0.0.0/104", "http://10.1.2.3", True),
    ("::ffff:10.1.2.3", "http://10.1.2.3", True),
    ("::/0", "http://[fd00::1]", True),
    ("0.0.0.0/0", "http://[fd00::1]", False),
    ("10.1.2.3/33", "http://10.1.2.3", False),
    ("[fd00::1]", "http://[fd00::1]", True),
    ("[fd00::1]:81", "http://[fd00::1]:81", True),
    ("[fd00::1]:81", "http://[fd00::1]:80", False),
    ("FD00:0:0::1", "http://[fd00::1]", True),
    ("fe80::1%eth0", "http://[fe80::1]", True),
    ("fd00::2", "http://[fd00::1]", False),
    (":80", "http://a.test", False),
    ("a.test:x", "http://a.test", False),
    ("", "http://localhost", True),
    ("", "http://127.9.9.9", True),
    ("", "http://[::1]:5", True),
    ("", "http+unix://%2Frun%2Fa.sock", True),
]


class TestNoProxy:
    @pytest.mark.parametrize(("names", "url", "spared"), SPARED)
    def test_every_form_is_read(self, monkeypatch: Any, names: str, url: str, spared: bool) -> None:
        monkeypatch.setenv("all_proxy", "http://proxy.test:1")
        monkeypatch.setenv("http_proxy", "http://proxy.test:1")
        for name in ("no_proxy", "NO_PROXY"):
            with monkeypatch.context() as patch:
                patch.setenv(name, names)
                assert (proxy_for(url) is None) is spared

    def test_empty_one_hides_no_other(self, monkeypatch: Any) -> None:
        monkeypatch.setenv("http_proxy", "http://proxy.test:1")
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.setenv("NO_PROXY", "a.test")
        assert proxy_for("http://a.test") is None
