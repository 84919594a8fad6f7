"""The ``triton`` backend: two kernel launches a group, whatever the mix of adapters."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch

from lorax_shard.lora.assignment import Assignment
from lorax_shard.lora.backend import GroupWeights, LoraBackend, LoraGroup
from lorax_shard.lora.slot_table import SlotTable
from lorax_shard.lora.triton import kernels
from lorax_shard.lora.triton.row_tiles import FEW_ROWS, MANY_ROWS, Tiles, tiles_of

_BLOCK_R = 16
# Bytes of a row of x that are multiplied at once: what fits in the shared memory of small GPUs.
_BLOCK_K_BYTES = 256
_BLOCK_N = 128
# A grid aims at this many programs: some for each of a large GPU's processors.
_PROGRAMS = 1024
# Parts of the input width, so that even one row keeps many processors busy. Not more than
# needed: expanding reads the sums of all parts, and holds them in registers.
_NARROWEST_PART = 512
_WIDEST_PART = 2048
_MOST_PARTS = {FEW_ROWS: 8, MANY_ROWS: 2}
_EXPAND_WARPS = 8
# Addresses and widths that are multiples of this are read 16 bytes at a time.
_UNIT = 16
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _ShrunkRows(NamedTuple):
    h: torch.Tensor  # S x T x R float32
    tiles: Tiles


class TritonGroup(LoraGroup):
    """Keeps the slots' table on the device, at one address as long as no slot is beyond it."""

    is_fused = True

    def __init__(self, num_members: int) -> None:
        self._table = SlotTable(num_members)
        self._weights: dict[int, GroupWeights] = {}
        self._on_device = torch.empty(0, dtype=torch.int64)
        self._least_ranks = 0
        self._least_widths = [0] * num_members
        self._columns: dict[tuple[int, ...], torch.Tensor] = {}
        self._unit = _UNIT

    def load(self, slot: int, weights: GroupWeights) -> None:
        """Write the slot's line."""
        self._weights[slot] = weights
        self._table.load(slot, weights)
        self._write(slot, weights.a.device)

    def unload(self, slot: int) -> None:
        """Clear the slot's line."""
        device = self._weights.pop(slot).a.device
        self._table.unload(slot)
        self._write(slot, device)

    def reserve(self, *, slots: int, ranks: int, widths: list[int], device: torch.device) -> None:
        """Fix the maxima of the grids and the table's address, for whoever captures a graph.

        Slots below ``slots`` whose ranks (summed over the members) and widths stay within
        these maxima can then come and go between replays.
        """
        while len(self._table.lines) < slots:
            self._table.grow()
        self._least_ranks, self._least_widths = ranks, list(widths)
        # What is not known yet may lie anywhere.
        self._unit = 1
        self._write(0, device)

    def shrink(self, x: torch.Tensor, rows: Assignment) -> _ShrunkRows | None:
        """Compute all slots' products for all members in one launch."""
        tiles = tiles_of(rows)
        ranks = max(self._table.most_ranks, self._least_ranks)
        if not ranks or not (tiles.is_fixed or tiles.mask & self._table.mask):
            return None
        x = x if x.stride(1) == 1 else x.contiguous()
        rank_blocks = -(-ranks // _BLOCK_R)
        num_parts = _num_parts(x.shape[1], tiles, rank_blocks)
        block_k = _BLOCK_K_BYTES // x.element_size()
        part_width = -(-x.shape[1] // (num_parts * block_k)) * block_k
        h = _scratch(rows, num_parts, ranks)
        kernels.shrink[(tiles.num_tiles, rank_blocks, num_parts)](
            x, x.stride(0), x.shape[1], self._on_device, self._table.line_size, len(self._on_device),
            tiles.tiles, tiles.rows, h, ranks, rows.num_rows * ranks, part_width,
            block_m=tiles.block_m, block_r=_BLOCK_R, block_k=block_k,
            unit=self._unit, widen=_widens(x),
        )  # fmt: skip
        return _ShrunkRows(h, tiles)

    def expand(self, shrunk: Any, member: int, y: torch.Tensor, rows: Assignment) -> None:
        """Add all slots' products for one member in one launch."""
        self._launch(shrunk, member, (0,), y)

    def expand_all(
        self, shrunk: Any, columns: tuple[int, ...], y: torch.Tensor, rows: Assignment
    ) -> None:
        """Add all slots' products for all members in one launch."""
        self._launch(shrunk, 0, columns, y)

    def _launch(
        self, shrunk: _ShrunkRows | None, member: int, columns: tuple[int, ...], y: torch.Tensor
    ) -> None:
        members = slice(member, member + len(columns))
        widths = (*self._table.most_width[members], *self._least_widths[members])
        if shrunk is None or not (width := max(widths)):
            return
        h, tiles = shrunk
        num_parts, num_rows, ranks = h.shape
        blocks = -(-width // _BLOCK_N)
        shares = max(1, min(blocks, _PROGRAMS // tiles.num_tiles))
        is_aligned = all(column % _UNIT == 0 for column in columns)
        kernels.expand[(tiles.num_tiles, shares, len(columns))](
            h, ranks, num_rows * ranks, y, y.stride(0), self._on_device, self._table.line_size, len(self._on_device),
            tiles.tiles, tiles.rows, member, self._starts(columns, y.device),
            num_parts=num_parts, block_m=tiles.block_m, block_r=_BLOCK_R, block_n=_BLOCK_N,
            unit=self._unit if is_aligned else 1, widen=_widens(y), num_warps=_EXPAND_WARPS,
        )  # fmt: skip

    def _starts(self, columns: tuple[int, ...], device: torch.device) -> torch.Tensor:
        found = self._columns.get(columns)
        if found is None:
            found = torch.tensor(columns, dtype=torch.int64, device=device)
            self._columns[columns] = found
        return found

    def _write(self, slot: int, device: torch.device) -> None:
        lines = torch.from_numpy(self._table.lines)
        if self._on_device.shape == lines.shape:
            self._on_device[slot].copy_(lines[slot])
        else:
            # Also where inference mode is on now: it may be off when the next line is written.
            with torch.inference_mode(False):
                self._on_device = lines.to(device, copy=True)
        if not self._least_ranks:
            self._unit = _UNIT if all(map(_is_aligned, self._weights.values())) else 1


class TritonLora(LoraBackend):
    """Needs a GPU; on a CPU it runs in Triton's interpreter, which is for tests."""

    name = "triton"

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
        return TritonGroup(num_members)


def _num_parts(width: int, tiles: Tiles, rank_blocks: int) -> int:
    """Return in how many parts to cut the input width."""
    wanted = min(-(-_PROGRAMS // (tiles.num_tiles * rank_blocks)), -(-width // _NARROWEST_PART))
    return min(max(wanted, -(-width // _WIDEST_PART)), _MOST_PARTS[tiles.block_m])


def _scratch(rows: Assignment, num_parts: int, ranks: int) -> torch.Tensor:
    """Return a buffer for the shrunk rows of one group at a time, S x T x R float32."""
    count = num_parts * rows.num_rows * ranks
    buffer: torch.Tensor | None = rows.scratch.get("triton.h")
    if buffer is None or buffer.numel() < count:
        buffer = torch.empty(count, dtype=torch.float32, device=rows.device)
        rows.scratch["triton.h"] = buffer
    return buffer[:count].view(num_parts, rows.num_rows, ranks)


def _is_aligned(weights: GroupWeights) -> bool:
    matrices = [weights.a, *(b for b in weights.b if b is not None)]
    return all(each.data_ptr() % _UNIT == 0 and each.shape[1] % _UNIT == 0 for each in matrices)


def _widens(values: torch.Tensor) -> bool:
    """Whether to multiply in float32: Triton's interpreter, which a CPU means, has no bfloat16."""
    return values.device.type == "cpu" and values.dtype is torch.bfloat16
