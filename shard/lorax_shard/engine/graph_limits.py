"""What is asked for of graphs of decode steps, before it is known how large steps will be."""

from __future__ import annotations

from dataclasses import dataclass

from lorax_contract.step import WarmupSpec
from lorax_shard.model.interface import GraphSettings


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """Steps of more rows, or with adapters of a larger rank, are launched kernel by kernel."""

    max_rows: int
    max_rank: int
    # Adapters in effect at once.
    max_slots: int

    def settings(self, spec: WarmupSpec) -> GraphSettings:
        """Return what graphs need of that where steps are as large as ``spec`` says."""
        return GraphSettings(
            max_rows=max(1, min(self.max_rows, spec.max_rows)),
            max_context=spec.max_total_tokens,
            max_rank=self.max_rank,
            max_slots=self.max_slots,
        )
