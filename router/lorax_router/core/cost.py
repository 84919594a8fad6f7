"""What a step takes: a linear model of its work, and its prices as running steps show them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class StepWork(NamedTuple):
    """What one step computes and reads."""

    # Tokens computed, of prompts and outputs.
    tokens: int
    # Tokens in the KV cache that its rows attend to, those of the step included.
    kv_read: int
    # Of the distinct adapters in it.
    adapter_bytes: int
    # Over all tokens: the rank of the token's adapter.
    token_ranks: int
    # Over all tokens: how many tokens of its row it attends to. Of a row that decodes, as many as
    # it reads; of a prompt each token attends to what the whole row reads once.
    attended: int = 0

    def with_drafts(self, num_drafted: int) -> StepWork:
        """Return what it was with the drafts that were computed besides, with adapters as the others."""
        if not num_drafted or not self.tokens:
            return self
        tokens = self.tokens + num_drafted
        return self._replace(tokens=tokens, token_ranks=self.token_ranks * tokens // self.tokens)


@dataclass(frozen=True, slots=True)
class LinearCost:
    """seconds = fixed + tokens, KV read, adapters' bytes, tokens x rank and attended at a price each.

    The sum overstates a step in which reading the weights and computing overlap, by a factor
    of two at most: it is exact where one of them dominates.
    """

    fixed_s: float
    token_s: float
    kv_token_s: float = 0.0
    adapter_byte_s: float = 0.0
    token_rank_s: float = 0.0
    attended_s: float = 0.0

    @property
    def recomputed_token_s(self) -> float:
        """What a token adds to a step that runs for others, too."""
        return self.token_s + self.kv_token_s

    def tokens_in(self, seconds: float) -> float:
        """Return how many tokens could be computed again in a time; 0 where they cost nothing."""
        return seconds / self.recomputed_token_s if self.recomputed_token_s > 0 else 0.0

    def seconds(self, work: StepWork) -> float:
        """Return how long a step takes."""
        return (
            self.fixed_s
            + self.token_s * work.tokens
            + self.kv_token_s * work.kv_read
            + self.adapter_byte_s * work.adapter_bytes
            + self.token_rank_s * work.token_ranks
            + self.attended_s * work.attended
        )


# What an observed step counts after a later one: those of some hundred steps make the prices.
_FORGETTING = 0.995
# Steps from which on one that is far from what was expected is cut to the border.
_TRUSTED_STEPS = 8
# The border, in mean deviations, and the least of it: steps are never as regular as that.
_WILD, _LEAST_BORDER = 4.0, 0.05
_DEVIATION_SHARE = 0.05
# More wild steps in a row are no accident: the server is another now, and the past counts less.
_LONGEST_ACCIDENT, _FORGETTING_OTHERS = 5, 0.8


class CostFit:
    """The prices of steps, fitted as they are observed. It has no clock: it is told.

    Least squares of the relative error with exponential forgetting. Its normal equations
    are kept up to date, and coordinate descent, each price cut at 0, follows their minimum from
    where it was: what the steps do not tell apart stays as it is.
    """

    __slots__ = ("_deviation", "_matrix", "_num_wild", "_prices", "_sums", "num_steps")

    def __init__(self) -> None:
        self.num_steps = 0
        num = 1 + len(StepWork._fields)
        self._matrix = [[0.0] * num for _ in range(num)]
        self._sums = [0.0] * num
        self._prices = [0.0] * num
        # Mean of |relative error|, as far as steps were believed.
        self._deviation = 0.0
        # Wild steps since the last one that was not.
        self._num_wild = 0

    def cost(self) -> LinearCost | None:
        """Return the prices; None while too few steps were observed."""
        return LinearCost(*self._prices) if self.num_steps >= _TRUSTED_STEPS else None

    def worth(self, num_tokens: int, seconds: float) -> float:
        """Return how many tokens of prompts a step could have computed, instead or besides."""
        cost = self.cost()
        return max(float(num_tokens), cost.tokens_in(seconds)) if cost else float(num_tokens)

    def observe(self, work: StepWork, seconds: float) -> None:
        """Book how long a step took; one without a duration tells nothing."""
        if seconds <= 0:
            return
        row = (1.0, *work)
        believed = self._believed(row, seconds)
        weight = 1.0 / (believed * believed)
        is_other = self._num_wild > _LONGEST_ACCIDENT
        keep = _FORGETTING_OTHERS if is_other else _FORGETTING
        for index, value in enumerate(row):
            line, weighted = self._matrix[index], weight * value
            for other, factor in enumerate(row):
                line[other] = keep * line[other] + weighted * factor
            self._sums[index] = keep * self._sums[index] + weighted * believed
        self.num_steps += 1
        self._descend()

    def _believed(self, row: tuple[float, ...], seconds: float) -> float:
        """Return how long a step took, cut where it is wild by accident."""
        expected = sum(price * value for price, value in zip(self._prices, row, strict=True))
        if expected <= 0 or self.num_steps < _TRUSTED_STEPS:
            return seconds
        # Never cut to nothing: errors below are at most 1.
        border = min(max(_WILD * self._deviation, _LEAST_BORDER), 0.9)
        error = seconds / expected - 1.0
        self._num_wild = self._num_wild + 1 if abs(error) > border else 0
        cut = min(max(error, -border), border)
        self._deviation += _DEVIATION_SHARE * (abs(cut) - self._deviation)
        return seconds if self._num_wild > _LONGEST_ACCIDENT else expected * (1.0 + cut)

    def _descend(self) -> None:
        prices = self._prices
        for index, line in enumerate(self._matrix):
            if line[index] <= 0:
                continue
            explained = sum(a * price for a, price in zip(line, prices, strict=True))
            gap = (self._sums[index] - explained) / line[index]
            prices[index] = max(prices[index] + gap, 0.0)
