"""Plugs attention into encoders whose scores have terms of relative positions.

Their classes do not ask transformers' AttentionInterface, nor do they hand on what their forward
does not know. So the few of their modules that attend get another forward, from outside: it finds
the step where the model's own call left it, and without one it computes what its class computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lorax_shard.attention.backend import StepMetadata
from lorax_shard.fused.forwards import Exchange, Forward
from lorax_shard.model.attention_hook import STEP_KEYWORD, AttentionSurvey, paged_attention


class _CurrentStep:
    """Holds what a model's forward was told of a step, until it returns."""

    def __init__(self, model: Any) -> None:
        self.step: StepMetadata | AttentionSurvey | None = None
        model.register_forward_pre_hook(self._take, with_kwargs=True)
        model.register_forward_hook(self._drop, always_call=True)

    def _take(self, _module: Any, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.step = named.get(STEP_KEYWORD)
        return args, {name: value for name, value in named.items() if name != STEP_KEYWORD}

    def _drop(self, *_call: Any) -> None:
        self.step = None

    @property
    def longest(self) -> int:
        """Tokens of the step's longest row; a survey has none that count."""
        return max(self.step.query_lens) if isinstance(self.step, StepMetadata) else 1


def plug(model: Any) -> None:
    """Let a model's attention be ours if it has terms of relative positions; others stay."""
    backbone = model.base_model
    plug_family = _FAMILIES.get(backbone.config.model_type)
    if plug_family is not None:
        plug_family(backbone, _CurrentStep(backbone), Exchange())


def has_relative_positions(model_type: str) -> bool:
    """Return whether models of a family are plugged here."""
    return model_type in _FAMILIES


def _plug_mpnet(backbone: Any, current: _CurrentStep, exchange: Exchange) -> None:
    """MPNet: a bias of each head by distance, of which all layers have the same."""
    encoder = backbone.encoder
    own_bias = type(encoder).compute_position_bias

    def position_bias(encoder: Any, x: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        if current.step is None:
            return own_bias(encoder, x, *args, **named)  # type: ignore[no-any-return]
        # Layers hand on whatever it is.
        distances = torch.arange(1 - current.longest, current.longest, device=x.device)
        buckets = encoder.relative_position_bucket(distances)
        return encoder.relative_attention_bias(buckets).T  # type: ignore[no-any-return]

    names = {"compute_position_bias": position_bias}
    exchange.put(encoder, Forward(type(encoder).forward, "bias", names))
    for layer in encoder.layer:
        attention = layer.attention.attn
        exchange.put(attention, Forward(_mpnet_attention(type(attention), current), "attention"))


def _mpnet_attention(own: Any, current: _CurrentStep) -> Callable[..., Any]:
    def forward(
        attention: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        **named: Any,
    ) -> tuple[torch.Tensor, ...]:
        if current.step is None:
            return own.forward(attention, hidden_states, attention_mask, position_bias, **named)  # type: ignore[no-any-return]
        heads = (*hidden_states.shape[:-1], -1, attention.attention_head_size)
        query, key, value = (
            linear(hidden_states).view(heads).transpose(1, 2)
            for linear in (attention.q, attention.k, attention.v)
        )
        step: dict[str, Any] = {STEP_KEYWORD: current.step}
        attended, _ = paged_attention(
            attention,
            query,
            key,
            value,
            None,
            is_causal=False,
            bias_by_distance=position_bias,
            **step,
        )
        return (attention.o(attended.flatten(2)),)

    return forward


_FAMILIES: dict[str, Callable[[Any, _CurrentStep, Exchange], None]] = {"mpnet": _plug_mpnet}
