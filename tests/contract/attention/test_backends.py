"""Every attention backend that can run here, against a naive float64 oracle.

The oracle never sees the cache: it attends over each row's whole K and V.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tests.helpers.paged_sequences import DEVICE, LAYER, Sequences

from lorax_shard.attention import registry
from lorax_shard.attention.backend import AttentionBackend, AttentionSpec
from lorax_shard.attention.kv_cache import FP8, NO_SLOT


@pytest.fixture(params=registry.BACKENDS.names)
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    if reason := registry.BACKENDS.probe(request.param, DEVICE, torch.float32):
        pytest.skip(f"{request.param}: {reason}")
    if is_interpreted(request.param):
        chosen = request.node.callspec.params
        if any(chosen.get(name, cases[0]) not in cases for name, cases in INTERPRETED.items()):
            pytest.skip("triton: its interpreter is slow; test_triton.py has small cases of these")
    return registry.create(request.param, DEVICE, torch.float32)


def is_interpreted(name: str) -> bool:
    return name == "triton" and DEVICE.type == "cpu"


SCALE = 16**-0.5
SPECS = {
    "plain": AttentionSpec(SCALE),
    "scaled": AttentionSpec(0.31),
    "window": AttentionSpec(SCALE, window=5),
    "window_of_one": AttentionSpec(SCALE, window=1),
    "chunk": AttentionSpec(SCALE, chunk=6),
    "window_in_chunk": AttentionSpec(SCALE, window=4, chunk=7),
    "softcap": AttentionSpec(SCALE, softcap=2.0),
    "sinks": AttentionSpec(SCALE, sinks=torch.linspace(-2.0, 3.0, 6)),
    "everything": AttentionSpec(0.4, window=6, softcap=3.0, sinks=torch.linspace(2.0, -1.0, 6)),
}


INTERPRETED = {
    "spec": ["plain", "window_in_chunk", "everything"],
    "num_heads": [9],
    "key_dim": [24, 7, 128],
    "block_size": [3, 32],
}


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> AttentionSpec:
    found = SPECS[request.param]
    return found if found.sinks is None else found._replace(sinks=found.sinks.to(DEVICE))


def test_fresh_prompts_of_mixed_lengths(backend: AttentionBackend, spec: AttentionSpec) -> None:
    sequences = Sequences([1, 4, 5, 17, 2, 33])
    sequences.check(backend, spec, dict(enumerate(sequences.lengths)))


def test_chunks_and_decodes_in_one_step(backend: AttentionBackend, spec: AttentionSpec) -> None:
    sequences = Sequences([23, 9, 30, 16, 7])
    sequences.check(backend, spec, {0: 6, 1: 8, 2: 11})
    sequences.check(backend, spec, {1: 1, 0: 5, 2: 1, 3: 15})
    sequences.check(backend, spec, {0: 12, 2: 17, 3: 1, 4: 1})
    sequences.check(backend, spec, {2: 1, 4: 6})
    assert sequences.done == sequences.lengths


def test_every_token_as_a_decode(backend: AttentionBackend, spec: AttentionSpec) -> None:
    sequences = Sequences([14, 5, 9])
    for position in range(14):
        rows = {row: 1 for row, n in enumerate(sequences.lengths) if position < n}
        sequences.check(backend, spec, rows)


def test_decode_rows_of_very_different_lengths(
    backend: AttentionBackend, spec: AttentionSpec
) -> None:
    longest = 60 if is_interpreted(backend.name) else 260
    lengths = [min(n, longest) for n in (260, 3, 41, 2, 255, 8, 30, 129, 1, 6)]
    sequences = Sequences(lengths)
    sequences.fill(backend, {row: n - 1 for row, n in enumerate(lengths) if n > 1})
    sequences.check(backend, spec, dict.fromkeys(range(len(lengths)), 1))


@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (96, 32), (40, 64)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (4, 4), (40, 1)])
def test_prompts_of_several_tiles(
    backend: AttentionBackend, num_heads: int, num_kv_heads: int, key_dim: int, value_dim: int
) -> None:
    if is_interpreted(backend.name):
        pytest.skip("triton: its interpreter is slow")
    sequences = Sequences(
        [210, 70, 45],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        block_size=16,
    )
    for spec in (AttentionSpec(0.12), AttentionSpec(0.1, window=37, chunk=100, softcap=5.0)):
        sequences.done = [0, 0, 0]
        sequences.check(backend, spec, {0: 17, 1: 70, 2: 1})
        sequences.check(backend, spec, {0: 193, 2: 44})


def test_long_chunk_after_context(backend: AttentionBackend, spec: AttentionSpec) -> None:
    length = 120 if is_interpreted(backend.name) else 600
    sequences = Sequences([length])
    sequences.fill(backend, {0: 37})
    sequences.check(backend, spec, {0: length - 37})


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 4), (9, 3), (8, 1)])
@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(16, 16), (24, 16), (7, 5), (64, 64), (128, 128)]
)
def test_head_layouts(
    backend: AttentionBackend, num_heads: int, num_kv_heads: int, key_dim: int, value_dim: int
) -> None:
    sequences = Sequences(
        [11, 6, 3],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
    )
    for spec in (SPECS["plain"], AttentionSpec(0.3, window=3, softcap=5.0)):
        sequences.done = [0, 0, 0]
        sequences.check(backend, spec, {0: 7, 1: 5, 2: 2})
        sequences.check(backend, spec, {0: 4, 1: 1, 2: 1})


@pytest.mark.parametrize("block_size", [1, 3, 16, 32])
def test_block_sizes(backend: AttentionBackend, spec: AttentionSpec, block_size: int) -> None:
    sequences = Sequences([35, 18, 40], block_size=block_size)
    sequences.check(backend, spec, {0: 20, 1: 17, 2: 33})
    sequences.check(backend, spec, {0: 15, 1: 1, 2: 1})


def test_a_row_of_nans_harms_no_batch_mate_and_no_later_owner(backend: AttentionBackend) -> None:
    spec = SPECS["plain"]
    sequences = Sequences([10, 10])
    sick = sequences.keys[0], sequences.values[0]
    for broken in sick:
        broken[4:] = float("nan")
        broken[9] = float("inf")
    sequences.check(backend, spec, {0: 4, 1: 4})
    healthy = sequences.step(backend, spec, {0: 6, 1: 5})[1]
    assert_matches = torch.testing.assert_close
    assert_matches(healthy.double(), sequences.expected(1, slice(4, 9), spec), rtol=1e-4, atol=2e-5)

    # Row 1 starts again in the blocks that held the NaNs, shorter than before.
    sequences.tables[1] = list(sequences.tables[0])
    sequences.done[1] = 0
    sequences.check(backend, spec, {1: 5})
    sequences.check(backend, spec, {1: 1})


def test_copied_blocks_read_like_their_source(backend: AttentionBackend) -> None:
    spec = SPECS["window"]
    sequences = Sequences([12, 12])
    sequences.fill(backend, {0: 11})
    sequences.queries[1], sequences.keys[1], sequences.values[1] = (
        sequences.queries[0],
        sequences.keys[0],
        sequences.values[0],
    )
    sequences.cache.copy_blocks(sequences.tables[0], sequences.tables[1])
    sequences.done[1] = 11
    sequences.check(backend, spec, {1: 1})


@pytest.mark.parametrize("kv_dtype", [torch.float32, FP8], ids=["float32", "fp8"])
@pytest.mark.parametrize("without", [[2], [0, 1, 6], range(7)], ids=["one", "some", "all"])
def test_a_token_without_a_slot_is_written_nowhere(
    backend: AttentionBackend, without: Sequence[int], kv_dtype: torch.dtype
) -> None:
    if kv_dtype is FP8 and (reason := backend.refuses_cache(FP8, DEVICE)):
        pytest.skip(reason)
    sequences = Sequences([3, 4], kv_dtype=kv_dtype)
    metadata = sequences.metadata(backend, {0: 3, 1: 4})
    # Numbers that a byte holds.
    key, value = (torch.full((7, 2, 16), number, device=DEVICE) for number in (2.0, -0.5))
    expected = torch.zeros(2, sequences.cache.num_blocks * sequences.cache.block_size)
    for token, slot in enumerate(metadata.slots.tolist()):
        if token not in without:
            expected[:, slot] = torch.tensor([2.0, -0.5])
    metadata.slots[list(without)] = NO_SLOT
    backend.store(key, value, LAYER, metadata)
    for pools, numbers in zip(
        (sequences.cache.keys, sequences.cache.values), expected, strict=True
    ):
        stored = pools[LAYER].float().cpu().flatten(0, 1)
        assert torch.equal(stored, numbers[:, None, None].expand_as(stored))
