"""Plugs attention into encoders whose scores have terms of relative positions.

Their classes do not ask transformers' AttentionInterface, nor do they hand on what their forward
does not know. So the few of their modules that attend get another forward, from outside: it finds
the step where the model's own call left it, and without one it computes what its class computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorax_shard.fused.forwards import Exchange
from lorax_shard.model import disentangled, mpnet
from lorax_shard.model.called_step import CalledStep

_FAMILIES: dict[str, Callable[[Any, CalledStep, Exchange], None]] = {
    "deberta": disentangled.plug,
    "deberta-v2": disentangled.plug,
    "mpnet": mpnet.plug,
}


def plug(model: Any) -> None:
    """Let a model's attention be ours if it has terms of relative positions; others stay."""
    backbone = model.base_model
    plug_family = _FAMILIES.get(backbone.config.model_type)
    if plug_family is not None:
        plug_family(backbone, CalledStep(backbone), Exchange())


def has_relative_positions(model_type: str) -> bool:
    """Return whether models of a family are plugged here."""
    return model_type in _FAMILIES


def refusal(hf_config: Any) -> str | None:
    """Return in words what of such a family's config is not computed here, or None."""
    if getattr(hf_config, "talking_head", False):
        return "its heads mix their scores (talking_head)"
    return None
