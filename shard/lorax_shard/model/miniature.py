"""Builds a small copy of a model: same class, few layers, random weights, near thresholds."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import torch

from lorax_shard.model import attention_hook, relative_positions
from lorax_shard.model.limits import attention_thresholds

logger = logging.getLogger(__name__)

_VOCAB = 256
_THRESHOLD = 8
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "intermediate_size_mlp", "ffn_dim")
_NARROW, _HIDDEN, _MAX_KV_HEADS = 64, 128, 2


def build(
    model: Any, device: torch.device, dtype: torch.dtype = torch.float32, *, num_ranks: int = 1
) -> Any:
    """Return a random miniature of ``model`` on a device, attention plugged.

    The narrowest copy that the class can compute is taken; widths are kept where
    the class does not allow others. ``num_ranks``: over how many ranks it shall spread as the
    model does.
    """
    config = _reduced(model.config)
    try:
        return _built(_narrowed(config, num_ranks), type(model), device, dtype)
    except Exception as error:  # noqa: BLE001 - what a class raises for widths it cannot take is not known
        logger.debug("the narrow miniature does not run (%s); taking full widths", error)
        return _built(config, type(model), device, dtype)


def _built(config: Any, model_class: Any, device: torch.device, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = model_class._from_config(config, attn_implementation="eager", dtype=dtype)
    small = small.to(device).eval().requires_grad_(False)
    _widen(small)
    with torch.inference_mode():
        small(torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    if small._can_set_attn_implementation():
        small.set_attn_implementation(attention_hook.ATTENTION_NAME)
    relative_positions.plug(small)
    return small


def _reduced(config: Any) -> Any:
    """Return a copy with one layer of each kind (two at least) and every threshold near."""
    reduced = copy.deepcopy(config)
    text = reduced.get_text_config()
    layers = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or [None] * layers
    picked = sorted({kinds.index(kind) for kind in kinds} | {0, min(1, layers - 1)})
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, [value[index] for index in picked])
    text.num_hidden_layers = len(picked)
    text.vocab_size = _VOCAB
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, 0)
    for name in attention_thresholds(text):
        setattr(text, name, _THRESHOLD)
    return reduced


def _narrowed(config: Any, num_ranks: int) -> Any:
    narrowed = copy.deepcopy(config)
    text = narrowed.get_text_config()
    for name in _WIDTHS:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(_NARROW, getattr(text, name)))
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None)
    # Where ranks have different numbers of key heads, so have they in the miniature.
    least = num_ranks + (kv_heads % num_ranks > 0)
    fewer = min(kv_heads, max(_MAX_KV_HEADS, least))
    if "num_key_value_heads" in text.to_dict():
        text.num_key_value_heads = fewer
    text.num_attention_heads = heads // kv_heads * fewer
    if head_dim:
        # Some configs want a width that the heads divide, whatever the size of a head.
        num_heads = text.num_attention_heads
        text.hidden_size = min(max(1, _HIDDEN // num_heads) * num_heads, text.hidden_size)
    else:
        text.hidden_size = text.hidden_size // heads * text.num_attention_heads
    return narrowed


def _widen(model: torch.nn.Module) -> None:
    """Give matrices values whose products keep their size: the usual start is nearly uniform."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values * (1.5 / math.sqrt(parameter.shape[-1])))
