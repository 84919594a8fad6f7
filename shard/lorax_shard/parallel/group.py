"""The ranks as one: the few collectives that a step needs.

Called by the thread that computes steps only, in the same order on all ranks.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import distributed


class RankGroup(Protocol):
    """What sharded modules use of the other ranks."""

    rank: int
    world_size: int

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over all ranks; the given tensor may hold it too."""

    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Put the ranks' tensors together along the last dimension; rank i's is sizes[i] wide."""

    def broadcast(self, values: list[int]) -> list[int]:
        """Return rank 0's values; the others give as many."""


class TorchGroup:
    """Implements RankGroup over torch.distributed: gloo on CPUs, nccl on GPUs.

    Args:
        address: where rank 0 listens, ``host:port``.
        timeout_s: how long a rank waits for the others in a collective.
    """

    def __init__(
        self, rank: int, world_size: int, address: str, device: torch.device, timeout_s: float
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._device = device
        timeout = dt.timedelta(seconds=timeout_s)
        # A store of our own: groups side by side on one host differ by their port only.
        host, _, port = address.rpartition(":")
        store = distributed.TCPStore(  # type: ignore[attr-defined]
            host, int(port), world_size, is_master=rank == 0, timeout=timeout
        )
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place."""
        tensor = tensor.contiguous()
        distributed.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Put the ranks' tensors together along the last dimension."""
        widest = max(sizes)
        padded = tensor
        if tensor.shape[-1] < widest:
            padded = torch.nn.functional.pad(tensor, (0, widest - tensor.shape[-1]))
        parts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(parts, padded.contiguous())
        kept = (part[..., :size] for part, size in zip(parts, sizes, strict=True))
        return torch.cat(list(kept), dim=-1)

    def broadcast(self, values: list[int]) -> list[int]:
        """Return rank 0's values."""
        tensor = torch.tensor(values, dtype=torch.int64, device=self._device)
        distributed.broadcast(tensor, src=0)
        return tensor.tolist()

    def close(self) -> None:
        """Leave the group."""
        distributed.destroy_process_group()
