"""`graftage generate`: continue a text."""

from functools import partial
from typing import Annotated

import typer

from graftage._cli import options
from graftage._cli.answer import answer
from graftage._cli.errors import Misuse
from graftage._cli.prompt import read_prompt

__all__ = ["generate"]


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue. What is piped in comes before it.")
    ] = None,
    *,
    model: options.Model = None,
    system: options.System = None,
    suffix: Annotated[str | None, typer.Option("--suffix", help="What comes after the gap to fill.")] = None,
    raw_prompt: Annotated[
        bool, typer.Option("--raw-prompt", help="Send the prompt without the model's template.")
    ] = False,
    adapter: options.Adapter = None,
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
    """Continue a text, without a conversation around it."""
    arguments = options.given(
        {
            "system": system,
            "suffix": suffix,
            "raw": raw_prompt or None,
            "adapter": adapter,
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
    with options.answering(model, host=host) as client:
        answer(partial(client.generate, text, **arguments), stream=not no_stream, as_json=as_json, raw=raw)
