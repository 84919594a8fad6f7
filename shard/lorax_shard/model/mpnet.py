"""MPNet's attention: each head has a bias by distance, of which all layers have the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lorax_shard.attention.backend import RelativeBias
from lorax_shard.fused.forwards import Exchange, Forward
from lorax_shard.model.attention_hook import STEP_KEYWORD, paged_attention
from lorax_shard.model.called_step import CalledStep


def plug(backbone: Any, current: CalledStep, exchange: Exchange) -> None:
    """Let an MPNet attend as we do within steps."""
    encoder = backbone.encoder
    own_bias = type(encoder).compute_position_bias
    # Of the longest text: one for all steps.
    longest, made = int(backbone.config.max_position_embeddings), list[RelativeBias]()

    def position_bias(encoder: Any, x: torch.Tensor, *args: Any, **named: Any) -> Any:
        # Layers hand on whatever it is.
        if current.step is None:
            return own_bias(encoder, x, *args, **named)
        if current.metadata is None:
            return None
        if not made:
            distances = torch.arange(1 - longest, longest, device=x.device)
            buckets = encoder.relative_position_bucket(distances)
            made.append(RelativeBias(encoder.relative_attention_bias(buckets).T))
        return made[0]

    names = {"compute_position_bias": position_bias}
    exchange.put(encoder, Forward(type(encoder).forward, "bias", names))
    for layer in encoder.layer:
        attention = layer.attention.attn
        exchange.put(attention, Forward(_attention(type(attention), current), "attention"))


def _attention(own: Any, current: CalledStep) -> Callable[..., Any]:
    def forward(
        attention: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: Any = None,
        **named: Any,
    ) -> tuple[torch.Tensor, ...]:
        if current.step is None:
            return own.forward(attention, hidden_states, attention_mask, position_bias, **named)  # type: ignore[no-any-return]
        heads = (*hidden_states.shape[:-1], -1, attention.attention_head_size)
        query, key, value = (
            linear(hidden_states).view(heads).transpose(1, 2)
            for linear in (attention.q, attention.k, attention.v)
        )
        step: dict[str, Any] = {"is_causal": False, STEP_KEYWORD: current.step}
        attended, _ = paged_attention(
            attention, query, key, value, None, relative_bias=position_bias, **step
        )
        return (attention.o(attended.flatten(2)),)

    return forward
