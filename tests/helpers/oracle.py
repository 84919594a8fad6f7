"""Drafts by somebody who knows the answers, and is wrong now and then."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from lorax_shard.engine.drafts import Draft
from lorax_shard.engine.earlier_places import IdArray
from lorax_shard.engine.pass_prices import PassPrices

_WRONG_ID = 7
# Passes whose positions cost nothing: as much is drafted as may be.
FREE = PassPrices(sizes=(1,), single_s=(1.0,), drafted_s=(1e-9,))


class Oracle:
    """Proposes what comes next of sequences that are known whole; equal ones do the same."""

    def __init__(self, known: Sequence[Sequence[int]], *, num_wrong_in_ten: int = 2) -> None:
        self._known = [list(each) for each in known]
        self._draw = random.Random(11)
        self._num_wrong = num_wrong_in_ten
        self.num_proposed = 0

    def propose(self, ids: IdArray, most: int) -> Draft:
        """Return up to so many of the next tokens, some of them wrong."""
        before = ids.tolist()
        for known in self._known:
            if known[: len(before)] == before:
                draft = known[len(before) :][: max(most, 0)]
                self.num_proposed += len(draft)
                given = np.array([self._maybe_wrong(each) for each in draft], dtype=np.int64)
                return Draft(given, (1.0,) * len(draft))
        return Draft()

    def checked(self, num_drafted: int, num_kept: int) -> None:
        """Learn nothing."""

    def _maybe_wrong(self, token_id: int) -> int:
        return _WRONG_ID if self._draw.randrange(10) < self._num_wrong else token_id
