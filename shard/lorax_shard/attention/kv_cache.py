"""The paged KV cache: per layer one pool of blocks for K and one for V."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from lorax_shard.transfer import to_device

# The format for storing K and V in a byte each: OCP's E4M3, without infinities (Micikevicius et
# al. 2022, arXiv:2209.05433). With a scale of 1, as is usual without calibration.
FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(FP8).max
# The slot of a token that is not stored.
NO_SLOT = -1


class KVShape(NamedTuple):
    """What one token keeps in one layer; V may be narrower than K."""

    num_heads: int
    key_dim: int
    value_dim: int


class PagedCache:
    """Owns K and V of every layer: [num_blocks, block_size, kv_heads, head_dim] each.

    A slot is ``block * block_size + offset``. Blocks start as zeros, so that what
    lies behind a mask is finite. ``dtype`` may be narrower than the model's (``FP8``): what is
    written is rounded then, and ``gather`` widens it again.
    """

    def __init__(
        self,
        shapes: Mapping[int, KVShape],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype

        def pool(num_heads: int, head_dim: int) -> torch.Tensor:
            size = (num_blocks, block_size, num_heads, head_dim)
            return _zeros(size, dtype, device)

        self.keys = {layer: pool(s.num_heads, s.key_dim) for layer, s in shapes.items()}
        self.values = {layer: pool(s.num_heads, s.value_dim) for layer, s in shapes.items()}

    def write(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Store the T x heads x dim K and V of a step at its T slots."""
        for pool, new in ((self.keys[layer], key), (self.values[layer], value)):
            # As bytes: few operations know the narrow types.
            _raw(pool).flatten(0, 1).index_copy_(0, slots, _raw(self._stored(new)))

    def gather(
        self, layer: int, blocks: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of n blocks in ``dtype``: n x block_size x heads x dim each."""
        keys, values = (
            _raw(pools[layer]).index_select(0, blocks).view(self.dtype).to(dtype)
            for pools in (self.keys, self.values)
        )
        return keys, values

    def as_stored(self, values: torch.Tensor) -> torch.Tensor:
        """Return values as they would come back from the cache, in their own dtype."""
        return self._stored(values).to(values.dtype)

    def _stored(self, values: torch.Tensor) -> torch.Tensor:
        if self.dtype == FP8:
            # What is beyond the largest number would become NaN.
            values = values.clamp(-_FP8_MAX, _FP8_MAX)
        return values.to(self.dtype)

    def raw_blocks(self) -> list[torch.Tensor]:
        """Return K and V of each layer as bytes, a line for each block: views of the pools."""
        return [
            pool.view(torch.uint8).view(self.num_blocks, -1)
            for pools in (self.keys, self.values)
            for pool in pools.values()
        ]

    def copy_blocks(self, source: list[int], destination: list[int]) -> None:
        """Copy blocks within the pool over all layers, as if all were read before any is written."""
        if not source:
            return
        device = next(iter(self.keys.values())).device
        read, written = (to_device(torch.tensor(each), device) for each in (source, destination))
        for pools in (self.keys, self.values):
            for pool in pools.values():
                raw = _raw(pool)
                raw.index_copy_(0, written, raw.index_select(0, read))


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of a byte each as bytes, others as they are."""
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros; on a CPU their pages are touched when they are first used.

    numpy asks the system for zeroed pages, torch writes the zeros: for a pool of many
    gigabytes that is the difference between no time and most of the start-up.
    """
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    raw = np.zeros(math.prod(size) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(size)


def block_bytes(shapes: Mapping[int, KVShape], block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one block over all layers."""
    per_token = sum(s.num_heads * (s.key_dim + s.value_dim) for s in shapes.values())
    return per_token * block_size * dtype.itemsize


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Return how many blocks hold ``num_tokens`` tokens."""
    return math.ceil(num_tokens / block_size)
