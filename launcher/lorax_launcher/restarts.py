"""How often processes that ended are started again, and after which pauses."""

from __future__ import annotations

import time
from collections.abc import Callable

# Seconds of service that end a series: requests get on by that, however often it happens.
SETTLED_S = 10.0
# Pauses before restarts of one series; the last one repeats. Who dies now and then is back at once.
_PAUSES_S = (0.0, 0.0, 0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Restarts:
    """The restarts of a series: of processes that ended again before all had served for SETTLED_S.

    Args:
        limit: how many a series may have; 0: none at all.
        clock: monotonic seconds.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self.number = 0
        self._clock = clock
        self._ready_at: float | None = None

    def ready(self) -> None:
        """All serve from now on."""
        self._ready_at = self._clock()

    def next_pause_s(self) -> float | None:
        """Count a restart and return the seconds to wait before it; None: there were enough."""
        if self._ready_at is not None and self._clock() - self._ready_at > SETTLED_S:
            self.number = 0
        self._ready_at = None
        if self.number >= self.limit:
            return None
        self.number += 1
        return _PAUSES_S[min(self.number, len(_PAUSES_S)) - 1]
