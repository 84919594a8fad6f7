"""The tokens of a pass whose logits are asked for, as rows of a pass of their own."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lorax_shard.model.interface import IdArray, PassNumbers


class AskedRows(NamedTuple):
    """Rows of the asked tokens, in the order in which they are asked for.

    Neighbours of one row that are asked for one after the other stay together.
    """

    query_lens: list[int]
    context_lens: list[int]
    tables: IdArray  # rows x width


def asked_rows(numbers: PassNumbers) -> AskedRows:
    """Return the rows, whose keys and values are in the cache."""
    asked, ends = numbers.logit_rows, np.cumsum(numbers.query_lens)
    rows = np.searchsorted(ends, asked, side="right")
    # How many tokens a token's context has, itself included.
    contexts = np.array(numbers.context_lens, dtype=np.int64)[rows] - (ends[rows] - 1 - asked)
    are_neighbours = (np.diff(asked) == 1) & (np.diff(rows) == 0)
    firsts = np.flatnonzero(np.concatenate([[True], ~are_neighbours]))
    lasts = np.append(firsts[1:], len(asked)) - 1
    return AskedRows(
        (lasts - firsts + 1).tolist(), contexts[lasts].tolist(), numbers.tables[rows[firsts]]
    )
