"""Puts fused elementwise work into a model that computes with paged attention."""

from __future__ import annotations

import logging
from typing import Any

import torch

from lorax_shard import fused
from lorax_shard.model.probe import survey_attention

logger = logging.getLogger(__name__)


def install(
    model: Any, backend: str, device: torch.device, dtype: torch.dtype, *, is_encoder: bool = False
) -> fused.FusedModules:
    """Let a model's modules compute by a backend's kernels; see ``fused.install``.

    Queries and keys are turned when K and V are stored, in one launch, where the model's
    attentions hand on what they turned, and nothing else.
    """
    exchanged = fused.install(model, backend, device, dtype, is_encoder=is_encoder)
    rotations = exchanged.rotations
    # An encoder keeps nothing.
    if not is_encoder and rotations.store is not None:
        rotations.are_deferred = True
        try:
            survey_attention(model)
        except fused.LostRotationError as error:
            rotations.are_deferred = False
            logger.info("queries and keys are turned before they are stored: %s", error)
    return exchanged
