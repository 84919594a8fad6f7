"""Memory of its own for an adapter's matrices on a CPU.

One mapping in huge pages where the system has them: an adapter is hundreds of small matrices
that are read once a step, and with small pages half of the reading is looking pages up. The
mapping goes back to the system as a whole when the last tensor in it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from lorax_shard.huge_pages import map_memory

# Tensors begin at multiples of this: a cache line.
_ALIGNMENT = 64
_WORTH_A_MAPPING = 1 << 20

# Writes a tensor into a contiguous one of its shape and type.
Copy = Callable[[torch.Tensor, torch.Tensor], None]


def side_by_side(
    num_experts: int, a: tuple[int, int], b: tuple[int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memory for E x r x in and E x r x out, each expert's two one behind the other.

    ``a`` and ``b`` are (r, in) and (r, out). ``stack`` takes the two as they are.
    """
    size_a, size_b = math.prod(a), math.prod(b)
    memory = map_memory(num_experts * (size_a + size_b) * dtype.itemsize).view(dtype)
    both = memory.view(num_experts, size_a + size_b)
    return both[:, :size_a].view(num_experts, *a), both[:, size_a:].view(num_experts, *b)


def stack(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return E x r x in and E x r x out side by side: E x (r * in + r * out).

    Copies of them, unless they lie so already.
    """
    size = a[0].numel() + b[0].numel()
    if a.dtype == dtype and _are_side_by_side(a, b):
        return a.as_strided((len(a), size), (size, 1))
    parts = side_by_side(len(a), (a.shape[1], a.shape[2]), (b.shape[1], b.shape[2]), dtype)
    for part, copy in zip((a, b), parts, strict=True):
        copy.copy_(part)
    return parts[0].as_strided((len(a), size), (size, 1))


def _are_side_by_side(a: torch.Tensor, b: torch.Tensor) -> bool:
    size = a[0].numel() + b[0].numel()
    return (
        a.dtype == b.dtype
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and b.data_ptr() == a.data_ptr() + a[0].nbytes
        and all(part.stride() == (size, part.shape[2], 1) for part in (a, b))
    )


def gather(
    tensors: Sequence[torch.Tensor], dtype: torch.dtype | None = None, copy: Copy | None = None
) -> list[torch.Tensor]:
    """Return contiguous copies of CPU tensors that lie one after the other in one mapping.

    They are of ``dtype``; None: each of its own. ``copy`` writes each. Few bytes are not worth a
    mapping: then tensors that are as they shall be already come back themselves, without ``copy``.
    """
    dtypes = [dtype or tensor.dtype for tensor in tensors]
    starts, end = [], 0
    for tensor, its in zip(tensors, dtypes, strict=True):
        starts.append(end)
        end += -(-tensor.numel() * its.itemsize // _ALIGNMENT) * _ALIGNMENT
    is_little = end < _WORTH_A_MAPPING
    if is_little and copy is None:
        return [tensor.to(its).contiguous() for tensor, its in zip(tensors, dtypes, strict=True)]
    memory = torch.empty(end, dtype=torch.uint8) if is_little else map_memory(end)
    copies = []
    for tensor, its, start in zip(tensors, dtypes, starts, strict=True):
        raw = memory[start : start + tensor.numel() * its.itemsize]
        copies.append(raw.view(its).view(tensor.shape))
        (copy or _copy)(tensor.to(its), copies[-1])
    return copies


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source)
