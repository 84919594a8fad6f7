"""Some tokens of a pass, as rows of a pass of their own."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lorax_shard.model.interface import IdArray, PassNumbers


class AskedRows(NamedTuple):
    """Runs of asked tokens, in the order in which they are asked for.

    Neighbours of one row that are asked for one after the other stay together.
    """

    rows: IdArray  # of which row of the pass
    query_lens: IdArray
    positions: IdArray  # of the first of each, in the row


def asked_rows(numbers: PassNumbers, asked: IdArray) -> AskedRows:
    """Return the runs of tokens of a pass (indices into T)."""
    lens = np.array(numbers.query_lens, dtype=np.int64)
    ends = np.cumsum(lens)
    rows = np.searchsorted(ends, asked, side="right")
    positions = np.array(numbers.context_lens, dtype=np.int64)[rows] - (ends[rows] - asked)
    are_neighbours = (np.diff(asked) == 1) & (np.diff(rows) == 0)
    firsts = np.flatnonzero(np.concatenate([[True], ~are_neighbours]))
    run_lens = np.diff(np.append(firsts, len(asked)))
    return AskedRows(rows[firsts], run_lens, positions[firsts])
