"""Adapters' matrices in one mapping."""

from __future__ import annotations

import gc
import weakref

import psutil
import torch

from lorax_shard.lora.arena import gather, side_by_side, stack

SHAPES = ((7, 33), (1, 1), (300, 2000), (48, 48))


def make(dtype: torch.dtype, count: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(dtype) for s in SHAPES for _ in range(count)]


def test_copies_are_equal_and_aligned() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = make(dtype)
        copies = gather(tensors, tensors[0].dtype)
        for tensor, copy in zip(tensors, copies, strict=True):
            assert torch.equal(tensor, copy)
            assert copy.is_contiguous()
            assert copy.data_ptr() % 64 == 0
        assert copies[0].untyped_storage().data_ptr() == copies[3].untyped_storage().data_ptr()


def test_few_bytes_stay_where_they_are() -> None:
    tensors = make(torch.float32)[:2]
    assert all(
        copy is tensor
        for copy, tensor in zip(gather(tensors, tensors[0].dtype), tensors, strict=True)
    )


def test_one_tensor_keeps_the_mapping_and_the_last_gives_it_back() -> None:
    copies = gather(make(torch.float32, 20), torch.float32)
    last = copies[-1]
    expected = last.clone()
    resident = psutil.Process().memory_info().rss
    watched = weakref.ref(copies[0])
    del copies
    gc.collect()
    assert watched() is None
    assert torch.equal(last, expected)
    del last
    gc.collect()
    # 48 MB were mapped.
    assert psutil.Process().memory_info().rss < resident - (40 << 20)


def test_nothing_to_gather() -> None:
    assert gather([], torch.float32) == []


def test_factors_of_experts_lie_side_by_side() -> None:
    a, b = torch.randn(3, 2, 5), torch.randn(3, 7, 2)
    both = stack(a, b.mT, torch.bfloat16)
    assert both.shape == (3, 2 * 5 + 2 * 7)
    for expert, row in enumerate(both):
        assert torch.equal(row[:10].view(2, 5), a[expert].bfloat16())
        assert torch.equal(row[10:].view(2, 7), b[expert].T.bfloat16())


def test_what_lies_side_by_side_is_taken_as_it_is() -> None:
    a, b = side_by_side(3, (2, 5), (2, 7), torch.float32)
    a.copy_(torch.randn(3, 2, 5))
    b.copy_(torch.randn(3, 2, 7))
    both = stack(a, b, torch.float32)
    assert both.data_ptr() == a.data_ptr()
    assert torch.equal(both, stack(a.clone(), b.clone(), torch.float32))
    # But not in another type, nor a part of it.
    assert torch.equal(stack(a, b, torch.float16), both.half())
    part = stack(a, b[:, :, :6], torch.float32)
    assert part.shape == (3, 2 * 5 + 2 * 6)
    assert torch.equal(part[:, :10].view(3, 2, 5), a)
