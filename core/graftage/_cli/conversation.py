"""The interactive part of `graftage chat`."""

import contextlib
import importlib
import re
import select
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftage._cli import errors, show
from graftage._cli.answer import Stopped, stream_reply
from graftage.exceptions import GraftageError

if TYPE_CHECKING:
    from graftage import Client

__all__ = ["Conversation"]

PROMPT = ">>> "
CONTINUED = "... "
COMMAND = re.compile(r"/(\w+|\?)?( .*)?")
"""A line that is no question: a path and a comment begin otherwise."""
PASTE_GAP = 0.02
"""Seconds within which the next line of a paste is there; nobody types one in that time."""
ALIASES = {"/bye": "/exit", "/quit": "/exit", "/?": "/help"}
HELP = """\
/clear   forget the conversation so far
/exit    end the conversation, as Ctrl-D does
/help    show this
Ctrl-C   stop the answer"""


class Conversation:
    """Questions and answers that the model remembers.

    Args:
        client: who answers.
        start: the messages that `/clear` leaves.
        arguments: what each call is given.
        images: pictures for the first question.
        raw: print control characters as they are.
    """

    def __init__(
        self,
        client: "Client",
        start: Sequence[Any],
        arguments: Mapping[str, Any],
        *,
        images: Sequence[Path] = (),
        raw: bool = False,
    ) -> None:
        self._client = client
        self._start = tuple(start)
        self._history = list(start)
        self._arguments = arguments
        self._images = list(images)
        self._raw = raw

    def run(self) -> None:
        """Talk until the end of the input, or `/exit`."""
        with contextlib.suppress(ImportError):  # Windows has none; its console edits lines by itself.
            # Python turns it off. GNU's then hands over a paste as one text; others do not know the variable.
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
        """One question and its answer. A question that got no answer is forgotten."""
        messages = [*self._history, {"role": "user", "content": text, "images": self._images}]
        try:
            reply = stream_reply(partial(self._client.chat, messages, **self._arguments), raw=self._raw)
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
            self._history = [*messages, {"role": "assistant", "content": reply.text}]
            self._images = []


def _read_inputs() -> Iterator[str]:
    """What is typed or pasted until the end of the input, each empty where Ctrl-C took it back."""
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
        yield "\n".join(lines).strip("\n").rstrip()  # The first line of pasted code may be indented, too.


def _more_is_waiting(lines: Sequence[str]) -> bool:
    """Whether more of a paste is in the terminal's input, where no brackets around it have told so."""
    if COMMAND.fullmatch(lines[0]):
        return False
    try:
        return bool(select.select([sys.stdin], [], [], PASTE_GAP)[0])
    except (OSError, ValueError):  # On Windows only sockets can be looked at.
        return False
