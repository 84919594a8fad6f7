"""How many replicas there should be, by what they have to do: pure, told the time.

As Kubernetes' autoscaler does it with `deploy/kubernetes/components/autoscaling`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from lorax_launcher.placing.values import GroupLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalerSettings:
    """The constants of the policy."""

    # Requests that may wait for each replica, and the share of its KV blocks that may be taken;
    # one fewer only where each of the rest would have no more than the lower share.
    queued: float = 4.0
    kv_share: float = 0.8
    lower_kv_share: float = 0.6
    # Seconds for which more, or less, has been needed all the time before the number changes.
    up_after_s: float = 30.0
    down_after_s: float = 600.0
    # At most so many more at once; between two changes in one direction so many seconds.
    most_more: int = 2
    up_pause_s: float = 60.0
    down_pause_s: float = 180.0


class Autoscaler:
    """Decides how many replicas are wanted.

    Args:
        settings: the policy's constants.
    """

    def __init__(self, settings: AutoscalerSettings | None = None) -> None:
        self._settings = settings or AutoscalerSettings()
        # When it was looked, how many were needed then, and with how many one could do.
        self._needs: deque[tuple[float, int, int]] = deque()
        self._began_at: float | None = None
        self._changed_at = -math.inf

    def wanted(
        self, loads: Sequence[GroupLoad], current: int, bounds: tuple[int, int], now: float
    ) -> int:
        """Return how many replicas are wanted.

        Args:
            loads: of those that serve.
            current: as many are wanted so far.
            bounds: the least and the most.
            now: seconds of a clock that never goes back.
        """
        least, most = bounds
        if not least <= current <= most:
            self._changed_at = now
            return min(max(current, least), most)
        self._note(loads, now)
        wanted = min(max(self._changed(current, now), least), most)
        if wanted != current:
            self._changed_at = now
        return wanted

    def _note(self, loads: Sequence[GroupLoad], now: float) -> None:
        settings = self._settings
        if self._began_at is None:
            self._began_at = now
        queued = sum(each.num_queued for each in loads)
        kv = sum(each.kv_in_use for each in loads)
        by_queue = queued / settings.queued
        needed = math.ceil(max(by_queue, kv / settings.kv_share))
        enough = math.ceil(max(by_queue, kv / settings.lower_kv_share))
        self._needs.append((now, needed, enough))
        while self._needs[0][0] < now - max(settings.up_after_s, settings.down_after_s):
            self._needs.popleft()

    def _changed(self, current: int, now: float) -> int:
        settings, since = self._settings, now - self._changed_at
        up = self._over(settings.up_after_s, now)
        if (
            up
            and (needed := min(each[1] for each in up)) > current
            and since >= settings.up_pause_s
        ):
            return min(needed, current + settings.most_more)
        down = self._over(settings.down_after_s, now)
        if down and max(each[2] for each in down) < current and since >= settings.down_pause_s:
            return current - 1
        return current

    def _over(self, seconds: float, now: float) -> list[tuple[float, int, int]]:
        """Return what was needed in the last seconds; nothing if it was not looked for so long."""
        if self._began_at is None or now - self._began_at < seconds:
            return []
        return [each for each in self._needs if each[0] >= now - seconds]
