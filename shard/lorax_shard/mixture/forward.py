"""What a block of experts computes, from its input to what it adds to the hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lorax_shard.mixture.layout import ExpertsLayout
from lorax_shard.mixture.pairs import Pairs, route

# Adds to what a parameter's product gave (pairs x out), in place: the parameter's name, the
# product's input (pairs x in), the product.
AddTo = Callable[[str, torch.Tensor, torch.Tensor], None]


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
