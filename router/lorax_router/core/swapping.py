"""Whether KV that leaves the pool is moved to host memory or computed again."""

from __future__ import annotations

from math import inf
from typing import Protocol

# How fast an older measurement of what a token takes fades, by steps.
_FADING = 0.1


class RecomputeCost(Protocol):
    """What computing tokens again takes, learned from steps."""

    def observe(self, num_tokens: int, num_rows: int, seconds: float) -> None:
        """A step of so many tokens in so many rows took so long."""

    def recompute_s(self, num_tokens: int) -> float:
        """Return how long it takes to compute so many tokens again; inf: not known yet."""


class MeanTokenCost:
    """A fading mean over steps that compute prompts: what is computed again is one."""

    def __init__(self) -> None:
        self._token_s = inf

    def observe(self, num_tokens: int, num_rows: int, seconds: float) -> None:
        """Count steps whose tokens are prompts' for the most part."""
        if seconds <= 0 or num_tokens < 2 * num_rows:
            return
        found = seconds / num_tokens
        known = found if self._token_s == inf else self._token_s
        self._token_s = known + _FADING * (found - known)

    def recompute_s(self, num_tokens: int) -> float:
        """Return tokens times the mean."""
        return num_tokens * self._token_s if num_tokens else 0.0


class MoveOrCompute:
    """The choice, by what either takes."""

    def __init__(self, block_move_s: float, recompute: RecomputeCost) -> None:
        self.recompute = recompute
        self._block_move_s = block_move_s

    def move_s(self, num_out: int, num_in: int) -> float:
        """Return what moving so many blocks out, and so many back later, takes."""
        return (num_out + num_in) * self._block_move_s

    def moves(self, *, num_out: int, num_in: int, num_tokens: int) -> bool:
        """Whether that is faster than computing so many tokens again."""
        return self.move_s(num_out, num_in) < self.recompute.recompute_s(num_tokens)
