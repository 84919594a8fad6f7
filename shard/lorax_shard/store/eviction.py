"""Which entries give way when the store is full: a pure decision."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

# Uses count half after a day, so that last week's favourite does not stay for ever.
HALF_LIFE_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An entry that nobody pinned; whether it is in use is found out when it is its turn."""

    digest: str
    size: int
    # Seconds that fetching it again is expected to take.
    cost_s: float
    idle_s: float
    # Uses, older ones counting less.
    uses: float


def order(candidates: Iterable[Candidate]) -> list[str]:
    """Return the digests in the order in which they give way.

    What gives way first is what frees the most bytes per second of expected reloading:
    idle time (how long it was not wanted) x bytes, over (reload seconds x uses).
    """
    return [each.digest for each in sorted(candidates, key=_dispensable, reverse=True)]


def _dispensable(each: Candidate) -> float:
    return (max(each.idle_s, 0.0) + 1.0) * each.size / (max(each.cost_s, 0.05) * (1.0 + each.uses))


def decayed(uses: float, elapsed_s: float) -> float:
    """Return what ``uses`` counted some time ago count for now."""
    return uses * math.exp2(-max(elapsed_s, 0.0) / HALF_LIFE_S)
