"""KV blocks on their way to pinned host memory and back, beside steps that write over them."""

from __future__ import annotations

import pytest
import torch

from lorax_shard.attention import swap_space
from lorax_shard.attention.kv_cache import KVShape, PagedCache
from lorax_shard.attention.swap_space import SwapSpace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]

NUM_LAYERS, NUM_BLOCKS, NUM_HOST_BLOCKS = 8, 64, 48


def make_cache() -> PagedCache:
    """Return a cache of random numbers on the GPU, with blocks of 512 KiB."""
    cache = PagedCache(
        {layer: KVShape(8, 128, 128) for layer in range(NUM_LAYERS)},
        num_blocks=NUM_BLOCKS,
        block_size=16,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )
    for pools in (cache.keys, cache.values):
        for pool in pools.values():
            pool.normal_()
    return cache


def test_blocks_come_back_bit_for_bit_while_steps_write_over_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stream of the steps fills blocks anew at once after each call, without waiting."""
    monkeypatch.setattr(swap_space, "_STAGING_BYTES", 5 << 19)
    cache = make_cache()
    space = SwapSpace(cache, NUM_HOST_BLOCKS)
    out = list(range(0, NUM_BLOCKS, 2))
    host = list(reversed(range(len(out))))
    back = [block + 1 for block in out]
    # Work before: what is copied is what it leaves.
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        busy = busy @ busy / 64
    for part in cache.raw_blocks():
        part.bitwise_xor_(90)
    before = [part.clone() for part in cache.raw_blocks()]
    space.copy_out(out, host)
    for part in cache.raw_blocks():
        part[out] = 7
    space.copy_in(host, back)
    found = [part[back].clone() for part in cache.raw_blocks()]
    torch.cuda.synchronize()
    for part, expected in zip(found, before, strict=True):
        assert torch.equal(part, expected[out])


def test_host_memory_is_pinned_and_the_way_is_measured() -> None:
    space = SwapSpace(make_cache(), NUM_HOST_BLOCKS)
    assert all(slab.is_pinned() for slab in space._slabs)
    seconds = space.measure_block_s(NUM_BLOCKS)
    print(f"FIGURE a block of {space._block_bytes} bytes takes {seconds * 1e6:.0f} us one way, "
          f"{space._block_bytes / seconds / 1e9:.1f} GB/s")  # fmt: skip
    assert seconds > 0
