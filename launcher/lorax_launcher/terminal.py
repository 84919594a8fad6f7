"""One updating line on a terminal, with log lines scrolling above it."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from lorax_launcher.display import amount


class _Amount(ProgressColumn):
    """How much is done, in the words that plain output uses."""

    def render(self, task: Task) -> Text:
        """Return the cell of one task."""
        return Text(amount(task.completed, task.total, task.fields.get("unit", "")))


class TerminalDisplay:
    """Shows the task that runs now in one line, and takes the line away when it ends."""

    def __init__(self, stream: TextIO) -> None:
        self._console = RichConsole(file=stream, highlight=False, markup=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._key = ""

    def write(self, line: str) -> None:
        """Print one line above the progress line."""
        self._console.print(Text.from_ansi(line))

    def progress(self, key: str, done: float, total: float | None, unit: str) -> None:
        """Update the line of the task, or start a new line for another task."""
        if total is not None and done >= total:
            self.close()
            return
        if self._bar is None or key != self._key:
            self.close()
            self._bar = self._start(key, total, unit)
        self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    def _start(self, key: str, total: float | None, unit: str) -> Progress:
        self._key = key
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        measured = (BarColumn(), _Amount()) if total or unit else ()
        bar = Progress(
            *columns,
            *measured,
            console=self._console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        bar.start()
        bar.add_task(key, total=total, unit=unit)
        return bar

    def close(self) -> None:
        """Remove the progress line."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
