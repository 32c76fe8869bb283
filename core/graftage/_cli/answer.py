"""Prints a reply as it arrives or as a whole, and its warnings."""

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from graftage._cli import show
from graftage._cli.progress import Waiting
from graftage.exceptions import ProviderError

if TYPE_CHECKING:
    from rich.console import Console

    from graftage.types import Chunk, Reply

__all__ = ["Stopped", "print_reply"]

Ask = Callable[..., Any]
"""`Client.chat`, `Client.generate` or `asking_with_tools`, with all arguments but `stream`."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C came during a reply."""

    def __init__(self, partial: "Reply") -> None:
        super().__init__()
        self.partial = partial
        """What had arrived."""


def print_reply(ask: Ask, *, stream: bool, as_json: bool, raw: bool) -> "Reply":
    """Ask, print the reply as text, as a stream of text, or as JSON, and return it.

    Raises:
        Stopped: Ctrl-C came during a stream.
    """
    if stream and not as_json:
        return _stream_reply(ask, raw=raw)
    with Waiting("waiting for the reply"):
        reply: Reply = ask(stream=False)
    if as_json:
        show.print_json(_reply_data(reply))
        return reply
    printer = _ReplyPrinter(raw=raw)
    printer.add(reply)
    printer.end()
    _print_warnings(reply)
    return reply


def _stream_reply(ask: Ask, *, raw: bool) -> "Reply":
    with Waiting("waiting for the first word"):
        stream = ask(stream=True)
    printer = _ReplyPrinter(raw=raw)
    try:
        with stream:
            for chunk in stream:
                printer.add(chunk)
    except KeyboardInterrupt:
        raise Stopped(stream.partial) from None
    except ProviderError as error:
        printer.catch_up(error)
        raise
    finally:
        printer.end()
    reply: Reply = stream.reply
    _print_warnings(reply)
    return reply


class _ReplyPrinter:
    """Prints text to stdout and thinking, dimmed, to stderr."""

    def __init__(self, *, raw: bool) -> None:
        self._text = show.Escaper(raw=raw)
        self._thinking = show.Escaper(raw=raw)
        self._fed = 0
        self._last = ""
        self._thoughts_open = False
        self._dimmed: Console | None = None

    def add(self, piece: "Chunk | Reply") -> None:
        """Print a piece."""
        if piece.thinking:
            self._think(self._thinking.feed(piece.thinking))
        if piece.text:
            self._end_thinking()
            self._fed += len(piece.text)
            self._write(self._text.feed(piece.text))

    def catch_up(self, error: ProviderError) -> None:
        """Print the rest of the partial reply: the chunk in which the error was found was not printed."""
        if error.partial is not None and (rest := error.partial.text[self._fed :]):
            self._write(self._text.feed(rest))

    def end(self) -> None:
        """End the last line."""
        self._end_thinking()
        self._write(self._text.end())
        if self._last and not self._last.endswith("\n"):
            self._write("\n")

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._last = text

    def _think(self, text: str) -> None:
        from rich.text import Text

        self._dimmed = self._dimmed or show.console(error=True)
        self._dimmed.print(Text(text, style="dim"), end="", soft_wrap=True)
        self._thoughts_open = True

    def _end_thinking(self) -> None:
        if self._thoughts_open:
            self._think(self._thinking.end() + "\n")
            self._thoughts_open = False


def _print_warnings(reply: "Reply") -> None:
    for warning in reply.warnings:
        show.note(warning, kind="warning")
    if reply.finish_reason == "length":
        show.note(_cut(reply), kind="warning")


def _cut(reply: "Reply") -> str:
    """Explain why a reply was cut; a policy is named if its limit was reached."""
    written, read = reply.usage.output_tokens or 0, reply.usage.input_tokens or 0
    for name, tokens in (("max_tokens", written), ("context_window", read + written)):
        limit = getattr(reply.limits, name, None)
        if reply.limits is not None and tokens and tokens == limit:
            why = reply.limits.reasons.get(name, "a policy")
            option = f"--{name.replace('_', '-')}"
            return f"The reply was cut at `{option}` {limit} by {why}. `{option} N --force` exceeds it."
    return "The reply was cut: raise `--max-tokens` or `--context-window`."


def _reply_data(reply: "Reply") -> dict[str, Any]:
    """Convert a reply to plain data."""
    data: dict[str, Any] = {
        "text": reply.text,
        "model": reply.model,
        "provider": reply.provider,
        "adapter": reply.adapter,
        "adapter_digest": reply.adapter_digest,
        "finish_reason": reply.finish_reason,
        "usage": asdict(reply.usage),
        "timings": asdict(reply.timings),
        "warnings": list(reply.warnings),
    }
    if reply.thinking:
        data["thinking"] = reply.thinking
    if reply.parsed is not None:
        data["parsed"] = reply.parsed
    if reply.steps:
        from graftage._cli.tools import step_data

        data["steps"] = [step_data(each) for each in reply.steps]
    return data
