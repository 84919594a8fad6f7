"""Where the rows of a tensor lie, as kernels read them."""

from __future__ import annotations

import torch


def with_rows(x: torch.Tensor, width: int) -> tuple[torch.Tensor, int, int, int, int]:
    """Return where the rows of a tensor lie: outer x inner of them, with a stride for each.

    The tensor comes first, copied if its rows lie too wildly.
    """
    if x.is_contiguous():
        return x, x.numel() // width, width, 1, 0
    *strides, last = x.stride()
    steps: list[tuple[int, int]] = []
    for size, stride in zip(x.shape, strides, strict=False):
        if steps and steps[-1][1] == size * stride:
            steps[-1] = steps[-1][0] * size, stride
        elif size != 1:
            steps.append((size, stride))
    if last != 1 or len(steps) > 2:
        return with_rows(x.contiguous(), width)
    (outer, stride), (inner, inner_stride) = (*steps, (1, 0), (1, 0))[:2]
    return x, outer, stride, inner, inner_stride


def pair_of_rows(
    a: torch.Tensor, b: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, int, int, int]:
    """Return two tensors of one shape, how many rows each has, and how far those lie apart."""
    a, rows, a_stride, a_inner, _ = with_rows(a, width)
    b, _, b_stride, b_inner, _ = with_rows(b, width)
    if a_inner > 1 or b_inner > 1:
        a, b = a.contiguous(), b.contiguous()
        rows, a_stride, b_stride = a.numel() // width, width, width
    return a, b, rows, a_stride, b_stride


def empty_as(x: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor of the same shape."""
    out = torch.empty_like(x)
    return out if out.is_contiguous() else x.new_empty(x.shape)
