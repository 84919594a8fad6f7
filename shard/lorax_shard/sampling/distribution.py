"""What one row may draw from: its tokens after all warpers, as weights.

A vocabulary is long and most of it is far from any limit that a request sets. So
each warper first finds the few tokens that the limit lies among, and sorts those.

What tokens weigh together is summed up in whole numbers (see ``id_tree``), so that every way to
sum finds the same edge. So is the entropy, from logarithms that may differ elsewhere in their last
digits: these decide only between tokens whose surprisals lie as far above the entropy as below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lorax_contract.step import SamplingParams
from lorax_shard.sampling.id_tree import ONE, Ids, IdTree, Weights, to_weights

Probs = NDArray[np.float32]

# The whole number that stands for 1 in terms of an entropy.
ENTROPY_ONE = 2.0**48
# Values in one group of which only the maximum is looked at first.
_GROUP = 16
# Where bands of a vocabulary end: as shares of the likeliest token's probability ...
_SHARES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
# ... and as distances of a token's surprisal from the entropy, in nats.
_DISTANCES = (1.0, 2.0, 4.0, 8.0)


class Distribution:
    """Probabilities of tokens in id order; a token's chance is its own over their sum.

    ``ids`` is None while every token of the vocabulary is in it.
    """

    __slots__ = ("_tree", "ids", "probs")

    def __init__(self, ids: Ids | None, probs: Probs) -> None:
        self.ids = ids
        self.probs = probs
        self._tree = IdTree(ids, to_weights(probs))

    @property
    def total(self) -> float:
        """Sum of all probabilities."""
        return self._tree.total / ONE

    def draw(self, numbers: Sequence[float]) -> int:
        """Return the token that ``numbers`` lead to: one in [0, 1) for each level of the tree."""
        return self._tree.draw(numbers)

    def distance(self, token_id: int, numbers: Sequence[float]) -> float:
        """Return by how much ``numbers`` miss a token; infinite when it cannot be drawn."""
        return self._tree.distance(token_id, numbers)

    def probability(self, token_id: int) -> float:
        """Return the token's chance; 0.0 when it cannot be drawn."""
        index = self._index_of(token_id)
        return 0.0 if index is None else float(self.probs[index]) / self.total

    def logprob(self, token_id: int) -> float:
        """Return the log of the token's chance; it must be a token that can be drawn."""
        index = self._index_of(token_id)
        prob = 0.0 if index is None else float(self.probs[index])
        if not prob > 0:
            raise ValueError(f"token {token_id} cannot be drawn: its probability is 0")
        return math.log(prob) - math.log(self.total)

    def likeliest(self, count: int) -> tuple[list[int], list[float]]:
        """Return up to ``count`` tokens, best first, and their logprobs; none with chance 0."""
        best = largest(self.probs, count)
        best = best[self.probs[best] > 0]
        log_total = math.log(self.total)
        logprobs = [math.log(float(self.probs[index])) - log_total for index in best]
        return [self._id_at(int(index)) for index in best], logprobs

    def _id_at(self, index: int) -> int:
        return index if self.ids is None else int(self.ids[index])

    def _index_of(self, token_id: int) -> int | None:
        if self.ids is None:
            return token_id if 0 <= token_id < len(self.probs) else None
        index = int(np.searchsorted(self.ids, token_id))
        found = index < len(self.ids) and int(self.ids[index]) == token_id
        return index if found else None


def warp(probs: Probs, params: SamplingParams) -> Distribution:
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
    return Distribution(state.ids, state.probs)


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

    def __init__(self, probs: Probs) -> None:
        self.ids: Ids | None = None
        self.probs = probs

    def keep_top_k(self, k: int) -> None:
        """Keep what is at least as likely as the k-th likeliest token."""
        self._select(np.flatnonzero(self.probs >= kth_largest(self.probs, k)))

    def keep_top_p(self, top_p: float) -> None:
        """Keep the likeliest tokens up to the one with which their mass reaches ``top_p``."""
        top = float(self.probs.max())
        keys = -self.probs
        last, num_kept = _reach(
            keys, to_weights(self.probs), top_p, [-top * share for share in _SHARES]
        )
        kept = keys < last
        # Of several tokens as likely as the last one, the lowest ids fill what is left.
        num_ties = num_kept - int(np.count_nonzero(kept))
        kept[np.flatnonzero(keys == last)[:num_ties]] = True
        self._select(np.flatnonzero(kept))

    def keep_typical(self, mass: float) -> None:
        """Keep the tokens whose surprisal is nearest to the entropy, up to ``mass``."""
        self._select(np.flatnonzero(to_weights(self.probs) > 0))
        weights = to_weights(self.probs)
        shares = self.probs.astype(np.float64) / (int(weights.sum()) / ONE)
        logs = np.log(shares)
        entropy = -int((shares * logs * ENTROPY_ONE).astype(np.int64).sum()) / ENTROPY_ONE
        distances = np.abs(logs + entropy)
        last, _ = _reach(distances, weights, mass, _DISTANCES)
        self._select(np.flatnonzero(distances <= last))

    def keep_min_p(self, min_p: float) -> None:
        """Keep what is at least ``min_p`` times as likely as the likeliest token."""
        least = min(1.0, min_p) * float(self.probs.max())
        self._select(np.flatnonzero(self.probs.astype(np.float64) >= least))

    def _select(self, indices: Ids) -> None:
        self.ids = indices if self.ids is None else self.ids[indices]
        self.probs = self.probs[indices]


def _reach(
    keys: NDArray[np.floating], weights: Weights, share: float, bounds: Sequence[float]
) -> tuple[float, int]:
    """Return the key at which weights, in ascending order of keys, sum up to a share of all.

    And how many tokens that takes. ``bounds`` cut the keys into bands, of which
    only the one with the answer is sorted.
    """
    total = int(weights.sum())
    wanted = min(max(math.ceil(share * float(total)), 1), total)
    below, mass_below, num_below = -math.inf, 0, 0
    band = np.empty(0, dtype=np.int64)
    for bound in (*bounds, math.inf):
        band = np.flatnonzero((keys > below) & (keys <= bound))
        band_mass = int(weights[band].sum())
        if mass_below + band_mass >= wanted:
            break
        below, mass_below, num_below = bound, mass_below + band_mass, num_below + len(band)
    order = band[np.argsort(keys[band], kind="stable")]
    index = int(np.searchsorted(mass_below + np.cumsum(weights[order]), wanted))
    return float(keys[order[index]]), num_below + index + 1
