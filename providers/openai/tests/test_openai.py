"""What the provider sends to each server, how it recognises them, and what it refuses before sending."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pytest

import graftage_openai
from graftage.calls import Call, ChatRequest
from graftage.exceptions import (
    AuthenticationFailed,
    CapabilityUnsupported,
    ModelNotFound,
    RequestRejected,
    SettingsError,
)
from graftage.hookspecs import AnswersRequest
from graftage.types import Image, Message, Tool, ToolCall
from graftage_ollama.testing import Answer, FakeOllama
from graftage_openai._convert import Learned, chat_body
from graftage_openai._profiles import PROFILES, UNKNOWN, OpenAISettings, Profile, parse_host

if TYPE_CHECKING:
    from collections.abc import Callable

CHAT, COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
STRICT = {**CITY, "additionalProperties": False}
TOOLS = (Tool(name="weather", parameters=CITY), Tool(name="clock"))
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def connect(both: Any, fake: FakeOllama) -> Callable[..., Any]:
    return lambda **given: both.connect("openai", **{"model": "m", "host": fake.url, "attempts": 1, **given})


def as_json(body: Any, status: int = 200, **headers: Any) -> Answer:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Answer([data], status=status, headers={"content-type": "application/json", **headers})


def streamed(**delta: Any) -> Answer:
    parts: list[Any] = [{"delta": delta}, {"delta": {}, "finish_reason": "stop"}]
    events = [f"data: {json.dumps({'model': 'm', 'choices': [each]})}\n\n".encode() for each in parts]
    return Answer([*events, b"data: [DONE]\n\n"], headers={"content-type": "text/event-stream"})


def listed(*models: dict[str, Any], **headers: Any) -> Answer:
    return as_json({"object": "list", "data": list(models)}, **headers)


def body(profile: Profile | str = UNKNOWN, *messages: Message, **asked: Any) -> dict[str, Any]:
    """Return what is sent for a chat."""
    settled = PROFILES[profile] if isinstance(profile, str) else profile
    request = ChatRequest(call=Call(), model="m", messages=messages or (Message(role="user", content="Hi"),), **asked)
    return chat_body(request, settled, Learned())


HOSTS = {
    None: ("https://api.openai.com", "/v1"),
    "127.0.0.1:8081": ("http://127.0.0.1:8081", "/v1"),
    "localhost": ("http://localhost", "/v1"),
    "[::1]:8080": ("http://[::1]:8080", "/v1"),
    "gpu-box:8000": ("http://gpu-box:8000", "/v1"),
    "api.groq.com/openai/v1": ("https://api.groq.com/openai", "/v1"),
    " 'http://127.0.0.1:1234/v1/' ": ("http://127.0.0.1:1234", "/v1"),
    "http://127.0.0.1:1234/v1/chat/completions": ("http://127.0.0.1:1234", "/v1"),
    "https://openrouter.ai/api/v1": ("https://openrouter.ai/api", "/v1"),
    "https://gemini.invalid/v1beta/openai": ("https://gemini.invalid", "/v1beta/openai"),
    "http+unix://%2Frun%2Fllama.sock": ("http+unix://%2Frun%2Fllama.sock", "/v1"),
}


class TestAddress:
    @pytest.mark.parametrize("host", HOSTS)
    def test_is_read_in_many_forms(self, host: str | None) -> None:
        assert parse_host(host) == HOSTS[host]

    @pytest.mark.parametrize("host", ["ftp://127.0.0.1", "http://127.0.0.1:1234/v1?key=sesame", "http://"])
    def test_unusable_one_is_a_settings_error(self, connect: Any, host: str) -> None:
        with pytest.raises(SettingsError) as caught:
            connect(host=host).chat("Hi")
        assert "sesame" not in str(caught.value)

    @pytest.mark.parametrize(
        ("host", "given", "rank"),
        [
            (None, (), None),
            ("127.0.0.1:8081", (), 15),
            ("http://localhost:1234/v1", ("host",), 15),
            ("https://api.groq.com/openai/v1", (), None),
            ("https://api.groq.com/openai/v1", ("host",), 15),
        ],
    )
    def test_only_a_named_server_has_a_rank(self, host: str | None, given: tuple[str, ...], rank: int | None) -> None:
        asked = AnswersRequest(name="openai", settings=OpenAISettings(host=host), given=frozenset(given))
        assert graftage_openai.answers(asked) == rank

    def test_scan_stays_on_this_machine(self) -> None:
        addresses = graftage_openai.local_addresses()
        assert {"http://127.0.0.1:1234/v1", "http://127.0.0.1:8081/v1"} <= {*addresses}
        assert all(each.startswith("http://127.0.0.1:") for each in addresses)
        assert not any("11434" in each for each in addresses)


BODIES: dict[str, tuple[str | Profile, dict[str, Any], dict[str, Any]]] = {
    "limit": (UNKNOWN, {"max_tokens": 5}, {"max_tokens": 5}),
    "limit of OpenAI": ("openai", {"max_tokens": 5}, {"max_completion_tokens": 5}),
    "huge limit": ("llama-server", {"max_tokens": 2**40}, {"max_tokens": 2**31 - 1}),
    "stream": ("mlx", {}, {"stream": True, "stream_options": {"include_usage": True}}),
    "names of options": (
        "mlx",
        {"options": {"repeat_penalty": 1.5, "repeat_last_n": 9, "top_k": 4}},
        {"repetition_penalty": 1.5, "repetition_context_size": 9, "top_k": 4},
    ),
    "own name of an option": ("llama-server", {"options": {"repeat_penalty": 1.5}}, {"repeat_penalty": 1.5}),
    "logprobs": ("mlx", {"options": {"logprobs": True}}, {"logprobs": True, "top_logprobs": 1}),
    "no logprobs": (UNKNOWN, {"options": {"logprobs": False, "top_logprobs": 3}}, {}),
    "JSON": ("openai", {"format": "json"}, {"response_format": {"type": "json_object"}}),
    "JSON by schema": (
        "lmstudio",
        {"format": "json"},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}},
    ),
    "schema": (
        "vllm",
        {"format": CITY},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": CITY}}},
    ),
    "strict schema": (
        "openai",
        {"format": STRICT},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": STRICT, "strict": True},
            }
        },
    ),
    "effort": ("openai", {"think": "high"}, {"reasoning_effort": "high"}),
    "effort, on": ("ollama-v1", {"think": True}, {"reasoning_effort": "medium"}),
    "effort, off": (UNKNOWN, {"think": False}, {"reasoning_effort": "none"}),
    "template": ("mlx", {"think": True}, {"chat_template_kwargs": {"enable_thinking": True}}),
    "template, a level": (
        "vllm",
        {"think": "low"},
        {"chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "low"}},
    ),
    "template, with others": (
        "llama-server",
        {"think": False, "options": {"chat_template_kwargs": {"style": "brief"}}},
        {"chat_template_kwargs": {"enable_thinking": False, "style": "brief"}},
    ),
    "OpenRouter": ("openrouter", {"think": "low"}, {"reasoning": {"effort": "low"}}),
}


class TestBody:
    @pytest.mark.parametrize("case", BODIES)
    def test_has_the_form_of_its_server(self, case: str) -> None:
        profile, asked, expected = BODIES[case]
        sent = body(profile, **asked)
        plain = body(profile)
        assert {name: value for name, value in sent.items() if plain.get(name) != value or name in expected} == expected

    def test_nested_schema_is_strict_only_as_a_whole(self) -> None:
        outer = {"type": "object", "properties": {"at": CITY}, "required": ["at"], "additionalProperties": False}
        assert "strict" not in body(UNKNOWN, format=outer)["response_format"]["json_schema"]

    def test_tools_are_functions(self) -> None:
        first, second = body(tools=TOOLS)["tools"]
        assert first == {"type": "function", "function": {"name": "weather", "description": "", "parameters": CITY}}
        assert second["function"]["parameters"] == {"type": "object", "properties": {}}

    @pytest.mark.parametrize(
        ("profile", "choice", "sent", "names"),
        [
            ("openai", "required", "required", ["weather", "clock"]),
            ("openai", "clock", {"type": "function", "function": {"name": "clock"}}, ["weather", "clock"]),
            ("llama-server", "clock", "required", ["clock"]),
            ("lmstudio", "required", "required", ["weather", "clock"]),
        ],
    )
    def test_choice_of_a_tool_is_kept(self, profile: str, choice: str, sent: Any, names: list[str]) -> None:
        found = body(profile, tools=TOOLS, tool_choice=choice)
        assert found["tool_choice"] == sent
        assert [each["function"]["name"] for each in found["tools"]] == names

    def test_images_are_data_uris(self) -> None:
        images = (Image(data=PNG, media_type="image/png"), Image(data=b"?"))
        seen, unseen = (Message(role="user", content=text, images=images) for text in ("Look", ""))
        (first, second) = body(UNKNOWN, seen, unseen)["messages"]
        url = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
        assert first["content"][:2] == [
            {"type": "text", "text": "Look"},
            {"type": "image_url", "image_url": {"url": url}},
        ]
        assert [each["type"] for each in second["content"]] == ["image_url", "image_url"]

    @pytest.mark.parametrize(
        ("profile", "field"),
        [
            ("openai", None),
            ("llama-server", "reasoning_content"),
            ("openrouter", "reasoning"),
            ("mlx", "reasoning_content"),
        ],
    )
    def test_history_has_its_calls_and_thoughts(self, profile: str, field: str | None) -> None:
        calls = (ToolCall(id="a", name="weather", arguments={"city": "Köln"}),)
        turn = Message(role="assistant", tool_calls=calls, thinking="So")
        (first, second) = body(profile, turn, Message(role="tool", content="sunny", tool_call_id="a"))["messages"]
        (call,) = first["tool_calls"]
        assert call == {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
        assert {"content", "role", "tool_calls"} == first.keys() - {field}
        assert first["content"] is None, "Ollama 0.9.3 drops the calls beside a text"
        assert (first[field] if field else "So") == "So"
        assert second == {"role": "tool", "content": "sunny", "tool_call_id": "a"}


RECOGNISED: dict[str, tuple[Answer, str | None]] = {
    "llama-server": (listed({"id": "m", "owned_by": "llamacpp"}), "llama-server"),
    "llama-server by header": (listed(server="llama.cpp"), "llama-server"),
    "MLX": (listed({"id": "m", "object": "model"}, server="BaseHTTP/0.6 Python/3.11.7"), "mlx_lm.server"),
    "MLX without a cache": (as_json(b"", server="BaseHTTP/0.6 Python/3.11.7"), "mlx_lm.server"),
    "vLLM": (listed({"id": "m", "owned_by": "vllm", "max_model_len": 512}), "vLLM"),
    "LM Studio": (listed({"id": "m", "owned_by": "organization_owner"}), "LM Studio"),
    "Ollama": (listed({"id": "hf.co/me/m", "owned_by": "me"}, {"id": "m", "owned_by": "library"}), "Ollama"),
    "SGLang": (listed({"id": "m", "owned_by": "sglang", "max_model_len": 512}), None),
    "another one": (listed({"id": "m", "owned_by": "me"}), None),
}


class TestServer:
    @pytest.mark.parametrize("case", RECOGNISED)
    def test_is_recognised_by_its_list(self, connect: Any, fake: FakeOllama, case: str) -> None:
        answer, name = RECOGNISED[case]
        fake.script(MODELS, answer)
        for path in ("/health", "/version", "/props"):
            fake.script(path, as_json({"version": "1", "build_info": "1"}))
        health = connect().health()
        assert (health.server, health.ok) == (name, True)

    def test_is_healthy_behind_a_proxy_of_the_api(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(MODELS, listed({"id": "m"}))
        fake.script("/health", Answer([b"no such page"], status=404, headers={"content-type": "text/plain"}))
        fake.script("/version", as_json({"detail": "Not Found"}, 404))
        health = connect(profile="vllm").health()
        assert (health.ok, health.version) == (True, None)

    def test_is_asked_once(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(MODELS, listed({"id": "m", "owned_by": "organization_owner"}))
        fake.script(CHAT, *[streamed(content="Hi")] * 2)
        llm = connect()
        for _ in range(2):
            assert llm.chat("Hi").text == "Hi"
        assert [each.path for each in fake.requests] == [MODELS, CHAT, CHAT]

    def test_named_one_is_not_asked(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(CHAT, streamed(content="Hi"))
        assert connect(profile="vllm").chat("Hi", options={"min_p": 0.5}).text == "Hi"
        assert [each.path for each in fake.requests] == [CHAT]

    def test_mlx_has_a_default_model(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(CHAT, streamed(content="Hi"))
        connect(profile="mlx", model=None).chat("Hi")
        assert fake.requests[-1].body["model"] == "default_model"

    def test_cloud_without_a_key_is_not_asked(self, connect: Any) -> None:
        health = connect(host="https://api.openai.com/v1").health()
        assert (health.reachable, health.ok, type(health.error)) == (False, False, AuthenticationFailed)

    def test_openai_is_known_by_its_host(self, connect: Any) -> None:
        with pytest.raises(RequestRejected, match="min_p"):
            connect(host="https://api.openai.com/v1").chat("Hi", options={"min_p": 0.5})

    @pytest.mark.parametrize("status", [404, 500])
    def test_chats_even_without_a_list(self, connect: Any, fake: FakeOllama, status: int) -> None:
        fake.script(MODELS, as_json({"error": {"message": "No."}}, status))
        fake.script(CHAT, streamed(content="Hi"))
        assert connect().chat("Hi").text == "Hi"

    def test_busy_one_is_asked_again(self, connect: Any, fake: FakeOllama) -> None:
        loading = as_json({"error": {"message": "Loading model", "code": 503}}, 503)
        fake.script(MODELS, loading, listed({"id": "m", "owned_by": "library"}))
        fake.script(CHAT, streamed(content="Hi"))
        llm = connect()
        assert llm.chat("Hi").text == "Hi"
        with pytest.raises(CapabilityUnsupported, match="Ollama does not support `min_p`"):
            llm.chat("Hi", options={"min_p": 0.5})

    @pytest.mark.parametrize(
        ("profile", "asked"),
        [
            ("mlx", {"format": "json"}),
            ("mlx", {"think": True, "format": STRICT}),
            ("lmstudio", {"think": True}),
            ("lmstudio", {"think": False}),
            ("lmstudio", {"options": {"logprobs": True}}),
            ("ollama-v1", {"options": {"top_k": 5}}),
        ],
    )
    @pytest.mark.parametrize("told", [True, False], ids=["named", "found out"])
    def test_refuses_what_it_cannot_do(
        self, connect: Any, fake: FakeOllama, profile: str, asked: dict[str, Any], *, told: bool
    ) -> None:
        owners = {"lmstudio": "organization_owner", "ollama-v1": "library"}
        model = {"id": "m", "owned_by": owners.get(profile)}
        fake.script(MODELS, *[listed(model, server="BaseHTTP/0.6")] * 2)
        kind = RequestRejected if told and "options" in asked else CapabilityUnsupported
        with pytest.raises(kind):
            connect(**({"profile": profile} if told else {})).chat("Hi", **asked)
        assert [each.path for each in fake.requests if each.method == "POST"] == []

    def test_template_without_tools_refuses_them(self, connect: Any, fake: FakeOllama) -> None:
        fake.script("/props", as_json({"chat_template": "{{ messages }}", "modalities": {"vision": True}}))
        llm = connect(profile="llama-server")
        for _ in range(2):
            with pytest.raises(CapabilityUnsupported, match="template"):
                llm.chat("Hi", tools=[{"name": "clock"}])
        assert [each.path for each in fake.requests] == ["/props"]


class TestGenerate:
    def test_prompt_with_a_template_is_a_chat(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(CHAT, streamed(content="Hello"))
        assert connect(profile="vllm").generate("Hi", system="Be brief", max_tokens=3).text == "Hello"
        sent = fake.requests[-1].body
        assert sent["messages"] == [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
        assert sent["max_tokens"] == 3

    @pytest.mark.parametrize(
        ("profile", "asked", "sent"),
        [
            ("openai", {"raw": True, "max_tokens": 3}, {"max_tokens": 3}),
            ("ollama-v1", {"suffix": "end"}, {"suffix": "end"}),
            ("vllm", {"raw": True, "options": {"logprobs": True, "top_logprobs": 2}}, {"logprobs": 2}),
        ],
    )
    def test_raw_prompt_is_a_completion(
        self, connect: Any, fake: FakeOllama, profile: str, asked: dict[str, Any], sent: dict[str, Any]
    ) -> None:
        words = {"tokens": [" tag"], "token_logprobs": [-0.5]}
        event = {"choices": [{"text": "<think> tag", "finish_reason": "stop", "logprobs": words}]}
        data = f"data: {json.dumps(event)}\n\n".encode()
        fake.script(COMPLETIONS, Answer([data], headers={"content-type": "text/event-stream"}))
        reply = connect(profile=profile).generate("Begin", **asked)
        assert (reply.text, [each.logprob for each in reply.logprobs]) == ("<think> tag", [-0.5])
        expected = {"model": "m", "prompt": "Begin", "stream": True, "stream_options": {"include_usage": True}, **sent}
        assert fake.requests[-1].body == expected

    @pytest.mark.parametrize(
        ("profile", "asked", "kind"),
        [
            ("openai", {"raw": True, "system": "Be brief"}, RequestRejected),
            ("openai", {"raw": True, "images": [PNG]}, RequestRejected),
            ("openai", {"raw": True, "format": "json"}, CapabilityUnsupported),
            ("ollama-v1", {"raw": True}, CapabilityUnsupported),
            ("mlx", {"suffix": "end"}, CapabilityUnsupported),
        ],
    )
    def test_refuses_what_completions_lack(
        self, connect: Any, fake: FakeOllama, profile: str, asked: dict[str, Any], kind: type[Exception]
    ) -> None:
        with pytest.raises(kind):
            connect(profile=profile).generate("Hi", **asked)
        assert [each.path for each in fake.requests if each.method == "POST"] == []


class TestOtherOperations:
    def test_embedding_asks_for_base64_where_taken(self, connect: Any, fake: FakeOllama) -> None:
        for profile, encoding in (("vllm", "base64"), ("openrouter", None)):
            fake.script("/v1/embeddings", as_json({"data": [{"embedding": [0.5, 1.0]}]}))
            connect(profile=profile).embed(["Hi"], dimensions=2)
            sent = fake.requests[-1].body
            assert (sent["input"], sent["dimensions"], sent.get("encoding_format")) == (["Hi"], 2, encoding)

    def test_ignored_dimensions_are_an_error(self, connect: Any, fake: FakeOllama) -> None:
        fake.script("/v1/embeddings", as_json({"data": [{"embedding": [0.5, 1.0]}]}))
        with pytest.raises(CapabilityUnsupported, match="2 numbers, not 1"):
            connect(profile="llama-server").embed("Hi", dimensions=1)

    @pytest.mark.parametrize(("profile", "asked"), [("mlx", {}), ("ollama-v1", {"truncate": False})])
    def test_embedding_that_cannot_be_had_is_refused(
        self, connect: Any, fake: FakeOllama, profile: str, asked: dict[str, Any]
    ) -> None:
        with pytest.raises(CapabilityUnsupported):
            connect(profile=profile).embed("Hi", **asked)
        assert fake.requests == []

    @pytest.mark.parametrize(
        ("profile", "path", "found"),
        [
            ("llama-server", "/v1/chat/completions/input_tokens", {"input_tokens": 7}),
            ("vllm", "/tokenize", {"count": 7, "max_model_len": 512}),
        ],
    )
    def test_tokens_are_counted(
        self, connect: Any, fake: FakeOllama, profile: str, path: str, found: dict[str, Any]
    ) -> None:
        fake.script(path, as_json(found))
        assert connect(profile=profile).count_tokens("Hi") == 7
        assert fake.requests[-1].body == {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}

    def test_models_have_their_windows(self, connect: Any, fake: FakeOllama) -> None:
        meta = {"n_ctx": 1024, "n_ctx_train": 8192, "size": 9, "n_params": 5, "ftype": "Q4_1"}
        windows: list[dict[str, Any]] = [
            {"id": "b", "max_model_len": 512},
            {"id": "c", "context_length": 256},
            {"id": "d"},
        ]
        fake.script(MODELS, *[listed({"id": "a", "meta": meta}, *windows)] * 2)
        llm = connect(profile="openrouter")
        assert [each.context_window for each in llm.models()] == [1024, 512, 256, None]
        found = llm.show("a")
        assert (found.size, found.parameters, found.quantization) == (9, "5", "Q4_1")

    def test_entries_without_a_name_are_left_out(self, connect: Any, fake: FakeOllama) -> None:
        odd: list[dict[str, Any]] = [{"id": None}, {"id": ["a"]}, {"id": ""}, {"id": "m", "owned_by": {"x": 1}}]
        fake.script(MODELS, *[listed(*odd)] * 2)
        assert [each.name for each in connect().models()] == ["m"]

    def test_unlisted_model_is_not_shown(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(MODELS, *[listed({"id": "other"})] * 2)
        with pytest.raises(ModelNotFound, match="does not list"):
            connect(profile="openrouter").show("m")

    def test_lm_studio_says_what_is_loaded(self, connect: Any, fake: FakeOllama) -> None:
        loaded = [{"id": "a:2", "config": {"context_length": 4096}}]
        models = [{"key": "a", "size_bytes": 9, "loaded_instances": loaded}, {"key": "b", "loaded_instances": []}]
        fake.script("/api/v1/models", as_json({"models": models}))
        (found,) = connect(profile="lmstudio").loaded()
        assert (found.name, found.context_window) == ("a:2", 4096)
        assert found.size is not None
        assert found.size > 9, "the cache counts"

    def test_unknown_residency_is_said(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(MODELS, *[listed({"id": "m"})] * 2)
        llm = connect(profile="openrouter")
        with pytest.raises(CapabilityUnsupported):
            llm.loaded()
        health = llm.health(level="model_loaded")
        assert (health.model_present, health.model_loaded, health.ok) == (True, False, False)
        assert [each.method for each in fake.requests] == ["GET"]


class TestReplies:
    @pytest.mark.parametrize(
        ("profile", "asked", "warning"),
        [
            ("openai", {"options": {"logprobs": True}}, "no log-probabilities"),
            ("ollama-v1", {"images": [PNG]}, "ignores images"),
            ("vllm", {"keep_alive": 5}, "`keep_alive` has no effect"),
            ("vllm", {"context_window": 512}, "`context_window` has no effect"),
        ],
    )
    def test_warn_of_what_was_ignored(
        self, connect: Any, fake: FakeOllama, profile: str, asked: dict[str, Any], warning: str
    ) -> None:
        fake.script(CHAT, streamed(content="Hello"))
        (found,) = connect(profile=profile).chat("Hi", **asked).warnings
        assert warning in found

    def test_log_probabilities_of_mlx_come_in_one_piece(self, connect: Any, fake: FakeOllama) -> None:
        entry = {"id": 1, "token": "Hi", "logprob": -0.5, "top_logprobs": [{"token": "Hi", "logprob": -0.5}]}
        choice = {"message": {"content": "Hi"}, "logprobs": {"content": [entry]}, "finish_reason": "stop"}
        headers: Any = {"x-request-id": "r1"}
        fake.script(CHAT, as_json({"model": "m", "choices": [choice], "usage": {"prompt_tokens": 3}}, **headers))
        reply = connect(profile="mlx").chat("Hi", options={"logprobs": True})
        assert [(each.token, each.logprob, each.top) for each in reply.logprobs] == [("Hi", -0.5, ())]
        assert (reply.text, reply.usage.input_tokens, reply.request_id) == ("Hi", 3, "r1")
        assert not {"stream", "stream_options"} & fake.requests[-1].body.keys()
