"""The server's official client on Graftage's connections, and its objects as arguments of `chat`."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Literal

import httpx
import httpx2
import ollama
import pytest
from pydantic import BaseModel, ConfigDict
from test_secrets import Detour

from graftage.exceptions import (
    CapabilityUnsupported,
    ConnectionFailed,
    GraftageError,
    ProtocolError,
    ProviderTimeout,
    RequestRejected,
    StreamInterrupted,
)
from graftage.hookspecs import hookimpl
from graftage.testing import Cassette, Echo
from graftage.types import Chunk, Timeouts
from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from pathlib import Path

    from graftage.calls import ChatRequest, NativeRequest
    from graftage.hookspecs import ConnectRequest
    from graftage.testing.both import Both

MODEL = "smollm2:135m"
HI = [{"role": "user", "content": "Hi"}]
KEY = "opaque-key-1"
PNG = b"\x89PNG\r\n\x1a\n a picture"
SHORT = Timeouts(connect=5.0, first_token=0.3, idle=0.3, total=1.0)


@pytest.fixture
def llm(both: Both, fake: FakeOllama) -> Any:
    return both.connect("ollama", model=MODEL, host=fake.url, api_key=KEY)


@pytest.fixture
def official(both: Both, llm: Any) -> Any:
    return both.native(llm)


class Sdk:
    """A provider with an SDK that follows redirects, uses proxies and has its own key."""

    name = "sdk"

    def __init__(self, library: Any) -> None:
        self._library = library

    @hookimpl
    def connect(self, request: ConnectRequest) -> object:
        return _Connection(request, self._library)


class _Connection:
    def __init__(self, request: ConnectRequest, library: Any) -> None:
        self._http = request.http(request.settings.host or "")
        self._library = library

    @hookimpl
    async def chat(self, request: ChatRequest) -> Any:
        yield Chunk(text="Hi", finish_reason="stop")

    @hookimpl
    def native(self, request: NativeRequest) -> object:
        transport: Any = self._http.httpx_transport()
        kind = self._library.Client if self._http.colour == "sync" else self._library.AsyncClient
        headers = {"x-api-key": "the-sdk's", "x-sdk": "1"}
        return kind(base_url=self._http.base_url, transport=transport, headers=headers, follow_redirects=True)


def sdk(both: Both, fake: FakeOllama, library: Any = httpx, **settings: Any) -> Any:
    return both.native(both.connect(Sdk(library), host=fake.url, **settings))


WEB: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "web_search": (("graftage",), {"results": [{"title": "T", "url": "https://a.example", "content": "C"}]}),
    "web_fetch": (("https://a.example",), {"title": "T", "content": "C", "links": []}),
}


class TestOfficialClient:
    def test_chats_embeds_and_lists(self, official: Any, fake: FakeOllama) -> None:
        assert [each.model for each in official.list().models] == [MODEL]
        assert official.chat(MODEL, HI).message.content == fake.reply
        assert official.embed(MODEL, "Hi").embeddings == [[2.0, 1.0, 0.0, 0.0]]
        assert {seen.headers["authorization"] for seen in fake.requests} == {f"Bearer {KEY}"}
        assert {seen.headers["user-agent"].partition("/")[0] for seen in fake.requests} == {"ollama-python"}

    def test_streams(self, official: Any, fake: FakeOllama) -> None:
        texts = [part.message.content for part in official.chat(MODEL, HI, stream=True)]
        assert len(texts) > 2
        assert "".join(texts) == fake.reply

    def test_uploads_files(self, official: Any, fake: FakeOllama, tmp_path: Path) -> None:
        file = tmp_path / "model.gguf"
        file.write_bytes(b"GGUF" * 50_000)
        digest = official.create_blob(file)
        assert digest == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
        assert fake.blobs[digest] == file.read_bytes()

    def test_takes_context_and_template(self, official: Any, fake: FakeOllama) -> None:
        first = official.generate(MODEL, "Say hello", template="{{ .Prompt }}!")
        assert (first.response, first.context) == (fake.reply, [0, 1])
        *_, last = official.generate(MODEL, "Again", context=first.context, stream=True)
        assert last.context == [0, 1, 0]
        sent = [seen.body for seen in fake.requests]
        assert [(each.get("template"), each.get("context")) for each in sent] == [
            ("{{ .Prompt }}!", None),
            (None, [0, 1]),
        ]

    def test_copies_creates_and_deletes_models(self, official: Any, fake: FakeOllama) -> None:
        assert official.copy(MODEL, "copy:1").status == "success"
        assert official.create("pirate:1", from_=MODEL, system="Ahoy!").status == "success"
        assert fake.derived == {"copy:1": {"from": MODEL}, "pirate:1": fake.requests[-1].body | {"from": MODEL}}
        assert official.show("pirate:1").modelfile
        assert [official.delete(name).status for name in ("copy:1", "pirate:1")] == ["success", "success"]
        assert fake.models == [MODEL]

    @pytest.mark.parametrize("insecure", [False, True])
    @pytest.mark.parametrize("what", ["pull", "push"])
    def test_pulls_and_pushes(self, official: Any, fake: FakeOllama, what: str, insecure: bool) -> None:
        move = getattr(official, what)
        assert move(MODEL, insecure=insecure).status == "success"
        steps = [step.status for step in move(MODEL, insecure=insecure, stream=True)]
        assert (len(steps) > 3, steps[-1]) == (True, "success")
        assert [(seen.path, seen.body["insecure"]) for seen in fake.requests] == [(f"/api/{what}", insecure)] * 2

    @pytest.mark.parametrize("what", WEB)
    def test_web_search_needs_its_own_host(self, both: Both, official: Any, fake: FakeOllama, what: str) -> None:
        arguments, answer = WEB[what]
        with pytest.raises(
            httpx.LocalProtocolError, match=r"ollama.com.* was refused.*is only for http://127"
        ) as caught:
            getattr(official, what)(*arguments)
        assert isinstance(caught.value.__cause__, RequestRejected)
        assert fake.accepted == 0
        fake.script(f"/api/{what}", Answer([answer]))
        searching = both.native(both.connect("ollama", host="https://ollama.com", api_key=KEY, transport=Detour(fake)))
        assert getattr(searching, what)(*arguments).model_dump(exclude_none=True) == answer
        assert fake.requests[-1].headers["authorization"] == f"Bearer {KEY}"

    def test_raises_its_own_errors(self, both: Both, official: Any, fake: FakeOllama) -> None:
        with pytest.raises(ollama.ResponseError, match="not found") as caught:
            official.chat("smollm2:136m", HI)
        assert caught.value.status_code == 404
        with pytest.raises(ConnectionError) as refused:
            both.native(both.connect("ollama", host="127.0.0.1:1")).list()
        assert isinstance(refused.value.__context__, httpx.ConnectError)
        assert isinstance(refused.value.__context__.__cause__, ConnectionFailed)
        assert len(fake.requests) == 1

    def test_errors_hide_a_repeated_key(self, official: Any, fake: FakeOllama) -> None:
        fake.script("/api/tags", Answer([{"error": f"no access with {KEY}"}], status=401))
        with pytest.raises(ollama.ResponseError, match="no access with") as caught:
            official.list()
        assert KEY not in str(caught.value)

    def test_is_recorded_and_replayed(self, both: Both, fake: FakeOllama, tmp_path: Path) -> None:
        path = tmp_path / "native.yaml"

        def story(mode: Literal["none", "all"]) -> tuple[Any, list[Any]]:
            with Cassette(path, mode=mode) as cassette:
                official = both.native(both.connect("ollama", host=fake.url, transport=cassette))
                return official.list(), list(official.chat(MODEL, HI, stream=True))

        live = story("all")
        sent = len(fake.requests)
        assert story("none") == live
        assert len(fake.requests) == sent

    def test_closes_with_the_client(self, official: Any, llm: Any, fake: FakeOllama) -> None:
        llm.close()
        with pytest.raises(ConnectionError):
            official.list()
        assert fake.requests == []

    def test_shares_the_connections(self, official: Any, llm: Any, fake: FakeOllama) -> None:
        llm.chat("Hi")
        official.list()
        both_clients = official.show(MODEL)
        assert both_clients.modelinfo
        assert fake.accepted == 1

    def test_import_ignores_the_environment(self, fake: FakeOllama) -> None:
        odd = {
            "OLLAMA_HOST": "http://[::1",
            "OLLAMA_API_KEY": "schlüssel",
            "SSL_CERT_FILE": "/no/such",
            "ALL_PROXY": "a://b",
        }
        source = f"""
import graftage, os
with graftage.connect("ollama", host={fake.url!r}, api_key="k") as llm:
    print(len(llm.native().list().models), os.environ["OLLAMA_HOST"])
"""
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env={**os.environ, **odd})  # noqa: PLW1510
        assert (done.stdout.split(), done.stderr) == (["1", odd["OLLAMA_HOST"]], "")


class TestFeature:
    def test_absent_without_a_native_client(self, both: Both) -> None:
        llm = both.opened(Echo())
        assert "native" not in llm.capabilities().features
        with pytest.raises(CapabilityUnsupported):
            llm.native()

    def test_declared_with_one(self, both: Both, fake: FakeOllama) -> None:
        assert "native" in both.opened("ollama", host=fake.url).capabilities().features


FAULTS: dict[str, tuple[Answer, str, type[GraftageError]]] = {
    "closed at once": (Answer(raw=b"", ending="close"), "ConnectError", ConnectionFailed),
    "another protocol": (Answer(raw=b"SSH-2.0\r\n\r\n", ending="close"), "RemoteProtocolError", ProtocolError),
    "a web page": (Answer([b"<p>"], headers={"content-type": "text/html"}), "RemoteProtocolError", ProtocolError),
    "compressed": (Answer([b"x"], headers={"content-encoding": "gzip"}), "RemoteProtocolError", ProtocolError),
    "cut": (Answer([b"x"], ending="close"), "RemoteProtocolError", StreamInterrupted),
    "too large": (Answer([b"x" * 999] * 9), "RemoteProtocolError", ProtocolError),
    "silent": (Answer(raw=b"", ending="stall"), "ReadTimeout", ProviderTimeout),
    "silent half-way": (Answer([b"x"], ending="stall"), "ReadTimeout", ProviderTimeout),
    "dripping": (Answer([b"x"] * 999, delay=0.05), "ReadTimeout", ProviderTimeout),
}


class TestAnySdk:
    """What holds for every SDK that sends through the connection."""

    @pytest.mark.parametrize("library", [httpx, httpx2])
    @pytest.mark.parametrize("fault", FAULTS)
    def test_faults_are_its_own_errors_with_cause(self, both: Both, fake: FakeOllama, fault: str, library: Any) -> None:
        answer, kind, cause = FAULTS[fault]
        fake.script("/x", answer)
        slow = kind == "ReadTimeout"
        client = sdk(both, fake, library, max_reply_bytes=5000, **({"timeouts": SHORT} if slow else {}))
        with pytest.raises(getattr(library, kind)) as caught:
            client.get("/x")
        assert type(caught.value.__cause__) is cause
        assert len(fake.requests) == 1

    @pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
    def test_error_statuses_are_passed_on(self, both: Both, fake: FakeOllama, status: int) -> None:
        fake.script(
            "/x", Answer([b"no"], status=status, headers={"content-type": "text/html", "content-encoding": "gzip"})
        )
        response = sdk(both, fake).post("/x", json={"a": 1})
        assert (response.status_code, response.text) == (status, "no")

    def test_redirects_are_not_followed(self, both: Both, fake: FakeOllama) -> None:
        with FakeOllama() as other:
            fake.script("/x", Answer(status=307, framing="length", headers={"location": f"{other.url}/x"}))
            with pytest.raises(httpx.RemoteProtocolError, match="redirects are not followed"):
                sdk(both, fake).post("/x", json={"a": "secret"})
            assert (len(fake.requests), other.requests) == (1, [])

    def test_other_servers_are_refused(self, both: Both, fake: FakeOllama) -> None:
        with FakeOllama() as other:
            with pytest.raises(httpx.LocalProtocolError) as caught:
                sdk(both, fake, api_key=KEY).get(f"{other.url}/x")
            assert isinstance(caught.value.__cause__, RequestRejected)
            assert (fake.accepted, other.accepted) == (0, 0)

    @pytest.mark.parametrize("library", [httpx, httpx2])
    def test_keys_of_the_sdk_are_dropped(self, both: Both, fake: FakeOllama, library: Any) -> None:
        client = sdk(both, fake, library, api_key=KEY)
        client.get("/api/tags", headers={"authorization": "Bearer the-sdk's", "cookie": "a=b"})
        (seen,) = fake.requests
        assert seen.headers["authorization"] == f"Bearer {KEY}"
        assert seen.headers["x-sdk"] == "1"
        assert not {"x-api-key", "cookie"} & seen.headers.keys()
        assert seen.headers["accept-encoding"] == "identity"


TOOL = ollama.Tool(
    function=ollama.Tool.Function(
        name="weather",
        description="The weather in a city.",
        parameters=ollama.Tool.Function.Parameters.model_validate(
            {
                "required": ["city"],
                "properties": {"city": {"type": "string", "description": "its name"}},
                "$defs": {"A": {"type": "string"}},
            }
        ),
    )
)
CALL = ollama.Message.ToolCall(
    function=ollama.Message.ToolCall.Function(name="weather", arguments={"city": "Delft", "unit": None})
)
SEES = Answer([{"capabilities": ["completion", "tools", "vision"], "details": {}, "model_info": {}}])
"""A server's facts about a model that takes images."""
CONVERSATION = [
    ollama.Message(role="system", content="Be brief."),
    ollama.Message(role="user", content="What is it?", images=[ollama.Image(value=PNG)]),
    ollama.Message(role="assistant", content="A tree.", thinking="Green."),
    ollama.Message(role="assistant", content="I ask.", tool_calls=[CALL]),
    ollama.Message(role="tool", content="rain", tool_name="weather"),
]


class Loose(BaseModel):
    model_config = ConfigDict(extra="allow")
    role: str = "user"


class TestInputs:
    """Objects of the official client as arguments of ours."""

    def test_are_sent_as_it_sends_them(self, official: Any, llm: Any, fake: FakeOllama) -> None:
        options = ollama.Options(temperature=0.5, top_k=3, stop=["."])
        theirs = official.chat(MODEL, CONVERSATION, tools=[TOOL], options=options)
        fake.script("/api/show", SEES)
        ours = llm.chat(CONVERSATION, tools=[TOOL], options=options)
        assert ours.text == theirs.message.content
        wanted, sent = (seen.body for seen in fake.requests if seen.path == "/api/chat")
        for message in sent["messages"]:
            for call in message.get("tool_calls", ()):
                del call["id"]  # The official client sends no ids.
            message.pop("tool_call_id", None)
        assert sent["messages"] == wanted["messages"]
        assert sent["tools"] == wanted["tools"]
        assert sent["options"] == wanted["options"]

    def test_reply_becomes_history(self, official: Any, llm: Any, fake: FakeOllama) -> None:
        reply = official.chat(MODEL, HI)
        llm.chat([*HI, reply.message, ollama.Message(role="user", content="More")])
        assert fake.requests[-1].body["messages"][1] == {"role": "assistant", "content": fake.reply}

    def test_single_message_is_a_conversation(self, llm: Any, fake: FakeOllama) -> None:
        llm.chat(ollama.Message(role="user", content="Hi"))
        assert fake.requests[-1].body["messages"] == HI

    def test_option_with_a_parameter_is_refused(self, llm: Any, fake: FakeOllama) -> None:
        with pytest.raises(RequestRejected, match="`context_window`"):
            llm.chat("Hi", options=ollama.Options(num_ctx=4096))
        assert fake.requests == []

    def test_unknown_key_gets_the_nearest_name(self, llm: Any, fake: FakeOllama) -> None:
        with pytest.raises(RequestRejected, match="Did you mean `content`"):
            llm.chat(Loose.model_validate({"contnet": "Hi"}))
        assert fake.requests == []

    def test_untrusted_message_reads_no_file(self, llm: Any, fake: FakeOllama, tmp_path: Path) -> None:
        file = tmp_path / "private.png"
        file.write_bytes(PNG)
        outside = ollama.Message.model_validate({"role": "user", "content": "Hi", "images": [{"value": str(file)}]})
        with pytest.raises(RequestRejected, match="never a path"):
            llm.chat(outside)
        with pytest.raises(RequestRejected):
            llm.chat(Loose.model_validate({"content": "Hi", "images": [str(file)]}))
        assert fake.requests == []

    def test_image_of_the_host_is_read(self, llm: Any, fake: FakeOllama, tmp_path: Path) -> None:
        file = tmp_path / "tree.png"
        file.write_bytes(PNG)
        fake.script("/api/show", SEES)
        llm.chat(ollama.Message(role="user", content="Hi", images=[ollama.Image(value=file)]))
        llm.chat("Hi", images=[ollama.Image(value=str(file))])
        first, second = (each.body["messages"][0]["images"] for each in fake.requests if each.path == "/api/chat")
        assert first == second == [ollama.Image(value=PNG).model_dump()]
