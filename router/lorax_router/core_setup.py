"""What the core is made of by a configuration, and the log of what enters it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorax_contract.config import RouterConfig
from lorax_contract.step import ShardInfo, WarmupSpec
from lorax_router.core.settings import CoreSettings
from lorax_router.service.limits import Lengths

if TYPE_CHECKING:
    from lorax_router.event_log.writer import EventLogWriter


@dataclass(frozen=True, slots=True)
class Budgets:
    """What fits, after the shards have measured."""

    lengths: Lengths
    num_blocks: int
    block_size: int
    max_step_tokens: int
    max_rows: int
    depth: int
    # By what they were measured.
    warmup: WarmupSpec

    @property
    def pool_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_blocks * self.block_size


def core_settings(config: RouterConfig, budgets: Budgets, info: ShardInfo) -> CoreSettings:
    """Return what the scheduler is made of."""
    return CoreSettings(
        policy=config.scheduling_policy,
        waiting_served_ratio=config.waiting_served_ratio,
        max_waiting_tokens=config.max_waiting_tokens,
        batching=config.batching,
        max_kv_read=config.max_batch_kv_read,
        max_partial_prompts=config.max_partial_prompts,
        whole_prompts=info.is_encoder,
        target_itl_s=None if config.target_itl_ms is None else config.target_itl_ms / 1e3,
        draft_tokens=info.speculative_tokens,
        num_blocks=budgets.num_blocks,
        block_size=budgets.block_size,
        max_step_tokens=budgets.max_step_tokens,
        max_rows=budgets.max_rows,
        depth=budgets.depth,
        epoch=info.epoch,
        # Of an encoder's prompts nothing is kept.
        prefix_caching=config.prefix_caching and not info.is_encoder,
        share_prefixes=config.share_prefixes,
        max_queued_requests=config.max_queued_requests,
        max_queued_tokens=config.max_queued_tokens,
        num_host_blocks=info.num_host_blocks,
        block_move_s=info.block_move_s,
        keep_evicted=config.swap_cached_blocks,
        max_resident=config.max_active_adapters,
        max_bytes=info.adapter_bytes or None,
        cycle_time_s=config.adapter_cycle_time_s,
    )


def event_log(config: RouterConfig, settings: CoreSettings) -> EventLogWriter | None:
    """Return the log of events that is asked for; what writes it is not on every machine."""
    if config.record_events is None:
        return None
    from lorax_router.event_log.writer import open_event_log

    return open_event_log(config.record_events, settings, config.record_events_bytes)
