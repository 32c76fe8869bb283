"""Every form of `host`: those of Ollama's tools are accepted, others refused with a reason."""

from __future__ import annotations

import base64
import re
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import graftage_ollama
from graftage.exceptions import AuthenticationFailed, SettingsError
from graftage_ollama._settings import parse_host
from graftage_ollama.testing import Answer, FakeOllama

ACCEPTED = {
    None: "http://127.0.0.1:11434",
    "": "http://127.0.0.1:11434",
    "  ": "http://127.0.0.1:11434",
    "localhost": "http://localhost:11434",
    "127.0.0.1": "http://127.0.0.1:11434",
    "192.168.1.20": "http://192.168.1.20:11434",
    "example.com": "http://example.com:11434",
    "example.com.": "http://example.com.:11434",
    "my_server": "http://my_server:11434",
    "xn--bcher-kva.example": "http://xn--bcher-kva.example:11434",
    "a" * 63 + ".example": "http://" + "a" * 63 + ".example:11434",
    "localhost:8080": "http://localhost:8080",
    "127.0.0.1:1": "http://127.0.0.1:1",
    "127.0.0.1:65535": "http://127.0.0.1:65535",
    "host:080": "http://host",
    ":8080": "http://127.0.0.1:8080",
    "[::1]": "http://[::1]:11434",
    "[::1]:1234": "http://[::1]:1234",
    "[2001:DB8:0:0::7]": "http://[2001:db8::7]:11434",
    "http://localhost": "http://localhost",
    "http://localhost:80": "http://localhost",
    "http://localhost:11434": "http://localhost:11434",
    "http://localhost:11434/": "http://localhost:11434",
    "https://example.com": "https://example.com",
    "https://example.com:8443": "https://example.com:8443",
    "HTTPS://Example.COM": "https://example.com",
    "https://example.com/ollama": "https://example.com/ollama",
    "https://example.com/a/b/": "https://example.com/a/b",
    "https://example.com/a/./b/../": "https://example.com/a",
    "https://example.com/.": "https://example.com",
    "http://[::1]:11434/a": "http://[::1]:11434/a",
    "example.com/ollama": "http://example.com:11434/ollama",
    "example.com/a@b": "http://example.com:11434/a@b",
    "  127.0.0.1:8080\n": "http://127.0.0.1:8080",
    '"127.0.0.1:8080"': "http://127.0.0.1:8080",
    "' localhost '": "http://localhost:11434",
    # As other programs need it: the path of the API is dropped.
    "http://h:11434/v1": "http://h:11434",
    "http://h:11434/v1/": "http://h:11434",
    "http://h:11434/api": "http://h:11434",
    "http://h:11434//api//": "http://h:11434",
    "http://h:11434/api/chat": "http://h:11434",
    "h:11434/api/generate/": "http://h:11434",
    "https://example.com/ollama/v1/chat/completions": "https://example.com/ollama",
    "https://example.com/ollama/api/tags": "https://example.com/ollama",
    "https://example.com/api/v1": "https://example.com",
    "https://example.com/v1/ollama": "https://example.com/v1/ollama",
    "https://example.com/myapi": "https://example.com/myapi",
    "https://example.com/api/v2": "https://example.com/api/v2",
    "//example.com": "http://example.com:11434",
    "//example.com:80/x/": "http://example.com/x",
    "https://me:p%40ss@example.com": "https://me:p%40ss@example.com",
    "https://me:p@ss@example.com:8443/x/": "https://me:p%40ss@example.com:8443/x",
    "https://token@example.com": "https://token@example.com",
    "https://:word@example.com": "https://:word@example.com",
    "me:word@localhost": "http://me:word@localhost:11434",
    "http://me:word@[::1]:80/v1": "http://me:word@[::1]",
    # Servers listen on these; clients use loopback.
    "0.0.0.0": "http://127.0.0.1:11434",
    "0.0.0.0:8080": "http://127.0.0.1:8080",
    "http://0.0.0.0:11434": "http://127.0.0.1:11434",
    "[::]:11434": "http://[::1]:11434",
    "[0:0:0:0:0:0:0:0]": "http://[::1]:11434",
}
REFUSED = {
    "::1": "IPv6 address without brackets",
    "fe80::1%eth0": "IPv6 address without brackets",
    "2001:db8::7": "IPv6 address without brackets",
    "[fe80::1%eth0]": "zone",
    "[::1": "is not an address",
    "[localhost]": "no IPv6 address in its brackets",
    "[]": "no IPv6 address in its brackets",
    "h:1:2": "is not an address",
    "h:0": "the port `0`",
    "h:99999": "the port `99999`",
    "h:65536": "the port `65536`",
    "h:-1": "the port `-1`",
    "h:abc": "the port `abc`",
    "h:": "the port ``",
    "h:1.5": "the port `1.5`",
    "h:\u0661": "the port",
    "h:" + "9" * 1500: "the port `99999999999999999999`",
    "a b": "is not a host name",
    "-h": "is not a host name",
    "a..b": "is not a host name",
    ".": "is not an IPv4 address",
    "a" * 64: "is not a host name",
    ".".join(["abc"] * 70): "is not a host name",
    "bücher.example": "is not a host name",
    "h\x00": "is not a host name",
    "999.1.1.1": "is not an IPv4 address",
    "127.1": "is not an IPv4 address",
    "0x7f.1": "is not an IPv4 address",
    "2130706433": "is not an IPv4 address",
    "0177.0.0.1": "is not an IPv4 address",
    "http://": "names no host",
    "http://:8080": "names no host",
    "http:/h": "the port ``",
    "ftp://h": "the scheme `ftp`",
    "file:///etc/passwd": "the scheme `file`",
    "unix:///tmp/socket": "the scheme `unix`",
    "://h": "the port ``",
    "http://h?q=1": "a query or a fragment",
    "http://h/x#f": "a query or a fragment",
    "h/a b": "a path with spaces",
    "h/\x00": "a path with spaces",
    "h/" + "a" * 3000: "too long",
}


class TestParsing:
    def test_scan_looks_at_the_default(self) -> None:
        assert graftage_ollama.local_addresses() == (ACCEPTED[None],)

    @pytest.mark.parametrize(("given", "url"), ACCEPTED.items(), ids=map(repr, ACCEPTED))
    def test_accepts_what_ollama_accepts(self, given: str | None, url: str) -> None:
        assert str(parse_host(given)).rstrip("/") == url

    @pytest.mark.parametrize(("given", "problem"), REFUSED.items(), ids=lambda text: repr(text[:30]))
    def test_invalid_hosts_raise_with_hint(self, given: str, problem: str) -> None:
        with pytest.raises(SettingsError) as caught:
            parse_host(given)
        assert problem in caught.value.message
        assert caught.value.key == "host"
        assert caught.value.hint

    @pytest.mark.parametrize(
        "given",
        [
            "http://me:hunter2@h",
            "http://hunter2@h",
            "me:hunter2@h",
            "ftp://me:hunter2@h",
            "http://me:hunter2@h:99999",
            "http://me:hunter2@h:1:2",
            "http://me:hunter2@h/" + "x" * 3000,
            "http://me:hun/ter2@h:1:2",
            "https://h/?key=hunter2",
            "https://h:1:2/?key=hunter2",
        ],
    )
    def test_errors_hide_passwords(self, given: str) -> None:
        with pytest.raises(SettingsError) as caught:
            parse_host(given)
        assert "hunter2" not in str(caught.value)
        assert "ter2" not in str(caught.value)

    def test_loopback_in_every_spelling(self) -> None:
        from graftage.http import is_loopback

        assert all(map(is_loopback, ("localhost", "LOCALHOST.", "127.0.0.1", "127.9.9.9", "::1", "[::1]")))
        assert not any(map(is_loopback, ("localhost.example.com", "10.0.0.1", "0.0.0.0", "notlocalhost", "", "::")))

    @given(st.text() | st.from_regex(r"\A(https?://)?[a-z0-9.\[\]:%@/?#-]{0,40}\Z"))
    def test_any_text_parses_or_raises(self, text: str) -> None:
        try:
            url = parse_host(text)
        except SettingsError as error:
            url, hint = None, error.hint
        if url is None:
            assert hint
            return
        assert httpx.URL(url).scheme in ("http", "https")
        assert httpx.URL(url).host
        assert parse_host(url) == url


class TestClient:
    def test_credentials_become_basic_authorization(self, both: Any) -> None:
        with FakeOllama() as fake:
            host = fake.url.replace("://", "://me:hunt%40r2@") + "/v1"
            llm = both.connect("ollama", model="m", host=host, api_key="other", attempts=1)
            llm.models()
            assert fake.requests[-1].headers["authorization"] == f"Basic {base64.b64encode(b'me:hunt@r2').decode()}"
            assert llm.address == fake.url
            fake.script("/api/chat", Answer([b'{"error": "bWU6aHVudEByMg== is wrong"}'], status=401))
            with pytest.raises(AuthenticationFailed) as caught:
                llm.chat("x")
            shown = f"{caught.value} {caught.value.to_dict()} {llm.settings!r}"
            assert not re.search("hunt|r2|bWU6", shown)

    def test_address_follows_host(self) -> None:
        import graftage

        with graftage.connect("ollama", host="https://example.com/ollama/") as llm:
            assert llm.settings.host == "https://example.com/ollama/"
            assert llm.address == "https://example.com/ollama"

    def test_connect_refuses_invalid_host(self) -> None:
        import graftage

        with pytest.raises(SettingsError, match="the scheme `ftp`"):
            graftage.connect("ollama", host="ftp://h")

    def test_ollama_host_variable_names_the_server(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import graftage

        monkeypatch.setenv("OLLAMA_HOST", "0.0.0.0:8080")
        with graftage.connect("ollama") as llm:
            assert llm.address == "http://127.0.0.1:8080"
