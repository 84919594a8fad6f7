"""Finds how a model's attention turns queries and keys, by what its function for it computes.

Families keep that function beside their attention, whose code calls it by its name. The code
stays: the name means another function in it. What that hands on may be turned later, when K and V
are stored, by whom it is handed to.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from lorax_shard.fused.backend import ElementwiseBackend, PendingRotation, RotatingStore, Rotation
from lorax_shard.fused.forwards import Forward, closest, noise
from lorax_shard.fused.reference import TorchElementwise

_NAME = "apply_rotary_pos_emb"
_CANDIDATES = tuple(
    Rotation(is_adjacent, is_by_pair, is_short)
    for is_short in (False, True)
    for is_adjacent in (False, True)
    for is_by_pair in (False, True)
    if is_by_pair or not is_short
)
_TOKENS, _DIM = 5, 16
# Under this name an attention's class has what turns its queries and keys.
_ROTATIONS = "lorax_rotations"

_Heads = tuple[torch.Tensor, torch.Tensor]


class _Known(NamedTuple):
    """What a family's function does with as many cosines as a head is wide, and with fewer."""

    full: Rotation | None
    narrow: Rotation | None


class LostRotationError(Exception):
    """Queries and keys that wait to be turned did not come where that is done."""


class Rotations:
    """Turns the queries and keys of a model: at once, or when K and V are stored."""

    def __init__(self, backend: ElementwiseBackend) -> None:
        self._backend = backend
        # What turns them when they are stored; None: nothing does.
        self.store = backend if isinstance(backend, RotatingStore) else None
        # Whether queries and keys are handed on as they are, for whoever takes them.
        self.are_deferred = False
        self._waiting: PendingRotation | None = None

    def rotate(self, pending: PendingRotation) -> _Heads:
        """Return queries and keys turned; where that is deferred, those that ``take`` knows."""
        if not self.are_deferred:
            return self._backend.rotate(*pending)
        if self._waiting is not None:
            self._waiting = None
            raise LostRotationError("queries and keys of an attention were never turned")
        self._waiting = pending
        return pending.query, pending.key

    def take(self, query: torch.Tensor, key: torch.Tensor) -> PendingRotation | None:
        """Return what is still to be done with queries and keys, if anything is.

        Raises LostRotationError where others wait.
        """
        pending, self._waiting = self._waiting, None
        if pending is not None and (pending.query is not query or pending.key is not key):
            raise LostRotationError("an attention changes queries and keys after they are turned")
        return pending


def rotations_of(module: nn.Module) -> Rotations | None:
    """Return what turns an attention's queries and keys; None: its own code."""
    return getattr(type(module), _ROTATIONS, None)


class RotaryFinder:
    """Finds the attention modules of a model whose rotation is known."""

    def __init__(self, rotations: Rotations) -> None:
        self._rotations = rotations
        self._known: dict[Callable[..., Any], _Known] = {}

    def find(self, module: nn.Module) -> Forward | None:
        """Return what takes the place of the module's forward, if its rotation is known."""
        code = inspect.unwrap(type(module).forward)
        if not isinstance(code, types.FunctionType) or _NAME not in code.__code__.co_names:
            return None
        own = code.__globals__.get(_NAME)
        if own is None:
            return None
        if own not in self._known:
            self._known[own] = _Known(_trial(own, _DIM), _trial(own, _DIM // 2))
        known = self._known[own]
        if known == (None, None):
            return None
        forward = _rebound(code, _rotation(own, known, self._rotations))
        return Forward(forward, (self._rotations, own), {_ROTATIONS: self._rotations})


def _trial(own: Callable[..., Any], num_cosines: int) -> Rotation | None:
    """Return the rotation that a family's function computes, if it is a known one."""
    like = torch.empty(0)
    query, key = noise(1, 3, _TOKENS, _DIM, like=like), noise(1, 2, _TOKENS, _DIM, like=like)
    cos, sin = noise(2, 1, _TOKENS, num_cosines, like=like)

    reference = TorchElementwise()

    def computing(rotation: Rotation) -> Callable[[], torch.Tensor]:
        return lambda: torch.cat(reference.rotate(query, key, cos, sin, rotation), dim=1)

    calls = {rotation: computing(rotation) for rotation in _CANDIDATES}
    return closest(calls, lambda: torch.cat(own(query, key, cos, sin), dim=1))


def _rotation(
    own: Callable[..., _Heads], known: _Known, rotations: Rotations
) -> Callable[..., _Heads]:
    """Return the family's function, by a kernel where it is asked for what is known."""
    parameters = inspect.signature(own).parameters

    def is_default(name: str, value: Any) -> bool:
        return name in parameters and bool(parameters[name].default == value)

    def rotate(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> _Heads:  # fmt: skip
        rotation = known.full if cos.shape[-1] == q.shape[-1] else known.narrow
        is_usual = q.dim() == 4 and q.shape[0] == 1 and cos.dim() == 3 and cos.dtype is q.dtype
        is_usual = is_usual and not args and all(map(is_default, kwargs, kwargs.values()))
        if rotation is None or not is_usual:
            return own(q, k, cos, sin, *args, **kwargs)
        return rotations.rotate(PendingRotation(q, k, cos, sin, rotation))

    return rotate


def _rebound(code: types.FunctionType, rotate: Callable[..., _Heads]) -> types.FunctionType:
    """Return a function of the same code in which the name means another function."""
    names = {**code.__globals__, _NAME: rotate}
    bound = types.FunctionType(
        code.__code__, names, code.__name__, code.__defaults__, code.__closure__
    )
    bound.__kwdefaults__ = code.__kwdefaults__
    return bound
