"""The ``torch`` backend: one span of rows after the other in float32. The specification."""

from __future__ import annotations

from typing import Any

import torch

from lorax_shard.lora.assignment import Assignment, Span
from lorax_shard.lora.backend import GroupWeights, LoraBackend, LoraGroup


class TorchGroup(LoraGroup):
    """Loops over the spans of a step."""

    def __init__(self) -> None:
        self._weights: dict[int, GroupWeights] = {}

    def load(self, slot: int, weights: GroupWeights) -> None:
        """Keep the matrices as they are."""
        self._weights[slot] = weights

    def unload(self, slot: int) -> None:
        """Forget the matrices."""
        del self._weights[slot]

    def shrink(self, x: torch.Tensor, rows: Assignment) -> list[tuple[Span, torch.Tensor]]:
        """Return the float32 product of each span whose slot is loaded."""
        return [
            (span, x[span.start : span.stop].float() @ self._weights[span.slot].a.float().T)
            for span in rows.spans
            if span.slot in self._weights
        ]

    def expand(self, shrunk: Any, member: int, y: torch.Tensor, rows: Assignment) -> None:
        """Add in float32 and round once."""
        for span, product in shrunk:
            weights = self._weights[span.slot]
            b = weights.b[member]
            if b is None:
                continue
            start = weights.offsets[member]
            part = product[:, start : start + b.shape[0]] @ b.float()
            target = y[span.start : span.stop, : b.shape[1]]
            target.copy_((target.float() + part).to(y.dtype))


class TorchLora(LoraBackend):
    """Says what every other backend must compute; on any device, in any dtype."""

    name = "torch"

    def make_group(self, num_members: int) -> TorchGroup:
        """Return an empty group."""
        return TorchGroup()
