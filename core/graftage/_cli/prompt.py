"""Where the prompt comes from: the command line, a pipe, or both."""

import sys

from graftage._cli.errors import Misuse
from graftage._cli.show import is_terminal

__all__ = ["read_prompt"]


def read_prompt(prompt: str | None) -> str | None:
    """Return the prompt to send; None if none was given at a terminal.

    Piped text comes before the prompt.
    """
    text = prompt
    if sys.stdin is not None and not is_terminal(sys.stdin):
        piped = _read_pipe()
        text = f"{piped.rstrip()}\n\n{prompt}" if prompt and piped.strip() else prompt or piped
    if text is not None and not text.strip():
        raise Misuse("There is no prompt.", hint='Give one: `graftage chat "Why is the sky blue?"`.')
    return text


def _read_pipe() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Misuse(f"The piped input is not valid UTF-8: {error.reason} at byte {error.start}.") from None
