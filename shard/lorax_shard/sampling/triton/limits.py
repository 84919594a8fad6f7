"""What top_k, top_p and typical_p leave of a row's softmax, in Triton: one program a row."""
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
from lorax_shard.sampling.triton.search import BITS, STORED, gather, reach

# The whole number that stands for 1 in terms of an entropy.
_ENTROPY_ONE = tl.constexpr(2.0**48)
# Above the bits of each distance; what is nearer has the larger key.
_FARTHEST = tl.constexpr(0x7F800000)


@triton.jit(
    do_not_specialize=["vocab_size", "line_stride"],
    do_not_specialize_on_alignment=["table", "best", "limits", "candidates"],
)
def keep_top(
    table: tl.tensor,
    best: tl.tensor,
    probs: tl.tensor,  # L x line_stride: the bits of the softmax
    vocab_size: tl.tensor,
    line_stride: tl.tensor,
    limits: tl.tensor,  # L x 4, narrowed
    candidates: tl.tensor,  # S x 2 x capacity
    capacity: tl.constexpr,
    block: tl.constexpr,
    line_unit: tl.constexpr,
) -> None:
    """Apply top_k, then top_p to what it leaves."""
    line = tl.program_id(0).to(tl.int64)
    row = table + line * rows.NUM_FIELDS
    own = limits + line * rows.NUM_LIMITS
    top_k, top_p = tl.load(row + rows.TOP_K), real(row + rows.TOP_P)
    has_k = (top_k > 0) & (top_k < vocab_size)
    has_p = top_p < 1.0
    likeliest = tl.load(best + line)
    if is_drawn(row, likeliest) & (has_k | has_p):
        values = probs + tl.multiple_of(line * line_stride, line_unit)
        end = tl.load(values + likeliest) + 1
        least = tl.zeros_like(end)
        few = candidates + line * 2 * capacity
        # What the second search reads: the few tokens that top_k leaves, if they are few.
        keys, num = values.to(tl.int64), line_stride
        # One search for both, so that it is compiled once.
        for step in range(2):
            if tl.where(step == 0, has_k, has_p):
                source = tl.multiple_of(keys.to(tl.pointer_type(tl.int32)), 4 * line_unit)
                least, above, num_above, num_from, _, wanted = reach(
                    source, source, num, least, end, top_p, tl.where(step == 0, top_k, 0), own,
                    False, few, capacity, BITS, block, line_unit,
                )  # fmt: skip
                if (step == 0) & has_p & (num_from <= capacity - line_unit):
                    gather(
                        values, values, line_stride, least, end, own, False, few + capacity,
                        capacity, BITS, block, line_unit,
                    )  # fmt: skip
                    keys, num = (
                        (few + capacity).to(tl.int64),
                        _padded(few + capacity, num_from, line_unit),
                    )
                if step == 1:
                    # Of several tokens as likely as the last one, the lowest ids fill what is left.
                    each = weight_of(least)
                    num_ties = ((wanted - above + each - 1) // each).to(tl.int32)
                    if num_ties < num_from - num_above:
                        last = _place_of(values, line_stride, least, num_ties, block, line_unit)
                        tl.store(own + rows.TIE, least)
                        tl.store(own + rows.LAST, last)
        tl.store(own + rows.LEAST, least)


@triton.jit
def _padded(keys: tl.tensor, num: tl.tensor, unit: tl.constexpr) -> tl.tensor:
    """Fill keys up to a multiple of a unit with such as are left out; return how many they are then."""
    for place in range(num, (num + unit - 1) // unit * unit):
        tl.store(keys + place, -1)
    tl.debug_barrier()
    return (num + unit - 1) // unit * unit


@triton.jit
def _place_of(
    values: tl.tensor,
    num: tl.tensor,
    bits: tl.tensor,
    wanted: tl.tensor,
    block: tl.constexpr,
    unit: tl.constexpr,
) -> tl.tensor:
    """Return where these bits stand for so many times."""
    found, seen = 0, 0
    for start in range(0, num, block):
        index = start + tl.arange(0, block)
        is_one = (load_bits(values, index, num, unit) == bits).to(tl.int32)
        count = tl.sum(is_one, 0)
        if (seen < wanted) & (seen + count >= wanted):
            is_last = (is_one > 0) & (seen + tl.cumsum(is_one, 0) == wanted)
            found = tl.max(tl.where(is_last, index, 0), 0)
        seen += count
    return found


@triton.jit(
    do_not_specialize=["line_stride"],
    do_not_specialize_on_alignment=["table", "best", "limits", "candidates"],
)
def keep_typical(
    table: tl.tensor,
    best: tl.tensor,
    probs: tl.tensor,  # L x line_stride: the bits of the softmax
    keys: tl.tensor,  # L x line_stride int32: what stands there is nobody's
    line_stride: tl.tensor,
    limits: tl.tensor,  # L x 4, narrowed
    candidates: tl.tensor,  # S x 2 x capacity
    capacity: tl.constexpr,
    block: tl.constexpr,
    line_unit: tl.constexpr,
) -> None:
    """Apply typical_p: the tokens whose surprisal is nearest to the entropy.

    Their distances are compared as float32 first; those that are equal so, as they are.
    """
    line = tl.program_id(0).to(tl.int64)
    row = table + line * rows.NUM_FIELDS
    own = limits + line * rows.NUM_LIMITS
    share = real(row + rows.TYPICAL_P)
    if is_drawn(row, tl.load(best + line)) & (share > 0.0) & (share < 1.0):
        # Logarithms take many registers.
        half: tl.constexpr = block // 2
        at = tl.multiple_of(line * line_stride, line_unit)
        values, near = probs + at, keys + at
        whole, entropy = _entropy(values, line_stride, own, half, line_unit)
        _note_distances(values, near, line_stride, whole, entropy, own, half, line_unit)
        few = candidates + line * 2 * capacity
        zero = tl.full((), 0, dtype=tl.int32)
        key, above, num_above, num_from, _, wanted = reach(
            near, values, line_stride, zero, zero + _FARTHEST + 1, share, zero, own, False,
            few, capacity, STORED, block, line_unit,
        )  # fmt: skip
        nearest = (-key + _FARTHEST).to(tl.float32, bitcast=True)
        if num_from - num_above <= capacity:
            num_few = _gather_equal(near, values, line_stride, key, few, half, line_unit)
            least, most = _nearest_of(
                few, few, num_few, zero - 1, nearest, whole, entropy, above, wanted, half, 1
            )
        else:
            least, most = _nearest_of(
                values, near, line_stride, key, nearest, whole, entropy, above, wanted, half,
                line_unit,
            )  # fmt: skip
        least, most = _extent_above(values, near, line_stride, key, least, most, half, line_unit)
        tl.store(own + rows.LEAST, least)
        tl.store(own + rows.MOST, most)


@triton.jit
def _share(bits: tl.tensor, whole: tl.tensor) -> tl.tensor:
    """Return probabilities that sum up to 1; 1 for those that weigh nothing."""
    share = bits.to(tl.float32, bitcast=True).to(tl.float64) / whole
    return tl.where(weight_of(bits) > 0, share, 1.0)


@triton.jit
def _distance(bits: tl.tensor, whole: tl.tensor, entropy: tl.tensor) -> tl.tensor:
    return tl.abs(tl.log(_share(bits, whole)) + entropy)


@triton.jit
def _entropy(
    values: tl.tensor, num: tl.tensor, own: tl.tensor, block: tl.constexpr, unit: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return the sum of probabilities that are left, and their entropy."""
    weights = tl.zeros((block,), dtype=tl.int64)
    least, most, tie, last = load_limits(own)
    for start in range(0, num, block):
        index = start + tl.arange(0, block)
        bits = load_bits(values, index, num, unit)
        is_left = is_kept(bits, index, least, most, tie, last)
        weights += tl.where(is_left, weight_of(bits), 0)
    whole = tl.sum(weights, 0).to(tl.float64) / rows.ONE
    terms = tl.zeros((block,), dtype=tl.int64)
    for start in range(0, num, block):
        index = start + tl.arange(0, block)
        bits = load_bits(values, index, num, unit)
        is_left = is_kept(bits, index, least, most, tie, last)
        # Logarithms take long: most of a vocabulary may be out.
        if tl.max(is_left.to(tl.int32), 0) > 0:
            share = _share(tl.where(is_left, bits, 0), whole)
            terms += (share * tl.log(share) * _ENTROPY_ONE).to(tl.int64)
    return whole, -tl.sum(terms, 0).to(tl.float64) / _ENTROPY_ONE


@triton.jit
def _note_distances(
    values: tl.tensor,
    near: tl.tensor,
    num: tl.tensor,
    whole: tl.tensor,
    entropy: tl.tensor,
    own: tl.tensor,
    block: tl.constexpr,
    unit: tl.constexpr,
) -> None:
    """Write a key for each token: the larger, the nearer; -1 where it is left out."""
    least, most, tie, last = load_limits(own)
    for start in range(0, num, block):
        index = start + tl.arange(0, block)
        bits = load_bits(values, index, num, unit)
        is_left = is_kept(bits, index, least, most, tie, last) & (weight_of(bits) > 0)
        key = tl.full((block,), -1, dtype=tl.int32)
        if tl.max(is_left.to(tl.int32), 0) > 0:
            distance = _distance(tl.where(is_left, bits, 0), whole, entropy).to(tl.float32)
            key = tl.where(is_left, -distance.to(tl.int32, bitcast=True) + _FARTHEST, -1)
        tl.store(near + index, key, mask=tl.max_constancy(index < num, unit))
    tl.debug_barrier()


@triton.jit
def _gather_equal(
    near: tl.tensor,
    values: tl.tensor,
    num: tl.tensor,
    key: tl.tensor,
    few: tl.tensor,
    block: tl.constexpr,
    unit: tl.constexpr,
) -> tl.tensor:
    """Put the bits of the tokens with a key together, and return how many they are."""
    found = 0
    for start in range(0, num, block):
        index = start + tl.arange(0, block)
        is_one = (load_bits(near, index, num, unit) == key).to(tl.int32)
        count = tl.sum(is_one, 0)
        if count > 0:
            place = found + tl.cumsum(is_one, 0) - 1
            tl.store(few + place, load_bits(values, index, num, unit), mask=is_one > 0)
        found += count
    tl.debug_barrier()
    return found


@triton.jit
def _equal_ones(
    values: tl.tensor,
    near: tl.tensor,
    index: tl.tensor,
    num: tl.tensor,
    key: tl.tensor,
    unit: tl.constexpr,
) -> tl.tensor:
    """Return the bits of the tokens with a key, -1 for others; with the key -1 all have it."""
    bits = load_bits(values, index, num, unit)
    return tl.where((key < 0) | (load_bits(near, index, num, unit) == key), bits, -1)


@triton.jit
def _nearest_of(
    values: tl.tensor,
    near: tl.tensor,
    num: tl.tensor,
    key: tl.tensor,
    nearest: tl.tensor,
    whole: tl.tensor,
    entropy: tl.tensor,
    above: tl.tensor,
    wanted: tl.tensor,
    block: tl.constexpr,
    unit: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the least and the largest bits among tokens with a key, up to the distance that is kept.

    Distances round to ``nearest``. That at which weights reach what is wanted is kept; what is nearer
    than all of these weighs ``above``.
    """
    bits = nearest.to(tl.int32, bitcast=True)
    high = (bits + 1).to(tl.float32, bitcast=True).to(tl.float64).to(tl.int64, bitcast=True)
    low = tl.maximum(bits - 1, 0).to(tl.float32, bitcast=True).to(tl.float64)
    low = tl.where(bits > 0, low.to(tl.int64, bitcast=True), -1)
    while high - low > 1:
        middle = low + (high - low) // 2
        weights = tl.zeros((block,), dtype=tl.int64)
        for start in range(0, num, block):
            index = start + tl.arange(0, block)
            found = _equal_ones(values, near, index, num, key, unit)
            if tl.max(found, 0) >= 0:
                distance = _distance(tl.maximum(found, 0), whole, entropy)
                is_near = (found >= 0) & (distance.to(tl.int64, bitcast=True) <= middle)
                weights += tl.where(is_near, weight_of(found), 0)
        if above + tl.sum(weights, 0) >= wanted:
            high = middle
        else:
            low = middle
    least = tl.full((block,), rows.MOST_BITS, dtype=tl.int32)
    most = tl.zeros((block,), dtype=tl.int32)
    for start in range(0, num, block):
        index = start + tl.arange(0, block)
        found = _equal_ones(values, near, index, num, key, unit)
        distance = _distance(tl.maximum(found, 0), whole, entropy)
        is_near = (found >= 0) & (distance.to(tl.int64, bitcast=True) <= high)
        least = tl.where(is_near, tl.minimum(least, found), least)
        most = tl.where(is_near, tl.maximum(most, found), most)
    return tl.min(least, 0), tl.max(most, 0)


@triton.jit
def _extent_above(
    values: tl.tensor,
    near: tl.tensor,
    num: tl.tensor,
    key: tl.tensor,
    least: tl.tensor,
    most: tl.tensor,
    block: tl.constexpr,
    unit: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Extend bits from the least to the largest by those of the tokens with larger keys."""
    lowest = tl.full((block,), rows.MOST_BITS, dtype=tl.int32)
    highest = tl.zeros((block,), dtype=tl.int32)
    for start in range(0, num, block):
        index = start + tl.arange(0, block)
        bits = load_bits(values, index, num, unit)
        is_above = load_bits(near, index, num, unit) > key
        lowest = tl.where(is_above, tl.minimum(lowest, bits), lowest)
        highest = tl.where(is_above, tl.maximum(highest, bits), highest)
    return tl.minimum(least, tl.min(lowest, 0)), tl.maximum(most, tl.max(highest, 0))
