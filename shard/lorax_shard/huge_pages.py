"""Memory in huge pages on a CPU, where the system has them.

What is read from end to end in every step is read faster so: with small pages part of the reading
is looking pages up, and a processor foresees what it needs no further than to a page's end.
"""

from __future__ import annotations

import mmap

import torch


def map_memory(num_bytes: int) -> torch.Tensor:
    """Return fresh memory as bytes; it goes back to the system when the last tensor in it does."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return torch.empty(num_bytes, dtype=torch.uint8)  # a kernel without huge pages
    # The tensor keeps the mapping alive.
    return torch.frombuffer(mapping, dtype=torch.uint8)
