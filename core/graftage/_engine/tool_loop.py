"""The loop of `run_tools`: ask the model, run the tools that it calls, send the results back, until it answers."""

from __future__ import annotations

import contextlib
import functools
import operator
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from graftage._engine.answers import parsed
from graftage._engine.arguments import check_callback, check_count, read_chat, read_seconds
from graftage._engine.inputs import Messages, read_messages, require
from graftage._engine.toolbox import Toolbox
from graftage.exceptions import GraftageError, InferenceFailed, ProviderError, ProviderTimeout
from graftage.types import Message, Reply, Step

if TYPE_CHECKING:
    from graftage._engine.call import Run
    from graftage._engine.fallback import Chain
    from graftage._engine.session import Session

__all__ = ["ToolLoop"]

MAX_STEPS: Final = 10
TOOL_TIMEOUT: Final = 60.0


class ToolLoop:
    """One run, for both clients: the session knows how to wait."""

    def __init__(
        self,
        session: Session | Chain,
        toolbox: Toolbox,
        max_steps: int | None,
        tool_timeout: float | None,
        on_step: Callable[[Step], None] | None,
        **arguments: Any,
    ) -> None:
        check_count("max_steps", max_steps, "steps")
        check_callback("on_step", on_step)
        seconds = read_seconds("tool_timeout", tool_timeout)
        given = {name: value for name, value in arguments.items() if value is not None or name == "adapter"}
        self._session = session
        self._toolbox = toolbox
        self._max_steps = MAX_STEPS if max_steps is None else max_steps
        self._tool_timeout = TOOL_TIMEOUT if seconds is None else seconds
        self._on_step = on_step
        self._timeouts = session.timeouts(given.pop("timeout", None))
        self._deadline = time.monotonic() + self._timeouts.total
        self._images = given.pop("images", None)
        self._of_answer: dict[str, Any] = {name: given.pop(name) for name in ("format", "retries") if name in given}
        self._parse = read_chat("-", self._of_answer).parse
        self._arguments = given
        self._messages: tuple[Message, ...] = ()
        self._steps: list[Step] = []
        self._asked: list[Reply] = []
        """The replies so far, except the last."""

    async def run(self, messages: Messages) -> Reply:
        """Run until the model answers."""
        if self._parse is not None:  # Otherwise this would show only at the answer.
            able, provider = self._session.capabilities().features, self._session.provider
            require("structured_output", "structured_output" in able, provider)
        self._messages = await self._session.io.run(read_messages, messages, self._images)
        try:
            return await self._to_end()
        except GraftageError as error:
            if self._asked:
                error.partial = self._whole(error.partial)
                if isinstance(error, ProviderError):
                    error.retryable = False  # The tools would run twice.
            raise

    async def _to_end(self) -> Reply:
        arguments = {**self._arguments, "tools": self._toolbox.tools}
        while True:
            run = await self._ask(arguments)
            reply = run.whole()
            if not reply.tool_calls:
                return await self._answer(reply)
            if len(self._steps) == self._max_steps:
                raise InferenceFailed(
                    f"The model still called tools after {self._max_steps} steps.",
                    hint="Raise `max_steps`, or go on from the messages of `partial.steps`.",
                    provider=reply.provider,
                    model=reply.model,
                    operation="chat",
                    partial=reply,
                )
            self._asked.append(reply)
            await self._step(reply, run.emit)
            arguments.pop("tool_choice", None)

    async def _ask(self, arguments: dict[str, Any]) -> Run:
        """Ask the model, within the time that is left."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise self._late()
        done = (message for step in self._steps for message in step.messages)
        timeouts = replace(self._timeouts, total=left)
        asked = read_chat((*self._messages, *done), {**arguments, "timeout": timeouts})
        try:
            run, _ = await self._session.infer("chat", asked, stream=False)
        except ProviderTimeout as error:
            if error.phase != "total" or not self._asked:
                raise
            raise self._late(provider=error.provider, model=error.model, partial=error.partial) from error
        return run

    def _late(self, **of: Any) -> ProviderTimeout:
        hint = "Raise `timeout`, or lower `tool_timeout`."
        message = f"The run did not finish within {self._timeouts.total:g} s."
        return ProviderTimeout(message, phase="total", hint=hint, operation="chat", **of)

    async def _step(self, reply: Reply, emit: Callable[..., None]) -> None:
        """Run the tools that a reply calls."""
        jobs = self._toolbox.start(reply.tool_calls)
        results, errors = [], {}
        try:
            for job in jobs:
                name, call_id = job.call.name, job.call.id
                outcome = await job.outcome(self._session.io, self._tool_timeout, self._deadline)
                results.append(Message(role="tool", content=outcome.text, tool_name=name, tool_call_id=call_id))
                error = None
                if outcome.reason is not None:
                    errors[call_id] = outcome.text
                    error = GraftageError(f"The tool failed: {outcome.reason}.")
                known = name if self._toolbox.knows(name) else None  # A made-up name may be anything.
                emit("tool", tool=known, seconds=job.seconds, error=error)
        finally:
            for job in jobs:
                job.future.cancel()  # If the run ends here, so do its async tools.
        step = Step(message=reply.message, results=tuple(results), errors=errors)
        self._steps.append(step)
        if self._on_step is not None:
            self._on_step(step)

    async def _answer(self, reply: Reply) -> Reply:
        if self._parse is None:
            return self._whole(reply)
        with contextlib.suppress(InferenceFailed):
            return self._whole(replace(reply, parsed=parsed(reply, self._parse)))
        self._asked.append(reply)
        arguments = {name: value for name, value in self._arguments.items() if name != "tool_choice"}
        run = await self._ask({**arguments, **self._of_answer})
        return self._whole(run.whole())

    def _whole(self, last: Reply | None) -> Reply:
        """Return the last reply with what was before it."""
        replies = [*self._asked, *([last] if last else [])]
        warnings = dict.fromkeys(warning for each in replies for warning in each.warnings)
        return replace(
            last or Reply(text=""),
            steps=tuple(self._steps),
            usage=functools.reduce(operator.add, (each.usage for each in replies)),
            warnings=tuple(warnings),
        )
