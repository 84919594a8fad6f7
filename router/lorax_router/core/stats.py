"""How much the scheduler has to do, and what it does it with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorax_router.core.backlog import QueueDepth
from lorax_router.core.cost import LinearCost


@dataclass(frozen=True, slots=True)
class HostBlockStats:
    """Blocks in host memory, and those that were moved so far."""

    num_blocks: int = 0
    # Of requests that wait swapped out; of nobody, kept for those who begin alike.
    num_held: int = 0
    num_cached: int = 0
    num_moved_out: int = 0
    num_moved_in: int = 0
    # Requests that gave way and were swapped out.
    num_swaps: int = 0


NO_HOST_BLOCKS = HostBlockStats()


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
    # Tokens that were drafted, and those of them that were kept.
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    host: HostBlockStats = NO_HOST_BLOCKS
    # What work takes, as the latest steps had it; None: too few were seen.
    step_cost: LinearCost | None = None
    # Tokens that prompts could have in the latest step in which some had any.
    prompt_limit: int = 0
    # What each tenant has waiting that was never admitted yet; tenants without are left out.
    queue_depths: Mapping[str, QueueDepth] = field(default_factory=dict)
    # Which incarnation of the shards is planned for.
    epoch: int = 1
