"""Matrices of experts in 16 bits, where those hold their numbers.

Mixtures are published in 16 bits, or in fewer whose numbers 16 bits hold too (MXFP4). Read from
there, and widened in registers, they take half the memory and half the time, and not one result
changes.
"""

from __future__ import annotations

import torch
from torch import nn

from lorax_shard.mixture.layout import layout_of

_NARROW = (torch.bfloat16, torch.float16)


@torch.no_grad()
def keep_narrow(module: nn.Module, *names: str) -> None:
    """Let parameters (experts x ..., float32) be 16 bits wide if no number changes by that."""
    for name in names:
        weight = module.get_parameter(name)
        for dtype in _NARROW:
            narrow = _narrowed(weight, dtype)
            if narrow is not None:
                setattr(module, name, nn.Parameter(narrow, requires_grad=False))
                break


def _narrowed(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Return a copy in another type; None where a number is not the same there."""
    narrow = torch.empty(weight.shape, dtype=dtype)
    # Expert by expert: the first one tells, as a rule.
    for wide, copy in zip(weight, narrow, strict=True):
        if not torch.equal(copy.copy_(wide).to(wide.dtype), wide):
            return None
    return narrow


@torch.no_grad()
def round_experts(model: nn.Module, dtype: torch.dtype) -> None:
    """Give all matrices of a model's experts the numbers that they have in another type."""
    for module in model.modules():
        layout = layout_of(module)
        for name in () if layout is None else (layout.up, layout.down):
            for matrix in module.get_parameter(name):
                matrix.copy_(matrix.to(dtype))
