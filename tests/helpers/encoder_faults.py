"""Faults to plant in the attention of encoders: rows that see their neighbours."""

from __future__ import annotations

from lorax_shard.attention import whole
from lorax_shard.attention.backend import StepMetadata
from lorax_shard.attention.ragged import WholeRows


def fewer_rows(metadata: StepMetadata) -> WholeRows:
    """Tell the kernel of fewer rows than a step has."""
    lens = _joined(metadata.query_lens)
    rows = metadata.scratch["fewer rows"] = WholeRows()
    rows.fill(lens, lens, None)
    return rows


def fewer_groups(metadata: StepMetadata) -> list[whole._Group]:
    """Return groups that are such rows."""
    groups, start = [], 0
    for length in _joined(metadata.query_lens):
        groups.append(whole._Group(1, length, slice(start, start + length), None, None))
        start += length
    return groups


def _joined(lens: list[int]) -> list[int]:
    """Join neighbours up to the length of the longest row: further distances a model may not have."""
    joined: list[int] = []
    for length in lens:
        if joined and joined[-1] + length <= max(lens):
            joined[-1] += length
        else:
            joined.append(length)
    return joined
