"""The ``triton`` backend: two kernel launches a group, whatever the mix of adapters.

Whatever varies from step to step is a number that kernels are not specialised on, or one of few
powers of two: ``warm_up`` compiles all that there is, and no request waits for a compiler.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from lorax_shard.lora.assignment import BASE, Assignment, FixedAssignment
from lorax_shard.lora.backend import ExpertsWeights, GroupWeights, LoraBackend, LoraGroup
from lorax_shard.lora.triton import kernels
from lorax_shard.lora.triton.device_slots import DeviceSlots
from lorax_shard.lora.triton.row_tiles import (
    FEW_ROWS,
    MANY_ROWS,
    Tiles,
    empty_tiles,
    read_slots_from,
    tiles_of,
)

# Ranks that one product takes: the least of a matrix instruction, and what most adapters have.
_SHRINK_RANKS = 16
# Bytes of a row of x that are multiplied at once: what fits in the shared memory of small GPUs.
_BLOCK_K_BYTES = 256
# A grid aims at this many programs: some for each of a large GPU's processors.
_PROGRAMS = 1024
# Programs for each part that share the ranks of a tile, as far as the grid has room for them: room
# for large ranks costs no programs that would wait for others to end.
_MOST_RANK_PROGRAMS = 8
# Parts of the input width, so that even one row keeps many processors busy. Not more than
# needed: expanding reads the sums of all parts.
_NARROWEST_PART = 512
_WIDEST_PART = 2048
_NUM_PARTS = {FEW_ROWS: (1, 2, 4, 8), MANY_ROWS: (1, 2)}
# Addresses, in bytes, and widths that are multiples of this are read 16 bytes at a time.
_UNIT = 16
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class ExpandTile(NamedTuple):
    """Launch sizes of expanding: ranks and columns of one product, warps, and loads in flight."""

    block_r: int
    block_n: int
    num_warps: int
    num_stages: int


# By the rows of a tile. What an adapter of so many ranks adds is held in registers for all of a
# program's columns; with wider tiles few programs would be on a processor at once.
_EXPAND_HALF = {FEW_ROWS: ExpandTile(64, 128, 8, 2), MANY_ROWS: ExpandTile(64, 64, 8, 2)}
_EXPAND_FULL = {FEW_ROWS: ExpandTile(16, 128, 8, 2), MANY_ROWS: ExpandTile(16, 64, 8, 2)}


class _ShrunkRows(NamedTuple):
    h: torch.Tensor  # S x T x R float32, R in whole blocks
    tiles: Tiles


class TritonGroup(LoraGroup):
    """Its slots' lines are part of a table that a backend's groups share."""

    is_fused = True

    def __init__(self, num_members: int, slots: DeviceSlots) -> None:
        self._slots = slots
        self._lines = slots.table.join(num_members)
        self._weights: dict[int, GroupWeights | ExpertsWeights] = {}
        self._least_ranks = 0
        self._least_widths = [0] * num_members
        self._unit = _UNIT
        self._columns: dict[tuple[int, ...], torch.Tensor] = {}

    def load(self, slot: int, weights: GroupWeights) -> None:
        """Write the slot's line; ``commit`` carries it to the device."""
        self._check_reserved(weights)
        aligned = self._weights[slot] = _aligned(weights)
        self._lines.load(slot, aligned)
        self._unit = self._lines.unit(_UNIT)

    def unload(self, slot: int) -> None:
        """Clear the slot's line; ``commit`` carries it to the device."""
        del self._weights[slot]
        self._lines.unload(slot)
        self._unit = self._lines.unit(_UNIT)

    def load_experts(self, first: int, weights: ExpertsWeights) -> None:
        """Write the lines of all experts at once, if all their matrices are aligned."""
        starts = (weights.a[0], weights.a[-1], weights.b[0], weights.b[-1])
        if any(each.data_ptr() % _UNIT for each in starts):
            super().load_experts(first, weights)
            return
        self._check_reserved(weights.of(0))
        self._weights[first] = weights
        self._lines.load_experts(first, weights)
        self._unit = self._lines.unit(_UNIT)

    def unload_experts(self, first: int, count: int) -> None:
        """Clear the lines of all experts."""
        if isinstance(self._weights[first], ExpertsWeights):
            del self._weights[first]
            self._lines.unload(first, count)
            self._unit = self._lines.unit(_UNIT)
        else:
            super().unload_experts(first, count)

    def reserve(self, *, ranks: int, widths: list[int]) -> None:
        """Fix the maxima of the grids, for whoever captures a graph.

        Slots whose ranks (summed over the members) and widths stay within these maxima can then
        come and go between replays; others are refused. Widths that are multiples of 16 are read
        16 bytes at a time, and only such ones come then.
        """
        self._least_ranks, self._least_widths = ranks, list(widths)

    def shrink(self, x: torch.Tensor, rows: Assignment) -> _ShrunkRows | None:
        """Compute all slots' products for all members in one launch."""
        tiles = tiles_of(rows)
        ranks = max(self._lines.most_ranks, self._least_ranks)
        is_asked = tiles.is_fixed or tiles.mask & self._lines.mask
        if not (ranks and tiles.num_tiles and is_asked):
            return None
        rank_blocks = -(-ranks // _SHRINK_RANKS)
        num_parts = _choose_parts(x.shape[1], tiles)
        h = _scratch(rows, num_parts, rank_blocks * _SHRINK_RANKS)
        self._launch_shrink(x if x.stride(1) == 1 else x.contiguous(), h, tiles)
        return _ShrunkRows(h, tiles)

    def expand(self, shrunk: Any, member: int, y: torch.Tensor, rows: Assignment) -> None:
        """Add all slots' products for one member in one launch."""
        if shrunk is not None:
            self._launch_expand(shrunk, member, (0,), y)

    def expand_all(
        self, shrunk: Any, columns: tuple[int, ...], y: torch.Tensor, rows: Assignment
    ) -> None:
        """Add all slots' products for all members in one launch."""
        if shrunk is not None:
            self._launch_expand(shrunk, 0, columns, y)

    def warm_up(self, x: torch.Tensor, y: torch.Tensor, columns: tuple[int, ...]) -> None:
        """Launch every variant of the kernels over no rows."""
        self._slots.commit(x.device)
        tiles_of(Assignment(np.full(1, BASE), x.device))
        for block_m in _NUM_PARTS:
            tiles = empty_tiles(block_m, x.device)
            h = torch.empty(1, 1, _SHRINK_RANKS, dtype=torch.float32, device=x.device)
            self._launch_shrink(x, h, tiles)
            self._launch_expand(_ShrunkRows(h, tiles), 0, columns, y, y.shape[1])

    def _launch_shrink(self, x: torch.Tensor, h: torch.Tensor, tiles: Tiles) -> None:
        num_parts, num_rows, ranks = h.shape
        block_k = _BLOCK_K_BYTES // x.element_size()
        part_blocks = -(-x.shape[1] // (num_parts * block_k))
        most = num_parts * min(ranks // _SHRINK_RANKS, _MOST_RANK_PROGRAMS)
        programs = min(most, max(num_parts, _PROGRAMS // tiles.num_tiles))
        kernels.shrink[(tiles.num_tiles, programs)](
            x, x.stride(0), x.shape[1], *self._table(),
            tiles.tiles, tiles.num_used, tiles.rows, h, ranks, num_rows * ranks, num_parts, part_blocks,
            block_m=tiles.block_m, block_r=_SHRINK_RANKS, block_k=block_k,
            widen=_widens(x),
        )  # fmt: skip

    def _launch_expand(
        self,
        shrunk: _ShrunkRows,
        member: int,
        columns: tuple[int, ...],
        y: torch.Tensor,
        warm_up_width: int = 0,
    ) -> None:
        members = slice(member, member + len(columns))
        widths = (*self._lines.most_width[members], *self._least_widths[members])
        if not (width := max(warm_up_width, *widths)):
            return
        h, tiles = shrunk
        num_parts, num_rows, ranks = h.shape
        tile = (_EXPAND_FULL if y.dtype is torch.float32 else _EXPAND_HALF)[tiles.block_m]
        blocks = -(-width // tile.block_n)
        shares = max(1, min(blocks, _PROGRAMS // (tiles.num_tiles * len(columns))))
        fixed = (*columns, *self._least_widths, warm_up_width)
        is_even = all(number % _UNIT == 0 for number in fixed)
        kernels.expand[(tiles.num_tiles, shares, len(columns))](
            h, ranks, num_rows * ranks, y, y.stride(0), *self._table(),
            tiles.tiles, tiles.num_used, tiles.rows, member, self._starts(columns, y.device),
            num_parts, block_m=tiles.block_m, block_r=tile.block_r, block_n=tile.block_n,
            unit=self._unit if is_even else 1, widen=_widens(y),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    def _check_reserved(self, weights: GroupWeights) -> None:
        if not self._least_ranks:
            return
        is_even = all(width % _UNIT == 0 for width in self._least_widths)
        for b, most in zip(weights.b, self._least_widths, strict=True):
            width = 0 if b is None else b.shape[1]
            if width > most or (is_even and width % _UNIT):
                raise ValueError(f"a width of {width} in a group that is fixed for {most}")
        if (ranks := weights.a.shape[0]) > self._least_ranks:
            raise ValueError(f"{ranks} ranks in a group that is fixed for {self._least_ranks}")

    def _table(self) -> tuple[torch.Tensor, int, int, int]:
        """Return the table, where this group's part of a line begins, and the table's size."""
        lines = self._slots.lines
        return lines, self._lines.first, lines.shape[1], lines.shape[0]

    def _starts(self, columns: tuple[int, ...], device: torch.device) -> torch.Tensor:
        found = self._columns.get(columns)
        if found is None:
            found = torch.tensor(columns, dtype=torch.int64, device=device)
            self._columns[columns] = found
        return found


class TritonLora(LoraBackend):
    """Needs a GPU; on a CPU it runs in Triton's interpreter, which is for tests."""

    name = "triton"

    def __init__(self) -> None:
        self._slots = DeviceSlots()

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot run here, or None."""
        if dtype not in _DTYPES:
            return f"it does not compute {str(dtype).removeprefix('torch.')}"
        if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"it computes on a GPU, not on {device.type}"

    def make_group(self, num_members: int) -> TritonGroup:
        """Return an empty group."""
        return TritonGroup(num_members, self._slots)

    def commit(self, device: torch.device) -> None:
        """Copy what slots hold to the device: one line for all groups."""
        self._slots.commit(device)

    def reserve(self, num_slots: int, device: torch.device) -> None:
        """Have room for slots below ``num_slots``: their lines keep their address."""
        self._slots.reserve(num_slots, device)

    @property
    def version(self) -> int:
        """How often the slots' lines were made anew, elsewhere."""
        return self._slots.version

    def assign(self, slots: torch.Tensor) -> Assignment:
        """Return rows of these slots; nothing waits for the device."""
        rows = FixedAssignment(slots)
        read_slots_from(rows, slots)
        return rows

    def read_slots(self, rows: Assignment, slots: torch.Tensor) -> None:
        """Let ``rows`` have the slots that stand in a device tensor."""
        read_slots_from(rows, slots)


def _choose_parts(width: int, tiles: Tiles) -> int:
    """Return in how many parts to cut the input width."""
    wanted = min(-(-_PROGRAMS // tiles.num_tiles), -(-width // _NARROWEST_PART))
    choices = _NUM_PARTS[tiles.block_m]
    least = max(wanted, -(-width // _WIDEST_PART))
    return next((choice for choice in choices if choice >= least), choices[-1])


def _scratch(rows: Assignment, num_parts: int, ranks: int) -> torch.Tensor:
    """Return a buffer for the shrunk rows of one group at a time, S x T x R float32."""
    count = num_parts * rows.num_rows * ranks
    buffer: torch.Tensor | None = rows.scratch.get("triton.h")
    if buffer is None or buffer.numel() < count:
        buffer = torch.empty(count, dtype=torch.float32, device=rows.device)
        rows.scratch["triton.h"] = buffer
    return buffer[:count].view(num_parts, rows.num_rows, ranks)


def _aligned(weights: GroupWeights) -> GroupWeights:
    """Return matrices that begin at multiples of 16 bytes: copies of those that do not."""
    matrices = [weights.a, *(b for b in weights.b if b is not None)]
    if all(matrix.data_ptr() % _UNIT == 0 for matrix in matrices):
        return weights
    b = tuple(None if each is None else each.clone() for each in weights.b)
    return replace(weights, a=weights.a.clone(), b=b)


def _widens(values: torch.Tensor) -> bool:
    """Whether to multiply in float32: Triton's interpreter has no bfloat16."""
    return kernels.IS_INTERPRETED and values.dtype is torch.bfloat16
