"""Into how many parts the contexts of decode rows are split, so that a GPU's processors end together.

Programs that read more than others keep a whole step waiting, and a short row that is split costs
more than it gains. So a part is about as long for every row of a step: what each processor would
read if all of them read equally much. A long row among short ones gets many parts, the short ones one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorax_shard.attention.backend import AttentionSpec

_IntArray = NDArray[np.int64]

# Splits of one row at most.
MOST_SPLITS = 128
# Tokens that a split has at least to read, but for its row's last ones.
_LEAST_TOKENS = 64
# Programs for each processor at equal lengths. Rounding makes up to four of it, which are on a
# processor at once: none waits for others to end.
_PER_PROCESSOR = 3


class RowSplits(NamedTuple):
    """The splits of R rows, the longest first, those of a row one after the other."""

    splits: _IntArray  # S x 3: of each its row, its number in the row, and of how many
    rows: _IntArray  # R x 2: of each row its first split, and how many follow

    @property
    def num(self) -> int:
        """How many there are."""
        return len(self.splits)


def fixed(num_rows: int, num_splits: int) -> RowSplits:
    """Return equally many splits for each row, in the order of the rows."""
    return _lay_out(np.full(num_rows, num_splits), np.arange(num_rows))


def by_length(
    lens: Sequence[int], spec: AttentionSpec, programs: int, num_processors: int
) -> RowSplits:
    """Return splits of about equal length, for ``programs`` of each split."""
    spans = _spans(np.asarray(lens, dtype=np.int64), spec)
    tokens = max(
        _LEAST_TOKENS, -(-int(spans.sum()) * programs // (_PER_PROCESSOR * num_processors))
    )
    counts = np.clip((spans + tokens // 2) // tokens, 1, MOST_SPLITS)
    return _lay_out(counts, np.argsort(-spans // counts, kind="stable"))


def _spans(lens: _IntArray, spec: AttentionSpec) -> _IntArray:
    """Return how many keys the last token of each row sees."""
    spans = lens if spec.window is None else np.minimum(lens, spec.window)
    return spans if spec.chunk is None else np.minimum(spans, (lens - 1) % spec.chunk + 1)


def _lay_out(counts: _IntArray, order: _IntArray) -> RowSplits:
    """Return ``counts[row]`` splits of each row, row after row in ``order``."""
    of_rows = counts[order]
    firsts = np.cumsum(of_rows) - of_rows
    rows = np.empty((len(counts), 2), dtype=np.int64)
    rows[order, 0], rows[:, 1] = firsts, counts
    row = np.repeat(order, of_rows)
    number = np.arange(len(row)) - np.repeat(firsts, of_rows)
    return RowSplits(np.stack([row, number, counts[row]], axis=1), rows)
