"""The interface of elementwise backends: what is computed, on tensors of any leading shape.

Legend: T tokens, H heads of queries, G of keys, D their width, R how much of it turns.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch


class GateFunction(enum.Enum):
    """What a gate goes through; the values are the kernels' numbers."""

    SILU = 0
    # The approximation by tanh.
    GELU_TANH = 1


class UnaryFunction(enum.Enum):
    """What each number of a layer goes through by itself; the values are the kernels' numbers."""

    # By the error function.
    GELU = 0
    GELU_TANH = 1


class LayerNorm(NamedTuple):
    """(x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon) * weight + bias, over the last dimension."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    epsilon: float


class RmsNorm(NamedTuple):
    """x / sqrt(mean(x^2) + epsilon) * (offset + weight), over the last dimension."""

    epsilon: float
    # 1 where a family keeps its weights around zero.
    offset: float
    # Of 16 bits: x is rounded before the weights as well, else once at the end.
    rounds_first: bool = False


class WeightedNorm(NamedTuple):
    """A norm, and the weight of each column."""

    norm: RmsNorm
    weight: torch.Tensor


class Rotation(NamedTuple):
    """How rotary embeddings turn pairs (a, b) of a head: (a cos - b sin, b cos + a sin)."""

    # Pairs are neighbours; else one half of what turns with the other.
    is_adjacent: bool
    # Pair p takes the p-th cosine for both; else each number takes that of its own place.
    is_by_pair: bool
    # Cosines come for one half only, so that twice as many numbers turn.
    is_short: bool = False

    def width(self, num_cosines: int) -> int:
        """Return how many numbers of a head turn."""
        return num_cosines * (2 if self.is_short else 1)


class PendingRotation(NamedTuple):
    """Queries and keys, and the angles by which they are turned; see ``rotate``."""

    query: torch.Tensor
    key: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    rotation: Rotation


class KVSlots(NamedTuple):
    """Where a layer keeps the K and V of a step's tokens."""

    keys: torch.Tensor  # blocks x block size x G x D, perhaps of a narrower dtype
    values: torch.Tensor  # blocks x block size x G x E
    slots: torch.Tensor  # T int64; negative: the token is not kept


class ElementwiseBackend(ABC):
    """Computes each row by itself: neither the rows beside it nor threads change a number."""

    name: ClassVar[str]
    # Whether a sum and its norms cost less together. A CPU calls torch's sum sooner than a kernel
    # is told of two tensors more.
    adds_with_norms: ClassVar[bool] = False

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:  # noqa: ARG003 - plain torch runs everywhere
        """Return in words why this backend cannot run here, or None when it can."""
        return None

    @abstractmethod
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
        """Return the norm of ``x`` (... x n) with a weight of n."""

    def add_norms(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        inner: WeightedNorm | None,
        outer: WeightedNorm | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return x + inner(delta), all ... x n, and outer of that sum; a norm of None is left out.

        Each step is rounded.
        """
        if inner is not None:
            delta = self.rms_norm(delta, inner.weight, inner.norm)
        total = x + delta
        return total, None if outer is None else self.rms_norm(total, outer.weight, outer.norm)

    @abstractmethod
    def gated(self, gate: torch.Tensor, up: torch.Tensor, activation: GateFunction) -> torch.Tensor:
        """Return activation(gate) * up, all ... x n."""

    @abstractmethod
    def rotate(
        self,
        query: torch.Tensor,  # 1 x H x T x D
        key: torch.Tensor,  # 1 x G x T x D
        cos: torch.Tensor,  # 1 x T x R (or R / 2)
        sin: torch.Tensor,
        rotation: Rotation,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both turned; what lies beyond R in a head stays as it is."""


class EncoderElementwise(ABC):
    """What an elementwise backend is, too, that computes what lies between an encoder's products."""

    @abstractmethod
    def activated(
        self, x: torch.Tensor, activation: UnaryFunction, *, in_place: bool = False
    ) -> torch.Tensor:
        """Return the activation of each number of ``x``; ``in_place``: it may be where ``x`` is."""

    @abstractmethod
    def layer_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, norm: LayerNorm
    ) -> torch.Tensor:
        """Return the norm of x + delta, both ... x n; a delta of None is 0."""


class RotatingStore(ABC):
    """What an elementwise backend is, too, that turns keys and stores them at once."""

    @abstractmethod
    def rotate_and_store(
        self,
        pending: PendingRotation,
        value: torch.Tensor,  # 1 x G x T x E
        kept: KVSlots,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both turned, and keep K, turned, and V; what is not finite is kept as 0."""
