"""The interactive part of `graftage chat`."""

import contextlib
import importlib
import re
import select
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from graftage._cli import errors, show
from graftage._cli.answer import Ask, Stopped, print_reply
from graftage.exceptions import GraftageError

if TYPE_CHECKING:
    from graftage import Client, Message

__all__ = ["Conversation"]

PROMPT = ">>> "
CONTINUED = "... "
COMMAND = re.compile(r"/(\w+|\?)?( .*)?")
"""A line that is a command: paths and comments do not match."""
PASTE_GAP = 0.02
"""Seconds until the next line of a paste arrives; typing one takes longer."""
ALIASES = {"/bye": "/exit", "/quit": "/exit", "/?": "/help"}
HELP = """\
/clear   forget the conversation so far
/exit    end the conversation, as Ctrl-D does
/help    show this
Ctrl-C   stop the reply"""


class Conversation:
    """A conversation: each question is sent with the messages before it.

    Args:
        client: the client to ask.
        ask: `Client.chat`, or `asking_with_tools`, whose reply is no stream.
        start: the first messages, which `/clear` keeps.
        arguments: arguments of each call.
        images: pictures for the first question.
        stream: print each reply as it arrives.
        raw: print control characters as they are.
    """

    def __init__(
        self,
        client: "Client",
        ask: Ask,
        start: "Sequence[Mapping[str, object] | Message]",
        arguments: Mapping[str, object],
        *,
        images: Sequence[Path] = (),
        stream: bool = True,
        raw: bool = False,
    ) -> None:
        self._client = client
        self._ask_model = ask
        self._stream = stream
        self._start = tuple(start)
        self._history = list(start)
        self._arguments = arguments
        self._images = list(images)
        self._raw = raw

    def run(self) -> None:
        """Run until the end of the input, or `/exit`."""
        with contextlib.suppress(ImportError):  # Windows has no readline; its console edits lines.
            # Python turns this off. With it, GNU readline returns a paste as one text; libedit ignores it.
            importlib.import_module("readline").parse_and_bind("set enable-bracketed-paste on")
        show.note(f"{self._client.model} on {self._client.provider}. /help lists the commands.")
        for text in _read_inputs():
            if COMMAND.fullmatch(text):
                command = ALIASES.get(text, text)
                if command == "/exit":
                    return
                self._command(command)
            elif text:
                self._ask(text)

    def _command(self, line: str) -> None:
        if line == "/clear":
            self._history = list(self._start)
            show.note("Forgotten.")
        elif line == "/help":
            show.note(HELP, indent="")
        else:
            show.note(
                f"There is no command `{line}`. /help lists them; a space before the line sends it as a question."
            )

    def _ask(self, text: str) -> None:
        """Ask one question, and print the reply. A question without a reply is forgotten."""
        messages = [*self._history, {"role": "user", "content": text, "images": self._images}]
        try:
            ask = partial(self._ask_model, messages, **self._arguments)
            reply = print_reply(ask, stream=self._stream, as_json=False, raw=self._raw)
        except Stopped as stopped:
            show.note("(stopped)")
            reply = stopped.partial
        except KeyboardInterrupt:
            show.note("(stopped before it began)")
            return
        except GraftageError as error:
            errors.report(error)
            return
        if reply.text:
            self._history = [*messages, *reply.messages[:-1], {"role": "assistant", "content": reply.text}]
            self._images = []


def _read_inputs() -> Iterator[str]:
    """Yield each input that is typed or pasted; Ctrl-C makes it empty."""
    ended = False
    while not ended:
        lines: list[str] = []
        try:
            lines.append(input(PROMPT))
            while _more_is_waiting(lines):
                lines.append(input(CONTINUED))
        except EOFError:
            sys.stdout.write("\n")
            ended = True
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            show.note("Ctrl-D or /exit ends the conversation.")
            lines.clear()
        yield "\n".join(lines).strip("\n").rstrip()  # Keep the indent of pasted code.


def _more_is_waiting(lines: Sequence[str]) -> bool:
    """Return whether more lines of a paste wait in the terminal, if it marks no pastes."""
    if COMMAND.fullmatch(lines[0]):
        return False
    try:
        return bool(select.select([sys.stdin], [], [], PASTE_GAP)[0])
    except (OSError, ValueError):  # On Windows, `select` takes only sockets.
        return False
