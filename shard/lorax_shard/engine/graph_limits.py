"""What is asked for of graphs of decode steps, before it is known how large steps will be."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from lorax_contract.config import ShardConfig
from lorax_contract.step import WarmupSpec
from lorax_shard.model.interface import GraphSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """Steps of more rows, or with adapters of a larger rank, are launched kernel by kernel."""

    max_rows: int
    max_rank: int
    # Adapters in effect at once.
    max_slots: int

    @classmethod
    def of(cls, config: ShardConfig, max_adapter_rank: int) -> GraphLimits | None:
        """Return what a shard's configuration asks for; None: steps stay without graphs.

        ``max_adapter_rank`` is the largest of adapters that are served; 0: none are.
        """
        if config.eager:
            return None
        if config.world_size > 1:
            logger.info("steps of several ranks are launched kernel by kernel, without graphs")
            return None
        max_rank = max_adapter_rank
        if config.graph_max_rank is not None:
            max_rank = min(max_rank, config.graph_max_rank)
        return cls(config.graph_max_rows, max_rank, config.max_active_adapters)

    def settings(self, spec: WarmupSpec) -> GraphSettings:
        """Return what graphs need of that where steps are as large as ``spec`` says."""
        return GraphSettings(
            max_rows=max(1, min(self.max_rows, spec.max_rows)),
            max_context=spec.max_total_tokens,
            max_rank=self.max_rank,
            max_slots=self.max_slots,
        )
