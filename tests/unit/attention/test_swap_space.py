"""Blocks leave the pool for host memory and come back bit for bit."""

from __future__ import annotations

import pytest
import torch

from lorax_shard.attention import swap_space
from lorax_shard.attention.kv_cache import FP8, KVShape, PagedCache
from lorax_shard.attention.swap_space import SwapSpace

SHAPES = {0: KVShape(2, 8, 8), 1: KVShape(1, 4, 6)}


def make_cache(dtype: torch.dtype, num_blocks: int = 9) -> PagedCache:
    """Return a cache whose every byte is random."""
    cache = PagedCache(
        SHAPES, num_blocks=num_blocks, block_size=3, dtype=dtype, device=torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(0)
    for part in cache.raw_blocks():
        part.copy_(torch.randint(0, 256, part.shape, generator=generator, dtype=torch.uint8))
    return cache


def contents(cache: PagedCache, block: int) -> list[bytes]:
    """Return the bytes of a block, of K and V of each layer."""
    return [bytes(part[block].tolist()) for part in cache.raw_blocks()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
@pytest.mark.parametrize("staged", [1, 2, 100])
def test_blocks_come_back_bit_for_bit(
    dtype: torch.dtype, staged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the bytes are, infinities and NaN among them, and however many travel together."""
    cache = make_cache(dtype)
    block_bytes = sum(part.shape[1] for part in cache.raw_blocks())
    monkeypatch.setattr(swap_space, "_STAGING_BYTES", staged * block_bytes)
    space = SwapSpace(cache, 5)
    before = [contents(cache, block) for block in range(9)]
    space.copy_out([7, 0, 3], [4, 1, 2])
    for part in cache.raw_blocks():
        part[[0, 3, 7]] = 0
    space.copy_in([1, 4, 2], [5, 3, 8])
    assert [contents(cache, block) for block in (5, 3, 8)] == [before[0], before[7], before[3]]
    for untouched in (1, 2, 4, 6):
        assert contents(cache, untouched) == before[untouched]


def test_a_host_block_is_filled_anew() -> None:
    cache = make_cache(torch.float32)
    space = SwapSpace(cache, 2)
    second = contents(cache, 2)
    space.copy_out([1], [0])
    space.copy_out([2], [0])
    space.copy_in([0], [6])
    assert contents(cache, 6) == second


def test_the_way_is_measured() -> None:
    assert SwapSpace(make_cache(torch.float32), 2).measure_block_s(9) > 0
    assert SwapSpace(make_cache(torch.float32, num_blocks=1), 50).measure_block_s(1) > 0


def test_raw_blocks_are_views() -> None:
    """What is written into them is in the cache."""
    cache = make_cache(torch.float32)
    for part in cache.raw_blocks():
        part[4] = 0
    assert not cache.keys[1][4].any()
    assert not cache.values[0][4].any()
    assert cache.keys[0][3].view(torch.uint8).any()
