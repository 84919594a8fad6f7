"""The function that transformers models call as their attention, once plugged in.

It is registered with transformers' AttentionInterface under one name; the step's
metadata travels through the model's forward as one keyword argument.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from lorax_shard.attention.backend import (
    AttentionLayer,
    AttentionSpec,
    RelativeBias,
    StepMetadata,
)
from lorax_shard.attention.kv_cache import KVShape
from lorax_shard.fused import rotations_of
from lorax_shard.fused.backend import KVSlots

ATTENTION_NAME = "lorax_paged"
STEP_KEYWORD = "lorax_step"


class UnsupportedAttentionError(Exception):
    """A layer computes something that paged attention does not; the text says what."""


@dataclass(slots=True)
class AttentionSurvey:
    """Takes the place of a step once, to learn what each attention layer keeps per token.

    Layers of an encoder see later tokens and keep nothing.
    """

    is_encoder: bool = False
    shapes: dict[int, KVShape] = field(default_factory=dict)
    windows: dict[int, int | None] = field(default_factory=dict)
    _num_heads: dict[int, int] = field(default_factory=dict)
    _specs: dict[int, AttentionSpec] = field(default_factory=dict)

    def layers(self, block_size: int) -> list[AttentionLayer]:
        """Return what each layer asks of a backend over blocks of ``block_size`` tokens."""
        return [
            AttentionLayer.of(spec, self._num_heads[layer], self.shapes[layer], block_size)
            for layer, spec in self._specs.items()
        ]

    def visit(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spec: AttentionSpec,
    ) -> None:
        """Note one layer; ``query``, ``key`` and ``value`` are T x heads x dim."""
        if self.is_encoder:
            # Layers may be one and the same: no cache tells them apart.
            layer = len(self.shapes)
        if layer in self.shapes:
            raise UnsupportedAttentionError(f"layer {layer} attends more than once")
        self.shapes[layer] = KVShape(key.shape[1], key.shape[2], value.shape[2])
        self.windows[layer] = spec.window
        self._num_heads[layer] = query.shape[1]
        self._specs[layer] = spec


def register() -> None:
    """Make the name known to transformers; doing it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)


@contextmanager
def stock_attention(model: Any) -> Iterator[None]:
    """Within, a model computes with transformers' own attention; afterwards with ours again.

    Modules that were plugged one by one need nothing: without a step they compute their own.
    """
    if not model._can_set_attn_implementation():
        yield
        return
    model.set_attn_implementation("eager")
    yield
    model.set_attn_implementation(ATTENTION_NAME)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # 1 x H x T x D
    key: torch.Tensor,  # 1 x G x T x D
    value: torch.Tensor,  # 1 x G x T x E
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    relative_bias: RelativeBias | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # 1 x T x H x E
    """Store the step's K and V and attend over the cache, with the step's own backend."""
    step: StepMetadata | AttentionSurvey | None = kwargs.get(STEP_KEYWORD)
    if step is None:
        raise UnsupportedAttentionError(
            f"the model's forward passes no arguments on to {type(module).__name__}"
        )
    spec = AttentionSpec(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window or None,
        softcap=softcap or None,
        sinks=s_aux,
        chunk=_chunk_size(module),
        bias=relative_bias,
    )
    layer: int = getattr(module, "layer_idx", None) or 0
    rotations = rotations_of(module)
    pending = None if rotations is None else rotations.take(query, key)
    if isinstance(step, AttentionSurvey):
        _refuse_unknown_attention(module, attention_mask, kwargs, is_encoder=step.is_encoder)
        q, k, v = _by_tokens(query, key, value)
        step.visit(layer, q, k, v, spec)
        output = scaled_dot_product_attention(
            query, key, value, is_causal=not step.is_encoder, enable_gqa=True
        )
        return output.transpose(1, 2), None
    if pending is not None and rotations is not None and rotations.store is not None:
        cache = step.cache
        kept = KVSlots(cache.keys[layer], cache.values[layer], step.slots)
        query, key = rotations.store.rotate_and_store(pending, value, kept)
    q, k, v = _by_tokens(query, key, value)
    if pending is None:
        step.backend.store(k, v, layer, step)
    if _has_tuned_temperature(module):
        q = (q * _temperature_correction(module, step, q.device)[:, None, None]).to(q.dtype)
    return step.backend.attend(q, k, v, layer, spec, step).unsqueeze(0), None


def _by_tokens(*tensors: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield T x heads x dim of 1 x heads x T x dim."""
    return (tensor[0].transpose(0, 1) for tensor in tensors)


def _chunk_size(module: torch.nn.Module) -> int | None:
    """Return a layer's chunk, which models put into their mask only; None: it has none."""
    config: Any = getattr(module, "config", None)
    kinds: Any = getattr(config, "layer_types", None)
    layer: Any = getattr(module, "layer_idx", None)
    if not kinds or layer is None or kinds[layer] != "chunked_attention":
        return None
    return int(config.attention_chunk_size)


def _has_tuned_temperature(module: torch.nn.Module) -> bool:
    return bool(getattr(module, "attn_temperature_tuning", False)) and not module.use_rope


def _temperature_correction(
    module: Any, step: StepMetadata, device: torch.device
) -> torch.Tensor:  # T
    """Return what makes scaled queries those of their own positions (Llama 4's NoPE layers).

    A query at position p is scaled by 1 + attn_scale * log(1 + floor((p + 1) / floor_scale))
    (scalable softmax, arXiv 2501.19399). The model takes for p the token's place in the forward
    pass, which is not its position once rows share the pass or have a past.
    """
    floor_scale, attn_scale = float(module.floor_scale), float(module.attn_scale)
    key = f"attention_hook.temperature.{floor_scale}.{attn_scale}"
    if key not in step.scratch:
        rows = zip(step.context_lens, step.query_lens, strict=True)
        own = torch.cat([torch.arange(length - count, length) for length, count in rows])

        def scale(positions: torch.Tensor) -> torch.Tensor:
            return torch.log1p(torch.floor((positions.float() + 1) / floor_scale)) * attn_scale + 1

        step.scratch[key] = (scale(own) / scale(torch.arange(len(own)))).to(device)
    correction: torch.Tensor = step.scratch[key]
    return correction


def _refuse_unknown_attention(
    module: torch.nn.Module,
    attention_mask: torch.Tensor | None,
    kwargs: dict[str, Any],
    *,
    is_encoder: bool,
) -> None:
    name = type(module).__name__
    is_causal = getattr(module, "is_causal", True) and kwargs.get("is_causal") is not False
    if is_encoder and is_causal:
        raise UnsupportedAttentionError(f"{name} is causal: it sees earlier tokens alone")
    if not is_encoder and not is_causal:
        raise UnsupportedAttentionError(f"{name} is not causal: it sees later tokens")
    if not is_encoder and getattr(module, "layer_idx", None) is None:
        raise UnsupportedAttentionError(f"{name} does not say which layer it is")
    if attention_mask is not None:
        raise UnsupportedAttentionError(f"{name} adds a bias of its own to the scores")
    if kwargs.get("position_bias") is not None:
        raise UnsupportedAttentionError(f"{name} adds a position bias to the scores")
