"""What a block of experts computes, from its input to what it adds to the hidden states.

transformers lets others compute the experts of its mixtures: those that register a function, and
are named in the model's configuration. Ours is ``compute`` without anything added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from lorax_shard.mixture.layout import ExpertsLayout, layout_of
from lorax_shard.mixture.pairs import Pairs, can_be_native, probe, route

# What transformers' configurations call our function.
_NAME = "lorax"

# Adds to what a parameter's product gave (pairs x out), in place: the parameter's name, the
# product's input (pairs x in), the product.
AddTo = Callable[[str, torch.Tensor, torch.Tensor], None]


def install(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Have a model's experts computed by the kernel for CPUs, where it can."""
    if device.type != "cpu" or dtype is not torch.float32 or probe() is not None:
        return
    ALL_EXPERTS_FUNCTIONS.register(_NAME, _forward)
    for module in model.modules():
        layout = layout_of(module)
        if layout is not None and not layout.is_repeated:
            config: Any = module.config
            config._experts_implementation = _NAME


def _forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    layout = layout_of(module)
    assert layout is not None, "only modules with a layout are given this function"
    weights = (module.get_parameter(name) for name in (layout.up, layout.down))
    if not can_be_native(hidden_states, *weights):
        return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    return compute(module, layout, hidden_states, top_k_index, top_k_weights)


def compute(
    module: Any,
    layout: ExpertsLayout,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    adding: Callable[[Pairs], AddTo] | None = None,
) -> torch.Tensor:
    """Compute T x hidden for tokens of which each goes to k experts (T x k).

    ``adding`` is asked once, with the step's pairs, for what is added to each product.
    """
    weights = [module.get_parameter(name) for name in (layout.up, layout.down)]
    pairs = route(top_k_index, hidden_states, *weights)
    add = None if adding is None else adding(pairs)
    y = pairs.of_tokens(hidden_states, weights[0], in_first=layout.is_in_first)
    if add is not None:
        add(layout.up, hidden_states[pairs.tokens], y)
    y = _activated(module, _biased(module, layout.up, y, pairs))
    x, y = y, pairs.of_pairs(y, weights[1], in_first=layout.is_in_first)
    if add is not None:
        add(layout.down, x, y)
    y = _biased(module, layout.down, y, pairs)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    return pairs.combine(y, top_k_weights).to(hidden_states.dtype)


def _biased(module: Any, name: str, y: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    bias = getattr(module, f"{name}_bias", None)
    if bias is not None:
        y += bias[pairs.experts]
    return y


def _activated(module: Any, y: torch.Tensor) -> torch.Tensor:
    activated: torch.Tensor = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    return activated
