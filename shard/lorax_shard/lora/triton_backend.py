"""The ``triton`` backend: two kernel launches a group and member, whatever the mix of adapters."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import torch

from lorax_shard.lora import triton_kernels
from lorax_shard.lora.assignment import Assignment
from lorax_shard.lora.backend import GroupWeights, LoraBackend, LoraGroup
from lorax_shard.lora.slot_table import SlotTable

# Rows of one tile; the least that a matrix instruction takes.
_BLOCK_M = 16
_BLOCK_R = 16
_BLOCK_K = 64
_BLOCK_N = 128
# The input width is split so that even one row keeps many processors busy.
_PART_WIDTH = 512
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Tiles(NamedTuple):
    tiles: torch.Tensor  # of each tile: slot, first of its row numbers, how many
    rows: torch.Tensor
    num_tiles: int
    mask: int


class _Shrunk(NamedTuple):
    h: torch.Tensor  # S x N x R float32
    tiles: _Tiles


class TritonGroup(LoraGroup):
    """Keeps the slots' table on the device."""

    def __init__(self, num_members: int) -> None:
        self._table = SlotTable(num_members)
        self._weights: dict[int, GroupWeights] = {}
        self._on_device: torch.Tensor | None = None

    def load(self, slot: int, weights: GroupWeights) -> None:
        """Write the slot's line."""
        self._weights[slot] = weights
        self._table.load(slot, weights)
        self._on_device = torch.from_numpy(self._table.lines).to(weights.a.device, copy=True)

    def unload(self, slot: int) -> None:
        """Clear the slot's line."""
        device = self._weights.pop(slot).a.device
        self._table.unload(slot)
        self._on_device = torch.from_numpy(self._table.lines).to(device, copy=True)

    def shrink(self, x: torch.Tensor, rows: Assignment) -> _Shrunk | None:
        """Compute all slots' products in one launch."""
        tiles = _tiles(rows)
        if not tiles.mask & self._table.mask:
            return None
        x = x if x.stride(1) == 1 else x.contiguous()
        num_parts = -(-x.shape[1] // _PART_WIDTH)
        ranks, count = self._table.most_ranks, len(tiles.rows)
        h = torch.empty(num_parts, count, ranks, dtype=torch.float32, device=x.device)
        triton_kernels.shrink[(tiles.num_tiles, -(-ranks // _BLOCK_R), num_parts)](
            x, x.stride(0), x.shape[1], self._on_device, self._table.line_size,
            tiles.tiles, tiles.rows, h, ranks, count, _PART_WIDTH,
            block_m=_BLOCK_M, block_r=_BLOCK_R, block_k=_BLOCK_K,
        )  # fmt: skip
        return _Shrunk(h, tiles)

    def expand(self, shrunk: Any, member: int, y: torch.Tensor, rows: Assignment) -> None:
        """Add all slots' products in one launch."""
        width = self._table.most_width[member]
        if shrunk is None or not width:
            return
        h, tiles = shrunk
        triton_kernels.expand[(tiles.num_tiles, -(-width // _BLOCK_N))](
            h, h.shape[2], h.shape[1], y, y.stride(0), self._on_device, self._table.line_size,
            member, tiles.tiles, tiles.rows,
            num_parts=h.shape[0], block_m=_BLOCK_M, block_r=_BLOCK_R, block_n=_BLOCK_N,
        )  # fmt: skip


class TritonLora(LoraBackend):
    """Needs a GPU; on a CPU it runs in Triton's interpreter, which is for tests."""

    name = "triton"

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot run here, or None."""
        if dtype not in _DTYPES:
            return f"it does not compute {str(dtype).removeprefix('torch.')}"
        if device.type == "cuda":
            return None
        if os.environ.get("TRITON_INTERPRET") != "1":
            return f"it computes on a GPU, not on {device.type}"
        return "Triton's interpreter cannot multiply bfloat16" if dtype is torch.bfloat16 else None

    def make_group(self, num_members: int) -> TritonGroup:
        """Return an empty group."""
        return TritonGroup(num_members)


def _tiles(rows: Assignment) -> _Tiles:
    found: _Tiles | None = rows.scratch.get("triton.tiles")
    if found is None:
        found = rows.scratch["triton.tiles"] = _make_tiles(rows)
    return found


def _make_tiles(rows: Assignment) -> _Tiles:
    # Rows with a slot, slot by slot; within a slot in their own order.
    order = np.argsort(rows.slot_of_row, kind="stable")
    order = order[np.searchsorted(rows.slot_of_row[order], 0) :]
    slots = rows.slot_of_row[order]
    tiles = []
    for slot in rows.slots:
        first, last = np.searchsorted(slots, [slot, slot + 1]).tolist()
        tiles += [(slot, at, min(_BLOCK_M, last - at)) for at in range(first, last, _BLOCK_M)]
    return _Tiles(
        torch.tensor(tiles, dtype=torch.int64).to(rows.device),
        torch.from_numpy(order).to(rows.device),
        len(tiles),
        rows.mask,
    )
