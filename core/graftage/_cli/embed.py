"""`graftage embed`: texts as vectors."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftage._cli import options, show
from graftage._cli.errors import Misuse
from graftage._cli.progress import Waiting
from graftage._cli.prompt import read_prompt

if TYPE_CHECKING:
    from graftage.types import Embeddings

__all__ = ["embed"]

SHOWN_NUMBERS = 3
"""Numbers of each vector in the table."""
EXCERPT = 24


def embed(
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT...", help="Texts, or one from the pipe.")] = None,
    *,
    model: options.Model = None,
    provider: options.Provider = None,
    dimensions: Annotated[
        int | None, typer.Option("--dimensions", min=1, help="Cut the vectors to this length, if the model can.")
    ] = None,
    context_window: options.ContextWindow = None,
    keep_alive: options.KeepAlive = None,
    timeout: options.Timeout = None,
    host: options.Host = None,
    as_json: options.AsJson = False,
) -> None:
    """Turn texts into vectors.

    Prints a short table, or with `--json` every number.
    """
    arguments: dict[str, Any] = options.given(
        {"dimensions": dimensions, "context_window": context_window, "keep_alive": keep_alive, "timeout": timeout}
    )
    inputs = texts or _from_pipe()
    with options.open_to_ask(model, provider, host=host) as client, Waiting("waiting for the vectors"):
        found = client.embed(inputs, **arguments)
    if as_json:
        show.print_json(_embeddings_data(found))
        return
    show.print_table(
        ("text", "length", "vector"),
        (
            (_excerpt(text), len(vector), " ".join(f"{number:+.4f}" for number in vector[:SHOWN_NUMBERS]) + " ...")
            for text, vector in zip(inputs, found.vectors, strict=False)
        ),
    )
    for warning in found.warnings:
        show.note(warning, kind="warning")


def _from_pipe() -> list[str]:
    text = read_prompt(None)
    if text is None:
        raise Misuse("There is no text.", hint='Give some: `graftage embed "one text" "another"`.')
    return [text]


def _excerpt(text: str) -> str:
    return text if len(text) <= EXCERPT else f"{text[: EXCERPT - 3]}..."


def _embeddings_data(found: "Embeddings") -> dict[str, Any]:
    return {
        "vectors": found.vectors,
        "model": found.model,
        "provider": found.provider,
        "usage": asdict(found.usage),
        "timings": asdict(found.timings),
        "warnings": list(found.warnings),
    }
