"""Drafts of a row's next tokens, looked up in its own: text often repeats what stands before it.

The model checks a draft in one pass: it computes the row's last token and the draft together,
draws at each position what it would have drawn there anyway, and keeps the draws up to the
first that differs from the draft. So nothing but the time depends on what was drafted
(Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023; Saxena,
Prompt Lookup Decoding, 2023).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from lorax_shard.engine.earlier_places import LONGEST_MATCH, EarlierPlaces, IdArray

NO_DRAFT: IdArray = np.empty(0, dtype=np.int64)


class Draft(NamedTuple):
    """Tokens that may come next."""

    token_ids: IdArray = NO_DRAFT
    # Of each: how likely it is kept, and so are all before it.
    chances: tuple[float, ...] = ()


class DraftSource(Protocol):
    """Who names what may come next of one row; the same on all ranks."""

    def propose(self, ids: IdArray, most: int) -> Draft:
        """Return up to so many tokens that may follow all that are known."""

    def checked(self, num_drafted: int, num_kept: int) -> None:
        """Book what became of the first tokens of the last proposal, which were drafted."""


class MatchCounts:
    """How often text went on as it did at an earlier place, by how long it had been alike.

    Args:
        parent: what is known of all rows, which counts as some observations of each one's own.
    """

    __slots__ = ("_parent", "_right", "_tried")

    # What is believed at first, by the length of the match up to the longest.
    _FIRST = (0.0, 0.2, 0.35, 0.5, 0.6, 0.7, *[0.8] * 4, *[0.9] * (LONGEST_MATCH - 9))
    _NUM_BELIEVED = 6.0
    # Observations of one length beyond which the older ones count less.
    _MEMORY = 128.0

    def __init__(self, parent: MatchCounts | None = None) -> None:
        self._parent = parent
        self._right = [0.0] * (LONGEST_MATCH + 1)
        self._tried = [0.0] * (LONGEST_MATCH + 1)

    def chance(self, length: int) -> float:
        """Return how likely the next token is that of the earlier place."""
        length = min(length, LONGEST_MATCH)
        first = self._FIRST[length] if self._parent is None else self._parent.chance(length)
        believed = self._NUM_BELIEVED
        return (self._right[length] + believed * first) / (self._tried[length] + believed)

    def book(self, length: int, *, is_right: bool) -> None:
        """Book whether the token behind a match of that length was the earlier one."""
        if self._parent is not None:
            self._parent.book(length, is_right=is_right)
        length = min(length, LONGEST_MATCH)
        if self._tried[length] >= self._MEMORY:
            self._tried[length] /= 2
            self._right[length] /= 2
        self._tried[length] += 1
        self._right[length] += is_right


class DraftPace:
    """Drafts of one row: what stands behind the earlier place most like its end, and how likely it is kept.

    Whatever is proposed is compared with what came, drafted or not: nothing is drafted in order to
    learn whether it would be kept.
    """

    __slots__ = ("_counts", "_expected", "_length", "_num_known", "_places")

    def __init__(self, counts: MatchCounts) -> None:
        self._counts = MatchCounts(counts)
        self._places = EarlierPlaces()
        # Tokens that were known when the last proposal was made, those of it that were kept
        # included; where it goes on, and how much was alike. Length 0: there is none.
        self._num_known = self._expected = self._length = 0

    def propose(self, ids: IdArray, most: int) -> Draft:
        """Return up to so many tokens: those behind the latest place most like the end."""
        self._compare(ids)
        if most < 1:
            return Draft()
        start, length = self._places.longest_match(ids)
        self._num_known, self._expected, self._length = len(ids), start, length
        if not length:
            return Draft()
        chances, chance = [], 1.0
        for place in range(most):
            chance *= self._counts.chance(length + place)
            chances.append(chance)
        # What repeats itself goes on doing so beyond the end.
        return Draft(ids[start + np.arange(most) % (len(ids) - start)], tuple(chances))

    def checked(self, num_drafted: int, num_kept: int) -> None:
        """Book what became of the first tokens of the last proposal, which were drafted."""
        for _ in range(num_kept):
            self._book(is_right=True)
        if num_kept < num_drafted:
            self._book(is_right=False)

    def _compare(self, ids: IdArray) -> None:
        """Book the token that came where none was drafted."""
        if self._length and self._num_known < len(ids):
            self._book(is_right=bool(ids[self._num_known] == ids[self._expected]))
        self._length = 0

    def _book(self, *, is_right: bool) -> None:
        self._counts.book(self._length, is_right=is_right)
        self._num_known += 1
        self._expected += 1
        self._length = self._length + 1 if is_right else 0
