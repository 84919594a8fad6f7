"""The ``torch`` backend: one segment of rows after the other in float32. The specification."""

from __future__ import annotations

from typing import Any

import torch

from lorax_shard.lora.assignment import Assignment, Segment
from lorax_shard.lora.backend import GroupWeights, LoraBackend, LoraGroup


class ReferenceGroup(LoraGroup):
    """Loops over the segments of a step."""

    def __init__(self) -> None:
        self._weights: dict[int, GroupWeights] = {}

    def load(self, slot: int, weights: GroupWeights) -> None:
        """Keep the matrices as they are."""
        self._weights[slot] = weights

    def unload(self, slot: int) -> None:
        """Forget the matrices."""
        del self._weights[slot]

    def shrink(self, x: torch.Tensor, rows: Assignment) -> list[tuple[Segment, torch.Tensor]]:
        """Return the float32 product of each segment whose slot is loaded."""
        return [
            (
                segment,
                x[segment.start : segment.stop].float() @ self._weights[segment.slot].a.float().T,
            )
            for segment in rows.segments
            if segment.slot in self._weights
        ]

    def expand(self, shrunk: Any, member: int, y: torch.Tensor, rows: Assignment) -> None:
        """Add in float32 and round once."""
        for segment, product in shrunk:
            weights = self._weights[segment.slot]
            b = weights.b[member]
            if b is None:
                continue
            start = weights.offsets[member]
            part = product[:, start : start + b.shape[0]] @ b.float()
            target = y[segment.start : segment.stop, : b.shape[1]]
            target.copy_((target.float() + part).to(y.dtype))


class TorchLora(LoraBackend):
    """Says what every other backend must compute; on any device, in any dtype."""

    name = "torch"

    def make_group(self, num_members: int) -> ReferenceGroup:
        """Return an empty group."""
        return ReferenceGroup()
