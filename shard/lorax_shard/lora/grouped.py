"""The ``cpu`` backend: rows grouped by adapter, two large products a group and adapter.

No weight is gathered or copied: each adapter's matrices are read where they lie, once a
step, whatever the number of rows that share them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from lorax_shard.lora.assignment import Assignment
from lorax_shard.lora.backend import GroupWeights, LoraBackend, LoraGroup


class Loaded(NamedTuple):
    """What one slot holds, ready for the products."""

    a_t: torch.Tensor  # in x R
    # Of each member with a low-rank part: where it lies within R, and B' (r x out).
    parts: tuple[tuple[slice, torch.Tensor] | None, ...]


class GroupedGroup(LoraGroup):
    """Computes with torch's matrix products on any device."""

    def __init__(self) -> None:
        self._loaded: dict[int, Loaded] = {}

    def load(self, slot: int, weights: GroupWeights) -> None:
        """Keep the matrices; only views are made."""
        parts = tuple(
            None if b is None else (slice(start, start + b.shape[0]), b)
            for start, b in zip(weights.offsets, weights.b, strict=True)
        )
        self._loaded[slot] = Loaded(weights.a.T, parts)

    def unload(self, slot: int) -> None:
        """Forget the matrices."""
        del self._loaded[slot]

    def shrink(self, x: torch.Tensor, rows: Assignment) -> Any:
        """Return the product of each slot that is loaded."""
        return {
            slot: x[rows.rows(slot)] @ self._loaded[slot].a_t
            for slot in rows.slots
            if slot in self._loaded
        }

    def expand(self, shrunk: Any, member: int, y: torch.Tensor, rows: Assignment) -> None:
        """Add in place where the rows of a slot are neighbours, else by their numbers."""
        for slot, product in shrunk.items():
            part = self._loaded[slot].parts[member]
            if part is not None:
                columns, b = part
                add_product(y, rows.rows(slot), product[:, columns], b)


def add_product(
    y: torch.Tensor, rows: slice | torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> None:
    """Add ``left @ right`` to some rows of ``y``, in its first columns."""
    y = y[:, : right.shape[1]]
    if isinstance(rows, slice):
        y[rows].addmm_(left, right)
    else:
        y.index_add_(0, rows, left @ right)


class GroupedLora(LoraBackend):
    """Plain torch, any device; made for a CPU without a compiler and for other dtypes."""

    name = "cpu"

    def make_group(self, num_members: int) -> GroupedGroup:
        """Return an empty group."""
        return GroupedGroup()
