"""A provider without a model: it plays a script, or repeats the prompt.

    echo = Echo(["Hello!", ConnectionFailed("gone"), [Chunk(text="Hel"), StreamInterrupted("cut")]])
    with graftage.connect(echo, model="echo:latest") as llm:
        assert llm.chat("Hi").text == "Hello!"

It implements every hook of a connection, records its requests, and opens no network connection.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import math
import re
import threading
import time
from collections import deque
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from graftage.calls import Call, ChatRequest, GenerateRequest
from graftage.exceptions import ModelNotFound, ProviderTimeout, StreamInterrupted
from graftage.hookspecs import hookimpl
from graftage.types import (
    HEALTH_LEVELS,
    Capabilities,
    Chunk,
    Embeddings,
    Health,
    LoadedAdapter,
    LoadedModel,
    ModelInfo,
    PullProgress,
    Ranked,
    Ranking,
    Reply,
    Timings,
    ToolCall,
    Usage,
    Warmed,
    canonical_name,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence

    from graftage.calls import (
        CloseRequest,
        EmbedRequest,
        HealthRequest,
        LoadAdapterRequest,
        LoadModelRequest,
        ModelRequest,
        ModelsRequest,
        PruneAdaptersRequest,
        RerankRequest,
        UnloadAdapterRequest,
    )
    from graftage.hookspecs import ConnectRequest

__all__ = ["Echo", "Pause"]


@dataclass(frozen=True)
class Pause:
    """Holds a stream between two chunks of a script until it is released.

    The time limits of the stream still apply, and closing the connection ends the pause: a test that forgets to release
    it fails, and does not hang.
    """

    gate: threading.Event = field(default_factory=threading.Event)
    """Set it, or call `release`, to let the stream go on."""
    reached: threading.Event = field(default_factory=threading.Event)
    """Set when the stream reaches the pause."""

    def release(self) -> None:
        """Let the stream go on."""
        self.gate.set()


Item: TypeAlias = "Chunk | Exception | Pause"
Answer: TypeAlias = "str | ToolCall | Reply | Exception | Sequence[Item]"
Step: TypeAlias = "Answer | Callable[[Any], Answer]"

OPTIONS: Final = frozenset(
    {
        "frequency_penalty",
        "logprobs",
        "min_p",
        "presence_penalty",
        "repeat_penalty",
        "seed",
        "server",
        "stop",
        "temperature",
        "top_k",
        "top_logprobs",
        "top_p",
    }
)
_OPERATIONS: Final = (
    "chat",
    "generate",
    "embed",
    "list_models",
    "show_model",
    "loaded_models",
    "pull_model",
    "load_model",
    "unload_model",
    "delete_model",
    "count_tokens",
    "rerank",
    "load_adapter",
    "unload_adapter",
    "prune_adapters",
    "warm",
)
_ACCEPTED: Final = frozenset({"tools", "tool_choice", "structured_output", "thinking", "images", "logprobs", "suffix"})
_PARAMETERS: Final = frozenset({"keep_alive", "context_window", "max_tokens"})
_CONTEXT_WINDOW: Final = 8192
_DIMENSIONS: Final = 8
_MODEL_SIZE: Final = 1_000_000
_POLL_INTERVAL: Final = 0.002
"""Seconds between two checks of a pause. Polling leaves no thread behind a cancelled task."""

_counter = itertools.count(1)


class Echo:
    """A provider plugin that plays a script, call by call, and then repeats the last message.

    Each step of the script answers one `chat` or `generate`:

    - a string: the reply, word by word, with its usage counted in words and the finish reason `stop`;
    - a `ToolCall`: the model calls it;
    - a `Reply`: its thinking, its text word by word, its tool calls; a `finish_reason` or `usage` in it is used;
    - an exception: raised when the hook is called;
    - a sequence of chunks, in which an exception is raised where it stands and a `Pause` holds the stream;
    - a function of the request that returns one of these.
    """

    name = "echo"

    def __init__(  # All but the script are keyword-only.
        self,
        script: Iterable[Step] = (),
        *,
        models: Iterable[str | ModelInfo] = ("echo:latest",),
        strict: bool = False,
        without: Iterable[str] = (),
        errors: Mapping[str, Exception] | None = None,
        address: str | None = None,
        adapter_weights: bool = False,
    ) -> None:
        """Build the plugin.

        Args:
            script: the steps; after them it echoes.
            models: its models, by name or with their facts.
            strict: raise `ModelNotFound` for any other model.
            without: hooks that its connections lack, such as `embed`.
            errors: what other operations than those of the script raise, by name; `health` reports it instead.
            address: the connection's address; by default a unique one, so that two tests never share slots.
            adapter_weights: switch adapters with each request, several at once and with weights, instead of making a
                model of each one. The model of a reply names them, such as `echo:latest+style+0.6*domain`.
        """
        self.adapter_weights = adapter_weights
        self.strict = strict
        self.errors = dict(errors or {})
        self.address = address or f"echo/{next(_counter)}"
        self.connections: list[Any] = []
        """Every connection that was made."""
        self.calls: list[tuple[str, Any]] = []
        """Every hook that was called, with its request."""
        self.running = 0
        """The number of open streams."""
        self.lock = threading.Lock()
        self.models = {info.name: info for info in map(_model_info, models)}
        self.loaded: dict[str, LoadedModel] = {}
        self.derived: set[str] = set()
        """Names of the models that were made for adapters."""
        self.slots: dict[str, int] = {}
        """With `adapter_weights`: the slots of adapters, by digest."""
        self._script = deque(script)
        self._kind = _connection_class(frozenset(without))

    @property
    def requests(self) -> list[Any]:
        """Every request, in order, without those to connect and to close."""
        with self.lock:
            return [request for hook, request in self.calls if hook not in {"connect", "close"}]

    @property
    def closed(self) -> bool:
        """Whether connections were made and all are closed."""
        return bool(self.connections) and all(each.closed for each in self.connections)

    @hookimpl
    def connect(self, request: ConnectRequest) -> object:
        """Return a connection with all hooks but those left out."""
        connection = self._kind(self)
        with self.lock:
            self.calls.append(("connect", request))
            self.connections.append(connection)
        return connection

    def note(self, hook: str, request: object) -> None:
        """Record a call, and raise its error, if any."""
        with self.lock:
            self.calls.append((hook, request))
        if error := self.errors.get(hook):
            raise error

    def next_step(self, request: Any) -> Answer:
        """Return the next step of the script."""
        with self.lock:
            step = self._script.popleft() if self._script else _last_message(request)
        return step(request) if callable(step) else step


class _EchoBase:
    """The code behind the hooks, under private names: a hook that is left out is truly missing."""

    def __init__(self, echo: Echo) -> None:
        self._echo = echo
        self.address = echo.address
        self.closed = False

    def _close(self, hook: str, request: CloseRequest) -> None:
        self._echo.note(hook, request)
        self.closed = True

    # Streams

    def _open(self, hook: str, request: ChatRequest | GenerateRequest) -> Iterator[Item]:
        self._echo.note(hook, request)
        model = _with_adapters(request.model, request.adapter)
        self._check_model(request.model, hook)
        self._load(request.model, request.context_window)
        answer = self._echo.next_step(request)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, ToolCall):
            answer = Reply(text="", tool_calls=(answer,))
        if isinstance(answer, str):
            answer = Reply(text=answer)
        return _chunks(answer, request, model) if isinstance(answer, Reply) else iter(answer)

    async def _play(self, request: ChatRequest | GenerateRequest, items: Iterator[Item]) -> AsyncGenerator[Chunk, None]:
        with self._running():
            started = False
            for item in items:
                if isinstance(item, Pause):
                    for _ in self._hold(item, request.call, started=started):
                        await request.call.sleep(_POLL_INTERVAL)
                elif isinstance(item, Exception):
                    raise item
                else:
                    started = True
                    yield item

    def _hold(self, pause: Pause, call: Call, *, started: bool) -> Iterator[None]:
        """Yield while the pause lasts; the caller sleeps each time."""
        phase: Literal["idle", "first_token", "total"] = "idle" if started else "first_token"
        until = time.monotonic() + (call.timeouts.idle if started else call.timeouts.first_token)
        if call.deadline < until:
            phase, until = "total", call.deadline
        pause.reached.set()
        while not pause.gate.is_set():
            if self.closed:
                raise StreamInterrupted("The connection was closed during the reply.", provider=Echo.name)
            if time.monotonic() > until:
                raise ProviderTimeout("The script paused for too long.", phase=phase, provider=Echo.name)
            yield

    @contextmanager
    def _running(self) -> Iterator[None]:
        with self._echo.lock:
            self._echo.running += 1
        try:
            yield
        finally:
            with self._echo.lock:
                self._echo.running -= 1

    # Other operations

    def _embed(self, hook: str, request: EmbedRequest) -> Embeddings:
        self._echo.note(hook, request)
        self._check_model(request.model, hook)
        self._load(request.model, request.context_window)
        return Embeddings(
            vectors=tuple(_vector(text, request.dimensions or _DIMENSIONS) for text in request.inputs),
            model=request.model,
            provider=Echo.name,
            usage=Usage(input_tokens=sum(len(text.split()) for text in request.inputs)),
        )

    def _count_tokens(self, hook: str, request: ChatRequest) -> int:
        self._echo.note(hook, request)
        self._check_model(request.model, hook)
        return max(_count_words(request), 1)

    def _rerank(self, hook: str, request: RerankRequest) -> Ranking:
        """Score each document by the number of words that it shares with the query."""
        self._echo.note(hook, request)
        self._check_model(request.model, hook)
        wanted = set(request.query.lower().split())
        scores = (len(wanted & set(each.lower().split())) for each in request.documents)
        return Ranking(
            results=tuple(Ranked(index=place, score=float(score)) for place, score in enumerate(scores)),
            usage=Usage(input_tokens=sum(len(each.split()) for each in (request.query, *request.documents))),
        )

    def _health(self, hook: str, request: HealthRequest) -> Health:
        try:
            self._echo.note(hook, request)
        except Exception as error:  # noqa: BLE001 # the contract: `health` reports errors
            return Health(level=request.level, reachable=False, address=self.address, error=error)
        name = canonical_name(request.model) if request.model else None
        present = name in self._echo.models or not self._echo.strict
        # A check that a model answers also loads it.
        answers = present and request.level == "answers"
        if answers and request.model:
            self._load(request.model, None)
        levels: dict[str, bool] = {
            "api": True,
            "model_present": present,
            "model_loaded": name in self._echo.loaded,
            "answers": answers,
        }
        asked = HEALTH_LEVELS[1 : HEALTH_LEVELS.index(request.level) + 1]
        return Health(
            level=request.level,
            reachable=True,
            version="echo",
            address=self.address,
            model=request.model,
            latency=0.0,
            **{level: levels[level] for level in asked},  # type: ignore[arg-type] # the names are levels
        )

    def _list_models(self, hook: str, request: ModelsRequest) -> tuple[ModelInfo, ...]:
        self._echo.note(hook, request)
        with self._echo.lock:
            return tuple(self._echo.models.values())

    def _show_model(self, hook: str, request: ModelRequest) -> ModelInfo:
        self._echo.note(hook, request)
        self._check_model(request.model, hook)
        return self._echo.models.get(canonical_name(request.model)) or _model_info(request.model)

    def _loaded_models(self, hook: str, request: ModelsRequest) -> tuple[LoadedModel, ...]:
        self._echo.note(hook, request)
        with self._echo.lock:
            return tuple(self._echo.loaded.values())

    def _pull(self, request: ModelRequest) -> Iterator[PullProgress]:
        info = _model_info(request.model)
        total = info.size or 0
        yield PullProgress(status="pulling manifest")
        for completed in (0, total // 2, total):
            yield PullProgress(status=f"pulling {info.name}", digest=info.digest, total=total, completed=completed)
        with self._echo.lock:
            self._echo.models.setdefault(info.name, info)
        yield PullProgress(status="success")

    def _load_model(self, hook: str, request: LoadModelRequest) -> None:
        self._echo.note(hook, request)
        self._check_model(request.model, hook)
        self._load(request.model, request.context_window)

    def _unload_model(self, hook: str, request: ModelRequest) -> None:
        self._echo.note(hook, request)
        self._forget(request.model)

    def _delete_model(self, hook: str, request: ModelRequest) -> None:
        self._echo.note(hook, request)
        name = canonical_name(request.model)
        with self._echo.lock:
            gone = self._echo.models.pop(name, None)
            self._echo.derived.discard(name)
        self._forget(name)
        if gone is None:
            raise self._no_model(request.model, hook)

    def _load_adapter(self, hook: str, request: LoadAdapterRequest) -> LoadedAdapter:
        """Act like a server that keeps an adapter as a separate model, or in a slot."""
        self._echo.note(hook, request)
        self._check_model(request.model, hook)
        adapter = request.adapter
        if self._echo.adapter_weights:
            with self._echo.lock:
                slot = self._echo.slots.setdefault(adapter.digest, len(self._echo.slots))
            return LoadedAdapter(
                name=adapter.name, digest=adapter.digest, model=request.model, slot=slot, strategy="slot"
            )
        derived = f"{request.model}+{adapter.name}"
        with self._echo.lock:
            self._echo.models.setdefault(canonical_name(derived), _model_info(derived))
            self._echo.derived.add(canonical_name(derived))
        self._load(derived, request.context_window)
        return LoadedAdapter(
            name=adapter.name, digest=adapter.digest, model=derived, scale=adapter.scale, strategy="derived"
        )

    def _unload_adapter(self, hook: str, request: UnloadAdapterRequest) -> None:
        self._echo.note(hook, request)
        if not self._echo.adapter_weights:
            self._forget(request.adapter.model)

    def _prune_adapters(self, hook: str, request: PruneAdaptersRequest) -> tuple[ModelInfo, ...]:
        self._echo.note(hook, request)
        with self._echo.lock:
            gone = sorted(self._echo.derived - set(request.keep))
            found = tuple(self._echo.models[name] for name in gone)
            for name in () if request.dry_run else gone:
                self._echo.derived.discard(name)
                self._echo.models.pop(name, None)
                self._echo.loaded.pop(name, None)
        return found

    def _warm(self, hook: str, request: ChatRequest) -> Warmed:
        self._echo.note(hook, request)
        self._check_model(request.model, hook)
        self._load(request.model, request.context_window)
        return Warmed(tokens=_count_words(request), cached_tokens=0)

    def _load(self, model: str, context_window: int | None) -> None:
        name = canonical_name(model)
        with self._echo.lock:
            info = self._echo.models.get(name) or _model_info(name)
            self._echo.loaded[name] = LoadedModel(
                name=name,
                digest=info.digest,
                size=info.size,
                accelerator_size=info.size,
                context_window=context_window or info.context_window,
            )

    def _forget(self, model: str) -> None:
        with self._echo.lock:
            self._echo.loaded.pop(canonical_name(model), None)

    def _check_model(self, model: str, hook: str) -> None:
        if self._echo.strict and canonical_name(model) not in self._echo.models:
            raise self._no_model(model, hook)

    def _no_model(self, model: str, hook: str) -> ModelNotFound:
        close = difflib.get_close_matches(canonical_name(model), self._echo.models, n=3)
        return ModelNotFound(
            f"There is no model `{model}`.",
            hint="Pull it, or give `Echo` its name.",
            provider=Echo.name,
            model=model,
            operation=hook,
            status=404,
            suggestions=close,
        )


class EchoConnection(_EchoBase):
    """The connection of `Echo`, with every hook of the contract."""

    @hookimpl
    async def chat(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        async with aclosing(self._play(request, self._open("chat", request))) as chunks:
            async for chunk in chunks:
                yield chunk

    @hookimpl
    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        async with aclosing(self._play(request, self._open("generate", request))) as chunks:
            async for chunk in chunks:
                yield chunk

    @hookimpl
    async def embed(self, request: EmbedRequest) -> Embeddings:
        return self._embed("embed", request)

    @hookimpl
    async def count_tokens(self, request: ChatRequest) -> int:
        return self._count_tokens("count_tokens", request)

    @hookimpl
    async def rerank(self, request: RerankRequest) -> Ranking:
        return self._rerank("rerank", request)

    @hookimpl
    async def health(self, request: HealthRequest) -> Health:
        return self._health("health", request)

    @hookimpl
    async def list_models(self, request: ModelsRequest) -> tuple[ModelInfo, ...]:
        return self._list_models("list_models", request)

    @hookimpl
    async def show_model(self, request: ModelRequest) -> ModelInfo:
        return self._show_model("show_model", request)

    @hookimpl
    async def loaded_models(self, request: ModelsRequest) -> tuple[LoadedModel, ...]:
        return self._loaded_models("loaded_models", request)

    @hookimpl
    async def pull_model(self, request: ModelRequest) -> AsyncIterator[PullProgress]:
        self._echo.note("pull_model", request)
        for step in self._pull(request):
            yield step

    @hookimpl
    async def load_model(self, request: LoadModelRequest) -> None:
        self._load_model("load_model", request)

    @hookimpl
    async def unload_model(self, request: ModelRequest) -> None:
        self._unload_model("unload_model", request)

    @hookimpl
    async def delete_model(self, request: ModelRequest) -> None:
        self._delete_model("delete_model", request)

    @hookimpl
    async def load_adapter(self, request: LoadAdapterRequest) -> LoadedAdapter:
        return self._load_adapter("load_adapter", request)

    @hookimpl
    async def unload_adapter(self, request: UnloadAdapterRequest) -> None:
        self._unload_adapter("unload_adapter", request)

    @hookimpl
    async def prune_adapters(self, request: PruneAdaptersRequest) -> tuple[ModelInfo, ...]:
        return self._prune_adapters("prune_adapters", request)

    @hookimpl
    async def warm(self, request: ChatRequest) -> Warmed:
        return self._warm("warm", request)

    @hookimpl
    def capabilities(self) -> Capabilities:
        present = {name for name in _OPERATIONS if hasattr(self, name)}
        present |= {"adapter_weights"} if self._echo.adapter_weights else set()
        return Capabilities(features=_ACCEPTED | present, options=OPTIONS, parameters=_PARAMETERS)

    @hookimpl
    async def close(self, request: CloseRequest) -> None:
        self._close("close", request)


def _connection_class(without: frozenset[str]) -> Callable[[Echo], Any]:
    """Return `EchoConnection`, or a copy without some hooks: a subclass would still have them."""
    hooks = {name: value for name, value in vars(EchoConnection).items() if hasattr(value, "graftage_impl")}
    if unknown := without - hooks.keys():
        raise ValueError(f"`Echo` has no hooks {sorted(unknown)} to leave out; it has {sorted(hooks)}")
    if not without:
        return EchoConnection
    kept = {name: hook for name, hook in hooks.items() if name not in without}
    return type("EchoConnection", (_EchoBase,), kept)


def _last_message(request: ChatRequest | GenerateRequest) -> str:
    if isinstance(request, GenerateRequest):
        return request.prompt
    return next((each.content for each in reversed(request.messages) if each.role == "user"), "")


def _chunks(reply: Reply, request: ChatRequest | GenerateRequest, model: str) -> Iterator[Chunk]:
    """Yield a chunk for each word with its spaces, and a last one with the finish reason."""
    words = re.findall(r"^\s+|\S+\s*", reply.text)
    allowed = words[: request.max_tokens]
    counted = Usage(input_tokens=_count_words(request), output_tokens=len(allowed))
    if reply.thinking:
        yield Chunk(thinking=reply.thinking)
    for word in allowed:
        yield Chunk(text=word)
    yield Chunk(
        tool_calls=reply.tool_calls,
        logprobs=reply.logprobs,
        finish_reason=reply.finish_reason or ("stop" if len(allowed) == len(words) else "length"),
        usage=counted if reply.usage == Usage() else reply.usage,
        timings=Timings(total=0.0, load=0.0, prompt=0.0, generation=0.0),
        model=model,
        raw={"model": model, "done": True},
    )


def _count_words(request: ChatRequest | GenerateRequest) -> int:
    if isinstance(request, GenerateRequest):
        return len(request.prompt.split())
    return sum(len(each.content.split()) for each in request.messages)


def _model_info(model: str | ModelInfo) -> ModelInfo:
    if isinstance(model, ModelInfo):
        return model
    name = canonical_name(model)
    return ModelInfo(
        name=name,
        digest="sha256:" + hashlib.sha256(name.encode()).hexdigest(),
        size=_MODEL_SIZE,
        family="echo",
        architecture="echo",
        context_window=_CONTEXT_WINDOW,
        features=_ACCEPTED | {"chat", "generate", "embed"},
    )


def _with_adapters(model: str, adapter: LoadedAdapter | None) -> str:
    """Return what a request's adapters make of its model, as a name."""
    if adapter is None or not (adapter.parts or adapter.slot is not None):
        return adapter.model if adapter else model
    names = (each.name if weight == 1 else f"{weight:g}*{each.name}" for each, weight in adapter.weights)
    return "+".join((model, *names))


def _vector(text: str, dimensions: int) -> tuple[float, ...]:
    """Return a unit vector that depends only on the text."""
    digests = (hashlib.sha256(f"{place} {text}".encode()).digest() for place in range(dimensions))
    numbers = [int.from_bytes(digest[:4], "big") / 2**31 - 1 for digest in digests]
    length = math.sqrt(sum(number**2 for number in numbers)) or 1.0
    return tuple(number / length for number in numbers)
