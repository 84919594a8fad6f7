"""A step's rows and a group's slots as numbers that the kernel of the ``cpp`` backend reads.

Each lies behind one address that stays: whoever keeps a call's fields can make it again after the
rows have changed, or the slots.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import torch

from lorax_shard.lora.assignment import IdArray, bits_of
from lorax_shard.lora.backend import ExpertsWeights, GroupWeights
from lorax_shard.numbers import TYPES

# The fields of LayoutCall.
_FIELDS = struct.Struct("=8q").pack
_FIRST_LINES = 8
# Added to the type of a matrix that lies in panels.
_IN_PANELS = 8
# Numbers in a line: of A, and of each member.
_OF_A, _OF_MEMBER = 3, 6
# Shrunk rows begin at multiples of so many numbers: a cache line.
_UNIT = 16


class Extent:
    """How far slots and their ranks ever went in any group: what a step's rows have room for."""

    def __init__(self) -> None:
        self.num_slots = 0
        self.ranks = _UNIT

    def add(self, num_slots: int, ranks: int) -> None:
        """Have room for so many."""
        self.num_slots = max(self.num_slots, num_slots)
        self.ranks = max(self.ranks, -(-ranks // _UNIT) * _UNIT)


class HostRows:
    """Which rows belong to which slot, and room for them shrunk; written again for each step."""

    def __init__(self, extent: Extent, lay_out: Callable[[bytes], None]) -> None:
        self._extent, self._lay_out = extent, lay_out
        # Addresses of slots, starts and rows, how many slots, and the shrunk rows and their width.
        self._header: IdArray = np.zeros(6, dtype=np.int64)
        self.address: int = self._header.ctypes.data
        self._num_rows = -1
        self._numbers: IdArray = np.zeros(0, dtype=np.int64)
        self._shrunk = torch.empty(0)
        self._group_of_slot = torch.empty(0, dtype=torch.int64)
        # PairsLayout, of so many slots and their distance.
        self._of_pairs = torch.zeros(4, dtype=torch.int64)
        self._of_pairs_made = (-1, -1)

    def write(self, slot_of_row: IdArray) -> None:
        """Take the rows of another step (T slots, negative: none)."""
        slot_of_row = np.ascontiguousarray(slot_of_row, dtype=np.int64)
        self._write(slot_of_row.ctypes.data, len(slot_of_row), (0, 0, 0))

    def write_pairs(
        self, slots: torch.Tensor, tokens: torch.Tensor, experts: torch.Tensor, per_slot: int
    ) -> None:
        """Take pairs of a token and an expert, by their tokens' slots (T int64, negative: none).

        A pair's slot is its token's slot * per_slot + its expert.
        """
        slots, tokens, experts = slots.contiguous(), tokens.contiguous(), experts.contiguous()
        pairs = (tokens.data_ptr(), experts.data_ptr(), per_slot)
        self._write(slots.data_ptr(), len(tokens), pairs)

    def expect_pairs(self, num_pairs: int, per_slot: int) -> int:
        """Have room for pairs, and return the address of what their layout is told of its own."""
        self._have_room(num_pairs)
        groups = self._group_of_slot
        made = (len(groups), per_slot)
        if made != self._of_pairs_made:
            self._of_pairs[:] = torch.tensor([self.address, groups.data_ptr(), *made])
            self._of_pairs_made = made
        return self._of_pairs.data_ptr()

    def _write(self, slots: int, num_rows: int, pairs: tuple[int, int, int]) -> None:
        self._have_room(num_rows)
        groups = self._group_of_slot
        self._lay_out(
            _FIELDS(self.address, slots, num_rows, groups.data_ptr(), len(groups), *pairs)
        )

    def _have_room(self, num_rows: int) -> None:
        extent = self._extent
        if extent.num_slots > len(self._group_of_slot):
            self._group_of_slot = torch.full((2 * extent.num_slots,), -1, dtype=torch.int64)
        if num_rows <= self._num_rows and extent.ranks == self._header[5]:
            return
        num_rows = self._num_rows = max(num_rows, self._num_rows)
        self._numbers = np.zeros(3 * num_rows + 1, dtype=np.int64)
        self._shrunk = torch.empty(num_rows * extent.ranks)
        first, size = self._numbers.ctypes.data, self._numbers.itemsize
        starts, rows = first + num_rows * size, first + (2 * num_rows + 1) * size
        self._header[:] = [first, starts, rows, 0, self._shrunk.data_ptr(), extent.ranks]


class HostTable:
    """What the slots of all groups hold, a line each; what a slot does not hold is zero.

    A line has a part for each group, in the order in which a step computes them: what the next
    group needs lies beside it. A part: address of A, R, type of A, then for each member: address
    of B, r, where its part begins in R, its width, type of B, and what its output is multiplied by.
    """

    def __init__(self, extent: Extent) -> None:
        self.extent = extent
        self.lines: IdArray = np.zeros((_FIRST_LINES, 0), dtype=np.int64)
        self._groups: list[HostLines] = []

    def join(self, num_members: int) -> HostLines:
        """Widen all lines by the part of one more group."""
        first, size = self.lines.shape[1], _OF_A + _OF_MEMBER * num_members
        part = np.zeros((len(self.lines), size), dtype=np.int64)
        self._groups.append(HostLines(self, slice(first, first + size), num_members))
        self._replace(np.concatenate([self.lines, part], axis=1))
        return self._groups[-1]

    def grow(self, num_lines: int) -> None:
        """Have lines for so many slots at least, twice as many at a time."""
        if num_lines > len(self.lines):
            more = np.zeros((2 * num_lines - len(self.lines), self.lines.shape[1]), dtype=np.int64)
            self._replace(np.concatenate([self.lines, more]))

    def _replace(self, lines: IdArray) -> None:
        self.lines = lines
        for group in self._groups:
            group.write_header()


class HostLines:
    """One group's part of each line, and its header at an address that stays."""

    def __init__(self, table: HostTable, part: slice, num_members: int) -> None:
        self._table, self._part, self._num_members = table, part, num_members
        # Bit s is set if slot s is loaded.
        self.mask = 0
        self._width_in = 0
        self._header: IdArray = np.zeros(6, dtype=np.int64)
        self.address: int = self._header.ctypes.data

    def load(self, slot: int, weights: GroupWeights) -> None:
        """Write a slot's line; whoever calls keeps ``weights`` alive."""
        self._write(slot, np.array([self._line(weights)]), weights.a)

    def load_experts(self, first: int, weights: ExpertsWeights) -> None:
        """Write the lines of all experts at once; their matrices lie at even distances."""
        lines = np.tile(np.array(self._line(weights.of(0))), (weights.num_experts, 1))
        numbers = np.arange(weights.num_experts)
        lines[:, 0] += numbers * (weights.a.stride(0) * weights.a.itemsize)
        lines[:, _OF_A] += numbers * (weights.b.stride(0) * weights.b.itemsize)
        self._write(first, lines, weights.a)

    @staticmethod
    def _line(weights: GroupWeights) -> list[int]:
        form = _IN_PANELS if weights.in_panels else 0
        line = [weights.a.data_ptr(), weights.a.shape[0], TYPES[weights.a.dtype] + form]
        scales = weights.scales or (1.0,) * len(weights.b)
        for start, b, scale in zip(weights.offsets, weights.b, scales, strict=True):
            if b is None:
                line += [0] * _OF_MEMBER
            else:
                numbers = (b.data_ptr(), b.shape[0], start, b.shape[1], TYPES[b.dtype] + form)
                line += [*numbers, _bits(scale)]
        return line

    def _write(self, first: int, lines: IdArray, a: torch.Tensor) -> None:
        table, last = self._table, first + len(lines)
        table.grow(last)
        table.lines[first:last, self._part] = lines
        table.extent.add(last, a.shape[-2])
        self._width_in = a.shape[-1]
        self.mask |= bits_of(first, len(lines))
        self.write_header()

    def unload(self, first: int, count: int = 1) -> None:
        """Clear the lines of some slots."""
        self._table.lines[first : first + count, self._part] = 0
        self.mask &= ~bits_of(first, count)
        self.write_header()

    def write_header(self) -> None:
        """Say where the lines are, and how many of them are in use."""
        lines = self._table.lines
        first = lines.ctypes.data + self._part.start * lines.itemsize
        self._header[:] = [
            first, lines.shape[1], len(lines), self.mask.bit_count(),
            self._width_in, self._num_members,
        ]  # fmt: skip


def _bits(number: float) -> int:
    """Return a double as an integer of the same bits."""
    bits: int = struct.unpack("=q", struct.pack("=d", number))[0]
    return bits
