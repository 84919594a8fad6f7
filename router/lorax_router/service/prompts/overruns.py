"""Which templates took too much, and for how long they are not rendered again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from cachetools import TTLCache

# The first may be chance: a machine that stood still.
_FREE = 1
_FIRST_S = 60.0
_LONGEST_S = 600.0
_MAX_KNOWN = 4096


class Overruns:
    """Counts by template; each one after the first doubles the time. Old ones are forgotten."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Number, and when the template may be tried again.
        self._known: TTLCache[str, tuple[int, float]] = TTLCache(
            _MAX_KNOWN, ttl=2 * _LONGEST_S, timer=clock
        )

    def note(self, key: str) -> None:
        """Take in that a template ran over."""
        count = self._known.get(key, (0, 0.0))[0] + 1
        seconds = 0.0
        if count > _FREE:
            seconds = min(_FIRST_S * 2.0 ** min(count - _FREE - 1, 8), _LONGEST_S)
        self._known[key] = count, self._clock() + seconds

    def refused_s(self, key: str) -> int:
        """Return for how many seconds a template is not rendered; 0: it is."""
        _, until = self._known.get(key, (0, 0.0))
        return max(0, math.ceil(until - self._clock()))
