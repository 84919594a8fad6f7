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


class ReadyNorm:
    """The norm of one module, and its result where that was computed with a sum before it."""

    __slots__ = ("_x", "_y", "norm")

    def __init__(self, norm: RmsNorm) -> None:
        self.norm = norm
        self._x: torch.Tensor | None = None
        self._y: torch.Tensor | None = None

    def put(self, x: torch.Tensor | None, y: torch.Tensor | None) -> None:
        """Keep the norm of ``x`` for whoever asks next; of None there is none."""
        self._x, self._y = x, y

    def take(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return the norm of that very tensor if it is there, and keep it no longer."""
        y = self._y if x is self._x else None
        self._x = self._y = None
        return y

    def forward(self, backend: ElementwiseBackend) -> Forward:
        """Return what takes the place of the module's forward."""

        def forward(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
            y = self.take(hidden_states)
            return backend.rms_norm(hidden_states, module.weight, self.norm) if y is None else y

        return Forward(forward, (backend, self))


def find(module: nn.Module, backend: ElementwiseBackend, like: torch.Tensor) -> RmsNorm | None:
    """Return which norm a module is, if it is of a known form."""
    candidates = list(_candidates(module))
    if not candidates:
        return None
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    if weight.dtype is not like.dtype:
        return None
    # Away from zero, so that a norm that takes the mean off shows.
    x = noise(_ROWS, len(weight), like=like) + 1
    calls = {norm: functools.partial(backend.rms_norm, x, weight, norm) for norm in candidates}
    return closest(calls, lambda: module(x))


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
