"""Codes whose scales belong to parts of a matrix: rows, groups of a row, blocks, or all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorax_shard.codes.matrices import Matrix
from lorax_shard.codes.tensors import CodesError


@dataclass(frozen=True, slots=True)
class Groups:
    """Which items of a dimension share a scale.

    ``size``: so many that follow each other, None for all. ``places``: the group of each item,
    where they lie in another order.
    """

    size: int | None
    places: torch.Tensor | None = None

    def of(self, span: slice) -> tuple[slice, torch.Tensor | None]:
        """Return the groups of a span that are needed, and each item's place among them.

        No places: one group stands for all items.
        """
        if self.places is None and self.size is None:
            return slice(0, 1), None
        if self.places is not None:
            groups = self.places[span].long()
        else:
            groups = torch.arange(span.start, span.stop) // (self.size or 1)
        if not len(groups):
            return slice(0, 0), groups
        first = int(groups.min())
        return slice(first, int(groups.max()) + 1), groups - first


def groups_of(key: str, size: int, num_groups: int, group: int | None) -> Groups:
    """Return how ``size`` items share ``num_groups`` scales, ``group`` of them each; CodesError."""
    if num_groups == 1:
        return Groups(None)
    if num_groups == size:
        return Groups(1)
    if group is None and size % num_groups == 0:
        group = size // num_groups
    if group is None or -(-size // group) != num_groups:
        raise CodesError(
            f"{key} has {num_groups} scales for {size} numbers, which are not groups of {group}"
        )
    return Groups(group)


class GridWeight:
    """Implements CodedTensor: (code - zero) x scale, or code x scale + offset, in float32.

    Args:
        codes: rows x columns.
        scales: groups of rows x groups of columns.
        groups: how rows, and how columns, share them.
        zeros: a number for all, or as scales are; they are taken off codes.
        offsets: as scales are; they are added last.
        is_transposed: rows are the inputs; the model has its outputs there.
        beside: more tensors of the files that belong to it.
    """

    def __init__(
        self,
        codes: Matrix,
        scales: Matrix,
        groups: tuple[Groups, Groups],
        *,
        zeros: Matrix | float = 0.0,
        offsets: Matrix | None = None,
        is_transposed: bool = False,
        beside: Sequence[str] = (),
    ) -> None:
        self._codes, self._scales, self._groups = codes, scales, groups
        self._zeros, self._offsets, self._is_transposed = zeros, offsets, is_transposed
        parts = (codes, scales, zeros, offsets)
        own = [part.key for part in parts if part is not None and not isinstance(part, float)]
        self.keys = (*own, *beside)
        rows, columns = codes.shape
        self.shape: tuple[int, ...] = (columns, rows) if is_transposed else (rows, columns)

    def read(self, spans: tuple[slice, ...]) -> torch.Tensor:
        """Return a part of the numbers in float32."""
        rows, columns = reversed(spans) if self._is_transposed else spans
        numbers = self._codes.read(rows, columns)
        if not isinstance(self._zeros, float):
            numbers -= self._spread(self._zeros, rows, columns)
        elif self._zeros:
            numbers -= self._zeros
        numbers *= self._spread(self._scales, rows, columns)
        if self._offsets is not None:
            numbers += self._spread(self._offsets, rows, columns)
        return numbers.T.contiguous() if self._is_transposed else numbers

    def _spread(self, shared: Matrix, rows: slice, columns: slice) -> torch.Tensor:
        """Return what each number of a part has of what groups share."""
        needed_rows, row_places = self._groups[0].of(rows)
        needed_columns, column_places = self._groups[1].of(columns)
        part = shared.read(needed_rows, needed_columns)
        if row_places is not None:
            part = part[row_places]
        return part if column_places is None else part[:, column_places]
