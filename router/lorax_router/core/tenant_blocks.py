"""Whose the blocks of a pool are that are not free, and who holds more than its share of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from lorax_contract.step import BlockId

# A tenant and what it has cached, in order of release.
_Cached = dict[BlockId, None]


class TenantBlocks:
    """A block is its tenant's from when it is taken until it is free again.

    Args:
        num_blocks: blocks in the pool.
        is_split: whether no tenant finds what others computed. If they do, a chain is several
            tenants', and would lose a block before those behind it: then nobody's go first.
    """

    __slots__ = ("_cached", "_is_split", "_num_blocks", "_numbers", "_owners", "shares")

    def __init__(self, num_blocks: int, *, is_split: bool = True) -> None:
        self._num_blocks = num_blocks
        self._is_split = is_split
        self._owners = [""] * num_blocks
        self._numbers: Counter[str] = Counter()
        self._cached: dict[str, _Cached] = {}
        # Of those that may hold a part only while others want it: from 0 to 1.
        self.shares: dict[str, float] = {}

    def allow(self, tenant: str, share: float | None) -> None:
        """Say what a tenant may hold while others want it; None: as much as there is."""
        if share is None:
            self.shares.pop(tenant, None)
        else:
            self.shares[tenant] = share

    def excess(self, tenant: str, more: int = 0) -> float:
        """Return how many blocks a tenant has above its share, with so many more; 0: none."""
        share = self.shares.get(tenant)
        if share is None:
            return 0.0
        return max(0.0, self._numbers[tenant] + more - share * self._num_blocks)

    def victim(self) -> BlockId | None:
        """Return the cached block that goes first since its tenant has too many; None: whichever."""
        if not self.shares or not self._is_split:
            return None
        above = [each for each in self.shares if self._cached.get(each) and self.excess(each)]
        if not above:
            return None
        return next(iter(self._cached[max(above, key=self.excess)]))

    def taken(self, tenant: str, blocks: Sequence[BlockId]) -> None:
        """Free blocks become a tenant's."""
        for block in blocks:
            self._owners[block] = tenant
        self._numbers[tenant] += len(blocks)

    def freed(self, block: BlockId) -> None:
        """A block is nobody's any more."""
        owner = self._owners[block]
        self._numbers[owner] -= 1
        if not self._numbers[owner]:
            del self._numbers[owner]

    def cached(self, block: BlockId) -> None:
        """A block is kept, and nobody holds it."""
        self._cached.setdefault(self._owners[block], {})[block] = None

    def uncached(self, block: BlockId) -> None:
        """A cached block is held again, or taken for something else."""
        owner = self._owners[block]
        cached = self._cached[owner]
        del cached[block]
        if not cached:
            del self._cached[owner]

    def check(self, blocks: Iterable[BlockId], cached: Iterable[BlockId]) -> None:
        """Raise AssertionError unless these are all that are not free, and those cached."""
        if Counter(self._owners[block] for block in blocks) != self._numbers:
            raise AssertionError("the blocks of tenants are counted wrong")
        if {block for each in self._cached.values() for block in each} != set(cached):
            raise AssertionError("the cached blocks of tenants are not those of the pool")
