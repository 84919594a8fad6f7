"""Tiny models of families, and adapters of all that is fused in them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tests.helpers.tiny_models import tiny_config
from torch import nn

from lorax_shard.lora import model as lora
from lorax_shard.lora.delta import HostAdapter, ModuleDelta


def make_model(family: str) -> Any:
    """Return a model with random weights, norms among them."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    for parameter in model.parameters():
        # Norms begin as ones or zeros, which hide how they are applied.
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


@torch.inference_mode()
def logits_of(model: Any, num_tokens: int = 40) -> torch.Tensor:
    """Return the logits of a row."""
    ids = torch.arange(num_tokens).unsqueeze(0) % 300
    found: torch.Tensor = model(ids, use_cache=False).logits
    return found


def adapters(model: Any) -> list[HostAdapter]:
    """An adapter of linears whose outputs are fused, and one of a norm's whole weight."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    low_rank = {
        name: ModuleDelta(
            a=draw(4, module.in_features), b=draw(module.out_features, 4) / 10, scaling=1.0
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    norms = {
        name: ModuleDelta(weight=1 + draw(*module.weight.shape))
        for name, module in model.named_modules()
        if "norm" in name
    }
    return [_adapter("0", low_rank), _adapter("1", norms)]


def _adapter(digest: str, modules: dict[str, ModuleDelta]) -> HostAdapter:
    return HostAdapter(digest=digest, modules=modules)


@torch.inference_mode()
def adapted_logits(model: Any, slots: lora.LoraModel) -> torch.Tensor:
    """Return the logits of three rows, the first and the last with an adapter."""
    for slot, adapter in enumerate(adapters(model)):
        slots.load(slot, adapter)
    ids = torch.arange(40).view(1, 40) % 300
    with slots.step([10, 20, 10], [0, None, 1]):
        found: torch.Tensor = model(ids, use_cache=False).logits
    return found
