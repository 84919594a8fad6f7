"""How long a start takes: which process when, and which part of it for how long."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

# Of a process: from its start to where it begins to count by itself.
_BEFORE = "starting Python"
# Parts shorter than that are left out of the table, not of the numbers.
_LEAST_S = 0.05
_NAME_WIDTH, _TIME_WIDTH = 10, 6


class StartTimes:
    """Seconds since the launcher began, of each child and its parts."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._zero = clock()
        self._began: dict[str, float] = {}
        self._processes: list[dict[str, Any]] = []
        self._is_over = False

    def began(self, process: str) -> None:
        """A process is started now."""
        self._began[process] = self._now()

    def reported(self, process: str, parts: object) -> None:
        """A process says now that it is ready, and how many seconds its parts took."""
        since, until = self._began.pop(process, 0.0), self._now()
        if self._is_over:
            return
        own = parts if isinstance(parts, Mapping) else {}
        told = {str(name): float(s) for name, s in own.items() if isinstance(s, int | float)}
        before = max(0.0, until - since - sum(told.values()))
        entry = {"process": process, "from_s": since, "until_s": until}
        self._processes.append({**entry, "parts": {_BEFORE: before, **told} if told else {}})

    def report(self) -> dict[str, Any]:
        """Return all that was counted; the start is over now, and what starts later is not noted."""
        self._is_over = True
        return {"total_s": self._now(), "processes": list(self._processes)}

    def _now(self) -> float:
        return self._clock() - self._zero


def start_table(start: Any) -> list[str]:
    """Return the lines for what ``StartTimes.report`` returned; none for anything else."""
    processes = start.get("processes") if isinstance(start, Mapping) else None
    if not isinstance(processes, list):
        return []
    lines = [_line("process", "from", "until", "seconds of its parts")]
    for each in processes:
        named = [f"{name} {s:.2f}" for name, s in each["parts"].items() if s >= _LEAST_S]
        since, until = f"{each['from_s']:.2f}", f"{each['until_s']:.2f}"
        lines.append(_line(each["process"], since, until, ", ".join(named)).rstrip())
    return lines


def _line(process: str, since: str, until: str, parts: str) -> str:
    return f"{process:<{_NAME_WIDTH}}{since:>{_TIME_WIDTH}}{until:>{_TIME_WIDTH + 1}}  {parts}"
