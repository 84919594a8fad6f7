"""Who holds which heads and which features: pure arithmetic, uneven where it must be.

Heads are split by groups: a query head lives where its key head does. With at least as many
key heads as ranks, each rank takes whole groups, the first ones one more where they do not
divide. With fewer, ranks share a key head: each holds a copy of it and a part of its
queries. Either way all query heads of a rank share its key heads evenly, which is what
attention kernels expect.

    9 query heads, 3 key heads     2 ranks: q 0-5, k 0-1 | q 6-8, k 2
                                   4 ranks: q 0-1, k 0 | q 2, k 0 | q 3-5, k 1 | q 6-8, k 2
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring items: start <= item < stop."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def scaled(self, factor: int) -> Span:
        """Return the span of items that are ``factor`` times as fine."""
        return Span(self.start * factor, self.stop * factor)


@dataclass(frozen=True, slots=True)
class HeadShare:
    """The heads of one rank."""

    queries: Span
    keys: Span


class CannotSplitError(ValueError):
    """A model cannot be spread over so many ranks; the text names what does not fit."""


def share_of(size: int, rank: int, world_size: int) -> Span:
    """Return a rank's part of ``size`` items; the first ranks have one more where needed."""
    if size < world_size:
        raise CannotSplitError(f"{size} items cannot be spread over {world_size} ranks")
    least, more = divmod(size, world_size)
    start = rank * least + min(rank, more)
    return Span(start, start + least + (rank < more))


def share_heads(num_queries: int, num_keys: int, rank: int, world_size: int) -> HeadShare:
    """Return a rank's heads; CannotSplitError when there are more ranks than query heads."""
    if num_queries % num_keys:
        raise CannotSplitError(
            f"{num_queries} query heads do not divide among {num_keys} key heads"
        )
    per_key = num_queries // num_keys
    if world_size <= num_keys:
        keys = share_of(num_keys, rank, world_size)
        return HeadShare(keys.scaled(per_key), keys)
    if world_size > num_queries:
        raise CannotSplitError(
            f"{num_queries} query heads cannot be spread over {world_size} ranks; "
            f"use at most {num_queries}"
        )
    return _shared_key(num_keys, per_key, rank, world_size)


def _shared_key(num_keys: int, per_key: int, rank: int, world_size: int) -> HeadShare:
    """Return the heads of a rank that shares its one key head with others."""
    for key in range(num_keys):
        holders = share_of(world_size, key, num_keys)
        if holders.start <= rank < holders.stop:
            part = share_of(per_key, rank - holders.start, len(holders))
            offset = key * per_key
            return HeadShare(Span(offset + part.start, offset + part.stop), Span(key, key + 1))
    raise AssertionError("every rank holds a key head")
