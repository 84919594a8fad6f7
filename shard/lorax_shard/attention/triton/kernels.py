"""Paged attention in Triton: storing, prompt chunks and decode rows.

Online softmax (Milakov and Gimelshein 2018) over tiles of K and V (FlashAttention, Dao et al.
2022); contexts are split and the parts combined (FlashDecoding, Dao et al. 2023). Scores are kept
in units of log2, so that one exp2 makes a weight. Sums are float32.

A tile of M rows holds ``heads`` query heads of one KV head for each of its queries, so that K
and V are loaded once for all of them. Only keys that some query of the tile sees are loaded:
what lies behind a row's end is never read.

Legend: T tokens, R rows, H query heads, G KV heads, D and E head sizes of K and V, S splits
of all tiles together. Strides that vary from step to step come in ``unit`` elements, so that kernels
read whole lines without being compiled for each.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_FP8_MAX = tl.constexpr(448.0)


@triton.jit(
    do_not_specialize=["key_token", "key_head", "value_token", "value_head"],
    do_not_specialize_on_alignment=["slots"],
)
def store(
    key: tl.tensor,  # T x G x D
    key_token: tl.tensor,  # from one token to the next, in units
    key_head: tl.tensor,
    value: tl.tensor,  # T x G x E
    value_token: tl.tensor,
    value_head: tl.tensor,
    keys: tl.tensor,  # slots x G x D
    values: tl.tensor,  # slots x G x E
    slots: tl.tensor,  # T int64
    num_kv_heads: tl.tensor,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    key_unit: tl.constexpr,
    value_unit: tl.constexpr,
    block_g: tl.constexpr,
    block_d: tl.constexpr,
    block_e: tl.constexpr,
) -> None:
    """Write one token's K and V of ``block_g`` heads to its slot; what is not finite becomes 0.

    Where a slot is negative nothing is written.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    head = (tl.program_id(1) * block_g + tl.arange(0, block_g))[:, None]
    is_head = head < tl.where(slot >= 0, num_kv_heads, 0)
    _copy_finite(
        key + (token * key_token + head * key_head) * key_unit,
        keys + (slot * num_kv_heads + head) * key_dim,
        is_head,
        key_dim,
        block_d,
    )
    _copy_finite(
        value + (token * value_token + head * value_head) * value_unit,
        values + (slot * num_kv_heads + head) * value_dim,
        is_head,
        value_dim,
        block_e,
    )


@triton.jit
def _copy_finite(
    source: tl.tensor,
    target: tl.tensor,
    is_head: tl.tensor,
    width: tl.constexpr,
    block: tl.constexpr,
) -> None:
    at = tl.arange(0, block)[None, :]
    mask = is_head & (at < width)
    x = tl.load(source + at, mask=mask, other=0.0)
    tl.store(target + at, as_stored(x, target), mask=mask)


@triton.jit
def as_stored(x: tl.tensor, target: tl.tensor) -> tl.tensor:
    """Return numbers as a cache keeps them: in its dtype, and 0 for what is not finite."""
    x = tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0)
    if target.dtype.element_ty == tl.float8e4nv:
        # What is beyond the largest number would become NaN.
        x = tl.clamp(x.to(tl.float32), -_FP8_MAX, _FP8_MAX)
    return x.to(target.dtype.element_ty)


@triton.jit(
    do_not_specialize=[
        "query_token", "query_head", "table_stride", "num_places", "window", "chunk"
    ],
    do_not_specialize_on_alignment=[
        "stats", "splits", "first_tokens", "query_lens", "context_lens", "tables"
    ],
)  # fmt: skip
def prompt(
    query: tl.tensor,  # T x H x D
    query_token: tl.tensor,  # from one token to the next, in units
    query_head: tl.tensor,
    keys: tl.tensor,  # slots x G x D
    values: tl.tensor,  # slots x G x E
    sinks: tl.tensor,  # H float32; anything without sinks
    output: tl.tensor,  # T x H x E
    partial: tl.tensor,  # places x H x E float32; unused where no tile is split
    stats: tl.tensor,  # 2 x places x H float32: highest score, sum of weights
    splits: tl.tensor,  # S x 4 int32: row, first query in the row, number in the tile, of how many
    num_places: tl.tensor,
    first_tokens: tl.tensor,  # R int32; of each row among the T
    query_lens: tl.tensor,  # R int32
    context_lens: tl.tensor,  # R int32
    tables: tl.tensor,  # R x table_stride int32
    table_stride: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    num_kv_heads: tl.tensor,
    is_split: tl.constexpr,
    group: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    key_unit: tl.constexpr,
    block_size: tl.constexpr,
    window: tl.tensor,
    chunk: tl.tensor,
    is_local: tl.constexpr,
    has_softcap: tl.constexpr,
    has_sinks: tl.constexpr,
    heads: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
    block_e: tl.constexpr,
) -> None:
    """Causal attention of one tile of queries over one split of its row's own KV, for ``combine``.

    Of a tile with one split it is final.
    """
    split = tl.program_id(0)
    row, first = tl.load(splits + split * 4), tl.load(splits + split * 4 + 1)
    number, of_tile = tl.load(splits + split * 4 + 2), tl.load(splits + split * 4 + 3)
    num_queries, length = tl.load(query_lens + row), tl.load(context_lens + row)
    num_parts: tl.constexpr = (group + heads - 1) // heads
    kv_head = tl.program_id(1) // num_parts
    in_group = (tl.program_id(1) % num_parts) * heads + tl.arange(0, block_m) % heads
    block_q: tl.constexpr = block_m // heads
    own = tl.arange(0, block_m) // heads
    is_row = (own < block_q) & (first + own < num_queries) & (in_group < group)
    head = kv_head * group + in_group
    token = (tl.load(first_tokens + row) + first + own).to(tl.int64)
    q_rows = query + (token * query_token + head * query_head) * key_unit
    q = _load_rows(q_rows, is_row, key_dim, block_d)
    position = length - num_queries + first  # of the tile's first query
    last = tl.minimum(position + block_q, length) - 1
    start, end = _split(_first_seen(position, window, chunk), last + 1, number, of_tile, block_n)
    # Where there are several splits the sink comes when they are combined.
    is_whole = is_row & (tl.zeros((block_m,), tl.int32) + of_tile == 1)
    top, total = _start(sinks + head, is_whole, has_sinks, block_m)
    top, total, summed = _attend(
        q, position + own, top, total,
        keys + kv_head * key_dim, values + kv_head * value_dim,
        tables + row.to(tl.int64) * table_stride,
        start, end, position, last, scale, cap, num_kv_heads,
        key_dim, value_dim, block_size, window, chunk, is_local, has_softcap, block_m, block_n, block_d, block_e,
    )  # fmt: skip
    num_heads = num_kv_heads * group
    if is_split:
        place = split.to(tl.int64) * block_q + own
        _store_parts(
            partial, stats, place * num_heads + head, num_places.to(tl.int64) * num_heads,
            top, total, summed, is_row & ~is_whole, value_dim, block_e,
        )  # fmt: skip
    rows = output + (token * num_heads + head) * value_dim
    _store_rows(rows, _divide(summed, total), is_whole, value_dim, block_e)


@triton.jit(
    do_not_specialize=[
        "query_token", "query_head", "table_stride", "num_places", "window", "chunk"
    ],
    do_not_specialize_on_alignment=["stats", "splits", "context_lens", "tables"],
)  # fmt: skip
def decode(
    query: tl.tensor,  # T x H x D, decode rows first
    query_token: tl.tensor,  # from one token to the next, in units
    query_head: tl.tensor,
    keys: tl.tensor,  # slots x G x D
    values: tl.tensor,  # slots x G x E
    sinks: tl.tensor,  # H float32; anything without sinks
    output: tl.tensor,  # T x H x E
    partial: tl.tensor,  # places x H x E float32; unused where no row is split
    stats: tl.tensor,  # 2 x places x H float32: highest score, sum of weights
    splits: tl.tensor,  # S x 4 int32: of each its row, 0, its number in the row, and of how many
    num_places: tl.tensor,  # S, or 0
    context_lens: tl.tensor,  # R int32
    tables: tl.tensor,  # R x table_stride int32
    table_stride: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    num_kv_heads: tl.tensor,
    is_split: tl.constexpr,
    group: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    key_unit: tl.constexpr,
    block_size: tl.constexpr,
    window: tl.tensor,
    chunk: tl.tensor,
    is_local: tl.constexpr,
    has_softcap: tl.constexpr,
    has_sinks: tl.constexpr,
    heads: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
    block_e: tl.constexpr,
) -> None:
    """Attention of one row's single query over one split of its context, for ``combine``.

    Of a row with one split it is final. A split's bounds follow from the row's length on the device.
    """
    split = tl.program_id(0)
    row = tl.load(splits + split * 4)
    number, of_row = tl.load(splits + split * 4 + 2), tl.load(splits + split * 4 + 3)
    length = tl.load(context_lens + row)
    num_parts: tl.constexpr = (group + heads - 1) // heads
    kv_head = tl.program_id(1) // num_parts
    of_part = tl.arange(0, block_m)
    in_group = (tl.program_id(1) % num_parts) * heads + of_part
    is_row = (of_part < heads) & (in_group < group)
    head = kv_head * group + in_group
    q_rows = query + (row.to(tl.int64) * query_token + head * query_head) * key_unit
    q = _load_rows(q_rows, is_row, key_dim, block_d)
    start, end = _split(_first_seen(length - 1, window, chunk), length, number, of_row, block_n)
    is_whole = is_row & (tl.zeros((block_m,), tl.int32) + of_row == 1)
    top, total = _start(sinks + head, is_whole, has_sinks, block_m)
    top, total, summed = _attend(
        q, tl.zeros((block_m,), tl.int32) + (length - 1), top, total,
        keys + kv_head * key_dim, values + kv_head * value_dim,
        tables + row.to(tl.int64) * table_stride,
        start, end, length - 1, length - 1, scale, cap, num_kv_heads,
        key_dim, value_dim, block_size, window, chunk, is_local, has_softcap, block_m, block_n, block_d, block_e,
    )  # fmt: skip
    num_heads = num_kv_heads * group
    if is_split:
        _store_parts(
            partial, stats, split.to(tl.int64) * num_heads + head,
            num_places.to(tl.int64) * num_heads,
            top, total, summed, is_row & ~is_whole, value_dim, block_e,
        )  # fmt: skip
    rows = output + (row.to(tl.int64) * num_heads + head) * value_dim
    _store_rows(rows, _divide(summed, total), is_whole, value_dim, block_e)


@triton.jit
def _split(
    first: tl.tensor, end: tl.tensor, number: tl.tensor, count: tl.tensor, block_n: tl.constexpr
) -> tl.tensor:
    """Return the bounds of one of ``count`` splits of the keys from ``first`` to ``end``.

    Without a window or chunk their numbers are beyond every length, and ``first`` is 0.
    """
    first = first // block_n * block_n
    span = tl.cdiv(tl.cdiv(end - first, count), block_n) * block_n
    start = first + number * span
    return start, tl.minimum(start + span, end)


@triton.jit
def _attend(
    q: tl.tensor,  # M x D
    position: tl.tensor,  # M
    top: tl.tensor,  # M
    total: tl.tensor,  # M
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    first_position: tl.tensor,
    last_position: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    num_kv_heads: tl.tensor,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    block_size: tl.constexpr,
    window: tl.tensor,
    chunk: tl.tensor,
    is_local: tl.constexpr,
    has_softcap: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
    block_e: tl.constexpr,
) -> tl.tensor:
    """Return (highest score, sum of weights, weighted sum of V) over keys ``start`` to ``end``.

    ``start`` is a multiple of ``block_n``. The positions lie between ``first_position`` and
    ``last_position``. Tiles of keys that all queries see whole need no mask.
    """
    summed = tl.zeros((block_m, block_e), dtype=tl.float32)
    whole_end = tl.maximum(tl.minimum(first_position + 1, end) // block_n * block_n, start)
    whole_start = start
    if is_local:
        first_seen = _first_seen(first_position, window, chunk)
        start = tl.maximum(start, first_seen // block_n * block_n)
        seen_by_all = tl.cdiv(_first_seen(last_position, window, chunk), block_n) * block_n
        whole_end = tl.maximum(whole_end, start)
        whole_start = tl.minimum(tl.maximum(seen_by_all, start), whole_end)
        top, total, summed = _attend_span(
            q, position, top, total, summed, keys, values, table, start, whole_start, end,
            scale, cap, num_kv_heads, key_dim, value_dim, block_size, window, chunk, is_local, has_softcap, True,
            block_n, block_d, block_e,
        )  # fmt: skip
    top, total, summed = _attend_span(
        q, position, top, total, summed, keys, values, table, whole_start, whole_end, end,
        scale, cap, num_kv_heads, key_dim, value_dim, block_size, window, chunk, is_local, has_softcap, False,
        block_n, block_d, block_e,
    )  # fmt: skip
    return _attend_span(
        q, position, top, total, summed, keys, values, table, whole_end, end, end,
        scale, cap, num_kv_heads, key_dim, value_dim, block_size, window, chunk, is_local, has_softcap, True,
        block_n, block_d, block_e,
    )  # fmt: skip


@triton.jit
def _attend_span(
    q: tl.tensor,
    position: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    summed: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    end: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    num_kv_heads: tl.tensor,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    block_size: tl.constexpr,
    window: tl.tensor,
    chunk: tl.tensor,
    is_local: tl.constexpr,
    has_softcap: tl.constexpr,
    is_masked: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
    block_e: tl.constexpr,
) -> tl.tensor:
    """Go on over the tiles of keys from ``start`` to ``stop``; none at ``end`` or later is read."""
    d, e = tl.arange(0, block_d)[:, None], tl.arange(0, block_e)[None, :]
    for first in range(start, stop, block_n):
        at = first + tl.arange(0, block_n)
        is_key, is_k, is_v = at < end, d < key_dim, e < value_dim
        if is_masked:
            block = tl.load(table + at // block_size, mask=is_key, other=0)
            is_k, is_v = is_k & is_key[None, :], is_v & is_key[:, None]
        else:
            block = tl.load(table + at // block_size)
        slot = (block.to(tl.int64) * block_size + at % block_size) * num_kv_heads
        k = tl.load(keys + slot[None, :] * key_dim + d, mask=is_k, other=0.0)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
        if has_softcap:
            # tanh(x) = 1 - 2 / (1 + e^2x): exp2's 0 and inf give -1 and 1.
            scores = cap - 2.0 * cap / (1.0 + tl.exp2(scores))
        if is_masked:
            seen = is_key[None, :] & (at[None, :] <= position[:, None])
            if is_local:
                seen &= at[None, :] >= _first_seen(position, window, chunk)[:, None]
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # While a query has seen nothing its highest score is -inf, and -inf - -inf is no number.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        v = tl.load(values + slot[:, None] * value_dim + e, mask=is_v, other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        summed = tl.dot(
            weights.to(q.dtype), v.to(q.dtype), summed * shrink[:, None], input_precision="ieee"
        )
        top = higher
    return top, total, summed


@triton.jit
def _first_seen(position: tl.tensor, window: tl.tensor, chunk: tl.tensor) -> tl.tensor:
    """Return the first position that a query at ``position`` sees; it never falls."""
    return tl.maximum(tl.maximum(position - window + 1, 0), position - position % chunk)


@triton.jit
def _start(
    sinks: tl.tensor, is_row: tl.tensor, has_sinks: tl.constexpr, block_m: tl.constexpr
) -> tl.tensor:
    """Return the highest score and the sum of weights before any key: the sink's, or nothing."""
    if has_sinks:
        top = tl.load(sinks, mask=is_row, other=float("-inf")) * _LOG2_E
        return top, tl.where(is_row, 1.0, 0.0)
    else:
        return (
            tl.full((block_m,), float("-inf"), tl.float32),
            tl.zeros((block_m,), dtype=tl.float32),
        )


@triton.jit
def _store_parts(
    partial: tl.tensor,
    stats: tl.tensor,
    at: tl.tensor,  # M, of each query's head
    totals: tl.tensor,  # where in stats the sums of weights begin
    top: tl.tensor,
    total: tl.tensor,
    summed: tl.tensor,
    is_row: tl.tensor,
    value_dim: tl.constexpr,
    block_e: tl.constexpr,
) -> None:
    tl.store(stats + at, top, mask=is_row)
    tl.store(stats + totals + at, total, mask=is_row)
    _store_rows(partial + at * value_dim, summed, is_row & (total > 0), value_dim, block_e)


@triton.jit
def _divide(summed: tl.tensor, total: tl.tensor) -> tl.tensor:
    # Rows of a tile that stand for no query have a total of 0, and are not stored.
    return summed / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def _load_rows(
    rows: tl.tensor, is_row: tl.tensor, width: tl.constexpr, block: tl.constexpr
) -> tl.tensor:
    at = tl.arange(0, block)[None, :]
    return tl.load(rows[:, None] + at, mask=is_row[:, None] & (at < width), other=0.0)


@triton.jit
def _store_rows(
    rows: tl.tensor, values: tl.tensor, is_row: tl.tensor, width: tl.constexpr, block: tl.constexpr
) -> None:
    at = tl.arange(0, block)[None, :]
    mask = is_row[:, None] & (at < width)
    tl.store(rows[:, None] + at, values.to(rows.dtype.element_ty), mask=mask)
