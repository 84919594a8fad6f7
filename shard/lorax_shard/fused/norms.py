"""Finds the norms of a model that are RMS norms, by what they compute."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lorax_shard.fused.backend import ElementwiseBackend, RmsNorm
from lorax_shard.fused.forwards import Forward, closest, noise

_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_ROWS = 5


def find(module: nn.Module, backend: ElementwiseBackend, like: torch.Tensor) -> Forward | None:
    """Return what takes the place of the module's forward, if it is a norm of a known form."""
    candidates = list(_candidates(module))
    if not candidates:
        return None
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    if weight.dtype is not like.dtype:
        return None
    # Away from zero, so that a norm that takes the mean off shows.
    x = noise(_ROWS, len(weight), like=like) + 1
    calls = {norm: functools.partial(backend.rms_norm, x, weight, norm) for norm in candidates}
    norm = closest(calls, lambda: module(x))
    return None if norm is None else Forward(_forward(backend, norm), (backend, norm))


def _candidates(module: nn.Module) -> Iterator[RmsNorm]:
    """Yield the norms that a module of this shape may be."""
    parameters = dict(module.named_parameters())
    epsilon = next((getattr(module, n) for n in _EPSILONS if hasattr(module, n)), None)
    # torch's own norm is fused.
    if isinstance(module, nn.RMSNorm) or parameters.keys() != {"weight"} or any(module.children()):
        return
    if isinstance(epsilon, float) and parameters["weight"].dim() == 1:
        for offset in (0.0, 1.0):
            for rounds_first in (False, True):
                yield RmsNorm(epsilon, offset, rounds_first)


def _forward(backend: ElementwiseBackend, norm: RmsNorm) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return backend.rms_norm(hidden_states, self.weight, norm)

    return forward
