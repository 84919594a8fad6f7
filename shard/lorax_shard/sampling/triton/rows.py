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

_FIELDS = ROW.names or ()


def _place(field: str) -> tl.constexpr:
    return tl.constexpr(_FIELDS.index(field))


# Places of fields in a line.
NUM_FIELDS = tl.constexpr(len(_FIELDS))
SOURCE = _place("source")
RAW_LINE = _place("raw_line")
TEMPERATURE = _place("temperature")
TOP_K = _place("top_k")
TOP_P = _place("top_p")
TYPICAL_P = _place("typical_p")
MIN_P = _place("min_p")
REPETITION = _place("repetition")
FREQUENCY = _place("frequency")
PRESENCE = _place("presence")
PROMPT_IDS = _place("prompt_ids")
NUM_PROMPT = _place("num_prompt")
OUTPUT_IDS = _place("output_ids")
NUM_OUTPUT = _place("num_output")
EDIT_IDS = _place("edit_ids")
EDIT_VALUES = _place("edit_values")
NUM_EDITS = _place("num_edits")
PREFERRED = _place("preferred")
ALLOWED = _place("allowed")
NUM_ALLOWED = _place("num_allowed")
SEED = _place("seed")
POSITION = _place("position")
NUM_ALTERNATIVES = _place("num_alternatives")

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
def load_limits(own: tl.tensor) -> tuple[tl.tensor, ...]:
    """Return what is left of a row's tokens: LEAST, MOST, TIE, LAST."""
    return (
        tl.load(own + LEAST), tl.load(own + MOST), tl.load(own + TIE), tl.load(own + LAST)
    )  # fmt: skip


@triton.jit
def is_kept(
    bits: tl.tensor,
    index: tl.tensor,
    least: tl.tensor,
    most: tl.tensor,
    tie: tl.tensor,
    last: tl.tensor,
) -> tl.tensor:
    """Return which tokens are left."""
    return (bits >= least) & (bits <= most) & ((bits != tie) | (index <= last))
