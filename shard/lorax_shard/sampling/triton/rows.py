"""What all kernels that draw read of a row, and its probabilities as whole numbers.

A row's line in the table is ``lorax_shard.sampling.table.ROW``: eight bytes a field, those that say
where something lies as addresses on the device. What its warpers leave is an interval of
probabilities, by the bits of these: numbers that are not negative are ordered as their bits are.
Where not all tokens of one probability are left, the lowest ids are.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from lorax_shard.sampling.table import ROW

# Places of fields in a line.
NUM_FIELDS = tl.constexpr(len(ROW.names or ()))
SOURCE = tl.constexpr(ROW.names.index("source"))
RAW_LINE = tl.constexpr(ROW.names.index("raw_line"))
TEMPERATURE = tl.constexpr(ROW.names.index("temperature"))
TOP_K = tl.constexpr(ROW.names.index("top_k"))
TOP_P = tl.constexpr(ROW.names.index("top_p"))
TYPICAL_P = tl.constexpr(ROW.names.index("typical_p"))
MIN_P = tl.constexpr(ROW.names.index("min_p"))
REPETITION = tl.constexpr(ROW.names.index("repetition"))
FREQUENCY = tl.constexpr(ROW.names.index("frequency"))
PRESENCE = tl.constexpr(ROW.names.index("presence"))
IDS = tl.constexpr(ROW.names.index("ids"))
NUM_PROMPT = tl.constexpr(ROW.names.index("num_prompt"))
NUM_IDS = tl.constexpr(ROW.names.index("num_ids"))
EDIT_IDS = tl.constexpr(ROW.names.index("edit_ids"))
EDIT_VALUES = tl.constexpr(ROW.names.index("edit_values"))
NUM_EDITS = tl.constexpr(ROW.names.index("num_edits"))
PREFERRED = tl.constexpr(ROW.names.index("preferred"))
SEED = tl.constexpr(ROW.names.index("seed"))
POSITION = tl.constexpr(ROW.names.index("position"))
NUM_ALTERNATIVES = tl.constexpr(ROW.names.index("num_alternatives"))

# What is left of a row's tokens: probabilities from LEAST to MOST, by their bits, and of those that
# are TIE the ids up to LAST.
LEAST, MOST, TIE, LAST = (tl.constexpr(place) for place in range(4))
NUM_LIMITS = tl.constexpr(4)

# The bits of the largest finite number.
MOST_BITS = tl.constexpr(0x7F7FFFFF)
# The weight of a probability of 1.
ONE = tl.constexpr(2.0**62)


@triton.jit
def real(field: tl.tensor) -> tl.tensor:
    """Return a field that is a number with a fraction."""
    return tl.load(field).to(tl.float64, bitcast=True)


@triton.jit
def is_drawn(row: tl.tensor, best: tl.tensor) -> tl.tensor:
    """Return whether a row samples, and has numbers to sample from."""
    return (real(row + TEMPERATURE) > 0.0) & (best >= 0)


@triton.jit
def load_bits(
    values: tl.tensor,  # int32
    index: tl.tensor,
    num: tl.tensor,  # a multiple of unit
    unit: tl.constexpr,
) -> tl.tensor:  # int32, -1 from num on
    """Return bits, past the cache that does not see what other threads have written."""
    is_one = tl.max_constancy(index < num, unit)
    return tl.load(values + index, mask=is_one, other=-1, cache_modifier=".cg")


@triton.jit
def weight_of(bits: tl.tensor) -> tl.tensor:
    """Return probabilities as whole numbers, 0 for what is none."""
    probs = tl.maximum(bits, 0).to(tl.float32, bitcast=True)
    return (probs * ONE).to(tl.int64)


@triton.jit
def is_kept(bits: tl.tensor, index: tl.tensor, limits: tl.tensor) -> tl.tensor:
    """Return which tokens are left."""
    is_inside = (bits >= tl.load(limits + LEAST)) & (bits <= tl.load(limits + MOST))
    return is_inside & ((bits != tl.load(limits + TIE)) | (index <= tl.load(limits + LAST)))
