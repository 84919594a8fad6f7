"""Where the launcher's lines go, and how progress is told between them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TextIO

# Seconds between two plain lines about one task.
PROGRESS_INTERVAL_S = 5.0


class Display(Protocol):
    """Where finished lines go, and how progress is shown between them."""

    def write(self, line: str) -> None:
        """Show one line, without its newline."""

    def progress(self, key: str, done: float, total: float | None, unit: str) -> None:
        """Show how far the task ``key`` is; ``done == total`` ends it."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class PlainDisplay:
    """Lines only: progress becomes a line every few seconds."""

    def __init__(
        self,
        stream: TextIO,
        *,
        report: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream: TextIO | None = stream
        self._report = report
        self._clock = clock
        self._last_shown: dict[str, float] = {}

    def write(self, line: str) -> None:
        """Write one line; a reader that went away silences the display for good."""
        if self._stream is None:
            return
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (BrokenPipeError, ValueError):
            self._stream = None

    def progress(self, key: str, done: float, total: float | None, unit: str) -> None:
        """Report the first, the last and, in between, one event every few seconds."""
        now = self._clock()
        ended = total is not None and done >= total
        last = self._last_shown.get(key)
        if not ended and last is not None and now - last < PROGRESS_INTERVAL_S:
            return
        self._last_shown[key] = now
        self._report(f"{key}: {amount(done, total, unit)}")

    def close(self) -> None:
        """Nothing to undo."""


def amount(done: float, total: float | None, unit: str) -> str:
    """Say how much is done: ``12.0 of 98.0 MB (12 %)``."""
    if unit in ("B", "bytes"):
        done, total, unit = done / 1e6, None if total is None else total / 1e6, "MB"
    digits = 1 if unit == "MB" else 0
    if not total and not done:
        return ""
    if not total:
        return f"{done:.{digits}f} {unit}".rstrip()
    share = f"({100 * done / total:.0f} %)"
    return f"{done:.{digits}f} of {total:.{digits}f} {unit} {share}".replace("  ", " ")
