"""Memory of its own for an adapter's matrices on a CPU.

One mapping in huge pages where the system has them: an adapter is hundreds of small matrices
that are read once a step, and with small pages half of the reading is looking pages up. The
mapping goes back to the system as a whole when the last tensor in it does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorax_shard.huge_pages import map_memory

# Tensors begin at multiples of this: a cache line.
_ALIGNMENT = 64
_WORTH_A_MAPPING = 1 << 20


def stack(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return copies of E x r x in and E x r x out side by side: E x (r * in + r * out)."""
    parts, size = (a, b), a[0].numel() + b[0].numel()
    memory = map_memory(len(a) * size * dtype.itemsize).view(dtype).view(len(a), size)
    start = 0
    for part in parts:
        end = start + part[0].numel()
        memory[:, start:end].view(part.shape).copy_(part)
        start = end
    return memory


def gather(tensors: Sequence[torch.Tensor], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Return contiguous copies of CPU tensors that lie one after the other in one mapping.

    They are of ``dtype``; None: each of its own. Few bytes are not worth a mapping: then tensors
    that are as they shall be already come back themselves.
    """
    dtypes = [dtype or tensor.dtype for tensor in tensors]
    starts, end = [], 0
    for tensor, its in zip(tensors, dtypes, strict=True):
        starts.append(end)
        end += -(-tensor.numel() * its.itemsize // _ALIGNMENT) * _ALIGNMENT
    if end < _WORTH_A_MAPPING:
        return [tensor.to(its).contiguous() for tensor, its in zip(tensors, dtypes, strict=True)]
    memory = map_memory(end)
    copies = []
    for tensor, its, start in zip(tensors, dtypes, starts, strict=True):
        raw = memory[start : start + tensor.numel() * its.itemsize]
        copies.append(raw.view(its).view(tensor.shape).copy_(tensor))
    return copies
