"""Where the end of a text stood before, found in a time that does not grow with the text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IdArray = NDArray[np.int64]

# The most tokens at the end that are compared with those of earlier places.
LONGEST_MATCH = 16
# Places whose last two tokens are those of the end that are compared, the latest first; and those
# that have but the last one, of which the latest counts.
_MOST_PAIRS, _MOST_SINGLES = 32, 4
_FIRST_CAPACITY = 256
_NOWHERE = -1
# Odd numbers that spread ids over a table.
_FACTORS = (0x9E3779B1, 0x85EBCA6B)


class EarlierPlaces:
    """Finds the earlier place most like the end of one text, which only grows."""

    __slots__ = ("_pairs", "_singles")

    def __init__(self) -> None:
        self._pairs, self._singles = _Chains(2), _Chains(1)

    def longest_match(self, ids: IdArray) -> tuple[int, int]:
        """Return the place behind the earlier text most like the end, and how many tokens agree.

        The latest of those most alike; (0, 0) where the last token stands nowhere else.
        """
        for chains, most in ((self._pairs, _MOST_PAIRS), (self._singles, _MOST_SINGLES)):
            chains.extend(ids)
            ends = chains.before(len(ids) - 1, most)
            if not len(ends):
                continue
            lengths = _lengths_of_match(ids, ends)
            best = int(lengths.argmax())
            if lengths[best] > 0:
                return int(ends[best]) + 1, int(lengths[best])
        return 0, 0


class _Chains:
    """The places of each run of so many tokens, by the run's hash, as in LZ77's hash chains.

    Sixteen to twenty-four bytes a token.
    """

    __slots__ = ("_before", "_latest", "_length", "_num")

    def __init__(self, length: int) -> None:
        self._length = length
        # Tokens that are in it.
        self._num = 0
        # By hash: the last token of the latest run; by place: that of the one before it.
        self._latest = self._before = np.empty(0, dtype=np.int32)

    def before(self, end: int, most: int) -> NDArray[np.int32]:
        """Return where runs end that may be the one at ``end``, the latest first."""
        places: list[int] = []
        place = self._before[end]
        while place != _NOWHERE and len(places) < most:
            places.append(int(place))
            place = self._before[place]
        return np.array(places, dtype=np.int32)

    def extend(self, ids: IdArray) -> None:
        """Take in what has come to the text."""
        if len(ids) > len(self._before):
            self._rebuild(ids)
        for end in range(self._num, len(ids)):
            slot = self._slots(ids[end + 1 - self._length : end + 1])[0]
            self._before[end] = self._latest[slot]
            self._latest[slot] = end
        self._num = len(ids)

    def _rebuild(self, ids: IdArray) -> None:
        """Make a table for twice as many tokens."""
        capacity = max(_FIRST_CAPACITY, 2 * len(ids))
        self._latest = np.full(1 << (capacity - 1).bit_length(), _NOWHERE, dtype=np.int32)
        self._before = np.full(capacity, _NOWHERE, dtype=np.int32)
        slots = self._slots(ids)
        order = np.argsort(slots, kind="stable")
        ends = order + self._length - 1
        is_next = slots[order[1:]] == slots[order[:-1]]
        self._before[ends[1:][is_next]] = ends[:-1][is_next]
        # The last of equal indices is what stays.
        self._latest[slots] = np.arange(self._length - 1, len(ids), dtype=np.int32)
        self._num = len(ids)

    def _slots(self, ids: IdArray) -> IdArray:
        """Return the place in the table of each run."""
        hashes = ids * _FACTORS[0]
        if self._length == 2:
            hashes = hashes[:-1] + ids[1:] * _FACTORS[1]
        return (hashes >> 15) & (len(self._latest) - 1)


def _lengths_of_match(ids: IdArray, ends: NDArray[np.int32]) -> IdArray:
    """Return how many tokens up to each place are those up to the end."""
    last = len(ids) - 1
    steps = np.arange(min(LONGEST_MATCH, last))
    at = ends[:, None] - steps
    same = (ids[np.maximum(at, 0)] == ids[last - steps]) & (at >= 0)
    lengths: IdArray = np.logical_and.accumulate(same, axis=1).sum(axis=1)
    return lengths
