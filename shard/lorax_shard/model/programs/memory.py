"""Where a program's tensors lie: memory for each token, and for each logit, used again and again.

A tensor whose bytes grow with T lies at the same offset in the memory of one token, times T.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

# Of the offset in the memory of one token.
_ALIGNMENT = 64


class Lifetime(NamedTuple):
    """When a tensor is used: by calls first to last; and its bytes for each token (or logit)."""

    first: int
    last: int
    nbytes: int


class Layout(NamedTuple):
    """The offset of each tensor, and the bytes of all."""

    offsets: dict[int, int]
    nbytes: int


def lay_out(lifetimes: dict[int, Lifetime]) -> Layout:
    """Give each tensor the lowest place that is free as long as it lives."""
    offsets: dict[int, int] = {}
    end = 0
    alive: list[tuple[int, int, int]] = []  # offset, end, last use
    for number, life in sorted(lifetimes.items(), key=lambda item: item[1].first):
        alive = [each for each in alive if each[2] >= life.first]
        offset = _first_gap(((start, stop) for start, stop, _ in alive), life.nbytes)
        offsets[number] = offset
        alive.append((offset, offset + life.nbytes, life.last))
        end = max(end, offset + life.nbytes)
    return Layout(offsets, -(-end // _ALIGNMENT) * _ALIGNMENT)


def _first_gap(taken: Iterable[tuple[int, int]], nbytes: int) -> int:
    at = 0
    for start, stop in sorted(taken):
        if at + nbytes <= start:
            break
        at = max(at, -(-stop // _ALIGNMENT) * _ALIGNMENT)
    return at
