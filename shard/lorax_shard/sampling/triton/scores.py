"""What a row's softmax is taken of, in Triton: one program a line."""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from lorax_shard.sampling.triton import rows
from lorax_shard.sampling.triton.rows import real

# Whether a token has come so far, beside how often it has come in the output.
_SEEN, _COUNTED = tl.constexpr(1 << 30), tl.constexpr((1 << 30) - 1)
# The least normal float32: temperatures below give the same result.
_LEAST_TEMPERATURE = tl.constexpr(2.0**-126)
# Instead of an id: all tokens are masked, or there are no numbers.
_MASKED, _NO_NUMBERS = tl.constexpr(-2), tl.constexpr(-1)


@triton.jit(
    do_not_specialize=["stride", "vocab_size", "line_stride"],
    do_not_specialize_on_alignment=["logits", "table", "best", "limits"],
)
def prepare(
    logits: tl.tensor,  # S x vocab_size with a stride, float32
    stride: tl.tensor,
    table: tl.tensor,  # a line for each softmax
    vocab_size: tl.tensor,
    lines: tl.tensor,  # L x line_stride float32, written
    line_stride: tl.tensor,
    counts: tl.tensor,  # L x line_stride int32: what stands there is nobody's
    delta: tl.tensor,  # of the watermark
    best: tl.tensor,  # L int64, written: the likeliest token, or why there is none
    limits: tl.tensor,  # L x 4 int32, written: all tokens
    block: tl.constexpr,
    unit: tl.constexpr,  # what addresses of rows of logits are multiples of
    line_unit: tl.constexpr,  # what line_stride is a multiple of
) -> None:
    """Compute lines = (scores - their maximum) / temperature; nothing beyond the vocabulary."""
    line = tl.program_id(0).to(tl.int64)
    row = table + line * rows.NUM_FIELDS
    source = logits.to(tl.int64) + tl.load(row + rows.SOURCE) * stride * 4
    source = tl.multiple_of(source.to(tl.pointer_type(tl.float32)), 4 * unit)
    out = lines + tl.multiple_of(line * line_stride, line_unit)
    count = counts + tl.multiple_of(line * line_stride, line_unit)
    has_penalty = tl.load(row + rows.PROMPT_IDS) != 0
    is_adjusted = (tl.load(row + rows.PREFERRED) != 0) | (tl.load(row + rows.NUM_EDITS) > 0)
    is_adjusted |= has_penalty | (tl.load(row + rows.ALLOWED) != 0)
    if is_adjusted:
        if has_penalty:
            _note_ids(row, count, vocab_size, block, line_unit)
        _adjust(row, source, out, count, delta, vocab_size, block // 2, unit, line_unit)
    scores = tl.where(is_adjusted, out.to(tl.int64), source.to(tl.int64))
    scores = tl.multiple_of(scores.to(tl.pointer_type(tl.float32)), 4 * unit)
    # Equal ones: the first.
    lane = tl.arange(0, block)
    most = tl.full((block,), float("-inf"), dtype=tl.float32)
    first = tl.zeros((block,), dtype=tl.int32)
    is_no_number = tl.zeros((block,), dtype=tl.int32)
    for start in range(0, vocab_size, block):
        score = _load(scores, start + lane, vocab_size, unit)
        is_no_number |= (score != score).to(tl.int32)
        is_more = score > most
        first = tl.where(is_more, start + lane, first)
        most = tl.where(is_more, score, most)
    top = tl.max(most, 0)
    found = tl.min(tl.where(most == top, first, 0x7FFFFFFF), 0).to(tl.int64)
    found = tl.where(top == float("-inf"), _MASKED, found)
    is_bad = (tl.max(is_no_number, 0) > 0) | (top == float("inf"))
    found = tl.where(is_bad, _NO_NUMBERS, found)
    tl.store(best + line, found)
    # Of rows without a token nobody reads what comes of it.
    top = tl.where(found >= 0, top, 0.0)
    own = limits + line * rows.NUM_LIMITS
    tl.store(own + rows.LEAST, 0)
    tl.store(own + rows.MOST, rows.MOST_BITS)
    tl.store(own + rows.TIE, -1)
    tl.store(own + rows.LAST, 0)
    temperature = real(row + rows.TEMPERATURE)
    is_scaled = (temperature > 0.0) & (temperature != 1.0)
    scale = tl.maximum(temperature, _LEAST_TEMPERATURE).to(tl.float32)
    for start in range(0, line_stride, block):
        column = start + lane
        score = _load(scores, column, vocab_size, unit) - top
        if is_scaled:
            score = tl.div_rn(score, tl.zeros_like(score) + scale)
        score = tl.where(column < vocab_size, score, float("-inf"))
        tl.store(out + column, score, mask=tl.max_constancy(column < line_stride, line_unit))


@triton.jit
def _load(
    values: tl.tensor, column: tl.tensor, vocab_size: tl.tensor, unit: tl.constexpr
) -> tl.tensor:
    """Return a row's values, minus infinity beyond the vocabulary.

    As many as fill a unit are read: rows begin at multiples of it.
    """
    end = (vocab_size + unit - 1) // unit * unit
    is_one = tl.max_constancy(column < end, unit)
    values = tl.load(values + column, mask=is_one, other=0.0)
    return tl.where(column < vocab_size, values, float("-inf"))


@triton.jit
def _note_ids(
    row: tl.tensor,
    count: tl.tensor,
    vocab_size: tl.tensor,
    block: tl.constexpr,
    line_unit: tl.constexpr,
) -> None:
    """Count a row's tokens so far; ids that the head cannot produce are none."""
    lane = tl.arange(0, block)
    end = (vocab_size + line_unit - 1) // line_unit * line_unit
    for start in range(0, vocab_size, block):
        is_one = tl.max_constancy(start + lane < end, line_unit)
        tl.store(count + start + lane, tl.zeros((block,), dtype=tl.int32), mask=is_one)
    tl.debug_barrier()
    prompt_ids = tl.load(row + rows.PROMPT_IDS).to(tl.pointer_type(tl.int32))
    num_prompt = tl.load(row + rows.NUM_PROMPT).to(tl.int32)
    for start in range(0, num_prompt, block):
        token = tl.load(prompt_ids + start + lane, mask=start + lane < num_prompt, other=-1)
        is_known = (token >= 0) & (token < vocab_size)
        tl.atomic_or(count + token, _SEEN, mask=is_known, sem="relaxed")
    output_ids = tl.load(row + rows.OUTPUT_IDS).to(tl.pointer_type(tl.int32))
    num_output = tl.load(row + rows.NUM_OUTPUT).to(tl.int32)
    for start in range(0, num_output, block):
        token = tl.load(output_ids + start + lane, mask=start + lane < num_output, other=-1)
        is_known = (token >= 0) & (token < vocab_size)
        tl.atomic_add(count + token, 1, mask=is_known, sem="relaxed")


@triton.jit
def _adjust(
    row: tl.tensor,
    source: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    delta: tl.tensor,
    vocab_size: tl.tensor,
    block: tl.constexpr,
    unit: tl.constexpr,
    line_unit: tl.constexpr,
) -> None:
    """Write logits that are allowed, with what the request adds, the watermark and the penalties."""
    lane = tl.arange(0, block)
    end = (vocab_size + line_unit - 1) // line_unit * line_unit
    allowed = tl.load(row + rows.ALLOWED)
    words, num_words = allowed.to(tl.pointer_type(tl.int32)), tl.load(row + rows.NUM_ALLOWED)
    for start in range(0, vocab_size, block):
        score = _load(source, start + lane, vocab_size, unit)
        if allowed != 0:
            word = (start + lane) // 32
            bits = tl.load(words + word, mask=word < num_words, other=0) >> (start + lane) % 32
            score = tl.where((bits & 1) != 0, score, float("-inf"))
        is_one = tl.max_constancy(start + lane < end, line_unit)
        tl.store(out + start + lane, score, mask=is_one)
    tl.debug_barrier()
    num_edits = tl.load(row + rows.NUM_EDITS).to(tl.int32)
    edit_ids = tl.load(row + rows.EDIT_IDS).to(tl.pointer_type(tl.int32))
    edit_values = tl.load(row + rows.EDIT_VALUES).to(tl.pointer_type(tl.float32))
    for start in range(0, num_edits, block):
        is_one = start + lane < num_edits
        token = tl.load(edit_ids + start + lane, mask=is_one, other=-1)
        value = tl.load(edit_values + start + lane, mask=is_one, other=0.0)
        # No id occurs twice.
        is_known = (token >= 0) & (token < vocab_size)
        score = tl.load(out + token, mask=is_known, other=0.0, cache_modifier=".cg")
        tl.store(out + token, score + value, mask=is_known)
    tl.debug_barrier()
    has_penalty = tl.load(row + rows.PROMPT_IDS) != 0
    preferred = tl.load(row + rows.PREFERRED)
    bits = preferred.to(tl.pointer_type(tl.uint8))
    penalty = real(row + rows.REPETITION).to(tl.float32)
    frequency, presence = real(row + rows.FREQUENCY), real(row + rows.PRESENCE)
    for start in range(0, vocab_size, block):
        column = start + lane
        is_one = tl.max_constancy(column < end, line_unit)
        score = tl.load(out + column, mask=is_one, other=0.0, cache_modifier=".cg")
        if preferred != 0:
            octet = tl.load(bits + column // 8, mask=column < vocab_size, other=0).to(tl.int32)
            score += (octet >> (7 - column % 8) & 1).to(tl.float32) * delta
        if has_penalty:
            seen = tl.load(count + column, mask=is_one, other=0, cache_modifier=".cg")
            repeated = tl.where(
                score < 0.0, score * penalty, tl.div_rn(score, tl.zeros_like(score) + penalty)
            )
            score = tl.where(seen != 0, repeated, score)
            num = seen & _COUNTED
            amount = (num.to(tl.float64) * frequency + presence).to(tl.float32)
            score = tl.where(num > 0, score - amount, score)
        tl.store(out + column, score, mask=is_one)
    tl.debug_barrier()
