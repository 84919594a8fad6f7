"""However factors of experts lie in a file, they come to lie as steps read them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from lorax_shard.lora.arena import stack
from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.peft.digest import digest_adapter, order_of
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.normal import read_normal, write_normal
from lorax_shard.peft.stored_parts import turn_over

EXPERTS, RANK, WIDTH_IN, WIDTH_OUT = 3, 2, 5, 4
ORDERS = list(itertools.permutations(range(3)))
Order = tuple[int, ...]


def laid(tensor: torch.Tensor, order: Order) -> torch.Tensor:
    """Return equal values whose dimensions lie in another order."""
    inverse = [order.index(dim) for dim in range(tensor.dim())]
    return tensor.permute(order).contiguous().permute(inverse)


def adapter(order_a: Order, order_b: Order, dtype: torch.dtype = torch.float32) -> HostAdapter:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(EXPERTS, RANK, WIDTH_IN, generator=generator).to(dtype)
    b = torch.randn(EXPERTS, WIDTH_OUT, RANK, generator=generator).to(dtype)
    modules = {
        "z": ModuleDelta(bias=torch.randn(3, generator=generator)),
        "experts": ModuleDelta(a=laid(a, order_a), b=laid(b, order_b), scaling=0.5),
    }
    return digest_adapter(HostAdapter(digest="", modules=modules))


@pytest.mark.parametrize("order_a", ORDERS)
@pytest.mark.parametrize("order_b", ORDERS)
def test_factors_in_any_order(order_a: Order, order_b: Order, tmp_path: Path) -> None:
    made = adapter(order_a, order_b)
    write_normal(made, tmp_path)
    again = read_normal(tmp_path)
    assert list(again.modules) == list(made.modules)
    assert again.digest == made.digest
    experts, read = made.modules["experts"], again.modules["experts"]
    assert experts.a is not None
    assert experts.b is not None
    assert read.a is not None
    assert read.b is not None
    assert torch.equal(read.a, experts.a)
    assert torch.equal(read.b, experts.b)
    assert stack(read.a, read.b.mT, torch.float32).data_ptr() == read.a.data_ptr()


@pytest.mark.parametrize("types", [(torch.float32, torch.float16), (torch.bfloat16,) * 2])
def test_factors_of_two_types_stay_apart(
    types: tuple[torch.dtype, torch.dtype], tmp_path: Path
) -> None:
    made = adapter((0, 1, 2), (1, 2, 0))
    experts = made.modules["experts"]
    assert experts.a is not None
    assert experts.b is not None
    turned = laid(experts.b.to(types[1]), (1, 2, 0))
    delta = ModuleDelta(a=experts.a.to(types[0]), b=turned)
    # Shared by two modules: read once where it is no factor that lies beside another.
    modules = {"experts": delta, "others": delta}
    made = digest_adapter(HostAdapter(digest="", modules=modules))
    write_normal(made, tmp_path)
    read = read_normal(tmp_path).modules
    for each in read.values():
        assert each.a is not None
        assert each.b is not None
        assert (each.a.dtype, each.b.dtype) == types
        assert torch.equal(each.a, delta.a)
        assert torch.equal(each.b, turned)
    assert (read["experts"].b is read["others"].b) == (types[0] != types[1])


def test_a_value_that_changed_is_found_out_in_any_order(tmp_path: Path) -> None:
    write_normal(adapter((0, 1, 2), (1, 2, 0)), tmp_path)
    file = tmp_path / "adapter.safetensors"
    whole = file.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    for place in range(head, len(whole), 4):
        changed = bytearray(whole)
        changed[place] ^= 1
        file.write_bytes(changed)
        with pytest.raises(AdapterRefusedError, match="not what was verified"):
            read_normal(tmp_path)


def test_orders_are_of_factors_of_experts_alone() -> None:
    whole = torch.randn(4, 2, 3)
    assert order_of(whole) is None
    assert order_of(whole.permute(2, 0, 1)) == (1, 2, 0)
    assert order_of(whole[:, :, :2].permute(2, 0, 1)) is None
    assert order_of(whole[:1].expand(5, 2, 3)) is None
    assert order_of(whole[0].T) is None


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (300, 130), (5, 40_000), (40_000, 5)])
def test_turned_over(shape: tuple[int, int]) -> None:
    last = torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape)
    first = torch.empty(shape[::-1])
    turn_over(last, first)
    assert torch.equal(first, last.T)
