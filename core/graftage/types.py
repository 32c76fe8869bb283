"""The data that a host sees: messages, answers, models, limits, adapters. What hooks are given is in `calls`.

Everything here is frozen and keyword-only, and grows by fields with defaults: a plugin written for this release still
works with the next. An unknown figure is `None`, never 0. Durations are seconds, sizes are bytes.
"""

from __future__ import annotations

import contextlib
import enum
import math
import re
from collections.abc import Callable, Iterable, Mapping
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
    "ModelInfo",
    "Operation",
    "Phase",
    "PromptProgress",
    "PullProgress",
    "Ranked",
    "Ranking",
    "Reply",
    "Role",
    "Stats",
    "Timeouts",
    "Timings",
    "Tool",
    "ToolCall",
    "Usage",
    "Vectors",
    "Verdict",
    "canonical_name",
]

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter", "unload", "load", "other"]
"""Why an answer ended. Readers must tolerate new values; the server's own word is in `raw`."""
Feature: TypeAlias = Literal[
    "chat",
    "generate",
    "embed",
    "tools",
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
    "unload_adapter",
    "prune_adapters",
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
"""Stands for "the adapter that `use_adapter` made active"; `None` means the base model."""
AdapterChoice: TypeAlias = "str | Path | Literal[_Unset.ACTIVE] | None"


# --- Messages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A picture that goes with a message."""

    data: bytes = field(default=b"", repr=False)
    """The encoded picture (PNG, JPEG, WebP), as it is in its file."""
    path: str | Path | None = None
    """The file to read it from, instead of `data`. A provider gets `data` alone."""
    media_type: str | None = None
    """Such as `image/png`; None where it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A function the model wants called."""

    name: str
    arguments: Mapping[str, Any]
    """The arguments as the model wrote them: untrusted, and not checked against the tool's schema."""
    id: str
    """Names this call when its result is sent back."""


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
    """On a message with role `tool`: the function whose result this is."""
    tool_call_id: str | None = None
    """On a message with role `tool`: the `ToolCall.id` this answers."""
    thinking: str | None = None
    """What the model thought before it answered."""
    name: str | None = None
    """Who speaks, where several share a role; few servers and templates have a place for it."""


# --- Answers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens counted by the server; a count that cannot be is unknown."""

    input_tokens: int | None = None
    """Of the whole prompt, with what the server had in its cache."""
    output_tokens: int | None = None

    @property
    def total_tokens(self) -> int | None:
        """Input and output together, where both are known."""
        if self.input_tokens is None or self.output_tokens is None:
            return None
        return self.input_tokens + self.output_tokens

    def __add__(self, other: Usage) -> Usage:
        """That of several answers together; what one of them does not know is not known."""
        names = (each.name for each in fields(self))
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return Usage(**{name: None if None in pair else sum(pair) for name, pair in pairs.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time went, in seconds: `first_chunk` and `wall` by the client's clock, the rest as the server says."""

    total: float | None = None
    load: float | None = None
    """Bringing the model into memory."""
    prompt: float | None = None
    """Reading the prompt."""
    generation: float | None = None
    first_chunk: float | None = None
    """From the call to the first chunk, waiting for a slot included."""
    wall: float | None = None
    """From the call to the last chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """A token that was chosen, and how probable it was."""

    token: str
    logprob: float
    """Natural logarithm of the probability."""
    top: tuple[Logprob, ...] = ()
    """The most probable tokens at this place, where they were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of an answer as a provider yields it. The last one, and no other, has a `finish_reason`."""

    text: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    finish_reason: str | None = None
    """A provider gives the server's word, empty where the server gave none; a host gets a `FinishReason`."""
    usage: Usage | None = None
    timings: Timings | None = None
    model: str | None = None
    """The model that answered, in the server's words."""
    warnings: tuple[str, ...] = ()
    raw: Mapping[str, Any] | None = field(default=None, repr=False)
    """On the last chunk: what the server sent, unchanged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A whole answer, or as much of one as there is (`finish_reason` is then `None`)."""

    text: str
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    parsed: Any = None
    """With `format`: the text as an instance of the pydantic model, or as plain data."""
    finish_reason: FinishReason | None = None
    usage: Usage = Usage()
    timings: Timings = Timings()
    model: str = ""
    provider: str = ""
    """Who answered."""
    adapter: str | None = None
    """The adapter that answered, or `None` for the base model."""
    limits: Limits | None = None
    """What the policies allowed, and why."""
    warnings: tuple[str, ...] = ()
    attempts: int = 1
    """How often the model was asked until its answer fitted the `format`; `usage` is that of all its answers."""
    raw: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def message(self) -> Message:
        """The answer as the next message of the conversation."""
        return Message(role="assistant", content=self.text, tool_calls=self.tool_calls, thinking=self.thinking or None)

    def __str__(self) -> str:
        return self.text


_NOT_FINITE: Final = "a vector that holds what is no finite number"


class Vectors(tuple[tuple[float, ...], ...]):
    """Vectors of one length, as tuples of finite floats; `numpy()` gives them as one array."""

    __slots__ = ()

    def __new__(cls, vectors: Iterable[Iterable[float]] = ()) -> Self:
        """Check them, and make floats of all numbers.

        Raises:
            TypeError: there is no sequence of vectors.
            ValueError: one is empty or longer than another, or holds what is no finite number.
        """
        return vectors if type(vectors) is cls else cls._of(_floats(vectors))

    @classmethod
    def _of(cls, vectors: tuple[tuple[float, ...], ...]) -> Self:
        """Take what is known to be tuples of floats, and check the rest."""
        lengths = sorted(set(map(len, vectors)))
        if lengths and not lengths[0]:
            raise ValueError("an empty vector")
        if len(lengths) > 1:
            raise ValueError(f"vectors of different lengths, from {lengths[0]} to {lengths[-1]} numbers")
        # The sum is quick, but that of huge numbers is infinite, too.
        if not all(map(math.isfinite, map(sum, vectors))) and not all(map(math.isfinite, chain.from_iterable(vectors))):
            raise ValueError(_NOT_FINITE)
        return super().__new__(cls, vectors)

    def __repr__(self) -> str:
        return f"<Vectors {len(self)} x {len(self[0]) if self else 0}>"

    def numpy(self, dtype: DTypeLike = "float32") -> NDArray[Any]:
        """A new array of the shape (vectors, numbers in each).

        Args:
            dtype: the kind of number; models compute in no finer one than `float32`.

        Raises:
            ImportError: NumPy, which Graftage does not need, is not installed.
        """
        try:
            import numpy as np  # Slow to import, and often not there
        except ImportError as error:
            raise ImportError("`numpy()` needs NumPy: `pip install numpy`.", name="numpy") from error
        shape = len(self), len(self[0]) if self else 0
        return np.fromiter(chain.from_iterable(self), dtype, shape[0] * shape[1]).reshape(shape)


def _floats(vectors: Iterable[Iterable[float]]) -> tuple[tuple[float, ...], ...]:
    """The vectors as tuples of floats, where all are real numbers and no truth values."""
    import msgspec

    with contextlib.suppress(msgspec.ValidationError):
        return msgspec.convert(vectors, tuple[tuple[float, ...], ...])
    # There is some other sequence or number, or something is wrong.
    from numbers import Real

    try:
        found = tuple(map(tuple, vectors))
    except TypeError:
        raise TypeError("what is no sequence of vectors") from None
    kinds = set().union(*(map(type, each) for each in found))
    with contextlib.suppress(OverflowError):  # A whole number may be larger than any float.
        if bool not in kinds and all(issubclass(each, Real) for each in kinds):
            return tuple(tuple(map(float, each)) for each in found)
    raise ValueError(_NOT_FINITE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """One vector for each input, in the order of the inputs."""

    vectors: Vectors = field(repr=False)
    """As tuples of floats, or as one array: `vectors.numpy()`. A provider gives any sequences of numbers."""
    model: str = ""
    provider: str = ""
    usage: Usage = Usage()
    timings: Timings = Timings()
    limits: Limits | None = None
    warnings: tuple[str, ...] = ()

    if TYPE_CHECKING:  # What builds one may give less than it reads.

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
        with contextlib.suppress(TypeError, ValueError):  # What are no vectors the core refuses, and says whose.
            object.__setattr__(self, "vectors", Vectors(given))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """How well one document answers a query."""

    index: int
    """Its place among the documents of the request, from 0."""
    score: float
    """The higher, the better; scores of different models, or for different queries, cannot be compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Each document of a request once, the best first. A provider may give them in any order."""

    results: tuple[Ranked, ...]
    model: str = ""
    provider: str = ""
    usage: Usage = Usage()
    timings: Timings = Timings()
    limits: Limits | None = None
    warnings: tuple[str, ...] = ()


# --- Models ----------------------------------------------------------------------------------------------------------


_FILE: Final = re.compile(r"[/~.\\]|[a-z]:\\|hf://|[^:]*\.gguf$", re.IGNORECASE)
_DEFAULTS: Final = ("https://", "http://", "registry.ollama.ai/", "library/")
"""What a name may begin with and need not, from the outermost."""


def canonical_name(name: str) -> str:
    """A model's name for comparing: in lower case, tag included, without what Ollama adds where it is left out.

    So `Llama3.2`, `library/llama3.2` and `registry.ollama.ai/library/llama3.2:latest` are all `llama3.2:latest`, and
    `hf.co/Owner/Model:Q4_0` is `hf.co/owner/model:q4_0`: Ollama heeds case in no name. The path of a file, or
    `hf://org/repo/file.gguf`, stays as it is, since there case counts.
    """
    name = name.strip()
    if _FILE.match(name):
        return name
    name = name.lower()
    for prefix in _DEFAULTS:
        name = name.removeprefix(prefix)
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What is known of a model. A list knows less than `show`; what is not known is `None`."""

    name: str
    """As a request names it: `gpt-4o`; where the server has tags, with its tag: `llama3.2:latest`."""
    digest: str | None = None
    size: int | None = None
    """Bytes on disk."""
    modified_at: datetime | None = None
    family: str | None = None
    architecture: str | None = None
    parameters: str | None = None
    """Number of parameters in the server's words: `134.52M`."""
    quantization: str | None = None
    context_window: int | None = None
    """The largest window the model was trained for, in tokens."""
    features: frozenset[str] | None = None
    """Names of `Feature` this model has; `None` where the server does not tell."""
    parent: str | None = None
    """The model this one was made from."""
    adapters: tuple[str, ...] = ()
    """Digests of the adapters inside it."""
    template: str | None = None
    system: str | None = None
    licence: str | None = None
    path: Path | None = None
    """The model's file, where it is on this machine and readable."""
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The GGUF keys with their arrays, or the like."""
    tensors: Mapping[str, tuple[int, ...]] | None = field(default=None, repr=False)
    """The shape of each tensor, by name, where the server tells."""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model in memory."""

    name: str
    digest: str | None = None
    size: int | None = None
    """Bytes in memory, all together."""
    accelerator_size: int | None = None
    """Bytes of those on the accelerator."""
    expires_at: datetime | None = None
    """When it will be unloaded; `None` for unknown or never."""
    context_window: int | None = None
    """The window it was loaded with, in tokens."""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PullProgress:
    """A step of a download. The last one of a pull that worked has the status `success`."""

    status: str
    digest: str | None = None
    total: int | None = None
    completed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptProgress:
    """How far a model has read a prompt, in tokens."""

    total: int
    processed: int
    """Those of the cache included."""
    cached: int = 0
    """Tokens that it need not read again."""


HealthLevel: TypeAlias = Literal["reachable", "api", "model_present", "model_loaded", "answers"]
HEALTH_LEVELS: Final[tuple[HealthLevel, ...]] = ("reachable", "api", "model_present", "model_loaded", "answers")
"""Each level includes those before it; only `answers` makes the model work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """How far up the levels a provider is well. A level that was not looked at is `None`."""

    level: HealthLevel
    """The level that was asked for."""
    reachable: bool
    api: bool | None = None
    """The right service answers there."""
    model_present: bool | None = None
    model_loaded: bool | None = None
    answers: bool | None = None
    version: str | None = None
    """The server's version."""
    address: str | None = None
    model: str | None = None
    latency: float | None = None
    """Seconds the check took."""
    error: Exception | None = None
    """Why the first level that failed did."""
    cached: bool = False
    age: float = 0.0
    """Seconds since it was measured."""

    @property
    def ok(self) -> bool:
        """Whether every level up to the one asked for is well."""
        upto = HEALTH_LEVELS[: HEALTH_LEVELS.index(self.level) + 1]
        return all(getattr(self, level) for level in upto)

    def raise_for_error(self) -> None:
        """Raise why it is not well; do nothing where it is.

        Raises:
            ProviderError: the failure that the check met.
        """
        if not self.ok:
            raise self.error or RuntimeError(f"the health check did not reach the level `{self.level}`")


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a provider can do, known without asking a server."""

    features: frozenset[str]
    """Names of `Feature`."""
    options: frozenset[str] = frozenset()
    """The names that `options` of a call may have. With `server` among them, `{"server": {...}}` gives options that the
    server alone knows; a provider finds them beside the others, and sends all."""
    parameters: frozenset[str] | None = None
    """Which of `keep_alive`, `context_window` and `max_tokens` it reads; `None` where it does not say. Another one that
    is set is a warning on the reply."""


# --- Limits ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a policy allows. An unset field does not limit."""

    context_window: int | None = None
    """Tokens."""
    max_tokens: int | None = None
    concurrent_requests: int | None = None
    """Requests at once on that server, from this process."""
    queued_requests: int | None = None
    """Requests that may wait for a slot; one more is `Overloaded`."""
    loaded_models: int | None = None
    keep_alive: float | None = None
    """Seconds; infinity is for ever."""
    keep_window: bool = False
    """The model is loaded with `context_window`: a caller who sets a smaller one gets this one, or it would be loaded
    again."""
    unload: tuple[str, ...] = ()
    """Idle models that the core unloads before the request is admitted; one in use is left alone."""
    wait_for: tuple[str, ...] = ()
    """Models whose requests must end first: while one is in use the request waits, then the policies are asked anew."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """For each field that is set, why: `{"context_window": "16 GB leave 4 GB for the cache"}`."""
    warnings: tuple[str, ...] = ()
    """Notes that go onto the reply."""

    def __post_init__(self) -> None:
        for name in ("context_window", "max_tokens", "concurrent_requests", "queued_requests", "loaded_models"):
            _check_figure(name, getattr(self, name), int)
        _check_figure("keep_alive", self.keep_alive, (int, float))
        for name in ("unload", "wait_for", "warnings"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(each, str) for each in value):
                raise ValueError(f"the limit `{name}` must be a tuple of texts, not {value!r}")


def _check_figure(name: str, value: Any, kind: type | tuple[type, ...]) -> None:
    right = isinstance(value, kind) and not isinstance(value, bool)
    if value is not None and not (right and value >= 0):
        raise ValueError(f"the limit `{name}` must be a number that is not negative, not {value!r}")


NEVER_APPLIES: Final = Limits()
"""What a policy answers that can never limit anything on this connection: it is not asked again."""


# --- Limits of time --------------------------------------------------------------------------------------------------


Phase: TypeAlias = Literal["connect", "first_token", "idle", "total"]
"""The limits on a call."""
LONGEST: Final = 366 * 86400.0
"""Seconds: more than that is a mistake, and some clocks of the system overflow."""


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
    """The whole call by the wall clock, all attempts included. A pull has `idle` only."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LONGEST:
                raise ValueError(
                    f"the timeout `{each.name}` must be a number of seconds above 0 and finite (a year at most), "
                    f"not {str(value)[:40]}"
                )


# --- Adapters --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether an adapter fits a base model."""

    status: Literal["compatible", "incompatible", "unknown"]
    reasons: tuple[str, ...] = ()
    """Every contradiction, or what is missing to know."""
    warnings: tuple[str, ...] = ()


def _merged_silently(_written: int, _total: int) -> None:
    """The `on_progress` of a merge that nobody watches."""


@runtime_checkable
class Adapter(Protocol):
    """A LoRA adapter that a resolver has found and checked. The provider decides how its server takes it."""

    @property
    def name(self) -> str:
        """A short name for people."""
        ...

    @property
    def digest(self) -> str:
        """`sha256:…` over the content that acts: equal adapters have equal digests."""
        ...

    @property
    def scale(self) -> float:
        """The strength it was made for (alpha by rank, with rank-stabilising counted)."""
        ...

    @property
    def verdict(self) -> Verdict:
        """Whether it fits the base model that the request named."""
        ...

    @property
    def served_as(self) -> str | None:
        """The model of the server that already carries it, where the reference named one."""
        ...

    def gguf(self, base: ModelInfo) -> Path:
        """A GGUF file of the adapter, converted for `base` where it was not one.

        Raises:
            AdapterError: it cannot be read or does not fit.
        """
        ...

    def merge(self, base_file: Path, out: Path, on_progress: Callable[[int, int], None] = _merged_silently) -> Path:
        """Write the base model with the adapter merged into it to `out`; nothing is left of it where that fails.

        Args:
            base_file: the base model in GGUF.
            out: the file to write.
            on_progress: told bytes written and bytes in all; an error that it raises ends the work.

        Raises:
            AdapterError: it cannot be read or does not fit.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """An adapter that a plugin knows of, not yet checked against a model."""

    name: str
    reference: str
    """What to give to `use_adapter`."""
    source: str = ""
    """Where it was found: a plugin's own word."""
    base_model: str | None = None
    digest: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedAdapter:
    """An adapter the provider can answer with."""

    name: str
    digest: str
    model: str
    """The model to ask for: a derived one, or the base where the adapter has a slot."""
    slot: int | None = None
    """The engine's number for it, where adapters are switched per request."""
    scale: float = 1.0
    strategy: str = ""
    """How it was made usable: a provider's own word."""
    warnings: tuple[str, ...] = ()


# --- Counters --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What a client has done so far, as `Client.stats` gives it."""

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
    """Events of which observers were not told, because they were too slow."""
    active_adapter: str | None = None
