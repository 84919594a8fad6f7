"""Applies an adapter to a stock model by editing weights: ModuleDelta's formulas, read aloud.

Slow, exact and independent of the kernels: what both readers and kernels are tested against.
"""

from __future__ import annotations

import torch
from torch import nn

from lorax_shard.lora.delta import HostAdapter, ModuleDelta


@torch.no_grad()
def apply_adapter(model: nn.Module, adapter: HostAdapter) -> nn.Module:
    """Change ``model`` in place into base plus adapter; returns it."""
    for name, delta in adapter.modules.items():
        module = model.get_submodule(name)
        # Only this module's weight changes: what was tied to it keeps the base's.
        module.weight = nn.Parameter(_weight(module, delta))
        if delta.bias is not None:
            module.bias = nn.Parameter(delta.bias.to(module.bias.dtype))
        if delta.b_bias is not None:
            added = delta.scaling * delta.b_bias.to(module.weight.dtype)
            module.bias = nn.Parameter(added if module.bias is None else module.bias + added)
    return model


def _weight(module: nn.Module, delta: ModuleDelta) -> torch.Tensor:
    base = module.weight.detach().clone()
    weight = base if delta.weight is None else delta.weight.to(base.dtype, copy=True)
    if delta.token_ids is not None and delta.token_rows is not None:
        weight[delta.token_ids] = delta.token_rows.to(weight.dtype)
    if delta.a is None or delta.b is None:
        return weight
    if isinstance(module, nn.Embedding):
        return _low_rank(weight.T, delta).T.contiguous()
    if type(module).__name__ == "Conv1D":
        return _low_rank(weight.T, delta).T.contiguous()
    return _low_rank(weight, delta)


def _low_rank(weight: torch.Tensor, delta: ModuleDelta) -> torch.Tensor:  # out x in
    assert delta.a is not None
    assert delta.b is not None
    changed = weight.double() + delta.scaling * (delta.b.double() @ delta.a.double())
    if delta.magnitude is not None:
        changed *= (delta.magnitude.double() / changed.norm(dim=1)).unsqueeze(1)
    return changed.to(weight.dtype)
