"""Finds the gated MLPs of a model, by their linears' names and by what they compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lorax_shard.fused.backend import ElementwiseBackend, GateFunction
from lorax_shard.fused.forwards import Forward, closest, noise

_ROWS = 3


def find(module: nn.Module, backend: ElementwiseBackend, like: torch.Tensor) -> Forward | None:
    """Return what takes the place of the module's forward, if it is a gated MLP of a known form."""
    children = dict(module.named_children())
    make = next((make for names, make in _FORMS.items() if names <= children.keys()), None)
    width: Any = None if make is None else getattr(children["down_proj"], "out_features", None)
    if make is None or width is None:
        return None
    x = noise(1, _ROWS, width, like=like)
    forwards = {activation: make(backend, activation) for activation in GateFunction}
    calls = {key: functools.partial(forward, module, x) for key, forward in forwards.items()}
    activation = closest(calls, lambda: module(x))
    return None if activation is None else Forward(forwards[activation], (backend, activation))


def _apart(backend: ElementwiseBackend, activation: GateFunction) -> Callable[..., torch.Tensor]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        # The very same input for both: siblings are computed at once.
        gated = backend.gated(self.gate_proj(x), self.up_proj(x), activation)
        return self.down_proj(gated)  # type: ignore[no-any-return]

    return forward


def _together(backend: ElementwiseBackend, activation: GateFunction) -> Callable[..., torch.Tensor]:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(backend.gated(gate, up, activation))  # type: ignore[no-any-return]

    return forward


_FORMS = {
    frozenset({"gate_proj", "up_proj", "down_proj"}): _apart,
    frozenset({"gate_up_proj", "down_proj"}): _together,
}
