"""What a block of experts computes, from its input to what it adds to the hidden states."""

from __future__ import annotations

from typing import Any

import torch

from lorax_shard.mixture.layout import ExpertsLayout
from lorax_shard.mixture.pairs import Additions, Pairs, route


def compute(
    module: Any,
    layout: ExpertsLayout,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    additions: Additions | None = None,
) -> torch.Tensor:
    """Compute T x hidden for tokens of which each goes to k experts (T x k).

    ``additions`` are made to the products of parameters.
    """
    weights = [module.get_parameter(name) for name in (layout.up, layout.down)]
    pairs = route(top_k_index, hidden_states, *weights, add=additions)
    add = {} if additions is None else additions.of(pairs)
    in_first = layout.is_in_first
    y = pairs.multiply(
        hidden_states, pairs.tokens, weights[0], add.get(layout.up), in_first=in_first
    )
    y = _activated(module, _biased(module, layout.up, y, pairs))
    y = pairs.multiply(y, None, weights[1], add.get(layout.down), in_first=in_first)
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
