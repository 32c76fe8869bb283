"""`graftage chat`: one reply, or a conversation."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftage._cli import options, tools
from graftage._cli.answer import print_reply
from graftage._cli.errors import Misuse
from graftage._cli.prompt import read_prompt

if TYPE_CHECKING:
    from graftage import Client

__all__ = ["chat"]


def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask. Without it, read the pipe or start a conversation.")
    ] = None,
    *,
    model: options.Model = None,
    provider: options.Provider = None,
    system: options.System = None,
    adapter: options.Adapters = None,
    temperature: options.Temperature = None,
    seed: options.Seed = None,
    max_tokens: options.MaxTokens = None,
    context_window: options.ContextWindow = None,
    keep_alive: options.KeepAlive = None,
    think: options.Think = None,
    image: options.Images = None,
    answer_format: options.Format = None,
    tool: options.Tools = None,
    max_steps: options.MaxSteps = None,
    timeout: options.Timeout = None,
    host: options.Host = None,
    force: options.Force = False,
    no_stream: options.NoStream = False,
    as_json: options.AsJson = False,
    raw: options.Raw = False,
) -> None:
    """Ask a model, or have a conversation.

    `cat notes.txt | graftage chat "Summarise this."` sends both.
    """
    arguments = options.given(
        {
            "adapter": options.read_adapters(adapter),
            "options": options.given({"temperature": temperature, "seed": seed}) or None,
            "max_tokens": max_tokens,
            "context_window": context_window,
            "keep_alive": keep_alive,
            "think": think,
            "format": options.read_format(answer_format),
            "timeout": timeout,
            "force": force or None,
        }
    )
    functions = tools.find_tools(tool or (), max_steps)
    text = read_prompt(prompt)
    if text is None and as_json:
        raise Misuse("`--json` needs a prompt.", hint="A conversation has no JSON form.")
    with options.open_to_ask(model, provider, host=host, announce=text is not None) as client:
        ask = tools.asking_with_tools(client, functions, max_steps)
        messages = [{"role": "system", "content": system}] if system else []
        if text is None:
            _converse(client, ask, messages, arguments, images=image or (), stream=not functions, raw=raw)
        else:
            ask = partial(ask, [*messages, _user_message(text, image)], **arguments)
            print_reply(ask, stream=not (no_stream or functions), as_json=as_json, raw=raw)


def _converse(client: "Client", *arguments: Any, **named: Any) -> None:
    from graftage._cli.conversation import Conversation

    options.require_chat(client)
    Conversation(client, *arguments, **named).run()


def _user_message(text: str, images: list[Path] | None) -> dict[str, Any]:
    return {"role": "user", "content": text, "images": images or []}
