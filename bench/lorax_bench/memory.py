"""How much memory the processes of a server take at most."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import psutil

_INTERVAL_S = 0.25


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process and all below it.

    Pages that processes share count for each of them.
    """
    total = 0
    try:
        first = psutil.Process(pid)
        processes = [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


class PeakMemory:
    """Looks at a server's memory four times a second while a run lasts."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def _watch(self) -> None:
        while True:
            self.look()
            if self._end.wait(_INTERVAL_S):
                return

    def look(self) -> None:
        """Look now, whether or not it is time."""
        self.peak_bytes = max(self.peak_bytes, resident_bytes(self._pid))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()
        self.look()
