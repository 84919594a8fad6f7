"""Drafts of a row's next tokens, looked up in its own: text often repeats what stands before it.

The model checks a draft in one pass: it computes the row's last token and the draft together,
draws at each position what it would have drawn there anyway, and keeps the draws up to the
first that differs from the draft. So nothing but the time depends on what was drafted
(Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023; Saxena,
Prompt Lookup Decoding, 2023).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IdArray = NDArray[np.int64]

NO_DRAFT: IdArray = np.empty(0, dtype=np.int64)
# A draft follows an earlier place where at least so many tokens were the same; at places that
# are alike so far, up to the most are compared.
_LEAST_MATCH, _MOST_MATCH = 2, 8
# Tokens of the draft after one of which nothing was kept.
_SHORT = 4
# Steps without a draft after one of which nothing was kept: doubled each time, up to the most.
_FIRST_PAUSE, _LONGEST_PAUSE = 1, 64


def look_up(ids: IdArray, count: int) -> IdArray:
    """Return ``count`` tokens that may come next: those behind the latest place most like the end.

    None where the last two tokens stand nowhere else.
    """
    if count < 1 or len(ids) <= _LEAST_MATCH:
        return NO_DRAFT
    # Ends of places: each has a token before it and one behind it.
    ends = np.flatnonzero(ids[1:-1] == ids[-1]) + 1
    ends = ends[ids[ends - 1] == ids[-2]]
    if not len(ends):
        return NO_DRAFT
    for length in range(_LEAST_MATCH, _MOST_MATCH):
        longer = ends[ends >= length]
        longer = longer[ids[longer - length] == ids[-1 - length]]
        if not len(longer):
            break
        ends = longer
    start = int(ends[-1]) + 1
    # What repeats itself goes on doing so beyond the end.
    return ids[start + np.arange(count) % (len(ids) - start)]


class DraftPace:
    """How many tokens of a row are drafted, by what became of its drafts so far.

    As many as may be, since a pass of a few tokens takes little more than one of a single one. After
    a draft of which nothing was kept come steps without, and then a short one.
    """

    __slots__ = ("_length", "_max_length", "_next_pause", "_pause")

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._length = max_length
        self._pause = 0
        self._next_pause = _FIRST_PAUSE

    def length(self) -> int:
        """Return how many tokens to draft in this step; each step asks once."""
        if self._pause:
            self._pause -= 1
            return 0
        return self._length

    def checked(self, num_drafted: int, num_kept: int) -> None:
        """Book what became of a draft."""
        if not num_drafted:
            return
        if num_kept:
            self._next_pause = _FIRST_PAUSE
            self._length = self._max_length
            return
        self._length = min(_SHORT, self._max_length)
        self._pause = self._next_pause
        self._next_pause = min(2 * self._next_pause, _LONGEST_PAUSE)
