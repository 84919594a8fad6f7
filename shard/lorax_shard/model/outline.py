"""What adapters see of a model, by its config alone: nothing is read of its weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lorax_shard.model.describe import describe, describe_heads
from lorax_shard.model.families import generates
from lorax_shard.model.heads import kind_of, make_heads, stock_class
from lorax_shard.peft.base import BaseDescription


def outline(hf_config: Any) -> BaseDescription:
    """Return the description of the model that ``loader`` would make of a config, on the meta device.

    It has no digests of weights, and an encoder's pooler whether the checkpoint has it or not.
    """
    has_tokens = generates(hf_config)
    kind = None if has_tokens else kind_of(hf_config)
    with torch.device("meta"):
        whole = _built(hf_config, has_tokens, kind)
    whole.tie_weights()
    model = whole if kind is None else whole.base_model
    base = describe(model)
    heads = make_heads(model, None if kind is None else whole)
    return replace(base, is_backbone=not has_tokens, heads=describe_heads(heads))


def _built(hf_config: Any, has_tokens: bool, kind: str | None) -> Any:
    if has_tokens:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)]._from_config(hf_config)
    stock = None if kind is None else stock_class(kind, hf_config)
    if stock is None:
        return transformers.AutoModel.from_config(hf_config)
    return stock._from_config(hf_config)
