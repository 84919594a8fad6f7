"""The kernel that stores K and V writes what torch writes, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from lorax_shard.attention.backend import AttentionBackend, StepMetadata
from lorax_shard.attention.cpp import CppAttention
from lorax_shard.attention.kv_cache import KVShape, PagedCache
from lorax_shard.attention.sdpa import SdpaAttention

CPU = torch.device("cpu")
NUM_BLOCKS, BLOCK_SIZE = 5, 4

pytestmark = pytest.mark.skipif(
    CppAttention.probe(CPU, torch.float32) is not None, reason="the kernels cannot run here"
)


def stored(
    backend: AttentionBackend, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    cache = PagedCache(
        {3: KVShape(key.shape[1], key.shape[2], value.shape[2])},
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        dtype=torch.float32,
        device=CPU,
    )
    ones = [1] * len(slots)
    tables = torch.zeros(len(slots), 1, dtype=torch.long)
    backend.store(
        key, value, 3, StepMetadata(ones, ones, slots, tables, len(slots), cache, backend)
    )
    return cache.keys[3], cache.values[3]


@pytest.mark.parametrize("tokens", [0, 1, 7, 20])
@pytest.mark.parametrize(("heads", "key_dim", "value_dim"), [(1, 1, 1), (3, 64, 64), (2, 17, 9)])
@pytest.mark.parametrize("layout", ["contiguous", "columns", "transposed", "gaps"])
def test_equals_what_torch_stores(
    layout: str, heads: int, key_dim: int, value_dim: int, tokens: int
) -> None:
    torch.manual_seed(0)

    def draw(dim: int) -> torch.Tensor:
        if layout == "columns":
            return torch.randn(tokens, 4, heads, dim)[:, 2]
        if layout == "transposed":
            return torch.randn(heads, tokens, dim).transpose(0, 1)
        if layout == "gaps":
            return torch.randn(tokens, heads, dim, 2)[..., 1]
        return torch.randn(tokens, heads, dim)

    key, value = draw(key_dim), draw(value_dim)
    strange = torch.tensor([float("nan"), float("inf"), float("-inf")])
    if tokens > 1:
        for each in (key, value):
            each[1, 0, :3] = strange[: each.shape[2]]
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE)[:tokens]
    for found, expected in zip(
        stored(CppAttention(), key, value, slots),
        stored(SdpaAttention(), key, value, slots),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("slot", [-2, NUM_BLOCKS * BLOCK_SIZE, 1 << 40])
def test_a_slot_that_does_not_exist_is_refused(slot: int) -> None:
    kv = torch.ones(2, 1, 8)
    with pytest.raises(IndexError, match=f"no slot {slot}"):
        stored(CppAttention(), kv, kv, torch.tensor([3, slot]))


@pytest.mark.parametrize(
    ("key", "slots"),
    [
        (torch.ones(2, 1, 8, dtype=torch.float64), torch.tensor([0, 1])),
        (torch.ones(2, 1, 8), torch.tensor([0])),
        (torch.ones(2, 1, 8), torch.tensor([0, 1], dtype=torch.int32)),
    ],
)
def test_what_does_not_fit_is_refused(key: torch.Tensor, slots: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        stored(CppAttention(), key, key.float(), slots)
