"""What one row may draw from: its tokens after all warpers, as weights.

A vocabulary is long and most of it is far from any limit that a request sets. So
each warper first finds the few tokens that the limit lies among, and sorts those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lorax_contract.step import SamplingParams
from lorax_shard.engine.id_tree import IdTree, block_sums

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

# Values in one group of which only the maximum is looked at first.
_GROUP = 16
# Where bands of a vocabulary end: as shares of the likeliest token's probability ...
_SHARES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
# ... and as distances of a token's surprisal from the entropy, in nats.
_DISTANCES = (1.0, 2.0, 4.0, 8.0)


class Distribution:
    """Weights over tokens in id order; a token's chance is its weight over their sum.

    ``ids`` is None while every token of the vocabulary is in it.
    """

    __slots__ = ("_tree", "ids", "weights")

    def __init__(self, ids: Ids | None, weights: Floats | NDArray[np.float32]) -> None:
        self.ids = ids
        self.weights = weights
        self._tree = IdTree(ids, weights)

    @property
    def total(self) -> float:
        """Sum of all weights; NaN when the logits were no numbers."""
        return self._tree.total

    def draw(self, numbers: Sequence[float]) -> int:
        """Return the token that ``numbers`` lead to: one in [0, 1) for each level of the tree."""
        return self._tree.draw(numbers)

    def distance(self, token_id: int, numbers: Sequence[float]) -> float:
        """Return by how much ``numbers`` miss a token; infinite when it cannot be drawn."""
        return self._tree.distance(token_id, numbers)

    def probability(self, token_id: int) -> float:
        """Return the token's chance; 0.0 when it cannot be drawn."""
        index = self._index_of(token_id)
        return 0.0 if index is None else float(self.weights[index]) / self.total

    def logprob(self, token_id: int) -> float:
        """Return the log of the token's chance; it must be a token that can be drawn."""
        index = self._index_of(token_id)
        weight = 0.0 if index is None else float(self.weights[index])
        if not weight > 0:
            raise ValueError(f"token {token_id} cannot be drawn: its probability is 0")
        return math.log(weight) - math.log(self.total)

    def likeliest(self, count: int) -> tuple[list[int], list[float]]:
        """Return up to ``count`` tokens that can be drawn, best first, and their logprobs."""
        best = largest(self.weights, count)
        best = best[self.weights[best] > 0]
        log_total = math.log(self.total)
        logprobs = [math.log(float(self.weights[index])) - log_total for index in best]
        return [self._id_at(int(index)) for index in best], logprobs

    def _id_at(self, index: int) -> int:
        return index if self.ids is None else int(self.ids[index])

    def _index_of(self, token_id: int) -> int | None:
        if self.ids is None:
            return token_id if 0 <= token_id < len(self.weights) else None
        index = int(np.searchsorted(self.ids, token_id))
        found = index < len(self.ids) and int(self.ids[index]) == token_id
        return index if found else None


def warp(probs: NDArray[np.float32], params: SamplingParams) -> Distribution:
    """Apply top_k, top_p, typical_p and min_p, in this order, to one row's softmax.

    Each sees the probabilities that the ones before it left, made to sum to 1 again.
    """
    state = _Kept(probs)
    if 0 < params.top_k < len(probs):
        state.keep_top_k(params.top_k)
    if params.top_p < 1.0:
        state.keep_top_p(params.top_p)
    if 0.0 < params.typical_p < 1.0:
        state.keep_typical(params.typical_p)
    if params.min_p > 0.0:
        state.keep_min_p(params.min_p)
    return Distribution(state.ids, state.weights)


def largest(values: NDArray[np.floating], count: int) -> Ids:
    """Return the indices of the ``count`` largest values, best first, ties by index."""
    if count <= 0:
        return np.empty(0, dtype=np.int64)
    indices = np.flatnonzero(values >= kth_largest(values, count))
    order = np.lexsort((indices, -values[indices]))
    return indices[order][:count]


def kth_largest(values: NDArray[np.floating], k: int) -> float:
    """Return the k-th largest value, or the least one when there are fewer than k."""
    if k >= len(values):
        return float(values.min())
    num_groups = len(values) // _GROUP
    if num_groups > k:
        # k groups have a maximum of at least this, hence k values too, and the k-th
        # largest is among them.
        maxima = values[: num_groups * _GROUP].reshape(_GROUP, num_groups).max(axis=0)
        bound = np.partition(maxima, num_groups - k)[num_groups - k]
        values = values[values >= bound]
    return float(np.partition(values, len(values) - k)[len(values) - k])


class _Kept:
    """The tokens that the warpers applied so far have kept."""

    def __init__(self, probs: NDArray[np.float32]) -> None:
        self.ids: Ids | None = None
        self.weights: Floats | NDArray[np.float32] = probs

    def keep_top_k(self, k: int) -> None:
        """Keep what is at least as likely as the k-th likeliest token."""
        self._select(np.flatnonzero(self.weights >= kth_largest(self.weights, k)))

    def keep_top_p(self, top_p: float) -> None:
        """Keep the likeliest tokens up to the one with which their mass reaches ``top_p``."""
        top = float(self.weights.max())
        keys = -self.weights
        last, num_kept = _reach(
            keys, self.weights, top_p * self._total(), [-top * share for share in _SHARES]
        )
        kept = keys < last
        # Of several tokens as likely as the last one, the lowest ids fill what is left.
        num_ties = num_kept - int(np.count_nonzero(kept))
        kept[np.flatnonzero(keys == last)[:num_ties]] = True
        self._select(np.flatnonzero(kept))

    def keep_typical(self, mass: float) -> None:
        """Keep the tokens whose surprisal is nearest to the entropy, up to ``mass``."""
        self._select(np.flatnonzero(self.weights > 0))
        probs = self.weights / self._total()
        logs = np.log(probs)
        entropy = -float(probs @ logs)
        distances = np.abs(logs + entropy)
        last, _ = _reach(distances, probs, mass, _DISTANCES)
        self._select(np.flatnonzero(distances <= last))

    def keep_min_p(self, min_p: float) -> None:
        """Keep what is at least ``min_p`` times as likely as the likeliest token."""
        least = min(1.0, min_p) * float(self.weights.max())
        self._select(np.flatnonzero(self.weights >= least))

    def _total(self) -> float:
        return float(block_sums(self.weights).sum())

    def _select(self, indices: Ids) -> None:
        self.ids = indices if self.ids is None else self.ids[indices]
        self.weights = self.weights[indices].astype(np.float64)


def _reach(
    keys: NDArray[np.floating], weights: NDArray[np.floating], mass: float, bounds: Sequence[float]
) -> tuple[float, int]:
    """Return the key at which the weights, in ascending order of keys, sum up to ``mass``.

    And how many tokens that takes. ``bounds`` cut the keys into bands, of which
    only the one with the answer is sorted.
    """
    below, mass_below, num_below = -math.inf, 0.0, 0
    band = np.empty(0, dtype=np.int64)
    for bound in (*bounds, math.inf):
        band = np.flatnonzero((keys > below) & (keys <= bound))
        band_mass = float(weights[band].sum(dtype=np.float64))
        if mass_below + band_mass >= mass:
            break
        below, mass_below, num_below = bound, mass_below + band_mass, num_below + len(band)
    if num_below == len(keys):  # rounding left the sum of all below the mass
        return float(keys.max()), num_below
    order = band[np.argsort(keys[band], kind="stable")]
    sums = mass_below + np.cumsum(weights[order], dtype=np.float64)
    index = min(int(np.searchsorted(sums, mass)), len(order) - 1)
    return float(keys[order[index]]), num_below + index + 1
