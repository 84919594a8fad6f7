"""Puts our kernel for experts into a model.

transformers lets others compute the experts of its mixtures: those that register a function, and
are named in the model's configuration.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lorax_shard.mixture.forward import compute
from lorax_shard.mixture.layout import ExpertsLayout, layout_of
from lorax_shard.mixture.narrow import keep_narrow
from lorax_shard.mixture.pairs import probe

# What configurations call our function.
_NAME = "lorax"
# Of the modules that it has computed: to look them up takes a while.
_layouts: WeakKeyDictionary[nn.Module, ExpertsLayout] = WeakKeyDictionary()


def install(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Have a model's experts computed by the kernel for CPUs, where it can.

    Their matrices are kept in 16 bits where those hold their numbers.
    """
    if device.type != "cpu" or dtype is not torch.float32 or probe() is not None:
        return
    ALL_EXPERTS_FUNCTIONS.register(_NAME, _forward)
    for module in model.modules():
        layout = layout_of(module)
        if layout is not None and not layout.is_repeated:
            config: Any = module.config
            config._experts_implementation = _NAME
            keep_narrow(module, layout.up, layout.down)


def _forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    layout = _layouts.get(module)
    if layout is None:
        layout = layout_of(module)
        assert layout is not None, "only modules with a layout are given this function"
        _layouts[module] = layout
    return compute(module, layout, hidden_states, top_k_index, top_k_weights)
