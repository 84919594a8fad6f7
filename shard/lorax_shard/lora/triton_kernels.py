"""Segmented shrink and expand in Triton.

Rows are laid out in *tiles*: up to ``block_m`` rows of one slot. What a slot holds stands in a
table of numbers, one line a slot: address of A, R, then for each member of the group the
address of B, r, where its part begins in R, and its width. A slot that is not loaded has
R = 0, a member without a low-rank part r = 0. Ranks are ragged: a program whose ranks lie
beyond its slot's ends at once, and nothing is padded in memory.

Legend: T rows of x and y, N rows in tiles, S parts of the input width.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def shrink(
    x: Any,  # T x width_in
    x_stride: Any,
    width_in: Any,
    table: Any,
    line_size: Any,
    tiles: Any,  # of each tile: slot, first of its row numbers, how many
    rows: Any,  # N row numbers
    h: Any,  # S x N x h_stride float32
    h_stride: Any,
    num_rows: Any,
    part_width: Any,
    block_m: tl.constexpr,
    block_r: tl.constexpr,
    block_k: tl.constexpr,
) -> None:
    """h[s, i] = x[rows[i], part s] . A[:, part s]^T, summed in float32."""
    tile = tiles + tl.program_id(0) * 3
    line = table + tl.load(tile).to(tl.int64) * line_size
    num_ranks = tl.load(line + 1)
    first_rank = tl.program_id(1) * block_r
    if first_rank < num_ranks:
        at = tl.load(tile + 1) + tl.arange(0, block_m)
        is_row = tl.arange(0, block_m) < tl.load(tile + 2)
        row = tl.load(rows + at, mask=is_row, other=0)
        rank = first_rank + tl.arange(0, block_r)
        is_rank = rank < num_ranks
        a = tl.load(line).to(tl.pointer_type(x.dtype.element_ty))
        total = tl.zeros((block_m, block_r), dtype=tl.float32)
        first = tl.program_id(2) * part_width
        last = tl.minimum(first + part_width, width_in)
        for start in range(first, last, block_k):
            column = start + tl.arange(0, block_k)
            is_column = column < last
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
            total = tl.dot(left, right, total, input_precision="ieee")
        part = h + tl.program_id(2).to(tl.int64) * num_rows * h_stride
        tl.store(
            part + at[:, None].to(tl.int64) * h_stride + rank[None, :],
            total,
            mask=is_row[:, None] & is_rank[None, :],
        )


@triton.jit
def expand(
    h: Any,  # S x N x h_stride float32
    h_stride: Any,
    num_rows: Any,
    y: Any,  # T x width or wider
    y_stride: Any,
    table: Any,
    line_size: Any,
    member: Any,
    tiles: Any,
    rows: Any,
    num_parts: tl.constexpr,
    block_m: tl.constexpr,
    block_r: tl.constexpr,
    block_n: tl.constexpr,
) -> None:
    """y[rows[i]] += (sum over s of h[s, i, the member's part]) . B, rounded once."""
    tile = tiles + tl.program_id(0) * 3
    line = table + tl.load(tile).to(tl.int64) * line_size + 2 + member * 4
    num_ranks = tl.load(line + 1)
    width = tl.load(line + 3)
    first_column = tl.program_id(1) * block_n
    if (num_ranks > 0) & (first_column < width):
        at = tl.load(tile + 1) + tl.arange(0, block_m)
        is_row = tl.arange(0, block_m) < tl.load(tile + 2)
        row = tl.load(rows + at, mask=is_row, other=0)
        column = first_column + tl.arange(0, block_n)
        is_column = column < width
        b = tl.load(line).to(tl.pointer_type(y.dtype.element_ty))
        left_at = h + at[:, None].to(tl.int64) * h_stride + tl.load(line + 2)
        target = y + row[:, None] * y_stride + column[None, :]
        is_target = is_row[:, None] & is_column[None, :]
        total = tl.load(target, mask=is_target, other=0.0).to(tl.float32)
        for start in range(0, num_ranks, block_r):
            rank = start + tl.arange(0, block_r)
            is_rank = rank < num_ranks
            left = tl.zeros((block_m, block_r), dtype=tl.float32)
            for part in tl.static_range(num_parts):
                left += tl.load(
                    left_at + part * num_rows.to(tl.int64) * h_stride + rank[None, :],
                    mask=is_row[:, None] & is_rank[None, :],
                    other=0.0,
                )
            right = tl.load(
                b + rank[:, None].to(tl.int64) * width + column[None, :],
                mask=is_rank[:, None] & is_column[None, :],
                other=0.0,
            )
            total = tl.dot(left.to(right.dtype), right, total, input_precision="ieee")
        tl.store(target, total.to(y.dtype.element_ty), mask=is_target)
