"""All that a scheduler is made of, as one value: equal settings and inputs give equal plans."""

from __future__ import annotations

from dataclasses import dataclass

from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.policies import make_policy
from lorax_router.core.prefix import BlockNames
from lorax_router.core.scheduler import Scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSettings:
    """Named as the parameters of Scheduler, AdapterTable and ``make_policy`` that they become.

    A log of events begins with them: whatever decides what is planned is here, as a plain value.
    """

    policy: str
    # Of `lorax`; the second of ``batching``, too.
    waiting_served_ratio: float = 1.2
    max_waiting_tokens: int = 20
    # Scheduler.
    num_blocks: int
    block_size: int
    max_step_tokens: int
    max_rows: int
    depth: int = 2
    epoch: int = 1
    prefix_caching: bool = True
    share_prefixes: bool = False
    num_host_blocks: int = 0
    block_move_s: float = 0.0
    keep_evicted: bool = True
    batching: str = "mixed"
    max_kv_read: int | None = None
    max_partial_prompts: int = 1
    whole_prompts: bool = False
    target_itl_s: float | None = None
    draft_tokens: int = 0
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    # AdapterTable.
    max_resident: int
    max_bytes: int | None = None
    cycle_time_s: float = 2.0


def make_scheduler(settings: CoreSettings, block_names: BlockNames | None = None) -> Scheduler:
    """Return a scheduler, its policy and its table of adapters."""
    adapters = AdapterTable(
        max_resident=settings.max_resident,
        max_bytes=settings.max_bytes,
        cycle_time_s=settings.cycle_time_s,
    )
    return Scheduler(
        adapters=adapters,
        policy=make_policy(
            settings.policy,
            adapters,
            waiting_served_ratio=settings.waiting_served_ratio,
            max_waiting_tokens=settings.max_waiting_tokens,
        ),
        num_blocks=settings.num_blocks,
        block_size=settings.block_size,
        max_step_tokens=settings.max_step_tokens,
        max_rows=settings.max_rows,
        depth=settings.depth,
        epoch=settings.epoch,
        prefix_caching=settings.prefix_caching,
        share_prefixes=settings.share_prefixes,
        num_host_blocks=settings.num_host_blocks,
        block_move_s=settings.block_move_s,
        keep_evicted=settings.keep_evicted,
        batching=settings.batching,
        max_waiting_tokens=settings.max_waiting_tokens,
        max_kv_read=settings.max_kv_read,
        max_partial_prompts=settings.max_partial_prompts,
        whole_prompts=settings.whole_prompts,
        target_itl_s=settings.target_itl_s,
        draft_tokens=settings.draft_tokens,
        max_queued_requests=settings.max_queued_requests,
        max_queued_tokens=settings.max_queued_tokens,
        block_names=block_names,
    )
