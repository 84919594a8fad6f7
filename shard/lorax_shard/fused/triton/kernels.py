"""Norms, gates and rotations in Triton: one program a row, or a head of a token.

All is computed in float32 and rounded where the specification rounds: sums of 16 bits between
them, as a model's own operations do. What varies from step to step is no constant of a kernel, so
nothing is compiled anew. ``unit`` is a number of elements that every address is a multiple of.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["inner", "outer_stride", "inner_stride"])
def rms_norm(
    x: tl.tensor,  # rows in outer x inner, with a stride for each
    inner: tl.tensor,
    outer_stride: tl.tensor,
    inner_stride: tl.tensor,
    weight: tl.tensor,  # width
    out: tl.tensor,  # rows x width
    epsilon: tl.tensor,
    offset: tl.tensor,
    width: tl.constexpr,
    block: tl.constexpr,
    rounds_first: tl.constexpr,
    unit: tl.constexpr,
) -> None:
    """Compute out = x / sqrt(mean(x^2) + epsilon) * (offset + weight)."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.multiple_of(row // inner * outer_stride + row % inner * inner_stride, unit)
    column = tl.arange(0, block)
    is_column = column < width
    values = _load(x + start + column, is_column)
    values = _normed(values, weight, epsilon, offset, x, width, block, rounds_first)
    tl.store(out + row * width + column, values.to(x.dtype.element_ty), mask=is_column)


@triton.jit(do_not_specialize=["x_stride", "delta_stride"])
def add_norms(
    x: tl.tensor,  # rows x width with a stride
    x_stride: tl.tensor,
    delta: tl.tensor,  # rows x width with a stride
    delta_stride: tl.tensor,
    total: tl.tensor,  # rows x width
    normed: tl.tensor,  # rows x width; anything without an outer norm
    inner_weight: tl.tensor,  # width; anything without an inner norm
    inner_epsilon: tl.tensor,
    inner_offset: tl.tensor,
    outer_weight: tl.tensor,
    outer_epsilon: tl.tensor,
    outer_offset: tl.tensor,
    width: tl.constexpr,
    block: tl.constexpr,
    has_inner: tl.constexpr,
    inner_rounds_first: tl.constexpr,
    has_outer: tl.constexpr,
    outer_rounds_first: tl.constexpr,
    unit: tl.constexpr,
) -> None:
    """Compute total = x + inner(delta) and normed = outer(total), rounded as apart."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    is_column = column < width
    base = _load(x + tl.multiple_of(row * x_stride, unit) + column, is_column)
    values = _load(delta + tl.multiple_of(row * delta_stride, unit) + column, is_column)
    if has_inner:
        values = _normed(
            values, inner_weight, inner_epsilon, inner_offset, x, width, block, inner_rounds_first
        )
        values = _rounded(values, x)
    values = _rounded(base + values, x)
    out = row * width + column
    tl.store(total + out, values.to(x.dtype.element_ty), mask=is_column)
    if has_outer:
        values = _normed(
            values, outer_weight, outer_epsilon, outer_offset, x, width, block, outer_rounds_first
        )
        tl.store(normed + out, values.to(x.dtype.element_ty), mask=is_column)


@triton.jit
def _normed(
    values: tl.tensor,  # block; 0 beyond the width
    weight: tl.tensor,
    epsilon: tl.tensor,
    offset: tl.tensor,
    like: tl.tensor,
    width: tl.constexpr,
    block: tl.constexpr,
    rounds_first: tl.constexpr,
) -> tl.tensor:
    column = tl.arange(0, block)
    scales = _load(weight + column, column < width)
    values = values * (1.0 / tl.sqrt(tl.sum(values * values, 0) / width + epsilon))
    if rounds_first:
        values = _rounded(values, like)
    return values * (offset + scales)


@triton.jit(do_not_specialize=["gate_stride", "up_stride"])
def gated(
    gate: tl.tensor,  # rows x width with a stride
    gate_stride: tl.tensor,
    up: tl.tensor,
    up_stride: tl.tensor,
    out: tl.tensor,  # rows x width
    width: tl.constexpr,
    block: tl.constexpr,
    is_silu: tl.constexpr,
    unit: tl.constexpr,
) -> None:
    """Compute out = activation(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    is_column = column < width
    gates = gate + tl.multiple_of(row * gate_stride, unit)
    ups = up + tl.multiple_of(row * up_stride, unit)
    x = tl.load(gates + column, mask=is_column, other=0.0).to(tl.float32)
    # GELU by tanh is x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
    inner = x if is_silu else 1.5957691216057308 * (x + 0.044715 * x * x * x)
    e = tl.exp(-tl.abs(inner))
    x = x * (tl.where(inner < 0, e, 1.0) / (1.0 + e))
    x = x.to(gate.dtype.element_ty).to(tl.float32)
    y = tl.load(ups + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (x * y).to(gate.dtype.element_ty), mask=is_column)


@triton.jit(
    do_not_specialize=[
        "num_queries", "query_head", "query_token", "query_out_head", "query_out_token",
        "key_head", "key_token", "key_out_head", "key_out_token", "cos_stride", "sin_stride",
    ]
)  # fmt: skip
def rotate(
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
    cos: tl.tensor,
    cos_stride: tl.tensor,
    sin: tl.tensor,
    sin_stride: tl.tensor,
    dim: tl.constexpr,
    width: tl.constexpr,  # how much of a head turns
    is_adjacent: tl.constexpr,
    is_by_pair: tl.constexpr,
    block: tl.constexpr,  # at least half the width
    rest_block: tl.constexpr,  # at least what does not turn
    unit: tl.constexpr,
) -> None:
    """Turn (a, b) to (a cos - b sin, b cos + a sin) for the pairs of one head of one token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
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
    if dim > width:
        column = width + tl.arange(0, rest_block)
        is_rest = column < dim
        tl.store(out + column, tl.load(x + column, mask=is_rest), mask=is_rest)


@triton.jit
def turned(
    x: tl.tensor,  # where a head begins
    cos: tl.tensor,  # and its cosines
    sin: tl.tensor,
    width: tl.constexpr,
    is_adjacent: tl.constexpr,
    is_by_pair: tl.constexpr,
    block: tl.constexpr,
) -> tl.tensor:
    """Return where both of each pair lie, whether there is such a pair, and both turned."""
    pair = tl.arange(0, block)
    is_pair = pair < width // 2
    first = pair * 2 if is_adjacent else pair
    second = first + 1 if is_adjacent else pair + width // 2
    first_angle = pair if is_by_pair else first
    second_angle = pair if is_by_pair else second
    a, b = _load(x + first, is_pair), _load(x + second, is_pair)
    turned_a = _rounded(a * _load(cos + first_angle, is_pair), x) - _rounded(
        b * _load(sin + first_angle, is_pair), x
    )
    turned_b = _rounded(b * _load(cos + second_angle, is_pair), x) + _rounded(
        a * _load(sin + second_angle, is_pair), x
    )
    return first, second, is_pair, turned_a.to(x.dtype.element_ty), turned_b.to(x.dtype.element_ty)


@triton.jit
def _load(pointers: tl.tensor, mask: tl.tensor) -> tl.tensor:
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _rounded(values: tl.tensor, like: tl.tensor) -> tl.tensor:
    return values.to(like.dtype.element_ty).to(tl.float32)
