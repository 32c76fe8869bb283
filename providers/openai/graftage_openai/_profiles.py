"""The settings, the server's address, and what each known server can do: data, so that no code asks for a name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from typing import ClassVar, Final, Literal, TypeAlias

from pydantic import Field

from graftage._records import dataclass
from graftage.settings import Settings
from graftage.types import Feature

__all__ = ["HOSTS", "OWNERS", "PROFILES", "UNKNOWN", "WIDEST", "OpenAISettings", "Profile", "parse_host"]

ProfileName: TypeAlias = Literal["openai", "mlx", "llama-server", "lmstudio", "vllm", "ollama-v1", "openrouter"]


class OpenAISettings(Settings):
    """The common settings, and which server it is."""

    native_environment: ClassVar[Mapping[str, str]] = {"api_key": "OPENAI_API_KEY"}
    native_hosts: ClassVar[Mapping[str, str]] = {"api_key": "api.openai.com"}

    host: str | None = Field(
        default=None, description="Address of the API, by default https://api.openai.com/v1. Without a path, it is /v1"
    )
    profile: ProfileName | None = Field(
        default=None, description="Which server it is; by default, this is found out with one request"
    )


# --- The address -----------------------------------------------------------------------------------------------------

DEFAULT_HOST: Final = "https://api.openai.com/v1"
_ENDPOINT: Final = re.compile(r"/(?:chat/completions|completions|embeddings|models|responses)/*$")
"""The end of an address that was copied from a page about the API."""
_VERSION: Final = re.compile(r"/v[0-9]\w*$")


def parse_host(text: str | None) -> tuple[str, str]:
    """Return the URL of the server's root, and the path of the API below it, such as `/v1`.

    Without a scheme, an address with a port or on this machine is http, and any other is https. `request.http` checks
    the URL.
    """
    from graftage.http.address import is_loopback

    url = (text or "").strip().strip("'\"").strip() or DEFAULT_HOST
    if "://" not in url:
        name = re.split("[/?#]", url, maxsplit=1)[0].rpartition("@")[2]
        here = is_loopback(re.sub(r":[0-9]*$", "", name))
        url = f"{'http' if here or re.search(r':[0-9]+$', name) else 'https'}://{url}"
    url = _ENDPOINT.sub("", url.rstrip("/"))
    scheme, _, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    if not slash or "?" in path or "#" in path:  # `request.http` refuses a query.
        return url, "/v1"
    version = _VERSION.search(f"/{path}")
    return (url[: -len(version[0])], version[0]) if version else (f"{scheme}://{place}", f"/{path}")


# --- Servers ---------------------------------------------------------------------------------------------------------

LOGPROBS: Final = frozenset({"logprobs", "top_logprobs"})
COMMON: Final = LOGPROBS | {"frequency_penalty", "presence_penalty", "seed", "server", "stop", "temperature", "top_p"}
"""The options of OpenAI's API."""
SAMPLING: Final = COMMON | {"min_p", "repeat_penalty", "top_k"}
EVERY: Final = SAMPLING | {"mirostat", "mirostat_eta", "mirostat_tau", "repeat_last_n", "typical_p"}
REPETITION: Final = {"repeat_penalty": "repetition_penalty", "repeat_last_n": "repetition_context_size"}
CHAT: Final = frozenset[Feature]({"tools", "structured_output", "thinking", "images", "logprobs"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What a server can do, as seen or as its documentation says."""

    name: str = ""
    """The server's software."""
    features: frozenset[Feature] = CHAT | {"tool_choice"}
    """Features that no hook shows."""
    options: frozenset[str] = COMMON
    names: Mapping[str, str] = field(default_factory=dict)
    """The server's names of options that it calls otherwise."""
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The field that limits the reply."""
    named_tool: bool = True
    """Whether `tool_choice` can name a tool. If not, only that tool is sent, as required."""
    json_object: bool = True
    """Whether `json_object` is taken and kept. If not, a schema for any object is sent."""
    think: Literal["effort", "template", "reasoning"] | None = "effort"
    """Where `think` goes: `reasoning_effort`, arguments of the model's template, or OpenRouter's `reasoning`."""
    thought: Literal["reasoning", "reasoning_content"] | None = None
    """The field of a message that the server or its templates read as a thought; None: the one that it has sent."""
    streams_logprobs: bool = True
    """Whether log-probabilities come in streams. If not, such a chat comes in one piece."""
    embeds: Literal["base64", "float"] | None = "float"
    """How it encodes vectors."""
    cuts: bool = False
    """Whether it ignores without a word what a model cannot take: images, the end of a long input."""
    raw: bool = True
    """Whether `/completions` continues a prompt without the model's template."""
    keeps_name: bool = False
    """Whether it replies to any model's name with the one model that it has."""
    default_model: str | None = None
    """A name that it knows but does not list."""
    health: Mapping[str, str] = field(default_factory=dict)
    """Paths that show whether the server works, besides the list of models, and the field there with its version."""
    count: tuple[str, str] | None = None
    """The path and the field with the number of tokens of a chat."""
    props: str | None = None
    """A path with the template of its one model, which shows what that can do."""
    loaded: Literal["/models", "/api/v1/models"] | None = None
    """Where it says which models are in memory: `/models` if it lists no others."""
    adapters: Literal["request", "slots", "endpoints"] | None = None
    """How it takes adapters: a field of each request, scales for those it was started with, or endpoints."""


PROFILES: Final[Mapping[str, Profile]] = {
    "openai": Profile(
        name="OpenAI", features=CHAT | {"tool_choice", "suffix"}, limit="max_completion_tokens", embeds="base64"
    ),
    "mlx": Profile(
        name="mlx_lm.server",
        features=CHAT - {"structured_output"},
        options=SAMPLING | {"repeat_last_n"},
        names=REPETITION,
        think="template",
        thought="reasoning_content",
        streams_logprobs=False,
        embeds=None,
        default_model="default_model",
        health={"/health": ""},
        adapters="request",
    ),
    "llama-server": Profile(
        name="llama-server",
        features=CHAT | {"tool_choice", "adapter_weights"},
        options=EVERY,
        named_tool=False,
        json_object=False,
        think="template",
        thought="reasoning_content",
        embeds="base64",
        keeps_name=True,
        health={"/health": "", "/props": "build_info"},
        count=("/v1/chat/completions/input_tokens", "input_tokens"),
        props="/props",
        loaded="/models",
        adapters="slots",
    ),
    "lmstudio": Profile(
        name="LM Studio",
        features=frozenset({"tools", "tool_choice", "structured_output", "images"}),
        options=(COMMON - LOGPROBS) | {"repeat_penalty", "top_k"},
        named_tool=False,
        json_object=False,
        think=None,
        thought="reasoning_content",
        loaded="/api/v1/models",
    ),
    "vllm": Profile(
        name="vLLM",
        options=SAMPLING,
        names=REPETITION,
        think="template",
        thought="reasoning",
        embeds="base64",
        health={"/health": "", "/version": "version"},
        count=("/tokenize", "count"),
        loaded="/models",
        adapters="endpoints",
    ),
    "ollama-v1": Profile(
        name="Ollama",
        features=CHAT | {"suffix"},
        thought="reasoning",
        cuts=True,
        raw=False,
        health={"/api/version": "version"},
    ),
    "openrouter": Profile(
        name="OpenRouter", options=SAMPLING, names=REPETITION, think="reasoning", thought="reasoning"
    ),
}
UNKNOWN: Final = Profile(options=EVERY)
"""A server that was not recognised. What it cannot do, it must refuse itself."""
WIDEST: Final = Profile(options=EVERY, features=CHAT | {"tool_choice", "suffix"})
"""What may be possible before the server is known."""
HOSTS: Final = {"api.openai.com": PROFILES["openai"], "openrouter.ai": PROFILES["openrouter"]}
OWNERS: Final = {
    "llamacpp": "llama-server",
    "vllm": "vllm",
    "organization_owner": "lmstudio",
    "library": "ollama-v1",
}
"""What servers write as `owned_by` into their lists of models."""
