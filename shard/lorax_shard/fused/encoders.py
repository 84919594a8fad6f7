"""Finds what lies between the products of an encoder: activations, norms, and sums with their norms."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from lorax_shard.fused.backend import EncoderElementwise, LayerNorm, UnaryFunction
from lorax_shard.fused.forwards import Forward, closest, noise

_NUMBERS, _ROWS = 64, 3
# What a block around a product has inside; dropout computes nothing where a model is served.
_BLOCK = {"dense", "dropout", "LayerNorm"}


def find_activation(
    module: nn.Module, backend: EncoderElementwise, like: torch.Tensor
) -> Forward | None:
    """Return what takes the place of the module's forward, if it is an activation of a known form."""
    if [*module.children(), *module.parameters(), *module.buffers()]:
        return None
    x = 3 * noise(1, _NUMBERS, like=like)
    calls = {each: functools.partial(backend.activated, x, each) for each in UnaryFunction}
    activation = closest(calls, lambda: module(x))
    if activation is None:
        return None

    def forward(_module: Any, x: torch.Tensor) -> torch.Tensor:
        # A product's, which nobody else reads; where somebody does, the load-time probe sees it.
        return backend.activated(x, activation, in_place=True)

    return Forward(forward, (backend, activation))


def find_norm(module: nn.Module, backend: EncoderElementwise, like: torch.Tensor) -> Forward | None:
    """Return the same of a module that is a norm alone."""
    if not _is_norm(module, like):
        return None

    def forward(module: Any, x: torch.Tensor) -> torch.Tensor:
        return backend.layer_norm(x, None, _norm_of(module))

    return Forward(forward, (backend, "norm"))


def find_sum(module: nn.Module, backend: EncoderElementwise, like: torch.Tensor) -> Forward | None:
    """Return the same of a block that adds a product to what it was made of, and norms the sum."""
    children = dict(module.named_children())
    if children.keys() != _BLOCK or not _is_norm(children["LayerNorm"], like):
        return None
    width: Any = getattr(children["dense"], "in_features", None)
    if width is None:
        return None
    norm: Any = children["LayerNorm"]

    def forward(
        block: Any, hidden_states: torch.Tensor, input_tensor: torch.Tensor
    ) -> torch.Tensor:
        made = block.dense(hidden_states)
        if _is_changed(block.LayerNorm):
            # What an adapter or a hook does to the norm is done.
            return block.LayerNorm(made + input_tensor)  # type: ignore[no-any-return]
        return backend.layer_norm(made, input_tensor, _norm_of(block.LayerNorm))

    x, added = noise(1, _ROWS, width, like=like), noise(1, _ROWS, len(norm.weight), like=like) + 1
    call = functools.partial(forward, module, x, added)
    if closest({"sum": call}, lambda: module(x, added)) is None:
        return None
    return Forward(forward, (backend, "sum"))


def _is_norm(module: nn.Module, like: torch.Tensor) -> bool:
    return (
        isinstance(module, nn.LayerNorm)
        and type(module).forward is nn.LayerNorm.forward
        and len(module.normalized_shape) == 1
        and module.elementwise_affine
        and module.weight.dtype is like.dtype
    )


def _norm_of(module: nn.LayerNorm) -> LayerNorm:
    return LayerNorm(module.weight, module.bias, module.eps)


def _is_changed(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__
