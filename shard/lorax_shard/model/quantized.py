"""Quantizes the linears of a loaded model, as ``--quantize`` asks."""

from __future__ import annotations

from typing import Any

import torch

from lorax_contract.config import ShardConfig
from lorax_shard import linear
from lorax_shard.linear.quantized.formats import QuantizedWeight, to_int8
from lorax_shard.linear.quantized.install import install_quantized, quantize
from lorax_shard.model.hf_model import HFPagedModel

_MAKERS = {"int8": to_int8}


def quantize_model(model: Any, config: ShardConfig) -> dict[str, QuantizedWeight]:
    """Return the quantized weights; their numbers take the place of the model's own.

    So the load-time probe, and whoever reads weights later, sees the model that is served.
    """
    if config.quantize == "none":
        return {}
    return quantize(model, _MAKERS[config.quantize])


def install_linears(
    paged: HFPagedModel, model: Any, config: ShardConfig, quantized: dict[str, QuantizedWeight]
) -> None:
    """Give the model's linears what they compute with, and count the bytes."""
    if quantized:
        paged.weight_bytes += install_quantized(model, quantized)
        quantized.clear()
    chosen = linear.install(model, config.linear_backend, torch.device(config.device))
    paged.weight_bytes += chosen.copied_bytes
    paged.linear_backend = chosen.backend if config.quantize == "none" else config.quantize
