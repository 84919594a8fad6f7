"""Homes by rendezvous hashing: each replica draws a lot for each key, the best lots are its homes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from math import log

_MASK = (1 << 64) - 1
_UNIT = 1.0 / (1 << 53)


def hash_of(text: str) -> int:
    """Return 64 bits that are the same in every process."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def mixed(value: int) -> int:
    """Return 64 bits in which each bit depends on all of a value's (the finalizer of splitmix64)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Rendezvous:
    """Ranks replicas for keys. A replica that joins or leaves moves only what it gets or had.

    The lot of a replica is weight / -log(u), u uniform by key and name: each is first for a part of
    the keys that is its part of all weights (Schindelhauer and Schomaker, 2005).

    Args:
        max_ranked: rankings that are remembered.
    """

    def __init__(self, max_ranked: int = 20_000) -> None:
        self._max_ranked = max_ranked
        self._weights: dict[str, float] = {}
        self._seeds: list[tuple[int, float, str]] = []
        self._ranked: OrderedDict[str, tuple[str, ...]] = OrderedDict()

    def use(self, weights: Mapping[str, float]) -> None:
        """Rank these replicas from now on; weights are above zero."""
        if weights == self._weights:
            return
        self._weights = dict(weights)
        self._seeds = [(hash_of(name), weight, name) for name, weight in weights.items()]
        self._ranked.clear()

    def ranked(self, key: str) -> tuple[str, ...]:
        """Return all replicas, the first home of the key first: O(replicas) once, then O(1)."""
        known = self._ranked.get(key)
        if known is not None:
            self._ranked.move_to_end(key)
            return known
        ranked = self._ranked[key] = self._rank(hash_of(key))
        if len(self._ranked) > self._max_ranked:
            self._ranked.popitem(last=False)
        return ranked

    def _rank(self, key: int) -> tuple[str, ...]:
        lots = [
            (log(((mixed(seed ^ key) >> 11) + 0.5) * _UNIT) / weight, name)
            for seed, weight, name in self._seeds
        ]
        lots.sort(reverse=True)
        return tuple([name for _, name in lots])


def first_homes(weights: Mapping[str, float], keys: Iterable[str]) -> dict[str, str]:
    """Return the first home of each key: what to preload where. O(replicas) a key."""
    if not weights:
        return {}
    rendezvous = Rendezvous(max_ranked=1)
    rendezvous.use(weights)
    return {key: rendezvous.ranked(key)[0] for key in keys}


def moved(
    before: Mapping[str, float], after: Mapping[str, float], keys: Sequence[str]
) -> dict[str, tuple[str | None, str | None]]:
    """Return the keys whose first home is another after replicas joined or left: (old, new).

    None stands for a home where there are no replicas.
    """
    old, new = first_homes(before, keys), first_homes(after, keys)
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}
