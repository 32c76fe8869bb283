"""`graftage generate`: answer one text, or continue it."""

from functools import partial
from typing import Annotated

import typer

from graftage._cli import options
from graftage._cli.answer import print_reply
from graftage._cli.errors import Misuse
from graftage._cli.prompt import read_prompt

__all__ = ["generate"]


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text. Piped text comes before it.")] = None,
    *,
    model: options.Model = None,
    provider: options.Provider = None,
    system: options.System = None,
    suffix: Annotated[str | None, typer.Option("--suffix", help="The text after the gap to fill.")] = None,
    raw_prompt: Annotated[
        bool, typer.Option("--raw-prompt", help="Continue the text as it is, without the model's template.")
    ] = False,
    adapter: options.Adapters = None,
    temperature: options.Temperature = None,
    seed: options.Seed = None,
    max_tokens: options.MaxTokens = None,
    context_window: options.ContextWindow = None,
    keep_alive: options.KeepAlive = None,
    think: options.Think = None,
    image: options.Images = None,
    answer_format: options.Format = None,
    timeout: options.Timeout = None,
    host: options.Host = None,
    force: options.Force = False,
    no_stream: options.NoStream = False,
    as_json: options.AsJson = False,
    raw: options.Raw = False,
) -> None:
    """Answer one text; `--raw-prompt` continues it.

    The model's template turns the text into a question, as in a chat without a history. With `--raw-prompt` the model
    gets the text as it is, and continues it.
    """
    arguments = options.given(
        {
            "system": system,
            "suffix": suffix,
            "raw": raw_prompt or None,
            "adapter": options.read_adapters(adapter),
            "options": options.given({"temperature": temperature, "seed": seed}) or None,
            "max_tokens": max_tokens,
            "context_window": context_window,
            "keep_alive": keep_alive,
            "think": think,
            "images": image or None,
            "format": options.read_format(answer_format),
            "timeout": timeout,
            "force": force or None,
        }
    )
    text = read_prompt(prompt)
    if text is None:
        raise Misuse("There is no prompt.", hint='Give one: `graftage generate "Once upon a time"`.')
    with options.open_to_ask(model, provider, host=host) as client:
        print_reply(partial(client.generate, text, **arguments), stream=not no_stream, as_json=as_json, raw=raw)
