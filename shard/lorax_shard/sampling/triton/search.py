"""Where weights, summed up from the largest key on, reach what is wanted: for one row, in Triton.

Keys are whole numbers that are not negative; -1 stands for what is left out. The interval that the
answer lies in becomes smaller with each pass over the keys. Once few are in it, these are put
together, and only they are read from then on. Sums are of whole numbers: their order does not matter.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from lorax_shard.sampling.triton.rows import is_kept, load_bits, load_limits, weight_of

# What a key is made of. BITS: of probabilities. STORED: whole numbers beside the probabilities.
# REPORTED: what is left of probabilities, or logits below the largest one; COUNTED: whole numbers.
# Tokens of the latter two are counted, not weighed.
BITS, STORED, REPORTED, COUNTED = (tl.constexpr(kind) for kind in range(4))
# Of a block.
_PARTS = tl.constexpr(2)
# Three counts in one number: of the values that a lane looks at, some in each block.
_COUNT_BITS, _ONE_COUNT = tl.constexpr(10), tl.constexpr((1 << 10) - 1)
# Half of a probability: so much less are its bits.
_OCTAVE = tl.constexpr(1 << 23)
# Intervals that are longer than this many octaves are cut where keys usually are.
_LONG = tl.constexpr(16)


@triton.jit
def load_keys(
    keys: tl.tensor,
    index: tl.tensor,
    num: tl.tensor,
    limits: tl.tensor,
    is_line: tl.tensor,  # whether REPORTED are logits
    kind: tl.constexpr,
    unit: tl.constexpr,
) -> tl.tensor:
    """Return the keys of tokens."""
    bits = load_bits(keys, index, num, unit)
    if kind == REPORTED:
        # From 0 down to minus infinity, which has the key 0.
        below = 0x7F800000 - (bits & 0x7FFFFFFF)
        least, most, tie, last = load_limits(limits)
        is_left = is_kept(bits, index, least, most, tie, last)
        is_left = tl.where(is_line, index < num, is_left)
        bits = tl.where(is_left, tl.where(is_line, below, bits), -1)
    return bits


@triton.jit
def _weights(
    keys: tl.tensor,
    probs: tl.tensor,
    index: tl.tensor,
    num: tl.tensor,
    by_weight: tl.tensor,
    kind: tl.constexpr,
    unit: tl.constexpr,
) -> tl.tensor:
    """Return what tokens weigh: by their probability, or each 1."""
    if kind == STORED:
        return weight_of(load_bits(probs, index, num, unit))
    else:
        return tl.where(by_weight, weight_of(keys), 1)


@triton.jit
def _sums(
    keys: tl.tensor,
    probs: tl.tensor,
    num: tl.tensor,
    a: tl.tensor,  # a <= b <= c
    b: tl.tensor,
    c: tl.tensor,
    limits: tl.tensor,
    by_weight: tl.tensor,
    is_line: tl.tensor,
    kind: tl.constexpr,
    block: tl.constexpr,
    unit: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Return what keys from a, b and c on weigh, and how many they are."""
    part: tl.constexpr = block // _PARTS
    from_a = tl.zeros((part,), dtype=tl.int64)
    from_b = tl.zeros((part,), dtype=tl.int64)
    from_c = tl.zeros((part,), dtype=tl.int64)
    counts = tl.zeros((part,), dtype=tl.int32)
    for start in range(0, num, block):
        # Loaded together, summed up one after the other: sums take many registers.
        for number in tl.static_range(_PARTS):
            index = start + number * part + tl.arange(0, part)
            key = load_keys(keys, index, num, limits, is_line, kind, unit)
            counts += (key >= a).to(tl.int32)
            counts += (key >= b).to(tl.int32) << _COUNT_BITS
            counts += (key >= c).to(tl.int32) << 2 * _COUNT_BITS
            if kind <= STORED:
                weight = _weights(key, probs, index, num, by_weight, kind, unit)
                from_a += tl.where(key >= a, weight, 0)
                from_b += tl.where(key >= b, weight, 0)
                from_c += tl.where(key >= c, weight, 0)
    num_a = tl.sum(counts & _ONE_COUNT, 0)
    num_b = tl.sum(counts >> _COUNT_BITS & _ONE_COUNT, 0)
    num_c = tl.sum(counts >> 2 * _COUNT_BITS, 0)
    if kind <= STORED:
        sum_a, sum_b, sum_c = tl.sum(from_a, 0), tl.sum(from_b, 0), tl.sum(from_c, 0)
    else:
        sum_a, sum_b, sum_c = num_a.to(tl.int64), num_b.to(tl.int64), num_c.to(tl.int64)
    return sum_a, sum_b, sum_c, num_a, num_b, num_c


@triton.jit
def wanted_of(share: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Return the weight that a share of all takes at least."""
    wanted = tl.ceil(share * total.to(tl.float64)).to(tl.int64)
    return tl.minimum(tl.maximum(wanted, 1), total)


@triton.jit
def reach(
    keys: tl.tensor,  # num of them
    probs: tl.tensor,
    num: tl.tensor,
    least: tl.tensor,  # keys from here
    end: tl.tensor,  # to before this count
    share: tl.tensor,  # wanted: of the weight of these keys
    most: tl.tensor,  # or so many of them, where this is above 0
    limits: tl.tensor,
    is_line: tl.tensor,
    candidates: tl.tensor,  # 2 x capacity: what stands there is nobody's
    capacity: tl.constexpr,
    kind: tl.constexpr,
    block: tl.constexpr,
    unit: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Return the largest key from which on there is what is wanted.

    Then what the keys above it weigh, how many these are, how many from it on, what all weigh, and
    what is wanted.
    """
    by_weight = most <= 0
    _, b, c = _cuts(least, end, kind)
    b, c = tl.maximum(b, least), tl.maximum(c, least)
    total, sum_b, sum_c, num_all, num_b, num_c = _sums(
        keys, probs, num, least, b, c, limits, by_weight, is_line, kind, block, unit
    )
    wanted = tl.where(by_weight, wanted_of(share, total), tl.minimum(most, total))
    # From low on there is enough, from high on there is not.
    low, num_low = least, num_all
    high, num_high, above = end, tl.zeros_like(num_all), tl.zeros_like(total)
    low, num_low, high, num_high, above = _narrowed(
        low, num_low, high, num_high, above, wanted,
        least, b, c, total, sum_b, sum_c, num_all, num_b, num_c,
    )  # fmt: skip
    while (high - low > 1) & (num_low - num_high > capacity):
        a, b, c = _cuts(low, high, kind)
        sum_a, sum_b, sum_c, num_a, num_b, num_c = _sums(
            keys, probs, num, a, b, c, limits, by_weight, is_line, kind, block, unit
        )
        low, num_low, high, num_high, above = _narrowed(
            low, num_low, high, num_high, above, wanted,
            a, b, c, sum_a, sum_b, sum_c, num_a, num_b, num_c,
        )  # fmt: skip
    if high - low > 1:
        gather(
            keys, probs, num, low, high, limits, is_line, candidates,
            capacity, kind, block, unit,
        )  # fmt: skip
        few, beyond, num_beyond = num_low - num_high, above, num_high
        few_kind: tl.constexpr = COUNTED if kind == REPORTED else kind
        while high - low > 1:
            a, b, c = _cuts(low, high, few_kind)
            sum_a, sum_b, sum_c, num_a, num_b, num_c = _sums(
                candidates, candidates + capacity, few, a, b, c, limits, by_weight, is_line,
                few_kind, block, 1,
            )  # fmt: skip
            low, num_low, high, num_high, above = _narrowed(
                low, num_low, high, num_high, above, wanted,
                a, b, c, beyond + sum_a, beyond + sum_b, beyond + sum_c,
                num_beyond + num_a, num_beyond + num_b, num_beyond + num_c,
            )  # fmt: skip
        tl.debug_barrier()
    return low, above, num_high, num_low, total, wanted


@triton.jit
def _cuts(low: tl.tensor, high: tl.tensor, kind: tl.constexpr) -> tuple[tl.tensor, ...]:
    """Return where an interval is cut, above its lower end."""
    span = high - low
    a, b = low + tl.maximum(span // 4, 1), low + tl.maximum(span // 2, 1)
    c = high - tl.maximum(span // 4, 1)
    if kind == BITS:
        is_long = span > _LONG * _OCTAVE
        a = tl.where(is_long, high - 10 * _OCTAVE, a)
        b = tl.where(is_long, high - 5 * _OCTAVE, b)
        c = tl.where(is_long, high - 2 * _OCTAVE, c)
    return a, b, c


@triton.jit
def _narrowed(
    low: tl.tensor,
    num_low: tl.tensor,
    high: tl.tensor,
    num_high: tl.tensor,
    above: tl.tensor,
    wanted: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    sum_a: tl.tensor,
    sum_b: tl.tensor,
    sum_c: tl.tensor,
    num_a: tl.tensor,
    num_b: tl.tensor,
    num_c: tl.tensor,
) -> tuple[tl.tensor, ...]:
    """Return the part of an interval that the answer lies in."""
    if sum_c < wanted:
        high, num_high, above = c, num_c, sum_c
    else:
        low, num_low = c, num_c
    if (sum_b < wanted) & (b < high):
        high, num_high, above = b, num_b, sum_b
    if (sum_b >= wanted) & (b > low):
        low, num_low = b, num_b
    if (sum_a < wanted) & (a < high):
        high, num_high, above = a, num_a, sum_a
    if (sum_a >= wanted) & (a > low):
        low, num_low = a, num_a
    return low, num_low, high, num_high, above


@triton.jit
def gather(
    keys: tl.tensor,
    probs: tl.tensor,
    num: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    limits: tl.tensor,
    is_line: tl.tensor,
    candidates: tl.tensor,
    capacity: tl.constexpr,
    kind: tl.constexpr,
    block: tl.constexpr,
    unit: tl.constexpr,
) -> None:
    """Put keys from low to before high together, and what they are probabilities of."""
    found = 0
    for start in range(0, num, block):
        index = start + tl.arange(0, block)
        key = load_keys(keys, index, num, limits, is_line, kind, unit)
        is_one = (key >= low) & (key < high)
        count = tl.sum(is_one.to(tl.int32), 0)
        if count > 0:
            place = found + tl.cumsum(is_one.to(tl.int32), 0) - 1
            tl.store(candidates + place, key, mask=is_one)
            if kind == STORED:
                bits = load_bits(probs, index, num, unit)
                tl.store(candidates + capacity + place, bits, mask=is_one)
        found += count
    tl.debug_barrier()
