"""How often shards that ended are started again, and after which pauses."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

# Seconds after which a restart counts no more: what went well that long is no part of a series.
COUNTED_S = 600.0
# Pauses before restarts of one series; the last one repeats. Who dies once is back at once.
_PAUSES_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)


class Restarts:
    """The restarts of a series.

    Args:
        limit: how many there may be within COUNTED_S; 0: none at all.
        clock: monotonic seconds.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._times: deque[float] = deque()

    @property
    def number(self) -> int:
        """How many there were in this series."""
        return len(self._times)

    def next_pause_s(self) -> float | None:
        """Count a restart and return the seconds to wait before it; None: there were enough."""
        now = self._clock()
        while self._times and now - self._times[0] > COUNTED_S:
            self._times.popleft()
        if len(self._times) >= self.limit:
            return None
        self._times.append(now)
        return _PAUSES_S[min(len(self._times), len(_PAUSES_S)) - 1]
