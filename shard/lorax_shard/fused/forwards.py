"""A module's forward, exchanged for one that computes the same, and put back."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

# Largest difference that counts as rounding, as a share of the largest number.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


_Key = TypeVar("_Key", bound=Hashable)


class Forward(NamedTuple):
    """What a class may compute in place of its own forward."""

    function: Callable[..., Any]
    # Classes that get the same one are one class.
    key: Hashable
    # What else their modules have.
    names: Mapping[str, Any] = MappingProxyType({})


class Exchange:
    """Owns what was exchanged in one model.

    A module changes its class, to one below its own that differs in its forward: its names,
    its weights and whatever others put on the module itself stay, and so does its place in the
    model.
    """

    def __init__(self) -> None:
        self._own: list[tuple[nn.Module, type[nn.Module]]] = []
        self._classes: dict[tuple[type[nn.Module], Hashable], type[nn.Module]] = {}

    def put(self, module: nn.Module, forward: Forward) -> None:
        """Give a module another forward."""
        own = type(module)
        key = own, forward.key
        if key not in self._classes:
            # Messages name a module's class: by the name that its family knows.
            names = {**forward.names, "forward": forward.function, "__module__": own.__module__}
            self._classes[key] = type(own.__name__, (own,), names)
        self._own.append((module, own))
        module.__class__ = self._classes[key]

    def undo(self) -> bool:
        """Give every module its own forward again; returns whether there were any."""
        own, self._own = self._own, []
        for module, its_class in reversed(own):
            module.__class__ = its_class
        return bool(own)


def noise(*shape: int, like: torch.Tensor) -> torch.Tensor:
    """Return the same random numbers for the same shape, for trials."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def closest(candidates: Mapping[_Key, Callable[[], Any]], own: Callable[[], Any]) -> _Key | None:
    """Return which of some calls computes what a module's own does but for rounding; None: none.

    A call that fails computes nothing like the other.
    """
    try:
        expected: torch.Tensor = own()
        apart = {key: _difference(expected, call) for key, call in candidates.items()}
    except Exception:  # noqa: BLE001 - what a module raises that takes other arguments is not known
        return None
    best = min(apart, key=apart.__getitem__, default=None)
    return None if best is None or apart[best] == math.inf else best


def _difference(expected: torch.Tensor, call: Callable[[], Any]) -> float:
    """Return how far from what is expected a call computes, infinite if that is more than rounding."""
    try:
        found = call()
        if found.shape != expected.shape:
            return math.inf
        scale = max(float(expected.float().abs().max()), 1e-30)
        share = float((expected.float() - found.float()).abs().max()) / scale
    except Exception:  # noqa: BLE001 - nor what a candidate of another shape does
        return math.inf
    return share if share <= _TOLERANCE[expected.dtype] else math.inf
