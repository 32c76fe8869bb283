"""The tools of `run_tools`: how a call is checked and run, and the text that the model gets as its result."""

from __future__ import annotations

import functools
import inspect
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, NotRequired, Required, TypeAlias

from graftage._engine.faults import in_words, kind_of
from graftage._engine.inputs import is_model_object, rejected, suggest
from graftage._engine.schemas import Tools, read_tools, tool_items, type_adapter
from graftage._engine.threads import RaisedInThread, submit
from graftage._records import dataclass
from graftage.exceptions import RequestRejected
from graftage.types import ToolCall

if TYPE_CHECKING:
    from graftage._engine.waiting import IO

__all__ = ["CallTool", "Job", "Outcome", "Toolbox"]

CallTool: TypeAlias = "Callable[[str, dict[str, Any]], Any]"
"""Runs a tool that is not a function: gets its name and its arguments. It may be async."""
Run: TypeAlias = Callable[[], Any]

MAX_RESULT: Final = 32_000
"""Characters of a result that the model gets: about 8000 tokens."""
MAX_CALLS: Final = 32
"""Calls of one message that are run, since each may take a thread."""
MAX_MISTAKES: Final = 10
"""Wrong arguments of one call that the model is informed of."""
FOLDERS: Final = re.compile(r"(?<![\w:/~.-])(?:/|[A-Za-z]:[\\/])(?:[^\s/\\'\"<>]+[\\/])+")
"""The folders of an absolute path. The model may run elsewhere, and needs only the file's name."""
SIMPLE: Final = {"string": str, "integer": int, "number": float, "boolean": bool, "null": None}


class Mistake(Exception):
    """A call that cannot be run. Its message is for the model, its `reason` for observers."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a call."""

    text: str
    """For the model."""
    reason: str | None = None
    """Why it failed, in words without data."""


@dataclass(frozen=True, slots=True)
class _Runnable:
    read: Callable[[str], Run]
    """Checks arguments in JSON; returns what runs the tool with them."""
    is_async: bool


class Toolbox:
    """The tools of a run. Only these are run, however the model names another.

    Raises:
        RequestRejected: a tool cannot be read or run, or two have the same name.
    """

    def __init__(self, tools: Tools, call: CallTool | None, io: IO) -> None:
        given = tool_items(tools)
        self.tools = read_tools(given)
        self._io = io
        self._runnables: dict[str, _Runnable] = {}
        for value, tool in zip(given, self.tools, strict=True):
            if tool.name in self._runnables:
                raise RequestRejected(f"Two tools are named `{tool.name}`.", hint="Give each its own name.")
            self._runnables[tool.name] = self._runnable(value, tool.name, tool.parameters, call)

    def _runnable(self, value: Any, name: str, schema: Mapping[str, Any], call: CallTool | None) -> _Runnable:
        is_function = callable(value) and not inspect.isclass(value)
        run = value if is_function else call
        if run is None:
            raise RequestRejected(
                f"The tool `{name}` has no function to run.",
                hint="Give a Python function, or `call=`: a function that runs a tool by its name and arguments.",
            )
        if not callable(run):
            raise rejected("`call`", "a function of a tool's name and its arguments", run)
        is_async = any(map(inspect.iscoroutinefunction, (run, type(run).__call__)))
        if is_async and self._io.colour == "sync":
            raise _needs_loop(name)
        if is_function:
            return _Runnable(type_adapter(_binder(value)).validate_json, is_async)
        check = type_adapter(value if inspect.isclass(value) else _type_of(schema)).validate_json

        def read(arguments: str) -> Run:
            checked = check(arguments)
            return functools.partial(run, name, checked if isinstance(checked, dict) else json.loads(arguments))

        return _Runnable(read, is_async)

    def knows(self, name: str) -> bool:
        """Return whether there is a tool of this name."""
        return name in self._runnables

    def start(self, calls: Sequence[ToolCall]) -> list[Job]:
        """Begin the calls of one message, all at the same time."""
        return [Job(call, self._start(call, place)) for place, call in enumerate(calls)]

    def _start(self, call: ToolCall, place: int) -> Future[Any]:
        try:
            if place >= MAX_CALLS:
                raise Mistake(f"At most {MAX_CALLS} tools can be called at once.", "too many calls")
            runnable = self._runnables.get(call.name)
            if runnable is None:
                hint = suggest(call.name, self._runnables)
                raise Mistake(f"There is no tool `{call.name}`. {hint}", "an unknown tool")
            run = _read(runnable, call)
            if self._io.colour == "sync":
                return submit(lambda: _converted(run()))
            import asyncio

            work = self._await(run, in_thread=not runnable.is_async)
            return asyncio.run_coroutine_threadsafe(work, asyncio.get_running_loop())
        except Exception as error:  # noqa: BLE001 - the model is informed of it
            failed: Future[Any] = Future()
            failed.set_exception(error)
            return failed

    async def _await(self, run: Run, *, in_thread: bool) -> Any:
        found = await self._io.run(lambda: _converted(run())) if in_thread else run()
        if inspect.isawaitable(found):
            found = await found
        return found if isinstance(found, _Text) else await self._io.run(_converted, found)


def _needs_loop(name: str) -> RequestRejected:
    return RequestRejected(
        f"The tool `{name}` is async, and this client has no event loop.",
        hint="Use `run_tools_async` with a client of `connect_async`, or give a plain function.",
    )


class Job:
    """A call that has begun."""

    __slots__ = ("_ended", "begun", "call", "future")

    def __init__(self, call: ToolCall, future: Future[Any]) -> None:
        self.call = call
        self.future = future
        self.begun = time.monotonic()
        self._ended: float | None = None
        future.add_done_callback(self._end)

    def _end(self, _: object) -> None:
        self._ended = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return (self._ended or time.monotonic()) - self.begun

    async def outcome(self, io: IO, timeout: float, deadline: float) -> Outcome:
        """Wait for the result, at most until a deadline, and return it as text for the model.

        Raises:
            RequestRejected: the tool is async, and the client is not.
            BaseException: what the tool raised, if it is no `Exception`: it ends the run.
        """
        name = self.call.name
        limit = min(timeout, deadline - self.begun)
        try:
            if not self.future.done():  # It is, if the calls before it took long.
                await io.wait(self.future, self.begun + limit)
        except TimeoutError:
            self.future.cancel()  # An async tool ends; a thread is left behind.
            return Outcome(f"The tool `{name}` did not finish within {limit:.3g} s.", "it took too long")
        try:
            found = self.future.result()
            if isinstance(found, _Text):
                return Outcome(found.text, "its result is an error" if found.is_error else None)
            getattr(found, "close", lambda: None)()  # Or Python warns that it was never awaited.
        except Mistake as mistake:
            return Outcome(_bounded(str(mistake)), mistake.reason)
        except Exception as error:  # noqa: BLE001 - the model is informed of it
            failed = _raised_in_thread(error)
            words = FOLDERS.sub("", in_words(failed))
            return Outcome(_bounded(f"The tool `{name}` failed with {words}."), type(failed).__name__)
        raise _needs_loop(name)


def _raised_in_thread(error: Exception) -> BaseException:
    """Return what a tool raised.

    Raises:
        BaseException: it is no `Exception`, and no cancellation: nobody cancels a thread.
    """
    import asyncio

    cause = error.__cause__ if isinstance(error, RaisedInThread) else None
    if cause is None or isinstance(cause, (Exception, asyncio.CancelledError)):
        return cause or error
    raise cause


def _binder(function: Callable[..., Any]) -> Callable[..., Run]:
    """Return a function with the same parameters that only keeps its arguments.

    So an invalid argument cannot be mistaken for a `ValidationError` that the tool itself raises.
    """

    @functools.wraps(function)
    def bind(*arguments: Any, **named: Any) -> Run:
        return functools.partial(function, *arguments, **named)

    return bind


# --- Arguments -------------------------------------------------------------------------------------------------------


def _read(runnable: _Runnable, call: ToolCall) -> Run:
    from pydantic import ValidationError

    try:
        return runnable.read(json.dumps(dict(call.arguments)))
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        wrong = [f"`{'.'.join(map(str, each['loc'])) or call.name}`: {each['msg']}" for each in found[:MAX_MISTAKES]]
        raise Mistake(
            f"The arguments of `{call.name}` are wrong. {'; '.join(wrong)}. Call it again with the right ones.",
            "wrong arguments",
        ) from error


def _type_of(schema: object) -> Any:
    """Return a type that checks what a JSON schema says of names, simple types, enums, lists and nested objects.

    The rest of the schema (`anyOf`, `$ref`, ranges, patterns) is for the tool to check.
    """
    if not isinstance(schema, Mapping):
        return Any
    values, kind = schema.get("enum"), schema.get("type")
    if isinstance(values, list) and values and all(isinstance(each, str | int | None) for each in values):
        return Literal[tuple(values)]
    if isinstance(schema.get("properties"), Mapping):
        return _object(schema)
    if kind == "array":
        return list[_type_of(schema.get("items"))]  # type: ignore[misc] # made at run time
    if kind == "object":
        return dict[str, Any]
    return SIMPLE.get(kind, Any) if isinstance(kind, str) else Any


def _object(schema: Mapping[str, Any]) -> Any:
    from typing_extensions import TypedDict  # A requirement of pydantic, so it is installed

    required = schema.get("required")
    names = required if isinstance(required, list) else []
    fields = {
        name: Required[_type_of(each)] if name in names else NotRequired[_type_of(each)]
        for name, each in schema["properties"].items()
    }
    fields |= {name: Required[Any] for name in names if isinstance(name, str) and name not in fields}
    make: Any = TypedDict
    made = make("arguments", fields)
    made.__pydantic_config__ = {"extra": "forbid" if schema.get("additionalProperties") is False else "allow"}
    return made


# --- Results ---------------------------------------------------------------------------------------------------------


class _Text(NamedTuple):
    """A result as text, and whether it is an error, as MCP says."""

    text: str
    is_error: bool = False


def _converted(value: Any) -> Any:
    """Return a result as text: a string as it is, the blocks of an MCP result, anything else as JSON.

    It is a part of the tool's work, within its time limit. What must be awaited is returned as it is.

    Raises:
        Mistake: JSON cannot hold the result, or it may be without an end.
    """
    if inspect.isawaitable(value):
        return value
    if isinstance(value, str):
        return _Text(_bounded(value))
    from pydantic_core import to_json

    try:
        if isinstance(value, Iterator):
            raise TypeError("it is read one by one")
        found = value.model_dump(mode="json", by_alias=True) if is_model_object(value) else value
        if isinstance(found, Mapping) and isinstance(found.get("content"), list) and "isError" in found:
            text = "\n".join(map(_block_text, found["content"]))
            return _Text(_bounded(text or to_json(found.get("structuredContent")).decode()), bool(found["isError"]))
        return _Text(_bounded(to_json(found).decode()))
    except Exception as error:
        raise Mistake(
            f"The result of the tool, {kind_of(value)}, cannot be converted to text.", "an unreadable result"
        ) from error


def _block_text(block: Mapping[str, Any]) -> str:
    inner = block.get("resource") or block
    return str(inner.get("text") or inner.get("uri") or f"[{block.get('type')}, which is not text]")


def _bounded(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()  # Half of a surrogate pair cannot be sent.
    return text if len(text) <= MAX_RESULT else f"{text[:MAX_RESULT]}\n[Cut: {MAX_RESULT} of {len(text)} characters.]"
