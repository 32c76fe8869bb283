"""OpenAI's chat API as JSON: requests, and replies in all the forms in which servers send them.

    reader = ChatReader(request)
    items = self._http.events("POST", "/chat/completions", body, call=call, read=reader.read, words=reader.words)
    async for chunk in items:
        if chunk is not None:
            yield chunk
    reader.headers = items.headers
    yield reader.last()

Import it by this path: `graftage.http` does not load it.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from graftage._engine.answers import (
    read_logprobs,
    read_object,
    read_records,
    read_seconds,
    read_text,
    read_tool_call,
    read_vectors,
    read_word,
)
from graftage.calls import ChatRequest, GenerateRequest
from graftage.exceptions import InferenceFailed, StreamInterrupted
from graftage.http.client import Document, Event
from graftage.http.transport import Headers, header
from graftage.types import Chunk, Embeddings, Feature, Logprob, Message, Reply, Timings, Tool, ToolCall, Usage

__all__ = [
    "CallJoiner",
    "ChatReader",
    "ThoughtSplitter",
    "as_chat",
    "read_embeddings",
    "read_template",
    "read_usage",
    "write_format",
    "write_message",
    "write_options",
    "write_thinking",
    "write_tools",
]


# --- Requests --------------------------------------------------------------------------------------------------------


def as_chat(request: GenerateRequest) -> ChatRequest:
    """Return the chat that a prompt is for a model with a template."""
    names = ("call", "model", "format", "think", "options", "max_tokens", "context_window", "keep_alive", "adapter")
    system = (Message(role="system", content=request.system),) if request.system is not None else ()
    user = Message(role="user", content=request.prompt, images=request.images)
    return ChatRequest(messages=(*system, user), **{name: getattr(request, name) for name in names})


def write_options(options: Mapping[str, Any], *, chat: bool = True) -> dict[str, Any]:
    """Return the options of a streamed chat or completion, with the request for the usage."""
    body = {name: value for name, value in options.items() if name not in ("logprobs", "top_logprobs")}
    if options.get("logprobs"):
        top = options.get("top_logprobs") or 1  # Without a number, some servers send none, or omit the tokens.
        body |= {"logprobs": True, "top_logprobs": top} if chat else {"logprobs": top}
    return {**body, "stream": True, "stream_options": {"include_usage": True}}


def write_message(message: Message, thought: str | None = None) -> dict[str, Any]:
    """Return a message, with its images as `data:` URLs.

    Args:
        message: the message.
        thought: the field for what the model thought, `reasoning` or `reasoning_content`; None to leave it out.
    """
    body: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.images:
        kinds = [(each.media_type or "image/png", base64.b64encode(each.data).decode()) for each in message.images]
        images = [{"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}} for kind, data in kinds]
        body["content"] = [{"type": "text", "text": message.content}, *images] if message.content else images
    # DeepSeek refuses turns with calls that lack the field, even if it is empty.
    if thought and (message.thinking or message.tool_calls):
        body[thought] = message.thinking or ""
    if message.tool_calls:
        # For Ollama 0.9.3, a message with a text has no calls, even if the text is empty.
        body["content"] = body["content"] or None
        body["tool_calls"] = [
            {"id": each.id, "type": "function", "function": {"name": each.name, "arguments": _json(each.arguments)}}
            for each in message.tool_calls
        ]
    named = {"name": message.name, "tool_call_id": message.tool_call_id}
    return body | {name: value for name, value in named.items() if value}


def write_tools(tools: Sequence[Tool], choice: str | None = None, *, by_name: bool = True) -> dict[str, Any]:
    """Return the fields `tools` and `tool_choice`; none without tools.

    Args:
        tools: the tools.
        choice: `required`, or the name of the tool that must be called.
        by_name: whether the server keeps the choice of a name. If not, only that tool is sent, as required.
    """
    chosen: Any = choice
    if choice not in (None, "required"):
        if by_name:
            chosen = {"type": "function", "function": {"name": choice}}
        else:
            tools, chosen = [each for each in tools if each.name == choice], "required"
    functions = [{"name": it.name, "description": it.description, "parameters": dict(it.parameters)} for it in tools]
    body = {"tools": [{"type": "function", "function": each} for each in functions], "tool_choice": chosen}
    return {name: value for name, value in body.items() if tools and value is not None}


def write_format(wanted: Mapping[str, Any] | str, *, json_object: bool = True) -> dict[str, Any]:
    """Return a `response_format`.

    Args:
        wanted: a schema, or `json` for any object.
        json_object: whether the server knows `json_object` and keeps it. If not, `json` becomes a schema, too.
    """
    if isinstance(wanted, str) and json_object:
        return {"type": "json_object"}
    schema = {"type": "object"} if isinstance(wanted, str) else wanted
    strict = {"strict": True} if schema.get("type") == "object" and _is_strict(schema) else {}
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **strict}}


def _is_strict(schema: object) -> bool:
    """Return whether a schema requires all its properties and no others: OpenAI keeps only such schemas."""
    if isinstance(schema, Mapping):
        names = set(schema.get("properties", ()))
        whole = schema.get("additionalProperties") is False and names == set(schema.get("required", ()))
        return (whole or schema.get("type") != "object") and all(map(_is_strict, schema.values()))
    return not isinstance(schema, list) or all(map(_is_strict, schema))


def write_thinking(think: bool | str, given: object = None) -> dict[str, Any]:
    """Return arguments of the model's template that turn its thinking on or off, with those that were given."""
    effort = {"reasoning_effort": think} if isinstance(think, str) else {}
    return {**read_object(given), "enable_thinking": think not in (False, "none"), **effort}


def read_template(template: str) -> frozenset[Feature]:
    """Return the features that a model's template has: of tools and thinking, others are dropped without a word."""
    tools: frozenset[Feature] = frozenset({"tools", "tool_choice"} if re.search(r"\btools\b", template) else ())
    thinks = re.search("enable_thinking|reasoning_content|reasoning_effort|<think>", template)
    return tools | {"thinking"} if thinks else tools


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(dict(value), ensure_ascii=False)


# --- Replies ---------------------------------------------------------------------------------------------------------


class ThoughtSplitter:
    """Takes a thought in `<think>` tags from the start of a text that comes in pieces."""

    OPEN: Final = "<think>"
    CLOSE: Final = "</think>"

    def __init__(self) -> None:
        self._held = ""
        self._inside = self._gap = False
        self.over = False
        """Whether all that follows is text."""

    def split(self, piece: str, *, last: bool = False) -> tuple[str, str]:
        """Return the text and the thought of a piece, and hold back what may be the begin of a tag."""
        if self.over and not self._gap:
            return piece, ""
        held, self._held = self._held + piece, ""
        if not self._inside and not self.over:
            start = held.lstrip()
            if self.OPEN.startswith(start) and start != self.OPEN and not last:
                self._held = held
                return "", ""
            self._inside = start.startswith(self.OPEN)
            self.over = not self._inside
            if self.over:
                return held, ""
            held = start.removeprefix(self.OPEN)
        thought, closed, text = ("", "", held) if self.over else held.partition(self.CLOSE)
        if closed or self.over:
            self.over, text = True, text.lstrip()
            self._gap = not text
            return text, thought
        keep = 0 if last else next(n for n in range(len(self.CLOSE) - 1, -1, -1) if held.endswith(self.CLOSE[:n]))
        self._held = held[len(held) - keep :]
        return "", held[: len(held) - keep]


class CallJoiner:
    """Joins the fragments of tool calls, also where servers leave out their index or id."""

    def __init__(self) -> None:
        self._calls: list[dict[str, str]] = []
        self._places: dict[object, dict[str, str]] = {}

    def add(self, part: Mapping[str, Any]) -> None:
        """Add a fragment: to the call with its index or id; else to a new call if it has a name, or to the last one."""
        function = read_object(part.get("function"))
        place, call_id, name = (part.get("index"), *map(read_word, (part.get("id"), function.get("name"))))
        place = call_id if place is None else place
        call = self._places.get(place)
        if place is None and not name and self._calls:
            call = self._calls[-1]
        if call is None or (call_id and name and call["id"] not in ("", call_id)):  # Some servers count all as 0.
            call = {"id": "", "name": "", "arguments": ""}
            self._calls.append(call)
        if place is not None:
            self._places[place] = call
        arguments = function.get("arguments")
        call["id"], call["name"] = call["id"] or call_id or "", call["name"] or name or ""
        call["arguments"] += arguments if isinstance(arguments, str) else _json(arguments) if arguments else ""

    def read(self, *, cut: bool) -> tuple[ToolCall, ...]:
        """Return the calls.

        Raises:
            InferenceFailed: a call is malformed, or `cut` by the limit of the reply; `partial.raw` has it.
        """
        if cut and self._calls and not (last := self._calls[-1])["arguments"].rstrip().endswith("}"):
            problem = f"The reply reached its limit in the middle of a call of the tool `{last['name'][:80]}`."
            raise InferenceFailed(problem, hint="Raise `max_tokens`.", partial=Reply(text="", raw=last))
        ids = dict.fromkeys(each["id"] for each in self._calls)  # A repeated one gets a new name.
        return tuple(
            read_tool_call(each["name"], each["arguments"], each["id"] if ids.pop(each["id"], 0) is None else None)
            for each in self._calls
        )


class _Delta(msgspec.Struct):
    content: str
    reasoning: None = None
    reasoning_content: None = None
    refusal: None = None
    tool_calls: None = None


class _Choice(msgspec.Struct):
    delta: _Delta
    index: Literal[0] = 0
    finish_reason: None = None
    logprobs: None = None


class _TextEvent(msgspec.Struct):
    """An event with text only. Fields of type None must be absent."""

    choices: tuple[_Choice]
    model: str
    error: None = None
    usage: None = None
    timings: None = None


_text_event = msgspec.json.Decoder(_TextEvent).decode


class ChatReader:
    """Turns the events of one reply, or its one response, into chunks; holds the end until the usage has come."""

    def __init__(self, request: ChatRequest | GenerateRequest) -> None:
        self._top = "top_logprobs" in request.options
        self._thoughts = ThoughtSplitter()
        self._thoughts.over = isinstance(request, GenerateRequest)
        self._calls = CallJoiner()
        self._last: dict[str, Any] = {}
        self._refused = False
        self.headers: Headers = ()
        """The headers of the response, for its id and the limits on the rate."""
        self.finish: str | None = None
        """The server's reason for the end. Without one, the reply is not complete."""
        self.model = ""
        """The server's name of the model."""
        self.thought: str | None = None
        """The field in which the server has sent a thought: `reasoning` or `reasoning_content`."""
        self.has_logprobs = False

    def words(self, data: bytes) -> tuple[str, str] | None:
        """Return the text of an event that has nothing else."""
        if self.model and self._thoughts.over:
            try:
                found = _text_event(data)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                return None
            if found.model == self.model and (text := found.choices[0].delta.content):
                return self._thoughts.split(text)
        return None

    def read(self, event: Event) -> Chunk | None:
        """Return the chunk of an event, if it has one."""
        return self._take(event.json())

    def read_whole(self, found: Document) -> Chunk:
        """Return the chunk of a reply that comes in one piece."""
        self.headers = found.headers
        return self._take(found) or Chunk()

    def _take(self, found: Mapping[str, Any]) -> Chunk | None:
        choices, model = read_records(found.get("choices"), dict), found.get("model")
        choice = next((each for each in choices if not each.get("index")), {})  # With `n`, there are others.
        delta = dict(choice.get("delta") or choice.get("message") or {"content": choice.get("text")})
        calls = delta.get("tool_calls") or ()
        for each in [calls] if isinstance(calls, Mapping) else calls:
            self._calls.add(read_object(each))
        text, thinking = self._words(delta)
        logprobs = _read_logprobs(read_object(choice.get("logprobs")), top=self._top)
        self.has_logprobs = self.has_logprobs or bool(logprobs)
        self._refused = self._refused or bool(delta.get("refusal"))
        self.finish = read_word(choice.get("finish_reason")) or self.finish
        if self.finish or found.get("usage") or found.get("timings"):
            self._last |= {name: value for name, value in found.items() if value or name not in self._last}
        elif model == "" and self.model and not (text or thinking or calls):  # Ollama sends no other sign.
            raise InferenceFailed("The model stopped working in the middle of its reply.", hint="See the server's log.")
        self.model = read_word(model) or self.model
        return Chunk(text=text, thinking=thinking, logprobs=logprobs) if text or thinking or logprobs else None

    def _words(self, delta: Mapping[str, Any]) -> tuple[str, str]:
        """Return the text and the thinking of a message, which come in several forms, sometimes in two at once."""
        text, thinking = _read_blocks(delta.get("content"))
        text += read_text(delta.get("refusal"))
        fields = {name: found for name in ("reasoning", "reasoning_content") if (found := read_word(delta.get(name)))}
        if fields:
            self.thought, thinking = [*fields][-1], "".join(dict.fromkeys(fields.values()))  # Both may say the same.
        text, tagged = self._thoughts.split(text) if text else ("", "")
        return text, thinking or ("" if self.thought else tagged)

    def last(self) -> Chunk:
        """Return the last chunk: what was held back, and what else is known.

        Raises:
            InferenceFailed: a tool call cannot be read.
            StreamInterrupted: the reply has no reason for its end, and so may be cut.
        """
        if self.finish is None:
            hint = "Was it stopped? See its log, and ask again."
            raise StreamInterrupted("The server ended its reply without a reason.", retryable=True, hint=hint)
        text, thinking = self._thoughts.split("", last=True)
        timings = read_object(self._last.get("timings"))
        prompt, generation = (read_seconds(timings.get(each), per_second=1e3) for each in ("prompt_ms", "predicted_ms"))
        return Chunk(
            text=text,
            thinking="" if self.thought else thinking,
            tool_calls=self._calls.read(cut=self.finish in ("length", "max_tokens")),
            finish_reason="refusal" if self._refused else self.finish,
            usage=read_usage(self._last),
            timings=Timings(prompt=prompt, generation=generation),
            model=self.model or None,
            request_id=next(filter(None, (header(self.headers, each) for each in REQUEST_IDS)), None),
            rate_limits={name: value for name, value in self.headers if "ratelimit" in name} or None,
            raw=self._last,
        )


REQUEST_IDS: Final = ("x-request-id", "request-id", "x-generation-id", "apim-request-id")


def _read_blocks(content: object) -> tuple[str, str]:
    """Return the text and the thinking of a content that is a text or, as Mistral sends it, a list of blocks."""
    if not isinstance(content, list):
        return read_text(content), ""
    blocks = [{"text": each} if isinstance(each, str) else read_object(each) for each in content]
    text = "".join(read_text(each.get("text")) for each in blocks)
    return text, "".join(_read_blocks(each.get("thinking"))[0] for each in blocks)


def _read_logprobs(found: Mapping[str, Any], *, top: bool) -> tuple[Logprob, ...]:
    entries = found.get("content")
    if isinstance(found.get("tokens"), list):  # The form of completions.
        pairs = zip(found["tokens"], found.get("token_logprobs") or (), strict=False)
        entries = [{"token": token, "logprob": logprob} for token, logprob in pairs]
    return read_logprobs(entries, top=top)


def read_usage(found: Mapping[str, Any]) -> Usage | None:
    """Return the counts of a response, or None if it has none."""
    usage, timings = read_object(found.get("usage")), read_object(found.get("timings"))
    read, written = (read_object(usage.get(f"{each}_tokens_details")) for each in ("prompt", "completion"))
    counts = Usage(
        input_tokens=usage.get("prompt_tokens"),
        output_tokens=usage.get("completion_tokens"),
        cached_tokens=read.get("cached_tokens", timings.get("cache_n")),
        reasoning_tokens=written.get("reasoning_tokens"),
    )
    return None if counts == Usage() else counts


def read_embeddings(found: Mapping[str, Any]) -> Embeddings:
    """Read the vectors of a response, in the order of the inputs."""
    model, usage = read_word(found.get("model")) or "", read_usage(found) or Usage()
    return Embeddings(vectors=read_vectors(found["data"]), model=model, usage=usage)
