"""Segmented shrink and expand in Triton, and the layout of rows that they read.

Rows are laid out in *tiles*: up to ``block_m`` rows of one slot; base rows are in none. What a
slot holds stands in a table of numbers, one line a slot: address of A, R, then for each member
of the group the address of B, r, where its part begins in R, and its width. A slot that is not
loaded has R = 0, a member without a low-rank part r = 0. Lines of several groups lie side by
side. Ranks are ragged: programs take what their slot has, and nothing is padded in memory. No grid
depends on anything but maxima that the host knows, so a captured graph holds for any slots. What
varies from step to step is no constant of a kernel.

Shrinking rows to segments that share a matrix follows Punica's SGMV (Chen et al., MLSys 2024),
ragged ranks by addresses S-LoRA (Sheng et al., MLSys 2024).

Legend: T rows of x and y, S parts of the input width, R most ranks of a slot.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["slot_of_row", "tiles", "num_used", "rows"],
)
def gather_rows(
    slot_of_row: tl.tensor,  # T, -1: a base row
    num_rows: tl.tensor,
    tiles: tl.tensor,  # T x 3: of each tile its slot, first of its entries in rows, how many
    num_used: tl.tensor,  # 1: how many tiles have rows
    rows: tl.tensor,  # T x block_m row numbers
    block_t: tl.constexpr,
    block_m: tl.constexpr,
    block_i: tl.constexpr,
) -> None:
    """Lay a few rows out in tiles slot by slot, without sorting: one program compares all pairs.

    The tiles come first, as many empty ones behind them as make one for each row.
    """
    own = tl.arange(0, block_t)
    is_row = own < num_rows
    slot = tl.load(slot_of_row + own, mask=is_row, other=-1)
    # Of each row: where it stands among the rows of its slot, how many these are, and how many
    # tiles there are of lower slots.
    place = tl.zeros((block_t,), dtype=tl.int32)
    count = tl.zeros((block_t,), dtype=tl.int32)
    before = tl.zeros((block_t,), dtype=tl.int32)
    num_tiles = tl.zeros((block_i,), dtype=tl.int32)
    for start in range(0, num_rows, block_i):
        other = start + tl.arange(0, block_i)
        other_slot = tl.load(slot_of_row + other, mask=other < num_rows, other=-1)
        is_same = (slot[:, None] == other_slot[None, :]) & is_row[:, None]
        other_place = tl.sum((is_same & (own[:, None] < other[None, :])).to(tl.int32), 0)
        # The first row of a tile stands for it.
        leads = (other_slot >= 0) & (other_place % block_m == 0)
        num_tiles += leads.to(tl.int32)
        is_lower = leads[None, :] & (other_slot[None, :] < slot[:, None])
        place += tl.sum((is_same & (other[None, :] < own[:, None])).to(tl.int32), 1)
        count += tl.sum(is_same.to(tl.int32), 1)
        before += tl.sum(is_lower.to(tl.int32), 1)
    has_slot = is_row & (slot >= 0)
    tile = before + place // block_m
    tl.store(rows + tile * block_m + place % block_m, own.to(tl.int64), mask=has_slot)
    leads = has_slot & (place % block_m == 0)
    tl.store(tiles + tile * 3, slot, mask=leads)
    tl.store(tiles + tile * 3 + 1, (tile * block_m).to(tl.int64), mask=leads)
    tl.store(tiles + tile * 3 + 2, tl.minimum(count - place, block_m).to(tl.int64), mask=leads)
    used = tl.sum(num_tiles, 0)
    tl.store(num_used, used.to(tl.int64))
    is_empty = is_row & (own >= used)
    tl.store(tiles + own * 3 + 2, tl.zeros((block_t,), dtype=tl.int64), mask=is_empty)


@triton.jit(
    do_not_specialize=["first_field", "line_size", "num_lines", "num_parts", "part_blocks"],
    do_not_specialize_on_alignment=["table", "tiles", "num_used", "rows"],
)
def shrink(
    x: tl.tensor,  # T x width_in
    x_stride: tl.tensor,
    width_in: tl.tensor,
    table: tl.tensor,
    first_field: tl.tensor,  # of the group within a line
    line_size: tl.tensor,
    num_lines: tl.tensor,  # slots from here on were never loaded in this group
    tiles: tl.tensor,
    num_used: tl.tensor,  # 1: how many tiles have rows, the first ones
    rows: tl.tensor,
    h: tl.tensor,  # S x T x h_stride float32; strides are multiples of 16
    h_stride: tl.tensor,
    h_part: tl.tensor,  # elements of one part of h
    num_parts: tl.tensor,  # S
    part_blocks: tl.tensor,  # blocks of columns in a part
    block_m: tl.constexpr,
    block_r: tl.constexpr,
    block_k: tl.constexpr,
    widen: tl.constexpr,
) -> None:
    """h[s, row] = x[row, part s] . A[:, part s]^T, summed in float32, for all members at once.

    The programs of a tile (see ``_share``) share its blocks of ranks in all parts: how many there
    are follows from the slot, not from the grid. Matrices begin at multiples of 16 bytes. ``widen`` multiplies
    in float32, for interpreters of 16-bit floats.
    """
    number, share, num_shares = _share(num_used)
    tile = tiles + number * 3
    count = tl.load(tile + 2)
    slot = tl.load(tile)
    if (count > 0) & (slot < num_lines) & (share < num_shares):
        line = table + slot * line_size + first_field
        num_ranks = tl.load(line + 1)
        lane = tl.arange(0, block_m)
        is_row = lane < count
        row = tl.load(rows + tl.load(tile + 1) + lane, mask=is_row, other=0)
        a = tl.multiple_of(tl.load(line).to(tl.pointer_type(x.dtype.element_ty)), 16)
        num_pieces = (tl.cdiv(num_ranks, block_r) * num_parts).to(tl.int32)
        for piece in range(share, num_pieces, num_shares):
            part = piece % num_parts
            rank = piece // num_parts * block_r + tl.arange(0, block_r)
            is_rank = rank < num_ranks
            first = part * part_blocks * block_k
            last = tl.minimum(first + part_blocks * block_k, width_in)
            total = tl.zeros((block_m, block_r), dtype=tl.float32)
            for start in range(first, last, block_k):
                column = start + tl.arange(0, block_k)
                is_column = column < width_in
                left = tl.load(
                    x + row[:, None] * x_stride + column[None, :],
                    mask=is_row[:, None] & is_column[None, :],
                    other=0.0,
                )
                right = tl.load(
                    a + rank[None, :].to(tl.int64) * width_in + column[:, None],
                    mask=is_rank[None, :] & is_column[:, None],
                    other=0.0,
                )
                if widen:
                    left, right = left.to(tl.float32), right.to(tl.float32)
                total = tl.dot(left, right, total, input_precision="ieee")
            tl.store(
                h + part.to(tl.int64) * h_part + row[:, None] * h_stride + rank[None, :],
                total,
                mask=is_row[:, None] & is_rank[None, :],
            )


@triton.jit(
    do_not_specialize=["first_field", "line_size", "num_lines", "first_member", "num_parts"],
    do_not_specialize_on_alignment=["table", "tiles", "num_used", "rows", "columns"],
)
def expand(
    h: tl.tensor,  # S x T x h_stride float32; strides are multiples of 16
    h_stride: tl.tensor,
    h_part: tl.tensor,
    y: tl.tensor,  # T x width or wider
    y_stride: tl.tensor,
    table: tl.tensor,
    first_field: tl.tensor,  # of the group within a line
    line_size: tl.tensor,
    num_lines: tl.tensor,  # slots from here on were never loaded in this group
    tiles: tl.tensor,
    num_used: tl.tensor,  # 1: how many tiles have rows, the first ones
    rows: tl.tensor,
    first_member: tl.tensor,
    columns: tl.tensor,  # of each member: where its columns begin in y, from first_member on
    num_parts: tl.tensor,
    block_m: tl.constexpr,
    block_r: tl.constexpr,
    block_n: tl.constexpr,
    unit: tl.constexpr,
    widen: tl.constexpr,
) -> None:
    """y[row, member's columns] += (sum over s of h[s, row, member's part]) . B, rounded once.

    One program a tile, share of the column blocks and member. What is summed over the parts
    serves all columns of a program but where a slot has more than ``block_r`` ranks.
    """
    number, own_share, num_shares = _share(num_used)
    tile = tiles + number * 3
    count = tl.load(tile + 2)
    slot = tl.load(tile)
    if (count > 0) & (slot < num_lines) & (own_share < num_shares):
        member = tl.program_id(2)
        line = table + slot * line_size + first_field + 2 + (first_member + member) * 4
        num_ranks = tl.load(line + 1)
        if num_ranks > 0:
            width = tl.multiple_of(tl.load(line + 3), unit)
            lane = tl.arange(0, block_m)
            is_row = lane < count
            row = tl.load(rows + tl.load(tile + 1) + lane, mask=is_row, other=0)
            b = tl.multiple_of(tl.load(line).to(tl.pointer_type(y.dtype.element_ty)), unit)
            left_at = h + row[:, None] * h_stride + tl.load(line + 2)
            own = y + tl.multiple_of(tl.load(columns + member), unit) + row[:, None] * y_stride
            begin, share = own_share * block_n, num_shares * block_n
            if num_ranks <= block_r:
                # What is summed over the parts serves all columns.
                left = _sum_parts(
                    left_at, h_part, 0, num_ranks, is_row, b, num_parts, block_m, block_r
                )
                for first in range(begin, width, share):
                    column = first + tl.arange(0, block_n)
                    is_target = is_row[:, None] & (column < width)[None, :]
                    total = tl.load(own + column[None, :], mask=is_target, other=0.0)
                    total = _add_product(
                        left, b, 0, num_ranks, column, width, total.to(tl.float32), block_r, widen
                    )
                    tl.store(own + column[None, :], total.to(own.dtype.element_ty), mask=is_target)
            else:
                for first in range(begin, width, share):
                    column = first + tl.arange(0, block_n)
                    is_target = is_row[:, None] & (column < width)[None, :]
                    total = tl.load(own + column[None, :], mask=is_target, other=0.0)
                    total = total.to(tl.float32)
                    for start in tl.range(0, num_ranks, block_r, num_stages=1):
                        left = _sum_parts(
                            left_at,
                            h_part,
                            start,
                            num_ranks,
                            is_row,
                            b,
                            num_parts,
                            block_m,
                            block_r,
                        )
                        total = _add_product(
                            left, b, start, num_ranks, column, width, total, block_r, widen
                        )
                    tl.store(own + column[None, :], total.to(own.dtype.element_ty), mask=is_target)


@triton.jit
def _share(num_used: tl.tensor) -> tl.tensor:
    """Return a program's tile, its share of that, and how many shares there are.

    Where a grid has room for more tiles than have rows, as in a graph, all its programs share those
    that have. Some may be left over: their share is beyond the last one.
    """
    used = tl.maximum(tl.load(num_used).to(tl.int32), 1)
    program = tl.program_id(0) + tl.num_programs(0) * tl.program_id(1)
    return program % used, program // used, tl.num_programs(0) * tl.num_programs(1) // used


@triton.jit
def _sum_parts(
    left_at: tl.tensor,
    h_part: tl.tensor,
    start: tl.tensor,
    num_ranks: tl.tensor,
    is_row: tl.tensor,
    b: tl.tensor,
    num_parts: tl.tensor,
    block_m: tl.constexpr,
    block_r: tl.constexpr,
) -> tl.tensor:
    """Return the sums over all parts for ``block_r`` ranks from ``start`` on, in B's dtype."""
    rank = start + tl.arange(0, block_r)
    mask = is_row[:, None] & (rank < num_ranks)[None, :]
    left = tl.zeros((block_m, block_r), dtype=tl.float32)
    for part in tl.range(0, num_parts, loop_unroll_factor=2):
        left += tl.load(left_at + part * h_part + rank[None, :], mask=mask, other=0.0)
    # What is rounded to the adapter's dtype is also what PEFT rounds.
    return left.to(b.dtype.element_ty)


@triton.jit
def _add_product(
    left: tl.tensor,
    b: tl.tensor,
    start: tl.tensor,
    num_ranks: tl.tensor,
    column: tl.tensor,
    width: tl.tensor,
    total: tl.tensor,
    block_r: tl.constexpr,
    widen: tl.constexpr,
) -> tl.tensor:
    """Return ``total`` plus the product of ``left`` and B's ranks from ``start`` on."""
    rank = start + tl.arange(0, block_r)
    right = tl.load(
        b + rank[:, None].to(tl.int64) * width + column[None, :],
        mask=(rank < num_ranks)[:, None] & (column < width)[None, :],
        other=0.0,
    )
    if widen:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


# Whether Triton interprets these kernels, as it is told by the environment when they are made.
IS_INTERPRETED = not isinstance(expand, triton.JITFunction)
