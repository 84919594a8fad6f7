"""Finds every process that a command has started, wherever it went: by a mark in its environment.

Children of the launcher have sessions of their own, and orphans have another parent; what they
inherited from the first process stays.
"""

from __future__ import annotations

import os
import time
import uuid

import psutil
from tests.helpers.child_processes import command_line

_VARIABLE = "LORAX_TEST_MARK"


class MarkedProcesses:
    """The processes of one run that was started with ``environment``."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex

    def environment(self, **more: str) -> dict[str, str]:
        """Return this process's environment with the mark, and with more variables."""
        return {**os.environ, **more, _VARIABLE: self._mark}

    def alive(self) -> list[psutil.Process]:
        """Return those that run; one that has ended and is not waited for yet does not."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def rank(self, number: int) -> psutil.Process:
        """Return the shard process of a rank, by the configuration that it was given."""
        ending = f"/shard-{number}.json"
        (found,) = [p for p in self.alive() if any(w.endswith(ending) for w in command_line(p))]
        return found

    def left_after(self, timeout_s: float) -> list[str]:
        """Return the command lines of those that still run after a while; none: there are none."""
        deadline = time.monotonic() + timeout_s
        while left := self.alive():
            if time.monotonic() > deadline:
                return [f"{process.pid}: {' '.join(command_line(process))}" for process in left]
            psutil.wait_procs(left, timeout=0.1)
        return []

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            is_dead = process.status() == psutil.STATUS_ZOMBIE
            return not is_dead and process.environ().get(_VARIABLE) == self._mark
        except psutil.Error:
            return False
