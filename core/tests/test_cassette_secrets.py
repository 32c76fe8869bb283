"""No secret is written into a cassette."""

from __future__ import annotations

import base64
import json
import urllib.parse
from typing import TYPE_CHECKING, Any

import pytest
from recording import ELSEWHERE, STREAM, exchange, modes, recorded

from graftage.exceptions import ConnectionFailed
from graftage.testing import Cassette, CassetteError
from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from pathlib import Path

SENT = 'q7&/+é"x'
"""A header whose characters JSON, URLs and base64 all encode differently."""


def in_base64(*, before: str = "", alphabet: bytes = b"+/") -> bytes:
    return base64.b64encode(f"{before}{SENT}~~~".encode(), altchars=alphabet)


ECHOES: dict[str, Answer] = {
    "401": Answer([{"error": f"{SENT} is no key of ours"}], status=401),
    "raw": Answer([f"you sent {SENT}".encode()]),
    "chunks": Answer([b"you sent " + SENT.encode()[:4], SENT.encode()[4:]]),
    "lines": Answer([{"message": {"content": SENT[:4]}}, {"message": {"content": SENT[4:]}}]),
    "events": Answer([b'data: {"delta":"' + each + b'"}\n\n' for each in (b"q7&/", b'+\\u00e9\\"x')]),
    "json": Answer([json.dumps({"error": SENT}).encode()]),
    "json as Go writes it": Answer([b'{"error":"q7\\u0026/+\xc3\xa9\\"x"}']),
    "json as PHP writes it": Answer([b'{"error":"q7&\\/+\\u00E9\\"x"}']),
    "json in json": Answer([json.dumps({"error": json.dumps({"error": SENT})}).encode()]),
    "url": Answer([urllib.parse.quote(SENT, safe="").encode()]),
    "url in small letters": Answer([urllib.parse.quote(SENT, safe="").lower().encode()]),
    "base64": Answer([base64.b64encode(SENT.encode())]),
    "base64 after one": Answer([in_base64(before="~")]),
    "base64 after two": Answer([in_base64(before="~~")]),
    "base64 for addresses": Answer([in_base64(before="user:", alphabet=b"-_")]),
    "header": Answer([b"x"], status=429, headers={"retry-after": "in q7&/+e"}),
}


class TestSecretsAreNotWritten:
    @pytest.mark.parametrize("where", ["answer", "request", "split", "quoted"])
    def test_value_of_a_secret_variable(
        self, tmp_path: Path, fake: FakeOllama, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        secret = 'it\'s "quite" öpaque' if where == "quoted" else "quite-opaque-value"
        monkeypatch.setenv("MY_SERVICE_TOKEN", secret)
        path = tmp_path / "a.yaml"
        path.write_text("the one before")
        answers: dict[str, list[Any]] = {
            "answer": [{"text": secret}],
            "quoted": [{"text": secret}],
            "split": [b"quite-opa", b"que-value"],
        }
        with pytest.raises(CassetteError, match="MY_SERVICE_TOKEN") as caught:
            recorded(path, fake, Answer(answers.get(where, [])), body=secret.encode() if where == "request" else b"")
        assert secret not in str(caught.value)
        assert path.read_text() == "the one before"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize(
        "secret",
        [
            "sk-abcdefghijklmnopqrstuv",
            "hf_abcdefghijklmnopqrstuv",
            "Bearer abcdefghijklmnopqrst.uv",
            "-----BEGIN OPENSSH PRIVATE KEY-----",
        ],
    )
    def test_text_like_a_key(self, tmp_path: Path, fake: FakeOllama, secret: str) -> None:
        path = tmp_path / "a.yaml"
        with pytest.raises(CassetteError, match="looks like a secret") as caught:
            recorded(path, fake, Answer([{"text": f"use {secret} now"}]))
        assert secret not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    @modes
    @pytest.mark.parametrize("header", ["authorization", "X-Api-Key", "X-Anything"])
    @pytest.mark.parametrize("how", ECHOES)
    def test_header_repeated_by_the_server(
        self, tmp_path: Path, fake: FakeOllama, how: str, header: str, mode: str
    ) -> None:
        path = tmp_path / "a.yaml"
        path.write_text("the one before")
        secret = "q7&/+e" if how == "header" else SENT
        sent = f"Bearer {secret}" if header == "authorization" else secret
        with pytest.raises(CassetteError, match=f"request header `{header.lower()}`") as caught:
            recorded(path, fake, ECHOES[how], mode=mode, headers={header: sent})
        assert secret not in f"{caught.value!r} {caught.value} {caught.value.hint}"
        assert path.read_text() == "the one before"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("before", ["", "~", "~~"])
    def test_header_in_url_safe_base64(self, tmp_path: Path, fake: FakeOllama, before: str) -> None:
        secret = "opaque~~~???>>>~~~"
        repeated = base64.urlsafe_b64encode(f"{before}{secret}~".encode())
        assert set(repeated) & set(b"-_")
        with pytest.raises(CassetteError, match="request header `x-api-key`"):
            recorded(tmp_path / "a.yaml", fake, Answer([repeated]), headers={"x-api-key": secret})

    @pytest.mark.parametrize(
        ("headers", "repeated"),
        [
            ({"authorization": "Bearer opaque-1"}, "opaque-1"),
            ({"authorization": "Own-Scheme opaque-1"}, "opaque-1"),
            ({"authorization": "opaque-1"}, "opaque-1"),
            ({"authorization": f"Basic {base64.b64encode(b'me:opaque-1').decode()}"}, "opaque-1"),
            ({"proxy-authorization": "Bearer opaque-1"}, "opaque-1"),
            ({"x-team": "bearer opaque-1"}, "opaque-1"),
            ({"cookie": "theme=dark; session=opaque-1"}, "opaque-1"),
            ({"cookie": 'session="opaque-1"'}, "opaque-1"),
            ({"x-six": "opaque"}, "opaque"),
            ({"x-two-words": "opaque words"}, "opaque words"),
        ],
    )
    def test_credentials_inside_a_header(
        self, tmp_path: Path, fake: FakeOllama, headers: dict[str, str], repeated: str
    ) -> None:
        (name,) = headers
        with pytest.raises(CassetteError, match=f"request header `{name}`") as caught:
            recorded(tmp_path / "a.yaml", fake, Answer([{"text": repeated}]), headers=headers)
        assert repeated not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("where", ["prompt", "address"])
    def test_key_repeated_by_the_caller(self, tmp_path: Path, fake: FakeOllama, where: str) -> None:
        more: dict[str, Any] = (
            {"body": {"prompt": "My key is opaque-1."}} if where == "prompt" else {"query": "?key=opaque-1"}
        )
        with pytest.raises(CassetteError, match="request header `x-api-key`"):
            recorded(tmp_path / "a.yaml", fake, STREAM, headers={"x-api-key": "opaque-1"}, **more)
        assert list(tmp_path.iterdir()) == []

    def test_header_of_another_request(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        key = {"x-api-key": "opaque-1"}
        fake.script("/api/chat", Answer([{"text": "opaque-1"}]))
        cassette = Cassette(path, mode="all")
        exchange("sync", cassette, f"{fake.url}/api/chat")
        with pytest.raises(ConnectionFailed):
            exchange("sync", cassette, "http://127.0.0.1:1/", headers=key)
        with pytest.raises(CassetteError, match="request header `x-api-key`"):
            cassette.save()
        assert list(tmp_path.iterdir()) == []

    def test_harmless_and_short_headers_may_repeat(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        headers = {
            "accept": "application/json",
            "accept-language": "de, en",
            "user-agent": "python-httpx/9",
            "x-short": "seven",
            "x-silent": "opaque-1",
        }
        text = " ".join(
            [*(value for name, value in headers.items() if name != "x-silent"), fake.url, "Bearer identity"]
        )
        live = recorded(path, fake, Answer([{"text": text}]), headers=headers)
        assert exchange("sync", Cassette(path), f"{ELSEWHERE}/api/chat") == live
        assert "opaque-1" not in path.read_text()
