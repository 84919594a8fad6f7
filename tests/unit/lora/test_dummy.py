"""The adapters that a warm-up measures with: as wide as allowed, on linears of all shapes."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from lorax_shard.linear import install as install_linears
from lorax_shard.lora.dummy import dummy_adapter, loaded_dummies
from lorax_shard.lora.grouped import GroupedGroup
from lorax_shard.lora.model import LoraModel, install
from lorax_shard.lora.sites import Kind

CPU = torch.device("cpu")
RANK = 24
IDS = torch.tensor([[5, 40, 3, 81, 7, 7, 120]])


def make(family: str, linears: str) -> tuple[torch.nn.Module, LoraModel]:
    model = AutoModelForCausalLM.from_config(tiny_config(family)).eval().requires_grad_(False)
    install_linears(model, linears, CPU)
    return model, install(model, "cpu", CPU, torch.float32)


@pytest.mark.parametrize(("family", "linears"), [("llama", "auto"), ("gpt2", "torch")])
def test_a_linear_of_each_shape_computes_with_dummy_adapters(family, linears, monkeypatch):
    model, lora = make(family, linears)
    seen: list[list[int]] = []
    shrink = GroupedGroup.shrink

    def noting(group, x, rows):
        products = shrink(group, x, rows)
        seen.append([product.shape[1] for product in products.values()])
        return products

    monkeypatch.setattr(GroupedGroup, "shrink", noting)
    loaded = loaded_dummies(lora, RANK, torch.float32, CPU)
    with torch.inference_mode(), loaded, lora.step([3, 1, 1, 2], [0, 1, 0, 1]):
        # DoRA's scale is zero, and so is what A and B add.
        assert not model(IDS, use_cache=False).logits.any()
    # The layers are alike: one of them, and the head.
    linears = [name for name, site in lora.sites.items() if site.kind is Kind.LINEAR]
    num_linears = len({".".join(name.split(".")[-2:]) for name in linears})
    # Each group has products of both slots, as wide as all its members together.
    assert all(len(set(ranks)) == 1 and len(ranks) == 2 for ranks in seen)
    assert sum(ranks[0] for ranks in seen) == RANK * num_linears
    assert not lora.slots
    with torch.inference_mode():
        assert model(IDS, use_cache=False).logits.any()


def test_they_take_slots_that_are_free():
    _, lora = make("llama", "torch")
    own = dummy_adapter(lora.sites, 2, torch.float32, CPU)
    lora.load(4, own)
    with loaded_dummies(lora, RANK, torch.float32, CPU):
        assert sorted(lora.slots) == [4, 5, 6]
    assert list(lora.slots) == [4]


def test_one_piece_of_memory_serves_all_matrices():
    _, lora = make("llama", "torch")
    adapter = dummy_adapter(lora.sites, RANK, torch.float32, CPU)
    matrices = [each for group in adapter.groups.values() for each in (group.a, *group.b)]
    assert len({each.untyped_storage().data_ptr() for each in matrices}) == 1
    assert matrices[0].untyped_storage().nbytes() == max(each.nbytes for each in matrices)
    assert adapter.nbytes > 2 * matrices[0].untyped_storage().nbytes()
