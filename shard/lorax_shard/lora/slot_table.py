"""What the slots of a group hold, as numbers that a kernel reads.

One line a slot: address of A, R, then for each member: address of B, r, where its part
begins in R, its width. Kernels then need no lookup from outside, and a step's layout serves
every module.
"""

from __future__ import annotations

import numpy as np

from lorax_shard.lora.assignment import IdArray
from lorax_shard.lora.backend import GroupWeights

_FIRST_LINES = 8


class SlotTable:
    """Grows with the slots; an empty slot's line is zero."""

    def __init__(self, num_members: int) -> None:
        self.line_size = 2 + 4 * num_members
        self.lines: IdArray = np.zeros((_FIRST_LINES, self.line_size), dtype=np.int64)
        # Bit s is set if slot s is loaded.
        self.mask = 0
        # Over all slots: the largest R, and each member's largest width.
        self.most_ranks = 0
        self.most_width = [0] * num_members

    def load(self, slot: int, weights: GroupWeights) -> None:
        """Write a slot's line; whoever calls keeps ``weights`` alive."""
        while slot >= len(self.lines):
            self.grow()
        line = [weights.a.data_ptr(), weights.a.shape[0]]
        for start, b in zip(weights.offsets, weights.b, strict=True):
            line += [0, 0, 0, 0] if b is None else [b.data_ptr(), b.shape[0], start, b.shape[1]]
        self.lines[slot] = line
        self.mask |= 1 << slot
        self._measure()

    def grow(self) -> None:
        """Hold twice as many slots."""
        self.lines = np.concatenate([self.lines, np.zeros_like(self.lines)])

    def unload(self, slot: int) -> None:
        """Clear a slot's line."""
        self.lines[slot] = 0
        self.mask &= ~(1 << slot)
        self._measure()

    def _measure(self) -> None:
        self.most_ranks = int(self.lines[:, 1].max())
        self.most_width = self.lines[:, 5::4].max(axis=0).tolist()
