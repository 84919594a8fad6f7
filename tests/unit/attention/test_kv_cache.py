import torch

from lorax_shard.attention.kv_cache import FP8, KVShape, PagedCache, block_bytes, num_blocks_for

SHAPES = {0: KVShape(2, 4, 4), 3: KVShape(1, 6, 5)}


def make_cache() -> PagedCache:
    return PagedCache(
        SHAPES, num_blocks=5, block_size=3, dtype=torch.float32, device=torch.device("cpu")
    )


def test_layers_may_differ_in_shape() -> None:
    cache = make_cache()
    assert cache.keys[0].shape == cache.values[0].shape == (5, 3, 2, 4)
    assert cache.keys[3].shape == (5, 3, 1, 6)
    assert cache.values[3].shape == (5, 3, 1, 5)


def test_block_bytes_are_what_the_pool_takes() -> None:
    cache = make_cache()
    pools = [*cache.keys.values(), *cache.values.values()]
    assert 5 * block_bytes(SHAPES, 3, torch.float32) == sum(pool.nbytes for pool in pools)
    assert block_bytes(SHAPES, 3, torch.bfloat16) * 2 == block_bytes(SHAPES, 3, torch.float32)


def test_write_puts_each_token_at_its_slot() -> None:
    cache = make_cache()
    key, value = torch.randn(3, 1, 6), torch.randn(3, 1, 5)
    cache.write(3, key, value, torch.tensor([13, 0, 7]))
    assert torch.equal(cache.keys[3][4, 1], key[0])
    assert torch.equal(cache.keys[3][0, 0], key[1])
    assert torch.equal(cache.values[3][2, 1], value[2])
    assert cache.keys[3].count_nonzero() == key.numel()
    assert cache.keys[0].count_nonzero() == 0


def test_copies_read_everything_before_they_write() -> None:
    cache = make_cache()
    for layer in SHAPES:
        for block in range(5):
            cache.keys[layer][block] = block
            cache.values[layer][block] = -block
    cache.copy_blocks([1, 2, 4], [2, 1, 0])
    for layer in SHAPES:
        assert [int(block.max()) for block in cache.keys[layer]] == [4, 2, 1, 3, 4]
        assert [int(block.min()) for block in cache.values[layer]] == [-4, -2, -1, -3, -4]


def test_copying_nothing_is_allowed() -> None:
    make_cache().copy_blocks([], [])


def test_num_blocks_for_rounds_up() -> None:
    assert [num_blocks_for(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_fp8_takes_a_quarter_of_float32_and_half_of_bfloat16() -> None:
    cache = PagedCache(SHAPES, num_blocks=5, block_size=3, dtype=FP8, device=torch.device("cpu"))
    pools = [*cache.keys.values(), *cache.values.values()]
    assert 5 * block_bytes(SHAPES, 3, FP8) == sum(pool.nbytes for pool in pools)
    assert block_bytes(SHAPES, 3, FP8) * 4 == block_bytes(SHAPES, 3, torch.float32)
    assert block_bytes(SHAPES, 3, FP8) * 2 == block_bytes(SHAPES, 3, torch.bfloat16)


def test_fp8_rounds_what_is_written_and_copies_it_as_it_is() -> None:
    cache = PagedCache(SHAPES, num_blocks=5, block_size=3, dtype=FP8, device=torch.device("cpu"))
    key, value = torch.randn(1, 1, 6), torch.tensor([[[0.0, 1.0, -1e9, 447.0, float("nan")]]])
    cache.write(3, key, value, torch.tensor([4]))
    cache.copy_blocks([1], [3])
    keys, values = cache.gather(3, torch.tensor([3]), torch.float32)
    assert keys.shape == (1, 3, 1, 6)
    torch.testing.assert_close(keys[0, 1], key[0], rtol=1 / 16, atol=2**-10)
    torch.testing.assert_close(keys[0, 1], cache.as_stored(key)[0], rtol=0, atol=0)
    # Too large a number is the largest there is; NaN stays NaN.
    assert values[0, 1, 0, :4].tolist() == [0.0, 1.0, -448.0, 448.0]
    assert values[0, 1, 0, 4].isnan()
