"""Memory of its own for an adapter's matrices on a CPU.

One mapping in huge pages where the system has them: an adapter is hundreds of small matrices
that are read once a step, and with small pages half of the reading is looking pages up. The
mapping goes back to the system as a whole when the last tensor in it does.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch

# Tensors begin at multiples of this: a cache line.
_ALIGNMENT = 64
_WORTH_A_MAPPING = 1 << 20


def gather(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return contiguous copies of CPU tensors that lie one after the other in one mapping.

    Few bytes are not worth one: then tensors that are of the dtype already come back themselves.
    """
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    if end < _WORTH_A_MAPPING:
        return [tensor.to(dtype).contiguous() for tensor in tensors]
    memory = _map(end)
    copies = []
    for tensor, start in zip(tensors, starts, strict=True):
        raw = memory[start : start + tensor.numel() * dtype.itemsize]
        copies.append(raw.view(dtype).view(tensor.shape).copy_(tensor))
    return copies


def _map(size: int) -> torch.Tensor:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return torch.empty(size, dtype=torch.uint8)  # a kernel without huge pages
    # The tensor keeps the mapping alive.
    return torch.frombuffer(mapping, dtype=torch.uint8)
