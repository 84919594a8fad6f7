"""Combining what splits of a context have left (FlashDecoding, Dao et al. 2023).

Legend: T tokens, Q queries, H query heads, E head size of V. Places are where splits leave their
parts: one for each query of a split's tile.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(
    do_not_specialize=["num_places", "block_q", "first_token"],
    do_not_specialize_on_alignment=["stats", "queries"],
)
def combine(
    partial: tl.tensor,  # places x H x E float32
    stats: tl.tensor,  # 2 x places x H float32
    sinks: tl.tensor,  # H float32; anything without sinks
    output: tl.tensor,  # T x H x E
    queries: tl.tensor,  # Q x 2 int32: of each its place in its first split, and how many there are
    num_places: tl.tensor,
    block_q: tl.tensor,  # places from one split of a query to the next
    first_token: tl.tensor,  # of the queries among the T
    num_heads: tl.tensor,
    value_dim: tl.constexpr,
    has_sinks: tl.constexpr,
    most_splits: tl.constexpr,
    block_s: tl.constexpr,
    block_e: tl.constexpr,
) -> None:
    """Weigh the splits of one query and head by their sums, and add the head's sink.

    A query with one split has its output already.
    """
    query, head = tl.program_id(0), tl.program_id(1)
    first, count = tl.load(queries + query * 2).to(tl.int64), tl.load(queries + query * 2 + 1)
    if count > 1:
        at, apart = first * num_heads + head, block_q * num_heads
        own_tops, own_totals = stats + at, stats + num_places.to(tl.int64) * num_heads + at
        tops, totals = _load_stats(own_tops, own_totals, tl.arange(0, most_splits), count, apart)
        highest = tl.max(tops, 0)
        if has_sinks:
            sink = tl.load(sinks + head) * _LOG2_E
            highest = tl.maximum(highest, sink)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        whole = tl.sum(tl.exp2(tops - highest) * totals, 0)
        if has_sinks:
            whole += tl.exp2(sink - highest)
        column = tl.arange(0, block_e)
        summed = tl.zeros((block_e,), dtype=tl.float32)
        for start in range(0, count, block_s):
            split = start + tl.arange(0, block_s)
            top, total = _load_stats(own_tops, own_totals, split, count, apart)
            parts = tl.load(
                partial + (at + split[:, None] * apart) * value_dim + column[None, :],
                # A split without a visible key wrote nothing.
                mask=(total > 0)[:, None] & (column < value_dim)[None, :],
                other=0.0,
            )
            summed += tl.sum(tl.exp2(top - highest)[:, None] * parts, 0)
        summed = summed / tl.where(whole > 0, whole, 1.0)
        token = (first_token + query).to(tl.int64)
        target = output + (token * num_heads + head) * value_dim + column
        tl.store(target, summed.to(output.dtype.element_ty), mask=column < value_dim)


@triton.jit
def _load_stats(
    tops: tl.tensor, totals: tl.tensor, split: tl.tensor, num_splits: tl.tensor, stride: tl.tensor
) -> tl.tensor:
    """Return the highest scores and sums of weights of splits; -inf and 0 where there is none."""
    is_split = split < num_splits
    top = tl.load(tops + split * stride, mask=is_split, other=float("-inf"))
    total = tl.load(totals + split * stride, mask=is_split, other=0.0)
    return top, total
