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


def empty_as(x: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor of the same shape."""
    out = torch.empty_like(x)
    return out if out.is_contiguous() else x.new_empty(x.shape)
