"""How the rows of a step are laid out in tiles of one slot each, for the Triton kernels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from lorax_shard.lora.assignment import Assignment, IdArray
from lorax_shard.lora.triton import kernels
from lorax_shard.transfer import to_device

# Rows of one tile: the least that a matrix instruction takes, and for long runs of one slot.
FEW_ROWS = 16
MANY_ROWS = 64
# Up to here a device lays rows out itself, in time that grows with their square: so many, and so
# many at once beside them.
MOST_GATHERED, _COMPARED = 512, 16


class Tiles(NamedTuple):
    """A layout: tile i holds the ``tiles[i, 2]`` rows from ``rows[tiles[i, 1]]`` on, of one slot."""

    tiles: torch.Tensor
    rows: torch.Tensor
    # How many tiles have rows, on the device: 1 int64.
    num_used: torch.Tensor
    num_tiles: int
    block_m: int
    mask: int
    # The slots are read on the device each time: the mask is not known.
    is_fixed: bool = False


def tiles_of(rows: Assignment) -> Tiles:
    """Return the layout of a step's rows, made by the first module that asks."""
    found: Tiles | None = rows.scratch.get("triton.tiles")
    if found is None:
        found = _gathered(rows) if rows.num_rows <= MOST_GATHERED else _sorted(rows)
        rows.scratch["triton.tiles"] = found
    return found


def read_slots_from(rows: Assignment, slots: torch.Tensor) -> None:
    """Let ``rows`` have the slots that stand in a device tensor (T int64, -1: base).

    Captured in a graph, this and all that follows computes with what stands there at the
    replay. ValueError unless there is a slot for each row.
    """
    if len(slots) != rows.num_rows:
        raise ValueError(f"{len(slots)} slots for {rows.num_rows} rows")
    few = rows.num_rows <= MOST_GATHERED
    layout = _gather(slots, -1, rows.num_rows) if few else _sorted_there(slots)
    rows.scratch["triton.tiles"] = layout._replace(is_fixed=True)


def _gathered(rows: Assignment) -> Tiles:
    """One copy to the device, no sorting: for decodes. The host knows how many tiles there are."""
    counts = np.bincount(rows.slot_of_row[rows.slot_of_row >= 0])
    num_tiles = int((-(-counts // FEW_ROWS)).sum())
    return _gather(_to_device(rows.slot_of_row, rows.device), rows.mask, num_tiles)


def _gather(slots: torch.Tensor, mask: int, num_tiles: int) -> Tiles:
    count = len(slots)
    made = torch.empty(count * 3 + 1, dtype=torch.int64, device=slots.device)
    tiles, num_used = made[:-1].view(count, 3), made[-1:]
    numbers = torch.empty(count * FEW_ROWS, dtype=torch.int64, device=slots.device)
    if count:
        kernels.gather_rows[(1,)](
            slots, count, tiles, num_used, numbers, block_t=MOST_GATHERED, block_m=FEW_ROWS,
            block_i=_COMPARED, num_warps=8,
        )  # fmt: skip
    return Tiles(tiles[:num_tiles], numbers, num_used, num_tiles, FEW_ROWS, mask)


def _sorted(rows: Assignment) -> Tiles:
    """Rows with a slot, slot by slot; within a slot in their own order."""
    order = np.argsort(rows.slot_of_row, kind="stable")
    order = order[np.searchsorted(rows.slot_of_row[order], 0) :]
    slots = rows.slot_of_row[order]
    block_m = MANY_ROWS if len(order) >= MANY_ROWS * max(1, len(rows.slots)) else FEW_ROWS
    tiles = []
    for slot in rows.slots:
        first, last = np.searchsorted(slots, [slot, slot + 1]).tolist()
        tiles += [(slot, at, min(block_m, last - at)) for at in range(first, last, block_m)]
    laid = np.array(tiles, dtype=np.int64).reshape(-1, 3)
    numbers = _to_device(np.concatenate([[len(tiles)], laid.ravel(), order]), rows.device)
    own, rest = numbers[1 : 1 + laid.size].view(-1, 3), numbers[1 + laid.size :]
    return Tiles(own, rest, numbers[:1], len(tiles), block_m, rows.mask)


def _sorted_there(slots: torch.Tensor) -> Tiles:
    """As ``_sorted``, on the device: nothing waits for it, and a graph can hold it."""
    count = len(slots)
    of_row, order = torch.sort(slots, stable=True)
    number = torch.arange(count, device=slots.device)
    is_first = torch.ones_like(of_row, dtype=torch.bool)
    torch.ne(of_row[1:], of_row[:-1], out=is_first[1:])
    place = number - torch.cummax(torch.where(is_first, number, 0), 0).values
    leads = (place % FEW_ROWS == 0) & (of_row >= 0)
    ends = torch.searchsorted(of_row, of_row, right=True)
    tiles = torch.stack([of_row, number, (ends - number).clamp(max=FEW_ROWS)], 1)
    # Rows that lead no tile are written behind all tiles.
    tile = torch.where(leads, torch.cumsum(leads, 0) - 1, count)
    laid = torch.zeros(count + 1, 3, dtype=torch.int64, device=slots.device)
    laid.index_copy_(0, tile, tiles)
    num_used = leads.sum().view(1)
    return Tiles(laid[:count], order, num_used, count, FEW_ROWS, -1)


def empty_tiles(block_m: int, device: torch.device) -> Tiles:
    """Return a layout of one tile without rows."""
    nothing = torch.zeros(4 + block_m, dtype=torch.int64, device=device)
    return Tiles(nothing[:3].view(1, 3), nothing[4:], nothing[3:4], 1, block_m, 0)


def _to_device(numbers: IdArray, device: torch.device) -> torch.Tensor:
    return to_device(torch.from_numpy(numbers), device)
