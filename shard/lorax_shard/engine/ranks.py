"""What the engines of several ranks agree on: blocks, adapters, rows, tokens and ends.

Plans are the same on all ranks, and so is what follows from them. What does not: memory that
one rank lacks, what rank 0 draws and tells, a pass that fails. ``same_rows`` finds out the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Sequence

import torch

from lorax_contract.step import AdapterHandle, FinishCode
from lorax_shard.engine.launched import LaunchedPass
from lorax_shard.parallel.arriving import Arriving
from lorax_shard.parallel.group import GroupBrokenError, RankGroup

logger = logging.getLogger(__name__)


def least_of(group: RankGroup, value: int) -> int:
    """Return the least value of all ranks."""
    return min(each for (each,) in group.gather_values([value]))


def missing_somewhere(
    group: RankGroup, handles: Sequence[AdapterHandle], active: Container[AdapterHandle]
) -> dict[AdapterHandle, str]:
    """Return the handles that are not active on some rank, and in words on which."""
    flags = group.gather_values([int(handle in active) for handle in handles])
    missing = {}
    for handle, column in zip(handles, zip(*flags, strict=True), strict=True):
        ranks = [str(rank) for rank, is_active in enumerate(column) if not is_active]
        if ranks:
            missing[handle] = f"it could not take effect on rank {' and '.join(ranks)}"
            logger.error("adapter %d: %s, so it does on none", handle, missing[handle])
    return missing


def share_ids(group: RankGroup, ids: Sequence[int]) -> list[int]:
    """Return the ids that rank 0 drew on all ranks; the others' say only how many there are."""
    shared: list[int] = group.broadcast(torch.tensor(ids)).tolist()
    return shared


def begin_sharing_ids(group: RankGroup, launched: LaunchedPass) -> Arriving:
    """Let all ranks have what rank 0 drew in a pass."""
    tokens = launched.tokens
    if tokens is not None and tokens.on_device is not None:
        return group.begin_broadcast(tokens.on_device)
    num = sum(1 + len(item.draft) for item in launched.drawing)
    return group.begin_broadcast(torch.tensor([0] * num if tokens is None else tokens.read().ids))


def share_ends(group: RankGroup, steps: Sequence[LaunchedPass]) -> None:
    """Have on all ranks what rank 0 told of each row, and how it ends."""
    num = sum(len(each.drawing) for each in steps)
    values = [0] * (2 * num)
    if group.rank == 0:
        values = [value for each in steps for value in (*each.num_told, *each.finishes)]
    values = share_ids(group, values)
    for each in steps:
        count = len(each.drawing)
        each.num_told = values[:count]
        each.finishes = [FinishCode(code) for code in values[count : 2 * count]]
        values = values[2 * count :]


def fails_everywhere(group: RankGroup, error: Exception) -> bool:
    """Whether a pass failed on all ranks alike, so that none is in the middle of it."""
    return not isinstance(error, GroupBrokenError) and group.fails_together()


def broken_by(group: RankGroup, error: Exception) -> GroupBrokenError:
    """Return what ends all ranks when this one could not finish a forward pass."""
    if isinstance(error, GroupBrokenError):
        return error
    return GroupBrokenError(
        f"rank {group.rank} could not finish a step: {type(error).__name__}: {error}"
    )
