"""Rotations in Triton that store what comes out of them in a paged cache, with V beside it."""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from lorax_shard.attention.triton.kernels import as_stored
from lorax_shard.fused.triton.kernels import turned


@triton.jit(
    do_not_specialize=[
        "num_queries", "query_head", "query_token", "query_out_head", "query_out_token",
        "key_head", "key_token", "key_out_head", "key_out_token", "value_head", "value_token",
        "cos_stride", "sin_stride",
    ],
    do_not_specialize_on_alignment=["slots"],
)  # fmt: skip
def rotate_and_store(
    query: tl.tensor,  # heads x tokens x dim with strides for the first two
    query_out: tl.tensor,
    num_queries: tl.tensor,
    query_head: tl.tensor,
    query_token: tl.tensor,
    query_out_head: tl.tensor,
    query_out_token: tl.tensor,
    key: tl.tensor,
    key_out: tl.tensor,
    key_head: tl.tensor,
    key_token: tl.tensor,
    key_out_head: tl.tensor,
    key_out_token: tl.tensor,
    value: tl.tensor,
    value_head: tl.tensor,
    value_token: tl.tensor,
    cos: tl.tensor,
    cos_stride: tl.tensor,
    sin: tl.tensor,
    sin_stride: tl.tensor,
    keys: tl.tensor,  # slots x key heads x dim
    values: tl.tensor,  # slots x key heads x value_dim
    slots: tl.tensor,  # tokens int64
    num_keys: tl.tensor,
    dim: tl.constexpr,
    value_dim: tl.constexpr,
    width: tl.constexpr,  # how much of a head turns
    is_adjacent: tl.constexpr,
    is_by_pair: tl.constexpr,
    block: tl.constexpr,  # at least half the width
    rest_block: tl.constexpr,  # at least what does not turn
    value_block: tl.constexpr,
    unit: tl.constexpr,
    value_unit: tl.constexpr,
) -> None:
    """Turn one head of one token; of a key write it to the token's slot too, and V beside it.

    Where a slot is negative nothing is written there.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token)
    is_kept = (head >= num_queries) & (slot >= 0)
    if head < num_queries:
        x = query + tl.multiple_of(head * query_head + token * query_token, unit)
        out = query_out + tl.multiple_of(head * query_out_head + token * query_out_token, unit)
    else:
        head -= num_queries
        x = key + tl.multiple_of(head * key_head + token * key_token, unit)
        out = key_out + tl.multiple_of(head * key_out_head + token * key_out_token, unit)
    first, second, is_pair, a, b = turned(
        x, cos + token * cos_stride, sin + token * sin_stride, width, is_adjacent, is_by_pair, block
    )
    tl.store(out + first, a, mask=is_pair)
    tl.store(out + second, b, mask=is_pair)
    line = slot * num_keys + head
    kept = keys + line * dim
    is_kept_pair = tl.arange(0, block) < tl.where(is_kept, width // 2, 0)
    tl.store(kept + first, as_stored(a, keys), mask=is_kept_pair)
    tl.store(kept + second, as_stored(b, keys), mask=is_kept_pair)
    if dim > width:
        column = width + tl.arange(0, rest_block)
        rest = tl.load(x + column, mask=column < dim, other=0.0)
        tl.store(out + column, rest, mask=column < dim)
        is_kept_rest = column < tl.where(is_kept, dim, 0)
        tl.store(kept + column, as_stored(rest, keys), mask=is_kept_rest)
    column = tl.arange(0, value_block)
    is_kept_value = column < tl.where(is_kept, value_dim, 0)
    v = value + tl.multiple_of(head * value_head + token * value_token, value_unit) + column
    v = tl.load(v, mask=is_kept_value, other=0.0)
    tl.store(values + line * value_dim + column, as_stored(v, values), mask=is_kept_value)
