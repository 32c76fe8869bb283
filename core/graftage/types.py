"""The data that a host application sees: messages, replies, models, limits, adapters. `calls` has what hooks receive.

All of it is frozen and keyword-only. It grows by fields with defaults, so a plugin written for this release works with
the next. An unknown figure is `None`, never 0. Durations are in seconds, sizes in bytes.
"""

from __future__ import annotations

import contextlib
import enum
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias, runtime_checkable

from graftage._records import dataclass

if TYPE_CHECKING:
    from datetime import datetime
    from typing import Self

    from numpy.typing import DTypeLike, NDArray


__all__ = [
    "ACTIVE",
    "HEALTH_LEVELS",
    "LONGEST",
    "NEVER_APPLIES",
    "Adapter",
    "AdapterChoice",
    "AdapterInfo",
    "AdapterReference",
    "Capabilities",
    "Chunk",
    "Embeddings",
    "Feature",
    "FinishReason",
    "Health",
    "HealthLevel",
    "Image",
    "Limits",
    "LoadedAdapter",
    "LoadedModel",
    "Logprob",
    "Message",
    "MixableAdapter",
    "ModelInfo",
    "Operation",
    "Phase",
    "PortableAdapter",
    "PromptProgress",
    "PullProgress",
    "Ranked",
    "Ranking",
    "Reply",
    "Role",
    "Stats",
    "Step",
    "Timeouts",
    "Timings",
    "Tool",
    "ToolCall",
    "Usage",
    "Vectors",
    "Verdict",
    "Warmed",
    "canonical_name",
]

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter", "unload", "load", "other"]
"""Why a reply ended. Readers must accept new values; the server's word is in `raw`."""
Feature: TypeAlias = Literal[
    "chat",
    "generate",
    "embed",
    "tools",
    "tool_choice",
    "structured_output",
    "thinking",
    "images",
    "logprobs",
    "suffix",
    "list_models",
    "show_model",
    "loaded_models",
    "pull_model",
    "load_model",
    "unload_model",
    "delete_model",
    "load_adapter",
    "adapter_weights",
    "unload_adapter",
    "prune_adapters",
    "warm",
    "count_tokens",
    "rerank",
    "native",
]
Operation: TypeAlias = str
"""The name of a connection hook, such as `chat` or `pull_model`."""


class _Unset(enum.Enum):
    ACTIVE = "the adapter that is active"

    def __repr__(self) -> str:
        return self.name


ACTIVE: Final = _Unset.ACTIVE
"""The adapter that `use_adapter` made active; `None` means the base model."""
AdapterReference: TypeAlias = "str | Path | tuple[str | Path, float]"
"""An adapter by name or path, or that with its weight, which is 1 if it is left out."""
AdapterChoice: TypeAlias = "AdapterReference | Sequence[AdapterReference] | Literal[_Unset.ACTIVE] | None"
"""One adapter, several at once, the active one, or the base model."""


# --- Messages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image in a message."""

    data: bytes = field(default=b"", repr=False)
    """The bytes of the image file (PNG, JPEG, WebP)."""
    path: str | Path | None = None
    """The file to read, instead of `data`. A provider receives only `data`."""
    media_type: str | None = None
    """Such as `image/png`; None if unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """The model's request to call a function."""

    name: str
    arguments: Mapping[str, Any]
    """The arguments as the model wrote them. Do not trust them: they are not checked against the tool's schema."""
    id: str
    """The name of this call in `Message.tool_call_id`, when its result is sent back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function the model may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    """A JSON schema of type `object`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str = ""
    images: tuple[Image, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_name: str | None = None
    """On a message with the role `tool`: the function whose result this is."""
    tool_call_id: str | None = None
    """On a message with the role `tool`: the `ToolCall.id` that this is the result of."""
    thinking: str | None = None
    """What the model thought before its reply."""
    name: str | None = None
    """Who speaks, if several share a role; few servers and templates use it."""


# --- Replies ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens as the server counted them; an impossible count becomes `None`."""

    input_tokens: int | None = None
    """Tokens of the whole prompt, including those in the server's cache."""
    output_tokens: int | None = None
    """Tokens of the whole reply, including those of its thinking."""
    cached_tokens: int | None = None
    """How many of the input tokens the server did not have to read again."""
    reasoning_tokens: int | None = None
    """How many of the output tokens were thinking."""

    @property
    def total_tokens(self) -> int | None:
        """Input and output together; `None` unless both are known."""
        if self.input_tokens is None or self.output_tokens is None:
            return None
        return self.input_tokens + self.output_tokens

    def __add__(self, other: Usage) -> Usage:
        """Add two counts; a figure that one of them lacks is unknown in the sum."""
        names = (each.name for each in fields(self))
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return Usage(**{name: None if None in pair else sum(pair) for name, pair in pairs.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time went, in seconds: `first_chunk` and `wall` by the client's clock, the rest by the server's."""

    total: float | None = None
    load: float | None = None
    """Loading the model into memory."""
    prompt: float | None = None
    """Reading the prompt."""
    generation: float | None = None
    first_chunk: float | None = None
    """From the call to the first chunk, including the wait for a slot."""
    wall: float | None = None
    """From the call to the last chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """A token of the reply, and how probable it was."""

    token: str
    logprob: float
    """The natural logarithm of the probability."""
    top: tuple[Logprob, ...] = ()
    """The most probable tokens at this place, if the request asked for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of a reply, as a provider yields it. Only the last chunk has a `finish_reason`."""

    text: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    finish_reason: str | None = None
    """A provider passes on the server's word, or `""` if there is none; the host receives a `FinishReason`."""
    usage: Usage | None = None
    timings: Timings | None = None
    model: str | None = None
    """The model that replied, as the server names it."""
    warnings: tuple[str, ...] = ()
    request_id: str | None = None
    """On the last chunk: the server's name for the request, for its operators."""
    rate_limits: Mapping[str, str] | None = None
    """On the last chunk: the response headers about rate limits, by name in lower case."""
    raw: Mapping[str, Any] | None = field(default=None, repr=False)
    """On the last chunk: what the server sent, unchanged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A reply of a model. If it is not complete, its `finish_reason` is `None`."""

    text: str
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    parsed: Any = None
    """With `format`: the text as an instance of the given type, or as plain data."""
    finish_reason: FinishReason | None = None
    usage: Usage = Usage()
    timings: Timings = Timings()
    model: str = ""
    provider: str = ""
    """The provider that replied."""
    adapter: str | None = None
    """The adapter that was used, or `None` for the base model; several at once as `style + 0.6 domain`."""
    adapter_digest: str | None = None
    """The digest of its content: equal names may mean different adapters at different times."""
    limits: Limits | None = None
    """What the policies allowed, and why."""
    warnings: tuple[str, ...] = ()
    attempts: int = 1
    """How often the model was asked until its reply matched the `format`; `usage` is the sum over all of them."""
    request_id: str | None = None
    """The server's name for the request, for its operators."""
    rate_limits: Mapping[str, str] | None = None
    """The response headers about rate limits, by name in lower case, such as `x-ratelimit-remaining-requests`."""
    steps: tuple[Step, ...] = ()
    """Of `run_tools`: what happened before this reply, in order; `usage` is then the sum over all."""
    raw: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def message(self) -> Message:
        """The reply as the next message of the conversation."""
        return Message(role="assistant", content=self.text, tool_calls=self.tool_calls, thinking=self.thinking or None)

    @property
    def messages(self) -> tuple[Message, ...]:
        """What continues the conversation: the messages of the `steps`, and the reply's own."""
        return (*(message for step in self.steps for message in step.messages), self.message)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step of `run_tools`: the model's calls of tools, and their results."""

    message: Message
    """The model's message with its `tool_calls`."""
    results: tuple[Message, ...]
    """The result of each call, in their order, with the role `tool`."""
    errors: Mapping[str, str] = field(default_factory=dict)
    """What went wrong, by `ToolCall.id`; the model was informed of it in the result."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """The messages that this step added to the conversation."""
        return (self.message, *self.results)


_NOT_FINITE: Final = "a vector with a value that is not a finite number"


class Vectors(tuple[tuple[float, ...], ...]):
    """Vectors of equal length, as tuples of finite floats; `numpy()` returns them as one array."""

    __slots__ = ()

    def __new__(cls, vectors: Iterable[Iterable[float]] = ()) -> Self:
        """Check the vectors and convert all numbers to floats.

        Raises:
            TypeError: the value is not a sequence of vectors.
            ValueError: a vector is empty, differs in length, or has a value that is not a finite number.
        """
        return vectors if type(vectors) is cls else cls._of(_floats(vectors))

    @classmethod
    def _of(cls, vectors: tuple[tuple[float, ...], ...]) -> Self:
        """Check everything except the types, which the caller has checked."""
        lengths = sorted(set(map(len, vectors)))
        if lengths and not lengths[0]:
            raise ValueError("an empty vector")
        if len(lengths) > 1:
            raise ValueError(f"vectors of different lengths, from {lengths[0]} to {lengths[-1]} numbers")
        # A sum is quick to check, but a sum of huge finite numbers is infinite too.
        if not all(map(math.isfinite, map(sum, vectors))) and not all(map(math.isfinite, chain.from_iterable(vectors))):
            raise ValueError(_NOT_FINITE)
        return super().__new__(cls, vectors)

    def __repr__(self) -> str:
        return f"<Vectors {len(self)} x {len(self[0]) if self else 0}>"

    def numpy(self, dtype: DTypeLike = "float32") -> NDArray[Any]:
        """Return a new array with a row for each vector.

        Args:
            dtype: the type of the numbers; models compute with `float32` at most.

        Raises:
            ImportError: NumPy is not installed; nothing else in Graftage needs it.
        """
        try:
            import numpy as np  # Slow to import, and often not there
        except ImportError as error:
            raise ImportError("`numpy()` needs NumPy: `pip install numpy`.", name="numpy") from error
        shape = len(self), len(self[0]) if self else 0
        return np.fromiter(chain.from_iterable(self), dtype, shape[0] * shape[1]).reshape(shape)


def _floats(vectors: Iterable[Iterable[float]]) -> tuple[tuple[float, ...], ...]:
    """Return the vectors as tuples of floats; check that all are real numbers and not booleans."""
    import msgspec

    with contextlib.suppress(msgspec.ValidationError):
        return msgspec.convert(vectors, tuple[tuple[float, ...], ...])
    # These are other types of sequences or numbers, or something is wrong.
    from numbers import Real

    try:
        found = tuple(map(tuple, vectors))
    except TypeError:
        raise TypeError("a value that is not a sequence of vectors") from None
    kinds = set().union(*(map(type, each) for each in found))
    with contextlib.suppress(OverflowError):  # An integer may be larger than any float.
        if bool not in kinds and all(issubclass(each, Real) for each in kinds):
            return tuple(tuple(map(float, each)) for each in found)
    raise ValueError(_NOT_FINITE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """One vector for each input, in the order of the inputs."""

    vectors: Vectors = field(repr=False)
    """Tuples of floats, or one array: `vectors.numpy()`. A provider may give any sequences of numbers."""
    model: str = ""
    provider: str = ""
    usage: Usage = Usage()
    timings: Timings = Timings()
    limits: Limits | None = None
    warnings: tuple[str, ...] = ()

    if TYPE_CHECKING:  # The constructor accepts more types than the field has.

        def __init__(
            self,
            *,
            vectors: Iterable[Iterable[float]],
            model: str = ...,
            provider: str = ...,
            usage: Usage = ...,
            timings: Timings = ...,
            limits: Limits | None = ...,
            warnings: tuple[str, ...] = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        given: Any = self.vectors
        # The core checks again, and its error names the provider.
        with contextlib.suppress(TypeError, ValueError):
            object.__setattr__(self, "vectors", Vectors(given))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """How well one document answers a query."""

    index: int
    """The position of the document in the request, from 0."""
    score: float
    """Higher is better; scores of different models or queries cannot be compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Each document of a request once, the best first. A provider may return them in any order."""

    results: tuple[Ranked, ...]
    model: str = ""
    provider: str = ""
    usage: Usage = Usage()
    timings: Timings = Timings()
    limits: Limits | None = None
    warnings: tuple[str, ...] = ()


# --- Models ----------------------------------------------------------------------------------------------------------


_PATH: Final = re.compile(r"[/~.\\]|[a-z]:\\|hf://|[^:]*\.gguf$", re.IGNORECASE)
_DEFAULT_PREFIXES: Final = ("https://", "http://", "registry.ollama.ai/", "library/")
"""Prefixes that a name may omit, the outermost first."""


def canonical_name(name: str) -> str:
    """Return a model's name in the form that two names are compared in: lower case, with a tag, without defaults.

    `Llama3.2`, `library/llama3.2` and `registry.ollama.ai/library/llama3.2:latest` are all `llama3.2:latest`, and
    `hf.co/Owner/Model:Q4_0` is `hf.co/owner/model:q4_0`: Ollama ignores case in names. The path of a file and
    `hf://org/repo/file.gguf` stay unchanged, because case matters there.
    """
    name = name.strip()
    if _PATH.match(name):
        return name
    name = name.lower()
    for prefix in _DEFAULT_PREFIXES:
        name = name.removeprefix(prefix)
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What is known about a model. `list_models` knows less than `show_model`; unknown fields are `None`."""

    name: str
    """The name for requests, such as `gpt-4o`, with its tag if the server has tags: `llama3.2:latest`."""
    digest: str | None = None
    size: int | None = None
    """Bytes on disk."""
    modified_at: datetime | None = None
    family: str | None = None
    architecture: str | None = None
    parameters: str | None = None
    """The number of parameters as the server writes it: `134.52M`."""
    quantization: str | None = None
    context_window: int | None = None
    """The largest window that the model was trained for, in tokens."""
    features: frozenset[str] | None = None
    """Each `Feature` that the model has; `None` if the server does not say."""
    parent: str | None = None
    """The model that this one was made from."""
    adapters: tuple[str, ...] = ()
    """The digests of the adapters inside it."""
    template: str | None = None
    system: str | None = None
    licence: str | None = None
    path: Path | None = None
    """The model's file or folder, if it is on this machine and readable."""
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The keys of its GGUF file with their arrays, or similar data."""
    tensors: Mapping[str, tuple[int, ...]] | None = field(default=None, repr=False)
    """The shape of each tensor by name; `None` if the server does not say."""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model in memory."""

    name: str
    digest: str | None = None
    size: int | None = None
    """Bytes in memory, in total."""
    accelerator_size: int | None = None
    """How many of these bytes are on the accelerator."""
    expires_at: datetime | None = None
    """When it will be unloaded; `None` if unknown or never."""
    context_window: int | None = None
    """The window that it was loaded with, in tokens."""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PullProgress:
    """A step of a download. The last step of a successful pull has the status `success`."""

    status: str
    digest: str | None = None
    total: int | None = None
    completed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptProgress:
    """How far a model has read a prompt, in tokens."""

    total: int
    processed: int
    """Including those from the cache."""
    cached: int = 0
    """Tokens that it did not have to read again."""


HealthLevel: TypeAlias = Literal["reachable", "api", "model_present", "model_loaded", "answers"]
HEALTH_LEVELS: Final[tuple[HealthLevel, ...]] = ("reachable", "api", "model_present", "model_loaded", "answers")
"""Each level includes those before it; only `answers` makes the model work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The levels that a provider has reached. A level that was not checked is `None`."""

    level: HealthLevel
    """The highest level that was to be checked."""
    reachable: bool
    api: bool | None = None
    """The expected service answers there."""
    model_present: bool | None = None
    model_loaded: bool | None = None
    answers: bool | None = None
    version: str | None = None
    """The server's version."""
    server: str | None = None
    """The server's software, such as `llama-server`, if a provider serves several."""
    address: str | None = None
    model: str | None = None
    latency: float | None = None
    """The seconds that the check took."""
    error: Exception | None = None
    """Why the check failed, at the first level that failed."""
    cached: bool = False
    age: float = 0.0
    """Seconds since the check."""

    @property
    def ok(self) -> bool:
        """Whether every level up to `level` was reached."""
        upto = HEALTH_LEVELS[: HEALTH_LEVELS.index(self.level) + 1]
        return all(getattr(self, level) for level in upto)

    def raise_for_error(self) -> None:
        """Raise the reason if the check failed.

        Raises:
            ProviderError: the failure that the check found.
        """
        if not self.ok:
            raise self.error or RuntimeError(f"the health check did not reach the level `{self.level}`")


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a provider can do, known without a request to the server."""

    features: frozenset[str]
    """Each `Feature` that it has."""
    options: frozenset[str] = frozenset()
    """The keys that `options` of a call may have. If `server` is one of them, `{"server": {...}}` passes on options
    that only the server knows. The provider receives them next to the others, and sends them all."""
    parameters: frozenset[str] | None = None
    """Which of `keep_alive`, `context_window` and `max_tokens` it uses; `None` if it does not say. If a call sets
    another one of them, the reply has a warning."""


# --- Limits ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a policy allows. An unset field does not limit anything."""

    context_window: int | None = None
    """Tokens."""
    max_tokens: int | None = None
    concurrent_requests: int | None = None
    """Simultaneous requests from this process to the server."""
    queued_requests: int | None = None
    """Requests that may wait for a slot; one more raises `Overloaded`."""
    loaded_models: int | None = None
    keep_alive: float | None = None
    """Seconds; infinity means for ever."""
    keep_window: bool = False
    """Raise a smaller window of the caller to `context_window`, with which the model is loaded, to avoid a new load."""
    unload: tuple[str, ...] = ()
    """Idle models that the core unloads before it admits the request; a model in use stays loaded."""
    wait_for: tuple[str, ...] = ()
    """Models whose requests must end first: the request waits until none is in use, then the policies decide again."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """The reason for each field that is set: `{"context_window": "16 GB leave 4 GB for the cache"}`."""
    warnings: tuple[str, ...] = ()
    """Warnings for the reply."""

    def __post_init__(self) -> None:
        for name in ("context_window", "max_tokens", "concurrent_requests", "queued_requests", "loaded_models"):
            _check_number(name, getattr(self, name), int)
        _check_number("keep_alive", self.keep_alive, (int, float))
        for name in ("unload", "wait_for", "warnings"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(each, str) for each in value):
                raise ValueError(f"the limit `{name}` must be a tuple of strings, not {value!r}")


def _check_number(name: str, value: Any, kind: type | tuple[type, ...]) -> None:
    valid = isinstance(value, kind) and not isinstance(value, bool)
    if value is not None and not (valid and value >= 0):
        raise ValueError(f"the limit `{name}` must be a number of at least 0, not {value!r}")


NEVER_APPLIES: Final = Limits()
"""The result of a policy that cannot limit anything on this connection: the core does not ask it again."""


# --- Limits of time --------------------------------------------------------------------------------------------------


Phase: TypeAlias = Literal["connect", "first_token", "idle", "total"]
"""The limits on a call."""
LONGEST: Final = 366 * 86400.0
"""Seconds: a longer timeout is a mistake, and some system clocks would overflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """The four limits on a call, in seconds. All are finite."""

    connect: float = 5.0
    """To reach the server."""
    first_token: float = 300.0
    """From sending the request to the first chunk: queueing, loading the model, reading the prompt."""
    idle: float = 60.0
    """Between chunks."""
    total: float = 600.0
    """The whole call, including all attempts. A pull has only `idle`."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LONGEST:
                raise ValueError(
                    f"the timeout `{each.name}` must be a number of seconds above 0 and at most a year, "
                    f"not {str(value)[:40]}"
                )


# --- Adapters --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether an adapter fits a base model."""

    status: Literal["compatible", "incompatible", "unsupported", "unknown"]
    """`unsupported` if it may fit, but its resolver cannot convert it for such a model."""
    reasons: tuple[str, ...] = ()
    """Every contradiction, what cannot be converted, or what is missing for a decision."""
    warnings: tuple[str, ...] = ()


def _ignore_progress(_written: int, _total: int) -> None:
    """Ignore the progress of a merge."""


@runtime_checkable
class Adapter(Protocol):
    """A LoRA adapter that a resolver has found and checked. The provider decides how its server loads it."""

    @property
    def name(self) -> str:
        """A short name for people."""
        ...

    @property
    def digest(self) -> str:
        """`sha256:…` over the content that has an effect: equal adapters have equal digests."""
        ...

    @property
    def scale(self) -> float:
        """The strength that it was trained for: alpha by rank, or by its square root if rank-stabilised."""
        ...

    @property
    def verdict(self) -> Verdict:
        """Whether it fits the base model that the request named."""
        ...

    @property
    def served_as(self) -> str | None:
        """The model on the server that already includes it, if the reference named one."""
        ...

    def gguf(self, base: ModelInfo) -> Path:
        """Return a GGUF file of the adapter, converted for `base` if needed.

        Raises:
            AdapterError: it cannot be read or does not fit.
        """
        ...

    def merge(self, base_file: Path, out: Path, on_progress: Callable[[int, int], None] = _ignore_progress) -> Path:
        """Write the base model with the adapter merged into it to `out`. A failure leaves no file.

        Args:
            base_file: the base model in GGUF.
            out: the file to write.
            on_progress: called with the bytes written and the total; an error that it raises ends the merge.

        Raises:
            AdapterError: it cannot be read or does not fit.
        """
        ...


@runtime_checkable
class PortableAdapter(Adapter, Protocol):
    """An `Adapter` that its resolver can also supply in the layouts of training tools, for servers that read these."""

    def peft(self, base: ModelInfo) -> Path:
        """Return a folder with the adapter in PEFT's layout, converted if needed.

        Raises:
            AdapterError: it cannot be read or does not fit.
        """
        ...

    def mlx(self, base: ModelInfo) -> Path:
        """Return a folder with the adapter in the layout of `mlx_lm`, converted if needed.

        Raises:
            AdapterError: it cannot be read or does not fit.
        """
        ...


@runtime_checkable
class MixableAdapter(Adapter, Protocol):
    """An `Adapter` that its resolver can add up with others, for servers that apply only one at a time."""

    def mix(self, weight: float, others: Sequence[tuple[Adapter, float]]) -> Adapter:
        """Return one adapter that changes the model as this one and others together do, each by its weight.

        Raises:
            AdapterUnsupported: one of the others comes from another resolver, or they cannot be added up.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """An adapter that a plugin knows, or a place that it could not read (then with a `problem` and without a name)."""

    name: str
    reference: str
    """The argument for `use_adapter`."""
    source: str = ""
    """Where it was found, in the plugin's words."""
    base_model: str | None = None
    digest: str | None = None
    path: Path | None = None
    """Its file or folder."""
    size: int | None = None
    """Bytes of its weights."""
    rank: int | None = None
    """Of most of its modules."""
    verdict: Verdict | None = None
    """Whether it fits the model that was asked about."""
    problem: str | None = None
    """Why it cannot be used, or why its source could not be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedAdapter:
    """An adapter that the provider can use."""

    name: str
    digest: str
    model: str
    """The model to request: a derived model, or the base model if the adapter has a slot."""
    slot: int | None = None
    """The engine's number for it, if the engine switches adapters per request."""
    scale: float = 1.0
    strategy: str = ""
    """How it was loaded, in the provider's words."""
    warnings: tuple[str, ...] = ()
    parts: tuple[tuple[LoadedAdapter, float], ...] = ()
    """Several at once, or one with a weight other than 1: the loaded adapters, each with its weight. Only for a
    provider with the feature `adapter_weights`."""

    @property
    def weights(self) -> tuple[tuple[LoadedAdapter, float], ...]:
        """Each adapter to apply, with the factor on its own scale."""
        return self.parts or ((self, 1.0),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmed:
    """A prompt that has been read ahead; the result of `Client.warm`."""

    tokens: int | None = None
    """Tokens of the prompt; `None` if the server does not say."""
    cached_tokens: int | None = None
    """Those that did not have to be read again."""
    saved: int | None = None
    """Bytes on disk from which a later process can continue; `None` if nothing was saved."""
    warnings: tuple[str, ...] = ()


# --- Counters --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What a client has done so far; the result of `Client.stats`."""

    calls: int = 0
    failures: int = 0
    retries: int = 0
    running: int = 0
    """Calls and streams that have not ended."""
    waiting: int = 0
    """Calls that wait for a slot."""
    input_tokens: int = 0
    output_tokens: int = 0
    events_dropped: int = 0
    """Events that observers missed because they were too slow."""
    active_adapter: str | None = None


# --- Moved -----------------------------------------------------------------------------------------------------------

if not TYPE_CHECKING:  # A type checker must go on to refuse unknown names.
    _CALLS: Final = (
        "Call ChatRequest CloseRequest EmbedRequest Event GenerateRequest HealthRequest LimitsQuery LoadAdapterRequest"
        " LoadModelRequest ModelRequest ModelsRequest PruneAdaptersRequest ResolveRequest UnloadAdapterRequest"
    )
    _MOVED: Final = {
        **dict.fromkeys(_CALLS.split(), "graftage.calls"),
        "ConnectRequest": "graftage.hookspecs",
        "Transport": "graftage.http",
    }

    def __getattr__(name: str) -> Any:
        """Return what hooks are given, which plugins written for an earlier release import from here."""
        if name not in _MOVED:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib
        import warnings

        from graftage._deprecations import deprecation

        new = f"`{_MOVED[name]}.{name}`"
        warnings.warn(deprecation(f"`graftage.types.{name}`", since="0.3", instead=new), stacklevel=2)
        return getattr(importlib.import_module(_MOVED[name]), name)
