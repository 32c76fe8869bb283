"""No secret is written into a cassette."""

from __future__ import annotations

import base64
import json
import re
import string
import urllib.parse
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

import pytest
from recording import ELSEWHERE, STREAM, exchange, modes, recorded

from graftage.exceptions import ConnectionFailed
from graftage.testing import Cassette, CassetteError
from graftage.testing.files import CassetteFile
from graftage.testing.secrets import Allowed, find_secrets, secrets_of, texts_of
from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from collections.abc import Callable

LETTERS = string.ascii_letters
SMALL, CAPITALS, DIGITS = string.ascii_lowercase, string.ascii_uppercase, string.digits
WORD = LETTERS + DIGITS
URL_SAFE, BASE64, HEX = WORD + "-_", WORD + "+/", DIGITS + "abcdef"


def made(form: str, seed: int = 1) -> str:
    """Fill a form: `{22}` is as many random letters and digits, `{32 HEX}` are others. No file holds the result."""
    random = Random(f"{form} {seed}")

    def fill(found: re.Match[str]) -> str:
        return "".join(random.choices(globals()[found[2] or "WORD"], k=int(found[1])))

    return re.sub(r"{(\d+)(?: (\w+))?}", fill, form)


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
    "json in json in text": Answer([f"it said {json.dumps(json.dumps(SENT))}".encode()]),
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

    def test_text_like_a_key(self, tmp_path: Path, fake: FakeOllama) -> None:
        path, secret = tmp_path / "a.yaml", made("ghp_{36}")
        with pytest.raises(CassetteError, match=r"a GitHub token \(interaction 1, response body, `text`\)") as caught:
            recorded(path, fake, Answer([{"text": f"use {secret} now"}]))
        assert secret not in f"{caught.value!r} {caught.value.hint}"
        assert list(tmp_path.iterdir()) == []

    def test_key_in_the_prompt(self, tmp_path: Path, fake: FakeOllama) -> None:
        body = {"messages": [{"role": "user", "content": f"mine is {made('hf_{34}')}"}]}
        place = re.escape("(interaction 1, request body, `messages[0].content`)")
        with pytest.raises(CassetteError, match=f"a token of Hugging Face {place}"):
            recorded(tmp_path / "a.yaml", fake, STREAM, body=body)

    def test_token_in_the_address(self, tmp_path: Path, fake: FakeOllama) -> None:
        with pytest.raises(CassetteError, match=r"a token in an address \(interaction 1, address\)"):
            recorded(tmp_path / "a.yaml", fake, STREAM, query=f"?v={made('{32}')}")

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
        secret = "o~~?>~é"
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


# --- What secrets look like ------------------------------------------------------------------------------------------

UUID_FORM = "{8 HEX}-{4 HEX}-{4 HEX}-{4 HEX}-{12 HEX}"
FORMS = {
    "a GitHub token": ["ghp_{36}", "gho_{36}", "ghu_{36}", "ghs_{36}", "ghr_{36}", "github_pat_{22}_{59}"],
    "a GitLab token": ["glpat-{20}"],
    "a key of Anthropic": ["sk-ant-api03-{93 URL_SAFE}AA"],
    "a key of OpenRouter": ["sk-or-v1-{64 HEX}"],
    "an API key": ["sk-{48}", "sk-proj-{74 URL_SAFE}T3BlbkFJ{74 URL_SAFE}", "sk-{32 HEX}"],
    "a token of Hugging Face": ["hf_{34}"],
    "a key of Groq": ["gsk_{52}"],
    "a key of xAI": ["xai-{80}"],
    "a key of Perplexity": ["pplx-{48}"],
    "a token of Replicate": ["r8_{37}"],
    "a key of LangSmith": ["lsv2_pt_{32 HEX}_{10 HEX}"],
    "a Google key": ["AIza{35 URL_SAFE}"],
    "a Google credential": ["ya29.{60}", "GOCSPX-{28}"],
    "an AWS key": ["AKIA{16 CAPITALS}", "ASIA{16 CAPITALS}"],
    "a Slack token": [
        "xoxb-{12 DIGITS}-{24}",
        "xoxp-{12 DIGITS}-{12 DIGITS}-{32 HEX}",
        "xapp-1-A{10}-{13 DIGITS}-{64 HEX}",
    ],
    "a Slack hook": ["https://hooks.slack.com/services/T{8 CAPITALS}/B{8 CAPITALS}/{24}"],
    "a Discord hook": ["https://discord.com/api/webhooks/{18 DIGITS}/{68 URL_SAFE}"],
    "a Teams hook": [
        f"https://a.webhook.office.com/webhookb2/{UUID_FORM}@{UUID_FORM}/IncomingWebhook/{{32 HEX}}/{UUID_FORM}"
    ],
    "a Discord token": ["M{23}.{6}.{27}"],
    "a Telegram token": ["{10 DIGITS}:AA{33 URL_SAFE}"],
    "a Stripe key": ["sk_live_{24}", "rk_live_{24}", "whsec_{32}"],
    "a token of a package index": ["npm_{36}", "pypi-AgEIcHlwaS5vcmc{60}", "dckr_pat_{27}"],
    "a SendGrid key": ["SG.{22}.{43}"],
    "a Brevo key": ["xkeysib-{64 HEX}-{16}"],
    "a Twilio key": ["SK{32 HEX}"],
    "a Mailgun key": ["key-{32 HEX}"],
    "a Shopify token": ["shpat_{32 HEX}"],
    "a Sentry token": ["sntryu_{64 HEX}"],
    "a Databricks token": ["dapi{32 HEX}"],
    "a HashiCorp token": ["hvs.{90}"],
    "a Terraform token": ["{14}.atlasv1.{67}"],
    "a Doppler token": ["dp.pt.{43}"],
    "a DigitalOcean token": ["dop_v1_{64 HEX}"],
    "a Linear key": ["lin_api_{40}"],
    "a Notion token": ["ntn_{46}", "secret_{43}"],
    "an Airtable token": ["pat{14}.{64 HEX}"],
    "a Figma token": ["figd_{40}"],
    "a Postman key": ["PMAK-{24 HEX}-{34 HEX}"],
    "a PlanetScale password": ["pscale_pw_{43}"],
    "a Grafana token": ["glsa_{32}_{8 HEX}"],
    "a New Relic key": ["NRAK-{27}"],
    "a Square token": ["sq0csp-{43}"],
    "a Facebook token": ["EAA{120}"],
    "a Supabase token": ["sbp_{40 HEX}"],
    "a token of a host of websites": ["nfp_{36}", "vcp_{56}"],
    "an age key": ["AGE-SECRET-KEY-1{58 CAPITALS}"],
    "an Azure key": ["AccountKey={86}=="],
    "an Azure secret": ["{3}8Q~{34}"],
    "a JWT": ["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiI{12}.{43}"],
    "a private key": [
        f"-----BEGIN {each} KEY{end}-----\n{{64 BASE64}}"
        for each, end in (("RSA PRIVATE", ""), ("OPENSSH PRIVATE", ""), ("PRIVATE", ""), ("PGP PRIVATE", " BLOCK"))
    ],
    "the password of a URL": [
        "postgres://app:{16}@db.internal/x",
        "redis://:{20}@cache:6379/0",
        "mysql://a:{9 SMALL}@db",
    ],
    "the key of a URL": ["https://{32 HEX}@o1.ingest.sentry.io/42"],
    "a parameter of an address": ["https://a.blob.core.windows.net/c?sv=2022-11-02&sig={43}%3D"],
    "a bearer token": ["Bearer {32}", "Authorization: bearer {40 HEX}", "FlyV1 fm3_{60}"],
    "a cookie": ["Set-Cookie: sid={32}; Path=/"],
    "a value that is named as a secret": [
        "aws_secret_access_key = {40 BASE64}",
        '{"private_key_id": "{40 HEX}"}',
        f"//registry.example.net/:_authToken={UUID_FORM}",
        f"HEROKU_API_KEY={UUID_FORM}",
        "export CLOUDFLARE_API_TOKEN={40}",
    ],
}
SECRETS = [
    pytest.param(made(form), kind, id=form.partition("\n")[0]) for kind, forms in FORMS.items() for form in forms
]
HARMLESS = [
    "Bearer token-authentication is described in RFC 6750.",
    "Send the header Authorization: Bearer YOUR_API_KEY with each request.",
    "Authorization: Bearer <your-access-token-goes-here>",
    "Authorization: Bearer $OPENAI_API_KEY_OF_THE_TEAM",
    "Basic authentication-and-authorization comes first.",
    "Basic dXNlcjpwYXNzd29yZA== is user:password.",
    "pip install sk-learn-contrib-package-name-with-extras",
    "sk-learn-0.24.1-cp39-cp39-manylinux2014_x86_64.whl",
    "Use sk-... as the key.",
    "OPENAI_API_KEY=sk-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    "OPENAI_API_KEY=sk-your-api-key-goes-here-please",
    "sk-ant-api03-placeholder-for-your-own-key",
    "The example of AWS is AKIAIOSFODNN7EXAMPLE.",
    "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "ghp_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    "ghp_1234567890abcdefghijklmnopqrstuvwxyz",
    "Tokens of GitHub begin with ghp_, gho_ or github_pat_.",
    "huggingface: hf_hub_download_with_resume_and_retries(repo)",
    "hf_your_token_here_from_the_settings",
    "hf_abcdefghijklmnopqrstuvwxyzabcdef",
    "secret_santa_list_of_all_employees_2024",
    "npm_config_registry_and_npm_lifecycle_event",
    "The risk-management-committee-of-the-board met.",
    "desk-lamp-with-a-very-long-name-2024-edition",
    "key-value-store-implementation-in-rust-v2",
    "pattern_matching_in_python_3_12.examples",
    "The commit is {40 HEX}.",
    "sha256:{64 HEX}",
    '{"digest": "sha256-{64 HEX}", "size": 1234}',
    '{"id": "chatcmpl-{29}", "object": "chat.completion"}',
    '{"id": "call_{24}", "type": "function"}',
    '{"id": "resp_{48 HEX}", "previous_response_id": null}',
    f'{{"id": "{UUID_FORM}"}}',
    f"trace 00-{{32 HEX}}-{{16 HEX}}-01 of request {UUID_FORM}",
    '{"system_fingerprint": "fp_{10 HEX}"}',
    '{"signature": "{344 BASE64}=="}',
    '{"encrypted_content": "gAAAAAB{200 URL_SAFE}"}',
    '{"images": ["iVBORw0KGgoAAAANSUhEUg{4000 BASE64}=="]}',
    '{"embedding": "{4096 BASE64}"}',
    "data:image/jpeg;base64,/9j/4AAQSkZJRgABAQ{3000 BASE64}",
    '{"next_page_token": "{64 URL_SAFE}"}',
    '{"continuation_token": "{64 URL_SAFE}"}',
    '{"token": " Wednesday", "logprob": -0.000123456789}',
    '{"prompt_cache_key": "conversation-of-the-team-17"}',
    '{"max_tokens": 16384, "eos_token": "<|end_of_text|>"}',
    "A password must have at least sixteen-characters-and-digits.",
    "api_key = ReadTheKeyFromTheSettingsOfTheBuild()",
    "password: correct-horse-battery-staple",
    "The secret: Llama-3.2-1B-Instruct-Q4_K_M.gguf is small.",
    "api_key: ${SECRETS_OF_THE_BUILD_SERVER_V2}",
    "token = os.environ['SERVICE_TOKEN_FOR_TESTS_V2']",
    "api_key=settings.OPENAI_API_KEY2.get_secret_value()",
    "http://user@host.example/path/to/a/file",
    "postgres://user:password@localhost:5432/db",
    "postgresql://postgres:postgres@db/app and mysql://root:changeme@db",
    "https://<user>:<password>@host and ftp://${USER}:${PASS}@host",
    "mail me@example.com, or see http://localhost:11434/api:chat",
    "https://hooks.slack.com/services/T00000000/B00000000/XXXXXXXXXXXXXXXXXXXXXXXX",
    "A key file begins with `-----BEGIN PRIVATE KEY-----`.",
    "-----BEGIN CERTIFICATE-----\n{64 BASE64}\n-----BEGIN PUBLIC KEY-----\n{64 BASE64}",
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI{43 BASE64} me@host",
    "hf.co/bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M and Qwen2.5-Coder-7B-Instruct-AWQ-Int4",
    "The JWT has three parts: eyJ..., a payload and a signature.",
    "C:\\Users\\me\\AppData\\Local\\Programs\\Python\\Python312\\python.exe",
    "0x{40 HEX} is the address of a contract",
]


def found_in(text: str, place: str = "request body", **more: Any) -> list[str]:
    return [each.kind for each in find_secrets([(place, text)], {}, **more)]


WAYS: dict[str, Callable[[str], str]] = {
    "plain": lambda text: f"mine is {text} now",
    "json": lambda text: json.dumps({"messages": [{"content": json.dumps({"note": text})}]}),
    "lines": lambda text: "\n".join(json.dumps({"delta": f"{each}"}) for each in text),
    "url": lambda text: urllib.parse.quote(text, safe=""),
    "base64": lambda text: base64.b64encode(f"see {text} .".encode()).decode(),
}


class TestShapes:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize(("secret", "kind"), SECRETS)
    def test_published_form_is_found(self, secret: str, kind: str, way: str) -> None:
        assert kind in found_in(WAYS[way](secret))

    @pytest.mark.parametrize("form", ["Authorization: Basic {}", '{{"auths": {{"index": {{"auth": "{}"}}}}}}'])
    def test_login_in_base64_is_found(self, form: str) -> None:
        assert found_in(form.format(base64.b64encode(made("bob:{16}").encode()).decode())) == ["a login"]

    @pytest.mark.parametrize("form", HARMLESS)
    def test_harmless_text_is_not(self, form: str) -> None:
        assert found_in(made(form)) == []

    def test_name_of_a_field_says_secret(self) -> None:
        (found,) = find_secrets([("request body", json.dumps({"login": {"api_key": made("{32}")}}))], {})
        assert (found.place, found.kind) == ("request body, `login.api_key`", "a value that is named as a secret")

    def test_kept_cookie_is_found(self) -> None:
        assert found_in(made("sid={32}; Path=/"), "response header `set-cookie`") == ["a cookie"]

    @pytest.mark.parametrize(
        ("path", "kinds"),
        [
            ("/v1/{24}/chat/completions", ["a token in an address"]),
            ("/v1/chat?x={24}", ["a token in an address"]),
            ("/api/blobs/sha256:{64 HEX}", []),
            ("/v1/files/file-{24}/content", []),
            (f"/v1/jobs/{UUID_FORM}", []),
            ("/models/bartowski/Llama-3.2-1B-Instruct-GGUF/resolve/main/Llama-3.2-1B-Q4_K_M.gguf", []),
        ],
    )
    def test_tokens_in_addresses(self, path: str, kinds: list[str]) -> None:
        assert found_in(made(f"https://api.example.com{path}"), "interaction 1, address") == kinds

    def test_each_place_of_a_secret_is_named(self) -> None:
        secret = made("hf_{34}")
        texts = [("request body", f"1 {secret}"), ("response body", json.dumps({"a": secret, "b": [secret]}))]
        places = [each.place for each in find_secrets(texts, {})]
        assert places == ["request body", "response body, `a`", "response body, `b`"]


class TestEnvironment:
    @pytest.mark.parametrize(
        "name",
        [
            "KEY",
            "API_KEY",
            "github_token",
            "DB_PASS",
            "PGPASSWORD",
            "MYSQL_PWD",
            "PAT",
            "MY_CREDS",
            "SMTP_AUTH",
            "KEY2",
        ],
    )
    def test_names_as_words(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        value = made("{12}")
        monkeypatch.setenv(name, value)
        assert found_in(f"it is {value}.") == [f"the value of the environment variable `{name}`"]

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("KEYBOARD_LAYOUT", "de-latin1-nodeadkeys"),
            ("TOKENIZERS_PARALLELISM", "completely-false"),
            ("COMPASS_HEADING", "north-by-northwest"),
            ("AUTHOR", "Ada Lovelace 1815"),
            ("PATH_OF_MONKEYS", "gibbon7gibbon7"),
            ("SSH_AUTH_SOCK", "/tmp/ssh-1234/agent.5678"),
            ("PWD", "/home/ada/projects"),
            ("API_KEY", "short7"),
            ("AUTH", "service-account"),
            ("DB_PASSWORD", "postgres"),
            ("TOKEN_URL", "https://login.example.com/oauth2/token"),
            ("DB_DSN", "postgres://user:password123@localhost/app"),
        ],
    )
    def test_harmless_variables(self, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
        monkeypatch.setenv(name, value)
        assert found_in(f"it is {value} or password.") == []

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("DATABASE_URL", "postgres://app:{}@db/app"),
            ("HTTPS_PROXY", "http://me:{}@proxy:3128"),
            ("DB_DSN", "host=db user=app password={} sslmode=require"),
            ("SENTRY_DSN", "https://{}@errors.example.com/42"),
            ("CHAT_WEBHOOK", "https://hooks.example.com/services/{}"),
        ],
    )
    def test_secret_inside_a_value(self, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
        secret = made("{24}")
        monkeypatch.setenv(name, value.format(secret))
        assert found_in(f"it is {secret}.") == [f"the value of the environment variable `{name}`"]


class TestHeaders:
    @pytest.mark.parametrize(
        "name",
        [
            "accept-token",
            "accept-key",
            "x-stainless-key",
            "range",
            "traceparent",
            "user-agent",
            "content-type",
            "accept",
        ],
    )
    def test_any_name_may_hold_a_secret(self, name: str) -> None:
        secret = made("{32 HEX}")
        assert [value for value, _ in secrets_of(((name, secret),))] == [secret]

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("accept", "application/json, text/event-stream;q=0.9, */*"),
            ("accept-encoding", "gzip, deflate, br, zstd"),
            ("accept-language", "de-AT, en;q=0.5"),
            ("content-type", "multipart/form-data; boundary=0123456789abcdef0123456789abcdef"),
            ("user-agent", "graftage/0.2.0"),
            ("user-agent", "OpenAI/Python 1.99.1"),
            ("user-agent", "python-httpx/0.28.1"),
            ("user-agent", "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"),
            ("x-stainless-runtime", "CPython"),
            ("x-stainless-arch", "arm64"),
            ("x-stainless-async", "async:asyncio"),
            ("range", "bytes=1000000-"),
            ("traceparent", "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"),
            ("anthropic-version", "2023-06-01"),
            ("if-modified-since", "Sat, 28 Nov 2026 05:39:11 GMT"),
            ("host", "127.0.0.1:11434"),
            ("connection", "keep-alive"),
            ("content-length", "1234567"),
        ],
    )
    def test_values_of_libraries_are_harmless(self, name: str, value: str) -> None:
        assert list(secrets_of(((name, value),))) == []


class TestAllowed:
    SECRET = made("hf_{34}")
    TEXTS: Final = [("interaction 2, request body", json.dumps({"a": SECRET}))]

    @pytest.mark.parametrize(
        "allowed",
        [
            Allowed.of(SECRET, why="made for tests"),
            Allowed(place="request body, `a`", why="made for tests"),
            Allowed(place="interaction 2, request body, `a`", why="made for tests"),
        ],
    )
    def test_value_or_place(self, allowed: Allowed) -> None:
        assert list(find_secrets(self.TEXTS, {}, [allowed])) == []

    @pytest.mark.parametrize(
        "allowed",
        [
            Allowed.of("another", why="made for tests"),
            Allowed(place="request body", why="made for tests"),
            Allowed(place="interaction 1, request body, `a`", why="made for tests"),
        ],
    )
    def test_others_stay_refused(self, allowed: Allowed) -> None:
        (found,) = find_secrets(self.TEXTS, {}, [allowed])
        assert found.place == "interaction 2, request body, `a`"

    @pytest.mark.parametrize("wrong", [{"why": ""}, {"why": "x"}, {"why": "x", "sha256": "a", "place": "b"}])
    def test_needs_a_reason_and_one_target(self, wrong: dict[str, str]) -> None:
        with pytest.raises(ValueError, match="must have a reason"):
            Allowed(**wrong)


CASSETTES = sorted((Path(__file__).parents[2] / "cassettes").rglob("*.yaml"))


@pytest.mark.parametrize("path", CASSETTES, ids=lambda path: path.name)
def test_own_cassettes_hold_no_secret(path: Path) -> None:
    for number, each in enumerate(CassetteFile.read(path), 1):
        texts = [(f"interaction {number}, {place}", text) for place, text in texts_of(each)]
        assert list(find_secrets(texts, {})) == []
