"""How long the parts of a process's start take."""

from __future__ import annotations

import time
from collections.abc import Callable


class StartClock:
    """Told when a part has ended; the next one begins there, the first with the clock itself."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last = clock()
        # Seconds by part, in the order in which they came.
        self.parts: dict[str, float] = {}

    def ended(self, part: str) -> None:
        """Count the time since the last part's end to this one."""
        now = self._clock()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now
