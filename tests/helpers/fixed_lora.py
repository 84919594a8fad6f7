"""A LoRA group of the Triton backend with fixed addresses and grids, as a graph would hold it."""

from __future__ import annotations

import numpy as np
import torch

from lorax_shard.lora.assignment import Assignment
from lorax_shard.lora.backend import GroupWeights
from lorax_shard.lora.triton import row_tiles
from lorax_shard.lora.triton.backend import TritonLora

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def assignment(slots: list[int]) -> Assignment:
    return Assignment(np.array(slots, dtype=np.int64), DEVICE)


class FixedGroup:
    """Two members, an input and an output; adapters and slots change between replays."""

    def __init__(self, num_rows: int, widths: tuple[int, int] = (16, 8)) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.backend = TritonLora()
        self.group = self.backend.make_group(2)
        self.widths = widths
        self.group.reserve(ranks=24, widths=list(widths))
        self.backend.reserve(32, DEVICE)
        self.slots = torch.full((num_rows,), -1, dtype=torch.int64, device=DEVICE)
        self.rows = assignment([-1] * num_rows)
        self.x = self.draw(num_rows, 20)
        self.base = self.draw(num_rows, sum(widths))
        self.y = self.base.clone()
        self.loaded: dict[int, GroupWeights] = {}

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(DEVICE)

    def weights(self, *ranks: int) -> GroupWeights:
        b = tuple(self.draw(r, width) if r else None for r, width in zip(ranks, self.widths))
        return GroupWeights(self.draw(sum(ranks), 20), b)

    def load(self, slot: int, *ranks: int) -> None:
        self.loaded[slot] = self.weights(*ranks)
        self.group.load(slot, self.loaded[slot])
        self.backend.commit(DEVICE)

    def replay(self) -> None:
        """Launch what a graph would hold: nothing here looks at a value."""
        self.y.copy_(self.base)
        row_tiles.read_slots_from(self.rows, self.slots)
        shrunk = self.group.shrink(self.x, self.rows)
        self.group.expand_all(shrunk, (0, self.widths[0]), self.y, self.rows)

    def check(self) -> None:
        expected = self.base.double()
        for row, slot in enumerate(self.slots.tolist()):
            weights = self.loaded.get(slot)
            if weights is None:
                continue
            start = 0
            for b, column in zip(weights.b, (0, self.widths[0])):
                if b is not None:
                    part = weights.a.double()[start : start + len(b)] @ self.x[row].double()
                    part = part @ b.double()
                    expected[row, column : column + b.shape[1]] += part
                    start += len(b)
        torch.testing.assert_close(self.y.double(), expected, rtol=1e-5, atol=1e-5)
