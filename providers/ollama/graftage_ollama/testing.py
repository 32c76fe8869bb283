"""A server on loopback with Ollama's API, as correct or as faulty as a test needs.

    with FakeOllama() as fake:
        fake.script("/api/chat", Answer([{"error": "busy"}], status=503), Answer([b"{half a li"], ending="reset"))
        ...
        assert [seen.path for seen in fake.requests] == ["/api/chat", "/api/chat"]

Each scripted answer is sent once. After that, and on all other paths, it answers as Ollama 0.9 does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from http import HTTPStatus
from typing import IO, TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

from graftage.types import canonical_name

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

__all__ = ["Answer", "FakeOllama", "Seen"]

Piece: TypeAlias = "bytes | Mapping[str, Any] | threading.Event"
_DATE: Final = "2026-01-01T00:00:00Z"
_JSON: Final = "application/json; charset=utf-8"
_NDJSON: Final = "application/x-ndjson"
_OWN: Final = ("template", "system", "license", "messages", "parameters")
"""What a derived model may have of its own, besides files."""
_JOIN_TIMEOUT: Final = 5.0
"""Seconds that a thread has to end after its socket was shut; it needs far less."""


@dataclass(frozen=True)
class Answer:
    """What the server sends for one request."""

    chunks: Iterable[Piece] = ()
    """The body, in transfer chunks: bytes as they are, mappings as lines of JSON; an event is waited for.

    With `itertools.repeat`, it continues until the client closes the connection."""
    _: KW_ONLY
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    """Added to the usual ones, or in their place, even if that makes them wrong."""
    framing: Literal["chunked", "length", "none"] = "chunked"
    """How the reader finds the end of the body; with `none`, by the end of the connection."""
    ending: Literal["end", "close", "reset", "stall", "keep"] = "end"
    """After the chunks: end correctly; close early; reset; send nothing until the client closes; or keep the connection
    for the next request, also after `raw`."""
    delay: float = 0.0
    """Seconds before each chunk."""
    raw: bytes | None = None
    """Sent before the chunks in place of status and headers; the chunks are then sent without framing."""
    early: bool = False
    """Whether to answer before the body of the request is read. The connection then serves no other request."""


class Seen(NamedTuple):
    """A request the server got."""

    method: str
    path: str
    headers: dict[str, str]
    """By lower-case name."""
    body: Any
    """Parsed if it is JSON, else bytes; `None` if it is missing or was not read."""


class FakeOllama:
    """The server. Use it as a context manager: when the block ends, all threads and sockets are closed."""

    def __init__(
        self,
        *,
        models: Iterable[str] = ("smollm2:135m",),
        version: str = "0.9.3",
        reply: str = "Hello from the fake.",
        adapters: Literal["accepts", "refuses", "ignores"] = "accepts",
        address: str = "127.0.0.1",
    ) -> None:
        self.address = address
        """The IPv4 or IPv6 address it listens on."""
        self.version = version
        self.adapters = adapters
        """How it treats `adapters` in a request to create a model: `ignores` makes a plain copy and reports success."""
        self.blobs: dict[str, bytes] = {}
        """Uploaded files, by digest."""
        self.derived: dict[str, dict[str, Any]] = {}
        """The requests that created models, by model name."""
        self.models = [canonical_name(model) for model in models]
        self.reply = reply
        """Its reply to every chat and prompt, word by word."""
        self.loaded: list[str] = []
        """Models in memory."""
        self.requests: list[Seen] = []
        self.accepted = 0
        """Connections accepted so far, closed ones included."""
        self._scripts: defaultdict[str, deque[Answer]] = defaultdict(deque)
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}

    def __enter__(self) -> Self:
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        self._listener = socket.create_server((self.address, 0), family=family)
        self._acceptor = threading.Thread(target=self._accept, name="FakeOllama", daemon=True)
        self._acceptor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopping.set()
        # A connection ends `accept` on every system, a closed socket only on some.
        with contextlib.suppress(OSError), socket.create_connection(self._listener.getsockname()[:2]):
            pass
        self._acceptor.join(_JOIN_TIMEOUT)
        self._listener.close()
        with self._lock:
            still_open = list(self._connections.items())
        for connection, thread in still_open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(_JOIN_TIMEOUT)

    @property
    def url(self) -> str:
        """The address to pass as `host`."""
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def open_connections(self) -> int:
        """Connections that neither side has closed."""
        with self._lock:
            return len(self._connections)

    def script(self, path: str, *answers: Answer) -> None:
        """Queue answers for a path and any method."""
        with self._lock:
            self._scripts[path].extend(answers)

    # Connections

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            if self._stopping.is_set():
                connection.close()
                return
            # Small chunks must arrive as they are sent.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            thread = threading.Thread(target=self._serve, args=(connection,), name="FakeOllama", daemon=True)
            with self._lock:
                self._connections[connection] = thread
                self.accepted += 1
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        """Answer the requests of one connection until either side closes it."""
        try:
            with connection, connection.makefile("rb") as reader, contextlib.suppress(OSError):
                while (seen := _read_head(reader)) and not self._stopping.is_set():
                    answer = self._scripted(seen)
                    if answer is None or not answer.early:
                        seen = seen._replace(body=_parse(b"".join(_read_body(reader, seen.headers))))
                    with self._lock:
                        self.requests.append(seen)
                    if not self._send(connection, seen, answer or self._usual_answer(seen)):
                        return
        finally:
            with self._lock:
                del self._connections[connection]

    def _send(self, connection: socket.socket, seen: Seen, answer: Answer) -> bool:
        """Send an answer, and return whether the connection can serve another request."""
        framed = answer.framing if answer.raw is None else "none"
        ends_well = answer.ending == "keep" or (answer.ending == "end" and framed != "none")
        connection.sendall(_head(answer) if answer.raw is None else answer.raw)
        if seen.method == "HEAD" and answer.raw is None:
            return answer.ending in ("end", "keep")
        for piece in answer.chunks:
            self._stopping.wait(answer.delay)
            if isinstance(piece, threading.Event):
                self._wait_for(piece)
            elif data := _encode(piece):
                connection.sendall(b"%x\r\n%s\r\n" % (len(data), data) if framed == "chunked" else data)
            if self._stopping.is_set():
                return False
        if framed == "chunked" and ends_well:
            connection.sendall(b"0\r\n\r\n")
        _end(connection, answer.ending)
        return ends_well and not answer.early and seen.headers.get("connection", "").lower() != "close"

    def _wait_for(self, event: threading.Event) -> None:
        while not event.wait(0.01) and not self._stopping.is_set():
            pass

    # Answers

    def _scripted(self, seen: Seen) -> Answer | None:
        with self._lock:
            script = self._scripts[seen.path.partition("?")[0]]
            return script.popleft() if script else None

    def _usual_answer(self, seen: Seen) -> Answer:
        methods: tuple[str, ...] = ("GET", "HEAD")
        handlers: dict[str, Callable[[], Answer]] = {
            "/": lambda: _plain("Ollama is running"),
            "/api/version": lambda: _object({"version": self.version}),
            "/api/tags": lambda: _object({"models": [_tag(each, self._manifest(each)) for each in self.models]}),
            "/api/ps": lambda: _object({"models": [_loaded(each, self._manifest(each)) for each in self.loaded]}),
        }
        posts: dict[str, Callable[[Mapping[str, Any]], Answer]] = {
            "/api/show": self._show,
            "/api/chat": self._chat,
            "/api/generate": self._generate,
            "/api/embed": self._embed,
            "/api/pull": self._pull,
            "/api/push": self._push,
            "/api/create": self._create,
            "/api/copy": self._copy,
        }
        if seen.path.startswith("/api/blobs/"):
            return self._blob(seen)
        if seen.path == "/api/delete" and seen.method == "DELETE":
            return self._delete(seen.body or {})
        if post := posts.get(seen.path):
            methods = ("POST",)
            handlers[seen.path] = lambda: (
                post(seen.body) if isinstance(seen.body, Mapping) else _error("unexpected EOF", 400)
            )
        if seen.path not in handlers:
            return _plain("404 page not found", 404)
        return handlers[seen.path]() if seen.method in methods else _plain("405 method not allowed", 405)

    def _show(self, asked: Mapping[str, object]) -> Answer:
        model = canonical_name(str(asked.get("model", "")))
        if model not in self.models:
            return _error(f"model '{asked.get('model')}' not found", 404)
        with self._lock:
            return _object(self._facts(model, verbose=bool(asked.get("verbose"))))

    def _facts(self, model: str, *, verbose: bool) -> dict[str, Any]:
        made = self.derived.get(model, {})
        facts = self._facts(made["from"], verbose=verbose) if "from" in made else _facts(_digest(model))
        if files := made.get("files"):
            digest = next(iter(files.values()))
            facts |= {"modelfile": _modelfile(digest), "template": "{{ .Prompt }}", "parameters": ""}
            facts["model_info"] |= _gguf_values(self.blobs[digest])
        facts["modelfile"] += "".join(f"ADAPTER {_path(each)}\n" for each in made.get("adapters", {}).values())
        facts |= {name: made[name] for name in _OWN if name in made and name != "parameters"}
        if parameters := made.get("parameters"):
            facts["parameters"] = "\n".join(_parameters(parameters))
        facts["model_info"]["tokenizer.ggml.tokens"] = ["a", "b"] if verbose else None
        return facts

    def _manifest(self, model: str) -> str:
        """Return the digest of a model's manifest, which depends on its content alone."""
        made = {name: self.derived.get(model, {}).get(name) for name in ("from", "files", "adapters", *_OWN)}
        if not any(made.values()):
            return _digest(model)
        if not any(value for name, value in made.items() if name != "from"):
            return self._manifest(str(made["from"]))
        return f"sha256:{hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()}"

    def _create(self, asked: Mapping[str, Any]) -> Answer:
        model, base = canonical_name(str(asked.get("model", ""))), asked.get("from")
        digests = [*(asked.get("adapters") or {}).values(), *(asked.get("files") or {}).values()]
        if base is None and not asked.get("files"):
            return _error("neither 'from' or 'files' was specified", 400)
        if base is not None and canonical_name(base) not in self.models:
            return _error("pull model manifest: file does not exist", 500)
        if asked.get("adapters") and self.adapters == "refuses":
            return _error("creating models with adapters is not supported", 400)
        with self._lock:
            if missing := [each for each in digests if each not in self.blobs]:
                return _error(f"open {_path(missing[0])}: no such file or directory", 400)
            made = dict(asked)
            if base is not None:
                made["from"] = canonical_name(base)
            if self.adapters == "ignores":
                made.pop("adapters", None)
            self.derived[model] = made
            self.models = [*(each for each in self.models if each != model), model]
        return _object({"status": "success"}) if asked.get("stream") is False else Answer([{"status": "success"}])

    def _copy(self, asked: Mapping[str, object]) -> Answer:
        source, made = (canonical_name(str(asked.get(name, ""))) for name in ("source", "destination"))
        with self._lock:
            if source not in self.models:
                return _error(f'model "{asked.get("source")}" not found', 404)
            self.derived[made] = {"from": source}
            self.models = [*(each for each in self.models if each != made), made]
        return Answer(framing="length")

    def _push(self, asked: Mapping[str, object]) -> Answer:
        model = canonical_name(str(asked.get("model", "")))
        lines: list[Mapping[str, Any]] = [{"status": "retrieving manifest"}]
        if model not in self.models:
            return Answer([*lines, {"status": "couldn't retrieve manifest"}, {"error": "no such file or directory"}])
        layer = {"status": "pushing b179c9523d0e", "digest": _digest(model), "total": 100}
        lines += [layer, {**layer, "completed": 100}, {"status": "pushing manifest"}, {"status": "success"}]
        return _object(lines[-1]) if asked.get("stream") is False else Answer(lines)

    def _blob(self, seen: Seen) -> Answer:
        digest = seen.path.rpartition("/")[2]
        if not re.fullmatch("sha256[:-][0-9a-f]{64}", digest):
            return _error("invalid digest format", 400)
        with self._lock:
            if seen.method == "HEAD" or digest in self.blobs:
                return Answer(framing="length", status=200 if digest in self.blobs else 404)
            data = seen.body if isinstance(seen.body, bytes) else b""
            found = f"sha256:{hashlib.sha256(data).hexdigest()}"
            if found != digest:
                return _error(f'digest mismatch, expected "{digest}", got "{found}"', 400)
            self.blobs[digest] = data
            return Answer(framing="length", status=201)

    def _delete(self, asked: Mapping[str, object]) -> Answer:
        model = canonical_name(str(asked.get("model", "")))
        with self._lock:
            if model not in self.models:
                return _error(f"model '{asked.get('model')}' not found", 404)
            self.models = [each for each in self.models if each != model]
            self.derived.pop(model, None)
        return Answer(framing="length")

    def _chat(self, asked: Mapping[str, object]) -> Answer:
        def part(text: str) -> dict[str, Any]:
            return {"message": {"role": "assistant", "content": text}}

        return self._infer(asked, asked.get("messages"), part, 'model "{}" not found, try pulling it first')

    def _generate(self, asked: Mapping[str, Any]) -> Answer:
        # The tokens of the conversation so far, one for each word.
        context = [*(asked.get("context") or ()), *range(len(str(asked.get("prompt")).split()))]
        facts = {} if asked.get("raw") else {"context": context}
        return self._infer(asked, asked.get("prompt"), lambda text: {"response": text}, "model '{}' not found", **facts)

    def _infer(
        self,
        asked: Mapping[str, object],
        prompt: object,
        part: Callable[[str], dict[str, Any]],
        missing: str,
        **facts: object,
    ) -> Answer:
        model = canonical_name(str(asked.get("model", "")))
        if model not in self.models:
            return _error(missing.format(asked.get("model")), 404)
        head = {"model": asked["model"], "created_at": _DATE}
        if not prompt:
            return _object({**head, **part(""), "done_reason": self._load_or_unload(model, asked), "done": True})
        self._load_or_unload(model, asked)
        words, reason = _cut(re.findall(r"\S+\s*", self.reply), asked)
        last = {"done_reason": reason, "done": True, **facts, **_timings(len(words))}
        if asked.get("stream") is False:
            return _object({**head, **part("".join(words)), **last})
        lines = [{**head, **part(word), "done": False} for word in words]
        return Answer([*lines, {**head, **part(""), **last}])

    def _load_or_unload(self, model: str, asked: Mapping[str, object]) -> str:
        """Load or unload a model, and return Ollama's reason."""
        leaving = asked.get("keep_alive") in (0, "0", "0s")
        with self._lock:
            others = [each for each in self.loaded if each != model]
            self.loaded = others if leaving else [*others, model]
        return "unload" if leaving else "load"

    def _embed(self, asked: Mapping[str, Any]) -> Answer:
        model = canonical_name(str(asked.get("model", "")))
        if model not in self.models:
            return _error(f'model "{asked.get("model")}" not found, try pulling it first', 404)
        self._load_or_unload(model, asked)
        given = asked.get("input", [])
        texts = [given] if isinstance(given, str) else given
        vectors = [[float(len(text)), 1.0, 0.0, 0.0] for text in texts]
        figures = {"total_duration": 1_000_000, "load_duration": 1_000, "prompt_eval_count": len(texts)}
        return _object({"model": asked["model"], "embeddings": vectors, **figures})

    def _pull(self, asked: Mapping[str, Any]) -> Answer:
        model = canonical_name(str(asked.get("model", "")))
        if model not in self.models:
            self.models.append(model)
        layer = {"status": "pulling b179c9523d0e", "digest": _digest(model), "total": 100}
        lines: list[Mapping[str, Any]] = [
            {"status": "pulling manifest"},
            layer,
            {**layer, "completed": 50},
            {**layer, "completed": 100},
            {"status": "verifying sha256 digest"},
            {"status": "writing manifest"},
            {"status": "success"},
        ]
        return _object(lines[-1]) if asked.get("stream") is False else Answer(lines)


# --- Requests --------------------------------------------------------------------------------------------------------


def _read_head(reader: IO[bytes]) -> Seen | None:
    """Read the next request without its body; `None` if the client has closed or sent something else."""
    words = reader.readline().decode("latin-1").split()
    if len(words) != 3:  # Method, target, version
        return None
    headers = {}
    while (line := reader.readline().decode("latin-1").strip()) and ":" in line:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    if words[2] == "HTTP/1.0":
        headers.setdefault("connection", "close")
    return Seen(words[0], words[1], headers, None)


def _read_body(reader: IO[bytes], headers: Mapping[str, str]) -> Iterator[bytes]:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        yield reader.read(int(headers.get("content-length", "0")))
        return
    while size := int(reader.readline().partition(b";")[0] or b"0", 16):
        yield reader.read(size)
        reader.readline()
    while reader.readline().strip():
        pass


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body) if body else None
    except ValueError:
        return body


# --- Responses -------------------------------------------------------------------------------------------------------


def _encode(piece: bytes | Mapping[str, Any]) -> bytes:
    if isinstance(piece, bytes):
        return piece
    return json.dumps(piece, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _head(answer: Answer) -> bytes:
    headers = {"content-type": _NDJSON if answer.framing == "chunked" else _JSON}
    if answer.framing == "chunked":
        headers["transfer-encoding"] = "chunked"
    elif answer.framing == "length":
        pieces = (piece for piece in answer.chunks if not isinstance(piece, threading.Event))
        headers["content-length"] = str(sum(len(_encode(piece)) for piece in pieces))
    else:
        headers["connection"] = "close"
    headers.update({name.lower(): value for name, value in answer.headers.items()})
    known = answer.status in HTTPStatus._value2member_map_
    lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase if known else 'Unknown'}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _end(connection: socket.socket, ending: str) -> None:
    """Do what follows the chunks; the caller closes the socket unless the connection is kept."""
    if ending == "reset":
        # A zero linger time makes `close` reset the connection.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    elif ending == "stall":
        while connection.recv(4096):
            pass


def _object(content: Mapping[str, object], status: int = 200) -> Answer:
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    return Answer([body], status=status, framing="length")


def _plain(text: str, status: int = 200) -> Answer:
    return Answer([text.encode()], status=status, framing="length", headers={"content-type": "text/plain"})


def _error(text: str, status: int) -> Answer:
    return _object({"error": text}, status)


# --- Ollama's records ------------------------------------------------------------------------------------------------


def _digest(model: str) -> str:
    return "sha256:" + model.encode().hex().ljust(64, "0")[:64]


def _details() -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": "134.52M",
        "quantization_level": "Q4_1",
    }


def _tag(model: str, manifest: str) -> dict[str, Any]:
    digest = manifest.removeprefix("sha256:")
    names = {"name": model, "model": model}
    return {**names, "modified_at": _DATE, "size": 98_363_134, "digest": digest, "details": _details()}


def _loaded(model: str, manifest: str) -> dict[str, Any]:
    facts = {name: value for name, value in _tag(model, manifest).items() if name != "modified_at"}
    return {**facts, "size": 298_153_728, "expires_at": "2026-01-01T00:05:00Z", "size_vram": 0}


def _path(digest: str) -> str:
    return f"/models/blobs/{digest.replace(':', '-')}"


def _modelfile(digest: str) -> str:
    return f"# Modelfile generated by the fake\nFROM {_path(digest)}\n"


def _parameters(parameters: Mapping[str, object]) -> Iterator[str]:
    for name, value in parameters.items():
        for each in value if isinstance(value, list) else [value]:
            yield f"{name:<30} {json.dumps(each)}"


def _gguf_values(data: bytes) -> dict[str, Any]:
    """Read the texts, numbers and booleans of a GGUF file's keys, up to the first list."""
    sizes = {4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    place = 24  # After magic, version, and the numbers of tensors and keys.

    def take(form: str) -> Any:
        nonlocal place
        (value,) = struct.unpack_from(f"<{form}", data, place)
        place += struct.calcsize(f"<{form}")
        return value

    def text() -> str:
        return str(take(f"{take('Q')}s").decode())

    values: dict[str, Any] = {}
    for _ in range(struct.unpack_from("<Q", data, 16)[0]):
        name, kind = text(), take("I")
        if kind == 8:  # A text
            values[name] = text()
        elif kind in sizes:
            values[name] = take(sizes[kind])
        else:
            break
    return values


def _facts(digest: str) -> dict[str, Any]:
    return {
        "modelfile": _modelfile(digest),
        "parameters": 'stop                           "<|im_end|>"',
        "template": "{{- range .Messages }}{{ .Role }}: {{ .Content }}\n{{ end }}",
        "details": _details(),
        "model_info": {
            "general.architecture": "llama",
            "general.parameter_count": 134_515_008,
            "llama.attention.head_count": 9,
            "llama.attention.head_count_kv": 3,
            "llama.block_count": 30,
            "llama.context_length": 8192,
            "llama.embedding_length": 576,
            "tokenizer.ggml.tokens": None,
        },
        "tensors": [{"name": "token_embd.weight", "type": "Q8_0", "shape": [576, 49152]}],
        "capabilities": ["completion", "embedding", "tools"],
        "modified_at": _DATE,
    }


def _timings(tokens: int) -> dict[str, int]:
    return {
        "total_duration": 4_000_000,
        "load_duration": 1_000_000,
        "prompt_eval_count": 5,
        "prompt_eval_duration": 1_000_000,
        "eval_count": tokens,
        "eval_duration": 2_000_000,
    }


def _cut(words: list[str], asked: Mapping[str, Any]) -> tuple[list[str], str]:
    limit = (asked.get("options") or {}).get("num_predict", -1)
    return (words[:limit], "length") if 0 <= limit < len(words) else (words, "stop")
