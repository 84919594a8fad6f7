"""Whether KV that leaves the pool is moved to host memory or computed again."""

from __future__ import annotations

from math import inf
from typing import Protocol

from lorax_router.core.cost import CostFit


class RecomputeCost(Protocol):
    """What computing tokens again takes."""

    def recompute_s(self, num_tokens: int) -> float:
        """Return how long so many tokens take in steps that others share; inf: not known yet."""


class FittedRecompute:
    """By the prices of tokens and of reading them, as the steps so far show them.

    What a step takes for itself is not counted: it runs for others, too.
    """

    def __init__(self, fit: CostFit) -> None:
        self._fit = fit

    def recompute_s(self, num_tokens: int) -> float:
        """Return tokens times their prices."""
        if not num_tokens:
            return 0.0
        cost = self._fit.cost()
        return inf if cost is None else num_tokens * cost.recomputed_token_s


class MoveOrCompute:
    """The choice, by what either takes.

    Args:
        block_move_s: seconds that a block takes over the link, one way.
        recompute: what computing again takes.
    """

    def __init__(self, block_move_s: float, recompute: RecomputeCost) -> None:
        self.recompute = recompute
        self._block_move_s = block_move_s

    def move_s(self, num_out: int, num_in: int) -> float:
        """Return what moving so many blocks out, and so many back later, takes."""
        return (num_out + num_in) * self._block_move_s

    def moves(self, *, num_out: int, num_in: int, num_tokens: int) -> bool:
        """Whether that is faster than computing so many tokens again."""
        return self.move_s(num_out, num_in) < self.recompute.recompute_s(num_tokens)
