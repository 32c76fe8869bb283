"""Shows on stderr what a command waits for: the first word, a download, an adapter."""

from __future__ import annotations

import sys
import threading
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING

from graftage._cli import show

if TYPE_CHECKING:
    from typing import Self

    from rich.progress import Progress, TaskID
    from rich.status import Status
    from rich.text import Text

    from graftage.calls import Event
    from graftage.types import PromptProgress, PullProgress

__all__ = ["Waiting", "watcher"]

_current: ContextVar[Waiting | None] = ContextVar("waiting", default=None)
MAX_BARS = 20
"""Bars at one time; the oldest is removed for the next, or a server could fill the memory."""
READING_DELAY = 1.0
"""Seconds until the reading of a prompt is shown."""
LAST_STATUS = "success"
"""The status of the last step of a download."""
FLUSH_TIMEOUT = 2.0
"""Seconds to wait for a last step at the end of the block."""


def watcher() -> object:
    """Return a plugin that shows the progress of a provider in the current `Waiting`."""
    from graftage.hookspecs import hookimpl

    class Watcher:
        name = "graftage-command"

        @hookimpl
        def observe(self, event: Event) -> None:
            waiting = _current.get()
            if waiting is not None and event.progress is not None:
                waiting.step(event.progress)
            if waiting is not None and event.prompt is not None:
                waiting.read(event.prompt)

    return Watcher()


class Waiting:
    """Shows a spinner until the block ends, and the steps of an operation that has any.

    On a terminal, a step that counts bytes is a bar. All other steps are lines. Observers are called in another thread,
    so the block waits for their events at its end.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        # Asked now: rich replaces the stream while it draws.
        self._terminal = show.is_terminal(sys.stderr)
        self._silent = not (self._terminal and show.is_terminal(sys.stdout))
        self._spinner: Status | None = None
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last = ""
        self._lock = threading.Lock()
        self._shown = 0
        self._over = False

    def __enter__(self) -> Self:
        self._before = _current.set(self)
        self._began = time.monotonic()
        self._spin()
        return self

    def __exit__(self, *_: object) -> None:
        from graftage._engine.delivery import flush

        _current.reset(self._before)
        shown = -1
        while shown != self._shown:  # While steps arrive: they may take longer to draw than to make.
            shown = self._shown
            flush(FLUSH_TIMEOUT)
        with self._lock:
            self._over = True
            self._stop()

    def step(self, step: PullProgress) -> None:
        """Show a step, unless the block has ended."""
        with self._lock:
            if not self._over:
                self._show(step)
                self._shown += 1

    def _show(self, step: PullProgress) -> None:
        if step.status == LAST_STATUS:
            self._stop()
            self._spin()
        elif self._terminal and step.total is not None and step.completed is not None:
            self._draw(step.digest or step.status, step.status, step.total, step.completed)
        elif step.status != self._last:
            self._last = step.status
            show.note(show.cell(step.status))

    def read(self, prompt: PromptProgress) -> None:
        """Show how much of a prompt has been read, if that takes long."""
        with self._lock:
            if self._over or self._spinner is None or time.monotonic() - self._began < READING_DELAY:
                return
            self._spinner.update(_dim(f"reading the prompt: {100 * prompt.processed // max(prompt.total, 1)} %"))

    def _draw(self, key: str, title: str, total: int, completed: int) -> None:
        bars = self._bars or self._begin_bars()
        if key not in self._tasks:
            if len(self._tasks) == MAX_BARS:
                bars.remove_task(self._tasks.pop(next(iter(self._tasks))))
            self._tasks[key] = bars.add_task(show.cell(title), total=total)
        bars.update(self._tasks[key], description=show.cell(title), total=total, completed=completed)

    def _begin_bars(self) -> Progress:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
        from rich.table import Column

        self._stop()  # rich draws only one live display at a time.
        title = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        self._bars = Progress(
            title, BarColumn(bar_width=None), DownloadColumn(), console=show.console(error=True), expand=True
        )
        self._bars.start()
        return self._bars

    def _spin(self) -> None:
        if self._silent:
            return
        self._spinner = show.console(error=True).status(_dim(self._text), spinner_style="dim")
        self._spinner.start()

    def _stop(self) -> None:
        for moving in (self._spinner, self._bars):
            if moving is not None:
                moving.stop()
        self._spinner = self._bars = None
        self._tasks.clear()


def _dim(text: str) -> Text:
    from rich.text import Text

    return Text(show.cell(text), style="dim")
