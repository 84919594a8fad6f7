"""How much the scheduler has to do, and what it does it with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """A snapshot for metrics."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_preemptions: int
    num_steps: int
    # Blocks that nobody uses, kept for those who begin alike.
    num_cached_blocks: int = 0
    # Tokens of all that entered, and those of them whose blocks were there.
    num_entered_tokens: int = 0
    num_cached_tokens: int = 0
