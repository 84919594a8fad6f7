"""The token of each row, and what is reported of it, in Triton: one program a row."""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from lorax_shard.sampling.triton import rows
from lorax_shard.sampling.triton.rows import (
    is_drawn,
    is_kept,
    load_bits,
    load_limits,
    real,
    weight_of,
)
from lorax_shard.sampling.triton.search import REPORTED, load_keys, reach

# Ids whose weights are summed up before a block of them is reached.
_BLOCK_LEVELS, _BLOCK = tl.constexpr(8), tl.constexpr(256)
# Sums of blocks that are looked at together.
_SUMS = tl.constexpr(1024)
# More levels than there are.
_PAIRS = tl.constexpr(32)
_MULTIPLIER_0, _MULTIPLIER_1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_WEYL_0, _WEYL_1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)


@triton.jit(
    do_not_specialize=["line_stride", "num_levels", "num_blocks", "width"],
    do_not_specialize_on_alignment=["table", "best", "limits", "sums", "ids", "found"],
)
def choose(
    table: tl.tensor,
    best: tl.tensor,
    lines: tl.tensor,  # L x line_stride float32
    probs: tl.tensor,  # L x line_stride: the bits of the softmax
    line_stride: tl.tensor,
    num_levels: tl.tensor,  # of the tree over the vocabulary
    num_blocks: tl.tensor,
    limits: tl.tensor,  # L x 4
    sums: tl.tensor,  # S x num_blocks int64: what stands there is nobody's
    ids: tl.tensor,  # S int64, written: -1 for rows without a token
    found: tl.tensor,  # S x width float64, written: id, and two numbers that its logprob is made of
    width: tl.tensor,
    block: tl.constexpr,
    line_unit: tl.constexpr,
) -> None:
    """Take the likeliest token, or apply min_p and draw from what is left."""
    line = tl.program_id(0).to(tl.int64)
    row = table + line * rows.NUM_FIELDS
    token = tl.load(best + line)
    at = tl.multiple_of(line * line_stride, line_unit)
    likeliest = tl.load(probs + at + tl.maximum(token, 0))
    scale = likeliest.to(tl.float32, bitcast=True).to(tl.float64)
    value = tl.zeros_like(scale)
    if is_drawn(row, token):
        own = limits + line * rows.NUM_LIMITS
        least, most, tie, last = load_limits(own)
        least = tl.maximum(least, _least_by_min_p(row, tl.minimum(most, likeliest)))
        tl.store(own + rows.LEAST, least)
        block_sums = sums + line * num_blocks
        total = _sum_blocks(
            probs + at,
            line_stride,
            least,
            most,
            tie,
            last,
            block_sums,
            num_blocks,
            block,
            line_unit,
        )
        token = _draw(
            row, probs + at, line_stride, least, most, tie, last, block_sums, num_blocks,
            num_levels, total,
        )  # fmt: skip
        value = tl.load(probs + at + token).to(tl.float32, bitcast=True).to(tl.float64)
        scale = total.to(tl.float64) / rows.ONE
    raw_line = tl.load(row + rows.RAW_LINE)
    if (token >= 0) & (raw_line >= 0):
        raw_at = raw_line * line_stride
        value = tl.load(lines + raw_at + token).to(tl.float64)
        top = tl.load(probs + raw_at + tl.maximum(tl.load(best + raw_line), 0))
        scale = top.to(tl.float32, bitcast=True).to(tl.float64)
    out = found + line * width
    tl.store(ids + line, tl.maximum(token, -1))
    tl.store(out, token.to(tl.float64))
    tl.store(out + 1, value)
    tl.store(out + 2, scale)


@triton.jit
def _least_by_min_p(row: tl.tensor, top: tl.tensor) -> tl.tensor:
    """Return the bits of what is min_p times as likely as the likeliest token that is left."""
    share = tl.minimum(real(row + rows.MIN_P), 1.0)
    bound = tl.maximum(share, 0.0) * top.to(tl.float32, bitcast=True).to(tl.float64)
    # The least float32 that is not below it.
    rounded = bound.to(tl.float32)
    return rounded.to(tl.int32, bitcast=True) + (rounded.to(tl.float64) < bound).to(tl.int32)


@triton.jit
def _sum_blocks(
    values: tl.tensor,
    num: tl.tensor,
    least: tl.tensor,
    most: tl.tensor,
    tie: tl.tensor,
    last: tl.tensor,
    block_sums: tl.tensor,
    num_blocks: tl.tensor,
    block: tl.constexpr,
    unit: tl.constexpr,
) -> tl.tensor:
    """Write the weight of each block of ids, and return that of all."""
    total = tl.zeros((block // _BLOCK,), dtype=tl.int64)
    for start in range(0, num, block):
        index = start + tl.arange(0, block)
        bits = load_bits(values, index, num, unit)
        is_left = is_kept(bits, index, least, most, tie, last)
        weights = tl.where(is_left, weight_of(bits), 0)
        together = tl.sum(tl.reshape(weights, (block // _BLOCK, _BLOCK)), 1)
        place = start // _BLOCK + tl.arange(0, block // _BLOCK)
        tl.store(block_sums + place, together, mask=place < num_blocks)
        total += together
    tl.debug_barrier()
    return tl.sum(total, 0)


@triton.jit
def _draw(
    row: tl.tensor,
    values: tl.tensor,
    num: tl.tensor,
    least: tl.tensor,
    most: tl.tensor,
    tie: tl.tensor,
    last: tl.tensor,
    block_sums: tl.tensor,
    num_blocks: tl.tensor,
    num_levels: tl.tensor,
    total: tl.tensor,
) -> tl.tensor:
    """Descend the tree over ids, and return the token that the row's numbers lead to."""
    even, odd = _uniforms(tl.load(row + rows.SEED), tl.load(row + rows.POSITION))
    node, weight = tl.zeros_like(num_blocks), total
    level = num_levels - 1
    while level >= _BLOCK_LEVELS:
        half = 1 << (level - _BLOCK_LEVELS)
        end = tl.minimum(node + half, num_blocks)
        sums = tl.zeros((_SUMS,), dtype=tl.int64)
        for start in range(node, end, _SUMS):
            index = start + tl.arange(0, _SUMS)
            sums += tl.load(block_sums + index, mask=index < end, other=0, cache_modifier=".cg")
        left = tl.sum(sums, 0)
        goes_right = _goes_right(left, weight - left, _number(even, odd, level))
        node = tl.where(goes_right, node + half, node)
        weight = tl.where(goes_right, weight - left, left)
        level -= 1
    index = node * _BLOCK + tl.arange(0, _BLOCK)
    bits = load_bits(values, index, num, 1)
    weights = tl.where(is_kept(bits, index, least, most, tie, last), weight_of(bits), 0)
    leaf = tl.zeros_like(node)
    while level >= 0:
        offset = tl.arange(0, _BLOCK)
        is_left = (offset >= leaf) & (offset < leaf + (1 << level))
        left = tl.sum(tl.where(is_left, weights, 0), 0)
        goes_right = _goes_right(left, weight - left, _number(even, odd, level))
        leaf = tl.where(goes_right, leaf + (1 << level), leaf)
        weight = tl.where(goes_right, weight - left, left)
        level -= 1
    return (node * _BLOCK + leaf).to(tl.int64)


@triton.jit
def _goes_right(left: tl.tensor, right: tl.tensor, number: tl.tensor) -> tl.tensor:
    mark = number * (left + right).to(tl.float64)
    return (right > 0) & ((left <= 0) | (mark >= left.to(tl.float64)))


@triton.jit
def _number(even: tl.tensor, odd: tl.tensor, level: tl.tensor) -> tl.tensor:
    """Return the number of a level."""
    numbers = tl.where(level % 2 == 0, even, odd)
    return tl.sum(tl.where(tl.arange(0, _PAIRS) == level // 2, numbers, 0.0), 0)


@triton.jit
def _uniforms(seed: tl.tensor, position: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return the numbers of even and of odd levels: Philox4x32-10, see ``draws``."""
    pair = tl.arange(0, _PAIRS).to(tl.int64)
    c0 = tl.zeros_like(pair) + (position & 0xFFFFFFFF)
    c1 = tl.zeros_like(pair) + (position >> 32 & 0xFFFFFFFF)
    c2, c3 = pair, tl.zeros_like(pair)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        # No product of 32 bits by 32 has more than 64; those above 63 are no sign of anything.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        first = (product_1 >> 32 & 0xFFFFFFFF) ^ c1 ^ k0
        third = (product_0 >> 32 & 0xFFFFFFFF) ^ c3 ^ k1
        c0, c1 = first, product_1 & 0xFFFFFFFF
        c2, c3 = third, product_0 & 0xFFFFFFFF
        k0, k1 = k0 + _WEYL_0 & 0xFFFFFFFF, k1 + _WEYL_1 & 0xFFFFFFFF
    return _to_unit(c0, c1), _to_unit(c2, c3)


@triton.jit
def _to_unit(high: tl.tensor, low: tl.tensor) -> tl.tensor:
    return (high >> 5 << 26 | low >> 6).to(tl.float64) * (2.0**-53)


@triton.jit(
    do_not_specialize=["line_stride", "width", "most"],
    do_not_specialize_on_alignment=["table", "limits", "candidates", "ids", "found"],
)
def list_alternatives(
    table: tl.tensor,
    lines: tl.tensor,  # L x line_stride: the bits of what softmaxes are of
    probs: tl.tensor,  # L x line_stride: their bits
    line_stride: tl.tensor,
    limits: tl.tensor,  # L x 4
    candidates: tl.tensor,  # S x 2 x capacity
    ids: tl.tensor,  # S
    found: tl.tensor,  # S x width float64, written: from column 3 on ids, then numbers
    width: tl.tensor,
    most: tl.tensor,  # columns for each of both
    capacity: tl.constexpr,
    block: tl.constexpr,
    line_unit: tl.constexpr,
) -> None:
    """List the likeliest tokens of rows that ask for them, in any order; -1 where there is none."""
    line = tl.program_id(0).to(tl.int64)
    row = table + line * rows.NUM_FIELDS
    count = tl.load(row + rows.NUM_ALTERNATIVES)
    if (count > 0) & (tl.load(ids + line) >= 0):
        raw_line = tl.load(row + rows.RAW_LINE)
        is_raw = raw_line >= 0
        is_line = is_raw | (real(row + rows.TEMPERATURE) <= 0.0)
        at = tl.where(is_raw, raw_line, line) * line_stride
        keys = tl.where(is_line, lines.to(tl.int64), probs.to(tl.int64)) + 4 * at
        keys = tl.multiple_of(keys.to(tl.pointer_type(tl.int32)), 4 * line_unit)
        own = limits + line * rows.NUM_LIMITS
        end = tl.full((), 0x7F800001, dtype=tl.int32)
        least, _, num_above, _, _, wanted = reach(
            keys, keys, line_stride, tl.full((), 1, dtype=tl.int32), end, 0.0, count, own, is_line,
            candidates + line * 2 * capacity, capacity, REPORTED, block, line_unit,
        )  # fmt: skip
        out = found + line * width + 3
        num, num_ties = 0, num_above
        for start in range(0, line_stride, block):
            index = start + tl.arange(0, block)
            key = load_keys(keys, index, line_stride, own, is_line, REPORTED, line_unit)
            is_above, is_tie = (key > least).to(tl.int32), (key == least).to(tl.int32)
            in_block, ties_in_block = tl.sum(is_above, 0), tl.sum(is_tie, 0)
            if in_block + ties_in_block > 0:
                place = num + tl.cumsum(is_above, 0) - 1
                tie_place = num_ties + tl.cumsum(is_tie, 0) - 1
                place = tl.where(is_above > 0, place, tie_place)
                is_one = (is_above + is_tie > 0) & (place < wanted)
                bits = load_bits(keys, index, line_stride, line_unit)
                value = bits.to(tl.float32, bitcast=True).to(tl.float64)
                tl.store(out + place, index.to(tl.float64), mask=is_one)
                tl.store(out + most + place, value, mask=is_one)
            num += in_block
            num_ties += ties_in_block
        for place in range(wanted, count):
            tl.store(out + place, -1.0)
