"""A peer's processes: held still while another is measured, and ended all together."""

from __future__ import annotations

import contextlib
import signal

import psutil


class ProcessTree:
    """A process and all that it started, whatever groups they lead."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def pause(self) -> None:
        """Take the processor from them: some wait busily for their turn."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let them run again."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End them at once, paused or not."""
        self._signal(signal.SIGKILL)

    def resident_bytes(self) -> int:
        """Memory that they hold; what several share counts for each."""
        total = 0
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def _processes(self) -> list[psutil.Process]:
        try:
            first = psutil.Process(self._pid)
            return [*first.children(recursive=True), first]
        except psutil.NoSuchProcess:
            return []

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
