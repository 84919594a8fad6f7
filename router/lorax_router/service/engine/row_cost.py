"""What a sequence took beside its tokens, counted where it happens."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class RowCost:
    """Of one sequence; the engine loop counts, whoever closes the request's account reads.

    Moments are perf_counter seconds.
    """

    # When it first was in a step; 0: in none yet.
    scheduled_at: float = 0.0
    # Tokens of the prompt that were in the cache then.
    num_cached: int = 0
    # Times it was in the shards anew, after it gave way, a pass failed or shards were lost.
    num_returns: int = 0
    # Losses of shards while it was open: from when to when there were none.
    recoveries: list[tuple[float, float]] = field(default_factory=list)
    # Whether it has to come back since the shards that had it are gone.
    is_lost: bool = False
    # Tokens that were drafted for it.
    num_drafted: int = 0

    def enters(self, now: float, num_cached: int) -> None:
        """Its row is in a step; the first time is when it was scheduled."""
        if not self.scheduled_at:
            self.scheduled_at, self.num_cached = now, num_cached
        elif self.is_lost:
            self.is_lost = False
        else:
            self.num_returns += 1

    def outlived(self, lost_at: float, back_at: float) -> None:
        """Others took the place of shards that were lost meanwhile."""
        self.recoveries.append((lost_at, back_at))
        self.is_lost = bool(self.scheduled_at)

    @property
    def recovery_s(self) -> float:
        """Seconds without shards."""
        return sum(back - lost for lost, back in self.recoveries)
