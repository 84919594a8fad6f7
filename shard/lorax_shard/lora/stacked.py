"""Weights of several slots that take the place of a linear's, as one product: heads of few labels.

Each row is computed with the weights of all slots and keeps what is its own's, which takes less
than a product for each slot as long as the weights are narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from lorax_shard.lora.assignment import Assignment, IdArray
from lorax_shard.lora.prepared import LinearChange

# Outputs of all slots together up to which a product of their own is not worth its call.
_MOST_COLUMNS = 512


class StackedWeights(NamedTuple):
    """What is made of some slots' weights."""

    slots: tuple[int, ...]  # n, ascending
    weight: torch.Tensor  # outputs of all slots x in
    bias: torch.Tensor  # outputs of all slots
    # Of each slot the numbers of its outputs, then of one that is not there.
    columns: IdArray  # n x out

    @classmethod
    def of(
        cls, slots: tuple[int, ...], changes: Sequence[LinearChange], width: int
    ) -> StackedWeights:
        """Stack the weights of slots, which are narrow; rows have ``width`` outputs."""
        weights = [each.weight for each in changes if each.weight is not None]
        biases = [
            weight.new_zeros(len(weight)) if each.bias is None else each.bias
            for weight, each in zip(weights, changes, strict=True)
        ]
        ends = np.cumsum([len(each) for each in weights])
        columns = np.full((len(slots), width), ends[-1], dtype=np.int64)
        for line, weight, end in zip(columns, weights, ends, strict=True):
            line[: len(weight)] = np.arange(end - len(weight), end)
        return cls(slots, torch.cat(weights), torch.cat(biases), columns)

    def compute(self, x: torch.Tensor, y: torch.Tensor, rows: Assignment) -> torch.Tensor:
        """Return outputs (T x out) of inputs (T x in): of rows of other slots those that are in ``y``.

        What a row has no output for is -inf.
        """
        numbers = np.searchsorted(self.slots, rows.slot_of_row).clip(max=len(self.slots) - 1)
        is_changed = np.array(self.slots)[numbers] == rows.slot_of_row
        made = functional.linear(x, self.weight, self.bias)
        made = functional.pad(made, (0, 1), value=float("-inf"))
        own = made.gather(1, torch.from_numpy(self.columns[numbers]).to(x.device))
        if is_changed.all():
            return own
        return torch.where(torch.from_numpy(is_changed[:, None]).to(x.device), own, y)


def are_narrow(changes: Sequence[LinearChange]) -> bool:
    """Return whether several changes replace weights by others of few outputs, and do nothing else."""
    widths = [len(each.weight) for each in changes if each.weight is not None]
    others = [part for each in changes for part in (each.scale, each.shift, each.token_ids)]
    are_weights = len(widths) == len(changes) and all(each is None for each in others)
    return are_weights and len(changes) > 1 and sum(widths) <= _MOST_COLUMNS
