"""`run_tools`: ask a model, run the tools that it calls, send the results back, until it answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from graftage._client.async_client import AsyncClient
from graftage._client.opening import translate_errors, translate_errors_async
from graftage._client.sync_client import Client
from graftage._engine.driving import drive

if TYPE_CHECKING:
    from typing import Unpack

    from graftage._engine.arguments import RunArguments
    from graftage._engine.inputs import Messages
    from graftage._engine.schemas import Tools
    from graftage._engine.toolbox import CallTool
    from graftage.types import Reply, Step

__all__ = ["run_tools", "run_tools_async"]


@translate_errors
def run_tools(
    llm: Client,
    /,
    messages: Messages,
    tools: Tools,
    *,
    call: CallTool | None = None,
    max_steps: int | None = None,
    tool_timeout: float | None = None,
    on_step: Callable[[Step], None] | None = None,
    **arguments: Unpack[RunArguments],
) -> Reply:
    """Ask the model, run the tools that it calls, and send the results back, until it answers without a call.

    Only the given tools are run, with arguments that fit: a function gets what its annotations say, another tool what
    its JSON schema says of names, simple types, enums, lists and nested objects. A result is sent as it is if it is a
    string, or else as JSON, and cut after 32000 characters. A wrong call, an exception of a tool (its type and its
    message, without folders) and a timeout are its result, so that the model can try again. An exception that does
    not derive from `Exception` ends the run. The calls of one message run at the same time, each in a thread.

    Args:
        llm: the client.
        messages: as for `chat`.
        tools: as for `chat`: Python functions, and with `call` also pydantic models, mappings, `Tool`s, or the result
            of `list_tools` of an MCP client.
        call: runs the tools that are not functions; it gets a name and the arguments as a dictionary. What it returns
            may be the result of `call_tool` of an MCP client.
        max_steps: how many messages with calls are answered, at most; 10 by default.
        tool_timeout: seconds for each tool, 60 by default. The thread of a tool that takes longer is left behind; it
            delays neither the run nor the end of the process.
        on_step: called after each step; an error that it raises ends the run.
        arguments: all others of `chat`, for each time the model is asked, except:
            `timeout`: seconds for the whole run; the default is the client's limit. `tool_choice`: for the first time.
            `format`, `retries`: for the answer. If the answer does not fit, the model is asked for it once more, with
            the format and without the tools: many servers let no calls through while they enforce a format.

    Returns:
        the answer, with all `steps`; `usage` and `warnings` are of the whole run. `Reply.messages` continues the
        conversation.

    Raises:
        InferenceFailed: the model still called tools after `max_steps`, among other reasons.
        ProviderTimeout: the run took too long.
        RequestRejected: a tool cannot be read or run, or an argument is invalid.
        ProviderError: as for `chat`. In all errors, `partial.steps` has what was done.
    """
    from graftage._engine.tool_loop import ToolLoop
    from graftage._engine.toolbox import Toolbox

    if not isinstance(llm, Client):
        raise TypeError("run_tools() needs a client of `connect`; for one of `connect_async`, use run_tools_async()")
    session, given = llm._open(), llm._with_defaults("run_tools", arguments)  # noqa: SLF001 - a client of ours
    loop = ToolLoop(session, Toolbox(tools, call, session.io), max_steps, tool_timeout, on_step, **given)
    return drive(loop.run(messages))


@translate_errors_async
async def run_tools_async(
    llm: AsyncClient,
    /,
    messages: Messages,
    tools: Tools,
    *,
    call: CallTool | None = None,
    max_steps: int | None = None,
    tool_timeout: float | None = None,
    on_step: Callable[[Step], None] | None = None,
    **arguments: Unpack[RunArguments],
) -> Reply:
    """`run_tools` for asyncio. Tools and `call` may be async: they are awaited, and cancelled at their time limit.

    Args:
        llm: the client.
        messages: as for `run_tools`, like all that follow.
        tools: the tools; plain functions run in threads, so that they do not block the event loop.
        call: runs the tools that are not functions, such as `call_tool` of an MCP client.
        max_steps: how many messages with calls are answered.
        tool_timeout: seconds for each tool.
        on_step: called after each step.
        arguments: all others of `chat`.

    Raises:
        GraftageError: as for `run_tools`.
    """
    from graftage._engine.tool_loop import ToolLoop
    from graftage._engine.toolbox import Toolbox

    if not isinstance(llm, AsyncClient):
        raise TypeError("run_tools_async() needs a client of `connect_async`; for one of `connect`, use run_tools()")
    session, given = await llm._open(), llm._with_defaults("run_tools", arguments)  # noqa: SLF001 - a client of ours
    loop = ToolLoop(session, Toolbox(tools, call, session.io), max_steps, tool_timeout, on_step, **given)
    return await loop.run(messages)
