"""What the slots of groups hold, as numbers that a kernel reads.

One line a slot. A group's part of it: address of A, R, then for each member: address of B, r,
where its part begins in R, its width. Kernels then need no lookup from outside, a step's layout
serves every module, and all that a slot holds is one piece of memory.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from lorax_shard.lora.assignment import IdArray, bits_of
from lorax_shard.lora.backend import ExpertsWeights, GroupWeights

_FIRST_LINES = 8


class SlotTable:
    """Grows with the slots; what a slot does not hold is zero."""

    def __init__(self) -> None:
        self.lines: IdArray = np.zeros((_FIRST_LINES, 0), dtype=np.int64)
        # Slots whose lines were written since somebody emptied this.
        self.changed: set[int] = set()

    @property
    def num_lines(self) -> int:
        """How many slots have lines."""
        return len(self.lines)

    @property
    def line_size(self) -> int:
        """Numbers in a line."""
        return int(self.lines.shape[1])

    def join(self, num_members: int) -> GroupLines:
        """Widen all lines by the part of one more group."""
        first = self.line_size
        part = np.zeros((self.num_lines, 2 + 4 * num_members), dtype=np.int64)
        self.lines = np.concatenate([self.lines, part], axis=1)
        return GroupLines(self, first, num_members)

    def grow(self, num_lines: int) -> None:
        """Have lines for so many slots at least, twice as many at a time."""
        while num_lines > self.num_lines:
            self.lines = np.concatenate([self.lines, np.zeros_like(self.lines)])


class GroupLines:
    """One group's part of each line, and what is known of all its slots together."""

    def __init__(self, table: SlotTable, first: int, num_members: int) -> None:
        self.table = table
        # Where in a line the part begins.
        self.first = first
        # Bit s is set if slot s is loaded.
        self.mask = 0
        self._ranks = _Largest()
        self._widths = [_Largest() for _ in range(num_members)]

    @property
    def most_ranks(self) -> int:
        """The largest R of a slot."""
        return self._ranks.value

    @property
    def most_width(self) -> list[int]:
        """Each member's largest width."""
        return [width.value for width in self._widths]

    def unit(self, largest: int) -> int:
        """Return ``largest`` if all widths of all slots are multiples of it, else 1."""
        return largest if all(width.are_multiples(largest) for width in self._widths) else 1

    def load(self, slot: int, weights: GroupWeights) -> None:
        """Write a slot's line; whoever calls keeps ``weights`` alive."""
        self._write(slot, np.array([self._line(weights)]))

    def load_experts(self, first: int, weights: ExpertsWeights) -> None:
        """Write the lines of all experts at once; their matrices lie at even distances."""
        lines = np.tile(np.array(self._line(weights.of(0))), (weights.num_experts, 1))
        numbers = np.arange(weights.num_experts)
        lines[:, 0] += numbers * (weights.a.stride(0) * weights.a.itemsize)
        lines[:, 2] += numbers * (weights.b.stride(0) * weights.b.itemsize)
        self._write(first, lines)

    @staticmethod
    def _line(weights: GroupWeights) -> list[int]:
        line = [weights.a.data_ptr(), weights.a.shape[0]]
        for start, b in zip(weights.offsets, weights.b, strict=True):
            line += [0, 0, 0, 0] if b is None else [b.data_ptr(), b.shape[0], start, b.shape[1]]
        return line

    def _write(self, first: int, lines: IdArray) -> None:
        """Write lines that differ in their addresses alone."""
        last = first + len(lines)
        self.table.grow(last)
        self._part(first, last)[:] = lines
        self.table.changed.update(range(first, last))
        self.mask |= bits_of(first, len(lines))
        line = lines[0].tolist()
        self._ranks.add(line[1])
        for largest, width in zip(self._widths, line[5::4], strict=True):
            largest.add(width)

    def unload(self, first: int, count: int = 1) -> None:
        """Clear what one call wrote."""
        part = self._part(first, first + count)
        line = part[0].tolist()
        self._ranks.remove(line[1])
        for largest, width in zip(self._widths, line[5::4], strict=True):
            largest.remove(width)
        part[:] = 0
        self.table.changed.update(range(first, first + count))
        self.mask &= ~bits_of(first, count)

    def _part(self, first: int, last: int) -> IdArray:
        return self.table.lines[first:last, self.first : self.first + 2 + 4 * len(self._widths)]


class _Largest:
    """The largest of some numbers that come and go, of which few differ."""

    __slots__ = ("_counts", "value")

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self.value = 0

    def add(self, number: int) -> None:
        self._counts[number] += 1
        self.value = max(self.value, number)

    def are_multiples(self, unit: int) -> bool:
        """Whether all numbers are multiples of ``unit``."""
        return all(number % unit == 0 for number in self._counts)

    def remove(self, number: int) -> None:
        self._counts[number] -= 1
        if not self._counts[number]:
            del self._counts[number]
            self.value = max(self._counts, default=0)
