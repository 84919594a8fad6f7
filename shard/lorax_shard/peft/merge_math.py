"""What merging does to a few tensors of one shape."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch


def add(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the weighted sum."""
    return _weighted(torch.stack(list(tensors)), weights).sum(dim=0)


def disjoint_add(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], *, by_frequency: bool
) -> torch.Tensor:
    """Return, value by value, the weighted mean over the tensors that have the elected sign.

    The sign is that of the sum of the values, or by frequency of the sum of their signs;
    a tie elects plus. Weights take no part in the election.
    """
    stacked = torch.stack(list(tensors))
    signs = stacked.sign()
    votes = (signs if by_frequency else stacked).sum(dim=0)
    agrees = signs == torch.where(votes >= 0, 1.0, -1.0)
    total = (_weighted(stacked, weights) * agrees).sum(dim=0)
    return total / agrees.sum(dim=0).clamp(min=1)


def keep_largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Return the tensor with all but the largest ``density`` of its values set to zero."""
    count = int(density * tensor.numel())
    kept = torch.zeros(tensor.numel(), dtype=tensor.dtype)
    kept[torch.topk(tensor.abs().reshape(-1), k=count).indices] = 1
    return tensor * kept.reshape(tensor.shape)


def keep_random(tensor: torch.Tensor, density: float, seed: str) -> torch.Tensor:
    """Return the tensor with each value kept with probability ``density`` and rescaled for it."""
    mask = draw_mask(tuple(tensor.shape), density, seed)
    return tensor * mask.to(tensor.dtype) / density


def draw_mask(shape: tuple[int, ...], density: float, seed: str) -> torch.Tensor:
    """Return a boolean mask that depends on the arguments only.

    Drawn from the raw bits of a counter-based generator, which numpy promises never to
    change, unlike its and torch's distributions: ranks of other releases draw the same.
    """
    key = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16], "little")
    count = int(np.prod(shape, dtype=np.int64))
    bits = np.random.Philox(key=key).random_raw(count) >> np.uint64(11)
    # 53 bits, as many as a float has: the comparison is exact.
    kept = bits < np.uint64(round(density * 2**53))
    return torch.from_numpy(np.asarray(kept)).reshape(shape)


def _weighted(stacked: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    column = torch.tensor(weights, dtype=torch.float32)
    return stacked * column.reshape(-1, *[1] * (stacked.dim() - 1))
