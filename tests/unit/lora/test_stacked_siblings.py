"""Siblings whose outputs the base computes as one tensor: expanded at once, to the same result."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.naive_delta import apply_adapter
from torch import nn

from lorax_shard.linear import install as install_linears
from lorax_shard.linear.packed import PackedLinear
from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.lora.model import LoraModel
from lorax_shard.lora.reference import ReferenceGroup, TorchLora

CPU = torch.device("cpu")
WIDTHS = {"q_proj": 16, "k_proj": 8, "v_proj": 4}


class Siblings(nn.Module):
    """Calls its projections in a given order, some of them twice."""

    def __init__(self, order: tuple[str, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.order = order
        for name, width in WIDTHS.items():
            linear = nn.Linear(8, width, bias=name == "k_proj")
            for parameter in linear.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator)
            setattr(self, name, linear)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # What comes out is used before the next is computed, as norms of heads do.
        return torch.cat([self.get_submodule(name)(x) * 2 for name in self.order], dim=-1)


class Fused(TorchLora):
    """The reference, which says that it fuses, and counts."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def make_group(self, num_members: int) -> ReferenceGroup:
        calls = self.calls

        class Group(ReferenceGroup):
            is_fused = True

            def expand_all(self, shrunk, columns, y, rows):
                calls.append("all")
                for member, start in enumerate(columns):
                    super().expand(shrunk, member, y[:, start:], rows)

            def expand(self, shrunk, member, y, rows):
                calls.append(f"member {member}")
                super().expand(shrunk, member, y, rows)

        return Group()


def adapter(*names: str, dora: str | None = None) -> HostAdapter:
    generator = torch.Generator().manual_seed(len(names))

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    modules = {
        name: ModuleDelta(
            a=draw(rank, 8),
            b=draw(WIDTHS[name], rank),
            scaling=0.5,
            magnitude=draw(WIDTHS[name]).abs() + 1 if name == dora else None,
        )
        for rank, name in enumerate(names, start=2)
    }
    return HostAdapter(digest="-".join(names), modules=modules)


def check(order: tuple[str, ...], adapters: list[HostAdapter], *, stack: bool = True) -> list[str]:
    """Compare mixed rows with edited weights; return the calls of the backend."""
    model = Siblings(order)
    install_linears(model, "onednn", CPU, stack_siblings=stack)
    assert isinstance(model.q_proj, PackedLinear)
    backend = Fused()
    lora = LoraModel(model, backend, CPU, torch.float32)
    for slot, each in enumerate(adapters):
        lora.load(slot, each)
    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(9))
    slots = [0, None, 0, 1 % len(adapters), None, 0]
    with lora.step([1] * 6, slots):
        got = model(x)[0]
    for row, slot in enumerate(slots):
        stock = Siblings(order)
        expected = stock if slot is None else apply_adapter(stock, adapters[slot])
        torch.testing.assert_close(got[row], expected(x)[0, row], rtol=1e-5, atol=1e-4)
    return backend.calls


Q, K, V = WIDTHS


def test_members_are_expanded_at_once() -> None:
    assert check((Q, K, V), [adapter(Q, K, V)]) == ["all"]


def test_a_sibling_without_adapter_may_come_first() -> None:
    assert check((Q, K, V), [adapter(K, V)]) == ["all"]


def test_adapters_of_other_members_side_by_side() -> None:
    assert check((Q, K, V), [adapter(Q, V), adapter(K)]) == ["all"]


@pytest.mark.parametrize("order", [(V, Q, K), (K, V, Q)])
def test_any_order(order: tuple[str, ...]) -> None:
    assert check(order, [adapter(Q, K, V)]) == ["all"]


def test_a_sibling_that_is_called_twice_gets_its_part_twice() -> None:
    assert check((Q, K, Q, V), [adapter(Q, K, V)]) == ["all", "member 0", "member 2"]


def test_other_changes_come_before_the_low_rank_part() -> None:
    calls = check((Q, K, V), [adapter(Q, K, V, dora=K)])
    assert calls == ["member 0", "member 1", "member 2"]


def test_siblings_that_are_apart_are_expanded_apart() -> None:
    calls = check((Q, K, V), [adapter(Q, K, V)], stack=False)
    assert calls == ["member 0", "member 1", "member 2"]
